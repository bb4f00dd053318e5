"""What is read: files of every kind, large and odd folders, channels other than RGB.

    python -m pytest -q test_data.py
"""
import errno
import hashlib
import os
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

import common
import finetune
import runs
import visualize
from common import InputError
from conftest import SCRIPTS, module, photo, small_args


def test_jpegs_are_decoded_as_by_pillow(tmp_path):
    """Colour at each subsampling, progressive, grey, CMYK, and every EXIF orientation."""
    for i, (mode, options) in enumerate([("RGB", dict(subsampling=n)) for n in (0, 1, 2)] + [
            ("RGB", dict(progressive=True)), ("L", {}), ("CMYK", {})] + [
            ("RGB", dict(exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([n, *7 * [0]])))
            for n in range(1, 9)]):
        path = str(tmp_path / f"{i}.jpg")
        photo(i, (37, 50), mode).save(path, **options)
        with Image.open(path) as img:
            turned = ImageOps.exif_transpose(img).convert("RGB")
        assert torch.equal(common.load_image(path), v2.functional.pil_to_tensor(turned)), (mode, options)


def test_orientation_is_pillows(tmp_path):
    """torchvision's decoder looks for it in the first APP1 segment alone, and takes types that EXIF doesn't allow."""
    def segment(content):
        return b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content
    entry = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0%c\0\0\0\x01%b\0\0\0\0"
    short, byte, long = (entry % x for x in ((3, b"\0\x06\0\0"), (1, b"\x06\0\0\0"), (4, b"\0\0\0\x06")))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    photo(0, (37, 50)).save(tmp_path / "plain.jpg")
    plain, shapes = (tmp_path / "plain.jpg").read_bytes(), set()
    for i, parts in enumerate(([short], [xmp, short], [byte], [long])):
        path = str(tmp_path / f"{i}.jpg")
        with open(path, "wb") as file:
            file.write(plain[:2] + b"".join(map(segment, parts)) + plain[2:])
        with Image.open(path) as img:
            turned = v2.functional.pil_to_tensor(ImageOps.exif_transpose(img))
        assert torch.equal(common.load_image(path), turned), i
        shapes.add(turned.shape)
    assert len(shapes) == 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name, options", [("0.png", {}), ("0.tif", {"compression": "tiff_adobe_deflate"}),
                                           ("1.tif", {"compression": "tiff_lzw"}), ("0.jpg", {}), ("0.webp", {})])
