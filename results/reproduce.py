"""Do the papers' claims hold? Tried at small scale on CIFAR-10: pre-trains, evaluates, and writes what was found beside
what the papers say.

    python results/reproduce.py --scale cpu --data DIR                # under three hours on two cores
    python results/reproduce.py --scale gpu --data DIR --minutes 9    # again and again, until it says that all is done
    python results/reproduce.py --scale cpu --table                   # only the table, from the files that are there

DIR holds CIFAR-10 as files, train/CLASS/*.jpg and val/CLASS/*.jpg. The same command goes on where it stopped. What is
found goes to results/reproduce/SCALE/: each run's log, and the result of each evaluation; the table is made from these
files alone. Everything is trained and evaluated alike: encoder, decoder, batches, the order of the images, crops
(MAE's, for Robust MAE too), learning rate and number of epochs. At scale cpu the batch and the rate of MAE, and those
of its probe, were chosen among four and three trials on 10,000 images; nothing was tuned for any of the others: what
is a method's own (consistency weight 1, γ 0.6, β 26 pixels at patches of 16, drop edge 0.3, three folds, …) has the
script's default, the paper's, or the flags in the table. Two things are SdAE's at scale cpu. Its teacher averages over
as much of the run as the paper's, a twelfth at its beginning to a third at its end (momentum 0.96 to 0.99 an epoch, of
300); the script's default for short runs would leave 18 % of the untrained teacher at the end of those on few images.
And its rows on few images, which are compared with each other alone, have 20 epochs: after 8 none of them has learnt.
"""
import argparse
import concurrent.futures
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import visualize
from common import InputError, normalize
from runs import number

ROOT = Path(__file__).resolve().parent.parent

# few_epochs: of runs on few images; sdae_epochs: the same, of SdAE. labels: whether runs on all images are evaluated
# with all labels, or with those of the few. teacher: SdAE's flags, in runs on all images and on few. more_seeds: of MAE
# on the few, to see how far apart seeds are
SCALES = {
    "cpu": dict(
        size="--model vit_micro --img_size 32 --patch_size 4", batch=64, blr=8e-3, epochs=8, few_epochs=8,
        sdae_epochs=20, seeds=[0], more_seeds=[1, 2],
        decoder="--decoder_embed_dim 64 --decoder_depth 1 --decoder_num_heads 2", labels="few",
        teacher=["--momentum 0.998 0.9995", "--momentum 0.996 0.999"],
        linear="--epochs 3 --warmup_epochs 0.5 --batch_size 64 --blr 40 --crop_scale 0.3 1",
        finetune="--epochs 5 --warmup_epochs 0.5 --batch_size 64 --blr 4e-3 --crop_scale 0.3 1 --drop_path 0 "
                 "--layer_decay 1 --no-rand_augment --mixup 0 --cutmix 0 --erasing 0"),
    "gpu": dict(
        size="--model vit_tiny --img_size 32 --patch_size 4", batch=512, blr=1e-3, epochs=200, few_epochs=200,
        sdae_epochs=200, seeds=[0], more_seeds=[1, 2],
        decoder="--decoder_embed_dim 192 --decoder_depth 4 --decoder_num_heads 3", labels="all", teacher=["", ""],
        linear="--epochs 20 --warmup_epochs 2 --batch_size 512 --blr 5 --crop_scale 0.3 1",
        finetune="--epochs 30 --warmup_epochs 3 --batch_size 512 --blr 1e-3 --crop_scale 0.3 1 --layer_decay 1"),
}

# Runs: name, script, its flags, and for how many times fewer epochs. First those on all 50,000 images, then, on the
# first 1000 images of each class ("few"), the rows of the papers' ablations
MAIN = [("mae", "mae.py", "", 1), ("emae", "emae.py", "", 1), ("efficient_mae", "efficient_mae.py", "", 1),
        ("robust_mae", "robust_mae.py", "", 1), ("sdae", "sdae.py", "", 1), ("emae_quarter", "emae.py", "", 4)]
