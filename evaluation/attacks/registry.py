"""The attacks by name."""

from collections.abc import Sequence

from evaluation.attacks import adaptive, standard
from evaluation.attacks.attack import Attack, Effort

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


def attack_by_name(name: str, effort: Effort | None = None) -> Attack:
    """An attack of that name.

    Raises:
        ValueError: none has that name; the message lists those there are.
    """
    if name not in ATTACKS:
        raise ValueError(f"expected one of the attacks {', '.join(ATTACKS)}, got '{name}'")
    return ATTACKS[name](effort)


def attacks_by_name(names: Sequence[str], effort: Effort | None = None) -> list[Attack]:
    """Attacks of those names, in that order."""
    return [attack_by_name(name, effort) for name in names]
