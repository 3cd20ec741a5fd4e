"""BOLD to session files of betas: passes over chunks of voxels as Ray tasks, for one session (or one subject) after the other.

Compressed runs can only be read from their start. So each run is decompressed once, and its voxels lie in the store,
uncompressed and a row per voxel, while the session is worked on (a stage "glm/series"). The passes of `nsdray.glm.fit`
then read a chunk of voxels each: nothing but a chunk, the model's matrices and a run's slab is ever in a task's memory.
The last pass writes each chunk's betas to the store (a stage "glm/betas"), from where they are put together in NSD's
layout. After a kill, a session goes on: runs and chunks that are there are kept, only the survey is made again. Nobody else
works on what is in the store: it belongs to the folder that is written.

Chunks do not depend on the cluster, and what they give is summed in their order: so neither do the betas.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import ray
from tqdm import tqdm

from nsdray.cluster import metrics
from nsdray.cluster.run import start_ray
from nsdray.config import GLMConfig, digest
from nsdray.glm.design import Design
from nsdray.glm.fit import BATCH_BYTES, HRF_CHOICES, Survey, batch_size, check_options, last_pass, survey
from nsdray.glm.model import CONSTANT, NOT_FINITE, TrialModel
from nsdray.glm.ridge import FRACTIONS
from nsdray.nsd import lab
from nsdray.nsd.betas import session_writer, to_stored
from nsdray.nsd.bids import bids_sessions, number_participants, participants
from nsdray.nsd.bold import BoldRun, BoldSession, affine, read_series, session_design, voxels_with_data
from nsdray.nsd.layout import N_SUBJECTS, NSDLayout
from nsdray.nsd.timeseries import nsd_sessions
from nsdray.stages import miniature_nsd
from nsdray.store import ROWS_PER_GROUP, Inputs, Stage, Store, resolve_root, subject_folder, table, view_column

SLAB_BYTES = 2**29
"""Of a run's time series that a task holds while it decompresses the run."""
TASK_BYTES = 2**27
"""That a task needs beside its voxels."""
MOST_CHUNKS_OF_SMALL = 16
"""A small problem is cut into as many chunks, so that more than one worker has something to do."""


@dataclass(frozen=True)
class Group:
    """Sessions of a subject that are fitted together: one, or all."""

    sessions: tuple[BoldSession, ...]
    design: Design
    inputs: Inputs
    """What its betas are made from: settings, files with their sizes, and what was shown when."""
    warnings: list[str]
    """About the design, and which runs were left out."""

    @property
    def subject(self) -> int:
        return self.sessions[0].subject

    @property
    def name(self) -> str:
        one = len(self.sessions) == 1
        return self.sessions[0].name if one else f"subject {self.subject}, {len(self.sessions)} sessions"

    @property
    def partition(self) -> str:
        numbers = "-".join(f"{session.session:02d}" for session in self.sessions)
        return f"{subject_folder(self.subject)}/session={numbers}"

    @property
    def runs(self) -> list[BoldRun]:
        return [run for session in self.sessions for run in session.runs]


