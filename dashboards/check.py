"""Ask Prometheus what every panel of the dashboards asks, and say which panels have no data.

    dashboards/start.sh                  # in one terminal
    make demo                            # in another
    python dashboards/check.py           # while it runs or after it; exit status 1 if a panel has had no data
    python dashboards/check.py --url http://127.0.0.1:9090 --minutes 60
"""
from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DASHBOARDS = Path(__file__).parent / "grafana" / "dashboards"


class Query(NamedTuple):
    """One expression of a panel."""

    dashboard: str
    panel: str
    expression: str


def queries() -> Iterator[Query]:
    """Every expression of every panel."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield Query(dashboard["title"], panel["title"], target["expr"])


def values(url: str, expression: str, minutes: float) -> list[list[float]]:
    """What Prometheus answers for the last minutes: the values of every series, NaN left out."""
    now = time.time()
    wanted = {"query": expression, "start": now - 60 * minutes, "end": now, "step": max(5, minutes * 60 / 1000)}
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{urllib.parse.urlencode(wanted)}", timeout=30) as answer:
        series = json.load(answer)["data"]["result"]
    found = [[float(value) for _, value in own["values"] if value != "NaN"] for own in series]
    return [own for own in found if own]


def main() -> int:
    """Print a line per expression; how many had no data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="Prometheus (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30, help="how far to look back (default: %(default)s)")
    arguments = parser.parse_args()
    n_empty = 0
    for query in queries():
        found = values(arguments.url, query.expression, arguments.minutes)
        n_empty += not found
        answer = f"{len(found)} series, largest {max(map(max, found)):.4g}" if found else "NO DATA"
        print(f"{query.dashboard} | {query.panel} | {query.expression} | {answer}")
    print(f"{n_empty} expressions without data")
    return n_empty


if __name__ == "__main__":
    sys.exit(min(1, main()))
