"""What is taken away in the middle of a run on three Ray nodes: the driver, a training worker, a replica, nodes, the MLflow
server, the disk.

Each test begins with a copy of one undisturbed run from which some stages are removed; in the end the files must be the same
to the byte, and those that were finished before must not have been touched. Times and counts are printed (pytest -s).
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from nsdray.cluster import tracking
from nsdray.cluster.results import train_all_subjects, untracked
from nsdray.config import (
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    GRUConfig,
    RidgeConfig,
    SimulationConfig,
    Stage2Config,
    StoreConfig,
    TargetsConfig,
)
from nsdray.stages import Fit, Plan

CHECKOUT = Path(__file__).parent.parent.parent
N_EPOCHS = 30
NODE = {"num_cpus": 1, "object_store_memory": 256 << 20}


class Nodes:
    """A head and two more nodes of one CPU each."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        self.others = [self.cluster.add_node(**NODE) for _ in range(2)]
        ray.init(address=self.cluster.address, log_to_driver=False)

    def working(self, names: str, node=None) -> list[psutil.Process]:
        """Workers of a node, or of all, that are at a task or actor whose name matches."""
        nodes = [self.cluster.head_node, *self.others] if node is None else [node]
        raylets = [psutil.Process(own.process.pid) for each in nodes for own in each.all_processes["raylet"]]
        workers = [worker for raylet in raylets for worker in raylet.children()]
        return [worker for worker in workers if re.match(f"ray::({names})", title_of(worker))]

    def busy(self, names: str):
        """One of the other nodes that is at such work, or None."""
        return next((node for node in self.others if self.working(names, node)), None)

    def kill(self, names: str) -> int:
        """SIGKILL to all such workers; how many there were."""
        n = 0
        for worker in self.working(names):
            with suppress(psutil.NoSuchProcess):
                worker.kill()
                n += 1
        return n

    def remove(self, node) -> None:
        """SIGKILL to the node's raylet, whose workers end with it."""
        self.others.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def complete(self) -> None:
        """Put back what was removed."""
        while len(self.others) < 2:
            self.others.append(self.cluster.add_node(**NODE))


def title_of(process: psutil.Process) -> str:
    """What a worker is at, such as "ray::Replica.extract_vdvae"; empty if it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    ray.shutdown()  # of the session's other cluster: this file comes last of those that use it
    found = Nodes()
    yield found
    ray.shutdown()
    found.cluster.shutdown()


@pytest.fixture(autouse=True)
def all_nodes(nodes) -> None:
    nodes.complete()


class Server:
    """A real `mlflow server` on loopback, with a database of its own."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                   "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
                   "--artifacts-destination", str(self.folder / "artifacts")]  # fmt: skip
        with open(self.folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                                            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})  # fmt: skip
        until(self.answers, 120, f"an answer of {self.uri}; {self.folder}/log.txt")

    def answers(self) -> bool:
        try:
            return urlopen(f"{self.uri}/health", timeout=5).status == 200
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def until(condition: Callable[[], bool], seconds: float, what: str, running: Future | None = None) -> float:
    """Wait for a condition, while a job is running if one is given; the seconds it took."""
    started = time.monotonic()
    while not condition():
        if running is not None and running.done():
            running.result()
            pytest.fail(f"the job ended before {what}")
        assert time.monotonic() - started < seconds, f"no {what} within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - started


