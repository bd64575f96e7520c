"""From a decoded picture to the pixels that a network takes."""

from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from defense.model_config import InputConfig

MAX_ASPECT = 16


def to_pixels(image: Image.Image, config: InputConfig) -> NDArray[np.uint8]:
    """Resize the shorter side, crop the center, and give the channels the network takes.

    Args:
        image: in mode L or RGB.

    Returns:
        [H, W, channels] uint8.
    """
    height, width = config.size
    image = _without_far_ends(image, config).convert("L" if config.channels == 1 else "RGB")
    scale = (config.resize / min(image.size)) if config.resize else max(width / image.width, height / image.height)
    if scale != 1:
        # Rounded up, so that the crop always fits inside.
        resized = max(width, ceil(image.width * scale - 1e-6)), max(height, ceil(image.height * scale - 1e-6))
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels.reshape(height, width, config.channels)


def _without_far_ends(image: Image.Image, config: InputConfig) -> Image.Image:
    """Shorten an extreme strip around its center: 1 x 40,000,000 pixels would be resized to 28 x 1.1 G."""
    keep = min(image.size) * MAX_ASPECT * ceil(max(config.size) / min(config.size))
    left, top = max(0, (image.width - keep) // 2), max(0, (image.height - keep) // 2)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image
