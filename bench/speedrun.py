"""Score a speedrun, and add it to the leaderboard if it meets the bars of `make demo` and a distance.

    python -m bench.speedrun --dir=local_output/speedrun/2026-11-28_14-00-00 --began=SECONDS --ended=SECONDS

A speedrun is the time from raw digits to 1,000 drawn ones that meet the bars: `make speedrun`. Judges are not
on the clock. The leaderboard is bench/results/speedrun.json, the fastest first.
"""
import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.common import FrechetJudge, draw_classes, psnr, read_samples, write_json
from bench.demo_var_report import BARS
from pipeline import load
from utils.checkpoint import load_file
from utils.machine import available_cpus, cpu_name
from utils.provenance import git_commit, versions

LEADERBOARD = Path('bench/results/speedrun.json')
MAX_DISTANCE = 3.  # Frechet, of the digits features, to the training digits
# of each training, by its folder, the settings that the leaderboard names
SETTINGS = dict(
    vqvae=('steps', 'images_per_step', 'base_lr'),
    var=('depth', 'epochs', 'images_per_step', 'base_lr', 'seed'),
)


def main() -> None:
    """Write report.json and samples.png; add a row to the leaderboard, or exit with the missed bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--dir', type=Path, required=True, help='where the speedrun wrote')
    parser.add_argument('--began', type=float, required=True, help='Unix time before the first command')
    parser.add_argument('--ended', type=float, required=True, help='Unix time after the last command')
    parser.add_argument('--leaderboard', type=Path, default=LEADERBOARD)
    args = parser.parse_args()

    scores = scores_of(args.dir)
    row = dict(
        seconds=round(args.ended - args.began, 1),
        **{name: round(value, 4) for name, value in scores.items()},
        date=datetime.fromtimestamp(args.began).strftime('%Y-%m-%d'),
        machine=f'{cpu_name()}, {available_cpus()} cores',
        commit=git_commit(),
        versions=versions(),
        settings={name: settings_of(args.dir / name, wanted) for name, wanted in SETTINGS.items()},
    )
    write_json(row, args.dir / 'report.json')
    print(json.dumps(row, indent=2))

    missed = missed_bars(scores)
    if missed:
        sys.exit(f'speedrun: {", ".join(missed)}')
    add_row(row, args.leaderboard)


def scores_of(folder: Path) -> dict[str, float]:
    """Class accuracy, diversity and distance of the samples in a folder, and the PSNR of its tokenizer."""
    judge = FrechetJudge()
    samples, wanted = read_samples(folder / 'samples.npz')
    draw_classes(folder / 'samples.png', samples, wanted, 'digits of a speedrun, one class per row')

    vae = load(folder / 'vqvae' / 'vae-ckpt-last.pth').model
    reconstructed = vae.idxBl_to_img(vae.encode(judge.real_images), same_shape=True)[-1]
    return judge.scores(samples, wanted) | dict(
        tokenizer_psnr=psnr(reconstructed, judge.real_images),
        svm_real_accuracy=judge.real_accuracy(),
    )


def missed_bars(scores: dict[str, float]) -> list[str]:
    """A few words for each bar that the scores miss."""
    missed = [f'{name} {scores[name]:.3f} < {bar}' for name, bar in BARS.items() if scores[name] < bar]
    if scores['distance'] > MAX_DISTANCE:
        missed.append(f'distance {scores["distance"]:.3f} > {MAX_DISTANCE}')
    return missed


def settings_of(run: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Some settings of a training, which its checkpoint holds."""
    settings = load_file(next(run.glob('*-ckpt-last.pth')))['args']
    return {name: settings[name] for name in names}


def add_row(row: dict[str, Any], leaderboard: Path) -> None:
    """Put a row into the leaderboard, which may not be there yet, at its place by seconds."""
    rows = json.loads(leaderboard.read_text()) if leaderboard.exists() else []
    rows = sorted([*rows, row], key=lambda row: row['seconds'])
    write_json(rows, leaderboard)
    print(f'{leaderboard}: place {rows.index(row) + 1} of {len(rows)}')


if __name__ == '__main__':
    main()
