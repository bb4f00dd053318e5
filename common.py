"""What the scripts share: the Vision Transformer and the data. Nothing here knows a pre-training method.

The ViT is the plain one of Dosovitskiy et al. (arXiv:2010.11929) in MAE's variant: fixed sin-cos positions, LayerNorm
with eps 1e-6, exact GELU, and the state-dict names of the public MAE checkpoints (and of timm).
Images become uint8 crops; what is random in one depends on (seed, epoch, index) alone, so neither the number of workers
nor the number of processes changes what is trained on.
"""
import contextlib
import datetime
import errno
import functools
import hashlib
import io
import math
import os
import stat
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import ConcatDataset, Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, v2

decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)      # to be dropped; Pillow, a fifth slower, reads the same


class InputError(ValueError):
    """Bad input: one line that says what is wrong and what to do. The scripts print it and exit with code 2."""

    def __str__(self):
        return super().__str__().splitlines()[-1].split("InputError: ")[-1]   # a worker's arrives inside its traceback


def env_number(name, default, least=0):
    """An integer from the environment, as torchrun sets it. Raises InputError."""
    text = os.environ.get(name, default)
    try:
        if int(text) >= least:
            return int(text)
    except ValueError:
        pass
    raise InputError(f"the environment has {name}={text}, which must be an integer ≥ {least}")


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
        raise InputError(f"an image size of {'×'.join(map(str, pair(img_size)))} pixels is not a whole number of "
                         f"patches of {patch_size}")
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
    `mask` broadcasts to (N, heads, L, L) and is false where a query (third axis) must not see a key (fourth), or else
    is added to the scores."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:     # the fused kernel was 1.2 to 3 times slower (AVX-512)
        attn = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        if mask is not None:
            attn = attn.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else attn + mask
        return F.dropout(attn.softmax(dim=-1), dropout, training=dropout > 0) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class PatchEmbed(nn.Module):
    """Linear embedding of patches, kept as a Conv2d for its public name and shape, (D, C, P, P)."""

    def __init__(self, patch_size, embed_dim, in_chans=3):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x):
        """Images (N, 3, H, W), or any subset of their patches as vectors (N, n, P·P·3), to tokens (N, n, D)."""
        if x.dim() == 4:
            return self.proj(x).flatten(2).transpose(1, 2)
        return F.linear(x, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)  # vectors: channel last


