"""EMAE: Efficient Masked Autoencoders with Self-Consistency.
Zhaowen Li, Yousong Zhu, Zhiyang Chen, Wei Li, Chaoyang Zhao, Liwei Wu, Rui Zhao, Ming Tang, Jinqiao Wang. 2023.
arXiv:2302.14431 (its first version, whose equations are numbered here)

An image's patches are shuffled and cut into K parts (Eq. 3, 4); each part in turn is the visible one and the others are
predicted from it as in MAE, so that every patch is seen once an iteration (Eq. 5-8). A patch removed in two parts is
predicted twice: a self-consistency loss pulls the two predictions together (Eq. 9-11). The loss is the sum (Eq. 12).

Against mae.py: `random_masking` gives K masks instead of one, the K parts run as one batch K times as large, and
`forward_consistency` is new. An epoch does about K times the work of MAE's: compare at equal compute as well.

Chosen where the paper is silent:
- ‖·‖ in Eq. 10 is the mean absolute error over the pixels and patches of s_ij (Section 3.2.2: "mean absolute error"),
  between the decoder's outputs as they are, in float32; an image's loss is the mean over its pairs i < j. A second
  reading, in a public port, takes the mean over all patches: times (K - 2)/K, --consistency_weight 0.5 at K = 4.
- Patches are embedded once for all parts, since each is visible in exactly one.
- Targets are standardised per patch, as by MAE's better recipe (Eq. 2 has plain ones; --no-norm_pix).
- K sets the mask ratio, (K - 1) / K, so there is no --mask_ratio. The default is 300 epochs, as in the paper's main
  comparison (800 for its best). --consistency_weight 0 is Table 5's "+ whole data utilization".

    python emae.py --demo                                               # one CPU core: three minutes
    python emae.py --data my_images --batch_size 256 --accum_iter 4     # one GPU of 24 GB
    torchrun --nproc_per_node 8 emae.py --data imagenet --accum_iter 2  # the paper's recipe, ViT-B, 300 epochs; 80 GB

Measured: on `shapes`, after --demo, a linear probe gets 51.4 % (random weights 26.4; mean of three seeds). The demo's
consistency weight is 0.1: with the paper's 1 so short a run learns next to nothing (29.4 %, seed 0). On CIFAR-10, after
8 epochs, 48.8 % (32.0). After 6,250 steps on 10,000 of its images (mean of three seeds) 47.0 %, with weight 0 49.1, MAE
47.2: docs/reading.md. ImageNet and GPUs: not run (the paper: 83.8 % fine-tuned, 68.2 % linear, ViT-B, 300 epochs).
"""
import argparse
import itertools  # EMAE: pairs of parts
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (VIT_SIZES, Block, Crops, InputError, ViT, check_vit, denormalize, init_linear, load_dataset,
                    normalize, sincos_pos_embed, train_transform)
from runs import Run, launch, number, parse_args

DEMO = dict(data="shapes", model="vit_micro", img_size=[32], patch_size=4, decoder_embed_dim=64, decoder_depth=1,
            decoder_num_heads=2, batch_size=64, epochs=20, warmup_epochs=2, blr=8e-3, num_workers=0)
DEMO.update(epochs=10, warmup_epochs=1, consistency_weight=0.1)  # EMAE: see "Measured"


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
    return args


def method_args(parser):  # EMAE
    """EMAE's own, and its recipe."""
    method = parser.add_argument_group("EMAE")
    method.add_argument("--parts", type=number(int, "[2, inf)"), default=4, help="K: each part sees 1/K (Eq. 4)")
    method.add_argument("--consistency_weight", type=number(float, "[0, inf)"), default=1.0,
                        help="of Eq. 11 in Eq. 12; 0: whole data utilisation alone (Table 5)")
    method.add_argument("--norm_pix", action=argparse.BooleanOptionalAction, default=True,
                        help="standardise each patch of the target")
    parser.set_defaults(epochs=300)                                                             # Table 1


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


