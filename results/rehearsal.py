"""A rehearsal on a GPU that isn't there: the scripts' own `main` on fake tensors whose device is cuda:0.

    python results/rehearsal.py                                     # all methods, finetune.py's modes, bf16 and fp16
    python results/rehearsal.py --models vit_huge --amp bf16 --only mae finetune

Shapes, types, devices, autocast and autograd are torch's own; nothing is computed. It exits with 1 if anything fails,
a step waits for the device, a product under autocast is in float32, or a parameter gets no gradient; each run is also
resumed. It can't see numbers, speed, streams, NCCL, or what a kernel refuses when it runs. Run by hand, since it
patches what torch keeps private: Linux, g++, and torch 2.14 built for CUDA. The table of memory is for steps of two
parts (--accum_iter 2); an image is one of a part.
"""
import argparse
import collections
import contextlib
import ctypes
import gc
import importlib
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from pathlib import Path

# Autograd would ask the driver for streams. These two functions, loaded before torch's own, say there is no accelerator
SHIM = """#include <optional>
namespace c10 { enum class DeviceType : signed char; }
namespace at::accelerator { bool isAccelerator(c10::DeviceType) { return false; }
std::optional<c10::DeviceType> getAccelerator(bool) { return std::nullopt; } }"""
with tempfile.TemporaryDirectory() as folder:
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-", "-o", f"{folder}/shim.so"]
    subprocess.run(command, input=SHIM, text=True, check=True)
    ctypes.CDLL(command[-1], ctypes.RTLD_GLOBAL)

import torch                                                                            # noqa: E402
import torch.nn.functional as F                                                         # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode                    # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode                              # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map                                   # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
METHODS, MODES = ["mae", "emae", "efficient_mae", "robust_mae", "sdae"], ["finetune", "partial", "linear", "knn"]
aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_efficient_attention}
ALLOWED = ("efficient_mae.py: number = lengths.sum().item()",           # how many tokens enter the decoder
           "common.py: return torch.tensor(numbers, device=device)",    # once a run
           "finetune.py: scaler.step(optimizer)")                       # in float16: for LARS, not for AdamW


def on_gpu(x):
    return isinstance(x, torch.Tensor) and x.device.type == "cuda"


class Watch(TorchDispatchMode):
    """Notes what makes a training step wait or lose precision, by the project's line, and the memory on the device."""

    def __init__(self):
        super().__init__()
        self.notes, self.in_step, self.integer = collections.Counter(), False, 0
        self.live, self.peak, self.storages = 0, 0, weakref.WeakKeyDictionary()

    def note(self, what):
        here = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT][-1]
        place = f"{Path(here.filename).name}: {here.line}"
        on_purpose = what.endswith("float32") and here.line.endswith((".backward()", "else x).float())"))   # the head
        if self.in_step and not on_purpose and not place.startswith(ALLOWED):
            self.notes[f"{what}, line {here.lineno} of {place}"] += 1

    def read(self, x):
        """What reading a number gives: on the CPU a random choice, on the device a wait."""
        self.note("wait for a number") if on_gpu(x) else None
        if x.dtype.is_floating_point:
            return 1.0 if on_gpu(x) else random.random() * 0.33
        return True if x.dtype is torch.bool else self.integer * on_gpu(x)

    def grow(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if packet is aten._local_scalar_dense:
            return self.read(found[0])
        if packet in (aten.nonzero, aten.masked_select, aten._unique2, aten.equal) and on_gpu(found[0]):
            self.note(f"wait in {packet.__name__}")
        if packet is aten.equal:
            return True
        if packet in (aten.index, aten.index_put, aten.index_put_) and on_gpu(args[0]):
            if any(x is not None and (x.dtype is torch.bool or not on_gpu(x)) for x in args[1]):
                self.note("wait for a mask, or an index on the CPU")
        if packet in (aten._to_copy, aten.copy_):
            source, target = (args[0], kwargs.get("device")) if packet is aten._to_copy else (args[1], args[0].device)
            later = kwargs.get("non_blocking") or packet is aten.copy_ and args[2:3] == (True,)
            if target and torch.device(target).type != source.device.type:
                if not later or not on_gpu(source) and not hasattr(source, "pinned"):
                    self.note(f"blocking copy from {source.device} to {target}")
        result = func(*args, **kwargs)
        for x in filter(on_gpu, tree_leaves(result)):
            storage = x.untyped_storage()
            if storage not in self.storages:
                size = self.storages[storage] = math.ceil(storage.nbytes() / 512) * 512
                self.grow(size)
                weakref.finalize(storage, self.grow, -size)
            if packet in PRODUCTS and x.dtype == found[0].dtype == torch.float32:
                self.note(f"{packet.__name__} in float32")
        return result


def pretend(watch):
    """Makes torch say that there is a GPU, and initialise nothing."""
    signal.signal = lambda *_: None
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    for name, answer in dict(is_available=True, device_count=1, current_device=0, set_device=None, _lazy_init=None,
                             is_bf16_supported=True, manual_seed_all=None, is_initialized=True).items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.distributions.Distribution.set_default_validate_args(False)

    def tolist(x):
        value = watch.read(x)
        for size in reversed(x.shape):
            value = [value] * size
        return value

    def apply(module, function, recurse=True):      # torch's own swaps tensors, which fake ones refuse
        for child in module.modules():
            for name, x in child._parameters.items():
                child._parameters[name] = x if x is None else torch.nn.Parameter(function(x.detach()), x.requires_grad)
            child._buffers.update({name: function(x) for name, x in child._buffers.items()})
        return module

    def attention(q, k, v, attn_mask=None, dropout_p=0.0):
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        if attn_mask is None and q.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
        if attn_mask is not None:                   # as numbers, each row's memory aligned
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask.logical_not(), -math.inf)
            attn_mask = F.pad(attn_mask, (0, -k.shape[2] % 8))[..., :k.shape[2]].expand(*q.shape[:3], k.shape[2])
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p)[0]

    FakeTensor.tolist, torch.nn.Module._apply, F.scaled_dot_product_attention = tolist, apply, attention


