"""What is computed: the five methods, the ViT, the data, the evaluation; and that scripts share their text.

    python -m pytest -q -n 2                            # all test files, two tests at a time (-n is pytest-xdist's)
    python -m pytest -q -n 2 test_all.py -k exact       # how exact the five methods are, alone

The first part compares the methods with oracles that are not ours: transformers' ViTMAE and timm's ViT on the same
weights, loops written from the papers' equations, and the papers' own figures. Without transformers or timm only the
tests that need them are skipped. Nothing is downloaded, and images are drawn.
"""
import argparse
import ast
import difflib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import tokenize
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import pil_to_tensor

import common
import efficient_mae
import emae
import finetune
import mae
import robust_mae
import sdae
import visualize
from common import VIT_SIZES, InputError, ViT
from conftest import ROOT, SCRIPTS, module, photo, small_args

ENCODER = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4)       # 4×4 patches
TINY = dict(ENCODER, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
CPU = torch.device("cpu")


def assert_same(ours, theirs, error=1e-5):
    """Two tensors are equal but for rounding. A sum's rounding error grows with its terms, not with what they add up
    to: so `error` is a share of the largest number there is."""
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max() <= error * theirs.abs().max()


def about(number):
    """For a mean of float32 numbers of one sign, such as a loss: the error is a share of it."""
    return pytest.approx(number, rel=1e-5)


def shake(model):
    """Moves all weights away from their initial values, some of which (0 and 1) would hide an error."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1 * (p.std() if p.numel() > 1 and p.std() > 0 else 1))
    return model.eval()


def gradients(loss, model):
    """Of all that is trained, as one vector."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)])


def build(name, *flags):
    """A small model as a script's command line describes it: 16 patches of 8×8 pixels."""
    return module(name).build_model(module(name).get_args(small_args("data", "output", *flags)))


# ---------------------------------------------------------------------------------------------------------------------
# Exactness 1: MAE equals transformers' and timm's
# ---------------------------------------------------------------------------------------------------------------------
def transformers_mae(model, **config):
    """transformers' ViTMAE with the weights of our model."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(layer_norm_eps=1e-6, **config))
    names = {r"patch_embed\.proj": "patch_embeddings.projection", r"^(cls_token|patch_emb)": r"vit.embeddings.\1",
             r"^pos_embed": "vit.embeddings.position_embeddings", r"^blocks": "vit.layers", r"^norm": "vit.layernorm",
             r"^decoder_blocks": "decoder.decoder_layers", r"^(mask_token|decoder_)": r"decoder.\1",
             r"norm1": "layernorm_before", r"norm2": "layernorm_after", r"attn\.proj": "attention.o_proj"}
    weights = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        if "attn.qkv" in name:
            for part, chunk in zip("qkv", value.chunk(3)):
                weights[name.replace("attn.qkv", f"attention.{part}_proj")] = chunk
        else:
            weights[name] = value
    peer.load_state_dict(weights)
    return peer.eval()


@pytest.mark.parametrize("mask_ratio, norm_pix", [(0.75, True), (0.75, False), (0.6, True)])
def test_exact_mae_equals_transformers(mask_ratio, norm_pix):
    """Loss and gradients in float32; predictions in float64, where rounding hides no mistake."""
    model = shake(mae.MAE(**TINY, mask_ratio=mask_ratio, norm_pix=norm_pix))
    peer = transformers_mae(model, image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=3,
                            num_attention_heads=4, intermediate_size=192, decoder_hidden_size=32,
                            decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=128,
                            mask_ratio=mask_ratio, norm_pix_loss=norm_pix)
    imgs, noise = torch.randn(5, 3, 32, 32), torch.rand(5, 16)
    (loss, stats), theirs = model(imgs, noise), peer(pixel_values=imgs, noise=noise)
    assert loss.item() == about(theirs.loss.item()) and stats == {}
    loss.backward()
    theirs.loss.backward()              # the embedding's gradient is at the far end of the graph
    assert_same(model.patch_embed.proj.weight.grad, peer.vit.embeddings.patch_embeddings.projection.weight.grad)

    theirs = peer.double()(pixel_values=imgs.double(), noise=noise)
    pred, mask = model.double().reconstruct(imgs.double(), noise)
    assert torch.equal(mask, theirs.mask)
    assert_same(pred, theirs.logits, 1e-12)


def test_exact_vit_base_equals_transformers_and_timm():
    """The defaults are ViT-B with the paper's decoder. In float64: at this depth float32's rounding would show."""
    timm = pytest.importorskip("timm")
    model = shake(mae.MAE()).double()
    imgs, noise = torch.randn(1, 3, 224, 224).double(), torch.rand(1, 196)
    peer = transformers_mae(model, norm_pix_loss=True).double()
    encoder = timm.create_model("vit_base_patch16_224", num_classes=0).double().eval()
    encoder.load_state_dict(model.encoder_state_dict())
    with torch.no_grad():
        theirs = peer(pixel_values=imgs, noise=noise)
        pred, mask = model.reconstruct(imgs, noise)
        assert model(imgs, noise)[0].item() == about(theirs.loss.item()) and torch.equal(mask, theirs.mask)
        assert_same(pred, theirs.logits, 1e-12)
        assert_same(model.forward_features(imgs), encoder.forward_features(imgs), 1e-12)
        assert_same(model.features(imgs), encoder(imgs), 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Exactness 2: each method equals a loop written from its paper's equations
# ---------------------------------------------------------------------------------------------------------------------
def pixels(imgs, n, patch, P=8):
    """The values of a patch of image n, in the order (row, column, channel)."""
    row, column = divmod(patch, imgs.shape[3] // P)
    return [imgs[n, c, row * P + i, column * P + j].item() for i in range(P) for j in range(P) for c in range(3)]


def standardised(values):
    """By their own mean and their unbiased variance + 1e-6."""
    mean = average(values)
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return [(x - mean) / math.sqrt(variance + 1e-6) for x in values]


def squared_error(a, b):
    return average([(x - y) ** 2 for x, y in zip(a, b, strict=True)])


def average(numbers):
    return sum(numbers) / len(numbers)


def shuffled(noise):
    """The patches of an image in the order of their noise (L,)."""
    return sorted(range(len(noise)), key=noise.tolist().__getitem__)


def through(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def embedded(vit, imgs, n, ids):
    """Some patches of image n as tokens, after a cls token: (1, 1 + number, D)."""
    ids = torch.as_tensor(ids)
    x = vit.patch_embed(mae.patchify(imgs[n:n + 1], vit.patch_size)[:, ids]) + vit.pos_embed[:, 1 + ids]
    return torch.cat([vit.cls_token + vit.pos_embed[:, :1], x], dim=1)


def decoded(model, latent, ids, number):
    """Tokens of one image and `number` mask tokens, at the places ids, to predictions (1, len(ids), ·)."""
    x = torch.cat([model.decoder_embed(latent), *[model.mask_token] * number], dim=1)
    x = x + model.decoder_pos_embed[:, F.pad(1 + torch.as_tensor(ids), (1, 0))]
    return model.decoder_pred(model.decoder_norm(through(model.decoder_blocks, x)[:, 1:]))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_exact_mae_loss(norm_pix):
    """Section 3: the mean squared error in pixel space, on removed patches only."""
    model = shake(mae.MAE(**TINY, norm_pix=norm_pix))
    imgs, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    pred, mask = model.reconstruct(imgs, noise)
    errors = []
    for n in range(3):
        order = shuffled(noise[n])                                                      # a quarter of 16 is visible
        expected = decoded(model, model.norm(through(model.blocks, embedded(model, imgs, n, order[:4]))), order, 12)
        assert_same(pred[n, order], expected[0])
        assert mask[n, order].tolist() == [0] * 4 + [1] * 12
        for patch in order[4:]:
            target = pixels(imgs, n, patch)
            errors.append(squared_error(pred[n, patch].tolist(), standardised(target) if norm_pix else target))
    assert model(imgs, noise)[0].item() == about(average(errors))


@pytest.mark.parametrize("parts, weight", [(4, 1.0), (4, 0.5), (8, 1.0), (16, 0.0)])
def test_exact_emae_loss(parts, weight):
    model = shake(emae.EMAE(**TINY, parts=parts, consistency_weight=weight))
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    pred, mask = model.reconstruct(imgs, noise)
    assert pred.shape == (2, parts, 16, 192)
    whole, consistency = [], []
    for n in range(2):
        ids = shuffled(noise[n])                                                        # Eq. 3
        visible = [ids[i * 16 // parts:(i + 1) * 16 // parts] for i in range(parts)]    # Eq. 4
        for i in range(parts):
            removed = [patch for patch in range(16) if patch not in visible[i]]         # Eq. 7
            assert mask[n, i].tolist() == [float(patch in removed) for patch in range(16)]
            whole += [squared_error(pred[n, i, patch].tolist(), standardised(pixels(imgs, n, patch)))
                      for patch in removed]                                             # Eq. 8
            for j in range(i + 1, parts):
                both = [patch for patch in removed if patch not in visible[j]]          # Eq. 9
                assert len(both) == 16 - 2 * 16 // parts
                gaps = (pred[n, i, both] - pred[n, j, both]).abs().flatten().tolist()
                consistency.append(2 * average(gaps))                                   # Eq. 10: both terms are this
    loss, stats = model(imgs, noise)
    assert loss.item() == about(average(whole) + weight * average(consistency))         # Eq. 11, 12
    expected = {"whole": about(average(whole)), "consistency": about(average(consistency))} if weight else {}
    assert {name: value.item() for name, value in stats.items()} == expected


@pytest.mark.parametrize("parts", [4, 8])
def test_exact_emae_stop_gradients(parts):
    """Eq. 10 as it stands, with its two stop-gradients: they double the value of |p_i - p_j|, and not its gradient."""
    size = 16 // parts
    ours, literal, plain = (x.requires_grad_() for x in torch.randn(2 * parts, 16 - size, 192).repeat(3, 1, 1, 1))
    predicted = [[patch for patch in range(16) if patch // size != part] for part in range(parts)]   # in this order
    pairs, distances = [], []
    for n, (i, j) in itertools.product(range(2), itertools.combinations(range(parts), 2)):
        both = [patch for patch in predicted[i] if patch in predicted[j]]
        (p_i, q_i), (p_j, q_j) = ([pred[n * parts + part, [predicted[part].index(patch) for patch in both]]
                                   for pred in (literal, plain)] for part in (i, j))
        pairs.append(((p_i.detach() - p_j).abs() + (p_i - p_j.detach()).abs()).mean())
        distances.append((q_i - q_j).abs().mean())
    loss = emae.EMAE(**TINY, parts=parts).forward_consistency(ours)
    assert loss.item() == about(average(pairs).item()) and loss.item() == about(2 * average(distances).item())
    for value in (loss, average(pairs), average(distances)):
        value.backward()
    assert_same(ours.grad, literal.grad)
    assert_same(ours.grad, plain.grad)


@pytest.mark.parametrize("grid, P, ratio", [((14, 14), 16, 0.85), ((1, 512), 2, 0.98), ((8, 8), 4, 0.9),
                                            ((5, 9), 7, 0.75), ((3, 3), 2, 0.88)])
def test_exact_p2dist_is_algorithm_1(grid, P, ratio):
    """k = 8; points of neighbours that coincide count once; equal distances are ordered by row, then column."""
    L = math.prod(grid)
    keep, remove = mae.random_masking(torch.rand(1, L), int(L * (1 - ratio)))
    ours = efficient_mae.p2dist_approximate(keep, remove, grid, P)[0].tolist()
    points = {(row * P + dy * P / 2, column * P + dx * P / 2)                           # p_c^v + Δp
              for row, column in (divmod(patch, grid[1]) for patch in keep[0].tolist())
              for dy in (0, 1, 2) for dx in (0, 1, 2)}
    for patch, d in zip(remove[0].tolist(), ours, strict=True):
        y, x = (P * number for number in divmod(patch, grid[1]))
        centre = (y + P / 2, x + P / 2)
        near = sorted(points, key=lambda p: ((p[0] - centre[0]) ** 2 + (p[1] - centre[1]) ** 2, *p))[:8]        # S
        distances = [min(math.dist((y + i, x + j), p) for p in near) for i in range(P) for j in range(P)]
        assert d == about(average(distances))


@pytest.mark.parametrize("grid, P", [((6, 9), 4), ((4, 4), 7)])
def test_exact_p2dist_is_equation_1(grid, P):
    """The mean over a patch's pixels of the distance to the nearest visible pixel, over all pairs of pixels."""
    L = math.prod(grid)
    keep, remove = mae.random_masking(torch.rand(1, L), L // 7)
    ours = efficient_mae.p2dist_exact(keep, remove, grid, P)[0].tolist()
    place = torch.cartesian_prod(torch.arange(grid[0] * P), torch.arange(grid[1] * P)).double()
    place = place.reshape(grid[0], P, grid[1], P, 2).transpose(1, 2).reshape(L, P * P, 2)       # of a patch's pixels
    for patch, d in zip(remove[0], ours, strict=True):
        distances = (place[patch][:, None] - place[keep[0]].flatten(0, 1)).norm(dim=2)
        assert d == about(distances.amin(dim=1).mean().item())


@pytest.mark.parametrize("img_size, p2dist, gamma, beta", [(48, "approximate", 0.6, 8.0), (48, "exact", 2.0, 9.0),
                                                           (48, "drawn", 0.6, 13.0), (96, "drawn", 0.6, 13.0)])
def test_exact_efficient_mae_loss(img_size, p2dist, gamma, beta):
    """Eq. 2 and decoder masking (Section 4.2), image by image, with gradients. Of drawn distances one image's are all
    beyond β: Eq. 2 is 0 there. The decoder's attention takes another route with 144 patches than with 36."""
    model = shake(efficient_mae.EfficientMAE(**{**TINY, "img_size": img_size}, mask_ratio=0.8, gamma=gamma, beta=beta,
                                             p2dist="exact" if p2dist == "exact" else "approximate"))
    imgs, noise = torch.randn(4, 3, img_size, img_size), torch.rand(4, model.num_patches)
    keep, remove = mae.random_masking(noise, model.len_keep)
    if p2dist == "drawn":
        distance = 2 * beta * torch.rand(remove.shape) + 1
        distance[2] = beta + 1
        model.difficulty = lambda *masks: distance
    else:
        distance = getattr(efficient_mae, f"p2dist_{p2dist}")(keep, remove, model.grid_size, 8)
    easy = distance <= beta
    losses, preds = [], []
    for n in range(4):
        removed = remove[n][easy[n]]
        latent = model.norm(through(model.blocks, embedded(model, imgs, n, keep[n])))
        preds.append(decoded(model, latent, torch.cat([keep[n], removed]), len(removed))[0, len(keep[n]):])
        weights = [d ** -gamma for d in distance[n][easy[n]].tolist()]                  # d_i^-γ
        targets = [torch.tensor(standardised(pixels(imgs, n, patch))) for patch in removed.tolist()]
        errors = [(pred - target).square().mean() for pred, target in zip(preds[n], targets, strict=True)]
        losses.append(sum(w * e for w, e in zip(weights, errors)) / sum(weights) if weights else torch.tensor(0.0))
    loss, stats = model(imgs, noise)
    assert loss.item() == about(average(losses).item())
    assert stats["predicted_patches"].item() == about(easy.sum().item() / 4)
    assert_same(gradients(loss, model), gradients(average(losses), model))

    pred, mask = model.reconstruct(imgs, noise)         # it predicts visible patches too; hard ones are NaN
    assert torch.equal(mask, torch.ones_like(mask).scatter(1, keep, 0.0))
    assert torch.equal(pred.isnan().any(dim=2), mask.scatter(1, remove, (~easy).float()) == 1)
    for n in range(4):
        assert easy[n].any() == (p2dist != "drawn" or n != 2) and not easy[n].all()
        if easy[n].any():
            assert_same(pred[n, remove[n][easy[n]]], preds[n])


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("target", ["none", "rgb", "patch"])
def test_exact_robust_mae_loss(target, norm_pix):
    """Eq. 3 and 2 for the targets. All removed patches count, also those with mid-level tokens (Section 2.3)."""
    model = shake(robust_mae.RobustMAE(**TINY, target=target, norm_pix=norm_pix, mid_ratio=0.25))
    model.patch_mean.uniform_(0.3, 0.6)
    model.patch_var.uniform_(0.01, 0.1)
    raw, noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.rand(2, 16)
    imgs = common.normalize(raw)
    pred, _ = model.reconstruct(imgs, noise)
    mean, var = {"none": ([0] * 192, [1] * 192),                                        # pixels as they are
                 "rgb": ((0.485, 0.456, 0.406) * 64, (0.229**2, 0.224**2, 0.225**2) * 64),      # ImageNet's channels
                 "patch": (model.patch_mean.tolist(), [x + 1e-6 for x in model.patch_var.tolist()])}[target]    # Eq. 3
    errors = []
    for n in range(2):
        for patch in shuffled(noise[n])[4:]:
            values = [(x / 255 - m) / math.sqrt(v) for x, m, v in zip(pixels(raw, n, patch), mean, var, strict=True)]
            errors.append(squared_error(pred[n, patch].tolist(), standardised(values) if norm_pix else values))
    assert model(imgs, noise)[0].item() == about(average(errors))
    patches = torch.rand(3, 192)
    assert_same(model.undo_inter_patch_norm(model.inter_patch_norm(patches)), patches)


@pytest.mark.parametrize("bytes", [True, False])
def test_exact_patch_statistics(bytes, folder):
    """μ and σ² of Eq. 3 are numpy's, in float64, over all patches of epoch 0's crops, in whatever shares they come. In
    float32 the floats' variances, 3 about a mean of 3000, would be lost."""
    crops = common.Crops(common.load_dataset(str(folder), "pretrain"), common.train_transform((24, 40), (0.5, 1.0)), 4)
    imgs = torch.stack([crops[0, i][0] for i in range(48)])
    imgs = imgs if bytes else 3000 + 3 * imgs / 255
    run = types.SimpleNamespace(device=CPU, once=lambda crops, **_: ((x, None) for x in imgs.split(7)))
    mean, var = robust_mae.patch_statistics(run, crops, 8)
    patches = (imgs.double().numpy() / (255 if bytes else 1)).reshape(48, 3, 3, 8, 5, 8)
    patches = patches.transpose(0, 2, 4, 3, 5, 1).reshape(-1, 192)
    assert mean.dtype == torch.float64 and mean.shape == (192,)
    np.testing.assert_allclose(mean, patches.mean(0), rtol=1e-12)
    np.testing.assert_allclose(var, patches.var(0), rtol=1e-10 if bytes else 1e-6)


def test_exact_mid_level_tokens():
    """Section 2.3: their own token and position enter before block 2 of 3; then all is as for visible patches."""
    model = shake(robust_mae.RobustMAE(**TINY, mid_ratio=0.25, drop_edge=0.0))
    imgs, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    order = shuffled(noise[0])
    x = through(model.blocks[:2], embedded(model, imgs, 0, order[:4]))
    x = torch.cat([x, *(model.mid_token + model.pos_embed[:, 1 + patch] for patch in order[4:8])], dim=1)
    pred, mask = model.reconstruct(imgs, noise)
    assert_same(pred[0, order], decoded(model, model.norm(model.blocks[2](x)), order, 8)[0])
    assert mask[0, order].tolist() == [0] * 4 + [1] * 12
    model(imgs, noise)[0].backward()
    assert model.mid_token.grad.any() and "mid_token" not in model.encoder_state_dict()
    with torch.device("meta"):          # the paper's numbers at ViT-B
        model = robust_mae.RobustMAE(mid_ratio=0.25)
    assert (model.mid_count, model.mid_depth) == (49, 8)


@pytest.mark.parametrize("cosine_over", ["tokens", "features"])
@pytest.mark.parametrize("teacher_norm", [True, False])
@pytest.mark.parametrize("teacher_input, more", [("folds", dict(folds=5)), ("masked", {}), ("full", {}),
                                                 ("crop", dict(teacher_tokens=7)), ("crop", {})])
def test_exact_sdae_loss(teacher_input, more, teacher_norm, cosine_over):
    """Of 12 removed patches 5 folds take 2 each, the last two have no target (Figure 4b); crop takes a third."""
    model = shake(sdae.SdAE(**TINY, teacher_input=teacher_input, teacher_norm=teacher_norm, cosine_over=cosine_over,
                            **more))
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    pred, mask = model.reconstruct(imgs, noise)
    assert pred.shape == (2, 16, 48) and mask.sum() == 24
    cosines = []
    for n in range(2):
        removed = shuffled(noise[n])[4:]
        folds = {"folds": [removed[i:i + 2] for i in range(0, 10, 2)], "masked": [removed], "full": [removed],
                 "crop": [removed[:more.get("teacher_tokens", 4)]]}[teacher_input]
        for fold in folds:
            seen = list(range(16)) if teacher_input == "full" else fold
            tokens = model.teacher.norm(through(model.teacher.blocks, embedded(model.teacher, imgs, n, seen)))[0, 1:]
            targets = [tokens[seen.index(patch)].tolist() for patch in fold]
            if teacher_norm:
                targets = [standardised(token) for token in targets]                    # Eq. 3
            guesses = pred[n, fold].tolist()
            if cosine_over == "tokens":                                                 # Eq. 4 sums over patches
                targets, guesses = zip(*targets), zip(*guesses)                         # one cosine a channel
            for a, b in zip(targets, guesses, strict=True):
                cosines.append(sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b))
    assert model(imgs, noise)[0].item() == about(1 - average(cosines))


def test_exact_sdae_teacher():
    """Eq. 7, for every weight; the teacher starts as the student's copy, has no gradient and no drop path."""
    model = sdae.SdAE(**TINY)
    student, teacher = model.encoder_state_dict(), model.teacher.state_dict()           # these follow the weights
    assert student.keys() == teacher.keys() and all(torch.equal(student[name], teacher[name]) for name in teacher)
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0, 0.125, 0.25])
    assert [block.drop_path.p for block in model.teacher.blocks] == [0, 0, 0]
    optimizer = torch.optim.AdamW(sdae.param_groups(model, 0.05), lr=0.01)
    for eta in (0.9, 0.5, 0.0):
        before = {name: value.double() for name, value in teacher.items()}
        model(torch.randn(4, 3, 32, 32))[0].backward()
        optimizer.step()
        assert all(p.grad is None for p in model.teacher.parameters())
        assert all(torch.equal(teacher[name].double(), before[name]) for name in teacher)
        model.update_teacher(eta)
        for name, value in teacher.items():
            assert_same(value, eta * before[name] + (1 - eta) * student[name].double(), 1e-6)
            assert name == "pos_embed" or not torch.equal(value.double(), before[name])


