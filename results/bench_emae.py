"""What EMAE's self-consistency costs: a forward and backward pass of ViT-B, 4 images, float32.

    python results/bench_emae.py --rounds 7 > results/bench/emae_consistency_cpu.md

Candidates are interleaved in one process: without it (`--consistency_weight 0`), with it as in emae.py, and with it as
it was before, slices stacked pair by pair, whose backward fills a whole tensor for every slice. Memory is the peak of a
process of its own for each.
"""
import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from emae import EMAE


class Before(EMAE):
    """EMAE with Eq. 9-11 pair by pair."""

    def forward_consistency(self, pred):
        pred = pred.float().unflatten(0, (-1, self.parts)).unflatten(2, (self.parts - 1, -1))
        losses = []
        for i, j in itertools.combinations(range(self.parts), 2):
            both = [part for part in range(self.parts) if part not in (i, j)]
            p_i = torch.stack([pred[:, i, part - (part > i)] for part in both])
            p_j = torch.stack([pred[:, j, part - (part > j)] for part in both])
            losses.append(((p_i.detach() - p_j).abs() + (p_i - p_j.detach()).abs()).mean())
        return torch.stack(losses).mean()


def step(model, imgs, noise):
    """Seconds of one pass."""
    start = time.perf_counter()
    model(imgs, noise)[0].backward()
    model.zero_grad()
    return time.perf_counter() - start


def candidates(parts):
    return {"without": lambda: EMAE(parts=parts, consistency_weight=0.0), "emae.py": lambda: EMAE(parts=parts),
            "before": lambda: Before(parts=parts)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", type=int, nargs="+", default=[4, 14])
    parser.add_argument("--memory_of", nargs=2, help="for its own use")
    args = parser.parse_args()
    imgs, noise = torch.randn(4, 3, 224, 224), torch.rand(4, 196)
    if args.memory_of:
        name, parts = args.memory_of
        step(candidates(int(parts))[name](), imgs, noise)
        print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
        return
    print(f"ViT-B, 4 images, float32, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {args.rounds} "
          "rounds, interleaved; ratios are medians over the rounds, least and largest in brackets\n\n"
          "| K | self-consistency | s a pass | over without | peak memory, GB |\n|---|---|---|---|---|")
    for parts in args.parts:
        models = {name: make() for name, make in candidates(parts).items()}
        times = {name: [] for name in models}
        for number in range(args.rounds + 1):               # the first warms up
            for name, model in models.items():
                times[name].append(step(model, imgs, noise))
        for name, seconds in times.items():
            ratios = sorted(a / b for a, b in zip(seconds[1:], times["without"][1:]))
            words = [sys.executable, __file__, "--memory_of", name, str(parts)]
            memory = int(subprocess.run(words, check=True, capture_output=True, text=True, env=os.environ).stdout) / 1e6
            print(f"| {parts} | {name} | {statistics.median(seconds[1:]):.2f} | {statistics.median(ratios):.2f} "
                  f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
