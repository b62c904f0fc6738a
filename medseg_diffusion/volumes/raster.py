"""PNG, JPEG, TIFF and BMP files through Pillow: an image of W x H pixels is a volume of one slice, (W, H, 1)."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from medseg_diffusion.errors import InputError, UsageError, quiet_libraries

from .volume import FileImage, Header, Volume

# Image files have no voxel size: 1 mm is nominal. The axes are ITK's: i, to the right of the picture, is the
# patient's left; j, downwards, is posterior. A map written as NIfTI then covers the image in viewers that use ITK.
_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
_NO_UNIT = 0  # NIfTI's code
_SOFTWARE = "Software"  # keyword of the PNG standard, for the description
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
"""Pillow tries no other formats: for some, it starts a program on a file that is not to be trusted."""
_GREY: dict[str, npt.DTypeLike] = {
    "1": np.uint8,
    "L": np.uint8,
    "I;16": np.uint16,
    "I;16L": np.uint16,
    "I;16B": np.uint16,
    "I": np.int32,
    "F": np.float32,
}
_WHITE = {"1": 1, "L": 255, "RGB": 255, "I;16": 65535, "I;16L": 65535, "I;16B": 65535}
_DEEP = tuple(mode for mode in _GREY if mode not in ("1", "L"))
BROKEN = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for files that are truncated, damaged or of another format."""


def open_image(path: Path) -> FileImage:
    """Read an image: (W, H, 1) grey values, or (W, H, 1, 3) red, green and blue of 0 to 255.

    Palette indices are replaced by their colours. An alpha channel is dropped if every pixel is opaque.

    Raises:
        InputError: a file that is no such image or is damaged, several pages, another colour space, transparency, or
            more than 8 bits per colour.
    """
    return _as_volume(_colours(path, _decoded(path)))


def open_labels(path: Path) -> FileImage:
    """`open_image` for a mask, (W, H, 1). The indices of a palette are kept: they are the classes.

    Raises:
        InputError: as `open_image`, and for a JPEG, whose lossy compression changes values.
    """
    image = _decoded(path, exact=True)
    return _as_volume(image if image.mode == "P" else _colours(path, image))


def require_mask(path: Path, array: npt.NDArray[np.generic]) -> None:
    """Refuse anything but one slice of labels in a .png file.

    Raises:
        UsageError: another suffix or array; names the format to use instead.
    """
    what = "a map of real numbers" if array.dtype.kind == "f" else f"labels of {' x '.join(map(str, array.shape))}"
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: masks of images are written as .png, never as {path.suffix}; use .png or .nii.gz")
    if array.dtype.kind == "f" or array.ndim != 3 or array.shape[2] != 1:
        raise UsageError(f"{path}: a PNG holds the mask of one image, not {what}; use .nii.gz")


def write(path: Path, array: npt.NDArray[np.generic], like: Volume) -> None:
    """Write labels (W, H, 1), uint8 or uint16, as a greyscale PNG, which has no geometry; ``like`` tells its words."""
    texts = PngImagePlugin.PngInfo()
    if like.header.description:
        texts.add_text(_SOFTWARE, like.header.description)
    Image.fromarray(np.ascontiguousarray(array[:, :, 0].T)).save(path, format="PNG", pnginfo=texts)


def description(path: Path) -> str:
    """What a PNG says of itself (`Header.description`); empty if it says nothing or cannot be read."""
    try:
        with quiet_libraries(), Image.open(path, formats=("PNG",)) as image:
            return str(image.info.get(_SOFTWARE, ""))
    except BROKEN:
        return ""


def image_count(image: Image.Image) -> int:
    """Number of images in an opened file. Further ones in a JPEG do not count."""
    return 1 if _is_jpeg(image) else getattr(image, "n_frames", 1)


