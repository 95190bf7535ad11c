"""Turn weights of any kind into a folder that `pipeline.load` reads: `python export.py CKPT FOLDER`.

The folder holds the weights as safetensors, a config.json and a model card. `--push=owner/name` uploads the
same to a repository of the hub; without FOLDER, to the hub alone.
"""
import logging
import sys
from dataclasses import dataclass

import torch

import dist
from configs.options import check_values, check_weights, expand_paths, opt, parse_settings
from pipeline import load
from utils.console import one_line_errors
from utils.log import setup_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportSettings:
    """What to export, and where to."""

    ckpt: str = opt('', 'weights, see `load` in pipeline.py: a file, a folder, a name', positional=True,
                    path=True)
    folder: str = opt('', 'folder to write; empty only uploads', positional=True, path=True)
    tokenizer: str = opt('', 'tokenizer weights; empty takes those inside CKPT, or the published ones',
                         'vae_ckpt', path=True)
    model: str = opt('', 'family, where the file does not tell it; the family of a tokenizer takes that one '
                         'alone out of a checkpoint of a generator')
    weights: str = opt('ema', 'ema: averaged weights where the file has them; raw: those of the last step; '
                              'ema_0.9999: one of several averages')
    dtype: str = opt('float32', "of the generator's weights in the file",
                     choices=('float32', 'float16', 'bfloat16'))
    push: str = opt('', 'repository of the hub to upload to, owner/name')
    private: bool = opt(False, 'make that repository a private one')

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        check_weights(self.weights, 'weights')
        if not self.ckpt:
            raise ValueError('expected weights: pass CKPT and FOLDER')
        if not (self.folder or self.push):
            raise ValueError('expected where to write to: pass FOLDER, or --push=owner/name')


def export(settings: ExportSettings) -> None:
    """Read the weights, write the folder, upload it.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the weights cannot be used, or the hub cannot be reached.
    """
    loaded = load(settings.ckpt, settings.weights, model=settings.model, tokenizer=settings.tokenizer or None)
    dtype = getattr(torch, settings.dtype)
    if settings.folder:
        loaded.save_pretrained(settings.folder, dtype)
        logger.info('%s with its tokenizer, card and settings is in %r', loaded.family, settings.folder)
    if settings.push:
        logger.info('uploaded: %s', loaded.push_to_hub(settings.push, dtype, settings.private))


def main() -> None:
    """Export what the command line says."""
    settings = parse_settings(ExportSettings, sys.argv[1:], 'export.py',
                              'Turn weights into a folder for the hub.')
    setup_logging(None, dist.is_master())
    export(settings)


if __name__ == '__main__':
    with one_line_errors('export.py'):
        main()
