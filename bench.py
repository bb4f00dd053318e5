"""Speed of the scripts, compared with other implementations.

    python bench.py                     # every method: images/s of a training step, memory, multiply-adds
    python bench.py --methods mae "efficient_mae --beta inf"            # some of them, also with flags of their own
    python bench.py --methods mae --mask_ratio 0 0.25 0.5 0.75          # each at several mask ratios; 0: encoder alone
    python bench.py --sdae_teachers     # MAE and SdAE's four teacher inputs (its Table 1)
    python bench.py --peers             # MAE beside transformers', lightly's and timm's (pip install them first)
    python bench.py --loader DIR        # decoding and augmentation of a folder's photographs, per core

Candidates are interleaved within one run: each lives in a process of its own, trains for some steps when it is its
turn, and waits for the rest. Figures are medians over the rounds, ratios the median of each round's ratio, with the
least and the largest in brackets. Ours run the script's own `main` on a random batch in memory; a step includes the
gradient's norm and, every 20th, the check for finite values. Into --output_dir go a table (.md), the raw times (.json)
and what candidates print (errors.log).
"""
import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import common
import mae
import runs
from common import InputError, normalize, pair
from results.multiply_adds import counted, tight
from results.peers import PEERS, UsualImages
from runs import amp_dtype, launch, number

# A method's script is one that has these three functions
METHODS = sorted((path.stem for path in Path(__file__).parent.glob("*.py")
                  if all(f"\ndef {name}(" in path.read_text() for name in ("method_args", "build_model", "main"))),
                 key=lambda name: (name != "mae", name))
SETTINGS = {  # flags of the scripts; images a step on a CPU (in float32 half of them, for its memory), on a GPU
    "vit_tiny": ("--img_size 32 --patch_size 4 --decoder_embed_dim 192 --decoder_depth 4 --decoder_num_heads 3",
                 128, 4096),
    "vit_base": ("", 16, 256),
    "vit_large": ("", 8, 128),
    "vit_huge": ("", 4, 32),
}
ENCODER_ALONE = ["mae", "--mask_ratio", "0"]
SAME_FOR_ALL = {"--model", "--img_size", "--patch_size", "--batch_size", "--accum_iter", "--amp", "--device",
                "--compile", "--demo"}          # flags of the scripts that a row may not have


def get_args(argv=None):
    """Parses the command line. Raises InputError."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--peers", nargs="*", choices=PEERS, help="MAE beside theirs")
    what.add_argument("--loader", metavar="DIR", help="images/s of one core, from files to uint8 crops")
    what.add_argument("--sdae_teachers", action="store_true", help="MAE, and SdAE with each --teacher_input")
    what.add_argument("--mask_ratio", nargs="+", type=number(float, "[0, 1)"),
                      help="each of --methods at these; 0: MAE's encoder alone (Efficient MAE's Table 1)")
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != "mae_ablations"],
                        help=f"{', '.join(METHODS)}; quote a name to add flags")
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
    gpu = torch.cuda.is_available() if args.device is None else args.device == "cuda"
    gpu = gpu and not args.loader           # which runs on CPUs alone
    args.device = runs.find_device("cuda" if gpu else "cpu", 0).type
    args.models = args.models or (["vit_base", "vit_large", "vit_huge"] if gpu else ["vit_tiny", "vit_base"])
    args.amp = args.amp or (["bf16"] if gpu else ["bf16", "none"])
    args.peers = list(PEERS) if args.peers == [] else args.peers
    for name in args.peers or []:
        if not importlib.util.find_spec(name):
            raise InputError(f"{name} is not installed: pip install it, or name other libraries after --peers")
    if (args.compile or args.model_only) and (args.peers or args.loader):
        raise InputError("--compile and --model_only are for the scripts' tables (--peers shows ours both ways)")
    if args.methods[0].split()[:1] != ["mae"]:
        raise InputError("--methods must begin with mae, the others' yardstick")
    for name, *flags in (line or [""] for line in lines(args)):
        if name not in METHODS:
            raise InputError(f"--methods: '{name}' is none of {', '.join(METHODS)}")
        fixed = SAME_FOR_ALL & {flag.split("=")[0] for flag in flags}
        if fixed:
            raise InputError(f"--methods: {min(fixed)} must be the same for all rows")
        try:
            importlib.import_module(name).get_args([] if [name, *flags] == ENCODER_ALONE else flags)
        except InputError as error:
            raise InputError(f"{name}.py: {error}") from error
    if args.loader and not os.path.isdir(args.loader):
        raise InputError(f"no folder '{args.loader}': give one with photographs")
    return args


def lines(args):
    """What the scripts' tables compare: for each line, a script's name and its flags."""
    if args.sdae_teachers:
        return [["mae"], *(["sdae", "--teacher_input", teacher] for teacher in ("full", "masked", "crop", "folds"))]
    lines = [text.split() for text in args.methods]
    if args.mask_ratio:
        lines = [[*line, "--mask_ratio", f"{ratio:g}"] for ratio in args.mask_ratio for line in lines]
    return lines


class EncoderAlone(common.ViT):
    """The encoder that mae.py's arguments describe, on all patches; the loss only gives it something to do."""

    def __init__(self, args):
        super().__init__(**dict(common.VIT_SIZES[args.model], img_size=args.img_size, patch_size=args.patch_size))

    def forward(self, imgs, noise=None):
        return self.forward_features(imgs).mean(), {}


