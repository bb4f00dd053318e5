"""What pre-trained features are worth for object detection and instance segmentation: ViTDet with Mask R-CNN.

    python detect.py --ckpt runs/mae/encoder.pt --data coco --accum_iter 16
    torchrun --nproc_per_node 8 detect.py --ckpt runs/mae/encoder.pt --data coco    # batch 64: 8 images a GPU
    python detect.py --demo --ckpt runs/mae/last.pt                                 # a laptop CPU, on drawn scenes

`--ckpt` takes what finetune.py takes. `--data` is `scenes`, or a folder in COCO's layout: SPLIT/ with images and
annotations/instances_SPLIT.json, where SPLIT is train and val, or train2017 and val2017. Unless all annotations have
a segmentation, boxes alone are trained (Faster R-CNN). The result is the last line printed and OUTPUT/result.json:
COCO's AP, AP50 and AP75 of boxes and masks, in %, by pycocotools. OUTPUT/predictions.png shows validation images, their
truth, and what is found.

ViTDet (Li et al., arXiv:2203.16527): the plain ViT attends within windows of 14 × 14 patches, except in the last block
of each quarter, which attends globally (Section 3, "Backbone adaptation"; of vit_micro's four blocks each is one);
decomposed relative positions are added in all blocks. A simple feature pyramid makes strides 4 to 32 from the last map
alone ("Simple feature pyramid"). Region proposals, RoI align and heads are torchvision's, with the four convolutions
and LayerNorms of ViTDet (Appendix A.2).

The recipe is ViTDet's, behind EMAE's Table 3 (the rows without Cascade): 1024 × 1024 pixels, large-scale jitter 0.1 to
2, batch 64, AdamW at 1e-4, 184,375 steps (ViT-H: 138,281, by --num_steps), × 0.1 at 8/9 and 26/27 of them; layer decay
and drop path go with the encoder's size. The papers' other tables used other recipes (docs/reading.md, chapter 7).

Where this differs from detectron2, in which ViTDet is published:
- torchvision's RoI align is not shifted by half a pixel (`aligned`), and box losses are smooth L1 with β = 1/9, not L1.
- Masks are resized as bitmaps, not as polygons. As there, boxes are recomputed from the masks after the crop; where
  there are no masks they are clipped. Images are padded with their mean colour, not ImageNet's.
- Images without boxes train too. At most min(1000, 2 · --rois) regions are proposed in an image.
- Positions are resampled once, to --img_size.

Measured at small scale: drawn scenes and nuclei (results/dense.md). COCO and GPUs: not run.
"""
import argparse
import contextlib
import functools
import io
import json
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import MultiScaleRoIAlign, box_convert, clip_boxes_to_image, masks_to_boxes, remove_small_boxes
from torchvision.ops.poolers import initLevelMapper
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from common import Block, ImageFiles, InputError, Scenes, ViT, init_linear, normalize
from finetune import encoder_args, fill, open_encoder
from runs import Run, gather, launch, number, parse_args, save_picture
from segment import Pairs, finish_args, mean_colour, pad_to, resize, resize_mask, training_args, visible

try:
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    COCO = None

