"""What pre-trained features are worth for semantic segmentation: UperNet on the plain ViT, or a linear layer.

    python segment.py --ckpt runs/mae/encoder.pt --data ADEChallengeData2016            # UperNet; everything trains
    python segment.py --ckpt runs/mae/encoder.pt --data my_images --head linear --freeze
    torchrun --nproc_per_node 8 segment.py --ckpt runs/mae/encoder.pt --data ADEChallengeData2016
    python segment.py --demo --ckpt runs/mae/last.pt                                    # a laptop CPU, on drawn scenes

`--ckpt` takes what finetune.py takes. `--data` is `scenes`, a folder with images/SPLIT/x.jpg, masks/SPLIT/x.png (one
byte a pixel: its class, or --ignore) and classes.json ({"classes": [names]}), or ADE20K as it is distributed. The
result is the last line printed and OUTPUT/result.json: mIoU, mAcc, aAcc and each class's IoU after the last step, in %.
OUTPUT/predictions.png shows validation images, their truth, and what the model says.

UperNet (Xiao et al., arXiv:1807.10221) wants a pyramid, which is made of four blocks' maps; for the transfer each block
gets relative-position biases and a layer scale (docs/reading.md, chapter 7). MAE states 100 epochs, batch 16 and a rate
that was searched for (A.4). The defaults are the public code's that reports 48.1 mIoU: 160k steps, batch 16, and
RECIPES. `--recipe sdae` is SdAE's (A.1): the rate is 4e-4.

Chosen where the papers are silent or differ:
- Images are resized so that the shorter side is --resize and the longer at most four times that (2048 × 512), times
  0.5 to 2 in training. Of the photometric distortions, contrast always comes before saturation and hue, and saturation
  is torchvision's, a blend with the grey image.
- A crop beyond an image's edge is padded with the image's mean colour, before the distortions (there: with ImageNet's,
  after them).
- The loss is averaged over all pixels; those to be ignored count as 0, so that a crop without labels isn't NaN.
- With --freeze the encoder is as pre-trained: its biases and scales stay at their start, its drop path is off.
- Random weights (`--ckpt none`) train without layer-wise decay, as in finetune.py.
- Windows have the size of the training crops, so positions are resampled once, when weights are loaded.

Measured at small scale: drawn scenes and CamVid (results/dense.md). ADE20K and GPUs: not run.
"""
import argparse
import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from common import Block, Crops, ImageFiles, InputError, Scenes, ViT, init_linear, normalize, pair
from finetune import encoder_args, fill, open_encoder, param_groups
from runs import Run, gather, launch, number, parse_args, save_picture, to_rgb

