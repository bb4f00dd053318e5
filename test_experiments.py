"""docs/experiments.md: every command is parsed, its settings are those that its row names, and ten rows train.

    python -m pytest -q test_experiments.py
"""
import json
import math
import random
import re
import shlex
import subprocess

import pytest

from conftest import ANN, ROOT, SCRIPTS, module, write_coco, write_masks

PAGE = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
PLACES = {"what", "data", "ckpt", "output_dir", "output", "images", "runs", "_defaults"}    # where things are
# What a script sets by another argument
FOLLOWS = {"model": {"patch_size", "crop_scale"}, "ema": {"momentum"}, "recipe": {"lr"}}
TWO_STEPS = {"segment": "--num_steps 2 --warmup_steps 0 --batch_size 6 --head_channels 8",
             "detect": "--num_steps 2 --warmup_steps 0 --batch_size 1 --fpn_channels 8 --rois 8"}
BASH = ('python() { printf "%q " "$@"; echo; }\n'
        'torchrun() { [ "$1 $2" = "--nproc_per_node 8" ] && python "${@:3}" || echo "wrong torchrun $*"; }\n')


def read_page():
    """The rows by (section, name): their settings, what the page says of them, and their commands as lists of words.
    Bash itself expands loops and functions."""
    rows = {}
    for section in PAGE.split("\n## ")[1:]:
        title, shared = section.split("\n")[0], dict(re.findall(r"^- \*([\w-]+)\*[^:\n]*: (.*)$", section, re.M))
        for line in re.findall(r"^\| (?!row |---)(.*) \|$", section, re.M):
            name, _, _, settings, here = line.split(" | ")
            for word, meaning in shared.items():
                settings = settings.replace(f"*{word}*", meaning)
            assert (title, name) not in rows
            rows[title, name] = {"settings": settings, "here": here, "commands": []}
        code = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.S))
        code = re.sub(r"^# ([^:\n]*).*$", r"echo '# \1'", code, flags=re.M)
        done = subprocess.run(["bash", "-euc", BASH + code], capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith("# "):
                commands = rows[title, line[2:]]["commands"]
            else:
                commands.append(shlex.split(line))
    return rows


ROWS = read_page()


def trains(words):
    return words[0] not in ("visualize.py", "bench.py") and "eval" not in words


def parse(words):
    """A command's arguments, the same without its settings, and the names of the flags that it gives."""
    script, *words = words
    if script == "detect.py":
        pytest.importorskip("pycocotools")
    given = {word[2:].removeprefix("no-") for word in words if word.startswith("--")}
    needed = words[:1] if script == "visualize.py" else []
    for flag in ("--ckpt", "--runs"):
        needed += words[words.index(flag):][:2] if flag in words else []
    get_args = module(script.removesuffix(".py")).get_args
    return vars(get_args(words)), vars(get_args(needed)), given - PLACES


def written(value):
    """A value as the page writes it."""
    if isinstance(value, list):
        return shlex.join(map(written, value))
    return {"True": "on", "False": "off"}.get(str(value), f"{value:g}" if isinstance(value, float) else str(value))


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_a_rows_settings_are_those_of_its_commands(row):
    """Each command differs from its script's defaults in its flags alone; together they are the row's settings."""
    found, changed, expected = {}, set(), {}
    for words in ROWS[row]["commands"]:
        args, default, given = parse(words)
        differ = {name for name in args if args[name] != default[name]} - PLACES
        assert differ <= given.union(*(FOLLOWS.get(name, ()) for name in given)), words
        changed |= differ
        for name in given:
            found.setdefault(name, set()).add(written(args[name]))
    for name, values in re.findall(r"`(\w+)`([^;`]*)", ROWS[row]["settings"]):
        expected.setdefault(name, set()).update(value.strip() for value in values.split(","))
    assert found == expected and set(found) <= changed
    assert bool(ROWS[row]["commands"]) != ROWS[row]["here"].startswith("*no*")


def test_the_page_counts_its_rows_and_shares_its_runs():
    """By word, at its top; and commands with one output folder have the same arguments."""
    words = [re.fullmatch(r"\*(whole|in part|no)\*(: .+)?", row["here"]) for row in ROWS.values()]
    assert all(bool(word[2]) != (word[1] == "whole") for word in words)
    counts = [sum(word[1] == kind for word in words) for kind in ("whole", "in part", "no")]
    assert "Of {} rows, {} are *whole*, {} *in part* and {} *no*.".format(len(ROWS), *counts) in PAGE
    runs = [(words[0], parse(words)[0]) for row in ROWS.values() for words in row["commands"] if trains(words)]
    folders = {args["output_dir"]: (script, args) for script, args in runs}
    assert all(folders[args["output_dir"]] == (script, args) for script, args in runs)


@pytest.mark.parametrize("row", random.Random(0).sample(
    [row for row in ROWS if any(map(trains, ROWS[row]["commands"]))], 10), ids=" ".join)
def test_ten_rows_train(row, folder, pretrained, tmp_path):
    """Two steps of one of a row's commands, with a small model on drawn images; what else it sets stays set."""
    script, *words = random.Random(" ".join(row)).choice([*filter(trains, ROWS[row]["commands"])])
    name, more = script.removesuffix(".py"), "--model vit_micro --img_size 112 --patch_size 8"      # 14×14, as theirs
    if name in SCRIPTS:
        words = "--decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2".split() + words
    elif "none" not in words:
        words, more = words + ["--ckpt", str(pretrained / "encoder.pt")], "--img_size 32"
    if name in TWO_STEPS:
        folder = tmp_path
        write_masks(folder) if name == "segment" else write_coco(folder, {"train": [ANN], "val": [ANN]})
    more += " --num_workers 0 --device cpu " + TWO_STEPS.get(name, "--batch_size 24 --epochs 1 --warmup_epochs 0")
    words = [*words, *more.split(), "--data", str(folder), "--output_dir", str(tmp_path / "run")]
    module(name).main(module(name).get_args(words))
    assert math.isfinite(json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["loss"])