DEMO = dict(data="scenes", model="vit_micro", patch_size=4, img_size=[64], fpn_channels=32, rois=32,
            jitter=[0.7, 1.4], num_steps=250, warmup_steps=25, batch_size=8, lr=2e-3, drop_path=0.0, num_workers=0,
            clip_grad=5.0)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    """Parses the command line. Raises InputError."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    encoder_args(parser, img_size=[1024])
    model = parser.add_argument_group("detector")
    model.add_argument("--window", type=number(int, "[0, 16384]"), default=14,
                       help="patches a side of a window; 0: all blocks attend globally")
    model.add_argument("--fpn_channels", type=number(int, "[4, 65536]"), default=256)
    model.add_argument("--anchor_size", type=number(int, "[1, 65536]"),
                       help="pixels a side of the smallest anchors: the size of small objects where an image just fits "
                            "into --img_size (default: two patches)")
    model.add_argument("--rois", type=number(int, "[4, 65536]"), default=512,
                       help="regions of an image that the box head trains on")
    model.add_argument("--jitter", type=number(float, "(0, inf)"), nargs=2, default=[0.1, 2.0],
                       help="scale of an image in training, 1: it just fits into --img_size")
    training_args(parser, num_steps=184375, warmup_steps=250, batch_size=64, weight_decay=0.1, eval_epochs=10)
    args = parse_args(parser, argv, DEMO, layout="scenes, or a folder in COCO's layout")
    finish_args(args, "detect", dict(lr=1e-4))
    if args.img_size[0] != args.img_size[1]:
        raise InputError("--img_size is one number here: images are padded to a square")
    if args.jitter[0] > args.jitter[1]:
        raise InputError(f"--jitter {args.jitter[0]:g} {args.jitter[1]:g}: the first must not be the larger")
    if COCO is None:
        raise InputError("pycocotools is needed for COCO's evaluation: pip install pycocotools")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Images with annotated objects
# ---------------------------------------------------------------------------------------------------------------------
class CocoFolder(ImageFiles):
    """Items: (image (C, H, W), target), and None. A target is a dict of `masks` (n, H, W) uint8 (if the set has masks),
    `boxes` (n, 4) float32 as x1, y1, x2, y2, `labels` (n,) from 1 on and `image_id`. In training (`crowds` false)
    crowds are left out. `dropped` counts the broken boxes that were left out, `bare` the annotations that have no
    segmentation: with one of these, the set has no masks. Raises InputError."""

    def __init__(self, root, split, crowds, in_chans=3):
        name = next((name for name in (split, f"{split}2017")
                     if os.path.isfile(os.path.join(root, "annotations", f"instances_{name}.json"))), split)
        path, folder = os.path.join(root, "annotations", f"instances_{name}.json"), os.path.join(root, name)
        try:
            with open(path) as file:
                content = json.load(file)
            coco, self.dropped = check_coco(content)
            categories = sorted(content["categories"], key=lambda c: c["id"])
            self.classes = [c["name"] for c in categories]
            self.ids, self.root = sorted(coco.imgs), os.fsencode(folder)
            paths = np.array([os.fsencode(os.path.join(folder, coco.imgs[i]["file_name"])) for i in self.ids])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"'{path}' cannot be read as COCO's JSON: {error!r}") from error
        if not os.path.isdir(folder):
            raise InputError(f"no folder '{folder}' for the images of '{path}'")
        super().__init__(paths, in_chans)
        self.categories = {c["id"]: i for i, c in enumerate(categories, 1)}
        self.bare = sum(not a.get("segmentation") for a in coco.anns.values())
        self.has_masks = not self.bare
        self.coco = coco if crowds else None        # what evaluation compares with
        # Each image and its annotations as text, in one array: workers share it, and would each copy Python's objects
        texts = [json.dumps([coco.imgs[i], [a for a in coco.imgToAnns[i] if crowds or not a["iscrowd"]]]).encode()
                 for i in self.ids]
        self.ends, self.texts = np.cumsum([0, *map(len, texts)]), np.frombuffer(b"".join(texts), np.uint8)

    def __getitem__(self, index):
        info, anns = json.loads(self.texts[self.ends[index]:self.ends[index + 1]].tobytes())
        img, size = self.load(index), (info["height"], info["width"])
        if img.shape[1:] != size:
            raise InputError(f"{os.fsdecode(self.paths[index])!r} is {img.shape[2]}×{img.shape[1]} pixels, but the "
                             f"annotations say {size[1]}×{size[0]}")
        boxes = torch.tensor([a["bbox"] for a in anns], dtype=torch.float32).view(-1, 4)
        target = {"boxes": box_convert(boxes, "xywh", "xyxy"),
                  "labels": torch.tensor([self.categories[a["category_id"]] for a in anns], dtype=torch.int64),
                  "image_id": info["id"]}
        if self.has_masks:
            masks = [decode_mask(a, *size) for a in anns]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)
        return (img, target), None


def check_coco(content):
    """A COCO object made from what a JSON file holds, without broken boxes, and how many of those there were. Raises
    what a missing key raises, or ValueError."""
    images, categories = ({x["id"] for x in content[name]} for name in ("images", "categories"))
    if len(images) < len(content["images"]) or len(categories) < len(content["categories"]):
        raise ValueError("two images, or two categories, have the same id")
    for info in content["images"]:
        if not (info["height"] > 0 and info["width"] > 0 and info["file_name"]):
            raise ValueError(f"image {info['id']} has no size or file_name")
    sound = []
    for ann in content["annotations"]:
        if ann["image_id"] not in images or ann["category_id"] not in categories:
            raise ValueError(f"annotation {ann['id']} is of image {ann['image_id']} and category {ann['category_id']}, "
                             "which are not both there")
        if len(ann["bbox"]) == 4 and all(map(math.isfinite, ann["bbox"])) and min(ann["bbox"][2:]) > 0:
            area = ann.get("area") or ann["bbox"][2] * ann["bbox"][3]
            sound.append({"iscrowd": 0, **ann, "area": area, "id": 1 + len(sound)})     # pycocotools: 0 is no match
    if not sound:
        raise ValueError("no annotation")
    return make_coco({**content, "annotations": sound}), len(content["annotations"]) - len(sound)


def make_coco(content):
    """A COCO object of a dict in COCO's format; it prints nothing."""
    coco = COCO()
    coco.dataset = {"info": {}, **content}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class SceneObjects(Scenes):
    """The drawn scenes, as CocoFolder's items."""
    has_masks, dropped, bare = True, 0, 0

    def __init__(self, split, in_chans=3):
        super().__init__(split, in_chans)
        self.ids = list(range(1, 1 + len(self)))
        self.categories = {i: i for i in range(1, 1 + len(self.classes))}
        annotations = []
        for index, image_id in enumerate(self.ids if split == "val" else []):       # for evaluation
            (_, target), _ = self[index]
            for mask, label in zip(target["masks"], target["labels"].tolist()):
                code = encode_mask(mask)
                annotations.append({"id": 1 + len(annotations), "image_id": image_id, "category_id": label,
                                    "iscrowd": 0, "area": int(mask.sum()), "segmentation": code,
                                    "bbox": coco_mask.toBbox(code).tolist()})
        self.coco = make_coco({"images": [{"id": i, "height": 64, "width": 64} for i in self.ids],
                               "categories": [{"id": i, "name": self.classes[i - 1]} for i in self.categories],
                               "annotations": annotations})

    def __getitem__(self, index):
        img, shown, labels = super().__getitem__(index)
        masks = torch.from_numpy(shown) == torch.arange(1, 1 + len(labels))[:, None, None]
        return (img, {"masks": masks.byte(), "boxes": boxes_of(masks), "labels": torch.from_numpy(labels) + 1,
                      "image_id": self.ids[index]}), None