RECIPES = {"mae": dict(lr=1e-4, layer_decay=0.65), "sdae": dict(lr=4e-4, layer_decay=0.65)}
DEMO = dict(data="scenes", model="vit_micro", patch_size=4, img_size=[64], head_channels=32,
            scale=[0.75, 1.5], num_steps=375, warmup_steps=40, batch_size=8, lr=5e-3, drop_path=0.0, num_workers=0)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    """Parses the command line. Raises InputError."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    encoder_args(parser, img_size=[512], drop_path=0.1)
    parser.add_argument("--recipe", choices=RECIPES, default="mae", help="sets --lr and --layer_decay")

    head = parser.add_argument_group("head")
    head.add_argument("--head", choices=["upernet", "linear"], default="upernet",
                      help="linear: BatchNorm and a 1×1 convolution on the last map")
    head.add_argument("--head_channels", type=number(int, "[1, 65536]"), default=768)
    head.add_argument("--taps", type=number(int, "[0, 1000]"), nargs=4,
                      help="the blocks whose maps UperNet gets, from 0 (default: 1/3, 1/2, 2/3 and all of the depth)")

    data = parser.add_argument_group("images and masks")
    data.add_argument("--resize", type=number(int, "[1, 16384]"),
                      help="pixels of an image's shorter side, before the random scale (default: --img_size's)")
    data.add_argument("--scale", type=number(float, "(0, inf)"), nargs=2, default=[0.5, 2.0],
                      help="least and most of the random scale in training")
    data.add_argument("--stride", type=number(int, "[1, 16384]"), nargs="+",
                      help="pixels between windows in evaluation (default: 2/3 of --img_size)")
    data.add_argument("--ignore", type=number(int, "[0, 255]"), default=255, help="mask value of unlabelled pixels")
    data.add_argument("--val_split", default="val", help="the folder to evaluate on")

    training_args(parser, num_steps=160000, warmup_steps=1500, batch_size=16, weight_decay=0.05, eval_epochs=13)
    args = parse_args(parser, argv, DEMO, layout="scenes, a folder with images/, masks/ and classes.json, or ADE20K's")
    finish_args(args, "segment", RECIPES[args.recipe])
    if args.scale[0] > args.scale[1]:
        raise InputError(f"--scale {args.scale[0]:g} {args.scale[1]:g}: the first must not be the larger")
    args.resize = args.resize or min(args.img_size)
    args.stride = pair(args.stride or [max(1, 2 * side // 3) for side in args.img_size])
    if args.stride[0] > args.img_size[0] or args.stride[1] > args.img_size[1]:
        raise InputError(f"--stride {args.stride[0]} {args.stride[1]} is more than --img_size: windows would leave "
                         "pixels out")
    if args.data == "scenes" and args.val_split != "val":
        raise InputError(f"--val_split {args.val_split}: the drawn scenes have no split but train and val")
    return args


def training_args(parser, num_steps, warmup_steps, batch_size, weight_decay, eval_epochs):
    """Adds the arguments that say how to train, with these defaults. detect.py has them too."""
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--freeze", action="store_true", help="the encoder stays as it is; only what is new trains")
    optim.add_argument("--num_steps", type=number(int, "[1, inf)"), default=num_steps)
    optim.add_argument("--warmup_steps", type=number(int, "[0, inf)"), default=warmup_steps)
    optim.add_argument("--batch_size", type=number(int, "[1, inf)"), default=batch_size, help="images, all processes")
    optim.add_argument("--accum_iter", type=number(int, "[1, inf)"), default=1, help="parts of a process's share")
    optim.add_argument("--lr", type=number(float, "(0, inf)"), help="of the head, whatever the batch size")
    optim.add_argument("--weight_decay", type=number(float, "[0, inf)"), default=weight_decay)
    optim.add_argument("--layer_decay", type=number(float, "(0, 1]"),
                       help="rate of a block over that of the next (default: the recipe's; random weights 1)")
    optim.add_argument("--clip_grad", type=number(float, "(0, inf)"), help="clip the gradient to this norm")
    optim.add_argument("--eval_epochs", type=number(int, "[1, inf)"), default=eval_epochs,
                       help="epochs between evaluations; also at the end")


def finish_args(args, name, recipe):
    """Sets what the command line left open. Raises InputError where arguments don't go together."""
    demo = dict(layer_decay=0.75) if args.demo else {}
    scratch = dict(layer_decay=1.0) if args.ckpt == "none" else {}      # random weights: nothing to preserve
    fill(args, {**recipe, **demo, **scratch})
    if args.warmup_steps >= args.num_steps:
        raise InputError(f"--warmup_steps {args.warmup_steps} must be less than --num_steps {args.num_steps}")
    args.img_size = pair(args.img_size)
    if args.output_dir is None:
        args.output_dir = str((Path("runs/none") if args.ckpt == "none" else Path(args.ckpt).parent) / name)


