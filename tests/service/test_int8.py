"""A first pass in int8: it changes the pseudo-label a little, and nothing else; where it cannot be, that is said."""

import importlib.util
import logging

import numpy as np
import pytest
import torch
from torch import nn

from defense import DefendedClassifier, SplitClassifier, load_importance
from defense.resnet import CifarResNet
from service import int8, openvino_chain, predictor
from service.compilers import EngineError
from service.engine import EngineSplit, StageClock, choose_dtype
from service.int8 import calibrate, check_int8, cpu_multiplies_int8, quantized
from service.openvino_part import executable, traced
from service.passes import OpenVinoPasses, PyTorchPasses, to_images
from service.passes import openvino_chain as chain_of
from service.predictor import Predictor
from service.settings import Settings
from toy_models import importance_of

CPU = torch.device("cpu")
has_openvino = importlib.util.find_spec("openvino") is not None
needs_int8 = pytest.mark.skipif(
    not (has_openvino and cpu_multiplies_int8()),
    reason="openvino is not installed, or this CPU does not multiply bytes",
)
DTYPES = list(dict.fromkeys([torch.float32, choose_dtype("auto", CPU)]))
PLAIN, INT8 = 0, 1  # of the ways that there are first


class Branches(nn.Module):
    """All that is and is not quantized: of the images alone nothing, of images and noise what is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)  # it is
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)  # it is
        self.other = nn.Conv2d(8, 8, 1)  # it is
        self.linear = nn.Linear(8, 4)  # it is
        self.tiles = nn.Parameter(torch.rand(2, 4, 4))  # of Winograd's kind

    def branch(self, images):
        x = self.first(images).relu()
        x = (self.depthwise(x) + self.other(x)).relu()  # the sum is, too
        x = (x + 3).relu()
        return torch.stack([self.linear(x.mean((2, 3)))] * 2) @ self.tiles

    def forward(self, images, noise):
        return self.branch(images), self.branch(images + noise)


def branches():
    torch.manual_seed(0)
    return Branches().eval(), [torch.rand(40, 3, 8, 8), 0.1 * torch.randn(40, 3, 8, 8)]


def quantized_inputs(model):
    """By kind of operation: how many inputs of each are quantized, where some are."""
    found = {}
    for operation in model.get_ordered_ops():
        kinds = [value.get_node().get_type_name() for value in operation.input_values()]
        if "FakeQuantize" in kinds:
            found.setdefault(operation.get_type_name(), []).append(kinds.count("FakeQuantize"))
    return found


def values_of(model, inputs):
    return executable(model, [[-1, *value.shape[1:]] for value in inputs], torch.float32, 1)(inputs)


@needs_int8
def test_what_depends_on_the_noise_is_quantized_and_nothing_else():
    net, inputs = branches()
    model = traced(net, [value[:2] for value in inputs])
    batches = [[value[:10].numpy() for value in inputs], [value[10:].numpy() for value in inputs]]
    in_int8 = quantized(model, calibrate(model, batches, 1))
    assert quantized_inputs(in_int8) == {"Convolution": [2, 2], "GroupConvolution": [2], "Add": [2], "MatMul": [2]}
    assert quantized_inputs(model) == {}

    exact, rough = values_of(model, inputs), values_of(in_int8, inputs)
    assert np.array_equal(rough[0], exact[0])
    error = np.abs(rough[1] - exact[1]).max() / np.abs(exact[1]).max()
    assert 1e-4 < error < 0.03


@needs_int8
def test_ranges_are_of_all_batches():
    net, inputs = branches()
    model = traced(net, inputs)
    arrays = [value.numpy() for value in inputs]
    whole = calibrate(model, [arrays], 1)
    parts = calibrate(model, [[array[i : i + 7] for array in arrays] for i in range(0, 40, 7)], 1)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    noisy = arrays[0] + arrays[1]
    assert whole[0] == pytest.approx((noisy.min(), noisy.max()))


@needs_int8
def test_a_layer_that_is_always_zero_stays_as_it_is():
    net, inputs = branches()
    with torch.no_grad():
        for convolution in (net.depthwise, net.other):
            convolution.weight.zero_()
            convolution.bias.fill_(-1)
        net.linear.weight.zero_()
    model = traced(net, inputs)
    values = values_of(quantized(model, calibrate(model, [[value.numpy() for value in inputs]], 1)), inputs)
    assert np.array_equal(values[1], values[0])  # the linear layer's bias


@needs_int8
def test_a_network_with_nothing_to_quantize_stays_as_it_is():
    class Sum(nn.Module):
        def forward(self, images, noise):
            return images, (images + noise).relu()

    _, inputs = branches()
    model = traced(Sum(), inputs)
    assert calibrate(traced(nn.Identity(), inputs[:1]), [], 1) == []
    values = values_of(quantized(model, calibrate(model, [[value.numpy() for value in inputs]], 1)), inputs)
    assert np.abs(values[1] - (inputs[0] + inputs[1]).relu().numpy()).max() < 0.01


def defended_in(dtype, draws=1, channels=3):
    torch.manual_seed(0)
    model = CifarResNet(width=8, num_classes=4)
    if channels == 1:
        model.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        model.normalize = nn.Identity()
    split = SplitClassifier(model.eval(), "layer4", input_size=(channels, 8, 8))
    importance = importance_of(split, torch.rand(split.num_classes, split.num_neurons))
    options = {"top_k": 8, "sigma": 0.1, "num_noise_samples": draws, "temperature": 0.5}
    engine = EngineSplit(split, dtype, "openvino", torch.rand(2, channels, 8, 8))
    return DefendedClassifier(split, importance, **options), DefendedClassifier(engine, importance, **options)


def inputs_of(batch, draws=1, channels=3):
    pixels = torch.randint(0, 256, (batch, 8, 8, channels), dtype=torch.uint8).numpy()
    return pixels, torch.randn(batch, draws, channels, 8, 8)


def chain_in_int8(defended, draws=1, channels=3, sizes=(1, 3, 8)):
    calibration = [(pixels, noise.numpy()) for pixels, noise in [inputs_of(64, draws, channels)]]
    return chain_of(defended.split, defended, *inputs_of(2, draws, channels), 2, list(sizes), calibration)


def choose(monkeypatch, ways_by_count, large=False):
    """Of ways for so many images this one."""

    def chosen(ways, inputs, _):
        return ways[:2][ways_by_count.get(len(inputs[0]), ways_by_count.get(None)) if len(ways) > 1 else 0]

    monkeypatch.setattr(openvino_chain, "_quickest", chosen)
    if large:
        monkeypatch.setattr("service.openvino_part.FIXED_WEIGHTS_BYTES", 0)


@needs_int8
@pytest.mark.parametrize(("draws", "channels"), [(1, 3), (3, 3), (1, 1)])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_pseudo_label_and_what_follows_from_it_changes(dtype, large, draws, channels, monkeypatch):
    # Of a large network's batches with products of matrices in the second pass, and Winograd's in float32.
    monkeypatch.setattr("service.matrix_convolution.MIN_WEIGHTS", 0)
    monkeypatch.setattr("service.winograd.MIN_CHANNELS", 1)
    choose(monkeypatch, {None: INT8}, large)
    exact, defended = defended_in(dtype, draws, channels)
    chain = chain_in_int8(defended, draws, channels)
    assert chain.int8_batch == 8
    passes, closely = OpenVinoPasses(defended, chain, StageClock(CPU)), 1e-4 if dtype == torch.float32 else 0.02
    for batch in (1, 2, 8, 40):
        given = inputs_of(batch, draws, channels)
        expected, rows = PyTorchPasses(exact, StageClock(CPU))(*given), passes(*given)
        np.testing.assert_allclose(rows[:, [1, 4]], expected[:, [1, 4]], atol=closely, rtol=closely)
        assert 1e-6 < np.abs(rows[:, 2] - expected[:, 2]).max() < 0.02
        clean = exact.split.cut(to_images(torch.from_numpy(given[0])))
        logits = exact.masked_pass(clean, torch.from_numpy(rows[:, 2].copy())).detach()
        np.testing.assert_allclose(rows[:, 3], logits, atol=closely, rtol=closely)
        np.testing.assert_allclose(rows[:, 0], logits.softmax(1), atol=closely, rtol=closely)


@needs_int8
@pytest.mark.parametrize(
    ("large", "ways", "int8_batch"),
    [
        (False, {1: PLAIN, 3: INT8, 8: PLAIN}, 3),
        (False, {1: PLAIN, 3: PLAIN, 8: PLAIN}, None),
        (True, {1: INT8, None: PLAIN}, 1),
        (True, {1: PLAIN, None: INT8}, 8),
        (True, {None: PLAIN}, None),
    ],
)
def test_each_size_has_what_is_quicker_and_the_largest_in_int8_is_known(large, ways, int8_batch, monkeypatch):
    choose(monkeypatch, ways, large)
    _, defended = defended_in(torch.float32)
    chain, plain = chain_in_int8(defended), chain_of(defended.split, defended, *inputs_of(2), 2, [1, 3, 8])
    assert chain.int8_batch == int8_batch
    assert plain.int8_batch is None
    masks = defended.masks.numpy()
    for count in (1, 3, 8, 40):
        pixels, noise = inputs_of(count)
        rows = chain((pixels, noise.numpy()), masks)[0] - plain((pixels, noise.numpy()), masks)[0]
        in_int8 = ways.get(count, ways[8] if not large else ways[None])
        assert (np.abs(rows[:, 2]).max() > 1e-6) == (in_int8 == INT8)


@needs_int8
def test_the_server_s_engine_has_one_when_it_is_told_to(tiny_model, monkeypatch, caplog):
    choose(monkeypatch, {None: INT8})
    importance = load_importance(tiny_model)
    with caplog.at_level(logging.INFO):
        settings = Settings(model=tiny_model, int8_first_pass=True, dtype="float32")
        served = Predictor.of(settings, max_batch_size=4).prepare("v", importance)
    assert served.int8_first_pass
    assert "torch.float32 with an int8 first pass by openvino agrees with float32" in caplog.text
    assert not Predictor.of(Settings(model=tiny_model), max_batch_size=4).prepare("v", importance).int8_first_pass


def prepared(model, monkeypatch, shares, **options):
    """The engine, where answers agree on these shares one after the other, and the batch sizes that were compared."""
    sizes, left = [], iter(shares)
    monkeypatch.setattr(predictor, "agreement", lambda *given: sizes.append(given[-1]) or next(left))
    options = {"dtype": "float32", "compiler": "openvino", "max_batch_size": 4} | options
    return Predictor(model, int8_first_pass=True, **options).prepare("v", load_importance(model)), sizes


@needs_int8
def test_answers_are_compared_where_they_are_of_int8(tiny_model, monkeypatch):
    choose(monkeypatch, {1: PLAIN, 2: PLAIN, 3: INT8, 4: PLAIN})
    served, sizes = prepared(tiny_model, monkeypatch, [0.96])
    assert sizes == [{1, 2, 3, 4}]
    assert served.agreement == 0.96


@needs_int8
def test_it_is_given_up_where_it_changes_too_many_answers(tiny_model, monkeypatch, caplog):
    choose(monkeypatch, {None: INT8})
    served, _ = prepared(tiny_model, monkeypatch, [0.94, 1.0])
    assert (served.int8_first_pass, served.compiler, served.agreement) == (False, "openvino", 1.0)
    assert "on 94.0% of probe images; serving without int8; set IGD_INT8_FIRST_PASS=false" in caplog.text


@needs_int8
def test_the_rest_is_given_up_then_if_that_was_not_the_reason(tiny_model, monkeypatch, caplog):
    choose(monkeypatch, {None: INT8})
    served, _ = prepared(tiny_model, monkeypatch, [0.94, 0.93, 1.0])
    assert (served.int8_first_pass, served.compiler, served.agreement) == (False, "none", 1.0)
    assert "torch.float32 by openvino agrees with float32 on 93.0% of probe images; serving float32" in caplog.text


@needs_int8
def test_what_cannot_be_built_in_int8_is_served_without(tiny_model, monkeypatch, caplog):
    def cannot(*given):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(openvino_chain, "quantized", cannot)
    served, _ = prepared(tiny_model, monkeypatch, [1.0])
    assert (served.int8_first_pass, served.compiler) == (False, "openvino")
    assert "serving without an int8 first pass: OpenVINO cannot compile this model (no kernel)" in caplog.text


@needs_int8
def test_a_way_that_is_not_quicker_is_not_taken(tiny_model, monkeypatch, caplog):
    choose(monkeypatch, {None: PLAIN})
    served, _ = prepared(tiny_model, monkeypatch, [1.0])
    assert not served.int8_first_pass
    assert "serving without an int8 first pass: it is not quicker here" in caplog.text


@needs_int8
def test_a_layer_whose_tail_is_not_affine_goes_without(tiny_model, caplog):
    served = Predictor(tiny_model, int8_first_pass=True, dtype="float32", max_batch_size=2)
    split = served._split_at("layer3")
    assert not split.tail_is_affine
    importance = importance_of(split, torch.rand(split.num_classes, split.num_neurons))
    assert not served.prepare("v", importance).int8_first_pass
    assert "serving without an int8 first pass: what follows 'network.layer3' is not affine; rank" in caplog.text


def test_without_noise_there_is_no_first_pass_to_speed_up(make_model, caplog):
    model = make_model("still")
    toml = model / "model.toml"
    toml.write_text(toml.read_text().replace("sigma = 0.001", "sigma = 0"))
    served = Predictor(model, int8_first_pass=True, max_batch_size=2).prepare("v", load_importance(model))
    assert not served.int8_first_pass
    assert "IGD_INT8_FIRST_PASS changes nothing: with sigma = 0" in caplog.text


def test_where_it_cannot_be_that_is_said(monkeypatch):
    monkeypatch.setattr(int8, "cpu_multiplies_int8", lambda: True)
    check_int8("openvino", has_probe_images=True)
    with pytest.raises(EngineError, match=r"needs probe images in the model directory.*; or set it to false"):
        check_int8("openvino", has_probe_images=False)
    with pytest.raises(EngineError, match=r"needs OpenVINO on a CPU \(pip install 'ig-defense\[openvino\]'; IGD_COMP"):
        check_int8("none", has_probe_images=True)
    monkeypatch.setattr(int8, "cpu_multiplies_int8", lambda: False)
    with pytest.raises(EngineError, match="needs a CPU that multiplies bytes"):
        check_int8("openvino", has_probe_images=True)


def test_a_predictor_refuses_what_it_cannot_do(tiny_model):
    with pytest.raises(EngineError, match="IGD_INT8_FIRST_PASS needs OpenVINO"):
        Predictor(tiny_model, compiler="none", int8_first_pass=True)
