"""What the five scripts share: the Vision Transformer, the data loader, and small tools for runs that are left alone.
Nothing here knows a pre-training method.

The ViT is the plain one of Dosovitskiy et al. (arXiv:2010.11929) in MAE's variant: fixed sin-cos positions, LayerNorm
with eps 1e-6, exact GELU, and the state-dict names of the public MAE checkpoints (and of timm).
The loader hands out uint8 crops; what is random in one depends on (seed, epoch, index) alone, so neither the number of
workers nor the number of processes changes what is trained on.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None


class InputError(ValueError):
    """Bad input: one line that says what is wrong and what to do. The scripts print it and exit with code 2."""

    def __str__(self):
        return super().__str__().splitlines()[-1].split("InputError: ")[-1]   # a worker's arrives inside its traceback


# ---------------------------------------------------------------------------------------------------------------------
# Vision Transformer
# ---------------------------------------------------------------------------------------------------------------------
VIT_SIZES = {
    "vit_micro": dict(patch_size=16, embed_dim=128, depth=4, num_heads=2),     # ours, for laptops
    "vit_tiny": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),     # DeiT's
    "vit_small": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),    # DeiT's
    "vit_base": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "vit_huge": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
}
ENCODER_PARTS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")  # how an encoder's weights are named


def check_vit(img_size, patch_size, embed_dim, num_heads):
    """Raises InputError where a ViT cannot have these sizes."""
    if patch_size < 1 or any(n % patch_size or n < 1 for n in pair(img_size)):
        raise InputError(f"an image of {'×'.join(map(str, pair(img_size)))} pixels is not a whole number of patches of "
                         f"{patch_size}: change --img_size or --patch_size")
    if embed_dim % num_heads or embed_dim % 4:
        raise InputError(f"a width of {embed_dim} must be divisible by 4 (positions) and by the {num_heads} heads")


def pair(size):
    """Image size as (height, width) in pixels, from one number (square) or a sequence of 1 or 2. Else InputError."""
    size = (size,) if isinstance(size, int) else tuple(size)
    if len(size) not in (1, 2):
        raise InputError(f"an image size is one number or two, not {len(size)}")
    return (size[0], size[-1])


def sincos_pos_embed(dim, grid_size):
    """Fixed 2-D sin-cos position embedding, one row a patch in raster order: (rows·columns, dim), float32.

    The first half of the dims encodes the column, the second half the row; each half is [sin | cos] of the position
    times 10000^(-i/(dim/4)), i = 0 … dim/4 - 1, computed in float64 (MAE, Appendix A.1, as released).
    """
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid_size)
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    column_row = torch.cartesian_prod(rows, columns).flip(1)                    # (L, 2)
    angle = column_row[:, :, None] * omega                                      # (L, 2, dim/4)
    return torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1).float()


def init_linear(module):
    """Xavier-uniform weights (qkv as one matrix) and zero biases for a Linear; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def attention(q, k, v, dropout=0.0, mask=None):
    """softmax(q kᵀ / √d) v with dropout on the probabilities; q, k, v and the result are (N, heads, L, d).
    `mask` broadcasts to (N, heads, L, L) and is false where a query (third axis) must not see a key (fourth)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:     # there the fused kernel was 1.2 to 3 times slower
        attn = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        attn = (attn if mask is None else attn.masked_fill(~mask, -math.inf)).softmax(dim=-1)
        return F.dropout(attn, dropout, training=dropout > 0) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


@torch.compiler.disable    # compiled, it would be made anew for every list of lengths
def attention_by_image(q, k, v, lengths):
    """Attention within each image of a ragged batch: q, k, v and the result are (heads, T, d), the T tokens of all
    images one after another; `lengths` (N,) says how many each has. For CPUs, whose time is in the arithmetic."""
    images = zip(*(x.split(lengths.tolist(), dim=1) for x in (q, k, v)))
    return torch.cat([attention(q, k, v) for q, k, v in images], dim=1)


def attention_padded(q, k, v, inside, slots):
    """The same in few large kernels: images padded to one length. `inside` (N, length) says which tokens are an
    image's, `slots` (T,) where these are in the flattened `inside`."""
    q, k, v = (x.new_zeros(len(x), inside.numel(), x.shape[2]).index_copy(1, slots, x).unflatten(1, inside.shape)
               for x in (q, k, v))                                      # (heads, N, length, d)
    return attention(q, k, v, mask=inside[:, None]).flatten(1, 2).index_select(1, slots)


