"""How large a plan is before it is run: bytes written by each stage, memory of its largest task, weights on a GPU.

From numbers of images, voxels and targets alone. Pictures are counted as raw bytes, which PNG is never above by much, and usually
far below. What is there already is taken off.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from nsdray.cluster.data import GROUPS_PER_BLOCK
from nsdray.cluster.ridge_room import memory_needed
from nsdray.cluster.train import build
from nsdray.metrics.perceptual import Preparation, passes
from nsdray.metrics.table import N_IMAGES_BATCH
from nsdray.models.backbones import find_backbone
from nsdray.models.checkpoint import weight_shapes, weights_file
from nsdray.regressors import REGRESSORS
from nsdray.stages import ROWS_PER_PICTURES, STAGE2_ONLY, VDVAE_CONFIGS, Fit, Plan, SubjectPlan
from nsdray.store import ROWS_PER_GROUP, Stage

FLOAT, HALF = 4, 2
STIMULUS = 425 * 425 * 3
PICTURE_SIZES = {"mini": 64, "published": 512}  # of Versatile Diffusion, in pixels


@dataclass(frozen=True)
class Size:
    """One stage."""

    stage: str
    disk: int
    """Bytes still to be written, over all subjects."""
    memory: int
    """Bytes that its largest task holds in RAM."""


def stage_sizes(plan: Plan) -> list[Size]:
    """All stages of a plan, in order, those of its other seeds last. The subjects' files must be readable."""
    sizes = [*_data_sizes(plan), *_model_sizes(plan), *_picture_sizes(plan)]
    for other in plan.replicates:
        own = [*_model_sizes(other), *_picture_sizes(other)]
        sizes += [replace(size, stage=f"{size.stage}, seed {other.config.seed}") for size in own]
    return sizes


def write_samples_memory(subject: SubjectPlan) -> int:
    """What averaging one subject's repeats holds: all its trials as int16, and a session."""
    return 2 * len(subject.trials.image_id) * len(subject.voxels.index) + 200_000_000


def evaluate_memory(subject: SubjectPlan) -> int:
    """What scoring one test set holds: the largest features of truth, pictures and ceiling, and a batch of pictures as floats."""
    suites = subject.plan.config.evaluation.suites
    largest = max((n for suite in suites for n in feature_values(suite)), default=0)
    return 3 * FLOAT * len(subject.image_ids("test")) * largest + N_IMAGES_BATCH * 8 * FLOAT * STIMULUS + 200_000_000


def target_images(subject: SubjectPlan, split: str) -> int:
    """Images whose targets are made for a split."""
    return sum(len(part.image_ids) for part in subject.target_parts(split))


