"""Before hours of work: is every file there and whole, is there room, and could this cluster do it at all?

Each check gives findings and raises nothing, so that all that is wrong is told at once. `jobs/preflight.py` prints them as a
table; every long job does its work within `checked`, which stops with all that failed.
"""
from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from nsdray.cluster.actors import pool_size
from nsdray.cluster.autoscale import enough_gpus
from nsdray.cluster.estimate import Size, replica_weights, ridge_weight_bytes, stage_sizes
from nsdray.cluster.ridge_room import REMEDY, memory_needed
from nsdray.cluster.run import check_shared_root, start_ray
from nsdray.cluster.train import parallel_trainings
from nsdray.models.backbones import check_backbone
from nsdray.models.checkpoint import weight_shapes, weights_file
from nsdray.models.clip import check_clip
from nsdray.models.vdvae import check_vdvae
from nsdray.nsd.betas import check_session, session_shape
from nsdray.nsd.layout import CAPTION_SPLITS
from nsdray.nsd.stimuli import Stimuli
from nsdray.stages import CLIP_CONFIGS, VDVAE_CONFIGS, Plan, SubjectPlan, file_size

NEEDS = ("betas", "stimuli", "captions", "checkpoints", "metrics")
"""What a job may need; betas are the subjects' sessions, regions and design, metrics the weights of the suites' networks."""
STAGES = {"betas": ("betas", "samples"), "checkpoints": ("targets",), "metrics": ("",)}
"""What is made of it: beginnings of stages' names. A job that needs metrics makes everything."""
FRAMING = 1.05
"""Files against the values in them: Parquet's and safetensors' headers, and small files."""
GPU_WAIT_S = 60.0
"""Seconds to wait for a GPU to look at: all may be in use."""


@dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    what: str
    found: str
    """What is there, or what is wrong and how to mend it."""
    ok: bool = True


def ask(what: str, answer: Callable[[], str]) -> Finding:
    """A finding from a function that says what is there, or raises what is wrong."""
    try:
        return Finding(what, answer())
    except (FileNotFoundError, ValueError, OSError) as error:
        return Finding(what, str(error), ok=False)


def size_text(n_bytes: float) -> str:
    """"1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


# ---- files


def input_findings(plan: Plan, needs: Sequence[str] = NEEDS, thorough: bool = False) -> list[Finding]:
    """Every file of NSD and every checkpoint that a plan needs. thorough: also whether the tensors in weight files are those of
    the models, which takes seconds."""
    found = []
    if "betas" in needs:
        found += [ask(f"subject {subject.subject}", lambda s=subject: subject_answer(s)) for subject in plan.subjects]
    if "stimuli" in needs:
        found.append(ask("stimuli", lambda: stimuli_answer(plan)))
    if "captions" in needs and "clip_text" in plan.kinds:
        found.append(ask("captions", lambda: captions_answer(plan)))
    if "checkpoints" in needs:
        found += checkpoint_findings(plan, thorough)
    if "metrics" in needs:
        found += metric_findings(plan, thorough)
    return found


def subject_answer(subject: SubjectPlan) -> str:
    """Sessions and regions of a subject; ValueError with all sessions that are damaged."""
    voxels, damaged = subject.voxels, []
    for path in subject.sessions.values():
        try:
            check_session(path)
            if session_shape(path)[1] != tuple(voxels.shape):
                damaged.append(f"{path} has another grid, {session_shape(path)[1]}, than the regions, {tuple(voxels.shape)}")
        except (ValueError, OSError) as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError("; ".join(damaged))
    n_bytes = sum(path.stat().st_size for path in subject.sessions.values())
    return (f"{len(subject.sessions)} sessions, {size_text(n_bytes)}; {len(voxels.index)} voxels; "
            f"{len(subject.image_ids('train'))} training and {len(subject.image_ids('test'))} test images")  # fmt: skip


def stimuli_answer(plan: Plan) -> str:
    with Stimuli(plan.layout.stimuli) as stimuli:
        height, width = stimuli.shape
        return f"{stimuli.n_images} pictures of {height} x {width}, {size_text(file_size(plan.layout.stimuli))}"


def captions_answer(plan: Plan) -> str:
    """Whether the table of stimuli and both caption files are there and not cut short."""
    file_size(plan.layout.stim_info)
    for split in CAPTION_SPLITS:
        path = plan.layout.captions(split)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: jobs/download_nsd.py fetches COCO's captions; without them: "
                                    "--stage2.context vision")  # fmt: skip
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 16))
            if not file.read().rstrip().endswith(b"}"):
                raise ValueError(f"{path} was cut short; delete it and fetch it again")
    return " and ".join(f"captions_{split}.json" for split in CAPTION_SPLITS)


def checkpoint_findings(plan: Plan, thorough: bool) -> list[Finding]:
    """Weight files: there, whole, and if thorough those of the models."""

    def vdvae() -> str:
        if thorough:
            check_vdvae(plan.vdvae_checkpoint, VDVAE_CONFIGS[plan.config.targets.vdvae]())
        return weights_answer(plan.vdvae_checkpoint)

    def clip() -> str:
        if thorough:
            check_clip(plan.clip_checkpoint, CLIP_CONFIGS[plan.config.clip.model]())
        return weights_answer(plan.clip_checkpoint)

    def diffusion() -> str:
        folder = plan.diffusion_folder
        if thorough:
            from nsdray.models.versatile_diffusion import check_versatile_diffusion  # diffusers takes seconds

            check_versatile_diffusion(folder)
        return "; ".join(weights_answer(weights_file(folder / part)) for part in ("image_unet", "text_unet", "vae"))

    stage2 = [ask("CLIP", clip), ask("Versatile Diffusion", diffusion)] if plan.has_stage2 else []
    return [ask("VDVAE", vdvae), *stage2]


def metric_findings(plan: Plan, thorough: bool) -> list[Finding]:
    """The same for the networks of the suites' metrics; what may be left out is not wrong when it is missing."""

    def backbone(name: str) -> str:
        if thorough:
            check_backbone(name, plan.backbone_file(name))
        return weights_answer(plan.backbone_file(name))

    found = []
    for name in dict.fromkeys(metric.backbone for metric in plan.suite_metrics if metric.backbone):
        answer = ask(f"metric {name}", lambda name=name: backbone(name))
        if not answer.ok and plan.config.evaluation.skip_missing and not _is_there(plan, name):
            answer = replace(answer, ok=True, found=f"left out: {answer.found}")
        elif not answer.ok:
            answer = replace(answer, found=f"{answer.found} Without it: --evaluation.skip-missing, or another suite.")
        found.append(answer)
    return found


