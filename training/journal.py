"""What a training writes down, where, when, and under which published names; and how logs are continued.

| sink | when | what |
|---|---|---|
| console, stdout.txt | 5 times an epoch, 30 times in long ones | meters, images/s, where the time goes |
| steps.jsonl | at the same steps, and at every `--log_every`th | rates, gradient norm, all metrics |
| TensorBoard, `AR_iter_*`, `VAE_iter`, `AR_opt_*` | at every `--log_every`th step | the same |
| log.txt; TensorBoard, `AR_ep_loss`, `VAE_ep` | after every epoch | means of logged steps, validation |
| TensorBoard, `VAE_pictures`, `VAE_codes` | every `--picture_every` steps, at evaluations | pictures |

Lines and points are written before the checkpoint that covers them, so that a kill never loses one; what is
later than the checkpoint that a start continues from is taken out again, since the start repeats it. So every
step and every epoch stands in the logs once.
"""
import datetime
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

import dist
from trainer import StepInfo, Trainer
from utils.log import (
    MetricLogger,
    SmoothedValue,
    TensorboardLogger,
    append_json_line,
    keep_events,
    keep_json_lines,
    read_json_lines,
)

logger = logging.getLogger(__name__)
EPOCH_HEADS = ('AR_ep_loss/', 'AR_z_burnout/', 'VAE_ep/')  # tags whose points are counted in epochs
LINES_PER_EPOCH = 5
LINES_PER_LONG_EPOCH = 30  # of one with more steps than the following
LONG_EPOCH = 8000


