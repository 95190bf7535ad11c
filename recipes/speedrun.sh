#!/usr/bin/env bash
# The fastest way from raw images to 1,000 drawn digits that meet the bars of `make demo`; see `make speedrun`.
# It begins from nothing in a folder of its own. PYTHON, OUT, SEED and LEADERBOARD may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-local_output/speedrun/$(date +%F_%H-%M-%S)}
LEADERBOARD=${LEADERBOARD:-bench/results/speedrun.json}
export OMP_NUM_THREADS=1
torchrun() { "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=2 "$@"; }
digits="--data_path=digits --mid_reso=1.07 --pn=1_2_3_4 --patch_size=8 --workers=0 --seed=${SEED:-0}"
digits="$digits --eval_every=100 --tb=0"

began=$(date +%s.%N)
torchrun train.py --model=vqvae --preset=tiny $digits --output_dir="$OUT/vqvae" \
    --hflip=0 --vocab_size=256 --steps=200 --tblr=1e-2
torchrun train.py $digits --output_dir="$OUT/var" --vae_ckpt="$OUT/vqvae/vae-ckpt-last.pth" \
    --depth=2 --bs=64 --ep=8 --tblr=1.2e-2 --alng=1e-2 --wp=1
torchrun sample.py --ckpt="$OUT/var/ar-ckpt-last.pth" --output="$OUT/samples" --num_images=1000 --cfg=0.5 --bs=100
ended=$(date +%s.%N)

"$PYTHON" -m bench.speedrun --dir="$OUT" --began="$began" --ended="$ended" --leaderboard="$LEADERBOARD"
