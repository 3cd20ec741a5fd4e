"""What is missing is told before anything starts, all at once: no Ray is needed for that."""
from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nsdray.cluster.estimate import feature_values, replica_weights, stage_sizes
from nsdray.cluster.preflight import (
    FRAMING,
    checked,
    disk_finding,
    input_findings,
    replica_finding,
    require,
    require_inputs,
    resource_findings,
    size_text,
    sizes_of,
)
from nsdray.config import ClusterConfig, Config, DataConfig, SimulationConfig, StoreConfig, TargetsConfig
from nsdray.mini import VERSATILE_DIFFUSION, weights_path
from nsdray.models.backbones import features, random_backbone
from nsdray.nsd.simulate import simulate_nsd
from nsdray.recipes import gru_15
from nsdray.regressors.gru import GRURegressor
from nsdray.stages import Plan
from nsdray.store import table


@pytest.fixture(scope="module")
def nsd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nsd") / "nsd"
    return simulate_nsd(folder, subjects=(1, 2), n_train=96, n_test=12, n_sessions=3, progress=False).root


@pytest.fixture
def config(nsd, tmp_path) -> Config:
    """Two subjects of a copy that may be damaged, three layers."""
    copy = shutil.copytree(nsd, tmp_path / "nsd")
    return Config(
        n_layers=3,
        data=DataConfig(nsd_root=str(copy), subjects=(1, 2), rows_per_part=64),
        simulation=SimulationConfig(n_train=96, n_test=12, n_sessions=3),
        targets=TargetsConfig(n_layers=3),
        store=StoreConfig(str(tmp_path / "root")),
    )


def wrong(findings) -> dict[str, str]:
    return {finding.what: finding.found for finding in findings if not finding.ok}


def test_all_is_well(config):
    findings = input_findings(Plan(config), thorough=True)
    assert wrong(findings) == {}
    found = {finding.what: finding.found for finding in findings}
    models = {"VDVAE", "CLIP", "Versatile Diffusion", "metric clip_mini"}
    assert set(found) == {"subject 1", "subject 2", "stimuli", "captions"} | models
    assert "3 sessions" in found["subject 1"] and "96 training and 12 test images" in found["subject 1"]
    assert "vdvae.safetensors" in found["VDVAE"] and "tensors" in found["VDVAE"]


def test_everything_that_is_missing_is_told_at_once(config):
    plan = Plan(config)
    sessions = plan.subjects[0].sessions
    sessions[2].write_bytes(sessions[2].read_bytes()[:-50])
    sessions[3].write_bytes(b"")
    shutil.rmtree(plan.layout.roi_folder(2))
    plan.layout.captions("val2017").unlink()
    plan.layout.stimuli.write_bytes(plan.layout.stimuli.read_bytes()[:-1000])
    targets = replace(config.targets, checkpoint="/nowhere/vdvae.th")
    plan = Plan(replace(config, targets=targets, stage2=replace(config.stage2, folder="/nowhere")))
    with pytest.raises(ValueError) as caught:
        require_inputs(plan)
    text = str(caught.value)
    assert text.startswith("6 things to mend first:")
    for part in ("subject 1: ", "betas_session02.hdf5", "betas_session03.hdf5", "subject 2: no ROI 'nsdgeneral'", "stimuli: ",
                 "captions_val2017.json is not there", "VDVAE: /nowhere/vdvae.th", "Versatile Diffusion: /nowhere"):  # fmt: skip
        assert part in text, part


def test_a_job_asks_for_what_it_needs_only(config):
    plan = Plan(replace(config, targets=replace(config.targets, checkpoint="/nowhere/vdvae.th")))
    plan.layout.captions("train2017").unlink()
    require_inputs(plan, ("betas", "stimuli"))
    assert set(wrong(input_findings(plan))) == {"captions", "VDVAE"}
    vision = replace(plan.config, stage2=replace(config.stage2, context="vision"))
    assert set(wrong(input_findings(Plan(vision)))) == {"VDVAE"}


