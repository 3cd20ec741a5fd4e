"""Runs of BOLD: what a session consists of, and the time series of its voxels, read as a stream.

Whether the files are NSD's (`nsdray.nsd.timeseries`) or a lab's own (`nsdray.nsd.bids`), a run is a 4-D NIfTI file and
its events. A compressed file can only be read from its start, so a run is decompressed once, volume by volume, and its
voxels are picked from each: never more is in memory than what was asked for and one volume.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from nsdray.glm import Design, Events, make_design
from nsdray.nsd.nifti import DAMAGE, volumes


@dataclass(frozen=True)
class BoldRun:
    """A run: its file and what was shown."""

    path: Path
    shape: tuple[int, ...]
    """(X, Y, Z, n_timepoints)."""
    events: Events
    """Onsets in seconds from the first volume; a condition is an image_id, or the name of a picture."""


@dataclass(frozen=True)
class BoldSession:
    """The runs of one session of one subject, in the order of acquisition."""

    subject: int
    session: int
    """1-based."""
    runs: tuple[BoldRun, ...]
    tr: float
    """Seconds between volumes."""
    stimulus_duration: float
    """Seconds."""
    left_out: tuple[str, ...] = ()
    """Names of runs without any picture, such as resting-state runs."""

    @property
    def name(self) -> str:
        return f"subject {self.subject}, session {self.session}"


def bold_shape(path: Path) -> tuple[int, ...]:
    """(X, Y, Z, n_timepoints) from the header alone; ValueError for a file that is damaged or not 4-D."""
    return _header(path).shape


def _header(path: Path) -> nib.arrayproxy.ArrayProxy:
    try:
        header = nib.load(path).dataobj
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or no NIfTI file ({error}); fetch it again") from error
    if len(header.shape) != 4 or header.dtype.kind not in "iuf":
        raise ValueError(f"{path} holds {header.dtype} {header.shape}; a run of BOLD is real and has (X, Y, Z, n_timepoints)")
    return header


def affine(path: Path) -> np.ndarray:
    """Voxel indices to millimetres, (4, 4)."""
    return nib.load(path).affine


def session_design(sessions: Sequence[BoldSession]) -> Design:
    """The checked design of sessions that are fitted together. ValueError says which session, and what `make_design` says."""
    first, names = sessions[0], "; ".join(session.name for session in sessions)
    runs = [run for session in sessions for run in session.runs]
    numbers = [session.session for session in sessions for _ in session.runs]
    for session in sessions:
        if (session.tr, session.stimulus_duration) != (first.tr, first.stimulus_duration):
            raise ValueError(
                f"{first.name} has a tr of {first.tr:g} s and stimuli of {first.stimulus_duration:g} s, {session.name} "
                f"{session.tr:g} s and {session.stimulus_duration:g} s; sessions that are fitted together need the same"
            )
    try:
        return make_design([run.events for run in runs], [run.shape for run in runs], first.stimulus_duration, first.tr, numbers)
    except ValueError as error:
        files = f"run 0 is {runs[0].path}" + (f", run {len(runs) - 1} is {runs[-1].path}" if len(runs) > 1 else "")
        raise ValueError(f"{names}: {error} ({files})") from error


def voxels_with_data(runs: Sequence[BoldRun]) -> np.ndarray:
    """Voxels that are not 0 in the first volume of any run: flat index in C order of (X, Y, Z), ascending, int64.

    Prepared data are 0 outside of a mask, and such voxels need no fit. A slope and an intercept in the header are applied.
    """
    inside = np.zeros(int(np.prod(runs[0].shape[:3])), bool)
    for run in runs:
        try:
            header = _header(run.path)
            inside |= next(volumes(run.path, header)) * header.slope + header.inter != 0
        except DAMAGE as error:
            raise ValueError(f"{run.path} is damaged or cut short ({error}); fetch it again") from error
    index = np.flatnonzero(inside.reshape(runs[0].shape[2::-1]).transpose(2, 1, 0).ravel())
    if not len(index):
        raise ValueError(f"{runs[0].path} and the other {len(runs) - 1} runs are 0 everywhere in their first volumes")
    return index


def read_series(path: Path, index: np.ndarray) -> np.ndarray:
    """Time series of voxels, (n_voxels, n_timepoints) C-contiguous, int16 as stored or else float32.

    index: flat, in C order of (X, Y, Z). A slope and an intercept in the header are applied. ValueError for a file that is
    damaged or cut short.
    """
    header = _header(path)
    *xyz, n_timepoints = header.shape
    in_file = np.ravel_multi_index(np.unravel_index(index, xyz), xyz, order="F")
    as_stored = header.dtype.kind == "i" and header.dtype.itemsize == 2 and (header.slope, header.inter) == (1, 0)
    series = np.empty((len(index), n_timepoints), np.int16 if as_stored else np.float32)
    block = np.empty((min(64, n_timepoints), len(index)), series.dtype)  # volumes that are turned round together
    try:
        for number, volume in enumerate(volumes(path, header)):
            row = number % len(block)
            block[row] = volume[in_file] if as_stored else volume[in_file] * header.slope + header.inter
            if row == len(block) - 1 or number == n_timepoints - 1:
                series[:, number - row : number + 1] = block[: row + 1].T
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again") from error
    return series
