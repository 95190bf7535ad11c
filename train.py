"""Train any model of this project: `torchrun --nproc_per_node=8 train.py --depth=16 --data_path=FOLDER`.

Runs without torchrun, too. To resume, run the same command again: the newest checkpoint in the output folder
continues exactly where it was saved. `--dry_run` prints every derived value and exits.
"""
import dataclasses
import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

import dist
from evaluation.training_fid import build_training_fid
from models import FAMILIES, ARModel, Tokenizer, Trainable, build_tokenizer
from models.helpers import global_rows
from trainer import StepInfo, build_trainer
from utils.arg_util import Recipe, flag_of, parse_recipe
from utils.checkpoint import (
    atomic_path,
    load_file,
    lock_folder,
    model_weights,
    newest_checkpoint,
    save_checkpoint,
    tokenizer_weights,
)
from utils.data import KeyedAugmentation, build_dataset, build_transforms, open_split
from utils.data_sampler import DistInfiniteBatchSampler, EvalDistributedSampler
from utils.hub import fetch
from utils.log import (
    MetricLogger,
    SmoothedValue,
    TensorboardLogger,
    append_json_line,
    one_line_errors,
    setup_logging,
)
from utils.lr_control import lr_wd_annealing
from utils.misc import allow_tf32, mix_seed, seed_everything
from utils.pictures import reconstruction_rows, usage_heat_map
from utils.token_cache import TokenCache, weights_digest

logger = logging.getLogger(__name__)
# may change between two starts of one training
FREE_SETTINGS = ('seed', 'output_dir', 'exp_name', 'workers', 'save_every', 'eval_every', 'vae_ckpt',
                 'log_every', 'picture_every', 'lpips_vgg', 'lpips_lin',
                 'lpips_path', 'allow_download', 'dino_path', 'init_from', 'fid_images', 'fid_ref',
                 'fid_flags', 'fid_features', 'inception_weights', 'use_checkpoint', 'batch_per_process',
                 'resume')
NOT_FINITE = ('{what} is not finite at step {step}: lower the learning rate or train with --fp16=0, '
              'and continue from the last checkpoint, if there is one')
NO_SCORE = 999.  # "best so far" before the first evaluation, as published
NUM_PICTURES = 8            # validation images drawn in TensorBoard
CALIBRATION_IMAGES = 10_000  # training images that a tokenizer is calibrated on


# ---------------------------------------------------------------------------------------------- building
def build_model(recipe: Recipe, num_classes: int, total_steps: int, steps_per_epoch: int,
                device: torch.device | str) -> Trainable:
    """The model of a recipe with its frozen tokenizer, freshly initialised or from `--init_from`.

    Args:
        device: 'meta' builds without memory, for counting; the tokenizer's file is then not needed.
    """
    model_class, tokenizer_class = FAMILIES[recipe.model]
    kwargs = recipe.model_kwargs(total_steps, steps_per_epoch)
    args = []
    if tokenizer_class is not None:
        args.append(load_tokenizer(recipe, tokenizer_class, device))
        kwargs['num_classes'] = num_classes
    on_meta, state = torch.device(device).type == 'meta', None
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
        model.warm_start(state, str(path))
    if getattr(recipe, 'train_only', '') and state is not None:
        model.freeze_codes()
    return model


def load_tokenizer(recipe: Recipe, cls: type[Tokenizer], device: torch.device | str) -> Tokenizer:
    """The frozen tokenizer of `--vae_ckpt`; on 'meta' the published sizes where the file is absent.

    Raises:
        ValueError: no such file, no tokenizer in it, or one of another stride.
    """
    if torch.device(device).type == 'meta' and not Path(recipe.vae_ckpt).is_file():
        with torch.device('meta'):
            return cls(**recipe.tokenizer_kwargs())
    if dist.is_local_master():  # one process per node downloads, the others then find the file
        fetch(recipe.vae_ckpt)
    dist.barrier()
    path = fetch(recipe.vae_ckpt)
    state, config = tokenizer_weights(load_file(path))
    tokenizer = build_tokenizer(cls, state, str(path), device, **config | recipe.tokenizer_kwargs())
    if tokenizer.stride != recipe.patch_size:
        raise ValueError(f'the tokenizer of {path} has stride {tokenizer.stride}, the recipe expects '
                         f'{recipe.patch_size}: pass --{flag_of(recipe, "patch_size")}={tokenizer.stride}')
    return tokenizer


