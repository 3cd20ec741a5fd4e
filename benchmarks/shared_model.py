"""What one model for all subjects gains over a model per subject, with all, a half and a tenth of the training images.

    python benchmarks/shared_model.py                      # miniature NSD (SIMULATED), the mini recipe's GRU
    python benchmarks/shared_model.py --network mlp --fractions 0.1

alone: a network per subject, from scratch. joint: one for all subjects, each with that fraction of its images. tuned: pretrained
on all images of the other subjects, then fine-tuned to this one with that fraction of its images (a new input layer; the trunk
at a tenth of the rate, see --trunk-rate). With fewer images there are as many more epochs, so that the steps are as many; a
network for several subjects, which has more steps an epoch, goes through half the epochs. Scores are those of the test images:
MSE of raw latents, and PixCorr of the stage-1 picture, with half the 95 % interval over images.
"""
from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
import ray  # noqa: E402

from nsdray.cluster import run  # noqa: E402
from nsdray.cluster.data import read_samples, read_targets  # noqa: E402
from nsdray.cluster.train import trunk_rate, validation_images  # noqa: E402
from nsdray.config import Config, StoreConfig  # noqa: E402
from nsdray.decoder import cut_columns  # noqa: E402
from nsdray.generators.stage1 import decode_pictures, enlarge  # noqa: E402
from nsdray.metrics.bootstrap import bootstrap, paired_difference  # noqa: E402
from nsdray.metrics.pixel import pixcorr  # noqa: E402
from nsdray.metrics.table import format_table  # noqa: E402
from nsdray.models.vdvae import load_vdvae  # noqa: E402
from nsdray.recipes import RECIPES  # noqa: E402
from nsdray.regressors import REGRESSORS  # noqa: E402
from nsdray.regressors.scaling import moments, rescale, zscore  # noqa: E402
from nsdray.regressors.shared import SharedRegressor, pack, subject_state, with_trunk  # noqa: E402
from nsdray.seeds import derive  # noqa: E402
from nsdray.stages import VDVAE_CONFIGS, Plan, SubjectPlan  # noqa: E402
from nsdray.training import LocalContext, memory_batches, predict, train  # noqa: E402


class Data(NamedTuple):
    """Some training images of a subject, and its test images; betas are z-scored by what is fitted to."""

    betas: torch.Tensor
    targets: torch.Tensor
    val_betas: torch.Tensor
    val_targets: torch.Tensor
    test_betas: torch.Tensor
    test_targets: np.ndarray


class Fitted(NamedTuple):
    """A subject's plain network: its state, and the moments that its outputs are standardised by."""

    state: dict[str, torch.Tensor]
    mean: np.ndarray
    std: np.ndarray


def load(subject: SubjectPlan, fraction: float, settings: dict) -> Data:
    """The images with the smallest hash; of these, some are kept for validation as in the pipeline."""
    columns, seed = subject.plan.columns("vdvae"), subject.plan.config.seed
    (image_ids, betas), targets = read_samples(subject, "train"), read_targets(subject, "train", columns)
    held_out = np.isin(image_ids, validation_images(subject, settings["validation_fraction"]))
    chosen = []
    for rows in (np.flatnonzero(~held_out), np.flatnonzero(held_out)):
        order = np.argsort([derive(seed, "fraction", int(image_ids[row])) for row in rows], kind="stable")
        chosen.append(np.sort(rows[order[: max(2, round(fraction * len(rows)))]]))
    scale = moments(betas[chosen[0]])
    scaled = [torch.from_numpy(zscore(x, *scale)) for x in (*(betas[rows] for rows in chosen), read_samples(subject, "test")[1])]
    fit, val = (torch.from_numpy(targets[rows]) for rows in chosen)
    return Data(scaled[0], fit, scaled[1], val, scaled[2], read_targets(subject, "test", columns))


def fit(network: torch.nn.Module, betas: list, targets: list, moments_: tuple, settings: dict, epochs_factor: float,
        seed: int, rate_factor=None) -> dict[str, torch.Tensor]:  # fmt: skip
    """Train on (betas, targets), validate on the second of each; the best epoch's state."""
    names = ("learning_rate", "weight_decay", "warmup_epochs", "clip_norm")
    epochs = {name: round(settings[name] * epochs_factor) for name in ("n_epochs", "patience")}
    batches = memory_batches(betas[0], targets[0], settings["batch_size"], seed)
    return train(network, batches, (betas[1], targets[1]), LocalContext(), seed=seed, target_mean=moments_[0],
                 target_std=moments_[1], rate_factor=rate_factor, checkpoint_every=10**6, **epochs,
                 **{name: settings[name] for name in names})["state"]  # fmt: skip


