"""From the bytes of an image file to the pixels that the network takes. The bytes may be hostile."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from defense.model_config import InputConfig
from defense.preprocessing import to_pixels
from service.errors import BadImage, ServiceError, TooLarge, Unprocessable

# Few decoders, few holes: the formats people send, and no others (no EPS, which runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_DIRECT_MODES = {"L", "RGB", "1", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"}


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
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image, max_pixels)
            image.load()
            return to_pixels(_as_gray_or_rgb(ImageOps.exif_transpose(image)), config)
    except ServiceError:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(
            f"expected an image file ({', '.join(FORMATS)}), got {len(data)} other bytes; send the file itself"
        ) from error
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{error}; send a smaller image") from error
    except Exception as error:
        raise BadImage(f"the image is damaged ({type(error).__name__}: {error}); send an intact file") from error


def _check_header(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise TooLarge(
            f"expected at most {max_pixels} pixels, got {image.width} x {image.height}; send a smaller image, "
            "or raise IGD_MAX_PIXELS"
        )
    # An MPO is a JPEG with previews of itself in it; of an animation, an attacker could choose the frame we look at.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise Unprocessable(f"expected a still image, got {image.n_frames} frames; send the frame you mean")  # type: ignore[attr-defined]


def _as_gray_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image.convert("RGBA"))
        return background.convert("RGB")
    if image.mode not in _DIRECT_MODES:
        raise Unprocessable(f"expected 8- or 16-bit pixels, got mode {image.mode}; convert the image to 8-bit RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
