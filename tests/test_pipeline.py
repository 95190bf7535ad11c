"""`load` and `Pipeline`: files of all kinds, folders, the hub, one line per error, images as of sample.py."""
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dist
import export
import pipeline
import sample
from models import VQVAE, name_of
from pipeline import Pipeline, Pretrained, load
from tests.runs import TINY_VQVAE, VAR_FLAGS, VQVAE_FLAGS, assert_equal, on_two_ranks
from tests.test_checkpoint import Harmful
from tests.test_contract import GENERATORS, TOKENIZERS, frozen
from utils import hub
from utils.hub import sha256_of

FAMILIES = ('var', 'flexvar', 'npp', 'flowar')
CLASSES = ('ant', 'bee', 'cow', 'doe', 'elk')


def slow(*values):
    """These values of a parameter, for `make test-slow`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def made(name):
    """A tiny generator in eval mode with random weights, the same at every call."""
    torch.manual_seed(0)
    return GENERATORS[name].make().eval()


def write_checkpoint(model, path, ema=False, **beside):
    """What train.py saves of a generator."""
    state = model.state_dict()
    trainer = dict(var_wo_ddp=state, config=model.config_state(1.), vae_local=model.tokenizer.state_dict(),
                   vae_config=model.tokenizer.config_state(1.))
    if ema:
        trainer['var_ema'] = {key: t + 1 if t.is_floating_point() else t for key, t in state.items()}
    args = dict(model=name_of(model), data_path='/home/somebody', epochs=7, output_dir='/home/somebody')
    torch.save(dict(epoch=1, iter=0, trainer=trainer, args=args, classes=CLASSES, git_commit='abc',
                    versions={}) | beside, path)
    return path


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A folder with the checkpoint and the released folder of a generator of every family."""
    root = tmp_path_factory.mktemp('pipeline')
    for name in FAMILIES:
        write_checkpoint(made(name), root / f'{name}.pth')
        load(root / f'{name}.pth').save_pretrained(root / name)
    return root


@pytest.fixture
def folder(root, tmp_path):
    """A copy of the released folder of a VAR, which a test may damage."""
    return Path(shutil.copytree(root / 'var', tmp_path / 'copy'))


def line_of(stop):
    text = str(stop.value)
    assert len(text.splitlines()) == 1 and len(text) < 600, text
    return text


def small(pipe, **options):
    """Two images of it, in little time."""
    few = dict(num_steps=3) if pipe.family == 'flowar' else {}
    return pipe([0, 1], output='pt', **few, **options)


# ---------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize('name', ['npp', 'flowar', *slow('var', 'flexvar')])
@pytest.mark.parametrize('is_named', [False, *slow(True)])
def test_checkpoints_tell_their_family(root, tmp_path, name, is_named):
    """By the settings in the file, or else by the keys of the weights."""
    path = root / f'{name}.pth'
    if not is_named:
        path = tmp_path / 'file.pth'
        write_checkpoint(made(name), path, args={})
    pipe = load(path)
    assert type(pipe.model) is GENERATORS[name].make().__class__ and not pipe.model.training
    assert pipe.classes == CLASSES and pipe.weights == 'raw'
    assert_equal(pipe.model.state_dict(), made(name).state_dict())
    assert_equal(pipe.tokenizer.state_dict(), made(name).tokenizer.state_dict())


@pytest.mark.parametrize('name', ['var', 'npp', *slow('flexvar', 'flowar')])
def test_released_files_take_their_tokenizer(tmp_path, monkeypatch, name):
    """By path, as a module, or by the name under which it is published."""
    model = made(name)
    published = next(file for file, row in hub.PUBLISHED.items() if row.family == name)
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model.state_dict()), published)
    torch.save(dict(model.state_dict()), 'renamed.pth')
    torch.save(dict(model=model.tokenizer.state_dict(), config=model.tokenizer.config_state(1.)), 'own.pth')
    for tokenizer in ('own.pth', model.tokenizer):
        pipe = load('renamed.pth', tokenizer=tokenizer)
        assert_equal(pipe.tokenizer.state_dict(), model.tokenizer.state_dict())
        assert_equal(pipe.model.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match='without its tokenizer: pass the file of') as stop:
        load('renamed.pth')
    line_of(stop)
    Path('own.pth').rename(hub.PUBLISHED[published].tokenizer)
    pipe = load(published)
    assert_equal(pipe.tokenizer.state_dict(), model.tokenizer.state_dict())
    assert pipe.sampling == pipeline.default_sampling(name, hub.PUBLISHED[published].preset)
    assert_equal(load(hub.PUBLISHED[published].preset).model.state_dict(), model.state_dict())