def _is_there(plan: Plan, name: str) -> bool:
    try:
        return plan.backbone_file(name).is_file()
    except FileNotFoundError:
        return False


def weights_answer(path: Path) -> str:
    """"vdvae.safetensors: 812 tensors, 7 MB"; ValueError for a file that was cut short."""
    return f"{path.parent.name}/{path.name}: {len(weight_shapes(path))} tensors, {size_text(path.stat().st_size)}"


# ---- room


def sizes_of(plan: Plan, needs: Sequence[str] = NEEDS) -> list[Size]:
    """The estimates of what a job with these needs makes. Without betas, as for pictures made elsewhere, none."""
    beginnings = tuple(name for need in needs for name in STAGES.get(need, ()))
    return [size for size in stage_sizes(plan) if size.stage.startswith(beginnings)] if "betas" in needs else []


def disk_finding(plan: Plan, needs: Sequence[str] = NEEDS) -> Finding:
    """Room against the estimates. Asks for files that `input_findings` has found whole."""
    needed = FRAMING * sum(max(0, size.disk) for size in sizes_of(plan, needs))
    text = f"{size_text(needed)} to be written below {plan.store.root} at most"
    if not plan.store.is_local:
        return Finding("disk", text)
    free = shutil.disk_usage(_existing(Path(plan.store.base))).free
    ok = free > needed
    return Finding("disk", f"{text}, {size_text(free)} free" + ("" if ok else ": free some, or choose another --store.root"), ok)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def size_table(plan: Plan) -> str:
    """The estimate of every stage."""
    lines = [f"{'stage':<28}{'still to write':>16}{'largest task':>16}"]
    lines += [f"{s.stage:<28}{size_text(max(0, s.disk)):>16}{size_text(s.memory):>16}" for s in stage_sizes(plan)]
    return "\n".join(lines)


# ---- the cluster


