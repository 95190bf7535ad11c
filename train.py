"""Train any model of this project: `torchrun --nproc_per_node=8 train.py --depth=16 --data_path=FOLDER`.

Runs without torchrun, too. To resume, run the same command again: the newest checkpoint in the output folder
continues exactly where it was saved. `--dry_run` prints every derived value and exits.

Exit codes: 0 done, 1 an error that the last line names, 2 wrong flags, 75 stopped by SIGTERM, SIGUSR1 or
Ctrl-C after a checkpoint (torchrun itself then ends with 1).
"""
import dataclasses
import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

import dist
from evaluation.training_fid import build_training_fid
from models import FAMILIES, ARModel, Tokenizer, Trainable, build_tokenizer
from models.helpers import global_rows
from trainer import StepInfo, build_trainer, weights_checksum
from training.journal import epoch_of, logged_steps, rewind, set_logs_aside
from training.resume import (
    changed_settings,
    check_classes,
    check_model,
    choose_checkpoint,
    data_changes,
    position_of,
    repair_best,
    rows_by_class,
)
from utils.arg_util import Recipe, flag_of, parse_recipe
from utils.checkpoint import (
    load_file,
    lock_folder,
    model_weights,
    remove_leftovers,
    save_checkpoint,
    save_file,
    set_aside,
    tokenizer_weights,
)
from utils.data import (
    KeyedAugmentation,
    build_dataset,
    build_transforms,
    describe_data,
    name_of,
    open_split,
)
from utils.data_sampler import DistInfiniteBatchSampler, EvalDistributedSampler
from utils.hub import fetch
from utils.loading import restarting_batches, without_child_signal
from utils.log import (
    MetricLogger,
    SmoothedValue,
    TensorboardLogger,
    append_json_line,
    one_line_errors,
    read_json_lines,
    setup_logging,
)
from utils.lr_control import lr_wd_annealing
from utils.misc import allow_tf32, mix_seed, seed_everything
from utils.pictures import reconstruction_rows, usage_heat_map
from utils.provenance import git_commit, versions
from utils.stop import Stopped, StopRequest, leave_signals_to_parent
from utils.token_cache import TokenCache, weights_digest

logger = logging.getLogger(__name__)
# may change between two starts of one training
FREE_SETTINGS = ('seed', 'output_dir', 'exp_name', 'workers', 'save_every', 'eval_every', 'vae_ckpt',
                 'log_every', 'picture_every', 'lpips_vgg', 'lpips_lin',
                 'lpips_path', 'allow_download', 'dino_path', 'init_from', 'fid_images', 'fid_ref',
                 'fid_flags', 'fid_features', 'inception_weights', 'use_checkpoint', 'batch_per_process',
                 'resume', 'max_bad_images', 'max_skipped_steps')
# may differ between the nodes of one training: where things lie on each
SETTINGS_OF_A_NODE = ('output_dir', 'exp_name', 'workers', 'vae_ckpt', 'lpips_vgg', 'lpips_lin', 'lpips_path',
                      'allow_download', 'dino_path', 'init_from', 'fid_ref', 'inception_weights', 'resume',
                      'data_path', 'cached_path', 'cached_val_path')
NO_SCORE = 999.  # "best so far" before the first evaluation, as published
NUM_PICTURES = 8            # validation images drawn in TensorBoard
CALIBRATION_IMAGES = 10_000  # training images that a tokenizer is calibrated on


# ---------------------------------------------------------------------------------------------- building
def build_model(recipe: Recipe, num_classes: int, total_steps: int, steps_per_epoch: int,
                device: torch.device | str, classes: list[str] | None = None) -> Trainable:
    """The model of a recipe with its frozen tokenizer, freshly initialised or from `--init_from`.

    Args:
        device: 'meta' builds without memory, for counting; the tokenizer's file is then not needed.
        classes: names of the classes, which the rows of `--init_from` follow; None takes these as they are.
    """
    model_class, tokenizer_class = FAMILIES[recipe.model]
    kwargs = recipe.model_kwargs(total_steps, steps_per_epoch)
    args = []
    if tokenizer_class is not None:
        args.append(load_tokenizer(recipe, tokenizer_class, device))
        kwargs['num_classes'] = num_classes
    on_meta, state, checkpoint = torch.device(device).type == 'meta', None, {}
    if recipe.init_from and not on_meta:
        path = fetch(recipe.init_from)
        checkpoint = load_file(path)
        if tokenizer_class is None:
            state, config = tokenizer_weights(checkpoint)
            kwargs = config | kwargs
        else:
            state = model_weights(checkpoint)
    with torch.device(device):
        model = model_class(*args, **kwargs)
    if not on_meta:
        model.init_weights(**recipe.init_kwargs())
    if state is not None:
        theirs = checkpoint.get('classes')
        if tokenizer_class is not None and theirs and classes and list(theirs) != classes:
            key = model.class_table
            state = rows_by_class(state, key, list(theirs), classes, model.state_dict()[key], str(path))
        model.warm_start(state, str(path))
    if getattr(recipe, 'train_only', '') and state is not None:
        model.freeze_codes()
    return model


