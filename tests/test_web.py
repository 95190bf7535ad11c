"""The web page without gradio: what it draws, what it is told, and what it refuses in one sentence."""
import os
import shlex
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from configs import SAMPLE_CONFIGS, parse_sampling
from models.editing import box_mask
from models.noise import ImageNoise
from pipeline import Pipeline, Pretrained, load
from tests.test_contract import SIDE, TOKENIZERS
from tests.test_pipeline import CLASSES, made, write_checkpoint
from utils.image_store import STORES
from web import settings
from web.about import about, licence_of
from web.controls import command_of, controls_of, value_of, values_of
from web.settings import AppSettings, parse_app
from web.studio import MOST_IMAGES, Studio, painted

FAMILIES = ('var', 'flexvar', 'npp', 'flowar')


@pytest.fixture(scope='module')
def studio_of(tmp_path_factory):
    """The studio of the checkpoint of a tiny generator, by family."""
    root = tmp_path_factory.mktemp('web')
    done = {}

    def get(name):
        if name not in done:
            path = write_checkpoint(made(name), root / f'{name}.pth')
            done[name] = Studio(load(path), str(path), path)
        return done[name]
    return get


def entered(studio, **changed):
    """What the page sends for all settings, with some of them changed."""
    few = dict(num_step=4) if studio.loaded.family == 'flowar' else {}
    return [({one.name: one.value for one in studio.controls} | few | changed)[one.name]
            for one in studio.controls]


def noise_image(seed=0):
    return np.random.RandomState(seed).randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- sampling
CHANGED = dict(var=dict(cfg=2.5, top_k=7, more_smooth=True), flexvar=dict(cfg=1., size='16x32', top_p=0.5),
               npp=dict(cfg=3., temperature=0.7), flowar=dict(cfg=2., guidance=0.5))


@pytest.mark.parametrize('name', FAMILIES)
def test_the_command_line_draws_the_images_of_the_page(studio_of, tmp_path, monkeypatch, here, name):
    """Bit for bit; before them the page has shown every scale."""
    studio = studio_of(name)
    job = studio.job(entered(studio, **CHANGED[name]), seed=5, labels=[4, 1, 5], num_images=4)
    *before, last = studio.sample(job)
    assert [one.is_whole for one in before] == [False] * len(before) and last.is_whole
    assert len(before) == dict(var=3, flexvar=3, flowar=3, npp=1)[name]
    assert last.seconds > 0 and last.num_scales == len(before)

    program, script, *flags = shlex.split(command_of(job))
    assert (program, script) == ('python', 'sample.py')
    assert parse_sampling(flags) == job
    monkeypatch.chdir(tmp_path)
    here(sample, *flags)
    store = STORES['png'](tmp_path / 'local_output/page', 1)
    np.testing.assert_array_equal(np.stack(last.images), np.stack([store.get(i) for i in range(4)]))
    assert np.load('local_output/page/labels.npy').tolist() == [4, 1, 5, 4]


def test_a_job_that_nobody_reads_any_more_ends(studio_of):
    """As when somebody presses Stop: the next job gets the images that it would have got anyway."""
    studio = studio_of('var')
    job = studio.job(entered(studio), labels=[0, 1], num_images=2)
    *_, expected = studio.sample(job)
    left = studio.sample(studio.job(entered(studio), seed=1))
    next(left)
    *_, again = studio.sample(job)
    np.testing.assert_array_equal(again.images, expected.images)
    with pytest.raises(ValueError, match='another job has begun'):
        next(left)


def test_pixels_that_are_not_finite_are_no_images(studio_of):
    model = made('var')
    model.head.weight.data.fill_(torch.nan)
    studio = Studio(Pipeline(model), 'x.pth', Path('x.pth'))
    with pytest.raises(ValueError, match='expected finite pixels'):
        list(studio.sample(studio.job(entered(studio))))


@pytest.mark.parametrize('name', ['var', 'flexvar'])
def test_rows_of_a_comparison_differ_in_one_setting(studio_of, name):
    studio = studio_of(name)
    job = studio.job(entered(studio), seed=2, labels=[3], num_images=2)
    cfg = studio.controls[0]
    rows = list(studio.compare(job, cfg, '1.5, 0 4'))
    assert [row.title for row in rows] == ['cfg = 1.5', 'cfg = 0', 'cfg = 4']
    for row in rows:
        *_, alone = studio.sample(studio.job(entered(studio, cfg=row.job.cfg), 2, [3], 2))
        np.testing.assert_array_equal(row.images, alone.images)
    assert not np.array_equal(rows[1].images, rows[2].images)


