"""The whole way on a small miniature NSD: results, determinism, what is skipped, and what leaks."""
from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import h5py
import numpy as np
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient

from nsdray.cluster import actors, report, results, run, scores
from nsdray.cluster.actors import Replica, fitting_batch_size, memory_share, pool_size, read_rows, vdvae_bytes, within_memory
from nsdray.cluster.data import Source, TrainingStream, read_samples, read_targets, steps_per_epoch
from nsdray.cluster.tracking import tracking_uri
from nsdray.cluster.train import parallel_trainings, validation_images
from nsdray.config import ClusterConfig, DataConfig, StoreConfig
from nsdray.decoder import Decoder
from nsdray.generators.stage1 import enlarge, from_png
from nsdray.metrics.pixel import pixcorr
from nsdray.metrics.published import PUBLISHED
from nsdray.models.clip import CLIPConfig, load_clip
from nsdray.models.vdvae import VDVAEConfig, load_vdvae
from nsdray.models.versatile_diffusion import load_versatile_diffusion
from nsdray.nsd.betas import SCALE
from nsdray.nsd.captions import load_captions
from nsdray.nsd.stimuli import Stimuli, resize
from nsdray.seeds import image_seeds
from nsdray.stages import Fit, Plan, layer_name
from nsdray.store import table, view_column
from nsdray.targets.clip_tokens import text_tokens, unconditional_tokens, vision_tokens


def decoder_files(plan, model):
    subject = plan.subjects[0]
    folder = f"{plan.model(Fit(model, 'vdvae')).folder}/{subject.folder}"
    return {name: plan.store.read_bytes(f"{folder}/{name}") for name in plan.store.sizes(folder) if name.endswith(".safetensors")}


def test_samples_are_means_over_repeats_and_splits_are_disjoint(finished):
    subject = finished.subjects[0]
    train_ids, _ = read_samples(subject, "train")
    test_ids, betas = read_samples(subject, "test")
    assert len(train_ids) == 96 and len(test_ids) == 12 and not set(train_ids) & set(test_ids)
    trials = [finished.betas.read(subject.folder, shard) for shard in subject.betas_wanted if shard.startswith("session")]
    ids = np.concatenate([view_column(t, "image_id") for t in trials])
    single = np.concatenate([view_column(t, "betas") for t in trials])
    expected = single[ids == test_ids[3]].astype(np.float64).mean(0) / SCALE
    assert (ids == test_ids[3]).sum() == 3
    np.testing.assert_allclose(betas[3], expected, rtol=1e-6)


def test_targets_are_the_vdvae_s_and_in_the_samples_order(finished):
    subject = finished.subjects[1]
    image_ids, _ = read_samples(subject, "train")
    partition, part = subject.targets("train"), subject.parts("train")[1]
    data = finished.targets().read(partition, part.name)
    np.testing.assert_array_equal(view_column(data, "image_id"), image_ids[64:])
    shapes = VDVAEConfig.mini().layer_shapes
    assert all(view_column(data, layer_name(i)).shape[1:] == shapes[i] for i in range(3))


def seen(plan, image_ids):
    with Stimuli(plan.layout.stimuli) as stimuli:
        return stimuli.read(image_ids)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("split", ["train", "test"])