FEW = [("few_mae", "mae.py", "", 1), ("few_mae_85", "mae.py", "--mask_ratio 0.85", 1),
       ("few_mae_90", "mae.py", "--mask_ratio 0.9", 1), ("few_mae_7_8", "mae.py", "--mask_ratio 0.875", 1),
       ("few_mae_raw", "mae.py", "--no-norm_pix", 1), ("few_mae_decoder", "mae.py", "--decoder_depth 4", 1),
       ("few_emae", "emae.py", "", 1), ("few_emae_whole", "emae.py", "--consistency_weight 0", 1),
       ("few_emae_tenth", "emae.py", "--consistency_weight 0.1", 1), ("few_emae_8", "emae.py", "--parts 8", 1),
       ("few_emae_8_whole", "emae.py", "--parts 8 --consistency_weight 0", 1),
       ("few_efficient", "efficient_mae.py", "", 1), ("few_efficient_90", "efficient_mae.py", "--mask_ratio 0.9", 1),
       ("few_efficient_75", "efficient_mae.py", "--mask_ratio 0.75", 1),
       ("few_efficient_loss", "efficient_mae.py", "--beta inf", 1),
       ("few_efficient_dropping", "efficient_mae.py", "--gamma 0", 1),
       ("few_robust", "robust_mae.py", "", 1), ("few_robust_targets", "robust_mae.py", "--drop_edge 0", 1),
       ("few_robust_raw", "robust_mae.py", "--target none --drop_edge 0", 1),
       ("few_robust_drop", "robust_mae.py", "--target rgb", 1),
       ("few_robust_mid", "robust_mae.py", "--target rgb --drop_edge 0 --mid_ratio 0.25", 1),
       ("few_sdae", "sdae.py", "", 1), ("few_sdae_features", "sdae.py", "--cosine_over features", 1),
       ("few_sdae_masked", "sdae.py", "--teacher_input masked", 1),
       ("few_sdae_crop", "sdae.py", "--teacher_input crop", 1),
       ("few_sdae_full", "sdae.py", "--teacher_input full --cosine_over features", 1),
       ("few_sdae_full_raw", "sdae.py", "--teacher_input full --cosine_over features --no-teacher_norm", 1)]
CONSISTENCY = ["mae", "emae", "emae_quarter", "few_mae", "few_emae", "few_emae_tenth", "few_emae_whole"]

