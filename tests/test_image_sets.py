"""Sets of images on disk: every layout and defect of npz files and folders, packing, memory, full disks."""
import hashlib
import io
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.metrics import read_statistics
from utils import image_sets
from utils.image_sets import npz_keys, open_images, pack_folder, read_labels, shuffled, write_npz
from utils.image_store import PieceStore, PngStore
from utils.misc import create_npz_from_sample_folder

IMAGES = np.random.RandomState(0).randint(0, 256, (7, 4, 6, 3), dtype=np.uint8)


def write_arrays(path, version=(1, 0), compression=zipfile.ZIP_STORED, **arrays):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, array in arrays.items():
            with archive.open(f'{name}.npy', 'w') as stream:
                np.lib.format.write_array(stream, array, version, allow_pickle=True)
    return path


def write_folder(folder, images=IMAGES, **more):
    """0000.png, ...; `more` are PIL images by the stem of their names."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f'{i:04d}.png')
    for name, image in more.items():
        image.save(folder / f'{name}.png')
    return folder


def png(path, depth, colour_type, row):
    """A PNG of one row, made by hand, as Pillow does not write 16 bits per channel."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    channels = {0: 1, 2: 3, 6: 4}[colour_type]
    header = struct.pack('>2I5B', len(row) * 8 // depth // channels, 1, depth, colour_type, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
                     + chunk(b'IDAT', zlib.compress(b'\0' + row)) + chunk(b'IEND', b''))


def refusal(action, *args, **kwargs):
    """The message of a ValueError, which must have one line."""
    with pytest.raises(ValueError) as caught:
        action(*args, **kwargs)
    message = str(caught.value)
    assert '\n' not in message and len(message) < 600
    return message


def read_all(path):
    batch = open_images(path)
    return np.concatenate(list(batch.blocks()))


def assert_reads_as(batch, images):
    """Every range and size of blocks gives the images of a plain slice."""
    assert (batch.count, batch.height, batch.width) == images.shape[:3]
    for begin, end, size in [(0, None, 64), (0, None, 3), (2, 6, 2), (3, 4, 1), (5, 99, 4), (4, 4, 2)]:
        blocks = list(batch.blocks(begin, end, size))
        expected = [images[begin:end][i:i + size] for i in range(0, len(images[begin:end]), size)]
        assert [len(block) for block in blocks] == [len(block) for block in expected]
        for block, wanted in zip(blocks, expected, strict=True):
            assert block.dtype == np.uint8 and np.array_equal(block, wanted)
            assert block.flags.c_contiguous and block.flags.writeable  # torch.from_numpy warns otherwise


# ---------------------------------------------------------------------------------------------- npz: layouts
@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize('version', [(1, 0), (2, 0), (3, 0)])
def test_every_header_and_compression(tmp_path, version, compression):
    path = write_arrays(tmp_path / 'a.npz', version, compression, other=np.arange(5), arr_0=IMAGES)
    assert_reads_as(open_images(path), IMAGES)
    assert npz_keys(path) == ('other', 'arr_0')


def test_fortran_order(tmp_path):
    array = np.asfortranarray(IMAGES)
    stored = open_images(write_arrays(tmp_path / 'stored.npz', arr_0=array))
    assert_reads_as(stored, IMAGES)
    assert np.array_equal(stored[3], IMAGES[3])
    packed = write_arrays(tmp_path / 'packed.npz', compression=zipfile.ZIP_DEFLATED, arr_0=array)
    assert 'np.ascontiguousarray' in refusal(open_images, packed)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_files_of_numpy(tmp_path, save):
    save(tmp_path / 'a.npz', IMAGES, np.arange(7, dtype='>i2'))
    batch = open_images(tmp_path / 'a.npz')
    assert_reads_as(batch, IMAGES)
    assert batch.labels.dtype == np.int64 and batch.labels.tolist() == list(range(7))
    assert batch.warnings == []


def test_random_access(tmp_path):
    np.savez(tmp_path / 'a.npz', IMAGES)
    np.savez_compressed(tmp_path / 'b.npz', IMAGES)
    batch = open_images(str(tmp_path / 'a.npz'))
    for i in (6, 0, 3, -1, np.int64(2)):
        assert np.array_equal(batch[i], IMAGES[i])
    with pytest.raises(IndexError):
        batch[7]
    assert 'b.npz' in refusal(open_images(tmp_path / 'b.npz').__getitem__, 0)


