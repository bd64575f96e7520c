"""Putting other modules in place of a network's convolutions."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

MapSize = tuple[int, int]  # height and width


class SizedConvolution(NamedTuple):
    """A convolution, and the only size of maps that it sees, and that it gives."""

    convolution: nn.Conv2d
    size: MapSize
    out_size: MapSize


def is_plain(convolution: nn.Conv2d) -> bool:
    """Whether it is in one group, and padded with a given number of zeros."""
    zeros = convolution.padding_mode == "zeros" and isinstance(convolution.padding, tuple)
    return zeros and convolution.groups == 1


def sized_convolutions(
    part: nn.Module, examples: Sequence[Tensor], wanted: Callable[[nn.Conv2d], bool]
) -> dict[str, SizedConvolution]:
    """Name -> convolution, of those that are wanted and see maps of one size.

    Args:
        part: in eval mode. examples: inputs, of the size that all will have.
    """
    sizes: dict[nn.Module, set[tuple[MapSize, MapSize]]] = {}

    def note(convolution: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.setdefault(convolution, set()).add((_map_size(inputs[0]), _map_size(output)))

    candidates = {name: m for name, m in part.named_modules() if isinstance(m, nn.Conv2d) and wanted(m)}
    if not candidates:
        return {}
    hooks = [convolution.register_forward_hook(note) for convolution in candidates.values()]
    with torch.no_grad():
        part(*examples)
    for hook in hooks:
        hook.remove()
    return {
        name: SizedConvolution(convolution, *next(iter(sizes[convolution])))
        for name, convolution in candidates.items()
        if len(sizes.get(convolution, ())) == 1
    }


def with_replaced(part: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """The part itself if nothing is to be replaced, else a copy."""
    if not replacements:
        return part
    changed = copy.deepcopy(part)
    for name, module in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(changed.get_submodule(parent), child, module)
    return changed


def _map_size(maps: Tensor) -> MapSize:
    height, width = maps.shape[2:]
    return height, width
