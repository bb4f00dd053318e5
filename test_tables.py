"""What the papers' tables need beyond the defaults: recipes, scored classifiers, MAE's Table 1, other difficulties.

    python -m pytest -q test_tables.py
"""
import csv
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
import common
import efficient_mae
import finetune
import mae
import mae_ablations
from common import InputError
from conftest import ROOT, module, photo, script, small_args

SMALL = dict(img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=4, decoder_embed_dim=32, decoder_depth=1,
             decoder_num_heads=2)                                                       # 8×8 patches


def run_finetune(*words):
    return finetune.main(finetune.get_args([*map(str, words), "--num_workers", "0"]))


# ---------------------------------------------------------------------------------------------------------------------
# finetune.py: recipes and --mode eval
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("words, width, expected", [
    ("", 768, dict(epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1, erasing=0.25, beta2=0.999)),
    ("--recipe paper", 768, dict(epochs=100, blr=1e-3, layer_decay=0.75, drop_path=0.1, erasing=0, batch_size=1024)),
    ("--recipe paper", 1280, dict(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2, warmup_epochs=5)),
    ("--recipe paper --mode linear", 1024, dict(epochs=90, blr=0.1, batch_size=16384, warmup_epochs=10)),
    ("--recipe scratch", 768, dict(epochs=300, blr=1e-4, batch_size=4096, weight_decay=0.3, warmup_epochs=20,
                                   beta2=0.95, drop_path=0.1, layer_decay=1, erasing=0)),
    ("--recipe scratch", 1024, dict(epochs=200, drop_path=0.2))])
def test_recipes_by_name(words, width, expected):
    """MAE's Tables 9, 10 and 11, and the released code's."""
    args = finetune.get_args(["--ckpt", "none" if "scratch" in words else "x.pt", *words.split()])
    finetune.fill_recipe(args, width)
    assert {name: getattr(args, name) for name in expected} == expected


def test_scratch_is_for_random_weights():
    for words in (["--ckpt", "x.pt"], ["--ckpt", "none", "--mode", "linear"]):
        with pytest.raises(InputError, match="scratch"):
            finetune.fill_recipe(finetune.get_args([*words, "--recipe", "scratch"]), 768)


