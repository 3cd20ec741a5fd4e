"""Which sessions a protocol uses, and which image every trial showed.

NSD's design file counts from 1 everywhere; nothing that leaves this module does, session numbers apart. An image is a
test image if and only if it is one of the shared images (``sharedix``), so an image never is in both splits.
"""
from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from nsdray.nsd.layout import NSDLayout

PROTOCOLS = ("nsd37", "nsd40")
N_SESSIONS_NSD37 = 37  # a definition, not a size: the sessions public when Brain-Diffuser was written
N_SESSIONS = {1: 40, 2: 40, 3: 32, 4: 30, 5: 40, 6: 32, 7: 40, 8: 30}  # that each subject of NSD did
N_TRIALS = 750  # of a session


def protocol_sessions(layout: NSDLayout, subject: int, protocol: str) -> list[int]:
    """Sessions of a named protocol, ascending and without a gap, each with a file.

    nsd37: sessions 1..37. nsd40: every session, that is those named by ``responses.tsv`` where it exists, else those
    that have a file. A session that has no file is a FileNotFoundError, a gap in the numbers a ValueError.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    files = layout.session_files(subject)
    folder = layout.betas_folder(subject)
    if not files:
        raise FileNotFoundError(f"{folder} holds no session: expected betas_session01.hdf5 or .nii.gz and so on")
    if protocol == "nsd37":
        wanted, source = list(range(1, N_SESSIONS_NSD37 + 1)), "protocol nsd37"
        mend = "Download them, or take protocol nsd40, which uses every session that the subject did"
    elif layout.responses(subject).exists():
        wanted, source = _answered_sessions(layout.responses(subject)), str(layout.responses(subject))
        mend = "Download them"
        if extra := sorted(set(files) - set(wanted)):
            warnings.warn(f"sessions {extra} of subject {subject} are left out: they are not in {source}", stacklevel=2)
    else:
        wanted, source, mend = list(files), str(folder), "Download the missing ones"
    if gap := sorted(set(range(1, max(wanted) + 1)) - set(wanted)):
        raise ValueError(f"subject {subject}: sessions {gap} are missing from 1..{max(wanted)} in {source}. {mend}")
    if missing := [session for session in wanted if session not in files]:
        raise FileNotFoundError(
            f"subject {subject}: {source} needs sessions 1..{max(wanted)}, but {folder} holds no file of sessions "
            f"{missing} (it has {len(files)}). {mend}"
        )
    return wanted


def _answered_sessions(path: Path) -> list[int]:
    with open(path, newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        if "SESSION" not in (rows.fieldnames or ()):
            raise ValueError(f"{path} has no column SESSION, only {rows.fieldnames}; download it again")
        sessions = sorted({int(float(row["SESSION"])) for row in rows})
    if not sessions:
        raise ValueError(f"{path} has no rows; download it again, or remove it to go by the files there are")
    return sessions


@dataclass(frozen=True)
class Trials:
    """Trials in the order of the betas; arrays of shape (n_trials,)."""

    trial: np.ndarray
    """int32, 0-based over the whole experiment."""
    session: np.ndarray
    """int16, 1-based."""
    image_id: np.ndarray
    """int32, 0-based among all stimuli (the 73k id less one)."""
    repeat: np.ndarray
    """int16: how many times the subject had seen the image before in the experiment."""
    is_test: np.ndarray
    """bool: the image is one of the shared images."""


def trials(layout: NSDLayout, subject: int, sessions: Sequence[int], trials_per_session: Mapping[int, int]) -> Trials:
    """Trials of the given sessions, in that order.

    trials_per_session: number of trials of every session from 1 to the last one asked for, as the files have it.
    ValueError for a session without a count, more trials than the design has, or ids out of range.
    """
    if missing := sorted(set(range(1, max(sessions) + 1)) - set(trials_per_session)):
        raise ValueError(f"trials_per_session has no count for sessions {missing}; it must cover 1..{max(sessions)}")
    counts = [trials_per_session[session] for session in range(1, max(sessions) + 1)]
    start = np.concatenate([[0], np.cumsum(counts)])
    image_ids, shared_ids = _image_order(layout, subject)
    if start[-1] > len(image_ids):
        raise ValueError(
            f"sessions 1..{max(sessions)} of subject {subject} have {start[-1]} trials, but masterordering in "
            f"{layout.expdesign} has {len(image_ids)}; betas and design file are not of the same experiment"
        )
    trial = np.concatenate([np.arange(start[session - 1], start[session]) for session in sessions])
    return Trials(
        trial=trial.astype(np.int32),
        session=np.repeat(sessions, [trials_per_session[session] for session in sessions]).astype(np.int16),
        image_id=image_ids[trial].astype(np.int32),
        repeat=_times_seen_before(image_ids)[trial].astype(np.int16),
        is_test=np.isin(image_ids[trial], shared_ids),
    )


def planned_trials(layout: NSDLayout, subject: int, protocol: str) -> Trials:
    """Trials of a protocol by NSD's design alone, for those who have no betas: 750 in each session that the subject did."""
    n_sessions = N_SESSIONS[subject]
    if protocol == "nsd37":
        if n_sessions < N_SESSIONS_NSD37:
            raise ValueError(f"subject {subject} did {n_sessions} sessions only; protocol nsd37 needs 37, nsd40 takes all")
        n_sessions = N_SESSIONS_NSD37
    sessions = range(1, n_sessions + 1)
    return trials(layout, subject, sessions, dict.fromkeys(sessions, N_TRIALS))


