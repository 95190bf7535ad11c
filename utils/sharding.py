"""Weights, gradients, moments and averages that are spread over the ranks (FSDP2, `fully_shard`).

Between steps every rank holds its shard of each parameter, a `DTensor`. In a step the weights of a block are
gathered when it is called, and again for its backward pass, whose gradients are averaged and scattered.
Everything here leaves tensors that are not sharded as they are, so that callers need not ask.
"""
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

import dist

logger = logging.getLogger(__name__)


def device_mesh(device_type: str, group_size: int) -> DeviceMesh:
    """All ranks in one dimension; or in two, copies of the model and the ranks that share one.

    Args:
        group_size: neighbouring ranks that share a copy; 0 means all ranks.
    Raises:
        ValueError: the groups do not divide the ranks.
    """
    world_size = dist.get_world_size()
    if group_size in (0, world_size):
        return init_device_mesh(device_type, (world_size,))
    if world_size % group_size:
        raise ValueError(f'--shard_group={group_size} does not divide the {world_size} ranks: pass the '
                         'number of cards of a node, or 0 for one group of all ranks')
    shape = (world_size // group_size, group_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=('copies', 'shards'))


def shard(model: nn.Module, parts: Iterable[nn.Module], methods: Iterable[str], group_size: int = 0) -> None:
    """Spread the weights of a model over the ranks, in place; nothing happens without a process group.

    Gradients are then averaged over all ranks, as DistributedDataParallel does it, and keys of weights stay
    as they are. Make the optimizer afterwards: the parameters are other ones.

    Args:
        parts: modules whose weights are gathered one after the other, each when it is called. All other
            weights of the model are gathered when one of its `methods` is called.
        methods: names of the methods by which a trainer enters the model.
        group_size: see `device_mesh`.
    Raises:
        ValueError: see `device_mesh`.
    """
    if not dist.initialized():
        return
    # All ranks begin with the weights of the first one, as under DistributedDataParallel.
    for value in model.state_dict().values():
        dist.broadcast(value, src_rank=0)

    # Weights are gathered in float32, and autocast lowers them where they are used: so the numbers are those
    # of a training that is not sharded.
    mesh = device_mesh(next(model.parameters()).device.type, group_size)
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
        part.register_forward_hook(_reshard_in_training)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for name in methods:
        register_fsdp_forward_method(model, name)
    # Views are among what a loss hands to metrics, and nobody changes them in place.
    warnings.filterwarnings('ignore', message='FSDP2-wrapped module .* returned a view tensor')
    logger.info('each of %d copies of the weights is spread over %d ranks',
                dist.get_world_size() // mesh.size(mesh.ndim - 1), mesh.size(mesh.ndim - 1))


def _reshard_in_training(part: FSDPModule, *_: Any) -> None:
    """After a forward pass: let go of the weights of other ranks, unless all of the model is `gathered`."""
    if torch.is_grad_enabled():
        part.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A context without gradients in which every rank holds all weights, and calls the model independently.

    It is for evaluation and sampling: ranks have different numbers of batches there, and need no memory for
    gradients and activations.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.reshard()


# ---------------------------------------------------------------------------------------------- tensors
def is_sharded(t: torch.Tensor) -> bool:
    """Whether this rank holds no more than a part of the tensor."""
    return isinstance(t, DTensor)


def local(t: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor; what is written there is written into the tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t: torch.Tensor) -> torch.Tensor:
    """All of a tensor; every rank calls it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def sum_over_shards(sums: torch.Tensor, t: torch.Tensor) -> None:
    """Add up, in place, what ranks computed of their shards of `t`, within each copy of the model."""
    mesh = t.device_mesh
    torch.distributed.all_reduce(sums, group=mesh.get_group(mesh.ndim - 1))


# ---------------------------------------------------------------------------------------------- states
def whole_state(tree: Any) -> Any:
    """The same nested dicts and lists, with whole tensors in the host memory of the first rank.

    Tensors are gathered one after the other, so that a card never holds two of them. Every rank calls it.

    Returns:
        `tree` itself where nothing is sharded. On other ranks than the first, None stands for every tensor
        that is.
    """
    if isinstance(tree, DTensor):
        full = tree.full_tensor()
        return full.cpu() if dist.is_master() else None
    if isinstance(tree, dict):
        values = {key: whole_state(value) for key, value in tree.items()}
        is_changed = any(values[key] is not tree[key] for key in tree)
        return values if is_changed else tree
    if isinstance(tree, list):
        values = [whole_state(value) for value in tree]
        is_changed = any(new is not old for new, old in zip(values, tree, strict=True))
        return values if is_changed else tree
    return tree


def shard_like(t: Any, pattern: torch.Tensor) -> Any:
    """A whole tensor, which every rank has, spread as `pattern` is; of another shape it stays as it is."""
    if not isinstance(pattern, DTensor) or not isinstance(t, torch.Tensor) or t.shape != pattern.shape:
        return t
    on_device = t.to(pattern.device, pattern.dtype)
    return distribute_tensor(on_device, pattern.device_mesh, pattern.placements)


def shard_state(state: dict[str, torch.Tensor], patterns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole weights, each spread as the tensor of its name among `patterns` is; every rank calls it."""
    return {name: shard_like(t, patterns[name]) if name in patterns else t for name, t in state.items()}


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A `state_dict` of an optimizer with whole moments, each spread as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    values_of = {number: {name: shard_like(value, parameters[number]) for name, value in values.items()}
                 for number, values in state['state'].items()}
    return state | dict(state=values_of)
