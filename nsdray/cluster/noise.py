"""How much stage 2 owes to stage 1: noise is added to the stage-1 picture, and stage 2 made anew (paper, 3.4 and table 6)."""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from nsdray.cluster import run
from nsdray.cluster.scores import source_name, summary
from nsdray.metrics.bootstrap import Estimate
from nsdray.metrics.table import format_table
from nsdray.report import Cell, Figure, Line, Row, Section, Table, line_chart, show
from nsdray.stages import Plan

LEVELS = (0.0, 8.0, 16.0, 32.0, 64.0, 256.0)
"""Factors of N(0, 1) noise on pictures in 0..255. The paper calls 256 pure noise; no picture at all is a row of its own."""
WITHOUT = "no picture"
Curves = dict[str, dict[str, Estimate]]
"""Stage 2's scores by the label of the level, then by the metric's name."""


def is_possible(plan: Plan) -> bool:
    """Whether there is a stage 2 that starts from the stage-1 picture."""
    return plan.has_stage2 and not plan.is_referee and plan.config.stage2.start == "stage1"


def noise_plans(plan: Plan) -> dict[str, Plan]:
    """A plan per row of the table, by its label: the first model only, without controls and ceiling."""
    evaluation = replace(plan.config.evaluation, controls=False, ceiling=False, seeds=())
    base = replace(plan.config, models=plan.config.models[:1], evaluation=evaluation)
    plans = {f"{level:g}": Plan(replace(base, stage2=replace(base.stage2, noise=level))) for level in LEVELS}
    return plans | {WITHOUT: Plan(replace(base, stage2=replace(base.stage2, start="noise", strength=1.0)))}


def make_noise_levels(plan: Plan) -> None:
    """Bring every level up to date; what comes before stage 2 must be there."""
    for own in noise_plans(plan).values():
        run.reconstruct_test_sets(own)
        run.embed_test_sets(own)
        run.evaluate_test_sets(own)


def noise_curves(plan: Plan) -> Curves | None:
    """The scores of all levels; None while some are missing."""
    if not is_possible(plan):
        return None
    plans = noise_plans(plan)
    if any(run.anything_missing(run.metrics_partitions(own)) for own in plans.values()):
        return None
    names = [f"stage2/{metric.name}" for metric in plan.suite_metrics]
    found = {label: summary(own, own.config.models[0]) for label, own in plans.items()}
    return {label: {name.removeprefix("stage2/"): own[f"{name}/matched"] for name in names if f"{name}/matched" in own}
            for label, own in found.items()}  # fmt: skip


def noise_table(plan: Plan, curves: Curves) -> str:
    """The table as text."""
    rows = [{"noise": label} | {metric: estimate.mean for metric, estimate in own.items()} for label, own in curves.items()]
    return f"Stage 2 of {plan.config.models[0]} under noise on its stage-1 picture, {source_name(plan)}\n{format_table(rows)}\n"


def noise_section(plan: Plan) -> Section | None:
    """The report's section, if the levels are finished."""
    curves = noise_curves(plan)
    if curves is None:
        return None
    metrics = list(next(iter(curves.values())))
    rows = [Row([Cell(label), *(show(own[metric]) for metric in metrics)]) for label, own in curves.items()]
    figures = []
    for (suite, direction), names in charts_of(plan, metrics).items():
        lines = {}
        for metric in names:
            values = [own[metric] for own in curves.values()]
            parts = ([getattr(value, part) for value in values] for part in ("mean", "low", "high"))
            lines[metric.removeprefix(f"{suite}/")] = Line(np.arange(len(values)), *parts)
        axis = "noise added to the stage-1 picture (0–255)"
        figures.append(Figure(line_chart(lines, axis, "mean over test images", list(curves)), f"{suite}: {direction} is better"))
    text = [
        "N(0, 1) noise times the first column is added to the stage-1 picture in 0..255 and clipped; tokens stay as they are. "
        f"Stage 2 of {plan.config.models[0]}, {source_name(plan)}."
    ]
    return Section("Noise sensitivity", text, [Table(["noise", *metrics], rows)], figures, side_by_side=True)


def charts_of(plan: Plan, metrics: list[str]) -> dict[tuple[str, str], list[str]]:
    """Which metrics one chart shows: those of a suite of which the same direction is better."""
    charts: dict[tuple[str, str], list[str]] = {}
    for metric in plan.suite_metrics:
        if metric.name in metrics:
            charts.setdefault((metric.name.split("/")[0], metric.direction), []).append(metric.name)
    return charts
