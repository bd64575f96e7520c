"""What LO-IR costs at the penultimate layer: against one plain pass, and against the literal leave-one-out loop.

    python benchmarks/rank_cost.py [--pairs 11] [--images 1000]

The plain pass computes the undefended logits of the same probe images in the same batches. The literal loop is the
definition (and the official code): for each neuron, one full pass over the probe images with that neuron zeroed. It is
run for a few neurons and extrapolated to all of them, which is exact up to noise: every neuron costs the same.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from measure import paired_ratio, seconds, write_results
from torch import Tensor, nn

from defense import SplitClassifier, leave_one_out_importance, load_classifier
from defense.resnet import CifarResNet

BATCH = 128
LITERAL_NEURONS = 3


def main() -> None:
    """Measure the bundled model, and the paper's ResNet-18 with random weights: speed does not depend on them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--images", type=int, default=1000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # that random images leave neurons dead is no news
    bundled = load_classifier(Path(__file__).parents[1] / "models" / "fashion-mnist")
    models = {"bundled (ResNet-18, width 16, 28x28)": bundled, "ResNet-18, width 64, 32x32": CifarResNet()}
    rows = [_measure(name, model, arguments.pairs, arguments.images) for name, model in models.items()]
    write_results("rank_cost", rows)


def _measure(name: str, model: nn.Module, pairs: int, num_images: int) -> dict[str, Any]:
    split = SplitClassifier(model)
    size = getattr(model, "input_size", (3, 32, 32))
    images, labels = torch.rand(num_images, *size), torch.arange(num_images) % split.num_classes
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))

    @torch.no_grad()
    def plain_pass() -> None:
        for batch, _ in batches:
            split(batch)

    def literal_seconds() -> float:
        return seconds(lambda: _literal_leave_one_out(split, batches, LITERAL_NEURONS)) / LITERAL_NEURONS

    ratio = paired_ratio(lambda: leave_one_out_importance(split, batches), plain_pass, pairs=pairs)
    literal_s = literal_seconds() * split.num_neurons + ratio.b_s
    return {
        "model": name,
        "images": num_images,
        "neurons": split.num_neurons,
        "plain pass s": ratio.b_s,
        "LO-IR s": ratio.a_s,
        "LO-IR / plain (median)": ratio.median,
        "smallest": ratio.smallest,
        "largest": ratio.largest,
        "literal loop s (extrapolated)": literal_s,
        "speed-up": literal_s / ratio.a_s,
    }


@torch.no_grad()
def _literal_leave_one_out(split: SplitClassifier, batches: list[tuple[Tensor, Tensor]], neurons: int) -> Tensor:
    """Mean own logit without each of the first ``neurons`` neurons: a full pass for each of them."""
    totals = torch.zeros(neurons)
    for j in range(neurons):
        for images, labels in batches:
            activations = split.trunk(images)
            activations[:, j] = 0
            totals[j] += split.tail(activations).gather(1, labels.unsqueeze(1)).sum()
    return totals


if __name__ == "__main__":
    main()
