"""Both parts of a network by OpenVINO, one after the other: what lies between them stays in OpenVINO's memory."""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import ceil, inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.compilers import openvino_error
from service.matrix_convolution import with_matrix_products
from service.openvino_part import bytes_of, executable, fill, fits_fixed_sizes, fixed_size, traced
from service.winograd import winograd_variants

if TYPE_CHECKING:
    import openvino

    _Requests = tuple[openvino.InferRequest, openvino.InferRequest]  # to the front, and to the back

Array = NDArray[Any]
Seconds = tuple[float, float]
# Inputs of the front and the back's constant -> the back's value, and the seconds that front and back took.
Way = Callable[[Sequence[Array], Array], tuple[Array, Seconds]]
AnyWay = TypeVar("AnyWay", bound=Way)

MAX_STREAMS = 4  # where there are more threads than that, streams have several
MIN_BATCH_ROWS, MAX_PART_ROWS = 16, 16  # of the front, in a batch that is divided, and in a part of it
TRIALS, TRIALS_S = 5, 2  # of each way; of all together, after which no more are begun


class OpenVinoChain:
    """``back(*front(*inputs), constant)``, for batches of any size.

    Sizes that are common have executables of their own where the front is small, as in ``OpenVinoPart``. Where it is
    large, the quickest ways on this machine are found by trial: for batches, which are computed in parts (see
    ``_Parts``), whether convolutions are products of matrices, and how many of them Winograd's; for a lone image,
    whether as larger batches, with all convolutions as they are, or each of its rows by itself.

    Args:
        front: in eval mode; of all inputs the first dimension is the batch, of its values it is a multiple of that.
        back: in eval mode; its value has the batch's size. It is computed in float32, on one thread: to share so little
            out takes longer than to do it.
        dtype: of the front. examples: its inputs for two images. constant: the back's last input, which seldom changes.
        threads: of the front. sizes: of batches to be quickest with, ascending.
        row: of inputs for one image whose last, [1, 1, ...], is a draw of noise: the front's value for that draw; for
            noise of zeros, its first. None where the front has one row for an image.

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
        row: nn.Module | None = None,
    ) -> None:
        with torch.no_grad():
            between = front(*examples)
        self._fixed: dict[int, _Fixed] = {}
        self._parts: _Parts | None = None
        self._lone: Way | None = None
        with openvino_error(dtype):
            compiler = _Compiler(traced(back, [*between, constant]), dtype, examples, constant, threads)
            if fits_fixed_sizes(front, dtype, sizes):
                model = compiler.traced(front)
                for size in sizes:
                    memory = compiler.blank(size), np.zeros(constant.shape, np.float32)
                    self._fixed[size] = _Fixed(*compiler.requests(model, size)[0], *memory)
                self._any_size = _Whole(*compiler.requests(model, -1)[0])
                return
            rows, streams = len(between[0]) // 2, min(threads, MAX_STREAMS)
            constant_array = constant.numpy()

            def is_quicker(candidate: nn.Module) -> bool:
                model = compiler.traced(candidate)
                parts = _Parts(compiler.requests(model, -1, streams, 2 * streams), streams, rows)
                ways = [self._parts, parts] if self._parts else [parts]
                self._parts = _quickest(ways, compiler.blank(parts.full_batch), constant_array)
                return self._parts is parts

            is_quicker(front)
            products = with_matrix_products(front, examples)
            with_products = products is not front and is_quicker(products)
            self._any_size = _Whole(*compiler.requests(compiler.traced(products if with_products else front), -1)[0])
            for variant in winograd_variants(front, dtype, examples):
                # Where its share of the convolutions does not gain, more of them do not either.
                if not is_quicker(with_matrix_products(variant, examples) if with_products else variant):
                    break
            plain = compiler.requests(compiler.traced(front), 1)[0]
            lone: list[Way] = [self._any_size, _Whole(*plain)]
            if row and streams > 1:
                lone.append(_ByRow(compiler.row_requests(row, rows, streams), plain[1]))
            self._lone = _quickest(lone, compiler.blank(1), constant_array)

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, Seconds]:
        """The back's value, float32, and the seconds that front and back took."""
        count = len(inputs[0])
        size = fixed_size(count, list(self._fixed))
        way: Way = self._any_size
        if size is not None:
            way = self._fixed[size]
        elif self._parts and count >= self._parts.smallest_batch:
            way = self._parts
        elif self._lone and count == 1:
            way = self._lone
        return way(inputs, constant)


