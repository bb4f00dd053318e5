"""What needs a GPU: the scripts on CUDA against the CPU, autocast, compilation, resuming, NCCL, evaluation, pictures.

    python -m pytest -q -m cuda test_cuda.py        # five minutes on one GPU, in order of worth

Nothing else in the suite runs these. TEST_DEVICE=cpu tries their own logic on a machine without a GPU.
"""
import json
import math
import os
import signal

import pytest
import torch
from torch.utils._pytree import tree_leaves

import finetune
import runs
import visualize
from common import normalize
from conftest import SCRIPTS, module, script, small_args

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = [pytest.mark.cuda,
              pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")]


def pretrain(name, folder, output, *more):
    """A short run of a script's own main on the device; its log, a list of dicts."""
    module(name).main(module(name).get_args(small_args(folder, output, "--device", DEVICE, *more)))
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """The output folder of one short run on the device, by the script's name."""
    outputs = {}

    def run(name):
        if name not in outputs:
            outputs[name] = tmp_path_factory.mktemp("cuda") / name
            pretrain(name, folder, outputs[name])
        return outputs[name]
    return run


def computed(model, imgs, noise, device, dtype):
    """Loss, prediction and all gradients, each as one vector in float32 on the CPU."""
    model = model.to(device).eval()                 # without dropout and drop path: other random numbers there
    model.zero_grad()
    imgs, noise = imgs.to(device), noise.to(device)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
        loss, _ = model(imgs, noise)
        pred, _ = model.reconstruct(imgs, noise)
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return [x.detach().float().nan_to_num().flatten().cpu() for x in (loss, pred, torch.cat(grads))]


@pytest.mark.parametrize("dtype, errors", [(None, (1e-4, 1e-4, 1e-4)), (torch.bfloat16, (1e-2, 1e-2, 2e-2))])
@pytest.mark.parametrize("name", SCRIPTS)
def test_cuda_equals_cpu(name, dtype, errors, folder):
    """Loss, prediction and gradients equal those of the CPU in float32, as shares of their norms."""
    torch.set_float32_matmul_precision("highest")   # no TF32
    args = module(name).get_args(small_args(folder, "nowhere", "--patch_size", "4"))
    model = module(name).build_model(args)
    imgs, noise = normalize(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)), torch.rand(4, 64)
    expected = computed(model, imgs, noise, "cpu", None)
    found = computed(model, imgs, noise, DEVICE, dtype)
    for what, ours, theirs, error in zip(("loss", "prediction", "gradients"), found, expected, errors):
        assert (ours - theirs).norm() <= error * theirs.norm(), what


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_does_not_wait(name, folder):
    """CUDA itself says so; Efficient MAE waits once, for the number of tokens that enter its decoder."""
    if DEVICE == "cpu":
        pytest.skip("a CPU never waits for itself")
    model = module(name).build_model(module(name).get_args(small_args(folder, "nowhere"))).to(DEVICE)
    imgs = torch.randn(4, 3, 32, 32, device=DEVICE)
    for mode in ("default", "error"):               # what is made in the first step may wait
        torch.cuda.set_sync_debug_mode(mode if name != "efficient_mae" else "default")
        try:
            with torch.autocast(DEVICE, torch.bfloat16):
                model(imgs)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SCRIPTS)
def test_autocast(name, folder, tmp_path):
    """Training goes alike in float32, bf16, and fp16 with the scaler; its weights and checkpoint are float32."""
    logs = {amp: pretrain(name, folder, tmp_path / amp, "--amp", amp) for amp in ("none", "bf16", "fp16")}
    for amp, log in logs.items():
        assert len(log) == 2 and all(math.isfinite(line["loss"]) for line in log)
        assert log[1]["loss"] == pytest.approx(logs["none"][1]["loss"], rel=0.02)
        checkpoint = torch.load(tmp_path / amp / "last.pt", map_location="cpu", weights_only=True)
        assert {x.dtype for x in checkpoint["model"].values()} == {torch.float32}
        assert bool(checkpoint["scaler"]) == (amp == "fp16")


