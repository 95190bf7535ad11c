"""Every part of a training once, on the real settings, before a long run: `train.py --check`.

All ranks do what the run will do, in about a minute, and a table says what each part took and gave. A part
that fails ends the check with its one line. The run's own checkpoints and logs are not touched.
"""
import gc
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import dist
from configs import SAMPLE_CONFIGS, SampleConfig, TrainConfig
from configs.options import flag_of, parse_flags
from models import ARModel
from models.noise import ImageNoise
from trainer import weights_checksum
from training.build import count_parameters
from training.data import Data, build_data
from utils.console import one_line

logger = logging.getLogger(__name__)
IMAGES_TO_READ = 8     # of each split, by every rank
IMAGES_TO_SAMPLE = 4
SECONDS_OF_LOADER = 10
SECONDS_OF_STEPS = 15
MOST_STEPS = 10
VALIDATION_BATCHES = 2
EXCHANGED_BYTES = dict(cuda=2 ** 28, cpu=2 ** 24)
EXCHANGES = 5
SECONDS_UNTIL_SEEN = 10        # in which a shared file system shows a new folder to other nodes


def check(config: TrainConfig, make_run: Callable[[TrainConfig, Data], Any]) -> None:
    """Do every part of a training once; every rank calls it.

    Args:
        config: of the training.
        make_run: makes a run of a config and its data, as `train.Run`, which goes on from the newest
            checkpoint in the output folder.
    Raises:
        ValueError: a part fails.
    """
    parts = Parts(config, make_run)
    try:
        with temporary_folder(Path(config.output_dir)) as folder:
            parts.use(folder)
            parts.do('data', parts.data)
            parts.do('images', parts.images, is_local=True)
            parts.do('model', parts.model)
            parts.do('loader', parts.loader, is_local=True)
            parts.do('first step', parts.first_step)
            parts.do('steps', parts.steps)
            parts.do('network', parts.network)
            parts.do('save', parts.save)
            parts.do('load', parts.load)
            parts.do('validate', parts.validate)
            parts.do('sample' if parts.is_generator else 'reconstruct', parts.draw)
            parts.do('whole run', parts.whole_run)
    finally:
        # Also where a part has failed: what went well before it may explain it.
        logger.info('%s', parts.table())


