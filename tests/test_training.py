"""The loop: it learns, resumes to the bit, keeps the best epoch, and several workers take one worker's steps."""
from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

from nsdray.regressors.gru import GRURegressor
from nsdray.training import (
    DivergedError,
    LocalContext,
    TargetScale,
    _validate,
    count_parameters,
    free_memory,
    learning_rate_at,
    memory_batches,
    predict,
    require_memory,
    train,
)

SETTINGS = dict(
    n_epochs=6, learning_rate=0.01, weight_decay=0.0, patience=20, warmup_epochs=1, clip_norm=1.0, seed=3
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors this small, waiting for a second thread on a busy core costs more than all the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data() -> dict:
    generator = torch.Generator().manual_seed(0)
    betas = torch.randn(230, 12, generator=generator)
    weights = torch.randn(12, 5, generator=generator) * torch.tensor([1, 10, 0.1, 1, 0])  # the last target is constant
    targets = betas @ weights + torch.tensor([0.0, 50, 0, -3, 2])
    mean, std = targets[:180].mean(0), targets[:180].std(0)
    return dict(train=(betas[:180], targets[:180]), validation=(betas[180:], targets[180:]), mean=mean, std=std)


def fit(model: nn.Module, data: dict, context=None, **settings) -> dict:
    context = context or LocalContext()
    batches = memory_batches(*data["train"], 32, 3, context.rank, context.world_size)
    validation = tuple(share[context.rank :: context.world_size] for share in data["validation"])
    moments = dict(target_mean=data["mean"], target_std=data["std"])
    return train(model, batches, validation, context, **{**SETTINGS, **moments, **settings})


def gru() -> GRURegressor:
    torch.manual_seed(1)
    return GRURegressor(12, 5, hidden=8, dropout=0.3)


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(12, 5)


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def without_times(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in metrics.items() if k != "samples_per_s"} for metrics in history]


def test_learns_a_linear_map(data):
    model = linear()
    result = fit(model, data, n_epochs=40, learning_rate=0.05)
    model.load_state_dict(result["state"])
    betas, targets = data["validation"]
    prediction = predict(model, betas, data["mean"], data["std"])
    assert (prediction - targets).square().mean() < 1e-3 * targets.var(0).mean()
    assert torch.equal(prediction[:, 4], data["mean"][4].expand(50))  # a constant target is its mean
    best = result["history"][result["best_epoch"]]
    assert best["val_mse"] == pytest.approx((prediction - targets).square().mean().item(), rel=1e-5)
    assert best["val_mae"] == pytest.approx((prediction - targets).abs().mean().item(), rel=1e-5)
    alive = (prediction - targets)[:, :4] / data["std"][:4]
    assert best["val_loss"] == pytest.approx(alive.square().mean().item(), rel=1e-4)


class Interrupted(LocalContext):
    """Dies in the report of one epoch, after or before its checkpoint is written."""

    at, after = 0, True

    def report(self, metrics, checkpoint):
        if metrics["epoch"] == self.at and not self.after:
            raise KeyboardInterrupt
        super().report(metrics, checkpoint)
        if metrics["epoch"] == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after, checkpoint_every", [(True, 1), (False, 1), (True, 2)])
def test_resumed_is_bit_identical_to_undisturbed(data, tmp_path, after, checkpoint_every):
    whole = fit(gru(), data)
    context = Interrupted(checkpoint=tmp_path / "run.pt")
    context.at, context.after = 2, after
    with pytest.raises(KeyboardInterrupt):
        fit(gru(), data, context, checkpoint_every=checkpoint_every)
    torch.manual_seed(99)
    resumed = fit(GRURegressor(12, 5, hidden=8, dropout=0.3), data, LocalContext(checkpoint=tmp_path / "run.pt"))
    assert without_times(resumed["history"]) == without_times(whole["history"])
    assert_same(resumed["state"], whole["state"])
    again = LocalContext(checkpoint=tmp_path / "run.pt")
    assert_same(fit(gru(), data, again)["state"], whole["state"])
    assert again.history == []  # a finished run trains no more
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_early_stopping_keeps_the_best_epoch(data):
    """A rate that is far too high from the third epoch on makes validation worse."""
    states = []

    class Spy(LocalContext):
        def report(self, metrics, checkpoint):
            super().report(metrics, checkpoint)
            states.append({k: v.clone() for k, v in checkpoint["model"].items()})

    train_betas, train_targets = data["train"]

    def batches(epoch):
        noise = 0 if epoch < 3 else 40.0
        for betas, targets, n in memory_batches(train_betas, train_targets, 32, 3)(epoch):
            yield betas, targets + noise * data["std"], n

    settings = {**SETTINGS, "patience": 2, "n_epochs": 30, "learning_rate": 0.05, "target_mean": data["mean"]}
    context = Spy()
    result = train(linear(), batches, data["validation"], context, target_std=data["std"], **settings)
    losses = [metrics["val_loss"] for metrics in context.history]
    assert result["best_epoch"] == int(np.argmin(losses)) == 2
    assert len(losses) == 5  # the best and two worse ones
    assert_same(result["state"], states[2])


