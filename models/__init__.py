"""Public names of the models, and the table from which `train.py` and `sample.py` build any of them."""
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from models.base import ARModel, Reconstruction, Tokenizer, Trainable
from models.flexvar import FlexVAR
from models.flowar import FlowAR
from models.loading import differing_parameters, load_weights, read_kwargs
from models.npp import NPP
from models.tokenizers.discriminators import DINODiscriminator, PatchGAN, StyleGAN
from models.tokenizers.flex_vae import FlexVAE
from models.tokenizers.kl_vae import AutoencoderKL
from models.tokenizers.losses import LPIPS, GANSettings, PyramidLoss, TokenizerLoss
from models.tokenizers.quantize import VectorQuantizer2
from models.tokenizers.usage import CodeUsage
from models.tokenizers.vq_model import VQ_8, VQ_16, VQ_models, VQModel
from models.tokenizers.vqvae import VQVAE
from models.var import VAR, VARHF

__all__ = ['FAMILIES', 'LPIPS', 'NPP', 'VAR', 'VARHF', 'VQVAE', 'VQ_8', 'VQ_16', 'ARModel', 'AutoencoderKL',
           'CodeUsage', 'Family', 'FlexVAE', 'FlexVAR', 'FlowAR', 'Reconstruction', 'Tokenizer',
           'TokenizerLoss', 'Trainable', 'VQModel', 'VQ_models', 'VectorQuantizer2', 'build_flexvar',
           'build_generator', 'build_loss', 'build_tokenizer', 'build_vae_var', 'differing_parameters',
           'families_of', 'load_weights', 'name_of', 'read_kwargs']

State = dict[str, torch.Tensor]


class Family(NamedTuple):
    """A model that can be trained, and the tokenizer it needs (None for a tokenizer)."""
    model: type[Trainable]
    tokenizer: type[Tokenizer] | None


FAMILIES = {
    'var': Family(VAR, VQVAE),
    'flexvar': Family(FlexVAR, FlexVAE),
    'flowar': Family(FlowAR, AutoencoderKL),
    'npp': Family(NPP, VQModel),
    'vqvae': Family(VQVAE, None),
    'vq16': Family(VQModel, None),
    'vq8': Family(VQModel, None),
    'flexvae': Family(FlexVAE, None),
    'kl16': Family(AutoencoderKL, None),
}


def families_of(state: State, among: Iterable[str] | None = None) -> list[str]:
    """The names of all families whose weights have the keys and shapes of `state`, the likeliest one first.

    Released weights of a FlexVAE have the keys of a VQ-16, so that there may be several names.

    Args:
        among: the names that come into question; None tries all, generators first.
    """
    found = []
    for name in FAMILIES if among is None else among:
        with suppress(ValueError):
            read_kwargs(FAMILIES[name].model, state, name)
            found.append(name)
    return found


def name_of(model: Trainable) -> str:
    """The name of the family of a model.

    Raises:
        ValueError: its class is of no family.
    """
    for name, family in FAMILIES.items():
        if type(model) is family.model:
            return name
    raise ValueError(f'expected a model of a family ({", ".join(FAMILIES)}), got a {type(model).__name__}')


def build_tokenizer(cls: type[Tokenizer], state: State, source: str, device: torch.device | str,
                    **kwargs: Any) -> Tokenizer:
    """A frozen tokenizer with the weights of `state`, whose shapes decide the architecture.

    Args:
        source: where the weights come from, for error messages.
        kwargs: what weights do not tell, such as `v_patch_nums`.
    """
    shape_kwargs = read_kwargs(cls, state, source)
    with torch.device(device):
        try:
            tokenizer = cls(**shape_kwargs | kwargs)
        except TypeError as error:  # files of two tokenizers may only differ in what they say beside weights
            raise ValueError(f'{source} holds no {cls.__name__} weights ({error}): '
                             'pass a checkpoint of that model') from None
    load_weights(tokenizer, state, source)
    return tokenizer.eval().requires_grad_(False)


def build_generator(name: str, state: State, tokenizer_state: State | Tokenizer, source: str,
                    device: torch.device | str, tokenizer_config: dict[str, Any] | None = None,
                    config: dict[str, Any] | None = None) -> ARModel:
    """A trained generator with its tokenizer, in eval mode; the weights' shapes decide the architecture.

    Args:
        name: a key of `FAMILIES`.
        state: flat weights of the generator.
        tokenizer_state: flat weights of the tokenizer, or the tokenizer itself.
        tokenizer_config, config: what the weights of both do not tell, see `config_state`.
        source: where the weights come from, for error messages.
    Raises:
        ValueError: there is no such family, the weights are not of it, or generator and tokenizer do not
            belong together.
    """
    generators = [family for family, (_, tokenizer_class) in FAMILIES.items() if tokenizer_class]
    if name not in generators:
        raise ValueError(f'expected a generator, one of {", ".join(generators)}, got {name!r}')
    cls, tokenizer_class = FAMILIES[name]
    kwargs = read_kwargs(cls, state, source) | cls.kwargs_from_config(config or {})
    codes = {attribute: kwargs.pop(attribute) for attribute in ('vocab_size', 'channels')
             if attribute in kwargs}
    of_tokenizer = cls.tokenizer_kwargs(kwargs)
    if isinstance(tokenizer_state, Tokenizer):
        tokenizer = tokenizer_state
        _check_tokenizer(tokenizer, tokenizer_class, of_tokenizer, source)
    else:
        tokenizer = build_tokenizer(tokenizer_class, tokenizer_state, f'the tokenizer of {source}', device,
                                    **(tokenizer_config or {}) | of_tokenizer)
    for attribute, value in codes.items():
        if getattr(tokenizer, attribute) != value:
            raise ValueError(f'{source} needs a tokenizer with {attribute}={value}, '
                             f'got {getattr(tokenizer, attribute)}: pass the tokenizer it was trained with')
    with torch.device(device):
        model = cls(tokenizer, **kwargs)
    load_weights(model, state, source)
    return model.eval()


