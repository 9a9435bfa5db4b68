"""Measure the service against bare Flask and the textbook design: python bench/run.py.

In each round every case starts a real gunicorn with the Procfile's flags, on a database of
its own, and sends it signed events that it has not seen. README.md says what is measured.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import platform
import random
import shutil
import signal
import socket
import sqlite3
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path.insert(0, str(ROOT))
os.environ["FLASK_RUN_FROM_CLI"] = "true"  # importing app starts no service
import app as kyc  # noqa: E402

SECRET = "wbhsec_benchmark"
WORKERS = 2
BODY_BYTES = 3500
WARM_UP_SECONDS = 1
SERVICE, BARE, TEXTBOOK = "this service", "bare Flask", "textbook"
MODULES = {SERVICE: "app", BARE: "bare", TEXTBOOK: "textbook"}
DISKS = {False: "real", True: "4 ms slower"}

# --------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One server under one load."""

    name: str  # one of MODULES
    connections: int
    slow: bool = False  # every fsync takes 4 ms more
    stored: bool = False  # the journal is filled beforehand
    kept: bool = False  # connections are kept alive, against the Procfile's flags


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


CASES = [
    Case(BARE, 16),
    Case(SERVICE, 16),
    Case(SERVICE, 16, stored=True),
    Case(TEXTBOOK, 16),
    *(Case(name, 16, kept=True) for name in (BARE, SERVICE, TEXTBOOK)),
    *(Case(name, count) for count in (1, 64) for name in (BARE, SERVICE, TEXTBOOK)),
    *(Case(name, count, slow=True) for count in (16, 64) for name in (SERVICE, TEXTBOOK)),
]


@dataclass
class Bench:
    """The settings of a benchmark, its files, and its results."""

    folder: Path
    seconds: int
    rounds: int
    stored: int
    worn: int  # events until a worker's memory is measured
    supply: int  # events a second that are prepared
    runs: dict[Case, list[Run]] = field(default_factory=dict)
    memory: list[tuple[int, float]] = field(default_factory=list)  # events of a worker, MB
    quick: bool = False

    @property
    def requests(self) -> Path:
        """The file of signed requests that wrk sends."""
        return self.folder / "requests"

    @property
    def shim(self) -> Path:
        """The library that makes fsync slower."""
        return self.folder / "slow_fsync.so"

    @property
    def full_database(self) -> Path:
        """The database that has events already."""
        return self.folder / "full" / "kyc.db"

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
    build_shim(bench.shim)
    say(f"filling a journal with {bench.stored:,} events")
    fill_database(bench.full_database, bench.stored)
    for number in range(1, bench.rounds + 1):
        write_requests(bench)
        for case in random.Random(number).sample(CASES, len(CASES)):
            run = measure(bench, case)
            bench.runs.setdefault(case, []).append(run)
            say(f"round {number}/{bench.rounds}: {describe_case(case)}: {describe_run(run)}")
    shutil.rmtree(bench.full_database.parent)
    measure_memory(bench)


def measure(bench: Bench, case: Case) -> Run:
    """Run one case once: start, warm up, load, stop, and check that nothing is missing."""
    with contextlib.ExitStack() as stack:
        if case.stored:
            database, before = bench.full_database, count_rows(bench.full_database)
            warm_cache(database)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=bench.folder))
            database, before = Path(folder) / "kyc.db", 0
        with Server(case.name, database, bench.shim if case.slow else None, case.kept) as server:
            warm_up = load(bench, server, case.connections, WARM_UP_SECONDS, skip=0)
            server.settle()
            used = server.cpu_seconds()
            result = load(bench, server, case.connections, bench.seconds, skip=bench.supply)
            server.settle()
            used = server.cpu_seconds() - used
            memory = server.memory()
        good = result["answers"] - result["refused"]
        check(case, (warm_up, result), database, before)
    return Run(
        rate=good / result["seconds"],
        p50=result["p50"],
        p99=result["p99"],
        cpu=used / good * 1e6,
        memory=memory,
        start=server.start_seconds,
        refused=result["refused"],
    )