def encode_mask(mask):
    """A mask (H, W) as COCO's run lengths."""
    code = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def decode_mask(ann, height, width):
    """An annotation's mask (height, width) uint8 from what COCO writes: polygons, or run lengths, as numbers or packed.
    Raises InputError."""
    code = ann["segmentation"]
    try:
        if isinstance(code, list) or isinstance(code["counts"], list):
            code = coco_mask.frPyObjects(code, height, width)
        mask = coco_mask.decode(coco_mask.merge(code) if isinstance(code, list) else code)
        if mask.shape != (height, width) or mask.max() > 1:
            raise ValueError(f"a mask of {mask.shape[0]}×{mask.shape[1]} pixels, or run lengths that don't add up")
    except Exception as error:      # what pycocotools raises depends on what is wrong
        raise InputError(f"a segmentation of image {ann['image_id']} cannot be used: {error!r}") from error
    return torch.from_numpy(mask)


def boxes_of(masks):
    """The boxes (n, 4) around masks (n, H, W), none of them empty. A box ends where its last pixel does, one after that
    pixel's number."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0, 1, 1])


class Objects(Pairs):
    """Pairs whose images are of one size, and whose targets stay a list."""

    @staticmethod
    def collate(items):
        imgs, targets, skipped = zip(*items)
        return default_collate(imgs), list(targets), {k: v for each in skipped for k, v in each.items()}


def large_scale_jitter(sample, size, scales):
    """An image and its target, scaled at random by `scales` against where it just fits into `size`², flipped, cropped
    at random where it is larger, and padded where it is smaller. Objects that end up outside are left out."""
    img, target = sample
    img, target = fit(img, target, size, torch.empty(()).uniform_(*scales).item())
    colour = mean_colour(img)
    top, left = (torch.randint(max(0, side - size) + 1, ()).item() for side in target["size"])
    height, width = (min(side, size) for side in target["size"])
    window = ..., slice(top, top + height), slice(left, left + width)
    flip = torch.rand(()) < 0.5

    def take(x, fill):      # the content stays at the left, the padding at the right
        return pad_to(x[window].flip(2) if flip else x[window], (size, size), fill)

    img, target["size"] = take(img, colour), (height, width)
    if "masks" in target:
        masks = take(target["masks"], 0)
        keep = masks.amax(dim=(1, 2)) > 0
        target.update(masks=masks[keep], boxes=boxes_of(masks[keep]))
    else:
        boxes = clip_boxes_to_image(target["boxes"] - torch.tensor([left, top, left, top]), (height, width))
        if flip:
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        keep = remove_small_boxes(boxes, 1)
        target["boxes"] = boxes[keep]
    target["labels"] = target["labels"][keep]
    return img, target


def fit_and_pad(sample, size):
    """An image scaled to fit into `size`² and padded; of the target, what evaluation needs."""
    img, target = sample
    small, _ = fit(img, {}, size, 1.0)
    return (pad_to(small, (size, size), mean_colour(small)),
            {"image_id": target["image_id"], "size": tuple(small.shape[1:]), "original_size": tuple(img.shape[1:])})


def fit(img, target, size, scale):
    """An image and its target, `scale` times as large as where the longer side is `size`. The target's `size` becomes
    the new (height, width)."""
    scale = scale * size / max(img.shape[1:])
    new = tuple(max(1, round(side * scale)) for side in img.shape[1:])
    target = dict(target, size=new)
    if "boxes" in target:
        target["boxes"] = resize_boxes(target["boxes"], img.shape[1:], new)
    if "masks" in target:
        target["masks"] = resize_mask(target["masks"], new)
    return resize(img, new), target


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
norm = functools.partial(LayerNorm2d, eps=1e-6)


class DecomposedBias(nn.Module):
    """The relative positions of MViTv2 (arXiv:2112.01526, Section 4.1): a query's product with a vector for the
    vertical offset, plus that with one for the horizontal offset. Both tables start at zero."""

    def __init__(self, head_dim, grid_size):
        super().__init__()
        self.grid_size = grid_size
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid_size[0] - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid_size[1] - 1, head_dim))

    def forward(self, q):
        rows, columns = (torch.arange(n, device=q.device) for n in self.grid_size)
        h = self.rel_pos_h[rows[:, None] - rows + len(rows) - 1]                        # (H, H, d)
        w = self.rel_pos_w[columns[:, None] - columns + len(columns) - 1]               # (W, W, d)
        q = q.unflatten(2, self.grid_size)                                              # (N, heads, H, W, d)
        vertical = torch.einsum("nahwd,hkd->nahwk", q, h.to(q.dtype))[..., :, None]
        horizontal = torch.einsum("nahwd,wkd->nahwk", q, w.to(q.dtype))[..., None, :]
        return (vertical + horizontal).flatten(4).flatten(2, 3)                         # (N, heads, H·W, H·W)


class WindowBlock(Block):
    """The encoder's block on a map (N, H, W, D), which attends within windows of `window` patches a side (0: globally).
    Maps that are no multiple of it are padded with zeros for the attention."""

    def __init__(self, dim, num_heads, grid_size, window, drop_path=0.0):
        super().__init__(dim, num_heads, drop_path=drop_path)
        self.window = window
        self.attn.bias = DecomposedBias(dim // num_heads, (window, window) if window else grid_size)

    def forward(self, x):
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x):
        N, H, W, D = x.shape
        side = self.window
        if not side:
            return self.attn(x.flatten(1, 2)).view(N, H, W, D)
        x = F.pad(x, (0, 0, 0, -W % side, 0, -H % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.view(N, rows, side, columns, side, D).transpose(2, 3)
        x = self.attn(x.reshape(-1, side * side, D))                    # (N · rows · columns, side², D)
        x = x.view(N, rows, columns, side, side, D).transpose(2, 3).reshape(N, rows * side, columns * side, D)
        return x[:, :H, :W]


class ViTDet(ViT):
    """The encoder for detection, with its simple feature pyramid: images (N, C, S, S) to maps of strides P/4, P/2, P,
    2P and 4P, all `out_channels` deep (P: the patch size). There is no cls token."""

    def __init__(self, out_channels=256, window=14, drop_path=0.0, freeze=False, **vit):
        super().__init__(drop_path=0.0 if freeze else drop_path, **vit)
        depth, dim, num_heads = len(self.blocks), self.cls_token.shape[-1], self.blocks[0].attn.num_heads
        if self.num_patches < 4:
            raise InputError("--img_size must be two patches or more: the coarsest map has half as many")
        last = {round((quarter + 1) * depth / 4) - 1 for quarter in range(4)}           # of each quarter: global
        self.blocks = nn.ModuleList(
            WindowBlock(dim, num_heads, self.grid_size, 0 if i in last else window, block.drop_path.p)
            for i, block in enumerate(self.blocks))
        self.blocks.apply(init_linear)
        self.pos_embed = nn.Parameter(self.pos_embed[:, 1:].clone())
        del self.cls_token, self.norm
        self.requires_grad_(not freeze)
        self.out_channels = out_channels        # torchvision asks for it

        def up(channels):
            return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)

        scales = [([up(dim), norm(dim // 2), nn.GELU(), up(dim // 2)], dim // 4), ([up(dim)], dim // 2), ([], dim),
                  ([nn.MaxPool2d(2)], dim)]
        self.pyramid = nn.ModuleList(nn.Sequential(
            *layers, nn.Conv2d(width, out_channels, 1, bias=False), norm(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), norm(out_channels))
            for layers, width in scales)

    def last_map(self, imgs):
        """Images (N, C, S, S) to the last block's map (N, D, rows, columns)."""
        x = (self.patch_embed(imgs) + self.pos_embed).unflatten(1, self.grid_size)      # (N, rows, columns, D)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)

    def forward(self, imgs):
        x = self.last_map(imgs)
        maps = [scale(x) for scale in self.pyramid]
        maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return {str(i): x.float() for i, x in enumerate(maps)}


