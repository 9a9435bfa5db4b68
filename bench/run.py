"""Measure the service against bare Flask and the textbook design: python bench/run.py.

In each round every case starts a real gunicorn with the Procfile's flags, on a database of
its own, and sends it signed events that it has not seen. README.md says what is measured.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from clients import TOKEN
from events import BODY_BYTES, write_requests
from machine import describe_machine, file_system, watch_others
from server import BENCH, Server, environment, fail, procfile_flags

WARM_UP_SECONDS = 1
SERVICE, BARE, TEXTBOOK = "this service", "bare Flask", "textbook"
MODULES = {SERVICE: "app", BARE: "bare", TEXTBOOK: "textbook"}

# --------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One server under one load."""

    server: str  # one of MODULES
    connections: int = 16
    workers: int = 1
    slow: bool = False  # every fsync takes 4 ms more
    filled: bool = False  # the journal has events already
    pinned: bool = True  # one core a worker
    rate: int = 0  # events a second; 0: as many as it takes
    readers: bool | None = None  # of the API, the pages and the metrics; None: without a token

    def __str__(self) -> str:
        """Return the case in words; --only is matched against them."""
        words = [self.server, f"{self.connections} connection{'s' * (self.connections > 1)}"]
        words[1] = f"{self.rate} events/s" if self.rate else words[1]
        words += [f"{self.workers} workers"] if self.workers > 1 else []
        words += ["4 ms slower disk"] if self.slow else []
        words += ["filled journal"] if self.filled else []
        words += [] if self.pinned else ["not pinned"]
        words += [{None: "", False: "without readers", True: "with readers"}[self.readers]]
        return ", ".join(filter(None, words))


OURS, PLAIN, BOOK = Case(SERVICE), Case(BARE), Case(TEXTBOOK)
OURS_ALONE, PLAIN_ALONE, BOOK_ALONE = (Case(server, connections=1) for server in MODULES)
OURS_SLOW, BOOK_SLOW = (Case(server, connections=64, slow=True) for server in (SERVICE, TEXTBOOK))
OURS_TWICE = Case(SERVICE, workers=2)
OURS_FILLED = Case(SERVICE, filled=True)
READ = [  # each load without and with readers
    [Case(SERVICE, filled=True, rate=rate, readers=readers) for readers in (False, True)]
    for rate in (50, 500, 0)
]
CASES = [
    *(PLAIN, OURS, BOOK, OURS_TWICE, OURS_FILLED),
    *(PLAIN_ALONE, OURS_ALONE, BOOK_ALONE),
    *(OURS_SLOW, BOOK_SLOW),
    *(Case(BARE, count, pinned=False) for count in (16, 1)),
    *(Case(TEXTBOOK, count, pinned=False) for count in (16, 1)),
    *(case for pair in READ for case in pair),
]
MEMORY = "memory"  # what --only calls the long run

# In words; its floor and its aim; which figure of which case, divided by that of which other.
RATIOS = [
    ("events/s ÷ bare Flask, 16 connections", 0.45, 0.6, "rate", OURS, PLAIN),
    ("events/s ÷ textbook, 16 connections", 1.35, 1.8, "rate", OURS, BOOK),
    ("p99 of textbook ÷ p99 of this, 16 connections", 15, 35, "p99", BOOK, OURS),
    ("events/s ÷ textbook, 1 connection", 0.6, 0.8, "rate", OURS_ALONE, BOOK_ALONE),
    ("events/s ÷ textbook, 4 ms slower disk, 64 connections", 8, 12, "rate", OURS_SLOW, BOOK_SLOW),
    ("events/s of two workers ÷ one, 16 connections", 1.15, 1.4, "rate", OURS_TWICE, OURS),
    ("events/s with a filled journal ÷ an empty one", 0.75, 0.9, "rate", OURS_FILLED, OURS),
]
MEMORY_FLOOR, MEMORY_AIM = 45, 38  # MB; less is better


@dataclass
class Run:
    """What one case gave in one round, or the medians of all rounds."""

    rate: float  # events that were answered 200, a second
    p50: float  # milliseconds
    p99: float
    cpu: float  # microseconds an event, user and system, of the workers
    memory: float  # resident MB of the larger worker, afterwards
    start: float  # seconds from the start to the first answer
    refused: int  # answers other than 200
    reads: float  # answers 200 to readers, a second


