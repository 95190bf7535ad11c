#!/usr/bin/env bash
# FlexVAR on a laptop: a tokenizer and a generator for the embedded digits, then digits in several numbers of steps,
# sizes and shapes, all from the same weights.
# Every step resumes or is skipped when it is done. PYTHON and OUT may be set; see `make demo-flexvar`.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-local_output/demo_flexvar}
export OMP_NUM_THREADS=1 BEGAN=${BEGAN:-$(date +%s)}
torchrun() { "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=2 "$@"; }
digits="--data_path=digits --mid_reso=1.07 --hflip=0 --workers=0 --seed=0 --eval_every=8"
draw="sample.py --model=flexvar --num_images=200 --bs=100 --cfg=1.5 --top_k=0 --top_p=0"

torchrun train.py --model=flexvae --preset=tiny $digits --output_dir="$OUT/flexvae" \
    --image_size=48 --vocab_size=256 --steps=900
torchrun train.py --model=flexvar $digits --output_dir="$OUT/flexvar" --vae_ckpt="$OUT/flexvae/vae-ckpt-last.pth" \
    --pn=1_2_3_4_6 --patch_size=8 --crop=resize --depth=3 --bs=64 --ep=24 --tblr=6e-3 --alng=1e-2 --wp=1
torchrun $draw --ckpt="$OUT/flexvar/ar-ckpt-last.pth" --output="$OUT/samples" --num_images=1000
torchrun $draw --ckpt="$OUT/flexvar/ar-ckpt-last.pth" --output="$OUT/steps_4" --infer_patch_nums=1_2_4_6
torchrun $draw --ckpt="$OUT/flexvar/ar-ckpt-last.pth" --output="$OUT/steps_6" --infer_patch_nums=1_2_3_4_5_6
torchrun $draw --ckpt="$OUT/flexvar/ar-ckpt-last.pth" --output="$OUT/large" --infer_patch_nums=1_2_3_4_6_9
torchrun $draw --ckpt="$OUT/flexvar/ar-ckpt-last.pth" --output="$OUT/tall" --size=72x48
torchrun $draw --ckpt="$OUT/flexvar/ar-ckpt-last.pth" --output="$OUT/wide" --size=48x72
"$PYTHON" -m bench.demo_flexvar_report --dir="$OUT" --began="$BEGAN"
