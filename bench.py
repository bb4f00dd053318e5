"""How fast the scripts are, and beside whom.

    python bench.py                     # every method: images/s of a training step, memory, multiply-adds
    python bench.py --peers             # MAE beside transformers', lightly's and timm's (pip install them first)
    python bench.py --loader DIR        # decoding and augmentation of a folder's photographs, per core
    python bench.py --end_to_end DIR    # training from the loader beside training from memory
    python bench.py --scaling           # two processes; image sizes, mask ratios, model sizes

Everything compared is measured in one run, turn by turn: each candidate lives in a process of its own, trains for some
steps when it is its turn, and waits for the rest. Figures are medians over the rounds, ratios the median of each
round's ratio, with the least and the largest in brackets. Ours run the script's own `main`, with nothing replaced but
the loader (random uint8 images from memory) and, in Robust MAE, the statistics gathered before the first step: a step
includes the gradient's norm and, every 20th, the check for finite values, but no end of an epoch. Waiting candidates
keep their weights in memory. A table (.md), the raw times (.json) and what candidates print (errors.log) are written
into --output_dir.
"""
import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

import common
import mae
from common import VIT_SIZES, InputError, Normalize, amp_dtype, number

METHODS = ["mae", "emae", "efficient_mae", "robust_mae", "sdae"]
SETTINGS = {  # flags of the scripts; images a step on a CPU (in float32 half of them, for its memory), on a GPU
    "vit_tiny": ("--img_size 32 --patch_size 4 --decoder_embed_dim 192 --decoder_depth 4 --decoder_num_heads 3",
                 128, 4096),
    "vit_base": ("", 16, 256),
    "vit_large": ("", 8, 256),
    "vit_huge": ("", 4, 128),
}


def get_args(argv=None):
    """Parses the command line."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--peers", nargs="*", choices=["transformers", "lightly", "timm"], help="MAE beside theirs")
    what.add_argument("--loader", metavar="DIR", help="images/s of one core, from files to uint8 crops")
    what.add_argument("--end_to_end", metavar="DIR", help="training from a folder's images")
    what.add_argument("--scaling", action="store_true", help="processes, image sizes, mask ratios, model sizes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, help="default: vit_base, with vit_tiny (32 pixels, "
                        "patches of 4) on a CPU, with vit_large and vit_huge on a GPU")
    parser.add_argument("--amp", nargs="+", choices=["bf16", "fp16", "none"], help="default: bf16; on a CPU none too")
    parser.add_argument("--batch_size", type=number(int, "[1, inf)"), help="images a step (default: by model)")
    parser.add_argument("--rounds", type=number(int, "[1, inf)"), default=5)
    parser.add_argument("--seconds", type=number(float, "(0, inf)"), default=3.0, help="about how long a turn is")
    parser.add_argument("--compile", action="store_true", help="torch.compile the five scripts' models")
    parser.add_argument("--model_only", action="store_true", help="of the five: forward and backward, no other step")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--output_dir", default="runs/bench")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = args.device == "cuda"
    args.models = args.models or (["vit_base", "vit_large", "vit_huge"] if gpu else ["vit_tiny", "vit_base"])
    args.amp = args.amp or (["bf16"] if gpu else ["bf16", "none"])
    args.peers = list(PEERS) if args.peers == [] else args.peers
    for name in args.peers or []:
        if not importlib.util.find_spec(name):
            raise InputError(f"{name} is not installed: pip install it, or name other libraries after --peers")
    if (args.compile or args.model_only) and (args.peers or args.loader or args.end_to_end or args.scaling):
        raise InputError("--compile and --model_only are for the five scripts' table (--peers shows ours both ways)")
    if args.methods[0] != "mae":
        raise InputError("--methods begins with mae, which the others are measured by")
    for folder in filter(None, (args.loader, args.end_to_end)):
        if not os.path.isdir(folder):
            raise InputError(f"no folder '{folder}': give one with photographs")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Candidates: each in a process of its own, which trains when it is told to
# ---------------------------------------------------------------------------------------------------------------------
class Candidate:
    """A process that runs `function(turns, *arguments)`: it trains for some steps when it is told to, and waits for the
    next turn. `times` collects seconds a step, `facts` is what else is known of it, `memory` the most it has held."""
    alive, errors = [], os.devnull

    def __init__(self, label, function, *arguments, environment=None, **facts):
        context = multiprocessing.get_context("spawn")
        self.label, self.facts, self.times, self.memory = label, facts, [], None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=in_its_process,       # no daemon: those may not have loader workers
                                       args=(theirs, Candidate.errors, environment or {}, function, arguments))
        self.process.start()
        theirs.close()
        Candidate.alive.append(self)

    def tell(self, idle, steps):
        """Lets it train for `steps`, after `idle` ones that are not timed."""
        with contextlib.suppress(OSError):      # its last words are in the pipe
            self.pipe.send((idle, steps))

    def hear(self):
        """Seconds a step of the turn begun by `tell`. Raises InputError where the process has failed."""
        try:
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


def in_its_process(pipe, errors, environment, function, arguments):
    """What a candidate's process runs; all it prints goes to the file `errors`."""
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
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
    """Hands on `batches`, as many as each turn has steps, and answers with seconds a step and peak memory in bytes."""
    cuda = device.type == "cuda"
    while True:
        idle, steps = pipe.recv()
        for step in range(idle + steps):
            if step == idle:
                torch.cuda.synchronize() if cuda else None
                start = time.perf_counter()
            yield next(batches)
        torch.cuda.synchronize() if cuda else None
        seconds = (time.perf_counter() - start) / steps
        pipe.send((seconds, torch.cuda.max_memory_allocated() if cuda else peak_memory()))
        if cuda:
            torch.cuda.empty_cache()                    # the next one's turn
        elif idle:                                      # steps that are not timed get the memory back
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)        # glibc's


