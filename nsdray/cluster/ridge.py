"""Ridge on a cluster: one factorisation a subject and alpha, shared through the object store, one task per block of columns.

A block's targets are read from Parquet, its test predictions are the smoother times the targets, and no weights exist
unless they are asked for.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ray
from safetensors.numpy import save

from nsdray.cluster.data import read_samples, read_targets
from nsdray.cluster.metrics import record
from nsdray.decoder import DecoderCard, Scaling, card_bytes, rescaled
from nsdray.metrics.table import latent_scores
from nsdray.regressors.ridge import RidgeFactor, factorise
from nsdray.regressors.scaling import moments, zscore
from nsdray.seeds import rng
from nsdray.stages import Fit, SubjectPlan
from nsdray.store import Stage, table

N_TARGETS_BLOCK = 4096
"""Targets of a block, at least; a VDVAE layer or a CLIP token is never cut."""


def decoder_card(subject: SubjectPlan, fit: Fit, rescale: str, network: dict) -> DecoderCard:
    """What decoder.json will say."""
    plan, config = subject.plan, subject.plan.config
    source = (config.targets.vdvae, plan.vdvae_sha256) if fit.kind == "vdvae" else (config.clip.model, plan.clip_sha256)
    shapes = [list(shape) for shape in plan.shapes(fit.kind)]
    return DecoderCard(subject.subject, fit.network, fit.kind, plan.columns(fit.kind), shapes, rescale, *source,
                       plan.is_simulated, network)  # fmt: skip


@ray.remote(num_cpus=1, num_returns=4)
def factorise_subject(subject: SubjectPlan, alpha: float) -> tuple[RidgeFactor, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """z-score the betas by the training images' moments and factorise: the factor, the smoother of the test images, the
    leave-one-out smoother of a seeded sample of about as many training images, and the scaling of the betas."""
    _, betas = read_samples(subject, "train")
    mean, std = moments(betas)
    factor = factorise(zscore(betas, mean, std), alpha)
    _, test = read_samples(subject, "test")
    n_held_out = min(len(betas), max(2, len(test)))
    rows = np.sort(rng(subject.plan.config.seed, "leave-one-out", subject.subject).permutation(len(betas))[:n_held_out])
    smoothers = factor.smoother(zscore(test, mean, std)), factor.leave_one_out_smoother(rows)
    return factor, *smoothers, {"betas_mean": mean, "betas_std": std}


def blocks_of(columns: Sequence[str], sizes: Sequence[int]) -> list[list[str]]:
    """Columns in groups of at least N_TARGETS_BLOCK targets (but for the last)."""
    blocks: list[list[str]] = [[]]
    n = 0
    for column, size in zip(columns, sizes):
        if n >= N_TARGETS_BLOCK:
            blocks.append([])
            n = 0
        blocks[-1].append(column)
        n += size
    return blocks


@ray.remote(num_cpus=1)
def fit_block(subject: SubjectPlan, fit: Fit, factor: RidgeFactor | None, smoother: np.ndarray, leave_one_out: np.ndarray,
              columns: list[str]) -> dict[str, np.ndarray]:  # fmt: skip
    """Moments of some columns and of their leave-one-out predictions, and the test predictions before rescaling. Writes the
    weights if there is a factor."""
    plan, stage = subject.plan, subject.plan.model(fit)
    targets = read_targets(subject, "train", columns, fit.kind).astype(np.float32)
    mean = targets.mean(0, dtype=np.float64).astype(np.float32)
    centred = targets - mean
    if factor is not None:
        weights, intercept = factor.weights(targets)
        start = 0
        for column, size in zip(columns, sizes_of(subject, fit, columns)):
            own = slice(start, start + size)
            data = {"weights": np.ascontiguousarray(weights[:, own]), "intercept": intercept[own]}
            plan.store.write_bytes(f"{stage.folder}/{subject.folder}/ridge_{column}.safetensors", save(data))
            start = own.stop
    latents_mean, latents_std = moments(targets)
    predictions_mean, predictions_std = moments(leave_one_out @ centred + mean)
    record("nsdray_ridge_blocks", 1, model=plan.label(fit), subject=subject.subject)
    return {"latents_mean": latents_mean, "latents_std": latents_std, "predictions_mean": predictions_mean,
            "predictions_std": predictions_std, "test": smoother @ centred + mean}  # fmt: skip


def sizes_of(subject: SubjectPlan, fit: Fit, columns: Sequence[str]) -> list[int]:
    """Targets in each of these columns."""
    sizes = dict(zip(subject.plan.columns(fit.kind), subject.plan.shapes(fit.kind)))
    return [int(np.prod(sizes[column])) for column in columns]


@ray.remote(num_cpus=1)
def write_fit(subject: SubjectPlan, fit: Fit, betas_scaling: dict[str, np.ndarray], *blocks: dict[str, np.ndarray]) -> None:
    """Write what is left of the decoder's folder and the test predictions, and mark both as finished."""
    joined = {name: np.concatenate([block[name] for block in blocks], -1) for name in blocks[0]}
    test = joined.pop("test")
    scaling = Scaling(voxel_index=subject.voxels.index, **betas_scaling, **joined)
    card = decoder_card(subject, fit, subject.plan.config.ridge.rescale, {})
    write_predictions(subject, fit, test, rescaled(card, scaling, test))
    finish_decoder(subject, subject.plan.model(fit), card, scaling)