class Journal:
    """The logs of one training. All ranks call its methods alike, the first one alone writes.

    Args:
        folder: of log.txt and steps.jsonl.
        tb_dir: of the TensorBoard files.
        trainer: whose metrics are logged.
        every: steps between two points in TensorBoard.
        header: the first line of log.txt, begun anew where it names other settings under `args`.
        position: (steps, epochs) in the checkpoint that this start continues, None where there is none.
    """

    def __init__(self, folder: Path, tb_dir: Path, trainer: Trainer, every: int, header: dict[str, Any],
                 position: tuple[int, int] | None):
        self.folder = folder
        self.trainer = trainer
        self.headline = trainer.model.headline  # name in the progress line -> key of the metrics
        self.meters = MetricLogger()
        if dist.is_master():
            folder.mkdir(parents=True, exist_ok=True)
            open_logs(folder, tb_dir, header, position)
        self.tb = TensorboardLogger(str(tb_dir) if dist.is_master() else None,
                                    filename_suffix=time.strftime('__%m%d_%H%M'), every=every)

    # ------------------------------------------------------------------------------ steps
    def begin_epoch(self, begin: int, rates: list[float]) -> MetricLogger:
        """Fresh meters, which know the steps that earlier starts have done of the epoch.

        Args:
            begin: the step, since the beginning of the training, at which the epoch began.
            rates: learning rates of the steps that are done.
        """
        self.meters = MetricLogger()
        self.meters.add_meter('tlr', SmoothedValue(window_size=1, fmt='{value:.2g}'))
        for name in (*self.headline, 'tnm'):
            self.meters.add_meter(name, SmoothedValue(window_size=1, fmt='{median:.3f} ({global_avg:.3f})'))
        for rate in rates:
            self.meters.update(tlr=rate)
        if dist.is_master():
            for line in logged_steps(self.folder, begin, begin + len(rates)):
                self._update_meters(line.get('grad_norm'), line)
        return self.meters

    def _update_meters(self, grad_norm: Any, values: dict[str, float]) -> None:
        self.meters.update(tnm=grad_norm, **{name: values.get(key) for name, key in self.headline.items()})

    def after_step(self, step: int, it: int, info: StepInfo, rates: tuple[float, ...], clip: float) -> None:
        """Log a step where it is due.

        Args:
            step: since the beginning of the training. it: the same within the epoch.
            rates: lowest and highest learning rate, lowest and highest weight decay.
            clip: of the gradient norm; 0 and less is off.
        """
        self.meters.update(tlr=rates[1])
        if it not in self.meters.regular_iters and not self.tb.due():
            return
        # The metrics are averaged over all ranks, so every rank takes part.
        values = self.trainer.metrics(info.aux)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if info.is_finite:
            self._update_meters(info.grad_norm, finite)
        if dist.is_master():
            _, max_lr, _, max_wd = rates
            skipped = {} if info.is_finite else dict(skipped=True)
            append_json_line(self.folder / 'steps.jsonl', dict(
                step=step, lr=max_lr, wd=max_wd, grad_norm=float(info.grad_norm), **values, **skipped))
        self._draw_step(step, info, finite, rates, clip)

    def _draw_step(self, step: int, info: StepInfo, values: dict[str, float], rates: tuple[float, ...],
                   clip: float) -> None:
        """The points of a step in TensorBoard, under the published tags."""
        tb = self.tb
        if step == 0:  # the starting level, visible left of the curve
            for before in (-10000, -1000):
                tb.update('AR_iter_loss', step=before, z_voc_usage=values.get('z_voc_usage'))
        schedule = {name: value for name, value in values.items() if name.startswith('prog_')}
        others = {name: value for name, value in values.items() if name not in schedule}
        min_lr, max_lr, min_wd, max_wd = rates
        tb.update('AR_iter_schedule', **schedule)
        tb.update(self.trainer.step_tag, **others)
        tb.update('AR_opt_lr/lr_min', sche_tlr=min_lr)
        tb.update('AR_opt_lr/lr_max', sche_tlr=max_lr)
        tb.update('AR_opt_wd/wd_max', sche_twd=max_wd)
        tb.update('AR_opt_wd/wd_min', sche_twd=min_wd)
        tb.update('AR_opt_grad/fp16', scale_log2=info.scale_log2)
        tb.update('AR_opt_grad/grad', grad_norm=info.grad_norm if info.is_finite else None,
                  grad_clip=clip if clip > 0 else None)

    def show_skipped(self, total: int) -> None:
        """Show in the progress line how many steps were left out."""
        if 'skipped' not in self.meters.meters:
            self.meters.add_meter('skipped', SmoothedValue(window_size=1, fmt='{value:.0f}'))
        self.meters.update(skipped=total)

    def pictures(self, images_B3HW: torch.Tensor, step: int) -> None:
        """What the trainer has to show of validation images after `step` steps; the first rank calls it."""
        for tag, picture in self.trainer.pictures(images_B3HW).items():
            self.tb.log_image(tag, picture, step)
        for tag, counts in self.trainer.histograms().items():
            self.tb.log_tensor_as_distri(tag, counts, step)

    # ------------------------------------------------------------------------------ epochs
    def after_epoch(self, epoch: int, num_epochs: int, steps_done: int, validation: dict[str, float],
                    is_evaluated: bool, weight_decay: float, remaining: float) -> None:
        """One line of JSON in log.txt and one point per TensorBoard curve.

        Args:
            steps_done: at the end of the epoch, since the beginning of the training.
            validation: scores of the last evaluation; {} before the first one.
            is_evaluated: whether that was after this epoch.
            remaining: seconds until the training is done, as far as anybody can tell.
        """
        means = {name: meter.global_avg for name, meter in self.meters.meters.items()}
        headline = self.headline.items()
        train = {key: means[name] for name, key in headline}
        scores = {f'v{key}': validation.get(key) for _, key in headline}
        if not self.trainer.has_scores_in_every_line:
            scores = {name: value for name, value in scores.items() if value is not None}
        finish = time.strftime('%m-%d %H:%M', time.localtime(time.time() + remaining))
        remain = str(datetime.timedelta(seconds=round(remaining)))
        logger.info('     [ep%d]  (training)  %s  Remain: %s, Finish: %s', epoch,
                    '  '.join(f'{name}: {means[name]:.4f}' for name, _ in headline), remain, finish)
        if not dist.is_master():
            return
        self.tb.update(self.trainer.epoch_tag, step=epoch + 1, **train, **(scores if is_evaluated else {}))
        self.tb.update('AR_z_burnout', step=epoch + 1, rest_hours=remaining / 3600)
        self.tb.flush()
        append_json_line(self.folder / 'log.txt', dict(
            it=steps_done, ep=f'{epoch + 1}/{num_epochs}', lr=means['tlr'], wd=weight_decay,
            grad_norm=means['tnm'], **train, **scores, remain_time=remain, finish_time=finish))

    def has_distance(self, epoch: int, name: str) -> bool:
        """Whether the distance of samples after an epoch stands in log.txt; the same on every rank."""
        is_there = False
        if dist.is_master():
            lines = read_json_lines(self.folder / 'log.txt')
            is_there = any(name in line and epoch_of(line) == epoch + 1 for line in lines)
        return dist.allgather_object(is_there)[0]

    def distance(self, epoch: int, num_epochs: int, steps_done: int, name: str, value: float) -> None:
        """The distance of samples after an epoch: a line of its own in log.txt, a point in TensorBoard."""
        if not dist.is_master():
            return
        self.tb.update(self.trainer.epoch_tag, step=epoch + 1, **{name: value})
        self.tb.flush()
        append_json_line(self.folder / 'log.txt',
                         {'it': steps_done, 'ep': f'{epoch + 1}/{num_epochs}', name: value})