# ---------------------------------------------------------------------------------------------- images
@pytest.mark.parametrize('name', ['var', 'flexvar'])
@pytest.mark.parametrize('paste', [False, True])
def test_painted_parts_are_drawn_again(studio_of, name, paste):
    """As `model.edit` draws them; pasted pixels are those of the image."""
    studio = studio_of(name)
    image = noise_image()
    box = box_mask((SIDE, SIDE), 0.25, 0.25, 0.75, 1.)
    job = studio.job(entered(studio), seed=3)
    edited = studio.edit(image, box.numpy(), job, 2, paste)
    options = job.sample_kwargs()
    options.pop('image_size', None)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    expected = studio.model.edit(pixels, ~box, [2], rng=ImageNoise(3, [0]), paste=paste, **options)
    assert np.abs(edited - (expected[0] * 255).permute(1, 2, 0).numpy()).max() <= 0.51
    assert np.array_equal(edited[~box.numpy()], image[~box.numpy()]) == paste
    with pytest.raises(ValueError, match='expected a painted part'):
        studio.edit(image, np.zeros((SIDE, SIDE), bool), job, 2, paste)


def test_paint_on_an_enlarged_copy_is_a_mask_of_the_image():
    layer = np.zeros((8 * 12, 8 * 12, 4), np.uint8)
    layer[12:24, 36:60, 3] = 150   # row 1, columns 3 and 4
    layer[95, 95] = (255, 140, 0, 255)  # one touched pixel is enough
    layer[0, 0, 3] = 20            # the edge of a stroke is not
    mask = painted([Image.fromarray(layer), Image.fromarray(layer * 0)], 8)
    assert np.argwhere(mask).tolist() == [[1, 3], [1, 4], [7, 7]]
    assert not painted([], 8).any()


def test_images_are_refined_and_expanded(studio_of):
    studio = studio_of('flexvar')
    assert studio.is_flexible and not studio_of('var').is_flexible
    job = studio.job(entered(studio))
    image = noise_image()
    assert studio.refine(image, job, 1, start=2, size=48).shape == (48, 48, 3)
    wide = studio.expand(image, job, 5, height=SIDE, width=SIDE + 16, paste=True)
    np.testing.assert_array_equal(wide[:, 8:8 + SIDE], image)
    for wrong in (20, 2048, 0):
        with pytest.raises(ValueError, match=f'multiples of 8 pixels up to 1024, got {wrong}'):
            studio.refine(image, job, 1, start=2, size=wrong)
    with pytest.raises(ValueError, match=r'expected start in 1\.\.3'):
        studio.refine(image, job, 1, start=4, size=SIDE)


@pytest.mark.parametrize('name', [name for name in TOKENIZERS if name != 'patches'])
def test_reconstructions_have_psnr_and_codes(name):
    """Also of a tokenizer without a generator, where the page has nothing else."""
    torch.manual_seed(0)
    studio = Studio(Pretrained(TOKENIZERS[name]().eval()), 'vae.pth', Path('vae.pth'))
    assert not (studio.is_generator or studio.can_edit or studio.is_flexible or studio.controls)
    image = studio.fitted(Image.fromarray(noise_image()))
    rows = studio.reconstruct(image)
    error = ((rows[-1].image.astype(float) - image) ** 2).mean()
    assert rows[-1].psnr == pytest.approx(10 * np.log10(255 ** 2 / error))
    height, width = map(int, rows[-1].scale.split('x'))
    is_discrete = studio.model.vocab_size is not None
    assert rows[-1].num_codes == (height * width if is_discrete else 0)
    assert all(row.num_distinct <= max(row.num_codes, 0) for row in rows)
    assert '| pixels |' in about(studio)


def test_files_are_cut_to_the_size_that_is_drawn(studio_of, tmp_path):
    studio = studio_of('var')
    Image.fromarray(noise_image()).resize((50, 40)).save(tmp_path / 'a.png')
    assert studio.open(str(tmp_path / 'a.png')).shape == (SIDE, SIDE, 3)
    exact = noise_image(1)
    Image.fromarray(exact).save(tmp_path / 'b.png')
    np.testing.assert_array_equal(studio.open(str(tmp_path / 'b.png')), exact)
    (tmp_path / 'c.png').write_text('no image')
    with pytest.raises(ValueError, match=r"cannot read 'c\.png'") as refused:
        studio.open(str(tmp_path / 'c.png'))
    assert str(tmp_path) not in str(refused.value)


