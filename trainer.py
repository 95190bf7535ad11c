"""Trainers: one optimizer step, evaluation, and everything a checkpoint needs of a model.

`train.py` knows what it trains through `Trainer` alone. `GeneratorTrainer` trains any generator,
`TokenizerTrainer` any tokenizer, with a second optimizer for its discriminator; both know their model through
the methods of `models.base`.
"""
import functools
import hashlib
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist
from evaluation.pictures import reconstruction_rows, usage_heat_map
from models import (
    ARModel,
    CodeUsage,
    Reconstruction,
    Tokenizer,
    TokenizerLoss,
    Trainable,
    differing_parameters,
    load_weights,
)
from models.base import Stopwatch
from objectives.base import Objective
from objectives.likelihood import Likelihood
from utils.amp_sc import AmpOptimizer
from utils.checkpoint import save_file
from utils.ema import PowerEMA, WeightEMA
from utils.sharding import gathered, is_sharded, local, shard_state, sum_over_shards, whole_state

logger = logging.getLogger(__name__)


class StepInfo(NamedTuple):
    """Outcome of one micro-step."""
    loss: torch.Tensor              # of this rank, before division by the accumulation steps
    grad_norm: torch.Tensor | None  # before clipping; None if the optimizer did not step
    scale_log2: float | None        # log2 of the float16 loss scale
    aux: dict[str, Any]             # for `model.metrics`
    is_finite: bool                 # False where an optimizer did not move, since its gradient was not finite


class Wrapped(nn.Module):
    """What DistributedDataParallel wraps: its forward is one function of the model.

    So the model itself is never wrapped, and the keys of its weights never gain a prefix.

    Args:
        function: what gradients are exchanged of; it takes the model before all other arguments.
        heads: parts beside the model whose gradients are exchanged, too.
    """

    def __init__(self, model: Trainable, function: Callable[..., Any], heads: nn.Module | None = None):
        super().__init__()
        self.model = model
        self.function = function
        self.heads = heads

    def forward(self, *args: Any) -> Any:
        return self.function(self.model, *args)


def distributed(module: nn.Module, some_unused: bool = False) -> nn.Module:
    """`module` under DDP where there is a process group, unless its weights are sharded already.

    Args:
        some_unused: whether a step may leave parameters without a gradient.
    """
    parameter = next(module.parameters())
    if not dist.initialized() or is_sharded(parameter):
        return module
    # Buffers are equal on all ranks anyway, or differ by design (`rank_local`). Torch >= 2.14 has another
    # name for the flag that exchanges them.
    renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
    no_buffers = {'forward_sync_buffers' if renamed else 'broadcast_buffers': False}
    device = parameter.device
    device_ids = [device.index] if device.type == 'cuda' else None
    # After its first step DDP would arrange the buckets anew, in the order in which gradients came. From
    # three ranks on that order decides how sums are rounded, and a restart begins with the first order again.
    # DDP leaves the buckets alone where it looks for unused parameters. A run with a seed is repeatable.
    keeps_order = torch.backends.cudnn.deterministic and dist.get_world_size() > 2
    # Gradients live in the buckets that are exchanged, so that there is no second copy of them in memory.
    # With --ac above 1 there is: those of the first micro-steps are made anew beside the buckets.
    return DistributedDataParallel(module, device_ids=device_ids,
                                   find_unused_parameters=some_unused or keeps_order,
                                   gradient_as_bucket_view=True, **no_buffers)


def accumulating(module: nn.Module, stepping: bool) -> AbstractContextManager:
    """Inside, ranks exchange gradients on the last micro-step only.

    Sharded gradients are exchanged on each of them: no rank has the memory for all gradients at once.
    """
    if isinstance(module, DistributedDataParallel) and not stepping:
        return module.no_sync()
    return nullcontext()


