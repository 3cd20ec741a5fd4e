"""The numerics against plain loops: a voxel at a time, a trial at a time, with numpy's lstsq and scipy's root finder."""
from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.mixture import GaussianMixture

from nsdray.glm import Events, denoise, fit_glm, make_design
from nsdray.glm.crossval import RepeatError, repeat_pairs
from nsdray.glm.fit import batch_size
from nsdray.glm.hrf import assumed_hrf, hrf_library
from nsdray.glm.model import GOOD, NOT_FINITE, detrend, trial_model
from nsdray.glm.ridge import FRACTIONS, alphas_for_fractions, match_scale


@pytest.fixture(scope="module")
def small(simulate):
    return simulate(5, n_runs=3, n_conditions=12, n_signal=12, n_noise=24, n_dark=4, noise=0.5, shared=1)


def fit(data, **options):
    return fit_glm(data.design, data.data, data.stimulus_duration, data.tr, **options)


# ---- the plain way


def plain_designs(data, hrfs) -> list[np.ndarray]:
    """Per run (n_hrfs, n_timepoints, n_trials): each trial's onset convolved with the sampled response."""
    designs = []
    for matrix in data.design:
        n, onsets = len(matrix), np.nonzero(matrix)[0]
        sampled = hrfs.at(np.arange(n) * data.tr)
        designs.append(np.array([[np.convolve(np.arange(n) == onset, h)[:n] for onset in onsets] for h in sampled]))
        designs[-1] = designs[-1].transpose(0, 2, 1)
    return designs


def plain_drifts(data) -> list[np.ndarray]:
    runs = [np.linspace(0, 1, len(matrix)) for matrix in data.design]
    return [np.vander(time, int(len(time) * data.tr / 120 + 0.5) + 1) for time in runs]


def plain_residual(y: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]


def plain_voxel(series, designs, nuisances, drifts) -> tuple[np.ndarray, float]:
    """Betas in the data's unit and percent of variance explained, for one voxel and one HRF."""
    betas, rest, total = [], 0.0, 0.0
    for y, x, nuisance, drift in zip(series, designs, nuisances, drifts):
        betas.append(np.linalg.lstsq(np.hstack([x, nuisance]), y, rcond=None)[0][: x.shape[1]])
        clean = plain_residual(y, drift)
        rest += ((clean - plain_residual(x @ betas[-1], drift)) ** 2).sum()
        total += (clean**2).sum()
    return np.concatenate(betas), 100 * (1 - rest / total)


def plain_error(unregularised, betas, condition, run, session=None) -> float:
    """Leave a run out; for each of its trials, compare with every trial of the condition in the other runs."""
    session = np.zeros(len(run), int) if session is None else session
    z0, z, error = np.empty(len(run)), np.empty(len(run)), 0.0
    for one in np.unique(session):
        inside = session == one
        mean, sd = unregularised[inside].mean(), unregularised[inside].std(ddof=1)
        z0[inside], z[inside] = (unregularised[inside] - mean) / sd, (betas[inside] - mean) / sd
    for left_out in np.unique(run):
        for test in np.flatnonzero(run == left_out):
            for train in np.flatnonzero((run != left_out) & (condition == condition[test])):
                error += (z[train] - z0[test]) ** 2
    return error


# ---- types A to C


def test_on_off_is_one_regressor_for_all_trials(small):
    found = fit(small, beta_type="A")
    hrf = assumed_hrf(small.stimulus_duration, small.tr)
    designs, drifts = plain_designs(small, hrf), plain_drifts(small)
    x = np.concatenate([plain_residual(one[0].sum(axis=1), drift) for one, drift in zip(designs, drifts)])
    for voxel in range(len(found.mean)):
        y = np.concatenate([plain_residual(run[voxel].astype(float), drift) for run, drift in zip(small.data, drifts)])
        beta = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
        mean = np.concatenate([run[voxel] for run in small.data]).mean(dtype=float)
        np.testing.assert_allclose(found.mean[voxel], mean, rtol=1e-6)
        np.testing.assert_allclose(found.betas[0, voxel], 100 * beta / mean, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found.r2[voxel], 100 * (1 - ((y - beta * x) ** 2).sum() / (y**2).sum()), atol=1e-3)


