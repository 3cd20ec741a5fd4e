"""When each stimulus came on, in which run, and whether that can belong to the data: the experiment, checked.

Everything here goes by shapes and times alone, so that swapped axes or milliseconds for seconds are said before any
time series is touched. Trials are numbered in chronological order: run by run, by onset within a run.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

TR_RANGE_S = (0.05, 20.0)
MAX_RUN_S = 2 * 3600
END_S = 8
"""A trial that begins later than this before the end of its run leaves little response to measure (as GLMsingle warns)."""
N_SPARE = 2
"""Time points that a run must have beyond its trials and drifts, so that its fit leaves any residual."""


@dataclass(frozen=True)
class Events:
    """The stimuli of a run, in any order."""

    onset: Sequence[float]
    """Seconds from the first volume, above -TR (slice timing may move the first volume into the run); need not be multiples of
    the TR."""
    condition: Sequence[Hashable]
    """What was shown, such as an image id or a file name: equal values are repeats of the same stimulus."""


@dataclass(frozen=True)
class Design:
    """A checked experiment. Arrays over trials are (n_trials,), in chronological order."""

    tr: float
    """Seconds between volumes."""
    stimulus_duration: float
    """Seconds."""
    n_timepoints: tuple[int, ...]
    """Of each run."""
    session: np.ndarray
    """int, (n_runs,): runs of a session are z-scored together in cross-validation."""
    onset: np.ndarray
    """float64, seconds from the first volume of the trial's run."""
    run: np.ndarray
    """int, 0-based, ascending."""
    condition: np.ndarray
    """int, index into `labels`."""
    labels: tuple[Hashable, ...]
    """Columns of the design matrices, or the events' conditions in the order of their first appearance."""

    @property
    def n_trials(self) -> int:
        return len(self.onset)

    @property
    def n_runs(self) -> int:
        return len(self.n_timepoints)

    def trials_of(self, run: int) -> slice:
        """The trials of a run."""
        first, last = np.searchsorted(self.run, [run, run + 1])
        return slice(int(first), int(last))

    def drift_degree(self, run: int) -> int:
        """Degree of the polynomials that model a run's drift: half its minutes, rounded, as in GLMsingle."""
        return int(self.n_timepoints[run] * self.tr / 60 / 2 + 0.5)

    def drifts(self, run: int) -> np.ndarray:
        """Orthonormal polynomials up to `drift_degree`, (n_timepoints, degree + 1) float64; the first is constant."""
        time = np.linspace(-1, 1, self.n_timepoints[run])
        return np.linalg.qr(np.polynomial.legendre.legvander(time, self.drift_degree(run)))[0]


