"""Ablations of MAE: the rows of its Table 1 that flags of mae.py do not give.
Kaiming He, Xinlei Chen, Saining Xie, Yanghao Li, Piotr Dollár, Ross Girshick. CVPR 2022. arXiv:2111.06377

    flag                                 row of Table 1                   fine-tuned / linear, %
    (none)                               the default                      84.9 / 73.5
    --encoder_mask_tokens                c, encoder with mask tokens      84.2 / 59.6
    --target pca                         d, PCA coefficients of a patch   84.6 / 72.3
    --augmentation none, fixed, jitter   e                                84.0 / 65.7, 84.7 / 73.1, 84.3 / 71.9
    --masking block --mask_ratio 0.5     f, block-wise                    83.9 / 72.3 (at 0.75: 82.8 / 63.9)
    --masking grid                       f, grid                          84.0 / 66.0
    --loss all                           (in the text, "Reconstruction target" of Section 3: 0.5 % less)

All rows there are ViT-L, 800 epochs, and predict un-normalised pixels: those are the defaults here. mae.py's own flags
give the others: --decoder_depth (1a), --decoder_embed_dim (1b), --norm_pix (1d), --mask_ratio (Figure 5). The dVAE
target of 1d needs another model, and is not implemented.

Chosen where the paper is silent:
- Blocks are drawn as in BEiT (arXiv:2106.08254), to which the paper refers: rectangles of at least 16 patches and an
  aspect ratio of 0.3 to 1/0.3, until enough patches are removed. Every image must lose equally many: surplus patches
  of the last block stay visible, chosen by their noise.
- The grid keeps one of each 2×2 patches, the upper left one ("regularly keeps one of every four patches").
- PCA coefficients: the paper keeps 96 of each patch's 768; the components are those of the training crops' patches
  (10,000 images of epoch 0), and coefficients are neither centred (the last layer has a bias) nor scaled.
- Mask tokens in the encoder are one learnt vector + position, and so the decoder gets no other.
- "fixed" is a random crop of the size itself, after the shorter side was resized to 256/224 of it; "jitter" adds colour
  jitter of 0.4 to brightness, contrast and saturation and 0.1 to hue to random resized crops; "none" is a centre crop,
  without a flip.

    python mae_ablations.py --demo --masking grid                                    # one CPU core: three minutes
    python mae_ablations.py --data my_images --model vit_base --batch_size 256 --loss all               # one GPU
    torchrun --nproc_per_node 8 mae_ablations.py --data imagenet --masking block --mask_ratio 0.5      # Table 1f

Not run yet, except by the tests.
"""
import argparse
import functools  # Ablations: transforms
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (VIT_SIZES, Block, Crops, InputError, ViT, check_vit, denormalize, init_linear, load_dataset,
                    normalize, sincos_pos_embed, train_transform)
from common import pair, resize_and_crop, seed_from  # Ablations: Tables 1d, 1e
from runs import Run, launch, number, parse_args
from torchvision.transforms import v2  # Ablations: Table 1e

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
    method_checks(args)  # Ablations: Table 1
    return args


def method_args(parser):  # Ablations
    """Table 1's."""
    method = parser.add_argument_group("MAE")
    method.add_argument("--mask_ratio", type=number(float, "(0, 1)"), default=0.75, help="share of patches removed")
    method.add_argument("--norm_pix", action=argparse.BooleanOptionalAction, default=False,
                        help="standardise each patch of the target")
    method.add_argument("--masking", choices=["random", "block", "grid"], default="random", help="Table 1f")
    method.add_argument("--encoder_mask_tokens", action="store_true", help="Table 1c: the encoder sees all places")
    method.add_argument("--target", choices=["pixels", "pca"], default="pixels", help="Table 1d")
    method.add_argument("--components", type=number(int, "[1, 65536]"), help="of PCA (default: 96; Table 1d)")
    method.add_argument("--augmentation", choices=["crop", "none", "fixed", "jitter"], default="crop", help="Table 1e")
    method.add_argument("--loss", choices=["removed", "all"], default="removed", help="the patches in the loss")
    parser.set_defaults(model="vit_large")                                                      # Table 1


