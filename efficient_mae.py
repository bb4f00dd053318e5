"""Efficient MAE: Efficient MAE towards Large-Scale Vision Transformers.
Qiu Han, Gongjie Zhang, Jiaxing Huang, Peng Gao, Zhang Wei, Shijian Lu. WACV 2024.

With more patches removed, pre-training is cheaper, but the patches far from any visible one come to dominate the loss.
P²Dist (Eq. 1, Algorithm 1) measures how far a removed patch is, in pixels. The Difficulty-Flatten loss weights a
patch's error by its P²Dist to the power -γ (Eq. 2), and decoder masking (Section 4.2) keeps patches beyond β out of the
decoder altogether: no token, no attention, no loss. The mask ratio can then rise from 0.75 to 0.85.

Against mae.py: P²Dist is new, the loss is weighted, and the decoder works on a ragged batch. Its linear layers run on
the tokens of all images packed one after another, its attention image by image (padded on a GPU, or up to 100 tokens).

Chosen where the paper is silent or contradicts itself:
- Algorithm 1: of the distinct points at the visible patches' centres, edges and corners, the k = 8 nearest to the
  removed patch's centre, ties by row, then column; then the mean over the removed patch's pixels of the distance to the
  nearest of these: 8.06 pixels from a patch above, 8.94 from one below, by the offsets as written. --p2dist exact is
  Eq. 1 itself. It fits Table 8: of 167 patches removed at ratio 0.85, those with d ≤ 9 / 13 / 26 are 82 / 114 / 150 in
  the paper, 78 / 114 / 150 by Algorithm 1 (symmetric, by pixels' centres, 78 / 114 / 155), 76 / 114 / 145 by Eq. 1.
- β is in pixels at patch size 16: for others the default is 26 · patch_size / 16, which Table 3 supports (ViT-H takes
  31.3 G; 22.75 gives 31.33, 26 gives 31.52). --beta inf drops none.
- Eq. 2 is taken for each image over its patches in the decoder (0 where there are none), then averaged over images, so
  that no result depends on how a batch is shared. ‖·‖ is MAE's mean squared error; targets are standardised per patch.
- Defaults: ViT-L, 800 epochs, batch 1024 (Section 5.1). Table 4's columns DF and DM are swapped (see Tables 6, 8).
- --difficulty 3x3 and 5x5 are Table 5's metrics (a) and (b). We take d to be the inverse of either; a patch without a
  visible one there (of weight zero in the paper's (a), and so, we infer from Table 5's 159, in (b)) stays out of the
  decoder: 113.8 and 158.7 patches stay (Table 5: 114, 159).
  nearest is (c), the distance between the centres of a removed patch and the nearest visible one. β bounds P²Dist
  alone, so here all 167 patches stay, as in Table 5.
- Not implemented: Table 6 (b) and (c), which come without details ((a) is --gamma 0).

    python efficient_mae.py --demo                                              # one CPU core: two minutes
    python efficient_mae.py --data my_images --model vit_base --batch_size 256  # one GPU of 24 GB
    torchrun --nproc_per_node 8 efficient_mae.py --data imagenet                # the paper's recipe, ViT-L, 800 epochs

Measured: on `shapes`, after --demo, a linear probe gets 62.2 % (random weights 26.4; mean of three seeds). On
CIFAR-10, after 8 epochs, 47.3 % (32.0): results/claims.md. ImageNet and GPUs: not run (the paper, fine-tuned:
83.5 % with ViT-B, 85.4 % with ViT-L, 800 epochs).
"""
import argparse
import functools  # Efficient
import itertools  # Efficient
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (VIT_SIZES, Block, Crops, InputError, ViT, check_vit, denormalize, init_linear, load_dataset,
                    normalize, sincos_pos_embed, train_transform)
from common import attention  # Efficient: within each image's tokens
from runs import Run, launch, number, parse_args

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
    return args


