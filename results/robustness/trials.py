"""Kills, signals, full disks and dying processes, tried on the five scripts and finetune.py for real; Linux, as root
for the disks.

    python results/robustness/trials.py kills 100       # SIGKILL at random moments, until so many
    python results/robustness/trials.py signals disks deaths memory

Every run that was interrupted is started again with the same command until it ends, and is then compared with one that
was not: weights and optimiser bit for bit, the log but for times and rates. Prints one line a trial; exit code 1 where
something differs.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
WORK = Path(tempfile.mkdtemp())
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
# processes, loader workers a process, further arguments
SETUPS = {"mae": (1, 2, ["--clip_grad", "1"]), "emae": (2, 0, []), "efficient_mae": (1, 1, ["--accum_iter", "2"]),
          "robust_mae": (1, 0, ["--mid_ratio", "0.25"]), "sdae": (3, 1, []),
          "finetune": (1, 1, ["--ckpt", "none"])}
failures = []


def say(*words):
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def expect(right, what):
    if not right:
        failures.append(what)
        say("WRONG:", what)


def images(root, number=512):
    for i in range(number + 40):
        path = root / ("train" if i < number else "val") / f"class {i % 4}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = np.random.RandomState(i).randint(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    (root / "train" / "class 0" / "broken.png").write_bytes(b"no image")
    return root


def command(name, output, *more, epochs=25):
    processes, workers, own = SETUPS[name]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    decoder = ["--decoder_embed_dim", "32", "--decoder_depth", "1", "--decoder_num_heads", "2"]
    return [sys.executable, *launch, f"{name}.py", "--data", WORK / "images", "--output_dir", output,
            "--model", "vit_micro", "--img_size", "32", "--patch_size", "8", "--batch_size", "60", "--epochs", epochs,
            "--warmup_epochs", "2", "--num_workers", workers, "--skip_bad", "1", "--save_minutes", "0.01",
            *decoder * (name != "finetune"), *own, *more]


def start(words):
    """A run in a session of its own; what it prints goes into a file."""
    out = tempfile.NamedTemporaryFile("w+", dir=WORK, delete=False)
    run = subprocess.Popen([str(word) for word in words], cwd=ROOT, env=ENV, stdout=out, stderr=out,
                           start_new_session=True)
    run.said = lambda: Path(out.name).read_text().replace("\r", "\n")
    return run


def children(pid):
    """All processes below one, the nearest first."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found] + [below for child in found for below in children(int(child))]


def left_behind():
    """Processes of our runs that are still there, a moment after they should be gone."""
    for _ in range(80):
        there = subprocess.run(["pgrep", "-f", str(WORK / "images")], capture_output=True, text=True).stdout.split()
        if not there:
            return []
        time.sleep(0.1)
    return there


def state(output):
    """Weights and optimiser as bytes, and the log but for times and rates."""
    last = torch.load(output / "last.pt", weights_only=True)
    flat = [*last["model"].values(), *(x for p in last["optimizer"]["state"].values() for x in p.values())]
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return last["step"], [x.numpy().tobytes() for x in flat], [
        {key: value for key, value in line.items() if key not in ("seconds", "images_per_s")} for line in log]


def where(output):
    """What an interrupted run has left, in words."""
    step = torch.load(output / "last.pt", weights_only=True)["step"] if (output / "last.pt").exists() else 0
    leftover = " (while saving)" * bool(list(output.glob("*.tmp")))
    return f"step {step}{', mid-epoch' * (step % 8 > 0)}{leftover}"


def finish(name, output, *more):
    run = start(command(name, output, *more))
    run.wait()
    expect(run.returncode == 0, f"{name} ended with {run.returncode}: {run.said()[-400:]}")


def reference(name):
    output = WORK / f"{name}_whole"
    if not output.exists():
        begin = time.time()
        finish(name, output)
        say(f"{name}: uninterrupted run of {state(output)[0]} steps, {time.time() - begin:.0f} s")
    return state(output)


