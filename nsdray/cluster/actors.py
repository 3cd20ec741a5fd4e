"""VDVAE replicas held by Ray actors, and the pool that keeps them busy.

A replica reads a part, computes, and writes a shard; the driver only hands out names. A replica that dies is started again
by Ray and its part is done anew; since parts and batches are fixed, the result does not depend on who did it.
"""
from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from tqdm import tqdm

from nsdray.config import ClusterConfig, Config
from nsdray.generators.stage1 import decode_pictures, to_png
from nsdray.models.vdvae import VDVAE, VDVAEConfig, load_vdvae
from nsdray.nsd.stimuli import Stimuli
from nsdray.stages import VDVAE_CONFIGS, Part, Plan, layer_name
from nsdray.store import Inputs, Stage, table, view_column
from nsdray.targets.vdvae_latents import vdvae_latents


class VDVAEReplica:
    """One loaded VDVAE."""

    def __init__(self, config: Config, checkpoint: Path, stimuli: Path):
        self.config, self.checkpoint, self.stimuli = config, checkpoint, stimuli

    @cached_property
    def vdvae(self) -> VDVAE:
        """Loaded by the first call, so that a bad checkpoint is that call's error."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_vdvae(self.checkpoint, VDVAE_CONFIGS[self.config.targets.vdvae](), device)

    @cached_property
    def batch_size(self) -> int:
        """Images per forward pass: as configured, or what fits into half of this replica's share of the memory."""
        if self.config.targets.batch_size is not None:
            return self.config.targets.batch_size
        if self.vdvae.device.type == "cuda":
            memory = torch.cuda.get_device_properties(0).total_memory * min(1.0, self.config.cluster.gpus_per_replica)
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / os.cpu_count()
        return fitting_batch_size(self.vdvae.config, memory)

    def precision(self) -> torch.autocast:
        """Autocast to bfloat16, if so configured."""
        return torch.autocast(self.vdvae.device.type, torch.bfloat16, enabled=self.config.targets.dtype == "bfloat16")

    def extract(self, target: Stage, partition: str, part: Part, inputs: Inputs) -> None:
        """Encode the pictures of a part and write its targets."""
        settings = self.config.targets
        with Stimuli(self.stimuli) as stimuli:
            pictures = stimuli.read(part.image_ids)
        with self.precision():
            layers = vdvae_latents(
                self.vdvae, pictures, part.image_ids, settings.n_layers, settings.latents, settings.seed, self.batch_size
            )
        columns = {"image_id": part.image_ids} | {layer_name(i): z for i, z in enumerate(layers)}
        target.write(partition, part.name, table(columns), inputs)

    def reconstruct(self, source: Stage, source_partition: str, target: Stage, partition: str, part: str,
                    inputs: Inputs) -> None:  # fmt: skip
        """Decode the latents of a part of source (targets or predictions) and write its pictures."""
        stage1, columns = self.config.stage1, [layer_name(i) for i in range(self.config.n_layers)]
        data = source.read(source_partition, part, ["image_id", *columns])
        image_ids = view_column(data, "image_id")
        latents = [view_column(data, name) for name in columns]
        with self.precision():
            pictures = decode_pictures(
                self.vdvae, latents, image_ids, stage1.seed, stage1.temperature, stage1.deterministic, self.batch_size
            )
        seeds = np.full(len(image_ids), stage1.seed, np.int64)
        pngs = [to_png(picture) for picture in pictures]
        target.write(partition, part, table({"image_id": image_ids, "stage1": pngs, "seed": seeds}), inputs)


def run_replicas(plan: Plan, calls: list[tuple[str, tuple[Any, ...]]], description: str) -> None:
    """Do calls (method name, arguments) on a pool of VDVAE replicas, in any order."""
    if not calls:
        return
    settings = plan.config.cluster
    n_replicas, resources = pool_size(settings, ray.cluster_resources(), len(calls))
    retries = {"max_restarts": settings.max_retries, "max_task_retries": settings.max_retries}
    actor = ray.remote(VDVAEReplica).options(**resources, **retries)
    arguments = (plan.config, plan.vdvae_checkpoint, plan.layout.stimuli)
    pool = ray.util.ActorPool([actor.remote(*arguments) for _ in range(n_replicas)])
    for call in calls:
        pool.submit(lambda replica, value: getattr(replica, value[0]).remote(*value[1]), call)
    with tqdm(total=len(calls), desc=f"{description} ({n_replicas} replica{'s' * (n_replicas > 1)})", unit="part") as progress:
        while pool.has_next():
            pool.get_next_unordered()
            progress.update()


def pool_size(settings: ClusterConfig, available: dict[str, float], n_calls: int) -> tuple[int, dict[str, float]]:
    """Number of replicas and the resources of each."""
    gpus, cpus, share = available.get("GPU", 0), available.get("CPU", 1), settings.gpus_per_replica
    if gpus:
        per_gpu = int(1 / share) if share <= 1 else 1 / share
        fits, resources = min(int(gpus * per_gpu), int(cpus)), {"num_cpus": 1, "num_gpus": share}
        n = settings.n_replicas or fits
    else:
        fits, resources = int(cpus), {"num_cpus": 1}
        n = settings.n_replicas or max(min(2, fits), fits // 2)
    if n > max(1, fits):
        raise ValueError(f"cluster.n_replicas is {n}, but the cluster has room for {fits}; they would wait for ever")
    return max(1, min(n, n_calls)), resources


def fitting_batch_size(vdvae: VDVAEConfig, memory: float, most: int = 64) -> int:
    """Largest power of two whose activations fit into half of the memory (bytes), at most 64.

    An image needs some 40 maps of width x image_size^2 float32 values at the widest point.
    """
    n_bytes = 40 * 4 * vdvae.width * vdvae.image_size**2
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
    return ray.get(refs)
