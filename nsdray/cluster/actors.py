"""Model replicas held by Ray actors, and the pool that keeps them busy.

A replica reads a shard, computes, and writes a shard; the driver only hands out names. A replica that dies is started again
by Ray and its shard is done anew; since shards and batches are fixed, the result does not depend on who did it.
"""
from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError
from tqdm import tqdm

from nsdray.cluster.metrics import record, subject_label
from nsdray.config import ClusterConfig, Config
from nsdray.generators.stage1 import decode_pictures, from_png, to_png
from nsdray.generators.stage2 import refine_pictures, round_trip
from nsdray.metrics.perceptual import Metric, Preparation, passes, prepare
from nsdray.models.backbones import features, load_backbone
from nsdray.models.batching import padded_batches
from nsdray.models.clip import CLIP, load_clip
from nsdray.models.vdvae import VDVAE, VDVAEConfig, load_vdvae
from nsdray.nsd.captions import load_captions
from nsdray.nsd.layout import NSDLayout
from nsdray.nsd.stimuli import Stimuli
from nsdray.stages import CLIP_CONFIGS, VDVAE_CONFIGS, Part, Plan, layer_name, token_names
from nsdray.store import Inputs, Stage, table, view_column
from nsdray.targets.clip_tokens import text_tokens, unconditional_tokens, vision_tokens
from nsdray.targets.vdvae_latents import vdvae_latents

if TYPE_CHECKING:  # importing diffusers takes seconds
    from nsdray.models.versatile_diffusion import VersatileDiffusion

