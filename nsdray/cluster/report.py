"""What the report of a finished plan says and shows: tables with error bars, curves, grids, provenance."""
from __future__ import annotations

import dataclasses
import json
import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from nsdray.cluster import run
from nsdray.cluster.noise import noise_section
from nsdray.cluster.ridge_report import ridge_section
from nsdray.cluster.scores import (
    common_images,
    mean_scores,
    pooled,
    scores_of,
    source_name,
    spread_over_seeds,
    summary,
    table_columns,
)
from nsdray.metrics.bootstrap import bootstrap, paired_difference
from nsdray.metrics.published import PUBLISHED
from nsdray.metrics.table import N_POOL, format_table
from nsdray.models.backbones import BACKBONES
from nsdray.report import Cell, Code, Figure, Line, Row, Section, Table, line_chart, picture_grid, png, render, show
from nsdray.seeds import rng
from nsdray.stages import IMAGES, Plan, SubjectPlan
from nsdray.store import redacted

N_GRID_IMAGES = 12
N_EXTREMES = 4
LABELS = {"mean": "no brain (mean target)", "nearest": "nearest training image", "vae": "the seen picture through stage 2's VAE"}


def report_table(plan: Plan) -> str:
    """The table that a job prints: per model its subjects, all of them with half the 95 % interval, wrong pairs, and the
    pictures from the truth; then the controls."""
    columns, rows = table_columns(plan), []

    def line(model: str, who: object, values: dict, pairing: str = "matched") -> None:
        rows.append({"model": model, "subject": who} | {name: values.get(f"{name}/{pairing}") for name in columns})

    for model in plan.sources:
        estimates = summary(plan, model)
        means = {name: estimate.mean for name, estimate in estimates.items()}
        if model in plan.models:
            for subject in plan.subjects:
                line(model, subject.subject, mean_scores(subject, model))
        line(model, "all", means)
        line(model, "±", {name: (e.high - e.low) / 2 for name, e in estimates.items()})
        if model in plan.models:
            if plan.replicates:
                line(model, "seeds", spread_over_seeds(plan, model))
            line(model, "chance", means, "chance")
            if plan.has_ceiling:
                line(model, "ceiling", means, "ceiling")
    what = plan.config.evaluation.images if plan.is_referee else f"{plan.config.n_layers} VDVAE layers"
    title = f"Means over test images, {source_name(plan)}, {what}; ±: half the 95 % interval"
    if plan.replicates:
        title += f"; seeds: SD over trainings with seeds {', '.join(map(str, seeds_of(plan)))}"
    notes = [*(f"{name}: {text}" for name, text in LABELS.items() if name in plan.sources), *metric_notes(plan)]
    return "\n".join([title, format_table(rows), *notes]) + "\n"


def seeds_of(plan: Plan) -> tuple[int, ...]:
    """All training seeds."""
    return (plan.config.seed, *plan.config.evaluation.seeds)


def metric_notes(plan: Plan) -> list[str]:
    """What is what, which way is better, and what could not be computed."""
    lower = [metric.name for metric in plan.suite_metrics if metric.direction == "lower"]
    better = ["latent errors"] * (not plan.is_referee) + lower
    notes = [f"lower is better: {', '.join(better)}; higher is better: all else"] if better else ["higher is better"]
    if "tokens/forward" in table_columns(plan):
        n_pool = min([N_POOL, *(len(subject.image_ids("test")) for subject in plan.subjects)])
        notes.append(f"tokens: top-1 retrieval among {n_pool} images by predicted CLIP-vision tokens; forward: brain to image")
    notes.append("chance: the same pictures, paired with other images: what the betas of another image would give")
    numbers = [len(subject.image_ids("test")) for subject in plan.subjects]
    if (n_common := len(common_images(plan))) < max(numbers):
        notes.append(f"all: the {n_common} test images that every subject saw (subjects alone: {', '.join(map(str, numbers))})")
    if plan.replicates:
        notes.append("seeds: of trainings; the draws of stages 1 and 2 are the same in all")
    missing = [metric for metric in plan.suite_metrics if metric.backbone and metric.backbone not in plan.backbone_files]
    notes += [f"{metric.name}: not computed, weights missing ({BACKBONES[metric.backbone].file})" for metric in missing]
    return notes


