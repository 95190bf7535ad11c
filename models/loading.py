"""Weights of a file into a model: what they reveal of it, and errors that say what does not fit."""
from typing import Any

import torch
from torch import nn


def read_kwargs(cls: type[nn.Module], state: dict[str, torch.Tensor], source: str) -> dict[str, Any]:
    """`cls.kwargs_from_state_dict(state)`.

    Raises:
        ValueError: the weights are of another model.
    """
    try:
        return cls.kwargs_from_state_dict(state)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f'{source} holds no {cls.__name__} weights ({error!r} while reading its keys): '
                         'pass a checkpoint of that model') from None


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Strict load whose error says in one line which constructor argument differs.

    Raises:
        ValueError: the weights belong to another architecture or are incomplete.
    """
    # Shapes are compared by what they mean, which says more than a list of tensors that do not fit.
    theirs = read_kwargs(type(model), state, source)
    ours = model.kwargs_from_state_dict(model.state_dict())
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        listing = ', '.join(f'{name}={theirs[name]} (here {ours[name]})' for name in differing)
        raise ValueError(f'{source} is a {type(model).__name__} with {listing}: '
                         'change the flags to match it, or start in another output folder')
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f'{source} does not fit {type(model).__name__}: '
                         f'{" ".join(str(error).split())[:400]}') from None


def differing_parameters(model: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Names of the parameters that `state` holds with other values; those that it lacks do not count."""
    return [name for name, parameter in model.named_parameters()
            if name in state and not torch.equal(parameter, state[name].to(parameter))]
