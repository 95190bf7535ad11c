"""Features of the Inception network that FID is defined on (the TensorFlow graph of 2015-12-05).

The network and its TensorFlow-1 resize come from the optional package torch-fidelity; the layers that the
original evaluation of ADM reads are taken from it here. Letters: B batch, F pool features, C classes.
"""
import logging
import os
import shutil
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from evaluation.settings import VARIABLE
from utils.checkpoint import atomic_path, load_with_digest
from utils.files import take_lock
from utils.hub import sha256_of
from utils.misc import full_precision

logger = logging.getLogger(__name__)

WEIGHTS = {  # the same file under its two published names -> where it can be downloaded
    'weights-inception-2015-12-05-6726825d.pth': 'https://github.com/toshas/torch-fidelity/releases/download/'
                                                 'v0.2.0/weights-inception-2015-12-05-6726825d.pth',
    'pt_inception-2015-12-05-6726825d.pth': 'https://github.com/mseitzer/pytorch-fid/releases/download/'
                                            'fid_weights/pt_inception-2015-12-05-6726825d.pth',
}
NUM_BYTES = 95_628_359
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
NUM_FEATURES = 2048
SPATIAL_CHANNELS = 7            # of the 17x17 map that sFID compares
CPU_BATCH = 16                  # images at once on a CPU: more are slower there and need more memory


class MissingWeights(ValueError):
    """The weights are in none of the places where they may be."""

    exit_code = 3  # of a program that ends with this error


class Outputs(NamedTuple):
    """The outputs of one forward pass over a batch; float32, on the device of the network."""
    pool: torch.Tensor            # (B, F) for FID, precision and recall
    spatial: torch.Tensor | None  # (B, 2023) for sFID; None where the network has no such layer
    logits: torch.Tensor          # (B, C) without bias, for the Inception Score


# ---------------------------------------------------------------------------------------------- weights
def find_weights(path: str = '', cache: str = '', download: bool = False) -> Path:
    """The file of the weights: `path`, else $INCEPTION_WEIGHTS, else a published name in a cache.

    If one of the first two names a file, that file must be there: no other one takes its place.

    Args:
        path: a file; empty searches for one.
        cache: a folder to search before torch's hub cache.
        download: fetch a missing file into `cache` or else torch's hub cache.
    Raises:
        MissingWeights: there is no such file, and it may not or cannot be downloaded.
        ValueError: the file is a TensorFlow graph.
    """
    named = path or os.environ.get(VARIABLE, '')
    published, url = next(iter(WEIGHTS.items()))
    if Path(named).suffix == '.pb':
        raise ValueError(f'expected weights for PyTorch, got the TensorFlow graph {named}: '
                         f'pass {published}, which holds the same ones, from {url}')
    hub = Path(torch.hub.get_dir()) / 'checkpoints'
    folders = [Path(cache), hub] if cache else [hub]
    places = []
    if named:
        places.append(Path(named))
    else:
        for folder in folders:
            places += [folder / name for name in WEIGHTS]
    for place in places:
        if place.is_file():
            return place
    failure = ''
    if download and not named:
        try:
            return _download(places[0])
        except OSError as error:
            failure = f', and cannot download them ({error})'
    raise MissingWeights(f'no Inception weights at {" or ".join(map(str, places))}{failure}: fetch {url} '
                         f'({NUM_BYTES:,} bytes, SHA-256 {SHA256}) and pass --inception_weights=FILE '
                         f'or set {VARIABLE}')