def ragged_attention(q, k, v, lengths, inside, slots):
    """By image on a CPU, but padded where images are short and calls cost more than arithmetic, and elsewhere;
    arguments and result as there."""
    by_image = q.is_cpu and inside.shape[1] > 100
    return attention_by_image(q, k, v, lengths) if by_image else attention_padded(q, k, v, inside, slots)


class PatchEmbed(nn.Module):
    """Linear embedding of patches, kept as a Conv2d for its public name and shape, (D, 3, P, P)."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, x):
        """Images (N, 3, H, W), or any subset of their patches as vectors (N, n, P·P·3), to tokens (N, n, D)."""
        if x.dim() == 4:
            return self.proj(x).flatten(2).transpose(1, 2)
        return F.linear(x, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)  # vectors: channel last


class Attention(nn.Module):
    """Multi-head self-attention; `attn_drop` is the dropout on its probabilities in training."""

    def __init__(self, dim, num_heads, attn_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, L, D = x.shape
        q, k, v = self.qkv(x).reshape(N, L, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        x = attention(q, k, v, self.attn_drop if self.training else 0.0)        # (N, heads, L, D/heads)
        return self.proj(x.transpose(1, 2).reshape(N, L, D))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block; `drop_path` skips a whole branch for an image with that probability in training."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, attn_drop=0.0, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))                        # (N, L, D)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """The encoder: patches + position → cls token prepended → blocks → norm.

    Arguments: `img_size` in pixels, a number or (height, width), divisible by `patch_size`; `drop_path` is the rate of
    the last block, rising linearly from 0 at the first. Raises InputError for sizes that don't fit.
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 drop_path=0.0, attn_drop=0.0):
        super().__init__()
        check_vit(img_size, patch_size, embed_dim, num_heads)
        self.patch_size = patch_size
        self.grid_size = tuple(n // patch_size for n in pair(img_size))         # patches down and across
        self.num_patches = math.prod(self.grid_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        position = sincos_pos_embed(embed_dim, self.grid_size)
        self.pos_embed = nn.Parameter(F.pad(position, (0, 0, 1, 0))[None], requires_grad=False)  # cls: a zero row
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, attn_drop, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_linear)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)

    def forward_features(self, imgs):
        """Images (N, 3, H, W) to all tokens after the last norm, cls first: (N, 1 + L, D)."""
        x = self.patch_embed(imgs)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, imgs, pool="cls"):
        """One vector an image, (N, D): the cls token, or the mean of the patch tokens (`pool="avg"`)."""
        x = self.forward_features(imgs)
        return x[:, 0] if pool == "cls" else x[:, 1:].mean(dim=1)

    def encoder_state_dict(self):
        """The encoder's part of the state dict, under the public names: what fine-tuning needs of any method."""
        return {name: value for name, value in self.state_dict().items() if name.startswith(ENCODER_PARTS)}


# ---------------------------------------------------------------------------------------------------------------------
# Data: sources of (RGB PIL image, label)
# ---------------------------------------------------------------------------------------------------------------------
IMAGENET_MEAN = (0.485, 0.456, 0.406)   # of the channels R, G, B in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)

# name: (class in torchvision.datasets, its keyword for the split, splits to pre-train, to train, and to evaluate on)
TORCHVISION_DATASETS = {
    "cifar10": ("CIFAR10", "train", [True], [True], False),
    "cifar100": ("CIFAR100", "train", [True], [True], False),
    "stl10": ("STL10", "split", ["train+unlabeled"], ["train"], "test"),
    "flowers102": ("Flowers102", "split", ["train", "val"], ["train", "val"], "test"),
    "food101": ("Food101", "split", ["train"], ["train"], "test"),
    "imagenette": ("Imagenette", "split", ["train"], ["train"], "val"),
    "oxford_iiit_pet": ("OxfordIIITPet", "split", ["trainval"], ["trainval"], "test"),
    "dtd": ("DTD", "split", ["train", "val"], ["train", "val"], "test"),
    "fgvc_aircraft": ("FGVCAircraft", "split", ["trainval"], ["trainval"], "test"),
}