class Anchors(AnchorGenerator):
    """torchvision's anchors at strides of P/4 to 4P (P: the patch size), which it would round to whole pixels."""

    def __init__(self, patch_size, smallest):
        super().__init__(tuple((smallest * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
        self.strides = [[patch_size / 4 * 2**i] * 2 for i in range(5)]

    def grid_anchors(self, grid_sizes, strides):
        return super().grid_anchors(grid_sizes, self.strides)


def roi_align(size, patch_size):
    """torchvision's RoI align on maps of strides P/4, P/2, P and 2P. torchvision would guess the strides at the first
    call, from the heights of images that may not fill their canvas."""
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio=0)
    pool.scales = [4 / patch_size, 2 / patch_size, 1 / patch_size, 0.5 / patch_size]
    finest = round(math.log2(patch_size / 4))           # level 2 has stride 4
    pool.map_levels = initLevelMapper(finest, finest + 3)
    return pool


class Detector(nn.Module):
    """torchvision's Mask R-CNN (Faster R-CNN without masks) on ViTDet, for images that are scaled and padded:
    torchvision's own transform is not used. It would scale small images up again, and undo the jitter."""

    def __init__(self, num_classes, masks=True, rois=512, anchor_size=None, **vitdet):
        super().__init__()
        backbone = ViTDet(**vitdet)
        channels, hidden, patch_size = backbone.out_channels, 4 * backbone.out_channels, backbone.patch_size
        parts = dict(
            rpn_anchor_generator=Anchors(patch_size, anchor_size or 2 * patch_size),    # 32 to 512 for patches of 16
            rpn_head=RPNHead(channels, 3, conv_depth=2),
            rpn_pre_nms_top_n_train=min(2000, 4 * rois), rpn_pre_nms_top_n_test=min(1000, 2 * rois),
            rpn_post_nms_top_n_train=min(1000, 2 * rois), rpn_post_nms_top_n_test=min(1000, 2 * rois),
            box_roi_pool=roi_align(7, patch_size), box_batch_size_per_image=rois,
            box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [hidden], norm_layer=norm),
            box_predictor=FastRCNNPredictor(hidden, 1 + num_classes))
        if masks:
            parts.update(mask_roi_pool=roi_align(14, patch_size),
                         mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm),
                         mask_predictor=MaskRCNNPredictor(channels, channels, 1 + num_classes))
        self.rcnn = (MaskRCNN if masks else FasterRCNN)(backbone, **parts)

    def forward(self, imgs, targets, dtype=None):
        """Normalised images (N, C, S, S), and a list of dicts with `size`: the (height, width) of each without
        padding. In training, with `boxes`, `labels` and `masks`: a dict of losses. Else a list of dicts with `boxes`,
        `labels`, `scores` and `masks` (n, 1, 28, 28). `dtype`: autocast's, for all but proposals and heads."""
        sizes = [target["size"] for target in targets]
        with torch.autocast(imgs.device.type, dtype, enabled=dtype is not None):
            maps = self.rcnn.backbone(imgs)
        targets = targets if self.training else None
        proposals, losses = self.rcnn.rpn(ImageList(imgs, sizes), maps, targets)
        found, head_losses = self.rcnn.roi_heads(maps, proposals, sizes, targets)
        return {**losses, **head_losses} if self.training else found


