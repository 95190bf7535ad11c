"""Builds what a config describes: a model with its tokenizer, losses, optimizers, and the trainer."""
import copy
import logging
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dist
from configs import GeneratorConfig, TokenizerConfig, TrainConfig
from configs.options import COMPILE_MODES, flag_of
from models import FAMILIES, ARModel, Tokenizer, TokenizerLoss, Trainable, build_loss, build_tokenizer
from models.recompute import set_recompute
from objectives import OBJECTIVES, Objective
from trainer import GeneratorTrainer, TokenizerTrainer, Trainer, weights_checksum
from training.finetune import check_same_classes, freeze, take_over
from utils.amp_sc import AmpOptimizer
from utils.checkpoint import load_file, tokenizer_weights
from utils.drawn_images import is_npz
from utils.hub import dino_state, fetch, lpips_state
from utils.lr_control import filter_params
from utils.sharding import shard

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------- models
def model_arguments(config: TrainConfig, total_steps: int = 1, steps_per_epoch: int = 1) -> dict[str, Any]:
    """Constructor arguments of the model, beside the number of classes and the tokenizer."""
    size = FAMILIES[config.model].model.kwargs_from_size(**config.model_size())
    return size | config.model_kwargs(total_steps, steps_per_epoch)


def build_model(config: TrainConfig, num_classes: int, total_steps: int, steps_per_epoch: int,
                device: torch.device | str, classes: list[str] | None = None) -> Trainable:
    """The model of a config with its frozen tokenizer, freshly initialised or from `--init_from`.

    Args:
        num_classes: of the data set.
        total_steps: optimizer steps of the training.
        steps_per_epoch: optimizer steps of an epoch.
        device: 'meta' builds without memory, for counting; the tokenizer's file is then not needed.
        classes: names of the classes of the data set, see `take_over`.
    Raises:
        ValueError: a file cannot be used, or does not fit the config.
    """
    model_class, tokenizer_class = FAMILIES[config.model]
    kwargs = model_arguments(config, total_steps, steps_per_epoch)
    is_generator = tokenizer_class is not None
    on_meta = torch.device(device).type == 'meta'

    # A generator is built around its frozen tokenizer.
    args = []
    if is_generator:
        args.append(load_tokenizer(config, tokenizer_class, device))
        kwargs['num_classes'] = num_classes

    # Weights to begin with; for a tokenizer also its settings, which flags may override.
    path = ''
    if config.init_from and not on_meta:
        path = str(fetch(config.init_from))
        checkpoint = load_file(path)
        if not is_generator:
            state, stored = tokenizer_weights(checkpoint)
            kwargs = stored | kwargs

    with torch.device(device):
        model = model_class(*args, **kwargs)
    if not on_meta:
        model.init_weights(**config.init_kwargs())

    if path and is_generator:
        if classes and is_npz(config.data_path):
            check_same_classes(checkpoint, path, classes)
        take_over(model, checkpoint, path, classes, config.reset)
    elif path:
        model.warm_start(state, path)
        if config.train_only:
            model.freeze_codes()
    if config.freeze:
        freeze(model, config.freeze)
    return model


def load_tokenizer(config: TrainConfig, cls: type[Tokenizer], device: torch.device | str) -> Tokenizer:
    """The frozen tokenizer of `--vae_ckpt`; on 'meta' one of the published sizes if the file is missing.

    Raises:
        ValueError: the file is missing or holds no such tokenizer, the tokenizer has another stride, or ranks
            have different files.
    """
    if torch.device(device).type == 'meta' and not Path(config.vae_ckpt).is_file():
        with torch.device('meta'):
            return cls(**config.tokenizer_kwargs())

    # One process of a node downloads, the other ones then find the file.
    def load(is_first: bool) -> Tokenizer:
        path = fetch(config.vae_ckpt)
        state, stored = tokenizer_weights(load_file(path))
        return build_tokenizer(cls, state, str(path), device, **stored | config.tokenizer_kwargs())

    if torch.device(device).type == 'meta':
        tokenizer = load(True)
    else:
        # A rank with another tokenizer would train on other codes, and nobody would see it in the loss.
        tokenizer = dist.first_of_node_first(load)
        dist.require_equal(weights_checksum(tokenizer), f'the tokenizer {config.vae_ckpt!r}',
                           'copy the same file to every node')
    if tokenizer.stride != config.stride:
        raise ValueError(f'the tokenizer of {config.vae_ckpt} has stride {tokenizer.stride}, the flags '
                         f'expect {config.stride}: pass '
                         f'--{flag_of(config, "stride")}={tokenizer.stride}')
    return tokenizer


@torch.no_grad()
def lower_tokenizer(tokenizer: Tokenizer, batches: Iterable[torch.Tensor], limit: float) -> float:
    """Let a tokenizer encode in bfloat16, if that leaves most of its codes alone.

    Args:
        batches: images (B, 3, H, W) of this rank, on which both precisions are compared.
        limit: largest share of codes that may change; of continuous ones, the largest error relative to them.
    Returns:
        That share, over the images of all ranks.
    Raises:
        ValueError: it is larger.
    """
    batches = list(batches)
    before = [tokenizer.precompute(images_B3HW) for images_B3HW in batches]
    tokenizer.encode_in_bfloat16()
    errors = total = 0.
    for codes, images_B3HW in zip(before, batches, strict=True):
        lowered = tokenizer.precompute(images_B3HW)
        if tokenizer.vocab_size is None:
            errors += (lowered - codes).square().sum().item()
            total += codes.square().sum().item()
        else:
            errors += (lowered != codes).sum().item()
            total += codes.numel()
    errors, total = dist.sum_over_ranks(errors, total)
    share = errors / total if tokenizer.vocab_size else math.sqrt(errors / total)
    what = 'of the codes' if tokenizer.vocab_size else 'of the latents\' size'
    if share > limit:
        raise ValueError(f'encoding in bfloat16 changes {share:.1%} {what}, more than --vae_bf16={limit:g}: '
                         'raise the limit, or leave out the flag and encode in float32')
    logger.info('the tokenizer encodes in bfloat16, which changes %.2f %% %s', 100 * share, what)
    return share


