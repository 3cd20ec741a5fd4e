"""Bring every missing stage of a plan up to date, for all subjects in parallel.

Each function does one stage and returns at once if nothing is missing. They may be called in any process that is connected
to a Ray cluster; what they need must have been done before (`train_all_subjects` calls them in order).
"""
from __future__ import annotations

import dataclasses
import io
import json
import os
from typing import Any

import numpy as np
import ray
from tqdm import tqdm

from nsdray.cluster import ridge
from nsdray.cluster.actors import gather, run_replicas
from nsdray.cluster.data import read_samples, read_targets, write_samples, write_session, write_voxels
from nsdray.cluster.tracking import start_tracker
from nsdray.cluster.train import train_networks
from nsdray.config import digest
from nsdray.decoder import Decoder
from nsdray.generators.stage1 import enlarge, from_png
from nsdray.metrics.table import LATENT_METRICS, METRICS, format_table, latent_scores, picture_scores
from nsdray.nsd.stimuli import Stimuli
from nsdray.report import picture_grid
from nsdray.stages import Plan, SubjectPlan, layer_name
from nsdray.store import local_folder, table, view_column

CHECKPOINT_BYTES = 64 << 20  # larger models stay in the store; MLflow gets their address
N_GRID_IMAGES = 12


def start_ray(plan: Plan) -> None:
    """Connect to the cluster of $RAY_ADDRESS (which a submitted job has), else start one on this machine; check the root."""
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False, logging_level="warning")
    check_shared_root(plan)


def check_shared_root(plan: Plan) -> None:
    """Refuse a root that other nodes of the cluster cannot see, before any work is lost on it."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    if "MLFLOW_TRACKING_URI" not in os.environ:
        raise ValueError(
            f"the cluster has {len(nodes)} nodes: start an MLflow server that all of them reach and set MLFLOW_TRACKING_URI"
        )
    probe = f"probe-{os.getpid()}"
    plan.store.write_bytes(probe, b"")
    try:
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        look = ray.remote(num_cpus=0)(lambda store: probe in store.sizes(""))
        seen = ray.get([look.options(scheduling_strategy=strategy(n["NodeID"], soft=False)).remote(plan.store) for n in nodes])
    finally:
        plan.store.fs.delete_file(f"{plan.store.base}/{probe}")
    blind = [node["NodeManagerHostname"] for node, sees in zip(nodes, seen) if not sees]
    if blind:
        raise ValueError(
            f"{plan.store.root} is not shared with {', '.join(blind)}. Give a folder that all nodes mount, or an s3:// URI, "
            "as --store.root or $NSDRAY_ROOT."
        )


def prepare_betas(plan: Plan) -> None:
    """Session files to betas, betas to samples (mean over repeats)."""
    plan.betas.claim()
    tasks, dead = [], {}
    for subject in plan.subjects:
        shared = None
        for shard in plan.betas.missing(subject.folder, subject.betas_wanted):
            shared = shared or ray.put(subject)
            inputs = subject.betas_wanted[shard]
            if shard == "voxels.parquet":
                tasks.append((subject, write_voxels.remote(shared, inputs)))
            else:
                number = int(shard.removeprefix("session=").removesuffix(".parquet"))
                tasks.append((subject, write_session.remote(shared, number, shard, inputs)))
    for (subject, _), n_dead in zip(tasks, gather([ref for _, ref in tasks], "read betas", "file")):
        dead[subject.subject] = max(dead.get(subject.subject, 0), n_dead or 0)
    for number, n_dead in dead.items():
        if n_dead:
            tqdm.write(f"  warning: subject {number}: up to {n_dead} voxels are constant within a session; z-scoring zeroes them "
                       "where they stay constant")  # fmt: skip
    for subject in {task[0].subject: task[0] for task in tasks}.values():
        plan.betas.finish(subject.folder, subject.betas_wanted)

    plan.samples.claim()
    todo = {}
    for subject in plan.subjects:
        missing = {s: plan.samples.missing(subject.samples(s), subject.wanted(s)) for s in ("train", "test")}
        if any(missing.values()):
            todo[subject] = missing
    gather([write_samples.remote(subject, missing) for subject, missing in todo.items()], "average repeats", "subject")
    for subject in todo:
        for split in ("train", "test"):
            plan.samples.finish(subject.samples(split), subject.wanted(split))


def betas_missing(plan: Plan) -> bool:
    """Whether `prepare_betas` has anything to do."""
    return any(
        plan.betas.missing(s.folder, s.betas_wanted)
        or any(plan.samples.missing(s.samples(split), s.wanted(split)) for split in ("train", "test"))
        for s in plan.subjects
    )


def targets_missing(plan: Plan) -> bool:
    """Whether `extract_targets` has anything to do."""
    return any(plan.targets.missing(s.targets(split), s.targets_wanted(split))
               for s in plan.subjects for split in ("train", "test"))  # fmt: skip


def extract_targets(plan: Plan) -> None:
    """Stimuli to VDVAE latents."""
    plan.targets.claim()
    calls, partitions = {}, {}
    for subject in plan.subjects:
        for split in ("test", "train"):
            partition, wanted = subject.targets(split), subject.targets_wanted(split)
            missing = plan.targets.missing(partition, wanted)
            if missing:
                partitions[partition] = wanted
            for part in subject.parts(split):
                if part.name in missing:  # test images of several subjects are one partition
                    calls[partition, part.name] = ("extract", (plan.targets, partition, part, wanted[part.name]))
    run_replicas(plan, list(calls.values()), "extract latents")
    for partition, wanted in partitions.items():
        plan.targets.finish(partition, wanted)


def unfitted(plan: Plan, model: str) -> list[SubjectPlan]:
    """Subjects whose model is missing or was fitted to other data."""
    stage = plan.model(model)
    return [s for s in plan.subjects if stage.missing(s.folder, {"decoder.json": s.inputs})]


def fit_models(plan: Plan, tracker: Any) -> None:
    """Fit every regressor of every subject."""
    for model in plan.config.models:
        plan.model(model).claim()
        subjects = unfitted(plan, model)
        if model == "ridge":
            gather([ridge.fit_ridge(subject) for subject in subjects], "fit ridge", "subject")
        else:
            train_networks(subjects, model, tracker)


@ray.remote(num_cpus=1)
def predict_subject(subject: SubjectPlan, model: str) -> None:
    """Decode a subject's test betas to latents, score them before rescaling, and write both."""
    plan, stage = subject.plan, subject.plan.predictions(model)
    columns = [layer_name(i) for i in range(plan.config.n_layers)]
    image_ids, betas = read_samples(subject, "test")
    truth = read_targets(subject, "test", columns)
    with local_folder(plan.model(model), subject.folder) as folder:
        decoder = Decoder.load(folder)
        scores = {f"{name}/{pairing}": values for name, pairing, values
                  in latent_scores(truth, decoder.raw_predictions(betas))}  # fmt: skip
        layers = decoder.predict(betas)
    start = 0
    for part in subject.parts("test"):
        rows = slice(start, start + len(part.image_ids))
        data = {"image_id": image_ids[rows]} | {name: values[rows] for name, values in scores.items()}
        stage.write(subject.folder, part.name, table(data | {c: z[rows] for c, z in zip(columns, layers)}), subject.inputs)
        start = rows.stop