def method_args(parser):  # Efficient
    """Efficient MAE's own, and its recipe."""
    method = parser.add_argument_group("Efficient MAE")
    method.add_argument("--mask_ratio", type=number(float, "(0, 1)"), default=0.85, help="share of patches removed")
    method.add_argument("--norm_pix", action=argparse.BooleanOptionalAction, default=True,
                        help="standardise each patch of the target")
    method.add_argument("--gamma", type=number(float, "[0, 10]"), default=0.6, help="γ of d^-γ (Eq. 2)")
    method.add_argument("--beta", type=number(float, "(0, inf]"),
                        help="β, pixels: harder patches are dropped; inf: none (default: p2dist 26/16 patches)")
    method.add_argument("--p2dist", choices=["approximate", "exact"], default="approximate",
                        help="Algorithm 1, or Eq. 1 over all pixels")
    method.add_argument("--difficulty", choices=["p2dist", "3x3", "5x5", "nearest"], default="p2dist",
                        help="what d is (Table 5); 3x3 and 5x5 drop the patches without a visible one there")
    parser.set_defaults(model="vit_large", batch_size=1024)                                     # Section 5.1


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


def p2dist_approximate(ids_keep, ids_remove, grid_size, patch_size, k=8):  # Efficient
    """P²Dist by Algorithm 1: of each removed patch, (N, L - keep), in pixels; larger is harder to predict.

    Candidates are the visible patches' centres, edge midpoints and corners: points of a lattice of half a patch, on
    which neighbours share theirs. S is the k of them nearest to the removed patch's centre; k is at most 9.
    """
    rows, columns = grid_size
    device, width = ids_keep.device, 2 * columns + 1                    # the lattice: (2·rows + 1) × width points
    point = torch.cartesian_prod(torch.arange(2 * rows + 1, device=device), torch.arange(width, device=device))
    corner = point.reshape(-1, width, 2)[:-1:2, :-1:2].flatten(0, 1)     # of each patch, its upper left one: (L, 2)

    # p_c^v + Δp: each patch has 3×3 points
    delta = torch.arange(3, device=device)
    delta = (width * delta[:, None] + delta).flatten()
    candidates = ((corner[:, 0] * width + corner[:, 1])[ids_keep][:, :, None] + delta).flatten(1)
    visible = torch.zeros(len(ids_keep), len(point), dtype=torch.bool, device=device).scatter(1, candidates, True)

    # S, in integers, so that ties fall alike everywhere: ordered by squared distance, then by the point's number
    distance = (corner[:, None] + 1 - point).square().sum(dim=2)                          # (L, points), half patches
    order = distance * len(point) + torch.arange(len(point), device=device)
    order = order.int() if 4 * (rows**2 + columns**2) * len(point) < 2**31 else order    # faster, where it fits
    order = order.index_select(0, ids_remove.flatten()).unflatten(0, ids_remove.shape)
    order.masked_fill_(~visible[:, None], torch.iinfo(order.dtype).max)
    nearest = point[order.topk(k, dim=2, largest=False).values % len(point)]              # (N, L - keep, k, 2)

    # d': the mean over the patch's pixels of the distance to the nearest point of S
    pixel = corner[ids_remove][:, :, None, :, None] * (patch_size / 2) + torch.arange(patch_size, device=device)
    squared = (pixel - nearest[..., None] * (patch_size / 2)).square()                    # (N, L - keep, k, 2, P)
    best = torch.full((), math.inf, device=device)
    for i in range(k):
        best = torch.minimum(best, squared[:, :, i, 0, :, None] + squared[:, :, i, 1, None, :])
    return best.sqrt().mean(dim=(2, 3))


def p2dist_exact(ids_keep, ids_remove, grid_size, patch_size):  # Efficient
    """P²Dist by Eq. 1 itself, (N, L - keep), in pixels, over every pixel of the visible patches: a distance transform,
    columns first."""
    rows, columns = grid_size
    device = ids_keep.device

    def gap(number):
        """Squared distance along one axis from each pixel to the nearest pixel of each patch, (number·P, number)."""
        first, pixel = (torch.arange(n, device=device) for n in (number, number * patch_size))
        behind = first * patch_size - pixel[:, None]                    # > 0: the patch begins after the pixel
        return torch.maximum(behind, 1 - patch_size - behind).clamp(min=0).float() ** 2

    visible = torch.zeros(len(ids_keep), rows * columns, dtype=torch.bool, device=device).scatter(1, ids_keep, True)
    visible = visible.reshape(-1, 1, rows, columns)
    down = torch.where(visible, gap(rows)[:, :, None], math.inf).amin(dim=2)              # (N, H, columns)
    best = torch.full((), math.inf, device=device)
    for column, across in enumerate(gap(columns).T):
        best = torch.minimum(best, down[:, :, column, None] + across)                     # (N, H, W)
    distance = best.sqrt().reshape(-1, rows, patch_size, columns, patch_size).mean(dim=(2, 4))
    return distance.flatten(1).gather(1, ids_remove)


