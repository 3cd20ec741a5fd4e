"""NSD's preprocessed time series and designs: which runs a session has, and what they showed.

``design_sessionYY_runZZ.tsv`` holds an integer per volume: 0, or the 1-based id of the picture that came on with it. A
file of BOLD may have a volume more than its design has lines. Sessions with resting-state runs have 14 runs, of which
the first and the last are at rest (NSD Data Manual, "Raw data"); runs that showed no picture are left out.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nsdray.glm import Events
from nsdray.nsd.bold import BoldRun, BoldSession, bold_shape
from nsdray.nsd.design import trials
from nsdray.nsd.layout import NSDLayout

TR_S = 4 / 3
"""Seconds between volumes of the preparation func1pt8mm, which was resampled in time."""
STIMULUS_S = 3.0


def nsd_sessions(layout: NSDLayout, subject: int, sessions: Sequence[int] | None = None) -> list[BoldSession]:
    """The subject's sessions of BOLD, ascending. sessions: only these; None: all that are there.

    What they showed is compared with NSD's design file, so designs of all sessions from the first on must be there.
    FileNotFoundError for missing files, ValueError for files that do not belong together.
    """
    files, designs = layout.timeseries_files(subject), layout.design_files(subject)
    folder = layout.timeseries_folder(subject)
    wanted = sorted(files) if sessions is None else sorted(sessions)
    if not wanted or (missing := sorted(set(wanted) - set(files))):
        what = f"sessions {missing} of subject {subject}" if wanted else f"subject {subject}"
        raise FileNotFoundError(
            f"no time series of {what}: {folder} has sessions {sorted(files)}. Fetch timeseries_sessionYY_runZZ.nii.gz from "
            "NSD's nsddata_timeseries"
        )
    if missing := sorted(set(range(1, max(wanted) + 1)) - set(designs)):
        raise FileNotFoundError(
            f"no designs of sessions {missing} of subject {subject} in {folder.with_name('design')}; fetch that folder of NSD's "
            "nsddata_timeseries (it is small). All sessions from the first on are needed to number the trials"
        )
    shown = {n: {run: _read_design(path) for run, path in designs[n].items()} for n in range(1, max(wanted) + 1)}
    counts = {session: sum(int((ids > 0).sum()) for ids in runs.values()) for session, runs in shown.items()}
    found = []
    for session in wanted:
        pairs = _pair_runs(files[session], shown[session], folder)
        found.append(_session(layout, subject, session, pairs))
        _check_order(layout, found[-1], counts)
    return found


def _read_design(path: Path) -> np.ndarray:
    """An integer per volume, (n_volumes,) int64."""
    try:
        ids = np.array([int(line) for line in path.read_text().split()], np.int64)
    except ValueError as error:
        raise ValueError(f"{path} does not hold one integer per line ({error}); fetch it again") from error
    if len(ids) and ids.min() < 0:
        raise ValueError(f"{path} holds {ids.min()}; expected 0 or an image's number from 1 on")
    return ids


def _pair_runs(files: dict[int, Path], designs: dict[int, np.ndarray], folder: Path) -> dict[Path, np.ndarray | None]:
    """Every run's file with its design, or None for a run that has none."""
    if len(files) == len(designs) + 2 and list(designs) == list(range(1, len(designs) + 1)) and max(files) == len(files):
        designs = {run + 1: ids for run, ids in designs.items()}  # numbered without the rest before and after them
    if extra := sorted(set(designs) - set(files)):
        raise FileNotFoundError(f"{folder} has runs {sorted(files)}, but designs of runs {extra} are there too; fetch those runs")
    return {path: designs.get(run) for run, path in files.items()}


def _session(layout: NSDLayout, subject: int, session: int, pairs: dict[Path, np.ndarray | None]) -> BoldSession:
    runs, left_out = [], []
    for path, ids in pairs.items():
        if ids is None or not ids.any():
            left_out.append(path.name)
            continue
        shape, onset = bold_shape(path), np.flatnonzero(ids)
        if not 0 <= shape[-1] - len(ids) <= 1:
            raise ValueError(
                f"{path} has {shape[-1]} volumes, its design {len(ids)} lines; expected as many, or one line less. They are not "
                "of the same run or resolution"
            )
        runs.append(BoldRun(path, shape, Events((onset * TR_S).tolist(), (ids[onset] - 1).tolist())))
    if not runs:
        raise ValueError(f"subject {subject}, session {session}: no run showed a picture ({', '.join(left_out)})")
    return BoldSession(subject, session, tuple(runs), TR_S, STIMULUS_S, tuple(left_out))


def _check_order(layout: NSDLayout, session: BoldSession, counts: dict[int, int]) -> None:
    """ValueError unless the session's pictures are those that NSD's design file has for it, in that order."""
    expected = trials(layout, session.subject, [session.session], counts).image_id
    shown = np.concatenate([run.events.condition for run in session.runs])
    if len(shown) != len(expected) or (shown != expected).any():
        first = int(np.argmin(shown == expected)) if len(shown) == len(expected) else 0
        raise ValueError(
            f"{session.name}: trial {first} showed image {shown[first]} by its designs, but {expected[first]} by "
            f"{layout.expdesign} (both counted from 0; {len(shown)} and {len(expected)} trials). Betas would be given to other "
            "pictures: fetch both again, and all designs from session 1 on"
        )
