"""What pre-trained features are worth: fine-tuning, linear probing, partial fine-tuning and k-NN.

    python finetune.py --ckpt runs/mae/encoder.pt --data imagenet            # everything trains
    python finetune.py --ckpt runs/mae/encoder.pt --mode linear              # a layer on frozen features
    python finetune.py --ckpt runs/mae/encoder.pt --mode partial --blocks 4  # the last blocks train (MAE's Figure 9)
    python finetune.py --ckpt runs/mae/encoder.pt --mode knn                 # no training: the quick look
    torchrun --nproc_per_node 8 finetune.py --ckpt runs/mae/encoder.pt       # several GPUs
    python finetune.py --demo --ckpt runs/mae/last.pt --mode linear          # a laptop CPU, on drawn images

`--ckpt` takes a method script's last.pt or encoder.pt, a public MAE checkpoint, or `none` for random weights.
The result is the last line printed and OUTPUT/result.json: accuracy of the last epoch, not of the best one.

The defaults are the recipe of MAE's released code, whose authors call it "slightly different from the default baseline
using unnormalized pixels" (its FINETUNE.md), by the encoder's size (B: up to 768 wide, L: 1024, H: 1280). --recipe
paper is MAE's Tables 9 and 10, --recipe scratch its Table 11 without the average of weights. Chosen where the papers
are silent or differ:
- The linear probe's crops are torchvision's, drawn until one fits, as in fine-tuning. MAE's released probe draws once
  and clips the crop to the image, so its crops are larger: on 375 × 500 pixels 52 % of the area on average, not 43.5.
- Partial fine-tuning takes fine-tuning's recipe (the paper picks 50, 100 or 200 epochs for each number of blocks: set
  --epochs); 0 blocks is linear probing. In fine-tuning and partial fine-tuning the norm before the head trains.
- SdAE fine-tunes ViT-B with `--batch_size 2048 --warmup_epochs 10` (A.1), EMAE with `--recipe paper` (Section 4.2).
- Random weights (`--ckpt none`) train without layer-wise decay: there is nothing in the lower layers to preserve.
- RandAugment is timm's `rand-m9-mstd0.5-inc1`, op by op. Mixup's and cutmix's partner is the batch's previous image.
- Positions are resampled, bicubic and antialiased, when the image size differs from pre-training's.
"""
import argparse
import csv
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from common import (TORCHVISION_DATASETS, VIT_SIZES, Crops, InputError, ViT, check_vit, eval_transform, load_dataset,
                    normalize, pair, train_transform)
from runs import Run, check_alike, gather, launch, load, number, parse_args, reading

RELEASED = dict(batch_size=1024, warmup_epochs=5, weight_decay=0.05, min_lr=1e-6, pool="avg", erasing=0.25,
                beta2=0.999)
PAPER = dict(RELEASED, pool="cls", blr=1e-3, layer_decay=0.75, erasing=0.0)                 # MAE's Table 9, A.1
SCRATCH = dict(RELEASED, batch_size=4096, blr=1e-4, weight_decay=0.3, warmup_epochs=20,     # MAE's Table 11
               layer_decay=1.0, erasing=0.0, beta2=0.95, pool="cls")
LINEAR = dict(batch_size=16384, warmup_epochs=10, weight_decay=0.0, min_lr=0.0, pool="cls", blr=0.1, layer_decay=1.0,
              drop_path=0.0)                                                                # MAE's Table 10
