"""SdAE: Self-distillated Masked Autoencoder.
Yabo Chen, Yuchen Liu, Dongsheng Jiang, Xiaopeng Zhang, Wenrui Dai, Hongkai Xiong, Qi Tian. ECCV 2022. arXiv:2208.00449

A student, MAE's encoder and decoder, predicts a teacher's features of the removed patches instead of their pixels. The
teacher is an encoder whose weights are an exponential moving average of the student's (Eq. 7). The removed patches are
cut into t folds, each of which the teacher sees alone (multi-fold masking, Section 2.2); its outputs are standardised
(Eq. 3), and the loss is one minus the cosine similarity (Eq. 4).

Against mae.py: the model has a teacher and `forward_teacher`, the decoder predicts D features a patch, the loss is the
cosine's, the encoder has drop path, and main updates the teacher.

Chosen where the paper is silent, or the released code differs:
                            paper                          released code              here
  cosine, folds             Eq. 4: a sum over tokens       tokens, for each channel   tokens, for each channel
  cosine, full image        "feature cosine" (2.1)         features, for each token   tokens; --cosine_over features
  teacher's start           "simply an EMA" (Figure 2)     random                     the student's copy
  weight decay              0.05 (A.1)                     0.04                       0.05
  warm-up, 100 epochs       60, for 300 (A.1)              0.2 · epochs               60: give --warmup_epochs 20
- A third reading of Eq. 4, one cosine over tokens and channels together, is not offered. With another --teacher_input
  than folds, the tokens are all those that have a target.
- Eq. 3 takes each token over its D features, with unbiased variance + 1e-6. --no-teacher_norm omits it.
- Each fold has its own cls token; the patches left over where t does not divide have no target, as in Figure 4b.
- --teacher_input masked, full and crop are the other rows of Tables 1 and 5. With crop only the first --teacher_tokens
  of the removed patches have a target: by default a third, as many as a fold.
- EMA at the end of every epoch, momentum 0.96 to 0.99 on half a cosine (A.1). --ema iteration updates after every
  step, by default with 0.999 to 0.9999 (ours). A run under 100 epochs defaults to it and says so: an EMA per epoch
  leaves 76 % of the teacher's start after 10 epochs, one per step 36 % after the demo's 1860 steps.
- encoder.pt is the student's encoder (Section 4.4). Where the paper contradicts itself: docs/reading.md, chapter 5.

    python sdae.py --demo                                               # one CPU core: three minutes
    python sdae.py --data my_images --batch_size 256                    # one GPU of 24 GB
    torchrun --nproc_per_node 8 sdae.py --data imagenet                 # the paper's recipe, ViT-B, 300 epochs

Measured: on `shapes`, after --demo, a linear probe gets 48.6 % (random weights 26.4; mean of three seeds). The demo
removes half of the patches, without drop path: at the paper's settings so short a run learns little (32.5 %, seed 0).
On CIFAR-10, after 8 epochs (--momentum 0.998 0.9995), 47.0 % (32.0): results/claims.md. ImageNet and GPUs: not
run (the paper: 84.1 % fine-tuned, 64.9 % linear, ViT-B, 300 epochs).
"""
import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn  # SdAE: Eq. 7

from common import (VIT_SIZES, Block, Crops, InputError, ViT, check_vit, denormalize, init_linear, load_dataset,
                    normalize, sincos_pos_embed, train_transform)
from runs import Run, launch, number, parse_args

DEMO = dict(data="shapes", model="vit_micro", img_size=[32], patch_size=4, decoder_embed_dim=64, decoder_depth=1,
            decoder_num_heads=2, batch_size=64, epochs=20, warmup_epochs=2, blr=8e-3, num_workers=0)
DEMO.update(mask_ratio=0.5, drop_path=0.0)  # SdAE: see "Measured"


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
    method_checks(args)  # SdAE: Section 4.2
    return args


