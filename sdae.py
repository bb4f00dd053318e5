"""SdAE: Self-distillated Masked Autoencoder.
Yabo Chen, Yuchen Liu, Dongsheng Jiang, Xiaopeng Zhang, Wenrui Dai, Hongkai Xiong, Qi Tian. ECCV 2022. arXiv:2208.00449

A student, MAE's encoder and decoder, predicts a teacher's features of the removed patches instead of their pixels. The
teacher is an encoder whose weights are an exponential moving average of the student's (Eq. 7). The removed patches are
cut into t folds, each of which the teacher sees alone (multi-fold masking, Section 2.2); its outputs are standardised
(Eq. 3), and the loss is one minus the cosine similarity (Eq. 4).

Against mae.py: the model has a teacher and `forward_teacher`, the decoder predicts D features a patch, the loss is the
cosine's, the encoder has drop path, and main updates the teacher.

Chosen where the paper is silent, or the released code differs:
- The cosine of Eq. 4 sums over the tokens of a fold, for each channel, as the released code has it; then the mean over
  channels, folds and images. --cosine_over features is the cosine of each token, which the text suggests. With another
  --teacher_input than folds, the tokens are all those that have a target.
- The teacher starts as a copy of the student ("simply an EMA"); the released code starts it at random.
- Eq. 3 takes each token over its D features, with unbiased variance + 1e-6. --no-teacher_norm omits it.
- Each fold has its own cls token; the patches left over where t does not divide have no target, as in Figure 4b.
- --teacher_input masked, full and crop are the other rows of Tables 1 and 5. With crop only the first --teacher_tokens
  of the removed patches have a target: by default a third, the paper's 49.
- EMA at the end of every epoch, momentum 0.96 to 0.99 on half a cosine. --ema iteration updates after every step, by
  default with 0.999 to 0.9999 (ours: Figure 4a finds 0.96 too fast there). A run under 100 epochs defaults to it and
  says so: an EMA per epoch leaves 87, 76 and 46 % of the teacher's start after 5, 10 and 30 epochs, one per step 36 and
  8 % after the demo's 1860 and after 4500 steps.
- Weight decay 0.05 as in Appendix A.1 (the released code: 0.04). encoder.pt is the student's encoder (Section 4.4).
- Not implemented: a teacher that starts at random; Figure 4c's evaluation of the teacher.

    python sdae.py --demo                                               # one CPU core: three minutes
    python sdae.py --data my_images --batch_size 256 --accum_iter 2     # one GPU
    torchrun --nproc_per_node 8 sdae.py --data imagenet                 # the paper's recipe, ViT-B, 300 epochs

Measured: on `shapes`, after --demo, a linear probe gets 48.6 % (random weights 26.4; mean of three seeds). The demo
removes half of the patches, without drop path: at the paper's settings so short a run learns little (32.5 %, seed 0),
probably since an untrained teacher says much the same of every patch. On CIFAR-10, 5 epochs, k-NN 44.1 % (random
weights 32.7). ImageNet and GPUs: not run (the paper: 84.1 % fine-tuned, 64.9 % linear, ViT-B, 300 epochs).
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
from torch.optim.swa_utils import get_ema_multi_avg_fn  # SdAE: Eq. 7
from torchvision.utils import save_image
from tqdm import tqdm

from common import (VIT_SIZES, Block, Crops, GlobalBatches, InputError, Normalize, SaveRequests, ViT, amp_dtype, append,
                    check_finite, check_output, check_vit, gather, init_linear, inventory, load, load_dataset,
                    load_weights, make_loader, number, pair, restore, save, seed_from, sincos_pos_embed, tidy_output,
                    train_transform)

DEMO = dict(data="shapes", model="vit_micro", img_size=[32], patch_size=4, decoder_embed_dim=64, decoder_depth=1,
            decoder_num_heads=2, batch_size=64, epochs=20, warmup_epochs=2, blr=8e-3, num_workers=0)
DEMO.update(mask_ratio=0.5, drop_path=0.0)  # SdAE: see "Measured"


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
    model.add_argument("--teacher_norm", action=argparse.BooleanOptionalAction, default=True, help="Eq. 3")  # SdAE

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

    method = parser.add_argument_group("SdAE")  # SdAE
    method.add_argument("--teacher_input", choices=["folds", "masked", "full", "crop"], default="folds",  # SdAE
                        help="which patches the teacher sees (Tables 1, 5)")  # SdAE
    method.add_argument("--folds", type=number(int, "[1, inf)"), help="t, for folds (default: 3; Section 2.2)")  # SdAE
    method.add_argument("--teacher_tokens", type=number(int, "[1, inf)"),  # SdAE
                        help="patches, for crop (default: a third of the removed; Section 4.3)")  # SdAE
    method.add_argument("--cosine_over", choices=["tokens", "features"], default="tokens", help="axis of Eq. 4")  # SdAE
    method.add_argument("--ema", choices=["epoch", "iteration"],  # SdAE
                        help="update the teacher after each (default: epoch, but iteration under 100 epochs)")  # SdAE
    method.add_argument("--momentum", type=number(float, "[0, 1)"), nargs=2,  # SdAE
                        help="η of Eq. 7, from and to (default: 0.96 0.99 by epoch, 0.999 0.9999 by iteration)")  # SdAE
    method.add_argument("--drop_path", type=number(float, "[0, 1)"), default=0.25, help="last block's (A.1)")  # SdAE
    parser.set_defaults(epochs=300, batch_size=768, blr=8e-4 * 256 / 768, warmup_epochs=60)  # SdAE: Appendix A.1

    parser.set_defaults(**DEMO if "--demo" in (sys.argv[1:] if argv is None else argv) else {})
    args = parser.parse_args(argv)

    size = VIT_SIZES[args.model]
    args.patch_size = args.patch_size or size["patch_size"]
    args.ema = args.ema or ("epoch" if args.epochs >= 100 else "iteration")  # SdAE: Section 4.2
    args.momentum = args.momentum or ([0.96, 0.99] if args.ema == "epoch" else [0.999, 0.9999])  # SdAE: Appendix A.1
    for name, wanted in (("folds", "folds"), ("teacher_tokens", "crop")):  # SdAE: Section 2.2
        if getattr(args, name) is not None and args.teacher_input != wanted:  # SdAE: Section 2.2
            raise InputError(f"--{name} needs --teacher_input {wanted}")  # SdAE: Section 2.2
    args.folds = 3 if args.folds is None else args.folds  # SdAE: Appendix A.1
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    num_patches = math.prod(n // args.patch_size for n in pair(args.img_size))
    removed = num_patches - int(num_patches * (1 - args.mask_ratio) + 1e-6)  # SdAE: Section 2.2
    least = 2 if args.cosine_over == "tokens" else 1  # SdAE: Eq. 4, a cosine of one number is ±1
    check_vit(args.img_size, args.patch_size, size["embed_dim"], size["num_heads"])
    check_vit(args.img_size, args.patch_size, args.decoder_embed_dim, args.decoder_num_heads)
    shares = f"{world_size} process(es) × --accum_iter {args.accum_iter}"
    for right, advice in (
        (args.batch_size % (world_size * args.accum_iter) == 0,
         f"--batch_size {args.batch_size} cannot be shared equally by {shares}"),
        (0 < int(num_patches * (1 - args.mask_ratio) + 1e-6) < num_patches,
         f"--mask_ratio {args.mask_ratio} must keep and remove at least one of {num_patches} patches"),
        (removed // args.folds >= least or args.teacher_input != "folds",  # SdAE: Section 2.2
         f"--folds {args.folds} of {removed} removed patches: a fold must have {least} or more"),  # SdAE: Section 2.2
        (least <= (args.teacher_tokens or removed // 3) <= removed or args.teacher_input != "crop",  # SdAE: Section 4.3
         f"--teacher_tokens must be from {least} to the number of removed patches, {removed}"),  # SdAE: Section 4.3
        (args.momentum[0] <= args.momentum[1], "--momentum takes two, from and to, which rises"),  # SdAE: Eq. 7
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


def encode(vit, patches, ids):
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
class SdAE(ViT):
    """Masked autoencoder that predicts its own teacher's features. Raises InputError for sizes that don't fit."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512,
                 decoder_depth=8, decoder_num_heads=16, mask_ratio=0.75, teacher_norm=True,
                 teacher_input="folds", folds=3, teacher_tokens=None, cosine_over="tokens", drop_path=0.25):
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, drop_path=drop_path)
        check_vit(img_size, patch_size, decoder_embed_dim, decoder_num_heads)
        self.mask_ratio = mask_ratio
        removed = self.num_patches - int(self.num_patches * (1 - mask_ratio) + 1e-6)
        self.teacher_norm = teacher_norm
        self.teacher_input = teacher_input
        self.cosine_over = cosine_over
        self.folds = folds if teacher_input == "folds" else 1
        self.fold_size = {"folds": removed // folds, "crop": teacher_tokens or removed // 3}.get(teacher_input, removed)
        if not 1 <= self.fold_size <= removed:
            raise InputError(f"{removed} removed patches don't make folds of {self.fold_size}")
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        position = sincos_pos_embed(decoder_embed_dim, self.grid_size)
        self.decoder_pos_embed = nn.Parameter(F.pad(position, (0, 0, 1, 0))[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, embed_dim)
        self.initialize_weights()
        self.teacher = ViT(img_size, patch_size, embed_dim, depth, num_heads).requires_grad_(False)
        self.teacher.load_state_dict(self.encoder_state_dict())         # starts as the student's copy

    def initialize_weights(self):
        """The decoder's part; the encoder's is in ViT."""
        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)

    def forward_encoder(self, patches, ids_keep):
        """Visible patches to tokens: patches (N, L, P·P·3), ids_keep (N, keep) -> (N, 1 + keep, D)."""
        return encode(self, patches.take_along_dim(ids_keep[:, :, None], dim=1), ids_keep)

    @torch.no_grad()
    def forward_teacher(self, patches, ids_remove):
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
            target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
        return target

    def update_teacher(self, momentum):
        """Eq. 7: φ ← η φ + (1 - η) θ, with momentum η, for every parameter of the teacher."""
        student = [self.get_parameter(name).detach() for name, _ in self.teacher.named_parameters()]
        get_ema_multi_avg_fn(momentum)(list(self.teacher.parameters()), student, None)

    def forward_decoder(self, latent, ids_keep, ids_remove, predict_all=False):
        """Tokens (N, 1 + keep, D) to predictions of the removed patches, (N, L - keep, D), in ids_remove's order; with
        `predict_all` of the visible ones too, before them: (N, L, D)."""
        x = self.decoder_embed(latent)
        x = torch.cat([x, self.mask_token.expand(len(x), 1 + self.num_patches - x.shape[1], -1)], dim=1)
        ids = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep, 1 + ids_remove], dim=1)
        x = x + self.decoder_pos_embed[0, ids]                                           # (N, 1 + L, D_decoder)
        for block in self.decoder_blocks:
            x = block(x)
        x = x[:, 1:] if predict_all else x[:, 1 + ids_keep.shape[1]:]
        return self.decoder_pred(self.decoder_norm(x))

    def forward_loss(self, target, pred):
        """Eq. 4 as a loss: one minus the cosine of target (N, t·n, D) and pred (N, L - keep, D), in float32."""
        pred = pred[:, :target.shape[1]].float()
        target, pred = (x.reshape(-1, self.fold_size, x.shape[2]) for x in (target, pred))   # (N·t, n, D)
        return 1 - F.cosine_similarity(target, pred, dim=1 if self.cosine_over == "tokens" else 2).mean()

    def forward(self, imgs, noise=None):
        """Images (N, 3, H, W), and noise (N, L) that fixes the mask, to the loss and a dict of detached scalars."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = random_masking(noise, self.mask_ratio)
        patches = patchify(imgs, self.patch_size)                                        # (N, L, P·P·3)
        latent = self.forward_encoder(patches, ids_keep)
        pred = self.forward_decoder(latent, ids_keep, ids_remove)
        loss = self.forward_loss(self.forward_teacher(patches, ids_remove), pred)
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def reconstruct(self, imgs, noise=None):
        """Every patch's prediction in its place (N, L, D), and the mask (N, L): 0 = visible, 1 = removed."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove = random_masking(noise, self.mask_ratio)
        latent = self.forward_encoder(patchify(imgs, self.patch_size), ids_keep)
        pred = self.forward_decoder(latent, ids_keep, ids_remove, predict_all=True)
        ids_restore = torch.cat([ids_keep, ids_remove], dim=1).argsort(dim=1)
        mask = torch.ones(ids_restore.shape, device=imgs.device).scatter(1, ids_keep, 0.0)
        return pred.take_along_dim(ids_restore[:, :, None], dim=1), mask

    def picture(self, imgs, normalize):
        """Rows of a picture, (N, 3, H, W) in [0, 1]: original; masked; each patch's cosine of target and prediction
        (over features, whatever the loss) from red, the picture's lowest, to green, 1; the teacher's features and the
        prediction as the former's first three principal components in colour. Patches without a target are black."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device)
        ids_remove = random_masking(noise, self.mask_ratio)[1]
        patches = patchify(imgs, self.patch_size)
        target = self.forward_teacher(patches, ids_remove).cpu()                         # (N, t·n, D)
        ids = ids_remove[:, :target.shape[1], None].cpu()
        pred, mask = (x.float().cpu() for x in self.reconstruct(imgs, noise))
        pred = pred.take_along_dim(ids, dim=1)

        def paint(colours):
            """Colours (N, t·n, 3) at their patches' places in images."""
            grid = torch.zeros(len(imgs), self.num_patches, 3).scatter(1, ids.expand(-1, -1, 3), colours)
            return F.interpolate(grid.transpose(1, 2).unflatten(2, self.grid_size), scale_factor=self.patch_size)

        error = 1 - F.cosine_similarity(target, pred, dim=2)                             # (N, t·n), of each token
        error = error / error.max().clamp(min=1e-6)
        mean = target.mean(dim=(0, 1))
        _, axes = torch.linalg.eigh((target - mean).flatten(0, 1).T.cov())               # of rising variance: (D, D)
        axes = axes[:, -3:].flip(1)
        axes = axes / (4 * ((target - mean) @ axes).std(dim=(0, 1)) + 1e-6)              # ± 2 standard deviations
        masked = unpatchify(patches * (1 - mask[:, :, None].to(imgs.device)), self.patch_size, self.grid_size)
        return [normalize.inverse(imgs), normalize.inverse(masked),
                paint(torch.stack([error, 1 - error, torch.zeros_like(error)], dim=2)),
                *(paint(0.5 + (features - mean) @ axes) for features in (target, pred))]


