"""Robust MAE: A Robustly and Effectively Optimized Pre-training Approach for Masked Autoencoder.
Anonymous authors. Submitted to ICLR 2023 (OpenReview LHBiPX5BOwZ).

Three ingredients for MAE. Drop edge: dropout on the decoder's attention probabilities, so that tokens find no shortcut
to each other (Section 2.1, after Eq. 1). Global patch normalisation: targets are standardised by the mean and variance
of each of a patch's P·P·3 values over the whole training set (Eq. 3), and only then by each patch's own (Eq. 2).
Mid-level mask tokens, off by default: some removed patches enter the encoder at a late block (Section 2.3).

Against mae.py: the decoder's blocks have dropout, targets pass through `inter_patch_norm` with the statistics that
`patch_statistics` gathers before training, and `forward_encoder` may add mask tokens.

Chosen where the paper is silent:
- Eq. 3's statistics are those of all patches of epoch 0's training crops, since patches of crops are predicted (the
  paper: "spatially resized to H × W", no crops; Section 2.2), of pixels in [0, 1]. Bytes are summed in integers, so
  that it doesn't matter how processes share the images. They are kept in the checkpoint. ε is 1e-6.
- --target none leaves pixels in [0, 1], rgb standardises channels by ImageNet's statistics, as MAE does: with rgb,
  --drop_edge 0 and --crop_scale 0.2 1 this is mae.py. Table 1 is --drop_edge 0, inferred from its 83.25 (Table 2's MAE,
  "our impl.", has 83.3). The encoder sees RGB-normalised pixels whatever the target. --no-norm_pix omits Eq. 2, whose
  variance is the unbiased one, as in MAE's released code.
- Mid-level (Section 3.4): --mid_ratio 0.25 gives 49 of the 147 removed patches, the first after the visible ones in
  shuffled order, a token of their own + position before blocks[8] of 12, counted from 0 (elsewhere two thirds of the
  depth). They pass through decoder_embed as visible ones do; the loss stays on all 147. The flag alone leaves drop edge
  and Eq. 3 on. We take Table 5, which compares with MAE, to be the tokens alone: --mid_ratio 0.25 --target rgb
  --drop_edge 0.
- RandomResizedCrop scale (0.5, 1) up to ViT-B (Section 3.1, for ViT-B), MAE's (0.2, 1) above. 800 epochs.

    python robust_mae.py --demo                                               # one CPU core: two minutes
    python robust_mae.py --data my_images --batch_size 256                    # one GPU of 24 GB
    torchrun --nproc_per_node 8 robust_mae.py --data imagenet                 # the paper's recipe, ViT-B, 800 epochs

Measured: on `shapes`, after --demo, a linear probe gets 54.0 % (random weights 26.4; mean of three seeds). On CIFAR-10,
after 8 epochs, 47.9 % (32.0): results/claims.md. ImageNet and GPUs: not run (the paper, fine-tuned: 83.6 % with
ViT-B, 85.6 % with ViT-L, 800 epochs).
"""
import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import IMAGENET_MEAN, IMAGENET_STD  # Robust: for Eq. 3
from common import (VIT_SIZES, Block, Crops, InputError, ViT, check_vit, denormalize, init_linear, load_dataset,
                    normalize, sincos_pos_embed, train_transform)
from runs import Run, launch, number, parse_args
from runs import gather  # Robust: for Eq. 3

DEMO = dict(data="shapes", model="vit_micro", img_size=[32], patch_size=4, decoder_embed_dim=64, decoder_depth=1,
            decoder_num_heads=2, batch_size=64, epochs=20, warmup_epochs=2, blr=8e-3, num_workers=0)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's recipe
