"""Networks small enough that their answers are computed on paper."""

import torch
from torch import Tensor, nn

from defense import NeuronImportance, SplitClassifier


class PixelNet(nn.Module):
    """Neurons are the pixels of a 1 x 1 x N image; logits are ``relu(pixels) @ weight.T + bias``."""

    def __init__(self, weight: list[list[float]], bias: list[float] | None = None) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.ReLU())
        self.linear = nn.Linear(len(weight[0]), len(weight))
        self.linear.weight.data = torch.tensor(weight)
        self.linear.bias.data = torch.tensor(bias or [0.0] * len(weight))
        self.input_size = (1, 1, len(weight[0]))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.features(images))


class SmallConvNet(nn.Module):
    """Two convolutions with a skip connection around the second, pooling, two linear layers; random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(24, 8)
        self.linear = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).relu()
        x = x + self.bn(self.conv2(x)).relu()
        return self.linear(self.hidden(self.pool(x).flatten(1)).relu())


def small_conv_net(seed: int = 0) -> SmallConvNet:
    torch.manual_seed(seed)
    return SmallConvNet().eval()


def importance_of(split: SplitClassifier, scores: list[list[float]] | Tensor) -> NeuronImportance:
    return NeuronImportance(torch.as_tensor(scores), method="lo-ir", layer=split.layer, model_digest=split.model_digest)
