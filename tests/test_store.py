"""The store: cells, atomic shards, what counts as finished, and what users do to files."""
from __future__ import annotations

import errno
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load

from nsdray.store import Store, local_folder, resolve_root, table, view_column


@pytest.fixture
def stage(tmp_path):
    stage = Store(str(tmp_path)).stage("samples", {"a": 1})
    stage.claim()
    return stage


@pytest.mark.parametrize("dtype", [np.int16, np.float16, np.float32])
def test_arrays_come_back_as_they_were(stage, dtype):
    array = (np.random.default_rng(0).standard_normal((200, 16, 4, 4)) * 100).astype(dtype)
    ids = np.arange(200, dtype=np.int32)
    stage.write("subject=01", "part.parquet", table({"image_id": ids, "z": array}), {})
    data = stage.read("subject=01", "part.parquet")
    np.testing.assert_array_equal(view_column(data, "z"), array)
    np.testing.assert_array_equal(view_column(data, "image_id"), ids)
    groups = stage.read("subject=01", "part.parquet", ["z"], [1, 3])  # of 64 rows
    np.testing.assert_array_equal(view_column(groups, "z"), array[[*range(64, 128), *range(192, 200)]])


def test_tensors_are_safetensors(stage):
    random = np.random.default_rng(0)
    arrays = {"a": random.standard_normal((3, 5)).astype(np.float16)[:, ::2], "b": random.standard_normal((7, 2)),
              "c": np.ones(3, np.float32)}  # fmt: skip
    stage.store.write_tensors("x.safetensors", arrays)
    found = load(stage.store.read_bytes("x.safetensors"))
    assert found.keys() == arrays.keys() and all(found[name].dtype == arrays[name].dtype for name in arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_views_do_not_copy(stage):
    data = table({"z": np.ones((8, 3), np.float32)})
    assert not view_column(data, "z").flags.owndata


def test_missing_follows_files_inputs_and_sizes(stage):
    wanted = {"a.parquet": {"file": 1}, "b.parquet": {"file": 2}}
    rows = table({"x": np.arange(3)})
    assert stage.missing("p", wanted) == ["a.parquet", "b.parquet"]
    stage.write("p", "a.parquet", rows, {"file": 1})
    assert stage.missing("p", wanted) == ["b.parquet"]  # killed half-way: goes on from there
    stage.write("p", "b.parquet", rows, {"file": 2})
    stage.finish("p", wanted)
    assert stage.missing("p", wanted) == []
    assert stage.missing("p", wanted | {"a.parquet": {"file": 9}}) == ["a.parquet"]  # its input has changed
    path = f"{stage.store.base}/{stage.folder}/p/b.parquet"
    with open(path, "r+b") as file:
        file.truncate(100)
    assert stage.missing("p", wanted) == ["b.parquet"]  # cut short


def test_a_partition_that_is_redone_no_longer_counts_as_finished(stage):
    """Inputs A, finished; then B, killed half-way; then A again: B's shard must not pass for A's."""
    rows = table({"x": np.arange(3)})
    a, b = ({f"{name}.parquet": {"copy": copy} for name in "xy"} for copy in "AB")
    for shard in a:
        stage.write("p", shard, rows, a[shard])
    stage.finish("p", a)
    assert stage.begin("p", b) == list(b)
    stage.write("p", "x.parquet", rows, b["x.parquet"])
    assert stage.begin("p", b) == ["y.parquet"] and stage.begin("p", a) == ["x.parquet"]


def test_flipped_bit_is_noticed(stage):
    stage.write("p", "a.parquet", table({"x": np.arange(1000)}), {})
    path = f"{stage.store.base}/{stage.folder}/p/a.parquet"
    with open(path, "r+b") as file:
        file.seek(2000)
        byte = file.read(1)[0]
        file.seek(2000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=r"a\.parquet is damaged"):
        stage.read("p", "a.parquet")


def test_leftovers_of_killed_writers_are_no_shards(stage):
    stage.store.write_bytes(f"{stage.folder}/p/a.parquet.123.partial", b"")
    assert stage.store.sizes(f"{stage.folder}/p") == {}
    stage.store.sweep(f"{stage.folder}/p", seconds=-1)
    assert stage.store._files(f"{stage.folder}/p") == []


def test_addresses():
    store = Store("s3://bucket/x?endpoint_override=http%3A%2F%2Flocalhost%3A9&region=x")
    assert store.uri("a/b").startswith("s3://bucket/x/a/b?endpoint_override=")


def test_damaged_shard_is_named(stage):
    stage.write("p", "a.parquet", table({"x": np.arange(3)}), {})
    path = f"{stage.store.base}/{stage.folder}/p/a.parquet"
    with open(path, "r+b") as file:
        file.truncate(50)
    with pytest.raises(ValueError, match=r"a\.parquet is damaged .* Delete it and run the job again"):
        stage.read("p", "a.parquet")
    assert stage.missing("p", {"a.parquet": {}}) == ["a.parquet"]
    with pytest.raises(FileNotFoundError, match=r"z\.parquet is not there"):
        stage.read("p", "z.parquet")


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), OSError("AWS Error NETWORK_CONNECTION during GetObject operation")]
)
def test_a_disk_or_network_in_trouble_damages_nothing(stage, monkeypatch, error):
    """A finished shard must not be made again, nor its deletion advised, because it cannot be read for a while."""
    stage.write("p", "a.parquet", table({"x": np.arange(3)}), {})

    def trouble(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pq, "ParquetFile", trouble)
        for look in (lambda: stage.missing("p", {"a.parquet": {}}), lambda: stage.read("p", "a.parquet")):
            with pytest.raises(OSError, match=r"a\.parquet cannot be read now .* nothing that is finished is lost"):
                look()
    assert stage.missing("p", {"a.parquet": {}}) == []


