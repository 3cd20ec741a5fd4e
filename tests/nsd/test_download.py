"""Fetching NSD from a local S3 server that holds a miniature one; captions over HTTP from the same server."""
from __future__ import annotations

import filecmp
import io
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from nsdray.nsd import download
from nsdray.nsd.captions import load_captions
from nsdray.nsd.design import protocol_sessions
from nsdray.nsd.download import BUCKET, fetch, fetch_captions, is_whole, list_files, public_bucket, unpack
from nsdray.nsd.layout import NSDLayout
from nsdray.nsd.rois import load_voxels

RUNS = {1: 12, 2: 14, 3: 12}  # session 2 has two runs of resting state


@pytest.fixture(scope="module")
def source(tmp_path_factory, s3_server, mini):
    """The bucket: a miniature NSD, time series, and much that nobody asked for."""
    s3_server.fs.create_dir(BUCKET)
    for path in mini.root.rglob("*"):
        if path.is_file() and "annotations" not in path.parts:
            s3_server.write(f"{BUCKET}/{path.relative_to(mini.root)}", path.read_bytes())
    for session, n_runs in RUNS.items():
        for run in range(1, n_runs + 1):
            base, name = f"{BUCKET}/nsddata_timeseries/ppdata/subj01/func1pt8mm", f"session{session:02d}_run{run:02d}"
            s3_server.write(f"{base}/timeseries/timeseries_{name}.nii.gz", b"bold" * run)
            s3_server.write(f"{base}/design/design_{name}.tsv", b"0\n" * run)
    s3_server.write(f"{base}/timeseries/timeseries_prffloc_run01.nii.gz", b"no")
    folder = f"{BUCKET}/{mini.betas_path(1).relative_to(mini.root)}"
    s3_server.write(f"{folder}/meanbeta.nii.gz", b"no")
    s3_server.write(f"{BUCKET}/nsddata/ppdata/subj01/func1pt8mm/roi/streams.nii.gz", b"no")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for split in ("train2017", "val2017"):
            files.write(mini.captions(split), f"annotations/captions_{split}.json")
        files.writestr("annotations/instances_train2017.json", "[]")
        files.writestr("../escaped.json", "[]")
    s3_server.write(f"{BUCKET}/coco.zip", archive.getvalue())
    yield s3_server
    s3_server.fs.delete_dir(BUCKET)


@pytest.fixture
def bucket(source):
    return public_bucket(source.endpoint)


@pytest.fixture
def layout(tmp_path):
    return NSDLayout(tmp_path)


def test_lists_exactly_what_is_needed_and_fetches_it(bucket, layout, mini):
    files = list_files(bucket, layout, [1], "nsd40")
    keys = {file.key for file in files}
    expected = {mini.expdesign, mini.stim_info, mini.stimuli, mini.responses(1), mini.ncsnr(1)}
    expected |= set(mini.session_files(1).values()) | set(mini.roi_folder(1).glob("*.nii.gz"))
    assert keys == {str(path.relative_to(mini.root)) for path in expected}
    assert all(file.size == (mini.root / file.key).stat().st_size for file in files)
    fetch(bucket, files, layout.root)
    found = {str(path.relative_to(layout.root)) for path in layout.root.rglob("*") if path.is_file()}
    assert found == keys
    assert all(filecmp.cmp(layout.root / key, mini.root / key, shallow=False) for key in keys)
    assert protocol_sessions(layout, 1, "nsd40") == protocol_sessions(mini, 1, "nsd40")
    assert (load_voxels(layout, 1).index == load_voxels(mini, 1).index).all()


def test_only_the_regions_asked_for(bucket, layout):
    keys = {Path(file.key).name for file in list_files(bucket, layout, [1], "nsd40", ["V1", "FFA-1"]) if "/roi/" in file.key}
    assert keys == {f"{name}.nii.gz" for name in ("prf-visualrois", "floc-faces", "floc-places", "floc-bodies", "floc-words")}


