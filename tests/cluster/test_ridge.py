"""Ridge's options on a cluster: grids, voxel groups, dual coefficients, memory; against scikit-learn on the same shards."""
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load
from sklearn.linear_model import Ridge

from nsdray.cluster import ridge, run
from nsdray.cluster.data import read_samples, read_targets
from nsdray.cluster.ridge_factors import candidates_of, groups_of, sampled_rows
from nsdray.cluster.ridge_report import ridge_scores, ridge_section, ridge_table
from nsdray.decoder import Decoder
from nsdray.regressors.banded import voxel_penalties
from nsdray.regressors.scaling import moments, zscore
from nsdray.report import render
from nsdray.stages import Fit, Plan
from nsdray.store import view_column

GRID = (30.0, 1_000.0, 30_000.0, 1e6)
VDVAE = Fit("ridge", "vdvae")


def fitted(finished: Plan, stage2: bool = False, subjects: tuple[int, ...] = (1,), **settings) -> Plan:
    """A plan like the finished one, but for ridge's settings, with its ridges fitted."""
    config = finished.config
    plan = Plan(
        replace(config, models=("ridge",), ridge=replace(config.ridge, rescale="none", dtype="float64", **settings),
                data=replace(config.data, subjects=subjects),
                stage2=config.stage2 if stage2 else replace(config.stage2, model="none"))
    )  # fmt: skip
    run.fit_models(plan, None)
    return plan


def arrays(plan: Plan, fit: Fit = VDVAE) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """z-scored betas and targets of the training images, z-scored test betas, and what was predicted, all targets."""
    subject = plan.subjects[0]
    (_, train), (_, test) = (read_samples(subject, split) for split in ("train", "test"))
    scale = moments(train)
    targets = read_targets(subject, "train", plan.columns(fit.kind), fit.kind).astype(float)
    parts = [plan.predictions(fit).read(subject.folder, part.name) for part in subject.parts("test")]
    columns = [np.concatenate([view_column(part, name) for part in parts]) for name in plan.columns(fit.kind)]
    flat = np.concatenate([column.reshape(len(column), -1) for column in columns], 1)
    return zscore(train, *scale).astype(float), targets, zscore(test, *scale).astype(float), flat


def file(plan: Plan, name: str, fit: Fit = VDVAE) -> bytes:
    return plan.store.read_bytes(f"{plan.model(fit).folder}/{plan.subjects[0].folder}/{name}")


def test_an_alpha_for_each_target(finished):
    plan = fitted(finished, alphas=GRID, per_target=True)
    train, targets, test, predicted = arrays(plan)
    chosen = load(file(plan, "alphas.safetensors"))
    assert set(np.unique(chosen["alphas"])) <= set(GRID) and len(np.unique(chosen["alphas"])) > 1
    rows, n = sampled_rows(plan.subjects[0]), len(train)
    hats = {}
    for alpha in GRID:  # leave-one-out from scikit-learn's own hat matrix
        hat = Ridge(alpha=alpha, solver="svd").fit(train, np.eye(n)).predict(train)
        residual = ((targets - hat @ targets) / (1 - np.diag(hat))[:, None])[rows]
        spread = ((targets - targets.mean(0))[rows] * n / (n - 1)) ** 2
        hats[alpha] = 1 - (residual**2).sum(0) / spread.sum(0)
    scores = np.stack(list(hats.values()))
    np.testing.assert_array_equal(chosen["alphas"], np.array(GRID, np.float32)[scores.argmax(0)])
    np.testing.assert_allclose(chosen["loo_r2"], scores.max(0), atol=1e-5)
    for alpha in GRID:
        own = np.flatnonzero(chosen["alphas"] == np.float32(alpha))
        if len(own):
            reference = Ridge(alpha=alpha).fit(train, targets[:, own]).predict(test)
            np.testing.assert_allclose(predicted[:, own], reference, rtol=1e-5, atol=1e-5)
    report = json.loads(file(plan, "ridge_report.json"))
    assert report["per_target"] and report["selection"] == "sample" and report["alphas"] == list(GRID)
    assert [column["column"] for column in report["columns"]] == plan.columns("vdvae")
    assert any(column["alpha_min"] < column["alpha_max"] for column in report["columns"])


