"""Ridge on a cluster: one kernel a subject and one factorisation an alpha (`nsdray.cluster.ridge_factors`), shared through the
object store, and one task per some blocks of columns.

A block's targets are read from Parquet, its test predictions are the smoother times the targets, and no weights exist
unless they are asked for.
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
import ray
from safetensors.numpy import save

from nsdray.cluster.data import read_targets
from nsdray.cluster.metrics import record
from nsdray.cluster.ridge_factors import (
    N_TARGETS_BLOCK,
    Betas,
    Choice,
    blocks_of,
    candidates_of,
    choose,
    decompose,
    equal_shares,
    groups_of,
    make_kernel,
    pieces_of,
    sample_targets,
    sampled_rows,
    score_penalties,
    sizes_of,
    solve_kernel,
    standardise,
)
from nsdray.decoder import DecoderCard, Scaling, card_bytes, rescaled
from nsdray.metrics.table import latent_scores
from nsdray.regressors.linalg import Cholesky, Eigen, Scratch, find_device, to_numpy
from nsdray.regressors.ridge import RidgeKernel, primal
from nsdray.regressors.ridge_grid import BlockFit, Smoothers, ahead, alpha_scores, fit_block
from nsdray.regressors.ridge_memory import check_memory, ridge_bytes
from nsdray.regressors.scaling import moments
from nsdray.regressors.target_blocks import centre_targets
from nsdray.stages import Fit, SubjectPlan
from nsdray.store import Stage, table

SMALL = 1e10
"""Multiplications of a kernel below which one CPU is enough."""


def decoder_card(subject: SubjectPlan, fit: Fit, rescale: str, network: dict) -> DecoderCard:
    """What decoder.json will say."""
    plan, config = subject.plan, subject.plan.config
    source = (config.targets.vdvae, plan.vdvae_sha256) if fit.kind == "vdvae" else (config.clip.model, plan.clip_sha256)
    shapes = [list(shape) for shape in plan.shapes(fit.kind)]
    return DecoderCard(subject.subject, fit.network, fit.kind, plan.columns(fit.kind), shapes, rescale, *source,
                       plan.is_simulated, network)  # fmt: skip


@dataclass(frozen=True)
class Solver:
    """What solves blocks of targets: smoothers, and the inverse where these are not enough."""

    smoothers: Smoothers
    kernel: RidgeKernel
    inverse: Cholesky | Eigen | None
    selection: str
    rows: np.ndarray
    """Of the leave-one-out sample."""
    scratch: Scratch = field(default_factory=Scratch)

    def solve(self, targets: np.ndarray, dual: bool) -> tuple[BlockFit, np.ndarray, np.ndarray | None]:
        """Predictions of some targets, their standard deviation, and dual coefficients (n_samples, n_targets) if asked for."""
        kernel, s, scores = self.kernel, self.smoothers, None
        block = centre_targets(targets, kernel.dtype, kernel.device, kernel.n_samples, self.scratch)
        if len(s.alphas) > 1 and (self.selection != "sample" or len(s.rows) > len(self.rows)):
            scores = alpha_scores(kernel, self.inverse, s.alphas, block, self.selection, self.rows)
        fitted, coefficients = fit_block(s, block, scores), None
        if dual:
            coefficients = np.empty(targets.shape, kernel.dtype)
            for a in np.unique(fitted.choice):
                own = np.flatnonzero(fitted.choice == a)
                inverse = self.inverse if isinstance(self.inverse, Cholesky) else self.inverse.at(s.alphas[a])
                coefficients[:, own] = to_numpy(inverse.solve(block.centred[:, own]))
        return fitted, block.std, coefficients


@ray.remote
def fit_blocks(subject: SubjectPlan, fit: Fit, betas: Betas | None, kernel: RidgeKernel, smoothers: Smoothers,
               inverse: Cholesky | Eigen | None, blocks: list[list[str]]) -> list[dict[str, Any]]:  # fmt: skip
    """Fit some blocks of columns, reading the next while one is computed. Writes weights if there are betas."""
    device, settings = find_device(), subject.plan.model(fit).config["settings"]
    kernel = dataclasses.replace(kernel, betas=betas and betas.train, device=device)
    inverse = inverse and inverse.to(device)
    solver = Solver(smoothers.to(device), kernel, inverse, settings["selection"], sampled_rows(subject))
    memory = cycle((Scratch(), Scratch()))  # one block is read while another is in use
    read = ((columns, read_targets(subject, "train", columns, fit.kind, next(memory))) for columns in blocks)
    return [fit_columns(subject, fit, solver, *block) for block in ahead(read)]


def fit_columns(subject: SubjectPlan, fit: Fit, solver: Solver, columns: list[str], targets: np.ndarray) -> dict[str, Any]:
    """Fit a block, at most N_TARGETS_BLOCK targets at a time: its test predictions before rescaling, moments, scores, and what
    was chosen. Writes the weights if the solver has betas."""
    truth = read_targets(subject, "test", columns, fit.kind)
    found: list[dict[str, np.ndarray]] = []
    dual = np.empty(targets.shape, solver.kernel.dtype) if solver.kernel.betas is not None else None
    for own in pieces_of(targets.shape[1]):
        fitted, std, coefficients = solver.solve(targets[:, own], dual is not None)
        if dual is not None:
            dual[:, own] = coefficients
        test = fitted.test(np.float32)
        predictions_mean, predictions_std = fitted.left_out_moments()
        test_mean, test_std = moments(test)
        found.append(
            {"latents_mean": fitted.mean.astype(np.float32), "latents_std": std.astype(np.float32), "test": test,
             "predictions_mean": predictions_mean, "predictions_std": predictions_std, "test_mean": test_mean,
             "test_std": test_std, "alphas": np.array(solver.smoothers.alphas)[fitted.choice],
             "loo_r2": fitted.leave_one_out_r2, "test_r2": fitted.parts_of_r2(truth[:, own])}
        )  # fmt: skip
    block = {name: np.concatenate([piece[name] for piece in found], -1) for name in found[0]}
    if dual is not None:
        write_weights(subject, fit, solver.kernel, columns, dual, block["latents_mean"])
    record("nsdray_ridge_blocks", 1, model=subject.plan.label(fit), subject=subject.subject)
    return block | {f"{name}/{pairing}": values * len(truth[0]) for name, pairing, values in latent_scores(truth, block["test"])}


def write_weights(subject: SubjectPlan, fit: Fit, kernel: RidgeKernel, columns: list[str], dual: np.ndarray,
                  mean: np.ndarray) -> None:  # fmt: skip
    """Write a file per column: weights (n_voxels, n_targets) or dual coefficients (n_train, n_targets), and the intercept."""
    plan, start = subject.plan, 0
    for column, size in zip(columns, sizes_of(subject, fit, columns)):
        own = slice(start, start + size)
        if plan.config.ridge.coefficients == "primal":
            weights, intercept = primal(kernel, dual[:, own], mean[own])
            data = {"weights": weights, "intercept": intercept}
        else:
            offset = dual_betas(kernel) @ kernel.mean_
            data = {"dual": np.ascontiguousarray(dual[:, own]), "intercept": mean[own] - offset @ dual[:, own]}
        plan.store.write_bytes(f"{plan.model(fit).folder}/{subject.folder}/ridge_{column}.safetensors", save(data))
        start = own.stop


def dual_betas(kernel: RidgeKernel) -> np.ndarray:
    """What dual coefficients are multiplied with: betas @ dual_betas.T @ dual + intercept, (n_train, n_voxels)."""
    out = np.empty(kernel.betas.shape, np.float32)
    for voxels, x in kernel.chunks(kernel.betas):
        out[:, voxels] = to_numpy(x) * (1 if kernel.scale is None else kernel.scale[voxels])
    return out


# What is left when all blocks are there.


@ray.remote(num_cpus=1)
def write_fit(subject: SubjectPlan, fit: Fit, betas: Betas | None, betas_scaling: dict[str, np.ndarray],
              kernel: RidgeKernel | None, choice: Choice, *tasks: list[dict[str, Any]]) -> None:  # fmt: skip
    """Write what is left of the decoder's folder and the test predictions, and mark both as finished."""
    blocks, config = [block for task in tasks for block in task], subject.plan.config.ridge
    names = ("latents_mean", "latents_std", "predictions_mean", "predictions_std", "test_mean", "test_std", "alphas", "loo_r2",
             "test_r2")  # fmt: skip
    joined = {name: np.concatenate([block[name] for block in blocks], -1) for name in names}
    scaling = Scaling(voxel_index=subject.voxels.index, **betas_scaling, **{name: joined[name] for name in names[:4]})
    card = decoder_card(subject, fit, config.rescale, {})
    n_targets = len(joined["alphas"])
    scores = {name: sum(block[name] for block in blocks) / n_targets for name in blocks[0] if "/" in name}

    def cells(rows: slice) -> list[np.ndarray]:
        raw = np.concatenate([block["test"][rows] for block in blocks], 1)
        return rescaled(card, scaling, raw, (joined["test_mean"], joined["test_std"]))

    write_rows(subject, fit, scores, cells)
    folder, store = f"{subject.plan.model(fit).folder}/{subject.folder}", subject.plan.store
    chosen = {"alphas": joined["alphas"].astype(np.float32), "loo_r2": joined["loo_r2"].astype(np.float32)}
    store.write_bytes(f"{folder}/alphas.safetensors", save(chosen))
    report = ridge_report(subject, fit, choice, joined)
    store.write_bytes(f"{folder}/ridge_report.json", json.dumps(report, indent=1).encode())
    if betas is not None and config.coefficients == "dual":
        own = dual_betas(dataclasses.replace(kernel, betas=betas.train))
        store.write_bytes(f"{folder}/training_betas.safetensors", save({"betas": own}))
    finish_decoder(subject, subject.plan.model(fit), card, scaling)