def load_tokenizer(recipe: Recipe, cls: type[Tokenizer], device: torch.device | str) -> Tokenizer:
    """The frozen tokenizer of `--vae_ckpt`; on 'meta' the published sizes where the file is absent.

    Raises:
        ValueError: no such file, no tokenizer in it, one of another stride, or not the same on all ranks.
    """
    if torch.device(device).type == 'meta' and not Path(recipe.vae_ckpt).is_file():
        with torch.device('meta'):
            return cls(**recipe.tokenizer_kwargs())

    def load(is_first: bool) -> Tokenizer:  # one process per node downloads, the others then find the file
        path = fetch(recipe.vae_ckpt)
        state, config = tokenizer_weights(load_file(path))
        return build_tokenizer(cls, state, str(path), device, **config | recipe.tokenizer_kwargs())

    if torch.device(device).type == 'meta':
        tokenizer = load(True)
    else:
        tokenizer = dist.first_of_node_first(load)
        dist.require_equal(weights_checksum(tokenizer), f'the tokenizer {recipe.vae_ckpt!r}',
                           'copy the same file to every node')
    if tokenizer.stride != recipe.patch_size:
        raise ValueError(f'the tokenizer of {recipe.vae_ckpt} has stride {tokenizer.stride}, the recipe '
                         f'expects {recipe.patch_size}: pass '
                         f'--{flag_of(recipe, "patch_size")}={tokenizer.stride}')
    return tokenizer


@dataclass
class Data:
    """The images of a training, or stored tokens in their place."""
    train: Dataset
    val: Dataset
    classes: list[str]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Number and digest of the images of both splits, as a checkpoint keeps them."""
        return dict(train=describe_data(self.train), val=describe_data(self.val))


def build_data(recipe: Recipe) -> Data:
    """Training and validation set of a recipe.

    Raises:
        ValueError: a folder is missing, or caches are of other images or of another tokenizer.
    """
    if not getattr(recipe, 'cached_path', ''):
        _, train_set, val_set = build_dataset(recipe.data_path, recipe.image_size, recipe.hflip,
                                              recipe.mid_reso, recipe.crop, exif=recipe.exif)
        return Data(train_set, val_set, list(train_set.classes))
    train_set = TokenCache(recipe.cached_path, recipe.hflip)
    if recipe.cached_val_path:
        val_set = TokenCache(recipe.cached_val_path, fixed=True)
    else:  # the training images need not be there
        _, val_transform = build_transforms(recipe.image_size, False, recipe.mid_reso, recipe.crop)
        val_set = open_split(recipe.data_path, 'val', val_transform, exif=recipe.exif)
    numbers = [str(label) for label in range(len(val_set.classes))]  # imported codes know no names
    if train_set.classes not in (list(val_set.classes), numbers):
        odd = sorted(set(train_set.classes) ^ set(val_set.classes)) or ['their order']
        raise ValueError(f'{recipe.cached_path} holds {len(train_set.classes)} classes, those of validation '
                         f'are {len(val_set.classes)} and differ in {odd[:5]}: pass caches and images of one '
                         'data set')
    logger.info('training reads the tokens in %s', recipe.cached_path)
    return Data(train_set, val_set, list(val_set.classes))


def check_caches(recipe: Recipe, tokenizer: Tokenizer, train_set: TokenCache, val_set: Dataset) -> None:
    """See `TokenCache.check`; the tokenizer is hashed and asked once for both."""
    digest = weights_digest(tokenizer.state_dict())
    shape = tokenizer.shape_of_stored(recipe.image_size)
    train_set.check(digest, recipe.image_size, 'train', shape, recipe.exif)
    if isinstance(val_set, TokenCache):
        val_set.check(digest, recipe.image_size, 'val', shape, recipe.exif)


def train_sampler(recipe: Recipe, num_images: int,
                  start: tuple[int, int] = (0, 0)) -> DistInfiniteBatchSampler:
    """Which images every rank sees at every step, from `start` = (epoch, step) on.

    A batch holds the images of all micro-steps of one optimizer step on this rank.
    """
    world_size = dist.get_world_size()
    return DistInfiniteBatchSampler(
        world_size, dist.get_rank(), num_images, recipe.micro_batch(world_size) * recipe.accumulate,
        same_seed_for_all_ranks=recipe.same_seed_for_all_ranks, fill_last=True, start_ep=start[0],
        start_it=start[1], by_batch=True, with_epoch=True)


def loader_options(recipe: Recipe) -> dict[str, Any]:
    """Arguments of every loader of a training."""
    return dict(num_workers=recipe.num_workers(dist.get_world_size()),
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=leave_signals_to_parent)


def train_batches(recipe: Recipe, train_set: Dataset, seed: int, start: tuple[int, int],
                  steps_per_epoch: int) -> Iterator:
    """Endless batches (images, labels, damage) from `start` on.

    `damage` has a string per image: empty, or why the file could not be read that the image stands in for.
    """
    keyed = KeyedAugmentation(train_set, seed, replace_damaged=True)

    def make_loader(position: tuple[int, int]) -> DataLoader:
        return DataLoader(keyed, batch_sampler=train_sampler(recipe, len(train_set), position),
                          **loader_options(recipe))

    epoch, step = start
    if step >= steps_per_epoch:  # only the end of that epoch is left to do
        start = epoch + 1, 0
    return restarting_batches(make_loader, start, steps_per_epoch)


def validation_loader(recipe: Recipe, val_set: Dataset) -> DataLoader:
    """This rank's share of the validation images."""
    world_size = dist.get_world_size()
    return DataLoader(val_set, batch_size=round(1.5 * recipe.local_batch(world_size)),
                      sampler=EvalDistributedSampler(val_set, world_size, dist.get_rank()),
                      **loader_options(recipe))