def build_data(recipe: Recipe) -> tuple[int, Dataset, Dataset]:
    """(number of classes, training set, validation set), of images or of stored tokens in their place.

    Raises:
        ValueError: a folder is missing, or caches are of other images or of another tokenizer.
    """
    if not getattr(recipe, 'cached_path', ''):
        return build_dataset(recipe.data_path, recipe.image_size, recipe.hflip, recipe.mid_reso, recipe.crop)
    train_set = TokenCache(recipe.cached_path, recipe.hflip)
    if recipe.cached_val_path:
        val_set = TokenCache(recipe.cached_val_path, fixed=True)
    else:  # the training images need not be there
        _, val_transform = build_transforms(recipe.image_size, False, recipe.mid_reso, recipe.crop)
        val_set = open_split(recipe.data_path, 'val', val_transform)
    numbers = [str(label) for label in range(len(val_set.classes))]  # imported codes know no names
    if train_set.classes not in (list(val_set.classes), numbers):
        odd = sorted(set(train_set.classes) ^ set(val_set.classes)) or ['their order']
        raise ValueError(f'{recipe.cached_path} holds {len(train_set.classes)} classes, those of validation '
                         f'are {len(val_set.classes)} and differ in {odd[:5]}: pass caches and images of one '
                         'data set')
    logger.info('training reads the tokens in %s', recipe.cached_path)
    return len(val_set.classes), train_set, val_set


def check_caches(tokenizer: Tokenizer, image_size: int, train_set: TokenCache, val_set: Dataset) -> None:
    """See `TokenCache.check`; the tokenizer is hashed and asked once for both."""
    digest, shape = weights_digest(tokenizer.state_dict()), tokenizer.shape_of_stored(image_size)
    train_set.check(digest, image_size, 'train', shape)
    if isinstance(val_set, TokenCache):
        val_set.check(digest, image_size, 'val', shape)