def cluster_findings(plan: Plan, needs: Sequence[str] = NEEDS) -> list[Finding]:
    """Whether the cluster that this process is connected to could ever do what is asked, and whether its nodes see the files."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    found = resource_findings(plan, ray.cluster_resources(), nodes, needs) + node_findings(plan, nodes, needs)
    if "checkpoints" in needs and all(finding.ok for finding in found):
        found.append(replica_finding(plan, ray.cluster_resources(), nodes))
    return found


def resource_findings(
    plan: Plan, total: dict[str, float], nodes: list[dict[str, Any]], needs: Sequence[str] = NEEDS
) -> list[Finding]:
    """The cluster's resources against what is asked: what could never be scheduled would wait without a word."""
    settings = plan.config.cluster
    cpus, gpus = total.get("CPU", 0), total.get("GPU", 0)
    found = [Finding("cluster", f"{len(nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs")]
    found.append(ask("replicas", lambda: replicas_answer(plan, total, nodes)))
    if set(NEEDS) <= set(needs) and any(fit.regressor != "ridge" for fit in plan.fits):
        found.append(ask("training workers", lambda: workers_answer(plan, total, nodes)))
    if sizes := sizes_of(plan, needs):
        largest, most = max(sizes, key=lambda size: size.memory), most_of("memory", nodes)
        ok, text = largest.memory <= most, f"largest task {size_text(largest.memory)} ({largest.stage})"
        text += f"; the largest node offers {size_text(most)}"
        found.append(Finding("memory of a node", text + ("" if ok else ": take one with more, or fewer --data.rois"), ok))
    if set(NEEDS) <= set(needs) and any(fit.regressor == "ridge" for fit in plan.fits):
        found += [ridge_finding(plan, nodes), *weight_findings(plan)]
    if settings.n_gpus is not None and gpus < settings.n_gpus:
        found.append(Finding("GPUs", f"cluster.n_gpus is {settings.n_gpus}, but the cluster has {gpus:g}", ok=False))
    return found


def most_of(resource: str, nodes: list[dict[str, Any]]) -> float:
    """What the node with the most of a resource offers; memory in bytes."""
    return max(node["Resources"].get(resource, 0) for node in nodes)


def ridge_finding(plan: Plan, nodes: list[dict[str, Any]]) -> Finding:
    """What a subject's ridges hold on the largest node, with as many workers as it runs at once, the object store included."""
    fits = [fit for fit in plan.fits if fit.regressor == "ridge"]
    largest = max((node["Resources"] for node in nodes), key=lambda own: own.get("memory", 0))
    memory, room = largest.get("memory", 0), largest.get("memory", 0) + largest.get("object_store_memory", 0)
    needed = max(max(memory_needed(subject, fits, largest.get("CPU", 1), memory).values()) for subject in plan.subjects)
    text = f"{size_text(needed)} at most for a subject, all its workers and the object store together"
    ok = needed <= room
    return Finding("memory of ridge", f"{text}; the largest node has {size_text(room)}" + ("" if ok else f". {REMEDY}"), ok)


def weight_findings(plan: Plan) -> list[Finding]:
    """What the weights of each ridge take, which test images do without."""
    found, config = [], plan.config.ridge
    for fit in plan.fits:
        if fit.regressor == "ridge" and config.weights in ("all", fit.kind):
            n_targets = sum(math.prod(shape) for shape in plan.shapes(fit.kind))
            n_bytes = sum(ridge_weight_bytes(subject, n_targets) for subject in plan.subjects)
            work = sum(weight_operations(subject, n_targets) for subject in plan.subjects)
            text = f"{config.coefficients}: {size_text(n_bytes)} and {work / 1e12:.2g} TFLOP, for decoding new images"
            found.append(Finding(f"weights {plan.label(fit)}", f"{text}; without: --ridge.weights none"))
    return found


def weight_operations(subject: SubjectPlan, n_targets: int) -> float:
    """Operations for the weights of one ridge beyond those for its test predictions."""
    config, n, p = subject.plan.config.ridge, len(subject.image_ids("train")), len(subject.voxels.index)
    coefficients = 4.0 * n * n * n_targets if config.per_target else 2.0 * n * n * p
    return coefficients + (2.0 * n * p * n_targets if config.coefficients == "primal" else 0)


def replicas_answer(plan: Plan, total: dict[str, float], nodes: list[dict[str, Any]]) -> str:
    """How many replicas there will be; ValueError if they could never start."""
    settings, share = plan.config.cluster, plan.config.cluster.gpus_per_replica
    if total.get("GPU", 0) and share > 1:
        most = most_of("GPU", nodes)
        if share > most:
            raise ValueError(f"cluster.gpus_per_replica is {share:g}, but no node has more than {most:g}; it would wait for ever")
    n, resources = pool_size(settings, total, n_calls=10**6)
    needs = {name.removeprefix("num_").upper()[:-1]: amount for name, amount in resources.items()}
    if lacking := [name for name, amount in needs.items() if total.get(name, 0) < amount]:
        raise ValueError(f"a replica needs {needs}, but the cluster has no {' and no '.join(lacking)}; it would wait for ever. "
                         "A cluster that grows is asked for GPUs by --cluster.n-gpus")  # fmt: skip
    return f"{n}, each with {', '.join(f'{amount:g} {name}' for name, amount in needs.items())}"


def workers_answer(plan: Plan, total: dict[str, float], nodes: list[dict[str, Any]]) -> str:
    """How many networks train at a time; ValueError if not one could."""
    settings, n = plan.config.cluster, parallel_trainings(plan.config.cluster, total)
    most = most_of("CPU", nodes)
    if settings.cpus_per_train_worker > most:
        wanted = f"cluster.cpus_per_train_worker is {settings.cpus_per_train_worker:g}"
        raise ValueError(f"{wanted}, but no node has more than {most:g}; it would wait for ever")
    return f"{n} networks at a time, each with {settings.n_train_workers} workers"