def warm_cache(path: Path) -> None:
    """Have the kernel's cache hold a file as a running server fills it: in single pages."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # or it reads ahead, in large
        while file.read(256 * 1024):
            pass


def check(case: Case, loads: Iterable[dict], database: Path, before: int) -> None:
    """End the benchmark if an event was refused, lost or not counted.

    The textbook design may refuse: that is a result. Requests that are under way when wrk
    ends are stored without being counted, at most one a connection and load.
    """
    loads = list(loads)
    refused = sum(load["refused"] for load in loads)
    answered = sum(load["answers"] for load in loads) - refused
    broken = sum(load["broken"] for load in loads)
    if broken or (refused and case.name != TEXTBOOK):
        fail(f"{describe_case(case)}: {refused} events refused, {broken} connections broken")
    if case.name == BARE:
        return
    stored = count_rows(database) - before
    if not answered <= stored <= answered + len(loads) * case.connections:
        fail(f"{describe_case(case)}: {answered} events answered 200, but {stored} stored")
    if count_rows(database, "kyc_status") != stored + before:
        fail(f"{describe_case(case)}: kyc_status does not have a row for each event")


def measure_memory(bench: Bench) -> None:
    """Send events to one server for a long time; note the memory of its workers."""
    case = Case(SERVICE, 16)
    database = bench.folder / "worn" / "kyc.db"
    database.parent.mkdir()
    loads: list[dict] = []
    with Server(SERVICE, database) as server:
        bench.memory.append((0, server.memory()))
        while bench.memory[-1][0] < bench.worn:
            write_requests(bench)
            loads.append(load(bench, server, case.connections, bench.seconds, skip=0))
            events = sum(load["answers"] for load in loads) // WORKERS
            bench.memory.append((events, server.memory()))
            say(f"memory: {bench.memory[-1][1]:.1f} MB after {events:,} events a worker")
    check(case, loads, database, 0)


# --------------------------------------------------------------------------------------
# Servers and load
# --------------------------------------------------------------------------------------


class Server:
    """A gunicorn with the Procfile's flags, in a process group of its own."""

    def __init__(self, name: str, database: Path, preload: Path | None = None, kept: bool = False):
        self.log = database.with_name("gunicorn.log")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        environ = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        self.environ = environ | {
            "KYC_DATABASE": str(database),
            "PERSONA_WEBHOOK_SECRET": SECRET,
            "PERSONA_SIGNATURE_TOLERANCE": "0",  # the events are signed long before they are sent
            "WEB_CONCURRENCY": str(WORKERS),
            **({"LD_PRELOAD": str(preload)} if preload else {}),
        }
        flags = [flag.replace("app:app", f"{MODULES[name]}:app") for flag in procfile_flags()]
        bind = ["--bind", f"127.0.0.1:{self.port}", "--pythonpath", f"{ROOT},{BENCH}"]
        keep = ["--keep-alive", "2"] if kept else []
        self.command = [sys.executable, "-m", "gunicorn", *flags, *keep, *bind]
        if name == TEXTBOOK:
            textbook = [sys.executable, str(BENCH / "textbook.py")]
            subprocess.run(textbook, env=self.environ, check=True, timeout=60)

    def __enter__(self):
        """Start; return when both workers answer."""
        began = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environ,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while not self.answers():
                if self.process.poll() is not None or time.perf_counter() > began + 30:
                    fail(f"gunicorn did not start:\n{self.log.read_text()[-2000:]}")
                time.sleep(0.005)
            self.start_seconds = time.perf_counter() - began
            self.workers = self.find_workers()
            self.settle()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object):
        """Stop as a platform does, and let no process stay."""
        self.stop()

    def stop(self) -> None:
        """End the processes of this server, gently, then with force."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)

    def answers(self) -> bool:
        """Tell whether the server answers a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status in (200, 404)
        except OSError:
            return False
        finally:
            connection.close()

    def find_workers(self) -> list[int]:
        """Return the process IDs of the workers, when all have been started."""
        pid, deadline = self.process.pid, time.monotonic() + 10
        children: list[str] = []
        while len(children) != WORKERS:
            if time.monotonic() > deadline:
                fail(f"gunicorn has {len(children)} workers, not {WORKERS}")
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children]

    def settle(self) -> None:
        """Wait until the workers rest, at most 10 seconds."""
        deadline = time.monotonic() + 10
        before, now = -1.0, self.cpu_seconds()
        while now - before > 0.005 and time.monotonic() < deadline:
            time.sleep(0.2)
            before, now = now, self.cpu_seconds()

    def cpu_seconds(self) -> float:
        """Return the CPU time that the workers have used, user and system."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.workers)  # kernel's clock ID

    def memory(self) -> float:
        """Return the resident memory of the larger worker, in MB."""
        sizes = []
        for pid in self.workers:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            sizes += [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
        return max(sizes) * 1024 / 1e6


def procfile_flags() -> list[str]:
    """Return the arguments that the Procfile gives gunicorn."""
    command, *arguments = (ROOT / "Procfile").read_text().removeprefix("web:").split()
    assert command == "gunicorn"
    return arguments


def load(bench: Bench, server: Server, connections: int, seconds: int, skip: int) -> dict:
    """Send events for some seconds over some connections; return what wrk counted."""
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s"]
    size = len(next(signed_requests(1)))
    command = ["wrk", *options, "-s", str(BENCH / "post.lua"), f"http://127.0.0.1:{server.port}"]
    done = subprocess.run(
        [*command, "--", str(bench.requests), str(size), str(skip)],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    if done.returncode == 3:
        fail("the server took all events that were prepared: give a larger --supply")
    if done.returncode:
        fail(f"wrk failed: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------
# Events
# --------------------------------------------------------------------------------------


def write_requests(bench: Bench) -> None:
    """Write enough requests for a warm-up and a run, none like any before."""
    count = bench.supply * (WARM_UP_SECONDS + bench.seconds)
    with bench.requests.open("wb") as file:
        file.writelines(signed_requests(count))
        os.fsync(file.fileno())  # or the disk is still busy with them during the run


def signed_requests(count: int) -> Iterator[bytes]:
    """Yield HTTP requests, all of the same length."""
    now = int(time.time())
    for body, *_ in distinct_bodies(count):
        signature = kyc.sign(body, SECRET.encode(), "persona", now)["Persona-Signature"]
        yield (
            "POST /webhooks/persona HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "Content-Type: application/json; charset=utf-8\r\nAccept: */*\r\n"
            "Persona-Webhook-Attempts-Made: 1\r\nPersona-Webhook-Attempts-Left: 7\r\n"
            f"Persona-Signature: {signature}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body


def distinct_bodies(count: int) -> Iterator[tuple[bytes, str, str, str, str]]:
    """Yield bodies of BODY_BYTES with their event, inquiry, account and reference IDs."""
    letters = string.ascii_letters + string.digits
    marks = [prefix + mark * 24 for prefix, mark in zip(PREFIXES, "0123", strict=True)]
    body = build_body(*marks)
    for _ in range(count):
        digits = "".join(random.choices(letters, k=96))
        ids = [prefix + digits[24 * i : 24 * i + 24] for i, prefix in enumerate(PREFIXES)]
        text = body
        for mark, new in zip(marks, ids, strict=True):
            text = text.replace(mark, new)
        yield text.encode(), *ids


PREFIXES = ("evt_", "inq_", "act_", "user-")


def build_body(event: str, inquiry: str, account: str, reference: str) -> str:
    """Return an approval as `flask trigger` builds it, with more fields, BODY_BYTES long."""
    ids = {"event_id": event, "inquiry_id": inquiry, "account_id": account}
    document = kyc.build_event("inquiry.approved", reference_id=reference, **ids)
    attributes = document["data"]["attributes"]["payload"]["data"]["attributes"]
    attributes["note"] = ""
    for number in itertools.count(1):
        missing = BODY_BYTES - len(json.dumps(document))
        if missing < 100:
            break
        attributes["fields"][f"question-{number:02}"] = {"type": "string", "value": "answer " * 5}
    attributes["note"] = "-" * missing
    return json.dumps(document)


def fill_database(path: Path, count: int) -> None:
    """Make a database with `count` events, each of another inquiry and person."""
    path.parent.mkdir()
    kyc.prepare_database(path)
    bodies = distinct_bodies(count)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -500000")
        while rows := [stored_event(*ids) for ids in itertools.islice(bodies, 10_000)]:
            db.execute("BEGIN")
            for statement in FILL:
                db.executemany(statement, rows)
            db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("rb") as file:
        os.fsync(file.fileno())


def stored_event(body: bytes, event: str, inquiry: str, account: str, reference: str) -> dict:
    """Return what the tables hold of a body."""
    ids = {"event": event, "inquiry": inquiry, "account": account, "reference": reference}
    digest = kyc.hashlib.sha256(body).hexdigest()
    return ids | {"now": kyc.utc_now(), "digest": digest, "body": body.decode()}


FILL = (
    """
    INSERT INTO events (event_id, name, created_at, received_at, object_type, object_id,
        inquiry_id, account_id, reference_id, attempt, body_sha256, state, body)
    VALUES (:event, 'inquiry.approved', :now, :now, 'inquiry', :inquiry,
        :inquiry, :account, :reference, 1, :digest, 'processed', :body)
    """,
    """
    INSERT INTO inquiries
        (inquiry_id, reference_id, account_id, status, event_id, event_name, event_at)
    VALUES (:inquiry, :reference, :account, 'approved', :event, 'inquiry.approved', :now)
    """,
    """
    INSERT INTO kyc_status (reference_id, status, inquiry_id, account_id,
        event_id, event_name, event_at, updated_at)
    VALUES (:reference, 'approved', :inquiry, :account, :event, 'inquiry.approved', :now, :now)
    """,
)


def count_rows(database: Path, table: str = "events") -> int:
    """Return how many rows the journal or kyc_status has."""
    query = {
        "events": "SELECT count(*) FROM events",
        "kyc_status": "SELECT count(*) FROM kyc_status",
    }
    with contextlib.closing(sqlite3.connect(database)) as db:
        return db.execute(query[table]).fetchone()[0]


# --------------------------------------------------------------------------------------
# The machine
# --------------------------------------------------------------------------------------


def describe_machine(bench: Bench) -> dict[str, str]:
    """Return what the figures depend on, by name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("flask", "gunicorn"))
    usual, slow = fsync_milliseconds(bench.folder), fsync_milliseconds(bench.folder, bench.shim)
    return {
        "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "CPU": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "Memory": f"{memory:.1f} GiB",
        "Kernel": f"{platform.system()} {platform.release()}",
        "Software": f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        + packages,
        "File system": file_system(bench.folder),
        "fdatasync of 4 KiB, idle": f"{usual:.2f} ms; with the shim {slow:.2f} ms",
        "Idle before the start": f"{idle_percent(3):.0f} % of the CPU time",
        "Server": f"gunicorn {' '.join(procfile_flags())}, {WORKERS} workers",
        "Method": f"rounds: {bench.rounds}, interleaved; {bench.seconds} s a case after "
        f"{WARM_UP_SECONDS} s of warm-up; distinct signed events of {BODY_BYTES:,} bytes; "
        "medians of the rounds, and medians of each round's ratios",
    }


