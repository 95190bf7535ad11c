"""Train any model of this project: `torchrun --nproc_per_node=8 train.py --depth=16 --data_path=FOLDER`.

Runs without torchrun, too. To resume, run the same command again: training goes on exactly where the newest
checkpoint in the output folder was saved. `--dry_run` prints every derived value and exits, `--check` does
everything once and tells how fast.

Exit codes: 0 done, 1 an error that the last line names, 2 wrong flags, 70 nothing moved for `--watchdog`
minutes, 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C after a checkpoint (torchrun itself then ends with 1).
"""
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from configs import SAMPLE_CONFIGS, TrainConfig, parse_training
from configs.options import config_text, flag_of, marked_fields
from utils.console import announce, one_line_errors

if __name__ == '__main__':
    # Wrong flags and missing files are answered now: the imports below take seconds.
    with one_line_errors('train.py'):
        command = parse_training(sys.argv[1:])
        command.require_files()
    announce('train.py', 'loading torch, the data and the model')

import torch

import dist
from models import ARModel
from models.noise import GlobalBatch, ImageNoise
from pipeline import Pipeline, Pretrained, training_of
from trainer import StepInfo, weights_checksum
from training.auto_batch import fit_batch
from training.build import build_model, build_trainer, count_parameters, lower_tokenizer
from training.check import check
from training.data import (
    Data,
    build_data,
    calibration_images,
    check_caches,
    train_batches,
    train_sampler,
    validation_loader,
    waiting_note,
)
from training.faults import BadImages, LossSpikes, NotFinite, SkippedSteps
from training.fid import build_training_fid
from training.journal import Journal, lines_per_epoch
from training.life import Heartbeat, History, describe_start, refuse_restart_after_stop
from training.reference import find_reference
from training.resume import (
    RunState,
    changed_settings,
    check_classes,
    check_settings,
    choose_checkpoint,
    go_back_one_checkpoint,
    repair_best,
)
from training.saving import CheckpointWriter
from training.snapshots import store_snapshots
from utils.amp_sc import DTYPES, note_on_bfloat16
from utils.checkpoint import lock_folder, remove_leftovers
from utils.data import name_of
from utils.files import write_text
from utils.loading import without_child_signal
from utils.log import LEGEND, setup_logging
from utils.lr_control import lr_wd_annealing
from utils.misc import allow_tf32, mix_seed, seed_everything
from utils.peak import peak_flops
from utils.provenance import git_commit, versions
from utils.sharding import gathered
from utils.stop import Stopped, StopRequest
from utils.watchdog import Watchdog

logger = logging.getLogger(__name__)
NUM_PICTURES = 8  # validation images drawn in TensorBoard
COMPARED_IMAGES = 256  # training images of which `--vae_bf16` compares the codes


def train(run: 'Run') -> None:
    """Run the remaining epochs: steps, evaluations, logs and checkpoints.

    Everything random follows from the seed, the step and the place of an image in the global batch, so that a
    run that was killed anywhere goes on as if nothing had happened.

    Raises:
        Stopped: a signal came; everything is saved.
        NotFinite: too many steps in a row were not finite.
        OSError: a checkpoint could not be written; those before it are intact.
        ValueError: more images cannot be read than `--max_bad_images`, or ranks differ at a checkpoint.
    """
    run.measure_missing_distance()
    for epoch in run.remaining_epochs():
        for step, (images_B3HW, label_B, damage_B) in run.steps(epoch):
            # Learning rate and weight decay depend on the step alone.
            rates = run.set_rates(step)
            # Forward, backward and the optimizer's step, left out on all ranks if a gradient is not finite.
            info = run.train_step(images_B3HW, label_B, step)
            # The learning rate goes into the meters; five times an epoch and at every `--log_every`th step
            # all metrics go there, into steps.jsonl and into TensorBoard.
            run.journal.after_step(step, run.step_of_epoch(step), info, rates, run.config.clip)
            run.count_skipped(epoch, step, info)
            if run.shows_pictures_after(step):
                run.show_pictures(step + 1)
            # Averages of which any other width can be made later; the checkpoint of this step comes after.
            if run.stores_averages_after(step):
                store_snapshots(run.folder, run.trainer.profiles, step + 1)
            # One exchange tells all ranks of a signal to any of them, of images that could not be read, of a
            # checkpoint that could not be written, and of the time by the clock of the first rank.
            heard = run.exchange(damage_B, info)
            run.note_step(step)
            run.spikes.add(step, heard.loss)
            if heard.has_damage:
                run.bad_images.add(damage_B)
            if heard.has_lost_checkpoint:
                run.wait_for_checkpoint()
            if heard.stops:
                run.stop_at(epoch, run.step_of_epoch(step) + 1)
            if run.saves_after(epoch, step, heard.is_late):
                run.save(epoch, run.step_of_epoch(step) + 1)

        run.require_finite_end(epoch)
        is_best = run.evaluates_after(epoch) and run.evaluate(epoch)
        # Log, then save: after a kill in between, the next start takes the lines out and repeats the end of
        # the epoch. The distance of samples is slow, so it follows the checkpoint.
        run.end_epoch(epoch, is_best)
        run.save(*run.position_after(epoch), is_best)
        if run.evaluates_after(epoch):
            run.measure_distance(epoch)
    run.finish()