@pytest.mark.parametrize('other', [np.arange(6), np.arange(7.), np.zeros((7, 1), int), np.array([None] * 7)])
def test_other_arrays_are_no_labels(tmp_path, other):
    path = write_arrays(tmp_path / 'a.npz', arr_0=IMAGES, arr_1=other)
    assert open_images(path).labels is None


# ---------------------------------------------------------------------------------------------- npz: defects
@pytest.mark.parametrize(('array', 'words'), [
    (np.zeros((2, 4, 4, 3), np.float32), ['float32', 'x * 255 + 0.5']),
    (np.full((2, 4, 4, 3), 1.01), ['1.01', 'x * 255 + 0.5']),
    (np.linspace(-1, 1, 96, dtype='f2').reshape(2, 4, 4, 3), ['float16', 'from -1 to 1', 'x * 127.5 + 128']),
    (np.linspace(-0.02, 1, 96).reshape(2, 4, 4, 3), ['float64', 'from -0.02 to 1', 'x * 255 + 0.5']),
    (np.linspace(0, 255, 96).reshape(2, 4, 4, 3), ['to 255', 'x.round()']),
    (np.zeros((2, 4, 4, 3), np.int64), ['int64', 'np.uint8']),
    (np.zeros((2, 4, 4, 3), bool), ['bool', 'np.uint8']),
    (np.full((2, 4, 4, 3), None), ['object']),
    (np.zeros((2, 4, 4), np.uint8), ['(2, 4, 4)', 'RGB']),
    (np.zeros((2, 4, 4, 4), np.uint8), ['(2, 4, 4, 4)', 'RGB']),
    (np.zeros((2, 3, 4, 4), np.uint8), ['(2, 3, 4, 4)', 'transpose(0, 2, 3, 1)']),
    (np.zeros((0, 4, 4, 3), np.uint8), ['none', '(0, 4, 4, 3)']),
    (np.zeros((2, 0, 4, 3), np.uint8), ['none']),
])
def test_arrays_that_are_no_images(tmp_path, array, words):
    message = refusal(open_images, write_arrays(tmp_path / 'a.npz', arr_0=array))
    assert all(word in message for word in ['a.npz', 'arr_0', *words]), message


def test_float_advice_gives_the_pixels_back():
    for scale, x in (('x * 255 + 0.5', IMAGES / 255), ('x * 127.5 + 128', IMAGES / 127.5 - 1)):
        rounded = eval(f'({scale}).clip(0, 255).astype(np.uint8)', dict(x=x, np=np))
        assert np.array_equal(rounded, IMAGES)


def test_missing_files_and_arrays(tmp_path):
    assert 'nowhere.npz' in refusal(open_images, tmp_path / 'nowhere.npz')
    assert 'nowhere.npz' in refusal(npz_keys, tmp_path / 'nowhere.npz')
    np.savez(tmp_path / 'statistics.npz', mu=np.zeros(3), sigma=np.eye(3))
    message = refusal(open_images, tmp_path / 'statistics.npz')
    assert 'statistics.npz' in message and 'mu, sigma' in message
    np.save(tmp_path / 'a.npy', IMAGES)
    assert 'a.npy' in refusal(open_images, tmp_path / 'a.npy')
    with zipfile.ZipFile(tmp_path / 'bare.npz', 'w') as archive:
        archive.writestr('arr_0', b'not an array')
        assert 'arr_0' in archive.namelist()
    assert 'none' in refusal(open_images, tmp_path / 'bare.npz')
    path = write_arrays(tmp_path / 'name.npz', arr_0=IMAGES, é=IMAGES)
    path.write_bytes(path.read_bytes().replace('é'.encode(), b'\xff\xff'))  # a name that is no text
    assert 'name.npz' in refusal(open_images, path)


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_array_shorter_than_its_header_says(tmp_path, compression):
    whole = write_arrays(tmp_path / 'whole.npz', arr_0=IMAGES)
    data = zipfile.ZipFile(whole).read('arr_0.npy')
    with zipfile.ZipFile(tmp_path / 'a.npz', 'w', compression) as archive:
        archive.writestr('arr_0.npy', data[:-1])
    message = refusal(open_images, tmp_path / 'a.npz')
    assert 'a.npz' in message and 'truncated' in message and f'{IMAGES.size - 1:,}' in message
    with zipfile.ZipFile(tmp_path / 'b.npz', 'w', compression) as archive:
        archive.writestr('arr_0.npy', data[:20])
    assert 'header' in refusal(open_images, tmp_path / 'b.npz')


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_damage_anywhere_is_an_error_of_one_line(tmp_path, save):
    path = tmp_path / 'a.npz'
    save(path, IMAGES[:2, :2, :2], np.arange(2))
    data = path.read_bytes()
    rng = np.random.RandomState(0)
    for cut in range(0, len(data), 3):
        path.write_bytes(data[:cut])
        assert 'a.npz' in refusal(read_all, path)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.randint(len(data))] = rng.randint(256)
        path.write_bytes(damaged)
        try:  # pixels of a stored array carry no check
            assert read_all(path).shape[3] == 3
        except ValueError as error:
            assert 'a.npz' in str(error) and '\n' not in str(error)