# ---------------------------------------------------------------------------------------------- controls
def test_controls_are_the_settings_that_change_images():
    names = {family: {one.name for one in controls_of(family, {})} for family in FAMILIES}
    by_scale = {'cfg_from', 'cfg_to', 'ssg', 'ssg_prior', 'ssg_schedule'}
    assert names == dict(
        var={*by_scale, 'cfg', 'top_k', 'top_p', 'more_smooth'},
        flexvar={*by_scale, 'cfg', 'infer_patch_nums', 'size', 'maxpn', 'greedy_unseen', 'pos_mode',
                 'used_llamagen_cfg', 'top_k', 'top_p'},
        npp={'cfg', 'img_size', 'image_size_eval', 'cfg_interval', 'temperature', 'top_k', 'top_p'},
        flowar={'cfg', 'guidance', 'num_step', 'flow_upper_steps', 'flow_lower_steps'})
    for family, shown in names.items():
        needed = dict(model=family, ckpt='x')
        assert shown.isdisjoint(SAMPLE_CONFIGS[family](**needed).CHANGE_NOTHING)


def test_published_weights_begin_with_their_settings():
    pipe = Pipeline(made('var'), sampling=dict(guidance=2.5, top_k=900, top_p=0.96, more_smooth=False))
    start = {one.name: one.value for one in Studio(pipe, 'x', Path('x')).controls}
    assert start == dict(cfg=1.5, cfg_from=0, cfg_to=-1, ssg=0., ssg_prior='fused', ssg_schedule='constant',
                         top_k=900, top_p=0.96, more_smooth=False)


@pytest.mark.parametrize(('name', 'text', 'value'), [
    ('top_k', 900., 900), ('top_k', '900', 900), ('cfg', '1e1', 10.), ('more_smooth', True, True),
    ('more_smooth', '0', False), ('more_smooth', 'on', True)])
def test_entered_values_have_their_type(name, text, value):
    control = next(one for one in controls_of('var', {}) if one.name == name)
    found = value_of(control, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(('name', 'text', 'words'), [
    ('top_k', 1.5, 'top_k must be a whole number, got 1.5'), ('top_k', None, 'got nothing'),
    ('cfg', 'abc', 'cfg must be a number, got abc'), ('cfg', 'nan', 'must be a number'),
    ('cfg', 'inf', 'must be a number'), ('more_smooth', 'x', 'more_smooth must be 1 or 0, got x')])
def test_other_values_are_refused(name, text, words):
    control = next(one for one in controls_of('var', {}) if one.name == name)
    with pytest.raises(ValueError, match=words):
        value_of(control, text)


def test_lists_of_values():
    cfg, *_, smooth = controls_of('var', {})
    assert values_of(cfg, ' 0,1.5  4 ') == [0., 1.5, 4.]
    assert values_of(smooth, '0 1') == [False, True]
    for text in ('', '1', '1 2 3 4 5 6'):
        with pytest.raises(ValueError, match='expected 2 to 5 values of cfg'):
            values_of(cfg, text)


@pytest.mark.parametrize(('name', 'job', 'changed', 'words'), [
    ('var', dict(num_images=MOST_IMAGES + 1), {}, 'draws 1 to 16 images at a time, got 17'),
    ('var', dict(num_images=0), {}, 'got 0'),
    ('var', dict(seed=-1), {}, 'the seed must be in 0'),
    ('var', dict(seed=None), {}, 'seed must be a whole number, got nothing'),
    ('var', {}, dict(top_p=2), '--top_p must be in .0, 1., got 2'),
    ('flexvar', {}, dict(size='2048x32'), 'at most 1024 pixels per side, got 2048'),
    ('flexvar', {}, dict(size='a'), '--size must be rows x columns'),
    ('flexvar', {}, dict(infer_patch_nums='1_200'), 'at most 1024 pixels per side, got 1600'),
    ('flexvar', {}, dict(infer_patch_nums='_'.join('1' * 90) + '_4'), 'at most 64 scales'),
    ('flexvar', {}, dict(infer_patch_nums='1_' * 150), 'at most 200 letters'),
    ('flexvar', {}, dict(infer_patch_nums='1' + '_60' * 45), 'at most 65,536 codes'),
    ('flexvar', dict(num_images=5), dict(size='1024'), 'at most 4 images of 1024 pixels'),
    ('npp', {}, dict(image_size_eval=9999), 'at most 1024 pixels'),
    ('flowar', {}, dict(num_step=1000), 'at most 250 steps, got 1000')])
def test_jobs_that_are_too_large_or_wrong_are_refused(studio_of, name, job, changed, words):
    studio = studio_of(name)
    with pytest.raises(ValueError, match=words) as refused:
        studio.job(entered(studio, **changed), **job)
    assert len(str(refused.value).splitlines()) == 1


def test_classes_have_their_names(studio_of):
    assert studio_of('var').choices == [*((f'{i} {name}', i) for i, name in enumerate(CLASSES)),
                                        ('no class', 5)]
    assert Studio(Pipeline(made('var')), 'x', Path('x')).choices[0] == ('0', 0)


def test_a_class_is_found_by_typing(studio_of):
    gradio = pytest.importorskip('gradio', reason='the page needs requirements-web.txt')
    page = pytest.importorskip('web.page')
    widgets = page.Page(studio_of('flexvar')).build().blocks.values()
    menus = [widget for widget in widgets if isinstance(widget, gradio.Dropdown)
             and ('no class', 5) in widget.choices]
    assert len(menus) == 5, 'one each to sample, compare, edit, refine and expand'
    assert all(menu.filterable for menu in menus)


# ---------------------------------------------------------------------------------------------- about
def test_about_names_the_file_and_its_digest(studio_of, tmp_path):
    studio = studio_of('var')
    text = about(studio)
    digest = studio.loaded.digests['ckpt']
    shown = [digest, str(studio.path), '| classes | 5 |', 'of the last step', '32x32', 'cfg 1.5', '| abc |']
    for part in shown:
        assert part in text, part
    assert 'belongs to whoever trained it' in text
    studio.loaded.save_pretrained(tmp_path)
    folder = Studio(load(tmp_path), 'owner/name', tmp_path)
    assert {*folder.loaded.digests} == {'ckpt', 'vae_ckpt'} and 'its model card names none' in about(folder)
    card = tmp_path / 'README.md'
    card.write_text(card.read_text().replace('---\n', '---\nlicense: mit\n', 1))
    assert '| licence of the weights | mit |' in about(folder)
    assert licence_of(Path('FlowAR-S.pth')).startswith('Apache-2.0 (hub repository OliverRen/')
    assert licence_of(Path('kl16.ckpt')) == 'none is known here: ask their authors'


# ---------------------------------------------------------------------------------------------- settings
def test_the_newest_checkpoint_of_a_generator_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, 'OUTPUT', tmp_path)
    with pytest.raises(ValueError, match=r'found no checkpoint of a generator below .*: run make demo'):
        _ = AppSettings().source
    for age, name in enumerate(['b/ar-ckpt-last.pth', 'a/ar-ckpt-last.pth', 'a/vae-ckpt-last.pth']):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, ns=(age, age))
    assert AppSettings().source == str(tmp_path / 'a/ar-ckpt-last.pth')
    assert AppSettings(ckpt='owner/name').source == 'owner/name'


