#!/usr/bin/env bash
# NPP on a laptop: a VQ tokenizer for the embedded digits at 64x64 pixels, its codes extracted once, and two GPTs, one
# trained by patches of 2x2 codes, then by codes, the other by codes alone for at least as long; then 1,000 drawn digits of each.
# Every step resumes or is skipped when it is done. PYTHON and OUT may be set; see `make demo-npp`.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-local_output/demo_npp}
export OMP_NUM_THREADS=1 BEGAN=${BEGAN:-$(date +%s)}
torchrun() { "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=2 "$@"; }
tokenizer=$OUT/vq/vae-ckpt-last.pth

torchrun train.py --model=vq16 --preset=tiny --data_path=digits --mid_reso=1.07 --hflip=0 --seed=0 --image_size=64 \
    --vocab_size=256 --steps=400 --eval_every=4 --output_dir="$OUT/vq"
torchrun extract.py --model=npp --vq_ckpt="$tokenizer" --data_path=digits --image_size=64 --ten_crop --crop_range=1.07 \
    --workers=0 --code_path="$OUT/codes"
torchrun extract.py --model=npp --vq_ckpt="$tokenizer" --data_path=digits --image_size=64 --split=val --workers=0 \
    --code_path="$OUT/codes_val"
train() {
    torchrun train.py --model=npp --vq_ckpt="$tokenizer" --code_path="$OUT/codes" --cached_val_path="$OUT/codes_val" \
        --hflip=0 --workers=0 --seed=0 --image_size=64 --downsample_size=8 --mixed_precision=none --depth=4 --width=192 \
        --bs=64 --lr=2e-3 --scheduler --dropout_p=0.05 --token_dropout_p=0.05 --eval_every=4 "$@"
}
train --patch_level=2 --epoch_rate=0.5 --epochs=40 --output_dir="$OUT/npp"
train --patch_level=1 --epochs=30 --output_dir="$OUT/plain"
for name in npp plain; do
    torchrun sample.py --model=npp --ckpt="$OUT/$name/ar-ckpt-last.pth" --output="$OUT/samples_$name" --num_images=1000 \
        --bs=250 --cfg=2 --top_p=0.9
done
"$PYTHON" -m bench.demo_npp_report --dir="$OUT" --began="$BEGAN"