def damage(path, how, monkeypatch):
    """Make a good PNG one that cannot be read."""
    content = path.read_bytes()
    if how == 'bomb':
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2)
    elif how == 'text':
        text = b'zTXtk\0\0' + zlib.compress(b'a' * 2 ** 21)
        piece = struct.pack('>I', len(text) - 4) + text + struct.pack('>I', zlib.crc32(text))
        path.write_bytes(content[:33] + piece + content[33:])
    elif how == 'link':
        path.unlink()
        path.symlink_to('nowhere.png')
    else:
        header = content[:20] + b'\0' * 40
        path.write_bytes(dict(empty=b'', cut=content[:60], text_file=b'hello', header=header)[how])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', ['bomb', 'text', 'link', 'empty', 'cut', 'text_file', 'header'])
def test_samples_that_cannot_be_read_are_named_in_one_line(tmp_path, monkeypatch, how):
    folder = write_folder(tmp_path / 'a\nb')
    for i in range(7):
        (folder / f'{i:04d}.png').rename(folder / f'{i:06d}.png')
    path = folder / '000003.png'
    damage(path, how, monkeypatch)
    with pytest.raises(ValueError, match='remove the file and sample again') as of_folder:
        list(open_images(folder).blocks())
    with PngStore(folder) as store, pytest.raises(ValueError, match='remove the file and run') as of_store:
        store.get(3)
    for caught in (of_folder, of_store):
        message = str(caught.value)
        named = path if how != 'bomb' or caught is of_store else folder / '000000.png'
        assert repr(str(named)) in message and message.isprintable()


def test_pipes_hidden_files_and_lack_of_memory(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / 'samples')
    (folder / '._0000.png').write_bytes(b'x')
    assert open_images(folder).count == 7

    def no_memory(*_, **__):
        raise MemoryError
    with monkeypatch.context() as patch:  # the file may be good
        patch.setattr(Image, 'open', no_memory)
        with pytest.raises(MemoryError):
            open_images(folder)
        with PngStore(folder) as store, pytest.raises(MemoryError):
            store.get(0)
    os.mkfifo(folder / 'pipe.png')
    with pytest.raises(ValueError, match=r'pipe\.png. \(it is no file\)'):
        open_images(folder)