def load_dataset(data, split, data_root="data"):
    """Opens a data set of (RGB PIL image, label) pairs; the label is -1 where there is none.

    `data` is "shapes", a name in TORCHVISION_DATASETS (downloaded into `data_root`), or a folder: with train/ and val/,
    with class folders, or flat. `split` is "pretrain" (labels not needed), "train" or "val". The result's `classes` is
    the list of class names, None where images are unlabelled. Raises InputError.
    """
    if data == "shapes":
        return Shapes(split)
    if data in TORCHVISION_DATASETS:
        return NamedDataset(data, split, data_root)
    if not os.path.isdir(data):
        raise InputError(f"no data at '{data}': point --data at a folder of your images, or name a data set (shapes, "
                         f"{', '.join(TORCHVISION_DATASETS)}), or try --demo, which needs none")
    train, val = os.path.join(data, "train"), os.path.join(data, "val")
    if split == "val":
        if not os.path.isdir(val):
            raise InputError(f"'{data}' has no folder val/: evaluation needs train/CLASS/*.jpg and val/CLASS/*.jpg")
        return FolderDataset(val)
    if os.path.isdir(train):    # a split, unless it is one class of several: those hold no folders
        alone = not any(entry.is_dir() and entry.name != "train" for entry in os.scandir(data))
        if alone or os.path.isdir(val) or any(entry.is_dir() for entry in os.scandir(train)):
            return FolderDataset(train)
    return FolderDataset(data)


def load_rgb(path):
    """Reads an image file as an upright 8-bit RGB PIL image: greyscale, palette, CMYK, alpha (dropped) and EXIF
    orientation are dealt with. Raises InputError, with the path, for a broken file and for 16- and 32-bit greyscale."""
    try:
        if not os.path.isfile(path):    # a pipe, say, would be waited for
            raise ValueError("no such file, or no regular one")
        with Image.open(path) as img:
            if img.mode[0] in "IF":     # a plain conversion clamps these to 255: an image all white
                raise ValueError(f"more than 8 bits a pixel (mode {img.mode}); rescale to 8 bits as suits your images")
            turn = UPRIGHT.get(exif_orientation(img))
            img.load()
            if img.mode != "RGB" or "transparency" in img.info:     # convert() would copy what is RGB
                img = (img.convert("RGBA") if "transparency" in img.info else img).convert("RGB")
            return img if turn is None else img.transpose(turn)
    except Exception as error:      # what Pillow raises depends on what is wrong
        raise InputError(f"{str(path)!r} cannot be used as an image: {error!r}") from error


UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def exif_orientation(img):
    """The EXIF tag; None without one, or where the EXIF data is broken (Pillow's exif_transpose would raise there)."""
    try:
        return img.getexif().get(0x0112)
    except Exception:
        return None


def refuse(error):
    """For os.walk, which would leave out a folder that it may not list."""
    raise InputError(f"{error.filename!r} cannot be listed: {error.strerror}") from error


def leads_back(folder, name):
    """Whether `name` in a folder is a link to that folder itself or to one above it: followed, it would never end."""
    path = os.path.join(folder, name)
    real = os.path.join(os.path.realpath(path), "")
    return os.path.islink(path) and os.path.join(os.path.realpath(folder), "").startswith(real)


def inventory(source):
    """What a run trains on, for its checkpoints: the number of images and, of files, a hash of their names in order."""
    names = b"\n".join(path[len(source.root):] for path in getattr(source, "paths", []))
    return f"{len(source)}" + (f" ({hashlib.sha256(names).hexdigest()[:12]})" if names else "")


class FolderDataset(Dataset):
    """Every image below `root`, but hidden ones and reconstruction.png, a run's own. Its class is the folder of `root`
    that it lies in; if some image lies in none (`stray` is the first of them), the whole set is unlabelled. Raises
    InputError where there is no image."""

    def __init__(self, root):
        found = []      # (path, the folder of root that it is below, "." for root itself)
        for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
            subfolders[:] = [name for name in subfolders if name[0] != "." and not leads_back(folder, name)]
            top = os.path.relpath(folder, root).split(os.sep)[0]
            found += [(os.path.join(folder, name), top) for name in names
                      if name.lower().endswith(IMG_EXTENSIONS) and name[0] != "." and name != "reconstruction.png"]
        found.sort()
        if not found:
            raise InputError(f"no image below '{root}' (looked for {' '.join(IMG_EXTENSIONS)})")
        self.stray = next((path for path, top in found if top == "."), None)
        self.classes = sorted({top for _, top in found}) if self.stray is None else None
        numbers = {name: i for i, name in enumerate(self.classes or [])}
        self.labels = np.array([numbers[top] if numbers else -1 for _, top in found])
        self.root = os.fsencode(root)
        self.paths = np.array([os.fsencode(path) for path, _ in found])     # workers share its memory, not a list's

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return load_rgb(os.fsdecode(self.paths[index])), int(self.labels[index])


