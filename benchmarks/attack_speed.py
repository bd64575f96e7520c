"""What folding, channels last and bfloat16 gain an attack: milliseconds of one gradient with respect to an image.

    python benchmarks/attack_speed.py --model models/fashion-mnist --batch 100

Medians of interleaved turns, as the machine may not be quiet. Also how often both precisions agree on the sign of the
gradient, which is what an L-infinity attack uses of it.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from defense import DefendedClassifier, SplitClassifier, load_classifier, load_importance, read_config
from evaluation.folding import fast_copy


def gradient(model: nn.Module, images: Tensor, bfloat16: bool) -> Tensor:
    """Of the summed log-sum-exp of the logits; one noise draw, the same in every call."""
    torch.manual_seed(0)
    images = images.clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model(images)
    return torch.autograd.grad(logits.float().logsumexp(dim=1).sum(), images)[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("models/fashion-mnist"))
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    config = read_config(arguments.model)
    split = SplitClassifier(load_classifier(arguments.model), config.defense.layer)
    importance = load_importance(arguments.model)
    assert importance is not None, "igd rank --output first"
    plain = DefendedClassifier(split, importance, **config.defense.arguments)
    folded, images = fast_copy(plain), torch.rand(arguments.batch, *config.input.shape)
    ways = {"as it is, float32": (plain, False), "folded, float32": (folded, False), "folded, bfloat16": (folded, True)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.turns):
        for name, (model, bfloat16) in ways.items():
            began = time.perf_counter()
            gradient(model, images, bfloat16)
            times[name].append((time.perf_counter() - began) / arguments.batch * 1000)
    first = statistics.median(times["as it is, float32"])
    print("| defended gradient | ms an image | times as fast |\n|---|---|---|")
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"| {name} | {median:.3f} | {first / median:.2f} |")
    signs = [gradient(folded, images, bfloat16).sign() for bfloat16 in (False, True)]
    print(f"\nsigns of the gradient that agree in both precisions: {(signs[0] == signs[1]).float().mean():.1%}")


if __name__ == "__main__":
    main()
