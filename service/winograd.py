"""Convolutions of 3 x 3 positions with fewer multiplications, by Winograd's minimal filtering; in float32.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), F(4 x 4, 3 x 3): a map is cut into
tiles of 6 x 6 positions that overlap by two; tiles and kernels are transformed; what was a convolution is then a
product of matrices for each of a tile's 36 positions, and the products are transformed back to 4 x 4 values, which by
the definition take 144 multiplications. OpenVINO's kernels do not do this.

In float32 the values differ by some 1e-6 of themselves from those of direct convolutions. In bfloat16 the error would
be nine times theirs; with tiles of 2 x 2 values it would be twice theirs, for a gain of 3 to 6%. Kernels are four times
as large as the weights.
"""

from collections.abc import Iterator, Sequence
from math import ceil, prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.convolutions import MapSize, is_plain, sized_convolutions, with_replaced

MIN_CHANNELS = 64  # in and out: with fewer, the transforms take longer than what is saved
LARGEST_MAPS = (64, 256)  # positions of the largest maps that are worth a trial: which these are is the machine's

TILE = 4  # values in each direction

# Of one dimension: the paper's B^T, G and A^T.
TO_TILES = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
TO_KERNELS = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
FROM_TILES = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


class WinogradConvolution(nn.Module):
    """What ``convolution`` does to inputs [B, C, height, width] of one size.

    Positions come first in all that lies between, so that a tile's are the matrices of one batched product.

    Args:
        convolution: of 3 x 3 positions, one by one, in one group. size: height and width of the input.
        out_size: of the output.
    """

    def __init__(self, convolution: nn.Conv2d, size: MapSize, out_size: MapSize) -> None:
        super().__init__()
        to_tiles, to_kernels, from_tiles = (
            torch.tensor(m, dtype=torch.float32) for m in (TO_TILES, TO_KERNELS, FROM_TILES)
        )
        weight = convolution.weight.detach()
        kernels = torch.einsum("ia,ocab,jb->ijco", to_kernels, weight, to_kernels).flatten(0, 1)
        self.kernels, self.bias = nn.Parameter(kernels.contiguous(), requires_grad=False), convolution.bias
        self._size, self._out_size = size, out_size
        self._channels, self._out_channels = convolution.in_channels, convolution.out_channels
        places = _tile_places(size, out_size, cast(tuple[int, int], convolution.padding))
        rows, columns = ceil(out_size[0] / TILE), ceil(out_size[1] / TILE)
        self._num_values = TILE * TILE * rows * columns
        # Values come as [TILE, TILE, rows, columns]; the map has them row by row.
        order = torch.arange(self._num_values).view(TILE, TILE, rows, columns).permute(2, 0, 3, 1)
        order = order.reshape(rows * TILE, columns * TILE)[: out_size[0], : out_size[1]]
        self.register_buffer("places", places.flatten(), persistent=False)
        self.register_buffer("order", order.flatten(), persistent=False)
        self.register_buffer("to_tiles", torch.kron(to_tiles, to_tiles), persistent=False)
        self.register_buffer("from_tiles", torch.kron(from_tiles, from_tiles), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The same, [B, O, *out_size]."""
        number, places, order = len(self.kernels), cast(Tensor, self.places), cast(Tensor, self.order)
        positions = images.permute(2, 3, 0, 1).reshape(prod(self._size), -1, self._channels)
        patches = F.pad(positions, (0, 0, 0, 0, 1, 0)).index_select(0, places)  # before them one of zeros
        tiles = (cast(Tensor, self.to_tiles) @ patches.reshape(number, -1)).reshape(number, -1, self._channels)
        products = (tiles @ self.kernels).reshape(number, -1)
        values = (cast(Tensor, self.from_tiles) @ products).reshape(self._num_values, -1, self._out_channels)
        ordered = values.index_select(0, order)
        if self.bias is not None:
            ordered = ordered + self.bias
        return ordered.reshape(*self._out_size, -1, self._out_channels).permute(2, 3, 0, 1)


def _tile_places(size: MapSize, out_size: MapSize, padding: tuple[int, int]) -> Tensor:
    """Where a tile's positions are on the map, [positions of a tile, tiles]: from 1 on, and 0 for those beside it."""
    (height, width), side = size, TILE + 2
    numbers = torch.arange(1, 1 + height * width).view(height, width)
    rows, columns = (ceil(values / TILE) for values in out_size)
    beyond_rows = rows * TILE + 2 - height - padding[0]
    beyond_columns = columns * TILE + 2 - width - padding[1]
    padded = F.pad(numbers, (padding[1], beyond_columns, padding[0], beyond_rows))
    tiles = padded.unfold(0, side, TILE).unfold(1, side, TILE)  # [rows, columns, side, side]
    return tiles.permute(2, 3, 0, 1).reshape(side * side, rows * columns)


def winograd_variants(part: nn.Module, dtype: torch.dtype, examples: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Copies of the part with the convolutions of its smallest maps replaced, more of them in each; or none.

    Args:
        part: in eval mode. dtype: that it will be computed in. examples: inputs, of the size that all will have.
    """
    if dtype != torch.float32:
        return
    sized = sized_convolutions(part, examples, _can)
    replaced: set[str] = set()
    for positions in LARGEST_MAPS:
        chosen = {name: s for name, s in sized.items() if prod(s.out_size) <= positions}
        if chosen.keys() != replaced:
            replaced = set(chosen)
            yield with_replaced(part, {name: WinogradConvolution(*s) for name, s in chosen.items()})


def _can(convolution: nn.Conv2d) -> bool:
    """Whether this is a convolution that it is for, and large enough to gain."""
    geometry = convolution.kernel_size, convolution.stride, convolution.dilation
    channels = min(convolution.in_channels, convolution.out_channels)
    return is_plain(convolution) and geometry == ((3, 3), (1, 1), (1, 1)) and channels >= MIN_CHANNELS
