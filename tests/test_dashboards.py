"""The dashboards: well-formed, asking for metrics that there are, and (slow) answered by a real Prometheus."""
from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml

from nsdray.cluster import metrics

CHECKOUT = Path(__file__).parent.parent
DASHBOARDS = CHECKOUT / "dashboards"
CHECK = runpy.run_path(str(DASHBOARDS / "check.py"))
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((DASHBOARDS / "grafana" / "dashboards").glob("*.json"))}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"]]
SUFFIXES = {metrics.Counter: ("_total",), metrics.Gauge: ("",), metrics.Histogram: ("_bucket", "_sum", "_count")}
EXPORTED = {f"ray_{name}{suffix}": name for name, own in metrics.METRICS.items() for suffix in SUFFIXES[own.kind]}
ADDED = {"instance", "le"}
"""Labels that Ray or Prometheus adds."""


def twice(values: list) -> list:
    return [value for value, n in Counter(values).items() if n > 1]


def test_dashboards_can_be_told_apart():
    assert set(BOARDS) == {"overview", "training", "reconstruction", "data"}
    assert not twice([board["uid"] for board in BOARDS.values()]) and not twice([board["title"] for board in BOARDS.values()])
    for board in BOARDS.values():
        assert not twice([panel["id"] for panel in board["panels"]]) and not twice([panel["title"] for panel in board["panels"]])


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap(name):
    places = [panel["gridPos"] for panel in BOARDS[name]["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert not twice(cells) and max(x for x, _ in cells) < 24


def test_panels_ask_grafanas_prometheus_and_say_what_they_answer():
    source = yaml.safe_load((DASHBOARDS / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    for name, panel in PANELS:
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}, (name, panel["title"])
        assert "?" in panel["description"], f"{name}, {panel['title']}: a description is the question that it answers"


def test_every_metric_is_shown_and_every_shown_metric_exists():
    shown = {found for query in CHECK["queries"]() for found in re.findall(r"\bray_nsdray_\w+", query.expression)}
    assert shown <= EXPORTED.keys(), f"no such metric: {shown - EXPORTED.keys()}"
    unseen = metrics.METRICS.keys() - {EXPORTED[name] for name in shown}
    assert not unseen, f"no panel shows {unseen}"


@pytest.mark.parametrize("query", CHECK["queries"](), ids=lambda query: f"{query.dashboard}: {query.panel}")
def test_labels_exist(query):
    for name, selector in re.findall(r"\b(ray_nsdray_\w+)(?:\{(.*?)\})?", query.expression):
        asked = set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", selector))
        grouped = {label for group in re.findall(r"by \((.*?)\)", query.expression) for label in group.split(", ")}
        assert asked | grouped <= {*metrics.METRICS[EXPORTED[name]].labels, *ADDED}


def test_legends_name_labels_that_are_left():
    for name, panel in PANELS:
        for target in panel["targets"]:
            grouped = re.search(r"by \((.*?)\)", target["expr"])
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert wanted <= (set(grouped.group(1).split(", ")) if grouped else {"instance"}), (name, panel["title"])


def test_every_metric_is_recorded_somewhere():
    """By name, and nothing else is: a name that is not in METRICS would be a KeyError in the middle of a job."""
    recorded = {
        call.args[0].value
        for path in (CHECKOUT / "nsdray" / "cluster").glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and "record" in (getattr(call.func, "id", ""), getattr(call.func, "attr", ""))
    }
    assert recorded == metrics.METRICS.keys()


def test_readme_has_every_panel():
    text = (DASHBOARDS / "README.md").read_text()
    assert not [panel["title"] for _, panel in PANELS if f"| {panel['title']} |" not in text]
    assert not [name for name in metrics.METRICS if f"`{name}`" not in text]


def test_without_ray_recording_does_nothing():
    code = "from nsdray.cluster import metrics; metrics.record('nsdray_images', 1); assert not metrics._metric.cache_info()[3]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKOUT)


def test_start_without_prometheus_says_what_to_install():
    done = subprocess.run(["/bin/bash", DASHBOARDS / "start.sh"], env={"PATH": "/nowhere:/usr/lib", "HOME": "/nowhere"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and "apt-get install" in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def dashboards(folder: Path, port: int):
    """dashboards/start.sh, until it answers; ended as by Ctrl-C."""
    env = os.environ | {"PROMETHEUS_PORT": str(port), "GRAFANA_PORT": str(free_port()), "DASHBOARDS_DATA": str(folder / "seen"),
                        "RAY_TMPDIR": str(folder)}  # fmt: skip
    process = subprocess.Popen([DASHBOARDS / "start.sh"], env=env, start_new_session=True)
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready")
                break
            time.sleep(0.5)
        yield process
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
        assert not psutil.wait_procs(started, 10)[1]


def listeners(process: psutil.Process) -> set[tuple[str, str, int]]:
    """Name, address and port of everything that a process and its descendants listen on."""
    found = set()
    for own in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found |= {(own.name(), *c.laddr) for c in own.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return found


def kill_a_replica(process: psutil.Process) -> bool:
    """SIGKILL to the first replica that can be found, if any."""
    for own in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::Replica." in " ".join(own.cmdline()):
                own.kill()
                return True
    return False


def watch(job: str, arguments: list[str], folder: Path, kill: bool) -> set[tuple[str, str, int]]:
    """Run a job to its end, kill one of its replicas if asked to; everything that it listened on."""
    env = os.environ | {"RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"jobs/{job}.py", *arguments, "--store.root", str(folder / "root")]
    process, seen = subprocess.Popen(command, cwd=CHECKOUT, env=env), set()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            seen |= listeners(psutil.Process(process.pid))
            kill = kill and not kill_a_replica(psutil.Process(process.pid))
        time.sleep(0.3)
    assert process.returncode == 0 and not kill
    return seen


@pytest.mark.slow
def test_prometheus_answers_every_panel():
    """A run with a killed replica and a search, seen by a real Prometheus. Nothing listens beyond loopback meanwhile."""
    folder, port = Path(tempfile.mkdtemp(prefix="nsdray-")), free_port()  # pytest's own path is too long for Ray's sockets
    small = runpy.run_path(str(CHECKOUT / "tests" / "test_jobs.py"))["SMALL"]
    search = "--search.n-trials 4 --search.models gru --search.n-layers 2 3 --search.n-images 4 --search.grace-epochs 2".split()
    try:
        with dashboards(folder, port) as process:
            seen = watch("train_all_subjects", small, folder, kill=True)
            seen |= listeners(psutil.Process(process.pid))
            seen |= watch("search", [*small, *search], folder, kill=False)
            print(*sorted(seen), sep="\n")
            url = f"http://127.0.0.1:{port}"
            subprocess.run([sys.executable, DASHBOARDS / "check.py", "--url", url, "--minutes", "20"])  # for whoever reads along
            answers = [(query, CHECK["values"](url, query.expression, 20)) for query in CHECK["queries"]()]
            images = CHECK["values"](url, 'sum(ray_nsdray_images_total{stage="extract_vdvae"})', 20)
            restarts = CHECK["values"](url, "sum(ray_nsdray_replica_restarts_total)", 20)
    finally:
        shutil.rmtree(folder)
    assert not [query for query, found in answers if not found]
    idle = re.compile("gpus|disk_io|network|blocked_time")  # these may be 0 all the time
    assert not [q for q, found in answers if not idle.search(q.expression) and max(map(max, found)) <= 0]
    assert images[0][-1] == 96 + 12 and max(restarts[0]) == 1
    assert {name for name, *_ in seen} >= {"raylet", "gcs_server", "prometheus"}
    assert not {found for found in seen if found[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}
