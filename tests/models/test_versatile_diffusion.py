"""Versatile Diffusion against diffusers' own parts and against formulas written out, on a tiny model.

The tiny model is saved as the published one is: a UNet2DConditionModel, a UNetFlatConditionModel, a VAE and a DDIM
scheduler, by save_pretrained. It is read by load_versatile_diffusion, and by diffusers' own conversion to two
transformers a site, mended to ignore the argument that it chokes on. The sampler's reference is DDIM from its formula,
with the timesteps and noise levels of Brain-Diffuser's script written as numbers.
"""
from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel
from diffusers.pipelines.deprecated.versatile_diffusion.pipeline_versatile_diffusion_dual_guided import (
    VersatileDiffusionDualGuidedPipeline as Pipeline,
)
from safetensors.torch import load_file, save_file
from torch import nn

from nsdray import seeds as draws
from nsdray.models import versatile_diffusion
from nsdray.models.checkpoint import require_fit
from nsdray.models.versatile_diffusion import (
    PUBLISHED_SCHEDULER,
    PUBLISHED_UNET,
    PUBLISHED_VAE,
    Context,
    DualTransformer,
    VersatileDiffusion,
    attention_sites,
    build_unet,
    load_versatile_diffusion,
    noise_level,
    unet_state,
)

N_VISION, N_TEXT, DIM, SIZE = 9, 5, 16, 16
UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": DIM,
    "attention_head_dim": 4,
}
BLOCKS = (("CrossAttnDownBlock", "DownBlock"), ("UpBlock", "CrossAttnUpBlock"))
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "latent_channels": 4,
}
SEEDS = draws.image_seeds(0, range(4))
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEN_STEPS = {"n_steps": 10, "guidance": 3.0}


def block_types(kind: str) -> dict[str, tuple[str, ...]]:
    down, up = (tuple(name + kind for name in names) for names in BLOCKS)
    return {"down_block_types": down, "up_block_types": up}


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Random weights, gains and biases, so that a weight in the wrong place is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            spread = 1 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.2
            value.normal_(0, spread, generator=generator).add_(1 if "norm" in name and name.endswith("weight") else 0)
    return model.eval().requires_grad_(False)


def image_unet() -> UNet2DConditionModel:
    return randomise(UNet2DConditionModel(**UNET, **block_types("2D")), 0)


def text_unet() -> UNetFlatConditionModel:
    return randomise(UNetFlatConditionModel(**UNET, **block_types("Flat")), 1)


def reference_unet(mixing: float) -> UNet2DConditionModel:
    """diffusers' own dual-guided UNet, which raises a TypeError when it is run."""
    encoder = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=N_TEXT))
    pipeline = SimpleNamespace(image_unet=image_unet(), text_unet=text_unet(), text_encoder=encoder)
    Pipeline._convert_to_dual_attention(pipeline)
    Pipeline.set_transformer_params(pipeline, mixing, ("text", "image"))
    return pipeline.image_unet


def mended(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Make its transformers drop the arguments that they do not know."""
    for module in unet.modules():
        if isinstance(module, DualTransformer2DModel):
            module.forward = drop_unknown(module.forward)
    return unet


def drop_unknown(forward):
    def wrapped(hidden_states, encoder_hidden_states, cross_attention_kwargs=None, return_dict=True, **_):
        return forward(hidden_states, encoder_hidden_states, None, None, cross_attention_kwargs, return_dict)

    return wrapped


def tokens(n: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Vision (n, N_VISION, DIM) and text (n, N_TEXT, DIM)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, length, DIM, generator=generator) for length in (N_VISION, N_TEXT))


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference as a fraction of the reference's largest value."""
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max())