def method_checks(args):  # Ablations
    """Sets what depends on other arguments. Raises InputError if two don't go together."""
    if args.components and args.target != "pca":
        raise InputError("--components needs --target pca")
    if args.crop_scale != [0.2, 1.0] and args.augmentation in ("none", "fixed"):
        raise InputError(f"--crop_scale: --augmentation {args.augmentation} takes no random area")
    args.components = args.components or (24 if args.demo else 96)      # of 48, 768 numbers a patch


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


def block_order(noise, grid_size, len_keep):  # Ablations
    """Table 1f's block-wise masks: noise (N, L) to ids_keep and ids_remove as `random_masking` gives them.

    Blocks are drawn on the CPU, one image after another, from a generator that the noise seeds.
    """
    rows, columns = grid_size
    keep = []
    for values in noise.cpu():
        generator = torch.Generator().manual_seed(int(values[0] * 2**52))
        removed = torch.zeros(rows, columns, dtype=torch.bool)
        while removed.sum() < removed.numel() - len_keep:
            share, stretch, top, left = torch.rand(4, generator=generator).tolist()
            least = min(16, removed.numel() - len_keep)
            area = least + share * max(0, removed.numel() - len_keep - removed.sum().item() - least)
            ratio = math.exp((2 * stretch - 1) * math.log(1 / 0.3))                     # height over width
            height = min(rows, max(1, round(math.sqrt(area * ratio))))
            width = min(columns, max(1, round(math.sqrt(area / ratio))))
            top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
            before = removed.clone()
            removed[top:top + height, left:left + width] = True
        too_many = removed.sum().item() - (removed.numel() - len_keep)                   # of the last block: by noise
        last = torch.where(removed & ~before, values.view(rows, columns), 2.0)
        removed.view(-1)[last.flatten().argsort()[:too_many]] = False
        keep.append((~removed).flatten())
    return random_masking(noise - 2 * torch.stack(keep).to(noise), len_keep)      # kept ones first


def pca(crops, channels, patch_size, components, number=10000):  # Ablations
    """Table 1d: the principal components (P·P·3, components) of the patches of `number` of epoch 0's crops."""
    covariance, mean, count = 0.0, 0.0, 0
    generator = torch.Generator().manual_seed(seed_from(crops.seed))
    for index in torch.randperm(len(crops), generator=generator)[:number].tolist():
        patches = patchify(normalize(crops[0, index][0][None], *channels), patch_size)[0].double()
        covariance, mean, count = covariance + patches.T @ patches, mean + patches.sum(dim=0), count + len(patches)
    covariance = covariance / count - torch.outer(mean / count, mean / count)
    return torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :components].float()    # eigh: of rising variance


