"""A lab's own data in BIDS: which runs a participant's sessions have, and what they showed.

    <root>/sub-01/ses-01/func/sub-01_ses-01_task-x_run-1_events.tsv     onset, duration, stim_file
    <bold>/sub-01/ses-01/func/sub-01_ses-01_task-x_run-1[_space-…]_bold.nii.gz

The runs must be preprocessed (motion, slice timing, distortion), and may lie in a folder of their own such as fMRIPrep's
derivatives. The ``ses-`` level may be absent. A trial is an event that names a picture in ``stim_file``; all else
(responses, fixation, n/a) is no trial. RepetitionTime, and StartTime where slice timing moved the first volume, are from
the JSON files beside or above a run (BIDS' inheritance principle), or the TR is the header's.
"""
from __future__ import annotations

import csv
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from nsdray.glm import Events
from nsdray.nsd.bold import BoldRun, BoldSession, bold_shape
from nsdray.nsd.layout import N_SUBJECTS

SAME_RUN = ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run")
"""Entities that tell runs apart; files of one run that differ in others (space, echo, part) are versions of it."""
MAX_DURATION_SPREAD_S = 0.1


def participants(root: Path) -> list[str]:
    """Labels of the participants: "01" for sub-01."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; a BIDS data set holds sub-01/ and so on")
    labels = sorted(path.name.removeprefix("sub-") for path in root.glob("sub-*") if path.is_dir())
    if not labels:
        raise FileNotFoundError(f"{root} holds no sub-*/; give the folder of a BIDS data set")
    return labels


def number_participants(labels: Sequence[str], known: dict[str, int] | None = None) -> dict[str, int]:
    """A subject number from 1 to 8 for each label: the label's own if all are such numbers, else by order.

    known: numbers given earlier, which are kept. ValueError if there are more than NSD's layout can number.
    """
    known = dict(known or {})
    every = {*labels, *known}
    own = {label: int(label) for label in every if re.fullmatch(r"0*[1-8]", label)}
    if len(set(own.values())) == len(every) and known.items() <= own.items():
        return dict(sorted(own.items()))
    free = iter(sorted(set(range(1, N_SUBJECTS + 1)) - set(known.values())))
    for label in labels:
        if label not in known:
            known[label] = next(free, 0)
    if 0 in known.values():
        raise ValueError(
            f"{len(known)} participants ({', '.join(known)}); NSD's layout has {N_SUBJECTS}. Choose some by --bids.participants"
        )
    return known


def bids_sessions(
    root: Path,
    label: str,
    subject: int,
    bold: Path | None = None,
    task: str | None = None,
    space: str | None = None,
    tr: float | None = None,
    stimulus_duration: float | None = None,
) -> list[BoldSession]:
    """A participant's sessions, numbered from 1 in the order of their labels.

    root: of events.tsv. label: of sub-<label>. subject: its number. bold: folder of the runs; None: root. task, space:
    only runs with this task-, space- entity; None: any task; any space, if there is only one version of each run. tr,
    stimulus_duration: seconds, in place of what the files say.

    FileNotFoundError or ValueError say what is missing or ambiguous. Runs that name no picture are left out.
    """
    bold = bold or root
    files = _runs_by_session(bold, label, task, space)
    found = []
    for number, (session, paths) in enumerate(files.items(), 1):
        runs, left_out, trs, durations = [], [], {}, []
        for path in paths:
            events_file = _inherited(path, root, "events", ".tsv")
            if not events_file:
                left_out.append(f"{path.name} (no events.tsv)")
                continue
            events, lasted = read_events(events_file[-1])
            if not events.onset:
                left_out.append(f"{path.name} (no stim_file)")
                continue
            sidecar = _read_sidecars([*_inherited(path, root, "bold", ".json"), *_inherited(path, bold, "bold", ".json")])
            trs[path.name] = tr or _repetition_time(path, sidecar)
            start = float(sidecar.get("StartTime") or 0)
            runs.append(BoldRun(path, bold_shape(path), Events([o - start for o in events.onset], events.condition)))
            durations += lasted
        if not runs:
            raise ValueError(
                f"no run of sub-{label} {session} names a picture: {', '.join(left_out)}. Expected events.tsv with the columns "
                f"onset, duration and stim_file below {root}"
            )
        if max(trs.values()) - min(trs.values()) > 1e-4:
            raise ValueError(f"runs of sub-{label} {session} differ in their TR: {trs}; leave the odd ones out, or give --tr")
        stimulus = stimulus_duration if stimulus_duration is not None else _one_duration(durations, f"sub-{label} {session}")
        found.append(BoldSession(subject, number, tuple(runs), next(iter(trs.values())), stimulus, tuple(left_out)))
    return found


def read_events(path: Path) -> tuple[Events, list[float]]:
    """Trials of an events.tsv, conditions are stim_file; and their durations in seconds, NaN where not given."""
    with open(path, newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        if missing := {"onset", "duration", "stim_file"} - set(rows.fieldnames or ()):
            raise ValueError(
                f"{path} lacks the columns {sorted(missing)}; it has {rows.fieldnames}. stim_file says which picture was shown, "
                "relative to the folder stimuli/"
            )
        onset, condition, duration = [], [], []
        for line, row in enumerate(rows, 2):
            if (name := (row["stim_file"] or "").strip()) in ("", "n/a"):
                continue
            try:
                onset.append(float(row["onset"]))
                duration.append(float("nan") if row["duration"].strip() == "n/a" else float(row["duration"]))
            except (ValueError, AttributeError, TypeError) as error:
                values = f"onset {row['onset']!r}, duration {row['duration']!r}"
                raise ValueError(f"{path}, line {line}: {values}; expected seconds") from error
            condition.append(name)
    return Events(onset, condition), duration


def _runs_by_session(bold: Path, label: str, task: str | None, space: str | None) -> dict[str, list[Path]]:
    """Runs of a participant in the order of acquisition, by the name of their session ("ses-01", or "" without that level)."""
    versions: dict[tuple, list[Path]] = {}
    others = set()
    for path in sorted((bold / f"sub-{label}").glob("**/func/*_bold.nii*")):
        entities = _entities(path)
        if (task, space) != (task and entities.get("task"), space and entities.get("space")):
            others.add(f"task-{entities.get('task')}" + (f"_space-{entities['space']}" if "space" in entities else ""))
            continue
        versions.setdefault(tuple(_natural(entities.get(name, "")) for name in SAME_RUN), []).append(path)
    if not versions:
        raise FileNotFoundError(
            f"no runs of sub-{label} in {bold}: expected sub-{label}/[ses-*/]func/*_bold.nii.gz"
            + (f" with task {task or 'any'}, space {space or 'any'}; there are {', '.join(sorted(others))}" if others else "")
        )
    if several := [paths for paths in versions.values() if len(paths) > 1]:
        names = ", ".join(path.name for path in several[0])
        raise ValueError(
            f"a run in {len(several[0])} versions: {names}. Choose by --bids.space, combine echoes before (as fMRIPrep does), or "
            "move the others away"
        )
    found: dict[str, list[Path]] = {}
    for key in sorted(versions, key=lambda key: (key[SAME_RUN.index("ses")], key[SAME_RUN.index("run")], key)):
        path = versions[key][0]
        found.setdefault(f"ses-{_entities(path)['ses']}" if "ses" in _entities(path) else "", []).append(path)
    return found


def _natural(label: str) -> tuple[int, str]:
    """Sorts "2" before "10"."""
    return (int(label) if label.isdigit() else -1, label)


def _entities(path: Path) -> dict[str, str]:
    """{"sub": "01", "task": "x", "run": "1", …} of a file's name. A run's number has no zeros before it: run-01 is run-1."""
    found = dict(part.split("-", 1) for part in path.name.split(".")[0].split("_") if "-" in part)
    return found | ({"run": found["run"].lstrip("0")} if "run" in found else {})


def _inherited(run: Path, root: Path, suffix: str, extension: str) -> list[Path]:
    """Files of a suffix that apply to a run: in its folders below root, from the root down, the most special one last."""
    entities, folder = _entities(run), root
    found = []
    for part in ("", f"sub-{entities['sub']}", f"ses-{entities['ses']}" if "ses" in entities else "", "func"):
        folder = folder / part
        if part or folder == root:
            here = [path for path in folder.glob(f"*{suffix}{extension}") if path.name == f"{suffix}{extension}" or
                    path.name.endswith(f"_{suffix}{extension}")]  # fmt: skip
            fitting = [path for path in here if _entities(path).items() <= entities.items()]
            found += [path for path in sorted(fitting, key=lambda path: len(_entities(path))) if path not in found]
    return found


def _read_sidecars(paths: Sequence[Path]) -> dict:
    merged = {}
    for path in paths:
        try:
            merged |= json.loads(path.read_text())
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is no JSON object ({error})") from error
    return merged


def _repetition_time(path: Path, sidecar: dict) -> float:
    """Seconds, of the sidecar or else of the header, in its unit."""
    header = nib.load(path).header
    unit = {"msec": 1e-3, "usec": 1e-6}.get(header.get_xyzt_units()[1], 1.0)
    in_header = float(header.get_zooms()[3]) * unit
    if "RepetitionTime" not in sidecar:
        if in_header <= 0:
            raise ValueError(f"{path}: neither a JSON file with RepetitionTime, nor a TR in its header; give --tr SECONDS")
        return in_header
    tr = float(sidecar["RepetitionTime"])
    if in_header > 0 and not math.isclose(tr, in_header, rel_tol=0.01):
        message = f"{path.name}: RepetitionTime is {tr:g} s, but the header says {in_header:g} s; the former is used"
        warnings.warn(message, stacklevel=2)
    return tr


def _one_duration(durations: Sequence[float], name: str) -> float:
    """The stimulus duration that all trials share."""
    given = [one for one in durations if math.isfinite(one)]
    if not given or max(given) - min(given) > MAX_DURATION_SPREAD_S:
        what = f"durations of {min(given):g} to {max(given):g} s" if given else "no duration"
        raise ValueError(f"{name}: the trials have {what}; one response is fitted to all, so give --stimulus-duration SECONDS")
    return round(float(np.median(given)), 3)
