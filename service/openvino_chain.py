"""Both parts of a network by OpenVINO, one after the other: what lies between them is not copied."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from service.compilers import openvino_error
from service.int8 import Range, calibrate, quantized
from service.matrix_convolution import with_matrix_products
from service.openvino_part import executable, fits_fixed_sizes, fixed_size, traced
from service.openvino_ways import Array, Fixed, FrontByRow, Parts, Seconds, Way, Whole, WholeFront
from service.winograd import winograd_variants

if TYPE_CHECKING:
    import openvino

    from service.openvino_ways import Requests

AnyWay = TypeVar("AnyWay", bound=Way)

MAX_STREAMS = 4  # where there are more threads than that, streams have several
TRIALS, TRIALS_S = 12, 1.5  # turns of each way; of all together, after which no more are begun
SHORT_S = 0.005  # where a way takes less, each is called again for so long before another has its turn
TRIAL_GAIN = 0.02  # what a way must save to be taken, or restarts would differ by chance


@dataclass(frozen=True)
class Int8FirstPass:
    """What a chain needs to compute the first pass in int8.

    Attributes:
        front: like the chain's, but that it computes what depends on the noise apart from the rest.
        batches: of its inputs, for images like those to come.
    """

    front: nn.Module
    batches: Iterable[Sequence[Array]]


class OpenVinoChain:
    """``back(*front(*inputs), constant)``, for batches of any size.

    Sizes that are common have executables of their own where the front is small, as in ``OpenVinoPart``. Where it is
    large, the quickest ways on this machine are found by trial: for batches, which are computed in parts (see
    ``Parts``), whether convolutions are products of matrices, and how many of them Winograd's; for a lone image,
    whether its convolutions are products, too, or each of its rows by itself.

    A first pass in int8 is one more way: of each size of a small network, of all batches of a large one, whose products
    and Winograd's convolutions are then the second pass's, and of its lone image.

    Args:
        front: in eval mode; of all inputs the first dimension is the batch, of its values it is a multiple of that.
        back: in eval mode; its value has the batch's size. It is computed in float32, on one thread: to share so little
            out takes longer than to do it.
        dtype: of the front. examples: its inputs for two images. constant: the back's last input, which seldom changes.
        threads: of the front. sizes: of batches to be quickest with, ascending.
        row: of inputs for one image whose last, [1, 1, ...], is a draw of noise: the front's value for that draw; for
            noise of zeros, its first. None where the front has one row for an image.
        int8: for a first pass in int8 where that is quicker than in ``dtype``.

    Attributes:
        int8_batch: the largest size of batches whose first pass is in int8; None if there is none.

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
        int8: Int8FirstPass | None = None,
    ) -> None:
        with torch.no_grad():
            between = front(*examples)
        self._fixed: dict[int, Fixed] = {}
        self._parts: Parts | None = None
        self._lone: Way | None = None
        self._ways: dict[int, Way] = {}  # of the sizes that were asked for
        self.int8_batch: int | None = None
        with openvino_error(dtype):
            compiler = _Compiler(traced(back, [*between, constant]), dtype, examples, constant, threads)
            fronts = [compiler.front(front)]
            if int8:
                fronts.append(compiler.front_in_int8(int8))
            if fits_fixed_sizes(front, dtype, sizes):
                self._any_size = self._fix(compiler, fronts, sizes)
            else:
                self._any_size = self._divide(compiler, fronts, len(between[0]) // 2, row, sizes[-1])

    def _fix(self, compiler: "_Compiler", fronts: "Sequence[_Front]", sizes: Sequence[int]) -> Whole:
        """Of a small network; the way for sizes beyond is returned."""
        for size in sizes:
            ways = [compiler.fixed(front, size) for front in fronts]
            self._fixed[size] = compiler.quickest(ways, size)
            if self._fixed[size] is not ways[0]:
                self.int8_batch = size
        return compiler.whole(fronts[-1 if self.int8_batch == sizes[-1] else 0])

    def _divide(
        self, compiler: "_Compiler", fronts: "Sequence[_Front]", rows: int, row: nn.Module | None, largest: int
    ) -> Whole:
        """Of a large network, whose front has so many rows for an image; the way for undivided batches is returned."""
        streams = compiler.streams
        best = compiler.parts(fronts[0], rows)

        def adopt_if_quicker(front: "_Front") -> bool:
            nonlocal best
            before, parts = best, compiler.parts(front, rows)
            best = compiler.quickest([before, parts], parts.smallest_batch)  # larger ones gain more
            return best is parts

        front = fronts[0]
        if len(fronts) > 1 and adopt_if_quicker(fronts[1]):
            front, self.int8_batch = fronts[1], largest
        products = compiler.with_products(front)
        with_products = products is not front and adopt_if_quicker(products)
        for variant in compiler.winograd_variants(front, with_products=with_products):
            if not adopt_if_quicker(variant):
                break  # more of them hardly would be
        self._parts = best
        lone = [compiler.fixed(each, 1) for each in ([*fronts, products] if with_products else fronts)]
        if row and streams > 1:
            lone.append(compiler.by_row(row, rows))
        self._lone = compiler.quickest(lone, 1)
        if len(fronts) > 1 and self._lone is lone[1]:
            self.int8_batch = self.int8_batch or 1
        return compiler.whole(products if with_products else front)

    def __call__(self, inputs: Sequence[Array], constant: Array) -> tuple[Array, Seconds]:
        """The back's value, float32, and the seconds that front and back took."""
        count = len(inputs[0])
        way = self._ways.get(count)
        if way is None:
            way = self._ways[count] = self._way_for(count)
        return way(inputs, constant)

    def _way_for(self, count: int) -> Way:
        size = fixed_size(count, list(self._fixed))
        if size is not None:
            return self._fixed[size]
        if self._parts and count >= self._parts.smallest_batch:
            return self._parts
        return self._lone if self._lone and count == 1 else self._any_size


@dataclass(frozen=True)
class _Front:
    """A front, and what OpenVINO makes executables of.

    Attributes:
        ranges: of the activations of its first pass, if that is in int8.
    """

    module: nn.Module
    model: "openvino.Model"
    ranges: list[Range] | None = None


class _Compiler:
    """Makes executables of fronts, and of the back that follows them.

    Args:
        back: as OpenVINO's model. The others: see ``OpenVinoChain``.

    Attributes:
        streams: that compute parts or rows beside each other.
    """

    def __init__(
        self, back: "openvino.Model", dtype: torch.dtype, examples: Sequence[Tensor], constant: Tensor, threads: int
    ) -> None:
        self._back, self._dtype, self._threads = back, dtype, threads
        self._examples, self._constant = examples, constant.numpy()
        self._shapes = [list(e.shape[1:]) for e in examples]
        self.streams = min(threads, MAX_STREAMS)

    def front(self, module: nn.Module, ranges: list[Range] | None = None) -> _Front:
        """The module as a front; for ``ranges`` see there."""
        model = traced(module, self._examples)
        return _Front(module, model if ranges is None else quantized(model, ranges), ranges)

    def front_in_int8(self, int8: Int8FirstPass) -> _Front:
        """The front whose first pass is in int8."""
        model = traced(int8.front, self._examples)
        ranges = calibrate(model, int8.batches, self._threads)
        return _Front(int8.front, quantized(model, ranges), ranges)

    def with_products(self, front: _Front) -> _Front:
        """With products of matrices for convolutions; the same front where none would gain."""
        module = with_matrix_products(front.module, self._examples)
        return front if module is front.module else self.front(module, front.ranges)

    def winograd_variants(self, front: _Front, *, with_products: bool) -> Iterator[_Front]:
        """With Winograd's convolutions, ever more of them."""
        for variant in winograd_variants(front.module, self._dtype, self._examples):
            module = with_matrix_products(variant, self._examples) if with_products else variant
            yield self.front(module, front.ranges)

    def blank(self, count: int) -> list[Array]:
        """Inputs of zeros for so many images."""
        return [np.zeros((count, *e.shape[1:]), e.numpy().dtype) for e in self._examples]

    def _requests(self, front: "openvino.Model", size: int, streams: int = 1, number: int = 1) -> "list[Requests]":
        """To front and back, for batches of this size; -1 is any."""
        shapes = [[size, *shape] for shape in self._shapes]
        first = executable(front, shapes, self._dtype, self._threads, streams)
        second = self._back_for([value.partial_shape for value in first.outputs])
        return [(first.create_infer_request(), second.create_infer_request()) for _ in range(number)]

    def _back_for(self, crossing: "Sequence[Sequence[int] | openvino.PartialShape]") -> "openvino.CompiledModel":
        return executable(self._back, [*crossing, self._constant.shape], torch.float32, 1)

    def whole(self, front: _Front) -> Whole:
        """The way for batches of any size."""
        return Whole(*self._requests(front.model, -1)[0])

    def parts(self, front: _Front, rows: int) -> Parts:
        """The way that divides a batch; the front has so many rows for an image."""
        return Parts(self._requests(front.model, -1, self.streams, 2 * self.streams), self.streams, rows)

    def fixed(self, front: _Front, size: int) -> Fixed:
        """The way for this batch size alone."""
        (request, back), memory = self._requests(front.model, size)[0], self.blank(size)
        return Fixed(WholeFront(request, memory), back, memory, np.zeros_like(self._constant))

    def by_row(self, row: nn.Module, rows: int) -> Fixed:
        """The way of an image with so many rows, each by itself; for ``row`` see ``OpenVinoChain``."""
        (pixels, noise), memory = self._shapes, self.blank(1)
        shapes = [[1, *pixels], [1, 1, *noise[1:]]]
        each = executable(traced(row, self._examples), shapes, self._dtype, self._threads, self.streams)
        front = FrontByRow([each.create_infer_request() for _ in range(rows)], memory)
        back = self._back_for([value.shape for value in front.values]).create_infer_request()
        return Fixed(front, back, memory, np.zeros_like(self._constant))

    def quickest(self, ways: Sequence[AnyWay], count: int) -> AnyWay:
        """Of several ways, the one for so many images."""
        return _quickest(ways, self._sample(count), self._constant)

    def _sample(self, count: int) -> list[Array]:
        """Inputs like those of so many images: AMX takes a tenth less for zeros."""
        generator, inputs = np.random.default_rng(0), self.blank(count)
        for array in inputs:
            if array.dtype == np.uint8:
                array[:] = generator.integers(0, 256, array.shape)
            else:
                array[:] = generator.standard_normal(array.shape)
        return inputs


def _quickest(ways: Sequence[AnyWay], inputs: Sequence[Array], constant: Array) -> AnyWay:
    """The one that takes the least time; which that is depends on the processor's instructions and caches.

    Ways take turns, and the median of the turns' ratios counts: a machine's speed may double for the time of one call,
    so that the least time of each would be a matter of luck. Short ones are called several times in a turn: a server
    has one way alone, whose weights are in the caches.

    Args:
        ways: the simpler first; one is taken before others that save less than ``TRIAL_GAIN``.
    """
    if len(ways) == 1:
        return ways[0]
    for way in ways:
        way(inputs, constant)  # the first time takes longer
    began_s = perf_counter()
    turns = [[_call_s(way, inputs, constant) for way in ways]]
    call_s = _call_s
    if min(turns[0]) < SHORT_S:
        turns, call_s = [], _warm_call_s
    while len(turns) < TRIALS and (not turns or perf_counter() - began_s <= TRIALS_S):
        turns.append([call_s(way, inputs, constant) for way in ways])
    best = 0
    for i in range(1, len(ways)):
        if median(turn[i] / turn[best] for turn in turns) < 1 - TRIAL_GAIN:
            best = i
    return ways[best]


def _call_s(way: Way, inputs: Sequence[Array], constant: Array) -> float:
    began_s = perf_counter()
    way(inputs, constant)
    return perf_counter() - began_s


def _warm_call_s(way: Way, inputs: Sequence[Array], constant: Array) -> float:
    """The mean over ``SHORT_S``, after a call that finds another way's weights in the caches."""
    way(inputs, constant)
    calls_s: list[float] = []
    while sum(calls_s) < SHORT_S:
        calls_s.append(_call_s(way, inputs, constant))
    return fmean(calls_s)
