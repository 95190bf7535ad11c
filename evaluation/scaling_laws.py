"""Scaling laws of a ladder of trainings: `python evaluate.py scaling FOLDER`.

The figures of VAR (arXiv 2404.02905, its section on scaling laws), from the logs of trainings that differ in
depth. Held-out cross-entropy L and share Err of wrong codes, of the last scale and of all scales, fall as

    L = (beta X) ** alpha,   so that   log L = alpha log X + alpha log beta,

where X is N, the parameters of the transformer blocks, at the end of every training, or C_min, the least
compute at which any of the trainings has reached a score: the Pareto front of all of them. Beside it stands
L = L_inf + (beta X) ** alpha, whose floor L_inf is what no size or compute removes.
Read it from `evaluate_scaling`.
Letters: D bootstrap draws, P points, A candidates for alpha.
"""
import dataclasses
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dist
from configs import VARConfig
from evaluation.score import write_json
from evaluation.settings import ScalingSettings
from models import VAR, Tokenizer
from pipeline import load
from utils.figures import new_figure, save_figure
from utils.files import read_json
from utils.log import read_json_lines
from utils.provenance import versions

logger = logging.getLogger(__name__)
SCORES = {  # name of a score -> what it is
    'loss_last': 'loss, last scale',
    'loss_all': 'loss, all scales',
    'error_last': 'error, last scale',
    'error_all': 'error, all scales',
}
LOGGED = dict(loss_last='vL_tail', loss_all='vL_mean', error_last='vacc_tail', error_all='vacc_mean')
AXES = dict(parameters='parameters N', compute='compute C [FLOPs]')
INTERVAL = (2.5, 97.5)  # percentiles between which 95 % of the bootstrap draws lie
LEAST_RUNS = 4          # a line and a floor are three numbers
LEAST_POINTS = 4        # of a front, as well
ALPHAS = (-4., -1e-3)   # exponents among which that of a law with a floor is searched
NUM_ALPHAS = 128        # candidates at first, in equal ratios
ROUNDS = 4              # of the search; each one looks between the neighbours of the best candidate


