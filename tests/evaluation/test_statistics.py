import numpy as np
import pytest

from evaluation.statistics import bootstrap_interval, mcnemar_p, paired_difference, wilson_interval


def test_wilson_interval_is_that_of_the_textbook():
    low, high = wilson_interval(81, 263)  # Newcombe, Statistics in Medicine 17 (1998), table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 20)[0] == 0
    with pytest.raises(ValueError, match="one trial"):
        wilson_interval(0, 0)


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both, first, second, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize(("wins", "losses", "p"), [(0, 0, 1.0), (5, 0, 2 / 32), (3, 1, 10 / 16), (6, 6, 1.0)])
def test_mcnemar_counts_the_coin_tosses_that_are_as_uneven(wins, losses, p):
    assert mcnemar_p(*outcomes(10, wins, losses, 10)) == pytest.approx(p)


def test_a_difference_looks_at_pairs_not_at_two_accuracies():
    difference = paired_difference(*outcomes(30, 12, 0, 58))
    assert difference.mean == pytest.approx(0.12)
    assert 0.05 < difference.low < 0.12 < difference.high < 0.20
    assert difference.is_distinguishable_from_zero
    assert not paired_difference(*outcomes(30, 6, 6, 58)).is_distinguishable_from_zero


def test_equal_outcomes_differ_by_nothing_at_all():
    difference = paired_difference(*outcomes(3, 0, 0, 3))
    assert (difference.low, difference.mean, difference.high, difference.p) == (0, 0, 0, 1)


def test_outcomes_of_different_images_are_refused():
    with pytest.raises(ValueError, match="same images"):
        paired_difference(np.ones(3, bool), np.ones(4, bool))


def test_a_bootstrap_covers_the_mean_and_shrinks_with_the_root_of_n():
    values = np.random.default_rng(0).random(400)
    narrow, wide = bootstrap_interval(values), bootstrap_interval(values[:100])
    assert narrow[0] < values.mean() < narrow[1]
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(2, rel=0.25)
