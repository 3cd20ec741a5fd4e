"""Imports run one way, and nothing but cluster/ and jobs/ needs Ray or MLflow."""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nsdray"
LEVELS = [  # from the ground up; a module may import what lies below it, and its own package
    {"config", "seeds"},
    {"recipes"},
    {"glm"},
    {"nsd"},
    {"models"},
    {"regressors", "generators", "targets", "metrics"},
    {"mini"},
    {"training", "store", "stages"},
    {"decoder", "report"},
    {"cluster"},
]
WITHIN = {("stages", "store")}
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} if node.module != "nsdray" else {f"nsdray.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(path):
        root, _, rest = name.partition(".")
        if root == "nsdray":
            other = rest.split(".")[0]
            assert other == own or LEVEL[other] < LEVEL[own] or (own, other) in WITHIN, f"{own} imports {name}"
        assert root not in ("ray", "mlflow") or own == "cluster", f"{path} imports {root}"


def test_works_without_ray_and_mlflow():
    code = (
        "import sys; sys.modules.update(ray=None, mlflow=None); "
        "import nsdray.decoder, nsdray.stages, nsdray.report, nsdray.training, nsdray.mini.train_vdvae; "
        "assert not any(m.split('.')[0] == 'ray' and sys.modules[m] for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