def ridge_report(subject: SubjectPlan, fit: Fit, choice: Choice, targets: dict[str, np.ndarray]) -> dict[str, Any]:
    """Contents of ridge_report.json: what was chosen; and per layer or token the alphas, and means over its targets of the
    leave-one-out R2 (on the held-out rows; `nsdray.regressors.ridge_grid`), of the test images' R2 before rescaling, relative to
    predicting the training mean, and of the parts of that which come from each voxel group."""
    settings, names, start, columns = subject.plan.model(fit).config["settings"], list(groups_of(subject)), 0, []
    for column, size in zip(subject.plan.columns(fit.kind), sizes_of(subject, fit, subject.plan.columns(fit.kind))):
        own = slice(start, start + size)
        alphas, parts = targets["alphas"][own], targets["test_r2"][:, own].mean(1)
        columns.append(
            {"column": column, "n_targets": size, "alpha_min": float(alphas.min()), "alpha_median": float(np.median(alphas)),
             "alpha_max": float(alphas.max()), "loo_r2": float(targets["loo_r2"][own].mean()), "test_r2": float(parts.sum()),
             "test_r2_parts": dict(zip(names, parts.tolist()))}
        )  # fmt: skip
        start = own.stop
    penalties = dict(zip(names, choice.penalties or [1.0] * len(names)))
    return {"alphas": settings["alphas"], "selection": settings["selection"] if len(settings["alphas"]) > 1 else "fixed",
            "per_target": settings["per_target"], "penalties": penalties, "columns": columns}  # fmt: skip