def neighbourhood(ids_keep, ids_remove, grid_size, patch_size, radius):  # Efficient
    """Table 5's other metrics of difficulty, (N, L - keep), inverted so that larger is harder: (a), radius 1, is the
    number of visible patches in the 3×3 around a removed one; (b), radius 2, the sum of their inverse distances in the
    5×5. Infinite where there is none."""
    rows, columns = grid_size
    visible = torch.zeros(len(ids_keep), rows * columns, device=ids_keep.device).scatter(1, ids_keep, 1.0)
    visible = F.pad(visible.unflatten(1, grid_size), [radius] * 4)
    density = 0.0
    for down, right in itertools.product(range(-radius, radius + 1), repeat=2):
        window = visible[:, radius + down:radius + down + rows, radius + right:radius + right + columns]
        density = density + window / (1 if radius == 1 else max(1, math.hypot(down, right)))
    return 1 / density.flatten(1).gather(1, ids_remove)


def nearest_patch(ids_keep, ids_remove, grid_size, patch_size):  # Efficient
    """Table 5's metric (c), (N, L - keep): pixels from a removed patch to the nearest visible one, between centres."""
    columns = grid_size[1]
    down = ids_remove[:, :, None] // columns - ids_keep[:, None] // columns              # (N, L - keep, keep)
    right = ids_remove[:, :, None] % columns - ids_keep[:, None] % columns
    return patch_size * (down**2 + right**2).amin(dim=2).float().sqrt()


def true_entries(mask, number):  # Efficient
    """Flat indices of the `number` entries of a mask that are true, in order: as nonzero(), but without the wait for
    the device to learn how many there are."""
    return mask.flatten().logical_not().byte().argsort(stable=True)[:number]


@torch.compiler.disable    # torch.compile would recompile it for every list of lengths
def attention_by_image(q, k, v, lengths):  # Efficient
    """Attention within each image of a ragged batch: q, k, v and the result are (heads, T, d), the T tokens of all
    images one after another; `lengths` (N,) says how many each has. For CPUs, whose time is in the arithmetic."""
    images = zip(*(x.split(lengths.tolist(), dim=1) for x in (q, k, v)))
    return torch.cat([attention(q, k, v) for q, k, v in images], dim=1)


def attention_padded(q, k, v, inside, slots):  # Efficient
    """The same in few large kernels: images padded to one length. `inside` (N, length) says which tokens are an
    image's, `slots` (T,) where these are in the flattened `inside`."""
    q, k, v = (x.new_zeros(len(x), inside.numel(), x.shape[2]).index_copy(1, slots, x).unflatten(1, inside.shape)
               for x in (q, k, v))                                      # (heads, N, length, d)
    attended = attention(q, k, v, mask=inside[None, :, None])           # four axes: with three, kernels aren't fused
    return attended.flatten(1, 2).index_select(1, slots)


def ragged_attention(q, k, v, lengths, inside, slots):  # Efficient
    """By image on a CPU, unless images are so short that calls cost more than arithmetic; padded otherwise;
    arguments and result as there."""
    by_image = q.is_cpu and inside.shape[1] > 100
    return attention_by_image(q, k, v, lengths) if by_image else attention_padded(q, k, v, inside, slots)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
