"""Draws of single repeats and of mixtures."""
from __future__ import annotations

import numpy as np
import pytest

from nsdray.nsd.repeats import draw_repeats

REPEATS = np.random.default_rng(0).integers(-3000, 3000, (200, 3, 6)).astype(np.int16)
COUNTS = np.where(np.arange(200) % 4 == 0, 2, 3).astype(np.int16)
REPEATS[COUNTS == 2, 2] = 0  # what is not there
IDS = np.arange(200) * 7


def test_a_trial_is_one_of_the_repeats():
    drawn = draw_repeats(REPEATS, COUNTS, IDS, "trial", seed=0, epoch=0)
    assert drawn.dtype == np.float32 and drawn.shape == (200, 6)
    chosen = [[r for r in range(3) if np.array_equal(row, own[r] / np.float32(300))] for row, own in zip(drawn, REPEATS)]
    assert all(len(found) == 1 and found[0] < n for found, n in zip(chosen, COUNTS))
    shares = np.bincount(np.concatenate(chosen)[COUNTS == 3], minlength=3) / (COUNTS == 3).sum()
    assert np.all(np.abs(shares - 1 / 3) < 0.12)  # 150 draws: three standard deviations


def test_a_mixture_is_convex_and_right_on_average():
    epochs = np.stack([draw_repeats(REPEATS, COUNTS, IDS, "mixture", 0, epoch) for epoch in range(200)])
    means = np.stack([own[:n].mean(0) / 300 for own, n in zip(REPEATS, COUNTS)])
    low, high = (np.stack([f(own[:n], 0) / 300 for own, n in zip(REPEATS, COUNTS)]) for f in (np.min, np.max))
    assert np.all(epochs >= low - 1e-4) and np.all(epochs <= high + 1e-4)
    spread = epochs.std(0) / np.sqrt(200)
    assert np.mean(np.abs(epochs.mean(0) - means) < 4 * spread + 1e-6) > 0.99
    # Dirichlet of ones, n = 3: each weight has variance 2 / 36, each pair covariance -1 / 36
    own = REPEATS[1, :, 0] / 300
    assert epochs[:, 1, 0].var() == pytest.approx((3 * (own**2).sum() - own.sum() ** 2) / 36, rel=0.4)


def test_a_draw_depends_on_seed_epoch_and_image_only():
    rows = np.array([9, 3, 120])
    for sampling in ("trial", "mixture"):
        whole = draw_repeats(REPEATS, COUNTS, IDS, sampling, 0, 4)
        np.testing.assert_array_equal(draw_repeats(REPEATS[rows], COUNTS[rows], IDS[rows], sampling, 0, 4), whole[rows])
        for other in ((1, 4), (0, 5)):
            assert not np.array_equal(draw_repeats(REPEATS, COUNTS, IDS, sampling, *other), whole)


def test_error():
    with pytest.raises(ValueError, match="sampling is 'mean'; choose trial or mixture"):
        draw_repeats(REPEATS, COUNTS, IDS, "mean", 0, 0)