class Trainer:
    """A model, what moves its weights, and what a checkpoint keeps of both; one subclass per kind of model.

    Attributes:
        ema: average of the weights, with which the model is evaluated; None evaluates the weights themselves.
        more_averages: further averages by their keys of a checkpoint; nothing here uses them.
        flops: of the products of all training steps on this rank since they were last asked for.
        waiting: time in which this rank waits for other ranks.
        step_tag, epoch_tag: published heads of the TensorBoard tags of steps and of epochs.
        weights_key, optimizer_key, ema_key: published keys of a checkpoint under `trainer`.
        has_scores_in_every_line: whether a line of log.txt names the validation scores before there are any.
    """

    step_tag: str
    epoch_tag: str
    weights_key: str
    optimizer_key: str
    ema_key: str
    has_scores_in_every_line = False

    def __init__(self, model: Trainable, optimizer: AmpOptimizer):
        self.model = model
        self.optimizer = optimizer
        self.ema: WeightEMA | None = None
        self.more_averages: dict[str, WeightEMA] = {}
        self.flops = 0
        self.waiting = Stopwatch()
        if dist.get_world_size() > 1:
            optimizer.waiting = self.waiting

    def _begin_averages(self, decays: Sequence[float], copied: Collection[str] = (), warmup: bool = True,
                        device: str | None = None) -> None:
        """Average the weights from now on: once DDP has given all ranks those of the first one.

        Args:
            decays: of all averages; the first one is used for evaluation.
            copied, warmup, device: see `WeightEMA`.
        """
        averages = [WeightEMA(self.model, decay, copied, warmup, device) for decay in decays]
        if averages:
            self.ema = averages[0]
        self.more_averages = {f'{self.ema_key}_{average.decay}': average for average in averages[1:]}

    # ------------------------------------------------------------------------------ the step
    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All that the learning rate schedule acts on, the model's own first."""
        return [self.optimizer.optimizer]

    def begin_step(self, label_B: torch.Tensor) -> None:
        """Called once before the micro-steps of an optimizer step, on every rank.

        Args:
            label_B: class ids of all images of this rank in that step.
        """

    def train_step(self, images_B3HW: torch.Tensor, label_B: torch.Tensor, progress: float,
                   stepping: bool = True) -> StepInfo:
        """Loss and gradient of one micro-batch; the optimizer moves when `stepping`.

        Args:
            images_B3HW: pixels in [-1, 1]. label_B: class ids.
            progress: share of the optimizer steps already done, in [0, 1].
        """
        raise NotImplementedError

    def _after_step(self, progress: float, is_finite: bool) -> None:
        """What follows an optimizer step; after one that is not finite everything stays as it was."""
        if not is_finite:
            self.model.forget_step()
            return
        for parameter, rows in self.model.after_step(progress).items():
            self.optimizer.forget(parameter, rows)
        if self.ema:
            self.ema.update()
        for average in self.more_averages.values():
            average.update()

    def metrics(self, aux: dict[str, Any]) -> dict[str, float]:
        """Metrics of a step, averaged over all ranks; every rank must call it."""
        raise NotImplementedError

    @property
    def headline(self) -> dict[str, str]:
        """What the progress line shows of a step: name -> key of the metrics."""
        return self.model.headline

    @property
    def legend(self) -> str:
        """What these names mean, for people who read the line."""
        return self.model.legend

    @property
    def selection(self) -> str:
        """The validation score whose lowest value marks the best checkpoint; '' where no score tells."""
        return self.model.selection

    def tokenizer_seconds(self) -> float:
        """Seconds that a frozen tokenizer took since the last call, for the progress line."""
        return 0.

    def take_flops(self) -> int:
        """FLOPs of the products of this rank's steps since the last call; 0 where nobody counts them."""
        flops = self.flops
        self.flops = 0
        return flops

    # ------------------------------------------------------------------------------ evaluation
    def eval_epoch(self, loader: Iterable) -> dict[str, float]:
        """Metrics over a validation set, averaged over the images of all ranks; `count` is their number."""
        raise NotImplementedError

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the weights that evaluation uses, and every rank has all of them."""
        with self.ema.applied() if self.ema else nullcontext(), gathered(self.model):
            yield

    def before_evaluation(self, training_images: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Calibrate on training images before a validation; each rank gets its part of them."""

    def pictures(self, images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures for TensorBoard, uint8 (3, H, W) by tag, of some validation images in [-1, 1]."""
        return {}

    def histograms(self) -> dict[str, torch.Tensor]:
        """Counts for TensorBoard by tag."""
        return {}

    def finish(self, folder: Path, name: str, has_trained: bool) -> None:
        """Write what a finished training leaves beside its checkpoints; the first rank calls it.

        Args:
            name: of the model, as `--model` takes it.
            has_trained: whether this start has moved the weights; else only what is missing is written.
        """

    # ------------------------------------------------------------------------------ state
    def state_dict(self, progress: float = 1.) -> dict[str, Any]:
        """Everything that an exact restart needs, under the published keys where there are any.

        What is sharded becomes whole on the first rank alone. Every rank calls it.

        Args:
            progress: share of the optimizer steps already done, in [0, 1].
        """
        state = dict(config=self.model.config_state(progress), training_state=self.model.training_state())
        state[self.weights_key] = whole_state(self.model.state_dict())
        state[self.optimizer_key] = whole_state(self.optimizer.state_dict())
        if self.ema:
            state[self.ema_key] = whole_state(self.ema.state_dict())
            state['ema_updates'] = self.ema.num_updates
        for key, average in self.more_averages.items():
            state[key] = whole_state(average.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any], source: str = 'the checkpoint') -> None:
        """Restore everything; the argument is left as it is.

        Raises:
            ValueError: other model, other architecture or other tokenizer, named in one line.
        """
        if self.weights_key not in state:
            raise ValueError(f'{source} holds no {type(self.model).__name__} to resume: use another output '
                             'folder')
        weights = shard_state(state[self.weights_key], self.model.state_dict())
        load_weights(self.model, weights, source)
        self.check_state(state, source)
        self.optimizer.load_state_dict(state[self.optimizer_key])
        if 'training_state' in state:  # absent in published checkpoints
            self.model.load_training_state(state['training_state'])
        if self.ema:
            self.ema.load_state_dict(state[self.ema_key], state['ema_updates'])
        for key, average in self.more_averages.items():
            average.load_state_dict(state[key], state['ema_updates'])

    def check_state(self, state: dict[str, Any], source: str) -> None:
        """Make sure that the state of a checkpoint is of this training.

        Raises:
            ValueError: it is not.
        """
        raise NotImplementedError


class GeneratorTrainer(Trainer):
    """Trains a generator, on one process, under DDP, or with weights that are sharded.

    Args:
        ema_decays: of the averaged weights, of which evaluation and sampling use the first ones.
        ema_warmup, ema_device: see `WeightEMA`.
        profile_widths: of averages by power functions, which nothing here uses.
        objective: what is minimised; None is plain likelihood.
    Attributes:
        profiles: these averages.
    """

    step_tag = 'AR_iter_loss'
    epoch_tag = 'AR_ep_loss'
    weights_key = 'var_wo_ddp'
    optimizer_key = 'var_opt'
    ema_key = 'var_ema'
    has_scores_in_every_line = True

    def __init__(self, model: ARModel, optimizer: AmpOptimizer, ema_decays: Sequence[float] = (),
                 ema_warmup: bool = True, profile_widths: Sequence[float] = (),
                 ema_device: str | None = None, objective: Objective | None = None):
        super().__init__(model, optimizer)
        self.objective = objective or Likelihood()
        self.loss_module = distributed(Wrapped(model, self.objective.loss, self.objective.heads))
        self.flops_of_image = functools.lru_cache(model.training_flops)  # by its number of tokens
        self._begin_averages(ema_decays, warmup=ema_warmup, device=ema_device)
        self.profiles = [PowerEMA(model, width, ema_device) for width in profile_widths]

    def begin_step(self, label_B: torch.Tensor) -> None:
        self.objective.begin_step(label_B)

    def train_step(self, images_B3HW: torch.Tensor, label_B: torch.Tensor, progress: float,
                   stepping: bool = True) -> StepInfo:
        self.model.train()
        # DDP averages the gradients of all ranks while the backward pass runs, on the last micro-step.
        with accumulating(self.loss_module, stepping):
            with self.optimizer.step_ctx:
                loss, aux = self.loss_module(images_B3HW, label_B, progress)
            grad_norm, scale_log2 = self.optimizer.backward_clip_step(stepping, loss)
        self.flops += len(label_B) * self.objective.flops(self.flops_of_image, aux)
        is_finite = self.optimizer.moved if stepping else True
        if stepping:
            self._after_step(progress, is_finite)
        return StepInfo(loss.detach(), grad_norm, scale_log2, aux, is_finite)

    def _after_step(self, progress: float, is_finite: bool) -> None:
        super()._after_step(progress, is_finite)
        if is_finite:
            for profile in self.profiles:
                profile.update()

    def metrics(self, aux: dict[str, Any]) -> dict[str, float]:
        return mean_over_ranks(self.objective.metrics(self.model, aux))

    @property
    def headline(self) -> dict[str, str]:
        return self.model.headline | self.objective.headline

    @property
    def legend(self) -> str:
        return '; '.join(filter(None, (self.model.legend, self.objective.legend)))

    @property
    def selection(self) -> str:
        return self.objective.selection(self.model)

    def tokenizer_seconds(self) -> float:
        return self.model.tokenizer.clock.take()

    @torch.no_grad()
    def eval_epoch(self, loader: Iterable) -> dict[str, float]:
        """As `Trainer.eval_epoch`, in the precision of the training; labels are not dropped."""
        device = next(self.model.parameters()).device
        sums: dict[str, float] = defaultdict(float)
        with self.averaged():
            self.model.eval()
            for images_B3HW, label_B in loader:
                images_B3HW = images_B3HW.to(device)
                label_B = label_B.to(device)
                with self.optimizer.amp_ctx:
                    _, aux = self.model.training_loss(images_B3HW, label_B)
                # Batches may differ in size, so that each counts by its images.
                for name, value in self.model.metrics(aux).items():
                    sums[name] += float(value) * len(label_B)
                sums['count'] += len(label_B)
            self.model.train()
        return means_over_images(sums)

    # ------------------------------------------------------------------------------ state
    def state_dict(self, progress: float = 1.) -> dict[str, Any]:
        """The frozen tokenizer, too: a checkpoint is all that sampling needs."""
        tokenizer = self.model.tokenizer
        state = super().state_dict(progress) | dict(vae_local=tokenizer.state_dict(),
                                                    vae_config=tokenizer.config_state(progress))
        if self.profiles:
            state['ema_profiles'] = {str(profile.width): whole_state(profile.averaged_weights())
                                     for profile in self.profiles}
            state['profile_updates'] = self.profiles[0].num_updates
        if self.objective.frozen:
            state['frozen'] = self.digests_of_frozen
        if self.objective.heads:
            state['heads'] = whole_state(self.objective.heads.state_dict())
        return state

    @functools.cached_property
    def digests_of_frozen(self) -> dict[str, str]:
        """A digest of the weights of every model that the objective needs and no step moves, by its name."""
        return {name: weights_checksum(model) for name, model in self.objective.frozen.items()}

    def load_state_dict(self, state: dict[str, Any], source: str = 'the checkpoint') -> None:
        super().load_state_dict(state, source)
        if self.objective.heads:
            self.objective.heads.load_state_dict(state['heads'])
        for profile in self.profiles:
            profile.load_state_dict(state['ema_profiles'][str(profile.width)], state['profile_updates'])

    def check_state(self, state: dict[str, Any], source: str) -> None:
        # The codes of a frozen tokenizer follow from its weights, and from settings that these do not tell.
        tokenizer = self.model.tokenizer
        differing = differing_parameters(tokenizer, state.get('vae_local', {}))
        config = state.get('vae_config', {})
        here = tokenizer.config_state(1.)
        settings = (*tokenizer.built_settings, *tokenizer.measured_settings)
        differing += [name for name in settings if name in config and config[name] != here.get(name)]
        if differing:
            raise ValueError(f'{source} was trained on the codes of another tokenizer ({differing[0]} '
                             'differs): pass the same --vae_ckpt, or start in another output folder')
        if self.ema and self.ema_key not in state:
            raise ValueError(f'{source} holds no averaged weights: leave out --ema, or start in another '
                             'output folder')
        missing = [key for key in self.more_averages if key not in state]
        if missing:
            raise ValueError(f'{source} holds no weights averaged with decay '
                             f'{self.more_averages[missing[0]].decay}: pass --ema as it was, or start in '
                             'another output folder')
        for name, digest in self.digests_of_frozen.items():
            saved = state.get('frozen', {}).get(name)
            if saved != digest:
                raise ValueError(f'{source} was trained against another {name} (digest {saved}, here '
                                 f'{digest}): pass the file that it was, or start in another output folder')
        missing = [profile.width for profile in self.profiles
                   if str(profile.width) not in state.get('ema_profiles', {})]
        if missing:
            raise ValueError(f'{source} holds no average of width {missing[0]}, which must begin with the '
                             'training: pass --ema_profiles as it was, or start in another output folder')


class TokenizerTrainer(Trainer):
    """Trains a tokenizer, and its discriminator once that has begun.

    Args:
        criterion: the losses, with the discriminator if there is one.
        disc_optimizer: of the discriminator.
        ema_decays: of the averaged weights, of which evaluation and generators use the first ones.
    """

    step_tag = 'VAE_iter'
    epoch_tag = 'VAE_ep'
    weights_key = 'vae_wo_ddp'
    optimizer_key = 'vae_opt'
    ema_key = 'vae_ema'

    def __init__(self, model: Tokenizer, optimizer: AmpOptimizer, criterion: TokenizerLoss,
                 disc_optimizer: AmpOptimizer | None = None, ema_decays: Sequence[float] = ()):
        super().__init__(model, optimizer)
        self.criterion = criterion
        self.disc_optimizer = disc_optimizer
        self.module = distributed(Wrapped(model, reconstruct), model.has_idle_parameters)
        self.disc_module = distributed(criterion.discriminator) if disc_optimizer else None
        self._begin_averages(ema_decays, model.not_averaged)
        if disc_optimizer:
            disc_optimizer.waiting = optimizer.waiting
        self.gan_announced = False
        # running statistics with their values before the current step
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [amp.optimizer for amp in (self.optimizer, self.disc_optimizer) if amp]

    def train_step(self, images_B3HW: torch.Tensor, label_B: torch.Tensor, progress: float,
                   stepping: bool = True) -> StepInfo:
        """As `Trainer.train_step`; labels are not used. First the tokenizer moves, then the discriminator."""
        self.model.train()
        self._remember_buffers()
        amp = self.optimizer.amp_ctx

        # The tokenizer's step, against the discriminator as the step before has left it.
        with accumulating(self.module, stepping):
            with amp:
                rec = self.module(images_B3HW, progress)
            loss, aux = self.criterion.generator(rec, progress, self.model.decoder.last_layer, amp)
            grad_norm, scale_log2 = self.optimizer.backward_clip_step(stepping, loss)
        aux |= rec.parts
        is_finite = self.optimizer.moved if stepping else True

        # Then the discriminator, once it has begun, by the same images.
        if self.criterion.is_active(progress):
            if not self.gan_announced and dist.is_master():
                logger.info('the discriminator has started: a rise of the reconstruction loss is normal now, '
                            'and it recovers')
            self.gan_announced = True
            with accumulating(self.disc_module, stepping):
                disc_loss, disc_aux = self.criterion.discriminate(rec, progress, amp, self.disc_module)
                disc_norm, _ = self.disc_optimizer.backward_clip_step(stepping, disc_loss)
            aux |= disc_aux | (dict(disc_grad_norm=disc_norm) if stepping else {})
            if stepping and not self.disc_optimizer.moved:
                is_finite = False

        # Codes move and restart; what a step that is not finite did to running statistics is taken back.
        if stepping:
            self._after_step(progress, self.optimizer.moved)
            self._restore_buffers(is_finite)
        aux['views'] = [(target, image.detach()) for target, image in rec.views[-1:]]
        return StepInfo(loss.detach(), grad_norm, scale_log2, aux, is_finite)

    def _remember_buffers(self) -> None:
        """Keep the running statistics as they are before the first micro-step of a step.

        A forward pass moves them: means of batch norms and LeCAM, counters of codes. One that is not finite
        would leave nan in them for ever.
        """
        if self._buffers is None:
            self._buffers = [(buffer, buffer.clone())
                             for module in (self.model, self.criterion) for buffer in module.buffers()]

    def _restore_buffers(self, is_finite: bool) -> None:
        """At the end of a step: take back what a step that is not finite did to the running statistics."""
        if not is_finite:
            for buffer, before in self._buffers:
                buffer.copy_(before)
        self._buffers = None

    def metrics(self, aux: dict[str, Any]) -> dict[str, float]:
        """Losses of the step averaged over all ranks, its PSNR in dB, and how the codes are used."""
        scalars = {name: value for name, value in aux.items() if name != 'views'}
        return (mean_over_ranks(scalars | dict(psnr=psnr(*aux['views'][0]).mean()))
                | self.model.code_metrics())

    @torch.no_grad()
    def eval_epoch(self, loader: Iterable) -> dict[str, float]:
        """Losses per image, PSNR and the use of the codes over a validation set, with the averaged weights.

        `rec_score`, L1 plus the perceptual loss, is what the best checkpoint is chosen by.
        """
        device = next(self.model.parameters()).device
        sums = defaultdict(float)
        usage = None
        if self.model.vocab_size:
            usage = CodeUsage(self.model.vocab_size)
        with self.averaged():
            self.model.eval()
            for images_B3HW, _ in loader:
                with self.optimizer.amp_ctx:
                    rec = self.model.reconstruct(images_B3HW.to(device))
                # The last view is the image at full size.
                target, image = rec.views[-1]
                values = self.criterion.per_image(target, image) | dict(psnr=psnr(target, image))
                for name, value_B in values.items():
                    sums[name] += value_B.double().sum().item()
                sums['latent_loss'] += rec.latent_loss.item() * len(images_B3HW)
                sums['count'] += len(images_B3HW)
                if usage:
                    usage.add(rec.codes)
            self.model.train()
        means = means_over_images(sums)
        if usage:
            usage.reduce()
            means |= usage.metrics()
        return means | dict(rec_loss=self.criterion.rec_loss(means), rec_score=means['l1'] + means['lp'])

    # ------------------------------------------------------------------------------ what it shows and leaves
    def before_evaluation(self, training_images: Callable[[], Iterable[torch.Tensor]]) -> None:
        if self.model.needs_calibration:
            with self.averaged():
                self.model.calibrate(training_images())

    @torch.no_grad()
    def pictures(self, images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reconstructions, scale by scale, and the use of the codes."""
        with self.averaged():
            self.model.eval()
            named = self.model.progressive(images_B3HW)
            self.model.train()
        rows = reconstruction_rows(images_B3HW.cpu(), {name: image.cpu() for name, image in named.items()})
        pictures = {'VAE_pictures/reconstruction': rows}
        counts = self.model.code_counts()
        if counts:
            pictures['VAE_pictures/code_usage'] = usage_heat_map(counts)
        return pictures

    def histograms(self) -> dict[str, torch.Tensor]:
        return {f'VAE_codes/hits_{name}': count_V for name, count_V in self.model.code_counts().items()}

    def finish(self, folder: Path, name: str, has_trained: bool) -> None:
        """The final weights as a released file, for generators and for the published code."""
        path = folder / 'vae-export.pth'
        if path.exists() and not has_trained:
            return
        with self.averaged():
            content = self.model.exported(self.model.state_dict())
            if 'config' in content:  # the flat published layout holds weights alone
                content['args'] = dict(model=name)
            save_file(content, path)

    # ------------------------------------------------------------------------------ state
    def state_dict(self, progress: float = 1.) -> dict[str, Any]:
        state = super().state_dict(progress) | dict(criterion=self.criterion.state_dict())
        if self.disc_optimizer:
            state['disc_opt'] = self.disc_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], source: str = 'the checkpoint') -> None:
        super().load_state_dict(state, source)
        self.criterion.load_state_dict(state['criterion'])
        if self.disc_optimizer:
            self.disc_optimizer.load_state_dict(state['disc_opt'])

    def check_state(self, state: dict[str, Any], source: str) -> None:
        theirs = state['config']
        ours = self.model.config_state(1.)
        differing = [name for name in self.model.built_settings if theirs.get(name) != ours.get(name)]
        if differing:
            listing = ', '.join(f'{name}={theirs.get(name)} (here {ours.get(name)})' for name in differing)
            raise ValueError(f'{source} was trained with {listing}: change the flags to match it, '
                             'or start in another output folder')
        # The optional parts of the training must be the same.
        own = self.state_dict()
        if own.keys() != state.keys() or own['criterion'].keys() != state['criterion'].keys():
            flags = {'--disc': 'disc_opt' in state, '--ema': self.ema_key in state,
                     '--lecam': 'lecam.m_r' in state['criterion']}
            used = [flag for flag, is_used in flags.items() if is_used]
            raise ValueError(f'{source} was trained with {", ".join(used) or "none"} of --disc, --ema and '
                             '--lecam: keep these, or start in another output folder with --init_from')


