"""Betas beside the reference package's on the same data.

`golden/glm_small.npz` holds what cvnlab/GLMsingle@1ab54a65edd3ea41a6133d4b4ecb78a9c7296684 computes with its default
options for the simulation SMALL (`simulate_bold` in conftest.py, from NumPy's frozen RandomState). Made by

    git clone https://github.com/cvnlab/GLMsingle && python tests/glm/test_reference.py GLMsingle

in an environment with its requirements and pytest.
"""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "glm_small.npz"
ORIGIN = "cvnlab/GLMsingle@1ab54a65edd3ea41a6133d4b4ecb78a9c7296684, made by tests/glm/test_reference.py"
SMALL = dict(
    seed=3, n_runs=3, n_conditions=24, n_signal=80, n_noise=100, n_dark=20, tr=1.6, stimulus_duration=3.0, gap=3,
    noise=0.6, shared=1.0,
)  # fmt: skip


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a.T, b.T)])


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        assert str(file["origin"]) == ORIGIN
        return dict(file)


@pytest.fixture(scope="module")
def fitted(simulate):
    from nsdray.glm import fit_glm  # here, because the file also runs where only the reference package is installed

    data = simulate(**SMALL)
    found = {
        beta_type: fit_glm(data.design, data.data, data.stimulus_duration, data.tr, beta_type=beta_type)
        for beta_type in "ABCD"
    }
    return data, found


def test_on_off_model(golden, fitted):
    """The canonical response is a fit to a table rounded to 0.3 % of its peak; hence the tolerance."""
    found = fitted[1]["A"]
    np.testing.assert_allclose(found.mean, golden["mean"], rtol=1e-5)
    np.testing.assert_allclose(found.r2, golden["on_off_r2"], atol=0.02)
    np.testing.assert_allclose(found.betas[0], golden["on_off_beta"], atol=5e-3)


def test_hrf_and_fitted_hrf_betas(golden, fitted):
    data, found = fitted[0], fitted[1]["B"]
    assert (found.hrf_index == golden["hrf_index"])[data.signal].mean() >= 0.95
    agreement = correlation(found.betas[:, data.signal], golden["betas_b"])
    assert np.median(agreement) >= 0.9999 and agreement.min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(found.betas[:, data.signal]), np.linalg.norm(golden["betas_b"]), rtol=1e-3)
    np.testing.assert_allclose(found.r2, golden["r2_b"], atol=0.05)


def test_noise_pool_and_regressors(golden, fitted):
    found = fitted[1]["C"]
    assert (found.noise_pool == golden["noise_pool"]).mean() >= 0.98
    assert found.n_regressors == golden["n_regressors"]
    curve = golden["curve"] - golden["curve"][0]
    np.testing.assert_allclose(found.curve, curve, atol=0.05 * np.ptp(curve))


@pytest.mark.parametrize("beta_type", ["C", "D"])
def test_denoised_and_ridge_betas(golden, fitted, beta_type):
    data, found = fitted[0], fitted[1][beta_type]
    betas = golden[f"betas_{beta_type.lower()}"]
    agreement = correlation(found.betas[:, data.signal], betas)
    assert np.median(agreement) >= 0.999
    size = np.linalg.norm(found.betas[:, data.signal], axis=0) / np.linalg.norm(betas, axis=0)
    assert 0.98 < np.median(size) < 1.02
    np.testing.assert_allclose(np.median(np.abs(found.r2 - golden[f"r2_{beta_type.lower()}"])), 0, atol=0.5)


def test_fractions(golden, fitted):
    data, found = fitted[0], fitted[1]["D"]
    assert (np.abs(found.fraction - golden["fraction"])[data.signal] < 0.051).mean() > 0.9


def reference_outputs(checkout: str) -> dict[str, np.ndarray]:
    """Run the reference package on the simulation; only signal voxels' betas are kept."""
    sys.path[:0] = [checkout, str(Path(__file__).parent)]
    from conftest import simulate_bold
    from glmsingle.glmsingle import GLM_single

    data = simulate_bold(**SMALL)
    model = GLM_single({"wantfileoutputs": [0, 0, 0, 0], "wantmemoryoutputs": [1, 1, 1, 1]})
    with tempfile.TemporaryDirectory() as folder:  # the package empties the folders that it is given
        folders = {"outputdir": f"{folder}/out", "figuredir": f"{folder}/figures"}
        out = model.fit(data.design, data.data, data.stimulus_duration, data.tr, **folders)
    on_off, *betas, last = (out[f"type{letter}"] for letter in "abcd")
    result = {f"betas_{letter}": one["betasmd"] for letter, one in zip("bcd", [*betas, last])}
    result = {key: np.squeeze(value).T[:, data.signal].astype(np.float32) for key, value in result.items()}
    result |= {f"r2_{letter}": np.squeeze(one["R2"]) for letter, one in zip("bcd", [*betas, last])}
    names = {"hrf_index": "HRFindex", "noise_pool": "noisepool", "n_regressors": "pcnum", "fraction": "FRACvalue"}
    result |= {name: np.squeeze(last[theirs]) for name, theirs in (names | {"curve": "xvaltrend"}).items()}
    names = {"mean": "meanvol", "on_off_r2": "onoffR2", "on_off_beta": "betasmd"}
    return result | {name: np.squeeze(on_off[theirs]) for name, theirs in names.items()}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, origin=np.array(ORIGIN), **reference_outputs(sys.argv[1]))