def write_predictions(subject: SubjectPlan, fit: Fit, raw: np.ndarray, columns: list[np.ndarray]) -> None:
    """Write the test images' predictions, rescaled, with the errors of the raw ones. raw: (n_test, n_targets)."""
    truth = read_targets(subject, "test", subject.plan.columns(fit.kind), fit.kind)
    scores = {f"{name}/{pairing}": values for name, pairing, values in latent_scores(truth, raw)}
    write_rows(subject, fit, scores, lambda rows: [column[rows] for column in columns])


def write_rows(subject: SubjectPlan, fit: Fit, scores: dict[str, np.ndarray], cells: Callable[[slice], list[np.ndarray]]) -> None:
    """Write predictions part by part. scores: a value per test image; cells: some rows of every column."""
    stage, names, start = subject.plan.predictions(fit), subject.plan.columns(fit.kind), 0
    image_ids = subject.image_ids("test")
    stage.claim()
    for part in subject.parts("test"):
        rows = slice(start, start + len(part.image_ids))
        data = {"image_id": image_ids[rows]} | {name: values[rows] for name, values in scores.items()}
        stage.write(subject.folder, part.name, table(data | dict(zip(names, cells(rows)))), subject.inputs)
        start = rows.stop
    stage.finish(subject.folder, subject.wanted())


