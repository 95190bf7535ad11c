"""Entry points of torch.hub, for those who want a pipeline without a clone of their own.

    pipe = torch.hub.load('OWNER/REPOSITORY', 'pipeline', 'var_d16')
    images = pipe([207, 360], seed=0)

torch.hub imports this file as it lies in the repository, so that `models`, `utils` and the other packages
here must be the only ones of their names in the process.
"""
import sys
from pathlib import Path

dependencies = ['torch', 'torchvision', 'numpy', 'PIL', 'scipy', 'huggingface_hub', 'safetensors', 'tqdm',
                'yaml']

for _name in ('dist', 'configs', 'models', 'pipeline', 'utils'):
    _place = getattr(sys.modules.get(_name), '__file__', None)
    if _place and Path(__file__).resolve().parent not in Path(_place).resolve().parents:
        raise ImportError(f'this process has imported another `{_name}`, from {_place}: load this repository '
                          'in a process of its own')

from pipeline import Pipeline, load


def pipeline(name: str, **options: object) -> Pipeline:
    """A pipeline by the name of published weights, a path, or an id of the hub.

    Args:
        options: see `pipeline.load`.
    """
    return load(name, **options)
