"""What decoding by torchvision saves over Pillow: CPU time of a training crop, and whether pixels are equal.

    python results/data/decoding.py PHOTOS --rounds 5

One process, one thread, files in the page cache; the two are interleaved. Prints images per CPU second, their ratio
round by round, how many images are equal, and the share of crops at least twice as large as what they are resized to:
only those could a JPEG draft, decoded at half size, be for.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import common

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photos")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--img_size", type=int, default=224)
args = parser.parse_args()
torch.set_num_threads(1)
source = common.FolderDataset(args.photos)
crops = common.Crops(source, common.train_transform(args.img_size, (0.2, 1.0)))
decoders, rates, equal, large = {"torchvision": common.decode_jpeg, "Pillow": None}, [], 0, 0
for i in range(len(source)):
    imgs = []
    for common.decode_jpeg in decoders.values():
        imgs.append(source[i][0])
    equal += torch.equal(*imgs)
    _, _, height, width = v2.RandomResizedCrop.get_params(imgs[0], (0.2, 1.0), (3 / 4, 4 / 3))
    large += min(height, width) >= 2 * args.img_size
for epoch in range(args.rounds):
    rates.append([])
    for common.decode_jpeg in decoders.values():
        start = time.process_time()
        for i in range(len(crops)):
            crops[epoch, i]
        rates[-1].append(len(crops) / (time.process_time() - start))
for name, column in zip(decoders, zip(*rates)):
    print(f"{name}: {statistics.median(column):.0f} images a CPU second ({min(column):.0f} to {max(column):.0f})")
print(f"ratios: {' '.join(f'{ours / pillow:.2f}' for ours, pillow in rates)}\n"
      f"equal images: {equal} of {len(source)}\ncrops of twice the size or more: {large / len(source):.1%}")
