"""Command lines: published flags, defaults and derived values, presets, clear errors."""
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import extract
import train
from configs import (
    CONFIGS,
    PRESETS,
    SAMPLE_CONFIGS,
    SAMPLE_PRESETS,
    VARConfig,
    flowar,
    npp,
    parse_sampling,
    parse_training,
)
from configs.options import config_text, flag_of, make_parser
from evaluation.classify import ClassifySettings, RejectSettings
from evaluation.pack import PackSettings, StatsSettings
from evaluation.score import ScoreSettings
from evaluation.tokenizer import TokenizerSettings
from extract import ExtractSettings
from models import NPP, FlexVAR, FlowAR
from tests.vectors import load_json
from train import describe

REPO = Path(__file__).resolve().parent.parent
# state or derived, no settings
RUNTIME = {'cmd', 'branch', 'commit_id', 'commit_msg', 'acc_mean', 'acc_tail', 'L_mean', 'L_tail',
           'vacc_mean', 'vacc_tail', 'vL_mean', 'vL_tail', 'grad_norm', 'cur_lr', 'cur_wd', 'cur_it',
           'cur_ep', 'remain_time', 'finish_time', 'tb_log_dir_path', 'log_txt_path', 'last_ckpt_path',
           'device', 'local_debug', 'dbg_nan', 'batch_size', 'glb_batch_size', 'patch_nums', 'resos',
           'data_load_reso'}
# published flags of FlowAR with their defaults: of training, of sampling, and those without effect here
FLOWAR_TRAINING = dict(
    epochs=400, img_size=256, vae_path='pretrained_models/vae/kl16.ckpt', vae_stride=16, patch_size=1,
    label_drop_prob=0.1, weight_decay=0.02, blr=1e-4, min_lr=1e-5, lr_schedule='cosine', warmup_epochs=100,
    ema_rate=0.9999, grad_clip=3., attn_dropout=0.1, proj_dropout=0.1, buffer_size=0, diffloss_d=12,
    diffloss_w=1536, temperature=1., cfg_schedule='linear')
FLOWAR_SAMPLING = dict(num_step=25, guidance=0.9, num_images=50_000, cfg=1., eval_bsz=64, temperature=1.,
                       cfg_schedule='linear')
FLOWAR_IGNORED = {  # automatic here, told by files and folders, or of another command
    'vae_embed_dim', 'save_last_freq', 'online_eval', 'log_dir', 'device', 'start_epoch', 'pin_mem',
    'no_pin_mem', 'world_size', 'dist_on_itp', 'dist_url'}
FLOWAR_RUN = """--img_size 256 --vae_path X/kl16.ckpt --vae_embed_dim 16 --vae_stride 16 --patch_size 1
    --epochs 400 --warmup_epochs 100 --blr 5e-5 --ema_rate 0.9999 --grad_clip 3.0 --attn_dropout 0.1
    --proj_dropout 0.1 --label_drop_prob 0.1 --use_cached --cached_path X --data_path Y --num_workers 10
    --seed 1 --output_dir O --resume O"""
# the same of NPP, where ours are the published ones
NPP_TRAINING = dict(
    gpt_model='GPT-B', dropout_p=0.1, token_dropout_p=0.1, drop_path_rate=0., image_size=256,
    downsample_size=16, epochs=300, lr=1e-4, weight_decay=5e-2, beta1=0.9, beta2=0.95, max_grad_norm=1.,
    global_batch_size=256, mixed_precision='bf16', epoch_rate=0.5, patch_level=2, decay_ratio=0.2,
    end_lr=1e-5, warmup_epochs=1)
NPP_SAMPLING = dict(cfg_scale=1.5, cfg_interval=-1, per_proc_batch_size=32, num_fid_samples=50_000,
                    global_seed=0, top_k=0, temperature=1., top_p=1.)
NPP_IGNORED = {
    'train.py': '--cloud-save-path S --no-local-save --gpt-type c2i --vocab-size 16384 --cls-token-num 1 '
                '--no-compile --dataset imagenet_code --gradient-accumulation-steps 1 --vq-model VQ-16',
    'sample.py': '--gpt-type c2i --from-fsdp --cls-token-num 1 --no-compile --vq-model VQ-16 '
                 '--codebook-size 16384 --codebook-embed-dim 8 --downsample-size 16 --num-classes 1000',
    'extract.py': '--vq-model VQ-16 --codebook-size 16384 --codebook-embed-dim 8 --dataset imagenet '
                  '--global-seed 0 --debug'}

NPP_RUN = '--cloud-save-path S --code-path C --image-size 256 --gpt-model GPT-B --epoch-rate 0.5 ' \
          '--patch-level 2 --scheduler'