def test_pieces_that_cannot_be_read_are_named_in_one_line(tmp_path):
    with PieceStore(tmp_path) as store:
        store.put(np.arange(3), IMAGES[:3])
    (tmp_path / 'pixels-000000-000003.npy').write_bytes(b'x\ny')
    store = PieceStore(tmp_path)
    store.stored(3)
    with pytest.raises(ValueError, match=r'cannot read .*pixels-000000-000003\.npy.*remove') as caught:
        store.get(1)
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------- memory
@pytest.mark.slow
def test_large_files_are_never_in_memory(tmp_path):
    """Writing and reading 79 MB, in a process whose peak memory the system tells."""
    code = '''
import shutil, sys, zipfile
from pathlib import Path
import numpy as np
from utils.image_sets import open_images, write_npz
def peak():
    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024
stored, packed = (Path(sys.argv[1]) / name for name in ('stored.npz', 'packed.npz'))
block, first = np.ones((10, 256, 256, 3), np.uint8), peak()
write_npz(stored, (block for _ in range(40)), 400, 256, 256)
with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive, \\
        archive.open('arr_0.npy', 'w') as target, zipfile.ZipFile(stored).open('arr_0.npy') as source:
    shutil.copyfileobj(source, target, 2 ** 20)
for path in (stored, packed):
    assert sum(len(block) for block in open_images(path).blocks(size=16) if block.all()) == 400
batch = open_images(stored)
assert all(batch[i].all() for i in range(0, 400, 7))
streamed = peak()
np.load(stored)['arr_0']
print(streamed - first, peak() - first)
'''
    if not Path('/proc/self/status').exists():
        pytest.skip('peak memory is read from /proc')
    run = subprocess.run([sys.executable, '-c', code, tmp_path], text=True, capture_output=True, check=False,
                         cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr
    streamed, loaded = map(float, run.stdout.split())
    assert loaded > 75  # the gauge shows a file that is loaded
    assert streamed < 30, f'{streamed} MB'  # some blocks of 16 images, of 3.1 each


# ---------------------------------------------------------------------------------------------- folders
def test_folder_in_order_of_names(tmp_path):
    folder = write_folder(tmp_path / 'pngs')
    (folder / '0000.png').rename(folder / 'z.PNG')
    (folder / 'settings.json').write_text('{}')
    (folder / '.0003.png.tmp').write_bytes(b'half a')
    (folder / '._0003.png').write_bytes(b'of another system')
    batch = open_images(folder)
    assert batch.warnings == [] and batch.labels is None
    assert_reads_as(batch, np.roll(IMAGES, -1, axis=0))
    assert np.array_equal(batch[np.int64(6)], IMAGES[0])


def test_order_is_kept_and_reading_ahead_is_bounded(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / 'pngs', np.zeros((60, 2, 2, 3), np.uint8))
    together, decoded = threading.Barrier(2, timeout=30), []

    def decode(path):
        i = int(path.stem)
        if i < 2:
            together.wait()  # fails unless two files are decoded at once
        time.sleep(0.002 * (i % 3 == 0))  # later ones are ready first
        decoded.append(i)
        return np.full((2, 2, 3), i, np.uint8)
    monkeypatch.setattr(image_sets, '_decode', decode)
    monkeypatch.setattr(image_sets, 'NUM_READERS', 2)
    blocks = open_images(folder).blocks(size=4)
    assert next(blocks)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    time.sleep(0.1)
    assert 4 < len(decoded) < 20
    rest = np.concatenate(list(blocks))[:, 0, 0, 0]
    assert rest.tolist() == list(range(4, 60)) and decoded != sorted(decoded)


def convertible():
    """(mode, an image of it, its pixels in RGB), all 6x4."""
    grey = Image.fromarray(IMAGES[0, :, :, 0])
    rgb = Image.fromarray(IMAGES[0])
    yield 'L', grey, np.repeat(IMAGES[0, :, :, :1], 3, 2)
    yield '1', grey.point(lambda level: level > 127, '1'), np.repeat(IMAGES[0, :, :, :1] > 127, 3, 2) * 255
    yield 'RGBA', rgb.convert('RGBA'), IMAGES[0]
    yield 'LA', grey.convert('LA'), np.repeat(IMAGES[0, :, :, :1], 3, 2)
    palette = rgb.quantize(8)
    yield 'P', palette, np.asarray(palette.convert('RGB'))
    palette = palette.copy()
    palette.info['transparency'] = 200  # a colour that no pixel has
    yield 'P', palette, np.asarray(palette.convert('RGB'))


@pytest.mark.parametrize(('mode', 'image', 'pixels'), list(convertible()))
def test_other_modes_are_converted_with_a_warning(tmp_path, mode, image, pixels):
    folder = write_folder(tmp_path / 'pngs', x=image, y=image)
    batch = open_images(folder)
    assert np.array_equal(batch[7], pixels) and np.array_equal(batch[0], IMAGES[0])
    warning, = batch.warnings
    assert warning.startswith(f'{mode} images') and '2 of 9' in warning and 'x.png' in warning
    assert 'x.png' in refusal(create_npz_from_sample_folder, str(folder), 9)  # which converts nothing


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'RGB'])
def test_transparent_pixels_are_refused(tmp_path, mode):
    image = Image.fromarray(IMAGES[0])
    image = image.quantize(8) if mode == 'P' else image.convert(mode)
    if mode in ('RGBA', 'LA'):
        image.putpixel((5, 3), (*image.getpixel((5, 3))[:-1], 254))
    else:
        image.info['transparency'] = image.getpixel((5, 3))
    folder = write_folder(tmp_path / 'pngs')
    image.save(folder / 'x.png', transparency=image.info.get('transparency'))
    message = refusal(read_all, folder)
    assert 'x.png' in message and 'transparent' in message


