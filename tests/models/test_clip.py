"""CLIP tokens against transformers' CLIP, which the reference took them from, and their own promises.

One set of random weights goes into transformers' CLIPModel and, renamed, into ours: the small architecture SMALL, and
in the slow test the published one. The reference is the recipe of Brain-Diffuser's clip.py written out with transformers:
its tokenizer (with open_clip's vocabulary), its image processor for PIL, all hidden states projected and divided by the
norm of the pooled one. Both sides start from strings and uint8 pictures: transformers' processor would divide a float
picture in [0, 1] by 255 once more.
"""
from __future__ import annotations

import json

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig as ReferenceConfig
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from nsdray.models.clip import CLIP, END_OF_TEXT, CLIPConfig, clip_pixels, load_clip, published_checkpoint
from nsdray.targets import clip_tokens

SMALL = CLIPConfig(
    embed_dim=48,
    vision={"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
    text={"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
)
CAPTIONS = (
    "A dog, running; it's 3 o'clock!",
    "TWO zebras & 1 Giraffe (near 25 trees) -- \"wow\"...",
    "Ein Caf\u00e9 in M\u00fcnchen, \u00e0 la carte: cr\u00e8me br\u00fbl\u00e9e for 12,50 \u20ac",
    "  spaces \t and\nlines  ",
    "a very long caption " * 40,
    "",
)
SIZES = ((70, 91), (425, 425), (91, 70), (31, 200))


def reference_model(config: CLIPConfig) -> CLIPModel:
    """transformers' CLIP with this architecture and random weights, biases and gains."""
    vision, text = config.vision, config.text
    heads = vision["width"] // vision.get("head_width", 64)
    vision_config = {key: vision[key] for key in ("image_size", "patch_size")} | tower(vision, heads)
    text_config = tower(text, text["heads"]) | {
        "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"],
        "eos_token_id": END_OF_TEXT,
    }
    sizes = {"projection_dim": config.embed_dim}
    model = CLIPModel(ReferenceConfig(text_config=text_config, vision_config=vision_config, **sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            spread = 1 / value[0].numel() ** 0.5 if value.ndim > 1 and "embedding." not in name else 0.2
            value.normal_(0, spread, generator=generator).add_(1 if "norm" in name and name.endswith("weight") else 0)
    return model.eval()


def tower(architecture: dict, heads: int) -> dict:
    width, layers = architecture["width"], architecture["layers"]
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu",
    }


RENAMED = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
)


def open_clip_state(reference: CLIPModel) -> dict[str, torch.Tensor]:
    """The same weights under open_clip's names: q, k, v in one tensor, projections the other way round."""
    given, state = dict(reference.state_dict()), {}
    for key in [key for key in given if ".q_proj." in key]:
        joint = torch.cat([given.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"])
        given[key.replace("self_attn.q_proj.", "attn.in_proj_")] = joint
    for key, value in given.items():
        new = key
        for old, ours in RENAMED:
            new = new.replace(old, ours)
        state[new] = value.T.contiguous() if "projection" in key else value
    return state


def reference_tokenizer(folder, length: int) -> CLIPTokenizer:
    """transformers' tokenizer from vocab.json and merges.txt, written from open_clip's vocabulary."""
    source = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(word, word): number for word, number in source.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in source.bpe_ranks)])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def reference_ids(tokenizer: CLIPTokenizer, captions) -> torch.Tensor:
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


def reference_pixels(picture: np.ndarray, size: int) -> torch.Tensor:
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return processor(Image.fromarray(picture), return_tensors="pt").pixel_values


@torch.no_grad()
def reference_vision(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    states = model.vision_model(pixels).last_hidden_state
    tokens = model.visual_projection(model.vision_model.post_layernorm(states))
    return tokens / tokens[:, :1].norm(dim=-1, keepdim=True)


@torch.no_grad()
def reference_text(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    out = model.text_model(input_ids=ids)
    norms = model.text_projection(out.pooler_output).norm(dim=-1, keepdim=True)
    return model.text_projection(out.last_hidden_state) / norms[:, None]


def smooth_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3): coarse noise, enlarged."""
    coarse = np.random.RandomState(seed).randint(0, 256, (7, 9, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference as a fraction of the reference's largest value."""
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max())


