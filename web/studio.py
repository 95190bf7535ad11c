"""What the page draws: samples that grow, comparisons, edits, reconstructions. Nothing here knows gradio.

Read it from `Studio.sample`; the other methods are one call of the model each.
Letters: B batch, N images of a job, 3HW image.
"""
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from configs import SAMPLE_CONFIGS, SAMPLE_PRESETS
from configs.sampling import SampleConfig
from evaluation.metrics import psnr, to_uint8
from models import FlexVAR, Tokenizer
from models.noise import ImageNoise
from pipeline import Pipeline, Pretrained, default_sampling, draw, to_bytes
from utils.amp_sc import autocast
from utils.data import build_transforms
from utils.images import decode_image, image_errors
from utils.provenance import device_name
from web.controls import Control, controls_of, value_of, values_of

MOST_IMAGES = 16                # of a job
LONGEST_SIDE = 1024             # of an image, in pixels
MOST_PIXELS = 16 * 512 ** 2     # of all images of a job
MOST_SCALES = 64                # of a pyramid
MOST_CODES = 2 ** 16            # of all images and scales of a job: their keys and values are kept
MOST_STEPS = 250                # of a flow head at a scale
LARGEST_SEED = 2 ** 53 - 1      # that a browser can tell from the next one
TOKENIZER_SIDE = 256            # pixels of an image that is shown to a tokenizer without a generator
PAINTED = 64                    # opacity from which on a pixel counts as painted, of 255
OUTPUT = 'local_output/page'    # of the command line that draws the same

# Every tab has the first one, and some have the second one.
SEED = Control('seed', 'seed', 'the noise of image i is a function of (seed, i)', int, 0, None)
NUM_IMAGES = Control('num_images', 'images', 'how many are drawn', int, 1, None)


class Drawn(NamedTuple):
    """Images of a job, as far as it is."""
    images: list[np.ndarray]  # uint8 (H, W, 3)
    num_scales: int           # that are drawn
    seconds: float            # that the model took
    is_whole: bool            # whether these are the images of the job


class Row(NamedTuple):
    """The images of one value of a comparison."""
    title: str
    images: list[np.ndarray]
    job: SampleConfig


class Reconstructed(NamedTuple):
    """What a tokenizer makes of an image with the scales up to one of them."""
    scale: str           # rows x columns of its code map
    image: np.ndarray    # uint8 (H, W, 3)
    psnr: float          # of this image, in dB
    num_codes: int       # of this scale; 0 where codes are continuous
    num_distinct: int    # different ones of them


