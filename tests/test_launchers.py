"""cluster.yaml against Ray's own schema, jobs/slurm.sbatch against Ray's own parser; neither needs a cloud or Slurm."""
from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

CHECKOUT = Path(__file__).parent.parent
TEXT = (CHECKOUT / "cluster.yaml").read_text()


@pytest.fixture
def config() -> dict:
    """As the launcher sees it, with its defaults."""
    return prepare_config(yaml.safe_load(TEXT))


def test_ray_s_schema_accepts_it(config):
    validate_config(config)
    for change in ({"dashboards": True}, {"idle_timeout_minutes": "ten"}, {"head_start_ray_commands": "ray start"}):
        with pytest.raises(jsonschema.ValidationError):
            validate_config(copy.deepcopy(config) | change)
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(config | {"head_node_type": "nobody"})


def test_a_cpu_head_and_spot_a100_workers_that_go_when_idle(config):
    head, a100 = config["available_node_types"]["head"], config["available_node_types"]["a100"]
    assert config["head_node_type"] == "head" and head["resources"] == {"CPU": 0}
    assert a100["node_config"]["InstanceType"] in ("p4d.24xlarge", "p4de.24xlarge") and a100["resources"]["GPU"] == 8
    assert a100["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" and a100["min_workers"] == 0
    assert 0 < a100["max_workers"] <= config["max_workers"] and 0 < config["idle_timeout_minutes"] <= 30


def test_token_and_loopback(config):
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in config[key] if "ray start" in c]
    assert len(starts) == 2 and all("export RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0] and "0.0.0.0" not in TEXT
    mlflow = next(command for command in config["head_start_ray_commands"] if "mlflow server" in command)
    assert "--host 127.0.0.1" in mlflow and "MLFLOW_TRACKING_URI=http://127.0.0.1:5000" in starts[0]
    assert re.search(r"NSDRAY_ROOT=s3://\S+", starts[0])


def test_nodes_that_come_back_mount_the_file_system(config):
    """The launcher leaves out setup_commands for a stopped machine that it starts again."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        mount, start = (next(i for i, c in enumerate(config[key]) if what in c) for what in ("mount -t nfs4", "ray start"))
        assert mount < start
    assert not any("/data" in command for command in config["setup_commands"])


def test_mlflow_is_started_once(config, tmp_path):
    """As the launcher runs a command: in a login shell, whose own command line has the words of what it starts."""
    command = next(c for c in config["head_start_ray_commands"] if "mlflow server" in c)
    executable(tmp_path, "mlflow", f'echo "$@" >> {tmp_path}/started')
    executable(tmp_path, "curl", f'echo "$@" >> {tmp_path}/asked; [ -e {tmp_path}/started ]')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    path = f"export PATH={tmp_path}:$PATH; "  # a login shell sets its own
    for _ in range(2):
        launched = ["bash", "-c", f"bash --login -c {shlex.quote(f'true && {path}({command})')}"]
        subprocess.run(launched, env=environment, check=True, timeout=60)
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    (started,) = (tmp_path / "started").read_text().splitlines()
    assert started.startswith("server --host 127.0.0.1 --port 5000")
    assert "http://127.0.0.1:5000/health" in (tmp_path / "asked").read_text()


def test_every_command_is_shell_and_every_mount_is_here(config):
    keys = [key for key in config if key.endswith("_commands")]
    commands = [command for key in keys for command in config[key]]
    assert len(commands) >= 10
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    for remote, local in config["file_mounts"].items():
        assert local.startswith("~") or (CHECKOUT / local).is_file(), remote
    assert any("requirements.lock" in command for command in config["setup_commands"])


def test_what_is_to_be_filled_in_is_explained():
    comments = "\n".join(line for line in TEXT.splitlines() if line.startswith("#"))
    commands = "\n".join(line.partition(" #")[0] for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
    for word, shown in (("BUCKET", "s3://BUCKET"), ("EFS_ID", "EFS_ID.efs"), ("ARN", "arn:aws:iam::ACCOUNT")):
        assert re.search(rf"^#   \d\. {word} ", comments, re.MULTILINE) and shown in commands
    for name in ("NSDRAY_ROOT", "MLFLOW_TRACKING_URI"):
        assert re.search(rf"#.*{name}:", TEXT), f"{name} is not explained"


# ---- Slurm: a Slurm of three lines, which runs a step once and here


def executable(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    tools = checkout / ".venv/bin"
    tools.mkdir(parents=True)
    home.mkdir()
    (checkout / "jobs").symlink_to(CHECKOUT / "jobs")
    (tools / "activate").write_text(f'PATH="{tools}:$PATH"\n')
    executable(tools, "scontrol", "echo node07; echo node08")
    executable(tools, "srun", 'while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done; exec "$@"')
    executable(tools, "hostname", 'echo "10.1.2.3 192.0.2.9"')
    executable(tools, "ray", 'printf "%s\\n" "$@" > "$RECORD"; env | grep -E "^(RAY|NSDRAY|MLFLOW)" > "$RECORD.env"')
    allocation = {"SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "32",
                  "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(checkout)}  # fmt: skip
    own = {"PATH": os.environ["PATH"], "HOME": str(home), "RAY_AUTH_TOKEN": "t", "RECORD": str(tmp_path / "record")}
    return allocation | own


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", "jobs/slurm.sbatch", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, env=environment, text=True, capture_output=True)


def test_slurm_script_calls_ray_as_ray_wants_it(slurm):
    done = submit(slurm, "train_all_subjects.py", "gru-15", "--data.nsd-root", "/data/my nsd")
    assert done.returncode == 0, done.stderr
    command, *arguments = Path(slurm["RECORD"]).read_text().splitlines()
    split = arguments.index("--")
    assert command == "symmetric-run"
    assert arguments[split + 1 :] == ["env", "RAY_ADDRESS=auto", "python", "jobs/train_all_subjects.py", "gru-15",
                                      "--data.nsd-root", "/data/my nsd"]  # fmt: skip
    parsed = symmetric_run.make_context("_", arguments[:split], resilient_parsing=True).params
    assert parsed["address"] == "10.1.2.3:6379" and parsed["min_nodes"] == 2
    assert curate_and_validate_ray_start_args(arguments[:split]) == ["--num-cpus=32", "--num-gpus=4"]
    environment = dict(line.split("=", 1) for line in Path(slurm["RECORD"] + ".env").read_text().splitlines())
    assert environment["RAY_AUTH_MODE"] == "token" and int(environment["RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"]) >= 300
    root = environment["NSDRAY_ROOT"]
    assert environment["MLFLOW_TRACKING_URI"] == f"sqlite:///{root}/mlflow.db" and Path(root).is_dir()


def test_slurm_script_s_errors(slurm):
    assert "'' is no file of" in submit(slurm).stderr and "'nojob.py' is no file of" in submit(slurm, "nojob.py").stderr
    del slurm["RAY_AUTH_TOKEN"]
    done = submit(slurm, "prepare_betas.py")
    assert done.returncode == 2 and "ray get-auth-token --generate" in done.stderr
    done = submit(slurm | {"NSDRAY_ROOT": "s3://lab/nsdray"}, "prepare_betas.py")
    assert done.returncode != 0 and "set MLFLOW_TRACKING_URI" in done.stderr
    assert not Path(slurm["RECORD"]).exists()


def test_slurm_script_takes_whole_nodes():
    text = (CHECKOUT / "jobs/slurm.sbatch").read_text()
    assert "#SBATCH --exclusive" in text and "#SBATCH --ntasks-per-node=1" in text
    subprocess.run(["bash", "-n", str(CHECKOUT / "jobs/slurm.sbatch")], check=True)