@pytest.mark.parametrize("name", SCRIPTS)
def test_compile(name, folder, tmp_path, trained):
    log = pretrain(name, folder, tmp_path / "run", "--compile")
    plain = json.loads((trained(name) / "log.jsonl").read_text().splitlines()[-1])
    assert log[-1]["loss"] == pytest.approx(plain["loss"], rel=0.02)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_stopped_and_resumed(name, amp, folder, tmp_path, monkeypatch):
    """A SIGTERM in the second epoch: it saves and exits with 143. Repeated, the command ends as if nothing had been."""
    expected = pretrain(name, folder, tmp_path / "whole", "--amp", amp)
    end_step = runs.Run.end_step

    def interrupted(run, grad_norm):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        end_step(run, grad_norm)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(runs.Run, "end_step", interrupted)
        pretrain(name, folder, tmp_path / "cut", "--amp", amp)
    found = pretrain(name, folder, tmp_path / "cut", "--amp", amp)
    assert [line["epoch"] for line in found] == [0, 1]
    assert found[1]["loss"] == pytest.approx(expected[1]["loss"], rel=1e-3)
    ours, theirs = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("cut", "whole"))
    for x, y in zip(tree_leaves(ours["model"]), tree_leaves(theirs["model"]), strict=True):
        assert x.device.type == DEVICE and (x - y).norm() <= 1e-3 * y.norm() + 1e-6     # sums' order may vary
    assert all(x.device.type == DEVICE for x in tree_leaves(ours["optimizer"]["state"]) if torch.is_tensor(x))


def test_torchrun(folder, tmp_path, trained):
    """One process under torchrun: NCCL, and DistributedDataParallel where there are two GPUs."""
    processes = min(2, torch.cuda.device_count()) if DEVICE == "cuda" else 1
    done = script("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "mae.py",
                  *small_args(folder, tmp_path, "--device", DEVICE))
    assert done.returncode == 0, done.stderr
    log, plain = (json.loads((run / "log.jsonl").read_text().splitlines()[-1]) for run in (tmp_path, trained("mae")))
    assert log["loss"] == pytest.approx(plain["loss"], rel=0.05 if processes > 1 else 1e-3)     # other masks


@pytest.mark.parametrize("name", SCRIPTS)
def test_evaluation(name, folder, tmp_path, trained):
    """Each mode of finetune.py; k-NN as on the CPU, and a classifier that is scored again."""
    small = ["--data", str(folder), "--num_workers", "0", "--device", DEVICE]
    training = ["--epochs", "2", "--warmup_epochs", "1", "--batch_size", "16"]
    for mode in ("knn", "linear", "partial", "finetune", "eval"):
        ckpt = tmp_path / "finetune/last.pt" if mode == "eval" else trained(name) / "encoder.pt"
        words = ["--ckpt", str(ckpt), "--mode", mode, "--output_dir", str(tmp_path / mode), *small]
        result = finetune.main(finetune.get_args(words + training * (mode not in ("knn", "eval"))))
        assert result["images"] == 21 and 0 <= result["top1"] <= 100
        if mode == "knn":
            words += ["--device", "cpu", "--output_dir", str(tmp_path / "cpu")]
            on_cpu = finetune.main(finetune.get_args(words))
            assert abs(result["top1"] - on_cpu["top1"]) <= 10           # two images of 21
        if mode == "eval":
            assert result["top1"] == json.loads((tmp_path / "finetune/result.json").read_text())["top1"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_pictures(name, folder, tmp_path, trained):
    """Checkpoints from a GPU are drawn on the CPU, and each run has drawn its own."""
    assert (trained(name) / "reconstruction.png").stat().st_size > 1000
    for what in ("attention", "seeds"):
        words = [what, "--ckpt", trained(name) / "last.pt", "--images", folder / "val", "--output", tmp_path / "x.png"]
        if what == "attention" or hasattr(module(name).get_args([]), "norm_pix"):       # else it predicts features
            visualize.main(visualize.get_args([*map(str, words)]))
            assert (tmp_path / "x.png").stat().st_size > 1000