NPP_JOB = '--vq-ckpt F --gpt-ckpt c2i_B_256.pt --gpt-model GPT-B --image-size 256 ' \
          '--image-size-eval 256 --cfg-scale 2.0'


def shell_flags(path):
    """The flags of the train.py command in a recipe script."""
    command = path.read_text().replace('\\\n', ' ').split('train.py')[1]
    return [flag for flag in shlex.split(command)
            if flag.startswith('--') and not flag.startswith(('--data_path', '--code_path'))]


def parse_extraction(argv):
    return extract.ExtractSettings(**make_parser(extract.ExtractSettings, 'extract.py', '').parse(argv))


PARSERS = {'train.py': (parse_training, ['--model=npp']),
           'sample.py': (parse_sampling, ['--model=npp', '--ckpt=x']),
           'extract.py': (parse_extraction, ['--model=npp', '--vq_ckpt=x', '--code_path=y'])}


def settings(config):
    return {flag_of(config, name): value for name, value in vars(config).items()}


def test_every_published_flag_parses_with_its_default():
    ours = settings(parse_training([]))
    for entry in load_json('var/args')['flags']:
        flag, default = entry['flag'], entry['default']
        if flag in RUNTIME or flag in ('workers', 'local_out_dir_path'):  # workers: automatic here
            continue
        value = {'float': '0.25', 'bool': '1'}.get(entry['type'], '1')
        value = dict(sche='cos', opt='adam', pn='256', mid_reso='1.25').get(flag, value)
        assert ours[flag] == default, flag
        parse_training([f'--{flag}={value}'])


@pytest.mark.parametrize('case', load_json('var/args')['derived'],
                         ids=lambda c: f'{" ".join(c["argv"])} x{c["world_size"]}')
def test_derived_values(case):
    config = parse_training(case['argv'])
    ours = settings(config) | config.derived(case['world_size'])
    for name, expected in case.items():
        if name in ('argv', 'world_size', 'log_name', 'ckpt_name', 'pn'):
            continue
        if name == 'workers' and not expected:
            continue
        value = list(ours[name]) if isinstance(ours[name], tuple) else ours[name]
        if isinstance(expected, float):
            expected = pytest.approx(expected, rel=1e-12)
        assert value == expected, name


@pytest.mark.parametrize(('parse', 'argv', 'defaults'), [
    (parse_training, ['--model=flowar'], FLOWAR_TRAINING),
    (parse_sampling, ['--model=flowar', '--ckpt=x'], FLOWAR_SAMPLING),
    (parse_training, ['--model=npp'], NPP_TRAINING),
    (parse_sampling, ['--model=npp', '--ckpt=x'], NPP_SAMPLING)])
def test_published_defaults(parse, argv, defaults):
    for flag, value in defaults.items():
        spaced = parse([*argv, f'--{flag.replace("_", "-")}', str(value)])
        assert parse([*argv, f'--{flag}={value}']) == spaced == parse(argv), flag


def test_published_flags_without_effect_are_named(capsys):
    plain = ['--model=flowar', '--size=large']
    assert parse_training(['--model', 'flowar_large']) == parse_training(plain)
    for flag in FLOWAR_IGNORED:
        for argv in ([f'--{flag}'], [f'--{flag}=x'], [f'--{flag}', 'x']):
            assert parse_training([*plain, *argv]) == parse_training(plain)
            assert f'--{flag} is ignored: ' in capsys.readouterr().err
    ours = parse_training([*plain, '--eval_every=40', '--num_classes=7', '--workers=3'])
    theirs = '--eval_freq=40', '--class_num=7', '--num_workers=3', '--local_rank', '-1'
    assert parse_training([*plain, *theirs]) == ours
    sampling = ['--model=flowar', '--ckpt=x', '--output=y']
    assert parse_sampling([*sampling, '--evaluate', '--class_num=1000', '--diffloss_d=12']) \
        == parse_sampling(['--model=flowar_large', '--resume=x', '--output_dir=y'])
    assert '--diffloss_d is ignored: it is read from the files of weights' in capsys.readouterr().err


@pytest.mark.parametrize('script', NPP_IGNORED)
def test_published_flags_of_npp_without_effect_are_named(script, capsys):
    parse, argv = PARSERS[script]
    plain, flags = parse(argv), shlex.split(NPP_IGNORED[script])
    for spelt in (flags, [flag.replace('-', '_').replace('__', '--', 1) for flag in flags]):
        assert parse([*argv, *spelt]) == plain
        named = re.findall(r'^\S+ --(\w+) is ignored: ', capsys.readouterr().err, flags=re.M)
        assert sorted(named) == sorted(
            flag[2:].replace('-', '_') for flag in flags if flag.startswith('--'))


