"""What the report of a finished plan says and shows: tables with error bars, curves, grids, provenance."""
from __future__ import annotations

import dataclasses
import json
import platform
from importlib.metadata import version

import numpy as np
import pandas as pd

from nsdray.cluster import run
from nsdray.metrics.bootstrap import Estimate, bootstrap, paired_difference
from nsdray.metrics.table import LATENT_METRICS, format_table
from nsdray.models.backbones import BACKBONES
from nsdray.report import Cell, Code, Figure, Line, Row, Section, Table, line_chart, picture_grid, png, render
from nsdray.seeds import rng
from nsdray.stages import Fit, Plan, SubjectPlan

N_GRID_IMAGES = 12
N_EXTREMES = 4
LABELS = {"mean": "no brain (mean target)", "nearest": "nearest training image"}


def scores_of(subject: SubjectPlan, model: str) -> pd.DataFrame:
    """All scores of a subject's test set: stage, metric, pairing, image_id, value."""
    return subject.plan.metrics(model).read(subject.folder, "scores.parquet").to_pandas()


def mean_scores(subject: SubjectPlan, model: str) -> dict[str, float]:
    """Mean over test images, by "stage/metric/pairing"."""
    means = scores_of(subject, model).groupby(["stage", "metric", "pairing"], observed=True)["value"].mean()
    return {"/".join(key): float(value) for key, value in means.items()}


def pooled(plan: Plan, model: str) -> dict[str, np.ndarray]:
    """Scores of the images that all subjects saw, by "stage/metric/pairing": (n_images, n_subjects) each."""
    keys = ["stage", "metric", "pairing", "image_id"]
    frames = [scores_of(subject, model).set_index(keys)["value"] for subject in plan.subjects]
    table = pd.concat(frames, axis=1, join="inner").sort_index()
    return {"/".join(key): group.to_numpy() for key, group in table.groupby(level=[0, 1, 2], observed=True)}


def summary(plan: Plan, model: str) -> dict[str, Estimate]:
    """Means over images and subjects with their intervals, by "stage/metric/pairing"; an image is drawn with all its
    subjects."""
    n, seed = plan.config.evaluation.n_bootstrap, plan.config.seed
    return {name: bootstrap(values, n, seed) for name, values in pooled(plan, model).items()}


def table_columns(plan: Plan) -> list[str]:
    """"stage/metric" of the comparison, in order."""
    pictures = [f"{stage}/{metric.name}" for stage in plan.picture_stages for metric in plan.suite_metrics]
    return [f"latents/{metric}" for metric in LATENT_METRICS] + pictures


def report_table(plan: Plan) -> str:
    """The table that a job prints: per model its subjects, all of them with half the 95 % interval, wrong pairs, and the
    pictures from the truth; then the controls."""
    columns, rows = table_columns(plan), []

    def line(model: str, who: object, values: dict, pairing: str = "matched") -> None:
        rows.append({"model": model, "subject": who} | {name: values.get(f"{name}/{pairing}") for name in columns})

    for model in plan.sources:
        estimates = summary(plan, model)
        means = {name: estimate.mean for name, estimate in estimates.items()}
        if model in plan.config.models:
            for subject in plan.subjects:
                line(model, subject.subject, mean_scores(subject, model))
        line(model, "all", means)
        line(model, "±", {name: (e.high - e.low) / 2 for name, e in estimates.items()})
        if model in plan.config.models:
            line(model, "chance", means, "chance")
            line(model, "ceiling", means, "ceiling")
    source = "SIMULATED brain data" if plan.is_simulated else "NSD"
    title = f"Means over test images, {source}, {plan.config.n_layers} VDVAE layers; ±: half the 95 % interval"
    notes = [*(f"{name}: {text}" for name, text in LABELS.items() if name in plan.sources), *metric_notes(plan)]
    return "\n".join([title, format_table(rows), *notes]) + "\n"


def metric_notes(plan: Plan) -> list[str]:
    """Which way is better, and what could not be computed."""
    lower = [metric.name for metric in plan.suite_metrics if metric.direction == "lower"]
    notes = [f"lower is better: latent errors{''.join(f', {name}' for name in lower)}; higher is better: all else"]
    missing = [metric for metric in plan.suite_metrics if metric.backbone and metric.backbone not in plan.backbone_files]
    notes += [f"{metric.name}: not computed, weights missing ({BACKBONES[metric.backbone].file})" for metric in missing]
    return notes


def show(estimate: Estimate | None) -> Cell:
    """A mean with its interval."""
    if estimate is None:
        return Cell("–")
    return Cell(f"{estimate.mean:.3f}", f"{estimate.low:.3f} … {estimate.high:.3f}")