@pytest.mark.parametrize('colour_type', [0, 2, 6])
def test_sixteen_bits_are_refused(tmp_path, colour_type):
    channels = {0: 1, 2: 3, 6: 4}[colour_type]
    png(tmp_path / 'x.png', 8, colour_type, bytes([9] * channels * 2))
    assert (read_all(tmp_path) == 9).all() if colour_type < 6 else open_images(tmp_path).count == 1
    png(tmp_path / 'x.png', 16, colour_type, bytes([9] * channels * 4))
    message = refusal(open_images, tmp_path)
    assert 'x.png' in message and '16' in message


def test_jpeg_is_warned_of_and_not_packed(tmp_path):
    folder = write_folder(tmp_path / 'pngs')
    Image.fromarray(IMAGES[0]).save(folder / 'x.jpg', quality=95)
    (folder / 'x.jpg').rename(folder / 'x.png')  # the content decides, not the name
    Image.fromarray(IMAGES[1]).save(folder / 'y.jpeg')
    batch = open_images(folder)
    warning, = batch.warnings
    assert batch.count == 9 and 'JPEG' in warning and '2 of 9' in warning and 'lossy' in warning
    assert 'x.png' in refusal(open_images, folder, allow_jpeg=False)
    assert 'x.png' in refusal(pack_folder, folder, tmp_path / 'a.npz')
    assert 'x.png' in refusal(create_npz_from_sample_folder, str(folder), 9)
    assert not list(tmp_path.glob('*.npz'))
    packed = pack_folder(folder, tmp_path / 'a.npz', allow_jpeg=True)
    assert packed.count == 9 and packed.warnings == [warning]


def test_mixed_sizes_are_refused(tmp_path):
    folder = write_folder(tmp_path / 'pngs', x=Image.new('RGB', (4, 6)))
    message = refusal(open_images, folder)
    assert '6x4' in message and '4x6' in message and 'x.png' in message