def make_design(
    design: Sequence[np.ndarray | Events],
    data_shapes: Sequence[tuple[int, ...]],
    stimulus_duration: float,
    tr: float,
    sessions: Sequence[int] | None = None,
) -> Design:
    """Check an experiment against the shapes of its data, and number the trials.

    design: per run a matrix (n_timepoints, n_conditions), 1 where a stimulus of a condition came on and 0 elsewhere,
    with the same conditions in every run; or `Events`. data_shapes: per run (n_voxels, n_timepoints) or
    (X, Y, Z, n_timepoints). stimulus_duration, tr: seconds. sessions: per run, any integers; None: all the same.

    ValueError for whatever does not fit, in particular swapped axes, milliseconds, runs of unequal voxel counts, events
    outside their run or at the same time, and more trials than a run's time points can tell apart. A warning for trials
    that begin less than END_S before the end of their run; one that begins on the last volume gets a beta of 0
    (to which type D adds its offset).
    """
    shapes = [tuple(shape) for shape in data_shapes]
    design = [one if isinstance(one, Events) else np.asarray(one) for one in design]
    _check_times(tr, stimulus_duration)
    if not shapes or len(shapes) != len(design):
        raise ValueError(f"{len(design)} runs of design, but {len(shapes)} runs of data; give one of each per run")
    _check_shapes(design, shapes)
    n_timepoints = tuple(shape[-1] for shape in shapes)
    events = [_events(one, tr, run) for run, one in enumerate(design)]
    for run, one in enumerate(events):
        _check_length(one, run, shapes[run], tr, isinstance(design[run], Events))
        _check_events(one, run, shapes[run][-1] * tr, stimulus_duration, tr)
    labels = {label: None for one in events for label in one.condition}
    if isinstance(design[0], np.ndarray):
        labels = dict.fromkeys(range(design[0].shape[1]))
    index = {label: i for i, label in enumerate(labels)}
    order = [np.argsort(one.onset, kind="stable") for one in events]
    sessions = np.zeros(len(shapes), int) if sessions is None else np.asarray(sessions, int)
    if sessions.shape != (len(shapes),):
        raise ValueError(f"sessions has shape {sessions.shape}, expected one number for each of {len(shapes)} runs")
    checked = Design(
        tr=float(tr),
        stimulus_duration=float(stimulus_duration),
        n_timepoints=n_timepoints,
        session=sessions,
        onset=np.concatenate([np.asarray(one.onset, float)[i] for one, i in zip(events, order)]),
        run=np.repeat(np.arange(len(events)), [len(one.onset) for one in events]),
        condition=np.concatenate([[index[one.condition[k]] for k in i] for one, i in zip(events, order)]).astype(int),
        labels=tuple(labels),
    )
    _check_estimable(checked)
    return checked


def _check_times(tr: float, stimulus_duration: float) -> None:
    low, high = TR_RANGE_S
    if not low <= tr <= high:
        hint = f"; if these are milliseconds, give {tr / 1000:g}" if low <= tr / 1000 <= high else ""
        raise ValueError(f"tr is {tr:g}: the seconds between two volumes, expected {low:g} to {high:g}{hint}")
    if not (math.isfinite(stimulus_duration) and stimulus_duration >= 0):
        raise ValueError(f"stimulus_duration is {stimulus_duration}; expected seconds, 0 or more")


def _check_shapes(design: Sequence[np.ndarray | Events], shapes: list[tuple[int, ...]]) -> None:
    for run, shape in enumerate(shapes):
        if len(shape) not in (2, 4) or 0 in shape:
            raise ValueError(
                f"run {run} of the data has shape {shape}; expected (n_voxels, n_timepoints) or (X, Y, Z, n_timepoints)"
            )
        if isinstance(design[run], Events) != isinstance(design[0], Events):
            raise ValueError(f"run {run} and run 0 of the design are not both matrices or both events; give one kind")
        if isinstance(design[run], np.ndarray):
            _check_matrix(design[run], design[0], run, shape)
    if len({shape[:-1] for shape in shapes}) > 1:
        counts = [shape[:-1] for shape in shapes]
        swapped = " (or is time the first axis? It must be the last)" if shapes[0][0] < shapes[0][-1] else ""
        raise ValueError(
            f"runs have unequal voxels: shapes without time are {counts}. Bring all runs to one grid and mask{swapped}"
        )


def _check_matrix(matrix: np.ndarray, first: np.ndarray, run: int, shape: tuple[int, ...]) -> None:
    if matrix.ndim != 2:
        raise ValueError(f"design of run {run} has shape {matrix.shape}; expected (n_timepoints, n_conditions)")
    n_timepoints = len(matrix)
    if shape[-1] != n_timepoints:
        if shape[0] == n_timepoints:
            hint = "The data's first axis fits: its axes are swapped. Time must be last; pass np.moveaxis(run, 0, -1)"
        elif matrix.shape[1] == shape[-1]:
            hint = "The design's second axis fits: it is transposed; pass design.T"
        else:
            hint = "Cut either to the volumes that both describe"
        raise ValueError(
            f"run {run}: the design is {matrix.shape}, {n_timepoints} time points, but the data are {shape}, "
            f"{shape[-1]} time points. {hint}"
        )
    if matrix.shape[1] != first.shape[1]:
        raise ValueError(
            f"design of run {run} has {matrix.shape[1]} conditions, that of run 0 {first.shape[1]}; every run needs the same "
            "columns"
        )
    if not np.isin(matrix, (0, 1)).all():
        odd = matrix[~np.isin(matrix, (0, 1))]
        raise ValueError(
            f"design of run {run} holds {odd[0]:g} ({odd.size} such values); it must be 1 at a stimulus' onset and 0 "
            "elsewhere, not yet convolved"
        )