# ---------------------------------------------------------------------------------------------------------------------
# Images with masks
# ---------------------------------------------------------------------------------------------------------------------
class MaskFolder(ImageFiles):
    """Items: (image (C, H, W), mask (H, W) uint8), and None. Raises InputError where folders or files don't fit."""

    def __init__(self, root, split, ignore, in_chans=3):
        root = os.fspath(root).rstrip("/" + os.sep) or os.sep
        self.ade = os.path.isdir(os.path.join(root, "annotations", "training"))     # ADE20K: 0 is unlabelled, 1 to 150
        split = {"train": "training", "val": "validation"}.get(split, split) if self.ade else split
        images = os.path.join(root, "images", split)
        masks = os.path.join(root, "annotations" if self.ade else "masks", split)
        for folder in (images, masks):
            if not os.path.isdir(folder):
                raise InputError(f"no folder '{folder}': --data needs images/SPLIT, masks/SPLIT and classes.json")
        names = sorted(name for name in os.listdir(images) if name[0] != ".")
        mask_names = [os.path.splitext(name)[0] + ".png" for name in names]
        there = set(os.listdir(masks))
        missing = [name for name in mask_names if name not in there]
        if not names:
            raise InputError(f"no image in '{images}'")
        if missing:
            raise InputError(f"'{masks}' lacks {missing[0]} ({len(missing)} of {len(names)} images have no mask)")
        if self.ade and ignore != 255:
            raise InputError(f"--ignore {ignore}: ADE20K's unlabelled pixels become 255")
        self.classes = [str(i) for i in range(1, 151)] if self.ade else read_classes(os.path.join(root, "classes.json"))
        self.root, self.ignore = os.fsencode(root), ignore
        self.masks = np.array([os.fsencode(os.path.join(masks, name)) for name in mask_names])
        super().__init__(np.array([os.fsencode(os.path.join(images, name)) for name in names]), in_chans)

    def __getitem__(self, index):
        img, path = self.load(index), os.fsdecode(self.masks[index])
        try:
            mask = torch.from_numpy(np.array(Image.open(path)))
        except Exception as error:      # what Pillow raises depends on what is wrong
            raise InputError(f"{path!r} cannot be used as a mask: {error!r}") from error
        if mask.dtype != torch.uint8 or mask.shape != img.shape[1:]:
            raise InputError(f"{path!r} is {'×'.join(map(str, mask.shape))} of {mask.dtype}; it must be one byte for "
                             f"each pixel of the image, {img.shape[1]}×{img.shape[2]}")
        mask = mask - 1 if self.ade else mask       # 0 becomes 255
        unknown = set(mask.unique().tolist()) - set(range(len(self.classes))) - {self.ignore}
        if unknown:
            raise InputError(f"{path!r} has the value {min(unknown) + self.ade}, which is neither one of the "
                             f"{len(self.classes)} classes nor --ignore {self.ignore}")
        return (img, mask), None


def read_classes(path):
    """The names in {"classes": [names]}. Raises InputError."""
    try:
        classes = json.loads(Path(path).read_text())["classes"]
        if not (isinstance(classes, list) and 0 < len(classes) < 256):
            raise ValueError("no list of 1 to 255 names")
        return [str(name) for name in classes]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"'{path}' must hold {{\"classes\": [names]}}: {error!r}") from error


class SceneMasks(Scenes):
    """The drawn scenes, as MaskFolder's items. Class 0 is the background."""
    classes = ["background", *Scenes.classes]

    def __getitem__(self, index):
        img, shown, labels = super().__getitem__(index)
        return (img, torch.from_numpy(np.append(0, labels + 1).astype(np.uint8)[shown])), None


class Pairs(Crops):
    """Crops of a source whose items are (image, target) and None; the transform takes both and gives both."""

    def __getitem__(self, item):
        (img, target), _, skipped = super().__getitem__(item)
        return img, target, skipped


def resize(img, size):
    """An image (C, H, W) at a size (height, width), bilinear and antialiased, of the same type."""
    return F.interpolate(img[None], tuple(size), mode="bilinear", antialias=True, align_corners=False)[0]


def resize_mask(masks, size):
    """Masks (n, H, W) uint8 at a size (height, width), by nearest pixels."""
    return F.interpolate(masks[:, None], tuple(size), mode="nearest-exact")[:, 0]