@dataclass
class Bench:
    """The settings of a benchmark, its files, and its results."""

    folder: Path
    seconds: int
    rounds: int
    stored: int
    worn: int
    supply: int
    quick: bool
    only: re.Pattern[str]
    runs: dict[Case, list[Run]] = field(default_factory=dict)
    memory: list[tuple[int, float]] = field(default_factory=list)  # events, resident MB

    def __post_init__(self):
        self.requests = self.folder / "requests"  # what wrk sends
        self.shim = self.folder / "slow_fsync.so"
        self.filled = self.folder / "filled" / "kyc.db"
        self.cases = [case for case in CASES if self.only.search(str(case))]

    def median(self, case: Case) -> Run:
        """Return the medians of a case."""
        columns = zip(*(vars(run).values() for run in self.runs[case]), strict=True)
        return Run(*map(statistics.median, columns))

    def ratio(self, figure: str, above: Case, below: Case) -> float:
        """Return the median, over the rounds, of a figure of one case divided by another's."""
        pairs = zip(self.runs[above], self.runs[below], strict=True)
        return statistics.median(getattr(a, figure) / getattr(b, figure) for a, b in pairs)


def measure_all(bench: Bench) -> None:
    """Run every case once a round, in another order each, then the long run for memory."""
    if any(case.filled for case in bench.cases):
        say(f"filling a journal with {bench.stored:,} events")
        bench.filled.parent.mkdir()
        command = [sys.executable, str(BENCH / "fill.py"), str(bench.stored)]
        subprocess.run(command, env=environment(bench.filled), check=True)
    for number in range(1, bench.rounds + 1):
        for case in random.Random(number).sample(bench.cases, len(bench.cases)):
            run = measure(bench, case)
            bench.runs.setdefault(case, []).append(run)
            say(f"round {number}/{bench.rounds}: {case}: {run.rate:,.0f}/s, p99 {run.p99:.1f} ms")
    if bench.only.search(MEMORY):
        measure_memory(bench)


def measure(bench: Bench, case: Case) -> Run:
    """Run one case once: start, warm up, load, stop, and check that nothing is missing."""
    with contextlib.ExitStack() as stack:
        if case.filled or not bench.requests.exists():  # no journal gets an event twice
            write_requests(bench.requests, bench.supply * (WARM_UP_SECONDS + bench.seconds))
        if case.filled:
            database, before = bench.filled, count_rows(bench.filled)[0]
            warm_cache(database)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=bench.folder))
            database, before = Path(folder) / "kyc.db", 0
        with start(bench, case, database) as server:
            warm_up = server.load(bench.requests, 0, case.connections, WARM_UP_SECONDS)
            used = server.cpu_seconds()
            with read(server, case, bench.seconds) as reads:
                load = (bench.requests, bench.supply, case.connections, bench.seconds, case.rate)
                result = server.load(*load)
            used = server.cpu_seconds() - used
            memory = server.memory()
        check(case, [warm_up, result], database, before)
    refused = result["refused"]
    good = result["answers"] - refused
    rate, cpu = good / result["seconds"], used / good * 1e6
    answered = (reads["answers"] - reads["refused"]) / reads["seconds"] if reads else 0
    times = result["p50"], result["p99"]
    return Run(rate, *times, cpu, memory, server.start_seconds, refused, answered)


def read(server: Server, case: Case, seconds: int) -> AbstractContextManager[dict]:
    """Let the readers of a case read beside the block."""
    return server.readers(seconds) if case.readers else contextlib.nullcontext({})


def start(bench: Bench, case: Case, database: Path) -> Server:
    """Return the server of a case, to be entered."""
    if case.server == TEXTBOOK:
        command = [sys.executable, str(BENCH / "textbook.py")]
        subprocess.run(command, env=environment(database), check=True, timeout=60)
    preload = bench.shim if case.slow else None
    token = "" if case.readers is None else TOKEN
    return Server(MODULES[case.server], database, case.workers, case.pinned, preload, token)


