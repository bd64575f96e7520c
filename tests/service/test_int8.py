"""A first pass in int8: it changes the pseudo-label a little, and nothing else; where it cannot be, that is said."""

import importlib.util
import logging

import numpy as np
import pytest
import torch
from torch import nn

from defense import DefendedClassifier, SplitClassifier, load_importance
from defense.resnet import CifarResNet
from service import int8, predictor
from service.compilers import EngineError
from service.engine import EngineSplit, StageClock
from service.int8 import check_int8, cpu_multiplies_int8, with_int8_first_pass
from service.openvino_part import executable, traced
from service.passes import OpenVinoPasses, openvino_chain
from service.predictor import Predictor
from service.settings import Settings
from toy_models import importance_of

has_openvino = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not has_openvino, reason="openvino is not installed")
needs_int8 = pytest.mark.skipif(
    not (has_openvino and cpu_multiplies_int8()),
    reason="openvino is not installed, or this CPU does not multiply bytes",
)


class Branches(nn.Module):
    """All that is and is not rounded: of the images nothing, of images and noise what is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)  # rounded
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)  # rounded
        self.other = nn.Conv2d(8, 8, 1)  # rounded
        self.linear = nn.Linear(8, 4)  # rounded
        self.tiles = nn.Parameter(torch.rand(2, 4, 4))  # of Winograd's kind

    def branch(self, images):
        x = self.first(images).relu()
        x = (self.depthwise(x) + self.other(x)).relu()  # the sum is rounded, too
        return torch.stack([self.linear(x.mean((2, 3)))] * 2) @ self.tiles

    def forward(self, images, noise):
        return self.branch(images), self.branch(images + noise)


def rounded_in(model):
    """What of a model is rounded: the kinds of operations, how often."""
    users = {}
    for operation in model.get_ordered_ops():
        rounded = sum(v.get_node().get_type_name() == "FakeQuantize" for v in operation.input_values())
        if rounded:
            name = operation.get_type_name()
            users.setdefault(name, []).append(rounded)
    return users


@needs_int8
def test_what_depends_on_the_noise_is_rounded_and_nothing_else():
    net = Branches().eval()
    images, noise = torch.rand(40, 3, 8, 8), 0.1 * torch.randn(40, 3, 8, 8)
    model = traced(net, [images[:2], noise[:2]])
    rounded = with_int8_first_pass(model, [images.numpy(), noise.numpy()])
    assert rounded_in(rounded) == {"Convolution": [2, 2], "GroupConvolution": [2], "Add": [2], "MatMul": [2]}
    assert rounded_in(model) == {}

    shapes = [[-1, *value.shape[1:]] for value in (images, noise)]
    exact = executable(model, shapes, torch.float32, 1)([images, noise])
    rough = executable(rounded, shapes, torch.float32, 1)([images, noise])
    assert np.array_equal(rough[0], exact[0])
    error = np.abs(rough[1] - exact[1]).max() / np.abs(exact[1]).max()
    assert 1e-4 < error < 0.03


@needs_int8
def test_a_layer_that_is_always_zero_stays_as_it_is():
    net = Branches().eval()
    with torch.no_grad():
        net.depthwise.weight.zero_(), net.other.weight.zero_()
        net.depthwise.bias.fill_(-1), net.other.bias.fill_(-1)
    images, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    model = traced(net, [images, noise])
    rounded = with_int8_first_pass(model, [images.numpy(), noise.numpy()])
    shapes = [list(value.shape) for value in (images, noise)]
    values = executable(rounded, shapes, torch.float32, 1)([images, noise])
    assert np.array_equal(values[1], values[0])  # the linear layer's bias


def passes_of(calibrated: bool, draws: int = 1):
    torch.manual_seed(0)
    split = SplitClassifier(CifarResNet(width=8, num_classes=4), "layer4", input_size=(3, 8, 8))
    engine = EngineSplit(split, torch.float32, "openvino", torch.rand(2, 3, 8, 8))
    importance = importance_of(split, torch.rand(split.num_classes, split.num_neurons))
    defended = DefendedClassifier(engine, importance, top_k=8, sigma=0.1, num_noise_samples=draws, temperature=0.5)
    calibration = [value.numpy() for value in inputs(64, draws)] if calibrated else None
    pixels, noise = inputs(2, draws)
    chain = openvino_chain(engine, defended, pixels.numpy(), noise, 2, [1, 3, 8], calibration)
    return OpenVinoPasses(defended, chain, StageClock(torch.device("cpu")))


def inputs(batch, draws):
    return torch.randint(0, 256, (batch, 8, 8, 3), dtype=torch.uint8), torch.randn(batch, draws, 3, 8, 8)


@needs_int8
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("large", [False, True])
def test_only_the_pseudo_label_and_what_follows_it_changes(large, draws, monkeypatch):
    # Of plain ways and what is in int8 the latter, of batches with products of matrices in the second pass.
    monkeypatch.setattr("service.openvino_chain._quickest", lambda ways, *given: ways[:2][-1])
    monkeypatch.setattr("service.matrix_convolution.MIN_WEIGHTS", 0)
    if large:
        monkeypatch.setattr("service.openvino_part.FIXED_WEIGHTS_BYTES", 0)
    exact, rough = passes_of(False, draws), passes_of(True, draws)
    for batch in (1, 2, 8, 40):
        pixels, noise = inputs(batch, draws)
        expected, rows = exact(pixels.numpy(), noise), rough(pixels.numpy(), noise)
        np.testing.assert_allclose(rows[:, [1, 4]], expected[:, [1, 4]], atol=1e-5, rtol=1e-4)
        differences = np.abs(rows[:, 2] - expected[:, 2])
        assert 0 < differences.max() < 0.02


@needs_int8
def test_the_server_s_engine_has_one_when_it_is_told_to(tiny_model, caplog):
    settings = Settings(model=tiny_model, int8_first_pass=True, dtype="float32")
    importance = load_importance(tiny_model)
    with caplog.at_level(logging.INFO):
        served = Predictor.of(settings, max_batch_size=4).prepare("v", importance)
    assert served.int8_first_pass
    assert served.agreement > 0.9
    assert "torch.float32 with an int8 first pass by openvino agrees with float32" in caplog.text
    assert not Predictor.of(Settings(model=tiny_model), max_batch_size=4).prepare("v", importance).int8_first_pass


@needs_int8
def test_it_is_given_up_where_it_changes_too_many_answers(tiny_model, monkeypatch, caplog):
    shares = iter([0.94, 1.0])
    monkeypatch.setattr(predictor, "agreement", lambda *given: next(shares))
    served = Predictor(tiny_model, int8_first_pass=True, dtype="float32", max_batch_size=2)
    prepared = served.prepare("v", load_importance(tiny_model))
    assert (prepared.int8_first_pass, prepared.compiler, prepared.agreement) == (False, "openvino", 1.0)
    assert "with an int8 first pass by openvino agrees with float32 on 94.0% of probe images; serving" in caplog.text


@needs_int8
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
    with pytest.raises(EngineError, match=r"needs OpenVINO, on a CPU \(pip install 'ig-defense\[openvino\]'"):
        check_int8("none", has_probe_images=True)
    monkeypatch.setattr(int8, "cpu_multiplies_int8", lambda: False)
    with pytest.raises(EngineError, match="needs a CPU that multiplies bytes"):
        check_int8("openvino", has_probe_images=True)


def test_a_predictor_refuses_what_it_cannot_do(tiny_model):
    with pytest.raises(EngineError, match="IGD_INT8_FIRST_PASS needs OpenVINO"):
        Predictor(tiny_model, compiler="none", int8_first_pass=True)


@needs_int8
def test_a_layer_whose_tail_is_not_affine_goes_without(tiny_model, caplog):
    served = Predictor(tiny_model, int8_first_pass=True, dtype="float32", max_batch_size=2)
    split = served._split_at("layer3")
    assert not split.tail_is_affine
    importance = importance_of(split, torch.rand(split.num_classes, split.num_neurons))
    assert not served.prepare("v", importance).int8_first_pass
    assert "the first pass is not in int8: what follows 'network.layer3' is not affine" in caplog.text
