"""Optimizers: AutoAttack's own attacks (Croce & Hein, arXiv 2003.01690; PyPI's pyautoattack), one run at a time.

Each is a function of (surrogate, images, labels, budget) that returns adversarial images in the budget's ball. They
draw from torch's global generator, so ``Attack`` seeds it around them.
"""

import logging
from collections.abc import Callable
from typing import Literal

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from evaluation.attacks.budget import Budget

Optimizer = Callable[[nn.Module, Tensor, Tensor, Budget], Tensor]
Loss = Literal["ce", "dlr", "cw"]
_LOG = logging.getLogger(__name__)
_LOG.addHandler(logging.NullHandler())  # the library's own remarks (zero gradients): sanity.py has that check


def apgd(loss: Loss = "ce", steps: int = 100, eot: int = 1) -> Optimizer:
    """APGD from one random start: the point of the highest loss that it saw.

    Args:
        loss: cross-entropy, difference of logits ratio, or Carlini and Wagner's margin.
        steps: gradient steps. eot: gradients averaged in each step (expectation over transformation).
    """

    def run(surrogate: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        few = loss == "dlr" and _num_classes(surrogate, images) < 3  # that ratio needs three logits
        attack = (_Margin if loss == "cw" or few else APGDAttack)(surrogate, **_settings(budget, steps, eot))
        attack.loss = "ce" if loss == "ce" else "dlr"
        return _best_of_one_run(attack, images, labels)

    return run


def apgd_targeted(place: int, steps: int = 100, eot: int = 1) -> Optimizer:
    """APGD on the targeted difference of logits ratio.

    Args:
        place: the target is the class in this place of the clean image's logits, 1 for the runner-up.
    """

    def run(surrogate: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        if _num_classes(surrogate, images) < 4:  # that ratio needs four logits
            return apgd("cw", steps, eot)(surrogate, images, labels, budget)
        attack = APGDAttack_targeted(surrogate, **_settings(budget, steps, eot))
        attack.y_target = _class_in_place(surrogate, images, labels, place)
        return _best_of_one_run(attack, images, labels)

    return run


def fab_targeted(place: int, steps: int = 100) -> Optimizer:
    """FAB: the nearest image on the other side of the (linearized) border to the class in this place."""

    def run(surrogate: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        attack = FABAttack_PT(
            surrogate, norm=budget.norm, n_iter=steps, eps=budget.epsilon, targeted=True, device=images.device
        )
        attack.target_class = min(place + 1, _num_classes(surrogate, images))
        found: Tensor = attack.attack_single_run(images, labels, is_targeted=True)
        far = budget.distance(found, images) > budget.epsilon
        return torch.where(far.view(-1, 1, 1, 1), images, found).detach()

    return run


def square(queries: int = 5000) -> Optimizer:
    """Square attack: random search with squares, without gradients (arXiv 1912.00049)."""

    def run(surrogate: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        attack = SquareAttack(
            surrogate,
            norm=budget.norm,
            n_queries=queries,
            eps=budget.epsilon,
            resc_schedule=False,
            device=images.device,
        )
        attack.init_hyperparam(images)
        found: Tensor = attack.attack_single_run(images, labels)[1]
        return found.detach()

    return run


class _Margin(APGDAttack):  # type: ignore[misc]  # untyped
    def dlr_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The largest wrong logit minus the true one, [B]."""
        true = logits.gather(1, labels[:, None]).squeeze(1)
        wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        return wrong - true


def _settings(budget: Budget, steps: int, eot: int) -> dict[str, object]:
    return {"norm": budget.norm, "eps": budget.epsilon, "n_iter": steps, "eot_iter": eot, "logger": _LOG}


def _best_of_one_run(attack: APGDAttack, images: Tensor, labels: Tensor) -> Tensor:
    # The point of the highest loss, not the last that fooled the surrogate: with noise that one was often mere luck.
    attack.init_hyperparam(images)
    best: Tensor = attack.attack_single_run(images, labels)[0]
    return best.detach()


@torch.no_grad()
def _class_in_place(surrogate: nn.Module, images: Tensor, labels: Tensor, place: int) -> Tensor:
    """The class in this place of the logits of each image, its label counted as place 0."""
    logits: Tensor = surrogate(images)
    logits = logits.scatter(1, labels[:, None], torch.inf)
    return logits.argsort(dim=1, descending=True)[:, min(place, logits.shape[1] - 1)]


@torch.no_grad()
def _num_classes(surrogate: nn.Module, images: Tensor) -> int:
    return int(surrogate(images[:1]).shape[1])
