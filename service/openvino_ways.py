"""The ways in which both parts of a network are computed by OpenVINO, one after the other: whole, in parts, row by row.

What lies between the parts is not copied.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from math import ceil
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from service.openvino_part import bytes_of, fill, set_inputs, tensor_on

if TYPE_CHECKING:
    import openvino

    Requests = tuple[openvino.InferRequest, openvino.InferRequest]  # to the front, and to the back

Array = NDArray[Any]
Seconds = tuple[float, float]
# Inputs of the front and the back's constant -> the back's value, and the seconds that front and back took.
Way = Callable[[Sequence[Array], Array], tuple[Array, Seconds]]

MIN_BATCH_ROWS, MAX_PART_ROWS = 16, 16  # of the front, in a batch that is divided, and in a part of it


def _outputs(front: "openvino.InferRequest") -> list[Array]:
    return [front.get_output_tensor(i).data for i in range(len(front.model_outputs))]


def _back_value(values: Sequence[Array], back: "openvino.InferRequest", constant: Array) -> Array:
    value: Array = back.infer([*values, constant], share_inputs=True)[0]
    return value


class Whole:
    """All at once."""

    def __init__(self, front: "openvino.InferRequest", back: "openvino.InferRequest") -> None:
        self._front, self._back = front, back

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, Seconds]:
        began_s = perf_counter()
        self._front.infer(list(inputs), share_inputs=True, share_outputs=True)
        front_done_s = perf_counter()
        value = _back_value(_outputs(self._front), self._back, constant)
        return value, (front_done_s - began_s, perf_counter() - front_done_s)


class Parts:
    """In parts, by streams that take the next one as soon as they are done with one.

    Threads that share a batch wait for each other after every layer, and longer where the event loop keeps one of them
    from its processor. To small networks, of which a batch takes a few milliseconds, that is less than what more calls
    cost, each of which gives Python's lock away.

    Args:
        requests: for any size; two for each stream, which then has one more than it has in hand.
        rows: of the front for an image.
    """

    def __init__(self, requests: "list[Requests]", streams: int, rows: int) -> None:
        self._requests, self._streams = requests, streams
        self.smallest_batch, self._largest_part = max(streams, MIN_BATCH_ROWS // rows), max(1, MAX_PART_ROWS // rows)

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, Seconds]:
        began_s, back_s = perf_counter(), 0.0
        values: list[Array] = []
        under_way: deque[Requests] = deque()

        def finish_oldest() -> None:
            nonlocal back_s
            under_way[0][0].wait()
            front, back = under_way.popleft()
            front_done_s = perf_counter()
            values.append(_back_value(_outputs(front), back, constant))
            back_s += perf_counter() - front_done_s

        ends = accumulate(part_sizes(len(inputs[0]), self._streams, self._largest_part), initial=0)
        try:
            for i, (begin, end) in enumerate(pairwise(ends)):
                if len(under_way) == len(self._requests):
                    finish_oldest()
                under_way.append(self._requests[i % len(self._requests)])
                under_way[-1][0].start_async([array[begin:end] for array in inputs], share_inputs=True)
            while under_way:
                finish_oldest()
        finally:
            _wait_for(front for front, _ in under_way)  # where one failed, the others may still be at work
        return np.concatenate(values), (perf_counter() - began_s - back_s, back_s)


def part_sizes(count: int, streams: int, largest: int) -> list[int]:
    """The sizes of the parts of a batch: as many for each stream, and as equal as can be."""
    number = min(count, streams * ceil(count / (streams * largest)))
    return [count // number + (i < count % number) for i in range(number)]


class Fixed:
    """For one batch size, with its inputs' and outputs' memory: to hand arrays over takes 70 us.

    Bytes are copied, since a copy of numpy's or torch's gives Python's lock away, and then waits for it.

    Args:
        front: of ``inputs``, which are filled by calls, like ``constant``.
    """

    def __init__(
        self,
        front: "WholeFront | FrontByRow",
        back: "openvino.InferRequest",
        inputs: Sequence[Array],
        constant: Array,
    ) -> None:
        set_inputs(back, [*front.values, tensor_on(constant)])
        self._front, self._back = front, back
        self._inputs, self._constant_bytes = [bytes_of(array) for array in inputs], bytes_of(constant)
        self._constant: Array | None = None
        rows = back.get_output_tensor(0).data
        self._rows, self._shape, self._row_bytes = bytes_of(rows), rows.shape[1:], rows[0].nbytes

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, Seconds]:
        began_s = perf_counter()
        count = len(inputs[0])
        fill(self._inputs, inputs)
        if constant is not self._constant:
            self._constant_bytes[:], self._constant = bytes_of(constant), constant
        # Python's lock is free while it computes: the event loop answers meanwhile.
        self._front.infer()
        front_done_s = perf_counter()
        self._back.infer(share_outputs=True)
        rows = np.frombuffer(bytearray(self._rows[: count * self._row_bytes]), np.float32)
        return rows.reshape(count, *self._shape), (front_done_s - began_s, perf_counter() - front_done_s)


class WholeFront:
    """All rows at once."""

    def __init__(self, request: "openvino.InferRequest", inputs: Sequence[Array]) -> None:
        set_inputs(request, map(tensor_on, inputs))
        self._request = request
        self.values = [request.get_output_tensor(i) for i in range(len(request.model_outputs))]

    def infer(self) -> None:
        """Compute ``values``."""
        self._request.infer(share_outputs=True)


class FrontByRow:
    """Each row of one image by itself: cores that have one each need not wait for each other.

    Args:
        requests: for pixels and one draw of noise, as many as the front has rows for an image.
        inputs: pixels, and the draws of all rows but the first, which has none.
    """

    def __init__(self, requests: "Sequence[openvino.InferRequest]", inputs: Sequence[Array]) -> None:
        pixels, noise = inputs
        draws = [np.zeros_like(noise[:, :1]), *np.split(noise, noise.shape[1], axis=1)]
        values = [np.empty((len(requests), *array.shape[1:]), array.dtype) for array in _outputs(requests[0])]
        for i, (request, draw) in enumerate(zip(requests, draws, strict=True)):
            set_inputs(request, map(tensor_on, [pixels, draw]))
            for j, value in enumerate(values):
                request.set_output_tensor(j, tensor_on(value[i : i + 1]))
        self._requests, self._memory = requests, (draws, values)  # which OpenVINO does not own
        self.values = list(map(tensor_on, values))

    def infer(self) -> None:
        """Compute ``values``."""
        try:
            for request in self._requests:
                request.start_async()
        finally:  # where one could not be started, the others may still be at work
            _wait_for(self._requests)


def _wait_for(requests: "Iterable[openvino.InferRequest]") -> None:
    """Wait for all of them; then, if any failed, raise the first one's error."""
    errors = []
    for request in requests:
        try:
            request.wait()
        except Exception as error:  # noqa: BLE001 - raised below, once none is at work any more
            errors.append(error)
    if errors:
        raise errors[0]
