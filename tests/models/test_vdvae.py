"""The VDVAE against OpenAI's reference implementation, and its own promises.

`golden/vdvae_small.npz` holds what openai/vdvae@ea35b490313bc33e7f8ac63dd8132f3cc1a729b4 (vae.py, vae_helpers.py)
computes on the CPU in fp32 with torch 2.15 for the configuration SMALL, whose weights are all random, with given noise
in place of its unseeded draws. Weights and noise come from NumPy's RandomState, whose stream is frozen. Made by

    git clone https://github.com/openai/vdvae && python tests/models/test_vdvae.py vdvae

The full size is compared by hand: `python tests/models/test_vdvae.py vdvae --full`.
The state dict is loaded strictly into both, which also fixes the checkpoint's key names.
"""
from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nsdray.models import vdvae
from nsdray.models.vdvae import VDVAE, DecoderBlock, VDVAEConfig, load_vdvae
from nsdray.seeds import image_seeds
from nsdray.targets.vdvae_latents import vdvae_latents

GOLDEN = Path(__file__).parents[1] / "golden" / "vdvae_small.npz"
ORIGIN = "openai/vdvae@ea35b490313bc33e7f8ac63dd8132f3cc1a729b4, made by tests/models/test_vdvae.py"
SMALL = VDVAEConfig(
    image_size=16,
    enc_blocks="16x2,16d2,8x2,8d2,4x2,4d4,1x2",
    dec_blocks="1x2,4m1,4x2,8m4,8x2,16m8,16x2",
    width=32,
    zdim=4,
    n_mixtures=5,
    no_bias_above=8,  # so that a resolution that starts from nothing is compared too
)
N_KNOWN, TEMPERATURE = 6, 0.7
"""The layers that `decode` is given, and the factor on the prior's spread of one of its two comparisons."""


def randomise(model: VDVAE, gain: float = 0.9) -> VDVAE:
    """Give every tensor random values: weights gain / sqrt(fan-in), the others 0.2 (around 1 for the gain).

    The output layer's are smaller and its log-scales around -3, so that few pixels saturate.
    """
    random, state = np.random.RandomState(0), model.state_dict()
    for name in sorted(state):
        shape = state[name].shape
        spread = gain / math.sqrt(math.prod(shape[1:])) if name.endswith("weight") else 0.2
        values = random.standard_normal(shape) * spread + (name == "decoder.gain")
        state[name] = torch.from_numpy(values.astype(np.float32))
    state["decoder.out_net.out_conv.weight"] *= 0.1
    k = model.config.n_mixtures
    state["decoder.out_net.out_conv.bias"][k:].view(3, 3, k)[:, 1] -= 3
    model.load_state_dict(state)
    return model.eval()


def make_inputs(config: VDVAEConfig, n: int) -> SimpleNamespace:
    """Pictures (n, s, s, 3) uint8 and all the draws: Gaussian ones per layer, uniform ones inside (0, 1)."""
    random, size = np.random.RandomState(1), config.image_size

    def normal() -> list[torch.Tensor]:
        return [torch.from_numpy(random.standard_normal((n, *s)).astype(np.float32)) for s in config.layer_shapes]

    def uniform(last: int) -> torch.Tensor:
        return torch.from_numpy(random.random_sample((n, size, size, last)).astype(np.float32))

    images = random.randint(0, 256, (n, size, size, 3)).astype(np.uint8)
    return SimpleNamespace(
        images=images, posterior=normal(), prior=normal(), mixture=uniform(config.n_mixtures), logistic=uniform(3)
    )


