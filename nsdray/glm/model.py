"""The linear model of a run's time series, and what it needs of them.

    y = X_h beta + P u + G v + noise

has a column of X_h per trial of the run (its response under the HRF h), polynomial drifts P and, once they are known,
noise regressors G (the paper's equation 5). P and G are projected out of X_h, and one singular value decomposition of
the rest, U S V', then serves every voxel: the ordinary least squares betas are V S^-1 U' y. No trial's column reaches
beyond its run, so runs do not share columns and each has a decomposition of its own.

Decompositions are float64; what is kept and all work on voxels is float32.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nsdray.glm.design import Design
from nsdray.glm.hrf import HRFs, assumed_hrf

TOLERANCE = 1e-6
"""Directions of the design below this share of the largest singular value get the weight 0."""
GOOD, CONSTANT, NOT_FINITE = 0, 1, 2
"""States of a voxel."""


@dataclass(frozen=True)
class RunModel:
    """Matrices of a run, float32. The first axis of most is the HRF."""

    drifts: np.ndarray
    """(n_timepoints, n_drifts), orthonormal."""
    on_off: np.ndarray
    """(n_timepoints,): the canonical response to every trial, less its drifts."""
    responses: np.ndarray
    """(n_hrfs, n_timepoints, n_trials): each trial's response, less its drifts."""
    left: np.ndarray
    """(n_hrfs, n_timepoints, n_trials): U, of the responses less drifts and noise regressors."""
    inverse_singular: np.ndarray
    """(n_hrfs, n_trials): diagonal of S^-1, descending in S; 0 where a direction is not determined."""
    right: np.ndarray
    """(n_hrfs, n_trials, n_trials): V'."""


@dataclass(frozen=True)
class TrialModel:
    """All runs, for every HRF."""

    design: Design
    runs: tuple[RunModel, ...]

    @property
    def n_hrfs(self) -> int:
        return len(self.runs[0].left)

    def rotated(self, series: Sequence[np.ndarray], hrf: int) -> np.ndarray:
        """Least squares betas before their rotation by V: S^-1 U' y, run after run, (n_voxels, n_trials).

        series: per run (n_voxels, n_timepoints), less drifts.
        """
        parts = [y @ run.left[hrf] * run.inverse_singular[hrf] for y, run in zip(series, self.runs)]
        return np.concatenate(parts, axis=1)

    def rotate(self, rotated: np.ndarray, hrf: int) -> np.ndarray:
        """Betas (n_voxels, n_trials) from what `rotated` returns."""
        betas = np.empty_like(rotated)
        for number, run in enumerate(self.runs):
            trials = self.design.trials_of(number)
            np.matmul(rotated[:, trials], run.right[hrf], out=betas[:, trials])
        return betas

    def explained(self, series: Sequence[np.ndarray], betas: np.ndarray, hrf: int) -> np.ndarray:
        """Variance that the responses to the trials explain, percent, (n_voxels,).

        Of the series less drifts; noise regressors earn nothing, so more of them may lower it (as in GLMsingle).
        """
        rest, total = np.zeros((2, len(betas)), np.float32)
        for number, (y, run) in enumerate(zip(series, self.runs)):
            rest += energy(y - betas[:, self.design.trials_of(number)] @ run.responses[hrf].T)
            total += energy(y)
        return 100 * (1 - rest / total)


def trial_model(design: Design, hrfs: HRFs, regressors: Sequence[np.ndarray] | None = None) -> TrialModel:
    """Build the model. regressors: noise regressors, per run (n_timepoints, n_regressors), or None."""
    canonical = assumed_hrf(design.stimulus_duration, design.tr)
    runs = []
    for run, n_timepoints in enumerate(design.n_timepoints):
        drifts = design.drifts(run)
        since_onset = np.arange(n_timepoints)[:, None] * design.tr - design.onset[design.trials_of(run)]
        on_off = residual(canonical.at(since_onset)[0].sum(axis=1, keepdims=True), drifts)[:, 0]
        responses = residual(hrfs.at(since_onset), drifts)  # (n_hrfs, n_timepoints, n_trials)
        clean = responses
        if regressors is not None:
            clean = residual(responses, np.linalg.qr(np.hstack([drifts, regressors[run]]))[0])
        left, singular, right = np.linalg.svd(clean, full_matrices=False)
        kept = singular > TOLERANCE * singular.max()
        inverse = np.divide(1, singular, where=kept, out=np.zeros_like(singular))
        arrays = (drifts, on_off, responses, left * kept[:, None], inverse, right)
        runs.append(RunModel(*(np.ascontiguousarray(array, np.float32) for array in arrays)))
    return TrialModel(design, tuple(runs))


def residual(columns: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Columns (…, n_timepoints, n) less what the orthonormal basis (n_timepoints, k) explains of them."""
    return columns - basis @ (basis.T @ columns)


@dataclass(frozen=True)
class Series:
    """Time series of a chunk of voxels, less their drifts, and what was removed. Arrays over voxels are (n_voxels,)."""

    runs: list[np.ndarray]
    """Per run float32 (n_voxels, n_timepoints); zero for voxels that are not good."""
    mean: np.ndarray
    """float32, over all time points of all runs, in the data's unit; NaN where not finite."""
    sd: np.ndarray
    """float32, standard deviation over time of what is left."""
    state: np.ndarray
    """int8: GOOD, CONSTANT (never changes within a run) or NOT_FINITE (a NaN or an infinity anywhere)."""


def detrend(model: TrialModel, chunk: Sequence[np.ndarray]) -> Series:
    """Take means and drifts off. chunk: per run (n_voxels, n_timepoints), any real dtype; left as it is."""
    total, squares = np.zeros(len(chunk[0])), np.zeros(len(chunk[0]), np.float32)
    constant = np.ones(len(total), bool)
    runs = []
    with np.errstate(invalid="ignore", over="ignore"):  # infinities and NaN are found by their sums
        for run in chunk:
            level = run.sum(axis=1, dtype=np.float64)
            constant &= run.min(axis=1) == run.max(axis=1)
            total += level
            y = run.astype(np.float32)
            y -= (level / run.shape[1]).astype(np.float32)[:, None]
            runs.append(y)
    state = np.where(np.isfinite(total), np.where(constant, CONSTANT, GOOD), NOT_FINITE).astype(np.int8)
    for y, matrices in zip(runs, model.runs):
        y[state != GOOD] = 0
        y -= (y @ matrices.drifts) @ matrices.drifts.T
        squares += energy(y)
    n_timepoints = sum(model.design.n_timepoints)
    mean = np.where(np.isfinite(total), total / n_timepoints, np.nan).astype(np.float32)
    return Series(runs, mean, np.sqrt(squares / n_timepoints), state)


def energy(y: np.ndarray) -> np.ndarray:
    """Sum of squares of each row."""
    return np.einsum("vt,vt->v", y, y)
