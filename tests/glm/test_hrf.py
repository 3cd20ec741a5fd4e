"""The responses, against scipy's gamma densities and plain convolution."""
from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
from scipy.interpolate import pchip_interpolate

from nsdray.glm.hrf import assumed_hrf, hrf_library


@pytest.mark.parametrize("stimulus_duration, tr", [(3.0, 1.333), (0.0, 2.0), (0.5, 1.0), (4.04, 0.7)])
def test_library_is_the_tabulated_one_convolved_and_interpolated(hrf_table, stimulus_duration, tr):
    hrfs = hrf_library(stimulus_duration, tr)
    seconds = np.arange(0, 48, tr)
    n_steps = max(1, round(stimulus_duration * 10))
    for curve, row in zip(hrfs.at(seconds), hrf_table):
        long = np.convolve(row, np.ones(n_steps))
        expected = pchip_interpolate(np.arange(len(long)) / 10, long, seconds)
        np.testing.assert_allclose(curve, expected / expected.max(), atol=1e-6)
    assert len(hrfs) == 20


def test_peak_is_one_at_the_tr_and_nothing_before_onset_or_after_the_end():
    hrfs = hrf_library(3, 1.6)
    np.testing.assert_allclose(hrfs.at(np.arange(0, 40, 1.6)).max(axis=1), 1, atol=1e-12)
    assert not hrfs.at(np.array([-5.0, -0.01, 60.0])).any()
    assert hrfs.at(np.zeros((3, 4))).shape == (20, 3, 4)


def test_responses_differ_and_are_ordered_by_their_delay():
    time = np.arange(0, 30, 0.1)
    peaks = time[hrf_library(0, 0.1).at(time).argmax(axis=1)]
    assert (np.diff(peaks) > -0.3).all() and peaks[0] < 4 and peaks[-1] > 5


def test_assumed_response_peaks_at_five_seconds_and_undershoots():
    time = np.arange(0, 40, 0.1)
    (curve,) = assumed_hrf(0, 0.1).at(time)
    assert 4.5 < time[curve.argmax()] < 5.1
    assert -0.12 < curve.min() < -0.05 and 14 < time[curve.argmin()] < 19


def test_parameters_ship_with_the_package():
    assert files("nsdray.glm").joinpath("hrf_library.json").is_file()
