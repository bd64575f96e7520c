"""Both passes as one call say what the defended classifier says, for any batch."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from defense import DefendedClassifier, SplitClassifier
from defense.resnet import CifarResNet
from service import openvino_chain as openvino_chain_module
from service import openvino_ways, winograd
from service.compilers import Compiler
from service.engine import EngineSplit, StageClock
from service.passes import OpenVinoPasses, PyTorchPasses, agreement, openvino_chain, to_images
from toy_models import PixelNet, importance_of, small_conv_net

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
CLOCK = StageClock(torch.device("cpu"))
LARGE = (1,)  # sizes that a network has no executables of its own for, because it counts as large


def engine_at(layer: str, compiler: Compiler) -> tuple[SplitClassifier, EngineSplit]:
    model = CifarResNet(width=4, num_classes=4) if layer == "layer4" else small_conv_net()
    split = SplitClassifier(model, layer, input_size=(3, 8, 8))
    return split, EngineSplit(split, torch.float32, compiler, torch.rand(2, 3, 8, 8))


def defended_by(split: SplitClassifier, seed: int = 0, sigma: float = 0.1, draws: int = 1) -> DefendedClassifier:
    scores = torch.rand(split.num_classes, split.num_neurons, generator=torch.Generator().manual_seed(seed))
    importance = importance_of(split, scores.tolist())
    return DefendedClassifier(split, importance, top_k=2, sigma=sigma, num_noise_samples=draws, temperature=0.5)


def inputs(batch: int, sigma: float, draws: int) -> tuple[NDArray[np.uint8], torch.Tensor | None]:
    pixels = np.random.default_rng().integers(0, 256, (batch, 8, 8, 3), np.uint8)
    return pixels, torch.randn(batch, draws, 3, 8, 8) if sigma else None


def assert_rows_of(rows: NDArray[np.float32], defended: DefendedClassifier, pixels: NDArray[np.uint8], noise) -> None:
    images = to_images(torch.from_numpy(pixels))
    expected = defended.predict(images, None if noise is None else noise.transpose(0, 1))
    close = {"atol": 1e-5, "rtol": 1e-4}
    rows = torch.from_numpy(rows)
    torch.testing.assert_close(rows[:, 0], expected.logits.softmax(1), **close)
    torch.testing.assert_close(rows[:, 1], expected.undefended_logits.softmax(1), **close)
    torch.testing.assert_close(rows[:, 2], expected.class_weights, **close)
    torch.testing.assert_close(rows[:, 3], expected.logits, **close)
    torch.testing.assert_close(rows[:, 4], expected.undefended_logits, **close)


def passes_of(engine: EngineSplit, defended: DefendedClassifier, sizes=(1, 3, 8), threads=2):
    if engine.compiler == "none":
        return PyTorchPasses(defended, CLOCK)
    examples = inputs(2, defended.sigma, defended.num_noise_samples)
    return OpenVinoPasses(defended, openvino_chain(engine, defended, *examples, threads, list(sizes)), CLOCK)


@pytest.mark.parametrize(("sigma", "draws"), [(0, 1), (0, 3), (0.1, 1), (0.1, 3)])
@pytest.mark.parametrize(
    ("layer", "compiler", "sizes", "threads"),
    [
        ("conv2", "none", (), 2),
        ("linear:input", "none", (), 2),
        *[
            pytest.param(layer, "openvino", sizes, threads, marks=needs_openvino)
            for layer in ("layer4", "linear:input")  # activations [B, N, 1, 1] and [B, N]
            for sizes, threads in (((1, 3, 8), 2), (LARGE, 1), (LARGE, 2), (LARGE, 3))
        ],
    ],
)
def test_the_rows_are_those_of_the_defended_classifier(layer, compiler, sizes, threads, sigma, draws, monkeypatch):
    if sizes is LARGE:
        monkeypatch.setattr("service.openvino_part.FIXED_WEIGHTS_BYTES", 0)
    split, engine = engine_at(layer, compiler)
    exact = defended_by(split, 0, sigma, draws)
    passes = passes_of(engine, defended_by(engine, 0, sigma, draws), sizes, threads)
    earlier = []
    # Padded or not, fixed or not, whole or in parts, more of them than there are requests: without a trace in another.
    for batch in (1, 2, 7, 3, 7, 1, 32, 19, 150):
        given = inputs(batch, sigma, draws)
        rows = passes(*given)
        assert_rows_of(rows, exact, *given)
        earlier.append((rows, rows.copy()))
    assert all(np.array_equal(rows, copy) for rows, copy in earlier)


@needs_openvino
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("way", [0, 1, 2])  # convolutions, products of matrices, row by row
def test_a_lone_image_s_rows_are_the_same_by_each_way(way, draws, monkeypatch):
    monkeypatch.setattr("service.openvino_part.FIXED_WEIGHTS_BYTES", 0)
    monkeypatch.setattr("service.matrix_convolution.MIN_WEIGHTS", 0)
    of_a_lone_image = {1: way}
    monkeypatch.setattr(  # of batches the last, which is with products
        openvino_chain_module, "_quickest", lambda ways, inputs, _: ways[of_a_lone_image.get(len(inputs[0]), -1)]
    )
    split, engine = engine_at("layer4", "openvino")
    passes = passes_of(engine, defended_by(engine, 0, 0.1, draws), LARGE)
    for _ in range(3):
        given = inputs(1, 0.1, draws)
        assert_rows_of(passes(*given), defended_by(split, 0, 0.1, draws), *given)


@needs_openvino
@pytest.mark.parametrize("refused_after", [1, 2])
@pytest.mark.parametrize("products", [False, True])  # for the convolutions that Winograd's are not for
def test_a_batch_s_rows_are_the_same_by_winograd_s_convolutions(products, refused_after, monkeypatch):
    monkeypatch.setattr("service.openvino_part.FIXED_WEIGHTS_BYTES", 0)
    monkeypatch.setattr("service.matrix_convolution.MIN_WEIGHTS", 0)
    monkeypatch.setattr("service.winograd.MIN_CHANNELS", 1)
    monkeypatch.setattr("service.winograd.LARGEST_MAPS", (1, 4, 16))
    used, refused = [], []

    def noted(part, *given):
        for variant in winograd.winograd_variants(part, *given):
            used.append([n for n, m in variant.named_modules() if isinstance(m, winograd.WinogradConvolution)])
            yield variant

    def quickest(ways, inputs, constant):
        adopted = len(used) <= refused_after if used else products
        way = ways[len(inputs[0]) > 1 and adopted]
        refused.extend(set(ways) - {way})
        return way

    monkeypatch.setattr(openvino_chain_module, "winograd_variants", noted)
    monkeypatch.setattr(openvino_chain_module, "_quickest", quickest)
    split, engine = engine_at("layer4", "openvino")
    passes = passes_of(engine, defended_by(engine), LARGE)
    assert [len(names) for names in used] == [3, 6, 9][: refused_after + 1]
    assert passes._chain._parts not in refused
    for batch in (1, 2, 7, 19, 150):
        given = inputs(batch, 0.1, 1)
        assert_rows_of(passes(*given), defended_by(split), *given)


def test_trials_end_when_they_have_taken_too_long(monkeypatch):
    clock, called = [0.0], []
    monkeypatch.setattr(openvino_chain_module, "perf_counter", lambda: clock[0])

    def way_of(name, takes_s):
        def way(inputs, constant):
            called.append(name)
            clock[0] += takes_s

        return way

    slow, slower = way_of("slow", 10), way_of("slower", 11)
    assert openvino_chain_module._quickest([slower, slow], [], None) is slow
    assert called == ["slower", "slow"] * 2  # the first time is not counted


def test_the_quickest_way_is_the_one_that_takes_less_time_in_most_turns_but_for_its_first(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(openvino_chain_module, "perf_counter", lambda: clock[0])

    def way_of(*takes_s):
        left = itertools.chain(takes_s, itertools.repeat(takes_s[-1]))

        def way(inputs, constant):
            clock[0] += next(left) / 100

        return way

    def quickest(*times):
        ways = [way_of(*takes_s) for takes_s in times]
        return ways.index(openvino_chain_module._quickest(ways, [], None))

    disturbed, steady, early, lucky = (9, 9, 2, 9, 2), (3,), (1, 4), (4, 1, 4)
    assert quickest(steady, disturbed, early, lucky) == 1
    assert quickest(steady, early, lucky) == 0
    at_changing_speed = [9 - i % 7 for i in range(20)]
    assert quickest([3 * s for s in at_changing_speed], [2.9 * s for s in at_changing_speed]) == 1
    assert quickest(steady, (2.95,), (2.92,)) == 2
    assert quickest(steady, (2.95,), (2.95,)) == 0  # too little to be more than chance


@pytest.mark.parametrize(
    ("between_others_first", "alone_first"),  # seconds of a call after another way's, and after one of its own
    [
        ((0.002, 0.002), (0.003, 0.001)),
        ((0.0049, 0.0045), (0.0051, 0.0040)),  # where one is short none is timed by calls after others'
    ],
)
def test_a_short_way_is_timed_where_its_own_weights_are_in_the_caches(between_others_first, alone_first, monkeypatch):
    clock, last = [0.0], [None]
    monkeypatch.setattr(openvino_chain_module, "perf_counter", lambda: clock[0])

    def way_of(after_others_s, after_own_s):
        def way(inputs, constant):
            clock[0] += after_own_s if last[0] is way else after_others_s
            last[0] = way

        return way

    quicker_between_others, quicker_alone = way_of(*between_others_first), way_of(*alone_first)
    assert openvino_chain_module._quickest([quicker_between_others, quicker_alone], [], None) is quicker_alone


@needs_openvino
def test_ways_are_tried_with_images_and_noise(monkeypatch):
    tried = []
    monkeypatch.setattr("service.openvino_part.FIXED_WEIGHTS_BYTES", 0)
    monkeypatch.setattr("service.matrix_convolution.MIN_WEIGHTS", 0)
    monkeypatch.setattr(openvino_chain_module, "_quickest", lambda ways, given, _: (tried.append(given), ways[0])[1])
    _, engine = engine_at("layer4", "openvino")
    passes_of(engine, defended_by(engine, 0, 0.1, 1), LARGE)
    assert {len(pixels) for pixels, _ in tried} == {1, 8}
    for pixels, noise in tried:
        assert (pixels.dtype, noise.dtype) == (np.uint8, np.float32)
        assert pixels.min() < 10 and pixels.max() > 245
        assert abs(noise.std() - 1) < 0.1


def test_pytorch_keeps_no_graph_of_what_it_predicts(monkeypatch):
    _, engine = engine_at("linear:input", "none")
    seen, cut = [], engine.cut
    monkeypatch.setattr(engine, "cut", lambda images: seen.append(torch.is_inference_mode_enabled()) or cut(images))
    passes_of(engine, defended_by(engine))(*inputs(2, 0.1, 1))
    assert seen == [True]


@needs_openvino
def test_importances_share_executables_and_keep_their_own_masks():
    split, engine = engine_at("linear:input", "openvino")
    defenses = {seed: defended_by(engine, seed) for seed in (1, 2)}
    chain = openvino_chain(engine, defenses[1], *inputs(2, 0.1, 1), 2, [1, 4])
    for seed in (1, 2, 1):
        passes = OpenVinoPasses(defenses[seed], chain, CLOCK)
        for batch in (3, 6):
            given = inputs(batch, 0.1, 1)
            assert_rows_of(passes(*given), defended_by(split, seed), *given)


@needs_openvino
def test_a_padded_batch_takes_an_executable_of_a_fixed_size():
    _, engine = engine_at("linear:input", "openvino")
    chain, used = passes_of(engine, defended_by(engine), (1, 4, 100))._chain, []
    for size, fixed in list(chain._fixed.items()):
        chain._fixed[size] = lambda *given, size=size, fixed=fixed: used.append(size) or fixed(*given)
    for batch in (1, 3, 4, 5, 99, 100, 101):
        pixels, noise = inputs(batch, 0.1, 1)
        masks = np.ones((engine.num_classes, engine.num_neurons), np.float32)
        assert len(chain((pixels, noise.numpy()), masks)[0]) == batch
    assert used == [1, 4, 4, 100]


@needs_openvino
def test_a_batch_whose_part_fails_leaves_no_trace_in_the_next(monkeypatch):
    monkeypatch.setattr("service.openvino_part.FIXED_WEIGHTS_BYTES", 0)
    split, engine = engine_at("linear:input", "openvino")
    passes, value_of = passes_of(engine, defended_by(engine), LARGE), openvino_ways._back_value
    for failing in (0, 1, 3):
        outcomes = iter([value_of] * failing + [lambda *given: 1 / 0])
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(openvino_ways, "_back_value", lambda *given, left=outcomes: next(left)(*given))
            passes(*inputs(64, 0.1, 1))
        given = inputs(64, 0.1, 1)
        assert_rows_of(passes(*given), defended_by(split), *given)


@needs_openvino
@pytest.mark.parametrize(
    ("count", "streams", "largest", "sizes"),
    [
        (16, 1, 16, [16]),
        (17, 1, 16, [9, 8]),
        (2, 2, 16, [1, 1]),
        (31, 2, 16, [16, 15]),
        (33, 2, 16, [9, 8, 8, 8]),
        (64, 2, 16, [16] * 4),
        (9, 4, 1, [1] * 9),
    ],
)
def test_parts_are_equal_and_as_many_for_each_stream(count, streams, largest, sizes):
    assert openvino_ways.part_sizes(count, streams, largest) == sizes


def test_both_stages_are_timed():
    for compiler in ["none", *["openvino"] * (importlib.util.find_spec("openvino") is not None)]:
        _, engine = engine_at("linear:input", compiler)
        passes = passes_of(engine, defended_by(engine))
        CLOCK.read()
        passes(*inputs(3, 0.1, 1))
        assert all(0 < seconds < 10 for seconds in CLOCK.read().values())


def test_agreement_is_the_share_of_equal_predictions():
    split = SplitClassifier(PixelNet([[255.0, 0.0], [0.0, 255.0]]))
    importance = importance_of(split, [[1.0, 0.0], [1.0, 0.0]])
    all_neurons, first_neuron = (  # the second says class 0, whatever the image
        PyTorchPasses(DefendedClassifier(split, importance, top_k=k, sigma=0), CLOCK) for k in (2, 1)
    )
    pixels = np.array([[2, 1], [1, 2], [3, 1], [5, 4]], np.uint8).reshape(4, 1, 2, 1)

    assert agreement(all_neurons, all_neurons, pixels, None) == 1
    assert agreement(all_neurons, first_neuron, pixels, None, batch_sizes=[3]) == 0.75


def test_agreement_is_of_the_batch_size_that_agrees_least():
    def always(label):
        return np.array([[[1.0 - label, label]]], np.float32).repeat(5, axis=1)

    def right(pixels, noise):
        return always(0).repeat(len(pixels), axis=0)

    def wrong_where_alone(pixels, noise):
        return always(len(pixels) == 1).repeat(len(pixels), axis=0)

    pixels = np.zeros((4, 1, 2, 1), np.uint8)
    assert agreement(wrong_where_alone, right, pixels, None) == 1
    for size, share in ((1, 0.0), (3, 0.75), (2, 1.0)):
        assert agreement(wrong_where_alone, right, pixels, None, [4, size]) == share


class Request:
    """OpenVINO's, as far as it is waited for."""

    def __init__(self, error=None):
        self._error, self.done = error, False

    def wait(self):
        self.done = True
        if self._error:
            raise self._error


def test_all_requests_are_waited_for_where_some_fail():
    requests = [Request(), Request(RuntimeError("first")), Request(RuntimeError("second")), Request()]
    with pytest.raises(RuntimeError, match="first"):
        openvino_ways._wait_for(requests)
    assert all(request.done for request in requests)
