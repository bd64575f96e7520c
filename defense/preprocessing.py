"""From a decoded picture to the pixels that a network takes."""

from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from defense.model_config import InputConfig

# Few decoders, few holes: the formats people have, and no others (no EPS, which runs Ghostscript).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_ASPECT = 16
_DIRECT_MODES = {"L", "RGB", "1", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"}


def to_gray_or_rgb(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB: transparency laid on white, 16-bit gray scaled to 8 bits, the rest converted.

    Raises:
        ValueError: 32-bit integer or float pixels, whose range nobody knows.
    """
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image if image.mode == "RGBA" else image.convert("RGBA"))
        return background.convert("RGB")
    if image.mode not in _DIRECT_MODES:
        raise ValueError(f"expected 8- or 16-bit pixels, got mode {image.mode}; convert the image to 8-bit RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def to_pixels(image: Image.Image, config: InputConfig) -> NDArray[np.uint8]:
    """Resize the shorter side, crop the center, and give the channels the network takes.

    Args:
        image: in mode L or RGB.

    Returns:
        [H, W, channels] uint8.
    """
    height, width = config.size
    image, mode = _without_far_ends(image, config), "L" if config.channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    scale = (config.resize / min(image.size)) if config.resize else max(width / image.width, height / image.height)
    if scale != 1:
        # Rounded up, so that the crop always fits inside.
        resized = max(width, ceil(image.width * scale - 1e-6)), max(height, ceil(image.height * scale - 1e-6))
        image = image.resize(resized, Image.Resampling.BILINEAR)
    if image.size != (width, height):
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, config.channels)


def _without_far_ends(image: Image.Image, config: InputConfig) -> Image.Image:
    """Shorten an extreme strip around its center: 1 x 40,000,000 pixels would be resized to 28 x 1.1 G."""
    keep = min(image.size) * MAX_ASPECT * ceil(max(config.size) / min(config.size))
    left, top = max(0, (image.width - keep) // 2), max(0, (image.height - keep) // 2)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image