def pad_to(x, size, fill):
    """`x` (…, h, w) in the upper left corner of (…, height, width), the rest `fill`: a number, or a tensor that
    broadcasts."""
    canvas = torch.zeros(*x.shape[:-2], *size, dtype=x.dtype) + fill
    canvas[..., :x.shape[-2], :x.shape[-1]] = x
    return canvas


def mean_colour(img):
    """What an image (C, H, W) is padded with: (C, 1, 1) of the image's type."""
    return img.float().mean(dim=(1, 2), keepdim=True).to(img.dtype)


def resized(img, pixels, scale=1.0):
    """The size of an image whose shorter side gets `pixels` and the longer at most 4 times that, times `scale`."""
    scale = min(pixels / min(img.shape[1:]), 4 * pixels / max(img.shape[1:])) * scale
    return [max(1, round(side * scale)) for side in img.shape[1:]]


def shift(img):
    """An RGB image (3, H, W) uint8, all values shifted by a random number from -32 to 32."""
    return (img.int() + torch.randint(-32, 33, ())).clamp(0, 255).byte()


# Brightness (a shift), contrast (a factor), saturation, hue (36°): each in half of the images
PHOTOMETRIC = v2.Compose([v2.RandomApply([change], p=0.5) for change in (
    v2.Lambda(shift), v2.ColorJitter(brightness=0.5), v2.ColorJitter(saturation=0.5), v2.ColorJitter(hue=0.1))])


def train_transform(sample, size, pixels, scale, ignore):
    """An image and its mask at `size`, after random scale, crop (of ten, the first where each class has < 0.75 of the
    pixels), flip and photometric distortion."""
    img, mask = sample
    new = resized(img, pixels, torch.empty(()).uniform_(*scale).item())
    img, mask = resize(img, new), resize_mask(mask[None], new)[0]
    for _ in range(10):
        top, left = (torch.randint(max(0, side - n) + 1, ()).item() for side, n in zip(new, size))
        window = ..., slice(top, top + size[0]), slice(left, left + size[1])
        labels = mask[window]
        counts = torch.bincount(labels[labels != ignore])
        if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
            break
    img, mask = pad_to(img[window], size, mean_colour(img)), pad_to(mask[window], size, ignore)
    if torch.rand(()) < 0.5:
        img, mask = img.flip(2), mask.flip(1)
    return (PHOTOMETRIC(img) if len(img) == 3 and img.dtype == torch.uint8 else img), mask


def eval_transform(sample, pixels):
    """The image with its shorter side at `pixels`; the mask as it is."""
    img, mask = sample
    return resize(img, resized(img, pixels)), mask


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
class RelativePositionBias(nn.Module):
    """A number for each head and each offset between two patches, and three for pairs with the cls token; all start
    at zero (BEiT, arXiv:2106.08254; MAE, A.4)."""

    def __init__(self, num_heads, grid_size):
        super().__init__()
        self.grid_size = grid_size
        rows, columns = grid_size
        self.table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, num_heads))

    def forward(self, q):
        index = relative_positions(self.grid_size, q.device)
        return self.table[index].permute(2, 0, 1)                               # (heads, 1 + L, 1 + L)


@functools.cache        # for all blocks at once; as a buffer of each, DDP would send it in every step
def relative_positions(grid_size, device):
    """Which number of a RelativePositionBias is of which pair of tokens: (1 + L, 1 + L) int64."""
    rows, columns = grid_size
    offsets = (2 * rows - 1) * (2 * columns - 1)
    y, x = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
    index = torch.empty(1 + rows * columns, 1 + rows * columns, dtype=torch.int64)
    index[1:, 1:] = (y[:, None] - y + rows - 1) * (2 * columns - 1) + x[:, None] - x + columns - 1
    index[0, :] = offsets           # the cls token sees a patch,
    index[:, 0] = offsets + 1       # a patch sees it,
    index[0, 0] = offsets + 2       # it sees itself
    return index.to(device)


