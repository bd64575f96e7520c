"""SplitClassifier: a classifier as trunk and tail, cut at a named layer."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from defense.digest import model_digest
from defense.errors import SplitError
from defense.tracing import INPUT, NamingTracer, cut_graph, trace

_COMMON_SIZES = (32, 28, 64, 96, 224, 299, 384)


class SplitClassifier(nn.Module):
    """The trunk (up to and including a layer) and the tail (all after it) of a classifier.

    The model is traced with torch.fx and put in eval mode; trunk and tail share its parameters, and their composition
    is the model exactly. Where a skip connection passes around the layer, the values that bypass it are carried along:
    ``activations, *bypass = split.cut(images)`` and ``split.tail(activations, *bypass)``.

    Args:
        model: takes images [B, channels, H, W] in [0, 1] (normalization inside), returns logits [B, C].
        layer: dotted name of any module, to split after it, or ``"name:input"``, to split before it. A name that
            only one module ends with is enough (``"layer4"`` for ``"network.layer4"``). None: the input of the final
            linear layer, the paper's choice.
        input_size: (channels, H, W) of an image; by default ``model.input_size``, or a common size that fits.

    Attributes:
        layer: full name of the split layer. layers: names of all that could be.
        num_neurons, num_classes: N and C.
        tail_is_affine: whether the logits are an affine map of the activations (decides LO-IR's closed form).
        has_bypass: whether a skip connection passes around the layer.
        model_digest: of the weights, ``"sha256:..."``.

    Raises:
        SplitError: the model cannot be traced, the layer does not exist or its output is not a batch of channels.
    """

    def __init__(self, model: nn.Module, layer: str | None = None, *, input_size: Sequence[int] | None = None) -> None:
        super().__init__()
        self.model_digest = model_digest(model)
        tracer, graph = trace(model.eval())
        self.layers = tuple(name for name in tracer.outputs if name)
        self.layer = self.find_layer(layer) if layer is not None else _final_linear(model, tracer) + INPUT
        self._trunk, self._tail = cut_graph(model, graph, tracer.node_of(self.layer), self.layer)
        self._probe_structure(_example_images(model, input_size))

    def find_layer(self, layer: str) -> str:
        """The full name of a layer of this model, ``":input"`` kept.

        Raises:
            SplitError: no layer has that name, or several end with it.
        """
        name, suffix = layer.removesuffix(INPUT), INPUT if layer.endswith(INPUT) else ""
        matches = [name] if name in self.layers else [known for known in self.layers if known.endswith(f".{name}")]
        if len(matches) == 1:
            return matches[0] + suffix
        found = f"several: {', '.join(matches)}" if matches else "none"
        raise SplitError(f"expected one layer named '{name}', found {found}; the layers are: {', '.join(self.layers)}")

    def trunk(self, images: Tensor) -> Tensor:
        """Activations of the split layer, [B, N] or [B, N, H, W], for images [B, channels, H, W]."""
        return self.cut(images)[0]

    def cut(self, images: Tensor) -> tuple[Tensor, ...]:
        """The activations and, after them, whatever bypasses the layer (nothing for a layer on the main path)."""
        values: tuple[Tensor, ...] = self._trunk(images)
        return values

    def tail(self, activations: Tensor, *bypass: Tensor) -> Tensor:
        """Logits [B, C] of activations [B, N] or [B, N, H, W]."""
        logits: Tensor = self._tail(activations, *bypass)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the unchanged model, [B, C]."""
        return self.tail(*self.cut(images))

    def train(self, mode: bool = True) -> "SplitClassifier":
        """Stay in eval mode: in train mode an image's answer would depend on the rest of its batch."""
        return super().train(False)

    def _probe_structure(self, images: Tensor) -> None:
        with torch.no_grad():
            activations, *bypass = self.cut(images)
            _check_activations(activations, self.layer)
            _check_bypass(bypass, len(images), self.layer)
            logits = self.tail(activations, *bypass)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise SplitError(f"expected the model to return logits [B, C], got {found}")
        self.num_neurons, self.num_classes = activations.shape[1], logits.shape[1]
        self.has_bypass = bool(bypass)
        self.tail_is_affine = not bypass and _is_affine(self._tail, activations.shape[1:])


def _final_linear(model: nn.Module, tracer: NamingTracer) -> str:
    linear = [name for name in tracer.outputs if isinstance(model.get_submodule(name), nn.Linear)]
    if not linear:
        raise SplitError("the model has no torch.nn.Linear to split before; pass layer='name of a module'")
    return linear[-1]


def _example_images(model: nn.Module, input_size: Sequence[int] | None) -> Tensor:
    """Two random images of a size that the model accepts."""
    reference = next(model.parameters(), torch.empty(0))
    size = input_size or getattr(model, "input_size", None)
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    sizes = [tuple(size)] if size else [(channels, side, side) for side in _COMMON_SIZES]
    for candidate in sizes:
        images = torch.rand(2, *candidate, device=reference.device).to(reference.dtype)
        try:
            with torch.no_grad():
                model(images)
            return images
        except (RuntimeError, ValueError, AssertionError) as error:
            failure = error
    raise SplitError(f"the model does not accept images of {sizes}: {failure}; pass input_size=(channels, H, W)")


def _check_activations(activations: object, layer: str) -> None:
    if not isinstance(activations, Tensor):
        raise SplitError(f"expected layer '{layer}' to give one tensor, got {type(activations).__name__}")
    if activations.ndim not in (2, 4):
        raise SplitError(
            f"expected activations [B, N] or [B, N, H, W] at '{layer}', got {list(activations.shape)}; "
            "choose a layer whose output has channels in dimension 1"
        )


def _check_bypass(bypass: Sequence[object], batch: int, layer: str) -> None:
    for value in bypass:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch:
            raise SplitError(
                f"a value that is not a batch of tensors ({type(value).__name__}) is computed before '{layer}' and "
                "used after it; choose another layer, or compute the value (a batch size, say) where it is used"
            )


def _is_affine(tail: fx.GraphModule, shape: torch.Size) -> bool:
    """Whether the tail is an affine map: measured, in float64, at several scales and of both signs."""
    try:
        probe = copy.deepcopy(tail).double()
        generator = torch.Generator().manual_seed(0)
        device = next(tail.parameters(), torch.empty(0)).device
        for scale in (1e-3, 1.0, 1e3, 1e6):
            a, b = (scale * torch.randn(2, 4, *shape, generator=generator, dtype=torch.float64)).to(device)
            with torch.no_grad():
                zero, fa, fb, fab = (probe(v) for v in (torch.zeros_like(a), a, b, a + b))
            magnitude = torch.stack([zero, fa, fb, fab]).abs().max()
            if not bool((fab - fa - fb + zero).abs().max() <= 1e-9 * magnitude):  # also when it is NaN
                return False
    except (RuntimeError, TypeError):  # a dtype or size fixed in the tail: the general method still works
        return False
    return True