def lines_per_epoch(steps: int) -> int:
    """Progress lines of an epoch of so many steps."""
    return LINES_PER_LONG_EPOCH if steps > LONG_EPOCH else LINES_PER_EPOCH


# ---------------------------------------------------------------------------------------------- restarts
def open_logs(folder: Path, tb_dir: Path, header: dict[str, Any],
              position: tuple[int, int] | None) -> None:
    """Bring the logs to where a start begins: what is later in them is about to be repeated.

    Args:
        folder, tb_dir, header, position: as of `Journal`.
    """
    if position is not None:
        rewind(folder, tb_dir, *position)
        return
    earlier = read_json_lines(folder / 'log.txt')[:1]
    if earlier and earlier[0].get('args') == json.loads(json.dumps(header['args'])):
        # This very training was killed before its first checkpoint.
        rewind(folder, tb_dir, steps_done=0, epochs_ended=-1)
    else:
        set_logs_aside(folder, tb_dir)
    append_json_line(folder / 'log.txt', header)


def rewind(folder: Path, tb_dir: Path, steps_done: int, epochs_ended: int) -> None:
    """Take out of the logs what is later than a checkpoint, and lines that were torn.

    Args:
        folder: of log.txt and steps.jsonl. tb_dir: of the TensorBoard files.
        steps_done: optimizer steps in the checkpoint.
        epochs_ended: epochs in it whose line stands in log.txt.
    """
    keep_json_lines(folder / 'steps.jsonl', lambda line: line.get('step', -1) < steps_done)
    keep_json_lines(folder / 'not_finite.jsonl', lambda line: line.get('step', -1) < steps_done)
    keep_json_lines(folder / 'log.txt', lambda line: epoch_of(line) <= epochs_ended)
    if tb_dir.is_dir():
        keep_events(tb_dir, lambda tag, step:
                    step <= epochs_ended if tag.startswith(EPOCH_HEADS) else
                    # a picture or histogram after step n is of the first n steps, as a checkpoint is
                    step <= steps_done if tag.startswith(('VAE_pictures/', 'VAE_codes/')) else
                    # step 0 also draws the starting level, far to the left of it
                    0 < steps_done > step)


def set_logs_aside(folder: Path, tb_dir: Path) -> None:
    """Make room for a run that begins anew, where an earlier one without a checkpoint has left logs.

    Nothing is deleted: the files get a number.
    """
    for path in (folder / 'steps.jsonl', folder / 'not_finite.jsonl', folder / 'log.txt', tb_dir):
        if not path.exists():
            continue
        number = 1
        while path.with_name(f'{path.name}.before{number}').exists():
            number += 1
        path.rename(path.with_name(f'{path.name}.before{number}'))


def epoch_of(line: dict[str, Any]) -> int:
    """Number of the epoch, from 1 on, that a line of log.txt is of; 0 for its first line."""
    number = str(line.get('ep', '0')).partition('/')[0]
    return int(number) if number.isdecimal() else 0


def logged_steps(folder: Path, first: int, last: int) -> list[dict[str, Any]]:
    """The lines of steps.jsonl of steps in [first, last)."""
    return [line for line in read_json_lines(folder / 'steps.jsonl') if first <= line.get('step', -1) < last]
