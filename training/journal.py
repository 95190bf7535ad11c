"""The logs of a training: what is written where, when, and under which published names; how they go on.

| sink | when | what |
|---|---|---|
| console, stdout.txt | 5 times an epoch, 30 times in long ones | meters, images/s, MFU, where the time goes |
| steps.jsonl | at the same steps, and at every `--log_every`th | rates, gradient, metrics, slowest rank |
| TensorBoard, `AR_iter_*`, `VAE_iter`, `AR_opt_*` | at every `--log_every`th step | the same |
| log.txt; TensorBoard, `AR_ep_loss`, `VAE_ep` | after every epoch | means of logged steps, validation |
| TensorBoard, `AR_time` | after every epoch | where the time went at its end, MFU |
| TensorBoard, `VAE_pictures`, `VAE_codes` | every `--picture_every` steps, at evaluations | pictures |
| TensorBoard, `AR_samples` | at evaluations | `--tb_samples` images of the same noise |
| TensorBoard, `settings` | at the beginning | all settings |

Lines and points are written before the checkpoint that covers them, so that a kill never loses one. A start
removes the lines and points that are later than the checkpoint which it continues from, since it repeats
those steps. So every step and every epoch stands in the logs once.
"""
import datetime
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import make_grid

import dist
from configs import TrainConfig
from trainer import StepInfo, Trainer
from training.pace import Pace
from training.snapshots import rewind_snapshots
from utils.ema import SNAPSHOTS
from utils.log import (
    MetricLogger,
    SmoothedValue,
    TensorboardLogger,
    append_json_line,
    keep_events,
    keep_json_lines,
    mirror_in_wandb,
    read_json_lines,
)
from utils.markdown import table_of

logger = logging.getLogger(__name__)
# Tags whose points are counted in epochs, and those of pictures and histograms.
EPOCH_HEADS = ('AR_ep_loss/', 'AR_z_burnout/', 'AR_time/', 'VAE_ep/')
PICTURE_HEADS = ('VAE_pictures/', 'VAE_codes/', 'AR_samples')
LINES_PER_EPOCH = 5
LINES_PER_LONG_EPOCH = 30
LONG_EPOCH = 8000  # an epoch with more steps is a long one