def test_missing_sessions_and_captions_cut_short(config):
    plan = Plan(replace(config, data=replace(config.data, protocol="nsd37")))
    assert "needs sessions 1..37" in wrong(input_findings(plan, ("betas",)))["subject 1"]
    path = plan.layout.captions("train2017")
    path.write_text(path.read_text()[:-5])
    assert "was cut short" in wrong(input_findings(Plan(config), ("captions",)))["captions"]


@pytest.mark.parametrize("thorough", [False, True])
def test_a_cut_checkpoint(config, tmp_path, thorough):
    cut = tmp_path / "vdvae.safetensors"
    cut.write_bytes(weights_path("vdvae").read_bytes()[:-10])
    plan = Plan(replace(config, targets=replace(config.targets, checkpoint=str(cut))))
    assert "cannot be read as weights" in wrong(input_findings(plan, thorough=thorough))["VDVAE"]


def test_a_checkpoint_of_another_model(config, tmp_path):
    state = load_file(weights_path("vdvae"))
    save_file({key: value for key, value in list(state.items())[1:]}, tmp_path / "vdvae.safetensors")
    other = Path(shutil.copytree(VERSATILE_DIFFUSION, tmp_path / "vd"))
    shutil.copy(weights_path("clip"), other / "vae" / "diffusion_pytorch_model.safetensors")
    plan = Plan(replace(config, targets=replace(config.targets, checkpoint=str(tmp_path / "vdvae.safetensors")),
                        clip=replace(config.clip, checkpoint=str(weights_path("vdvae"))),
                        stage2=replace(config.stage2, folder=str(other))))  # fmt: skip
    found = wrong(input_findings(plan, thorough=True))
    assert set(found) == {"VDVAE", "CLIP", "Versatile Diffusion"}
    assert all("does not fit this" in text for text in found.values())


def test_metrics_without_weights(config, tmp_path):
    evaluation = replace(config.evaluation, suites=("brain_diffuser",), weights=str(tmp_path))
    found = wrong(input_findings(Plan(replace(config, evaluation=evaluation))))
    assert len(found) == 5 and "Without it: --evaluation.skip-missing" in found["metric alexnet"]
    skipping = replace(evaluation, skip_missing=True)
    findings = input_findings(Plan(replace(config, evaluation=skipping)))
    assert wrong(findings) == {} and sum(finding.found.startswith("left out: ") for finding in findings) == 5


def test_a_small_disk(config, monkeypatch):
    plan = Plan(config)
    needed = int(FRAMING * sum(max(0, size.disk) for size in stage_sizes(plan)))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed + 1))
    assert disk_finding(plan).ok
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    with pytest.raises(ValueError, match=r"disk: .* to be written below .* free: free some, or choose another --store.root"):
        with checked(plan):
            raise AssertionError("there was room")
    assert disk_finding(plan, ("betas", "stimuli")).ok  # a job that makes less needs less


def test_a_checkpoint_of_another_model_stops_a_job_before_ray_is_started(config, tmp_path):
    state = load_file(weights_path("vdvae"))
    save_file({key: value for key, value in list(state.items())[1:]}, tmp_path / "vdvae.safetensors")
    plan = Plan(replace(config, targets=replace(config.targets, checkpoint=str(tmp_path / "vdvae.safetensors"))))
    require_inputs(plan)  # quick, so it does not look at keys
    with pytest.raises(ValueError, match="does not fit this VDVAE"):
        with checked(plan):
            raise AssertionError("the job began")


def test_other_seeds_need_room_as_well(config):
    one, three = (Plan(replace(config, evaluation=replace(config.evaluation, seeds=seeds))) for seeds in ((), (1, 2)))
    sizes = {size.stage: size.disk for size in stage_sizes(three)}
    assert sizes["models/gru-3, seed 1"] == sizes["models/gru-3, seed 2"] == sizes["models/gru-3"] > 0
    assert sum(sizes.values()) > sum(size.disk for size in stage_sizes(one))