def test_failed_write_leaves_nothing(stage, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="no space left while writing .*a.parquet.* finished shards are kept"):
        stage.write("p", "a.parquet", table({"x": np.arange(3)}), {})
    assert stage.store.sizes(f"{stage.folder}/p") == {}


def test_other_configuration_in_the_folder_is_refused(stage):
    stage.store.write_bytes(f"{stage.folder}/config.json", json.dumps({"a": 2}).encode())
    with pytest.raises(ValueError, match=r"made by another configuration \(its config.json differs in a\)"):
        stage.claim()


def test_folder_depends_on_configuration_only(tmp_path):
    store = Store(str(tmp_path))
    assert store.stage("x", {"a": 1, "b": 2}).folder == store.stage("x", {"b": 2, "a": 1}).folder
    assert store.stage("x", {"a": 1}).folder != store.stage("x", {"a": 2}).folder


def test_root(monkeypatch, tmp_path):
    monkeypatch.setenv("NSDRAY_ROOT", str(tmp_path))
    assert resolve_root(None) == str(tmp_path.resolve())
    assert resolve_root("s3://bucket/x") == "s3://bucket/x"
    monkeypatch.delenv("NSDRAY_ROOT")
    assert resolve_root(None).endswith("/nsdray-data")


def test_local_folder_is_the_folder_itself(stage):
    stage.store.write_bytes(f"{stage.folder}/p/file.json", b"{}")
    with local_folder(stage, "p") as folder:
        assert (folder / "file.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["../out.parquet", "a/../../out.parquet", "/etc/passwd", "subject=01/.."])
def test_no_name_leads_out_of_the_root(stage, tmp_path, name):
    rows = table({"x": np.arange(3)})
    partition, _, shard = name.rpartition("/")
    store = stage.store
    for attempt in (lambda: store.write_bytes(name, b""), lambda: store.read_bytes(name), lambda: store.sizes(name),
                    lambda: store.delete(name)):  # fmt: skip
        with pytest.raises(ValueError, match="is no name below"):
            attempt()
    if not name.startswith("/"):
        with pytest.raises(ValueError, match="is no name below"):
            stage.write(partition, shard, rows, {})
        with pytest.raises(ValueError, match="is no name below"):
            stage.read(partition, shard)
    with pytest.raises(ValueError, match="is no name below"):
        store.stage("reports/../../elsewhere", {}).claim()
    assert not (tmp_path.parent / "out.parquet").exists()