# ---------------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    """Parses the command line. Raises InputError."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=VIT_SIZES, default="vit_base", help="the encoder")
    model.add_argument("--img_size", type=number(int, "[1, 16384]"), nargs="+", default=[224], help="pixels")
    model.add_argument("--patch_size", type=number(int, "[1, 16384]"), help="pixels (default: 16, vit_huge 14)")
    model.add_argument("--decoder_embed_dim", type=number(int, "[4, 65536]"), default=512, help="MAE's Table 1b")
    model.add_argument("--decoder_depth", type=number(int, "[1, 1000]"), default=8, help="blocks (MAE's Table 1a)")
    model.add_argument("--decoder_num_heads", type=number(int, "[1, 65536]"), default=16)
    model.add_argument("--init_from", help="a checkpoint: a new run starts from its weights")
    model.add_argument("--keep_every", type=number(int, "[1, inf)"), help="epochs: keep the encoder of each such epoch")

    optim = parser.add_argument_group("optimisation (MAE's Table 8)")
    optim.add_argument("--crop_scale", type=number(float, "(0, 1]"), nargs=2, default=[0.2, 1.0], help="crops' area")
    optim.add_argument("--epochs", type=number(int, "[1, inf)"), default=800)
    optim.add_argument("--warmup_epochs", type=number(float, "[0, inf)"), default=40)
    optim.add_argument("--batch_size", type=number(int, "[1, inf)"), default=4096, help="images a step, all processes")
    optim.add_argument("--accum_iter", type=number(int, "[1, inf)"), default=1, help="parts of a process's share")
    optim.add_argument("--blr", type=number(float, "(0, inf)"), default=1.5e-4, help="lr = blr · batch_size / 256")
    optim.add_argument("--weight_decay", type=number(float, "[0, inf)"), default=0.05)
    optim.add_argument("--clip_grad", type=number(float, "(0, inf)"), help="clip the gradient to this norm")

    method_args(parser)
    args = parse_args(parser, argv, demo=DEMO)
    args.patch_size = args.patch_size or VIT_SIZES[args.model]["patch_size"]
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs:g} must be less than --epochs {args.epochs}")
    method_checks(args)  # Robust: Section 3.1
    return args


def method_args(parser):  # Robust
    """Robust MAE's own."""
    method = parser.add_argument_group("Robust MAE")
    method.add_argument("--mask_ratio", type=number(float, "(0, 1)"), default=0.75, help="share of patches removed")
    method.add_argument("--norm_pix", action=argparse.BooleanOptionalAction, default=True,
                        help="standardise each patch of the target")
    method.add_argument("--drop_edge", type=number(float, "[0, 1)"), default=0.3,
                        help="decoder's attention dropout (Sections 2.1, 3.1)")
    method.add_argument("--target", choices=["none", "rgb", "patch"], default="patch",
                        help="what pixels are normalised by before --norm_pix (Table 1, Eq. 3)")
    method.add_argument("--mid_ratio", type=number(float, "[0, 1)"), default=0.0,
                        help="mid-level mask tokens' share of all patches (Section 3.4 has 0.25)")
    method.add_argument("--mid_depth", type=number(int, "[0, inf)"),
                        help="encoder block they enter before (default: two thirds)")
    parser.set_defaults(crop_scale=None)    # by the model: see method_checks


def method_checks(args):  # Robust
    """Sets what depends on other arguments."""
    if args.crop_scale is None:                                                                 # Section 3.1
        args.crop_scale = [0.2 if args.model in ("vit_large", "vit_huge") else 0.5, 1.0]


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