class Heard(NamedTuple):
    """What the ranks tell each other after every step."""
    stops: bool                # a signal has come to one of them
    has_damage: bool           # one of them met an image that could not be read
    is_late: bool              # a checkpoint is due by the clock of the first rank
    has_lost_checkpoint: bool  # the first rank could not write one
    loss: float                # of the step, the mean over ranks


class Run:
    """One training: what is trained on what, how far it is, and what a checkpoint holds of it.

    Args:
        config: all settings.
        data: of `build_data`.
        left_out: (first, last) steps that earlier attempts of this start have found to be bad; these and all
            between them are left out.
    Raises:
        ValueError: ranks differ, or the newest checkpoint in the output folder is of another training.
    """

    def __init__(self, config: TrainConfig, data: Data, left_out: Collection[tuple[int, int]] = ()):
        self.config = config
        self.data = data
        self.folder = Path(config.output_dir)
        self.device = dist.get_device()
        self.stop_request = StopRequest()
        world_size = dist.get_world_size()

        # 1. All ranks do the same, with the same data.
        of_a_node = marked_fields(config, 'per_node')
        shared = {flag_of(config, name): value for name, value in vars(config).items()
                  if name not in of_a_node}
        dist.require_equal(shared, 'the command', 'pass the same flags everywhere')
        self.described = data.describe()
        dist.require_equal((data.classes, self.described), 'the data set',
                           'every node must see the same files under --data_path')
        if config.num_classes not in (0, len(data.classes)):
            raise ValueError(f'--num_classes={config.num_classes}, but {config.data_path} holds '
                             f'{len(data.classes)} classes: correct one of them')

        # 2. The newest checkpoint, the same one on every rank, if it is of this training;
        #    and how many images of a step fit into memory at a time.
        chosen = choose_checkpoint(self.folder, f'{config.CHECKPOINT_PREFIX}*.pth')
        self.resumed_from = chosen.path
        checkpoint = chosen.content
        if config.auto_batch:
            saved = checkpoint.get('args') or {}
            self.config = config = fit_batch(config, len(data.classes), saved,
                                             checkpoint.get('world_size'))
        self.state = RunState(choose_seed(config, checkpoint.get('run', {}).get('seed')),
                              len(train_sampler(config, len(data.train))))
        self.start = 0, 0  # (epoch, step within it)
        self.changed: list[str] = []  # settings that differ from those of the checkpoint
        if self.resumed_from:
            check_settings(self.resumed_from, checkpoint, config)
            check_classes(self.resumed_from, checkpoint, data.classes, config.data_path)
            self.start = self.state.take_over(self.resumed_from, checkpoint, self.described, config.steps)
        self.state.left_out += [steps for steps in left_out if steps not in self.state.left_out]
        self.has_checkpoint = self.resumed_from is not None  # this start has read or written one
        self.skipped = SkippedSteps(self.folder, self.state, config.max_skipped_steps, config.precision,
                                    self.resumed_from is not None)
        self.bad_images = BadImages(self.state.bad_images, config.max_bad_images)
        self.spikes = LossSpikes()

        # 3. Random numbers and precision.
        torch.backends.cudnn.deterministic = config.seed is not None
        allow_tf32(config.tf32)
        seed_everything(mix_seed(self.state.seed))
        self.peak_flops = peak_flops(self.device, DTYPES[config.precision])  # for the progress line

        # 4. The length of the training, and its batches.
        steps_per_epoch = self.state.steps_per_epoch
        if config.steps:
            self.config = config = dataclasses.replace(config, epochs=-(-config.steps // steps_per_epoch))
        self.total_steps = config.steps or config.epochs * steps_per_epoch
        self.batches = train_batches(config, data.train, self.state.seed, self.start, steps_per_epoch)
        self.val_loader = validation_loader(config, data.val)

        # 5. The model and what moves it, and what the checkpoint says of them.
        self.model = build_model(config, len(data.classes), self.total_steps, steps_per_epoch, self.device,
                                 data.classes)
        check_caches(data.caches, config, self.model)
        if config.vae_bf16:
            images = calibration_images(config, data.train, self.state.seed, COMPARED_IMAGES)
            lower_tokenizer(self.model.tokenizer, images, config.vae_bf16)
        self.trainer = build_trainer(config, self.model, self.total_steps, data.classes)
        if self.resumed_from:
            self.resume(checkpoint)
        self.compare_weights()
        with gathered(self.model):
            self.distance = build_training_fid(config, self.model, self.val_loader)

        # 6. The logs, rewound to where the checkpoint stands.
        self.made_with = dict(git_commit=git_commit(), versions=versions()) if dist.is_master() else {}
        header = dict(name=config.exp_name, cmd=' '.join(sys.argv[1:]), seed=self.state.seed,
                      args=vars(config), **self.made_with)
        self.journal = Journal(self.folder, self.folder / config.run_name(world_size), self.trainer,
                               config, header,
                               (self.steps_done, self.state.epochs_ended) if self.resumed_from else None)
        if dist.is_master():
            path = self.folder / 'config.yaml'
            write_text(path, config_text(config, f'python train.py --config={path}', seed=self.state.seed))
        self.checkpoints = CheckpointWriter(self.folder, config.CHECKPOINT_PREFIX, config.background_save,
                                            config.keep_newest, config.keep_every, config.after_save)
        self.reference = dist.from_master(partial(find_reference, config))
        self.announce()

        # 7. What tells that it lives, and how it starts and ends.
        self.heartbeat = Heartbeat(self.folder, self.total_steps, steps_per_epoch,
                                   self.images_per_step, self.steps_done, self.journal.pace)
        self.history = History(self.folder, self.describe_start())
        rank = dist.get_rank()
        self.watchdog = Watchdog(config.watchdog, self.folder / f'stacks_rank_{rank:03d}.txt',
                                 f'rank {rank} on {dist.host_name()}', self.history.fail)
        self.has_named_waiting = False
        self.began = time.time()
        self.last_save = time.time()

    def announce(self) -> None:
        """Say what is trained."""
        world_size = dist.get_world_size()
        about_workers = self.config.workers_note(world_size)
        about_bfloat16 = note_on_bfloat16(self.device.type, self.config.precision,
                                          flag_of(self.config, 'precision'))
        for note in (about_workers, about_bfloat16):
            if note and dist.is_master():
                logger.warning('%s', note)
        if self.config.tlr is not None:
            logger.warning('--tlr is ignored: the peak follows from --%s and is %g',
                           flag_of(self.config, 'base_lr'), self.config.peak_lr(world_size))
        logger.info('%s: %.2fM parameters, %s x %d, %d + %d images of %d classes, '
                    '%d steps per epoch, seed %d',
                    self.config.model, count_parameters(self.model) / 1e6, self.device, world_size,
                    len(self.data.train), len(self.data.val), len(self.data.classes),
                    self.state.steps_per_epoch, self.state.seed)
        if self.trainer.legend:
            logger.info('in the progress line, %s', self.trainer.legend)
        logger.info('%s', LEGEND)
        if self.reference:
            logger.info('these are the settings of %s: every evaluation is compared with the stored curves '
                        'of that training', self.reference.recipe)
        if not self.trainer.selection and self.distance is None:
            logger.warning('no score of the validation tells which checkpoint is the best one: there is no '
                           '-best, unless --fid_images=N has it chosen by the distance of samples')

    def describe_start(self) -> dict[str, Any]:
        """What restarts.jsonl says of this start; every rank calls it."""
        epoch, step = self.start
        return dict(
            resumed_from=self.resumed_from.name if self.resumed_from else None,
            epoch=epoch,
            step=step,
            changed_settings=self.changed,
            **describe_start(self.journal.pace.hosts),
            **self.made_with,
        )

    # ------------------------------------------------------------------------------ how far it is
    @property
    def images_per_step(self) -> int:
        """Images of all ranks per optimizer step."""
        return self.config.micro_batch(dist.get_world_size()) * self.config.accumulate

    @property
    def steps_done(self) -> int:
        """Optimizer steps in the checkpoint that this run continues."""
        epoch, step = self.start
        return epoch * self.state.steps_per_epoch + step

    def remaining_epochs(self) -> Iterator[int]:
        """Numbers of the epochs of which anything is left to do, be it the evaluation alone."""
        for epoch in range(self.start[0], self.config.epochs):
            # A checkpoint of a longer training than this one has nothing left to evaluate, either.
            is_trained = self.first_step(epoch) >= self.last_step(epoch)
            has_ended = self.state.epochs_ended > epoch or self.steps_done > self.total_steps
            if not (is_trained and has_ended):
                yield epoch

    def first_step(self, epoch: int) -> int:
        """The step within an epoch at which this start begins it."""
        return self.start[1] if epoch == self.start[0] else 0

    def last_step(self, epoch: int) -> int:
        """Steps of an epoch, of which `--steps` may cut the last one short."""
        steps = self.state.steps_per_epoch
        return min(steps, self.total_steps - epoch * steps)

    def position_after(self, epoch: int) -> tuple[int, int]:
        """(epoch, step) at which a run continues after `epoch`, which `--steps` may cut short."""
        steps = self.last_step(epoch)
        return (epoch + 1, 0) if steps == self.state.steps_per_epoch else (epoch, steps)

    def step_of_epoch(self, step: int) -> int:
        """The same step, counted from the beginning of its epoch."""
        return step % self.state.steps_per_epoch

    def evaluates_after(self, epoch: int) -> bool:
        """Whether a validation follows this epoch."""
        return (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs

    def saves_after(self, epoch: int, step: int, is_late: bool) -> bool:
        """Whether a checkpoint follows this step, within an epoch; its end has one in any case."""
        every, _ = self.config.save_steps_minutes
        is_due = is_late or any(number and (step + 1) % number == 0
                                for number in (every, self.config.keep_every))
        # Among steps that are not finite none is due: the last good one may have to be restored.
        is_good = self.skipped.in_a_row == 0
        return is_due and is_good and self.step_of_epoch(step) + 1 < self.last_step(epoch)

    def shows_pictures_after(self, step: int) -> bool:
        """Whether pictures follow this step."""
        every = self.config.picture_every
        return bool(every) and (step + 1) % every == 0

    def stores_averages_after(self, step: int) -> bool:
        """Whether files of the averages of `--ema_profiles` follow this step; the last one has them, too."""
        every = self.config.ema_snapshot
        return bool(every) and ((step + 1) % every == 0 or step + 1 == self.total_steps)

    # ------------------------------------------------------------------------------ a step
    def steps(self, epoch: int) -> Iterator[tuple[int, tuple]]:
        """(step since the beginning of the training, batch) for what is left of an epoch; a progress line now
        and then."""
        begin = epoch * self.state.steps_per_epoch
        first = self.first_step(epoch)
        last = self.last_step(epoch)
        # After a restart the meters of the epoch take in the rates of the steps before it once more.
        rates = [self.set_rates(begin + it)[1] for it in range(first)]
        meters = self.journal.begin_epoch(begin, rates)
        timed = self.journal.pace.timed(self.batches)
        batches = meters.log_every(
            first, last, timed, num_lines=lines_per_epoch(self.state.steps_per_epoch),
            header=f'[Ep]: [{epoch:4d}/{self.config.epochs}]',
            tokenizer_seconds=self.trainer.tokenizer_seconds,
            on_waiting=self.name_waiting,
            take_flops=self.trainer.take_flops,
            peak_flops=self.peak_flops,
            seconds_left=lambda it: self.seconds_left(begin + it),
            images_per_iter=self.images_per_step)
        for it, batch in batches:
            self.journal.tb.set_step(begin + it)
            if not self.state.is_left_out(begin + it):
                yield begin + it, batch

    def seconds_left(self, step: int) -> float:
        """Estimate of the seconds until the end of the run after a step, by the steps, evaluations and
        checkpoints of this start."""
        steps_here = step + 1 - self.steps_done
        return (time.time() - self.began) / steps_here * (self.total_steps - step - 1)

    def name_waiting(self, share: float) -> None:
        """Say, once in a start, that much of the time is spent on waiting for data, and what helps."""
        if dist.is_master() and not self.has_named_waiting:
            logger.warning('%s', waiting_note(self.config, share))
        self.has_named_waiting = True

    def set_rates(self, step: int) -> tuple[float, ...]:
        """Set learning rate and weight decay of every optimizer.

        Returns:
            Lowest and highest learning rate, lowest and highest weight decay of the model's own optimizer.
        """
        config = self.config
        warmup_steps = config.warmup_epochs * self.state.steps_per_epoch
        end = config.final_lr_ratio(dist.get_world_size())
        step, total_steps = config.lr_phase(step, self.total_steps, self.state.steps_per_epoch)
        peaks = config.peaks(dist.get_world_size())
        rates = [lr_wd_annealing(config.lr_schedule, optimizer, *peak, step, warmup_steps, total_steps,
                                 wp0=config.warmup_start, wpe=end)
                 for optimizer, peak in zip(self.trainer.optimizers, peaks, strict=False)]
        return rates[0]

    def train_step(self, images_B3HW: torch.Tensor, label_B: torch.Tensor, step: int) -> StepInfo:
        """One optimizer step over its micro-steps.

        Random numbers follow from (seed, step) and the position of an image in the global batch, so that they
        are the same after a restart and for any number of ranks and micro-steps.
        """
        num_micro = self.config.accumulate
        micro_batch = len(label_B) // num_micro
        first_row = dist.get_rank() * len(label_B)
        num_rows = dist.get_world_size() * len(label_B)
        self.trainer.begin_step(label_B)
        for i in range(num_micro):
            rows = slice(i * micro_batch, (i + 1) * micro_batch)
            seed_everything(mix_seed(self.state.seed, step))
            with GlobalBatch(first_row + rows.start, num_rows):
                info = self.trainer.train_step(
                    images_B3HW[rows].to(self.device, non_blocking=True),
                    label_B[rows].to(self.device, non_blocking=True),
                    progress=step / self.total_steps, stepping=i + 1 == num_micro)
        return info

    def exchange(self, damage_B: list[str], info: StepInfo) -> Heard:
        """What the ranks tell each other after a step, the same on every rank.

        Args:
            damage_B: for every image of this rank's batch why it could not be read, or ''.
            info: outcome of the step on this rank.
        """
        _, minutes = self.config.save_steps_minutes
        is_late = bool(minutes) and time.time() - self.last_save >= 60 * minutes
        loss = float(info.loss)
        is_asked = bool(self.stop_request)
        with self.trainer.waiting:
            *marks, sum_of_losses = dist.sum_over_ranks(is_asked, any(damage_B), is_late and dist.is_master(),
                                                        self.checkpoints.has_failed, loss)
        return Heard(*map(bool, marks), sum_of_losses / dist.get_world_size())

    def note_step(self, step: int) -> None:
        """Note that a step is done on all ranks."""
        self.journal.pace.end_step()
        self.heartbeat.steps_done = step + 1
        self.show_life('training', self.step_of_epoch(step) in self.journal.meters.regular_iters)

    def show_life(self, doing: str, is_due: bool = False) -> None:
        """Tell the watchdog that this rank goes on, and now and then heartbeat.json what it is doing.

        Args:
            is_due: whether the file is written in any case.
        """
        self.watchdog.feed()
        self.heartbeat.beat(doing, is_due)

    # ------------------------------------------------------------------------------ what goes wrong
    def count_skipped(self, epoch: int, step: int, info: StepInfo) -> None:
        """Count a step that was left out, since it was not finite, and name its images.

        Raises:
            NotFinite: there are too many in a row.
        """
        self.skipped.count(info)
        if info.is_finite:
            return
        self.journal.show_skipped(self.state.skipped_steps)
        num_images = len(self.data.train)
        sampler = train_sampler(self.config, num_images)
        numbers = sampler.epoch_batches(epoch)[self.step_of_epoch(step)]
        names = [name_of(self.data.train, number % num_images) for number in numbers]
        self.skipped.report(epoch, step, info, names)

    def require_finite_end(self, epoch: int) -> None:
        """Do not end as if all were well, with the weights that made the last steps overflow.

        A single one may come from its images, and is left out like any other.

        Raises:
            NotFinite: this is the last epoch, and its last steps were left out.
        """
        last = self.total_steps - 1
        ends_badly = self.skipped.in_a_row > 1 or self.state.is_left_out(last)
        if epoch + 1 == self.config.epochs and ends_badly:
            self.skipped.give_up(last, at_end=True)

    def may_restore(self) -> bool:
        """Whether the last checkpoint may be restored after steps that were not finite."""
        return self.has_checkpoint and len(self.state.left_out) < self.config.max_restores

    def compare_weights(self) -> None:
        """Make sure that all ranks train the same model.

        Raises:
            ValueError: they do not, on every rank.
        """
        if dist.get_world_size() > 1:
            dist.require_equal(weights_checksum(self.model), 'a checksum of the weights',
                               'a GPU or a network card may be faulty; run the same command again to go on '
                               'from the last checkpoint')

    # ------------------------------------------------------------------------------ signals
    def is_stopping(self) -> bool:
        """Whether a signal came to any rank; every rank calls it."""
        return any(dist.sum_over_ranks(bool(self.stop_request)))

    def stop_at(self, epoch: int, step: int) -> None:
        """Save a checkpoint at `step` of `epoch` and end the run, because of a signal; every rank calls it.

        Raises:
            Stopped: always.
        """
        self.save(epoch, step)
        self.stop()

    def stop(self) -> None:
        """End the run because of a signal, where the last checkpoint holds everything; every rank calls it.

        Raises:
            Stopped: always.
        """
        self.wait_for_checkpoint()
        name = self.stop_request.signal_name or 'a signal to another process'
        self.journal.tb.close()
        self.show_life('stopped', is_due=True)
        raise Stopped(f'stopped by {name}; everything is saved in {self.folder}, run the same command again '
                      'to go on')

    # ------------------------------------------------------------------------------ evaluation
    def evaluate(self, epoch: int) -> bool:
        """Validate; whether it is the best score so far.

        Raises:
            Stopped: a signal came. The epoch is saved as trained, and the next start validates it.
        """
        begin = time.time()
        self.trainer.before_evaluation(self.images_to_calibrate)
        seed_everything(mix_seed(self.state.seed, 0, dist.get_rank()))  # the same noise at every evaluation
        batches = without_child_signal(self.val_loader, self.config.loader_timeout)
        scores = self.trainer.eval_epoch(self.until_stopped(batches))
        if self.is_stopping():
            self.stop_at(epoch, self.last_step(epoch))
        selection = self.trainer.selection
        is_best = bool(selection) and scores[selection] < self.state.best
        self.state.validation = scores
        if is_best:
            self.state.best = scores[selection]
        steps_done = min((epoch + 1) * self.state.steps_per_epoch, self.total_steps)
        if self.config.picture_every:
            self.show_pictures(steps_done)
        if self.config.tb and self.config.tb_samples:
            self.show_samples(steps_done)
        headline = [f'{name}: {scores[key]:.4f}' for name, key in self.model.headline.items()
                    if key in scores]
        if selection:
            headline.append(f'best {selection}: {self.state.best:.4f}')
        logger.info(' [*] [ep%d]  (val %d)  %s  Val cost: %.1fs', epoch, scores['count'],
                    '  '.join(headline), time.time() - begin)
        self.compare_with_reference((epoch + 1) * self.state.steps_per_epoch, scores)
        return is_best

    def compare_with_reference(self, step: int, scores: dict[str, float]) -> None:
        """Warn if scores leave the band of the recipe that this run has the settings of.

        Args:
            step: optimizer steps that are done, as log.txt counts them: in whole epochs.
        """
        departure = self.reference.departure(step, scores) if self.reference else ''
        if departure and dist.is_master():
            logger.warning('%s', departure)

    def images_to_calibrate(self) -> Iterator[torch.Tensor]:
        """Training images of this rank, by which a tokenizer is calibrated."""
        for images_B3HW in calibration_images(self.config, self.data.train, self.state.seed):
            yield images_B3HW
            self.show_life('evaluating')

    def until_stopped(self, batches: Iterable) -> Iterator:
        """The same batches, as long as no signal has come to this rank; the first one in any case."""
        for batch in batches:
            yield batch
            self.show_life('evaluating')
            if self.stop_request:
                return

    def show_pictures(self, step: int) -> None:
        """Pictures of fixed validation images in TensorBoard, after `step` steps."""
        if not dist.is_master():
            return
        val_set = self.data.val
        count = min(NUM_PICTURES, len(val_set))
        images = torch.stack([val_set[i * len(val_set) // count][0] for i in range(count)])
        self.journal.pictures(images.to(self.device), step)

    def show_samples(self, step: int) -> None:
        """Samples of the same noise and classes in TensorBoard, after `step` steps; every rank calls it."""
        count = self.config.tb_samples
        labels = [i % self.model.num_classes for i in range(count)]
        settings = SAMPLE_CONFIGS[self.config.model](model=self.config.model, ckpt='in training')
        with self.trainer.averaged():  # every rank takes part, where weights are sharded
            if dist.is_master():
                noise = ImageNoise(0, range(count))
                with torch.no_grad(), self.trainer.optimizer.amp_ctx:
                    images_B3HW = self.model.sample(labels, rng=noise, **settings.sample_kwargs())
                self.journal.samples(images_B3HW.float().clamp(0, 1), step)
        self.show_life('evaluating')

    def measure_missing_distance(self) -> None:
        """Draw the distance of the last epoch, where a start was killed before it was done."""
        if self.state.epochs_ended > 0 and self.evaluates_after(self.state.epochs_ended - 1):
            self.measure_distance(self.state.epochs_ended - 1)

    def measure_distance(self, epoch: int) -> None:
        """The Frechet distance of samples after an evaluated epoch, where `--fid_images` asks for it.

        Raises:
            Stopped: a signal came; the next start draws it.
        """
        if self.distance is None or self.journal.has_distance(epoch, self.distance.name):
            return
        begin = time.time()
        with self.trainer.averaged():
            value = self.distance(self.model, self.trainer.optimizer.amp_ctx, self.stop_request,
                                  after_batch=partial(self.show_life, 'evaluating'))
        if self.is_stopping():
            self.stop()
        # Where no score of the validation tells which checkpoint is the best one, the distance does. The last
        # one is that of the end of this epoch.
        if not self.trainer.selection and self.journal.is_lowest(self.distance.name, value):
            dist.from_master(self.checkpoints.mark_best)
        logger.info(' [*] [ep%d]  %s: %.4f  cost: %.1fs', epoch, self.distance.name, value,
                    time.time() - begin)
        self.journal.distance(epoch, self.config.epochs, (epoch + 1) * self.state.steps_per_epoch,
                              self.distance.name, value)

    # ------------------------------------------------------------------------------ checkpoints
    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Weights, optimizer and averages of the checkpoint; settings that differ are named."""
        path = self.resumed_from
        self.trainer.load_state_dict(checkpoint['trainer'], str(path))
        logger.info('resumed from %s at epoch %d, step %d', path, *self.start)
        if not dist.is_master():
            return
        settings = checkpoint.get('args') or {}
        self.changed = changed_settings(self.config, settings, marked_fields(self.config, 'free'), flag_of)
        if self.changed:
            logger.warning('settings differ from those of the checkpoint, so this goes on as another '
                           'training: %s', ', '.join(self.changed))
        if self.steps_done >= self.total_steps:
            logger.warning('nothing left to train: the checkpoint holds %d steps of %d (%d epochs), trained '
                           'on %r; pass another --output_dir for another training', self.steps_done,
                           self.total_steps, self.config.epochs,
                           settings.get('data_path', self.config.data_path))
        repair_best(path, self.config.CHECKPOINT_PREFIX, checkpoint)

    def end_epoch(self, epoch: int, is_best: bool) -> None:
        """Note that an epoch is done, and log it."""
        self.state.epochs_ended = epoch + 1
        if is_best:
            self.state.best_epoch = epoch + 1
        epochs_here = epoch + 1 - self.start[0]
        remaining = (time.time() - self.began) / epochs_here * (self.config.epochs - epoch - 1)
        self.journal.after_epoch(
            epoch, self.config.epochs, (epoch + 1) * self.state.steps_per_epoch, self.state.validation or {},
            self.evaluates_after(epoch), self.trainer.optimizers[0].param_groups[-1]['weight_decay'],
            remaining)

    def save(self, epoch: int, step: int, is_best: bool = False) -> None:
        """Checkpoint at `step` of `epoch`; the first rank alone writes, in the background if it may.

        Raises:
            OSError: the checkpoint before it could not be written; older ones are intact.
            ValueError: ranks differ, or a number is nan or infinite; on every rank. Older checkpoints stay.
        """
        self.compare_weights()
        self.last_save = time.time()
        self.show_life('saving')
        steps_done = epoch * self.state.steps_per_epoch + step
        self.journal.tb.flush()
        # Where weights are sharded, the first rank gets them from all ranks.
        trainer_state = self.trainer.state_dict(steps_done / self.total_steps)

        def write() -> None:
            state = dict(epoch=epoch, iter=step, trainer=trainer_state, args=vars(self.config),
                         run=vars(self.state), classes=self.data.classes, data=self.described,
                         world_size=dist.get_world_size(), **self.made_with)
            self.checkpoints.save(state, steps_done, is_best)
        dist.from_master(write)
        self.has_checkpoint = True
        self.show_life('saving')

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on the disk; every rank calls it.

        Raises:
            OSError: it could not be written, on every rank; older ones are intact.
        """
        dist.from_master(self.checkpoints.wait)

    def finish(self) -> None:
        """Write what a finished training leaves, and say what was left out on the way."""
        self.journal.tb.close()
        self.wait_for_checkpoint()
        if not dist.is_master():
            return
        has_trained = self.steps_done < self.total_steps
        self.trainer.finish(self.folder, self.config.model, has_trained)
        if self.config.export:
            self.export(has_trained)
        if self.state.skipped_steps:
            logger.warning('%d of %d steps were not finite and left out (see not_finite.jsonl)',
                           self.state.skipped_steps, self.total_steps)
        if self.state.bad_images:
            logger.warning('%d images could not be read and were replaced:\n%s', len(self.state.bad_images),
                           '\n'.join(self.state.bad_images))
        self.show_life('done', is_due=True)
        logger.info('done, checkpoints are in %s', self.folder)

    def export(self, has_trained: bool) -> None:
        """Write the weights that sampling uses as a folder for `pipeline.load`; the first rank calls it.

        Args:
            has_trained: whether this start has moved the weights; else only a missing folder is written.
        """
        folder = self.folder / 'model'
        if (folder / 'config.json').exists() and not has_trained:
            return
        training = training_of(dict(epoch=self.config.epochs, iter=0, args=vars(self.config),
                                    **self.made_with))
        about = dict(weights='ema' if self.trainer.ema else 'raw', training=training)
        with self.trainer.averaged():
            if isinstance(self.model, ARModel):
                Pipeline(self.model, classes=self.data.classes, **about).save_pretrained(folder)
            else:
                Pretrained(self.model, **about).save_pretrained(folder)
        logger.info('%s is for pipeline.load, and for the hub', folder)


def choose_seed(config: TrainConfig, saved: int | None) -> int:
    """The seed of the checkpoint, else of the config, else a fresh one, equal on all ranks.

    Raises:
        ValueError: config and checkpoint disagree.
    """
    if saved is not None and config.seed not in (None, saved):
        raise ValueError(f'the checkpoint was begun with seed {saved}, got --seed={config.seed}: '
                         f'pass --seed={saved}, or start in another output folder')
    fresh = torch.tensor([int.from_bytes(os.urandom(4), 'little')], device=dist.get_device())
    dist.broadcast(fresh, src_rank=0)
    if saved is not None:
        return saved
    if config.seed is not None:
        return config.seed
    return fresh.item()


def train_from_newest(config: TrainConfig, data: Data) -> None:
    """A training from its newest checkpoint on, and again from there after steps that were not finite.

    Where too many of them come in a row, the last good checkpoint is restored, and its training goes on
    without them, up to `--max_restores` times. Where not one step after a checkpoint is finite, it is set
    aside and the one before it is continued, once.

    Raises:
        NotFinite: there is no checkpoint to restore, or it was restored too often.
    """
    left_out: list[tuple[int, int]] = []
    has_gone_back = False
    while True:
        run = Run(config, data, left_out)
        try:
            with run.stop_request, run.history, run.checkpoints, run.watchdog:
                train(run)
            return
        except NotFinite as failure:
            goes_back = failure.at_once and not has_gone_back
            if not goes_back and (failure.at_end or not run.may_restore()):
                raise
            logger.warning('%s', failure)
            left_out = list(run.state.left_out)
            if not goes_back:
                left_out.append(run.skipped.leave_out(failure.step))
        path = run.resumed_from
        run.journal.tb.close()
        del run  # its memory, before the next one is built
        if goes_back:
            has_gone_back = True
            go_back_one_checkpoint(path, config.CHECKPOINT_PREFIX)


def describe(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Every setting under its published name, every derived value, and the number of parameters."""
    settings = {flag_of(config, name): value for name, value in vars(config).items()}
    model = build_model(config, config.num_classes or 1000, total_steps=config.epochs, steps_per_epoch=1,
                        device='meta')
    return settings | config.derived(world_size) | dict(num_parameters=count_parameters(model))


def main(config: TrainConfig | None = None) -> None:
    """Train, or print what `--dry_run` asks for; None takes the config of the command line."""
    config = config or parse_training(sys.argv[1:])
    if config.dry_run:
        world_size = int(os.environ.get('WORLD_SIZE', 1))
        if int(os.environ.get('RANK', 0)) == 0:
            config.check_batch(world_size)
            print(json.dumps(describe(config, world_size), indent=2))  # noqa: T201
        return
    refuse_restart_after_stop(Path(config.output_dir))
    dist.initialize(timeout=config.timeout)
    setup_logging(None, dist.is_master())
    config.check_batch(dist.get_world_size())
    if config.check:
        check(config, Run)
        dist.finalize()
        return
    data = build_data(config)  # nothing is written before the data are found
    with lock_folder(config.output_dir) if dist.is_master() else nullcontext():
        if dist.is_master():
            remove_leftovers(config.output_dir, config.CHECKPOINT_PREFIX)
        rank = dist.get_rank() if config.rank_logs else None
        setup_logging(config.output_dir, dist.is_master(), rank)
        train_from_newest(config, data)
    dist.finalize()


if __name__ == '__main__':
    with one_line_errors('train.py'):
        main(command)
