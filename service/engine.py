"""The engine: a split classifier made fast for its device, and the check that its answers stay the same."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from defense import SplitClassifier
from service.compilers import Compiler, EngineError, Part, compiled

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARN_BELOW, FALL_BACK_BELOW = 0.99, 0.95
STAGES = ("trunk", "tail")
IN_INT8 = " with an int8 first pass"  # in the name of an engine


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

    Attributes:
        int8_batch: the largest batch whose first pass is in int8, in what is built of this (``passes.openvino_chain``).

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
        self.int8_batch: int | None = None
        self.clock = StageClock(next(split.parameters(), torch.empty(0)).device)
        self._trunk, self._tail = _folded(split._trunk), _folded(split._tail)
        self._images, self._threads, self._sizes = images, threads, sizes
        with torch.no_grad():
            examples = () if images is None else split.cut(images)
        if split.tail_is_affine:
            self._run_tail = compiled(self._tail, "none", torch.float32, examples)
        else:
            self._run_tail = compiled(self._tail, compiler, dtype, examples, threads)

    @property
    def name(self) -> str:
        """Of precision and compiler, for the log."""
        first_pass = IN_INT8 if self.int8_batch else ""
        return str(self.dtype) + first_pass + (f" by {self.compiler}" if self.compiler != "none" else "")

    @property
    def folded_trunk(self) -> nn.Module:
        """The trunk with batch normalization folded, to be compiled with what comes before it."""
        return self._trunk

    @property
    def folded_tail(self) -> nn.Module:
        """The tail, to be compiled with what comes after it."""
        return self._tail

    @cached_property
    def _run_trunk(self) -> Part:
        # Where first needed: by OpenVINO the service runs another executable, which begins at the pixels.
        examples = [] if self._images is None else [self._images]
        return compiled(self._trunk, self.compiler, self.dtype, examples, self._threads, self._sizes)

    def cut(self, images: Tensor) -> tuple[Tensor, ...]:
        """The activations and what bypasses the layer, as float32."""
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

    def add(self, seconds: Sequence[float]) -> None:
        """Count seconds that something else measured, one for each of ``STAGES``."""
        for name, more in zip(STAGES, seconds, strict=True):
            self._seconds[name] += more

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last reading."""
        for name, begin, end in self._events:
            end.synchronize()  # recorded behind what the host has waited for, and nothing is told before it is over
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        return seconds