def idle_percent(seconds: int) -> float:
    """Return how idle the machine is; tell when it is not."""
    before = cpu_ticks()
    time.sleep(seconds)
    spent = [now - then for now, then in zip(cpu_ticks(), before, strict=True)]
    idle = (spent[3] + spent[4]) / sum(spent) * 100  # idle, and waiting for the disk
    if idle < 90:
        say(f"the machine is only {idle:.0f} % idle: the figures will be wrong")
    return idle


@contextlib.contextmanager
def watch_others(machine: dict[str, str]) -> Iterator[None]:
    """Note how much of the CPU time the block could not have, because others used it."""
    ticks, own = cpu_ticks(), sum(os.times()[:4])
    yield
    spent = [now - then for now, then in zip(cpu_ticks(), ticks, strict=True)]
    own = (sum(os.times()[:4]) - own) * os.sysconf("SC_CLK_TCK")
    busy = sum(spent) - spent[3] - spent[4] - spent[7]  # without idle, iowait and steal
    machine["Taken during the run"] = (
        f"{max(0, busy - own) / sum(spent) * 100:.0f} % of the CPU time by other processes and "
        f"the kernel, {spent[7] / sum(spent) * 100:.1f} % by other virtual machines"
    )


def cpu_ticks() -> list[int]:
    """Return how the kernel has spent its time: user, nice, system, idle, iowait ..."""
    first, *_ = Path("/proc/stat").read_text().splitlines()
    return [int(ticks) for ticks in first.split()[1:9]]


