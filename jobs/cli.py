"""Command lines of the jobs: a recipe, and any of its fields."""
from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; without it, it warns
if "RAY_ADDRESS" not in os.environ:  # a Ray that a job starts for itself listens on loopback only
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import tyro  # noqa: E402

from nsdray.config import Config  # noqa: E402
from nsdray.recipes import RECIPES, read_recipe  # noqa: E402
from nsdray.stages import Plan  # noqa: E402
from nsdray.store import resolve_root  # noqa: E402


def plan_from_command_line(description: str) -> Plan:
    """Parse ``[recipe] [--field value …]``, print what is about to happen, and plan it. No recipe means mini; a recipe may be a
    .json file."""
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["mini", *arguments]
    choices = {name: (" ".join((recipe.__doc__ or "").split()), recipe()) for name, recipe in RECIPES.items()}
    if arguments[0].endswith(".json"):
        choices[arguments[0]] = ("a recipe file", read_recipe(Path(arguments[0]).expanduser()))
    config = tyro.extras.overridable_config_cli(choices, args=arguments, description=description)
    return announce(config)


def announce(config: Config) -> Plan:
    """Say where results go and what the data are."""
    print(f"nsdray: recipe {config.recipe}, subjects {' '.join(map(str, config.data.subjects))}")
    print(f"results below {resolve_root(config.store.root)}")
    plan = Plan(config)
    if plan.is_simulated:
        print(f"brain data: the miniature NSD at {plan.layout.root}. SIMULATED: it shows that the method works, nothing more.")
    else:
        print(f"brain data: NSD at {plan.layout.root}, protocol {config.data.protocol}")
    return plan


def main(run) -> None:
    """Run a job; errors that a user can mend are told without a traceback."""
    try:
        run()
    except (ValueError, FileNotFoundError, OSError) as error:
        if os.environ.get("NSDRAY_TRACEBACK"):
            raise
        cause = getattr(error, "cause", None) or error  # what went wrong inside a Ray task
        sys.exit(f"error: {cause}\n(NSDRAY_TRACEBACK=1 shows where)")
