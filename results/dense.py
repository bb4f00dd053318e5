"""What pre-training gives segmentation and detection at small scale, with seeds: drawn scenes, nuclei, CamVid.

    python results/dense.py --data DIR --runs SCRATCH       # runs what is missing; the same command goes on
    python results/dense.py                                 # only the page, from the files that are there

DIR holds nuclei/ (COCO's layout) and camvid/ (images/, masks/, classes.json); SCRATCH takes checkpoints. Each run's
command, log and results go to results/dense/NAME_seedN.json, and dense.md is made from these. Run it in a clone that
nobody edits. Encoders are trained as they are needed: the demo's with the seed of the run, the others with seed 0.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results/dense"

SMALL = ("--model vit_micro --patch_size 8 --img_size 64 --crop_scale 0.06 1 --decoder_embed_dim 64 --decoder_depth 1 "
         "--decoder_num_heads 2 --batch_size 64 --blr 8e-3 --num_workers 0")   # 256 pixels: shown at 0.25 to 1 times
ENCODERS = {  # commands in DIR
    "demo": "mae.py --demo",
    "nuclei": f"mae.py --data nuclei/train {SMALL} --epochs 240 --warmup_epochs 24",
    "nuclei_pixels": f"mae.py --data nuclei/train {SMALL} --epochs 240 --warmup_epochs 24 --no-norm_pix",
    "nuclei_long": f"mae.py --data nuclei/train {SMALL} --epochs 960 --warmup_epochs 96",
    "camvid": f"mae.py --data camvid/images/train {SMALL} --epochs 280 --warmup_epochs 28"}
AP = {"box_AP": "box AP", "box_AP50": "box AP50", "mask_AP": "mask AP", "mask_AP50": "mask AP50"}
IOU = {"mIoU": "mIoU", "mAcc": "mAcc", "aAcc": "aAcc"}
NEW = "--model vit_micro --patch_size 8"                     # what a checkpoint knows by itself
GROUPS = {  # title: command in DIR, figures, and rows: what each adds to the command, and its encoder
    "Drawn scenes: segmentation": ("segment.py --demo", IOU, {
        "scenes_segment_mae": ("", "demo"), "scenes_segment_random": ("", "none"),
        "scenes_segment_mae_frozen": ("--freeze", "demo"), "scenes_segment_random_frozen": ("--freeze", "none"),
        "scenes_segment_mae_linear": ("--head linear --freeze", "demo"),
        "scenes_segment_random_linear": ("--head linear --freeze", "none")}),
    "Drawn scenes: detection": ("detect.py --demo", AP, {
        "scenes_detect_mae": ("", "demo"), "scenes_detect_random": ("", "none")}),
    "Nuclei": (
        "detect.py --data nuclei --img_size 128 --anchor_size 8 --window 0 --fpn_channels 32 --rois 64 --jitter 0.5 2 "
        "--num_steps 800 --warmup_steps 80 --batch_size 4 --lr 1e-3 --drop_path 0 --clip_grad 5 --num_workers 0", AP, {
            "nuclei_random": (f"{NEW} --layer_decay 1", "none"), "nuclei_mae": ("--layer_decay 0.75", "nuclei"),
            "nuclei_pixels": ("--layer_decay 0.75", "nuclei_pixels"),
            "nuclei_decay": ("--layer_decay 0.5", "nuclei"),
            "nuclei_anchors": (f"{NEW} --layer_decay 1 --anchor_size 16", "none"),
            "nuclei_long": ("--layer_decay 0.75", "nuclei_long")}),
    "CamVid's test images": (
        "segment.py --data camvid --val_split test --ignore 11 --img_size 96 128 --resize 120 --head_channels 32 "
        "--num_steps 300 --warmup_steps 30 --batch_size 8 --lr 5e-3 --drop_path 0 --num_workers 0", IOU, {
            "camvid_random": (f"{NEW} --layer_decay 1", "none"), "camvid_mae": ("--layer_decay 0.75", "camvid"),
            "camvid_random_frozen": (f"{NEW} --freeze", "none"), "camvid_mae_frozen": ("--freeze", "camvid")})}
ROWS = {name: (f"{command} {added}".strip(), encoder) for command, _, rows in GROUPS.values()
        for name, (added, encoder) in rows.items()}
SHOWN = {  # rows whose seed 0 is drawn; not CamVid's, whose licence allows no copies here
    "scenes_segment_mae": "Images, truth, and prediction, fine-tuned from MAE",
    "scenes_detect_mae": "Images, truth, and what is found with a score above 0.5, from MAE",
    "nuclei_mae": "Images, truth, and what is found with a score above 0.5, from MAE"}
LOCKS = {name: threading.Lock() for name in ENCODERS}       # an encoder is trained once


def call(words, args, output):
    """Runs a script in the data's folder. Raises CalledProcessError where it fails."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "out.txt", "a") as file:
        words = [ROOT / words[0], *words[1:], "--output_dir", output, "--device", "cpu"]
        subprocess.run([sys.executable, *map(str, words)], cwd=args.data, stdout=file, stderr=file, check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})