class Team:
    """What two workers share."""

    def __init__(self, size: int):
        self.slots, self.barrier = [None] * size, threading.Barrier(size, timeout=30)


class ThreadContext(LocalContext):
    """One of several workers, each a thread; gradients are averaged over them as DDP does."""

    team: Team

    def sum(self, values):
        self.team.slots[self.rank] = values
        self.team.barrier.wait()
        total = torch.stack(self.team.slots).sum(0)
        self.team.barrier.wait()
        return total

    def prepare(self, model):
        def average(parameter):
            parameter.grad = self.sum(parameter.grad) / self.world_size

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(average)
        return model


def test_two_unequal_workers_take_the_steps_of_one(data):
    """180 rows in batches of 30: 15 and 15; 175 rows: 29 or 30, so shares are unequal."""
    data["train"] = tuple(part[:175] for part in data["train"])
    alone = fit(linear(), data)
    team, results = Team(2), {}
    models = [linear(), linear()]

    def work(rank):
        context = ThreadContext(rank=rank, world_size=2)
        context.team = team
        results[rank] = fit(models[rank], data, context)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(results[0]["state"], results[1]["state"])
    for name, value in alone["state"].items():
        torch.testing.assert_close(results[0]["state"][name], value, rtol=1e-4, atol=1e-5)
    for ours, reference in zip(results[0]["history"], alone["history"]):
        for name in ("train_loss", "val_loss", "val_mse", "val_mae"):
            assert ours[name] == pytest.approx(reference[name], rel=1e-4)


def test_batches_drop_nothing_and_depend_on_seed_and_epoch_only():
    rows = torch.arange(101)[:, None]
    batches = memory_batches(rows, rows, 10, seed=0)
    first, again, second = ([b.flatten().tolist() for b, _, _ in batches(epoch)] for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(101))
    assert len(first) == 11 and {len(batch) for batch in first} == {9, 10}
    shares = [[(b.flatten().tolist(), n) for b, _, n in memory_batches(rows, rows, 10, 0, r, 2)(0)] for r in range(2)]
    assert [sorted(a + b) for (a, _), (b, _) in zip(*shares)] == [sorted(batch) for batch in first]
    assert all(n == len(a) + len(b) for (a, n), (b, _) in zip(*shares))
    assert [len(b) for b, _, _ in memory_batches(rows[:3], rows[:3], 2, 0)(0)] == [3]  # no batch of one row


def test_predict_does_not_depend_on_the_batch(data):
    model = gru().train()
    betas, moments = data["train"][0], (data["mean"], data["std"])
    whole = predict(model, betas, *moments)
    for batch_size in (1, 7, 64):
        torch.testing.assert_close(predict(model, betas.numpy(), *moments, batch_size), whole, rtol=1e-5, atol=1e-5)
    assert model.training and whole.dtype == torch.float32


def test_validation_data_do_not_move_the_weights(data):
    before = fit(linear(), data, checkpoint_every=99)["history"]
    data["validation"] = tuple(part * 1.5 for part in data["validation"])
    after = fit(linear(), data)["history"]
    assert [m["train_loss"] for m in before] == [m["train_loss"] for m in after]
    assert before[0]["val_loss"] != after[0]["val_loss"]


def test_learning_rate_rises_then_falls():
    rates = [learning_rate_at(e, learning_rate=1.0, warmup_epochs=3, n_epochs=13) for e in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.5) and all(np.diff(rates[3:]) < 0) and rates[-1] > 0