def test_targets_are_those_of_the_very_image(finished, split):
    """What is written, and what `read_targets` gives, beside a direct computation for some images of a subject."""
    subject = finished.subjects[1]
    image_ids = subject.image_ids(split)
    rows = [0, 7, len(image_ids) - 1]
    pictures, ids = seen(finished, image_ids[rows]), image_ids[rows]
    vdvae = load_vdvae(finished.vdvae_checkpoint, VDVAEConfig.mini())
    clip = load_clip(finished.clip_checkpoint, CLIPConfig.mini())
    images = torch.from_numpy(resize(pictures, 32)).permute(0, 3, 1, 2) / 255
    expected = vdvae.encode(images, 3, "sample", image_seeds(finished.config.targets.seed, ids))
    assert np.abs(expected[0] - vdvae.encode(images, 1, "mean")[0]).max() > 0.01  # the draws matter
    stage, partition, shards = finished.targets(), subject.targets(split), [part.name for part in subject.target_parts(split)]
    columns = [layer_name(i) for i in range(3)]
    for layer, cells in zip(expected, read_rows((stage, partition, shards), ids, columns)):
        close(cells, layer)
    close(read_targets(subject, split, columns)[rows], np.concatenate([layer.flatten(1) for layer in expected], 1))
    captions = load_captions(finished.layout, [int(i) for i in ids])
    tokens = {"clip_vision": vision_tokens(clip, pictures, 3), "clip_text": text_tokens(clip, captions, 8)}
    for kind, values in tokens.items():
        close(read_targets(subject, split, finished.columns(kind), kind)[rows], values.reshape(3, -1))
        assert np.abs(values[0] - values[1]).max() > 0.01  # another image's would not do


def test_shared_images_are_encoded_once_whoever_saw_which(finished):
    plan = Plan(finished.config)
    fewer, all_seen = plan.subjects
    while len(fewer.sessions) > 1:
        fewer.sessions.popitem()
    ids = fewer.image_ids("test")
    assert 0 < len(ids) < len(all_seen.image_ids("test")) == len(plan.shared_images)
    for kind in plan.kinds:
        assert len(run.targets_partitions(plan, kind)) == 3  # two of training images, one of shared ones
        assert not plan.targets(kind).missing(fewer.targets("test"), fewer.targets_wanted("test", kind))
    own, all_targets = (read_targets(subject, "test", [layer_name(1)]) for subject in (fewer, all_seen))
    np.testing.assert_array_equal(own, [all_targets[list(all_seen.image_ids("test")).index(i)] for i in ids])
    (cells,) = read_rows(run.rows_of(fewer, None, "vdvae"), ids, [layer_name(1)])
    np.testing.assert_array_equal(cells.reshape(len(ids), -1), own)
    assert fewer.pictures(None)[0] != all_seen.pictures(None)[0]  # pictures are of what each saw


class Shards:
    """A stage of shards of two images each, which notes what is read."""

    def __init__(self):
        self.reads = []

    def read(self, _partition, shard, columns=None):
        self.reads.append((shard, columns))
        ids = np.arange(2) + 2 * int(shard)
        return table({"image_id": ids, "token_0": np.stack([ids, ids], 1)}).select(columns or ["image_id", "token_0"])


def test_only_the_shards_that_hold_what_is_wanted_are_read():
    stage = Shards()
    (cells,) = read_rows((stage, "", ["0", "1", "2", "3"]), np.array([5, 2]))
    np.testing.assert_array_equal(cells[:, 0], [5, 2])
    assert [shard for shard, columns in stage.reads if columns is None] == ["1", "2"]
    assert "3" not in dict(stage.reads)


@pytest.mark.parametrize("model", ["ridge", "gru"])
def test_decoder_decodes_one_image_as_the_run_did(finished, model):
    subject = finished.subjects[0]
    folder = f"{finished.store.base}/{finished.model(Fit(model, 'vdvae')).folder}/{subject.folder}"
    decoder = Decoder.load(folder, load_vdvae(finished.vdvae_checkpoint, VDVAEConfig.mini()))
    image_ids, betas = read_samples(subject, "test")
    picture = decoder.decode(betas[5])
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    data = finished.stage1(model).read(subject.folder, subject.parts("test")[0].name)
    stored = from_png(data["stage1"][5].as_py())
    alone = decoder.decode(betas[5:6], [image_ids[5]])[0]
    assert np.mean(np.abs(alone.astype(int) - stored) <= 1) > 0.999
    assert pixcorr(alone[None], stored[None])[0] > 0.999


