"""A small search: its trials, what it leaves, what goes on after an interruption, and what goes wrong."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from nsdray.cluster import search, tune
from nsdray.cluster.tracking import tracking_uri
from nsdray.config import Config, SearchConfig
from nsdray.recipes import read_recipe
from nsdray.stages import layer_name

CHECKOUT = Path(__file__).parent.parent.parent


def searched(plan, **changes) -> Config:
    settings = SearchConfig(
        models=("gru", "mlp"), n_layers=(1, 3), width=(1.0,), n_trials=4, n_images=4, grace_epochs=2, reduction=2
    )
    mlp = replace(plan.config.mlp, hidden=8, n_epochs=4, batch_size=32)
    return replace(plan.config, mlp=mlp, search=replace(settings, **changes))


@pytest.fixture(scope="module")
def found(finished):
    config = searched(finished)
    (folder,) = search.search(config)
    return config, folder, search.search_plan(config)


def trials_of(plan, folder) -> pd.DataFrame:
    with plan.store.fs.open_input_stream(f"{plan.store.base}/{folder}/trials.csv") as stream:
        return pd.read_csv(stream)


def test_a_search_leaves_table_charts_and_a_recipe(found, tmp_path):
    config, folder, plan = found
    assert set(search.FILES) <= plan.store.sizes(folder).keys()
    trials = trials_of(plan, folder)
    assert len(trials) == 4 + 2 and sorted(trials.n_layers[trials.model == "ridge"]) == [1, 3]
    assert set(trials.status) == {"trained", "reference"} and trials.score.is_monotonic_decreasing
    np.testing.assert_allclose(trials.score, (trials.ssim + trials.pixcorr) / 2)
    np.testing.assert_allclose(trials.score, (trials.score_1 + trials.score_2) / 2)
    (tmp_path / "best.json").write_bytes(plan.store.read_bytes(f"{folder}/best.json"))
    best, first = read_recipe(tmp_path / "best.json"), trials[trials.model != "ridge"].iloc[0]
    assert best.models == (first.model,) and best.n_layers == first.n_layers and best.recipe == "mini-best"
    assert getattr(best, first.model).learning_rate == first.learning_rate and best.data == config.data
    assert best.stage2 == config.stage2 and best.models == (first.model,)
    assert all(b"<svg" in plan.store.read_bytes(f"{folder}/{cost}.svg") for cost in search.COSTS)
    assert {f"n_parameters_{s}" for s in config.data.subjects} <= set(trials.columns)
    assert b"SIMULATED" in plan.store.read_bytes(f"{folder}/report.html")


def test_every_trial_is_a_run_under_the_search_s(found):
    _, folder, plan = found
    client = MlflowClient(tracking_uri(plan.store))
    runs = client.search_runs([client.get_experiment_by_name("nsdray").experiment_id], max_results=1000)
    parent = next(r for r in runs if r.data.tags["nsdray.key"] == folder)
    trials = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(trials) == 4 and all(r.data.params["model"] in ("gru", "mlp") and "score_2" in r.data.metrics for r in trials)
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} == set(search.FILES)
    assert parent.data.metrics["score"] == pytest.approx(trials_of(plan, folder).query("model != 'ridge'").score.max())


def test_a_finished_search_is_not_done_again(found, monkeypatch):
    config, folder, plan = found
    before = trials_of(plan, folder)
    monkeypatch.setattr(tune, "run_trial", None)  # would fail in every trial
    started = time.monotonic()
    search.search(config)
    before, again = (t.query("model != 'ridge'").drop(columns="front") for t in (before, trials_of(plan, folder)))
    pd.testing.assert_frame_equal(again, before)
    assert time.monotonic() - started < 60


def test_a_folder_of_another_search_is_refused(found):
    config, _, _ = found
    with pytest.raises(ValueError, match=r"searches/mini was made by another search \(it differs in search\)"):
        search.search(replace(config, search=replace(config.search, n_layers=(1, 2))))


def test_a_trial_is_what_training_by_hand_gives(found):
    """The first trial is the first network as it is configured, at the first depth."""
    config, _, plan = found
    data = tune.share_subject(plan.subjects[0])
    rate = config.gru.learning_rate
    space = {"model": "gru", "n_layers": 1, "hidden": config.gru.hidden, "dropout": 0.3, "learning_rate": rate}
    paused, straight = (tune.SubjectTraining(plan, data, space, torch.device("cpu"), None) for _ in range(2))
    for epoch in (1, 2, 4):
        stepwise = paused.advance(epoch)
    at_once = straight.advance(4)
    for name in ("val_loss", "val_mse", "val_mae", "train_loss"):
        assert stepwise[name] == at_once[name]
    np.testing.assert_array_equal(paused.predictions(), straight.predictions())
    assert paused.arrays.targets[np.arange(2)].shape == (2, int(np.prod(plan.shapes("vdvae")[0])))
    assert paused.layers == [layer_name(0)]


def test_trials_that_cannot_go_on_are_marked(found, finished, monkeypatch):
    config, _, _ = found
    changes = {"name": "diverging", "models": ("mlp",), "n_layers": (1,), "learning_rate": (1e30, 1e30), "n_trials": 2}
    with pytest.raises(ValueError, match="no trial could be trained, .*searches/diverging/table.txt shows; the first: Diverged"):
        search.search(replace(config, search=replace(config.search, **changes)))
    trials = trials_of(finished, "searches/diverging").query("model != 'ridge'")
    assert len(trials) == 2 and all(status.startswith("Diverged: training diverged in epoch") for status in trials.status)
    assert (trials.score == tune.FAILED).all() and trials.front.isna().all()


def test_a_network_too_large_is_said_before_training(found, monkeypatch):
    config, _, plan = found
    data = tune.share_subject(plan.subjects[0])
    monkeypatch.setattr(tune, "free_memory", lambda device: 1_000_000)
    space = {"model": "mlp", "n_layers": 3, "hidden": 64, "dropout": 0.3, "learning_rate": 1e-3}
    with pytest.raises(tune.TooLargeError, match=r"this network is too large: training its [\d,]+ parameters takes"):
        tune.SubjectTraining(plan, data, space, torch.device("cpu"), None)


def test_rungs():
    assert tune.rungs(4, 3, 40) == [4, 12, 36, 40]
    assert tune.rungs(4, 2, 4) == [4] and tune.rungs(9, 2, 4) == [4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": (0, 5)}, r"search.n_layers has \[0\]; the VDVAE's layers are 1 to 75"),
        ({"n_layers": ()}, "search.n_layers is empty"),
        ({"dropout": (0.5, 1.0)}, r"search.dropout is \(0.5, 1.0\), must be a range within"),
        ({"learning_rate": (1e-2, 1e-3)}, "must be a range above 0"),
        ({"reduction": 1}, "search.reduction is 1, must be at least 2"),
    ],
)
def test_impossible_searches(changes, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**changes)


def test_a_depth_that_the_mini_vdvae_lacks(finished):
    with pytest.raises(ValueError, match="targets.n_layers is 40, but the mini VDVAE has 31 layers"):
        search.search_plan(searched(finished, n_layers=(40,)))


def test_killed_it_goes_on(tmp_path):
    """SIGKILL to the driver's whole session once two trials have reported; finished trials are not done again."""
    arguments = """mini --data.subjects 1 --simulation.n-train 96 --simulation.n-test 12 --simulation.n-sessions 3 --gru.hidden 8
        --gru.n-epochs 8 --data.rows-per-part 64 --search.models gru --search.n-layers 1 3 --search.n-trials 6 --search.n-images 4
        --search.grace-epochs 2""".split() + ["--store.root", str(tmp_path)]  # fmt: skip

    def start():
        return subprocess.Popen([sys.executable, "jobs/search.py", *arguments], cwd=CHECKOUT, text=True,
                                start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    def results() -> dict[str, str]:
        files = tmp_path.glob("searches/mini/trials/*/result.json")
        return {path.parent.name: path.read_text() for path in files if path.stat().st_size}

    process, deadline = start(), time.monotonic() + 300
    while len(results()) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]
    time.sleep(3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = results()
    process = start()
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    after = results()
    assert len(after) == 6 and before.keys() <= after.keys()
    done = [name for name, text in before.items() if any(json.loads(line)["done"] for line in text.splitlines())]
    assert all(after[name] == before[name] for name in done)
    assert len(pd.read_csv(tmp_path / "searches/mini/trials.csv").query("model == 'gru'")) == 6
