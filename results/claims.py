"""Claims with seeds: pre-trains and probes the methods on 10,000 images of CIFAR-10, three seeds. Begun, no table yet.

    python results/claims.py --data DIR --runs SCRATCH [--checkout COMMIT_CLONE]

DIR holds CIFAR-10 as files, train/CLASS/*.jpg and val/CLASS/*.jpg; SCRATCH takes checkpoints. Two runs at a time, one
thread each, in the order of PLAN: what tells most comes first. Each run's command, log, k-NN and linear probe go to
results/claims/NAME_seedN.json; the same command goes on where it stopped. All have the same images, order, batch, rate
(chosen for MAE alone: reproduce/tuning.md) and probe. SdAE's teacher averages over the paper's share of a run, a
twelfth of it at the beginning and a third at its end.
"""
import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZE = ("--model vit_micro --img_size 32 --patch_size 4 --decoder_embed_dim 64 --decoder_depth 1 --decoder_num_heads 2 "
        "--batch_size 64 --blr 0.008 --crop_scale 0.2 1")
PROBES = {"knn": "--mode knn --pool avg",
          "linear": "--mode linear --pool avg --epochs 3 --warmup_epochs 0.5 --batch_size 64 --blr 40 "
                    "--crop_scale 0.3 1"}
ROWS = {  # name: script, its flags, epochs (156 steps each)
    "mae": ("mae.py", "", 40), "sdae": ("sdae.py", "", 40), "efficient_mae": ("efficient_mae.py", "", 40),
    "robust_mae": ("robust_mae.py", "", 40), "emae": ("emae.py", "", 40),
    "mae_8ep": ("mae.py", "", 8), "mae_20ep": ("mae.py", "", 20), "mae_80ep": ("mae.py", "", 80),
    "emae_8ep": ("emae.py", "", 8), "emae_10ep": ("emae.py", "", 10),
    **{f"emae_8ep_w{w}": ("emae.py", f"--consistency_weight {w}", 8) for w in ("0", "0.1", "0.5")},
    **{f"emae_w{w}": ("emae.py", f"--consistency_weight {w}", 40) for w in ("0", "0.1", "0.5")},
    "emae_10ep_w0": ("emae.py", "--consistency_weight 0", 10), "mae_85": ("mae.py", "--mask_ratio 0.85", 40),
    "sdae_features": ("sdae.py", "--cosine_over features", 40), "robust_rgb": ("robust_mae.py", "--target rgb", 40),
    "robust_drop0": ("robust_mae.py", "--drop_edge 0", 40)}
FIVE = ["mae", "sdae", "efficient_mae", "robust_mae", "emae"]
OTHERS = [["mae_8ep", "emae_8ep_w0", "emae_8ep", "emae_8ep_w0.1", "emae_8ep_w0.5", "mae_20ep"],
          ["mae_85", "sdae_features", "emae_10ep", "emae_10ep_w0", "robust_rgb", "robust_drop0"],
          ["emae_w0", "emae_w0.5", "emae_w0.1", "mae_80ep"]]
PLAN = [(name, seed) for names in (FIVE, *OTHERS) for seed in range(3) for name in names]


def words_of(name):
    """The words of a row's pre-training, without data, seed and folder."""
    script, flags, epochs = ROWS[name]
    teacher = f"--momentum {1 - 12 / (156 * epochs):.5f} {1 - 3 / (156 * epochs):.5f}" if script == "sdae.py" else ""
    return f"{script} {SIZE} --epochs {epochs} --warmup_epochs {epochs / 10:g} {teacher} {flags}".split()


def first_images(data, few):
    """A folder with the first 1000 training images of each class, and all of val/, as links."""
    for folder in filter(Path.is_dir, (data / "train").iterdir()):
        (few / "train" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:1000]:
            (few / "train" / folder.name / path.name).symlink_to(path)
    (few / "val").symlink_to(data / "val")


def go(name, seed, args):
    """One run and its probes, unless they are there."""
    result, folder = HERE / "claims" / f"{name}_seed{seed}.json", args.runs / f"{name}_seed{seed}"
    if result.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)

    def call(words, output):
        words = [*words, "--data", args.runs / "few", "--seed", seed, "--output_dir", output, "--num_workers", 0,
                 "--device", "cpu"]
        with open(folder / "out.txt", "a") as file:
            subprocess.run([sys.executable, *map(str, words)], cwd=args.checkout, stdout=file, stderr=file, check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    call(words_of(name), folder)
    found = {"command": f"{' '.join(words_of(name))} --seed {seed}"}
    for probe, words in PROBES.items():
        call(["finetune.py", *words.split(), "--ckpt", folder / "encoder.pt"], folder / probe)
        found[probe] = json.loads((folder / probe / "result.json").read_text())["top1"]
    found["log"] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result.write_text(json.dumps(found) + "\n")
    print(name, seed, found["linear"], found["knn"], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--checkout", type=Path, default=HERE.parent, help="a frozen clone of the repository")
    args = parser.parse_args()
    args.runs, args.checkout = args.runs.resolve(), args.checkout.resolve()
    if not (args.runs / "few").exists():
        first_images(args.data.resolve(), args.runs / "few")
    plan = queue.SimpleQueue()
    for row in PLAN:
        plan.put(row)

    def work():
        while not plan.empty():
            go(*plan.get(), args)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
