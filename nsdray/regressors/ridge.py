"""Ridge regression of very many targets on very many voxels, in closed form.

Minimises ||Y - 1 b - X W||^2 + alpha ||W||^2, with an intercept b that is not penalised. With centred X and Y the dual
form is W = X' (X X' + alpha I)^-1 Y: one n_samples x n_samples factorisation serves every target. Predictions and
leave-one-out predictions are fixed matrices times the targets (`smoother`, `leave_one_out_smoother`), so targets may be
worked through in blocks, anywhere, and the n_voxels x n_targets weights need never exist.

Voxels may have factors on their penalty (`penalties`; `nsdray.regressors.banded`): a penalty of alpha k_v on voxel v is that of
alpha on the voxel divided by sqrt(k_v), so X below is (betas - mean) / sqrt(penalties).

Rounding errors in predictions grow as eps times the condition of X X' + alpha I (for n_samples > n_voxels its largest eigenvalue
over alpha): measured, 0.4 eps times it by Cholesky, 2.5 by an eigendecomposition, relative to the predictions' deviation.
Where eps times the condition is above MAX_ROUNDING, factors are refused: in float32 for alphas below some 1e-4 of the largest
eigenvalue, unless the other eigenvalues are large.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nsdray.regressors.linalg import (
    Array,
    Eigen,
    Inverse,
    Scratch,
    add_gram,
    cholesky,
    dtype_of,
    eigen,
    empty,
    largest_eigenvalue,
    symmetric_product,
    to_device,
    to_numpy,
)
from nsdray.regressors.target_blocks import centre_targets, refuse_not_finite

N_VOXELS_CHUNK = 2048
"""Voxels that are centred at a time, so that no second copy of the betas exists."""
MAX_ROUNDING = 1e-3
"""Machine epsilon times the condition of the factorised matrix, at most."""


def ridge_predict(
    betas_train: np.ndarray, targets_train: np.ndarray, betas_test: np.ndarray, alpha: float, device: str | None = None
) -> np.ndarray:
    """Fit on the training samples, predict the test samples: (n_test, n_targets).

    betas: (n_samples, n_voxels), z-scored with the training samples' moments. targets: (n_samples, n_targets), any
    unit. alpha: penalty, > 0, on the scale of scikit-learn's ``Ridge``. device: as `ridge_kernel`.
    """
    factor = factorise(betas_train, alpha, device=device)
    centred, mean = factor.kernel.centre(targets_train)
    return to_numpy(factor.smoother(betas_test) @ centred) + mean


def factorise(
    betas: np.ndarray, alpha: float, penalties: np.ndarray | None = None, device: str | None = None
) -> RidgeFactor:
    """Do the work that all targets share, for one alpha: n_samples^2 n_voxels / 2 + n_samples^3 / 6 multiplications.

    Arguments as `ridge_kernel`. alpha: penalty, > 0. For several alphas call `RidgeKernel.factorise` for each.
    """
    check_alpha(alpha)
    return ridge_kernel(betas, penalties, device=device).factorise(alpha, overwrite=True)


def ridge_kernel(
    betas: np.ndarray, penalties: np.ndarray | None = None, dtype: type | None = None, device: str | None = None
) -> RidgeKernel:
    """The matrix X X' that serves every target and every alpha.

    betas: (n_samples, n_voxels) float32 or float64; kept, not copied. penalties: (n_voxels,) factors on alpha, > 0 (infinity
    leaves a voxel out); None means 1. dtype: float32 or float64 of all that follows; None means the betas'. device: None
    computes on the CPU by NumPy and SciPy, a torch device such as "cuda" there; betas go to it by chunks of voxels.
    """
    betas = np.asarray(betas)
    if betas.ndim != 2 or len(betas) < 2 or betas.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"betas are {betas.dtype} of shape {betas.shape}, expected float32 or float64 (n_samples >= 2, n_voxels)"
        )
    mean, scale = _finite_mean(betas, "betas"), None
    if penalties is not None:
        penalties = np.asarray(penalties, np.float64)
        if penalties.shape != mean.shape or not (penalties > 0).all():
            raise ValueError(f"ridge: penalties have shape {penalties.shape}, expected {mean.shape} values above 0")
        scale = 1 / np.sqrt(penalties)
    n, dtype = len(betas), np.dtype(dtype or betas.dtype)
    gram = empty((n, n), dtype, device, "F")
    gram[:] = 0
    kernel = RidgeKernel(betas, mean, scale, gram, 0.0, device)
    for _, chunk in kernel.chunks(betas):
        add_gram(gram, chunk)
    shift = float(to_numpy(gram.diagonal()).mean(dtype=np.float64))
    gram += shift / n
    return RidgeKernel(betas, mean, scale, gram, shift, device)


@dataclass(frozen=True)
class RidgeKernel:
    """What a ridge regression needs of its betas, before it has seen an alpha or a target.

    gram_ is X X' + shift 11'/n. Centred targets do not see the last term (X'1 = 0), but without it the eigenvalue of
    X X' + alpha I along 1 would be alpha alone, and the 1/n of the intercept would drown in rounding when alpha is small.
    """

    betas: np.ndarray
    """As given, (n_samples, n_voxels)."""
    mean_: np.ndarray
    """Mean of the betas, (n_voxels,) float64."""
    scale: np.ndarray | None
    """1 / sqrt(penalties), (n_voxels,) float64; None where all penalties are 1."""
    gram_: Array
    """(n_samples, n_samples); the lower triangle counts."""
    shift_: float
    """Mean diagonal element of X X'."""
    device: str | None

    @property
    def n_samples(self) -> int:
        return len(self.gram_)

    @property
    def dtype(self) -> np.dtype:
        """Precision of the kernel and of all that is computed with it."""
        return dtype_of(self.gram_)

    def chunks(self, betas: np.ndarray, voxels: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Array]]:
        """X's columns of any betas (n, n_voxels), some voxels at a time: their indices (k,), and (n, k) on the device, good until
        the next. voxels: indices; None means all."""
        voxels, scratch = np.arange(betas.shape[1]) if voxels is None else voxels, Scratch()
        for start in range(0, len(voxels), N_VOXELS_CHUNK):
            own = voxels[start : start + N_VOXELS_CHUNK]
            columns = slice(own[0], own[-1] + 1) if own[-1] - own[0] + 1 == len(own) else own
            x = scratch.empty((len(betas), len(own)), self.dtype)
            x[:] = betas[:, columns]
            x -= self.mean_[own].astype(self.dtype)
            if self.scale is not None:
                x *= self.scale[own].astype(self.dtype)
            yield own, to_device(x, self.device)

    def centre(self, targets: np.ndarray) -> tuple[Array, np.ndarray]:
        """Targets (n_samples, n_targets) of any precision less their mean, on the device, and the mean (n_targets,)."""
        block = centre_targets(targets, self.dtype, self.device, self.n_samples)
        return block.centred, block.mean.astype(self.dtype)

    def against(self, betas_test: np.ndarray, voxels: np.ndarray | None = None) -> Array:
        """X_test X' (n_test, n_samples), of all voxels or of those with some indices."""
        betas_test = np.asarray(betas_test)
        if betas_test.ndim != 2 or betas_test.shape[1] != len(self.mean_):
            raise ValueError(
                f"test betas have shape {betas_test.shape}, expected (n_test, {len(self.mean_)}): "
                "the voxels that the regression was fitted on"
            )
        _finite_mean(betas_test.T, "test betas (by sample)")
        out = empty((len(betas_test), self.n_samples), self.dtype, self.device)
        out[:] = 0
        for (_, test), (_, train) in zip(self.chunks(betas_test, voxels), self.chunks(self.betas, voxels)):
            out += test @ train.T
        return out

    def factorise(self, alpha: float, overwrite: bool = False) -> RidgeFactor:
        """For one alpha: n_samples^3 / 6 multiplications. overwrite: use the kernel's memory; it is spoilt then. ValueError if
        rounding would show in the results (MAX_ROUNDING)."""
        check_alpha(alpha)
        gram = to_device(self.gram_, self.device)
        largest = largest_eigenvalue(lambda vector: symmetric_product(gram, vector), gram)
        try:
            inverse = cholesky(gram, alpha, overwrite)
        except np.linalg.LinAlgError as error:
            raise ValueError(self._lost(alpha, math.inf)) from error
        self._check_condition(alpha, (largest + alpha) * largest_eigenvalue(inverse.solve, inverse.factor))
        return RidgeFactor(self, inverse)

    def decompose(self) -> Eigen:
        """For any number of alphas (`at`): some 30 times the work of one `factorise`."""
        return eigen(to_device(self.gram_, self.device))

    def at(self, alpha: float, decomposed: Eigen) -> RidgeFactor:
        """The factor for an alpha from the eigendecomposition. ValueError as `factorise`."""
        self.check_alphas([alpha], decomposed)
        return RidgeFactor(self, decomposed.at(alpha))

    def check_alphas(self, alphas: Sequence[float], decomposed: Eigen) -> None:
        """ValueError if any is not above 0, or so small that rounding would show."""
        smallest, largest = (float(decomposed.values[i]) for i in (0, -1))
        for alpha in alphas:
            check_alpha(alpha)
            self._check_condition(alpha, (largest + alpha) / (smallest + alpha))

    def _check_condition(self, alpha: float, condition: float) -> None:
        if not condition * np.finfo(self.dtype).eps <= MAX_ROUNDING:
            raise ValueError(self._lost(alpha, condition))

    def _lost(self, alpha: float, condition: float) -> str:
        remedy = "a larger alpha" if self.dtype == np.float64 else "float64 (--ridge.dtype float64) or a larger alpha"
        return (
            f"ridge: alpha {alpha:g} is lost in the rounding of {self.dtype}: the matrix to invert has a condition of "
            f"{condition:.1e}, at most {MAX_ROUNDING / np.finfo(self.dtype).eps:.1e} is precise enough (mean squared norm of the "
            f"betas: {self.shift_:g}). Use {remedy}"
        )


