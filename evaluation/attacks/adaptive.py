"""Attacks that know IG-Defense: its undefended model, its first pass, its pseudo-label, its masks, its noise.

On a model that has no such part, the surrogate is the model itself (see ``surrogates.py``), and the attack a restart.
"""

from collections.abc import Sequence

from torch import nn

from defense import DefendedClassifier
from evaluation.attacks.attack import Attack, Stage
from evaluation.attacks.optimizers import apgd, apgd_targeted
from evaluation.attacks.standard import averaged
from evaluation.attacks.surrogates import (
    BothPasses,
    FixedMask,
    FixedNoise,
    SmoothPseudoLabel,
    first_pass,
    undefended,
)


class TransferCe(Attack):
    """APGD on the cross-entropy of the undefended model; what it finds is tried on the defense.

    Looks for: gradients that the defense hides. The undefended model has the same weights and no noise and no masks.
    Where its adversarial images fool the defense better than the defense's own gradient does, the defense masked it.
    """

    name = "transfer-ce"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        return [(undefended(model), apgd("ce", self.effort.steps))]


class TransferCw(Attack):
    """APGD on Carlini and Wagner's margin of the undefended model, transferred.

    Looks for: the same as transfer-ce. The margin goes on growing on images that the undefended model gets wrong
    already, so these go further past the border, which is what a transfer needs.
    """

    name = "transfer-cw"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        return [(undefended(model), apgd("cw", self.effort.steps))]


class TransferTargeted(Attack):
    """APGD on the targeted difference of logits ratio of the undefended model, each target class transferred.

    Looks for: the same as transfer-ce. The mask of the target class keeps the neurons that speak for it, so an image
    that the first pass believes to be the target can be worse off with the defense than without it.
    """

    name = "transfer-t"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        surrogate = undefended(model)
        return [(surrogate, apgd_targeted(place, self.effort.steps)) for place in range(1, self.effort.targets + 1)]


class NoiseOnlyEot(Attack):
    """APGD with expectation over transformation on the noisy first pass alone, transferred.

    Looks for: a defense that is only as strong as its pseudo-label. Who fools the first pass chooses the mask, and its
    gradient, unlike that of the whole defense, does not go through the steep softmax.
    """

    name = "noise-only-eot"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        surrogate = first_pass(model)
        return averaged(surrogate, lambda eot: apgd("ce", self.effort.steps, eot), self.effort.eot)


class Bpda(Attack):
    """BPDA through the pseudo-label: forward the defense, backward a softmax at temperature 1; with averaged noise.

    Looks for: a pseudo-label whose gradient is zero. At temperature 0.01 the softmax is a step, so the way through the
    masks is closed to plain gradients. This opens it (arXiv 1802.00420); an argmax or a detached pseudo-label, too.
    """

    name = "bpda"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        surrogate = SmoothPseudoLabel(model) if isinstance(model, DefendedClassifier) else model
        return averaged(surrogate, lambda eot: apgd("ce", self.effort.steps, eot), self.effort.eot)


class BpdaMargin(Attack):
    """BPDA through the pseudo-label on the margin of the logits, with averaged noise.

    Looks for: the same as bpda where the cross-entropy's gradient vanishes because the second pass is confident.
    """

    name = "bpda-cw"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        surrogate = SmoothPseudoLabel(model) if isinstance(model, DefendedClassifier) else model
        return averaged(surrogate, lambda eot: apgd("cw", self.effort.steps, eot), self.effort.eot)


class JointLoss(Attack):
    """APGD on a joint loss: the mean log-probability of the true class in both passes, with averaged noise.

    Looks for: a second pass that mends what fooled the first one, or the reverse. An attack on the end alone has no
    reason to fool the first pass; one on the first pass alone none to fool the second.
    """

    name = "joint"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        surrogate = BothPasses(model) if isinstance(model, DefendedClassifier) else model
        return averaged(surrogate, lambda eot: apgd("ce", self.effort.steps, eot), self.effort.eot)


class FixedMasks(Attack):
    """APGD on the margin of one masked pass without noise, once with the mask of each of the likeliest classes.

    Looks for: robustness that comes from masks changing under the attack's feet. With the mask held, what is left is
    an ordinary network, and its gradient is exact. The true class's mask is among them: it is the one to get past.
    """

    name = "fixed-mask"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        if not isinstance(model, DefendedClassifier):
            return [(model, apgd("cw", self.effort.steps))] * (1 + self.effort.targets)
        places = range(min(1 + self.effort.targets, model.split.num_classes))
        return [(FixedMask(model, place), apgd("cw", self.effort.steps)) for place in places]


class FixedNoiseCw(Attack):
    """APGD on the margin of the defense with its noise held fixed: a deterministic model.

    Looks for: how much of the robustness is the noise's variance. One draw, known to the attack, gives exact gradients
    and exact comparisons of steps; the images are judged under fresh noise like all others.
    """

    name = "fixed-noise"

    def stages(self, model: nn.Module) -> Sequence[Stage]:
        surrogate = FixedNoise(model) if isinstance(model, DefendedClassifier) else model
        return [(surrogate, apgd("cw", self.effort.steps))]
