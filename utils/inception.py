"""Features of the Inception network that FID is defined on (the TensorFlow graph of 2015-12-05).

The network and its TensorFlow-1 resize come from the optional package torch-fidelity; nothing is downloaded.
"""
import os
import pickle
from pathlib import Path

import torch

from utils.hub import sha256_of

WEIGHTS = {  # the same file under its two published names -> where it can be downloaded
    'weights-inception-2015-12-05-6726825d.pth': 'https://github.com/toshas/torch-fidelity/releases/download/'
                                                 'v0.2.0/weights-inception-2015-12-05-6726825d.pth',
    'pt_inception-2015-12-05-6726825d.pth': 'https://github.com/mseitzer/pytorch-fid/releases/download/'
                                            'fid_weights/pt_inception-2015-12-05-6726825d.pth',
}
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
VARIABLE = 'INCEPTION_WEIGHTS'  # environment variable that names the file
NUM_FEATURES = 2048


def find_weights(path: str = '') -> Path:
    """The weights' file: `path`, else that of $INCEPTION_WEIGHTS, else a published name in torch's hub cache.

    Raises:
        ValueError: there is none.
    """
    named = path or os.environ.get(VARIABLE, '')
    cache = Path(torch.hub.get_dir()) / 'checkpoints'
    places = [Path(named)] if named else [cache / name for name in WEIGHTS]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f'no Inception weights at {" or ".join(map(str, places))}: download '
                      f'{next(iter(WEIGHTS.values()))} (95,628,359 bytes, SHA-256 {SHA256}) and pass '
                      f'--inception_weights=FILE or set {VARIABLE}')


class InceptionFeatures:
    """8-bit images (B, 3, H, W) of any size -> pool features (B, 2048) float32.

    Args:
        path: see `find_weights`.
        allow_unverified: accept another file than the published one; its scores compare with nothing.
    Raises:
        ValueError: weights or the package torch-fidelity are missing, or the file is not the published one.
    """

    def __init__(self, path: str = '', device: torch.device | str = 'cpu', allow_unverified: bool = False):
        weights = find_weights(path)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ValueError("the Inception network is in the package torch-fidelity: "
                              "pip install 'torch-fidelity>=0.4,<0.6'") from None
        digest = sha256_of(weights)
        if digest != SHA256 and not allow_unverified:
            raise ValueError(f'{weights} has SHA-256 {digest[:16]}..., expected {SHA256[:16]}...: '
                             'download it again, or pass --allow_unverified_weights for other weights')
        try:
            torch.load(weights, map_location='cpu', weights_only=True)  # below, code in it would run
            self.network = FeatureExtractorInceptionV3('inception', [str(NUM_FEATURES)], str(weights))
        except (RuntimeError, EOFError, pickle.UnpicklingError, AttributeError, TypeError) as error:
            raise ValueError(f'{weights} holds no Inception weights '
                             f'({" ".join(str(error).split())[:200]}): pass the published file') from None
        self.network.to(device)

    @torch.inference_mode()
    def __call__(self, images_u8: torch.Tensor) -> torch.Tensor:
        """Float32 whatever autocast says; the caller sees to it that TF32 is off."""
        with torch.autocast(images_u8.device.type, enabled=False):
            return self.network(images_u8)[0]