def shared_images(layout: NSDLayout) -> np.ndarray:
    """0-based ids of the shared images, int32 (n,), in the design file's order. A subject may have seen fewer of them."""
    return (_design(layout)["sharedix"].ravel().astype(np.int64) - 1).astype(np.int32)


def _design(layout: NSDLayout) -> dict[str, np.ndarray]:
    path = layout.expdesign
    if not path.exists():
        raise FileNotFoundError(f"no design file {path}; download nsddata/experiments/nsd from NSD's bucket")
    design = loadmat(path)
    if missing := {"masterordering", "subjectim", "sharedix"} - set(design):
        raise ValueError(f"{path} lacks {sorted(missing)}; it is not NSD's design file, download it again")
    return design


def _image_order(layout: NSDLayout, subject: int) -> tuple[np.ndarray, np.ndarray]:
    """0-based image ids of all trials of the experiment, and of the shared images."""
    path, design = layout.expdesign, _design(layout)
    order, images = design["masterordering"].ravel().astype(np.int64), design["subjectim"].astype(np.int64)
    if not 1 <= subject <= len(images):
        raise ValueError(f"subject {subject} has no row in subjectim of {path}, which has {len(images)} rows")
    if order.min() < 1 or order.max() > images.shape[1]:
        raise ValueError(
            f"masterordering in {path} ranges over {order.min()}..{order.max()}, but subjectim has columns "
            f"1..{images.shape[1]}; download the file again"
        )
    image_ids, shared_ids = images[subject - 1, order - 1] - 1, design["sharedix"].ravel().astype(np.int64) - 1
    if image_ids.min() < 0:
        raise ValueError(f"subjectim in {path} holds id {image_ids.min() + 1}; ids count from 1, download it again")
    return image_ids, shared_ids


def _times_seen_before(image_ids: np.ndarray) -> np.ndarray:
    """For every trial, the number of earlier trials with the same image."""
    order = np.argsort(image_ids, kind="stable")
    position = np.arange(len(order))
    is_first = np.r_[True, np.diff(image_ids[order]) != 0]
    repeat = np.empty_like(position)
    repeat[order] = position - np.maximum.accumulate(np.where(is_first, position, 0))
    return repeat