def loaded(reference: CLIPModel, config: CLIPConfig, path) -> CLIP:
    save_file(open_clip_state(reference), path)
    return load_clip(path, config)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors this small, waiting for a second thread on a busy core costs more than all the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference() -> CLIPModel:
    return reference_model(SMALL)


@pytest.fixture(scope="module")
def clip(reference, tmp_path_factory) -> CLIP:
    return loaded(reference, SMALL, tmp_path_factory.mktemp("clip") / "clip.safetensors")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> CLIPTokenizer:
    return reference_tokenizer(tmp_path_factory.mktemp("tokenizer"), SMALL.n_text_tokens)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([smooth_picture(50, 60, seed) for seed in range(7)])


def agrees(clip: CLIP, reference: CLIPModel, tokenizer: CLIPTokenizer, sizes) -> None:
    size = clip.config.image_size
    for picture in (smooth_picture(*s) for s in sizes):
        ours = clip.vision_tokens(clip_pixels(picture[None], size))
        assert difference(ours, reference_vision(reference, reference_pixels(picture, size))) <= 1e-4
    expected = reference_text(reference, reference_ids(tokenizer, CAPTIONS))
    assert difference(clip.text_tokens(CAPTIONS), expected) <= 1e-4


def test_tokens_agree_with_transformers(clip, reference, tokenizer):
    agrees(clip, reference, tokenizer, SIZES)


@pytest.mark.slow
def test_tokens_of_the_published_architecture_agree_with_transformers(tmp_path):
    config = CLIPConfig.published()
    reference = reference_model(config)
    clip = loaded(reference, config, tmp_path / "clip.safetensors")
    agrees(clip, reference, reference_tokenizer(tmp_path, config.n_text_tokens), SIZES[:2])


def test_the_comparison_is_sharp(clip, reference, tokenizer):
    """What the traps would cost: GELU for quick GELU, zeros for padding, a bilinear filter."""
    ids = reference_ids(tokenizer, CAPTIONS[:1])
    zeros = ids.masked_fill(torch.arange(ids.shape[1]) > ids.argmax(-1, keepdim=True), 0)
    tokens = clip.text_tokens(CAPTIONS[:1])
    assert difference(tokens, reference_text(reference, zeros)) > 0.1
    gelu = open_clip.CLIP(SMALL.embed_dim, SMALL.vision, SMALL.text, quick_gelu=False)
    gelu.load_state_dict(clip.model.state_dict())
    features = gelu.eval().encode_text(ids, normalize=True).detach()
    assert difference(clip.text_embeddings(CAPTIONS[:1]), features) > 1e-3
    picture = smooth_picture(70, 91)
    bilinear = Image.fromarray(picture).resize((41, 32), Image.Resampling.BILINEAR).crop((4, 0, 36, 32))
    other = clip.vision_tokens(clip_pixels(np.asarray(bilinear)[None], 32))
    assert difference(clip.vision_tokens(clip_pixels(picture[None], 32)), other) > 1e-3


@pytest.mark.parametrize("config", [SMALL, CLIPConfig.published()], ids=["small", "published"])
def test_token_ids_agree_with_transformers(tmp_path, config):
    with torch.device("meta"):
        clip = CLIP(config)
    ids = clip.token_ids(CAPTIONS)
    assert ids.dtype == torch.int64 and ids.shape == (len(CAPTIONS), config.n_text_tokens)
    assert torch.equal(ids, reference_ids(reference_tokenizer(tmp_path, config.n_text_tokens), CAPTIONS))
    assert (ids[:, 0] == END_OF_TEXT - 1).all() and (ids[:, -1] == END_OF_TEXT).all()
    assert (ids[4, 1:-1] < END_OF_TEXT - 1).all()  # cut off, with end-of-text in the last place
    assert (ids[5, 1:] == END_OF_TEXT).all()  # nothing but padding


