"""Long trials of what runs do in trouble, by hand, on Linux; test_runs.py has the short ones.

    python results/robustness/trials.py kills 30 --seed 1          # SIGKILL at random moments, all six programs
    python results/robustness/trials.py mutations 300 --seed 1     # checkpoints that are not as they should be
    python results/robustness/trials.py memory                     # the host's, over 960 steps

kills: each run is started again with the same command until it ends, and is then compared with one left alone: weights,
optimiser, log (but for times), picture and encoder, to the bit.
mutations: a checkpoint is mutated at random, wherever that may be, and given to all four ways in. It must be refused in
one line (InputError), or give what the right one gives, or what has changed is said. No traceback, crash or hang over
10 s.
Exit code 1 if something is not as it should be.
"""
import argparse
import collections
import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from conftest import ROOT, photo, small_args
from test_runs import cut_off, digest, log_of, processes_of, read, state_of, train, tune_args, until

import torch

import finetune
import visualize
from common import IMAGENET_MEAN, IMAGENET_STD, InputError, pair

WORK = Path(tempfile.mkdtemp())
# processes, loader workers a process, further arguments
SETUPS = {"mae": (1, 2, ["--clip_grad", "1"]), "emae": (2, 0, []), "efficient_mae": (1, 1, ["--accum_iter", "2"]),
          "robust_mae": (1, 0, ["--mid_ratio", "0.25", "--mid_depth", "1"]), "sdae": (2, 1, []), "finetune": (1, 1, [])}
wrong = []


def say(*words):
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def expect(right, what):
    if not right:
        wrong.append(what)
        say("WRONG:", what)


def make_images():
    for i in range(272):
        path = WORK / "images" / ("train" if i < 240 else "val") / f"class {i % 4}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(path)
    (WORK / "images/train/class 0/broken.png").write_bytes(b"no image")


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------
def start(name, output, *more):
    """A command, its first process and what it prints, into a file."""
    processes, workers, own = SETUPS[name]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    words = (tune_args if name == "finetune" else small_args)(
        WORK / "images", output, "--batch_size", "24", "--epochs", "12", "--num_workers", workers, "--skip_bad", "1",
        "--save_minutes", "0.003", *own, *more)
    with open(output.with_suffix(".txt"), "w") as said:
        return subprocess.Popen([sys.executable, *torchrun, f"{name}.py", *words], cwd=ROOT, stdout=said, stderr=said,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def finish(name, output):
    code = start(name, output).wait()
    expect(code == 0, f"{name} ended with {code}: {output.with_suffix('.txt').read_text()[-500:]}")


def kills(number, chance):
    for i, name in enumerate(SETUPS):
        whole, output, begin, mine = WORK / f"{name}_whole", WORK / f"{name}_killed", time.time(), 0
        finish(name, whole)
        steps, seconds = state_of(whole)["step"], time.time() - begin
        say(f"{name}: left alone {steps} steps, {seconds:.0f} s")
        while mine < number // len(SETUPS) + (i < number % len(SETUPS)):
            run, delay = start(name, output), chance.uniform(0.3, 1) * seconds
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(delay)
                output = WORK / f"{name}_killed_{mine}"         # it has ended: compared below, and once more
                expect(state_of(WORK / f"{name}_killed") == state_of(whole), f"{name} differs")
                continue
            there = processes_of(str(output)) or [run.pid]
            victims = [chance.choice(there)] if chance.random() < 0.3 else there
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            run.wait()
            until(lambda: not processes_of(str(output)), lambda: f"{name}: processes are left behind")
            step = read(output)["step"] if (output / "last.pt").exists() else 0
            saving = ", while saving" * any(output.glob("*.tmp"))
            mine += 1
            say(f"  kill {mine}: {'one of its' if len(victims) < len(there) else 'all'} {len(there)} processes after "
                f"{delay:.1f} s; at step {step}{' (mid-epoch)' * (step % 10 > 0)}{saving}")
        finish(name, output)
        same = {key: value == state_of(whole)[key] for key, value in state_of(output).items()}
        expect(all(same.values()) and not list(output.glob("*.tmp")), f"{name}: {same}")
        say(f"{name}: {mine} kills, went on to the end: {'equal' if all(same.values()) else 'DIFFERENT'}")


# ---------------------------------------------------------------------------------------------------------------------
# Mutations
# ---------------------------------------------------------------------------------------------------------------------
NAN, INF = float("nan"), float("inf")
VALUES = [None, True, False, -5, 0, 2.5, 10**6, 1e300, NAN, INF, "x", "", [], [1, 2], {}, {"x": 1}, (3,),
          torch.zeros(3), argparse.Namespace(x=1), b"x"]
KEYS = ["x", "blocks.a.x", "blocks.99.x", 0, -1, 10**20, 2.5, True, None, ("a", 1)]
TYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64]
TENSORS = {
    "sparse": lambda x: x.to_sparse(), "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "meta": lambda x: x.to("meta"), "giant": lambda x: torch.zeros(1).expand(10**12),
    "expanded": lambda x: x.flatten()[0].clone().expand(2, *x.shape), "rank": lambda x: x[..., None],
    "cut": lambda x: x.flatten()[:-1], "longer": lambda x: torch.cat([x.flatten(), x.flatten()]),
    "strides": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x,
    "parameter": torch.nn.Parameter, "list": lambda x: x.tolist(), "number": lambda x: 1.0,
    **{str(kind): lambda x, kind=kind: x.to(kind) for kind in TYPES},
    **{str(value): lambda x, value=value: x.index_fill(0, torch.tensor(0), value) if x.ndim else x * value
       for value in (NAN, INF)}}
