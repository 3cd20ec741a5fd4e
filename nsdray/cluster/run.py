"""Bring every missing stage of a plan up to date, for all subjects in parallel.

Each function does one stage and returns at once if nothing is missing. They may be called in any process that is connected
to a Ray cluster; what they need must have been done before (`train_all_subjects` calls them in order).
"""
from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import ray
from tqdm import tqdm

from nsdray.cluster import ridge
from nsdray.cluster.actors import Rows, gather, read_rows, run_replicas, write_pictures
from nsdray.cluster.data import read_samples, read_targets, write_samples, write_session, write_voxels
from nsdray.cluster.estimate import evaluate_memory, write_samples_memory
from nsdray.cluster.train import train_networks
from nsdray.decoder import Decoder
from nsdray.generators.stage1 import enlarge, from_png
from nsdray.metrics.table import LATENT_METRICS, feature_scores, picture_scores, retrieval_scores
from nsdray.nsd.stimuli import Stimuli
from nsdray.stages import IMAGES, KINDS, ROWS_PER_PICTURES, STAGE2_ONLY, Fit, Part, Plan, SubjectPlan
from nsdray.store import Inputs, Stage, local_folder, table, view_column

Partition = tuple[Stage, str, dict[str, Inputs]]
"""A stage, a partition of it, and the shards that it must hold with what they are made from."""
ALL = slice(None)


def start_ray(plan: Plan, tracked: bool = True) -> None:
    """Connect to the cluster of $RAY_ADDRESS (which a submitted job has), else start one on this machine; check the root.

    tracked: whether the job writes to MLflow.
    """
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False, logging_level="error")
    check_shared_root(plan, tracked)