def finish_decoder(subject: SubjectPlan, stage: Stage, card: DecoderCard, scaling: Scaling) -> None:
    """Write scaling.safetensors and decoder.json, and mark the subject's model as finished."""
    folder, store = f"{stage.folder}/{subject.folder}", subject.plan.store
    store.write_bytes(f"{folder}/scaling.safetensors", scaling.to_bytes())
    store.write_bytes(f"{folder}/decoder.json", card_bytes(card))
    files = [name for name in store.sizes(folder) if name.endswith((".safetensors", ".json"))]
    stage.finish(subject.folder, {name: subject.inputs for name in files})


# The whole of it.


def fit_ridge(subject: SubjectPlan, fits: Sequence[Fit]) -> list[ray.ObjectRef]:
    """Start fitting a subject's ridges; each reference resolves when a decoder and its test predictions are finished."""
    if not fits:
        return []
    check_room(subject, fits)
    plan, shared = subject.plan, ray.put(subject)
    whole, share = task_options(subject, needed_bytes(subject, fits, keep=False))
    settings = [plan.model(fit).config["settings"] for fit in fits]
    candidates, ridge, done = candidates_of(subject), plan.config.ridge, []
    betas, scaling = standardise.remote(shared)
    kernel = make_kernel.options(**whole).remote(betas, Choice((), candidates[0]), ridge.dtype)
    eigen = decompose.options(**whole).remote(kernel) if len(ridge.alphas) > 1 else None
    scores = []
    if len(candidates) > 1 or (len(ridge.alphas) > 1 and not ridge.per_target):
        targets = [sample_targets.remote(shared, fit, ridge.n_targets_search) for fit in fits]
        first = (kernel, eigen), *[(None, None)] * (len(candidates) - 1)
        scores = [score_penalties.options(**whole).remote(shared, betas, *known, own, settings, *targets)
                  for known, own in zip(first, candidates)]  # fmt: skip
    for kind, (fit, own) in enumerate(zip(fits, settings)):
        choice = choose.remote(own, candidates, kind, *scores) if scores else Choice(tuple(own["alphas"]), candidates[0])
        used, parts = kernel, eigen
        if len(candidates) > 1:  # which are chosen is not known yet
            used = make_kernel.options(**whole).remote(betas, choice, ridge.dtype)
            parts = decompose.options(**whole).remote(used) if ridge.per_target else None
        smoothers, inverse = solve_kernel.options(**whole).remote(shared, betas, used, parts, choice, own)
        written = betas if own["weights"] else None
        blocks = blocks_of(plan.columns(fit.kind), sizes_of(subject, fit, plan.columns(fit.kind)))
        tasks = [fit_blocks.options(**share).remote(shared, fit, written, used, smoothers, inverse, some)
                 for some in batches(subject, fit, blocks)]  # fmt: skip
        done.append(write_fit.remote(shared, fit, written, scaling, used if written else None, choice, *tasks))
    return done


