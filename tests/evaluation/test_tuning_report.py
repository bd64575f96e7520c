import pytest
import torch

from evaluation.tuning.adaptive import Reattacked
from evaluation.tuning.report import conclusion
from evaluation.tuning.settings import Setting
from evaluation.tuning.sweep import Score
from evaluation.tuning.tune import Candidate, Tuning

SETTING = Setting("lo-ir", "layer4", 16, 0.01, 0.1, 1, 0.0)


def tuning_of(undefended: list[bool], chosen: list[bool], clean: float = 1.0) -> Tuning:
    """A tuning whose final half has these images robust."""

    def candidate(setting: Setting | None, robust: list[bool], share: float) -> Candidate:
        rows = torch.tensor(robust)
        return Candidate(setting, ("chosen",), Reattacked(torch.full((len(robust),), share), rows, rows, {}))

    score = Score(SETTING, torch.ones(1), torch.ones(1).bool())
    final = [candidate(None, undefended, 1.0), candidate(SETTING, chosen, clean)]
    return Tuning(SETTING, [score], score, [score], [], SETTING, final)


@pytest.mark.parametrize(
    ("undefended", "chosen", "begins"),
    [
        ([False] * 20, [True] * 10 + [False] * 10, "A gain: +50.0 points"),
        ([True] * 10 + [False] * 10, [False] * 20, "A LOSS: -50.0 points"),
        ([True] * 20, [True] * 20, "NO GAIN that can be told from zero: +0.0 points (95% interval +0.0 to +0.0)"),
        # Two images more of forty are luck: McNemar's p is 0.5.
        ([True] * 20 + [False] * 20, [True] * 22 + [False] * 18, "NO GAIN that can be told from zero: +5.0 points"),
    ],
)
def test_the_conclusion_says_plainly_what_the_final_half_shows(
    undefended: list[bool], chosen: list[bool], begins: str
) -> None:
    assert conclusion(tuning_of(undefended, chosen))[0].startswith(begins)


def test_the_conclusion_has_the_cost_in_clean_accuracy() -> None:
    clean = conclusion(tuning_of([True] * 4, [True] * 4, clean=0.75))[1]
    assert clean == "Clean accuracy: -25.0 points (95% interval -25.0 to -25.0)."
