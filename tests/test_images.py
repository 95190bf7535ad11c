"""Reading images: modes, depths, orientation, damaged files; and crops of resized images."""
import functools
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomCrop, Resize

from utils.data import AdmRandomCrop, adm_center_crop, build_transforms, ten_crop_views
from utils.images import ImageError, read_image, resized_part

REPO = Path(__file__).resolve().parent.parent


def gradient(width=24, height=20):
    """Smooth colours without symmetry, for lossy formats."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255 * x / width, 255 * y / height, 80 + 0 * x], -1).astype(np.uint8))


def pixels(path, **kwargs):
    image = read_image(path, **kwargs)
    assert image.mode == 'RGB'
    return np.asarray(image).astype(int)


def grey_of(path):
    """One channel of an image that is grey."""
    values = pixels(path)
    assert (values == values[..., :1]).all()
    return values[..., 0]


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png(width, height, depth, colour_type, rows, *chunks):
    """A PNG file of these rows of bytes; `chunks` come before the pixels."""
    header = struct.pack('>IIBBBBB', width, height, depth, colour_type, 0, 0, 0)
    content = zlib.compress(b''.join(b'\0' + row for row in rows))
    return b'\x89PNG\r\n\x1a\n' + b''.join([chunk(b'IHDR', header), *chunks, chunk(b'IDAT', content),
                                           chunk(b'IEND', b'')])


def refused(path, expected=''):
    """The message of the refusal: one line that names the path."""
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert repr(str(path)) in message and expected in message
    assert len(message.splitlines()) == 1 and message.isprintable()
    return message


# ---------------------------------------------------------------------------------------------- modes
@pytest.mark.parametrize(('mode', 'suffix'), [
    *[('RGB', suffix) for suffix in ('png', 'tif', 'bmp', 'ppm', 'webp')], ('CMYK', 'tif'), ('YCbCr', 'tif'),
    ('LAB', 'tif'), ('RGBA', 'png'), ('RGBA', 'tif'), ('RGBA', 'webp'), ('P', 'png'), ('P', 'bmp'),
    ('P', 'tif'), ('PA', 'tif'), ('RGBX', 'tif')])
def test_colours(tmp_path, mode, suffix):
    image = gradient()
    path = tmp_path / f'a.{suffix}'
    if mode == 'LAB':
        # CIE L*a*b* of pure red: 53.2, 80.1, 67.2 with the white of daylight, 54.3, 80.8, 69.9 with D50
        Image.frombytes('LAB', (1, 1), bytes([round(54.3 * 2.55), 81, 70])).save(path)
        assert np.abs(pixels(path)[0, 0] - [255, 0, 0]).max() <= 6
        return
    image = image.convert('P').convert('PA') if mode == 'PA' else image.convert(mode)
    image.save(path, **(dict(lossless=True) if suffix == 'webp' else {}))
    with Image.open(path) as stored:
        assert stored.mode in (mode, 'RGB')
    assert np.abs(pixels(path) - np.asarray(image.convert('RGB'))).max() <= 2 * (mode == 'YCbCr')


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK', 'YCbCr'])
def test_jpeg(tmp_path, mode):
    gradient().convert(mode).save(tmp_path / 'a.jpg', quality=95)
    expected = np.asarray(gradient().convert(mode).convert('RGB')).astype(int)
    assert np.abs(pixels(tmp_path / 'a.jpg') - expected).mean() < 4


@pytest.mark.parametrize(('mode', 'suffix'), [
    ('L', 'png'), ('L', 'tif'), ('L', 'bmp'), ('L', 'pgm'), ('1', 'png'), ('1', 'tif'), ('1', 'bmp'),
    ('1', 'pbm'), ('LA', 'png'), ('LA', 'tif')])
def test_grey(tmp_path, mode, suffix):
    image = gradient().convert(mode)
    image.save(tmp_path / f'a.{suffix}')
    assert np.array_equal(grey_of(tmp_path / f'a.{suffix}'), np.asarray(image.convert('L')))


@pytest.mark.parametrize('suffix', ['png', 'webp', 'tif'])
def test_alpha_is_mixed_with_white(tmp_path, suffix):
    image = Image.new('RGBA', (8, 8), (100, 0, 50, 128))
    image.paste((9, 9, 9, 0), (4, 0, 8, 8))
    image.save(tmp_path / f'a.{suffix}', **(dict(lossless=True) if suffix == 'webp' else {}))
    values = pixels(tmp_path / f'a.{suffix}')
    assert (values[:, 4:] == 255).all() and np.abs(values[:, :4] - [177, 127, 152]).max() <= 1


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_grey_with_alpha(tmp_path, suffix):
    values = np.array([[[100, 0], [100, 255], [0, 128]]], np.uint8)
    Image.fromarray(values).save(tmp_path / f'a.{suffix}')
    assert np.abs(grey_of(tmp_path / f'a.{suffix}') - [255, 100, 127]).max() <= 1


@pytest.mark.parametrize('transparency', [1, bytes([255, 0, 128])])
def test_transparent_palette(tmp_path, transparency):
    image = Image.frombytes('P', (3, 1), bytes([0, 1, 2]))
    image.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0])
    image.save(tmp_path / 'a.png', transparency=transparency)
    last = 0 if isinstance(transparency, int) else 127
    assert np.abs(pixels(tmp_path / 'a.png')[0] - [[10, 20, 30], [255, 255, 255], [last] * 3]).max() <= 1


def test_palette_with_alpha(tmp_path):
    """TGA keeps it in the palette itself."""
    header = struct.pack('<BBBHHBHHHHBB', 0, 1, 1, 0, 2, 32, 0, 0, 2, 1, 8, 0x28)
    (tmp_path / 'a.tga').write_bytes(header + bytes([30, 20, 10, 255, 60, 50, 40, 0]) + bytes([0, 1]))
    assert pixels(tmp_path / 'a.tga')[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize(('depth', 'levels', 'row'), [
    (1, [0, 255], b'\x40'), (2, [0, 85, 170, 255], b'\x1b'), (4, [0, 17, 255, 34], b'\x01\xf2'),
    (8, [0, 1, 255, 7], b'\0\1\xff\7'), (16, [0, 100, 255, 3], struct.pack('>4H', 0, 25700, 65535, 771))])
def test_transparent_grey_of_every_depth(tmp_path, depth, levels, row):
    """The level in the chunk tRNS counts in steps of the file, not of 8 bits."""
    path = tmp_path / 'a.png'
    path.write_bytes(png(len(levels), 1, depth, 0, [row]))
    assert grey_of(path)[0].tolist() == levels
    transparent = {1: 0, 2: 1, 4: 1, 8: 1, 16: 25700}[depth]
    path.write_bytes(png(len(levels), 1, depth, 0, [row], chunk(b'tRNS', struct.pack('>H', transparent))))
    expected = levels.copy()
    expected[0 if depth == 1 else 1] = 255
    assert grey_of(path)[0].tolist() == expected


@pytest.mark.parametrize('depth', [8, 16])
def test_transparent_colour_of_every_depth(tmp_path, depth):
    kind, step = {8: ('B', 1), 16: ('>9H', 257)}[depth]
    colours = [[200, 10, 0], [0, 0, 0], [0, 0, 200]]
    row = struct.pack('9B' if depth == 8 else kind, *[step * value for colour in colours for value in colour])
    transparent = struct.pack('>3H', *[step * value for value in colours[0]])
    (tmp_path / 'a.png').write_bytes(png(3, 1, depth, 2, [row], chunk(b'tRNS', transparent)))
    assert pixels(tmp_path / 'a.png')[0].tolist() == [[255, 255, 255], *colours[1:]]


# ---------------------------------------------------------------------------------------------- depths
LEVELS = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)


@pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
def test_16_bit_grey(tmp_path, suffix):
    Image.fromarray(LEVELS.astype(np.uint16) * 257).save(tmp_path / f'a.{suffix}')
    assert np.array_equal(grey_of(tmp_path / f'a.{suffix}'), LEVELS)


def test_dark_16_bit_grey_stays_dark(tmp_path):
    """Values within 0..255 of a file that says that it has 16 bits are nearly black."""
    for suffix in ('png', 'tif', 'pgm'):
        Image.fromarray(LEVELS.astype(np.uint16)).save(tmp_path / f'a.{suffix}')
        assert grey_of(tmp_path / f'a.{suffix}').max() <= 1


@pytest.mark.parametrize('highest', [100, 255, 1000, 4095, 65535])
def test_pgm_of_any_highest_value(tmp_path, highest):
    values = np.linspace(0, highest, 64).round().astype('>u2' if highest > 255 else 'u1')
    (tmp_path / 'a.pgm').write_bytes(b'P5 8 8 %d\n' % highest + values.tobytes())
    expected = np.linspace(0, 255, 64).reshape(8, 8)
    assert np.abs(grey_of(tmp_path / 'a.pgm') - expected).max() <= 2


def test_12_bit_tiff(tmp_path):
    """Two pixels in three bytes."""
    pairs = [(0, 4095), (2048, 16)]
    data = b''.join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(data))]
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags)
    (tmp_path / 'a.tif').write_bytes(b'II*\0' + struct.pack('<I', 8 + len(data)) + data
                                     + struct.pack('<H', len(tags)) + entries + b'\0\0\0\0')
    assert grey_of(tmp_path / 'a.tif')[0].tolist() == [0, 255, 128, 1]


@pytest.mark.parametrize(('dtype', 'scale'), [(np.int32, 1), (np.int32, 257), (np.float32, 1),
                                              (np.float32, 257), (np.float32, 1 / 255)])
def test_32_bit_grey(tmp_path, dtype, scale):
    Image.fromarray((LEVELS.astype(float) * scale).astype(dtype)).save(tmp_path / 'a.tif')
    assert np.abs(grey_of(tmp_path / 'a.tif') - LEVELS).max() <= 1


@pytest.mark.parametrize('values', [[-1, 5], [0, 70_000], [0, 300], [0, np.nan], [0, np.inf], [0, 1.02],
                                    [0, 255.5], [-0.1, 1]])
def test_grey_whose_white_nobody_knows(tmp_path, values):
    """Better refused than black."""
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / 'a.tif')
    refused(tmp_path / 'a.tif', 'its pixels')


def test_portable_float_map(tmp_path):
    (tmp_path / 'a.pfm').write_bytes(b'Pf\n2 1\n-1.0\n' + np.array([0, 200], '<f4').tobytes())
    assert grey_of(tmp_path / 'a.pfm')[0].tolist() == [0, 200]


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
def test_tiff_whose_zero_is_white(tmp_path, dtype):
    values = LEVELS.astype(dtype) * (257 if dtype == np.uint16 else 1)
    Image.fromarray(values).save(tmp_path / 'a.tif')
    content = (tmp_path / 'a.tif').read_bytes()
    tag = struct.pack('<HHIHH', 262, 3, 1, 1, 0)
    assert content.count(tag) == 1
    (tmp_path / 'a.tif').write_bytes(content.replace(tag, struct.pack('<HHIHH', 262, 3, 1, 0, 0)))
    assert np.array_equal(grey_of(tmp_path / 'a.tif'), 255 - LEVELS)


def test_first_of_several_frames(tmp_path):
    frames = [Image.new('RGB', (6, 4), colour) for colour in ('red', 'blue')]
    for suffix in ('png', 'webp', 'tif', 'gif'):
        path = tmp_path / f'a.{suffix}'
        frames[0].save(path, save_all=True, append_images=frames[1:],
                       **(dict(lossless=True) if suffix == 'webp' else {}))
        assert pixels(path)[0, 0].tolist() == [255, 0, 0]


# ---------------------------------------------------------------------------------------------- orientation
def upright(values, orientation):
    """As the EXIF standard describes where row 0 and column 0 of the stored pixels belong."""
    turned = {1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1]}
    side = values.swapaxes(0, 1)
    turned |= {5: side, 6: side[:, ::-1], 7: side[::-1, ::-1], 8: side[::-1]}
    return turned[orientation]


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f'a.{suffix}'
    kwargs = dict(jpg=dict(quality=95), webp=dict(lossless=True)).get(suffix, {})
    gradient().save(path, exif=exif, **kwargs)
    expected = upright(np.asarray(gradient()).astype(int), orientation)
    values = pixels(path)
    assert values.shape == expected.shape and np.abs(values - expected).mean() < 4
    if suffix != 'tif':  # Pillow turns these itself
        stored = pixels(path, upright=False)
        assert np.array_equal(upright(stored, orientation), values) and stored.shape == (20, 24, 3)


def test_deep_and_transparent_images_are_turned(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    deep = Image.fromarray(LEVELS[:8].astype(np.uint16) * 257)
    for image in (deep, Image.fromarray(LEVELS[:8]).convert('LA')):
        image.save(tmp_path / 'a.png', exif=exif)
        assert np.array_equal(grey_of(tmp_path / 'a.png'), upright(LEVELS[:8], 6))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('exif', [
    b'garbage', b'II*\0\xff\xff\xff\xff', b'',
    b'MM\0*\0\0\0\x08\0\1\x01\x12\0\3\xff\xff\xff\xff\0\0\0\0',  # four billion orientations
    b'MM\0*\0\0\0\x08\0\1\x01\x12\0\2\0\0\0\2x\0\0\0',           # a letter
    b'MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\x63\0\0'])      # 99
def test_damaged_exif_leaves_the_pixels(tmp_path, exif):
    exif = b'Exif\0\0' + exif
    for suffix in ('jpg', 'png', 'webp'):
        gradient().save(tmp_path / f'plain.{suffix}')
        gradient().save(tmp_path / f'a.{suffix}', exif=exif)
        assert np.array_equal(pixels(tmp_path / f'a.{suffix}'), pixels(tmp_path / f'plain.{suffix}'))


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.filterwarnings('ignore')
def test_too_many_pixels(tmp_path, monkeypatch):
    gradient().save(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    refused(tmp_path / 'a.png', 'too many pixels')


@pytest.mark.parametrize('remark', [
    [chunk(b'zTXt', b'k\0\0' + zlib.compress(b'a' * 2 ** 21))],
    [chunk(b'iTXt', b'k\0\1\0\0\0' + zlib.compress(b'a' * 2 ** 21))],
    [chunk(b'iCCP', b'k\0\0' + zlib.compress(b'a' * 2 ** 21))],
    [chunk(b'zTXt', b'k%d\0\0' % i + zlib.compress(b'a' * 2 ** 20)) for i in range(70)],
    [chunk(b'zTXt', b'k\0\5a')],               # of an unknown compression
    [chunk(b'tEXt', b'k\0a')[:-4] + b'crc?']])  # of another check sum
def test_texts_of_a_png_that_cannot_be_read_are_left_out(tmp_path, remark):
    exif = Image.Exif()
    exif[0x112] = 3
    gradient().save(tmp_path / 'a.png', exif=exif)
    expected = pixels(tmp_path / 'a.png')
    content = (tmp_path / 'a.png').read_bytes()
    (tmp_path / 'a.png').write_bytes(content[:33] + b''.join(remark) + content[33:])
    assert np.array_equal(pixels(tmp_path / 'a.png'), expected)
    (tmp_path / 'a.png').write_bytes(content[:33] + b''.join(remark) + content[33:-60])
    refused(tmp_path / 'a.png')


def test_what_is_no_image(tmp_path):
    odd = tmp_path / 'a\nb\x1b[0m.png'
    odd.write_bytes(b'')
    assert 'no known image format' in refused(odd)
    (tmp_path / 'text.png').write_text('hello')
    assert 'no known image format' in refused(tmp_path / 'text.png')
    assert 'there is no file' in refused(tmp_path / 'nowhere.png')
    (tmp_path / 'link.png').symlink_to('nowhere.png')
    assert 'there is no file' in refused(tmp_path / 'link.png')
    (tmp_path / 'loop.png').symlink_to('loop.png')
    refused(tmp_path / 'loop.png')
    assert 'is no file' in refused(tmp_path)
    os.mkfifo(tmp_path / 'pipe.png')  # whoever opens it waits for a writer
    assert 'is no file' in refused(tmp_path / 'pipe.png')
    refused(f'{tmp_path}/a\0.png')
    undecodable = os.fsdecode(os.fsencode(tmp_path) + b'/\xff.png')
    refused(undecodable)
    gradient().save(tmp_path / 'good.png')
    (tmp_path / 'good.png').rename(undecodable)
    assert pixels(undecodable).shape == (20, 24, 3)
    assert pixels(os.fsencode(undecodable)).shape == (20, 24, 3)


def every_format():
    """(name, content) of small files of every format and of the rarer modes."""
    exif = Image.Exif()
    exif[0x112] = 6
    deep = Image.fromarray(LEVELS.astype(np.uint16) * 257)
    palette = gradient().convert('P')
    rows = [struct.pack('>12H', *range(i, 12000 + i, 1000)) for i in range(4)]
    files = [('rgb16.png', png(4, 4, 16, 2, rows, chunk(b'tRNS', struct.pack('>3H', 1, 2, 3))))]
    for name, image, kwargs in [
            ('a.png', gradient(), dict(exif=exif)),
            ('p.png', palette, dict(transparency=3)),
            ('deep.png', deep, {}),
            ('a.jpg', gradient(), dict(exif=exif)),
            ('p.jpg', gradient(), dict(progressive=True)),
            ('c.jpg', gradient().convert('CMYK'), {}),
            ('a.webp', gradient(), dict(exif=exif)),
            ('l.webp', gradient().convert('RGBA'), dict(lossless=True)),
            ('a.tif', gradient(), dict(exif=exif)),
            ('z.tif', gradient(), dict(compression='tiff_adobe_deflate')),
            ('w.tif', gradient(), dict(compression='tiff_lzw')),
            ('deep.tif', deep, {}),
            ('f.tif', Image.fromarray(LEVELS.astype(np.float32)), {}),
            ('a.bmp', gradient(), {}),
            ('p.bmp', palette, {}),
            ('a.ppm', gradient(), {}),
            ('a.pgm', deep, {}),
            ('a.gif', palette, {}),
            ('a.tga', gradient(), {})]:
        file = io.BytesIO()
        kind = {'jpg': 'JPEG', 'tif': 'TIFF', 'pgm': 'PPM'}.get(name[name.index('.') + 1:])
        image.save(file, format=kind or name[name.index('.') + 1:].upper(), **kwargs)
        files.append((name, file.getvalue()))
    return files


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(('name', 'content'), every_format(),
                         ids=lambda value: value if isinstance(value, str) else '')
def test_damaged_files_are_refused_or_read(tmp_path, name, content):
    rng = np.random.RandomState(len(content))
    path = tmp_path / name
    path.write_bytes(content)
    read_image(path)
    for trial in range(36):
        damaged = bytearray(content)
        if trial % 3 == 0:
            damaged = damaged[:rng.randint(len(damaged))]
        else:  # in the header, or anywhere
            end = min(64, len(damaged)) if trial % 3 == 1 else len(damaged)
            for position in rng.randint(0, end, rng.randint(1, 5)):
                damaged[position] = rng.choice([0, 1, 127, 255, rng.randint(256)])
        path.write_bytes(damaged)
        try:
            image = read_image(path)
        except ImageError as error:
            message = str(error)
            assert repr(str(path)) in message and message.isprintable() and len(message.splitlines()) == 1
        else:
            assert image.mode == 'RGB' and min(image.size) > 0


# ---------------------------------------------------------------------------------------------- crops
def noise(width, height, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize('resample', [Image.Resampling.LANCZOS, Image.Resampling.BICUBIC])
@pytest.mark.parametrize(('source', 'size'), [
    ((400, 5), (1600, 20)), ((5, 400), (20, 1600)), ((3000, 60), (900, 18)), ((60, 3000), (18, 900)),
    ((701, 1), (16 * 701, 16)), ((997, 13), (1300, 17)), ((17, 2), (500, 3))])
def test_part_of_a_long_image(resample, source, size):
    image = noise(*source)
    whole = image.resize(size, resample)
    side = min(size)
    longest = max(size) - side
    for begin in (0, 1, longest // 3, longest - 1, longest):
        box = (begin, 0, begin + side, side) if size[0] > size[1] else (0, begin, side, begin + side)
        part = resized_part(image, size, resample, box)
        difference = np.asarray(part).astype(int) - np.asarray(whole.crop(box))
        assert part.size == (side, side) and np.abs(difference).max() <= 1


@pytest.mark.parametrize('size', [(30000, 1), (1, 30000)])
def test_every_crop_of_a_thin_image(size):
    image = Image.new('RGB', size, (200, 100, 50))
    expected = torch.tensor([200, 100, 50])[:, None, None]

    def check(view, side=32):
        assert view.shape == (3, side, side)
        assert (view.add(1).mul(127.5).round() - expected).abs().max() <= 1
    for crop in ('resize', 'adm', 'vae'):
        for transform in build_transforms(32, hflip=True, mid_reso=1.25, crop=crop):
            check(transform(image))
    assert adm_center_crop(image, 32).size == (32, 32) == AdmRandomCrop(32)(image).size
    for view in ten_crop_views(image, 32, 1.1):
        check(view)


@pytest.mark.slow
def test_memory_of_thin_images(tmp_path):
    """The whole image, enlarged, would have gigabytes."""
    Image.new('RGB', (30000, 1)).save(tmp_path / 'thin.png')
    code = f'''
import re
from utils.data import build_transforms, ten_crop_views
from utils.images import read_image
def peak():
    return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
before = peak()
image = read_image({str(tmp_path / 'thin.png')!r})
for crop in ('resize', 'adm', 'vae'):
    for transform in build_transforms(256, crop=crop):
        transform(image)
ten_crop_views(image, 256, 1.1)
print(peak() - before)
'''
    run = subprocess.run([sys.executable, '-c', code], cwd=REPO, text=True, capture_output=True, check=True)
    assert float(run.stdout) < 200


SIZES = [(32, 32), (33, 32), (40, 51), (301, 77), (77, 301), (64, 64), (500, 333), (17, 90), (16, 16), (1, 7),
         (129, 8)]


@pytest.mark.parametrize('side', [32, 36, 41])
@pytest.mark.parametrize('size', SIZES)
def test_ordinary_images_are_cropped_as_by_torchvision(size, side):
    image = noise(*size)
    resize = Resize(side, InterpolationMode.LANCZOS)
    train, val = build_transforms(32, mid_reso=side / 32)
    of_torchvision = Compose([resize, RandomCrop(32)]), Compose([resize, CenterCrop(32)])
    for ours, theirs in zip((train, val), of_torchvision, strict=True):
        for seed in range(3):
            torch.manual_seed(seed)
            crop = ours(image)
            after = torch.rand(())
            torch.manual_seed(seed)
            expected = np.asarray(theirs(image))
            assert np.array_equal(crop.add(1).mul(127.5).round().byte().permute(1, 2, 0), expected)
            assert after == torch.rand(())  # as many numbers were drawn


@functools.cache
def adm_resized(size, side):
    """The resized image as published with ADM, whole."""
    image = noise(*size)
    while min(image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)


@pytest.mark.parametrize('size', SIZES)
def test_ordinary_images_are_cropped_as_by_adm(size):
    whole = np.asarray(adm_resized(size, 32))
    top, left = ((n - 32) // 2 for n in whole.shape[:2])
    assert np.array_equal(np.asarray(adm_center_crop(noise(*size), 32)), whole[top:top + 32, left:left + 32])