def _data_sizes(plan: Plan) -> list[Size]:
    betas, samples, memory = 0, 0, []
    for subject in plan.subjects:
        n_trials, n_voxels = len(subject.trials.image_id), len(subject.voxels.index)
        n_images = sum(len(subject.image_ids(split)) for split in ("train", "test"))
        repeats = math.ceil(n_trials / n_images)
        betas += HALF * n_trials * n_voxels - present(plan.betas, subject.folder)
        there = sum(present(plan.samples, subject.samples(split)) for split in ("train", "test"))
        samples += n_images * n_voxels * (FLOAT + HALF * repeats) - there
        memory.append((2 * HALF * n_trials * n_voxels // len(subject.sessions), write_samples_memory(subject)))
    sizes = [Size("betas", betas, max(m[0] for m in memory)), Size("samples", samples, max(m[1] for m in memory))]
    rows = plan.config.data.rows_per_part
    for kind in plan.kinds:
        shapes = plan.shapes(kind)
        if kind == "vdvae":  # all that are extracted, of which a regressor may use fewer
            shapes = VDVAE_CONFIGS[plan.config.targets.vdvae]().layer_shapes[: plan.config.targets.n_layers]
        values = sum(math.prod(shape) for shape in shapes)
        partitions = {s.targets(split): target_images(s, split) for s in plan.subjects for split in ("train", "test")}
        disk = sum(HALF * n * values for n in partitions.values())
        disk -= sum(_present_if_known(lambda kind=kind: plan.targets(kind), partition) for partition in partitions)
        sizes.append(Size(f"targets/{kind}", disk, rows * (STIMULUS + 2 * FLOAT * values)))
    return sizes


def _model_sizes(plan: Plan) -> list[Size]:
    sizes = []
    for fit in plan.fits:
        n_targets = sum(math.prod(shape) for shape in plan.shapes(fit.kind))
        disk = memory = predictions = 0
        for subject in plan.subjects:
            n_test = len(subject.image_ids("test"))
            own, needed = _fit_bytes(plan, fit, subject, n_targets)
            disk += own - _present_if_known(lambda fit=fit: plan.model(fit), subject.folder)
            predictions += FLOAT * n_test * n_targets - _present_if_known(lambda fit=fit: plan.predictions(fit), subject.folder)
            memory = max(memory, needed)
        sizes += [Size(f"models/{plan.label(fit)}", disk, memory),
                  Size(f"predictions/{plan.label(fit)}", predictions, 3 * FLOAT * n_test * n_targets)]  # fmt: skip
    for fit in [Fit("mean", kind) for kind in plan.kinds] if "mean" in plan.sources else []:
        n_targets = sum(math.prod(shape) for shape in plan.shapes(fit.kind))
        own = {s.folder: FLOAT * len(s.image_ids("test")) * n_targets for s in plan.subjects}
        disk = sum(n - _present_if_known(lambda fit=fit: plan.predictions(fit), folder) for folder, n in own.items())
        sizes.append(Size(f"predictions/{plan.label(fit)}", disk, 3 * max(own.values())))
    return sizes


def _fit_bytes(plan: Plan, fit: Fit, subject: SubjectPlan, n_targets: int) -> tuple[int, int]:
    """Bytes written and held for one subject's fit."""
    n_voxels, n_train = len(subject.voxels.index), len(subject.image_ids("train"))
    scaling = FLOAT * 4 * n_targets + 16 * n_voxels
    if fit.regressor == "ridge":
        config = plan.config.ridge
        ridges = [other for other in plan.fits if other.regressor == "ridge"]
        held = max(memory_needed(subject, ridges, cpus=1, memory=0).values())  # by one worker; `preflight.ridge_finding` by all
        weights = ridge_weight_bytes(subject, n_targets) if config.weights in ("all", fit.kind) else 0
        return scaling + FLOAT * n_targets + weights, held
    n_all = [len(other.voxels.index) for other in plan.subjects] if fit.is_shared else [n_voxels]
    sizes, fraction = getattr(plan.config, fit.network).sizes(), plan.config.settings(fit.regressor)["validation_fraction"]
    with torch.device("meta"):
        networks = REGRESSORS[fit.network](n_voxels, n_targets, **sizes), build(fit, n_all, n_targets, sizes)
        own, whole = (FLOAT * sum(p.numel() for p in network.parameters()) for network in networks)
    held_out = int(FLOAT * fraction * n_train * (sum(n_all) + n_targets * len(n_all)))
    blocks = 8 * GROUPS_PER_BLOCK * ROWS_PER_GROUP * (FLOAT * sum(n_all) + HALF * n_targets)
    # with a checkpoint of Ray Train: weights, the best ones, and two moments of AdamW; a gradient beside them in memory
    return scaling + own + 4 * whole // len(n_all), 5 * whole + held_out + blocks


def ridge_weight_bytes(subject: SubjectPlan, n_targets: int) -> int:
    """Of what a ridge writes for decoding new images."""
    n_voxels, n_train, config = len(subject.voxels.index), len(subject.image_ids("train")), subject.plan.config.ridge
    if config.coefficients == "primal":
        return FLOAT * n_voxels * n_targets
    return FLOAT * n_train * n_voxels + (FLOAT if config.per_target else HALF) * n_train * n_targets


def _picture_sizes(plan: Plan) -> list[Size]:
    config, sizes, n_sets = plan.config, [], 0
    pixels = {"stage1": VDVAE_CONFIGS[config.targets.vdvae]().image_size, "stage2": PICTURE_SIZES.get(config.stage2.model, 0)}
    features = FLOAT * sum(n for suite in config.evaluation.suites for n in feature_values(suite))
    for name in plan.picture_stages:
        raw, disk = 3 * pixels[name] ** 2, 0
        partitions = {(source, subject.pictures(source)[0]): len(subject.image_ids("test"))
                      for source in (None, *plan.sources) if name == "stage2" or source not in STAGE2_ONLY
                      for subject in plan.subjects}  # fmt: skip
        for (source, partition), n in partitions.items():
            disk += max(0, raw * n - _present_if_known(lambda name=name, source=source: getattr(plan, name)(source), partition))
            n_sets += n
        sizes.append(Size(f"reconstructions/{name}", disk, ROWS_PER_PICTURES * 8 * raw))
    n_test = max(len(subject.image_ids("test")) for subject in plan.subjects)
    sizes.append(Size("features", features * (n_test + n_sets), ROWS_PER_PICTURES * (STIMULUS + 2 * features)))
    return [*sizes, Size("metrics", 0, max(evaluate_memory(subject) for subject in plan.subjects))]


def present(stage: Stage, partition: str) -> int:
    """Bytes of a partition that are there."""
    return sum(stage.store.sizes(f"{stage.folder}/{partition}").values())


def _present_if_known(stage, partition: str) -> int:
    """The same for a stage whose name needs a checkpoint's digest: 0 while that is missing."""
    try:
        return present(stage(), partition)
    except (FileNotFoundError, ValueError):
        return 0


@lru_cache
def feature_values(suite: str) -> tuple[int, ...]:
    """Values that each of a suite's feature metrics keeps of one picture, from a pass over shapes alone."""
    nodes = {key: tuple(metric.node for metric in metrics) for key, metrics in passes(suite).items()}
    return tuple(n for (name, preparation), own in nodes.items() for n in _node_sizes(name, preparation, own))


def _node_sizes(name: str, preparation: Preparation, nodes: tuple[str, ...]) -> list[int]:
    sizes: list[int] = []
    with torch.device("meta"), torch.no_grad():
        network: nn.Module = find_backbone(name).build().eval()
        modules = dict(network.named_modules())
        for node in nodes:
            modules[node].register_forward_hook(lambda _module, _inputs, output: sizes.append(output.numel()))
        images = torch.zeros(1, 3, preparation.size, preparation.size)
        modules["visual"](images) if "visual" in nodes else network(images)
    return sizes


def weight_bytes(path: Path, per_value: int = FLOAT) -> int:
    """Memory of a weight file's tensors."""
    return per_value * sum(math.prod(shape) for shape in weight_shapes(path).values())


def replica_weights(plan: Plan) -> dict[str, int]:
    """Bytes of the models that a replica holds at a time. FileNotFoundError while a checkpoint is missing."""
    vdvae = weight_bytes(plan.vdvae_checkpoint)
    if not plan.has_stage2:
        return {"VDVAE": vdvae}
    clip, per_value = weight_bytes(plan.clip_checkpoint), HALF if "16" in plan.config.stage2.dtype else FLOAT
    parts = (weights_file(plan.diffusion_folder / part) for part in ("image_unet", "text_unet", "vae"))
    diffusion = sum(weight_bytes(file, per_value) for file in parts)
    return {"VDVAE and CLIP": vdvae + clip, "Versatile Diffusion and CLIP": diffusion + clip}