def reference_outputs(checkout: Path, config: VDVAEConfig, n: int, gain: float = 0.9) -> dict[str, np.ndarray]:
    """Run the reference implementation; its draws are replaced by `make_inputs`'s."""
    sys.path.insert(0, str(checkout))
    import vae
    import vae_helpers

    inputs, posteriors, kls = make_inputs(config, n), [], []
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    model = vae.VAE(SimpleNamespace(
        **settings, num_mixtures=config.n_mixtures, custom_width_str="", image_channels=3, dataset="imagenet64"
    ))  # fmt: skip
    ours = randomise(VDVAE(config), gain)
    model.load_state_dict(ours.state_dict(), strict=True)
    draws = SimpleNamespace(normal=iter(()), uniform=iter(()))

    def gaussian(mean, log_std):
        posteriors.append((mean, log_std))
        return mean + log_std.exp() * next(draws.normal)

    def uniform(tensor, low, high):
        return tensor.copy_(low + (high - low) * next(draws.uniform))

    vae.draw_gaussian_diag_samples = gaussian
    kl = vae.gaussian_analytical_kl
    vae.gaussian_analytical_kl = lambda *a: kls.append(kl(*a).sum((1, 2, 3))) or kl(*a)
    pixels = torch.from_numpy(inputs.images).float()
    encoder_input = (pixels - config.pixel_mean) / config.pixel_std
    out = {}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", uniform)
        draws.normal = iter(inputs.posterior)
        latents = [stats["z"] for stats in model.forward_get_latents(encoder_input)]
        for i, (mean, log_std) in enumerate(posteriors):
            out |= {f"mean_{i}": mean, f"log_std_{i}": log_std, f"latents_{i}": latents[i]}
        draws.normal = iter(inputs.posterior)
        kls.clear()
        out["distortion"] = model(encoder_input, (pixels - 127.5) / 127.5)["distortion"]
        out["kl"] = torch.stack(kls, 1)
        for name, t in {"": None, "_cool": TEMPERATURE}.items():
            draws.normal, draws.uniform = iter(inputs.prior[N_KNOWN:]), iter([inputs.mixture, inputs.logistic])
            features = model.decoder.forward_manual_latents(n, latents[:N_KNOWN], t=t)
            mixture = model.decoder.out_net(features)
            sampled = vae_helpers.sample_from_discretized_mix_logistic(mixture, config.n_mixtures)
            out[f"pixels{name}"] = sampled.permute(0, 3, 1, 2)
            out |= {} if name else {"mixture": mixture.permute(0, 3, 1, 2)}
    return {name: value.numpy() for name, value in out.items()}


def our_outputs(
    config: VDVAEConfig, n: int, patch: pytest.MonkeyPatch, gain: float = 0.9, layout: torch.memory_format = torch.channels_last
) -> dict[str, np.ndarray]:
    """The same quantities from nsdray's VDVAE, under the same names, and decode's uint8 pictures. layout: of the weights, by
    default as `load_vdvae` has them."""
    model, inputs, posteriors = randomise(VDVAE(config), gain).to(memory_format=layout), make_inputs(config, n), []
    posterior, out_net = DecoderBlock.posterior, model.decoder.out_net

    def record(block, *args):
        posteriors.append(posterior(block, *args))
        return posteriors[-1]

    def given(seeds, purpose, shape):
        name, _, layer = purpose.partition("/")
        values = getattr(inputs, name)[int(layer)] if layer else getattr(inputs, name)
        assert values.shape == (len(seeds), *shape)
        return values

    patch.setattr(DecoderBlock, "posterior", record)
    patch.setattr(vdvae.draws, "normal", given)
    patch.setattr(vdvae.draws, "uniform", given)
    pixels_of = out_net.pixels
    patch.setattr(out_net, "pixels", lambda *args: seen.update(features=args[0], x=pixels_of(*args)) or seen["x"])
    seen, out = {}, {}
    images, seeds = torch.from_numpy(inputs.images).permute(0, 3, 1, 2) / 255, list(range(n))
    latents = model.encode(images, seeds=seeds)
    for i, (mean, log_std) in enumerate(posteriors):
        out |= {f"mean_{i}": mean, f"log_std_{i}": log_std, f"latents_{i}": latents[i]}
    for name, temperature in {"_cool": TEMPERATURE, "": 1.0}.items():
        out[f"uint8{name}"] = model.decode(latents[:N_KNOWN], seeds, temperature)
        out[f"pixels{name}"] = seen["x"]
    with torch.no_grad():
        noise = iter(inputs.posterior)
        patch.setattr(torch, "randn_like", lambda _: next(noise))
        likelihood, out["kl"] = model.elbo(images)
        out["distortion"] = -likelihood.mean() / images[0].numel()
        out["mixture"] = out_net.out_conv(seen["features"])
    return {name: value.numpy() for name, value in out.items()}


