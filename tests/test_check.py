"""`--check` does everything once, finds what would end the run later, and leaves nothing behind."""
import errno
import os
import re

import pytest

import train
from tests.runs import VQVAE_FLAGS, end_within, launch, make_folder, message, start_ranks, training
from training import check
from utils import checkpoint
from utils.data import ClassFolders

PARTS = ['data', 'images', 'model', 'loader', 'first step', 'steps', 'network', 'save', 'load', 'validate']


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def table_of(printed):
    """part -> result."""
    lines = printed.partition('the check:\n')[2].splitlines()
    return dict(re.fullmatch(r'(.+?) +[\d.]+  (.*)', line).groups() for line in lines[1:])


def test_a_generator_passes_beside_its_own_checkpoints(train_here, tmp_path, capsys):
    folder = train_here(tmp_path / 'run', '--ep=1')
    before = contents(tmp_path)
    capsys.readouterr()
    train_here(folder, '--ep=30', '--ema=0.9', '--check')
    assert contents(tmp_path) == before and list(folder.glob('.check*')) == []
    table = table_of(capsys.readouterr().out)
    assert [*table] == [*PARTS, 'sample', 'whole run']
    assert table['data'] == '40 + 8 images of 4 classes'
    assert table['load'] == 'continues at epoch 0, step 1, with equal weights'
    assert table['sample'] == '4 images of 16x16'
    assert table['whole run'].startswith('150 steps take about ')


@pytest.mark.slow
def test_a_tokenizer_passes_on_two_ranks(data, tmp_path):
    folder = tmp_path / 'not' / 'there'
    flags = [f'--data_path={data[0]}', *VQVAE_FLAGS, '--check', f'--output_dir={folder}']
    run = launch('train.py', flags, nproc=2)
    assert not (tmp_path / 'not').exists()
    table = table_of(run.stdout)
    assert [*table] == [*PARTS, 'reconstruct', 'whole run']
    assert re.fullmatch(r'equal weights on 2 ranks, all-reduce \d+\.\d+ GB/s', table['network'])


def broken_validation(tmp_path, monkeypatch):
    images = make_folder(tmp_path / 'images')
    for path in images.glob('val/*/*.png'):
        path.write_bytes(path.read_bytes()[:60])
    return 'images', [f'--data_path={images}'], 'val/ant/00.png'


def full_disk(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(checkpoint, 'write_signed', refuse)
    return 'save', [], 'could not save a checkpoint'


def little_space(tmp_path, monkeypatch):
    monkeypatch.setattr(check.Parts, '_sizes', lambda *_: (10 ** 9, 2 * 10 ** 9))
    return 'save', [], 'the run needs 4 GB for 4 checkpoints'


def other_stride(tmp_path, monkeypatch):
    return 'model', ['--patch_size=8'], 'has stride 4, the flags expect 8'


def overflow(tmp_path, monkeypatch):
    return 'steps', ['--tblr=1e36'], 'is not finite'


@pytest.mark.parametrize('fault', [broken_validation, full_disk, little_space, other_stride, overflow])
def test_a_fault_is_found(train_here, tmp_path, monkeypatch, capsys, fault):
    """One line says what it is, the last line of the table where it was found."""
    part, flags, words = fault(tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=re.escape(words)):
        train_here(tmp_path / 'run', '--ep=1', *flags, '--check')
    *passed, failed = table_of(capsys.readouterr().out).items()
    assert failed[0] == part and failed[1].startswith('FAILED: ') and words in failed[1]
    assert not any(result.startswith('FAILED') for _, result in passed)
    assert not (tmp_path / 'run').exists()


def test_a_folder_that_cannot_be_written_is_found(train_here, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    text = message(lambda: train_here(tmp_path / 'file' / 'run', '--check'), capsys)
    assert 'cannot write into the output folder' in text


@pytest.mark.slow
@pytest.mark.parametrize('model', ['var', 'flexvar', 'flowar', 'npp'])
def test_every_generator_passes(whole_training, here, tmp_path, capsys, model):
    here(train, *whole_training(model, tmp_path / 'run', '--check'))
    assert [*table_of(capsys.readouterr().out)] == [*PARTS, 'sample', 'whole run']
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    ['vqvae', '--disc=patchgan', '--disc_width=8', '--disc_start=0.5'], ['vq16'], ['flexvae'],
    ['kl16', '--lpips=pyramid']], ids=lambda flags: flags[0])
def test_every_tokenizer_passes(here, tmp_path, capsys, flags):
    model, *more = flags
    here(train, f'--model={model}', '--preset=tiny', '--data_path=digits', '--bs=8', *more, '--check',
         f'--output_dir={tmp_path / "run"}')
    assert [*table_of(capsys.readouterr().out)] == [*PARTS, 'reconstruct', 'whole run']


@pytest.mark.slow
def test_a_generator_passes_with_sharded_weights(families, tmp_path):
    flags = training(families['var'], tmp_path / 'run', '--ema=0.9', '--shard', '--check', model='var')
    table = table_of(launch('train.py', flags, nproc=2).stdout)
    assert [*table] == [*PARTS, 'sample', 'whole run']


def blind_rank_1():
    """An image that the second rank alone cannot read, as on a node whose copy of the data is damaged."""
    if os.environ.get('RANK') == '1':
        def refuse(*_):
            raise ValueError('expected an image')
        ClassFolders.__getitem__ = refuse


@pytest.mark.slow
def test_a_fault_of_one_rank_ends_all_of_them(data, tmp_path):
    folder = tmp_path / 'run'
    flags = [f'--data_path={data[0]}', *VQVAE_FLAGS, '--check', f'--output_dir={folder}']
    ranks = start_ranks('train.py', [flags, flags], tmp_path, before=blind_rank_1)
    end_within(ranks, 60)
    assert [rank.exitcode for rank in ranks] == [1, 1]
    assert re.search(r'rank 1 on \S+: expected an image', (tmp_path / '0.err').read_text())
    assert not folder.exists()
