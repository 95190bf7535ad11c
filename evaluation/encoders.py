"""Encoders whose features are compared: one row each in `ENCODERS`, with preprocessing, weights and licence.

Those of FDr^6 see an image as its authors do: as floats, resized by bicubic interpolation with antialiasing,
not rounded, not cropped. FD-DINOv2 and CMMD have preprocessings of their own. All networks but Inception and
that of the digits are built by the optional package timm, without its weights; these come from a file that
was verified.
Letters: B batch, H W height and width, L tokens, F features. `u8` marks 8-bit pixels (B, 3, H, W).
"""
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from evaluation.inception import MissingWeights, Outputs
from evaluation.settings import ENCODER_VARIABLE
from utils.hub import locate, sha256_of
from utils.image_sets import NUM_READERS
from utils.image_store import map_ahead
from utils.misc import full_precision
from utils.tensor_files import load_with_digest

logger = logging.getLogger(__name__)

WEIGHTS_FILE = 'model.safetensors'  # in the repository of the hub, and in a folder named after it
CPU_BATCH = 16                      # images at once on a CPU, so that activations stay below 1 GB
PREPROCESSING_VERSION = 1           # raise it when pixels are prepared in another way

Statistics = tuple[float, float, float]  # of the channels R, G, B
IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)
CLIP_MEAN: Statistics = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Statistics = (0.26862954, 0.26130258, 0.27577711)
HALF: Statistics = (0.5, 0.5, 0.5)


# ---------------------------------------------------------------------------------------------- pixels
def resize_floats(images_u8: torch.Tensor, side: int) -> torch.Tensor:
    """Pixels in [0, 1], then resized, (B, 3, side, side); a few leave [0, 1], and none is rounded."""
    return _bicubic(images_u8.float() / 255, side)


def resize_grey_levels(images_u8: torch.Tensor, side: int) -> torch.Tensor:
    """The same in the other order, as EDM2 has it: grey levels are resized, then divided by 255."""
    return _bicubic(images_u8.float(), side) / 255


def _bicubic(images_B3HW: torch.Tensor, side: int) -> torch.Tensor:
    if images_B3HW.shape[-2:] == (side, side):
        return images_B3HW
    return F.interpolate(images_B3HW, (side, side), mode='bicubic', align_corners=False, antialias=True)


def resize_by_pillow(images_u8: torch.Tensor, side: int) -> torch.Tensor:
    """Resized by Pillow, bicubic, and so rounded to 8 bits; then in [0, 1], (B, 3, side, side)."""
    def resize(image_HW3: np.ndarray) -> np.ndarray:
        image = Image.fromarray(image_HW3)
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))

    images_BHW3 = images_u8.permute(0, 2, 3, 1).cpu().numpy()
    resized = np.stack([*map_ahead(resize, images_BHW3, NUM_READERS)])
    resized_u8 = torch.from_numpy(resized).permute(0, 3, 1, 2)
    return resized_u8.to(images_u8.device).float() / 255


def crop_and_resize_by_pillow(images_u8: torch.Tensor, side: int) -> torch.Tensor:
    """The largest square in the middle, then `resize_by_pillow`."""
    height, width = images_u8.shape[-2:]
    square = min(height, width)
    top = (height - square) // 2
    left = (width - square) // 2
    return resize_by_pillow(images_u8[..., top:top + square, left:left + square], side)


# ---------------------------------------------------------------------------------------------- features
def first_token(network: nn.Module, images_B3HW: torch.Tensor) -> torch.Tensor:
    """The class token after the last norm, (B, F)."""
    tokens_BLF = network.forward_features(images_B3HW)
    return tokens_BLF[:, 0]


def mean_of_map(network: nn.Module, images_B3HW: torch.Tensor) -> torch.Tensor:
    """The mean over positions of the last map, (B, F), without the norm of timm's head."""
    map_BFhw = network.forward_features(images_B3HW)
    return map_BFhw.mean((2, 3))


def attention_pool(network: nn.Module, images_B3HW: torch.Tensor) -> torch.Tensor:
    """What the pooling head makes of all tokens, (B, F): SigLIP has no class token."""
    tokens_BLF = network.forward_features(images_B3HW)
    return network.attn_pool(tokens_BLF)


