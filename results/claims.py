"""Do the papers' claims hold? Tried at small scale on CIFAR-10, with seeds.

    python results/claims.py --data DIR --runs SCRATCH      # runs what is missing; the same command goes on
    python results/claims.py                                # only the pages, from the files that are there

DIR holds CIFAR-10, train/CLASS/*.jpg and val/CLASS/*.jpg; SCRATCH takes checkpoints. Each run's command, log and
results go to results/claims/NAME_seedN.json; from these come claims.md and its plots (by matplotlib). Run it in a clone
that nobody edits; `timeout -s INT 540` saves what runs. `--scale gpu`: larger model and batch, longer runs.

All rows share encoder, decoder, order of the images, crops (MAE's, for Robust MAE too), batch, rate and probe, which
were chosen for MAE alone (results/negative.md). What is a method's own has its paper's value, or the flags in the
table. SdAE's teacher averages over the paper's share of a run: a twelfth at first, a third in the end.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import visualize
from common import normalize

SCALES = {
    "cpu": dict(size="--model vit_micro --img_size 32 --patch_size 4 --decoder_embed_dim 64 --decoder_depth 1 "
                     "--decoder_num_heads 2", batch=64, blr=8e-3, longer=1, machine="--device cpu --num_workers 0",
                linear="--epochs 3 --warmup_epochs 0.5 --batch_size 64 --blr 40 --crop_scale 0.3 1",
                finetune="--epochs 5 --warmup_epochs 0.5 --batch_size 64 --blr 4e-3 --crop_scale 0.3 1 --drop_path 0 "
                         "--layer_decay 1 --no-rand_augment --mixup 0 --cutmix 0 --erasing 0"),
    "gpu": dict(size="--model vit_tiny --img_size 32 --patch_size 4 --decoder_embed_dim 192 --decoder_depth 4 "
                     "--decoder_num_heads 3", batch=512, blr=1e-3, longer=5, machine="--device cuda",
                linear="--epochs 20 --warmup_epochs 2 --batch_size 512 --blr 5 --crop_scale 0.3 1",
                finetune="--epochs 30 --warmup_epochs 3 --batch_size 512 --blr 1e-3 --crop_scale 0.3 1")}
METHODS = ["mae", "sdae", "efficient_mae", "robust_mae", "emae"]
ROWS = {  # script and flags, epochs; what tells most comes first. all_: on all images, one seed; else three seeds
    **{name: (f"{name}.py", 40) for name in METHODS},
    "mae_8ep": ("mae.py", 8), "emae_8ep": ("emae.py", 8),
    **{f"emae_8ep_w{w}": (f"emae.py --consistency_weight {w}", 8) for w in ("0", "0.5", "0.1")},
    **{f"all_{name}": (f"{name}.py", 8) for name in METHODS},
    "mae_85": ("mae.py --mask_ratio 0.85", 40), "emae_w0": ("emae.py --consistency_weight 0", 40),
    "mae_20ep": ("mae.py", 20), "sdae_features": ("sdae.py --cosine_over features", 40),
    "robust_drop0": ("robust_mae.py --drop_edge 0", 40), "emae_10ep": ("emae.py", 10),
    "emae_10ep_w0": ("emae.py --consistency_weight 0", 10), "mae_80ep": ("mae.py", 80),
    **{f"emae_w{w}": (f"emae.py --consistency_weight {w}", 40) for w in ("0.5", "0.1")}}
COMMON = (r" --(seed|model|img_size|patch_size|decoder_embed_dim|decoder_depth 1|decoder_num_heads|batch_size|blr|"
          r"crop_scale|epochs|warmup_epochs|momentum)( [\w.]+)*")              # flags of all runs, and their values
# What a paper says and its figures; the row that should be better ("≈": as good, "against": open), and the other
CLAIMS = [
    ("EMAE beats MAE at equal epochs", "68.2, 61.5 linear, 300 epochs, Table 1", "emae", "mae"),
    ("whole data alone beat MAE", "65.3, 61.5 linear, 300 epochs, Table 5", "emae_w0", "mae"),
    ("self-consistency adds to whole data", "68.4, 65.3 linear, 300 epochs, Table 5", "emae", "emae_w0"),
    ("weight 0.5 against 0", "the other reading of Eq. 10", "emae_w0.5", "emae_w0"),
    ("weight 0.1 against 0", "–", "emae_w0.1", "emae_w0"),
    ("at equal compute: EMAE against MAE", "65.0, 64.4 linear, 200, 800 epochs, Table 5", "emae_10ep", "mae"),
    ("the same: whole data alone against MAE", "63.4, 64.4 linear, 200, 800 epochs, Table 5", "emae_10ep_w0", "mae"),
    ("short runs: EMAE beats MAE", "60.9, 54.8 linear, 100 epochs, Table 5", "emae_8ep", "mae_8ep"),
    ("short runs: whole data alone beat MAE", "60.0, 54.8 linear, 100 epochs, Table 5", "emae_8ep_w0", "mae_8ep"),
    ("short runs: self-consistency adds to it", "60.9, 60.0 linear, 100 epochs, Table 5", "emae_8ep", "emae_8ep_w0"),
    ("short runs: weight 0.5 against 0", "the other reading of Eq. 10", "emae_8ep_w0.5", "emae_8ep_w0"),
    ("short runs: weight 0.1 against 0", "–", "emae_8ep_w0.1", "emae_8ep_w0"),
    ("MAE at 0.75 beats MAE at 0.85", "Efficient MAE: 84.6, 84.1 fine-tuned, 200 epochs, Table 2", "mae", "mae_85"),
    ("Efficient MAE at 0.85 ≈ MAE at 0.75", "84.6, 84.6 fine-tuned, 200 epochs, Table 4", "efficient_mae", "mae"),
    ("Efficient MAE beats MAE at 0.85", "84.6, 84.1 fine-tuned, 200 epochs, Table 4", "efficient_mae", "mae_85"),
    ("Robust MAE beats MAE", "83.6, 83.3 fine-tuned, 800 epochs, Table 2", "robust_mae", "mae"),
    ("drop edge beats none", "83.6, 83.28 fine-tuned, Tables 2, 1 (inferred)", "robust_mae", "robust_drop0"),
    ("statistics by place ≈ by channel (MAE)", "83.28, 83.25 fine-tuned, Table 1 (inferred)", "robust_drop0", "mae"),
    ("SdAE beats MAE", "64.9, 61.5 linear, 300 epochs, Table 2", "sdae", "mae"),
    ("the cosine over tokens against that over features", "–", "sdae", "sdae_features")]
WEIGHTS = {"MAE": ["mae_8ep", "mae"], "EMAE, weight 0": ["emae_8ep_w0", "emae_w0"],
           "EMAE, weight 0.1": ["emae_8ep_w0.1", "emae_w0.1"], "EMAE, weight 0.5": ["emae_8ep_w0.5", "emae_w0.5"],
           "EMAE, weight 1": ["emae_8ep", "emae"]}
CURVE = {"MAE": ["mae_8ep", "mae_20ep", "mae", "mae_80ep"]}


def words_of(scale, name):
    """The words of a row's pre-training, without data, seed and folder."""
    s, (script, epochs) = SCALES[scale], ROWS[name]
    epochs *= s["longer"]
    steps = epochs * ((50000 if name.startswith("all_") else 10000) // s["batch"])
    teacher = f"--ema iteration --momentum {1 - 12 / steps:.5f} {1 - 3 / steps:.5f}" if "sdae" in script else ""
    return (f"{script} {s['size']} --batch_size {s['batch']} --blr {s['blr']:g} --crop_scale 0.2 1 --epochs {epochs} "
            f"--warmup_epochs {epochs / 10:g} {teacher}").split()


def first_images(data, few):
    """Makes a folder of links to the first 1000 training images of each class, and to val/."""
    for folder in filter(Path.is_dir, (data / "train").iterdir()):
        (few / "train" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:1000]:
            (few / "train" / folder.name / path.name).symlink_to(path)
    (few / "val").symlink_to(data / "val")


def go(name, seed, args):
    """Pre-trains and evaluates one run, unless its file is there. Raises CalledProcessError where a command fails."""
    result, folder = args.results / f"{name}_seed{seed}.json", args.runs / args.scale / f"{name}_seed{seed}"
    all_images, scale, few = name.startswith("all_"), SCALES[args.scale], args.runs / "few"
    if result.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)

    def call(words, data, output):
        words = [*words, "--data", data, "--seed", seed, "--output_dir", output, *scale["machine"].split()]
        with open(folder / "out.txt", "a") as file:
            subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=file, stderr=file, check=True,
                           env={**os.environ, **({} if args.scale == "gpu" else {"OMP_NUM_THREADS": "1"})})
    words = words_of(args.scale, name)
    call(words, args.data if all_images else few, folder)
    found = {"command": f"{' '.join(words)} --seed {seed}", "commit": subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()}
    for mode in ("knn", "linear", "finetune")[:2 + all_images]:         # with the labels of the 10,000 images
        flags = f"--mode {mode} {scale.get(mode, '')} {'--pool avg' if mode != 'finetune' else ''}"
        call(["finetune.py", *flags.split(), "--ckpt", folder / "encoder.pt"], few, folder / mode)
        found[mode] = json.loads((folder / mode / "result.json").read_text())["top1"]
    found["log"] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if name in ("mae", "mae_8ep", "all_mae") or "emae" in name:
        found["masks"] = agreement(folder / "last.pt", args.data / "val")
    result.write_text(json.dumps(found) + "\n")
    print(name, seed, found["linear"], found["knn"], flush=True)


