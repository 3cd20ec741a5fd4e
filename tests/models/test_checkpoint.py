"""Weight files are data: read strictly, judged by their headers, and never run."""
from __future__ import annotations

import ast
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsdray.mini import VERSATILE_DIFFUSION, weights_path
from nsdray.models.backbones import check_backbone
from nsdray.models.checkpoint import read_weights, weight_shapes
from nsdray.models.clip import CLIPConfig, check_clip, load_clip
from nsdray.models.vdvae import VDVAEConfig, check_vdvae, load_vdvae
from nsdray.models.versatile_diffusion import check_versatile_diffusion

STATE = {"module.a.weight": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.int64), "c": torch.tensor(1.0).half()}
SHAPES = {"a.weight": (3, 4), "b": (2,), "c": ()}


class Trap:
    """Pickled, it makes a folder as soon as it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(params=["weights.safetensors", "weights.pt", "old.th"])
def file(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=path.suffix == ".pt")
    return path


def test_shapes_are_those_of_the_weights(file):
    assert {key: tuple(shape) for key, shape in weight_shapes(file).items()} == SHAPES
    assert {key: tuple(value.shape) for key, value in read_weights(file).items()} == SHAPES


@pytest.mark.parametrize("n_lost", [1, 60])
def test_a_file_that_was_cut_short_is_known_by_its_header(file, n_lost):
    data = file.read_bytes()
    file.write_bytes(data[:-n_lost])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read as weights .* Is it whole"):
        weight_shapes(file)


@pytest.mark.parametrize("read", [read_weights, weight_shapes])
@pytest.mark.parametrize("content, found", [
    ({"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}, "a dict of 'state', 'param_groups'"),
    ({"model": STATE}, "a dict of 'model'"),
    ({0: torch.ones(2)}, "a dict of 0"),
    ([torch.ones(2)], "a list"),
    (torch.ones(2), "a Tensor"),
    (None, "a NoneType"),
])  # fmt: skip
def test_what_holds_no_named_tensors(tmp_path, content, found, read):
    torch.save(content, tmp_path / "opt.th")
    message = rf"opt\.th is no weight file: it holds {found}, not tensors by name\. Is it an optimiser's state\? Take the other\."
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "opt.th", "Take the other.")


def test_every_error_tells_where_the_right_file_is(tmp_path):
    path, where = tmp_path / "model.th", "imagenet64-iter-1600000-model-ema.th"
    for load in (load_vdvae, check_vdvae):
        with pytest.raises(FileNotFoundError, match=rf"model\.th is not there\. .*{where}"):
            load(path, VDVAEConfig.mini())
    for content in (b"PK\x03\x04 cut", b"\x80\x02", b""):
        path.write_bytes(content)
        for load in (load_vdvae, check_vdvae):
            with pytest.raises(ValueError, match=rf"cannot be read as weights .*https://openaipublic.*{where}"):
                load(path, VDVAEConfig.mini())
    torch.save([], path)
    for load in (load_vdvae, check_vdvae):
        with pytest.raises(ValueError, match=rf"is no weight file: it holds a list.*{where}"):
            load(path, VDVAEConfig.mini())
    path.write_bytes(b"")
    for load in (load_clip, check_clip):
        with pytest.raises(ValueError, match=r"cannot be read as weights .* Fetch it again\. \S"):
            load(path, CLIPConfig.mini())


def test_a_file_that_is_not_there(tmp_path):
    for name in ("a.safetensors", "a.th"):
        with pytest.raises(FileNotFoundError, match=name):
            weight_shapes(tmp_path / name)


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch", "zip"])
@pytest.mark.parametrize("read", [read_weights, weight_shapes])
def test_code_in_a_weight_file_is_never_run(tmp_path, form, read):
    sprung, path = tmp_path / "sprung", tmp_path / "weights.th"
    data = {"a": torch.ones(2), "b": Trap(sprung)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(data["b"]))
    elif form == "zip":
        torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(path, "w") as bad:
            for name in good.namelist():
                bad.writestr(name, pickle.dumps(data["b"]) if name.endswith("data.pkl") else good.read(name))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read(path)
    assert not sprung.exists()
    with open(path, "rb") as stream:  # the trap works: whoever unpickles is caught
        if form == "pickle":
            pickle.load(stream)
            assert sprung.exists()


SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def test_no_loader_unpickles():
    """Every torch.load says weights_only, every np.load refuses pickles, and nothing imports what unpickles."""
    checkout, n_calls = Path(__file__).parents[2], 0
    for path in [path for folder in ("nsdray", "jobs") for path in (checkout / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in SAFE:
                assert SAFE[name] in [(k.arg, getattr(k.value, "value", None)) for k in node.keywords], f"{path}:{node.lineno}"
                n_calls += 1
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, f"{path}:{node.lineno}"
    assert n_calls >= 6


def test_shipped_weights_pass():
    check_vdvae(weights_path("vdvae"), VDVAEConfig.mini())
    check_clip(weights_path("clip"), CLIPConfig.mini())
    check_versatile_diffusion(VERSATILE_DIFFUSION)
    check_backbone("clip_mini", weights_path("clip"))


def test_a_wrong_file_is_known_by_its_header(tmp_path):
    with pytest.raises(ValueError, match=r"clip\.safetensors does not fit this VDVAE .* missing .* Is it the checkpoint"):
        check_vdvae(weights_path("clip"), VDVAEConfig.mini())
    with pytest.raises(ValueError, match="does not fit this CLIP"):
        check_clip(weights_path("vdvae"), CLIPConfig.mini())
    state = load_file(weights_path("vdvae"))
    key = sorted(state)[0]
    save_file({name: value for name, value in state.items() if name != key}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=rf"1 missing \['{key}'\], 0 unknown"):
        check_vdvae(tmp_path / "less.safetensors", VDVAEConfig.mini())


def test_a_folder_that_lacks_a_part(tmp_path):
    folder = Path(shutil.copytree(VERSATILE_DIFFUSION, tmp_path / "vd"))
    shutil.rmtree(folder / "text_unet")
    with pytest.raises(FileNotFoundError, match="text_unet has no weights"):
        check_versatile_diffusion(folder)
