"""The demos: their commands parse, their scores mean what they say, and (slow) all of it meets its bars.

The notebooks run on what the demos have trained, and show what is stored in them.
"""
import base64
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from bench import common, demo_flexvar_report, demo_flowar_report, demo_npp_report, demo_var_report, speedrun
from configs import GeneratorConfig, parse_sampling, parse_training
from configs.extraction import parse_extraction
from configs.options import make_parser
from extract import ExtractSettings
from tests.test_imports import REPO
from training.reference import TOKEN_FOLDERS, compared_settings, stored_entries


def commands(script: str) -> list[list[str]]:
    """Script and flags of every torchrun command of a demo, in order."""
    env = {**os.environ, 'PYTHON': 'echo', 'OUT': 'out'}
    echoed = subprocess.run(['bash', str(REPO / 'recipes' / script)], env=env, check=True,
                            capture_output=True, text=True).stdout
    return [line.split('--nproc_per_node=2 ')[1].split() for line in echoed.splitlines()
            if 'torch.distributed.run' in line]


def test_commands_parse_and_fit_together():
    scripts, flags = zip(*((script, rest) for script, *rest in commands('demo.sh')), strict=True)
    assert scripts == ('train.py', 'train.py', 'sample.py')
    trainings = vqvae, var = [parse_training(f) for f in flags[:2]]
    assert (vqvae.model, var.model) == ('vqvae', 'var')
    assert vqvae.patch_nums == var.patch_nums and vqvae.image_size == var.image_size == 32
    assert Path(var.vae_ckpt).parent == Path(vqvae.output_dir)
    for config in trainings:
        config.check_batch(world_size=2)
    sampling = parse_sampling(flags[2])
    assert sampling.num_images >= 1000 and sampling.cfg == 1.5
    assert Path(sampling.ckpt).parent == Path(var.output_dir)


def test_flexvar_commands_parse_and_fit_together():
    scripts, flags = zip(*((script, rest) for script, *rest in commands('demo_flexvar.sh')), strict=True)
    assert scripts == ('train.py',) * 2 + ('sample.py',) * len(demo_flexvar_report.SETTINGS)
    trainings = flexvae, flexvar = [parse_training(f) for f in flags[:2]]
    assert (flexvae.model, flexvar.model) == ('flexvae', 'flexvar')
    assert flexvae.stride == flexvar.stride
    assert Path(flexvar.vae_ckpt).parent == Path(flexvae.output_dir)
    for config in trainings:
        config.check_batch(world_size=2)
    jobs = {Path(job.output).name: job for job in map(parse_sampling, flags[2:])}
    assert jobs.keys() == demo_flexvar_report.SETTINGS.keys()
    for job in jobs.values():
        assert Path(job.ckpt).parent == Path(flexvar.output_dir)
        assert job.cfg == demo_flexvar_report.GUIDANCE - 1
    assert jobs['samples'].num_images >= 1000 and jobs['samples'].sides is None
    assert [len(jobs[name].sides) for name in ('steps_4', 'steps_6')] == [4, 6]
    assert len(flexvar.patch_nums) == 5 and jobs['large'].sides[-1] == 1.5 * flexvar.patch_nums[-1]
    assert (jobs['tall'].size, jobs['wide'].size) == ('72x48', '48x72')


def test_flowar_commands_parse_and_fit_together():
    scripts, flags = zip(*((script, rest) for script, *rest in commands('demo_flowar.sh')), strict=True)
    weightings = demo_flowar_report.WEIGHTINGS
    assert scripts == ('train.py',) + ('train.py', 'sample.py') * len(weightings)
    kl, *trainings = map(parse_training, [flags[0], *flags[1::2]])
    jobs = list(map(parse_sampling, flags[2::2]))
    assert kl.model == 'kl16' and {config.model for config in (*trainings, *jobs)} == {'flowar'}
    assert tuple(config.loss_weighting for config in trainings) == weightings
    for config, job in zip(trainings, jobs, strict=True):
        assert dataclasses.replace(config, loss_weighting='uniform', output_dir=trainings[0].output_dir) \
            == trainings[0], 'they differ in nothing else'
        assert (config.stride, config.image_size) == (kl.stride, kl.image_size)
        assert Path(config.vae_ckpt).parent == Path(kl.output_dir) == Path('out/kl')
        assert Path(job.ckpt).parent == Path(config.output_dir) == Path('out') / config.loss_weighting
        assert Path(job.output) == Path('out') / f'samples_{config.loss_weighting}'
        assert job.num_images >= 1000 and job.cfg == demo_flowar_report.GUIDANCE
        assert job.weights == 'ema' and config.ema
    assert jobs[0].seed == jobs[1].seed
    for config in (kl, *trainings):
        config.check_batch(world_size=2)


