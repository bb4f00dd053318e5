"""What EMAE's self-consistency costs: a pass of ViT-B, and the loss alone for several K; float32, 4 images.

    python results/bench_emae.py --rounds 3 > results/bench/emae_consistency_cpu.md

A pass is forward and backward. Candidates are interleaved in one process: without it (`--consistency_weight 0`), with
it as in emae.py, and with it as it was before: slices stacked pair by pair, each with a backward that fills a whole
tensor. Memory is the peak of a process of its own.
"""
import argparse
import itertools
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


def seconds(model, *inputs):
    """Of one pass: the whole model's for (imgs, noise), the loss's for (pred,)."""
    start = time.perf_counter()
    loss = model(*inputs)[0] if len(inputs) == 2 else model.forward_consistency(*inputs)
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


def interleaved(models, inputs, rounds):
    """Seconds of each model in each round, after one to warm up."""
    times = [[seconds(model, *inputs) for model in models] for _ in range(rounds + 1)]
    return list(zip(*times[1:]))


def ratio(times, base):
    ratios = sorted(a / b for a, b in zip(times, base))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory_of", help="for its own use")
    args = parser.parse_args()
    make = {"without": lambda: EMAE(consistency_weight=0.0), "emae.py": EMAE, "before": Before}
    inputs = torch.randn(4, 3, 224, 224), torch.rand(4, 196)
    if args.memory_of:
        seconds(make[args.memory_of](), *inputs)
        print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
        return
    print(f"ViT-B, 4 images, float32, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {args.rounds} "
          "rounds, interleaved; ratios are medians over the rounds, least and largest in brackets\n\n"
          "| a pass, K = 4 | s | over without | peak memory, GB |\n|---|---|---|---|")
    times = interleaved([model() for model in make.values()], inputs, args.rounds)
    for name, of in zip(make, times):
        memory = subprocess.check_output([sys.executable, __file__, "--memory_of", name], text=True)
        print(f"| {name} | {statistics.median(of):.2f} | {ratio(of, times[0])} | {int(memory) / 1e6:.2f} |", flush=True)
    print("\n| the loss alone | emae.py, s | before, s | before over emae.py |\n|---|---|---|---|")
    for parts in (4, 7, 14):
        pred = torch.randn(4 * parts, 196 - 196 // parts, 768, requires_grad=True)
        now, before = interleaved([EMAE(parts=parts), Before(parts=parts)], (pred,), args.rounds)
        seconds_now, seconds_before = statistics.median(now), statistics.median(before)
        print(f"| K = {parts} | {seconds_now:.3f} | {seconds_before:.3f} | {ratio(before, now)} |", flush=True)


if __name__ == "__main__":
    main()