def test_published_commands_of_npp(capsys):
    """Of its README: training, sampling, extraction with both crop ranges."""
    config = parse_training(['--model=npp', *NPP_RUN.split()])
    assert config == parse_training(['--model=npp', '--preset=npp_b', '--cached_path=C'])
    assert config.phases == ((150, 2), (300, 1)) and config.use_cached
    by_preset = parse_sampling(['--model=npp', '--preset=npp_b', '--ckpt=c2i_B_256.pt', '--vae_ckpt=F'])
    assert parse_sampling(['--model=npp', *NPP_JOB.split()]) == dataclasses.replace(
        by_preset, image_size_eval=256, source='', fixed_batch=0)
    command = '--vq-ckpt F --data-path T --code-path C --ten-crop --crop-range {} --image-size 384'
    for crop_range in (1.1, 1.05):
        assert parse_extraction(['--model=npp', *command.format(crop_range).split()]) == \
            extract.ExtractSettings(model='npp', vae_ckpt='F', data_path='T', cached_path='C', ten_crop=True,
                                    crop_range=crop_range, image_size=384)


@pytest.mark.parametrize(('argv', 'words'), [
    (['--model=flexvar', '--pn=1_2_4'], ['--pn', 'flexvar', 'leave it out']),
    (['--model=var', '--pn=1_x'], ['1_x']),
    (['--model=npp', '--views=2', '--ten_crop'], ['--views', '--ten_crop', 'one of them']),
    (['--model=var', '--views=2', '--split=val'], ['centre crop', '--views']),
    (['--model=flowar', '--views=2', '--layout=files'], ['--layout=files', 'leave it out']),
    (['--model=var', '--import_codes=x'], ['--import_codes', '--model=npp']),
    (['--model=var', '--crop=adn'], ['--crop', 'adm', 'adn']),
    (['--model=var', '--mid_reso=0.5'], ['--mid_reso', 'at least 1', '0.5'])])
