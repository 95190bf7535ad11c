"""The one reader of image files: RGB pixels as a viewer shows them, and every failure as one line.

Training, extraction, packing, scores of tokenizers and the notebooks all read images by `read_image`, or by
`decode_image` where the bytes lie inside another file.
"""
import io
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

TRANSPOSITIONS = {  # EXIF orientation -> what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # the EXIF tag
PHOTOMETRIC = 0x0106  # the tag of TIFF
PNG_HEAD = b'\x89PNG\r\n\x1a\n'
PNG_REMARKS = (b'tEXt', b'zTXt', b'iTXt', b'iCCP')  # kinds of chunks that do not change the pixels we read
GREY_STEPS = {'L;2': 85, 'L;4': 17}  # raw mode of a PNG -> 8-bit grey per step of its own grey
NOT_DATA = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'System Volume Information', 'lost+found')
LONGEST_SHAPE = 16    # sides of a resized image, long to short, up to which it is made as a whole


class ImageError(ValueError):
    """A file cannot be read as an image; the message is one line that names it.

    Attributes:
        reason: what is wrong with the file, without its name.
    """

    def __init__(self, message: str, reason: str = ''):
        super().__init__(message)
        self.reason = reason


def is_data(name: str) -> bool:
    """Whether a file or folder of this name can belong to a data set.

    Hidden ones do not: notebooks, archives of macOS and file managers leave them behind. Nor do folders in
    which systems and disk stations keep previews or deleted files.
    """
    return not name.startswith('.') and name not in NOT_DATA


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself, which cannot be followed, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def files_below(folder: str, around: frozenset[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files that are data) for a folder and all below it; links are followed.

    Args:
        around: real paths of the folders that this one lies in; None looks them up. A link back to one of
            them is not followed, since all files would be found again below it, in a wrong class.
    """
    here = os.path.realpath(folder)
    if around is None:
        parents = [*Path(os.path.abspath(folder)).parents, *Path(here).parents]
        around = frozenset(map(os.path.realpath, parents))
    if here in around:
        return
    names = []
    below = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_data(entry.name):
                continue
            if is_folder(entry):
                below.append(entry.path)
            else:
                names.append(entry.name)
    yield folder, names
    for path in below:
        yield from files_below(path, around | {here})


def read_image(path: str | os.PathLike, upright: bool = True) -> Image.Image:
    """The RGB image of a file, as a viewer shows it.

    Transparent parts show a white ground. Grey of 16 bits is divided by 257. Of grey of 32 bits, whole
    numbers or not, values in [0, 1] mean black to white, in [0, 255] what they say, in [0, 65535] 16 bits;
    others are refused, and so are those of which nobody can tell what is white. Of several frames the first
    one counts.

    Args:
        upright: turn the image as its EXIF orientation says; False gives the pixels as Pillow does, as the
            published code reads them. (Pillow itself turns TIFF files.)
    Raises:
        ImageError: the file cannot be read.
    """
    with image_errors(os.fspath(path)):
        if not is_regular(path):
            raise ImageError(f'expected an image, {os.fspath(path)!r} is no file: remove it', 'it is no file')
        with open(path, 'rb') as file:
            return decode_image(file, upright)


def decode_image(file: IO[bytes], upright: bool = True) -> Image.Image:
    """The RGB image in an open file, see `read_image`; it raises anything, so call it in `image_errors`."""
    return _rgb(*_opened(file), upright)


@contextmanager
def image_errors(name: str, remedy: str = 'repair or remove the file') -> Iterator[None]:
    """A context in which whatever goes wrong becomes an error that names the image.

    Args:
        name: of the image, for the message.
        remedy: what to do about a file with a wrong content.
    Raises:
        ImageError: the image cannot be read.
    """
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f'expected an image, there is no file {name!r}: restore it, or remove it from the '
                         'list or the link that names it', 'there is no such file') from None
    except Image.DecompressionBombError as error:
        raise ImageError(f'expected an image, {name!r} has too many pixels ({error}): make it smaller, or '
                         'remove it', 'it has too many pixels') from None
    except Exception as error:  # damaged headers make Pillow's readers raise anything
        reason = reason_of(error)
        raise ImageError(f'expected an image, cannot read {name!r} ({reason}): {remedy}', reason) from None


def is_regular(path: str | os.PathLike) -> bool:
    """Whether this is a file, or a link to one; opening a pipe would wait for somebody to write into it.

    Raises:
        OSError: nothing is there, or it may not be seen.
    """
    return stat.S_ISREG(os.stat(path).st_mode)


def reason_of(error: Exception) -> str:
    """What Pillow or the system says is wrong with a file, on one line, without the file's name."""
    if isinstance(error, UnidentifiedImageError):
        return 'its content is of no known image format'
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    line = ' '.join(text.split())
    if not line.isprintable():  # bytes of a damaged header would move the cursor of a terminal
        line = ascii(line)[1:-1]
    return line[:200] or type(error).__name__


def _opened(file: IO[bytes]) -> tuple[Image.Image, str]:
    """The decoded first frame, and how the file stores its pixels: Pillow's raw mode, '' if unknown."""
    try:
        return _decoded(file)
    except (ValueError, UnidentifiedImageError):
        file.seek(0)
        if file.read(len(PNG_HEAD)) != PNG_HEAD:
            raise
        file.seek(0)
        content = file.read()
    # Programs that draw images may leave texts in a PNG that are longer than Pillow accepts, or damaged.
    # The pixels are fine; what is not read cannot fill the memory.
    return _decoded(io.BytesIO(_without_remarks(content)))


def _decoded(file: IO[bytes]) -> tuple[Image.Image, str]:
    """As `_opened`, of a file without texts that Pillow refuses."""
    image = Image.open(file)
    raw_mode = ''
    if image.tile:
        arguments = image.tile[0][3]
        raw_mode = arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ''
    image.load()
    if min(image.size) < 1:
        raise ValueError(f'its size is {image.width}x{image.height}')
    return image, raw_mode


def _without_remarks(png: bytes) -> bytes:
    """A PNG file without its texts and its colour profile."""
    kept = [PNG_HEAD]
    begin = len(PNG_HEAD)
    while begin + 8 <= len(png):
        length, kind = struct.unpack('>I4s', png[begin:begin + 8])
        end = begin + length + 12  # length, kind and check sum
        if kind not in PNG_REMARKS:
            kept.append(png[begin:end])
        begin = end
    return b''.join(kept)


def _rgb(image: Image.Image, raw_mode: str, upright: bool) -> Image.Image:
    """RGB pixels of a decoded image; `raw_mode` as of `_opened`."""
    turn = _transposition(image) if upright else None
    if image.mode == 'F' or image.mode.startswith('I'):
        image = _from_deep_grey(image, raw_mode)
    elif image.mode == 'LAB':
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB'),
                                         'LAB', 'RGB')
        image = ImageCms.applyTransform(image, to_rgb)
    if image.mode == 'La':
        image = image.convert('LA')
    if image.has_transparency_data:
        _scale_transparent_colour(image, raw_mode)
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    image = image.convert('RGB')
    return image if turn is None else image.transpose(turn)


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """What turns a decoded image upright; None where nothing, or nothing that can be read, says so."""
    try:
        return TRANSPOSITIONS.get(image.getexif().get(ORIENTATION))
    except Exception:  # a damaged EXIF block makes its reader raise anything, and the pixels are still good
        return None