def _events(one: np.ndarray | Events, tr: float, run: int) -> Events:
    if isinstance(one, np.ndarray):
        volume, column = np.nonzero(one)
        one = Events(volume * tr, column.tolist())
    if len(one.onset) != len(one.condition):
        raise ValueError(f"run {run} has {len(one.onset)} onsets, but {len(one.condition)} conditions")
    if len(one.onset) == 0:
        raise ValueError(f"run {run} has no events; leave the run out")
    return one


def _check_length(one: Events, run: int, shape: tuple[int, ...], tr: float, axes_unknown: bool) -> None:
    """A run too long to be one, or one that its events do not fit or leave nine tenths of empty, but that would fit if its
    first axis were time."""
    last, length = max(one.onset), shape[-1] * tr
    fits_turned = len(shape) == 2 and shape[0] < shape[-1] and last < shape[0] * tr
    if length > MAX_RUN_S or (axes_unknown and fits_turned and last < length / 10):
        raise ValueError(
            f"run {run} has shape {shape}: {shape[-1]} time points at tr {tr:g} s are {length / 3600:.1f} hours, and the "
            f"last event is at {last:g} s. Are the axes swapped? Time must be the last axis"
        )
    if axes_unknown and len(shape) == 4 and length <= last < shape[0] * tr:
        raise ValueError(
            f"run {run} has shape {shape}: {shape[-1]} time points at tr {tr:g} s end at {length:g} s, before the last event "
            f"at {last:g} s, which the first axis would hold. Are the axes swapped? Time must be the last axis"
        )


def _check_events(one: Events, run: int, length: float, stimulus_duration: float, tr: float) -> None:
    onset = np.sort(np.asarray(one.onset, float))
    outside = ~((onset > -tr) & (onset < length))
    if outside.any():
        milliseconds = onset[0] >= 0 and onset[-1] > 50 * length and onset[-1] / 1000 < length
        hint = "These look like milliseconds; divide by 1000" if milliseconds else (
            "Onsets count from the first volume that is in the data: subtract the time of dummy volumes, or leave out "
            "what was not recorded"
        )  # fmt: skip
        raise ValueError(
            f"run {run}: {outside.sum()} of {len(onset)} events are outside the run of {length:g} s (first: "
            f"{onset[outside][0]:g} s). {hint}"
        )
    if stimulus_duration > length:
        raise ValueError(
            f"stimulus_duration is {stimulus_duration:g} s, longer than run {run} ({length:g} s); is it in milliseconds?"
        )
    if (np.diff(onset) == 0).any():
        same = onset[1:][np.diff(onset) == 0]
        raise ValueError(
            f"run {run}: {len(same)} events begin when another does (first at {same[0]:g} s); their responses cannot be "
            "told apart, keep one of each"
        )


def _check_estimable(design: Design) -> None:
    late = 0
    for run, n_timepoints in enumerate(design.n_timepoints):
        onset = design.onset[design.trials_of(run)]
        n_drifts = design.drift_degree(run) + 1
        if n_timepoints < len(onset) + n_drifts + N_SPARE:
            raise ValueError(
                f"run {run} has {n_timepoints} time points for {len(onset)} trials and {n_drifts} drifts; single trials "
                "cannot be told apart. Give the time series at a finer TR, or merge events into longer trials"
            )
        late += int((onset > n_timepoints * design.tr - END_S).sum())
    if late:
        warnings.warn(
            f"{late} of {design.n_trials} trials begin less than {END_S} s before the end of their run, so that little of "
            "their response was recorded; their betas are unreliable. Leave them out of the design",
            stacklevel=4,
        )
