"""What keeps a run alive: `Run`, and the command line that goes with it.

A script keeps what its paper is about and what trains: model, masking, loss, DDP, autocast, accumulation, the
optimiser's step. Its Run keeps the rest: processes, device, output folder, batches, checkpoints, signals, checks, log.

    run = Run(args, __file__)                               # joins torchrun's processes, takes the output folder
    run.resume(crops, model, optimizer, scaler)             # continues from OUTPUT/last.pt if it exists
    for epoch in run.epochs():
        for step in run.steps():
            for part, (imgs, labels) in enumerate(run.parts()):
                …                                           # forward and backward
                run.add(loss, **stats)
            …                                               # the optimiser's step
            run.end_step(grad_norm)                         # saves when due, and exits after a signal
        run.end_epoch(top1=…)                               # a line in the log
    run.finish()

One rule: whatever changes the model belongs in the inner loop. Its last step saves. Only then is the epoch evaluated or
drawn, and its line in the log marks it as over. A run that is cut off in between finds no steps left in that epoch when
it resumes, and repeats what follows the inner loop.
"""
import argparse
import ast
import contextlib
import gc
import hashlib
import json
import math
import multiprocessing.queues
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from tqdm import tqdm

from common import (CHUNK, ENCODER_PARTS, IMAGENET_MEAN, IMAGENET_STD, GlobalBatches, InputError, channel_statistics,
                    env_number, eval_batches, inventory, seed_from)

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None

# What may differ when a run resumes: where and how it computes, and what may save a run that diverged
MAY_CHANGE = {"data_root", "num_workers", "skip_bad", "accum_iter", "device", "compile", "demo", "amp", "clip_grad",
              "images", "show", "keep_every", "val_split", "stride"}
UNSAID = {"output_dir", "save_minutes"}     # may differ without a word


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------
def number(kind, interval):
    """An argparse type: an int or a float (`kind`) in an interval such as "[1, inf)" or "(0, 1]"."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text):
        value = kind(text)
        if low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]":
            return value
        raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
    parse.__name__ = kind.__name__      # for argparse's "invalid int value"
    return parse


def parse_args(parser, argv=None, demo=None, layout=None):
    """Adds the arguments that every run has, and parses `argv` (None: the command line). With --demo, the dict `demo`
    has the defaults. `layout` says what --data must hold (None: images; or a data set by name). Raises InputError."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="data/imagenet",
                      help=layout or "folder of images, or a data set by name (see README)")
    if layout is None:
        data.add_argument("--data_root", default="data", help="where data sets given by name are downloaded to")
    data.add_argument("--in_chans", type=number(int, "[1, 1024]"), default=3, help="channels of the images")
    data.add_argument("--mean", type=number(float, "(-inf, inf)"), nargs="+", help="of each channel, bytes / 255 "
                      "(default: ImageNet's for RGB files, else measured on 1,000 images)")
    data.add_argument("--std", type=number(float, "(0, inf)"), nargs="+", help="the same")
    data.add_argument("--show", type=number(int, "[0, 1023]"), nargs=3, default=[0, 1, 2], help="channels in pictures")
    data.add_argument("--num_workers", type=number(int, "[0, 1024]"), help="workers per process (default: its cores)")
    data.add_argument("--skip_bad", type=number(int, "[0, inf)"), default=0, help="replace at most this many bad files")

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", help="for all output (default: runs/SCRIPT, or beside --ckpt)")
    run.add_argument("--no_resume", action="store_true", help="start over even if output_dir holds a last.pt")
    run.add_argument("--save_minutes", type=number(float, "(0, inf]"), default=30,
                     help="minutes between checkpoints; also saved every epoch")
    run.add_argument("--seed", type=number(int, "[0, 4294967296)"), default=0)
    run.add_argument("--device", choices=["cuda", "mps", "cpu"], help="default: the first one available")
    run.add_argument("--amp", choices=["auto", "bf16", "fp16", "none"], default="auto",
                     help="auto: bf16 if CPU or CUDA has it, else fp16 on CUDA, else none")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--demo", action="store_true", help="small everything, on drawn images")

    def fail(message):                  # argparse would print it once per process
        raise InputError(message)
    parser.error = fail
    argv = sys.argv[1:] if argv is None else argv
    if "--demo" in argv:
        parser.set_defaults(**(demo or {}))
    args = parser.parse_args(argv)
    defaults = {name: parser.get_default(name) for name in vars(args)}          # for arguments newer than a checkpoint
    args._defaults = {**defaults, "mean": [*IMAGENET_MEAN], "std": [*IMAGENET_STD]}     # before these, all was RGB
    return args