class Journal:
    """The logs of one training. All ranks call its methods alike, the first one alone writes.

    Args:
        folder: where log.txt and steps.jsonl are.
        tb_dir: where the TensorBoard files are.
        trainer: its metrics are logged.
        config: `log_every`, the steps between two points in TensorBoard; `tb` and `wandb`.
        header: the first line of log.txt; its entry `args` holds the settings.
        position: (steps, epochs) that are done in the checkpoint of this start; None without a checkpoint.
    """

    def __init__(self, folder: Path, tb_dir: Path, trainer: Trainer, config: TrainConfig,
                 header: dict[str, Any], position: tuple[int, int] | None):
        self.folder = folder
        self.trainer = trainer
        self.headline = trainer.headline  # name in the progress line -> key of the metrics
        self.meters = MetricLogger()
        self.pace = Pace(trainer.waiting)
        if dist.is_master():
            folder.mkdir(parents=True, exist_ok=True)
            open_logs(folder, tb_dir, header, position)
            if config.wandb:
                mirror_in_wandb(config.wandb, config.exp_name, folder, header['args'])
        self.tb = TensorboardLogger(
            str(tb_dir) if dist.is_master() and config.tb else None,
            filename_suffix=time.strftime('__%m%d_%H%M'),
            every=config.log_every,
        )
        if position is None:
            self.tb.log_text('settings', table_of(header['args']), step=0)

    # ------------------------------------------------------------------------------ steps
    def begin_epoch(self, begin: int, rates: list[float]) -> MetricLogger:
        """Fresh meters for an epoch, which begin with the steps that earlier starts have done of it.

        Args:
            begin: the step, since the beginning of the training, at which the epoch began.
            rates: learning rates of the steps of the epoch that are done.
        """
        self.meters = MetricLogger()
        self.meters.add_meter('tlr', SmoothedValue(window_size=1, fmt='{value:.2g}'))
        for name in (*self.headline, 'tnm'):
            self.meters.add_meter(name, SmoothedValue(window_size=1, fmt='{median:.3f} ({global_avg:.3f})'))

        # So the means of an epoch do not depend on how often it was interrupted.
        for rate in rates:
            self.meters.update(tlr=rate)
        if dist.is_master():
            for line in logged_steps(self.folder, begin, begin + len(rates)):
                self._update_meters(line.get('grad_norm'), line)
        return self.meters

    def _update_meters(self, grad_norm: Any, values: dict[str, float]) -> None:
        """Add a step to the meters: the gradient norm and the metrics of the progress line."""
        headline = {name: values.get(key) for name, key in self.headline.items()}
        self.meters.update(tnm=grad_norm, **headline)

    def after_step(self, step: int, it: int, info: StepInfo, rates: tuple[float, ...], clip: float) -> None:
        """Log a step, if it is one of those that are logged; every rank calls it.

        Args:
            step: since the beginning of the training.
            it: since the beginning of the epoch.
            info: outcome of the step.
            rates: lowest and highest learning rate, lowest and highest weight decay.
            clip: largest norm of the gradient; 0 or less means no limit.
        """
        _, max_lr, _, max_wd = rates
        self.meters.update(tlr=max_lr)
        if it not in self.meters.regular_iters and not self.tb.due():
            return

        # The metrics are averaged over all ranks, so every rank takes part. The slowest rank is that of the
        # steps before this one, which has not ended yet.
        values = self.trainer.metrics(info.aux)
        self.pace.compare()
        self.meters.notes = self.pace.for_line()
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if info.is_finite:
            self._update_meters(info.grad_norm, finite)
        if dist.is_master():
            line = dict(step=step, lr=max_lr, wd=max_wd, grad_norm=float(info.grad_norm), **values,
                        **self.pace.for_json())
            if not info.is_finite:
                line['skipped'] = True
            append_json_line(self.folder / 'steps.jsonl', line)
        self._plot_step(step, info, finite, rates, clip)

    def _plot_step(self, step: int, info: StepInfo, values: dict[str, float], rates: tuple[float, ...],
                   clip: float) -> None:
        """Write the points of a step in TensorBoard, under the published tags."""
        tb = self.tb
        # Upstream parity: the first level once more, where it shows to the left of the curve.
        if step == 0:
            for before in (-10000, -1000):
                tb.update('AR_iter_loss', step=before, z_voc_usage=values.get('z_voc_usage'))
        schedule = {name: value for name, value in values.items() if name.startswith('prog_')}
        metrics = {name: value for name, value in values.items() if name not in schedule}
        min_lr, max_lr, min_wd, max_wd = rates
        tb.update('AR_iter_schedule', **schedule)
        tb.update(self.trainer.step_tag, **metrics)
        tb.update('AR_opt_lr/lr_min', sche_tlr=min_lr)
        tb.update('AR_opt_lr/lr_max', sche_tlr=max_lr)
        tb.update('AR_opt_wd/wd_max', sche_twd=max_wd)
        tb.update('AR_opt_wd/wd_min', sche_twd=min_wd)
        tb.update('AR_opt_grad/fp16', scale_log2=info.scale_log2)
        grad_norm = info.grad_norm if info.is_finite else None
        grad_clip = clip if clip > 0 else None
        tb.update('AR_opt_grad/grad', grad_norm=grad_norm, grad_clip=grad_clip)

    def show_skipped(self, total: int) -> None:
        """Show in the progress line how many steps were left out."""
        if 'skipped' not in self.meters.meters:
            self.meters.add_meter('skipped', SmoothedValue(window_size=1, fmt='{value:.0f}'))
        self.meters.update(skipped=total)

    def pictures(self, images_B3HW: torch.Tensor, step: int) -> None:
        """Write the trainer's pictures of validation images and its histograms; the first rank calls it.

        Args:
            images_B3HW: validation images in [-1, 1].
            step: number of steps that are done.
        """
        for tag, picture in self.trainer.pictures(images_B3HW).items():
            self.tb.log_image(tag, picture, step)
        for tag, counts in self.trainer.histograms().items():
            self.tb.log_tensor_as_distri(tag, counts, step)

    def samples(self, images_B3HW: torch.Tensor, step: int) -> None:
        """Write samples as one picture; the first rank calls it.

        Args:
            images_B3HW: samples in [0, 1].
            step: number of steps that are done.
        """
        num_columns = math.ceil(len(images_B3HW) ** 0.5)
        picture = make_grid(images_B3HW, nrow=num_columns, padding=2, pad_value=1.)
        self.tb.log_image('AR_samples', picture, step)

    # ------------------------------------------------------------------------------ epochs
    def after_epoch(self, epoch: int, num_epochs: int, steps_done: int, validation: dict[str, float],
                    is_evaluated: bool, weight_decay: float, remaining: float) -> None:
        """Write a line of JSON into log.txt, and a point per curve into TensorBoard.

        Args:
            epoch: the epoch that has ended, from 0 on.
            num_epochs: of the training.
            steps_done: at the end of the epoch, since the beginning of the training.
            validation: scores of the last evaluation; {} before the first one.
            is_evaluated: whether the last evaluation was after this epoch.
            weight_decay: at the end of the epoch.
            remaining: estimate of the seconds until the training is done.
        """
        means = {name: meter.global_avg for name, meter in self.meters.meters.items()}
        train = {key: means[name] for name, key in self.headline.items()}
        scores = {f'v{key}': validation.get(key) for key in self.trainer.model.headline.values()}
        if not self.trainer.has_scores_in_every_line:
            scores = {name: value for name, value in scores.items() if value is not None}
        finish = time.strftime('%m-%d %H:%M', time.localtime(time.time() + remaining))
        remain = str(datetime.timedelta(seconds=round(remaining)))
        shown = '  '.join(f'{name}: {means[name]:.4f}' for name in self.headline)
        logger.info('     [ep%d]  (training)  %s  Remain: %s, Finish: %s', epoch, shown, remain, finish)
        if not dist.is_master():
            return

        # A line repeats the scores of the last evaluation, a curve has a point only where one took place.
        new_scores = scores if is_evaluated else {}
        self.tb.update(self.trainer.epoch_tag, step=epoch + 1, **train, **new_scores)
        self.tb.update('AR_z_burnout', step=epoch + 1, rest_hours=remaining / 3600)
        self.tb.update('AR_time', step=epoch + 1, **self.meters.shares)
        self.tb.flush()
        line = dict(
            it=steps_done,
            ep=f'{epoch + 1}/{num_epochs}',
            lr=means['tlr'],
            wd=weight_decay,
            grad_norm=means['tnm'],
            **train,
            **scores,
            remain_time=remain,
            finish_time=finish,
        )
        append_json_line(self.folder / 'log.txt', line)

    def has_distance(self, epoch: int, name: str) -> bool:
        """Whether log.txt has the distance of samples after an epoch; every rank calls it."""
        is_there = False
        if dist.is_master():
            lines = read_json_lines(self.folder / 'log.txt')
            is_there = any(name in line and epoch_of(line) == epoch + 1 for line in lines)
        return dist.allgather_object(is_there)[0]

    def is_lowest(self, name: str, value: float) -> bool:
        """Whether a distance of samples is lower than all of this name in log.txt; every rank calls it."""
        def compare() -> bool:
            lines = read_json_lines(self.folder / 'log.txt')
            earlier = [line[name] for line in lines if math.isfinite(line.get(name, math.nan))]
            return value < min(earlier, default=math.inf)
        return dist.from_master(compare)

    def distance(self, epoch: int, num_epochs: int, steps_done: int, name: str, value: float) -> None:
        """Write the distance of samples after an epoch: a line of its own in log.txt, a point in TensorBoard.

        Args:
            epoch: from 0 on.
            num_epochs: of the training.
            steps_done: at the end of the epoch, since the beginning of the training.
            name: of the distance, such as fid_5k.
            value: the distance.
        """
        if not dist.is_master():
            return
        self.tb.update(self.trainer.epoch_tag, step=epoch + 1, **{name: value})
        self.tb.flush()
        line = {'it': steps_done, 'ep': f'{epoch + 1}/{num_epochs}', name: value}
        append_json_line(self.folder / 'log.txt', line)


