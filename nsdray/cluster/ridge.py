"""Ridge on a cluster: one kernel a subject and one factorisation an alpha (`nsdray.cluster.ridge_factors`), shared through the
object store, and one task per some blocks of columns.

A block's targets are read from Parquet, its test predictions are the smoother times the targets, and no weights exist
unless they are asked for.
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
import ray
from safetensors.numpy import save
from tqdm import tqdm

from nsdray.cluster.data import read_targets
from nsdray.cluster.metrics import record
from nsdray.cluster.ridge_factors import (
    Choice,
    blocks_of,
    candidates_of,
    choose,
    curve_of,
    decompose,
    equal_shares,
    groups_of,
    join_scores,
    make_kernel,
    pieces_of,
    sample_targets,
    sampled_rows,
    score_penalties,
    scored_apart,
    sizes_of,
    solve_kernel,
    standardise,
)
from nsdray.cluster.ridge_report import edge_warning
from nsdray.cluster.ridge_room import (
    check_room,
    needed_bytes,
    store_bytes,
    subjects_at_once,
    task_options,
    writing_options,
)
from nsdray.decoder import DecoderCard, Scaling, card_bytes, rescaled
from nsdray.metrics.table import latent_scores
from nsdray.regressors.linalg import Array, Eigen, Scratch, find_device, to_device, to_numpy
from nsdray.regressors.ridge import RidgeKernel
from nsdray.regressors.ridge_grid import BlockFit, Smoothers, ahead, alpha_scores, fit_block
from nsdray.regressors.scaling import moments
from nsdray.regressors.target_blocks import centre_targets
from nsdray.stages import Fit, SubjectPlan
from nsdray.store import Stage, table


def decoder_card(subject: SubjectPlan, fit: Fit, rescale: str, network: dict) -> DecoderCard:
    """What decoder.json will say."""
    plan, config = subject.plan, subject.plan.config
    source = (config.targets.vdvae, plan.vdvae_sha256) if fit.kind == "vdvae" else (config.clip.model, plan.clip_sha256)
    shapes = [list(shape) for shape in plan.shapes(fit.kind)]
    return DecoderCard(subject.subject, fit.network, fit.kind, plan.columns(fit.kind), shapes, rescale, *source,
                       plan.is_simulated, network)  # fmt: skip


@dataclass(frozen=True)
class Solver:
    """What solves blocks of targets: smoothers, and what is needed to choose alphas and to write weights."""

    smoothers: Smoothers
    kernel: RidgeKernel
    eigen: Eigen | None
    settings: dict[str, Any]
    rows: np.ndarray
    """Of the leave-one-out sample."""
    basis: Array | None
    """`training_basis`, float32, if weights are to be written."""
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def is_shared(self) -> bool:
        """Whether all targets have one alpha."""
        return len(self.smoothers.alphas) == 1

    def solve(self, targets: np.ndarray) -> tuple[BlockFit, np.ndarray, np.ndarray | None]:
        """Predictions of some targets, their standard deviation, and if weights are to be written at several alphas, dual
        coefficients (n_samples, n_targets) float32."""
        kernel, scores = self.kernel, None
        block = centre_targets(targets, kernel.dtype, kernel.device, kernel.n_samples, self.scratch)
        if scored_apart(self.settings):
            scores = alpha_scores(kernel, self.eigen, self.smoothers.alphas, block, self.settings["selection"], self.rows)
        fitted, dual = fit_block(self.smoothers, block, scores), None
        if self.basis is not None and not self.is_shared:
            dual = np.empty(targets.shape, np.float32)
            for a in np.unique(fitted.choice):
                own = np.flatnonzero(fitted.choice == a)
                dual[:, own] = to_numpy(self.eigen.at(self.smoothers.alphas[a]).solve(block.centred[:, own]))
        return fitted, block.std, dual


@ray.remote
def fit_blocks(subject: SubjectPlan, fit: Fit, kernel: RidgeKernel, smoothers: Smoothers, eigen: Eigen | None,
               basis: np.ndarray | None, blocks: list[list[str]]) -> list[dict[str, Any]]:  # fmt: skip
    """Fit some blocks of columns, reading the next while one is computed. Writes weights if there is a basis."""
    device, settings = find_device(), subject.plan.model(fit).config["settings"]
    kernel, eigen = dataclasses.replace(kernel, device=device), eigen and eigen.to(device)
    basis = None if basis is None else to_device(basis, device)
    solver = Solver(smoothers.to(device), kernel, eigen, settings, sampled_rows(subject), basis)
    memory = cycle((Scratch(), Scratch()))  # one block is read while another is in use
    read = ((columns, read_targets(subject, "train", columns, fit.kind, next(memory))) for columns in blocks)
    return [fit_columns(subject, fit, solver, *block) for block in ahead(read)]


def fit_columns(subject: SubjectPlan, fit: Fit, solver: Solver, columns: list[str], targets: np.ndarray) -> dict[str, Any]:
    """Fit a block, at most N_TARGETS_BLOCK targets at a time: its test predictions before rescaling, moments, scores, and what
    was chosen. Writes the weights if the solver has a basis."""
    truth = read_targets(subject, "test", columns, fit.kind)
    found: list[dict[str, np.ndarray]] = []
    scores = []
    coefficients = targets if solver.basis is None or solver.is_shared else np.empty(targets.shape, np.float32)
    for own in pieces_of(targets.shape[1]):
        fitted, std, dual = solver.solve(targets[:, own])
        if dual is not None:
            coefficients[:, own] = dual
        scores.append(fitted.scores)
        test = fitted.test(np.float32)
        predictions_mean, predictions_std = fitted.left_out_moments()
        test_mean, test_std = moments(test, ddof=0)
        found.append(
            {"latents_mean": fitted.mean.astype(np.float32), "latents_std": std.astype(np.float32), "test": test,
             "predictions_mean": predictions_mean, "predictions_std": predictions_std, "test_mean": test_mean,
             "test_std": test_std, "alphas": np.array(solver.smoothers.alphas)[fitted.choice],
             "loo_r2": fitted.leave_one_out_r2, "test_r2": fitted.parts_of_r2(truth[:, own])}
        )  # fmt: skip
    block = {name: np.concatenate([piece[name] for piece in found], -1) for name in found[0]}
    if solver.basis is not None:
        write_weights(subject, fit, solver, columns, coefficients, block["latents_mean"])
    record("nsdray_ridge_blocks", 1, model=subject.plan.label(fit), subject=subject.subject)
    if fit.kind == "vdvae":
        block |= {f"{name}/{pairing}": values * len(truth[0]) for name, pairing, values in latent_scores(truth, block["test"])}
    return block | ({} if scores[0] is None else {"scores": join_scores(scores)})


def write_weights(subject: SubjectPlan, fit: Fit, solver: Solver, columns: list[str], coefficients: np.ndarray,
                  mean: np.ndarray) -> None:  # fmt: skip
    """Write a file per column: weights (n_voxels, n_targets) float32, or coefficients as they are; and the intercept.
    coefficients: what the basis is multiplied with, (n_train, n_targets): with one alpha the targets, else dual coefficients."""
    plan, kernel, basis, start = subject.plan, solver.kernel, solver.basis, 0
    offset = to_numpy(basis @ to_device(kernel.mean_.astype(np.float32), kernel.device))
    for column, size in zip(columns, sizes_of(subject, fit, columns)):
        own, intercept = coefficients[:, start : start + size], mean[start : start + size].copy()
        weights = np.empty((basis.shape[1], size), np.float32) if plan.config.ridge.coefficients == "primal" else None
        for piece in pieces_of(size):
            part = own[:, piece].astype(np.float32)
            if solver.is_shared:
                part -= mean[start : start + size][piece]
            intercept[piece] -= offset @ part
            if weights is not None:
                weights[:, piece] = to_numpy(basis.T @ to_device(part, kernel.device))
        data = {"dual": own} if weights is None else {"weights": weights}
        path = f"{plan.model(fit).folder}/{subject.folder}/ridge_{column}.safetensors"
        plan.store.write_tensors(path, data | {"intercept": intercept})
        start += size


# What is left when all blocks are there.


@ray.remote
def write_fit(subject: SubjectPlan, fit: Fit, basis: np.ndarray | None, betas_scaling: dict[str, np.ndarray], choice: Choice,
              *tasks: list[dict[str, Any]]) -> str:  # fmt: skip
    """Write what is left of the decoder's folder and the test predictions, mark both as finished. Returns a warning, or ""."""
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
    if "scores" in blocks[0]:
        own = join_scores([block["scores"] for block in blocks])
        choice = dataclasses.replace(choice, curve=curve_of(choice.alphas, own))
    report = ridge_report(subject, fit, choice, joined)
    store.write_bytes(f"{folder}/ridge_report.json", json.dumps(report, indent=1).encode())
    if basis is not None and config.coefficients == "dual":
        store.write_tensors(f"{folder}/training_betas.safetensors", {"betas": basis})
    finish_decoder(subject, subject.plan.model(fit), card, scaling)
    warning = edge_warning(report)
    return f"subject {subject.subject}, {fit.kind}: {warning}" if warning else ""