def measure_memory(bench: Bench) -> None:
    """Send events to one worker for a long time; note its memory."""
    database = bench.folder / "worn" / "kyc.db"
    database.parent.mkdir()
    loads: list[dict] = []
    events = 0
    write_requests(bench.requests, bench.worn + bench.supply * (bench.seconds + 1))
    with start(bench, OURS, database) as server:
        bench.memory.append((0, server.memory()))
        while events < bench.worn:
            sent = events + len(loads) * OURS.connections  # some had no answer before a load ended
            loads.append(server.load(bench.requests, sent, OURS.connections, bench.seconds))
            events += loads[-1]["answers"]
            bench.memory.append((events, server.memory()))
            say(f"memory: {server.memory():.1f} MB after {events:,} events")
    check(OURS, loads, database, 0)


def warm_cache(path: Path) -> None:
    """Have the kernel's cache hold a file as a running server fills it: in single pages."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # or it reads ahead, in large
        while file.read(256 * 1024):
            pass


def check(case: Case, loads: list[dict], database: Path, before: int) -> None:
    """End the benchmark if an event was refused, lost or not counted.

    The textbook design may refuse: that is a result. Requests that are under way when wrk
    ends are stored without being counted, at most one a connection and load.
    """
    refused = sum(load["refused"] for load in loads)
    answered = sum(load["answers"] for load in loads) - refused
    broken = sum(load["broken"] for load in loads)
    if broken or (refused and case.server != TEXTBOOK):
        fail(f"{case}: {refused} events refused, {broken} connections broken")
    if case.server == BARE:
        return
    events, people = count_rows(database)
    if not answered <= events - before <= answered + len(loads) * case.connections:
        fail(f"{case}: {answered} events answered 200, but {events - before} stored")
    if people != events:
        fail(f"{case}: kyc_status does not have a row for each event")


def count_rows(database: Path) -> tuple[int, int]:
    """Return how many rows the journal and kyc_status have."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        query = "SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM kyc_status)"
        return db.execute(query).fetchone()


# --------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------


def compose_report(bench: Bench, machine: dict[str, str]) -> str:
    """Return RESULTS.md."""
    title = "# Results of a trial, not to be quoted" if is_trial(bench) else "# Results"
    figures = "case", "events/s", "p50 ms", "p99 ms", "CPU µs/event", "MB", "start s", "refused"
    sides = "without", "with readers"
    heads = [f"{name} {side}" for name in ("p99 ms", "p50 ms", "events/s") for side in sides]
    memory = [(f"{events:,}", f"{size:.1f}") for events, size in bench.memory]
    tables = {
        "Targets": [("figure", "floor", "aim", "reached", ""), *list_targets(bench)],
        "Cases": [figures, *(case_row(bench, case) for case in bench.cases if not case.readers)],
        "Deliveries while others read": [
            ("filled journal", *heads, "reads/s"),
            *(pair_row(bench, *pair) for pair in READ if set(pair) <= bench.runs.keys()),
        ],
        "Memory of one worker": [("events", "resident MB"), *memory],
    }
    parts = [
        f"{title}\n\nWritten by `python bench/run.py`; README.md says what is measured.",
        "\n".join(f"- {name}: {value}" for name, value in machine.items()),
        *(f"## {head}\n\n{table(rows)}" for head, rows in tables.items() if len(rows) > 1),
    ]
    return "\n\n".join(parts) + "\n"


def describe_method(bench: Bench) -> dict[str, str]:
    """Return how the figures are taken, by name."""
    return {
        "Server": f"gunicorn {' '.join(procfile_flags())}; one worker unless said",
        "Placement": "one core a worker, wrk on the others if there are any, unless said",
        "Filled journal": f"{bench.stored:,} events",
        "Method": f"rounds: {bench.rounds}, interleaved; {bench.seconds} s a case after "
        f"{WARM_UP_SECONDS} s of warm-up; distinct signed events of {BODY_BYTES:,} bytes; "
        "medians of the rounds, and medians of each round's ratios",
    }


