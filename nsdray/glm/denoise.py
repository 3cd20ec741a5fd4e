"""Noise regressors: what voxels share that do not answer to the stimuli.

Voxels whose time series no stimulus explains form the noise pool. Their principal components, run by run, become
regressors for all voxels, as many as make betas repeat best. Which voxels are in the pool, and how many regressors are
used, are decisions over all voxels; what they need of the voxels is gathered chunk by chunk: a Gram matrix of time by
time per run, and errors of the voxels that answer.

Two rules for the pool, both among bright voxels (mean above 0.1 x its 99th percentile), so that no air is in it:

- ``"on_off"``, the default, is GLMsingle's: the variance explained by one response common to all trials lies below the
  point where a mixture of two Gaussians, fitted to it over voxels, turns from the lower to the upper one. It needs no
  repeats to be decided.
- ``"negative_r2"`` is the paper's algorithm 1, step 2.2: the cross-validated variance explained is below 0. Single
  trials are noisy predictors of each other, so where repeats are few this also takes voxels that answer weakly, and
  their signal then goes into the regressors.
"""
from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from nsdray.glm.crossval import RepeatError, repeat_pairs
from nsdray.glm.design import Design
from nsdray.glm.model import TrialModel, detrend, energy, residual

POOL_RULES = ("on_off", "negative_r2")
BRIGHT_PERCENTILE, BRIGHT_SHARE = 99, 0.1
N_FALLBACK = 100
"""Voxels that decide on the number of regressors where none passes the threshold, as in GLMsingle."""
MAX_MIXTURE = 100_000
"""Values that a mixture is fitted to at most, evenly taken from the sorted ones."""
MARGIN = 1.05
"""A number of regressors is good enough when its gain times this reaches the largest gain."""


def noise_pool(
    mean: np.ndarray, on_off_r2: np.ndarray, cross_validated_r2: np.ndarray | None, rule: str = "on_off"
) -> tuple[np.ndarray, np.ndarray]:
    """Which voxels are noise, and which decide on the number of regressors: two bool (n_voxels,).

    mean: intensity. on_off_r2, cross_validated_r2: percent; the latter is needed by the rule "negative_r2" only.
    Voxels that are not good have NaN in either and are in neither.
    """
    if rule not in POOL_RULES:
        raise ValueError(f"unknown rule {rule!r} for the noise pool; known: {', '.join(POOL_RULES)}")
    r2, threshold = (on_off_r2, tail_threshold(on_off_r2)) if rule == "on_off" else (cross_validated_r2, 0.0)
    good = np.isfinite(r2)
    bright = mean > BRIGHT_SHARE * np.percentile(mean[good], BRIGHT_PERCENTILE) if good.any() else good
    pool = good & bright & (r2 < threshold)
    deciding = good & (r2 > threshold)
    if not deciding.any():
        best = np.argsort(np.where(good, r2, -np.inf), kind="stable")[::-1][:N_FALLBACK]
        deciding = np.isin(np.arange(len(r2)), best) & good
    return pool, deciding


def tail_threshold(values: np.ndarray) -> float:
    """Where the upper of two Gaussians takes over: the highest value at which both are equally probable.

    values: (n,), NaN is left out. A mixture of two Gaussians is fitted by expectation-maximisation, from the two means
    that k-means finds. -inf if the upper one is the more probable everywhere. GLMsingle looks for the same point on a
    grid of 500 values, with a random start and at most 100 steps of scikit-learn's mixture.
    """
    values = np.sort(values[np.isfinite(values)].astype(float))
    if len(values) < 4 or values[0] == values[-1]:
        return -np.inf
    if len(values) > MAX_MIXTURE:
        values = values[np.linspace(0, len(values) - 1, MAX_MIXTURE).round().astype(int)]
    weight, mean, variance = _fit_mixture(values)
    # log w_1 N_1(x) = log w_2 N_2(x) is a quadratic equation in x
    a, b = np.diff(-0.5 / variance)[0], np.diff(mean / variance)[0]
    c = np.diff(np.log(weight) - 0.5 * np.log(variance) - 0.5 * mean**2 / variance)[0]
    roots = np.roots([a, b, c])
    roots = roots[np.isreal(roots)].real
    roots = roots[(roots >= values[0]) & (roots <= values[-1])]
    return float(roots.max()) if len(roots) else -np.inf