def upright(image: Image.Image) -> Image.Image:
    """An opened image with all pixels decoded, because Pillow reports a truncated file only then.

    The orientation in a photograph's header is applied, as every viewer and labelling tool does: their masks are
    upright. Grey levels of 16 bits have such a mode.

    Raises:
        One of `BROKEN`: a damaged file.
    """
    image.load()
    turned = ImageOps.exif_transpose(image)
    # Older versions of Pillow read a 16-bit PNG into 32 bits.
    return turned.convert("I;16") if image.format == "PNG" and image.mode == "I" else turned


def is_transparent(image: Image.Image) -> bool:
    """Whether a pixel of a decoded image is not opaque."""
    if not image.has_transparency_data or image.mode in _DEEP:
        return False
    alpha = image.convert("LA" if image.mode in ("1", "L", "LA") else "RGBA").getchannel("A")
    return bool(alpha.getextrema() != (255, 255))


def reason(error: Exception) -> str:
    """What one of `BROKEN` says, for a message."""
    # For an unknown format, Pillow's message names only an object in memory.
    text = "of another format" if isinstance(error, UnidentifiedImageError) else str(error)
    return " ".join(text.split())[:120].rstrip(".") or type(error).__name__


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")  # MPO: a JPEG with further images, which are previews


def _decoded(path: Path, exact: bool = False) -> Image.Image:
    """The decoded image, upright. ``exact`` refuses a JPEG."""
    try:
        # Read into memory first: Pillow (13.0) maps an uncompressed TIFF that it opens by name, and mistakes the sides
        # of one whose header asks for a quarter turn. Pillow's warnings concern metadata; unreadable pixels raise.
        content = io.BytesIO(path.read_bytes())
        _require_sums(content)
        with quiet_libraries(), Image.open(content, formats=FORMATS) as image:
            count = image_count(image)
            if exact and _is_jpeg(image):
                wrong = ("a JPEG", "a mask in a lossless format", "save the original mask as PNG")
            elif count > 1:
                wrong = (f"{count} images in one file", "a single image", "save each as a file of its own")
            elif ";16" in str(image.tile) and image.mode not in _GREY:  # Pillow would silently reduce them to 8 bits
                wrong = ("colours of 16 bits", "8 bits per colour", "convert the image to 8 bits")
            else:
                return upright(image)
    except BROKEN as error:
        wrong = (
            f"an unreadable file ({reason(error)})",
            "a complete PNG, JPEG, TIFF or BMP image",
            "copy or export it again",
        )
    raise InputError(path, *wrong)


def _require_sums(content: io.BytesIO) -> None:
    """What Pillow raises unless the check sums of all chunks of a PNG are right: decoding skips those of pixels."""
    if content.getbuffer()[:8] == b"\x89PNG\r\n\x1a\n":
        with quiet_libraries(), Image.open(content, formats=("PNG",)) as image:
            image.verify()
        content.seek(0)


def _colours(path: Path, image: Image.Image) -> Image.Image:
    """The image without palette and alpha: greyscale of some depth, or RGB."""
    if is_transparent(image):
        raise InputError(path, "transparent pixels", "an opaque image", "flatten it onto a background")
    if image.mode == "LA":
        return image.getchannel("L")
    if image.mode in ("P", "PA", "RGBA"):
        return image.convert("RGBA").convert("RGB")
    if image.mode not in _GREY and image.mode != "RGB":
        raise InputError(path, f"colours of the kind {image.mode}", "greyscale or RGB", "convert the image to RGB")
    return image


def _as_volume(image: Image.Image) -> FileImage:
    array = np.asarray(image)
    array = array.astype(_GREY.get(image.mode, np.uint8))  # bool to 0 and 1, 16 bits to this machine's byte order
    array = np.ascontiguousarray(array.swapaxes(0, 1)[:, :, None])
    header = Header(xyzt_units=_NO_UNIT, white=_WHITE.get(image.mode, 0))
    return FileImage(array.shape, array.dtype, _AFFINE, header, lambda: array)