def score_section(plan: Plan) -> Section:
    """The comparison, per stage, with intervals; and the differences between models."""
    estimates = {model: summary(plan, model) for model in plan.sources}
    spreads = {model: spread_over_seeds(plan, model) for model in plan.models}
    tables = []
    for stage in dict.fromkeys(name.split("/")[0] for name in table_columns(plan)):
        columns, rows = [name for name in table_columns(plan) if name.startswith(f"{stage}/")], []
        for model, own in estimates.items():
            if f"{columns[0]}/matched" in own:
                cells = [show(own.get(f"{name}/matched")) for name in columns]
                rows.append(Row([Cell(LABELS.get(model, model)), *cells], model in LABELS))
            if spreads.get(model):
                found = (spreads[model].get(f"{name}/matched") for name in columns)
                cells = [Cell("–" if sd is None else f"{sd:.4f}") for sd in found]
                rows.append(Row([Cell(f"SD of {model} over seeds {', '.join(map(str, seeds_of(plan)))}"), *cells], True))
        first = estimates[plan.models[0]]
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
    first, *others = plan.models
    columns, resamples = table_columns(plan), (plan.config.evaluation.n_bootstrap, plan.config.seed)
    base, rows = pooled(plan, first), []
    for model in others:
        own = pooled(plan, model)
        keys = [f"{name}/matched" for name in columns]
        cells = (show(paired_difference(own[key], base[key], *resamples) if key in own else None) for key in keys)
        rows.append(Row([Cell(f"{model} − {first}"), *cells]))
    if not rows:
        return []
    return [Table(["paired by image", *columns], rows, "Differences between models", folded=True)]


def subject_tables(plan: Plan) -> list[Table]:
    """One table per subject, folded."""
    columns, tables, resamples = table_columns(plan), [], (plan.config.evaluation.n_bootstrap, plan.config.seed)
    for subject in plan.subjects:
        rows = []
        for model in plan.sources:
            matched = scores_of(subject, model).query("pairing == 'matched'")
            groups = {"/".join(key): group["value"] for key, group in matched.groupby(["stage", "metric"], observed=True)}
            cells = (groups.get(name) for name in columns)
            rows.append(
                Row([Cell(LABELS.get(model, model)),
                     *(show(None if c is None else bootstrap(c.to_numpy(), *resamples)) for c in cells)])
            )  # fmt: skip
        voxels = "" if plan.is_referee else f"{len(subject.voxels.index)} voxels, "
        title = f"Subject {subject.subject}: {voxels}{len(subject.image_ids('test'))} test images"
        tables.append(Table(["model", *columns], rows, title, folded=True))
    return tables


def published_section(plan: Plan) -> Section | None:
    """What papers print under the same suites' definitions, below our own. Only beside figures of NSD."""
    names = {metric.name for metric in plan.suite_metrics}
    records = [record for record in PUBLISHED if names & record.values.keys()]
    if plan.is_simulated or not records:
        return None
    columns = [metric.name for metric in plan.suite_metrics if any(metric.name in record.values for record in records)]
    subjects, stage = " ".join(str(subject.subject) for subject in plan.subjects), plan.picture_stages[-1]
    lines = []
    for model in plan.models:
        own, layers = summary(plan, model), "" if plan.is_referee else f", {plan.config.n_layers} layers"
        cells = (show(own.get(f"{stage}/{name}/matched")) for name in columns)
        lines.append(Row([Cell(f"here: {model}{layers}, subjects {subjects}"), *cells]))
    for record in records:
        cells = (Cell(f"{record.values[name]:.3f}" if name in record.values else "–") for name in columns)
        lines.append(Row([Cell(record.label, record.source), *cells], True))
    cautions = "\n".join(dict.fromkeys(f"{record.system}: {record.caution}" for record in records if record.caution))
    text = ["As printed, under the suite that its definitions are (or are taken to be) those of; read the cautions."]
    return Section("Published results (NSD)", text, [Table(["system", *columns], lines)], code=[Code("Cautions", cautions)])


