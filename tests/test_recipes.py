"""Command lines: published flags, defaults and derived values, presets, clear errors."""
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import train
from models import FlexVAR
from tests.golden import load_json
from train import describe
from utils.arg_util import PRESETS, RECIPES, VARRecipe, flag_of, parse_recipe, parse_sample_recipe

REPO = Path(__file__).resolve().parent.parent
# state or derived, no settings
RUNTIME = {'cmd', 'branch', 'commit_id', 'commit_msg', 'acc_mean', 'acc_tail', 'L_mean', 'L_tail',
           'vacc_mean', 'vacc_tail', 'vL_mean', 'vL_tail', 'grad_norm', 'cur_lr', 'cur_wd', 'cur_it',
           'cur_ep', 'remain_time', 'finish_time', 'tb_log_dir_path', 'log_txt_path', 'last_ckpt_path',
           'device', 'local_debug', 'dbg_nan', 'batch_size', 'glb_batch_size', 'patch_nums', 'resos',
           'data_load_reso'}


def shell_flags(path):
    """The flags of the train.py command in a recipe script."""
    command = path.read_text().replace('\\\n', ' ').split('train.py')[1]
    return [flag for flag in shlex.split(command)
            if flag.startswith('--') and not flag.startswith('--data_path')]


def settings(recipe):
    return {flag_of(recipe, name): value for name, value in vars(recipe).items()}


def test_every_published_flag_parses_with_its_default():
    ours = settings(parse_recipe([]))
    for entry in load_json('args')['flags']:
        flag, default = entry['flag'], entry['default']
        if flag in RUNTIME or flag in ('workers', 'local_out_dir_path'):  # workers: automatic here
            continue
        value = {'float': '0.25', 'bool': '1'}.get(entry['type'], '1')
        value = dict(sche='cos', opt='adam', pn='256', mid_reso='1.25').get(flag, value)
        assert ours[flag] == default, flag
        parse_recipe([f'--{flag}={value}'])


@pytest.mark.parametrize('case', load_json('args')['derived'],
                         ids=lambda c: f'{" ".join(c["argv"])} x{c["world_size"]}')
def test_derived_values(case):
    recipe = parse_recipe(case['argv'])
    ours = settings(recipe) | recipe.derived(case['world_size'])
    for name, expected in case.items():
        if name in ('argv', 'world_size', 'log_name', 'ckpt_name', 'pn'):
            continue
        if name == 'workers' and not expected:
            continue
        value = list(ours[name]) if isinstance(ours[name], tuple) else ours[name]
        if isinstance(expected, float):
            expected = pytest.approx(expected, rel=1e-12)
        assert value == expected, name


def test_both_spellings_and_boolean_forms():
    assert parse_recipe(['--base_lr=2e-4']) == parse_recipe(['--tblr=2e-4'])
    for text in ('1', 'true', 'T', 'True', 'tr'):
        assert parse_recipe([f'--saln={text}']).shared_aln is True
    for text in ('0', 'false', 'F', 'fal'):
        assert parse_recipe([f'--anorm={text}']).attn_l2_norm is False
    assert parse_recipe(['--local-rank=3', '--local_rank=1']) == parse_recipe([])


@pytest.mark.parametrize('name', sorted(PRESETS['var'] | PRESETS['flexvar']))
def test_recipe_script_equals_preset(name):
    model = name.split('_')[0]
    preset = parse_recipe([f'--model={model}', f'--preset={name}'])
    assert preset == parse_recipe(shell_flags(REPO / 'recipes' / f'{name}.sh'))
    assert preset.depth == int(re.match(r'\w+_d(\d+)', name)[1])


@pytest.mark.parametrize(('name', 'parameters'), [
    ('var_d16', 310_283_520), ('var_d20', 600_917_136), ('var_d24', 1_033_399_360),
    ('var_d30', 2_010_020_356), ('var_d36_512', 2_353_893_904),
    ('flexvar_d16', 315_561_936), ('flexvar_d20', 607_513_952), ('flexvar_d24', 1_041_314_576)])
