"""Arrays of pixels as a request's body: what fits is taken as it is, what does not gets a sentence."""

import io

import numpy as np
import pytest

from defense.model_config import InputConfig
from service.arrays import read_pixels
from service.errors import Unprocessable

CONFIG = InputConfig(size=(4, 6), channels=3)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
RAW, NPY = "application/octet-stream", "application/x-npy"


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def with_header(header, data=b"", version=b"\x01\x00"):
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "body",
    [npy(PIXELS), with_header(str({"descr": "|u1", "fortran_order": False, "shape": (5, 4, 6, 3)}), PIXELS.tobytes())],
)
def test_what_numpy_saves_is_read(body):
    assert np.array_equal(read_pixels(body, NPY, CONFIG), PIXELS)


def test_bare_bytes_are_as_many_images_as_fit():
    assert np.array_equal(read_pixels(PIXELS.tobytes(), RAW, CONFIG), PIXELS)
    assert np.array_equal(read_pixels(PIXELS.tobytes(), RAW, CONFIG, "5,4,6,3"), PIXELS)
    assert np.array_equal(read_pixels(PIXELS.tobytes(), RAW, CONFIG, "[5, 4, 6, 3]"), PIXELS)


def test_pixels_are_a_view_of_the_body():
    body = npy(PIXELS)
    assert np.shares_memory(read_pixels(body, NPY, CONFIG), np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("body", "shape", "fragment"),
    [
        (b"", None, "got [0, 4, 6, 3]"),
        (PIXELS.tobytes()[:-1], None, "an image of this network is 72 bytes"),
        (PIXELS.tobytes(), "4,4,6,3", "expected 288 bytes"),
        (PIXELS.tobytes(), "5,6,4,3", "expected uint8 pixels of shape [n, 4, 6, 3]"),
        (PIXELS.tobytes(), "5,4,6", "got [5, 4, 6]"),
        (PIXELS.tobytes(), "-1,4,6,3", "got [-1, 4, 6, 3]"),
        (PIXELS.tobytes(), "many", "shape=n,H,W,C"),
        (PIXELS.tobytes(), "9" * 4300 + ",4,6,3", "more than 2**63"),
    ],
)
def test_bytes_that_are_no_images_of_this_network_are_refused(body, shape, fragment):
    with pytest.raises(Unprocessable) as refused:
        read_pixels(body, RAW, CONFIG, shape)
    assert fragment in refused.value.detail


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        (b"", "as numpy.save writes it"),
        (PIXELS.tobytes(), "as numpy.save writes it"),
        (npy(PIXELS)[:-1], "expected 360 bytes"),
        (npy(PIXELS) + b"more", "got 364"),
        (npy(PIXELS.astype(np.float32)), "got float32"),
        (npy(np.asfortranarray(PIXELS)), "in Fortran order"),
        (npy(PIXELS[:0]), "got [0, 4, 6, 3]"),
        (npy(PIXELS[0]), "got [4, 6, 3]"),
        (with_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': (0x1{'0' * 5000}, 1)}}"), "more than 2**63"),
        (
            with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (True, 4, 6, 3)}"),
            "other things than numbers",
        ),
        (npy(np.array([{}], dtype=object), allow_pickle=True), "got object"),
        (with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 4, 6, 3)}"), "[-5, 4, 6, 3]"),
        (with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (10**9, 4, 6, 3)}"), "numpy.save"),
        (with_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**12}, 4, 6, 3)}}"), "bytes of pixels"),
        # 2**62 * 4 * 6 * 3 is 0 in 64 bits, which is as many bytes as there are.
        (with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 4, 6, 3)}"), "bytes of"),
        (with_header("[" * 100), "as numpy.save writes it"),
        (
            with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (5, 4, 6, 3)}", version=b"\x09\x00"),
            "numpy.save",
        ),
    ],
)
def test_arrays_that_are_no_images_of_this_network_are_refused(body, fragment):
    with pytest.raises(Unprocessable) as refused:
        read_pixels(body, NPY, CONFIG)
    assert fragment in refused.value.detail