def test_what_a_job_makes_follows_from_what_it_needs(config):
    plan = Plan(config)
    made = {needs: [size.stage for size in sizes_of(plan, needs)] for needs in
            (("betas", "stimuli"), ("betas", "stimuli", "captions", "checkpoints"), ("stimuli", "metrics"))}  # fmt: skip
    targets = ["targets/vdvae", "targets/clip_vision", "targets/clip_text"]
    assert list(made.values()) == [["betas", "samples"], ["betas", "samples", *targets], []]
    assert sizes_of(plan) == stage_sizes(plan)


def test_sizes_are_those_of_the_data_sets(config):
    """Betas and samples as they would be written, to the byte of their cells; what is there is taken off."""
    plan = Plan(config)
    sizes = {size.stage: size for size in stage_sizes(plan)}
    n_voxels = [len(subject.voxels.index) for subject in plan.subjects]
    assert sizes["betas"].disk == sum(2 * 3 * 108 * n for n in n_voxels)
    assert sizes["samples"].disk == sum(108 * n * (4 + 3 * 2) for n in n_voxels)
    n_latents = 16 * (1 + 1 + 16)  # layers at 1, 1 and 4
    assert sizes["targets/vdvae"].disk == (96 + 96 + 12) * n_latents * 2  # test images once
    assert sizes["targets/clip_vision"].disk == (96 + 96 + 12) * 65 * 64 * 2
    assert sizes["predictions/ridge-3"].disk == sizes["predictions/mean-3"].disk == 2 * 12 * n_latents * 4
    before = sizes["betas"].disk
    plan.betas.write(plan.subjects[0].folder, "session=01.parquet", table({"x": [1, 2]}), {})
    there = plan.store.sizes(f"{plan.betas.folder}/{plan.subjects[0].folder}")["session=01.parquet"]
    assert stage_sizes(plan)[0].disk == before - there > 0


def test_features_are_counted_as_they_are():
    import torch

    network = random_backbone("clip_mini")
    assert sum(feature_values("mini")) == features(network, torch.zeros(1, 3, 64, 64), ["visual"])["visual"].size
    alexnet = 192 * 27 * 27, 256 * 13 * 13
    assert sorted(feature_values("brain_diffuser")) == sorted((*alexnet, 2048, 768, 1280, 2048))


def test_weights_of_a_replica(config):
    weights = replica_weights(Plan(config))
    n_vdvae, n_clip = (sum(v.numel() for v in load_file(weights_path(name)).values()) for name in ("vdvae", "clip"))
    assert weights["VDVAE and CLIP"] == 4 * (n_vdvae + n_clip) and weights["Versatile Diffusion and CLIP"] > 4 * n_clip


