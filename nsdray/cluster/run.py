"""Bring every missing stage of a plan up to date, for all subjects in parallel.

Each function does one stage and returns at once if nothing is missing. They may be called in any process that is connected
to a Ray cluster; what they need must have been done before (`train_all_subjects` calls them in order).
"""
from __future__ import annotations

import os
import uuid
from typing import Any

import numpy as np
import ray
from tqdm import tqdm

from nsdray.cluster import ridge
from nsdray.cluster.actors import gather, run_replicas
from nsdray.cluster.data import read_samples, read_targets, write_samples, write_session, write_voxels
from nsdray.cluster.train import train_networks
from nsdray.decoder import Decoder
from nsdray.generators.stage1 import enlarge, from_png
from nsdray.metrics.table import LATENT_METRICS, latent_scores, picture_scores
from nsdray.nsd.stimuli import Stimuli
from nsdray.stages import Plan, SubjectPlan, layer_name
from nsdray.store import Inputs, Stage, local_folder, table, view_column

Partition = tuple[Stage, str, dict[str, Inputs]]
"""A stage, a partition of it, and the shards that it must hold with what they are made from."""


def start_ray(plan: Plan) -> None:
    """Connect to the cluster of $RAY_ADDRESS (which a submitted job has), else start one on this machine; check the root."""
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False, logging_level="error")
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
    probe = f"probe-{uuid.uuid4().hex}"
    plan.store.write_bytes(probe, b"")
    try:
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        look = ray.remote(num_cpus=0)(lambda store: probe in store.sizes(""))
        seen = ray.get([look.options(scheduling_strategy=strategy(n["NodeID"], soft=False)).remote(plan.store) for n in nodes])
    finally:
        plan.store.delete(probe)
    blind = [node["NodeManagerHostname"] for node, sees in zip(nodes, seen) if not sees]
    if blind:
        raise ValueError(
            f"{plan.store.root} is not shared with {', '.join(blind)}. Give a folder that all nodes mount, or an s3:// URI, "
            "as --store.root or $NSDRAY_ROOT."
        )


# Each stage: the partitions that a plan wants of it, and what makes the missing shards.


def betas_partitions(plan: Plan) -> list[Partition]:
    return [(plan.betas, subject.folder, subject.betas_wanted) for subject in plan.subjects]


def samples_partitions(plan: Plan) -> list[Partition]:
    return [(plan.samples, s.samples(split), s.wanted(split)) for s in plan.subjects for split in ("train", "test")]


def targets_partitions(plan: Plan) -> list[Partition]:
    """Test images of several subjects are one partition if they are the same."""
    partitions = {
        s.targets(split): (plan.targets, s.targets(split), s.targets_wanted(split))
        for s in plan.subjects
        for split in ("test", "train")
    }
    return list(partitions.values())


def anything_missing(partitions: list[Partition]) -> bool:
    """Whether any shard of these has to be made."""
    return any(stage.missing(partition, wanted) for stage, partition, wanted in partitions)


def begin(partitions: list[Partition]) -> dict[tuple[str, str], list[str]]:
    """Claim the stages; missing shards by (stage folder, partition)."""
    for stage in {stage.folder: stage for stage, _, _ in partitions}.values():
        stage.claim()
    return {(stage.folder, partition): stage.begin(partition, wanted) for stage, partition, wanted in partitions}


def finish(partitions: list[Partition]) -> None:
    """Mark all of these as finished."""
    for stage, partition, wanted in partitions:
        stage.finish(partition, wanted)


def prepare_betas(plan: Plan) -> None:
    """Session files to betas, betas to samples (mean over repeats)."""
    partitions = betas_partitions(plan)
    missing = begin(partitions)
    numbers, tasks = [], []
    for subject in plan.subjects:
        shards = missing[plan.betas.folder, subject.folder]
        shared = ray.put(subject) if shards else None
        for shard in shards:
            inputs = subject.betas_wanted[shard]
            if shard == "voxels.parquet":
                tasks.append(write_voxels.remote(shared, inputs))
            else:
                session = int(shard.removeprefix("session=").removesuffix(".parquet"))
                tasks.append(write_session.remote(shared, session, shard, inputs))
            numbers.append(subject.subject)
    dead: dict[int, int] = {}
    for number, n_dead in zip(numbers, gather(tasks, "read betas", "file")):
        dead[number] = max(dead.get(number, 0), n_dead or 0)
    for number in (number for number, n_dead in dead.items() if n_dead):
        tqdm.write(f"  warning: subject {number}: up to {dead[number]} voxels are constant within a session; "
                   "those that are constant throughout are ignored (their z-score is 0)")  # fmt: skip
    finish(partitions)

    partitions = samples_partitions(plan)
    missing = begin(partitions)
    tasks = []
    for subject in plan.subjects:
        shards = {split: missing[plan.samples.folder, subject.samples(split)] for split in ("train", "test")}
        if any(shards.values()):
            n_bytes = 2 * len(subject.trials.image_id) * len(subject.voxels.index) + 200_000_000
            tasks.append(write_samples.options(memory=n_bytes).remote(subject, shards))
    gather(tasks, "average repeats", "subject")
    finish(partitions)


