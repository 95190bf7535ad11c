#!/usr/bin/env bash
# VAR-d36 with shared AdaLN, ImageNet 512. Usage: recipes/var_d36_512.sh /path/to/imagenet [more flags]; 8 GPUs per node, see README for several nodes.
set -euo pipefail
data=$(realpath "${1:?expected the data folder: $0 /path/to/imagenet [more flags]}")
cd "$(dirname "$0")/.."
torchrun ${TORCHRUN:---standalone --nproc_per_node=8} train.py \
  --data_path="$data" --depth=36 --saln=1 --pn=512 --bs=768 --ep=350 --tblr=8e-5 --fp16=1 --alng=5e-6 --wpe=0.01 --twde=0.08 "${@:2}"
