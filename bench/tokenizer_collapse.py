"""Train the small VQVAE twice, with the published loss alone and with our defaults, and compare.

    python -m bench.tokenizer_collapse --steps=800 --out=bench/results

Same seed, steps, network and images (the embedded toy set); both runs at once, one core each. Codes are
counted over the validation images, by `evaluate.py`.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from configs.options import REPO
from utils.checkpoint import atomic_path

VARIANTS = {
    'published': ['--codebook=grad', '--codebook_init=inv_v', '--restart=0', '--defer=0', '--scale_drop=0'],
    'defaults': [],
}
SCALES = ('1x1', '2x2', '3x3', '4x4')


def commands(name: str, folder: Path, steps: int, seed: int) -> list[list[str]]:
    """Training and evaluation of one variant."""
    train = [f'--output_dir={folder / name}', '--model=vqvae', '--preset=tiny', f'--steps={steps}',
             f'--seed={seed}', '--eval_every=1000', *VARIANTS[name]]
    evaluate = ['tokenizer', f'--ckpt={folder / name / "vae-ckpt-last.pth"}', '--data_path=toy',
                '--metrics=psnr,ssim,usage', f'--json={folder / name / "scores.json"}']
    return [[sys.executable, str(REPO / 'train.py'), *train],
            [sys.executable, str(REPO / 'evaluate.py'), *evaluate]]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--steps', type=int, default=800)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--dir', type=Path, default=REPO / 'local_output' / 'tokenizer_collapse')
    parser.add_argument('--out', type=Path, default=None, help='folder for tokenizer_collapse.json')
    args = parser.parse_args()

    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    folder = args.dir / f'steps{args.steps}_seed{args.seed}'
    plans = {name: commands(name, folder, args.steps, args.seed) for name in VARIANTS}
    for stage in zip(*plans.values(), strict=True):  # both trainings, then both evaluations
        running = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for command in stage]
        if any([process.wait() for process in running]):
            sys.exit('tokenizer_collapse: a run failed, see its message above')

    scores = {name: json.loads((folder / name / 'scores.json').read_text())['scores'] for name in VARIANTS}
    plain, ours = scores['published'], scores['defaults']
    gain = ours['psnr'] - plain['psnr']
    ratio = ours['perplexity_1x1'] / plain['perplexity_1x1']
    print(f'{"":12}{"PSNR":>8}  distinct codes and perplexity per scale, of 512')
    for name, values in scores.items():
        cells = '  '.join(f'{scale} {values[f"distinct_{scale}"]:3.0f}/{values[f"perplexity_{scale}"]:3.0f}'
                          for scale in SCALES)
        print(f'{name:12}{values["psnr"]:8.2f}  {cells}  any {values["distinct"]:3.0f}')
    print(f'PSNR {gain:+.2f} dB, perplexity of 1x1 x {ratio:.1f}')
    if args.out:
        report = dict(command=' '.join(['python', *sys.argv]), device=platform.machine(),
                      torch=torch.__version__, steps=args.steps, seed=args.seed, psnr_gain_db=gain,
                      perplexity_ratio_1x1=ratio, scores=scores)
        args.out.mkdir(parents=True, exist_ok=True)
        with atomic_path(args.out / f'tokenizer_collapse_{args.steps}.json') as temporary:
            temporary.write_text(json.dumps(report, indent=2) + '\n')
    missed = args.steps == 800 and (gain < 0.8 or ratio < 5)  # a longer plain run catches up
    sys.exit('tokenizer_collapse: below +0.8 dB or five times the perplexity' if missed else 0)


if __name__ == '__main__':
    main()
