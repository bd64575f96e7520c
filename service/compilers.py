"""What runs a traced part of a network: PyTorch as it is, torch.compile's inductor, or OpenVINO.

Measured on the CPUs that ``benchmarks/results`` names: OpenVINO is the fastest of them at nearly every batch size, most
of all at one image, and takes batches of any size; inductor compiles each size anew, so batches are padded to powers of
two.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defense import DefenseError
from service.openvino_part import CAPABILITIES, OpenVinoPart

logger = logging.getLogger(__name__)

Compiler = Literal["none", "inductor", "openvino"]
Values = tuple[Tensor, ...]
Part = Callable[..., Values]

CPU_ROWS = 64  # beyond, eager PyTorch's convolutions get slower by the image: 128 took as long as 170
_SHAPES = 32  # that torch.compile may specialize on before it gives up: powers of two of trunk and tail


class EngineError(DefenseError):
    """The device, precision or compiler asked for cannot run this model."""


def choose_compiler(name: str, device: torch.device) -> Compiler:
    """The compiler of that name; ``"auto"``: openvino on a CPU where it is installed, else none.

    Raises:
        EngineError: it cannot run on this device, or is not installed.
    """
    installed = find_spec("openvino") is not None
    if name == "auto":
        return "openvino" if installed and device.type == "cpu" else "none"
    if name == "openvino" and not installed:
        raise EngineError(
            "IGD_COMPILE=openvino needs a package: pip install 'ig-defense[openvino]'; or set IGD_COMPILE=none"
        )
    if name == "openvino" and device.type != "cpu":
        raise EngineError(f"IGD_COMPILE=openvino runs on the CPU, not on {device}; set IGD_COMPILE=inductor or none")
    return name  # type: ignore[return-value] # the settings allow no other


def compiled(
    part: nn.Module,
    compiler: Compiler,
    dtype: torch.dtype,
    examples: Sequence[Tensor],
    threads: int | None = None,
    sizes: Sequence[int] = (),
) -> Part:
    """A function with the values of ``part``, as a tuple of float32 tensors.

    Args:
        part: in eval mode, on its device; its first dimension is the batch. It may be changed.
        dtype: that it computes in. examples: float32 inputs for two images. threads: of OpenVINO, by default torch's.
        sizes: of batches that OpenVINO is to be quickest with, ascending.

    Raises:
        EngineError: the compiler cannot do this part, or not in this dtype.
    """
    if compiler == "openvino":
        return _openvino(part, dtype, examples, threads or torch.get_num_threads(), sizes)
    lowered = part.to(dtype).to(memory_format=torch.channels_last)
    if compiler == "inductor":
        lowered = _inductor(lowered)

    def run(*values: Tensor) -> Values:
        if compiler == "none" and len(values[0]) > CPU_ROWS and values[0].device.type == "cpu":
            parts = [run(*rows) for rows in zip(*(value.split(CPU_ROWS) for value in values), strict=True)]
            return tuple(torch.cat(column) for column in zip(*parts, strict=True))
        outputs = lowered(*(_channels_last(value.to(dtype)) for value in values))
        return tuple(value.float() for value in _as_tuple(outputs))

    return run


def _as_tuple(outputs: Tensor | Values) -> Values:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def _inductor(part: nn.Module) -> Any:
    # Past the limit dynamo falls back to uncompiled code without an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    # Freezing folds the weights into the layout that the kernels take, once instead of in every call.
    return torch.compile(part, dynamic=False, options={"freezing": True})


def _openvino(
    part: nn.Module, dtype: torch.dtype, examples: Sequence[Tensor], threads: int, sizes: Sequence[int]
) -> Part:
    with openvino_error(dtype):
        return OpenVinoPart(part, dtype, examples, threads, sizes)


def check_openvino(dtype: torch.dtype) -> None:
    """Refuse a dtype that OpenVINO, which is installed, does not compute in here.

    Raises:
        EngineError: it does not.
    """
    import openvino

    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if CAPABILITIES[dtype] not in capabilities:
        raise EngineError(
            f"OpenVINO does not compute in {dtype} on this CPU ({', '.join(capabilities)}); "
            "set IGD_DTYPE=auto, or IGD_COMPILE=none"
        )


@contextmanager
def openvino_error(dtype: torch.dtype) -> Iterator[None]:
    """Say in our words that OpenVINO cannot compile something in this dtype.

    Raises:
        EngineError: it cannot.
    """
    check_openvino(dtype)
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot compile this model ({error}); set IGD_COMPILE=none") from error