def test_stage2_refines_the_stage1_picture_under_ridge_s_tokens(finished):
    subject, s = finished.subjects[0], finished.config.stage2
    partition, (shard, *_) = subject.pictures("gru")
    stage1, stage2 = (getattr(finished, name)("gru").read(partition, shard) for name in ("stage1", "stage2"))
    tokens = []
    for kind in ("clip_vision", "clip_text"):
        data = finished.predictions(Fit("ridge", kind)).read(subject.folder, subject.parts("test")[0].name)
        tokens.append(torch.from_numpy(np.stack([view_column(data, name) for name in finished.columns(kind)], 1)))
    start = enlarge(np.stack([from_png(cell.as_py()) for cell in stage1["stage1"]]), (64, 64))
    diffusion = load_versatile_diffusion(finished.diffusion_folder)
    clip = load_clip(finished.clip_checkpoint, CLIPConfig.mini())
    pictures = diffusion.generate(
        image_seeds(s.seed, subject.image_ids("test")), *tokens, unconditional_tokens(clip),
        torch.from_numpy(start).permute(0, 3, 1, 2) / 255, s.strength, s.guidance, s.mixing, s.n_steps, s.sampler,
    )  # fmt: skip
    stored = np.stack([from_png(cell.as_py()) for cell in stage2["stage2"]])
    assert np.mean(np.abs(pictures.numpy().astype(int) - stored) <= 1) > 0.999
    assert stage2["image_id"].to_pylist() == subject.image_ids("test").tolist()


def test_other_settings_of_stage2_redo_stage2_only(finished):
    settings = replace(finished.config.stage2, context="text", start="noise", strength=1.0)
    plan = Plan(replace(finished.config, stage2=settings))
    subject = plan.subjects[0]
    for model in ("ridge", None):
        assert not plan.stage1(model).missing(*subject.pictures(model))
        assert plan.stage2(model).missing(*subject.pictures(model))
    assert [fit.kind for fit in plan.fits] == ["vdvae", "vdvae", "clip_text"]
    run.reconstruct_test_sets(plan)  # without vision tokens and without a picture to start from
    assert not plan.stage2("gru").missing(*subject.pictures("gru"))


def test_a_suite_without_its_weights(finished, tmp_path, monkeypatch):
    evaluation = replace(finished.config.evaluation, suites=("mini", "brain_diffuser"), weights=str(tmp_path), controls=False)
    message = "alexnet: its weights alexnet-.* are not in .* Without it: --evaluation.skip-missing"
    with pytest.raises(FileNotFoundError, match=message):
        Plan(replace(finished.config, evaluation=evaluation)).metrics("ridge")
    plan = Plan(replace(finished.config, evaluation=replace(evaluation, skip_missing=True)))
    run.embed_test_sets(plan)
    run.evaluate_test_sets(plan)
    for text in (report.report_table(plan), report.report_page(plan)):
        assert "brain_diffuser/alexnet2: not computed, weights missing (alexnet-" in text
    (differences,) = report.difference_tables(plan)
    cells = dict(zip(differences.header, differences.rows[0].cells))
    assert cells["stage2/brain_diffuser/alexnet2"].text == "–" and "brain_diffuser/ssim" not in cells
    assert float(cells["stage2/mini/ssim"].text) != 0
    means, before = (scores.mean_scores(p.subjects[0], "ridge") for p in (plan, finished))
    assert means["stage2/mini/clip/matched"] == before["stage2/mini/clip/matched"]
    assert 0 < means["stage2/brain_diffuser/ssim_columns/matched"] < 1 and "stage2/brain_diffuser/alexnet2/matched" not in means


def test_a_killed_replica_is_replaced_and_its_shard_done_again(finished):
    subject, stage = finished.subjects[0], finished.stage2("ridge")
    partition, wanted = subject.pictures("ridge")
    before = {shard: stage.read(partition, shard) for shard in wanted}
    for shard in wanted:
        finished.store.delete(f"{stage.folder}/{partition}/{shard}")
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run.reconstruct_test_sets, finished)
        killed = []
        while not killed and not running.done():
            busy = [p for p in psutil.process_iter(["name", "cmdline"]) if p.info["cmdline"] and
                    p.info["cmdline"][0].startswith("ray::Replica.reconstruct_stage2")]  # fmt: skip
            for process in busy[:1]:
                process.kill()
                killed.append(process.pid)
            time.sleep(0.01)
        running.result(timeout=300)
    assert killed
    assert all(stage.read(partition, shard).equals(data) for shard, data in before.items())


