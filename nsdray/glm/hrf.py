"""Haemodynamic responses: the library of 20 shapes and the canonical one.

A response to a 0.1 s stimulus is a difference of two gamma densities, whose parameters are package data
(`hrf_library.json`, which tells where they are from). It is summed over the stimulus duration and interpolated by pchip
at whatever time after the onset is asked for. So a trial may begin between two volumes, and one that begins on a volume
gets exactly what convolving the design with the response sampled at the TR would give.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.special import gammaln, xlogy

STEP_S = 0.1
"""Spacing of the tabulated responses, and unit to which a stimulus duration is rounded."""
LENGTH_S = 50
"""Length of the response to a stimulus of 0.1 s."""


@dataclass(frozen=True)
class HRFs:
    """One or more responses to a stimulus of a given duration."""

    curves: np.ndarray
    """(n_hrfs, n_steps) float64: value every STEP_S seconds from stimulus onset. The largest value among the samples at
    0, tr, 2 tr, … is 1, so that betas are the peak response to a trial that begins on a volume."""

    def __len__(self) -> int:
        return len(self.curves)

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """Values at times after stimulus onset, (n_hrfs, *seconds.shape); 0 before it and beyond the curves' end."""
        times = np.arange(self.curves.shape[1]) * STEP_S
        values = PchipInterpolator(times, self.curves, axis=1, extrapolate=False)(seconds)
        return np.nan_to_num(values, copy=False, nan=0.0)


def hrf_library(stimulus_duration: float, tr: float) -> HRFs:
    """The 20 responses of NSD's betas, for a stimulus duration and a repetition time in seconds.

    The duration is rounded to 0.1 s; 0 counts as 0.1 s.
    """
    return _respond(np.array(_parameters()["hrfs"]), stimulus_duration, tr)


def assumed_hrf(stimulus_duration: float, tr: float) -> HRFs:
    """The one canonical response, as `hrf_library` otherwise."""
    return _respond(np.array([_parameters()["assumed"]]), stimulus_duration, tr)


def _respond(parameters: np.ndarray, stimulus_duration: float, tr: float) -> HRFs:
    impulse = _impulse_responses(parameters)
    n_steps = max(1, int(stimulus_duration / STEP_S + 0.5))
    total = np.cumsum(impulse, axis=1)
    curves = np.pad(total, ((0, 0), (0, n_steps - 1)), mode="edge")
    curves[:, n_steps:] -= total[:, : curves.shape[1] - n_steps]  # a sum over the last n_steps values
    hrfs = HRFs(curves)
    peak = hrfs.at(np.arange(0, curves.shape[1] * STEP_S, tr)).max(axis=1)
    return HRFs(curves / peak[:, None])


def _impulse_responses(parameters: np.ndarray) -> np.ndarray:
    """Responses to 0.1 s, (n_hrfs, LENGTH_S / STEP_S + 1), from rows of parameters in the file's columns."""
    times = np.arange(round(LENGTH_S / STEP_S) + 1) * STEP_S
    shape_1, scale_1, shape_2, scale_2, ratio, amplitude, onset = parameters.T[..., None]
    after = times - onset
    return amplitude * (_gamma_density(after, shape_1, scale_1) - ratio * _gamma_density(after, shape_2, scale_2))


def _gamma_density(x: np.ndarray, shape: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Density of the gamma distribution of shape > 1; 0 for x <= 0. Spares the second that scipy.stats takes to load."""
    x = np.maximum(x, 0)
    return np.exp(xlogy(shape - 1, x) - x / scale - gammaln(shape) - shape * np.log(scale))


def _parameters() -> dict:
    return json.loads(files("nsdray.glm").joinpath("hrf_library.json").read_text())
