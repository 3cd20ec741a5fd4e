"""Fetch from NSD's public bucket what some subjects and a protocol need, and COCO's captions; nothing else.

First everything is listed with its size, then fetched: whole files in parallel, each into a ``.part`` beside its place that is
renamed once its size is right, so an interrupted download goes on where it was and a file that is there is whole. Names on disk
are `NSDLayout`'s; a name from the bucket is used only if it is one that was asked for.
"""
from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pyarrow import fs
from tqdm import tqdm

from nsdray.nsd.design import N_SESSIONS_NSD37, PROTOCOLS
from nsdray.nsd.layout import CAPTION_SPLITS, SESSION_SUFFIXES, NSDLayout
from nsdray.nsd.rois import ATLASES, LABELS, UNIONS

BUCKET, REGION = "natural-scenes-dataset", "us-east-2"
CAPTIONS_URL = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
CAPTIONS_SHA1 = "8551ee4bb5860311e79dace7e79cb91e432e78b3"  # of that archive, 252,907,541 bytes, as GluonCV's scripts have it
TERMS = (
    "NSD is free for research under its own terms: read them and fill in the NSD Data Access Agreement, both on "
    "https://naturalscenesdataset.org (Data). COCO's captions are CC BY 4.0."
)
CHUNK = 8 << 20
N_REST_RUNS = 14
"""A session with this many runs begins and ends with one of resting state; the others have 12 runs of the experiment."""


@dataclass(frozen=True)
class Wanted:
    """A file in the bucket, and where it goes."""

    key: str
    """Path in the bucket, and below the NSD root."""
    size: int
    """Bytes."""
    version: str
    """Changes when the file in the bucket is replaced."""


def public_bucket(endpoint: str | None = None) -> fs.FileSystem:
    """NSD's bucket without credentials. endpoint: another S3-compatible server, for tests and mirrors."""
    where = {"region": REGION} if endpoint is None else {"region": REGION, "endpoint_override": endpoint}
    return fs.S3FileSystem(anonymous=True, connect_timeout=30, request_timeout=120,
                           retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=8), **where)  # fmt: skip


