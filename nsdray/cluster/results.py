"""The whole way to a finished plan, and its MLflow runs."""
from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm

from nsdray.cluster import run
from nsdray.cluster.autoscale import enough_gpus
from nsdray.cluster.noise import is_possible, make_noise_levels, noise_curves, noise_table
from nsdray.cluster.preflight import require_cluster, require_inputs, require_room
from nsdray.cluster.report import report_file, write_report
from nsdray.cluster.ridge_report import ridge_scores
from nsdray.cluster.scores import mean_scores, summary
from nsdray.cluster.tracking import settle, start_tracker, tracking_uri
from nsdray.config import digest
from nsdray.metrics.published import PUBLISHED
from nsdray.stages import IMAGES, Fit, Plan, SubjectPlan
from nsdray.store import Inputs, Store, redacted

CHECKPOINT_BYTES = 64 << 20  # larger models stay in the store; MLflow gets their address


def train_all_subjects(plan: Plan) -> None:
    """Bring everything up to date, from raw NSD to MLflow. Finished stages are skipped."""
    require_inputs(plan)
    if not (untracked(plan) or plan.report.missing(plan.report_partition, plan.report_wanted)):
        print("Everything is up to date.")
        return
    require_room(plan)
    run.start_ray(plan)
    with enough_gpus(plan.config.cluster), tracking(plan) as tracker:
        require_cluster(plan)
        for each in (*plan.replicates, plan):
            start_runs(each, tracker)
            run.prepare_betas(each)
            run.extract_targets(each)
            run.fit_models(each, tracker)
            run.predict_test_sets(each)
            run.reconstruct_test_sets(each)
            run.embed_test_sets(each)
            run.evaluate_test_sets(each)
            write_report(each)
            with contextlib.suppress(ConnectionError):  # there is more to compute meanwhile
                track_results(each, tracker, 0.0)
        track_published(plan, tracker)
        for each in (*plan.replicates, plan):
            if untracked(each):
                track_results(each, tracker)


@contextlib.contextmanager
def tracking(plan: Plan) -> Iterator[Any]:
    """The tracker's actor; at the end its runs are finished or failed."""
    tracker = start_tracker(plan.store)
    try:
        yield tracker
        settle(plan.store, tracker)
    except BaseException:
        tracker.close.remote("FAILED")
        with contextlib.suppress(ConnectionError, ValueError):  # neither as important as what has gone wrong
            settle(plan.store, tracker, seconds=0.0)
        raise
    tracker.close.remote("FINISHED")
    settle(plan.store, tracker)


def judge(plan: Plan) -> None:
    """Score reconstructions made elsewhere: nothing of nsdray's own is made or needed."""
    require_inputs(plan, ("stimuli", "metrics"))
    unlogged = [s for s in plan.subjects if plan.tracked(IMAGES).missing(s.folder, {"run.json": run_inputs(s)})]
    if not (unlogged or plan.report.missing(plan.report_partition, plan.report_wanted)):
        print("Everything is up to date.")
        return
    run.start_ray(plan)
    with tracking(plan) as tracker:
        start_runs(plan, tracker)
        run.import_images(plan)
        run.embed_test_sets(plan)
        run.evaluate_test_sets(plan)
        write_report(plan)
        track_report(plan, tracker)
        track_published(plan, tracker)
        settle(plan.store, tracker)
        for subject in unlogged:
            finish_tracking(subject, IMAGES, parent_key(plan))


def noise_sensitivity(plan: Plan) -> str:
    """Bring stage 2 under every level of noise up to date, put it into the report, and log it; returns the table."""
    if not is_possible(plan):
        raise ValueError("noise sensitivity needs a stage 2 that starts from the stage-1 picture: --stage2.start stage1")
    train_all_subjects(plan)
    if noise_curves(plan) is None:
        run.start_ray(plan)
        make_noise_levels(plan)
        report_again(plan)
    return noise_table(plan, noise_curves(plan))


def report_again(plan: Plan) -> None:
    """Write the report of a finished plan anew, with what has been finished since, and log it."""
    write_report(plan, again=True)
    run.start_ray(plan)
    with tracking(plan) as tracker:
        start_runs(plan, tracker)
        track_report(plan, tracker)


def mlflow_inputs(store: Store) -> Inputs:
    """The MLflow that results were written to."""
    uri = tracking_uri(store)
    database = Path(uri.removeprefix("sqlite:///"))
    gone = uri.startswith("sqlite:///") and not database.exists()
    return {"mlflow": redacted(uri), "database": "gone" if gone else "there"}


def run_inputs(subject: SubjectPlan) -> Inputs:
    """What run.json is made from: the results, and the MLflow that they were written to."""
    return subject.inputs | mlflow_inputs(subject.plan.store)