N_FEATURES_BATCH = 16
CPU_REPLICA_BYTES = 8 << 30
"""Memory that lets a CPU have a replica of its own."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
UNREACHABLE_S = 120.0
"""Seconds that a replica may be out of reach before that is an error; Ray takes some 10 to find that a node is gone."""
Rows = tuple[Stage, str, list[str]]
"""Where the targets of some test images lie: a stage, a partition, and the shards that hold them together, in order."""


class Replica:
    """The models of a configuration, each loaded by the first call that needs it, so that a bad checkpoint is that call's
    error."""

    def __init__(self, config: Config, layout: NSDLayout, vdvae: Path | None, clip: Path | None, diffusion: Path | None,
                 backbones: dict[str, Path]):  # fmt: skip
        self.config, self.layout, self.backbones = config, layout, backbones
        self.loaded: dict[str, torch.nn.Module] = {}
        self.paths = {"vdvae": vdvae, "clip": clip, "diffusion": diffusion}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in convolutions too; bfloat16 is there for speed
        if was_restarted():
            record("nsdray_replica_restarts", 1)

    @cached_property
    def vdvae(self) -> VDVAE:
        return load_vdvae(self.paths["vdvae"], VDVAE_CONFIGS[self.config.targets.vdvae](), self.device)

    @cached_property
    def clip(self) -> CLIP:
        return load_clip(self.paths["clip"], CLIP_CONFIGS[self.config.clip.model](), self.device)

    @cached_property
    def diffusion(self) -> VersatileDiffusion:
        from nsdray.models.versatile_diffusion import load_versatile_diffusion

        return load_versatile_diffusion(self.paths["diffusion"], self.device, getattr(torch, self.config.stage2.dtype))

    @cached_property
    def unconditional(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that guidance steers away from, computed once."""
        with self.precision(self.config.clip.dtype):
            tokens = unconditional_tokens(self.clip)
        del self.clip  # it is not needed again, and Versatile Diffusion wants the memory
        return tokens

    @property
    def memory(self) -> float:
        """Bytes of this replica's share of the machine."""
        return memory_share(self.device, self.config.cluster.gpus_per_replica)

    def precision(self, dtype: str) -> AbstractContextManager:
        """See `precision`."""
        return precision(self.device, dtype)

    def vdvae_batch(self) -> int:
        """Images per pass through the VDVAE: as configured, or what fits."""
        return self.config.targets.batch_size or fitting_batch_size(vdvae_bytes(self.vdvae.config), self.memory)

    def diffusion_batch(self) -> int:
        """Pictures per pass through Versatile Diffusion: as configured, or what fits beside its weights."""
        model = self.diffusion
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        free = max(0.0, self.memory - 2 * weights)
        return self.config.stage2.batch_size or fitting_batch_size(diffusion_bytes(model), free, most=8)

    def extract_vdvae(self, target: Stage, partition: str, part: Part, inputs: Inputs) -> None:
        """Encode the pictures of a part by the VDVAE and write its latents."""
        settings, n = self.config.targets, self.vdvae_batch()
        with self.precision(settings.dtype), within_memory("targets", n):
            layers = vdvae_latents(self.vdvae, self._seen(part), part.image_ids, settings.n_layers, settings.latents,
                                   settings.seed, n)  # fmt: skip
        columns = {"image_id": part.image_ids} | {layer_name(i): z for i, z in enumerate(layers)}
        target.write(partition, part.name, table(columns), inputs)

    def extract_clip_vision(self, target: Stage, partition: str, part: Part, inputs: Inputs) -> None:
        """CLIP tokens of the pictures of a part."""
        settings = self.config.clip
        with self.precision(settings.dtype), within_memory("clip", settings.batch_size):
            tokens = vision_tokens(self.clip, self._seen(part), settings.batch_size)
        write_tokens(target, partition, part, tokens, inputs)

    def extract_clip_text(self, target: Stage, partition: str, part: Part, inputs: Inputs) -> None:
        """CLIP tokens of the captions of a part's pictures."""
        captions, settings = load_captions(self.layout, [int(i) for i in part.image_ids]), self.config.clip
        with self.precision(settings.dtype), within_memory("clip", settings.batch_size):
            tokens = text_tokens(self.clip, captions, settings.batch_size)
        write_tokens(target, partition, part, tokens, inputs)

    def _seen(self, part: Part) -> np.ndarray:
        with Stimuli(self.layout.stimuli) as stimuli:
            return stimuli.read(part.image_ids)

    def reconstruct_stage1(self, target: Stage, partition: str, part: Part, inputs: Inputs, latents: Rows) -> None:
        """Decode the latents of a part's images and write the pictures."""
        stage1, columns = self.config.stage1, [layer_name(i) for i in range(self.config.n_layers)]
        cells, n = read_rows(latents, part.image_ids, columns), self.vdvae_batch()
        with self.precision(self.config.targets.dtype), within_memory("targets", n):
            pictures = decode_pictures(self.vdvae, cells, part.image_ids, stage1.seed, stage1.temperature,
                                       stage1.deterministic, n)  # fmt: skip
        write_pictures(target, partition, part, "stage1", pictures, stage1.seed, inputs)

    def reconstruct_stage2(self, target: Stage, partition: str, part: Part, inputs: Inputs, stage1: Stage,
                           vision: Rows | None, text: Rows | None) -> None:  # fmt: skip
        """Refine the stage-1 pictures of a part under tokens and write the pictures."""
        s, start = self.config.stage2, None
        if s.start == "stage1":
            start = np.stack([from_png(cell.as_py()) for cell in stage1.read(partition, part.name, ["stage1"])["stage1"]])
        tokens = [rows and np.stack(read_rows(rows, part.image_ids), 1) for rows in (vision, text)]
        unconditional, n = self.unconditional, self.diffusion_batch()
        with within_memory("stage2", n):
            pictures = refine_pictures(
                self.diffusion, start, *tokens, unconditional, part.image_ids, s.seed, n, strength=s.strength,
                guidance=s.guidance, mixing=s.mixing, n_steps=s.n_steps, sampler=s.sampler,
                reference_offset=s.reference_offset, noise=s.noise,
            )  # fmt: skip
        write_pictures(target, partition, part, "stage2", pictures, s.seed, inputs)

    def round_trip(self, target: Stage, partition: str, part: Part, inputs: Inputs) -> None:
        """The control "vae": the seen pictures through Versatile Diffusion's VAE and back, the most that stage 2 could reach."""
        seed, n = self.config.stage2.seed, self.diffusion_batch()
        with within_memory("stage2", n):
            pictures = round_trip(self.diffusion, self._seen(part), part.image_ids, seed, n)
        write_pictures(target, partition, part, "stage2", pictures, seed, inputs)

    def find_nearest(self, target: Stage, partition: str, part: Part, inputs: Inputs, train: Rows, train_ids: np.ndarray,
                     predicted: Rows) -> None:  # fmt: skip
        """The control "nearest": the training picture whose embedding points most nearly where the predicted one does."""
        column = token_names(CLIP_CONFIGS[self.config.clip.model]().n_vision_tokens)[:1]
        known, wanted = (read_rows(rows, ids, column)[0].astype(np.float32) for rows, ids in
                         ((train, train_ids), (predicted, part.image_ids)))  # fmt: skip
        known /= np.linalg.norm(known, axis=1, keepdims=True)
        nearest = train_ids[(wanted @ known.T).argmax(1)]
        with Stimuli(self.layout.stimuli) as stimuli:
            write_pictures(target, partition, part, "stage2", stimuli.read(nearest), 0, inputs)

    def embed(self, target: Stage, partition: str, part: Part, inputs: Inputs, source: Stage | None) -> None:
        """What the suites' networks make of a part's pictures, those of source or the stimuli: a column per metric."""
        if source is None:
            pictures = self._seen(part)
        else:
            name = source.name.split("/")[1].split("-")[0]
            pictures = np.stack([from_png(cell.as_py()) for cell in source.read(partition, part.name, [name])[name]])
        columns: dict[str, np.ndarray] = {}
        for suite in self.config.evaluation.suites:
            for (name, preparation), metrics in passes(suite).items():
                if name in self.backbones:
                    columns |= self._features(name, preparation, metrics, pictures)
        target.write(partition, part.name, table({"image_id": part.image_ids} | columns), inputs)

    def _features(self, name: str, preparation: Preparation, metrics: tuple[Metric, ...], pictures: np.ndarray) -> dict:
        """One pass of a network over pictures."""
        if name not in self.loaded:
            self.loaded[name] = load_backbone(name, self.backbones[name], self.device)
        nodes, batches = [metric.node for metric in metrics], []
        for rows, n_valid in padded_batches(len(pictures), N_FEATURES_BATCH):
            found = features(self.loaded[name], prepare(pictures[rows], preparation), nodes)
            batches.append({node: values[:n_valid] for node, values in found.items()})
        return {metric.name: np.concatenate([batch[metric.node] for batch in batches]) for metric in metrics}