@pytest.mark.parametrize("shape", [*SIZES, (224, 224), (224, 300), (40, 90), (20, 165)], ids=str)
def test_pixels_are_those_of_transformers(shape):
    picture = smooth_picture(*shape)
    ours, expected = clip_pixels(picture[None], 224), reference_pixels(picture, 224)
    assert ours.dtype == torch.float32 and ours.min() >= 0 and ours.max() <= 1
    mean, std = (torch.tensor(m).view(3, 1, 1) for m in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    torch.testing.assert_close((ours - mean) / std, expected, rtol=0, atol=1e-5)


def test_pooled_tokens_are_clips_embeddings(clip, pictures):
    model = open_clip.CLIP(SMALL.embed_dim, SMALL.vision, SMALL.text, quick_gelu=True).eval()
    model.load_state_dict(clip.model.state_dict())
    images = clip_pixels(pictures, SMALL.image_size)
    with torch.no_grad():
        text = model.encode_text(SimpleTokenizer(context_length=SMALL.n_text_tokens)(list(CAPTIONS)), normalize=True)
        normalise = open_clip.transform.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        vision = model.encode_image(normalise(images), normalize=True)
    vision_tokens, text_tokens = clip.vision_tokens(images), clip.text_tokens(CAPTIONS)
    assert vision_tokens.shape == (7, 17, 48) and text_tokens.shape == (6, 20, 48)
    assert difference(vision_tokens[:, 0], vision) <= 1e-5
    assert difference(clip.text_embeddings(CAPTIONS), text) <= 1e-5
    ends = clip.token_ids(CAPTIONS).argmax(-1)
    for pooled in (vision_tokens[:, 0], text_tokens[torch.arange(6), ends], clip.text_embeddings(CAPTIONS)):
        torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(len(pooled)), rtol=0, atol=1e-5)
    assert (vision_tokens[:, 1:].norm(dim=-1) - 1).abs().mean() > 0.01  # the others keep their lengths


def test_under_autocast_lengths_are_told_in_float32(clip, pictures):
    with torch.autocast("cpu", torch.bfloat16):
        vision, text = clip.vision_tokens(clip_pixels(pictures, SMALL.image_size))[:, 0], clip.text_embeddings(CAPTIONS)
    for pooled in (vision, text):
        torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(len(pooled)), rtol=0, atol=1e-6)


def test_vision_targets(clip, pictures):
    targets = clip_tokens.vision_tokens(clip, pictures, batch_size=3)
    assert targets.dtype == np.float16 and targets.shape == (7, 17, 48)
    for i, picture in enumerate(pictures):
        expected = clip.vision_tokens(clip_pixels(picture[None], SMALL.image_size))[0].numpy()
        np.testing.assert_allclose(targets[i], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_text_targets_are_means_over_captions(clip, batch_size):
    captions = [["a dog", "a brown dog"], ["two cats"], ["", "a bus", "  ", "a red bus", "A bus!"], ["sky", " \n"]]
    targets = clip_tokens.text_tokens(clip, captions, batch_size)
    assert targets.dtype == np.float16 and targets.shape == (4, 20, 48)
    for i, texts in enumerate(captions):
        total, n = 0, 0
        for text in texts:
            if text.strip():
                total, n = total + clip.text_tokens([text])[0].double(), n + 1
        np.testing.assert_allclose(targets[i], (total / n).numpy(), rtol=1e-3, atol=1e-5)


def test_a_picture_without_caption_is_an_error(clip):
    with pytest.raises(ValueError, match="2 pictures have no caption, the first is number 1 of those given"):
        clip_tokens.text_tokens(clip, [["a dog"], [" ", ""], ["a cat"], []])


def test_unconditional_tokens(clip, reference, tokenizer):
    vision, text = clip_tokens.unconditional_tokens(clip)
    assert difference(text, reference_text(reference, reference_ids(tokenizer, [""]))) <= 1e-4
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_rescale=False)
    grey = processor(np.full((32, 32, 3), 0.5, np.float32), return_tensors="pt").pixel_values
    assert difference(vision, reference_vision(reference, grey)) <= 1e-4


