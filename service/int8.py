"""The first pass in 8 bits, in a model of OpenVINO: what depends on the noise.

It gives the pseudo-label, which only says whose neurons are kept: the answer itself is the second pass's, in the
trunk's own precision, and the first one's image is noisy on purpose. Where the processor multiplies bytes it does so at
twice the rate of bfloat16 and four times that of float32.

As for integer networks elsewhere (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018), the weights of each output channel and the values of each layer become
multiples of a step. Steps of values are such that none is cut off that occurs for the calibration's images.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from service.compilers import Compiler, EngineError

if TYPE_CHECKING:
    import openvino

    from service.openvino_ways import Array

CALIBRATION_BATCH = 32
CPU_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8")  # any of them
Range = tuple[float, float]


def check_int8(compiler: Compiler, *, has_probe_images: bool) -> None:
    """Refuse a first pass in int8 where there cannot be one.

    Raises:
        EngineError: there cannot.
    """
    missing = ""
    if not has_probe_images:
        missing = "probe images in the model directory, to find the range of every layer and to compare answers"
    elif compiler != "openvino":
        missing = "OpenVINO, on a CPU (pip install 'ig-defense[openvino]', and IGD_COMPILE=openvino)"
    elif not cpu_multiplies_int8():
        missing = "a CPU that multiplies bytes (AVX-512 VNNI, AVX-VNNI or AMX)"
    if missing:
        raise EngineError(f"IGD_INT8_FIRST_PASS needs {missing}; or set it to false")


def cpu_multiplies_int8() -> bool:
    """Whether this processor has instructions for it; without, sums of products of bytes may overflow."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(feature) for feature in CPU_FEATURES)


def with_int8_first_pass(model: "openvino.Model", inputs: "Sequence[Array]") -> "openvino.Model":
    """A copy of the model in which 8 bits are enough for the products that depend on its last input, the noise.

    OpenVINO turns this into kernels for bytes when it compiles it. Those are convolutions and products with matrices of
    weights, and sums of two of their values where a ReLU follows, as in a ResNet.

    Args:
        model: for batches of any size. inputs: for images like those to come.
    """
    from openvino.passes import ConstantFolding, Manager

    quantized, manager = model.clone(), Manager()
    manager.register_pass(ConstantFolding())  # weights of grouped convolutions are reshaped
    manager.run_passes(quantized)
    ranges = _ranges(quantized, inputs)
    for (low, high), (value, uses) in zip(ranges, _values(quantized), strict=True):
        if low < high:
            rounded = _rounded_value(value, low, high)
            for use in uses:
                use.replace_source_output(rounded)
    for operation in _noisy_operations(quantized):
        if (axes := _output_channel_axes(operation)) is not None:
            operation.input(1).replace_source_output(_rounded_weights(operation.input_value(1), axes))
    quantized.validate_nodes_and_infer_types()
    return quantized


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
    """Whether it adds what two branches say of the batch, before a ReLU."""
    if operation.get_type_name() != "Add":
        return False
    shapes = [value.get_partial_shape() for value in operation.input_values()]
    followers = [use.get_node().get_type_name() for use in operation.output(0).get_target_inputs()]
    return all(shape[0].is_dynamic for shape in shapes) and followers == ["Relu"]


def _values(model: "openvino.Model") -> "list[tuple[openvino.Output, list[openvino.Input]]]":
    """What is to be rounded, and where it is used: in the same order for every copy of a model."""
    uses: dict[tuple[str, int], tuple[openvino.Output, list[openvino.Input]]] = {}
    for operation in _noisy_operations(model):
        numbers: tuple[int, ...] = ()
        if _output_channel_axes(operation) is not None:
            numbers = (0,)
        elif _is_residual_sum(operation):
            numbers = (0, 1)
        for i in numbers:
            value = operation.input_value(i)
            key = value.get_node().get_name(), value.get_index()
            uses.setdefault(key, (value, []))[1].append(operation.input(i))
    return list(uses.values())


def _ranges(model: "openvino.Model", inputs: "Sequence[Array]") -> list[Range]:
    """The least and the largest of each of ``_values``, for these inputs."""
    import openvino
    from openvino import opset13 as opset

    observed = model.clone()
    values = [value for value, _ in _values(observed)]
    if not values:
        return []
    axes = [np.arange(len(value.get_partial_shape())) for value in values]
    extremes = [
        reduce(value, opset.constant(a), False).output(0)
        for value, a in zip(values, axes, strict=True)
        for reduce in (opset.reduce_min, opset.reduce_max)
    ]
    extreme_model = openvino.Model(extremes, observed.get_parameters(), "extremes")
    request = openvino.Core().compile_model(extreme_model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    lows, highs = np.full(len(values), np.inf), np.full(len(values), -np.inf)
    for begin in range(0, len(inputs[0]), CALIBRATION_BATCH):
        results = request([array[begin : begin + CALIBRATION_BATCH] for array in inputs])
        found = np.array([results[i] for i in range(len(extremes))]).reshape(-1, 2)
        lows, highs = np.minimum(lows, found[:, 0]), np.maximum(highs, found[:, 1])
    return list(zip(lows.tolist(), highs.tolist(), strict=True))


def _rounded_value(value: "openvino.Output", low: float, high: float) -> "openvino.Output":
    """It, in 256 steps: unsigned bytes where it is never negative, else signed ones."""
    if low >= 0:
        return _rounded(value, np.float32(0), np.float32(high), 256)
    step = max(-low / 128, high / 127)
    return _rounded(value, np.float32(-128 * step), np.float32(127 * step), 256)


def _rounded_weights(weights: "openvino.Output", axes: tuple[int, ...]) -> "openvino.Output":
    values: NDArray[np.float32] = weights.get_node().get_data()
    others = tuple(axis for axis in range(values.ndim) if axis not in axes)
    largest = np.maximum(np.abs(values).max(others, keepdims=True), np.finfo(np.float32).tiny)
    return _rounded(weights, -largest, largest, 255)


def _rounded(
    value: "openvino.Output", low: "np.float32 | Array", high: "np.float32 | Array", levels: int
) -> "openvino.Output":
    from openvino import opset13 as opset

    bounds = [opset.constant(bound) for bound in (low, high)]
    return opset.fake_quantize(value, *bounds, *bounds, levels).output(0)
