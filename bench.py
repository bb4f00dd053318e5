"""Speed of the scripts, compared with other implementations.

    python bench.py                     # every method: images/s of a training step, memory, multiply-adds
    python bench.py --sdae_teachers     # MAE and SdAE's four teacher inputs (its Table 1)
    python bench.py --peers             # MAE beside transformers', lightly's and timm's (pip install them first)
    python bench.py --loader DIR        # decoding and augmentation of a folder's photographs, per core

Candidates are interleaved within one run: each lives in a process of its own, trains for some steps when it is its turn,
and waits for the rest. Figures are medians over the rounds, ratios the median of each round's ratio, with the least and
the largest in brackets. Ours run the script's own `main`; only its images are replaced, by a random batch in memory. So
a step includes the gradient's norm and, every 20th, the check for finite values, but no end of an epoch. A table (.md),
the raw times (.json) and what candidates print (errors.log) are written into --output_dir.
"""
import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

import common
import mae
import runs
from common import VIT_SIZES, InputError, normalize, pair
from runs import amp_dtype, launch, number

# A method's script is one that has these three functions
METHODS = sorted((path.stem for path in Path(__file__).parent.glob("*.py")
                  if all(f"\ndef {name}(" in path.read_text() for name in ("method_args", "build_model", "main"))),
                 key=lambda name: (name != "mae", name))
SETTINGS = {  # flags of the scripts; images a step on a CPU (in float32 half of them, for its memory), on a GPU
    "vit_micro": ("--img_size 32 --patch_size 4 --decoder_embed_dim 64 --decoder_depth 1 --decoder_num_heads 2",
                  128, 4096),
    "vit_tiny": ("--img_size 32 --patch_size 4 --decoder_embed_dim 192 --decoder_depth 4 --decoder_num_heads 3",
                 128, 4096),
    "vit_base": ("", 16, 256),
    "vit_large": ("", 8, 128),
    "vit_huge": ("", 4, 32),
}