def test_penalties_of_voxel_groups_are_searched_and_mapped(finished):
    plan = fitted(finished, stage2=True, subjects=(1, 2), alphas=GRID[1:3], selection="gcv", groups=("V1", "V2", "floc-faces"),
                  n_penalties_drawn=3, n_targets_search=300)  # fmt: skip
    subject = plan.subjects[0]
    for fit in plan.fits:
        report = json.loads(file(plan, "ridge_report.json", fit))
        groups = groups_of(subject)
        assert list(report["penalties"]) == list(groups) == ["V1", "V2", "floc-faces", "rest"]
        candidates = candidates_of(subject)
        found = tuple(report["penalties"].values())
        assert len(candidates) == 4 and found in [own or (1.0,) * 4 for own in candidates]
        train, targets, test, predicted = arrays(plan, fit)
        alphas = set(load(file(plan, "alphas.safetensors", fit))["alphas"])
        assert len(alphas) == 1  # shared
        scale = np.sqrt(voxel_penalties(list(groups.values()), found, train.shape[1]))
        reference = Ridge(alpha=float(alphas.pop())).fit(train / scale, targets).predict(test / scale)
        np.testing.assert_allclose(predicted, reference, rtol=1e-5, atol=1e-5)
        truth = read_targets(subject, "test", plan.columns(fit.kind), fit.kind).astype(float)
        r2 = 1 - ((truth - reference) ** 2).sum(0) / ((truth - targets.mean(0)) ** 2).sum(0)
        sizes = ridge.sizes_of(subject, fit, plan.columns(fit.kind))
        for column, values in zip(report["columns"], np.split(r2, np.cumsum(sizes)[:-1])):
            assert sum(column["test_r2_parts"].values()) == pytest.approx(column["test_r2"], abs=1e-9)
            assert column["test_r2"] == pytest.approx(values.mean(), abs=1e-5)
    assert candidates_of(plan.subjects[0])[1:] != candidates_of(plan.subjects[1])[1:]
    tidy = ridge_table(plan)
    assert len(tidy) == 2 * sum(len(plan.columns(kind)) for kind in plan.kinds)
    np.testing.assert_allclose(tidy.filter(like="test_r2/").sum(axis=1), tidy["test_r2"], atol=1e-9)
    section = ridge_section(plan)
    page = render("x", "y", [section])
    assert "by GCV" in page and "product measure" in page and len(section.figures) == 2 * len(plan.kinds)
    assert all(figure.data.lstrip().startswith(b"<?xml") for figure in section.figures)
    own = tidy[(tidy["subject"] == 1) & (tidy["kind"] == "vdvae")]
    assert ridge_scores(subject)["ridge_vdvae_loo_r2"] == pytest.approx(np.average(own["loo_r2"], weights=own["n_targets"]))


def test_dual_coefficients_all_rows_and_several_cpus(finished, monkeypatch):
    plain = fitted(finished, weights="vdvae")
    monkeypatch.setattr(ridge, "SMALL", 0)  # factors by a worker with both CPUs
    needed = ridge.needed_bytes(plain.subjects[0], [VDVAE], keep=False)
    assert ridge.task_options(plain.subjects[0], needed)[0]["num_cpus"] == 2
    plan = fitted(finished, weights="vdvae", coefficients="dual", held_out="all", groups=("V1",), penalties=(1.0, 1.0))
    train, targets, _, predicted = arrays(plan)
    np.testing.assert_allclose(predicted, arrays(plain)[3], rtol=1e-5, atol=1e-5)
    _, betas = read_samples(plan.subjects[0], "test")
    for own in (plain, plan):
        decoder = Decoder.load(f"{own.store.base}/{own.model(VDVAE).folder}/{own.subjects[0].folder}")
        np.testing.assert_allclose(decoder.raw_predictions(betas), predicted, rtol=1e-4, atol=1e-4)
        assert (decoder.training_betas is None) == (own is plain)
    hat = Ridge(alpha=4_000.0, solver="svd").fit(train, np.eye(len(train))).predict(train)
    left_out = targets - (targets - hat @ targets) / (1 - np.diag(hat))[:, None]
    np.testing.assert_allclose(decoder.scaling.predictions_mean, left_out.mean(0), atol=1e-5)
    np.testing.assert_allclose(decoder.scaling.predictions_std, left_out.std(0, ddof=1), rtol=1e-4)


def test_what_does_not_fit_is_told_before(finished, monkeypatch):
    plan = Plan(finished.config)
    monkeypatch.setattr(ridge, "ridge_bytes", lambda *_, **__: {"kernel": int(3e15), "targets": 0})
    with pytest.raises(ValueError, match=r"kernel needs 3000000\.00 GB, but the largest node of the cluster, for subject 1, has"):
        ridge.fit_ridge(plan.subjects[0], [VDVAE])
