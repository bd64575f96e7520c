"""Attacks by name: AutoAttack's own, and those that know IG-Defense.

attack = attack_by_name("bpda", Effort(steps=50, eot=10))
adversarial = attack(model, images, labels, Budget(8 / 255, "Linf"), seed=0)
"""

from evaluation.attacks.attack import Attack, AttackResult, Effort, margin_of
from evaluation.attacks.budget import Budget, Norm
from evaluation.attacks.registry import ATTACKS, attack_by_name, attacks_by_name, check_attack_names
from evaluation.attacks.surrogates import FirstPass, FixedNoise, first_pass, has_noise, undefended

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackResult",
    "Budget",
    "Effort",
    "FirstPass",
    "FixedNoise",
    "Norm",
    "attack_by_name",
    "attacks_by_name",
    "check_attack_names",
    "first_pass",
    "has_noise",
    "margin_of",
    "undefended",
]