# ---------------------------------------------------------------------------------------------- training
@dataclass
class RunState:
    """What a checkpoint keeps under `run`: where the run stands beside weights and optimizer."""
    seed: int
    steps_per_epoch: int
    best: float = NO_SCORE                 # lowest validation score so far
    best_epoch: int = -1                   # epochs ended when it was reached
    validation: dict | None = None         # metrics of the last evaluation
    epochs_ended: int = 0                  # epochs whose evaluation and line in log.txt are done
    skipped_steps: int = 0                 # steps left out, because they were not finite
    bad_images: list[str] = field(default_factory=list)  # why each could not be read


class NotFinite(ValueError):
    """Too many steps in a row had a loss or gradient that is nan or infinite.

    Attributes:
        at_once: whether not one step since the start was finite: then the checkpoint itself may be at fault.
    """

    def __init__(self, message: str, at_once: bool):
        super().__init__(message)
        self.at_once = at_once


REMEDIES = {  # by the precision of the recipe
    0: 'lower the learning rate, or look at the images that not_finite.jsonl names',
    1: 'float16 overflows: train in bfloat16 (--fp16=2) or float32 (--fp16=0), or lower the learning rate',
    2: 'lower the learning rate, train in float32 (--fp16=0), or look at the images that not_finite.jsonl '
       'names',
}