def was_restarted() -> bool:
    """Whether this process is an actor that Ray has started again."""
    context = ray.get_runtime_context() if ray.is_initialized() else None
    return context is not None and context.get_actor_id() is not None and context.was_current_actor_reconstructed


def write_tokens(target: Stage, partition: str, part: Part, tokens: np.ndarray, inputs: Inputs) -> None:
    """Write (n, n_tokens, d) tokens, a column each."""
    columns = dict(zip(token_names(tokens.shape[1]), np.moveaxis(tokens, 1, 0)))
    target.write(partition, part.name, table({"image_id": part.image_ids} | columns), inputs)


def write_pictures(target: Stage, partition: str, part: Part, name: str, pictures: np.ndarray, seed: int, inputs: Inputs) -> None:
    """Write pictures as PNG."""
    pngs, seeds = [to_png(picture) for picture in pictures], np.full(len(pictures), seed, np.int64)
    target.write(partition, part.name, table({"image_id": part.image_ids, name: pngs, "seed": seeds}), inputs)


def read_rows(rows: Rows, image_ids: np.ndarray, columns: list[str] | None = None) -> list[np.ndarray]:
    """The cells of some images, one array (n, …) per column; columns None: all tokens."""
    stage, partition, shards = rows
    cells: dict[int, list[np.ndarray]] = {}
    for shard in shards:
        wanted = {int(i) for i in image_ids} - cells.keys()
        if not wanted:
            break
        here = view_column(stage.read(partition, shard, ["image_id"]), "image_id").tolist()
        if wanted.isdisjoint(here):
            continue
        data = stage.read(partition, shard, columns)
        names = columns or [name for name in data.column_names if name.startswith("token_")]
        views = [view_column(data, name) for name in names]
        cells |= {image_id: [view[row] for view in views] for row, image_id in enumerate(here) if image_id in wanted}
    found = [cells[int(i)] for i in image_ids]
    return [np.stack(column) for column in zip(*found)]


