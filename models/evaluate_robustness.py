"""Measure a Fashion-MNIST classifier on the test images: clean accuracy and accuracy under PGD.

    python models/evaluate_robustness.py models/fashion-mnist --data DIR

The attack is white-box L-infinity PGD on the cross-entropy of the undefended model in evaluation mode, with one
random start (arXiv 1706.06083). Accuracy under one attack is an upper bound of the robustness: gradients may be
masked (arXiv 1802.00420), as models/fashion-mnist/README.md reports.
Figures come with Wilson's 95% confidence intervals, for the sampling of images.
"""

import argparse
from pathlib import Path

import torch
from fashion_mnist_data import correct, find_data, load_split, pgd, to_input
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from train_fashion_mnist import EPSILON

from defense import load_classifier
from evaluation.statistics import wilson_interval

BATCH = 250


def load_model(directory: Path) -> nn.Module:
    """The trained classifier of a folder, in evaluation mode."""
    return load_classifier(directory).requires_grad_(False)


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, steps: int, step_size: float, seed: int
) -> tuple[int, int]:
    """How many images are classified correctly: as they are, and after the attack."""
    generator = torch.Generator().manual_seed(seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    clean = robust = 0
    with Progress(*columns, TextColumn("eta"), TimeRemainingColumn()) as progress:
        task = progress.add_task(f"PGD-{steps}", total=len(images))
        for batch, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            x = to_input(batch).contiguous(memory_format=torch.channels_last)
            clean += correct(model, x, y)
            attacked = pgd(model, x, y, epsilon=epsilon, steps=steps, step_size=step_size, generator=generator)
            robust += correct(model, attacked, y)
            progress.advance(task, len(y))
    return clean, robust


def report(name: str, successes: int, trials: int) -> str:
    """A line such as ``clean  87.12% (8712/10000), 95% interval 86.45% to 87.76%``."""
    low, high = wilson_interval(successes, trials)
    return f"{name:<8} {successes / trials:.2%} ({successes}/{trials}), 95% interval {low:.2%} to {high:.2%}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Clean and PGD accuracy on the Fashion-MNIST test images.")
    parser.add_argument("directory", type=Path, help="folder of weights.safetensors")
    parser.add_argument("--data", type=Path, help="folder of the idx files (default: Debian's, else a download)")
    parser.add_argument("--epsilon", type=float, default=EPSILON, help="L-infinity radius, for pixels in [0, 1]")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-size", type=float, default=0.01, help="length of a step, for pixels in [0, 1]")
    parser.add_argument("--limit", type=int, help="use the first test images only")
    parser.add_argument("--seed", type=int, default=0, help="of the attack's random start")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    torch.set_flush_denormal(True)  # denormal numbers slow a CPU down many times
    images, labels = load_split(find_data(arguments.data), train=False)
    images, labels = images[: arguments.limit], labels[: arguments.limit]
    model = load_model(arguments.directory).to(memory_format=torch.channels_last)
    attack = {"epsilon": arguments.epsilon, "step_size": arguments.step_size}
    clean, robust = measure(model, images, labels, **attack, steps=arguments.steps, seed=arguments.seed)
    print(report("clean", clean, len(images)))
    print(report(f"PGD-{arguments.steps}", robust, len(images)))
    print(f"epsilon {arguments.epsilon}, step {arguments.step_size}, seed {arguments.seed}, float32")


if __name__ == "__main__":
    main()
