"""Images that come as arrays of pixels: nothing to decode, and as little to trust as any bytes."""

import io
import math

import numpy as np
from numpy.typing import NDArray

from defense.model_config import InputConfig
from service.errors import Unprocessable

MEDIA_TYPES = ("application/octet-stream", "application/x-npy")
Pixels = NDArray[np.uint8]


def read_pixels(body: bytes, media_type: str, config: InputConfig, shape: str | None = None) -> Pixels:
    """The images in a body of ``application/x-npy`` (numpy.save) or ``application/octet-stream`` (the bare bytes).

    Args:
        config: of the network, whose size images must have: arrays are not resized.
        shape: what the sender of bare bytes says that they are, ``"n,H,W,C"``; by default as many images as fit.

    Returns:
        [n, H, W, C] uint8, n >= 1; a view of the body.

    Raises:
        Unprocessable: another dtype, order, shape or number of bytes.
    """
    expected = (config.size[0], config.size[1], config.channels)
    if media_type == "application/x-npy":
        found, data = _read_npy(body)
    else:
        found, data = _said(shape) or (len(body) // math.prod(expected), *expected), memoryview(body)
    return as_pixels(found, data, config)


def as_pixels(found: tuple[int, ...], data: bytes | memoryview, config: InputConfig) -> Pixels:
    """Bytes that are said to be of a shape, as images of the network's size.

    Returns:
        [n, H, W, C] uint8, n >= 1; a view of the bytes.

    Raises:
        Unprocessable: another shape, or number of bytes.
    """
    expected = (config.size[0], config.size[1], config.channels)
    _check_numbers(found)
    if found[1:] != expected or found[0] < 1:
        raise Unprocessable(
            f"expected uint8 pixels of shape [n, {', '.join(map(str, expected))}] (n images, height, width, channels), "
            f"got {list(found)}; resize them, or send image files"
        )
    if len(data) != math.prod(found):
        raise Unprocessable(
            f"expected {math.prod(found)} bytes of pixels for shape {list(found)}, got {len(data)}; "
            f"an image of this network is {math.prod(expected)} bytes"
        )
    return np.frombuffer(data, np.uint8).reshape(found)


def _read_npy(body: bytes) -> tuple[tuple[int, ...], memoryview]:
    stream = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
    except Exception as error:  # it evaluates the header as a literal, which can fail in many ways
        raise Unprocessable(f"expected an array as numpy.save writes it ({error}); send that") from error
    _check_numbers(shape)
    if dtype != np.uint8 or fortran_order or any(n < 0 for n in shape):
        order = ", in Fortran order" if fortran_order else ""
        raise Unprocessable(
            f"expected an array of uint8 in C order, got {dtype} of shape {list(shape)}{order}; "
            "convert it with numpy.ascontiguousarray(array, dtype=numpy.uint8)"
        )
    return shape, memoryview(body)[stream.tell() :]


def _check_numbers(shape: tuple[int, ...]) -> None:
    if any(type(n) is not int for n in shape):  # numpy's own check lets True through
        raise Unprocessable("expected the shape of an array, got other things than numbers; send the array's own")
    if any(n.bit_length() > 63 for n in shape):  # Python refuses to print longer ones
        raise Unprocessable("expected the shape of an array, got one of more than 2**63 rows; send the array's own")


def _said(shape: str | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    try:
        return tuple(int(n) for n in shape.strip("[]() ").split(","))
    except ValueError as error:
        raise Unprocessable(f"expected shape=n,H,W,C in the Content-Type, got '{shape[:50]}'") from error
