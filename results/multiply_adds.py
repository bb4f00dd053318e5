"""Multiply-adds of an image in training, forward and backward: what a script does, and what its method needs.

    python results/multiply_adds.py MODEL [SCRIPT …]       # vit_base, say; of the five scripts, or those named
"""
import importlib
import math
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import VIT_SIZES, pair

SCRIPTS = ["mae", "emae", "efficient_mae", "robust_mae", "sdae"]


def counted(name, words, images=16, build=None):
    """What the script's model does of them, by torch's FlopCounter, on a CPU; Efficient MAE's mean over `images`.
    `build` (args) makes another model than the script's."""
    module = importlib.import_module(name)
    args = module.get_args([*words, "--batch_size", "2"])
    images = images if name == "efficient_mae" else 2
    model = (build or module.build_model)(args).train()
    noise = torch.rand(1000, model.num_patches, generator=torch.Generator().manual_seed(0))[:images]    # as in `tight`
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(images, 3, *pair(args.img_size)), noise)[0].backward()
    return counter.get_total_flops() / 2 / images


def tight(name, words, images=16):
    """What the method needs, from its sizes: three times the forward products (one forward, two backward), less what
    gradients of pixels would cost; visible patches alone embedded, removed ones alone predicted. None for a script
    that isn't one of the five, whose work we don't know."""
    if name not in SCRIPTS:
        return None
    module = importlib.import_module(name)
    args = module.get_args(words)
    size = VIT_SIZES[args.model]
    P, D, depth, d = args.patch_size, size["embed_dim"], size["depth"], args.decoder_embed_dim
    N = math.prod(n // P for n in pair(args.img_size))
    keep = N // args.parts if name == "emae" else int(N * (1 - args.mask_ratio) + 1e-6)

    def blocks(depth, tokens, width):
        return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)

    removed = torch.tensor([N - keep])
    if name == "efficient_mae":
        noise = torch.rand(1000, N, generator=torch.Generator().manual_seed(0))[:images]
        removed = module.build_model(args).decoder_masking(noise)[3].sum(dim=1)
    values = D if name == "sdae" else 3 * P * P                             # that are predicted of a patch
    decoder = blocks(args.decoder_depth, 1 + keep + removed, d) + removed * d * values
    embed = keep * 3 * P * P * D
    forward = embed + blocks(depth, 1 + keep, D) + (1 + keep) * D * d + decoder.double().mean().item()
    total = (3 * forward - embed) * (args.parts if name == "emae" else 1)
    if name == "sdae":                                                      # the teacher has no backward pass
        teacher = {"folds": (args.folds, (N - keep) // args.folds), "masked": (1, N - keep), "full": (1, N),
                   "crop": (1, args.teacher_tokens or (N - keep) // 3)}
        folds, seen = teacher[args.teacher_input]
        total += folds * (seen * 3 * P * P * D + blocks(depth, 1 + seen, D))
    return float(total)


if __name__ == "__main__":
    for name in sys.argv[2:] or SCRIPTS:
        words = ["--model", sys.argv[1]]
        done, least = counted(name, words), tight(name, words)
        print(f"{name}: {done / 1e9:.2f} G" + (f", {done / least:.3f} of what its method needs" if least else ""))
