"""A training begins with the weights of another one: what is taken over, resized, anew, or not trained."""
import logging
import re

import pytest
import torch

import train
from configs import parse_training
from models import VAR, VQVAE
from models.scales import ScaleLayout, nearest_scales, resize_positions
from tests.runs import (
    TINY_VQVAE,
    TOKENIZER_FLAG,
    assert_equal,
    interrupt,
    largest_difference,
    launch,
    make_folder,
    prepared,
    read,
    saved,
    training,
)
from training.finetune import parameters_of

FAMILIES = ('var', 'flexvar', 'flowar', 'npp')
# names of the parameters that --reset=head,class_emb means
RESET = dict(var=r'class_emb\.|head\.', flexvar=r'class_emb\.|head\.', flowar=r'class_emb\.|flownet\.',
             npp=r'cls_embedding\.|output\.')
# another size of images for each family
LARGER = dict(var=('--pn=1_2_5',), flexvar=('--pn=1_2_3_4_8',), flowar=('--img_size=64',),
              npp=('--image_size=64',))


@pytest.fixture
def started(families, tmp_path):
    """The model with which a training begins, by the flags that are added to the smallest training."""
    def run(model, *more):
        return prepared(training(families[model], tmp_path / 'run', *more, model=model)).model
    return run


@pytest.fixture(scope='session')
def sources(families, tmp_path_factory):
    """Files of random weights that are like no fresh ones, by family; they do not name their classes."""
    folder = tmp_path_factory.mktemp('sources')
    paths = {}
    for model in FAMILIES:
        generator = prepared(training(families[model], folder / model, model=model)).model
        torch.manual_seed(7)
        for parameter in generator.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        paths[model], _ = saved(generator, folder / f'{model}.pth')
    return paths


def without(root, name):
    """The same images but for those of a class."""
    for split in ('train', 'val'):
        for path in (root / split / name).iterdir():
            path.unlink()
        (root / split / name).rmdir()
    return root


# ---------------------------------------------------------------------------------------------- reset
@pytest.mark.parametrize('model', FAMILIES)
def test_parts_begin_anew_and_all_else_is_taken_over(started, sources, caplog, model):
    caplog.set_level(logging.INFO)
    fresh = started(model)
    tuned = started(model, f'--init_from={sources[model]}', '--reset=head,class_emb')
    given = torch.load(sources[model])
    parameters, initial = (dict(generator.named_parameters()) for generator in (tuned, fresh))
    anew = {name for name in parameters if re.match(RESET[model], name)}
    assert fresh.class_table in anew and 1 < len(anew) < len(parameters) - 1
    for name, value in parameters.items():
        assert torch.equal(value, initial[name]) == (name in anew), name
        assert name in anew or torch.equal(value, given[name]), name
    chosen = [name for part in fresh.parts for name in parameters_of(fresh, part, 'reset')]
    assert len(chosen) == len({*chosen}) <= len(parameters)  # parts do not overlap
    line = next(record.getMessage() for record in caplog.records if 'stay as initialised' in record.msg)
    begin = f'{sources[model]}: {len(anew)} parameters ({next(name for name in parameters if name in anew)}, '
    assert line.startswith(begin) and line.endswith(' stay as initialised')


@pytest.mark.parametrize('layout', ['model', 'trainer', 'ddp'])
def test_every_layout_is_understood(started, sources, tmp_path, layout):
    state = torch.load(sources['var'])
    content = dict(model=dict(model=state, epoch=1), trainer=dict(trainer=dict(var_wo_ddp=state), epoch=3),
                   ddp={f'module.{name}': value for name, value in state.items()})[layout]
    torch.save(content, tmp_path / 'file.pth')
    model = started('var', f'--init_from={tmp_path / "file.pth"}', '--reset=blocks.0.*.bias')
    assert_equal({name: value for name, value in model.state_dict().items() if not name.startswith('blocks')},
                 {name: value for name, value in state.items() if not name.startswith('blocks')})


def test_a_head_of_other_codes_begins_anew(families, sources, started, tmp_path):
    """A reset head may have another number of codes than the weights."""
    tokenizer, _ = saved(VQVAE(**TINY_VQVAE | dict(vocab_size=48)), tmp_path / 'vae.pth')
    flags = f'--init_from={sources["var"]}', f'--{TOKENIZER_FLAG["var"]}={tokenizer}'
    with pytest.raises(ValueError, match=r'vocab_size=32 \(here 48\)'):
        started('var', *flags)
    assert started('var', *flags, '--reset=head').head.weight.shape[0] == 48