def launch(main, get_args):
    """Runs a script as a command. Exit codes: 0; 2 for bad input; 1 for other trouble that one line can explain (a full
    disk, a run that diverges, Ctrl-C before training starts); 128 + the signal's number for a run that was stopped."""
    code, failed = 0, False
    sys.stdout.reconfigure(errors="backslashreplace")       # names of files may not fit the terminal's encoding
    try:
        main(get_args())
    except (InputError, OSError, FloatingPointError, RuntimeError, KeyboardInterrupt) as error:
        code, failed, text = 2 if isinstance(error, InputError) else 1, True, explain(error)
        if text is None:
            raise
        if os.environ.get("RANK", "0") != "0":      # an error that rank 0 meets too, it alone reports:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)                          # torchrun ends this process meanwhile
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)     # clears the bar
    except SystemExit as stop:
        code = stop.code
    # By now what main held is freed: the loader, whose threads would print tracebacks of their own, and DDP, which,
    # outliving the process group, would free it under Python's lock, where gloo's threads can wait forever
    if dist.is_initialized() and not failed:        # else others may still wait for this process
        dist.destroy_process_group()
    sys.exit(code)


def explain(error):
    """One line on an error that a user can do something about; None for what may be a fault of the code."""
    text = str(error)
    if isinstance(error, (InputError, OSError, FloatingPointError)):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if "out of memory" in text or "can't allocate memory" in text:      # of GPUs; of the CPU
        return f"out of memory: raise --accum_iter, or choose smaller sizes ({text.splitlines()[0]})"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile needs a working C++ compiler: install one, or leave it out ({text.splitlines()[0]})"
    if isinstance(error, dist.DistNetworkError) or "Connection closed by peer" in text:
        return "another process of this run has ended"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
