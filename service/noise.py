"""Noise for batches of images."""

import math
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

# Of draws for images that come alone, made at a time, and their values at most: each call of torch takes 30 us once
# other code is in the caches, each 10,000 values as much.
LONE_DRAWS, LONE_VALUES = 16, 1 << 16


class StandardNormal:
    """Standard normal values that nobody can predict: noise that an attacker knew would be no noise."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._generator = device, torch.Generator(device).manual_seed(secrets.randbits(63))
        self._lone: list[Tensor] = []  # each is used once

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Values [B, ...] of that shape."""
        if shape[0] > 1:
            return self._drawn(shape)
        if not self._lone or self._lone[-1].shape != tuple(shape):
            number = max(1, min(LONE_DRAWS, LONE_VALUES // math.prod(shape)))
            self._lone = list(self._drawn((number, *shape)))
        return self._lone.pop()

    def _drawn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device)
