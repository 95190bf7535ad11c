"""Reader of the reference vectors of FlexVAR, and the tiny models they were made with."""
import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from models import FlexVAE, FlexVAR

DATA = Path(__file__).parent / 'data' / 'flexvar'


@functools.cache
def load_json(name):
    return json.loads((DATA / f'{name}.json').read_text())


@functools.cache
def load_tensors(name):
    return load_file(DATA / f'{name}.safetensors')


def fill(seed):
    """See README.md beside the vectors."""
    def values(name, shape):
        rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2 ** 32)
        a, leaf = rng.standard_normal(shape).astype(np.float32), name.split('.')[-1]
        if leaf == 'scale_mul_1H11':
            return math.log(4) + 0.1 * a
        if leaf in ('bias', 'q_bias', 'v_bias'):
            return 0.05 * a
        if leaf in ('pos_start', 'ada_gss') or name == 'class_emb.weight':
            return 0.3 * a
        if name == 'quantize.embedding.weight':
            return a
        if len(shape) == 1:
            return 1 + 0.1 * a
        gain = 2 if name == 'head.weight' else 1
        return a * np.float32(gain * np.prod(shape[1:], dtype=int) ** -0.5)
    return values


def filled(model, seed):
    """`model` with the weights of the recipe; what its constructor decides stays."""
    own, values = model.state_dict(), fill(seed)
    kept = ('zero_k_bias', 'codebook_used', 'pos_1LC')
    model.load_state_dict({name: t if name.endswith(kept) else
                           torch.from_numpy(np.asarray(values(name, tuple(t.shape)), np.float32))
                           for name, t in own.items()})
    return model


def images(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32))


@functools.cache
def build(name, **overrides):
    """The model of `name`.json in eval mode, over its tokenizer."""
    config = load_json(name)['config']
    vae, var = config['vae'], config['var']
    tokenizer = FlexVAE(vae['V'], vae['dim'], ch=vae['ch'], encoder_ch_mult=vae['ch_mult'],
                        decoder_ch_mult=vae['ch_mult'], z_channels=vae['z'], test_mode=True)
    model = FlexVAR(filled(tokenizer, config['wseed']), num_classes=var['num_classes'], depth=var['depth'],
                    embed_dim=var['C'], num_heads=var['heads'], mlp_ratio=var.get('mlp_ratio', 4.),
                    attn_l2_norm=var['anorm'], shared_aln=var['saln'], cond_drop_rate=var['cond_drop'],
                    **overrides)
    return filled(model, config['wseed']).eval()