RECIPES = {  # of a name, a kind of training, and an encoder's size
    ("released", "finetune", "B"): dict(RELEASED, epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1),
    ("released", "finetune", "L"): dict(RELEASED, epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2),
    ("released", "finetune", "H"): dict(RELEASED, epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.3),
    ("released", "linear", "B"): dict(LINEAR, epochs=90),
    ("released", "linear", "L"): dict(LINEAR, epochs=50),
    ("released", "linear", "H"): dict(LINEAR, epochs=50),
    ("paper", "finetune", "B"): dict(PAPER, epochs=100, drop_path=0.1),
    ("paper", "finetune", "L"): dict(PAPER, epochs=50, drop_path=0.1),
    ("paper", "finetune", "H"): dict(PAPER, epochs=50, drop_path=0.2),
    **{("paper", "linear", size): dict(LINEAR, epochs=90) for size in "BLH"},
    ("scratch", "finetune", "B"): dict(SCRATCH, epochs=300, drop_path=0.1),
    ("scratch", "finetune", "L"): dict(SCRATCH, epochs=200, drop_path=0.2),
    ("scratch", "finetune", "H"): dict(SCRATCH, epochs=200, drop_path=0.2),
}
DEMO = {  # small data wants many small steps; so early in training the cls token has learnt little: pool the patches
    "finetune": dict(epochs=10, batch_size=64, blr=4e-3, warmup_epochs=1, drop_path=0.0, pool="avg"),
    "linear": dict(epochs=6, batch_size=128, blr=20.0, warmup_epochs=1, pool="avg"),
    "knn": dict(pool="avg"),
    "all": dict(data="shapes", model="vit_micro", patch_size=4, crop_scale=[0.3, 1.0], num_workers=0,
                rand_augment=False, erasing=0.0, mixup=0.0, cutmix=0.0),
}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    """Parses the command line; what is not given is filled in by `fill_recipe`, once the encoder's size is known.
    Raises InputError."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    model = encoder_args(parser)
    model.add_argument("--pool", choices=["cls", "avg"], help="features: the cls token, or the mean of the patches "
                       "(default: the recipe's; cls for linear and knn)")
    parser.add_argument("--mode", choices=["finetune", "linear", "partial", "knn", "eval"], default="finetune")
    parser.add_argument("--recipe", choices=["released", "paper", "scratch"], default="released",
                        help="the released code's; MAE's Tables 9 and 10; its Table 11, from random weights, "
                        "without the average of weights")
    parser.add_argument("--blocks", type=number(int, "[0, inf)"), default=4,
                        help="partial: how many of the last blocks train")
    parser.add_argument("--classes", help="eval: a folder of class folders, or a file with a name per line, in the "
                        "order of the classifier's outputs (default: the checkpoint's, else those of --data)")

    optim = parser.add_argument_group("optimisation (default: the recipe's)")
    optim.add_argument("--epochs", type=number(int, "[1, inf)"))
    optim.add_argument("--warmup_epochs", type=number(float, "[0, inf)"))
    optim.add_argument("--batch_size", type=number(int, "[1, inf)"), help="images per step, all processes")
    optim.add_argument("--accum_iter", type=number(int, "[1, inf)"), default=1,
                       help="parts of a process's share")
    optim.add_argument("--blr", type=number(float, "(0, inf)"), help="lr = blr · batch_size / 256")
    optim.add_argument("--min_lr", type=number(float, "[0, inf)"), help="where the cosine ends")
    optim.add_argument("--weight_decay", type=number(float, "[0, inf)"))
    optim.add_argument("--beta2", type=number(float, "[0, 1)"), help="of AdamW")
    optim.add_argument("--layer_decay", type=number(float, "(0, 1]"), help="rate of a block over that of the next "
                       "(random weights: 1)")
    optim.add_argument("--clip_grad", type=number(float, "(0, inf)"), help="clip the gradient to this norm")

    regular = parser.add_argument_group("regularisation, finetune and partial")
    regular.add_argument("--crop_scale", type=number(float, "(0, 1]"), nargs=2, default=[0.08, 1.0],
                         help="area of RandomResizedCrop; linear too")
    regular.add_argument("--rand_augment", action=argparse.BooleanOptionalAction, default=True)
    regular.add_argument("--smoothing", type=number(float, "[0, 1)"), default=0.1, help="label smoothing")
    regular.add_argument("--erasing", type=number(float, "[0, 1]"), help="probability of random erasing (default: the "
                         "recipe's)")
    regular.add_argument("--mixup", type=number(float, "[0, inf)"), default=0.8, help="Beta parameter, 0 for none")
    regular.add_argument("--cutmix", type=number(float, "[0, inf)"), default=1.0, help="Beta parameter, 0 for none")

    knn = parser.add_argument_group("k-NN")
    knn.add_argument("--k", type=number(int, "[1, inf)"), default=20, help="neighbours")
    knn.add_argument("--temperature", type=number(float, "(0, inf)"), default=0.07,
                     help="a neighbour votes with exp(cosine / temperature)")

    args = parse_args(parser, argv, demo=DEMO["all"])
    if args.mode == "partial" and args.blocks == 0:
        args.mode = "linear"
    if args.mode == "eval" and args.ckpt == "none":
        raise InputError("--mode eval needs a classifier: --ckpt takes a last.pt of finetune.py, or a public one")
    if args.output_dir is None:
        args.output_dir = str((Path("runs/none") if args.ckpt == "none" else Path(args.ckpt).parent) / args.mode)
    return args


def encoder_args(parser, img_size=None, drop_path=None):
    """Adds the arguments that say which encoder, with these defaults, and returns their group. segment.py and detect.py
    have them too."""
    parser.add_argument("--ckpt", required=True, help="last.pt, encoder.pt, a public MAE checkpoint, or none")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=VIT_SIZES, help="with --ckpt none: the encoder (default: vit_base)")
    model.add_argument("--patch_size", type=number(int, "[1, 16384]"), help="with --ckpt none: pixels")
    model.add_argument("--img_size", type=number(int, "[1, 16384]"), nargs="+", default=img_size,
                       help=f"pixels: one or two (default: {img_size[0] if img_size else 'as pre-trained'})")
    model.add_argument("--drop_path", type=number(float, "[0, 1)"), default=drop_path,
                       help="the last block's (default: the recipe's)")
    return model


def fill(args, recipe):
    """Sets what the command line left open."""
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def fill_recipe(args, embed_dim):
    """Sets what the command line left open, by mode and size. Raises InputError."""
    size = "B" if embed_dim <= 768 else "L" if embed_dim <= 1024 else "H"
    kind = "linear" if args.mode in ("knn", "linear") else "finetune"
    if args.recipe == "scratch" and (kind == "linear" or args.ckpt != "none"):
        raise InputError("--recipe scratch is for --mode finetune or partial with --ckpt none")
    scratch = dict(layer_decay=1.0) if args.ckpt == "none" else {}      # random weights: nothing to preserve
    demo = DEMO["knn" if args.mode == "knn" else kind] if args.demo else {}
    recipe = {**RECIPES[args.recipe, kind, size], **scratch, **demo}
    args._defaults.update(recipe)
    fill(args, recipe)
    if args.mode != "knn" and args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs:g} must be less than --epochs {args.epochs}")


# ---------------------------------------------------------------------------------------------------------------------
# The encoder, and the classifier around it
# ---------------------------------------------------------------------------------------------------------------------
def describe(path, checkpoint):
    """Of a checkpoint, {"model": weights, …} or the weights alone: the weights, the keywords of ViT that its encoder
    fits, its channels' mean and standard deviation (None where it has none), and the arguments saved with it. Raises
    InputError."""
    with reading(path):
        weights = checkpoint.get("model", checkpoint)
        for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
            if name not in weights:
                found = "only a decoder" if any(key.startswith("decoder") for key in weights) else "no ViT encoder"
                raise InputError(f"'{path}' holds {found}: {name} is missing")
        embed_dim, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        heads = {(size["embed_dim"], size["depth"]): size["num_heads"] for size in VIT_SIZES.values()}
        if (embed_dim, depth) not in heads:
            raise InputError(f"'{path}' holds an encoder {embed_dim} wide with {depth} blocks: no size in VIT_SIZES")
        num_patches = weights["pos_embed"].shape[1] - 1
        square = math.isqrt(num_patches) * patch_size                                   # public checkpoints are square
        saved = checkpoint.get("args")
        saved = saved if isinstance(saved, dict) else {}                                # theirs hold a Namespace
        vit = dict(img_size=saved.get("img_size", square), patch_size=patch_size, embed_dim=embed_dim, depth=depth,
                   num_heads=heads[embed_dim, depth], in_chans=in_chans)
        channels = [[float(x) for x in saved[name]] if name in saved else None for name in ("mean", "std")]
        if any(numbers and len(numbers) != in_chans for numbers in channels):
            raise InputError(f"'{path}': mean or std is not of {in_chans} channels")
    return weights, vit, channels, saved


def load_encoder(path):
    """Reads an encoder: its weights under the public names, the keywords of ViT that they fit, its channels' mean and
    standard deviation (None where the file has none), and how many tensors beside the encoder's the file has.

    A decoder, and whatever else a method keeps beside its encoder, is left out. Nothing but plain containers, tensors
    and argparse.Namespace is unpickled. Raises InputError.
    """
    weights, vit, channels, _ = describe(path, load(path))
    with reading(path):
        if "norm.weight" not in weights:
            raise InputError(f"'{path}' has no norm after the last block, as after fine-tuning with --pool avg: give "
                             "the pre-trained checkpoint")
        with torch.device("meta"):
            expected = ViT(**vit).state_dict()
        encoder = {name: weights[name] for name in expected if name in weights}
        check_alike(path, "model", encoder, expected, any_float=True)
    return encoder, vit, channels, len(weights) - len(encoder)


def open_encoder(args):
    """The encoder that --ckpt names, for images of --img_size (default: as pre-trained): its weights (None for `none`),
    ViT's keywords for it, a hash of the weights, and how many tensors beside them the file has. Its channels become the
    arguments'. Raises InputError."""
    if args.ckpt == "none":
        weights, vit, left_out = None, dict(VIT_SIZES[args.model or "vit_base"], in_chans=args.in_chans), 0
        vit.update(img_size=32 if args.demo else 224, patch_size=args.patch_size or vit["patch_size"])
    elif (args.model, args.patch_size) != (("vit_micro", 4) if args.demo else (None, None)):    # --demo's, or none
        raise InputError("--model and --patch_size go with --ckpt none: a checkpoint knows its own")
    else:
        weights, vit, (mean, std), left_out = load_encoder(args.ckpt)
        check_channels(args, vit)
        args.in_chans, args.mean, args.std = vit["in_chans"], args.mean or mean, args.std or std
    old_size, vit["img_size"] = vit["img_size"], list(pair(args.img_size or vit["img_size"]))
    check_vit(vit["img_size"], vit["patch_size"], vit["embed_dim"], vit["num_heads"])
    if weights is None:
        return None, vit, None, left_out
    old_grid, new_grid = ([n // vit["patch_size"] for n in pair(size)] for size in (old_size, vit["img_size"]))
    weights["pos_embed"] = resample_pos_embed(weights["pos_embed"], old_grid, new_grid)
    digest = hashlib.sha256()
    for value in weights.values():
        digest.update(value.detach().float().numpy().tobytes())
    return weights, vit, digest.hexdigest()[:16], left_out


def check_channels(args, vit):
    """Raises InputError if --in_chans was given, and the checkpoint has another number."""
    if args.in_chans not in (args._defaults["in_chans"], vit["in_chans"]):
        raise InputError(f"--in_chans {args.in_chans}: the checkpoint's images have {vit['in_chans']} channels")


def load_classifier(path, img_size):
    """Reads a fine-tuned model, a last.pt of this script or a public one: the Classifier, for another image size if
    that is not None, its channels' mean and standard deviation, and its classes' names (None where it has none). Raises
    InputError."""
    weights, vit, channels, saved = describe(path, load(path))
    with reading(path):
        probe = "head.1.weight" in weights                              # Linear after BatchNorm
        if not probe and "head.weight" not in weights:
            raise InputError(f"'{path}' holds no classifier: --mode eval takes a last.pt of finetune.py")
        num_classes = len(weights["head.1.weight" if probe else "head.weight"])
        pool = "avg" if "fc_norm.weight" in weights else saved.get("pool", "cls")
        with torch.device("meta"):
            expected = Classifier(num_classes, pool, probe, **vit).state_dict()
        taken = {name: weights[name] for name in expected if name in weights}
        check_alike(path, "model", taken, expected, any_float=True)
        classes = [str(name) for name in saved["class_names"]] if "class_names" in saved else None
        if classes and len(classes) != num_classes:
            raise InputError(f"'{path}' has {num_classes} outputs, and the names of {len(classes)} classes")
    old_grid = [n // vit["patch_size"] for n in pair(vit["img_size"])]
    vit["img_size"] = img_size or vit["img_size"]
    model = Classifier(num_classes, pool, probe, **vit)
    model.load_state_dict({**taken, "pos_embed": resample_pos_embed(taken["pos_embed"], old_grid, model.grid_size)})
    return model, vit, channels, classes


def resample_pos_embed(pos_embed, old_grid, new_grid):
    """Positions (1, 1 + L, D) of one grid (rows, columns) for another, bicubic and antialiased; the cls row stays."""
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, old_grid).permute(0, 3, 1, 2).float()      # (1, D, rows, columns)
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class Classifier(ViT):
    """The encoder with a head: Linear on the cls token after `norm` (pool="cls") or on fc_norm of the mean of the patch
    tokens (pool="avg"). `linear_probe`: features are those after `norm`, a BatchNorm without parameters precedes the
    Linear. `train_blocks` is how many of the last blocks train, None or all for everything, embeddings included.
    """

    def __init__(self, num_classes, pool, linear_probe=False, train_blocks=None, **vit):
        super().__init__(**vit)
        self.pool, self.num_classes = pool, num_classes
        embed_dim = self.cls_token.shape[-1]
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.normal_(self.head.weight, std=0.01 if linear_probe else 2e-5)
        nn.init.zeros_(self.head.bias)
        if linear_probe:
            self.head = nn.Sequential(nn.BatchNorm1d(embed_dim, affine=False, eps=1e-6), self.head)
        elif pool == "avg":
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(embed_dim, eps=1e-6)
        self.frozen = []
        if train_blocks is None or train_blocks >= len(self.blocks):
            self.pos_embed.requires_grad_(True)
        else:
            self.frozen = [self.patch_embed, *self.blocks[:len(self.blocks) - train_blocks]]
            self.frozen += [self.norm] if linear_probe else []
            self.cls_token.requires_grad_(False)
            for module in self.frozen:
                module.requires_grad_(False)

    def train(self, mode=True):
        """As Module.train, but what is frozen stays in evaluation mode: no drop path there."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, imgs):
        """Images (N, 3, H, W) to logits (N, classes)."""
        x = self.features(imgs, self.pool)
        with torch.autocast(x.device.type, enabled=False):      # bf16 has too few digits to rank a thousand classes
            return self.head((self.fc_norm(x) if hasattr(self, "fc_norm") else x).float())


def param_groups(model, weight_decay, layer_decay):
    """Groups with layer-wise decay (MAE, Table 9): embeddings get layer_decay^(depth + 1) of the rate, block i
    layer_decay^(depth - i), the rest all of it. No weight decay on 1-D parameters, the cls token and the positions."""
    depth, groups = len(model.blocks), {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        layer = 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else depth + 1
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layer
        decay = 0.0 if param.ndim <= 1 or name in ("cls_token", "pos_embed") else weight_decay
        group = {"params": [], "weight_decay": decay, "lr_scale": layer_decay ** (depth + 1 - layer)}
        groups.setdefault((layer, decay), group)["params"].append(param)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888) with momentum, as linear probing uses it: for
    parameters of more than one dimension the update is scaled by trust · |parameter| / |update|."""

    def __init__(self, params, lr=0.0, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    scale = group["trust"] * p.norm() / update.norm()
                    update = update * torch.where(scale.isfinite() & (scale > 0), scale, 1.0)   # 1 where a norm is 0
                mu = self.state[p].setdefault("mu", torch.zeros_like(p))
                mu.mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * mu)


def learning_rate(epoch, args):
    """Rate at a (fractional) epoch: linear warm-up from 0 to blr · batch_size / 256, then half a cosine to min_lr."""
    peak = args.blr * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.min_lr + (peak - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation for fine-tuning
# ---------------------------------------------------------------------------------------------------------------------
FILL = (124, 116, 104)      # ImageNet's mean colour, for what an op moves in from outside


def affine(img, *matrix):
    return img.transform(img.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


RAND_AUGMENT_OPS = {  # of an RGB PIL image, a level m in [0, 1] that sets the change, and a random sign s
    "AutoContrast": lambda img, m, s: ImageOps.autocontrast(img),
    "Equalize": lambda img, m, s: ImageOps.equalize(img),
    "Invert": lambda img, m, s: ImageOps.invert(img),
    "Rotate": lambda img, m, s: img.rotate(s * m * 30, Image.Resampling.BICUBIC, fillcolor=FILL),
    "Posterize": lambda img, m, s: ImageOps.posterize(img, 4 - int(m * 4)) if m < 1 else img.point(lambda i: 0),
    "Solarize": lambda img, m, s: ImageOps.solarize(img, 256 - int(m * 256)),
    "SolarizeAdd": lambda img, m, s: img.point(lambda i: min(255, i + int(m * 110)) if i < 128 else i),
    "Color": lambda img, m, s: ImageEnhance.Color(img).enhance(max(0.1, 1 + s * m * 0.9)),
    "Contrast": lambda img, m, s: ImageEnhance.Contrast(img).enhance(max(0.1, 1 + s * m * 0.9)),
    "Brightness": lambda img, m, s: ImageEnhance.Brightness(img).enhance(max(0.1, 1 + s * m * 0.9)),
    "Sharpness": lambda img, m, s: ImageEnhance.Sharpness(img).enhance(max(0.1, 1 + s * m * 0.9)),
    "ShearX": lambda img, m, s: affine(img, 1, s * m * 0.3, 0, 0, 1, 0),
    "ShearY": lambda img, m, s: affine(img, 1, 0, 0, s * m * 0.3, 1, 0),
    "TranslateX": lambda img, m, s: affine(img, 1, 0, s * m * 0.45 * img.size[0], 0, 1, 0),
    "TranslateY": lambda img, m, s: affine(img, 1, 0, 0, 0, 1, s * m * 0.45 * img.size[1]),
}


def rand_augment(img):
    """RandAugment (arXiv:1909.13719) as timm's `rand-m9-mstd0.5-inc1`: two ops drawn from 15, each applied with
    probability 0.5 at magnitude N(9, 0.5) of 10. Draws from torch's generator."""
    for op in torch.randint(len(RAND_AUGMENT_OPS), (2,)).tolist():
        apply, sign, normal = *(torch.rand(2) < 0.5).tolist(), torch.randn(()).item()
        if apply:
            level = min(max(9 + 0.5 * normal, 0), 10) / 10
            img = list(RAND_AUGMENT_OPS.values())[op](img, level, -1 if sign else 1)
    return img


def mix(imgs, labels, num_classes, args):
    """Random erasing of each image (N, 3, H, W), in place; then mixup or cutmix, if any: labels become (N, classes)."""
    for img in imgs if args.erasing else []:
        box = v2.RandomErasing(value=0).make_params([img])
        if torch.rand(()) < args.erasing and box["v"] is not None:      # its own noise would wait for the GPU
            top, left = box["i"], box["j"]
            img[:, top:top + box["h"], left:left + box["w"]].normal_()
    choices = [transform(alpha=alpha, num_classes=num_classes)
               for transform, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    return v2.RandomChoice(choices)(imgs, labels) if choices else (imgs, labels)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
def load_labelled(args):
    """The training and the validation set, with one numbering of the classes. Raises InputError without labels."""
    train, val = (load_dataset(args.data, split, args.data_root, args.in_chans) for split in ("train", "val"))
    for dataset in (train, val):
        if dataset.classes is None:
            raise InputError(f"'{args.data}' has no labels: {dataset.stray} lies in no class folder")
    if val.classes != train.classes:    # validation may lack classes, but not have others
        unknown = sorted(set(val.classes) - set(train.classes))
        if unknown:
            raise InputError(f"'{args.data}': validation has classes that training lacks: {', '.join(unknown[:5])}")
        val.labels = np.array([train.classes.index(name) for name in val.classes])[val.labels]
    return train, val


@torch.no_grad()
def evaluate(run, model, val_set, channels):
    """Top-1 and top-5 in %, and the number of images, over all processes."""
    counts = torch.zeros(3, device=run.device)
    model.eval()
    for buffer in model.buffers() if run.world_size > 1 else []:
        dist.broadcast(buffer, 0)       # BatchNorm's statistics are the first process's, as in its checkpoint
    for imgs, labels in run.once(val_set, batch_size=256):
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
            logits = model(normalize(imgs, *channels))
        counts += hits(logits, labels)
    return to_percent(sum(gather(counts.cpu())))


def hits(scores, labels):
    """Of scores (N, classes) and labels (N,): how many are right in the top 1, how many in the top 5, and N."""
    right = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.sum(), torch.ones_like(labels).sum()]).float()


def to_percent(counts):
    """Sums of `hits` as top-1 in %, top-5 in %, number of images."""
    top1, top5, number = counts.tolist()
    return 100 * top1 / number, 100 * top5 / number, int(number)


@torch.no_grad()
def extract_features(run, model, crops, channels, pool):
    """Features of unit length (n, D) and labels (n,) of this process's share of a data set."""
    features = [torch.empty(0, model.cls_token.shape[-1], device=run.device)]
    labels = [torch.empty(0, dtype=torch.int64, device=run.device)]
    model.eval()
    for imgs, label in run.once(crops, batch_size=256, progress="features"):
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
            x = model.features(normalize(imgs, *channels), pool)
        features.append(F.normalize(x.float(), dim=1))
        labels.append(label)
    return torch.cat(features), torch.cat(labels)


def knn_scores(features, bank, bank_labels, num_classes, k, temperature):
    """Votes (N, classes) for features (N, D): of the k nearest by cosine in all processes' banks (M, D), each weighs
    exp(cosine / temperature), here over the nearest one's weight; all have unit length (Wu et al., arXiv:1805.01978).
    """
    near = []                           # the k nearest of each piece of this process's bank: similarities and labels
    for rows, labels in zip(bank.split(2**16), bank_labels.split(2**16)):
        similarity, nearest = (features @ rows.T).topk(min(k, len(rows)), dim=1)
        near.append((similarity.cpu(), labels[nearest].cpu()))
    near = [piece for pieces in gather(near) for piece in pieces]
    similarity, labels = (torch.cat(x, dim=1).to(features.device) for x in zip(*near))
    similarity, nearest = similarity.topk(min(k, similarity.shape[1]), dim=1)
    votes = torch.zeros(len(features), num_classes, device=features.device)
    return votes.scatter_add(1, labels.gather(1, nearest), ((similarity - similarity[:, :1]) / temperature).exp())


@torch.no_grad()
def score_knn(run, model, train_set, val_set, channels, args):
    """As `evaluate`, by k-NN in the training set's features, of which each process keeps a share."""
    bank, bank_labels = extract_features(run, model, train_set, channels, args.pool)
    features, labels = (torch.cat(gather(x.cpu())).to(run.device)
                        for x in extract_features(run, model, val_set, channels, args.pool))
    counts = torch.zeros(3, device=run.device)
    for x, y in zip(features.split(1024), labels.split(1024)):
        counts += hits(knn_scores(x, bank, bank_labels, len(train_set.source.classes), args.k, args.temperature), y)
    run.say("k-NN is a quick look: a low figure is normal for masked autoencoders, whatever their fine-tuning.")
    return to_percent(counts)


@torch.no_grad()
def score(args):
    """--mode eval: scores a classifier on a folder, without training. Writes OUTPUT/predictions.csv; returns the Run,
    top-1 and top-5 in % (None without labels) and the number of images. If a folder has only some of the classes, known
    by their names, only these are predicted, as for ImageNet-A and -R; if its folders are no classes at all, there are
    no labels. Raises InputError."""
    if (args.model, args.patch_size, args.pool) != (("vit_micro", 4, None) if args.demo else (None, None, None)):
        raise InputError("--model, --patch_size and --pool: --mode eval takes them from the checkpoint")
    model, vit, (mean, std), names = load_classifier(args.ckpt, args.img_size)
    check_channels(args, vit)
    args.in_chans, args.mean, args.std = vit["in_chans"], args.mean or mean, args.std or std
    args.img_size = list(pair(vit["img_size"]))
    run = Run(args, __file__)
    named = args.data == "shapes" or args.data in TORCHVISION_DATASETS
    held_out = named or not os.path.isdir(args.data) or os.path.isdir(os.path.join(args.data, "val"))
    images = load_dataset(args.data, "val" if held_out else "pretrain", args.data_root, args.in_chans)
    names = read_names(args.classes) if args.classes else names
    names = names or images.classes or [str(i) for i in range(model.num_classes)]
    unknown = sorted(set(images.classes or []) - set(names))
    if len(names) != model.num_classes:
        raise InputError(f"the classifier has {model.num_classes} classes, and there are {len(names)} names: give them "
                         "by --classes")
    if unknown and len(unknown) == len(images.classes):
        run.say(f"--data's folders, such as {unknown[0]!r}, are no classes: images are labelled, not scored")
        images.classes = None
    elif unknown:
        raise InputError(f"{unknown[0]!r}, a folder of --data, is none of the classes: name these by --classes")
    if images.classes and len(images.classes) < model.num_classes:
        run.say(f"only the {len(images.classes)} of {model.num_classes} classes that --data has are predicted")
    if images.classes and len(set(names)) < len(names):     # a folder's name would mean two outputs
        raise InputError(f"{next(name for name in names if names.count(name) > 1)!r} is the name of several classes")
    kept = [names.index(name) for name in images.classes] if images.classes else range(model.num_classes)
    kept = torch.tensor(kept, device=run.device)

    crops = Crops(images, eval_transform(args.img_size))
    channels, model, found = run.channels(crops), model.to(run.device).eval(), []
    for imgs, labels in run.once(crops, batch_size=256, progress="images"):
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
            logits = model(normalize(imgs, *channels))
        probability, first = logits[:, kept].softmax(dim=1).topk(min(5, len(kept)), dim=1)
        found += zip(first.tolist(), probability[:, 0].tolist(), labels.tolist())
    shares = gather(found)              # process r has the images r, r + world_size, …
    rows = [shares[i % len(shares)][i // len(shares)] for i in range(len(images))]
    if run.rank == 0:
        kept = kept.tolist()
        with open(run.output / "predictions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["file", "class", "probability"])
            for i, (first, probability, _) in enumerate(rows):
                path = os.fsdecode(images.paths[i][len(images.root) + 1:]) if hasattr(images, "paths") else i
                table.writerow([path, names[kept[first[0]]], f"{probability:.4f}"])
    run.say(f"predictions: {run.output}/predictions.csv")
    top1, top5 = (100 * sum(label in first[:n] for first, _, label in rows) / len(rows) for n in (1, 5))
    return run, (top1, top5, len(rows)) if images.classes else (None, None, len(rows))


def read_names(path):
    """The names of classes: of the folders in a folder, or the lines of a file. Raises InputError."""
    try:
        if os.path.isdir(path):
            return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        names = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"--classes '{path}' cannot be read: {error}") from error
    return names[:-1] if names[-1] == "" else names


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------
def main(args):
    """Evaluates one checkpoint in one mode. Returns the result, which is also printed last and saved as result.json."""
    if args.mode == "eval":
        return report(*score(args), args)
    weights, vit, encoder, left_out = open_encoder(args)
    args.img_size = vit["img_size"]
    fill_recipe(args, vit["embed_dim"])

    run = Run(args, __file__)
    train_set, val_set = load_labelled(args)
    num_classes = len(train_set.classes)
    torch.manual_seed(args.seed)                    # every process starts from the same weights
    if args.mode == "knn":
        model = ViT(**vit)
    else:
        train_blocks = {"finetune": None, "partial": args.blocks, "linear": 0}[args.mode]
        model = Classifier(num_classes, args.pool, args.mode == "linear", train_blocks, **vit, drop_path=args.drop_path)
    if weights is not None:
        model.load_state_dict(weights, strict=False)    # what is left as it is: the head, and its norm
    model.to(run.device)
    if left_out:
        run.say(f"{args.ckpt}: ignoring {left_out} tensors that are not the encoder's (the decoder's, say)")
    run.say(f"{args.mode} of {args.ckpt}: {vit['embed_dim']} wide, {vit['depth']} blocks, patches of "
            f"{vit['patch_size']}, {' × '.join(map(str, args.img_size))} pixels, {len(train_set)} images to train, "
            f"{len(val_set)} to validate, {num_classes} classes")

    train_crops = Crops(train_set, eval_transform(args.img_size), skip_bad=args.skip_bad)
    val_crops = Crops(val_set, eval_transform(args.img_size))
    channels = run.channels(train_crops)
    if args.mode == "knn":
        figures = score_knn(run, model, train_crops, val_crops, channels, args)
    else:
        figures = train(run, model, train_set, val_crops, channels, encoder, args)
    return report(run, figures, args)


def report(run, figures, args):
    """Prints and saves the result, and returns it."""
    top1, top5, images = figures
    result = {"mode": args.mode, "images": images, "ckpt": args.ckpt, "data": args.data}
    if top1 is not None:                # else there are no labels
        result = {"mode": args.mode, "top1": round(top1, 3), "top5": round(top5, 3), **result}
    return run.report(result)


def train(run, model, train_set, val_crops, channels, encoder, args):
    """Trains what is not frozen; returns the last epoch's top-1 and top-5 in %, and the number of validation images."""
    device, dtype, regularise, num_classes = run.device, run.dtype, args.mode != "linear", len(train_set.classes)
    transform = train_transform(args.img_size, args.crop_scale)
    rgb_files = args.in_chans == 3 and not getattr(train_set, "arrays", False)
    if regularise and args.rand_augment and not rgb_files:
        run.say("no RandAugment, which is made for RGB files")
    args.rand_augment = args.rand_augment and rgb_files
    if regularise and args.rand_augment:
        transform = v2.Compose([transform, v2.ToPILImage(), rand_augment, v2.PILToTensor()])
    crops = Crops(train_set, transform, args.seed, args.skip_bad)
    if args.batch_size < 2 * run.world_size * args.accum_iter and not regularise:
        raise InputError("--batch_size must give each process at least 2 images at a time, for BatchNorm")

    params = [p for p in model.parameters() if p.requires_grad]
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, args.beta2), fused=True) if regularise else LARS(groups)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing if regularise else 0.0)
    run.resume(crops, model, optimizer, scaler, encoder=encoder, class_names=train_set.classes)     # both must match
    run.say(f"learning rate {args.blr:g} · {args.batch_size} / 256 = {args.blr * args.batch_size / 256:g}")
    if args.compile:
        model.compile()
    # On CPUs: sums in the same order in every step, also the first of a resumed run (else DDP reorders them after it)
    net = DistributedDataParallel(model, find_unused_parameters=device.type == "cpu") if run.world_size > 1 else model

    result = None
    for epoch in run.epochs():
        model.train()
        for step in run.steps():
            lr = learning_rate(step / run.steps_per_epoch, args)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            for part, (imgs, labels) in enumerate(run.parts()):             # also seeds mixing and drop path
                imgs = normalize(imgs, *channels)
                if regularise:
                    imgs, labels = mix(imgs, labels, num_classes, args)
                net.require_backward_grad_sync = part == args.accum_iter - 1    # all-reduce once, after the last part
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = criterion(net(imgs).float(), labels)
                scaler.scale(loss / args.accum_iter).backward()
                run.add(loss)
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.get_total_norm([p.grad for p in params])
            if args.clip_grad:
                nn.utils.clip_grads_with_norm_(params, args.clip_grad, grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.end_step(grad_norm)                 # when due: checkpoint, checks, and the exit after a signal

        result = evaluate(run, model, val_crops, channels)
        run.end_epoch(top1=result[0], top5=result[1])
    result = result or evaluate(run, model, val_crops, channels)    # of a run that was finished before
    run.finish()
    return result


if __name__ == "__main__":
    launch(main, get_args)
