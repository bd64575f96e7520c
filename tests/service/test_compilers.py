"""Compilers: the same values faster, and a clear word where they cannot."""

import importlib.util
import logging

import pytest
import torch

from defense import SplitClassifier, load_importance
from service import compilers, openvino_part, predictor
from service.compilers import EngineError, choose_compiler
from service.engine import EngineSplit, resolve_device
from service.openvino_part import fixed_sizes, padded_size
from service.passes import OpenVinoPasses
from service.predictor import Predictor
from toy_models import small_conv_net

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS = ["conv1", "conv2", "hidden", "linear:input"]
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


def engine_of(layer, dtype=torch.float32, compiler="openvino"):
    model = small_conv_net()
    model.bn.running_mean.uniform_(-1, 1)
    model.bn.running_var.uniform_(0.5, 2)
    split = SplitClassifier(model, layer)
    return split, EngineSplit(split, dtype, compiler, torch.rand(2, 3, 8, 8))


@needs_openvino
@pytest.mark.parametrize("layer", LAYERS)
def test_openvino_gives_the_same_values_for_any_batch_size(layer):
    split, engine = engine_of(layer)
    for count in (1, 2, 7):
        images = torch.rand(count, 3, 8, 8)
        values = engine.cut(images)
        for value, expected in zip(values, split.cut(images), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(engine.tail(*values), split(images), atol=1e-5, rtol=1e-4)


@needs_openvino
@pytest.mark.parametrize("layer", LAYERS)
def test_openvino_gives_the_same_values_at_fixed_sizes(layer):
    split, _ = engine_of(layer)
    engine = EngineSplit(split, torch.float32, "openvino", torch.rand(2, 3, 8, 8), sizes=[1, 4, 6])
    assert list(engine._run_trunk._fixed) == [1, 4, 6]
    for count in (6, 3, 1, 7, 4, 2):  # what a larger batch leaves behind is no part of a smaller one
        images = torch.rand(count, 3, 8, 8)
        values = engine.cut(images)
        copies = [value.clone() for value in values]
        for value, expected in zip(values, split.cut(images), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
        engine.cut(torch.rand(count, 3, 8, 8))
        assert all(torch.equal(value, copy) for value, copy in zip(values, copies, strict=True))


@needs_openvino
def test_a_batch_is_padded_to_a_fixed_size_unless_that_is_far(monkeypatch):
    split, _ = engine_of("linear:input")
    run = EngineSplit(split, torch.float32, "openvino", torch.rand(2, 3, 8, 8), sizes=[1, 4, 100])._run_trunk
    used = []
    for size, fixed in list(run._fixed.items()):
        monkeypatch.setitem(run._fixed, size, Recorded(fixed, size, used))
    for count in (1, 3, 4, 5, 99, 100, 101):
        assert len(run(torch.rand(count, 3, 8, 8))[0]) == count
    assert used == [1, 4, 4, 100]


class Recorded:
    """Notes that it was called."""

    def __init__(self, call, size, used):
        self.call, self.size, self.used = call, size, used

    def __call__(self, values):
        self.used.append(self.size)
        return self.call(values)


@needs_openvino
def test_a_large_network_has_no_copies_of_its_weights(monkeypatch):
    monkeypatch.setattr(openvino_part, "FIXED_WEIGHTS_BYTES", 100)
    split, _ = engine_of("linear:input")
    engine = EngineSplit(split, torch.float32, "openvino", torch.rand(2, 3, 8, 8), sizes=[1, 4])
    assert not engine._run_trunk._fixed
    assert len(engine.cut(torch.rand(3, 3, 8, 8))[0]) == 3


def test_fixed_sizes_reach_to_the_largest_batch():
    assert fixed_sizes(6) == [1, 2, 3, 4, 5, 6]
    assert fixed_sizes(18)[-3:] == [15, 16, 18]
    assert fixed_sizes(64)[-3:] == [28, 32, 64]


@needs_openvino
def test_openvino_takes_images_that_lie_otherwise_in_memory():
    split, engine = engine_of("linear:input")
    images = torch.rand(3, 8, 8, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(engine.cut(images)[0], split.trunk(images), atol=1e-5, rtol=1e-4)


@needs_openvino
def test_an_answer_of_openvino_is_not_overwritten_by_the_next():
    _, engine = engine_of("linear:input")
    first = engine.cut(torch.zeros(2, 3, 8, 8))[0]
    copy = first.clone()
    engine.cut(torch.ones(2, 3, 8, 8))
    assert torch.equal(first, copy)


@needs_openvino
def test_openvino_does_not_report_its_use(monkeypatch):
    telemetry = pytest.importorskip("openvino_telemetry.main").Telemetry

    def report(*arguments, **options):
        raise AssertionError("it would have told somebody")

    monkeypatch.setattr(telemetry, "__init__", report)
    monkeypatch.setattr(telemetry, "send_event", report)
    engine_of("conv2")


@needs_openvino
def test_a_precision_that_the_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setitem(compilers.CAPABILITIES, torch.float16, "FP4")
    with pytest.raises(EngineError, match=r"float16 on this CPU \(.*FP32.*\); set IGD_DTYPE=auto"):
        engine_of("conv1", torch.float16)


def test_large_batches_in_parts_give_the_same_values(monkeypatch):
    monkeypatch.setattr(compilers, "CPU_ROWS", 3)
    split, engine = engine_of("hidden", compiler="none")
    images = torch.rand(7, 3, 8, 8)
    values = engine.cut(images)
    for value, expected in zip(values, split.cut(images), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(engine.tail(*values), split(images), atol=1e-5, rtol=1e-4)


def test_inductor_gives_the_same_values():
    split, engine = engine_of("hidden", compiler="inductor")
    images = torch.rand(2, 3, 8, 8)
    with torch.inference_mode():
        values = engine.cut(images)
        torch.testing.assert_close(engine.tail(*values), split(images), atol=1e-5, rtol=1e-4)


def test_batches_are_padded_to_the_sizes_that_inductor_has_compiled(tiny_model, monkeypatch):
    seen = []
    monkeypatch.setattr(compilers, "_inductor", lambda part: seen.append(None) or Recorder(part, seen))
    served_by = Predictor(tiny_model, compiler="inductor", max_batch_size=6)
    served = served_by.prepare("v", load_importance(tiny_model))
    compiled = {count for count in seen if count}
    seen.clear()
    pixels = [image.numpy() for image in torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)]

    rows = served_by.predict(served, pixels)

    assert rows.shape == (5, 5, 4)
    assert seen == [12] and 12 in compiled  # 6 images and their noisy copies


class Recorder(torch.nn.Module):
    """Notes the batch sizes that a part is called with."""

    def __init__(self, part, seen):
        super().__init__()
        self.part, self.seen = part, seen

    def forward(self, *values):
        self.seen.append(len(values[0]))
        return self.part(*values)


def test_padding_does_not_change_an_image_s_answer(make_model):
    model = make_model("still")
    toml = model / "model.toml"
    toml.write_text(toml.read_text().replace("sigma = 0.001", "sigma = 0"))
    importance = load_importance(model)
    plain, padded = (
        Predictor(model, compiler="none", dtype="float32"),
        Predictor(model, compiler="none", dtype="float32"),
    )
    pixels = [image.numpy() for image in torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)]
    served = padded.prepare("v", importance)
    served.engine.compiler = "inductor"  # it pads for it
    torch.testing.assert_close(
        padded.predict(served, pixels), plain.predict(plain.prepare("v", importance), pixels), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (3, 4), (4, 4), (5, 6), (6, 6), (7, 7)])
def test_padded_sizes(count, expected):
    assert padded_size(count, [1, 2, 4, 6]) == expected


def test_automatic_choice(monkeypatch):
    monkeypatch.setattr(compilers, "find_spec", lambda name: None)
    assert choose_compiler("auto", CPU) == "none"
    with pytest.raises(EngineError, match=r"pip install 'ig-defense\[openvino\]'"):
        choose_compiler("openvino", CPU)
    monkeypatch.setattr(compilers, "find_spec", lambda name: "found")
    assert choose_compiler("auto", CPU) == "openvino"
    assert choose_compiler("auto", CUDA) == "none"
    assert choose_compiler("inductor", CUDA) == "inductor"
    with pytest.raises(EngineError, match="runs on the CPU, not on cuda"):
        choose_compiler("openvino", CUDA)


def cannot(*arguments):
    raise EngineError("it cannot do this model")


@needs_openvino
def test_a_compiler_that_fails_is_done_without_when_nobody_asked_for_it(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(predictor, "openvino_chain", cannot)
    monkeypatch.setattr(predictor, "choose_compiler", lambda name, device: "openvino")
    importance = load_importance(tiny_model)
    with caplog.at_level(logging.WARNING):
        assert Predictor(tiny_model).prepare("v", importance).compiler == "none"
    assert "serving without a compiler: it cannot do this model" in caplog.text
    with pytest.raises(EngineError, match="it cannot do this model"):
        Predictor(tiny_model, compiler="openvino").prepare("v", importance)


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(EngineError, match="IGD_DEVICE=cuda:7 cannot be used"):
        resolve_device("cuda:7")
    with pytest.raises(EngineError, match="IGD_DEVICE=abacus cannot be used"):
        resolve_device("abacus")


@needs_openvino
@pytest.mark.parametrize(("seconds", "seen"), [(60.0, [1, 2, 4, 6, 3, 5]), (0.0, [1, 2, 4, 6])])
def test_every_batch_size_is_run_once_before_serving_while_time_is_left(tiny_model, monkeypatch, seconds, seen):
    sizes, call = [], OpenVinoPasses.__call__
    monkeypatch.setattr(predictor, "WARM_UP_S", seconds)
    monkeypatch.setattr(OpenVinoPasses, "__call__", lambda p, *given: sizes.append(len(given[0])) or call(p, *given))
    served = Predictor(tiny_model, compiler="openvino", dtype="float32", max_batch_size=6)
    served._fast_engine(load_importance(tiny_model))
    assert sizes == seen