def score_section(plan: Plan) -> Section:
    """The comparison, per stage, with intervals; and the differences between models."""
    estimates = {model: summary(plan, model) for model in plan.sources}
    tables = []
    for stage in ("latents", *plan.picture_stages):
        columns = [name for name in table_columns(plan) if name.startswith(f"{stage}/")]
        rows = [
            Row([Cell(LABELS.get(model, model)), *(show(own.get(f"{name}/matched")) for name in columns)], model in LABELS)
            for model, own in estimates.items()
            if f"{columns[0]}/matched" in own
        ]
        first = estimates[plan.config.models[0]]
        for pairing, label in (("chance", "chance (wrong pairs)"), ("ceiling", "ceiling (from the truth)")):
            if f"{columns[0]}/{pairing}" in first:
                rows.append(Row([Cell(label), *(show(first.get(f"{name}/{pairing}")) for name in columns)], True))
        tables.append(Table([stage, *(name.split("/", 1)[1] for name in columns)], rows))
    text = [
        "Means over test images and subjects; below them the 95 % interval, from resampling images with all their subjects.",
        *metric_notes(plan),
    ]
    return Section("Scores", text, [*tables, *difference_tables(plan), *subject_tables(plan)])


def difference_tables(plan: Plan) -> list[Table]:
    """Each other model less the first, paired by image."""
    first, *others = plan.config.models
    columns, n = table_columns(plan), plan.config.evaluation.n_bootstrap
    base, rows = pooled(plan, first), []
    for model in others:
        own = pooled(plan, model)
        keys = [f"{name}/matched" for name in columns]
        rows.append(Row([Cell(f"{model} − {first}"), *(show(paired_difference(own[k], base[k], n)) for k in keys)]))
    if not rows:
        return []
    return [Table(["paired by image", *columns], rows, "Differences between models", folded=True)]


def subject_tables(plan: Plan) -> list[Table]:
    """One table per subject, folded."""
    columns, tables, evaluation = table_columns(plan), [], plan.config.evaluation
    for subject in plan.subjects:
        rows = []
        for model in plan.sources:
            matched = scores_of(subject, model).query("pairing == 'matched'")
            groups = {"/".join(key): group["value"] for key, group in matched.groupby(["stage", "metric"], observed=True)}
            cells = (groups.get(name) for name in columns)
            rows.append(
                Row([Cell(LABELS.get(model, model)),
                     *(show(None if c is None else bootstrap(c.to_numpy(), evaluation.n_bootstrap)) for c in cells)])
            )  # fmt: skip
        title = f"Subject {subject.subject}: {len(subject.voxels.index)} voxels, {len(subject.image_ids('test'))} test images"
        tables.append(Table(["model", *columns], rows, title, folded=True))
    return tables


def curve_section(plan: Plan) -> Section | None:
    """Learning curves of the networks."""
    figures = []
    for model in plan.config.models:
        stage, lines = plan.model(Fit(model, "vdvae")), {}
        for subject in plan.subjects:
            folder = f"{stage.folder}/{subject.folder}"
            if "history.json" not in plan.store.sizes(folder):
                continue
            history = json.loads(plan.store.read_bytes(f"{folder}/history.json"))
            epochs = [entry["epoch"] + 1 for entry in history]
            lines[f"subject {subject.subject}"] = Line(epochs, [entry["val_loss"] for entry in history])
        if lines:
            figures.append(Figure(line_chart(lines, "epoch", "validation loss (standardised latents)"), model))
    return Section("Learning curves", figures=figures, side_by_side=True) if figures else None


def columns_of(subject: SubjectPlan, rows: np.ndarray | slice) -> dict[str, np.ndarray]:
    """Pictures of some test images: seen | each model's stages | the last stage from the truth."""
    plan = subject.plan
    columns = {"seen": run.seen_pictures(subject)[rows]}
    for model in plan.config.models:
        for number, stage in enumerate(plan.picture_stages, 1):
            columns[f"{model}, stage {number}"] = run.decoded_pictures(subject, model, stage)[rows]
    columns["from the truth"] = run.decoded_pictures(subject, None, plan.picture_stages[-1])[rows]
    return columns


def source_name(plan: Plan) -> str:
    return "SIMULATED brain data" if plan.is_simulated else "NSD"


def subject_grid(subject: SubjectPlan) -> bytes:
    """PNG of a subject's first test images."""
    title = f"subject {subject.subject}, {subject.plan.config.n_layers} layers, {source_name(subject.plan)}"
    return png(picture_grid(columns_of(subject, slice(N_GRID_IMAGES)), title, n_columns_side=2))


