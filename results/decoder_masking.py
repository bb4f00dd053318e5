"""What dropping hard patches costs and saves: forward and backward of ViT-B at 224, mask ratio 0.85, on equal masks.

Three models interleaved, a new mask each round: Efficient MAE with β = 26, with β = inf (nothing is dropped), and MAE.
Prints medians of the rounds' times and ratios, and the share of the difficulty with its selection.
    python results/decoder_masking.py IMAGES ROUNDS bf16|fp32
"""
import math
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import efficient_mae
import mae

images, rounds, precision = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
models = {"β = 26": efficient_mae.EfficientMAE(), "β = inf": efficient_mae.EfficientMAE(beta=math.inf),
          "MAE": mae.MAE(mask_ratio=0.85)}
imgs = torch.randn(images, 3, 224, 224)
times = {name: [] for name in (*models, "masking")}
for round_ in range(-2, rounds):
    noise = torch.rand(images, 196)
    for name, model in models.items():
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = model(imgs, noise)
        loss.backward()
        times[name].append(time.perf_counter() - start)
        model.zero_grad()
    start = time.perf_counter()
    models["β = 26"].decoder_masking(noise)
    times["masking"].append(time.perf_counter() - start)
times = {name: values[2:] for name, values in times.items()}            # the first two warm up


def ratio(a, b):
    ratios = sorted(x / y for x, y in zip(times[a], times[b]))
    return f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


print(f"{images} images, {precision}, {torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds; "
      + ", ".join(f"{name} {median(values):.3f} s" for name, values in times.items()))
print(f"β = 26 over β = inf {ratio('β = 26', 'β = inf')}, over MAE {ratio('β = 26', 'MAE')}; "
      f"P²Dist and selection of a step {ratio('masking', 'β = 26')}")
