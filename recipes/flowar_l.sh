#!/usr/bin/env bash
# FlowAR-L, ImageNet 256. Usage: recipes/flowar_l.sh /path/to/imagenet [more flags]; 8 GPUs per node, see README for several nodes.
set -euo pipefail
data=$(realpath "${1:?expected the data folder: $0 /path/to/imagenet [more flags]}")
cd "$(dirname "$0")/.."
torchrun ${TORCHRUN:---standalone --nproc_per_node=8} train.py \
  --model=flowar --data_path="$data" --size=large --diffloss_d=12 --diffloss_w=1024 --bs=2048 --epochs=400 --warmup_epochs=100 --blr=5e-5 --use_checkpoint "${@:2}"