def agreement(checkpoint, images):
    """How far predictions of a patch are apart under the masks of four seeds, over how far those of two images are:
    mean absolute differences over pixels, on 512 images that were not trained on. 0: the mask doesn't matter."""
    model = visualize.load_pixel_model(str(checkpoint))
    imgs = normalize(visualize.load_images([str(images)], 512, visualize.model_size(model)))
    predictions = [visualize.predict(model, imgs, seed) for seed in range(4)]
    pred, mask = predictions[0]
    others = visualize.disagreement([(pred, mask), (pred.roll(1, 0), mask.roll(1, 0))])
    return (visualize.disagreement(predictions).nanmean() / others.nanmean()).item()


def read(results):
    """What the files hold, {row: {seed: contents}}: the rows of the plan, then those that are no longer in it."""
    found = {name: {} for name in ROWS}
    for path in sorted(results.glob("*_seed?.json")):
        found.setdefault(path.stem[:-6], {})[int(path.stem[-1])] = json.loads(path.read_text())
    return found


def residual(found, short):
    """The standard deviation of a linear probe about rows + seeds (two-way, without interaction: most pairs share MAE's
    runs), its degrees of freedom, and the number of rows: the short or the longer runs that have three seeds."""
    x = np.array([[runs[seed]["linear"] for seed in range(3)] for name, runs in found.items()
                  if len(runs) == 3 and ("8ep" in name) == short])
    if len(x) < 2:
        return np.inf, 0, len(x)
    rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0) + x.mean()
    df = 2 * (len(x) - 1)
    return np.sqrt((rest**2).sum() / df), df, len(x)