def method_args(parser):  # SdAE
    """SdAE's own, and its recipe."""
    method = parser.add_argument_group("SdAE")
    method.add_argument("--mask_ratio", type=number(float, "(0, 1)"), default=0.75, help="share of patches removed")
    method.add_argument("--teacher_norm", action=argparse.BooleanOptionalAction, default=True, help="Eq. 3")
    method.add_argument("--teacher_input", choices=["folds", "masked", "full", "crop"], default="folds",
                        help="which patches the teacher sees (Tables 1, 5)")
    method.add_argument("--folds", type=number(int, "[1, inf)"), help="t, for folds (default: 3; Section 4.3)")
    method.add_argument("--teacher_tokens", type=number(int, "[1, inf)"),
                        help="patches, for crop (default: a third of the removed; Section 4.3)")
    method.add_argument("--cosine_over", choices=["tokens", "features"], default="tokens", help="axis of Eq. 4")
    method.add_argument("--ema", choices=["epoch", "iteration"],
                        help="update the teacher after each (default: epoch, but iteration under 100 epochs)")
    method.add_argument("--momentum", type=number(float, "[0, 1)"), nargs=2,
                        help="η of Eq. 7, from and to (default: 0.96 0.99 by epoch, 0.999 0.9999 by iteration)")
    method.add_argument("--drop_path", type=number(float, "[0, 1)"), default=0.25, help="last block's (A.1)")
    parser.set_defaults(epochs=300, batch_size=768, blr=8e-4 * 256 / 768, warmup_epochs=60)     # Appendix A.1


def method_checks(args):  # SdAE
    """Sets what depends on other arguments. Raises InputError if two don't go together."""
    args.ema = args.ema or ("epoch" if args.epochs >= 100 else "iteration")                     # Section 4.2
    args.momentum = args.momentum or ([0.96, 0.99] if args.ema == "epoch" else [0.999, 0.9999])     # Appendix A.1
    if args.momentum[0] > args.momentum[1]:
        raise InputError("--momentum takes two, from and to, and must not decrease")
    if args.folds is not None and args.teacher_input != "folds":
        raise InputError("--folds needs --teacher_input folds")
    if args.teacher_tokens is not None and args.teacher_input != "crop":
        raise InputError("--teacher_tokens needs --teacher_input crop")
    args.folds = args.folds or 3                                                                # Appendix A.1


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


def encode(vit, patches, ids):  # SdAE
    """Some patches of each image (N, n, P·P·3), whose places are ids (N, n), to tokens that see each other and a cls
    token, (N, 1 + n, D), by the student's encoder or the teacher's."""
    x = vit.patch_embed(patches) + vit.pos_embed[0, 1 + ids]                             # (N, n, D)
    cls_token = vit.cls_token + vit.pos_embed[:, :1]
    x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)                          # (N, 1 + n, D)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
