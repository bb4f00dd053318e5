"""What ADE20K and COCO would take: multiply-adds and memory of a training step, computed on fake tensors and not run.

    python results/dense/cost.py            # ViT-B and ViT-L, the papers' sizes, bf16

Multiply-adds are of forward and backward, by torch's FlopCounter. Memory is the peak of a step of one image and of two,
with weights, gradients and AdamW's states. Region proposals are not computed: 512 regions of an image go through
the box head and a quarter of them through the mask head, as many as are trained on. Needs what rehearsal.py needs.
"""
import contextlib
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import rehearsal
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import VIT_SIZES
from detect import Detector
from segment import Segmenter, segmentation_loss


def segment(model, imgs):
    outputs = model(imgs)
    masks = torch.zeros(len(imgs), *imgs.shape[2:], dtype=torch.uint8, device=imgs.device)
    return segmentation_loss(outputs, masks, 255)


def detect(model, imgs):
    rcnn, rois = model.rcnn, 512 * len(imgs)
    maps = list(rcnn.backbone(imgs).values())
    with torch.autocast("cuda", enabled=False):     # as in Detector
        logits, boxes = rcnn.rpn.head(maps)
        regions = torch.cat([x.mean(dim=(2, 3)) for x in maps]).mean(dim=0)[None, :, None, None]
        scores, corners = rcnn.roi_heads.box_predictor(rcnn.roi_heads.box_head(regions.expand(rois, -1, 7, 7).clone()))
        masks = rcnn.roi_heads.mask_predictor(rcnn.roi_heads.mask_head(regions.expand(rois // 4, -1, 14, 14).clone()))
    return sum(x.mean() for x in (*logits, *boxes, scores, corners, masks))


def make(name, size):
    if name == "segment":
        return Segmenter(150, drop_path=0.1, **dict(VIT_SIZES[size], img_size=512)), 512
    return Detector(80, window=14, out_channels=256, drop_path=0.1, **dict(VIT_SIZES[size], img_size=1024)), 1024


def multiply_adds(name, size):
    """Of one image, forward and backward."""
    with torch.device("meta"):
        (model, side) = make(name, size)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            globals()[name](model.train(), torch.empty(2, 3, side, side)).backward()
    return counter.get_total_flops() / 4


def memory(name, size, images):
    """Bytes at the peak of a step."""
    watch = rehearsal.Watch()
    watch.note = lambda what: None
    rehearsal.pretend(watch)
    with FakeTensorMode(allow_non_fake_inputs=True), watch, torch.autograd.set_multithreading_enabled(False):
        model, side = make(name, size)
        model.train().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):                          # from the second on the optimiser has its states
            watch.peak = watch.live
            imgs = torch.empty(images, 3, side, side, device="cuda")
            with torch.autocast("cuda", torch.bfloat16):
                loss = globals()[name](model, imgs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return watch.peak


if __name__ == "__main__":
    print("| | multiply-adds an image, T | GB fixed | GB an image |\n|---|---|---|---|")
    for name in ("segment", "detect"):
        for size in ("vit_base", "vit_large"):
            with contextlib.redirect_stdout(sys.stderr):
                work, one, two = multiply_adds(name, size), *(memory(name, size, number) for number in (2, 4))
            print(f"| {name}.py, {size} | {work / 1e12:.2f} | {(2 * one - two) / 1e9:.1f} | "
                  f"{(two - one) / 2e9:.2f} |", flush=True)
    os._exit(0)                                     # autograd's threads were never told of an end
