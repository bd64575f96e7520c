"""The engine: faster, and the same answers."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from defense import SplitClassifier, load_importance
from service import predictor as predictor_module
from service.engine import EngineSplit, choose_dtype
from service.predictor import Predictor
from toy_models import small_conv_net

CPU = torch.device("cpu")


@pytest.mark.parametrize("layer", ["conv1", "conv2", "hidden", "linear:input"])
def test_folding_batch_normalization_keeps_the_logits(layer):
    model = small_conv_net()
    model.bn.running_mean.uniform_(-1, 1)
    model.bn.running_var.uniform_(0.5, 2)
    split, images = SplitClassifier(model, layer), torch.rand(5, 3, 8, 8)
    engine = EngineSplit(split, torch.float32)

    values, expected = engine.cut(images), split.cut(images)

    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(engine.tail(*values), split(images), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in engine._trunk.modules()) or layer == "conv1"


def test_a_lower_precision_stays_inside_the_engine():
    split = SplitClassifier(small_conv_net(), "linear:input")
    engine, images = EngineSplit(split, torch.bfloat16), torch.rand(2, 3, 8, 8)

    (activations,) = engine.cut(images)

    assert {p.dtype for p in engine._trunk.parameters()} == {torch.bfloat16}
    assert activations.dtype == engine.tail(activations).dtype == torch.float32
    torch.testing.assert_close(engine.tail(split.trunk(images)), split(images))  # an affine tail is not lowered
    torch.testing.assert_close(activations, split.trunk(images), atol=0.05, rtol=0.05)


def test_the_original_model_is_left_as_it_was():
    split, images = SplitClassifier(small_conv_net(), "hidden"), torch.rand(2, 3, 8, 8)
    before = split(images)
    EngineSplit(split, torch.bfloat16)
    assert torch.equal(split(images), before)


def test_a_named_dtype_is_that_dtype():
    assert choose_dtype("float32", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert choose_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("share", "dtype", "level"),
    [(1.0, torch.bfloat16, "INFO"), (0.98, torch.bfloat16, "WARNING"), (0.94, torch.float32, "ERROR")],
)
def test_a_precision_that_changes_answers_is_warned_of_and_then_given_up(
    share, dtype, level, tiny_model, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(predictor_module, "agreement", lambda *_: share)

    served = Predictor(tiny_model, dtype="bfloat16").prepare("v", load_importance(tiny_model))

    assert served.dtype == dtype
    assert level in [record.levelname for record in caplog.records if "agrees with float32" in record.message]


def test_a_lower_precision_that_nothing_can_check_is_not_chosen_automatically(tiny_model, tmp_path, monkeypatch):
    for file in ("model.toml", "weights.safetensors", "importance.safetensors"):
        (tmp_path / file).write_bytes((tiny_model / file).read_bytes())
    monkeypatch.setattr(predictor_module, "choose_dtype", lambda *_: torch.bfloat16)

    served = Predictor(tmp_path, dtype="auto").prepare("v", load_importance(tmp_path))

    assert (served.dtype, served.agreement) == (torch.float32, None)


def test_probe_images_are_of_the_whole_set_in_whatever_order_it_is(tiny_model, monkeypatch):
    monkeypatch.setattr(predictor_module, "PROBE_IMAGES", 5)  # of 24
    images = load_file(tiny_model / "probe.safetensors")["images"].numpy()
    assert np.array_equal(Predictor(tiny_model)._probe, images[[0, 4, 8, 12, 16]])


def test_noise_is_drawn_anew_for_every_batch_and_every_predictor(tiny_model):
    one, other = Predictor(tiny_model), Predictor(tiny_model)
    images = torch.zeros(2, *one.config.input.shape)
    draws = [one._noise(images.shape), one._noise(images.shape), other._noise(images.shape)]
    assert not any(torch.equal(a, b) for a, b in zip(draws, draws[1:] + draws[:1], strict=True))
