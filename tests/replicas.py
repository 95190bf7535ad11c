"""Small encoders whose weights follow from a seed: stored features were made with these."""
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from evaluation import encoders
from evaluation.encoders import ENCODERS, build_network
from tests.seeded_inception import stream

DATA = Path(__file__).parent / 'data' / 'metrics'
STORED = json.loads((DATA / 'encoders.json').read_text())
OF_FILE = {'dinov2_dgm': 'dinov2', 'dinov2_edm2': 'dinov2'}  # encoders that share the file of another one
KEYS = ['convnext', 'dinov2', 'mae', 'siglip', 'clip', 'dinov2_dgm', 'dinov2_edm2', 'clip336']


def overrides_of(key):
    """Widths and depths of the replica of an encoder."""
    stored = STORED['encoders'][OF_FILE.get(key, key)]
    overrides = {name: tuple(value) if isinstance(value, list) else value
                 for name, value in stored['overrides'].items()}
    return overrides | ({'num_classes': stored['num_classes']} if 'num_classes' in stored else {})


def scale_and_shift(name, shape):
    """The rule of README.md of these data."""
    if name in ('pos_embed', 'cls_token') or name.endswith('.latent'):
        return 0.5, 0
    if len(shape) > 1:
        return (3 / np.prod(shape[1:])) ** 0.5, 0
    if name.endswith('.gamma'):
        return 0.2, 0.5
    if name.endswith('.weight') and '.grn.' not in name:
        return 0.2, 1
    return 0.1, 0


def seeded_state(key, seed=STORED['weight_seed']):
    """Weights of the replica of an encoder, as its file holds them."""
    key = OF_FILE.get(key, key)
    shapes = {name: tuple(t.shape) for name, t in build_network(ENCODERS[key], **overrides_of(key))
              .state_dict().items()}
    state = {}
    for t, name in enumerate(sorted(shapes)):
        scale, shift = scale_and_shift(name, shapes[name])
        numbers = shift + scale * stream(seed, t, shapes[name])
        state[name] = torch.from_numpy(numbers.astype(np.float32))
    if 'head.bias' in state:
        state['head.bias'].zero_()
    return state


def write_replicas(folder, keys=KEYS, seed=STORED['weight_seed']):
    """Their files in a folder, as --encoder_weights wants them."""
    folder.mkdir(exist_ok=True)
    for key in dict.fromkeys(OF_FILE.get(key, key) for key in keys):
        save_file(seeded_state(key, seed), folder / f'{ENCODERS[key].identifier}.safetensors')
    return folder


def small_table():
    """A context in which the table holds the replicas in place of the published sizes."""
    rows = {}
    for key in KEYS:
        overrides = overrides_of(key)
        width = overrides.get('num_classes') or overrides.get('embed_dim') or overrides['dims'][-1]
        rows[key] = replace(ENCODERS[key], num_features=width, options=ENCODERS[key].options | overrides)
    return mock.patch.dict(encoders.ENCODERS, rows)
