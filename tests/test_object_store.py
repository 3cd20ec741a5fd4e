"""The store on an S3-compatible server: the same promises as on a disk."""
from __future__ import annotations

import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest

from nsdray.store import Store, local_folder, redacted, table, view_column

WANTED = {"a.parquet": {"file": 1}, "b.parquet": {"file": 2}}
ROWS = table({"x": np.arange(300), "z": np.arange(1200, dtype=np.int16).reshape(300, 2, 2)})


@pytest.fixture
def stage(s3):
    stage = Store("s3://lab/nsdray").stage("samples", {"a": 1})  # the endpoint comes from AWS_ENDPOINT_URL
    stage.claim()
    return stage


def test_claim_write_finish_and_go_on(stage):
    assert not stage.store.is_local and stage.missing("subject=01/train", WANTED) == ["a.parquet", "b.parquet"]
    assert stage.begin("subject=01/train", WANTED) == ["a.parquet", "b.parquet"]
    stage.write("subject=01/train", "a.parquet", ROWS, {"file": 1})
    assert stage.begin("subject=01/train", WANTED) == ["b.parquet"]  # killed half-way: goes on from there
    stage.write("subject=01/train", "b.parquet", ROWS, {"file": 2})
    stage.finish("subject=01/train", WANTED)
    assert stage.missing("subject=01/train", WANTED) == []
    assert stage.missing("subject=01/train", WANTED | {"a.parquet": {"file": 9}}) == ["a.parquet"]
    data = stage.read("subject=01/train", "b.parquet", ["z"], [1])
    np.testing.assert_array_equal(view_column(data, "z"), np.arange(1200).reshape(300, 2, 2)[64:128])


def test_what_is_deleted_or_cut_short_is_made_again(stage, s3):
    for shard, inputs in WANTED.items():
        stage.write("p", shard, ROWS, inputs)
    stage.finish("p", WANTED)
    stage.store.delete(f"{stage.folder}/p/b.parquet")
    stage.store.delete(f"{stage.folder}/p/b.parquet")  # twice is no error
    assert stage.missing("p", WANTED) == ["b.parquet"]
    with pytest.raises(FileNotFoundError, match=r"b\.parquet is not there"):
        stage.read("p", "b.parquet")
    path = f"lab/nsdray/{stage.folder}/p/a.parquet"
    whole = s3.fs.open_input_file(path).read()
    s3.write(path, whole[:200])
    assert stage.missing("p", WANTED) == ["a.parquet", "b.parquet"]
    with pytest.raises(ValueError, match=r"a\.parquet is damaged"):
        stage.read("p", "a.parquet")
    assert stage.begin("p", WANTED) == ["a.parquet", "b.parquet"] and "_SUCCESS" not in stage.store.sizes(f"{stage.folder}/p")


def test_a_failed_write_leaves_nothing(stage, monkeypatch):
    def broken(_table, stream, **_):
        stream.write(b"half a shard")
        raise OSError("the network is gone")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError, match="the network is gone"):
        stage.write("p", "a.parquet", ROWS, {})
    assert stage.store.sizes(f"{stage.folder}/p") == {}


def test_another_configuration_is_refused(stage):
    stage.store.write_bytes(f"{stage.folder}/config.json", json.dumps({"a": 2}).encode())
    with pytest.raises(ValueError, match=r"s3://lab/nsdray/samples-.* was made by another configuration"):
        stage.claim()


def test_a_large_object_comes_back_whole(stage):
    data = np.random.default_rng(0).bytes(24 << 20)  # more than one part of an upload
    stage.store.write_bytes("big/file", data)
    assert stage.store.sizes("big") == {"file": len(data)} and stage.store.read_bytes("big/file") == data


def test_plain_files_as_a_local_folder(stage):
    stage.store.write_bytes(f"{stage.folder}/p/decoder.json", b"{}")
    with local_folder(stage, "p") as folder:
        assert [file.name for file in folder.iterdir()] == ["decoder.json"] and (folder / "decoder.json").read_bytes() == b"{}"
    assert not folder.exists()


def test_another_process_reaches_the_same_place(stage):
    stage.write("p", "a.parquet", ROWS, {"file": 1})
    there = pickle.loads(pickle.dumps(stage))  # as Ray sends it
    assert there.missing("p", WANTED) == ["b.parquet"] and there.uri("p") == stage.uri("p")


def test_credentials_in_the_address_are_used_and_never_shown(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    store = Store(s3.uri("lab/x", user="AKIAKEY:s3cr%2Fet@"))
    stage = store.stage("samples", {})
    stage.write("p", "a.parquet", ROWS, {})
    assert store.sizes(f"{stage.folder}/p").keys() == {"a.parquet"}
    with pytest.raises(FileNotFoundError) as caught:
        stage.read("p", "z.parquet")
    for text in (store.root, store.uri("a"), stage.uri("p"), str(caught.value)):
        assert "AKIAKEY" not in text and "s3cr" not in text and "lab/x" in text


def test_an_address_that_is_none_is_told_without_its_secrets():
    with pytest.raises(ValueError, match=r"s3://\*\*\*@lab/x\?nonsense=1 cannot be used as a root") as caught:
        Store("s3://AKIAKEY:secret@lab/x?nonsense=1")
    assert "AKIAKEY" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:a/b+c@lab/x?region=eu", "s3://***@lab/x?region=eu"),
        ("https://user:pass@host:5000/a and https://token@host/b", "https://***@host:5000/a and https://***@host/b"),
        ("gs://lab/x?access_token=abc&retry=1", "gs://lab/x?access_token=***&retry=1"),
        ("https://lab.org/x?X-Amz-Signature=12ab&X-Amz-Credential=k", "https://lab.org/x?X-Amz-Signature=***&X-Amz-Credential=***"),
        ("https://x.blob.core.windows.net/c?sv=2024&sig=a%2Fb%3D&sp=r", "https://x.blob.core.windows.net/c?sv=2024&sig=***&sp=r"),
        ("https://lab.org/x?design=2&sigma=1", "https://lab.org/x?design=2&sigma=1"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("/data/nsd (0.35, 'a@b') http://127.0.0.1:5000", "/data/nsd (0.35, 'a@b') http://127.0.0.1:5000"),
    ],
)
def test_redacted(text, shown):
    assert redacted(text) == shown