# Claims: what a paper says, its figures (the table says of what), the run that should be better ("≈": as good), the one
# to be beaten ("against": no one says which), the measure. "–": our own question
CLAIMS = [
    ("MAE: targets normalised by patch beat raw ones, linear", "73.9, 73.5 % (800 epochs, Table 1d)", "few_mae",
     "few_mae_raw", "linear"),
    ("MAE: a decoder of four blocks beats one of one, linear", "71.9, 65.5 % (800 epochs, Table 1a)",
     "few_mae_decoder", "few_mae", "linear"),
    ("EMAE beats MAE at equal epochs, linear", "68.2, 61.5 % (300 epochs, Table 1)", "emae", "mae", "linear"),
    ("the same, fine-tuned", "83.8, 82.9 % (300 epochs, Table 1)", "emae", "mae", "finetune"),
    ("EMAE against MAE at equal compute, a quarter of the epochs, linear",
     "65.0, 64.4 % (200, 800 epochs, Table 5); no claim of the paper", "emae_quarter", "mae", "linear"),
    ("the same, fine-tuned", "–", "emae_quarter", "mae", "finetune"),
    ("whole-data utilisation alone beats MAE, linear", "65.3, 61.5 % (300 epochs, Table 5)", "few_emae_whole",
     "few_mae", "linear"),
    ("self-consistency adds to it, linear", "68.4, 65.3 % (300 epochs, Table 5)", "few_emae", "few_emae_whole",
     "linear"),
    ("self-consistency of weight 0.1 adds to whole data, linear", "–", "few_emae_tenth", "few_emae_whole", "linear"),
    ("K = 4 beats K = 8 (in the paper 7), linear", "68.4, 66.5 % (300 epochs, Table 6)", "few_emae", "few_emae_8",
     "linear"),
    ("the same, both without self-consistency", "–", "few_emae_whole", "few_emae_8_whole", "linear"),
    ("at K = 8, too, EMAE beats MAE of the same mask ratio, linear", "66.5, 61.0 % (K = 7, 300 epochs, Table 6)",
     "few_emae_8", "few_mae_7_8", "linear"),
    ("EMAE's predictions depend less on the mask than MAE's", "Figures 1, 3", "emae", "mae", "consistency"),
    ("the same at equal compute", "–", "emae_quarter", "mae", "consistency"),
    ("whole data alone makes them depend less on it", "–", "few_emae_whole", "few_mae", "consistency"),
    ("self-consistency makes them depend less on it than whole data alone", "Figure 3", "few_emae", "few_emae_whole",
     "consistency"),
    ("Efficient MAE at 0.85 ≈ MAE at 0.75, fine-tuned",
     "84.6, 84.6 % (200 epochs, Table 4; with a decoder of one block 84.2, Table 9)", "efficient_mae", "mae",
     "finetune"),
    ("and takes less time (`bench.py` measures it: 0.82 at ViT-B)", "20, 27, 30 % less (ViT-B, L, H, Section 5.2)",
     "efficient_mae", "mae", "minutes"),
    ("MAE at 0.75 beats MAE at 0.85", "84.6, 84.1 % fine-tuned (200 epochs, Table 2)", "few_mae", "few_mae_85",
     "linear"),
    ("MAE at 0.75 beats MAE at 0.90", "84.6, 83.7 % fine-tuned (200 epochs, Table 2)", "few_mae", "few_mae_90",
     "linear"),
    ("Efficient MAE beats MAE at 0.85", "84.6, 84.1 % fine-tuned (200 epochs, Table 4)", "few_efficient",
     "few_mae_85", "linear"),
    ("Efficient MAE beats MAE at 0.90", "84.3, 83.7 % fine-tuned (200 epochs, Table 4)", "few_efficient_90",
     "few_mae_90", "linear"),
    ("Efficient MAE against MAE at 0.75", "Figure 1", "few_efficient_75", "few_mae", "linear"),
    ("its loss alone beats MAE at 0.85", "84.5, 84.1 % fine-tuned (200 epochs, Table 8)", "few_efficient_loss",
     "few_mae_85", "linear"),
    ("dropping alone beats MAE at 0.85", "84.3, 84.1 % fine-tuned (200 epochs, Table 8)", "few_efficient_dropping",
     "few_mae_85", "linear"),
    ("both beat the loss alone", "84.6, 84.5 % fine-tuned (200 epochs, Table 8)", "few_efficient",
     "few_efficient_loss", "linear"),
    ("both beat dropping alone", "84.6, 84.3 % fine-tuned (200 epochs, Table 8)", "few_efficient",
     "few_efficient_dropping", "linear"),
    ("Robust MAE beats MAE, fine-tuned", "83.6, 83.3 % (800 epochs, Table 2; its crops of 0.5 to 1, here MAE's)",
     "robust_mae", "mae", "finetune"),
    ("targets standardised over the training set, then by patch, beat those by patch alone",
     "83.28, 81.99 % fine-tuned (800 epochs, Table 1)", "few_robust_targets", "few_robust_raw", "linear"),
    ("such statistics of each place ≈ those of each channel (MAE's)", "83.28, 83.25 % fine-tuned (800 epochs, Table 1)",
     "few_robust_targets", "few_mae", "linear"),
    ("drop edge beats none, statistics of each place", "83.6, 83.28 % fine-tuned (800 epochs, Tables 2, 1)",
     "few_robust", "few_robust_targets", "linear"),
    ("drop edge beats none, statistics of each channel", "–", "few_robust_drop", "few_mae", "linear"),
    ("mid-level tokens beat MAE (here without the rest)", "83.5, 83.3 % fine-tuned (800 epochs, Table 5)",
     "few_robust_mid", "few_mae", "linear"),
    ("SdAE beats MAE, fine-tuned", "84.1, 82.9 % (300 epochs, Table 2)", "sdae", "mae", "finetune"),
    ("the same, linear", "64.9, 61.5 % (300 epochs, Table 2)", "sdae", "mae", "linear"),
    ("folds beat all removed patches as the teacher's input", "84.1, 83.5 % fine-tuned (Table 5)", "few_sdae",
     "few_sdae_masked", "linear"),
    ("folds beat the full image (its cosine over features, as in the released code)",
     "84.1, 84.0 % fine-tuned (Table 5)", "few_sdae", "few_sdae_full", "linear"),
    ("the same, both cosines over features", "–", "few_sdae_features", "few_sdae_full", "linear"),
    ("the full image (its cosine over features) beats all removed patches (theirs over tokens)",
     "84.0, 83.5 % fine-tuned (Table 5)", "few_sdae_full", "few_sdae_masked", "linear"),
    ("folds beat one crop", "fine-tuned (Figure 4b)", "few_sdae", "few_sdae_crop", "linear"),
    ("teacher normalisation beats none (full image)", "84.0, 83.7 % fine-tuned (Table 5)", "few_sdae_full",
     "few_sdae_full_raw", "linear"),
    ("the cosine over tokens against that over features", "–", "few_sdae", "few_sdae_features", "linear"),
    *((f"{name} beats random weights, linear", "–", name, "random", "linear")
      for name in ("mae", "emae", "efficient_mae", "robust_mae", "sdae")),
    *((f"{name}, fine-tuned, beats the same epochs from scratch", "–", name, "random", "finetune")
      for name in ("mae", "emae", "efficient_mae", "robust_mae", "sdae")),
]


