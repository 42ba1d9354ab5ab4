"""Image files to arrays ``[H, W, C]``, whatever their format, depth and number of channels.

The format is told from the first bytes, never from the name. Results are ``uint8`` or ``uint16``
as stored, or ``float32`` for float and signed-integer images; orientation tags are obeyed.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastldm.errors import DataError

ImageSource = bytes | str | Path | np.ndarray
"""An encoded image, the path of one, or an array [H, W] or [H, W, C]."""

_NPY = b"\x93NUMPY"
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION_TAG = 274
_LUMA = np.array([0.299, 0.587, 0.114])
"""ITU-R 601, as PIL's conversion to grey."""


@dataclass
class _Decoded:
    array: np.ndarray
    alpha: bool = False
    premultiplied: bool = False


def decode_image(
    source: ImageSource, channels: int, value_range: tuple[float, float] = (0.0, 1.0)
) -> np.ndarray:
    """Read an image as an array ``[H, W, channels]`` of uint8, uint16 or float32.

    `value_range` gives black and white, and no and full alpha, of float images.

    Raises:
        DataError: the image can be read but its channels or its type do not fit.
        Exception: whatever the decoder raises on a damaged file.
    """
    if isinstance(source, np.ndarray):
        decoded = _Decoded(_as_supported(source))
    elif isinstance(source, bytes):
        decoded = _decode_stream(io.BytesIO(source))
    else:
        with Path(source).open("rb") as stream:
            decoded = _decode_stream(stream)
    return np.ascontiguousarray(_match_channels(decoded, channels, value_range))


def image_size(source: ImageSource) -> tuple[int, int]:
    """Height and width of an image, upright, read from its header alone."""
    if isinstance(source, np.ndarray):
        return _height_and_width(source.shape)
    if isinstance(source, bytes):
        return _stream_size(io.BytesIO(source))
    with Path(source).open("rb") as stream:
        return _stream_size(stream)


def _decode_stream(stream: BinaryIO) -> _Decoded:
    head = stream.read(32)
    stream.seek(0)
    if head.startswith(_NPY):
        return _Decoded(_as_supported(np.load(stream, allow_pickle=False)))
    if head.startswith(_TIFF):
        decoded = _decode_tiff(stream)
        if decoded is not None:
            return decoded
        stream.seek(0)
    # PIL reduces 16-bit colour PNGs to 8 bits.
    if head.startswith(_PNG) and head[24] == 16 and head[25] != 0:
        return _decode_png16(stream.read())
    return _decode_pil(stream)


def _stream_size(stream: BinaryIO) -> tuple[int, int]:
    head = stream.read(8)
    stream.seek(0)
    if head.startswith(_NPY):
        return _height_and_width(_npy_shape(stream))
    if head.startswith(_TIFF):
        import tifffile

        with tifffile.TiffFile(stream) as tiff:
            page = tiff.pages.first
            height, width = page.imagelength, page.imagewidth
            turned = _tiff_orientation(page) >= 5
    else:
        with _open_pil(stream) as image:
            width, height = image.size
            # getexif would decode a whole PNG in search of a tag behind its pixels.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(_ORIENTATION_TAG, 1) >= 5
    return (width, height) if turned else (height, width)


def _npy_shape(stream: BinaryIO) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"unknown .npy version {version}")
    shape, _, _ = readers[version](stream)
    return tuple(shape)


