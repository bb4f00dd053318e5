"""How long a large folder takes to list, in seconds and memory, beside torchvision's ImageFolder; what a worker adds.

    python results/data/large_folders.py TREE --images 1281167 --classes 1000 --rounds 3 [--before OLD_CHECKOUT]

Makes TREE of hard links to a few files (a file system may allow 65,000 to one), unless it is there. Candidates are
interleaved, each in a process of its own; the median of the rounds is printed, with the peak memory over that of the
imports, and the inventory, which must not change (a run begun before would be refused). The second table is the memory
that a loader's worker shares with nobody (USS) after it has collected all garbage, with gc.freeze() and without.
"""
import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import common
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
images = common.FolderDataset(sys.argv[2])
listed = time.perf_counter()
inventory = common.inventory(images)
print(listed - start, time.perf_counter() - listed,
      (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, inventory, images.labels.sum(), sep=";")
"""
TORCHVISION = """
import resource, sys, time
from torchvision.datasets import ImageFolder
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
images = ImageFolder(sys.argv[2])
print(time.perf_counter() - start, 0,
      (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, len(images), sum(images.targets), sep=";")
"""

WORKER = """
import gc, sys
sys.path.insert(0, sys.argv[1])
import torch, common, runs

class Measured(common.Crops):
    def __getitem__(self, item):
        _, _, skipped = super().__getitem__(item)
        gc.collect()
        with open("/proc/self/smaps_rollup") as lines:
            private = sum(int(line.split()[1]) for line in lines if line.startswith("Private"))
        return torch.zeros(1), private, skipped

if sys.argv[3] == "without":
    gc.freeze = lambda: None
crops = Measured(common.FolderDataset(sys.argv[2]), lambda img: img)
batches = [[(0, i * 9973 % len(crops))] for i in range(20)]
print(max(private.item() for _, private in runs.make_loader(crops, batches, 2, torch.device("cpu"))) / 1024)
"""


def make(tree, images, classes):
    """A tree of so many hard links, named as ImageNet's files are."""
    tree.mkdir(parents=True)
    for number in range(-(-images // 50000)):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tree / f".{number}.jpg")
    for label in range(classes):
        folder = tree / f"n{label:08}"
        folder.mkdir()
        for i in range(label, images, classes):
            (folder / f"n{label:08}_{i}.JPEG").hardlink_to(tree / f".{i // 50000}.jpg")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--images", type=int, default=1281167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", help="another checkout to compare with")
    args = parser.parse_args()
    if not args.tree.exists():
        make(args.tree, args.images, args.classes)
    candidates = {"ours": (OURS, ROOT), "torchvision": (TORCHVISION, ROOT)}
    if args.before:
        candidates["before"] = (OURS, args.before)
    found, workers = {name: [] for name in candidates}, {"with": [], "without": []}

    def run(code, root, *more):
        words = [sys.executable, "-c", code, str(root), str(args.tree), *more]
        out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        return out.strip().splitlines()[-1].split(";")

    for _ in range(args.rounds):
        for name, (code, root) in candidates.items():
            found[name].append(run(code, root))
        for name, numbers in workers.items():
            numbers.append(float(run(WORKER, ROOT, name)[0]))
    print("| | listing, s | inventory, s | peak, MB | inventory | sum of labels |\n|---|---|---|---|---|---|")
    for name, rows in found.items():
        listing, inventory, memory = (statistics.median(float(row[i]) for row in rows) for i in range(3))
        print(f"| {name} | {listing:.2f} | {inventory:.2f} | {memory:.0f} | {rows[0][3]} | {rows[0][4]} |")
    print("\n| a worker | its own memory, MB |\n|---|---|")
    for name, numbers in workers.items():
        print(f"| {name} gc.freeze() | {statistics.median(numbers):.0f} |")


if __name__ == "__main__":
    main()