def test_a_damaged_file_is_no_image(name, options, tmp_path):
    """Whatever Pillow cannot decode is refused, and not what it had decoded by then."""
    photo(0, (100, 100)).save(tmp_path / name, **options)
    whole, refused = (tmp_path / name).read_bytes(), 0
    for at in range(len(whole) // 4, len(whole) - 50, len(whole) // 8):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:]):
            (tmp_path / name).write_bytes(data)
            try:
                with Image.open(tmp_path / name) as img:
                    img.load()
                wanted = v2.functional.pil_to_tensor(img.convert("RGB"))
            except Exception:
                refused += 1
                with pytest.raises(InputError, match="cannot be used as an image"):
                    common.load_image(str(tmp_path / name))
            else:
                assert torch.equal(common.load_image(str(tmp_path / name)), wanted)
    assert refused > 3


def test_numbers_that_pillow_misreads(tmp_path):
    """Unsigned TIFFs of 32 bits are refused, signed ones read."""
    path = tmp_path / "0.tif"
    Image.fromarray(np.full((8, 8), 100_000, np.int32)).save(path)
    assert common.load_image(str(path), 1).unique().item() == 100_000
    signed, unsigned = (b"\x53\x01\x03\0\x01\0\0\0" + bytes([kind]) for kind in (2, 1))
    assert path.read_bytes().count(signed) == 1
    path.write_bytes(path.read_bytes().replace(signed, unsigned))
    with pytest.raises(InputError, match="misreads"):
        common.load_image(str(path), 1)


def test_errors_that_pass_are_tried_again(tmp_path, monkeypatch):
    """A disk's or a network's error goes away once; four times is too often; a missing file is not tried again."""
    photo().save(tmp_path / "0.png")
    path, pauses, calls = str(tmp_path / "0.png"), [], []
    monkeypatch.setattr(common.time, "sleep", pauses.append)

    def failing(times, number):
        def open_(*args):
            calls.append(args)
            if len(calls) <= times:
                raise OSError(number, "injected")
            return open(*args)
        calls.clear()
        pauses.clear()
        monkeypatch.setattr(common, "open", open_, raising=False)
    with monkeypatch.context() as patch:
        answers = [os.stat(path), OSError(errno.ESTALE, "injected")]

        def stat(_):
            answer = answers.pop()
            if isinstance(answer, OSError):
                raise answer
            return answer
        patch.setattr(common.os, "stat", stat)
        assert common.load_image(path).shape == (3, 40, 48) and pauses == [0.2]
    failing(1, errno.ESTALE)
    assert common.load_image(path).shape == (3, 40, 48) and len(calls) == 2
    failing(4, errno.ESTALE)
    with pytest.raises(InputError, match="injected"):
        common.load_image(path)
    assert len(calls) == 4 and pauses == [0.2, 1, 5]
    failing(4, errno.EACCES)
    with pytest.raises(InputError, match="injected"):
        common.load_image(path)
    assert len(calls) == 1


def test_machines_run_equally_many_processes(folder, monkeypatch):
    """8 processes on 3 machines, 4 of them here; also where their number would divide 8."""
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 8)
    for here, machines in ((4, "3"), (3, None)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        monkeypatch.setenv("GROUP_WORLD_SIZE", machines) if machines else monkeypatch.delenv("GROUP_WORLD_SIZE")
        with pytest.raises(InputError, match=f"8 processes, and {here} on this machine"):
            common.load_dataset(str(folder), "pretrain")


def test_a_folder_above_the_images_is_refused(tmp_path):
    """Kaggle's ImageNet: train/ and val/ lie three folders down, and would be two classes."""
    for name in ("train/a", "val/a"):
        (tmp_path / "ILSVRC/Data" / name).mkdir(parents=True)
        photo().save(tmp_path / "ILSVRC/Data" / name / "0.png")
    with pytest.raises(InputError, match="ILSVRC/Data' has train/ and val/"):
        common.load_dataset(str(tmp_path), "pretrain")
    assert common.load_dataset(str(tmp_path / "ILSVRC/Data"), "pretrain").classes == ["a"]


def test_endings_in_capitals_and_a_test_folder(tmp_path):
    """.NPY files are arrays, whose mean and deviation are measured; train/ beside test/ is a split, not a class."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(2):
            with open(tmp_path / split / f"{i}.NPY", "wb") as file:
                np.save(file, np.full((8, 8, 3), 1000 * i, np.float32))
    images = common.load_dataset(str(tmp_path), "pretrain")
    assert len(images) == 2 and images.classes is None and images.arrays
    mean, _ = common.channel_statistics(common.Crops(images, common.eval_transform(8)))
    assert mean == [500.0] * 3


def test_listing_is_in_the_order_of_paths(tmp_path):
    """Sorted by the whole path, whatever the order of folders; labels follow."""
    for name in ("b/2.png", "b/a/1.png", "b-c/0.png", "a.png/x.png", "Z/é.png", "b/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo().save(tmp_path / name)
    images = common.load_dataset(str(tmp_path), "pretrain")
    names = [os.fsdecode(path)[len(str(tmp_path)) + 1:] for path in images.paths]
    assert names == sorted(names) and len(names) == 6
    assert [images.classes[label] for label in images.labels] == [name.split("/")[0] for name in names]
    digest = hashlib.sha256("\n".join("/" + name for name in names).encode()).hexdigest()[:12]
    assert common.inventory(images) == f"6 ({digest})"


def array_folder(root, arrays):
    """train/ and val/ with .npy files in two classes."""
    for split in ("train", "val"):
        for i, array in enumerate(arrays):
            (root / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            np.save(root / split / "ab"[i % 2] / f"{i:02}.npy", array)
    return root


def test_arrays_train_as_pngs_do(folder, tmp_path):
    """The same bytes from .npy files, with ImageNet's mean and deviation, give the same weights."""
    for path in folder.rglob("*.png"):
        target = tmp_path / "arrays" / path.relative_to(folder).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, np.array(Image.open(path)))
    numbers = ["--mean", *common.IMAGENET_MEAN, "--std", *common.IMAGENET_STD]
    weights = []
    for data, more in ((folder, []), (tmp_path / "arrays", numbers)):
        module("mae").main(module("mae").get_args(small_args(data, tmp_path / str(len(weights)), *more)))
        weights.append(torch.load(tmp_path / str(len(weights)) / "encoder.pt", weights_only=True)["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("in_chans, dtype", [(13, np.uint8), (2, np.float32), (1, np.uint16)])
def test_other_channels(in_chans, dtype, tmp_path, capsys):
    """Trained by every script, resumed, drawn, probed, and by name in timm's ViT."""
    random = np.random.default_rng(0)
    arrays = [(200 * random.random((40, 36, in_chans))).astype(dtype) for _ in range(32)]
    data = array_folder(tmp_path / "data", arrays)
    for name in SCRIPTS:
        args = small_args(data, tmp_path / name, "--in_chans", in_chans)
        module(name).main(module(name).get_args(args))
        assert (tmp_path / name / "reconstruction.png").exists()
        saved = torch.load(tmp_path / name / "encoder.pt", weights_only=True)
        assert saved["model"]["patch_embed.proj.weight"].shape[1] == in_chans
        mean = np.mean([np.load(path).astype(float) / (255 if dtype == np.uint8 else 1)
                        for path in sorted((data / "train").rglob("*.npy"))], axis=(0, 1, 2))
        assert np.allclose(saved["args"]["mean"], mean, rtol=0.1)
    module("mae").main(module("mae").get_args(small_args(data, tmp_path / "mae", "--in_chans", in_chans)))
    assert "already finished" in capsys.readouterr().out
    words = ["--ckpt", tmp_path / "mae/encoder.pt", "--data", data, "--epochs", "2",
             "--warmup_epochs", "1", "--batch_size", "16", "--num_workers", "0", "--mode"]
    visualize.main(visualize.get_args(["seeds", "--ckpt", str(tmp_path / "mae/last.pt"), "--images", str(data),
                                       "--show", "1", "0", "1", "--output", str(tmp_path / "seeds.png")]))
    for mode in ("linear", "finetune", "knn"):
        args = finetune.get_args([*map(str, words), mode, "--output_dir", str(tmp_path / mode)])
        assert finetune.main(args)["images"] == 32
        assert ("no RandAugment" in capsys.readouterr().out) == (mode == "finetune")
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=2,
                            in_chans=in_chans, num_classes=0)
    vit.load_state_dict(torch.load(tmp_path / "mae/encoder.pt", weights_only=True)["model"])


def test_statistics_of_channels(tmp_path):
    """Those of all pixels, to the six digits that are printed; a constant channel is only shifted."""
    values = 1000 + 3 * np.random.default_rng(0).standard_normal((5, 16, 16, 2))
    values[..., 1] = 12345.678
    for i, array in enumerate(values):
        np.save(tmp_path / f"{i}.npy", array)
    crops = common.Crops(common.FolderDataset(tmp_path, in_chans=2), lambda img: img)
    mean, std = common.channel_statistics(crops)
    assert mean == [float(f"{values[..., 0].mean():g}"), 12345.7]
    assert std == [float(f"{values[..., 0].std():g}"), 1]


def test_greyscale_files_of_sixteen_bits(tmp_path):
    """PNG and TIFF keep their values with one channel, and are refused, by name, with three."""
    values = np.arange(0, 64000, 1000, dtype=np.uint16).reshape(8, 8)
    for name in ("0.png", "0.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(common.load_image(str(tmp_path / name), 1)[0], values)
        with pytest.raises(InputError, match="in_chans 1"):
            common.load_image(str(tmp_path / name))


@pytest.mark.parametrize("array, says", [
    (np.zeros((4, 4, 2)), "in_chans is 3"), (np.zeros(4), "is needed"), (np.zeros((2, 2, 3, 1)), "is needed"),
    (np.zeros((4, 4, 3), complex), "real numbers"), (np.zeros((0, 4, 3)), "is needed"),
    (np.full((4, 4, 3), np.nan), "NaN"), (np.array([[[None] * 3]]), "allow_pickle")])
def test_arrays_that_are_no_images(array, says, tmp_path):
    np.save(tmp_path / "0.npy", array)
    with pytest.raises(InputError, match=says) as error:
        common.load_image(str(tmp_path / "0.npy"))
    assert "0.npy" in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Little room for workers, large batches, shares of k-NN's bank
# ---------------------------------------------------------------------------------------------------------------------
class Numbers(torch.utils.data.Dataset):
    """In place of Crops: item (epoch, index) is the index, as an image."""
    skipped = {}

    def __getitem__(self, item):
        return torch.tensor([[[item[1]]]]), 0, {}

    def merge(self, skipped):
        pass
    collate = staticmethod(common.Crops.collate)


@pytest.mark.parametrize("size, batches", [
    (runs.CHUNK, common.GlobalBatches(1000, 500, epochs=1)),                                    # training's chunks
    (250, [[(0, i) for i in range(250 * n, 250 * (n + 1))] for n in range(4)])])                # evaluation's batches
def test_workers_fit_into_shared_memory(size, batches, monkeypatch, capsys):
    """With room for few chunks or batches there are fewer workers, and it is said; what is loaded is the same."""
    expected = [index for batch in batches for _, index in batch]
    assert len(expected) == 1000
    for room, says in ((3, f"2 workers, which load 1 × {size} images"), (10**6, None)):
        free = 2 * room * size * torch.tensor([[[0]]]).nbytes
        monkeypatch.setattr(runs.shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        loader = runs.make_loader(Numbers(), batches, 2, torch.device("cpu"))
        assert [x.item() for imgs, _ in loader for x in imgs] == expected
        out = capsys.readouterr().out
        assert (says in out) if says else not out


def test_no_room_in_shared_memory_is_one_line(monkeypatch):
    class Full:
        def __init__(self, *args, **more):
            pass

        def __iter__(self):
            raise RuntimeError("Caught by a worker\nunable to allocate shared memory(shm) for file </torch_1>")
            yield
    monkeypatch.setattr(runs, "DataLoader", Full)
    with pytest.raises(OSError, match="--shm-size=8g.*--num_workers.*--accum_iter") as error:
        next(runs.make_loader(Numbers(), [[(0, 0)]], 0, torch.device("cpu")))
    assert "\n" not in str(error.value)


def test_knn_with_a_bank_in_shares(monkeypatch):
    """Shares of processes, of unequal size and smaller than k, give the votes of the whole bank."""
    features, bank = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (7, 45))
    labels = torch.randint(5, (45,))
    whole = finetune.knn_scores(features, bank, labels, 5, 20, 0.07)
    near = []
    monkeypatch.setattr(finetune, "gather", lambda mine: near.append(mine) or [mine])
    for rank in range(4):
        finetune.knn_scores(features, bank[rank::4], labels[rank::4], 5, 20, 0.07)
    monkeypatch.setattr(finetune, "gather", lambda mine: near)
    assert torch.allclose(finetune.knn_scores(features, bank[:1], labels[:1], 5, 20, 0.07), whole)