class Studio:
    """A model with what the page does with it; the model serves one job at a time.

    Args:
        loaded: a `Pipeline`, or a `Pretrained` of a tokenizer, with which only `reconstruct` works.
        source: its weights, as somebody has named them, see `pipeline.load`.
        path: their file or folder.
        vae_ckpt: where those of its tokenizer come from, if not from there.
        weights: the kind that was asked for.
        precision: of products, 0 float32, 1 float16, 2 bfloat16.
    """

    def __init__(self, loaded: Pretrained, source: str, path: Path, vae_ckpt: str = '',
                 weights: str = 'ema', precision: int = 0):
        self.loaded = loaded
        self.source = source
        self.path = path
        self.vae_ckpt = vae_ckpt
        self.weights = weights
        self.precision = precision
        self.controls = controls_of(loaded.family, self._start()) if self.is_generator else []
        self._lock = threading.Lock()
        self._growing: Iterator[torch.Tensor] | None = None

    # ------------------------------------------------------------------------------ what it can do
    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def is_generator(self) -> bool:
        return isinstance(self.loaded, Pipeline)

    @property
    def can_edit(self) -> bool:
        return hasattr(self.model, 'edit')

    @property
    def is_flexible(self) -> bool:
        """Whether it can refine and expand images."""
        return isinstance(self.model, FlexVAR)

    @property
    def side(self) -> int:
        """Pixels per side of the images that it draws; of a tokenizer, of those that are shown to it."""
        if self.is_generator:
            return self.model.native_side
        stride = self.model.stride
        return self.model.fixed_image_size or TOKENIZER_SIDE // stride * stride

    @property
    def device(self) -> str:
        """Name of the device that draws."""
        return device_name(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def title(self) -> str:
        """What the model is, in one line."""
        name = Path(self.source).name
        return f'{type(self.model).__name__}, {name}, {self.side}x{self.side} pixels'

    @property
    def choices(self) -> list[tuple[str, int]]:
        """All classes as (text, id), and the one that means no class."""
        num_classes = self.model.num_classes
        names = self.loaded.classes
        texts = [f'{i} {names[i]}' if names and names[i] != str(i) else str(i) for i in range(num_classes)]
        return [*zip(texts, range(num_classes), strict=True), ('no class', num_classes)]

    def _start(self) -> dict[str, Any]:
        """The settings that the page begins with: of the preset that suits the weights, else the defaults."""
        family = self.loaded.family
        for name, preset in SAMPLE_PRESETS[family].items():
            if default_sampling(family, name) == self.loaded.sampling:
                return preset
        return {}

    # ------------------------------------------------------------------------------ jobs
    def job(self, entered: Sequence[Any], seed: Any = 0, labels: Sequence[int] = (),
            num_images: Any = 1) -> SampleConfig:
        """What was entered, as a job of sample.py.

        Args:
            entered: a value for each of `controls`.
            labels: class ids, which the images have in turn; none are all classes.
        Raises:
            ValueError: a value is none of its setting, or the job is too large for a page.
        """
        seed = value_of(SEED, seed)
        num_images = value_of(NUM_IMAGES, num_images)
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f'the seed must be in 0..{LARGEST_SEED}, got {seed}: enter another one')
        values = {control.name: value_of(control, value)
                  for control, value in zip(self.controls, entered, strict=True)}
        return self._with(values, seed=seed, num_images=num_images, classes='_'.join(map(str, labels)))

    def _with(self, values: dict[str, Any], **more: Any) -> SampleConfig:
        """A job with these settings, which is not too large."""
        family = self.loaded.family
        job = SAMPLE_CONFIGS[family](
            model=family,
            ckpt=self.source,
            vae_ckpt=self.vae_ckpt,
            weights=self.weights,
            precision=self.precision,
            output=OUTPUT,
            overwrite=True,
            **values,
            **more,
        )
        job.check_model(self.model)
        self._check_extent(job)
        return job

    def _check_extent(self, job: SampleConfig) -> None:
        """Make sure that a page may draw so much.

        Raises:
            ValueError: there are too many images, pixels or steps.
        """
        if not 1 <= job.num_images <= MOST_IMAGES:
            raise ValueError(f'the page draws 1 to {MOST_IMAGES} images at a time, got {job.num_images}: '
                             'sample.py draws more')
        options = job.sample_kwargs()
        sides = options.get('infer_patch_nums') or ()
        if len(sides) > MOST_SCALES:
            raise ValueError(f'the page draws at most {MOST_SCALES} scales, got {len(sides)}: enter fewer')
        steps = max(options.get('num_steps') or 0, options.get('lower_steps') or 0)
        if steps > MOST_STEPS:
            raise ValueError(f'the page takes at most {MOST_STEPS} steps, got {steps}: enter fewer')
        lengths = [self.side, *(side * self.loaded.tokenizer.stride for side in sides)]
        for name in ('image_size', 'image_size_eval'):
            size = options.get(name) or 0
            lengths += size if isinstance(size, tuple) else [size]
        longest = max(lengths)
        if longest > max(LONGEST_SIDE, self.side):
            raise ValueError(f'the page draws at most {LONGEST_SIDE} pixels per side, got {longest}: enter a '
                             'smaller size')
        most_images = max(MOST_PIXELS // longest ** 2, 1)
        if job.num_images > most_images:
            raise ValueError(f'the page draws at most {most_images} images of {longest} pixels per side, got '
                             f'{job.num_images}: enter fewer')
        # The sides are stretched to the size that is drawn.
        last = max(sides, default=1) * self.loaded.tokenizer.stride
        num_codes = job.num_images * sum((side * longest / last) ** 2 for side in sides)
        if num_codes > MOST_CODES:
            raise ValueError(f'the page draws at most {MOST_CODES:,} codes at a time, got {num_codes:,.0f}: '
                             'enter fewer scales or images')

    # ------------------------------------------------------------------------------ drawing
    def sample(self, job: SampleConfig) -> Iterator[Drawn]:
        """Draw the images of a job, and show them after each scale; image i is that of sample.py.

        Raises:
            ValueError: an image has pixels that are not finite, or another job has begun.
        """
        label_N = self.loaded.label_ids(job.class_ids or None, job.num_images)
        noise = ImageNoise(job.seed, range(job.num_images))
        growing = self.model.growing(label_N, rng=noise, **job.sample_kwargs())
        with self._alone():
            self._growing = growing

        drawn = None
        num_scales = 0
        seconds = 0.
        while True:
            # The model is free between two scales, for a job that ends this one.
            begin = time.perf_counter()
            with self._lock:
                if self._growing is not growing:
                    raise ValueError('another job has begun, which ended this one: draw again')
                with torch.inference_mode(), autocast(self._device.type, self.precision):
                    images_B3HW = next(growing, None)
                if images_B3HW is None:
                    break
                images = _as_list(images_B3HW)
            seconds += time.perf_counter() - begin
            num_scales += 1
            drawn = Drawn(images, num_scales, seconds, is_whole=False)
            yield drawn
        yield drawn._replace(is_whole=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The model for one call; a job that stands between two scales, as nobody reads it, is ended.

        A page forgets a job when it is stopped, or its window closed, without a word to the job.
        """
        with self._lock:
            if self._growing is not None:
                self._growing.close()
                self._growing = None
            with torch.inference_mode(), autocast(self._device.type, self.precision):
                yield

    def compare(self, job: SampleConfig, control: Control, text: str) -> Iterator[Row]:
        """The images of a job with each of some values of a setting, from the same noise.

        Args:
            text: the values, see `values_of`.
        Raises:
            ValueError: one is no value of the setting, or see `sample`.
        """
        kept = {one.name: getattr(job, one.name) for one in self.controls}
        jobs = []
        for value in values_of(control, text):
            # All values are checked before the first one is drawn.
            values = kept | {control.name: value}
            jobs.append(self._with(values, seed=job.seed, num_images=job.num_images, classes=job.classes))
        label_N = self.loaded.label_ids(job.class_ids or None, job.num_images)
        for one in jobs:
            with self._alone():
                images_N3HW = draw(self.model, one.seed, range(one.num_images), label_N, one.precision,
                                   one.sample_kwargs())
            value = getattr(one, control.name)
            shown = f'{value:g}' if isinstance(value, float) else value
            yield Row(f'{control.flag} = {shown}', _as_list(images_N3HW), one)

    # ------------------------------------------------------------------------------ images
    def open(self, path: str) -> np.ndarray:
        """An image file, cut to the square that the model draws: uint8 (side, side, 3).

        Raises:
            ImageError: it cannot be read as an image.
        """
        with image_errors(Path(path).name, 'choose another one'), open(path, 'rb') as file:
            image = decode_image(file)
        return self.fitted(image)

    def fitted(self, image: Image.Image) -> np.ndarray:
        """The central square of an image, resized to what the model draws: uint8 (side, side, 3)."""
        _, transform = build_transforms(self.side, mid_reso=1.)
        return to_bytes(transform(image)[None].add(1).mul(0.5))[0]

    def edit(self, image_HW3: np.ndarray, redrawn_HW: np.ndarray, job: SampleConfig, label: int,
             paste: bool) -> np.ndarray:
        """Draw the painted part of an image again: uint8 (H, W, 3).

        Args:
            image_HW3: uint8, of the size that the model draws.
            redrawn_HW: bool, which pixels are painted.
            label: class id, or the one that means no class.
            paste: put the pixels that were not painted over the result.
        Raises:
            ValueError: nothing is painted, or a setting does not suit the image.
        """
        if not redrawn_HW.any():
            raise ValueError('expected a painted part, which is then drawn again, got none: paint over the '
                             'image')
        keep_HW = torch.from_numpy(~redrawn_HW)
        return self._of_image('edit', image_HW3, job, label, keep=keep_HW, paste=paste)

    def refine(self, image_HW3: np.ndarray, job: SampleConfig, label: int, start: int,
               size: int) -> np.ndarray:
        """Draw the fine scales of an image again: uint8 (size, size, 3).

        Args:
            start: scales up to this side stay.
            size: pixels per side of the result.
        """
        self._check_side(size)
        return self._of_image('refine', image_HW3, job, label, start=start, image_size=(size, size))

    def expand(self, image_HW3: np.ndarray, job: SampleConfig, label: int, height: int, width: int,
               paste: bool) -> np.ndarray:
        """Draw around an image, which stands in the middle: uint8 (height, width, 3)."""
        self._check_side(height)
        self._check_side(width)
        corner = (height - len(image_HW3)) // 2, (width - image_HW3.shape[1]) // 2
        return self._of_image('expand', image_HW3, job, label, size=(height, width), corner=corner,
                              paste=paste)

    def _check_side(self, side: int) -> None:
        """Make sure that an image may have such a side.

        Raises:
            ValueError: it is no multiple of the stride, or too long.
        """
        stride = self.loaded.tokenizer.stride
        if side % stride or not stride <= side <= LONGEST_SIDE:
            raise ValueError(f'sides must be multiples of {stride} pixels up to {LONGEST_SIDE}, got {side}: '
                             'enter another one')

    def _of_image(self, method: str, image_HW3: np.ndarray, job: SampleConfig, label: int,
                  **arguments: Any) -> np.ndarray:
        """What a method of the model makes of an image: uint8 (H, W, 3)."""
        # The size is that of the image, or of the arguments.
        options = job.sample_kwargs()
        options.pop('image_size', None)
        noise = ImageNoise(job.seed, range(1))
        with self._alone():
            image_13HW = _as_pixels(image_HW3).to(self._device)
            drawn_13HW = getattr(self.model, method)(image_13HW, labels=[label], rng=noise, **arguments,
                                                     **options)
        return _as_list(drawn_13HW)[0]

    def reconstruct(self, image_HW3: np.ndarray) -> list[Reconstructed]:
        """What the tokenizer makes of an image, scale by scale, with PSNR and codes."""
        tokenizer: Tokenizer = self.loaded.tokenizer
        image_13HW = _as_pixels(image_HW3)
        with self._alone():
            on_device = image_13HW.to(self._device)
            named = tokenizer.progressive(on_device)
            # Continuous codes cannot be counted.
            tokens = [] if tokenizer.vocab_size is None else tokenizer.encode(on_device)
        if not isinstance(tokens, list):
            tokens = [tokens]  # a single map
        original_u8 = to_uint8(image_13HW)
        rows = []
        for k, (scale, rec_13HW) in enumerate(named.items()):
            rec_u8 = to_uint8(rec_13HW.float().cpu())
            codes = tokens[k] if tokens else torch.empty(0)
            rows.append(Reconstructed(
                scale=scale,
                image=rec_u8[0].permute(1, 2, 0).numpy(),
                psnr=psnr(original_u8, rec_u8).item(),
                num_codes=codes.numel(),
                num_distinct=len(codes.unique()),
            ))
        return rows


def painted(layers: Sequence[Image.Image], side: int) -> np.ndarray:
    """(side, side) bool, which pixels of an image are touched by paint on an enlarged copy of it.

    Args:
        layers: RGBA, of the size of the copy, which is a multiple of `side`.
    """
    redrawn_HW = np.zeros((side, side), dtype=bool)
    for layer in layers:
        alpha_HW = np.asarray(layer.convert('RGBA'))[..., 3] >= PAINTED
        rows = np.arange(alpha_HW.shape[0]) * side // alpha_HW.shape[0]
        columns = np.arange(alpha_HW.shape[1]) * side // alpha_HW.shape[1]
        y, x = np.nonzero(alpha_HW)
        redrawn_HW[rows[y], columns[x]] = True
    return redrawn_HW


def _as_list(images_B3HW: torch.Tensor) -> list[np.ndarray]:
    """Images in [0, 1] as a list of uint8 (H, W, 3).

    Raises:
        ValueError: a pixel is not finite.
    """
    if not images_B3HW.isfinite().all():
        raise ValueError('expected finite pixels, an image has nan or infinite ones: the weights are '
                         'damaged, or float16 overflows (start app.py with --fp16=0)')
    return list(to_bytes(images_B3HW))


def _as_pixels(image_HW3: np.ndarray) -> torch.Tensor:
    """(1, 3, H, W) float32 in [-1, 1] of uint8 (H, W, 3)."""
    return torch.from_numpy(image_HW3.copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)
