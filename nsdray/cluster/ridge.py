"""Ridge on Ray: one factorisation a subject, shared through the object store; one task a layer."""
from __future__ import annotations

import numpy as np
import ray
from safetensors.numpy import save

from nsdray.cluster.data import read_samples, read_targets
from nsdray.decoder import DecoderCard, Scaling, card_bytes
from nsdray.regressors.ridge import RidgeFactor, factorise
from nsdray.regressors.scaling import moments, zscore
from nsdray.seeds import rng
from nsdray.stages import VDVAE_CONFIGS, SubjectPlan, layer_name


def decoder_card(subject: SubjectPlan, model: str, rescale: str, network: dict) -> DecoderCard:
    """What decoder.json will say."""
    plan = subject.plan
    vdvae = plan.config.targets.vdvae
    shapes = [list(shape) for shape in VDVAE_CONFIGS[vdvae]().layer_shapes[: plan.config.n_layers]]
    return DecoderCard(subject.subject, model, shapes, rescale, vdvae, plan.vdvae_sha256, plan.is_simulated, network)


@ray.remote(num_cpus=1, num_returns=3)
def factorise_subject(subject: SubjectPlan) -> tuple[RidgeFactor, np.ndarray, dict[str, np.ndarray]]:
    """z-score the training betas and factorise: the factor, the leave-one-out smoother of a seeded sample of about as many
    training images as there are test images, and the scaling of the betas."""
    _, betas = read_samples(subject, "train")
    mean, std = moments(betas)
    factor = factorise(zscore(betas, mean, std), subject.plan.config.ridge.alpha)
    n_held_out = min(len(betas), max(2, len(subject.image_ids("test"))))
    rows = np.sort(rng(subject.plan.config.seed, "leave-one-out", subject.subject).permutation(len(betas))[:n_held_out])
    return factor, factor.leave_one_out_smoother(rows), {"betas_mean": mean, "betas_std": std}


@ray.remote(num_cpus=1)
def fit_layer(subject: SubjectPlan, factor: RidgeFactor, leave_one_out: np.ndarray, layer: int) -> dict[str, np.ndarray]:
    """Fit one layer, write its weights, and return the moments of latents and of leave-one-out predictions."""
    plan, stage = subject.plan, subject.plan.model("ridge")
    targets = read_targets(subject, "train", [layer_name(layer)]).astype(np.float32)
    weights, intercept = factor.weights(targets)
    plan.store.write_bytes(
        f"{stage.folder}/{subject.folder}/ridge_{layer_name(layer)}.safetensors",
        save({"weights": weights, "intercept": intercept}),
    )
    centred, mean = factor.centre(targets)
    latents_mean, latents_std = moments(targets)
    predictions_mean, predictions_std = moments(leave_one_out @ centred + mean)
    return {"latents_mean": latents_mean, "latents_std": latents_std, "predictions_mean": predictions_mean,
            "predictions_std": predictions_std}  # fmt: skip


@ray.remote(num_cpus=0)
def write_decoder(subject: SubjectPlan, betas_scaling: dict[str, np.ndarray], *layers: dict[str, np.ndarray]) -> None:
    """Write what is left of the decoder's folder, and mark it as finished."""
    scaling = Scaling(
        voxel_index=subject.voxels.index,
        **betas_scaling,
        **{name: np.concatenate([layer[name] for layer in layers]) for name in layers[0]},
    )
    finish_decoder(subject, decoder_card(subject, "ridge", subject.plan.config.ridge.rescale, {}), scaling)


def finish_decoder(subject: SubjectPlan, card: DecoderCard, scaling: Scaling) -> None:
    """Write scaling.safetensors and decoder.json, and mark the subject's model as finished."""
    stage, store = subject.plan.model(card.regressor), subject.plan.store
    folder = f"{stage.folder}/{subject.folder}"
    store.write_bytes(f"{folder}/scaling.safetensors", scaling.to_bytes())
    store.write_bytes(f"{folder}/decoder.json", card_bytes(card))
    files = [name for name in store.sizes(folder) if name.endswith((".safetensors", ".json"))]
    stage.finish(subject.folder, {name: subject.inputs for name in files})


def fit_ridge(subject: SubjectPlan) -> ray.ObjectRef:
    """Start fitting a subject's ridge; the reference resolves when its folder is finished."""
    shared = ray.put(subject)
    factor, leave_one_out, scaling = factorise_subject.remote(shared)
    layers = [fit_layer.remote(shared, factor, leave_one_out, i) for i in range(subject.plan.config.n_layers)]
    return write_decoder.remote(shared, scaling, *layers)
