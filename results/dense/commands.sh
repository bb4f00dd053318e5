#!/usr/bin/env bash
# Three seeds of the demos on drawn scenes: our encoder against random weights, frozen and fine-tuned. About 3 minutes a run
# on two idle cores, so 80 in all; --demo's encoder first. Writes results/dense/NAME.json and NAME.jsonl, and the table.
set -e
cd "$(dirname "$0")/../.."
runs=${1:-runs/dense}
for seed in 0 1 2; do
    python mae.py --demo --seed $seed --output_dir "$runs/mae_$seed"
    for script in segment detect; do
        for ckpt in "$runs/mae_$seed/last.pt" none; do
            for mode in "" --freeze; do
                name=${script}_$([ "$ckpt" = none ] && echo random || echo mae)$([ "$mode" ] && echo _frozen || true)_seed$seed
                python $script.py --demo --ckpt "$ckpt" $mode --seed $seed --output_dir "$runs/$name"
                cp "$runs/$name/result.json" results/dense/$name.json
                cp "$runs/$name/log.jsonl" results/dense/$name.jsonl
            done
        done
    done
done
python - <<'PYTHON'
import json
print("| | mIoU | box AP | box AP50 | mask AP |\n|---|---|---|---|---|")
for mode in ("", "_frozen"):
    for start in ("mae", "random"):
        cells = []
        for script, figure in (("segment", "mIoU"), ("detect", "box_AP"), ("detect", "box_AP50"), ("detect", "mask_AP")):
            values = [json.load(open(f"results/dense/{script}_{start}{mode}_seed{seed}.json"))[figure] for seed in range(3)]
            cells.append(f"{sum(values) / 3:.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"| {'frozen' if mode else 'fine-tuned'}, {start} | {' | '.join(cells)} |")
PYTHON