def test_the_published_architecture():
    config, theirs = CLIPConfig.published(), open_clip.get_model_config("ViT-L-14-quickgelu")
    assert (config.n_vision_tokens, config.n_text_tokens, config.embed_dim, config.image_size) == (257, 77, 768, 224)
    assert (config.embed_dim, config.vision, config.text) == (theirs["embed_dim"], theirs["vision_cfg"], theirs["text_cfg"])
    assert theirs["quick_gelu"]
    with torch.device("meta"):
        model = CLIP(config).model
    assert sum(p.numel() for p in model.parameters()) == 427_616_513  # OpenAI's ViT-L/14
    blocks = [*model.transformer.resblocks, *model.visual.transformer.resblocks]
    assert len(blocks) == 12 + 24
    assert all(isinstance(block.mlp.gelu, open_clip.transformer.QuickGELU) for block in blocks)


def test_the_mini_architecture():
    config = CLIPConfig.mini()
    assert (config.n_vision_tokens, config.n_text_tokens, config.embed_dim, config.image_size) == (65, 32, 64, 64)


@pytest.mark.parametrize("shape", [(2, 3, 32, 31), (2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3)], ids=str)
def test_images_of_a_wrong_shape_are_an_error(clip, shape):
    with pytest.raises(ValueError, match=r"CLIP wants images \(n, 3, 32, 32\) in \[0, 1\], got \(" + str(shape)[1:-1]):
        clip.vision_tokens(torch.zeros(shape))


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.pt"])
def test_saved_weights_give_the_same_tokens(clip, pictures, tmp_path, name):
    state, path = clip.model.state_dict(), tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    again = load_clip(path, SMALL)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    images = clip_pixels(pictures, SMALL.image_size)
    assert torch.equal(again.vision_tokens(images), clip.vision_tokens(images))
    assert torch.equal(again.text_tokens(CAPTIONS), clip.text_tokens(CAPTIONS))
    assert again.text_tokens(CAPTIONS).dtype == torch.float32


def test_wrong_weights_are_explained(clip, tmp_path):
    state, path = clip.model.state_dict(), tmp_path / "clip.safetensors"
    save_file({k: v for k, v in state.items() if k != "visual.proj"} | {"extra": torch.ones(1)}, path)
    expected = r"1 missing \['visual.proj'\], 1 unknown \['extra'\], 0 of another shape .* ViT-L-14-quickgelu"
    with pytest.raises(ValueError, match=expected):
        load_clip(path, SMALL)
    save_file(state | {"visual.proj": torch.ones(64, 47)}, path)
    with pytest.raises(ValueError, match=r"0 missing \[\], 0 unknown \[\], 1 of another shape \['visual.proj'\]"):
        load_clip(path, SMALL)
    torch.save({"model": print}, tmp_path / "clip.pt")  # code, not data
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_clip(tmp_path / "clip.pt", SMALL)
    with pytest.raises(FileNotFoundError):
        load_clip(tmp_path / "absent.safetensors", SMALL)


def test_the_published_weights_are_looked_for_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = "timm/vit_large_patch14_clip_224.openai/open_clip_model.safetensors"
    with pytest.raises(FileNotFoundError, match=rf"{name}, 1.7 GB\) are not in .*create_model\('ViT-L-14-quickgelu', 'openai'\)"):
        published_checkpoint()
    folder = tmp_path / "models--timm--vit_large_patch14_clip_224.openai"  # as huggingface_hub lays it out
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for file in ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"):
        (folder / "snapshots" / ("0" * 40) / file).touch()
        assert published_checkpoint() == folder / "snapshots" / ("0" * 40) / file
