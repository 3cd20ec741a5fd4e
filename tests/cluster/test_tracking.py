"""What is written to an MLflow that is there, away, or refuses."""
from __future__ import annotations

import time

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import INTERNAL_ERROR, MlflowException
from sqlalchemy.exc import OperationalError

from nsdray.cluster import tracking
from nsdray.cluster.tracking import Tracker, is_away
from nsdray.store import out_of_space


@pytest.fixture
def tracker(tmp_path, monkeypatch) -> Tracker:
    """Not connected yet."""
    monkeypatch.setattr(tracking, "RETRY_S", 0.01)
    return Tracker(f"sqlite:///{tmp_path}/mlflow.db", None)


def sent(tracker: Tracker) -> tracking.State:
    deadline = time.monotonic() + 60
    while (state := tracker.state()).unsent:
        assert time.monotonic() < deadline, state
        time.sleep(0.01)
    return state


def test_writes_wait_in_order_until_mlflow_is_there(tracker, tmp_path, monkeypatch):
    find, attempts = Tracker._find_experiment, []

    def away_twice(self) -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise requests.ConnectionError("nobody answers")
        find(self)

    monkeypatch.setattr(Tracker, "_find_experiment", away_twice)
    tracker.start("a", "run a", {"alpha": 1}, {})
    for epoch in (0, 1, 1):
        tracker.log_epoch("a", dict.fromkeys(tracking.CURVES, 1.0) | {"epoch": epoch})
    for _ in range(2):
        tracker.log_result("a", {"ssim": 0.5}, {}, {"table.txt": b"x"}, step=7, once=True)
    tracker.finish("a")
    tracker.start("b", "run b", {}, {}, parent="a")
    assert tracker.state().unsent == ["run a", "run b"]
    assert tracker.connect().trouble == "ConnectionError: nobody answers"
    tracker.close("FAILED")  # what has its results is finished
    state = sent(tracker)
    assert (state.trouble, state.refused) == ("", []) and state.n_done == 9
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    a, b = (client.get_run(tracker.runs[key]) for key in "ab")
    assert (a.info.status, b.info.status) == ("FINISHED", "FAILED") and b.data.tags["mlflow.parentRunId"] == a.info.run_id
    assert [point.step for point in client.get_metric_history(a.info.run_id, "val_loss")] == [0, 1]
    assert [point.step for point in client.get_metric_history(a.info.run_id, "ssim")] == [7]


def test_what_mlflow_refuses_holds_up_nothing_else(tracker):
    tracker.start("a", "run a", {}, {})
    tracker.log_result("a", {"a name with *": 0.5}, {}, {})
    tracker.log_result("a", {"ssim": 0.5}, {}, {})
    tracker.connect()
    (refused,) = sent(tracker).refused
    assert refused.startswith("run a: ") and "a name with *" in refused
    assert tracker.client.get_run(tracker.runs["a"]).data.metrics == {"ssim": 0.5}


def test_a_write_that_always_fails_on_the_server_is_given_up(tracker, monkeypatch):
    monkeypatch.setattr(tracking, "MOST_TRIES", 3)
    log_batch, attempts = MlflowClient.log_batch, []

    def broken(self, run_id, metrics=(), **more):
        if any(metric.key == "broken" for metric in metrics):
            attempts.append(1)
            raise MlflowException("the server fails", INTERNAL_ERROR)
        log_batch(self, run_id, metrics=metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", broken)
    tracker.start("a", "run a", {}, {})
    for name in ("broken", "ssim"):
        tracker.log_result("a", {name: 0.5}, {}, {})
    tracker.connect()
    assert [text.partition(": ")[0] for text in sent(tracker).refused] == ["run a"] and len(attempts) == 3
    assert tracker.client.get_run(tracker.runs["a"]).data.metrics == {"ssim": 0.5}


def test_an_address_that_can_never_work():
    with pytest.raises(ValueError, match="MLflow at gopher://x: "):
        Tracker("gopher://x", None).connect()


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (requests.ConnectionError("x"), True), (TimeoutError("x"), True), (out_of_space("x"), True),
        (OperationalError("x", {}, Exception("x")), True), (MlflowException("x", 3), True),
        (MlflowException.invalid_parameter_value("x"), False), (PermissionError("x"), False), (KeyError("x"), False),
    ],
)  # fmt: skip
def test_what_may_pass(error, away):
    assert is_away(error) == away
