"""What surrounds the trunk in a prediction, from pixels to what the trunk takes and from its values to probabilities.

It is some thirty small operations, each of which gives Python's lock away and then waits for it behind the event loop;
traced, they are two calls. Measured at 32 clients, that was a third of a small model's batch.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from defense import DefendedClassifier


class Prologue(nn.Module):
    """Pixels [B, H, W, channels] uint8 -> the images [0, 1] and their noisy copies [(1 + n) * B, channels, H, W]."""

    def __init__(self, defended: DefendedClassifier) -> None:
        super().__init__()
        self.defended = defended

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.defended.with_noisy_copies(to_images(pixels), noise)


# What an image's rows are, in this order.
ROWS = ("probabilities", "undefended_probabilities", "class_weights", "logits", "undefended_logits")


class Epilogue(nn.Module):
    """What crosses the split -> [B, 5, C]: see ``ROWS``."""

    def __init__(self, defended: DefendedClassifier) -> None:
        super().__init__()
        self.defended = defended

    def forward(self, *values: Tensor) -> Tensor:
        prediction = self.defended.judge(*values)
        logits, undefended = prediction.logits, prediction.undefended_logits
        rows = [logits.softmax(1), undefended.softmax(1), prediction.class_weights, logits, undefended]
        return torch.stack(rows, dim=1)


def to_images(pixels: Tensor) -> Tensor:
    """Images [B, channels, H, W] in [0, 1] of pixels [B, H, W, channels] uint8."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)


def traced(module: nn.Module, *examples: Tensor) -> Callable[..., Tensor]:
    """The module as one call, for batches of any size."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch would rather compile, which takes seconds a shape and a C++ compiler
        return torch.jit.freeze(torch.jit.trace(module.eval(), examples, check_trace=False))  # type: ignore[no-any-return]
