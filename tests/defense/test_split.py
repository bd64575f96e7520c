import pytest
import torch
from torch import Tensor, nn

from defense import SplitClassifier, SplitError
from toy_models import PixelNet, small_conv_net


@pytest.mark.parametrize("layer", [None, "conv1", "conv2", "bn", "pool", "hidden", "hidden:input", "linear:input"])
def test_trunk_and_tail_compose_to_the_model_exactly(layer: str | None) -> None:
    model, images = small_conv_net(), torch.rand(5, 3, 8, 8)
    split = SplitClassifier(model, layer)
    assert torch.equal(split(images), model(images))


def test_default_layer_is_the_input_of_the_final_linear_layer() -> None:
    split = SplitClassifier(small_conv_net())
    assert (split.layer, split.num_neurons, split.num_classes) == ("linear:input", 8, 4)


def test_the_layer_a_split_reports_gives_the_same_split_again() -> None:
    model = nn.Sequential(small_conv_net())
    split = SplitClassifier(model, "conv2")
    again = SplitClassifier(model, split.layer)
    assert again.layer == split.layer == "0.conv2"
    assert torch.equal(again.trunk(torch.ones(1, 3, 8, 8)), split.trunk(torch.ones(1, 3, 8, 8)))


def test_activations_are_the_output_of_the_named_layer() -> None:
    model, images = small_conv_net(), torch.rand(2, 3, 8, 8)
    assert torch.equal(SplitClassifier(model, "conv1").trunk(images), model.conv1(images))
    assert torch.equal(SplitClassifier(model, "conv2:input").trunk(images), model.conv1(images).relu())


def test_a_skip_connection_around_the_layer_is_carried_along() -> None:
    split = SplitClassifier(small_conv_net(), "conv2")
    activations, *bypass = split.cut(torch.rand(2, 3, 8, 8))
    assert split.has_bypass and len(bypass) == 1
    assert not torch.equal(split.tail(activations * 0, *bypass), split.tail(activations, *bypass))


def test_unknown_layer_error_lists_the_layers() -> None:
    with pytest.raises(SplitError, match=r"named 'layer9', found none; the layers are: conv1, .*linear"):
        SplitClassifier(small_conv_net(), "layer9")


def test_ambiguous_layer_error_lists_the_candidates() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = PixelNet([[1.0, 2.0]]), PixelNet([[3.0, 4.0]])

        def forward(self, images: Tensor) -> Tensor:
            return self.left(images) + self.right(images)

    with pytest.raises(SplitError, match=r"several: left\.features, right\.features"):
        SplitClassifier(Twins(), "features")


def test_untraceable_model_error_names_the_operation_and_the_way_out() -> None:
    class DataDependent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            if images.sum() > 0:
                images = -images
            return self.linear(images.flatten(1))

    with pytest.raises(SplitError, match=r"in forward: `if images.sum\(\) > 0:`.*Way out"):
        SplitClassifier(DataDependent())


def test_a_layer_called_twice_is_refused() -> None:
    class Shared(PixelNet):
        def forward(self, images: Tensor) -> Tensor:
            return self.linear(self.features(images)) + self.linear(self.features(-images))

    with pytest.raises(SplitError, match="called once"):
        SplitClassifier(Shared([[1.0, 2.0]]), "features")


def test_a_batch_size_used_across_the_split_is_refused() -> None:
    class SizeAcross(PixelNet):
        def forward(self, images: Tensor) -> Tensor:
            batch = images.shape[0]
            return self.linear(self.features(images.view(batch, -1)).view(batch, -1))

    with pytest.raises(SplitError, match="not a batch of tensors"):
        SplitClassifier(SizeAcross([[1.0, 2.0], [3.0, 4.0]]), "features")


def test_directly_read_parameters_go_with_the_part_that_uses_them() -> None:
    class Scaled(PixelNet):
        def __init__(self) -> None:
            super().__init__([[1.0, 2.0], [3.0, 4.0]])
            self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))

        def forward(self, images: Tensor) -> Tensor:
            return self.linear(self.features(images * self.scale)) * self.scale

    model = Scaled()
    split = SplitClassifier(model, "features")
    assert not split.has_bypass
    assert torch.equal(split(torch.ones(1, 1, 1, 2)), model(torch.ones(1, 1, 1, 2)))


@pytest.mark.parametrize(
    ("tail", "affine"),
    [
        (nn.Linear(4, 3), True),
        (nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), True),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)), True),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), False),
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)), False),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), False),
        (nn.Sequential(nn.Linear(4, 3), nn.Hardtanh(-1e4, 1e4)), False),
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), False),
    ],
)
def test_an_affine_tail_is_recognized_by_what_it_computes(tail: nn.Module, affine: bool) -> None:
    split = SplitClassifier(nn.Sequential(nn.Flatten(), tail), "0", input_size=(1, 2, 2))
    assert split.tail_is_affine is affine


def test_split_stays_in_eval_mode() -> None:
    split = SplitClassifier(small_conv_net(), "conv1")
    split.train()
    assert not any(module.training for module in split.modules())


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2", "vgg11_bn", "mobilenet_v3_small", "densenet121"])
def test_torchvision_models_split_exactly(name: str) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(name, weights=None, num_classes=7).eval()
    split = SplitClassifier(model, input_size=(3, 64, 64))
    images = torch.rand(2, 3, 64, 64)
    assert split.num_classes == 7
    assert torch.equal(split(images), model(images))


def test_output_without_channels_is_refused() -> None:
    with pytest.raises(SplitError, match=r"\[B, N\] or \[B, N, H, W\] at '0'"):
        SplitClassifier(nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(4, 2)), "0", input_size=(1, 2, 2))
