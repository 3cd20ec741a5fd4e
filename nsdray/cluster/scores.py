"""Per-image scores of a plan, read back: means, and their error bars over test images and over training seeds."""
from __future__ import annotations

import numpy as np
import pandas as pd

from nsdray.metrics.bootstrap import Estimate, bootstrap
from nsdray.metrics.table import LATENT_METRICS, RETRIEVAL_METRICS
from nsdray.stages import Plan, SubjectPlan


def scores_of(subject: SubjectPlan, model: str) -> pd.DataFrame:
    """All scores of a subject's test set: stage, metric, pairing, image_id, value."""
    return subject.plan.metrics(model).read(subject.folder, "scores.parquet").to_pandas()


def mean_scores(subject: SubjectPlan, model: str) -> dict[str, float]:
    """Mean over test images, by "stage/metric/pairing"."""
    means = scores_of(subject, model).groupby(["stage", "metric", "pairing"], observed=True)["value"].mean()
    return {"/".join(key): float(value) for key, value in means.items()}


def common_images(plan: Plan) -> set[int]:
    """Test images that all subjects saw."""
    return set.intersection(*(set(subject.image_ids("test").tolist()) for subject in plan.subjects))


def pooled(plan: Plan, model: str) -> dict[str, np.ndarray]:
    """Scores of the images that all subjects saw, by "stage/metric/pairing": (n_images, n_subjects) each. ValueError if these
    are fewer than two."""
    if (n := len(common_images(plan))) < 2:
        subjects = ", ".join(str(subject.subject) for subject in plan.subjects)
        raise ValueError(f"subjects {subjects} have {n} test images in common; means over subjects need 2: decode each alone")
    keys = ["stage", "metric", "pairing", "image_id"]
    frames = [scores_of(subject, model).set_index(keys)["value"] for subject in plan.subjects]
    table = pd.concat(frames, axis=1, join="inner").sort_index()
    return {"/".join(key): group.to_numpy() for key, group in table.groupby(level=[0, 1, 2], observed=True)}


def summary(plan: Plan, model: str) -> dict[str, Estimate]:
    """Means over images and subjects with their intervals, by "stage/metric/pairing"; an image is drawn with all its
    subjects."""
    n, seed = plan.config.evaluation.n_bootstrap, plan.config.seed
    return {name: bootstrap(values, n, seed) for name, values in pooled(plan, model).items()}


def spread_over_seeds(plan: Plan, model: str) -> dict[str, float]:
    """Standard deviation (ddof 1) over trainings with different seeds of the means over images and subjects, by
    "stage/metric/pairing"; empty if there is one training only."""
    if not plan.replicates:
        return {}
    means = [{name: values.mean() for name, values in pooled(each, model).items()} for each in (plan, *plan.replicates)]
    return {name: float(np.std([mean[name] for mean in means], ddof=1)) for name in means[0]}


def table_columns(plan: Plan) -> list[str]:
    """"stage/metric" of the comparison, in order."""
    pictures = [f"{stage}/{metric.name}" for stage in plan.picture_stages for metric in plan.suite_metrics]
    if plan.is_referee:
        return pictures
    tokens = [f"tokens/{metric}" for metric in RETRIEVAL_METRICS] if "clip_vision" in plan.kinds else []
    return [f"latents/{metric}" for metric in LATENT_METRICS] + tokens + pictures


def source_name(plan: Plan) -> str:
    """What the brain data are, for titles."""
    return "SIMULATED brain data" if plan.is_simulated else "NSD"
