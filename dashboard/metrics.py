"""GET /metrics: Prometheus text, the same from whichever worker answers.

What the database holds is counted there. What happened (deliveries, rejections, commits) each
worker counts from its own log lines, and adds to a small SQLite file that all of them share,
<database>.counts, once a second at most; a killed worker loses that second. The file outlives
reloads, and may be deleted: counting then begins anew, as Prometheus expects of counters.
"""

import atexit
import collections
import contextlib
import logging
import os
import queue
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flask import Blueprint, Flask, Response, current_app

import app as kyc
from dashboard import queries

routes = Blueprint("metrics", __name__)

WORD = r'(?:"(?:[^"\\]|\\.)*"|\S+)'  # of a log line, as kyc.quote writes it
DELIVERY = re.compile(rf"^event={WORD} name={WORD} outcome=(\w+)", re.M)
FAULT = re.compile(r"^outcome=(unavailable|error) ", re.M)
REJECTION = re.compile(rf"^outcome=rejected stale=\w+ reason=({WORD})", re.M)
REASONS = 40  # of rejections; more become one
FAULTS = {"unavailable": "kyc_unavailable_total", "error": "kyc_errors_total"}
DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)

OUTCOMES = ("stored", "duplicate", "unrecognized", "failed", "unavailable")
FIRST = [  # counts that are there before the first of their kind, so that a rate sees it
    ("kyc_commits_total", ""),
    ("kyc_commit_seconds_total", ""),
    *((name, "") for name in FAULTS.values()),
    *(("kyc_deliveries_total", outcome) for outcome in OUTCOMES),
    ("kyc_rejected_total", "no signature matches the body"),
    ("kyc_rejected_total", "the Persona-Signature header is missing"),
    ("kyc_rejected_total", "timestamp is stale"),
]
LABELS = {"kyc_deliveries_total": "outcome", "kyc_rejected_total": "reason"}
HELP = {  # name -> type and words, in the order of the answer
    "kyc_info": "gauge The release that runs.",
    "kyc_stored_total": "counter Events in the journal.",
    "kyc_events": "gauge Events by state (failed: their handlers; pending: not run) and source.",
    "kyc_last_delivery_age_seconds": "gauge Age of the newest event that Persona delivered.",
    "kyc_people": "gauge People by status.",
    "kyc_held_people": "gauge People with a hold.",
    "kyc_forward_waiting": "gauge Changes that flask forward has not delivered yet.",
    "kyc_forward_waiting_seconds": "gauge Age of the oldest of them.",
    "kyc_deliveries_total": "counter Authentic deliveries, by what became of them.",
    "kyc_rejected_total": "counter Requests that were not accepted, by reason.",
    "kyc_unavailable_total": "counter Deliveries that were answered 503.",
    "kyc_errors_total": "counter Requests that met an error of the service and were answered 500.",
    "kyc_commits_total": "counter Commits of deliveries.",
    "kyc_commit_seconds_total": "counter Seconds that these commits took.",
    "kyc_database_bytes": "gauge Size of the database.",
    "kyc_wal_bytes": "gauge Size of its write-ahead log.",
    "kyc_free_bytes": "gauge Free space on its disk.",
}
ADD = """
    INSERT INTO counts (name, label, total) VALUES (?, ?, ?)
    ON CONFLICT DO UPDATE SET total = total + excluded.total
"""
CREATE = """
    CREATE TABLE IF NOT EXISTS counts (
        name TEXT NOT NULL, label TEXT NOT NULL, total REAL NOT NULL, PRIMARY KEY (name, label)
    ) STRICT
"""

Key = tuple[str, str]  # name of a metric, value of its label
Sample = tuple[str, dict[str, str], float]


