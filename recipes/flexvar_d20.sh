#!/usr/bin/env bash
# FlexVAR-d20, ImageNet 256. Usage: recipes/flexvar_d20.sh /path/to/imagenet [more flags]; 8 GPUs per node, see README for several nodes.
set -euo pipefail
data=$(realpath "${1:?expected the data folder: $0 /path/to/imagenet [more flags]}")
cd "$(dirname "$0")/.."
torchrun ${TORCHRUN:---standalone --nproc_per_node=8} train.py \
  --model=flexvar --data_path="$data" --depth=20 --bs=768 --ep=250 --fp16=1 --alng=1e-3 --wpe=0.1 "${@:2}"