class Candidate:
    """A process that runs `function(turns, *arguments)`: it trains for some steps when it is told to, and waits for the
    next turn. `times` collects seconds a step, `facts` is what else is known of it, `memory` the most it has held."""
    alive, errors = [], os.devnull

    def __init__(self, label, function, *arguments, threads=None, **facts):
        context = multiprocessing.get_context("spawn")
        self.label, self.facts, self.times, self.memory = label, facts, [], None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=in_its_process,       # no daemon: those may not start processes
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
        self.memory = answer[1]
        return answer[0]

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
        function(functools.partial(turns, pipe), *arguments)
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
        torch.cuda.empty_cache() if cuda else None      # the next one's turn


def from_memory(batch_size, img_size, device):
    """The same random batch without end: imgs uint8 (N, 3, H, W), labels."""
    imgs = torch.randint(256, (batch_size, 3, *pair(img_size)), dtype=torch.uint8, pin_memory=device.type == "cuda")
    while True:
        yield imgs, torch.zeros(batch_size, dtype=torch.int64)


def ours(turns, name, words, build=None):
    """A script's own main on images from memory; whatever passes over all images first (Run.once) gets one batch.
    `build` (args) makes another model than the script's."""
    module = importlib.import_module(name)
    module.build_model = build or module.build_model
    args = module.get_args([*words, "--save_minutes", "inf"])

    def make_loader(crops, batches, num_workers, device):
        whole = from_memory(args.batch_size, args.img_size, device)
        if not hasattr(batches, "chunks"):
            return iter([next(whole)])
        return (chunk for batch in turns(whole, device) for chunk in zip(*(x.split(common.CHUNK) for x in batch)))

    runs.make_loader, runs.eval_batches = make_loader, lambda *_: [0]
    module.load_dataset = lambda *_: range(10**6 * args.batch_size)     # its length is all that is asked
    with tempfile.TemporaryDirectory() as args.output_dir:
        module.main(args)


def training(args):
    """Device and autocast type of a script's arguments. GPUs multiply float32 in TF32, as in `Run`."""
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    return device, amp_dtype(args.amp, device)


def forward_backward(turns, name, words, build=None):
    """A script's model alone: no optimiser, no gradient's norm, nothing else of its main."""
    module = importlib.import_module(name)
    args = module.get_args(words)
    device, dtype = training(args)
    model = (build or module.build_model)(args).to(device).train()
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


