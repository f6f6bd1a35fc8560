"""Images from files that nobody vouches for: whole, in RGB and upright, or refused with the reason."""

import io
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ocvtp.errors import BadInput

MAX_PIXELS: Final = 64 * 2**20
"""Width times height that is decoded by default (67 megapixels, 200 MB as RGB)."""
MAX_BYTES: Final = 256 * 2**20
"""Size of a file from which it is not read as an image."""
MAX_ASPECT: Final = 100
"""Longer side over shorter side: beyond it, a resized image shows nothing."""
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read (by content, whatever the name): raster images only, none that runs a helper program."""


class UnsafePath(BadInput):
    """A file name that leads out of the folder it belongs to."""


class BadImage(BadInput):
    """A file that is not a sound image. `reason` says why, without naming the file."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.reason = reason


def check_name(name: str) -> None:
    """Look at a relative file name alone, without touching any file; `UnsafePath` if it may leave its folder."""
    if not name or name.isspace():
        raise UnsafePath(f"file name {name!r} is empty")
    if "\0" in name:
        raise UnsafePath(f"file name {name!r} contains a NUL character")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or PureWindowsPath(name).drive:
        raise UnsafePath(f"file name {name!r} is absolute: it must be relative to the image folder")
    if ".." in PureWindowsPath(name).parts:  # takes both / and \ as separators
        raise UnsafePath(f"file name {name!r} contains '..': it must stay in the image folder")


def safe_join(root: Path | str, name: str) -> Path:
    """The path of `name` within `root`; the file need not exist, and none is opened.

    Args:
        root: a folder; it may itself be a link.
        name: relative, with `/` between folders, as in COCO's `file_name`.

    Returns:
        The resolved path.

    Raises:
        UnsafePath: the name is empty or absolute, holds `..` or NUL, cannot be a path, or follows a link out of
            the folder.
    """
    check_name(name)
    base = Path(root).resolve()
    try:
        path = (base / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, not encodable
        raise UnsafePath(f"file name {name!r} in {base} cannot be followed: {error}") from error
    if path == base or not path.is_relative_to(base):
        raise UnsafePath(f"file name {name!r} leads out of the image folder {base}")
    return path


def read_image_file(path: Path | str) -> bytes:
    """The bytes of a regular file of at most `MAX_BYTES`; `BadImage` with the reason if there is none."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            raise BadImage(str(path), "not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadImage(str(path), f"{status.st_size} bytes, more than the {MAX_BYTES} that are read")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadImage(str(path), "the file is not there") from error
    except (OSError, ValueError) as error:
        raise BadImage(str(path), f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def open_image(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Decode an image completely.

    The EXIF orientation is applied (and taken out, so that it cannot be applied twice), 16-bit grey is scaled to 8
    bit, palettes and CMYK are converted, and what is transparent is laid over white. Of an animation the first
    frame counts.

    Args:
        source: a file, or the bytes of one.
        max_pixels: larger images are refused before they are decoded.
        name: what to call the image in messages; by default its path.

    Returns:
        A PIL image in mode RGB that holds its pixels and no metadata.

    Raises:
        BadImage: not there, not an image of the `FORMATS`, truncated, too large or too narrow.
    """
    if isinstance(source, bytes):
        return _opened(source, name or "image in memory", max_pixels)
    return _opened(read_image_file(source), name or str(source), max_pixels)


def check_image(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """`BadImage` where `open_image` would raise it, in less than half of the time for a JPEG.

    All of its data is decoded, but into an eighth of its pixels a side.
    """
    _opened(data, name, max_pixels, small=True)


def _opened(data: bytes, name: str, max_pixels: int, *, small: bool = False) -> Image.Image:
    if not data:
        raise BadImage(name, "the file is empty (0 bytes)")
    try:
        return _decode(data, max_pixels, small=small)
    except _Refused as error:
        raise BadImage(name, str(error)) from None
    except UnidentifiedImageError as error:
        raise BadImage(name, f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(name, f"too many pixels: {error}") from error
    except MemoryError as error:
        raise BadImage(name, "too large for the memory of this machine") from error
    except Exception as error:
        # PIL's plug-ins raise whatever comes up (struct.error, SyntaxError, KeyError, EOFError, zlib.error, ...).
        raise BadImage(name, f"cannot be decoded: {error or type(error).__name__}") from error


class _Refused(Exception):
    pass


def _decode(data: bytes, max_pixels: int, *, small: bool) -> Image.Image:
    with _strict(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise _Refused(f"{width} x {height} pixels, more than the {max_pixels} that are decoded")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise _Refused(f"{width} x {height} pixels: one side is over {MAX_ASPECT} times the other")
        if small:
            image.draft(None, (1, 1))  # of a JPEG; others stay as they are
        image.load()
        return _plain(_to_rgb(ImageOps.exif_transpose(image)))


class _Strictness:
    """Truncated files are errors, even if another package (lmms_eval does) told PIL to accept them.

    The flag is global in PIL: the first image that is being decoded clears it, the last one puts it back.
    """

    def __init__(self) -> None:
        self.lock, self.users, self.before = threading.Lock(), 0, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if self.users == 0:
                self.before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    ImageFile.LOAD_TRUNCATED_IMAGES = self.before


_strict = _Strictness()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # PIL's own conversion clips at 255: almost every pixel would be white.
        values_HW = np.asarray(image.convert("I"), np.float64)
        return Image.fromarray(np.rint(values_HW / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _Refused(f"pixels are 32-bit numbers (mode {image.mode}), which have no defined white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _plain(image: Image.Image) -> Image.Image:
    """The pixels alone."""
    return Image.fromarray(np.asarray(image))