class Run:
    """A training run of one script, alone or as one of torchrun's processes; the module's docstring shows its use.

    For the script to read: `rank`, `world_size`, `device`, `dtype` (autocast's, None for none), `output` (the folder);
    after `resume` also `step` (how many are done) and `steps_per_epoch`.
    """

    def __init__(self, args, script):
        """Joins torchrun's processes, if any, and takes the output folder. Raises InputError."""
        self.args = args
        self.method = Path(script).stem
        self._code = code_hash(*code_files(script))
        self.rank, self.world_size = check_processes()
        self.device = find_device(args.device, env_number("LOCAL_RANK", 0))
        self.dtype = amp_dtype(args.amp, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        if args.output_dir == "":
            raise InputError("--output_dir must not be empty")
        self.output = Path(args.output_dir or f"runs/{self.method}")
        if self.rank == 0:
            take(self.output)
        self._signals = Signals(self.rank, args.save_minutes)

    def channels(self, crops):
        """Mean and standard deviation of each channel, for `normalize`: as given, or else ImageNet's or measured. They
        are part of the run from then on. Raises InputError where arguments suit another number of channels."""
        args = self.args
        check_show(args.show, args.in_chans)
        for name, given in (("mean", args.mean), ("std", args.std)):
            if given and len(given) != args.in_chans:
                raise InputError(f"--{name} takes {args.in_chans} numbers, one a channel")
        if not (args.mean and args.std):
            mean, std = channel_statistics(crops)
            args.mean, args.std = args.mean or mean, args.std or std
            if mean != [*IMAGENET_MEAN]:
                mean, std = (" ".join(f"{x:g}" for x in numbers) for numbers in (args.mean, args.std))
                self.say(f"channels, measured: --mean {mean} --std {std}")
        return args.mean, args.std

    def resume(self, crops, model, optimizer, scaler, init_from=None, num_steps=None, **recipe):
        """Restores model, optimiser (made with lr=0.0) and scaler from OUTPUT/last.pt. If there is none a new run
        begins, from the weights of the checkpoint `init_from` if given. `num_steps`: how long it is, instead of
        --epochs; the last epoch may then be cut short.

        `recipe`: what else, besides the arguments and the images, makes this run what it is. Raises InputError if the
        checkpoint is broken or another run's, and if there is no room for new ones.
        """
        args, last = self.args, self.output / "last.pt"
        self._crops, self._model, self._optimizer, self._scaler = crops, model, optimizer, scaler
        epochs = 0 if num_steps else args.epochs
        batches = GlobalBatches(len(crops), args.batch_size, epochs, args.accum_iter, self.rank, self.world_size,
                                args.seed)
        self.step, self.steps_per_epoch, self._chunks = 0, batches.steps_per_epoch, batches.chunks
        self.num_steps = batches.num_steps = num_steps or batches.num_steps
        self.num_epochs = math.ceil(self.num_steps / self.steps_per_epoch)
        own = {name: value for name, value in vars(args).items() if name not in ("_defaults", "no_resume")}
        self._recipe = {**own, **recipe, "images": inventory(crops.source), "steps_per_epoch": self.steps_per_epoch}
        self._begin_epoch()

        found = last.exists() and not args.no_resume
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if self.rank == 0:      # params twice: AdamW's two moments
            check_room(self.output, sum(x.nbytes for x in (*model.state_dict().values(), *params, *params)), found)
        if found:
            self._restore(last)
        elif init_from is not None:
            self.say(load_weights(init_from, model))
        if len(set(gather((self.step, self._recipe["images"])))) > 1:
            raise InputError(f"{last} or --data differs between processes: all machines need a shared file system")
        batches.start_step = self.step

        self.epoch = self.num_epochs if self.step == self.num_steps else self.step // self.steps_per_epoch
        over = gather(tidy_output(self.output, self.step, self.epoch) if self.rank == 0 else None)[0]
        if self.step and self.step in (self.epoch * self.steps_per_epoch, self.num_steps):
            if self.epoch - 1 in over:
                self._begin_epoch()
            else:
                self.epoch -= 1         # all its steps are done, but what follows them is not
        self._nothing_left = self.epoch == self.num_epochs
        self._batches = make_loader(crops, batches, args.num_workers, self.device)
        self.say(f"{self.method}: {sum(p.numel() for p in params) / 1e6:.1f} M trained parameters, "
                 f"{len(crops)} images, {self.device.type}, amp {str(self.dtype).removeprefix('torch.')}\n"
                 f"{args.batch_size // self.world_size // args.accum_iter} images per step per process × "
                 f"{self.world_size} process(es) × {args.accum_iter} accumulated = effective batch {args.batch_size}\n"
                 f"epochs {self.epoch} to {self.num_epochs} of {self.steps_per_epoch} steps each, into {self.output}")

    def epochs(self):
        """The numbers of the epochs that are not over yet. From here on signals are heeded."""
        self._signals.install()
        size = self.args.batch_size
        self._bar = tqdm(total=self.num_steps * size, initial=self.step * size,
                         unit=" images", unit_scale=True, disable=self.rank > 0, mininterval=bar_seconds())
        self._start = time.monotonic() - self._seconds
        while self.epoch < self.num_epochs:
            epoch = self.epoch
            yield epoch
            if self.epoch == epoch:
                raise RuntimeError("every turn of run.epochs() must end with run.end_epoch(…)")

    def steps(self):
        """The numbers of this epoch's steps that are still to be done."""
        while self.step < self._epoch_end():
            step = self.step
            self._row, self._added = 0.0, 0
            yield step
            if self.step == step:
                raise RuntimeError("every turn of run.steps() must end with run.end_step(grad_norm)")

    def parts(self):
        """The --accum_iter parts of a step: this process's images, (B, C, H, W), and labels (B,), on the device.

        Torch's generators are seeded by the step, the part and the process, so that masks and dropout are the same in a
        run that was never cut off, and there is no random state to save.
        """
        for part in range(self.args.accum_iter):
            chunks = zip(*(self._to_device(next(self._batches)) for _ in range(self._chunks)))
            batch = [torch.cat(x) if torch.is_tensor(x[0]) else sum(x, []) for x in chunks]
            torch.manual_seed(seed_from(self.args.seed, self.step, part * self.world_size + self.rank))
            yield batch
            if self._added != part + 1:
                raise RuntimeError("every turn of run.parts() must call run.add(loss, …) once")

    def add(self, loss, **stats):
        """Enters a part's loss and other statistics, each a scalar tensor. The log gets their means over parts,
        processes and steps."""
        names = ["loss", *stats, "grad_norm"]
        if names != self._names:            # the first of an epoch, or the script was edited in the middle of one
            if self._names is not None:
                self.say(f"epoch {self.epoch}: other statistics than before: its means are of the steps from here on")
            self._names, self._totals, self._count = names, 0.0, 0
        self._row = self._row + torch.stack([loss, *stats.values()]).detach() / self.args.accum_iter
        self._added += 1

    def end_step(self, grad_norm):
        """Ends a step. At an epoch's end, on a signal and every --save_minutes it saves; after a signal it then exits
        with 128 + its number. Raises FloatingPointError, at most 20 steps late, if something is not finite."""
        self._lr = max(group["lr"] for group in self._optimizer.param_groups)   # under layer-wise decay: the head's
        row = torch.cat([self._row, grad_norm[None]])                       # stays on the device: no wait for it here
        self._totals = self._totals + row.nan_to_num(0.0, 0.0, 0.0)         # float16: a step that overflows is skipped
        self._count += 1
        self._window.append((self.step, self._lr, row))
        self.step += 1
        ended = self.step == self._epoch_end()
        request = self._signals.poll()
        self._bar.update(self.args.batch_size)
        if ended or request or self._count % 20 == 0:
            check_finite(self._window, self._model, self._scaler)
            self._window = []
            loss = self._totals[0].item() / self._count
            self._bar.set_postfix(epoch=self.epoch, loss=f"{loss:.4f}", lr=f"{self._lr:.2e}", refresh=False)
        if ended or request:
            self._save()
        if request > 1:
            self._stop(request)

    def examples(self, number=8):
        """A few images of epoch 0, (number, C, H, W), for a picture: the same in every epoch, and so, by the seed
        that this sets, are their masks."""
        torch.manual_seed(seed_from(self.args.seed))
        chosen = torch.randperm(len(self._crops))[:number].tolist()
        return torch.stack([self._crops[0, index][0] for index in chosen]).to(self.device)

    def end_epoch(self, picture=None, keep=None, **more):
        """Writes the epoch's line into OUTPUT/log.jsonl: the statistics' means, and `more`. With it the epoch is over.
        `picture`: rows of images (N, C, H, W), the first as they are, for OUTPUT/reconstruction.png.
        `keep`: state dicts by name, for OUTPUT/NAME-EPOCH.pt after every --keep_every epochs. Raises OSError."""
        if self.step != self._epoch_end():
            raise RuntimeError("run.end_epoch() comes after the epoch's last step: do not leave run.steps() early")
        totals = gather(self._totals.tolist())                              # (processes, statistics)
        if self.rank == 0:
            if picture is not None:
                save_picture(picture, self.output / "reconstruction.png", self.args.show)
            every = getattr(self.args, "keep_every", None)
            for name, weights in keep.items() if every and (self.epoch + 1) % every == 0 else ():
                save({"method": self.method, "model": weights, "args": self._recipe},
                     self.output / f"{name}-{self.epoch + 1:04}.pt")
            means = [sum(column) / len(totals) / self._count for column in zip(*totals)]
            line = {"epoch": self.epoch, **dict(zip(self._names, means)), **more, "lr": self._lr,
                    "seconds": self._seconds, "images_per_s": self._count * self.args.batch_size / self._seconds}
            if self.args.skip_bad:
                new = sorted(reason for reason, first in self._crops.skipped.items() if first == self.epoch)
                line.update(skipped=len(self._crops.skipped), newly_skipped=new)
            append(json.dumps(line), self.output / "log.jsonl")
        self.epoch += 1
        self._begin_epoch()

    def finish(self, encoder=None):
        """Ends the run. `encoder`: a state dict, for OUTPUT/encoder.pt."""
        self._close()
        if self._nothing_left:
            self.say(f"already finished: nothing trained. --no_resume starts over; checkpoints stay in {self.output}")
        if encoder is not None:
            if self.rank == 0:
                save({"method": self.method, "model": encoder, "args": self._recipe}, self.output / "encoder.pt")
            self.say(f"Done. Next: python finetune.py --ckpt {self.output}/encoder.pt --data {self.args.data}"
                     f"{' --demo' * self.args.demo}")

    def report(self, result):
        """Prints a result, a dict, saves it with all arguments as OUTPUT/result.json, and returns it."""
        if self.rank == 0:
            used = {name: value for name, value in vars(self.args).items() if value is not None and name[0] != "_"}
            (self.output / "result.json").write_text(json.dumps({**result, "args": used}, indent=1) + "\n")
        self.say(json.dumps(result))
        return result

    def once(self, crops, batch_size, progress=None):
        """Passes over all `crops` of epoch 0 once, in order: this process's share, in batches as from `parts`, with a
        bar named `progress`. After a signal, in whichever process, all exit."""
        batches = eval_batches(len(crops), batch_size, self.rank, self.world_size)
        loader = make_loader(crops, batches, self.args.num_workers, self.device)
        for batch in tqdm(loader, progress, len(batches), unit=" batches", mininterval=bar_seconds(),
                          disable=self.rank > 0 or progress is None):
            if self._signals.caught:
                break
            yield self._to_device(batch)
        request = max(gather(max(self._signals.caught, default=0)))
        if request:
            self._stop(request)

    def say(self, text):
        """Prints a line, from one process."""
        if self.rank == 0:
            print(text, flush=True)

    def _epoch_end(self):
        return min((self.epoch + 1) * self.steps_per_epoch, self.num_steps)

    def _to_device(self, batch):
        return [x.to(self.device, non_blocking=True) if torch.is_tensor(x) else x for x in batch]

    def _begin_epoch(self):
        self._names = None                  # of the statistics, whose sums over `_count` steps are `_totals`
        self._window = []                   # (step, learning rate, statistics) of steps that are still to be checked
        self._seconds, self._start = 0.0, time.monotonic()

    def _save(self):
        """Writes last.pt. For all processes to call."""
        self._seconds = time.monotonic() - self._start
        totals, skipped = zip(*gather((self._totals.tolist(), self._crops.skipped)))
        for theirs in skipped:
            self._crops.merge(theirs)
        if self.rank == 0:
            save({"method": self.method, "code": self._code, "args": self._recipe, "model": self._model.state_dict(),
                  "optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict(), "step": self.step,
                  "lr": self._lr, "names": self._names, "totals": totals, "count": self._count,
                  "seconds": self._seconds, "skipped": self._crops.skipped}, self.output / "last.pt")

    def _restore(self, path):
        """Takes the run's state from the checkpoint at `path`: all of it or, if anything doesn't fit, nothing. Raises
        InputError."""
        checkpoint = load(path)
        self._check_recipe(path, checkpoint)
        make_state(self._optimizer)
        groups = self._optimizer.state_dict()["param_groups"]           # rates and decay: the script's, not the file's
        with reading(path):
            model, scaler, state = checkpoint["model"], checkpoint["scaler"], checkpoint["optimizer"]["state"]
            check_alike(path, "model", model, self._model.state_dict())
            if state or not self._scaler.is_enabled():                  # float16: empty if every step has overflowed
                check_alike(path, "optimizer", state, self._optimizer.state_dict()["state"])
            state = {i: {name: x.detach().clone(memory_format=torch.contiguous_format) if torch.is_tensor(x) else x
                         for name, x in values.items()} for i, values in state.items()}     # fused kernels need that
            if scaler and self._scaler.is_enabled():                    # else --amp has changed
                check_alike(path, "scaler", scaler, self._scaler.state_dict())
            lr, seconds, count = (float(checkpoint[name]) for name in ("lr", "seconds", "count"))
            names = [str(name) for name in checkpoint["names"]]
            totals = torch.tensor(checkpoint["totals"], dtype=torch.float32).view(-1, len(names))   # (processes, …)
            totals = totals[self.rank] if len(totals) == self.world_size else totals.mean(dim=0)
            skipped = {str(reason): int(epoch) for reason, epoch in checkpoint["skipped"].items()}
            done = (checkpoint["step"] - 1) % self.steps_per_epoch + 1                      # steps of this epoch
            if not (0 <= lr < math.inf and 0 < seconds < math.inf and 0 < count <= done and totals.isfinite().all()):
                raise InputError(f"'{path}': lr {lr}, seconds {seconds}, count {count} or totals are out of range")

        self.step = checkpoint["step"]
        self._lr, self._seconds, self._count, self._names = lr, seconds, int(count), names
        self._totals = totals.to(self.device)
        self._crops.merge(skipped)
        self._model.load_state_dict(model)
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        if scaler and self._scaler.is_enabled():
            self._scaler.load_state_dict(scaler)

    def _check_recipe(self, path, checkpoint):
        """Raises InputError unless a checkpoint is this run's."""
        advice = "give another --output_dir for a new run, or --no_resume to start over"
        with reading(path):
            method, step, (python, source) = checkpoint["method"], checkpoint["step"], checkpoint["code"].split(" ")
            if method != self.method:
                raise InputError(f"{path} is a checkpoint of {method!s:.80}.py, not of {self.method}.py: {advice}")
            here = self._recipe
            defaults = {name: value for name, value in self.args._defaults.items() if name in here}
            there = {**defaults, **checkpoint["args"]}
            changed = {name: f"{name} {there.get(name, 'unknown')!s:.400} (now {here.get(name, 'unknown')!s:.400})"
                       for name in {**here, **there} if there.get(name) != here.get(name) and name not in UNSAID}
        moved = {"data"} if "(" in str(here.get("images")) and "images" not in changed else set()   # it only moved
        moved |= {"ckpt"} if here.get("encoder") and "encoder" not in changed else set()
        if changed.keys() - MAY_CHANGE - moved:
            raise InputError(f"{path} is from another run: {', '.join(changed.values())}. Restore those values to "
                             f"resume it, or {advice}")
        if type(step) is not int or not 0 < step <= self.num_steps:
            raise InputError(f"{path} is at step {step} of {self.num_steps}: {advice}")
        own_python, own_source = self._code.split(" ")
        if python == own_python and source != own_source:
            if step == self.num_steps:
                raise InputError(f"{path} is of a finished run, and the code has changed since: {advice}")
            changed["code"] = f"other code ({self.method}.py, or what it imports, has changed)"
        if changed:
            self.say(f"{path}: resuming, although it has {', '.join(changed.values())}")

    def _close(self):
        """Closes the progress bar, and the loader with its workers."""
        self._bar.close()
        self._batches.close()

    def _stop(self, code):
        self._close()
        self.say(f"stopped: saved after step {self.step}; the same command, without --no_resume, resumes there")
        sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Processes, devices, code
# ---------------------------------------------------------------------------------------------------------------------
def check_processes():
    """This process's rank and the number of processes, as torchrun says. Raises InputError."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    rank, world_size = env_number("RANK", 0), env_number("WORLD_SIZE", 1, least=1)
    if ("RANK" in os.environ or world_size > 1) and missing:
        raise InputError(f"{', '.join(missing)} not set, although RANK or WORLD_SIZE is: start several "
                         "processes with torchrun")
    if rank >= world_size:
        raise InputError(f"RANK is {rank}, which must be less than WORLD_SIZE, {world_size}")
    return rank, world_size


def find_device(kind, local_rank):
    """The device for a machine's process number `local_rank`: of a kind, or of the best there is. Raises InputError if
    there are too few."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": math.inf}
    kind = kind or next(kind for kind, number in there.items() if number)
    if local_rank >= there[kind]:
        raise InputError(f"no {kind} device for process {local_rank} of this machine, which has {there[kind]}")
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)


