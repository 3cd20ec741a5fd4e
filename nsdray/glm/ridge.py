"""Fractional ridge regression: per voxel, the strength of shrinkage is the fraction of the betas' length that is left.

In the coordinates of the design's singular value decomposition, ridge regression multiplies the least squares beta of
direction k by s_k^2 / (s_k^2 + alpha). A fraction f asks for the alpha at which the betas' Euclidean length is f times
that at alpha = 0 (Rokem and Kay 2020). The length falls monotonically, so it is tabulated for all voxels with one
matrix product and interpolated. The package `fracridge` does the same in a Python loop over voxels, on a table four
times as coarse, and brings scikit-learn and numba with it; hence this file.

The fraction is chosen per voxel by the error across repeats (`nsdray.glm.crossval`). As shrinkage also lowers the
overall size, which a trial's neighbours say nothing about, the chosen betas are scaled and shifted to fit the
unregularised ones best.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

FRACTIONS = tuple(np.linspace(1, 0.05, 20).round(2).tolist())
"""Those that are tried, as in GLMsingle."""
STEPS_PER_DECADE = 20
"""Of alpha in the table: fractions are met to 1e-3."""


def alphas_for_fractions(rotated: np.ndarray, singular: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """Penalties that leave the given fractions of each voxel's length: (n_fractions, n_voxels) float32.

    rotated: least squares betas in the coordinates of the decomposition, (n_voxels, n_directions). singular:
    (n_directions,); a direction with 0 must have betas 0. fractions: within (0, 1].
    """
    squared = np.asarray(singular, float) ** 2
    used = squared[squared > 0]
    low, high = used.min() * 1e-3, used.max() * (1 / min(fractions) - 1) + used.max()
    n_steps = int(np.ceil(np.log10(high / low) * STEPS_PER_DECADE)) + 1
    grid = np.concatenate([[0], np.geomspace(low, high, n_steps)])
    shrink = np.divide(squared, squared + grid[:, None], where=squared > 0, out=np.zeros((len(grid), len(squared))))
    length = np.sqrt(rotated**2 @ (shrink.T**2).astype(rotated.dtype))  # (n_voxels, n_grid)
    length /= np.maximum(length[:, :1], np.finfo(length.dtype).tiny)
    alphas = np.zeros((len(fractions), len(rotated)), np.float32)
    for row, fraction in zip(alphas, fractions):
        if fraction < 1:
            after = np.clip((length > fraction).sum(axis=1), 1, len(grid) - 1)
            upper, lower = (np.take_along_axis(length, i[:, None], 1)[:, 0] for i in (after - 1, after))
            share = np.clip((upper - fraction) / np.maximum(upper - lower, 1e-12), 0, 1)
            first = after == 1  # from alpha = 0, which has no logarithm
            ratio = grid[after] / np.where(first, 1, grid[after - 1])
            row[:] = np.where(first, grid[1] * share, grid[after - 1] * ratio**share)
    return alphas


def choose_fraction(
    rotated: np.ndarray,
    singular: np.ndarray,
    rotate: Callable[[np.ndarray], np.ndarray],
    error: Callable[[np.ndarray], np.ndarray],
    fractions: Sequence[float] = FRACTIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """The betas (n_voxels, n_trials) and fraction (n_voxels,) with the least error; of equals, the earlier fraction.

    rotated, singular: as in `alphas_for_fractions`. rotate: from rotated betas to betas. error: of betas, (n_voxels,).
    """
    squared = (singular**2).astype(np.float32)
    best = np.full(len(rotated), np.inf, np.float32)
    betas, chosen = np.empty_like(rotated), np.empty(len(rotated), np.float32)
    for fraction, alpha in zip(fractions, alphas_for_fractions(rotated, singular, fractions)):
        # a direction that the design leaves undetermined has rotated betas of 0
        shrunk = rotated * (squared / np.maximum(squared + alpha[:, None], np.finfo(np.float32).tiny))
        candidate = rotate(shrunk)
        found = error(candidate)
        better = found < best
        best[better], chosen[better], betas[better] = found[better], fraction, candidate[better]
    return betas, chosen


def match_scale(regularised: np.ndarray, unregularised: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset (n_voxels,) that bring regularised betas (n_voxels, n_trials) closest to unregularised ones.

    Least squares; where the scale would be negative, or the betas do not vary, [1, 0].
    """
    mean, goal = regularised.mean(axis=1), unregularised.mean(axis=1)
    centred = regularised - mean[:, None]
    variance = np.einsum("vt,vt->v", centred, centred)
    covariance = np.einsum("vt,vt->v", centred, unregularised)
    scale = np.divide(covariance, variance, where=variance > 0, out=np.full_like(variance, -1))
    keep = scale < 0
    return np.where(keep, 1, scale), np.where(keep, 0, goal - scale * mean)