def test_decoder_refuses_bad_betas(finished):
    subject = finished.subjects[0]
    decoder = Decoder.load(f"{finished.store.base}/{finished.model(Fit('ridge', 'vdvae')).folder}/{subject.folder}")
    with pytest.raises(ValueError, match=r"betas have shape \(1, 7\); this decoder of subject 1 wants"):
        decoder.decode(np.zeros(7))
    with pytest.raises(ValueError, match="1 values that are not finite"):
        decoder.decode(np.where(np.arange(len(decoder.scaling.betas_mean)) == 3, np.nan, 0.0))
    with pytest.raises(FileNotFoundError, match=r"holds no decoder\.json"):
        Decoder.load(finished.store.base)


def test_mlflow_has_a_run_per_subject_and_model(finished):
    client = MlflowClient(tracking_uri(finished.store))
    experiment = client.get_experiment_by_name("nsdray")
    everything = client.search_runs([experiment.experiment_id], max_results=1000)
    published = [r for r in everything if r.data.tags.get("source") == "published"]
    key = results.parent_key(finished)
    parent = next(r.info.run_id for r in everything if r.data.tags["nsdray.key"] == key)
    runs = [r for r in everything if parent in (r.info.run_id, r.data.tags.get("mlflow.parentRunId"))]
    assert len(published) == len(PUBLISHED) and all(r.data.tags["data"] == "nsd" for r in published)
    paper = next(r for r in published if r.info.run_name == "published: GRU, 15 layers, subjects 1 2 5 7 (NSD)")
    assert paper.data.metrics["stage2_brain_diffuser_ssim_columns"] == 0.361
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    means = {r.data.params["model"]: r for r in children if r.data.params["subject"] == "1-2"}
    children = [r for r in children if r.data.params["subject"] != "1-2"]
    assert means.keys() == {"ridge", "gru", "mean", "nearest", "vae"} and len(children) == 4
    assert means["gru"].info.run_name == "gru-3 subjects 1-2 (SIMULATED)"
    pooled = scores.summary(finished, "gru")["stage1/mini/pixcorr/matched"].mean
    assert means["gru"].data.metrics["stage1_mini_pixcorr"] == pytest.approx(pooled)
    assert all(r.info.status == "FINISHED" and r.data.tags["data"] == "simulated" for r in runs)
    gru = next(r for r in children if r.data.params["model"] == "gru" and r.data.params["subject"] == "1")
    assert len(client.get_metric_history(gru.info.run_id, "val_loss")) == 4
    own = scores.mean_scores(finished.subjects[0], "gru")
    assert gru.data.metrics["stage1_mini_pixcorr"] == pytest.approx(own["stage1/mini/pixcorr/matched"])
    assert {f.path for f in client.list_artifacts(gru.info.run_id)} == {"grid.png", "decoder"}


def test_second_call_finds_everything_done(finished, monkeypatch):
    def forbidden(*_):
        raise AssertionError("nothing should have been started")

    monkeypatch.setattr(run, "start_ray", forbidden)
    results.train_all_subjects(Plan(finished.config))


def test_deleted_shard_is_made_again_and_nothing_else(finished):
    subject = finished.subjects[0]
    folder = f"{finished.store.base}/{finished.betas.folder}/{subject.folder}"
    shutil.move(f"{folder}/session=02.parquet", f"{folder}/kept")
    before = finished.store.sizes(f"{finished.betas.folder}/{subject.folder}")
    assert finished.betas.missing(subject.folder, subject.betas_wanted) == ["session=02.parquet"]
    run.prepare_betas(Plan(finished.config))
    assert finished.betas.missing(subject.folder, subject.betas_wanted) == [] and "kept" in before
    with open(f"{folder}/session=02.parquet", "rb") as new, open(f"{folder}/kept", "rb") as old:
        assert new.read() == old.read()