@dataclass(frozen=True)
class RidgeFactor:
    """A ridge regression for one set of betas and one alpha, before it has seen any target.

    G below is X X' + alpha I + shift 11'/n. Results are on the kernel's device.
    """

    kernel: RidgeKernel
    inverse: Inverse
    """G^-1."""

    @property
    def alpha(self) -> float:
        return self.inverse.alpha

    def centre(self, targets: np.ndarray) -> tuple[Array, np.ndarray]:
        """As `RidgeKernel.centre`."""
        return self.kernel.centre(targets)

    def dual(self, targets: np.ndarray) -> Array:
        """Dual coefficients (n_samples, n_targets) of the centred targets: G^-1 Y."""
        return self.inverse.solve(self.kernel.centre(targets)[0])

    def weights(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (n_voxels, n_targets) and intercept (n_targets,): predictions are betas @ weights + intercept."""
        centred, mean = self.kernel.centre(targets)
        n_voxels, n_targets = len(self.kernel.mean_), len(mean)
        if n_targets > n_voxels:  # whatever there is more of is multiplied once
            basis, coefficients = training_basis(self.kernel, self.inverse), centred
        else:
            basis, coefficients = training_basis(self.kernel), self.inverse.solve(centred)
        weights = to_numpy(to_device(basis, self.kernel.device).T @ coefficients)
        return weights, mean - self.kernel.mean_.astype(weights.dtype) @ weights

    def smoother(self, betas_test: np.ndarray, voxels: np.ndarray | None = None) -> Array:
        """Matrix S (n_test, n_samples): predictions are S @ (targets - mean) + mean, with `centre`'s mean.

        voxels: indices; the part of S that comes from these. The parts of disjoint sets of voxels add up to S.
        """
        return self.inverse.solve(self.kernel.against(betas_test, voxels).T).T

    def leave_one_out_smoother(self, rows: Sequence[int] | None = None) -> Array:
        """Matrix L (len(rows), n_samples): leave-one-out predictions are L @ (targets - mean) + mean.

        The residual of sample i under a model fitted to the others is (y_i - yhat_i) / (1 - h_ii), where the hat matrix
        has the intercept's 1/n in it (Hastie, Tibshirani, Friedman, Elements of Statistical Learning, eq. 7.64). In
        dual terms that is (G^-1 Y)_i / d_i with d_i = (G^-1)_ii - 1 / (n (alpha + shift)). rows: None means all.
        """
        n = self.kernel.n_samples
        rows = check_rows(rows, n)
        if not len(rows):
            return empty((0, n), self.kernel.dtype, self.kernel.device)
        each = np.arange(len(rows))
        unit = np.zeros((n, len(rows)), self.kernel.dtype, "F")
        unit[rows, each] = 1
        smoother = self.inverse.solve(to_device(unit, self.kernel.device)).T  # rows of G^-1
        d = smoother[each, rows] - 1 / (n * (self.alpha + self.kernel.shift_))
        smoother = smoother / -d[:, None]
        smoother[each, rows] += 1
        return smoother

    def leave_one_out(self, targets: np.ndarray, rows: Sequence[int] | None = None) -> np.ndarray:
        """Prediction of each of the rows by the model fitted to all other samples, (len(rows), n_targets), exactly.

        For many blocks of targets, compute `leave_one_out_smoother` once and multiply.
        """
        centred, mean = self.kernel.centre(targets)
        return to_numpy(self.leave_one_out_smoother(rows) @ centred) + mean


def training_basis(kernel: RidgeKernel, inverse: Inverse | None = None, dtype: type | None = None) -> np.ndarray:
    """What turns a voxel pattern into factors on training samples, (n_samples, n_voxels): with B this, predictions for betas are
    (betas - kernel.mean_) @ B.T @ coefficients + mean. With an inverse, coefficients are the centred targets themselves; without,
    the dual coefficients. dtype: None means the kernel's."""
    basis = np.empty(kernel.betas.shape, dtype or kernel.dtype)
    for own, x in kernel.chunks(kernel.betas):
        part = to_numpy(x if inverse is None else inverse.solve(x))
        basis[:, own] = part if kernel.scale is None else part * kernel.scale[own].astype(kernel.dtype)
    return basis


def check_alpha(alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"ridge: alpha is {alpha}, must be finite and above 0 (the paper uses 50000)")


def check_rows(rows: Sequence[int] | None, n: int) -> np.ndarray:
    """Rows as an index array; None means all n."""
    rows = np.arange(n) if rows is None else np.asarray(rows, int)
    if rows.size and (rows.min() < 0 or rows.max() >= n):
        raise ValueError(f"rows range over {rows.min()}..{rows.max()}; there are samples 0..{n - 1}")
    return rows


def _finite_mean(x: np.ndarray, name: str) -> np.ndarray:
    """Mean over the rows in float64; a NaN or infinity anywhere shows in it."""
    mean = x.mean(0, dtype=np.float64)
    refuse_not_finite(mean, name)
    return mean
