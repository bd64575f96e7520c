"""The attacks by name."""

from collections.abc import Sequence

from evaluation.attacks import adaptive, standard
from evaluation.attacks.attack import Attack, Effort
from evaluation.errors import EvaluationError

# In the order in which they run: what breaks most for least comes first, since only images that stand are attacked.
ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        standard.ApgdCe,
        standard.ApgdTargeted,
        adaptive.TransferCe,
        adaptive.TransferCw,
        adaptive.TransferTargeted,
        adaptive.Bpda,
        adaptive.BpdaMargin,
        adaptive.JointLoss,
        adaptive.FixedMasks,
        adaptive.FixedNoiseCw,
        adaptive.NoiseOnlyEot,
        standard.EotCe,
        standard.EotDlr,
        standard.EotTargeted,
        standard.FabTargeted,
        standard.Square,
    )
}


def check_attack_names(names: Sequence[str]) -> None:
    """Refuse names that no attack has.

    Raises:
        EvaluationError: the message has them, and lists those there are.
    """
    if unknown := [name for name in names if name not in ATTACKS]:
        raise EvaluationError(f"expected attacks among {', '.join(ATTACKS)}; got {', '.join(unknown)}")


def attack_by_name(name: str, effort: Effort | None = None) -> Attack:
    """An attack of that name.

    Raises:
        EvaluationError: none has that name.
    """
    check_attack_names([name])
    return ATTACKS[name](effort)


def attacks_by_name(names: Sequence[str], effort: Effort | None = None) -> list[Attack]:
    """Attacks of those names, in that order."""
    return [attack_by_name(name, effort) for name in names]