def reconstruct(model: Tokenizer, images_B3HW: torch.Tensor, progress: float) -> Reconstruction:
    """What a tokenizer makes of images, with gradients; see `Tokenizer.reconstruct`."""
    return model.reconstruct(images_B3HW, progress)


@torch.no_grad()
def weights_checksum(model: nn.Module) -> str:
    """16 hexadecimal digits that almost surely differ where a bit of a weight or buffer does.

    They are made on the device, with a single copy to the host. Of sharded weights each copy of the model is
    counted as one, so that all ranks get what is equal where these copies are.
    """
    sums = []
    sums_of_shards = []
    sharded = None
    rank_local = getattr(model, 'rank_local', frozenset())
    for name, value in model.state_dict().items():
        if name in rank_local:
            continue
        words = local(value).detach().contiguous().reshape(-1)
        if value.numel() == 0:
            continue
        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[words.element_size()]
        words = words.view(same_size)
        # the sum wraps around at 64 bits; positions count as well, so that swapped values are noticed
        positions = torch.arange(1, 1 + words.numel(), device=words.device)
        total = (words * positions).sum(dtype=torch.int64)
        if is_sharded(value):
            sharded = value
            sums_of_shards.append(total)
        else:
            sums.append(total)
    if sharded is not None:
        of_shards = torch.stack(sums_of_shards)
        sum_over_shards(of_shards, sharded)
        sums += of_shards.unbind()
    values = torch.stack(sums).tolist()
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def mean_over_ranks(local: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars averaged over all ranks, which must all call it with the same names."""
    device = dist.get_device()  # one copy to the host at the end, not one per scalar
    values = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device)
                          for value in local.values()])
    dist.allreduce(values)
    return dict(zip(local, (values / dist.get_world_size()).tolist(), strict=True))


def means_over_images(sums: dict[str, float]) -> dict[str, float]:
    """Sums over the images of each rank as means over those of all; `count` holds their number.

    Every rank must call it; one without images adds nothing.
    """
    total: dict[str, float] = defaultdict(float)
    for sums_of_rank in dist.allgather_object(dict(sums)):
        for name, value in sums_of_rank.items():
            total[name] += value
    count = total.pop('count')
    return {name: value / count for name, value in total.items()} | dict(count=count)


def psnr(target_B3HW: torch.Tensor, image_B3HW: torch.Tensor) -> torch.Tensor:
    """(B,) in dB of images in [-1, 1], the second one clamped; at most 100 dB.

    Raises:
        ValueError: the shapes differ.
    """
    if target_B3HW.shape != image_B3HW.shape:
        raise ValueError(f'expected images of equal shape, got {tuple(target_B3HW.shape)} and '
                         f'{tuple(image_B3HW.shape)}: resize or crop one of them')
    error_B = (image_B3HW.clamp(-1, 1) - target_B3HW).div(2).square().flatten(1).mean(1)
    return -10 * error_B.clamp_min(1e-10).log10()
