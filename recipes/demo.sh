#!/usr/bin/env bash
# From raw images to scored samples on a laptop: a tokenizer and a VAR for the embedded digits, then 1,000 drawn digits.
# Every step resumes or is skipped when it is done. PYTHON and OUT may be set; see `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-local_output/demo}
export OMP_NUM_THREADS=1 BEGAN=${BEGAN:-$(date +%s)}
torchrun() { "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=2 "$@"; }
digits="--data_path=digits --mid_reso=1.07 --pn=1_2_3_4 --patch_size=8 --workers=0 --seed=0 --eval_every=4"

torchrun train.py --model=vqvae --preset=tiny $digits --output_dir="$OUT/vqvae" \
    --hflip=0 --vocab_size=256 --steps=1350
torchrun train.py $digits --output_dir="$OUT/var" --vae_ckpt="$OUT/vqvae/vae-ckpt-last.pth" \
    --depth=3 --bs=64 --ep=24 --tblr=6e-3 --alng=1e-2 --wp=1
torchrun sample.py --ckpt="$OUT/var/ar-ckpt-last.pth" --output="$OUT/samples" --num_images=1000 --cfg=1.5 --bs=100
"$PYTHON" -m bench.demo_var_report --dir="$OUT" --began="$BEGAN"
