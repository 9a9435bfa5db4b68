"""Measure the service on PostgreSQL: python bench/on_postgres.py [seconds] [rounds] [connections].

Against the textbook design on PostgreSQL, and itself on SQLite. A server of its own is started;
it is not pinned, the workers are.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from events import write_requests
from server import BENCH, ROOT, Server, environment

sys.path.insert(0, str(ROOT / "tests"))
from cluster import Cluster

OURS, BOOK, FILE = "this on PostgreSQL", "textbook on PostgreSQL", "this on SQLite"
MODULES = {OURS: "app", BOOK: "textbook_postgres", FILE: "app"}
SUPPLY = 4000


def measure(cluster: Cluster, server: str, connections: int, seconds: int, requests: Path) -> tuple:
    """Return events a second, p99 in milliseconds, and CPU microseconds an event."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        database = Path(folder) / "kyc.db"
        there = Server(MODULES[server], database)
        if server != FILE:
            if server == OURS:
                del there.environ["KYC_DATABASE"]
            there.environ["DATABASE_URL"] = cluster.database(folder)
        if server == BOOK:
            environ = {**environment(database), "DATABASE_URL": cluster.database(folder)}
            subprocess.run(
                [sys.executable, BENCH / "textbook_postgres.py"], env=environ, check=True
            )
        with there:
            there.load(requests, 0, connections, 1)
            used = there.cpu_seconds()
            result = there.load(requests, SUPPLY, connections, seconds)
            used = there.cpu_seconds() - used
    good = result["answers"] - result["refused"]
    if result["refused"] or result["broken"]:
        print(f"{server}: {result['refused']} refused, {result['broken']} broken")
    return good / result["seconds"], result["p99"], used / good * 1e6


def main() -> None:
    """Print the medians."""
    seconds, rounds = (int(one) for one in [*sys.argv[1:], "4", "3"][:2])
    requests, found = Path(tempfile.mkdtemp(dir="/var/tmp")) / "requests", {}
    with contextlib.closing(Cluster()) as cluster:
        for _ in range(rounds):
            write_requests(requests, SUPPLY * (seconds + 1))
            for connections in (1, 16, 64):
                for server in MODULES:
                    figures = measure(cluster, server, connections, seconds, requests)
                    found.setdefault((connections, server), []).append(figures)
                    print(
                        connections, server, *(f"{figure:,.0f}" for figure in figures), flush=True
                    )
    os.remove(requests)
    for (connections, server), runs in found.items():
        medians = [statistics.median(column) for column in zip(*runs, strict=True)]
        print(
            f"| {connections} | {server} | {medians[0]:,.0f} | {medians[1]:.1f} | {medians[2]:,.0f} |"
        )


if __name__ == "__main__":
    main()