def test_another_tokenizer_is_refused(root):
    torch.manual_seed(1)
    other = frozen(TOKENIZERS['vqvae'])
    with pytest.raises(ValueError, match='was trained on the codes of another tokenizer') as stop:
        load(root / 'var.pth', tokenizer=other)
    line_of(stop)
    with pytest.raises(ValueError, match='needs a VQVAE, got a VQModel') as stop:
        load(root / 'var.pth', tokenizer=frozen(TOKENIZERS['vq16']))
    line_of(stop)


@pytest.mark.parametrize('name', ['vqvae', 'flexvae', 'kl16', *slow('vq16', 'vq8')])
def test_tokenizers_alone_go_round(tmp_path, name):
    model = frozen(TOKENIZERS[name])
    torch.save(dict(model=model.state_dict(), config=model.config_state(1.), args=dict(model=name)),
               tmp_path / 'vae-export.pth')
    first = load(tmp_path / 'vae-export.pth')
    first.save_pretrained(tmp_path / 'folder')
    again = load(tmp_path / 'folder')
    assert type(again) is Pretrained and type(again.model) is type(model)
    assert not any(parameter.requires_grad for parameter in again.model.parameters())
    assert_equal(again.model.state_dict(), model.state_dict())
    assert again.model.config_state(1.) == model.config_state(1.)
    assert not (tmp_path / 'folder' / 'model.safetensors').exists()


def test_the_tokenizer_of_a_generator_alone(root):
    for source in (root / 'npp.pth', root / 'npp'):
        loaded = load(source, model='vq16')
        assert_equal(loaded.model.state_dict(), made('npp').tokenizer.state_dict())


def test_upstream_training_checkpoints(tmp_path):
    """Their settings are no dict of ours; FlowAR has averages beside its weights."""
    model = made('var')
    trainer = dict(var_wo_ddp=model.state_dict(), vae_local=model.tokenizer.state_dict(),
                   config=dict(patch_nums=[1, 2, 4], label_smooth=0.), var_opt={})
    torch.save(dict(epoch=3, iter=0, trainer=trainer, args='depth=2'), tmp_path / 'ar-ckpt-last.pth')
    assert_equal(load(tmp_path / 'ar-ckpt-last.pth').model.state_dict(), model.state_dict())
    model = made('flowar')
    averaged = {key: 2 * t for key, t in model.state_dict().items()}
    torch.save(dict(model=model.state_dict(), model_ema=averaged, epoch=3), tmp_path / 'checkpoint-last.pth')
    for weights, factor in (('ema', 2), ('raw', 1)):
        pipe = load(tmp_path / 'checkpoint-last.pth', weights, tokenizer=model.tokenizer)
        assert torch.equal(pipe.model.class_emb.weight, factor * model.class_emb.weight)
        assert pipe.weights == weights


def test_averaged_weights_are_the_default(tmp_path):
    path = write_checkpoint(made('var'), tmp_path / 'ar-ckpt-last.pth', ema=True)
    averaged, raw = load(path), load(path, weights='raw')
    assert torch.equal(averaged.model.head.bias, raw.model.head.bias + 1)
    assert (averaged.weights, raw.weights) == ('ema', 'raw')


# ---------------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize('name', FAMILIES)
def test_folders_go_round(root, tmp_path, name):
    """Bit for bit: weights, settings, pictures, and the bytes of the next folder."""
    before, after = load(root / f'{name}.pth'), Pipeline.from_pretrained(root / name)
    assert_equal(after.model.state_dict(), before.model.state_dict())
    assert_equal(after.tokenizer.state_dict(), before.tokenizer.state_dict())
    assert after.model.config_state(1.) == before.model.config_state(1.)
    assert after.tokenizer.config_state(1.) == before.tokenizer.config_state(1.)
    assert (after.classes, after.weights) == (before.classes, before.weights)
    assert torch.equal(small(after), small(before))
    after.save_pretrained(tmp_path / 'again')
    for file in ('config.json', 'model.safetensors', 'tokenizer.safetensors'):
        assert (tmp_path / 'again' / file).read_bytes() == (root / name / file).read_bytes()


