"""Experiments: what is read from them, and what is refused before any data are touched."""
from __future__ import annotations

import warnings

import numpy as np
import pytest

from nsdray.glm import Events, fit_glm, make_design
from nsdray.glm.hrf import assumed_hrf

SHAPES = [(50, 100), (50, 100)]


def matrix(onsets: dict[int, int], n_timepoints: int = 100, n_conditions: int = 4) -> np.ndarray:
    design = np.zeros((n_timepoints, n_conditions))
    for volume, condition in onsets.items():
        design[volume, condition] = 1
    return design


@pytest.fixture
def design():
    return [matrix({10: 2, 20: 0, 30: 3}), matrix({5: 1, 40: 2})]


def test_trials_are_chronological(design):
    checked = make_design(design, SHAPES, 3, 1.5)
    assert checked.condition.tolist() == [2, 0, 3, 1, 2]
    assert checked.run.tolist() == [0, 0, 0, 1, 1]
    assert checked.onset.tolist() == [15, 30, 45, 7.5, 60]
    assert [checked.trials_of(run) for run in (0, 1)] == [slice(0, 3), slice(3, 5)]


def test_events_in_any_order_say_the_same_as_a_matrix(design):
    events = [Events([45.0, 15.0, 30.0], ["d", "c", "a"]), Events([60.0, 7.5], ["c", "b"])]
    checked, expected = make_design(events, SHAPES, 3, 1.5), make_design(design, SHAPES, 3, 1.5)
    assert [checked.labels[i] for i in checked.condition] == list("cadbc")
    np.testing.assert_array_equal(checked.onset, expected.onset)


@pytest.mark.parametrize("n_timepoints, tr, degree", [(100, 0.5, 0), (100, 1.2, 1), (150, 1.6, 2), (180, 1.0, 2), (301, 1, 3)])
def test_drifts_are_polynomials_of_half_the_minutes(n_timepoints, tr, degree, rng):
    drifts = make_design([matrix({3: 0}, n_timepoints)], [(5, n_timepoints)], 3, tr).drifts(0)
    assert drifts.shape == (n_timepoints, degree + 1)
    np.testing.assert_allclose(drifts.T @ drifts, np.eye(degree + 1), atol=1e-12)
    y, time = rng.standard_normal(n_timepoints), np.arange(n_timepoints)
    residual = y - np.polyval(np.polyfit(time, y, degree), time)
    np.testing.assert_allclose(y - drifts @ (drifts.T @ y), residual, atol=1e-8)


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([(50, 100)], "2 runs of design, but 1 runs of data"),
        ([(50, 100), (51, 100)], r"unequal voxels: shapes without time are \[\(50,\), \(51,\)\]. Bring all runs to one grid"),
        ([(100, 50), (100, 50)], r"design is \(100, 4\), 100 time points, but the data are \(100, 50\).*axes are swapped"),
        ([(100, 4, 5, 6), (100, 4, 5, 6)], "axes are swapped"),
        ([(50, 90), (50, 100)], "run 0: .* 90 time points. Cut either"),
        ([(50, 4), (50, 4)], "design's second axis fits: it is transposed"),
        ([(50, 5, 100), (50, 100)], r"run 0 of the data has shape \(50, 5, 100\); expected"),
        ([(0, 100), (0, 100)], "run 0 of the data has shape"),
    ],
)
def test_shapes_that_do_not_fit(design, shapes, message):
    with pytest.raises(ValueError, match=message):
        make_design(design, shapes, 3, 1.5)


@pytest.mark.parametrize(
    "tr, stimulus_duration, message",
    [
        (1500, 3, "tr is 1500.*if these are milliseconds, give 1.5"),
        (0, 3, "tr is 0: the seconds between two volumes"),
        (float("nan"), 3, "tr is nan"),
        (1.5, 3000, "stimulus_duration is 3000 s, longer than run 0 .150 s.; is it in milliseconds"),
        (1.5, -1, "stimulus_duration is -1"),
    ],
)
def test_times_that_cannot_be(design, tr, stimulus_duration, message):
    with pytest.raises(ValueError, match=message):
        make_design(design, SHAPES, stimulus_duration, tr)


@pytest.mark.parametrize(
    "onset, message",
    [
        ([10, 151], r"run 0: 1 of 2 events are outside the run of 150 s \(first: 151 s\). Onsets count from the first"),
        ([-3, 20], "1 of 2 events are outside .*first: -3 s.*dummy volumes"),
        ([10_000, 140_000], "2 of 2 events are outside.*milliseconds; divide by 1000"),
        ([20, 20], "run 0: 1 events begin when another does .first at 20 s"),
        ([], "run 0 has no events; leave the run out"),
        ([float("nan"), 3], "1 of 2 events are outside"),
    ],
)
def test_events_that_cannot_be(onset, message):
    with pytest.raises(ValueError, match=message):
        make_design([Events(onset, list("ab")[: len(onset)])], [(50, 100)], 3, 1.5)


