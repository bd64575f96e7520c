"""Both parts of a network by OpenVINO, one after the other: what lies between them stays in OpenVINO's memory."""

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.compilers import openvino_error
from service.openvino_part import bytes_of, executable, fill, fits_fixed_sizes, fixed_size, traced

if TYPE_CHECKING:
    import openvino

Array = NDArray[Any]


class OpenVinoChain:
    """``back(*front(*inputs), constant)``, for batches of any size.

    Sizes that are common have executables of their own where the front is small, as in ``OpenVinoPart``.

    Args:
        front: in eval mode; of all inputs the first dimension is the batch, of its values it is a multiple of that.
        back: in eval mode; its value has the batch's size. It is computed in float32, on one thread: to share so little
            out takes longer than to do it.
        dtype: of the front. examples: its inputs for two images. constant: the back's last input, which seldom changes.
        threads: of the front. sizes: of batches to be quickest with, ascending.

    Raises:
        EngineError: OpenVINO cannot compile this.
    """

    def __init__(
        self,
        front: nn.Module,
        back: nn.Module,
        dtype: torch.dtype,
        examples: Sequence[Tensor],
        constant: Tensor,
        threads: int,
        sizes: Sequence[int],
    ) -> None:
        with torch.no_grad():
            between = front(*examples)
        shapes = [list(e.shape[1:]) for e in examples]
        types = [e.numpy().dtype for e in examples]

        def of_size(size: int) -> tuple["openvino.InferRequest", "openvino.InferRequest"]:
            first = executable(front_model, [[size, *shape] for shape in shapes], dtype, threads)
            crossing = [value.partial_shape for value in first.model_outputs]
            return first, executable(back_model, [*crossing, constant.shape], torch.float32, 1)

        with openvino_error(dtype):
            front_model, back_model = traced(front, examples), traced(back, [*between, constant])
            self._front, self._back = of_size(-1)
            self._fixed: dict[int, _Fixed] = {}
            for size in sizes if fits_fixed_sizes(front, dtype, sizes) else ():
                memory = [np.zeros((size, *shape), t) for shape, t in zip(shapes, types, strict=True)]
                self._fixed[size] = _Fixed(*of_size(size), memory, np.zeros(constant.shape, np.float32))

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, tuple[float, float]]:
        """The back's value, float32, and the seconds that front and back took."""
        size = fixed_size(len(inputs[0]), list(self._fixed))
        if size is not None:
            return self._fixed[size](inputs, constant)
        times = [perf_counter()]
        values = self._front.infer(list(inputs), share_inputs=True)
        times.append(perf_counter())
        value = self._back.infer([*(values[i] for i in range(len(values))), constant], share_inputs=True)[0]
        times.append(perf_counter())
        return value, _differences(times)


class _Fixed:
    """For one batch size, with its inputs' and outputs' memory: to hand arrays over takes 70 us.

    Bytes are copied, since a copy of numpy's or torch's gives Python's lock away, and then waits for it.
    """

    def __init__(
        self, front: "openvino.InferRequest", back: "openvino.InferRequest", inputs: Sequence[Array], constant: Array
    ) -> None:
        import openvino

        for i, array in enumerate(inputs):
            front.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
        num_values = len(front.model_outputs)
        for i in range(num_values):
            back.set_input_tensor(i, front.get_output_tensor(i))
        back.set_input_tensor(num_values, openvino.Tensor(constant, shared_memory=True))
        self._front, self._back = front, back
        self._inputs, self._constant_bytes = [bytes_of(array) for array in inputs], bytes_of(constant)
        self._constant: Array | None = None
        rows = back.get_output_tensor(0).data
        self._rows, self._shape, self._row_bytes = bytes_of(rows), rows.shape[1:], rows[0].nbytes

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, tuple[float, float]]:
        times = [perf_counter()]
        count = len(inputs[0])
        fill(self._inputs, inputs)
        if constant is not self._constant:
            self._constant_bytes[:], self._constant = bytes_of(constant), constant
        # Python's lock is free while it computes: the event loop answers meanwhile.
        self._front.infer(share_outputs=True)
        times.append(perf_counter())
        self._back.infer(share_outputs=True)
        rows = np.frombuffer(bytearray(self._rows[: count * self._row_bytes]), np.float32)
        times.append(perf_counter())
        return rows.reshape(count, *self._shape), _differences(times)


def _differences(times: Sequence[float]) -> tuple[float, float]:
    front, back = (after - before for before, after in pairwise(times))
    return front, back