def test_rates_of_single_parameters(data):
    """One epoch of a network of two layers, the first of them frozen or slow; AdamW's first steps are as long as its rate."""

    def moved(rate_factor) -> dict[str, float]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = fit(model, data, n_epochs=1, rate_factor=rate_factor)["state"]
        return {name: (value - before[name]).abs().max().item() for name, value in state.items()}

    def slow(factor):
        return lambda name: factor if name.startswith("0.") else 1.0

    frozen, tenth, free = moved(slow(0.0)), moved(slow(0.1)), moved(None)
    assert moved(slow(1.0)) == free
    assert frozen["0.weight"] == frozen["0.bias"] == 0 < min(frozen["2.weight"], free["0.weight"])
    assert tenth["0.weight"] == pytest.approx(0.1 * free["0.weight"], rel=0.3)
    assert tenth["2.weight"] == pytest.approx(free["2.weight"], rel=0.3)


def test_memory_is_asked_for_before_it_is_taken():
    # the paper's GRU: 12,400,344 parameters x 20 bytes, 886 validation images, 128 rows of 15,724 betas and 4 x 13,344 targets
    assert count_parameters(lambda: GRURegressor(15_724, 13_344)) == 12_400_344
    needed = 12_400_344 * 20 + 886 * 4 * (15_724 + 13_344) + 128 * 4 * (15_724 + 4 * 13_344)
    assert require_memory(12_400_344, 15_724, 13_344, 128, 886, free=needed) == needed
    message = r"its 12,400,344 parameters takes 0\.2 GB, a batch of 128 another 0\.0 GB, 886 validation images 0\.1 GB, and 0\.1"
    with pytest.raises(ValueError, match=message):
        require_memory(12_400_344, 15_724, 13_344, 128, 886, free=needed - 250_000_000)
    # with few rows a step it is validation that counts: 7 float32 of 64 rows
    assert require_memory(0, 0, 100, 8, 100, free=2**40) == 4 * 100 * 100 + 4 * 7 * 64 * 100
    assert 2**28 < free_memory(torch.device("cpu")) < 2**46


def test_validation_keeps_no_more_than_its_estimate():
    """Peak of what one pass allocates, against the seven float32 of 64 rows that `require_memory` counts."""
    n_targets, rows = 5000, 640
    scale = TargetScale(np.zeros(n_targets), np.ones(n_targets), torch.device("cpu"))
    model, validation = nn.Linear(3, n_targets), (torch.randn(rows, 3), torch.randn(rows, n_targets))
    with torch.profiler.profile(profile_memory=True) as profile:
        _validate(model, validation, LocalContext(), scale)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    alive = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
    assert 5 * 64 * 4 * n_targets < alive.max() <= 7.1 * 64 * 4 * n_targets


def test_arrays_serve_as_well_as_tensors(data):
    batches = [memory_batches(*pair, 32, 3)(0) for pair in (data["train"], tuple(x.numpy() for x in data["train"]))]
    for (a, b, n), (c, d, m) in zip(*batches, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d) and n == m


def test_errors(data):
    with pytest.raises(ValueError, match="patience is 0, must be at least 1"):
        fit(linear(), data, patience=0)
    with pytest.raises(DivergedError, match="training diverged in epoch 0.*Try a learning_rate below"):
        fit(linear(), {**data, "train": (data["train"][0] * torch.nan, data["train"][1])})
    with pytest.raises(ValueError, match="no validation samples"):
        fit(linear(), {**data, "validation": tuple(part[:0] for part in data["validation"])})
    with pytest.raises(ValueError, match="validation has 50 rows of betas, 49 of targets"):
        fit(linear(), {**data, "validation": (data["validation"][0], data["validation"][1][1:])})
    with pytest.raises(ValueError, match="without a single batch"):
        settings = {**SETTINGS, "target_mean": data["mean"], "target_std": data["std"]}
        train(linear(), lambda epoch: [], data["validation"], LocalContext(), **settings)
    with pytest.raises(ValueError, match="some target must vary"):
        TargetScale(np.zeros(3), np.zeros(3), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"target_mean \(3,\) and target_std \(4,\)"):
        TargetScale(np.zeros(3), np.ones(4), torch.device("cpu"))
    with pytest.raises(ValueError, match="10 rows of betas, 9 of targets"):
        memory_batches(torch.zeros(10, 2), torch.zeros(9, 2), 4, 0)