def batches(subject: SubjectPlan, fit: Fit, blocks: list[list[str]]) -> Iterator[list[list[str]]]:
    """Blocks in as many tasks as keep every CPU busy to the end, several to a task so that it can read ahead."""
    sizes = [sum(sizes_of(subject, fit, block)) for block in blocks]
    for share in equal_shares(sizes, 4 * max(1, int(ray.cluster_resources().get("CPU", 1)))):
        yield blocks[share]


def task_options(subject: SubjectPlan, needed: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ray's options for the tasks that do one thing for a whole subject, and for those that share its targets. needed: bytes, so
    that no more tasks run at once than fit into a node."""
    plan, nodes = subject.plan, [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = max(node.get("memory", 0) for node in nodes)
    whole = {"num_cpus": 1, "memory": int(min(max(needed["kernel"], needed["factorisation"]), 0.9 * largest))}
    share = {"num_cpus": 1, "memory": int(min(needed["targets"], 0.9 * largest))}
    if ray.cluster_resources().get("GPU", 0):
        return whole | {"num_gpus": 1}, share | {"num_gpus": plan.config.cluster.gpus_per_replica}
    n, p = len(subject.image_ids("train")), len(subject.voxels.index)
    cpus = int(max(node.get("CPU", 1) for node in nodes)) // len(plan.subjects)
    if cpus > 1 and n * n * p > SMALL:
        whole |= {"num_cpus": cpus, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cpus)}}}
    return whole, share


def needed_bytes(subject: SubjectPlan, fits: Sequence[Fit], keep: bool) -> dict[str, int]:
    """`ridge_bytes` of a subject's ridges. keep: with what lies in the object store meanwhile."""
    plan, config = subject.plan, subject.plan.config.ridge
    n, n_test = len(subject.image_ids("train")), len(subject.image_ids("test"))
    by_fit = [sizes_of(subject, fit, plan.columns(fit.kind)) for fit in fits]
    sizes = [size for own in by_fit for size in own]
    written = [max(own) for fit, own in zip(fits, by_fit) if plan.model(fit).config["settings"]["weights"]]
    return ridge_bytes(
        n, len(subject.voxels.index), n_test, n if config.held_out == "all" else n_test, min(N_TARGETS_BLOCK, sum(sizes)),
        np.dtype(config.dtype), n_alphas=len(config.alphas) if config.per_target else 1,
        n_groups=max(1, len(groups_of(subject))), decomposed=len(config.alphas) > 1 or config.n_penalties_drawn > 0, keep=keep,
        n_columns=min(sum(sizes), N_TARGETS_BLOCK + max(sizes)), n_weights=max(written, default=0),
    )  # fmt: skip


def memory_needed(subject: SubjectPlan, fits: Sequence[Fit]) -> dict[str, int]:
    """Bytes that a subject's ridges hold at once, by phase, with their predictions in the object store."""
    n_targets = sum(sum(sizes_of(subject, fit, subject.plan.columns(fit.kind))) for fit in fits)
    needed = needed_bytes(subject, fits, keep=True)
    return needed | {"targets": needed["targets"] + 4 * len(subject.image_ids("test")) * n_targets}


def check_room(subject: SubjectPlan, fits: Sequence[Fit]) -> None:
    """ValueError with the numbers if a subject's ridges do not fit into the largest node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = max(node.get("memory", 0) + node.get("object_store_memory", 0) for node in nodes)
    remedy = "Use a larger node, --ridge.dtype float32, fewer --ridge.alphas with --ridge.per-target, or --ridge.held-out sample."
    where = f"the largest node of the cluster, for subject {subject.subject},"
    check_memory(memory_needed(subject, fits), room, where, remedy)
