"""Both passes as one call, from an image's pixels and its noise to its probabilities."""

import copy
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defense import DefendedClassifier
from service.engine import EngineSplit, StageClock
from service.openvino_chain import Int8FirstPass, OpenVinoChain
from service.openvino_ways import Array

# Pixels [B, H, W, channels] uint8 and noise [B, n, channels, H, W], None without any -> [B, 5, C]: see ROWS.
Passes = Callable[[NDArray[np.uint8], Tensor | None], NDArray[np.float32]]

# What an image's rows are, in this order.
ROWS = ("probabilities", "undefended_probabilities", "class_weights", "logits", "undefended_logits")


class PyTorchPasses:
    """Both passes by PyTorch, but for what the classifier's split has compiled.

    Args:
        clock: that times the stages.
    """

    def __init__(self, defended: DefendedClassifier, clock: StageClock) -> None:
        self._defended, self._clock = defended, clock

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8], noise: Tensor | None) -> NDArray[np.float32]:
        """The rows."""
        with self._clock.stage("trunk"):
            copies = _with_noisy_copies(self._defended, _to_device(pixels, self._defended.masks.device), noise)
            values = self._defended.split.cut(copies)
        with self._clock.stage("tail"):
            rows = _rows(self._defended, values)
            # On a CPU even .cpu() would let go of Python's lock.
            on_host: NDArray[np.float32] = (rows.cpu() if rows.is_cuda else rows).numpy()
        return on_host


class OpenVinoPasses:
    """Both passes by OpenVINO, from the pixels on; the tail must be affine, and is computed in float32.

    In PyTorch what surrounds the trunk is some thirty small operations, each of which gives Python's lock away and then
    waits for it behind the event loop, and finds the processor's caches full of other things: 0.2 ms for a lone image
    whose trunk takes 0.25.

    Args:
        chain: see ``openvino_chain``. clock: that times the stages.
    """

    def __init__(self, defended: DefendedClassifier, chain: OpenVinoChain, clock: StageClock) -> None:
        self._masks: NDArray[np.float32] = defended.masks.numpy()
        self._chain, self._clock = chain, clock

    def __call__(self, pixels: NDArray[np.uint8], noise: Tensor | None) -> NDArray[np.float32]:
        """The rows."""
        rows, seconds = self._chain((pixels,) if noise is None else (pixels, noise.numpy()), self._masks)
        self._clock.add(seconds)
        return rows


def openvino_chain(
    engine: EngineSplit,
    defended: DefendedClassifier,
    pixels: NDArray[np.uint8],
    noise: Tensor | None,
    threads: int,
    sizes: list[int],
    calibration: Iterable[Sequence[Array]] | None = None,
) -> OpenVinoChain:
    """The executables of both passes, for all importances at this layer.

    Args:
        defended: one of them, by the engine. pixels, noise: of two images. sizes: of batches to be quickest with.
        calibration: batches of pixels and noise of images like those to come, for a first pass in int8; None for none.

    Raises:
        EngineError: OpenVINO cannot compile this.
    """
    examples = [value for value in (torch.from_numpy(pixels), noise) if value is not None]
    front, back = _Front(engine, defended).eval(), _Back(engine, defended).eval()
    row = None if noise is None else _NoisyFront(engine, defended).eval()
    int8 = Int8FirstPass(_ApartFront(engine, defended).eval(), calibration) if calibration is not None else None
    return OpenVinoChain(front, back, engine.dtype, examples, defended.masks, threads, sizes, row, int8)


class _Front(nn.Module):
    """Pixels and noise -> what crosses the split, [(1 + n) * B, ...]."""

    def __init__(self, engine: EngineSplit, defended: DefendedClassifier) -> None:
        super().__init__()
        self.trunk, self._defended = engine.folded_trunk, (defended,)  # in a tuple: it has more weights than this needs

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        values: tuple[Tensor, ...] = self.trunk(_with_noisy_copies(self._defended[0], pixels, noise))
        return values


class _NoisyFront(_Front):
    """Pixels and noise -> what crosses the split for the noisy copies alone, [n * B, ...]."""

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override] # never without
        copies = self._defended[0].noisy_copies(to_images(pixels), noise.transpose(0, 1))
        values: tuple[Tensor, ...] = self.trunk(copies)
        return values


class _ApartFront(_Front):
    """Pixels and noise -> what crosses the split, by a trunk for the images and another for their noisy copies."""

    def __init__(self, engine: EngineSplit, defended: DefendedClassifier) -> None:
        super().__init__(engine, defended)
        # A copy, in a tuple: convolutions in int8 are not to be replaced by what is quicker in other precisions. Being
        # no submodule's, its weights are constants to the tracer, which takes none that require gradients.
        self._noisy_trunk = (copy.deepcopy(self.trunk).requires_grad_(False),)

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override] # never without
        images = to_images(pixels)
        noisy = self._noisy_trunk[0](self._defended[0].noisy_copies(images, noise.transpose(0, 1)))
        return tuple(torch.cat(values) for values in zip(self.trunk(images), noisy, strict=True))


class _Back(nn.Module):
    """What crosses the split and, last, the masks [C, N] -> the rows [B, 5, C]."""

    def __init__(self, engine: EngineSplit, defended: DefendedClassifier) -> None:
        super().__init__()
        self.tail, self._defended = engine.folded_tail, (defended,)

    def forward(self, *values: Tensor) -> Tensor:
        *crossing, masks = values
        return _rows(self._defended[0], tuple(crossing), masks)


def _to_device(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """The pixels as a tensor there."""
    tensor = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())  # torch warns of what is read only
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_images(pixels: Tensor) -> Tensor:
    """Images [B, channels, H, W] in [0, 1] of pixels [B, H, W, channels] uint8."""
    return pixels.permute(0, 3, 1, 2).float().div(255)


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """The nearest pixels [B, H, W, channels] uint8 of images [B, channels, H, W] in [0, 1], on the host."""
    pixels: NDArray[np.uint8] = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


def _with_noisy_copies(defended: DefendedClassifier, pixels: Tensor, noise: Tensor | None) -> Tensor:
    return defended.with_noisy_copies(to_images(pixels), None if noise is None else noise.transpose(0, 1))


def _rows(defended: DefendedClassifier, values: tuple[Tensor, ...], masks: Tensor | None = None) -> Tensor:
    prediction = defended.judge(*values, masks=masks)
    logits, undefended = prediction.logits, prediction.undefended_logits
    rows = [logits.softmax(1), undefended.softmax(1), prediction.class_weights, logits, undefended]
    return torch.stack(rows, dim=1)


def agreement(
    fast: Passes, exact: Passes, pixels: NDArray[np.uint8], noise: Tensor | None, batch_sizes: Collection[int] = (64,)
) -> float:
    """The share of images [B, H, W, channels] whose defended prediction is the same, given the same noise.

    Args:
        batch_sizes: that ``fast`` predicts in, each of which may have an executable of its own; the least share counts.
    """

    def predictions(passes: Passes, size: int) -> NDArray[np.int64]:
        batches = [slice(i, i + size) for i in range(0, len(pixels), size)]
        rows = [passes(pixels[batch], None if noise is None else noise[batch]) for batch in batches]
        return np.concatenate([row[:, 0].argmax(1) for row in rows])

    expected = predictions(exact, max(batch_sizes))
    return min(float((predictions(fast, size) == expected).mean()) for size in batch_sizes)