@pytest.mark.parametrize('recipe', ['demo', 'demo_flexvar', 'demo_flowar', 'demo_npp'])
def test_stored_curves_are_of_the_trainings_of_the_recipe(recipe):
    entries = stored_entries()
    trainings = [parse_training(flags) for script, *flags in commands(f'{recipe}.sh') if script == 'train.py']
    for config in trainings:
        entry = entries[f'{recipe}/{Path(config.output_dir).name}']
        stored = type(config)(**entry['settings'])
        assert compared_settings(config) == compared_settings(stored)
        if isinstance(config, GeneratorConfig):
            assert entry['tokenizer'] == f'{recipe}/{Path(config.vae_ckpt).parent.name}'
            assert [*entry['tokens']] == [name for name in TOKEN_FOLDERS if getattr(config, name, '')]
        last_step = {name: band['steps'][-1] for name, band in entry['curves'].items()}
        assert len(last_step) == 2 and len({*last_step.values()}) == 1
    assert len(trainings) == len([name for name in entries if name.startswith(f'{recipe}/')])


def test_npp_commands_parse_and_fit_together():
    scripts, flags = zip(*((script, rest) for script, *rest in commands('demo_npp.sh')), strict=True)
    assert scripts == ('train.py',) + ('extract.py',) * 2 + ('train.py',) * 2 + ('sample.py',) * 2
    vq, npp, plain = trainings = [parse_training(flags[i]) for i in (0, 3, 4)]
    assert (vq.model, npp.model, plain.model) == ('vq16', 'npp', 'npp')
    parser = make_parser(ExtractSettings, 'extract.py', '')
    extractions = train_codes, val_codes = [ExtractSettings(**parser.parse(f)) for f in flags[1:3]]
    for settings in (*extractions, npp, plain):
        assert Path(settings.vae_ckpt).parent == Path(vq.output_dir)
        assert settings.image_size == vq.image_size and settings.model == 'npp'
    assert (train_codes.split, val_codes.split) == ('train', 'val')
    for config in (npp, plain):
        assert config.cached_path == train_codes.cached_path == 'out/codes'
        assert config.cached_val_path == val_codes.cached_path
        assert config.stride == vq.stride and not config.hflip, 'mirrored digits are none'
    assert dataclasses.replace(npp, patch_level=1, epochs=plain.epochs, output_dir=plain.output_dir) == plain
    assert [p for _, p in npp.phases] == [2, 1] and plain.epochs < npp.epochs
    jobs = list(map(parse_sampling, flags[5:]))
    for name, config, job in zip(demo_npp_report.NAMES, (npp, plain), jobs, strict=True):
        assert Path(job.ckpt).parent == Path(config.output_dir) == Path('out') / name
        assert Path(job.output) == Path('out') / f'samples_{name}' and job.num_images >= 1000
    assert (jobs[0].cfg, jobs[0].seed) == (jobs[1].cfg, jobs[1].seed)
    for config in trainings:
        config.check_batch(world_size=2)