def test_one_more_subject_redoes_nothing(finished, tmp_path):
    config = replace(finished.config, data=replace(finished.config.data, subjects=(1, 2, 5)))
    plan = Plan(config)
    new = plan.subjects[2]
    for subject in plan.subjects[:2]:
        assert not plan.betas.missing(subject.folder, subject.betas_wanted)
        assert not plan.samples.missing(subject.samples("train"), subject.wanted("train"))
        assert not plan.targets().missing(subject.targets("train"), subject.targets_wanted("train"))
        assert not plan.model(Fit("gru", "vdvae")).missing(subject.folder, {"decoder.json": subject.inputs})
    assert plan.betas.missing(new.folder, new.betas_wanted)
    assert not plan.targets().missing(new.targets("test"), new.targets_wanted("test"))  # shared images: already there


def test_nothing_fitted_sees_the_test_set(finished, tmp_path):
    """Scrambled betas of the test trials leave every fitted number as it was."""
    nsd = tmp_path / "nsd"
    shutil.copytree(finished.layout.root, nsd)
    plan = Plan(replace(finished.config, store=StoreConfig(str(tmp_path / "run")),
                        data=DataConfig(nsd_root=str(nsd), subjects=(1,), rows_per_part=64)))  # fmt: skip
    subject = plan.subjects[0]
    for number, path in subject.sessions.items():
        rows = np.flatnonzero(subject.trials.is_test[subject.trials.session == number])
        with h5py.File(path, "r+") as file:
            file["betas"][rows] = np.random.default_rng(number).integers(-3000, 3000, file["betas"][rows].shape)
    results.train_all_subjects(plan)
    for model in ("ridge", "gru"):
        ours, theirs = decoder_files(plan, model), decoder_files(finished, model)
        assert ours.keys() == theirs.keys() and len(ours) >= 2
        assert [name for name in ours if ours[name] != theirs[name]] == []
        assert scores.mean_scores(subject, model) != scores.mean_scores(finished.subjects[0], model)


def stream(plan, **settings):
    subject = plan.subjects[0]
    source = Source.of(subject, "train", [layer_name(0), layer_name(2)])
    return TrainingStream(source, validation_images(subject, 0.1), n_steps=5, n_epochs=3, seed=0, **settings)


def test_stream_gives_every_row_once_the_same_way_each_time(finished):
    subject = finished.subjects[0]
    image_ids, betas = read_samples(subject, "train")
    targets = read_targets(subject, "train", [layer_name(0), layer_name(2)])
    kept = ~np.isin(image_ids, validation_images(subject, 0.1))
    assert kept.sum() == 86
    row_of = {row.tobytes(): i for i, row in enumerate(betas)}
    epochs = []
    for _ in range(2):
        batches = stream(finished)
        epochs.append([[row_of[x.tobytes()] for b, t, n in batches(epoch) for x in b.numpy()] for epoch in range(3)])
    assert epochs[0] == epochs[1] and epochs[0][0] != epochs[0][1]
    assert all(sorted(epoch) == list(np.flatnonzero(kept)) for epoch in epochs[0])
    later = stream(finished)
    resumed = [row_of[x.tobytes()] for b, _, _ in later(2) for x in b.numpy()]
    assert resumed == epochs[0][2]  # a resumed run sees the same epoch
    batches = list(stream(finished)(0))
    assert [len(b) for b, _, _ in batches] == [18, 17, 17, 17, 17]
    for b, t, n in batches:
        rows = [row_of[x.tobytes()] for x in b.numpy()]
        np.testing.assert_array_equal(t.numpy(), targets[rows].astype(np.float32))
        assert n == len(b)


