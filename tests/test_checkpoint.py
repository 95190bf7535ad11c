"""Checkpoint files: damaged bits, files of other kinds, access, saving, locks, prefixes of keys."""
import errno
import fcntl
import gc
import io
import logging
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import REPO
from training.saving import CheckpointWriter
from utils import tensor_files
from utils.checkpoint import (
    UnusableFile,
    load_file,
    load_on_all_ranks,
    load_with_digest,
    lock_folder,
    model_weights,
    newest_checkpoint,
    remove_leftovers,
    save_file,
    set_aside,
    tokenizer_weights,
)
from utils.hub import sha256_of

PREFIX = 'ar-ckpt'
WEIGHTS = {'head.weight': torch.arange(6.).view(2, 3), 'head.bias': torch.ones(2)}


def state_of(epoch=1, fill=1.):
    """What a training saves, as small as it may be."""
    weights = {'blocks.0.weight': torch.full((40, 8), fill), 'head.bias': torch.arange(5)}
    optimizer = dict(state={0: dict(exp_avg=torch.full((40, 8), fill))}, param_groups=[dict(lr=1e-3)])
    return dict(epoch=epoch, iter=0, trainer=dict(var_wo_ddp=weights, optimizer=optimizer), args={})


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def save_checkpoint(state, folder, prefix, is_best=False):
    """As a training saves, without its thread."""
    CheckpointWriter(folder, prefix, in_background=False).save(state, state['iter'], is_best)


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of epochs 2 (last) and 1 (prev)."""
    for epoch in (1, 2):
        save_checkpoint(state_of(epoch), tmp_path, PREFIX)
    return tmp_path


def last_of(folder):
    return folder / f'{PREFIX}-last.pth'


def previous_of(folder):
    return folder / f'{PREFIX}-prev.pth'


def one_line_of(stop):
    text = str(stop.value)
    assert len(text.splitlines()) == 1, text
    return text


# ---------------------------------------------------------------------------------------------- damage
def flipped(content, bit):
    copy = bytearray(content)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


def test_every_flipped_bit_is_refused(saved):
    """Anywhere in the file, and each single bit of the record and the signature at its end."""
    path = last_of(saved)
    content = path.read_bytes()
    num_bits = 8 * len(content)
    trailer = range(num_bits - 8 * (22 + tensor_files.SIGNATURE_SIZE), num_bits)
    random_bits = random.Random(0).sample(range(num_bits), 200)
    for bit in [*random_bits, *trailer]:
        path.write_bytes(flipped(content, bit))
        with pytest.raises(UnusableFile, match='damaged'):
            load_file(path, verify=True)
    path.write_bytes(content)
    assert same(load_file(path, verify=True), state_of(2))


def test_flipped_bits_of_unsigned_files_are_refused(tmp_path):
    """Files of others have check sums of their members, and these cover all numbers."""
    path = tmp_path / 'foreign.pth'
    torch.save(dict(model=WEIGHTS), path)
    content = path.read_bytes()
    for data in (WEIGHTS['head.weight'].numpy().tobytes(), WEIGHTS['head.bias'].numpy().tobytes()):
        begin = content.index(data)
        path.write_bytes(flipped(content, 8 * begin + 37))
        with pytest.raises(UnusableFile, match='damaged'):
            load_file(path, verify=True)


def test_other_programs_read_signed_files(saved):
    path = last_of(saved)
    for mmap in (False, True):
        assert same(torch.load(path, weights_only=True, mmap=mmap), state_of(2))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment == b'sha256:' + archive.comment[-64:]
    torch.save(torch.load(path, weights_only=True), path)  # without a signature
    assert same(load_file(path, verify=True), state_of(2))


def test_truncated_and_prolonged_files_are_refused(saved):
    path = last_of(saved)
    content = path.read_bytes()
    shorter = [content[:end] for end in (1, 100, len(content) // 2, *range(len(content) - 95, len(content)))]
    for changed in (*shorter, content + b'\0', content + content[-71:]):
        path.write_bytes(changed)
        with pytest.raises(UnusableFile) as stop:
            load_file(path, verify=True)
        assert repr(str(path)) in one_line_of(stop)


# ---------------------------------------------------------------------------------------------- fall back
def make_unusable(path, kind):
    content = path.read_bytes()
    path.unlink()
    if kind == 'folder':
        path.mkdir()
    elif kind == 'dangling link':
        path.symlink_to('nowhere.pth')
    elif kind == 'link loop':
        path.symlink_to(path.name)
    elif kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'zero bytes':
        path.touch()
    elif kind in ('epoch', 'iter', 'trainer'):
        save_file({key: value for key, value in state_of(2).items() if key != kind}, path)
    elif kind == 'flipped bit':
        path.write_bytes(flipped(content, 4 * len(content)))


@pytest.mark.parametrize('kind', ['folder', 'dangling link', 'link loop', 'pipe', 'zero bytes', 'epoch',
                                  'iter', 'trainer', 'flipped bit'])
def test_unusable_files_fall_back(saved, caplog, kind):
    make_unusable(last_of(saved), kind)
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(saved, f'{PREFIX}*.pth')
    assert (found.path, found.content['epoch']) == (previous_of(saved), 1)
    assert found.digest == sha256_of(previous_of(saved))
    assert found.unusable == (last_of(saved),)
    [record] = caplog.records
    assert repr(str(last_of(saved))) in record.getMessage() and 'falling back' in record.getMessage()


def test_all_unusable_is_an_error(saved):
    make_unusable(last_of(saved), 'pipe')
    make_unusable(previous_of(saved), 'zero bytes')
    with pytest.raises(ValueError, match='none of the 2 checkpoints'):
        newest_checkpoint(saved, f'{PREFIX}*.pth')
    assert newest_checkpoint(saved, 'other*.pth').path is None


@pytest.mark.parametrize(('number', 'words'), [(errno.EACCES, 'readable for this user'),
                                               (errno.EIO, 'disk or the network')])
@pytest.mark.parametrize('call', ['stat', 'open', 'read'])
def test_refused_access_does_not_fall_back(saved, monkeypatch, number, words, call):
    """It says nothing of what the file holds: an older checkpoint would overwrite a good one."""
    path = last_of(saved)

    def refuse(real):
        def wrapper(name, *args, **kwargs):
            if isinstance(name, str | os.PathLike) and os.fspath(name) == os.fspath(path):
                raise OSError(number, os.strerror(number), str(path))
            return real(name, *args, **kwargs)
        return wrapper
    if call == 'stat':
        monkeypatch.setattr(tensor_files.os, 'stat', refuse(os.stat))
    elif call == 'open':
        monkeypatch.setattr(tensor_files, 'open', refuse(open), raising=False)
    else:
        monkeypatch.setattr(tensor_files.torch, 'load', refuse(torch.load))
    with pytest.raises(ValueError, match=words) as stop:
        newest_checkpoint(saved, f'{PREFIX}*.pth')
    assert not isinstance(stop.value, UnusableFile)
    assert repr(str(path)) in one_line_of(stop) and os.strerror(number) in one_line_of(stop)


def test_set_aside_keeps_what_is_there(tmp_path):
    names = []
    for content in ('first', 'second', 'third'):
        path = tmp_path / 'ar-ckpt-last.pth'
        path.write_text(content)
        names.append(set_aside(path).name)
        assert not path.exists()
    assert names == [f'ar-ckpt-last.pth.damaged{number}' for number in ('', '2', '3')]
    assert [(tmp_path / name).read_text() for name in names] == ['first', 'second', 'third']
    loop = tmp_path / 'loop.pth'
    loop.symlink_to('loop.pth')
    assert os.path.islink(set_aside(loop)) and not os.path.lexists(loop)


# ---------------------------------------------------------------------------------------------- saving
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('place', ['var_wo_ddp.blocks.0.weight', 'optimizer.state.0.exp_avg'])
def test_states_that_are_not_finite_are_not_saved(saved, place, value):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    state = state_of(3)
    holder = state['trainer']['var_wo_ddp'] if place.startswith('var') else \
        state['trainer']['optimizer']['state'][0]
    next(iter(holder.values()))[3, 1] = value
    with pytest.raises(ValueError, match=f'trainer.{re.escape(place)} holds nan'):
        save_checkpoint(state, saved, PREFIX, is_best=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_best_is_a_second_name(saved):
    save_checkpoint(state_of(3), saved, PREFIX, is_best=True)
    best = saved / f'{PREFIX}-best.pth'
    assert best.samefile(last_of(saved)) and best.stat().st_nlink == 2
    assert load_file(previous_of(saved))['epoch'] == 2
    save_checkpoint(state_of(4), saved, PREFIX)
    assert best.samefile(previous_of(saved)) and load_file(best)['epoch'] == 3
    assert not list(saved.glob('.*'))


def test_best_is_copied_where_links_are_refused(saved, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', refuse)
    save_checkpoint(state_of(3), saved, PREFIX, is_best=True)
    best = saved / f'{PREFIX}-best.pth'
    assert best.stat().st_nlink == 1 and best.read_bytes() == last_of(saved).read_bytes()
    assert load_file(previous_of(saved))['epoch'] == 2


def test_best_exists_before_last_is_renamed(saved, monkeypatch):
    replace = Path.replace

    def die(self, target):
        if Path(target).name == last_of(saved).name:
            raise KeyboardInterrupt
        return replace(self, target)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, 'replace', die)
        save_checkpoint(state_of(3), saved, PREFIX, is_best=True)
    assert load_file(saved / f'{PREFIX}-best.pth', verify=True)['epoch'] == 3
    found = newest_checkpoint(saved, f'{PREFIX}*.pth')
    assert (found.path, found.content['epoch'], found.unusable) == (last_of(saved), 2, ())


def test_full_disks_leave_older_files(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(tensor_files, 'open', lambda path, mode: FullDisk(path, mode), raising=False)
    with pytest.raises(OSError, match=r'No space left .*previous checkpoint is intact'):
        save_checkpoint(state_of(3), saved, PREFIX, is_best=True)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_leftovers_of_a_killed_save_are_removed(saved):
    (saved / f'.{PREFIX}-last.pth.tmp').write_text('half')
    (saved / f'.{PREFIX}-best.pth.tmp').write_text('half')
    (saved / '.other.tmp').write_text('of somebody else')
    remove_leftovers(saved, PREFIX)
    assert {path.name for path in saved.iterdir()} == {last_of(saved).name, previous_of(saved).name,
                                                       '.other.tmp'}


# ---------------------------------------------------------------------------------------------- locks
def test_locks_name_their_holder(tmp_path):
    """A lock is among processes: the holder is another one."""
    code = ('import sys, time; from utils.files import lock_folder; lock = lock_folder(sys.argv[1]); '
            'print("locked", flush=True); sys.stdin.read()')
    with subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], cwd=REPO, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == 'locked\n'
        with pytest.raises(ValueError, match='is in use by') as stop:
            lock_folder(tmp_path)
        text = one_line_of(stop)
        assert f'process {holder.pid} on host {socket.gethostname()} since ' in text
        holder.communicate()
    with lock_folder(tmp_path):
        assert f'process {os.getpid()} ' in (tmp_path / '.lock').read_text()


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_warned_of(tmp_path, monkeypatch, caplog, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, 'lockf', no_locks)
    with caplog.at_level(logging.WARNING), lock_folder(tmp_path / 'out'):
        pass
    [record] = caplog.records
    assert repr(str(tmp_path / 'out')) in record.getMessage() and 'no locks' in record.getMessage()


def test_folders_that_cannot_be_written_are_told(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot write to the output folder') as stop:
        lock_folder(tmp_path / 'file' / 'out')
    one_line_of(stop)


# ---------------------------------------------------------------------------------------------- replacing
def test_what_was_hashed_is_what_is_loaded(tmp_path):
    """The file is replaced after its digest is known, as a training does."""
    path, digests = tmp_path / 'weights.pth', []
    save_file(state_of(1), path)

    def replace_once(digest):
        digests.append(digest)
        if len(digests) == 1:
            save_file(state_of(2), path)
    content, digest = load_with_digest(path, accept=replace_once)
    assert content['epoch'] == 2 and digest == digests[1] == sha256_of(path) != digests[0]


def test_files_that_never_rest_are_refused(tmp_path):
    path, epochs = tmp_path / 'weights.pth', iter(range(1, 100))
    save_file(state_of(0), path)
    with pytest.raises(ValueError, match='was replaced while it was read') as stop:
        load_with_digest(path, accept=lambda _: save_file(state_of(next(epochs)), path))
    assert repr(str(path)) in one_line_of(stop)
    assert next(epochs) == 1 + tensor_files.ATTEMPTS


def test_refused_digests_are_not_loaded(tmp_path, monkeypatch):
    path = tmp_path / 'weights.pth'
    save_file(state_of(1), path)
    monkeypatch.setattr(tensor_files, '_read', None)

    def refuse(digest):
        raise ValueError(f'{digest} is another file')
    with pytest.raises(ValueError, match=f'{sha256_of(path)} is another file'):
        load_with_digest(path, accept=refuse)


def test_ranks_that_read_different_files_end(tmp_path, monkeypatch):
    """The second rank of this node has seen another file at the same path, whatever is tried."""
    path = tmp_path / 'weights.pth'
    save_file(state_of(1), path)
    assert load_on_all_ranks(path)[1] == sha256_of(path)
    tries = []

    def gather(value):
        tries.append(value)
        node, name, _, identity, failure = value
        return [value, (node, name, '', identity._replace(inode=0), failure)]
    monkeypatch.setattr(tensor_files.dist, 'allgather_object', gather)
    with pytest.raises(ValueError, match=r'rank 1 .* has read another file'):
        load_on_all_ranks(path)
    assert len(tries) == tensor_files.ATTEMPTS


# ---------------------------------------------------------------------------------------------- foreign files
def test_numpy_numbers_beside_weights_are_read(tmp_path):
    path = tmp_path / 'foreign.pth'
    beside = dict(best_fid=np.float64(3.5), step=np.int64(7), flag=np.bool_(True),
                  history=np.arange(3, dtype=np.float32), half=np.float16(0.5))
    torch.save(dict(model=WEIGHTS) | beside, path)
    content = load_file(path, verify=True)
    assert same(content['model'], WEIGHTS)
    assert (content['best_fid'], content['step'], content['half']) == (3.5, 7, 0.5)
    assert content['flag'] and content['history'].tolist() == [0, 1, 2]


class Pickled:
    """Something that only this test knows."""


class Harmful:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('harmed',)


def test_pickled_objects_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for thing, name in ((Pickled(), 'test_checkpoint.Pickled'), (Harmful(), 'mkdir'),
                        (np.array([Harmful()], dtype=object), '')):
        torch.save(dict(model=WEIGHTS, thing=thing), 'foreign.pth')
        with pytest.raises(UnusableFile) as stop:
            load_file('foreign.pth')
        assert name in one_line_of(stop) and "'foreign.pth'" in one_line_of(stop)
        assert 'pickled' in one_line_of(stop) or not name
    assert not Path('harmed').exists()


def lfs_pointer(path):
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:' + 64 * '0' + '\nsize 9\n')


def script_of(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


@pytest.mark.filterwarnings('ignore')  # torch discourages TorchScript, and knows no pickle protocol 4
@pytest.mark.parametrize(('make', 'words'), [
    (lfs_pointer, 'git lfs pull'),
    (lambda path: path.write_text('\n<!DOCTYPE html><html><body>404</body></html>'), 'web page'),
    (lambda path: path.write_text('no weights at all'), "text, not weights ('no weights at all'"),
    (lambda path: path.write_text('sch\u00f6ner Text\n' * 200), 'text, not weights'),
    (lambda path: path.write_bytes(b''), 'empty'),
    (lambda path: np.savez(path.open('wb'), a=np.ones(3)), 'arrays of numpy'),
    (script_of, 'TorchScript'),
    (lambda path: path.write_bytes(b'\x1f\x8b' + bytes(50)), 'gzip'),
    (lambda path: path.write_bytes(random.Random(0).randbytes(5000)), 'damaged, cut off or no file'),
    (lambda path: path.write_bytes(pickle.dumps([1, 2])), ''),
    (lambda path: torch.save([torch.ones(2)], path), 'got something else')])
def test_foreign_files_are_told_as_what_they_are(tmp_path, make, words):
    path = tmp_path / 'odd\nname.pth'
    make(path)
    gc.collect()  # closes what `make` has opened
    with pytest.raises(UnusableFile) as stop:
        load_file(path, verify=True)
    assert words in one_line_of(stop) and repr(str(path)) in one_line_of(stop)


def test_safetensors_are_read_under_any_name(tmp_path, caplog):
    safetensors = pytest.importorskip('safetensors.torch')
    path = tmp_path / 'weights.pth'
    safetensors.save_file(WEIGHTS, path)
    with caplog.at_level(logging.WARNING):
        assert same(load_file(path, verify=True), WEIGHTS)
    assert 'in spite of its name' in caplog.text
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UnusableFile) as stop:
        load_file(path, verify=True)
    assert repr(str(path)) in one_line_of(stop)


def test_files_of_old_torch_are_read(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save(dict(model=WEIGHTS), path, _use_new_zipfile_serialization=False)
    assert same(load_file(path, verify=True), dict(model=WEIGHTS))


def test_missing_files_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match='found nothing at'):
        load_file(tmp_path / 'nowhere.pth')
    (tmp_path / 'file').write_text('')
    with pytest.raises(FileNotFoundError, match='found nothing at'):
        load_file(tmp_path / 'file' / 'nowhere.pth')


# ---------------------------------------------------------------------------------------------- prefixes
@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.',
                                    'model.', 'model._orig_mod.'])
@pytest.mark.parametrize('wrap', [lambda state: state, lambda state: dict(model=state),
                                  lambda state: dict(state_dict=state, epoch=3)])
def test_prefixes_of_all_keys_come_off(prefix, wrap):
    content = wrap({prefix + key: value for key, value in WEIGHTS.items()})
    assert same(model_weights(content), WEIGHTS)
    weights, config = tokenizer_weights(content)
    assert same(weights, WEIGHTS) and config == {}


def test_averages_of_torch_are_weights():
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 3))
    for prefix in ('', '_orig_mod.', 'module.'):
        state = {prefix + key: value for key, value in averaged.state_dict().items()}
        assert set(model_weights(state)) == {'weight', 'bias'}


def test_prefixes_of_compiled_parts_come_off():
    state = {'blocks.0._orig_mod.weight': torch.ones(2), 'head.bias': torch.zeros(2)}
    assert set(model_weights(state)) == {'blocks.0.weight', 'head.bias'}


@pytest.mark.parametrize('state', [WEIGHTS, {'module.a': torch.ones(1), 'b': torch.ones(1)}, {}])
def test_states_without_a_common_prefix_stay_as_they_are(state):
    assert model_weights(state) is state and tokenizer_weights(state)[0] is state
    nested = dict(trainer=dict(var_wo_ddp=state, vae_local=state))
    if state:
        assert model_weights(nested) is state and tokenizer_weights(nested)[0] is state


def test_a_leftover_with_a_second_name_is_not_written_into(tmp_path):
    """A kill after `-best` appeared and before `-last` was renamed leaves one file with two names."""
    save_checkpoint(dict(epoch=1, iter=0, trainer={}), tmp_path, 'ar-ckpt', is_best=True)
    os.link(tmp_path / 'ar-ckpt-best.pth', tmp_path / '.ar-ckpt-last.pth.tmp')
    save_checkpoint(dict(epoch=2, iter=0, trainer={}), tmp_path, 'ar-ckpt')
    assert load_file(tmp_path / 'ar-ckpt-best.pth')['epoch'] == 1
    assert load_file(tmp_path / 'ar-ckpt-last.pth')['epoch'] == 2


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, 'Permission denied')
    monkeypatch.setattr(Path, 'iterdir', refused)
    with pytest.raises(ValueError, match=r'cannot look for checkpoints .*Permission denied'):
        newest_checkpoint(tmp_path, 'ar-ckpt*.pth')