def test_time_series_without_resting_state(bucket, layout):
    files = [file.key for file in list_files(bucket, layout, [1], "nsd40", with_timeseries=True) if "timeseries/" in file.key]
    assert len(files) == 2 * (12 + 12 + 12)
    assert not [key for key in files if "session02_run01" in key or "session02_run14" in key or "prffloc" in key]
    with pytest.raises(FileNotFoundError, match=r"subj05/func1pt8mm lacks time series or designs of sessions \[1, 2, 3\]"):
        list_files(bucket, layout, [5], "nsd40", with_timeseries=True)


def test_an_interrupted_download_goes_on(bucket, layout, mini, monkeypatch):
    """Cut after a chunk of one file; the rest comes without the bytes that are there."""
    monkeypatch.setattr(download, "CHUNK", 1000)
    file = next(file for file in list_files(bucket, layout, [1], "nsd40") if file.key.endswith("expdesign.mat"))
    part, place = download._part(layout.root, file), layout.root / file.key
    part.parent.mkdir(parents=True)
    part.write_bytes((mini.root / file.key).read_bytes()[:1500])
    came = []
    download._fetch_one(bucket, file, layout.root, came.append, threading.Event())
    assert sum(came) == file.size - 1500 and filecmp.cmp(place, mini.root / file.key, shallow=False) and not part.exists()


def test_a_stopped_thread_leaves_a_part_and_no_file(bucket, layout, monkeypatch):
    monkeypatch.setattr(download, "CHUNK", 1000)
    file = next(file for file in list_files(bucket, layout, [1], "nsd40") if file.key.endswith("expdesign.mat"))
    stop = threading.Event()
    download._fetch_one(bucket, file, layout.root, lambda n: stop.set(), stop)
    assert download._part(layout.root, file).stat().st_size == 1000 and not is_whole(layout.root, file)


def test_what_is_there_is_not_fetched_again_and_what_is_cut_is(bucket, layout, source):
    files = [file for file in list_files(bucket, layout, [1], "nsd40") if "experiments" in file.key]
    fetch(bucket, files, layout.root)
    whole, cut = (layout.root / file.key for file in files)
    before = whole.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:-7])
    fetch(bucket, files, layout.root)
    assert whole.stat().st_mtime_ns == before and cut.stat().st_size == files[1].size


def test_a_part_of_a_replaced_file_is_not_gone_on_from(bucket, layout, source):
    source.write(f"{BUCKET}/nsddata/old.bin", b"1" * 50)
    info = bucket.get_file_info([f"{BUCKET}/nsddata/old.bin"])[0]
    file = download._wanted("nsddata/old.bin", info)
    stale = layout.root / "nsddata/old.bin.12345678.part"
    stale.parent.mkdir()
    stale.write_bytes(b"2" * 20)
    fetch(bucket, [file], layout.root)
    assert (layout.root / file.key).read_bytes() == b"1" * 50 and not stale.exists()


def test_a_wrong_size_is_no_file(bucket, layout, source):
    source.write(f"{BUCKET}/nsddata/short.bin", b"1" * 50)
    file = download.Wanted("nsddata/short.bin", 60, "v")
    with pytest.raises(OSError, match=r"short\.bin came with 50 bytes, expected 60"):
        fetch(bucket, [file], layout.root)
    assert list(layout.root.rglob("*.*")) == []


def test_what_the_bucket_lacks_is_named(bucket, layout):
    with pytest.raises(FileNotFoundError, match=r"lacks sessions \[4, .*37\] as .hdf5, which protocol nsd37 needs of subject 1"):
        list_files(bucket, layout, [1], "nsd37")
    with pytest.raises(FileNotFoundError, match="lacks any session as .hdf5"):
        list_files(bucket, layout, [8], "nsd40")
    with pytest.raises(FileNotFoundError, match=r"has no nsddata/ppdata/subj01/func1pt8mm/roi/V9\.nii\.gz"):
        list_files(bucket, layout, [1], "nsd40", ["V9"])
    with pytest.raises(ValueError, match="betas_format is 'mat'"):
        list_files(bucket, layout, [1], "nsd40", betas_format="mat")