@pytest.mark.parametrize(('flags', 'words'), [
    (['--freeze=haed'], "--freeze expects class_emb, pos, trunk, head, or patterns .* got 'haed', which"),
    (['--freeze=trunk,'], "got '', which matches none"),
    (['--freeze=*'], r'--freeze=\* matches all \d+ parameters: leave some to train'),
    (['--freeze=trunk,head,pos,class_emb,word_embed.*'], 'leave some to train')])
def test_flags_that_mean_nothing_are_refused(stops, families, tmp_path, flags, words):
    assert re.search(words, stops(train, *training(families['var'], tmp_path, *flags, model='var')))


def test_reset_needs_weights_to_be_left_out(capsys):
    with pytest.raises(SystemExit):
        parse_training(['--model=npp', '--reset=head'])
    assert '--reset is about the weights of --gpt_ckpt: pass both' in capsys.readouterr().err


def test_init_from_of_another_family_says_so(stops, families, sources, tmp_path):
    line = stops(train, *training(families['var'], tmp_path, f'--init_from={sources["npp"]}', '--reset=head',
                                  model='var'))
    assert 'holds no VAR weights' in line


# ---------------------------------------------------------------------------------------------- classes
def test_other_classes_change_the_class_embedding_alone(families, sources, started, tmp_path):
    root = without(make_folder(tmp_path / 'images'), 'bee')
    flags = f'--data_path={root}', f'--init_from={sources["var"]}'
    with pytest.raises(ValueError, match=r'has 4 classes, these data have 3, .* --reset=class_emb'):
        started('var', *flags)
    state = torch.load(sources['var'])
    model = started('var', *flags, '--reset=class_emb')
    assert model.class_emb.weight.shape[0] == 4
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
    assert changed == ['class_emb.weight']

    # where the file names its classes, rows follow the names and no flag is needed
    torch.save(dict(model=state, classes=['ant', 'bee', 'cow', 'doe']), tmp_path / 'named.pth')
    model = started('var', f'--data_path={root}', f'--init_from={tmp_path / "named.pth"}')
    assert torch.equal(model.class_emb.weight, state['class_emb.weight'][[0, 2, 3, 4]])
    torch.save(dict(model=state, classes=['a', 'b', 'c', 'd']), tmp_path / 'others.pth')
    with pytest.raises(ValueError, match=r'knows none of these 3 classes .* --reset=class_emb'):
        started('var', f'--data_path={root}', f'--init_from={tmp_path / "others.pth"}')


# ---------------------------------------------------------------------------------------------- positions
def test_positions_of_the_same_pyramid_stay_to_the_last_bit():
    layout = ScaleLayout((1, 2, 3, 5))
    table_1LC = torch.randn(1, layout.total, 4)
    assert torch.equal(resize_positions(table_1LC, layout, layout), table_1LC)


def test_positions_are_resized_like_images():
    """Scales of equal sides are copied; a constant stays one, and a ramp one away from the border."""
    theirs, ours = ScaleLayout((1, 2, 4, 8)), ScaleLayout((1, 2, 3, 6, 16))
    assert nearest_scales(ours, theirs) == [0, 1, 2, 3, 3]
    rows = [(torch.arange(side) + 0.5) / side for side in theirs.patch_nums]
    ramps = [torch.cartesian_prod(row, row) for row in rows]
    constant = [torch.full((side ** 2, 1), side) for side in theirs.patch_nums]
    table_1LC = torch.cat([torch.cat(ramps), torch.cat(constant)], dim=1)[None]
    resized_1LC = resize_positions(table_1LC, ours, theirs)
    assert torch.equal(resized_1LC[:, :5], table_1LC[:, :5])
    for (begin, end), k in zip(ours.spans, [0, 1, 2, 3, 3], strict=True):
        assert (resized_1LC[0, begin:end, 2] - theirs.patch_nums[k]).abs().max() < 1e-5
    grid = resized_1LC[0, ours.spans[4][0]:, :2].view(16, 16, 2)
    expected = (torch.arange(16) + 0.5) / 16
    inner = slice(4, 12)  # the cubic reaches two of their tokens, four of ours
    assert (grid[inner, :, 0] - expected[inner, None]).abs().max() < 1e-6
    assert (grid[:, inner, 1] - expected[None, inner]).abs().max() < 1e-6