def run_replicas(plan: Plan, calls: list[tuple[str, tuple[Any, ...]]], description: str) -> None:
    """Do calls (method name, arguments) on a pool of replicas, in any order.

    Ray starts a replica again cluster.max_retries times. One that dies once more makes room for a new one, which is given its
    call: machines may be taken away at any time. A call that uses up two replicas is at fault itself.
    """
    if not calls:
        return
    settings = plan.config.cluster
    n_replicas, resources = pool_size(settings, ray.cluster_resources(), len(calls), strict=False)  # nodes may be lost by now
    retries = {"max_restarts": settings.max_retries, "max_task_retries": settings.max_retries}
    actor = ray.remote(Replica).options(**resources, **retries)
    arguments = replica_arguments(plan)
    replicas = [actor.remote(*arguments) for _ in range(n_replicas)]
    idle, running, waiting = list(range(n_replicas)), {}, list(calls)
    totals, done, unreachable, n_used_up = Counter(partition_of(call) for call in calls), Counter(), {}, Counter()
    with tqdm(total=len(calls), desc=f"{description} ({n_replicas} replica{'s' * (n_replicas > 1)})", unit="shard") as progress:
        while waiting or running:
            while idle and waiting:
                replica, call = idle.pop(), waiting.pop(0)
                running[getattr(replicas[replica], call[0]).remote(*call[1])] = replica, call, time.perf_counter()
            while idle and not waiting:  # let go: a replica whose node is gone may need the room to start again
                replicas[idle.pop()] = None
            record_queue(calls, waiting, [call for _, call, _ in running.values()])
            for finished in ray.wait(list(running))[0]:
                replica, call, started = running.pop(finished)
                try:
                    ray.get(finished)
                except ActorUnavailableError:  # its node is gone, or cut off for a moment: Ray will find out which
                    if time.monotonic() - unreachable.setdefault(replica, time.monotonic()) > UNREACHABLE_S:
                        raise
                    time.sleep(1.0)
                    running[getattr(replicas[replica], call[0]).remote(*call[1])] = replica, call, started
                    continue
                except (RayActorError, OutOfMemoryError):
                    n_used_up[id(call)] += 1
                    if n_used_up[id(call)] == 2:
                        raise
                    record("nsdray_replica_restarts", 1)
                    replicas[replica] = actor.remote(*arguments)
                    waiting.insert(0, call)
                else:
                    record_shard(call, replica, time.perf_counter() - started)
                    done[partition_of(call)] += 1
                    progress.set_postfix({name: f"{done[name]}/{n}" for name, n in totals.items()}, refresh=False)
                    progress.update()
                unreachable.pop(replica, None)
                idle.append(replica)
    record_queue(calls, [], [])


def record_queue(calls: list, waiting: list, running: list) -> None:
    """Tell Prometheus how many calls of each method are left."""
    for stage in {call[0] for call in calls}:
        for state, left in {"waiting": waiting, "running": running}.items():
            record("nsdray_queue", sum(call[0] == stage for call in left), stage=stage, state=state)


def record_shard(call: tuple[str, tuple[Any, ...]], replica: int, seconds: float) -> None:
    """Tell Prometheus about a finished call."""
    labels = {"stage": call[0], "subject": subject_label(call[1][1]), "replica": replica}
    record("nsdray_shards", 1, **labels)
    record("nsdray_images", len(call[1][2].image_ids), **labels)
    record("nsdray_shard_seconds", seconds, stage=call[0])


