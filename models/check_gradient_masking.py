"""Does PGD tell the truth about a Fashion-MNIST classifier? Stronger attacks, one of them without gradients.

    python models/check_gradient_masking.py models/fashion-mnist --limit 500

Where an attack without gradients breaks images that those with gradients do not, the gradients are masked (arXiv
1802.00420), and accuracy under PGD flatters. All attacks have the same L-infinity radius; an image counts only if it
withstands all so far. The attacks are plain and short, and their worst case is an upper bound of the robustness.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluate_robustness import load_model, report
from fashion_mnist_data import find_data, load_split, to_input
from rich.progress import track
from torch import Tensor, nn
from train_fashion_mnist import EPSILON

Loss = Callable[[Tensor, Tensor], Tensor]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the best wrong logit exceeds the right one, [B]; above 0 the image is misclassified."""
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return others.max(dim=1).values - own


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each image, [B]."""
    return F.cross_entropy(logits, labels, reduction="none")


def gradient_attack(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, *, steps: int, step: float, decay: bool
) -> Tensor:
    """Which images [B] withstand PGD, at every step of it; with ``decay`` the steps shrink linearly to 0."""
    low, high = (x - EPSILON).clamp(min=0), (x + EPSILON).clamp(max=1)
    adversarial, withstood = low + (high - low) * torch.rand_like(x), torch.ones(len(x), dtype=torch.bool)
    for i in track(range(steps), description=f"PGD-{steps}", transient=True):
        adversarial.requires_grad_(True)
        logits = model(adversarial)
        withstood &= logits.argmax(1) == y
        (gradient,) = torch.autograd.grad(loss(logits, y).sum(), adversarial)
        size = step * (1 - i / steps) if decay else step
        adversarial = (adversarial.detach() + size * gradient.sign()).clamp(low, high)
    return withstood & (model(adversarial).argmax(1) == y)


@torch.no_grad()
def square_attack(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, queries: int, *, epsilon: float = EPSILON
) -> tuple[Tensor, Tensor]:
    """A random search: squares of shrinking size, kept where the margin grows, until an image is misclassified.

    After Square Attack (arXiv 1912.00049); one square's place serves all images, its sign is drawn for each.

    Args:
        model: what is asked: images [B, 1, H, W] to logits or probabilities [B, C].

    Returns:
        The best images found, and which of them [B] were still classified correctly.
    """
    side = x.shape[-1]
    adversarial = (x + epsilon * torch.randn(len(x), 1, 1, side).sign()).clamp(0, 1)
    best = margin(model(adversarial), y)
    for i in track(range(queries), description="squares", transient=True):
        todo = (best < 0).nonzero().flatten()
        if not len(todo):
            break
        size = max(1, round(side * (0.3 * 0.5 ** (6 * i / queries)) ** 0.5))
        row, column = torch.randint(0, side - size + 1, (2,)).tolist()
        square = (..., slice(row, row + size), slice(column, column + size))
        candidate = adversarial[todo]
        candidate[square] = (x[todo][square] + epsilon * torch.randn(len(todo), 1, 1, 1).sign()).clamp(0, 1)
        value = margin(model(candidate), y[todo])
        better = value > best[todo]
        adversarial[todo[better]], best[todo[better]] = candidate[better], value[better]
    return adversarial, best < 0


def main() -> None:
    """Attack and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the idx files (default: Debian's, else a download)")
    parser.add_argument("--limit", type=int, default=500, help="use the first test images only")
    parser.add_argument("--queries", type=int, default=1000, help="of the search without gradients")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images, labels = load_split(find_data(arguments.data), train=False)
    x, y = to_input(images[: arguments.limit]), labels[: arguments.limit]
    model = load_model(arguments.directory)
    withstood = model(x).argmax(1) == y
    print(report("clean", int(withstood.sum()), len(y)))
    squares = withstood & square_attack(model, x, y, arguments.queries)[1]
    print(report("squares, without gradients, alone", int(squares.sum()), len(y)))
    attacks = (("cross-entropy", cross_entropy, 20, 0.01, False), ("margin", margin, 40, 0.05, True),
               ("cross-entropy, decaying step", cross_entropy, 60, 0.1, True))  # fmt: skip
    for name, loss, steps, step, decay in attacks:
        withstood &= gradient_attack(model, x, y, loss, steps=steps, step=step, decay=decay)
        print(report(f"and PGD-{steps} on the {name}", int(withstood.sum()), len(y)))
    print(report("worst case of all", int((withstood & squares).sum()), len(y)))


if __name__ == "__main__":
    main()