def param_groups(model, weight_decay, layer_decay):
    """Groups with layer-wise decay, as in finetune.py: of the encoder, embeddings get layer_decay^(depth + 1) of the
    rate and block i layer_decay^(depth - i). No weight decay on norms and pos_embed (ViTDet, A.2); biases have it."""
    depth, groups = len(model.rcnn.backbone.blocks), {}
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        within = name.removeprefix("rcnn.backbone.")
        layer = 0 if within.startswith(("pos_embed", "patch_embed")) else depth + 1
        layer = int(within.split(".")[1]) + 1 if within.startswith("blocks.") else layer
        decay = 0.0 if name.rpartition(".")[0] in norms or within == "pos_embed" else weight_decay
        group = {"params": [], "weight_decay": decay, "lr_scale": layer_decay ** (depth + 1 - layer)}
        groups.setdefault((layer, decay), group)["params"].append(param)
    return list(groups.values())


def learning_rate(step, args):
    """Rate at a step: linear warm-up from 0 to lr, a tenth of it from 8/9 of the steps on, a hundredth from 26/27."""
    warm = min(1.0, step / args.warmup_steps) if args.warmup_steps else 1.0
    return args.lr * warm * 0.1 ** ((step >= round(args.num_steps * 8 / 9)) + (step >= round(args.num_steps * 26 / 27)))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