def mean_and_std(patches):
    """Each patch's own mean and standard deviation, over the last dimension; the variance is the unbiased one + 1e-6,
    as the released weights were trained with."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6) ** 0.5


def random_masking(noise, len_keep):
    """Sorts the patches of each image by their noise (N, L): the first `len_keep` stay visible.

    Returns ids_keep (N, len_keep) and ids_remove (N, L - len_keep). Source: MAE, Section 3, "Simple implementation".
    """
    ids_shuffle = noise.argsort(dim=1)
    return ids_shuffle[:, :len_keep], ids_shuffle[:, len_keep:]


def patch_statistics(run, crops, patch_size):  # Robust
    """Mean and variance of Eq. 3, each (P·P·3) in float64, of pixels in [0, 1] over all patches of epoch 0's crops.
    Sums of bytes and of their squares in 64-bit integers are exact, in whatever order processes add them."""
    sums, count = 0, 0
    for imgs, _ in run.once(crops, batch_size=64, progress="patch statistics"):
        patches = patchify(imgs, patch_size).flatten(0, 1)                               # (N·L, P·P·3)
        patches, scale = (patches.long(), 255) if imgs.dtype == torch.uint8 else (patches.cpu().double(), 1)
        sums = sums + torch.stack([patches.sum(dim=0), patches.square().sum(dim=0)]).cpu()
        count += len(patches)
    mean, square = sum(gather(sums)).double() / sum(gather(count))
    return mean / scale, (square - mean**2) / scale**2


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
class RobustMAE(ViT):  # Robust
    """Masked autoencoder with drop edge and globally normalised targets. Raises InputError for sizes that don't fit."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512,
                 decoder_depth=8, decoder_num_heads=16, mask_ratio=0.75, norm_pix=True, in_chans=3,
                 drop_edge=0.3, target="patch", mid_ratio=0.0, mid_depth=None):  # Robust
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, in_chans=in_chans)
        check_vit(img_size, patch_size, decoder_embed_dim, decoder_num_heads)
        self.len_keep = int(self.num_patches * (1 - mask_ratio) + 1e-6)     # so ratio 13/14 of 196 patches keeps 14
        if not 0 < self.len_keep < self.num_patches:
            raise InputError(f"mask_ratio {mask_ratio} must keep and remove at least one of {self.num_patches} patches")
        self.norm_pix = norm_pix
        self.target = target
        self.mid_count = int(self.num_patches * mid_ratio + 1e-6)       # 49 of 196
        self.mid_depth = depth * 2 // 3 if mid_depth is None else mid_depth
        if mid_ratio and not 1 / self.num_patches <= mid_ratio <= mask_ratio:
            raise InputError(f"mid_ratio must be 0, or from one patch, 1/{self.num_patches}, to mask_ratio")
        if not 0 <= self.mid_depth < depth or not mid_ratio and mid_depth is not None:
            raise InputError(f"mid_depth needs mid_ratio, and is from 0 to {depth - 1}")
        if self.mid_count:
            self.mid_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        # A patch vector's order is (row, column, channel); main sets all four: by channel, and by place as in Eq. 3
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if in_chans == 3 else ([0.0] * in_chans, [1.0] * in_chans)
        self.register_buffer("rgb_mean", torch.tensor(mean).repeat(patch_size**2))
        self.register_buffer("rgb_std", torch.tensor(std).repeat(patch_size**2))
        self.register_buffer("patch_mean", torch.zeros(patch_size**2 * in_chans))        # μ and σ², Eq. 3
        self.register_buffer("patch_var", torch.ones(patch_size**2 * in_chans))
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        position = sincos_pos_embed(decoder_embed_dim, self.grid_size)
        self.decoder_pos_embed = nn.Parameter(F.pad(position, (0, 0, 1, 0))[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads, attn_drop=drop_edge)
                                            for _ in range(decoder_depth))              # drop edge, Section 2.1
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.initialize_weights()

    def initialize_weights(self):  # Robust
        """All that ViT does not initialise itself."""
        nn.init.normal_(self.mask_token, std=0.02)
        if self.mid_count:
            nn.init.normal_(self.mid_token, std=0.02)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)

    def forward_encoder(self, patches, ids_keep, ids_remove):  # Robust
        """Visible patches to tokens: patches (N, L, P·P·3), ids_keep (N, keep) -> (N, 1 + keep, D); with mid-level mask
        tokens for the first `mid` of ids_remove (N, L - keep) also those, after them: (N, 1 + keep + mid, D)."""
        x = self.patch_embed(patches.take_along_dim(ids_keep[:, :, None], dim=1))        # (N, keep, D)
        x = x + self.pos_embed[0, 1 + ids_keep]                                          # row 0 is cls's
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)                      # (N, 1 + keep, D)
        for i, block in enumerate(self.blocks):
            if self.mid_count and i == self.mid_depth:                                   # Section 2.3
                x = torch.cat([x, self.mid_token + self.pos_embed[0, 1 + ids_remove[:, :self.mid_count]]], dim=1)
            x = block(x)
        return self.norm(x)

    def inter_patch_norm(self, patches):  # Robust
        """Patches (…, P·P·3) of RGB-normalised pixels to the chosen target before the per-patch standardisation."""
        if self.target == "rgb":
            return patches
        pixels = patches * self.rgb_std + self.rgb_mean                                  # in [0, 1]
        return pixels if self.target == "none" else (pixels - self.patch_mean) / (self.patch_var + 1e-6) ** 0.5  # Eq. 3

    def undo_inter_patch_norm(self, target):  # Robust
        """The inverse of `inter_patch_norm`."""
        if self.target == "rgb":
            return target
        pixels = target if self.target == "none" else target * (self.patch_var + 1e-6) ** 0.5 + self.patch_mean
        return (pixels - self.rgb_mean) / self.rgb_std

    def forward_decoder(self, latent, ids_keep, ids_remove, predict_all=False):
        """Tokens (N, 1 + keep, D) to predictions of the removed patches, (N, L - keep, ·), in ids_remove's order; with
        `predict_all` of the visible ones too, before them: (N, L, ·)."""
        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.expand(len(x), ids_remove.shape[1] - self.mid_count, -1)  # Robust: Section 2.3
        ids = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep, 1 + ids_remove], dim=1)   # row 0 is cls's
        x = torch.cat([x, mask_tokens], dim=1) + self.decoder_pos_embed[0, ids]          # (N, 1 + L, D_decoder)
        for block in self.decoder_blocks:
            x = block(x)
        x = x[:, 1:] if predict_all else x[:, 1 + ids_keep.shape[1]:]
        return self.decoder_pred(self.decoder_norm(x))

    def forward_loss(self, patches, pred, ids_remove):  # Robust
        """Mean squared error over the removed patches, in float32; patches (N, L, P·P·3), pred (N, L - keep, P·P·3)."""
        target = self.inter_patch_norm(patches.take_along_dim(ids_remove[:, :, None], dim=1))
        if self.norm_pix:                                                                # Eq. 2
            mean, std = mean_and_std(target)
            target = (target - mean) / std
        return F.mse_loss(pred.float(), target)

    def forward(self, imgs, noise=None):  # Robust
        """Images (N, 3, H, W), and noise (N, L) that fixes the mask, to the loss and a dict of what else to log."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = random_masking(noise, self.len_keep)
        patches = patchify(imgs, self.patch_size)                                        # (N, L, P·P·3)
        latent = self.forward_encoder(patches, ids_keep, ids_remove)
        pred = self.forward_decoder(latent, ids_keep, ids_remove)
        return self.forward_loss(patches, pred, ids_remove), {}

    @torch.no_grad()
    def reconstruct(self, imgs, noise=None):  # Robust
        """Every patch's prediction in its place (N, L, P·P·3), and the mask (N, L): 0 = visible, 1 = removed."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = random_masking(noise, self.len_keep)
        latent = self.forward_encoder(patchify(imgs, self.patch_size), ids_keep, ids_remove)
        pred = self.forward_decoder(latent, ids_keep, ids_remove, predict_all=True)
        ids_restore = torch.cat([ids_keep, ids_remove], dim=1).argsort(dim=1)
        mask = torch.ones(ids_restore.shape, device=imgs.device).scatter(1, ids_keep, 0.0)
        return pred.take_along_dim(ids_restore[:, :, None], dim=1), mask

    def picture(self, imgs, *channels):  # Robust
        """Rows of a picture, each (N, 3, H, W): original, masked, and the removed patches' prediction pasted in.

        A per-patch-standardised prediction has no mean and scale of its own: they are the original patch's. That is
        undone first, then the normalisation over all patches.
        """
        pred, mask = self.reconstruct(imgs)
        patches, mask = patchify(imgs, self.patch_size), mask[:, :, None]
        if self.norm_pix:
            mean, std = mean_and_std(self.inter_patch_norm(patches))
            pred = pred * std + mean
        pred = self.undo_inter_patch_norm(pred)
        rows = (patches, patches * (1 - mask), patches * (1 - mask) + pred * mask)
        return [denormalize(unpatchify(row, self.patch_size, self.grid_size), *channels) for row in rows]


