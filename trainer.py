"""Trainer: one optimizer step of any model, evaluation, and everything a checkpoint needs.

It knows a model through the methods of `models.base.Trainable` alone.
"""
import inspect
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist
from models import ARModel, Trainable, load_weights
from utils.amp_sc import AmpOptimizer


class StepInfo(NamedTuple):
    """Outcome of one micro-step."""
    loss: torch.Tensor              # of this rank, before division by the accumulation steps
    grad_norm: torch.Tensor | None  # before clipping; None if the optimizer did not step
    scale_log2: float | None        # log2 of the float16 loss scale
    aux: dict[str, Any]             # for `model.metrics`


class LossModule(nn.Module):
    """What DistributedDataParallel wraps: its forward is the training loss."""

    def __init__(self, model: Trainable):
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.model.training_loss(*args)


class Trainer:
    """Trains `model` with `optimizer`, on one process or under DDP."""

    def __init__(self, model: Trainable, optimizer: AmpOptimizer):
        self.model, self.optimizer = model, optimizer
        self.loss_module = LossModule(model)
        if dist.initialized():
            device = next(model.parameters()).device
            # buffers are equal anyway; torch >= 2.14 has another name for the flag that exchanges them
            renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
            no_buffers = {'forward_sync_buffers' if renamed else 'broadcast_buffers': False}
            self.loss_module = DistributedDataParallel(
                self.loss_module, device_ids=[device.index] if device.type == 'cuda' else None, **no_buffers)

    def train_step(self, images_B3HW: torch.Tensor, label_B: torch.Tensor, progress: float,
                   stepping: bool = True) -> StepInfo:
        """Loss and gradient of one micro-batch; the optimizer moves when `stepping`.

        Args:
            images_B3HW: pixels in [-1, 1]. label_B: class ids.
            progress: share of the optimizer steps already done, in [0, 1].
        """
        self.model.train()
        waits = not stepping and isinstance(self.loss_module, DistributedDataParallel)
        with self.loss_module.no_sync() if waits else nullcontext():
            with self.optimizer.amp_ctx:
                loss, aux = self.loss_module(images_B3HW, label_B, progress)
            grad_norm, scale_log2 = self.optimizer.backward_clip_step(stepping, loss)
        if stepping:
            self.model.after_step(progress)
        return StepInfo(loss.detach(), grad_norm, scale_log2, aux)

    def metrics(self, aux: dict[str, Any]) -> dict[str, float]:
        """`model.metrics` averaged over all ranks; every rank must call it."""
        local = self.model.metrics(aux)
        values = torch.stack([value.float() for value in local.values()])
        dist.allreduce(values)
        return dict(zip(local, (values / dist.get_world_size()).tolist(), strict=True))

    @torch.no_grad()
    def eval_epoch(self, loader: Iterable) -> dict[str, float]:
        """Metrics over a validation set, averaged over the images of all ranks; labels are not dropped.

        Same precision as in training. `count` is the number of images.
        """
        self.model.eval()
        device = next(self.model.parameters()).device
        sums: dict[str, float] = defaultdict(float)
        for images_B3HW, label_B in loader:
            with self.optimizer.amp_ctx:
                _, aux = self.model.training_loss(images_B3HW.to(device), label_B.to(device))
            for name, value in self.model.metrics(aux).items():
                sums[name] += float(value) * len(label_B)
            sums['count'] += len(label_B)
        self.model.train()
        parts = dist.allgather_object(dict(sums))  # a rank without images adds nothing
        total = {name: sum(part.get(name, 0.) for part in parts) for part in parts for name in part}
        count = total.pop('count')
        return {name: value / count for name, value in total.items()} | dict(count=count)

    # ------------------------------------------------------------------------------ state
    def state_dict(self, progress: float = 1.) -> dict[str, Any]:
        """Published keys (`var_wo_ddp`, `vae_local`, `var_opt`), or their counterparts for a tokenizer."""
        state = dict(config=self.model.config_state(progress), training_state=self.model.training_state())
        if isinstance(self.model, ARModel):
            return state | dict(var_wo_ddp=self.model.state_dict(),
                                vae_local=self.model.tokenizer.state_dict(),
                                var_opt=self.optimizer.state_dict())
        return state | dict(vae_wo_ddp=self.model.state_dict(), vae_opt=self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any], source: str = 'the checkpoint') -> None:
        """Restore everything; the argument is left as it is.

        Raises:
            ValueError: other model, other architecture or other tokenizer, named in one line.
        """
        is_generator = isinstance(self.model, ARModel)
        weights, optimizer = ('var_wo_ddp', 'var_opt') if is_generator else ('vae_wo_ddp', 'vae_opt')
        if weights not in state:
            raise ValueError(f'{source} holds no {type(self.model).__name__} to resume: '
                             'use another output folder')
        load_weights(self.model, state[weights], source)
        if is_generator:
            saved = state.get('vae_local', {})
            for name, parameter in self.model.tokenizer.named_parameters():
                if name in saved and not torch.equal(parameter.cpu(), saved[name].cpu()):
                    raise ValueError(f'{source} was trained on the codes of another tokenizer '
                                     f'({name} differs): '
                                     'pass the same --vae_ckpt, or start in another output folder')
        self.optimizer.load_state_dict(state[optimizer])
        if 'training_state' in state:  # absent in published checkpoints
            self.model.load_training_state(state['training_state'])
