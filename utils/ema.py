"""Moving averages of a model's weights: exponential ones, and those whose width grows with the training."""
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from utils.sharding import local, shard_state

SNAPSHOTS = 'snapshots'          # the folder, inside an output folder, where averages are stored now and then
SNAPSHOT_INDEX = 'index.jsonl'   # the list of its files


class WeightEMA:
    """Averages the trained parameters; all other entries of the state dict are copied.

    Where weights are sharded, so is their average.

    With a warm-up the decay begins small, so that the average is of use from the first steps on: that of
    update t = 0, 1, ... is min(decay, (h + 1) / (h + 10)), where h = t // 2.

    Args:
        model: its weights are the first value of the average.
        decay: of the average, per optimizer step.
        copied: names of parameters that are copied instead of averaged.
        warmup: whether the decay begins small, see above.
        device: where the average lies; None is where the weights lie. On the host it takes no memory of a
            card, and every update copies the weights there.
    """

    def __init__(self, model: nn.Module, decay: float, copied: set[str] = frozenset(),
                 warmup: bool = True, device: torch.device | str | None = None):
        self.model = model
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.averaged = trained - set(copied)
        self.weights = {}
        for name, value in model.state_dict().items():
            value = value.detach()
            self.weights[name] = value.clone() if device is None else value.to(device, copy=True)

    def next_decay(self) -> float:
        """The share of the average that the next update keeps."""
        if self.warmup:
            half = self.num_updates // 2
            return min(self.decay, (half + 1) / (half + 10))
        return self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights of the model; call it once per optimizer step."""
        decay = self.next_decay()
        self.num_updates += 1
        averages = []
        values = []
        for name, value in self.model.state_dict().items():
            if name in self.averaged:
                average = local(self.weights[name])
                averages.append(average)
                values.append(local(value).to(average.device))
            else:
                local(self.weights[name]).copy_(local(value))
        # One call for all parameters: on a GPU a few kernels in place of one for each of them.
        if averages:
            torch._foreach_lerp_(averages, values, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the averaged weights, and this average those of the model.

        They change places one after the other, so that there is never a third copy of the weights.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Let the weights of the model and of the average change places."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, tensor in tensors.items():
            if name in self.weights:
                mine = local(self.weights[name])
                theirs = local(tensor.detach())
                kept = theirs.clone()
                theirs.copy_(mine)
                mine.copy_(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights, under the model's own keys."""
        return dict(self.weights)

    def load_state_dict(self, state: dict[str, torch.Tensor], num_updates: int) -> None:
        """Continue an average.

        Args:
            state: averaged weights, from `state_dict`.
            num_updates: number of updates that they are made of, for the warm-up.
        """
        for name, value in shard_state(state, self.weights).items():
            local(self.weights[name]).copy_(local(value))
        self.num_updates = num_updates


# ------------------------------------------------------------------------------ power functions
def exponent_of(width: float) -> float:
    """The exponent g of a profile (u / t)^g over past times u <= t whose standard deviation is `width` * t.

    That is the largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2), s being the width.

    Args:
        width: above 0, at most 12 ** -0.5, which is that of a plain mean of all updates.
    Source: arXiv 2312.02696, Sec. 3.1 and App. C.
    """
    return float(np.roots([1, 7, 16 - width ** -2, 12 - width ** -2]).real.max())


def width_of(exponent: float) -> float:
    """The standard deviation of a profile (u / t)^g, as a share of t."""
    g = exponent
    return ((g + 1) / (g + 2) ** 2 / (g + 3)) ** 0.5


class PowerEMA(WeightEMA):
    """Averages the weights after the updates u = 1 ... t with the profile (u / t)^g.

    The profile covers the same share of the training at any time t, so that it forgets the first weights
    fast, and grows with the training. Such averages at several times give those of other widths: see
    `utils.posthoc_ema`.

    Args:
        model, device: see `WeightEMA`.
        width: standard deviation of the profile as a share of t.
    Source: arXiv 2312.02696, Sec. 3.1.
    """

    def __init__(self, model: nn.Module, width: float, device: torch.device | str | None = None):
        super().__init__(model, decay=0., warmup=False, device=device)
        self.width = width
        self.exponent = exponent_of(width)

    def next_decay(self) -> float:
        t = self.num_updates + 1
        return (1 - 1 / t) ** (self.exponent + 1)

    def averaged_weights(self) -> dict[str, torch.Tensor]:
        """The averages alone, without what is copied."""
        return {name: value for name, value in self.weights.items() if name in self.averaged}