def test_folders_without_images(tmp_path):
    (tmp_path / 'sub').mkdir()
    write_folder(tmp_path / 'sub' / 'pngs')
    assert str(tmp_path / 'sub') in refusal(open_images, tmp_path / 'sub')
    assert 'nowhere' in refusal(pack_folder, tmp_path / 'nowhere', tmp_path / 'a.npz')


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'GIF'])
def test_damaged_images_are_named(tmp_path, kind):
    folder = write_folder(tmp_path / 'pngs')
    path = folder / '0003.png'
    Image.fromarray(IMAGES[3]).save(path, format=kind)
    data = path.read_bytes()
    rng = np.random.RandomState(0)
    for cut in [0, 1, 8, 20, 30, 45, len(data) // 2]:
        path.write_bytes(data[:cut])
        assert '0003.png' in refusal(read_all, folder)
    for _ in range(50):
        damaged = bytearray(data)
        damaged[rng.randint(len(data))] ^= 1 + rng.randint(255)
        path.write_bytes(damaged)
        try:  # a JPEG carries no check, and a PNG has bytes without meaning
            read_all(folder)
        except ValueError as error:
            assert '0003.png' in str(error) and '\n' not in str(error)


@pytest.mark.parametrize('labels', [np.arange(6), np.arange(7.), np.zeros((7, 1), int), np.array([None] * 7)])
def test_wrong_labels_of_a_folder(tmp_path, labels):
    folder = write_folder(tmp_path / 'pngs')
    np.save(folder / 'labels.npy', labels)
    batch = open_images(folder)
    assert 'labels.npy' in refusal(lambda: batch.labels)
    assert 'labels.npy' in refusal(pack_folder, folder, tmp_path / 'a.npz')
    assert not list(tmp_path.glob('*.npz'))


# ---------------------------------------------------------------------------------------------- digests
def test_sha256(tmp_path):
    np.savez(tmp_path / 'a.npz', IMAGES)
    assert open_images(tmp_path / 'a.npz').sha256() == \
        hashlib.sha256((tmp_path / 'a.npz').read_bytes()).hexdigest()
    folder = write_folder(tmp_path / 'pngs')
    digests = [open_images(folder).sha256()]
    (folder / 'settings.json').write_text('{}')
    assert open_images(folder).sha256() == digests[0] == \
        open_images(write_folder(tmp_path / 'again')).sha256()
    (folder / '0006.png').rename(folder / '0007.png')
    digests.append(open_images(folder).sha256())
    (folder / '0007.png').unlink()
    digests.append(open_images(folder).sha256())
    (folder / '0000.png').write_bytes((folder / '0001.png').read_bytes())
    digests.append(open_images(folder).sha256())
    assert len(set(digests)) == 4


# ---------------------------------------------------------------------------------------------- writing
def test_written_npz_is_what_numpy_reads(tmp_path):
    labels = np.arange(7, dtype=np.int32)
    write_npz(tmp_path / 'a.npz', iter(IMAGES), 7, 4, 6, labels)
    blocks = [IMAGES[:3], IMAGES[3], IMAGES[4:4], np.asfortranarray(IMAGES[4:])]
    write_npz(tmp_path / 'b.npz', blocks, 7, 4, 6, labels)
    with np.load(tmp_path / 'a.npz') as arrays:
        assert arrays.files == ['arr_0', 'arr_1']
        assert arrays['arr_0'].dtype == np.uint8 and np.array_equal(arrays['arr_0'], IMAGES)
        assert arrays['arr_1'].dtype == np.int64 and arrays['arr_1'].tolist() == list(range(7))
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    with zipfile.ZipFile(tmp_path / 'a.npz') as archive:
        assert archive.testzip() is None
        for info in archive.infolist():  # the bytes do not tell the time
            assert info.date_time == (1980, 1, 1, 0, 0, 0) and info.compress_type == zipfile.ZIP_STORED
    write_npz(tmp_path / 'c.npz', iter(IMAGES), 7, 4, 6, mu=np.arange(3.), sigma=np.asfortranarray(np.eye(3)))
    assert npz_keys(tmp_path / 'c.npz') == ('arr_0', 'mu', 'sigma')
    with np.load(tmp_path / 'c.npz') as arrays:
        assert arrays['mu'].tolist() == [0, 1, 2] and np.array_equal(arrays['sigma'], np.eye(3))
    write_npz(tmp_path / 'c.npz', iter(IMAGES), 7, 4, 6)
    assert npz_keys(tmp_path / 'c.npz') == ('arr_0',)
    assert_reads_as(open_images(tmp_path / 'c.npz'), IMAGES)


@pytest.mark.parametrize(('images', 'count', 'labels', 'words'), [
    (IMAGES, 8, None, '8 images.*got 7'),
    ([IMAGES], 6, None, '6 images.*got more'),
    ([], 1, None, '1 images.*got 0'),
    ([IMAGES[:5], IMAGES[5:, :3]], 7, None, r'\(4, 6, 3\).*\(3, 6, 3\) at image 5'),
    (IMAGES.astype(np.float32), 7, None, 'uint8.*float32.*at image 0'),
    (IMAGES, 7, np.arange(6), r'7 labels.*\(6,\)'),
])
def test_wrong_content_is_not_written(tmp_path, images, count, labels, words):
    path = tmp_path / 'a.npz'
    path.write_bytes(b'what was there')
    with pytest.raises(ValueError, match=words):
        write_npz(path, images, count, 4, 6, labels)
    assert path.read_bytes() == b'what was there' and list(tmp_path.iterdir()) == [path]


def test_surplus_images_are_not_drawn(tmp_path):
    images = iter(IMAGES)
    assert 'got more' in refusal(write_npz, tmp_path / 'a.npz', images, 3, 4, 6)
    assert len(list(images)) == 3


@contextmanager
def disk_space(num_bytes):
    """No file may grow beyond this."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / 'a.npz'
    images = np.repeat(IMAGES, 200, axis=0)
    write_npz(tmp_path / 'whole.npz', images, 1400, 4, 6, np.arange(1400))
    size = (tmp_path / 'whole.npz').stat().st_size
    (tmp_path / 'whole.npz').unlink()
    for space in (0, 100, size // 2, size - 5000, size - 100, size - 1):  # header, pixels, labels, directory
        for old in (None, b'what was there'):
            path.unlink(missing_ok=True)
            if old:
                path.write_bytes(old)
            with disk_space(space), pytest.raises(OSError, match=r'a\.npz.*free some space'):
                write_npz(path, images, 1400, 4, 6, np.arange(1400))
            assert list(tmp_path.iterdir()) == ([path] if old else [])
            assert not old or path.read_bytes() == old
    with disk_space(size):
        write_npz(path, images, 1400, 4, 6, np.arange(1400))
    assert np.array_equal(np.load(path)['arr_0'], images)


# ---------------------------------------------------------------------------------------------- packing
def test_permutation_is_fixed():
    assert shuffled(10, 0).tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    order = shuffled(50_000, 0)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(50_000))
    assert order[:4].tolist() == [11841, 19602, 45519, 25747]
    assert not np.array_equal(order, shuffled(50_000, 1))


def test_packing_shuffles_labels_along(tmp_path):
    images = np.arange(120, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    folder = write_folder(tmp_path / 'pngs', images)
    np.save(folder / 'labels.npy', np.arange(120, dtype=np.int16) * 5)
    packed = pack_folder(folder, tmp_path / 'a.npz', count=120)
    assert_reads_as(packed, images[shuffled(120, 0)])
    assert np.array_equal(packed.labels, 5 * shuffled(120, 0))
    content = (tmp_path / 'a.npz').read_bytes()
    assert pack_folder(str(folder), str(tmp_path / 'b.npz')).sha256() == hashlib.sha256(content).hexdigest()
    assert np.array_equal(pack_folder(folder, tmp_path / 'b.npz', seed=3).labels, 5 * shuffled(120, 3))
    in_order = pack_folder(folder, tmp_path / 'b.npz', seed=None)
    assert_reads_as(in_order, images)
    assert in_order.labels.tolist() == list(range(0, 600, 5))
    message = refusal(pack_folder, folder, tmp_path / 'c.npz', count=121)
    assert '121' in message and '120' in message and not (tmp_path / 'c.npz').exists()


def test_upstream_packer_keeps_order_and_has_no_labels(tmp_path):
    folder = write_folder(tmp_path / 'pngs')
    plain = pack_folder(folder, tmp_path / 'a.npz', seed=None).sha256()
    np.save(folder / 'labels.npy', np.arange(3))  # not even looked at
    path = create_npz_from_sample_folder(str(folder), num_images=7)
    assert open_images(path).sha256() == plain and npz_keys(path) == ('arr_0',)


# ---------------------------------------------------------------------------------------------- absurd sizes
def header_of(shape, descr='<i8'):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, dict(descr=descr, fortran_order=False, shape=shape))
    return stream.getvalue()


def peak_of(call, match):
    """Bytes that a refused call takes."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_memory_is_taken_for_what_a_header_only_claims(tmp_path):
    labels = tmp_path / 'labels.npy'
    labels.write_bytes(header_of((10 ** 13,)))
    assert peak_of(lambda: read_labels(labels, 10), 'truncated') < 2 ** 20
    np.save(labels, np.array([dict(a=1)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match='objects, which are not read'):
        read_labels(labels, 1)

    statistics = tmp_path / 'statistics.npz'
    with zipfile.ZipFile(statistics, 'w') as archive:
        archive.writestr('mu.npy', header_of((10 ** 13,), '<f8'))
        archive.writestr('sigma.npy', header_of((4, 4), '<f8') + bytes(128))
    assert peak_of(lambda: read_statistics(statistics, 4), r'got \(10000000000000,\)') < 2 ** 20
    with zipfile.ZipFile(statistics, 'w', zipfile.ZIP_DEFLATED) as archive:  # 64 MiB of zeros in 64 KiB
        archive.writestr('mu.npy', header_of((2 ** 23,), '<f8') + bytes(2 ** 26))
        archive.writestr('sigma.npy', header_of((4, 4), '<f8') + bytes(128))
    assert statistics.stat().st_size < 2 ** 17
    assert peak_of(lambda: read_statistics(statistics, 4), 'of shape') < 2 ** 20
