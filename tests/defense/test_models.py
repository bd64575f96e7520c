from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from defense import ModelDirectoryError, ProbeSetError, load_classifier, load_probe_set, read_config
from defense.models import Normalize
from defense.resnet import CifarResNet

TOML = """
name = "tiny"
labels = ["cat", "dog", "fox"]

[architecture]
name = "cifar-resnet"
width = 2
blocks = [1, 1, 1, 1]

[input]
size = [8, 8]
channels = 3
mean = [0.5, 0.4, 0.3]
std = [0.2, 0.3, 0.4]

[defense]
layer = "layer4"
top_k = 4
"""


@pytest.fixture
def network() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(width=2, num_classes=3, blocks=(1, 1, 1, 1)).eval()


@pytest.fixture
def directory(tmp_path: Path, network: CifarResNet) -> Path:
    (tmp_path / "model.toml").write_text(TOML)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


def test_the_classifier_normalizes_inside(directory: Path, network: CifarResNet) -> None:
    images = torch.rand(2, 3, 8, 8)
    normalized = (images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    assert torch.equal(load_classifier(directory)(images), network(normalized))


def test_normalization_is_per_channel() -> None:
    assert Normalize((0.5, 0.0), (0.5, 2.0))(torch.ones(1, 2, 1, 1)).flatten().tolist() == [1.0, 0.5]


def test_pt_weights_load_like_safetensors(directory: Path, network: CifarResNet) -> None:
    (directory / "weights.safetensors").unlink()
    torch.save(network.state_dict(), directory / "weights.pt")
    images = torch.rand(1, 3, 8, 8)
    assert load_classifier(directory)(images).shape == (1, 3)


def test_a_pickle_is_never_run(directory: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.touch, (Path(directory / "owned"),)

    (directory / "weights.safetensors").unlink()
    torch.save({"conv1.weight": Exploit()}, directory / "weights.pt")
    with pytest.raises(ModelDirectoryError, match="cannot be read"):
        load_classifier(directory)
    assert not (directory / "owned").exists()


def test_every_missing_and_unexpected_key_is_listed(directory: Path, network: CifarResNet) -> None:
    weights = network.state_dict()
    weights["extra.weight"] = torch.ones(1)
    weights["linear.bias"] = torch.ones(5)
    del weights["conv1.weight"], weights["bn1.bias"]
    save_file(weights, directory / "weights.safetensors")
    with pytest.raises(ModelDirectoryError) as error:
        load_classifier(directory)
    for problem in ("missing key bn1.bias", "missing key conv1.weight", "unexpected key extra.weight", "got [5]"):
        assert problem in str(error.value)


def test_module_prefixed_checkpoints_do_not_load_silently(directory: Path, network: CifarResNet) -> None:
    save_file({f"module.{k}": v for k, v in network.state_dict().items()}, directory / "weights.safetensors")
    with pytest.raises(ModelDirectoryError, match=r"unexpected key module\.bn1\.bias"):
        load_classifier(directory)


def test_torchvision_models_load_by_name(tmp_path: Path) -> None:
    from torchvision.models import get_model

    network = get_model("mobilenet_v3_small", weights=None, num_classes=3)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    toml = 'name = "m"\nlabels = ["a", "b", "c"]\n[architecture]\nname = "torchvision/mobilenet_v3_small"\n'
    (tmp_path / "model.toml").write_text(toml + "[input]\nsize = [64, 64]\n")
    assert load_classifier(tmp_path)(torch.rand(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"cifar-resnet"', '"resnet-9000"', "one of cifar-resnet, torchvision/<name>, got 'resnet-9000'"),
        ('"cifar-resnet"', '"torchvision/resnet-9000"', "Unknown model"),
        ("width = 2", "depth = 2", "unexpected keyword argument 'depth'"),
        ("size = [8, 8]", "size = [8]", "input.size"),
        ("std = [0.2, 0.3, 0.4]", "", "mean and std together"),
        ("std = [0.2, 0.3, 0.4]", "std = [0.2]", "std to have 3 values"),
        ("channels = 3", "channels = 2", "channels = 1"),
        ('"dog"', '"cat"', "these stand twice: cat"),
        ("top_k = 4", "top_k = 0", "defense.top_k"),
        ("top_k = 4", "topk = 4", "defense.topk"),
        ('name = "tiny"', 'name = "../etc"', "name"),
        ("[input]", "[input", "not valid TOML"),
    ],
)
def test_a_wrong_model_toml_says_what_is_wrong(directory: Path, old: str, new: str, message: str) -> None:
    (directory / "model.toml").write_text(TOML.replace(old, new, 1))
    with pytest.raises(ModelDirectoryError, match=message):
        load_classifier(directory)


def test_a_directory_without_model_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match=r"expected a model directory with model\.toml"):
        read_config(tmp_path / "nowhere")


def test_a_directory_without_weights_is_refused(directory: Path) -> None:
    (directory / "weights.safetensors").unlink()
    with pytest.raises(ModelDirectoryError, match="found neither"):
        load_classifier(directory)


def test_damaged_weights_are_refused(directory: Path) -> None:
    (directory / "weights.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelDirectoryError, match="cannot be read"):
        load_classifier(directory)


def test_the_probe_set_comes_in_batches_of_unit_range_images(directory: Path) -> None:
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    save_file({"images": images, "labels": torch.arange(5) % 3}, directory / "probe.safetensors")
    probe = load_probe_set(directory)
    batches = list(probe.batches(2))
    assert [len(labels) for _, labels in batches] == [2, 2, 1] and len(probe) == 5
    assert torch.equal(batches[1][0][0], images[2].permute(2, 0, 1) / 255)


@pytest.mark.parametrize(
    "tensors",
    [
        {"images": torch.zeros(2, 8, 8, 3), "labels": torch.zeros(2, dtype=torch.int64)},
        {"images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "labels": torch.zeros(3, dtype=torch.int64)},
        {"images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8)},
    ],
)
def test_a_probe_set_of_a_wrong_form_is_refused(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "probe.safetensors")
    with pytest.raises(ProbeSetError, match="expected"):
        load_probe_set(directory)


def test_a_missing_probe_set_is_refused(directory: Path) -> None:
    with pytest.raises(ProbeSetError, match="found none"):
        load_probe_set(directory)