@pytest.mark.parametrize('name', ['var', *slow('npp', 'flexvar', 'flowar')])
def test_half_precision(root, tmp_path, name):
    """Files of half the size hold the rounded weights; buffers and the tokenizer stay as they are."""
    source = load(root / f'{name}.pth')
    source.save_pretrained(tmp_path / 'half', torch.bfloat16)
    parameters = dict(source.model.named_parameters())
    stored = load_file(tmp_path / 'half' / 'model.safetensors')
    assert {key for key, t in stored.items() if t.dtype == torch.bfloat16} == set(parameters)
    full, half = load(tmp_path / 'half'), load(tmp_path / 'half', dtype=torch.bfloat16)
    for key, parameter in parameters.items():
        assert torch.equal(full.model.state_dict()[key], parameter.bfloat16().float())
        assert torch.equal(half.model.state_dict()[key], parameter.bfloat16())
    assert_equal(half.tokenizer.state_dict(), source.tokenizer.state_dict())
    half.save_pretrained(tmp_path / 'again')
    again = tmp_path / 'again' / 'model.safetensors'
    assert again.read_bytes() == (tmp_path / 'half' / 'model.safetensors').read_bytes()
    images = small(half)
    assert images.dtype == torch.float32 and images.isfinite().all() and images.std() > 0


def test_config_and_card_tell_what_it_is(root):
    config = json.loads((root / 'var' / 'config.json').read_text())
    assert (config['model'], config['tokenizer']['model']) == ('var', 'vqvae')
    assert config['classes'] == list(CLASSES) and config['num_classes'] == len(CLASSES)
    assert config['training']['git_commit'] == 'abc' and config['training']['settings']['epochs'] == 7
    assert config['training']['file_sha256'] == sha256_of(root / 'var.pth')
    card = (root / 'var' / 'README.md').read_text()
    assert '# license:' in card and f"load('{root / 'var'}')" in card and '4 elk' in card
    assert 'abc' in card and 'top_k' in card
    assert '/home/somebody' not in card + (root / 'var' / 'config.json').read_text()


def test_a_card_of_the_owner_stays(folder):
    (folder / 'README.md').write_text('mine')
    load(folder).save_pretrained(folder)
    assert (folder / 'README.md').read_text() == 'mine' and not list(folder.glob('.*'))


def test_a_full_disk_leaves_the_folder(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pipe = load(folder)

    def full(*_, **__):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('safetensors.torch.save_file', full)
    with pytest.raises(OSError, match='No space left'):
        pipe.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_writes_the_same_folder(root, tmp_path, here):
    here(export, root / 'flexvar.pth', tmp_path / 'out')
    for file in ('config.json', 'model.safetensors', 'tokenizer.safetensors'):
        assert (tmp_path / 'out' / file).read_bytes() == (root / 'flexvar' / file).read_bytes()


def test_sample_takes_folders(root, tmp_path, here):
    for output, ckpt in (('a', 'flexvar'), ('b', 'flexvar.pth')):
        here(sample, '--model=flexvar', f'--ckpt={root / ckpt}', f'--output={tmp_path / output}',
             '--num_images=3')
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()


@pytest.mark.parametrize('base', [VAR_FLAGS, *slow(VQVAE_FLAGS)], ids=['var', 'vqvae'])
def test_a_training_leaves_the_folder_of_its_checkpoint(train_here, tmp_path, base):
    run = train_here(tmp_path / 'run', '--ep=1', '--ema=0.9', '--export=1', base=base)
    prefix = 'ar' if base is VAR_FLAGS else 'vae'
    load(run / f'{prefix}-ckpt-last.pth').save_pretrained(tmp_path / 'again')
    for file in {path.name for path in (run / 'model').glob('*.safetensors')}:
        assert (run / 'model' / file).read_bytes() == (tmp_path / 'again' / file).read_bytes()
    configs = []
    for folder in (run / 'model', tmp_path / 'again'):
        config = json.loads((folder / 'config.json').read_text())
        config['training'] = {name: config['training'][name] for name in ('settings', 'git_commit', 'epoch')}
        configs.append(config)
    assert configs[0] == configs[1] and configs[0]['weights'] == 'ema'
    written = (run / 'model' / 'config.json').stat().st_mtime_ns
    train_here(tmp_path / 'run', '--ep=1', '--ema=0.9', '--export=1', base=base)
    assert (run / 'model' / 'config.json').stat().st_mtime_ns == written


# ---------------------------------------------------------------------------------------------- errors
def edit_config(**entries):
    def damage(folder):
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(config | entries))
    return damage