def replica_arguments(plan: Plan) -> tuple[Any, ...]:
    """What a plan's replicas are made from."""
    vdvae = None if plan.is_referee else plan.vdvae_checkpoint
    clip, diffusion = (plan.clip_checkpoint, plan.diffusion_folder) if plan.has_stage2 and vdvae else (None, None)
    return plan.config, plan.layout, vdvae, clip, diffusion, plan.backbone_files


def partition_of(call: tuple[str, tuple[Any, ...]]) -> str:
    """Whose shard a call writes, for the progress bar: a subject's, or the shared test set's."""
    folder = call[1][1].split("/")[0]
    return folder if folder.startswith("subject=") else "shared"


def pool_size(
    settings: ClusterConfig, available: dict[str, float], n_calls: int, strict: bool = True
) -> tuple[int, dict[str, float]]:
    """Number of replicas and the resources of each. strict: ValueError if more are configured than fit, instead of fewer.

    available: Ray's resources. Without GPUs a replica has one CPU, and so one thread, however many replicas there are: their
    number must not alter the rounding.
    """
    gpus, cpus, share = available.get("GPU", 0), available.get("CPU", 1), settings.gpus_per_replica
    if gpus:
        per_gpu = int(1 / share) if share <= 1 else 1 / share
        fits, resources = min(int(gpus * per_gpu), int(cpus)), {"num_cpus": 1, "num_gpus": share}
        n = settings.n_replicas or fits
    else:
        fits, resources = int(cpus), {"num_cpus": 1}
        with_room = min(fits, int(available.get("memory", 0) // CPU_REPLICA_BYTES))
        n = settings.n_replicas or max(min(2, fits), fits // 2, with_room)
    if strict and n > max(1, fits):
        raise ValueError(f"cluster.n_replicas is {n}, but the cluster has room for {fits}; they would wait for ever")
    return max(1, min(n, fits, n_calls)), resources


def precision(device: str, dtype: str) -> AbstractContextManager:
    """Autocast to bfloat16, if that is the dtype."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


@contextmanager
def within_memory(settings: str, n: int) -> Iterator[None]:
    """Say which batch size (of n, in a group of settings) to lower when a GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{n} pictures at once do not fit into this GPU's memory: give a --{settings}.batch-size below {n}, or a larger "
            f"--cluster.gpus-per-replica. ({error})"
        ) from error


def memory_share(device: str, gpus: float) -> float:
    """Bytes of a share of a GPU ("cuda"), or of a CPU's share of the machine or container: the same at any time."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory * min(1.0, gpus)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()) != "max":
        memory = min(memory, int(limit))
    return memory / os.cpu_count()


def vdvae_bytes(config: VDVAEConfig) -> int:
    """Memory of one image in the VDVAE: some 40 maps of width x image_size^2 float32 values at the widest point."""
    return 40 * 4 * config.width * config.image_size**2


def diffusion_bytes(model: VersatileDiffusion) -> int:
    """Memory of one picture: the VAE's decoder at full resolution, some 6 maps of its narrowest width."""
    return 6 * 4 * model.vae.config.block_out_channels[0] * model.image_size**2


def fitting_batch_size(n_bytes: int, memory: float, most: int = 32) -> int:
    """Largest power of two whose images, of n_bytes each, fit into half of the memory (bytes); between 1 and most."""
    return 2 ** min(int(math.log2(most)), max(0, int(math.log2(max(1.0, memory / 2 / n_bytes)))))


def gather(refs: Iterable[ray.ObjectRef], description: str, unit: str) -> list[Any]:
    """Results of tasks, in order, with a progress bar; the first error is raised as soon as it happens."""
    refs = list(refs)
    waiting = list(refs)
    with tqdm(total=len(refs), desc=description, unit=unit, disable=not refs) as progress:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            ray.get(done)
            progress.update(len(done))
            record("nsdray_queue", len(waiting), stage=description, state="submitted")
    return ray.get(refs)