def test_a_full_disk_is_told_before_anything_is_fetched(bucket, layout, monkeypatch):
    files = list_files(bucket, layout, [1], "nsd40")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, sum(file.size for file in files) - 1))
    with pytest.raises(OSError, match=r"GB free, but .* GB are to be fetched"):
        fetch(bucket, files, layout.root)
    assert list(layout.root.iterdir()) == []


def test_no_key_leaves_the_root(bucket, layout):
    for key in ("../outside.bin", "/outside.bin"):
        with pytest.raises(ValueError, match="would leave"):
            fetch(bucket, [download.Wanted(key, 1, "v")], layout.root)


def test_captions(source, layout, mini):
    url = f"{source.endpoint}/{BUCKET}/coco.zip"
    fetch_captions(layout, url, sha1=None)
    shutil.copytree(mini.stim_info.parent, layout.stim_info.parent)
    assert load_captions(layout, [0, 3]) == load_captions(mini, [0, 3])
    annotations = layout.captions("train2017").parent
    assert sorted(path.name for path in annotations.iterdir()) == ["captions_train2017.json", "captions_val2017.json"]
    assert not list(layout.root.rglob("escaped*")) and not (layout.root.parent / "escaped.json").exists()


def test_captions_go_on_and_are_checked(source, layout):
    url = f"{source.endpoint}/{BUCKET}/coco.zip"
    data = source.fs.open_input_file(f"{BUCKET}/coco.zip").read()
    place = layout.root / "x.zip"
    Path(f"{place}.part").write_bytes(data[:100] + b"?" * 10)  # to see that these bytes are not asked for again
    download._fetch_url(url, place)
    assert place.read_bytes() == data[:100] + b"?" * 10 + data[110:]
    with pytest.raises(ValueError, match="gave an archive with SHA-1 .* it was deleted"):
        fetch_captions(layout, url, sha1="0" * 40)
    assert not list(layout.root.rglob("*2017.zip"))
    with pytest.raises(OSError, match="HTTP 404"):
        download._fetch_url(f"{source.endpoint}/{BUCKET}/none.zip", layout.root / "none.zip")


def test_a_zip_that_is_none_or_lacks_a_member(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK but no zip")
    with pytest.raises(ValueError, match="is no whole COCO archive"):
        unpack(tmp_path / "a.zip", "annotations/captions_val2017.json", tmp_path / "out.json")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as files:
        files.writestr("other.json", "[]")
    with pytest.raises(ValueError, match="no item named"):
        unpack(tmp_path / "b.zip", "annotations/captions_val2017.json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_the_job_as_users_call_it(source, layout, mini):
    command = [sys.executable, "jobs/download_nsd.py", "--data.nsd-root", str(layout.root), "--data.subjects", "5",
               "--endpoint", source.endpoint, "--captions-url", f"{source.endpoint}/{BUCKET}/coco.zip"]  # fmt: skip

    def call(*more: str) -> tuple[int, str]:
        ended = subprocess.run([*command, *more], cwd=Path(__file__).parents[2], text=True, stdin=subprocess.DEVNULL,
                               capture_output=True, timeout=120)  # fmt: skip
        return ended.returncode, ended.stdout + ended.stderr

    code, output = call()
    assert code == 1 and "NSD Data Access Agreement" in output and "say --i-agree if you have" in output
    assert "3 files  nsddata_betas/ppdata/subj05" not in output and "GB" in output and list(layout.root.iterdir()) == []
    code, output = call("--i-agree")
    assert code == 0 and protocol_sessions(layout, 5, "nsd40") == [1, 2, 3] and load_captions(layout, [0]), output
    code, output = call()
    assert code == 0 and "to be fetched: 0.000 GB in 0 files" in output and "Agreement" not in output
