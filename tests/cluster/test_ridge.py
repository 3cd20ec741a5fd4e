"""Ridge's options on a cluster: grids, voxel groups, dual coefficients, memory; against scikit-learn on the same shards."""
from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ray import cloudpickle
from safetensors.numpy import load
from sklearn.linear_model import Ridge

from nsdray.cluster import ridge, ridge_factors, ridge_room, run
from nsdray.cluster.data import read_samples, read_targets
from nsdray.cluster.ridge_factors import candidates_of, groups_of, sampled_rows
from nsdray.cluster.ridge_report import edge_warning, ridge_scores, ridge_section, ridge_table
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
    assert "by GCV" in page and "product measure" in page and len(section.figures) == 3 * len(plan.kinds)
    assert all(figure.data.lstrip().startswith(b"<?xml") for figure in section.figures)
    own = tidy[(tidy["subject"] == 1) & (tidy["kind"] == "vdvae")]
    assert ridge_scores(subject)["ridge_vdvae_loo_r2"] == pytest.approx(np.average(own["loo_r2"], weights=own["n_targets"]))


def test_weights_all_rows_and_several_cpus(finished, monkeypatch):
    primal = fitted(finished, weights="vdvae", coefficients="primal")
    monkeypatch.setattr(ridge_room, "SMALL", 0)  # factors by a worker with both CPUs
    needed = ridge_room.needed_bytes(primal.subjects[0], [VDVAE], keep=False)
    assert ridge_room.task_options(primal.subjects[0], needed, 1)[0]["num_cpus"] == 2
    dual = fitted(finished, weights="vdvae", held_out="all", groups=("V1",), penalties=(1.0, 3.0))
    several = fitted(finished, weights="vdvae", alphas=GRID, per_target=True, groups=("V1",), penalties=(1.0, 3.0))
    _, betas = read_samples(dual.subjects[0], "test")
    for own in (primal, dual, several):
        decoder = Decoder.load(f"{own.store.base}/{own.model(VDVAE).folder}/{own.subjects[0].folder}")
        np.testing.assert_allclose(decoder.raw_predictions(betas), arrays(own)[3], rtol=1e-4, atol=1e-4)
        assert (decoder.training_betas is None) == (own is primal)
        kept = decoder.ridge[0]["weights" if own is primal else "dual"].dtype
        assert kept == (np.float16 if own is dual else np.float32)
    train, targets, _, _ = arrays(primal)
    everyone = fitted(finished, held_out="all", weights="none")
    scaling = load(file(everyone, "scaling.safetensors"))
    hat = Ridge(alpha=4_000.0, solver="svd").fit(train, np.eye(len(train))).predict(train)
    left_out = targets - (targets - hat @ targets) / (1 - np.diag(hat))[:, None]
    np.testing.assert_allclose(scaling["predictions_mean"], left_out.mean(0), atol=1e-5)
    np.testing.assert_allclose(scaling["predictions_std"], left_out.std(0, ddof=1), rtol=1e-4)
    assert not [name for name in everyone.store.sizes(f"{everyone.model(VDVAE).folder}/subject=01") if name.startswith("ridge_l")]


def test_kinds_of_one_alpha_share_one_solution(finished, monkeypatch):
    solved = []

    class Counted:
        def options(self, **options):
            solved.append(options)
            return solve_kernel.options(**options)

    solve_kernel = ridge.solve_kernel
    monkeypatch.setattr(ridge, "solve_kernel", Counted())
    plan = fitted(finished, stage2=True, alpha=5_000.0, alpha_vision=5_000.0, alpha_text=6_000.0, weights="none")
    assert len(plan.fits) == 3 and len(solved) == 2
    for fit, alpha in zip(plan.fits, (5_000.0, 5_000.0, 6_000.0)):
        train, targets, test, predicted = arrays(plan, fit)
        np.testing.assert_allclose(predicted, Ridge(alpha=alpha).fit(train, targets).predict(test), rtol=1e-5, atol=1e-5)


