"""Trainings that stop and go on: exactly as if nothing had happened, from whatever checkpoint is left."""
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import extract
import train
import trainer
from tests.runs import (
    BATCH,
    VQVAE_FLAGS,
    VQVAE_WITH_GAN,
    assert_equal,
    extraction,
    interrupt,
    message,
    read,
    same_weights,
    steps_of,
)
from training.resume import check_settings
from utils.checkpoint import newest_checkpoint
from utils.misc import auto_resume

# ---------------------------------------------------------------------------------------------- exactness
# step before which the training dies -> (epoch, step) from which it then goes on; an epoch has 5 steps
DEATHS = dict(var={7: (1, 1)}, flexvar={7: (1, 1)}, flowar={7: (1, 1)},
              npp={7: (1, 1), 11: (2, 0), 14: (2, 2)})


@pytest.mark.parametrize('model', DEATHS)
def test_resume_is_exact(whole_training, trained_folder, here, tmp_path, model):
    """Order, mirror images, choice of codes, dropout, labels, noise, pyramids, patches and learning rates."""
    command = whole_training(model, tmp_path, '--save_every=3')
    for step, position in DEATHS[model].items():
        interrupt(lambda: here(train, *command), step)
        assert (read(tmp_path)['epoch'], read(tmp_path)['iter']) == position
    here(train, *command)
    final, expected = read(tmp_path), read(trained_folder(model))
    assert_equal(final['trainer'], expected['trainer'])
    assert final['run'] == expected['run']
    assert not same_weights(final, dict(trainer=dict(var_wo_ddp=final['trainer']['var_ema'])))
    straight = {line['step']: line for line in steps_of(trained_folder(model))}
    assert {line['step'] for line in steps_of(tmp_path)} == straight.keys()
    assert all(line == straight[line['step']] for line in steps_of(tmp_path))


def test_resume_of_a_training_on_stored_latents_is_exact(families, whole_training, here, tmp_path):
    here(extract, *extraction(families['flowar'], tmp_path / 'cache'))
    cached = f'--cached_path={tmp_path / "cache"}'
    here(train, *whole_training('flowar', tmp_path / 'a', cached))
    command = whole_training('flowar', tmp_path / 'b', cached, '--save_every=3')
    interrupt(lambda: here(train, *command), 7)
    assert (read(tmp_path / 'b')['epoch'], read(tmp_path / 'b')['iter']) == (1, 1)
    here(train, *command)
    final, expected = read(tmp_path / 'b'), read(tmp_path / 'a')
    assert_equal(final['trainer'], expected['trainer'])
    assert final['run'] == expected['run']


def test_resume_of_a_tokenizer_is_exact(train_here, tmp_path, monkeypatch):
    """Across deferral, k-means (after step 3), restarts (4, 6, 8, 10) and the start of the GAN (5)."""
    monkeypatch.setattr('models.tokenizers.codebook.CHECK_EVERY', 2)
    monkeypatch.setattr('models.tokenizers.codebook.MIN_PATIENCE', 1)
    monkeypatch.setattr('models.tokenizers.codebook.PATIENCE_TOKENS', 0)
    flags = ('--ep=3', '--save_every=1', '--dropout=0.1', '--defer=3', '--disc_start=5')
    expected = read(train_here(tmp_path / 'a', *flags, base=VQVAE_WITH_GAN), 'vae-ckpt-last.pth')
    assert expected['trainer']['training_state']['upkeeps'][0]['num_restarts'] > 0
    for step in (3, 10):
        interrupt(lambda: train_here(tmp_path / 'b', *flags, base=VQVAE_WITH_GAN), step)
    final = read(train_here(tmp_path / 'b', *flags, base=VQVAE_WITH_GAN), 'vae-ckpt-last.pth')
    assert final['trainer'].keys() == {'config', 'training_state', 'vae_wo_ddp', 'vae_opt', 'vae_ema',
                                       'ema_updates', 'criterion', 'disc_opt'}
    assert_equal(final['trainer'], expected['trainer'])


def test_pyramids_of_flexvar_change_from_step_to_step(trained_folder):
    """So that an exact resume says that they follow from seed and step."""
    logged = {tuple(key for key in line if key.startswith('L_'))
              for line in steps_of(trained_folder('flexvar'))}
    assert len(logged) > 3