def build_loaders(recipe: Recipe, train_set: Dataset, val_set: Dataset, seed: int,
                  start: tuple[int, int]) -> tuple[Iterator, DataLoader, int]:
    """(endless training batches from `start` = (epoch, step), validation loader, steps per epoch).

    A training batch holds the images of all micro-steps of one optimizer step on this rank.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    local_batch = recipe.local_batch(world_size)
    options = dict(num_workers=recipe.num_workers(world_size), pin_memory=torch.cuda.is_available())
    sampler = DistInfiniteBatchSampler(
        world_size, rank, len(train_set), local_batch * world_size * recipe.accumulate,
        same_seed_for_all_ranks=recipe.same_seed_for_all_ranks, fill_last=True, start_ep=start[0],
        start_it=start[1], by_batch=True, with_epoch=True)
    train_loader = DataLoader(KeyedAugmentation(train_set, seed), batch_sampler=sampler, **options)
    val_loader = DataLoader(val_set, batch_size=round(1.5 * local_batch), sampler=EvalDistributedSampler(
        val_set, world_size, rank), **options)
    return iter(train_loader), val_loader, len(sampler)


# ---------------------------------------------------------------------------------------------- training
@dataclass
class RunState:
    """What a checkpoint keeps under `run`: where the run stands beside weights and optimizer."""
    seed: int
    steps_per_epoch: int
    best: float = NO_SCORE                 # lowest validation score so far
    validation: dict | None = None         # metrics of the last evaluation


class Run:
    """One training, from its recipe to its last checkpoint."""

    def __init__(self, recipe: Recipe):
        world_size = dist.get_world_size()
        recipe.check_batch(world_size)
        self.device, self.folder = dist.get_device(), Path(recipe.output_dir)

        # 1. the checkpoint to continue, and the seed of everything random
        path, checkpoint = newest_checkpoint(self.folder, f'{recipe.CHECKPOINT_PREFIX}*.pth')
        self.start = checkpoint.get('epoch', 0), checkpoint.get('iter', 0)
        seed = choose_seed(recipe, checkpoint.get('run', {}).get('seed'))
        torch.backends.cudnn.deterministic = recipe.seed is not None
        allow_tf32(recipe.tf32)
        seed_everything(mix_seed(seed))

        # 2. data
        num_classes, train_set, val_set = build_data(recipe)
        if recipe.num_classes not in (0, num_classes):
            raise ValueError(f'--num_classes={recipe.num_classes}, but {recipe.data_path} holds '
                             f'{num_classes} classes: correct one of them')
        self.classes, self.train_set, self.val_set = list(train_set.classes), train_set, val_set
        self.batches, self.val_loader, steps_per_epoch = build_loaders(recipe, train_set, val_set, seed,
                                                                       self.start)
        self.state = RunState(seed, steps_per_epoch)
        if recipe.steps:
            recipe = dataclasses.replace(recipe, epochs=-(-recipe.steps // steps_per_epoch))
        self.recipe, self.peak_lr = recipe, recipe.peak_lr(world_size)
        self.lr_end = recipe.final_lr_ratio(world_size)
        self.total_steps = recipe.steps or recipe.epochs * steps_per_epoch

        # 3. model, optimizer, and what the checkpoint says of them
        self.model = build_model(recipe, num_classes, self.total_steps, steps_per_epoch, self.device)
        self.is_tokenizer = isinstance(self.model, Tokenizer)
        if isinstance(train_set, TokenCache):
            check_caches(self.model.tokenizer, recipe.image_size, train_set, val_set)
        self.trainer = build_trainer(recipe, self.model, self.total_steps)
        if path:
            self._resume(path, checkpoint)
        self.fid = None if self.is_tokenizer else build_training_fid(recipe, self.model, self.val_loader)

        # 4. logs
        tb_dir = str(self.folder / recipe.run_name(world_size)) if dist.is_master() else None
        self.tb = TensorboardLogger(tb_dir, filename_suffix=time.strftime('__%m%d_%H%M'),
                                    every=recipe.log_every)
        self.last_save = time.time()
        if recipe.tlr is not None:
            logger.warning('--tlr is ignored: the peak follows from --%s and is %g',
                           flag_of(recipe, 'base_lr'), self.peak_lr)
        logger.info('%s: %.2fM parameters, %s x %d, %d + %d images of %d classes, '
                    '%d steps per epoch, seed %d',
                    recipe.model, count_parameters(self.model) / 1e6, self.device, world_size, len(train_set),
                    len(val_set), num_classes, steps_per_epoch, seed)

    @property
    def steps_done(self) -> int:
        """Optimizer steps in the checkpoint that this run continues."""
        return self.start[0] * self.state.steps_per_epoch + self.start[1]

    def _resume(self, path: Path, checkpoint: dict[str, Any]) -> None:
        trained = checkpoint.get('args', {}).get('model', self.recipe.model)
        if trained != self.recipe.model:
            raise ValueError(f'{path} was trained with --model={trained}, got --model={self.recipe.model}: '
                             'correct it, or start in another output folder')
        self.trainer.load_state_dict(checkpoint['trainer'], str(path))
        steps_per_epoch, mid_epoch = self.state.steps_per_epoch, self.start[1] > 0
        self.state = RunState(**{**vars(self.state), **checkpoint.get('run', {})})
        if mid_epoch and self.state.steps_per_epoch != steps_per_epoch:
            raise ValueError(f'{path} stopped within an epoch of {self.state.steps_per_epoch} steps, '
                             f'this run has {steps_per_epoch}: '
                             'keep --bs and the data as they were until the epoch is complete')
        self.state.steps_per_epoch = steps_per_epoch
        logger.info('resumed from %s at epoch %d, step %d', path, *self.start)
        changed = [f'{flag_of(self.recipe, name)} {checkpoint["args"][name]} -> {value}'
                   for name, value in vars(self.recipe).items()
                   if name not in FREE_SETTINGS and checkpoint.get('args', {}).get(name, value) != value]
        if changed:
            logger.warning('settings differ from those of the checkpoint, so this is another training: %s',
                           ', '.join(changed))
        if self.steps_done >= self.total_steps:
            logger.warning('nothing left to train: the checkpoint holds %d steps of %d (%d epochs)',
                           self.steps_done, self.total_steps, self.recipe.epochs)

    def train(self) -> None:
        """All remaining epochs, a checkpoint after each; evaluation every `eval_every` and after the last."""
        recipe, epochs = self.recipe, self.recipe.epochs
        if dist.is_master() and self.start == (0, 0):
            append_json_line(self.folder / 'log.txt', dict(name=recipe.exp_name, cmd=' '.join(sys.argv[1:]),
                                                           seed=self.state.seed, args=vars(recipe)))
        begin = time.time()
        if self.start[0] > 0 and self.start[1] == 0 and self.is_due(self.start[0] - 1) and self.fid:
            self.log_distance(self.start[0] - 1)
        for epoch in range(self.start[0], epochs if self.steps_done < self.total_steps else 0):
            first_step = self.start[1] if epoch == self.start[0] else 0
            stats = self.train_epoch(epoch, first_step)
            evaluated = self.is_due(epoch)
            if evaluated:
                self.evaluate(epoch)
            else:
                self.save(*self.position_after(epoch))
            remaining = (time.time() - begin) / (epoch + 1 - self.start[0]) * (epochs - epoch - 1)
            self.log_epoch(epoch, stats, evaluated, remaining)
            if evaluated and self.fid:
                self.log_distance(epoch)
        self.tb.close()
        if self.is_tokenizer and self.steps_done < self.total_steps:
            self.export()
        logger.info('done, checkpoints are in %s', self.folder)

    def is_due(self, epoch: int) -> bool:
        """Whether an evaluation follows this epoch."""
        return (epoch + 1) % self.recipe.eval_every == 0 or epoch + 1 == self.recipe.epochs

    def position_after(self, epoch: int) -> tuple[int, int]:
        """(epoch, step) at which a run continues after `epoch`, which `--steps` may cut short."""
        steps_left = self.total_steps - epoch * self.state.steps_per_epoch
        return (epoch + 1, 0) if steps_left >= self.state.steps_per_epoch else (epoch, steps_left)

    def train_epoch(self, epoch: int, first_step: int) -> dict[str, float]:
        """Epoch averages of the logged steps."""
        recipe, steps = self.recipe, self.state.steps_per_epoch
        last_step = min(steps, self.total_steps - epoch * steps)
        meters = MetricLogger()
        meters.add_meter('tlr', SmoothedValue(window_size=1, fmt='{value:.2g}'))
        for name in (*self.model.headline, 'tnm'):
            meters.add_meter(name, SmoothedValue(window_size=1, fmt='{median:.3f} ({global_avg:.3f})'))
        clock = self.model.tokenizer.clock if isinstance(self.model, ARModel) else None
        save_steps, save_minutes = recipe.save_steps_minutes

        batches = meters.log_every(
            first_step, last_step, self.batches, num_lines=30 if steps > 8000 else 5,
            header=f'[Ep]: [{epoch:4d}/{recipe.epochs}]',
            tokenizer_seconds=clock.take if clock else lambda: 0.,
            images_per_iter=recipe.micro_batch(dist.get_world_size()) * recipe.accumulate)
        for it, (images_B3HW, label_B) in batches:
            step = epoch * steps + it
            self.tb.set_step(step)
            rates = self.set_rates(step)
            info = self.train_step(images_B3HW, label_B, step)
            meters.update(tlr=rates[1])
            if it in meters.log_iters or self.tb.due():
                self.log_step(step, info, rates, meters)
            if self.is_tokenizer and (step + 1) % recipe.picture_every == 0:
                self.log_pictures(step + 1)
            steps_due = save_steps and (step + 1) % save_steps == 0
            minutes_due = save_minutes and time.time() - self.last_save >= 60 * save_minutes
            if (steps_due or minutes_due) and it + 1 < last_step:
                self.save(epoch, it + 1)
        return {name: meter.global_avg for name, meter in meters.meters.items()}

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

    def log_step(self, step: int, info: StepInfo, rates: tuple[float, ...], meters: MetricLogger) -> None:
        """Metrics of a step into the meters and TensorBoard; every rank must call it.

        Args:
            rates: what `lr_wd_annealing` returned.
        """
        values = self.trainer.metrics(info.aux)
        if not all(map(math.isfinite, values.values())):
            raise ValueError(NOT_FINITE.format(what='the loss', step=step))
        meters.update(tnm=info.grad_norm,
                      **{name: values.get(key) for name, key in self.model.headline.items()})
        tb, clip, (min_lr, max_lr, min_wd, max_wd) = self.tb, self.recipe.clip, rates
        if step == 0:  # the starting level, visible left of the curve
            for before in (-10000, -1000):
                tb.update('AR_iter_loss', step=before, z_voc_usage=values.get('z_voc_usage'))
        if dist.is_master():
            append_json_line(self.folder / 'steps.jsonl', dict(
                step=step, lr=max_lr, wd=max_wd, grad_norm=float(info.grad_norm), **values))
        schedule = {name: values.pop(name) for name in list(values) if name.startswith('prog_')}
        tb.update('AR_iter_schedule', **schedule)
        tb.update('VAE_iter' if self.is_tokenizer else 'AR_iter_loss', **values)
        tb.update('AR_opt_lr/lr_min', sche_tlr=min_lr)
        tb.update('AR_opt_lr/lr_max', sche_tlr=max_lr)
        tb.update('AR_opt_wd/wd_max', sche_twd=max_wd)
        tb.update('AR_opt_wd/wd_min', sche_twd=min_wd)
        tb.update('AR_opt_grad/fp16', scale_log2=info.scale_log2)
        tb.update('AR_opt_grad/grad', grad_norm=info.grad_norm, grad_clip=clip if clip > 0 else None)

    def evaluate(self, epoch: int) -> None:
        """Validate, and keep the checkpoint as last and, if it improved, as best."""
        begin = time.time()
        if self.is_tokenizer and self.model.needs_calibration and not self.recipe.train_only:
            with self.trainer.averaged():
                self.model.calibrate(self.calibration_images())
        seed_everything(mix_seed(self.state.seed, 0, dist.get_rank()))  # the same noise at every evaluation
        self.state.validation = values = self.trainer.eval_epoch(self.val_loader)
        is_best = values[self.model.selection] < self.state.best
        self.state.best = min(self.state.best, values[self.model.selection])
        self.save(*self.position_after(epoch), is_best)
        if self.is_tokenizer:
            self.log_pictures(min((epoch + 1) * self.state.steps_per_epoch, self.total_steps))
        logger.info(' [*] [ep%d]  (val %d)  %s  best %s: %.4f  Val cost: %.1fs', epoch, values['count'],
                    '  '.join(f'{name}: {values[key]:.4f}' for name, key in self.model.headline.items()
                              if key in values), self.model.selection, self.state.best, time.time() - begin)

    def log_distance(self, epoch: int) -> None:
        """Distance of samples after an evaluated epoch: a line of its own in log.txt, a point in TensorBoard.

        Comes after the checkpoint, since it takes a while; a run that was killed meanwhile draws it first.
        """
        name, ep, path = self.fid.name, f'{epoch + 1}/{self.recipe.epochs}', self.folder / 'log.txt'
        lines = map(json.loads, path.read_text().splitlines()) if dist.is_master() else ()
        if dist.allgather_object(any(name in line and line['ep'] == ep for line in lines))[0]:
            return
        begin = time.time()
        with self.trainer.averaged():
            distance = self.fid(self.model, self.trainer.optimizer.amp_ctx)
        logger.info(' [*] [ep%d]  %s: %.4f  cost: %.1fs', epoch, name, distance, time.time() - begin)
        if dist.is_master():
            self.tb.update('AR_ep_loss', step=epoch + 1, **{name: distance})
            append_json_line(path, {'it': (epoch + 1) * self.state.steps_per_epoch, 'ep': ep, name: distance})

    def calibration_images(self) -> Iterator[torch.Tensor]:
        """This rank's share of up to `CALIBRATION_IMAGES` training images, the same at every call."""
        count = min(len(self.train_set), CALIBRATION_IMAGES)
        chosen = [(0, i * len(self.train_set) // count) for i in range(count)]
        subset = Subset(KeyedAugmentation(self.train_set, self.state.seed), chosen)
        sampler = EvalDistributedSampler(subset, dist.get_world_size(), dist.get_rank())
        for images_B3HW, _ in DataLoader(subset, self.val_loader.batch_size, sampler=sampler,
                                         num_workers=self.val_loader.num_workers):
            yield images_B3HW.to(self.device)

    @torch.no_grad()
    def log_pictures(self, step: int) -> None:
        """Reconstructions of fixed validation images, scale by scale, and the use of the codes."""
        if not dist.is_master():
            return
        count = min(NUM_PICTURES, len(self.val_set))
        images = torch.stack([self.val_set[i * len(self.val_set) // count][0] for i in range(count)])
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

    def export(self) -> None:
        """The final weights as a released file, for generators and for the published code."""
        if dist.is_master():
            with self.trainer.averaged(), atomic_path(self.folder / 'vae-export.pth') as temporary:
                content = self.model.exported(self.model.state_dict())
                if 'config' in content:
                    content['args'] = dict(model=self.recipe.model)
                torch.save(content, temporary)

    def save(self, epoch: int, step: int, is_best: bool = False) -> None:
        """Checkpoint at `step` of `epoch`; the master alone writes.

        Raises:
            ValueError: a weight is nan or infinite, on every rank; the checkpoints before stay.
        """
        steps = epoch * self.state.steps_per_epoch + step
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise ValueError(NOT_FINITE.format(what='a weight', step=steps))
        self.last_save = time.time()
        if dist.is_master():
            progress = steps / self.total_steps
            save_checkpoint(dict(epoch=epoch, iter=step, trainer=self.trainer.state_dict(progress),
                                 args=vars(self.recipe), run=vars(self.state), classes=self.classes),
                            self.folder, self.recipe.CHECKPOINT_PREFIX, is_best)

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
    with lock_folder(recipe.output_dir) if dist.is_master() else nullcontext():
        setup_logging(recipe.output_dir, dist.is_master())
        Run(recipe).train()
    dist.finalize()


if __name__ == '__main__':
    with one_line_errors('train.py'):
        main()