@pytest.mark.parametrize("beta_type", ["B", "C"])
def test_betas_and_r2_are_those_of_least_squares_voxel_by_voxel(small, beta_type):
    found = fit(small, beta_type=beta_type, max_regressors=5)
    designs, drifts = plain_designs(small, hrf_library(small.stimulus_duration, small.tr)), plain_drifts(small)
    assert (found.n_regressors > 0) == (beta_type == "C")
    nuisances = drifts
    if beta_type == "C":
        nuisances = [np.hstack([a, b[:, : found.n_regressors]]) for a, b in zip(drifts, found.regressors)]
    for voxel in range(len(found.mean)):
        series = [run[voxel].astype(float) for run in small.data]
        plain = [plain_voxel(series, [x[hrf] for x in designs], drifts, drifts)[1] for hrf in range(20)]
        best = found.hrf_index[voxel]
        assert plain[best] > max(plain) - 1e-3
        betas, r2 = plain_voxel(series, [x[best] for x in designs], nuisances, drifts)
        np.testing.assert_allclose(found.r2[voxel], r2, atol=1e-2)
        np.testing.assert_allclose(found.betas[:, voxel], 100 * betas / found.mean[voxel], rtol=2e-3, atol=2e-3)


def test_regressors_are_principal_components_of_the_unit_length_pool(small):
    found = fit(small, beta_type="C", max_regressors=4)
    for run, drift, regressors in zip(small.data, plain_drifts(small), found.regressors):
        pool = plain_residual(run[found.noise_pool].T.astype(float), drift)
        components = np.linalg.svd(pool / np.linalg.norm(pool, axis=0))[0][:, :4]
        np.testing.assert_allclose(np.abs(components.T @ regressors), np.diag(np.linalg.norm(regressors, axis=0)), atol=1e-2)
        np.testing.assert_allclose(regressors.std(axis=0, ddof=1), 1)


# ---- cross-validation


@pytest.fixture
def scattered(rng):
    """A design with every oddity: repeats within a run, none at all, uneven runs, two sessions."""
    runs = [[3, 0, 3, 1], [1, 2, 0], [2, 2, 4, 5, 3, 0]]
    events = [Events([10.0 * i + 1 for i in range(len(run))], run) for run in runs]
    return make_design(events, [(1, 120)] * 3, 2, 1, sessions=[7, 7, 9])


def test_repeat_error_is_that_of_the_loops(scattered, rng):
    unregularised, betas = rng.standard_normal((2, 6, scattered.n_trials)).astype(np.float32)
    unregularised[0] = 3  # a voxel whose betas do not vary has no error rather than a NaN
    found = RepeatError(unregularised, scattered, repeat_pairs(scattered))(betas)
    session = scattered.session[scattered.run]
    expected = [
        plain_error(unregularised[v], betas[v], scattered.condition, scattered.run, session) for v in range(1, 6)
    ]
    np.testing.assert_allclose(found[1:], expected, rtol=1e-4)
    assert found[0] == 0


def test_errors_of_all_numbers_of_regressors_are_those_of_separate_fits(small, rng):
    design = make_design(small.design, [run.shape for run in small.data], small.stimulus_duration, small.tr)
    hrfs = hrf_library(small.stimulus_duration, small.tr)
    regressors = [rng.standard_normal((len(one), 3)) for one in small.design]
    asked = np.where(np.arange(40) % 3 == 0, np.arange(40) % 20, -1)
    found = denoise.regressor_errors(trial_model(design, hrfs), regressors, small.data, asked)
    designs, drifts = plain_designs(small, hrfs), plain_drifts(small)
    for row, voxel in zip(found, np.flatnonzero(asked >= 0)):
        series, x = [run[voxel].astype(float) for run in small.data], [one[asked[voxel]] for one in designs]
        nuisances = [[np.hstack([d, g[:, :p]]) for d, g in zip(drifts, regressors)] for p in range(4)]
        betas = [plain_voxel(series, x, nuisance, drifts)[0] for nuisance in nuisances]
        expected = [plain_error(betas[0], one, design.condition, design.run) for one in betas]
        np.testing.assert_allclose(row, expected, rtol=2e-3)
    assert len(found) == (asked >= 0).sum()