KINDS = ["bits", "cut", "bytes", "remove", "value", "value", "key", "tensor", "tensor", "tensor", "nest"]


def places(tree, path=()):
    """All places of a tree, as paths of keys."""
    yield path
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*path, key))


def put(tree, path, change):
    """The tree with what stands at a place changed; a change that raises KeyError removes it."""
    if not path:
        return change(tree)
    out = dict(tree) if isinstance(tree, dict) else list(tree)
    try:
        out[path[0]] = put(out[path[0]], path[1:], change)
    except KeyError:
        del out[path[0]]
    return tuple(out) if isinstance(tree, tuple) else out


def remove(value):
    raise KeyError


def mutate(checkpoint, path, chance):
    """Writes a mutation of a checkpoint to `path`; its name."""
    everywhere = list(places(checkpoint))
    tops = collections.defaultdict(list)
    for place in everywhere[1:]:
        tops[place[0]].append(place)
    place = chance.choice(tops[chance.choice(list(tops))]) if chance.random() < 0.97 else ()
    value = checkpoint
    for key in place:
        value = value[key]
    kind = chance.choice(KINDS)
    if kind == "tensor" and not torch.is_tensor(value):
        place = chance.choice([p for p in everywhere if p[:1] in (("model",), ("optimizer",))])
        value = checkpoint
        for key in place:
            value = value[key]
        kind = "tensor" if torch.is_tensor(value) else "value"
    if kind in ("bits", "cut", "bytes"):
        torch.save(checkpoint, path)
        content = bytearray(path.read_bytes())
        if kind == "cut":
            del content[chance.randrange(len(content)):]
        for _ in range({"bits": 1, "bytes": 50, "cut": 0}[kind]):
            # half of them where the file's structure is: its first and its last 20 kB
            at = chance.choice([chance.randrange(len(content)), chance.randrange(20000), -1 - chance.randrange(20000)])
            content[at] = content[at] ^ 1 << chance.randrange(8) if kind == "bits" else chance.randrange(256)
        path.write_bytes(content)
        return kind
    if kind == "tensor":
        kind = chance.choice(list(TENSORS))
        mutated = put(checkpoint, place, TENSORS[kind])
    elif kind == "key":
        old, new = place[-1:], chance.choice(KEYS)
        mutated = put(checkpoint, place[:-1], lambda x: {new if (k,) == old else k: v for k, v in x.items()}
                      if isinstance(x, dict) else [*x, new])
    else:
        sane = [value for value in VALUES if type(value) not in (bool, int, float, list) or value in (NAN, INF, [])]
        another = chance.choice(sane if place[:1] == ("totals",) else VALUES)       # other totals are totals, too
        change = {"remove": remove, "value": lambda x: another, "nest": lambda x: [x]}[kind]
        mutated = put(checkpoint, place, change) if place else another
        kind = f"{kind} {type(another).__name__}" if kind == "value" else kind
    torch.save(mutated, path)
    return f"{kind} at {'/'.join(map(str, place)) or 'the root'}"


def resumed(path):
    train("mae", WORK / "images", path.parent, "--batch_size", "80")
    return state_of(path.parent)


def started(path):
    train("mae", WORK / "images", path.parent / "new", "--batch_size", "80", "--epochs", "1", "--warmup_epochs", "0",
          "--init_from", path)
    return state_of(path.parent / "new")


def probed(path):
    weights, vit, channels, _ = finetune.load_encoder(path)
    vit["img_size"] = pair(vit["img_size"])
    channels = [ours or list(default) for ours, default in zip(channels, (IMAGENET_MEAN, IMAGENET_STD))]
    return digest(x.float() for x in weights.values()), weights.keys(), vit, channels