class Attention(nn.Module):
    """Multi-head self-attention; `attn_drop` is the dropout on its probabilities in training. `bias`: a module from the
    queries (N, heads, L, d) to what is added to the scores, broadcast to (N, heads, L, L)."""

    def __init__(self, dim, num_heads, attn_drop=0.0, bias=None):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.bias = bias
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, L, D = x.shape
        q, k, v = self.qkv(x).reshape(N, L, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        bias = None if self.bias is None else self.bias(q).to(q.dtype)
        x = attention(q, k, v, self.attn_drop if self.training else 0.0, bias)  # (N, heads, L, D/heads)
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
    """The encoder: patches → cls prepended → + position → blocks → norm.

    Arguments: `img_size` in pixels, a number or (height, width), divisible by `patch_size`; `drop_path` is the rate of
    the last block, rising linearly from 0 at the first. Raises InputError for sizes that don't fit. (Shapes are given
    for three channels.)
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 drop_path=0.0, attn_drop=0.0, in_chans=3):
        super().__init__()
        check_vit(img_size, patch_size, embed_dim, num_heads)
        self.patch_size = patch_size
        self.grid_size = tuple(n // patch_size for n in pair(img_size))         # patches down and across
        self.num_patches = math.prod(self.grid_size)
        self.in_chans = in_chans
        self.patch_embed = PatchEmbed(patch_size, embed_dim, in_chans)
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
# Data: sources of (image tensor (C, H, W), label)
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
IMAGENETTE = {"train": 9469, "val": 3925}       # images


def load_dataset(data, split, data_root="data", in_chans=3):
    """Opens a data set of (image, label) pairs: a tensor (in_chans, H, W), and -1 where there is no label.

    `data` is "shapes", a name in TORCHVISION_DATASETS (downloaded into `data_root`), or a folder: with train/ and val/,
    with class folders, or flat. `split` is "pretrain" (labels not needed), "train" or "val". The result's `classes` is
    the list of class names, None where images are unlabelled. Raises InputError.
    """
    if data == "shapes" or data in TORCHVISION_DATASETS:
        if in_chans != 3:
            raise InputError(f"'{data}' has RGB images, and in_chans is {in_chans}")
        return Shapes(split) if data == "shapes" else NamedDataset(data, split, data_root)
    if not os.path.isdir(data):
        raise InputError(f"no data at '{data}': it is neither a folder nor a data set (shapes, "
                         f"{', '.join(TORCHVISION_DATASETS)})")
    root, train, val = data, os.path.join(data, "train"), os.path.join(data, "val")
    if split == "val":
        root = val
        if not os.path.isdir(val):
            raise InputError(f"'{data}' has no folder val/: evaluation needs train/CLASS/*.jpg and val/CLASS/*.jpg")
    elif os.path.isdir(train):  # a split, unless it is one class of several: those hold no folders
        alone = not any(entry.is_dir() and entry.name != "train" for entry in os.scandir(data))
        parts = any(os.path.isdir(os.path.join(data, name)) for name in ("val", "test"))
        if alone or parts or any(entry.is_dir() for entry in os.scandir(train)):
            root = train
    return once_per_machine(lambda: FolderDataset(root, in_chans))


def once_per_machine(make):
    """What `make()` returns, on every process; under torchrun the first process of each machine calls it and sends the
    result to the others. Raises InputError where machines run different numbers of processes."""
    local_size = env_number("LOCAL_WORLD_SIZE", 1, least=1)
    if not dist.is_initialized():
        return make()
    size = dist.get_world_size()
    if local_size * env_number("GROUP_WORLD_SIZE", size // local_size) != size:
        raise InputError(f"{size} processes, and {local_size} on this machine: each machine must run as many")
    if local_size == 1:
        return make()
    group, _ = dist.new_subgroups(local_size, backend="gloo", timeout=datetime.timedelta(days=1))   # a download is slow
    found = [make() if group.rank() == 0 else None]
    dist.broadcast_object_list(found, group=group, group_src=0, device=torch.device("cpu"))
    dist.destroy_process_group(group)
    return found[0]


def load_image(path, in_chans=3):
    """Reads a file as an upright image (in_chans, H, W). Three channels: uint8 RGB, also from greyscale, palette, CMYK,
    alpha (dropped). One: greyscale files, of 8 bits as uint8, of more as float32. Any number: .npy arrays (H, W, C)
    or (H, W), uint8 as it is and other real types as float32. Raises InputError, with the path."""
    try:
        data = read(path)
        if path.lower().endswith(".npy"):
            return array_to_image(np.load(io.BytesIO(data), allow_pickle=False), in_chans)
        with Image.open(io.BytesIO(data)) as img:
            if in_chans == 3 and decode_jpeg and img.format in ("JPEG", "MPO"):
                with contextlib.suppress(Exception):        # broken, say: for Pillow to judge
                    if img.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                        return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), "RGB")    # libjpeg, no detours
            img.load()              # raises what is damaged. A second try, below, would return what was decoded so far
            with contextlib.suppress(Exception):            # broken EXIF data
                ImageOps.exif_transpose(img, in_place=True)
            tags = getattr(img, "tag_v2", {})
            sample_format, bits = tags.get(339, (1,))[0], tags.get(258, (8,))[0]
            if (sample_format, bits) in ((1, 32), (2, 8)):
                raise ValueError("a TIFF of unsigned 32-bit or signed 8-bit numbers, which Pillow misreads: use .npy")
            if in_chans == 1:
                img = img.convert("L") if img.mode in ("1", "P", "LA") else img
            elif img.mode[0] in "IF":   # a plain conversion clamps these to 255: an image all white
                raise ValueError(f"more than 8 bits a pixel (mode {img.mode}): only in_chans 1 reads such files")
            elif img.mode != "RGB" or "transparency" in img.info:
                img = (img.convert("RGBA") if "transparency" in img.info else img).convert("RGB")
            return array_to_image(np.array(img), in_chans)
    except Exception as error:      # what is raised depends on what is wrong; Pillow's has an address in it
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else repr(error)
        raise InputError(f"{str(path)!r} cannot be used as an image: {reason}") from error


def read(path):
    """A file's bytes. Errors that may pass (any but: no such file, no permission) get three more tries. Raises OSError,
    and ValueError where it is no regular file: reading a pipe, say, would hang."""
    for pause in (0.2, 1, 5, None):
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError("no regular file")
            with open(path, "rb") as file:
                return bytearray(file.read())
        except OSError as error:
            if pause is None or error.errno in (None, errno.ENOENT, errno.EACCES):
                raise
            time.sleep(pause)


def array_to_image(array, in_chans):
    """An array (H, W, C) or (H, W) as an image (C, H, W), uint8 or float32. Raises ValueError."""
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] != in_chans or not array.size:
        raise ValueError(f"an array {array.shape}, where (H, W, {in_chans}) is needed: in_chans is {in_chans}")
    if array.dtype.kind not in "buif":
        raise ValueError(f"an array of {array.dtype}, where real numbers are needed")
    array = array if array.dtype == np.uint8 else array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("an array with NaN or infinity")
    return torch.from_numpy(array).permute(2, 0, 1)


def refuse(error):
    """For os.walk, which would leave out a folder that it may not list."""
    raise InputError(f"{error.filename!r} cannot be listed: {error.strerror}") from error


def leads_back(folder, name):
    """Whether `name` in a folder is a link to that folder itself or to one above it: followed, it would never end."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):        # realpath, below, takes long
        return False
    return os.path.join(os.path.realpath(folder), "").startswith(os.path.join(os.path.realpath(path), ""))


def inventory(source):
    """What a run trains on, for its checkpoints: the number of images and, of files, a hash of their names in order."""
    if not hasattr(source, "paths"):
        return f"{len(source)}"
    digest, root = hashlib.sha256(), len(source.root)
    for i in range(0, len(source), 65536):
        names = [path[root:] for path in source.paths[i:i + 65536].tolist()]
        digest.update(b"\n" * (i > 0) + b"\n".join(names))
    return f"{len(source)} ({digest.hexdigest()[:12]})"


class ImageFiles(Dataset):
    """Images in files, all of one type, as `load_image` reads them; `paths` is an array of bytes."""

    def __init__(self, paths, in_chans):
        self.paths, self.in_chans = paths, in_chans     # an array, not a list: workers share its memory
        self.arrays = paths[0].lower().endswith(b".npy")
        self.first = self.dtype = None                  # of the first image that can be read
        for path in paths[:100] if in_chans != 3 or self.arrays else []:    # RGB files are all uint8
            with contextlib.suppress(InputError):
                self.first, self.dtype = os.fsdecode(path), load_image(os.fsdecode(path), in_chans).dtype
                break

    def __len__(self):
        return len(self.paths)

    def load(self, index):
        """Image `index` (in_chans, H, W). Raises InputError."""
        path = os.fsdecode(self.paths[index])
        img = load_image(path, self.in_chans)
        if self.dtype not in (None, img.dtype):     # 8 bits become 0 to 1, other values stay: one scale for all
            raise InputError(f"{path!r} is {img.dtype}, and {self.first!r} {self.dtype}: a folder has one type")
        return img


class FolderDataset(ImageFiles):
    """Every image below `root`, but hidden ones and reconstruction.png, a run's own; .npy arrays if there are none, or
    if `in_chans` is neither 1 nor 3. Its class is the folder of `root` that it lies in; if some image lies in none
    (`stray` is the first of them), the whole set is unlabelled. Raises InputError where there is no image."""

    def __init__(self, root, in_chans=3):
        root = os.fspath(root).rstrip("/" + os.sep) or os.sep
        self.root = os.fsencode(root)
        tell = env_number("RANK", 0) == 0
        if tell:
            print(f"listing {root} …", flush=True)
        extensions = IMG_EXTENSIONS if in_chans in (1, 3) else ()
        files = extensions and self.list_files(extensions)
        files = files or self.list_files((".npy",))
        if not files:
            raise InputError(f"no image of {in_chans} channel(s) below '{root}' (looked for "
                             f"{' '.join((*extensions, '.npy'))})")
        tops = [os.path.relpath(folder, root).split(os.sep)[0] for folder, _ in files]      # "." for root itself
        self.stray = min((os.fsdecode(paths[0]) for top, (_, paths) in zip(tops, files) if top == "."), default=None)
        self.classes = sorted(set(tops)) if self.stray is None else None
        numbers = {name: i for i, name in enumerate(self.classes or [])}
        self.labels = np.repeat([numbers.get(top, -1) for top in tops], [len(paths) for _, paths in files])
        paths = np.concatenate([paths for _, paths in files])
        if (paths[:-1] > paths[1:]).any():
            order = paths.argsort(kind="stable")
            paths, self.labels = paths[order], self.labels[order]
        super().__init__(paths, in_chans)
        if tell:
            classes = f"{len(self.classes)} classes" if self.classes else "no classes"
            print(f"{len(self.paths)} images, {classes}, in {root}", flush=True)

    def list_files(self, extensions):
        """All files with these extensions, as (folder, their sorted paths as an array of bytes) for each folder."""
        files = []
        for folder, subfolders, names in os.walk(os.fsdecode(self.root), onerror=refuse, followlinks=True):
            if {"train", "val"} <= {*subfolders}:
                raise InputError(f"'{folder}' has train/ and val/: give it as the folder of images, not one above it")
            subfolders[:] = sorted(name for name in subfolders if name[0] != "." and not leads_back(folder, name))
            base = os.fsencode(os.path.join(folder, ""))
            paths = sorted(base + os.fsencode(name) for name in names if name.lower().endswith(extensions)
                           and name[0] != "." and name != "reconstruction.png")
            if paths:
                files.append((folder, np.array(paths)))
        return files

    def __getitem__(self, index):
        return self.load(index), int(self.labels[index])


class NamedDataset(Dataset):
    """A data set of torchvision, downloaded into `root` if it is not there (under torchrun, once per machine)."""

    def __init__(self, name, split, root):
        class_name, keyword, pretrain_splits, train_splits, val_split = TORCHVISION_DATASETS[name]
        splits = {"pretrain": pretrain_splits, "train": train_splits, "val": [val_split]}[split]

        def open_parts():
            try:
                dataset = getattr(torchvision.datasets, class_name)
                return [dataset(root, download=True, **{keyword: part}) for part in splits]
            except Exception as error:      # of the network, of an archive, of a missing scipy (flowers102)
                raise InputError(f"{name}: not in '{root}', and could not be downloaded: {error!r}") from error
        if dist.is_initialized():
            once_per_machine(lambda: open_parts() and None)     # the others wait for the download
        parts = open_parts()
        if name == "imagenette" and sum(map(len, parts)) != IMAGENETTE[splits[0]]:  # the archive was cut off, say
            raise InputError(f"'{root}/imagenette2' is not whole: delete it, and it is extracted again")
        self.name, self.images = name, ConcatDataset(parts)
        self.classes = None if split == "pretrain" else [
            name if isinstance(name, str) else name[0] for name in parts[0].classes]    # imagenette: synonyms

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            img, label = self.images[index]
            return v2.functional.pil_to_tensor(img.convert("RGB")), int(label)
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
        return torch.from_numpy(self.images[index]).permute(2, 0, 1), int(self.labels[index])


def draw_shape(pattern, random, size=36):
    """One image of Shapes, (size, size, 3) uint8, from the pattern's name and a numpy RandomState."""
    y, x = np.mgrid[:size, :size].astype(np.float64)

    surface = clutter(random, x, y, np.full((size, size), random.uniform(0.4, 1)))  # what share of light comes back
    radius = random.uniform(12, 20)
    cover, cx, cy, _ = draw_outline(random, x, y, radius, 0.7 * radius)
    surface = paint(random, x, y, pattern, surface, cover, cx, cy)
    return light(random, clutter(random, x, y, surface))


class Scenes(Dataset):
    """A small data set for segmentation and detection, drawn like Shapes: 64×64 pixels, one to five shapes, of which
    the next may hide a quarter of what an earlier one shows. The class is the outline; pattern, light and clutter are
    those of Shapes, and tell nothing.

    An item is the image, the number of the shape that each pixel belongs to, (64, 64) uint8 with 0 for none, and the
    class of each shape, (shapes,), counted from 0.
    """
    classes = ["disc", "square", "diamond", "triangle"]

    def __init__(self, split, in_chans=3):
        if in_chans != 3:
            raise InputError(f"'scenes' has RGB images, and in_chans is {in_chans}")
        count, stream = (200, 3) if split == "val" else (1000, 2)
        self.items = [draw_scene(np.random.RandomState([stream, i])) for i in range(count)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        img, shown, labels = self.items[index]
        return torch.from_numpy(img).permute(2, 0, 1), shown, labels


def draw_scene(random, size=64):
    """One item of Scenes as arrays, the image (size, size, 3) uint8, from a numpy RandomState."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    surface = np.full((size, size), random.uniform(0.4, 1))
    shown, labels = np.zeros((size, size), np.uint8), []
    for _ in range(random.randint(2, 6)):
        radius = random.uniform(7, 13)
        cover, cx, cy, label = draw_outline(random, x, y, radius, 0.7 * radius)
        hidden = np.bincount(shown[cover > 0.5], minlength=len(labels) + 1) / np.bincount(shown.flat)
        if hidden[1:].max(initial=0) > 0.25:
            continue
        labels.append(label)
        shown[cover > 0.5] = len(labels)
        surface = paint(random, x, y, random.choice(Shapes.classes), surface, cover, cx, cy)
    return light(random, clutter(random, x, y, surface)), shown, np.array(labels)


def draw_outline(random, x, y, radius, margin):
    """How much of each pixel (x, y) a random shape of this radius covers; also its centre, and which outline it has."""
    cx, cy = random.uniform(margin, len(x) - margin, 2)
    tilt = random.uniform(-0.2, 0.2)
    u, v = (x - cx) * np.cos(tilt) + (y - cy) * np.sin(tilt), (y - cy) * np.cos(tilt) - (x - cx) * np.sin(tilt)
    outline = random.randint(4)
    distance = (np.hypot(u, v),                                                 # disc
                1.15 * np.maximum(abs(u), abs(v)),                              # square
                0.85 * (abs(u) + abs(v)),                                       # diamond
                1.6 * np.maximum(v, 0.87 * abs(u) - 0.5 * v))[outline]          # triangle
    return np.clip(radius - distance + 0.5, 0, 1), cx, cy, outline


def clutter(random, x, y, surface):
    """The surface with up to two small plain shapes on it."""
    for _ in range(random.randint(3)):
        cover, _, _, _ = draw_outline(random, x, y, random.uniform(1.5, 4), 0)
        surface = surface * (1 - cover) + random.uniform(0.4, 1) * cover
    return surface


def paint(random, x, y, pattern, surface, cover, cx, cy):
    """The surface with a patterned shape on it, where `cover` says so."""
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
    return surface * (1 - cover) + random.uniform(0.5, 1) * (1 - dark) * cover


def light(random, surface):
    """A surface (size, size) under coloured, uneven light: (size, size, 3) uint8."""
    size = len(surface)
    hat = np.clip(1 - abs(np.linspace(0, 3, size)[:, None] - np.arange(4)), 0, 1)       # bilinear: (size, 4)
    tint = random.uniform(0.2, 1, (3, 1, 1))
    light = hat @ random.uniform(0.2, 1, (3, 4, 4)) @ hat.T * tint / tint.max()         # (3, size, size)
    return np.rint(255 * surface * light).astype(np.uint8).transpose(1, 2, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Data: crops, batches, loader
# ---------------------------------------------------------------------------------------------------------------------
def train_transform(img_size, scale):
    """RandomResizedCrop (bicubic, antialiased) of `scale`, the least and the most, of the area, and flip, of an image
    (C, H, W). Resized as a tensor: torch's kernel for bytes took a quarter of Pillow's time on an AMD EPYC (on 400
    photographs the two differed by 0.04 of 256 levels; in none by over 0.4). Raises InputError."""
    if scale[0] > scale[1]:
        raise InputError(f"crops take from {scale[0]:g} to {scale[1]:g} of the area: the first must not be the larger")
    return v2.Compose([v2.RandomResizedCrop(pair(img_size), scale, interpolation=InterpolationMode.BICUBIC),
                       v2.RandomHorizontalFlip()])


def eval_transform(img_size):
    """Resize to 256/224 of the size (above 224: to the size itself), bicubic, and centre crop, of an image (C, H, W).
    Where the size isn't square, the image's shorter side is resized by the crop's longer one."""
    return functools.partial(resize_and_crop, size=pair(img_size))


def resize_and_crop(img, size):
    """What `eval_transform` does to an image; RGB is resized by Pillow, as it was for published figures."""
    longer = max(size)
    rgb = img.dtype == torch.uint8 and len(img) == 3
    x = v2.functional.to_pil_image(img) if rgb else img
    x = v2.functional.resize(x, longer * 256 // 224 if longer <= 224 else longer, InterpolationMode.BICUBIC)
    x = v2.functional.center_crop(x, size)
    return v2.functional.pil_to_tensor(x) if rgb else x


def seed_from(*numbers):
    """One 63-bit seed from several integers ≥ 0, such as (seed, epoch, index), well mixed."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0]) >> 1


class Crops(Dataset):
    """Item (epoch, index): image `index` of a source, transformed at random as (seed, epoch, index) alone decides, its
    label, and what was skipped for it, {reason: epoch}.

    An image that can't be read is replaced by the next one that can, and so is its label. `skipped` is what this
    process knows of, through `merge`. Raises InputError if more than `skip_bad` can't be read (None: 0).
    """

    def __init__(self, source, transform, seed=0, skip_bad=None):
        self.source, self.transform, self.seed, self.skip_bad = source, transform, seed, skip_bad
        self.skipped = {}

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
            advice = "" if self.skip_bad is None else f"; more such files than the {self.skip_bad} that may be skipped"
            raise InputError(list(skipped)[-1] + (advice if len(skipped) < len(self) else "; no other is left"))

    def merge(self, skipped):
        """Enters what a worker or another process has skipped, and checks the whole."""
        self.skipped.update({**skipped, **self.skipped})
        self.check(self.skipped)

    @staticmethod
    def collate(items):
        """Items as one batch: imgs (B, C, H, W), labels (B,), and all that was skipped."""
        imgs, labels, skipped = zip(*items)
        return default_collate(imgs), default_collate(labels), {k: v for each in skipped for k, v in each.items()}


CHUNK = 64      # images that are loaded, and handed over by a worker, at a time


class GlobalBatches:
    """This process's micro-batches of a whole run, as lists of (epoch, index); the last images of an epoch that fill no
    batch are left out, and each epoch is shuffled anew.

    A global batch of `batch_size` images belongs to one step; it is cut into `accum_iter` parts, and each part among
    the processes, so that what a step trains on doesn't depend on their number. A process's share of a part comes in
    `chunks` lists, so that workers share it. `start_step` is where a run goes on.
    Raises InputError where the images don't fill one batch, or a batch cannot be shared equally.
    """

    def __init__(self, num_images, batch_size, epochs, accum_iter=1, rank=0, world_size=1, seed=0, start_step=0):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.accum_iter, self.rank, self.world_size = accum_iter, rank, world_size
        self.steps_per_epoch = num_images // batch_size
        self.start_step, self.num_steps = start_step, epochs * self.steps_per_epoch
        if not self.steps_per_epoch:
            raise InputError(f"{num_images} images are fewer than one batch of {batch_size}")
        if batch_size % (world_size * accum_iter):
            raise InputError(f"a batch of {batch_size} images cannot be shared equally by {world_size} process(es) × "
                             f"{accum_iter} accumulated")
        self.share = batch_size // (world_size * accum_iter)
        self.chunks = math.ceil(self.share / CHUNK)

    def __iter__(self):
        order = None
        for step in range(self.start_step, self.num_steps):
            epoch, i = divmod(step, self.steps_per_epoch)
            if order is None or i == 0:
                generator = torch.Generator().manual_seed(seed_from(self.seed, epoch))
                order = torch.randperm(self.num_images, generator=generator)
            for part in range(self.accum_iter):
                first = i * self.batch_size + (part * self.world_size + self.rank) * self.share
                for chunk in order[first:first + self.share].split(CHUNK):
                    yield [(epoch, index) for index in chunk.tolist()]


def eval_batches(num_images, batch_size, rank=0, world_size=1):
    """This process's share of a data set, in order, as lists of (0, index): every image is in exactly one process's."""
    mine = range(rank, num_images, world_size)
    return [[(0, index) for index in mine[i:i + batch_size]] for i in range(0, len(mine), batch_size)]


@functools.cache
def per_channel(numbers, device):
    """One number a channel as a tensor (C, 1, 1) on a device; kept, since a GPU would be waited for at each copy."""
    return torch.tensor(numbers, device=device)[:, None, None]


def normalize(imgs, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Images (N, C, H, W) to floats: each channel (bytes / 255) less its mean, over its standard deviation."""
    imgs = imgs.float() / 255 if imgs.dtype == torch.uint8 else imgs
    return (imgs - per_channel(tuple(mean), imgs.device)) / per_channel(tuple(std), imgs.device)


def denormalize(imgs, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Normalised images (N, C, H, W) back to their values, bytes / 255."""
    return imgs * per_channel(tuple(std), imgs.device) + per_channel(tuple(mean), imgs.device)


def channel_statistics(crops, number=1000):
    """Mean and standard deviation of each channel, two lists: ImageNet's for RGB files, else measured on `number` crops
    (bytes / 255), to six digits: a resumed run must find the same. A constant channel's deviation is 1."""
    if getattr(crops.source, "in_chans", 3) == 3 and not getattr(crops.source, "arrays", False):
        return [*IMAGENET_MEAN], [*IMAGENET_STD]
    generator = torch.Generator().manual_seed(seed_from(crops.seed))
    moments = []
    for index in torch.randperm(len(crops), generator=generator)[:number].tolist():
        img, _, _ = crops[0, index]
        img = img.double() / (255 if img.dtype == torch.uint8 else 1)
        moments.append(torch.stack([img.mean(dim=(1, 2)), img.square().mean(dim=(1, 2))]))
    mean, square = sum(moments) / len(moments)
    std = (square - mean.square()).clamp(min=0).sqrt()
    std = std.where(std > 1e-5 * mean.abs(), 1.0)
    return tuple([float(f"{x:g}") for x in numbers.tolist()] for numbers in (mean, std))
