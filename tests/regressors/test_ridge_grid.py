"""Scores of alphas against brute-force loops over scikit-learn, and what is predicted at the chosen ones."""
from __future__ import annotations

import threading
import tracemalloc
from itertools import cycle

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from nsdray.regressors.banded import drawn_penalties, voxel_penalties
from nsdray.regressors.linalg import Scratch, to_numpy
from nsdray.regressors.ridge import ridge_kernel
from nsdray.regressors.ridge_grid import Smoothers, ahead, alpha_scores, best, fit_block, make_smoothers
from nsdray.regressors.ridge_memory import Weights, check_memory, ridge_bytes
from nsdray.regressors.target_blocks import centre_targets

ALPHAS = (1e-2, 1.0, 30.0, 1e3, 1e6)
SHAPES = [(25, 60), (30, 30), (60, 12)]


def make_data(n: int, p: int, n_targets: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets from pure noise to almost no noise, and a constant one."""
    random = np.random.default_rng(n * 100 + p)
    betas = random.standard_normal((n + 9, p))
    signal = betas @ random.standard_normal((p, n_targets)) / np.sqrt(p)
    targets = signal * np.linspace(0, 3, n_targets) + random.standard_normal((n + 9, n_targets)) + 5
    targets[:, 2] = 4.25
    return betas[:n], targets, betas[n:]


def left_out_loop(betas: np.ndarray, targets: np.ndarray, alpha: float, rows) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of each row, and their R2, by fitting without it."""
    predictions, means = [], []
    for i in rows:
        others = np.delete(np.arange(len(betas)), i)
        predictions.append(Ridge(alpha=alpha, solver="svd").fit(betas[others], targets[others]).predict(betas[[i]]).ravel())
        means.append(targets[others].mean(0))
    lost, spread = ((targets[rows] - np.stack(x)) ** 2 for x in (predictions, means))
    return np.stack(predictions), 1 - lost.sum(0) / np.maximum(spread.sum(0), 1e-300) * (targets[rows].std(0) > 0)


def gcv_loop(betas: np.ndarray, targets: np.ndarray, alpha: float) -> np.ndarray:
    """From the hat matrix, made by predicting every unit vector."""
    n = len(betas)
    hat = Ridge(alpha=alpha, solver="svd").fit(betas, np.eye(n)).predict(betas)
    lost = ((targets - hat @ targets) ** 2).sum(0) / (1 - np.trace(hat) / n) ** 2
    spread = ((targets - targets.mean(0)) ** 2).sum(0) / (1 - 1 / n) ** 2
    return np.where(targets.std(0) > 0, 1 - lost / np.maximum(spread, 1e-300), 0)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("n, p", SHAPES)
@pytest.mark.parametrize("method", ["sample", "all", "gcv"])
def test_scores_of_alphas_are_those_of_a_loop(n, p, method, device):
    betas, targets, _ = make_data(n, p)
    targets, rows = targets[:n], [4, 7, 19]
    kernel = ridge_kernel(betas, device=device)
    block = centre_targets(targets, np.float64, device)
    ours = alpha_scores(kernel, kernel.decompose(), ALPHAS, block, method, rows)
    loops = {
        "sample": lambda alpha: left_out_loop(betas, targets, alpha, rows)[1],
        "all": lambda alpha: left_out_loop(betas, targets, alpha, range(n))[1],
        "gcv": lambda alpha: gcv_loop(betas, targets, alpha),
    }
    reference = np.stack([loops[method](alpha) for alpha in ALPHAS])
    reference[:, 2] = 0  # the constant target
    np.testing.assert_allclose(ours.targets, reference, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(best(ours.targets), best(reference))
    assert len(set(best(ours.targets))) > 1, "the targets should want different alphas"
    assert (ours.images is None) == (method == "gcv")
    if ours.images is not None:
        assert ours.images.shape == (len(ALPHAS), len(rows) if method == "sample" else n)
        np.testing.assert_allclose(ours.images.mean(1), ours.targets.mean(1), rtol=1e-9)
        single = alpha_scores(kernel, kernel.decompose(), ALPHAS, block, "sample", rows).images
        np.testing.assert_allclose(single, image_loop(betas, targets, rows), rtol=1e-6, atol=1e-6)


def image_loop(betas: np.ndarray, targets: np.ndarray, rows: list[int]) -> np.ndarray:
    """Each left-out row's share of R2, mean over targets."""
    found = []
    for alpha in ALPHAS:
        predicted, _ = left_out_loop(betas, targets, alpha, rows)
        means = np.stack([np.delete(targets, i, 0).mean(0) for i in rows])
        spread = ((targets[rows] - means) ** 2).mean(0)
        share = 1 - (targets[rows] - predicted) ** 2 / np.where(spread > 0, spread, 1)
        found.append(np.where(targets.std(0) > 0, share, 0).mean(1))
    return np.stack(found)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("n, p", SHAPES)
def test_each_target_has_its_own_alpha_s_predictions(n, p, device):
    betas, everything, betas_test = make_data(n, p)
    targets, rows = everything[:n], [0, 4, 9, 7]
    kernel = ridge_kernel(betas, device=device)
    decomposed = kernel.decompose()
    smoothers = make_smoothers([kernel.at(alpha, decomposed) for alpha in ALPHAS], betas_test, rows)
    block = centre_targets(targets, np.float64, device)
    exact = np.stack([left_out_loop(betas, targets, alpha, rows)[1] for alpha in ALPHAS])
    exact[:, 2] = 0
    for scores in (None, alpha_scores(kernel, decomposed, ALPHAS, block, "gcv")):
        fitted = fit_block(smoothers, block, scores)
        np.testing.assert_array_equal(fitted.choice, best(exact if scores is None else scores.targets))
        if scores is None:
            np.testing.assert_allclose(fitted.scores.targets, exact, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(fitted.scores.images, image_loop(betas, targets, rows), rtol=1e-6, atol=1e-6)
        assert len(set(fitted.choice)) > 1
        for j, a in enumerate(fitted.choice):
            reference = Ridge(alpha=ALPHAS[a], solver="svd").fit(betas, targets[:, j])
            np.testing.assert_allclose(fitted.test()[:, j], reference.predict(betas_test), rtol=1e-6, atol=1e-6)
            left_out, r2 = left_out_loop(betas, targets[:, [j]], ALPHAS[a], rows)
            np.testing.assert_allclose(to_numpy(fitted.left_out)[:, j] + fitted.mean[j], left_out[:, 0], rtol=1e-6, atol=1e-6)
            assert fitted.leave_one_out_r2[j] == pytest.approx(0 if j == 2 else r2[0], abs=1e-6)
            mean, std = (moment[j] for moment in fitted.left_out_moments())
            assert mean == pytest.approx(left_out.mean(), abs=1e-5) and std == pytest.approx(left_out.std(ddof=1), abs=1e-5)


def test_one_alpha_needs_no_choice():
    betas, targets, betas_test = make_data(30, 40)
    kernel = ridge_kernel(betas)
    smoothers = make_smoothers([kernel.factorise(30.0)], betas_test, None)
    fitted = fit_block(smoothers, centre_targets(targets[:30], np.float64))
    assert not fitted.choice.any() and len(smoothers.rows) == 30
    np.testing.assert_allclose(fitted.test(), Ridge(alpha=30.0).fit(betas, targets[:30]).predict(betas_test), rtol=1e-9)


def test_without_leave_one_out_rows():
    betas, targets, betas_test = make_data(30, 40)
    kernel = ridge_kernel(betas)
    fitted = fit_block(make_smoothers([kernel.factorise(30.0)], betas_test, []), centre_targets(targets[:30], np.float64))
    np.testing.assert_allclose(fitted.test(), Ridge(alpha=30.0).fit(betas, targets[:30]).predict(betas_test), rtol=1e-9)
    assert np.isnan(fitted.leave_one_out_r2).all() and np.isnan(fitted.left_out_moments()).all()


def test_alphas_never_see_test_targets_or_betas():
    betas, targets, betas_test = make_data(30, 40)
    kernel = ridge_kernel(betas)
    factors = [kernel.at(alpha, kernel.decompose()) for alpha in ALPHAS]
    block = centre_targets(targets[:30], np.float64)
    one, two = (fit_block(make_smoothers(factors, test, None), block) for test in (betas_test, betas_test * 100))
    np.testing.assert_array_equal(one.choice, two.choice)
    np.testing.assert_array_equal(one.leave_one_out_r2, two.leave_one_out_r2)


# Voxel groups.


GROUPS = [np.arange(0, 40, 2), np.arange(1, 30, 2), np.arange(31, 40, 2)]
FACTORS = (0.5, 4.0, 30.0)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("n", [25, 40, 90])
def test_penalties_by_group_are_scaled_voxels(n, device, monkeypatch):
    monkeypatch.setattr("nsdray.regressors.ridge.N_VOXELS_CHUNK", 16)
    betas, everything, betas_test = make_data(n, 40)
    targets = everything[:n]
    penalties = voxel_penalties(GROUPS, FACTORS, 40)
    kernel = ridge_kernel(betas, penalties, device=device)
    factor = kernel.factorise(7.0)
    reference = Ridge(alpha=7.0, solver="svd").fit(betas / np.sqrt(penalties), targets)
    expected = reference.predict(betas_test / np.sqrt(penalties))
    smoothers = make_smoothers([factor], betas_test, [1, 5], GROUPS)
    fitted = fit_block(smoothers, centre_targets(targets, np.float64, device))
    np.testing.assert_allclose(fitted.test(), expected, rtol=1e-6)
    weights, intercept = factor.weights(targets)
    np.testing.assert_allclose(betas_test @ weights + intercept, expected, rtol=1e-6)
    left_out, _ = left_out_loop(betas / np.sqrt(penalties), targets, 7.0, [1, 5])
    np.testing.assert_allclose(to_numpy(fitted.left_out) + fitted.mean, left_out, rtol=1e-6)
    own = np.where(np.isin(np.arange(40), GROUPS[1]), 1.0, 0.0)  # one group's share, from its weights
    part = ((betas_test - betas.mean(0)) * own) @ weights
    np.testing.assert_allclose(to_numpy(fitted.test_parts)[1], part, rtol=1e-6, atol=1e-9)


def test_parts_of_r2_add_up():
    betas, everything, betas_test = make_data(30, 40)
    targets, truth = everything[:30], everything[30:]
    kernel = ridge_kernel(betas, voxel_penalties(GROUPS, FACTORS, 40))
    fitted = fit_block(make_smoothers([kernel.factorise(7.0)], betas_test, None, GROUPS), centre_targets(targets, np.float64))
    parts = fitted.parts_of_r2(truth)
    assert parts.shape == (3, 6) and (parts[:, 2] == 0).all()
    spread = ((truth - targets.mean(0)) ** 2).sum(0)
    total = 1 - ((truth - fitted.test()) ** 2).sum(0) / np.where(spread > 0, spread, 1)
    kept = np.arange(6) != 2
    np.testing.assert_allclose(parts.sum(0)[kept], total[kept], rtol=1e-9)


def test_a_group_that_carries_the_signal_is_found():
    random = np.random.default_rng(0)
    betas = random.standard_normal((300, 40))
    targets = betas[:, GROUPS[1]] @ random.standard_normal((len(GROUPS[1]), 3)) + random.standard_normal((300, 3))
    train, test = slice(0, 200), slice(200, 300)
    blocks = {}
    for factors in ((1.0, 1.0, 1.0), (100.0, 0.1, 100.0), (0.1, 100.0, 0.1)):
        kernel = ridge_kernel(betas[train], voxel_penalties(GROUPS, factors, 40))
        block = centre_targets(targets[train], np.float64)
        blocks[factors] = alpha_scores(kernel, kernel.decompose(), [100.0], block, "all").targets.mean()
        parts = fit_block(make_smoothers([kernel.factorise(100.0)], betas[test], None, GROUPS), block).parts_of_r2(targets[test])
        if factors[0] == 1:
            assert (parts[1] > 0.3).all() and (np.abs(parts[[0, 2]]) < 0.1).all()
    assert max(blocks, key=blocks.get) == (100.0, 0.1, 100.0)


def test_drawn_penalties():
    draws = drawn_penalties(3, 50, 7, "clip_text")
    assert draws == drawn_penalties(3, 50, 7, "clip_text") != drawn_penalties(3, 50, 8, "clip_text")
    weights = 1 / np.array(draws)
    assert weights.shape == (50, 3) and (weights > 0).all()
    np.testing.assert_allclose(weights.mean(1), 1, atol=2e-3)
    with pytest.raises(ValueError, match="2 penalties for 3 groups"):
        voxel_penalties(GROUPS, (1.0, 2.0), 40)


# Streaming and memory.


def test_ahead_keeps_order_and_works_beside_its_user():
    threads, main = [], threading.get_ident()

    def items():
        for i in range(5):
            threads.append(threading.get_ident())
            yield i

    assert list(ahead(items())) == [0, 1, 2, 3, 4]
    assert main not in threads and len(threads) == 5

    def broken():
        yield 1
        raise ValueError("no such part")

    with pytest.raises(ValueError, match="no such part"):
        list(ahead(broken()))


SIZES = dict(n_samples=900, n_voxels=1500, n_test=120, n_held_out=120, n_targets_block=700)


def bounded(needed: dict[str, int], peaks: dict[str, int]) -> None:
    """Asserts that the estimates are above what was used, or at most a tenth below, and not far above."""
    for name, peak in peaks.items():
        assert 0.7 * needed[name] < peak < 1.1 * needed[name], f"{name}: {peak / 1e6:.1f} MB, estimated {needed[name] / 1e6:.1f}"


class Peaks(dict):
    """Traced peaks by phase."""

    def note(self, name: str) -> None:
        self[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()


@pytest.fixture
def peaks():
    tracemalloc.start()
    yield Peaks()
    tracemalloc.stop()


@pytest.mark.parametrize("how", ["cholesky", "eigen", "groups", "alphas"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_estimate_bounds_what_is_used(dtype, how, peaks):
    n, p, n_test, n_targets = 900, 1500, 120, 700
    random = np.random.default_rng(0)
    groups = np.array_split(np.arange(p), 5) if how == "groups" else None
    alphas = (40.0, 50.0, 60.0) if how == "alphas" else (50.0,)
    decomposed = how in ("eigen", "alphas")
    betas, betas_test = (random.standard_normal((rows, p), np.float32) for rows in (n, n_test))
    needed = ridge_bytes(**SIZES, dtype=dtype, decomposed=decomposed, n_groups=len(groups or [0]), n_alphas=len(alphas))
    kernel = ridge_kernel(betas, dtype=dtype)
    peaks.note("kernel")
    own = kernel.decompose() if decomposed else None
    factors = [kernel.at(alpha, own) if decomposed else kernel.factorise(alpha) for alpha in alphas]
    smoothers = make_smoothers(factors, betas_test, np.arange(n_test), groups)
    peaks.note("factorisation")
    assert isinstance(smoothers, Smoothers)
    del kernel, own, factors, betas, betas_test
    tracemalloc.reset_peak()
    scratch, memory = Scratch(), cycle((Scratch(), Scratch()))

    def halves():
        for _ in range(3):
            half = next(memory).empty((n, n_targets), np.float16)
            half[:] = 1
            half[:, 1] = np.arange(n)
            yield half

    for half in ahead(halves()):
        fit_block(smoothers, centre_targets(half, dtype, scratch=scratch)).left_out_moments()
    peaks.note("targets")
    bounded(needed, peaks)


@pytest.mark.parametrize("method", ["sample", "all", "gcv"])
def test_the_estimate_bounds_a_search(method, peaks, monkeypatch):
    n, p, n_targets = 900, 1500, 700
    monkeypatch.setattr("nsdray.regressors.ridge_grid.N_ROWS_CHUNK", 128)
    monkeypatch.setattr("nsdray.regressors.ridge_memory.N_ROWS_CHUNK", 128)
    betas = np.random.default_rng(0).standard_normal((n, p), np.float32)
    half = np.random.default_rng(1).standard_normal((n, 3 * n_targets)).astype(np.float16)
    kernel = ridge_kernel(betas)
    eigen = kernel.decompose()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    for start in range(0, 3 * n_targets, n_targets):
        block = centre_targets(half[:, start : start + n_targets], np.float32)
        alpha_scores(kernel, eigen, (50.0, 500.0), block, method, np.arange(100))
        del block
    used = tracemalloc.get_traced_memory()[1] - before
    assert used < 1.1 * 4 * n * n_targets * (2 if method == "gcv" else 3) + 4 * 128 * (n + 2 * n_targets)
    needed = ridge_bytes(**SIZES, decomposed=True, n_searched=3 * n_targets)["search"]
    assert before + used < 1.1 * needed


def test_weights_workers_and_searches_are_counted():
    plain = ridge_bytes(**SIZES, keep=True)
    two = ridge_bytes(**SIZES, keep=True, n_workers=2)
    assert plain["targets"] < two["targets"] < 2 * plain["targets"] and two["kernel"] == plain["kernel"]
    none = ridge_bytes(**SIZES, keep=True, n_workers=0)["targets"]
    assert two["targets"] - none == 2 * (plain["targets"] - none)
    n, p, block = SIZES["n_samples"], SIZES["n_voxels"], SIZES["n_targets_block"]
    dual, primal = (ridge_bytes(**SIZES, keep=True, weights=Weights(500, own))["targets"] for own in (False, True))
    assert dual - plain["targets"] == 4 * n * p + 2 * n * 500  # the basis, and a column of targets
    assert primal - plain["targets"] == 4 * n * p + 4 * (p + n) * 500
    several = ridge_bytes(**SIZES, keep=True, n_alphas=3, weights=Weights(500, False))["targets"]
    assert several - ridge_bytes(**SIZES, keep=True, n_alphas=3)["targets"] > 4 * n * p + 5 * 4 * n * block
    scored = ridge_bytes(**SIZES, keep=True, scored=True)["targets"]
    assert scored - plain["targets"] > 2 * 4 * n * block


def test_full_size_needs_less_than_6_gb():
    sizes = dict(n_samples=8859, n_voxels=15_724, n_test=982, n_held_out=982, n_targets_block=4096, n_columns=4608, n_workers=2)
    for dtype in (np.float32, np.float64):
        assert max(ridge_bytes(**sizes, dtype=dtype, keep=True).values()) < 6e9
    grid = ridge_bytes(**sizes, dtype=np.float32, decomposed=True, n_searched=3 * 8192)
    assert max(grid.values()) < 6e9
    layers = sizes | dict(n_columns=4096 + 16_384)  # the VDVAE's largest layer
    assert max(ridge_bytes(**layers, dtype=np.float32, keep=True, weights=Weights(16_384, False)).values()) < 6e9
    layers["n_workers"] = 1
    assert max(ridge_bytes(**layers, dtype=np.float32, keep=True, weights=Weights(16_384, True)).values()) < 6e9


def test_a_problem_that_does_not_fit_says_so_with_numbers():
    needed = {"kernel": int(2e9), "factorisation": int(5.5e9), "targets": int(1e9)}
    check_memory(needed, 6e9, "this machine", "")
    with pytest.raises(ValueError, match=r"factorisation needs 5\.50 GB, but node a has 4\.00 GB .*kernel 2\.00.* Use another"):
        check_memory(needed, 4e9, "node a", "Use another.")
