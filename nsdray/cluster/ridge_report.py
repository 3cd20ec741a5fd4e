"""What the report says of ridge: chosen alphas, how well each layer or token is predicted, and by which voxel group."""
from __future__ import annotations

import json

import numpy as np
import pandas as pd

from nsdray.report import Cell, Figure, Line, Row, Section, Table, heat_map, line_chart
from nsdray.stages import Plan, SubjectPlan

TEXT = (
    "LOO R²: of predictions for training images that were left out of the fit, relative to the mean of the others; test R²: of "
    "the test images before rescaling, relative to the training mean; both are means over a layer's or token's targets. 0 is "
    "what the mean does."
)
GROUP_TEXT = (
    "Test R² by voxel group is the product measure: with r the truth and f the prediction, both less the training mean, and f_g "
    "the part of f that comes from a group's voxels, Σ f_g (2 r − f) / Σ r². Over the groups it adds up to the test R²; a part "
    "may be negative."
)


EDGE = 0.5
"""Share of targets at an end of the grid above which the grid is too narrow."""
CURVE_TEXT = (
    "Curves: mean leave-one-out R² at each alpha with one standard error, over the left-out images (by GCV over the sampled "
    "targets, which are not independent)."
)


def edge_warning(report: dict) -> str:
    """What to say of ridge_report.json if the best alpha may lie outside of its grid; "" if nothing."""
    for name, share in report["at_edge"].items():
        if share > EDGE:
            edge, whose = (min if name == "lowest" else max)(report["alphas"]), "the chosen alpha"
            if report["per_target"]:
                whose = f"the alpha of {share:.0%} of the targets"
            further = "smaller" if name == "lowest" else "larger"
            return f"{whose} is the {name} of the grid, {edge:g}; give {further} --ridge.alphas too"
    return ""


def curve_figure(plan: Plan, kind: str) -> Figure | None:
    """Leave-one-out R2 over alpha with standard errors, a line per subject; None where alphas are fixed."""
    lines, ticks = {}, []
    for subject in plan.subjects:
        curve = (ridge_records(subject, kind) or {}).get("curve")
        if curve:
            mean, error = (np.array([point[name] for point in curve]) for name in ("loo_r2", "error"))
            lines[f"subject {subject.subject}"] = Line(range(len(curve)), mean, mean - error, mean + error)
            ticks = [f"{point['alpha']:g}" for point in curve]
    if not lines:
        return None
    chart = line_chart(lines, "alpha", "leave-one-out R²", ticks)
    return Figure(chart, f"{kind}: leave-one-out R² by alpha, ± one standard error")


def shown(value: float, form: str = ".3f") -> str:
    """A number, or a dash for NaN."""
    return "–" if np.isnan(value) else format(value, form)


def ridge_records(subject: SubjectPlan, kind: str) -> dict | None:
    """Contents of ridge_report.json of the ridge that predicts a kind of targets; None if there is none."""
    plan = subject.plan
    found = [] if plan.is_referee else [fit for fit in plan.fits if fit.regressor == "ridge" and fit.kind == kind]
    if not found:
        return None
    folder = f"{plan.model(found[0]).folder}/{subject.folder}"
    return json.loads(plan.store.read_bytes(f"{folder}/ridge_report.json"))


def ridge_table(plan: Plan) -> pd.DataFrame:
    """One row per subject, kind, and layer or token: column, position, n_targets, alpha_min, alpha_median, alpha_max, loo_r2,
    test_r2, and test_r2/<group> for each voxel group."""
    rows = []
    for subject in plan.subjects:
        for kind in plan.kinds:
            report = ridge_records(subject, kind)
            for position, column in enumerate(report["columns"] if report else ()):
                parts = {f"test_r2/{name}": value for name, value in column["test_r2_parts"].items()}
                plain = {name: value for name, value in column.items() if name != "test_r2_parts"}
                plain["loo_r2"] = np.nan if plain["loo_r2"] is None else plain["loo_r2"]
                rows.append({"subject": subject.subject, "kind": kind, "position": position} | plain | parts)
    return pd.DataFrame(rows)