def ridge_report(subject: SubjectPlan, fit: Fit, choice: Choice, targets: dict[str, np.ndarray]) -> dict[str, Any]:
    """Contents of ridge_report.json: what was chosen; and per layer or token the alphas, and means over its targets of the
    leave-one-out R2 (on the held-out rows; `nsdray.regressors.ridge_grid`), of the test images' R2 before rescaling, relative to
    predicting the training mean, and of the parts of that which come from each voxel group; and where alphas were compared, the
    curve (`curve_of`) and the share of targets with the grid's first or last."""
    settings, names, start, columns = subject.plan.model(fit).config["settings"], list(groups_of(subject)), 0, []
    for column, size in zip(subject.plan.columns(fit.kind), sizes_of(subject, fit, subject.plan.columns(fit.kind))):
        own = slice(start, start + size)
        alphas, parts = targets["alphas"][own], targets["test_r2"][:, own].mean(1)
        columns.append(
            {"column": column, "n_targets": size, "alpha_min": float(alphas.min()), "alpha_median": float(np.median(alphas)),
             "alpha_max": float(alphas.max()), "loo_r2": none_if_nan(targets["loo_r2"][own].mean()),
             "test_r2": float(parts.sum()), "test_r2_parts": dict(zip(names, parts.tolist()))}
        )  # fmt: skip
        start = own.stop
    penalties, grid = dict(zip(names, choice.penalties or [1.0] * len(names))), settings["alphas"]
    at_edge = {name: float((targets["alphas"] == edge).mean()) for name, edge in (("lowest", min(grid)), ("highest", max(grid)))}
    how = settings["selection"] if len(grid) > 1 else "fixed"
    return {"alphas": grid, "selection": how, "per_target": settings["per_target"], "curve": choice.curve,
            "at_edge": at_edge if len(grid) > 1 else {}, "penalties": penalties, "columns": columns}  # fmt: skip