def list_files(
    bucket: fs.FileSystem,
    layout: NSDLayout,
    subjects: Sequence[int],
    protocol: str,
    rois: Sequence[str] = ("nsdgeneral",),
    betas_format: str = "hdf5",
    with_timeseries: bool = False,
) -> list[Wanted]:
    """Every file that these subjects and this protocol need, with sizes.

    layout: where NSD goes; its beta_version and resolution choose the betas. betas_format: "hdf5" (quick to read, large) or
    "nii.gz". with_timeseries: also the BOLD runs and designs of the same sessions, for `jobs/estimate_betas.py`.
    FileNotFoundError names all that the bucket lacks.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    if f".{betas_format}" not in SESSION_SUFFIXES:
        raise ValueError(f"betas_format is {betas_format!r}; NSD has hdf5 and nii.gz")
    singles = [layout.expdesign, layout.stim_info, layout.stimuli]
    found, lacking = [], []
    for subject in subjects:
        singles += [layout.responses(subject), layout.betas_path(subject) / "ncsnr.nii.gz"]
        singles += [layout.roi(subject, name) for name in roi_files(rois)]
        sessions = _sessions(bucket, layout, subject, protocol, betas_format)
        found += sessions.values()
        if with_timeseries:
            found += _runs(bucket, layout, subject, list(sessions))
    keys = [str(path.relative_to(layout.root)) for path in singles]
    for key, info in zip(keys, bucket.get_file_info([f"{BUCKET}/{key}" for key in keys])):
        if info.type == fs.FileType.File:
            found.append(_wanted(key, info))
        else:
            lacking.append(key)
    if lacking:
        mend = "Are data.rois and data.beta_version NSD's names?"
        raise FileNotFoundError(f"the bucket {BUCKET} has no {', '.join(lacking)}. {mend}")
    return sorted(found, key=lambda file: file.key)


def roi_files(rois: Sequence[str]) -> list[str]:
    """Volumes that hold these regions, and the atlases that name every voxel."""
    atlases = [LABELS[part][0] for name in rois for part in UNIONS.get(name, (name,)) if part in LABELS]
    masks = [name for name in rois if name not in LABELS and name not in UNIONS]
    return list(dict.fromkeys([*masks, *atlases, *ATLASES]))


def _wanted(key: str, info: fs.FileInfo) -> Wanted:
    return Wanted(key, info.size, hashlib.sha256(f"{info.size} {info.mtime_ns}".encode()).hexdigest()[:8])


def _listing(bucket: fs.FileSystem, folder: str, pattern: str) -> Iterator[tuple[re.Match, Wanted]]:
    """Files right below a folder whose name is of this pattern."""
    for info in bucket.get_file_info(fs.FileSelector(f"{BUCKET}/{folder}", allow_not_found=True)):
        match = re.fullmatch(pattern, info.base_name)
        if match and info.type == fs.FileType.File:
            yield match, _wanted(f"{folder}/{info.base_name}", info)


def _sessions(bucket: fs.FileSystem, layout: NSDLayout, subject: int, protocol: str, betas_format: str) -> dict[int, Wanted]:
    folder = str(layout.betas_path(subject).relative_to(layout.root))
    pattern = rf"betas_session(\d\d)\.{re.escape(betas_format)}"
    there = {int(match[1]): file for match, file in _listing(bucket, folder, pattern)}
    numbers = range(1, (N_SESSIONS_NSD37 if protocol == "nsd37" else max(there, default=0)) + 1)
    if not there or (gap := sorted(set(numbers) - set(there))):
        lack = f"sessions {gap}" if there else "any session"
        raise FileNotFoundError(
            f"{BUCKET}/{folder} lacks {lack} as .{betas_format}, which protocol {protocol} needs of subject {subject}. Protocol "
            "nsd40 takes every session that a subject did"
        )
    return {number: there[number] for number in numbers}


def _runs(bucket: fs.FileSystem, layout: NSDLayout, subject: int, sessions: Sequence[int]) -> list[Wanted]:
    """BOLD runs of the experiment and their designs; runs of resting state are left out."""
    base = str(layout.timeseries_path(subject).relative_to(layout.root))
    kinds = {"timeseries": r"timeseries_session(\d\d)_run(\d\d)\.nii\.gz", "design": r"design_session(\d\d)_run(\d\d)\.tsv"}
    runs: dict[int, dict[int, list[Wanted]]] = {session: {} for session in sessions}
    for kind, pattern in kinds.items():
        for match, file in _listing(bucket, f"{base}/{kind}", pattern):
            if int(match[1]) in runs:
                runs[int(match[1])].setdefault(int(match[2]), []).append(file)
    if lacking := [session for session, own in runs.items() if not own or any(len(files) != 2 for files in own.values())]:
        raise FileNotFoundError(f"{BUCKET}/{base} lacks time series or designs of sessions {lacking}")
    rest = {session: {1, N_REST_RUNS} if len(own) == N_REST_RUNS else set() for session, own in runs.items()}
    return [file for session, own in runs.items() for run, files in own.items() if run not in rest[session] for file in files]


# ---- fetching


def is_whole(root: Path, file: Wanted) -> bool:
    """Whether the file is in its place with its size."""
    path = _place(root, file.key)
    return path.is_file() and path.stat().st_size == file.size


def _place(root: Path, key: str) -> Path:
    if key.startswith("/") or ".." in key.split("/"):
        raise ValueError(f"{key!r} would leave {root}")
    return root / key


def fetch(bucket: fs.FileSystem, files: Iterable[Wanted], root: Path, n_parallel: int = 8) -> None:
    """Fetch files that are not whole yet. Interrupted, the next call goes on from the parts."""
    todo = [file for file in files if not is_whole(root, file)]
    remaining = sum(file.size - _part(root, file).stat().st_size if _part(root, file).exists() else file.size for file in todo)
    require_space(root, remaining)
    stop = threading.Event()
    threads = ThreadPoolExecutor(max(1, n_parallel))
    with tqdm(total=remaining, desc=f"fetch {len(todo)} files", unit="B", unit_scale=True, disable=not todo) as progress:
        running = [threads.submit(_fetch_one, bucket, file, root, progress.update, stop) for file in todo]
        try:
            for done in as_completed(running):
                done.result()
        finally:
            stop.set()
            threads.shutdown(cancel_futures=True)


def require_space(root: Path, n_bytes: int) -> None:
    """OSError unless the disk has room for so many bytes."""
    free = shutil.disk_usage(root).free
    if free < n_bytes:
        raise OSError(f"{root} has {free / 1e9:.1f} GB free, but {n_bytes / 1e9:.1f} GB are to be fetched. Free some, or name "
                      "another --data.nsd-root")  # fmt: skip


def _part(root: Path, file: Wanted) -> Path:
    place = _place(root, file.key)
    return place.with_name(f"{place.name}.{file.version}.part")


def _fetch_one(bucket: fs.FileSystem, file: Wanted, root: Path, report: Callable[[int], object], stop: threading.Event) -> None:
    part, place = _part(root, file), _place(root, file.key)
    place.parent.mkdir(parents=True, exist_ok=True)
    for old in place.parent.glob(f"{place.name}.*.part"):  # of a file that has been replaced in the bucket since
        if old != part:
            old.unlink()
    try:
        with open(part, "ab") as target, bucket.open_input_file(f"{BUCKET}/{file.key}") as source:
            source.seek(target.tell())
            _copy(source.read, target, report, stop)
    except OSError as error:
        raise OSError(f"{file.key} could not be fetched ({error}). Start again: it goes on from what is there") from error
    if not stop.is_set():
        _finish(part, place, file.size)


def _copy(read: Callable[[int], bytes], target: BinaryIO, report: Callable[[int], object], stop: threading.Event) -> None:
    while not stop.is_set() and (data := read(CHUNK)):
        target.write(data)
        report(len(data))


def _finish(part: Path, place: Path, size: int) -> None:
    if part.stat().st_size != size:
        found = part.stat().st_size
        part.unlink()
        raise OSError(f"{place} came with {found} bytes, expected {size}. Start again")
    os.replace(part, place)


# ---- captions


def captions_missing(layout: NSDLayout) -> list[str]:
    """COCO splits whose captions are not there."""
    return [split for split in CAPTION_SPLITS if not layout.captions(split).is_file()]


def fetch_captions(layout: NSDLayout, url: str = CAPTIONS_URL, sha1: str | None = CAPTIONS_SHA1) -> None:
    """COCO's annotation archive, and of it the two caption files. sha1: what the archive must have; None: not checked."""
    splits = captions_missing(layout)
    if not splits:
        return
    folder = layout.captions(splits[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "annotations_trainval2017.zip"
    if not archive.is_file():
        _fetch_url(url, archive)
    if sha1 is not None:
        with open(archive, "rb") as stream:
            found = hashlib.file_digest(stream, "sha1").hexdigest()
        if found != sha1:
            archive.unlink()
            raise ValueError(f"{url} gave an archive with SHA-1 {found}, expected {sha1}; it was deleted. Start again")
    for split in splits:
        unpack(archive, f"annotations/captions_{split}.json", layout.captions(split))
    archive.unlink()


def _fetch_url(url: str, place: Path) -> None:
    part = place.with_name(f"{place.name}.part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            start = start if answer.status == 206 else 0
            if answer.headers["Content-Length"] is None:
                raise OSError("the server does not tell its size")
            size = start + int(answer.headers["Content-Length"])
            require_space(place.parent, size - start)
            with (
                open(part, "ab" if start else "wb") as target,
                tqdm(total=size, initial=start, desc="fetch captions", unit="B", unit_scale=True) as progress,
            ):
                _copy(answer.read, target, progress.update, threading.Event())
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is as long as the file, or longer
            part.unlink()
        what = f"HTTP {error.code} {error.reason}"
        raise OSError(f"{url} could not be fetched ({what}). Start again, or give --captions-url") from error
    except OSError as error:
        raise OSError(f"{url} could not be fetched ({error}). Start again: it goes on from what is there") from error
    if part.stat().st_size < size:
        raise OSError(f"{url} broke off after {part.stat().st_size} of {size} bytes. Start again: it goes on from there")
    _finish(part, place, size)


def unpack(archive: Path, member: str, place: Path) -> None:
    """One member of a zip archive to a place of our choice, whole or not at all; names in the archive choose nothing."""
    part = place.with_name(f"{place.name}.part")
    try:
        with zipfile.ZipFile(archive) as files:
            require_space(place.parent, files.getinfo(member).file_size)
            with files.open(member) as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive} is no whole COCO archive ({error}). Delete it and start again") from error
    os.replace(part, place)
