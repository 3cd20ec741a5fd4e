"""A small search: its trials, what it leaves, what goes on after an interruption, and what goes wrong."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from mlflow import MlflowClient

from nsdray.cluster import search, trials, tune
from nsdray.cluster.tracking import start_tracker, tracking_uri
from nsdray.cluster.trials import WHOLE
from nsdray.config import Config, SearchConfig, StoreConfig
from nsdray.generators.stage1 import decode_pictures, enlarge
from nsdray.metrics.pixel import pixcorr
from nsdray.models.vdvae import VDVAEConfig, load_vdvae
from nsdray.recipes import read_recipe
from nsdray.stages import layer_name
from nsdray.store import Store
from nsdray.training import TooLargeError

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
    assert set(trials.status) <= {"trained", "unfinished", "reference"} and trials.score.is_monotonic_decreasing
    np.testing.assert_allclose(trials.score, (trials.ssim + trials.pixcorr) / 2)
    for name in ("score", "train_s", "decode_s", "n_parameters"):
        np.testing.assert_allclose(trials[name], (trials[f"{name}_1"] + trials[f"{name}_2"]) / 2)
    assert (trials.score_error > 0).all() and set(trials.epochs[trials.status == "trained"]) <= {3, 4}
    for name in ("parameters.svg", "training.svg", "decoding.svg", "depth.svg", "report.html", "table.txt"):
        assert b"SIMULATED" in plan.store.read_bytes(f"{folder}/{name}")
    best, first = json.loads(plan.store.read_bytes(f"{folder}/best.json")), trials[trials.status.isin(WHOLE)].iloc[0]
    assert best["models"] == [first.model] and best["n_layers"] == first.n_layers
    assert not [path for path in Path(plan.store.base, folder, "trials").rglob("states.pt")]  # finished trials leave none


@pytest.mark.parametrize("model", ["ridge", "gru"])
def test_the_best_is_a_recipe_for_the_jobs(found, tmp_path, monkeypatch, model):
    """Whatever it is: through the parser of the jobs."""
    config, folder, plan = found
    row = trials_of(plan, folder).query("model == @model").iloc[0]
    best = search.best_recipe(replace(config, search=replace(config.search, n_epochs=3)), row)
    path = tmp_path / "best.json"
    path.write_text(json.dumps(asdict(best)))
    assert read_recipe(path) == best
    monkeypatch.syspath_prepend(str(CHECKOUT / "jobs"))
    monkeypatch.setattr(sys, "argv", ["train_all_subjects.py", str(path), "--seed", "7"])
    from cli import plan_from_command_line

    parsed = plan_from_command_line("").config
    assert parsed == replace(best, seed=7) and parsed.models == (model,) and parsed.n_layers == row.n_layers
    assert parsed.recipe == "mini-best" and parsed.data == config.data and parsed.stage2 == config.stage2
    if model == "gru":
        assert parsed.gru == replace(config.gru, hidden=int(row.hidden), dropout=row.dropout, learning_rate=row.learning_rate,
                                     n_epochs=3)  # fmt: skip
    else:
        assert parsed.ridge == config.ridge and parsed.gru == config.gru


def test_every_trial_is_a_run_under_the_search_s(found):
    _, folder, plan = found
    client = MlflowClient(tracking_uri(plan.store))
    runs = client.search_runs([client.get_experiment_by_name("nsdray").experiment_id], max_results=1000)
    parent = next(r for r in runs if r.data.tags["nsdray.key"] == folder)
    trials = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(trials) == 4 and all(r.data.params["model"] in ("gru", "mlp") and "score_2" in r.data.metrics for r in trials)
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} == set(search.FILES)
    assert all(r.info.run_name.endswith("(SIMULATED)") and r.data.tags["data"] == "simulated" for r in [parent, *trials])
    table = trials_of(plan, folder)
    assert parent.data.metrics["score"] == pytest.approx(table[table.status.isin(WHOLE)].score.max())


def test_a_finished_search_is_not_done_again(found, monkeypatch):
    config, folder, plan = found
    before = trials_of(plan, folder)

    def trial(choice, plan, data, memory):  # goes to the workers by value
        raise AssertionError("a finished trial was started")

    monkeypatch.setattr(tune, "trial", trial)
    started = time.monotonic()
    search.search(replace(config, search=replace(config.search, cpus_per_trial=0.5)))  # resources are no part of a search
    before, again = (t.query("model != 'ridge'").drop(columns="front") for t in (before, trials_of(plan, folder)))
    pd.testing.assert_frame_equal(again, before)
    assert time.monotonic() - started < 60


def test_a_folder_of_another_search_is_refused(found):
    config, _, _ = found
    message = r"searches/mini was made by another search: search.n_layers is \[1, 3\] there, \[1, 2\] here; suite is mini there"
    other = replace(config.evaluation, suites=("mindeye",))
    with pytest.raises(ValueError, match=message):
        plan = search.search_plan(replace(config, evaluation=other))
        space = tune.search_space(plan)
        tune.claim_folder(plan.store, "searches/mini", space | {"search": space["search"] | {"n_layers": [1, 2]}})


def test_a_trial_is_what_training_by_hand_gives(found):
    """The first trial is the first network as it is configured, at the first depth."""
    config, _, plan = found
    data = trials.share_subject(plan.subjects[0])
    rate = config.gru.learning_rate
    space = {"model": "gru", "n_layers": 1, "hidden": config.gru.hidden, "dropout": 0.3, "learning_rate": rate}
    paused, straight = (trials.SubjectTraining(plan, data, space, torch.device("cpu"), None) for _ in range(2))
    for epoch in (1, 2, 4):
        stepwise = paused.advance(epoch)
        assert paused.ended == (epoch == 4)
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


def test_trials_that_no_node_can_hold_are_refused(found):
    config, _, _ = found
    with pytest.raises(ValueError, match="a trial asks for 64 CPU, which no node .*--search.cpus-per-trial"):
        search.search(replace(config, search=replace(config.search, name="large", cpus_per_trial=64.0)))


def test_a_search_per_subject_with_trials_that_diverge(found):
    """Every MLP diverges, since its weight decay is far too strong; the GRUs beside it do not care."""
    config, _, plan = found
    settings = replace(config.search, name="each", per_subject=True, n_layers=(1,), n_epochs=2)
    folders = search.search(replace(config, search=settings, mlp=replace(config.mlp, weight_decay=1e30)))
    assert folders == ["searches/each/subject=01", "searches/each/subject=02"]
    for folder, subject, other in zip(folders, (1, 2), (2, 1)):
        table = trials_of(plan, folder)
        networks = table.query("model != 'ridge'")
        assert len(networks) == 4 and set(networks.model) == {"gru", "mlp"}
        assert all(s.startswith("Diverged: ") for s in networks.status[networks.model == "mlp"])
        assert "trained" in set(networks.status[networks.model == "gru"])
        assert f"score_{subject}" in table and f"score_{other}" not in table and set(table.front.dropna()) == {"all"}
        assert json.loads(plan.store.read_bytes(f"{folder}/best.json"))["data"]["subjects"] == [subject]


def test_asha_stops_trials_but_for_the_first(found, monkeypatch, tmp_path):
    """Trials one after another, with made-up scores. The worse of two first trials goes on; later ones that are worse than the
    median stop; one breaks after its first rung; checkpoints go."""
    config, _, plan = found
    score = {1: 0.5, 3: 0.1}  # by depth; the others' get lower with each trial

    def trial(choice, plan, data, memory):
        first = choice["model"] == "gru" and choice["dropout"] == 0.3
        n_before = len(list(tmp_path.iterdir()))
        (tmp_path / str(n_before)).touch()
        for epoch in (2, 4):
            value = score[choice["n_layers"]] if first else 0.3 if n_before == 4 else 0.05 / n_before
            figures = {"score": value, "score_error": 0.01, "epochs": epoch, "epoch": epoch}
            trials.report_trial(figures | {"status": "trained" if epoch == 4 else "unfinished"}, {"epoch": epoch})
            if n_before == 4:
                raise RuntimeError("it broke")

    monkeypatch.setattr(tune, "trial", trial)
    monkeypatch.setattr(tune, "FORGET_S", 0.0)
    name, cluster = "made-up", replace(config.cluster, max_retries=0)
    plan = search.search_plan(replace(config, cluster=cluster, search=replace(config.search, cpus_per_trial=2.0, n_trials=5)))
    tracker = start_tracker(Store(str(tmp_path.parent / "made-up")))
    ray.get(tracker.start.remote(f"searches/{name}", name, {}, {}))
    grid = tune.fit_trials(plan, f"searches/{name}", [], tracker)
    rows = [tune.trial_row(plan.config, result) for result in grid]
    by_order = sorted(rows, key=lambda row: -row["score"])
    broken = by_order.pop(1)
    assert broken["score"] == 0.3 and broken["status"].startswith("failed: ") and "it broke" in broken["status"]
    assert [row["score"] for row in by_order] == [0.5, 0.1, 0.05 / 2, 0.05 / 3]
    assert [row["status"] for row in by_order] == ["trained", "trained", "unfinished", "unfinished"]
    assert [row["epochs"] for row in by_order] == [4, 4, 2, 2]
    left = list(Path(plan.store.base, "searches", name, "trials").rglob("states.pt"))
    assert len(left) == 1  # the failed trial's, from which it could go on


def test_a_search_in_an_object_store(found, s3, monkeypatch, tmp_path):
    """By credentials of the address; started again, it finds its trials."""
    store = Store(s3.uri("lab/root", user="key:secret@"))

    def trial(choice, plan, data, memory):
        assert list(tmp_path.iterdir()) == []  # not again
        trials.report_trial({"score": 0.1, "epoch": 4, "status": "trained"}, {"epoch": 4})

    monkeypatch.setattr(tune, "trial", trial)
    config, tracker = replace(found[0], search=replace(found[0].search, n_trials=2)), start_tracker(found[2].store)
    plan = SimpleNamespace(config=config, store=store, is_simulated=True)
    ray.get(tracker.start.remote("searches/far", "far", {}, {}))
    grid = tune.fit_trials(plan, "searches/far", [], tracker)
    (tmp_path / "again").touch()
    again = tune.fit_trials(plan, "searches/far", [], tracker)
    for found_trials in (grid, again):
        assert [(result.metrics["score"], result.error) for result in found_trials] == [(0.1, None)] * 2
    assert "tuner.pkl" in store.sizes("searches/far/trials")


def test_credentials_are_not_in_what_a_search_leaves(found, s3):
    config, folder, plan = found
    far = replace(config, store=StoreConfig(s3.uri("lab/root", user="AKIAKEY:s3cretpart@")))
    names = SimpleNamespace(config=far, store=Store(far.store.root), is_simulated=True, subjects=plan.subjects)
    files = search.found(names, trials_of(plan, folder), far)
    assert not any(secret in data for data in files.values() for secret in (b"s3cretpart", b"AKIAKEY"))
    assert json.loads(files["best.json"])["store"]["root"].startswith("s3://lab/root")
    assert json.loads(search.found(plan, trials_of(plan, folder), Config())["best.json"])["store"]["root"] is None


def test_rings_are_trials_that_were_stopped(found):
    _, folder, plan = found
    table = trials_of(plan, folder)
    columns = {"score": 0.4, "n_layers": 1.0, "status": "unfinished", "model": "gru"}
    before, after = (search.cost_chart(plan, rows, "parameters").count(b"fill: none") for rows in (
        table, pd.concat([table, table.iloc[:1].assign(**columns)], ignore_index=True)))  # fmt: skip
    assert after > before


def test_a_trial_that_reported_nothing():
    row = tune.trial_row(Config(), SimpleNamespace(metrics={}, config=None, error=RuntimeError("no memory")))
    assert row == {"model": "unknown", "score": tune.FAILED, "status": "failed: no memory"}
    columns = {name: np.nan for name in ("n_layers", "n_parameters", "train_s", "decode_s", "score_error")}
    assert search.shown_rows(pd.DataFrame([row | columns]))[0]["status"] == "failed"


def test_pictures_of_true_latents_score_best(found):
    """Near those that the VDVAE decodes from them, as they are; above those of other images."""
    config, _, plan = found
    data = trials.share_subject(plan.subjects[0])._replace(seen=None)
    with_all = data._replace(seen=trials.read_seen.remote(data.subject, data.image_ids))
    arrays, vdvae = data.arrays.get([layer_name(i) for i in range(3)]), load_vdvae(plan.vdvae_checkpoint, VDVAEConfig.mini())
    truth = arrays.val_targets[np.arange(len(data.image_ids))].astype(np.float32)
    true, other = (trials.score_pictures(plan, vdvae, with_all, arrays, raw, 3) for raw in (truth, np.roll(truth, 1, 0)))
    assert true["score"] > other["score"] + 0.1 and 0 < true["score_error"] < 0.2
    cells = trials.cut_columns(truth, plan.shapes("vdvae"))
    seen = ray.get(with_all.seen)
    pictures = decode_pictures(vdvae, cells, data.image_ids, config.stage1.seed, 1.0, config.stage1.deterministic)
    assert true["pixcorr"] == pytest.approx(pixcorr(seen, enlarge(pictures, seen.shape[1:3])).mean(), abs=0.1)


def test_errors_of_subjects_are_independent():
    figures = {s: {"score": s, "score_error": e, "n_parameters": 1, "train_s": 2, "decode_s": 3} for s, e in ((1, 0.3), (2, 0.4))}
    summary = trials.summarise(figures)
    assert summary["score"] == 1.5 and summary["score_error"] == pytest.approx(0.25) and summary["score_2"] == 2.0


def test_memory_is_asked_for_all_subjects_at_once(found):
    """What two subjects' networks need is refused where only one of them would fit, before anything is trained."""
    _, _, plan = found
    data = [trials.share_subject(subject) for subject in plan.subjects]
    space = {"model": "mlp", "n_layers": 3, "hidden": 64, "dropout": 0.3, "learning_rate": 1e-3}
    needed = 20 * sum(sum(p.numel() for p in trials.build(plan, own.subject, space).parameters()) for own in data)
    trials.require_trial_memory(plan, data[:1], space, needed)
    with pytest.raises(TooLargeError, match=r"this network is too large: training its [\d,]+ parameters takes"):
        trials.require_trial_memory(plan, data, space, needed)


