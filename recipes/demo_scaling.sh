#!/usr/bin/env bash
# Scaling laws on a laptop: VARs of five depths on stored codes of the embedded digits, and the laws that their losses and
# errors follow. The tokenizer is that of `make demo`, which is trained here unless it is there.
# Every step resumes or is skipped when it is done. PYTHON, OUT, TOKENIZER, NPROC, DEPTHS and EPOCHS may be set; see
# `make demo-scaling`.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-local_output/demo_scaling}
TOKENIZER=${TOKENIZER:-local_output/demo/vqvae}
export OMP_NUM_THREADS=1
torchrun() { "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC:-2}" "$@"; }
pyramid="--pn=1_2_3_4 --image_size=32"
tokenizer=$TOKENIZER/vae-ckpt-last.pth

torchrun train.py --model=vqvae --preset=tiny --data_path=digits --mid_reso=1.07 --pn=1_2_3_4 --patch_size=8 --workers=0 \
    --seed=0 --eval_every=4 --output_dir="$TOKENIZER" --hflip=0 --vocab_size=256 --steps="${TOKENIZER_STEPS:-1350}"
torchrun extract.py --model=var --vae_ckpt="$tokenizer" --data_path=digits $pyramid --ten_crop --crop_range=1.07 \
    --workers=0 --cached_path="$OUT/codes"
torchrun extract.py --model=var --vae_ckpt="$tokenizer" --data_path=digits $pyramid --split=val --mid_reso=1.07 \
    --workers=0 --cached_path="$OUT/codes_val"
for depth in ${DEPTHS:-1 2 3 4 5}; do
    torchrun train.py --vae_ckpt="$tokenizer" --cached_path="$OUT/codes" --cached_val_path="$OUT/codes_val" \
        --pn=1_2_3_4 --patch_size=8 --workers=0 --seed=0 --depth="$depth" --width=$((16 * depth)) --bs=64 \
        --ep="${EPOCHS:-24}" --tblr=6e-3 --alng=1e-2 --wp=1 --eval_every=1 --output_dir="$OUT/d$depth"
done
"$PYTHON" evaluate.py scaling "$OUT" --json="$OUT/scaling.json" --plot="$OUT/scaling.png"