class Counts(logging.Handler):
    """Counts what this process logs, and adds it to the file of all processes.

    A thread does the counting, a second after a line was logged; it belongs to the process that
    logs first after a fork. When the file cannot be written, what this process counted is shown.
    """

    def __init__(self, app: Flask):
        super().__init__()
        self.journal = app.extensions["journal"]
        database = app.config["KYC"].database
        place = database if isinstance(database, Path) else kyc.HERE / "kyc"
        self.path = Path(f"{place}.counts")
        self.reset()

    def start(self) -> None:
        """Listen to the log of the service."""
        os.register_at_fork(after_in_child=self.reset)
        atexit.register(self.save)
        kyc.log.addHandler(self)

    def reset(self) -> None:
        """Start from nothing, as a process does that has just been forked."""
        self.saving = threading.Lock()
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.own: collections.Counter[Key] = collections.Counter()  # since this process began
        self.saved: collections.Counter[Key] = collections.Counter()  # the part that is in the file
        self.shared = True  # the file could be written the last time

    def emit(self, record: logging.LogRecord) -> None:
        """Take a log record; the thread looks at it later."""
        self.lines.put(record.getMessage())
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self.run, daemon=True)
            with contextlib.suppress(RuntimeError):  # the process is ending
                self.thread.start()

    def run(self) -> None:
        """Save again and again, but only after something was logged."""
        while True:
            self.lines.put(self.lines.get())  # waits for a line
            time.sleep(1.0)
            self.save()

    def save(self) -> None:
        """Count what was logged since the last time, and add it to the file."""
        with self.saving:
            with contextlib.suppress(queue.Empty):
                while True:
                    self.count(self.lines.get_nowait())
            self.own["kyc_commits_total", ""] = self.journal.commits
            self.own["kyc_commit_seconds_total", ""] = self.journal.commit_seconds
            try:
                with contextlib.closing(sqlite3.connect(self.path, timeout=1.0)) as db, db:
                    db.execute("PRAGMA synchronous = OFF")
                    db.execute(CREATE)
                    new = {key: self.own[key] - self.saved[key] for key in self.own}
                    db.executemany(ADD, [(*key, number) for key, number in new.items() if number])
                self.saved, self.shared = self.own.copy(), True
            except sqlite3.Error as error:
                self.shared = False
                if getattr(error, "sqlite_errorcode", None) in DAMAGED:
                    self.path.unlink(missing_ok=True)

    def count(self, text: str) -> None:
        """Count what some log lines say."""
        for outcome in DELIVERY.findall(text):
            self.own["kyc_deliveries_total", outcome] += 1
        for word in REJECTION.findall(text):
            reason = word.strip('"').partition(":")[0]
            known = sum(1 for name, _ in self.own if name == "kyc_rejected_total")
            new = ("kyc_rejected_total", reason) not in self.own
            self.own["kyc_rejected_total", "other" if new and known >= REASONS else reason] += 1
        for outcome in FAULT.findall(text):
            self.own[FAULTS[outcome], ""] += 1

    def read(self) -> dict[Key, float]:
        """Return the totals of all processes; of this one alone when there is no file."""
        with contextlib.suppress(sqlite3.Error):
            if self.shared:
                address = f"{self.path.as_uri()}?mode=ro"
                with contextlib.closing(sqlite3.connect(address, uri=True, timeout=0.25)) as db:
                    rows = db.execute("SELECT name, label, total FROM counts").fetchall()
                return {(name, label): total for name, label, total in rows}
        return dict(self.own)


@routes.get("/metrics")
def show_metrics() -> Response:
    """Return all samples as Prometheus text."""
    samples = collections.defaultdict(list)
    for name, labels, value in [*count_database(), *count_past(), *measure_files()]:
        pairs = ",".join(f'{key}="{escape(label)}"' for key, label in labels.items())
        samples[name].append(f"{name}{{{pairs}}} {value}" if pairs else f"{name} {value}")
    lines = []
    for name, words in HELP.items():
        kind, _, text = words.partition(" ")
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples[name]]
    return Response(
        "\n".join(lines) + "\n", content_type="text/plain; version=0.0.4; charset=utf-8"
    )


def escape(label: str) -> str:
    """Return the value of a label as the format quotes it."""
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def count_database() -> Iterator[Sample]:
    """Yield what the database holds."""
    with queries.reading() as db:
        counts, stored = queries.count_all(db), db.execute(queries.NEWEST).fetchone()[0]
        last, forwarding = queries.read_last_delivery(db), queries.read_forwarding(db)
    yield "kyc_info", {"version": kyc.VERSION}, 1
    yield "kyc_stored_total", {}, stored
    for (state, source), number in sorted(counts["events"].items()):
        yield "kyc_events", {"state": state, "source": source}, number
    if last:
        yield "kyc_last_delivery_age_seconds", {}, measure_age(last)
    if forwarding:
        yield "kyc_forward_waiting", {}, forwarding["waiting"] or 0
        yield "kyc_forward_waiting_seconds", {}, measure_age(forwarding["since"])
    for status, number in counts["people"].items():
        yield "kyc_people", {"status": status}, number
    yield "kyc_held_people", {}, counts["held"]


def measure_age(time: str | None) -> float:
    """Return how many seconds ago a time of the tables is; 0 for none."""
    age = datetime.now(UTC) - datetime.fromisoformat(time) if time else timedelta()
    return max(age.total_seconds(), 0)


def count_past() -> Iterator[Sample]:
    """Yield what was counted as it happened."""
    totals = dict.fromkeys(FIRST, 0.0) | current_app.extensions["counts"].read()
    for (name, label), total in totals.items():
        yield name, {LABELS[name]: label} if name in LABELS else {}, total


def measure_files() -> Iterator[Sample]:
    """Yield the sizes of files; stat() only, for closing one would drop SQLite's locks."""
    path = current_app.config["KYC"].database
    if not isinstance(path, Path):
        return
    with contextlib.suppress(OSError):
        disk = os.statvfs(path.parent)
        yield "kyc_free_bytes", {}, disk.f_bavail * disk.f_frsize
        yield "kyc_database_bytes", {}, path.stat().st_size
        yield "kyc_wal_bytes", {}, path.with_name(path.name + "-wal").stat().st_size
