"""The feature network of digits: accuracy on held-out ones, robustness, the same weights at every start."""
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluation import digits_features as digits
from evaluation.digits_features import DigitsFeatures
from evaluation.metrics import frechet_distance, to_uint8
from utils.data import build_transforms, open_split


@pytest.fixture(scope='module')
def features():
    return DigitsFeatures()


def images_u8(split, transform=None):
    """Images (N, 3, 32, 32) as data sets draw them, and labels."""
    items = [image for image, _ in open_split('digits', split, transform)]
    labels = torch.as_tensor(open_split('digits', split).targets)
    if transform:
        return to_uint8(torch.stack(items)), labels
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in items]), labels


def accuracy(features, images, labels):
    return (features.outputs(images).logits.argmax(1) == labels).double().mean().item()


def test_shapes(features):
    images, _ = images_u8('val')
    pool, spatial, logits = features.outputs(images[:5])
    assert pool.shape == (5, features.num_features) == (5, 64) and pool.dtype == torch.float32
    assert logits.shape == (5, features.num_classes) == (5, 10) and logits.dtype == torch.float32
    assert spatial is None and features.num_spatial == 0 and features.name == 'digits'
    assert torch.equal(features(images[:5]), pool)
    assert (pool >= 0).all()  # after ReLU
    assert (features(images) > 0).any(0).sum() > 40  # most units are alive
    for size in ((8, 8), (7, 20), (1, 1), (36, 36)):
        assert features(torch.zeros(2, 3, *size, dtype=torch.uint8)).isfinite().all()


def test_held_out_digits_are_recognised(features):
    images, labels = images_u8('val')
    assert accuracy(features, images, labels) >= 0.97
    assert accuracy(features, *images_u8('val', build_transforms(32)[1])) >= 0.97  # enlarged and cut
    for shift in [(1, 0), (-1, 0), (0, 1), (0, -1)]:
        padded = F.pad(images, (1, 1, 1, 1))
        moved = padded[:, :, 1 + shift[0]:33 + shift[0], 1 + shift[1]:33 + shift[1]]
        assert accuracy(features, moved, labels) >= 0.96


def test_enlarging_and_batching_change_nothing(features):
    images, _ = images_u8('val')
    whole = features.outputs(images)
    enlarged = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(features(enlarged), whole.pool, rtol=1e-5, atol=1e-4)
    for size in (1, 7, 64):
        parts = [features.outputs(part) for part in images[:128].split(size)]
        for name in ('pool', 'logits'):
            joined = torch.cat([getattr(part, name) for part in parts])
            torch.testing.assert_close(joined, getattr(whole, name)[:128], rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_every_start_fits_the_same_weights(features):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    digits._fit.cache_clear()
    again = DigitsFeatures()
    assert again.digest == features.digest and len(again.digest) == 64
    images, _ = images_u8('val')
    assert torch.equal(again(images), features(images))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


def test_distance_tells_good_from_bad(features):
    def distance(a, b):
        return frechet_distance(*(t for x in (a, b) for t in (x.double().mean(0), x.double().T.cov())))
    real, (held_out, labels) = features(images_u8('train')[0]), images_u8('val')
    near = distance(real, features(held_out))
    noisy = (held_out.float() + 60 * torch.randn(held_out.shape)).clamp(0, 255).byte()
    assert distance(real, features(noisy)) > 2 * near
    assert distance(real, features(held_out[labels < 5])) > 2 * near
    assert distance(real, features(F.avg_pool2d(held_out.float(), 9, 1, 4).byte())) > 2 * near


def test_missing_package_is_named(monkeypatch):
    digits._fit.cache_clear()
    monkeypatch.setitem(sys.modules, 'sklearn.neural_network', None)
    with pytest.raises(ValueError, match='pip install scikit-learn'):
        DigitsFeatures()