def curve_section(plan: Plan) -> Section | None:
    """Learning curves of the networks."""
    figures = []
    for fit in () if plan.is_referee else plan.fits:
        stage, lines = plan.model(fit), {}
        for subject in plan.subjects:
            folder = f"{stage.folder}/{subject.folder}"
            if "history.json" not in plan.store.sizes(folder):
                continue
            history = json.loads(plan.store.read_bytes(f"{folder}/history.json"))
            epochs = [entry["epoch"] + 1 for entry in history]
            lines[f"subject {subject.subject}"] = Line(epochs, [entry["val_loss"] for entry in history])
        if lines:
            figures.append(Figure(line_chart(lines, "epoch", "validation loss (standardised targets)"), plan.label(fit)))
    return Section("Learning curves", figures=figures, side_by_side=True) if figures else None


def columns_of(subject: SubjectPlan, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Pictures of some test images: seen | each model's stages | the last stage from the truth, if that was made."""
    plan = subject.plan
    columns = {"seen": run.seen_pictures(subject, rows)}
    if plan.is_referee:
        return columns | {IMAGES: run.decoded_pictures(subject, IMAGES, IMAGES, rows)}
    for model in plan.models:
        for number, stage in enumerate(plan.picture_stages, 1):
            columns[f"{model}, stage {number}"] = run.decoded_pictures(subject, model, stage, rows)
    if plan.has_ceiling:
        columns["from the truth"] = run.decoded_pictures(subject, None, plan.picture_stages[-1], rows)
    return columns


def subject_grid(subject: SubjectPlan) -> bytes:
    """PNG of a subject's first test images."""
    plan = subject.plan
    what = plan.config.evaluation.images if plan.is_referee else f"{plan.config.n_layers} layers"
    title = f"subject {subject.subject}, {what}, {source_name(plan)}"
    rows = np.arange(min(N_GRID_IMAGES, len(subject.image_ids("test"))))
    return png(picture_grid(columns_of(subject, rows), title, n_columns_side=2))


def picture_section(subject: SubjectPlan) -> Section:
    """A subject's best, median and worst images by the first model, as a semantic and a pixel metric say, and random ones."""
    plan, model = subject.plan, subject.plan.models[0]
    scores = {"/".join(key): group["value"].to_numpy() for key, group in
              scores_of(subject, model).groupby(["stage", "metric", "pairing"], observed=True, sort=False)}  # fmt: skip
    names = [f"{plan.picture_stages[-1]}/{metric.name}/matched" for metric in plan.suite_metrics]
    semantic = [name for name, metric in zip(names, plan.suite_metrics) if metric.comparison == "two_way" and name in scores]
    pixel = next(name for name in names if name not in semantic and name in scores)
    n = len(scores[pixel])
    k, chosen = min(N_EXTREMES, n), {}
    middle = max(0, n // 2 - k // 2)
    judged_by = [name for name in semantic if name.endswith("/clip/matched")] or semantic  # AlexNet's early layers see no objects
    for name in (*judged_by[-1:], pixel):
        stage, _, metric = name.removesuffix("/matched").partition("/")
        order = np.lexsort((-scores[pixel], -scores[name]))  # the pixel metric decides between equals
        places = {"best": order[:k], "median": order[middle : middle + k], "worst": order[-k:]}
        chosen |= {f"{label} by {metric}": rows for label, rows in places.items()}
    chosen["random"] = rng(plan.config.seed, "report", subject.subject).permutation(n)[:k]
    figures = [Figure(png(picture_grid(columns_of(subject, rows), f"{label} of {n}")), label) for label, rows in chosen.items()]
    text = [f"Best, median and worst by scores of {model}'s {stage}; random ones whatever their score."]
    return Section(f"Subject {subject.subject}", text, figures=figures, side_by_side=True)


def provenance(plan: Plan) -> Section:
    """Configuration, weights, versions."""
    hashes = {} if plan.is_referee else {"VDVAE": plan.vdvae_sha256}
    if plan.has_stage2 and not plan.is_referee:
        hashes |= {"CLIP": plan.clip_sha256, "Versatile Diffusion": plan.diffusion_sha256}
    packages = {name: version_of(name) for name in ("nsdray", "ray", "torch", "diffusers", "open_clip_torch", "numpy", "pyarrow")}
    code = [
        Code("Configuration", redacted(json.dumps(dataclasses.asdict(plan.config), indent=1))),
        Code("SHA-256 of the weights", json.dumps(hashes | plan.backbones_sha256, indent=1)),
        Code("Versions", json.dumps({"python": platform.python_version()} | packages, indent=1)),
        Code("Data sets", "\n".join(f"{name}: {stage.uri()}" for name, stage in data_sets(plan).items())),
    ]
    return Section("Configuration and provenance", code=code)


def version_of(package: str) -> str:
    """Its version; nsdray itself may come as a folder of files, as `ray job submit` brings it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "from source, not installed"


def data_sets(plan: Plan) -> dict[str, object]:
    """Where everything lies."""
    if plan.is_referee:
        return plan.pictures_of(IMAGES)
    stages = {"betas": plan.betas, "samples": plan.samples} | {f"targets {kind}": plan.targets(kind) for kind in plan.kinds}
    for fit in plan.fits:
        stages |= {f"model {plan.label(fit)}": plan.model(fit), f"predictions {plan.label(fit)}": plan.predictions(fit)}
    for model in plan.sources:
        stages |= {f"{name} {model}": stage for name, stage in plan.pictures_of(model).items()}
    return stages


def report_page(plan: Plan) -> str:
    """The HTML report."""
    config = plan.config
    warning = ""
    if plan.is_simulated:
        warning = "SIMULATED brain data (the miniature NSD): it shows that the method works and says nothing about real brains."
    what = (
        f"{config.n_layers} VDVAE layers ({config.targets.vdvae}) · stage 2: {config.stage2.model} · "
        f"models {', '.join(config.models)} · seed {config.seed}"
    )
    if plan.is_referee:
        what = f"reconstructions made elsewhere: {config.evaluation.images}"
    subtitle = f"Subjects {', '.join(str(s.subject) for s in plan.subjects)} · {what}"
    pictures = (picture_section(subject) for subject in plan.subjects)
    scores = score_section(plan), published_section(plan), noise_section(plan)
    sections = [*scores, *pictures, curve_section(plan), ridge_section(plan), provenance(plan)]
    title = f"nsdray: {IMAGES if plan.is_referee else config.recipe}"
    return render(title, subtitle, [section for section in sections if section], warning)


def write_report(plan: Plan, again: bool = False) -> None:
    """Table, picture grids and the page, into the store, unless they are there. again: in any case."""
    stage, partition = plan.report, plan.report_partition
    stage.claim()
    if stage.begin(partition, plan.report_wanted) or again:
        folder = f"{stage.folder}/{partition}"
        plan.store.write_bytes(f"{folder}/table.txt", report_table(plan).encode())
        for subject in plan.subjects:
            plan.store.write_bytes(f"{folder}/subject{subject.subject:02d}.png", subject_grid(subject))
        plan.store.write_bytes(f"{folder}/report.html", report_page(plan).encode())
        stage.finish(partition, plan.report_wanted)


def report_file(plan: Plan, name: str) -> bytes:
    """A file of the written report: "table.txt", "report.html" or "subject01.png"."""
    return plan.store.read_bytes(f"{plan.report.folder}/{plan.report_partition}/{name}")
