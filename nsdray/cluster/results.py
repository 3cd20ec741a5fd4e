"""Scores, pictures and MLflow runs of a finished plan, and the whole way to them."""
from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import ray
from tqdm import tqdm

from nsdray.cluster import run
from nsdray.cluster.tracking import start_tracker, tracking_uri
from nsdray.metrics.pixel import PIXEL_METRICS
from nsdray.metrics.table import LATENT_METRICS, format_table
from nsdray.report import picture_grid
from nsdray.stages import Fit, Plan, SubjectPlan
from nsdray.store import Inputs

CHECKPOINT_BYTES = 64 << 20  # larger models stay in the store; MLflow gets their address
N_GRID_IMAGES = 12


def train_all_subjects(plan: Plan) -> None:
    """Bring everything up to date, from raw NSD to MLflow. Finished stages are skipped."""
    if not (untracked(plan) or plan.report.missing(plan.report_partition, plan.report_wanted)):
        print("Everything is up to date.")
        return
    run.start_ray(plan)
    tracker = start_tracker(plan.store)
    start_runs(plan, tracker)
    try:
        run.prepare_betas(plan)
        run.extract_targets(plan)
        run.fit_models(plan, tracker)
        run.predict_test_sets(plan)
        run.reconstruct_test_sets(plan)
        run.embed_test_sets(plan)
        run.evaluate_test_sets(plan)
        write_report(plan)
        track_results(plan, tracker)
    except BaseException:
        ray.get(tracker.close.remote("FAILED"))
        raise
    ray.get(tracker.close.remote("FINISHED"))


def mean_scores(subject: SubjectPlan, model: str) -> dict[str, float]:
    """Mean over test images, by "stage/metric/pairing"."""
    data = subject.plan.metrics(model).read(subject.folder, "scores.parquet").to_pandas()
    means = data.groupby(["stage", "metric", "pairing"], observed=True)["value"].mean()
    return {"/".join(key): float(value) for key, value in means.items()}


def table_columns(plan: Plan) -> list[str]:
    """"stage/metric" of the comparison, in order."""
    semantic = ["clip"] if plan.has_stage2 else []
    pictures = [f"{stage}/{metric}" for stage in plan.picture_stages for metric in [*PIXEL_METRICS, *semantic]]
    return [f"latents/{metric}" for metric in LATENT_METRICS] + pictures


def score_rows(plan: Plan) -> list[dict[str, object]]:
    """Rows of the comparison: one per subject and model, the mean over subjects, and the means of wrong pairs and of the
    pictures from the truth."""
    rows: list[dict[str, object]] = []
    columns = table_columns(plan)
    for model in plan.config.models:
        scores = {subject.subject: mean_scores(subject, model) for subject in plan.subjects}
        everyone = list(scores.values())
        lines = {number: [own[f"{name}/matched"] for name in columns] for number, own in scores.items()}
        lines["mean"] = np.mean(list(lines.values()), 0).tolist()
        for pairing in ("chance", "ceiling"):
            known = [f"{name}/{pairing}" for name in columns]
            lines[pairing] = [float(np.mean([own[k] for own in everyone])) if k in everyone[0] else None for k in known]
        rows += [{"model": model, "subject": who} | dict(zip(columns, line)) for who, line in lines.items()]
    return rows


def report_table(plan: Plan) -> str:
    """The table that a job prints."""
    source = "SIMULATED brain data" if plan.is_simulated else "NSD"
    title = f"Means over test images, {source}, {plan.config.n_layers} VDVAE layers"
    return f"{title}\n{format_table(score_rows(plan))}\n"


def subject_grid(subject: SubjectPlan) -> bytes:
    """PNG of the first test images: seen | each model's stage 1 and stage 2 | stage 2 from the truth."""
    plan, n = subject.plan, N_GRID_IMAGES
    columns = {"seen": run.seen_pictures(subject, n)}
    for model in plan.config.models:
        for number, stage in enumerate(plan.picture_stages, 1):
            columns[f"{model}, stage {number}"] = run.decoded_pictures(subject, model, stage, n)
    columns["from the truth"] = run.decoded_pictures(subject, None, plan.picture_stages[-1], n)
    source = "SIMULATED brain data" if plan.is_simulated else "NSD"
    grid = picture_grid(columns, f"subject {subject.subject}, {plan.config.n_layers} layers, {source}", n_columns_side=2)
    buffer = io.BytesIO()
    grid.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def write_report(plan: Plan) -> None:
    """Table and picture grids, into the store."""
    stage, partition = plan.report, plan.report_partition
    stage.claim()
    if stage.begin(partition, plan.report_wanted):
        plan.store.write_bytes(f"{stage.folder}/{partition}/table.txt", report_table(plan).encode())
        for subject in plan.subjects:
            plan.store.write_bytes(f"{stage.folder}/{partition}/subject{subject.subject:02d}.png", subject_grid(subject))
        stage.finish(partition, plan.report_wanted)


