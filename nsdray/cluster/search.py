"""What a search found: table, charts of quality against cost, the Pareto fronts, and the best configuration as a recipe file."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import ray

from nsdray.cluster.results import flatten, suffix, tracking
from nsdray.cluster.scores import source_name
from nsdray.cluster.trials import WHOLE, training_settings
from nsdray.cluster.tune import prepare_search, run_search, search_plan
from nsdray.config import Config, StoreConfig, digest
from nsdray.metrics.pareto import pareto_front
from nsdray.metrics.table import format_table
from nsdray.report import Cell, Code, Dots, Figure, Line, Row, Section, Table, dot_chart, line_chart, render
from nsdray.stages import Plan

COSTS = {
    "parameters": ("n_parameters", 1e-6, "parameters of a subject's model (millions)"),
    "training": ("train_s", 1.0, "training of a subject's model (s)"),
    "decoding": ("decode_s", 1e3, "decoding a picture (ms)"),
}
"""Charts of quality against cost: column, factor and label of the x axis."""
FILES = ("table.txt", "trials.csv", *(f"{cost}.svg" for cost in COSTS), "depth.svg", "best.json", "report.html")
SHOWN = ("n_layers", "hidden", "dropout", "learning_rate", "score", "±", "ssim", "pixcorr", "val_mse", "parameters/M", "train/s",
         "decode/ms", "epochs", "front", "status")  # fmt: skip


def search(config: Config) -> list[str]:
    """Search, once for all subjects or once for each; the folders of the searches, with FILES in them."""
    base = f"searches/{config.search.name or config.recipe}"
    if not config.search.per_subject:
        return [search_one(config, base)]
    each = [replace(config, data=replace(config.data, subjects=(s,))) for s in config.data.subjects]
    return [search_one(own, f"{base}/subject={own.data.subjects[0]:02d}") for own in each]


def search_one(config: Config, folder: str) -> str:
    """Bring one search up to date and write what it found."""
    plan = search_plan(config)
    prepare_search(plan)
    with tracking(plan) as tracker:
        params = flatten(asdict(plan.config))
        tags = {"kind": "search", "data": "simulated" if plan.is_simulated else "nsd"}
        ray.get(tracker.start.remote(folder, f"search: {folder.removeprefix('searches/')}{suffix(plan)}", params, tags))
        trials = with_fronts(run_search(plan, folder, tracker), plan)
        networks, best = trials[trials["model"] != "ridge"], trials[trials["status"].isin(WHOLE)].iloc[0]
        files = {"table.txt": search_table(plan, trials).encode(), "trials.csv": trials.to_csv(index=False).encode()}
        is_found = networks["status"].isin(("trained", "unfinished")).any()
        if is_found:
            files |= found(plan, trials, best_recipe(replace(plan.config, stage2=config.stage2), best))
        for name, data in files.items():
            plan.store.write_bytes(f"{folder}/{name}", data)
        if not is_found:
            status = networks.iloc[0]["status"]
            raise ValueError(f"no trial could be trained, as {plan.store.uri(folder)}/table.txt shows; the first: {status}")
        scores = {name: float(best[name]) for name in ("score", "ssim", "pixcorr")}
        ray.get(tracker.log_result.remote(folder, scores, {"found": plan.store.uri(folder)}, files))
    return folder


def fronts(plan: Plan, trials: pd.DataFrame, cost: str = "n_parameters") -> dict[str, np.ndarray]:
    """Which rows are on the Pareto front of score and a column of costs, over all subjects ("all") and for each, (n,) bool."""
    whole = trials["status"].isin(WHOLE)

    def front(of: str) -> np.ndarray:
        return pareto_front(np.where(whole, trials[f"{cost}{of}"], np.nan), trials[f"score{of}"])

    subjects = [str(subject.subject) for subject in plan.subjects] if len(plan.subjects) > 1 else []
    return {"all": front("")} | {subject: front(f"_{subject}") for subject in subjects}


def with_fronts(trials: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Best first, with the column "front": for whom ("all", or subjects) a row is on the front of score and parameters."""
    trials = trials.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)
    masks = fronts(plan, trials)
    trials["front"] = [" ".join(who for who, mask in masks.items() if mask[i]) for i in range(len(trials))]
    return trials


def found(plan: Plan, trials: pd.DataFrame, best: Config) -> dict[str, bytes]:
    """What a search leaves beside its table: charts, the best configuration (without credentials of the store), a report."""
    recipe = json.dumps(asdict(replace(best, store=StoreConfig(best.store.root and plan.store.root))), indent=1)
    charts = {f"{cost}.svg": cost_chart(plan, trials, cost) for cost in COSTS} | {"depth.svg": depth_chart(plan, trials)}
    return {**charts, "best.json": recipe.encode(), "report.html": page(plan, trials, charts, recipe).encode()}


