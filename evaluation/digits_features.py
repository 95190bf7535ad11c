"""Features of the embedded digits: what Inception is to photographs, fitted in seconds and without any file.

Letters: B batch, N images, F features, C classes.
"""
import hashlib
from functools import cache

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from torch.nn import functional as F

from evaluation.inception import Outputs
from utils.data import EMBEDDED_SIZE, open_split
from utils.misc import full_precision

SIDE = 8            # pixels per side of what the network sees, as the digits were scanned
NUM_EPOCHS = 60
ROOM = 4            # pixels by which a digit moves or is cut in training


class DigitsFeatures:
    """8-bit images (B, 3, H, W) of any size -> features of a small classifier of scikit-learn's digits.

    Every instance fits the same weights; rounding them removes the differences between machines.

    Attributes:
        digest: SHA-256 of the weights.
    Raises:
        ValueError: the package scikit-learn is missing.
    """

    name = 'digits'
    num_features = 64
    num_spatial = 0
    num_classes = 10

    def __init__(self, device: torch.device | str = 'cpu'):
        weights = [np.float32(weight.round(4)) for weight in _fit((128, self.num_features))]
        content = b''.join(weight.tobytes() for weight in weights)
        self.digest = hashlib.sha256(content).hexdigest()
        self.weights = [torch.from_numpy(weight).to(device) for weight in weights]

    @torch.inference_mode()
    def outputs(self, images_u8: torch.Tensor) -> Outputs:
        """Hidden layer (B, 64) and logits (B, 10), float32; there is no spatial layer."""
        grey_B1HW = images_u8.float().mean(1, keepdim=True) / 255
        pool_BF = F.interpolate(grey_B1HW, (SIDE, SIDE), mode='area').flatten(1)
        *hidden, (last, last_bias) = zip(self.weights[::2], self.weights[1::2], strict=True)

        # In full precision, so that the scores of equal images are equal whatever a training runs in.
        with full_precision(), torch.autocast(images_u8.device.type, enabled=False):
            for weight, bias in hidden:
                pool_BF = F.relu(F.linear(pool_BF, weight, bias))
            logits_BC = F.linear(pool_BF, last, last_bias)
        return Outputs(pool_BF, None, logits_BC)

    def __call__(self, images_u8: torch.Tensor) -> torch.Tensor:
        """The hidden layer alone, (B, 64)."""
        return self.outputs(images_u8).pool


@cache
def _fit(hidden: tuple[int, ...]) -> list[np.ndarray]:
    """Weights (outputs, inputs) and bias of every layer in turn, float64; equal to 1e-10 on all machines."""
    try:
        from sklearn.neural_network import MLPClassifier
    except ImportError:
        raise ValueError('--features=digits needs scikit-learn: pip install scikit-learn') from None
    network = MLPClassifier(hidden, batch_size=100, learning_rate_init=2e-3, random_state=0)
    digits = open_split('digits', 'train')
    scans = [image.convert('L') for image, _ in digits]
    labels_N = np.tile(digits.targets, 2)

    # Each digit comes with a margin and enlarged, as generators see them at a mid_reso of 1.125; a crop then
    # moves the first and cuts the second.
    side = EMBEDDED_SIZE + ROOM
    enlarged = [image.resize((side, side), Image.Resampling.LANCZOS) for image in scans]
    padded = [np.pad(image, ROOM // 2) for image in scans]
    both = np.stack([*padded, *enlarged])
    crops = sliding_window_view(both, (EMBEDDED_SIZE, EMBEDDED_SIZE), axis=(1, 2))

    rng = np.random.RandomState(0)
    for _ in range(NUM_EPOCHS):
        top_N, left_N = rng.randint(0, ROOM + 1, (2, len(labels_N)))
        crop_NHW = crops[np.arange(len(labels_N)), top_N, left_N]
        cells = crop_NHW.reshape(-1, SIDE, EMBEDDED_SIZE // SIDE, SIDE, EMBEDDED_SIZE // SIDE)
        # The mean is float64, so that machines differ in rounding by far less than `digest` and scores show.
        inputs = cells.mean((2, 4)).reshape(-1, SIDE ** 2) / 255
        network.partial_fit(inputs, labels_N, classes=range(10))

    arrays = []
    for weight, bias in zip(network.coefs_, network.intercepts_, strict=True):
        arrays.append(np.ascontiguousarray(weight.T))
        arrays.append(bias)
    return arrays