def none_if_nan(value: float) -> float | None:
    """For JSON."""
    return None if np.isnan(value) else float(value)


def write_predictions(subject: SubjectPlan, fit: Fit, raw: np.ndarray, columns: list[np.ndarray]) -> None:
    """Write the test images' predictions, rescaled, with the errors of the raw ones. raw: (n_test, n_targets)."""
    truth = read_targets(subject, "test", subject.plan.columns(fit.kind), fit.kind)
    scores = {}
    if fit.kind == "vdvae":
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


def fit_ridges(ridges: Mapping[SubjectPlan, Sequence[Fit]]) -> None:
    """Fit all subjects' ridges, as many subjects at once as fit into the object store; the next begins when one is finished."""
    waiting = [(subject, fits) for subject, fits in ridges.items() if fits]
    for subject, fits in waiting:
        check_room(subject, fits)
    n_at_once = subjects_at_once([store_bytes(subject, fits) for subject, fits in waiting]) if waiting else 1
    running: dict[ray.ObjectRef, int] = {}
    with tqdm(total=sum(len(fits) for _, fits in waiting), desc="fit ridge", unit="decoder", disable=not waiting) as progress:
        while waiting or running:
            while waiting and len(set(running.values())) < n_at_once:
                subject, fits = waiting.pop(0)
                running |= dict.fromkeys(fit_ridge(subject, fits, n_at_once), subject.subject)
            [done], _ = ray.wait(list(running), num_returns=1)
            if warning := ray.get(done):
                tqdm.write(f"  warning: {warning}")
            del running[done]
            progress.update()
            record("nsdray_queue", len(running), stage="fit ridge", state="submitted")


def fit_ridge(subject: SubjectPlan, fits: Sequence[Fit], n_at_once: int = 1) -> list[ray.ObjectRef]:
    """Start fitting a subject's ridges, n_at_once subjects being in work; each reference resolves, to a warning or "", when a
    decoder and its test predictions are finished."""
    plan, shared = subject.plan, ray.put(subject)
    whole, share = task_options(subject, needed_bytes(subject, fits, keep=False), n_at_once)
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

    def solve(kind: int, with_basis: bool) -> tuple:
        """What the kind's targets are solved with: choice, kernel, eigendecomposition, smoothers, basis."""
        own, used, parts = settings[kind], kernel, eigen
        choice = choose.remote(own, candidates, kind, *scores) if scores else Choice(tuple(own["alphas"]), candidates[0])
        if len(candidates) > 1:  # which are chosen is not known yet
            used = make_kernel.options(**whole).remote(betas, choice, ridge.dtype)
            parts = decompose.options(**whole).remote(used) if ridge.per_target else None
        return choice, used, parts, *solve_kernel.options(**whole).remote(shared, betas, used, parts, choice, with_basis)

    keys = [kind if scores else tuple(own["alphas"]) for kind, own in enumerate(settings)]  # kinds of one alpha share all of it
    written = {key for key, own in zip(keys, settings) if own["weights"]}
    solved = {key: solve(keys.index(key), key in written) for key in dict.fromkeys(keys)}
    for fit, own, key in zip(fits, settings, keys):
        choice, used, parts, smoothers, basis = solved[key]
        basis = basis if own["weights"] else None
        parts = parts if ridge.per_target and (own["weights"] or scored_apart(own)) else None
        blocks = blocks_of(plan.columns(fit.kind), sizes_of(subject, fit, plan.columns(fit.kind)))
        tasks = [fit_blocks.options(**share).remote(shared, fit, used, smoothers, parts, basis, some)
                 for some in batches(subject, fit, blocks)]  # fmt: skip
        done.append(write_fit.options(**writing_options(subject, fit)).remote(shared, fit, basis, scaling, choice, *tasks))
    return done


def batches(subject: SubjectPlan, fit: Fit, blocks: list[list[str]]) -> Iterator[list[list[str]]]:
    """Blocks in as many tasks as keep every CPU busy to the end, several to a task so that it can read ahead."""
    sizes = [sum(sizes_of(subject, fit, block)) for block in blocks]
    for share in equal_shares(sizes, 4 * max(1, int(ray.cluster_resources().get("CPU", 1)))):
        yield blocks[share]
