"""The two models that speed is measured on, as model directories."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from defense import NeuronImportance, SplitClassifier, load_classifier, load_importance
from defense.resnet import CifarResNet
from service.engine import choose_dtype
from service.predictor import Predictor, ServedDefense

BUNDLED = Path(__file__).parents[1] / "models" / "fashion-mnist"

_TOML = """
name = "resnet18-w64"
labels = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

[architecture]
name = "cifar-resnet"
width = 64

[input]
size = [32, 32]
channels = 3

[defense]
top_k = 50
sigma = 0.0157
"""


def resnet18_directory(directory: Path) -> Path:
    """The paper's ResNet-18 (width 64, 32 x 32) with random weights and a random importance: speed is the same.

    Its probe images are for what needs some; to random weights all images are of one class, in any precision.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    (directory / "model.toml").write_text(_TOML)
    save_file(CifarResNet(width=64).state_dict(), directory / "weights.safetensors")
    split = SplitClassifier(load_classifier(directory))
    scores = torch.rand(split.num_classes, split.num_neurons)
    importance = NeuronImportance(scores, "random", split.layer, split.model_digest)
    (directory / "importance.safetensors").write_bytes(importance.to_bytes())
    pictures = torch.from_numpy(np.stack(_smooth_pictures(32)))
    save_file({"images": pictures, "labels": torch.zeros(len(pictures)).long()}, directory / "probe.safetensors")
    return directory


def settings_of(model: Path) -> dict[str, str]:
    """The settings that it is served with; explicit ones of the large network, so that what cannot be is an error."""
    return {} if model == BUNDLED else {"dtype": choose_dtype_name(), "compile": "openvino"}


def predictor_of(model: Path, dtype: str, compiler: str, *, int8: bool = False) -> tuple[Predictor, ServedDefense]:
    """The engine, in this process, with the model directory's importance."""
    predictor = Predictor(model, dtype=dtype, compiler=compiler, int8_first_pass=int8)
    importance = load_importance(model)
    assert importance is not None
    defense = predictor.prepare("benchmark", importance)
    # A fall-back for the answers' sake would be measured under this one's name.
    assert dtype in ("auto", str(defense.dtype).removeprefix("torch.")), defense.engine.name
    assert compiler in ("auto", defense.compiler), defense.engine.name
    return predictor, defense


def pixels_of(predictor: Predictor, batch: int) -> list[NDArray[np.uint8]]:
    """So many images of the network's size, at random."""
    channels, height, width = predictor.config.input.shape
    return list(np.random.default_rng(0).integers(0, 256, (batch, height, width, channels), np.uint8))


def choose_dtype_name() -> str:
    """What ``dtype=auto`` would choose here."""
    return str(choose_dtype("auto", torch.device("cpu"))).removeprefix("torch.")


def sample_files(model: Path) -> Path:
    """A directory of PNG files of the network's size, for clients to send: the samples, or random pictures."""
    directory = Path(tempfile.gettempdir()) / "ig-defense-benchmark" / f"{model.name}-samples"
    directory.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(_pictures(model)):
        Image.fromarray(pixels).save(directory / f"{i:02}.png")
    return directory


def _pictures(model: Path) -> list[NDArray[np.uint8]]:
    samples = sorted((model / "samples").glob("*.png"))
    if samples:
        return [np.asarray(Image.open(path)) for path in samples]
    return _smooth_pictures(16)


def _smooth_pictures(number: int) -> list[NDArray[np.uint8]]:
    """As smooth as photographs are: noise would not compress."""
    coarse = np.random.default_rng(0).integers(0, 256, (number, 4, 4, 3), np.uint8)
    return [np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC)) for picture in coarse]


def models() -> dict[str, Path]:
    """Name -> model directory: the large one, made in a temporary directory, and the bundled small one."""
    large = resnet18_directory(Path(tempfile.gettempdir()) / "ig-defense-benchmark" / "resnet18-w64")
    return {"ResNet-18, width 64, 32x32": large, "bundled (width 16, 28x28)": BUNDLED}