def _check_tokenizer(tokenizer: Tokenizer, cls: type[Tokenizer], expected: dict[str, Any],
                     source: str) -> None:
    """Make sure that a tokenizer is of this class and has these settings."""
    if not isinstance(tokenizer, cls):
        raise ValueError(f'{source} needs a {cls.__name__}, got a {type(tokenizer).__name__}: '
                         'pass the tokenizer it was trained with')
    settings = tokenizer.config_state(1.)
    for name, value in expected.items():
        if settings[name] != list(value):
            raise ValueError(f'{source} needs a tokenizer with {name}={list(value)}, got {settings[name]}: '
                             'pass the tokenizer it was trained with')


def build_loss(*, perceptual: str, lpips_files: tuple[State, str] | None, discriminator: str,
               dino_files: tuple[State, str] | None, image_size: int, width: int, gan: dict[str, Any],
               **weights: float) -> TokenizerLoss:
    """The training losses of a tokenizer.

    Args:
        perceptual: 'vgg', 'pyramid' or 'none'. discriminator: 'patchgan', 'stylegan', 'dino' or 'none'.
        lpips_files, dino_files: raw weights and where they come from; needed by 'vgg' and 'dino'.
        image_size: pixels per side, which 'stylegan' is built for. width: of 'patchgan'.
        gan: fields of `GANSettings`.
        weights: of the terms, see `TokenizerLoss`.
    """
    perceptual_loss = dict(vgg=LPIPS, pyramid=PyramidLoss).get(perceptual, lambda: None)()
    if lpips_files:
        perceptual_loss.load_published(*lpips_files)
    discriminators = dict(
        patchgan=lambda: PatchGAN(width),
        stylegan=lambda: StyleGAN(image_size),
        dino=DINODiscriminator,
    )
    discriminator_net = discriminators.get(discriminator, lambda: None)()
    if dino_files:
        discriminator_net.load_trunk(*dino_files)
    gan_settings = GANSettings(**gan) if discriminator_net else None
    return TokenizerLoss(perceptual=perceptual_loss, discriminator=discriminator_net, gan=gan_settings,
                         **weights)


def build_vae_var(device: torch.device | str, patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
                  V: int = 4096, Cvae: int = 32, ch: int = 160, share_quant_resi: int = 4,
                  num_classes: int = 1000, depth: int = 16, shared_aln: bool = False,
                  attn_l2_norm: bool = True, flash_if_available: bool = True,
                  fused_if_available: bool = True, init_adaln: float = 0.5, init_adaln_gamma: float = 1e-5,
                  init_head: float = 0.02, init_std: float = -1) -> tuple[VQVAE, VAR]:
    """The published pair: a frozen VQVAE in eval mode and a freshly initialised VAR in train mode.

    Heads = depth, width = 64 * depth, drop path = 0.1 * depth / 24. Load the tokenizer's weights afterwards.
    """
    with torch.device(device):
        vae = VQVAE(vocab_size=V, z_channels=Cvae, ch=ch, share_quant_resi=share_quant_resi,
                    v_patch_nums=patch_nums, test_mode=True)
        var = VAR(vae, num_classes=num_classes, patch_nums=patch_nums, shared_aln=shared_aln,
                  attn_l2_norm=attn_l2_norm, flash_if_available=flash_if_available,
                  fused_if_available=fused_if_available, **VAR.published_sizes(depth))
    var.init_weights(init_adaln=init_adaln, init_adaln_gamma=init_adaln_gamma, init_head=init_head,
                     init_std=init_std)
    return vae, var


def build_flexvar(device: torch.device | str, patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
                  V: int = 8912, Cvae: int = 32, ch: int = 128, num_classes: int = 1000, depth: int = 16,
                  shared_aln: bool = False, attn_l2_norm: bool = True, flash_if_available: bool = True,
                  fused_if_available: bool = True, init_adaln: float = 0.5, init_adaln_gamma: float = 1e-5,
                  init_head: float = 0.02, init_std: float = -1) -> tuple[FlexVAE, FlexVAR]:
    """A frozen FlexVAE in eval mode and a freshly initialised FlexVAR in train mode; sizes as for VAR."""
    with torch.device(device):
        vae = FlexVAE(V, Cvae, ch=ch, test_mode=True)
        flexvar = FlexVAR(vae, num_classes=num_classes, patch_nums=patch_nums, shared_aln=shared_aln,
                          attn_l2_norm=attn_l2_norm, flash_if_available=flash_if_available,
                          fused_if_available=fused_if_available, **FlexVAR.published_sizes(depth))
    flexvar.init_weights(init_adaln=init_adaln, init_adaln_gamma=init_adaln_gamma, init_head=init_head,
                         init_std=init_std)
    return vae, flexvar
