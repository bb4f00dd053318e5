for seed in 0 1 2; do
  python mae.py --demo --seed $seed --output_dir runs/demo$seed
  python finetune.py --demo --seed $seed --ckpt runs/demo$seed/last.pt --mode linear
  python finetune.py --demo --seed $seed --ckpt none --mode linear --output_dir runs/demo$seed/random_linear
  python finetune.py --demo --seed $seed --ckpt none --mode finetune --output_dir runs/demo$seed/supervised
done
python finetune.py --demo --ckpt runs/demo0/last.pt --mode finetune
python finetune.py --demo --ckpt runs/demo0/last.pt --mode knn
python finetune.py --demo --ckpt runs/demo0/last.pt --mode linear --pool cls --output_dir runs/demo0/linear_cls
python finetune.py --demo --ckpt none --mode linear --pool cls --output_dir runs/demo0/random_linear_cls