def peak_memory():
    """The most bytes this process has held, its interpreter and libraries included; None where that is not known."""
    with contextlib.suppress(OSError, StopIteration):   # Linux; getrusage would count the parent's, too
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])


def from_memory(batch_size, img_size, device):
    """The same random batch without end: imgs uint8 (N, 3, H, W), labels."""
    imgs = torch.randint(256, (batch_size, 3, *img_size), dtype=torch.uint8)
    imgs = imgs.pin_memory() if device.type == "cuda" else imgs
    while True:
        yield imgs, torch.zeros(batch_size, dtype=torch.int64)


def ours(turns, name, words, folder=None):
    """A script's own main. `folder`: from its images, through the script's own loader."""
    module = importlib.import_module(name)
    args = module.get_args([*words, "--save_minutes", "inf"])
    real_loader = module.make_loader

    def make_loader(crops, batches, num_workers, device, skipped):
        if folder is None:
            return turns(from_memory(args.batch_size // batches.world_size, common.pair(args.img_size), device), device)
        return turns(real_loader(crops, batches, num_workers, device, skipped), device)

    module.make_loader = make_loader
    if folder is None:
        module.load_dataset = lambda *_: range(10**6 * args.batch_size)     # its length is all that is asked
    if name == "robust_mae":
        module.patch_statistics = lambda *_: (0.5, 0.1)
    with tempfile.TemporaryDirectory() as args.output_dir:
        module.main(args)


def forward_backward(turns, name, words):
    """A script's model alone: no optimiser, no gradient's norm, nothing else of its main."""
    module = importlib.import_module(name)
    args = module.get_args(words)
    device = torch.device(args.device)
    dtype = amp_dtype(args.amp, device)
    model, normalize = module.build_model(args).to(device).train(), Normalize().to(device)
    if args.compile:
        model.compile()
    for imgs, _ in turns(from_memory(args.batch_size, common.pair(args.img_size), device), device):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss, _ = model(normalize(imgs.to(device, non_blocking=True)))
        loss.backward()
        model.zero_grad()


def matrix_product(turns, size, dtype, device):
    """size × size matrices: size³ multiply-adds a step."""
    device = torch.device(device)
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    for _ in turns(iter(lambda: 0, 1), device):
        a @ b


def peer(turns, library, words, tuned, compiled, attention="sdpa"):
    """Another implementation of MAE in a plain loop: precision as ours, AdamW as torch has it or (`tuned`) fused."""
    args = mae.get_args(words)
    device = torch.device(args.device)
    dtype = amp_dtype(args.amp, device)
    torch.set_float32_matmul_precision("high")          # as ours do on GPUs
    with contextlib.suppress(ImportError):
        importlib.import_module("timm.layers").set_fused_attn(attention == "sdpa")      # for lightly's blocks too
    model = PEERS[library](args, attention).to(device)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, betas=(0.9, 0.95),
                                  weight_decay=0.05, **({"fused": True} if tuned else {}))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    normalize = Normalize().to(device)
    for imgs, _ in turns(from_memory(args.batch_size, common.pair(args.img_size), device), device):
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
    imgs = torch.randn(images, 3, *common.pair(args.img_size))
    noise = torch.rand(1000, model.num_patches, generator=torch.Generator().manual_seed(0))[:images]    # as in `tight`
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(imgs, noise)[0].backward()
    return counter.get_total_flops() / 2 / images


def tight(name, words, images=16):
    """The method's own, from its sizes: three times the forward products (one forward, two backward), less what
    gradients of pixels would cost; visible patches alone embedded, removed ones alone predicted."""
    module = importlib.import_module(name)
    args = module.get_args(words)
    size = VIT_SIZES[args.model]
    P, D, depth, d = args.patch_size, size["embed_dim"], size["depth"], args.decoder_embed_dim
    N = math.prod(n // P for n in common.pair(args.img_size))
    ratio = 1 - 1 / args.parts if name == "emae" else args.mask_ratio
    keep = int(N * (1 - ratio) + 1e-6)
    block = lambda tokens, width: 12 * tokens * width**2 + 2 * tokens**2 * width
    values = D if name == "sdae" else 3 * P * P                             # that are predicted of a patch
    embed = keep * 3 * P * P * D
    removed = np.array([N - keep])
    if name == "efficient_mae":
        noise = torch.rand(1000, N, generator=torch.Generator().manual_seed(0))[:images]
        removed = module.build_model(args).decoder_masking(noise)[3].sum(dim=1).numpy()
    forward = (embed + depth * block(1 + keep, D) + (1 + keep) * D * d
               + np.mean(args.decoder_depth * block(1 + keep + removed, d) + removed * d * values))
    total = 3 * forward - embed
    if name == "emae":
        total *= args.parts
    if name == "sdae":                                                      # the teacher has no backward pass
        fold = (N - keep) // args.folds
        total += args.folds * (fold * 3 * P * P * D + depth * block(1 + fold, D))
    return float(total)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------
def measure(candidates, args, idle=0):
    """Fills each candidate's `times`, seconds a step in each round; candidates may be groups that run at once. `idle`
    is the number of steps that begin a turn untimed; a turn has at least as many again."""
    gpu = args.device == "cuda"
    idle = max(idle, 2 * gpu)                           # memory is had anew, clocks rise
    steps = []
    for group in tqdm(candidates, "warming up", leave=False):
        seconds = turn(group, 20 if gpu else 2, 5 if gpu else 1)        # the first compile, and fill caches
        steps.append(max(1, idle, round(args.seconds / seconds)))
    for round_ in tqdm(range(args.rounds), "rounds", leave=False):
        order = range(len(candidates))
        for i in [*order[round_ % len(order):], *order[:round_ % len(order)]]:
            turn(candidates[i], idle, steps[i], keep=True)
    Candidate.stop_all()


def turn(group, idle, steps, keep=False):
    """One turn of a candidate, or of all of a group at once; the slowest one's seconds a step."""
    group = group if isinstance(group, tuple) else (group,)
    for candidate in group:
        candidate.tell(idle, steps)
    waiting, seconds = {candidate.pipe: candidate for candidate in group}, 0.0
    while waiting:                                      # whoever fails is heard, though others wait for it
        for pipe in connection.wait(list(waiting)):
            seconds = max(seconds, waiting.pop(pipe).hear())
    for candidate in group if keep else ():
        candidate.times.append(seconds)
    return seconds


def spread(values, digits=2):
    """Median with the least and the largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def gigabytes(candidate):
    """Its peak memory: allocated on a GPU, else its process's."""
    return "?" if candidate.memory is None else f"{candidate.memory / 1e9:.1f}"


def over(a, b):
    """Ratios of two candidates' times, round by round."""
    return [x / y for x, y in zip(a.times, b.times)]


def words_of(model, args, amp, *more):
    """A script's command line for a model of SETTINGS."""
    flags, on_cpu, on_gpu = SETTINGS[model]
    batch_size = args.batch_size or (on_gpu if args.device == "cuda" else on_cpu // (2 if amp == "none" else 1))
    return [*f"--model {model} {flags} --batch_size {batch_size} --amp {amp} --device {args.device}".split(), *more]


def batch_of(words):
    """The batch size in a command line of `words_of`."""
    return int(words[words.index("--batch_size") + 1])


def product(args, amp):
    """The candidate for the machine's matrix-product rate."""
    size = 8192 if args.device == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}[amp]
    return Candidate("matrix product", matrix_product, size, dtype, args.device, macs=size**3, images=1)


def rates(candidate, limit):
    """Images/s, and the share of the matrix-product rate, round by round."""
    macs = candidate.facts["macs"] * candidate.facts["images"]
    share = [100 * macs / limit.facts["macs"] * ratio for ratio in over(limit, candidate)]
    return [candidate.facts["images"] / t for t in candidate.times], share


def limit_of(limit):
    """The matrix-product rate, for a table's title."""
    return f"matrix products: {limit.facts['macs'] / statistics.median(limit.times) / 1e12:.3f} T multiply-adds/s"


def methods(args):
    """The five scripts' training steps, or their models' forward and backward alone."""
    run, what = (forward_backward, ", forward and backward") if args.model_only else (ours, "")
    for model in args.models:
        for amp in args.amp:
            words = words_of(model, args, amp, *["--compile"] * args.compile)
            candidates = [Candidate(f"`{name}.py`", run, name, words, images=batch_of(words),
                                    macs=counted(name, words), tight=tight(name, words)) for name in args.methods]
            limit = product(args, amp)
            measure([*candidates, limit], args)
            rows, first = [], candidates[0]
            for candidate in candidates:
                images, share = rates(candidate, limit)
                macs = candidate.facts["macs"]
                rows.append([candidate.label, spread(images), spread(over(candidate, first)), f"{macs / 1e9:.2f}",
                             f"{macs / first.facts['macs']:.2f}", f"{macs / candidate.facts['tight']:.2f}",
                             f"{statistics.median(share):.0f} %", gigabytes(candidate)])
            yield (f"{model}, {amp}{', compiled' * args.compile}{what}, {batch_of(words)} images a step; "
                   f"{limit_of(limit)} (`{' '.join(words)}`)",
                   ["script", "images/s", f"step time over {first.label}", "G multiply-adds an image",
                    f"over {first.label}", "over the tight count", "of the matrix-product rate", "peak memory, GB"],
                   rows, [*candidates, limit])


def peers(args):
    """MAE beside other implementations on the same random batch, in the same precision."""
    for model in args.models:
        for amp in args.amp:
            words, plain = words_of(model, args, amp), "eager" if args.device == "cpu" and amp == "bf16" else "sdpa"
            facts = dict(macs=counted("mae", words), images=batch_of(words))
            for name in args.peers:
                candidates = [Candidate("`mae.py`", ours, "mae", words, **facts),
                              Candidate("`mae.py --compile`", ours, "mae", [*words, "--compile"], **facts)]
                for label, *how in (("default AdamW", False, False),
                                    (f"fused AdamW, {plain} attention", True, False, plain),
                                    (f"fused AdamW, {plain} attention, compiled", True, True, plain)):
                    candidates.append(Candidate(f"{name}, {label}", peer, name, words, *how, **facts))
                limit = product(args, amp)
                measure([*candidates, limit], args)
                rows = []
                for candidate in candidates:
                    images, share = rates(candidate, limit)
                    rows.append([candidate.label, spread(images), spread(over(candidate, candidates[0])),
                                 f"{statistics.median(share):.0f} %", gigabytes(candidate)])
                yield (f"{model}, {amp}, {batch_of(words)} images a step; {limit_of(limit)} (`{' '.join(words)}`)",
                       ["implementation", "images/s", "step time over `mae.py`",
                        "of the matrix-product rate, by ours' multiply-adds", "peak memory, GB"],
                       rows, [*candidates, limit])


class UsualImages(Dataset):
    """A folder's images through the transform that the public MAE code uses, as torchvision has it, on PIL images."""

    def __init__(self, folder, img_size, normalized=True):
        self.paths = [os.fsdecode(path) for path in common.load_dataset(folder, "pretrain").paths]
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            *([transforms.ToTensor(), transforms.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD)] if normalized
              else [transforms.PILToTensor()])])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with open(self.paths[index], "rb") as file:
            img = Image.open(file).convert("RGB")
        return self.transform(img), 0


