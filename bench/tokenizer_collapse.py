"""Train the small VQVAE twice, with the published loss alone and with our defaults, and compare.

    python -m bench.tokenizer_collapse --steps=800 --out=bench/results

Both runs have the same seed, steps, network and images (the embedded toy set); they run side by side, on one
core each. `evaluate.py` counts the codes over the validation images.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from configs.options import REPO
from utils.files import write_text

VARIANTS = {  # flags of each training
    'published': ['--codebook=grad', '--codebook_init=inv_v', '--restart=0', '--defer=0', '--scale_drop=0'],
    'defaults': [],
}
SCALES = ('1x1', '2x2', '3x3', '4x4')
# What the defaults must gain after STEPS_OF_BARS steps; a longer training as published catches up.
STEPS_OF_BARS = 800
MIN_PSNR_GAIN = 0.8       # dB
MIN_PERPLEXITY_RATIO = 5  # of the coarsest scale


def commands(name: str, folder: Path, steps: int, seed: int) -> list[list[str]]:
    """Command lines of the training and of the evaluation of one variant."""
    run = folder / name
    train = [
        sys.executable,
        str(REPO / 'train.py'),
        f'--output_dir={run}',
        '--model=vqvae',
        '--preset=tiny',
        f'--steps={steps}',
        f'--seed={seed}',
        '--eval_every=1000',
        *VARIANTS[name],
    ]
    evaluate = [
        sys.executable,
        str(REPO / 'evaluate.py'),
        'tokenizer',
        f'--ckpt={run / "vae-ckpt-last.pth"}',
        '--data_path=toy',
        '--metrics=psnr,ssim,usage',
        f'--json={run / "scores.json"}',
    ]
    return [train, evaluate]


def run_side_by_side(command_lines: Iterable[list[str]]) -> None:
    """Run commands at the same time, with one thread each; exit if one of them fails."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    running = []
    for command_line in command_lines:
        running.append(subprocess.Popen(command_line, env=environment, stdout=subprocess.DEVNULL))
    exit_codes = [process.wait() for process in running]
    if any(exit_codes):
        sys.exit('tokenizer_collapse: a run failed, see its message above')


def print_table(scores: dict[str, dict[str, float]]) -> None:
    """Print PSNR and use of the codes, one line for each variant."""
    print(f'{"":12}{"PSNR":>8}  distinct codes and perplexity per scale, of 512')
    for name, values in scores.items():
        cells = []
        for scale in SCALES:
            distinct = values[f'distinct_{scale}']
            perplexity = values[f'perplexity_{scale}']
            cells.append(f'{scale} {distinct:3.0f}/{perplexity:3.0f}')
        print(f'{name:12}{values["psnr"]:8.2f}  {"  ".join(cells)}  any {values["distinct"]:3.0f}')


def main() -> None:
    """Train, evaluate and compare both variants; exit with an error if the gain is too small."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--steps', type=int, default=800)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--dir', type=Path, default=REPO / 'local_output' / 'tokenizer_collapse')
    parser.add_argument('--out', type=Path, default=None, help='folder for tokenizer_collapse.json')
    args = parser.parse_args()

    folder = args.dir / f'steps{args.steps}_seed{args.seed}'
    plans = [commands(name, folder, args.steps, args.seed) for name in VARIANTS]
    for stage in zip(*plans, strict=True):  # both trainings, then both evaluations
        run_side_by_side(stage)

    scores = {}
    for name in VARIANTS:
        scores[name] = json.loads((folder / name / 'scores.json').read_text())['scores']
    published = scores['published']
    defaults = scores['defaults']
    gain = defaults['psnr'] - published['psnr']
    ratio = defaults['perplexity_1x1'] / published['perplexity_1x1']
    print_table(scores)
    print(f'PSNR {gain:+.2f} dB, perplexity of 1x1 x {ratio:.1f}')

    if args.out:
        report = dict(
            command=' '.join(['python', *sys.argv]),
            device=platform.machine(),
            torch=torch.__version__,
            steps=args.steps,
            seed=args.seed,
            psnr_gain_db=gain,
            perplexity_ratio_1x1=ratio,
            scores=scores,
        )
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / f'tokenizer_collapse_{args.steps}.json', json.dumps(report, indent=2) + '\n')

    missed = gain < MIN_PSNR_GAIN or ratio < MIN_PERPLEXITY_RATIO
    if args.steps == STEPS_OF_BARS and missed:
        sys.exit('tokenizer_collapse: below +0.8 dB or five times the perplexity')


if __name__ == '__main__':
    main()
