"""What a first pass in int8 changes in the answers, beside what noise changes, and whether attacks gain by it.

    python benchmarks/int8_answers.py --model .igd/cifar10 --data test-2000.tar [-n 1000] [--steps 20] [--queries 300]

First, answers to the same images with the same noise: of engines against PyTorch in float32, and of PyTorch with
another draw of the noise, which is what the method leaves to chance; images are clean, or found by attacks on float32.
Then the same attacks on float32 and on the engine with the first pass in int8, each judged by what it attacks:
gradients are of the float32 model (the undefended one's margin, transferred, and BPDA's on the defense), Square asks
the attacked side. Right is what is right in each of ten draws.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import write_results
from numpy.typing import NDArray
from torch import Tensor, nn

from defense import DefendedClassifier, read_config
from evaluation.attacks import Budget, Effort, attack_by_name
from evaluation.attacks.attack import Attack, Stage
from evaluation.statistics import paired_difference, wilson_interval
from evaluation.test_images import TestImages, open_data
from models import choose_dtype_name, predictor_of
from service.engine import IN_INT8, StageClock
from service.passes import Passes, PyTorchPasses, to_pixels
from service.predictor import DEFAULT_THREADS

BATCH, DRAWS, EOT, BLOCK = 64, 10, 4, 250
EXACT = "float32 by PyTorch"
ATTACKS = ("transfer-cw", "bpda-cw", "square")
DEFENDED, PSEUDO_LABEL, LOGITS = 0, 2, 3  # of passes.ROWS
Pixels = NDArray[np.uint8]
Rows = NDArray[np.float32]
Right = NDArray[np.bool_]


class Side(nn.Module):
    """Logits [B, C] of passes, and their answers; images [B, channels, H, W] are rounded to bytes first."""

    has_noise = True

    def __init__(self, passes: Passes, draws: int) -> None:
        super().__init__()
        self._passes, self._draws = passes, draws

    def forward(self, images: Tensor) -> Tensor:
        pixels = to_pixels(images)
        return torch.from_numpy(self.answers(pixels, self.noise(pixels))[:, LOGITS])

    def noise(self, pixels: Pixels) -> Tensor:
        """A draw, [B, draws, channels, H, W]."""
        count, height, width, channels = pixels.shape
        return torch.randn(count, self._draws, channels, height, width)

    def answers(self, pixels: Pixels, noise: Tensor) -> Rows:
        """[B, 5, C], as ``passes.ROWS`` names them."""
        begins = range(0, len(pixels), BATCH)
        return np.concatenate([self._passes(pixels[i : i + BATCH], noise[i : i + BATCH]) for i in begins])

    def always_right(self, pixels: Pixels, labels: NDArray[np.int64]) -> Right:
        """Whether each image is classified right in each of ``DRAWS`` draws."""
        answers = [self.answers(pixels, self.noise(pixels)) for _ in range(DRAWS)]
        return np.all([_classes(a, DEFENDED) == labels for a in answers], axis=0)


class ByGradientsOf(Attack):
    """An attack with the surrogates of another model than the one that judges it."""

    def __init__(self, attack: Attack, model: nn.Module) -> None:
        super().__init__(attack.effort)
        self._attack, self._model = attack, model

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        return self._attack.stages(model if self._attack.name == "square" else self._model)


def main() -> None:
    """Find the images, ask all sides, print both tables."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    config = read_config(arguments.model)
    dataset = open_data(str(arguments.data), config.labels, arguments.model)
    test = TestImages(dataset, config.input, min(arguments.n, len(dataset)), config.labels)
    labels = test.labels.numpy()
    defended, sides = _sides(arguments.model)
    budget, effort = Budget(arguments.epsilon), Effort(arguments.steps, eot=EOT, queries=arguments.queries)

    def attacked(name: str, side: Side) -> Pixels:
        attack = ByGradientsOf(attack_by_name(name, effort), defended)
        return to_pixels(torch.cat([attack(side, b.images, b.labels, budget) for b in test.blocks(BLOCK)]))

    clean = {EXACT: to_pixels(test.images), IN_INT8: to_pixels(test.images)}
    images = {"clean": clean} | {name: {s: attacked(name, sides[s]) for s in clean} for name in ATTACKS}
    write_results(
        "int8_answers",
        [row for name, found in images.items() for row in _same_images(name, found[EXACT], sides, labels)],
    )
    write_results("int8_attacked", [_own_images(name, found, sides, labels) for name, found in images.items()])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory, with a probe set")
    parser.add_argument("--data", type=Path, required=True, help="labelled images, as for igd evaluate")
    parser.add_argument("--epsilon", type=float, default=8 / 255, help="whole gray levels, or rounding leaves the ball")
    parser.add_argument("-n", type=int, default=1000, help="images")
    parser.add_argument("--steps", type=int, default=20, help="of gradient attacks")
    parser.add_argument("--queries", type=int, default=300, help="of Square for each image, at most")
    return parser.parse_args()