def _fit_mixture(values: np.ndarray, n_steps: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and variances of two Gaussians, each (2,). values: sorted."""
    mean = np.array([values[0], values[-1]])
    for _ in range(100):  # k-means in one dimension: a cut between the two means
        cut = np.searchsorted(values, mean.mean())
        if cut in (0, len(values)):
            break
        mean = np.array([values[:cut].mean(), values[cut:].mean()])
    belongs = (values[:, None] > mean.mean()) == [False, True]
    floor, last = 1e-6 * values.var(), -np.inf
    for _ in range(n_steps):
        size = belongs.sum(axis=0) + 1e-12
        weight, mean = size / len(values), (belongs * values[:, None]).sum(axis=0) / size
        variance = (belongs * (values[:, None] - mean) ** 2).sum(axis=0) / size + floor
        log_density = np.log(weight) - 0.5 * np.log(2 * np.pi * variance) - 0.5 * (values[:, None] - mean) ** 2 / variance
        total = np.logaddexp(log_density[:, 0], log_density[:, 1])
        belongs = np.exp(log_density - total[:, None])
        if abs(total.mean() - last) < 1e-10:
            break
        last = total.mean()
    return weight, mean, variance


def noise_gram(model: TrialModel, chunk: Sequence[np.ndarray], in_pool: np.ndarray) -> list[np.ndarray]:
    """What the chunk's noise voxels add to the Gram matrix of each run: (n_timepoints, n_timepoints) float64.

    chunk: per run (n_voxels, n_timepoints). in_pool: bool (n_voxels,). Every voxel is first scaled to unit length.
    """
    series = detrend(model, [run[in_pool] for run in chunk])
    grams = []
    for y in series.runs:
        length = np.sqrt(energy(y))[:, None]
        unit = np.divide(y, length, where=length > 0, out=np.zeros_like(y))
        grams.append((unit.T @ unit).astype(np.float64))
    return grams


def noise_regressors(grams: Sequence[np.ndarray], n_regressors: int) -> list[np.ndarray]:
    """Leading principal components over time, per run (n_timepoints, n_regressors) with standard deviation 1.

    grams: per run, summed over all chunks.
    """
    components = [np.linalg.eigh(gram)[1][:, ::-1][:, :n_regressors] for gram in grams]
    return [one / one.std(axis=0, ddof=1) for one in components]


def regressor_errors(
    model: TrialModel, regressors: Sequence[np.ndarray], chunk: Sequence[np.ndarray], hrf_index: np.ndarray
) -> np.ndarray:
    """Error across repeats with 0, 1, … noise regressors: (n_deciding, 1 + n_regressors) float32.

    hrf_index: (n_voxels,), negative for voxels that do not decide; the others' rows come back in their order.

    Another regressor changes the least squares betas by a rank-one term. With B = X^+ G and the part of G that X does
    not explain, G - X B = Q R (its QR decomposition), the betas with the first p regressors are those with p - 1 less
    (B R^-1)_p (Q_p' y). So all numbers cost little more than one.
    """
    pairs = repeat_pairs(model.design)
    series = detrend(model, chunk)
    errors = np.zeros((len(hrf_index), 1 + regressors[0].shape[1]), np.float32)
    for hrf in np.unique(hrf_index[hrf_index >= 0]):
        rows = np.flatnonzero(hrf_index == hrf)
        errors[rows] = _errors_of_group(model, regressors, [y[rows] for y in series.runs], hrf, pairs)
    return errors[hrf_index >= 0]


def _errors_of_group(
    model: TrialModel, regressors: Sequence[np.ndarray], series: list[np.ndarray], hrf: int, pairs: sparse.csr_array
) -> np.ndarray:
    betas = model.rotate(model.rotated(series, hrf), hrf)
    error = RepeatError(betas, model.design, pairs)
    steps, found = [], [error(betas)]
    for run, (y, matrices, noise) in enumerate(zip(series, model.runs, regressors)):
        left = matrices.left[hrf].astype(np.float64)
        noise = residual(noise, model.design.drifts(run))
        solved = matrices.right[hrf].T @ (matrices.inverse_singular[hrf][:, None] * (left.T @ noise))  # X^+ G
        q, r = np.linalg.qr(noise - left @ (left.T @ noise))
        change = np.linalg.solve(r.T, solved.T)  # rows (B R^-1)_p, (n_regressors, n_trials)
        steps.append((model.design.trials_of(run), y @ q.astype(np.float32), change.astype(np.float32)))
    for p in range(regressors[0].shape[1]):
        for trials, loads, change in steps:
            betas[:, trials] -= loads[:, p, None] * change[p]
        found.append(error(betas))
    return np.stack(found, axis=1)


def choose_n_regressors(errors: np.ndarray) -> tuple[int, np.ndarray]:
    """The number of regressors, and the curve that it was chosen from (1 + n_regressors,): higher is better.

    errors: (n_deciding, 1 + n_regressors). The curve is minus the median error over voxels, less its start. Chosen is
    the smallest number that is better than all smaller ones and whose gain times MARGIN reaches the largest.
    """
    curve = -np.median(errors, axis=0)
    curve = curve - curve[0]
    best = np.maximum.accumulate(curve)
    improves = np.r_[True, curve[1:] > best[:-1]]
    return int(np.flatnonzero(improves & (curve * MARGIN >= curve.max()))[0]), curve


def cross_validated_r2(
    model: TrialModel, series: Sequence[np.ndarray], betas: np.ndarray, hrf: int, pairs: sparse.csr_array
) -> np.ndarray:
    """Variance explained by betas from other runs, percent, (n_voxels,).

    series: per run, less drifts. betas: unregularised, (n_voxels, n_trials). Each trial is predicted by the mean beta
    of its repeats in other runs; one without any by the mean beta of all trials of other runs.
    """
    design = model.design
    n_repeats = pairs.sum(axis=1)
    predicted = (pairs @ betas.T).T / np.maximum(n_repeats, 1)
    for run in range(design.n_runs):
        alone = (n_repeats == 0) & (design.run == run)
        if alone.any():
            predicted[:, alone] = betas[:, design.run != run].mean(axis=1, keepdims=True)
    return model.explained(series, predicted.astype(np.float32), hrf)


def warn_no_repeats(design: Design, kind: str) -> None:
    warnings.warn(
        f"none of the {len(design.labels)} conditions occurs in more than one of {design.n_runs} runs, so betas of type "
        f"{kind} cannot be cross-validated; betas of type B (fitted HRF) are returned instead",
        stacklevel=3,
    )