def compare(found):
    """For each claim that some seeds have both rows of: their number, both means, the least difference that shows
    (p < 0.05), p, and whether it shows after Holm's correction for all comparisons, too. Else None."""
    t, compared, scatter = np.linspace(0, 400, 400_001), [], []
    for s, df, _ in (residual(found, short) for short in (False, True)):
        density = (1 + t * t / max(df, 1)) ** (-(df + 1) / 2)                       # Student's distribution
        area = np.cumsum(density) - (density + density[0]) / 2                      # trapezoids
        scatter.append((s, 1 - area / area[-1]))                                    # probability of a larger |t|
    for _, _, *pair in CLAIMS:
        s, above = scatter["8ep" in pair[0]]
        seeds = found[pair[0]].keys() & found[pair[1]].keys()
        a, b = (np.mean([found[name][seed]["linear"] for seed in seeds]) if seeds else 0 for name in pair)
        error = s * np.sqrt(2 / max(1, len(seeds)))
        least, p = error * np.interp(-0.05, -above, t), np.interp(abs(a - b) / error, t, above)
        compared.append([len(seeds), a, b, least, p] if seeds else None)
    order = sorted(filter(None, compared), key=lambda entry: entry[4])
    for i, entry in enumerate(order):
        entry.append(bool(entry[4] < 0.05 / (len(order) - i)) and (i == 0 or order[i - 1][5]))
    return compared


