"""Convolutions of 3 x 3 positions with fewer multiplications, by Winograd's minimal filtering.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016): a map is cut into tiles that overlap by
two positions; tiles and kernels are transformed by additions; what was a convolution is then a product of matrices for
each position of a tile, and its values are transformed back. Tiles of 2 x 2 values take 16 multiplications where the
definition takes 36, those of 4 x 4 values 36 where it takes 144. OpenVINO's kernels do not do this.

The error grows with the tile: in bfloat16 tiles of 2 double it, and tiles of 4 would make it nine times as large (of
four layers' values: 0.4%, 0.9%, 3.6%), which is too much. In float32 tiles of 4 have an error of some 1e-6.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from math import ceil, prod
from operator import add
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.convolutions import MapSize, sized_convolutions, with_replaced

MIN_CHANNELS = 64  # in and out: with fewer, the transforms take longer than what is saved
LARGEST_MAPS = (64, 256)  # positions of the largest maps that are worth a trial: which these are is the machine's

# Input, kernel and output of one dimension: the paper's B^T, G and A^T.
_TRANSFORMS = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}


class WinogradConvolution(nn.Module):
    """What ``convolution`` does to inputs [B, C, height, width] of one size.

    Positions come first in all that lies between, so that a tile's are the matrices of one batched product.

    Args:
        convolution: of 3 x 3 positions, one by one, in one group. size: height and width of the input.
        out_size: of the output. tile: values in each direction, 2 or 4.
    """

    def __init__(self, convolution: nn.Conv2d, size: MapSize, out_size: MapSize, tile: int) -> None:
        super().__init__()
        to_tiles, to_kernels, from_tiles = (torch.tensor(matrix, dtype=torch.float32) for matrix in _TRANSFORMS[tile])
        weight = convolution.weight.detach()
        kernels = torch.einsum("ia,ocab,jb->ijco", to_kernels, weight, to_kernels).flatten(0, 1)
        self.kernels, self.bias = nn.Parameter(kernels.contiguous(), requires_grad=False), convolution.bias
        self._size, self._out_size = size, out_size
        self._channels, self._out_channels = convolution.in_channels, convolution.out_channels
        self._from_tiles: list[list[float]] = from_tiles.tolist()
        places = _tile_places(size, out_size, tile, cast(tuple[int, int], convolution.padding))
        tiles_down, tiles_across = ceil(out_size[0] / tile), ceil(out_size[1] / tile)
        # [tile, tile, tiles] -> the map, row by row.
        self._num_values = tile * tile * tiles_down * tiles_across
        values = torch.arange(self._num_values).view(tile, tile, tiles_down, tiles_across)
        values = values.permute(2, 0, 3, 1).reshape(tiles_down * tile, tiles_across * tile)
        self.register_buffer("order", values[: out_size[0], : out_size[1]].flatten(), persistent=False)
        both = torch.kron(to_tiles, to_tiles)
        self._sums = bool((both.abs() <= 1).all())
        if self._sums:  # of four positions each: fetched and added where they are, for less than a product takes
            columns = both.nonzero()[:, 1].view(len(both), -1)
            self.register_buffer("factors", both.gather(1, columns).T[:, :, None, None].contiguous(), persistent=False)
            places = places[columns.T]
        else:
            self.register_buffer("to_tiles", both, persistent=False)
            self.register_buffer("from_tiles", torch.kron(from_tiles, from_tiles), persistent=False)
        self.register_buffer("places", places.flatten(-2), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The same, [B, O, *out_size]."""
        positions = images.permute(2, 3, 0, 1).reshape(prod(self._size), -1, self._channels)
        products = self._tiles(F.pad(positions, (0, 0, 0, 0, 1, 0))) @ self.kernels
        values = self._values(products).reshape(self._num_values, -1, self._out_channels)
        ordered = values.index_select(0, cast(Tensor, self.order))
        if self.bias is not None:
            ordered = ordered + self.bias
        return ordered.reshape(*self._out_size, -1, self._out_channels).permute(2, 3, 0, 1)

    def _tiles(self, positions: Tensor) -> Tensor:
        """Positions, before them one of zeros -> transformed tiles, [positions of a tile, tiles * B, C]."""
        size, places = len(self.kernels), cast(Tensor, self.places)
        if self._sums:
            factors = cast(Tensor, self.factors)
            terms = (positions.index_select(0, p).reshape(size, -1, self._channels) for p in places)
            sums: Tensor = reduce(add, (factor * term for factor, term in zip(factors, terms, strict=True)))
            return sums
        tiles = positions.index_select(0, places).reshape(size, -1)
        return (cast(Tensor, self.to_tiles) @ tiles).reshape(size, -1, self._channels)

    def _values(self, products: Tensor) -> Tensor:
        """Products -> values, [positions of a tile, tiles * B, O] each."""
        if not self._sums:
            return cast(Tensor, self.from_tiles) @ products.reshape(len(self.kernels), -1)
        side = len(self._from_tiles[0])
        rows = self._combined(list(products.reshape(side, side, -1, self._out_channels)))
        return torch.stack([value for row in rows for value in self._combined(list(row))])

    def _combined(self, values: list[Tensor]) -> list[Tensor]:
        return [reduce(add, (f * v for f, v in zip(row, values, strict=True) if f)) for row in self._from_tiles]


def _tile_places(size: MapSize, out_size: MapSize, tile: int, padding: tuple[int, int]) -> Tensor:
    """Where a tile's positions are on the map, [positions of a tile, tiles]: from 1 on, and 0 for those beside it."""
    (height, width), side = size, tile + 2
    numbers = torch.arange(1, 1 + height * width).view(height, width)
    rows, columns = (ceil(values / tile) for values in out_size)
    beyond_rows = rows * tile + 2 - height - padding[0]
    beyond_columns = columns * tile + 2 - width - padding[1]
    padded = F.pad(numbers, (padding[1], beyond_columns, padding[0], beyond_rows))
    tiles = padded.unfold(0, side, tile).unfold(1, side, tile)  # [rows, columns, side, side]
    return tiles.permute(2, 3, 0, 1).reshape(side * side, rows * columns)


def winograd_variants(part: nn.Module, dtype: torch.dtype, examples: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Copies of the part with the convolutions of its smallest maps replaced, more of them in each; or none.

    Args:
        part: in eval mode. dtype: that it will be computed in. examples: inputs, of the size that all will have.
    """
    tile = 4 if dtype == torch.float32 else 2
    sized = sized_convolutions(part, examples, _can)
    replaced: set[str] = set()
    for positions in LARGEST_MAPS:
        chosen = {name: s for name, s in sized.items() if prod(s.out_size) <= positions}
        if chosen.keys() != replaced:
            replaced = set(chosen)
            yield with_replaced(part, {name: WinogradConvolution(*s, tile=tile) for name, s in chosen.items()})


def _can(convolution: nn.Conv2d) -> bool:
    """Whether this is a convolution that it is for, and large enough to gain."""
    geometry = convolution.kernel_size, convolution.stride, convolution.dilation, convolution.groups
    plain = geometry == ((3, 3), (1, 1), (1, 1), 1) and convolution.padding_mode == "zeros"
    channels = min(convolution.in_channels, convolution.out_channels)
    return plain and isinstance(convolution.padding, tuple) and channels >= MIN_CHANNELS