def random_masking(noise, parts):  # EMAE
    """Sorts the patches of each image by their noise (N, L) and cuts them into K parts, each visible once.

    Returns ids_keep (N·K, L/K) and ids_remove (N·K, L - L/K), an image's K parts after one another. A part's removed
    patches are the other parts in order. Source: Eq. 3-7, Algorithm 1.
    """
    ids = noise.argsort(dim=1)                                                           # Eq. 3
    ids_keep = ids.unflatten(1, (parts, -1))                                             # Eq. 4: (N, K, L/K)
    ids_remove = [torch.cat([ids_keep[:, :part], ids_keep[:, part + 1:]], dim=1).flatten(1) for part in range(parts)]
    return ids_keep.flatten(0, 1), torch.stack(ids_remove, dim=1).flatten(0, 1)          # Eq. 6


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
class EMAE(ViT):  # EMAE
    """Masked autoencoder on K complementary masks at once. Raises InputError for sizes that don't fit."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512,
                 decoder_depth=8, decoder_num_heads=16, norm_pix=True, in_chans=3, parts=4,
                 consistency_weight=1.0):  # EMAE
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, in_chans=in_chans)
        check_vit(img_size, patch_size, decoder_embed_dim, decoder_num_heads)
        if self.num_patches % parts or parts < (3 if consistency_weight else 2):
            raise InputError(f"{parts} parts must divide {self.num_patches} patches; 2 need consistency_weight 0")
        self.norm_pix = norm_pix
        self.parts = parts
        self.consistency_weight = consistency_weight
        # Part i predicts all parts but i, in order: where the K - 1 predictions of each part stand, part after part
        where = [i * (parts - 1) + part - (part > i) for part in range(parts) for i in range(parts) if i != part]
        self.register_buffer("predictions_of", torch.tensor(where), persistent=False)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        position = sincos_pos_embed(decoder_embed_dim, self.grid_size)
        self.decoder_pos_embed = nn.Parameter(F.pad(position, (0, 0, 1, 0))[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.initialize_weights()

    def initialize_weights(self):
        """All that ViT does not initialise itself."""
        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)

    def forward_encoder(self, patches, ids_keep):  # EMAE
        """Each part's patches to tokens: patches (N, L, P·P·3), ids_keep (N·K, L/K) -> (N·K, 1 + L/K, D)."""
        ids = ids_keep.reshape(len(patches), -1)                                         # (N, L): every patch once
        x = self.patch_embed(patches.take_along_dim(ids[:, :, None], dim=1))
        x = x.reshape(*ids_keep.shape, -1) + self.pos_embed[0, 1 + ids_keep]             # (N·K, L/K, D): Eq. 5
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)                      # (N·K, 1 + L/K, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, latent, ids_keep, ids_remove, predict_all=False):
        """Tokens (N, 1 + keep, D) to predictions of the removed patches, (N, L - keep, ·), in ids_remove's order; with
        `predict_all` of the visible ones too, before them: (N, L, ·)."""
        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.expand(len(x), ids_remove.shape[1], -1)
        ids = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep, 1 + ids_remove], dim=1)   # row 0 is cls's
        x = torch.cat([x, mask_tokens], dim=1) + self.decoder_pos_embed[0, ids]          # (N, 1 + L, D_decoder)
        for block in self.decoder_blocks:
            x = block(x)
        x = x[:, 1:] if predict_all else x[:, 1 + ids_keep.shape[1]:]
        return self.decoder_pred(self.decoder_norm(x))

    def forward_loss(self, patches, pred, ids_remove):  # EMAE
        """Eq. 8: MAE's loss, the mean over the parts; patches (N, L, P·P·3), pred (N·K, L - L/K, P·P·3)."""
        target = patches                                                # standardised once for all parts
        if self.norm_pix:
            mean, std = mean_and_std(target)
            target = (target - mean) / std
        target = target.take_along_dim(ids_remove.reshape(len(patches), -1, 1), dim=1)
        return F.mse_loss(pred.float(), target.reshape(pred.shape))

    def forward_consistency(self, pred):  # EMAE
        """Eq. 9-11: how far two parts' predictions of one patch are apart; pred (N·K, L - L/K, P·P·3).

        The parts that i and j both predict, s_ij (Eq. 9), are all but i and j: so each part has K - 1 predictions, and
        every two of them are one pair of Eq. 10.
        """
        K = self.parts
        pred = pred.float().reshape(-1, K * (K - 1), self.num_patches // K, pred.shape[2])
        pred = pred.index_select(1, self.predictions_of).unflatten(1, (K, K - 1))        # (N, K, K - 1, L/K, P·P·3)
        pairs = itertools.combinations(pred.unbind(2), 2)
        distance = torch.stack([(p_i - p_j).abs().mean() for p_i, p_j in pairs]).mean()
        # Eq. 10, |sg(p_i) - p_j| + |p_i - sg(p_j)|: the stop-gradients double the value and not the gradient
        return distance + distance.detach()                                              # Eq. 11

    def forward(self, imgs, noise=None):  # EMAE
        """Images (N, 3, H, W), and noise (N, L) that fixes the masks, to the loss and a dict of what else to log."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = random_masking(noise, self.parts)
        patches = patchify(imgs, self.patch_size)                                        # (N, L, P·P·3)
        latent = self.forward_encoder(patches, ids_keep)
        pred = self.forward_decoder(latent, ids_keep, ids_remove)
        whole = self.forward_loss(patches, pred, ids_remove)
        if self.consistency_weight == 0:
            return whole, {}
        consistency = self.forward_consistency(pred)
        loss = whole + self.consistency_weight * consistency                             # Eq. 12
        return loss, {"whole": whole, "consistency": consistency}

    @torch.no_grad()
    def reconstruct(self, imgs, noise=None):  # EMAE
        """Every part's prediction of every patch (N, K, L, P·P·3), and its mask (N, K, L): 0 = visible, 1 = removed."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = random_masking(noise, self.parts)
        latent = self.forward_encoder(patchify(imgs, self.patch_size), ids_keep)
        pred = self.forward_decoder(latent, ids_keep, ids_remove, predict_all=True)
        ids_restore = torch.cat([ids_keep, ids_remove], dim=1).argsort(dim=1)
        mask = torch.ones(ids_restore.shape, device=imgs.device).scatter(1, ids_keep, 0.0)
        pred = pred.take_along_dim(ids_restore[:, :, None], dim=1)
        return pred.unflatten(0, (-1, self.parts)), mask.unflatten(0, (-1, self.parts))

    def picture(self, imgs, *channels):  # EMAE
        """Rows of a picture, each (N, 3, H, W): original; then, for each of the first four parts, masked, and the
        removed patches' prediction pasted in (Figure 3).

        A per-patch-standardised prediction has no mean and scale of its own: they are the original patch's.
        """
        pred, mask = self.reconstruct(imgs)
        patches, mask = patchify(imgs, self.patch_size)[:, None], mask[..., None]
        if self.norm_pix:
            mean, std = mean_and_std(patches)
            pred = pred * std + mean
        masked, pasted = patches * (1 - mask), patches * (1 - mask) + pred * mask        # (N, K, L, P·P·3)
        rows = [patches[:, 0]]
        for part in range(min(4, self.parts)):
            rows += [masked[:, part], pasted[:, part]]
        return [denormalize(unpatchify(row, self.patch_size, self.grid_size), *channels) for row in rows]


def build_model(args):  # EMAE
    """The model that the command line describes."""
    size = dict(VIT_SIZES[args.model], img_size=args.img_size, patch_size=args.patch_size, in_chans=args.in_chans)
    return EMAE(**size, decoder_embed_dim=args.decoder_embed_dim, decoder_depth=args.decoder_depth,
                decoder_num_heads=args.decoder_num_heads, norm_pix=args.norm_pix,
                parts=args.parts, consistency_weight=args.consistency_weight)


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
