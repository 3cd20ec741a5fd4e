from __future__ import annotations

import numpy as np
import pytest

from nsdray.metrics.pareto import pareto_front


def beaten(i, cost, quality):
    """By the definition."""
    return any(
        cost[j] <= cost[i] and quality[j] >= quality[i] and (cost[j] < cost[i] or quality[j] > quality[i])
        for j in range(len(cost))
    )


@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_nothing_beats(seed):
    random = np.random.default_rng(seed)
    cost, quality = random.integers(0, 6, 30), random.integers(0, 6, 30)  # with ties
    np.testing.assert_array_equal(pareto_front(cost, quality), [not beaten(i, cost, quality) for i in range(30)])


def test_equal_choices_are_kept_and_what_is_not_finite_is_not():
    np.testing.assert_array_equal(pareto_front([1, 1, 2, 3], [5, 5, 4, 9]), [True, True, False, True])
    np.testing.assert_array_equal(pareto_front([1, np.nan, 2, 0], [np.nan, 9, 5, 1]), [False, False, True, True])
    with pytest.raises(ValueError, match=r"cost has shape \(2,\), quality \(3,\)"):
        pareto_front([1, 2], [1, 2, 3])
