"""Two-way identification and retrieval against the loops of their definitions."""
from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from nsdray.metrics import identification
from nsdray.metrics.identification import retrieval, two_way


def noisy(n: int, n_features: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative features with a common mean, as networks give them after a ReLU, and noisy copies, float32."""
    random = np.random.default_rng(seed)
    truth = random.normal(0, 1, (n, n_features)) + random.normal(0, 2, n_features)
    prediction = truth + random.normal(0, noise, (n, n_features))
    return np.maximum(truth, 0).astype(np.float32), np.maximum(prediction, 0).astype(np.float32)


def by_corrcoef(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The definition, with NumPy's correlations."""
    n = len(truth)
    r = np.corrcoef(truth, prediction)[:n, n:]
    return (r < np.diag(r)).sum(0) / (n - 1)


def by_exact_loop(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The definition, as a double loop in rational arithmetic: integers only. r = a / sqrt(b), compared by sign(r) r^2."""

    def signed_square(x: np.ndarray, y: np.ndarray) -> Fraction:
        x, y = [len(x) * int(v) - int(x.sum()) for v in x], [len(y) * int(v) - int(y.sum()) for v in y]
        product = sum(a * b for a, b in zip(x, y))
        return Fraction(product * abs(product), sum(a * a for a in x) * sum(b * b for b in y))

    n = len(truth)
    scores = np.zeros(n)
    for j in range(n):
        own = signed_square(truth[j], prediction[j])
        for i in range(n):
            if i != j:
                scores[j] += signed_square(truth[i], prediction[j]) < own
    return scores / (n - 1)


@pytest.mark.parametrize("noise", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("n_features", [40, 2500])  # below and above one float32 product
def test_two_way_agrees_with_corrcoef(n_features, noise):
    truth, prediction = noisy(60, n_features, noise)
    expected = by_corrcoef(truth, prediction)
    np.testing.assert_array_equal(two_way(truth, prediction), expected)
    assert 0.5 < expected.mean() and (noise < 30 or expected.mean() < 1)


@pytest.mark.parametrize("n_rows_batch", [1, 7, 60, 1000])
def test_blocks_do_not_alter_the_result(n_rows_batch):
    truth, prediction = noisy(60, 50, 5.0)
    np.testing.assert_array_equal(two_way(truth, prediction, n_rows_batch), by_corrcoef(truth, prediction))


@pytest.mark.parametrize("many", [0.0, 1.0])  # doubtful pairs by a float64 product of the block, or one by one
def test_ties_are_failures_exactly(monkeypatch, many):
    """Few small integers give many equal correlations, between equal rows and between different ones."""
    monkeypatch.setattr(identification, "MANY", many)
    random = np.random.default_rng(3)
    truth = random.integers(0, 2, (24, 6))
    truth[:, 0], truth[:, 1] = 0, 2  # no constant row
    truth[5] = truth[9]
    truth[6] = 4 * truth[9] + 1  # correlates like rows 5 and 9
    prediction = random.integers(0, 3, (24, 6))
    prediction[:, 0], prediction[:, 1] = 0, 1
    expected = by_exact_loop(truth, prediction)
    for dtype in (np.int64, np.float32, np.float64, np.float16):
        np.testing.assert_array_equal(two_way(truth.astype(dtype), prediction.astype(dtype)), expected)
    assert two_way(truth, truth)[5] <= 1 - 2 / 23  # its two likes, at least, are not beaten
    wide = [np.tile(x, 500).astype(np.float32) for x in (truth, prediction)]  # the same correlations by float32 sums
    np.testing.assert_array_equal(two_way(*wide), expected)


@pytest.mark.parametrize("many", [0.0, 1.0])
def test_what_float32_cannot_tell_is_decided_in_float64(monkeypatch, many):
    """Truths that differ by 1e-5: nearly every comparison is in doubt, and float32 alone gets some wrong."""
    monkeypatch.setattr(identification, "MANY", many)
    random = np.random.default_rng(0)
    base = random.normal(size=3000)
    truth, prediction = base + 1e-5 * random.normal(size=(50, 3000)), base + 0.1 * random.normal(size=(50, 3000))
    expected = by_corrcoef(truth, prediction)
    for n_rows_batch in (7, 50):
        np.testing.assert_array_equal(two_way(truth, prediction, n_rows_batch), expected)
    unit = [x - x.mean(1, keepdims=True) for x in (truth, prediction)]
    unit = [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in unit]
    r = unit[0] @ unit[1].T
    assert ((r < np.diag(r)).sum(0) / 49 != expected).any()


def test_duplicates_tie_whatever_the_sums():
    """Equal pictures in the test set: in float32, and in a float64 matrix product, rounding would decide."""
    truth, prediction = noisy(40, 5000, 1.0)
    truth[20:] = truth[:20]
    scores = two_way(truth, prediction, n_rows_batch=16)
    assert (scores <= 38 / 39).all()
    np.testing.assert_array_equal(two_way(truth, truth), np.full(40, 38 / 39))


def test_rows_and_columns_are_not_mixed_up():
    """Truth 4 is like all predictions: as a distractor it beats the other four, each once, and loses to nobody."""
    own, common = np.split(np.random.default_rng(0).normal(size=(6, 4000)), [5])
    truth = np.concatenate([own[:4], common])
    prediction = own + 2 * common
    np.testing.assert_array_equal(two_way(truth, prediction), [0.75, 0.75, 0.75, 0.75, 1])
    np.testing.assert_array_equal(two_way(prediction, truth)[:4], 1)


def test_two_way_perfect_chance_and_scale():
    truth, _ = noisy(40, 30, 1)
    assert (two_way(truth, truth) == 1).all()
    assert (two_way(truth, -truth) == 0).all()
    unrelated = np.random.default_rng(9).normal(size=(300, 20))
    assert abs(two_way(noisy(300, 20, 1)[0], unrelated).mean() - 0.5) < 0.05
    truth, prediction = (x.astype(np.float64) for x in noisy(40, 30, 4))
    np.testing.assert_array_equal(two_way(1e-3 * truth + 1000, 50 * prediction - 7), two_way(truth, prediction))


def test_a_constant_prediction_scores_zero_as_in_the_references():
    truth, prediction = noisy(10, 30, 0.1)
    prediction[3] = 0.1
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = by_corrcoef(truth, prediction)
    np.testing.assert_array_equal(two_way(truth, prediction), expected)
    assert two_way(truth, prediction)[3] == 0


def test_two_way_errors():
    truth, prediction = noisy(10, 30, 1)
    with pytest.raises(ValueError, match=r"truth has shape \(10, 30\) and prediction \(10, 29\).*Flatten"):
        two_way(truth, prediction[:, :29])
    with pytest.raises(ValueError, match=r"shape \(10, 5, 6\)"):
        two_way(truth.reshape(10, 5, 6), prediction.reshape(10, 5, 6))
    with pytest.raises(ValueError, match="1 image; it needs at least 2"):
        two_way(truth[:1], prediction[:1])
    with pytest.raises(ValueError, match=r"shape \(0, 30\)"):
        two_way(truth[:0], prediction[:0])
    with pytest.raises(ValueError, match="n_rows_batch is 0"):
        two_way(truth, prediction, 0)
    flat = truth.astype(np.float64)
    flat[[2, 7]] = 0.1  # its mean is not exactly 0.1
    with pytest.raises(ValueError, match=r"truth: 2 of 10 rows are constant.*first \[2, 7\].*leave them out"):
        two_way(flat, prediction)
    for value in (np.nan, np.inf):
        bad = prediction.copy()
        bad[4, 5] = value
        with pytest.raises(ValueError, match=r"prediction: 1 of 10 rows hold values that are not finite, first \[4\]"):
            two_way(truth, bad)


def brain_and_image_tokens(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    image = random.normal(size=(n, 5, 8)) + 1
    return (image + random.normal(0, 2.5, image.shape)) * random.uniform(0.5, 2, (n, 1, 1)), image


def cosines(brain: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(brains, images)."""
    brain, image = (x.reshape(len(x), -1) for x in (brain, image))
    return (brain / np.linalg.norm(brain, axis=1, keepdims=True)) @ (image / np.linalg.norm(image, axis=1, keepdims=True)).T


def test_retrieval_among_all_images():
    """One pool that holds every image: top-1 by argmax, brain to image along rows of (brains, images)."""
    brain, image = brain_and_image_tokens()
    forward, backward = retrieval(brain, image, n_pool=40, n_draws=3)
    similarity = cosines(brain, image)
    np.testing.assert_array_equal(forward, similarity.argmax(1) == np.arange(40))
    np.testing.assert_array_equal(backward, similarity.argmax(0) == np.arange(40))
    assert 0 < forward.mean() < 1 and (forward != backward).any()
    np.testing.assert_array_equal(retrieval(image, brain, 40, 1)[0], backward)
    np.testing.assert_array_equal(retrieval(brain, image, 40, None)[0], forward)


def test_retrieval_draws_are_pools_and_estimate_the_expectation():
    brain, image = brain_and_image_tokens()
    similarity = cosines(brain, image)
    n, n_pool = 40, 10
    harder = [(similarity[j] > similarity[j, j]).sum() for j in range(n)]
    expected = [math.comb(n - 1 - k, n_pool - 1) / math.comb(n - 1, n_pool - 1) for k in harder]
    exact, exact_backward = retrieval(brain, image, n_pool, None)
    np.testing.assert_allclose(exact, expected, atol=1e-12)
    harder = [(similarity[:, j] > similarity[j, j]).sum() for j in range(n)]
    np.testing.assert_allclose(exact_backward, [math.comb(39 - k, 9) / math.comb(39, 9) for k in harder], atol=1e-12)
    drawn, _ = retrieval(brain, image, n_pool, n_draws=4000, seed=5)
    np.testing.assert_allclose(drawn, expected, atol=0.09)  # five standard deviations of 1000 draws
    assert abs(drawn.mean() - np.mean(expected)) < 0.02


def test_retrieval_is_seeded_and_counts_only_what_was_drawn():
    brain, image = brain_and_image_tokens()
    first, again, other = (retrieval(brain, image, 10, 3, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other, equal_nan=True)
    assert 40 - 3 * 10 <= np.isnan(first).sum() < 40
    assert set(first[~np.isnan(first)] * 6) <= {0, 2, 3, 4, 6}  # multiples of 1/1, 1/2, 1/3
    np.testing.assert_array_equal(retrieval(image, image, 10, 200)[0], 1)


def test_retrieval_ties_are_failures():
    brain, image = brain_and_image_tokens()
    image[1] = 3 * image[0]  # the same direction
    forward, _ = retrieval(image, image, 40, 1)
    np.testing.assert_array_equal(forward, [0, 0] + [1] * 38)


def test_retrieval_errors():
    brain, image = brain_and_image_tokens()
    with pytest.raises(ValueError, match="pools of 300 out of 40 images"):
        retrieval(brain, image)
    with pytest.raises(ValueError, match="pools of 1 out of 40"):
        retrieval(brain, image, 1)
    with pytest.raises(ValueError, match="n_draws is 0"):
        retrieval(brain, image, 10, 0)
    with pytest.raises(ValueError, match=r"truth has shape \(40, 40\) and prediction \(39, 40\)"):
        retrieval(brain[:39], image, 10)
    with pytest.raises(ValueError, match=r"brain_tokens: 1 of 40 rows are zero.*first \[6\]"):
        retrieval(np.where(np.arange(40)[:, None, None] == 6, 0, brain), image, 10)
    with pytest.raises(ValueError, match=r"image_tokens: 1 of 40 rows hold values that are not finite"):
        retrieval(brain, np.where(np.arange(40)[:, None, None] == 6, np.nan, image), 10)
