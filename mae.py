"""MAE: Masked Autoencoders Are Scalable Vision Learners.
Kaiming He, Xinlei Chen, Saining Xie, Yanghao Li, Piotr Dollár, Ross Girshick. CVPR 2022. arXiv:2111.06377

Three quarters of an image's patches are removed at random; a ViT encodes the visible quarter alone (Section 3, "MAE
encoder"). A light decoder sees the encoded patches and a shared mask token for each removed one, all with positions,
and predicts the removed patches' pixels ("MAE decoder"). The loss is the mean squared error over the removed patches,
each standardised by its own mean and variance ("Reconstruction target").

This is the baseline: the other scripts are diffed against it.

Chosen where the paper is silent or the released weights differ from it:
- Per-patch standardisation takes the unbiased variance + 1e-6, as the released weights were trained with.
- Weight decay is on everything that is not 1-D, so also on the cls and mask tokens, as released.
- The learning rate is set per iteration (as released), 0 at the first.
- Tokens stay in shuffled order in the decoder: attention doesn't see the order, and every token carries its position.
  Only visible patches are embedded and only removed ones predicted: nothing is computed that the loss doesn't use.
- Not implemented (Table 1): block and grid masks, loss on all patches, PCA and dVAE targets, encoder mask tokens.

    python mae.py --demo                                              # a CPU, 2 cores: two minutes
    python mae.py --data my_images --batch_size 256 --accum_iter 2    # one GPU
    torchrun --nproc_per_node 8 mae.py --data imagenet --accum_iter 4 # the paper's recipe, ViT-B, 800 epochs

Measured: on `shapes`, after --demo, a linear probe gets 69.4 % (random weights 26.4), and on CIFAR-10, after 22
epochs of a ViT-Micro on 2 CPU cores, 52.7 % (36.7): README.md, results/. ImageNet and GPUs: not run (the paper: 83.6 %
after fine-tuning, ViT-B, 1600 epochs).
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image
from tqdm import tqdm

from common import (VIT_SIZES, Block, Crops, GlobalBatches, InputError, Normalize, SaveRequests, ViT, amp_dtype, append,
                    check_finite, check_output, check_vit, gather, init_linear, inventory, load, load_dataset,
                    load_weights, make_loader, number, pair, restore, save, seed_from, sincos_pos_embed, tidy_output,
                    train_transform)

DEMO = dict(data="shapes", model="vit_micro", img_size=[32], patch_size=4, decoder_embed_dim=64, decoder_depth=1,
            decoder_num_heads=2, batch_size=64, epochs=20, warmup_epochs=2, blr=8e-3, num_workers=0)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's recipe
# ---------------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    """Parses and checks the command line. Raises InputError, or exits with code 2, with one line on what is wrong."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="data/imagenet", help="folder of images, or a data set by name (see README)")
    data.add_argument("--data_root", default="data", help="where data sets given by name are downloaded to")
    data.add_argument("--img_size", type=number(int, "[1, inf)"), nargs="+", default=[224], help="pixels: one or two")
    data.add_argument("--crop_scale", type=number(float, "(0, 1]"), nargs=2, default=[0.2, 1.0], help="crops' area")
    data.add_argument("--num_workers", type=number(int, "[0, inf)"), help="loaders a process (default: its cores)")
    data.add_argument("--skip_bad", type=number(int, "[0, inf)"), default=0, help="replace up to so many broken files")

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=VIT_SIZES, default="vit_base", help="the encoder")
    model.add_argument("--patch_size", type=number(int, "[1, inf)"), help="pixels (default: 16, vit_huge 14)")
    model.add_argument("--decoder_embed_dim", type=number(int, "[4, inf)"), default=512, help="width (MAE's Table 1b)")
    model.add_argument("--decoder_depth", type=number(int, "[1, inf)"), default=8, help="blocks (MAE's Table 1a)")
    model.add_argument("--decoder_num_heads", type=number(int, "[1, inf)"), default=16)
    model.add_argument("--mask_ratio", type=number(float, "(0, 1)"), default=0.75, help="share of patches removed")
    model.add_argument("--norm_pix", action=argparse.BooleanOptionalAction, default=True, help="standardise each patch")

    optim = parser.add_argument_group("optimisation (MAE's Table 8)")
    optim.add_argument("--epochs", type=number(int, "[1, inf)"), default=800)
    optim.add_argument("--warmup_epochs", type=number(float, "[0, inf)"), default=40)
    optim.add_argument("--batch_size", type=number(int, "[1, inf)"), default=4096, help="images a step, all processes")
    optim.add_argument("--accum_iter", type=number(int, "[1, inf)"), default=1, help="parts a process's share comes in")
    optim.add_argument("--blr", type=number(float, "(0, inf)"), default=1.5e-4, help="lr = blr · batch_size / 256")
    optim.add_argument("--weight_decay", type=number(float, "[0, inf)"), default=0.05)
    optim.add_argument("--clip_grad", type=number(float, "(0, inf)"), help="largest gradient norm (default: any)")

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default=f"runs/{Path(__file__).stem}", help="for checkpoints, log and picture")
    run.add_argument("--no_resume", action="store_true", help="start over even where output_dir holds a last.pt")
    run.add_argument("--init_from", help="a checkpoint: a new run starts from its weights")
    run.add_argument("--save_minutes", type=number(float, "(0, inf]"), default=30, help="save as often, and each epoch")
    run.add_argument("--seed", type=number(int, "[0, 4294967296)"), default=0)
    run.add_argument("--device", choices=["cuda", "mps", "cpu"], help="default: the first of these that there is")
    run.add_argument("--amp", choices=["auto", "bf16", "fp16", "none"], default="auto",
                     help="auto: bf16 where the hardware has it, else fp16 on a GPU, else none")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--demo", action="store_true", help="small everything, on images drawn by the loader")

    parser.set_defaults(**DEMO if "--demo" in (sys.argv[1:] if argv is None else argv) else {})
    args = parser.parse_args(argv)

    size = VIT_SIZES[args.model]
    args.patch_size = args.patch_size or size["patch_size"]
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    num_patches = math.prod(n // args.patch_size for n in pair(args.img_size))
    check_vit(args.img_size, args.patch_size, size["embed_dim"], size["num_heads"])
    check_vit(args.img_size, args.patch_size, args.decoder_embed_dim, args.decoder_num_heads)
    shares = f"{world_size} process(es) × --accum_iter {args.accum_iter}"
    for right, advice in (
        (args.batch_size % (world_size * args.accum_iter) == 0,
         f"--batch_size {args.batch_size} cannot be shared equally by {shares}"),
        (0 < int(num_patches * (1 - args.mask_ratio) + 1e-6) < num_patches,
         f"--mask_ratio {args.mask_ratio} must keep and remove at least one of {num_patches} patches"),
        (args.warmup_epochs < args.epochs,
         f"--warmup_epochs {args.warmup_epochs:g} must be less than --epochs {args.epochs}"),
        (args.crop_scale[0] <= args.crop_scale[1], "--crop_scale takes two shares, the least and the most"),
    ):
        if not right:
            raise InputError(advice)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Patches and masking
# ---------------------------------------------------------------------------------------------------------------------
def patchify(imgs, patch_size):
    """Images (N, 3, H, W) to patches (N, L, P·P·3), each ordered (row, column, channel)."""
    N, C, H, W = imgs.shape
    x = imgs.reshape(N, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(N, -1, patch_size**2 * C)


def unpatchify(patches, patch_size, grid_size):
    """Patches (N, L, P·P·3) on a grid (rows, columns) back to images (N, 3, H, W)."""
    x = patches.reshape(len(patches), *grid_size, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, grid_size[0] * patch_size, grid_size[1] * patch_size)


def random_masking(noise, mask_ratio):
    """Sorts the patches of each image by their noise (N, L): the first int(L·(1 - mask_ratio)) stay visible.

    Returns ids_keep (N, keep) and ids_remove (N, L - keep). The 1e-6 keeps a ratio such as 13/14 from losing a patch to
    rounding. Source: MAE, Section 3, "Simple implementation".
    """
    len_keep = int(noise.shape[1] * (1 - mask_ratio) + 1e-6)
    return noise.argsort(dim=1).tensor_split([len_keep], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
class MAE(ViT):
    """Masked autoencoder: the ViT as encoder, a smaller one as decoder. Raises InputError for sizes that don't fit."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512,
                 decoder_depth=8, decoder_num_heads=16, mask_ratio=0.75, norm_pix=True):
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads)
        check_vit(img_size, patch_size, decoder_embed_dim, decoder_num_heads)
        self.mask_ratio = mask_ratio
        self.norm_pix = norm_pix
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        position = sincos_pos_embed(decoder_embed_dim, self.grid_size)
        self.decoder_pos_embed = nn.Parameter(F.pad(position, (0, 0, 1, 0))[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * 3)
        self.initialize_weights()

    def initialize_weights(self):
        """The decoder's part; the encoder's is in ViT."""
        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)

    def forward_encoder(self, patches, ids_keep):
        """Visible patches to tokens: patches (N, L, P·P·3), ids_keep (N, keep) -> (N, 1 + keep, D)."""
        x = self.patch_embed(patches.take_along_dim(ids_keep[:, :, None], dim=1))        # (N, keep, D)
        x = x + self.pos_embed[0, 1 + ids_keep]
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)                      # (N, 1 + keep, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, latent, ids_keep, ids_remove, predict_all=False):
        """Tokens (N, 1 + keep, D) to predictions of the removed patches, (N, L - keep, P·P·3), in ids_remove's order;
        with `predict_all` of the visible ones too, before them: (N, L, P·P·3)."""
        x = self.decoder_embed(latent)
        x = torch.cat([x, self.mask_token.expand(len(x), 1 + self.num_patches - x.shape[1], -1)], dim=1)
        ids = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep, 1 + ids_remove], dim=1)
        x = x + self.decoder_pos_embed[0, ids]                                           # (N, 1 + L, D_decoder)
        for block in self.decoder_blocks:
            x = block(x)
        x = x[:, 1:] if predict_all else x[:, 1 + ids_keep.shape[1]:]
        return self.decoder_pred(self.decoder_norm(x))

    def forward_loss(self, patches, pred, ids_remove):
        """Mean squared error over the removed patches, in float32; patches (N, L, P·P·3), pred (N, L - keep, P·P·3)."""
        target = patches.take_along_dim(ids_remove[:, :, None], dim=1)
        if self.norm_pix:
            target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
        return F.mse_loss(pred.float(), target)

    def forward(self, imgs, noise=None):
        """Images (N, 3, H, W), and noise (N, L) that fixes the mask, to the loss and a dict of detached scalars."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = random_masking(noise, self.mask_ratio)
        patches = patchify(imgs, self.patch_size)                                        # (N, L, P·P·3)
        latent = self.forward_encoder(patches, ids_keep)
        pred = self.forward_decoder(latent, ids_keep, ids_remove)
        loss = self.forward_loss(patches, pred, ids_remove)
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def reconstruct(self, imgs, noise=None):
        """Every patch's prediction in its place (N, L, P·P·3), and the mask (N, L): 0 = visible, 1 = removed."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = random_masking(noise, self.mask_ratio)
        latent = self.forward_encoder(patchify(imgs, self.patch_size), ids_keep)
        pred = self.forward_decoder(latent, ids_keep, ids_remove, predict_all=True)
        ids_restore = torch.cat([ids_keep, ids_remove], dim=1).argsort(dim=1)
        mask = torch.ones(ids_restore.shape, device=imgs.device).scatter(1, ids_keep, 0.0)
        return pred.take_along_dim(ids_restore[:, :, None], dim=1), mask

    def picture(self, imgs, normalize):
        """Rows of a picture, (N, 3, H, W) in [0, 1]: original, masked, and the removed patches' prediction pasted in.

        A per-patch-standardised prediction has no mean and scale of its own: they are the original patch's.
        """
        pred, mask = self.reconstruct(imgs)
        patches, mask = patchify(imgs, self.patch_size), mask[:, :, None]
        if self.norm_pix:
            pred = pred * (patches.var(dim=-1, keepdim=True) + 1e-6) ** 0.5 + patches.mean(dim=-1, keepdim=True)
        rows = (patches, patches * (1 - mask), patches * (1 - mask) + pred * mask)
        return [normalize.inverse(unpatchify(row, self.patch_size, self.grid_size)) for row in rows]


def build_model(args):
    """The model that the command line describes."""
    return MAE(**{**VIT_SIZES[args.model], "img_size": args.img_size, "patch_size": args.patch_size},
               decoder_embed_dim=args.decoder_embed_dim, decoder_depth=args.decoder_depth,
               decoder_num_heads=args.decoder_num_heads, mask_ratio=args.mask_ratio, norm_pix=args.norm_pix)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation, processes, files
# ---------------------------------------------------------------------------------------------------------------------
def learning_rate(epoch, args):
    """Rate at a (fractional) epoch: linear warm-up from 0 to blr · batch_size / 256, then half a cosine to 0."""
    peak = args.blr * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)))


def param_groups(model, weight_decay):
    """Weight decay on everything that is trained and not 1-D (1-D: biases and norms)."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]


def init_distributed(args):
    """Joins torchrun's processes, if any. Returns this process's rank, their number, and its device. Raises InputError
    where there is no device for it."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": math.inf}
    kind = args.device or next(kind for kind, number in there.items() if number)
    rank, world_size, local_rank = (int(os.environ.get(key, default)) for key, default in
                                    (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if local_rank >= there[kind]:
        raise InputError(f"no {kind} device for process {local_rank} of this machine: it has {there[kind]}")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world_size, device


def load_checkpoint(path, args, model, optimizer, scaler):
    """Restores the state saved at `path`, and returns the checkpoint; where there is none, that of a run at step 0.
    Raises InputError where the checkpoint is another recipe's, or is not seen by every process."""
    found = not args.no_resume and path.exists()
    if len(set(gather((found, args.images)))) > 1:
        raise InputError(f"{path} or --data is not the same for all processes: they must be on a disk that all share")
    if not found:
        return {"step": 0, "totals": [[0.0]], "seconds": 0.0, "skipped": {}}
    checkpoint = load(path, "model", "optimizer", "scaler", "step", "totals", "seconds", "skipped", "args")
    elsewhere = {"data_root", "num_workers", "skip_bad", "accum_iter", "output_dir", "no_resume", "save_minutes",
                 "device", "compile", "demo"}
    there, here = checkpoint["args"], vars(args)                       # another method's has other arguments
    changed = {name: f"{name} {there.get(name, 'unknown')} there, {here.get(name, 'unknown')} here"
               for name in {**here, **there} if name not in elsewhere and there.get(name) != here.get(name)}
    if changed.keys() - {"amp", "clip_grad", "images"}:                 # may differ, and it is said
        raise InputError(f"{path} is of another run ({'; '.join(changed.values())}): to go on make it as there, else "
                         f"give another --output_dir for a new run, or --no_resume to start over")
    if changed and os.environ.get("RANK", "0") == "0":
        print(f"{path}: going on with {'; '.join(changed.values())}")
    restore(path, checkpoint, model=model, optimizer=optimizer)
    if checkpoint["scaler"] and scaler.is_enabled():
        restore(path, checkpoint, scaler=scaler)
    return checkpoint


def save_picture(rows, path):
    """One PNG: a row of the grid for each of `rows`, images (N, 3, H, W) in [0, 1]."""
    imgs = torch.cat([row.float().clamp(0, 1).cpu() for row in rows])
    save_image(F.interpolate(imgs, scale_factor=max(1, 96 // imgs.shape[-1])), path, nrow=len(rows[0]), padding=2)


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------
def main(args):
    """Pre-trains from the start, or from where OUTPUT/last.pt was saved, to the end."""
    rank, world_size, device = init_distributed(args)
    output = Path(args.output_dir)

    # Data
    source = load_dataset(args.data, "pretrain", args.data_root)
    plan = dict(num_images=len(source), batch_size=args.batch_size, epochs=args.epochs, accum_iter=args.accum_iter,
                rank=rank, world_size=world_size, seed=args.seed)
    args.images, args.steps_per_epoch = inventory(source), GlobalBatches(**plan).steps_per_epoch    # part of the recipe
    steps_per_epoch = args.steps_per_epoch
    crops = Crops(source, train_transform(args.img_size, args.crop_scale), args.seed, args.skip_bad)
    normalize = Normalize().to(device)

    # Model and optimiser: every process starts from the same weights
    torch.manual_seed(args.seed)
    model = build_model(args).to(device)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)
    dtype = amp_dtype(args.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if rank == 0:       # params twice: AdamW's two moments
        check_output(output, sum(x.nbytes for x in (*model.state_dict().values(), *params, *params)), args)
    checkpoint = load_checkpoint(output / "last.pt", args, model, optimizer, scaler)
    start, skipped = checkpoint["step"], checkpoint["skipped"]
    if start == 0 and args.init_from:
        load_weights(args.init_from, model)
    if args.compile:
        model.compile()
    # On CPUs: sums in the same order in every step, also the first of a run that goes on (DDP reorders them after that)
    net = DistributedDataParallel(model, find_unused_parameters=device.type == "cpu") if world_size > 1 else model
    batches = make_loader(crops, GlobalBatches(**plan, start_step=start), args.num_workers, device, skipped)

    if rank == 0:
        tidy_output(output, start, steps_per_epoch)
        millions = sum(p.numel() for p in params) / 1e6
        print(f"{args.model}/{args.patch_size} with decoder, {millions:.1f} M trained parameters, {len(source)} images"
              f", {device.type}, amp {str(dtype).removeprefix('torch.')}\n"
              f"{args.batch_size // world_size // args.accum_iter} images per step per process × {world_size} "
              f"process(es) × {args.accum_iter} accumulated = effective batch {args.batch_size}, "
              f"learning rate {args.blr:g} · {args.batch_size} / 256 = {args.blr * args.batch_size / 256:g}\n"
              f"epochs {start // steps_per_epoch} to {args.epochs} of {steps_per_epoch} steps each, into {output}",
              flush=True)

    bar = tqdm(total=args.epochs * steps_per_epoch * args.batch_size, initial=start * args.batch_size,
               unit=" images", unit_scale=True, disable=rank > 0, mininterval=1 if sys.stderr.isatty() else 30)
    totals = torch.tensor(checkpoint["totals"], device=device)          # of an epoch begun: (processes, statistics)
    totals = totals[rank] if len(totals) == world_size else totals.mean(dim=0)
    requests, request, window = SaveRequests(rank, args.save_minutes), 0, []
    epoch_start = time.time() - checkpoint["seconds"]
    model.train()
    for step in range(start, args.epochs * steps_per_epoch):
        lr = learning_rate(step / steps_per_epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        row = 0.0
        for part in range(args.accum_iter):
            imgs = normalize(next(batches)[0].to(device, non_blocking=True))
            # Masks and dropout: the step and the part of its batch decide, so there is no random state to save
            torch.manual_seed(seed_from(args.seed, step, part * world_size + rank))
            net.require_backward_grad_sync = part == args.accum_iter - 1
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss, stats = net(imgs)
            scaler.scale(loss / args.accum_iter).backward()
            row = row + torch.stack([*stats.values()]) / args.accum_iter
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in params])
        if args.clip_grad:
            nn.utils.clip_grads_with_norm_(params, args.clip_grad, norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        row = torch.cat([row, norm[None]])                              # stays on the device: no wait for it here
        totals = totals + row.nan_to_num(0.0, 0.0, 0.0)                 # float16: a step that overflows is skipped
        window.append((step, lr, row))
        epoch, done = step // steps_per_epoch, step % steps_per_epoch + 1
        ended, request = done == steps_per_epoch, requests.poll()
        bar.update(args.batch_size)
        if ended or request or done % 20 == 0:
            check_finite(window, model, scaler, dtype, args.clip_grad)
            bar.set_postfix(epoch=epoch, loss=f"{totals[0].item() / done:.4f}", lr=f"{lr:.2e}", refresh=False)
            window = []
        if not (ended or request):
            continue

        # The end of an epoch, a signal, or time to save: log, picture, checkpoint
        seconds = time.time() - epoch_start
        sums, theirs = zip(*gather((totals.tolist(), skipped)))
        crops.merge(skipped, *theirs)
        if ended and rank == 0:
            means = [sum(column) / world_size / steps_per_epoch for column in zip(*sums)]
            line = {"epoch": epoch, **dict(zip([*stats, "grad_norm"], means)), "lr": lr, "seconds": seconds,
                    "images_per_s": steps_per_epoch * args.batch_size / seconds}
            if args.skip_bad:
                new = sorted(reason for reason, first in skipped.items() if first == epoch)
                line.update(skipped=len(skipped), newly_skipped=new)
            append(json.dumps(line), output / "log.jsonl")
            model.eval()
            save_picture(model.picture(imgs[:8], normalize), output / "reconstruction.png")
            model.train()
        if ended:
            sums, seconds, totals, epoch_start = [[0.0]], 0.0, 0.0, time.time()
        if rank == 0:
            save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                  "step": step + 1, "totals": sums, "seconds": seconds, "skipped": skipped, "args": vars(args)},
                 output / "last.pt")
        if request > 1:
            break

    bar.close()
    batches.close()
    if rank == 0 and request > 1:
        print(f"stopped: saved after step {step + 1}; the same command, without --no_resume, goes on from there")
    elif rank == 0:
        save({"model": model.encoder_state_dict(), "args": vars(args)}, output / "encoder.pt")
        print(f"Done. Next: python finetune.py --ckpt {output}/encoder.pt --data {args.data}{' --demo' * args.demo}")
    del net     # else the process group is freed with it, under Python's lock, where gloo's threads can wait for ever
    if dist.is_initialized():
        dist.destroy_process_group()
    if request > 1:
        sys.exit(request)


if __name__ == "__main__":
    try:
        main(get_args())
    except (InputError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        tqdm.write(f"{Path(__file__).name}: error: {str(error) or 'interrupted'}", file=sys.stderr)     # clears the bar
        sys.exit(2 if isinstance(error, InputError) else 1)