class SdAE(ViT):  # SdAE
    """Masked autoencoder that predicts its own teacher's features. Raises InputError for sizes that don't fit."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512,
                 decoder_depth=8, decoder_num_heads=16, mask_ratio=0.75, in_chans=3, teacher_norm=True,
                 teacher_input="folds", folds=3, teacher_tokens=None, cosine_over="tokens", drop_path=0.25):  # SdAE
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, drop_path=drop_path, in_chans=in_chans)
        check_vit(img_size, patch_size, decoder_embed_dim, decoder_num_heads)
        self.len_keep = int(self.num_patches * (1 - mask_ratio) + 1e-6)     # so ratio 13/14 of 196 patches keeps 14
        if not 0 < self.len_keep < self.num_patches:
            raise InputError(f"mask_ratio {mask_ratio} must keep and remove at least one of {self.num_patches} patches")
        removed = self.num_patches - self.len_keep
        self.teacher_norm = teacher_norm
        self.teacher_input = teacher_input
        self.cosine_over = cosine_over
        self.folds = folds if teacher_input == "folds" else 1
        self.fold_size = {"folds": removed // folds, "crop": teacher_tokens or removed // 3}.get(teacher_input, removed)
        least = 2 if cosine_over == "tokens" else 1                     # Eq. 4: a cosine of one number is ±1
        if not least <= self.fold_size <= removed:
            raise InputError(f"{removed} removed patches: a fold takes {least} to {removed}, not {self.fold_size}")
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        position = sincos_pos_embed(decoder_embed_dim, self.grid_size)
        self.decoder_pos_embed = nn.Parameter(F.pad(position, (0, 0, 1, 0))[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, embed_dim)
        self.initialize_weights()
        self.teacher = ViT(img_size, patch_size, embed_dim, depth, num_heads, in_chans=in_chans).requires_grad_(False)
        self.teacher.load_state_dict(self.encoder_state_dict())         # starts as the student's copy

    def initialize_weights(self):
        """All that ViT does not initialise itself."""
        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)

    def forward_encoder(self, patches, ids_keep):  # SdAE
        """Visible patches to tokens: patches (N, L, P·P·3), ids_keep (N, keep) -> (N, 1 + keep, D)."""
        return encode(self, patches.take_along_dim(ids_keep[:, :, None], dim=1), ids_keep)

    @torch.no_grad()
    def forward_teacher(self, patches, ids_remove):  # SdAE
        """The first t·n removed patches' targets, (N, t·n, D): t folds of n patches, each seen alone (Section 2.2);
        patches (N, L, P·P·3), ids_remove (N, L - keep). All folds are one batch."""
        ids = ids_remove[:, :self.folds * self.fold_size]                                # (N, t·n)
        if self.teacher_input == "full":
            everything = torch.arange(self.num_patches, device=ids.device).expand(len(ids), -1)
            target = encode(self.teacher, patches, everything)[:, 1:].take_along_dim(ids[:, :, None], dim=1)
        else:
            folds = patches.take_along_dim(ids[:, :, None], dim=1).reshape(-1, self.fold_size, patches.shape[2])
            target = encode(self.teacher, folds, ids.reshape(-1, self.fold_size))[:, 1:].reshape(*ids.shape, -1)
        target = target.float()
        if self.teacher_norm:                                                            # Eq. 3
            mean, std = mean_and_std(target)
            target = (target - mean) / std
        return target

    def update_teacher(self, momentum):  # SdAE
        """Eq. 7: φ ← η φ + (1 - η) θ, with momentum η, for every parameter of the teacher."""
        student = [self.get_parameter(name).detach() for name, _ in self.teacher.named_parameters()]
        get_ema_multi_avg_fn(momentum)(list(self.teacher.parameters()), student, None)

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

    def forward_loss(self, target, pred):  # SdAE
        """Eq. 4 as a loss: one minus the cosine of target (N, t·n, D) and pred (N, L - keep, D), in float32."""
        pred = pred[:, :target.shape[1]].float()
        target, pred = (x.reshape(-1, self.fold_size, x.shape[2]) for x in (target, pred))   # (N·t, n, D)
        return 1 - F.cosine_similarity(target, pred, dim=1 if self.cosine_over == "tokens" else 2).mean()

    def forward(self, imgs, noise=None):  # SdAE
        """Images (N, 3, H, W), and noise (N, L) that fixes the mask, to the loss and a dict of what else to log."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = random_masking(noise, self.len_keep)
        patches = patchify(imgs, self.patch_size)                                        # (N, L, P·P·3)
        latent = self.forward_encoder(patches, ids_keep)
        pred = self.forward_decoder(latent, ids_keep, ids_remove)
        return self.forward_loss(self.forward_teacher(patches, ids_remove), pred), {}

    @torch.no_grad()
    def reconstruct(self, imgs, noise=None):  # SdAE
        """Every patch's prediction in its place (N, L, D), and the mask (N, L): 0 = visible, 1 = removed."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = random_masking(noise, self.len_keep)
        latent = self.forward_encoder(patchify(imgs, self.patch_size), ids_keep)
        pred = self.forward_decoder(latent, ids_keep, ids_remove, predict_all=True)
        ids_restore = torch.cat([ids_keep, ids_remove], dim=1).argsort(dim=1)
        mask = torch.ones(ids_restore.shape, device=imgs.device).scatter(1, ids_keep, 0.0)
        return pred.take_along_dim(ids_restore[:, :, None], dim=1), mask

    def picture(self, imgs, *channels):  # SdAE
        """Rows of a picture, each (N, 3, H, W): original; masked; each patch's cosine of target and prediction
        (over features, whatever the loss) from red, the picture's lowest, to green, 1; the teacher's features and the
        prediction as the former's first three principal components in colour. Patches without a target are black."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device)
        ids_remove = random_masking(noise, self.len_keep)[1]
        patches = patchify(imgs, self.patch_size)
        target = self.forward_teacher(patches, ids_remove).cpu()                         # (N, t·n, D)
        ids = ids_remove[:, :target.shape[1], None].cpu()
        pred, mask = (x.float().cpu() for x in self.reconstruct(imgs, noise))
        pred = pred.take_along_dim(ids, dim=1)

        def paint(colours):
            """Colours (N, t·n, 3) at their patches' places in images, as bytes: RGB, whatever the images' channels."""
            grid = torch.zeros(len(imgs), self.num_patches, 3).scatter(1, ids.expand(-1, -1, 3), colours)
            grid = (255 * grid).round().clamp(0, 255).byte().transpose(1, 2).unflatten(2, self.grid_size)
            return F.interpolate(grid, scale_factor=self.patch_size)

        error = 1 - F.cosine_similarity(target, pred, dim=2)                             # (N, t·n), of each token
        error = error / error.max().clamp(min=1e-6)
        mean = target.mean(dim=(0, 1))
        _, axes = torch.linalg.eigh((target - mean).flatten(0, 1).T.cov())               # of rising variance: (D, D)
        axes = axes[:, -3:].flip(1)
        axes = axes / (4 * ((target - mean) @ axes).std(dim=(0, 1)) + 1e-6)              # ± 2 standard deviations
        masked = unpatchify(patches * (1 - mask[:, :, None].to(imgs.device)), self.patch_size, self.grid_size)
        return [denormalize(imgs, *channels), denormalize(masked, *channels),
                paint(torch.stack([error, 1 - error, torch.zeros_like(error)], dim=2)),
                *(paint(0.5 + (features - mean) @ axes) for features in (target, pred))]


