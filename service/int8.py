"""The first pass in int8, in a model of OpenVINO: what depends on the noise.

It gives the pseudo-label, which only says whose neurons are kept: the answer itself is the second pass's, in the
trunk's own precision, and the first one's image is noisy on purpose. Where the processor multiplies bytes it does so at
twice the rate of bfloat16 and four times that of float32.

Post-training quantization (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018): symmetric weights with a scale for each output channel, activations
with a scale for each tensor, such that none of the calibration's images is clipped. OpenVINO makes kernels for bytes of
it when it compiles the model.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from service.compilers import Compiler, EngineError

if TYPE_CHECKING:
    import openvino

    from service.openvino_ways import Array

CPU_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8")  # any of them
Range = tuple[float, float]  # of an activation's values


def check_int8(compiler: Compiler, *, has_probe_images: bool) -> None:
    """Refuse a first pass in int8 where there cannot be one.

    Raises:
        EngineError: there cannot.
    """
    missing = ""
    if not has_probe_images:
        missing = "probe images in the model directory, to find the range of every layer and to compare answers"
    elif compiler != "openvino":
        missing = "OpenVINO on a CPU (pip install 'ig-defense[openvino]'; IGD_COMPILE=auto, IGD_DEVICE=cpu)"
    elif not cpu_multiplies_int8():
        missing = "a CPU that multiplies bytes (AVX-512 VNNI, AVX-VNNI or AMX)"
    if missing:
        raise EngineError(f"IGD_INT8_FIRST_PASS needs {missing}; or set it to false")


def cpu_multiplies_int8() -> bool:
    """Whether this processor has instructions for it; without, sums of products of bytes may overflow."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(feature) for feature in CPU_FEATURES)


def calibrate(model: "openvino.Model", batches: "Iterable[Sequence[Array]]", threads: int) -> list[Range]:
    """The range of every activation that is to be quantized.

    Args:
        model: whose last input is the noise. batches: of its inputs, for images like those to come.
    """
    import openvino
    from openvino import opset13 as opset

    observed = _folded(model)
    activations = [activation for activation, _ in _activations(observed)]
    if not activations:
        return []
    extremes = [
        reduce(activation, opset.constant(np.arange(len(activation.get_partial_shape()))), False).output(0)
        for activation in activations
        for reduce in (opset.reduce_min, opset.reduce_max)
    ]
    extreme_model = openvino.Model(extremes, observed.get_parameters(), "extremes")
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(extreme_model, "CPU", options)
    lows, highs = np.full(len(activations), np.inf), np.full(len(activations), -np.inf)
    for batch in batches:
        results = request(list(batch))
        found = np.array([results[i] for i in range(len(extremes))]).reshape(-1, 2)
        lows, highs = np.minimum(lows, found[:, 0]), np.maximum(highs, found[:, 1])
    return list(zip(lows.tolist(), highs.tolist(), strict=True))


def quantized(model: "openvino.Model", ranges: Sequence[Range]) -> "openvino.Model":
    """A copy of the model with the products that depend on its last input, the noise, in int8.

    Those are convolutions and products with matrices of weights, and sums of two activations before a ReLU, as at the
    end of a residual block.

    Args:
        ranges: see ``calibrate``; of this model, or of one with the same operations behind the noise.
    """
    copy = _folded(model)
    for (low, high), (activation, uses) in zip(ranges, _activations(copy), strict=True):
        if low < high:
            quantized_activation = _quantized_activation(activation, low, high)
            for use in uses:
                use.replace_source_output(quantized_activation)
    for operation in _noisy_operations(copy):
        if (axes := _output_channel_axes(operation)) is not None:
            operation.input(1).replace_source_output(_quantized_weights(operation.input_value(1), axes))
    copy.validate_nodes_and_infer_types()
    return copy


def _folded(model: "openvino.Model") -> "openvino.Model":
    """A copy in which all weights are constants: those of grouped convolutions come reshaped."""
    from openvino.passes import ConstantFolding, Manager

    copy, manager = model.clone(), Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(copy)
    return copy


def _activations(model: "openvino.Model") -> "list[tuple[openvino.Output, list[openvino.Input]]]":
    """What is to be quantized but for weights, and where it is used: in the same order for every copy of a model."""
    uses: dict[tuple[str, int], tuple[openvino.Output, list[openvino.Input]]] = {}
    for operation in _noisy_operations(model):
        numbers: tuple[int, ...] = ()
        if _output_channel_axes(operation) is not None:
            numbers = (0,)
        elif _is_residual_sum(operation):
            numbers = (0, 1)
        for i in numbers:
            value = operation.input_value(i)
            if value.get_partial_shape().rank.is_static:
                key = value.get_node().get_name(), value.get_index()
                uses.setdefault(key, (value, []))[1].append(operation.input(i))
    return list(uses.values())


def _noisy_operations(model: "openvino.Model") -> "Iterator[openvino.Node]":
    """Those that depend on the last input, in the order of computation."""
    reached = {model.inputs[-1].get_node().get_name()}
    for operation in model.get_ordered_ops():
        if any(value.get_node().get_name() in reached for value in operation.input_values()):
            reached.add(operation.get_name())
            yield operation


def _output_channel_axes(operation: "openvino.Node") -> tuple[int, ...] | None:
    """Of its weights, the axes of output channels; None if it is no product with constant weights."""
    kind = operation.get_type_name()
    if kind not in ("Convolution", "GroupConvolution", "MatMul"):
        return None
    weights = operation.input_value(1)
    if weights.get_node().get_type_name() != "Constant":
        return None
    if kind != "MatMul":
        return (0, 1) if kind == "GroupConvolution" else (0,)
    if len(weights.get_shape()) != 2:
        return None
    return (0,) if operation.get_attributes()["transpose_b"] else (1,)


def _is_residual_sum(operation: "openvino.Node") -> bool:
    """Whether it adds two activations of the batch, and a ReLU follows."""
    if operation.get_type_name() != "Add":
        return False
    followers = [use.get_node().get_type_name() for use in operation.output(0).get_target_inputs()]
    return followers == ["Relu"] and all(_has_batch(value) for value in operation.input_values())


def _has_batch(value: "openvino.Output") -> bool:
    shape = value.get_partial_shape()
    return shape.rank.is_static and len(shape) > 0 and shape[0].is_dynamic


def _quantized_activation(value: "openvino.Output", low: float, high: float) -> "openvino.Output":
    """Unsigned where it is never negative, else signed and symmetric."""
    if low >= 0:
        return _fake_quantized(value, np.float32(0), np.float32(high), 256)
    scale = max(-low / 128, high / 127)
    return _fake_quantized(value, np.float32(-128 * scale), np.float32(127 * scale), 256)


def _quantized_weights(weights: "openvino.Output", axes: tuple[int, ...]) -> "openvino.Output":
    values: NDArray[np.float32] = weights.get_node().get_data()
    others = tuple(axis for axis in range(values.ndim) if axis not in axes)
    largest = np.maximum(np.abs(values).max(others, keepdims=True), np.finfo(np.float32).tiny)
    return _fake_quantized(weights, -largest, largest, 255)


def _fake_quantized(
    value: "openvino.Output", low: "np.float32 | Array", high: "np.float32 | Array", levels: int
) -> "openvino.Output":
    from openvino import opset13 as opset

    bounds = [opset.constant(bound) for bound in (low, high)]
    return opset.fake_quantize(value, *bounds, *bounds, levels).output(0)