def test_workers_share_the_steps_of_one(finished, monkeypatch):
    """Also over several blocks, whose numbers of rows are no multiples of the number of workers."""
    monkeypatch.setattr("nsdray.cluster.data.GROUPS_PER_BLOCK", 1)
    alone = list(stream(finished)(1))
    for world_size in (2, 3, 4):
        workers = [list(stream(finished, rank=rank, world_size=world_size)(1)) for rank in range(world_size)]
        for (betas, targets, n), *shares in zip(alone, *workers, strict=True):
            rows = {b.numpy().tobytes(): t for own in shares for b, t in zip(own[0], own[1])}
            assert sum(len(own[0]) for own in shares) == len(rows) == n and all(own[2] == n for own in shares)
            assert max(len(own[0]) for own in shares) - min(len(own[0]) for own in shares) <= 1
            assert all(torch.equal(rows[b.numpy().tobytes()], t) for b, t in zip(betas, targets))


def test_stream_of_single_trials(finished):
    subject = finished.subjects[0]
    image_ids, _ = read_samples(subject, "train")
    parts = [finished.samples.read(subject.samples("train"), p.name, ["repeats"]) for p in subject.parts("train")]
    repeats = np.concatenate([view_column(part, "repeats") for part in parts]).astype(np.float32) / np.float32(SCALE)
    image_of = {row.tobytes(): (i, r) for i, image in enumerate(repeats) for r, row in enumerate(image)}
    epochs = [[image_of[x.tobytes()] for b, _, _ in stream(finished, sampling="trial")(e) for x in b.numpy()] for e in (0, 1)]
    means = [[x.tobytes() for b, _, _ in stream(finished)(e) for x in b.numpy()] for e in (0, 1)]
    row_of = {row.tobytes(): i for i, row in enumerate(read_samples(subject, "train")[1])}
    assert [[image for image, _ in epoch] for epoch in epochs] == [[row_of[x] for x in epoch] for epoch in means]
    assert dict(epochs[0]) != dict(epochs[1]) and {r for _, r in epochs[0]} == {0, 1, 2}


def test_steps_per_epoch():
    assert steps_per_epoch([8859], 128, 1) == steps_per_epoch([8859], 128, 8) == 69
    assert steps_per_epoch([540, 540], 32, 1) == 34
    assert steps_per_epoch([86], 1, 1) == 43 and steps_per_epoch([86], 16, 4) == 5 and steps_per_epoch([9], 2, 4) == 1
    with pytest.raises(ValueError, match="7 training images are too few for 4 training workers"):
        steps_per_epoch([86, 7], 16, 4)


def test_gru_trains_on_two_workers(finished, tmp_path):
    """With batch statistics and dropout, on single trials, the whole way."""
    config = replace(finished.config, store=StoreConfig(str(tmp_path)), models=("gru",), cluster=ClusterConfig(n_train_workers=2),
                     gru=replace(finished.config.gru, sampling="trial"),
                     data=DataConfig(nsd_root=str(finished.layout.root), subjects=(1,), rows_per_part=64))  # fmt: skip
    plan = Plan(config)
    results.train_all_subjects(plan)
    assert np.isfinite(list(scores.mean_scores(plan.subjects[0], "gru").values())).all()


@pytest.fixture
def one_cpu(finished):
    """Another cluster for the time of a test; what comes after it has two CPUs again."""
    ray.shutdown()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)


def test_nothing_depends_on_the_number_of_workers(finished, one_cpu, tmp_path):
    config = replace(finished.config, store=StoreConfig(str(tmp_path)), models=("ridge",),
                     data=DataConfig(nsd_root=str(finished.layout.root), subjects=(1,), rows_per_part=64))  # fmt: skip
    plan = Plan(config)
    results.train_all_subjects(plan)
    assert scores.mean_scores(plan.subjects[0], "ridge") == scores.mean_scores(finished.subjects[0], "ridge")
    for split in ("train", "test"):  # one replica there, two here: the same to the bit
        partition = plan.subjects[0].targets(split)
        for part in plan.subjects[0].target_parts(split):
            for kind in plan.kinds:
                one, two = (p.targets(kind).read(partition, part.name) for p in (plan, finished))
                assert one.equals(two)
    for stage in ("stage1", "stage2"):
        partition, shards = plan.subjects[0].pictures("ridge")
        for shard in shards:
            one, two = (getattr(p, stage)("ridge").read(partition, shard) for p in (plan, finished))
            assert one.equals(two)