@pytest.mark.parametrize('model', FAMILIES)
def test_weights_of_another_size_fit(started, sources, caplog, model):
    """Learnt positions of every token are resized, and that is said; the other families need nothing."""
    caplog.set_level(logging.INFO)
    state = torch.load(sources[model])
    tuned = started(model, f'--init_from={sources[model]}', *LARGER[model]).state_dict()
    changed = {name for name, value in tuned.items()
               if name in state and not torch.equal(value, state[name])}
    stacks = 'encoder', 'decoder', 'diffusion'
    expected = dict(var={'pos_1LC', 'lvl_1L', 'attn_bias_for_masking'},
                    flowar={'mask', *(f'{stack}_pos_embed_learned' for stack in stacks)})
    assert changed == expected.get(model, set())
    about = dict(var='positions of 3 scales resized from 1_2_4 to 1_2_5',
                 flowar='positions of 4 scales resized from 1_2_4 to 1_2_4_8')
    lines = [record.getMessage() for record in caplog.records if 'resized' in record.getMessage()]
    assert [line.partition(': ')[2] for line in lines] == ([about[model]] if model in about else [])
    caplog.clear()
    started(model, f'--init_from={sources[model]}')
    assert not [record for record in caplog.records if 'resized' in record.getMessage()]


def test_a_finer_scale_has_the_level_of_the_nearest_one():
    theirs, ours = (VAR(VQVAE(**TINY_VQVAE), 4, depth=1, embed_dim=64, num_heads=1, patch_nums=patch_nums)
                    for patch_nums in ((1, 2, 4), (1, 2, 3, 8)))
    fitted, _ = ours.fit_positions(theirs.state_dict())
    assert torch.equal(fitted['lvl_embed.weight'], theirs.lvl_embed.weight[[0, 1, 2, 2]])
    ours.load_state_dict(theirs.state_dict() | fitted)


# ---------------------------------------------------------------------------------------------- freeze
def frozen_and_moved(before, after):
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return before.keys() - changed, changed


@pytest.mark.parametrize('model', ['var', *(pytest.param(name, marks=pytest.mark.slow)
                                            for name in ('flexvar', 'flowar', 'npp'))])
def test_frozen_parts_stay_and_the_others_move(families, sources, here, tmp_path, model):
    flags = (f'--init_from={sources[model]}', '--freeze=trunk', '--steps=6')
    here(train, *training(families[model], tmp_path, *flags, model=model))
    checkpoint = read(tmp_path)
    state = torch.load(sources[model])
    kept, moved = frozen_and_moved(state, checkpoint['trainer']['var_wo_ddp'])
    run = prepared(training(families[model], tmp_path / 'probe', *flags, model=model))
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert moved == trained and len(moved) >= 3
    assert any(re.match(r'(blocks|layers|encoder_blocks)\.0\.', name) for name in kept)
    moments = checkpoint['trainer']['var_opt']['optimizer']['state']
    assert len(moments) == len(trained)  # AdamW knows the others not


@pytest.mark.slow
def test_a_frozen_training_is_exact_after_a_restart_and_with_micro_steps(families, sources, here, tmp_path):
    flags = (f'--init_from={sources["var"]}', '--freeze=trunk,word_embed.bias', '--steps=4', '--ema=0.9',
             '--save_every=1')

    def command(folder, *more):
        return training(families['var'], tmp_path / folder, *flags, *more, model='var')
    here(train, *command('whole'))
    interrupt(lambda: here(train, *command('twice')), 2)
    with pytest.raises(SystemExit, match=r'was trained with --freeze=trunk,word_embed\.bias, got '
                                         r'--freeze=trunk: pass the flag as it was'):
        here(train, *[flag.replace(',word_embed.bias', '') for flag in command('twice')])
    here(train, *command('twice'))
    whole = read(tmp_path / 'whole')
    assert_equal(read(tmp_path / 'twice')['trainer'], whole['trainer'])
    here(train, *command('micro', '--ac=4'))
    assert largest_difference(read(tmp_path / 'micro'), whole) < 1e-6
    averages = whole['trainer']['var_ema']
    assert torch.equal(averages['word_embed.bias'], whole['trainer']['var_wo_ddp']['word_embed.bias'])


@pytest.mark.slow
def test_a_frozen_training_is_the_same_on_two_processes(families, sources, here, tmp_path):
    def command(folder):
        return training(families['var'], tmp_path / folder, f'--init_from={sources["var"]}',
                        '--freeze=trunk,pos', '--steps=4', model='var')
    here(train, *command('one'))
    launch('train.py', command('two'), nproc=2)
    assert largest_difference(read(tmp_path / 'one'), read(tmp_path / 'two')) < 1e-6
