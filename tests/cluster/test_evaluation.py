"""Scores of a run and of reconstructions made elsewhere, spread over seeds, noise curves: what the report is made of."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nsdray.cluster import noise, report, results, run, scores
from nsdray.cluster.data import read_targets
from nsdray.config import StoreConfig
from nsdray.generators.stage1 import enlarge, from_png
from nsdray.metrics.perceptual import pixel_scores
from nsdray.models.backbones import BACKBONES
from nsdray.stages import IMAGES, Fit, Plan, SubjectPlan
from nsdray.store import view_column


def pictures_of(plan, subject, model="ridge"):
    partition, wanted = subject.pictures(model)
    return np.stack([from_png(c.as_py()) for shard in wanted for c in plan.stage2(model).read(partition, shard)["stage2"]])


def referee(plan, **changes):
    return Plan(replace(plan.config, evaluation=replace(plan.config.evaluation, **changes)))


@pytest.mark.parametrize("way", ["first_seen", "image_id", "sorted"])
def test_pictures_made_elsewhere_score_as_the_run_does(finished, tmp_path, way):
    for subject in finished.subjects:
        ids, pictures = subject.image_ids("test"), pictures_of(finished, subject)
        folder = tmp_path / f"subj{subject.subject:02d}"
        folder.mkdir()
        for i, (image_id, picture) in enumerate(zip(ids, pictures)):
            Image.fromarray(picture).save(folder / f"{image_id if way == 'image_id' else i}.png")
        rows = torch.from_numpy(pictures[np.argsort(ids)]).permute(0, 3, 1, 2)
        torch.save(rows.float() / 255, tmp_path / f"subj{subject.subject:02d}.pt")
    suffix = ".pt" if way == "sorted" else ""
    plan = referee(finished, images=f"{tmp_path}/subj{{subject:02d}}{suffix}")
    assert plan.subjects[0].foreign.order == way
    results.judge(plan)
    for subject, own in zip(plan.subjects, finished.subjects):
        theirs, ours = scores.mean_scores(subject, IMAGES), scores.mean_scores(own, "ridge")
        assert {name.split("/", 1)[1] for name in theirs} >= {"mini/pixcorr/matched", "mini/clip/chance"}
        for name, value in theirs.items():
            assert value == ours[name.replace("images/", "stage2/", 1)]
    page = report.report_file(plan, "report.html").decode()
    assert "reconstructions made elsewhere" in page and "SIMULATED" in page


def test_pictures_made_elsewhere_are_scored_in_their_own_size(finished, tmp_path):
    """MindEye's suite goes from a picture's own size through 256; nothing may resize it before."""
    subject = finished.subjects[0]
    ids, random = subject.image_ids("test"), np.random.default_rng(0)
    seen = run.seen_pictures(subject)
    made = enlarge(seen, (300, 300)).astype(np.int16) + random.integers(-60, 60, (len(ids), 300, 300, 3))
    made = made.clip(0, 255).astype(np.uint8)
    for i, picture in enumerate(made):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    data = replace(finished.config.data, subjects=(1,))
    evaluation = replace(finished.config.evaluation, images=str(tmp_path), suites=("mindeye",), skip_missing=True)
    plan = Plan(replace(finished.config, data=data, evaluation=evaluation))
    results.judge(plan)
    means = scores.mean_scores(plan.subjects[0], IMAGES)
    for name, values in pixel_scores("mindeye", seen, made):
        assert means[f"{IMAGES}/{name}/matched"] == pytest.approx(values.mean(), abs=1e-6)
    with_detour = dict(pixel_scores("mindeye", seen, enlarge(made, seen.shape[1:3])))
    assert abs(with_detour["mindeye/ssim"].mean() - means[f"{IMAGES}/mindeye/ssim/matched"]) > 0.01


def test_means_over_subjects_say_which_images_they_are_of(finished, monkeypatch):
    plan = Plan(finished.config)
    ids = {subject: subject.image_ids("test") for subject in plan.subjects}
    fewer = {subject.subject: ids[subject][: len(ids[subject]) - 2 * i] for i, subject in enumerate(plan.subjects)}
    monkeypatch.setattr(SubjectPlan, "image_ids", lambda self, split: fewer[self.subject])
    n_all, n_fewer = (len(fewer[subject.subject]) for subject in plan.subjects)
    note = f"all: the {n_fewer} test images that every subject saw (subjects alone: {n_all}, {n_fewer})"
    assert note in report.metric_notes(plan)
    fewer[plan.subjects[1].subject] = fewer[plan.subjects[1].subject][:1]
    with pytest.raises(ValueError, match="have 1 test images in common"):
        scores.pooled(plan, "ridge")


def test_metrics_weights_come_from_the_named_folder_first(finished, tmp_path):
    """Also CLIP's, though the tokens' CLIP would do: that one is only taken when the folder has none."""
    own, tokens = tmp_path / "metrics" / BACKBONES["clip_vit_l14"].file, tmp_path / "clip.safetensors"
    clip = replace(finished.config.clip, model="ViT-L-14", checkpoint=str(tokens))
    config = replace(finished.config, clip=clip, stage2=replace(finished.config.stage2, model="none"),
                     evaluation=replace(finished.config.evaluation, weights=str(own.parent)))  # fmt: skip
    tokens.touch()
    assert Plan(config).backbone_file("clip_vit_l14") == tokens
    own.parent.mkdir()
    own.touch()
    assert Plan(config).backbone_file("clip_vit_l14") == own


def test_retrieval_is_scored_on_predicted_tokens(finished):
    subject = finished.subjects[0]
    columns = finished.columns("clip_vision")
    predicted = finished.predictions(Fit("ridge", "clip_vision")).read(subject.folder, subject.parts("test")[0].name)
    brain = np.concatenate([view_column(predicted, name) for name in columns], 1).astype(np.float64)
    image = read_targets(subject, "test", columns, "clip_vision").astype(np.float64)
    brain, image = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (brain, image))
    similarity = brain @ image.T
    means = scores.mean_scores(subject, "ridge")
    assert means["tokens/forward/matched"] == pytest.approx(np.mean(similarity.argmax(1) == np.arange(12)))
    assert means["tokens/backward/matched"] == pytest.approx(np.mean(similarity.argmax(0) == np.arange(12)))
    assert means["tokens/forward/chance"] == pytest.approx(1 / 12)


def test_spread_over_seeds(finished):
    plan = Plan(replace(finished.config, models=("gru",), evaluation=replace(finished.config.evaluation, seeds=(5,))))
    results.train_all_subjects(plan)
    name = "stage1/mini/pixcorr/matched"
    means = [scores.pooled(each, "gru")[name].mean() for each in (plan, *plan.replicates)]
    assert means[0] == scores.pooled(finished, "gru")[name].mean() != means[1]
    assert scores.spread_over_seeds(plan, "gru")[name] == pytest.approx(abs(means[0] - means[1]) / np.sqrt(2))
    assert "SD over trainings with seeds 0, 5" in report.report_table(plan)
    assert scores.spread_over_seeds(finished, "gru") == {}


def test_noise_curves_go_into_the_report(finished, monkeypatch):
    monkeypatch.setattr(noise, "LEVELS", (0.0, 256.0))
    assert noise.noise_curves(finished) is None
    before = report.report_file(finished, "report.html").decode()
    table = results.noise_sensitivity(finished)
    curves = noise.noise_curves(finished)
    assert list(curves) == ["0", "256", noise.WITHOUT] and all(label in table for label in curves)
    own = scores.summary(finished, "ridge")
    assert curves["0"]["mini/pixcorr"] == own["stage2/mini/pixcorr/matched"]
    for metric in ("mini/pixcorr", "mini/ssim"):
        assert curves["256"][metric].mean < curves["0"][metric].mean
    assert "Noise sensitivity" in report.report_file(finished, "report.html").decode() and "Noise sensitivity" not in before
    unused = noise.noise_plans(finished)["256"].stage2(None).folder  # from the truth: no row of the table shows it
    assert not finished.store.sizes(f"{unused}/{finished.subjects[0].pictures(None)[0]}")
    # killed between the page and MLflow: the next start logs it
    stage, wanted = results.noise_stage(finished)
    assert not stage.missing(finished.report_partition, wanted)
    stage.begin(finished.report_partition, {"run.json": {}})
    logged = []
    monkeypatch.setattr(results, "report_again", lambda plan: logged.append(plan))
    results.noise_sensitivity(finished)
    results.noise_sensitivity(finished)
    assert logged == [finished]
    with pytest.raises(ValueError, match="--stage2.start stage1"):
        results.noise_sensitivity(Plan(replace(finished.config, stage2=replace(finished.config.stage2, model="none"))))


def test_published_figures_stand_beside_nsd_s_only(finished, monkeypatch):
    evaluation = replace(finished.config.evaluation, suites=("mini", "brain_diffuser"), skip_missing=True)
    simulated = Plan(replace(finished.config, evaluation=evaluation))
    assert report.published_section(simulated) is None
    nsd = Plan(replace(finished.config, evaluation=evaluation,
                       data=replace(finished.config.data, nsd_root=str(finished.layout.root))))  # fmt: skip
    monkeypatch.setattr(report, "summary", lambda plan, model: {})  # nothing was decoded from this "NSD"
    table = report.published_section(nsd).tables[0]
    gru = next(row for row in table.rows if row.cells[0].text == "GRU, 15 layers, subjects 1 2 5 7")
    assert gru.cells[list(table.header).index("brain_diffuser/ssim_columns")].text == "0.361"
    ours = [row.cells[0].text for row in table.rows if not row.reference]
    assert ours == [f"here: {model}, {nsd.config.n_layers} layers, subjects 1 2" for model in nsd.models]
    assert not any(name.startswith("mini/") for name in table.header)


def test_an_unfinished_report_is_not_there(finished, tmp_path):
    plan = Plan(replace(finished.config, store=StoreConfig(str(tmp_path)),
                        data=replace(finished.config.data, nsd_root=str(finished.layout.root))))  # fmt: skip
    assert plan.report.missing(plan.report_partition, plan.report_wanted) and results.untracked(plan)
    assert run.anything_missing(run.metrics_partitions(plan))
    assert not list(Path(tmp_path).iterdir())


def test_the_vae_s_round_trip_is_a_ceiling(finished):
    subject = finished.subjects[0]
    seen = run.seen_pictures(subject).astype(float)
    through = pictures_of(finished, subject, "vae").astype(float)
    assert seen.shape == through.shape and np.abs(seen - through).mean() < 12 < np.abs(seen - through[::-1]).mean()
    ours, ceiling = (scores.mean_scores(subject, model)["stage2/mini/pixcorr/matched"] for model in ("ridge", "vae"))
    assert ceiling > 0.9 > ours
