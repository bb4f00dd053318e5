"""Pictures of what was learnt, from a checkpoint and images (a folder, files, or `shapes`).

    python visualize.py seeds --ckpt runs/emae/last.pt --images shapes           # one image, several masks
    python visualize.py seeds --ckpt runs/mae/last.pt --mask_ratio 0.75 0.85 0.95 --seeds 0    # several mask ratios
    python visualize.py attention --ckpt runs/sdae/encoder.pt --images photos    # where the cls token looks
    python visualize.py difficulty --ckpt runs/efficient_mae/last.pt --images photos   # P²Dist beside the loss
    python visualize.py distances                                                # P²Dist by mask ratio: no checkpoint
    python visualize.py curves --runs runs/mae runs/robust_mae                   # training curves

`seeds` draws EMAE's Figures 1 and 3, with several mask ratios MAE's Figure 4; `attention` SdAE's Figure 7; `difficulty`
Efficient MAE's Figure 3 and the lower part of its Figure 2; `distances` the upper part, with the shares of its Section
3.3; `curves` Robust MAE's Figure 2. `seeds` and `difficulty` take the last.pt of any script here that predicts pixels;
`attention` also takes an encoder.pt or a public MAE checkpoint. Diagrams need matplotlib.
"""
import argparse
import importlib
import importlib.util
import itertools
import json
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from common import (IMAGENET_MEAN, IMAGENET_STD, TORCHVISION_DATASETS, InputError, ViT, denormalize, eval_transform,
                    load_dataset, load_image, normalize)
from efficient_mae import p2dist_approximate
from finetune import load_encoder
from mae import mean_and_std, patchify, random_masking, unpatchify
from runs import check_alike, check_show, launch, load, number, reading, to_rgb


def get_args(argv=None):
    """Parses the command line. Raises InputError."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["seeds", "attention", "difficulty", "distances", "curves"])
    parser.add_argument("--ckpt", help="a script's last.pt; for attention also an encoder.pt")
    parser.add_argument("--images", nargs="+", default=["shapes"],
                        help="files, folders, data sets by name; where there is a validation part, its images")
    parser.add_argument("--data_root", default="data", help="where data sets given by name are")
    parser.add_argument("--number", type=number(int, "[1, 10000]"), default=4, help="images of a folder or set")
    parser.add_argument("--show", type=number(int, "[0, 1023]"), nargs=3, default=[0, 1, 2], help="channels drawn")
    parser.add_argument("--seeds", type=number(int, "[0, 4294967296)"), nargs="+", default=[0, 1, 2], help="of masks")
    parser.add_argument("--mask_ratio", type=number(float, "(0, 1)"), nargs="+", help="seeds, difficulty (the first), "
                        "distances: share of patches removed (default: as trained; distances 0.75 0.85 0.9)")
    parser.add_argument("--runs", nargs="+", help="curves: folders with a log.jsonl, or files of results/claims")
    parser.add_argument("--key", default="loss", help="curves: which number of the log")
    parser.add_argument("--output", help="the picture (default: {what}.png)")
    args = parser.parse_args(argv)
    args.output = args.output or f"{args.what}.png"
    if args.what == "curves" and not args.runs:
        raise InputError("curves need --runs: folders that hold a log.jsonl")
    if args.what not in ("curves", "distances") and not args.ckpt:
        raise InputError(f"{args.what} needs --ckpt: a checkpoint of one of the scripts")
    if args.mask_ratio and args.what in ("attention", "curves"):
        raise InputError(f"{args.what} takes no --mask_ratio: nothing is masked")
    if args.what == "seeds" and len(args.seeds) * len(args.mask_ratio or [0]) < 2:
        raise InputError("give at least two --seeds, or two values of --mask_ratio, to compare")
    if not os.path.isdir(os.path.dirname(args.output) or ".") or not args.output.endswith(".png"):
        raise InputError(f"--output {args.output} must end with .png, in a folder that exists")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Models and images
# ---------------------------------------------------------------------------------------------------------------------
def load_pixel_model(path):
    """The model that a script's last.pt holds, in evaluation mode; the script, any in this folder that has build_model,
    is the one that the checkpoint names. Its `channels` are their mean and standard deviation, for `normalize`. Raises
    InputError, also if the model doesn't predict pixels."""
    checkpoint = load(path)
    with reading(path):
        name, weights = checkpoint.get("method"), checkpoint.get("model", {})
        if not any(key.startswith("decoder") for key in weights):
            raise InputError(f"'{path}' holds no decoder: --ckpt takes a script's last.pt here")
        if name not in [file.stem for file in Path(__file__).parent.glob("*.py")
                        if "\ndef build_model(" in file.read_text(errors="replace")]:
            raise InputError(f"'{path}' is of {str(name)[:50]!r}: no script here has that name and a build_model")
        script = importlib.import_module(name)
        args = argparse.Namespace(**{**vars(script.get_args([])), **checkpoint["args"]})    # newer ones: their default
        if getattr(args, "decoder_depth", 0) > len(weights):
            raise InputError(f"'{path}' has --decoder_depth {args.decoder_depth}, and fewer weights than that")
        model = script.build_model(args)
        check_alike(path, "model", weights, model.state_dict(), any_float=True)
        model.load_state_dict(weights)
        model.channels = [[*map(float, x)] for x in (args.mean or IMAGENET_MEAN, args.std or IMAGENET_STD)]
        black = normalize(torch.zeros(1, model.in_chans, *model_size(model)), *model.channels)
        pred, _ = predict(model.eval(), black, 0)
    if not hasattr(model, "norm_pix") or pred.shape[2] != black.numel() // model.num_patches:   # else 768 features pass
        raise InputError(f"{name}.py predicts features, not pixels: see the run's own reconstruction.png, or draw its "
                         "attention")
    return model


