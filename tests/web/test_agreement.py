"""Krippendorff's alpha against published values and sums done by hand."""

import pytest

from alignjax.web import agreement, krippendorff_alpha

# Four observers, twelve units: K. Krippendorff, "Computing Krippendorff's Alpha-Reliability"
# (2011), sec. C. The ordinal alpha of these data is published as 0.815. 0 is no value.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3),
    (0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0),
)


def test_published():
    units = [[value for value in unit if value] for unit in zip(*OBSERVERS, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.815, abs=5e-4)


def test_by_hand():
    """Values 1, 1 | 1, 2 | 2, 3: n = 6, n_1 = 3, n_2 = 2, n_3 = 1.

    Ordinal differences: 1-2 is 3/2 + 2/2 = 2.5, 2-3 is 2/2 + 1/2 = 1.5, 1-3 is 3/2 + 2 + 1/2 = 4.
    Observed: pairs 1-2 and 2-3, each twice: 2 (6.25 + 2.25) = 17, over 6.
    Expected: 2 (3*2*6.25 + 2*1*2.25 + 3*1*16) = 180, over 6*5. alpha = 1 - (17/6) / 6.
    """
    assert krippendorff_alpha([[1, 1], [1, 2], [2, 3]]) == pytest.approx(1 - 17 / 36)


def test_extremes():
    assert krippendorff_alpha([[1, 1, 1], [2, 2], [3, 3]]) == 1
    # 1-2 in both units: n_1 = n_2 = 2, difference 2; observed 4 pairs of 4, expected 8 of 12.
    assert krippendorff_alpha([[1, 2], [2, 1]]) == pytest.approx(1 - 4 / (8 * 4 / 12))
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([[1], [2]]) is None
    assert krippendorff_alpha([[2, 2], [2, 2]]) is None


def test_each_response_is_a_unit():
    """Two people on task 0, one of them on task 1: only task 0 is compared."""
    found = agreement([(0, "ann", [1, 2, 3]), (0, "bob", [1, 3, 2]), (1, "ann", [2, 1])])
    # Units 1,1 | 2,3 | 3,2: n = 2, 2, 2; the difference 2-3 is 2, 1-2 is 2, 1-3 is 4.
    # Observed: 4 pairs of 4 = 16, over 6. Expected: 2 (4*4 + 4*4 + 4*16) = 192, over 30.
    assert found == (pytest.approx(1 - (16 / 6) / (192 / 30)), 1, 2)
    assert agreement([(0, "ann", [1, 2]), (1, "bob", [1, 2])]) == (None, 0, 0)
