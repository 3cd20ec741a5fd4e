"""Data sets on an S3-compatible server, written by Ray tasks; credentials in the address reach no log."""
from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from pyarrow import fs

from nsdray.cluster import results, run
from nsdray.cluster.tracking import Tracker, artifacts_location, settle, start_tracker
from nsdray.config import Config, DataConfig, StoreConfig, TargetsConfig
from nsdray.nsd.simulate import simulate_nsd
from nsdray.stages import Plan
from nsdray.store import Store


@pytest.fixture(scope="module")
def nsd(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("nsd") / "nsd"
    return str(simulate_nsd(folder, subjects=(1,), n_train=96, n_test=12, n_sessions=3, progress=False).root)


@pytest.fixture
def config(nsd, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return Config(n_layers=3, targets=TargetsConfig(n_layers=3), store=StoreConfig(str(tmp_path / "disk")),
                  data=DataConfig(nsd_root=nsd, subjects=(1,), rows_per_part=64))  # fmt: skip


def shards(plan):
    subject = plan.subjects[0]
    yield from ((plan.betas, subject.folder, name) for name in subject.betas_wanted)
    yield from ((plan.samples, subject.samples(s), part.name) for s in ("train", "test") for part in subject.parts(s))


def test_betas_and_samples_are_the_same_on_s3_as_on_a_disk(cluster, config, s3, tmp_path):
    local = Plan(config)
    remote = Plan(replace(config, store=StoreConfig(s3.uri("lab/nsdray", user="AKIAKEY:s3cretpart@"))))
    for plan in (local, remote):
        run.start_ray(plan)
        run.prepare_betas(plan)
        assert not run.anything_missing(run.betas_partitions(plan) + run.samples_partitions(plan))
    for (a, *where), (b, *there) in zip(shards(local), shards(remote)):
        assert where == there and a.read(*where).equals(b.read(*there))
    stage, partition, shard = next(shards(remote))
    remote.store.delete(f"{stage.folder}/{partition}/{shard}")
    assert stage.missing(partition, remote.subjects[0].betas_wanted) == [shard]
    run.prepare_betas(Plan(remote.config))
    assert not run.anything_missing(run.betas_partitions(remote) + run.samples_partitions(remote))

    tracker = start_tracker(remote.store)
    results.start_runs(remote, tracker)
    tracker.close.remote("FINISHED")
    settle(remote.store, tracker)
    database = tmp_path / "mlflow.db"
    client = MlflowClient(f"sqlite:///{database}")
    runs = client.search_runs([client.get_experiment_by_name("nsdray").experiment_id])
    assert any(r.data.params.get("store.root", "").startswith("s3://***@lab/nsdray") for r in runs)
    assert b"s3cretpart" not in database.read_bytes() and b"AKIAKEY" not in database.read_bytes()


def contents(store: Store) -> dict[str, object]:
    """Tables and weights of every data set, by their names without hashes, which depend on where raw NSD is."""
    found, readers = {}, {"parquet": lambda data: pq.read_table(BytesIO(data)).replace_schema_metadata(), "safetensors": bytes}
    for info in store.fs.get_file_info(fs.FileSelector(store.base, recursive=True)):
        name = info.path.removeprefix(store.base).lstrip("/")
        if info.extension in readers and not name.startswith(("miniature", "training", "mlartifacts")):
            found[re.sub(r"-[0-9a-f]{10}(?=/)", "", name)] = readers[info.extension](store.read_bytes(name))
    return found


@pytest.mark.slow
def test_a_whole_run_is_the_same_on_s3_as_on_a_disk(finished, s3, tmp_path, monkeypatch):
    """Every data set: betas to scores and the report's files, checkpoints of Ray Train between."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    data = replace(finished.config.data, nsd_root=str(finished.layout.root))
    store = StoreConfig(s3.uri("lab/nsdray", user="AKIAKEY:s3cretpart@"))
    remote, started = Plan(replace(finished.config, data=data, store=store)), time.monotonic()
    results.train_all_subjects(remote)
    seconds, ours, theirs = time.monotonic() - started, contents(remote.store), contents(finished.store)
    assert ours.keys() == theirs.keys() and [name for name in ours if ours[name] != theirs[name]] == []
    kinds = Counter(re.split("[-/]", name)[0] for name in ours)
    assert kinds.keys() == {"betas", "samples", "targets", "models", "predictions", "reconstructions", "features", "metrics"}
    print(f"\n{seconds:.0f} s on s3://; files with equal values: {dict(kinds)}")
    assert remote.store.sizes(f"{remote.report.folder}/{remote.report_partition}").keys() >= {"report.html", "_SUCCESS"}
    monkeypatch.setattr(results.run, "prepare_betas", lambda _: pytest.fail("it was not up to date"))
    results.train_all_subjects(Plan(remote.config))


def test_secrets_are_not_logged(tmp_path):
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", None)
    secret = "s3://AKIAKEY:s3cretpart@lab/x"
    tracker.start("key", "name", {"store.root": secret, "data.nsd_root": "/data/nsd", "url": "https://h/x?token=s3cretpart"}, {})
    tracker.log_result("key", {"mse": 1.0}, {"decoder": f"{secret}/decoder"}, {})
    tracker.connect()
    while tracker.state().unsent:
        time.sleep(0.01)
    assert tracker.state().refused == []
    run = tracker.client.get_run(tracker.runs["key"])
    assert run.data.params == {"store.root": "s3://***@lab/x", "data.nsd_root": "/data/nsd", "url": "https://h/x?token=***"}
    assert run.data.tags["decoder"] == "s3://***@lab/x/decoder"
    assert b"s3cretpart" not in (tmp_path / "mlflow.db").read_bytes()


def test_where_artifacts_go(s3, tmp_path, monkeypatch):
    local, remote = Store(str(tmp_path)), Store(s3.uri("lab/x"))
    assert artifacts_location(local) == (tmp_path / "mlartifacts").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert artifacts_location(local) is None and artifacts_location(remote) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/db/mlflow.db")
    assert artifacts_location(remote) == Path(tmp_path, "db", "mlartifacts").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:s3cretpart@host/mlflow")
    assert artifacts_location(remote) == "s3://lab/x/mlartifacts"
    assert results.mlflow_inputs(remote)["mlflow"] == "postgresql://***@host/mlflow"
