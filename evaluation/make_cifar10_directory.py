"""Make a model directory of a CIFAR-10 ResNet-18's weights and a tar of training images, with its rankings.

    python -m evaluation.make_cifar10_directory --weights rn18_w16.safetensors --train train.tar --out .igd/cifar10

CIFAR-10 may not be put into this repository, nor may what is derived from it pixel by pixel: keep the directory outside
of git. The probe set is a tenth of the training images, as in the paper, the same number of each class.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from defense import ProbeSet, rank_neurons, read_config
from defense.datasets import DatasetSpec, open_dataset
from defense.importance import IMPORTANCE_FILE
from defense.probe import PROBE_FILE

RANKINGS = {"lo-ir": IMPORTANCE_FILE, "lo-ir-signed": "importance-signed.safetensors"}
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CONFIG = """name = "cifar10-resnet18"
labels = {labels}

[architecture]
name = "cifar-resnet"
width = {width}
blocks = [2, 2, 2, 2]

[input]
size = [32, 32]

[defense]
layer = "layer4"
top_k = {top_k}
temperature = 0.01
sigma = {sigma}
num_noise_samples = 1
"""


def make_directory(weights: Path, train: Path, out: Path, *, share: float = 0.1) -> None:
    """Write model.toml, weights, probe set and both LO-IR rankings.

    Args:
        weights: safetensors of the layers ``conv1, bn1, layer1..4, linear``. train: tar of class folders.
        share: of the training images that the neurons are ranked on.
    """
    out.mkdir(parents=True, exist_ok=True)
    with safe_open(weights, "pt") as tensors:
        width = tensors.get_slice("conv1.weight").get_shape()[0]
    # An eighth of the neurons, near the paper's 50 of 512; sigma is half the epsilon of training, 8/255.
    text = CONFIG.format(labels=list(LABELS), width=width, top_k=width, sigma=4 / 255).replace("'", '"')
    (out / "model.toml").write_text(text, encoding="utf-8")
    shutil.copyfile(weights, out / "weights.safetensors")
    whole = open_dataset("train", {"train": DatasetSpec(kind="tar", path=train.absolute())}, LABELS)
    probe = whole.subset(round(share * len(whole) / len(LABELS)))
    _save_probe_set(probe, out)
    for method, file in RANKINGS.items():
        (out / file).write_bytes(rank_neurons(out, probe, method=method).to_bytes())


def _save_probe_set(probe: ProbeSet, out: Path) -> None:
    config = read_config(out).input
    images = torch.stack([torch.tensor(probe.pixels(i, config)) for i in range(len(probe))])
    save_file({"images": images, "labels": probe.labels}, out / PROBE_FILE)


def main() -> None:
    """Read the arguments and make the directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="tar of class folders")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    make_directory(arguments.weights, arguments.train, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