class NamedDataset(Dataset):
    """A data set of torchvision, downloaded into `root` where it is not there yet (under torchrun by one process)."""

    def __init__(self, name, split, root):
        class_name, keyword, pretrain_splits, train_splits, val_split = TORCHVISION_DATASETS[name]
        splits = {"pretrain": pretrain_splits, "train": train_splits, "val": [val_split]}[split]
        if dist.is_initialized() and int(os.environ.get("LOCAL_RANK", 0)) > 0:
            dist.barrier()      # the first process of each machine downloads, the others wait …
        try:
            dataset = getattr(torchvision.datasets, class_name)
            parts = [dataset(root, download=True, **{keyword: part}) for part in splits]
        except (OSError, RuntimeError, ImportError) as error:   # ImportError: flowers102 is read with scipy
            raise InputError(f"{name}: not in '{root}', and could not be downloaded: {error!r}") from error
        finally:
            if dist.is_initialized() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
                dist.barrier()  # … until it is done
        self.name, self.images = name, ConcatDataset(parts)
        self.classes = None if split == "pretrain" else list(parts[0].classes)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            img, label = self.images[index]
            return img.convert("RGB"), int(label)
        except Exception as error:      # a broken file: what is raised depends on the data set
            raise InputError(f"image {index} of {self.name} cannot be used: {error!r}") from error


