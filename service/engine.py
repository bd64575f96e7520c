"""The engine: a split classifier made fast for its device, and the check that its answers stay the same."""

import copy
import logging
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from defense import DefendedClassifier, SplitClassifier

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARN_BELOW, FALL_BACK_BELOW = 0.99, 0.95


def resolve_device(name: str) -> str:
    """The device of that name; ``"auto"``: cuda if there is one, else cpu."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; ``"auto"``: bfloat16 where the hardware multiplies it, else float32.

    That is AMX or AVX512-BF16 on a CPU, compute capability 8.0 on CUDA.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    # Where torch is too old to tell, float32 is always right.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else torch.float32


class EngineSplit(SplitClassifier):
    """A SplitClassifier with batch normalization folded into convolutions, channels last, in a lower precision.

    Takes and gives float32, so that noise, pseudo-label and mask are computed in it. So is an affine tail: it is
    cheap, and the pseudo-label's temperature of 0.01 multiplies its rounding errors by 100.

    Args:
        split: the classifier; it is copied. dtype: of the trunk, and of a tail that is not affine.
    """

    def __init__(self, split: SplitClassifier, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not SplitClassifier's, which would trace the model again
        self.layer, self.layers, self.model_digest = split.layer, split.layers, split.model_digest
        self.num_neurons, self.num_classes = split.num_neurons, split.num_classes
        self.has_bypass, self.tail_is_affine = split.has_bypass, split.tail_is_affine
        self.dtype, self._tail_dtype = dtype, torch.float32 if split.tail_is_affine else dtype
        self._trunk = _optimized(split._trunk, dtype)
        self._tail = _optimized(split._tail, self._tail_dtype)

    def cut(self, images: Tensor) -> tuple[Tensor, ...]:
        """The activations and what bypasses the layer, as float32."""
        images = images.to(self.dtype, memory_format=torch.channels_last)
        return tuple(value.float() for value in self._trunk(images))

    def tail(self, activations: Tensor, *bypass: Tensor) -> Tensor:
        """Logits [B, C], as float32."""
        logits: Tensor = self._tail(*(value.to(self._tail_dtype) for value in (activations, *bypass)))
        return logits.float()


def _optimized(part: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    folded = cast(fx.GraphModule, fuse(copy.deepcopy(part)))
    return folded.to(dtype).to(memory_format=torch.channels_last).eval()


@torch.inference_mode()
def agreement(fast: DefendedClassifier, exact: DefendedClassifier, images: Tensor, noise: Tensor | None) -> float:
    """The share of images [B, channels, H, W] whose defended prediction is the same, given the same noise."""
    same = fast(images, noise).argmax(1) == exact(images, noise).argmax(1)
    return float(same.float().mean())
