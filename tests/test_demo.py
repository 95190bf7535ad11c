"""The demo: its commands parse, its scores mean what they say, and (slow) all of it meets its bars."""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_imports import REPO
from utils.arg_util import parse_recipe, parse_sample_recipe

sys.path.insert(0, str(REPO / 'bench'))
import demo_report


def test_commands_parse_and_fit_together():
    text = (REPO / 'recipes' / 'demo.sh').read_text().replace('\\\n', ' ')
    shared = next(line.split('"')[1] for line in text.splitlines() if line.startswith('digits='))
    text = text.replace('$digits', shared).replace('"$OUT', '"out')
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith('torchrun ')]
    assert [script for script, *_ in commands] == ['train.py', 'train.py', 'sample.py']
    trainings = vqvae, var = [parse_recipe(flags) for _, *flags in commands[:2]]
    assert (vqvae.model, var.model) == ('vqvae', 'var')
    assert vqvae.patch_nums == var.patch_nums and vqvae.image_size == var.image_size == 32
    assert Path(var.vae_ckpt).parent == Path(vqvae.output_dir)
    for recipe in trainings:
        recipe.check_batch(world_size=2)
    sampling = parse_sample_recipe(commands[2][1:])
    assert sampling.num_images >= 1000 and sampling.cfg == 1.5
    assert Path(sampling.ckpt).parent == Path(var.output_dir)


def test_within_class_distance_ignores_other_classes():
    pixels = np.array([[0., 0.], [3., 4.], [100., 0.], [100., 1.]])
    assert demo_report.within_class_distance(pixels, np.array([0, 0, 1, 1])) == pytest.approx((5 + 1) / 2)


def test_curves_of_logs_with_rare_validations(tmp_path):
    lines = dict(vqvae=[dict(it=45, psnr=20.), dict(it=90, psnr=22., vpsnr=21.)],
                 var=[dict(it=23, L_mean=5., acc_mean=1., vL_mean=None, vacc_mean=None),
                      dict(it=46, L_mean=4., acc_mean=2., vL_mean=4.5, vacc_mean=1.5)])
    for model, epochs in lines.items():
        (tmp_path / model).mkdir()
        (tmp_path / model / 'log.txt').write_text('\n'.join(map(json.dumps, [dict(name='run'), *epochs])))
    demo_report.draw_curves(tmp_path / 'curves.png', tmp_path)
    assert (tmp_path / 'curves.png').stat().st_size > 10_000


@pytest.mark.slow
def test_demo_meets_its_bars(tmp_path):
    env = {**os.environ, 'PYTHON': sys.executable, 'OUT': str(tmp_path)}
    subprocess.run(['bash', str(REPO / 'recipes' / 'demo.sh')], env=env, check=True)
    report = json.loads((tmp_path / 'report.json').read_text())
    assert all(report[name] >= bar for name, bar in demo_report.BARS.items())
    assert report['num_samples'] >= 1000 and report['seconds'] > 0
    for name in ('samples.png', 'reconstructions.png', 'curves.png'):
        assert (tmp_path / name).stat().st_size > 10_000
