# The four papers' demos, seeds 0, 1, 2. Run as two of these at a time, each with OMP_NUM_THREADS=1 on its own core.
for seed in 0 1 2; do
  for method in "$@"; do    # emae robust_mae, and beside it sdae efficient_mae
    python $method.py --demo --seed $seed --output_dir runs/$method$seed
    python finetune.py --demo --seed $seed --ckpt runs/$method$seed/last.pt --mode linear
  done
done
