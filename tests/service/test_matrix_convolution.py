"""Products of matrices give what the convolutions give that they stand for."""

import pytest
import torch
from torch import nn

from service import matrix_convolution
from service.matrix_convolution import MatrixConvolution, with_matrix_products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "size"),
    [
        (3, 1, 1, 1, (4, 4)),
        (3, 2, 1, 1, (8, 8)),
        (3, 2, 1, 1, (7, 6)),
        ((1, 3), (1, 2), (0, 1), 1, (2, 5)),
        (5, 1, 2, 1, (2, 2)),  # more padding than image
        (3, 1, 2, 2, (5, 4)),
        (2, 1, 0, 1, (4, 3)),
    ],
)
def test_it_gives_what_the_convolution_gives(kernel, stride, padding, dilation, size, bias):
    convolution = nn.Conv2d(3, 5, kernel, stride, padding, dilation, bias=bias)
    images = torch.randn(4, 3, *size)
    expected = convolution(images)

    product = MatrixConvolution(convolution, size, (expected.shape[2], expected.shape[3]))

    torch.testing.assert_close(product(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(product(images[:1]), expected[:1], atol=1e-5, rtol=1e-5)


def test_small_maps_with_many_weights_are_replaced_and_nothing_else(monkeypatch):
    monkeypatch.setattr(matrix_convolution, "MIN_WEIGHTS", 500)
    part = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1),  # 8 x 8 positions
        nn.Conv2d(8, 8, 3, stride=2, padding=1),  # this one
        nn.Conv2d(8, 64, 1),  # of one position
        nn.Conv2d(64, 64, 3, padding=1, groups=8),
        nn.Conv2d(64, 2, 3, padding="same"),
        nn.Conv2d(2, 64, 3, padding=1, padding_mode="circular"),
        nn.Sequential(nn.ReLU(), nn.Conv2d(64, 4, 3)),  # this one
        nn.Conv2d(4, 4, 1),
    ).eval()
    images = torch.randn(3, 8, 8, 8)
    expected = part(images)

    replaced = with_matrix_products(part, [images[:2]])

    assert [n for n, m in replaced.named_modules() if isinstance(m, MatrixConvolution)] == ["1", "6.1"]
    torch.testing.assert_close(replaced(images), expected, atol=1e-5, rtol=1e-5)
    assert replaced(images[:0]).shape == (0, 4, 2, 2)
    assert not any(isinstance(m, MatrixConvolution) for m in part.modules())


def test_a_convolution_of_maps_of_two_sizes_stays(monkeypatch):
    monkeypatch.setattr(matrix_convolution, "MIN_WEIGHTS", 500)
    shared = nn.Conv2d(8, 8, 3, padding=1)
    part = nn.Sequential(shared, nn.MaxPool2d(2), shared, nn.Conv2d(8, 8, 3, padding=1)).eval()
    images = torch.randn(3, 8, 4, 4)

    replaced = with_matrix_products(part, [images[:2]])

    assert [n for n, m in replaced.named_modules() if isinstance(m, MatrixConvolution)] == ["3"]
    torch.testing.assert_close(replaced(images), part(images), atol=1e-5, rtol=1e-5)


def test_a_resnet_18_s_last_block_is_replaced():
    from defense.resnet import CifarResNet

    replaced = with_matrix_products(CifarResNet(width=64).eval(), [torch.rand(2, 3, 32, 32)])

    names = [n for n, m in replaced.named_modules() if isinstance(m, MatrixConvolution)]
    assert names == ["layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]
