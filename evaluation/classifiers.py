"""Image classifiers of torchvision, each with its own preprocessing, and the one of the embedded digits.

Classes are numbered as in training; torchvision and folders of ImageNet agree. Letters: B batch, C classes.
"""
import difflib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from evaluation.digits_features import DigitsFeatures
from evaluation.inception import MissingWeights
from utils.checkpoint import load_with_digest
from utils.misc import full_precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classifier:
    """8-bit images (B, 3, H, W) of any size -> log-probabilities.

    Attributes:
        name: as for `load_classifier`.
        num_classes: C.
        digest: SHA-256 of the weights.
        device: where the network is.
        logits: uint8 (B, 3, H, W) -> (B, C), preprocessing included.
    """

    name: str
    num_classes: int
    digest: str
    device: torch.device
    logits: Callable[[torch.Tensor], torch.Tensor]

    @torch.inference_mode()
    def __call__(self, images_u8: torch.Tensor) -> torch.Tensor:
        """(B, C) float32 log p(class | image), on the device of the classifier."""
        images_u8 = images_u8.to(self.device, non_blocking=True)
        with full_precision():
            logits_BC = self.logits(images_u8).float()
            return logits_BC.log_softmax(1)


def load_classifier(name: str, weights: str = '', device: torch.device | str = 'cpu',
                    download: bool = False) -> Classifier:
    """A classifier in eval mode.

    Args:
        name: a classification model of torchvision, such as convnext_base or swin_v2_b, or 'digits'.
        weights: file of its weights, for any number of classes; empty takes the published ones from torch's
            hub folder. A file with a published name must be the published one, and its preprocessing is used;
            with any other file, images are preprocessed as for torchvision's default weights.
        device: where the network runs.
        download: fetch the published weights into torch's hub folder if they are not there.
    Raises:
        MissingWeights: there is no such file, and it may not or cannot be downloaded.
        ValueError: the name is unknown, or the file is damaged or belongs to another network.
    """
    device = torch.device(device)
    if name == 'digits':
        if weights:
            raise ValueError(f'the classifier of digits fits its own weights, got {weights}: '
                             'leave out --classifier_weights')
        network = DigitsFeatures(device)

        def logits(images_u8: torch.Tensor) -> torch.Tensor:
            return network.outputs(images_u8).logits

        return Classifier(name, network.num_classes, network.digest, device, logits)
    known = models.list_models(module=models)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.)[0]
        raise ValueError(f'expected digits or a classification model of torchvision, got {name!r}: '
                         f'the nearest is {nearest}')

    # The name of a file tells whether it is a published one, and so how images are preprocessed.
    entries = models.get_model_weights(name)
    path = _find_weights(name, entries.DEFAULT, weights, download)
    entry = next((entry for entry in entries if _published_name(entry)[0] == path.name), None)

    def accept(digest: str) -> None:
        if entry and not digest.startswith(_published_name(entry)[1]):
            raise ValueError(f'{str(path)!r} has SHA-256 {digest[:16]}..., expected '
                             f'{_published_name(entry)[1]}...: download {entry.url} again, or rename the '
                             'file if it is another on purpose')

    state, digest = load_with_digest(path, accept)
    preprocess = (entry or entries.DEFAULT).transforms()
    network, num_classes = _load_network(name, state, preprocess.crop_size[0], path)
    logits = nn.Sequential(preprocess, network).to(device).eval()
    return Classifier(name, num_classes, digest, device, logits)


def _published_name(entry: models.WeightsEnum) -> tuple[str, str]:
    """(name of the file, the beginning of its SHA-256, which the name carries)."""
    name = entry.url.rpartition('/')[2]
    return name, re.search(r'-([0-9a-f]{8,})\.', name)[1]


def _find_weights(name: str, entry: models.WeightsEnum, weights: str, download: bool) -> Path:
    """The file that is named, else the published one in torch's hub folder."""
    file_name, digest = _published_name(entry)
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / 'checkpoints' / file_name
    failure = ''
    if download and not weights and not path.is_file():
        logger.info('downloading %s to %s', entry.url, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(entry.url, str(path), hash_prefix=digest, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: the file has another digest
            failure = f', and cannot download them ({error})'
    if not path.is_file():
        raise MissingWeights(f'no weights of {name} at {path}{failure}: fetch {entry.url} '
                             f'({entry.meta["_file_size"]:.0f} MB, SHA-256 {digest}...) and pass '
                             '--classifier_weights=FILE, or pass --download')
    return path


def _load_network(name: str, state: dict[str, Any], crop_size: int,
                  path: Path) -> tuple[nn.Module, int]:
    """The network with the weights `state`, which come from `path`, and its number of classes."""
    options = {}  # options that published weights were trained with and a network without weights lacks
    if name.startswith('vit_'):
        options = dict(image_size=crop_size)
    elif name in ('googlenet', 'inception_v3'):
        options = dict(transform_input=True, init_weights=False)
    try:
        # Published files of DenseNet are older than the names of its layers.
        if name.startswith('densenet'):
            old_name = re.compile(r'\.(norm|conv)\.([12])\.')
            state = {old_name.sub(r'.\1\2.', key): value for key, value in state.items()}

        # The last parameter has a row, or a bias, per class, and so tells how many classes there are.
        network = models.get_model(name, **options)
        head, default = list(network.state_dict().items())[-1]
        num_classes = len(state[head]) if head in state else len(default)
        if num_classes != len(default):
            network = models.get_model(name, num_classes=num_classes, **options)
        network.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'{str(path)!r} holds no weights of {name} ({" ".join(str(error).split())[:200]}): '
                         'pass those of this network') from None
    return network, num_classes
