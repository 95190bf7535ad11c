"""Curves of one or more trainings side by side, from what they have written into log.txt.

    python -m utils.curves local_output/a local_output/b --out=curves.png

Each panel has one measure: a line for the means of the training, a dashed one with a mark per evaluation for
held-out images. Measures that only some of the runs have are drawn for these. Behind a run with the settings
of a recipe lie the bands of its stored curves (see `training.reference`).
"""
import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.reference import Band, find_reference, settings_of
from utils.console import announce, one_line_errors
from utils.figures import new_figure, save_figure
from utils.log import read_json_lines

PANELS_PER_ROW = 3
OTHER_NUMBERS = {'it', 'wd', 'lr', 'grad_norm'}  # of a line, beside the measures of the model


class Curve(NamedTuple):
    """Points of one measure of one run."""
    steps: list[int]
    values: list[float]

    def add(self, step: int, value: float) -> None:
        """Add a point behind the others."""
        self.steps.append(step)
        self.values.append(value)


def read_curves(run: Path) -> dict[str, Curve]:
    """Curves of a run by the name of their measure; those of held-out images begin with v.

    Args:
        run: output folder of a training, or its log.txt.
    Raises:
        ValueError: there is no log, or no epoch in it.
    """
    path = run / 'log.txt' if run.is_dir() else run
    lines = read_json_lines(path)
    curves: dict[str, Curve] = {}
    last_scores: dict[str, float] = {}
    for line in lines:
        measures = {name: value for name, value in line.items()
                    if name not in OTHER_NUMBERS and isinstance(value, int | float)}
        step = line.get('it')
        if not isinstance(step, int):
            continue
        # A line repeats the scores of the last evaluation until there are new ones.
        scores = {name: value for name, value in measures.items() if name.startswith('v')}
        is_repeated = scores == last_scores
        last_scores = scores or last_scores
        for name, value in measures.items():
            if not (is_repeated and name in scores):
                curves.setdefault(name, Curve([], [])).add(step, value)
    if not curves:
        raise ValueError('expected the log of a training with at least one epoch, found none in '
                         f'{str(path)!r}: pass the output folder of a run')
    return curves


def stored_bands(run: Path) -> dict[str, Band]:
    """Bands of the recipe whose settings a run has, by measure; {} if it has those of none.

    Raises:
        ValueError: the file of the bands is damaged.
    """
    config = settings_of(run)
    reference = find_reference(config) if config else None
    return reference.bands if reference else {}


def draw(runs: Sequence[Path], out: Path) -> None:
    """Write a PNG with one panel for each measure that is not only of held-out images.

    Args:
        runs: output folders; each has one colour in all panels.
        out: the file to write.
    Raises:
        ValueError: see `read_curves`.
    """
    curves = {run: read_curves(run) for run in runs}
    bands = {run: stored_bands(run) for run in runs}
    names = sorted({name for found in curves.values() for name in found})
    panels = [name for name in names if not (name.startswith('v') and name[1:] in names)]
    num_rows = math.ceil(len(panels) / PANELS_PER_ROW)
    num_columns = min(len(panels), PANELS_PER_ROW)
    figure = new_figure(4.2 * num_columns, 3.2 * num_rows)
    if figure is None:
        raise ValueError('curves need a package: pip install matplotlib')
    labels = short_names(runs)

    for place, name in enumerate(panels, start=1):
        axis = figure.add_subplot(num_rows, num_columns, place)
        for colour, run in enumerate(runs):
            style: dict[str, Any] = dict(color=f'C{colour % 10}')
            if name in curves[run]:
                axis.plot(*curves[run][name], label=labels[colour], **style)
            if f'v{name}' in curves[run]:
                axis.plot(*curves[run][f'v{name}'], '--o', markersize=3, **style)
            for measure in (name, f'v{name}'):
                if measure in bands[run]:
                    axis.fill_between(*bands[run][measure], alpha=0.15, linewidth=0, **style)
        axis.set_title(name)
        axis.set_xlabel('optimizer step')
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(out, figure)


def short_names(runs: Sequence[Path]) -> list[str]:
    """Names of runs that tell them apart: their paths without the folder that all of them are in."""
    paths = [str(run.resolve()) for run in runs]
    if len({*paths}) == 1:
        return [run.resolve().name for run in runs]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def main() -> None:
    """Draw and say where."""
    parser = argparse.ArgumentParser(prog='python -m utils.curves', description=__doc__.partition('\n\n')[0])
    parser.add_argument('runs', type=Path, nargs='+', help='output folders of trainings')
    parser.add_argument('--out', type=Path, default=Path('curves.png'))
    args = parser.parse_args()
    draw(args.runs, args.out)
    announce('utils.curves', f'{len(args.runs)} runs are drawn in {args.out}')


if __name__ == '__main__':
    with one_line_errors('utils.curves', exit_code=2):
        main()