class Source(list):
    classes = list("abcdefghij")


def rehearse(name, words, watch):
    """A script's own main: two epochs of two steps, then again from the first epoch's checkpoint."""
    runs, common, module = (importlib.import_module(each) for each in ("runs", "common", name))
    args = module.get_args([*words, "--epochs", "2", "--warmup_epochs", "1", "--device", "cuda", "--num_workers", "0"])
    size, saved, check_finite = common.pair(args.img_size or 224), [], runs.check_finite
    tokens = 1 + math.prod(n // (args.patch_size or 16) for n in size)

    def batch(images):
        watch.integer = int(0.9 * images * tokens)  # Efficient MAE's tokens in the decoder
        imgs, labels = torch.empty(images, 3, *size, dtype=torch.uint8), torch.zeros(images, dtype=torch.int64)
        imgs.pinned = labels.pinned = True
        return imgs, labels

    def make_loader(crops, batches, num_workers, device):
        if isinstance(batches, list):               # Run.once
            yield from (batch(len(items)) for items in batches)
        else:
            for part in range((batches.num_steps - batches.start_step) * args.accum_iter):
                watch.in_step = True
                watch.peak = watch.live if part == args.accum_iter else watch.peak      # the optimiser has its state
                yield batch(batches.share)

    def check(*arguments):
        watch.in_step = False                       # every 20 steps, and at an epoch's end: may wait
        check_finite(*arguments)

    def save(obj, path):
        Path(path).touch()
        states = [x for x in tree_leaves((obj["model"], obj.get("optimizer"))) if isinstance(x, torch.Tensor)]
        assert all(map(on_gpu, states)), "weights or the optimiser's state are on the CPU"
        saved.append(tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, obj))

    runs.make_loader, runs.save, runs.check_finite, common.CHUNK = make_loader, save, check, 10**9
    runs.append = runs.save_picture = lambda *_: None
    runs.Run.examples = lambda run, number=8: batch(number)[0].to(run.device)
    runs.load = lambda path: saved[0]
    module.load_dataset = lambda *_: Source(range(2 * (args.batch_size or 64)))
    module.load_labelled = lambda _: (module.load_dataset(), Source(range(256)))
    common.per_channel.cache_clear()                # of another rehearsal's tensors
    try:
        with tempfile.TemporaryDirectory() as args.output_dir:
            module.main(args)
            gc.collect()
            module.main(args)
    finally:
        runs.check_finite = check_finite


def attempt(name, words):
    """One rehearsal: its peak memory in bytes, and a list of what was wrong."""
    watch, errors = Watch(), []
    pretend(watch)
    try:
        with (FakeTensorMode(allow_non_fake_inputs=True), watch, torch.autograd.set_multithreading_enabled(False),
              contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w"))):
            rehearse(name, words, watch)
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == ROOT][-1:]
        errors = [f"{type(error).__name__}: {str(error)[:200]}"]
        errors += [f"    line {f.lineno} of {Path(f.filename).name}: {f.line}" for f in frames]
    return watch.peak, [f"{note} (× {number})" for note, number in watch.notes.items()] + errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=METHODS + MODES, help="of the methods and finetune.py's modes")
    parser.add_argument("--models", nargs="+", default=["vit_base"])
    parser.add_argument("--amp", nargs="+", default=["bf16", "fp16"])
    args, bad = parser.parse_args(), 0
    sys.path.insert(0, str(ROOT))
    print(f"torch {torch.__version__}. Peak memory on one GPU, 224 pixels: weights, gradients and optimiser; what each "
          f"image adds;\nand how many fit into 72 GB.\n\n| | | | GB | MB an image | images |\n{'|---' * 6}|")
    for model, amp, name in itertools.product(args.models, args.amp, args.only):
        words = [*["--ckpt", "none", "--mode", name] * (name in MODES), "--model", model, "--amp", amp]
        (less, wrong), (more, _) = (attempt("finetune" if name in MODES else name, [
            *words, "--accum_iter", "2", "--batch_size", str(2 * images)]) for images in (64, 192))
        image, fixed = (more - less) / 128e6, (less - (more - less) / 2) / 1e9
        fit = f"{1000 * (72 - fixed) / image:.0f}" if image > 5 else "–"
        print(f"| {model} | {amp} | {name} | {fixed:.1f} | {image:.0f} | {fit} |", *wrong, sep="\n    ", flush=True)
        bad += bool(wrong)
    print(f"\n{bad} of these had trouble" if bad else "\nall went through, and no step waits", flush=True)
    os._exit(bool(bad))             # autograd's threads were never told of an end


if __name__ == "__main__":
    main()
