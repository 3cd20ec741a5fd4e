"""Networks on a cluster: workers, one model for all subjects, fine-tuning, tokens, arrays shared by many trainings."""
from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from nsdray.cluster import run, train
from nsdray.cluster.data import Source, read_samples, read_targets, share_arrays
from nsdray.cluster.tracking import start_tracker
from nsdray.cluster.train import fit_network, train_networks, validation_images
from nsdray.config import ClusterConfig
from nsdray.decoder import Decoder
from nsdray.stages import Fit, Plan, layer_name
from nsdray.store import Store, view_column
from nsdray.training import DivergedError, LocalContext, TooLargeError, memory_batches


def with_network(plan, name, **settings):
    """The same data, another network."""
    config = replace(plan.config, models=(name,), stage2=replace(plan.config.stage2, context="text"))
    network = name.removeprefix("shared-")
    return Plan(replace(config, **{network: replace(getattr(config, network), batch_size=32, n_epochs=3, **settings)}))


def network_of(plan, fit, subject):
    return Decoder.load(f"{plan.store.base}/{plan.model(fit).folder}/{subject.folder}")


def test_trainings_share_arrays(finished):
    subject, held_out = finished.subjects[0], validation_images(finished.subjects[0], 0.1)
    names = [layer_name(0), layer_name(2)]
    shared = share_arrays(Source.of(subject, "train", [layer_name(i) for i in range(3)]), held_out)
    arrays = shared.get(names)
    image_ids, betas = read_samples(subject, "train")
    kept, targets = ~np.isin(image_ids, held_out), read_targets(subject, "train", names)
    np.testing.assert_array_equal(arrays.targets[np.array([5, 2])], targets[kept][[5, 2]])
    np.testing.assert_array_equal(arrays.val_targets[:], targets[~kept])
    np.testing.assert_allclose(arrays.scale["latents_std"], targets[kept].astype(np.float64).std(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(arrays.scale["betas_mean"], betas[kept].mean(0, dtype=np.float64), rtol=1e-4, atol=1e-6)
    whole = np.concatenate([arrays.betas, arrays.val_betas]) * arrays.scale["betas_std"] + arrays.scale["betas_mean"]
    np.testing.assert_allclose(whole, np.concatenate([betas[kept], betas[~kept]]), atol=1e-4)
    again = shared.get(names)
    assert np.shares_memory(again.betas, arrays.betas) and not arrays.betas.flags.writeable
    assert all(np.shares_memory(a, b) for a, b in zip(again.targets.arrays, arrays.targets.arrays))
    batch = next(iter(memory_batches(arrays.betas, arrays.targets, 16, 0)(0)))
    assert batch[0].shape[1] == len(subject.voxels.index) and batch[1].shape[1] == targets.shape[1]


def of_workers(plan, n_workers, subjects=(1,)):
    """The same plan for some subjects, with as many workers for each training."""
    config, cluster = plan.config, ClusterConfig(n_train_workers=n_workers)
    return Plan(replace(config, data=replace(config.data, subjects=subjects), cluster=cluster))


@pytest.mark.parametrize("name, subjects", [("mlp", (1,)), ("shared-mlp", (1, 2))])
def test_one_worker_and_two_give_the_same_curve(finished, tmp_path, name, subjects):
    """Through Ray Train, for a network without batch statistics and with dropout off."""
    curves, tracker = [], start_tracker(Store(str(tmp_path)))
    for n_workers in (1, 2):
        plan = with_network(of_workers(finished, n_workers, subjects), name, dropout=0.0, hidden=16)
        fit = Fit(name, "vdvae")
        for subject in plan.subjects:
            ray.get(tracker.start.remote(subject.run_key(name), f"{n_workers} workers", {}, {}))
        train_networks(plan.subjects, fit, tracker)
        folder = f"{plan.model(fit).folder}/{plan.subjects[0].folder}"
        curves.append(json.loads(plan.store.read_bytes(f"{folder}/history.json")))
    assert len(curves[0]) == len(curves[1]) == 3
    for one, two in zip(*curves):
        for name in ("train_loss", "val_loss", "val_mse", "val_mae"):
            assert two[name] == pytest.approx(one[name], rel=1e-4)


def test_batch_statistics_are_those_of_all_workers(finished, tmp_path):
    """While no weight moves, means over two workers' equal shares are those of whole batches: 80 rows in two steps."""
    means, tracker = [], start_tracker(Store(str(tmp_path)))
    for n_workers in (1, 2):
        plan = with_network(of_workers(finished, n_workers), "gru", dropout=0.0, learning_rate=1e-12, validation_fraction=1 / 6)
        plan = Plan(replace(plan.config, gru=replace(plan.config.gru, batch_size=40, n_epochs=1)))
        train_networks(plan.subjects, Fit("gru", "vdvae"), tracker)
        means.append(network_of(plan, Fit("gru", "vdvae"), plan.subjects[0]).network.head[0].running_mean)
    torch.testing.assert_close(means[1], means[0], rtol=1e-3, atol=1e-5)


def test_a_shared_model_is_a_decoder_for_each_subject(finished):
    """And its trunk is fine-tuned to one of them; frozen, nothing but the input layer and batch statistics move."""
    plan, fit = with_network(finished, "shared-gru", hidden=8), Fit("shared-gru", "vdvae")
    best = fit_network(plan.subjects, fit, LocalContext())
    assert best["n_epochs_run"] == 3
    decoders = [network_of(plan, fit, subject) for subject in plan.subjects]
    errors = []
    for subject, decoder in zip(plan.subjects, decoders):
        assert not plan.model(fit).missing(subject.folder, {"decoder.json": subject.inputs})
        ids, betas = read_samples(subject, "train")
        held_out = np.isin(ids, validation_images(subject, 0.1))
        truth = read_targets(subject, "train", plan.columns("vdvae"))[held_out].astype(np.float32)
        errors.append(np.square(decoder.raw_predictions(betas[held_out]) - truth).mean())
    assert best["val_mse"] == pytest.approx(np.mean(errors), rel=1e-4)
    first, second = (decoder.network.state_dict() for decoder in decoders)
    assert all(torch.equal(first[name], second[name]) for name in first if not name.startswith("gru1."))

    base = f"{plan.store.base}/{plan.model(fit).folder}/{plan.subjects[0].folder}"
    tuned = with_network(finished, "gru", hidden=8, pretrained=base, trunk_rate=0.0)
    fit_network(tuned.subjects[1:], Fit("gru", "vdvae"), LocalContext())
    decoder = network_of(tuned, Fit("gru", "vdvae"), tuned.subjects[1])
    np.testing.assert_array_equal(decoder.scaling.latents_std, decoders[0].scaling.latents_std)
    for name, value in decoder.network.named_parameters():
        if not name.startswith("gru1."):
            assert torch.equal(value, first[name])
    faster = Plan(replace(tuned.config, gru=replace(tuned.config.gru, trunk_rate=0.1)))
    assert faster.model(Fit("gru", "vdvae")).hash != tuned.model(Fit("gru", "vdvae")).hash
    with pytest.raises(ValueError, match=r"cannot be fine-tuned to this: its network is .*'hidden': 8.* wanted .*'hidden': 6"):
        other = with_network(finished, "gru", hidden=6, pretrained=base)
        fit_network(other.subjects[1:], Fit("gru", "vdvae"), LocalContext())
    text = Fit("gru", "clip_text")
    assert tuned.pretrained(text) is None and tuned.model(text).hash == with_network(finished, "gru", hidden=8).model(text).hash
    with pytest.raises(FileNotFoundError, match="holds no network.safetensors; --gru.pretrained names a finished folder"):
        with_network(finished, "gru", pretrained=finished.store.base).model(Fit("gru", "vdvae"))


def test_another_subject_s_data_make_another_shared_model(finished):
    plan, more = (
        with_network(Plan(replace(finished.config, data=replace(finished.config.data, subjects=subjects))), "shared-mlp")
        for subjects in ((1, 2), (1, 2, 5))
    )
    assert plan.model(Fit("shared-mlp", "vdvae")).hash != more.model(Fit("shared-mlp", "vdvae")).hash
    assert plan.model(Fit("mlp", "vdvae")).hash == more.model(Fit("mlp", "vdvae")).hash


def test_tokens_by_a_network(finished):
    """All tokens of a kind at once; what follows takes them."""
    plan = with_network(finished, "conv", hidden=8, channels=2)
    plan = Plan(replace(plan.config, models=("ridge",), token_model="conv", data=replace(plan.config.data, subjects=(1,))))
    subject, fit = plan.subjects[0], Fit("conv", "clip_text")
    assert plan.fits == [Fit("ridge", "vdvae"), fit] and plan.token_fit("ridge", "clip_text") == fit
    fit_network([subject], fit, LocalContext())
    run.predict_test_sets(plan)
    data = plan.predictions(fit).read(subject.folder, subject.parts("test")[0].name)
    predicted = np.stack([view_column(data, name) for name in plan.columns("clip_text")], 1)
    decoder = network_of(plan, fit, subject)
    expected = np.stack(decoder.predict(read_samples(subject, "test")[1]), 1)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (12, len(plan.columns("clip_text")), *plan.shapes("clip_text")[0]) and expected.std(0).max() > 0
    with pytest.raises(ValueError, match="predicts clip_text tokens, not pictures"):
        decoder.vdvae  # noqa: B018
    run.reconstruct_test_sets(plan)
    assert not plan.stage2("ridge").missing(*subject.pictures("ridge"))
    ridge = Plan(replace(plan.config, token_model="ridge"))
    assert plan.stage1("ridge").hash == ridge.stage1("ridge").hash
    assert plan.stage2("ridge").hash != ridge.stage2("ridge").hash


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """How often a worker has begun to fit."""
    def counted(arguments):
        with open(tmp_path / "starts", "a") as file:
            file.write("x")
        return real(arguments)

    real = train.train_worker
    monkeypatch.setattr(train, "train_worker", counted)
    return lambda: len((tmp_path / "starts").read_text())


def test_a_training_that_diverges_says_so_once(finished, tmp_path, starts):
    plan = with_network(of_workers(finished, 1), "mlp", learning_rate=1e30, warmup_epochs=0)
    tracker = start_tracker(Store(str(tmp_path)))
    with pytest.raises(DivergedError, match=r"mlp-3, subject 1: training diverged in epoch 0: .* below 1e\+30"):
        train_networks(plan.subjects, Fit("mlp", "vdvae"), tracker)
    assert starts() == 1


def test_what_only_the_user_can_mend_is_not_tried_again(finished, tmp_path, starts):
    """With one worker and with two, none of which waits for the other."""
    tracker = start_tracker(Store(str(tmp_path)))
    plan = with_network(of_workers(finished, 2), "mlp", hidden=1_000_000)
    with pytest.raises(TooLargeError, match="mlp-3, subject 1: this network is too large: training its 1,00"):
        train_networks(plan.subjects, Fit("mlp", "vdvae"), tracker)
    assert starts() == 2
    other = with_network(of_workers(finished, 1), "gru", hidden=6)
    fit_network(other.subjects, Fit("gru", "vdvae"), LocalContext())
    base = f"{other.store.base}/{other.model(Fit('gru', 'vdvae')).folder}/{other.subjects[0].folder}"
    plan = with_network(of_workers(finished, 1), "gru", hidden=8, pretrained=base)
    with pytest.raises(ValueError, match="gru-3, subject 1: .* cannot be fine-tuned to this: its network is"):
        train_networks(plan.subjects, Fit("gru", "vdvae"), tracker)
    assert starts() == 3


class Worker(LocalContext):
    """One of two, each a thread."""

    def __init__(self, rank, slots, barrier):
        super().__init__(rank=rank, world_size=2)
        self.slots, self.barrier = slots, barrier

    def sum(self, values):
        self.slots[self.rank] = values
        self.barrier.wait()
        return sum(self.slots)


def test_workers_agree_whether_they_can_start():
    slots, barrier = [None, None], threading.Barrier(2, timeout=30)

    def work(rank):
        if rank == 1:
            raise ValueError("this file is damaged")

    def ask(rank):
        with pytest.raises(ValueError) as caught:
            train.agreed(Worker(rank, slots, barrier), lambda: work(rank))
        return str(caught.value)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(ask, range(2)))
    assert found == ["training worker 2 of 2 could not start; its log says why", "this file is damaged"]
    assert train.agreed(LocalContext(), lambda: 5) == 5


def test_memory_is_that_of_the_worker_who_has_least(monkeypatch):
    free, slots, barrier = iter((7e9, 5e9)), [None, None], threading.Barrier(2, timeout=30)
    monkeypatch.setattr(train, "free_memory", lambda device: next(free))
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda rank: train.least_memory(Worker(rank, slots, barrier)), range(2)))
    assert found == [5e9, 5e9]


def test_a_network_too_large_is_refused_before_training(finished):
    plan = with_network(finished, "mlp", hidden=1_000_000)
    with pytest.raises(ValueError, match=r"too large: training its 1,00\d,\d{3},\d{3},\d{3} parameters takes 2\d{4}\.\d GB"):
        fit_network(plan.subjects[:1], Fit("mlp", "vdvae"), LocalContext())