def _download(target: Path) -> Path:
    """Fetch the published file; of several processes that want it, one downloads and the others wait.

    Raises:
        OSError: the network fails or gives another file, or the folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f'.{target.name}.lock').open('w') as lock:
        # The lock is held until the file is closed; whoever waited for it finds the weights.
        take_lock(lock, target.parent, wait=True)
        if target.is_file():
            return target
        failures = []
        for url in WEIGHTS.values():
            logger.info('downloading %s to %s', url, target)
            try:
                with atomic_path(target) as temporary:
                    with urllib.request.urlopen(url, timeout=60) as source, temporary.open('wb') as file:
                        shutil.copyfileobj(source, file)
                    digest = sha256_of(temporary)
                    if digest != SHA256:
                        raise OSError(f'{temporary.stat().st_size:,} bytes with SHA-256 {digest} came')
                return target
            except (OSError, HTTPException) as error:
                failures.append(f'{url}: {error}')
    raise OSError('; '.join(failures))


# ---------------------------------------------------------------------------------------------- network
def _load_network(state: dict[str, torch.Tensor], dtype: torch.dtype, path: Path) -> nn.Module:
    """The network of torch-fidelity, which gives pool features, with weights that can hold no code.

    Args:
        path: where the weights come from, for errors.
    Raises:
        ValueError: the package is missing, or the file holds the tensors of something else.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError("the Inception network is in the package torch-fidelity: "
                         "pip install 'torch-fidelity>=0.4,<0.6'") from None
    try:
        # torch-fidelity unpickles whatever its file holds, so it gets a file with these tensors alone. A
        # plain dict has no versions of layers, and then batch norms need no num_batches_tracked.
        with tempfile.NamedTemporaryFile(suffix='.pth') as tensors:
            torch.save(dict(state), tensors.name)
            network = FeatureExtractorInceptionV3('inception', [str(NUM_FEATURES)], tensors.name)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'{str(path)!r} holds no Inception weights '
                         f'({" ".join(str(error).split())[:200]}): pass the published file') from None
    network.feature_extractor_internal_dtype = dtype  # version 0.4 takes the name float64 for float32
    return network.to(dtype)


class InceptionFeatures:
    """8-bit images (B, 3, H, W) of any size -> what FID, sFID and the Inception Score are made of.

    Args:
        path: see `find_weights`.
        device: where the network runs.
        allow_unverified: accept another file than the published one; its scores compare with nothing.
        cache: see `find_weights`.
        download: see `find_weights`.
        dtype: of the arithmetic, 'float32' or 'float64'.
    Attributes:
        digest: SHA-256 of the weights' file.
        dtype: as given.
    Raises:
        MissingWeights: there is no such file.
        ValueError: the package torch-fidelity is missing, or the file is not the published one.
    """

    name = 'inception'
    num_features = NUM_FEATURES
    num_spatial = 17 * 17 * SPATIAL_CHANNELS
    num_classes = 1008

    def __init__(self, path: str = '', device: torch.device | str = 'cpu', allow_unverified: bool = False,
                 cache: str = '', download: bool = False, dtype: str = 'float32'):
        self.dtype = dtype
        weights = find_weights(path, cache, download)

        def accept(digest: str) -> None:
            if digest != SHA256 and not allow_unverified:
                raise ValueError(f'{str(weights)!r} has {weights.stat().st_size:,} bytes and SHA-256 '
                                 f'{digest[:16]}..., expected {NUM_BYTES:,} and {SHA256[:16]}...: '
                                 'download it again, or pass --allow_unverified_weights for other weights')

        state, self.digest = load_with_digest(weights, accept)
        network = _load_network(state, getattr(torch, dtype), weights)
        self.network = network.to(device, memory_format=torch.channels_last)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, _module: nn.Module, _inputs: tuple, map_BCHW: torch.Tensor) -> None:
        # TensorFlow's order of rows, columns, channels: in another one, other numbers stand for sFID.
        self._spatial = map_BCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()

    @torch.inference_mode()
    def outputs(self, images_u8: torch.Tensor) -> Outputs:
        """All features of a batch, in full precision whatever autocast and the settings of TF32 say.

        Args:
            images_u8: uint8 (B, 3, H, W) on the device of the network.
        """
        if images_u8.device.type == 'cpu' and len(images_u8) > CPU_BATCH:
            parts = [self.outputs(part) for part in images_u8.split(CPU_BATCH)]
            return Outputs(
                pool=torch.cat([part.pool for part in parts]),
                spatial=torch.cat([part.spatial for part in parts]),
                logits=torch.cat([part.logits for part in parts]),
            )
        with full_precision(), torch.autocast(images_u8.device.type, enabled=False):
            pool_BF = self.network(images_u8)[0]
            logits_BC = pool_BF @ self.network.fc.weight.T.float()  # without bias, as in the original
        return Outputs(pool_BF, self._spatial, logits_BC)

    def __call__(self, images_u8: torch.Tensor) -> torch.Tensor:
        """Pool features alone, (B, F)."""
        return self.outputs(images_u8).pool
