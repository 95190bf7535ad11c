#!/usr/bin/env bash
# FlowAR on a laptop: a KL tokenizer for the embedded digits, and two generators that differ in how their loss weights
# the times, and in nothing else; then 1,000 drawn digits of each, the same noise for both.
# Every step resumes or is skipped when it is done. PYTHON and OUT may be set; see `make demo-flowar`.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-local_output/demo_flowar}
export OMP_NUM_THREADS=1 BEGAN=${BEGAN:-$(date +%s)}
torchrun() { "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=2 "$@"; }
digits="--data_path=digits --mid_reso=1.07 --hflip=0 --workers=0 --seed=0"

torchrun train.py --model=kl16 --preset=tiny $digits --output_dir="$OUT/kl" --eval_every=8 --kl_weight=1e-5 --steps=1000
for weighting in uniform debiased; do
    torchrun train.py --model=flowar $digits --output_dir="$OUT/$weighting" --vae_path="$OUT/kl/vae-ckpt-last.pth" \
        --loss_weighting=$weighting --eval_every=5 --img_size=32 --vae_stride=8 --size=small --depth=3 --width=192 \
        --diffloss_d=3 --diffloss_w=192 --attn_dropout=0 --proj_dropout=0 --bs=64 --epochs=40 --warmup_epochs=2 \
        --blr=2e-3 --ema_rate=0.99
    torchrun sample.py --model=flowar --ckpt="$OUT/$weighting/ar-ckpt-last.pth" --output="$OUT/samples_$weighting" \
        --num_images=1000 --bs=100 --cfg=1.5
done
"$PYTHON" -m bench.demo_flowar_report --dir="$OUT" --began="$BEGAN"