def truncate(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    path = folder / 'model.safetensors'
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def pickle_code(folder):
    torch.save(dict(weights=Harmful()), folder / 'model.safetensors')


def weights_of_another(folder):
    """With their digest, as somebody would write them who edits by hand."""
    path = folder / 'model.safetensors'
    save_file({'head.weight': torch.zeros(2, 2)}, path)
    config = json.loads((folder / 'config.json').read_text())
    edit_config(sha256=config['sha256'] | {path.name: sha256_of(path)})(folder)


DAMAGES = {
    'no config': (lambda folder: (folder / 'config.json').unlink(), 'has no config.json'),
    'config is no JSON': (lambda folder: (folder / 'config.json').write_text('{'),
                          'config.json.* cannot be read'),
    'config is a list': (lambda folder: (folder / 'config.json').write_text('[]'), 'holds a list'),
    'config of another program': (lambda folder: (folder / 'config.json').write_text('{"depth": 16}'),
                                  'another program'),
    'later format': (edit_config(format=2), 'has format 2, this version of the code reads 1'),
    'unknown family': (edit_config(model='mar'), "of the family 'mar', known are var"),
    'other family': (edit_config(model='npp'), 'holds no NPP weights'),
    'no tokenizer entry': (edit_config(tokenizer=None), '"tokenizer" is missing'),
    'no digests': (edit_config(sha256={}), 'has no digest of model.safetensors'),
    'no weights': (lambda folder: (folder / 'model.safetensors').unlink(),
                   'lacks its file model.safetensors'),
    'no tokenizer': (lambda folder: (folder / 'tokenizer.safetensors').unlink(),
                     'lacks its file tokenizer.safetensors'),
    'truncated': (truncate, 'model.safetensors.* cannot be read: it is damaged'),
    'tampered': (flip, 'model.safetensors.* has SHA-256 .* its config.json says'),
    'pickled code': (pickle_code, 'cannot be read'),
    'other weights': (weights_of_another, 'holds no VAR weights'),
    'unknown option': (edit_config(sampling=dict(top_q=1)), "unknown option 'top_q' of var"),
}


@pytest.mark.parametrize('kind', DAMAGES)
def test_malformed_folders_are_told_in_one_line(folder, monkeypatch, kind):
    monkeypatch.chdir(folder)
    damage, words = DAMAGES[kind]
    damage(folder)
    with pytest.raises(ValueError, match=words) as stop:
        load(folder)
    assert str(folder) in line_of(stop) or kind == 'unknown option'
    assert not Path('harmed').exists()


@pytest.mark.parametrize(('source', 'kwargs', 'words'), [
    ('nowhere.pth', {}, "found no file 'nowhere.pth'"),
    ('var_d17', {}, 'such as var_d16'),
    ('kl16.ckpt', {}, 'no hub repository of it is known'),
    ('empty', {}, 'has no config.json'),
    ('output', {}, 'pass a checkpoint in it, such as ar-ckpt-last.pth'),
    ('text.pth', {}, 'text, not weights'),
    ('other.pth', {}, 'holds weights of no known model'),
    ('var.pth', dict(weights='best'), 'must be ema or raw'),
    ('var.pth', dict(dtype=torch.int8), 'dtype must be torch.float32'),
    ('var.pth', dict(model='vqgan'), 'expected a family'),
    ('var.pth', dict(model='npp'), 'holds no NPP weights'),
    ('var', dict(model='npp'), "holds a var, got 'npp'"),
    ('var.pth', dict(tokenizer='nowhere.pth'), "found no file 'nowhere.pth'"),
    ('vae.pth', dict(tokenizer='vae.pth'), 'needs no other one'),
    ('vae.pth', dict(dtype=torch.bfloat16), 'stays in float32'),
    ('vae.pth', {}, 'does not tell the sides of its 3 code maps')])
def test_what_cannot_be_loaded_is_told_in_one_line(root, tmp_path, monkeypatch, source, kwargs, words):
    monkeypatch.chdir(tmp_path)
    for name in ('var.pth', 'var'):
        Path(name).symlink_to(root / name)
    Path('empty').mkdir()
    Path('output').mkdir()
    Path('output/ar-ckpt-last.pth').touch()
    Path('text.pth').write_text('no weights')
    torch.save(dict(a=torch.zeros(1)), 'other.pth')
    vae = VQVAE(**TINY_VQVAE)
    settings = dict(config=vae.config_state(1.)) if kwargs else {}
    torch.save(dict(model=vae.state_dict(), **settings), 'vae.pth')
    with pytest.raises(ValueError, match=words) as stop:
        load(source, **kwargs)
    line_of(stop)


# ---------------------------------------------------------------------------------------------- the hub
def test_repositories_are_folders(root, monkeypatch):
    asked = []

    def snapshot(repo, **kwargs):
        asked.append((repo, kwargs['revision'], kwargs['local_files_only']))
        return str(root / 'var')
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
    assert_equal(load('owner/name', revision='abc').model.state_dict(), made('var').state_dict())
    assert asked == [('owner/name', 'abc', False)]


def test_files_of_repositories(root, monkeypatch):
    asked = []

    def download(repo, file, **kwargs):
        asked.append((repo, file, kwargs['revision']))
        return str(root / 'var.pth')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    load('owner/name:var.pth', revision='v1')
    row = hub.PUBLISHED['var_d16.pth']._replace(revision='f00', sha256=sha256_of(root / 'var.pth'))
    monkeypatch.setitem(hub.PUBLISHED, 'var_d16.pth', row)
    load('var_d16')
    assert asked == [('owner/name', 'var.pth', 'v1'), ('FoundationVision/var', 'var_d16.pth', 'f00')]
    monkeypatch.setitem(hub.PUBLISHED, 'var_d16.pth', row._replace(sha256='0' * 64))
    with pytest.raises(ValueError, match=r'has SHA-256 .* expected 0000') as stop:
        load('var_d16')
    line_of(stop)


@pytest.mark.parametrize('source', ['owner/name', 'owner/name:file.pth', 'var_d16'])
def test_offline_is_told_in_one_line(tmp_path, monkeypatch, source):
    """Nothing is asked of a network: the cache alone is searched, and it is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ValueError, match='since HF_HUB_OFFLINE is set') as stop:
        load(source)
    line_of(stop)


def download_on_rank(rank, root, log):
    """Both ranks load the same repository, and note who asked the hub."""
    def snapshot(repo, **kwargs):
        with log.open('a') as file:
            file.write(f'{rank} {kwargs["local_files_only"]}\n')
        return str(root / 'var')
    huggingface_hub.snapshot_download = snapshot
    os.environ['LOCAL_RANK'] = str(rank)
    torch.distributed.init_process_group('gloo', init_method=f'file://{log}.group', rank=rank, world_size=2)
    load('owner/name')
    dist.finalize()


@pytest.mark.slow
def test_one_process_of_a_node_downloads(root, tmp_path):
    on_two_ranks(download_on_rank, root, tmp_path / 'log')
    assert (tmp_path / 'log').read_text() == '0 False\n1 True\n'


class Hub:
    """What of HfApi an upload uses."""
    def __init__(self, has_card=False, failure=None):
        self.has_card, self.failure, self.files, self.ignored, self.made = has_card, failure, {}, None, []

    def create_repo(self, repo, private, exist_ok):
        if self.failure:
            raise self.failure
        self.made.append((repo, private, exist_ok))

    def file_exists(self, repo, name):
        return self.has_card and name == 'README.md'

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.ignored = ignore_patterns
        return 'https://hub/commit'


def test_uploads_hold_the_folder(root, monkeypatch):
    api = Hub()
    monkeypatch.setattr('huggingface_hub.HfApi', lambda: api)
    assert load(root / 'var').push_to_hub('owner/name', private=True) == 'https://hub/commit'
    assert api.made == [('owner/name', True, True)] and api.ignored == []
    for file in ('config.json', 'model.safetensors', 'tokenizer.safetensors'):
        assert api.files[file] == (root / 'var' / file).read_bytes()
    assert b"load('owner/name')" in api.files['README.md']
    api.has_card = True
    load(root / 'var').push_to_hub('owner/name')
    assert api.ignored == ['README.md']  # the licence of its owner is in there


@pytest.mark.parametrize(('repo', 'words'), [('name', "such as 'owner/name', got 'name'"),
                                             ('owner/name', 'PermissionError: no right')])
def test_refused_uploads_are_told_in_one_line(root, monkeypatch, repo, words):
    monkeypatch.setattr('huggingface_hub.HfApi', lambda: Hub(failure=PermissionError('no\nright')))
    with pytest.raises(ValueError, match=words) as stop:
        load(root / 'var').push_to_hub(repo)
    line_of(stop)


# ---------------------------------------------------------------------------------------------- sampling
OPTIONS = dict(
    var=(dict(guidance=3., top_k=20, top_p=0.9), ['--cfg=2', '--top_k=20', '--top_p=0.9']),
    flexvar=(dict(guidance=3., top_k=20, max_pn=3), ['--cfg=2', '--top_k=20', '--maxpn=3']),
    npp=(dict(guidance=2., top_k=20, temperature=0.9), ['--cfg=2', '--top_k=20', '--temperature=0.9']),
    flowar=(dict(guidance=2., num_steps=3, guidance_until=0.8),
            ['--cfg=2', '--num_step=3', '--guidance=0.8']))


@pytest.mark.parametrize('name', FAMILIES)
def test_images_are_those_of_a_job_of_sample(root, tmp_path, here, name):
    """With the same settings and batches to the last bit, and with other batches but for rounding."""
    options, flags = OPTIONS[name]
    here(sample, f'--model={name}', f'--ckpt={root / name}.pth', f'--output={tmp_path / "out"}', '--seed=5',
         '--num_images=5', '--bs=3', '--classes=4_1', '--shuffle=-1', *flags)
    with np.load(tmp_path / 'out.npz') as archive:
        expected, label_N = archive['arr_0'], archive['arr_1']
    pipe = load(root / name)
    assert pipe.label_ids([4, 'bee'], 5) == label_N.tolist()
    images = pipe([4, 'bee'], num_images=5, seed=5, batch_size=3, output='np', **options)
    assert np.array_equal(images, expected) and len(np.unique(images.reshape(5, -1), axis=0)) == 5
    other = pipe([4, 'bee'], num_images=5, seed=5, batch_size=5, output='np', **options)
    assert np.abs(other.astype(int) - expected).max() <= 1
    assert not np.array_equal(pipe([4], seed=6, output='np', **options), expected[:1])


@pytest.mark.parametrize('name', FAMILIES)
def test_defaults_are_those_of_sample(root, name):
    pipe = load(root / name)
    config = sample.parse_sampling([f'--model={name}', '--ckpt=x'])
    assert pipe.sampling == config.sample_kwargs()


def test_outputs_are_the_same_images(root):
    pipe = load(root / 'var')
    pixels = pipe('cow', num_images=2, output='pt')
    array = pipe(2, num_images=2, output='np')
    pictures = pipe(torch.tensor([2, 2]), progress=True)
    assert pixels.shape == (2, 3, 32, 32) and pixels.min() >= 0 and pixels.max() <= 1
    assert array.dtype == np.uint8 and np.array_equal(array, pipeline.to_bytes(pixels))
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), array)
    assert len(pipe(output='np')) == len(CLASSES)  # all classes in turn


@pytest.mark.parametrize(('labels', 'kwargs', 'words'), [
    ('bea', {}, "'bea' is no class of this model: the nearest ones are bee"),
    (6, {}, r'class ids in 0\.\.4, or 5 for no class, got 6'),
    ([0, -1], {}, 'got -1'), ([0.5], {}, 'got 0.5'), ([True], {}, 'got True'), ([], {}, 'at least one label'),
    (0, dict(num_images=0), 'num_images must be an integer of at least 1'),
    (0, dict(batch_size=0), 'batch_size must be'), (0, dict(seed=-1), 'seed must be'),
    (0, dict(output='jpg'), "one of pil, pt, np, got 'jpg'"),
    (0, dict(top_q=3), "unknown option 'top_q' of var: the nearest one is top_p"),
    (0, dict(top_k=-1), 'top_k must be at least 0'), (0, dict(top_p=2.), 'top_p must be in'),
    (0, dict(guidance=float('nan')), 'guidance must be a finite number'),
    (0, dict(top_k='9'), 'top_k must be a finite number'),
    (0, dict(top_k=2.5), 'top_k must be an integer')])
def test_calls_that_cannot_be_are_told_in_one_line(root, labels, kwargs, words):
    pipe = load(root / 'var')
    with pytest.raises(ValueError, match=words) as stop:
        pipe(labels, **kwargs)
    line_of(stop)


def test_names_need_a_checkpoint_that_tells_them(tmp_path):
    for classes in (None, CLASSES[:2]):
        pipe = load(write_checkpoint(made('var'), tmp_path / 'var.pth', classes=classes))
        with pytest.raises(ValueError, match='do not tell the names of the classes'):
            pipe('bee')


def test_pixels_that_are_not_finite_are_refused(root):
    pipe = load(root / 'var')
    pipe.model.head.weight.data.fill_(float('nan'))
    with pytest.raises(ValueError, match='image 0 has nan'):
        pipe(0)
