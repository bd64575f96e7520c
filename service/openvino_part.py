"""A traced part of a network by OpenVINO: one executable for batches of any size, and one for each size that is common.

The executable for any size sets all its kernels up anew when a batch has another size than the one before: 0.4 ms for
a ResNet-18 of width 16, which takes 0.2 to 1.4 ms for 1 to 16 images of 28 x 28 pixels and their noisy copies. One for
a fixed size does not, but has a copy of the weights and memory for its activations; hence only small networks get them,
for sizes that batches are padded to.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    import openvino

TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
CAPABILITIES = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}
FIXED_SIZES = (*range(1, 17), *range(20, 33, 4))  # what is beyond takes so long that 0.4 ms do not matter
FIXED_WEIGHTS_BYTES = 64 << 20  # of all copies


def fixed_sizes(largest: int) -> list[int]:
    """Those of ``FIXED_SIZES`` up to the largest batch, and it, since a server under load sees little else."""
    return sorted({size for size in FIXED_SIZES if size <= largest} | {largest})


def padded_size(count: int, sizes: Sequence[int]) -> int:
    """The smallest of ``sizes`` that holds ``count``; ``count`` itself where none does."""
    return next((size for size in sizes if size >= count), count)


def fits_fixed_sizes(part: nn.Module, dtype: torch.dtype, sizes: Sequence[int]) -> bool:
    """Whether there is memory for an executable of every size."""
    weights_bytes = dtype.itemsize * sum(parameter.numel() for parameter in part.parameters())
    return weights_bytes * len(sizes) <= FIXED_WEIGHTS_BYTES


def executable(
    model: "openvino.Model",
    shapes: "Sequence[Sequence[int] | openvino.PartialShape]",
    dtype: torch.dtype,
    threads: int,
    streams: int = 1,
) -> "openvino.CompiledModel":
    """The model for inputs of these shapes; -1 is any. So many requests at a time are computed beside each other."""
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": TYPES[dtype],
        "ENABLE_CPU_PINNING": False,  # the event loop and the decoders share these cores
    }
    sized = model.clone()
    sized.reshape({i: openvino.PartialShape(list(shape)) for i, shape in enumerate(shapes)})
    return openvino.Core().compile_model(sized, "CPU", options)


def fixed_size(count: int, sizes: Sequence[int]) -> int | None:
    """Which of these sizes a batch is padded to, if any.

    The largest is for itself: to pad a batch of half its size would take longer than any kernel's set up.
    """
    size = padded_size(count, sizes)
    return size if size in sizes and (size == count or size <= FIXED_SIZES[-1]) else None


class OpenVinoPart:
    """The values of ``part``, as a tuple of float32 tensors.

    Args:
        part: in eval mode; its first dimension is the batch. It is changed.
        dtype: that it computes in. examples: float32 inputs for two images. threads: of OpenVINO.
        sizes: ascending, that batches are padded to if there is memory for it.

    Raises:
        RuntimeError: OpenVINO's, if it cannot compile this.
    """

    def __init__(
        self, part: nn.Module, dtype: torch.dtype, examples: Sequence[Tensor], threads: int, sizes: Sequence[int] = ()
    ) -> None:
        model = traced(part, examples)
        shapes = [value.shape[1:] for value in examples]

        def of_size(size: int) -> "openvino.InferRequest":
            return executable(model, [[size, *shape] for shape in shapes], dtype, threads).create_infer_request()

        self._any_size = of_size(-1)
        small = fits_fixed_sizes(part, dtype, sizes)
        self._fixed = {size: _Fixed(of_size(size), size, shapes) for size in sizes if small}

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        size = fixed_size(len(values[0]), list(self._fixed))
        if size is not None:
            return self._fixed[size](values)
        arrays = [value.contiguous().numpy() for value in values]
        outputs = self._any_size.infer(arrays, share_inputs=True)
        return tuple(torch.from_numpy(outputs[i]) for i in range(len(outputs)))


class _Fixed:
    """An executable for one batch size, with its inputs' and outputs' memory: to hand arrays over takes 70 us.

    Bytes are copied, since a copy of numpy's or torch's gives Python's lock away, and then waits for it.
    """

    def __init__(self, request: "openvino.InferRequest", size: int, shapes: Sequence[Sequence[int]]) -> None:
        self._request = request
        arrays = [np.zeros((size, *shape), np.float32) for shape in shapes]
        set_inputs(request, map(tensor_on, arrays))
        self._inputs = [bytes_of(array) for array in arrays]
        outputs = [request.get_output_tensor(i).data for i in range(len(request.model_outputs))]
        self._outputs = [(bytes_of(output), output.shape[1:], output[0].nbytes) for output in outputs]

    def __call__(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        count = len(values[0])
        fill(self._inputs, [(value if value.is_contiguous() else value.contiguous()).numpy() for value in values])
        # Python's lock is free while it computes: the event loop answers meanwhile.
        self._request.infer(share_outputs=True)
        copies = [(bytearray(memory[: count * each]), shape) for memory, shape, each in self._outputs]
        return tuple(torch.from_numpy(np.frombuffer(c, np.float32).reshape(count, *shape)) for c, shape in copies)


def tensor_on(array: NDArray[Any]) -> "openvino.Tensor":
    """On the array's memory, which the caller keeps."""
    import openvino

    return openvino.Tensor(array, shared_memory=True)


def set_inputs(request: "openvino.InferRequest", tensors: "Iterable[openvino.Tensor]") -> None:
    """Where the request reads its inputs from now on."""
    for i, tensor in enumerate(tensors):
        request.set_input_tensor(i, tensor)


def fill(memories: Sequence[memoryview], arrays: Sequence[NDArray[Any]]) -> None:
    """Copy a batch to where an executable reads it; what the last one left behind it is as good as any padding."""
    for memory, array in zip(memories, arrays, strict=True):
        given = bytes_of(array)
        memory[: len(given)] = given


def bytes_of(array: NDArray[Any]) -> memoryview:
    """Of an array that is contiguous."""
    return array.data.cast("B")


def traced(part: nn.Module, examples: Sequence[Tensor]) -> "openvino.Model":
    """The part as OpenVINO's model, for batches of any size."""
    # Not openvino.convert_model, which reports its use to a server.
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's, that tracing is to be replaced
        decoder = TorchScriptPythonDecoder(part.float(), example_input=tuple(examples))
        return frontend.convert(frontend.load(decoder))
