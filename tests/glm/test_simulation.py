"""What algorithm 1 promises, on simulated BOLD whose betas, HRFs and noise voxels are known."""
from __future__ import annotations

import numpy as np
import pytest

from nsdray.glm import Events, fit_glm


def correlation(betas: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Over trials (first axis), per voxel."""
    a, b = betas - betas.mean(axis=0), truth - truth.mean(axis=0)
    length = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return (a * b).sum(axis=0) / np.where(length > 0, length, 1)


def fit(data, **options):
    return fit_glm(data.design, data.data, data.stimulus_duration, data.tr, **options)


@pytest.mark.parametrize("seed", [0, 1])
def test_each_step_brings_single_trial_betas_nearer_to_the_truth(simulate, seed):
    data = simulate(seed)
    ways = [{"beta_type": "B", "hrf": "assumed"}, {"beta_type": "B"}, {"beta_type": "C"}, {"beta_type": "D"}]
    found = [fit(data, **way) for way in ways]
    medians = [np.median(correlation(one.betas, data.betas)[data.signal]) for one in found]
    print("assumed HRF, B, C, D:", np.round(medians, 3))
    assert (np.diff(medians) > [0.04, 0.15, 0.02]).all(), medians
    for one, way in zip(found, ways):
        assert one.betas.shape == data.betas.shape and one.betas.dtype == np.float32
        assert one.beta_type == way["beta_type"] and one.n_constant == one.n_not_finite == 0
    assert found[3].n_regressors == 4  # as many as the simulation shares
    assert (np.unique(found[3].fraction) < 1).any() and (found[2].fraction == 1).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_hrfs_are_recovered_and_betas_have_the_right_size(simulate, seed):
    data = simulate(seed, noise=0.15, shared=0.15)
    found = fit(data, beta_type="B")
    distance = np.abs(found.hrf_index - data.hrf_index)[data.signal]
    assert (distance == 0).mean() > 0.8 and (distance <= 1).mean() > 0.97
    slope = (found.betas * data.betas).sum(axis=0) / (data.betas**2).sum(axis=0).clip(1)
    assert abs(np.median(slope[data.signal]) - 1) < 0.02  # percent signal change, not any other unit
    assert np.median(found.r2[data.signal]) > 95


@pytest.mark.parametrize("rule", ["on_off", "negative_r2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_noise_pool_holds_the_noise_voxels(simulate, seed, rule):
    data = simulate(seed, noise=0.4, shared=0.6)
    pool = fit(data, beta_type="C", noise_pool=rule).noise_pool
    dark = ~(data.signal | data.noise)
    assert pool[data.noise].mean() > 0.85 and pool[data.signal].mean() < 0.2 and not pool[dark].any()


def test_events_between_volumes_are_fitted_where_they_are(simulate):
    """Every second volume of a simulation is dropped, so that half of the onsets fall between two volumes."""
    data = simulate(0, n_runs=2, noise=0.1, shared=0, gap=5)
    coarse, tr = [run[:, ::2] for run in data.data], 2 * data.tr
    events = [Events(volume * data.tr, column.tolist()) for volume, column in map(np.nonzero, data.design)]
    rounded = [Events(one.onset // tr * tr, one.condition) for one in events]
    found, off = (fit_glm(one, coarse, data.stimulus_duration, tr, beta_type="B") for one in (events, rounded))
    assert [found.design.labels[i] for i in found.design.condition] == data.condition.tolist()
    exact, late = (np.median(correlation(one.betas, data.betas)[data.signal]) for one in (found, off))
    assert exact > 0.99 > 0.985 > late, (exact, late)