class TransferBlock(Block):
    """The encoder's block with what MAE adds for the transfer; at the start it computes the same."""

    def __init__(self, dim, num_heads, grid_size, drop_path):
        super().__init__(dim, num_heads, drop_path=drop_path)
        self.attn.bias = RelativePositionBias(num_heads, grid_size)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))         # (N, 1 + L, D)
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


def conv(in_channels, channels, size):
    return nn.Sequential(nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=False),
                         nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def upsample(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """Four maps (N, D, h, w) of strides 4, 8, 16 and 32 to logits (N, classes, h, w) at stride 4, and the auxiliary
    head's at stride 16 (arXiv:1807.10221, Section 3)."""

    def __init__(self, dim, channels, num_classes, pool_scales=(1, 2, 3, 6), aux_channels=256):
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(dim, channels, 1)) for n in pool_scales)
        self.bottleneck = conv(dim + len(pool_scales) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv(dim, channels, 1) for _ in range(3))
        self.fpn = nn.ModuleList(conv(channels, channels, 3) for _ in range(3))
        self.fusion = conv(4 * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))
        self.auxiliary = nn.Sequential(conv(dim, aux_channels, 3), nn.Dropout2d(0.1),
                                       nn.Conv2d(aux_channels, num_classes, 1))

    def forward(self, maps):
        *finer, coarsest = maps
        context = [upsample(pool(coarsest), coarsest.shape[2:]) for pool in self.pools]
        x = self.bottleneck(torch.cat([coarsest, *context], dim=1))
        pyramid = [x]
        for level in (2, 1, 0):
            x = self.laterals[level](finer[level]) + upsample(x, finer[level].shape[2:])        # top-down
            pyramid.insert(0, self.fpn[level](x))
        x = self.fusion(torch.cat([upsample(x, pyramid[0].shape[2:]) for x in pyramid], dim=1))
        return [self.classify(x), self.auxiliary(maps[2])]


class Segmenter(ViT):
    """The encoder with a head. Images (N, C, H, W) of the size it was made for, to a list of logits (N, classes, h, w)
    at lower resolutions: the head's, and in UperNet the auxiliary head's."""

    def __init__(self, num_classes, head="upernet", head_channels=768, taps=None, drop_path=0.0, freeze=False, **vit):
        super().__init__(drop_path=0.0 if freeze else drop_path, **vit)
        depth, dim, num_heads = len(self.blocks), self.cls_token.shape[-1], self.blocks[0].attn.num_heads
        self.blocks = nn.ModuleList(TransferBlock(dim, num_heads, self.grid_size, block.drop_path.p)
                                    for block in self.blocks)
        self.blocks.apply(init_linear)
        self.norm = nn.Identity()       # maps are taken before it
        self.requires_grad_(not freeze)     # what follows is new, and trains
        self.taps = [depth - 1] if head == "linear" else taps or [round(depth * i / 12) - 1 for i in (4, 6, 8, 12)]
        if sorted(set(self.taps)) != list(self.taps) or self.taps[-1] >= depth:
            raise InputError(f"--taps must be different blocks in ascending order, from 0 to {depth - 1}")
        if head == "upernet" and min(self.grid_size) < 2:
            raise InputError("--img_size must be two patches or more: UperNet's last map has half as many")
        self.blocks = self.blocks[:self.taps[-1] + 1]       # later ones would get no gradient
        if head == "linear":
            self.head = nn.Sequential(nn.BatchNorm2d(dim, affine=False, eps=1e-6), nn.Conv2d(dim, num_classes, 1))
        else:
            self.rescale = nn.ModuleList([
                nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(),
                              nn.ConvTranspose2d(dim, dim, 2, 2)),
                nn.ConvTranspose2d(dim, dim, 2, 2), nn.Identity(), nn.MaxPool2d(2)])
            self.head = UperNet(dim, head_channels, num_classes)

    def forward_maps(self, imgs, taps):
        """Images (N, C, H, W) to what comes out of the blocks `taps`, counted from 0, without the last norm: a list of
        maps (N, D, rows, columns), shallow to deep."""
        x = self.patch_embed(imgs)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in taps:
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, self.grid_size))
        return maps

    def forward(self, imgs):
        maps = self.forward_maps(imgs, self.taps)
        if len(maps) == 1:
            return [self.head(maps[0])]
        return self.head([rescale(x) for rescale, x in zip(self.rescale, maps)])


