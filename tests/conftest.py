"""What tests of several folders need: a lab's data set in BIDS, and an S3-compatible server."""
from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pyarrow import fs

from nsdray.nsd.captions import load_captions
from nsdray.nsd.layout import NSDLayout
from nsdray.nsd.simulate import simulate_nsd
from nsdray.nsd.stimuli import Stimuli
from nsdray.nsd.timeseries import nsd_sessions

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # before Ray is imported: it listens on loopback only


def write_bids(folder: Path, layout: NSDLayout, subjects: Sequence[int]) -> Path:
    """sub-01 and so on, with stimuli/, captions.json, masks/ and test_images.txt (NSD's shared images)."""
    root = folder / "bids"
    (root / "stimuli/scenes").mkdir(parents=True)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "a lab's data", "BIDSVersion": "1.9.0"}))
    (root / "task-look_bold.json").write_text(json.dumps({"RepetitionTime": 4 / 3, "TaskName": "look"}))
    (root / "masks").mkdir()
    shown = set()
    for subject in subjects:
        roi = nib.load(layout.roi(subject, "nsdgeneral"))
        mask = nib.Nifti1Image((np.asarray(roi.dataobj) > 0).astype(np.uint8), roi.affine)
        nib.save(mask, root / f"masks/sub-{subject:02d}.nii.gz")
        for session in nsd_sessions(layout, subject):
            func = root / f"sub-{subject:02d}/ses-{session.session}/func"
            func.mkdir(parents=True)
            for number, run in enumerate(session.runs, 1):
                stem = f"sub-{subject:02d}_ses-{session.session}_task-look_run-{number}"
                shutil.copy(run.path, func / f"{stem}_bold.nii.gz")
                events = zip(run.events.onset, run.events.condition)
                rows = [f"{onset:.4f}\t3.0\tpicture\tscenes/{image_id:04d}.png" for onset, image_id in events]
                rows.insert(1, "9.5\tn/a\tbutton\tn/a")
                (func / f"{stem}_events.tsv").write_text("\n".join(["onset\tduration\ttrial_type\tstim_file", *rows]) + "\n")
                shown |= set(run.events.condition)
    ids = sorted(shown)
    with Stimuli(layout.stimuli) as stimuli:
        for image_id, picture in zip(ids, stimuli.read(ids)):
            Image.fromarray(picture).save(root / f"stimuli/scenes/{image_id:04d}.png")
    captions = {f"scenes/{image_id:04d}.png": texts for image_id, texts in zip(ids, load_captions(layout, ids))}
    (root / "captions.json").write_text(json.dumps(captions))
    with open(layout.stim_info) as file:
        test = {i for i, line in enumerate(file.readlines()[1:]) if line.split(",")[4] == "True"} & shown
    (root / "test_images.txt").write_text("\n".join(f"scenes/{image_id:04d}.png" for image_id in sorted(test)) + "\n")
    return root


@pytest.fixture(scope="session")
def scan_sizes() -> dict:
    """Parameters of a small miniature NSD with enough repeats for types C and D."""
    return dict(n_train=96, n_test=12, n_sessions=3, picture_size=64, volume=(12, 12, 10), progress=False)


@pytest.fixture(scope="session")
def scanned(scan_sizes, tmp_path_factory) -> NSDLayout:
    """A miniature NSD with BOLD, subjects 1 and 2. Shared: do not write to it."""
    return simulate_nsd(tmp_path_factory.mktemp("scanned") / "nsd", subjects=(1, 2), **scan_sizes, with_bold=True)


@pytest.fixture(scope="session")
def bids_whole(scanned, tmp_path_factory) -> Path:
    """Both subjects in BIDS. Shared: do not write to it."""
    return write_bids(tmp_path_factory.mktemp("lab"), scanned, (1, 2))


@pytest.fixture
def bids(bids_whole, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(bids_whole, tmp_path / "bids"))


class LocalS3:
    """A server on loopback, and how to reach it."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.fs = fs.S3FileSystem(access_key="key", secret_key="secret", endpoint_override=endpoint, region="us-east-1",
                                  allow_bucket_creation=True, allow_bucket_deletion=True)  # fmt: skip

    def uri(self, path: str, user: str = "") -> str:
        """Address with the endpoint in it."""
        return f"s3://{user}{path}?region=us-east-1&endpoint_override={quote(self.endpoint, safe='')}"

    def write(self, path: str, data: bytes) -> None:
        with self.fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    from moto.server import ThreadedMotoServer  # most tests do without

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield LocalS3(f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def s3(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalS3]:
    """The server with an empty bucket "lab", and the environment that leads to it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3_server.fs.create_dir("lab")
    yield s3_server
    s3_server.fs.delete_dir("lab")
