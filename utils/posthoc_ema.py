"""Averages of any width after a training: `python -m utils.posthoc_ema RUN --width=0.07 --out=FILE`.

A training with `--ema_profiles` has stored averages by power functions, each of them several times. Any other
power function is nearly a sum of those, whose factors are found by least squares over the training's time
(arXiv 2312.02696, Sec. 3.2 and App. C): no step has to be done again. The result is a file for sample.py.

Letters: S stored averages.
"""
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.options import INF, check_values, expand_paths, numbers_of, opt, parse_settings
from configs.training import LARGEST_WIDTH
from utils.checkpoint import load_with_digest, model_weights, newest_checkpoint, save_file
from utils.console import one_line_errors
from utils.ema import SNAPSHOT_INDEX, SNAPSHOTS, exponent_of
from utils.log import read_json_lines, setup_logging

logger = logging.getLogger(__name__)
LARGEST_RESIDUAL = 0.05  # from which on an average is not what it is called


@dataclass(frozen=True)
class PosthocSettings:
    """What to make of which training."""

    run: str = opt('', 'output folder of a training with --ema_profiles', positional=True, path=True)
    width: str = opt('', 'width as a share of the training, such as 0.07, or several joined by commas',
                     limits=(0.005, LARGEST_WIDTH))
    out: str = opt('', 'file to write; of several widths {} in its name stands for each', path=True)
    step: int = opt(0, 'up to the last averages that were stored at or before this step; 0 takes all',
                    limits=(0, INF))

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        if not (self.run and self.width and self.out):
            raise ValueError('expected a folder, a width and a file: pass RUN --width=0.07 --out=FILE')
        if len(self.widths) > 1 and '{}' not in self.out:
            raise ValueError(f'--out must hold {{}} for each of {len(self.widths)} widths, got {self.out!r}: '
                             'pass for example --out=width_{}.pth')
        target = Path(self.out).resolve()
        if target.parent == Path(self.run).resolve() and '-ckpt-' in target.name:
            raise ValueError(f'--out must not be a checkpoint of the training, got {self.out!r}: pass for '
                             f'example --out={self.run}/width_{{}}.pth')

    @property
    def widths(self) -> tuple[float, ...]:
        return numbers_of(self.width)


# ---------------------------------------------------------------------------------------------- factors
def overlap(time_a: np.ndarray, exponent_a: np.ndarray, time_b: np.ndarray,
            exponent_b: np.ndarray) -> np.ndarray:
    """The integral of the product of two profiles (u / t)^g that each have an integral of one."""
    shorter_exponent = np.where(time_a < time_b, exponent_b, -exponent_a)
    height = (exponent_a + 1) * (exponent_b + 1) * (time_a / time_b) ** shorter_exponent
    return height / ((exponent_a + exponent_b + 1) * np.maximum(time_a, time_b))


def factors_of(time_S: np.ndarray, exponent_S: np.ndarray, time: float,
               exponent: float) -> tuple[np.ndarray, float]:
    """Factors by which stored averages add up to another one, as nearly as they can.

    Args:
        time_S, exponent_S: of the stored averages, no two alike.
        time: of the other one, no earlier than the last of them.
        exponent: of the other one.
    Returns:
        (S,) float64 with a sum of one, of both signs; and the distance of their profile from the wanted one,
        as a share of the norm of the latter.
    """
    time_S = np.asarray(time_S, np.float64)
    exponent_S = np.asarray(exponent_S, np.float64)
    overlap_SS = overlap(time_S[:, None], exponent_S[:, None], time_S[None], exponent_S[None])
    overlap_S = overlap(time_S, exponent_S, np.float64(time), np.float64(exponent))
    factor_S = np.linalg.solve(overlap_SS, overlap_S)
    # A constant must stay that constant.
    factor_S = factor_S / factor_S.sum()
    norm = overlap(np.float64(time), np.float64(exponent), np.float64(time), np.float64(exponent))
    distance = norm - 2 * factor_S @ overlap_S + factor_S @ overlap_SS @ factor_S
    return factor_S, float(np.sqrt(max(distance / norm, 0.)))