def extract_targets(plan: Plan) -> None:
    """Stimuli to VDVAE latents."""
    partitions = targets_partitions(plan)
    missing = begin(partitions)
    calls = {}
    for subject in plan.subjects:
        for split in ("test", "train"):
            partition, wanted = subject.targets(split), subject.targets_wanted(split)
            for part in subject.parts(split):
                if part.name in missing[plan.targets.folder, partition]:
                    calls[partition, part.name] = ("extract", (plan.targets, partition, part, wanted[part.name]))
    run_replicas(plan, list(calls.values()), "extract latents")
    finish(partitions)


def fit_models(plan: Plan, tracker: Any) -> None:
    """Fit every regressor of every subject. Each marks its own folder as finished, with all its files."""
    for model in plan.config.models:
        stage = plan.model(model)
        stage.claim()
        subjects = [s for s in plan.subjects if stage.begin(s.folder, {"decoder.json": s.inputs})]
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
    with local_folder(plan.model(model), subject.folder) as folder:
        decoder = Decoder.load(folder)
        latents = decoder.raw_predictions(betas)
    truth = read_targets(subject, "test", columns)
    scores = {f"{name}/{pairing}": values for name, pairing, values in latent_scores(truth, latents)}
    data = {"image_id": image_ids} | scores | dict(zip(columns, decoder.rescaled(latents)))
    start = 0
    for part in subject.parts("test"):
        rows = slice(start, start + len(part.image_ids))
        stage.write(subject.folder, part.name, table({k: v[rows] for k, v in data.items()}), subject.inputs)
        start = rows.stop


def per_test_set(plan: Plan, stage_of, wanted_of, task, description: str) -> None:
    """Run task(subject, model) for every subject and model whose partition of stage_of(model) lacks anything."""
    pairs = [(subject, model) for model in plan.config.models for subject in plan.subjects]
    partitions = [(stage_of(model), subject.folder, wanted_of(subject)) for subject, model in pairs]
    missing = begin(partitions)
    todo = [pair for pair, (stage, folder, _) in zip(pairs, partitions) if missing[stage.folder, folder]]
    gather([task.remote(subject, model) for subject, model in todo], description, "test set")
    finish(partitions)


def predict_test_sets(plan: Plan) -> None:
    """Predicted latents of every test image, and their errors."""
    per_test_set(plan, plan.predictions, SubjectPlan.wanted, predict_subject, "predict")


def reconstruct_test_sets(plan: Plan) -> None:
    """Stage-1 pictures from predicted and from true latents."""
    sources: dict[tuple[str, str], tuple[Partition, Stage, str]] = {}
    for subject in plan.subjects:
        true, wanted = subject.targets("test"), subject.targets_wanted("test")
        sources[plan.truth.folder, true] = (plan.truth, true, wanted), plan.targets, true
        for model in plan.config.models:
            target = plan.reconstructions(model), subject.folder, subject.wanted()
            sources[target[0].folder, subject.folder] = target, plan.predictions(model), subject.folder
    partitions = [target for target, _, _ in sources.values()]
    missing = begin(partitions)
    calls = [
        ("reconstruct", (source, source_partition, stage, partition, part, wanted[part]))
        for (stage, partition, wanted), source, source_partition in sources.values()
        for part in missing[stage.folder, partition]
    ]
    run_replicas(plan, calls, "reconstruct")
    finish(partitions)


def seen_pictures(subject: SubjectPlan, n_images: int | None = None) -> np.ndarray:
    """The first test images as the subject saw them, uint8 (n, h, w, 3); None: all."""
    with Stimuli(subject.plan.layout.stimuli) as stimuli:
        return stimuli.read(subject.image_ids("test")[:n_images])


def decoded_pictures(subject: SubjectPlan, model: str | None, n_images: int | None = None) -> np.ndarray:
    """Stage-1 pictures of the first test images at the stimuli's size; model None: from the true latents."""
    plan = subject.plan
    stage, partition = (plan.reconstructions(model), subject.folder) if model else (plan.truth, subject.targets("test"))
    tables = [stage.read(partition, part.name, ["stage1"]) for part in subject.parts("test")]
    cells = [cell for data in tables for cell in data["stage1"]][:n_images]
    with Stimuli(plan.layout.stimuli) as stimuli:
        return enlarge(np.stack([from_png(cell.as_py()) for cell in cells]), stimuli.shape)


@ray.remote(num_cpus=1)
def evaluate_subject(subject: SubjectPlan, model: str) -> None:
    """Score one subject's test set: a row per image, metric and pairing."""
    plan, image_ids = subject.plan, subject.image_ids("test")
    names = [f"{metric}/{pairing}" for metric in LATENT_METRICS for pairing in ("matched", "chance")]
    latents = [plan.predictions(model).read(subject.folder, part.name, names) for part in subject.parts("test")]
    scores = [(*name.split("/"), np.concatenate([view_column(part, name) for part in latents])) for name in names]
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
    per_test_set(plan, plan.metrics, lambda s: {"scores.parquet": s.inputs}, evaluate_subject, "evaluate")
