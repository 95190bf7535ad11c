"""A new family, and a new tokenizer, are one file and one row in each table; no other file knows of them."""
import json

import numpy as np
import pytest
import torch

import configs
import sample
import train
from models import FAMILIES, Family, VQModel
from tests import extension
from tests.runs import read

RUN = ('--data_path=digits', '--mid_reso=1.07', '--workers=0', '--seed=0', '--eval_every=1')


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """The rows that somebody would add to the tables."""
    monkeypatch.setitem(FAMILIES, 'histogram', Family(extension.Histogram, VQModel))
    monkeypatch.setitem(FAMILIES, 'patches', Family(extension.Patches, None))
    monkeypatch.setitem(configs.CONFIGS, 'histogram', extension.TRAINING)
    monkeypatch.setitem(configs.PRESETS, 'histogram', extension.PRESETS)
    monkeypatch.setitem(configs.SAMPLE_CONFIGS, 'histogram', extension.SAMPLING)
    monkeypatch.setitem(configs.SAMPLE_PRESETS, 'histogram', extension.SAMPLE_PRESETS)
    monkeypatch.setitem(configs.CONFIGS, 'patches', extension.PatchesConfig)
    monkeypatch.setitem(configs.PRESETS, 'patches', {})


def steps_of(folder):
    return [json.loads(line) for line in (folder / 'steps.jsonl').read_text().splitlines()]


class Killed(Exception):
    pass


def killed_and_resumed(here, monkeypatch, step, *flags):
    """The same training twice, the first time until it dies before a step."""
    original = train.Run.train_step

    def dies(self, images, labels, number):
        if number == step:
            raise Killed
        return original(self, images, labels, number)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Run, 'train_step', dies)
        here(train, *flags)
    here(train, *flags)


def test_a_fifth_family_trains_resumes_and_samples(here, tmp_path, monkeypatch):
    vq = tmp_path / 'vq'
    here(train, '--model=vq16', '--preset=tiny', '--vocab_size=64', *RUN, '--steps=3', '--bs=16',
         f'--output_dir={vq}')
    flags = ['--model=histogram', '--preset=fast', *RUN, f'--vae_ckpt={vq}/vae-export.pth', '--ema=0.5',
             '--steps=9', '--save_every=2']
    here(train, *flags, f'--output_dir={tmp_path / "once"}')
    killed_and_resumed(here, monkeypatch, 5, *flags, f'--output_dir={tmp_path / "twice"}')
    once, twice = read(tmp_path / 'once'), read(tmp_path / 'twice')
    assert torch.equal(*(c['trainer']['var_ema']['class_emb.weight'] for c in (once, twice)))
    losses = [line['L_mean'] for line in steps_of(tmp_path / 'once')]
    assert losses[0] == pytest.approx(np.log(64), abs=1e-4) and losses[-1] < losses[0] - 0.1
    here(sample, '--model=histogram', f'--ckpt={tmp_path / "once"}/ar-ckpt-last.pth', '--num_images=10',
         f'--output={tmp_path / "images"}')
    assert np.load(tmp_path / 'images.npz')['arr_0'].shape == (10, 32, 32, 3)


def test_a_new_tokenizer_trains_resumes_and_is_exported(here, tmp_path, monkeypatch):
    flags = ['--model=patches', *RUN, '--lpips=none', '--disc=patchgan', '--disc_width=8', '--disc_start=0.5',
             '--adaptive=1', '--bs=64', '--tblr=1e-2', '--ema=0.5', '--steps=8', '--save_every=3']
    here(train, *flags, f'--output_dir={tmp_path / "once"}')
    killed_and_resumed(here, monkeypatch, 5, *flags, f'--output_dir={tmp_path / "twice"}')
    once, twice = (read(tmp_path / name, 'vae-export.pth') for name in ('once', 'twice'))
    assert once['args'] == dict(model='patches')
    assert torch.equal(*(content['model']['decoder.weight'] for content in (once, twice)))
    losses = [line['rec_loss'] for line in steps_of(tmp_path / 'once')]
    assert losses[-1] < losses[0]


def test_the_command_line_knows_them(capsys):
    config = configs.parse_training(['--model=histogram', '--preset=fast', '--vae_ckpt=x'])
    assert (config.images_per_step, config.stride) == (256, 8)
    with pytest.raises(SystemExit):
        configs.parse_training(['--model=patches', '--z_chanels=3'])
    assert "unknown argument '--z_chanels=3': the nearest flag is --z_channels" in capsys.readouterr().err
