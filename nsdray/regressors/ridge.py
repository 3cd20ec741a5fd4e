"""Ridge regression of very many targets on very many voxels, in closed form.

Minimises ||Y - 1 b - X W||^2 + alpha ||W||^2, with an intercept b that is not penalised. With centred X and Y the dual
form is W = X' (X X' + alpha I)^-1 Y: one n_samples x n_samples factorisation serves every target. Predictions and
leave-one-out predictions are fixed matrices times the targets (`smoother`, `leave_one_out_smoother`), so targets may be
worked through in blocks, anywhere, and the n_voxels x n_targets weights need never exist.

Everything keeps the precision of the betas (float32 or float64). float32 is enough while alpha is not below some 1e-5
of the largest eigenvalue of X X', which no sensible alpha for fMRI is.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg


def ridge_predict(
    betas_train: np.ndarray, targets_train: np.ndarray, betas_test: np.ndarray, alpha: float
) -> np.ndarray:
    """Fit on the training samples, predict the test samples: (n_test, n_targets).

    betas: (n_samples, n_voxels), z-scored with the training samples' moments. targets: (n_samples, n_targets), any
    unit. alpha: penalty, > 0, on the scale of scikit-learn's ``Ridge``.
    """
    factor = factorise(betas_train, alpha)
    centred, mean = factor.centre(targets_train)
    return factor.smoother(betas_test) @ centred + mean


def factorise(betas: np.ndarray, alpha: float) -> RidgeFactor:
    """Do the work that all targets share: n_samples^2 n_voxels + n_samples^3 / 3 multiplications.

    betas: (n_samples, n_voxels) float32 or float64. alpha: penalty, > 0.
    """
    betas = np.asarray(betas)
    if betas.ndim != 2 or len(betas) < 2 or betas.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"betas are {betas.dtype} of shape {betas.shape}, expected float32 or float64 (n_samples >= 2, n_voxels)"
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"ridge: alpha is {alpha}, must be finite and above 0 (the paper uses 50000)")
    mean = _finite_mean(betas, "betas")
    centred = betas - mean
    kernel = centred @ centred.T
    shift = float(np.trace(kernel)) / len(kernel)
    kernel += kernel.dtype.type(shift / len(kernel))  # see RidgeFactor
    kernel[np.diag_indices_from(kernel)] += alpha
    try:
        cholesky = linalg.cholesky(kernel, lower=True, overwrite_a=True, check_finite=False)
    except linalg.LinAlgError as error:
        raise ValueError(
            f"ridge: alpha {alpha:g} is lost in the rounding of {betas.dtype} betas (mean squared norm {shift:g}); "
            "give float64 betas or a larger alpha"
        ) from error
    return RidgeFactor(alpha, mean, centred, cholesky, shift)


@dataclass(frozen=True)
class RidgeFactor:
    """A ridge regression factorised for one set of betas and one alpha, before it has seen any target.

    The kernel's Cholesky factor is that of G = X X' + alpha I + shift 11'/n. Centred targets do not see the last term
    (X'1 = 0), but without it G's eigenvalue along 1 would be alpha alone, and the 1/n of the intercept would drown in
    rounding when alpha is small.
    """

    alpha: float
    mean_: np.ndarray
    """Mean of the betas, (n_voxels,)."""
    centred_: np.ndarray
    """Betas less their mean, X, (n_samples, n_voxels)."""
    cholesky_: np.ndarray
    """Lower Cholesky factor of G, (n_samples, n_samples)."""
    shift_: float
    """Mean diagonal element of X X'."""

    def centre(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Targets (n_samples, n_targets) less their mean, in the betas' precision, and the mean (n_targets,)."""
        targets = np.asarray(targets)
        if targets.ndim != 2 or len(targets) != len(self.centred_):
            raise ValueError(
                f"targets have shape {targets.shape}, expected ({len(self.centred_)}, n_targets): one row per sample"
            )
        targets = targets.astype(self.centred_.dtype, copy=False)
        mean = _finite_mean(targets, "targets")
        return targets - mean, mean

    def dual(self, targets: np.ndarray) -> np.ndarray:
        """Dual coefficients (n_samples, n_targets) of the centred targets: G^-1 Y."""
        return self._solve(self.centre(targets)[0])

    def weights(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (n_voxels, n_targets) and intercept (n_targets,): predictions are betas @ weights + intercept."""
        centred, mean = self.centre(targets)
        weights = self.centred_.T @ self._solve(centred)
        return weights, mean - self.mean_ @ weights

    def smoother(self, betas_test: np.ndarray) -> np.ndarray:
        """Matrix S (n_test, n_samples): predictions are S @ (targets - mean) + mean, with `centre`'s mean."""
        betas_test = np.asarray(betas_test, self.centred_.dtype)
        if betas_test.ndim != 2 or betas_test.shape[1] != self.centred_.shape[1]:
            raise ValueError(
                f"test betas have shape {betas_test.shape}, expected (n_test, {self.centred_.shape[1]}): "
                "the voxels that the regression was fitted on"
            )
        _finite_mean(betas_test.T, "test betas (by sample)")
        return self._solve(self.centred_ @ (betas_test - self.mean_).T).T

    def leave_one_out_smoother(self, rows: Sequence[int] | None = None) -> np.ndarray:
        """Matrix L (len(rows), n_samples): leave-one-out predictions are L @ (targets - mean) + mean.

        The residual of sample i under a model fitted to the others is (y_i - yhat_i) / (1 - h_ii), where the hat matrix
        has the intercept's 1/n in it (Hastie, Tibshirani, Friedman, Elements of Statistical Learning, eq. 7.64). In
        dual terms that is (G^-1 Y)_i / d_i with d_i = (G^-1)_ii - 1 / (n (alpha + shift)). rows: None means all.
        """
        n = len(self.centred_)
        rows = np.arange(n) if rows is None else np.asarray(rows, int)
        if rows.size and (rows.min() < 0 or rows.max() >= n):
            raise ValueError(f"rows range over {rows.min()}..{rows.max()}; there are samples 0..{n - 1}")
        columns = np.zeros((n, len(rows)), self.centred_.dtype)
        columns[rows, np.arange(len(rows))] = 1
        inverse = self._solve(columns).T  # rows of G^-1
        d = inverse[np.arange(len(rows)), rows] - 1 / (n * (self.alpha + self.shift_))
        return columns.T - inverse / d[:, None]

    def leave_one_out(self, targets: np.ndarray, rows: Sequence[int] | None = None) -> np.ndarray:
        """Prediction of each of the rows by the model fitted to all other samples, (len(rows), n_targets), exactly.

        For many blocks of targets, compute `leave_one_out_smoother` once and multiply.
        """
        centred, mean = self.centre(targets)
        return self.leave_one_out_smoother(rows) @ centred + mean

    def _solve(self, right: np.ndarray) -> np.ndarray:
        return linalg.cho_solve((self.cholesky_, True), right, check_finite=False)


def _finite_mean(x: np.ndarray, name: str) -> np.ndarray:
    """Mean over the rows, accumulated in float64; a NaN or infinity anywhere shows in it."""
    mean = x.mean(0, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(mean))
    if len(bad):
        raise ValueError(
            f"ridge: {name} hold NaN or infinity in {len(bad)} of {len(mean)} columns (first: {bad[0]}); "
            "mask those voxels or samples before"
        )
    return mean.astype(x.dtype)