def list_targets(bench: Bench) -> list[tuple[str, ...]]:
    """Return the row of each target that was measured."""
    rows = []
    for words, floor, aim, figure, above, below in RATIOS:
        if above in bench.runs and below in bench.runs:
            reached = bench.ratio(figure, above, below)
            verdict = judge(reached, floor, aim)
            rows.append((words, f"≥ {floor:g}", f"{aim:g}", f"{reached:.2f}", verdict))
    if bench.memory:
        events, size = bench.memory[-1]
        words = f"resident MB of a worker after {events:,} events"
        verdict = judge(-size, -MEMORY_FLOOR, -MEMORY_AIM)
        rows.append((words, f"≤ {MEMORY_FLOOR}", str(MEMORY_AIM), f"{size:.1f}", verdict))
    return rows


def judge(reached: float, floor: float, aim: float) -> str:
    """Return a word for the table; more is better."""
    return "aim" if reached >= aim else "floor" if reached >= floor else "**missed**"


def case_row(bench: Bench, case: Case) -> tuple[str, ...]:
    """Return the row of one case."""
    run, refused = bench.median(case), sum(run.refused for run in bench.runs[case])
    return (
        *(str(case), f"{run.rate:,.0f}", f"{run.p50:.1f}", f"{run.p99:.1f}", f"{run.cpu:.0f}"),
        *(f"{run.memory:.1f}", f"{run.start:.2f}", str(refused)),
    )


def pair_row(bench: Bench, without: Case, reading: Case) -> tuple[str, ...]:
    """Return the row of a load without and with readers."""
    runs = bench.median(without), bench.median(reading)
    figures = [f"{getattr(run, name):,.1f}" for name in ("p99", "p50") for run in runs]
    words = f"{without.rate} events/s" if without.rate else f"{without.connections} connections"
    return words, *figures, *(f"{run.rate:,.0f}" for run in runs), f"{runs[1].reads:,.0f}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; the first row has the heads."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------

NUMBERS = {
    "rounds": (5, "rounds of all cases"),
    "seconds": (6, "seconds of load for each case"),
    "stored": (1_000_000, "events in the filled journal"),
    "worn": (100_000, "events until a worker's memory is measured"),
    "supply": (10_000, "events prepared for each second"),
}
QUICK = {"rounds": 1, "seconds": 2, "stored": 20_000, "worn": 10_000}


def read_arguments() -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, (default, words) in NUMBERS.items():
        words = f"{words} (default {default})"
        parser.add_argument(f"--{name}", default=default, type=int, metavar="N", help=words)
    words = "on the disk to measure (default /var/tmp)"
    parser.add_argument("--dir", default="/var/tmp", type=Path, help=words)
    words = f"only what matches, and print only: a case, or {MEMORY}"
    parser.add_argument("--only", default="", type=pattern, metavar="REGEX", help=words)
    parser.add_argument("--quick", action="store_true", help="try it: three minutes, prints only")
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def pattern(text: str) -> re.Pattern[str]:
    """Return a compiled regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def is_trial(bench: Bench) -> bool:
    """Tell whether the results must not replace RESULTS.md."""
    return bench.quick or bool(bench.only.pattern)


def say(line: str) -> None:
    """Tell how far the benchmark is."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure everything, and write RESULTS.md."""
    options = vars(read_arguments())
    for tool in ("wrk", "gcc"):
        if not shutil.which(tool):
            fail(f"{tool} is missing: apt install {tool}")
    signal.signal(signal.SIGTERM, lambda *_: fail("ended"))
    parent = options.pop("dir").resolve()
    if file_system(parent) in ("tmpfs", "ramfs"):
        fail("that folder is in memory, where fsync does nothing: give --dir a folder on a disk")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
        bench = Bench(Path(folder), **options)
        if not bench.cases and not bench.only.search(MEMORY):
            fail("--only matches nothing; the cases are:\n" + "\n".join(map(str, CASES)))
        source = str(BENCH / "slow_fsync.c")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", bench.shim, source], check=True)
        machine = describe_machine(bench.folder, bench.shim) | describe_method(bench)
        with watch_others(machine):
            measure_all(bench)
    report = compose_report(bench, machine)
    print(report)
    if not is_trial(bench):
        (BENCH / "RESULTS.md").write_text(report)


if __name__ == "__main__":
    main()
