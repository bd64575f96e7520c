"""The engine: a split classifier made fast for its device, and the check that its answers stay the same."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from defense import DefendedClassifier, SplitClassifier
from service.compilers import Compiler, EngineError, compiled

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARN_BELOW, FALL_BACK_BELOW = 0.99, 0.95
STAGES = ("trunk", "tail")


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``"auto"``: cuda if there is one, else cpu.

    Raises:
        EngineError: no such device here.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's, where it was built without CUDA
        reason = str(error).partition("\n")[0]
        raise EngineError(f"IGD_DEVICE={name} cannot be used ({reason}); set it to auto or cpu") from error
    return device


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
    """A SplitClassifier with batch normalization folded into convolutions, channels last, compiled, in any precision.

    Takes and gives float32, so that noise, pseudo-label and mask are computed in it. So is an affine tail: it is
    cheap, and the pseudo-label's temperature of 0.01 multiplies its rounding errors by 100.

    Args:
        split: the classifier; it is copied. dtype: of the trunk, and of a tail that is not affine.
        compiler: of both. images: two, [2, channels, H, W], to compile with. threads: of OpenVINO, by default torch's.
        sizes: of the trunk's batches that OpenVINO is to be quickest with, ascending.

    Raises:
        EngineError: the compiler cannot do this model.
    """

    def __init__(
        self,
        split: SplitClassifier,
        dtype: torch.dtype,
        compiler: Compiler = "none",
        images: Tensor | None = None,
        *,
        threads: int | None = None,
        sizes: Sequence[int] = (),
    ) -> None:
        nn.Module.__init__(self)  # not SplitClassifier's, which would trace the model again
        self.layer, self.layers, self.model_digest = split.layer, split.layers, split.model_digest
        self.num_neurons, self.num_classes = split.num_neurons, split.num_classes
        self.has_bypass, self.tail_is_affine = split.has_bypass, split.tail_is_affine
        self.dtype, self.compiler = dtype, compiler
        self.clock = StageClock(next(split.parameters(), torch.empty(0)).device)
        self._trunk, self._tail = _folded(split._trunk), _folded(split._tail)
        with torch.no_grad():
            examples = () if images is None else split.cut(images)
        self._run_trunk = compiled(self._trunk, compiler, dtype, [] if images is None else [images], threads, sizes)
        if split.tail_is_affine:
            self._run_tail = compiled(self._tail, "none", torch.float32, examples)
        else:
            self._run_tail = compiled(self._tail, compiler, dtype, examples, threads)

    @property
    def name(self) -> str:
        """Of precision and compiler, for the log."""
        return str(self.dtype) + (f" by {self.compiler}" if self.compiler != "none" else "")

    def cut(self, images: Tensor) -> tuple[Tensor, ...]:
        """The activations and what bypasses the layer, as float32."""
        with self.clock.stage("trunk"):
            return self._run_trunk(images)

    def tail(self, activations: Tensor, *bypass: Tensor) -> Tensor:
        """Logits [B, C], as float32."""
        return self._run_tail(activations, *bypass)[0]

    def stage_seconds(self) -> dict[str, float]:
        """What trunk and tail have taken since this was last asked; to be asked once the results are on the host."""
        return self.clock.read()


def _folded(part: fx.GraphModule) -> fx.GraphModule:
    return cast(fx.GraphModule, fuse(copy.deepcopy(part))).eval()


class StageClock:
    """Where a batch's time goes: on CUDA told by events, so that nothing has to wait for the device to be timed."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block under ``name``."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last reading."""
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        return seconds


@torch.inference_mode()
def agreement(
    fast: DefendedClassifier, exact: DefendedClassifier, images: Tensor, noise: Tensor | None, batch_size: int = 64
) -> float:
    """The share of images [B, channels, H, W] whose defended prediction is the same, given the same noise."""
    parts = _parts(images, noise, batch_size)
    same = [fast(batch, v).argmax(1) == exact(batch, v).argmax(1) for batch, v in parts]
    return float(torch.cat(same).float().mean())


def _parts(images: Tensor, noise: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for i in range(0, len(images), size):
        yield images[i : i + size], None if noise is None else noise[:, i : i + size]