def to_original(found, target):
    """What was found in a scaled image, in the original's pixels and on the CPU: `masks` become (n, H, W) bools."""
    found = {name: value.cpu() for name, value in found.items()}
    found["boxes"] = resize_boxes(found["boxes"], target["size"], target["original_size"])
    if "masks" in found:
        found["masks"] = paste_masks_in_image(found["masks"], found["boxes"], target["original_size"])[:, 0] > 0.5
    return found


def detect(run, model, imgs, targets, channels):
    """What the model finds in images (N, C, S, S): a list of dicts, in the originals' pixels."""
    found = model(normalize(imgs, *channels), targets, run.dtype)
    return [to_original(*pair) for pair in zip(found, targets)]


@torch.no_grad()
def evaluate(run, model, crops, channels):
    """COCO's AP, AP50 and AP75 of boxes and masks, in %, over all processes' images: a dict."""
    source, results = crops.source, []
    numbers = list(source.categories)           # label - 1 -> category
    model.eval()
    for imgs, targets in run.once(crops, batch_size=4, progress="evaluation"):
        for target, found in zip(targets, detect(run, model, imgs, targets, channels)):
            for i, (x1, y1, x2, y2) in enumerate(found["boxes"].tolist()):
                result = {"image_id": target["image_id"], "category_id": numbers[found["labels"][i] - 1],
                          "score": found["scores"][i].item(), "bbox": [x1, y1, x2 - x1, y2 - y1]}
                if "masks" in found:
                    result["segmentation"] = encode_mask(found["masks"][i])
                results.append(result)
    return average_precision(source.coco, sum(gather(results), []), model.rcnn.roi_heads.has_mask())