# ---------------------------------------------------------------------------------------------- going on
def test_finished_run_ends_cleanly_and_keeps_its_weights(train_here, tmp_path):
    train_here(tmp_path, '--ep=1')
    before = read(tmp_path)
    train_here(tmp_path, '--ep=1')
    assert same_weights(before, read(tmp_path))


def test_changed_settings_are_named_on_resume(train_here, tmp_path):
    train_here(tmp_path, '--ep=2')
    train_here(tmp_path, '--ep=1', '--tblr=2e-2', '--save_every=7')
    text = (tmp_path / 'stdout.txt').read_text()
    assert 'another training: tblr 0.01 -> 0.02, ep 2 -> 1\n' in text
    assert 'nothing left to train: the checkpoint holds 10 steps of 5' in text


@pytest.mark.parametrize(('saved', 'words'), [
    (dict(model='npp'), 'with --model=npp, got --model=var: correct it, or start in another output folder'),
    (dict(freeze='head'), 'with --freeze=head, got --freeze=trunk: pass the flag as it was, or start in '
                          'another output folder with --init_from'),
    (dict(model='var', objective='mle'), 'without --freeze, got --freeze=trunk: pass the flag as it was'),
    (dict(freeze='trunk'), 'with --objective=mle, got --objective=cca: correct it, or start in another'),
])
def test_checkpoint_of_another_training(saved, words):
    """Checkpoints of older versions name neither --freeze nor --objective, published ones not the model."""
    config = SimpleNamespace(model='var', freeze='trunk', objective='cca')
    with pytest.raises(ValueError, match=f"'ckpt.pth' was trained {words}"):
        check_settings(Path('ckpt.pth'), dict(args=saved), config)
    check_settings(Path('ckpt.pth'), dict(args=vars(config)), config)
    check_settings(Path('ckpt.pth'), {}, SimpleNamespace(model='var', freeze='', objective='mle'))


def test_best_score_survives_a_restart(train_here, tmp_path, monkeypatch):
    scores = iter([3., 5., 4., 2.])
    evaluate = trainer.GeneratorTrainer.eval_epoch
    monkeypatch.setattr(trainer.GeneratorTrainer, 'eval_epoch',
                        lambda *a: evaluate(*a) | dict(L_tail=next(scores)))
    train_here(tmp_path, '--ep=2', '--eval_every=1')
    assert read(tmp_path, 'ar-ckpt-best.pth')['epoch'] == 1
    train_here(tmp_path, '--ep=3', '--eval_every=1')
    assert read(tmp_path, 'ar-ckpt-best.pth')['epoch'] == 1
    train_here(tmp_path, '--ep=4', '--eval_every=1')
    assert read(tmp_path, 'ar-ckpt-best.pth')['epoch'] == 4


@pytest.mark.parametrize(('save_every', 'expected'), [('', [5, 10]), ('3', [3, 5, 6, 9, 10]),
                                                      ('1m', [*range(1, 11)])])
def test_checkpoints_by_step_and_by_minute(train_here, tmp_path, monkeypatch, save_every, expected):
    positions = []
    monkeypatch.setattr(train.CheckpointWriter, 'save', lambda self, state, step, is_best: positions.append(
        step))
    clock = iter(range(0, 10 ** 6, 60))  # every look at the clock is a minute later
    monkeypatch.setattr(train.time, 'time', lambda: next(clock))
    train_here(tmp_path, '--ep=2', f'--save_every={save_every}')
    assert positions == expected


def test_auto_resume_has_the_published_form(train_here, tmp_path):
    class Args:
        local_out_dir_path = str(tmp_path)
    assert auto_resume(Args, 'ar-ckpt*.pth')[1:] == (0, 0, {}, {})
    train_here(tmp_path, '--ep=2')
    info, epoch, iteration, trainer_state, args_state = auto_resume(Args, 'ar-ckpt*.pth')
    assert (epoch, iteration) == (2, 0) and 'var_wo_ddp' in trainer_state and args_state['depth'] == 1
    assert str(tmp_path) in info[0]