def verdict(claim, a, b, least, holm):
    if abs(a - b) <= least:
        return "no difference shows"
    words = ("lower", "higher") if "≈" in claim or "against" in claim else ("reversed", "yes")
    return words[int(a > b)] + ", also after Holm's correction" * holm


def show(values, digits=1):
    """A mean, and each value where there are several. None, which was not measured, is a dash."""
    each = ["–" if value is None else f"{value:.{digits}f}" for value in values]
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.{digits}f}" + f" ({' / '.join(each)})" * (len(each) > 1) if known else "–"


def row_of(name, runs, longer):
    """A line of the table of runs: script and flags, and what was found. Old rows, of no plan, have one seed."""
    command, epochs = ROWS.get(name) or (runs[0]["command"], len(runs[0].get("log", [])))
    seeds = f"{len(runs)} of {1 if name.startswith('all_') else 3}" if name in ROWS else "1, cut"
    minutes = [sum(line["seconds"] for line in run.get("log", [])) / 60 for run in runs.values()]
    accuracies = [show([run.get(key) for run in runs.values()]) for key in ("linear", "knn", "finetune")]
    images = "50,000" if name.startswith("all_") else "10,000"
    cells = [f"`{re.sub(COMMON, '', command)}`", images, str(epochs * longer), seeds,
             *accuracies, show([run.get("masks") for run in runs.values()], 2), show(minutes, 0)]
    return f"| {' | '.join(cells)} |"