def predict_test_sets(plan: Plan) -> None:
    """Predicted latents of every test image, and their errors."""
    todo = []
    for model in plan.config.models:
        stage = plan.predictions(model)
        stage.claim()
        todo += [(stage, s, model) for s in plan.subjects if stage.missing(s.folder, s.wanted())]
    gather([predict_subject.remote(subject, model) for _, subject, model in todo], "predict", "test set")
    for stage, subject, _ in todo:
        stage.finish(subject.folder, subject.wanted())


def reconstruct_test_sets(plan: Plan) -> None:
    """Stage-1 pictures from predicted and from true latents."""
    calls, finish = {}, {}
    plan.truth.claim()
    for model in plan.config.models:
        plan.reconstructions(model).claim()
    for subject in plan.subjects:
        jobs = [(plan.predictions(m), subject.folder, plan.reconstructions(m), subject.folder, subject.wanted())
                for m in plan.config.models]  # fmt: skip
        true = subject.targets("test")
        jobs.append((plan.targets, true, plan.truth, true, subject.targets_wanted("test")))
        for source, source_partition, target, partition, wanted in jobs:
            missing = target.missing(partition, wanted)
            if missing:
                finish[target.folder, partition] = (target, partition, wanted)
            for part in missing:
                arguments = (source, source_partition, target, partition, part, wanted[part])
                calls[target.folder, partition, part] = ("reconstruct", arguments)
    run_replicas(plan, list(calls.values()), "reconstruct")
    for target, partition, wanted in finish.values():
        target.finish(partition, wanted)