def lines_per_epoch(steps: int) -> int:
    """Number of progress lines of an epoch that has `steps` steps."""
    return LINES_PER_LONG_EPOCH if steps > LONG_EPOCH else LINES_PER_EPOCH


# ---------------------------------------------------------------------------------------------- restarts
def open_logs(folder: Path, tb_dir: Path, header: dict[str, Any],
              position: tuple[int, int] | None) -> None:
    """Bring the logs to the point at which a start begins; see `Journal` for the arguments."""
    if position is not None:
        steps_done, epochs_ended = position
        rewind(folder, tb_dir, steps_done, epochs_ended)
        return

    # Without a checkpoint there may still be logs: of this very training, which was killed before its first
    # checkpoint, or of another one.
    earlier = read_json_lines(folder / 'log.txt')[:1]
    if earlier and earlier[0].get('args') == json.loads(json.dumps(header['args'])):
        rewind(folder, tb_dir, steps_done=0, epochs_ended=-1)
    else:
        set_logs_aside(folder, tb_dir)
    append_json_line(folder / 'log.txt', header)


def rewind(folder: Path, tb_dir: Path, steps_done: int, epochs_ended: int) -> None:
    """Remove from the logs what is later than a checkpoint, and lines that were cut off.

    Args:
        folder: where log.txt and steps.jsonl are.
        tb_dir: where the TensorBoard files are.
        steps_done: optimizer steps that are done in the checkpoint.
        epochs_ended: epochs that have ended in it, with their line in log.txt; -1 removes its header, too.
    """
    def is_step_kept(line: dict[str, Any]) -> bool:
        return line.get('step', -1) < steps_done

    def is_epoch_kept(line: dict[str, Any]) -> bool:
        return epoch_of(line) <= epochs_ended

    def is_point_kept(tag: str, step: int) -> bool:
        if tag.startswith(EPOCH_HEADS):
            return step <= epochs_ended
        # A picture or histogram shows the state after `step` steps, as a checkpoint does.
        if tag.startswith(PICTURE_HEADS):
            return step <= steps_done
        # Step 0 also writes points with a negative step, which must not survive it.
        return steps_done > 0 and step < steps_done

    rewind_snapshots(folder, steps_done)
    keep_json_lines(folder / 'steps.jsonl', is_step_kept)
    keep_json_lines(folder / 'not_finite.jsonl', is_step_kept)
    keep_json_lines(folder / 'log.txt', is_epoch_kept)
    if tb_dir.is_dir():
        keep_events(tb_dir, is_point_kept)


def set_logs_aside(folder: Path, tb_dir: Path) -> None:
    """Rename the logs that an earlier run without a checkpoint has left, so that a new run begins its own."""
    names = 'steps.jsonl', 'not_finite.jsonl', 'log.txt', SNAPSHOTS
    for path in (*(folder / name for name in names), tb_dir):
        if not path.exists():
            continue
        number = 1
        while path.with_name(f'{path.name}.before{number}').exists():
            number += 1
        path.rename(path.with_name(f'{path.name}.before{number}'))


def epoch_of(line: dict[str, Any]) -> int:
    """Number of the epoch, from 1 on, that a line of log.txt belongs to; 0 for its first line."""
    number = str(line.get('ep', '0')).partition('/')[0]
    return int(number) if number.isdecimal() else 0


def logged_steps(folder: Path, first: int, last: int) -> list[dict[str, Any]]:
    """The lines of steps.jsonl that belong to the steps in [first, last)."""
    lines = read_json_lines(folder / 'steps.jsonl')
    return [line for line in lines if first <= line.get('step', -1) < last]