class Shapes(Dataset):
    """A small labelled data set that is drawn, not downloaded: 36×36 pixels, the same on every machine.

    An image shows one big shape under coloured, uneven light, before and behind small clutter. Its class is the pattern
    on the shape. Outline, place, size, tilt, wavelength, phase, contrast, light and clutter are all random, so that no
    pixel and no colour gives the class away: one has to see how neighbours relate.
    """
    classes = ["plain", "rows", "columns", "diagonals", "checks", "dots", "rings", "grid"]

    def __init__(self, split):
        count, stream = (2000, 1) if split == "val" else (6000, 0)
        randoms = [np.random.RandomState([stream, i]) for i in range(count)]    # numpy has frozen this one's numbers
        self.labels = np.array([random.randint(len(self.classes)) for random in randoms])
        self.images = np.stack([draw_shape(self.classes[label], random) for label, random in zip(self.labels, randoms)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), int(self.labels[index])


def draw_shape(pattern, random, size=36):
    """One image of Shapes, (size, size, 3) uint8, from the pattern's name and a numpy RandomState."""
    y, x = np.mgrid[:size, :size].astype(np.float64)

    def outline(radius, margin):
        """How much of each pixel a random shape of this radius covers; also its centre."""
        cx, cy = random.uniform(margin, size - margin, 2)
        tilt = random.uniform(-0.2, 0.2)
        u, v = (x - cx) * np.cos(tilt) + (y - cy) * np.sin(tilt), (y - cy) * np.cos(tilt) - (x - cx) * np.sin(tilt)
        distance = (np.hypot(u, v),                                             # disc
                    1.15 * np.maximum(abs(u), abs(v)),                          # square
                    0.85 * (abs(u) + abs(v)),                                   # diamond
                    1.6 * np.maximum(v, 0.87 * abs(u) - 0.5 * v))[random.randint(4)]    # triangle
        return np.clip(radius - distance + 0.5, 0, 1), cx, cy

    def clutter(surface):
        for _ in range(random.randint(3)):
            cover, _, _ = outline(random.uniform(1.5, 4), 0)
            surface = surface * (1 - cover) + random.uniform(0.4, 1) * cover
        return surface

    surface = clutter(np.full((size, size), random.uniform(0.4, 1)))            # what share of the light comes back
    radius = random.uniform(12, 20)
    cover, cx, cy = outline(radius, 0.7 * radius)

    tilt, a, b, wavelength = *random.uniform((-0.15, 0, 0), (0.15, 6.28, 6.28)), random.uniform(5, 9)
    u = (x * np.cos(tilt) + y * np.sin(tilt)) * 6.28 / wavelength
    v = (y * np.cos(tilt) - x * np.sin(tilt)) * 6.28 / wavelength
    wave = {"plain": lambda: 0 * x,
            "rows": lambda: np.sin(v + a),
            "columns": lambda: np.sin(u + a),
            "diagonals": lambda: np.sin((u + random.choice([-1, 1]) * v) * 0.707 + a),
            "checks": lambda: 2 * np.sin(u + a) * np.sin(v + b),
            "dots": lambda: np.cos(u + a) + np.cos(v + b) - 0.9,
            "rings": lambda: np.sin(np.hypot(x - cx, y - cy) * 6.28 / wavelength + a),
            "grid": lambda: np.maximum(np.cos(u + a), np.cos(v + b)) - 0.75}[pattern]()
    dark = random.uniform(0.4, 0.9) * (1 - np.clip(0.5 + 2 * wave, 0, 1))       # sharp-edged stripes, not sines
    surface = surface * (1 - cover) + random.uniform(0.5, 1) * (1 - dark) * cover
    surface = clutter(surface)

    hat = np.clip(1 - abs(np.linspace(0, 3, size)[:, None] - np.arange(4)), 0, 1)       # bilinear: (size, 4)
    tint = random.uniform(0.2, 1, (3, 1, 1))
    light = hat @ random.uniform(0.2, 1, (3, 4, 4)) @ hat.T * tint / tint.max()         # (3, size, size)
    return np.rint(255 * surface * light).astype(np.uint8).transpose(1, 2, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Data: crops, batches, loader
# ---------------------------------------------------------------------------------------------------------------------
def train_transform(img_size, scale):
    """RandomResizedCrop (bicubic, antialiased) of `scale` of the area, and flip; PIL image to uint8 (3, H, W)."""
    return functools.partial(crop_and_flip, size=pair(img_size), scale=scale)


def crop_and_flip(img, size, scale):
    """What `train_transform` does to an image. Resized as a tensor: torch's kernel for bytes took a quarter of
    Pillow's time on an AMD EPYC (on 400 photographs the two differed by 0.04 of 256 levels; in none by over 0.4)."""
    top, left, height, width = v2.RandomResizedCrop.get_params(img, scale, (3 / 4, 4 / 3))
    x = v2.functional.pil_to_tensor(img.crop((left, top, left + width, top + height)))[None]
    x = F.interpolate(x, size, mode="bicubic", antialias=True)[0]
    return x.flip(2) if torch.rand(()) < 0.5 else x


def eval_transform(img_size):
    """Resize to 256/224 of the size (above 224: to the size itself), bicubic, and centre crop; to uint8 (3, H, W).
    Where the size isn't square, the image's shorter side is resized by the crop's longer one."""
    longer = max(pair(img_size))
    return v2.Compose([v2.Resize(longer * 256 // 224 if longer <= 224 else longer, InterpolationMode.BICUBIC),
                       v2.CenterCrop(pair(img_size)), v2.PILToTensor()])


def seed_from(*numbers):
    """One 63-bit seed from several integers ≥ 0, such as (seed, epoch, index), well mixed."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)


class Crops(Dataset):
    """Item (epoch, index): image `index` of a source, transformed at random as (seed, epoch, index) alone decides, and
    its label; then what was skipped, {reason: epoch}. An image that can't be read is replaced by the next that can, its
    label too. Raises InputError where more than `skip_bad` in a row can't; None: none may be skipped.
    """

    def __init__(self, source, transform, seed=0, skip_bad=None):
        self.source, self.transform, self.seed, self.skip_bad = source, transform, seed, skip_bad

    def __len__(self):
        return len(self.source)

    def __getitem__(self, item):
        epoch, index = item
        skipped = {}
        while True:
            try:
                img, label = self.source[(index + len(skipped)) % len(self)]
                break
            except InputError as error:
                skipped[str(error)] = epoch
                self.check(skipped)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(self.seed, *item))
            return self.transform(img), label, skipped

    def check(self, skipped):
        """Raises InputError, with the last reason, where more images were skipped than may be, or all."""
        if len(skipped) > min(self.skip_bad or 0, len(self) - 1):
            advice = "" if self.skip_bad is None else f"; more such files than --skip_bad {self.skip_bad} allows"
            raise InputError(list(skipped)[-1] + (advice if len(skipped) < len(self) else "; no other is left"))

    def merge(self, skipped, *others):
        """Enters what other processes have skipped into `skipped`, and checks the whole."""
        for other in others:
            skipped.update({**other, **skipped})
        self.check(skipped)


class GlobalBatches:
    """This process's micro-batches of a whole run, as lists of (epoch, index); the last images of an epoch that fill no
    batch are left out, and each epoch is shuffled anew.

    A global batch of `batch_size` images belongs to one step; it is cut into `accum_iter` parts, and each part among
    the processes, so that what a step trains on doesn't depend on their number. `start_step` is where a run goes on.
    Raises InputError where the images don't fill one batch.
    """

    def __init__(self, num_images, batch_size, epochs, accum_iter=1, rank=0, world_size=1, seed=0, start_step=0):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.accum_iter, self.rank, self.world_size = accum_iter, rank, world_size
        self.steps_per_epoch = num_images // batch_size
        self.steps = range(start_step, epochs * self.steps_per_epoch)
        if not self.steps_per_epoch:
            raise InputError(f"{num_images} images are fewer than one batch: give --batch_size {num_images} or less")

    def __len__(self):
        return len(self.steps) * self.accum_iter

    def __iter__(self):
        share = self.batch_size // (self.world_size * self.accum_iter)
        order = None
        for step in self.steps:
            epoch, i = divmod(step, self.steps_per_epoch)
            if order is None or i == 0:
                generator = torch.Generator().manual_seed(seed_from(self.seed, epoch))
                order = torch.randperm(self.num_images, generator=generator)
            for part in range(self.accum_iter):
                first = i * self.batch_size + (part * self.world_size + self.rank) * share
                yield [(epoch, index) for index in order[first:first + share].tolist()]


def eval_batches(num_images, batch_size, rank=0, world_size=1):
    """This process's share of a data set, in order, as lists of (0, index): every image is in exactly one process's."""
    mine = range(rank, num_images, world_size)
    return [[(0, index) for index in mine[i:i + batch_size]] for i in range(0, len(mine), batch_size)]


def make_loader(crops, batches, num_workers, device, skipped=None):
    """Iterates once over (imgs uint8 (B, 3, H, W), labels (B,)), for `batches` of (epoch, index).

    What of `crops` can't be read is entered into `skipped`, {reason: epoch of the first time}, when its batch comes up,
    so that it doesn't depend on how far workers are ahead. Raises InputError where there is more than may be skipped.
    `num_workers` None: this process's share of the cores.
    """
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_workers = min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    skipped = {} if skipped is None else skipped
    context = "fork" if num_workers and sys.platform == "linux" else None   # a fork server would not outlive a signal
    loader = iter(DataLoader(crops, batch_sampler=batches, num_workers=num_workers, collate_fn=collate,
                             pin_memory=device.type == "cuda", worker_init_fn=leave_signals_alone,
                             multiprocessing_context=context))
    if num_workers and hasattr(signal, "SIGCHLD"):      # else torch raises a worker's death in the midst of anything;
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # next() asks for it as well, every 5 s that it waits
    while True:
        try:
            imgs, labels, news = next(loader)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise OSError(f"a loader process died; if memory was short, lower --num_workers ({error})") from error
        for reason in news.keys() - skipped.keys():
            tqdm.write(f"skipped: {reason}", file=sys.stderr)
        crops.merge(skipped, news)
        yield imgs, labels


def collate(items):
    """Items of Crops as one batch: imgs, labels, and all that was skipped."""
    return *default_collate([item[:2] for item in items]), {k: v for item in items for k, v in item[2].items()}


def leave_signals_alone(worker):
    """In a loader's worker: signals, which are often sent to all processes of a job, are left to the main process,
    which needs its workers until it has saved. Its own SIGTERM ends them."""
    while held:
        os.close(held.popitem()[1])         # the output folder stays the main process's alone
    for name in {"SIGINT", "SIGHUP", "SIGUSR1"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):      # else (macOS) a SIGTERM to all processes ends workers
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=exit_with, args=[os.getppid()], daemon=True).start()


def exit_with(parent):
    """Waits for a SIGTERM from the process `parent`, and exits."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


class Normalize(nn.Module):
    """uint8 images, on their device, to floats with zero mean and unit variance by ImageNet's statistics; and back."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, imgs):
        return (imgs.float() / 255 - self.mean) / self.std

    def inverse(self, imgs):
        """Normalised images back to [0, 1]."""
        return imgs * self.std + self.mean


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are left alone: arguments, files, signals, processes
# ---------------------------------------------------------------------------------------------------------------------
def number(kind, interval):
    """An argparse type: an int or a float (`kind`) in an interval such as "[1, inf)" or "(0, 1]"."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text):
        value = kind(text)
        if low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]":
            return value
        raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
    parse.__name__ = kind.__name__      # for argparse's "invalid int value"
    return parse


held = {}       # the output folders that this process has taken: their descriptors


def check_output(output, size, args):
    """Makes the folder and takes it, until this process ends. Raises InputError where nothing can be written to it,
    where checkpoints of `size` bytes have no room, a new one beside the last, and where another run has the folder: two
    would spoil each other's checkpoints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        raise InputError("WORLD_SIZE is set, but no process group is there: start several processes with torchrun")
    init_from = getattr(args, "init_from", None)
    if not args.output_dir or init_from == "":
        raise InputError("--output_dir and --init_from must not be empty")
    if init_from and os.path.realpath(os.path.dirname(init_from) or ".") == os.path.realpath(output):
        raise InputError("--init_from starts a new run: give another --output_dir than the one that it lies in")
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise InputError(f"cannot write into --output_dir {output}: {error.strerror}") from error
    if fcntl and output.resolve() not in held and not take(output):
        raise InputError(f"another run is writing into --output_dir {output}: stop it, or give another folder")
    for name in ("last.pt.tmp", "encoder.pt.tmp"):      # of a run that was killed while saving
        (output / name).unlink(missing_ok=True)
    free, room = shutil.disk_usage(output).free / 1e9, size / 1e9
    room *= 1 if (output / "last.pt").exists() and not args.no_resume else 2
    if free < room:
        raise InputError(f"--output_dir {output} has {free:.3g} GB free, and this run needs {room:.3g} for checkpoints")


def take(folder, seconds=15):
    """Locks a folder for this process; False where another has it and keeps it for so many seconds: one that was told
    to stop may still be saving."""
    descriptor = os.open(folder, os.O_RDONLY)
    until = time.time() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.time() > until:
                os.close(descriptor)
                return False
            time.sleep(0.1)
            continue
        except OSError:     # a disk that knows no locks
            pass
        held[folder.resolve()] = descriptor
        return True


def save(obj, path):
    """Saves beside `path`, down to the disk, and moves it there: a write that fails or is cut off costs nothing.
    Raises OSError."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
        if fcntl:                               # not on Windows: the folder's entry too
            folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:    # RuntimeError: torch's word for a full disk
        try:
            os.unlink(f"{path}.tmp")
        except OSError:
            pass
        reason = getattr(error, "strerror", None) or f"is the disk full? {str(error).splitlines()[0]}"
        older = "; the one before is still whole" if os.path.exists(path) else ""
        raise OSError(f"{path} could not be written ({reason}){older}") from error


def append(line, path):
    """Adds a line to a text file, down to the disk."""
    with open(path, "a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def load(path, *needed):
    """Reads a checkpoint, a dict with at least the keys `needed`: tensors, plain containers and argparse.Namespace;
    what would run code is refused. Raises InputError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no checkpoint at '{path}'") from None
    except Exception as error:      # what torch.load raises depends on what the file is instead
        raise InputError(f"'{path}' is no checkpoint, is cut short, or holds more than tensors and plain containers "
                         f"({type(error).__name__}); it was not loaded") from error
    missing = [key for key in needed if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise InputError(f"'{path}' is no checkpoint to go on from: it has no {', '.join(missing)}")
    weights = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else {}
    if not isinstance(weights, dict) or not all(
            isinstance(name, str) and (torch.is_tensor(value) or not name.startswith(ENCODER_PARTS))
            for name, value in weights.items()):
        raise InputError(f"'{path}': its model is no dict of tensors by name")
    if not all(value.isfinite().all() for value in weights.values() if torch.is_tensor(value)):
        raise InputError(f"'{path}' holds weights that are not finite: it is of a run that diverged")
    return checkpoint


def load_weights(path, model):
    """Starts a model from a checkpoint's weights: all that have its names, at least a whole encoder. The positions are
    fixed and the model's own, so the image size may differ. Raises InputError where the encoder isn't whole or a shape
    differs."""
    checkpoint = load(path)
    weights = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else {}
    own = {name: value for name, value in model.state_dict().items() if "pos_embed" not in name}
    for name, value in own.items():
        if name.startswith(ENCODER_PARTS) and name not in weights:
            raise InputError(f"'{path}' lacks the encoder's {name}")
        if name in weights and weights[name].shape != value.shape:
            raise InputError(f"'{path}': {name} has shape {tuple(weights[name].shape)}, here {tuple(value.shape)}; an "
                             f"encoder.pt has the encoder alone")
    taken = {name: weights[name] for name in own if name in weights}
    model.load_state_dict(taken, strict=False)
    if os.environ.get("RANK", "0") == "0":
        print(f"weights from {path}: {len(taken)} tensors; {len(own) - len(taken)} that it lacks start anew, "
              f"{len(weights) - len(taken)} that it has are not needed (fixed positions, say)")


def restore(path, checkpoint, **parts):
    """Loads each part's state, and takes it out of the checkpoint: not to be held twice. Raises InputError."""
    for name, part in parts.items():
        try:
            part.load_state_dict(checkpoint.pop(name))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:      # what is raised depends on what is wrong
            raise InputError(f"'{path}': its {name} does not fit ({type(error).__name__}); give another --output_dir, "
                             f"or --no_resume to start over") from error


def gather(obj):
    """The list of all processes' `obj`, on every process."""
    objs = [obj] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(objs, obj)
    return objs


def tidy_output(output, step, steps_per_epoch):
    """Prepares an output folder for a run that goes on at `step`: the log keeps its whole lines of the epochs before.
    For a new run, at step 0, what an old one left is kept under names of its own: last.1.pt, log.1.jsonl and so on."""
    log = output / "log.jsonl"
    if step == 0:
        old = [path for path in (log, *(output / name for name in ("encoder.pt", "result.json", "last.pt")))
               if path.exists() and path.stat().st_size]
        kept = lambda path, number: path.with_suffix(f".{number}{path.suffix}")
        number = next(i for i in itertools.count(1) if not any(kept(path, i).exists() for path in old))
        for path in old:
            os.replace(path, kept(path, number))
    if log.exists():
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        (output / "log.tmp").write_text("".join(lines[:step // steps_per_epoch]))
        os.replace(output / "log.tmp", log)


class SaveRequests:
    """Says after each step whether to save: on SIGTERM and SIGUSR1 (preemption), SIGINT (Ctrl-C) and SIGHUP (a terminal
    that closes; not under nohup), and every `minutes`.

    All processes get the same answer, what one of them wished for a step earlier: it travels, between CPUs, while the
    next step computes, and nobody waits. A second Ctrl-C ends the process at once, but not under torchrun, which may
    send one twice.
    """

    def __init__(self, rank, minutes):
        self.rank, self.seconds, self.caught = rank, 60 * minutes, []
        self.due = time.time() + self.seconds
        self.answer, self.travelling = torch.tensor(0), None
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)        # Windows has the first two
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self.note)

    def note(self, number, frame):
        self.caught.append(128 + number)
        if self.rank == 0:
            with contextlib.suppress(OSError):      # no terminal any more; not print(), which it may have interrupted
                os.write(2, f"\n{signal.Signals(number).name}: to be saved after this step\n".encode())
        if number == signal.SIGINT and "RANK" not in os.environ:
            signal.signal(number, signal.SIG_DFL)

    def poll(self):
        """0: go on; 1: save; more: save and exit with this code. For all processes to call after every step."""
        wish = max(self.caught, default=0)
        if self.rank == 0 and time.time() > self.due:
            wish, self.due = max(wish, 1), time.time() + self.seconds
        if not dist.is_initialized():
            return wish
        if self.travelling:
            self.travelling.wait()
        agreed, self.answer = self.answer.item(), torch.tensor(wish)
        self.travelling = dist.all_reduce(self.answer, dist.ReduceOp.MAX, async_op=True)
        return agreed


def check_finite(window, model, scaler, dtype, clip_grad):
    """Raises FloatingPointError where a loss, a gradient norm or a weight is not finite.

    `window` holds (step, learning rate, statistics) of the last steps, of which the first is the loss and the last the
    gradient norm; reading them is the one wait for the device. In float16 gradients may overflow: the scaler then skips
    the step and halves its scale, but below 1 something else is wrong.
    """
    steps, rates, rows = zip(*window)
    rows = torch.stack(rows).tolist()
    weights = nn.utils.get_total_norm([x for x in model.state_dict().values() if x.is_floating_point()]).item()
    may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1
    for step, lr, (loss, *_, norm) in zip(steps, rates, rows):
        fine = math.isfinite(loss) and (math.isfinite(norm) or may_overflow)
        if not fine or step == steps[-1] and not math.isfinite(weights):
            advice = {torch.float16: "--amp bf16 or --amp none", torch.bfloat16: "--amp none or "}.get(dtype, "")
            if dtype != torch.float16:
                advice += f"--clip_grad {clip_grad / 10 if clip_grad else 1:g}, or start over with a smaller --blr"
            raise FloatingPointError(
                f"not finite in step {step + 1}: loss {loss:g}, gradient norm {norm:g}, learning rate {lr:g} (norm of "
                f"the weights by now: {weights:g}). The last checkpoint, if any, is from before. Go on with {advice}")


def amp_dtype(choice, device):
    """The autocast type for `--amp`, None for none. "auto" asks for bf16 in hardware, not emulated; on MPS: none."""
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif choice == "auto":
        old = not hasattr(torch.cpu, "get_capabilities")                # before torch 2.11
        has = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()} if old else torch.cpu.get_capabilities()
        in_hardware = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))    # bf16: ARM's
        choice = "bf16" if device.type == "cpu" and in_hardware else "none"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[choice]
