"""From the bytes of an image file to the pixels that the network takes. The bytes may be hostile."""

import io
import math
import re
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from defense.model_config import InputConfig
from defense.preprocessing import IMAGE_FORMATS, to_gray_or_rgb, to_pixels
from service.errors import BadImage, ServiceError, TooLarge, Unprocessable

MAX_JPEG_SCANS = 100  # as in libtiff; encoders write about 10
_JPEG_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # its header up to the components
_TIFF_TILE_SIDES = 322, 323  # tags
# Thousands of different ones from one file of a stranger's: no news for the log, and Python would keep each for ever.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(data: bytes, config: InputConfig, *, max_pixels: int) -> NDArray[np.uint8]:
    """Decode an image file and fit it to the network's input.

    EXIF rotation is applied, transparency is laid on white, CMYK and palettes become RGB, 16-bit gray becomes 8-bit.

    Args:
        max_pixels: of the file as it says of itself, before anything is decoded.

    Returns:
        [H, W, channels] uint8.

    Raises:
        BadImage: not an image of a known format, or a damaged one.
        TooLarge: more than ``max_pixels``.
        Unprocessable: animated, or of a pixel type without a known range.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            _check_header(image, data, max_pixels)
            image.load()  # what is damaged shows here, so that a ValueError in _gray_or_rgb is of the pixel type
            if image.info or image.format != "PNG":  # a PNG with a rotation says so there
                ImageOps.exif_transpose(image, in_place=True)  # a copy of 50 million pixels is 200 MB
            return to_pixels(_gray_or_rgb(image), config)
    except ServiceError:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(
            f"expected an image file ({', '.join(IMAGE_FORMATS)}), got {len(data)} other bytes; send the file itself"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(f"expected at most {max_pixels} pixels, got many more; send a smaller image") from error
    except Exception as error:
        raise BadImage(f"the image is damaged ({type(error).__name__}: {error}); send an intact file") from error


def _check_header(image: Image.Image, data: bytes, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise TooLarge(
            f"expected at most {max_pixels} pixels, got {image.width} x {image.height}; send a smaller image, "
            "or raise IGD_MAX_PIXELS"
        )
    # A TIFF of 8 x 8 pixels may be one tile of gigapixels, which is decoded whole.
    tile_sides = [getattr(image, "tag_v2", {}).get(tag, 0) for tag in _TIFF_TILE_SIDES]
    if all(isinstance(side, int) for side in tile_sides) and math.prod(tile_sides) > max_pixels:
        raise TooLarge(f"expected tiles of at most {max_pixels} pixels, got more; save the image without tiles")
    # An MPO is a JPEG with previews of itself in it; of an animation, an attacker could choose the frame we look at.
    # Not n_frames: to count the pages of a TIFF takes Pillow a time that grows with their square.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise Unprocessable("expected a still image, got several frames or pages; send the one you mean")
    # Each scan of a progressive JPEG, 80 bytes, is a pass over all pixels: a megabyte of them would take minutes.
    if image.format in ("JPEG", "MPO") and len(_JPEG_SCAN.findall(data)) > MAX_JPEG_SCANS:
        raise Unprocessable(f"expected a JPEG of at most {MAX_JPEG_SCANS} scans; save it anew")


def _gray_or_rgb(image: Image.Image) -> Image.Image:
    try:
        return to_gray_or_rgb(image)
    except ValueError as error:
        raise Unprocessable(str(error)) from error