def compare(name, output):
    whole, broken = reference(name), state(output)
    same = [a == b for a, b in zip(whole, broken)]
    expect(all(same), f"{name}: step, state, log equal: {same}")
    expect(not list(output.glob("*.tmp")), f"{name}: {list(output.iterdir())}")
    return "equal" if all(same) else "DIFFERENT"


def kills(number):
    done, saving = 0, 0
    names = list(SETUPS)
    output, name = None, None
    quota = {name: number // len(names) + (i < number % len(names)) for i, name in enumerate(names)}
    for name in names:
        reference(name)
        begin, run = time.time(), start(command(name, WORK / f"{name}_first"))
        while "effective batch" not in run.said():
            time.sleep(0.05)
        startup = time.time() - begin
        for pid in (*children(run.pid), run.pid):
            os.kill(pid, signal.SIGKILL)
        run.wait(), left_behind()
        mine, round_ = 0, 0
        while mine < quota[name]:
            output, round_ = WORK / f"{name}_killed_{round_}", round_ + 1
            while mine < quota[name]:
                run = start(command(name, output))
                delay = random.uniform(0.7 * startup, startup + 4)
                try:
                    run.wait(timeout=delay)
                    break                                       # it has ended
                except subprocess.TimeoutExpired:
                    tree = children(run.pid)
                    torchrun = SETUPS[name][0] > 1
                    victims = [random.choice(tree)] if torchrun and tree and random.random() < 0.3 else [run.pid, *tree]
                    for pid in victims:
                        try:
                            os.kill(pid, signal.SIGKILL)
                        except ProcessLookupError:
                            pass
                    run.wait()
                    if len(victims) > 1:        # children born meanwhile
                        subprocess.run(["pkill", "-9", "-f", str(output)])
                    mine, done = mine + 1, done + 1
                    left = left_behind()
                    expect(not left, f"{name}: processes left behind {left}")
                    place = where(output) if output.exists() else "nothing written"
                    saving += "while saving" in place
                    one = " (one process)" if len(victims) == 1 and torchrun else ""
                    say(f"kill {done}: {name}{one} after {delay:.1f} s; last.pt: {place}")
            if run.returncode != 0:
                finish(name, output)
            say(f"{name}: went on to the end, {compare(name, output)}")
    say(f"{done} kills, {saving} of them while saving")


def signals():
    for name in SETUPS:
        for number in (signal.SIGTERM, signal.SIGINT, "one process"):
            output = WORK / f"{name}_signal_{number}"
            if number == "one process" and SETUPS[name][0] == 1:
                continue
            run = start(command(name, output))
            while "effective batch" not in run.said():
                time.sleep(0.05)
            time.sleep(random.uniform(1.5, 3))
            begin = time.time()
            if number == "one process":         # one rank alone gets it, as when one machine of several is taken
                ranks = [pid for pid in children(run.pid) if f"{name}.py" in Path(f"/proc/{pid}/cmdline").read_text()]
                os.kill(random.choice(ranks[:SETUPS[name][0]]), signal.SIGTERM)
            else:                               # to every process of the session, loader workers too
                os.killpg(run.pid, number)
            run.wait()
            seconds, left = time.time() - begin, left_behind()
            said = re.findall(r"stopped: saved after step \d+", run.said())
            expect(run.returncode and len(said) == 1 and not left, f"{name}: {left} {run.said()[-900:]}")
            place = where(output)
            finish(name, output)
            say(f"{name} {getattr(number, 'name', number)}: exit code {run.returncode} after {seconds:.1f} s, {said}, "
                f"last.pt: {place}; the same command went on to the end, {compare(name, output)}")


def disks():
    disk = WORK / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], check=True)
    try:
        for trouble in ("full", "read-only"):
            output = disk / trouble
            run = start(command("mae", output))
            while not (output / "last.pt").exists():
                time.sleep(0.05)
            if trouble == "full":
                try:
                    with open(disk / "filler", "wb") as filler:
                        while True:
                            filler.write(bytes(10**5))
                            filler.flush()
                except OSError:
                    pass
            else:
                while subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
                    time.sleep(0.01)
            run.wait()
            error = re.search(r"\w+\.py: error: .*", run.said())[0]
            say(f"disk {trouble}: exit code {run.returncode}: {error}; left: {where(output)}, "
                f"{sorted(path.name for path in output.iterdir())}")
            expect(run.returncode == 1 and "Traceback" not in run.said(), run.said()[-900:])
            again = start(command("mae", output))
            again.wait()
            say(f"disk {trouble}, started: exit code {again.returncode}: {again.said().strip().splitlines()[-1]}")
            expect(again.returncode == 2 and len(again.said().strip().splitlines()) == 1, again.said()[-900:])
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            (disk / "filler").unlink(missing_ok=True)
            finish("mae", output)
            say(f"disk mended: the same command went on to the end, {compare('mae', output)}")
            shutil.rmtree(output)
    finally:
        subprocess.run(["umount", "-l", str(disk)])


