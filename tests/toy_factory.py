"""Models for ``igd evaluate --factory toy_factory:make``; classes are called 0 and 1."""

from torch import nn

from toy_defenses import two_way_defense


def make() -> dict[str, nn.Module]:
    """A model and its defense with noise."""
    defended = two_way_defense(sigma=0.02)
    return {"undefended": defended.split, "defended": defended}


make.labels = ["0", "1"]  # type: ignore[attr-defined]
