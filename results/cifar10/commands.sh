# CIFAR-10 as JPEG files in data/cifar10_jpeg/{train,val}/CLASS/. 2 CPU cores: two processes of one thread each.
run() { torchrun --standalone --nproc_per_node 2 "$@"; }
run mae.py --data data/cifar10_jpeg --model vit_micro --img_size 32 --patch_size 4 --decoder_embed_dim 64 --decoder_depth 1 --decoder_num_heads 2 --batch_size 128 --epochs 22 --warmup_epochs 2 --blr 3e-3 --num_workers 0 --output_dir runs/cifar10
encoder="--ckpt runs/cifar10/encoder.pt"
random="--ckpt none --model vit_micro --patch_size 4 --img_size 32"
for pool in avg cls; do
  run finetune.py $encoder --data data/cifar10_jpeg --mode knn --num_workers 0 --pool $pool --output_dir runs/cifar10/knn_$pool
  run finetune.py $random --data data/cifar10_jpeg --mode knn --num_workers 0 --pool $pool --output_dir runs/cifar10/random_knn_$pool
done
linear="--data data/cifar10_jpeg --mode linear --epochs 4 --warmup_epochs 0.5 --batch_size 256 --blr 10 --crop_scale 0.3 1 --num_workers 0"
run finetune.py $encoder $linear --pool avg --output_dir runs/cifar10/linear_avg
run finetune.py $random $linear --pool avg --output_dir runs/cifar10/random_linear_avg