def test_designs_that_cannot_be(design):
    with pytest.raises(ValueError, match=r"run 0 holds 0.5 \(1 such values\).*not yet convolved"):
        make_design([design[0] - 0.5 * matrix({10: 2}), design[1]], SHAPES, 3, 1.5)
    with pytest.raises(ValueError, match="run 1 has 3 conditions, that of run 0 4"):
        make_design([design[0], design[1][:, :3]], SHAPES, 3, 1.5)
    with pytest.raises(ValueError, match=r"run 1 has shape \(100,\)"):
        make_design([design[0], design[1][:, 0]], SHAPES, 3, 1.5)
    with pytest.raises(ValueError, match="run 1 and run 0 of the design are not both matrices or both events"):
        make_design([design[0], Events([3.0], ["a"])], SHAPES, 3, 1.5)
    with pytest.raises(ValueError, match="2 onsets, but 1 conditions"):
        make_design([Events([1, 2], ["a"])], [(50, 100)], 3, 1.5)
    with pytest.raises(ValueError, match="sessions has shape"):
        make_design(design, SHAPES, 3, 1.5, sessions=[1])
    with pytest.raises(ValueError, match="run 0 has 20 time points for 19 trials and 1 drifts"):
        make_design([matrix({v: 0 for v in range(19)}, 20)], [(50, 20)], 1, 1.5)


@pytest.mark.parametrize("shape", [(100, 20_000), (100, 1500)])
def test_swapped_axes_beside_events_are_seen_by_the_length_of_the_run(shape):
    with pytest.raises(ValueError, match="are .* hours, and the last event is at 90 s. Are the axes swapped"):
        make_design([Events([10, 90], "ab")], [shape], 3, 1.5)
    with pytest.raises(ValueError, match="unequal voxels.*or is time the first axis"):
        make_design([Events([10, 90], "ab")] * 2, [(100, 300), (110, 300)], 3, 1.5)
    with pytest.raises(ValueError, match=r"\(100, 20, 24, 18\): 18 time points .* end at 27 s, before .* 90 s, .*axes swapped"):
        make_design([Events([10, 90], "ab")], [(100, 20, 24, 18)], 3, 1.5)


def test_swapped_axes_are_said_before_memory_is_taken(tmp_path):
    """The array would be 40 GB if anything touched it."""
    run = np.lib.format.open_memmap(tmp_path / "run.npy", "w+", np.float32, (100, 100_000_000))
    with pytest.raises(ValueError, match="axes are swapped"):
        fit_glm(matrix({10: 2}), run, 3, 1.5)


class Lazy:
    """An array that is still on disk."""

    def __init__(self, *shape: int):
        self.shape = shape

    def __array__(self, *_, **__):
        raise AssertionError("it should not have been read")


def test_nothing_is_read_before_everything_is_checked():
    with pytest.raises(ValueError, match="axes are swapped"):
        fit_glm(matrix({10: 2}), Lazy(100, 50), 3, 1.5)
    for options in ({"max_regressors": 99}, {"beta_type": "E"}, {"hrf": "spm"}, {"fractions": [2]}):
        with pytest.raises(ValueError):
            fit_glm(matrix({10: 2}), Lazy(50, 100), 3, 1.5, **options)
    with pytest.raises(AssertionError, match="should not have been read"):
        fit_glm(matrix({10: 2}), Lazy(50, 100), 3, 1.5)


def test_a_trial_may_begin_while_the_first_volume_is_recorded():
    """As where slice timing moved volumes to their middles: onsets lose half a TR."""
    time, hrfs = np.arange(100) * 1.5, assumed_hrf(3, 1.5)
    onsets = [-0.75, 30.0, 75.75]
    data = 100 + sum(hrfs.at(time - onset) for onset in onsets)  # (1, 100)
    found = fit_glm(Events(onsets, "abc"), data, 3, 1.5, beta_type="B", hrf="assumed")
    np.testing.assert_allclose(found.betas[:, 0] * found.mean / 100, 1, rtol=1e-3)
    with pytest.raises(ValueError, match="1 of 3 events are outside .*first: -1.5 s"):
        fit_glm(Events([-1.5, *onsets[1:]], "abc"), data, 3, 1.5)


def test_trials_at_the_very_end_are_warned_of(design):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_design(design, SHAPES, 3, 1.5)
    with pytest.warns(UserWarning, match="1 of 5 trials begin less than 8 s before the end"):
        make_design([design[0], matrix({5: 1, 96: 2})], SHAPES, 3, 1.5)
