"""How much stage 2 owes to stage 1: noise is added to the stage-1 picture, and stage 2 made anew (paper, 3.4 and table 6)."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import ray

from nsdray.cluster import run
from nsdray.cluster.report import report_page, show, source_name, summary
from nsdray.cluster.results import parent_key, start_runs, train_all_subjects
from nsdray.cluster.tracking import start_tracker
from nsdray.config import Config
from nsdray.metrics.bootstrap import Estimate
from nsdray.metrics.table import format_table
from nsdray.report import Cell, Figure, Line, Row, Section, Table, line_chart
from nsdray.stages import Plan
from nsdray.store import Stage

LEVELS = (0.0, 8.0, 16.0, 32.0, 64.0, 256.0)
"""Factors of N(0, 1) noise on pictures in 0..255. The paper calls 256 pure noise; no picture at all is a row of its own."""
WITHOUT = "no picture"


def noise_plans(config: Config) -> dict[str, Plan]:
    """A plan per row of the table, by its label: the first model only, without controls."""
    base = replace(config, models=config.models[:1], evaluation=replace(config.evaluation, controls=False))
    plans = {f"{level:g}": Plan(replace(base, stage2=replace(base.stage2, noise=level))) for level in LEVELS}
    return plans | {WITHOUT: Plan(replace(base, stage2=replace(base.stage2, start="noise", strength=1.0)))}


def noise_sensitivity(plan: Plan) -> Stage:
    """Bring every level up to date, write table, curves and page, log them to the plan's MLflow run; returns their stage."""
    if not plan.has_stage2 or plan.config.stage2.start != "stage1":
        raise ValueError("noise sensitivity needs a stage 2 that starts from the stage-1 picture: --stage2.start stage1")
    plans = noise_plans(plan.config)
    metrics = [own.metrics(own.config.models[0]).hash for own in plans.values()]
    stage = plan.store.stage("reports/noise", {"stage": "noise", "report": plan.report.hash, "metrics": metrics})
    wanted = {name: plan.report_wanted["table.txt"] for name in ("table.txt", "curve.svg", "report.html")}
    if not stage.missing(plan.report_partition, wanted):
        return stage
    train_all_subjects(plan)
    run.start_ray(plan)
    for own in plans.values():
        run.reconstruct_test_sets(own)
        run.embed_test_sets(own)
        run.evaluate_test_sets(own)
    estimates = {label: summary(own, own.config.models[0]) for label, own in plans.items()}
    section, curve = noise_section(plan, estimates)
    stage.claim()
    stage.begin(plan.report_partition, wanted)
    files = {"table.txt": noise_table(plan, estimates).encode(), "curve.svg": curve,
             "report.html": report_page(plan, (section,)).encode()}  # fmt: skip
    for name, data in files.items():
        plan.store.write_bytes(f"{stage.folder}/{plan.report_partition}/{name}", data)
    stage.finish(plan.report_partition, wanted)
    tracker = start_tracker(plan.store)
    start_runs(plan, tracker)
    scores = {f"noise_{label}_{metric}".replace(" ", "_").replace("/", "_"): own[f"stage2/{metric}/matched"].mean
              for label, own in estimates.items() for metric in computed(estimates)}  # fmt: skip
    named = {f"noise-{name}" if name != "report.html" else name: data for name, data in files.items()}
    ray.get(tracker.log_result.remote(parent_key(plan), scores, {"noise": plan.store.uri(stage.folder)}, named))
    ray.get(tracker.close.remote("FINISHED"))
    return stage


def computed(estimates: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    """Names of stage 2's metrics."""
    names = next(iter(estimates.values()))
    return [name.removeprefix("stage2/").removesuffix("/matched") for name in names
            if name.startswith("stage2/") and name.endswith("/matched")]  # fmt: skip


def noise_table(plan: Plan, estimates: Mapping[str, Mapping[str, Estimate]]) -> str:
    """The table as text."""
    rows = [{"noise": label} | {metric: own[f"stage2/{metric}/matched"].mean for metric in computed(estimates)}
            for label, own in estimates.items()]  # fmt: skip
    model = plan.config.models[0]
    return f"Stage 2 of {model} under noise on its stage-1 picture, {source_name(plan)}\n{format_table(rows)}\n"


def noise_section(plan: Plan, estimates: Mapping[str, Mapping[str, Estimate]]) -> tuple[Section, bytes]:
    """The report's section, and its chart."""
    rows, lines, metrics = [], {}, computed(estimates)
    for label, own in estimates.items():
        rows.append(Row([Cell(label), *(show(own[f"stage2/{metric}/matched"]) for metric in metrics)]))
    for metric in metrics:
        values = [own[f"stage2/{metric}/matched"] for own in estimates.values()]
        lines[metric] = Line(np.arange(len(values)), *([getattr(v, part) for v in values] for part in ("mean", "low", "high")))
    curve = line_chart(lines, "noise added to the stage-1 picture (0–255)", "mean over test images", list(estimates))
    text = [
        "N(0, 1) noise times the first column is added to the stage-1 picture in 0..255 and clipped; tokens stay as they are. "
        f"Stage 2 of {plan.config.models[0]}, {source_name(plan)}."
    ]
    return Section("Noise sensitivity", text, [Table(["noise", *metrics], rows)], [Figure(curve)]), curve