@contextlib.contextmanager
def collected(messages: list[str]) -> Iterator[None]:
    """Append warnings to messages instead of printing them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    messages += [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


class GLMPlan:
    """What is to be estimated, where it is read and where it is written. Reads headers and events only."""

    def __init__(self, config: GLMConfig):
        self.config, self.store = config, Store(resolve_root(config.store.root))
        self.is_simulated = config.nsd_root is None and config.bids.root is None
        self.labels: dict[str, int] = {}
        if config.bids.root is not None:
            self.source = Path(config.bids.root).expanduser().resolve()
            self.sessions = self._bids_sessions()
        else:
            self.source = self._nsd_root()
            self.sessions = self._nsd_sessions()
        groups = [[one] if config.sessions_together else [[session] for session in one] for one in self.sessions.values()]
        self.groups = [self._group(group) for several in groups for group in several]

    @cached_property
    def layout(self) -> NSDLayout:
        """Where betas are written."""
        config = self.config
        if config.output is None:
            return NSDLayout(self.source, config.beta_version or f"{config.nsd_name}_nsdray")
        root = Path(config.output).expanduser().resolve()
        root.mkdir(parents=True, exist_ok=True)
        return NSDLayout(root, config.beta_version or config.nsd_name)

    def _nsd_root(self) -> Path:
        config = self.config
        if config.nsd_root is not None:
            return Path(config.nsd_root).expanduser().resolve()
        if not config.simulation.with_bold:
            raise ValueError("simulation.with_bold is off, so the miniature NSD has no BOLD; say --simulation.with-bold")
        return miniature_nsd(self.store, config.simulation, config.subjects or (1, 2, 5, 7))

    def _nsd_sessions(self) -> dict[int, list[BoldSession]]:
        layout, config = NSDLayout(self.source), self.config
        subjects = config.subjects or [s for s in range(1, N_SUBJECTS + 1) if layout.timeseries_files(s)]
        if not subjects:
            raise FileNotFoundError(f"{self.source} holds no time series: expected nsddata_timeseries/ppdata/subj01 and so on")
        return {subject: nsd_sessions(layout, subject, config.sessions) for subject in subjects}

    def _bids_sessions(self) -> dict[int, list[BoldSession]]:
        config, settings, root = self.config, self.config.bids, self.source
        labels = participants(root)
        if settings.participants is not None:
            if unknown := sorted(set(settings.participants) - set(labels)):
                raise ValueError(f"bids.participants names {unknown}, but {root} has {labels}")
            labels = list(settings.participants)
        output = Path(config.output).expanduser().resolve()
        self.labels = number_participants(labels, lab.read_record(output).get("participants"))
        bold = Path(settings.bold).expanduser().resolve() if settings.bold else None
        given = bold, settings.task, settings.space, config.tr, config.stimulus_duration
        return {self.labels[label]: bids_sessions(root, label, self.labels[label], *given) for label in labels}

    def _group(self, sessions: list[BoldSession]) -> Group:
        config, messages = self.config, []
        with collected(messages):
            design = session_design(sessions)
        try:
            check_options(design, config.beta_type, config.noise_pool, config.max_regressors)
        except ValueError as error:
            raise ValueError(f"{sessions[0].name}: {error}") from error
        messages += [f"left out of session {one.session}: {', '.join(one.left_out)}" for one in sessions if one.left_out]
        runs = [run for session in sessions for run in session.runs]
        timing = [design.tr, design.stimulus_duration, design.onset.tolist(), design.run.tolist(), design.condition.tolist()]
        names = ("beta_type", "hrf", "noise_pool", "max_regressors")
        inputs = {name: getattr(config, name) for name in names} | {
            "sessions": [session.session for session in sessions],
            "runs": {run.path.name: run.path.stat().st_size for run in runs},
            "design": digest(timing),
        }
        return Group(tuple(sessions), design, inputs, messages)

    def missing(self) -> list[Group]:
        """Groups whose session files are not there, or not made from these inputs."""
        return [group for group in self.groups if not all(self._is_done(group, session) for session in group.sessions)]

    def _is_done(self, group: Group, session: BoldSession) -> bool:
        key = session.subject, session.session
        betas, record = self.layout.session_file(*key), self.layout.session_record(*key)
        if betas.exists() and not record.exists():
            raise ValueError(
                f"{betas} is there, but nsdray did not make it (no {record.name}). Give another --beta-version or --output"
            )
        return betas.exists() and json.loads(record.read_text())["inputs"] == group.inputs


    def stage(self, name: str, subject: int) -> Stage:
        """Where a subject's time series ("glm/series") or betas ("glm/betas") lie while they are worked on."""
        return self.store.stage(name, {"source": str(self.source), "output": str(self.layout.betas_path(subject))})

    def clear(self, group: Group) -> None:
        """Drop what the store holds of a group."""
        for name in ("glm/series", "glm/betas"):
            with contextlib.suppress(FileNotFoundError):
                self.store.fs.delete_dir(self.store.path(f"{self.stage(name, group.subject).folder}/{group.partition}"))


def prepare_output(plan: GLMPlan) -> None:
    """Everything but betas that other jobs read: NSD's own by links, a lab's experiment and masks in NSD's layout."""
    config, root = plan.config, plan.layout.root
    if config.bids.root is None:
        for name in ("nsddata", "nsddata_stimuli", "annotations"):
            if config.output is not None and (plan.source / name).exists() and not (root / name).exists():
                os.symlink(plan.source / name, root / name)
        return
    bids, record = config.bids, lab.read_record(root)
    if bids.test_images is not None:
        test_images = lab.read_test_images(Path(bids.test_images).expanduser())
    elif len(record.get("test_images", [])) == bids.n_test_images:
        test_images = record["test_images"]  # drawn before
    else:
        test_images = lab.draw_test_images(plan.sessions, bids.n_test_images, bids.seed)
    pictures = Path(bids.stimuli).expanduser() if bids.stimuli else plan.source / "stimuli"
    captions = lab.read_captions(Path(bids.captions).expanduser()) if bids.captions else None
    lab.write_experiment(plan.layout, plan.labels, plan.sessions, test_images, pictures, captions, bids.picture_size)
    for label, subject in plan.labels.items():
        if subject in plan.sessions:
            mask, run = Path(bids.mask.replace("{participant}", label)).expanduser(), plan.sessions[subject][0].runs[0]
            lab.write_mask(plan.layout, subject, mask, run.path, run.shape)


