"""Public names of the models, and the table from which `train.py` and `sample.py` build any of them."""
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from models.base import ARModel, Tokenizer, Trainable, load_weights
from models.tokenizers.quantize import VectorQuantizer2
from models.tokenizers.vqvae import VQVAE
from models.var import VAR, VARHF

__all__ = ['FAMILIES', 'VAR', 'VARHF', 'VQVAE', 'ARModel', 'Family', 'Tokenizer', 'Trainable',
           'VectorQuantizer2', 'build_generator', 'build_tokenizer', 'build_vae_var', 'load_weights']

State = dict[str, torch.Tensor]


class Family(NamedTuple):
    """A model that can be trained, and the tokenizer it needs (None for a tokenizer)."""
    model: type[Trainable]
    tokenizer: type[Tokenizer] | None


FAMILIES = {
    'var': Family(VAR, VQVAE),
    'vqvae': Family(VQVAE, None),
}


def build_tokenizer(cls: type[Tokenizer], state: State, source: str, device: torch.device | str,
                    **kwargs: Any) -> Tokenizer:
    """A frozen tokenizer with the weights of `state`, whose shapes decide the architecture.

    Args:
        source: where the weights come from, for error messages.
        kwargs: what weights do not tell, such as `v_patch_nums`.
    """
    try:
        shape_kwargs = cls.kwargs_from_state_dict(state)
    except (KeyError, ValueError, IndexError):
        raise ValueError(f'{source} holds no {cls.__name__} weights: '
                         'pass the checkpoint of a tokenizer') from None
    with torch.device(device):
        tokenizer = cls(**shape_kwargs, **kwargs)
    load_weights(tokenizer, state, source)
    return tokenizer.eval().requires_grad_(False)


def build_generator(name: str, state: State, tokenizer_state: State, source: str,
                    device: torch.device | str) -> ARModel:
    """A trained generator with its tokenizer, in eval mode; the weights' shapes decide the architecture.

    Args:
        name: a key of `FAMILIES`.
        state, tokenizer_state: flat weights of both.
        source: where the weights come from, for error messages.
    Raises:
        ValueError: the weights are not of this family, or generator and tokenizer do not belong together.
    """
    cls, tokenizer_class = FAMILIES[name]
    try:
        kwargs = cls.kwargs_from_state_dict(state)
    except (KeyError, ValueError, IndexError):
        raise ValueError(f'{source} holds no {cls.__name__} weights: '
                         'pass the checkpoint of a generator') from None
    codes = {attribute: kwargs.pop(attribute) for attribute in ('vocab_size', 'channels')}
    tokenizer = build_tokenizer(tokenizer_class, tokenizer_state, f'the tokenizer of {source}', device,
                                **cls.tokenizer_kwargs(kwargs))
    for attribute, value in codes.items():
        if getattr(tokenizer, attribute) != value:
            raise ValueError(f'{source} needs a tokenizer with {attribute}={value}, '
                             f'got {getattr(tokenizer, attribute)}: pass the tokenizer it was trained with')
    with torch.device(device):
        model = cls(tokenizer, **kwargs)
    load_weights(model, state, source)
    return model.eval()


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