def test_decoder_training_from_a_finished_tokenizer(train_here, tmp_path):
    train_here(tmp_path / 'a', '--ep=1', base=VQVAE_FLAGS)
    ckpt = tmp_path / 'a' / 'vae-ckpt-last.pth'
    train_here(tmp_path / 'b', '--ep=1', f'--init_from={ckpt}', '--train_only=decoder', base=VQVAE_FLAGS)
    first, second = read(tmp_path / 'a', 'vae-export.pth'), read(tmp_path / 'b', 'vae-export.pth')
    for name, value in first.items():
        kept = not name.startswith(('decoder', 'post_quant_conv', 'quantize.ema_vocab_hit'))
        assert not kept or torch.equal(value, second[name]), name
    assert not torch.equal(first['decoder.conv_out.weight'], second['decoder.conv_out.weight'])


def test_other_batch_size_within_an_epoch(train_here, tmp_path, capsys):
    interrupt(lambda: train_here(tmp_path, '--ep=2', '--save_every=2'), 3)
    text = message(lambda: train_here(tmp_path, '--ep=2', f'--bs={BATCH // 2}'), capsys)
    assert 'epoch of 5 steps' in text and '--bs' in text


# ---------------------------------------------------------------------------------------------- what is left
def test_truncated_checkpoint_falls_back_and_says_so(train_here, tmp_path, capsys):
    train_here(tmp_path, '--ep=2', '--eval_every=1')
    last = tmp_path / 'ar-ckpt-last.pth'
    (tmp_path / 'ar-ckpt-best.pth').unlink()
    last.write_bytes(last.read_bytes()[:-1000])
    train_here(tmp_path, '--ep=3', '--eval_every=1')
    text = (tmp_path / 'stdout.txt').read_text()
    assert "ar-ckpt-last.pth' cannot be read" in text and 'falling back' in text
    assert 'resumed from' in text and 'ar-ckpt-prev.pth at epoch 1' in text
    assert read(tmp_path)['epoch'] == 3
    for path in tmp_path.glob('*.pth'):
        path.write_bytes(path.read_bytes()[:500])
    assert 'none of the' in message(lambda: train_here(tmp_path, '--ep=3'), capsys)


def test_full_disk_keeps_the_old_checkpoint(train_here, tmp_path, capsys):
    train_here(tmp_path, '--ep=1')
    before = (tmp_path / 'ar-ckpt-last.pth').read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # no file may grow beyond this
    try:
        text = message(lambda: train_here(tmp_path, '--ep=2'), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'could not save a checkpoint' in text and 'free some space' in text
    assert (tmp_path / 'ar-ckpt-last.pth').read_bytes() == before
    assert not list(tmp_path.glob('.*.tmp'))
    train_here(tmp_path, '--ep=2')
    assert newest_checkpoint(tmp_path, 'ar-ckpt-last.pth')[1]['epoch'] == 2


def test_file_systems_without_hard_links_and_leftovers_of_a_kill(train_here, tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError('no hard links here')
    monkeypatch.setattr('os.link', no_links)
    (tmp_path / '.ar-ckpt-last.pth.tmp').write_bytes(b'half a checkpoint')
    (tmp_path / '.ar-ckpt-prev.pth.tmp').write_bytes(b'half a checkpoint')
    train_here(tmp_path, '--ep=2')
    assert (read(tmp_path, 'ar-ckpt-prev.pth')['epoch'], read(tmp_path)['epoch']) == (1, 2)
    assert not list(tmp_path.glob('.*.tmp'))


def test_a_copied_folder_continues_from_its_last_checkpoint(tmp_path):
    """Copies have other times than the originals."""
    for epoch, name in enumerate(('best', 'prev', 'last')):
        torch.save(dict(epoch=epoch, iter=0, trainer={}), tmp_path / f'ar-ckpt-{name}.pth')
        os.utime(tmp_path / f'ar-ckpt-{name}.pth', ns=(10 ** 18 - epoch, 10 ** 18 - epoch))
    for name in ('last', 'prev', 'best'):
        assert newest_checkpoint(tmp_path, 'ar-ckpt*.pth')[0].stem == f'ar-ckpt-{name}'
        (tmp_path / f'ar-ckpt-{name}.pth').unlink()