def ridge_scores(subject: SubjectPlan) -> dict[str, float]:
    """Means over the targets of each kind, for MLflow: ridge_<kind>_loo_r2, _test_r2, and _alpha (median)."""
    scores = {}
    for kind in subject.plan.kinds:
        report = ridge_records(subject, kind)
        if report:
            n = [column["n_targets"] for column in report["columns"]]
            for name in ("loo_r2", "test_r2"):
                values = [column[name] for column in report["columns"]]
                if None not in values:  # no leave-one-out R2 without leave-one-out predictions
                    scores[f"ridge_{kind}_{name}"] = float(np.average(values, weights=n))
            scores[f"ridge_{kind}_alpha"] = float(np.median([column["alpha_median"] for column in report["columns"]]))
    return scores


def ridge_section(plan: Plan) -> Section | None:
    """Tables and figures of all ridges."""
    table = ridge_table(plan)
    if not len(table):
        return None
    groups = [name for name in table.columns if name.startswith("test_r2/")]
    figures, tables, text = [], [summary_table(plan, table)], [TEXT, GROUP_TEXT] if groups else [TEXT]
    for kind, own in table.groupby("kind", sort=False):
        lines = {f"subject {subject}": Line(rows["position"], rows["loo_r2"]) for subject, rows in own.groupby("subject")}
        unit = "layer" if kind == "vdvae" else "token"
        if own["loo_r2"].notna().any():
            figures.append(Figure(line_chart(lines, unit, "leave-one-out R²"), f"{kind}: leave-one-out R² by {unit}"))
        if (curve := curve_figure(plan, kind)) is not None:
            figures.append(curve)
            text = text if CURVE_TEXT in text else [*text, CURVE_TEXT]
        for subject in plan.subjects:
            if warning := edge_warning(ridge_records(subject, kind)):
                text.append(f"Warning: subject {subject.subject}, {kind}: {warning}.")
        means = own.groupby("column", sort=False)[["alpha_min", "alpha_median", "alpha_max", "loo_r2", "test_r2", *groups]].mean()
        if groups:
            names = [name.removeprefix("test_r2/") for name in groups]
            picture = heat_map(means[groups].to_numpy().T, names, unit, "test R²")
            figures.append(Figure(picture, f"{kind}: test R² by voxel group, mean over subjects"))
        tables.append(column_table(kind, means, groups))
    return Section("Ridge", text, tables, figures, side_by_side=True)


def summary_table(plan: Plan, table: pd.DataFrame) -> Table:
    """A row per kind and subject: means over targets, what was chosen."""
    rows = []
    for subject in plan.subjects:
        scores = ridge_scores(subject)
        for kind in plan.kinds:
            report, own = ridge_records(subject, kind), table[(table["subject"] == subject.subject) & (table["kind"] == kind)]
            if report:
                how = {"fixed": "fixed", "gcv": "by GCV", "sample": "by LOO, sample", "all": "by LOO, all"}[report["selection"]]
                penalties = ", ".join(f"{name} {value:g}" for name, value in report["penalties"].items()) or "–"
                spread = f"{own['alpha_min'].min():g} … {own['alpha_max'].max():g}" if report["per_target"] else how
                rows.append(Row([Cell(kind), Cell(str(subject.subject)), Cell(f"{scores[f'ridge_{kind}_alpha']:g}", spread),
                                 *(Cell(shown(scores.get(f"ridge_{kind}_{name}", np.nan))) for name in ("loo_r2", "test_r2")),
                                 Cell(penalties)]))  # fmt: skip
    return Table(["targets", "subject", "alpha (median)", "LOO R²", "test R²", "penalties by group"], rows)


def column_table(kind: str, means: pd.DataFrame, groups: list[str]) -> Table:
    """A row per layer or token, mean over subjects."""
    header = [kind, "alpha (median)", "LOO R²", "test R²", *(name.removeprefix("test_r2/") for name in groups)]
    rows = [
        Row([Cell(str(column)), Cell(f"{row['alpha_median']:g}", f"{row['alpha_min']:g} … {row['alpha_max']:g}"),
             *(Cell(shown(row[name])) for name in ("loo_r2", "test_r2", *groups))])
        for column, row in means.iterrows()
    ]  # fmt: skip
    return Table(header, rows, f"{kind}: means over subjects", folded=True)