def encoder_of(name, seed, args):
    """The checkpoint of an encoder, trained if it is missing."""
    if name == "none":
        return "none"
    folder = args.runs / f"encoder_{name}_seed{seed}"
    with LOCKS[name]:
        if not (folder / "encoder.pt").exists():
            call([*ENCODERS[name].split(), "--seed", seed], args, folder)
    return folder / "encoder.pt"


def go(name, seed, args):
    """One run, unless its file is there."""
    script, encoder = ROWS[name]
    path, folder = RESULTS / f"{name}_seed{seed}.json", args.runs / f"{name}_seed{seed}"
    if path.exists():
        return
    ckpt = encoder_of(encoder, seed if encoder == "demo" else 0, args)
    call([*script.split(), "--ckpt", ckpt, "--seed", seed], args, folder)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    result = {key: value for key, value in json.loads((folder / "result.json").read_text()).items()
              if key not in ("ckpt", "data", "args")}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = {"command": f"{script} --seed {seed}", "encoder": ENCODERS.get(encoder, "none"), "commit": commit,
             "result": result, "log": log}
    if name in SHOWN and seed == 0:
        shutil.copy(folder / "predictions.png", RESULTS / f"{name}.png")
    path.write_text(json.dumps(found) + "\n")
    print(name, seed, *(f"{key} {value}" for key, value in result.items() if isinstance(value, float)), flush=True)


def page():
    """The text of dense.md."""
    lines = ["# Segmentation and detection at small scale", "",
             "ViT-Micro (0.8 M parameters) on CPUs, one thread a run and other runs beside it, by "
             "[`dense.py`](dense.py). Accuracies in % after the last step: the mean, and each seed's. *Encoder*: "
             "random weights, which train without layer-wise decay, or one that MAE trained on the same images (for "
             "the drawn scenes on `shapes`), by a command below. Rate, batch and steps of the demos were chosen from "
             "single runs with MAE's encoder, which may favour it; anchors, rate, batch and steps for nuclei after "
             "a first recipe that found next to nothing with either encoder; nothing was tuned for CamVid. On the "
             "drawn scenes we aimed at a frozen MAE encoder 5 mIoU above a random one, and at an AP50 of 40; the "
             "linear head was added when UperNet had given 2.6. Each run's log and commit: [`dense/`](dense)."]
    for title, (command, figures, rows) in GROUPS.items():
        head = ["encoder", "added", "seeds", *figures.values(), "minutes"]
        lines += ["", f"## {title}", "", f"`{command}`", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, (added, encoder) in rows.items():
            runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}_seed?.json"))]
            cells = [show([run["result"][figure] for run in runs]) for figure in figures]
            minutes = [sum(line["seconds"] for line in run["log"]) / 60 for run in runs]
            cells = [encoder.replace("none", "random"), f"`{added}`" if added else "–", str(len(runs)), *cells]
            lines.append(f"| {' | '.join([*cells, show(minutes)])} |")
        for name in rows:
            if (RESULTS / f"{name}.png").exists():
                lines += ["", f"![{SHOWN[name]}](dense/{name}.png)", "", f"*{SHOWN[name]} (seed 0).*"]
    lines += ["", "## Encoders", "", *(f"- {name}: `{command}`" for name, command in ENCODERS.items())]
    return "\n".join(lines) + "\n"


def show(values):
    """A mean, and each value where there are several; a dash without any."""
    each = f" ({' / '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{each}" if values else "–"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    if args.data:
        args.data, args.runs = args.data.resolve(), args.runs.resolve()
        plan = [(name, seed, args) for seed in args.seeds for name in args.rows]
        ThreadPool(args.jobs).starmap(go, plan, chunksize=1)
    (ROOT / "results/dense.md").write_text(page())


if __name__ == "__main__":
    main()