def get_args(argv=None):
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--data", type=Path, help="a folder with CIFAR-10's train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--table", action="store_true", help="only write the table, from the files that are there")
    parser.add_argument("--only", nargs="+", help="names of runs")
    parser.add_argument("--minutes", type=number(float, "[0, inf]"), default=float("inf"), help="stop by then")
    parser.add_argument("--jobs", type=number(int, "[1, inf)"), help="runs at a time (default: one a core, on a GPU 4)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results/reproduce", help="for results")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/reproduce", help="for checkpoints")
    args = parser.parse_args(argv)
    args.output_dir, args.runs = args.output_dir.resolve(), args.runs.resolve()
    if not args.table:
        if not args.data or not all((args.data / part).is_dir() for part in ("train", "val")):
            raise InputError("--data must be a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
        args.data = args.data.resolve()
    unknown = set(args.only or []) - {name for name, *_ in plan(args.scale)}
    if unknown:
        raise InputError(f"no such runs: {', '.join(sorted(unknown))}")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------
def plan(scale):
    """All runs: (name, seed, pre-training's words or "random weights", {evaluation: its words}). As --data "few" is
    the folder of 10,000 images, "all" the whole."""
    s = SCALES[scale]
    modes = {"knn": "--mode knn --pool avg", "linear": f"--mode linear --pool avg {s['linear']}",
             "finetune": f"--mode finetune {s['finetune']}"}
    runs = []
    for seed in s["seeds"] + s["more_seeds"]:
        for data, labels, rows, teacher, wanted in (
                ("all", s["labels"], MAIN, s["teacher"][0], ("knn", "linear", "finetune")),
                ("few", "few", FEW, s["teacher"][1], ("linear",))):
            evaluations = {mode: f"finetune.py --data {labels} --seed {seed} {modes[mode]}" for mode in wanted}
            if seed in s["more_seeds"]:
                rows = [row for row in rows if row[0] == "few_mae"]
            else:
                runs.append(("random" if rows is MAIN else "few_random", seed, "random weights", evaluations))
            for name, script, flags, fewer in rows:
                length = epochs_of(s, name, script) // fewer
                words = (f"{script} --data {data} --seed {seed} {s['size']} {s['decoder']} --batch_size {s['batch']} "
                         f"--epochs {length} --warmup_epochs {length / 10:g} --blr {s['blr']:g} --crop_scale 0.2 1 "
                         f"{teacher if script == 'sdae.py' else ''} {flags}")
                runs.append((name, seed, " ".join(words.split()), evaluations))
    return runs


def epochs_of(s, name, script):
    """The epochs of a run of a scale, before they are cut."""
    return s["epochs" if not name.startswith("few_") else "sdae_epochs" if script == "sdae.py" else "few_epochs"]


def few_images(data, runs):
    """A folder with the first 1000 training images of each class, and all of val/, as links."""
    few = runs / "few"
    shutil.rmtree(few, ignore_errors=True)
    for folder in filter(Path.is_dir, sorted((data / "train").iterdir())):
        (few / "train" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:1000]:
            (few / "train" / folder.name / path.name).symlink_to(path)
    (few / "val").symlink_to(data / "val")
    return few


def results_of(folder, row):
    """What a row of the plan has in a folder, {kind: contents}; kinds are "log" (a list), its evaluations and
    "consistency". Files of other commands don't count."""
    name, seed, words, evaluations = row
    kinds = {**{mode: f"{words}; {evaluations[mode]}" for mode in evaluations}, "log": words, "consistency": words}
    found = {}
    for kind, command in kinds.items():
        path = folder / f"{name}_seed{seed}_{kind}.json"
        if path.exists():
            result = json.loads(path.read_text())
            if result["command"] == command:
                found[kind] = result
    return found


def wanted_of(row):
    """The kinds of results that a row of the plan is to have."""
    name, _, words, evaluations = row
    return [*["log"] * (words != "random weights"), *["consistency"] * (name in CONSISTENCY), *evaluations]


class Runner:
    """Runs commands, several at a time, until the time is up or a signal comes: what runs then saves, and is gone on
    with by the next call."""

    def __init__(self, args):
        self.args, gpu = args, args.scale == "gpu"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.jobs = args.jobs or (4 if gpu else cores)
        share = str(max(1, cores // self.jobs))
        self.environment = {**os.environ, **({} if gpu else {"OMP_NUM_THREADS": share})}
        self.machine = ["--device", "cuda" if gpu else "cpu", "--num_workers", share if gpu else "0"]
        self.few, self.lock = few_images(args.data, args.runs), threading.Lock()
        self.deadline = time.time() + 60 * args.minutes
        for name in ("SIGTERM", "SIGINT"):
            signal.signal(getattr(signal, name), lambda *_: setattr(self, "deadline", 0))

    def run(self, words, log):
        """Runs a command of the repository; whether it came to its end. Raises OSError where it fails."""
        words = [{"all": str(self.args.data), "few": str(self.few)}.get(word, word) for word in words] + self.machine
        if time.time() > self.deadline:
            return False
        with open(log, "a") as file:
            print("+ python", *words, file=file, flush=True)
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=self.environment,
                                       stdout=file, stderr=file)
        told = False
        while process.poll() is None:
            if time.time() > self.deadline and not told:
                process.terminate()
                told = True
            time.sleep(0.1)
        if process.returncode and not told:
            raise OSError(f"it failed with code {process.returncode}: python {' '.join(words)} (see {log})")
        return not told

    def go(self, row):
        """Pre-trains and evaluates one row of the plan, what is missing of it; whether it is done."""
        name, seed, words, evaluations = row
        label, out = f"{name}_seed{seed}", self.args.output_dir / self.args.scale
        runs = self.args.runs / self.args.scale / label
        missing = [kind for kind in wanted_of(row) if kind not in results_of(out, row)]
        if not missing:
            return True
        if words != "random weights" and not (runs / "encoder.pt").exists():
            missing = wanted_of(row)            # another training need not be equal to the last bit
        start = time.time()

        def write(kind, command, **result):
            (out / f"{label}_{kind}.tmp").write_text(json.dumps({"command": command, **result}, indent=1) + "\n")
            os.replace(out / f"{label}_{kind}.tmp", out / f"{label}_{kind}.json")

        try:
            runs.mkdir(parents=True, exist_ok=True)
            if words != "random weights":
                if not self.run([*words.split(), "--output_dir", str(runs)], runs / "out.txt"):
                    return False
                log = [json.loads(line) for line in (runs / "log.jsonl").read_text().splitlines()]
                write("log", words, log=log)
            if "consistency" in missing:
                with self.lock:
                    write("consistency", words, **agreement(runs / "last.pt", self.args.data / "val"))
            ckpt = ["none", *SCALES[self.args.scale]["size"].split()]
            ckpt = ckpt if words == "random weights" else [str(runs / "encoder.pt")]
            for mode in (mode for mode in evaluations if mode in missing):
                more = ["--ckpt", *ckpt, "--output_dir", str(runs / mode)]
                if not self.run([*evaluations[mode].split(), *more], runs / "out.txt"):
                    return False
                result = json.loads((runs / mode / "result.json").read_text())
                write(mode, f"{words}; {evaluations[mode]}", **{key: result[key] for key in ("top1", "top5", "images")})
        except (OSError, InputError) as error:
            print(f"{label}: {error}", file=sys.stderr, flush=True)
            return False
        print(f"{label}: {(time.time() - start) / 60:.1f} minutes", flush=True)
        return True


def agreement(checkpoint, images):
    """How far predictions of a patch are apart, mean absolute difference over pixels, of 512 images that were not
    trained on: "masks", of one image under the masks of four seeds, "images", of two images. The second is what the
    first is to be measured by: a model that predicts the same for all images agrees with itself as well."""
    model = visualize.load_pixel_model(str(checkpoint))
    imgs = normalize(visualize.load_images([str(images)], 512, visualize.model_size(model)))
    predictions = [visualize.predict(model, imgs, seed) for seed in range(4)]
    pred, mask = predictions[0]
    masks = visualize.disagreement(predictions)
    others = visualize.disagreement([(pred, mask), (pred.roll(1, 0), mask.roll(1, 0))])
    return {"masks": masks.nanmean().item(), "images": others.nanmean().item(), "number": len(imgs)}


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------
def read(scale, folder):
    """What the files of a scale say: {run: {measure: [one value a seed]}}."""
    found = {}
    for row in plan(scale):
        values = found.setdefault(row[0], {})
        for kind, result in results_of(Path(folder), row).items():
            if kind == "log":
                values.setdefault("minutes", []).append(sum(line["seconds"] for line in result["log"]) / 60)
                values.setdefault("loss", []).append(result["log"][-1]["loss"])
            elif kind == "consistency":
                values.setdefault("masks", []).append(result["masks"])
                values.setdefault("consistency", []).append(result["masks"] / result["images"])
            else:
                values.setdefault(kind, []).append(result["top1"])
    return found


def show(values, digits=1):
    """The mean of the seeds and, of several, each; "not run" without any."""
    if not values:
        return "not run"
    each = f" ({' / '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{each}"


def verdict(claim, better, worse, measure, margin=1.4, random=()):
    """What two runs say of a claim, by a difference of more than `margin` points of accuracy or, in consistency and
    minutes, of more than a tenth. Accuracies that are both no better than that of `random` weights say nothing."""
    if not better or not worse:
        return "not run"
    better, worse = statistics.mean(better), statistics.mean(worse)
    less = measure in ("consistency", "minutes")            # is better
    gain = worse - better if less else better - worse
    if not less and random and max(better, worse) <= statistics.mean(random) + margin:
        return "neither has learnt"
    if abs(gain) <= (worse / 10 if less else margin):
        return f"within {margin:.1f} points" if "≈" in claim else "too close to tell"
    if "against" in claim:
        return "higher" if better > worse else "lower"
    return ("better" if gain > 0 else "worse") if "≈" in claim else "yes" if gain > 0 else "no, the reverse"


def table(scale, folder):
    """The Markdown page of a scale."""
    s, found = SCALES[scale], read(scale, folder)

    def of(name, measure):
        return found[name].get(measure, [])

    seeds = of("few_mae", "linear") or [0.0]
    margin = max(1.4, max(seeds) - min(seeds))
    row = {name: f"`{f'{script} {flags}'.strip()}` | {epochs_of(s, name, script) // fewer} | "
                 f"{show(of(name, 'minutes'))}"
           for rows in (MAIN, FEW) for name, script, flags, fewer in rows}
    row["random"] = row["few_random"] = "random weights | – | –"
    lines = [f"# CIFAR-10, scale `{scale}`", "",
             f"Encoder `{s['size']}`, decoder `{s['decoder']}`; batch {s['batch']}, blr {s['blr']:g}, warm-up a tenth "
             f"of the epochs, crops of 0.2 to 1 of the area; seeds: {', '.join(map(str, s['seeds']))}. Evaluation with "
             f"{'all labels' if s['labels'] == 'all' else 'the labels of 10,000 images, 1000 a class,'} on the 10,000 "
             "test images, top-1 in %, of the mean of the patch tokens: k-NN (k = 20), a linear probe "
             f"(`{s['linear']}`), fine-tuning (`{s['finetune']}`); random weights, fine-tuned, are training from "
             "scratch. Minutes are pre-training's, with other runs beside it."
             + (f" SdAE has `{s['teacher'][0]}`, on 10,000 images `{s['teacher'][1]}`: its teacher averages over as "
                "much of a run as the paper's." if s["teacher"][0] else ""), "",
             "| all 50,000 images | epochs | minutes | k-NN | linear probe | fine-tuned |", "|---|---|---|---|---|---|"]
    lines += [f"| {row[name]} | " + " | ".join(show(of(name, mode)) for mode in ("knn", "linear", "finetune")) + " |"
              for name in ("random", *(name for name, *_ in MAIN))]
    lines += ["", "| 10,000 images, 1000 a class | epochs | minutes | linear probe | last loss, each its own |",
              "|---|---|---|---|---|"]
    lines += [f"| {row[name]} | {show(of(name, 'linear'))} | "
              f"{'–' if name == 'few_random' else show(of(name, 'loss'), 3)} |"
              for name in ("few_random", *(name for name, *_ in FEW))]
    lines += ["", "How far predictions of a patch are apart, on 512 test images: under two masks of one image, over "
              "that of two images. 0: the mask doesn't matter; 1: as much as the image does.", "",
              "| run | epochs | minutes | difference over that of two images | difference |", "|---|---|---|---|---|"]
    lines += [f"| {row[name].replace(' |', ', 10,000 images |', 1) if name.startswith('few') else row[name]} | "
              f"{show(of(name, 'consistency'), 3)} | {show(of(name, 'masks'), 3)} |" for name in CONSISTENCY]
    lines += ["", f"An accuracy must differ by {margin:.1f} points to count, the larger of 1.4 (two standard errors of "
              "the difference of two accuracies on 10,000 images, at most) and of the distance between seeds of MAE on "
              "the 10,000 images; consistency and minutes by a tenth. Each other run has one seed, and of so many "
              "comparisons some go wrong by chance; most of the papers' own differences are smaller than this, so that "
              "too close to tell is what to expect of them. The papers' figures are top-1 on ImageNet, of ViT-B, but "
              "of ViT-L in MAE's Table 1 and Efficient MAE's Tables 2 and 4 to 9. Where they fine-tune and we probe, "
              "the answer is a probe's alone. EMAE's 68.2 (Table 1) and 68.4 (Tables 5, 6) are of one model in the "
              "paper; SdAE's Table 5 is after 100 epochs by its text, after 300 by its 84.1 (Table 2).", "",
              "| claim | the paper, on ImageNet | here | by | does it show? |", "|---|---|---|---|---|"]
    words = {"linear": "linear probe, %", "finetune": "fine-tuned, %", "consistency": "difference, see above",
             "minutes": "minutes"}
    for claim, paper, better, worse, measure in CLAIMS:
        digits = 3 if measure == "consistency" else 1
        here = f"{show(of(better, measure), digits)}, {show(of(worse, measure), digits)}"
        where = ", 10,000 images" * better.startswith("few")
        random = of("few_random" if where else "random", measure) if worse != "random" else []
        lines.append(f"| {claim} | {paper} | {here} | {words[measure]}{where} | "
                     f"{verdict(claim, of(better, measure), of(worse, measure), measure, margin, random)} |")
    return "\n".join(lines) + "\n"


def main(args):
    """Runs what is missing, and writes the table and the list of commands. Returns the exit code."""
    out = args.output_dir / args.scale
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for row in plan(args.scale) if not args.only or row[0] in args.only]
    if not args.table:
        args.runs.mkdir(parents=True, exist_ok=True)
        runner = Runner(args)
        with concurrent.futures.ThreadPoolExecutor(runner.jobs) as pool:
            list(pool.map(runner.go, rows))
    commands = [f"{name}_seed{seed}: {'; '.join([words, *evaluations.values()])}"
                for name, seed, words, evaluations in plan(args.scale)]
    (out / "commands.txt").write_text("\n".join(commands) + "\n")
    (args.output_dir / f"{args.scale}.md").write_text(table(args.scale, out))
    left = [f"{row[0]}_seed{row[1]}" for row in rows if set(wanted_of(row)) - results_of(out, row).keys()]
    print(f"{args.output_dir / args.scale}.md: {'left: ' + ', '.join(left) if left else 'all done'}")
    return 1 if left else 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args()))
    except (InputError, OSError) as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