def test_scoring_a_classifier(folder, pretrained, tmp_path, capsys):
    """As its own training scored it; a prediction a file; some of the classes alone; no labels; other sizes."""
    for mode in ("finetune", "linear"):
        trained = run_finetune("--ckpt", pretrained / "encoder.pt", "--data", folder, "--mode", mode, "--output_dir",
                               tmp_path / mode, "--epochs", 2, "--warmup_epochs", 1, "--batch_size", 16, "--blr", 1e-2)
        scored = run_finetune("--ckpt", tmp_path / mode / "last.pt", "--data", folder, "--mode", "eval", "--output_dir",
                              tmp_path / "scored" / mode)
        assert (scored["top1"], scored["images"]) == (trained["top1"], 21)
    with open(tmp_path / "scored/linear/predictions.csv", newline="") as file:
        _, *rows = csv.reader(file)
    assert len(rows) == 21 and all(0.33 < float(row[2]) <= 1 for row in rows)
    assert 100 * np.mean([row[0].split("/")[0] == row[1] for row in rows]) == pytest.approx(scored["top1"], abs=1e-3)

    for name in ("some/class 1 é", "none"):
        (tmp_path / name).mkdir(parents=True)
        photo(1).save(tmp_path / name / "0.png")
    words = ["--ckpt", tmp_path / "finetune/last.pt", "--mode", "eval", "--output_dir", tmp_path / "others"]
    assert run_finetune(*words, "--data", tmp_path / "some", "--img_size", 64)["top1"] == 100
    assert "only the 1 of 3 classes that --data has are predicted" in capsys.readouterr().out
    assert "top1" not in run_finetune(*words, "--data", tmp_path / "none")
    for year in ("2023", "2024"):
        shutil.copytree(tmp_path / "none", tmp_path / "years" / year)
    found = run_finetune(*words, "--data", tmp_path / "years")
    assert "top1" not in found and found["images"] == 2
    assert "such as '2023', are no classes: images are labelled, not scored" in capsys.readouterr().out
    shutil.copytree(tmp_path / "none", tmp_path / "some/2023")
    with pytest.raises(InputError, match="'2023', a folder of --data, is none of the classes"):
        run_finetune(*words, "--data", tmp_path / "some")
    shutil.rmtree(tmp_path / "some/2023")
    assert run_finetune("--demo", *words)["images"] == 2000
    with pytest.raises(InputError, match="fine-tuning with --pool avg: give the pre-trained"):
        run_finetune("--ckpt", tmp_path / "finetune/last.pt", "--data", folder, "--mode", "knn")
    (tmp_path / "names").write_text("a\nb\nclass 1 é\n")
    assert run_finetune(*words, "--data", tmp_path / "some", "--classes", tmp_path / "names")["images"] == 1
    (tmp_path / "names").write_text("a\nb\n")
    with pytest.raises(InputError, match="3 classes, and there are 2 names"):
        run_finetune(*words, "--data", tmp_path / "some", "--classes", tmp_path / "names")
    (tmp_path / "names").write_text("class 1 é\nb\nclass 1 é\n")
    with pytest.raises(InputError, match="'class 1 é' is the name of several"):
        run_finetune(*words, "--data", tmp_path / "some", "--classes", tmp_path / "names")
    (tmp_path / "names").write_bytes(b"caf\xe9")
    for path in (tmp_path / "names", tmp_path / "nowhere"):
        with pytest.raises(InputError, match="cannot be read"):
            run_finetune(*words, "--data", tmp_path / "some", "--classes", path)
    with pytest.raises(InputError, match="from the checkpoint"):
        run_finetune(*words, "--data", tmp_path / "some", "--model", "vit_tiny")
    with pytest.raises(InputError, match="checkpoint's images have 3 channels"):
        run_finetune(*words, "--data", tmp_path / "some", "--in_chans", 1)
    photo(2).save(os.path.join(os.fsencode(tmp_path / "none"), b"caf\xe9.png").decode("utf-8", "surrogateescape"))
    run_finetune(*words, "--data", f"{tmp_path}/none/")
    names = [row.split(b",")[0] for row in (tmp_path / "others/predictions.csv").read_bytes().splitlines()]
    assert names == [b"file", b"0.png", b"caf\xe9.png"]
    with pytest.raises(InputError, match="no classifier"):
        run_finetune("--ckpt", pretrained / "encoder.pt", *words[2:], "--data", folder)


def test_a_folder_named_like_a_set(folder, pretrained, tmp_path, monkeypatch):
    """`shapes` is the drawn set, whose validation part is scored, also where there is a folder of that name."""
    run_finetune("--ckpt", pretrained / "encoder.pt", "--data", folder, "--mode", "linear", "--output_dir", tmp_path,
                 "--epochs", 2, "--warmup_epochs", 1, "--batch_size", 16, "--blr", 1e-2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    asked = []

    def load(data, split, *rest):
        asked.append((data, split))
        return common.load_dataset(str(folder), split, *rest)
    monkeypatch.setattr(finetune, "load_dataset", load)
    run_finetune("--ckpt", "last.pt", "--mode", "eval", "--data", "shapes", "--output_dir", "scored")
    assert asked == [("shapes", "val")]


def test_public_classifiers_give_timms_logits(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_base_patch16_224", num_classes=3, global_pool="avg", img_size=32, patch_size=8,
                               embed_dim=128, depth=4, num_heads=2).eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "public.pth")
    ours, _, _, names = finetune.load_classifier(str(tmp_path / "public.pth"), None)
    imgs = torch.randn(4, 3, 32, 32)
    expected = theirs(imgs)
    assert names is None and (ours.eval()(imgs) - expected).abs().max() <= 1e-5 * expected.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Encoders of every Nth epoch