def test_dry_run_of_the_published_commands(name, parameters):
    recipe = parse_recipe(shell_flags(REPO / 'recipes' / f'{name}.sh'))
    printed = json.loads(json.dumps(describe(recipe, world_size=8)))
    assert printed['num_parameters'] == parameters
    assert printed['batch_size'] == recipe.batch_size // 8 and printed['bs'] == recipe.batch_size
    assert printed['tlr'] == pytest.approx(recipe.base_lr * recipe.batch_size / 256)
    assert printed['wp'] == recipe.epochs / 50
    assert tuple(printed['patch_nums']) == recipe.patch_nums


def test_dry_run_prints_json_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--depth=36', '--saln=1', '--pn=512', '--dry_run'])
    monkeypatch.setenv('WORLD_SIZE', '8')
    for rank in (0, 1):
        monkeypatch.setenv('RANK', str(rank))
        train.main()
        printed = capsys.readouterr()
        assert printed.err == '' and bool(printed.out) == (rank == 0)
        if rank == 0:
            assert json.loads(printed.out)['batch_size'] == 96
    assert not list(tmp_path.iterdir())


def fails(argv, capsys, parse=parse_recipe):
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(('argv', 'words'), [
    (['--dept=16'], ['--dept', '--depth']),
    (['--learning_rate=1'], ['--learning_rate', 'nearest']),
    (['16'], ["'16'", 'nearest']),
    (['--pn=1_2_x'], ['1_2_x']),
    (['--fp16=3'], ['--fp16', '3']),
    (['--sche=step'], ['--sche', 'step']),
    (['--opt=sgd'], ['--opt', 'sgd']),
    (['--pn=3_2_1'], ['--pn', 'coarse to fine']),
    (['--depth=0'], ['--depth', 'at least 1']),
    (['--vfast=9'], ['--vfast', '[0, 3]']),
    (['--tblr=-1'], ['--tblr']),
    (['--workers=-5'], ['--workers']),
    (['--mid_reso=0.5'], ['--mid_reso']),
    (['--model=vqvae', '--vocab_size=0'], ['--vocab_size']),
    (['--saln=maybe'], ['maybe']),
    (['--depth=deep'], ['--depth', 'deep']),
    (['--bs=0'], ['--bs']),
    (['--ep=0'], ['--ep']),
    (['--pg=2'], ['--pg']),
    (['--pg=0.5', '--pg0=10'], ['--pg0', '0..9']),
    (['--save_every=soon'], ['--save_every', 'soon']),
    (['--model=gan'], ['gan', 'vqvae']),
    (['--preset=var_d99'], ['var_d99', 'var_d16']),
    (['--model=vqvae', '--preset=var_d16'], ['var_d16', 'vqvae']),
    (['--preset=flexvar_d16'], ['flexvar_d16', '--model=flexvar']),
    (['--model=flexvar', '--final_reso=-1'], ['--final_reso', 'at least 0', '-1']),
    (['--model=flexvar', '--pn=2_4'], ['--pn', 'rise from 1', '2_4']),
    (['--model=flexvar', '--pn=1'], ['--pn', 'rise from 1']),
    (['--model=flexvar', '--final_reso=250'], ['--final_reso', 'multiple of the stride 16', '250']),
    (['--model=flexvar', '--final_reso=128'], ['where --pn', '16 codes or 256 pixels', '128']),
    (['--model=flexvar', '--pg=0.5'], ['--pg', 'nearest']),
    (['--model=vqvae', '--ch=40'], ['--ch', '32', '40']),
    (['--model=vqvae', '--ch_mult=1_2'], ['stride 2', '--patch_size=2']),
    (['--model=vqvae', '--fp16=1'], ['float16', '--fp16=2']),
    (['--model=vqvae', '--codebook=magic'], ['magic', 'ema', 'grad']),
    (['--model=vqvae', '--lpips=alex'], ['--lpips', 'alex', 'vgg', 'none']),
    (['--model=vq16', '--fp16=1'], ['float16', '--fp16=2']),
    (['--model=vq16', '--image_size=100'], ['stride 16', '--image_size=96']),
    (['--model=kl16', '--image_size=8'], ['stride 16', '--image_size=16']),
    (['--model=vqvae', '--diffaug=0'], ['--consistency', '--diffaug=1']),
    (['--model=vqvae', '--train_only=decoder'], ['--init_from']),
    (['--model=flexvae', '--disc=dino'], ['--disc', 'patchgan']),
    (['--model=vqvae', '--scale_drop=2'], ['--scale_drop', '[0, 1]'])])