def test_other_machines_need_a_password(tmp_path, capsys):
    assert AppSettings().address == '127.0.0.1' and AppSettings().logins() is None
    with pytest.raises(SystemExit):
        parse_app(['--listen'])
    assert 'pass --auth=FILE' in capsys.readouterr().err
    file = tmp_path / 'who'
    file.write_text('ann:a:b\n\nbob:x\n')
    app = AppSettings(listen=True, auth=str(file))
    assert app.address == '0.0.0.0' and app.logins() == [('ann', 'a:b'), ('bob', 'x')]
    for text in ('', 'ann\n', 'ann:\n', ':secret\n'):
        file.write_text(text)
        with pytest.raises(ValueError, match='expected a line NAME:PASSWORD for everybody') as refused:
            app.logins()
        assert 'secret' not in str(refused.value)
    file.unlink()
    with pytest.raises(ValueError, match=r'cannot read it \(No such file'):
        app.logins()


def test_the_server_asks_for_the_password(tmp_path, monkeypatch):
    pytest.importorskip('gradio', reason='the page needs requirements-web.txt')
    app = pytest.importorskip('app')
    served = {}

    def launch(**options):
        served.update(options)
        return None, 'http://here', None
    blocks = SimpleNamespace(launch=launch)
    monkeypatch.setattr(app, 'Page', lambda studio: SimpleNamespace(build=lambda: blocks))
    file = tmp_path / 'who'
    file.write_text('ann:x\n')
    app.serve(AppSettings(listen=True, auth=str(file)), SimpleNamespace(title='x'), wait=False)
    assert (served['server_name'], served['auth']) == ('0.0.0.0', [('ann', 'x')])
    app.serve(AppSettings(), SimpleNamespace(title='x'), wait=False)
    assert (served['server_name'], served['auth']) == ('127.0.0.1', None)


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f'port {port} cannot be used'):
            settings.require_port('127.0.0.1', port)
    settings.require_port('127.0.0.1', port)
