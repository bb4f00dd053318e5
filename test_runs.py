"""What a run does in trouble: it is stopped, killed, cut off, given broken files or another run's, and goes on as if
nothing had been. Tested on `Run` through mae.py, on finetune.py, and on a toy where that is clearer; that the other
scripts use `Run` in the same way is test_all.py's to prove.

Runs that must be processes are forked from the test's own, which has imported torch already. They may be killed.
"""
import argparse
import ast
import contextlib
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import operator
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import common
import finetune
import mae
import runs
from common import InputError
from conftest import ROOT, SCRIPTS, module, photo, small_args

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc"),
              pytest.mark.filterwarnings("ignore")]
torch.set_num_threads(1)        # forked processes cannot use the threads of the one they are forked from


def tune_args(folder, output, *more):
    """As small_args, of finetune.py. With --ckpt given, the model is the checkpoint's."""
    words = [] if "--ckpt" in more else "--ckpt none --model vit_micro --img_size 32 --patch_size 8".split()
    return ["--data", str(folder), "--output_dir", str(output), *words, "--epochs", "2", "--warmup_epochs", "1",
            "--batch_size", "16", "--num_workers", "0", "--device", "cpu", *map(str, more)]


def words_of(name, folder, output, *more):
    return (tune_args if name == "finetune" else small_args)(folder, output, *more)


def train(name, folder, output, *more):
    """A run of a script, in this process."""
    return module(name).main(module(name).get_args(words_of(name, folder, output, *more)))


def command(name, words):
    """A run as a command, in this process: its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [f"{name}.py", *words])
        runs.launch(module(name).main, module(name).get_args)
    return stop.value.code


def refused(message, run, *words):
    """Whatever is run must raise InputError, in one line; a script by its name."""
    with pytest.raises(InputError, match=message) as caught:
        train(run, *words) if isinstance(run, str) else run(*words)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def read(output, file="last.pt"):
    return torch.load(output / file, weights_only=True)


def log_of(output):
    """The lines of a log, without times."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("seconds", "images_per_s")} for line in lines]


def digest(tensors):
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in tensors)).hexdigest()[:16]


def moments(output, key=None):
    states = read(output)["optimizer"]["state"].values()
    return [value for state in states for name, value in state.items() if key in (None, name)]


def state_of(output):
    """What a run must end with whatever interrupts it: step, weights, optimiser, scaler, log, picture and encoder."""
    last, encoder, picture = read(output), output / "encoder.pt", output / "reconstruction.png"
    return {"step": last["step"], "model": digest(last["model"].values()), "optimizer": digest(moments(output)),
            "scaler": last["scaler"], "log": log_of(output),
            "encoder": encoder.exists() and digest(read(output, "encoder.pt")["model"].values()),
            "picture": picture.exists() and hashlib.sha256(picture.read_bytes()).hexdigest()[:16]}


def keep_each(patch):
    """From now on every last.pt that a run saves is kept beside it, as STEP.pt; the list of these steps."""
    steps = []

    def keep(obj, path, save=runs.save):
        save(obj, path)
        if path.name == "last.pt":
            steps.append(obj["step"])
            shutil.copy(path, path.with_name(f"{obj['step']}.pt"))
    patch.setattr(runs, "save", keep)
    return steps


@contextlib.contextmanager
def at_step(name, step, action):
    """While it lasts, `action` is called when a script sets the rate of its step number `step`, counted from 0."""
    def spy(epoch, args, learning_rate=module(name).learning_rate):
        if round(3 * epoch, 6) == step:     # three steps an epoch
            action()
        return learning_rate(epoch, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module(name), "learning_rate", spy)
        yield


def cut_off(name, step, folder, output, *more):
    """A run that is cut off in the step number `step`, counted from 0."""
    def interrupt():
        raise KeyboardInterrupt
    with at_step(name, step, interrupt), pytest.raises(KeyboardInterrupt):
        train(name, folder, output, *more)


def until(condition, text=lambda: "", seconds=120):
    """Waits for a condition, looking every 5 ms; fails after so long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, text()
        time.sleep(0.005)


class Child:
    """A script run as a command by a process in a session of its own, where first `before()` is called."""

    def __init__(self, name, words, output, before=lambda: None, env={}):
        self.output, self.pid, self.code = output, os.fork(), None
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):      # under nohup SIGHUP is ignored
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout = sys.stderr = open(output, "a", buffering=1)
            os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
            tqdm.set_lock(threading.RLock())        # its own is shared by processes: one that is killed may hold it
            os.environ.update(env)
            sys.argv = [f"{name}.py", *words]
            before()
            runs.launch(module(name).main, module(name).get_args)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self):
        """The exit code; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self):
        until(lambda: self.poll() is not None, self.said)
        return self.code

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def said(self):
        return self.output.read_text(errors="replace").replace("\r", "\n")

    def until(self, condition):
        """Waits while the process runs."""
        until(lambda: condition() or self.poll() is not None, self.said)
        assert self.poll() is None, self.said()

    def members(self):
        """The session's processes: itself and loader workers."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):          # it has ended meanwhile
                state, _, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
                if int(session) == self.pid and state != "Z":
                    found.append(int(path.parent.name))
        return found


@pytest.fixture
def child(tmp_path):
    """Starts a process; whatever is left of it is killed when the test ends."""
    children = []

    def start(name, words, **more):
        children.append(Child(name, words, tmp_path / f"said {len(children)}", **more))
        return children[-1]
    yield start
    for each in children:
        for pid in each.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        each.kill()


@pytest.fixture
def scratch():
    """A folder for temporary files. Its name is short: sockets lie there."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def together(child):
    """Runs a script in several processes, as torchrun would; what each has said. Each must end with its of `codes`."""
    def run(world_size, name, words, *codes, **more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port)}
        ranks = [child(name, words, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **more)
                 for rank in range(world_size)]
        assert [each.wait() for each in ranks] == list(codes or [0] * world_size), [each.said() for each in ranks]
        return [each.said() for each in ranks]
    return run


