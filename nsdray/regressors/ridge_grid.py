"""Alphas of ridge regression, fixed or chosen from a grid by leave-one-out error, and predictions of blocks of targets.

One eigendecomposition K = V diag(l) V' serves all alphas and all targets: with A = V' Y, dual coefficients at an alpha are
V diag(1 / (l + alpha)) A. So no matrix of n_samples x n_samples exists per target, whatever its alpha.

Scores of alphas are leave-one-out R2 per target: 1 - sum (y_i - yhat_i)^2 / sum (y_i - ybar_i)^2, where the prediction yhat_i
and the mean ybar_i come from all samples but i. 0 is what the mean does, 1 is perfect; a constant target scores 0. Methods:

- "sample": over a sample of the rows, exactly;
- "all": over all rows, exactly; 2 n_samples^2 multiplications per target and alpha;
- "gcv": generalised cross-validation (Golub, Heath, Wahba 1979): the leave-one-out residuals' denominators 1 - h_ii replaced by
  their mean. n_samples^2 multiplications per target, whatever the number of alphas.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch

from nsdray.regressors.linalg import Array, Eigen, device_of, dtype_of, empty, to_device, to_numpy
from nsdray.regressors.ridge import RidgeFactor, RidgeKernel, check_rows
from nsdray.regressors.scaling import moments
from nsdray.regressors.target_blocks import TargetBlock

Method = Literal["sample", "gcv", "all"]
N_ROWS_CHUNK = 1024
"""Rows that are left out at a time, so that no second block of targets exists."""
T = TypeVar("T")


def r_squared(residual: Array, truth: Array, factor: float = 1.0) -> np.ndarray:
    """1 - sum residual^2 / sum (factor truth)^2 over the rows of (n, n_targets): (n_targets,) float64; 0 where truth is all 0."""
    lost, spread = (to_numpy(sum_of_squares(x)) for x in (residual, truth))
    return fraction_left(lost, spread.astype(np.float64) * factor**2)


def sum_of_squares(x: Array) -> Array:
    """Over the rows of (n, n_targets), without a second array of that size."""
    return (np if device_of(x) is None else torch).einsum("ij,ij->j", x, x)


def fraction_left(lost: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """1 - lost / spread in float64; 0 where spread is 0."""
    lost, spread = lost.astype(np.float64), spread.astype(np.float64)
    return np.where(spread > 0, 1 - lost / np.where(spread > 0, spread, 1), 0)


@dataclass(frozen=True)
class AlphaScores:
    """How well a block of targets is predicted at each alpha."""

    targets: np.ndarray
    """Leave-one-out R2 of each target, (n_alphas, n_targets) float64."""
    images: np.ndarray | None = None
    """The same of each left-out row, (n_alphas, n_rows) float64: 1 - (y_i - yhat_i)^2 relative to the mean over rows of
    (y_i - ybar_i)^2, mean over targets. So it has the mean of `targets`, and its spread is that over images. None by "gcv"."""


def alpha_scores(
    kernel: RidgeKernel, decomposed: Eigen, alphas: Sequence[float], block: TargetBlock, method: Method = "gcv",
    rows: Sequence[int] | None = None,
) -> AlphaScores:  # fmt: skip
    """Leave-one-out R2 at each alpha. rows: for "sample", the rows that count. Beside the block, takes twice its memory for
    leave-one-out and once for "gcv"."""
    kernel.check_alphas(alphas, decomposed)
    rotated = decomposed.vectors.T @ block.centred
    if method == "gcv":
        return AlphaScores(gcv_scores(kernel, decomposed, alphas, block, rotated))
    used = check_rows(rows if method == "sample" else None, kernel.n_samples)
    return leave_one_out_scores(kernel, decomposed, alphas, block, rotated, used)


def gcv_scores(
    kernel: RidgeKernel, decomposed: Eigen, alphas: Sequence[float], block: TargetBlock, rotated: Array
) -> np.ndarray:
    """Generalised cross-validation, (n_alphas, n_targets). rotated: V' Y (n_samples, n_targets), overwritten."""
    n, values = kernel.n_samples, to_numpy(decomposed.values).astype(np.float64)
    spread = to_numpy(sum_of_squares(block.centred)).astype(np.float64) * (n / (n - 1)) ** 2
    rotated *= rotated
    scores = []
    for alpha in alphas:
        shrink = alpha / (values + alpha)
        freedom = shrink.sum() - alpha / (kernel.shift_ + alpha)  # n less the trace of the hat matrix with its intercept
        lost = to_device((shrink**2).astype(kernel.dtype), kernel.device) @ rotated
        scores.append(fraction_left(to_numpy(lost).astype(np.float64) * (n / freedom) ** 2, spread))
    return np.stack(scores)