def picture_section(subject: SubjectPlan) -> Section:
    """A subject's best, median and worst images by the first model, and random ones."""
    plan, model = subject.plan, subject.plan.config.models[0]
    scores = {"/".join(key): group["value"].to_numpy() for key, group in
              scores_of(subject, model).groupby(["stage", "metric", "pairing"], observed=True, sort=False)}  # fmt: skip
    names = [f"{plan.picture_stages[-1]}/{metric.name}/matched" for metric in plan.suite_metrics]
    semantic = [name for name, metric in zip(names, plan.suite_metrics) if metric.comparison == "two_way"]
    name = next(name for name in [*semantic, *names] if name in scores)
    order, n = np.argsort(-scores[name], kind="stable"), len(scores[name])
    k = min(N_EXTREMES, n)
    middle = max(0, n // 2 - k // 2)
    chosen = {"best": order[:k], "median": order[middle : middle + k], "worst": order[-k:],
              "random": rng(plan.config.seed, "report", subject.subject).permutation(n)[:k]}  # fmt: skip
    figures = [Figure(png(picture_grid(columns_of(subject, rows), f"{label} of {n}")), label) for label, rows in chosen.items()]
    stage, _, metric = name.removesuffix("/matched").partition("/")
    text = [f"Best, median and worst by {metric} of {model}'s {stage}; random ones whatever their score."]
    return Section(f"Subject {subject.subject}", text, figures=figures, side_by_side=True)


def provenance(plan: Plan) -> Section:
    """Configuration, weights, versions."""
    hashes = {"VDVAE": plan.vdvae_sha256}
    if plan.has_stage2:
        hashes |= {"CLIP": plan.clip_sha256, "Versatile Diffusion": plan.diffusion_sha256}
    packages = {name: version(name) for name in ("nsdray", "ray", "torch", "diffusers", "open_clip_torch", "numpy", "pyarrow")}
    code = [
        Code("Configuration", json.dumps(dataclasses.asdict(plan.config), indent=1)),
        Code("SHA-256 of the weights", json.dumps(hashes, indent=1)),
        Code("Versions", json.dumps({"python": platform.python_version()} | packages, indent=1)),
        Code("Data sets", "\n".join(f"{name}: {stage.uri()}" for name, stage in data_sets(plan).items())),
    ]
    return Section("Configuration and provenance", code=code)


def data_sets(plan: Plan) -> dict[str, object]:
    """Where everything lies."""
    stages = {"betas": plan.betas, "samples": plan.samples} | {f"targets {kind}": plan.targets(kind) for kind in plan.kinds}
    for fit in plan.fits:
        stages |= {f"model {plan.label(fit)}": plan.model(fit), f"predictions {plan.label(fit)}": plan.predictions(fit)}
    for model in plan.sources:
        stages |= {f"{name} {model}": stage for name, stage in plan.pictures_of(model).items()}
    return stages


def report_page(plan: Plan, extra: tuple[Section, ...] = ()) -> str:
    """The HTML report."""
    config = plan.config
    warning = ""
    if plan.is_simulated:
        warning = "SIMULATED brain data (the miniature NSD): it shows that the method works and says nothing about real brains."
    subtitle = (
        f"Subjects {', '.join(str(s.subject) for s in plan.subjects)} · {config.n_layers} VDVAE layers "
        f"({config.targets.vdvae}) · stage 2: {config.stage2.model} · models {', '.join(config.models)} · seed {config.seed}"
    )
    sections = [score_section(plan), *extra, *(picture_section(subject) for subject in plan.subjects), curve_section(plan),
                provenance(plan)]  # fmt: skip
    return render(f"nsdray: {config.recipe}", subtitle, [section for section in sections if section], warning)


def write_report(plan: Plan) -> None:
    """Table, picture grids and the page, into the store."""
    stage, partition = plan.report, plan.report_partition
    stage.claim()
    if stage.begin(partition, plan.report_wanted):
        folder = f"{stage.folder}/{partition}"
        plan.store.write_bytes(f"{folder}/table.txt", report_table(plan).encode())
        for subject in plan.subjects:
            plan.store.write_bytes(f"{folder}/subject{subject.subject:02d}.png", subject_grid(subject))
        plan.store.write_bytes(f"{folder}/report.html", report_page(plan).encode())
        stage.finish(partition, plan.report_wanted)


def report_file(plan: Plan, name: str) -> bytes:
    """A file of the written report: "table.txt", "report.html" or "subject01.png"."""
    return plan.store.read_bytes(f"{plan.report.folder}/{plan.report_partition}/{name}")