def test_bad_flags_are_one_clear_line(argv, words, capsys):
    error = fails(argv, capsys)
    assert all(word in error for word in words), error


def test_bad_sampling_flags(capsys):
    assert '--ckpt' in fails([], capsys, parse_sample_recipe)
    assert '--seed' in fails(['--ckpt=x', '--seed=-1'], capsys, parse_sample_recipe)
    assert '--classes' in fails(['--ckpt=x', '--classes=x'], capsys, parse_sample_recipe)
    assert '--cfg' in fails(['--ckpt=x', '--cfg=nan'], capsys, parse_sample_recipe)
    assert '--top_p' in fails(['--ckpt=x', '--top_p=1.5'], capsys, parse_sample_recipe)
    assert '--top_k' in fails(['--ckpt=x', '--topk=1'], capsys, parse_sample_recipe)


def test_fid_preset_is_the_published_protocol():
    recipe = parse_sample_recipe(['--ckpt=x', '--preset=fid'])
    assert (recipe.num_images, recipe.cfg, recipe.top_k, recipe.top_p,
            recipe.more_smooth) == (50_000, 1.5, 900, 0.96, False)
    assert recipe.sample_kwargs()['guidance'] == 2.5


@pytest.mark.parametrize(('preset', 'sides', 'cfg'), [
    ('fid', (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2.5),
    ('steps_13', (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16), 2.5),
    ('512', (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 23, 32), 3.)])
def test_flexvar_presets_are_the_published_commands(preset, sides, cfg):
    """The flags of the published evaluation, with the checkpoint that its README leaves out."""
    argv = ['--model=flexvar', '--var_ckpt=x', f'--infer_patch_nums={"_".join(map(str, sides))}',
            f'--cfg={cfg}', '--top_k=900', '--maxpn=16']
    by_flags = parse_sample_recipe([*argv, '--batch_size=16', '--depth=20'])
    by_preset = parse_sample_recipe(['--model=flexvar', '--ckpt=x', f'--preset={preset}']).sample_kwargs()
    if preset == 'fid':  # takes the sides of training, which for published files are these
        assert by_preset['infer_patch_nums'] is None
        by_preset['infer_patch_nums'] = FlexVAR.__init__.__defaults__[13]
    assert by_flags.sample_kwargs() == by_preset == dict(
        guidance=1 + cfg, top_k=900, top_p=0.95, max_pn=16, infer_patch_nums=sides, image_size=None,
        pos_mode='stretch', greedy_unseen=True, used_llamagen_cfg=False)
    assert parse_sample_recipe([*argv, '--used_llamagen_cfg']).sample_kwargs()['guidance'] == cfg


def test_flexvar_trains_at_256_pixels_on_random_crops():
    recipe = parse_recipe(['--model=flexvar', '--preset=flexvar_d24'])
    assert (recipe.image_size, recipe.crop, recipe.hflip) == (256, 'adm', True)
    assert recipe.peak_lr(32) == pytest.approx(2.4e-4)
    assert parse_recipe(['--model=flexvar', '--final_reso=512']).image_size == 512


def test_indivisible_batch():
    recipe = VARRecipe(batch_size=770)
    with pytest.raises(ValueError, match=r'--bs=770 .*8 ranks.*--bs=768'):
        recipe.check_batch(8)
    VARRecipe(batch_size=770, allow_round=True).check_batch(8)
    with pytest.raises(ValueError, match='--bs=1 '):
        VARRecipe(batch_size=1, allow_round=True).check_batch(8)


def test_save_every_is_steps_or_minutes():
    assert parse_recipe([]).save_steps_minutes == (0, 0.)
    assert parse_recipe(['--save_every=500']).save_steps_minutes == (500, 0.)
    assert parse_recipe(['--save_every=20m']).save_steps_minutes == (0, 20.)


def test_workers_are_automatic(monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    recipe = VARRecipe()
    assert recipe.num_workers(4, num_cpus=64) == 15
    assert recipe.num_workers(4, num_cpus=4) == 0
    assert VARRecipe(workers=0).num_workers(4, num_cpus=64) == 0
    assert VARRecipe(workers=99, batch_size=32).num_workers(4, num_cpus=64) == 8


def test_recipes_are_frozen_and_named_after_their_model():
    for name, cls in RECIPES.items():
        assert cls().model == name
        with pytest.raises(AttributeError):
            cls().model = 'other'