def shown_rows(trials: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the table, best first."""
    rows = []
    for trial in trials.to_dict("records"):
        values = trial | {"parameters/M": trial["n_parameters"] / 1e6, "train/s": trial["train_s"],
                          "decode/ms": 1000 * trial["decode_s"], "epochs": none_if_nan(trial.get("epochs"), round),
                          "±": trial["score_error"], "status": str(trial["status"]).split(":")[0]}  # fmt: skip
        values |= {name: none_if_nan(trial.get(name), int) for name in ("hidden", "n_layers")}
        rows.append({"model": trial["model"]} | {name: none_if_nan(values.get(name)) for name in SHOWN})
    return rows


def none_if_nan(value: Any, kind: Callable[[float], Any] | None = None) -> Any:
    """None for what is not there."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    return kind(value) if kind else value


def title_of(plan: Plan) -> str:
    subjects = " ".join(str(subject.subject) for subject in plan.subjects)
    return f"Search on validation images, {source_name(plan)}, subjects {subjects}, {len(plan.config.search.n_layers)} depths"


def notes(plan: Plan) -> list[str]:
    """How to read the table."""
    return [
        "score: mean of SSIM and PixCorr of stage-1 pictures of validation images; higher is better, and depths can be compared.",
        "±: half the 95 % bootstrap interval over these images. val_mse: of raw latents, within a depth only.",
        "train: s a subject; decode: ms a picture, prediction included. epochs: those trained, a mean over subjects.",
        "unfinished: stopped by ASHA (a ring in the charts, on no front); the first trial of each depth trains to its end.",
        "front: for whom nothing with as few parameters is as good. ridge: a reference; it predicts without weights.",
    ]


def search_table(plan: Plan, trials: pd.DataFrame) -> str:
    """The table as text."""
    return "\n".join([title_of(plan), format_table(shown_rows(trials)), *notes(plan)]) + "\n"


def cost_chart(plan: Plan, trials: pd.DataFrame, name: str) -> bytes:
    """Score against one of COSTS, with the fronts over all subjects and of each; rings are trials that were stopped."""
    column, factor, label = COSTS[name]
    shown = trials[trials["status"].isin((*WHOLE, "unfinished"))]
    dots = {}
    for model, own in shown.groupby("model"):
        depths, stopped = own["n_layers"].astype(int).astype(str), own["status"] == "unfinished"
        dots[model] = Dots(factor * own[column], own["score"], depths, stopped)
    lines = {}
    for who, mask in fronts(plan, trials, column).items():
        of = "" if who == "all" else f"_{who}"
        front = trials[mask].sort_values(f"{column}{of}")
        lines["Pareto front" if who == "all" else f"subject {who}"] = factor * front[f"{column}{of}"], front[f"score{of}"]
    return dot_chart(dots, label, f"score of validation pictures, {source_name(plan)}", lines)


def depth_chart(plan: Plan, trials: pd.DataFrame) -> bytes:
    """The best score of every model at every depth, of what was trained to its end, with the interval over images."""
    whole = trials[trials["status"].isin(WHOLE)]
    depths = sorted(whole["n_layers"].unique())
    lines = {}
    for model, own in whole.groupby("model"):
        best = own.loc[own.groupby("n_layers")["score"].idxmax()]
        score, error = (best[name].to_numpy() for name in ("score", "score_error"))
        place = [depths.index(n) for n in best["n_layers"]]
        lines[model] = Line(place, score, score - error, score + error, dashed=model == "ridge")
    label = f"best score of validation pictures, {source_name(plan)}"
    return line_chart(lines, "VDVAE layers predicted", label, [str(int(n)) for n in depths])


def best_recipe(config: Config, best: pd.Series) -> Config:
    """A trial, or ridge at a depth, as a configuration that `jobs/train_all_subjects.py` takes."""
    name = f"{config.search.name or config.recipe}-best"
    config = replace(config, recipe=name, models=(best.model,), n_layers=int(best.n_layers))
    if best.model == "ridge":
        return config
    network = replace(training_settings(config, best.model), hidden=int(best.hidden), dropout=float(best.dropout),
                      learning_rate=float(best.learning_rate))  # fmt: skip
    return replace(config, **{best.model: network})


def page(plan: Plan, trials: pd.DataFrame, charts: dict[str, bytes], best: str) -> str:
    """The search's own report."""
    rows = [Row([Cell(cell_text(value)) for value in row.values()], row["model"] == "ridge") for row in shown_rows(trials)]
    figures = [Figure(chart, f"Quality against {name.removesuffix('.svg')}") for name, chart in charts.items()]
    space = json.dumps(asdict(plan.config.search), indent=1)
    sections = [
        Section("Which depth is worth its cost", notes(plan), figures=figures, side_by_side=True),
        Section("Trials", tables=[Table(["model", *SHOWN], rows)]),
        Section("Configuration", code=[Code("Search space", space), Code("Best configuration (best.json)", best)]),
    ]
    warning = "SIMULATED brain data (the miniature NSD): it says nothing about real brains." if plan.is_simulated else ""
    return render("nsdray: search", f"{title_of(plan)} · {digest(json.loads(space))}", sections, warning)


def cell_text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