def node_findings(plan: Plan, nodes: list[dict[str, Any]], needs: Sequence[str] = NEEDS) -> list[Finding]:
    """Whether every node sees raw NSD and the checkpoints under the same paths."""
    if len(nodes) < 2:
        return []
    paths = [plan.layout.root]
    if "metrics" in needs:
        paths += plan.backbone_files.values()
    if "checkpoints" in needs:
        paths += [plan.vdvae_checkpoint, *([plan.clip_checkpoint, plan.diffusion_folder] if plan.has_stage2 else [])]
    look = ray.remote(num_cpus=0)(_absent)
    place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    answers = ray.get([look.options(scheduling_strategy=place(n["NodeID"], soft=False)).remote(paths) for n in nodes])
    return [Finding(f"node {node['NodeManagerHostname']}",
                    f"does not see {', '.join(absent)}; all nodes need them under the same path (NFS, or a copy)" if absent
                    else "sees NSD and the checkpoints", not absent)
            for node, absent in zip(nodes, answers)]  # fmt: skip


def _absent(paths: Iterable[Path]) -> list[str]:
    return [str(path) for path in paths if not path.exists()]


def replica_finding(plan: Plan, total: dict[str, float], nodes: list[dict[str, Any]]) -> Finding:
    """Memory against the weights of replicas: a replica's share of a GPU, which a task on a GPU node tells; without GPUs, a
    node's memory against all the replicas that may come to lie on it."""
    weights, settings = replica_weights(plan), plan.config.cluster
    name, most = max(weights.items(), key=lambda item: item[1])
    text = f"a replica's weights: {', '.join(f'{size_text(n)} {what}' for what, n in weights.items())}"
    if total.get("GPU", 0):
        share = min(1.0, settings.gpus_per_replica)
        memory, where, remedy = share * gpu_memory(share), "its share of a GPU", "Raise --cluster.gpus-per-replica"
    else:
        n = min(pool_size(settings, total, n_calls=10**6)[0], max(1, math.floor(most_of("CPU", nodes))))
        memory = most_of("memory", nodes) / n
        where, remedy = f"its share of a node with {n}", "Fewer --cluster.n-replicas, or a node with more memory"
    if math.isnan(memory):
        return Finding("replica", f"{text}; no GPU was free to be looked at within {GPU_WAIT_S:g} s: the job would wait for one")
    ok = 2 * most < memory  # half for pictures in work
    return Finding("replica", f"{text}; {where}: {size_text(memory)}" + ("" if ok else f": too little for {name}. {remedy}"), ok)


def gpu_memory(share: float) -> float:
    """Bytes of a whole GPU of the cluster; NaN if a share of none became free."""
    answer = ray.remote(num_gpus=share, max_retries=0)(_gpu_memory).remote()
    try:
        return ray.get(answer, timeout=GPU_WAIT_S)
    except GetTimeoutError:
        ray.cancel(answer)
        return math.nan


def _gpu_memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


# ---- at the start of a job


def require(findings: Iterable[Finding]) -> None:
    """ValueError with everything that is not right."""
    wrong = [finding for finding in findings if not finding.ok]
    if wrong:
        lines = "\n".join(f"  {finding.what}: {finding.found}" for finding in wrong)
        raise ValueError(f"{len(wrong)} thing{'s' * (len(wrong) > 1)} to mend first:\n{lines}")


def require_inputs(plan: Plan, needs: Sequence[str] = NEEDS) -> None:
    """Stop with all files that are missing, before anything else is done."""
    require(input_findings(plan, needs))


@contextlib.contextmanager
def checked(plan: Plan, needs: Sequence[str] = NEEDS, tracked: bool = True) -> Iterator[None]:
    """A cluster that can do the plan, for the time of a job: files, keys of weights and room are checked before Ray is started,
    then GPUs are waited for, then the cluster as it is now is checked. tracked: whether the job writes to MLflow.

    ValueError with all that is wrong; else what was found is told in one line.
    """
    require(input_findings(plan, needs, thorough=True))
    disk = disk_finding(plan, needs)
    require([disk])
    start_ray(plan, tracked)
    with enough_gpus(plan.config.cluster):
        check_shared_root(plan, tracked)  # again: nodes may have come
        findings = cluster_findings(plan, needs)
        require(findings)
        told = [finding.found for finding in (disk, *findings) if finding.what in ("disk", "cluster", "memory of a node")]
        print(f"checked: files are whole; {'; '.join(told)}")
        yield