def test_trials_of_a_node_share_its_memory(found, monkeypatch):
    alone, half = (tune.trial_memory({"cpu": cpus}) for cpus in (2.0, 1.0))
    assert 0.3 < half / alone < 0.7 and tune.trials_of_nodes({"cpu": 3.0}) == {}
    monkeypatch.setattr(tune.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(ValueError, match=r"checkpoints of 2 trials at a time take up to 0\.\d GB below .* and 0\.0 GB are free"):
        tune.require_room(found[2], 2)


def test_rungs():
    assert trials.rungs(4, 3, 40) == [4, 12, 36, 40]
    assert trials.rungs(4, 2, 4) == [4] and trials.rungs(9, 2, 4) == [4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": (0, 5)}, r"search.n_layers has \[0\]; the VDVAE's layers are 1 to 75"),
        ({"n_layers": ()}, "search.n_layers is empty"),
        ({"dropout": (0.5, 1.0)}, r"search.dropout is \(0.5, 1.0\), must be a range within"),
        ({"learning_rate": (1e-2, 1e-3)}, "must be a range above 0"),
        ({"reduction": 1}, "search.reduction is 1, must be at least 2"),
        ({"n_images": 1}, "search.n_images is 1, must be at least 2"),
        ({"n_epochs": 0}, "search.n_epochs is 0, must be positive"),
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