def passes(turns, folder, img_size, usual):
    """A step is one pass over a folder's images (at most 1024), in batches of 64, in one process."""
    if usual:
        dataset = UsualImages(folder, img_size)
        subset = Subset(dataset, range(min(1024, len(dataset))))
        loader = lambda: DataLoader(subset, batch_size=64)
    else:
        crops = common.Crops(common.load_dataset(folder, "pretrain"), common.train_transform(img_size, (0.2, 1.0)))
        batches = common.eval_batches(min(1024, len(crops)), 64)
        loader = lambda: common.make_loader(crops, batches, 0, torch.device("cpu"))
    for _ in turns(iter(lambda: 0, 1), torch.device("cpu")):
        for _ in loader():
            pass


def loader(args):
    """Decoding, cropping, resizing and flipping in one process with one thread, up to a batch in memory."""
    for img_size in (224, 128):
        images = min(1024, len(common.load_dataset(args.loader, "pretrain")))
        one = {"OMP_NUM_THREADS": "1"}
        candidates = [Candidate(label, passes, args.loader, img_size, usual, environment=one, images=images)
                      for label, usual in (("ours: uint8 crops, resized as tensors", False),
                                           ("usual: PIL crops, ToTensor, Normalize", True))]
        measure(candidates, args)
        rows = [[c.label, spread([images / t for t in c.times], 0), spread(over(candidates[1], c)),
                 str(3 * img_size**2 * (1 if c is candidates[0] else 4))] for c in candidates]
        yield (f"{images} images to {img_size} pixels; equal crops differ by "
               f"{differences(args, img_size)}",
               ["pipeline", "images/s of one core", "times the usual", "bytes an image to the device"], rows,
               candidates)