def build_model(args):
    """The model that the command line describes."""
    return SdAE(**{**VIT_SIZES[args.model], "img_size": args.img_size, "patch_size": args.patch_size},
                decoder_embed_dim=args.decoder_embed_dim, decoder_depth=args.decoder_depth,
                decoder_num_heads=args.decoder_num_heads, mask_ratio=args.mask_ratio, teacher_norm=args.teacher_norm,
                teacher_input=args.teacher_input, folds=args.folds, teacher_tokens=args.teacher_tokens,
                cosine_over=args.cosine_over, drop_path=args.drop_path)


def momentum(step, steps_per_epoch, args):
    """η of Eq. 7 after a step: from the first of --momentum to the second on half a cosine (Appendix A.1)."""
    epoch = step // steps_per_epoch if args.ema == "epoch" else step / steps_per_epoch
    start, end = args.momentum
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * epoch / args.epochs))


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
        model.update_teacher(0.0)  # SdAE: the teacher starts as the student's copy
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

        print(f"teacher updated every {args.ema} (default: iteration under 100 epochs, else epoch), "  # SdAE
              f"momentum {args.momentum[0]:g} to {args.momentum[1]:g}", flush=True)  # SdAE: Section 4.2

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
        if args.ema == "iteration" or (step + 1) % steps_per_epoch == 0:  # SdAE: Section 4.2
            model.update_teacher(momentum(step, steps_per_epoch, args))  # SdAE: Eq. 7

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
