"""Write recipes/reference_curves.json: how the trainings of a demo go, from finished runs of it.

    python -m bench.reference_curves demo local_output/demo local_output/demo_seed1 local_output/demo_seed2

The first argument is the name of the recipe, the others are folders that it has written to, each with
another seed. What is stored of other recipes stays.

A band reaches from the lowest to the highest value of the runs, and on both sides by `--margin` of these
values further, for other seeds, machines and versions of torch than those of the runs: 5 % where there are
several runs, 10 % around a single one. Of three seeds of VAR's demo the losses of an evaluation lie within
2.5 % of each other, the PSNR of its tokenizer within 6.1 %, in both cases early in the training.
"""
import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from configs import TrainConfig
from configs.options import REPO
from training import reference
from training.reference import compared_settings, describe_tokens, settings_of, stored_entries
from utils.console import one_line_errors
from utils.curves import Curve, read_curves
from utils.files import write_text
from utils.log import read_json_lines

MEASURES = ('L_mean', 'psnr')  # the loss of a generator, the PSNR of a tokenizer
MARGIN_OF_SEVERAL = 0.05
MARGIN_OF_ONE = 0.1
DIGITS = 5  # that are stored of a number


class FinishedRun(NamedTuple):
    """What one finished training has written into its log."""
    config: TrainConfig
    header: dict[str, Any]
    curves: dict[str, Curve]


def read_run(folder: Path) -> FinishedRun:
    """Read a finished training.

    Raises:
        ValueError: it is not finished, or its settings are not those of this version.
    """
    lines = read_json_lines(folder / 'log.txt')
    config = settings_of(folder)
    if config is None:
        raise ValueError(f'expected settings of this version in the log of {str(folder)!r}, found others: '
                         'train again')
    last_epoch = lines[-1].get('ep', '')
    if last_epoch != f'{config.epochs}/{config.epochs}':
        raise ValueError(f'expected a finished training of {config.epochs} epochs in {str(folder)!r}, found '
                         f'{last_epoch!r}: run its command again, which goes on')
    return FinishedRun(config, lines[0], read_curves(folder))


def entry_of(recipe: str, runs: list[FinishedRun], margin: float) -> dict[str, Any]:
    """What is stored of one training; its tokenizer is added by the caller.

    Args:
        recipe: its name.
        runs: of the same training, with several seeds.
        margin: share of the values by which the band is wider than the runs, on both sides.
    Raises:
        ValueError: they are different trainings.
    """
    first = runs[0].config
    for run in runs[1:]:
        differing = [name for name, value in compared_settings(run.config).items()
                     if value != compared_settings(first)[name]]
        if differing:
            raise ValueError(f'expected runs that differ in their seed alone, but {first.output_dir!r} and '
                             f'{run.config.output_dir!r} differ in {", ".join(differing)}')
    defaults = compared_settings(type(first)())
    settings = {name: value for name, value in compared_settings(first).items() if value != defaults[name]}
    return dict(
        recipe=f'recipes/{recipe}.sh',
        settings=dict(model=first.model) | settings,
        tokenizer='',
        tokens=describe_tokens(first),
        seeds=[run.header['seed'] for run in runs],
        torch=sorted({run.header['versions']['torch'] for run in runs}),
        curves={name: band_of([run.curves[name] for run in runs], margin) for name in runs[0].curves
                if name.removeprefix('v') in MEASURES},
    )


def band_of(curves: list[Curve], margin: float) -> dict[str, list]:
    """The band around the same curve of several runs, see `training.reference.Band`.

    Raises:
        ValueError: the runs were evaluated at different steps.
    """
    steps = curves[0].steps
    if any(curve.steps != steps for curve in curves):
        raise ValueError('expected runs that were evaluated after the same steps, found others: train with '
                         'the --eval_every of the recipe')
    values_of_steps = list(zip(*(curve.values for curve in curves), strict=True))
    low = [min(values) - margin * abs(min(values)) for values in values_of_steps]
    high = [max(values) + margin * abs(max(values)) for values in values_of_steps]
    return dict(steps=steps, low=list(map(rounded, low)), high=list(map(rounded, high)))


def rounded(value: float) -> float:
    """A number with so many digits as are stored."""
    return float(f'{value:.{DIGITS}g}')


def as_text(entries: dict[str, Any]) -> str:
    """JSON with every list on one line, so that changes of the file can be read."""
    text = json.dumps(entries, indent=1)
    return re.sub(r'\[[^\[\]]*\]', lambda numbers: ' '.join(numbers[0].split()), text) + '\n'


def main() -> None:
    """Read the runs of a recipe, write the file, and say what it holds of them."""
    parser = argparse.ArgumentParser(prog='python -m bench.reference_curves',
                                     description=__doc__.partition('\n\n')[0])
    parser.add_argument('recipe', help='name of a script in recipes/, such as demo_npp')
    parser.add_argument('folders', type=Path, nargs='+', help='folders that it has written to')
    parser.add_argument('--margin', type=float, default=None, help='of the values, on both sides of the band')
    args = parser.parse_args()
    margin = MARGIN_OF_SEVERAL if len(args.folders) > 1 else MARGIN_OF_ONE
    if args.margin is not None:
        margin = args.margin
    if not (REPO / 'recipes' / f'{args.recipe}.sh').is_file():
        raise ValueError(f'expected the name of a script in recipes/, such as demo_npp, got {args.recipe!r}')

    names = sorted(path.parent.name for path in args.folders[0].glob('*/log.txt'))
    if not names:
        raise ValueError(f'expected folders of trainings in {str(args.folders[0])!r}, found none')
    entries = stored_entries()
    for name in names:
        runs = [read_run(folder / name) for folder in args.folders]
        entry = entry_of(args.recipe, runs, margin)
        tokenizer = Path(getattr(runs[0].config, 'vae_ckpt', '')).parent.name
        if tokenizer in names:
            entry['tokenizer'] = f'{args.recipe}/{tokenizer}'
        entries[f'{args.recipe}/{name}'] = entry
        for measure, band in entry['curves'].items():
            print(f'{args.recipe}/{name}: {len(runs)} runs, {measure} ends at {band["low"][-1]} to '
                  f'{band["high"][-1]}')
    write_text(reference.STORED_CURVES, as_text(entries))


if __name__ == '__main__':
    with one_line_errors('bench.reference_curves', exit_code=2):
        main()