def differences(args, img_size):
    """Between crops of equal seeds: mean absolute difference of pixels, in levels of 256."""
    usual, ours = UsualImages(args.loader, img_size, False), common.train_transform(img_size, (0.2, 1.0))
    source, means = common.load_dataset(args.loader, "pretrain"), []
    for i in range(min(1024, len(source))):
        torch.manual_seed(i)
        theirs = usual.transform(source[i][0]).float()
        torch.manual_seed(i)
        means.append((theirs - ours(source[i][0]).float()).abs().mean().item())
    return f"{statistics.mean(means):.3f} of 256 levels on average, by {max(means):.3f} in the image with the most"


def end_to_end(args):
    """MAE from a folder's images beside the same from memory, and what its log says."""
    for model in args.models:
        for amp in args.amp:
            workers = 1 if args.device == "cpu" else min(16, os.cpu_count())
            words = words_of(model, args, amp, "--data", args.end_to_end, "--num_workers", str(workers))
            facts = dict(images=batch_of(words))
            candidates = [Candidate("from memory", ours, "mae", words, **facts),
                          Candidate("from the folder", ours, "mae", words, args.end_to_end, **facts)]
            measure(candidates, args, idle=2 * workers + 2)                 # what workers had ready is gone by then
            with tempfile.TemporaryDirectory() as output:
                images = len(common.load_dataset(args.end_to_end, "pretrain"))
                (Path(output) / "images").mkdir()       # for epochs of 40 steps: workers are ahead when one begins
                for i in range(math.ceil(40 * facts["images"] / images)):
                    (Path(output) / "images" / str(i)).symlink_to(os.path.abspath(args.end_to_end))
                more = ["--epochs", "2", "--warmup_epochs", "1", "--output_dir", output,
                        "--data", str(Path(output) / "images")]
                done = subprocess.run([sys.executable, Path(__file__).parent / "mae.py", *words, *more],
                                      capture_output=True, text=True)
                if done.returncode:
                    raise InputError(done.stderr.strip().splitlines()[-1])
                logged = json.loads((Path(output) / "log.jsonl").read_text().splitlines()[1])["images_per_s"]
            bench = statistics.median(facts["images"] / t for t in candidates[1].times)
            rows = [[c.label, spread([facts["images"] / t for t in c.times]), spread(over(candidates[0], c))]
                    for c in candidates]
            rows.append(["the log of a run without the bench, second epoch", f"{logged:.2f}",
                         f"{logged / bench:.2f} of the bench's median"])
            yield (f"{model}, {amp}, {facts['images']} images a step, {workers} loader process(es)",
                   ["images", "images/s", "times the rate from memory"], rows, candidates)


