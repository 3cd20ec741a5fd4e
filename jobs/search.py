"""Search networks, depths, widths, dropout and learning rates, and say which depth is worth its cost.

    python jobs/search.py                                                            # miniature NSD (SIMULATED)
    python jobs/search.py gru-31 --data.nsd-root /data/nsd --search.n-trials 100 --search.n-layers 2 6 14 15 23 31
    python jobs/search.py --search.models gru --search.per-subject True --search.name gru-only
    python jobs/train_all_subjects.py ~/nsdray-data/searches/mini/best.json          # go on with what it found

Each trial trains a network for every subject (or there is one search per subject) and is judged by the stage-1 pictures of
validation images, so that depths can be compared. Interrupted, the same command goes on. Table, charts and the best
configuration go to <root>/searches/NAME and to MLflow, with a run per trial. See the fields --search.….
"""
from __future__ import annotations

from cli import main, plan_from_command_line

from nsdray.cluster.search import search


def run() -> None:
    plan = plan_from_command_line(__doc__)
    for folder in search(plan.config):
        print(f"\n{plan.store.read_bytes(f'{folder}/table.txt').decode()}")
        print(f"charts: {plan.store.uri(folder)}/parameters.svg, training.svg, decoding.svg, depth.svg")
        print(f"the best, for jobs/train_all_subjects.py: {plan.store.uri(folder)}/best.json")
        print(f"report: {plan.store.uri(folder)}/report.html")


if __name__ == "__main__":
    main(run)