def estimate_betas(plan: GLMPlan) -> None:
    """Write every session file that is missing."""
    groups = plan.missing()
    prepare_output(plan)
    for group in plan.groups:
        if not any(group is one for one in groups):
            plan.clear(group)  # a job that was killed at its very end left it there
    if not groups:
        print("Everything is up to date.")
        return
    start_ray(plan, tracked=False)
    for number, group in enumerate(groups, 1):
        estimate_group(plan, group, f"{group.name} ({number} of {len(groups)})")


def estimate_group(plan: GLMPlan, group: Group, description: str) -> None:
    """Write the session files of sessions that are fitted together."""
    started, config, messages = time.monotonic(), plan.config, list(group.warnings)
    index = voxels_with_data(group.runs)
    series = Series.of(plan, group, index)
    check_memory(series)
    stage = plan.stage("glm/betas", group.subject)
    n_passes = 2 + 2 * (config.beta_type in "CD")
    with tqdm(total=len(series.shards) + n_passes * series.n_chunks, desc=description, unit="task") as progress:
        write_series(series, group, index, progress)
        hrfs = HRF_CHOICES[config.hrf](group.design.stimulus_duration, group.design.tr)
        options = config.beta_type, config.noise_pool, config.max_regressors
        with collected(messages):
            found = survey(group.design, hrfs, series.each_chunk(progress), *options)
        for message in messages:
            tqdm.write(f"  warning: {group.name}: {message}")
        shards = write_chunks(stage, series, group, found, progress)
        n_cut = write_sessions(plan, group, index, found, stage, shards, messages)
        progress.total = progress.n
    plan.clear(group)
    n_bad = [int((found.first.state == state).sum()) for state in (CONSTANT, NOT_FINITE)]
    tqdm.write(
        f"  {group.name}: type {found.beta_type}, {len(index)} voxels ({n_bad[0]} constant, {n_bad[1]} with NaN or infinity), "
        f"{group.design.n_trials} trials, {found.n_regressors} noise regressors, {time.monotonic() - started:.0f} s"
        + (f"; {n_cut} betas were beyond what NSD's files hold (109 %) and were cut" if n_cut else "")
    )


def check_memory(series: Series) -> None:
    """ValueError if no node has the memory of a task: Ray would wait for ever."""
    needed = max(series.chunk_bytes, series.slab_bytes)
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    if needed > most:
        raise ValueError(
            f"a task on {series.n_chunk} voxels needs {needed / 1e9:.1f} GB of memory, and the largest node offers "
            f"{most / 1e9:.1f} GB to tasks. Give --chunk-voxels a smaller number, or start Ray with --memory BYTES"
        )