def leave_one_out_scores(kernel: RidgeKernel, decomposed: Eigen, alphas: Sequence[float], block: TargetBlock, rotated: Array,
                         rows: np.ndarray) -> AlphaScores:  # fmt: skip
    """Exact leave-one-out on some rows; see `RidgeFactor.leave_one_out_smoother`. rotated: V' Y (n_samples, n_targets)."""
    n, n_targets = block.centred.shape
    parts = [rows[start : start + N_ROWS_CHUNK] for start in range(0, len(rows), N_ROWS_CHUNK)]
    spread = sum(to_numpy(sum_of_squares(block.centred[part])).astype(np.float64) for part in parts) * (n / (n - 1)) ** 2
    per_row = row_factors(spread, len(rows), block.centred)
    by_target, by_row = [], []
    for alpha in alphas:
        inverse = 1 / (decomposed.values + alpha)
        scaled, lost, images = inverse[:, None] * rotated, np.zeros(n_targets), []
        for part in parts:
            vectors = decomposed.vectors[part]
            residual = vectors @ scaled
            residual /= ((vectors * vectors) @ inverse - 1 / (n * (alpha + kernel.shift_)))[:, None]
            residual *= residual
            lost += to_numpy(residual.sum(0))
            images.append(to_numpy(residual @ per_row).astype(np.float64))
        by_target.append(fraction_left(lost, spread))
        by_row.append((spread > 0).mean() - np.concatenate(images))
        del scaled
    return AlphaScores(np.stack(by_target), np.stack(by_row))


@dataclass(frozen=True)
class Smoothers:
    """What any block of targets is multiplied by, at each of some alphas."""

    alphas: tuple[float, ...]
    rows: np.ndarray
    """(n_rows,): training samples that are predicted by leaving each out."""
    held_out: Array
    """(n_alphas, n_rows, n_samples)."""
    test: Array
    """(n_alphas, n_groups, n_test, n_samples): the parts that come from groups of voxels; their sum is the smoother."""

    def to(self, device: str | None) -> Smoothers:
        return Smoothers(self.alphas, self.rows, to_device(self.held_out, device), to_device(self.test, device))

    @property
    def dtype(self) -> np.dtype:
        return dtype_of(self.test)


def make_smoothers(
    factors: Sequence[RidgeFactor], betas_test: np.ndarray, rows: Sequence[int] | None, groups: Sequence[np.ndarray] | None = None
) -> Smoothers:
    """Smoothers of some alphas. rows: as `Smoothers.rows`, None means all. groups: voxel indices of each group; together they
    hold every voxel once; None makes one group of all."""
    kernel = factors[0].kernel
    n, rows = kernel.n_samples, check_rows(rows, kernel.n_samples)
    groups = [None] if groups is None else groups
    held_out = empty((len(factors), len(rows), n), kernel.dtype, kernel.device)
    test = empty((len(factors), len(groups), len(betas_test), n), kernel.dtype, kernel.device)
    for g, voxels in enumerate(groups):
        against = kernel.against(betas_test, voxels).T
        for a, factor in enumerate(factors):
            test[a, g] = factor.inverse.solve(against).T
    for a, factor in enumerate(factors):
        held_out[a] = factor.leave_one_out_smoother(rows)
    return Smoothers(tuple(factor.alpha for factor in factors), rows, held_out, test)