def deaths():
    for name in ("emae", "sdae"):
        for rank in (0, 1):
            output = WORK / f"{name}_death_{rank}"
            run = start(command(name, output))
            while "effective batch" not in run.said():
                time.sleep(0.05)
            time.sleep(2)
            ranks = [pid for pid in children(run.pid) if os.path.exists(f"/proc/{pid}")
                     and f"\nRANK={rank}\n" in Path(f"/proc/{pid}/environ").read_text().replace("\0", "\n")]
            begin = time.time()
            os.kill(ranks[0], signal.SIGKILL)
            run.wait()
            seconds, left = time.time() - begin, left_behind()
            expect(run.returncode and seconds < 30 and not left, f"{name}: {run.returncode} {left}")
            found = re.findall(r"rank +: (\d).*\n.*exitcode +: (-?\d+)", run.said())
            finish(name, output)
            say(f"{name}: process {rank} of {SETUPS[name][0]} killed: down after {seconds:.1f} s, exit code "
                f"{run.returncode}, torchrun says (rank, exit code) {found}; the same command went on to the end, "
                f"{compare(name, output)}")


def memory():
    for name in SETUPS:
        output = WORK / f"{name}_memory"
        run = start(command(name, output, "--save_minutes", "inf", epochs=120))
        samples = {}
        while run.poll() is None:
            time.sleep(0.2)
            epoch = len((output / "log.jsonl").read_text().splitlines()) if (output / "log.jsonl").exists() else 0
            tree = [run.pid, *children(run.pid)]
            sizes = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20 for pid in tree
                     if os.path.exists(f"/proc/{pid}/statm")]
            samples.setdefault(8 * epoch, []).append(sum(sizes))
        medians = {step: float(np.median(values)) for step, values in samples.items()}
        begin, early, late = (np.mean([value for step, value in medians.items() if first <= step < first + 80])
                              for first in (80, 640, 880))
        say(f"{name}: resident memory of all processes, MiB: {begin:.1f} at steps 80 to 160, {early:.1f} at 640 to "
            f"720, {late:.1f} at 880 to 960")
        expect(run.returncode == 0 and late - early < 3, f"{name}: {run.said()[-400:]}")


if __name__ == "__main__":
    seed = int(os.environ.get("SEED", 0))
    random.seed(seed)
    say(f"torch {torch.__version__}, Python {sys.version.split()[0]}, seed {seed}, {' '.join(sys.argv[1:])}")
    images(WORK / "images")
    trials = sys.argv[1:]
    try:
        while trials:
            trial = trials.pop(0)
            kills(int(trials.pop(0))) if trial == "kills" else globals()[trial]()
    finally:
        subprocess.run(["pkill", "-9", "-f", str(WORK / "images")])
        shutil.rmtree(WORK, ignore_errors=True)
    say("all as expected" if not failures else f"{len(failures)} failures")
    sys.exit(bool(failures))
