"""A training goes on with another number of processes: same images, same weights but for rounding.

Bit-equal weights would take sums over the batch in one fixed order, whatever rank an image is on: the mean
over ranks of means over their images rounds otherwise than one mean over all images.
"""
import random

import pytest

from tests.faults.test_kills import Victim, flags_of
from tests.runs import launch, read, steps_of

WITHOUT_DROPOUT = dict(  # whose masks are drawn for the images of a rank together
    npp=('--dropout-p=0', '--token-dropout-p=0'),
    flowar=('--attn_dropout=0', '--proj_dropout=0'),
)
TOLERANCE = 1e-6  # largest difference of a weight, over the largest weight of its tensor


def relative_difference(actual, expected):
    """The largest difference between two trees of weights, each over the largest weight of its tensor.

    A bias of keys is left out: attention does not depend on it, so that its gradient is rounding alone.
    """
    worst = 0.
    for name, value in expected.items():
        if value.is_floating_point() and value.isfinite().all() and not name.endswith('qkv.bias'):
            scale = value.abs().max().clamp_min(1e-12)
            worst = max(worst, ((actual[name] - value).abs().max() / scale).item())
    return worst


@pytest.mark.slow
@pytest.mark.parametrize('model', ['var', 'flexvar', 'npp', 'flowar'])
def test_one_two_or_three_processes(families, tmp_path, model):
    rng = random.Random(7)
    more = WITHOUT_DROPOUT.get(model, ())
    straight = tmp_path / 'straight'
    launch('train.py', flags_of(model, families, straight, *more))
    folder = tmp_path / 'changing'
    folder.mkdir()
    victim = Victim(model, flags_of(model, families, folder, *more), folder, tmp_path)
    for processes in (1, 3):
        victim.processes = processes
        assert not victim.run_and_kill('term', rng), 'the run ended before it was stopped'
    launch('train.py', victim.flags, 2)
    difference = relative_difference(read(folder)['trainer']['var_wo_ddp'],
                                     read(straight)['trainer']['var_wo_ddp'])
    print(f'{model}: {difference:.2g}')
    assert [line['step'] for line in steps_of(folder)] == [line['step'] for line in steps_of(straight)]
    assert difference < TOLERANCE