def check_shared_root(plan: Plan, tracked: bool = True) -> None:
    """Refuse a root that other nodes of the cluster cannot see, before any work is lost on it."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    if tracked and "MLFLOW_TRACKING_URI" not in os.environ:
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


def targets_partitions(plan: Plan, kind: str) -> list[Partition]:
    """A partition for each subject's training images, and one for all shared images."""
    partitions = {
        s.targets(split): (plan.targets(kind), s.targets(split), s.targets_wanted(split, kind))
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
            tasks.append(write_samples.options(memory=write_samples_memory(subject)).remote(subject, shards))
    gather(tasks, "average repeats", "subject")
    finish(partitions)


def extract_targets(plan: Plan) -> None:
    """Stimuli to VDVAE latents, stimuli and captions to CLIP tokens."""
    partitions = [partition for kind in plan.kinds for partition in targets_partitions(plan, kind)]
    missing = begin(partitions)
    calls = {}
    for kind in plan.kinds:
        stage = plan.targets(kind)
        for subject in plan.subjects:
            for split in ("test", "train"):
                partition, wanted = subject.targets(split), subject.targets_wanted(split, kind)
                for part in subject.target_parts(split):
                    if part.name in missing[stage.folder, partition]:
                        calls[kind, partition, part.name] = (f"extract_{kind}", (stage, partition, part, wanted[part.name]))
    run_replicas(plan, list(calls.values()), "extract targets")
    finish(partitions)


def fit_models(plan: Plan, tracker: Any) -> None:
    """Fit every regressor of every subject. Each marks its own folder as finished, with all its files."""
    ridges: dict[SubjectPlan, list[Fit]] = {subject: [] for subject in plan.subjects}
    for fit in plan.fits:
        stage = plan.model(fit)
        stage.claim()
        unfitted = [s for s in plan.subjects if stage.begin(s.folder, decoder_files(stage, s))]
        if fit.regressor == "ridge":  # its test predictions are made on the way
            unpredicted = [s for s in plan.subjects if plan.predictions(fit).begin(s.folder, s.wanted())]
            for subject in plan.subjects:
                if subject in unfitted or subject in unpredicted:
                    ridges[subject].append(fit)
        else:
            train_networks(unfitted, fit, tracker)
    ridge.fit_ridges(ridges)


def decoder_files(stage: Stage, subject: SubjectPlan) -> dict[str, Inputs]:
    """Files of a subject's decoder: all that were there when it was finished, decoder.json in any case."""
    return dict.fromkeys(["decoder.json", *stage.listed(subject.folder)], subject.inputs)


@ray.remote(num_cpus=1)
def predict_mean(subject: SubjectPlan, fit: Fit) -> None:
    """The control "mean": the mean of the training targets for every test image."""
    columns, n_test = subject.plan.columns(fit.kind), len(subject.image_ids("test"))
    means = [read_targets(subject, "train", [column], fit.kind).mean(0, dtype=np.float64) for column in columns]
    rows = [np.tile(mean.astype(np.float32), (n_test, 1)) for mean in means]
    cells = [row.reshape(n_test, *shape) for row, shape in zip(rows, subject.plan.shapes(fit.kind))]
    ridge.write_predictions(subject, fit, np.concatenate(rows, 1), cells)


@ray.remote(num_cpus=1)
def predict_subject(subject: SubjectPlan, fit: Fit) -> None:
    """Decode a subject's test betas, score the predictions before rescaling, and write both."""
    _, betas = read_samples(subject, "test")
    with local_folder(subject.plan.model(fit), subject.folder) as folder:
        decoder = Decoder.load(folder)
        raw = decoder.raw_predictions(betas)
    ridge.write_predictions(subject, fit, raw, decoder.rescaled(raw))


def predict_test_sets(plan: Plan) -> None:
    """Predicted targets of every test image, and their errors."""
    controls = [Fit("mean", kind) for kind in plan.kinds] if "mean" in plan.sources else []
    pairs = [(subject, fit) for fit in [*plan.fits, *controls] for subject in plan.subjects]
    partitions = [(plan.predictions(fit), subject.folder, subject.wanted()) for subject, fit in pairs]
    missing = begin(partitions)
    todo = [pair for pair, (stage, folder, _) in zip(pairs, partitions) if missing[stage.folder, folder]]
    predict = {True: predict_mean, False: predict_subject}
    gather([predict[fit.regressor == "mean"].remote(subject, fit) for subject, fit in todo], "predict", "test set")
    finish(partitions)


def picture_partitions(plan: Plan, name: str) -> list[tuple[SubjectPlan, str | None, Partition]]:
    """Partitions of "stage1" or "stage2": of every model, control and subject, and of the truth once for all who saw the
    same."""
    found = {}
    for model in (None, *plan.sources):
        for subject in plan.subjects:
            partition, wanted = subject.pictures(model)
            if name in plan.pictures_of(model):
                found[model, partition] = subject, model, (plan.pictures_of(model)[name], partition, wanted)
    return list(found.values())


def reconstruct_test_sets(plan: Plan) -> None:
    """Stage-1 pictures from predicted and from true latents, then stage-2 pictures from these and tokens."""
    reconstruct(plan, "stage1", stage1_call)
    if plan.has_stage2:
        reconstruct(plan, "stage2", stage2_call)


def import_images(plan: Plan) -> None:
    """Reconstructions made elsewhere, into the store: reading them is quick, so no replicas are needed."""
    partitions = [partition for _, _, partition in picture_partitions(plan, IMAGES)]
    missing = begin(partitions)
    for subject, (stage, partition, wanted) in zip(plan.subjects, partitions):
        for part in Part.split(subject.image_ids("test"), ROWS_PER_PICTURES):
            if part.name in missing[stage.folder, partition]:
                write_pictures(stage, partition, part, IMAGES, subject.foreign.read(part.image_ids), 0, wanted[part.name])
    finish(partitions)


def stage1_call(subject: SubjectPlan, model: str | None) -> tuple[str, tuple]:
    """The replica's method for stage-1 pictures, and its arguments beside the shard."""
    return "reconstruct_stage1", (rows_of(subject, model, "vdvae"),)


def stage2_call(subject: SubjectPlan, model: str | None) -> tuple[str, tuple]:
    """The same for stage-2 pictures."""
    plan = subject.plan
    if model == "vae":
        return "round_trip", ()
    if model == "nearest":
        train = plan.targets("clip_vision"), subject.targets("train"), [part.name for part in subject.parts("train")]
        return "find_nearest", (train, subject.image_ids("train"), rows_of(subject, model, "clip_vision"))
    tokens = (rows_of(subject, model, kind) if kind in plan.kinds else None for kind in KINDS[1:])
    return "reconstruct_stage2", (plan.stage1(model), *tokens)


def reconstruct(plan: Plan, name: str, call_of: Callable[[SubjectPlan, str | None], tuple[str, tuple]]) -> None:
    """Make the missing shards of "stage1" or "stage2"."""
    found = picture_partitions(plan, name)
    missing = begin([partition for _, _, partition in found])
    calls = []
    for subject, model, (stage, partition, wanted) in found:
        for part in Part.split(subject.image_ids("test"), ROWS_PER_PICTURES):
            if part.name in missing[stage.folder, partition]:
                method, sources = call_of(subject, model)
                calls.append((method, (stage, partition, part, wanted[part.name], *sources)))
    run_replicas(plan, calls, name)
    finish([partition for _, _, partition in found])


def rows_of(subject: SubjectPlan, model: str | None, kind: str) -> Rows:
    """Where the latents or tokens for a model's pictures lie; None: the truth."""
    plan = subject.plan
    if model is None:
        return plan.targets(kind), subject.targets("test"), [part.name for part in subject.target_parts("test")]
    fit = Fit(model, kind) if kind == "vdvae" else plan.token_fit(model, kind)
    return plan.predictions(fit), subject.folder, [part.name for part in subject.parts("test")]


def embed_test_sets(plan: Plan) -> None:
    """What the suites' networks make of what was seen and of every picture, each once."""
    found = {}
    for subject in plan.subjects:
        partition, wanted = subject.pictures(None)
        found[None, partition] = subject, None, (plan.features(None), partition, wanted)
    for name in plan.picture_stages:
        for subject, _, (stage, partition, wanted) in picture_partitions(plan, name):
            found[stage.folder, partition] = subject, stage, (plan.features(stage), partition, wanted)
    missing = begin([partition for _, _, partition in found.values()])
    calls = [
        ("embed", (stage, partition, part, wanted[part.name], source))
        for subject, source, (stage, partition, wanted) in found.values()
        for part in Part.split(subject.image_ids("test"), ROWS_PER_PICTURES)
        if part.name in missing[stage.folder, partition]
    ]
    run_replicas(plan, calls, "features")
    finish([partition for _, _, partition in found.values()])


def seen_pictures(subject: SubjectPlan, rows: np.ndarray | slice = ALL) -> np.ndarray:
    """Some test images (n_rows,) as the subject saw them, uint8 (n_rows, h, w, 3)."""
    with Stimuli(subject.plan.layout.stimuli) as stimuli:
        return stimuli.read(subject.image_ids("test")[rows])


def made_pictures(subject: SubjectPlan, model: str | None, stage: str, rows: np.ndarray) -> np.ndarray:
    """Pictures "stage1" or "stage2" of some test images (n_rows,) in the size that they were made in, uint8 (n_rows, h, w, 3);
    model None: those from the truth. Only the shards that hold them are read."""
    source, (partition, wanted) = getattr(subject.plan, stage)(model), subject.pictures(model)
    shards, pictures = list(wanted), {}
    for shard in np.unique(rows // ROWS_PER_PICTURES):
        cells = source.read(partition, shards[shard], [stage])[stage]
        for row in rows[rows // ROWS_PER_PICTURES == shard]:
            pictures[row] = from_png(cells[int(row % ROWS_PER_PICTURES)].as_py())
    return np.stack([pictures[row] for row in rows])


def decoded_pictures(subject: SubjectPlan, model: str | None, stage: str, rows: np.ndarray) -> np.ndarray:
    """The same at the stimuli's size, to be looked at."""
    with Stimuli(subject.plan.layout.stimuli) as stimuli:
        return enlarge(made_pictures(subject, model, stage, rows), stimuli.shape)


def read_features(subject: SubjectPlan, pictures: Stage | None, model: str | None, metric: str) -> np.ndarray:
    """A metric's features of the test images' pictures, or of the stimuli, (n, n_features)."""
    partition, wanted = subject.pictures(model)
    stage = subject.plan.features(pictures)
    return np.concatenate([view_column(stage.read(partition, shard, [metric]), metric) for shard in wanted])


def prediction_scores(subject: SubjectPlan, model: str) -> list[tuple[str, str, str, np.ndarray]]:
    """The errors of predicted latents, as they were written beside them."""
    names = [f"{metric}/{pairing}" for metric in LATENT_METRICS for pairing in ("matched", "chance")]
    stage = subject.plan.predictions(Fit(model, "vdvae"))
    parts = [stage.read(subject.folder, part.name, names) for part in subject.parts("test")]
    return [("latents", *name.split("/"), np.concatenate([view_column(part, name) for part in parts])) for name in names]


def token_scores(subject: SubjectPlan, model: str) -> list[tuple[str, str, str, np.ndarray]]:
    """Retrieval by the CLIP-vision tokens that are predicted beside a model's latents."""
    if "clip_vision" not in subject.plan.kinds:
        return []
    ids, places = subject.image_ids("test"), (rows_of(subject, source, "clip_vision") for source in (None, model))
    truth, predicted = (np.stack(read_rows(rows, ids), 1) for rows in places)
    return [("tokens", *score) for score in retrieval_scores(truth, predicted)]


@ray.remote(num_cpus=1)
def evaluate_subject(subject: SubjectPlan, model: str) -> None:
    """Score one subject's test set: a row per image, stage, metric and pairing."""
    plan, image_ids = subject.plan, subject.image_ids("test")
    scores = [] if model in (*STAGE2_ONLY, IMAGES) else prediction_scores(subject, model) + token_scores(subject, model)
    seen = partial(seen_pictures, subject)
    for stage in plan.pictures_of(model):
        sources = [source for source in (model, None) if stage in plan.pictures_of(source)]
        pictures = [partial(made_pictures, subject, source, stage) for source in sources]
        for suite in plan.config.evaluation.suites:
            scores += [(stage, *score) for score in picture_scores(suite, len(image_ids), seen, *pictures)]
        for metric in plan.suite_metrics:
            if metric.backbone in plan.backbone_files:
                features = [read_features(subject, plan.pictures_of(m)[stage], m, metric.name) for m in sources]
                truth = read_features(subject, None, None, metric.name)
                scores += [(stage, *score) for score in feature_scores(metric, truth, *features)]
    columns = {
        "image_id": np.concatenate([image_ids for _ in scores]),
        "stage": [stage for stage, _, _, values in scores for _ in values],
        "metric": [metric for _, metric, _, values in scores for _ in values],
        "pairing": [pairing for _, _, pairing, values in scores for _ in values],
        "value": np.concatenate([values for *_, values in scores]),
    }
    plan.metrics(model).write(subject.folder, "scores.parquet", table(columns), subject.inputs)


def metrics_partitions(plan: Plan) -> list[Partition]:
    """In the order of the sources, then of the subjects."""
    return [(plan.metrics(model), s.folder, {"scores.parquet": s.inputs}) for model in plan.sources for s in plan.subjects]


def evaluate_test_sets(plan: Plan) -> None:
    """Score every test set."""
    pairs = [(subject, model) for model in plan.sources for subject in plan.subjects]
    partitions = metrics_partitions(plan)
    missing = begin(partitions)
    todo = [pair for pair, (stage, folder, _) in zip(pairs, partitions) if missing[stage.folder, folder]]
    tasks = [evaluate_subject.options(memory=evaluate_memory(subject)).remote(subject, model) for subject, model in todo]
    gather(tasks, "evaluate", "test set")
    finish(partitions)
