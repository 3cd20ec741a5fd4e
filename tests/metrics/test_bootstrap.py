"""Error bars against a plain loop with the same draws, scipy's bootstrap, and theory."""
from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from nsdray.metrics import bootstrap as module
from nsdray.metrics.bootstrap import bootstrap, paired_difference
from nsdray.seeds import rng


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    """Skewed scores in [0, 1] of 80 images, like those of two-way identification."""
    return np.random.default_rng(0).beta(5, 1, 80)


def test_against_a_plain_loop_with_the_same_draws(scores):
    draws = rng(7, "bootstrap", 80).integers(0, 80, (300, 80))
    means = sorted(sum(scores[i] for i in draw) / 80 for draw in draws)
    mean, low, high, standard_error = bootstrap(scores, 300, seed=7)
    assert mean == pytest.approx(sum(scores) / 80, rel=1e-12)
    # percentiles by linear interpolation between the ordered means, at 0.025 and 0.975 of 299 steps
    at = [0.025 * 299, 0.975 * 299]
    expected = [means[int(x)] + (x - int(x)) * (means[int(x) + 1] - means[int(x)]) for x in at]
    assert [low, high] == pytest.approx(expected, rel=1e-12)
    centre = sum(means) / 300
    assert standard_error == pytest.approx((sum((m - centre) ** 2 for m in means) / 299) ** 0.5, rel=1e-9)


def test_against_scipy(scores):
    theirs = scipy.stats.bootstrap((scores,), np.mean, n_resamples=9999, method="percentile", rng=1)
    ours = bootstrap(scores, 9999)
    assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.05)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * theirs.standard_error)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * theirs.standard_error)
    narrow = bootstrap(scores, 9999, confidence=0.5)
    assert ours.low < narrow.low < narrow.mean < narrow.high < ours.high
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * ours.standard_error, rel=0.1)  # the normal's quartiles


def test_batches_do_not_alter_the_draws(scores, monkeypatch):
    whole = bootstrap(scores, 500, seed=3)
    monkeypatch.setattr(module, "N_VALUES_BATCH", 80 * 7)
    assert bootstrap(scores, 500, seed=3) == whole
    monkeypatch.setattr(module, "N_VALUES_BATCH", 1)
    assert bootstrap(scores, 500, seed=3) == whole
    assert bootstrap(scores, 500, seed=4) != whole


def test_an_image_is_drawn_with_all_its_subjects(scores):
    """Four subjects with the same scores are no more information than one; four independent ones are."""
    same = np.repeat(scores[:, None], 4, 1)
    assert bootstrap(same, seed=1) == pytest.approx(bootstrap(scores, seed=1))
    independent = np.random.default_rng(1).beta(5, 1, (80, 4))
    assert bootstrap(independent).standard_error < 0.7 * np.mean([bootstrap(s).standard_error for s in independent.T])
    assert bootstrap(independent).mean == pytest.approx(independent.mean())


def test_paired_difference(scores):
    """A constant advantage is certain when paired, though the two intervals overlap."""
    worse = scores - 0.01
    difference = paired_difference(scores, worse)
    assert difference == pytest.approx((0.01, 0.01, 0.01, 0), abs=1e-12)
    assert bootstrap(worse).high > bootstrap(scores).low
    noise = np.random.default_rng(2).normal(0, 0.1, 80)
    assert paired_difference(scores, scores + noise, seed=5) == pytest.approx(bootstrap(-noise, seed=5))
    assert paired_difference(scores, scores + noise) != paired_difference(scores, scores + noise[::-1])


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(4)
    estimates = [bootstrap(random.normal(0.3, 1, 60), 400, seed=i) for i in range(300)]
    assert 0.89 < np.mean([e.low < 0.3 < e.high for e in estimates]) < 0.985
    assert np.mean([e.standard_error for e in estimates]) == pytest.approx(60**-0.5, rel=0.05)


def test_errors(scores):
    with pytest.raises(ValueError, match="1 image; a spread over images needs at least 2"):
        bootstrap(scores[:1])
    with pytest.raises(ValueError, match=r"scores have shape \(0,\)"):
        bootstrap(scores[:0])
    with pytest.raises(ValueError, match=r"scores have shape \(4, 5, 4\)"):
        bootstrap(scores.reshape(4, 5, 4))
    with pytest.raises(ValueError, match=r"2 of 80 scores are not finite, first at \[3, 1\]"):
        bootstrap(np.where(np.isin(np.arange(80), [7, 30]), np.nan, scores).reshape(40, 2))
    with pytest.raises(ValueError, match="n_resamples 1 must be 2 or more"):
        bootstrap(scores, 1)
    with pytest.raises(ValueError, match="confidence 95 between 0 and 1"):
        bootstrap(scores, confidence=95)
    with pytest.raises(ValueError, match=r"shape \(80,\) and \(79,\); both models need the same images"):
        paired_difference(scores, scores[1:])