# ---------------------------------------------------------------------------------------------- the command
def evaluate_scaling(settings: ScalingSettings) -> str | None:
    """`evaluate.py scaling`: the table for the reader on the master, None on the other ranks.

    Raises:
        ValueError: there are too few trainings, or one of them cannot be read.
    """
    if not dist.is_master():
        return None
    runs = read_runs(Path(settings.runs))
    laws = fit_all(runs, settings.draws, settings.seed)
    if settings.json:
        Path(settings.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(settings.json, dict(
            runs=[dataclasses.asdict(run) for run in runs],
            laws={score: {axis: {kind: law.report() for kind, law in kinds.items()}
                          for axis, kinds in axes.items()} for score, axes in laws.items()},
            settings=dataclasses.asdict(settings),
            versions=versions(),
        ))
    if settings.plot:
        figure = draw_laws(runs, laws)
        if figure is None:
            logger.warning('the plot needs pip install matplotlib')
        else:
            Path(settings.plot).parent.mkdir(parents=True, exist_ok=True)
            save_figure(settings.plot, figure)
    return f'{table_of_runs(runs)}\n\n{table_of_laws(laws)}'


# ---------------------------------------------------------------------------------------------- runs
@dataclass(frozen=True)
class Run:
    """One training of a ladder: its size, and its scores at every evaluation."""
    name: str
    depth: int
    width: int
    parameters: int        # N: of the blocks, without embeddings and head, about 18 depth width^2
    tokens_per_image: int
    flops_per_image: int   # of a training step, without the frozen tokenizer
    images: list[int]      # that training had seen at each evaluation
    scores: dict[str, list[float]]  # of the held-out images, by the names of SCORES; errors are shares of 1

    @property
    def tokens(self) -> np.ndarray:
        """Tokens that training had seen at each evaluation."""
        return np.array(self.images, dtype=float) * self.tokens_per_image

    @property
    def compute(self) -> np.ndarray:
        """FLOPs of the training up to each evaluation."""
        return np.array(self.images, dtype=float) * self.flops_per_image


def read_runs(folder: Path) -> list[Run]:
    """The trainings of a ladder, smallest first.

    Args:
        folder: holds an output folder of train.py for each; other folders in it are no matter.
    Raises:
        ValueError: there are fewer than four finished trainings of VAR, or one of them cannot be counted.
    """
    runs = []
    for path in sorted(folder.glob('*/log.txt')):
        run = read_run(path)
        if run is not None:
            runs.append(run)
    if len(runs) < LEAST_RUNS:
        raise ValueError(f'expected at least {LEAST_RUNS} finished trainings of VAR in {folder}/*/log.txt, '
                         f'got {len(runs)}: train more depths, each with its own --output_dir in that folder')
    return sorted(runs, key=lambda run: run.parameters)


def read_run(path: Path) -> Run | None:
    """The training of a log.txt; None if it is of another model than VAR, or has not ended.

    Raises:
        ValueError: it cannot be counted.
    """
    header, *lines = read_json_lines(path) or [{}]
    settings = header.get('args', {}) | dict(wandb='')  # this machine may not have its package
    if settings.get('model') != 'var':
        return None
    known = [field.name for field in dataclasses.fields(VARConfig)]
    config = VARConfig(**{name: settings[name] for name in known if name in settings})
    if config.progressive_until:
        raise ValueError(f'{path} is of a progressive training, whose steps do not all cost the same: '
                         'leave its folder out')

    # A line of the log repeats the scores of the last evaluation until the next one.
    evaluations: list[dict[str, Any]] = []
    for line in lines:
        scores = [line.get(name) for name in LOGGED.values()]
        is_new = not evaluations or scores != [evaluations[-1][name] for name in LOGGED.values()]
        if None not in scores and is_new:
            evaluations.append(line)
    epoch, _, epochs = str(lines[-1].get('ep', '') if lines else '').partition('/')
    if not evaluations or epoch != epochs:
        logger.warning('%s is left out: its training has not ended (epoch %s of %d)', path.parent,
                       epoch or 0, config.epochs)
        return None

    model = unbuilt_model(config)
    scores = {}
    for name, key in LOGGED.items():
        values = [float(line[key]) for line in evaluations]
        scores[name] = [1 - value / 100 for value in values] if name.startswith('error') else values
    return Run(
        name=path.parent.name,
        depth=model.depth,
        width=model.C,
        parameters=count_parameters(model),
        tokens_per_image=model.L,
        flops_per_image=model.training_flops(model.L),
        images=[line['it'] * config.images_per_step for line in evaluations],
        scores=scores,
    )


def runs_of_report(path: str | Path) -> list[Run]:
    """The trainings in a report of this command, so that its laws can be fitted again without the logs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no report of this command.
    """
    content = read_json(path)
    if 'runs' not in content:
        raise ValueError(f'expected a report of evaluate.py scaling in {path}, found no trainings: '
                         'pass another file')
    return [Run(**run) for run in content['runs']]


def unbuilt_model(config: VARConfig) -> VAR:
    """The model of a training without memory for its weights, to count what it has and does."""
    size = VAR.kwargs_from_size(**config.model_size())
    with torch.device('meta'):
        # The number of classes changes embeddings alone, which are not counted.
        return VAR(read_tokenizer(config.vae_ckpt), num_classes=1, **size, **config.model_kwargs(1, 1))


@functools.lru_cache(maxsize=1)  # all trainings of a ladder have the same one
def read_tokenizer(path: str) -> Tokenizer:
    """The frozen tokenizer of a training, which tells the number of codes and their channels."""
    return load(path, model='vqvae').tokenizer


def count_parameters(model: VAR) -> int:
    """N of the paper: parameters of the blocks with their AdaLN, at the published width 73,728 depth^3."""
    counted = [parameter.numel() for name, parameter in model.named_parameters()
               if name.startswith(('blocks.', 'shared_ada_lin.'))]
    return sum(counted)


# ---------------------------------------------------------------------------------------------- laws
@dataclass(frozen=True)
class PowerLaw:
    """score = floor + (beta X) ** alpha, which is floor + coefficient * X ** alpha."""
    alpha: float
    coefficient: float  # beta ** alpha
    floor: float = 0.
    correlation: float | None = None  # of log X and log score, of a law without a floor
    num_points: int = 0
    alpha_interval: tuple[float, float] | None = None  # in which 95 % of the bootstrap draws lie
    floor_interval: tuple[float, float] | None = None

    def __call__(self, x: np.ndarray | float) -> np.ndarray | float:
        """The score at this size or compute."""
        return self.floor + self.coefficient * np.asarray(x, dtype=float) ** self.alpha

    @property
    def beta(self) -> float | None:
        """None where the score does not depend on X, or beta is no finite number."""
        if self.alpha == 0 or self.coefficient <= 0:
            return None
        log_beta = np.log(self.coefficient) / self.alpha
        return float(np.exp(log_beta)) if abs(log_beta) < 700 else None

    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return dataclasses.asdict(self) | dict(beta=self.beta)


def fit_power_law(x: Sequence[float], y: Sequence[float], has_floor: bool = False) -> PowerLaw:
    """The law through some points, without its intervals.

    Without a floor it is the line of least squares through the logarithms, as in the paper. With a floor the
    squares of relative errors are minimised over all three numbers.

    Args:
        x: parameters or compute, positive.
        y: losses or errors, positive.
    Raises:
        ValueError: there are fewer points than numbers to find, or one is not positive.
    """
    x_P = np.asarray(x, dtype=float)
    y_P = np.asarray(y, dtype=float)
    least = 3 if has_floor else 2
    is_positive = (x_P > 0).all() and (y_P > 0).all()
    if len(x_P) != len(y_P) or len(np.unique(x_P)) < least or not is_positive:
        raise ValueError(f'expected at least {least} points of different positive x, with positive y, got '
                         f'x={x_P.tolist()}, y={y_P.tolist()}')
    solve = solve_with_floor if has_floor else solve_line
    alpha, coefficient, floor = (float(value[0]) for value in solve(x_P, y_P[None]))
    correlation = None
    if not has_floor and np.ptp(y_P) > 0:
        correlation = float(np.corrcoef(np.log(x_P), np.log(y_P))[0, 1])
    return PowerLaw(alpha, coefficient, floor, correlation, len(x_P))


def solve_line(x_P: np.ndarray, y_DP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(alpha, coefficient, floor), each (D,), of the straight lines through the logarithms."""
    log_x_P = np.log(x_P)
    log_y_DP = np.log(y_DP)
    centered_P = log_x_P - log_x_P.mean()
    alpha_D = log_y_DP @ centered_P / (centered_P @ centered_P)
    coefficient_D = np.exp(log_y_DP.mean(1) - alpha_D * log_x_P.mean())
    return alpha_D, coefficient_D, np.zeros_like(alpha_D)


def solve_with_floor(x_P: np.ndarray, y_DP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(alpha, coefficient, floor), each (D,), of the laws with a floor.

    At a given alpha, floor and coefficient are a linear problem of two unknowns, so that alpha alone is
    searched: among candidates in equal ratios, then between the neighbours of the best one.
    """
    center = np.exp(np.log(x_P).mean())
    lowest_D, highest_D = (np.full(len(y_DP), np.log(-alpha)) for alpha in ALPHAS)
    rows = np.arange(len(y_DP))
    for _ in range(ROUNDS):
        steps_A = np.linspace(0, 1, NUM_ALPHAS)
        log_alpha_DA = lowest_D[:, None] + (highest_D - lowest_D)[:, None] * steps_A
        floor_DA, coefficient_DA, error_DA = solve_at(-np.exp(log_alpha_DA), x_P / center, y_DP)
        best_D = error_DA.argmin(1)
        lowest_D = log_alpha_DA[rows, np.maximum(best_D - 1, 0)]
        highest_D = log_alpha_DA[rows, np.minimum(best_D + 1, NUM_ALPHAS - 1)]
    coefficient_D = coefficient_DA[rows, best_D]

    # What does not fall is all floor, at any alpha. The other coefficients were of x in units of `center`.
    alpha_D = np.where(coefficient_D > 0, -np.exp(log_alpha_DA[rows, best_D]), 0)
    return alpha_D, coefficient_D * center ** -alpha_D, floor_DA[rows, best_D]


def solve_at(alpha_DA: np.ndarray, x_P: np.ndarray,
             y_DP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best floor and coefficient at these alphas, neither below 0, and the sum of squares they leave.

    Returns:
        (D, A) each: floor, coefficient, sum of the squares of (floor + coefficient x ** alpha - y) / y.
    """
    weight_DP = 1 / y_DP
    power_DAP = x_P ** alpha_DA[..., None]
    weighted_DAP = weight_DP[:, None] * power_DAP

    # The normal equations of two unknowns, whose target is 1 in every point.
    a_D1 = (weight_DP ** 2).sum(1)[:, None]
    b_DA = (weight_DP[:, None] * weighted_DAP).sum(2)
    c_DA = (weighted_DAP ** 2).sum(2)
    p_D1 = weight_DP.sum(1)[:, None]
    q_DA = weighted_DAP.sum(2)
    determinant_DA = np.maximum(a_D1 * c_DA - b_DA ** 2, np.finfo(float).tiny)
    floor_DA = (p_D1 * c_DA - q_DA * b_DA) / determinant_DA
    coefficient_DA = (a_D1 * q_DA - b_DA * p_D1) / determinant_DA

    # Where one of them would be negative, it is 0, and the other one is fitted alone.
    has_no_floor = floor_DA < 0
    coefficient_DA = np.where(has_no_floor, q_DA / c_DA, coefficient_DA)
    floor_DA = np.where(has_no_floor, 0, floor_DA)
    rises = coefficient_DA < 0
    floor_DA = np.where(rises, p_D1 / a_D1, floor_DA)
    coefficient_DA = np.where(rises, 0, coefficient_DA)
    errors_DAP = weight_DP[:, None] * floor_DA[..., None] + coefficient_DA[..., None] * weighted_DAP - 1
    return floor_DA, coefficient_DA, (errors_DAP ** 2).sum(2)


# ---------------------------------------------------------------------------------------------- intervals
def law_of_size(x: Sequence[float], y: Sequence[float], has_floor: bool, draws: int,
                rng: np.random.Generator) -> PowerLaw:
    """The law through the ends of all trainings, with bootstrap intervals.

    There are too few trainings to leave any out, so that the sizes stay, and the relative errors of the law
    are drawn anew, enlarged by what the law has fitted of them. The intervals tell of the scatter about the
    law, not of whether it holds elsewhere.

    Args:
        draws: number of bootstrap draws.
    """
    law = fit_power_law(x, y, has_floor)
    x_P = np.asarray(x, dtype=float)
    log_law_P = np.log(law(x_P))
    residual_P = np.log(y) - log_law_P
    residual_P = residual_P - residual_P.mean()
    num_fitted = 3 if has_floor else 2
    residual_P = residual_P * np.sqrt(len(x_P) / max(len(x_P) - num_fitted, 1))

    y_DP = np.exp(log_law_P + rng.choice(residual_P, (draws, len(x_P))))
    solve = solve_with_floor if has_floor else solve_line
    alpha_D, _, floor_D = solve(x_P, y_DP)
    return with_intervals(law, alpha_D, floor_D)


def law_of_compute(curves: list[tuple[np.ndarray, np.ndarray]], has_floor: bool, draws: int,
                   rng: np.random.Generator) -> PowerLaw:
    """The law through the Pareto front of all trainings, with bootstrap intervals.

    Points of one training depend on each other, so that whole trainings are drawn, with replacement.

    Args:
        curves: compute and scores of each training.
        draws: number of bootstrap draws.
    """
    law = fit_power_law(*pareto_front(curves), has_floor)
    alphas = []
    floors = []
    for chosen in rng.integers(len(curves), size=(draws, len(curves))):
        x_P, y_P = pareto_front([curves[i] for i in sorted(set(chosen.tolist()))])
        if len(x_P) < LEAST_POINTS:
            continue
        drawn = fit_power_law(x_P, y_P, has_floor)
        alphas.append(drawn.alpha)
        floors.append(drawn.floor)
    return with_intervals(law, np.array(alphas), np.array(floors))


def with_intervals(law: PowerLaw, alpha_D: np.ndarray, floor_D: np.ndarray) -> PowerLaw:
    """The law with the range of most bootstrap draws, if there are any."""
    if not len(alpha_D):
        return law
    low_alpha, high_alpha = np.percentile(alpha_D, INTERVAL).tolist()
    low_floor, high_floor = np.percentile(floor_D, INTERVAL).tolist()
    return dataclasses.replace(law, alpha_interval=(low_alpha, high_alpha),
                               floor_interval=(low_floor, high_floor))


def pareto_front(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The points than which no training has a score as low with less compute, cheapest first."""
    x = np.concatenate([compute for compute, _ in curves])
    y = np.concatenate([score for _, score in curves])
    order = np.lexsort((y, x))
    x = x[order]
    y = y[order]
    lowest_before = np.minimum.accumulate(np.concatenate([[np.inf], y[:-1]]))
    is_on_front = y < lowest_before
    return x[is_on_front], y[is_on_front]


Laws = dict[str, dict[str, dict[str, PowerLaw]]]  # score -> axis -> 'power' or 'floor' -> law


def fit_all(runs: list[Run], draws: int = 1000, seed: int = 0) -> Laws:
    """The laws of every score over parameters and over compute, without and with a floor.

    Args:
        draws: number of bootstrap draws.
        seed: of these draws.
    """
    rng = np.random.default_rng(seed)
    parameters = [run.parameters for run in runs]
    laws: Laws = {}
    for score in SCORES:
        ends = [run.scores[score][-1] for run in runs]
        curves = [curve_of(run, score) for run in runs]
        laws[score] = {axis: {} for axis in AXES}
        for kind, has_floor in (('power', False), ('floor', True)):
            laws[score]['parameters'][kind] = law_of_size(parameters, ends, has_floor, draws, rng)
            laws[score]['compute'][kind] = law_of_compute(curves, has_floor, draws, rng)
    return laws


def curve_of(run: Run, score: str) -> tuple[np.ndarray, np.ndarray]:
    """(compute, scores) of a training at its evaluations."""
    return run.compute, np.array(run.scores[score])


# ---------------------------------------------------------------------------------------------- what is shown
def table_of_runs(runs: list[Run]) -> str:
    """A line for each training: its size, what it has seen, and its scores at the end."""
    rows = [['run', 'depth', 'width', 'parameters', 'tokens', 'FLOPs', *SCORES]]
    for run in runs:
        size = [run.name, str(run.depth), str(run.width), f'{run.parameters:,}']
        seen = [f'{run.tokens[-1]:.3g}', f'{run.compute[-1]:.3g}']
        rows.append([*size, *seen, *(f'{run.scores[score][-1]:.4f}' for score in SCORES)])
    return aligned(rows)


def table_of_laws(laws: Laws) -> str:
    """A line for each law: exponent and floor with their intervals, and the correlation of the logarithms."""
    rows = [['score', 'over', 'alpha', '95 %', 'floor', '95 %', 'correlation']]
    for score, axes in laws.items():
        for axis, kinds in axes.items():
            power, floor = kinds['power'], kinds['floor']
            correlation = '' if power.correlation is None else f'{power.correlation:.4f}'
            rows.append([score, axis, f'{power.alpha:.3f}', between(power.alpha_interval), '', '',
                         correlation])
            rows.append(['', '', f'{floor.alpha:.3f}', between(floor.alpha_interval),
                         f'{floor.floor:.3f}', between(floor.floor_interval), ''])
    return aligned(rows)


def between(interval: tuple[float, float] | None) -> str:
    """An interval in words."""
    return '{:.3f} to {:.3f}'.format(*interval) if interval else ''


def aligned(rows: list[list[str]]) -> str:
    """Lines of a table whose columns end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return '\n'.join(line.rstrip() for line in lines)


def draw_laws(runs: list[Run], laws: Laws) -> Any:
    """All scores over parameters above, over compute below; None where matplotlib is not installed."""
    figure = new_figure(3.4 * len(SCORES), 6.4)
    if figure is None:
        return None
    panels = figure.subplots(2, len(SCORES))
    for column, (score, title) in enumerate(SCORES.items()):
        # At the end of each training, over its size.
        upper = panels[0, column]
        for i, run in enumerate(runs):
            upper.plot(run.parameters, run.scores[score][-1], 'o', color=f'C{i}', label=run.name)
        draw_law(upper, laws[score]['parameters'], [run.parameters for run in runs])
        upper.set_title(title)

        # All evaluations of each training over its compute, with the Pareto front of all of them.
        lower = panels[1, column]
        curves = [curve_of(run, score) for run in runs]
        for i, (compute, scores) in enumerate(curves):
            lower.plot(compute, scores, '-', color=f'C{i}', alpha=0.6)
        front = pareto_front(curves)
        lower.plot(*front, 'k.', markersize=4)
        draw_law(lower, laws[score]['compute'], front[0])
        for panel, axis in ((upper, 'parameters'), (lower, 'compute')):
            panel.set(xscale='log', yscale='log', xlabel=AXES[axis])
            panel.minorticks_off()
            show_few_ticks(panel)
            panel.grid(alpha=0.3)
            panel.legend(fontsize='xx-small')
    return figure


def draw_law(panel: Any, kinds: dict[str, PowerLaw], x: Sequence[float]) -> None:
    """The power law as a dashed line, that with a floor as a dotted one."""
    fine = np.geomspace(min(x), max(x), 100)
    power, floor = kinds['power'], kinds['floor']
    panel.plot(fine, power(fine), 'k--', linewidth=1, label=f'alpha {power.alpha:.3f}')
    panel.plot(fine, floor(fine), 'k:', linewidth=1,
               label=f'alpha {floor.alpha:.2f}, floor {floor.floor:.2f}')


def show_few_ticks(panel: Any) -> None:
    """Plain numbers at the vertical axis, whose range is seldom a decade."""
    low, high = panel.get_ylim()
    ticks = np.geomspace(low, high, 7)[1:-1]
    panel.set_yticks(ticks, [f'{tick:.3g}' for tick in ticks])
