"""BOLD for the miniature NSD: runs of the trials that have betas on disk, in NSD's files.

Shares no code with `nsdray.glm`, so that what is estimated from it is compared with something independent. For voxel v
with the beta b_v(i) of trial i, which came on at t_i, volume t of a run has

    y_v(t) = m_v (1 + s_v(t) / 100),   s_v(t) = sum_i b_v(i) h_v(t - t_i) + drift_v(t) + shared_v(t) + own_v(t)

- b_v(i) is the response to the image, and 0.3 of the trial noise of the beta on disk. Noise of the series makes up for the
  rest: betas of type D hold about as much of the response as those on disk do, types A to C less. With all the trial noise
  in the series, and little of their own, ridge regression would have nothing to remove that differs from the signal.
- h_v is a double gamma of the voxel's own, summed over the 3 s of a stimulus: its peak lies between 4 and 7 s and varies
  smoothly over the brain, its undershoot is 5 to 20 %. Its largest value on a volume is 1. These shapes are not those of
  the library that is fitted.
- drift_v is a line and half a cosine of random size, anew in every run.
- shared_v mixes a few smooth courses with the voxel's own loadings; own_v is autoregressive.

Half as many voxels outside of nsdgeneral as in it have no betas; the rest is 0, as outside of NSD's brain mask.
"""
from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from scipy.signal import fftconvolve, lfilter
from scipy.stats import gamma

from nsdray.nsd.layout import NSDLayout
from nsdray.seeds import rng

TR_S = 4 / 3
VOLUMES_PER_TRIAL = 3  # 4 s: 3 s of the picture and 1 s of grey
STIMULUS_S = 3.0
BLANKS_BEFORE, BLANKS_AFTER, BLANK_SHARE = 3, 5, 0.1  # trials without a picture: before, after, and among those with one
N_SHARED = 4
TRIAL_NOISE = 0.3  # of the trial noise on disk
SHARED_SD, OWN_SD, DRIFT_SD = 0.7, 1.2, 0.5  # percent
STEP_S, LENGTH_S = 0.1, 30.0


@dataclass(frozen=True)
class Bold:
    """What does not change between the runs of a subject."""

    shape: tuple[int, int, int]
    index: np.ndarray
    """(n_voxels,) flat index, C order: first the voxels with betas, then those without."""
    n_signal: int
    """Voxels with betas."""
    mean: np.ndarray
    """(n_voxels,) of the scanner's unit."""
    hrf: np.ndarray
    """(n_signal, n_lags) at 0, TR, 2 TR, …"""
    loads: np.ndarray
    """(n_voxels, N_SHARED) percent."""

    @staticmethod
    def draw(shape: tuple[int, int, int], index: np.ndarray, smooth: np.ndarray, seed: int, subject: int) -> Bold:
        """index: voxels with betas. smooth: (n_signal,) a smooth map with standard deviation about 1, for the delays."""
        random = rng(seed, subject, "bold")
        others = np.setdiff1d(np.arange(np.prod(shape)), index)
        silent = np.sort(random.permutation(others)[: len(index) // 2])
        every = np.concatenate([index, silent])
        delay = np.clip(5.2 + 0.6 * smooth + 0.15 * random.standard_normal(len(index)), 4, 7)
        spread, undershoot = random.uniform(0.8, 1.1, len(index)), random.uniform(0.05, 0.2, len(index))
        return Bold(
            shape=shape,
            index=every,
            n_signal=len(index),
            mean=random.uniform(300, 500, len(every)),
            hrf=responses(delay, spread, undershoot),
            loads=SHARED_SD * random.standard_normal((len(every), N_SHARED)),
        )


def responses(delay: np.ndarray, spread: np.ndarray, undershoot: np.ndarray) -> np.ndarray:
    """Responses to a stimulus at the volumes that follow its onset, (n, n_lags), the largest 1.

    delay: (n,) seconds to the peak after an instant. spread: scale of the gamma density. undershoot: its relative size.
    """
    time = np.arange(0, LENGTH_S, STEP_S)

    def density(mode: np.ndarray) -> np.ndarray:
        values = gamma.pdf(time, 1 + (mode / spread)[:, None], scale=spread[:, None])
        return values / values.max(axis=1, keepdims=True)

    instant = density(delay) - undershoot[:, None] * density(delay + 9)
    box = np.ones((1, round(STIMULUS_S / STEP_S)))
    lasting = fftconvolve(instant, box, axes=1)[:, : len(time)]
    volumes = np.arange(0, LENGTH_S, TR_S)
    sampled = np.stack([np.interp(volumes, time, row) for row in lasting])
    return sampled / sampled.max(axis=1, keepdims=True)


def write_runs(
    layout: NSDLayout, subject: int, session: int, maps: Bold, betas: np.ndarray, image_ids: np.ndarray, per_run: int, seed: int
) -> None:
    """Write a session's runs and designs. betas: (n_trials, n_signal) percent. image_ids: (n_trials,). per_run: trials."""
    for folder in (layout.timeseries_folder(subject), layout.run_design(subject, session, 1).parent):
        folder.mkdir(parents=True, exist_ok=True)
    for run, start in enumerate(range(0, len(betas), per_run), 1):
        trials = slice(start, start + per_run)
        random = rng(seed, subject, "bold", session, run)
        onset, n_volumes = _onsets(len(betas[trials]), random)
        series = _percent(maps, betas[trials], onset, n_volumes, random)
        stored = np.zeros((np.prod(maps.shape), n_volumes), np.int16)
        stored[maps.index] = np.rint(maps.mean[:, None] * (1 + series / 100))
        image = nib.Nifti1Image(stored.reshape(*maps.shape, n_volumes), np.eye(4))
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = TR_S
        nib.save(image, layout.timeseries(subject, session, run))
        shown = np.zeros(n_volumes - 1, int)  # a line less than volumes, as NSD's
        shown[onset] = image_ids[trials] + 1
        layout.run_design(subject, session, run).write_text("\n".join(map(str, shown)) + "\n")


def _onsets(n_trials: int, random: np.random.Generator) -> tuple[np.ndarray, int]:
    """Volumes at which pictures come on, ascending, and the number of volumes of the run."""
    n_places = n_trials + round(BLANK_SHARE * n_trials)
    places = BLANKS_BEFORE + np.sort(random.permutation(n_places)[:n_trials])
    return VOLUMES_PER_TRIAL * places, VOLUMES_PER_TRIAL * (BLANKS_BEFORE + n_places + BLANKS_AFTER) + 1


def _percent(maps: Bold, betas: np.ndarray, onset: np.ndarray, n_volumes: int, random: np.random.Generator) -> np.ndarray:
    """s_v(t), (n_voxels, n_volumes)."""
    n_voxels, time = len(maps.index), np.linspace(-1, 1, n_volumes)
    own = OWN_SD * lfilter([1], [1, -0.4], random.standard_normal((n_voxels, n_volumes)), axis=1)
    courses = lfilter([1], [1, -0.8], random.standard_normal((N_SHARED, n_volumes)), axis=1)
    line, wave = DRIFT_SD * random.standard_normal((2, n_voxels, 1))
    series = own + maps.loads @ (courses / courses.std()) + line * time + wave * np.cos(np.pi * (time + 1) / 2)
    impulses = np.zeros((maps.n_signal, n_volumes))
    impulses[:, onset] = betas.T
    series[: maps.n_signal] += fftconvolve(impulses, maps.hrf, axes=1)[:, :n_volumes]
    return series