def test_alphas_have_error_bars_and_a_grid_too_narrow_is_told(finished, monkeypatch):
    told = []
    monkeypatch.setattr(ridge.tqdm, "write", lambda text: told.append(text))
    monkeypatch.setattr(ridge_factors, "N_TARGETS_BLOCK", 100)
    plan = fitted(finished, alphas=(1e5, 1e7, 1e6), weights="none")
    report = json.loads(file(plan, "ridge_report.json"))
    assert [point["alpha"] for point in report["curve"]] == [1e5, 1e6, 1e7]
    train, targets, _, _ = arrays(plan)
    rows, n = sampled_rows(plan.subjects[0]), len(train)
    for point in report["curve"]:
        hat = Ridge(alpha=point["alpha"], solver="svd").fit(train, np.eye(n)).predict(train)
        residual = ((targets - hat @ targets) / (1 - np.diag(hat))[:, None])[rows]
        spread = (((targets - targets.mean(0))[rows] * n / (n - 1)) ** 2).mean(0)
        share = 1 - (residual**2 / spread).mean(1)  # of each left-out image
        assert point["loo_r2"] == pytest.approx(share.mean(), abs=1e-5)
        assert point["error"] == pytest.approx(share.std(ddof=1) / np.sqrt(len(rows)), abs=1e-5)
    assert report["at_edge"] == {"lowest": 1.0, "highest": 0.0}
    assert len(told) == 1 and "subject 1, vdvae: the chosen alpha is the lowest of the grid, 100000; give smaller" in told[0]
    section = ridge_section(plan)
    assert any("lowest of the grid" in text for text in section.text)
    assert any("by alpha" in figure.title for figure in section.figures)
    inner = report | {"at_edge": {"lowest": 0.2, "highest": 0.3}, "per_target": True}
    assert edge_warning(inner) == ""
    assert "the alpha of 70% of the targets is the highest" in edge_warning(inner | {"at_edge": {"lowest": 0.2, "highest": 0.7}})


def test_without_leave_one_out_predictions(finished):
    plan = fitted(finished, held_out="none", weights="none")
    train, targets, test, predicted = arrays(plan)
    np.testing.assert_allclose(predicted, Ridge(alpha=4_000.0).fit(train, targets).predict(test), rtol=1e-5, atol=1e-5)
    assert json.loads(file(plan, "ridge_report.json"))["columns"][0]["loo_r2"] is None
    assert "ridge_vdvae_loo_r2" not in ridge_scores(plan.subjects[0]) and ridge_table(plan)["loo_r2"].isna().all()
    assert "–" in render("x", "y", [ridge_section(plan)])


def test_parity_rescales_by_the_test_set_s_own_deviation(finished):
    plan = fitted(finished, held_out="none", weights="none")
    parity = Plan(replace(plan.config, ridge=replace(plan.config.ridge, rescale="test_moments")))
    run.fit_models(parity, None)
    _, targets, _, predicted = arrays(plan)
    expected = (predicted - predicted.mean(0)) / predicted.std(0) * targets.std(0, ddof=1) + targets.mean(0)
    np.testing.assert_allclose(arrays(parity)[3], expected, rtol=1e-4, atol=1e-4)


def test_a_decoder_without_one_of_its_files_is_fitted_again(finished):
    plan = fitted(finished, weights="vdvae", alpha=3_000.0)
    folder = f"{plan.model(VDVAE).folder}/{plan.subjects[0].folder}"
    names = set(plan.store.sizes(folder))
    for gone in ("ridge_layer_01.safetensors", "training_betas.safetensors"):
        plan.store.delete(f"{folder}/{gone}")
        run.fit_models(plan, None)
        assert set(plan.store.sizes(folder)) == names
    before = plan.store.fs.get_file_info(plan.store.path(f"{folder}/decoder.json")).mtime_ns
    run.fit_models(plan, None)
    assert plan.store.fs.get_file_info(plan.store.path(f"{folder}/decoder.json")).mtime_ns == before


def test_only_latents_have_errors_beside_their_predictions(finished):
    for fit in finished.fits:
        part = finished.predictions(fit).read(finished.subjects[0].folder, "part-0000.parquet")
        assert any(name.endswith("/matched") for name in part.column_names) == (fit.kind == "vdvae")


