"""`--auto_batch` finds how many images fit at a time, and leaves the batch of the optimizer as it is."""
import re

import pytest
import torch

from bench.counter import cost_of
from configs import parse_training
from tests.runs import VAR_FLAGS, WHOLE, read, same_weights, start_ranks, training
from training import auto_batch
from training.auto_batch import GIB, MOST_USED, Trials, fit_batch, largest_that_fits

PLENTY = 2 ** 50


# ---------------------------------------------------------------------------------------------- the search
@pytest.mark.parametrize(('num_images', 'limit', 'expected', 'tried'), [
    (96, 36, 24, [1, 2, 3, 4, 6, 8, 12, 16, 24]),
    (96, 1000, 96, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]),
    (96, 11.5, 1, [1, 2]),
    (97, 40, 1, [1, 2]),          # nothing but 97 divides it
    (15, 14, 3, [1, 2, 3]),       # two images are tried for the growth, and do not divide it
    (1, 11, 1, [1]),
])
def test_the_largest_divisor_that_fits(num_images, limit, expected, tried):
    """And nothing is tried that does not fit, once two peaks tell how fast memory grows."""
    asked = []

    def peak_of(size):
        asked.append(size)
        return 10 + size

    assert largest_that_fits(num_images, peak_of, limit) == (expected, 10 + expected)
    assert asked == tried


def test_memory_that_runs_out_before_the_forecast_ends_the_search():
    def peak_of(size):
        return 10 + size if size < 6 else float('inf')

    assert largest_that_fits(12, peak_of, 100) == (4, 14)
    with pytest.raises(ValueError, match=r'not even one image at a time fits into 0\.0 GiB'):
        largest_that_fits(12, peak_of, 5)


@pytest.mark.parametrize('flags', [
    ['--model=var', '--bs=768'],
    ['--model=var', '--bs=767', '--allow_round=1'],
    ['--model=var', '--bs=768', '--ac=4'],
    ['--model=flowar', '--bs=2048', '--img_size=256', '--batch_size=12', '--ac=2'],
    ['--model=npp', '--bs=256'],
], ids=' '.join)
def test_micro_steps_leave_the_batch_of_the_optimizer(flags):
    config = parse_training(flags)
    images = config.micro_batch(8) * config.accumulate
    for accumulate in (1, 2, 4):
        split = config.in_micro_steps(accumulate, 8)
        assert split.accumulate == accumulate
        assert split.micro_batch(8) * accumulate == images
        assert split.peak_lr(8) == pytest.approx(config.peak_lr(8))
        split.check_batch(8)


# ---------------------------------------------------------------------------------------------- trial steps
@pytest.fixture
def counted(monkeypatch):
    """Peaks are those of the tensors that a trial step makes, which are the same every time."""
    micro_step = Trials._micro_step
    peaks = []

    def count(self, num_images, stepping):
        peaks.append(cost_of(lambda: micro_step(self, num_images, stepping)).peak_bytes)

    monkeypatch.setattr(Trials, '_micro_step', count)
    monkeypatch.setattr(auto_batch, 'peak_since', lambda _: peaks[-1])
    monkeypatch.setattr(auto_batch, 'memory_of_rank', lambda _: PLENTY)


def gib_an_image(self, num_images, stepping=False):
    """Stands for `Trials._peak_here`: a trial step takes 1 GiB for each image."""
    self._micro_step(num_images, stepping)
    return num_images * GIB


def plant(monkeypatch, num_images):
    """Let this process have the memory for so many images at a time."""
    monkeypatch.setattr(Trials, '_peak_here', gib_an_image)
    monkeypatch.setattr(auto_batch, 'memory_of_rank', lambda _: (num_images + 0.5) * GIB / MOST_USED)


@pytest.mark.slow
def test_a_training_that_does_not_fit_is_split(train_here, tmp_path, monkeypatch, capsys):
    """It is the training with that --ac to the last bit, and keeps it when it goes on with more memory."""
    plant(monkeypatch, 2)
    auto = train_here(tmp_path / 'auto', '--ep=1', '--auto_batch')
    line, = re.findall(r'--auto_batch: .*', capsys.readouterr().out)
    assert line == '--auto_batch: 2 images at a time fit (peak 2.0 of 2.7 GiB): --bs=8 --ac=4'
    assert read(auto)['args']['accumulate'] == 4 and read(auto)['args']['images_per_step'] == 8

    plant(monkeypatch, 8)
    train_here(auto, '--ep=2', '--sche=flat', '--wp=1', '--auto_batch')
    assert '--auto_batch:' not in capsys.readouterr().out
    by_hand = tmp_path / 'by_hand'
    train_here(by_hand, '--ep=1', '--ac=4')
    train_here(by_hand, '--ep=2', '--sche=flat', '--wp=1', '--ac=4')
    assert same_weights(read(auto), read(by_hand))


def test_another_number_of_ranks_tries_anew(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Trials, '_peak_here', lambda self, num_images, stepping=False: num_images)
    config = parse_training([f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', *VAR_FLAGS, '--auto_batch',
                             f'--output_dir={tmp_path}'])
    for ranks_before, expected in ((1, 4), (2, 1)):
        assert fit_batch(config, 4, dict(accumulate=4), ranks_before).accumulate == expected
    assert fit_batch(config, 4, dict(accumulate=3), 1).accumulate == 1  # --bs is another one now


@pytest.mark.slow
def test_what_a_step_takes_is_seen_on_this_machine(data, tmp_path, capsys):
    """Without a planted limit: two more of large tensors show in the peak, and a tiny training fits."""
    device = torch.device('cpu')
    auto_batch.forget_peak(device)
    before = auto_batch.peak_since(device)
    torch.ones(2, 2 ** 24)
    assert auto_batch.peak_since(device) - before == pytest.approx(2 ** 27, rel=0.1)
    assert auto_batch.peak_since(device) < auto_batch.memory_of_rank(device)
    config = parse_training([f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', *VAR_FLAGS, '--auto_batch',
                             f'--output_dir={tmp_path}'])
    assert fit_batch(config, 4, {}, None) == config


@pytest.mark.slow
@pytest.mark.parametrize('more', [(), ('--act_ckpt=block', '--ema=0.9')], ids=' '.join)
@pytest.mark.parametrize('model', WHOLE)
def test_every_family_is_tried_at_its_largest_step(whole_training, tmp_path, counted, model, more):
    trials = Trials(parse_training(whole_training(model, tmp_path, *more)), num_classes=4)
    peaks = [trials.peak(size) for size in (1, 2, 2, 4)]
    assert peaks[0] < peaks[1] == peaks[2] < peaks[3]


# ---------------------------------------------------------------------------------------------- ranks
def little_memory_on_rank_1():
    """Rank 0 has room for four images, rank 1 for two."""
    Trials._peak_here = gib_an_image
    auto_batch.memory_of_rank = lambda _: (2.5 if auto_batch.dist.get_rank() else 5) * GIB / MOST_USED


@pytest.mark.slow
@pytest.mark.parametrize('more', [(), ('--shard=1',)], ids=' '.join)
def test_ranks_take_what_fits_on_all_of_them(families, tmp_path, more):
    flags = training(families['var'], tmp_path / 'run', '--ep=1', '--auto_batch', *more, model='var')
    ranks = start_ranks('train.py', [flags, flags], tmp_path, before=little_memory_on_rank_1)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / '0.err').read_text()
    said = (tmp_path / '0.out').read_text()
    assert '2 images at a time fit (peak 2.0 of 2.7 GiB): --bs=8 --ac=2' in said
    assert read(tmp_path / 'run')['args']['accumulate'] == 2
