#!/usr/bin/env bash
# Neon on the digits: images of the VAR of `make demo`, a short training on them, and a sweep over how far the weights go
# away from it and over the guidance; see docs/post_training.md. In the table, neon_w=0 is the VAR as it was.
# Every step resumes or is skipped when it is done. PYTHON, OUT, CKPT, SEED, IMAGES and NPROC may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-local_output/neon_digits}
CKPT=${CKPT:-local_output/demo/var/ar-ckpt-last.pth}
SEED=${SEED:-0}
export OMP_NUM_THREADS=1
torchrun() { "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC:-2}" "$@"; }
tuned=$OUT/tuned/ar-ckpt-last.pth

# 1. What the VAR draws with the guidance that it is used with.
torchrun sample.py --ckpt="$CKPT" --output="$OUT/drawn" --num_images=1000 --cfg=1.5 --seed="$SEED" --format=npz --bs=100
# 2. A few steps on that, at a constant rate of 1e-4 and without weight decay.
torchrun train.py --init_from="$CKPT" --vae_ckpt="$CKPT" --data_path="$OUT/drawn.npz" --val_path=digits --mid_reso=1.07 \
    --pn=1_2_3_4 --patch_size=8 --depth=3 --workers=0 --seed="$SEED" --bs=64 --steps=30 --tblr=4e-4 --sche=constant --wp0=1 \
    --twd=0 --output_dir="$OUT/tuned"
# 3. The other way, with noise that step 1 did not use.
"$PYTHON" evaluate.py pack digits "$OUT/digits.npz" --image_size=32 --split=train
torchrun sample.py --ckpt="$CKPT" --neon_from="$tuned" --sweep="neon_w=0,0.5,1,1.5 cfg=0,0.5,1,1.5,2" \
    --num_images="${IMAGES:-1000}" --seed="$((SEED + 1000))" --format=npz --bs=100 --ref="$OUT/digits.npz" \
    --score="--features=digits" --output="$OUT/sweep"
