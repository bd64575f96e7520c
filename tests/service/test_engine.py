"""The engine: faster, and the same answers."""

import importlib.util
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from defense import SplitClassifier, load_importance
from service import compilers, noise
from service import predictor as predictor_module
from service.compilers import EngineError
from service.engine import EngineSplit, StageClock, choose_dtype
from service.passes import PyTorchPasses
from service.predictor import Predictor
from toy_models import small_conv_net

CPU = torch.device("cpu")
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


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
    assert choose_dtype("float16", CPU) == torch.float16


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "amx_bf16": False, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_multiplies_it(has, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert choose_dtype("auto", CPU) == dtype


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((7, 5), None)])
def test_cuda_computes_in_bfloat16_from_8_0_on(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda")) == (dtype or torch.float32)


def test_float16_is_served_where_it_is_asked_for(tiny_model, monkeypatch):
    monkeypatch.setattr(predictor_module, "FALL_BACK_BELOW", 0)  # which noise it is is a matter of chance
    predictor = Predictor(tiny_model, dtype="float16", compiler="none")
    served = predictor.prepare("v", load_importance(tiny_model))
    rows = predictor.predict(served, [np.zeros((8, 8, 3), np.uint8)])
    assert served.dtype == torch.float16 and served.agreement > 0.5
    assert rows[:, :3].sum(-1) == pytest.approx(1, abs=1e-5)


def test_images_and_convolutions_are_channels_last():
    split, seen = SplitClassifier(small_conv_net(), "hidden"), []
    engine = EngineSplit(split, torch.float32)
    convolutions = [m for m in engine._trunk.modules() if isinstance(m, torch.nn.Conv2d)]
    for convolution in convolutions:
        convolution.register_forward_hook(lambda module, given, value: seen.extend([module.weight, *given]))
    engine.cut(torch.rand(2, 3, 8, 8))
    assert len(seen) == 2 * len(convolutions) > 2
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)


@pytest.mark.parametrize(
    ("compiler", "left_to_torch"), [("none", 3), pytest.param("openvino", 1, marks=needs_openvino)]
)
def test_threads_are_as_many_as_were_asked_for(compiler, left_to_torch, tiny_model, monkeypatch):
    before, asked = torch.get_num_threads(), []
    if compiler == "openvino":
        import openvino

        compile_model = openvino.Core.compile_model

        def noting(self, model, device, options):
            asked.append(options["INFERENCE_NUM_THREADS"])
            return compile_model(self, model, device, options)

        monkeypatch.setattr(openvino.Core, "compile_model", noting)
    try:
        Predictor(tiny_model, compiler=compiler, threads=3).prepare("v", load_importance(tiny_model))
        assert torch.get_num_threads() == left_to_torch
    finally:
        torch.set_num_threads(before)
    assert compiler == "none" or {3, 1} == set(asked)  # of the front, and of the back, which is too small to share


def test_passes_are_compared_with_the_same_noise(tiny_model, monkeypatch):
    monkeypatch.setattr(predictor_module, "FALL_BACK_BELOW", 0)  # or there may be another comparison
    given, call = [], PyTorchPasses.__call__

    def noting(self, pixels, noise):
        given.append((pixels.tobytes(), noise.clone()))
        return call(self, pixels, noise)

    monkeypatch.setattr(PyTorchPasses, "__call__", noting)
    predictor = Predictor(tiny_model, compiler="none", dtype="bfloat16")
    predictor.prepare("v", load_importance(tiny_model))

    probe = {image.tobytes() for image in predictor._probe}
    lone = [noise for pixels, noise in given if pixels in probe]
    (whole,) = [noise for pixels, noise in given if pixels == predictor._probe.tobytes()][:1]
    assert len(lone) == len(whole) and torch.equal(torch.cat(lone), whole)


@needs_openvino
def test_what_the_engine_cannot_do_is_said_when_the_model_is_loaded(tiny_model, monkeypatch):
    monkeypatch.setitem(compilers.CAPABILITIES, torch.float16, "NO CPU HAS THIS")
    with pytest.raises(EngineError, match="set IGD_DTYPE=auto"):
        Predictor(tiny_model, dtype="float16", compiler="openvino")
    monkeypatch.setattr(compilers, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install"):
        Predictor(tiny_model, compiler="openvino")


class FakeEvent:
    """A CUDA event, as one tells it from the host: until it is waited for it may not be over."""

    def __init__(self, enable_timing):
        self.recorded = self.waited_for = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        self.waited_for = self.recorded

    def elapsed_time(self, end):
        if not end.waited_for:
            raise RuntimeError("both events must be completed before calculating elapsed time")
        return 2.0


def test_times_on_cuda_are_read_when_they_are_over(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)  # no GPU here
    clock = StageClock(torch.device("cuda"))
    with clock.stage("trunk"):
        pass
    assert clock.read() == {"trunk": 0.002, "tail": 0.0}
    assert clock.read() == {"trunk": 0.0, "tail": 0.0}


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


def test_no_lone_image_s_noise_is_another_s(tiny_model):
    one, other = Predictor(tiny_model), Predictor(tiny_model)
    shape = (1, *one.config.input.size, one.config.input.channels)
    draws = torch.cat([p._noise(shape) for _ in range(40) for p in (one, other)])
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 80
    assert draws.shape[1:] == one._noise((2, *shape[1:])).shape[1:]
    # 80 times as many values as an image has: standard normal, to six standard errors.
    assert abs(draws.mean()) < 6 / draws.numel() ** 0.5
    assert abs(draws.var() - 1) < 6 * (2 / draws.numel()) ** 0.5


@pytest.mark.filterwarnings("error:.*not writable")  # torch's, which it says once in a process if it is not told to
@pytest.mark.parametrize("compiler", ["none", pytest.param("openvino", marks=needs_openvino)])
def test_a_lone_image_is_classified_as_in_a_batch(tiny_model, compiler):
    predictor = Predictor(tiny_model, dtype="float32", compiler=compiler)
    config = predictor.config
    predictor.config = config.model_copy(update={"defense": config.defense.model_copy(update={"sigma": 0.0})})
    defense = predictor.prepare("1", load_importance(tiny_model))
    pixels = list(np.random.default_rng(0).integers(0, 256, (3, *predictor._probe.shape[1:]), np.uint8))
    for image in pixels:
        image.flags.writeable = False  # as they are decoded
    rows = predictor.predict(defense, pixels)
    torch.set_warn_always(True)
    try:
        alone = [predictor.predict(defense, [image])[0] for image in pixels]
    finally:
        torch.set_warn_always(False)
    np.testing.assert_allclose(alone, rows, atol=1e-5, rtol=1e-5)


def test_noise_for_lone_images_is_drawn_ahead_only_where_it_is_little(monkeypatch):
    shape = (1, 1, 3, 8, 8)
    values = 3 * 8 * 8
    for most, ahead in ((values * 3, 2), (values - 1, 0)):
        monkeypatch.setattr(noise, "LONE_VALUES", most)
        normal = noise.StandardNormal(torch.device("cpu"))
        assert normal.draw(shape).shape == shape
        assert len(normal._lone) == ahead