# ---------------------------------------------------------------------------------------------------------------------
def test_encoders_are_kept(folder, tmp_path):
    """SdAE's teacher, too; the last is encoder.pt; finetune.py takes each."""
    module("sdae").main(module("sdae").get_args(small_args(folder, tmp_path, "--epochs", 4, "--keep_every", 2)))
    names = sorted(path.name for path in tmp_path.glob("*-*.pt"))
    assert names == ["encoder-0002.pt", "encoder-0004.pt", "teacher-0002.pt", "teacher-0004.pt"]
    kept, last = (torch.load(tmp_path / name, weights_only=True)["model"] for name in (names[1], "encoder.pt"))
    assert all(torch.equal(kept[name], last[name]) for name in last)
    for name in names[1:3]:
        run_finetune("--ckpt", tmp_path / name, "--data", folder, "--mode", "knn", "--output_dir", tmp_path / "knn")


# ---------------------------------------------------------------------------------------------------------------------
# Efficient MAE's Table 5
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("radius, expected", [(1, 113.8), (2, 158.7)])
def test_other_difficulties(radius, expected):
    """A loop over each removed patch's neighbours, and the paper's counts, 114 and 159."""
    noise = torch.rand(1000, 196)
    keep, remove = efficient_mae.random_masking(noise, 29)
    difficulty = efficient_mae.neighbourhood(keep, remove, (14, 14), 16, radius)
    assert difficulty.isfinite().sum(dim=1).float().mean().item() == pytest.approx(expected, abs=0.5)
    for image in range(3):
        for patch, found in zip(remove[image].tolist(), difficulty[image].tolist()):
            apart = [(patch // 14 - other // 14, patch % 14 - other % 14) for other in keep[image].tolist()]
            inverse = [1 if radius == 1 else 1 / np.hypot(down, right)
                       for down, right in apart if max(abs(down), abs(right)) <= radius]
            assert found == pytest.approx(1 / sum(inverse) if inverse else np.inf, rel=1e-5)


def test_distance_to_the_nearest_patch():
    """A loop over the visible patches; and the paper's count: of 167 patches, all are predicted."""
    model = efficient_mae.EfficientMAE(**dict(SMALL, img_size=224, patch_size=16), difficulty="nearest")
    keep, remove, distance, easy = model.decoder_masking(torch.rand(100, 196))
    assert easy.sum(dim=1).tolist() == [167] * 100
    for patch, found in zip(remove[0].tolist(), distance[0].tolist()):
        apart = [np.hypot(patch // 14 - other // 14, patch % 14 - other % 14) for other in keep[0].tolist()]
        assert found == pytest.approx(16 * min(apart))
    with pytest.raises(InputError, match="--difficulty nearest"):
        efficient_mae.EfficientMAE(**SMALL, difficulty="nearest", beta=26)


@pytest.mark.parametrize("difficulty", ["3x3", "5x5", "nearest"])
def test_other_difficulties_weigh_and_drop(difficulty):
    """The loss is Eq. 2 over the patches of finite difficulty; with γ = 0 the mean over them."""
    model = efficient_mae.EfficientMAE(**SMALL, gamma=0.0, difficulty=difficulty).eval()
    imgs, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 64)
    loss, stats = model(imgs, noise)
    _, ids_remove, distance, easy = model.decoder_masking(noise)
    assert torch.equal(easy, distance.isfinite()) and stats["predicted_patches"] == easy.sum() / 3
    pred, _ = model.reconstruct(imgs, noise)
    patches = mae.patchify(imgs, 4)
    mean, std = mae.mean_and_std(patches)
    error = (pred - (patches - mean) / std).square().mean(dim=2).take_along_dim(ids_remove, dim=1)
    assert loss.item() == pytest.approx(np.mean([error[i][easy[i]].mean().item() for i in range(3)]), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# bench.py: Efficient MAE's Tables 1 and 4
# ---------------------------------------------------------------------------------------------------------------------
def test_cost_by_mask_ratio(monkeypatch):
    """Table 1's multiply-adds of ViT-L, in G: the encoder alone (its ratio 0), and MAE. No candidate runs here, and
    tensors have no data. The papers embed and predict all patches, the code fewer: 1 % apart."""
    args = bench.get_args("--methods mae --mask_ratio 0 0.01 0.5 --models vit_large --amp none --device cpu".split())
    monkeypatch.setattr(bench, "Candidate", lambda label, *_, **facts: types.SimpleNamespace(
        label=label, facts=facts, times=[1.0], memory=None))
    monkeypatch.setattr(bench, "measure", lambda *_: None)
    with FakeTensorMode():
        (_, _, _, (*candidates, _)), = bench.methods(args)
    assert [candidate.label for candidate in candidates] == [f"`mae.py --mask_ratio {x}`" for x in ("0", "0.01", "0.5")]
    assert [c.facts["macs"] / 3e9 for c in candidates] == pytest.approx([61.6, 66.4, 36.0], rel=0.01)


def test_bench_of_the_encoder_alone_and_of_flags(tmp_path):
    """As a user runs it, two steps each."""
    words = "--models vit_tiny --amp none --device cpu --batch_size 2 --rounds 1 --seconds 0.01".split()
    script("bench.py", "--methods", "mae --mask_ratio 0", "efficient_mae --beta inf", *words, "--output_dir", tmp_path,
           check=True)
    table = (tmp_path / "methods_cpu.md").read_text()
    assert "\n| `mae.py --mask_ratio 0` |" in table and "\n| `efficient_mae.py --beta inf` |" in table


@pytest.mark.parametrize("words, message", [
    (["--methods", "mae", "emae", "--mask_ratio", "0"], "emae.py: unrecognized arguments: --mask_ratio 0"),
    (["--mask_ratio", "0.5"], "emae.py: unrecognized arguments: --mask_ratio 0.5"),
    (["--methods", "mae", "efficient_mae --bta 9"], "efficient_mae.py: unrecognized arguments: --bta 9"),
    (["--methods", "mae", "timm"], "--methods: 'timm' is none of mae, efficient_mae, "),
    (["--methods", "mae", ""], "--methods: '' is none of mae"),
    (["--methods", "mae", "mae --batch_size=64"], "--methods: --batch_size must be the same for all rows"),
    (["--methods", "sdae"], "--methods must begin with mae")])
def test_bench_refuses(words, message):
    with pytest.raises(InputError, match=message):
        bench.get_args(words)


def test_bench_refuses_in_one_line():
    process = script("bench.py", "--mask_ratio", "1")
    assert process.returncode == 2 and process.stderr == "bench.py: error: argument --mask_ratio: 1 is not in [0, 1)\n"


# ---------------------------------------------------------------------------------------------------------------------
# MAE's Table 1
# ---------------------------------------------------------------------------------------------------------------------
def test_ablations_without_flags_are_mae():
    ours, theirs = mae_ablations.AblatedMAE(**SMALL, norm_pix=True), mae.MAE(**SMALL)
    ours.load_state_dict(theirs.state_dict())
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    assert ours(imgs, noise)[0] == theirs(imgs, noise)[0]
    assert all(torch.equal(a, b) for a, b in zip(ours.reconstruct(imgs, noise), theirs.reconstruct(imgs, noise)))


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_block_and_grid_masks(ratio):
    """Blocks: each image loses equally many patches, and far more pairs of neighbours are alike than at random; grid:
    one of each 2×2 stays."""
    noise = torch.rand(64, 196)
    keep, remove = mae_ablations.block_order(noise, (14, 14), int(196 * (1 - ratio)))
    assert keep.shape == (64, int(196 * (1 - ratio)))
    assert torch.equal(torch.cat([keep, remove], dim=1).sort(dim=1).values, torch.arange(196).expand(64, -1))

    def alike(ids):
        mask = torch.zeros(64, 196).scatter(1, ids, 1.0).view(64, 14, 14)
        return (mask[:, 1:] == mask[:, :-1]).float().mean().item()
    assert alike(keep) > 0.8 > 0.7 > alike(mae.random_masking(noise, keep.shape[1])[0])
    model = mae_ablations.AblatedMAE(**SMALL, masking="grid")
    keep, _ = model.mask_sampling(torch.rand(3, 64))
    assert torch.equal(keep.sort(dim=1).values[0], torch.arange(64).view(8, 8)[::2, ::2].flatten())


def test_encoder_with_mask_tokens():
    """It sees no removed pixel, but all places: the prediction of a patch depends on the token, not on the patch."""
    model = mae_ablations.AblatedMAE(**SMALL, encoder_mask_tokens=True).eval()
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    ids_keep, ids_remove = model.mask_sampling(noise)
    patches = mae.patchify(imgs, 4)
    latent = model.forward_encoder(patches, ids_keep, ids_remove)
    assert latent.shape == (2, 65, 48)
    changed = patches.scatter(1, ids_remove[:, :, None].expand(-1, -1, 48), 5.0)
    assert torch.equal(latent, model.forward_encoder(changed, ids_keep, ids_remove))
    model(imgs, noise)[0].backward()
    assert model.encoder_mask_token.grad.abs().sum() > 0 and model.mask_token.grad is None


def test_loss_on_all_patches_and_on_coefficients():
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    patches = mae.patchify(imgs, 4)
    model = mae_ablations.AblatedMAE(**SMALL, loss="all").eval()
    expected = F.mse_loss(model.reconstruct(imgs, noise)[0], patches)
    assert model(imgs, noise)[0].item() == pytest.approx(expected.item(), rel=1e-5)

    model = mae_ablations.AblatedMAE(**SMALL, target="pca", components=48).eval()
    model.components[:] = torch.linalg.qr(torch.randn(48, 48)).Q        # all of them: a turn, which keeps lengths
    pred, mask = model.reconstruct(imgs, noise)
    error = (pred - patches).square().mean(dim=2)[mask.bool()].mean()
    assert model(imgs, noise)[0].item() == pytest.approx(error.item(), rel=1e-5)


def test_principal_components(folder):
    """Those of numpy, up to sign, of the same crops' patches."""
    source = common.load_dataset(str(folder), "pretrain")
    crops = common.Crops(source, common.train_transform(16, (0.2, 1.0)))
    ours = mae_ablations.pca(crops, (common.IMAGENET_MEAN, common.IMAGENET_STD), 4, 5)
    imgs = common.normalize(torch.stack([crops[0, i][0] for i in range(len(crops))]))
    patches = mae.patchify(imgs, 4).flatten(0, 1).double().numpy()
    _, _, theirs = np.linalg.svd(patches - patches.mean(axis=0), full_matrices=False)
    assert np.allclose(abs(np.diag(theirs[:5] @ ours.double().numpy())), 1, atol=1e-3)


def test_augmentations():
    """none is the evaluation's crop; fixed a window of the resized image; jitter changes colours, not the size."""
    img = torch.from_numpy(np.array(photo(3, (60, 44)))).permute(2, 0, 1)

    def apply(name):
        torch.manual_seed(0)
        return mae_ablations.augmentation(types.SimpleNamespace(
            augmentation=name, img_size=[32], crop_scale=[0.2, 1.0], in_chans=3), False)(img)
    assert torch.equal(apply("none"), common.eval_transform(32)(img))
    whole = common.v2.functional.resize(img, 36, common.InterpolationMode.BICUBIC)
    windows = whole.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    fixed = apply("fixed")
    assert any(torch.equal(fixed, window) or torch.equal(fixed.flip(2), window) for window in windows)
    assert apply("jitter").shape == apply("crop").shape and not torch.equal(apply("jitter"), apply("crop"))
    with pytest.raises(InputError, match="jitter is made for RGB files"):
        mae_ablations.augmentation(types.SimpleNamespace(augmentation="jitter", img_size=[32], in_chans=3), True)


# ---------------------------------------------------------------------------------------------------------------------
# A sixth script
# ---------------------------------------------------------------------------------------------------------------------
def test_a_sixth_script(folder, tmp_path):
    """The tutorial's last chapter, followed to the letter in a copy of the repository: the script trains, is probed,
    drawn, and the guard takes it; no other file changes."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    text = (ROOT / "mae.py").read_text()
    steps = re.findall(r"```diff\n# mae.py -> crossmae.py\n(.*?)```", (ROOT / "docs/reading.md").read_text(), re.S)
    assert len(steps) > 5
    for step in steps:
        before, after = ("".join(line[1:] + "\n" for line in step.splitlines() if line[:1] != sign) for sign in "+-")
        if before:
            start = max(0, text.rfind(before)) if text.count(before) == 1 else text.index("    def forward(self, imgs")
            assert before in text[start:], step
            text = text[:start] + text[start:].replace(before, after, 1)
        else:                                   # only lines to add: in front of the model
            text = text.replace("class ", after + "class ", 1)
    (tmp_path / "crossmae.py").write_text(text)

    def run(*words):
        words = [sys.executable, *map(str, words)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout
    assert "Done. Next" in run("crossmae.py", *small_args(folder, tmp_path / "run"))
    assert "top1" in run("finetune.py", "--ckpt", tmp_path / "run/last.pt", "--data", folder, "--mode", "knn")
    run("visualize.py", "seeds", "--ckpt", tmp_path / "run/last.pt", "--images", folder, "--output", tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
    assert "passed" in run("-m", "pytest", "-q", "test_all.py", "-k", "guard", "-p", "no:cacheprovider")
    (tmp_path / "crossmae.py").write_text(text.replace("  # CrossMAE: a random quarter of the patches", ""))
    with pytest.raises(AssertionError, match="CrossMAE"):
        run("-m", "pytest", "-q", "test_all.py", "-k", "guard", "-p", "no:cacheprovider")


# ---------------------------------------------------------------------------------------------------------------------
# docs/running.md: timm and Hugging Face
# ---------------------------------------------------------------------------------------------------------------------
def test_conversions_of_the_docs(folder, pretrained, tmp_path, monkeypatch):
    """The page's own lines, run in a folder with a small model's checkpoints: what they make computes the same. Only
    sizes are changed, and nothing is downloaded."""
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    text = (ROOT / "docs/running.md").read_text().split("\n## timm and Hugging Face\n")[1].split("\n## ")[0]
    to_timm, from_timm, names, to_hf, from_hf = re.findall(r"```python\n(.*?)```", text, re.S)
    assert re.search(r'create_model\("(.*?)", pretrained', from_timm)[1] in timm.list_pretrained()

    vit = dict(img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=2)
    theirs = dict(image_size=32, patch_size=8, hidden_size=128, num_hidden_layers=4, num_attention_heads=2,
                  intermediate_size=512, decoder_hidden_size=32, decoder_num_hidden_layers=1,
                  decoder_num_attention_heads=2, decoder_intermediate_size=128)
    config = transformers.ViTMAEConfig(**theirs, layer_norm_eps=1e-6, norm_pix_loss=True)
    their_model = transformers.ViTMAEForPreTraining(config).eval()
    small = functools.partial(mae.MAE, **vit, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name, **vit, **more))
    monkeypatch.setattr(transformers.ViTMAEForPreTraining, "from_pretrained", lambda name: their_model)
    monkeypatch.setattr(mae, "MAE", small)
    shutil.copytree(pretrained, tmp_path / "runs/mae")
    monkeypatch.chdir(tmp_path)

    imgs, noise, ours, made = torch.randn(2, 3, 32, 32), torch.rand(2, 16), small(), {"sizes": theirs}
    ours.load_state_dict(torch.load("runs/mae/last.pt", weights_only=True)["model"])
    exec(to_timm, made)
    torch.testing.assert_close(made["encoder"].eval()(imgs), ours.features(imgs))
    exec(from_timm, made)
    loaded, *_ = finetune.load_encoder("timm.pt")
    assert all(torch.equal(value, loaded[name]) for name, value in made["encoder"].state_dict().items())
    mae.main(mae.get_args(small_args(folder, tmp_path / "from_timm", "--init_from", "timm.pt")))

    exec(names, made)
    exec(to_hf.replace("ViTMAEConfig(", "ViTMAEConfig(**sizes, "), made)
    torch.testing.assert_close(made["model"](imgs, noise=noise).loss, ours(imgs, noise)[0])
    exec(from_hf, made)
    torch.testing.assert_close(made["model"](imgs, noise)[0], their_model(imgs, noise=noise).loss)
    made["model"].load_state_dict(torch.load("vit-mae-base.pt", weights_only=True)["model"])


# ---------------------------------------------------------------------------------------------------------------------
# Claims with seeds, and small weights
# ---------------------------------------------------------------------------------------------------------------------
def program(name):
    """A program of results/, as a module."""
    sys.path.insert(0, str(ROOT / "results"))
    try:
        return module(name)
    finally:
        sys.path.pop(0)


def claims():
    return program("claims")


def test_dense_transfer_comes_from_committed_files():
    """The page of dense transfer; each file's command is its row's, and its figures are those of the last epoch."""
    dense = program("dense")
    assert (ROOT / "results/dense.md").read_text() == dense.page()
    for path in (ROOT / "results/dense").glob("*.json"):
        run, (words, encoder) = json.loads(path.read_text()), dense.ROWS[path.stem[:-6]]
        assert run["command"] == f"{words} --seed {path.stem[-1]}"
        assert run["encoder"] == dense.ENCODERS.get(encoder, "none")
        for name, value in run["result"].items():
            assert value == pytest.approx(run["log"][-1].get(name, value), abs=0.006), (path.name, name)


def test_claims_come_from_committed_files():
    """The page, the weights' card, and what the README says of them."""
    page = (ROOT / "results/claims.md").read_text()
    assert page == claims().page(ROOT / "results/claims")
    assert (ROOT / "weights/README.md").read_text() == program("weights").card()
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| .* \|$", readme.partition("## Do the claims hold?")[2].partition("## Speed")[0], re.M)
    assert len(rows) >= 5 and all(row in page for row in rows)
    found, figures = claims().read(ROOT / "results/claims"), r" (\d\d\.\d) / (\d\d\.\d) %"
    named = re.findall(r"\[`(\w+)\.py`\].*?" + figures + r" \|", readme)
    assert sorted(method for method, *_ in named) == sorted(claims().METHODS)
    random = re.search("random weights:" + figures, readme).groups()
    for name, linear, finetuned in [*((f"all_{method}", *of) for method, *of in named), ("random", *random)]:
        assert (linear, finetuned) == (f"{found[name][0]['linear']:.1f}", f"{found[name][0]['finetune']:.1f}")


def test_weights_of_the_consistency_come_from_committed_files():
    """The table of docs/reading.md: means of linear probes, and of how many seeds."""
    found, text = claims().read(ROOT / "results/claims"), (ROOT / "docs/reading.md").read_text()
    for epochs, length in ((8, "_8ep"), (40, "")):
        cells = re.search(rf"\| [\d,]+ \({epochs} epochs\) \| (.*) \|", text).group(1).split(" | ")
        rows = f"mae{length}", *(f"emae{length}{weight}" for weight in ("_w0", "_w0.1", "_w0.5", ""))
        for cell, row in zip(cells, rows, strict=True):
            values = [run["linear"] for run in found[row].values()]
            each = f": {', '.join(f'{value:.1f}' for value in values)}" if len(values) > 1 else ""
            assert cell == (f"{np.mean(values):.1f} ({len(values)}{each})" if values else "not run"), row


def test_a_difference_shows_as_in_the_books():
    """Residuals against least squares on indicators of rows and seeds, Student's t against a printed table, and Holm's
    correction by hand."""
    random = np.random.RandomState(0)
    names = list(dict.fromkeys(name for *_, a, b in claims().CLAIMS for name in (a, b)))
    x = random.randn(len(names), 3) + random.randn(3) + 3 * np.arange(len(names))[:, None] % 7
    x[["8ep" in name for name in names]] *= 2                                       # short runs scatter more
    found = {name: {seed: {"linear": x[i, seed]} for seed in range(3)} for i, name in enumerate(names)}
    for short in (False, True):
        of = x[[("8ep" in name) == short for name in names]]
        deviation, df, number = claims().residual(found, short)
        indicators = [[*np.eye(len(of))[i], *np.eye(3)[seed, 1:]] for i in range(len(of)) for seed in range(3)]
        _, (square,), *_ = np.linalg.lstsq(np.array(indicators), of.ravel(), rcond=None)
        assert (number, df) == (len(of), 2 * len(of) - 2) and deviation == pytest.approx(np.sqrt(square / df))

    long = [name for name in names if "8ep" not in name]
    for rows, student in ((1, np.inf), (2, 4.303), (3, 2.776), (5, 2.306), (11, 2.086)):    # t_0.975 of 2, 4, 8, 20
        few = {name: found[name] if name in long[:rows] else {0: found[name][0]} for name in names}
        s, _, _ = claims().residual(few, False)
        pairs, _, _, least, p, _ = claims().compare(few)[0]
        assert least == pytest.approx(student * s * np.sqrt(2 / pairs), rel=1e-3) and (rows > 1 or p > 0.9999)
    compared = claims().compare(found)
    ps = np.array([entry[4] for entry in compared])
    order, holds = ps.argsort(), np.zeros(len(ps), bool)
    for rank, i in enumerate(order):
        if ps[i] >= 0.05 / (len(ps) - rank):
            break
        holds[i] = True
    assert [entry[5] for entry in compared] == holds.tolist() and 0 < holds.sum() < len(ps)
    for (claim, *_), (_, a, b, least, p, holm) in zip(claims().CLAIMS, compared):
        word = "higher lower" if "≈" in claim or "against" in claim else "yes reversed"
        word = word.split()[int(a < b)] if p < 0.05 else "no difference shows"
        word += ", also after Holm's correction" * bool(holm and p < 0.05)
        assert claims().verdict(claim, a, b, least, holm) == word


@pytest.mark.parametrize("name", ["mae", "emae", "efficient_mae", "robust_mae", "sdae"])
def test_small_weights(name, folder, tmp_path):
    """A whole model in float16 is taken by --ckpt, --init_from and, where it predicts pixels, visualize.py; and so are
    those of weights/, whose hashes are in their card (above)."""
    method = module(name)
    method.main(method.get_args(small_args(folder, tmp_path / "run")))
    program("weights").save_weights(tmp_path / "run/last.pt", tmp_path / f"{name}.pt")
    for path in (tmp_path / f"{name}.pt", *(ROOT / "weights").glob(f"{name}_*.pt")):
        assert path.stat().st_size < 4e6
        args = torch.load(path, weights_only=True)["args"]
        run_finetune("--ckpt", path, "--data", folder, "--mode", "knn", "--output_dir", tmp_path / "knn")
        own = [] if path.parent == tmp_path else [
            word for flag in ("model", "img_size", "patch_size", "decoder_embed_dim", "decoder_depth")
            for word in (f"--{flag}", *np.ravel(args[flag]).tolist())]
        method.main(method.get_args(small_args(folder, tmp_path / path.stem, "--init_from", path, *own)))
        if name != "sdae":
            visualize = module("visualize")
            visualize.main(visualize.get_args(["seeds", "--ckpt", str(path), "--images", str(folder), "--output",
                                               str(tmp_path / "seeds.png")]))