def build_model(args):  # SdAE
    """The model that the command line describes."""
    size = dict(VIT_SIZES[args.model], img_size=args.img_size, patch_size=args.patch_size, in_chans=args.in_chans)
    return SdAE(**size, decoder_embed_dim=args.decoder_embed_dim, decoder_depth=args.decoder_depth,
                decoder_num_heads=args.decoder_num_heads, mask_ratio=args.mask_ratio, teacher_norm=args.teacher_norm,
                teacher_input=args.teacher_input, folds=args.folds, teacher_tokens=args.teacher_tokens,
                cosine_over=args.cosine_over, drop_path=args.drop_path)


def momentum(step, steps_per_epoch, args):  # SdAE
    """η of Eq. 7 after a step: from the first of --momentum to the second on half a cosine (Appendix A.1)."""
    epoch = step // steps_per_epoch if args.ema == "epoch" else step / steps_per_epoch
    start, end = args.momentum
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * epoch / args.epochs))


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
    if run.step == 0:  # SdAE: the teacher starts as the student's copy, also after --init_from
        model.update_teacher(momentum=0.0)  # SdAE
    run.say(f"teacher: momentum {args.momentum[0]:g} to {args.momentum[1]:g}, every {args.ema}")  # SdAE: Section 4.2
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
            if args.ema == "iteration" or (step + 1) % run.steps_per_epoch == 0:  # SdAE: Section 4.2
                model.update_teacher(momentum(step, run.steps_per_epoch, args))  # SdAE: Eq. 7
            run.end_step(grad_norm)                 # when due: checkpoint, checks, and the exit after a signal

        model.eval()
        keep = {"encoder": model.encoder_state_dict()}
        keep["teacher"] = model.teacher.state_dict()  # SdAE: Figure 4c
        run.end_epoch(picture=model.picture(normalize(run.examples(), *channels), *channels), keep=keep)
    run.finish(encoder=model.encoder_state_dict())


if __name__ == "__main__":
    launch(main, get_args)