def get_args(argv=None):
    """Parses the command line. Raises InputError."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--peers", nargs="*", choices=["transformers", "lightly", "timm"], help="MAE beside theirs")
    what.add_argument("--loader", metavar="DIR", help="images/s of one core, from files to uint8 crops")
    what.add_argument("--sdae_teachers", action="store_true", help="MAE, and SdAE with each --teacher_input")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, help="default: vit_base, with vit_tiny (32 pixels, "
                        "patches of 4) on a CPU, with vit_large and vit_huge on a GPU")
    parser.add_argument("--amp", nargs="+", choices=["bf16", "fp16", "none"], help="default: bf16; on a CPU none too")
    parser.add_argument("--batch_size", type=number(int, "[1, inf)"), help="images a step (default: by model)")
    parser.add_argument("--rounds", type=number(int, "[1, 1000]"), default=5)
    parser.add_argument("--seconds", type=number(float, "(0, 3600]"), default=3.0, help="about how long a turn is")
    parser.add_argument("--compile", action="store_true", help="torch.compile the scripts' models")
    parser.add_argument("--model_only", action="store_true", help="of the scripts: forward and backward, nothing else")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--output_dir", default="runs/bench")
    args = parser.parse_args(argv)
    args.device = runs.find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"), 0).type
    gpu = args.device == "cuda"
    args.models = args.models or (["vit_base", "vit_large", "vit_huge"] if gpu else ["vit_tiny", "vit_base"])
    args.amp = args.amp or (["bf16"] if gpu else ["bf16", "none"])
    args.peers = list(PEERS) if args.peers == [] else args.peers
    for name in args.peers or []:
        if not importlib.util.find_spec(name):
            raise InputError(f"{name} is not installed: pip install it, or name other libraries after --peers")
    if (args.compile or args.model_only) and (args.peers or args.loader):
        raise InputError("--compile and --model_only are for the scripts' tables (--peers shows ours both ways)")
    if args.methods[0] != "mae":
        raise InputError("--methods begins with mae, which the others are measured by")
    if args.loader and not os.path.isdir(args.loader):
        raise InputError(f"no folder '{args.loader}': give one with photographs")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Candidates: each in a process of its own, which trains when it is told to
# ---------------------------------------------------------------------------------------------------------------------
class Candidate:
    """A process that runs `function(turns, *arguments)`: it trains for some steps when it is told to, and waits for the
    next turn. `times` collects seconds a step, `facts` is what else is known of it, `memory` the most it has held."""
    alive, errors = [], os.devnull

    def __init__(self, label, function, *arguments, threads=None, **facts):
        context = multiprocessing.get_context("spawn")
        self.label, self.facts, self.times, self.memory = label, facts, [], None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=in_its_process, daemon=True,
                                       args=(theirs, Candidate.errors, threads, function, arguments))
        self.process.start()
        theirs.close()
        Candidate.alive.append(self)

    def turn(self, idle, steps):
        """Lets it train for `steps`, after `idle` ones that are not timed; seconds a step. Raises InputError where the
        process has failed."""
        try:
            with contextlib.suppress(OSError):      # its last words are in the pipe
                self.pipe.send((idle, steps))
            answer = self.pipe.recv()
        except (EOFError, OSError):
            answer = "its process died; was memory short?"
        if isinstance(answer, str):
            raise InputError(f"{self.label}: {answer} (see {Candidate.errors})")
        seconds, self.memory = answer
        return seconds

    @classmethod
    def stop_all(cls):
        """Ends all processes."""
        for candidate in cls.alive:
            candidate.pipe.close()
        for candidate in cls.alive:
            candidate.process.join(20)
            candidate.process.kill()
        cls.alive.clear()


def in_its_process(pipe, errors, threads, function, arguments):
    """What a candidate's process runs; all it prints goes to the file `errors`."""
    torch.set_num_threads(threads or torch.get_num_threads())
    with open(errors, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        function(lambda batches, device: turns(pipe, batches, device), *arguments)
    except EOFError:            # the bench has closed its end: no more turns
        pass
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise


def turns(pipe, batches, device):
    """Hands on `batches`, as many as each turn has steps, and answers with seconds a step and peak memory in bytes:
    allocated on a GPU, else the process's, None where that is not known."""
    cuda = device.type == "cuda"
    while True:
        idle, steps = pipe.recv()
        for step in range(idle + steps):
            if step == idle:
                torch.cuda.synchronize() if cuda else None
                start = time.perf_counter()
            yield next(batches)
        torch.cuda.synchronize() if cuda else None
        seconds, memory = (time.perf_counter() - start) / steps, None
        with contextlib.suppress(OSError, StopIteration):   # Linux; getrusage would count the parent's, too
            line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
            memory = 1024 * int(line.split()[1])
        pipe.send((seconds, torch.cuda.max_memory_allocated() if cuda else memory))
        if cuda:
            torch.cuda.empty_cache()                    # the next one's turn
        elif idle:                                      # steps that are not timed get the memory back
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)        # glibc's


def from_memory(batch_size, img_size, device):
    """The same random batch without end: imgs uint8 (N, 3, H, W), labels."""
    imgs = torch.randint(256, (batch_size, 3, *pair(img_size)), dtype=torch.uint8)
    imgs = imgs.pin_memory() if device.type == "cuda" else imgs
    while True:
        yield imgs, torch.zeros(batch_size, dtype=torch.int64)


def ours(turns, name, words):
    """A script's own main on images from memory; whatever passes over all images first (Run.once) gets one batch."""
    module = importlib.import_module(name)
    args = module.get_args([*words, "--save_minutes", "inf"])

    def make_loader(crops, batches, num_workers, device):
        batch = from_memory(args.batch_size, args.img_size, device)
        return turns(batch, device) if hasattr(batches, "steps") else iter([next(batch)])

    runs.make_loader, runs.eval_batches = make_loader, lambda *_: [0]
    module.load_dataset = lambda *_: range(10**6 * args.batch_size)     # its length is all that is asked
    with tempfile.TemporaryDirectory() as args.output_dir:
        module.main(args)


def training(args):
    """Device and autocast type of a script's arguments. GPUs multiply float32 in TF32, as in `Run`."""
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    return device, amp_dtype(args.amp, device)


def forward_backward(turns, name, words):
    """A script's model alone: no optimiser, no gradient's norm, nothing else of its main."""
    module = importlib.import_module(name)
    args = module.get_args(words)
    device, dtype = training(args)
    model = module.build_model(args).to(device).train()
    if args.compile:
        model.compile()
    for imgs, _ in turns(from_memory(args.batch_size, args.img_size, device), device):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss, _ = model(normalize(imgs.to(device, non_blocking=True)))
        loss.backward()
        model.zero_grad()


