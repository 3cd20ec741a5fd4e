"""Error bars: how much a mean score would vary with other test images.

Scores are resampled, not features: a resample holds some images twice, and an image would then be its own distractor in
two-way identification and tie with itself. This is the spread over images alone; that over training seeds stands beside it.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nsdray.seeds import rng

N_VALUES_BATCH = 2**21  # drawn scores in memory at once (16 MB, and as much for their indices)


class Estimate(NamedTuple):
    """A mean, its percentile interval [low, high], and its standard error, in the score's unit."""

    mean: float
    low: float
    high: float
    standard_error: float


def bootstrap(scores: np.ndarray, n_resamples: int = 2000, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """Mean of per-image scores with its bootstrap percentile interval and standard error (Efron & Tibshirani 1993).

    Images are drawn with replacement, as many as there are; the interval is the percentiles (1 - confidence) / 2 and
    (1 + confidence) / 2 of the resamples' means, the standard error their standard deviation (ddof 1).

    Args:
        scores: (n_images,), or (n_images, n_subjects) of the same images: an image is drawn with all its subjects together,
            since their errors on one image are not independent. Finite, n_images >= 2.
        seed: the same seed and n_images give the same draws, so that the metrics of a run share theirs.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim not in (1, 2) or not scores.size:
        raise ValueError(f"bootstrap: scores have shape {scores.shape}, expected (n_images,) or (n_images, n_subjects)")
    if len(scores) < 2:
        raise ValueError(f"bootstrap: {len(scores)} image; a spread over images needs at least 2")
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        raise ValueError(
            f"bootstrap: {len(bad)} of {scores.size} scores are not finite, first at {bad[0].tolist()}. "
            "Give the images that have a score for every subject."
        )
    if n_resamples < 2 or not 0 < confidence < 1:
        raise ValueError(f"bootstrap: n_resamples {n_resamples} must be 2 or more, confidence {confidence} between 0 and 1")
    images = scores.reshape(len(scores), -1).mean(1)
    means = _resampled_means(images, n_resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(images.mean()), float(low), float(high), float(means.std(ddof=1)))


def paired_difference(
    a: np.ndarray, b: np.ndarray, n_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Mean of a - b with error bars, for two models scored on the same images (and subjects), row for row.

    An image that is hard for both cancels, so this is far more sensitive than to compare two intervals. An interval that
    leaves out 0 says that the models differ on images like these; it says nothing about another training seed.
    Shapes and errors as in `bootstrap`.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired difference: scores of shape {a.shape} and {b.shape}; both models need the same images")
    return bootstrap(a - b, n_resamples, seed, confidence)


def _resampled_means(images: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """(n_resamples,) means of images (n,), drawn in batches that do not alter the draws."""
    n = len(images)
    generator = rng(seed, "bootstrap", n)
    n_batch = max(1, N_VALUES_BATCH // n)
    batches = [min(n_batch, n_resamples - start) for start in range(0, n_resamples, n_batch)]
    return np.concatenate([images[generator.integers(0, n, (size, n))].mean(1) for size in batches])