def _scale_transparent_colour(image: Image.Image, raw_mode: str) -> None:
    """Give the transparent colour of a PNG as many bits as Pillow has given the pixels."""
    colour = image.info.get('transparency')
    if raw_mode in GREY_STEPS and isinstance(colour, int):
        image.info['transparency'] = min(colour * GREY_STEPS[raw_mode], 255)
    elif raw_mode == 'RGB;16B' and isinstance(colour, tuple):
        image.info['transparency'] = tuple(value >> 8 for value in colour)


def _from_deep_grey(image: Image.Image, raw_mode: str) -> Image.Image:
    """8-bit grey of an image whose pixels have more bits; transparent pixels become white.

    Raises:
        ValueError: values that are not finite, negative, above 65535, or little above 1 or 255.
    """
    values = np.asarray(image)
    low = values.min()
    high = values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError('its pixels are nan or infinite')
    span = f'its pixels lie in [{low:g}, {high:g}], expected [0, 1], [0, 255] or [0, 65535]'
    if low < 0 or high > 65535:
        raise ValueError(span)
    is_float = image.mode == 'F'
    # Whole numbers of a PNG or PGM are scaled to 16 bits, whatever Pillow calls their mode.
    is_16_bit = not is_float and (image.mode.startswith('I;16') or image.format in ('PNG', 'PPM'))
    if raw_mode.startswith('I;12'):
        grey = values // 16
    elif is_16_bit:
        grey = values // 257
    elif 255 < high < 512 or (is_float and 1 < high < 2):
        # Filters overshoot. As 16 bits, or as 8, these images would be black.
        raise ValueError(span)
    elif is_float and high <= 1:
        grey = values * 255 + 0.5
    elif high <= 255:
        grey = np.floor(values + 0.5)
    else:
        grey = values // 257
    grey = grey.astype(np.uint8)
    transparent = image.info.get('transparency')
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    elif image.format == 'TIFF' and image.tag_v2.get(PHOTOMETRIC) == 0:  # 0 means white there
        grey = 255 - grey
    return Image.fromarray(grey)