def average_precision(coco, results, masks):
    """COCO's figures, in %, for results in COCO's format: {"box_AP": …, "box_AP50": …, "box_AP75": …, "mask_AP": …}."""
    figures = {}
    for kind, name in (("bbox", "box"), ("segm", "mask"))[:1 + masks]:
        values = [0.0, 0.0, 0.0]
        if results:
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation = COCOeval(coco, coco.loadRes(results), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            values = [100 * max(0.0, value) for value in evaluation.stats[:3].tolist()]
        figures.update({f"{name}_{measure}": value for measure, value in zip(("AP", "AP50", "AP75"), values)})
    return figures


@torch.no_grad()
def picture(run, model, crops, channels, number=8):
    """Rows of a picture: validation images, their truth, and what is found with a score above 0.5."""
    rows = [], [], []
    model.eval()
    for index in torch.linspace(0, len(crops) - 1, min(number, len(crops))).long().tolist():
        (img, truth), _ = crops.source[index]
        scaled, target, _ = crops[0, index]
        found = detect(run, model, scaled[None].to(run.device), [target], channels)[0]
        found = {name: value[found["scores"] > 0.5] for name, value in found.items()}
        img = (255 * visible(img, run.args.show)).round().byte()
        for row, objects in zip(rows, ({}, truth, found)):
            row.append(resize(pad_to(draw(img, objects), [max(img.shape[1:])] * 2, 0), [192, 192]) / 255)
    return [torch.stack(row) for row in rows]


def draw(img, objects):
    """An RGB image (3, H, W) uint8 with `masks` and `boxes` on it; each label has its colour. Masks are drawn one at a
    time: torchvision paints overlaps black."""
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta", "orange", "white"]
    of_object = [colours[label % len(colours)] for label in objects.get("labels", torch.empty(0)).tolist()]
    for mask, colour in zip(objects.get("masks", []), of_object):
        img = draw_segmentation_masks(img, mask.bool(), alpha=0.4, colors=colour)
    return draw_bounding_boxes(img, objects["boxes"], colors=of_object) if of_object else img


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------
def load_data(args):
    """The training and the validation set. Raises InputError where they don't fit each other."""
    if args.data == "scenes":
        return SceneObjects("train", args.in_chans), SceneObjects("val", args.in_chans)
    train, val = (CocoFolder(args.data, split, split == "val", args.in_chans) for split in ("train", "val"))
    if (train.classes, list(train.categories)) != (val.classes, list(val.categories)):
        raise InputError(f"'{args.data}': the categories of train ({len(train.classes)}) and val ({len(val.classes)}) "
                         "differ")
    return train, val


def main(args):
    """Trains on one data set with one encoder. Returns the result, which is also printed last and saved."""
    weights, vit, encoder, _ = open_encoder(args)
    fill(args, {768: dict(layer_decay=0.7, drop_path=0.1), 1024: dict(layer_decay=0.8, drop_path=0.4),
                1280: dict(layer_decay=0.9, drop_path=0.5)}[max(768, vit["embed_dim"])])        # B, L, H
    run = Run(args, __file__)
    device, dtype, size = run.device, run.dtype, args.img_size[0]
    train_set, val_set = load_data(args)
    dropped = train_set.dropped + val_set.dropped
    if dropped:
        run.say(f"{dropped} annotations were left out: their boxes have no area, or are not four numbers")
    if train_set.bare + val_set.bare:
        run.say(f"boxes alone: annotations without a segmentation: {train_set.bare + val_set.bare}")
    transform = functools.partial(large_scale_jitter, size=size, scales=args.jitter)
    crops = Objects(train_set, transform, args.seed, args.skip_bad)
    val_crops = Objects(val_set, functools.partial(fit_and_pad, size=size))
    channels = run.channels(crops)

    torch.manual_seed(args.seed)                    # every process starts from the same weights
    model = Detector(len(train_set.classes), train_set.has_masks and val_set.has_masks, args.rois, args.anchor_size,
                     out_channels=args.fpn_channels, window=args.window, drop_path=args.drop_path, freeze=args.freeze,
                     **vit)
    if weights is not None:
        weights["pos_embed"] = weights["pos_embed"][:, 1:]                      # without the cls token's
        model.rcnn.backbone.load_state_dict(weights, strict=False)              # new: relative positions, the pyramid
    model.to(device)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run.resume(crops, model, optimizer, scaler, num_steps=args.num_steps, encoder=encoder, classes=train_set.classes)
    if args.compile:
        model.rcnn.backbone.compile()               # the rest has shapes that change
    # On CPUs: sums in the same order in every step, also the first of a resumed run (else DDP reorders them after it)
    net = DistributedDataParallel(model, find_unused_parameters=device.type == "cpu") if run.world_size > 1 else model

    result = None
    for epoch in run.epochs():
        model.train()
        for step in run.steps():
            lr = learning_rate(step, args)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            for part, (imgs, targets) in enumerate(run.parts()):            # also seeds the sampling of regions
                targets = [{name: x.to(device) if torch.is_tensor(x) else x for name, x in target.items()}
                           for target in targets]
                net.require_backward_grad_sync = part == args.accum_iter - 1    # all-reduce once, after the last part
                losses = net(normalize(imgs, *channels), targets, dtype)
                loss = sum(losses.values())
                scaler.scale(loss / args.accum_iter).backward()
                run.add(loss, **losses)
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.get_total_norm([p.grad for p in params])
            if args.clip_grad:
                nn.utils.clip_grads_with_norm_(params, args.clip_grad, grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.end_step(grad_norm)                 # when due: checkpoint, checks, and the exit after a signal

        due = epoch == run.num_epochs - 1 or (epoch + 1) % args.eval_epochs == 0
        result = evaluate(run, model, val_crops, channels) if due else None
        run.end_epoch(**(result or {}))
    result = result or evaluate(run, model, val_crops, channels)            # of a run that was finished before
    run.finish()
    if run.rank == 0:
        save_picture(picture(run, model, val_crops, channels), run.output / "predictions.png")
    return run.report({**{name: round(value, 2) for name, value in result.items()}, "images": len(val_set),
                       "freeze": args.freeze, "ckpt": args.ckpt, "data": args.data})


if __name__ == "__main__":
    launch(main, get_args)