class Study:
    """The three ways, for one kind of network."""

    def __init__(self, name: str, config: Config, rate: float):
        self.network, self.rate, self.seed = REGRESSORS[name], rate, config.seed
        self.settings, self.sizes = config.settings(name), getattr(config, name).sizes()

    def alone(self, data: Data, fraction: float, base: Fitted | None = None) -> Fitted:
        """A network for one subject, from scratch or with the trunk of a base."""
        torch.manual_seed(derive(self.seed, "initial weights"))
        network = self.network(data.betas.shape[1], data.targets.shape[1], **self.sizes)
        scale = moments(data.targets.numpy()) if base is None else (base.mean, base.std)
        rate_factor = None
        if base is not None:
            network = with_trunk(network, base.state)
            rate_factor = partial(trunk_rate, network, self.rate)
        pairs = [data.betas, data.val_betas], [data.targets, data.val_targets]
        return Fitted(fit(network, *pairs, scale, self.settings, 1 / fraction, self.seed, rate_factor), *scale)

    def joint(self, data: list[Data], fraction: float) -> list[Fitted]:
        """One network for several subjects, cut into theirs."""
        torch.manual_seed(derive(self.seed, "initial weights"))
        targets = [torch.cat([getattr(own, part) for own in data]) for part in ("targets", "val_targets")]
        network = SharedRegressor(self.network, [own.betas.shape[1] for own in data], targets[0].shape[1], **self.sizes)
        betas = [pack([getattr(own, part) for own in data]) for part in ("betas", "val_betas")]
        scale = moments(targets[0].numpy())
        state = fit(network, betas, targets, scale, self.settings, 0.5 / fraction, self.seed)
        return [Fitted(subject_state(state, place, self.network.INPUT), *scale) for place in range(len(data))]

    def scores(self, fitted: Fitted, data: Data, subject: SubjectPlan, vdvae: torch.nn.Module) -> dict[str, np.ndarray]:
        """Per test image: MSE of the raw latents, PixCorr of the stage-1 picture from the rescaled ones."""
        network = self.network(data.betas.shape[1], data.targets.shape[1], **self.sizes)
        network.load_state_dict(fitted.state)
        raw, held_out = (predict(network, x, fitted.mean, fitted.std).numpy() for x in (data.test_betas, data.val_betas))
        latents = rescale(raw, *moments(held_out), fitted.mean, fitted.std)
        layers = cut_columns(latents, subject.plan.shapes("vdvae"))
        seen = run.seen_pictures(subject)
        pictures = decode_pictures(vdvae, layers, subject.image_ids("test"), deterministic=True)
        error = np.square(raw - data.test_targets.astype(np.float32)).mean(1, dtype=np.float64)
        return {"latent MSE": error, "stage-1 PixCorr": pixcorr(seen, enlarge(pictures, seen.shape[1:3]))}


def prepared(root: str | None) -> Plan:
    """The mini recipe's plan, with betas and latents there."""
    config = RECIPES["mini"]()
    plan = Plan(replace(config, stage2=replace(config.stage2, model="none"), store=StoreConfig(root)))
    if any(map(run.anything_missing, (run.betas_partitions(plan), run.samples_partitions(plan),
                                      run.targets_partitions(plan, "vdvae")))):  # fmt: skip
        run.start_ray(plan)
        run.prepare_betas(plan)
        run.extract_targets(plan)
        ray.shutdown()
    return plan


def print_tables(scores: dict[tuple[float, str], list[dict[str, np.ndarray]]], subjects: list[SubjectPlan]) -> None:
    """Per metric a row for each fraction and way; the last columns: all less alone, paired by image."""
    for metric in ("latent MSE", "stage-1 PixCorr"):
        rows = []
        for (fraction, way), own in scores.items():
            values = np.stack([each[metric] for each in own], 1)  # (n_images, n_subjects)
            estimate, row = bootstrap(values), {"fraction": f"{fraction:g}", "way": way}
            row |= {f"{metric}/{s.subject}": float(v) for s, v in zip(subjects, values.mean(0))}
            row |= {f"{metric}/all": estimate.mean, f"{metric}/±": (estimate.high - estimate.low) / 2}
            base = np.stack([each[metric] for each in scores[fraction, "alone"]], 1)
            gain = paired_difference(values, base)
            row |= {"less alone/mean": gain.mean, "less alone/±": (gain.high - gain.low) / 2}
            rows.append(row)
        print(f"\n{format_table(rows)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=REGRESSORS, default="gru")
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.5, 0.1])
    parser.add_argument("--trunk-rate", type=float, default=0.1)
    parser.add_argument("--root", help="as --store.root of the jobs")
    arguments = parser.parse_args()
    plan = prepared(arguments.root)
    study = Study(arguments.network, plan.config, arguments.trunk_rate)
    vdvae = load_vdvae(plan.vdvae_checkpoint, VDVAE_CONFIGS[plan.config.targets.vdvae]())
    print(f"SIMULATED brain data; {arguments.network}, subjects {' '.join(str(s.subject) for s in plan.subjects)}, "
          f"{plan.config.n_layers} layers, {len(plan.subjects[0].image_ids('train'))} training images at fraction 1, "
          f"{len(plan.subjects[0].image_ids('test'))} test images")  # fmt: skip
    started = time.perf_counter()
    whole, bases = [load(subject, 1.0, study.settings) for subject in plan.subjects], []
    for place in range(len(whole)):
        bases.append(study.joint([data for other, data in enumerate(whole) if other != place], 1.0)[0])
    scores: dict[tuple[float, str], list] = {}
    for fraction in arguments.fractions:
        data = [load(subject, fraction, study.settings) for subject in plan.subjects]
        fitted = {
            "alone": [study.alone(own, fraction) for own in data],
            "joint": study.joint(data, fraction),
            "tuned": [study.alone(own, fraction, base) for own, base in zip(data, bases)],
        }
        for way, models in fitted.items():
            scores[fraction, way] = [study.scores(model, own, subject, vdvae)
                                     for model, own, subject in zip(models, data, plan.subjects)]  # fmt: skip
        print(f"  fraction {fraction:g}: {time.perf_counter() - started:.0f} s", flush=True)
    print_tables(scores, plan.subjects)


if __name__ == "__main__":
    main()