# ---------------------------------------------------------------------------------------------- weights
def stored_averages(run: Path, step: int) -> list[dict[str, Any]]:
    """The lines of the list of stored averages, up to a step.

    Args:
        run: the output folder of the training.
        step: 0 takes all.
    Raises:
        ValueError: there are none.
    """
    lines = read_json_lines(run / SNAPSHOTS / SNAPSHOT_INDEX)
    if not lines:
        raise ValueError(f'expected stored averages in {str(run / SNAPSHOTS)!r}, found none: train with '
                         '--ema_profiles=0.05,0.1 --ema_snapshot=STEPS')
    chosen = [line for line in lines if not step or line['step'] <= step]
    if not chosen:
        raise ValueError(f'the first averages are those of step {lines[0]["step"]}, got --step={step}: pass '
                         'a later one')
    return chosen


@torch.no_grad()
def combined(run: Path, lines: list[dict[str, Any]], factors: list[np.ndarray]) -> list[dict[str, Any]]:
    """Sums of stored averages, with one file at a time in memory.

    Args:
        run: the output folder of the training.
        lines: of the list of stored averages.
        factors: (S,) for every sum.
    Returns:
        The weights of each sum, in the precision of the files; they are added up in float64, since factors
        have both signs and may be large.
    Raises:
        ValueError: a file is missing, or is another one than the list says.
    """
    sums: list[dict[str, torch.Tensor]] = [{} for _ in factors]
    dtypes = {}
    for i, line in enumerate(lines):
        path = run / SNAPSHOTS / line['file']
        content, digest = load_with_digest(path)
        if digest != line['sha256']:
            raise ValueError(f'{str(path)!r} is another file than the one that the training wrote: restore '
                             f'it, or take its line out of {SNAPSHOT_INDEX} there')
        for name, value in content['model'].items():
            dtypes[name] = value.dtype
            for total, factor_S in zip(sums, factors, strict=True):
                if name not in total:
                    total[name] = torch.zeros_like(value, dtype=torch.float64)
                total[name].add_(value.double(), alpha=float(factor_S[i]))
    return [{name: value.to(dtypes[name]) for name, value in total.items()} for total in sums]


def make_averages(settings: PosthocSettings) -> list[float]:
    """Write the averages of all widths.

    Returns:
        Of each width, how far its profile is from the wanted one, see `factors_of`.
    Raises:
        ValueError: there are no stored averages, or a file cannot be used.
    """
    run = Path(settings.run)
    lines = stored_averages(run, settings.step)
    time_S = np.array([line['updates'] for line in lines])
    exponent_S = np.array([exponent_of(line['width']) for line in lines])
    last = lines[-1]
    found = [factors_of(time_S, exponent_S, last['updates'], exponent_of(width)) for width in settings.widths]
    sums = combined(run, lines, [factor_S for factor_S, _ in found])

    # What is not averaged, the tokenizer and the names of the classes are those of the run's checkpoint.
    checkpoint = newest_checkpoint(run, 'ar-ckpt*.pth').content
    if not checkpoint:
        raise ValueError(f'expected a checkpoint in {settings.run!r}, which holds the tokenizer: pass the '
                         'output folder of a training')
    of_last_step = model_weights(checkpoint, 'raw')
    beside = {name: checkpoint['trainer'][name] for name in ('config', 'vae_local', 'vae_config')
              if name in checkpoint['trainer']}
    for width, (_, residual), weights in zip(settings.widths, found, sums, strict=True):
        made_of = dict(width=width, step=last['step'], updates=last['updates'], residual=residual,
                       files={line['file']: line['sha256'] for line in lines})
        path = settings.out.replace('{}', str(width))
        save_file(dict(trainer=dict(var_wo_ddp=of_last_step | weights, **beside),
                       classes=checkpoint.get('classes'), args=checkpoint.get('args'), posthoc_ema=made_of),
                  path)
        logger.info('%s: width %g at step %d, made of %d stored averages, %.2g %% from its profile', path,
                    width, last['step'], len(lines), 100 * residual)
        if residual > LARGEST_RESIDUAL:
            logger.warning('width %g cannot be made well of these averages: pass one that is nearer to those '
                           'of --ema_profiles, or train with a smaller --ema_snapshot', width)
    return [residual for _, residual in found]


def main() -> None:
    """Make the averages that the command line asks for."""
    settings = parse_settings(PosthocSettings, sys.argv[1:], 'posthoc_ema', __doc__.splitlines()[0])
    setup_logging(None, is_master=True)
    make_averages(settings)


if __name__ == '__main__':
    with one_line_errors('posthoc_ema'):
        main()