class _Compiler:
    """Makes executables of fronts, and of the back that follows them.

    Args:
        back: as OpenVINO's model. The others: see ``OpenVinoChain``.
    """

    def __init__(
        self, back: "openvino.Model", dtype: torch.dtype, examples: Sequence[Tensor], constant: Tensor, threads: int
    ) -> None:
        self._back, self._dtype, self._threads = back, dtype, threads
        self._examples, self._constant_shape = examples, constant.shape
        self._shapes = [list(e.shape[1:]) for e in examples]

    def traced(self, front: nn.Module) -> "openvino.Model":
        """A front as OpenVINO's model."""
        return traced(front, self._examples)

    def blank(self, count: int) -> list[Array]:
        """Inputs of zeros for so many images."""
        return [np.zeros((count, *e.shape[1:]), e.numpy().dtype) for e in self._examples]

    def requests(self, front: "openvino.Model", size: int, streams: int = 1, number: int = 1) -> "list[_Requests]":
        """To front and back, for batches of this size; -1 is any."""
        shapes = [[size, *shape] for shape in self._shapes]
        first = executable(front, shapes, self._dtype, self._threads, streams)
        crossing = [value.partial_shape for value in first.outputs]
        second = executable(self._back, [*crossing, self._constant_shape], torch.float32, 1)
        return [(first.create_infer_request(), second.create_infer_request()) for _ in range(number)]

    def row_requests(self, row: nn.Module, number: int, streams: int) -> "list[openvino.InferRequest]":
        """To a module that computes one row of one image: see ``OpenVinoChain``."""
        pixels, noise = self._shapes
        shapes = [[1, *pixels], [1, 1, *noise[1:]]]
        each = executable(self.traced(row), shapes, self._dtype, self._threads, streams)
        return [each.create_infer_request() for _ in range(number)]


def _quickest(ways: Sequence[AnyWay], inputs: Sequence[Array], constant: Array) -> AnyWay:
    """The one that takes the least time; which that is depends on the processor's instructions and caches."""
    least_s, began_s = [inf] * len(ways), perf_counter()
    for trial in range(1 + TRIALS):
        if trial > 1 and perf_counter() - began_s > TRIALS_S:
            break
        for i, way in enumerate(ways):
            way_began_s = perf_counter()
            way(inputs, constant)
            if trial:  # the first time is longer
                least_s[i] = min(least_s[i], perf_counter() - way_began_s)
    return ways[least_s.index(min(least_s))]


def _outputs(front: "openvino.InferRequest") -> list[Array]:
    return [front.get_output_tensor(i).data for i in range(len(front.model_outputs))]


def _back_value(values: Sequence[Array], back: "openvino.InferRequest", constant: Array) -> Array:
    value: Array = back.infer([*values, constant], share_inputs=True)[0]
    return value


class _Whole:
    """All at once."""

    def __init__(self, front: "openvino.InferRequest", back: "openvino.InferRequest") -> None:
        self._front, self._back = front, back

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, Seconds]:
        times = [perf_counter()]
        self._front.infer(list(inputs), share_inputs=True, share_outputs=True)
        times.append(perf_counter())
        value = _back_value(_outputs(self._front), self._back, constant)
        times.append(perf_counter())
        return value, _differences(times)


class _ByRow:
    """One image, each of the front's rows by itself: cores that have one each need not wait for each other.

    Args:
        rows: requests for pixels and one draw of noise, as many as the front has rows for an image.
    """

    def __init__(self, rows: "Sequence[openvino.InferRequest]", back: "openvino.InferRequest") -> None:
        self._rows, self._back = rows, back

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, Seconds]:
        times, (pixels, noise) = [perf_counter()], inputs
        draws = [np.zeros_like(noise[:, :1]), *np.split(noise, noise.shape[1], axis=1)]
        try:
            for row, draw in zip(self._rows, draws, strict=True):
                row.start_async([pixels, draw], share_inputs=True)
        finally:  # where one could not be started, the others may still be at work
            for row in self._rows:
                row.wait()
        times.append(perf_counter())
        values = [np.concatenate(column) for column in zip(*map(_outputs, self._rows), strict=True)]
        value = _back_value(values, self._back, constant)
        times.append(perf_counter())
        return value, _differences(times)


class _Parts:
    """In parts, by streams that take the next one as soon as they are done with one.

    Threads that share a batch wait for each other after every layer, and longer where the event loop keeps one of them
    from its processor. To small networks, of which a batch takes a few milliseconds, that is less than what more calls
    cost, each of which gives Python's lock away.

    Args:
        requests: for any size; two for each stream, which then has one more than it has in hand.
        rows: of the front for an image.
    """

    def __init__(self, requests: "list[_Requests]", streams: int, rows: int) -> None:
        self._requests, self._streams = requests, streams
        self.smallest_batch, self._largest_part = max(streams, MIN_BATCH_ROWS // rows), max(1, MAX_PART_ROWS // rows)
        self.full_batch = streams * self._largest_part  # the smallest whose parts are all of the largest size

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, Seconds]:
        began_s, back_s = perf_counter(), 0.0
        values: list[Array] = []
        under_way: deque[_Requests] = deque()

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
            for front, _ in under_way:  # where one failed, the others may still be at work
                front.wait()
        return np.concatenate(values), (perf_counter() - began_s - back_s, back_s)


def part_sizes(count: int, streams: int, largest: int) -> list[int]:
    """The sizes of the parts of a batch: as many for each stream, and as equal as can be."""
    number = min(count, streams * ceil(count / (streams * largest)))
    return [count // number + (i < count % number) for i in range(number)]


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

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, Seconds]:
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


def _differences(times: Sequence[float]) -> Seconds:
    front, back = (after - before for before, after in pairwise(times))
    return front, back