def test_scaling_commands_parse_and_fit_together():
    """At least five depths, which differ in nothing but their size, on the tokenizer of the first demo."""
    scripts, flags = zip(*((script, rest) for script, *rest in commands('demo_scaling.sh')), strict=True)
    assert scripts[:3] == ('train.py', 'extract.py', 'extract.py') and set(scripts[3:]) == {'train.py'}
    vqvae, *ladder = [parse_training(rest) for script, rest in zip(scripts, flags, strict=True)
                      if script == 'train.py']
    assert len(ladder) >= 5
    of_demo = parse_training(commands('demo.sh')[0][1:])
    assert dataclasses.replace(vqvae, output_dir=of_demo.output_dir) == of_demo
    train_codes, val_codes = map(parse_extraction, flags[1:3])
    assert (train_codes.split, val_codes.split) == ('train', 'val')
    first = ladder[0]
    for config in ladder:
        of_first = dict(depth=first.depth, width=first.width, output_dir=first.output_dir)
        assert dataclasses.replace(config, **of_first) == first, 'they differ in nothing else'
        assert config.width == config.depth * first.width and not config.hflip
        assert config.cached_path == train_codes.cached_path == 'out/codes'
        assert config.cached_val_path == val_codes.cached_path
        assert config.patch_nums == train_codes.patch_nums == vqvae.patch_nums
        assert Path(config.vae_ckpt).parent == Path(vqvae.output_dir)
        config.check_batch(world_size=2)
    assert len({config.output_dir for config in ladder}) == len(ladder)


def test_speedrun_is_the_demo_with_other_lengths_and_rates():
    """The same digits, codes and number of images, so that its bars mean the same."""
    scripts, flags = zip(*((script, rest) for script, *rest in commands('speedrun.sh')), strict=True)
    of_demo = [rest for _, *rest in commands('demo.sh')]
    assert scripts == ('train.py', 'train.py', 'sample.py')
    free = ('output_dir', 'vae_ckpt', 'steps', 'epochs', 'base_lr', 'depth', 'eval_every', 'tb')
    for mine, theirs in zip(flags[:2], of_demo[:2], strict=True):
        config, demo = parse_training(mine), parse_training(theirs)
        config.check_batch(world_size=2)
        assert dataclasses.replace(config, **{name: getattr(demo, name) for name in free
                                              if hasattr(demo, name)}) == demo
    assert parse_sampling(flags[2]).num_images == parse_sampling(of_demo[2]).num_images


def test_leaderboard_is_in_the_order_of_seconds_and_takes_no_run_that_misses_a_bar(tmp_path):
    path = tmp_path / 'results' / 'speedrun.json'
    for seconds in (120., 100.5, 110.):
        speedrun.add_row(dict(seconds=seconds), path)
    assert [row['seconds'] for row in json.loads(path.read_text())] == [100.5, 110., 120.]

    scores = dict(demo_var_report.BARS, distance=speedrun.MAX_DISTANCE)
    assert speedrun.missed_bars(scores) == []
    assert speedrun.missed_bars(scores | dict(distance=3.01)) == ['distance 3.010 > 3.0']
    assert speedrun.missed_bars(scores | dict(class_accuracy=0.949)) == ['class_accuracy 0.949 < 0.95']


@pytest.mark.parametrize(('epochs', 'expected'), [
    (4, [(10., 5.), (30., 3.)]), (5, [(10., 5.), (30., 3.), (40., 2.)])])
def test_npp_curves_are_by_the_cost_of_each_phase(tmp_path, epochs, expected):
    """Two epochs of patches, which cost less, then codes; the end of the training is always there."""
    config = parse_training(['--model=npp', f'--epochs={epochs}', '--eval_every=2'])
    torch.save(dict(args=vars(config), run=dict(steps_per_epoch=10)), tmp_path / 'ar-ckpt-last.pth')
    losses = {4: [None, 5., 5., 3.], 5: [None, 5., 5., 3., 2.]}[epochs]  # or the last known
    lines = [dict(it=10 * epoch, vL_mean=loss) for epoch, loss in enumerate(losses, start=1)]
    (tmp_path / 'log.txt').write_text('\n'.join(map(json.dumps, [dict(name='run'), *lines])))
    assert demo_npp_report.history(tmp_path, {2: 0.5, 1: 1.}) == expected


def test_judge_sees_images_of_any_size_as_its_own():
    small = torch.rand(2, 3, 32, 32) * 2 - 1
    tall = small.repeat_interleave(3, dim=2).repeat_interleave(2, dim=3)
    assert np.array_equal(common.grey(small), small.add(1).div(2).mean(1).flatten(1).numpy())
    flat = torch.tensor([-1., 0.5]).view(2, 1, 1, 1).expand(2, 3, 72, 48)
    assert np.allclose(common.grey(flat), [[0.], [0.75]], atol=1e-6)
    assert np.corrcoef(common.grey(tall).ravel(), common.grey(small).ravel())[0, 1] > 0.8


