"""Command lines of the jobs: a recipe, and any of its fields."""
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; without it, it warns
if "RAY_ADDRESS" not in os.environ:  # Ray started by the job itself listens on loopback only, as it does on other systems
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import tyro  # noqa: E402

from nsdray.config import Config  # noqa: E402
from nsdray.recipes import RECIPES, read_recipe  # noqa: E402
from nsdray.store import redacted, resolve_root  # noqa: E402

if TYPE_CHECKING:
    from nsdray.stages import Plan


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
    from nsdray.stages import Plan  # takes seconds, which downloads and help need not wait

    print(f"nsdray: recipe {config.recipe}, subjects {' '.join(map(str, config.data.subjects))}")
    print(f"results below {redacted(resolve_root(config.store.root))}")
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
        sys.exit(f"error: {redacted(str(cause))}\n(NSDRAY_TRACEBACK=1 shows where)")
    except Exception as error:
        if os.environ.get("NSDRAY_TRACEBACK") or not is_loss(error):
            raise
        reason = " ".join(str(getattr(error, "cause", None) or error).split())[:500]
        sys.exit(f"error: the cluster lost a process, a node or memory ({type(error).__name__}: {redacted(reason)}).\n"
                 "Finished shards are kept: start again, and it goes on from them. If this comes back, take machines with more "
                 "memory, or fewer --cluster.n-replicas.\n(NSDRAY_TRACEBACK=1 shows all)")  # fmt: skip


def is_loss(error: Exception) -> bool:
    """Whether Ray lost something: a process, a node, memory. An actor whose code fails is none of these."""
    from ray import exceptions as known  # takes a second, which help need not wait

    losses = (known.RayActorError, known.WorkerCrashedError, known.NodeDiedError, known.LocalRayletDiedError,
              known.ObjectLostError, known.ObjectStoreFullError, known.OutOfMemoryError, known.OutOfDiskError)  # fmt: skip
    return isinstance(error, losses) and not getattr(error, "actor_init_failed", False)
