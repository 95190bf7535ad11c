"""Activations that are computed again: the same gradients to the last bit, in less memory."""
import pytest
import torch
from torch import nn

from bench.counter import cost_of
from models.noise import GlobalBatch
from models.recompute import set_recompute
from tests.runs import assert_equal
from tests.test_contract import GENERATORS, TOKENIZERS, images_of
from utils.misc import seed_everything

FAMILIES = [('var', {}), ('flexvar', {}), ('npp', {}), ('flowar', {}), ('flowar', dict(cross=True))]
NUM_IMAGES = 6


def assert_recomputes(model, loss, what):
    """Of the second of three micro-steps: gradients stay as they are, and the peak becomes lower."""
    def step():
        seed_everything(0)
        with GlobalBatch(NUM_IMAGES, 3 * NUM_IMAGES):
            loss().backward()

    found = []
    for kind in ('none', what):
        set_recompute(model, kind)
        model.zero_grad()
        step()
        grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                 if parameter.grad is not None}
        found.append((grads, cost_of(step).peak_bytes))
    (expected, most), (grads, fewer) = found
    assert_equal(grads, expected)
    assert fewer < most


@pytest.mark.parametrize('what', ['attention', 'block'])
@pytest.mark.parametrize(('name', 'overrides'), FAMILIES, ids=str)
def test_gradients_of_a_generator_stay_as_they_are(name, overrides, what):
    """With dropout, drop path and dropped labels."""
    row = GENERATORS[name]
    model = row.make(**row.dropout | overrides).train()
    tokens = model.tokenizer.precompute(images_of(NUM_IMAGES))
    label_B = torch.arange(NUM_IMAGES) % 5
    assert_recomputes(model, lambda: model.training_loss(tokens, label_B)[0], what)


@pytest.mark.parametrize('name', ['vqvae', *(pytest.param(name, marks=pytest.mark.slow)
                                             for name in ('vq16', 'vq8', 'flexvae', 'kl16'))])
def test_gradients_of_a_tokenizer_stay_as_they_are(name):
    model = TOKENIZERS[name]().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    images_B3HW = images_of(NUM_IMAGES)

    def loss():
        out = model.reconstruct(images_B3HW)
        return sum((rec - target).square().mean() for target, rec in out.views) + out.latent_loss

    assert_recomputes(model, loss, 'block')