def report_file(plan: Plan, name: str) -> bytes:
    """A file of the written report: "table.txt" or "subject01.png"."""
    return plan.store.read_bytes(f"{plan.report.folder}/{plan.report_partition}/{name}")


def run_inputs(subject: SubjectPlan) -> Inputs:
    """What run.json is made from: the results, and the MLflow that they were written to."""
    uri = tracking_uri(subject.plan.store)
    database = Path(uri.removeprefix("sqlite:///"))
    gone = uri.startswith("sqlite:///") and not database.exists()
    return subject.inputs | {"mlflow": uri, "database": "gone" if gone else "there"}


def untracked(plan: Plan) -> list[tuple[SubjectPlan, str]]:
    """Subjects and models whose results are not in MLflow yet."""
    pairs = [(subject, model) for model in plan.config.models for subject in plan.subjects]
    return [(s, m) for s, m in pairs if plan.tracked(m).missing(s.folder, {"run.json": run_inputs(s)})]


def start_runs(plan: Plan, tracker: Any) -> None:
    """Open the parent run, and one run per subject and model that is not in MLflow yet."""
    tags = {"data": "simulated" if plan.is_simulated else "nsd"}
    parent = parent_key(plan)
    ray.get(tracker.start.remote(parent, plan.config.recipe, flatten(dataclasses.asdict(plan.config)), tags))
    for subject, model in untracked(plan):
        params = {"model": model, "subject": subject.subject, "n_layers": plan.config.n_layers,
                  "n_voxels": len(subject.voxels.index), "n_train": len(subject.image_ids("train")),
                  "n_test": len(subject.image_ids("test"))} | flatten(plan.config.settings(model))  # fmt: skip
        name = f"{model}-{plan.config.n_layers} subject {subject.subject}"
        own_tags = tags | {"model": model, "subject": str(subject.subject)}
        ray.get(tracker.start.remote(subject.run_key(model), name, params, own_tags, parent))


def parent_key(plan: Plan) -> str:
    """What MLflow's parent run of a plan is found by."""
    return f"{plan.report.folder}/{plan.report_partition}/{plan.report_wanted['table.txt']['subjects']}"


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    out = {}
    for name, value in settings.items():
        out |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def track_results(plan: Plan, tracker: Any) -> None:
    """Log scores, curves, checkpoints and grids of everything that is not in MLflow yet."""
    means = {f"{row['model']}_{name.replace('/', '_')}": value for row in score_rows(plan) if row["subject"] == "mean"
             for name, value in row.items() if isinstance(value, float)}  # fmt: skip
    files = {name: report_file(plan, name) for name in plan.report_wanted}
    ray.get(tracker.log_result.remote(parent_key(plan), means, {"report": plan.report.uri(plan.report_partition)}, files))
    for subject, model in tqdm(untracked(plan), desc="log to MLflow", unit="run"):
        key, folder = subject.run_key(model), f"{plan.model(Fit(model, 'vdvae')).folder}/{subject.folder}"
        sizes = {name: size for name, size in plan.store.sizes(folder).items() if name != "_SUCCESS"}
        if "history.json" in sizes:
            ray.get(tracker.complete_curves.remote(key, json.loads(plan.store.read_bytes(f"{folder}/history.json"))))
        names = list(sizes) if sum(sizes.values()) <= CHECKPOINT_BYTES else ["decoder.json"]
        files = {f"decoder/{name}": plan.store.read_bytes(f"{folder}/{name}") for name in names}
        files["grid.png"] = report_file(plan, f"subject{subject.subject:02d}.png")
        means = mean_scores(subject, model).items()
        scores = {name.replace("/matched", "").replace("/", "_"): value for name, value in means}
        ray.get(tracker.log_result.remote(key, scores, {"decoder": plan.store.uri(folder)}, files))
        stage = plan.tracked(model)
        stage.claim()
        plan.store.write_bytes(f"{stage.folder}/{subject.folder}/run.json", json.dumps({"mlflow key": key}).encode())
        stage.finish(subject.folder, {"run.json": run_inputs(subject)})
