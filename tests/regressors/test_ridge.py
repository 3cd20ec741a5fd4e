"""The closed form against scikit-learn's SVD solver, and leave-one-out against really leaving one out."""
from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from nsdray.regressors.linalg import to_numpy
from nsdray.regressors.ridge import factorise, ridge_kernel, ridge_predict
from nsdray.regressors.target_blocks import centre_targets


def make_data(n: int, p: int, kind: str = "plain", n_targets: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(n * 100 + p)
    betas = random.standard_normal((n + 9, p))
    if kind == "constant":
        betas[:, ::4] = 0  # dead voxels after the z-score
        betas[:, 1] = 3.5
    if kind == "collinear":
        betas[:, 1::2] = betas[:, ::2][:, : p // 2]
    targets = betas[:n] @ random.standard_normal((p, n_targets)) + random.standard_normal((n, n_targets)) + 5
    return betas[:n], targets, betas[n:]


def assert_close(ours: np.ndarray, reference: np.ndarray, tolerance: float = 1e-6) -> None:
    assert ours.shape == reference.shape
    difference, scale = np.abs(ours - reference).max(), np.abs(reference).max()
    assert difference <= tolerance * scale, f"max difference {difference:.3g} at scale {scale:.3g}"


@pytest.mark.parametrize("device", [None, "cpu"])  # NumPy, and torch as on a GPU
@pytest.mark.parametrize("alpha", [1e-6, 3.0, 5e4, 1e12])
@pytest.mark.parametrize("kind", ["plain", "constant", "collinear"])
@pytest.mark.parametrize("n, p", [(20, 50), (30, 30), (60, 12)])
def test_agrees_with_scikit_learn(n, p, kind, alpha, device):
    betas, targets, betas_test = make_data(n, p, kind)
    reference = Ridge(alpha=alpha, solver="svd").fit(betas, targets)
    exact = reference.predict(betas_test)
    assert_close(ridge_predict(betas, targets, betas_test, alpha, device), exact)
    centred = (betas_test - betas.mean(0)) @ reference.coef_.T  # without the mean, beside which a huge alpha leaves nothing
    factor = factorise(betas, alpha, device=device)
    assert_close(to_numpy(factor.smoother(betas_test) @ factor.centre(targets)[0]), centred)
    weights, intercept = factor.weights(targets)
    assert_close(betas_test @ weights + intercept, exact)
    if alpha > 1e-3:  # below, collinear voxels leave the weights themselves ill-determined
        assert_close(weights, reference.coef_.T, 1e-5)
        assert_close(intercept, reference.intercept_)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("alpha", [1e-6, 3.0, 1e9])
@pytest.mark.parametrize("n, p", [(15, 40), (20, 20), (40, 6)])
def test_leave_one_out_is_leaving_one_out(n, p, alpha, device):
    betas, targets, _ = make_data(n, p, "constant")
    explicit = np.concatenate(
        [
            Ridge(alpha=alpha, solver="svd").fit(np.delete(betas, i, 0), np.delete(targets, i, 0)).predict(betas[[i]])
            for i in range(n)
        ]
    )
    factor = factorise(betas, alpha, device=device)
    assert_close(factor.leave_one_out(targets), explicit)
    rows = [n - 1, 2, 5]
    assert_close(factor.leave_one_out(targets, rows), explicit[rows])


def test_float32_stays_float32_and_agrees():
    betas, targets, betas_test = make_data(80, 200)
    half = targets.astype(np.float16)  # as targets are stored
    ours = ridge_predict(betas.astype(np.float32), half, betas_test.astype(np.float32), 100.0)
    assert ours.dtype == np.float32
    assert_close(ours, ridge_predict(betas, half, betas_test, 100.0), 1e-5)
    left_out = factorise(betas.astype(np.float32), 100.0).leave_one_out(half)
    assert_close(left_out, factorise(betas, 100.0).leave_one_out(half), 1e-5)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("n, p", [(20, 50), (30, 30), (60, 12)])
def test_one_kernel_and_one_eigendecomposition_serve_every_alpha(n, p, device):
    betas, targets, betas_test = make_data(n, p, "collinear")
    kernel = ridge_kernel(betas, device=device)
    decomposed = kernel.decompose()
    for alpha in (1e-3, 3.0, 1e9):
        reference = Ridge(alpha=alpha, solver="svd").fit(betas, targets)
        left_out = factorise(betas, alpha).leave_one_out(targets, [3, 1])
        for factor in (kernel.factorise(alpha), kernel.at(alpha, decomposed)):
            centred, mean = factor.centre(targets)
            assert_close(to_numpy(factor.smoother(betas_test) @ centred) + mean, reference.predict(betas_test))
            assert_close(factor.leave_one_out(targets, [3, 1]), left_out)


def test_voxels_by_chunks_and_another_precision(monkeypatch):
    betas, targets, betas_test = make_data(30, 50)
    one = ridge_predict(betas, targets, betas_test, 10.0)
    monkeypatch.setattr("nsdray.regressors.ridge.N_VOXELS_CHUNK", 7)
    assert_close(ridge_predict(betas, targets, betas_test, 10.0), one, 1e-12)
    kernel = ridge_kernel(betas.astype(np.float32), dtype=np.float64)  # float64 from betas that are kept in float32
    centred, mean = kernel.centre(targets)
    double = kernel.factorise(10.0).smoother(betas_test.astype(np.float32)) @ centred + mean
    assert kernel.betas.dtype == np.float32 and double.dtype == np.float64
    exact = ridge_predict(betas.astype(np.float32).astype(float), targets, betas_test.astype(np.float32).astype(float), 10.0)
    assert_close(double, exact, 1e-12)


def test_blocks_of_targets_give_the_same():
    betas, targets, betas_test = make_data(30, 50)
    factor = factorise(betas, 10.0)
    smoother, left_out = factor.smoother(betas_test), factor.leave_one_out_smoother()
    for block in (slice(0, 3), slice(3, 7)):
        centred, mean = factor.centre(targets[:, block])
        assert_close(smoother @ centred + mean, ridge_predict(betas, targets, betas_test, 10.0)[:, block], 1e-12)
        assert_close(left_out @ centred + mean, factor.leave_one_out(targets)[:, block], 1e-12)
        assert_close(factor.dual(targets[:, block]), factor.dual(targets)[:, block], 1e-12)


def test_nothing_fitted_sees_the_test_samples():
    betas, targets, betas_test = make_data(30, 50)
    before = ridge_predict(betas, targets, betas_test, 10.0)
    betas_test[1:] = 1e6
    after = ridge_predict(betas, targets, betas_test, 10.0)
    assert_close(after[:1], before[:1], 1e-12)


def test_all_voxels_dead_predicts_the_mean():
    targets = np.arange(12.0).reshape(6, 2)
    predictions = ridge_predict(np.zeros((6, 4)), targets, np.ones((3, 4)), 1.0)
    assert_close(predictions, np.tile(targets.mean(0), (3, 1)), 1e-12)


@pytest.mark.parametrize("alpha", [0, -1.0, np.nan, np.inf])
def test_refuses_alpha(alpha):
    with pytest.raises(ValueError, match="alpha is .* must be finite and above 0"):
        factorise(np.ones((3, 2)), alpha)


def test_refuses_bad_arrays():
    betas, targets, betas_test = make_data(10, 4)
    with pytest.raises(ValueError, match="int64 of shape"):
        factorise(np.ones((3, 2), np.int64), 1.0)
    with pytest.raises(ValueError, match=r"shape \(1, 4\)"):
        factorise(betas[:1], 1.0)
    with pytest.raises(ValueError, match=r"betas hold NaN or infinity in 1 of 4 columns \(first: 2\)"):
        factorise(np.where(np.arange(4) == 2, np.nan, betas), 1.0)
    factor = factorise(betas, 1.0)
    with pytest.raises(ValueError, match=r"targets have shape \(9, 7\), expected \(10, n_targets\)"):
        factor.dual(targets[:9])
    with pytest.raises(ValueError, match=r"targets have shape \(10,\)"):
        factor.weights(targets[:, 0])
    with pytest.raises(ValueError, match="targets hold NaN or infinity in 7 of 7 columns"):
        factor.dual(targets * np.nan)
    with pytest.raises(ValueError, match=r"test betas have shape \(9, 3\), expected \(n_test, 4\)"):
        factor.smoother(betas_test[:, :3])
    with pytest.raises(ValueError, match="test betas .* hold NaN"):
        factor.smoother(betas_test * np.nan)
    with pytest.raises(ValueError, match="rows range over 2..10; there are samples 0..9"):
        factor.leave_one_out(targets, [2, 10])


@pytest.mark.parametrize("device", [None, "cpu"])
def test_alpha_lost_in_rounding_is_an_error(device):
    betas = np.repeat(np.random.default_rng(0).standard_normal((40, 3)), 2, 1).astype(np.float32) * 1e3
    with pytest.raises(ValueError, match="lost in the rounding of float32"):
        factorise(betas, 1e-6, device=device)
    kernel = ridge_kernel(betas, device=device)
    with pytest.raises(ValueError, match="lost in the rounding of float32"):
        kernel.at(1e-6, kernel.decompose())


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("n, p", [(120, 180), (180, 120)])
def test_float32_is_refused_or_precise(n, p, device):
    random = np.random.default_rng(0)
    common = random.standard_normal((n + 40, 3)) @ random.standard_normal((3, p))
    betas = common + 0.3 * random.standard_normal((n + 40, p))
    targets = betas[:n] @ random.standard_normal((p, 4)) / np.sqrt(p) + random.standard_normal((n, 4))
    largest, single, refused = np.linalg.eigvalsh(np.cov(betas[:n].T))[-1] * (n - 1), betas.astype(np.float32), set()
    for fraction in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        exact = Ridge(alpha=fraction * largest).fit(betas[:n], targets).predict(betas[n:])
        kernel = ridge_kernel(single[:n], device=device)
        for name, make in (("cholesky", kernel.factorise), ("eigen", lambda a, k=kernel: k.at(a, k.decompose()))):
            try:
                factor = make(fraction * largest)
            except ValueError as error:
                assert "condition of" in str(error) and "--ridge.dtype float64" in str(error)
                refused.add((name, fraction))
                continue
            centred, mean = factor.centre(targets)
            ours = to_numpy(factor.smoother(single[n:]) @ centred) + mean
            assert np.abs(ours - exact).max() < (1e-3 if name == "cholesky" else 5e-3) * exact.std(), (name, fraction)
    assert {("eigen", 1e-6), ("eigen", 1e-8)} <= refused and all(fraction < 1e-3 for _, fraction in refused)
    assert n < p or ("cholesky", 1e-7) in refused  # with more voxels than samples no eigenvalue is small


def test_weights_take_little_more_memory_than_they_have():
    betas, targets = np.random.default_rng(0).standard_normal((2, 100, 800), np.float32)
    targets = np.tile(targets, (1, 5))  # more targets than voxels
    factor = factorise(betas, 100.0)
    tracemalloc.start()
    weights, _ = factor.weights(targets)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < weights.nbytes + targets.nbytes + 4 * betas.nbytes
    few = [factor.weights(targets[:, start : start + 400])[0] for start in range(0, 4000, 400)]  # by dual coefficients
    assert_close(weights, np.concatenate(few, 1), 1e-4)


def test_penalties_must_fit_the_voxels():
    with pytest.raises(ValueError, match=r"penalties have shape \(3,\), expected \(4,\)"):
        ridge_kernel(np.eye(4), np.ones(3))
    with pytest.raises(ValueError, match="values above 0"):
        ridge_kernel(np.eye(4), np.array([1.0, 0, 1, 1]))


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_targets_are_centred(dtype, tolerance, device):
    noise = np.random.default_rng(0).standard_normal((1100, 5))
    targets = (noise * [1, 1, 0, 3, 0.1] + [0, 90, 7.3, -5, 1000]).astype(np.float16)
    exact = targets.astype(float)
    for given in (targets, targets[:, ::-1][:, ::-1], exact, targets.copy(order="F")):
        block = centre_targets(given, dtype, device)
        np.testing.assert_allclose(block.mean, exact.mean(0), rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(block.std, exact.std(0, ddof=1), rtol=1e-5)
        assert block.std[2] == 0 and not to_numpy(block.centred)[:, 2].any()
        assert_close(to_numpy(block.centred), exact - exact.mean(0), tolerance)
    targets.flags.writeable = False  # as Ray hands arrays over
    assert_close(to_numpy(centre_targets(targets, dtype, device).centred), exact - exact.mean(0), tolerance)