def test_exact_sdae_momentum():
    """Appendix A.1, by epoch; short runs go by iteration; what is left of the teacher's start, as the header has it."""
    args = sdae.get_args([])
    assert (args.ema, args.momentum, args.epochs) == ("epoch", [0.96, 0.99], 300)
    for step in (0, 9, 1509, 2999):     # 10 steps an epoch
        expected = 0.99 + 0.5 * (0.96 - 0.99) * (1 + math.cos(math.pi * (step // 10) / 300))
        assert sdae.momentum(step, 10, args) == pytest.approx(expected)
    short = ["--epochs", "99", "--warmup_epochs", "20"]
    args = sdae.get_args(short)
    assert (args.ema, args.momentum) == ("iteration", [0.999, 0.9999])
    assert sdae.momentum(495, 10, args) == pytest.approx((0.999 + 0.9999) / 2)
    args = sdae.get_args([*short, "--ema", "epoch"])
    assert (args.ema, args.momentum) == ("epoch", [0.96, 0.99])
    for ema, epochs, steps, left in (("epoch", 5, 1, 0.87), ("epoch", 10, 1, 0.76), ("epoch", 30, 1, 0.46),
                                     ("iteration", 20, 93, 0.36), ("iteration", 30, 150, 0.08)):
        ends = [0.96, 0.99] if ema == "epoch" else [0.999, 0.9999]
        args = argparse.Namespace(ema=ema, momentum=ends, epochs=epochs)
        etas = [sdae.momentum(step, steps, args) for step in range(epochs * steps)]
        assert math.prod(etas) == pytest.approx(left, abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Exactness 3: with its own parts switched off, a method is MAE
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model, mask_ratio, own", [
    (lambda: efficient_mae.EfficientMAE(**TINY, gamma=0.0, beta=math.inf), 0.85, set()),
    (lambda: robust_mae.RobustMAE(**TINY, drop_edge=0.0, target="rgb"), 0.75,
     {"patch_mean", "patch_var", "rgb_mean", "rgb_std"}),
    (lambda: emae.EMAE(**TINY, parts=2, consistency_weight=0.0), 1 / 2, set()),
    (lambda: emae.EMAE(**TINY, parts=8, consistency_weight=0.0), 7 / 8, set())])
def test_exact_without_its_parts_a_method_is_mae(model, mask_ratio, own):
    """Loss and gradients, in training; EMAE's are the mean over K masks of MAE."""
    model, peer = shake(model()).train(), mae.MAE(**TINY, mask_ratio=mask_ratio)
    assert set(peer.load_state_dict(model.state_dict(), strict=False).unexpected_keys) == own
    imgs, noise = torch.randn(5, 3, 32, 32), torch.rand(5, 16)
    rank, parts = noise.argsort(dim=1).argsort(dim=1), getattr(model, "parts", 1)
    loss = model(imgs, noise)[0]
    theirs = average([peer(imgs, (rank - part * 16 // parts) % 16)[0] for part in range(parts)])
    assert loss.item() == about(theirs.item())
    assert_same(gradients(loss, model), gradients(theirs, peer))


# ---------------------------------------------------------------------------------------------------------------------
# Exactness 4: the papers' own figures
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("p2dist, expected", [("approximate", [78, 114, 150]), ("exact", [76, 114, 145])])
def test_exact_p2dist_counts(p2dist, expected):
    """Efficient MAE's Table 8, at ratio 0.85: 82, 114 and 150 patches within 9, 13 and 26 pixels; ours are 78 within 9.
    Over 500 masks the means' own standard deviations are 0.4."""
    masks = mae.random_masking(torch.rand(500, 196), 29)
    distance = getattr(efficient_mae, f"p2dist_{p2dist}")(*masks, (14, 14), 16)
    assert [(distance <= beta).sum().item() / 500 for beta in (9, 13, 26)] == pytest.approx(expected, abs=2)
    with torch.device("meta"):
        betas = [efficient_mae.EfficientMAE(patch_size=P).beta for P in (16, 14, 8)]
    assert betas == [26, 22.75, 13]


@pytest.mark.parametrize("ratio, share", [(0.75, 0.87), (0.85, 0.68), (0.90, 0.52)])
def test_exact_shares_with_a_visible_neighbour(ratio, share):
    """Section 3.3: removed patches with a visible one among the 3×3 around them, which P²Dist calls near. At 0.85 these
    are 113.8, and with 5×5 158.7 (Table 5: 114 and 159)."""
    keep, remove = mae.random_masking(torch.rand(500, 196), int(196 * (1 - ratio)))
    near, wide = (efficient_mae.neighbourhood(keep, remove, (14, 14), 16, radius) < math.inf for radius in (1, 2))
    assert near.float().mean().item() == pytest.approx(share, abs=0.01)
    exact = efficient_mae.p2dist_exact(keep[:50], remove[:50], (14, 14), 16)
    assert exact[near[:50]].max() < exact[~near[:50]].min()
    if ratio == 0.85:
        assert [x.sum().item() / 500 for x in (near, wide)] == pytest.approx([114, 159], abs=2)


def blocks_cost(number, tokens, width):
    """Multiply-adds of Transformer blocks: four projections and an MLP of ratio 4, and two products of attention."""
    return number * (12 * tokens * width**2 + 2 * tokens**2 * width)


def forward_cost(size, ratio, decoded=None, tight=False):
    """Multiply-adds of an image's forward pass at 224 pixels, the decoder 512 wide with 8 blocks. The papers embed and
    predict all patches; our code (`tight`) the visible and the removed ones alone. `decoded`: removed patches in the
    decoder, if not all."""
    P, D, N = size["patch_size"], size["embed_dim"], (224 // size["patch_size"]) ** 2
    keep = int(N * (1 - ratio) + 1e-6)
    decoded = N - keep if decoded is None else decoded
    return ((keep if tight else N) * 3 * P**2 * D + blocks_cost(size["depth"], 1 + keep, D) + (1 + keep) * D * 512
            + blocks_cost(8, 1 + keep + decoded, 512) + (decoded if tight else N) * 512 * 3 * P**2)


def measured_cost(model, imgs, noise, backward=False):
    """What the model does of them for an image."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = model(imgs, noise)
        if backward:
            loss.backward()
    return counter.get_total_flops() / 2 / len(imgs)


@pytest.mark.parametrize("name, ratio, paper, parameters", [
    ("vit_base", 0.75, 9.8, 86), ("vit_large", 0.75, 20.8, 304), ("vit_huge", 0.75, 48.6, 631),
    ("vit_large", 0.85, 14.6, 304), ("vit_large", 0.90, 11.6, 304), ("vit_large", 0.95, 8.5, 304)])
def test_exact_multiply_adds_and_parameters(name, ratio, paper, parameters):
    """Multiply-adds in G, as the papers count them (mae.py does a little less), and the encoder's parameters in M."""
    size = VIT_SIZES[name]
    assert forward_cost(size, ratio) / 1e9 == pytest.approx(paper, rel=0.01)
    with torch.device("meta"):
        model, imgs = mae.MAE(**size, mask_ratio=ratio), torch.empty(2, 3, 224, 224)
        measured = measured_cost(model, imgs, torch.empty(2, model.num_patches))
    assert measured == pytest.approx(forward_cost(size, ratio, tight=True), rel=0.001)
    assert sum(p.numel() for p in model.encoder_state_dict().values()) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert name != "vit_base" or measured / 1e9 == pytest.approx(9.675, abs=0.001)


@pytest.mark.parametrize("name, ratio, paper, error", [
    ("vit_base", 0.85, 7.6, 0.01), ("vit_large", 0.85, 14.1, 0.01), ("vit_huge", 0.85, 31.3, 0.01),
    ("vit_large", 0.90, 10.3, 0.02), ("vit_large", 0.95, 5.9, 0.02)])
def test_exact_multiply_adds_of_efficient_mae(name, ratio, paper, error):
    """Tables 3 and 4, with as many patches in the decoder as P²Dist leaves there on average."""
    P, grid = VIT_SIZES[name]["patch_size"], 224 // VIT_SIZES[name]["patch_size"]
    masks = mae.random_masking(torch.rand(300, grid**2), int(grid**2 * (1 - ratio) + 1e-6))
    easy = efficient_mae.p2dist_approximate(*masks, (grid, grid), P) <= 26 * P / 16
    cost = forward_cost(VIT_SIZES[name], ratio, decoded=easy.sum().item() / 300)
    assert cost / 1e9 == pytest.approx(paper, rel=error)


STEP = 3 * forward_cost(VIT_SIZES["vit_base"], 0.75, tight=True) - 49 * 768 * 768   # see the next test


@pytest.mark.parametrize("model, needed, over_mae", [
    (mae.MAE, STEP, 1), (robust_mae.RobustMAE, STEP, 1), (emae.EMAE, 4 * STEP, 4.0),
    (sdae.SdAE, STEP + 147 * 768 * 768 + 3 * blocks_cost(12, 50, 768), 1.45),       # three folds through the teacher
    (lambda: sdae.SdAE(teacher_input="full"), STEP + 196 * 768 * 768 + blocks_cost(12, 197, 768), None)])
def test_exact_training_computes_nothing_that_is_not_used(model, needed, over_mae):
    """ViT-B's forward and backward passes against what a method needs: a backward pass is twice a forward one, less the
    gradients of pixels, which nobody asks for; a teacher has none. And the papers' ratios to MAE."""
    with torch.device("meta"):
        measured = measured_cost(model(), torch.empty(2, 3, 224, 224), torch.empty(2, 196), backward=True)
    assert measured == pytest.approx(needed, rel=0.001)
    assert over_mae is None or measured / STEP == pytest.approx(over_mae, rel=0.01)


def test_exact_training_of_efficient_mae_computes_nothing_that_is_not_used():
    """Except for a few tokens that fill its packed batch up. Masks decide how much that is: they are real here."""
    size, noise = VIT_SIZES["vit_tiny"], torch.rand(8, 196)
    easy = efficient_mae.p2dist_approximate(*mae.random_masking(noise, 29), (14, 14), 16) <= 26
    needed = average([3 * forward_cost(size, 0.85, n, tight=True) - 29 * 768 * 192 for n in easy.sum(dim=1).tolist()])
    measured = measured_cost(efficient_mae.EfficientMAE(**size), torch.rand(8, 3, 224, 224), noise, backward=True)
    assert needed <= measured < 1.03 * needed


# ---------------------------------------------------------------------------------------------------------------------
# Every script, whichever there are
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_interface(name):
    """`loss, stats = model(imgs, noise)`: noise fixes the masks, or they are drawn; all that is trained has a gradient;
    statistics are scalars. A batch's gradient is the mean of its parts'. `encoder_state_dict` is a ViT's."""
    model = shake(build(name))
    imgs, noise = torch.randn(8, 3, 32, 32), torch.rand(8, 16)
    loss, stats = model(imgs, noise)
    assert loss.shape == () and all(value.shape == () for value in stats.values())
    assert torch.equal(model(imgs, noise)[0], loss) and not torch.equal(model(imgs, noise.flip(1))[0], loss)
    assert not torch.equal(model(imgs)[0], model(imgs)[0])
    parts = [gradients(model(*part)[0], model) for part in zip(imgs.chunk(4), noise.chunk(4))]
    assert_same(average(parts), gradients(loss, model))
    model(imgs, noise)[0].backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    vit = ViT(**{**VIT_SIZES["vit_micro"], "img_size": 32, "patch_size": 8})
    vit.load_state_dict(model.encoder_state_dict())
    assert torch.equal(vit.eval().features(imgs), model.features(imgs))
    with torch.autocast("cpu", torch.bfloat16):         # it has 8 bits: a hundredth. Losses stay in float32
        low, _ = model(imgs, noise)
    assert low.dtype == torch.float32 and 0 < abs(low.item() / loss.item() - 1) < 0.01


@pytest.mark.parametrize("name", SCRIPTS)
def test_removed_patches_cannot_be_seen(name):
    """Other pixels there change no prediction; visible ones do. Of several masks of an image the first is taken."""
    model = shake(build(name))
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)

    def predict(patches):
        results = model.reconstruct(mae.unpatchify(patches, 8, (4, 4)), noise)
        return [(x if results[1].ndim == 2 else x[:, 0]).nan_to_num() for x in results]
    patches = mae.patchify(imgs, 8)
    pred, mask = predict(patches)
    assert mask.shape == (2, 16) and set(mask.flatten().tolist()) == {0.0, 1.0} and pred.shape[:2] == (2, 16)
    assert torch.equal(predict(patches + mask[:, :, None] * torch.randn(2, 16, 192))[0], pred)
    assert not torch.equal(predict(patches + (1 - mask[:, :, None]) * torch.randn(2, 16, 192))[0], pred)


@pytest.mark.parametrize("name", SCRIPTS)
def test_encoder_is_timms(name, run_of):
    """encoder.pt has the trained weights and what timm's ViT has, no more, and timm computes the same features.
    finetune.py reads the same from last.pt, whatever a method keeps in it."""
    encoder, last = (torch.load(run_of(name) / file, weights_only=True) for file in ("encoder.pt", "last.pt"))
    assert all(group["betas"] == (0.9, 0.95) for group in last["optimizer"]["param_groups"])
    weights = finetune.load_encoder(run_of(name) / "last.pt")[0]
    assert weights.keys() == encoder["model"].keys()
    assert all(torch.equal(value, encoder["model"][key]) for key, value in weights.items())
    timm = pytest.importorskip("timm")
    peer = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=2, num_classes=0)
    peer.load_state_dict(encoder["model"])
    model = build(name).eval()
    model.load_state_dict(last["model"])
    imgs = torch.randn(3, 3, 32, 32)
    assert_same(model.features(imgs), peer.eval()(imgs))


@pytest.mark.parametrize("name", SCRIPTS)
def test_pictures(name):
    """Rows of images, the first of them as they are; the seed decides the masks."""
    model = shake(build(name))
    raw, rows = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), []
    for _ in range(2):
        torch.manual_seed(5)
        rows.append(model.picture(common.normalize(raw)))
    assert len(rows[0]) >= 3 and all(torch.equal(a, b) and a.shape == raw.shape for a, b in zip(*rows, strict=True))
    assert_same(rows[0][0], raw / 255)


@pytest.mark.parametrize("name, rows", [("mae", 3), ("efficient_mae", 3), ("robust_mae", 3), ("emae", 9)])
def test_pictures_of_pixels(name, rows):
    """Masked patches are grey (ImageNet's mean); in the next row the predictions are pasted there, with the mean and
    deviation of the original patch; those that Efficient MAE drops stay grey. EMAE has two rows for each part."""
    model = shake(build(name, *(["--beta", "5"] if name == "efficient_mae" else [])))
    mean, std = (torch.tensor(numbers).repeat(64) for numbers in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    shift, scale = mean, std            # of the space that targets are in
    if name == "robust_mae":
        shift, scale = model.patch_mean.uniform_(0.3, 0.6), (model.patch_var.uniform_(0.01, 0.1) + 1e-6).sqrt()
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(5)
    picture = model.picture(common.normalize(raw))
    torch.manual_seed(5)
    preds, masks = model.reconstruct(common.normalize(raw))
    original = mae.patchify(raw / 255, 8)
    target = (original - shift) / scale
    assert len(picture) == rows
    for part in range(rows // 2):
        pred, removed = (preds[:, part], masks[:, part]) if name == "emae" else (preds, masks)
        pred = (pred * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)) * scale + shift
        assert pred.isnan().any() == (name == "efficient_mae")
        masked = torch.where(removed[:, :, None] == 1, mean, original)
        pasted = torch.where((removed[:, :, None] == 1) & ~pred.isnan(), pred, masked)
        for row, expected in zip(picture[1 + 2 * part:], (masked, pasted)):
            assert_same(mae.patchify(row, 8), expected)


def test_pictures_of_sdae():
    """The cosines of target and prediction from red to green; the teacher's features by their first three principal
    components; the prediction by the same. Patches without a target are black."""
    model = shake(build("sdae", "--folds", "5"))
    imgs = torch.randn(3, 3, 32, 32)
    torch.manual_seed(5)
    rows = model.picture(imgs)
    torch.manual_seed(5)
    noise = torch.rand(3, 16)
    _, remove = mae.random_masking(noise, 4)
    ids = remove[:, :10, None]                                          # 5 folds of 2
    target = model.forward_teacher(mae.patchify(imgs, 8), remove)
    pred = model.reconstruct(imgs, noise)[0].take_along_dim(ids, dim=1)
    assert all(row.dtype == torch.uint8 for row in rows[2:])            # RGB, whatever channels --show names
    colours = [mae.patchify(row, 8).unflatten(2, (64, 3)) / 255 for row in rows[2:]]    # (N, L, pixels, 3)
    without = torch.ones(3, 16).scatter(1, ids[:, :, 0], 0.0) == 1
    assert all(not each[without].any() and torch.equal(each[:, :, :1].expand_as(each), each) for each in colours)
    red_green, features, predicted = (each[:, :, 0].take_along_dim(ids, dim=1) for each in colours)
    error = 1 - F.cosine_similarity(target, pred, dim=2)
    assert_same(red_green, torch.stack([error / error.max(), 1 - error / error.max(), 0 * error], dim=2), 2e-3)
    mean, flat = target.mean(dim=(0, 1)), target.flatten(0, 1)
    axes = torch.linalg.svd(flat - mean).Vh[:3].T                       # but for their signs
    for colour, x in ((features, target), (predicted, pred)):
        expected = (x - mean) @ axes / (4 * ((flat - mean) @ axes).std(dim=0))
        assert_same((colour - 0.5).abs(), expected.abs().clamp(max=0.5), 2e-2)      # in bytes


@pytest.mark.parametrize("name", SCRIPTS)
def test_not_square(name, folder, tmp_path):
    """Trained on and drawn at 24×32 pixels, evaluated at that size and at another."""
    module(name).main(module(name).get_args(small_args(folder, tmp_path / "out", "--img_size", "24", "32")))
    weights, vit, *_ = finetune.load_encoder(tmp_path / "out/encoder.pt")
    assert list(vit["img_size"]) == [24, 32] and weights["pos_embed"].shape == (1, 13, 128)
    for more, tokens in (([], 13), (["--img_size", "48", "40"], 31)):
        words = tune_args(folder, tmp_path / "out/encoder.pt", "linear", tmp_path / f"probe{tokens}", *more)
        assert finetune.main(finetune.get_args(words))["images"] == 21
        probe = torch.load(tmp_path / f"probe{tokens}/last.pt", weights_only=True)["model"]
        assert probe["pos_embed"].shape == (1, tokens, 128)


@pytest.mark.parametrize("command", [
    "mae --no-norm_pix --mask_ratio 0.5", "emae --parts 8", "emae --consistency_weight 0",
    "emae --parts 2 --consistency_weight 0 --no-norm_pix", "efficient_mae --beta inf --gamma 0",
    "efficient_mae --p2dist exact", "efficient_mae --beta 5 --no-norm_pix",
    "robust_mae --target none --no-norm_pix", "robust_mae --target rgb --drop_edge 0",
    "robust_mae --mid_ratio 0.25 --mid_depth 1", "sdae --teacher_input masked", "sdae --folds 5 --ema epoch",
    "sdae --teacher_input full --cosine_over features --drop_path 0",
    "sdae --teacher_input crop --teacher_tokens 3 --no-teacher_norm"])
def test_ablations_train(command, folder, tmp_path):
    """From the command line to a finite loss, weights that moved, and a picture."""
    name, *flags = command.split()
    words = small_args(folder, tmp_path, "--epochs", "1", "--warmup_epochs", "0", *flags)
    module(name).main(module(name).get_args(words))
    end = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    start = build(name, *flags)
    assert math.isfinite(json.loads((tmp_path / "log.jsonl").read_text())["loss"])
    assert all(value.isfinite().all() for value in end.values()) and (tmp_path / "reconstruction.png").exists()
    assert not any(torch.equal(p, end[key]) for key, p in start.named_parameters() if p.requires_grad and p.ndim > 1)


RECIPES = {  # model, epochs, batch size, peak rate, warm-up, crops from; and the method's own
    "mae": ("vit_base", 800, 4096, 2.4e-3, 40, 0.2, dict(mask_ratio=0.75, norm_pix=True)),
    "emae": ("vit_base", 300, 4096, 2.4e-3, 40, 0.2, dict(parts=4, consistency_weight=1.0, norm_pix=True)),
    "efficient_mae": ("vit_large", 800, 1024, 6e-4, 40, 0.2, dict(
        mask_ratio=0.85, norm_pix=True, gamma=0.6, beta=None, p2dist="approximate", difficulty="p2dist")),
    "robust_mae": ("vit_base", 800, 4096, 2.4e-3, 40, 0.5, dict(
        mask_ratio=0.75, norm_pix=True, drop_edge=0.3, target="patch", mid_ratio=0.0)),
    "sdae": ("vit_base", 300, 768, 8e-4, 60, 0.2, dict(
        mask_ratio=0.75, teacher_norm=True, teacher_input="folds", folds=3, drop_path=0.25, cosine_over="tokens")),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_papers(name):
    """They are the defaults."""
    args = module(name).get_args([])
    *general, own = RECIPES[name]
    assert [args.model, args.epochs, args.batch_size, module(name).learning_rate(args.warmup_epochs, args),
            args.warmup_epochs, args.crop_scale[0]] == pytest.approx(general)
    assert {key: getattr(args, key) for key in own} == own and args.crop_scale[1] == 1 and args.clip_grad is None
    assert (args.weight_decay, args.img_size, args.patch_size, args.in_chans) == (0.05, [224], 16, 3)
    assert (args.decoder_embed_dim, args.decoder_depth, args.decoder_num_heads) == (512, 8, 16)
    assert module(name).get_args(["--model", "vit_huge"]).patch_size == 14
    assert module(name).get_args(["--model", "vit_large"]).crop_scale == [0.2, 1.0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_demo(name, monkeypatch, tmp_path):
    """In a third of an epoch of --demo the loss falls, its targets and masks being the same."""
    monkeypatch.setattr(module(name), "load_dataset", lambda *_: Subset(common.Shapes("pretrain"), range(2000)))
    words = f"--demo --epochs 1 --warmup_epochs 0.1 --device cpu --output_dir {tmp_path}".split()
    args = module(name).get_args(words)
    assert (args.data, args.model, args.patch_size, args.batch_size) == ("shapes", "vit_micro", 4, 64)
    module(name).main(args)
    crops = common.Crops(common.Shapes("val"), common.train_transform(32, (0.5, 1.0)))
    imgs = common.normalize(torch.stack([crops[0, i][0] for i in range(64)]))
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    model, losses = module(name).build_model(args), []
    for weights in ({key: value for key, value in trained.items() if key in dict(model.named_buffers())}, trained):
        model.load_state_dict(weights, strict=False)    # first the statistics that Robust MAE's targets need
        torch.manual_seed(0)
        losses.append(model.eval()(imgs)[0].item())
    assert losses[1] < 0.6 * losses[0], losses


def test_learning_rate_and_weight_decay():
    """For mae.py; the guard holds the others' to the letter."""
    args = mae.get_args([])
    rates = [mae.learning_rate(epoch, args) for epoch in (0, 20, 40, 230, 420, 800)]
    quarter = 0.5 + 0.5 * math.cos(math.pi / 4)
    assert rates == pytest.approx([0, 1.2e-3, 2.4e-3, 2.4e-3 * quarter, 1.2e-3, 0], abs=1e-12)   # 1.5e-4 · 4096 / 256
    model = mae.MAE(**TINY)
    names, groups = {id(p): name for name, p in model.named_parameters()}, mae.param_groups(model, 0.05)
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "decoder_pred.weight"} <= decayed
    assert all(name.endswith("bias") or "norm" in name for name in rest)
    assert decayed | rest == set(names.values()) - {"pos_embed", "decoder_pos_embed"} and not decayed & rest


def test_every_mask_is_new(folder, tmp_path, monkeypatch):
    noises = []

    def spy(noise, len_keep, masking=mae.random_masking):
        noises.extend(noise.tolist())
        return masking(noise, len_keep)
    monkeypatch.setattr(mae, "random_masking", spy)
    mae.main(mae.get_args(small_args(folder, tmp_path, "--accum_iter", "2")))
    assert len({tuple(noise) for noise in noises[:48]}) == 48           # an epoch: 3 steps of 2 parts of 8 images


# ---------------------------------------------------------------------------------------------------------------------
# What one method alone has
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("P", [2, 4, 8, 14, 16])
def test_the_least_beta_leaves_patches_to_predict(P):
    """A patch beside a visible one, in whichever direction, is within P/2 + 1 pixels, by both distances."""
    for grid, keep in itertools.product([(1, 2), (2, 1)], [0, 1]):
        for p2dist in (efficient_mae.p2dist_approximate, efficient_mae.p2dist_exact):
            assert p2dist(torch.tensor([[keep]]), torch.tensor([[1 - keep]]), grid, P).item() <= P / 2 + 1


@pytest.mark.parametrize("img_size, images", [(64, 20), (96, 16)])
@torch._dynamo.config.patch(capture_scalar_outputs=True)        # as main does
def test_efficient_mae_compiles_once(img_size, images):
    """Masks, and how many patches they leave, differ from batch to batch: once two packed lengths were seen, nothing is
    compiled anew. The two sizes take the two routes of its attention."""
    model = shake(efficient_mae.EfficientMAE(**{**TINY, "img_size": img_size})).train()
    noises = sorted((torch.rand(images, model.num_patches) for _ in range(20)),
                    key=lambda noise: model.decoder_masking(noise)[3].sum().item())
    batches = [(torch.randn(images, 3, img_size, img_size), noises[i]) for i in (0, 19, 10, 5, 1, 18, 12, 2, 17, 7)]
    with torch.no_grad():
        expected = [model(*batch) for batch in batches]
    packed = [int(stats["predicted_patches"] * images) // 32 for _, stats in expected]
    assert len(set(packed[:4])) > 1 and len(set(packed[4:])) > 1, packed
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile(backend="eager")
    graphs = []
    for batch, (loss, _) in zip(batches, expected):
        ours = model(*batch)[0]
        ours.backward()
        assert ours.item() == about(loss.item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[3] == graphs[-1], graphs


def test_drop_edge_is_in_the_decoder_in_training_alone():
    model = shake(robust_mae.RobustMAE(**TINY))
    assert {block.attn.attn_drop for block in model.decoder_blocks} == {0.3}
    assert {block.attn.attn_drop for block in model.blocks} == {0.0}
    patches = mae.patchify(torch.randn(4, 3, 32, 32), 8)
    keep, remove = mae.random_masking(torch.rand(4, 16), 4)
    for training in (False, True):
        model.train(training)
        latent, again = (model.forward_encoder(patches, keep, remove) for _ in range(2))
        assert torch.equal(latent, again)
        pred, again = (model.forward_decoder(latent, keep, remove) for _ in range(2))
        assert torch.equal(pred, again) != training


def test_patch_statistics_are_gathered_once(folder, tmp_path, monkeypatch):
    """The checkpoint has them for a run that resumes; another target needs none."""
    calls = []

    def spy(*arguments, gather=robust_mae.patch_statistics):
        calls.append(gather(*arguments))
        return calls[-1]
    monkeypatch.setattr(robust_mae, "patch_statistics", spy)
    for more in ([], [], ["--target", "rgb", "--no_resume"]):
        robust_mae.main(robust_mae.get_args(small_args(folder, tmp_path, *more)))
        saved = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
        mean, var = (torch.zeros(192), torch.ones(192)) if more else calls[0]
        assert len(calls) == 1
        assert_same(torch.stack([saved["patch_mean"], saved["patch_var"]]), torch.stack([mean, var]), 1e-6)


@pytest.mark.parametrize("ema, steps", [("epoch", [2, 5]), ("iteration", range(6))])
def test_sdae_updates_its_teacher_when_it_says(ema, steps, folder, tmp_path, monkeypatch):
    """After the optimiser's step, with the momentum of the command line; before the first step the teacher is made the
    student's copy (momentum 0), for --init_from."""
    etas, students = [], []

    def spy(self, momentum):
        etas.append(momentum)
        students.append(self.blocks[0].mlp.fc1.weight.detach().clone())
    monkeypatch.setattr(sdae.SdAE, "update_teacher", spy)
    args = sdae.get_args(small_args(folder, tmp_path, *f"--ema {ema} --momentum 0.9 0.95 --warmup_epochs 0".split()))
    sdae.main(args)
    assert etas == [0.0, *(sdae.momentum(step, 3, args) for step in steps)] and etas[1] == pytest.approx(0.9)
    assert not any(torch.equal(a, b) for a, b in zip(students, students[1:]))
    last = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert torch.equal(students[-1], last["blocks.0.mlp.fc1.weight"])


def test_sdae_teacher_after_init_from(folder, tmp_path, pretrained):
    """It is a copy of the weights given. (A rate of 1e-30 moves nothing.)"""
    words = small_args(folder, tmp_path, "--init_from", pretrained / "encoder.pt", "--blr", "1e-30")
    sdae.main(sdae.get_args(words))
    last, given = (torch.load(path, weights_only=True)["model"]
                   for path in (tmp_path / "last.pt", pretrained / "encoder.pt"))
    assert all(torch.allclose(last[f"teacher.{name}"], value) for name, value in given.items())


# ---------------------------------------------------------------------------------------------------------------------
# The Vision Transformer
# ---------------------------------------------------------------------------------------------------------------------
def test_public_names_and_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in mae.MAE().state_dict().items()}
    assert shapes["patch_embed.proj.weight"] == (768, 3, 16, 16) and shapes["pos_embed"] == (1, 197, 768)
    assert shapes["mask_token"] == (1, 1, 512) and shapes["decoder_pred.weight"] == (768, 512)
    layers = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    layers += [f"{blocks}.i.{part}" for blocks in ("blocks", "decoder_blocks")
               for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    expected |= {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    assert {re.sub(r"\.\d+\.", ".i.", name) for name in shapes} == expected


def test_positions():
    """Column first, then row; each [sin | cos] of the position · 10000^(-i/(D/4)); a zero row for cls; not trained."""
    pos = ViT(img_size=(24, 40), patch_size=8, embed_dim=16, depth=1, num_heads=2).pos_embed
    assert not pos.requires_grad and not pos[0, 0].any() and pos.shape == (1, 16, 16)
    for patch in range(15):
        row, column = divmod(patch, 5)
        expected = [f(p * 10000 ** (-i / 4)) for p in (column, row) for f in (math.sin, math.cos) for i in range(4)]
        assert pos[0, 1 + patch].tolist() == pytest.approx(expected, abs=1e-6)


def test_initialisation():
    """Xavier-uniform, qkv and the patch embedding as one matrix each; no biases; tokens normal."""
    for name, p in mae.MAE(depth=2, decoder_depth=2).named_parameters():
        if p.ndim == 2 or name == "patch_embed.proj.weight":
            rows, columns = p.flatten(1).shape
            assert p.var().item() == pytest.approx(2 / (rows + columns), rel=0.02), name
            assert p.abs().max().item() == pytest.approx(math.sqrt(6 / (rows + columns)), rel=0.001), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not p.any(), name
        elif name.endswith("token"):
            assert 0.015 < p.std() < 0.025, name


def test_patches():
    imgs = torch.randn(2, 3, 16, 24)
    patches = mae.patchify(imgs, 8)
    assert patches.shape == (2, 6, 192)
    assert patches[1, 4, (3 * 8 + 5) * 3 + 2] == imgs[1, 2, 8 + 3, 8 + 5]               # row, column, channel
    assert torch.equal(mae.unpatchify(patches, 8, (2, 3)), imgs)
    embed = common.PatchEmbed(8, 16)
    assert_same(embed(patches), embed(imgs))


@pytest.mark.parametrize("img_size, ratio, keep", [(224, 0.75, 49), (224, 0.85, 29), (224, 0.90, 19), (224, 0.95, 9),
                                                   (224, 13 / 14, 14), (256, 0.75, 64)])
def test_masks(img_size, ratio, keep):
    """The least noise stays visible; over many masks, every patch alike (with a standard deviation of 2 to 4 %)."""
    with torch.device("meta"):
        model = mae.MAE(img_size=img_size, mask_ratio=ratio)
    assert model.len_keep == keep
    noise = torch.rand(8000, model.num_patches)
    ids_keep, ids_remove = mae.random_masking(noise, keep)
    assert torch.equal(torch.cat([ids_keep, ids_remove], dim=1), noise.argsort(dim=1)) and ids_keep.shape[1] == keep
    kept = ids_keep.flatten().bincount() / (8000 * keep / model.num_patches)
    assert 0.75 < kept.min() and kept.max() < 1.25


def test_attention():
    """softmax(q kᵀ / √d) v, in both of its routes; dropout leaves a share of the probabilities, and their mean."""
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    for mask in (None, torch.rand(2, 1, 1, 9) < 0.7):
        scores = q @ k.mT / math.sqrt(8)
        expected = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(dim=3) @ v
        assert_same(common.attention(q, k, v, mask=mask), expected)
        low = common.attention(*(x.bfloat16() for x in (q, k, v)), mask=mask)           # bf16 on a CPU
        assert low.dtype == torch.bfloat16
        assert_same(low, expected, 0.03)
    for dtype in (torch.float32, torch.bfloat16):
        zeros = torch.zeros(64, 4, 9, 8, dtype=dtype)                   # all probabilities are 1/9
        kept = common.attention(zeros, zeros, torch.ones_like(zeros), 0.3).float()
        assert kept.mean().item() == pytest.approx(1, abs=0.05) and kept.std() > 0.1


def test_drop_path():
    """Rates rise linearly; in training a branch is left out for a whole image, and else scaled up; never elsewhere."""
    vit, imgs = ViT(**ENCODER, drop_path=0.4), torch.randn(64, 3, 32, 32)
    assert [block.drop_path.p for block in vit.blocks] == pytest.approx([0, 0.2, 0.4])
    assert torch.equal(vit.eval().features(imgs), vit.features(imgs))
    assert not torch.equal(vit.train().features(imgs), vit.features(imgs))
    branch = vit.blocks[2].drop_path(torch.ones(1000, 3, 4))
    assert torch.equal(branch, branch[:, :1, :1].expand_as(branch)) and 0.55 < (branch > 0).float().mean() < 0.65
    assert sorted(set(branch.flatten().tolist())) == pytest.approx([0, 1 / 0.6])


# ---------------------------------------------------------------------------------------------------------------------
# The guard: what a script shares with mae.py is the same to the letter
# ---------------------------------------------------------------------------------------------------------------------
def blocks_of(text):
    """A script's blocks, in order: {name: (its lines that are not blank, the last line of its signature)}. Comments
    above a block belong to it. The model is cut into its methods, "model.forward" for one."""
    lines, tree, nodes = text.splitlines(), ast.parse(text), []
    for node in tree.body[1:]:
        if isinstance(node, ast.ClassDef) and "ViT" in map(ast.unparse, node.bases):
            nodes.append(("model", node, node.body[0]))
            nodes += [(f"model.{getattr(part, 'name', 'attributes')}", part, part) for part in node.body[1:]]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            nodes.append((node.name, node, node))
        elif isinstance(node, ast.Assign):
            nodes.append((ast.unparse(node.targets[0]), node, node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            nodes.append(("imports", None, node))
        else:                               # such as DEMO.update(…): part of the block before it
            nodes.append(("main guard" if isinstance(node, ast.If) else nodes[-1][0], None, node))
    blocks, end = {}, tree.body[0].end_lineno
    for name, start, node in nodes:
        signature = lines[start.lineno - 1:] if start else [""]
        if hasattr(start, "body"):          # it may go over several lines
            signature = [line for line in signature if line.split("  #")[0].endswith(":")]
        block, _ = blocks.setdefault(name, ([], signature[0]))
        block += [line for line in lines[end:node.end_lineno] if line.strip()]
        end = node.end_lineno
    return blocks


def changes(theirs, ours, tagged):
    """Lines by which a block differs: those added without a tag, and those lost, unless a tagged line that resembles
    one has taken its place."""
    wrong = []
    for kind, i, j, k, n in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        added = ours[k:n] if kind != "equal" else []
        wrong += [line for line in added if not tagged.search(line)]
        for lost in theirs[i:j] if kind != "equal" else []:
            likeness = [difflib.SequenceMatcher(None, lost.strip(), line.strip()).ratio() for line in added]
            if max(likeness, default=0) < 0.4:
                wrong.append(lost)
            else:
                added = [line for line, ratio in zip(added, likeness) if ratio < max(likeness)]
    return wrong


def guard(base, text, name):
    """What is wrong with the script `name`, beside mae.py's text `base`: messages, each with its remedy.

    A block that mae.py has under the same name must be mae.py's, but for lines that carry the script's tag, each added
    or in the place of one of mae.py's. The tag is `# ` and the first word of the script's docstring. A block is the
    script's own where the last line of its signature carries the tag.
    """
    tag = "# " + re.match(r"\w+", ast.get_docstring(ast.parse(text)))[0]
    tagged = re.compile(rf"  {tag}(:|$)")
    theirs, ours, wrong = blocks_of(base), blocks_of(text), []
    make_own = f"put `{tag}` at the end of its def or class line"
    for block, (lines, signature) in ours.items():
        known, _ = theirs.get(block, ([], ""))
        if tagged.search(signature):
            if [line.removesuffix(f"  {tag}") for line in lines] == known:
                wrong.append(f"{block} carries `{tag}` but is as in mae.py: remove the tag")
        elif not known:
            wrong.append(f"{block} is not in mae.py: if the method needs it, {make_own}")
        else:
            wrong += [f"{block} is not as in mae.py: {line.strip()!r}. Make it so, or end a line that is added or "
                      f"changed with `{tag}: why`, or, if little is left of mae.py's, {make_own}"
                      for line in changes(known, lines, tagged)]
    wrong += [f"{block} is missing: copy it from mae.py" for block in ("imports", "main guard") if block not in ours]
    shared = zip((block for block in ours if block in theirs), (block for block in theirs if block in ours))
    moved = [f"{here} comes where mae.py has {there}: keep mae.py's order" for here, there in shared if here != there]
    return [f"{name}.py: {message}" for message in wrong + moved[:1]]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "mae"])
def test_guard(name):
    wrong = guard((ROOT / "mae.py").read_text(), (ROOT / f"{name}.py").read_text(), name)
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_guard_sees():
    """A sixth script is mae.py under another name; each of these changes to it is allowed, or found."""
    base = (ROOT / "mae.py").read_text()
    sixth = base.replace('"""MAE: ', '"""Sixth: ', 1)
    step, scale = "            optimizer.zero_grad()\n", "            scaler.update()\n"
    rate, groups = (re.search(rf"def {name}.*?\n\n\n", base, re.S)[0] for name in ("learning_rate", "param_groups"))
    own = groups.replace("):\n", "):  # Sixth\n", 1)

    def said(old, new):
        assert sixth.count(old) == 1
        return guard(base, sixth.replace(old, new), "sixth")
    for old, new in (
            (step, step), (step, step + "            model.follow()  # Sixth: Eq. 7\n"),
            (step, "            optimizer.zero_grad(set_to_none=False)  # Sixth: Section 3\n"),
            (groups, own.replace("p.ndim > 1", "True")), (groups, groups + "def helper():  # Sixth\n    pass\n\n\n"),
            ("class MAE(ViT):\n", "class Other:  # Sixth\n    pass\n\n\nclass Sixth(ViT):  # Sixth\n")):
        assert said(old, new) == [], new
    not_as = "sixth.py: main is not as in mae.py: "
    for old, new, message in (
            (step, "", f"{not_as}'optimizer.zero_grad()'. Make it so, or end a line that is added or changed with `#"
             " Sixth: why`, or, if little is left of mae.py's, put `# Sixth` at the end of its def or class line"),
            ("betas=(0.9, 0.95)", "betas=(0.9, 0.999)", f"{not_as}'optimizer = torch.optim"),
            ("# all-reduce once", "# reduce once", f"{not_as}'net.require_backward_grad_sync"),
            (step, step + "            model.follow()\n", f"{not_as}'model.follow()'"),
            (step, step + "            model.follow()  # EMAE\n", f"{not_as}'model.follow()  # EMAE'"),
            (step, "            self.w += 1  # Sixth\n", f"{not_as}'optimizer.zero_grad()'"),
            (scale + step, "            optimizer.zero_grad()  # Sixth\n", f"{not_as}'scaler.update()'"),
            ("        x = self.decoder_embed(latent)\n", "", "model.forward_decoder is not as in mae.py: 'x = self."),
            ("import math\n", "import math\nimport time\n", "imports is not as in mae.py: 'import time'"),
            (groups, own, "sixth.py: param_groups carries `# Sixth` but is as in mae.py: remove the tag"),
            (groups, groups + "def helper():\n    pass\n\n\n", "helper is not in mae.py: if the method needs it, put"),
            (rate + groups, groups + rate, "param_groups comes where mae.py has learning_rate: keep mae.py's order"),
            (base[base.index("\nif __name__"):], "\n", "main guard is missing: copy it from mae.py")):
        assert any(message in each for each in said(old, new)), (new, said(old, new))


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def test_shapes():
    """They are the same on every machine, and no pixel and no colour gives the class away: a linear classifier on raw
    pixels, ridge regression in closed form, stays below 40 %."""
    sums = [common.draw_shape(pattern, np.random.RandomState([7, i])).astype(int).sum()
            for i, pattern in enumerate(common.Shapes.classes)]
    assert sums == [408294, 174156, 189226, 242209, 160996, 163017, 194155, 234468]
    train, val = (common.load_dataset("shapes", split) for split in ("pretrain", "val"))
    img, label = val[0]
    assert (len(train), len(val), img.shape, img.dtype, label) == (6000, 2000, (3, 36, 36), torch.uint8, val.labels[0])
    assert np.bincount(val.labels).min() > 200 and len(val.classes) == 8
    x, y = (torch.from_numpy(each.images.reshape(len(each), -1)).float() / 255 for each in (train, val))
    x, y = (F.pad(each - x.mean(dim=0), (1, 0), value=1.0) for each in (x, y))
    gram, moment = x.T @ x, x.T @ F.one_hot(torch.from_numpy(train.labels)).float()
    for ridge in (1.0, 10.0, 100.0, 1000.0):
        scores = y @ torch.linalg.solve(gram + ridge * torch.eye(len(gram)), moment)
        assert (scores.argmax(dim=1).numpy() == val.labels).mean() < 0.40


def batches_of(folder, num_workers=0, context=None, **plan):
    """Two epochs of 3 batches of 16, in the shares that `plan` says."""
    crops = common.Crops(common.load_dataset(str(folder), "pretrain"), common.train_transform(32, (0.2, 1.0)), seed=3)
    batches = common.GlobalBatches(len(crops), 16, epochs=2, seed=3, **plan)
    return list(DataLoader(crops, batch_sampler=batches, num_workers=num_workers, multiprocessing_context=context,
                           collate_fn=crops.collate))


def test_images_depend_on_seed_epoch_and_index_alone(folder):
    """Not on workers, nor on how a batch is shared among processes and parts, nor on where a run resumes."""
    plain = batches_of(folder)
    assert len(plain) == 6 and plain[0][0].shape == (16, 3, 32, 32) and plain[0][0].dtype == torch.uint8
    assert not torch.equal(plain[0][0], plain[3][0])                    # another epoch, other crops
    for workers, context in ((1, "spawn"), (2, None)):
        for (a, labels, _), (b, their_labels, _) in zip(plain, batches_of(folder, workers, context), strict=True):
            assert torch.equal(a, b) and torch.equal(labels, their_labels)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches_of(folder, start_step=4), plain[4:], strict=True))
    for world_size, accum_iter in ((2, 1), (4, 2), (1, 4)):
        shares = [batches_of(folder, rank=rank, world_size=world_size, accum_iter=accum_iter)
                  for rank in range(world_size)]
        for step in range(6):
            parts = itertools.product(range(accum_iter), range(world_size))
            batch = torch.cat([shares[rank][step * accum_iter + part][0] for part, rank in parts])
            assert torch.equal(batch, plain[step][0])
    indices = sum(common.GlobalBatches(200, 99, epochs=2), [])          # what fills no batch is left out
    assert [epoch for epoch, _ in indices] == [0] * 198 + [1] * 198
    assert len(set(indices)) == 396 and indices[:198] != [(0, index) for _, index in indices[198:]]
    for world_size in (1, 2, 3, 5):     # in evaluation every image is in one process's share
        shares = [sum(common.eval_batches(23, 4, rank, world_size), []) for rank in range(world_size)]
        assert sorted(sum(shares, [])) == [(0, index) for index in range(23)]


def test_seeds():
    """Other numbers, or another count of them, make another seed; loading leaves torch's generator alone."""
    seeds = [common.seed_from(*numbers) for numbers in ((0, 5), (0, 5, 0), (0, 5, 0, 0), (5, 0), (0, 6), (1, 5))]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**63 for seed in seeds) and seeds[0] == common.seed_from(0, 5)
    source, transform = [(pil_to_tensor(photo()), 0)], common.train_transform(32, (0.2, 1.0))
    before = torch.get_rng_state()
    crops = [common.Crops(source, transform, seed)[0, 0][0] for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])


def test_crops_are_torchvisions():
    """With the same seed the same crop and flip as torchvision's on PIL images; pixels but for rounding."""
    v1, transform, means = torchvision.transforms, common.train_transform((64, 96), (0.2, 1.0)), []
    usual = v1.Compose([v1.RandomResizedCrop((64, 96), (0.2, 1.0), interpolation=v1.InterpolationMode.BICUBIC),
                        v1.RandomHorizontalFlip(), v1.PILToTensor()])
    for seed in range(30):
        noisy = np.asarray(photo(seed, (230, 180))) + np.random.normal(0, 9, (180, 230, 3))
        img = Image.fromarray(np.uint8(np.clip(noisy, 0, 255)))
        torch.manual_seed(seed)
        expected = usual(img)
        torch.manual_seed(seed)
        got = transform(pil_to_tensor(img))
        assert got.shape == (3, 64, 96) and got.dtype == torch.uint8
        means.append((got.float() - expected.float()).abs().mean().item())
    assert max(means) < 0.5
    ramp = torch.linspace(0, 255, 256).byte().expand(3, 256, 256)       # brighter to the right
    rows = torch.stack([common.train_transform(32, (0.2, 1.0))(ramp)[0, 16].float() for _ in range(1000)])
    width = (rows[:, -1] - rows[:, 0]).abs() / 255                      # √(area · ratio) of those crops that fit
    assert 0.44 < (rows[:, 0] > rows[:, -1]).float().mean() < 0.56 and 0.68 < width.mean() < 0.74


@pytest.mark.parametrize("size, resized, box", [
    (224, (295, 256), (36, 16, 260, 240)), (384, (443, 384), (30, 0, 414, 384)), ((32, 48), (62, 54), (7, 11, 55, 43))])
def test_evaluation_crop(size, resized, box):
    """224/256 of the shorter side, and above 224 pixels all of it; Pillow's bicubic. (256 · 300/260 = 295)"""
    img = photo(size=(300, 260))
    expected = np.asarray(img.resize(resized, Image.Resampling.BICUBIC).crop(box))
    assert np.array_equal(common.eval_transform(size)(pil_to_tensor(img)).permute(1, 2, 0), expected)


def test_normalize():
    """As torchvision's for RGB bytes; other channels, and floats in their own units."""
    imgs = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = torchvision.transforms.v2.functional.normalize(imgs / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert_same(common.normalize(imgs), expected, 1e-6)
    assert_same(common.denormalize(expected), imgs / 255, 1e-6)
    mean, std, x = [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8], 9 * torch.rand(2, 4, 4, 5)
    expected = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert_same(common.normalize(x, mean, std), expected, 1e-6)
    assert_same(common.denormalize(expected, mean, std), x, 1e-6)


@pytest.mark.parametrize("mode, suffix, error", [
    ("L", "png", 0), ("1", "png", 0), ("P", "png", 3), ("RGBA", "png", 0), ("LA", "png", 0), ("CMYK", "jpg", 8),
    ("CMYK", "tif", 0), ("L", "jpg", 8), ("RGB", "webp", 8), ("RGB", "bmp", 0), ("RGB", "jpeg", 8)])
def test_kinds_of_images(mode, suffix, error, tmp_path):
    """All are read as 8-bit RGB; lossy formats lose a little."""
    img = photo(1, (40, 30)).convert(mode)
    path = str(tmp_path / f"image.{suffix}")
    img.save(path)
    ours = common.load_image(path)
    assert ours.shape == (3, 30, 40) and ours.dtype == torch.uint8
    if mode in ("L", "1", "P", "LA"):       # greyscale files, also as one channel
        assert common.load_image(path, 1).shape == (1, 30, 40)
    assert (ours.float() - pil_to_tensor(img.convert("RGB")).float()).abs().mean() <= error


def test_images_are_turned_upright(tmp_path):
    """As EXIF's eight orientations say; a ninth says nothing."""
    turn, upright, exif = Image.Transpose, photo(1, (40, 30)), Image.Exif()
    for orientation, turned in enumerate((None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM,
                                          turn.TRANSPOSE, turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270, None), 1):
        exif[0x0112] = orientation
        stored = upright if turned is None else upright.transpose(turned)
        stored.save(tmp_path / "turned.png", exif=exif)
        assert torch.equal(common.load_image(str(tmp_path / "turned.png")), pil_to_tensor(upright)), orientation


def test_images_that_are_refused(tmp_path):
    """More than 8 bits, and no image at all, by the file's name; a transparent palette is read without a warning."""
    photo(1).convert("P").save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert common.load_image(str(tmp_path / "palette.png")).shape == (3, 40, 48)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(np.zeros((30, 40), np.uint16)).save(tmp_path / name)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "text.jpg").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "palette.png").read_bytes()[:300])
    for name in ("deep.png", "deep.tif", "float.tif", "text.jpg", "cut.png", "none.jpg"):
        deep = ".*more than 8 bits" if name[0] in "df" else ""
        with pytest.raises(InputError, match=name + deep):
            common.load_image(str(tmp_path / name))


def test_folders(folder, tmp_path, monkeypatch):
    """With train/ and val/, with classes, flat and deep; what is no image, hidden or a run's own does not count."""
    def load(root, split="pretrain"):
        return common.load_dataset(str(root), split)

    def put(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            photo(len(name)).save(tmp_path / name)
    train, val, classes = load(folder, "train"), load(folder, "val"), load(folder / "val")      # of classes alone
    assert (len(train), len(val), len(classes)) == (48, 21, 21)
    assert train.classes == val.classes == classes.classes == [f"class {i} é" for i in range(3)]
    assert train[20][0].shape == (3, 40, 48) and [label for _, label in train] == sorted([*range(3)] * 16)
    assert isinstance(train.paths, np.ndarray) and train.paths.dtype.kind == "S"        # workers share its memory
    put("flat/0.PNG", "flat/1.png", "flat/2.jpg", "flat/.hidden/3.png", "flat/.4.png", "flat/reconstruction.png")
    (tmp_path / "flat/notes.txt").write_text("no image")
    assert len(load(tmp_path / "flat")) == 3 and load(tmp_path / "flat").classes is None
    assert load(tmp_path / "flat")[1][1] == -1
    put("flat/more/deep/9.png")
    for name, target in (("flat/loop", "."), ("flat/more/up", "..")):   # links that lead back are not followed
        (tmp_path / name).symlink_to(target)
    deep = load(tmp_path / "flat")
    assert len(deep) == 4 and deep.classes is None and deep.stray.endswith("0.PNG")
    put("named/train/0.png", "named/plane/0.png")       # train/ is a class here; with val/ it is the split
    assert load(tmp_path / "named").classes == ["plane", "train"]
    put("named/val/train/0.png")
    assert len(load(tmp_path / "named")) == 1
    (tmp_path / "empty").mkdir()
    for name, split, message in (("flat", "val", "no folder val/"), ("empty", "train", "no image of 3 channel"),
                                 ("nowhere", "val", "no data at")):
        with pytest.raises(InputError, match=message):
            load(tmp_path / name, split)

    def refuse(path, scandir=os.scandir):               # root may list anything
        if str(path).endswith("class 1 é"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="class 1 é' cannot be listed: Permission denied"):
        load(folder)


def test_what_a_run_trains_on(folder, tmp_path):
    """As checkpoints note it: the same for a folder that was moved, another for another name; else a number."""
    def inventory(root):
        return common.inventory(common.FolderDataset(str(root)))
    for path in (folder / "train").rglob("*.png"):
        copy = tmp_path / "moved" / path.relative_to(folder / "train")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    moved = inventory(tmp_path / "moved")
    assert moved == inventory(folder / "train") and re.fullmatch(r"48 \(\w{12}\)", moved)
    copy.rename(copy.parent / "new.png")
    assert inventory(tmp_path / "moved") != moved and common.inventory(common.Shapes("val")) == "2000"


def test_a_folder_has_one_type(tmp_path):
    """8 bits are scaled to 0 to 1 and 16 are not, so they must not meet in one run."""
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "b.png")
    dataset = common.FolderDataset(str(tmp_path), in_chans=1)
    assert dataset[0][0].dtype == torch.uint8
    with pytest.raises(InputError, match="b.png' is torch.float32, and .*a.png' torch.uint8"):
        dataset[1]


def test_pictures_of_a_small_folder(tmp_path):
    for i in range(3):
        photo(i).save(tmp_path / f"{i}.png")
    imgs = visualize.load_images([str(tmp_path)], 64, 32)
    assert len(imgs) == 3 and len(imgs.unique(dim=0)) == 3


@pytest.mark.parametrize("name", common.TORCHVISION_DATASETS)
def test_named_datasets(name, monkeypatch, tmp_path):
    """Each calls its real class with arguments that its signature takes, and asks for the download."""
    class_name, keyword, pretrain, train, val = common.TORCHVISION_DATASETS[name]
    real, calls = getattr(torchvision.datasets, class_name), []

    class Stub(list):
        classes = ["a", ("b", "a synonym")]

        def __init__(self, root, download=False, **split):
            super().__init__((photo(i, mode="L"), i % 2) for i in range(5))
            inspect.signature(real).bind(root, download=download, **split)
            calls.append((root, download, split))
    monkeypatch.setattr(torchvision.datasets, class_name, Stub)
    if name == "imagenette":
        with pytest.raises(InputError, match="not whole"):
            common.load_dataset(name, "train", str(tmp_path))
        monkeypatch.setattr(common, "IMAGENETTE", {"train": 5, "val": 5})
    for split, parts in (("pretrain", pretrain), ("train", train), ("val", [val])):
        calls.clear()
        dataset = common.load_dataset(name, split, str(tmp_path))
        assert calls == [(str(tmp_path), True, {keyword: part}) for part in parts]
        assert len(dataset) == 5 * len(parts) and dataset[1][0].shape == (3, 40, 48) and dataset[1][1] == 1
        assert dataset.classes == (None if split == "pretrain" else ["a", "b"])

    def no_network(root, **_):
        raise OSError("Network is unreachable")
    monkeypatch.setattr(torchvision.datasets, class_name, no_network)
    with pytest.raises(InputError, match=f"{name}.*could not be downloaded.*Network"):
        common.load_dataset(name, "train", str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------------
WORDS = {  # refused by argparse, which says what is allowed
    r"is not in [\[(]": """
        mae --img_size 0, mae --crop_scale 0 1, mae --crop_scale 0.2 1.1, mae --num_workers -1, mae --skip_bad -1,
        mae --patch_size 0, mae --decoder_embed_dim 0, mae --decoder_depth 0, mae --decoder_num_heads 0,
        mae --mask_ratio 0, mae --mask_ratio 1, mae --mask_ratio nan, mae --epochs 0, mae --warmup_epochs -1,
        mae --warmup_epochs nan, mae --batch_size 0, mae --accum_iter 0, mae --blr 0, mae --blr inf, mae --blr nan,
        mae --weight_decay -0.1, mae --clip_grad 0, mae --save_minutes 0, mae --save_minutes nan, mae --seed -1,
        mae --seed 4294967296, mae --in_chans 0, mae --std 0, mae --keep_every 0, emae --parts 1,
        emae --consistency_weight -1, efficient_mae --gamma -0.1, efficient_mae --gamma inf, efficient_mae --beta 0,
        efficient_mae --beta nan, robust_mae --drop_edge 1, robust_mae --mid_ratio nan, robust_mae --mid_depth -1,
        sdae --folds 0, sdae --teacher_tokens 0, sdae --momentum 0.9 1, sdae --drop_path 1, finetune --blocks -1,
        finetune --epochs 0, finetune --blr -1, finetune --min_lr nan, finetune --layer_decay 1.1,
        finetune --drop_path 1, finetune --smoothing 1, finetune --erasing 1.5, finetune --mixup -1,
        finetune --cutmix -1, finetune --k 0, finetune --temperature 0""",
    "invalid choice": "mae --model vit_giant, mae --device tpu, mae --amp fp8, efficient_mae --p2dist fast, "
                      "efficient_mae --difficulty 7x7, "
                      "robust_mae --target mean, sdae --ema never, finetune --mode probe, finetune --pool max",
    "unrecognized arguments": "mae --epoch 3, mae --parts 4, emae --mask_ratio 0.75, sdae --norm_pix, "
                              "finetune --norm_pix",
    "invalid (int|float) value": "mae --img_size big, mae --epochs 1e3, mae --skip_bad 0.5, mae --mask_ratio 75%",
}
REFUSED = """
mae --img_size 30: 30×30 pixels is not a whole number of patches of 8
mae --img_size 32 32 32: an image size is one number or two, not 3
mae --crop_scale 0.9 0.2: from 0.9 to 0.2 of the area: the first must not be the larger
mae --crop_scale 0.2: --crop_scale: expected 2 arguments
mae --data nowhere: no data at 'nowhere'
mae --data shapes --in_chans 4: 'shapes' has RGB images, and in_chans is 4
mae --mean 0.5: --mean takes 3 numbers, one a channel
mae --mean nan 0 0: argument --mean: nan is not in (-inf, inf)
finetune --std 0.5: --std takes 3 numbers, one a channel
mae --show 0 1 3: --show 0 1 3: images have the channels 0 to 2
mae --in_chans 4: no image of 4 channel(s)
mae --init_from nothing.pt: no checkpoint at 'nothing.pt'
mae --patch_size 64: is not a whole number of patches of 64
mae --decoder_embed_dim 34: a width of 34 must be divisible by 4
mae --decoder_num_heads 3: a width of 32 must be divisible by 4 (positions) and by the 3 heads
mae --mask_ratio 0.99: mask_ratio 0.99 must keep and remove at least one of 16 patches
mae --epochs: --epochs: expected one argument
mae --warmup_epochs 2: --warmup_epochs 2 must be less than --epochs 2
mae --batch_size 64: 48 images are fewer than one batch of 64
mae --batch_size 10 --accum_iter 3: a batch of 10 images cannot be shared equally by 1 process(es) × 3 accumulated
emae --parts 3: 3 parts must divide 16 patches
emae --parts 2: 2 need consistency_weight 0
efficient_mae --beta 4.9: beta must be at least 5 pixels
efficient_mae --patch_size 32 --img_size 128 --beta 17: beta must be at least 17.46 pixels
mae_ablations --components 24: --components needs --target pca
mae_ablations --augmentation fixed --crop_scale 0.5 1: --crop_scale: --augmentation fixed takes no random area
efficient_mae --difficulty nearest --p2dist exact: p2dist exact is for --difficulty p2dist
efficient_mae --mask_ratio 0.95: mask_ratio 0.95 must keep and remove at least one of 16
efficient_mae --img_size 8 --patch_size 1: patch_size at least 2
efficient_mae --difficulty nearest --beta 8: beta bounds P²Dist: leave it out with --difficulty nearest
robust_mae --mid_ratio 0.8: mid_ratio must be 0, or from one patch, 1/16, to mask_ratio
robust_mae --mid_ratio 0.01: mid_ratio must be 0, or from one patch, 1/16
robust_mae --mid_ratio 0.25 --mid_depth 4: mid_depth needs mid_ratio, and is from 0 to 3
robust_mae --mid_depth 2: mid_depth needs mid_ratio
sdae --folds 13: 12 removed patches: a fold takes 2 to 12, not 0
sdae --folds 12: a fold takes 2 to 12, not 1
sdae --folds 2 --teacher_input full: --folds needs --teacher_input folds
sdae --teacher_tokens 5: --teacher_tokens needs --teacher_input crop
sdae --teacher_input crop --teacher_tokens 13: a fold takes 2 to 12, not 13
sdae --mask_ratio 0.99: mask_ratio 0.99 must keep and remove at least one of 16
sdae --momentum 0.99 0.9: --momentum takes two, from and to, and must not decrease
finetune --ckpt nothing.pt: --model and --patch_size go with --ckpt none
finetune --warmup_epochs 2: --warmup_epochs 2 must be less than --epochs 2
finetune --img_size 30: 30×30 pixels is not a whole number of patches of 8
finetune --batch_size 10 --accum_iter 3: a batch of 10 images cannot be shared equally
finetune --mode linear --batch_size 2 --accum_iter 2: at least 2 images at a time
finetune --crop_scale 0.9 0.2: from 0.9 to 0.2 of the area: the first must not be the larger
"""


@pytest.mark.parametrize("command, message", [
    *((command, message) for message, commands in WORDS.items() for command in re.split(r",\s+", commands.strip())),
    *((command, re.escape(message)) for command, message in re.findall("^(.*?): (.*)$", REFUSED, re.M))])
def test_bad_arguments(command, message, folder, tmp_path):
    """Refused in one line that says what is wrong and what is allowed, before anything is trained or written."""
    (name, *flags), output = command.split(), tmp_path / "out"
    words = tune_args(folder, "none", "finetune", output) if name == "finetune" else small_args(folder, output)
    with pytest.raises(InputError) as caught:
        module(name).main(module(name).get_args([*words, *flags]))
    said = caught.value.args[0]
    assert re.search(message, said) and "\n" not in said and (message not in WORDS or flags[0] in said)
    assert not output.exists() or [path.name for path in output.iterdir()] == [".lock"]


# ---------------------------------------------------------------------------------------------------------------------
# finetune.py
# ---------------------------------------------------------------------------------------------------------------------
def tune_args(folder, ckpt, mode, output=None, *more):
    """A command line of finetune.py, for a run of a second; `output` None: beside the checkpoint."""
    words = ["--ckpt", ckpt, "--mode", mode, "--data", folder, *"--num_workers 0 --k 5 --device cpu".split(),
             *"--epochs 2 --warmup_epochs 1 --batch_size 16".split(), *(["--output_dir", output] if output else [])]
    words += "--model vit_micro --img_size 32 --patch_size 8".split() if ckpt == "none" else []
    return list(map(str, [*words, *more]))


@pytest.fixture(scope="session")
def public_checkpoint(tmp_path_factory):
    """As the public MAE code saves it: a decoder, an optimiser and a Namespace inside."""
    path = tmp_path_factory.mktemp("public") / "mae_pretrain.pth"
    model = mae.MAE(**dict(VIT_SIZES["vit_micro"], img_size=32, patch_size=8), decoder_embed_dim=32, decoder_depth=1)
    args = argparse.Namespace(batch_size=64, model="mae_vit_base_patch16", input_size=224, norm_pix_loss=True)
    torch.save({"model": model.state_dict(), "args": args, "epoch": 799, "optimizer": {"state": {}}}, path)
    return path


@pytest.mark.parametrize("mode, trained", [("finetune", ("cls_token", "pos_embed", "patch_embed.", "blocks.")),
                                           ("partial", ("blocks.3.",)), ("linear", ()), ("knn", ())])
@pytest.mark.parametrize("kind", ["last.pt", "encoder.pt", "public", "none"])
def test_every_mode_on_every_checkpoint(mode, trained, kind, folder, pretrained, public_checkpoint, tmp_path, capsys):
    """The result is printed, saved and returned; of the encoder, what the mode says has changed and nothing else."""
    path = {"public": public_checkpoint, "none": "none"}.get(kind, pretrained / kind)
    result = finetune.main(finetune.get_args(tune_args(folder, path, mode, tmp_path, "--blocks", "1")))
    saved = json.loads((tmp_path / "result.json").read_text())
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed == result and {key: saved[key] for key in result} == result
    assert result["images"] == 21 and result["mode"] == mode
    assert 0 <= result["top1"] <= result["top5"] == 100                 # of 3 classes
    if mode != "knn" and kind != "none":
        before, after = finetune.load_encoder(path)[0], torch.load(tmp_path / "last.pt", weights_only=True)["model"]
        changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if trained and name.startswith(trained)}


def test_labels_are_needed(folder, pretrained, tmp_path):
    """Validation may lack a class, and the numbers still agree; it may not have one more."""
    def knn(data):
        words = tune_args(data, pretrained / "last.pt", "knn", tmp_path / "out", "--k", "3")
        return finetune.main(finetune.get_args(words))

    def put(*names):                    # a class's images are all the same
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            photo(ord((tmp_path / name).parent.name[0])).save(tmp_path / name)
    put("flat/train/0.png", "flat/val/0.png", *(f"some/train/{name}/{i}.png" for name in "abc" for i in range(3)))
    put("some/val/b/0.png", "some/val/c/0.png")
    for data, message in ((tmp_path / "flat", "no labels: .*0.png lies in no class folder"),
                          (folder / "train", "no folder val/")):
        with pytest.raises(InputError, match=message):
            knn(data)
    assert knn(tmp_path / "some")["top1"] == 100
    put("some/val/new/0.png")
    with pytest.raises(InputError, match="classes that training lacks: new"):
        knn(tmp_path / "some")


@pytest.mark.parametrize("words, width, expected", [
    ("finetune", 768, (100, 1024, 5e-4, 5, 0.65, 0.1, 0.05, 1e-6, "avg", 0.25, 0.999)),
    ("finetune", 1024, (50, 1024, 1e-3, 5, 0.75, 0.2, 0.05, 1e-6, "avg", 0.25, 0.999)),
    ("finetune", 1280, (50, 1024, 1e-3, 5, 0.75, 0.3, 0.05, 1e-6, "avg", 0.25, 0.999)),
    ("partial --blocks 2", 768, (100, 1024, 5e-4, 5, 0.65, 0.1, 0.05, 1e-6, "avg", 0.25, 0.999)),
    ("linear", 768, (90, 16384, 0.1, 10, 1.0, 0.0, 0.0, 0.0, "cls")),
    ("linear", 1024, (50, 16384, 0.1, 10, 1.0, 0.0, 0.0, 0.0, "cls")),
    ("partial --blocks 0", 768, (90, 16384, 0.1, 10, 1.0, 0.0, 0.0, 0.0, "cls"))])      # is linear probing
def test_recipes_of_evaluation(words, width, expected):
    """By mode and the encoder's width, where the command line says nothing; and the rate's course."""
    names = "epochs batch_size blr warmup_epochs layer_decay drop_path weight_decay min_lr pool erasing beta2".split()
    words = ["--ckpt", "x.pt", "--mode", *words.split()]
    args = finetune.get_args(words)
    assert (args.smoothing, args.mixup, args.cutmix, args.rand_augment) == (0.1, 0.8, 1.0, True)
    assert (args.crop_scale, args.k, args.temperature) == ([0.08, 1.0], 20, 0.07)
    finetune.fill_recipe(args, width)
    assert tuple(getattr(args, name) for name in names[:len(expected)]) == expected
    peak, middle = args.blr * args.batch_size / 256, (args.warmup_epochs + args.epochs) / 2
    rates = [finetune.learning_rate(epoch, args) for epoch in (0, args.warmup_epochs / 2, middle, args.epochs)]
    assert rates == pytest.approx([0, peak / 2, (peak + args.min_lr) / 2, args.min_lr])
    args = finetune.get_args([*words, *"--epochs 7 --warmup_epochs 0 --blr 0.5 --ckpt none".split()])
    finetune.fill_recipe(args, width)
    assert (args.epochs, args.warmup_epochs, args.blr, args.layer_decay) == (7, 0, 0.5, 1.0)    # nothing to preserve


def test_lars_by_hand():
    weight, bias, zero = map(torch.nn.Parameter, (torch.tensor([[3.0, 4.0]]), torch.tensor([1.0]), torch.zeros(1, 2)))
    lars = finetune.LARS([{"params": [weight, bias, zero], "weight_decay": 0.5}], lr=2.0)
    weight.grad, bias.grad, zero.grad = torch.tensor([[4.5, 2.0]]), torch.tensor([0.25]), torch.tensor([[1.0, 0.0]])
    lars.step()                         # the update is (4.5, 2) + 0.5 · (3, 4) = (6, 4), its scale 0.001 · 5 / √52
    first = torch.tensor([[6.0, 4.0]]) * 0.001 * 5 / math.sqrt(52)
    assert_same(weight.data, torch.tensor([[3.0, 4.0]]) - 2 * first, 1e-6)
    assert_same(bias.data, torch.tensor([1.0 - 2 * 0.25]), 1e-6)        # 1-D: neither scale nor decay
    assert_same(zero.data, torch.tensor([[-2.0, 0.0]]), 1e-6)           # a norm of 0: scale 1
    before = weight.data.clone()
    bias.grad = torch.tensor([0.5])
    lars.step()                         # momentum: 0.9 of the last update, and the new one
    update = torch.tensor([[4.5, 2.0]]) + 0.5 * before
    second = 0.9 * first + update * 0.001 * before.norm() / update.norm()
    assert_same(weight.data, before - 2 * second, 1e-6)
    assert_same(bias.data, torch.tensor([0.5 - 2 * (0.9 * 0.25 + 0.5)]), 1e-6)


def test_layer_decay_by_hand():
    """A half: 1/16 for embeddings and positions, blocks 1/8, 1/4 and 1/2, the head 1."""
    model = finetune.Classifier(7, "avg", **ENCODER)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"])
             for group in finetune.param_groups(model, 0.05, 0.5) for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, (scale, decay) in found.items():
        assert scale == {"cls_token": 1 / 16, "pos_embed": 1 / 16, "patch_embed": 1 / 16, "0": 1 / 8, "1": 1 / 4,
                         "2": 1 / 2, "fc_norm": 1, "head": 1}[name.removeprefix("blocks.").split(".")[0]], name
        none = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
        assert decay == (0 if none else 0.05), name


def test_heads_and_frozen_parts():
    """The linear probe by hand; the head on averaged patches is timm's; what trains. Logits are float32."""
    imgs = torch.randn(6, 3, 32, 32)
    probe = finetune.Classifier(7, "cls", linear_probe=True, train_blocks=0, **ENCODER, drop_path=0.5).train()
    assert {name for name, p in probe.named_parameters() if p.requires_grad} == {"head.1.weight", "head.1.bias"}
    features = probe.features(imgs)
    assert torch.equal(features, probe.eval().features(imgs))           # frozen: no drop path
    x = (features - features.mean(dim=0)) / (features.var(dim=0, unbiased=False) + 1e-6).sqrt()
    assert_same(probe.train()(imgs), x @ probe.head[1].weight.T + probe.head[1].bias)
    assert probe.head[1].weight.std().item() == pytest.approx(0.01, rel=0.2)
    partial = finetune.Classifier(7, "avg", train_blocks=1, **ENCODER)
    trained = {name.split(".")[0] for name, p in partial.named_parameters() if p.requires_grad}
    assert trained == {"blocks", "fc_norm", "head"} and not partial.blocks[1].attn.qkv.weight.requires_grad
    whole = finetune.Classifier(7, "avg", **ENCODER)
    assert all(p.requires_grad for p in whole.parameters())
    assert whole.head.weight.std().item() == pytest.approx(2e-5, rel=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert whole(imgs).dtype == torch.float32
    timm = pytest.importorskip("timm")
    peer = timm.models.VisionTransformer(**ENCODER, num_classes=7, global_pool="avg", fc_norm=True)
    peer.load_state_dict(shake(whole).state_dict())
    assert_same(whole(imgs), peer.eval()(imgs))


def test_positions_are_resampled_as_timm_does():
    layers = pytest.importorskip("timm.layers")
    pos = torch.randn(1, 1 + 4 * 4, 8)
    for size in ((6, 6), (3, 5), (2, 2)):
        theirs = layers.resample_abs_pos_embed(pos, size, (4, 4), num_prefix_tokens=1)
        assert_same(finetune.resample_pos_embed(pos, (4, 4), size), theirs, 1e-6)
    assert finetune.resample_pos_embed(pos, (4, 4), (4, 4)) is pos


def test_knn_by_hand():
    bank, labels = F.normalize(torch.randn(30, 5), dim=1), torch.randint(0, 4, (30,))
    queries = F.normalize(torch.randn(6, 5), dim=1)
    scores = finetune.knn_scores(queries, bank, labels, 4, k=7, temperature=0.07)
    for query, row in zip(queries, scores):
        similarity = (bank @ query).tolist()
        nearest = sorted(range(30), key=similarity.__getitem__)[-7:]
        votes = [sum(math.exp((similarity[i] - similarity[nearest[-1]]) / 0.07) for i in nearest if labels[i] == c)
                 for c in range(4)]
        assert row.tolist() == pytest.approx(votes, rel=1e-4)
    assert finetune.knn_scores(queries, bank, labels, 4, k=7, temperature=0.001).isfinite().all()       # e^1000 is not
    hits = finetune.hits(torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.2, 0.3]]), torch.tensor([1, 2]))
    assert hits.tolist() == [1, 2, 2] and finetune.to_percent(hits) == (50, 100, 2)


def test_evaluation_counts():
    """Top-1 and top-5 as by ranking each image alone; and features of unit length, in order."""
    model, channels = shake(finetune.Classifier(9, "cls", **ENCODER)), ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    raw, labels = torch.randint(0, 256, (23, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 9, (23,))
    run = types.SimpleNamespace(device=CPU, dtype=None, world_size=1,
                                once=lambda crops, **_: zip(raw.split(7), labels.split(7)))
    top1, top5, number = finetune.evaluate(run, model, None, channels)
    imgs = common.normalize(raw, *channels)
    ranked = [model(img[None])[0].sort(descending=True).indices.tolist().index(label) for img, label in
              zip(imgs, labels.tolist())]
    expected = [100 * sum(rank < first for rank in ranked) / 23 for first in (1, 5)]
    assert number == 23 and [top1, top5] == pytest.approx(expected) and top1 < top5
    for pool in ("cls", "avg"):
        features, their_labels = finetune.extract_features(run, model, None, channels, pool)
        x = model.forward_features(imgs)
        assert_same(features, F.normalize(x[:, 0] if pool == "cls" else x[:, 1:].mean(dim=1), dim=1))
        assert torch.equal(their_labels, labels)


def test_rand_augment_equals_timm(monkeypatch):
    theirs = pytest.importorskip("timm.data.auto_augment")
    names = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel", **{name: f"{name}Increasing" for name in
             ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")}}
    assert [names.get(name, name) for name in finetune.RAND_AUGMENT_OPS] == theirs._RAND_INCREASING_TRANSFORMS
    img, hparams = photo(3), dict(translate_pct=0.45, img_mean=finetune.FILL, interpolation=Image.Resampling.BICUBIC)
    ops = finetune.RAND_AUGMENT_OPS.items()
    for (name, op), level, sign in itertools.product(ops, (7.3, 9.0, 9.4, 10.0), (1, -1)):
        monkeypatch.setattr(theirs, "_randomly_negate", lambda value: sign * value)
        ours = np.asarray(op(img, level / 10, sign))
        if (name, level) == ("Posterize", 10.0):                        # no bit is left, which newer Pillows refuse
            assert not ours.any()
        else:
            peer = theirs.AugmentOp(names.get(name, name), prob=1.0, magnitude=level, hparams=hparams)
            assert np.array_equal(ours, np.asarray(peer(img))), (name, level, sign)


def test_rand_augment_draws(monkeypatch):
    """Two ops an image, of which on average one is applied, at N(9, 0.5) up to 10, with either sign; from torch's
    generator."""
    drawn, results = [], []
    ops = {i: lambda img, m, s: drawn.append((10 * m, s)) or img for i in range(15)}
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "RAND_AUGMENT_OPS", ops)
        for _ in range(2000):
            finetune.rand_augment(None)
    levels, signs = np.array(drawn).T
    assert len(levels) == pytest.approx(2000, rel=0.1) and levels.max() <= 10 and abs(signs.mean()) < 0.1
    assert levels.mean() == pytest.approx(9, abs=0.05) and 0.4 < levels.std() < 0.55
    for _ in range(2):
        torch.manual_seed(11)
        results.append(np.asarray(finetune.rand_augment(photo(3))))
    assert np.array_equal(*results)


def test_mixing():
    """Labels are mixed as pixels are: in proportion, or by the pasted area. A quarter is erased, by unit noise."""
    imgs, labels = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).contiguous(), torch.arange(4)
    for kind in ("mixup", "cutmix"):
        args = argparse.Namespace(**{"erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, kind: 0.8})
        mixed, targets = finetune.mix(imgs, labels, 4, args)
        assert_same(targets.sum(dim=1), torch.ones(4))
        assert_same(mixed.mean(dim=(1, 2, 3)), targets @ torch.arange(4.0))
        assert (mixed[:, :, :1, :1] == mixed).all() == (kind == "mixup")
    args = argparse.Namespace(erasing=0.0, mixup=0.8, cutmix=1.0)
    mixed = [finetune.mix(imgs, labels, 4, args)[0] for _ in range(200)]
    assert 60 < sum((x[:, :, :1, :1] != x).any().item() for x in mixed) < 140           # either, 50 : 50
    args = argparse.Namespace(erasing=0.25, mixup=0.0, cutmix=0.0)
    erased, same = finetune.mix(torch.zeros(2000, 3, 8, 8), torch.zeros(2000, dtype=torch.long), 4, args)
    assert 0.2 < erased.flatten(1).any(dim=1).float().mean() < 0.3 and same.shape == (2000,)
    assert erased[erased != 0].std().item() == pytest.approx(1, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# The README and the docs say what is there
# ---------------------------------------------------------------------------------------------------------------------
def code_lines(text):
    """A script's lines of code: no docstrings, comments or blank lines."""
    lines, numbers = text.splitlines(), set()
    aside = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][:token.start[1]].rstrip()
        elif token.type not in aside:
            numbers |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            numbers -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [lines[number - 1] for number in sorted(numbers)]


def test_lines_changed_of_the_readme():
    """The column "lines changed against mae.py", +A −B, for the scripts that the README lists."""
    rows = re.findall(r"^\| *\[?`(\w+)\.py`.*?\| (\+\d+ −\d+) \|", (ROOT / "README.md").read_text(), re.M)
    base = code_lines((ROOT / "mae.py").read_text())
    assert rows
    for name, listed in rows:
        signs = [line[0] for line in difflib.ndiff(base, code_lines((ROOT / f"{name}.py").read_text()))]
        assert listed == f"+{signs.count('+')} −{signs.count('-')}", f"README.md: {name}.py"


def test_diffs_of_the_readme():
    """What an excerpt of a diff keeps and removes is in mae.py, what it keeps and adds in another script, in a row."""
    def has(text, lines):
        return "\n" + "\n".join(lines) + "\n" in "\n" + text
    excerpts = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert excerpts
    for hunk in re.split(r"^(?:@@|---|\+\+\+|…|\.\.\.).*\n", "...\n".join(excerpts), flags=re.M):
        theirs, ours = ([line[1:] for line in hunk.splitlines() if line[:1] != sign] for sign in "+-")
        assert has((ROOT / "mae.py").read_text(), theirs), f"not in mae.py: {theirs}"
        assert any(has((ROOT / f"{name}.py").read_text(), ours) for name in SCRIPTS), f"in no script: {ours}"


def test_commands_of_the_readme_and_the_docs(monkeypatch):
    """Every command, but those in a shell's loop, has arguments that its script takes, and a batch that its processes
    can share."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)         # libraries may not be here,
    monkeypatch.setattr(os.path, "isdir", lambda path: True)                    # nor the user's images
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    texts += [module(name).__doc__ for name in (*SCRIPTS, "finetune")]
    text = re.sub(r" *\\\n *", " ", "\n".join(texts))
    commands = re.findall(r"^(?:.*&& |[ $]*)(python|torchrun\b.*?) (\w+)\.py\b(.*?)(?: #.*)?$", text, re.M)
    assert len(commands) > 20 and {name for _, name, _ in commands} >= {*SCRIPTS, "finetune"}
    for launcher, name, words in commands:
        processes = math.prod(map(int, re.findall(r"--(?:nnodes|nproc_per_node)[ =](\d+)", launcher)))
        known = "$" not in words and (ROOT / f"{name}.py").exists()
        args = module(name).get_args(shlex.split(words)) if known else None
        if getattr(args, "batch_size", None) and hasattr(args, "accum_iter"):
            assert args.batch_size % (processes * args.accum_iter) == 0, (name, words)