def unit_projection(network: nn.Module, images_B3HW: torch.Tensor) -> torch.Tensor:
    """The projected class token of CLIP, (B, F), divided by its length."""
    projected_BF = network(images_B3HW)
    return F.normalize(projected_BF.float(), dim=1)


# ---------------------------------------------------------------------------------------------- positions
def resample_as_hub(positions_1LF: torch.Tensor, side: int) -> torch.Tensor:
    """Learned positions of DINOv2 for a grid of another side, as the authors' repository makes them.

    It scales by (side + 0.1) / old side and without antialiasing. timm resamples to the size itself and with
    antialiasing, which is another function: features then differ by a tenth.

    Args:
        positions_1LF: position of the class token, then those of a square grid.
        side: patches per side of the new grid.
    """
    num_patches = positions_1LF.shape[1] - 1
    old_side = round(num_patches ** 0.5)
    class_11F, grid_1LF = positions_1LF.split([1, num_patches], dim=1)
    grid_1Fhw = grid_1LF.unflatten(1, (old_side, old_side)).permute(0, 3, 1, 2)
    factor = (side + 0.1) / old_side
    resampled_1Fhw = F.interpolate(grid_1Fhw, scale_factor=(factor, factor), mode='bicubic')
    resampled_1LF = resampled_1Fhw.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([class_11F, resampled_1LF], dim=1)


# ---------------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Encoder:
    """A network, and how an image becomes its features.

    Attributes:
        licence: of the weights.
        num_features: F.
        identifier: of timm; also names the repository and the file of its weights. Empty for the networks
            that have modules of their own.
        side: pixels per side of what the network sees.
        mean, std: of the channels, by which pixels in [0, 1] are normalised.
        resize: 8-bit images and a side -> pixels about [0, 1] of this side.
        feature: network and normalised images -> features.
        options: of the constructor of timm.
        positions_side: patches per side to which positions are resampled by `resample_as_hub`; 0 leaves them
            as they are in the file, and timm resamples them.
        dtype: of the published numbers; other ones are marked in their names.
        takes_any_shape: whether images need not be square.
        droppable: beginnings of keys that the file may have and these features do not need.
        statistics: name of a file with statistics of the training images of ImageNet, in a folder of the
            user.
        size: of the file of weights, for messages.
        revision: commit of its repository; '' takes the newest one.
        sha256: of the file; '' where nobody here has seen it.
    """

    licence: str
    num_features: int
    identifier: str = ''
    side: int = 0
    mean: Statistics = IMAGENET_MEAN
    std: Statistics = IMAGENET_STD
    resize: Callable[[torch.Tensor, int], torch.Tensor] = resize_floats
    feature: Callable[[nn.Module, torch.Tensor], torch.Tensor] = first_token
    options: dict[str, Any] = field(default_factory=dict)
    positions_side: int = 0
    dtype: str = 'float32'
    takes_any_shape: bool = False
    droppable: tuple[str, ...] = ()
    statistics: str = ''
    size: str = ''
    revision: str = ''
    sha256: str = ''

    @property
    def repository(self) -> str:
        """On the hub."""
        return f'timm/{self.identifier}'

    @property
    def url(self) -> str:
        """Where the weights can be downloaded."""
        return f'https://huggingface.co/{self.repository}/resolve/{self.revision or "main"}/{WEIGHTS_FILE}'


def _of_ratios(identifier: str, **values: Any) -> Encoder:
    """An encoder of FDr^6, whose published statistics are of bfloat16 and named after it."""
    name = identifier.replace('.', '_')
    return Encoder(
        identifier=identifier,
        dtype='bfloat16',
        droppable=('head.', 'fc_norm.'),
        statistics=values.pop('statistics', f'{name}_in256_t{values["side"]}_stats.npz'),
        **values,
    )


