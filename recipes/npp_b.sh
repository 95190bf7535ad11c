#!/usr/bin/env bash
# NPP-B, ImageNet 256. Usage: CODES=FOLDER[,FOLDER] recipes/npp_b.sh /path/to/imagenet [more flags]; CODES is what extract.py
# wrote, see docs/training.md; the validation images are read from imagenet/val. 8 GPUs per node, see README for several nodes.
set -euo pipefail
data=$(realpath "${1:?expected the data folder: CODES=FOLDER $0 /path/to/imagenet [more flags]}")
codes=$(IFS=,; realpath ${CODES:?expected the codes of extract.py: CODES=FOLDER $0 /path/to/imagenet [more flags]} | paste -sd,)
cd "$(dirname "$0")/.."
torchrun ${TORCHRUN:---standalone --nproc_per_node=8} train.py \
  --model=npp --data_path="$data" --code_path="$codes" --gpt_model=GPT-B --image_size=256 --epoch_rate=0.5 --patch_level=2 --scheduler --bs=256 --epochs=300 "${@:2}"