class EfficientMAE(ViT):  # Efficient
    """Masked autoencoder that knows which patches are hard. Raises InputError for sizes that don't fit."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512,
                 decoder_depth=8, decoder_num_heads=16, mask_ratio=0.85, norm_pix=True, in_chans=3,
                 gamma=0.6, beta=None, p2dist="approximate", difficulty="p2dist"):  # Efficient
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, in_chans=in_chans)
        check_vit(img_size, patch_size, decoder_embed_dim, decoder_num_heads)
        self.len_keep = int(self.num_patches * (1 - mask_ratio) + 1e-6)     # so ratio 13/14 of 196 patches keeps 14
        if not 0 < self.len_keep < self.num_patches:
            raise InputError(f"mask_ratio {mask_ratio} must keep and remove at least one of {self.num_patches} patches")
        self.norm_pix = norm_pix
        self.gamma = gamma
        if p2dist == "exact" and difficulty != "p2dist":
            raise InputError(f"p2dist exact is for --difficulty p2dist, not {difficulty}")
        if beta is not None and difficulty != "p2dist":
            raise InputError(f"beta bounds P²Dist: leave it out with --difficulty {difficulty}")
        self.beta = beta or (26 * patch_size / 16 if difficulty == "p2dist" else math.inf)
        least = max(patch_size / 2 + 1, 0.53 * patch_size + 0.5)        # a patch beside a visible one has d below this
        if patch_size < 2 or self.beta < least:
            raise InputError(f"beta must be at least {least:g} pixels, or there may be none to predict (patch_size at "
                             "least 2)")
        self.difficulty = {"approximate": p2dist_approximate, "exact": p2dist_exact,
                           "3x3": functools.partial(neighbourhood, radius=1),
                           "5x5": functools.partial(neighbourhood, radius=2), "nearest": nearest_patch}[
                               p2dist if difficulty == "p2dist" else difficulty]
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

    def forward_encoder(self, patches, ids_keep):
        """Visible patches to tokens: patches (N, L, P·P·3), ids_keep (N, keep) -> (N, 1 + keep, D)."""
        x = self.patch_embed(patches.take_along_dim(ids_keep[:, :, None], dim=1))        # (N, keep, D)
        x = x + self.pos_embed[0, 1 + ids_keep]                                          # row 0 is cls's
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)                      # (N, 1 + keep, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decoder_masking(self, noise):  # Efficient
        """Noise (N, L) to ids_keep (N, keep), ids_remove (N, L - keep) and, both (N, L - keep), the removed patches'
        distance and whether it is finite and ≤ β: the others are too hard and stay out of the decoder (Section 4.2)."""
        ids_keep, ids_remove = random_masking(noise, self.len_keep)
        distance = self.difficulty(ids_keep, ids_remove, self.grid_size, self.patch_size)
        return ids_keep, ids_remove, distance, (distance <= self.beta) & distance.isfinite()

    def forward_decoder(self, latent, ids_keep, ids_remove, easy, predict_all=False):  # Efficient
        """Tokens (N, 1 + keep, D) to predictions of the easy ones of the removed patches, (their number, P·P·3), image
        after image; with `predict_all` each image's visible ones too, before them."""
        x = self.decoder_embed(latent)
        x = torch.cat([x, self.mask_token.expand(len(x), 1 + self.num_patches - x.shape[1], -1)], dim=1)
        ids = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep, 1 + ids_remove], dim=1)
        x = x + self.decoder_pos_embed[0, ids]                                           # (N, 1 + L, D_decoder)

        # Hard patches leave; what stays is packed: (T, D_decoder). Reading T is the only wait for a GPU. It is
        # padded to a multiple of 32, as by one more image: a CPU prepares its kernels anew for every new T.
        enters = F.pad(easy, (latent.shape[1], 0), value=True)                           # (N, 1 + L)
        lengths = enters.sum(dim=1)
        number = lengths.sum().item()
        fill = 32 - number % 32
        lengths = torch.cat([lengths, 32 - lengths.sum(dim=0, keepdim=True) % 32])       # (N + 1,)
        tokens = F.pad(true_entries(enters, number), (0, fill), value=self.num_patches)
        inside = torch.arange(max(32, enters.shape[1]), device=x.device) < lengths[:, None]
        slots = true_entries(inside, number + fill)

        x = x.flatten(0, 1).index_select(0, tokens)
        for block in self.decoder_blocks:
            qkv = block.attn.qkv(block.norm1(x)).unflatten(1, (3, block.attn.num_heads, -1)).permute(1, 2, 0, 3)
            attended = ragged_attention(*qkv, lengths, inside, slots)                    # (heads, T, d)
            x = x + block.attn.proj(attended.transpose(0, 1).flatten(1))
            x = x + block.mlp(block.norm2(x))

        first = 1 if predict_all else latent.shape[1]                   # of each image's predicted tokens
        predicted = true_entries(tokens % enters.shape[1] >= first, len(tokens) - first * len(enters))
        return self.decoder_pred(self.decoder_norm(x.index_select(0, predicted)))[:len(predicted) - fill]

    def forward_loss(self, patches, pred, ids_remove, distance, easy):  # Efficient
        """Eq. 2, in float32: an image's squared errors weighted by d^-γ over the sum of its weights; the images' mean.

        patches (N, L, P·P·3), pred (number of easy patches, P·P·3), distance and easy (N, L - keep).
        """
        entries = true_entries(easy, len(pred))                         # where, in flattened easy, pred is
        ids = ids_remove + self.num_patches * torch.arange(len(easy), device=easy.device)[:, None]
        target = patches.flatten(0, 1).index_select(0, ids.flatten()[entries])
        if self.norm_pix:
            mean, std = mean_and_std(target)
            target = (target - mean) / std
        error = (pred.float() - target).square().mean(dim=1)                             # ‖p_i - t_i‖ of Eq. 2
        error = torch.zeros(easy.numel(), device=easy.device).index_copy(0, entries, error).view_as(distance)
        weight = distance ** -self.gamma * easy                                          # d_i^-γ of Eq. 2
        return ((weight * error).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-30)).mean()

    def forward(self, imgs, noise=None):  # Efficient
        """Images (N, 3, H, W), and noise (N, L) that fixes the mask, to the loss and a dict of what else to log."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove, distance, easy = self.decoder_masking(noise)
        patches = patchify(imgs, self.patch_size)                                        # (N, L, P·P·3)
        latent = self.forward_encoder(patches, ids_keep)
        pred = self.forward_decoder(latent, ids_keep, ids_remove, easy)
        loss = self.forward_loss(patches, pred, ids_remove, distance, easy)
        return loss, {"predicted_patches": easy.sum() / len(easy)}

    @torch.no_grad()
    def reconstruct(self, imgs, noise=None):  # Efficient
        """Every patch's prediction in its place (N, L, P·P·3), and the mask (N, L): 0 = visible, 1 = removed. Patches
        that don't enter the decoder have no prediction: NaN."""
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ids_keep, ids_remove, _, easy = self.decoder_masking(noise)
        latent = self.forward_encoder(patchify(imgs, self.patch_size), ids_keep)
        packed = self.forward_decoder(latent, ids_keep, ids_remove, easy, predict_all=True)
        enters = F.pad(easy, (ids_keep.shape[1], 0), value=True)                         # (N, L)
        pred = torch.full((*enters.shape, packed.shape[1]), math.nan, device=imgs.device)
        pred[enters] = packed.float()
        ids_restore = torch.cat([ids_keep, ids_remove], dim=1).argsort(dim=1)
        mask = torch.ones(ids_restore.shape, device=imgs.device).scatter(1, ids_keep, 0.0)
        return pred.take_along_dim(ids_restore[:, :, None], dim=1), mask

    def picture(self, imgs, *channels):  # Efficient
        """Rows of a picture, each (N, 3, H, W): original, masked, and the removed patches' prediction pasted in,
        but for those that are not predicted.

        A per-patch-standardised prediction has no mean and scale of its own: they are the original patch's.
        """
        pred, mask = self.reconstruct(imgs)
        patches, mask = patchify(imgs, self.patch_size), mask[:, :, None]
        if self.norm_pix:
            mean, std = mean_and_std(patches)
            pred = pred * std + mean
        rows = (patches, patches * (1 - mask), patches * (1 - mask) + pred.nan_to_num(0.0) * mask)
        return [denormalize(unpatchify(row, self.patch_size, self.grid_size), *channels) for row in rows]


def build_model(args):  # Efficient
    """The model that the command line describes."""
    size = dict(VIT_SIZES[args.model], img_size=args.img_size, patch_size=args.patch_size, in_chans=args.in_chans)
    return EfficientMAE(**size, decoder_embed_dim=args.decoder_embed_dim, decoder_depth=args.decoder_depth,
                        decoder_num_heads=args.decoder_num_heads, mask_ratio=args.mask_ratio, norm_pix=args.norm_pix,
                        gamma=args.gamma, beta=args.beta, p2dist=args.p2dist, difficulty=args.difficulty)


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
        torch._dynamo.config.capture_scalar_outputs = True  # Efficient: one graph in spite of the number of tokens
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