# Images of any size are padded to whole patches, and positions resampled to them.
ANY_SIZE = dict(num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
NOT_COMMERCIAL = 'CC BY-NC 4.0, no commercial use'
DINOV2 = 'vit_large_patch14_dinov2.lvd142m'
DINOV2_AT_224 = dict(
    licence='Apache-2.0',
    num_features=1024,
    identifier=DINOV2,
    side=224,
    options=dict(num_classes=0, img_size=224),
    positions_side=16,
    droppable=('head.', 'fc_norm.'),
    size='1.22 GB',
)
ENCODERS = {
    # torch-fidelity's Inception, see `evaluation.inception`
    'inception': Encoder('Apache-2.0', 2048, side=299, statistics='guided_diffusion_stats.npz', size='96 MB'),

    # FDr^6, arXiv 2604.28190, table B.1
    'convnext': _of_ratios(
        'convnextv2_base.fcmae_ft_in22k_in1k',
        licence=NOT_COMMERCIAL,
        num_features=1024,
        side=224,
        feature=mean_of_map,
        options=dict(num_classes=0),
        statistics='convnext_in256_t224_stats.npz',
        size='355 MB',
    ),
    'dinov2': _of_ratios(
        DINOV2,
        licence='Apache-2.0',
        num_features=1024,
        side=256,
        options=ANY_SIZE,
        size='1.22 GB',
    ),
    'mae': _of_ratios(
        'vit_large_patch16_224.mae',
        licence=NOT_COMMERCIAL,
        num_features=1024,
        side=224,
        options=ANY_SIZE,
        size='1.22 GB',
    ),
    'siglip': _of_ratios(
        'vit_so400m_patch16_siglip_256.v2_webli',
        licence='Apache-2.0',
        num_features=1152,
        side=224,
        mean=HALF,
        std=HALF,
        feature=attention_pool,
        options=ANY_SIZE,
        size='1.7 GB',
    ),
    'clip': _of_ratios(
        'vit_large_patch14_clip_224.openai',
        licence='Apache-2.0',
        num_features=1024,
        side=256,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        options=ANY_SIZE,
        size='1.22 GB',
    ),

    # FD-DINOv2, arXiv 2306.04675: of dgm-eval, and of EDM2
    'dinov2_dgm': Encoder(
        **DINOV2_AT_224,
        resize=resize_by_pillow,
        statistics='dinov2_dgm_stats.npz',
    ),
    'dinov2_edm2': Encoder(
        **DINOV2_AT_224,
        resize=resize_grey_levels,
        statistics='dinov2_edm2_stats.npz',
    ),

    # CMMD, arXiv 2401.09603
    'clip336': Encoder(
        'Apache-2.0',
        768,
        identifier='vit_large_patch14_clip_quickgelu_336.openai',
        side=336,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        resize=crop_and_resize_by_pillow,
        feature=unit_projection,
        options=dict(num_classes=768),
        takes_any_shape=True,
        statistics='clip336_stats.npz',
        size='1.22 GB',
    ),

    # for the embedded digits alone, see `evaluation.digits_features`
    'digits': Encoder('BSD-3-Clause', 64, side=8, statistics='digits_stats.npz'),
}


# ---------------------------------------------------------------------------------------------- weights
class FoundWeights(NamedTuple):
    """Where weights were looked for."""
    path: Path | None      # None if they are nowhere
    places: list[str]      # all places that were tried, for messages


def look_for_weights(encoder: Encoder, folder: str = '', cache: str = '') -> FoundWeights:
    """The file of an encoder's weights on this machine; nothing is downloaded.

    Args:
        folder: see `find_weights`.
        cache: see `find_weights`.
    Raises:
        ValueError: `folder` is a file.
    """
    named = folder or os.environ.get(ENCODER_VARIABLE, '')
    if Path(named).is_file():
        raise ValueError(f'expected a folder of weights, got the file {named}: pass the folder that holds '
                         f'{encoder.identifier}.safetensors; a .pkl can run code and is never read')
    places = []
    for place in dict.fromkeys([folder, os.environ.get(ENCODER_VARIABLE, ''), cache]):
        if not place:
            continue
        for path in (Path(place) / f'{encoder.identifier}.safetensors',
                     Path(place) / encoder.identifier / WEIGHTS_FILE):
            places.append(str(path))
            if path.is_file():
                return FoundWeights(path, places)
    places.append(f'the cache of the hub ({encoder.repository})')
    try:
        # As a process that is not the first of its node, it finds what was fetched, and asks nobody.
        path = locate(f'{encoder.repository}:{WEIGHTS_FILE}', encoder.revision, is_first=False)
    except ValueError:
        path = None
    return FoundWeights(path, places)


def find_weights(key: str, folder: str = '', cache: str = '', download: bool = False) -> Path:
    """The file of the weights of an encoder: in `folder`, $ENCODER_WEIGHTS, `cache`, the cache of the hub.

    Args:
        key: of `ENCODERS`.
        folder: holds <identifier>.safetensors or <identifier>/model.safetensors.
        cache: another such folder.
        download: fetch a missing file into the cache of the hub.
    Raises:
        MissingWeights: there is no such file, and it may not or cannot be downloaded.
        ValueError: `folder` is a file.
    """
    encoder = ENCODERS[key]
    found = look_for_weights(encoder, folder, cache)
    if found.path:
        return found.path
    failure = ''
    if download:
        logger.info('downloading %s', encoder.url)
        try:
            return locate(f'{encoder.repository}:{WEIGHTS_FILE}', encoder.revision)
        except ValueError as error:
            failure = f', and cannot download them ({error})'
    digest = f'SHA-256 {encoder.sha256}' if encoder.sha256 else 'its SHA-256 is not known here'
    raise MissingWeights(f'no weights of {key} at {" or ".join(found.places)}{failure}: fetch {encoder.url} '
                         f'({encoder.size}, {digest}) as {encoder.identifier}.safetensors, and pass '
                         f'--encoder_weights=FOLDER or set {ENCODER_VARIABLE}')


# ---------------------------------------------------------------------------------------------- networks
def build_network(encoder: Encoder, **overrides: Any) -> nn.Module:
    """The network of an encoder in eval mode, with random weights.

    Args:
        overrides: widths and depths of the architecture, for smaller networks of the same classes.
    Raises:
        ValueError: the package timm is missing.
    """
    try:
        import timm
    except ImportError:
        raise ValueError(f'the encoder {encoder.identifier} is in the package timm: '
                         'pip install -r requirements-eval.txt') from None
    # The weights are replaced at once, so that their random numbers are nobody's business.
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(encoder.identifier, pretrained=False, **encoder.options | overrides)
    return network.eval().requires_grad_(False)


def load_weights(network: nn.Module, state: dict[str, torch.Tensor], encoder: Encoder, source: str) -> None:
    """Give a network the weights of a file.

    Args:
        source: of the weights, for errors.
    Raises:
        ValueError: keys are missing or of no use, or shapes differ.
    """
    if encoder.positions_side and 'pos_embed' in state:
        state = state | dict(pos_embed=resample_as_hub(state['pos_embed'].float(), encoder.positions_side))
    expected = network.state_dict().keys()
    missing = sorted(expected - state.keys())
    unexpected = [key for key in sorted(state.keys() - expected) if not key.startswith(encoder.droppable)]
    if missing or unexpected:
        problem = f'{missing[0]} is missing' if missing else f'{unexpected[0]} is of no use here'
        raise ValueError(f'{source} holds no weights of {encoder.identifier} ({problem}): fetch '
                         f'{encoder.url}')
    try:
        network.load_state_dict({key: state[key] for key in expected})
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'{source} holds no weights of {encoder.identifier} ({reason}): fetch '
                         f'{encoder.url}') from None