class Parts:
    """The parts of a check, what they leave to those after them, and the table of their results."""

    def __init__(self, config: TrainConfig, make_run: Callable[[TrainConfig, Data], Any]):
        self.config = config
        self.make_run = make_run
        self.is_generator = config.model in SAMPLE_CONFIGS
        self.sets: Data | None = None
        self.run: Any = None
        self.rows: list[tuple[str, str, str]] = [('part', 'seconds', 'result')]
        # What the length of the whole run follows from, in seconds.
        self.seconds_per_batch = 0.
        self.seconds_per_step = 0.
        self.seconds_per_validation = 0.
        self.seconds_per_save = 0.

    def use(self, folder: Path) -> None:
        """Let the run write into this folder."""
        changes: dict[str, Any] = dict(output_dir=str(folder), check=False, after_save='', wandb='')
        if self.config.fid_images:  # its reference may be all validation images
            changes['fid_images'] = 0
        self.config = replace(self.config, **changes)

    def do(self, name: str, part: Callable[[], str], is_local: bool = False) -> None:
        """Do a part, and note how long it took and its result, or why it failed.

        Args:
            is_local: whether ranks do it without each other, so that all of them can give up together.
        """
        began = time.perf_counter()
        failure = None
        result = ''
        try:
            result = part()
        except (ValueError, OSError) as error:
            failure = ValueError(one_line(error))
        except torch.OutOfMemoryError:
            images = self.config.local_batch(dist.get_world_size())
            flag = flag_of(self.config, 'accumulate')
            failure = ValueError(f'{images} images per rank do not fit into the memory of '
                                 f'{dist.get_device()}: pass --{flag}=N to take each batch in N parts')
        seconds = time.perf_counter() - began
        shown = f'FAILED: {one_line(failure)}' if failure else result
        self.rows.append((name, f'{seconds:.1f}', shown))
        if is_local:
            dist.raise_together(failure)
        if failure:
            raise failure

    def table(self) -> str:
        """A line per part."""
        width = max(len(name) for name, _, _ in self.rows)
        lines = [f'{name:{width}}  {seconds:>7}  {result}' for name, seconds, result in self.rows]
        return '\n'.join(['the check:', *lines])

    # ------------------------------------------------------------------------------ data
    def data(self) -> str:
        """Find the images of both splits."""
        self.sets = build_data(self.config)
        return f'{len(self.sets.train)} + {len(self.sets.val)} images of {len(self.sets.classes)} classes'

    def images(self) -> str:
        """Read some images of each split, other ones on every rank."""
        num_images = 0
        for split in (self.sets.train, self.sets.val):
            count = min(IMAGES_TO_READ, len(split))
            for i in range(count):
                split[(i * len(split) // count + dist.get_rank()) % len(split)]
            num_images += count
        return f'{num_images} read by every rank'

    def loader(self) -> str:
        """Let every rank draw batches for a while, more than its loader processes have ready."""
        most = 2 * self.config.num_workers(dist.get_world_size()) + 4
        next(self.run.batches)
        began = time.perf_counter()
        num_batches = 0
        while num_batches < most and time.perf_counter() - began < SECONDS_OF_LOADER:
            next(self.run.batches)
            num_batches += 1
        self.seconds_per_batch = (time.perf_counter() - began) / num_batches
        images = self.config.local_batch(dist.get_world_size()) * self.config.accumulate
        return f'{images / self.seconds_per_batch:.0f} images/s per rank'

    # ------------------------------------------------------------------------------ steps
    def model(self) -> str:
        """Build everything as the run does, which also compares flags, data and tokenizer of all ranks."""
        self.run = self.make_run(self.config, self.sets)
        # Micro-steps that were found by trial are kept.
        if self.config.auto_batch:
            accumulate = self.run.config.accumulate
            self.config = self.config.in_micro_steps(accumulate, dist.get_world_size())
            self.config = replace(self.config, auto_batch=False)
        return f'{count_parameters(self.run.model) / 1e6:.1f}M parameters, {self.run.device}'

    def first_step(self) -> str:
        """The first step of the training, with all that is compiled or measured in it."""
        loss = self._step(0)
        return f'loss {loss:.3f}'

    def steps(self) -> str:
        """The last step of the training some times: curricula and discriminators have begun by then."""
        last = self.run.total_steps - 1
        self._step(last)  # may compile once more
        began = time.perf_counter()
        self._step(last)
        seconds = self._slowest(time.perf_counter() - began)
        count = max(1, min(MOST_STEPS, int(SECONDS_OF_STEPS / seconds)))
        began = time.perf_counter()
        for _ in range(count):
            self._step(last)
        self.seconds_per_step = self._slowest((time.perf_counter() - began) / count)
        result = (f'{self.seconds_per_step:.3f} s per step, '
                  f'{self.run.images_per_step / self.seconds_per_step:.1f} images/s')
        device = dist.get_device()
        if device.type == 'cuda':
            peak = self._slowest(torch.cuda.max_memory_reserved(device) / 2 ** 30)
            total = torch.cuda.get_device_properties(device).total_memory / 2 ** 30
            result += f', peak memory {peak:.1f} of {total:.1f} GiB'
        return result

    def _step(self, step: int) -> float:
        """A step of the training at this point of it, on the next batch; its loss.

        Raises:
            ValueError: it is not finite.
        """
        images_B3HW, label_B, damage_B = next(self.run.batches)
        self.run.set_rates(step)
        info = self.run.train_step(images_B3HW, label_B, step)
        self.run.exchange(damage_B, info)
        if not info.is_finite:
            raise ValueError(f'the loss or the gradient of step {step} is not finite: lower the learning '
                             'rate, or train in float32 or bfloat16')
        return info.loss.item()

    @staticmethod
    def _slowest(value: float) -> float:
        """The largest value of all ranks."""
        return max(dist.allgather_object(value))

    def network(self) -> str:
        """Compare the weights of all ranks after these steps, and measure the exchange of gradients."""
        world_size = dist.get_world_size()
        if world_size == 1:
            return 'one rank'
        self.run.compare_weights()
        device = dist.get_device()
        values = torch.zeros(EXCHANGED_BYTES[device.type] // 4, device=device)
        dist.allreduce(values)
        dist.sum_over_ranks(0.)  # which waits for the device
        began = time.perf_counter()
        for _ in range(EXCHANGES):
            dist.allreduce(values)
        dist.sum_over_ranks(0.)
        seconds = (time.perf_counter() - began) / EXCHANGES
        # What each rank sends and receives in the best case, as NCCL's own tests count it.
        bandwidth = 2 * (world_size - 1) / world_size * values.nbytes / seconds / 1e9
        return f'equal weights on {world_size} ranks, all-reduce {bandwidth:.2f} GB/s'

    # ------------------------------------------------------------------------------ checkpoints
    def save(self) -> str:
        """Write a checkpoint where the run will write its own."""
        began = time.perf_counter()
        self.run.save(0, 1)
        self.seconds_per_save = time.perf_counter() - began  # in the background only the copy is waited for
        self.run.wait_for_checkpoint()
        folder = Path(self.config.output_dir)
        size, free = dist.from_master(lambda: self._sizes(folder))

        # The newest ones, the best one, one that is being written, and those that are kept for good.
        count = self.config.keep_newest + 2
        if self.config.keep_every:
            count += self.run.total_steps // self.config.keep_every
        needed = count * size
        if free + size < needed:
            raise ValueError(f'the run needs {needed / 1e9:.3g} GB for {count} checkpoints, '
                             f'{str(folder.parent)!r} has {free / 1e9:.4g} GB free: free some space, or pass '
                             'another --output_dir')
        return f'{size / 1e9:.3g} GB, all of them {needed / 1e9:.3g} GB, {free / 1e9:.4g} GB are free'

    def _sizes(self, folder: Path) -> tuple[int, int]:
        """Bytes of the checkpoint and of the free space."""
        checkpoint = folder / f'{self.config.CHECKPOINT_PREFIX}-last.pth'
        return checkpoint.stat().st_size, shutil.disk_usage(folder).free

    def load(self) -> str:
        """Build the run once more, from this checkpoint; it must have the same weights."""
        expected = weights_checksum(self.run.model)
        self.run.journal.tb.close()
        self.run = None  # its memory, before the next one is built
        gc.collect()
        if dist.get_device().type == 'cuda':
            torch.cuda.empty_cache()
        self.run = self.make_run(self.config, self.sets)
        if weights_checksum(self.run.model) != expected:
            raise ValueError('the weights that were read are not those that were written: the disk, the '
                             'file system or the memory may be faulty')
        return f'continues at epoch {self.run.start[0]}, step {self.run.start[1]}, with equal weights'

    # ------------------------------------------------------------------------------ evaluation
    def validate(self) -> str:
        """Calibrate and validate on some batches."""
        run = self.run
        run.trainer.before_evaluation(lambda: islice(run.images_to_calibrate(), VALIDATION_BATCHES))
        began = time.perf_counter()
        scores = run.trainer.eval_epoch(islice(run.val_loader, VALIDATION_BATCHES))
        seconds = self._slowest(time.perf_counter() - began)
        num_batches = min(VALIDATION_BATCHES, len(run.val_loader))
        self.seconds_per_validation = seconds / num_batches * len(run.val_loader)
        score = scores[run.model.selection]
        if not math.isfinite(score):
            raise ValueError(f'{run.model.selection} of the validation images is {score}: train in float32 '
                             'or bfloat16')
        return f'{run.model.selection} {score:.3f} of {scores["count"]:.0f} images'

    @torch.no_grad()
    def draw(self) -> str:
        """Sample as `--fid_images` would; of a tokenizer, show and export what the run does."""
        run = self.run
        if not self.is_generator:
            count = min(2, len(self.sets.val))
            images = torch.stack([self.sets.val[i][0] for i in range(count)])
            run.trainer.pictures(images.to(run.device))
            if dist.is_master():
                run.trainer.finish(run.folder, self.config.model, has_trained=True)
            return f'{len(images)} images, and the file for generators'
        images_B3HW = self._samples(run.model)
        if not images_B3HW.isfinite().all():
            raise ValueError('the samples hold nan or infinite numbers: train in float32 or bfloat16')
        height, width = images_B3HW.shape[2:]
        return f'{len(images_B3HW)} images of {height}x{width}'

    def _samples(self, model: ARModel) -> torch.Tensor:
        """Some images, by the flags of `--fid_flags` if there are any."""
        cls: type[SampleConfig] = SAMPLE_CONFIGS[self.config.model]
        settings = cls(**parse_flags(cls, '--fid_flags', self.config.fid_flags), model=self.config.model,
                       ckpt='in training', num_images=IMAGES_TO_SAMPLE)
        labels = [i % model.num_classes for i in range(IMAGES_TO_SAMPLE)]
        with self.run.trainer.averaged(), self.run.trainer.optimizer.amp_ctx:
            return model.sample(labels, rng=ImageNoise(settings.seed, range(IMAGES_TO_SAMPLE)),
                                **settings.sample_kwargs())

    # ------------------------------------------------------------------------------ the whole
    def whole_run(self) -> str:
        """How long all of the training will take, where the loader works beside the steps."""
        epochs = self.run.config.epochs
        seconds_per_step = max(self.seconds_per_step, self._slowest(self.seconds_per_batch))
        num_validations = math.ceil(epochs / self.config.eval_every)
        seconds = (self.run.total_steps * seconds_per_step + num_validations * self.seconds_per_validation
                   + epochs * self.seconds_per_save)
        length = f'{seconds / 3600:.1f} hours' if seconds >= 3600 else f'{seconds / 60:.1f} minutes'
        reason = ', as steps wait for the loader' if seconds_per_step > self.seconds_per_step else ''
        return f'{self.run.total_steps} steps take about {length}{reason}'


# ------------------------------------------------------------------------------ the folder
@contextmanager
def temporary_folder(output_dir: Path) -> Iterator[Path]:
    """A new folder inside the output folder, which all ranks see, and which is removed at the end.

    If the output folder was not there before, it is removed as well.

    Raises:
        ValueError: it cannot be made, or a rank does not see it.
    """
    made: list[Path] = []  # folders around it, the innermost one first

    def make() -> str:
        try:
            made.extend(folder for folder in (output_dir, *output_dir.parents) if not folder.exists())
            output_dir.mkdir(parents=True, exist_ok=True)
            return os.path.basename(tempfile.mkdtemp(prefix='.check_', dir=output_dir))
        except OSError as error:
            raise ValueError(f'cannot write into the output folder {str(output_dir)!r} '
                             f'({error.strerror or error}): change its permissions, free some space, or pass '
                             'another --output_dir') from None

    try:
        folder = output_dir / dist.from_master(make)
        dist.raise_together(None if is_seen(folder) else ValueError(
            f'{str(folder)!r}, which rank 0 has made, is not seen here: the output folder must lie on a file '
            'system that all nodes share'))
        try:
            yield folder
            dist.barrier()  # nobody removes what another rank still reads
        finally:
            # Where a single rank fails, the launcher ends the others at once, so that every rank cleans up.
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        for around in made:
            with suppress(OSError):  # another program has put something into it
                around.rmdir()


def is_seen(folder: Path) -> bool:
    """Whether this rank sees a folder, perhaps after a while."""
    deadline = time.monotonic() + SECONDS_UNTIL_SEEN
    while not folder.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
