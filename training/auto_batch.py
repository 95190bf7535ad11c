"""How many images fit into memory at a time, by trial steps: `--auto_batch`.

The images of an optimizer step stay those that the flags ask for. Each rank's share of them is split into the
fewest micro-steps that fit into the memory of every rank.
"""
import gc
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import dist
from configs import GeneratorConfig
from configs.options import flag_of
from models.noise import GlobalBatch
from training.build import build_model, build_trainer
from utils.machine import forget_peak_memory, free_memory, local_ranks, peak_memory, process_memory

logger = logging.getLogger(__name__)
# The rest is for fragments of memory, for buffers of the network, and for what the trial steps do not do.
MOST_USED = 0.92
GIB = 2 ** 30


def fit_batch(config: GeneratorConfig, num_classes: int, saved: dict[str, Any],
              ranks_before: int | None) -> GeneratorConfig:
    """The config in as few micro-steps as fit into memory, and as it is otherwise; every rank calls it.

    A run that goes on with as many ranks keeps the micro-steps of its checkpoint: their sums are rounded in
    another way for any other number of them.

    Args:
        num_classes: of the data set.
        saved: settings of the checkpoint that the run goes on from; {} if it begins.
        ranks_before: of the start that wrote this checkpoint; None if it does not say.
    Raises:
        ValueError: not even one image at a time fits, or the system does not tell how much memory there is.
    """
    world_size = dist.get_world_size()
    num_images = config.local_batch(world_size) * config.accumulate
    kept = saved.get('accumulate', 0)
    if kept and num_images % kept == 0 and ranks_before == world_size:
        return config.in_micro_steps(kept, world_size)

    try:
        trials = Trials(config, num_classes)
    except torch.OutOfMemoryError:
        raise ValueError(f'the weights, gradients and averages do not fit into {MOST_USED:.0%} of the memory '
                         f'of {dist.get_device()}: pass --shard=1 on several GPUs') from None
    try:
        at_a_time, peak = largest_that_fits(num_images, trials.peak, MOST_USED * trials.memory)
    finally:
        trials.end()
    chosen = config.in_micro_steps(num_images // at_a_time, world_size)
    batch_flag = flag_of(config, 'images_per_step')
    parts_flag = flag_of(config, 'accumulate')
    logger.info(
        '--auto_batch: %d images at a time fit (peak %.1f of %.1f GiB): --%s=%d --%s=%d',
        at_a_time,
        peak / GIB,
        trials.memory / GIB,
        batch_flag,
        num_images * world_size,
        parts_flag,
        chosen.accumulate,
    )
    return chosen


def largest_that_fits(num_images: int, peak_of: Callable[[int], float], limit: float) -> tuple[int, float]:
    """How many of `num_images` fit into memory at a time, a divisor of them, and the peak of memory then.

    Numbers are tried from small to large. Memory grows in proportion to the images, so the last two peaks
    forecast the next one, and nothing is tried that would not fit: a CPU would end the process for it.

    Args:
        peak_of: bytes at the peak of a step with so many images, infinite if they did not fit.
        limit: bytes that may be used.
    Raises:
        ValueError: not even one image at a time fits.
    """
    peaks: list[tuple[int, float]] = []
    fitting = None
    for size in range(1, num_images + 1):
        # The peak of two images shows the growth, also where they are no divisor.
        if num_images % size and size != 2:
            continue
        if forecast(peaks, size) > limit:
            break
        peak = peak_of(size)
        if peak > limit:
            break
        peaks.append((size, peak))
        if num_images % size == 0:
            fitting = size, peak
    if fitting is None:
        raise ValueError(f'not even one image at a time fits into {limit / GIB:.1f} GiB, which is '
                         f'{MOST_USED:.0%} of the memory of a rank: pass --act_ckpt=block, or --shard=1 on '
                         'several GPUs')
    return fitting


def forecast(peaks: list[tuple[int, float]], size: int) -> float:
    """The peak of a step with `size` images on the line through the last two (images, peak); 0 before."""
    if len(peaks) < 2:
        return 0.
    (before, peak_before), (last, peak_last) = peaks[-2:]
    growth = (peak_last - peak_before) / (last - before)
    return peak_last + growth * (size - last)


class Trials:
    """Training steps that are made for the memory they take, and leave nothing.

    They are the largest ones of the training. Blocks are not compiled, since every number of images would be
    compiled anew.

    Args:
        config: of the training.
        num_classes: of the data set.
    Attributes:
        memory: bytes that a rank may have, of the rank with the least.
    """

    def __init__(self, config: GeneratorConfig, num_classes: int):
        self.device = dist.get_device()
        world_size = dist.get_world_size()
        self.num_images = config.micro_batch(world_size) * config.accumulate  # of all ranks
        self.memory = min(dist.allgather_object(memory_of_rank(self.device)))
        if self.device.type == 'cuda':
            # Where ranks exchange shards of the weights, all of them must run out of memory at the same
            # point, or one would wait for another.
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1., MOST_USED * self.memory / total), self.device)

        # Weights of any value take the same memory; only a reference must be read from its file.
        config = replace(config, init_from=config.reference, reset='', compile_model=0, compile_tokenizer=0)
        self.model = build_model(config, num_classes, total_steps=config.epochs, steps_per_epoch=1,
                                 device=self.device)
        self.model.take_largest_steps()
        self.trainer = build_trainer(config, self.model, total_steps=config.epochs)
        self.image = torch.zeros(1, 3, config.image_size, config.image_size, device=self.device)
        if config.cached_path:
            self.image = self.model.tokenizer.precompute(self.image)
        self.fits = self._fits_one_image()

    def _fits_one_image(self) -> bool:
        """Whether a whole step with one image fits on every rank.

        It leaves what is there between micro-steps of a training: moments of the optimizer, and gradients.
        """
        # In the second one ranks wait for each other, so that all of them must have come so far.
        for stepping in (False, True, False):
            peak = self._peak_here(1, stepping)
            if not all(dist.allgather_object(math.isfinite(peak))):
                return False
        return True

    def peak(self, num_images: int) -> float:
        """Most bytes that a rank had in a micro-step with so many images per rank, the largest of all ranks.

        It is infinite if a rank had too little memory. Every rank calls it.
        """
        if not self.fits:
            return math.inf
        return max(dist.allgather_object(self._peak_here(num_images)))

    def _peak_here(self, num_images: int, stepping: bool = False) -> float:
        """Most bytes that this process had in a micro-step, with all that it had before; infinite if too few.

        Args:
            stepping: whether the optimizer moves after it.
        """
        forget_peak(self.device)
        try:
            self._micro_step(num_images, stepping)
        except torch.OutOfMemoryError:
            return math.inf
        return peak_since(self.device)

    def _micro_step(self, num_images: int, stepping: bool) -> None:
        """Forward and backward pass of so many images; the optimizer moves after it when `stepping`."""
        images_B3HW = torch.cat([self.image] * num_images)
        label_B = torch.zeros(num_images, dtype=torch.int64, device=self.device)
        with GlobalBatch(0, self.num_images):
            self.trainer.train_step(images_B3HW, label_B, progress=1., stepping=stepping)

    def end(self) -> None:
        """Give all memory back."""
        del self.model, self.trainer, self.image
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1., self.device)


# ---------------------------------------------------------------------------------------------- memory
def memory_of_rank(device: torch.device) -> int:
    """Bytes that this process may have, those included that it has already.

    Raises:
        ValueError: the system does not tell.
    """
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free = free_memory()
    taken = process_memory()
    if free is None or taken is None:
        raise ValueError('--auto_batch cannot tell how much memory this machine has: leave it out, and pass '
                         '--ac=N to take each batch in N parts')
    return taken + free // local_ranks()


def forget_peak(device: torch.device) -> None:
    """Let `peak_since` begin anew."""
    if device.type == 'cuda':
        gc.collect()  # a step that found no memory may have left tensors
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak_memory()


def peak_since(device: torch.device) -> int:
    """Most bytes that this process has had since `forget_peak`."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_reserved(device)
    return peak_memory()
