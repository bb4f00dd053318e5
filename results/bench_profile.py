"""Where the time of MAE's forward and backward goes on a CPU, by torch's profiler: python results/bench_profile.py

The share of matrix products bounds what other code for the same model could gain."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import profile

import bench
import mae

KINDS = {"matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
         "fused attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",
                             "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
         "copies and casts": ("aten::copy_",), "GELU": ("aten::gelu", "aten::gelu_backward"),
         "softmax": ("aten::_softmax", "aten::_softmax_backward_data"),
         "LayerNorm": ("aten::native_layer_norm", "aten::native_layer_norm_backward")}
for name in ("vit_tiny", "vit_base"):
    for amp, dtype in (("bf16", torch.bfloat16), ("none", None)):
        settings, batch_size, _ = bench.SETTINGS[name]
        args = mae.get_args(["--model", name, *settings.split()])
        model = mae.build_model(args)
        batch_size = batch_size if dtype else batch_size // 2
        imgs = torch.randn(batch_size, 3, args.img_size[0], args.img_size[0])

        def step():
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss, _ = model(imgs)
            loss.backward()
            model.zero_grad()

        for _ in range(3):
            step()
        with profile() as profiled:
            for _ in range(5):
                step()
        spent = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
        total = sum(spent.values())
        shares = {kind: sum(spent.get(key, 0) for key in keys) / total for kind, keys in KINDS.items()}
        shares["all else"] = 1 - sum(shares.values())
        print(f"{name}, {amp}, {batch_size} images, {total / 5e3:.0f} ms a step:",
              ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shares.items()), flush=True)