def write_predictions(subject: SubjectPlan, fit: Fit, raw: np.ndarray, columns: list[np.ndarray]) -> None:
    """Write the test images' predictions, rescaled, with the errors of the raw ones. raw: (n_test, n_targets)."""
    plan, stage, names = subject.plan, subject.plan.predictions(fit), subject.plan.columns(fit.kind)
    truth = read_targets(subject, "test", names, fit.kind)
    scores = {f"{name}/{pairing}": values for name, pairing, values in latent_scores(truth, raw)}
    data = {"image_id": subject.image_ids("test")} | scores | dict(zip(names, columns))
    stage.claim()
    start = 0
    for part in subject.parts("test"):
        rows = slice(start, start + len(part.image_ids))
        stage.write(subject.folder, part.name, table({k: v[rows] for k, v in data.items()}), subject.inputs)
        start = rows.stop
    plan.predictions(fit).finish(subject.folder, subject.wanted())


def finish_decoder(subject: SubjectPlan, stage: Stage, card: DecoderCard, scaling: Scaling) -> None:
    """Write scaling.safetensors and decoder.json, and mark the subject's model as finished."""
    folder, store = f"{stage.folder}/{subject.folder}", subject.plan.store
    store.write_bytes(f"{folder}/scaling.safetensors", scaling.to_bytes())
    store.write_bytes(f"{folder}/decoder.json", card_bytes(card))
    files = [name for name in store.sizes(folder) if name.endswith((".safetensors", ".json"))]
    stage.finish(subject.folder, {name: subject.inputs for name in files})


def fit_ridge(subject: SubjectPlan, fits: Sequence[Fit]) -> list[ray.ObjectRef]:
    """Start fitting a subject's ridges; each reference resolves when a decoder and its test predictions are finished."""
    plan, shared, factors, done = subject.plan, ray.put(subject), {}, []
    for fit in fits:
        settings = plan.model(fit).config["settings"]
        alpha = settings["alpha"]
        if alpha not in factors:
            factors[alpha] = factorise_subject.remote(shared, alpha)
        factor, smoother, leave_one_out, scaling = factors[alpha]
        columns = plan.columns(fit.kind)
        blocks = [
            fit_block.remote(shared, fit, factor if settings["weights"] else None, smoother, leave_one_out, block)
            for block in blocks_of(columns, sizes_of(subject, fit, columns))
        ]
        done.append(write_fit.remote(shared, fit, scaling, *blocks))
    return done
