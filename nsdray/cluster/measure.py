"""The time to expect of a plan's heavy stages of pictures, from one small batch of each on the machine that would do it.
Training is not among them: its bar and MLflow tell its speed after the first epoch."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from nsdray.cluster.actors import Replica, gather, pool_size, replica_arguments
from nsdray.cluster.estimate import target_images
from nsdray.cluster.preflight import Finding
from nsdray.cluster.run import picture_partitions
from nsdray.generators.stage1 import decode_pictures
from nsdray.generators.stage2 import refine_pictures
from nsdray.nsd.betas import read_session
from nsdray.nsd.captions import load_captions
from nsdray.stages import CLIP_CONFIGS, STAGE2_ONLY, VDVAE_CONFIGS, Part, Plan, SubjectPlan
from nsdray.targets.clip_tokens import text_tokens, vision_tokens
from nsdray.targets.vdvae_latents import vdvae_latents

N_IMAGES = 8
"""Images of a measured batch: fewer than in a real one, so the times are rather too long than too short."""


def time_findings(plan: Plan) -> list[Finding]:
    """Expected hours of a plan that has nothing finished yet, stage by stage. Training is not measured; those that are not
    listed take far less."""
    resources = ray.cluster_resources()
    n_replicas, own = pool_size(plan.config.cluster, resources, n_calls=10**6)
    subject = plan.subjects[0]
    reading = ray.remote(num_cpus=1)(seconds_to_read).remote(subject)
    replica = ray.remote(**own)(seconds_per_image).remote(plan, [int(i) for i in subject.image_ids("test")[:N_IMAGES]])
    n_sessions = sum(len(s.sessions) for s in plan.subjects)
    n_targets = sum({s.targets(split): target_images(s, split) for s in plan.subjects for split in ("train", "test")}.values())
    n_pictures = {f"stage {name[-1]}": n_made(plan, name) for name in plan.picture_stages}
    n_readers = min(n_sessions, max(1, int(resources.get("CPU", 1))))
    to_read, per_image = gather([reading, replica], "measure", "stage")
    found = [finding("read betas", n_sessions, "sessions", to_read, n_readers, "tasks")]
    for name, seconds in per_image.items():
        found.append(finding(name, n_pictures.get(name, n_targets), "images", seconds, n_replicas, "replicas"))
    return [*found, Finding("time: training", "not measured: see its bar and samples_per_s in MLflow after the first epoch")]


def n_made(plan: Plan, name: str) -> int:
    """Pictures "stage1" or "stage2" that are made from latents or tokens; those of other controls take far less."""
    made = [subject for subject, model, _ in picture_partitions(plan, name) if model not in STAGE2_ONLY]
    return sum(len(subject.image_ids("test")) for subject in made)


def finding(name: str, n: int, unit: str, seconds: float, n_workers: int, workers: str) -> Finding:
    """A row of the table."""
    total = n * seconds / n_workers
    text = f"{total / 3600:.1f} h" if total > 3600 else f"{total / 60:.1f} min" if total > 60 else f"{total:.2g} s"
    return Finding(f"time: {name}", f"about {text}: {n} {unit} at {seconds:.3g} s (measured) over {n_workers} {workers}")


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seconds_to_read(subject: SubjectPlan) -> float:
    """Seconds to read one session's voxels."""
    path = next(iter(subject.sessions.values()))
    return timed(lambda: read_session(path, subject.voxels))


def seconds_per_image(plan: Plan, image_ids: list[int]) -> dict[str, float]:
    """Seconds an image of every heavy stage on this machine; each is run once before, so that loading is not counted."""
    config, ids = plan.config, np.array(image_ids)
    replica, n = Replica(*replica_arguments(plan)), len(image_ids)
    seen, seconds = replica._seen(Part("", ids)), {}
    shapes = VDVAE_CONFIGS[config.targets.vdvae]().layer_shapes[: config.n_layers]
    latents = [np.zeros((n, *shape), np.float32) for shape in shapes]
    vdvae, clip = config.targets.dtype, config.clip.dtype
    work: dict[str, tuple[str, Callable[[], Any]]] = {
        "VDVAE latents": (vdvae, lambda: vdvae_latents(replica.vdvae, seen, ids, config.targets.n_layers, config.targets.latents,
                                                       config.targets.seed, n)),
        "stage 1": (vdvae, lambda: decode_pictures(replica.vdvae, latents, ids, batch_size=n)),
    }  # fmt: skip
    if "clip_vision" in plan.kinds:
        work["CLIP vision tokens"] = clip, lambda: vision_tokens(replica.clip, seen, n)
    if "clip_text" in plan.kinds:
        captions = load_captions(plan.layout, image_ids)
        work["CLIP text tokens"] = clip, lambda: text_tokens(replica.clip, captions, config.clip.batch_size)
    for name, (dtype, call) in work.items():
        with replica.precision(dtype):
            call()
            seconds[name] = timed(call) / n
    if plan.has_stage2:
        seconds["stage 2"] = seconds_of_stage2(replica, plan, ids)
    return seconds


def seconds_of_stage2(replica: Replica, plan: Plan, ids: np.ndarray) -> float:
    """The same for Versatile Diffusion: a few denoising steps, of which one is taken off for what is not a step."""
    s, clip, n = plan.config.stage2, CLIP_CONFIGS[plan.config.clip.model](), len(ids)
    vision, text = (np.ones((n, k, clip.embed_dim), np.float32) for k in (clip.n_vision_tokens, clip.n_text_tokens))
    unconditional = replica.unconditional

    def steps(n_steps: int) -> float:
        settings = {"strength": 1.0, "guidance": s.guidance, "mixing": s.mixing, "n_steps": n_steps, "sampler": s.sampler}
        return timed(lambda: refine_pictures(replica.diffusion, None, vision, text, unconditional, ids, s.seed, n, **settings))

    steps(2)
    short, long = steps(2), steps(6)
    one = max(0.0, long - short) / 4
    return (max(0.0, short - 2 * one) + one * s.n_steps * s.strength) / n