def matrix_product(turns, size, words):
    """size × size matrices: size³ multiply-adds a step."""
    device, dtype = training(mae.get_args(words))
    a, b = torch.randn(2, size, size, dtype=dtype or torch.float32, device=device)
    for _ in turns(iter(lambda: 0, 1), device):
        a @ b


def peer(turns, library, words, tuned, compiled, attention="sdpa"):
    """Another implementation of MAE in a plain loop: precision as ours, AdamW as torch has it or (`tuned`) fused."""
    args = mae.get_args(words)
    device, dtype = training(args)
    with contextlib.suppress(ImportError):
        importlib.import_module("timm.layers").set_fused_attn(attention == "sdpa")      # for lightly's blocks too
    model = PEERS[library](args, attention).to(device)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, betas=(0.9, 0.95),
                                  weight_decay=0.05, **({"fused": True} if tuned else {}))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    for imgs, _ in turns(from_memory(args.batch_size, args.img_size, device), device):
        imgs = normalize(imgs.to(device, non_blocking=True))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(imgs)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Peers: modules from images (N, 3, H, W) to MAE's loss
# ---------------------------------------------------------------------------------------------------------------------
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
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
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


# ---------------------------------------------------------------------------------------------------------------------
# Multiply-adds of an image in training: forward and backward
# ---------------------------------------------------------------------------------------------------------------------
def counted(name, words, images=16):
    """What the script's model does of them, by torch's FlopCounter, on a CPU; Efficient MAE's mean over `images`."""
    module = importlib.import_module(name)
    args = module.get_args([*words, "--batch_size", "2"])
    images = images if name == "efficient_mae" else 2
    model = module.build_model(args).train()
    noise = torch.rand(1000, model.num_patches, generator=torch.Generator().manual_seed(0))[:images]    # as in `tight`
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(images, 3, *pair(args.img_size)), noise)[0].backward()
    return counter.get_total_flops() / 2 / images


