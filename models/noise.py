"""Random numbers of sampling and training that do not depend on how images are spread over ranks and batches.

Sampling: `ImageNoise` is a function of the seed and the number of an image. Training: `GlobalBatch` draws for
the images of all ranks and micro-steps and hands each its own part.
Letters: B batch.
"""
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as a signed number, the increment of SplitMix64
MIXING = (  # its rounds: shift to the right, then multiply
    (30, -0x40A7B892E31B1A47),
    (27, -0x6B2FB644ECCEEE15),
)


# ---------------------------------------------------------------------------------------------- sampling
class ImageNoise:
    """Noise that is a function of the seed, the image's number, the count of draws and the element alone.

    Every image owns a SplitMix64 stream per draw (Steele et al., OOPSLA 2014), evaluated at all its counters
    at once, so that an image gets the same noise in any batch, on any rank and on any device. Pass it where a
    generator is taken.

    Args:
        seed: of the whole sampling job.
        index_B: number of each image of the batch in the job.
    """

    def __init__(self, seed: int, index_B: Sequence[int]):
        self.seed = seed
        self.index_B = list(index_B)
        self.num_draws = 0

    def exponential_like(self, t: torch.Tensor) -> torch.Tensor:
        """Fresh Exponential(1) noise of the shape and device of `t`, float32; dimension 0 is the image."""
        return self.uniform_like(t).log_().neg_()

    def normal_like(self, t: torch.Tensor) -> torch.Tensor:
        """As `exponential_like`, N(0, 1), by the inverse of its distribution function."""
        return self.uniform_like(t).mul_(2).sub_(1).erfinv_().mul_(2 ** 0.5)

    def uniform_like(self, t: torch.Tensor) -> torch.Tensor:
        """As `exponential_like`, uniform in (0, 1)."""
        counter = torch.arange(t[0].numel(), device=t.device)
        return self._uniform_at(counter[None]).view_as(t)

    def exponential_at(self, index_Bn: torch.Tensor) -> torch.Tensor:
        """Of the noise that `exponential_like` would draw, the elements with these numbers alone.

        Args:
            index_Bn: (B, n) int64, places in the flattened tensor of an image.
        """
        return self._uniform_at(index_Bn).log_().neg_()

    def _uniform_at(self, counter_Bn: torch.Tensor) -> torch.Tensor:
        """(B, n) float32 in (0, 1) of one draw; counters (1, n) are those of all images."""
        # A key of 64 bits for every image and draw.
        keys = [np.random.SeedSequence([self.seed, i, self.num_draws]).generate_state(1, np.uint64)[0]
                for i in self.index_B]
        self.num_draws += 1
        key_B1 = torch.from_numpy(np.array(keys).view(np.int64)).to(counter_Bn.device)[:, None]

        # SplitMix64 of all counters at once. Torch shifts signed numbers, so the bits that come in from the
        # left are masked away.
        x = counter_Bn * GOLDEN + key_B1
        for shift, factor in MIXING:
            x.bitwise_xor_((x >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
        x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))

        # Of the 23 high bits a float32 keeps all, half a step included: the noise is never 0, with which
        # codes that were filtered out would win the draw, and never 1.
        high = (x >> 41).bitwise_and_((1 << 23) - 1)
        return high.float().add_(0.5).mul_(2. ** -23)


def noise_of_step(batch: int) -> ImageNoise:
    """Noise of the `batch` images of a micro-step of a training, by the seed, the step and their places among
    the images of all ranks.

    Call it before anything seeds torch's generators anew: the loop seeds them by (seed, step), and this takes
    the same number.
    """
    return ImageNoise(torch.initial_seed(), GlobalBatch.current.rows(batch))


Rng = torch.Generator | ImageNoise | None


def exponential_like(t: torch.Tensor, rng: Rng) -> torch.Tensor:
    """Exponential(1) noise of the shape of `t` from `rng`; None is torch's global generator."""
    if isinstance(rng, ImageNoise):
        return rng.exponential_like(t)
    return torch.empty_like(t, memory_format=torch.legacy_contiguous_format).exponential_(generator=rng)


def normal_like(t: torch.Tensor, rng: Rng) -> torch.Tensor:
    """N(0, 1) noise of the shape of `t` from `rng`; None is torch's global generator."""
    if isinstance(rng, ImageNoise):
        return rng.normal_like(t)
    return torch.empty_like(t).normal_(generator=rng)


# ---------------------------------------------------------------------------------------------- training
class GlobalBatch:
    """The images of one optimizer step on all ranks, and which of them the current micro-step holds.

    Random numbers of a training are drawn for all `total` images, and each micro-step takes its rows. With
    equal seeds on every rank an image thus gets the same numbers for any number of ranks and micro-steps.

    The trainer's loop enters one as a context, and what draws asks `GlobalBatch.current`: a drop path deep in
    a block is out of reach of arguments. It is an attribute of the class rather than a context variable,
    since blocks may be recomputed in the threads of the backward pass.

    Args:
        start: row of the first image of this micro-step.
        total: images of the step on all ranks; None means that there are no others.
    """

    current: ClassVar['GlobalBatch']

    def __init__(self, start: int = 0, total: int | None = None):
        # A tensor, so that code compiled once serves every micro-step.
        self.start = torch.tensor(start, device='cpu')
        self.total = total

    def __enter__(self) -> 'GlobalBatch':
        self._outer = GlobalBatch.current
        GlobalBatch.current = self
        return self

    def __exit__(self, *_) -> None:
        GlobalBatch.current = self._outer

    def rows(self, batch: int) -> range:
        """Places of the `batch` images of this micro-step among those of all ranks."""
        start = self.start.item()
        return range(start, start + batch)

    def per_image(self, batch: int, device: torch.device, fill: Callable[[torch.Tensor], torch.Tensor],
                  shape: tuple[int, ...] = ()) -> torch.Tensor:
        """(batch, *shape) random numbers, those of the images of this micro-step.

        Args:
            fill: draws numbers into a tensor of the images of all ranks, and returns it.
            shape: of the numbers of one image.
        """
        drawn = fill(torch.empty(self.total or batch, *shape, device=device))
        if self.total is None:
            return drawn
        return drawn[self.start + torch.arange(batch, device=device)]

    def reseed_per_rank(self) -> None:
        """Let torch's generators differ between ranks and micro-steps from here on.

        This is for dropout: masks for the images of all ranks would be too large to draw, and equal ones on
        all ranks would average badly.
        """
        if self.total is not None:
            torch.manual_seed(torch.randint(2 ** 62, (), device='cpu').item() + self.start.item())


GlobalBatch.current = GlobalBatch()