def drawn(path):
    model = visualize.load_pixel_model(path)
    return digest(model.state_dict().values()), str(model), vars(model).get("len_keep"), vars(model).get("norm_pix")


WAYS = {"resume": resumed, "--init_from": started, "finetune.py --ckpt": probed, "visualize.py --ckpt": drawn}


def outcome(way, path):
    """What comes of a checkpoint: its result or None, and what was said."""
    def hang(*_):
        raise SystemExit("it hangs")
    said = io.StringIO()
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(10)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            return WAYS[way](path), said.getvalue()
    except InputError as error:
        return None, f"refused: {error}"
    finally:
        signal.alarm(0)


def mutations(number, chance):
    warnings.simplefilter("ignore")
    (WORK / "images/train/class 0/broken.png").unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cut_off("mae", 4, WORK / "images", WORK / "base", "--batch_size", "80", "--save_minutes", "1e-9")
    checkpoint, table = read(WORK / "base"), collections.Counter()
    for value in checkpoint["model"].values():      # numbers that float16 and bfloat16 have
        value.copy_(value.where(value.abs() > 2**-14, 0).bfloat16())
    log = (WORK / "base/log.jsonl").read_text()
    right = {}
    for i in range(-1, number):
        folder = WORK / f"mutation {i}"
        folder.mkdir()
        path = folder / "last.pt"
        checkpoint["args"].update(output_dir=str(folder), save_minutes=30)
        kind = mutate(checkpoint, path, chance) if i >= 0 else torch.save(checkpoint, path)
        content = path.read_bytes()
        for way in WAYS:
            path.write_bytes(content)
            (folder / "log.jsonl").write_text(log)
            pid = os.fork() if i >= 0 else 0            # a crash would end the trial
            if pid:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                result = ["refused", "as it should be", "said"][code] if code in (0, 1, 2) else f"WRONG ({code})"
                text = (folder / "said").read_text(errors="replace") if (folder / "said").exists() else ""
                expect(code in (0, 1, 2), f"{kind}, {way}: {text[-600:]}")
                table[way, result] += 1
                continue
            code = 3
            try:
                result, said = outcome(way, path)
                code = 0 if result is None else 1 if result == right.get(way) else 4
                told = re.findall("although it has .*|other statistics than before|tensors; .*", said)
                if code == 4 and told != right.get(f"{way}, told"):
                    code = 2
                if code == 0 and (len(said.splitlines()) != 1 or len(said) > 1000):
                    code = 5
                (folder / "said").write_text("changes a figure without a word: " * (code == 4) + said)
                right[way], right[f"{way}, told"] = result, told
            except BaseException as error:
                (folder / "said").write_text(f"{type(error).__name__}: {error}")
            if i >= 0:
                os._exit(code)
        if i < 0:
            assert right.keys() >= WAYS.keys(), (folder / "said").read_text()
        subprocess.run(["rm", "-r", str(folder)], check=True)
    for way in WAYS:
        say(f"{way:20}", ", ".join(f"{result} {count}" for (its, result), count in sorted(table.items()) if its == way))


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------
def memory():
    for name in SETUPS:
        output, samples = WORK / f"{name}_memory", collections.defaultdict(list)
        run = start(name, output, "--epochs", "96", "--save_minutes", "inf")
        while run.poll() is None:
            time.sleep(0.2)
            epoch = len(log_of(output)) if (output / "log.jsonl").exists() else 0
            sizes = []
            for pid in processes_of(str(output)):
                with contextlib.suppress(OSError):
                    sizes.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20)
            samples[epoch].append(sum(sizes))
        early, late = (sum(sorted(samples[epoch])[len(samples[epoch]) // 2] for epoch in epochs) / len(epochs)
                       for epochs in ([e for e in samples if 40 <= e < 56], [e for e in samples if 80 <= e < 96]))
        say(f"{name}: resident memory of all processes, MiB: {early:.1f} in epochs 40 to 56, {late:.1f} in 80 to 96")
        expect(run.returncode == 0 and late - early < 3, f"{name} ended with {run.returncode}, or grows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["kills", "mutations", "memory"])
    parser.add_argument("number", type=int, nargs="?", default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    say(f"{args.trial} {args.number}, seed {args.seed}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    make_images()
    try:
        memory() if args.trial == "memory" else globals()[args.trial](args.number, random.Random(args.seed))
    finally:
        for pid in processes_of(str(WORK)):
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["rm", "-r", str(WORK)])
    say("all as it should be" if not wrong else f"{len(wrong)} WRONG")
    sys.exit(bool(wrong))
