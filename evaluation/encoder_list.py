"""`evaluate.py encoders`: the encoders, which of their files lie on this machine, and their licences.

Nothing is downloaded and no network is built.
"""
from pathlib import Path

import dist
from evaluation.encoders import ENCODERS, look_for_weights
from evaluation.inception import SHA256 as INCEPTION_SHA256
from evaluation.inception import MissingWeights
from evaluation.inception import find_weights as find_inception
from evaluation.settings import EncodersSettings
from utils.hub import sha256_of


def list_encoders(settings: EncodersSettings) -> str | None:
    """The text for the reader on the master, None on the other ranks."""
    if not dist.is_master():
        return None
    lines = []
    for key, encoder in ENCODERS.items():
        name = encoder.identifier or 'built in'
        lines.append(f'{key}: {name}, {encoder.num_features} features, {encoder.side} px, published in '
                     f'{encoder.dtype}; weights: {encoder.licence}')
        if key != 'digits':
            lines += [f'    {line}' for line in _weights(key, settings)]
        if settings.statistics:
            path = Path(settings.statistics) / encoder.statistics
            lines.append(f'    statistics: {path if path.is_file() else f"{encoder.statistics} is missing"}')
    return '\n'.join(lines)


def _weights(key: str, settings: EncodersSettings) -> list[str]:
    """Where the weights of an encoder are, or where they were looked for."""
    encoder = ENCODERS[key]
    expected = encoder.sha256
    if key == 'inception':
        expected = INCEPTION_SHA256
        try:
            path = find_inception(cache=settings.cache)
        except MissingWeights as error:
            return [f'weights: {error}']
    else:
        path, places = look_for_weights(encoder, settings.encoder_weights, settings.cache)
        if path is None:
            return [f'weights: none at {" or ".join(places)}', f'fetch {encoder.url} ({encoder.size})']
    digest = sha256_of(path)
    pinned = 'the published file' if digest == expected else 'another file than the published one'
    if not expected:
        pinned = 'not pinned: the digest of the published file is not known here'
    return [f'weights: {path}, {path.stat().st_size:,} bytes, SHA-256 {digest} ({pinned})']