def measure(candidates, args):
    """Fills each candidate's `times`, seconds a step in each round."""
    idle, steps = 2 * (args.device == "cuda"), []       # a turn's untimed first steps reallocate memory
    for candidate in tqdm(candidates, "warming up", leave=False):
        seconds = candidate.turn(10 * idle or 2, 5 if idle else 1)      # the first compile, and fill caches
        steps.append((candidate, max(1, idle, round(args.seconds / seconds))))
    for _ in tqdm(range(args.rounds), "rounds", leave=False):
        for candidate, count in steps:
            candidate.times.append(candidate.turn(idle, count))
        steps = steps[1:] + steps[:1]                   # another one begins the next round
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
            usual, size = (on_gpu, 8192) if args.device == "cuda" else (on_cpu // (2 if amp == "none" else 1), 2048)
            images = args.batch_size or usual
            words = f"--model {model} {flags} --batch_size {images} --amp {amp} --device {args.device}".split()
            yield f"{model}, {amp}", words, images, Candidate("matrix product", matrix_product, size, words,
                                                              macs=size**3, images=1)


def title_of(name, images, limit, words):
    rate = limit.facts["macs"] / statistics.median(limit.times) / 1e12
    return f"{name}, {images} images a step; matrix products: {rate:.3f} T multiply-adds/s (`{' '.join(words)}`)"


def methods(args):
    """The scripts' training steps, or their models' forward and backward alone."""
    function, what = (forward_backward, ", forward and backward") if args.model_only else (ours, "")
    for setting, words, images, limit in settings(args):
        words, candidates = words + ["--compile"] * args.compile, []
        for name, *flags in lines(args):
            label, build = f"`{' '.join([f'{name}.py', *flags])}`", None
            if [name, *flags] == ENCODER_ALONE:
                flags, build = [], EncoderAlone
            candidates.append(Candidate(label, function, name, words + flags, build, images=images,
                                        macs=counted(name, words + flags, build=build),
                                        tight=None if build else tight(name, words + flags)))
        measure([*candidates, limit], args)
        rows, first = [], candidates[0]
        for candidate in candidates:
            label, speed, ratio, share, memory = row_of(candidate, first, limit)
            macs, least = candidate.facts["macs"], candidate.facts["tight"]
            rows.append([label, speed, ratio, f"{macs / 1e9:.2f}", f"{macs / first.facts['macs']:.2f}",
                         "–" if least is None else f"{macs / least:.2f}", share, memory])
        yield (title_of(f"{setting}{', compiled' * args.compile}{what}", images, limit, words),
               ["script", "images/s", f"step time over {first.label}", "G multiply-adds an image",
                f"over {first.label}", "over the tight count", "of the matrix-product rate", "peak memory, GB"],
               rows, [*candidates, limit])


def peers(args):
    """MAE beside another implementation on the same random batch, in the same precision; a table for each."""
    for name, (setting, words, images, limit) in ((name, one) for name in args.peers for one in settings(args)):
        plain = "eager" if args.device == "cpu" and setting.endswith("bf16") else "sdpa"        # the faster one
        facts, tuned = dict(images=images, macs=counted("mae", words)), f"{name}, fused AdamW, {plain} attention"
        candidates = [Candidate("`mae.py`", ours, "mae", words, **facts),
                      Candidate("`mae.py --compile`", ours, "mae", [*words, "--compile"], **facts),
                      Candidate(f"{name}, default AdamW", peer, name, words, False, False, **facts),
                      Candidate(tuned, peer, name, words, True, False, plain, **facts),
                      Candidate(f"{tuned}, compiled", peer, name, words, True, True, plain, **facts)]
        measure([*candidates, limit], args)
        yield (title_of(setting, images, limit, words),
               ["implementation", "images/s", "step time over `mae.py`",
                "of the matrix-product rate, counting our multiply-adds", "peak memory, GB"],
               [row_of(candidate, candidates[0], limit) for candidate in candidates], [*candidates, limit])


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
    head = ["pipeline", "images/s of one core", "times the usual", "bytes an image to the device"]
    for img_size in (224, 128):
        candidates = [Candidate(label, passes, args.loader, img_size, usual, threads=1, images=images)
                      for label, usual in (("ours: uint8 crops, resized as tensors", False),
                                           ("usual: PIL crops, ToTensor, Normalize", True))]
        measure(candidates, args)
        rows = [[c.label, spread([images / t for t in c.times], 0), spread(over(candidates[1], c)),
                 str(3 * img_size**2 * (1 if c is candidates[0] else 4))] for c in candidates]
        yield f"{images} images to {img_size} pixels", head, rows, candidates


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
    names = ("peers", "loader", "sdae_teachers", "mask_ratio", "model_only")
    what = next((name for name in names if getattr(args, name)), "methods")
    function = {"peers": peers, "loader": loader}.get(what, methods)
    output, what = Path(args.output_dir), f"{what.removesuffix('_only')}_{args.device}"
    output.mkdir(parents=True, exist_ok=True)
    Candidate.errors = str(output / "errors.log")
    command = shlex.join(["python", "bench.py", *("DIR" if word == args.loader else word for word in sys.argv[1:])])
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
