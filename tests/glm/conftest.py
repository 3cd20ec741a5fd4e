"""Simulated BOLD with known betas, by code that shares nothing with the package but the file of HRF parameters."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import signal, stats

LIBRARY = Path(__file__).parents[2] / "nsdray" / "glm" / "hrf_library.json"


def hrf_table() -> np.ndarray:
    """The 20 responses to 0.1 s, every 0.1 s for 50 s: (20, 501)."""
    table, time = [], np.arange(501) / 10
    for shape_1, scale_1, shape_2, scale_2, ratio, amplitude, onset in json.loads(LIBRARY.read_text())["hrfs"]:
        first, second = stats.gamma(shape_1, onset, scale_1), stats.gamma(shape_2, onset, scale_2)
        table.append(amplitude * (first.pdf(time) - ratio * second.pdf(time)))
    return np.array(table)


def make_matrices(random, n_runs: int, n_timepoints: int, n_conditions: int, gap: int) -> list[np.ndarray]:
    """Every condition once a run, in random order, a stimulus every gap volumes, about a tenth of them blank."""
    designs = []
    for _ in range(n_runs):
        places = 2 + gap * np.arange(n_conditions + n_conditions // 10)
        chosen = np.sort(random.permutation(places)[:n_conditions])
        design = np.zeros((n_timepoints, n_conditions), np.float32)
        design[chosen, random.permutation(n_conditions)] = 1
        designs.append(design)
    return designs


def simulate_bold(
    seed: int,
    n_runs: int = 4,
    n_conditions: int = 30,
    n_signal: int = 240,
    n_noise: int = 240,
    n_dark: int = 60,
    tr: float = 1.0,
    stimulus_duration: float = 3.0,
    gap: int = 4,
    noise: float = 1.5,
    shared: float = 1.5,
    n_shared: int = 4,
) -> SimpleNamespace:
    """Signal voxels, noise voxels and dark ones (no signal, low mean), in this order; drawn by NumPy's frozen RandomState.

    A voxel's series is its mean x (1 + 0.01 x percent), where percent is its condition's beta under its HRF, a drift,
    AR(1) noise and a mix of n_shared smooth courses that all but dark voxels share.
    """
    random = np.random.RandomState(seed)
    n_timepoints, n_voxels = 2 + gap * (n_conditions + n_conditions // 10) + 16, n_signal + n_noise + n_dark
    designs = make_matrices(random, n_runs, n_timepoints, n_conditions, gap)
    hrf_index = random.randint(0, 20, n_voxels)
    betas = 1 + 1.5 * random.standard_normal((n_conditions, n_voxels))
    betas[:, n_signal:] = 0
    mean = np.r_[1000 + 100 * random.standard_normal(n_signal + n_noise), 20 + 2 * random.standard_normal(n_dark)]
    loads = random.standard_normal((n_shared, n_voxels)) * np.r_[np.ones(n_signal + n_noise), np.zeros(n_dark)] * shared
    length = int(stimulus_duration * 10)
    responses = np.array([np.convolve(row, np.ones(length))[:: int(tr * 10)] for row in hrf_table()])
    responses /= responses.max(axis=1, keepdims=True)
    data = []
    for design in designs:
        percent = signal.lfilter([1], [1, -0.4], noise * random.standard_normal((n_timepoints, n_voxels)), axis=0)
        courses = signal.lfilter([1], [1, -0.8], random.standard_normal((n_timepoints, n_shared)), axis=0)
        percent += (courses / courses.std(axis=0)) @ loads
        percent += np.linspace(-1, 1, n_timepoints)[:, None] * random.standard_normal(n_voxels)
        for hrf in range(20):
            rows = np.flatnonzero(hrf_index == hrf)
            onsets = np.array([np.convolve(column, responses[hrf])[:n_timepoints] for column in design.T]).T
            percent[:, rows] += onsets @ betas[:, rows]
        data.append(np.ascontiguousarray((mean * (1 + percent / 100)).T, np.float32))
    order = np.concatenate([np.nonzero(design)[1] for design in designs])
    return SimpleNamespace(
        design=designs, data=data, betas=betas[order].astype(np.float32), condition=order, hrf_index=hrf_index, tr=tr,
        stimulus_duration=stimulus_duration, signal=np.arange(n_voxels) < n_signal,
        noise=(np.arange(n_voxels) >= n_signal) & (np.arange(n_voxels) < n_signal + n_noise),
    )  # fmt: skip


@pytest.fixture(scope="session")
def simulate():
    return simulate_bold


@pytest.fixture(scope="session", name="hrf_table")
def hrf_table_fixture():
    return hrf_table()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
