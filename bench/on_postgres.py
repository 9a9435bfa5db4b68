"""Measure the service on PostgreSQL: python bench/on_postgres.py [--seconds N] [--rounds N].

Against the textbook design on PostgreSQL, and against itself on SQLite. It starts a PostgreSQL
server of its own, which has the cores that the worker has not, as wrk; alike for both designs.
It writes POSTGRES.md.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from events import write_requests
from machine import time_fsync
from server import BENCH, CORES, ROOT, Server, environment, fail

sys.path.insert(0, str(ROOT / "tests"))
from cluster import Cluster

OURS, BOOK, FILE = "this on PostgreSQL", "textbook on PostgreSQL", "this on SQLite"
MODULES = {OURS: "app", BOOK: "textbook_postgres", FILE: "app"}
CONNECTIONS = (1, 16, 64)
RATIOS = (  # what, of which, to which; its floor and its aim
    ("events/s of this ÷ textbook, 16 connections", 16, OURS, BOOK, "1.0", "1.5"),
    ("events/s of this ÷ itself on SQLite, 16 connections", 16, OURS, FILE, "0.5", ""),
    ("events/s of this ÷ textbook, 1 connection", 1, OURS, BOOK, "", ""),
    ("events/s of this ÷ itself on SQLite, 1 connection", 1, OURS, FILE, "", ""),
    ("events/s of this ÷ textbook, 64 connections", 64, OURS, BOOK, "", ""),
    ("events/s of this ÷ itself on SQLite, 64 connections", 64, OURS, FILE, "", ""),
)
SUPPLY = 4000  # events prepared for each second

Runs = dict[tuple[int, str], list[tuple[float, float, float]]]


def measure(cluster: Cluster, server: str, connections: int, seconds: int, requests: Path) -> tuple:
    """Return events a second, p99 in milliseconds, and CPU microseconds an event."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        database = Path(folder) / "kyc.db"
        started = Server(MODULES[server], database)
        if server != FILE:
            started.environ["DATABASE_URL"] = cluster.database(folder)
        if server == OURS:
            del started.environ["KYC_DATABASE"]
        if server == BOOK:
            command = [sys.executable, BENCH / "textbook_postgres.py"]
            url = {"DATABASE_URL": cluster.database(folder)}
            subprocess.run(command, env=environment(database) | url, check=True)
        with started:
            started.load(requests, 0, connections, 1)
            used = started.cpu_seconds()
            result = started.load(requests, SUPPLY, connections, seconds)
            used = started.cpu_seconds() - used
        if server != FILE:
            check(cluster, folder, result["answers"] - result["refused"])
    if result["refused"] or result["broken"]:
        fail(f"{server}: {result['refused']} refused, {result['broken']} broken")
    return result["answers"] / result["seconds"], result["p99"], used / result["answers"] * 1e6


def check(cluster: Cluster, folder: str, answered: int) -> None:
    """End the benchmark if an event that was answered 200 is not stored and counted."""
    query = "SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM kyc_status)"
    ((events, people),) = cluster.execute(query, schema=cluster.schemas[folder])
    if events < answered or people != events:
        fail(f"{answered} events answered 200, {events} stored, {people} people")


def measure_all(seconds: int, rounds: int) -> Runs:
    """Return the figures of all rounds, by connections and server."""
    runs: Runs = {}
    with (
        contextlib.closing(Cluster(fsync="on")) as cluster,
        tempfile.NamedTemporaryFile(dir="/var/tmp") as requests,
    ):
        for process in cluster.processes():  # those that it starts later inherit that
            os.sched_setaffinity(process, CORES[1:] or CORES)
        path = Path(requests.name)
        for number in range(rounds):
            write_requests(path, SUPPLY * (seconds + 1))
            for connections in CONNECTIONS:
                for server in list(MODULES)[:: (-1) ** number]:
                    figures = measure(cluster, server, connections, seconds, path)
                    runs.setdefault((connections, server), []).append(figures)
                    print(
                        connections, server, *(f"{figure:,.0f}" for figure in figures), flush=True
                    )
    return runs


def report(runs: Runs, seconds: int, rounds: int) -> str:
    """Return POSTGRES.md."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        fsync = time_fsync(Path(folder))
    lines = ["# Results on PostgreSQL", "", "Written by `python bench/on_postgres.py`.", ""]
    lines += [
        f"- Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {len(CORES)} cores;"
        f" fdatasync of 4 KiB, idle: {fsync:.2f} ms",
        f"- Method: rounds: {rounds}, interleaved; {seconds} s a case after 1 s of warm-up;"
        " medians of the rounds, and medians of each round's ratios",
        "- Placement: the worker on one core; PostgreSQL and wrk on the others, alike for both",
        *("", "| figure | floor | aim | reached |", "| --- | --- | --- | --- |"),
    ]
    for words, connections, above, below, floor, aim in RATIOS:
        pairs = zip(runs[connections, above], runs[connections, below], strict=True)
        ratio = statistics.median(one[0] / other[0] for one, other in pairs)
        lines.append(f"| {words} | {floor} | {aim} | {ratio:.2f} |")
    lines += ["", "| connections | server | events/s | p99 ms | CPU µs/event |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for (connections, server), figures in sorted(runs.items()):
        rate, p99, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        lines.append(f"| {connections} | {server} | {rate:,.0f} | {p99:.1f} | {cpu:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    text = report(measure_all(given.seconds, given.rounds), given.seconds, given.rounds)
    (BENCH / "POSTGRES.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
