"""What bench.py compares with: other implementations of MAE, as modules from images (N, 3, H, W) to the loss, and the
usual pipeline of images."""
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms

import common
import mae
from common import VIT_SIZES


def transformers_mae(args, attention):
    """transformers.ViTMAEForPreTraining."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    size = VIT_SIZES[args.model]
    config = ViTMAEConfig(
        hidden_size=size["embed_dim"], num_hidden_layers=size["depth"], num_attention_heads=size["num_heads"],
        intermediate_size=4 * size["embed_dim"], image_size=args.img_size[0], patch_size=args.patch_size,
        decoder_hidden_size=args.decoder_embed_dim, decoder_num_hidden_layers=args.decoder_depth,
        decoder_num_attention_heads=args.decoder_num_heads, decoder_intermediate_size=4 * args.decoder_embed_dim,
        mask_ratio=args.mask_ratio, norm_pix_loss=args.norm_pix, attn_implementation=attention)

    class Model(ViTMAEForPreTraining):
        def forward(self, imgs):
            return super().forward(imgs).loss
    return Model(config)


def lightly_mae(args, attention):
    """lightly's modules, put together as in its documentation; its example's targets are not standardised."""
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            vit = timm_vit(args)
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.embed = nn.Linear(vit.embed_dim, args.decoder_embed_dim)
            self.decoder = MaskedVisionTransformerDecoderTIMM(vit.patch_embed.num_patches, args.decoder_embed_dim,
                                                              args.decoder_depth, args.decoder_num_heads)
            self.pred = nn.Linear(args.decoder_embed_dim, 3 * args.patch_size**2)

        def forward(self, imgs):
            size = (len(imgs), self.backbone.sequence_length)
            keep, remove = utils.random_token_mask(size=size, mask_ratio=args.mask_ratio, device=imgs.device)
            x = self.embed(self.backbone.encode(images=imgs, idx_keep=keep))
            tokens = utils.repeat_token(self.decoder.mask_token, size)
            x = self.decoder.add_pos_embed(utils.set_at_index(tokens, keep, x.type_as(tokens)))
            pred = self.pred(utils.get_at_index(self.decoder.decode(x), remove))
            return F.mse_loss(pred, utils.get_at_index(utils.patchify(imgs, args.patch_size), remove - 1))
    return Model()


def timm_mae(args, attention):
    """What the public MAE code does, on timm's blocks (timm has no MAE): all patches embedded, then gathered, the
    decoder's tokens put in order, all patches predicted."""
    from timm.models.vision_transformer import Block

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, width = timm_vit(args), args.decoder_embed_dim
            self.embed = nn.Linear(self.vit.embed_dim, width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
            self.position = nn.Parameter(torch.zeros(1, 1 + self.vit.patch_embed.num_patches, width), False)
            self.blocks = nn.Sequential(*(Block(width, args.decoder_num_heads, qkv_bias=True)
                                          for _ in range(args.decoder_depth)))
            self.norm, self.pred = nn.LayerNorm(width), nn.Linear(width, 3 * args.patch_size**2)

        def forward(self, imgs):
            x = self.vit.patch_embed(imgs) + self.vit.pos_embed[:, 1:]
            N, L, D = x.shape
            shuffle = torch.rand(N, L, device=x.device).argsort(dim=1)
            restore, keep = shuffle.argsort(dim=1), int(L * (1 - args.mask_ratio))
            x = torch.gather(x, 1, shuffle[:, :keep, None].expand(-1, -1, D))
            x = torch.cat([(self.vit.cls_token + self.vit.pos_embed[:, :1]).expand(N, -1, -1), x], dim=1)
            x = self.embed(self.vit.norm(self.vit.blocks(x)))
            tokens = torch.cat([x[:, 1:], self.mask_token.expand(N, L - keep, -1).to(x.dtype)], dim=1)
            tokens = torch.gather(tokens, 1, restore[:, :, None].expand(-1, -1, x.shape[2]))
            pred = self.pred(self.norm(self.blocks(torch.cat([x[:, :1], tokens], dim=1) + self.position)))[:, 1:]
            target = mae.patchify(imgs, args.patch_size)
            mean, std = mae.mean_and_std(target)
            target = (target - mean) / std
            mask = torch.ones(N, L, device=x.device)
            mask[:, :keep] = 0
            mask = mask.gather(1, restore)
            return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    return Model()


def timm_vit(args):
    """timm's ViT of the script's size."""
    from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer(img_size=args.img_size[0], patch_size=args.patch_size, num_classes=0,
                             **{key: VIT_SIZES[args.model][key] for key in ("embed_dim", "depth", "num_heads")})


PEERS = {"transformers": transformers_mae, "lightly": lightly_mae, "timm": timm_mae}


class UsualImages(Dataset):
    """A folder's images through the transform that the public MAE code uses, as torchvision has it, on PIL images."""

    def __init__(self, folder, img_size):
        self.paths = [os.fsdecode(path) for path in common.load_dataset(folder, "pretrain").paths]
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(img_size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD)])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with open(self.paths[index], "rb") as file:
            return self.transform(Image.open(file).convert("RGB")), 0