def segmentation_loss(outputs, masks, ignore):
    """Cross-entropy of each output's upsampled logits with the masks (N, H, W), the second's weighted 0.4."""
    losses = [F.cross_entropy(upsample(logits.float(), masks.shape[1:]), masks.long(), ignore_index=ignore,
                              reduction="sum") / masks.numel() for logits in outputs]
    return losses[0] + 0.4 * sum(losses[1:])


def learning_rate(step, args):
    """Rate at a step: linear warm-up from 0 to lr, then linear to 0 at num_steps."""
    if step < args.warmup_steps:
        return args.lr * step / args.warmup_steps
    return args.lr * (args.num_steps - step) / (args.num_steps - args.warmup_steps)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
def slide(model, imgs, size, stride):
    """Logits (N, classes, H, W) of images (N, C, H, W) of any size, from windows of `size` that are `stride` apart. The
    last ones end at the edge; where windows overlap, their logits are averaged. Smaller images are padded."""
    N, C, H, W = imgs.shape
    imgs = F.pad(imgs, (0, max(0, size[1] - W), 0, max(0, size[0] - H)))
    tops, lefts = (sorted({min(i, n - side) for i in range(0, n - side + step, step)})
                   for n, side, step in zip(imgs.shape[2:], size, stride))
    total = count = 0
    for top in tops:
        for left in lefts:
            logits = model(imgs[:, :, top:top + size[0], left:left + size[1]])[0]
            around = (left, imgs.shape[3] - left - size[1], top, imgs.shape[2] - top - size[0])
            total = total + F.pad(upsample(logits.float(), size), around)
            count = count + F.pad(imgs.new_ones(size), around)
    return (total / count)[:, :, :H, :W]


def confusion(pred, target, num_classes, ignore):
    """How many pixels of each class (rows) are predicted as which (columns): (classes, classes) int64."""
    keep = target != ignore
    cells = target[keep].long() * num_classes + pred[keep]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def scores(matrix):
    """mIoU, mAcc, aAcc and each class's IoU, in %, from a confusion matrix. A class that is neither there nor predicted
    is not in mIoU, and one that is not there is not in mAcc."""
    hits, pixels, predicted = matrix.diag().double(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou = 100 * hits / (pixels + predicted - hits)
    return iou.nanmean().item(), (100 * hits / pixels).nanmean().item(), (100 * hits.sum() / pixels.sum()).item(), iou


@torch.no_grad()
def evaluate(run, model, crops, channels, args):
    """`scores` over all processes: mIoU, mAcc and aAcc as a dict, and each class's IoU."""
    num_classes = len(crops.source.classes)
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=run.device)
    model.eval()
    for buffer in model.buffers() if run.world_size > 1 else []:
        dist.broadcast(buffer, 0)       # BatchNorm's statistics are the first process's, as in its checkpoint
    batch_size = 8 if args.data == "scenes" else 1          # images in files may differ in size
    for imgs, masks in run.once(crops, batch_size, progress="evaluation"):
        matrix += confusion(predict(run, model, imgs, masks.shape[1:], channels, args), masks, num_classes, args.ignore)
    *means, iou = scores(sum(gather(matrix.cpu())))
    return dict(zip(("mIoU", "mAcc", "aAcc"), means)), iou


def predict(run, model, imgs, size, channels, args):
    """The class of each pixel of images (N, C, H, W), resized to `size` (height, width)."""
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
        logits = slide(model, normalize(imgs, *channels), args.img_size, args.stride)
    return upsample(logits, size).argmax(dim=1)