def _sides(model: Path) -> tuple[DefendedClassifier, dict[str, Side]]:
    """The defense in PyTorch; it, its engine with a first pass in int8, and the others, by name."""
    dtypes = dict.fromkeys((choose_dtype_name(), "float32"))
    served = [predictor_of(model, dtype, "openvino", int8=int8) for dtype in dtypes for int8 in (True, False)]
    predictor, defense = served[0]
    if (defense.engine.int8_batch or 0) < BATCH:
        raise SystemExit(f"no first pass of {BATCH} images is in int8 here: it was not quicker")
    torch.set_num_threads(DEFAULT_THREADS)  # engines leave PyTorch one
    defended = DefendedClassifier(predictor.split, defense.importance, **predictor.config.defense.arguments)
    passes = {EXACT: PyTorchPasses(defended, StageClock(torch.device("cpu"))), IN_INT8: defense.passes}
    passes |= {d.engine.name.removeprefix("torch."): d.passes for _, d in served}
    return defended, {name: Side(p, defended.num_noise_samples) for name, p in passes.items()}


def _same_images(name: str, pixels: Pixels, sides: dict[str, Side], labels: NDArray[np.int64]) -> list[dict[str, Any]]:
    exact = sides[EXACT]
    noises = [exact.noise(pixels) for _ in range(DRAWS)]
    expected = [exact.answers(pixels, noise) for noise in noises]
    others = {side: [s.answers(pixels, n) for n in noises] for side, s in sides.items() if side not in (EXACT, IN_INT8)}
    others[f"{EXACT}, another draw"] = [exact.answers(pixels, exact.noise(pixels)) for _ in noises]
    right = np.mean([_classes(e, DEFENDED) == labels for e in expected])
    return [
        {
            "images": name,
            "answers of": side,
            "other prediction %": 100 * _share_of_others(answers, expected, DEFENDED),
            "other pseudo-label %": 100 * _share_of_others(answers, expected, PSEUDO_LABEL),
            "right, one draw %": 100 * np.mean([_classes(a, DEFENDED) == labels for a in answers]),
            f"{EXACT} %": 100 * right,
        }
        for side, answers in others.items()
    ]


def _own_images(
    name: str, found: dict[str, Pixels], sides: dict[str, Side], labels: NDArray[np.int64]
) -> dict[str, Any]:
    exact, in_int8 = (sides[side].always_right(found[side], labels) for side in (EXACT, IN_INT8))
    difference = paired_difference(in_int8, exact)
    points, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    return {
        "images": name,
        "n": len(labels),
        f"{EXACT} % (95%)": _with_interval(exact),
        "int8 first pass % (95%)": _with_interval(in_int8),
        "difference (95%)": f"{points:+.1f} ({low:+.1f} to {high:+.1f})",
        "won / lost": f"{difference.wins} / {difference.losses}",
        "p": difference.p,
    }


def _with_interval(right: Right) -> str:
    low, high = wilson_interval(int(right.sum()), len(right))
    return f"{100 * right.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _classes(answers: Rows, row: int) -> NDArray[np.int64]:
    return answers[:, row].argmax(1)


def _share_of_others(answers: list[Rows], expected: list[Rows], row: int) -> float:
    return float(np.mean([_classes(a, row) != _classes(e, row) for a, e in zip(answers, expected, strict=True)]))


if __name__ == "__main__":
    main()
