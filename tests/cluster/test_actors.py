"""Replicas that die more often than Ray starts them again, and what the jobs' users are told when a call kills each of them."""
from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, WorkerCrashedError

from nsdray.cluster import actors
from nsdray.config import ClusterConfig

CHECKOUT = Path(__file__).parents[2]
main = runpy.run_path(str(CHECKOUT / "jobs" / "cli.py"))["main"]


class Mortal:
    """A replica that is killed by a call as often as the call says."""

    def __init__(self, folder: Path):
        self.folder = folder

    def work(self, number: int, partition: str, part: SimpleNamespace, n_deaths: int) -> None:
        died = self.folder / f"died-{number}"
        n = len(died.read_text()) if died.exists() else 0
        if n < n_deaths:
            died.write_text("x" * (n + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / f"done-{number}").touch()


@pytest.fixture
def pool(cluster, tmp_path, monkeypatch):
    """`run_replicas` with mortal ones; a call's number and its deaths."""
    monkeypatch.setattr(actors, "Replica", Mortal)
    monkeypatch.setattr(actors, "replica_arguments", lambda plan: (tmp_path,))

    def run(*deaths: int) -> list[str]:
        part = SimpleNamespace(image_ids=[0])
        plan = SimpleNamespace(config=SimpleNamespace(cluster=ClusterConfig(n_replicas=1, max_retries=0)))
        calls = [("work", (number, "subject=01", part, n)) for number, n in enumerate(deaths)]
        actors.run_replicas(plan, calls, "work")
        return sorted(path.name for path in tmp_path.glob("done-*"))

    return run


def test_a_replica_that_has_used_up_its_restarts_is_replaced(pool):
    assert pool(1, 0, 1) == ["done-0", "done-1", "done-2"]


def test_a_call_that_kills_every_replica_ends_the_job(pool, monkeypatch):
    monkeypatch.delenv("NSDRAY_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match=r"(?s)lost a process.*ActorDiedError.*Finished shards are kept: start again"):
        main(lambda: pool(99))


@pytest.mark.parametrize("error", [ActorDiedError(), WorkerCrashedError(), OutOfMemoryError("the node is low on memory")])
def test_losses_are_told_without_a_traceback(error, monkeypatch):
    monkeypatch.delenv("NSDRAY_TRACEBACK", raising=False)

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit, match=f"(?s){type(error).__name__}.*fewer --cluster.n-replicas"):
        main(fail)
    monkeypatch.setenv("NSDRAY_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(fail)


def test_faults_of_ours_keep_their_traceback():
    with pytest.raises(KeyError):
        main(lambda: {}["x"])
