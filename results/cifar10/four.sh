# The four papers on CIFAR-10 as JPEG files in data/cifar10_jpeg/{train,val}/CLASS/, and MAE for as many epochs.
# 2 CPU cores: two processes of one thread each.
run() { torchrun --standalone --nproc_per_node 2 "$@"; }
size="--model vit_micro --img_size 32 --patch_size 4 --decoder_embed_dim 64 --decoder_depth 1 --decoder_num_heads 2"
for method in robust_mae efficient_mae sdae emae mae; do
  run $method.py --data data/cifar10_jpeg $size --batch_size 128 --epochs 5 --warmup_epochs 1 --blr 3e-3 --num_workers 0 --output_dir runs/cifar10_$method
  run finetune.py --ckpt runs/cifar10_$method/encoder.pt --data data/cifar10_jpeg --mode knn --num_workers 0 --pool avg
done
