# The five demos on `shapes`, seeds 0, 1 and 2, each with a linear probe, and the probe on random weights. From the root:
# sh results/shapes.sh (two hours on a core). shapes/ keeps each run's log.jsonl and result.json.
for seed in 0 1 2; do
  for method in mae emae efficient_mae robust_mae sdae; do
    python $method.py --demo --seed $seed --output_dir runs/shapes/$method$seed
    python finetune.py --demo --seed $seed --ckpt runs/shapes/$method$seed/last.pt --mode linear
  done
  python finetune.py --demo --seed $seed --ckpt none --mode linear --output_dir runs/shapes/random$seed
done