def count_parameters(model: nn.Module) -> int:
    """Number of all parameters of a model, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------- trainers
def build_optimizer(config: TrainConfig, model: nn.Module, no_decay: set[str]) -> AmpOptimizer:
    """AdamW with the precision, clipping and accumulation of the config.

    Args:
        no_decay: parameters whose name contains one of these strings get no weight decay.
    """
    names, params, groups = filter_params(model, no_decay)

    # Rate and decay of the groups are set before every step, so these here are never used.
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.base_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=0.,
        fused=config.fused,
    )
    return AmpOptimizer(config.precision, optimizer, names, params, config.clip, config.accumulate)


def build_criterion(config: TokenizerConfig, total_steps: int, device: torch.device) -> TokenizerLoss:
    """The losses of a tokenizer with the weights of their networks.

    Raises:
        ValueError: a file is missing, or is another file than it should be.
    """
    # One process of a node downloads, the other ones then find the files.
    files = (config.lpips_vgg, config.lpips_lin, config.lpips_path, config.allow_download)
    uses_lpips = config.lpips == 'vgg'
    if uses_lpips and config.allow_download and dist.is_local_master():
        lpips_state(*files)
    dist.barrier()
    lpips = lpips_state(*files) if uses_lpips else None
    dino = dino_state(config.dino_path) if config.disc == 'dino' else None
    gan = config.gan_kwargs(total_steps)
    if config.disc != 'none' and gan['start'] >= 1 and dist.is_master():
        logger.warning('the discriminator never starts: --disc_start=%g, and the run has %d steps',
                       config.disc_start, total_steps)
    with torch.device(device):
        return build_loss(
            l1_weight=config.l1_weight,
            l2_weight=config.l2_weight,
            perceptual=config.lpips,
            perceptual_weight=config.lpips_weight,
            perceptual_min=config.lpips_min,
            lpips_files=lpips,
            discriminator=config.disc,
            dino_files=dino,
            image_size=config.image_size,
            width=config.disc_width,
            gan=gan,
        )


def build_objective(config: GeneratorConfig, model: ARModel, classes: list[str] | None) -> Objective:
    """What a training of a generator minimises, ready for the first step.

    Args:
        model: with the weights that it begins with; neither compiled nor sharded.
        classes: see `read_reference`.
    Raises:
        ValueError: see `read_reference`.
    """
    objective = OBJECTIVES[config.objective].from_config(config)
    objective.prepare(model, partial(read_reference, config, model, classes))
    return objective


def read_reference(config: GeneratorConfig, model: ARModel, classes: list[str] | None) -> ARModel:
    """A frozen copy of a model, in eval mode and over the same tokenizer, with the weights of `--ref_from`.

    Args:
        classes: names of the classes of the data set, see `take_over`.
    Raises:
        ValueError: the file cannot be used, or ranks have different files.
    """
    if not config.init_from and dist.is_master():
        logger.warning('the model begins with random weights, not with those of the reference %r: pass '
                       '--%s=FILE, too', config.reference, flag_of(config, 'init_from'))
    path = str(fetch(config.reference))
    reference = copy.deepcopy(model, {id(model.tokenizer): model.tokenizer})
    take_over(reference, load_file(path), path, classes, reset='')
    dist.require_equal(weights_checksum(reference), f'the reference {config.reference!r}',
                       'copy the same file to every node')
    return reference.requires_grad_(False).eval()


def build_trainer(config: TrainConfig, model: Trainable, total_steps: int,
                  classes: list[str] | None = None) -> Trainer:
    """The model with its optimizer, and a tokenizer also with its losses and discriminator.

    Args:
        classes: names of the classes of the data set, see `take_over`.
    Raises:
        ValueError: see `build_criterion`, `read_reference` and `shard`.
    """
    # Before the model is compiled or sharded, since it may be copied.
    objective = build_objective(config, model, classes) if isinstance(model, ARModel) else None
    if config.recompute != 'none':
        set_recompute(model, config.recompute)
    # Before the optimizer is made, which moves the parameters as they are spread over the ranks.
    if config.shard:
        entries = 'training_loss', 'log_probabilities', 'sample'
        shard(model, model.sharded_parts(), entries, config.shard_group)
    # Compiled in place, so that the keys of weights stay as they are.
    if config.compile_model:
        for part in model.compiled_parts():
            part.compile(mode=COMPILE_MODES[config.compile_model])
    if config.compile_tokenizer and isinstance(model, ARModel):
        model.tokenizer.encoder.compile(mode=COMPILE_MODES[config.compile_tokenizer])
    trained = model
    if isinstance(model, ARModel) and objective.heads:
        trained = nn.ModuleDict(dict(model=model, heads=objective.heads))
    optimizer = build_optimizer(config, trained, model.no_weight_decay())
    if isinstance(model, ARModel):
        return GeneratorTrainer(model, optimizer, config.ema_decays, config.ema_warmup,
                                config.profile_widths, config.ema_device or None, objective)
    criterion = build_criterion(config, total_steps, next(model.parameters()).device)
    disc_optimizer = None
    if criterion.discriminator is not None:
        disc_optimizer = build_optimizer(config, criterion.discriminator, set())
    return TokenizerTrainer(model, optimizer, criterion, disc_optimizer, config.ema_decays)