@contextmanager
def job(plan: Plan) -> Iterator[Future]:
    """`train_all_subjects` in a thread that must end, but is not waited for when a test has failed."""
    running: Future = Future()

    def work() -> None:
        try:
            running.set_result(train_all_subjects(Plan(plan.config)))
        except BaseException as error:
            running.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    yield running
    assert running.done(), "the job is still running"


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    """Not started yet."""
    server = Server(tmp_path / "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def undisturbed(nodes, tmp_path_factory) -> Plan:
    """A finished run that nothing happened to. Shared: do not write to it."""
    root = tmp_path_factory.mktemp("undisturbed")
    config = Config(
        n_layers=3,
        data=DataConfig(subjects=(1,), rows_per_part=64),
        simulation=SimulationConfig(n_train=320, n_test=12, n_sessions=3),
        targets=TargetsConfig(n_layers=3, batch_size=16),
        ridge=RidgeConfig(alpha=4_000.0),
        gru=GRUConfig(hidden=8, batch_size=32, n_epochs=N_EPOCHS, patience=N_EPOCHS, checkpoint_every=2),
        stage2=Stage2Config(model="none"),
        evaluation=EvaluationConfig(controls=False),
        cluster=ClusterConfig(n_replicas=3, max_retries=1),
        store=StoreConfig(str(root)),
    )
    data = replace(config.data, nsd_root=str(Plan(config).layout.root))  # which copies of the run can share
    config = replace(config, data=data, store=StoreConfig(str(root / "run")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        plan, started = Plan(config), time.monotonic()
        train_all_subjects(plan)
    print(f"\nundisturbed: {time.monotonic() - started:.1f} s")
    return plan


def copy_without(plan: Plan, root: Path, *stages: str) -> Plan:
    """The run at another root, without stages such as "models/gru*"."""
    base = Path(plan.store.base)
    left_out = {path for stage in (*stages, "reports/*", "runs/*", "training") for path in base.glob(stage)}
    ignore = lambda folder, names: [name for name in names if Path(folder, name) in left_out]  # noqa: E731
    shutil.copytree(base, root, ignore=ignore, dirs_exist_ok=True)
    return Plan(replace(plan.config, store=StoreConfig(str(root))))


def shards(root: Path) -> dict[str, int]:
    """The files of all stages that are whole, and when each was written (ns)."""
    found = {}
    for path in root.glob("*/*/**/*"):
        stage = path.relative_to(root).parts[0]
        if path.suffix in (".parquet", ".safetensors") and stage != "training":
            found[str(path.relative_to(root))] = path.stat().st_mtime_ns
    return found


def digests(root: Path) -> dict[str, str]:
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in shards(root)}


def history(plan: Plan) -> list[dict]:
    """Of the GRU, without what depends on the clock."""
    folder = f"{plan.model(Fit('gru', 'vdvae')).folder}/{plan.subjects[0].folder}"
    epochs = json.loads(plan.store.read_bytes(f"{folder}/history.json"))
    return [{name: value for name, value in epoch.items() if name != "samples_per_s"} for epoch in epochs]


def check_same(plan: Plan, undisturbed: Plan, finished_before: dict[str, int]) -> None:
    """The same files to the byte, and those that were finished before not written again."""
    here, there = (Path(p.store.base) for p in (plan, undisturbed))
    ours, theirs = digests(here), digests(there)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert history(plan) == history(undisturbed)
    now = shards(here)
    redone = [name for name, when in finished_before.items() if now[name] != when]
    assert redone == []
    print(f"  {len(finished_before)} shards finished before, {len(redone)} redone, {len(now) - len(finished_before)} made after")


def check_mlflow(plan: Plan, uri: str, n_epochs: int = N_EPOCHS) -> None:
    """A finished run per model with its scores, and every epoch of the GRU's curves once."""
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("nsdray").experiment_id], max_results=1000)
    own = {run.data.params["model"]: run for run in runs if "n_test" in run.data.params}  # not those of means over subjects
    assert own.keys() == {"ridge", "gru"} and all(run.info.status == "FINISHED" for run in own.values())
    assert all("stage1_mini_pixcorr" in run.data.metrics for run in own.values())
    assert sum(run.data.tags.get("source") == "published" for run in runs) > 0
    points = client.get_metric_history(own["gru"].info.run_id, "val_loss")
    assert sorted((point.step, point.value) for point in points) == [(e["epoch"], e["val_loss"]) for e in history(plan)]
    assert {file.path for file in client.list_artifacts(own["gru"].info.run_id)} == {"grid.png", "decoder"}


def checkpoints(root: Path) -> set[str]:
    return {path.name for path in root.glob("training/*/checkpoint_2*")}


GRU = ("models/gru*", "predictions/gru*", "reconstructions/*gru*", "features/*gru*", "metrics/gru*")
RIDGE = ("models/ridge*", "predictions/ridge*", "reconstructions/*", "features/*", "metrics/*")


def test_driver_training_worker_replica_and_mlflow_server_are_killed(undisturbed, nodes, server, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "WAIT_S", 120.0)
    root = tmp_path / "run"
    plan = copy_without(undisturbed, root, *GRU)
    server.start()
    before = shards(root)
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(plan.config)))
    environment = os.environ | {"RAY_ADDRESS": nodes.cluster.address, "PYTHONPATH": str(CHECKOUT)}
    with open(tmp_path / "driver.txt", "wb") as log:
        driver = subprocess.Popen([sys.executable, "jobs/train_all_subjects.py", str(tmp_path / "recipe.json")], cwd=CHECKOUT,
                                  env=environment, stdout=log, stderr=log)  # fmt: skip
    try:
        until(lambda: checkpoints(root) or driver.poll() is not None, 180, "a checkpoint")
        assert driver.poll() is None, (tmp_path / "driver.txt").read_text()
    finally:
        driver.kill()
        driver.wait()
    killed = time.monotonic()
    until(lambda: not nodes.working("RayTrainWorker|TrainController"), 60, "the end of the killed job's processes")
    seen = checkpoints(root)
    print(f"\ndriver killed, its last checkpoint {max(seen)}")
    with job(plan) as running:
        until(lambda: checkpoints(root) - seen, 120, "another checkpoint", running)
        print(f"submitted again: next checkpoint {time.monotonic() - killed:.1f} s after the kill")
        until(lambda: nodes.kill("RayTrainWorker"), 10, "a training worker", running)
        server.kill()
        seen = checkpoints(root)
        seconds = until(lambda: checkpoints(root) - seen, 120, "another checkpoint", running)
        print(f"training worker killed: next checkpoint after {seconds:.1f} s")
        until(lambda: nodes.kill(r"Replica\.reconstruct"), 120, "a replica at work", running)
        seconds = until(lambda: list(root.glob("reconstructions/stage1-gru*/*/_SUCCESS")), 120, "the pictures", running)
        print(f"replica killed: its shard there after {seconds:.1f} s")
        assert not running.done()
        server.start()
        running.result(timeout=300)
    check_same(plan, undisturbed, before)
    check_mlflow(plan, server.uri)


