"""Before hours of work: every file and checkpoint, room, memory, and whether the cluster could do it at all. One table.

    python jobs/preflight.py gru-15 --data.nsd-root /data/nsd          # files, keys of the weights, disk, memory
    python jobs/preflight.py mini --measure                            # also the time to expect, from a few batches
    ray job submit --working-dir . -- python jobs/preflight.py gru-15 --data.nsd-root /data/nsd --measure   # and the cluster

Exit status 0 if all is well, 1 if not. A running cluster ($RAY_ADDRESS) is asked; without one, this machine is.
"""
from __future__ import annotations

import contextlib
import sys

from cli import main, plan_from_command_line

from nsdray.cluster.autoscale import enough_gpus
from nsdray.cluster.measure import time_findings
from nsdray.cluster.preflight import Finding, ask, cluster_findings, disk_finding, input_findings, size_table
from nsdray.cluster.run import check_shared_root, start_ray
from nsdray.stages import Plan

MEASURE = "--measure"


def run() -> None:
    measure = MEASURE in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != MEASURE]
    plan = plan_from_command_line(__doc__)
    findings = input_findings(plan, thorough=True)
    if all_well(findings):
        print(f"\n{size_table(plan)}\n")
        findings.append(disk_finding(plan))
        with contextlib.ExitStack() as until_the_end:
            findings += findings_of_the_cluster(plan, until_the_end)
            findings += time_findings(plan) if measure and all_well(findings) else []
    else:
        findings.append(Finding("the rest", "is looked at once these files are there", ok=False))
    print(table(findings))
    sys.exit(0 if all_well(findings) else 1)


def all_well(findings: list[Finding]) -> bool:
    return all(finding.ok for finding in findings)


def findings_of_the_cluster(plan: Plan, until_the_end: contextlib.ExitStack) -> list[Finding]:
    """Start or find Ray, wait for GPUs, keep them until the end, and look at the cluster as it is then."""

    def wait() -> str:
        until_the_end.enter_context(enough_gpus(plan.config.cluster))
        check_shared_root(plan)  # again: nodes may have come
        return seen

    seen = f"all nodes of the cluster see {plan.store.root}"
    root = ask("root", lambda: start_ray(plan) or seen)
    return [ask("root and GPUs", wait), *cluster_findings(plan)] if root.ok else [root]


def table(findings: list[Finding]) -> str:
    """One line a finding, what is wrong marked."""
    width = max(len(finding.what) for finding in findings)
    return "\n".join(f"{'ok   ' if f.ok else 'WRONG'}  {f.what:<{width}}  {f.found}" for f in findings)


if __name__ == "__main__":
    main(run)
