"""Fetch NSD: exactly what some subjects and a protocol need, listed with sizes first; and COCO's captions.

    python jobs/download_nsd.py --data.nsd-root /data/nsd --data.subjects 1 2 5 7 --data.protocol nsd37
    python jobs/download_nsd.py --data.nsd-root /data/nsd --data.subjects 1 --list-only   # sizes
    python jobs/download_nsd.py --data.nsd-root /data/nsd --i-agree                       # in scripts: no question is asked

Without credentials, in parallel. Interrupted, the same command goes on; what is there is not fetched again.
"""
from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from cli import main

from nsdray.config import DataConfig
from nsdray.nsd.download import (
    CAPTIONS_SHA1,
    CAPTIONS_URL,
    TERMS,
    Wanted,
    captions_missing,
    fetch,
    fetch_captions,
    is_whole,
    list_files,
    public_bucket,
)
from nsdray.nsd.layout import NSDLayout


@dataclass(frozen=True)
class Arguments:
    """What to fetch, and how."""

    data: DataConfig = field(default_factory=DataConfig)
    betas_format: Literal["hdf5", "nii.gz"] = "hdf5"
    """hdf5: voxels are read quickly, about 1 GB a session. nii.gz: smaller, decompressed as a whole."""
    with_timeseries: bool = False
    """Also the BOLD runs and designs of these sessions, from which jobs/estimate_betas.py makes betas."""
    captions: bool = True
    """COCO's captions, the targets of stage 2's text tokens."""
    captions_url: str = CAPTIONS_URL
    """COCO's annotations_trainval2017.zip. Another address is taken at its word: its checksum is not known."""
    list_only: bool = False
    """List files and sizes, and stop."""
    i_agree: bool = False
    """You have agreed to NSD's terms of data use, so the question need not be asked."""
    n_parallel: int = 8
    """Files at a time."""
    endpoint: str | None = None
    """S3-compatible server that has the bucket. None: AWS."""


def run() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    data = arguments.data
    if data.nsd_root is None:
        raise ValueError("where to? Say --data.nsd-root FOLDER")
    root = Path(data.nsd_root).expanduser().resolve()
    root.mkdir(parents=True, exist_ok=True)
    layout, bucket = NSDLayout(root, beta_version=data.beta_version), public_bucket(arguments.endpoint)
    files = list_files(bucket, layout, data.subjects, data.protocol, data.rois, arguments.betas_format, arguments.with_timeseries)
    todo = [file for file in files if not is_whole(root, file)]
    captions = arguments.captions and bool(captions_missing(layout))
    print(listing(files, todo, captions, arguments.captions_url))
    if arguments.list_only or not (todo or captions):
        return
    agree(arguments.i_agree)
    fetch(bucket, files, root, arguments.n_parallel)
    if captions:
        fetch_captions(layout, arguments.captions_url, CAPTIONS_SHA1 if arguments.captions_url == CAPTIONS_URL else None)
    print(f"NSD is at {root}: python jobs/preflight.py gru-15 --data.nsd-root {root} says what else is needed.")


def listing(files: list[Wanted], todo: list[Wanted], captions: bool, url: str) -> str:
    """Sizes by folder, what is there and what is to be fetched."""
    folders: dict[str, list[Wanted]] = defaultdict(list)
    for file in files:
        folders[file.key.rpartition("/")[0]].append(file)

    def size(some: list[Wanted]) -> float:
        return sum(file.size for file in some) / 1e9

    lines = [f"{size(own):10.3f} GB  {len(own):4d} files  {folder}" for folder, own in sorted(folders.items())]
    lines.append(f"{size(files):10.3f} GB  {len(files):4d} files in all; to be fetched: {size(todo):.3f} GB in {len(todo)} files")
    if captions:
        lines.append(f"and COCO's captions, from {url} (0.25 GB)")
    return "\n".join(lines)


def agree(agreed: bool) -> None:
    """Go on only if NSD's terms are agreed to."""
    print(TERMS)
    if agreed:
        return
    if not sys.stdin.isatty():
        raise ValueError("nobody is there to ask whether you have agreed to NSD's terms: say --i-agree if you have")
    if input("Have you agreed to them? Type yes: ").strip().lower() != "yes":
        raise ValueError("nothing was fetched")


if __name__ == "__main__":
    main(run)
