"""What the test files share: drawn images, short runs of the scripts, a fixed seed, and a GPU that is hidden."""
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # also for the scripts that tests start

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent
# A method is a script with these three functions: see CONTRIBUTING.md
SCRIPTS = sorted((path.stem for path in ROOT.glob("*.py")
                  if all(f"\ndef {name}(" in path.read_text() for name in ("method_args", "build_model", "main"))),
                 key=lambda name: (name != "mae", name))
SMALL = ("--model vit_micro --img_size 32 --patch_size 8 --decoder_embed_dim 32 --decoder_depth 1 "
         "--decoder_num_heads 2 --batch_size 16 --epochs 2 --warmup_epochs 1 --num_workers 0 --device cpu").split()


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of the tests' random numbers")


def pytest_configure(config):
    if "not cuda" in config.option.markexpr:    # bit-exact tests, and several processes, are the CPU's
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def fresh(request):
    """Each test starts from the same seed, and leaves no signal handler behind: a run installs its own."""
    seed = request.config.getoption("--seed")
    torch.manual_seed(seed)
    np.random.seed(seed)
    names = {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGCHLD"} & set(dir(signal))
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
    yield
    for name, handler in handlers.items():
        signal.signal(getattr(signal, name), handler)


def module(name):
    """A script, imported."""
    return importlib.import_module(name)


def photo(seed=0, size=(48, 40), mode="RGB"):
    """An image of low frequencies, as JPEG likes it; size is PIL's (width, height)."""
    small = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def small_args(folder, output, *more):
    """A command line of a method's script, for a run of a few seconds: 2 epochs of 3 steps."""
    return ["--data", str(folder), "--output_dir", str(output), *SMALL, *map(str, more)]


def write_masks(root, values=(0, 1, 255), size=(40, 48)):
    """12 images and masks for each split, of two classes."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            random = np.random.RandomState(i)
            Image.fromarray(random.randint(0, 256, (40, 48, 3), np.uint8)).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(random.choice(values, size).astype(np.uint8)).save(root / "masks" / split / f"{i}.png")
    (root / "classes.json").write_text('{"classes": ["sky", "ground"]}')


def write_coco(root, annotations, categories=(1,), size=(40, 48), number=1):
    """One image a split, with these annotations."""
    for split, anns in annotations.items():
        (root / split).mkdir(exist_ok=True)
        (root / "annotations").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(root / split / "a.jpg")
        content = {"images": [{"id": number, "file_name": "a.jpg", "height": size[0], "width": size[1]}],
                   "annotations": anns, "categories": [{"id": i, "name": f"thing {i}"} for i in categories]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


ANN = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "segmentation": [[5, 5, 25, 5, 25, 25]]}


def script(*command, **more):
    """Runs a script as a user would; the finished process, with its output as text."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          **more)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """train/ with 48 images in 3 classes, val/ with 21 in the same 3."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 48), ("val", 21)):
        for i in range(count):
            path = root / split / f"class {i % 3} é" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(i).save(path)
    return root


@pytest.fixture(scope="session")
def run_of(folder, tmp_path_factory):
    """The output folder of one short pre-training with a script, by the script's name."""
    outputs = {}

    def run(name):
        if name not in outputs:
            outputs[name] = tmp_path_factory.mktemp("runs") / name
            module(name).main(module(name).get_args(small_args(folder, outputs[name])))
        return outputs[name]
    return run


@pytest.fixture(scope="session")
def pretrained(run_of):
    """The output folder of a short run of mae.py."""
    return run_of("mae")