def test_bad_flags_of_extractions(argv, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        parse_extraction([*argv, '--vae_ckpt=x', '--cached_path=y'])
    assert all(word in str(error.value) for word in words), error.value


def test_extractions_crop_as_the_training_of_their_family():
    for model in ('var', 'flexvar', 'npp', 'flowar'):
        ours = parse_extraction([f'--model={model}', '--vae_ckpt=x', '--cached_path=y', '--views=2'])
        training = parse_training([f'--model={model}'])
        assert (ours.crop, ours.mid_reso) == (training.crop, training.mid_reso)


def test_words_of_npp():
    for word, precision in (('none', 0), ('fp16', 1), ('bf16', 2)):
        assert parse_training(['--model=npp', f'--mixed-precision={word}']).precision == precision
        assert parse_sampling(['--model=npp', '--ckpt=x', f'--precision={word}']).precision == precision
    assert parse_training(['--model=npp', '--ema']).ema == 0.9999
    assert parse_training(['--model=npp', '--ema', '0.99', '--ckpt-every', '250000']).ema == 0.99
    for key, weights in (('model', 'raw'), ('ema', 'ema')):
        assert parse_sampling(['--model=npp', '--ckpt=x', f'--ckpt-key={key}']).weights == weights


@pytest.mark.parametrize(('preset', 'flags', 'nodes'), [
    ('flowar_s', '--diffloss_d 2 --diffloss_w 1024 --batch_size 64', 4),
    ('flowar_l', '--diffloss_d 12 --diffloss_w 1024 --batch_size 64 --use_checkpoint', 4),
    ('flowar_h', '--diffloss_d 12 --diffloss_w 1536 --batch_size 32 --use_checkpoint', 8)])
def test_published_training_of_flowar(preset, flags, nodes):
    """Its commands are the presets on that many ranks."""
    size = dict(s='small', l='large', h='huge')[preset[-1]]
    pairs = [flag.split() for flag in f' {FLOWAR_RUN} {flags}'.split(' --')[1:]]
    pairs = [(f'--{name}', *value) for name, *value in pairs]
    model = [f'--model=flowar_{size}']
    config = parse_training([*model, *map('='.join, pairs)])
    assert config == parse_training([*model, *(part for pair in pairs for part in pair)])
    own = parse_training(['--model=flowar', f'--preset={preset}', '--vae_path=X/kl16.ckpt', '--cached_path=X',
                        '--use_cached', '--data_path=Y', '--seed=1', '--output_dir=O', '--resume=./O'])
    assert {**vars(config), 'images_per_rank': 0, 'workers': -1, 'resume': './O'} == vars(own)
    for each in (config, own):
        each.check_batch(8 * nodes)
        ours = each.derived(8 * nodes)
        assert (ours['bs'], ours['tlr']) == (2048, pytest.approx(4e-4))
        assert (ours['wp'], ours['sche'], ours['data_load_reso']) == (100, 'cosine', 256)
    assert own.peak_lr(1) == own.peak_lr(32) == pytest.approx(4e-4)


def test_learning_rates_of_flowar():
    """Follow from the images per step, given for all ranks, or per rank and micro-step as published."""
    def peak(*flags, world_size=1):
        return parse_training(['--model=flowar', '--blr=5e-5', *flags]).peak_lr(world_size)
    assert peak('--batch_size=64', world_size=32) == pytest.approx(4e-4)
    assert peak('--batch_size=64', '--ac=32') == pytest.approx(4e-4)
    assert peak('--batch_size=64') == pytest.approx(4e-4 / 32)
    assert peak('--bs=1024', world_size=32) == pytest.approx(2e-4)
    assert peak('--batch_size=64', '--lr=3e-4', world_size=32) == 3e-4
    config = parse_training(['--model=flowar', '--lr=1e-4', '--min_lr=2e-5'])
    assert config.final_lr_ratio(1) == config.final_lr_ratio(32) == pytest.approx(0.2)


def test_both_spellings_and_boolean_forms():
    assert parse_training(['--base_lr=2e-4']) == parse_training(['--tblr=2e-4'])
    for text in ('1', 'true', 'T', 'True', 'tr'):
        assert parse_training([f'--saln={text}']).shared_aln is True
    for text in ('0', 'false', 'F', 'fal'):
        assert parse_training([f'--anorm={text}']).attn_l2_norm is False
    assert parse_training(['--local-rank=3', '--local_rank=1']) == parse_training([])


@pytest.mark.parametrize('name', sorted(
    name for model in ('var', 'flexvar', 'flowar', 'npp') for name in PRESETS[model]))
def test_recipe_script_equals_preset(name):
    model, size, *_ = name.split('_')
    preset = parse_training([f'--model={model}', f'--preset={name}'])
    assert preset == parse_training(shell_flags(REPO / 'recipes' / f'{name}.sh'))
    named = dict(flowar=lambda: preset.size[0], npp=lambda: preset.gpt_model.removeprefix('GPT-').lower())
    assert size == named.get(model, lambda: f'd{preset.depth}')()


def test_recipe_script_of_npp_finds_its_folders(tmp_path):
    """Relative ones, too, of codes several."""
    (tmp_path / 'torchrun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / 'torchrun').chmod(0o755)
    env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', CODES='codes,/more')
    call = ['bash', str(REPO / 'recipes' / 'npp_b.sh'), 'my images', '--seed=1']
    printed = subprocess.run(call, env=env, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    config = parse_training(printed.split('train.py\n')[1].splitlines())
    assert (config.data_path, config.cached_path) == (f'{tmp_path}/my images', f'{tmp_path}/codes,/more')
    assert config.seed == 1
    del env['CODES']
    stopped = subprocess.run(call, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert stopped.returncode and not stopped.stdout
    assert 'expected the codes of extract.py' in stopped.stderr


@pytest.mark.parametrize(('name', 'parameters'), [
    ('var_d16', 310_283_520), ('var_d20', 600_917_136), ('var_d24', 1_033_399_360),
    ('var_d30', 2_010_020_356), ('var_d36_512', 2_353_893_904),
    ('flexvar_d16', 315_561_936), ('flexvar_d20', 607_513_952), ('flexvar_d24', 1_041_314_576)])
def test_dry_run_of_the_published_commands(name, parameters):
    config = parse_training(shell_flags(REPO / 'recipes' / f'{name}.sh'))
    printed = json.loads(json.dumps(describe(config, world_size=8)))
    assert printed['num_parameters'] == parameters
    assert printed['batch_size'] == config.images_per_step // 8 and printed['bs'] == config.images_per_step
    assert printed['tlr'] == pytest.approx(config.base_lr * config.images_per_step / 256)
    assert printed['wp'] == config.epochs / 50
    assert tuple(printed['patch_nums']) == config.patch_nums


@pytest.mark.parametrize(('name', 'parameters'), [
    ('flowar_s', 171_718_072), ('flowar_l', 586_862_912), ('flowar_h', 1_913_316_880)])
def test_dry_run_of_the_published_commands_of_flowar(name, parameters):
    printed = describe(parse_training(shell_flags(REPO / 'recipes' / f'{name}.sh')), world_size=8)
    assert json.loads(json.dumps(printed))['num_parameters'] == parameters
    assert (printed['batch_size'], printed['bs'], printed['wp']) == (256, 2048, 100)
    assert printed['tlr'] == pytest.approx(4e-4) and printed['use_checkpoint'] == (name != 'flowar_s')


def test_dry_run_of_the_published_command_of_npp():
    printed = describe(parse_training(shell_flags(REPO / 'recipes' / 'npp_b.sh')), world_size=8)
    printed = json.loads(json.dumps(printed))
    assert printed['num_parameters'] == 110_888_448 and printed['tlr'] == 1e-4
    assert (printed['batch_size'], printed['bs'], printed['wp'], printed['sche']) == (32, 256, 1, 'tail0.2')
    assert (printed['patch_sides'], printed['phase_ends']) == ([2, 1], [150, 300])


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


def fails(argv, capsys, parse=parse_training):
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
    (['--tblr=inf'], ['--tblr', 'finite', 'inf']),
    (['--tblr=nan'], ['--tblr', 'nan']),
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
    (['--model=flowar_tiny'], ['flowar_tiny', 'flowar_large']),
    (['--model=flowar', '--preset=small'], ['small', 'flowar_s']),
    (['--model=flowar', '--size=medium'], ['--size', 'one of small, large, huge', 'medium']),
    (['--model=flowar', '--buffer_size=64'], ['--buffer_size', '0', '64']),
    (['--model=flowar', '--patch_size=2'], ['--patch_size', '1', '2']),
    (['--model=flowar', '--cfg_schedule=constant'], ['--cfg_schedule', 'linear', 'constant']),
    (['--model=flowar', '--temperature=0.9'], ['--temperature', '1', '0.9']),
    (['--model=flowar', '--lr_schedule=lin0'], ['--lr_schedule', 'cosine or constant', 'lin0']),
    (['--model=flowar', '--img_size=240'], ['--img_size', '--vae_stride=16 times 2, 4, 8', '240']),
    (['--model=flowar', '--img_size=16'], ['--img_size', '--vae_stride=16 times 2, 4, 8']),
    (['--model=flowar', '--diffloss_w=100'], ['--diffloss_w', '64', '100']),
    (['--model=flowar', '--width=100'], ['--width', '64', '100']),
    (['--model=flowar', '--loss_weighting=snr'], ['--loss_weighting', 'debiased', 'snr']),
    (['--model=flowar', '--use_cached'], ['--use_cached', '--cached_path']),
    (['--model=flowar', '--cached_val_path=x'], ['--cached_val_path', '--cached_path', 'both']),
    (['--model=npp', '--scheduler', '--lr=1e-6'], ['--end_lr', '--lr=1e-06', '1e-05']),
    (['--model=flowar', '--resume=x', '--output_dir=y'], ['output folder, y', '--resume=x', '--output_dir']),
    (['--model=flowar', '--tblr=1'], ['--tblr', 'nearest']),
    (['--model=npp', '--gpt_model=GPT-S'], ['--gpt_model', 'GPT-B, GPT-L', "'GPT-S'"]),
    (['--model=npp', '--patch-level=5'], ['--patch_level', '[1, 4]', '5']),
    (['--model=npp', '--patch_level=4', '--image_size=448'], ['--image_size', '=16 times', '8 codes', '448']),
    (['--model=npp', '--image_size=250'], ['--image_size', '--downsample_size=16', '250']),
    (['--model=npp', '--patch_level=1', '--image_size=0'], ['--image_size', '0']),
    (['--model=npp', '--epochs=7', '--patch_level=4'], ['[0, 1, 3, 7]', '--epoch_rate', 'more epochs']),
    (['--model=npp', '--epochs=3', '--patch_level=4'], ['[0, 0, 1, 3]', '--epoch_rate', 'more epochs']),
    (['--model=npp', '--epochs=5', '--epoch_rate=1'], ['[5, 5]', '--epoch_rate=1', 'each must last']),
    (['--model=npp', '--epoch_rate=1.5'], ['--epoch_rate', '[0, 1]', '1.5']),
    (['--model=npp', '--scheduler', '--epochs=10', '--warmup_epochs=5'], ['--warmup_epochs=5', 'at most 4']),
    (['--model=npp', '--width=100'], ['--width', '64', '100']),
    (['--model=npp', '--mixed_precision=fp8'], ['--mixed_precision', 'fp8']),
    (['--model=npp', '--use_cached'], ['--use_cached', '--cached_path']),
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


@pytest.mark.parametrize(('model', 'preset'), [(model, preset) for model, presets in SAMPLE_PRESETS.items()
                                               for preset in ('', *presets)])
def test_sampling_needs_a_checkpoint_alone(model, preset):
    assert parse_sampling([f'--model={model}', f'--preset={preset}', '--ckpt=x']).ckpt == 'x'


def test_bad_sampling_flags(capsys):
    assert '--ckpt' in fails([], capsys, parse_sampling)
    assert '--seed' in fails(['--ckpt=x', '--seed=-1'], capsys, parse_sampling)
    assert '--classes' in fails(['--ckpt=x', '--classes=1__2'], capsys, parse_sampling)
    assert '--cfg' in fails(['--ckpt=x', '--cfg=nan'], capsys, parse_sampling)
    assert '--top_p' in fails(['--ckpt=x', '--top_p=1.5'], capsys, parse_sampling)
    assert '--top_k' in fails(['--ckpt=x', '--topk=1'], capsys, parse_sampling)


@pytest.mark.parametrize(('flags', 'words'), [
    (['--num_step=1'], ['--num_step', 'at least 2', '1']),
    (['--flow_upper_steps=-3'], ['--flow_upper_steps', 'at least 0', '-3']),
    (['--flow_upper_steps=50', '--flow_lower_steps=1'], ['--flow_lower_steps', 'at least 2', '50 to 1']),
    (['--flow_upper_steps=50'], ['both --flow_upper_steps and --flow_lower_steps', '50 and 0']),
    (['--flow_lower_steps=15'], ['both --flow_upper_steps and --flow_lower_steps', '0 and 15']),
    (['--guidance=2'], ['--guidance', '[0, 1]', '2', '--cfg']),
    (['--cfg_schedule=constant'], ['--cfg_schedule', 'linear', 'constant']),
    (['--temperature=0.9'], ['--temperature', '1', '0.9']),
    (['--top_k=900'], ['--top_k', 'nearest'])])
def test_bad_sampling_flags_of_flowar(flags, words, capsys):
    error = fails(['--model=flowar', '--ckpt=x', *flags], capsys, parse_sampling)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(('flags', 'words'), [
    (['--gpt_model=GPT-S'], ['--gpt_model', 'GPT-B, GPT-L', "'GPT-S'"]),
    (['--temperature=0'], ['--temperature', 'above 0', '0']),
    (['--top-p=1.5'], ['--top_p', '[0, 1]', '1.5']),
    (['--cfg_interval=-2'], ['--cfg_interval', 'at least -1', '-2']),
    (['--ckpt_key=best'], ['best']),
    (['--labels=random', '--classes=1_2'], ['--classes or --labels'])])
def test_bad_sampling_flags_of_npp(flags, words, capsys):
    error = fails(['--model=npp', '--ckpt=x', *flags], capsys, parse_sampling)
    assert all(word in error for word in words), error


def test_fid_preset_is_the_published_protocol():
    config = parse_sampling(['--ckpt=x', '--preset=fid'])
    assert (config.num_images, config.cfg, config.top_k, config.top_p,
            config.more_smooth) == (50_000, 1.5, 900, 0.96, False)
    assert config.sample_kwargs()['guidance'] == 2.5


@pytest.mark.parametrize(('preset', 'sides', 'cfg'), [
    ('fid', (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2.5),
    ('steps_13', (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16), 2.5),
    ('512', (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 23, 32), 3.)])
def test_flexvar_presets_are_the_published_commands(preset, sides, cfg):
    """The flags of the published evaluation, with the checkpoint that its README leaves out."""
    argv = ['--model=flexvar', '--var_ckpt=x', f'--infer_patch_nums={"_".join(map(str, sides))}',
            f'--cfg={cfg}', '--top_k=900', '--maxpn=16']
    by_flags = parse_sampling([*argv, '--batch_size=16', '--depth=20'])
    by_preset = parse_sampling(['--model=flexvar', '--ckpt=x', f'--preset={preset}']).sample_kwargs()
    if preset == 'fid':  # takes the sides of training, which for published files are these
        assert by_preset['infer_patch_nums'] is None
        by_preset['infer_patch_nums'] = FlexVAR.__init__.__defaults__[13]
    assert by_flags.sample_kwargs() == by_preset == dict(
        guidance=1 + cfg, top_k=900, top_p=0.95, max_pn=16, infer_patch_nums=sides, image_size=None,
        pos_mode='stretch', greedy_unseen=True, used_llamagen_cfg=False, cfg_from=0, cfg_to=-1, ssg=0.,
        ssg_prior='fused', ssg_schedule='constant')
    assert parse_sampling([*argv, '--used_llamagen_cfg']).sample_kwargs()['guidance'] == cfg


@pytest.mark.parametrize(('preset', 'num_step', 'cfg', 'guidance'), [
    ('flowar_s', 25, 4.3, 0.9), ('flowar_l', 25, 2.4, 0.9), ('flowar_h', 50, 2.4, 0.7)])
def test_flowar_presets_are_the_published_commands(preset, num_step, cfg, guidance):
    """Its README gives steps, guidance and images; DiSA anneals the steps in place of `num_step`."""
    argv = ['--model=flowar', '--ckpt=x', '--vae_path', 'X/kl16.ckpt']
    command = f'--num_step {num_step} --cfg {cfg} --guidance {guidance} --eval_bsz 256 --num_images 50000'
    by_flags = parse_sampling([*argv, *command.split()])
    by_preset = parse_sampling([*argv, f'--preset={preset}', '--eval_bsz=256'])
    assert by_flags == dataclasses.replace(by_preset, source='', fixed_batch=0)
    expected = dict(guidance=cfg, guidance_until=guidance, num_steps=num_step, lower_steps=None)
    assert by_preset.sample_kwargs() == expected
    annealed = parse_sampling([*argv, f'--preset={preset}', '--flow_upper_steps', '50',
                                    '--flow_lower_steps=15'])
    assert annealed.sample_kwargs() == expected | dict(num_steps=50, lower_steps=15)


@pytest.mark.parametrize(('size', 'cfg'), [('b', 2.), ('l', 1.75), ('xl', 1.70), ('xxl', 1.65)])
def test_npp_presets_are_the_published_scores(size, cfg):
    config = parse_sampling(['--model=npp', '--ckpt=x', f'--preset=npp_{size}'])
    assert (config.gpt_model, config.num_images) == (f'GPT-{size.upper()}', 50_000)
    assert config.sample_kwargs() == dict(guidance=cfg, cfg_interval=-1, temperature=1., top_k=0, top_p=1.,
                                          image_size=256, image_size_eval=None)


def test_flexvar_trains_at_256_pixels_on_random_crops():
    config = parse_training(['--model=flexvar', '--preset=flexvar_d24'])
    assert (config.image_size, config.crop, config.hflip) == (256, 'adm', True)
    assert config.peak_lr(32) == pytest.approx(2.4e-4)
    assert parse_training(['--model=flexvar', '--final_reso=512']).image_size == 512


def test_indivisible_batch():
    config = VARConfig(images_per_step=770)
    with pytest.raises(ValueError, match=r'--bs=770 .*8 ranks.*--bs=768'):
        config.check_batch(8)
    VARConfig(images_per_step=770, allow_round=True).check_batch(8)
    with pytest.raises(ValueError, match='--bs=1 '):
        VARConfig(images_per_step=1, allow_round=True).check_batch(8)


def test_save_every_is_steps_or_minutes():
    assert parse_training([]).save_steps_minutes == (0, 20.)
    assert parse_training(['--save_every=']).save_steps_minutes == (0, 0.)
    assert parse_training(['--save_every=500']).save_steps_minutes == (500, 0.)
    assert parse_training(['--save_every=20m']).save_steps_minutes == (0, 20.)


def test_workers_are_automatic(monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    config = VARConfig()
    assert config.num_workers(4, num_cpus=64) == 15
    assert config.num_workers(4, num_cpus=4) == 0
    assert VARConfig(workers=0).num_workers(4, num_cpus=64) == 0
    assert VARConfig(workers=99, images_per_step=32).num_workers(4, num_cpus=64) == 8


def test_configs_are_frozen_and_named_after_their_model():
    for name, cls in CONFIGS.items():
        assert cls().model == name
        with pytest.raises(AttributeError):
            cls().model = 'other'


# ---------------------------------------------------------------------------------------------- paths, sizes
SETTINGS = [*CONFIGS.values(), *SAMPLE_CONFIGS.values(), ScoreSettings, StatsSettings, PackSettings,
            ClassifySettings, RejectSettings, TokenizerSettings, ExtractSettings]


@pytest.mark.parametrize('cls', SETTINGS, ids=lambda cls: cls.__name__)
def test_every_path_is_marked_as_one(cls):
    words = ('path', 'dir', 'ckpt', 'output', 'cache', 'json', 'pictures', 'import_codes',
             'inception_weights',
             'classifier_weights', 'lpips_vgg', 'lpips_lin', 'init_from', 'fid_ref', 'images', 'folder',
             'sample', 'ref', 'resume', 'reference')
    for f in dataclasses.fields(cls):
        is_text = isinstance(f.default, str) and not f.metadata['choices']
        looks_like_one = f.name in words or f.name.endswith(('_path', '_dir', '_ckpt'))
        if is_text and looks_like_one:
            assert f.metadata['path'], f'{cls.__name__}.{f.name}'


def test_tilde_is_the_home_folder_in_every_command(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    config = parse_training(['--local_out_dir_path=~/out', '--data_path', '~/data', '--init_from=~/a.pth'])
    assert (config.output_dir, config.data_path, config.init_from) == (
        f'{tmp_path}/out', f'{tmp_path}/data', f'{tmp_path}/a.pth')
    config = parse_training(['--model=flowar', '--cached_path=~/a,~/b'])
    assert config.cached_path == f'{tmp_path}/a,{tmp_path}/b'
    assert parse_sampling(['--ckpt=~/a.pth', '--output=~/x']).output == f'{tmp_path}/x'
    assert ScoreSettings(ref='~/a.npz', sample='~/b.npz', json='~/c.json').sample == f'{tmp_path}/b.npz'
    assert ExtractSettings(vae_ckpt='~/a', cached_path='~/b').cached_path == f'{tmp_path}/b'
    assert TokenizerSettings(ckpt='~/a', data_path='digits', pictures='~/p').pictures == f'{tmp_path}/p'
    assert PackSettings(folder='~/a', output='~/b.npz').output == f'{tmp_path}/b.npz'


@pytest.mark.parametrize('model', list(CONFIGS))
@pytest.mark.parametrize('flag', ['--image_size', '--img-size'])
def test_every_model_understands_one_flag_for_the_size(model, flag):
    assert parse_training([f'--model={model}', f'{flag}=256']).image_size == 256


@pytest.mark.parametrize(('size', 'advice'), [
    (512, '--pn=512 --patch_size=16'), (64, '--pn=1_2_3_4 --patch_size=16'),
    (96, '--pn=1_2_3_4_6 --patch_size=16'), (100, 'ends with 100/N')])
def test_a_size_that_a_pyramid_does_not_give_names_one_that_does(capsys, size, advice):
    error = fails([f'--image_size={size}'], capsys)
    assert f'--img_size={size}' in error and '256' in error and advice in error
    if '--pn' in advice:
        assert parse_training([f'--image_size={size}', *advice.split()]).image_size == size


@pytest.mark.parametrize('argv', [
    ['--preset=var_d36_512', '--data_path=a: b #c \U0001f600\udce9'],
    ['--model=flexvar', '--pn=1_2_4', '--ema=1e-5'],
    ['--model=flowar_small', '--use_checkpoint=1'], ['--model=npp', '--mixed_precision=fp16', '--ema'],
    ['--model=vqvae', '--preset=tiny', '--seed=7'], ['--model=kl16']])
def test_a_config_file_holds_everything_and_flags_win(tmp_path, argv):
    config = parse_training(argv)
    path = tmp_path / 'config.yaml'
    path.write_text(config_text(config, 'title \udce9'))
    assert parse_training([f'--config={path}']) == config
    if config.model == 'flowar':
        assert parse_training([f'--config={path}', '--model=flowar_large']) == \
            dataclasses.replace(config, size='large')
    changed = dataclasses.replace(config, epochs=3, seed=9)
    assert parse_training([f'--config={path}', '--ep=3', '--seed=9']) == changed


@pytest.mark.parametrize(('text', 'words'), [
    ('depht: 3', ["'--depht=3'", '--depth', "(in '"]),
    ('depth: x', ["invalid int value: 'x' (in", 'config.yaml']),
    ('preset: var_d16', ["holds 'preset'"]), ('seed: 2024-13-45', ["'2024-13-45' (in"]),
    ('depth: [1]', ["'depth' in", "['1']"]), ('- 1', ['got list']), ('a: {', ['cannot read it']),
    ('model: gan', ["'gan'"])])
def test_bad_config_files_are_one_line(tmp_path, capsys, text, words):
    path = tmp_path / 'config.yaml'
    path.write_text(text)
    error = fails([f'--config={path}'], capsys)
    assert all(word in error for word in words), error
    assert 'No such file' in fails([f'--config={tmp_path}/nowhere.yaml'], capsys)
    path.write_text('model: npp')
    assert "is of the model 'npp', got --model=var" in fails([f'--config={path}', '--model=var'], capsys)
    assert 'leave out --preset' in fails([f'--config={path}', '--preset=npp_b'], capsys)
    path.write_text('pn: 1_2_3_4_6_8\nbs: 64  # images\nep: null\n')  # as a person writes it
    assert parse_training([f'--config={path}']).patch_nums == (1, 2, 3, 4, 6, 8)


def test_help_names_presets_and_unknown_flags_stand_as_typed(capsys):
    with pytest.raises(SystemExit):
        parse_training(['--help'])
    text = capsys.readouterr().out
    assert '--preset NAME' in text and 'var_d16' in text[text.index('--preset NAME'):]
    assert "'--fid-flagz=3'" in fails(['--fid-flagz=3'], capsys)
    assert parse_training(['--data-path=x', '--data_path=x']).data_path == 'x'  # one flag in both spellings
    assert parse_training(['--data_name=imagenet', '--dbg_nan=1']) == parse_training([])
    assert '--dbg_nan is ignored' in capsys.readouterr().err


def test_sizes_are_those_of_the_models():
    """Settings name them without importing the models."""
    assert tuple(NPP.SIZES) == npp.GPT_SIZES
    assert tuple(FlowAR.SIZES) == flowar.SIZES