def set_mask_ratio(model, mask_ratio):
    """Lets a model remove another share of the patches than it was trained with. Raises InputError."""
    if not hasattr(model, "len_keep"):
        raise InputError("--mask_ratio: this model's is fixed by its method")
    len_keep = int(model.num_patches * (1 - mask_ratio) + 1e-6)
    if not 0 < len_keep < model.num_patches - getattr(model, "mid_count", 0):
        raise InputError(f"--mask_ratio {mask_ratio:g} doesn't suit this model's {model.num_patches} patches")
    model.len_keep = len_keep


def load_images(sources, number, img_size, data_root="data", in_chans=3):
    """Images as for evaluation, (N, C, H, W): each file, and of each folder or set `number`, evenly apart."""
    found = []
    for source in sources:
        named = source == "shapes" or source in TORCHVISION_DATASETS
        if os.path.isfile(source):
            found.append(load_image(source, in_chans))
        elif named or os.path.isdir(source):
            held_out = named or os.path.isdir(os.path.join(source, "val"))
            images = load_dataset(source, "val" if held_out else "pretrain", data_root, in_chans)
            count = min(number, len(images))
            found += [images[i * len(images) // count][0] for i in range(count)]
        else:
            raise InputError(f"no image, folder or data set '{source}'")
    return torch.stack([eval_transform(img_size)(img) for img in found])


@torch.no_grad()
def predict(model, imgs, seed):
    """Predictions of every patch under the mask of a seed, (N, L, P·P·3), and the mask (N, L), 1 = removed. Of EMAE's
    parts the first, whose mask is MAE's of the same seed. NaN where a patch is not predicted."""
    torch.manual_seed(seed)
    pred, mask = model.reconstruct(imgs)
    return (pred.float(), mask) if pred.dim() == 3 else (pred[:, 0].float(), mask[:, 0])


def disagreement(predictions):
    """How far predictions under several masks are apart, (N, L): the mean absolute difference over pixels and pairs of
    masks, on patches that both remove; NaN where no two do. `predictions` lists what `predict` gives."""
    total, pairs = 0.0, 0.0
    for (p, mask_p), (q, mask_q) in itertools.combinations(predictions, 2):
        apart = (p - q).abs().mean(dim=2)                                                # (N, L)
        both = (mask_p * mask_q).bool() & ~apart.isnan()
        total, pairs = total + apart.where(both, torch.zeros(())), pairs + both
    return total / pairs


def target_of(model, imgs):
    """What the model is to predict of every patch, (N, L, P·P·3)."""
    target = patchify(imgs, model.patch_size)
    if hasattr(model, "inter_patch_norm"):      # Robust MAE
        target = model.inter_patch_norm(target)
    if model.norm_pix:
        mean, std = mean_and_std(target)
        target = (target - mean) / std
    return target


@torch.no_grad()
def cls_attention(vit, imgs):
    """Where the cls token looks in the last block: each head's softmax over all tokens, the patches' part, (N, heads,
    L)."""
    x = vit.patch_embed(imgs)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
    for block in vit.blocks[:-1]:
        x = block(x)
    last = vit.blocks[-1]
    qkv = last.attn.qkv(last.norm1(x)).unflatten(2, (3, last.attn.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)                                                 # (N, heads, 1 + L, d)
    return (q[:, :, :1] @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3)[:, :, 0, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------
HEAT = np.array([[10, 8, 40], [90, 20, 110], [190, 50, 80], [245, 130, 40], [252, 240, 160]]) / 255


def heat(values, grid_size, low=None, high=None):
    """Patches' values (L,) as a picture (3, rows, columns) in [0, 1]: dark for `low` (default: the least), bright for
    `high` (the largest), grey for NaN."""
    values = np.asarray(values, dtype=np.float64)
    low = np.nanmin(values) if low is None else low
    high = np.nanmax(values) if high is None else high
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    colours = np.stack([np.interp(share, np.linspace(0, 1, len(HEAT)), HEAT[:, c]) for c in range(3)])
    colours[:, np.isnan(values)] = 0.5
    return torch.from_numpy(colours.reshape(3, *grid_size)).float()


def draw(rows, titles, caption, path, width=1200):
    """Writes a PNG: rows of pictures (3, h, w) in [0, 1], all as large as the first, titles above the columns, and a
    caption, which it also prints. (Pillow's own font has no superscripts.)"""
    h, w = rows[0][0].shape[1:]
    columns, gap, top = len(titles), 6, 34
    cell = (width - gap * (columns + 1)) // columns
    if cell < 1:
        raise InputError(f"{columns} columns don't fit into a picture {width} pixels wide")
    size = (cell, round(cell * h / w))
    font, small = ImageFont.load_default(22), ImageFont.load_default(18)
    lines = textwrap.wrap(caption, width // 9)
    bottom = 24 * len(lines) + 14
    sheet = Image.new("RGB", (width, top + len(rows) * (size[1] + gap) + bottom), "white")
    ink = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        ink.text((gap + column * (cell + gap) + cell // 2, 6), title, "black", font, anchor="ma")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            resize = Image.Resampling.NEAREST if picture.shape[2] <= cell else Image.Resampling.LANCZOS
            place = (gap + c * (cell + gap), top + r * (size[1] + gap))
            sheet.paste(Image.fromarray(pixels).resize(size, resize), place)
    ink.text((gap, top + len(rows) * (size[1] + gap) + 4), "\n".join(lines), "black", small)
    sheet.save(path)
    print(f"{path}: {caption}")


def plot(path, lines, x, y, style="-"):
    """A diagram of lines, {label: (xs, ys)}. Raises InputError where matplotlib is missing."""
    if not importlib.util.find_spec("matplotlib"):
        raise InputError("diagrams need matplotlib: pip install matplotlib")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for label, (xs, ys) in lines.items():
        axes.plot(xs, ys, style, label=label)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"{path}: {y} against {x}: {', '.join(lines)}")


# ---------------------------------------------------------------------------------------------------------------------
# The pictures
# ---------------------------------------------------------------------------------------------------------------------
def seeds(args):
    """One image under several masks: what is seen above, what is predicted below, and how far predictions differ."""
    model = load_pixel_model(args.ckpt)
    check_show(args.show, model.in_chans)
    imgs = load_images(args.images, args.number, model_size(model), args.data_root, model.in_chans)
    imgs, rows, titles, pictures, predictions = normalize(imgs, *model.channels), [], ["original"], [], []
    for ratio, seed in itertools.product(args.mask_ratio or [None], args.seeds):
        if ratio is not None:
            set_mask_ratio(model, ratio)
        predictions.append(predict(model, imgs, seed))
        torch.manual_seed(seed)
        picture = model.picture(imgs, *model.channels)                                   # under the masks of `predict`
        pictures.append([to_rgb(row, picture[0], args.show) for row in picture])
        titles.append(f"seed {seed}" if ratio is None else f"{ratio:g}, seed {seed}")
    apart = disagreement(predictions)
    high = apart.nan_to_num(0.0).max().item()
    for i in range(len(imgs)):
        rows.append([pictures[0][0][i], *(picture[1][i] for picture in pictures)])
        rows.append([heat(apart[i], model.grid_size, 0, high), *(picture[2][i] for picture in pictures)])
    notes = [f"The same images under {len(predictions)} masks: above what the model sees, below what it predicts. "
             "Below the original: how far two predictions of a patch are apart, over the pairs of masks that both "
             f"remove it, from 0 (dark) to {high:.2f} (bright), grey where there is no such pair; on average "
             f"{apart.nanmean():.3f}, in units of the model's output."]
    notes += ["Of EMAE's parts, the first."] * hasattr(model, "parts")
    notes += ["Grey patches are not predicted."] * any(pred.isnan().any() for pred, _ in predictions)
    if model.norm_pix:
        notes += ["The model predicts patches standardised by their own mean and variance, so it says nothing of those "
                  "two: they are taken from the original patch. What is predicted is the pattern within a patch."]
    draw(rows, titles, " ".join(notes), args.output)


def attention(args):
    """Each head's attention from the cls token, and their mean."""
    weights, vit, (mean, std), _ = load_encoder(args.ckpt)
    model, channels = ViT(**vit), (mean or IMAGENET_MEAN, std or IMAGENET_STD)
    model.load_state_dict(weights)
    check_show(args.show, model.in_chans)
    imgs = load_images(args.images, args.number, vit["img_size"], args.data_root, model.in_chans)
    imgs = normalize(imgs, *channels)
    maps, original = cls_attention(model.eval(), imgs), denormalize(imgs, *channels)     # (N, heads, L), (N, C, H, W)
    rows = [[img, heat(each.mean(dim=0), model.grid_size), *(heat(head, model.grid_size) for head in each)]
            for img, each in zip(to_rgb(original, original, args.show), maps)]
    draw(rows, ["image", "mean", "head 0", *map(str, range(1, maps.shape[1]))],
         f"Attention of the cls token to the patches in the last block: the mean of its {maps.shape[1]} heads, and "
         "each head, from the least (dark) to the most (bright) of each map.", args.output)


def patch_losses(model, imgs, seed):
    """Of every patch, under the mask of a seed: P²Dist in pixels and squared error, NaN where there is none, and the
    mask, 1 = removed, each (N, L)."""
    pred, mask = predict(model, imgs, seed)
    keep, remove = mask.argsort(dim=1, stable=True).tensor_split([int((mask[0] == 0).sum())], dim=1)
    near = p2dist_approximate(keep, remove, model.grid_size, model.patch_size)
    loss = (pred - target_of(model, imgs)).square().mean(dim=2).where(mask.bool(), torch.nan)
    return torch.full_like(mask, torch.nan).scatter(1, remove, near), loss, mask


def difficulty(args):
    """P²Dist and the loss of each removed patch; against P²Dist, over 64 images or more (all of them, if they are
    fewer), the mean loss and the same times Eq. 2's weights d^-γ, which have a mean of 1 over an image's predicted
    patches (without γ of its own: 0.6)."""
    model = load_pixel_model(args.ckpt)
    if args.mask_ratio:
        set_mask_ratio(model, args.mask_ratio[0])
    check_show(args.show, model.in_chans)
    imgs, many = (load_images(args.images, number, model_size(model), args.data_root, model.in_chans)
                 for number in (args.number, max(64, args.number)))
    imgs = normalize(imgs, *model.channels)
    distance, loss, mask = patch_losses(model, imgs, args.seeds[0])
    visible = unpatchify(patchify(imgs, model.patch_size) * (1 - mask[:, :, None]), model.patch_size, model.grid_size)
    original, masked = (denormalize(x, *model.channels) for x in (imgs, visible))
    original, masked = (to_rgb(x, original, args.show) for x in (original, masked))
    high = torch.nanquantile(loss, 0.98).item()
    rows = [[original[i], masked[i], heat(distance[i], model.grid_size, 0), heat(loss[i], model.grid_size, 0, high)]
            for i in range(len(imgs))]
    draw(rows, ["original", "seen", "P2Dist", "loss"],
         f"Removed patches at a mask ratio of {mask.mean():.2f}: their P2Dist (Algorithm 1; dark: 0, bright: the "
         f"image's largest) and squared error (dark: 0, bright: {high:.2f} or more). Grey: visible, or not predicted. "
         + "The loss is that of patches standardised by their own mean and variance." * model.norm_pix, args.output)

    gamma = getattr(model, "gamma", 0.6)
    found = [patch_losses(model, normalize(many, *model.channels), seed)[:2] for seed in args.seeds]
    distance, loss = (torch.cat(each) for each in zip(*found))                           # (images · masks, L)
    weight = (distance ** -gamma).where(~loss.isnan(), torch.nan)
    weighted = loss * weight / weight.nanmean(dim=1, keepdim=True)
    distance, loss, weighted = (each[~loss.isnan()] for each in (distance, loss, weighted))
    edges = torch.linspace(distance.min(), distance.max() + 1e-3, 9)
    which = torch.bucketize(distance, edges, right=True) - 1
    print(f"{len(many)} images, {len(args.seeds)} masks each\n{'P²Dist, pixels':>16} {'patches':>8} {'mean loss':>10} "
          f"{'weighted':>9} (γ = {gamma:g})")
    means = []
    for i in range(len(edges) - 1):
        there = which == i
        if there.sum() >= 10:                   # fewer say little
            means.append([x[there].mean().item() for x in (distance, loss, weighted)])
            print("{:>7.1f} to {:>5.1f} {:>8} {:>10.3f} {:>9.3f}".format(*edges[i:i + 2], there.sum(), *means[-1][1:]))
    if not means:
        raise InputError("too few patches for a curve: give more --images or --seeds")
    centres, *losses = zip(*means)
    path = str(Path(args.output).with_suffix("")) + "_curve.png"
    try:
        plot(path, {label: (centres, values) for label, values in zip((args.ckpt, "with the loss's weights"), losses)},
             "P²Dist, pixels", "mean loss of a patch", "o-")
    except InputError as error:
        print(f"no {path}: {error}")


def distances(args):
    """Removed patches by P²Dist for each mask ratio, and the share of those beside a visible patch (in its 3×3
    neighbourhood): means over 500 masks of 14 × 14 patches of 16 pixels. *Outside*: those nearer or farther."""
    edges, lines = range(4, 60, 4), {}
    noise = torch.rand(500, 196, generator=torch.Generator().manual_seed(args.seeds[0]))
    print("removed patches with a P²Dist of … to … pixels")
    print("ratio", *(f"{low:>3}-{low + 4}" for low in edges), "outside  beside")
    for ratio in args.mask_ratio or [0.75, 0.85, 0.9]:
        keep, remove = random_masking(noise, min(max(1, int(196 * (1 - ratio) + 1e-6)), 195))
        near = torch.cat([p2dist_approximate(*ids, (14, 14), 16) for ids in zip(keep.split(50), remove.split(50))])
        counts = [((low <= near) & (near < low + 4)).sum().item() / 500 for low in edges]
        visible = torch.zeros(500, 196).scatter(1, keep, 1.0).unflatten(1, (1, 14, 14))
        beside = F.max_pool2d(visible, 3, 1, 1).flatten(1).gather(1, remove).mean().item()
        print(f"{ratio:<5g}", *(f"{count:>6.1f}" for count in counts),
              f"{remove.shape[1] - sum(counts):>7.1f} {beside:>7.1%}")
        lines[f"mask ratio {ratio:g}"] = ([low + 2 for low in edges], counts)
    plot(args.output, lines, "P²Dist, pixels", "removed patches", "o-")


def curves(args):
    """Each log's `--key`, epoch by epoch."""
    lines = {}
    for run in args.runs:
        path = Path(run) / "log.jsonl" if os.path.isdir(run) else Path(run)
        try:
            text = path.read_text()                 # lines, or one of results/claims's files
            log = json.loads(text)["log"] if path.suffix == ".json" else [*map(json.loads, text.splitlines())]
            epochs, names = [line["epoch"] + 1 for line in log], ", ".join(log[0])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"no log of a run at {path} ({type(error).__name__})") from error
        if not all(isinstance(line.get(args.key), (int, float)) for line in log):
            raise InputError(f"{path} has no numbers {args.key!r}: it has {names}")
        lines[run] = (epochs, [line[args.key] for line in log])
    plot(args.output, lines, "epoch", args.key)


def model_size(model):
    """A model's image size in pixels, (height, width)."""
    return tuple(n * model.patch_size for n in model.grid_size)


def main(args):
    """Draws what was asked for."""
    globals()[args.what](args)


if __name__ == "__main__":
    launch(main, get_args)