def cpu_model() -> str:
    """Return what the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def file_system(folder: Path) -> str:
    """Return the type of the file system that holds `folder`."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(above)[1]


def fsync_milliseconds(folder: Path, preload: Path | None = None) -> float:
    """Return how long fdatasync takes, in a process of its own."""
    code = "import sys, run; print(run.time_fsync(sys.argv[1]))"
    environ = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
    command = [sys.executable, "-c", code, str(folder / "probe")]
    return float(subprocess.check_output(command, env=environ, cwd=BENCH, timeout=60))


def time_fsync(path: str) -> float:
    """Return the median milliseconds that appending 4 KiB durably takes."""
    times = []
    with open(path, "wb", buffering=0) as file:
        for _ in range(200):
            file.write(bytes(4096))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def build_shim(library: Path) -> None:
    """Compile slow_fsync.c."""
    source = str(BENCH / "slow_fsync.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), source], check=True)


# --------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------


def write_report(bench: Bench, machine: dict[str, str]) -> str:
    """Return RESULTS.md."""
    title = "# Results of a quick trial, not to be quoted" if bench.quick else "# Results"
    parts = [
        f"{title}\n\nWritten by `python bench/run.py`; README.md says what is measured.",
        "\n".join(f"- {name}: {value}" for name, value in machine.items()),
        "## Targets\n\n" + table(("figure", "target", "reached", ""), list_targets(bench)),
        "## Speed\n\n"
        + table(RUN_HEADS, [run_row(bench, case) for case in sorted(CASES, key=order)]),
        "## Memory\n\n"
        + table(
            ("events of a worker", "resident MB"),
            [(f"{events:,}", f"{size:.1f}") for events, size in memory_steps(bench)],
        ),
        "## Start\n\n" + table(("server", "seconds to the first answer"), list_starts(bench)),
    ]
    return "\n\n".join(parts) + "\n"


RUN_HEADS = (
    *("server", "connections", "disk", "events/s", "÷ bare", "p50 ms", "p99 ms"),
    *("CPU µs/event", "resident MB", "refused"),
)


def order(case: Case) -> tuple[bool, int, bool]:
    """Return where a case stands in the table."""
    return case.slow, case.connections, case.kept


def run_row(bench: Bench, case: Case) -> tuple[str, ...]:
    """Return the row of one case."""
    run, bare = bench.median(case), Case(BARE, case.connections, kept=case.kept)
    refused = sum(run.refused for run in bench.runs[case])
    return (
        case.name
        + (f", {bench.stored:,} stored" if case.stored else "")
        + (", connections kept" if case.kept else ""),
        *(str(case.connections), DISKS[case.slow], f"{run.rate:,.0f}"),
        f"{bench.ratio('rate', case, bare):.2f}",
        *(f"{run.p50:.1f}", f"{run.p99:.1f}", f"{run.cpu:.0f}", f"{run.memory:.1f}"),
        str(refused),
    )


def list_targets(bench: Bench) -> list[tuple[str, str, str, str]]:
    """Return the targets, what was reached, and whether that is enough."""
    service, textbook, bare = (Case(name, 16) for name in (SERVICE, TEXTBOOK, BARE))
    slow = Case(SERVICE, 64, slow=True), Case(TEXTBOOK, 64, slow=True)
    full = Case(SERVICE, 16, stored=True)
    ratios = [
        ("events/s ÷ bare Flask, 16 connections", 0.60, ("rate", service, bare)),
        ("events/s ÷ textbook, 16 connections", 1.6, ("rate", service, textbook)),
        ("p99 of textbook ÷ p99 of this, 16 connections", 10, ("p99", textbook, service)),
        ("events/s ÷ textbook, 64 connections, 4 ms slower disk", 8, ("rate", *slow)),
        (f"events/s with {bench.stored:,} events stored ÷ none", 0.9, ("rate", full, service)),
    ]
    rows = []
    for figure, target, what in ratios:
        reached = bench.ratio(*what)
        rows.append((figure, f"≥ {target:g}", f"{reached:.2f}", verdict(reached >= target)))
    events, size = bench.memory[-1]
    growth = memory_growth(bench)
    what = f"resident MB of a worker after {events:,} events"
    rows.append((what, "≤ 45", f"{size:.1f}", verdict(size <= 45)))
    rows.append(
        ("its growth over the second half, MB", "≤ 0.5", f"{growth:.1f}", verdict(growth <= 0.5))
    )
    return rows


def memory_steps(bench: Bench) -> list[tuple[int, float]]:
    """Return about ten of the memory figures, the last included."""
    step = max(1, len(bench.memory) // 10)
    return bench.memory[::-step][::-1]


def memory_growth(bench: Bench) -> float:
    """Return by how many MB a worker grew during the second half of its events."""
    events, size = bench.memory[-1]
    half = next(memory for count, memory in bench.memory if count >= events / 2)
    return size - half


def list_starts(bench: Bench) -> list[tuple[str, str]]:
    """Return the seconds from start to first answer of each kind of server."""
    kinds = [
        (BARE, Case(BARE, 16)),
        (SERVICE, Case(SERVICE, 16)),
        (f"{SERVICE}, {bench.stored:,} stored", Case(SERVICE, 16, stored=True)),
    ]
    return [(name, f"{bench.median(case).start:.2f}") for name, case in kinds]


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(reached: bool) -> str:
    """Return a word for the table."""
    return "reached" if reached else "**missed**"


def describe_case(case: Case) -> str:
    """Return a case in words."""
    words = [case.name, f"{case.connections} connections", f"{DISKS[case.slow]} disk"]
    words += ["filled journal"] if case.stored else []
    words += ["connections kept"] if case.kept else []
    return ", ".join(words)


def describe_run(run: Run) -> str:
    """Return a run in words."""
    return (
        f"{run.rate:,.0f}/s, p50 {run.p50:.1f} ms, p99 {run.p99:.1f} ms, {run.cpu:.0f} µs, "
        f"{run.memory:.1f} MB, start {run.start:.2f} s"
    )


# --------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    number = {"type": positive, "metavar": "N"}
    parser.add_argument("--rounds", default=5, help="of all cases (default 5)", **number)
    parser.add_argument("--seconds", default=6, help="of each case (default 6)", **number)
    parser.add_argument(
        "--stored",
        default=1_000_000,
        help="events in the filled journal (default 1000000)",
        **number,
    )
    parser.add_argument(
        "--worn", default=100_000, help="events a worker gets in the memory run", **number
    )
    parser.add_argument(
        "--supply", default=10_000, help="events prepared for each second (default 10000)", **number
    )
    parser.add_argument("--quick", action="store_true", help="try it: two minutes, prints only")
    parser.add_argument(
        "--dir", default="/var/tmp", type=Path, help="on the disk to measure (default /var/tmp)"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 2
        arguments.stored, arguments.worn = 20_000, 10_000
    return arguments


def positive(text: str) -> int:
    """Return a number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def need(tool: str, package: str) -> None:
    """End with a clear line if a tool is missing."""
    if not shutil.which(tool):
        fail(f"{tool} is missing: install Debian's package {package}")


def say(line: str) -> None:
    """Tell how far the benchmark is."""
    print(line, file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """End the benchmark with a message."""
    sys.exit(f"bench: {message}")


def main() -> None:
    """Measure everything, and write RESULTS.md."""
    options = vars(read_arguments())
    need("wrk", "wrk")
    need("gcc", "gcc")
    signal.signal(signal.SIGTERM, lambda *_: fail("ended"))
    parent = options.pop("dir").resolve()
    if file_system(parent) in ("tmpfs", "ramfs"):
        fail("that folder is in memory, where fsync does nothing: give --dir a folder on a disk")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
        bench = Bench(Path(folder), **options)
        build_shim(bench.shim)
        machine = describe_machine(bench)
        with watch_others(machine):
            measure_all(bench)
    report = write_report(bench, machine)
    print(report)
    if not bench.quick:
        (BENCH / "RESULTS.md").write_text(report)


if __name__ == "__main__":
    main()