def page(results):
    """The text of claims.md."""
    found, s = read(results), SCALES["cpu" if results.name == "claims" else "gpu"]
    (longer, df, rows), (short, short_df, short_rows) = residual(found, False), residual(found, True)
    compared = compare(found)
    pairs = [entry[0] for entry in compared if entry]                               # seeds that both rows have
    lines = ["# Do the papers' claims hold? CIFAR-10, small scale", "",
        f"`{s['size']}`, batch {s['batch']}, blr {s['blr']:g}, crops of 0.2 to 1 of the area, on [several machines]("
        "README.md#machines-and-commits), in bf16 or float32, also within a pair. Top-1 in % on the 10,000 test images "
        f"with the labels of 10,000: a linear probe (`{s['linear']}`) and k-NN (k = 20) on the mean of the patch "
        f"tokens, and fine-tuning (`{s['finetune']}`). *Masks*: how far predictions of a patch are apart under two "
        "masks, over how far those of two images are. Minutes are pre-training's, with other jobs running. Commands, "
        f"commits and logs: [`{results.name}/`]({results.name}).", "",
        f"**The test.** Of {len(CLAIMS)} comparisons {pairs.count(3)} have three seeds; with fewer, verdicts are "
        "provisional. Each compares the seeds that both rows have. About the effects of row and seed, linear probes "
        f"scatter by s = {longer:.2f} (standard deviation; {rows} rows with three seeds, {df} degrees of freedom), in "
        f"*short runs*, of a fifth of the epochs, by {short:.2f} ({short_rows} rows, {short_df}). A difference over n "
        "pairs of seeds *shows* if it exceeds t₀.₉₇₅ · s · √(2/n), that is, if p < 0.05 (two-sided). One in twenty "
        f"shows by chance; the table also says which still show after Holm's correction for {len(pairs)} comparisons. "
        "*Equal compute*: 10 epochs against 40. *Inferred*: the paper doesn't say that Table 1 is without drop edge. "
        "The papers' figures are ImageNet's, and a linear probe can't answer for fine-tuned ones.", "",
        "| claim | the paper, % | here, linear probe, % | seeds | least difference that shows | p | does it show? |",
        "|---" * 7 + "|"]
    for (claim, paper, *_), entry in zip(CLAIMS, compared):
        n, a, b, least, p, holm = entry or [0] * 6
        p = f"{p:.3f}" if p >= 0.001 else "< 0.001"
        cells = [f"{a:.1f}, {b:.1f}", str(n), f"{least:.1f}", p, verdict(claim, a, b, least, holm)]
        lines.append(f"| {claim} | {paper} | {' | '.join(cells if entry else ['not run', *['–'] * 4])} |")
    lines += ["", "## Runs", "",
              "Rows cut from the plan have one seed and are not tested. Old files name a range of commits.", "",
              "| run | images | epochs | seeds | linear probe | k-NN | fine-tuned | masks | minutes |",
              "|---" * 9 + "|",
              *(row_of(name, runs, s["longer"]) for name, runs in found.items()), "",
              f"![EMAE's weights: linear probe and masks against steps]({results.name}_steps.png)",
              f"![MAE: linear probe against epochs]({results.name}_curve.png)", "",
              "*Means, moved apart; bars span the seeds. A step of EMAE costs as much as four of MAE.*"]
    return "\n".join(lines) + "\n"


def plots(results):
    """EMAE's weights, by accuracy and by the distance between masks, against steps; MAE's accuracy against epochs."""
    from matplotlib import pyplot
    found, scale = read(results), SCALES["cpu" if results.name == "claims" else "gpu"]
    steps = 10000 // scale["batch"]                                                 # of an epoch
    for figure, rows, x, unit, panels in (
            ("steps", WEIGHTS, "steps", steps, {"linear": "linear probe, %", "masks": "distance between masks"}),
            ("curve", CURVE, "epochs", 1, {"linear": "linear probe, %"})):
        image, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
        for panel, (key, y) in zip(axes[0], panels.items()):
            for i, (label, names) in enumerate(rows.items()):
                seeds = {ROWS[name][1]: [run[key] for run in found[name].values() if key in run] for name in names}
                seeds = {epochs * scale["longer"] * unit: values for epochs, values in seeds.items() if values}
                mean = np.array([np.mean(values) for values in seeds.values()])
                reach = mean - [*map(min, seeds.values())], [*map(max, seeds.values())] - mean
                length = np.array([*seeds]) * (1 + i / 50)                          # side by side
                panel.errorbar(length, mean, reach, fmt="o-", capsize=3, label=label)
            panel.set(xlabel=x, ylabel=y)
            panel.grid(alpha=0.3)
        axes[0, 0].legend()
        image.savefig(f"{results}_{figure}.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    args.results = ROOT / "results" / ("claims" if args.scale == "cpu" else "claims_gpu")
    if args.data:
        args.results.mkdir(exist_ok=True)
        args.data, args.runs = args.data.resolve(), args.runs.resolve()
        if not (args.runs / "few").exists():
            first_images(args.data, args.runs / "few")
        plan = [(name, seed) for name in ROWS for seed in range(1 if name.startswith("all_") else 3)]
        ThreadPool(args.jobs).starmap(go, [(*run, args) for run in plan], chunksize=1)
    args.results.with_suffix(".md").write_text(page(args.results))
    plots(args.results)


if __name__ == "__main__":
    main()
