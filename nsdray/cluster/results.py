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
from nsdray.cluster.noise import is_possible, make_noise_levels, noise_curves, noise_table
from nsdray.cluster.preflight import checked, require_inputs
from nsdray.cluster.report import report_file, write_report
from nsdray.cluster.ridge_report import ridge_scores
from nsdray.cluster.scores import mean_scores, summary
from nsdray.cluster.tracking import settle, start_tracker, tracking_uri
from nsdray.config import digest
from nsdray.metrics.published import PUBLISHED
from nsdray.stages import IMAGES, STAGE2_ONLY, Fit, Plan, SubjectPlan
from nsdray.store import Inputs, Stage, Store, redacted

CHECKPOINT_BYTES = 64 << 20  # larger models stay in the store; MLflow gets their address


def train_all_subjects(plan: Plan) -> None:
    """Bring everything up to date, from raw NSD to MLflow. Finished stages are skipped."""
    require_inputs(plan)
    everything = (*plan.replicates, plan)
    if not (any(map(untracked, everything)) or plan.report.missing(plan.report_partition, plan.report_wanted)):
        print("Everything is up to date.")
        return
    forget_lost_runs(plan)
    with checked(plan), tracking(plan) as tracker:
        for each in everything:
            start_runs(each, tracker)
            make_pictures(each, tracker)
            run.embed_test_sets(each)
            run.evaluate_test_sets(each)
            write_report(each)
        for each in everything:
            track_results(each, tracker)
        track_published(plan, tracker)


def make_pictures(plan: Plan, tracker: Any) -> None:
    """Every stage up to the pictures of the test sets."""
    run.prepare_betas(plan)
    run.extract_targets(plan)
    run.fit_models(plan, tracker)
    run.predict_test_sets(plan)
    run.reconstruct_test_sets(plan)


def reconstruct_all_subjects(plan: Plan) -> None:
    """Bring the pictures of the test sets up to date, and no more: nothing is scored or logged, so the weights of the metrics'
    networks need not be there. `train_all_subjects` does the rest, learning curves included."""
    needs = ("betas", "stimuli", "captions", "checkpoints")
    require_inputs(plan, needs)
    unscored = dataclasses.replace(plan.config, evaluation=dataclasses.replace(plan.config.evaluation, skip_missing=True))
    plan = Plan(unscored)  # its pictures are the same ones
    everything = (*plan.replicates, plan)
    stages = [(each, name) for each in everything for name in each.picture_stages]
    if not run.anything_missing([found for stage in stages for _, _, found in run.picture_partitions(*stage)]):
        print("Everything is up to date.")
        return
    with checked(plan, needs, tracked=False):
        for each in everything:
            make_pictures(each, tracker=None)


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
            settle(plan.store, tracker, seconds=5.0)
        raise
    tracker.close.remote("FINISHED")
    settle(plan.store, tracker)


def judge(plan: Plan) -> None:
    """Score reconstructions made elsewhere: nothing of nsdray's own is made or needed."""
    needs = ("stimuli", "metrics")
    require_inputs(plan, needs)
    if not (untracked(plan) or plan.report.missing(plan.report_partition, plan.report_wanted)):
        print("Everything is up to date.")
        return
    forget_lost_runs(plan)
    with checked(plan, needs), tracking(plan) as tracker:
        start_runs(plan, tracker)
        run.import_images(plan)
        run.embed_test_sets(plan)
        run.evaluate_test_sets(plan)
        write_report(plan)
        track_results(plan, tracker)
        track_published(plan, tracker)


def noise_sensitivity(plan: Plan) -> str:
    """Bring stage 2 under every level of noise up to date, put it into the report, and log it; returns the table."""
    if not is_possible(plan):
        raise ValueError("noise sensitivity needs a stage 2 that starts from the stage-1 picture: --stage2.start stage1")
    train_all_subjects(plan)
    stage, wanted = noise_stage(plan)
    if noise_curves(plan) is None or stage.missing(plan.report_partition, wanted):
        with checked(plan):
            make_noise_levels(plan)
        report_again(plan)
        stage.claim()
        plan.store.write_bytes(f"{stage.folder}/{plan.report_partition}/run.json", b"{}")
        stage.finish(plan.report_partition, wanted)
    return noise_table(plan, noise_curves(plan))