class EncoderFeatures:
    """8-bit images -> features of a row of `ENCODERS` that timm builds.

    Args:
        key: of `ENCODERS`.
        device: where the network runs.
        folder: see `find_weights`.
        cache: see `find_weights`.
        download: see `find_weights`.
        dtype: 'float32' or 'bfloat16' (by autocast); empty is that of the published numbers.
        allow_unverified: accept another file than the published one, where its digest is known.
        overrides: see `build_network`.
    Attributes:
        digest: SHA-256 of the file of weights.
        path: this file.
        is_pinned: whether it is the published file, whose digest is known.
    Raises:
        MissingWeights: the weights are nowhere.
        ValueError: timm is missing, the file is damaged or another one, or the CPU has no bfloat16.
    """

    num_spatial = 0
    num_classes = 0

    def __init__(self, key: str, device: torch.device | str = 'cpu', folder: str = '', cache: str = '',
                 download: bool = False, dtype: str = '', allow_unverified: bool = False, **overrides: Any):
        self.encoder = ENCODERS[key]
        self.name = key
        self.device = torch.device(device)
        self.dtype = dtype or self.encoder.dtype
        if self.dtype == 'bfloat16' and self.device.type == 'cpu' and not _cpu_has_bfloat16():
            raise ValueError(f'{key} is published in bfloat16, which this CPU does not have: pass '
                             '--encoder_dtype=float32, whose scores are named ..._fp32')
        self.overrides = overrides
        self.path = find_weights(key, folder, cache, download)
        self.digest = sha256_of(self.path)
        self.is_pinned = self.digest == self.encoder.sha256
        if self.encoder.sha256 and not self.is_pinned and not allow_unverified:
            raise ValueError(f'{str(self.path)!r} has SHA-256 {self.digest[:16]}..., expected '
                             f'{self.encoder.sha256[:16]}...: download it again, or pass '
                             '--allow_unverified_weights for other weights')
        self.mean_311 = torch.tensor(self.encoder.mean, device=self.device).view(3, 1, 1)
        self.std_311 = torch.tensor(self.encoder.std, device=self.device).view(3, 1, 1)

    @cached_property
    def network(self) -> nn.Module:
        """The network with its weights, loaded when it is used first: stored features need none."""
        def accept(digest: str) -> None:
            if digest != self.digest:
                raise ValueError(f'{str(self.path)!r} was replaced since it was looked at: run the same '
                                 'command again')

        state, _ = load_with_digest(self.path, accept)
        network = build_network(self.encoder, **self.overrides)
        load_weights(network, state, self.encoder, repr(str(self.path)))
        return network.to(self.device)

    def free(self) -> None:
        """Give back the memory of the network; its next use loads it again."""
        self.__dict__.pop('network', None)

    @property
    def num_features(self) -> int:
        """F of this network, which `overrides` may have made smaller than that of the table."""
        if not self.overrides:
            return self.encoder.num_features
        return self.network.num_classes or self.network.num_features

    @property
    def variant(self) -> str:
        """All that features depend on beside images and weights, for the keys of a cache."""
        timm_version = '.'.join(metadata.version('timm').split('.')[:2])
        return f'{self.dtype} {self.encoder.side} {PREPROCESSING_VERSION} timm {timm_version}'

    @torch.inference_mode()
    def outputs(self, images_u8: torch.Tensor) -> Outputs:
        """Features (B, F) float32; there is no spatial layer and no class.

        The settings of TF32 and autocast of the caller have no effect, and are as before afterwards.

        Args:
            images_u8: uint8 (B, 3, H, W) on the device of the network.
        Raises:
            ValueError: the images are not of 8 bits, or not square.
        """
        height, width = images_u8.shape[-2:]
        if images_u8.dtype != torch.uint8:
            raise ValueError(f'expected 8-bit images, got {images_u8.dtype}: round them to uint8 first')
        if height != width and not self.encoder.takes_any_shape:
            raise ValueError(f'{self.name} is defined for square images, got {width}x{height}: crop '
                             'them first')
        if self.device.type == 'cpu' and len(images_u8) > CPU_BATCH:
            parts = [self.outputs(part).pool for part in images_u8.split(CPU_BATCH)]
            return self._as_outputs(torch.cat(parts))
        with full_precision():
            with torch.autocast(self.device.type, enabled=False):
                pixels_B3HW = self.encoder.resize(images_u8, self.encoder.side)
                normalised_B3HW = (pixels_B3HW - self.mean_311) / self.std_311
            is_half = self.dtype == 'bfloat16'
            with torch.autocast(self.device.type, torch.bfloat16, enabled=is_half, cache_enabled=False):
                features_BF = self.encoder.feature(self.network, normalised_B3HW)
        return self._as_outputs(features_BF.float())

    def _as_outputs(self, features_BF: torch.Tensor) -> Outputs:
        return Outputs(features_BF, None, features_BF[:, :0])

    def __call__(self, images_u8: torch.Tensor) -> torch.Tensor:
        """Features alone, (B, F)."""
        return self.outputs(images_u8).pool


def _cpu_has_bfloat16() -> bool:
    """Whether products of bfloat16 are computed as such here, and not one by one in software."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
