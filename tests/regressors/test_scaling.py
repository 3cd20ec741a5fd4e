"""Moments, z-score and rescaling against NumPy in float64."""
from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from nsdray.regressors import scaling
from nsdray.regressors.scaling import Moments, moments, rescale, zscore


@pytest.fixture
def x() -> np.ndarray:
    """Large means, small spreads, two dead columns: what float32 sums get wrong."""
    x = np.random.default_rng(0).standard_normal((1300, 6)) * [1, 10, 0.5, 1, 0, 0] + [0, 3, 1e4, -200, 0.1, 7]
    return x.astype(np.float32)


def test_moments_against_numpy(x):
    mean, std = moments(x)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64), rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(std, x.astype(np.float64).std(0, ddof=1), rtol=2e-7, atol=1e-12)
    assert (std[4:] == 0).all()
    np.testing.assert_allclose(moments(x, ddof=0)[1], x.astype(np.float64).std(0), rtol=2e-7, atol=1e-12)


def test_memory_of_a_large_batch(x, monkeypatch):
    """Seven values at a time make single rows of six columns; then 1300 rows at once, in three float64 copies."""
    whole = moments(x)
    monkeypatch.setattr(scaling, "N_VALUES_BATCH", 7)
    np.testing.assert_allclose(moments(x), whole, rtol=2e-7, atol=1e-7)
    monkeypatch.setattr(scaling, "N_VALUES_BATCH", 6 * 100)
    tracemalloc.start()
    moments(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 8 * 6 * 100  # not of 1300 rows


def test_dead_float64_column_has_no_spread():
    assert moments(np.full((999, 1), 0.1))[1] == 0


@pytest.mark.parametrize("cuts", [[1], [3, 4, 700], [650]])
def test_a_stream_and_merged_workers_give_the_same(x, cuts):
    parts = np.split(x, cuts)
    mean, std = moments(x)
    for seen in (parts, parts[::-1]):
        np.testing.assert_allclose(moments(seen), (mean, std), rtol=2e-7, atol=1e-7)
    merged = Moments()
    for part in parts:
        merged.merge(Moments().add(part))
    merged.merge(Moments())
    assert merged.n_samples == len(x)
    np.testing.assert_allclose((merged.mean, merged.std), (mean, std), rtol=2e-7, atol=1e-7)


def test_zscore(x):
    z = zscore(x, *moments(x))
    assert z.dtype == np.float32
    expected = (x - x.mean(0, dtype=np.float64)) / x.astype(np.float64).std(0, ddof=1).clip(1e-30)
    np.testing.assert_allclose(z[:, :4], expected[:, :4], atol=1e-3)  # float32 steps at 1e4
    assert (z[:, 4:] == 0).all()
    assert (zscore(x + 1, *moments(x))[:, 4:] == 0).all()


def test_rescale_moves_moments_row_by_row(x):
    predictions, targets = x[:, [0, 1, 3]], np.random.default_rng(1).standard_normal((50, 3)) * 3 + 2
    out = rescale(predictions, *moments(predictions), *moments(targets))
    np.testing.assert_allclose(out.mean(0), targets.mean(0), atol=1e-3)
    np.testing.assert_allclose(out.std(0, ddof=1), targets.std(0, ddof=1), rtol=1e-3)
    alone = rescale(predictions[3:4], *moments(predictions), *moments(targets))
    np.testing.assert_array_equal(alone[0], out[3])


def test_rescale_of_a_constant_prediction_is_the_target_mean():
    out = rescale(np.full((3, 2), 9.0), np.array([9.0, 1]), np.array([0.0, 2]), np.array([5.0, 1]), np.array([2.0, 4]))
    np.testing.assert_array_equal(out, [[5, 17]] * 3)


def test_errors():
    with pytest.raises(ValueError, match="moments of 0 samples; at least 1"):
        Moments().mean  # noqa: B018
    with pytest.raises(ValueError, match="moments of 1 samples; at least 2"):
        moments(np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"batch has shape \(2, 4\), expected \(n, 3\)"):
        Moments().add(np.ones((2, 3))).add(np.ones((2, 4)))