def plain_choice(curve) -> int:
    chosen, best = 0, -np.inf
    for p, value in enumerate(curve):
        if value > best:
            chosen, best = p, value
            if best * 1.05 >= max(curve):
                return chosen


def test_number_of_regressors_is_the_smallest_good_enough(rng):
    for _ in range(50):
        errors = rng.standard_normal((7, 6)).cumsum(axis=1)
        chosen, curve = denoise.choose_n_regressors(errors)
        np.testing.assert_allclose(curve, np.median(errors[:, 0]) - np.median(errors, axis=0))
        assert chosen == plain_choice(curve)
    assert denoise.choose_n_regressors(np.array([[9.0, 5, 4.7, 4.9]]))[0] == 2
    assert denoise.choose_n_regressors(np.array([[9.0, 5, 4.9, 4.85]]))[0] == 1
    assert denoise.choose_n_regressors(np.array([[9.0, 10, 11]]))[0] == 0


def test_negative_r2_is_of_betas_from_other_runs(scattered, rng):
    hrfs = hrf_library(2, 1)
    model, pairs = trial_model(scattered, hrfs), repeat_pairs(scattered)
    series = [y - (y @ run.drifts) @ run.drifts.T for y, run in zip(rng.standard_normal((3, 4, 120)), model.runs)]
    betas = rng.standard_normal((4, scattered.n_trials))
    found = denoise.cross_validated_r2(model, series, betas, 6, pairs)
    condition, run = scattered.condition, scattered.run
    for voxel in range(4):
        rest = total = 0
        for number, y in enumerate(series):
            prediction = np.zeros(120)
            for column, trial in enumerate(np.flatnonzero(run == number)):
                others = (run != number) & (condition == condition[trial])
                beta = betas[voxel, others if others.any() else run != number].mean()
                prediction += beta * model.runs[number].responses[6][:, column]
            rest, total = rest + ((y[voxel] - prediction) ** 2).sum(), total + (y[voxel] ** 2).sum()
        np.testing.assert_allclose(found[voxel], 100 * (1 - rest / total), rtol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_tail_threshold_is_where_two_gaussians_cross(seed):
    random = np.random.default_rng(seed)
    values = np.r_[random.normal(0.5, 0.4, 3000), random.normal(6, 4, 1500), np.nan]
    threshold = denoise.tail_threshold(values)
    mixture = GaussianMixture(2, tol=1e-10, max_iter=1000).fit(values[:-1, None])
    np.testing.assert_allclose(mixture.predict_proba([[threshold]]), [[0.5, 0.5]], atol=1e-3)
    above = mixture.predict_proba(np.linspace(threshold + 0.01, 15, 50)[:, None])
    assert (above[:, mixture.means_.argmax()] > 0.5).all()


def test_tail_threshold_of_values_that_are_all_alike_takes_none():
    assert denoise.tail_threshold(np.full(10, 3.0)) == -np.inf
    many = np.r_[np.random.default_rng(0).normal(0, 1, 150_000), np.random.default_rng(1).normal(20, 1, 150_000)]
    assert 8 < denoise.tail_threshold(many) < 12


def test_voxels_that_decide_fall_back_on_the_best():
    mean, r2 = np.full(300, 100.0), -np.arange(1.0, 301)
    r2[7] = np.nan
    pool, deciding = denoise.noise_pool(mean, r2, r2, "negative_r2")
    assert np.flatnonzero(deciding).tolist() == [i for i in range(101) if i != 7]
    assert pool.sum() == 299 and not pool[7]


# ---- ridge regression


def test_alphas_leave_the_fractions_that_are_asked_for(rng):
    singular = np.r_[np.geomspace(30, 0.3, 24), 0]
    rotated = (rng.standard_normal((5, 25)) * (singular > 0)).astype(np.float32)
    alphas = alphas_for_fractions(rotated, singular, FRACTIONS)
    for voxel in range(5):
        full = np.linalg.norm(rotated[voxel])

        def left(alpha, voxel=voxel, full=full):
            return np.linalg.norm(rotated[voxel] * singular**2 / np.maximum(singular**2 + alpha, 1e-30)) / full

        for fraction, alpha in zip(FRACTIONS, alphas[:, voxel]):
            np.testing.assert_allclose(left(alpha), fraction, atol=1e-3)
            if fraction < 1:
                exact = brentq(lambda a, f=fraction: left(a) - f, 0, 1e6)
                np.testing.assert_allclose(alpha, exact, rtol=0.02)
    assert (alphas[0] == 0).all()


def test_match_scale_is_least_squares_and_never_turns_signs_round(rng):
    a, b = rng.standard_normal((2, 20, 30))
    a[0] = 0
    scale, offset = match_scale(a, b)
    for voxel in range(1, 20):
        line = np.linalg.lstsq(np.stack([a[voxel], np.ones(30)], 1), b[voxel], rcond=None)[0]
        expected = line if line[0] >= 0 else [1, 0]
        np.testing.assert_allclose([scale[voxel], offset[voxel]], expected, atol=1e-9)
    assert (scale[0], offset[0]) == (1, 0) and (scale == 1).sum() > 3


def test_type_d_is_that_of_plain_loops(small):
    """All 20 ridge regressions of a voxel, by root finding and np.linalg.solve."""
    found = fit(small, beta_type="D", max_regressors=5)
    designs, drifts = plain_designs(small, hrf_library(small.stimulus_duration, small.tr)), plain_drifts(small)
    nuisances = [np.hstack([a, b[:, : found.n_regressors]]) for a, b in zip(drifts, found.regressors)]
    n_per_run = [one.shape[2] for one in designs]
    run, same = np.repeat(np.arange(3), n_per_run), 0
    for voxel in range(0, 40, 2):
        blocks = [plain_residual(x[found.hrf_index[voxel]], g) for x, g in zip(designs, nuisances)]
        y = [plain_residual(one[voxel].astype(float), g) for one, g in zip(small.data, nuisances)]
        gram = np.zeros((sum(n_per_run),) * 2)
        for number, block in enumerate(blocks):
            gram[np.ix_(run == number, run == number)] = block.T @ block
        right = np.concatenate([block.T @ one for block, one in zip(blocks, y)])

        def ridge(alpha, gram=gram, right=right):
            return np.linalg.solve(gram + alpha * np.eye(len(gram)), right)

        ols, candidates = ridge(0), []
        for fraction in FRACTIONS:
            alpha = 0 if fraction == 1 else brentq(
                lambda a, f=fraction, ols=ols, ridge=ridge: np.linalg.norm(ridge(a)) / np.linalg.norm(ols) - f, 0, 1e7
            )
            candidates.append(ridge(alpha))
        errors = [plain_error(ols, one, small.condition, run) for one in candidates]
        best = int(np.argmin(errors))
        chosen = FRACTIONS.index(pytest.approx(found.fraction[voxel]))
        assert errors[chosen] < errors[best] * 1.001
        line = np.linalg.lstsq(np.stack([candidates[chosen], np.ones(len(ols))], 1), ols, rcond=None)[0]
        line = line if line[0] >= 0 else [1, 0]
        expected = 100 * (candidates[chosen] * line[0] + line[1]) / found.mean[voxel]
        np.testing.assert_allclose(found.betas[:, voxel], expected, atol=5e-3 * np.abs(expected).max())
        same += chosen == best
    assert same >= 18


# ---- what must not matter, and bad data


def test_chunks_layout_and_dtype_do_not_matter(small, tmp_path):
    whole = fit(small, n_voxels_batch=40)
    pieces = fit(small, n_voxels_batch=7)
    np.testing.assert_allclose(pieces.betas, whole.betas, atol=1e-3)
    assert pieces.n_regressors == whole.n_regressors and (pieces.noise_pool == whole.noise_pool).all()
    volumes = SimpleNamespace(**vars(small) | {"data": [np.asfortranarray(run.reshape(2, 4, 5, -1)) for run in small.data]})
    found = fit(volumes, n_voxels_batch=7)
    np.testing.assert_array_equal(found.betas, pieces.betas)
    assert found.volume(found.betas).shape == (*found.betas.shape[:1], 2, 4, 5)
    np.testing.assert_array_equal(found.volume(found.mean).ravel(), pieces.mean)
    scaled = SimpleNamespace(**vars(small) | {"data": [np.round(run * 20).astype(np.int16) for run in small.data]})
    np.testing.assert_allclose(fit(scaled).betas[:, :36], whole.betas[:, :36], atol=0.1)


def test_one_voxel_is_enough_for_type_b(small):
    one = SimpleNamespace(**vars(small) | {"data": [run[:1] for run in small.data]})
    np.testing.assert_allclose(fit(one, beta_type="B").betas, fit(small, beta_type="B").betas[:, :1], atol=1e-3)


def test_a_batch_holds_more_voxels_where_runs_are_short():
    designs = [make_design([Events([n / 2], ["a"])], [(9, n)], 1, 1) for n in (50, 500)]
    assert batch_size(designs[0]) > 5 * batch_size(designs[1]) > 1000


@pytest.mark.parametrize("beta_type", ["A", "B", "C", "D"])
def test_bad_voxels_are_counted_and_touch_no_other(small, beta_type):
    good = fit(small, beta_type=beta_type)
    data = [np.vstack([run, np.full((5, run.shape[1]), 7.0)]) for run in small.data]
    data[1][40, 3], data[0][41, 0] = np.nan, np.inf
    data[0][42] = 9.0  # constant within every run, at two levels
    data[2][43] = 0.0
    expected = "of 45 voxels, 3 are constant .their betas are 0. and 2 hold NaN or infinity"
    with pytest.warns(UserWarning, match=expected), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # nothing is computed from NaN and then hidden
        found = fit(SimpleNamespace(**vars(small) | {"data": data}), beta_type=beta_type)
    assert (found.n_constant, found.n_not_finite) == (3, 2)
    assert np.isnan(found.betas[:, 40:42]).all() and (found.betas[:, 42:] == 0).all()
    assert (found.hrf_index[40:] == -1).all() and np.isnan(found.r2[40:]).all() and not found.noise_pool[40:].any()
    np.testing.assert_allclose(found.betas[:, :40], good.betas, atol=2e-3)


@pytest.mark.parametrize("silent", [0, 2])
def test_a_voxel_that_is_silent_in_one_run_is_still_fitted(small, silent):
    data = [run[:3].copy() for run in small.data]
    data[silent][1] = data[silent][1].mean()
    found = fit(SimpleNamespace(**vars(small) | {"data": data}), beta_type="B")
    still = found.design.run == silent
    assert found.n_constant == 0 and np.abs(found.betas[still, 1]).max() < 1e-2 < np.abs(found.betas[~still, 1]).max()


@pytest.mark.parametrize("beta_type", ["B", "D"])
def test_a_trial_of_which_nothing_was_recorded_gets_0(small, beta_type):
    matrices = [run.copy() for run in small.design]
    matrices[1][-1, 0] = 1  # the response begins at 0, on the last volume
    data = SimpleNamespace(**vars(small) | {"design": matrices})
    with pytest.warns(UserWarning, match="1 of 37 trials begin less than 8 s before the end"):
        found = fit(data, beta_type=beta_type)
    lost = np.flatnonzero((found.design.run == 1) & (found.design.condition == 0))[-1]
    betas = fit(small, beta_type="B").betas
    if beta_type == "B":
        np.testing.assert_allclose(found.betas[lost], 0, atol=1e-6)
        np.testing.assert_allclose(np.delete(found.betas, lost, axis=0), betas, atol=1e-3)
    assert np.isfinite(found.betas).all() and np.abs(found.betas).max() < 2 * np.abs(betas).max()


def test_time_series_lose_mean_and_drift_and_bad_ones_are_silenced(small):
    model = trial_model(make_design(small.design, [run.shape for run in small.data], 3, 1), hrf_library(3, 1))
    data = [run[:4].copy() for run in small.data]
    data[0][1], data[1][2, 5], data[2][3, 0] = 5.0, np.nan, -np.inf
    series = detrend(model, data)
    assert series.state.tolist() == [GOOD, GOOD, NOT_FINITE, NOT_FINITE] and np.isnan(series.mean[2:]).all()
    assert not any(y[2:].any() for y in series.runs) and not series.runs[0][1].any()
    expected = [plain_residual(run[0].astype(float), drift) for run, drift in zip(data, plain_drifts(small))]
    np.testing.assert_allclose(np.concatenate([y[0] for y in series.runs]), np.concatenate(expected), atol=1e-3)
    np.testing.assert_allclose(series.sd[0], np.sqrt(np.mean(np.concatenate(expected) ** 2)), rtol=1e-4)


def test_air_that_is_noisier_than_bright_is_no_reason_to_refuse(small, rng):
    air = [rng.standard_normal((200, run.shape[1])) for run in small.data]
    found = fit(SimpleNamespace(**vars(small) | {"data": [np.vstack(pair) for pair in zip(small.data, air)]}), beta_type="B")
    np.testing.assert_allclose(found.betas[:, :40], fit(small, beta_type="B").betas, atol=1e-3)


def test_data_without_a_mean_or_without_a_live_voxel_are_refused(small):
    centred = [run - run.mean(axis=1, keepdims=True) for run in small.data]
    with pytest.raises(ValueError, match=r"\d+ of \d+ bright voxels have a mean below .* look demeaned or standardised"):
        fit(SimpleNamespace(**vars(small) | {"data": centred}))
    dead = [np.zeros_like(run) for run in small.data]
    with pytest.raises(ValueError, match="none of 40 voxels can be fitted: 40 are constant, 0 hold NaN"):
        fit(SimpleNamespace(**vars(small) | {"data": dead}))


@pytest.mark.parametrize("beta_type", ["C", "D"])
def test_without_repeats_type_b_is_given_and_said(small, beta_type):
    n = small.design[0].shape[1]
    distinct = [np.hstack([run * (number == k) for k in range(3)]) for number, run in enumerate(small.design)]
    data = SimpleNamespace(**vars(small) | {"design": distinct})
    with pytest.warns(UserWarning, match=f"none of the {3 * n} conditions .* 3 runs, so betas of type {beta_type} cannot be"):
        found = fit(data, beta_type=beta_type)
    assert found.beta_type == "B" and found.n_regressors == 0
    np.testing.assert_array_equal(found.betas, fit(small, beta_type="B").betas)


def test_an_empty_noise_pool_is_said(small):
    signal = SimpleNamespace(**vars(small) | {"data": [run[:8] for run in small.data]})
    with pytest.warns(UserWarning, match="the noise pool has . voxels, too few for 10 noise regressors"):
        found = fit(signal, beta_type="C")
    assert found.beta_type == "C" and found.n_regressors == 0


def test_options_are_checked(small):
    for options, message in [
        ({"beta_type": "E"}, "unknown beta_type 'E'; known: A, B, C, D"),
        ({"hrf": "spm"}, "unknown hrf 'spm'; known: library, assumed"),
        ({"noise_pool": "r2"}, "unknown noise_pool 'r2'; known: on_off, negative_r2"),
        ({"fractions": [0, 1]}, r"fractions are \(0, 1\)"),
        ({"max_regressors": 0}, "max_regressors is 0; run 0 has 70 time points"),
        ({"max_regressors": 60}, "leave 56. Choose 1 to 55, or beta_type B"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(small, **options)