def test_parallel_trainings():
    assert parallel_trainings(ClusterConfig(), {"CPU": 2.0}) == 2
    assert parallel_trainings(ClusterConfig(n_train_workers=2), {"CPU": 64.0, "GPU": 4.0}) == 2
    with pytest.raises(ValueError, match=r"3 training workers need 3 CPUs, but the cluster has 2 CPUs and 0 GPUs"):
        parallel_trainings(ClusterConfig(n_train_workers=3), {"CPU": 2.0})


def test_batch_size_follows_memory():
    assert fitting_batch_size(vdvae_bytes(VDVAEConfig.mini()), 8e9) == 32
    assert fitting_batch_size(vdvae_bytes(VDVAEConfig.imagenet64()), 12e9) == 16
    assert fitting_batch_size(vdvae_bytes(VDVAEConfig.imagenet64()), 1e6) == 1


def test_a_container_has_its_limit_s_memory(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(actors, "CGROUP_LIMIT", limit)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    whole = memory_share("cpu", 1.0)
    limit.write_text("max\n")
    assert memory_share("cpu", 1.0) == whole > 1e6
    limit.write_text("4000000\n")
    assert memory_share("cpu", 1.0) == 1e6


def test_a_replica_s_float32_is_float32(finished, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Replica(finished.config, finished.layout, None, None, None, {})
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_too_large_a_batch_is_told(finished, monkeypatch):
    def encode(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    replica = Replica(finished.config, finished.layout, finished.vdvae_checkpoint, None, None, {})
    monkeypatch.setattr(replica.vdvae, "encode", encode)
    subject = finished.subjects[0]
    with pytest.raises(ValueError, match="16 pictures at once do not fit .* give a --targets.batch-size below 16"):
        replica.extract_vdvae(finished.targets(), subject.targets("train"), subject.parts("train")[0], {})
    with pytest.raises(ValueError, match="--stage2.batch-size below 4"), within_memory("stage2", 4):
        encode()


def test_pool_size():
    assert pool_size(ClusterConfig(), {"CPU": 2.0}, 9) == (2, {"num_cpus": 1})
    assert pool_size(ClusterConfig(), {"CPU": 2.0, "memory": 1e12}, 9)[0] == 2
    assert pool_size(ClusterConfig(), {"CPU": 16.0, "memory": 48e9}, 99)[0] == 8
    assert pool_size(ClusterConfig(), {"CPU": 16.0, "memory": 100e9}, 99)[0] == 11
    assert pool_size(ClusterConfig(), {"CPU": 16.0, "memory": 1e12}, 99) == (16, {"num_cpus": 1})
    assert pool_size(ClusterConfig(), {"CPU": 64.0, "GPU": 4.0}, 9) == (4, {"num_cpus": 1, "num_gpus": 1.0})
    assert pool_size(ClusterConfig(gpus_per_replica=0.3), {"CPU": 64.0, "GPU": 4.0}, 99)[0] == 12
    assert pool_size(ClusterConfig(), {"CPU": 4.0, "GPU": 8.0}, 99)[0] == 4
    assert pool_size(ClusterConfig(gpus_per_replica=0.5), {"CPU": 64.0, "GPU": 4.0}, 6)[0] == 6
    with pytest.raises(ValueError, match="n_replicas is 5, but the cluster has room for 2"):
        pool_size(ClusterConfig(n_replicas=5), {"CPU": 2.0}, 9)
    assert pool_size(ClusterConfig(n_replicas=5), {"CPU": 2.0}, 9, strict=False)[0] == 2