def build_model(args):  # Robust
    """The model that the command line describes."""
    size = dict(VIT_SIZES[args.model], img_size=args.img_size, patch_size=args.patch_size, in_chans=args.in_chans)
    return RobustMAE(**size, decoder_embed_dim=args.decoder_embed_dim, decoder_depth=args.decoder_depth,
                     decoder_num_heads=args.decoder_num_heads, mask_ratio=args.mask_ratio, norm_pix=args.norm_pix,
                     drop_edge=args.drop_edge, target=args.target, mid_ratio=args.mid_ratio, mid_depth=args.mid_depth)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation
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


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------
def main(args):
    """Pre-trains from the start, or from where OUTPUT/last.pt was saved, to the end."""
    torch.manual_seed(args.seed)                    # every process starts from the same weights
    model = build_model(args)                       # before Run: sizes that don't fit leave no folder behind
    run = Run(args, __file__)
    device, dtype = run.device, run.dtype
    source = load_dataset(args.data, "pretrain", args.data_root, args.in_chans)
    crops = Crops(source, train_transform(args.img_size, args.crop_scale), args.seed, args.skip_bad)
    channels = run.channels(crops)                  # their mean and standard deviation

    model.to(device)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run.resume(crops, model, optimizer, scaler, init_from=args.init_from)
    run.say(f"learning rate {args.blr:g} · {args.batch_size} / 256 = {args.blr * args.batch_size / 256:g}")
    model.rgb_mean[:], model.rgb_std[:] = (torch.tensor(x).repeat(args.patch_size**2) for x in channels)  # Robust
    if run.step == 0 and args.target == "patch":  # Robust: Eq. 3, from then on in the checkpoint
        model.patch_mean[:], model.patch_var[:] = patch_statistics(run, crops, args.patch_size)  # Robust: Eq. 3
    if args.compile:
        model.compile()
    # On CPUs: sums in the same order in every step, also the first of a resumed run (else DDP reorders them after it)
    net = DistributedDataParallel(model, find_unused_parameters=device.type == "cpu") if run.world_size > 1 else model

    for epoch in run.epochs():
        model.train()
        for step in run.steps():
            lr = learning_rate(step / run.steps_per_epoch, args)
            for group in optimizer.param_groups:
                group["lr"] = lr

            for part, (imgs, _) in enumerate(run.parts()):                  # also seeds masks and dropout
                net.require_backward_grad_sync = part == args.accum_iter - 1    # all-reduce once, after the last part
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss, stats = net(normalize(imgs, *channels))
                scaler.scale(loss / args.accum_iter).backward()
                run.add(loss, **stats)
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.get_total_norm([p.grad for p in params])
            if args.clip_grad:
                nn.utils.clip_grads_with_norm_(params, args.clip_grad, grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.end_step(grad_norm)                 # when due: checkpoint, checks, and the exit after a signal

        model.eval()
        keep = {"encoder": model.encoder_state_dict()}
        run.end_epoch(picture=model.picture(normalize(run.examples(), *channels), *channels), keep=keep)
    run.finish(encoder=model.encoder_state_dict())


if __name__ == "__main__":
    launch(main, get_args)