def amp_dtype(choice, device):
    """The autocast type for `--amp`, None for none. "auto" asks for bf16 in hardware, not emulated; on MPS: none."""
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif choice == "auto":
        old = not hasattr(torch.cpu, "get_capabilities")                # before torch 2.11
        has = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()} if old else torch.cpu.get_capabilities()
        in_hardware = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))    # bf16: ARM's
        choice = "bf16" if device.type == "cpu" and in_hardware else "none"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[choice]


def code_files(script):
    """The script, and what it imports from the folder of this file, without this file itself."""
    tree, folder = ast.parse(Path(script).read_bytes()), Path(__file__).parent
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} - {"runs"}
    return [script, *sorted(folder / f"{name}.py" for name in names if (folder / f"{name}.py").exists())]


def code_hash(*paths):
    """Python's minor version, whose syntax trees differ from another's, and a hash of what the files' code does:
    comments, blank lines and docstrings don't count."""
    digest = hashlib.sha256()
    for path in paths:
        tree = ast.parse(Path(path).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return f"{sys.version_info.major}.{sys.version_info.minor} {digest.hexdigest()[:16]}"


def gather(obj):
    """The list of all processes' `obj`, on every process."""
    objs = [obj] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(objs, obj)
    return objs


def check_finite(window, model, scaler):
    """Raises FloatingPointError if a loss, a gradient norm or a weight is not finite.

    `window` holds (step, learning rate, statistics) of the last steps, of which the first is the loss and the last the
    gradient norm; reading them is the one wait for the device. In float16 gradients may overflow: the scaler then skips
    the step and halves its scale, but below 1 something else is wrong.
    """
    steps, rates, rows = zip(*window)
    rows = torch.stack(rows).tolist()
    weights = nn.utils.get_total_norm([x for x in model.state_dict().values() if x.is_floating_point()]).item()
    may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1
    for step, lr, (loss, *_, norm) in zip(steps, rates, rows):
        fine = math.isfinite(loss) and (math.isfinite(norm) or may_overflow)
        if not fine or step == steps[-1] and not math.isfinite(weights):
            raise FloatingPointError(
                f"not finite in step {step + 1}: loss {loss:g}, gradient norm {norm:g}, learning rate {lr:g}, norm of "
                f"the weights by now {weights:g}. The last checkpoint, if any, is from before. Resume with --amp none "
                "or a smaller --clip_grad, or start over with a lower rate")


def bar_seconds():
    """Between two updates of a progress bar: a log file needs few."""
    return 1 if sys.stderr.isatty() else 30


# ---------------------------------------------------------------------------------------------------------------------
# The output folder
# ---------------------------------------------------------------------------------------------------------------------
def take(folder, seconds=15):
    """Makes a folder and locks it for this process, until that ends: two runs would spoil each other's checkpoints.
    Raises InputError if nothing can be written to it, and if another run keeps it for `seconds` more: one that was
    told to stop may still be saving."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)   # never closed: that unlocks
    except OSError as error:
        raise InputError(f"cannot write into --output_dir {folder}: {error.strerror}") from error
    until = time.monotonic() + seconds
    while not lock(descriptor):
        if time.monotonic() > until:
            raise InputError(f"another run is writing into --output_dir {folder}: stop it, or give another folder")
        time.sleep(0.1)
    for name in ("last.pt.tmp", "encoder.pt.tmp"):      # of a run that was killed while saving
        (folder / name).unlink(missing_ok=True)


def lock(descriptor):
    """Whether this process alone has a file from now on; true also where there are no locks."""
    try:
        if fcntl:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)          # not flock, which workers would inherit
    except (BlockingIOError, PermissionError):
        return False
    except OSError:     # a file system without locks
        pass
    return True


def check_room(folder, size, resumed):
    """Raises InputError if a checkpoint of `size` bytes has no room beside the last one."""
    free, room = shutil.disk_usage(folder).free / 1e9, size / 1e9 * (1 if resumed else 2)
    if free < room:
        raise InputError(f"--output_dir {folder} has {free:.3g} GB free, and this run needs {room:.3g} for checkpoints")


def tidy_output(output, step, epochs):
    """Prepares the folder for a run that resumes at `step`, with `epochs` done: the log keeps its whole lines on those,
    and their numbers are returned. For a new run, an old one's files get a time in their name. Raises InputError."""
    log = output / "log.jsonl"
    if step == 0:
        while [*output.glob(f"*.{(stamp := time.strftime('%Y%m%d-%H%M%S'))}.*")]:    # another began this second
            time.sleep(0.1)
        kept = output.glob("*-[0-9][0-9][0-9][0-9].pt")                              # --keep_every's
        for path in (log, *kept, *(output / name for name in ("encoder.pt", "result.json", "last.pt"))):
            if path.exists():
                os.replace(path, path.with_suffix(f".{stamp}{path.suffix}"))
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    try:
        numbers = [json.loads(line)["epoch"] if line.endswith("\n") else epochs for line in lines]
        whole = {number: line for number, line in zip(numbers, lines) if number < epochs}
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{log} holds a line that no run wrote: remove it to resume") from error
    if lines:
        with open(output / "log.tmp", "w") as file:
            file.writelines(whole.values())
            file.flush()
            os.fsync(file.fileno())
        os.replace(output / "log.tmp", log)
    return set(whole)


def append(line, path):
    """Adds a line to a text file, and fsyncs it."""
    with open(path, "a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_show(show, in_chans):
    """Raises InputError where images lack a channel to be shown."""
    if max(show) >= in_chans >= 3:
        raise InputError(f"--show {' '.join(map(str, show))}: images have the channels 0 to {in_chans - 1}")


def to_rgb(imgs, originals, show):
    """Images (N, C, H, W) as (N, 3, H, W): the channels `show`, or the first as grey; bytes are RGB already. Where the
    originals' values leave [0, 1], their 1st to 99th percentile is shown."""
    channels = originals.shape[1]
    if imgs.dtype == torch.uint8:
        return imgs / 255
    if originals.min() < -1e-3 or originals.max() > 1.001:                                      # no bytes
        low, high = torch.from_numpy(np.quantile(originals, [0.01, 0.99], axis=(0, 2, 3), keepdims=True)).float()
        imgs = (imgs - low) / (high - low).clamp(min=1e-12)
    return imgs[:, [*show] if channels >= 3 else [0, 0, 0]]


def save_picture(rows, path, show=(0, 1, 2)):
    """One PNG: a row of the grid for each of `rows`, images as for `to_rgb`, the first the originals."""
    rows = [row.cpu() if row.dtype == torch.uint8 else row.float().cpu() for row in rows]
    imgs = torch.cat([to_rgb(row, rows[0], show) for row in rows]).clamp(0, 1)
    save_image(F.interpolate(imgs, scale_factor=max(1, 96 // imgs.shape[-1])), path, nrow=len(rows[0]), padding=2)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------
def save(obj, path):
    """Saves beside `path`, fsyncs, and moves it there: a write that fails or is cut off costs nothing. Raises
    OSError."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:    # RuntimeError: torch's word for a full disk
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.tmp")
        reason = getattr(error, "strerror", None) or f"is the disk full? {str(error).splitlines()[0]}"
        older = "; the one before is still whole" if os.path.exists(path) else ""
        raise OSError(f"{path} could not be written ({reason}){older}") from error


@contextlib.contextmanager
def reading(path):
    """Turns any exception that a file's contents cause into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:      # which, depends on what is wrong
        reason = (str(error).splitlines() or [""])[0]
        if type(error).__name__ == "UnpicklingError":       # torch's text advises running the file's code
            reason = "it is cut short, or holds more than tensors and plain containers"
        raise InputError(f"'{path}' cannot be used as a checkpoint ({type(error).__name__}: {reason})") from error


def load(path):
    """Reads a checkpoint, a dict: tensors, plain containers and argparse.Namespace; what would run code is refused, and
    so is a file with a flipped bit. Raises InputError."""
    if not os.path.isfile(path):        # reading a pipe, say, would hang
        raise InputError(f"no checkpoint at '{path}'")
    with reading(path), torch.serialization.safe_globals([argparse.Namespace]):
        if zipfile.is_zipfile(path):    # torch saved no zips before 2020
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged:
                raise InputError(f"'{path}' is damaged: checksum mismatch in {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise InputError(f"'{path}' holds no dict, but {type(checkpoint).__name__}")
        return checkpoint


def load_weights(path, model):
    """Starts a model from a checkpoint's weights: all that have its names, at least a whole encoder. The positions are
    fixed and the model's own, so the image size may differ; with another number of channels all is taken but what they
    shape, such as the patch embedding. Returns a line that says what was taken. Raises InputError if the encoder isn't
    whole, and if a shape or type differs."""
    checkpoint = load(path)
    with reading(path):
        weights = checkpoint.get("model", checkpoint)
        own = {name: value for name, value in model.state_dict().items() if "pos_embed" not in name}
        theirs = weights["patch_embed.proj.weight"].shape[1]
        if theirs != model.in_chans:        # what channels shape is left out, and nothing else
            own = {name: value for name, value in own.items()
                   if name not in weights or weights[name].numel() * model.in_chans != value.numel() * theirs}
        taken = {name: weights[name] for name in own if name in weights}
        needed = {name: own[name] for name in own if name in weights or name.startswith(ENCODER_PARTS)}
        check_alike(path, "model", taken, needed, any_float=True)
    model.load_state_dict(taken, strict=False)
    return (f"weights from {path}: {len(taken)} tensors; {len(own) - len(taken)} that it lacks start anew, "
            f"{len(weights) - len(taken)} that it has are not taken (fixed positions, say)")


def check_alike(path, name, there, here, any_float=False):
    """Raises InputError unless the tree `there`, from a file, can take the place of the tree `here`, freshly made: the
    same keys, tensors of the same shape, type and layout, all numbers finite, and else values of the same type. With
    `any_float` floats may be of another precision."""
    def describe(value):
        if not torch.is_tensor(value):
            return type(value).__name__
        any_dtype = any_float and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        return f"{'float' if any_dtype else value.dtype} {value.layout} {list(value.shape)}".replace("torch.", "")

    there, here = dict(leaves(there, name)), dict(leaves(here, name))
    for place in {**here, **there}:
        expected = describe(here[place]) if place in here else "nothing"
        found = describe(there[place]) if place in there else "nothing"
        if found != expected:
            raise InputError(f"'{path}': {place}: expected {expected}, found {found}")
        value = there[place] if torch.is_tensor(there[place]) else torch.tensor(0)
        if value.is_meta or not value.isfinite().all():
            raise InputError(f"'{path}': {place} is not finite: did that run diverge?")


def leaves(tree, place):
    """Places and values of all that a tree of dicts, lists and tuples holds, such as ("optimizer[0]['step']", …)."""
    if isinstance(tree, (dict, list, tuple)) and tree:      # an empty one is a leaf, and so is compared
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{place}[{key!r}]")
    else:
        yield place, tree


def make_state(optimizer):
    """Gives an optimiser the state that it has after its first step. With zero gradients and rate 0, nothing moves."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Signals, and the loader's workers
# ---------------------------------------------------------------------------------------------------------------------
class Signals:
    """Says after each step whether to save: on SIGTERM and SIGUSR1 (preemption), SIGINT (Ctrl-C) and SIGHUP (a terminal
    that closes; not under nohup), when torchrun's agent is gone, and every `minutes`.

    All processes get the same answer, what one of them wished for a step earlier: it travels, between CPUs, while the
    next step computes, and nobody waits. A second Ctrl-C ends the process at once, but not under torchrun, which may
    send one twice.
    """

    def __init__(self, rank, minutes):
        self.rank, self.seconds, self.caught = rank, 60 * minutes, []
        self.due = math.inf
        self.answer, self.travelling = torch.tensor(0), None
        self.agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def install(self):
        """From now on signals are noted, and the minutes run."""
        self.due = time.monotonic() + self.seconds
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)        # Windows has the first two
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self.note)

    def note(self, number, frame):
        self.caught.append(128 + number)
        if self.rank == 0:
            with contextlib.suppress(OSError):      # the terminal may be gone; not print(), which it may interrupt
                os.write(2, f"\n{signal.Signals(number).name}: saving after this step\n".encode())
        if number == signal.SIGINT and "RANK" not in os.environ:
            signal.signal(number, signal.SIG_DFL)

    def poll(self):
        """0: go on; 1: save; more: save and exit with this code. For all processes to call after every step."""
        wish = max(self.caught, default=0)
        if self.agent and os.getppid() != self.agent:       # killed: nobody could stop or restart this run any more
            wish = max(wish, 128 + signal.SIGTERM)
        if self.rank == 0 and time.monotonic() > self.due:
            wish, self.due = max(wish, 1), time.monotonic() + self.seconds
        if not dist.is_initialized():
            return wish
        if self.travelling:
            self.travelling.wait()
        agreed, self.answer = self.answer.item(), torch.tensor(wish)
        self.travelling = dist.all_reduce(self.answer, dist.ReduceOp.MAX, async_op=True)
        return agreed


def make_loader(crops, batches, num_workers, device):
    """Iterates once over (imgs (B, C, H, W), labels (B,)), for `batches` of (epoch, index).

    What can't be read is entered into `crops.skipped` when its batch comes up, so that it doesn't depend on how far
    ahead workers are. Raises InputError if there is more than may be skipped. `num_workers` None: this process's share
    of the cores.
    """
    processes = env_number("LOCAL_WORLD_SIZE", 1, least=1)
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_workers = cores // processes
    ahead = math.ceil(getattr(batches, "chunks", 1) / num_workers) + 1 if num_workers else None     # a part of a step
    if num_workers and os.path.isdir("/dev/shm"):       # in a container it may be small
        room = shutil.disk_usage("/dev/shm").free / 2 / processes
        size = max(map(len, batches), default=1) if isinstance(batches, list) else min(CHUNK, batches.share)
        most = max(1, int(room / (size * crops[0, 0][0].nbytes)) - 1)
        if num_workers * ahead > most:
            num_workers, ahead = min(num_workers, most), max(1, most // num_workers)
            print(f"/dev/shm has little room: {num_workers} workers, which load {ahead} × {size} images ahead")
    context = "fork" if num_workers and sys.platform == "linux" else None   # a fork server would not outlive a signal
    loader = iter(DataLoader(crops, batch_sampler=batches, num_workers=num_workers, collate_fn=crops.collate,
                             pin_memory=device.type == "cuda", worker_init_fn=leave_signals_alone,
                             multiprocessing_context=context, prefetch_factor=ahead))
    if num_workers and hasattr(signal, "SIGCHLD"):      # else torch raises a worker's death in the midst of anything;
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # next() asks for it as well, every 5 s that it waits
    while True:
        try:
            *batch, news = next(loader)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error) and "shared memory" not in str(error):
                raise
            raise OSError("a loader process died, or found no room in /dev/shm: give a container more (docker run "
                          "--shm-size=8g, or --ipc=host), lower --num_workers, or raise --accum_iter "
                          f"({str(error).splitlines()[-1]})") from error
        for reason in news.keys() - crops.skipped.keys():
            tqdm.write(f"skipped: {reason}", file=sys.stderr)
        crops.merge(news)
        yield batch


def leave_signals_alone(worker):
    """In a loader's worker: signals, which are often sent to all processes of a job, are left to the main process,
    which needs its workers until it has saved. Its own SIGTERM ends them."""
    gc.freeze()     # a collection would touch, and so copy, all that is shared with the main process
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(cannot_hand_over)
    for name in {"SIGINT", "SIGHUP", "SIGUSR1"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):      # else (macOS) a SIGTERM to all processes ends workers
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        sockets = multiprocessing.util.get_temp_dir()       # now: later, two threads could make one each
        threading.Thread(target=exit_with, args=[os.getppid(), sockets], daemon=True).start()


def cannot_hand_over(error, batch):
    """Ends a worker that has no room for a batch, or no socket. Otherwise it would go on, and the run wait for ever."""
    os.write(2, f"a loader process can't hand over a batch: {error} (TMPDIR is {tempfile.gettempdir()})\n".encode())
    os._exit(1)


def exit_with(parent, sockets):
    """Waits for a SIGTERM from the process `parent`, and exits. The folder `sockets` goes: _exit would leave it."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    shutil.rmtree(sockets, ignore_errors=True)
    os._exit(0)