def track_published(plan: Plan, tracker: Any) -> None:
    """Log the published figures once, each as a run tagged source=published, under the names that ours have."""
    records = [dataclasses.asdict(record) for record in PUBLISHED]
    stage, wanted = plan.store.stage("runs/published", {"records": records}), {"run.json": mlflow_inputs(plan.store)}
    if not stage.missing("all", wanted):
        return
    for record in PUBLISHED:
        subjects = "-".join(map(str, record.subjects))
        layers = f" {record.n_layers} layers" if record.n_layers else ""
        noise = "" if record.noise_amplitude is None else f", noise {record.noise_amplitude:g}"
        name = f"published: {record.system}{layers}, subjects {subjects}{noise} (NSD)"
        key = f"published/{digest(dataclasses.asdict(record))}"
        params = {"system": record.system, "subject": subjects, "n_layers": record.n_layers, "reference": record.source}
        tags = {"source": "published", "data": "nsd", "caution": record.caution}
        ray.get(tracker.start.remote(key, name, params, tags))
        scores = {("stage2_" if "/" in metric else "latents_") + metric.replace("/", "_"): value
                  for metric, value in record.values.items()}  # fmt: skip
        ray.get(tracker.log_result.remote(key, scores, {}, {}))
    settle(plan.store, tracker, ["the published figures"] + [run_name(*pair) for pair in untracked(plan)])
    stage.claim()
    plan.store.write_bytes(f"{stage.folder}/all/run.json", b"{}")
    stage.finish("all", wanted)


def untracked(plan: Plan) -> list[tuple[SubjectPlan, str]]:
    """Subjects and models whose results are not in MLflow yet."""
    pairs = [] if plan.is_referee else [(subject, model) for model in plan.models for subject in plan.subjects]
    return [(s, m) for s, m in pairs if plan.tracked(m).missing(s.folder, {"run.json": run_inputs(s)})]


def start_runs(plan: Plan, tracker: Any) -> None:
    """Open the parent run, and one run per subject and model that is not in MLflow yet."""
    tags = {"data": "simulated" if plan.is_simulated else "nsd"}
    parent = parent_key(plan)
    name = plan.config.evaluation.images or plan.config.recipe
    ray.get(tracker.start.remote(parent, name, flatten(dataclasses.asdict(plan.config)), tags))
    for subject, model in untracked(plan):
        params = {"model": model, "subject": subject.subject, "n_layers": plan.config.n_layers,
                  "n_voxels": len(subject.voxels.index), "n_train": len(subject.image_ids("train")),
                  "n_test": len(subject.image_ids("test"))} | flatten(plan.config.settings(model))  # fmt: skip
        own_tags = tags | {"model": model, "subject": str(subject.subject)}
        ray.get(tracker.start.remote(subject.run_key(model), run_name(subject, model), params, own_tags, parent))


def run_name(subject: SubjectPlan, model: str) -> str:
    """What the run of a subject and model is called."""
    return f"{model}-{subject.plan.config.n_layers} subject {subject.subject}"


def parent_key(plan: Plan) -> str:
    """What MLflow's parent run of a plan is found by."""
    return f"{plan.report.folder}/{plan.report_partition}/{plan.report_wanted['table.txt']['subjects']}"


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    out = {}
    for name, value in settings.items():
        out |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def track_report(plan: Plan, tracker: Any) -> None:
    """Log the report, and all means, to the plan's own run."""
    scores = {f"{model}_{name.removesuffix('/matched')}": estimate.mean
              for model in plan.sources for name, estimate in summary(plan, model).items()}  # fmt: skip
    files = {name: report_file(plan, name) for name in plan.report_wanted}
    curves = noise_curves(plan)
    if curves is not None:
        scores |= {f"noise {label}_{metric}": e.mean for label, own in curves.items() for metric, e in own.items()}
        files["noise.txt"] = noise_table(plan, curves).encode()
    scores = {name.replace("/", "_").replace(" ", "_"): value for name, value in scores.items()}
    ray.get(tracker.log_result.remote(parent_key(plan), scores, {"report": plan.report.uri(plan.report_partition)}, files))


def track_results(plan: Plan, tracker: Any, seconds: float | None = None) -> None:
    """Log scores, curves, checkpoints and grids of everything that is not in MLflow yet. seconds: see `settle`."""
    track_report(plan, tracker)
    for subject, model in tqdm(untracked(plan), desc="log to MLflow", unit="run"):
        names = [run_name(*pair) for pair in untracked(plan)]
        settle(plan.store, tracker, names, seconds)  # so that the files of one run wait in memory, not those of all
        key, folder = subject.run_key(model), f"{plan.model(Fit(model, 'vdvae')).folder}/{subject.folder}"
        sizes = {name: size for name, size in plan.store.sizes(folder).items() if name != "_SUCCESS"}
        if "history.json" in sizes:
            ray.get(tracker.complete_curves.remote(key, json.loads(plan.store.read_bytes(f"{folder}/history.json"))))
        small = sum(sizes.values()) <= CHECKPOINT_BYTES
        names = [name for name in sizes if small or name in ("decoder.json", "ridge_report.json")]
        files = {f"decoder/{name}": plan.store.read_bytes(f"{folder}/{name}") for name in names}
        files["grid.png"] = report_file(plan, f"subject{subject.subject:02d}.png")
        means = mean_scores(subject, model).items()
        scores = {name.replace("/matched", "").replace("/", "_"): value for name, value in means} | ridge_scores(subject)
        ray.get(tracker.log_result.remote(key, scores, {"decoder": plan.store.uri(folder)}, files))
        settle(plan.store, tracker, names, seconds)
        finish_tracking(subject, model, key)


def finish_tracking(subject: SubjectPlan, model: str, key: str) -> None:
    """Note that results are in MLflow."""
    stage = subject.plan.tracked(model)
    stage.claim()
    stage.store.write_bytes(f"{stage.folder}/{subject.folder}/run.json", json.dumps({"mlflow key": key}).encode())
    stage.finish(subject.folder, {"run.json": run_inputs(subject)})
