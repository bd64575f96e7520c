"""Winograd's convolutions give what the convolutions give that they stand for."""

import numpy as np
import pytest
import torch
from torch import nn

from service import winograd
from service.winograd import WinogradConvolution, winograd_variants

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def test_the_transforms_are_a_convolution_of_one_dimension():
    to_tiles, to_kernels, from_tiles = map(np.array, (winograd.TO_TILES, winograd.TO_KERNELS, winograd.FROM_TILES))
    signal, kernel = np.random.default_rng(0).normal(size=6), np.random.default_rng(1).normal(size=3)

    values = from_tiles @ ((to_kernels @ kernel) * (to_tiles @ signal))

    np.testing.assert_allclose(values, np.correlate(signal, kernel, "valid"), rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("padding", "size"),
    [
        (1, (4, 4)),
        (1, (8, 8)),
        (1, (7, 5)),  # tiles hang over both edges
        (1, (1, 1)),
        (0, (6, 9)),
        (2, (3, 4)),  # a tile of padding alone
        ((0, 1), (5, 2)),
    ],
)
def test_it_gives_what_the_convolution_gives(padding, size, bias):
    convolution = nn.Conv2d(3, 5, 3, padding=padding, bias=bias)
    images = torch.randn(4, 3, *size)
    expected = convolution(images)

    winograd_s = WinogradConvolution(convolution, size, (expected.shape[2], expected.shape[3]))

    torch.testing.assert_close(winograd_s(images), expected, **TOLERANCE)
    torch.testing.assert_close(winograd_s(images[:1]), expected[:1], **TOLERANCE)
    assert winograd_s(images[:0]).shape == (0, *expected.shape[1:])


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # of too few channels
        nn.Conv2d(8, 8, 3, padding=1),  # 16 x 16 positions
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1)),  # 8 x 8
        nn.Conv2d(16, 4, 3),  # to too few
    ).eval()


def test_each_variant_replaces_those_of_larger_maps_too_and_nothing_else(monkeypatch):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 8)
    part, images = small_network(), torch.randn(3, 3, 16, 16)

    variants = list(winograd_variants(part, torch.float32, [images[:2]]))

    replaced = [[n for n, m in v.named_modules() if isinstance(m, WinogradConvolution)] for v in variants]
    assert replaced == [["8.1"], ["1", "8.1"]]
    for variant in variants:
        torch.testing.assert_close(variant(images), part(images), **TOLERANCE)
    assert not any(isinstance(m, WinogradConvolution) for m in part.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions_have_no_variant(dtype, monkeypatch):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 8)
    assert not list(winograd_variants(small_network(), dtype, [torch.randn(2, 3, 16, 16)]))


def test_a_network_without_such_convolutions_has_no_variant():
    assert not list(winograd_variants(small_network(), torch.float32, [torch.randn(2, 3, 16, 16)]))


def test_variants_that_would_be_the_same_are_one(monkeypatch):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 8)

    (variant,) = winograd_variants(small_network(), torch.float32, [torch.randn(2, 3, 8, 8)])

    assert isinstance(variant.get_submodule("1"), WinogradConvolution)


def test_a_resnet_18_s_convolutions_of_small_maps_are_replaced():
    from defense.resnet import CifarResNet

    variants = winograd_variants(CifarResNet(width=64).eval(), torch.float32, [torch.rand(2, 3, 32, 32)])

    replaced = [{n for n, m in v.named_modules() if isinstance(m, WinogradConvolution)} for v in variants]
    small = {f"layer{i}.{name}" for i in (3, 4) for name in ("0.conv2", "1.conv1", "1.conv2")}
    assert replaced == [small, small | {"layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"}]
