"""Fit it all: time series in, single-trial betas out.

What needs every voxel at once is small. So the work is a few passes over chunks of voxels, with decisions between them,
and each pass is a plain function ``function(chunk, …) -> small result`` that may run anywhere:

    pass per chunk                                    decision over all voxels
    `first_pass`     on-off R2, HRF, R2, mean    ->   `denoise.noise_pool`: which voxels are noise, which decide
    `noise_gram`     time x time, per run        ->   `denoise.noise_regressors`: principal components
    `regressor_errors`  deciding voxels only     ->   `denoise.choose_n_regressors`, then the model with them
    `last_pass`      betas of the chosen type         (none: write them where they belong)

A chunk is a list of arrays (n_voxels, n_timepoints), one per run. `survey` makes the first three passes and all the
decisions through a function that the caller gives; `last_pass` is then called with what `survey` returns. `fit_glm` is
both on arrays in one process. At no time is more in memory than the data, the betas and the work on one chunk.

Types of betas, as GLMsingle names them:

    A   one on-off response to all trials alike, canonical HRF
    B   single trials, each voxel with the HRF that explains it best (NSD's b2); with hrf="assumed", the canonical (b1)
    C   B, with noise regressors
    D   C, with fractional ridge regression (NSD's b3)
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from nsdray.glm import denoise
from nsdray.glm.crossval import RepeatError, repeat_pairs
from nsdray.glm.design import Design, Events, make_design
from nsdray.glm.hrf import HRFs, assumed_hrf, hrf_library
from nsdray.glm.model import CONSTANT, GOOD, NOT_FINITE, TrialModel, detrend, energy, trial_model
from nsdray.glm.ridge import FRACTIONS, choose_fraction, match_scale

TYPES = ("A", "B", "C", "D")
HRF_CHOICES = {"library": hrf_library, "assumed": assumed_hrf}
BATCH_BYTES = 2**28
"""Working memory that a chunk is sized for, where the caller names no size."""


@dataclass(frozen=True)
class FirstPass:
    """Per voxel, (n_voxels,). R2 is percent of the variance left by the drifts; NaN for voxels that are not good."""

    state: np.ndarray
    """int8: `model.GOOD`, CONSTANT or NOT_FINITE."""
    mean: np.ndarray
    """float32, the data's unit."""
    sd: np.ndarray
    """float32, standard deviation over time less drifts, the data's unit."""
    on_off_beta: np.ndarray
    """float32, percent signal change. Type A."""
    on_off_r2: np.ndarray
    """float32. Of type A."""
    hrf_index: np.ndarray
    """int8, 0-based; -1 for voxels that are not good."""
    r2: np.ndarray
    """float32. Of type B, with the voxel's HRF."""
    cross_validated_r2: np.ndarray
    """float32, of betas from other runs; all NaN where it was not asked for."""

    @staticmethod
    def concatenate(parts: Sequence[FirstPass]) -> FirstPass:
        names = [field.name for field in fields(FirstPass)]
        return FirstPass(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def first_pass(model: TrialModel, cross_validate: bool, chunk: Sequence[np.ndarray]) -> FirstPass:
    """Everything about a chunk that the decisions need. cross_validate: also compute that R2."""
    series = detrend(model, chunk)
    good = series.state == GOOD
    total = np.where(good, sum(energy(y) for y in series.runs), np.nan)
    product = sum(y @ run.on_off for y, run in zip(series.runs, model.runs))
    on_off = sum(run.on_off @ run.on_off for run in model.runs)
    explained = np.zeros((model.n_hrfs, len(good)), np.float32)
    for hrf in range(model.n_hrfs):
        for y, run in zip(series.runs, model.runs):
            explained[hrf] += energy(y @ run.left[hrf])
    hrf_index = np.where(good, explained.argmax(axis=0), -1).astype(np.int8)
    cross_validated = np.full(len(good), np.nan, np.float32)
    if cross_validate:
        pairs = repeat_pairs(model.design)
        for hrf, rows, runs in _groups(series.runs, hrf_index):
            betas = model.rotate(model.rotated(runs, hrf), hrf)
            cross_validated[rows] = denoise.cross_validated_r2(model, runs, betas, hrf, pairs)
    return FirstPass(
        state=series.state,
        mean=series.mean,
        sd=series.sd,
        on_off_beta=np.where(good, _percent(product / on_off, series.mean), np.nan).astype(np.float32),
        on_off_r2=(100 * product**2 / (on_off * total)).astype(np.float32),
        hrf_index=hrf_index,
        r2=(100 * explained.max(axis=0) / total).astype(np.float32),
        cross_validated_r2=cross_validated,
    )


@dataclass(frozen=True)
class Survey:
    """All that `last_pass` needs, and what was decided."""

    beta_type: str
    """B in place of C or D where no condition repeats across runs."""
    model: TrialModel
    """With the chosen noise regressors."""
    first: FirstPass
    noise_pool: np.ndarray
    """bool (n_voxels,)."""
    regressors: list[np.ndarray]
    """All candidates, per run (n_timepoints, max_regressors); [] for types A and B, or if the pool is empty."""
    n_regressors: int
    curve: np.ndarray
    """(1 + max_regressors,): minus the median error of the deciding voxels, less that without regressors."""


def survey(
    design: Design,
    hrfs: HRFs,
    each_chunk: Callable[..., Iterable],
    beta_type: str = "D",
    noise_pool: str = "on_off",
    max_regressors: int = 10,
) -> Survey:
    """Look through all voxels and decide on noise pool and noise regressors.

    each_chunk: ``each_chunk(function, *arguments)`` calls ``function(chunk, *(argument[i] for argument in arguments))``
    for every chunk i, anywhere and at any time, and yields the results in the chunks' order; an argument is a list with
    an item per chunk. Results are taken one by one, and the large ones not kept. The function is a `functools.partial`
    that holds the model, tens of MB: ship it once.

    beta_type, noise_pool and max_regressors: as in `fit_glm`, which says what is warned of and refused.

    In the caller's memory are FirstPass of all voxels (26 bytes each, twice while it is put together), the errors of the
    voxels that decide (4 (1 + max_regressors) bytes each, three times), and a Gram matrix of time by time per run.
    """
    check_options(design, beta_type, noise_pool, max_regressors)
    model, pairs = trial_model(design, hrfs), repeat_pairs(design)
    denoised = beta_type in "CD"
    if denoised and not pairs.nnz:
        denoise.warn_no_repeats(design, beta_type)
        beta_type, denoised = "B", False
    parts = list(each_chunk(partial(first_pass, model, denoised and noise_pool == "negative_r2")))
    first = FirstPass.concatenate(parts)
    _check_signal(first)
    if not denoised:
        return Survey(beta_type, model, first, np.zeros(len(first.state), bool), [], 0, np.zeros(1))
    ends = np.cumsum([len(part.state) for part in parts])[:-1]
    pool, deciding = denoise.noise_pool(first.mean, first.on_off_r2, first.cross_validated_r2, noise_pool)
    if pool.sum() <= max_regressors:
        warnings.warn(
            f"the noise pool has {pool.sum()} voxels, too few for {max_regressors} noise regressors; going on without any. "
            "Voxels must be bright and unresponsive to be in it: is the mask too narrow?",
            stacklevel=3,
        )
        return Survey(beta_type, model, first, pool, [], 0, np.zeros(1))
    grams = [0.0] * design.n_runs
    for part in each_chunk(partial(denoise.noise_gram, model), np.split(pool, ends)):
        grams = [a + b for a, b in zip(grams, part)]
    regressors = denoise.noise_regressors(grams, max_regressors)
    asked = np.where(deciding, first.hrf_index, -1)
    errors = each_chunk(partial(denoise.regressor_errors, model, regressors), np.split(asked, ends))
    n, curve = denoise.choose_n_regressors(np.concatenate(list(errors)))
    if n:
        model = trial_model(design, hrfs, [run[:, :n] for run in regressors])
    return Survey(beta_type, model, first, pool, regressors, n, curve)


@dataclass(frozen=True)
class LastPass:
    """Betas of a chunk; arrays over voxels are (n_voxels,) float32."""

    betas: np.ndarray
    """(n_voxels, n_trials) float32, percent signal change."""
    r2: np.ndarray
    """Percent, of the betas before scale and offset."""
    fraction: np.ndarray
    """Length left by ridge regression, relative to the unregularised betas; 1 without ridge regression."""


def last_pass(
    model: TrialModel, fractions: Sequence[float] | None, chunk: Sequence[np.ndarray], hrf_index: np.ndarray
) -> LastPass:
    """Betas of a chunk. model: of a `Survey`. fractions: for type D; None: no ridge regression. hrf_index: (n_voxels,).

    Constant voxels get betas of 0, voxels with NaN or infinity get NaN; both have NaN for all else.
    """
    series = detrend(model, chunk)
    pairs = repeat_pairs(model.design)
    betas = np.zeros((len(hrf_index), model.design.n_trials), np.float32)
    r2, fraction = np.full((2, len(hrf_index)), np.nan, np.float32)
    for hrf, rows, runs in _groups(series.runs, hrf_index):
        rotated = model.rotated(runs, hrf)
        group = unregularised = model.rotate(rotated, hrf)
        fraction[rows] = 1
        if fractions is not None:
            inverse = np.concatenate([run.inverse_singular[hrf] for run in model.runs])
            singular = np.divide(1, inverse, where=inverse > 0, out=np.zeros_like(inverse))
            error = RepeatError(unregularised, model.design, pairs)
            rotate = partial(model.rotate, hrf=hrf)
            group, fraction[rows] = choose_fraction(rotated, singular, rotate, error, fractions)
        r2[rows] = model.explained(runs, group, hrf)
        if fractions is not None:
            scale, offset = match_scale(group, unregularised)
            group = scale[:, None] * group + offset[:, None]
        betas[rows] = _percent(group, series.mean[rows, None])
    betas[series.state == NOT_FINITE] = np.nan
    return LastPass(betas, r2, fraction)


@dataclass(frozen=True)
class GLMResult:
    """What `fit_glm` found. Voxels are in the data's order (C order of X, Y, Z for 4-D data)."""

    beta_type: str
    """A, B, C or D; B in place of C or D where no condition repeats across runs."""
    betas: np.ndarray
    """(n_trials, n_voxels) float32, percent signal change, trials in chronological order; (1, n_voxels) for type A."""
    r2: np.ndarray
    """(n_voxels,) float32, percent of the variance over time (less drifts) that the trials explain, in the sample that
    was fitted. For type D, before scale and offset."""
    on_off_r2: np.ndarray
    """(n_voxels,) float32, percent, of type A."""
    hrf_index: np.ndarray
    """(n_voxels,) int8, 0-based; -1 for constant voxels and those with NaN or infinity. Of no meaning for type A."""
    noise_pool: np.ndarray
    """(n_voxels,) bool."""
    n_regressors: int
    """Noise regressors used."""
    regressors: list[np.ndarray]
    """Candidates, per run (n_timepoints, max_regressors)."""
    curve: np.ndarray
    """(1 + max_regressors,), from which n_regressors was chosen; higher is better, 0 without regressors."""
    fraction: np.ndarray
    """(n_voxels,) float32, of the unregularised betas' length; 1 for types A to C."""
    mean: np.ndarray
    """(n_voxels,) float32, mean over time, the data's unit."""
    design: Design
    """Which trial is which: its run, onset and condition."""
    n_constant: int
    """Voxels that never change within a run; their betas are 0."""
    n_not_finite: int
    """Voxels with NaN or infinity; their betas are NaN."""
    volume_shape: tuple[int, ...]
    """(X, Y, Z), or (n_voxels,)."""

    def volume(self, values: np.ndarray) -> np.ndarray:
        """Values (…, n_voxels) on the data's grid, (…, X, Y, Z)."""
        return values.reshape(*values.shape[:-1], *self.volume_shape)


def fit_glm(
    design: Sequence[np.ndarray | Events] | np.ndarray | Events,
    data: Sequence[np.ndarray] | np.ndarray,
    stimulus_duration: float,
    tr: float,
    *,
    beta_type: str = "D",
    hrf: str = "library",
    noise_pool: str = "on_off",
    max_regressors: int = 10,
    fractions: Sequence[float] = FRACTIONS,
    sessions: Sequence[int] | None = None,
    n_voxels_batch: int | None = None,
) -> GLMResult:
    """Single-trial betas of runs of BOLD.

    design: per run (n_timepoints, n_conditions), 1 where a stimulus came on, or `Events`. data: per run
    (n_voxels, n_timepoints) or (X, Y, Z, n_timepoints), any real dtype, preprocessed but neither detrended nor
    standardised. stimulus_duration, tr: seconds. beta_type: A, B, C or D (see the module). hrf: "library" or "assumed".
    noise_pool: "on_off" or "negative_r2" (see `nsdray.glm.denoise`). max_regressors: noise regressors tried at most.
    fractions: tried by type D, within (0, 1]. sessions: a number per run, where the runs are of several sessions.
    n_voxels_batch: voxels worked on at once; None: as many as need about BATCH_BYTES.

    ValueError for a design that does not fit the data (see `make_design`) and for data without a mean. Warnings: no
    condition in two runs (then the result is of type B), an empty noise pool, voxels that are constant or not finite.
    """
    if isinstance(design, Events) or (isinstance(design, np.ndarray) and design.ndim == 2):
        design, data = [design], [data]
    checked = make_design(design, [np.shape(run) for run in data], stimulus_duration, tr, sessions)
    _check_fractions(fractions)
    if hrf not in HRF_CHOICES:
        raise ValueError(f"unknown hrf {hrf!r}; known: {', '.join(HRF_CHOICES)}")
    check_options(checked, beta_type, noise_pool, max_regressors)
    data = [np.asanyarray(run) for run in data]  # lazy arrays are read here, after all checks
    size = n_voxels_batch or batch_size(checked)
    starts = range(0, int(np.prod(data[0].shape[:-1])), size)

    def each_chunk(function, *arguments):
        for start, *rest in zip(starts, *arguments):
            yield function(_take(data, start, size), *rest)

    found = survey(checked, HRF_CHOICES[hrf](stimulus_duration, tr), each_chunk, beta_type, noise_pool, max_regressors)
    first, n_voxels = found.first, len(found.first.state)
    _warn_bad_voxels(first)
    if found.beta_type == "A":
        betas = np.where(first.state == CONSTANT, 0, first.on_off_beta)[None].astype(np.float32)
        r2, fraction = first.on_off_r2, np.ones(n_voxels, np.float32)
    else:
        betas = np.empty((checked.n_trials, n_voxels), np.float32)
        r2, fraction = np.empty((2, n_voxels), np.float32)
        chosen = fractions if found.beta_type == "D" else None
        for start in starts:
            here = slice(start, start + size)
            part = last_pass(found.model, chosen, _take(data, start, size), first.hrf_index[here])
            betas[:, here], r2[here], fraction[here] = part.betas.T, part.r2, part.fraction
    return _result(found, betas, r2, fraction, data[0].shape[:-1])


def _result(
    found: Survey, betas: np.ndarray, r2: np.ndarray, fraction: np.ndarray, volume_shape: tuple[int, ...]
) -> GLMResult:
    first = found.first
    return GLMResult(
        beta_type=found.beta_type,
        betas=betas,
        r2=r2,
        on_off_r2=first.on_off_r2,
        hrf_index=first.hrf_index,
        noise_pool=found.noise_pool,
        n_regressors=found.n_regressors,
        regressors=found.regressors,
        curve=found.curve,
        fraction=fraction,
        mean=first.mean,
        design=found.model.design,
        n_constant=int((first.state == CONSTANT).sum()),
        n_not_finite=int((first.state == NOT_FINITE).sum()),
        volume_shape=volume_shape,
    )


def batch_size(design: Design) -> int:
    """Voxels whose work takes about BATCH_BYTES: three copies of the time series and ten of the betas, float32."""
    return max(1, BATCH_BYTES // (4 * (3 * sum(design.n_timepoints) + 10 * design.n_trials)))


def _take(data: Sequence[np.ndarray], start: int, size: int) -> list[np.ndarray]:
    """Voxels start … start + size of every run, (n_voxels, n_timepoints), without flattening whole 4-D runs."""
    if data[0].ndim == 2:
        return [run[start : start + size] for run in data]
    grid = data[0].shape[:-1]
    index = np.unravel_index(np.arange(start, min(start + size, int(np.prod(grid)))), grid)
    return [run[index] for run in data]


def _groups(runs: Sequence[np.ndarray], hrf_index: np.ndarray):
    """The voxels of each HRF in use: its index, their rows, and their time series per run."""
    for hrf in np.unique(hrf_index[hrf_index >= 0]):
        rows = np.flatnonzero(hrf_index == hrf)
        yield int(hrf), rows, [y[rows] for y in runs]


def _percent(values: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """As percent of the mean's magnitude; 0 stays 0 where the mean is 0."""
    magnitude = np.abs(mean)
    return 100 * values / np.where(magnitude > 0, magnitude, 1)


def check_options(design: Design, beta_type: str, noise_pool: str, max_regressors: int) -> None:
    """ValueError for an unknown name, and for more regressors than the runs have time points to spare."""
    if beta_type not in TYPES:
        raise ValueError(f"unknown beta_type {beta_type!r}; known: {', '.join(TYPES)}")
    if noise_pool not in denoise.POOL_RULES:
        raise ValueError(f"unknown noise_pool {noise_pool!r}; known: {', '.join(denoise.POOL_RULES)}")
    if beta_type in "AB":
        return
    runs = range(design.n_runs)
    spare = [design.n_timepoints[run] - int((design.run == run).sum()) - design.drift_degree(run) - 1 for run in runs]
    if not 1 <= max_regressors < min(spare):
        run = int(np.argmin(spare))
        raise ValueError(
            f"max_regressors is {max_regressors}; run {run} has {design.n_timepoints[run]} time points, of which trials and "
            f"drifts leave {spare[run]}. Choose 1 to {spare[run] - 1}, or beta_type B"
        )


def _check_fractions(fractions: Sequence[float]) -> None:
    if not len(fractions) or min(fractions) <= 0 or max(fractions) > 1:
        raise ValueError(f"fractions are {tuple(fractions)}; each must be above 0 and at most 1")


def _check_signal(first: FirstPass) -> None:
    good = first.state == GOOD
    if not good.any():
        raise ValueError(
            f"none of {len(good)} voxels can be fitted: {(first.state == CONSTANT).sum()} are constant, "
            f"{(first.state == NOT_FINITE).sum()} hold NaN or infinity"
        )
    level, sd = np.abs(first.mean[good]), first.sd[good]
    bright = level >= denoise.BRIGHT_SHARE * np.percentile(level, denoise.BRIGHT_PERCENTILE)  # most of a volume may be air
    centred = level[bright] < sd[bright]
    if centred.mean() > 0.5:
        raise ValueError(
            f"{centred.sum()} of {bright.sum()} bright voxels have a mean below their standard deviation over time: the data "
            "look demeaned or standardised, but betas are percent of the mean. Give the time series before that step"
        )


def _warn_bad_voxels(first: FirstPass) -> None:
    n_constant, n_not_finite = int((first.state == CONSTANT).sum()), int((first.state == NOT_FINITE).sum())
    if n_constant or n_not_finite:
        warnings.warn(
            f"of {len(first.state)} voxels, {n_constant} are constant (their betas are 0) and {n_not_finite} hold NaN or "
            "infinity (their betas are NaN)",
            stacklevel=3,
        )
