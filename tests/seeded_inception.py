"""Inception weights that follow from a seed: the stored features were made with these."""
import math
from unittest import mock

import numpy as np
import torch
from torch_fidelity import feature_extractor_inceptionv3 as published


def published_shapes():
    """Shape of every published tensor by its name; counters of batch norms are in no file."""
    network = published.FeatureExtractorInceptionV3
    with mock.patch.object(published, 'load_state_dict_from_url', lambda *_, **__: {}), \
            mock.patch.object(network, 'load_state_dict', lambda *_: None):  # it would download weights
        return {name: tuple(t.shape) for name, t in network('inception', ['2048']).state_dict().items()
                if not name.endswith('num_batches_tracked')}


def stream(seed, t, shape):
    """float64 numbers in [-1, 1) of the tensor at place `t` in the order of names: a SplitMix64 stream."""
    mask = 2 ** 64 - 1
    base = np.uint64((seed * 0x9E3779B97F4A7C15 + t * 0xD1B54A32D192ED03) & mask)
    z = base + np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    s = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2. ** -52 - 1
    return s.reshape(shape)


def seeded_inception(seed):
    """The state dict: a stream per tensor."""
    state, shapes = {}, published_shapes()
    for t, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        kind = name.split('.', 1)[1] if name.startswith('fc') else '.'.join(name.split('.')[-2:])
        scale, shift = {'conv.weight': (math.sqrt(6 / math.prod(shape[1:])), 0), 'bn.weight': (0.2, 1),
                        'bn.bias': (0.2, 0), 'bn.running_mean': (0.1, 0), 'bn.running_var': (0.5, 1),
                        'weight': (4 * math.sqrt(3 / 2048), 0), 'bias': (0.1, 0)}[kind]
        state[name] = torch.from_numpy((shift + scale * stream(seed, t, shape)).astype(np.float32))
    return state