def scaling(args):
    """Two processes beside two alone; then MAE's step against image size, mask ratio and model, and the cost law."""
    amp, model = args.amp[0], "vit_base"
    batch_size = args.batch_size or (64 if args.device == "cpu" else 256)
    words = words_of(model, args, amp, "--batch_size", str(batch_size))
    two = [*words[:-1], str(2 * batch_size)]
    processes = torch.cuda.device_count() if args.device == "cuda" else os.cpu_count()
    if processes >= 2:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        shared = {"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {}
        rank = lambda i: {**shared, "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                          "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
        alone = lambda i: {**shared, "LOCAL_RANK": str(i)}
        groups = [tuple(Candidate(label, ours, "mae", line, environment=environment(i), images=batch_size)
                        for i in range(2))
                  for label, line, environment in (("two processes of one run (DDP)", two, rank),
                                                   ("two runs of one process each, at once", words, alone))]
        measure(groups, args, idle=1)                   # four in memory, two with a batch
        rows = [[group[0].label, spread([2 * batch_size / t for t in group[0].times]),
                 spread(over(groups[1][0], group[0])), gigabytes(group[0])] for group in groups]
        each = "one core" if args.device == "cpu" else "one GPU"
        yield (f"{model}, {amp}, {batch_size} images a process, {each} each",
               ["", "images/s, both together", "times two runs", "peak memory of a process, GB"], rows,
               [c for group in groups for c in group])

    models = "vit_small vit_base vit_large" if args.device == "cpu" else "vit_base vit_large vit_huge"
    sweeps = {"image size": ("--img_size", "128 224 384"), "mask ratio": ("--mask_ratio", "0.5 0.75 0.85 0.9 0.95"),
              "model": ("--model", models)}
    for what, (flag, values) in sweeps.items():
        lines = [words_of(model, args, amp, flag, value) for value in values.split()]
        candidates = [Candidate(" ".join(line[-2:]), ours, "mae", line, images=batch_of(line), macs=tight("mae", line))
                      for line in lines]
        measure(candidates, args)
        base = next(c for c in candidates if c.label in ("--img_size 224", "--mask_ratio 0.75", "--model vit_base"))
        rows = [[f"`{c.label}`", spread([c.facts["images"] / t for t in c.times]), spread(over(c, base)),
                 f"{c.facts['macs'] / base.facts['macs']:.2f}", gigabytes(c)] for c in candidates]
        yield (f"{what}: {model}, {amp}, {base.facts['images']} images a step",
               ["flag", "images/s", f"step time over `{base.label}`", "multiply-adds over it (the cost law)",
                "peak memory, GB"], rows, candidates)


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
    what = next((name for name in ("peers", "loader", "end_to_end", "scaling") if getattr(args, name)), "methods")
    file = f"{'model' if args.model_only else what}_{args.device}"
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    Candidate.errors = str(output / "errors.log")
    command = " ".join(["python", "bench.py", *("DIR" if os.path.isdir(word) else word for word in sys.argv[1:])])
    text, raw = [f"`{command}`: {machine(args)}. Medians of {args.rounds} rounds, least and largest in brackets."], []
    with tempfile.TemporaryDirectory(dir=output, ignore_cleanup_errors=True) as scratch:
        os.environ["TMPDIR"] = os.path.abspath(scratch)     # where candidates and compilers write
        try:
            for title, head, rows, candidates in globals()[what](args):
                lines = [head, ["---"] * len(head), *rows]
                text.append("\n".join([title, "", *("| " + " | ".join(line) + " |" for line in lines)]))
                print("\n" + text[-1], flush=True)
                raw.append({"title": title, "candidates": [
                    {"label": c.label, **c.facts, "seconds": c.times, "memory": c.memory} for c in candidates]})
                (output / f"{file}.md").write_text("\n\n".join(text) + "\n")
                found = {"command": command, "machine": machine(args), "rounds": args.rounds, "tables": raw}
                (output / f"{file}.json").write_text(json.dumps(found, indent=1) + "\n")
        finally:
            Candidate.stop_all()


if __name__ == "__main__":
    try:
        main(get_args())
    except (InputError, ImportError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        sys.exit(2)