def compare(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest difference of every tensor as a fraction of the reference's largest value."""
    assert set(reference) <= set(ours)
    assert all(ours[name].shape == value.shape for name, value in reference.items())
    return {name: float(np.abs(ours[name] - value).max() / np.abs(value).max()) for name, value in reference.items()}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors this small, waiting for a second thread on a busy core costs more than all the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_agrees_with_the_reference(monkeypatch, layout):
    with np.load(GOLDEN) as file:
        golden = dict(file)
    assert str(golden.pop("origin")) == ORIGIN
    ours = our_outputs(SMALL, 2, monkeypatch, layout=layout)
    differences = compare(ours, golden)
    assert len(differences) == 3 * len(SMALL.layer_shapes) + 5
    assert all(d <= 1e-4 for d in differences.values()), {k: v for k, v in differences.items() if not v <= 1e-4}
    for name in ("", "_cool"):  # the reference truncates too
        expected = ((golden[f"pixels{name}"] + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        difference = np.abs(ours[f"uint8{name}"].astype(int) - expected)
        assert difference.max() <= 1 and (difference == 0).mean() > 0.99
        assert expected.std() > 20  # the comparison is of pictures, not of clipped grey


@pytest.fixture(scope="module")
def model() -> VDVAE:
    return randomise(VDVAE(SMALL))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(make_inputs(SMALL, 8).images).permute(0, 3, 1, 2) / 255


SEEDS = image_seeds(0, range(100, 108))


def test_imagenet64_has_the_size_of_the_checkpoint():
    with torch.device("meta"):
        model = VDVAE(VDVAEConfig.imagenet64())
    assert sum(p.numel() for p in model.parameters()) == 125_005_860
    assert len(model.state_dict()) == 2_482
    assert {"encoder.enc_blocks.64.c4.bias", "decoder.dec_blocks.74.z_proj.weight", "decoder.bias_xs.5"} <= set(
        model.state_dict()
    )


@pytest.mark.parametrize("n_layers, expected", [(15, 13_344), (31, 91_168), (75, 1_451_040)])
def test_number_of_latents(n_layers, expected):
    config = VDVAEConfig.imagenet64()
    assert len(config.layer_shapes) == 75
    assert config.n_latents(n_layers) == expected
    assert n_layers == 75 or VDVAEConfig.mini().n_latents(n_layers) == expected


@pytest.mark.parametrize("latents", ["sample", "mean"])
def test_early_exit_equals_the_full_pass(model, images, latents):
    whole = model.encode(images, latents=latents, seeds=SEEDS)
    assert [z.shape for z in whole] == [(8, *shape) for shape in SMALL.layer_shapes]
    for n_layers in (1, 4, len(whole)):
        part = model.encode(images, n_layers, latents, SEEDS)
        assert len(part) == n_layers
        assert all(torch.equal(a, b) for a, b in zip(part, whole))


def test_batches_agree(model, images):
    whole = model.encode(images, seeds=SEEDS)
    pictures = model.decode(whole[:4], SEEDS)
    for size in (1, 3):
        chunks = [slice(i, i + size) for i in range(0, 8, size)]
        parts = [model.encode(images[c], seeds=SEEDS[c]) for c in chunks]
        for layer, expected in enumerate(whole):
            difference = (torch.cat([part[layer] for part in parts]) - expected).abs().max()
            assert difference <= 1e-4 * expected.abs().max()
        decoded = torch.cat([model.decode([z[c] for z in whole[:4]], SEEDS[c]) for c in chunks])
        assert ((decoded.int() - pictures.int()).abs() <= 1).float().mean() >= 0.999


def test_seeds_belong_to_images(model, images):
    latents = model.encode(images, seeds=SEEDS)
    again = model.encode(images, seeds=SEEDS)
    assert all(torch.equal(a, b) for a, b in zip(latents, again))
    pictures = model.decode(latents[:4], SEEDS)
    assert pictures.shape == (8, 16, 16, 3) and pictures.dtype == torch.uint8
    assert torch.equal(pictures, model.decode(latents[:4], SEEDS))
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    seeds = [SEEDS[i] for i in order]
    permuted = model.encode(images[order], seeds=seeds)
    for a, b in zip(permuted, latents):
        torch.testing.assert_close(a, b[order], rtol=1e-4, atol=1e-4)
    decoded = model.decode([z[order] for z in latents[:4]], seeds)
    assert ((decoded.int() - pictures[order].int()).abs() <= 1).float().mean() >= 0.999
    other = image_seeds(1, range(100, 108))
    assert not torch.equal(model.encode(images, 1, seeds=other)[0], latents[0])
    assert not torch.equal(model.decode(latents[:4], other), pictures)


def test_deterministic_decoding_needs_no_seeds(model, images):
    means = model.encode(images, 4, "mean")
    pictures = model.decode(means, deterministic=True)
    assert torch.equal(pictures, model.decode(means, SEEDS, deterministic=True))
    assert not torch.equal(pictures, model.decode(means, SEEDS))


def test_elbo_of_some_posterior_layers(model, images):
    with torch.no_grad():
        likelihood, rates = model.elbo(images, n_posterior_layers=4)
    assert likelihood.shape == (8,) and rates.shape == (8, 4)
    assert (rates >= 0).all() and (likelihood < 0).all()


def test_errors_of_the_configuration():
    good = dict(image_size=4, enc_blocks="4x1", dec_blocks="1,4m1", width=8)
    VDVAEConfig(**good)
    for name in ("image_size", "width", "zdim", "n_mixtures"):
        with pytest.raises(ValueError, match=f"VDVAEConfig.{name} is 0, must be at least 1"):
            VDVAEConfig(**{**good, name: 0})
    for wrong in ({"enc_blocks": "4y2"}, {"dec_blocks": ""}, {"dec_blocks": "1x2,4q1"}):
        with pytest.raises(ValueError, match="cannot read block strings"):
            VDVAEConfig(**{**good, **wrong})
    with pytest.raises(ValueError, match="starts at 4 and the decoder ends at 8 pixels, but image_size is 4"):
        VDVAEConfig(**{**good, "dec_blocks": "1,8m1"})
    for n_layers in (0, 3):
        with pytest.raises(ValueError, match=rf"n_layers is {n_layers}; this VDVAE has layers 1\.\.2"):
            VDVAEConfig(**good).n_latents(n_layers)


def test_errors_of_encode_and_decode(model, images):
    with pytest.raises(ValueError, match=r"images have shape \(8, 3, 16, 8\), this VDVAE wants \(n, 3, 16, 16\)"):
        model.encode(images[..., :8], seeds=SEEDS)
    with pytest.raises(ValueError, match="latents is 'median', must be 'sample' or 'mean'"):
        model.encode(images, latents="median")
    with pytest.raises(ValueError, match="8 images, no seeds"):
        model.encode(images)
    with pytest.raises(ValueError, match="8 images, 7 seeds"):
        model.encode(images, seeds=SEEDS[:7])
    with pytest.raises(ValueError, match="n_layers is 12"):
        model.encode(images, 12, seeds=SEEDS)
    latents = model.encode(images, seeds=SEEDS)
    for wrong in ([], [*latents, latents[-1]]):
        with pytest.raises(ValueError, match=rf"decode got {len(wrong)} layers of latents; this VDVAE has 1..11"):
            model.decode(wrong, SEEDS)
    with pytest.raises(ValueError, match=r"latents of layer 1 have shape \(8, 4, 4, 4\), expected \(8, 4, 1, 1\)"):
        model.decode([latents[0], latents[2]], SEEDS)
    for seeds in (None, SEEDS[:3]):
        with pytest.raises(ValueError, match=r"one seed per image \(8\) unless deterministic=True"):
            model.decode(latents, seeds)


def test_checkpoints_load_strictly(model, tmp_path):
    config, state = model.config, model.state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "model.th")
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "model.safetensors")
    loaded, half = (load_vdvae(tmp_path / name, config).state_dict() for name in ("model.th", "model.safetensors"))
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert all(torch.equal(half[key], value.half().float()) for key, value in state.items())


def test_wrong_checkpoints_are_explained(model, tmp_path):
    config, state = model.config, model.state_dict()
    path = tmp_path / "model.th"
    torch.save({key: value for key, value in state.items() if "gain" not in key} | {"extra": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"1 missing \['decoder.gain'\], 1 unknown \['extra'\], 0 of another shape .* links"):
        load_vdvae(path, config)
    torch.save(state | {"decoder.gain": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"1 of another shape \['decoder.gain'\]"):
        load_vdvae(path, config)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as weights .* Is it whole"):
        load_vdvae(path, config)
    torch.save({"model": print}, path)  # code, not data
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_vdvae(path, config)
    with pytest.raises(FileNotFoundError):
        load_vdvae(tmp_path / "absent.th", config)


def test_bf16_latents_are_near_fp32(model):
    """Through `vdvae_latents`, in the precision that `targets.dtype` bfloat16 gives; means of the posterior."""
    pictures, ids = make_inputs(SMALL, 5).images, np.arange(5)
    exact = vdvae_latents(model, pictures, ids, 6, "mean", batch_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = vdvae_latents(model, pictures, ids, 6, "mean", batch_size=4)
    for a, b in zip(coarse, exact, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        assert a.shape == b.shape and np.isfinite(a).all()
        assert 0 < np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < 0.05


def full_size(checkout: Path) -> None:
    """Compare the ImageNet-64 architecture with the reference: random weights, one picture. Some minutes, 5 GB."""
    config = VDVAEConfig.imagenet64()
    reference = reference_outputs(checkout, config, 1, gain=0.5)
    with pytest.MonkeyPatch.context() as patch:
        differences = compare(our_outputs(config, 1, patch, gain=0.5), reference)
    worst = sorted(differences, key=differences.get, reverse=True)[:5]
    print(f"{len(differences)} tensors, largest difference as a fraction of a tensor's largest value:")
    print("\n".join(f"  {name:12s} {differences[name]:.2e}" for name in worst))
    assert all(difference <= 1e-4 for difference in differences.values())


if __name__ == "__main__":
    if "--full" in sys.argv[2:]:
        full_size(Path(sys.argv[1]))
    else:
        np.savez_compressed(GOLDEN, origin=np.array(ORIGIN), **reference_outputs(Path(sys.argv[1]), SMALL, 2))
