"""Segmentation and detection: models on weights equal to other libraries', metrics, transforms, data, short runs.

    python -m pip install pytest timm transformers torchmetrics pycocotools
    python -m pytest -q test_dense.py
"""
import colorsys
import json
import tempfile

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

pytest.importorskip("pycocotools")

import common
import detect
import runs
import segment
from conftest import ANN, script, write_coco, write_masks

TINY = dict(patch_size=16, embed_dim=64, depth=4, num_heads=4)


def randomize(module):
    """Every parameter and buffer of floats gets random numbers; variances stay positive."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value) * 0.3)
    return module.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------
def test_vitdet_equals_transformers():
    """Windows that don't divide the map (10 × 10 by 4), global blocks, decomposed relative positions."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VitDetConfig(
        hidden_size=64, num_hidden_layers=8, num_attention_heads=4, image_size=160, pretrain_image_size=160,
        patch_size=16, window_size=4, window_block_indices=[0, 2, 4, 6], use_relative_position_embeddings=True,
        layer_norm_eps=1e-6)
    theirs = randomize(transformers.VitDetModel(config))
    ours = detect.ViTDet(16, window=4, img_size=160, **{**TINY, "depth": 8}).eval()
    weights = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("encoder.layer.", "blocks.").replace("attention.rel", "attn.bias.rel")
        name = name.replace("attention.", "attn.").replace("embeddings.projection.", "patch_embed.proj.")
        weights[name.replace("embeddings.position_embeddings", "pos_embed")] = value
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("pyramid.") for name in missing)
    imgs = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(ours.last_map(imgs), theirs(imgs).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_upernet_head_equals_transformers():
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    from transformers import ConvNextConfig, UperNetConfig
    config = UperNetConfig(backbone_config=ConvNextConfig(out_features=["stage1", "stage2", "stage3", "stage4"]),
                           hidden_size=48, pool_scales=[1, 2, 3, 6], num_labels=7, auxiliary_channels=20)
    theirs = randomize(upernet.UperNetHead(config, [32] * 4))
    ours = segment.UperNet(32, 48, 7, aux_channels=20).eval()

    def copy(here, there):
        here[0].load_state_dict(there.conv.state_dict())
        here[1].load_state_dict(there.batch_norm.state_dict())

    pairs = [(pool[1], block.layers[1]) for pool, block in zip(ours.pools, theirs.psp_modules.blocks)]
    pairs += [*zip(ours.laterals, theirs.lateral_convs), *zip(ours.fpn, theirs.fpn_convs)]
    for here, there in [*pairs, (ours.bottleneck, theirs.bottleneck), (ours.fusion, theirs.fpn_bottleneck)]:
        copy(here, there)
    ours.classify[1].load_state_dict(theirs.classifier.state_dict())
    maps = [torch.randn(2, 32, 32 // 2**i, 32 // 2**i) for i in range(4)]
    with torch.no_grad():
        torch.testing.assert_close(ours(maps)[0], theirs(maps), rtol=1e-5, atol=1e-5)


def test_relative_position_bias_equals_beit():
    beit = pytest.importorskip("timm.models.beit")
    theirs = randomize(beit.Attention(64, 4, qkv_bias=True, window_size=(3, 5)))
    ours = common.Attention(64, 4, bias=segment.RelativePositionBias(4, (3, 5)))
    weights = theirs.state_dict()
    ours.load_state_dict({
        "qkv.weight": weights["qkv.weight"], "proj.weight": weights["proj.weight"], "proj.bias": weights["proj.bias"],
        "qkv.bias": torch.cat([weights["q_bias"], torch.zeros(64), weights["v_bias"]]),
        "bias.table": weights["relative_position_bias_table"]})
    x = torch.randn(2, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        exact, half = ours(x), ours.bfloat16()(x.bfloat16())        # the CPU's own path
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_segmenter_starts_as_the_encoder(head):
    """Biases at 0, scales at 1: its maps are the plain ViT's, also at another image size; frozen, they stay so."""
    vit = randomize(common.ViT(img_size=(32, 48), **TINY))
    model = segment.Segmenter(5, head, 16, [0, 1, 2, 3], drop_path=0.5, freeze=True, img_size=(32, 48), **TINY).train()
    model.load_state_dict(vit.encoder_state_dict(), strict=False)
    imgs, outputs = torch.randn(2, 3, 32, 48), []
    with torch.no_grad():
        for block in vit.blocks:
            block.register_forward_hook(lambda module, args, x: outputs.append(x))
        vit.forward_features(imgs)
        maps = model.forward_maps(imgs, [0, 1, 2, 3])
    for x, tokens in zip(maps, outputs):
        torch.testing.assert_close(x.flatten(2).transpose(1, 2), tokens[:, 1:])
    logits = model(imgs)
    assert [tuple(x.shape[1:]) for x in logits] == [(5, 8, 12), (5, 2, 3)] if head == "upernet" else [(5, 2, 3)]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(("head.", "rescale.")) for name in trained)


def test_detector_without_its_additions_is_a_plain_vit():
    """Relative positions change nothing at their start, nor does drop path in evaluation: only windows matter."""
    vit = randomize(common.ViT(img_size=64, **TINY))
    with torch.no_grad():
        vit.cls_token.fill_(0)
        x = vit.patch_embed(torch.ones(2, 3, 64, 64)) + vit.pos_embed[:, 1:]
        for block in vit.blocks:
            x = block(x)
        for window in (0, 4):           # 4: the whole map
            model = detect.ViTDet(8, window, img_size=64, **TINY).eval()
            weights = {**vit.encoder_state_dict(), "pos_embed": vit.pos_embed[:, 1:]}
            model.load_state_dict(weights, strict=False)
            found = model.last_map(torch.ones(2, 3, 64, 64))
            torch.testing.assert_close(found.flatten(2).transpose(1, 2), x)
        split = detect.ViTDet(8, img_size=64, window=2, **{**TINY, "depth": 8})
        assert [block.window for block in split.blocks] == [2, 0] * 4
    maps = model(torch.ones(1, 3, 64, 64))
    assert [x.shape[-1] for x in maps.values()] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize("patch_size", [14, 16])
def test_roi_align_knows_the_strides(patch_size):
    """Also where the first images leave much of their canvas empty, and for strides that are no power of two. On maps
    that hold each cell's own place, a box's mean is its centre."""
    pool = detect.Detector(3, rois=16, out_channels=8, window=2, img_size=16 * patch_size,
                           **{**TINY, "patch_size": patch_size}).rcnn.roi_heads.box_roi_pool
    side = 16 * patch_size
    maps = {}
    for level, stride in enumerate((patch_size / 4, patch_size / 2, patch_size, patch_size * 2)):
        x = (torch.arange(round(side / stride)) + 0.5) * stride
        maps[str(level)] = torch.stack([x.expand(len(x), -1), x[:, None].expand(-1, len(x))])[None]
    boxes = torch.tensor([[16.0, 24, 60, 76], [30, 40, 150, 160]])      # on the first and the second map
    found = pool(maps, [boxes], [(side // 3, side)]).mean(dim=(2, 3))
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half_a_cell = torch.tensor([[patch_size / 8], [patch_size / 4]])        # torchvision's sampling is not aligned
    torch.testing.assert_close(found, centre + half_a_cell, rtol=0, atol=1e-3)


@pytest.mark.parametrize("patch_size,grid", [(14, 16), (16, 33), (2, 32)])
def test_anchors_know_the_strides(patch_size, grid):
    """Also for strides that are no whole pixels, and maps whose sides torchvision's quotient doesn't fit."""
    detector = detect.Detector(3, rois=16, out_channels=8, window=2, img_size=grid * patch_size,
                               **{**TINY, "patch_size": patch_size}).eval()
    imgs = torch.zeros(1, 3, grid * patch_size, grid * patch_size)
    with torch.no_grad():
        maps = [*detector.rcnn.backbone(imgs).values()]
    found = detector.rcnn.rpn.anchor_generator(detect.ImageList(imgs, [imgs.shape[2:]]), maps)[0]
    expected = [[x * stride, y * stride] for stride, level in zip(patch_size / 4 * 2 ** torch.arange(5), maps)
                for y in range(level.shape[2]) for x in range(level.shape[3]) for _ in range(3)]
    torch.testing.assert_close((found[:, :2] + found[:, 2:]) / 2, torch.tensor(expected), rtol=0, atol=1e-3)


def test_taps_before_the_last_block():
    """What no tap sees is left out, so that every parameter gets a gradient."""
    model = segment.Segmenter(3, head_channels=8, taps=[0, 1, 2, 4], img_size=64, **{**TINY, "depth": 6})
    assert len(model.blocks) == 5
    sum(x.sum() for x in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_detector_gives_every_parameter_a_gradient_and_its_group():
    model = detect.Detector(3, rois=16, out_channels=8, window=2, img_size=64, **TINY).train()
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 5:30, 8:40], masks[1, 30:60, 20:60] = 1, 1
    full = {"size": (64, 50), "masks": masks, "boxes": detect.boxes_of(masks), "labels": torch.tensor([1, 3])}
    empty = {"size": (64, 64), "masks": masks[:0], "boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    assert full["boxes"].tolist() == [[8, 5, 40, 30], [20, 30, 60, 60]]
    losses = model(torch.randn(2, 3, 64, 64), [full, empty])
    sum(losses.values()).backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None]
    assert all(value.isfinite() for value in losses.values()) and not lacking
    groups = detect.param_groups(model, 0.1, 0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(of) == len(named)
    for name, scale, decay in (("pos_embed", 2**-5, 0), ("patch_embed.proj.bias", 2**-5, 0.1),
                               ("blocks.0.attn.bias.rel_pos_h", 2**-4, 0.1), ("blocks.3.norm1.weight", 2**-1, 0),
                               ("pyramid.0.0.weight", 1, 0.1), ("pyramid.0.1.weight", 1, 0)):
        group = of[id(named[f"rcnn.backbone.{name}"])]
        assert (group["lr_scale"], group["weight_decay"]) == (scale, decay), name


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and evaluation
# ---------------------------------------------------------------------------------------------------------------------
def test_scores_equal_a_loop_and_torchmetrics():
    pred, target = torch.randint(0, 5, (4, 32, 32)), torch.randint(0, 6, (4, 32, 32))   # class 4 in no truth: see below
    target[target >= 4] = 255
    mIoU, mAcc, aAcc, iou = segment.scores(segment.confusion(pred, target, 6, 255))
    keep, ious, accs = target != 255, [], []
    for c in range(5):
        hit = (keep & (pred == c) & (target == c)).sum().item()
        union = (keep & ((pred == c) | (target == c))).sum().item()
        ious.append(100 * hit / union)
        accs += [100 * hit / (target == c).sum().item()] if (target == c).any() else []
    assert iou[5].isnan() and iou[:5].tolist() == pytest.approx(ious)
    assert (mIoU, mAcc) == pytest.approx((np.mean(ious), np.mean(accs)))
    assert aAcc == pytest.approx(100 * (pred == target)[keep].float().mean().item())
    jaccard = pytest.importorskip("torchmetrics").classification.MulticlassJaccardIndex
    assert mIoU == pytest.approx(100 * jaccard(5, ignore_index=255, average="macro")(pred, target).item(), abs=1e-4)


@pytest.mark.parametrize("height,width", [(20, 33), (8, 8), (5, 12)])
def test_sliding_windows_cover_everything_once(height, width):
    """A model that sees pixels alone gives the same logits in windows; smaller images are padded."""
    imgs = torch.randn(2, 3, height, width)
    logits = segment.slide(lambda x: [x * 2 + 1], imgs, (8, 8), (5, 5))
    torch.testing.assert_close(logits, imgs * 2 + 1)


def test_average_precision_equals_pycocotools(tmp_path):
    """Truth found again is 100 %, whatever its format and numbers; a crowd's region hides what is found in it."""
    square = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
    blob = np.zeros((40, 50), np.uint8)
    blob[2:9, 35:48] = 1
    counts = np.diff(np.flatnonzero(np.diff(np.r_[2, blob.T.ravel(), 2]))).tolist()
    annotations = [
        {"id": 0, "image_id": 7, "category_id": 3, "bbox": [10, 10, 20, 20], "segmentation": square},
        {"id": 0, "image_id": 7, "category_id": 9, "bbox": [35, 2, 13, 7],
         "segmentation": detect.encode_mask(torch.from_numpy(blob))},
        {"id": 3, "image_id": 7, "category_id": 3, "bbox": [35, 2, 13, 7], "iscrowd": 1, "area": 91,
         "segmentation": {"size": [40, 50], "counts": counts}},
        {"id": 4, "image_id": 7, "category_id": 3, "bbox": [5, 5, 0, 9], "segmentation": square}]
    write_coco(tmp_path, {"train": annotations, "val": annotations}, categories=(3, 9), size=(40, 50), number=7)
    train, val = (detect.CocoFolder(tmp_path, split, split == "val") for split in ("train", "val"))
    assert val.dropped == 1 and val.has_masks and train[0][0][1]["labels"].tolist() == [1, 2]
    target = val[0][0][1]
    for number, mask in enumerate(target["masks"], 1):
        assert (mask.numpy() == val.coco.annToMask(val.coco.anns[number])).all()
    assert (target["masks"][1].numpy() == blob).all() and (target["masks"][2].numpy() == blob).all()
    results = [{"image_id": 7, "category_id": ann["category_id"], "score": score, "bbox": ann["bbox"],
                "segmentation": detect.encode_mask(mask)}
               for ann, mask, score in zip(annotations, target["masks"], (0.9, 0.8, 0.95))]
    figures = detect.average_precision(val.coco, results, masks=True)
    assert list(figures.values()) == pytest.approx([100.0] * 6)
    worse = [dict(results[0], score=0.99, bbox=[0, 30, 9, 9], segmentation=detect.encode_mask(torch.zeros(40, 50)))]
    figures = detect.average_precision(val.coco, results + worse, masks=True)
    assert figures["box_AP"] == pytest.approx(75.0, abs=0.3)        # one class of two: a wrong one comes first
    assert detect.average_precision(val.coco, [], masks=True)["mask_AP"] == 0.0


def test_found_objects_return_to_the_original_image():
    found = {"boxes": torch.tensor([[4.0, 8, 12, 16]]), "masks": torch.ones(1, 1, 28, 28)}
    found = detect.to_original(found, {"size": (16, 32), "original_size": (32, 64)})
    assert found["boxes"].tolist() == [[8, 16, 24, 32]]
    assert torch.equal(found["masks"][0].nonzero().amin(0), torch.tensor([16, 8]))
    assert found["masks"].shape == (1, 32, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Data and transforms
# ---------------------------------------------------------------------------------------------------------------------
def scene():
    return detect.SceneObjects("val")[3][0]


def test_scenes_are_consistent():
    pairs = detect.SceneObjects("val"), segment.SceneMasks("val")
    for index in range(0, 200, 20):
        (img, target), (same, mask) = (source[index][0] for source in pairs)
        assert torch.equal(img, same) and (target["masks"].sum(dim=0) <= 1).all()
        for one, label, (x1, y1, x2, y2) in zip(target["masks"], target["labels"], target["boxes"].int().tolist()):
            assert (mask[one.bool()] == label).all()
            assert one[y1:y2, x1:x2].sum() == one.sum() and one[:, x2 - 1].any() and one[y2 - 1].any()
        assert torch.equal(mask > 0, target["masks"].sum(dim=0) > 0)


@pytest.mark.parametrize("scale,masks", [(0.4, True), (1.7, True), (0.4, False), (1.7, False)])
def test_jittered_image_equals_a_loop(scale, masks):
    """The image, its masks and boxes after scaling, cropping, padding and a flip, pixel by pixel."""
    img, target = scene()
    target = target if masks else {name: value for name, value in target.items() if name != "masks"}
    for seed in range(4):
        torch.manual_seed(seed)
        out, new = detect.large_scale_jitter((img, target), 48, (scale, scale))
        torch.manual_seed(seed)
        torch.empty(()).uniform_(scale, scale)
        side = round(64 * scale * 48 / 64)
        top, left = (torch.randint(max(0, side - 48) + 1, ()).item() for _ in range(2))
        flip, width = torch.rand(()) < 0.5, min(side, 48)
        big = F.interpolate(img[None], (side, side), mode="bilinear", antialias=True)[0]
        fill = big.float().mean(dim=(1, 2)).byte()
        for y in range(48):
            for x in range(48):
                column = width - 1 - x if flip and x < width else x
                inside = y < side and column < side
                expected = big[:, top + y, left + column] if inside else fill
                assert torch.equal(out[:, y, x], expected)
        assert new["size"] == (width, width) and len(new["boxes"]) == len(new["labels"]) > 0
        assert (new["boxes"][:, 2:] > new["boxes"][:, :2]).all() and new["boxes"].max() <= width
        if masks:
            assert torch.equal(new["boxes"], detect.boxes_of(new["masks"])) and new["masks"].shape[1:] == (48, 48)
            whole = segment.resize_mask(target["masks"], (side, side))[:, top:top + 48, left:left + 48]
            whole = whole.flip(2) if flip else whole
            kept = whole[whole.flatten(1).sum(dim=1) > 0]
            assert torch.equal(new["masks"][:, :width, :width], kept)


def test_photometric_distortion():
    """A shift by 32, then a factor of 0.5 to 1.5 without regard to the mean; hue by a tenth of the circle, 36°."""
    torch.manual_seed(0)
    grey, red = torch.full((3, 4, 4), 100, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8)
    red[0] = 200
    values = torch.stack([segment.PHOTOMETRIC(grey)[0, 0, 0] for _ in range(300)])
    assert 34 <= values.min() < 50 and 165 < values.max() <= 198 and (values == 100).sum() > 30
    hues = [colorsys.rgb_to_hsv(*(segment.PHOTOMETRIC(red)[:, 0, 0] / 255).tolist())[0] for _ in range(300)]
    degrees = max(360 * min(hue, 1 - hue) for hue in hues)
    assert 30 < degrees < 39
    assert torch.equal(red[0], torch.full((4, 4), 200, dtype=torch.uint8))


def test_segmentation_crops_keep_image_and_mask_together():
    """A mask that is the image's red channel stays that, up to interpolation at edges; padding is to be ignored."""
    _, shown = segment.SceneMasks("val")[0][0]
    img = (shown * 50)[None].repeat(3, 1, 1)
    segment.PHOTOMETRIC, photometric = nn.Identity(), segment.PHOTOMETRIC
    for seed in range(8):
        torch.manual_seed(seed)
        out, mask = segment.train_transform((img, shown), (64, 80), 64, (0.5, 2.0), 255)
        assert out.shape == (3, 64, 80) and mask.shape == (64, 80)
        keep = mask != 255
        assert keep.any() and ((out[0].float() / 50).round()[keep] == mask[keep].float()).float().mean() > 0.9
    segment.PHOTOMETRIC = photometric
    tall = torch.zeros(3, 1000, 100, dtype=torch.uint8)
    assert segment.eval_transform((tall, tall[0]), 50)[0].shape == (3, 200, 20)      # the longer side: 4 · 50


# ---------------------------------------------------------------------------------------------------------------------
# Bad input, and short runs
# ---------------------------------------------------------------------------------------------------------------------
def refused(module, root, *more):
    """The one line with which a script refuses what lies in a folder."""
    words = f"--ckpt none --demo --device cpu --data {root} --num_steps 2 --warmup_steps 0 --batch_size 2".split()
    with pytest.raises(common.InputError) as error, tempfile.TemporaryDirectory() as output:
        module.main(module.get_args([*words, "--output_dir", output, *more]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_masks_that_do_not_fit(tmp_path):
    write_masks(tmp_path, values=(0, 1, 7))
    assert "the value 7" in refused(segment, tmp_path)
    write_masks(tmp_path, size=(40, 47))
    assert "40×48" in refused(segment, tmp_path)
    (tmp_path / "masks/train/3.png").unlink()
    assert "lacks 3.png (1 of 12" in refused(segment, tmp_path)
    (tmp_path / "classes.json").write_text("[]")
    write_masks(tmp_path)
    (tmp_path / "classes.json").write_text("[]")
    assert "classes.json" in refused(segment, tmp_path)
    assert "no folder" in refused(segment, tmp_path / "nowhere")
    assert "taps" in refused(segment, "scenes", "--taps", "0", "1", "2", "4")
    assert "leave pixels out" in refused(segment, "scenes", "--stride", "65")
    assert "no split but" in refused(segment, "scenes", "--val_split", "test")
    assert "in_chans is 1" in refused(segment, "scenes", "--in_chans", "1")
    assert "at least 2 images" in refused(segment, "scenes", "--accum_iter", "2")
    for module in (segment, detect):
        assert "two patches or more" in refused(module, "scenes", "--img_size", "4")


def test_masks_as_ade20k_has_them(tmp_path):
    """0 is unlabelled and becomes 255, which --ignore must say; 1 to 150 become 0 to 149."""
    write_masks(tmp_path, values=(0, 1, 150))
    for old, new in (("train", "training"), ("val", "validation")):
        (tmp_path / "images" / old).rename(tmp_path / "images" / new)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "masks" / old).rename(tmp_path / "annotations" / new)
    source = segment.MaskFolder(tmp_path, "val", 255)
    values = torch.cat([source[i][0][1].unique() for i in range(len(source))]).unique().tolist()
    assert len(source.classes) == 150 and {255} < set(values) <= {0, 149, 255}
    assert "become 255" in refused(segment, tmp_path, "--ignore", "0")


def test_a_folder_may_be_named_with_a_slash(tmp_path):
    write_masks(tmp_path)
    ways = [segment.MaskFolder(f"{tmp_path}{slash}", "train", 255) for slash in ("", "/")]
    assert common.inventory(ways[0]) == common.inventory(ways[1])


def test_arrays_have_channels_of_their_own(tmp_path):
    """Three channels of floats are measured, not taken for RGB; a picture shows the channels that --show says."""
    write_masks(tmp_path)
    for path in tmp_path.glob("images/*/*"):
        path.unlink()
        np.save(path.with_suffix(".npy"), 3000 + 1000 * np.random.rand(40, 48, 3).astype(np.float32))
    source = segment.MaskFolder(tmp_path, "train", 255)
    crops = segment.Pairs(source, lambda sample: sample)
    assert source.arrays and all(3300 < mean < 3700 for mean in common.channel_statistics(crops)[0])
    (img, _), _ = source[0]
    assert segment.visible(img, [0, 1, 2]).std() > 0.2                      # not all white
    rgb = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    assert torch.equal(segment.visible(rgb, [2, 0, 1]), rgb[[2, 0, 1]] / 255)
    path = tmp_path / "images/train" / sorted(p.name for p in (tmp_path / "images/train").iterdir())[3]
    np.save(path, np.zeros((40, 48, 3), np.uint8))
    with pytest.raises(common.InputError, match="a folder has one type"):
        source[3]


def test_annotations_that_do_not_fit(tmp_path):
    write_coco(tmp_path, {"train": [dict(ANN, image_id=2)], "val": [ANN]})
    assert "image 2" in refused(detect, tmp_path)
    write_coco(tmp_path, {"train": [ANN], "val": [ANN]}, categories=(2,))
    assert "category 1" in refused(detect, tmp_path)
    write_coco(tmp_path, {"train": [], "val": [ANN]})
    assert "no annotation" in refused(detect, tmp_path)
    write_coco(tmp_path, {"train": [ANN]})
    write_coco(tmp_path, {"val": [ANN]}, categories=(1, 2))
    assert "categories" in refused(detect, tmp_path)
    path = tmp_path / "annotations/instances_train.json"
    path.write_text("{")
    assert "cannot be read as COCO's JSON" in refused(detect, tmp_path)
    path.unlink()
    assert "cannot be read as COCO's JSON" in refused(detect, tmp_path)
    write_coco(tmp_path, {"train": [ANN], "val": [ANN]})
    content = path.read_text()
    for kind, change in (("categories", lambda c: [{"id": c["id"]}]),               # no name
                         ("categories", lambda c: [c, dict(c, name="y")]),          # two with one id
                         ("images", lambda c: [c, c]),
                         ("images", lambda c: [c, dict(c, id="b")]),                # a number and a text
                         ("images", lambda c: [dict(c, file_name=12)])):
        changed = json.loads(content)
        changed[kind] = change(changed[kind][0])
        path.write_text(json.dumps(changed))
        assert "cannot be read as COCO's JSON" in refused(detect, tmp_path)
    assert "in_chans is 1" in refused(detect, "scenes", "--in_chans", "1")


@pytest.mark.parametrize("segmentation", [
    [[]], [[1, 2, 3, 4]], [["a", "b"] * 3], {"size": [40, 48]}, {"size": [40, 48], "counts": [-5, 1925]},
    {"size": [20, 20], "counts": [100, 300]}, {"size": [40, 48], "counts": [10, 4000]},
    {"size": [40, 48], "counts": "~~"}, 7])
def test_segmentations_that_cannot_be_used(segmentation):
    with pytest.raises(common.InputError, match="of image 3 cannot be used"):
        detect.decode_mask({"image_id": 3, "segmentation": segmentation}, 40, 48)


def test_one_object_without_a_segmentation_makes_it_boxes_alone(tmp_path, capsys):
    write_coco(tmp_path, {"train": [ANN, dict(ANN, id=2, segmentation=[], area=None)], "val": [dict(ANN, area=None)]})
    words = (f"--ckpt none --demo --device cpu --data {tmp_path} --num_steps 1 --warmup_steps 0 --batch_size 1 "
             f"--output_dir {tmp_path}/run")
    result = detect.main(detect.get_args(words.split()))
    assert "box_AP" in result and "mask_AP" not in result
    assert "boxes alone: annotations without a segmentation: 1" in capsys.readouterr().out


@pytest.mark.parametrize("module,small", [(segment, "--head_channels 8 --batch_size 5"),
                                          (detect, "--fpn_channels 8 --rois 8 --batch_size 2")])
def test_short_runs_resume(module, small, pretrained, tmp_path, monkeypatch):
    """Steps that are no multiple of an epoch. A run that is cut off before its last step and goes on gives the same
    weights; a finished one the same result again; bad input is one line."""
    if module is segment:
        write_masks(tmp_path)
    else:
        write_coco(tmp_path, {"train": [ANN], "val": [ANN]})
        content = json.loads((tmp_path / "annotations/instances_train.json").read_text())
        content["images"] += [dict(content["images"][0], id=i) for i in (2, 3)]         # without boxes: they train too
        (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    words = (f"{small} --img_size 32 --num_steps 3 --warmup_steps 1 --num_workers 0 --device cpu --lr 1e-3 --amp none "
             f"--ckpt {pretrained}/last.pt --data {tmp_path} --output_dir {tmp_path}/").split()

    def run(output):
        return module.main(module.get_args([*words[:-1], words[-1] + output]))
    result = run("whole")
    lines = (tmp_path / "whole/log.jsonl").read_text().splitlines()
    assert len(lines) == (2 if module is segment else 3) and (tmp_path / "whole/predictions.png").exists()
    assert run("whole") == result
    if module is segment:       # a finished run can be scored on another split
        assert module.main(module.get_args([*words[:-1], words[-1] + "whole", "--val_split", "train"]))["images"] == 12
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        polls = iter([0, 143])
        patch.setattr(runs.Signals, "poll", lambda self: next(polls))
        run("cut_off")
    assert run("cut_off") == result
    whole, cut_off = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "cut_off"))
    assert whole["step"] == cut_off["step"] == 3
    assert all(torch.equal(value, cut_off["model"][name]) for name, value in whole["model"].items())
    process = script(f"{module.__name__}.py", *words, "--layer_decay", "2")
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1 and "layer_decay" in process.stderr
