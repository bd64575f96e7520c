"""Attack: what all attacks of the protocol have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from evaluation.attacks.budget import Budget
from evaluation.attacks.optimizers import Optimizer
from evaluation.attacks.surrogates import FixedMask

Stage = tuple[nn.Module, Optimizer]
Precision = Literal["float32", "bfloat16", "bfloat16-queries"]


@dataclass(frozen=True)
class Effort:
    """How hard attacks try; the defaults are AutoAttack's.

    Attributes:
        steps: gradient steps of a run. eot: gradients averaged in each step where noise is attacked.
        targets: classes that targeted attacks and fixed masks go through. queries: of attacks without gradients.
        draws: noise draws that decide which of an attack's images is the worst, and whether one still stands.
        precision: of the gradients, ``"float32"`` or ``"bfloat16"`` (faster where the hardware has it); with
            ``"bfloat16-queries"`` also of what is asked without a gradient. What is found is always judged in float32.
    """

    steps: int = 100
    eot: int = 20
    targets: int = 9
    queries: int = 5000
    draws: int = 5
    precision: Precision = "float32"


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, and what it cost.

    Attributes:
        images: [B, C, H, W], inside the budget. gradient_calls, forward_calls: images that went through a surrogate or
            the model with and without a gradient, all copies counted.
    """

    images: Tensor
    gradient_calls: int
    forward_calls: int


class Attack(ABC):
    """Search, in each image's ball, for an image that a model gets wrong.

    The search is one or more stages, each an optimizer on a surrogate of the model. After each stage the found images
    are judged by the model itself, in several noise draws; of each image the worst is kept, and images that most draws
    get wrong are not attacked any further. The docstring of every attack says what weakness it looks for.

    Args:
        effort: how hard to try.
    """

    name: ClassVar[str]

    def __init__(self, effort: Effort | None = None) -> None:
        self.effort = effort or Effort()

    @abstractmethod
    def stages(self, model: nn.Module) -> Sequence[Stage]:
        """The surrogates to attack, in order, and how."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, budget: Budget, seed: int = 0) -> Tensor:
        """Adversarial images [B, C, H, W] in the budget's ball; the same for the same seed.

        Args:
            images: [B, C, H, W] in [0, 1]. labels: [B], their true classes.
        """
        return self.run(model, images, labels, budget, seed).images

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, budget: Budget, seed: int = 0) -> AttackResult:
        """The same, with what it cost."""
        count, images = _Calls(), images.contiguous()  # pyautoattack takes views of them
        with _seeded(seed), _frozen(model):
            worst = _Worst(_Counted(model, count), images, labels, self.effort.draws)
            for surrogate, optimize in self.stages(model):
                standing = worst.standing()
                if not len(standing):
                    break
                if isinstance(surrogate, FixedMask):
                    surrogate.hold(images[standing], labels[standing])
                counted = _Counted(surrogate, count, self.effort.precision)
                found = optimize(counted, images[standing], labels[standing], budget)
                worst.offer(standing, budget.project(found.detach(), images[standing]))
        return AttackResult(worst.images, count.gradient, count.forward)


class _Worst:
    """Of each image, the candidate that the model got wrong in most draws; among equals, by the largest margin."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, draws: int) -> None:
        self.model, self.labels, self.draws = model, labels, draws
        self.images = images.clone()
        self.wrong, self.margin = self._judge(images, labels)

    def standing(self) -> Tensor:
        """Indices of the images that at least half of the draws get right."""
        return (self.wrong <= 0.5).nonzero().flatten()

    def offer(self, indices: Tensor, candidates: Tensor) -> None:
        wrong, margin = self._judge(candidates, self.labels[indices])
        old_wrong, old_margin = self.wrong[indices], self.margin[indices]
        worse = (wrong > old_wrong) | ((wrong == old_wrong) & (margin > old_margin))
        kept = indices[worse]
        self.images[kept], self.wrong[kept], self.margin[kept] = candidates[worse], wrong[worse], margin[worse]

    @torch.no_grad()
    def _judge(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Share of draws that are wrong, and the mean margin of the wrong classes, [B] each."""
        margins = torch.stack([margin_of(self.model(images), labels) for _ in range(self.draws)])
        return (margins > 0).float().mean(dim=0), margins.mean(dim=0)


def margin_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest wrong logit minus the true one, [B]; positive where the prediction is wrong."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - true


class _Calls:
    def __init__(self) -> None:
        self.gradient = self.forward = 0


class _Counted(nn.Module):
    def __init__(self, model: nn.Module, count: _Calls, precision: Precision = "float32") -> None:
        super().__init__()
        self.model, self.count, self.precision = model, count, precision

    def forward(self, images: Tensor) -> Tensor:
        differentiated = torch.is_grad_enabled() and images.requires_grad
        if differentiated:
            self.count.gradient += len(images)
        else:
            self.count.forward += len(images)
        low = self.precision == "bfloat16-queries" or (self.precision == "bfloat16" and differentiated)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
            logits: Tensor = self.model(images)
        return logits.float()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of the weights: nobody needs them, and FAB would add them up."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
