"""Convolutions of small maps with many weights as products of matrices.

Convolution kernels go through a batch image by image. Where an image has as few as 16 positions, and the weights are
more than a core's cache holds, all weights are fetched from afar for each image: the last layers of a CIFAR ResNet-18
(512 channels, 4 x 4) take four times as long as its first ones for the same arithmetic. One product with a whole
batch's patches fetches them once: 1.6 to 1.8 times as fast from 8 maps on, the whole network 1.1 to 1.2 times; so it is
with AMX. With AVX-512 alone the whole network is slower by it (0.88 to 0.96): ``OpenVinoChain`` tries.
"""

from collections.abc import Sequence
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.convolutions import MapSize, is_plain, sized_convolutions, with_replaced

MAX_POSITIONS = 16  # of the output: with 49 or 64 of them convolutions are faster, whatever the number of weights
MIN_WEIGHTS = 1 << 20  # with fewer, too


class MatrixConvolution(nn.Module):
    """What ``convolution`` does to inputs [B, C, height, width] of one size.

    Args:
        size: height and width of the input. out_size: of the output.
    """

    def __init__(self, convolution: nn.Conv2d, size: MapSize, out_size: MapSize) -> None:
        super().__init__()
        height, width = size
        weight = convolution.weight.detach()
        self.weight = nn.Parameter(weight.permute(0, 2, 3, 1).flatten(1).contiguous(), requires_grad=False)
        self.bias, self._positions, self._out_size = convolution.bias, height * width, out_size
        # Positions are counted from 1: unfold's padding, 0, is where forward puts a row of zeros.
        map_ = torch.arange(1.0, 1 + self._positions).view(1, 1, height, width)
        sizes = convolution.kernel_size, convolution.dilation, cast(tuple[int, int], convolution.padding)
        places = F.unfold(map_, *sizes, convolution.stride)[0].T
        self.register_buffer("places", places.flatten().long(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The same, [B, O, *out_size]."""
        channels, (height, width) = int(images.shape[1]), self._out_size
        rows = images.permute(0, 2, 3, 1).reshape(-1, self._positions, channels)
        patches = F.pad(rows, (0, 0, 1, 0)).index_select(1, cast(Tensor, self.places))
        values = F.linear(patches.reshape(-1, height * width, self.weight.shape[1]), self.weight, self.bias)
        return values.reshape(-1, height, width, self.weight.shape[0]).permute(0, 3, 1, 2)


def with_matrix_products(part: nn.Module, examples: Sequence[Tensor]) -> nn.Module:
    """The part, or a copy of it with those of its convolutions replaced that gain by it.

    Args:
        part: in eval mode. examples: inputs, of the size that all will have.
    """
    products = {
        name: MatrixConvolution(convolution, size, out_size)
        for name, (convolution, size, out_size) in sized_convolutions(part, examples, _gains).items()
        if prod(out_size) <= MAX_POSITIONS
    }
    return with_replaced(part, products)


def _gains(convolution: nn.Conv2d) -> bool:
    """Whether it would on a map that is small enough; a kernel of one position is a product already."""
    return is_plain(convolution) and convolution.kernel_size != (1, 1) and convolution.weight.numel() >= MIN_WEIGHTS