def seen_pictures(subject: SubjectPlan) -> np.ndarray:
    """The test images as the subject saw them, uint8 (n, h, w, 3)."""
    with Stimuli(subject.plan.layout.stimuli) as stimuli:
        return stimuli.read(subject.image_ids("test"))


def decoded_pictures(subject: SubjectPlan, model: str | None) -> np.ndarray:
    """Stage-1 pictures of the test images at the stimuli's size; model None: from the true latents."""
    plan = subject.plan
    stage, partition = (plan.truth, subject.targets("test")) if model is None else (plan.reconstructions(model), subject.folder)
    cells = [cell for part in subject.parts("test") for cell in stage.read(partition, part.name, ["stage1"])["stage1"]]
    with Stimuli(plan.layout.stimuli) as stimuli:
        return enlarge(np.stack([from_png(cell.as_py()) for cell in cells]), stimuli.shape)


@ray.remote(num_cpus=1)
def evaluate_subject(subject: SubjectPlan, model: str) -> None:
    """Score one subject's test set: a row per image, metric and pairing."""
    plan, image_ids = subject.plan, subject.image_ids("test")
    latents = [plan.predictions(model).read(subject.folder, p.name, [f"{m}/{k}" for m in LATENT_METRICS for k in ("matched", "chance")])
               for p in subject.parts("test")]  # fmt: skip
    scores = [(*name.split("/"), np.concatenate([view_column(part, name) for part in latents])) for name in latents[0].column_names]
    scores += picture_scores(seen_pictures(subject), decoded_pictures(subject, model), decoded_pictures(subject, None))
    columns = {
        "image_id": np.concatenate([image_ids for _ in scores]),
        "metric": [name for name, _, values in scores for _ in values],
        "pairing": [pairing for _, pairing, values in scores for _ in values],
        "value": np.concatenate([values for _, _, values in scores]),
    }
    plan.metrics(model).write(subject.folder, "scores.parquet", table(columns), subject.inputs)


def evaluate_test_sets(plan: Plan) -> None:
    """Score every test set."""
    todo = []
    for model in plan.config.models:
        stage = plan.metrics(model)
        stage.claim()
        todo += [(stage, s, model) for s in plan.subjects if stage.missing(s.folder, {"scores.parquet": s.inputs})]
    gather([evaluate_subject.remote(subject, model) for _, subject, model in todo], "evaluate", "test set")
    for stage, subject, _ in todo:
        stage.finish(subject.folder, {"scores.parquet": subject.inputs})


def mean_scores(subject: SubjectPlan, model: str) -> dict[str, float]:
    """Mean over test images, by "metric/pairing"."""
    data = subject.plan.metrics(model).read(subject.folder, "scores.parquet").to_pandas()
    means = data.groupby(["metric", "pairing"], observed=True)["value"].mean()
    return {f"{metric}/{pairing}": float(value) for (metric, pairing), value in means.items()}


def score_rows(plan: Plan) -> list[dict[str, object]]:
    """Rows of the comparison: a subject and model each, and the mean over subjects, with chance and ceiling in between."""
    rows = []
    names = [f"{metric}/matched" for metric in METRICS] + ["pixcorr/chance", "ssim/chance", "pixcorr/ceiling", "ssim/ceiling"]
    headings = [name.removesuffix("/matched").replace("/", " ") for name in names]
    for model in plan.config.models:
        scores = {subject.subject: mean_scores(subject, model) for subject in plan.subjects}
        for number, values in scores.items():
            rows.append({"model": model, "subject": number} | {h: values[n] for h, n in zip(headings, names)})
        mean = {h: float(np.mean([values[n] for values in scores.values()])) for h, n in zip(headings, names)}
        rows.append({"model": model, "subject": "mean"} | mean)
    return rows


def subject_grid(subject: SubjectPlan) -> bytes:
    """PNG of the first test images: seen | true latents | one column per model."""
    plan = subject.plan
    columns = {"seen": seen_pictures(subject), "true latents": decoded_pictures(subject, None)}
    columns |= {model: decoded_pictures(subject, model) for model in plan.config.models}
    kind = "SIMULATED brain data" if plan.is_simulated else "NSD"
    title = f"subject {subject.subject}, {plan.config.n_layers} layers, {kind}"
    grid = picture_grid({k: v[:N_GRID_IMAGES] for k, v in columns.items()}, title, n_columns_side=2)
    buffer = io.BytesIO()
    grid.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def parent_key(plan: Plan) -> str:
    """Key of the run that holds a plan's runs."""
    return f"{plan.config.recipe}-{digest([plan.metrics(model).hash for model in plan.config.models])}"


