"""Attacks on any model: AutoAttack's four, its version for randomized defenses, and a targeted one of that."""

from collections.abc import Callable, Sequence

from torch import nn

from evaluation.attacks.attack import Attack, Stage
from evaluation.attacks.optimizers import Optimizer, apgd, apgd_targeted, fab_targeted, square
from evaluation.attacks.surrogates import has_noise


def averaged(model: nn.Module, optimizer: Callable[[int], Optimizer], eot: int) -> Sequence[Stage]:
    """One run of ``eot`` gradients a step or, of a model without noise, ``eot`` runs of one: the same effort."""
    return [(model, optimizer(eot))] if has_noise(model) else [(model, optimizer(1))] * eot


class ApgdCe(Attack):
    """APGD on the cross-entropy of the whole defense, the first part of AutoAttack.

    Looks for: plain lack of robustness. It follows the gradient that the defense itself gives, once a step, so noise
    or a flat pseudo-label can mislead it; what only this attack fails on is no evidence of robustness.
    """

    name = "apgd-ce"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        return [(model, apgd("ce", self.effort.steps))]


class ApgdTargeted(Attack):
    """APGD on the targeted difference of logits ratio, the second part of AutoAttack, one target class after the other.

    Looks for: losses that saturate. The ratio does not change when logits are scaled, so a defense whose logits are
    large or small hides no gradient from it, and a certain wrong class is often easier to reach than just any.
    """

    name = "apgd-t"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        return [(model, apgd_targeted(place, self.effort.steps)) for place in range(1, self.effort.targets + 1)]


class FabTargeted(Attack):
    """FAB-T, the third part of AutoAttack: the nearest point across the border to each of the other classes.

    Looks for: borders that are close in directions that ascent on a loss does not take. It minimizes the distance
    instead of maximizing a loss, so it does not depend on the loss's shape at all.
    """

    name = "fab-t"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        return [(model, fab_targeted(place, self.effort.steps)) for place in range(1, self.effort.targets + 1)]


class Square(Attack):
    """Square, the fourth part of AutoAttack: random search with square patches, which sees logits only.

    Looks for: masked gradients. It uses none, so where it breaks images that the gradient attacks did not, their
    gradients were of no use, and their robust accuracy means nothing.
    """

    name = "square"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        return [(model, square(self.effort.queries))]


class EotCe(Attack):
    """APGD on the cross-entropy with expectation over transformation: AutoAttack's "rand" version, first part.

    Looks for: robustness that is only the variance of the gradient. Each step averages the gradients of several noise
    draws (20 in AutoAttack; Athalye et al., arXiv 1707.07397). A model without noise has nothing to average: it meets
    the same number of gradients as restarts instead.
    """

    name = "eot-ce"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        return averaged(model, lambda eot: apgd("ce", self.effort.steps, eot), self.effort.eot)


class EotDlr(Attack):
    """APGD on the difference of logits ratio with expectation over transformation: AutoAttack's "rand", second part.

    Looks for: the same as eot-ce where the cross-entropy's gradient vanishes, as it does on confident predictions.
    """

    name = "eot-dlr"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        return averaged(model, lambda eot: apgd("dlr", self.effort.steps, eot), self.effort.eot)


class EotTargeted(Attack):
    """Targeted APGD with expectation over transformation, which AutoAttack's "rand" version leaves out.

    Looks for: what eot-dlr misses because the untargeted ratio wanders between classes while noise changes which one
    is the runner-up. A fixed target gives all draws of a step one direction.
    """

    name = "eot-t"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        def of_place(place: int) -> Sequence[Stage]:
            return averaged(model, lambda eot: apgd_targeted(place, self.effort.steps, eot), self.effort.eot)

        return [stage for place in range(1, self.effort.targets + 1) for stage in of_place(place)]
