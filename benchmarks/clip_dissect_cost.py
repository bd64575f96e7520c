"""What scoring neurons with soft-WPMI costs, in time and memory, against the literal loop over neurons.

    python benchmarks/clip_dissect_cost.py [--full]

Features are random: cost does not depend on their values. The loop (one neuron at a time, as the definition reads and
the reference implementation does) is run for a few neurons and extrapolated to all of them: its fixed part (CLIP
similarities, the top images of all neurons) once, its loop N / few times. Each side runs in processes of its own, the
two in turn, on one thread, so that a busy machine does not decide; the fastest of all its runs counts (noise only adds
time) and its largest peak of resident memory. ``inputs`` is the part of that peak before any scoring.
``--full``: 2048 neurons, 1000 classes, 50,000 images (ImageNet's validation set), which must fit in 8 GB.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import write_results
from torch import Tensor

from defense.similarities import soft_wpmi

FEATURES = 512  # of CLIP ViT-B/16
LITERAL_NEURONS = 32
SIZES = {"CIFAR-10, ResNet-18": (512, 10, 10_000), "ImageNet, ResNet-50, 10,000 images": (2048, 1000, 10_000)}
FULL = {"ImageNet, ResNet-50, 50,000 images": (2048, 1000, 50_000)}
LIMIT_GB = 8
PROCESSES, RUNS = 3, 3  # of each side; runs in each process


@dataclass(frozen=True)
class Cost:
    """Seconds, and gigabytes of peak resident memory before and after scoring."""

    seconds: float
    inputs_gb: float
    peak_gb: float


def main() -> None:
    """Compare the two at each size, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the 50,000-image case, too")
    parser.add_argument("--side", nargs=4, metavar=("NAME", "N", "C", "n"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        name, *sizes = arguments.side
        print(json.dumps(_measure(SIDES[name], *map(int, sizes)).__dict__))
        return
    sizes = SIZES | (FULL if arguments.full else {})
    write_results("clip_dissect_cost", [_compare(what, *shape) for what, shape in sizes.items()])


def vectorized(activations: Tensor, images: Tensor, texts: Tensor) -> tuple[Tensor, float]:
    """This project's scoring, with its seconds."""
    started = time.perf_counter()
    return soft_wpmi(activations, images, texts), time.perf_counter() - started


@torch.no_grad()
def literal(activations: Tensor, images: Tensor, texts: Tensor, top_k: int = 100) -> tuple[Tensor, float]:
    """The definition, neuron by neuron, for the first few of them; seconds are extrapolated to all."""
    started = time.perf_counter()
    similarities = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    probabilities = F.softmax(10 * similarities, dim=1)
    top = activations.topk(top_k, dim=0).indices
    p = (0.998 - torch.arange(top_k) / top_k * (0.998 - 0.97)).unsqueeze(1)
    fixed_s, looping = time.perf_counter() - started, time.perf_counter()
    rows = []
    for j in range(LITERAL_NEURONS):
        of_top = probabilities.gather(0, top[:, j : j + 1].expand(-1, probabilities.shape[1]))
        rows.append((1 + p * (of_top - 1) + 1e-7).log().sum(0, keepdim=True))
    loop_s = time.perf_counter() - looping
    return torch.cat(rows), fixed_s + loop_s * activations.shape[1] / LITERAL_NEURONS


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, float]]] = {
    "vectorized": vectorized,
    "literal": literal,
}


def _measure(side: Callable[..., tuple[Tensor, float]], neurons: int, classes: int, images: int) -> Cost:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    activations = torch.rand(images, neurons)
    features = torch.randn(images, FEATURES), torch.randn(classes, FEATURES)
    inputs_gb = _peak_gb()
    fastest_s = min(side(activations, *features)[1] for _ in range(RUNS))
    return Cost(fastest_s, inputs_gb, _peak_gb())


def _peak_gb() -> float:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes on Linux


def _in_a_fresh_process(side: str, *sizes: int) -> Cost:
    command = [sys.executable, __file__, "--side", side, *map(str, sizes)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)  # this script
    return Cost(**json.loads(run.stdout.splitlines()[-1]))


def _summary(costs: list[Cost]) -> Cost:
    return Cost(min(c.seconds for c in costs), max(c.inputs_gb for c in costs), max(c.peak_gb for c in costs))


def _compare(what: str, *sizes: int) -> dict[str, Any]:
    costs: dict[str, list[Cost]] = {side: [] for side in SIDES}
    for _ in range(PROCESSES):
        for side, measured in costs.items():
            measured.append(_in_a_fresh_process(side, *sizes))
    ours, loop = (_summary(measured) for measured in costs.values())
    return {
        "case": what,
        "neurons x classes x images": " x ".join(f"{size:,}" for size in sizes),
        "vectorized s": ours.seconds,
        "literal loop s (extrapolated)": loop.seconds,
        "speed-up": loop.seconds / ours.seconds,
        "inputs GB": ours.inputs_gb,
        "vectorized peak GB": ours.peak_gb,
        "literal peak GB": loop.peak_gb,
        f"fits in {LIMIT_GB} GB": "yes" if ours.peak_gb < LIMIT_GB else "NO",
    }


if __name__ == "__main__":
    main()