def start_runs(plan: Plan, tracker: Any) -> None:
    """Open the parent run and one run per subject and model."""
    source = "simulated" if plan.is_simulated else "nsd"
    parent = parent_key(plan)
    ray.get(tracker.start.remote(parent, plan.config.recipe, flatten(dataclasses.asdict(plan.config)), {"data": source}))
    for model in plan.config.models:
        for subject in plan.subjects:
            params = {"model": model, "subject": subject.subject, "n_layers": plan.config.n_layers,
                      "n_voxels": len(subject.voxels.index), "n_train": len(subject.image_ids("train")),
                      "n_test": len(subject.image_ids("test"))} | flatten(plan.config.settings(model))  # fmt: skip
            tags = {"data": source, "model": model, "subject": str(subject.subject)}
            name = f"{model}-{plan.config.n_layers} subject {subject.subject}"
            ray.get(tracker.start.remote(subject.run_key(model), name, params, tags, parent))


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    out = {}
    for name, value in settings.items():
        out |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def untracked(plan: Plan) -> list[tuple[SubjectPlan, str]]:
    """Subjects and models whose results are not in MLflow yet."""
    return [(s, m) for m in plan.config.models for s in plan.subjects
            if plan.tracked(m).missing(s.folder, {"run.json": s.inputs})]  # fmt: skip


def track_results(plan: Plan, tracker: Any) -> None:
    """Log curves, scores, checkpoints and grids of everything that is not in MLflow yet."""
    todo = untracked(plan)
    grids = {subject.subject: subject_grid(subject) for subject in {s.subject: s for s, _ in todo}.values()}
    for subject, model in tqdm(todo, desc="log to MLflow", unit="run"):
        key, stage = subject.run_key(model), plan.model(model)
        folder = f"{stage.folder}/{subject.folder}"
        sizes = plan.store.sizes(folder)
        files = {"grid.png": grids[subject.subject]}
        if "history.json" in sizes:
            history = json.loads(plan.store.read_bytes(f"{folder}/history.json"))
            ray.get(tracker.complete_curves.remote(key, history))
        if sum(sizes.values()) <= CHECKPOINT_BYTES:
            files |= {f"decoder/{name}": plan.store.read_bytes(f"{folder}/{name}") for name in sizes if name != "_SUCCESS"}
        else:
            files["decoder/decoder.json"] = plan.store.read_bytes(f"{folder}/decoder.json")
        scores = {name.replace("/matched", "").replace("/", "_"): value for name, value in mean_scores(subject, model).items()}
        ray.get(tracker.log_result.remote(key, scores, {"decoder": plan.store.uri(folder)}, files))
        ray.get(tracker.finish.remote(key))
        run = {"key": key, "grid": f"{plan.tracked(model).folder}/{subject.folder}/grid.png"}
        plan.tracked(model).claim()
        plan.store.write_bytes(run["grid"], grids[subject.subject])
        plan.store.write_bytes(f"{plan.tracked(model).folder}/{subject.folder}/run.json", json.dumps(run).encode())
        plan.tracked(model).finish(subject.folder, {"run.json": subject.inputs, "grid.png": subject.inputs})
    if todo:
        parent = parent_key(plan)
        means = {f"{row['model']}_{name}": value for row in score_rows(plan) if row["subject"] == "mean"
                 for name, value in row.items() if isinstance(value, float)}  # fmt: skip
        means = {name.replace(" ", "_"): value for name, value in means.items()}
        ray.get(tracker.log_result.remote(parent, means, {}, {"table.txt": format_table(score_rows(plan)).encode()}))
        ray.get(tracker.finish.remote(parent))


def grids(plan: Plan) -> list[str]:
    """Addresses of the picture grids, one per subject."""
    stage = plan.tracked(plan.config.models[0])
    return [stage.uri(f"{subject.folder}/grid.png") for subject in plan.subjects]


def train_all_subjects(plan: Plan) -> None:
    """Bring everything up to date, from raw NSD to MLflow. Finished stages are skipped."""
    if untracked(plan):
        start_ray(plan)
        tracker = start_tracker(plan.store)
        start_runs(plan, tracker)
        prepare_betas(plan)
        extract_targets(plan)
        fit_models(plan, tracker)
        predict_test_sets(plan)
        reconstruct_test_sets(plan)
        evaluate_test_sets(plan)
        track_results(plan, tracker)
    else:
        print("Everything is up to date.")