def test_the_benchmark_measures_the_job(cluster, tmp_path, monkeypatch):
    """At a size that takes seconds: its plan has all that `fit_ridges` asks of one."""
    spec = importlib.util.spec_from_file_location("ridge_benchmark", Path(__file__).parents[2] / "benchmarks" / "ridge.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    cloudpickle.register_pickle_by_value(benchmark)  # workers cannot import it
    sizes = benchmark.Sizes(40, 8, 60)
    plan = benchmark.SyntheticPlan(str(tmp_path), sizes, 0.02)
    benchmark.write_data(plan)
    exact = benchmark.measure_one_fit(plan, "float64", "scikit-learn")["checked"]
    for settings, _ in benchmark.RUNS.values():
        own = benchmark.SyntheticPlan(str(tmp_path), sizes, 0.02, **settings)
        ridge.fit_ridges({own.subjects[0]: own.fits})
        assert benchmark.difference(benchmark.predicted(own), exact) < 1e-4


# Sizes and shares.


def test_pieces_blocks_and_shares():
    pieces = ridge_factors.pieces_of(10_000)
    assert [(p.start, p.stop) for p in pieces] == [(0, 3333), (3333, 6666), (6666, 10_000)]
    assert ridge_factors.pieces_of(4096) == [slice(0, 4096)] and len(ridge_factors.pieces_of(4097)) == 2
    assert ridge_factors.blocks_of(["a", "b", "c", "d"], [4096, 4000, 100, 1]) == [["a"], ["b", "c"], ["d"]]
    assert ridge_factors.blocks_of(["a", "b"], [3, 4]) == [["a", "b"]]
    sizes = [5, 1, 1, 1, 1, 1, 5, 5]
    shares = ridge_factors.equal_shares(sizes, 4)
    assert np.concatenate([np.arange(len(sizes))[share] for share in shares]).tolist() == list(range(8))
    assert max(sum(sizes[share]) for share in shares) <= 6 and len(shares) == 4
    assert ridge_factors.equal_shares([7], 4) == [slice(0, 1)]


def test_workers_and_subjects_at_once(finished, monkeypatch):
    assert ridge_room.workers_at_once(8, 10e9, 3e9) == 3 and ridge_room.workers_at_once(2, 1e9, 3e9) == 1
    monkeypatch.setattr(ridge_room.ray, "cluster_resources", lambda: {"object_store_memory": 10e9})
    assert ridge_room.subjects_at_once([2e9, 3e9, 3e9, 1e9]) == 3 and ridge_room.subjects_at_once([90e9]) == 1
    subject, fits = finished.subjects[0], [VDVAE]
    one, four = (ridge_room.memory_needed(subject, fits, cpus, 1e12) for cpus in (1, 4))
    stored = ridge_room.store_bytes(subject, fits)
    assert four["targets"] - stored == 4 * (one["targets"] - stored) and four["writing"] > stored
    assert four["kernel"] == one["kernel"]


def test_subjects_wait_for_room(finished, monkeypatch):
    running, most = set(), []
    monkeypatch.setattr(ridge, "subjects_at_once", lambda store: 1)
    fit_ridge = ridge.fit_ridge

    def counted(subject, fits, n_at_once):
        most.append(len(running))
        refs = fit_ridge(subject, fits, n_at_once)
        running.update(refs)
        return refs

    wait = ridge.ray.wait

    def waited(refs, num_returns):
        done, rest = wait(refs, num_returns=num_returns)
        running.difference_update(done)
        return done, rest

    monkeypatch.setattr(ridge, "fit_ridge", counted)
    monkeypatch.setattr(ridge.ray, "wait", waited)
    fitted(finished, subjects=(1, 2), alpha=2_000.0, weights="none")
    assert most == [0, 0]


def test_what_does_not_fit_is_told_before(finished, monkeypatch):
    plan = Plan(finished.config)
    monkeypatch.setattr(ridge_room, "ridge_bytes", lambda *_, **__: {"kernel": int(3e15), "targets": 0})
    with pytest.raises(ValueError, match=r"kernel needs 3000000\.00 GB, but the largest node of the cluster, for subject 1, has"):
        ridge.fit_ridges({plan.subjects[0]: [VDVAE]})