def augmentation(args, arrays):  # Ablations
    """Table 1e: what happens to an image (C, H, W) of the training set; `arrays`: from an .npy file. Raises
    InputError."""
    if args.augmentation == "jitter" and (arrays or args.in_chans != 3):
        raise InputError("--augmentation jitter is made for RGB files")
    size = pair(args.img_size)
    if args.augmentation == "none":
        return functools.partial(resize_and_crop, size=size)
    if args.augmentation == "fixed":
        return v2.Compose([v2.Resize(max(size) * 256 // 224, v2.InterpolationMode.BICUBIC), v2.RandomCrop(size),
                           v2.RandomHorizontalFlip()])
    crop = train_transform(args.img_size, args.crop_scale)
    return v2.Compose([crop, v2.ColorJitter(0.4, 0.4, 0.4, 0.1)]) if args.augmentation == "jitter" else crop


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
class AblatedMAE(ViT):  # Ablations
    """MAE with Table 1's other choices. Raises InputError for sizes that don't fit."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512,
                 decoder_depth=8, decoder_num_heads=16, mask_ratio=0.75, norm_pix=False, in_chans=3, masking="random",
                 encoder_mask_tokens=False, target="pixels", components=96, loss="removed"):  # Ablations
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, in_chans=in_chans)
        check_vit(img_size, patch_size, decoder_embed_dim, decoder_num_heads)
        self.len_keep = int(self.num_patches * (1 - mask_ratio) + 1e-6)     # so ratio 13/14 of 196 patches keeps 14
        if not 0 < self.len_keep < self.num_patches:
            raise InputError(f"mask_ratio {mask_ratio} must keep and remove at least one of {self.num_patches} patches")
        if masking == "grid" and (any(n % 2 for n in self.grid_size) or 4 * self.len_keep != self.num_patches):
            raise InputError("masking grid keeps one of 2×2 patches: needs mask_ratio 0.75, even grid")
        if target == "pca" and not 0 < components <= patch_size**2 * in_chans:
            raise InputError(f"components must be from 1 to the {patch_size**2 * in_chans} numbers of a patch")
        self.norm_pix = norm_pix
        self.masking, self.encoder_mask_tokens, self.target, self.loss_on = masking, encoder_mask_tokens, target, loss
        if encoder_mask_tokens:
            self.encoder_mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim), requires_grad=not encoder_mask_tokens)
        position = sincos_pos_embed(decoder_embed_dim, self.grid_size)
        self.decoder_pos_embed = nn.Parameter(F.pad(position, (0, 0, 1, 0))[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, components if target == "pca" else patch_size**2 * in_chans)
        if target == "pca":
            self.register_buffer("components", torch.zeros(patch_size**2 * in_chans, components))    # set by main
        self.initialize_weights()

    def initialize_weights(self):
        """All that ViT does not initialise itself."""
        nn.init.normal_(self.mask_token, std=0.02)
        if self.encoder_mask_tokens:  # Ablations: Table 1c
            nn.init.normal_(self.encoder_mask_token, std=0.02)  # Ablations: Table 1c
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)

    def mask_sampling(self, noise):  # Ablations
        """Table 1f: noise (N, L) to ids_keep and ids_remove, as `random_masking` gives."""
        if self.masking == "block":
            return block_order(noise, self.grid_size, self.len_keep)
        if self.masking == "grid":
            ids = torch.arange(self.num_patches, device=noise.device)
            kept = (ids // self.grid_size[1] % 2 == 0) & (ids % self.grid_size[1] % 2 == 0)
            noise = noise - 2 * kept
        return random_masking(noise, self.len_keep)

    def forward_encoder(self, patches, ids_keep, ids_remove):  # Ablations
        """Visible patches to tokens: patches (N, L, P·P·3), ids_keep (N, keep) -> (N, 1 + keep, D); in Table 1c
        with mask tokens for ids_remove (N, L - keep) after them: (N, 1 + L, D)."""
        x = self.patch_embed(patches.take_along_dim(ids_keep[:, :, None], dim=1))        # (N, keep, D)
        x = x + self.pos_embed[0, 1 + ids_keep]                                          # row 0 is cls's
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)                      # (N, 1 + keep, D)
        if self.encoder_mask_tokens:
            x = torch.cat([x, self.encoder_mask_token + self.pos_embed[0, 1 + ids_remove]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, latent, ids_keep, ids_remove, predict_all=False):
        """Tokens (N, 1 + keep, D) to predictions of the removed patches, (N, L - keep, ·), in ids_remove's order; with
        `predict_all` of the visible ones too, before them: (N, L, ·)."""
        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.expand(len(x), 1 + self.num_patches - x.shape[1], -1)  # Ablations: Table 1c
        ids = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep, 1 + ids_remove], dim=1)   # row 0 is cls's
        x = torch.cat([x, mask_tokens], dim=1) + self.decoder_pos_embed[0, ids]          # (N, 1 + L, D_decoder)
        for block in self.decoder_blocks:
            x = block(x)
        x = x[:, 1:] if predict_all else x[:, 1 + ids_keep.shape[1]:]
        return self.decoder_pred(self.decoder_norm(x))

    def forward_loss(self, patches, pred, ids):  # Ablations
        """Mean squared error over the patches `ids` (N, n), in float32; patches (N, L, P·P·3), pred (N, n, ·)."""
        target = patches.take_along_dim(ids[:, :, None], dim=1)
        if self.norm_pix:
            mean, std = mean_and_std(target)
            target = (target - mean) / std
        if self.target == "pca":                                                         # Table 1d
            with torch.autocast(target.device.type, enabled=False):
                target = target @ self.components
        return F.mse_loss(pred.float(), target)

    def forward(self, imgs, noise=None):  # Ablations
        """Images (N, 3, H, W), and noise (N, L) that fixes the mask, to the loss and a dict of what else to log."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = self.mask_sampling(noise)
        patches = patchify(imgs, self.patch_size)                                        # (N, L, P·P·3)
        latent = self.forward_encoder(patches, ids_keep, ids_remove)
        pred = self.forward_decoder(latent, ids_keep, ids_remove, predict_all=self.loss_on == "all")
        ids = torch.cat([ids_keep, ids_remove], dim=1) if self.loss_on == "all" else ids_remove
        return self.forward_loss(patches, pred, ids), {}

    @torch.no_grad()
    def reconstruct(self, imgs, noise=None):  # Ablations
        """Every patch's prediction in its place (N, L, P·P·3), and the mask (N, L): 0 = visible, 1 = removed."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = self.mask_sampling(noise)
        latent = self.forward_encoder(patchify(imgs, self.patch_size), ids_keep, ids_remove)
        pred = self.forward_decoder(latent, ids_keep, ids_remove, predict_all=True)
        pred = pred.float() @ self.components.T if self.target == "pca" else pred
        ids_restore = torch.cat([ids_keep, ids_remove], dim=1).argsort(dim=1)
        mask = torch.ones(ids_restore.shape, device=imgs.device).scatter(1, ids_keep, 0.0)
        return pred.take_along_dim(ids_restore[:, :, None], dim=1), mask

    def picture(self, imgs, *channels):
        """Rows of a picture, each (N, 3, H, W): original, masked, and the removed patches' prediction pasted in.

        A per-patch-standardised prediction has no mean and scale of its own: they are the original patch's.
        """
        pred, mask = self.reconstruct(imgs)
        patches, mask = patchify(imgs, self.patch_size), mask[:, :, None]
        if self.norm_pix:
            mean, std = mean_and_std(patches)
            pred = pred * std + mean
        rows = (patches, patches * (1 - mask), patches * (1 - mask) + pred * mask)
        return [denormalize(unpatchify(row, self.patch_size, self.grid_size), *channels) for row in rows]


def build_model(args):  # Ablations
    """The model that the command line describes."""
    size = dict(VIT_SIZES[args.model], img_size=args.img_size, patch_size=args.patch_size, in_chans=args.in_chans)
    return AblatedMAE(**size, decoder_embed_dim=args.decoder_embed_dim, decoder_depth=args.decoder_depth,
                      decoder_num_heads=args.decoder_num_heads, mask_ratio=args.mask_ratio, norm_pix=args.norm_pix,
                      masking=args.masking, encoder_mask_tokens=args.encoder_mask_tokens, target=args.target,
                      components=args.components, loss=args.loss)


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
    transform = augmentation(args, getattr(source, "arrays", False))  # Ablations: Table 1e
    crops = Crops(source, transform, args.seed, args.skip_bad)  # Ablations: Table 1e
    channels = run.channels(crops)                  # their mean and standard deviation

    model.to(device)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run.resume(crops, model, optimizer, scaler, init_from=args.init_from)
    if run.step == 0 and args.target == "pca":  # Ablations: Table 1d, from then on in the checkpoint
        model.components[:] = pca(crops, channels, args.patch_size, args.components)  # Ablations: Table 1d
    run.say(f"learning rate {args.blr:g} · {args.batch_size} / 256 = {args.blr * args.batch_size / 256:g}")
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