@dataclass(frozen=True)
class BlockFit:
    """What a block of targets gives."""

    choice: np.ndarray
    """(n_targets,) int: which of the alphas each target has."""
    left_out: Array
    """Leave-one-out predictions (n_rows, n_targets) less the training mean."""
    test_parts: Array
    """Test predictions (n_groups, n_test, n_targets) less the training mean, by group of voxels."""
    mean: np.ndarray
    """Training mean, (n_targets,) float64."""
    leave_one_out_r2: np.ndarray
    """(n_targets,) float64; see this module's head. NaN if no rows were left out."""
    scores: AlphaScores | None = None
    """Of the alphas that there were to choose from, if several."""

    def test(self, dtype: type | None = None) -> np.ndarray:
        """Test predictions (n_test, n_targets). dtype: None means as they were computed."""
        whole = to_numpy(self.test_parts.sum(0) if len(self.test_parts) > 1 else self.test_parts[0])
        return np.add(whole, self._mean, np.empty(whole.shape, dtype or whole.dtype), casting="same_kind")

    def left_out_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the leave-one-out predictions, (n_targets,) float32. NaN if no rows were left out."""
        if not len(self.left_out):
            return np.full((2, len(self.mean)), np.nan, np.float32)
        mean, std = moments(to_numpy(self.left_out))
        return (mean + self.mean).astype(np.float32), std

    def parts_of_r2(self, truth: np.ndarray) -> np.ndarray:
        """How much of each target's R2 in the test set comes from each group, (n_groups, n_targets) float64.

        The product measure (Hoffman 1960; Pratt 1987; as himalaya's `r2_score_split`): with truth r and a group's part f_g of the
        prediction f, both less the training mean, sum_i f_gi (2 r_i - f_i) / sum_i r_i^2. Over the groups it adds up to
        1 - sum (r - f)^2 / sum r^2, R2 relative to predicting the training mean. A part may be negative.
        truth: (n_test, n_targets).
        """
        truth = truth.astype(np.float64) - self.mean
        parts = to_numpy(self.test_parts).astype(np.float64)
        spread, twice = (truth**2).sum(0), 2 * truth - parts.sum(0)
        return np.einsum("gij,ij->gj", parts, twice) / np.where(spread > 0, spread, np.inf)

    @property
    def _mean(self) -> np.ndarray:
        return self.mean.astype(dtype_of(self.left_out))


def fit_block(smoothers: Smoothers, block: TargetBlock, scores: AlphaScores | None = None) -> BlockFit:
    """Predict a block of targets. With several alphas, each target takes the best one: by scores, or by leave-one-out R2 on
    smoothers.rows if scores is None."""
    n, n_targets = block.centred.shape
    choice = np.zeros(n_targets, int)
    truth = block.centred[smoothers.rows]
    if len(smoothers.alphas) == 1:
        left_out = smoothers.held_out[0] @ block.centred
    elif scores is not None:
        choice = best(scores.targets)
        left_out = empty((len(smoothers.rows), n_targets), smoothers.dtype, device_of(block.centred))
        by_choice(smoothers.held_out, block.centred, choice, left_out)
    else:
        candidates = [smoother @ block.centred for smoother in smoothers.held_out]
        scores = candidate_scores(candidates, truth, n / (n - 1))
        choice = best(scores.targets)
        left_out = candidates[0]
        for a, candidate in enumerate(candidates):
            left_out[:, choice == a] = candidate[:, choice == a]
    parts = empty((smoothers.test.shape[1], smoothers.test.shape[2], n_targets), smoothers.dtype, device_of(block.centred))
    for g in range(len(parts)):
        by_choice(smoothers.test[:, g], block.centred, choice, parts[g])
    r2 = r_squared(truth - left_out, truth, n / (n - 1)) if len(truth) else np.full(n_targets, np.nan)
    return BlockFit(choice, left_out, parts, block.mean, r2, scores)


def candidate_scores(candidates: Sequence[Array], truth: Array, factor: float) -> AlphaScores:
    """Of leave-one-out predictions (n_rows, n_targets) at each alpha. factor: makes of truth what it is less the others' mean."""
    spread = to_numpy(sum_of_squares(truth)).astype(np.float64) * factor**2
    per_row = row_factors(spread, len(truth), truth)
    by_target, by_row = [], []
    for candidate in candidates:
        residual = truth - candidate
        residual *= residual
        by_target.append(fraction_left(to_numpy(residual.sum(0)), spread))
        by_row.append((spread > 0).mean() - to_numpy(residual @ per_row).astype(np.float64))
    return AlphaScores(np.stack(by_target), np.stack(by_row))


def row_factors(spread: np.ndarray, n_rows: int, like: Array) -> Array:
    """What a row's squared residuals (n_targets,) are multiplied with and summed, to be its share of `AlphaScores.images`."""
    factors = np.divide(n_rows / len(spread), spread, out=np.zeros(len(spread)), where=spread > 0)
    return to_device(factors.astype(dtype_of(like)), device_of(like))


def best(scores: np.ndarray) -> np.ndarray:
    """Index of the best alpha of each target: scores (n_alphas, n_targets); of equals, the first."""
    return np.nan_to_num(scores, nan=-np.inf).argmax(0)


def by_choice(smoothers: Array, centred: Array, choice: np.ndarray, out: Array) -> None:
    """Each target's product with the smoother of its choice: (n_alphas, m, n_samples) and (n_samples, n_targets) to out,
    (m, n_targets), for the price of one product."""
    used = np.unique(choice)
    if len(used) == 1:
        (np if device_of(out) is None else torch).matmul(smoothers[int(used[0])], centred, out=out)
        return
    for a in used:
        own = np.flatnonzero(choice == a)
        out[:, own] = smoothers[int(a)] @ centred[:, own]


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each prepared in a thread while the one before it is in use: reading overlaps with products."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item
            del item