def test_two_nodes_are_removed_and_no_mlflow_server_is_there(undisturbed, nodes, server, tmp_path, monkeypatch):
    """With a replica per node, those of a removed node find room only when the others have nothing to do."""
    monkeypatch.setattr(tracking, "WAIT_S", 3.0)
    root = tmp_path / "run"
    plan = copy_without(undisturbed, root, "targets/*", *RIDGE)
    with job(plan) as running:
        until(lambda: nodes.busy(r"Replica\.extract"), 120, "a replica at work", running)
        first = shards(root)
        nodes.remove(nodes.busy(r"Replica\.extract") or nodes.others[0])
        seconds = until(lambda: len(list(root.glob("targets/**/_SUCCESS"))) == 2, 200, "the targets", running)
        print(f"\nnode of a replica removed: all targets there after {seconds:.1f} s")
        second = shards(root)  # the node goes while ridge is fitted, or a moment later: its tasks are over in milliseconds
        until(lambda: nodes.busy("standardise|make_kernel|solve_kernel|fit_blocks|write_fit")
              or list(root.glob("models/ridge*/*/_SUCCESS")), 120, "a ridge task", running)  # fmt: skip
        nodes.remove(nodes.others[0])
        seconds = until(lambda: list(root.glob("predictions/ridge*/*/_SUCCESS")), 200, "the predictions", running)
        print(f"second node removed: ridge's predictions there after {seconds:.1f} s")
        runs = "ridge-3 subject 1, gru-3 subject 1"
        message = rf"MLflow at {server.uri} has taken nothing for 3 seconds .* Not logged: {runs}.* start the job again"
        with pytest.raises(ConnectionError, match=message):
            running.result(timeout=300)
    check_same(plan, undisturbed, first)
    finished = shards(root)
    assert [name for name, when in second.items() if finished[name] != when] == []
    assert len(untracked(Plan(plan.config))) == 2

    nodes.complete()
    server.start()
    started = time.monotonic()
    train_all_subjects(Plan(plan.config))
    print(f"started again with a server: {time.monotonic() - started:.1f} s, {len(finished)} shards, none redone")
    assert shards(root) == finished
    check_mlflow(plan, server.uri)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own in memory."""
    folder.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "nsdray", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, running: Future) -> Path:
    """Take all that is left of a disk, and whatever a job gives back while it is running; the file to delete again."""
    deadline = time.monotonic() + 300
    with open(disk / "filler", "wb", buffering=0) as file:
        while not running.done():
            assert time.monotonic() < deadline, "the job does not end on a full disk"
            with suppress(OSError):
                while True:
                    file.write(bytes(4096))
            time.sleep(0.01)
    return disk / "filler"


def test_the_disk_is_full_in_training_and_in_reconstruction(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with small_disk(tmp_path / "disk") as disk:
        root = disk / "run"
        plan = copy_without(undisturbed, root, *GRU)
        before = shards(root)
        for sign in ("training/*/checkpoint_2*", "reconstructions/stage1-gru*/*/*.parquet"):
            with job(plan) as running:
                until(lambda sign=sign: list(root.glob(sign)), 120, sign, running)
                started = time.monotonic()
                filler = fill(disk, running)
                with pytest.raises(OSError, match="no space left .* Free some, or choose another --store.root"):
                    running.result(timeout=60)
            print(f"\ndisk full once {sign} appeared: the job ended after {time.monotonic() - started:.1f} s")
            assert untracked(Plan(plan.config))
            with pytest.raises(ValueError, match="to be written below .* free: free some"):
                train_all_subjects(Plan(plan.config))
            filler.unlink()
            assert {name: shards(root).get(name) for name in before} == before
            before = shards(root)
        started = time.monotonic()
        train_all_subjects(Plan(plan.config))
        print(f"started again with room: {time.monotonic() - started:.1f} s")
        check_same(plan, undisturbed, before)