def same_pictures(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    """Within one grey level for 99.9 % of the values, and pictures rather than clipped grey."""
    assert ours.shape == reference.shape and ours.dtype == torch.uint8
    assert reference.float().std() > 20 and ((reference == 0) | (reference == 255)).float().mean() < 0.5
    return bool(((ours.int() - reference.int()).abs() <= 1).float().mean() >= 0.999)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors this small, waiting for a second thread on a busy core costs more than all the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model in the format of the published one."""
    folder = tmp_path_factory.mktemp("versatile-diffusion")
    image_unet().save_pretrained(folder / "image_unet")
    text_unet().save_pretrained(folder / "text_unet")
    randomise(AutoencoderKL(**VAE), 2).save_pretrained(folder / "vae")
    DDIMScheduler(**PUBLISHED_SCHEDULER).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def model(folder) -> VersatileDiffusion:
    return load_versatile_diffusion(folder)


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the folder, to be spoilt."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    coarse = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    return nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return draws.normal(SEEDS, "test", (4, 8, 8))


@pytest.mark.parametrize("mixing", [0.4, 0.0, 1.0, 0.75])
def test_every_site_mixes_whole_transformers(model, latents, mixing):
    vision, text = tokens()
    seen, handles = [], []
    sites = attention_sites(model.unet)
    for site in sites:
        handles.append(site.register_forward_hook(lambda site, given, out: seen.append((site, given[0], out[0]))))
    model.predict_noise(latents, 321, Context(vision, text, mixing))
    for handle in handles:
        handle.remove()
    assert len(sites) == 4 and [site for site, _, _ in seen] == sites_in_order(model.unet)
    for site, h, mixed in seen:
        with_vision = site.image(h, encoder_hidden_states=vision).sample
        with_text = site.text(h, encoder_hidden_states=text).sample
        expected = h + (1 - mixing) * (with_vision - h) + mixing * (with_text - h)
        assert difference(mixed, expected) <= 1e-6
        assert difference(with_vision, with_text) > 0.1


def sites_in_order(unet: nn.Module) -> list[DualTransformer]:
    return [*unet.down_blocks[0].attentions, *unet.mid_block.attentions, *unet.up_blocks[1].attentions]


def count_runs(model: VersatileDiffusion, latents: torch.Tensor, context: Context) -> tuple[torch.Tensor, int, int]:
    """The estimate, and how often a transformer of the picture and of the text was run."""
    runs, handles = [], []
    for site in attention_sites(model.unet):
        handles.append(site.image.register_forward_hook(lambda *_: runs.append("image")))
        handles.append(site.text.register_forward_hook(lambda *_: runs.append("text")))
    estimate = model.predict_noise(latents, 321, context)
    for handle in handles:
        handle.remove()
    return estimate, runs.count("image"), runs.count("text")


def test_a_transformer_of_no_weight_is_not_run(model, latents):
    vision, text = tokens()
    assert count_runs(model, latents, Context(vision, text, 0.4))[1:] == (4, 4)
    only_vision, *n_runs = count_runs(model, latents, Context(vision, text, 0.0))
    assert n_runs == [4, 0]
    only_text, *n_runs = count_runs(model, latents, Context(vision, text, 1.0))
    assert n_runs == [0, 4]
    without_text, *n_runs = count_runs(model, latents, Context(vision, None, 0.4))
    assert n_runs == [4, 0] and torch.equal(without_text, only_vision)
    without_vision, *n_runs = count_runs(model, latents, Context(None, text, 0.4))
    assert n_runs == [0, 4] and torch.equal(without_vision, only_text)
    assert difference(only_text, only_vision) > 0.1


@pytest.mark.parametrize("mixing", [0.4, 0.0, 1.0])
def test_the_dual_unet_is_diffusers_own(model, latents, mixing):
    vision, text = tokens()
    expected = mended(reference_unet(mixing))(latents, 321, encoder_hidden_states=torch.cat([text, vision], 1)).sample
    assert difference(model.predict_noise(latents, 321, Context(vision, text, mixing)), expected) <= 1e-5
    other = model.predict_noise(latents, 322, Context(vision, text, mixing))
    assert difference(other, expected) > 1e-4


def test_diffusers_dual_path_is_still_broken(latents):
    """If this fails, diffusers has mended it, and DualTransformer might go."""
    vision, text = tokens()
    with pytest.raises(TypeError, match="unexpected keyword argument 'encoder_attention_mask'"):
        reference_unet(0.4)(latents, 321, encoder_hidden_states=torch.cat([text, vision], 1))


def test_the_published_architecture():
    with torch.device("meta"):
        unet, vae = build_unet(PUBLISHED_UNET), AutoencoderKL(**PUBLISHED_VAE)
    sites = attention_sites(unet)
    assert len(sites) == 16
    assert sum(p.numel() for name, p in unet.named_parameters() if ".text." not in name) == 859_520_964  # Stable Diffusion 1
    assert [site.image.config.in_channels for site in sites[:6]] == [320, 320, 640, 640, 1280, 1280]
    assert all(site.text is not site.image for site in sites)
    assert all(site.text.config.num_attention_heads == 8 for site in sites)
    model = VersatileDiffusion(unet, vae, PUBLISHED_SCHEDULER)
    assert model.image_size == 512 and model.latent_shape == (4, 64, 64)


def test_the_published_files_fit(monkeypatch):
    """Names and shapes of diffusers' own full-size UNets, which is what the published files hold."""
    flat = {key: [name.replace("2D", "Flat") for name in PUBLISHED_UNET[key]] for key in ("down_block_types", "up_block_types")}
    with torch.device("meta"):
        ours = build_unet(PUBLISHED_UNET)
        image, text = UNet2DConditionModel(**PUBLISHED_UNET), UNetFlatConditionModel(**PUBLISHED_UNET | flat)
    parts = {"image_unet": image, "text_unet": text}
    monkeypatch.setattr(versatile_diffusion, "weights_file", lambda folder: folder)
    found = unet_state(Path("published"), lambda path: {k: v.shape for k, v in parts[path.name].state_dict().items()})
    assert len(found) == 1102 and len(attention_sites(ours)) == 16
    require_fit(ours, found, "published", "")


def written_alphas() -> np.ndarray:
    """Share of the signal's power at t = 0 ... 999: betas whose roots are evenly spaced from 0.00085 to 0.012's."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def test_timesteps_and_noise_levels(model):
    scheduler = model.scheduler("ddim")
    scheduler.set_timesteps(50)
    timesteps = scheduler.timesteps
    assert timesteps.tolist() == list(range(981, 0, -20))
    # number of steps run: the first that is denoised, noise level, noise level of Brain-Diffuser's scripts
    for n_run, first, level, theirs in ((37, 721, 721, 741), (50, 981, 981, 981), (25, 481, 481, 501), (1, 1, 1, 21)):
        assert timesteps[-n_run:][0] == first
        assert noise_level(timesteps, n_run, False) == level
        assert noise_level(timesteps, n_run, True) == theirs
    np.testing.assert_allclose(scheduler.alphas_cumprod, written_alphas(), rtol=1e-5)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    table = {0: 0.9991, 1: 0.9983, 721: 0.0705, 741: 0.0604, 981: 0.0058}
    assert {t: round(float(scheduler.alphas_cumprod[t]), 4) for t in table} == table


def record_unet_calls(model: VersatileDiffusion, **settings) -> tuple[list[int], list[torch.Tensor]]:
    """Timesteps and latents that the UNet is given by `generate`."""
    calls = []
    hook = model.unet.register_forward_pre_hook(lambda _, given: calls.append((int(given[1]), given[0])))
    try:
        model.generate(**settings)
    finally:
        hook.remove()
    return [t for t, _ in calls], [x for _, x in calls]


@pytest.mark.parametrize("offset, level", [(False, 721), (True, 741)])
def test_where_a_picture_starts(model, images, offset, level):
    vision, text = tokens()
    settings = {"seeds": SEEDS, "vision": vision, "text": text, "unconditional": None, "images": images, "guidance": 1}
    timesteps, inputs = record_unet_calls(model, **settings, reference_offset=offset)
    assert len(timesteps) == 37 and timesteps == list(range(721, 0, -20))
    start, noise = encoded(model, images), draws.normal(SEEDS, "diffusion", (4, 8, 8))
    alpha = written_alphas()[level]
    assert difference(inputs[0], alpha**0.5 * start + (1 - alpha) ** 0.5 * noise) <= 1e-5
    timesteps, inputs = record_unet_calls(model, **settings | {"images": None}, strength=1, reference_offset=offset)
    assert timesteps == list(range(981, 0, -20)) and torch.equal(inputs[0], noise)


def encoded(model: VersatileDiffusion, images: torch.Tensor) -> torch.Tensor:
    posterior = model.vae.encode(2 * images - 1).latent_dist
    noise = draws.normal(SEEDS[: len(images)], "vae", (4, 8, 8))
    return 0.18215 * (posterior.mean + torch.exp(posterior.logvar / 2) * noise)


def decoded(model: VersatileDiffusion, latents: torch.Tensor) -> torch.Tensor:
    pictures = model.vae.decode(latents / 0.18215).sample
    return (255 * (pictures / 2 + 0.5).clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1)


def plain_ddim(unet, latents, levels, context, unconditional, guidance) -> torch.Tensor:
    """Song et al. 2021, eta 0, in steps of 20 from levels[0] down to 1; context and unconditional as the UNet wants them."""
    alphas = torch.from_numpy(written_alphas()).float()
    for t in levels:
        noise = unet(latents, t, encoder_hidden_states=context).sample
        if guidance != 1:
            without = unet(latents, t, encoder_hidden_states=unconditional).sample
            noise = without + guidance * (noise - without)
        clean = (latents - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
        before = alphas[max(t - 20, 0)]
        latents = before.sqrt() * clean + (1 - before).sqrt() * noise
    return latents


@pytest.mark.parametrize(
    "start, mixing, guidance",
    [(None, 0.4, 7.5), (721, 0.4, 7.5), (741, 0.4, 7.5), (741, 0.4, 1.0), (721, 0.0, 3.0)],
)
def test_generate_is_plain_ddim(model, images, monkeypatch, start, mixing, guidance):
    vision, text = tokens()
    grey, empty = tokens(1, seed=9)
    noise, alphas = draws.normal(SEEDS, "diffusion", (4, 8, 8)), written_alphas()
    first = 981
    if start is not None:
        first, alpha = 721, alphas[start]
        noise = alpha**0.5 * encoded(model, images) + (1 - alpha) ** 0.5 * noise
    context, unconditional = torch.cat([text, vision], 1), torch.cat([empty, grey], 1).expand(4, -1, -1)
    expected = plain_ddim(mended(reference_unet(mixing)), noise, range(first, 0, -20), context, unconditional, guidance)

    seen, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda x: seen.append(x) or decode(x))
    how = {"strength": 1.0} if start is None else {"images": images, "reference_offset": start == 741}
    pictures = model.generate(SEEDS, vision, text, (grey, empty), guidance=guidance, mixing=mixing, **how)
    assert difference(seen[0], expected) <= 1e-4
    assert pictures.shape == (4, SIZE, SIZE, 3) and pictures.device.type == "cpu"
    assert same_pictures(pictures, decoded(model, expected))


def test_guidance_1_runs_the_unet_on_the_pictures_only(model, images):
    vision, text = tokens()
    unconditional = tokens(1, seed=9)
    how = {"seeds": SEEDS, "vision": vision, "text": text, "images": images, "n_steps": 4}
    for guidance, given, n_rows in ((1, None, 4), (1, unconditional, 4), (2, unconditional, 8)):
        _, inputs = record_unet_calls(model, **how, guidance=guidance, unconditional=given)
        assert [len(x) for x in inputs] == [n_rows] * 3
    with pytest.raises(ValueError, match="guidance 2 needs unconditional tokens"):
        model.generate(**how, guidance=2, unconditional=None)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_kind_of_tokens_is_enough(model, images, guidance):
    vision, text = tokens()
    how = {"unconditional": tokens(1, seed=9), "images": images, "n_steps": 4, "guidance": guidance}
    both = model.generate(SEEDS, vision, text, **how, mixing=0.0)
    assert torch.equal(model.generate(SEEDS, vision, None, **how, mixing=0.4), both)
    assert torch.equal(model.generate(SEEDS, None, text, **how), model.generate(SEEDS, vision, text, **how, mixing=1.0))
    assert not torch.equal(model.generate(SEEDS, None, text, **how), both)


def test_strength_0_is_the_round_trip_of_the_vae(model, images):
    vision, text = tokens()
    pictures = model.generate(SEEDS, vision, text, None, images, strength=0, guidance=1)
    expected = decoded(model, encoded(model, images))
    assert same_pictures(pictures, expected)
    assert (pictures == expected).float().mean() > 0.99  # rounded to grey levels, not cut off
    other = model.generate(draws.image_seeds(1, range(4)), vision, text, None, images, strength=0, guidance=1)
    assert not torch.equal(pictures, other)  # the posterior is drawn from


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_batches_agree(model, images, size, sampler):
    vision, text = tokens()
    how = {"unconditional": tokens(1, seed=9), "sampler": sampler} | TEN_STEPS
    whole = model.generate(SEEDS, vision, text, images=images, **how)
    parts = [slice(i, i + size) for i in range(0, 4, size)]
    pictures = [model.generate(SEEDS[p], vision[p], text[p], images=images[p], **how) for p in parts]
    assert same_pictures(torch.cat(pictures), whole)


def test_seeds_belong_to_pictures(model, images):
    vision, text = tokens()
    how = {"unconditional": tokens(1, seed=9)} | TEN_STEPS
    pictures = model.generate(SEEDS, vision, text, images=images, **how)
    other = model.generate([SEEDS[0], *draws.image_seeds(1, range(1, 4))], vision, text, images=images, **how)
    assert same_pictures(other[:1], pictures[:1])
    assert all((a.int() - b.int()).abs().float().mean() > 5 for a, b in zip(other[1:], pictures[1:]))
    alike = [x[:1].expand(4, -1, -1) for x in (vision, text)]
    from_noise = model.generate(SEEDS, *alike, **how, strength=1)
    assert all((a.int() - from_noise[0].int()).abs().float().mean() > 5 for a in from_noise[1:])


@pytest.mark.parametrize("strength", [0.75, 1.0])
@pytest.mark.parametrize("sampler", ["unipc", "dpm"])
def test_multistep_samplers_come_to_what_ddim_does(model, images, sampler, strength):
    vision, text = tokens()
    how = {"images": images if strength < 1 else None, "strength": strength, "guidance": 1, "unconditional": None}
    how |= {"seeds": SEEDS, "vision": vision, "text": text}
    pictures = model.generate(**how, n_steps=10, sampler=sampler)
    assert torch.equal(pictures, model.generate(**how, n_steps=10, sampler=sampler))  # no state is left from the first call
    for ours, expected in zip(pictures.flatten(1), model.generate(**how).flatten(1)):
        assert np.corrcoef(ours, expected)[0, 1] > 0.99
    timesteps, inputs = record_unet_calls(model, **how, n_steps=10, sampler=sampler)
    start, alpha = encoded(model, images) if strength < 1 else 0, written_alphas()[timesteps[0]] if strength < 1 else 0
    assert len(timesteps) == int(10 * strength) and timesteps == sorted(timesteps, reverse=True)
    assert difference(inputs[0], alpha**0.5 * start + (1 - alpha) ** 0.5 * draws.normal(SEEDS, "diffusion", (4, 8, 8))) <= 1e-5


@pytest.mark.parametrize("sampler, first, level", [("ddim", 951, 701), ("unipc", 999, 749), ("dpm", 999, 749)])
def test_starts_under_the_published_scheduler(model, images, sampler, first, level):
    """It tells no timestep_spacing: the samplers then begin at their own first step, from noise of variance 1."""
    published = VersatileDiffusion(model.unet, model.vae, PUBLISHED_SCHEDULER)
    vision, text = tokens()
    how = {"seeds": SEEDS, "vision": vision, "text": text, "guidance": 1, "unconditional": None}
    how |= {"n_steps": 20, "sampler": sampler}
    timesteps, inputs = record_unet_calls(published, **how, strength=1)
    noise = draws.normal(SEEDS, "diffusion", (4, 8, 8))
    assert timesteps[0] == first and len(timesteps) == 20 and torch.equal(inputs[0], noise)
    timesteps, inputs = record_unet_calls(published, **how, images=images)
    alpha = written_alphas()[level]
    assert timesteps[0] == level and len(timesteps) == 15
    assert difference(inputs[0], alpha**0.5 * encoded(model, images) + (1 - alpha) ** 0.5 * noise) <= 1e-5


def test_half_precision_gives_the_same_pictures(folder, model, images):
    vision, text = tokens()
    how = {"seeds": SEEDS, "vision": vision, "text": text, "images": images, **TEN_STEPS}
    how["unconditional"] = tuple(x[:1] for x in tokens(seed=5))
    half = load_versatile_diffusion(folder, dtype=torch.bfloat16)
    assert half.dtype == half.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    for ours, expected in zip(half.generate(**how).flatten(1), model.generate(**how).flatten(1)):
        assert np.corrcoef(ours, expected)[0, 1] > 0.99


def test_wrong_arguments_are_explained(model, images):
    vision, text = tokens()
    how = {"unconditional": None, "guidance": 1, "n_steps": 2}
    with pytest.raises(ValueError, match=r"strength is 0.75, but without a picture to start from it must be 1"):
        model.generate(SEEDS, vision, text, **how)
    for strength in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"strength is {strength}, must be in \[0, 1\]"):
            model.generate(SEEDS, vision, text, images=images, strength=strength, **how)
    with pytest.raises(ValueError, match="needs vision tokens, text tokens or both; got neither"):
        model.generate(SEEDS, None, None, images=images, **how)
    for mixing in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"mixing is {mixing}, must be in \[0, 1\]"):
            model.generate(SEEDS, vision, text, images=images, mixing=mixing, **how)
    for wrong in (vision[:3], vision[..., :15], vision[0]):
        shape = str(tuple(wrong.shape))[1:-1]
        with pytest.raises(ValueError, match=rf"vision tokens have shape \({shape}\), expected \(4, n_tokens, 16\)"):
            model.generate(SEEDS, wrong, text, images=images, **how)
    with pytest.raises(ValueError, match=r"text tokens have shape \(4, 5, 8\), expected \(4, n_tokens, 16\)"):
        model.generate(SEEDS, vision, text[..., :8], images=images, **how)


def test_the_real_format_is_read(model, folder):
    ours, image, text = model.unet.state_dict(), image_unet().state_dict(), text_unet().state_dict()
    n_flow_only = sum(".attentions." not in key for key in text)
    assert n_flow_only > 50 and len(ours) == len(image) + len(text) - n_flow_only
    for key, value in image.items():
        ours_key = key.replace(".attentions.0.", ".attentions.0.image.").replace(".attentions.1.", ".attentions.1.image.")
        assert torch.equal(ours[ours_key], value)
    for key, value in text.items():
        if ".attentions." in key:
            ours_key = key.replace(".attentions.0.", ".attentions.0.text.").replace(".attentions.1.", ".attentions.1.text.")
            assert torch.equal(ours[ours_key], value)
    vae = AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    assert vae.keys() == model.vae.state_dict().keys()
    assert all(torch.equal(model.vae.state_dict()[key], value) for key, value in vae.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32 and model.image_size == SIZE


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The VAE's attention as diffusers before 0.13 called it."""
    renamed = {}
    for key, value in state.items():
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[key] = value
    assert len(renamed.keys() - state.keys()) == 16
    return renamed


def test_old_formats_are_read(model, copied, latents):
    """Pickled tensors, half precision, the VAE's old names, a text UNet of transformers only."""
    vae, text = (load_file(copied / name / WEIGHTS) for name in ("vae", "text_unet"))
    (copied / "vae" / WEIGHTS).unlink()
    torch.save(old_names(vae), copied / "vae" / "diffusion_pytorch_model.bin")
    (copied / "text_unet" / WEIGHTS).unlink()
    half = {key: value.half() for key, value in text.items() if ".attentions." in key}
    save_file(half, copied / "text_unet" / "diffusion_pytorch_model.fp16.safetensors")
    again = load_versatile_diffusion(copied)
    assert all(torch.equal(again.vae.state_dict()[key], value) for key, value in vae.items())
    assert torch.equal(again.decode(latents), model.decode(latents))
    expected = model.unet.state_dict()
    for key, value in again.unet.state_dict().items():
        assert torch.equal(value, expected[key].half().float() if ".text." in key else expected[key])
    assert {p.dtype for p in load_versatile_diffusion(copied, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def respell(path, change) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


SITE = "mid_block.attentions.0.proj_in.weight"


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("image_unet", lambda s: s.pop("conv_in.bias"), r"1 missing \['conv_in.bias'\], 0 unknown"),
        ("image_unet", lambda s: s.update(extra=torch.ones(1)), r"0 missing \[\], 1 unknown \['extra'\]"),
        ("image_unet", lambda s: s.update({SITE: torch.ones(2)}), r"1 of another shape \['mid_block.attentions.0.image.proj_in"),
        ("text_unet", lambda s: s.pop(SITE), r"1 missing \['mid_block.attentions.0.text.proj_in.weight'\]"),
        ("text_unet", lambda s: s.update({SITE: torch.ones(2)}), r"1 of another shape \['mid_block.attentions.0.text.proj_in"),
        ("text_unet", lambda s: s.update({SITE + "s": torch.ones(2)}), r"1 unknown \['mid_block.attentions.0.text.proj_in"),
        ("text_unet", lambda s: s.update(extra=torch.ones(1)), "text_unet has extra, which no part of Versatile Diffusion"),
        ("vae", lambda s: s.pop("post_quant_conv.bias"), r"1 missing \['post_quant_conv.bias'\], 0 unknown"),
        ("vae", lambda s: s.update(extra=torch.ones(1)), r"0 missing \[\], 1 unknown \['extra'\]"),
        ("vae", lambda s: s.update({"quant_conv.bias": torch.ones(3)}), r"1 of another shape \['quant_conv.bias'\]"),
    ],
)
def test_wrong_weights_are_explained(copied, part, change, message):
    respell(copied / part / WEIGHTS, change)
    with pytest.raises(ValueError, match=message):
        load_versatile_diffusion(copied)


@pytest.mark.parametrize(
    "missing, message",
    [
        (".", "image_unet/config.json is not there. .* fetch shi-labs/versatile-diffusion .* say --stage2.folder"),
        ("image_unet", "image_unet/config.json is not there"),
        ("text_unet", "text_unet has no weights; expected one of diffusion_pytorch_model.safetensors, .*fp16.bin"),
        ("vae", "vae/config.json is not there"),
        (f"vae/{WEIGHTS}", "vae has no weights"),
        ("scheduler", "scheduler/scheduler_config.json is not there"),
    ],
)
def test_missing_files_are_explained(copied, missing, message):
    gone = copied / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_versatile_diffusion(copied)


def test_a_file_of_code_is_refused(copied):
    (copied / "text_unet" / WEIGHTS).unlink()
    torch.save({"model": print}, copied / "text_unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin cannot be read as weights"):
        load_versatile_diffusion(copied)


@pytest.mark.slow
def test_the_published_size_runs():
    """bfloat16 from the start: float32 weights alone would be 5 GB."""
    with torch.device("meta"):
        unet, vae = build_unet(PUBLISHED_UNET), AutoencoderKL(**PUBLISHED_VAE)
    for part in (unet, vae):
        part.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
        for name, value in part.named_parameters():
            value.normal_(1 if "norm" in name and name.endswith("weight") else 0, 0.02)
    model = VersatileDiffusion(unet, vae, PUBLISHED_SCHEDULER)
    vision, text, grey, empty = (torch.randn(1, n, 768) / 768**0.5 for n in (257, 77, 257, 77))
    image = nn.functional.interpolate(torch.rand(1, 3, 8, 8), size=(512, 512), mode="bilinear")
    seen, decode = [], model.decode
    model.decode = lambda latents: seen.append(latents) or decode(latents)
    pictures = model.generate([1], vision, text, (grey, empty), image, n_steps=3, reference_offset=True)
    assert pictures.shape == (1, 512, 512, 3) and pictures.dtype == torch.uint8
    assert seen[0].shape == (1, 4, 64, 64) and seen[0].isfinite().all() and seen[0].float().std() > 0.1
    assert pictures.float().std() > 0