def noise_stage(plan: Plan) -> tuple[Stage, dict[str, Inputs]]:
    """Where it is noted that the noise levels are in the report and in MLflow, and what for."""
    subjects = plan.report_wanted["report.html"]
    return plan.store.stage("runs/noise", {"report": plan.report.hash}), {"run.json": subjects | mlflow_inputs(plan.store)}


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


def forget_lost_runs(plan: Plan) -> None:
    """Take back that results are in an MLflow that is gone, before the tracker makes a new database where it was."""
    for each in (*plan.replicates, plan):
        for subject, model in untracked(each):
            each.tracked(model).begin(subject.folder, {"run.json": run_inputs(subject)})
    stage, wanted = published_stage(plan)
    stage.begin("all", wanted)


def published_stage(plan: Plan) -> tuple[Stage, dict[str, Inputs]]:
    """Where it is noted that the published figures are in MLflow, and what for."""
    records = [dataclasses.asdict(record) for record in PUBLISHED]
    return plan.store.stage("runs/published", {"records": records}), {"run.json": mlflow_inputs(plan.store)}


def track_published(plan: Plan, tracker: Any) -> None:
    """Log the published figures once, each as a run tagged source=published, under the names that ours have."""
    stage, wanted = published_stage(plan)
    if not stage.missing("all", wanted):
        return
    for record in PUBLISHED:
        subjects, name = "-".join(map(str, record.subjects)), f"published: {record.label} (NSD)"
        key = f"published/{digest(dataclasses.asdict(record))}"
        params = {"system": record.system, "subject": subjects, "n_layers": record.n_layers, "reference": record.source}
        tags = {"source": "published", "data": "nsd", "caution": record.caution}
        ray.get(tracker.start.remote(key, name, params, tags))
        scores = {metric_name(f"stage2/{metric}" if "/" in metric else f"latents/{metric}"): value
                  for metric, value in record.values.items()}  # fmt: skip
        ray.get(tracker.log_result.remote(key, scores, {}, {}))
        ray.get(tracker.finish.remote(key))
    settle(plan.store, tracker, ["the published figures"])
    stage.claim()
    plan.store.write_bytes(f"{stage.folder}/all/run.json", b"{}")
    stage.finish("all", wanted)


def untracked(plan: Plan) -> list[tuple[SubjectPlan, str]]:
    """Subjects and models whose results are not in MLflow yet."""
    pairs = [(subject, model) for model in plan.models for subject in plan.subjects]
    return [(s, m) for s, m in pairs if plan.tracked(m).missing(s.folder, {"run.json": run_inputs(s)})]


def start_runs(plan: Plan, tracker: Any) -> None:
    """Open the parent run; below it one per model or control for the means over subjects, and one per subject and model that is
    not in MLflow yet."""
    tags, config, parent = {"data": "simulated" if plan.is_simulated else "nsd"}, plan.config, parent_key(plan)
    name = f"{config.evaluation.images or config.recipe}{suffix(plan)}"
    ray.get(tracker.start.remote(parent, name, flatten(dataclasses.asdict(config)), tags))
    subjects = "-".join(str(subject.subject) for subject in plan.subjects)
    for model in plan.sources:
        params = {"model": model, "subject": subjects} | ({} if plan.is_referee else {"n_layers": config.n_layers})
        own = f"{parent}/{model}", f"{label(plan, model)} subjects {subjects}{suffix(plan)}"
        ray.get(tracker.start.remote(*own, params, tags | {"model": model, "subject": subjects}, parent))
    for subject, model in untracked(plan):
        params = {"model": model, "subject": subject.subject, "n_test": len(subject.image_ids("test"))}
        if not plan.is_referee:
            params |= {"n_layers": config.n_layers, "n_voxels": len(subject.voxels.index),
                       "n_train": len(subject.image_ids("train"))} | flatten(config.settings(model))  # fmt: skip
        own_tags = tags | {"model": model, "subject": str(subject.subject)}
        ray.get(tracker.start.remote(subject.run_key(model), run_name(subject, model), params, own_tags, parent))


