"""Memory and time of k-NN in a training set as large as ImageNet's: now, and in another checkout.

    python results/data/large_knn.py --before OLD_CHECKOUT --train 1281167 --val 1024 --dim 192 --rounds 3

Candidates are interleaved, each in `--processes` processes of its own (gloo), which all run its `score_knn` on drawn
features in place of a model's, 1,000 classes. Printed are medians of the rounds: the peak memory of the larger process
over that of its imports, also in banks (all training features once, float32); the CPU seconds of the slower process;
and the accuracy, which must be the same.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def measure(args):
    """One of several processes: prints peak memory in MB, seconds and top-1."""
    sys.path.insert(0, args.root)
    import torch
    import torch.distributed as dist

    import finetune
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    centres = torch.randn(1000, args.dim, generator=torch.Generator().manual_seed(0))

    def once(crops, batch_size, progress=None):
        """In place of Run.once: this process's share of the images, here features."""
        for i in range(crops.first + rank * batch_size, crops.first + crops.number, world_size * batch_size):
            generator = torch.Generator().manual_seed(i)
            labels = torch.randint(1000, (min(batch_size, crops.first + crops.number - i),), generator=generator)
            yield centres[labels] + 2 * torch.randn(len(labels), args.dim, generator=generator), labels

    finetune.normalize = lambda imgs, *channels: imgs
    run = types.SimpleNamespace(device=torch.device("cpu"), dtype=None, once=once, say=lambda text: None)
    model = types.SimpleNamespace(cls_token=torch.empty(1, 1, args.dim), eval=lambda: None,
                                  features=lambda imgs, pool: imgs)
    source = types.SimpleNamespace(classes=range(1000))
    sets = [types.SimpleNamespace(first=first, number=number, source=source)
            for first, number in ((0, args.train), (args.train, args.val))]
    channels = [] if args.root == args.before else [()]         # an argument that came with the other change
    words = types.SimpleNamespace(pool="cls", k=20, temperature=0.07)
    before = resource.getrusage(resource.RUSAGE_SELF)
    top1, _, _ = finetune.score_knn(run, model, *sets, *channels, words)
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{(after.ru_maxrss - before.ru_maxrss) / 1024};{seconds};{top1}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="another checkout to compare with")
    parser.add_argument("--train", type=int, default=1281167, help="features")
    parser.add_argument("--val", type=int, default=1024, help="features")
    parser.add_argument("--dim", type=int, default=192, help="numbers a feature has")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", help="the checkout that one process measures; not for users")
    args = parser.parse_args()
    if args.root:
        return measure(args)
    found = {"now": [], "before": []}
    for _ in range(args.rounds):
        for name, root in (("now", str(ROOT)), ("before", args.before)):
            words = [sys.executable, __file__, *sys.argv[1:], "--root", root]
            env = {**os.environ, "WORLD_SIZE": f"{args.processes}", "MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}
            processes = [subprocess.Popen(words, env={**env, "RANK": f"{rank}"}, stdout=subprocess.PIPE, text=True)
                         for rank in range(args.processes)]
            outs = [process.communicate()[0].strip().split(";") for process in processes]
            found[name].append([max(float(out[i]) for out in outs) for i in range(3)])
    bank = args.train * args.dim * 4 / 2**20
    print(f"{args.train} × {args.dim} features (a bank of {bank:.0f} MB), {args.val} queries, "
          f"{args.processes} processes\n\n"
          "| | peak a process, MB | in banks | CPU seconds | top-1, % |\n|---|---|---|---|---|")
    for name, rows in found.items():
        peak, seconds, top1 = (statistics.median(column) for column in zip(*rows))
        print(f"| {name} | {peak:.0f} | {peak / bank:.2f} | {seconds:.0f} | {top1:.2f} |")
    ratios = [now[1] / before[1] for now, before in zip(*found.values())]
    print(f"\nCPU seconds now over before, round by round: {' '.join(f'{ratio:.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