# ---------------------------------------------------------------------------------------------- resizing
def resized_part(image: Image.Image, size: tuple[int, int], resample: Image.Resampling,
                 box: tuple[int, int, int, int]) -> Image.Image:
    """`image.resize(size, resample).crop(box)`, in memory that depends on the box where `size` is long.

    A photo of a line of text, 30,000 pixels long and a few high, would be gigabytes when its short side is
    enlarged. Then only the part that the crop sees is made, from the pixels that it depends on; a pixel may
    differ by one level, since positions are rounded in another way.

    Args:
        size: (width, height) of the whole.
        box: (left, top, right, bottom) within it.
    """
    # The result of shrinking is smaller than the image itself; there Pillow also chooses by the shape whether
    # rows or columns come first, so that a part would not be what the whole gives.
    is_enlarged = size[0] >= image.width and size[1] >= image.height
    if not is_enlarged or max(size) <= LONGEST_SHAPE * min(size):
        return image.resize(size, resample).crop(box)
    reach = {Image.Resampling.LANCZOS: 3, Image.Resampling.BICUBIC: 2}[resample]
    cut = []  # for each axis, the pixels that the box depends on
    inside = []  # for each axis, where the box lies among them
    for axis in range(2):
        scale = image.size[axis] / size[axis]
        begin = box[axis] * scale
        end = box[axis + 2] * scale
        margin = reach * max(scale, 1) + 1
        first = max(0, int(begin - margin))
        last = min(image.size[axis], int(end + margin) + 1)
        cut.append((first, last))
        inside.append((begin - first, end - first))
    (left, right), (top, bottom) = cut
    part = image.crop((left, top, right, bottom))
    (x0, x1), (y0, y1) = inside
    within = x0, y0, min(x1, part.width), min(y1, part.height)
    return part.resize((box[2] - box[0], box[3] - box[1]), resample, box=within)


class ResizedCrop:
    """A square of an image whose shorter side was resized by Lanczos.

    Args:
        side: pixels of the shorter side after resizing.
        size: pixels per side of the square.
        place: (height, width) of the resized image -> (top, left) of the square.
    """

    def __init__(self, side: int, size: int, place: Callable[[int, int], tuple[int, int]]):
        self.side = side
        self.size = size
        self.place = place

    def __call__(self, image: Image.Image) -> Image.Image:
        short, long = sorted(image.size)
        longer = int(self.side * long / short)  # as torchvision rounds
        width, height = (self.side, longer) if image.width <= image.height else (longer, self.side)
        top, left = self.place(height, width)
        box = left, top, left + self.size, top + self.size
        return resized_part(image, (width, height), Image.Resampling.LANCZOS, box)