def suffix(plan: Plan) -> str:
    """Beside NSD's figures, a name that warns."""
    return " (SIMULATED)" if plan.is_simulated else ""


def label(plan: Plan, model: str) -> str:
    """A model's or control's name, with its depth if it has one."""
    return model if plan.is_referee or model in STAGE2_ONLY else f"{model}-{plan.config.n_layers}"


def run_name(subject: SubjectPlan, model: str) -> str:
    """What the run of a subject and model is called."""
    return f"{label(subject.plan, model)} subject {subject.subject}{suffix(subject.plan)}"


def parent_key(plan: Plan) -> str:
    """What MLflow's parent run of a plan is found by."""
    return f"{plan.report.folder}/{plan.report_partition}/{plan.report_wanted['table.txt']['subjects']}"


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    out = {}
    for name, value in settings.items():
        out |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def metric_name(name: str) -> str:
    """MLflow's name of a score: "stage2/mini/ssim/matched" is stage2_mini_ssim, and so is that of pictures made elsewhere."""
    return name.removesuffix("/matched").replace(f"{IMAGES}/", "stage2/").replace("/", "_").replace(" ", "_")


def track_report(plan: Plan, tracker: Any) -> None:
    """Log the report to the plan's own run, and the means over subjects of each model and control to theirs."""
    parent = parent_key(plan)
    for model in plan.sources:
        scores = {metric_name(name): estimate.mean for name, estimate in summary(plan, model).items()}
        ray.get(tracker.log_result.remote(f"{parent}/{model}", scores, {}, {}))
        ray.get(tracker.finish.remote(f"{parent}/{model}"))
    files, scores, curves = {name: report_file(plan, name) for name in plan.report_wanted}, {}, noise_curves(plan)
    if curves is not None:
        scores = {metric_name(f"noise {noise}/{metric}"): e.mean for noise, own in curves.items() for metric, e in own.items()}
        files["noise.txt"] = noise_table(plan, curves).encode()
    ray.get(tracker.log_result.remote(parent, scores, {"report": plan.report.uri(plan.report_partition)}, files))
    ray.get(tracker.finish.remote(parent))


def track_results(plan: Plan, tracker: Any) -> None:
    """Log the report, and scores, curves, checkpoints and grids of everything that is not in MLflow yet."""
    pairs = untracked(plan)
    names = [run_name(*pair) for pair in pairs]
    settle(plan.store, tracker, names)
    track_report(plan, tracker)
    for i, (subject, model) in enumerate(tqdm(pairs, desc="log to MLflow", unit="run")):
        key, tags, files = subject.run_key(model), {}, {"grid.png": report_file(plan, f"subject{subject.subject:02d}.png")}
        scores = {metric_name(name): value for name, value in mean_scores(subject, model).items()}
        if not plan.is_referee:
            folder = f"{plan.model(Fit(model, 'vdvae')).folder}/{subject.folder}"
            sizes = {name: size for name, size in plan.store.sizes(folder).items() if name != "_SUCCESS"}
            if "history.json" in sizes:
                ray.get(tracker.complete_curves.remote(key, json.loads(plan.store.read_bytes(f"{folder}/history.json"))))
            small = sum(sizes.values()) <= CHECKPOINT_BYTES
            kept = [name for name in sizes if small or name in ("decoder.json", "ridge_report.json")]
            files |= {f"decoder/{name}": plan.store.read_bytes(f"{folder}/{name}") for name in kept}
            tags, scores = {"decoder": plan.store.uri(folder)}, scores | ridge_scores(subject)
        ray.get(tracker.log_result.remote(key, scores, tags, files))
        ray.get(tracker.finish.remote(key))
        settle(plan.store, tracker, names[i:])  # so that the files of one run wait in memory, not those of all
        finish_tracking(subject, model, key)


def finish_tracking(subject: SubjectPlan, model: str, key: str) -> None:
    """Note that results are in MLflow."""
    stage = subject.plan.tracked(model)
    stage.claim()
    stage.store.write_bytes(f"{stage.folder}/{subject.folder}/run.json", json.dumps({"mlflow key": key}).encode())
    stage.finish(subject.folder, {"run.json": run_inputs(subject)})