# ---------------------------------------------------------------------------------------------------------------------
# A toy: a linear model on 12 numbers, 2 epochs of 3 steps
# ---------------------------------------------------------------------------------------------------------------------
def toy(output, *more, leave_out="", seen=[]):
    """The smallest program with a Run; its loss is the mean of the numbers. `leave_out`: what it forgets."""
    parser = argparse.ArgumentParser()
    for name, value in (("batch_size", 4), ("epochs", 2), ("accum_iter", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    words = ["--data", "numbers", "--output_dir", output, "--num_workers", 0, "--device", "cpu", "--amp", "none", *more]
    args = runs.parse_args(parser, list(map(str, words)))
    model, run = torch.nn.Linear(1, 1), runs.Run(args, __file__)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    crops = common.Crops([(float(i), i) for i in range(12)], torch.tensor, args.seed)
    run.resume(crops, model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    for epoch in run.epochs():
        for step in run.steps():
            for x, index in run.parts():
                seen.append((epoch, step, index.tolist(), torch.rand(()).item()))
                if leave_out != "add":
                    run.add(x.mean(), square=(x**2).mean())
            if leave_out != "end_step":
                run.end_step(torch.tensor(2.0))
            if leave_out == "break":
                break
        if leave_out != "end_epoch":
            run.end_epoch(extra=epoch)
    run.finish()


@pytest.mark.parametrize("forgotten, said", [
    ("add", r"every turn of run.parts\(\) must call run.add"), ("break", r"do not leave run.steps\(\) early"),
    ("end_step", r"every turn of run.steps\(\) must end"), ("end_epoch", r"every turn of run.epochs\(\) must end")])
def test_misuse_of_run(forgotten, said, tmp_path):
    """A call that is forgotten, or a loop that is left early, is named at once."""
    with pytest.raises(RuntimeError, match=said):
        toy(tmp_path, leave_out=forgotten)


@pytest.mark.parametrize("world_size, accum_iter", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_numbers_of_a_run(world_size, accum_iter, tmp_path, together, monkeypatch):
    """By hand: each image once an epoch, every part and process with random numbers of its own, the log the means over
    parts, processes and steps, epochs counted from 0."""
    def main(args):
        seen = []
        toy(tmp_path / "out", "--accum_iter", accum_iter, seen=seen)
        (tmp_path / f"seen {os.environ['RANK']}").write_text(json.dumps(seen))
    monkeypatch.setattr(mae, "main", main)
    together(world_size, "mae", ["--demo"])
    seen = [row for rank in range(world_size) for row in json.loads((tmp_path / f"seen {rank}").read_text())]
    assert sorted({(epoch, step) for epoch, step, *_ in seen}) == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    assert len(seen) == len({row[-1] for row in seen}) == 6 * world_size * accum_iter
    for epoch in (0, 1):
        assert sorted(i for row in seen if row[0] == epoch for i in row[2]) == list(range(12))
    means = {"loss": 5.5, "square": sum(i * i for i in range(12)) / 12, "grad_norm": 2.0, "lr": 0.0}
    means = {key: pytest.approx(value) for key, value in means.items()}
    assert log_of(tmp_path / "out") == [{"epoch": epoch, **means, "extra": epoch} for epoch in (0, 1)]
    assert read(tmp_path / "out")["step"] == 6


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves, and going on
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_what_it_should(name, run_of):
    output, method = run_of(name), module(name)
    files = sorted(path.name for path in output.iterdir())
    assert files == [".lock", "encoder.pt", "last.pt", "log.jsonl", "reconstruction.png"]
    log, last, encoder = log_of(output), read(output), read(output, "encoder.pt")["model"]
    assert [line["epoch"] for line in log] == [0, 1] and all(line.keys() >= {"loss", "grad_norm"} for line in log)
    args = method.get_args(small_args("x", "y"))                # the rate is set before each of 3 steps an epoch
    assert [line["lr"] for line in log] == [method.learning_rate(step / 3, args) for step in (2, 5)]
    assert last["step"] == 6 and last["args"]["batch_size"] == 16 and last["method"] == name
    assert all(group["betas"] == (0.9, 0.95) for group in last["optimizer"]["param_groups"])
    assert {step.item() for step in moments(output, "step")} == {6}
    assert len(encoder) > 50 and all(torch.equal(value, last["model"][key]) for key, value in encoder.items())
    with Image.open(output / "reconstruction.png") as picture:
        assert picture.width == 8 * (96 + 2) + 2 and picture.height % (96 + 2) == 2


@pytest.mark.parametrize("name, more", [("mae", ""), ("mae", "--accum_iter 2 --clip_grad 0.1 --num_workers 2"),
                                        ("finetune", "--accum_iter 2 --clip_grad 1 --num_workers 2"),
                                        ("finetune", "--mode linear --smoothing 0")])
def test_resumes_from_every_step(name, more, folder, tmp_path, monkeypatch, capsys):
    """With --save_minutes near 0 each step is saved. From any of these, and with a line half written, the same command
    ends as a run does that saved at its epochs' ends alone and had other workers."""
    output, more = tmp_path / "run", more.split()
    result = train(name, folder, tmp_path / "whole", *more, "--num_workers", 0 if "--num_workers" in more else 2)
    whole, steps = state_of(tmp_path / "whole"), keep_each(monkeypatch)
    train(name, folder, output, *more, "--save_minutes", "1e-9")
    assert steps == [1, 2, 3, 4, 5, 6] and state_of(output) == whole and len(whole["log"]) == 2
    assert "already finished" not in capsys.readouterr().out
    for step in range(1, 7):
        shutil.copy(output / f"{step}.pt", output / "last.pt")
        with open(output / "log.jsonl", "a") as log:
            log.write('{"epoch": 1, "lo')
        assert train(name, folder, output, *more, "--save_minutes", "1e-9") == result
        assert state_of(output) == whole
    assert capsys.readouterr().out.count("already finished: nothing trained. --no_resume starts over; checkpoints") == 1
    assert command(name, words_of(name, folder, output, *more)) == 0 and state_of(output) == whole


@pytest.mark.parametrize("name", ["mae", "finetune"])
def test_two_processes_resume(name, folder, tmp_path, monkeypatch, together):
    """Bit for bit, totals included; and with another number of processes to rounding."""
    output, more = tmp_path / "run", ["--accum_iter", "2", "--amp", "none", "--save_minutes", "1e-9"]
    keep_each(monkeypatch)
    said = together(2, name, words_of(name, folder, output, *more))
    assert "4 images per step per process × 2 process(es) × 2 accumulated = effective batch 16" in said[0]
    assert "images" not in said[1]
    whole = state_of(output)
    for step in (2, 3, 4):
        shutil.copy(output / f"{step}.pt", output / "last.pt")
        together(2, name, words_of(name, folder, output, *more))
        assert state_of(output) == whole
    shutil.copy(output / "2.pt", output / "last.pt")
    train(name, folder, output, *more, "--accum_iter", "4")
    for ours, theirs in zip(log_of(output), whole["log"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("name", ["mae", "finetune"])
def test_signals_save_in_the_middle_of_an_epoch(name, number, folder, tmp_path, capfd):
    """During its second and its fifth step of six; then it goes on as if nothing had been."""
    train(name, folder, tmp_path / "whole")
    for at in (2, 5):
        signal.signal(number, signal.SIG_DFL)       # of the run before; under nohup SIGHUP is ignored
        with at_step(name, at - 1, lambda: signal.raise_signal(number)):
            assert command(name, words_of(name, folder, tmp_path / "run")) == 128 + number
        said = capfd.readouterr()
        assert f"stopped: saved after step {at}; the same command, without --no_resume" in said.out
        assert f"{signal.Signals(number).name}: saving after this step" in said.err
        assert read(tmp_path / "run")["step"] == at and (tmp_path / "run/log.jsonl").exists() == (at > 3)
    train(name, folder, tmp_path / "run")
    assert state_of(tmp_path / "run") == state_of(tmp_path / "whole")


def test_what_signals_say(monkeypatch):
    """0: go on, 1: save, more: save and exit. The time to save is the first process's; a second Ctrl-C ends a process,
    but not under torchrun."""
    def caught(*numbers, rank=0, minutes=math.inf, ignore=False):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN if ignore else signal.SIG_DFL)
        signals = runs.Signals(rank, minutes)
        signals.install()
        for number in numbers:
            signal.raise_signal(number)
        return signals.poll()
    assert caught() == 0 and caught(signal.SIGTERM, signal.SIGTERM) == 143      # preemption may send it twice
    assert caught(signal.SIGHUP) == 129 and caught(signal.SIGUSR1) == 138
    assert caught(signal.SIGINT) == 130 and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert caught(minutes=1e-9) == 1 and caught(rank=1, minutes=1e-9) == 0
    assert caught(signal.SIGTERM, minutes=1e-9) == 143
    assert caught(signal.SIGHUP, ignore=True) == 0                              # under nohup
    monkeypatch.setenv("RANK", "0")
    assert caught(signal.SIGINT, signal.SIGINT) == 130


def test_one_process_is_told_and_all_stop(folder, tmp_path, together):
    """After the same step, one later; then they go on."""
    words = small_args(folder, tmp_path / "run", "--amp", "none")
    with at_step("mae", 0, lambda: os.environ["RANK"] == "1" and signal.raise_signal(signal.SIGTERM)):
        said = together(2, "mae", words, 143, 143)
    assert "stopped: saved after step 2" in said[0] and "stopped" not in said[1] and read(tmp_path / "run")["step"] == 2
    together(2, "mae", words)
    together(2, "mae", small_args(folder, tmp_path / "whole", "--amp", "none"))
    assert state_of(tmp_path / "run") == state_of(tmp_path / "whole")


def test_processes_that_disagree(folder, tmp_path, monkeypatch, together):
    """Folders that aren't shared, and hold other steps: all are refused. Where one process alone meets an error, it
    says which; the others have one line, ten seconds later."""
    with monkeypatch.context() as patch:
        keep_each(patch)
        train("mae", folder, tmp_path, "--save_minutes", "1e-9")
    for step in "35":
        (tmp_path / step).mkdir()
        shutil.copy(tmp_path / f"{step}.pt", tmp_path / step / "last.pt")

    def before():
        time.sleep = lambda seconds: None
        if os.environ["RANK"] == "1":
            sys.argv[sys.argv.index(str(tmp_path / "3"))] = str(tmp_path / "5")
    said = together(2, "mae", small_args(folder, tmp_path / "3"), 2, 2, before=before)
    assert all("differs between processes: all machines need a shared" in text for text in said)
    (tmp_path / "file").touch()
    said = together(2, "mae", small_args(folder, tmp_path / "file"), 2, 1,
                    before=lambda: setattr(time, "sleep", lambda seconds: None))
    assert "error: cannot write into" in said[0] and "another process of this run has ended" in said[1]
    assert "Traceback" not in said[0] + said[1]


def test_a_clock_that_is_set_back(folder, tmp_path, monkeypatch):
    """By an hour, each time that it is read: checkpoints are sound, and due as before."""
    now = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    cut_off("mae", 4, folder, tmp_path / "out", "--save_minutes", "1e-9")
    assert read(tmp_path / "out")["step"] == 4 and read(tmp_path / "out")["seconds"] > 0
    train("mae", folder, tmp_path / "out", "--save_minutes", "1e-9")
    train("mae", folder, tmp_path / "whole")
    assert state_of(tmp_path / "out") == state_of(tmp_path / "whole")


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_closes(nohup, folder, tmp_path, child):
    """SIGHUP, and nothing more can be written to it: the run saves. Under nohup it goes on to its end."""
    import fcntl
    import termios
    terminal, theirs = os.openpty()
    output = tmp_path / "run"

    def attach():
        os.close(terminal)
        os.dup2(theirs, 0)
        if nohup:               # which writes to a file
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        else:
            os.dup2(theirs, 1), os.dup2(theirs, 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.close(theirs)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    run = child("mae", small_args(folder, output, "--epochs", "30" if nohup else "3000"), before=attach)
    os.close(theirs)
    run.until((output / "log.jsonl").exists)
    os.close(terminal)
    assert run.wait() in ([0] if nohup else [1, 129])           # 1 where the last line could not be printed
    assert read(output)["step"] == 90 if nohup else 0 < read(output)["step"] < 9000


def test_stopped_in_an_evaluation(folder, tmp_path):
    """The checkpoint is saved before it; started again, a run evaluates and writes the line that is missing."""
    result, output, saved_at = train("finetune", folder, tmp_path / "whole"), tmp_path / "run", []

    def evaluate(*arguments, evaluate=finetune.evaluate):
        if read(output)["step"] == stop_at:
            saved_at.append(stop_at)
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)
    for stop_at, lines in ((3, 0), (3, 0), (6, 1), (6, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune, "evaluate", evaluate)
            assert command("finetune", tune_args(folder, output)) == 143
        log = output / "log.jsonl"
        assert len(log.read_text().splitlines() if log.exists() else []) == lines
    assert saved_at == [3, 3, 6, 6] and train("finetune", folder, output) == result
    assert state_of(output) == state_of(tmp_path / "whole")


@pytest.mark.parametrize("name, workers", [("mae", 2), ("finetune", 0)])
def test_killed_and_started_again(name, workers, folder, tmp_path, child):
    """SIGKILL at any moment; more of it in results/robustness."""
    output, last, chance = tmp_path / "run", tmp_path / "run/last.pt", random.Random(0)
    more = ["--epochs", "8", "--save_minutes", "1e-9", "--num_workers", workers]
    for _ in range(3):
        before = last.stat().st_mtime_ns if last.exists() else 0
        run = child(name, words_of(name, folder, output, *more))
        run.until(lambda: last.exists() and last.stat().st_mtime_ns != before)
        time.sleep(chance.uniform(0, 0.1))
        run.kill()
        assert run.code == -signal.SIGKILL
    train(name, folder, output, *more)
    train(name, folder, tmp_path / "whole", *more)
    assert state_of(output) == state_of(tmp_path / "whole")
    assert len(log_of(output)) == 8 and not list(output.glob("*tmp"))
    until(lambda: not run.members())


class Slow(torch.utils.data.Dataset):
    """Two items, the second of which takes longer than a loader waits for its workers when it is closed, 5 s."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        time.sleep(60 * index)
        return torch.zeros(3)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no sigwaitinfo")
def test_a_worker_that_is_ended_leaves_nothing(scratch, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    loader = iter(torch.utils.data.DataLoader(Slow(), num_workers=1, worker_init_fn=runs.leave_signals_alone,
                                              multiprocessing_context="fork"))
    next(loader)
    assert list(scratch.iterdir())          # the socket over which it hands over tensors
    loader._shutdown_workers()
    until(lambda: not list(scratch.iterdir()))     # torch 2.8 doesn't wait for workers that it ends


@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM", "bad file", "success"])
def test_nothing_is_left_behind(ending, folder, tmp_path, scratch, child):
    """Loader workers get the signal too, as from a terminal: the run still saves. No process or file outlives a run."""
    data, output = tmp_path / "images", tmp_path / "out"
    shutil.copytree(folder / "train", data)
    if ending == "bad file":
        (data / "class 0 é" / "broken.png").write_bytes(b"no image")
    words = small_args(data, output, "--num_workers", "2", "--epochs", "2" if ending == "success" else "2000")
    run = child("mae", words, before=lambda: setattr(tempfile, "tempdir", str(scratch)))
    if ending.startswith("SIG"):
        run.until((output / "log.jsonl").exists)
        assert len(run.members()) == 3
        os.killpg(run.pid, getattr(signal, ending))
    assert run.wait() == {"SIGINT": 130, "SIGTERM": 143, "bad file": 2, "success": 0}[ending], run.said()
    until(lambda: not run.members())
    assert "Traceback" not in run.said() and run.said().count(": error: ") == (ending == "bad file")
    assert not list(output.glob("*tmp")) and not list(scratch.iterdir())
    assert not list(Path("/dev/shm").glob(f"torch_{run.pid}_*"))
    if ending.startswith("SIG"):
        assert f"{ending}: saving after this step" in run.said() and "stopped: saved after step" in run.said()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another limit")
def test_a_worker_that_cannot_hand_over_a_batch(folder, tmp_path, scratch, child):
    """It ends the run, which would otherwise wait for ever. Here its socket's name has more than the 107 bytes that a
    kernel takes."""
    for length, code in ((75, 0), (76, 1)):
        temporary = scratch / ("t" * (length - len(str(scratch)) - 1))
        temporary.mkdir()
        output = tmp_path / str(length)
        run = child("mae", small_args(folder, output, "--num_workers", "1"),
                    before=lambda: setattr(tempfile, "tempdir", str(temporary)))
        assert run.wait() == code and run.said().count("error: ") == code
        assert run.said().count("path too long (TMPDIR is ") == code and "Traceback" not in run.said()
        assert (output / "last.pt").exists() == (code == 0)


def test_workers_leave_signals_alone(folder):
    """A job's signals do not end a loader's worker; the main process's own SIGTERM does. One that dies is named."""
    crops = common.Crops(common.load_dataset(str(folder), "pretrain"), common.train_transform(32, (0.2, 1.0)))

    def loader():
        batches = runs.make_loader(crops, [[(0, i)] for i in range(48)], 1, torch.device("cpu"))
        next(batches)
        return batches, multiprocessing.active_children()[-1]
    batches, worker = loader()
    for name in ("INT", "TERM", "HUP", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(batches)) == 47
    batches, worker = loader()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
    batches, worker = loader()
    worker.kill()                   # as the kernel does where memory is short
    worker.join(30)                 # in the midst of a step nothing is raised
    with pytest.raises(OSError, match="a loader process died") as caught:
        list(batches)
    assert "--num_workers" in str(caught.value) and "\n" not in str(caught.value)
    crops.transform = operator.truediv      # an error in a worker that lives is another thing
    with pytest.raises(TypeError):
        loader()
    gc.collect()


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mae", "finetune"])
def test_a_full_disk(name, folder, tmp_path, child):
    """Files may not grow past 100 kB after the first checkpoint: one line and exit code 1, that checkpoint is whole,
    and the same command goes on."""
    output = tmp_path / "out"

    def full(obj, path, save=runs.save):
        import resource
        save(obj, path)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
    run = child(name, words_of(name, folder, output), before=lambda: setattr(runs, "save", full))
    assert run.wait() == 1 and run.said().count(": error: ") == 1 and "Traceback" not in run.said()
    assert re.search(rf"{name}.py: error: {output}/last.pt could not be written \(is the disk full\? .*\); the one "
                     "before is still whole\n", run.said())
    assert read(output)["step"] == 3 and not list(output.glob("*tmp"))
    train(name, folder, output)
    train(name, folder, tmp_path / "whole")
    assert state_of(output) == state_of(tmp_path / "whole")


def test_a_picture_that_cannot_be_written(folder, tmp_path, capsys):
    """The checkpoint is saved before it; one line, exit code 1; the same command draws it."""
    picture = tmp_path / "out/reconstruction.png"
    picture.mkdir(parents=True)
    assert command("mae", small_args(folder, tmp_path / "out")) == 1
    assert "mae.py: error: [Errno 21] Is a directory: " in capsys.readouterr().err
    assert read(tmp_path / "out")["step"] == 3 and not (tmp_path / "out/log.jsonl").exists()
    picture.rmdir()
    train("mae", folder, tmp_path / "out")
    train("mae", folder, tmp_path / "whole")
    assert state_of(tmp_path / "out") == state_of(tmp_path / "whole")


def test_the_output_folder_is_checked_before_training(folder, tmp_path, monkeypatch):
    """That it can be written to (as root everything can: one refusal is made here), and that there is room."""
    (tmp_path / "file").write_text("")
    output, sizes = tmp_path / "out", []

    def deny(*_):
        raise PermissionError(13, "Permission denied")
    with at_step("mae", 0, lambda: pytest.fail("it trains")):
        refused("cannot write into --output_dir .*file: File exists", "mae", folder, tmp_path / "file")
        refused("cannot write into --output_dir .*below: Not a dir", "mae", folder, tmp_path / "file/below")
        refused("--output_dir must not be empty", "mae", folder, "")
        with monkeypatch.context() as patch:
            patch.setattr(runs.os, "open", deny)
            refused("cannot write into --output_dir .*out: Permission denied", "mae", folder, output)
        with monkeypatch.context() as patch:
            patch.setattr(runs.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**6))
            refused("has 0.001 GB free, and this run needs 0.0[12]", "mae", folder, output)
    (output / "last.pt.tmp").write_text("of a run that was killed while saving")
    monkeypatch.setattr(runs, "check_room", lambda folder, size, resumed: sizes.append(size))
    train("mae", folder, output)
    assert sizes[0] == pytest.approx((output / "last.pt").stat().st_size, rel=0.1)      # what it asks for is right
    assert not list(output.glob("*tmp"))


def test_two_runs_do_not_share_a_folder(folder, tmp_path, monkeypatch, child):
    """The second is refused while the first lives, and no longer: loader workers that outlive it hold no lock."""
    output, more = tmp_path / "out", ["--epochs", "5000", "--num_workers", "2"]
    monkeypatch.setattr(runs.take, "__defaults__", (0.2,))
    run = child("mae", small_args(folder, output, *more))
    run.until((output / "last.pt").exists)
    refused("another run is writing into --output_dir", "mae", folder, output, *more)
    workers = set(run.members()) - {run.pid}
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    run.kill()
    runs.take(output)
    assert set(run.members()) == workers


def test_starting_over_loses_nothing(folder, tmp_path, monkeypatch):
    """An old run's files get the time in their names; also within a second, and where the user has moved last.pt
    away."""
    days = iter("12234")
    monkeypatch.setattr(runs.time, "strftime", lambda form: f"2026010{next(days)}-000000")
    for more in ([], ["--no_resume", "--seed", "1"], ["--no_resume", "--seed", "2"]):
        train("mae", folder, tmp_path, "--epochs", "1", "--warmup_epochs", "0", "--keep_every", "1", *more)
    files = ("encoder", "encoder-0001", "last", "log")
    names = [f"{name}.2026010{day}-000000" for name in files for day in (2, 3)]
    assert {path.stem for path in tmp_path.iterdir()} == {".lock", "reconstruction", *files, *names}
    assert [read(tmp_path, f"{name}.pt")["args"]["seed"] for name in names[:6]] == [0, 1, 0, 1, 0, 1]
    log = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "last.pt").unlink()
    train("mae", folder, tmp_path, "--epochs", "1", "--warmup_epochs", "0", "--seed", "3")
    assert (tmp_path / "log.20260104-000000.jsonl").read_text() == log and read(tmp_path)["args"]["seed"] == 3


@pytest.mark.parametrize("name", ["mae", "finetune"])
def test_lines_of_the_log(name, folder, tmp_path):
    """What is cut or deleted of the last epoch's line is written anew, without training. Foreign lines are refused."""
    output, log = tmp_path / "out", tmp_path / "out/log.jsonl"
    train(name, folder, output)
    whole, text = state_of(output), log.read_text()
    first, last = text.splitlines(keepends=True)
    with at_step(name, 5, lambda: pytest.fail("it trains")):
        for rest in (text[:-5], first, first + '{"epoch": 7}\n', first + last + last, ""):
            log.write_text(rest)
            if rest == first:
                (output / "reconstruction.png").unlink(missing_ok=True)
            train(name, folder, output)
            assert state_of(output) == (whole if rest else {**whole, "log": whole["log"][1:]}), rest
        for foreign in ("hello\n", "[1]\n", '{"loss": 1}\n', '{"epoch": "x"}\n'):
            log.write_text(first + foreign)
            refused("holds a line that no run wrote: remove it to resume", name, folder, output)


def test_data_that_has_changed(folder, tmp_path, capsys):
    """An image less or another in the same number of steps goes on, and is said; another number of steps is another
    schedule. A moved folder is the same, and a run's own pictures are no data."""
    words = [tmp_path / "data", tmp_path / "data/out", "--batch_size", "15"]
    shutil.copytree(folder / "train", words[0])
    first, second, *others = sorted(words[0].rglob("*.png"))
    inventory = [common.inventory(common.load_dataset(str(root), "pretrain")) for root in (folder, words[0])]
    assert inventory[0] == inventory[1] and re.fullmatch(r"48 \(\w{12}\)", inventory[0])
    train("mae", *words)
    train("mae", *words)
    assert "although" not in capsys.readouterr().out and (words[1] / "reconstruction.png").exists()
    first.unlink()
    train("mae", *words)
    assert re.search(r"although it has images 48 \(\w{12}\) \(now 47 \(\w{12}\)\)", capsys.readouterr().out)
    second.rename(second.with_name("new.png"))
    shutil.copy(others[0], first)
    train("mae", *words)
    assert re.search(r"although it has images 48 \(\w{12}\) \(now 48 \(\w{12}\)\)", capsys.readouterr().out)
    for path in others[:10]:
        path.unlink()
    refused(r"another run: .*steps_per_epoch 3 \(now 2\)", "mae", *words)


def test_a_hundred_thousand_files(tmp_path):
    """Links to a few images, in folders with spaces and signs: in order, in little memory."""
    for i in range(2):
        photo(i).save(tmp_path / f"{i}.png")
    for i in range(100):
        (tmp_path / "data" / f"ordner {i:02d} ß 画像").mkdir(parents=True)
    for i in range(100_000):
        os.link(tmp_path / f"{i % 2}.png", tmp_path / "data" / f"ordner {i % 100:02d} ß 画像" / f"bild {i:06d} ü.png")
    source = common.load_dataset(str(tmp_path / "data"), "pretrain")
    assert len(source) == 100_000 and len(source.classes) == 100 and source.paths.nbytes < 20e6
    assert source[99_999][0].shape == (3, 40, 48) and source[99_999][1] == 99
    shutil.rmtree(tmp_path / "data")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: whose they are
# ---------------------------------------------------------------------------------------------------------------------
def test_another_methods_checkpoint(run_of, folder, tmp_path):
    """Is refused by name, in an output folder that two scripts are pointed at."""
    train("finetune", folder, tmp_path / "finetune")
    for name, others in (("mae", {*SCRIPTS, "finetune"}), ("sdae", {"mae"}), ("finetune", {"mae"})):
        for other in others - {name}:
            shutil.copy((tmp_path if other == "finetune" else run_of(other).parent) / other / "last.pt", tmp_path)
            refused(f"last.pt is a checkpoint of {other}.py, not of {name}.py: give another --output_dir", name, folder,
                    tmp_path)


def test_arguments_of_another_run(pretrained, folder, tmp_path, capsys):
    """All that differ are named; what a checkpoint lacks counts as its default, and what is unknown here is refused.
    Precision and clipping may change, to mend a run that diverged, and it is said."""
    last = read(pretrained)
    torch.save(last, tmp_path / "last.pt")
    refused(r"another run: .*epochs 2 \(now 4\).* Restore those values to resume it, or give another --output_dir",
            "mae", folder, tmp_path, "--epochs", "4")
    refused(r"weight_decay 0.05 \(now 0.1\), .*seed 0 \(now 1\)", "mae", folder, tmp_path, "--weight_decay", "0.1",
            "--seed", "1")
    args = {**last["args"], "drop_edge": 0.3}
    torch.save({**last, "args": args}, tmp_path / "last.pt")
    refused(r"drop_edge 0.3 \(now unknown\)", "mae", folder, tmp_path)
    args = {key: value for key, value in last["args"].items() if key != "mask_ratio"}
    torch.save({**last, "args": args}, tmp_path / "last.pt")
    refused(r"mask_ratio 0.75 \(now 0.5\)", "mae", folder, tmp_path, "--mask_ratio", "0.5")
    train("mae", folder, tmp_path)
    assert "mask_ratio" not in capsys.readouterr().out
    cut_off("mae", 3, folder, tmp_path / "amp", "--amp", "none")
    (tmp_path / "amp").rename(tmp_path / "moved")
    train("mae", folder, tmp_path / "moved", "--amp", "bf16", "--clip_grad", "1", "--save_minutes", "7")
    said = "last.pt: resuming, although it has clip_grad None (now 1.0), amp none (now bf16)\n"
    assert said in capsys.readouterr().out and read(tmp_path / "moved")["step"] == 6


def test_data_that_were_moved(folder, tmp_path, capsys):
    """The same names in another place are the same data; other names, or a set by name, are not."""
    cut_off("mae", 3, folder, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "moved")
    train("mae", f"{tmp_path}/moved/", tmp_path / "run")
    assert "although it has data " in capsys.readouterr().out and read(tmp_path / "run")["step"] == 6
    next((tmp_path / "moved/train").rglob("000.png")).rename(tmp_path / "moved/train/class 0 é/new.png")
    refused(r"another run: data .*\(now .*moved\)", "mae", tmp_path / "moved", tmp_path / "run")
    cut_off("mae", 3, "shapes", tmp_path / "named")
    last = read(tmp_path / "named")
    torch.save({**last, "args": {**last["args"], "data": "cifar10"}}, tmp_path / "named/last.pt")   # of equal number
    refused(r"another run: data cifar10 \(now shapes\)", "mae", "shapes", tmp_path / "named")


@pytest.mark.parametrize("name, newer, given", [
    ("mae", ["in_chans", "mean", "std", "show"], ["--mean", *"111"]), ("finetune", ["beta2"], ["--beta2", "0.5"])])
def test_arguments_set_later_are_no_change(name, newer, given, folder, tmp_path, capsys):
    """A run from before there was --mean, or an argument whose default is the recipe's, resumes without a word."""
    cut_off(name, 4, folder, tmp_path)
    last = read(tmp_path)
    torch.save({**last, "args": {key: last["args"][key] for key in last["args"].keys() - newer}}, tmp_path / "last.pt")
    refused(rf"another run: {given[0][2:]} .* \(now", name, folder, tmp_path, *given)
    train(name, folder, tmp_path)
    assert "although" not in capsys.readouterr().out and read(tmp_path)["step"] == 6


def test_code_that_has_changed(folder, tmp_path, capsys):
    """A finished run is refused, one that isn't finished goes on and says so; comments and docstrings are no code."""
    def main(*replacement):
        path = tmp_path / "mae.py"
        path.write_text((ROOT / "mae.py").read_text().replace(*replacement, 1))
        spec = importlib.util.spec_from_file_location("copy_of_mae", path)
        copied = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        copied.main(copied.get_args(small_args(folder, tmp_path / "out")))
    loss = ("F.mse_loss(pred.float(), target)", "2 * F.mse_loss(pred.float(), target)")
    cut_off("mae", 4, folder, tmp_path / "out")
    main('def main(args):\n    """', 'def main(args):     # another\n\n    """Another line. ')
    assert "although" not in capsys.readouterr().out
    refused("is of a finished run, and the code has changed since: give another --output_dir", main, *loss)
    cut_off("mae", 4, folder, tmp_path / "out", "--no_resume")
    main(*loss)
    assert "resuming, although it has other code (mae.py, or what it imports, has changed)" in capsys.readouterr().out
    ours, theirs = runs.code_hash(ROOT / "mae.py"), runs.code_hash(tmp_path / "mae.py")
    assert ours != theirs and ours.split()[0] == "{}.{}".format(*sys.version_info)


def test_finetuning_knows_its_encoder_and_classes(folder, pretrained, run_of, tmp_path):
    """Another encoder under the same name is another run, and so are other classes: they would be other labels."""
    data, ckpt = shutil.copytree(folder, tmp_path / "data"), tmp_path / "last.pt"
    words = ["finetune", data, tmp_path / "out", "--ckpt", ckpt]
    shutil.copy(pretrained / "last.pt", ckpt)
    result = train(*words)
    assert train(*words) == result
    shutil.copy(run_of("sdae") / "last.pt", ckpt)
    refused(r"another run: encoder \w{16} \(now \w{16}\)\. Restore", *words)
    shutil.copy(pretrained / "last.pt", ckpt)
    for split in ("train", "val"):
        (data / split / "class 0 é").rename(data / split / "class 9 é")
    refused(r"another run: class_names .*'class 0 é'.* \(now .*\)", *words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_init_from(name, run_of, folder, tmp_path, capsys):
    """A new run, at step 0, from all weights that a whole model or an encoder alone has; then it goes on as any."""
    for source in (run_of(name) / "last.pt", run_of("sdae") / "encoder.pt"):
        output, given = tmp_path / source.stem, read(source.parent, source.name)["model"]
        words = [folder, output, "--init_from", source, "--blr", "1e-30"]     # a rate of 0, but for rounding
        train(name, *words)
        said, last = capsys.readouterr().out, read(output)
        own = {key: value for key, value in last["model"].items() if "pos_embed" not in key}
        taken = [key for key in own if key in given and not key.startswith(("patch_mean", "patch_var", "teacher."))]
        assert len(taken) > 50 and all(torch.allclose(own[key], given[key], atol=1e-20) for key in taken)
        assert f"weights from {source}: {len([key for key in own if key in given])} tensors; " in said
        assert last["step"] == 6 and last["args"]["init_from"] == str(source)
        train(name, *words)         # finished: goes on from last.pt, not from the weights
        assert "already finished" in capsys.readouterr().out
        refused(r"init_from .* \(now None\)", name, folder, output, "--blr", "1e-30")


def test_init_from_other_shapes(folder, pretrained, tmp_path):
    """Positions are fixed, and the new model's own; other patches or widths are refused, and features for pixels. A run
    may start over from its own last.pt, which it keeps."""
    last, output = pretrained / "last.pt", tmp_path / "out"
    words = [folder, output, "--blr", "1e-30", "--img_size", "48", "40", "--init_from"]
    train("mae", *words, last)
    weights = read(output)["model"]
    torch.testing.assert_close(weights["pos_embed"][0, 1:], common.sincos_pos_embed(128, (6, 5)))
    for method, key, *more in (("mae", "patch_embed.proj.weight", "--patch_size", "4"),
                               ("mae", "mask_token", "--decoder_embed_dim", "64"), ("sdae", "decoder_pred.weight")):
        refused(rf"{key}'\]: expected float strided .*, found float strided", method, folder, tmp_path / "new",
                "--init_from", last, *more)
    refused(r"mask_token'\]: expected", runs.load_weights, last, mae.MAE(32, 8, 128, 4, 2, 64, 1, 2, in_chans=4))
    refused("no checkpoint at ''", "mae", folder, tmp_path / "new", "--init_from", "")
    train("mae", *words, output / "last.pt", "--no_resume")
    assert read(output)["step"] == 6 and list(output.glob("last.????????-??????.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: what they hold
# ---------------------------------------------------------------------------------------------------------------------
class Evil:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return open, ("code_has_run", "w")


WEIGHT = "blocks.0.mlp.fc1.weight"
TENSORS = {     # what may be wrong with a tensor in a file that torch reads; trials.py draws from many more
    "sparse": lambda x: x.to_sparse(), "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "meta": lambda x: x.to("meta"), "complex": lambda x: x.to(torch.complex64), "bool": lambda x: x > 0,
    "int8": lambda x: (100 * x).to(torch.int8), "giant": lambda x: torch.zeros(1).expand(10**12),
    "rank": lambda x: x[None], "shape": lambda x: x[1:], "nan": lambda x: x / 0, "list": lambda x: x.tolist(),
    "none": lambda x: None}


@pytest.fixture
def not_restored(monkeypatch):
    """Nothing may be restored before all was checked."""
    with monkeypatch.context() as patch:
        for kind in (torch.nn.Module, torch.optim.Optimizer):
            patch.setattr(kind, "load_state_dict", lambda *_, **__: pytest.fail("restored"))
        yield patch


def test_weights_that_do_not_fit(pretrained, folder, tmp_path, not_restored):
    """One line, on each way in."""
    path, last = tmp_path / "last.pt", read(pretrained)
    model = last["model"]
    broken = {what: {**model, WEIGHT: change(model[WEIGHT])} for what, change in TENSORS.items()}
    broken |= {"key": {key: value for key, value in model.items() if key != "norm.weight"},
               "block": {key: value for key, value in model.items() if "blocks.3." not in key},
               "encoder": {key: value for key, value in model.items() if "decoder" in key}}
    zeros = torch.zeros(3)
    for value in (*broken.values(), None, [1, 2], zeros, {0: zeros}, {"a": zeros}):
        torch.save({**last, "model": value}, path)
        refused("last.pt'", "mae", folder, tmp_path)
        refused("last.pt'", "mae", folder, tmp_path / "new", "--init_from", path)
        refused("last.pt'", finetune.load_encoder, path)
    for position in (model["pos_embed"][0], model["pos_embed"][:, 1:], None):
        torch.save({**last, "model": {**model, "pos_embed": position}}, path)
        refused("last.pt'", finetune.load_encoder, path)
    torch.save({**last, "model": {**model, "x": {}}}, path)
    refused("expected nothing, found dict", "mae", folder, tmp_path)
    torch.save({**last, "model": {**model, "blocks.a.x": torch.zeros(3)}}, path)
    refused("expected nothing, found float32", "mae", folder, tmp_path)
    refused("last.pt'", finetune.load_encoder, path)
    torch.save({**last, "model": {key: value.half() for key, value in model.items()}}, path)
    refused(r"\]: expected float32 strided .*, found float16 strided", "mae", folder, tmp_path)
    not_restored.undo()
    train("mae", folder, tmp_path / "half", "--init_from", path)        # weights may be of any precision
    assert finetune.load_encoder(path)[0]["norm.weight"].dtype == torch.float16


STATES = {      # what may be wrong with the rest of a checkpoint at step 3 of 6
    "model": (), "scaler": (), "optimizer": (None, {}, {"state": {}}, {"state": {0: 1}}), "code": (None, "x", "a b c"),
    "step": (-5, 0, 2.5, "x", True, 7, torch.tensor(3)), "method": ("emae", None), "names": (None, ["a"] * 5, []),
    "args": (None, 3, [], {}, "x", {"epochs": torch.zeros(3)}), "totals": (None, "x", (), [[1.0]], [[math.nan, 1.0]]),
    "count": (0, 4, math.nan, "x"), "seconds": (0, math.inf, None), "lr": (-1, math.inf, []),
    "skipped": (None, [1], {"a": "x"})}


def test_states_that_do_not_fit(folder, tmp_path, not_restored):
    """Every part of a checkpoint but its weights: one line, and nothing is restored."""
    output = tmp_path / "out"
    cut_off("mae", 3, folder, output)
    last = read(output)
    assert last.keys() == STATES.keys()
    wrong = [{**last, part: value} for part, values in STATES.items() for value in values]
    wrong += [{key: value for key, value in last.items() if key != part} for part in STATES]
    state = last["optimizer"]["state"]
    others = [{**state[3], "exp_avg": change(state[3]["exp_avg"])} for change in TENSORS.values()]
    others += [{**state[3], "step": 1.0}, {**state[3], "more": 1}, {"step": state[3]["step"]}]
    wrong += [{**last, "optimizer": {"state": {**state, 3: other}}} for other in others]
    for changed in wrong:
        torch.save(changed, output / "last.pt")
        refused("last.pt'?(:| is| cannot)", "mae", folder, output)
    not_restored.undo()
    for each in state.values():                                 # the same numbers in another order in memory
        each["exp_avg"] = each["exp_avg"].transpose(0, -1).contiguous().transpose(0, -1)
    torch.save({**last, "optimizer": {"state": state}}, output / "last.pt")     # groups (rates) are the script's own
    train("mae", folder, output)
    train("mae", folder, tmp_path / "whole")
    assert state_of(output) == state_of(tmp_path / "whole")


def test_files_that_are_not_to_be_trusted(pretrained, folder, tmp_path, monkeypatch):
    """Cut short, with a flipped bit, no checkpoint, or with code in it, which is not run: one line on each way in."""
    monkeypatch.chdir(tmp_path)
    whole, last, path = (pretrained / "last.pt").read_bytes(), read(pretrained), tmp_path / "last.pt"

    def all_refuse(message):
        refused(message, "mae", folder, tmp_path)
        refused(message, "mae", folder, tmp_path / "new", "--init_from", path)
        refused(message, finetune.load_encoder, path)
        assert not (tmp_path / "code_has_run").exists()
    for evil in ({**last, "extra": Evil()}, {**last, "model": {**last["model"], WEIGHT: Evil()}}, Evil()):
        torch.save(evil, path)
        all_refuse("cannot be used as a checkpoint")
        path.write_bytes(pickle.dumps(evil))
        all_refuse("cannot be used as a checkpoint")
    for content in (whole[:len(whole) // 2], whole[:-100], b"", b"hello", whole[:1000] + bytes(1000) + whole[2000:]):
        path.write_bytes(content)
        all_refuse("cannot be used as a checkpoint|is damaged")
    with zipfile.ZipFile(pretrained / "last.pt") as file:
        record = max(file.infolist(), key=lambda info: info.file_size)
    flipped = bytearray(whole)
    flipped[record.header_offset + record.file_size // 2] ^= 1
    path.write_bytes(flipped)
    all_refuse(f"is damaged: checksum mismatch in {record.filename}")
    torch.save([1, 2], path)
    all_refuse("holds no dict, but list")
    path.unlink()
    os.mkfifo(path)             # is not waited for
    all_refuse("no checkpoint at")
    path.unlink()
    shutil.copy(pretrained / "encoder.pt", path)
    refused("cannot be used as a checkpoint", "mae", folder, tmp_path)


def test_nothing_is_unpickled_unsafely():
    """Every load in the repository's programs is a safe one, and nothing else unpickles."""
    safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
    loads = 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("results/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())) if not path.name.startswith("test_") else ():
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve"} & names, path
            if isinstance(node, ast.Call) and re.match(r"(torch|np|numpy)\.load$", ast.unparse(node.func)):
                assert safe[ast.unparse(node.func)] in map(ast.unparse, node.keywords), path
                loads += 1
    assert loads >= 1


# ---------------------------------------------------------------------------------------------------------------------
# Values that are not finite, and precision
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mae", "finetune"])
def test_a_run_that_diverges_stops(name, folder, tmp_path, capsys):
    """With the step, the rate, the gradient's norm and advice, and exit code 1; what was saved before is finite."""
    words = words_of(name, folder, tmp_path, *"--blr 1e30 --epochs 6 --warmup_epochs 5.9 --save_minutes 1e-9".split())
    assert command(name, words) == 1
    expected = (r"\.py: error: not finite in step (\d+): loss \S+, gradient norm \S+, learning rate (\S+), norm of "
                r"the weights by now \S+\. The last checkpoint, if any, is from before\. Resume with --amp none or a "
                r"smaller --clip_grad, or start over with a lower rate")
    said = re.search(expected, capsys.readouterr().err)
    step, args = int(said[1]) - 1, module(name).get_args(words)
    if name == "finetune":
        finetune.fill_recipe(args, 128)
    assert float(said[2]) == pytest.approx(module(name).learning_rate(step / 3, args), rel=1e-4)
    if (tmp_path / "last.pt").exists():
        last = read(tmp_path)
        assert last["step"] <= step and all(x.isfinite().all() for x in last["model"].values() if x.is_floating_point())
    else:
        assert step <= 1


def test_what_is_not_finite():
    """A loss, a gradient's norm, a weight; in float16 a gradient may overflow while the scaler's scale is 1 or more."""
    model, nan, inf = torch.nn.Linear(2, 2), math.nan, math.inf
    off, on, low = (torch.amp.GradScaler("cpu", enabled=scale > 0, init_scale=scale) for scale in (0.0, 4.0, 0.5))

    def check(rows, scaler=off):
        runs.check_finite([(i, 0.1 * i, torch.tensor(row)) for i, row in enumerate(rows, 7)], model, scaler)
    check([[1.0, 5.0, 2.0]] * 3)
    check([[1.0, 5.0, inf]] * 3, on)
    for rows, scaler, step in (([[1.0, 2.0], [nan, 2.0], [nan, nan]], off, 8), ([[1.0, 2.0], [1.0, inf]], off, 8),
                               ([[inf, 2.0], [1.0, 2.0]], off, 7), ([[1.0, 2.0], [nan, inf]], on, 8),
                               ([[1.0, inf]], low, 7)):
        with pytest.raises(FloatingPointError, match=rf"in step {step + 1}: .*learning rate {0.1 * step:g}"):
            check(rows, scaler)
    with torch.no_grad():
        model.bias[1] = nan         # a weight alone: reported at the last step
    with pytest.raises(FloatingPointError, match="in step 9: loss 1, gradient norm 2, .*weights by now nan"):
        check([[1.0, 2.0]] * 2)


def test_no_weight_that_is_not_finite_is_saved(folder, tmp_path, monkeypatch):
    """Not even where loss and gradients look well."""
    def build_model(args, build=mae.build_model):
        models.append(build(args))
        models[0].register_buffer("patch_mean", torch.zeros(1))
        return models[-1]
    models = []
    monkeypatch.setattr(mae, "build_model", build_model)
    with at_step("mae", 4, lambda: models[0].patch_mean.fill_(math.inf)):
        with pytest.raises(FloatingPointError, match="in step 5: loss 1"):
            train("mae", folder, tmp_path, "--save_minutes", "1e-9")
    assert read(tmp_path)["step"] == 4


@pytest.mark.parametrize("name", ["mae", "finetune"])
def test_clipping(name, folder, tmp_path):
    """AdamW's first moment after one step is (1 - β1) times the gradient: clipped, its norm is the limit's share."""
    norms, gradients = [], []
    for output, limit in ((tmp_path / "no", []), (tmp_path / "yes", ["--clip_grad", "0.001"])):
        cut_off(name, 1, folder, output, "--save_minutes", "1e-9", *limit)
        gradients.append(torch.cat([x.flatten() for x in moments(output, "exp_avg")]))
        norms.append(read(output)["totals"][0][-1])
    assert norms[0] == norms[1] > 0.01 and read(output)["step"] == 1    # what is reported is the norm before clipping
    assert gradients[0].norm().item() == pytest.approx(0.1 * norms[0], rel=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0] * 0.001 / norms[0], atol=1e-8, rtol=1e-3)


def test_float16_with_a_scaler(folder, tmp_path, monkeypatch):
    """On the CPU too: it trains, skips steps that overflow, and goes on exactly, the scaler's state included."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**21, growth_interval=2)     # else 2000 steps
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    steps = keep_each(monkeypatch)
    train("mae", folder, tmp_path, "--amp", "fp16", "--save_minutes", "1e-9")
    whole, scales = state_of(tmp_path), [read(tmp_path, f"{step}.pt")["scaler"]["scale"] for step in steps]
    assert scales[0] == 2.0**20 and max(map(operator.truediv, scales[1:], scales)) == 2
    for step in (1, 4):
        shutil.copy(tmp_path / f"{step}.pt", tmp_path / "last.pt")
        train("mae", folder, tmp_path, "--amp", "fp16")
        assert state_of(tmp_path) == whole
    shutil.copy(tmp_path / "1.pt", tmp_path / "last.pt")
    train("mae", folder, tmp_path, "--amp", "none")             # without the scaler's state
    assert read(tmp_path)["step"] == 6
    scaler.keywords["init_scale"] = 2.0**10
    for amp in ("fp16", "none"):
        train("mae", folder, tmp_path / amp, "--amp", amp)
    half, single = ([line["grad_norm"] for line in log_of(tmp_path / amp)] for amp in ("fp16", "none"))
    assert half == pytest.approx(single, rel=0.05)              # unscaled


# ---------------------------------------------------------------------------------------------------------------------
# Bad files in the data
# ---------------------------------------------------------------------------------------------------------------------
def spoil(root):
    """Images that can't be read, of every kind, beside the whole ones; returns their names."""
    photo(3, (400, 300)).save(root / "whole.jpg", quality=95)
    jpg, png = (root / "whole.jpg").read_bytes(), next((root / "class 0 é").iterdir()).read_bytes()
    (root / "whole.jpg").unlink()
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (20000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    broken = {"cut short.jpg": jpg[:len(jpg) // 2], "cut short é.png": png[:len(png) // 2], "no bytes.jpg": b"",
              "text.jpg": b"I am not an image.",
              "bomb.png": header + zlib.crc32(header[12:]).to_bytes(4, "big")}      # 20,000 × 20,000 pixels in 33 bytes
    for name, content in broken.items():
        (root / "class 1 é" / name).write_bytes(content)
    (root / "class 1 é" / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "class 1 é" / "pipe.jpg")          # is not waited for
    (root / "class 3, empty").mkdir()
    return {*broken, "dangling.jpg", "pipe.jpg"}


def test_bad_files_stop_a_run_by_their_path(folder, tmp_path, monkeypatch):
    """From a worker, too; and a file that may not be read (as root one may read anything: the refusal is made here)."""
    (tmp_path / "all").mkdir()
    shutil.copytree(folder / "train", tmp_path / "all", dirs_exist_ok=True)
    for name in spoil(tmp_path / "all"):
        data = tmp_path / name.split(".")[0]
        shutil.copytree(folder / "train", data)
        os.rename(tmp_path / "all/class 1 é" / name, data / "class 1 é" / name)
        refused(rf"{name}' cannot be used as an image: .*; more such files than the 0 that may be skipped", "mae", data,
                tmp_path / "out", "--batch_size", "49", "--num_workers", int(name == "no bytes.jpg"))

    def refuse(path, *arguments, open=open, **more):
        if str(path).endswith("003.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *arguments, **more)
    monkeypatch.setattr("builtins.open", refuse)
    refused("003.png' cannot be used as an image: PermissionError", "mae", folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["mae", "finetune"])
def test_skipping_bad_files(name, folder, tmp_path, capsys, monkeypatch):
    """Each is replaced, the same way whatever loads it, counted once and listed in the epoch that met it first, also by
    a run that resumes. finetune.py evaluates after it has skipped files."""
    data, more, states = shutil.copytree(folder, tmp_path / "data"), ["--skip_bad", "7", "--epochs", "3"], []
    bad = spoil(data / "train")
    keep_each(monkeypatch)
    for workers, minutes in (("0", "inf"), ("2", "1e-9")):
        output = tmp_path / workers
        train(name, data, output, *more, "--num_workers", workers, "--save_minutes", minutes)
        states.append(state_of(output))
        assert capsys.readouterr().err.count("skipped: ") == states[0]["log"][-1]["skipped"]
    for step in (1, 5):
        shutil.copy(output / f"{step}.pt", output / "last.pt")
        train(name, data, output, *more, "--num_workers", "2")
        states.append(state_of(output))
    refused("more such files than the 2 that may be skipped", name, data, tmp_path / "few", *more, "--skip_bad", "2")
    train(name, data, tmp_path / "few", *more)          # and goes on
    assert all(state == states[0] for state in [*states, state_of(tmp_path / "few")])
    log = states[0]["log"]
    found = [next(name for name in bad if f"/{name}'" in reason) for line in log for reason in line["newly_skipped"]]
    assert len(found) == len(set(found)) == log[-1]["skipped"] >= 5 and set(found) <= bad
    assert [line["skipped"] for line in log] == np.cumsum([len(line["newly_skipped"]) for line in log]).tolist()


def test_what_replaces_a_bad_file(folder, tmp_path):
    """The next that can be read, its label too, cropped as the bad one's epoch and index say; around the end. In
    evaluation nothing is replaced."""
    data = shutil.copytree(folder, tmp_path / "data")
    paths = sorted((data / "train").rglob("*.png"))
    for path in (paths[4], paths[5], paths[-1], data / "val" / "class 0 é" / "000.png"):
        path.write_bytes(b"")
    source = common.load_dataset(str(data), "train")
    crops = common.Crops(source, common.train_transform(32, (0.2, 1.0)), seed=1, skip_bad=2)
    img, label, skipped = crops[2, 4]
    with torch.random.fork_rng():
        torch.manual_seed(common.seed_from(1, 2, 4))
        assert torch.equal(img, crops.transform(source[6][0])) and label == source[6][1]
    assert list(skipped.values()) == [2, 2] and all(str(p) in r for p, r in zip(paths[4:6], skipped))
    assert crops[0, 47][1] == source[0][1] and len(crops[0, 47][2]) == 1
    refused("000.png' cannot be used as an image", "finetune", data, tmp_path / "out", "--skip_bad", "9")
    shutil.copytree(folder / "val", data / "val", dirs_exist_ok=True)
    refused("more such files than the 2", "finetune", data, tmp_path, "--mode", "knn", "--skip_bad", "2")
    assert train("finetune", data, tmp_path, "--mode", "knn", "--skip_bad", "3")["images"] == 21
    for path in paths:
        path.write_bytes(b"")
    refused("cannot be used.*; no other is left", common.Crops(source, crops.transform, 1, 1000).__getitem__, (0, 4))
    with pytest.raises(InputError, match="cannot be used") as caught:
        common.Crops(source, crops.transform, 1)[0, 4]
    assert "skipped" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_gradients_of_one_two_and_three_processes(name, folder, tmp_path, together, monkeypatch):
    """One step on the same 12 images, through the script's own main. In as many parts in all, each with its own masks,
    dropout and drop path, gradients agree; with masks that are given (and no dropout or drop path), in any parts.
    Then each process holds the same model, bit for bit: SdAE's teacher and Eq. 3's statistics included.

    What rounding does to a sum grows with its terms, not with the sum, and their order is each CPU's own. So the runs
    are in float64, where rounding is under 1e-12 of the largest gradient, on any CPU, and a wrong term far above.
    """
    noise, data = torch.rand(12, 16, dtype=torch.float64), tmp_path / "data"
    (data / "a").mkdir(parents=True)
    for i in range(12):
        photo(i).save(data / f"a/{i}.png")

    def build_model(args, build=module(name).build_model):
        model, parts, rank, size = build(args), itertools.count(), *runs.check_processes()

        def fixed(imgs, forward=model.forward):         # masks by an image's place in the global batch alone
            first = (next(parts) * size + rank) * len(imgs)
            return forward(imgs, noise[first:first + len(imgs)])
        if given:
            model.forward = fixed
        return model

    def in_float64():
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
        runs.Run.finish = lambda run, **_: print("model", digest(run._model.state_dict().values()))
    monkeypatch.setattr(module(name), "build_model", build_model)
    no_dropout = {"robust_mae": ["--drop_edge", "0"], "sdae": ["--drop_path", "0"]}.get(name, [])
    for given, cases in ((False, ((1, 6), (2, 3), (3, 2))), (True, ((1, 1), (3, 2)))):
        gradients = []
        for size, parts in cases:
            output, more = tmp_path / f"{given} {size} {parts}", no_dropout if given else []
            words = [*"--batch_size 12 --epochs 1 --warmup_epochs 0 --amp none --accum_iter".split(), parts, *more]
            said = together(size, name, small_args(data, output, *words), before=in_float64)
            assert len({re.search("model (.*)", each)[1] for each in said}) == 1
            gradients.append(torch.cat([x.flatten() for x in moments(output, "exp_avg")]))
            assert gradients[-1].dtype == torch.float64 and gradients[-1].abs().max() > 1e-4
            assert (gradients[-1] - gradients[0]).abs().max() < 1e-12 * gradients[0].abs().max()


@pytest.mark.parametrize("mode", ["finetune", "linear", "knn"])
def test_evaluation_by_two_processes(mode, folder, pretrained, tmp_path, together):
    """Each image is counted once; the same crops, mixing and drop path; of linear probing's BatchNorm the statistics
    that are saved."""
    more = ["--ckpt", pretrained / "last.pt", "--amp", "none", "--mode", mode, "--epochs", "1", "--warmup_epochs", "0"]
    one, two = tmp_path / ("two" if mode == "linear" else "one"), tmp_path / "two"
    together(2, "finetune", tune_args(folder, two, *more))
    result = json.loads((two / "result.json").read_text())
    again = train("finetune", folder, one, *more, "--accum_iter", "2")
    assert again["images"] == result["images"] == 21 and again["top1"] == result["top1"]
    if mode == "finetune":
        assert log_of(one)[0] == pytest.approx(log_of(two)[0], rel=1e-4)


def processes_of(text):
    """Processes that have `text` in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text in path.read_text(errors="replace") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def test_torchrun(folder, tmp_path):
    """Its agent is killed: the processes save, and end. One of them is killed: the others end, with a message. Bad
    arguments, which all of them meet, are one line."""
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split(), str(ROOT / "mae.py")]
    output, last = tmp_path / "out", tmp_path / "out/last.pt"
    for victim, said, after in (("agent", "stopped: saved after step", 0), ("process", "exitcode  : -9", 6)):
        with open(tmp_path / victim, "w") as file:
            words = small_args(folder, output, "--epochs", "2000")
            agent = subprocess.Popen([*launch, *words], stdout=file, stderr=file)
        text = (tmp_path / victim).read_text
        try:
            step = read(output)["step"] if after else 0
            until(lambda: agent.poll() is not None or last.exists() and read(output)["step"] > step, text)
            ranks = set(processes_of(str(output))) - {agent.pid}
            assert agent.poll() is None and len(ranks) == 2, text()
            os.kill(agent.pid if victim == "agent" else min(ranks), signal.SIGKILL)
            assert agent.wait(60) == (-9 if victim == "agent" else 1)
            until(lambda: not processes_of(str(output)), text)
        finally:
            for pid in processes_of(str(output)):
                os.kill(pid, signal.SIGKILL)
        assert said in text()
    done = subprocess.run([*launch, "--epochs", "0"], capture_output=True, text=True)
    lines = done.stderr.count("mae.py: error: argument --epochs: 0 is not in [1, inf)")
    assert done.returncode == 1 and 1 <= lines <= 2     # 2 if, on a busy machine, the second is 3 s ahead
    done = subprocess.run([launch[0], launch[-1], "--epochs", "0"], capture_output=True, text=True)      # alone
    assert done.returncode == 2 and done.stderr == "mae.py: error: argument --epochs: 0 is not in [1, inf)\n"


def test_what_one_process_meets(monkeypatch, capsys):
    """Is printed by that process, after what the first one would have said by now."""
    waited = []
    monkeypatch.setattr(runs.time, "sleep", waited.append)
    for rank, wait in (("0", []), ("1", [True])):
        monkeypatch.setenv("RANK", rank)
        assert command("mae", ["--epochs", "0"]) == 2 and [second >= 3 for second in waited] == wait
        assert "mae.py: error: argument --epochs" in capsys.readouterr().err


@pytest.mark.parametrize("environment, said", [
    ("WORLD_SIZE=abc", "WORLD_SIZE=abc, which must be an integer ≥ 1"),
    ("WORLD_SIZE=0", "WORLD_SIZE=0, which must be"), ("WORLD_SIZE=-1", "WORLD_SIZE=-1, which must be"),
    ("WORLD_SIZE=2", "RANK, MASTER_ADDR, MASTER_PORT not set"),
    ("RANK=0", "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
    ("LOCAL_RANK=x", "LOCAL_RANK=x, which must be an integer"),
    ("RANK=-1 WORLD_SIZE=2 MASTER_ADDR=x MASTER_PORT=1", "RANK=-1, which must be an integer ≥ 0"),
    ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=x MASTER_PORT=1", "RANK is 2, which must be less than WORLD_SIZE, 2")])
def test_environments(environment, said, folder, tmp_path, monkeypatch):
    """A process would silently train on, or count, its share alone."""
    for each in environment.split():
        monkeypatch.setenv(*each.split("="))
    for name in ("mae", "finetune"):
        refused(said, name, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