@dataclass(frozen=True)
class Series:
    """A group's time series in the store: per run and slab of voxels a shard with a row per voxel."""

    stage: Stage
    partition: str
    n_runs: int
    n_voxels: int
    n_chunk: int
    """Voxels of a chunk; a multiple of a Parquet row group."""
    n_slab: int
    """Voxels of a slab; a multiple of n_chunk."""
    chunk_bytes: int
    """Of memory that a task on a chunk needs, about."""
    slab_bytes: int
    """The same of one that reads a slab."""

    @staticmethod
    def of(plan: GLMPlan, group: Group, index: np.ndarray) -> Series:
        design = group.design
        size = plan.config.chunk_voxels or min(batch_size(design), -(-len(index) // MOST_CHUNKS_OF_SMALL))
        n_chunk = -(-size // ROWS_PER_GROUP) * ROWS_PER_GROUP
        longest = max(design.n_timepoints)
        n_slab = max(1, SLAB_BYTES // (4 * longest * n_chunk)) * n_chunk
        chunk_bytes = BATCH_BYTES * min(n_chunk, len(index)) // batch_size(design) + TASK_BYTES
        slab_bytes = 2 * 4 * longest * min(n_slab, len(index)) + TASK_BYTES
        stage, sizes = plan.stage("glm/series", group.subject), (n_chunk, n_slab, chunk_bytes, slab_bytes)
        return Series(stage, group.partition, design.n_runs, len(index), *sizes)

    @property
    def n_chunks(self) -> int:
        return -(-self.n_voxels // self.n_chunk)

    @property
    def shards(self) -> list[tuple[int, int]]:
        """(run, slab) of every shard."""
        return [(run, slab) for run in range(self.n_runs) for slab in range(-(-self.n_voxels // self.n_slab))]

    def shard(self, run: int, slab: int) -> str:
        return f"run={run:03d}-slab={slab:03d}.parquet"

    def chunk(self, number: int) -> slice:
        """Voxels of a chunk."""
        return slice(number * self.n_chunk, min((number + 1) * self.n_chunk, self.n_voxels))

    def read(self, number: int) -> list[np.ndarray]:
        """A chunk's time series, per run (n_voxels, n_timepoints)."""
        where = self.chunk(number)
        slab, first = divmod(where.start, self.n_slab)
        groups = range(first // ROWS_PER_GROUP, -(-(first + where.stop - where.start) // ROWS_PER_GROUP))
        names = [self.shard(run, slab) for run in range(self.n_runs)]
        return [view_column(self.stage.read(self.partition, name, ["series"], groups), "series") for name in names]

    def each_chunk(self, progress: tqdm):
        """What `nsdray.glm.fit.survey` wants: a function that runs another on every chunk."""

        def run(function, *arguments: list) -> Iterator[Any]:
            shared = ray.put(function)
            task = on_chunk.options(memory=self.chunk_bytes)
            calls = (task.remote(shared, self, number, *rest) for number, *rest in zip(range(self.n_chunks), *arguments))
            return in_order(calls, progress)

        return run


def in_order(calls: Iterable[ray.ObjectRef], progress: tqdm) -> Iterator[Any]:
    """Results of tasks in their order; only so many are in flight that every CPU has one to do next."""
    most, waiting = 2 * max(1, int(ray.cluster_resources().get("CPU", 1))), deque()
    for call in calls:
        waiting.append(call)
        if len(waiting) >= most:
            yield ray.get(waiting.popleft())
            advance(progress)
    while waiting:
        yield ray.get(waiting.popleft())
        advance(progress)


def advance(progress: tqdm) -> None:
    """One task more is done."""
    progress.update()
    metrics.record("nsdray_queue", progress.total - progress.n, stage="estimate betas", state="submitted")


def finish_all(calls: Iterable[ray.ObjectRef], progress: tqdm) -> None:
    """Wait for tasks that return nothing."""
    for _ in in_order(calls, progress):
        pass


@ray.remote(num_cpus=1)
def on_chunk(function, series: Series, number: int, *arguments) -> Any:
    """A pass's function on a chunk."""
    return function(series.read(number), *arguments)


@ray.remote(num_cpus=1)
def write_slab(series: Series, run: int, slab: int, path: Path, index: np.ndarray, inputs: Inputs) -> None:
    """Decompress a run and write a slab of its voxels."""
    voxels = index[slab * series.n_slab : (slab + 1) * series.n_slab]
    series.stage.write(series.partition, series.shard(run, slab), table({"series": read_series(path, voxels)}), inputs)


def write_series(series: Series, group: Group, index: np.ndarray, progress: tqdm) -> None:
    """Bring the time series into the store."""
    paths = [run.path for run in group.runs]
    voxels = {"voxels": hashlib.sha256(index.tobytes()).hexdigest()[:10], "slab": series.n_slab}
    wanted = {}
    for run, slab in series.shards:
        wanted[series.shard(run, slab)] = {paths[run].name: group.inputs["runs"][paths[run].name]} | voxels
    series.stage.claim()
    missing = series.stage.begin(series.partition, wanted)
    progress.update(len(wanted) - len(missing))
    shared, task = ray.put(index), write_slab.options(memory=series.slab_bytes)
    todo = [(run, slab, series.shard(run, slab)) for run, slab in series.shards if series.shard(run, slab) in missing]
    finish_all((task.remote(series, run, slab, paths[run], shared, wanted[shard]) for run, slab, shard in todo), progress)
    series.stage.finish(series.partition, wanted)


@ray.remote(num_cpus=1)
def write_chunk(
    model: tuple[TrialModel, tuple[float, ...] | None], series: Series, number: int, hrf_index: np.ndarray, stage: Stage,
    shard: str, inputs: Inputs,
) -> None:  # fmt: skip
    """The last pass on a chunk, to the store. model: and the fractions of ridge regression, or None."""
    found = last_pass(*model, series.read(number), hrf_index)
    design = model[0].design
    session = design.session[design.run]
    n_cut = [to_stored(found.betas[:, session == one])[1] for one in np.unique(session)]
    columns = {"betas": to_stored(found.betas)[0], "r2": found.r2, "fraction": found.fraction}
    columns["n_cut"] = np.tile(np.int32(n_cut), (len(found.r2), 1))  # (n_voxels, n_sessions), of the chunk
    stage.write(series.partition, shard, table(columns), inputs)


def write_chunks(stage: Stage, series: Series, group: Group, found: Survey, progress: tqdm) -> list[str]:
    """Betas of every chunk, to the store; returns the shards in the chunks' order."""
    inputs = group.inputs | {"n_chunk": series.n_chunk, "n_voxels": series.n_voxels}
    wanted = {f"chunk={number:04d}.parquet": inputs for number in range(series.n_chunks)}
    stage.claim()
    missing = set(stage.begin(series.partition, wanted))
    progress.update(len(wanted) - len(missing))
    model = ray.put((found.model, FRACTIONS if found.beta_type == "D" else None))
    task, hrf_index = write_chunk.options(memory=series.chunk_bytes), found.first.hrf_index
    todo = [(number, shard, hrf_index[series.chunk(number)]) for number, shard in enumerate(wanted) if shard in missing]
    finish_all((task.remote(model, series, number, hrfs, stage, shard, inputs) for number, shard, hrfs in todo), progress)
    stage.finish(series.partition, wanted)
    return list(wanted)


def write_sessions(
    plan: GLMPlan, group: Group, index: np.ndarray, found: Survey, stage: Stage, shards: list[str], messages: list[str]
) -> int:
    """Put the chunks together in NSD's layout: sessions' betas, R2, HRF index and fraction as volumes, and a record last.

    Each chunk is read once for all sessions. Returns the number of betas that were cut.
    """
    layout, design, shape, sessions = plan.layout, group.design, tuple(group.runs[0].shape[:3]), group.sessions
    trials = [np.flatnonzero(design.session[design.run] == session.session) for session in sessions]
    r2, fraction = np.full((2, len(index)), np.nan, np.float32)
    n_cut, start = np.zeros(len(sessions), int), 0
    with contextlib.ExitStack() as stack:
        writers = []
        for session, own in zip(sessions, trials):
            write_record(layout, session, {"inputs": None})  # ours, but not whole
            path = layout.session_file(session.subject, session.session)
            writers.append(stack.enter_context(session_writer(path, len(own), shape)))
        for shard in shards:
            data = stage.read(group.partition, shard)
            here, betas = slice(start, start + data.num_rows), view_column(data, "betas")
            for write, own in zip(writers, trials):
                write(index[here], betas[:, own])
            r2[here], fraction[here], start = view_column(data, "r2"), view_column(data, "fraction"), here.stop
            n_cut += view_column(data, "n_cut")[0]
    maps = {"R2": r2, "HRFindex": found.first.hrf_index.astype(np.int16) + 1, "FRACvalue": fraction}
    for session, own, n in zip(sessions, trials, n_cut):
        write_maps(layout, session, maps, index, shape)
        write_record(layout, session, session_record(plan, group, found, messages, len(own), int(n)))
    return int(n_cut.sum())


def write_maps(
    layout: NSDLayout, session: BoldSession, maps: dict[str, np.ndarray], index: np.ndarray, shape: tuple[int, ...]
) -> None:
    """A volume of each map's values (n_voxels,); 0 in all other voxels."""
    grid = affine(session.runs[0].path)
    for name, values in maps.items():
        volume = np.zeros(np.prod(shape), values.dtype)
        volume[index] = values
        nib.save(nib.Nifti1Image(volume.reshape(shape), grid), layout.session_map(session.subject, session.session, name))


def session_record(plan: GLMPlan, group: Group, found: Survey, messages: list[str], n_trials: int, n_cut: int) -> dict:
    """What a session's betas are made from, and what was found."""
    return {
        "what": "betas estimated by nsdray" + (" from SIMULATED BOLD" if plan.is_simulated else ""),
        "inputs": group.inputs,
        "beta_type": found.beta_type,
        "n_trials": n_trials,
        "n_voxels": len(found.first.state),
        "n_constant": int((found.first.state == CONSTANT).sum()),
        "n_not_finite": int((found.first.state == NOT_FINITE).sum()),
        "n_values_cut": n_cut,
        "n_noise_pool": int(found.noise_pool.sum()),
        "n_regressors": found.n_regressors,
        "curve": np.asarray(found.curve).tolist(),
        "warnings": messages,
    }


def write_record(layout: NSDLayout, session: BoldSession, record: dict) -> None:
    """Write a session's record, whole or not at all."""
    path = layout.session_record(session.subject, session.session)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1))
    os.replace(partial, path)