def tight(name, words, images=16):
    """The method's own, from its sizes: three times the forward products (one forward, two backward), less what
    gradients of pixels would cost; visible patches alone embedded, removed ones alone predicted. NaN for a script that
    isn't one of the five, whose work we don't know."""
    if name not in ("mae", "emae", "efficient_mae", "robust_mae", "sdae"):
        return math.nan
    module = importlib.import_module(name)
    args = module.get_args(words)
    size = VIT_SIZES[args.model]
    P, D, depth, d = args.patch_size, size["embed_dim"], size["depth"], args.decoder_embed_dim
    N = math.prod(n // P for n in pair(args.img_size))
    keep = N // args.parts if name == "emae" else int(N * (1 - args.mask_ratio) + 1e-6)

    def blocks(depth, tokens, width):
        return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)

    removed = torch.tensor([N - keep])
    if name == "efficient_mae":
        noise = torch.rand(1000, N, generator=torch.Generator().manual_seed(0))[:images]
        removed = module.build_model(args).decoder_masking(noise)[3].sum(dim=1)
    values = D if name == "sdae" else 3 * P * P                             # that are predicted of a patch
    decoder = blocks(args.decoder_depth, 1 + keep + removed, d) + removed * d * values
    embed = keep * 3 * P * P * D
    forward = embed + blocks(depth, 1 + keep, D) + (1 + keep) * D * d + decoder.double().mean().item()
    total = (3 * forward - embed) * (args.parts if name == "emae" else 1)
    if name == "sdae":                                                      # the teacher has no backward pass
        teacher = {"folds": (args.folds, (N - keep) // args.folds), "masked": (1, N - keep), "full": (1, N),
                   "crop": (1, args.teacher_tokens or (N - keep) // 3)}
        folds, seen = teacher[args.teacher_input]
        total += folds * (seen * 3 * P * P * D + blocks(depth, 1 + seen, D))
    return float(total)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------
def measure(candidates, args):
    """Fills each candidate's `times`, seconds a step in each round."""
    idle = 2 * (args.device == "cuda")                  # steps that begin a turn untimed: memory is had anew
    steps = []
    for candidate in tqdm(candidates, "warming up", leave=False):
        seconds = candidate.turn(10 * idle or 2, 5 if idle else 1)      # the first compile, and fill caches
        steps.append(max(1, idle, round(args.seconds / seconds)))
    for round_ in tqdm(range(args.rounds), "rounds", leave=False):
        for i in range(len(candidates)):
            i = (i + round_) % len(candidates)          # another one begins each round
            candidates[i].times.append(candidates[i].turn(idle, steps[i]))
    Candidate.stop_all()


def spread(values, digits=2):
    """Median with the least and the largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def over(a, b):
    """Ratios of two candidates' times, round by round."""
    return [x / y for x, y in zip(a.times, b.times)]


def row_of(candidate, first, limit):
    """A candidate's label, images/s, step time over the first's, share of the matrix-product rate, and memory."""
    images, macs = candidate.facts["images"], candidate.facts["macs"]
    share = [100 * images * macs / limit.facts["macs"] * ratio for ratio in over(limit, candidate)]
    memory = "?" if candidate.memory is None else f"{candidate.memory / 1e9:.1f}"
    return [candidate.label, spread([images / t for t in candidate.times]), spread(over(candidate, first)),
            f"{statistics.median(share):.0f} %", memory]


def settings(args):
    """For each model and precision: its name, a script's command line, images a step, and the candidate for the
    machine's matrix-product rate."""
    for model in args.models:
        for amp in args.amp:
            flags, on_cpu, on_gpu = SETTINGS[model]
            gpu = args.device == "cuda"
            images = args.batch_size or (on_gpu if gpu else on_cpu // (2 if amp == "none" else 1))
            words = f"--model {model} {flags} --batch_size {images} --amp {amp} --device {args.device}".split()
            size = 8192 if gpu else 2048
            yield f"{model}, {amp}", words, images, Candidate("matrix product", matrix_product, size, words,
                                                              macs=size**3, images=1)


def title_of(name, images, limit, words):
    """A table's title."""
    rate = limit.facts["macs"] / statistics.median(limit.times) / 1e12
    return f"{name}, {images} images a step; matrix products: {rate:.3f} T multiply-adds/s (`{' '.join(words)}`)"


def methods(args):
    """The scripts' training steps, or their models' forward and backward alone."""
    lines = [(name, []) for name in args.methods]
    if args.sdae_teachers:
        inputs = ("full", "masked", "crop", "folds")
        lines = [("mae", []), *(("sdae", ["--teacher_input", teacher]) for teacher in inputs)]
    function, what = (forward_backward, ", forward and backward") if args.model_only else (ours, "")
    for setting, words, images, limit in settings(args):
        words, candidates = words + ["--compile"] * args.compile, []
        for name, more in lines:
            candidates.append(Candidate(f"`{' '.join([f'{name}.py', *more])}`", function, name, words + more,
                                        images=images, macs=counted(name, words + more),
                                        tight=tight(name, words + more)))
        measure([*candidates, limit], args)
        rows, first = [], candidates[0]
        for candidate in candidates:
            label, speed, ratio, share, memory = row_of(candidate, first, limit)
            macs, least = candidate.facts["macs"], candidate.facts["tight"]
            rows.append([label, speed, ratio, f"{macs / 1e9:.2f}", f"{macs / first.facts['macs']:.2f}",
                         "–" if math.isnan(least) else f"{macs / least:.2f}", share, memory])
        yield (title_of(f"{setting}{', compiled' * args.compile}{what}", images, limit, words),
               ["script", "images/s", f"step time over {first.label}", "G multiply-adds an image",
                f"over {first.label}", "over the tight count", "of the matrix-product rate", "peak memory, GB"],
               rows, [*candidates, limit])


def peers(args):
    """MAE beside other implementations on the same random batch, in the same precision."""
    for setting, words, images, limit in settings(args):
        plain, facts = "eager" if "cpu, bf16" == f"{args.device}, {setting[-4:]}" else "sdpa", dict(images=images)
        facts["macs"] = counted("mae", words)
        candidates = [Candidate("`mae.py`", ours, "mae", words, **facts),
                      Candidate("`mae.py --compile`", ours, "mae", [*words, "--compile"], **facts)]
        for name in args.peers:
            for label, *how in (("default AdamW", False, False), (f"fused AdamW, {plain} attention", True, False, plain),
                                (f"fused AdamW, {plain} attention, compiled", True, True, plain)):
                candidates.append(Candidate(f"{name}, {label}", peer, name, words, *how, **facts))
        measure([*candidates, limit], args)
        yield (title_of(setting, images, limit, words),
               ["implementation", "images/s", "step time over `mae.py`",
                "of the matrix-product rate, by ours' multiply-adds", "peak memory, GB"],
               [row_of(candidate, candidates[0], limit) for candidate in candidates], [*candidates, limit])


class UsualImages(Dataset):
    """A folder's images through the transform that the public MAE code uses, as torchvision has it, on PIL images."""

    def __init__(self, folder, img_size):
        self.paths = [os.fsdecode(path) for path in common.load_dataset(folder, "pretrain").paths]
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD)])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with open(self.paths[index], "rb") as file:
            return self.transform(Image.open(file).convert("RGB")), 0


def passes(turns, folder, img_size, usual):
    """A step is one pass over a folder's images (at most 1024), in batches of 64, in one process."""
    device = torch.device("cpu")
    images = UsualImages(folder, img_size) if usual else common.Crops(common.load_dataset(folder, "pretrain"),
                                                                      common.train_transform(img_size, (0.2, 1.0)))
    count = min(1024, len(images))
    for _ in turns(iter(lambda: 0, 1), device):
        for _ in (DataLoader(Subset(images, range(count)), batch_size=64) if usual else
                  runs.make_loader(images, common.eval_batches(count, 64), 0, device)):
            pass


def loader(args):
    """Decoding, cropping, resizing and flipping in one process with one thread, up to a batch in memory."""
    images = min(1024, len(common.load_dataset(args.loader, "pretrain")))
    for img_size in (224, 128):
        candidates = [Candidate(label, passes, args.loader, img_size, usual, threads=1, images=images)
                      for label, usual in (("ours: uint8 crops, resized as tensors", False),
                                           ("usual: PIL crops, ToTensor, Normalize", True))]
        measure(candidates, args)
        rows = [[c.label, spread([images / t for t in c.times], 0), spread(over(candidates[1], c)),
                 str(3 * img_size**2 * (1 if c is candidates[0] else 4))] for c in candidates]
        yield (f"{images} images to {img_size} pixels",
               ["pipeline", "images/s of one core", "times the usual", "bytes an image to the device"], rows, candidates)


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------
def machine(args):
    """One line on what ran it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    if args.device == "cuda":
        name = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), {name}"
    versions = [f"{library} {importlib.metadata.version(library)}" for library in
                ("torch", "torchvision", "numpy", "pillow", *(args.peers or []))]
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {', '.join(versions)}"


def main(args):
    """Measures, prints and writes the tables."""
    what = next((name for name in ("peers", "loader", "sdae_teachers") if getattr(args, name)), "methods")
    function = {"peers": peers, "loader": loader}.get(what, methods)
    what = f"{'model' if args.model_only and what == 'methods' else what}_{args.device}"
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    Candidate.errors = str(output / "errors.log")
    command = " ".join(["python", "bench.py", *("DIR" if os.path.isdir(word) else word for word in sys.argv[1:])])
    text, raw = [f"`{command}`: {machine(args)}. Medians of {args.rounds} rounds, least and largest in brackets."], []
    with tempfile.TemporaryDirectory(dir=output, ignore_cleanup_errors=True) as scratch:
        os.environ["TMPDIR"] = os.path.abspath(scratch)     # where candidates and compilers write
        try:
            for title, head, rows, candidates in function(args):
                lines = [head, ["---"] * len(head), *rows]
                text.append("\n".join([title, "", *("| " + " | ".join(line) + " |" for line in lines)]))
                print("\n" + text[-1], flush=True)
                raw.append({"title": title, "candidates": [
                    {"label": c.label, **c.facts, "seconds": c.times, "memory": c.memory} for c in candidates]})
                (output / f"{what}.md").write_text("\n\n".join(text) + "\n")
                found = {"command": command, "machine": machine(args), "rounds": args.rounds, "tables": raw}
                (output / f"{what}.json").write_text(json.dumps(found, indent=1) + "\n")
        finally:
            Candidate.stop_all()


if __name__ == "__main__":
    launch(main, get_args)