def test_strips_of_any_tile_width_are_aligned_by_class():
    for width, per_class in ((48, 3), (72, 2)):
        wanted = np.tile(np.arange(10), per_class + 1)
        samples = torch.from_numpy(wanted / 10).float().view(-1, 1, 1, 1).expand(-1, 3, 8, width)
        strip = demo_flexvar_report.class_strip(samples, wanted)
        assert strip.shape == (3, 8, 1554)
        for digit in range(10):
            block = strip[0, 0, digit * 156:digit * 156 + 150]
            assert block[0] == torch.tensor(digit / 10) and (block < 1).sum() == per_class * width


def test_within_class_distance_ignores_other_classes():
    pixels = np.array([[0., 0.], [3., 4.], [100., 0.], [100., 1.]])
    assert common.within_class_distance(pixels, np.array([0, 0, 1, 1])) == pytest.approx((5 + 1) / 2)


def test_curves_of_logs_with_rare_validations(tmp_path):
    lines = dict(vqvae=[dict(it=45, psnr=20.), dict(it=90, psnr=22., vpsnr=21.)],
                 var=[dict(it=23, L_mean=5., acc_mean=1., vL_mean=None, vacc_mean=None),
                      dict(it=46, L_mean=4., acc_mean=2., vL_mean=4.5, vacc_mean=1.5)])
    for model, epochs in lines.items():
        (tmp_path / model).mkdir()
        (tmp_path / model / 'log.txt').write_text('\n'.join(map(json.dumps, [dict(name='run'), *epochs])))
    common.draw_curves(tmp_path / 'curves.png', tmp_path, demo_var_report.CURVES)
    assert (tmp_path / 'curves.png').stat().st_size > 10_000