def _height_and_width(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(f"an image array must be [H, W] or [H, W, C], got shape {list(shape)}")
    return shape[0], shape[1]


def _as_supported(array: np.ndarray) -> np.ndarray:
    """Bring an array to [H, W, C] and to uint8, uint16 or float32."""
    _height_and_width(array.shape)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind in "fiu":
        return array.astype(np.float32)
    raise DataError(f"an image array must hold numbers, got dtype {array.dtype}")


def _decode_pil(stream: BinaryIO) -> _Decoded:
    from PIL import ImageOps

    with _open_pil(stream) as opened:
        image: Any = ImageOps.exif_transpose(opened)
    if image.mode in ("P", "PA", "RGBa", "La") or "transparency" in image.info:
        grey = image.mode in ("1", "L", "La") or image.mode.startswith("I")
        if not image.mode.startswith("I"):
            image = image.convert("LA" if grey else "RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
        image = image.convert("RGB")
    return _Decoded(_as_supported(np.asarray(image)), alpha=image.mode in ("LA", "RGBA"))


def _open_pil(stream: BinaryIO) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(stream)
    except UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None


def _decode_png16(data: bytes) -> _Decoded:
    import torch
    from torchvision.io import ImageReadMode, decode_png

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    tensor = decode_png(encoded, ImageReadMode.UNCHANGED, apply_exif_orientation=True)
    array = tensor.permute(1, 2, 0).numpy()
    return _Decoded(array, alpha=array.shape[2] in (2, 4))


def _decode_tiff(stream: BinaryIO) -> _Decoded | None:
    """Read a TIFF of any depth and channel count; ``None`` where PIL must do it.

    PIL serves palettes, YCbCr and the compressions for which tifffile wants a further package.
    """
    import tifffile

    with tifffile.TiffFile(stream) as tiff:
        page = tiff.pages.first
        photometric = tifffile.PHOTOMETRIC
        plain = (photometric.MINISWHITE, photometric.MINISBLACK, photometric.RGB)
        compressions = tifffile.COMPRESSION
        readable = (compressions.NONE, compressions.ADOBE_DEFLATE, compressions.DEFLATE)
        if page.photometric not in plain or page.compression not in readable:
            return None
        series = tiff.series[0]
        array = _channels_last(series.asarray(), series.axes)
        if page.photometric == photometric.MINISWHITE and array.dtype.kind == "u":
            array = np.iinfo(array.dtype).max - array
        associated = tifffile.EXTRASAMPLE.ASSOCALPHA
        extra = tuple(page.extrasamples)
        alpha = extra in ((associated,), (tifffile.EXTRASAMPLE.UNASSALPHA,))
        orientation = _tiff_orientation(page)
        return _Decoded(
            _as_supported(_turn_upright(array, orientation)), alpha, extra == (associated,)
        )


def _tiff_orientation(page: Any) -> int:
    tag = page.tags.get(_ORIENTATION_TAG)
    return int(tag.value) if tag is not None else 1


def _channels_last(array: np.ndarray, axes: str) -> np.ndarray:
    """Order the axes of a TIFF series as [H, W, C]; whatever else is there counts as channels."""
    kept = {axis: n for axis, n in zip(axes, array.shape, strict=True) if n > 1 or axis in "YX"}
    others = [axis for axis in kept if axis not in "YX"]
    if len(others) > 1:
        raise DataError(f"a TIFF with axes {axes} and shape {list(array.shape)} is not one image")
    array = array.reshape(list(kept.values()))
    return np.transpose(array, [list(kept).index(axis) for axis in ["Y", "X", *others]])


def _turn_upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF or TIFF orientation (1 to 8; TIFF 6.0, section 8, Orientation)."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return array[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _match_channels(
    decoded: _Decoded, channels: int, value_range: tuple[float, float]
) -> np.ndarray:
    array = decoded.array
    if array.shape[2] == channels:
        return array
    if decoded.alpha:
        array = _on_white(array, decoded.premultiplied, value_range)
    present = array.shape[2]
    if present == channels:
        return array
    if present == 1 and channels == 3:
        return np.repeat(array, 3, axis=2)
    if present == 3 and channels == 1:
        return _to_grey(array)
    hint = ""
    if decoded.array.shape[0] == channels:
        hint = "; the array looks like [C, H, W], wanted is [H, W, C]"
    raise DataError(f"the image has channels={present}, wanted are channels={channels}{hint}")


def _on_white(
    array: np.ndarray, premultiplied: bool, value_range: tuple[float, float]
) -> np.ndarray:
    """Composite the last channel as alpha on white, rounding integers to the nearest."""
    colour, alpha = array[..., :-1], array[..., -1:]
    if array.dtype.kind == "f":
        black, white = value_range
        share = (alpha - black) / (white - black)
        visible = colour - black if premultiplied else (colour - black) * share
        result: np.ndarray = black + visible + (white - black) * (1 - share)
        return result.astype(np.float32)
    white = int(np.iinfo(array.dtype).max)
    # Twice the bits hold every sum below.
    colour, alpha = (part.astype(f"u{2 * array.itemsize}") for part in (colour, alpha))
    if premultiplied:
        blended = np.minimum(colour + (white - alpha), white)
    else:
        blended = (colour * alpha + white * (white - alpha) + white // 2) // white
    return np.asarray(blended, dtype=array.dtype)


def _to_grey(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        from PIL import Image

        luma: np.ndarray = np.asarray(Image.fromarray(array).convert("L"))
        return luma[:, :, None]
    grey = array.astype(np.float64) @ _LUMA
    if array.dtype.kind == "u":
        grey = np.rint(grey)
    return np.asarray(grey, dtype=array.dtype)[:, :, None]