@torch.no_grad()
def picture(run, model, crops, channels, args, number=8):
    """Rows of a picture: validation images, their truth, and what the model says; each class has its colour."""
    colours = torch.rand(256, 3, generator=torch.Generator().manual_seed(105))
    colours[args.ignore] = 0
    rows = [], [], []
    model.eval()
    for index in torch.linspace(0, len(crops) - 1, min(number, len(crops))).long().tolist():
        img, mask, _ = crops[0, index]
        pred = predict(run, model, img[None].to(run.device), mask.shape, channels, args)[0]
        for row, x in zip(rows, (visible(img, args.show), colours[mask.long()].permute(2, 0, 1),
                                 colours[pred.cpu()].permute(2, 0, 1))):
            row.append(resize(pad_to(x, [max(x.shape[1:])] * 2, 0), [192, 192]))
    return [torch.stack(row) for row in rows]


def visible(img, show):
    """An image (C, H, W) as it is loaded, as RGB in [0, 1]: the channels `show`, or the first one in grey."""
    img = img[None].float() / (255 if img.dtype == torch.uint8 else 1)
    return to_rgb(img, img, show)[0].clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------
def main(args):
    """Trains on one data set with one encoder. Returns the result, which is also printed last and saved."""
    weights, vit, encoder, _ = open_encoder(args)
    run = Run(args, __file__)
    device, dtype = run.device, run.dtype
    train_set, val_set = (
        SceneMasks(split, args.in_chans) if args.data == "scenes" else
        MaskFolder(args.data, split, args.ignore, args.in_chans) for split in ("train", args.val_split))
    transform = functools.partial(train_transform, size=args.img_size, pixels=args.resize, scale=args.scale,
                                  ignore=args.ignore)
    crops = Pairs(train_set, transform, args.seed, args.skip_bad)
    val_crops = Pairs(val_set, functools.partial(eval_transform, pixels=args.resize))
    channels = run.channels(crops)
    synced = device.type == "cuda" and run.world_size > 1
    if not synced and args.batch_size < 2 * run.world_size * args.accum_iter:
        raise InputError("--batch_size must give each process at least 2 images at a time, for BatchNorm")

    torch.manual_seed(args.seed)                    # every process starts from the same weights
    model = Segmenter(len(train_set.classes), args.head, args.head_channels, args.taps, args.drop_path, args.freeze,
                      **vit)
    if weights is not None:
        model.load_state_dict(weights, strict=False)    # new: the head, biases and scales
    if synced:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run.resume(crops, model, optimizer, scaler, num_steps=args.num_steps, encoder=encoder, classes=train_set.classes)
    if args.compile:
        model.compile()
    # On CPUs: sums in the same order in every step, also the first of a resumed run (else DDP reorders them after it)
    net = DistributedDataParallel(model, find_unused_parameters=device.type == "cpu") if run.world_size > 1 else model

    result = None
    for epoch in run.epochs():
        model.train()
        for step in run.steps():
            lr = learning_rate(step, args)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            for part, (imgs, masks) in enumerate(run.parts()):              # also seeds dropout and drop path
                net.require_backward_grad_sync = part == args.accum_iter - 1    # all-reduce once, after the last part
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    outputs = net(normalize(imgs, *channels))
                loss = segmentation_loss(outputs, masks, args.ignore)
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

        due = epoch == run.num_epochs - 1 or (epoch + 1) % args.eval_epochs == 0
        result = evaluate(run, model, val_crops, channels, args) if due else None
        run.end_epoch(**(result[0] if result else {}))
    means, iou = result or evaluate(run, model, val_crops, channels, args)      # of a run that was finished before
    run.finish()
    if run.rank == 0:
        save_picture(picture(run, model, val_crops, channels, args), run.output / "predictions.png")
    iou = [None if math.isnan(value) else round(value, 2) for value in iou.tolist()]    # NaN: not there, not predicted
    return run.report({**{name: round(value, 2) for name, value in means.items()}, "images": len(val_set),
                       "head": args.head, "freeze": args.freeze, "ckpt": args.ckpt, "data": args.data,
                       "classes": dict(zip(val_set.classes, iou))})


if __name__ == "__main__":
    launch(main, get_args)