def assert_notebook_shows_what_is_stored(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a notebook in a kernel on the demos in this folder; it must show what is stored in it.

    Another processor rounds otherwise, so that a training ends elsewhere: pictures have the same sizes and
    show as much, and words are the same, but for the digits of numbers, which differ by a tenth at most.
    """
    monkeypatch.setenv('PYTHONPATH', str(REPO))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for variable in ('CKPT', 'VAE_CKPT', 'IMAGE', 'LABEL'):
        monkeypatch.delenv(variable, raising=False)
    stored = nbformat.read(REPO / name, as_version=4)
    executed = nbformat.read(REPO / name, as_version=4)
    NotebookClient(executed, timeout=300, resources=dict(metadata=dict(path=str(folder)))).execute()
    for cell, expected in zip(executed.cells, stored.cells, strict=True):
        # Warnings of packages depend on what is installed, and are not stored.
        outputs = [output for output in cell.get('outputs', []) if output.get('name') != 'stderr']
        assert_same_outputs(outputs, expected.get('outputs', []))


def assert_same_outputs(outputs: list, expected: list) -> None:
    assert [output.output_type for output in outputs] == [output.output_type for output in expected]
    for output, stored in zip(outputs, expected, strict=True):
        if output.output_type == 'stream':
            words, numbers = words_and_numbers(output.text)
            expected_words, expected_numbers = words_and_numbers(stored.text)
            assert words == expected_words
            assert numbers == pytest.approx(expected_numbers, rel=0.1, abs=0.02)
        elif 'image/png' in stored.data:
            picture = pixels_of(output)
            stored_picture = pixels_of(stored)
            assert picture.shape == stored_picture.shape
            assert picture.std() == pytest.approx(stored_picture.std(), rel=0.2)


def pixels_of(output: dict) -> np.ndarray:
    """The picture of an output."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data['image/png']))).convert('RGB'))


def words_and_numbers(text: str) -> tuple[list[str], list[float]]:
    """A text without its numbers, and these."""
    number = r'[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?'
    words = re.sub(number, '#', text).split()
    return words, [float(found.replace(',', '')) for found in re.findall(number, text)]


def run_demo(script: str, folder: Path, bars: dict[str, float], pictures: tuple[str, ...]) -> dict:
    """The report of a demo, which meets its bars and leaves its pictures."""
    env = {**os.environ, 'PYTHON': sys.executable, 'OUT': str(folder)}
    subprocess.run(['bash', str(REPO / 'recipes' / script)], env=env, check=True)
    report = json.loads((folder / 'report.json').read_text())
    assert all(report[name] >= bar for name, bar in bars.items())
    assert report['seconds'] > 0
    for name in pictures:
        assert (folder / name).stat().st_size > 10_000
    return report


@pytest.mark.slow
def test_speedrun_meets_the_bars_of_the_demo(tmp_path):
    """Everything but the leaderboard, which belongs to whoever runs `make speedrun`."""
    env = {**os.environ, 'PYTHON': sys.executable, 'OUT': str(tmp_path), 'SEED': '3',
           'LEADERBOARD': str(tmp_path / 'leaderboard.json')}
    subprocess.run(['bash', str(REPO / 'recipes' / 'speedrun.sh')], env=env, check=True)
    row = json.loads((tmp_path / 'leaderboard.json').read_text())[0]
    assert not speedrun.missed_bars(row) and row['seconds'] > 0
    assert (tmp_path / 'samples.png').stat().st_size > 10_000


@pytest.mark.slow
def test_demo_meets_its_bars(tmp_path, monkeypatch):
    report = run_demo('demo.sh', tmp_path / 'local_output' / 'demo', demo_var_report.BARS,
                      ('samples.png', 'reconstructions.png', 'curves.png'))
    assert report['num_samples'] >= 1000
    assert_notebook_shows_what_is_stored('demo_sample.ipynb', tmp_path, monkeypatch)


@pytest.mark.slow
def test_flexvar_demo_meets_its_bars(tmp_path, monkeypatch):
    report = run_demo('demo_flexvar.sh', tmp_path / 'local_output' / 'demo_flexvar', demo_flexvar_report.BARS,
                      ('samples.png', 'inpainted.png', 'reconstructions.png', 'curves.png'))
    assert report['num_samples']['samples'] >= 1000
    assert_notebook_shows_what_is_stored('demo_zero_shot_edit.ipynb', tmp_path, monkeypatch)


@pytest.mark.slow
def test_scaling_notebook_shows_what_is_stored(tmp_path, monkeypatch):
    assert_notebook_shows_what_is_stored('demo_scaling_laws.ipynb', tmp_path, monkeypatch)


@pytest.mark.slow
def test_scaling_demo_resumes_and_fits(tmp_path):
    """A ladder of one epoch each; the same command again trains nothing, and fits the same laws."""
    env = {**os.environ, 'PYTHON': sys.executable, 'OUT': str(tmp_path / 'ladder'),
           'TOKENIZER': str(tmp_path / 'vqvae'), 'DEPTHS': '1 2 3 4', 'EPOCHS': '2', 'TOKENIZER_STEPS': '45'}
    reports = []
    for _ in range(2):
        subprocess.run(['bash', str(REPO / 'recipes' / 'demo_scaling.sh')], env=env, check=True)
        reports.append((tmp_path / 'ladder' / 'scaling.json').read_text())
    assert reports[0] == reports[1]
    assert [run['depth'] for run in json.loads(reports[0])['runs']] == [1, 2, 3, 4]
    assert (tmp_path / 'ladder' / 'scaling.png').stat().st_size > 20_000
    for depth in range(1, 5):
        log = (tmp_path / 'ladder' / f'd{depth}' / 'log.txt').read_text()
        assert log.count('"ep": "1/2"') == 1


@pytest.mark.slow
def test_flowar_demo_meets_its_bars(tmp_path):
    report = run_demo('demo_flowar.sh', tmp_path, demo_flowar_report.BARS,
                      ('comparison.png', 'samples_uniform.png', 'samples_debiased.png', 'curves.png'))
    assert report['num_samples'] >= 1000 and report['weightings'].keys() == {'uniform', 'debiased'}


@pytest.mark.slow
def test_npp_demo_meets_its_bars(tmp_path):
    report = run_demo('demo_npp.sh', tmp_path, demo_npp_report.BARS,
                      ('comparison.png', 'samples.png', 'curves.png'))
    assert report['num_samples'] >= 1000 and report['validation_loss'].keys() == {'npp', 'plain'}