NODE = {"NodeManagerHostname": "a", "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 64e9}}
TOTAL = {"CPU": 16.0, "GPU": 4.0, "memory": 128e9}


@pytest.mark.parametrize(
    ("cluster", "total", "what", "message"),
    [
        ({"n_replicas": 5}, TOTAL, "replicas", "n_replicas is 5, but the cluster has room for 4; they would wait for ever"),
        ({"gpus_per_replica": 4.0}, TOTAL, "replicas", "gpus_per_replica is 4, but no node has more than 2"),
        ({}, {"memory": 1e9}, "replicas", "a replica needs {'CPU': 1}, but the cluster has no CPU"),
        ({"n_train_workers": 5}, TOTAL, "training workers", "5 training workers need 5 CPUs and 5 GPUs"),
        ({"cpus_per_train_worker": 12.0}, TOTAL, "training workers", "cpus_per_train_worker is 12, but no node has more than 8"),
        ({"n_gpus": 8}, TOTAL, "GPUs", "n_gpus is 8, but the cluster has 4"),
    ],
)
def test_what_could_never_be_scheduled(config, cluster, total, what, message):
    plan = Plan(replace(config, cluster=ClusterConfig(**cluster)))
    found = wrong(resource_findings(plan, {"CPU": 0.0} | total, [NODE, NODE]))
    assert message in found[what]


def test_a_cluster_that_will_do(config):
    plan = Plan(config)
    findings = resource_findings(plan, TOTAL, [NODE, NODE])
    assert wrong(findings) == {}
    assert [f.found for f in findings[:2]] == ["2 nodes, 16 CPUs, 4 GPUs", "4, each with 1 CPU, 1 GPU"]
    small = {"NodeManagerHostname": "b", "Resources": {"CPU": 16.0, "GPU": 4.0, "memory": 1e6}}
    assert "take one with more" in wrong(resource_findings(plan, TOTAL, [small]))["memory of a node"]


def test_memory_and_weights_of_ridge_are_told(config):
    plan = Plan(replace(config, models=("ridge",)))
    found = {finding.what: finding for finding in resource_findings(plan, TOTAL, [NODE, NODE])}
    assert found["memory of ridge"].ok and "all its workers and the object store" in found["memory of ridge"].found
    assert "TFLOP, for decoding new images; without: --ridge.weights none" in found["weights ridge-3"].found
    small = {"NodeManagerHostname": "b", "Resources": {"CPU": 16.0, "GPU": 4.0, "memory": 1e5, "object_store_memory": 1e5}}
    assert "Use a larger node" in wrong(resource_findings(plan, TOTAL, [small]))["memory of ridge"]
    without = Plan(replace(config, models=("ridge",), ridge=replace(config.ridge, weights="none")))
    assert "weights ridge-3" not in {finding.what for finding in resource_findings(without, TOTAL, [NODE])}


def test_memory_of_a_node_is_shared_by_its_replicas(config):
    """On CPUs: the largest node's memory, whatever the head has, over the replicas that may come to lie there."""
    plan, most = Plan(replace(config, cluster=ClusterConfig(n_replicas=6))), max(replica_weights(Plan(config)).values())
    head = {"Resources": {"memory": 1e6}}
    for n, ok in ((4, False), (2, True)):  # of the six, so many fit a node
        node = {"Resources": {"CPU": float(n), "memory": 2 * 3 * most}}
        finding = replica_finding(plan, {"CPU": 8.0}, [head, node])
        assert finding.ok == ok and f"its share of a node with {n}: " in finding.found
    assert "Fewer --cluster.n-replicas" in replica_finding(plan, {"CPU": 8.0}, [head]).found


def test_the_paper_s_recipe_lists_its_checkpoints(config, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    plan = Plan(replace(gru_15(), data=replace(config.data, protocol="nsd40"), store=config.store))
    found = wrong(input_findings(plan))
    assert {"VDVAE", "Versatile Diffusion", "metric alexnet", "metric inception_v3", "metric swav_resnet50"} <= found.keys()
    with pytest.raises(ValueError, match=r"things to mend first:\n"):
        require(input_findings(plan))


def test_sizes_are_readable():
    assert [size_text(n) for n in (12, 1500, 2.5e6, 1.04e12)] == ["12 B", "1.5 kB", "2.5 MB", "1.04 TB"]


def test_every_kind_of_model_is_estimated(config):
    models = ("ridge", "gru", "conv", "mlp", "transformer", "shared-gru")
    plan = Plan(replace(config, models=models, stage2=replace(config.stage2, model="none")))
    sizes = {size.stage: size for size in stage_sizes(plan)}
    network = GRURegressor(len(plan.subjects[0].voxels.index), 288, **config.gru.sizes())
    assert all(sizes[f"models/{model}-3"].memory > 0 < sizes[f"models/{model}-3"].disk for model in models)
    assert sizes["models/gru-3"].disk > 2 * 5 * 4 * sum(p.numel() for p in network.parameters()) * 0.9
    assert sizes["models/shared-gru-3"].memory > sizes["models/gru-3"].memory
    assert sizes["models/ridge-3"].memory > 4 * 96**2
