"""Packs the models of claims.py's runs on all of CIFAR-10 into weights/METHOD_cifar10.pt, and writes their card.

    python results/weights.py --runs SCRATCH      # packs the checkpoints of `claims.py --runs SCRATCH`
    python results/weights.py                     # only the card, from the files that are there
"""
import argparse
import hashlib
import json
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def save_weights(last, path):
    """The whole model of a last.pt in float16, with what --ckpt, --init_from and visualize.py need."""
    checkpoint = torch.load(last, map_location="cpu", weights_only=True)
    args = {k: v for k, v in checkpoint["args"].items() if k not in ("data", "output_dir", "device")}
    model = {k: v.half() if v.is_floating_point() else v for k, v in checkpoint["model"].items()}
    torch.save({"method": checkpoint["method"], "args": args, "model": model}, path)


def card():
    """The text of weights/README.md."""
    lines = ["# Small trained models", "",
        "ViT-Micro (32 pixels, patches of 4, 0.8 M parameters) after 6,250 steps on CIFAR-10, to try a method without "
        "training it: whole models in float16, seed 0. Accuracies are in %, with the labels of 10,000 images. Packed "
        "by `results/weights.py` from runs of `results/claims.py`. Licence: MIT; CIFAR-10 states none.", "",
        "`--ckpt` takes these files (but `visualize.py seeds` not SdAE's, which predicts no pixels), and `--init_from` "
        "with the sizes of the command. Give each evaluation an `--output_dir`: the default is `weights/MODE` for all "
        "files. The commands also had `--device cpu --num_workers 0` and `--data DIR`, where DIR holds CIFAR-10 as "
        "`train/CLASS/*.jpg`.", "",
        "| file | command | commit | hours | k-NN | linear | fine-tuned | SHA-256 |", "|---" * 8 + "|"]
    for path in sorted((ROOT / "weights").glob("*.pt")):
        run = json.loads((ROOT / f"results/claims/all_{path.name[:-len('_cifar10.pt')]}_seed0.json").read_text())
        hours = sum(line["seconds"] for line in run["log"]) / 3600
        lines.append(f"| `{path.name}` | `{run['command']}` | {run['commit']} | {hours:.1f} | {run['knn']} | "
                     f"{run['linear']} | {run['finetune']} | {hashlib.sha256(path.read_bytes()).hexdigest()} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path)
    args = parser.parse_args()
    for last in args.runs.glob("cpu/all_*_seed0/last.pt") if args.runs else []:
        save_weights(last, ROOT / f"weights/{last.parent.name[len('all_'):-len('_seed0')]}_cifar10.pt")
    (ROOT / "weights/README.md").write_text(card())


if __name__ == "__main__":
    main()