class Run:
    """One training, from its recipe to its last checkpoint.

    Args:
        data: of `build_data`; None builds it here.
    """

    def __init__(self, recipe: Recipe, data: Data | None = None):
        data = build_data(recipe) if data is None else data
        world_size = dist.get_world_size()
        self.device, self.folder, self.data = dist.get_device(), Path(recipe.output_dir), data
        self.stop_request = StopRequest()

        # 1. all ranks do the same, with the same data
        shared = {flag_of(recipe, name): value for name, value in vars(recipe).items()
                  if name not in SETTINGS_OF_A_NODE}
        dist.require_equal(shared, 'the command', 'pass the same flags everywhere')
        self.described = data.describe()
        dist.require_equal((data.classes, self.described), 'the data set',
                           'every node must see the same files under --data_path')
        if recipe.num_classes not in (0, len(data.classes)):
            raise ValueError(f'--num_classes={recipe.num_classes}, but {recipe.data_path} holds '
                             f'{len(data.classes)} classes: correct one of them')
        steps_per_epoch = len(train_sampler(recipe, len(data.train)))

        # 2. the checkpoint to continue, if it is of this training
        chosen = choose_checkpoint(self.folder, f'{recipe.CHECKPOINT_PREFIX}*.pth')
        self.resumed_from, checkpoint = chosen.path, chosen.content
        self.start = position_of(checkpoint) if self.resumed_from else (0, 0)
        self.state = RunState(choose_seed(recipe, checkpoint.get('run', {}).get('seed')), steps_per_epoch)
        if self.resumed_from:
            check_model(self.resumed_from, checkpoint, recipe.model)
            check_classes(self.resumed_from, checkpoint, data.classes, recipe.data_path)
            self._continue_state(recipe, checkpoint)

        # 3. random numbers and precision
        torch.backends.cudnn.deterministic = recipe.seed is not None
        allow_tf32(recipe.tf32)
        seed_everything(mix_seed(self.state.seed))

        # 4. the length of the training, and its batches
        if recipe.steps:
            recipe = dataclasses.replace(recipe, epochs=-(-recipe.steps // steps_per_epoch))
        self.recipe, self.peak_lr = recipe, recipe.peak_lr(world_size)
        self.lr_end = recipe.final_lr_ratio(world_size)
        self.total_steps = recipe.steps or recipe.epochs * steps_per_epoch
        self.batches = train_batches(recipe, data.train, self.state.seed, self.start, steps_per_epoch)
        self.val_loader = validation_loader(recipe, data.val)

        # 5. model and optimizer, and what the checkpoint says of them
        self.model = build_model(recipe, len(data.classes), self.total_steps, steps_per_epoch, self.device,
                                 data.classes)
        self.is_tokenizer = isinstance(self.model, Tokenizer)
        if isinstance(data.train, TokenCache):
            check_caches(recipe, self.model.tokenizer, data.train, data.val)
        self.trainer = build_trainer(recipe, self.model, self.total_steps)
        if self.resumed_from:
            self._resume(checkpoint)
        self.compare_weights()
        self.fid = None
        if not self.is_tokenizer:
            self.fid = build_training_fid(recipe, self.model, self.val_loader)

        # 6. logs
        self._open_logs()
        self.last_save = time.time()
        self.skipped_in_a_row = 0
        self.steps_since_start = 0
        note = recipe.workers_note(world_size)
        if note and dist.is_master():
            logger.warning('%s', note)
        if recipe.tlr is not None:
            logger.warning('--tlr is ignored: the peak follows from --%s and is %g',
                           flag_of(recipe, 'base_lr'), self.peak_lr)
        logger.info('%s: %.2fM parameters, %s x %d, %d + %d images of %d classes, '
                    '%d steps per epoch, seed %d',
                    recipe.model, count_parameters(self.model) / 1e6, self.device, world_size,
                    len(data.train), len(data.val), len(data.classes), steps_per_epoch, self.state.seed)

    # ------------------------------------------------------------------------------ continuing
    @property
    def steps_done(self) -> int:
        """Optimizer steps in the checkpoint that this run continues."""
        return self.start[0] * self.state.steps_per_epoch + self.start[1]

    def _continue_state(self, recipe: Recipe, checkpoint: dict[str, Any]) -> None:
        """Take over the position of a checkpoint; data that changed within an epoch are named.

        Raises:
            ValueError: another batch size, within an epoch.
        """
        here = self.state.steps_per_epoch
        saved = {name: value for name, value in checkpoint.get('run', {}).items() if name in vars(self.state)}
        self.state = RunState(**{**vars(self.state), **saved})
        then = self.state.steps_per_epoch
        if 'epochs_ended' not in saved:  # a checkpoint of an earlier version, or a published one
            self.state.epochs_ended = self.start[0]
            if self.start[1] and recipe.steps and self.steps_done >= recipe.steps:
                self.state.epochs_ended += 1
        changes = data_changes(checkpoint.get('data'), self.described)
        within_an_epoch = self.start[1] > 0
        if changes:
            logger.warning('the data set is not that of the checkpoint: %s%s', '; '.join(changes),
                           '. The rest of this epoch has another order: some images come twice in it, '
                           'others not at all' if within_an_epoch else '')
        if within_an_epoch and then != here:
            if not changes:
                raise ValueError(f'{str(self.resumed_from)!r} stopped within an epoch of {then} steps, this '
                                 f'run has {here}: keep --bs and the data as they were until the epoch is '
                                 'complete, or pass another --output_dir if this is another training')
            self.start = self.start[0], min(self.start[1], here)
        self.state.steps_per_epoch = here

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        """Weights, optimizer and averages of the checkpoint; settings that differ are named."""
        path = self.resumed_from
        self.trainer.load_state_dict(checkpoint['trainer'], str(path))
        logger.info('resumed from %s at epoch %d, step %d', path, *self.start)
        changed = changed_settings(self.recipe, checkpoint.get('args') or {}, FREE_SETTINGS, flag_of)
        if changed and dist.is_master():
            logger.warning('settings differ from those of the checkpoint, so this is another training: %s',
                           ', '.join(changed))
        if self.steps_done >= self.total_steps and dist.is_master():
            trained_on = (checkpoint.get('args') or {}).get('data_path', self.recipe.data_path)
            logger.warning('nothing left to train: the checkpoint holds %d steps of %d (%d epochs), trained '
                           'on %r; pass another --output_dir for another training', self.steps_done,
                           self.total_steps, self.recipe.epochs, trained_on)
        if dist.is_master():
            repair_best(path, self.recipe.CHECKPOINT_PREFIX, checkpoint)

    def compare_weights(self) -> None:
        """Make sure that all ranks train the same model.

        Raises:
            ValueError: they do not, on every rank.
        """
        if dist.get_world_size() > 1:
            dist.require_equal(weights_checksum(self.model), 'a checksum of the weights',
                               'a GPU or a network card may be faulty; run the same command again to go on '
                               'from the last checkpoint')

    def _open_logs(self) -> None:
        """Open the logs where the checkpoint stands: what is later in them is about to be repeated."""
        recipe, tb_dir = self.recipe, self.folder / self.recipe.run_name(dist.get_world_size())
        self.made_with: dict[str, Any] = {}
        if dist.is_master():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.made_with = dict(git_commit=git_commit(), versions=versions())
            header = dict(name=recipe.exp_name, cmd=' '.join(sys.argv[1:]), seed=self.state.seed,
                          args=vars(recipe), **self.made_with)
            if self.resumed_from:
                rewind(self.folder, tb_dir, self.steps_done, self.state.epochs_ended)
            else:
                earlier = read_json_lines(self.folder / 'log.txt')[:1]
                if earlier and earlier[0].get('args') == json.loads(json.dumps(vars(recipe))):
                    rewind(self.folder, tb_dir, steps_done=0, epochs_ended=-1)  # killed before its first save
                else:
                    set_logs_aside(self.folder, tb_dir)
                append_json_line(self.folder / 'log.txt', header)
        self.tb = TensorboardLogger(str(tb_dir) if dist.is_master() else None,
                                    filename_suffix=time.strftime('__%m%d_%H%M'), every=recipe.log_every)

    # ------------------------------------------------------------------------------ the loop
    def train(self) -> None:
        """All remaining epochs, a checkpoint after each; evaluation every `eval_every` and after the last.

        Raises:
            Stopped: a signal came; everything is saved.
            NotFinite: too many steps in a row were not finite.
        """
        epochs = self.recipe.epochs
        begin = time.time()
        with self.stop_request:
            if self.fid and self.state.epochs_ended > 0 and self.is_due(self.state.epochs_ended - 1):
                self.log_distance(self.state.epochs_ended - 1)
            for epoch in range(self.start[0], epochs):
                first_step = self.start[1] if epoch == self.start[0] else 0
                is_trained = first_step >= self.last_step(epoch)
                if is_trained and (self.state.epochs_ended > epoch or self.steps_done > self.total_steps):
                    continue
                stats = self.train_epoch(epoch, first_step)
                self.end_epoch(epoch, stats, begin)
        self.tb.close()
        if self.is_tokenizer and (self.steps_done < self.total_steps or not self.export_path.exists()):
            self.export()
        self.log_losses()
        logger.info('done, checkpoints are in %s', self.folder)

    def is_due(self, epoch: int) -> bool:
        """Whether an evaluation follows this epoch."""
        return (epoch + 1) % self.recipe.eval_every == 0 or epoch + 1 == self.recipe.epochs

    def last_step(self, epoch: int) -> int:
        """Steps of an epoch, of which `--steps` may cut the last one short."""
        steps = self.state.steps_per_epoch
        return min(steps, self.total_steps - epoch * steps)

    def position_after(self, epoch: int) -> tuple[int, int]:
        """(epoch, step) at which a run continues after `epoch`, which `--steps` may cut short."""
        steps = self.last_step(epoch)
        return (epoch + 1, 0) if steps == self.state.steps_per_epoch else (epoch, steps)

    def train_epoch(self, epoch: int, first_step: int) -> dict[str, float]:
        """Epoch averages of the logged steps.

        Raises:
            Stopped: a signal came; the step is finished and saved.
        """
        recipe, steps = self.recipe, self.state.steps_per_epoch
        last_step = self.last_step(epoch)
        meters = self.epoch_meters(epoch, first_step)
        clock = self.model.tokenizer.clock if isinstance(self.model, ARModel) else None
        save_steps, save_minutes = recipe.save_steps_minutes

        batches = meters.log_every(
            first_step, last_step, self.batches, num_lines=30 if steps > 8000 else 5,
            header=f'[Ep]: [{epoch:4d}/{recipe.epochs}]',
            tokenizer_seconds=clock.take if clock else lambda: 0.,
            images_per_iter=recipe.micro_batch(dist.get_world_size()) * recipe.accumulate)
        for it, (images_B3HW, label_B, damage_B) in batches:
            step = epoch * steps + it
            self.tb.set_step(step)
            rates = self.set_rates(step)
            info = self.train_step(images_B3HW, label_B, step)
            meters.update(tlr=rates[1])
            if it in meters.regular_iters or self.tb.due():
                self.log_step(step, info, rates, meters)
            self.count_finite(epoch, it, info, meters)
            if self.is_tokenizer and (step + 1) % recipe.picture_every == 0:
                self.log_pictures(step + 1)

            # one exchange per step tells all ranks of a signal to any of them, of images that could not be
            # read, and of the time by the clock of the first rank
            is_late = bool(save_minutes) and time.time() - self.last_save >= 60 * save_minutes
            num_stops, num_damaged, minutes_due = dist.sum_over_ranks(
                bool(self.stop_request), sum(map(bool, damage_B)), is_late and dist.is_master())
            if num_damaged:
                self.count_bad_images(damage_B)
            if num_stops:
                self.stop(epoch, it + 1)
            steps_due = save_steps and (step + 1) % save_steps == 0
            if (steps_due or minutes_due) and it + 1 < last_step:
                self.save(epoch, it + 1)
        return {name: meter.global_avg for name, meter in meters.meters.items()}

    def epoch_meters(self, epoch: int, first_step: int) -> MetricLogger:
        """Meters of an epoch, which know the steps that an earlier start has logged of it."""
        meters = MetricLogger()
        meters.add_meter('tlr', SmoothedValue(window_size=1, fmt='{value:.2g}'))
        for name in (*self.model.headline, 'tnm'):
            meters.add_meter(name, SmoothedValue(window_size=1, fmt='{median:.3f} ({global_avg:.3f})'))
        begin = epoch * self.state.steps_per_epoch
        for step in range(begin, begin + first_step):
            meters.update(tlr=self.set_rates(step)[1])
        for line in logged_steps(self.folder, begin, begin + first_step) if dist.is_master() else ():
            meters.update(tnm=line.get('grad_norm'),
                          **{name: line.get(key) for name, key in self.model.headline.items()})
        return meters

    def set_rates(self, step: int) -> tuple[float, ...]:
        """Learning rate and weight decay of every optimizer; returns those of the model's own."""
        recipe = self.recipe
        settings = [(self.peak_lr, recipe.weight_decay, recipe.final_weight_decay)]
        if self.is_tokenizer:
            decay = recipe.disc_weight_decay
            settings.append((recipe.disc_lr or self.peak_lr, decay, decay))
        step, total_steps = recipe.lr_phase(step, self.total_steps, self.state.steps_per_epoch)
        rates = [lr_wd_annealing(recipe.lr_schedule, optimizer, *values, step,
                                 recipe.warmup_epochs * self.state.steps_per_epoch, total_steps,
                                 wp0=recipe.warmup_start, wpe=self.lr_end)
                 for optimizer, values in zip(self.trainer.optimizers, settings, strict=False)]
        return rates[0]

    def train_step(self, images_B3HW: torch.Tensor, label_B: torch.Tensor, step: int) -> StepInfo:
        """One optimizer step over its micro-steps.

        Random numbers follow from (seed, step) and the position of an image in the global batch, so that they
        are the same after a restart and for any number of ranks and micro-steps.
        """
        num_micro, rank, world_size = self.recipe.accumulate, dist.get_rank(), dist.get_world_size()
        micro = len(label_B) // num_micro
        for j in range(num_micro):
            rows = slice(j * micro, (j + 1) * micro)
            seed_everything(mix_seed(self.state.seed, step))
            with global_rows(rank * len(label_B) + rows.start, world_size * len(label_B)):
                info = self.trainer.train_step(
                    images_B3HW[rows].to(self.device, non_blocking=True),
                    label_B[rows].to(self.device, non_blocking=True),
                    progress=step / self.total_steps, stepping=j + 1 == num_micro)
        return info

    # ------------------------------------------------------------------------------ what goes wrong
    def count_finite(self, epoch: int, it: int, info: StepInfo, meters: MetricLogger) -> None:
        """Count steps that were left out, name their images, and end the run where they do not stop.

        Raises:
            NotFinite: `--max_skipped_steps` steps in a row.
        """
        self.steps_since_start += 1
        if info.is_finite:
            self.skipped_in_a_row = 0
            return
        self.state.skipped_steps += 1
        self.skipped_in_a_row += 1
        step = epoch * self.state.steps_per_epoch + it
        if 'skipped' not in meters.meters:
            meters.add_meter('skipped', SmoothedValue(window_size=1, fmt='{value:.0f}'))
        meters.update(skipped=self.state.skipped_steps)
        # a loss that is finite on this rank clears its images, unless no loss tells
        names = [name_of(self.data.train, index) for index in self.images_of(epoch, it)]
        parts = dist.allgather_object((bool(info.loss.isfinite()), names))
        suspects = [name for is_finite, part in parts if not is_finite for name in part]
        suspects = suspects or [name for _, part in parts for name in part]
        if dist.is_master():
            append_json_line(self.folder / 'not_finite.jsonl', dict(step=step, epoch=epoch, images=suspects))
            logger.warning('step %d is left out, its loss or gradient is not finite (%d so far); %d images, '
                           'first %s; all are in '
                           'not_finite.jsonl', step, self.state.skipped_steps, len(suspects),
                           suspects[0])
        limit = self.recipe.max_skipped_steps
        if limit and self.skipped_in_a_row >= limit:
            self.give_up(step)

    def give_up(self, step: int) -> None:
        """End the run because of steps that were not finite, of which `step` is the last.

        Raises:
            NotFinite: always.
        """
        at_once = self.steps_since_start == self.skipped_in_a_row and self.resumed_from is not None
        raise NotFinite(f'the last {self.skipped_in_a_row} steps up to step {step} were not finite: '
                        f'{REMEDIES[self.recipe.precision]}, and run again from the last checkpoint, if '
                        'there is one (--max_skipped_steps is the limit)', at_once)

    def images_of(self, epoch: int, it: int) -> list[int]:
        """Indices of the images that this rank has seen at a step."""
        return train_sampler(self.recipe, len(self.data.train)).epoch_batches(epoch)[it]

    def count_bad_images(self, damage_B: list[str]) -> None:
        """Note images that could not be read; every rank calls it, and all know the same afterwards.

        Raises:
            ValueError: there are more than `--max_bad_images`.
        """
        known = set(self.state.bad_images)
        parts = dist.allgather_object([line for line in damage_B if line])
        new = [line for line in dict.fromkeys(line for part in parts for line in part) if line not in known]
        self.state.bad_images += new
        if dist.is_master():
            for line in new:
                logger.warning('an image is replaced by another one: %s', line)
        limit = self.recipe.max_bad_images
        if len(self.state.bad_images) > limit:
            raise ValueError(f'{len(self.state.bad_images)} training images cannot be read, '
                             f'--max_bad_images={limit} allows fewer; the last one: '
                             f'{self.state.bad_images[-1]}')

    def log_losses(self) -> None:
        """At the end: what was left out on the way."""
        if not dist.is_master():
            return
        if self.state.skipped_steps:
            logger.warning('%d of %d steps were not finite and left out (see not_finite.jsonl)',
                           self.state.skipped_steps, self.total_steps)
        if self.state.bad_images:
            logger.warning('%d images could not be read and were replaced:\n%s', len(self.state.bad_images),
                           '\n'.join(self.state.bad_images))

    def stop(self, epoch: int, step: int | None) -> None:
        """End the run because of a signal; every rank calls it.

        Args:
            step: within the epoch, where a checkpoint is saved; None where the last one holds everything.
        Raises:
            Stopped: always.
        """
        name = self.stop_request.signal_name or 'a signal to another process'
        if step is not None:
            self.save(epoch, step)
        self.tb.close()
        raise Stopped(f'stopped by {name}; everything is saved in {self.folder}, run the same command again '
                      'to go on')

    def is_stopping(self) -> bool:
        """Whether a signal came to any rank; every rank calls it."""
        return any(dist.sum_over_ranks(bool(self.stop_request)))

    # ------------------------------------------------------------------------------ logs, checkpoints
    def log_step(self, step: int, info: StepInfo, rates: tuple[float, ...], meters: MetricLogger) -> None:
        """Metrics of a step into the meters and TensorBoard; every rank must call it.

        Args:
            rates: what `lr_wd_annealing` returned.
        """
        values = self.trainer.metrics(info.aux)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if info.is_finite:
            meters.update(tnm=info.grad_norm,
                          **{name: finite.get(key) for name, key in self.model.headline.items()})
        tb, clip, (min_lr, max_lr, min_wd, max_wd) = self.tb, self.recipe.clip, rates
        if step == 0:  # the starting level, visible left of the curve
            for before in (-10000, -1000):
                tb.update('AR_iter_loss', step=before, z_voc_usage=finite.get('z_voc_usage'))
        if dist.is_master():
            skipped = {} if info.is_finite else dict(skipped=True)
            append_json_line(self.folder / 'steps.jsonl', dict(
                step=step, lr=max_lr, wd=max_wd, grad_norm=float(info.grad_norm), **values, **skipped))
        schedule = {name: finite.pop(name) for name in list(finite) if name.startswith('prog_')}
        tb.update('AR_iter_schedule', **schedule)
        tb.update('VAE_iter' if self.is_tokenizer else 'AR_iter_loss', **finite)
        tb.update('AR_opt_lr/lr_min', sche_tlr=min_lr)
        tb.update('AR_opt_lr/lr_max', sche_tlr=max_lr)
        tb.update('AR_opt_wd/wd_max', sche_twd=max_wd)
        tb.update('AR_opt_wd/wd_min', sche_twd=min_wd)
        tb.update('AR_opt_grad/fp16', scale_log2=info.scale_log2)
        tb.update('AR_opt_grad/grad', grad_norm=info.grad_norm if info.is_finite else None,
                  grad_clip=clip if clip > 0 else None)

    def end_epoch(self, epoch: int, stats: dict[str, float], begin: float) -> None:
        """Evaluate where it is due, then write the logs, then the checkpoint that covers them.

        Args:
            stats: what `train_epoch` returned.
            begin: `time.time()` when the training started.
        """
        if epoch + 1 == self.recipe.epochs and self.skipped_in_a_row > 1:
            # the training would end as if all were well, with the weights that made these steps overflow
            self.give_up(self.total_steps - 1)
        is_due, is_best = self.is_due(epoch), False
        if is_due:
            is_best = self.evaluate(epoch)
        self.state.epochs_ended = epoch + 1
        if is_best:
            self.state.best_epoch = epoch + 1
        epochs_here = epoch + 1 - self.start[0]
        remaining = (time.time() - begin) / epochs_here * (self.recipe.epochs - epoch - 1)
        self.log_epoch(epoch, stats, is_due, remaining)
        self.save(*self.position_after(epoch), is_best)
        if is_due and self.fid:
            self.log_distance(epoch)

    def evaluate(self, epoch: int) -> bool:
        """Validate; whether it is the best score so far.

        Raises:
            Stopped: a signal came. The epoch is saved as trained, and the next start validates it.
        """
        begin = time.time()
        if self.is_tokenizer and self.model.needs_calibration and not self.recipe.train_only:
            with self.trainer.averaged():
                self.model.calibrate(self.calibration_images())
        seed_everything(mix_seed(self.state.seed, 0, dist.get_rank()))  # the same noise at every evaluation
        values = self.trainer.eval_epoch(self.until_stopped(without_child_signal(self.val_loader)))
        if self.is_stopping():
            self.stop(epoch, self.last_step(epoch))
        self.state.validation = values
        is_best = values[self.model.selection] < self.state.best
        self.state.best = min(self.state.best, values[self.model.selection])
        if self.is_tokenizer:
            self.log_pictures(min((epoch + 1) * self.state.steps_per_epoch, self.total_steps))
        logger.info(' [*] [ep%d]  (val %d)  %s  best %s: %.4f  Val cost: %.1fs', epoch, values['count'],
                    '  '.join(f'{name}: {values[key]:.4f}' for name, key in self.model.headline.items()
                              if key in values), self.model.selection, self.state.best, time.time() - begin)
        return is_best

    def until_stopped(self, batches: Iterable) -> Iterator:
        """The same batches, as long as no signal has come to this rank; the first one in any case."""
        for batch in batches:
            yield batch
            if self.stop_request:
                return

    def log_distance(self, epoch: int) -> None:
        """Distance of samples after an evaluated epoch: a line of its own in log.txt, a point in TensorBoard.

        Comes after the checkpoint, since it takes a while; a run that was killed meanwhile draws it first.

        Raises:
            Stopped: a signal came; the next start draws it.
        """
        name, ep, path = self.fid.name, f'{epoch + 1}/{self.recipe.epochs}', self.folder / 'log.txt'
        lines = read_json_lines(path) if dist.is_master() else ()
        if dist.allgather_object(any(name in line and epoch_of(line) == epoch + 1 for line in lines))[0]:
            return
        begin = time.time()
        with self.trainer.averaged():
            distance = self.fid(self.model, self.trainer.optimizer.amp_ctx, self.stop_request)
        if self.is_stopping():
            self.stop(epoch, None)
        logger.info(' [*] [ep%d]  %s: %.4f  cost: %.1fs', epoch, name, distance, time.time() - begin)
        if dist.is_master():
            self.tb.update('AR_ep_loss', step=epoch + 1, **{name: distance})
            self.tb.flush()
            append_json_line(path, {'it': (epoch + 1) * self.state.steps_per_epoch, 'ep': ep, name: distance})

    def calibration_images(self) -> Iterator[torch.Tensor]:
        """This rank's share of up to `CALIBRATION_IMAGES` training images, the same at every call."""
        train_set = self.data.train
        count = min(len(train_set), CALIBRATION_IMAGES)
        chosen = [(0, i * len(train_set) // count) for i in range(count)]
        subset = Subset(KeyedAugmentation(train_set, self.state.seed, replace_damaged=True), chosen)
        sampler = EvalDistributedSampler(subset, dist.get_world_size(), dist.get_rank())
        loader = DataLoader(subset, self.val_loader.batch_size, sampler=sampler,
                            num_workers=self.val_loader.num_workers, worker_init_fn=leave_signals_to_parent)
        for images_B3HW, _, _ in without_child_signal(loader):
            yield images_B3HW.to(self.device)

    @torch.no_grad()
    def log_pictures(self, step: int) -> None:
        """Reconstructions of fixed validation images, scale by scale, and the use of the codes."""
        if not dist.is_master():
            return
        val_set = self.data.val
        count = min(NUM_PICTURES, len(val_set))
        images = torch.stack([val_set[i * len(val_set) // count][0] for i in range(count)])
        with self.trainer.averaged():
            self.model.eval()
            named = self.model.progressive(images.to(self.device))
            self.model.train()
        self.tb.log_image('VAE_pictures/reconstruction',
                          reconstruction_rows(images, {name: t.cpu() for name, t in named.items()}), step)
        counts = self.model.code_counts()
        if counts:
            self.tb.log_image('VAE_pictures/code_usage', usage_heat_map(counts), step)
            for name, count_V in counts.items():
                self.tb.log_tensor_as_distri(f'VAE_codes/hits_{name}', count_V, step)

    @property
    def export_path(self) -> Path:
        """The released file of a tokenizer."""
        return self.folder / 'vae-export.pth'

    def export(self) -> None:
        """The final weights as a released file, for generators and for the published code."""
        if dist.is_master():
            with self.trainer.averaged():
                content = self.model.exported(self.model.state_dict())
                if 'config' in content:
                    content['args'] = dict(model=self.recipe.model)
                save_file(content, self.export_path)

    def save(self, epoch: int, step: int, is_best: bool = False) -> None:
        """Checkpoint at `step` of `epoch`; the master alone writes, the others wait.

        Raises:
            ValueError: ranks differ, or a number is nan or infinite; on every rank. Older checkpoints stay.
        """
        self.compare_weights()
        self.last_save = time.time()
        progress = (epoch * self.state.steps_per_epoch + step) / self.total_steps
        self.tb.flush()

        def write() -> None:
            save_checkpoint(dict(epoch=epoch, iter=step, trainer=self.trainer.state_dict(progress),
                                 args=vars(self.recipe), run=vars(self.state), classes=self.data.classes,
                                 data=self.described, **self.made_with),
                            self.folder, self.recipe.CHECKPOINT_PREFIX, is_best)
        dist.from_master(write)

    def log_epoch(self, epoch: int, stats: dict[str, float], evaluated: bool, remaining: float) -> None:
        """One line of JSON in log.txt and one point per TensorBoard curve."""
        headline = self.model.headline.items()
        train = {key: stats[name] for name, key in headline}
        val = {f'v{key}': (self.state.validation or {}).get(key) for _, key in headline}
        val = {name: value for name, value in val.items() if value is not None or not self.is_tokenizer}
        finish = time.strftime('%m-%d %H:%M', time.localtime(time.time() + remaining))
        remain = str(datetime.timedelta(seconds=round(remaining)))
        logger.info('     [ep%d]  (training)  %s  Remain: %s, Finish: %s', epoch,
                    '  '.join(f'{name}: {stats[name]:.4f}' for name, _ in headline), remain, finish)
        if not dist.is_master():
            return
        self.tb.update('VAE_ep' if self.is_tokenizer else 'AR_ep_loss', step=epoch + 1,
                       **train, **(val if evaluated else {}))
        self.tb.update('AR_z_burnout', step=epoch + 1, rest_hours=remaining / 3600)
        self.tb.flush()
        append_json_line(self.folder / 'log.txt', dict(
            it=(epoch + 1) * self.state.steps_per_epoch, ep=f'{epoch + 1}/{self.recipe.epochs}',
            lr=stats['tlr'], wd=self.trainer.optimizer.optimizer.param_groups[-1]['weight_decay'],
            grad_norm=stats['tnm'], **train, **val, remain_time=remain, finish_time=finish))


def train(recipe: Recipe, data: Data) -> None:
    """A whole training; one that fails right after a restart goes back one checkpoint by itself, once.

    Raises:
        NotFinite: it fails again, or later.
    """
    run = Run(recipe, data)
    try:
        run.train()
        return
    except NotFinite as failure:
        if not failure.at_once:
            raise
        logger.warning('%s', failure)
    path, prefix = run.resumed_from, recipe.CHECKPOINT_PREFIX
    run.tb.close()
    del run
    dist.barrier()
    if dist.is_master():
        aside = set_aside(path)
        logger.warning('not one step after %r was finite: it is moved to %r, the checkpoint before it is '
                       'next, this once', str(path), aside.name)
        if not list(Path(recipe.output_dir).glob(f'{prefix}*.pth')):
            aside.rename(path)  # there is no other one to go back to
    dist.barrier()
    Run(recipe, data).train()


def choose_seed(recipe: Recipe, saved: int | None) -> int:
    """The seed of the checkpoint, else of the recipe, else a fresh one, equal on all ranks.

    Raises:
        ValueError: recipe and checkpoint disagree.
    """
    if saved is not None and recipe.seed not in (None, saved):
        raise ValueError(f'the checkpoint was begun with seed {saved}, got --seed={recipe.seed}: '
                         f'pass --seed={saved}, or start in another output folder')
    fresh = torch.tensor([int.from_bytes(os.urandom(4), 'little')], device=dist.get_device())
    dist.broadcast(fresh, src_rank=0)
    return saved if saved is not None else recipe.seed if recipe.seed is not None else fresh.item()


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def describe(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Every setting under its published name, every derived value, and the number of parameters."""
    settings = {flag_of(recipe, name): value for name, value in vars(recipe).items()}
    model = build_model(recipe, recipe.num_classes or 1000, total_steps=recipe.epochs, steps_per_epoch=1,
                        device='meta')
    return settings | recipe.derived(world_size) | dict(num_parameters=count_parameters(model))


def main() -> None:
    recipe = parse_recipe(sys.argv[1:])
    if recipe.dry_run:
        world_size = int(os.environ.get('WORLD_SIZE', 1))
        if int(os.environ.get('RANK', 0)) == 0:
            recipe.check_batch(world_size)
            print(json.dumps(describe(recipe, world_size), indent=2))  # noqa: T201
        return
    dist.initialize()
    setup_logging(None, dist.is_master())
    recipe.check_batch(dist.get_world_size())
    data = build_data(recipe)  # nothing is written before the data are found
    with lock_folder(recipe.output_dir) if dist.is_master() else nullcontext():
        if dist.is_master():
            remove_leftovers(recipe.output_dir, recipe.CHECKPOINT_PREFIX)
        setup_logging(recipe.output_dir, dist.is_master())
        train(recipe, data)
    dist.finalize()


if __name__ == '__main__':
    with one_line_errors('train.py'):
        main()
