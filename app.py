"""Receive Persona's webhooks: a journal of every event, and the KYC status of every person.

The way of an event, which is also the order of this file:

    POST body -> verify(raw bytes, header) -> read_event
              -> journal + project + dispatch, one transaction -> fsync -> 200

Configuration, by environment: PERSONA_WEBHOOK_SECRET or PERSONA_WEBHOOK_SECRET_FILE,
PERSONA_SIGNATURE_TOLERANCE, PERSONA_SIGNATURE_SCHEME, KYC_DATABASE, MAX_BODY_BYTES;
PORT and WEB_CONCURRENCY belong to gunicorn. README.md explains each.
"""

import atexit
import codecs
import contextlib
import errno
import fcntl
import functools
import hashlib
import hmac
import itertools
import json
import logging
import os
import queue
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import string
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import click
from flask import Blueprint, Flask, Response, current_app, request
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge

log = logging.getLogger("kyc")

# --------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------

DEVELOPMENT_SECRET = "wbhsec_development_only"
SCHEMES = ("persona", "split", "body")


class ConfigError(ValueError):
    """A setting makes no sense; the message names the variable."""


@dataclass(frozen=True)
class Config:
    """What the environment says, checked once at start."""

    secrets: tuple[bytes, ...]
    tolerance: int  # seconds; 0 switches the check off
    scheme: str  # one of SCHEMES
    database: Path
    max_body_bytes: int


def read_config(environ: Mapping[str, str]) -> Config:
    """Return the configuration in `environ`; raise ConfigError naming what is wrong.

    An absent secret is left to the caller: the service refuses to start without one,
    the commands do not need one.
    """
    scheme = environ.get("PERSONA_SIGNATURE_SCHEME", "persona")
    if scheme not in SCHEMES:
        raise ConfigError(f"PERSONA_SIGNATURE_SCHEME must be one of {', '.join(SCHEMES)}")
    database = environ.get("KYC_DATABASE", "kyc.db")
    if not database or database.endswith("/") or database == ":memory:":
        raise ConfigError("KYC_DATABASE must be the path of a file")
    return Config(
        secrets=read_secrets(environ),
        tolerance=read_number(environ, "PERSONA_SIGNATURE_TOLERANCE", 300, 0, 10**9),
        scheme=scheme,
        database=Path(os.path.realpath(database)),  # SQLite puts the WAL where a link leads
        max_body_bytes=read_number(environ, "MAX_BODY_BYTES", 2 * 1024 * 1024, 1, 500_000_000),
    )


def read_number(environ: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """Return the whole number in variable `name`, or `default` when it is not set."""
    value = environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,18}", value) or not low <= int(value) <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}")
    return int(value)


def read_secrets(environ: Mapping[str, str]) -> tuple[bytes, ...]:
    """Return the webhook secrets, separated by commas or white space; () when not set."""
    path = environ.get("PERSONA_WEBHOOK_SECRET_FILE")
    if path is None:
        text = os.fsencode(environ.get("PERSONA_WEBHOOK_SECRET", ""))
    elif "PERSONA_WEBHOOK_SECRET" in environ:
        raise ConfigError("PERSONA_WEBHOOK_SECRET and PERSONA_WEBHOOK_SECRET_FILE are both set")
    else:
        try:
            text = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a path"
            raise ConfigError(f"PERSONA_WEBHOOK_SECRET_FILE cannot be read: {reason}") from None
    text = text.removeprefix(codecs.BOM_UTF8)
    return tuple(filter(None, re.split(rb"[,\s]+", text)))


# --------------------------------------------------------------------------------------
# Database
# --------------------------------------------------------------------------------------

SCHEMA = Path(__file__).with_name("schema.sql")
SCHEMA_VERSION = 1
PROBE = "PRAGMA application_id = 0"  # a commit that changes nothing
BUSY_SECONDS = 3.0  # how long SQLite waits for a lock that another process holds


class DatabaseError(Exception):
    """The database cannot be used; the message says why."""


class TransactionLostError(Exception):
    """A handler undid the whole transaction or keeps it open, its neighbours' events included."""


class DatabaseBusyError(DatabaseError):
    """The database cannot be used for now."""


OBSTACLES = {  # what SQLite says when the disk or another process is in the way
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR),
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB),
    *(sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL),
}


def is_obstacle(error: BaseException) -> bool:
    """Tell whether the disk, the file or another process is to blame, and no event."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in OBSTACLES
    return isinstance(error, OSError | DatabaseError)


def connect(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
    """Open the existing database at `path`; rows are read by name.

    Raises DatabaseError when there is none, or it is of another kind or version.
    """
    try:
        db = sqlite3.connect(
            f"{path.as_uri()}?mode={'ro' if readonly else 'rw'}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        db.row_factory = sqlite3.Row
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if not readonly:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA secure_delete = ON")
    except sqlite3.Error as error:
        raise DatabaseError(str(error) if path.exists() else "there is no such file") from None
    if version > SCHEMA_VERSION:
        raise DatabaseError("the file was made by a newer release of this service")
    return db


def prepare_database(path: Path) -> None:
    """Create the database if there is none, mode 0600, and bring its schema up to date.

    Raises DatabaseError when that cannot be done; DatabaseBusyError when there are events
    already, and only something is in the way of them.
    """
    schema = SCHEMA.read_text()
    if is_gone(path):
        raise DatabaseBusyError("the file is gone, but its WAL is there: bring it back")
    try:
        for file in (path, lock_path(path)):
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        with write_lock(path), contextlib.closing(connect(path)) as db:
            apply_schema(db, path, schema)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the new files' names must last, too
        os.close(directory)
    except OSError as error:
        raise DatabaseError(error.strerror) from None
    except (sqlite3.Error, DatabaseBusyError) as error:
        kind = DatabaseBusyError if is_obstacle(error) and is_prepared(path) else DatabaseError
        raise kind(str(error)) from None


def apply_schema(db: sqlite3.Connection, path: Path, schema: str) -> None:
    """Bring an open database up to date, and try whether it takes events."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version:
        db.execute(JOURNAL_STATE).fetchone()  # fails here on another application's file
    elif db.execute("SELECT EXISTS (SELECT 1 FROM sqlite_schema)").fetchone()[0]:
        raise DatabaseError("the file belongs to another application")
    if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise DatabaseError("its disk does not support WAL")
    if version < SCHEMA_VERSION:
        db.executescript("BEGIN IMMEDIATE;" + schema + "COMMIT;")
    with transaction(db):
        db.execute(PROBE)  # fails here, not at the first event, when read-only
    db.execute("PRAGMA busy_timeout = 0")  # a reader must not hold up the other workers
    checkpoint(db, path, EMPTY_WAL)  # of what a killed process redacted


def is_gone(path: Path) -> bool:
    """Tell whether a database was taken away from its WAL."""
    return not os.path.exists(path) and os.path.exists(wal_paths(path)[0])


def is_prepared(path: Path) -> bool:
    """Tell whether the database at `path` has its schema."""
    try:
        with contextlib.closing(connect(path)) as db:
            return db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
    except (DatabaseError, sqlite3.Error):
        return False


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Run the block as one write transaction: committed and fsynced, or rolled back."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        conclude(db, "COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite has rolled back by itself when the disk is full
            db.execute("ROLLBACK")
        raise


def conclude(db: sqlite3.Connection, statement: str) -> None:
    """End a transaction or savepoint; nobody else can be in the way of who holds the lock."""
    try:
        db.execute(statement)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise TransactionLostError("a handler left a statement open") from None
        raise


COPY_WAL = "PRAGMA wal_checkpoint"  # as far as readers allow
RESTART_WAL = "PRAGMA wal_checkpoint(RESTART)"  # all of it: the next commit starts it anew
EMPTY_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"  # the same, and cut the file to nothing


def checkpoint(db: sqlite3.Connection, path: Path, statement: str) -> tuple[int, int, int]:
    """Copy the WAL of the database at `path` into it, and sync.

    Return whether somebody was in the way, the pages of the WAL, and how many are copied.
    Raises sqlite3.Error; then all is copied again the next time.
    """
    try:
        return db.execute(statement).fetchone()
    except sqlite3.Error:
        copy_again(path)
        raise


def copy_again(path: Path) -> None:
    """Have all of the WAL copied once more, also what SQLite counts as copied.

    The kernel reports a failed write-back once to each open file. What it has lost, the next
    sync does not miss. SQLite has the WAL index open: to open it here, and close it, would end
    SQLite's locks. Without /proc nothing is done.
    """
    for descriptor in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # it is gone, or only names the file
            if descriptor.samefile(wal_paths(path)[1]):
                reset_copied(int(descriptor.name))


def reset_copied(index: int) -> None:
    """Set the count of copied pages in a WAL index to zero, when no checkpoint is under way.

    The count is at byte 96, and the lock of checkpoints at byte 121: see
    https://sqlite.org/walformat.html. Who holds that lock for three seconds meets the error, too.
    """
    for _ in range(300):
        with contextlib.suppress(BlockingIOError):
            lock_range(index, "F_OFD_SETLK", fcntl.F_WRLCK, 121, 1)
            os.pwrite(index, bytes(4), 96)
            lock_range(index, "F_OFD_SETLK", fcntl.F_UNLCK, 121, 1)
            return
        time.sleep(0.01)


def lock_path(path: Path) -> Path:
    """Return the file whose lock queues the writers of the database at `path`."""
    return path.with_name(path.name + ".lock")


def wal_paths(path: Path) -> list[Path]:
    """Return the paths of a database's WAL and WAL index."""
    return [path.with_name(path.name + suffix) for suffix in ("-wal", "-shm")]


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Wait in line with the other writers, however long, then hold the lock for the block.

    The next in line waits for the lock alone, behind a gate that keeps out the others. So who
    lets go of the lock cannot take it again before the next: processes take turns.
    """
    lock = os.open(lock_path(path), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        move_gate(lock, fcntl.F_WRLCK)
        fcntl.flock(lock, fcntl.LOCK_EX)
        move_gate(lock, fcntl.F_UNLCK)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing would not, if the process has forked
        os.close(lock)


def move_gate(lock: int, movement: int) -> None:
    """Wait until the gate before the lock is open, and shut it; or open it again.

    It is another kind of lock on the same file. Where there is none, as on macOS, processes
    may have to wait longer.
    """
    with contextlib.suppress(OSError):
        lock_range(lock, "F_OFD_SETLKW", movement, 0, 0)


def lock_range(file: int, command: str, kind: int, start: int, length: int) -> None:
    """Set a lock of the open file itself, not of the process, where the system knows it."""
    if hasattr(fcntl, command):
        span = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)  # struct flock
        fcntl.fcntl(file, getattr(fcntl, command), span)


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Hold the writers' lock for the block, or go without when there is no lock file.

    For the service's threads. SQLite's own locks have to do then.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(hold_lock(path))
        yield


@contextlib.contextmanager
def write_lock(path: Path, seconds: int = 10) -> Iterator[None]:
    """Hold the writers' lock for the block.

    For commands and start-up, in the main thread. Raises DatabaseError after `seconds`.
    """

    def give_up(*_: object) -> None:
        raise DatabaseBusyError("another process holds the lock file")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        with hold_lock(path):
            signal.alarm(0)
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def utc_now() -> str:
    """Return the time as the tables hold it: UTC, to the millisecond."""
    return format_time(datetime.now(UTC))


def format_time(moment: datetime) -> str:
    """Return `moment` as YYYY-MM-DDTHH:MM:SS.mmmZ."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


# --------------------------------------------------------------------------------------
# Signature
# --------------------------------------------------------------------------------------

MAX_SIGNATURES = 4  # in one header; Persona sends one, two while a secret rotates


class SignatureError(Exception):
    """The request is not authentic; the message says why, without naming any secret."""

    def __init__(self, reason: str, stale: bool = False):
        super().__init__(reason)
        self.stale = stale  # the signature is right, but its time is outside the tolerance


def verify(body: bytes, headers: Mapping[str, str], config: Config, now: float) -> None:
    """Raise SignatureError unless `body` was signed with one of the secrets, around `now`.

    `now` is in unix seconds. The scheme is that of Persona's page "Webhooks best
    practices": HMAC-SHA256 of "<t>.<raw body>"; while a secret rotates the header holds
    several pairs, each checked against its own t.
    """
    ages = []
    for timestamp, digest in read_signatures(headers, config.scheme):
        message = body if config.scheme == "body" else timestamp.encode() + b"." + body
        for secret in config.secrets:
            if hmac.compare_digest(hmac.digest(secret, message, "sha256"), digest):
                if config.scheme == "body" or not config.tolerance:
                    return
                age = int(now) - int(timestamp)
                if abs(age) <= config.tolerance:
                    return
                ages.append(age)
    if ages:
        age = min(ages, key=abs)
        when = f"{age} seconds old" if age > 0 else f"{-age} seconds in the future"
        reason = f"timestamp is stale: {when}, the tolerance is {config.tolerance} seconds"
        raise SignatureError(reason, stale=True)
    raise SignatureError("no signature matches the body")


def read_signatures(headers: Mapping[str, str], scheme: str) -> list[tuple[str, bytes]]:
    """Return the (timestamp, digest) pairs that the headers claim; raise SignatureError."""
    name = "X-Persona-Signature" if scheme == "split" else "Persona-Signature"
    header = headers.get(name, "")
    if not header.strip():
        raise SignatureError(f"the {name} header is missing")
    if scheme == "persona":
        # A header that was sent twice arrives as one, joined by a comma.
        fields = [field.partition("=") for field in re.split(r"[ ,]+", header.strip(" ,"))]
        pairs, timestamp = [], ""
        for key, _, value in fields:
            if key == "t":
                timestamp = value
            elif key == "v1":
                pairs.append((timestamp, value))
    elif scheme == "split":
        pairs = [(headers.get("X-Persona-Timestamp", "").strip(), header.strip())]
    else:
        pairs = [("0", header.strip())]
    valid = [
        (timestamp, bytes.fromhex(digest))
        for timestamp, digest in pairs
        if re.fullmatch(r"[0-9]{1,12}", timestamp) and re.fullmatch(r"[0-9a-fA-F]{64}", digest)
    ]
    if not valid or len(pairs) > MAX_SIGNATURES:
        raise SignatureError(f"the {name} header is malformed")
    return valid


def sign(body: bytes, secret: bytes, scheme: str, timestamp: int) -> dict[str, str]:
    """Return the headers that Persona, or a relay, would sign `body` with."""
    signed = body if scheme == "body" else f"{timestamp}.".encode() + body
    digest = hmac.new(secret, signed, "sha256").hexdigest()
    if scheme == "split":
        return {"X-Persona-Signature": digest, "X-Persona-Timestamp": str(timestamp)}
    return {"Persona-Signature": digest if scheme == "body" else f"t={timestamp},v1={digest}"}


# --------------------------------------------------------------------------------------
# Events
# --------------------------------------------------------------------------------------


class Event(NamedTuple):
    """One Persona event, as read from a body."""

    event_id: str
    name: str
    created_at: str
    object_type: str | None = None
    object_id: str | None = None
    inquiry_id: str | None = None
    account_id: str | None = None
    reference_id: str | None = None
    payload: Any = None  # what Persona says of the object: {"data": {...}, "included": [...]}


UNRECOGNIZED = "unrecognized"


def read_event(body: bytes, received_at: str) -> Event:
    """Return the event in `body`, in any of its shapes and key inflections (page "Events").

    An authentic body in which no event is found yields one named "unrecognized", whose ID
    is the hash of the body: it is kept, and counts once. Never raises.
    """
    document = parse_json(body)
    data = field(document, "data")
    attributes = field(data, "attributes")
    payload = field(attributes, "payload")
    if field(data, "type") == "event":
        event_id, name = field(data, "id"), field(attributes, "name")
    else:  # the older shapes of third-party guides
        event_id, name = field(document, "id"), field(document, "type")
        if not payload:
            payload, attributes = data, None  # the object itself, whose age is not the event's
        elif not text(event_id):
            event_id = field(data, "id")
    if not text(event_id) or not text(name):
        return Event("sha256:" + hashlib.sha256(body).hexdigest(), UNRECOGNIZED, received_at)
    created_at = (
        read_time(field(attributes, "created-at"))
        or read_time(field(document, "created-at"))
        or read_time(field(document, "created"))
        or received_at
    )
    inner = field(payload, "data")
    links = read_object(inner if isinstance(inner, dict) else payload, name.rpartition(".")[0])
    return Event(event_id, name, created_at, *links, payload)


def read_object(thing: Any, kind: str) -> tuple[str | None, ...]:
    """Return type, ID, inquiry ID, account ID and reference ID of a payload's object.

    One without a type is of the `kind` that the event's name begins with.
    """
    object_type, object_id = text(field(thing, "type")), text(field(thing, "id"))
    if object_id and not object_type:
        object_type = text(kind)
    inquiry_id, account_id = related(thing, "inquiry"), related(thing, "account")
    if object_type == "inquiry":
        inquiry_id = object_id
    elif object_type == "account":
        account_id = object_id
    reference_id = text(field(field(thing, "attributes"), "reference-id"))
    if object_type in NAMED_BY_REFERENCE:
        reference_id = None
    return object_type, object_id, inquiry_id, account_id, reference_id


NAMED_BY_REFERENCE = {"transaction", "importer-pipeline-run"}  # by your ID of them, not of a person
PLURALS = {"inquiry": "inquiries", "account": "accounts"}


def related(thing: Any, kind: str) -> str | None:
    """Return the ID of the inquiry or account an object points at; None when of several."""
    relationships = field(thing, "relationships")
    things = (
        point_at(relationships, kind)
        or point_at(relationships, PLURALS[kind])
        or [one for one in point_at(relationships, "related-objects") if field(one, "type") == kind]
    )
    ids = {text(field(one, "id")) for one in things}
    return ids.pop() if len(ids) == 1 else None


def point_at(relationships: Any, name: str) -> list[Any]:
    """Return what a relationship points at."""
    data = field(field(relationships, name), "data")
    return data if isinstance(data, list) else [data] if data else []


def field(mapping: Any, key: str) -> Any:
    """Return `mapping[key]`, whichever way its keys are inflected; None when absent.

    `key` is in kebab-case. See Persona's page "API key inflection".
    """
    if not isinstance(mapping, dict):
        return None
    value = mapping.get(key)
    if value is None and "-" in key:
        value = mapping.get(key.replace("-", "_"))
        if value is None:
            value = mapping.get(camel_case(key))
    return value


def camel_case(key: str) -> str:
    """Return a kebab-case key in camelCase."""
    first, *rest = key.split("-")
    return first + "".join(word.capitalize() for word in rest)


def text(value: Any) -> str | None:
    """Return `value` if it is text that a table can hold and a key can be, else None."""
    if not isinstance(value, str) or not value or "\0" in value:
        return None
    try:
        value.encode()  # a lone surrogate is legal in JSON, but not in UTF-8
    except UnicodeEncodeError:
        return None
    return value


def read_time(value: Any) -> str | None:
    """Return an ISO 8601 text or unix seconds in the tables' form; None when it is neither."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            return format_time(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return format_time(datetime.fromtimestamp(value, UTC))
    except (ValueError, OverflowError, OSError):
        pass
    return None


def parse_integer(digits: str) -> int | float:
    """Read a JSON integer; one too long for Python becomes infinity."""
    return int(digits) if len(digits) < 1000 else float(digits)


JSON = json.JSONDecoder(parse_int=parse_integer, strict=False)


def parse_json(body: bytes) -> Any:
    """Return the JSON in `body`, in any encoding JSON allows; None when there is none."""
    try:
        return JSON.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except (ValueError, RecursionError):
        return None


# --------------------------------------------------------------------------------------
# Journal
# --------------------------------------------------------------------------------------

STORED, DUPLICATE, FAILED = "stored", "duplicate", "failed"  # and UNRECOGNIZED

ANSWER_SECONDS = 4.0  # Persona waits five
LEAST_SECONDS = 0.2  # to wait while commits fail, for senders queue outside as well
LAST = 2**63 - 1  # no position is greater
MAX_WAITING = 256  # deliveries in line; more means that the database is stuck
CHECKPOINT_PAGES = 3_000  # written by a process between its checkpoints: 12 MB
WAL_PAGES = 5_000  # beyond it, writers wait a moment for readers so that the WAL can restart

JOURNAL_STATE = """
    SELECT (SELECT COALESCE(max(rowid), 0) FROM events), EXISTS (SELECT 1 FROM redactions)
"""
INSERT_EVENT = """
    INSERT INTO events (event_id, name, created_at, received_at, object_type, object_id,
        inquiry_id, account_id, reference_id, attempt, body_sha256, state, body)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT DO NOTHING
"""


class JournalError(Exception):
    """The event could not be stored, or not in time; the message says why."""


class Delivery:
    """A request on its way into the journal: the event, its body, and what became of it."""

    __slots__ = (
        *("event", "body", "received_at", "attempt", "started"),
        *("outcome", "error", "fault", "done"),
    )

    def __init__(
        self,
        event: Event | None = None,
        body: bytes = b"",
        received_at: str = "",
        attempt: int | None = None,
    ):
        self.event = event  # None probes whether the journal can be written
        self.body = body
        self.received_at = received_at
        self.attempt = attempt
        self.started = time.perf_counter()
        self.outcome: str | None = None
        self.error: BaseException | None = None
        self.fault: str | None = None  # why its handlers cannot run at all
        self.done = threading.Lock()
        self.done.acquire()

    def row(self) -> tuple[Any, ...]:
        """Return the journal row, in the order of INSERT_EVENT."""
        digest = hashlib.sha256(self.body).hexdigest()
        state = UNRECOGNIZED if self.event.name == UNRECOGNIZED else "processed"
        try:
            body: str | bytes = self.body.decode()
        except UnicodeDecodeError:
            body = self.body
        event_id, name, created_at, *links, _ = self.event
        return (
            *(event_id, name, created_at, self.received_at, *links),
            *(self.attempt, digest, state, body),
        )


class Journal:
    """The writer of one process: many requests, one connection, one fsync for all that wait.

    Requests put their delivery in line and sleep; the writer thread takes all that are in
    line, commits them together and wakes them. What arrives during a commit goes with the
    next one. Invariants:

    - A delivery has an outcome only after the commit that holds it was fsynced.
    - Every delivery that was taken is woken, whatever its commit raises; the thread
      survives, and the next commit starts on a fresh connection, unless a file is gone and
      may come back.
    - No request waits longer than ANSWER_SECONDS. A delivery that is given up may still be
      committed later; its redelivery is then a duplicate.
    - No delivery waits while the WAL is copied, but for the end of a long one: see
      Checkpointer.
    - Between processes the lock file queues the writers in the kernel, and each gets its
      turn (see hold_lock), so SQLite's busy handler is met only when a stranger writes. The
      lock is for fairness and speed; correctness rests on SQLite's own locks.
    - The connection and the thread belong to the process that first appends: they are made
      after a fork, never before.
    """

    def __init__(self, path: Path):
        self.path = path
        self.starting = threading.Lock()
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Start from nothing, as a process does that has just been forked."""
        self.line: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.db: sqlite3.Connection | None = None
        self.checkpointer = Checkpointer(self.path)
        self.files: dict[Path, int] = {}  # descriptors of the database, its WAL and WAL index
        self.stuck: float | None = None  # since when no commit has succeeded, though one was due
        self.stopping = False

    def append(self, delivery: Delivery) -> str:
        """Store `delivery` durably; return what became of it.

        STORED: new, its handlers ran. DUPLICATE: already processed. UNRECOGNIZED: kept.
        FAILED: kept, but a handler raised. Raises JournalError when it is not known
        to be on disk within ANSWER_SECONDS.
        """
        if self.line.qsize() >= MAX_WAITING:
            raise JournalError("too many deliveries are waiting for the database")
        self.line.put(delivery)
        if self.thread is None or not self.thread.is_alive():
            self.start()
        stuck = time.monotonic() - (self.stuck or time.monotonic())
        if not delivery.done.acquire(timeout=max(ANSWER_SECONDS - stuck, LEAST_SECONDS)):
            raise JournalError("the database did not answer in time")
        if delivery.outcome is None:
            raise JournalError(reason(delivery.error)) from delivery.error
        return delivery.outcome

    def start(self) -> None:
        """Start the writer thread, once."""
        with self.starting:
            if self.thread is None or not self.thread.is_alive():
                thread = threading.Thread(target=self.write_forever, daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    raise JournalError("no thread can be started") from None
                self.thread = thread

    def stop(self) -> None:
        """Finish what is in line, end the threads, and close the database."""
        self.stopping = True
        if self.thread:
            self.line.put(Delivery())
            self.thread.join(ANSWER_SECONDS)

    def write_forever(self) -> None:
        """Commit what is in line, again and again."""
        while not self.stopping or not self.line.empty():
            batch: list[Delivery] = []
            with contextlib.suppress(queue.Empty):
                batch.append(self.line.get(timeout=1.0))
            if batch:
                self.serve(batch)
            else:
                self.rest()
            self.checkpointer.add(10 + len(delivery.body) // 4096 for delivery in batch)
        self.checkpointer.join()
        self.close()

    def serve(self, batch: list[Delivery]) -> None:
        """Commit `batch`, with what else is in line when its turn comes; wake the requests."""
        self.stuck = self.stuck or time.monotonic()
        try:
            with turn(self.path):
                with contextlib.suppress(queue.Empty):
                    while len(batch) < MAX_WAITING:
                        batch.append(self.line.get_nowait())
                self.settle(batch)
        finally:
            for delivery in batch:
                delivery.done.release()
        log_deliveries(batch)

    def rest(self) -> None:
        """While nothing is due, look after the files, and empty a WAL that rests.

        So what somebody removes or replaces is noticed before others act on it; and then the
        database alone holds all events but those of the last seconds.
        """
        self.stuck = time.monotonic()  # the turn may be long in coming
        with turn(self.path), contextlib.suppress(OSError, sqlite3.Error):
            self.notice_changes()
        self.stuck = None
        with contextlib.suppress(OSError):
            wal = wal_paths(self.path)[0].stat()
            self.checkpointer.scrub |= wal.st_size > 0 and time.time() - wal.st_mtime > 1.0

    def settle(self, batch: list[Delivery]) -> None:
        """Commit `batch`; if an event is to blame for a failure, each event by itself.

        If even that fails, by its handlers, the event is kept without them, as failed.
        """
        try:
            self.commit(batch)
        except BaseException as error:  # the one seam: a batch fails, the writer goes on
            if not isinstance(error, FileNotFoundError):  # it may come back, with its WAL
                self.close()
            for delivery in batch:  # without the traceback, which would keep the connection
                delivery.outcome, delivery.error = None, error.with_traceback(None)
            if is_obstacle(error):
                return
            if len(batch) > 1:
                for delivery in batch:
                    self.settle([delivery])
            elif batch[0].event and batch[0].event.name in HANDLERS and not batch[0].fault:
                batch[0].fault = explain_error(error)
                self.settle(batch)

    def commit(self, batch: list[Delivery]) -> None:
        """Store, project and dispatch `batch` in one transaction; set each outcome."""
        db = self.open()
        deliveries = [delivery for delivery in batch if delivery.event]
        with transaction(db):
            last, redactions = db.execute(JOURNAL_STATE).fetchone()
            rows = [delivery.row() for delivery in deliveries]
            if db.executemany(INSERT_EVENT, rows).rowcount == len(rows):
                events = [delivery.event for delivery in deliveries]
            else:
                events = read_journal(db, last)  # the others were there already
            project(db, events)
            new = {event.event_id for event in events}
            for delivery in deliveries:
                first = delivery.event.event_id in new
                delivery.outcome = dispatch(db, delivery.event, first, delivery.fault)
                new.discard(delivery.event.event_id)
            if redact_new(db, events, last, bool(redactions)):
                self.checkpointer.scrub = self.checkpointer.removed = True
            if len(deliveries) < len(batch):
                db.execute(PROBE)
        self.stuck = None
        for delivery in batch:
            delivery.error = None
            delivery.outcome = delivery.outcome or STORED

    def open(self) -> sqlite3.Connection:
        """Return the connection; open it anew when the file at the path is another one."""
        self.notice_changes()
        if self.db is None:
            take_core()
            self.hold_files(self.path)
            self.db = connect(self.path)
            self.require_same()
            self.db.execute("PRAGMA journal_mode = WAL")  # a restored backup is not in it
            self.db.execute("PRAGMA wal_autocheckpoint = 0")
            self.db.execute("PRAGMA journal_size_limit = 67108864")  # of a WAL that starts anew
            self.sync_wal()
            self.hold_files(*wal_paths(self.path))
            self.require_same()
        if self.checkpointer.db is None:
            self.checkpointer.open(self.files[self.path])
        return self.db

    def notice_changes(self) -> None:
        """Let go of a database that was replaced.

        Raises FileNotFoundError while it, or its WAL, is gone and may come back.
        """
        self.path.stat()
        changed = [path for path in self.files if not self.is_same(path)]
        if self.path in changed:
            self.leave_database()
        elif changed and self.db:
            self.guard_wal()
        for path in changed:  # the space of a WAL that was removed must come free
            os.close(self.files.pop(path))

    def is_same(self, path: Path) -> bool:
        """Tell whether the file at `path` is the one that was opened."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.files[path]))
        except (FileNotFoundError, KeyError):
            return False

    def require_same(self) -> None:
        """Raise DatabaseBusyError when another file has taken the path meanwhile."""
        if not self.is_same(self.path):
            raise DatabaseBusyError("the database was replaced while it was opened")

    def hold_files(self, *paths: Path) -> None:
        """Note which files are at `paths`; no other gets the inode of one that is held.

        The database is held readable, to be synced by. It stays so beyond the connections,
        because to close it would end SQLite's locks.
        """
        for path in itertools.filterfalse(self.is_same, paths):
            if path in self.files:
                os.close(self.files.pop(path))
            flags = os.O_RDONLY if path == self.path else getattr(os, "O_PATH", os.O_RDONLY)
            try:
                self.files[path] = os.open(path, flags)
            except FileNotFoundError:
                raise DatabaseBusyError("a file was removed while it was opened") from None

    def sync_wal(self) -> None:
        """Sync what the WAL holds at the start, and copy it as far as readers allow.

        A commit whose fsync failed may come back when the WAL is read anew. Its redelivery
        would be taken for a duplicate, and acknowledged without being on disk.
        """
        if self.copy_wal(tries=200) is None:
            raise DatabaseBusyError("the WAL cannot be synced")

    def copy_wal(self, tries: int) -> bool | None:
        """Copy the WAL into the database; tell whether all of it, or None if others are at it."""
        for _ in range(tries):
            blocked, pages, copied = checkpoint(self.db, self.path, COPY_WAL)
            if not blocked:
                return pages == copied
            time.sleep(0.01)
        return None

    def leave_database(self) -> None:
        """Let go of a database that another file has replaced, and put its WAL out of the way.

        SQLite would take it for the new file's, and damage that. What could not be copied into
        the old file, because of a reader or the disk, is kept.
        """
        saved = self.save_wal()
        self.close()
        self.checkpointer.scrub = True
        wal, index = wal_paths(self.path)
        if not saved and self.is_same(wal) and wal.stat().st_size:
            kept = wal.with_name(f"{wal.name}.{time.time_ns()}")
            log.error("the WAL of the replaced database is kept as %s", kept.name)
            wal.rename(kept)
        for path in filter(self.is_same, (wal, index)):
            path.unlink()

    def guard_wal(self) -> None:
        """Raise FileNotFoundError, as the WAL or its index was taken away: commits would be lost.

        If the index is gone, nobody can join it, and the WAL can still be copied. Others may
        use a new WAL with the old index; then even a checkpoint would damage the database.
        """
        self.checkpointer.close()
        if not wal_paths(self.path)[1].exists():
            self.save_wal()
        raise FileNotFoundError(errno.ENOENT, "the WAL is gone: bring it back, or stop and start")

    def save_wal(self) -> bool:
        """Copy the WAL into the database that is open, if any; tell whether all was copied."""
        with contextlib.suppress(sqlite3.Error):
            return bool(self.db and self.copy_wal(tries=100))
        return False

    def close(self) -> None:
        """Drop the connections, whatever state they are in."""
        wal = wal_paths(self.path)[0]
        with contextlib.suppress(OSError):
            if wal in self.files and wal.stat().st_size and not self.is_same(wal):
                self.lock_database()  # or SQLite may end this WAL with its own
        if self.db:
            with contextlib.suppress(sqlite3.Error):
                self.db.close()
        self.db = None
        self.checkpointer.close()

    def lock_database(self) -> None:
        """Keep SQLite, also in this process, from being alone with the database.

        Who closes it last copies the WAL, and removes the one at the path. The lock is that of
        a reader (https://sqlite.org/lockingv3.html), held until the file is left.
        """
        with contextlib.suppress(OSError):
            lock_range(self.files[self.path], "F_OFD_SETLK", fcntl.F_RDLCK, 0x40000002, 510)


class Checkpointer:
    """Copies the WAL into the database file, in a thread of its own, beside the commits.

    Now and then the rest is copied in a turn, when no commit adds to it, so that the next
    one can start the WAL anew. What fails is logged, and tried again later.
    """

    def __init__(self, path: Path):
        self.path = path
        self.db: sqlite3.Connection | None = None
        self.reader: sqlite3.Connection | None = None
        self.file = -1  # the database, to sync it by; SQLite's own learns of an error, too
        self.thread: threading.Thread | None = None
        self.pages = 0  # about, that were written since the last start
        self.limit = WAL_PAGES
        self.scrub = True  # redacted bytes may be in the WAL, at first those of a killed process
        self.scrubbed = 0.0  # when that was last tried
        self.blocked = 0  # how often in vain
        self.removed = False  # bodies are known to be in it

    def open(self, file: int) -> None:
        """Open the database whose descriptor is `file`."""
        self.file = file
        self.reader = connect(self.path, readonly=True)
        self.db = connect(self.path)

    def add(self, pages: Iterable[int]) -> None:
        """Count written pages; start a checkpoint when one is due and none is under way."""
        self.pages += sum(pages)
        due = self.pages >= CHECKPOINT_PAGES
        due |= self.scrub and time.monotonic() > self.scrubbed + 1.0
        if due and self.db and not self.is_running():
            thread = threading.Thread(target=self.run, args=[self.db, self.reader], daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread to be had: next time
                thread.start()
                self.pages, self.thread = 0, thread

    def is_running(self) -> bool:
        """Tell whether a checkpoint is under way."""
        return self.thread is not None and self.thread.is_alive()

    def join(self) -> None:
        """Wait for the checkpoint that is under way, if any."""
        if self.thread:
            self.thread.join()

    def close(self) -> None:
        """Drop the connections; a checkpoint that is under way keeps them until its end."""
        if not self.is_running():
            for db in filter(None, (self.reader, self.db)):
                with contextlib.suppress(sqlite3.Error):
                    db.close()
        self.db = self.reader = None

    def run(self, db: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        """Copy what is in the WAL, again while much is added; end it when it is long."""
        try:
            db.execute("PRAGMA busy_timeout = 0")
            copied = 0
            while (pages := self.copy(db, reader)) > copied + 500:
                copied = pages
            if self.scrub or pages > self.limit:
                with turn(self.path):
                    self.end_wal(db, pages)
        except (OSError, sqlite3.Error) as error:
            log.error("the WAL could not be copied, to be tried again: %s", reason(error))

    def copy(self, db: sqlite3.Connection, reader: sqlite3.Connection) -> int:
        """Copy and sync what the WAL holds, beside the commits; return how many pages it has.

        The reader keeps commits from starting the WAL anew meanwhile. Without it, SQLite before
        3.51.3 may take new pages for copied ones: see https://sqlite.org/wal.html#walresetbug.
        (When all is copied already, commits may start it anew, but then the reader keeps the
        checkpoint from copying.) SQLite itself would leave the sync to the end of the WAL.
        """
        reader.execute("BEGIN")
        try:
            reader.execute("SELECT 1 FROM events").fetchone()
            pages = checkpoint(db, self.path, COPY_WAL)[1]
            getattr(os, "fdatasync", os.fsync)(self.file)  # macOS has fsync alone
            return pages
        except OSError:
            copy_again(self.path)
            raise
        finally:
            reader.execute("END")

    def end_wal(self, db: sqlite3.Connection, pages: int) -> None:
        """Empty the WAL for a redaction; if it is long, let the next commit start it anew."""
        if db is not self.db:
            return  # dropped meanwhile, with its database or its WAL
        if self.scrub:
            blocked = checkpoint(db, self.path, EMPTY_WAL)[0]
            self.scrub, self.scrubbed = bool(blocked), time.monotonic()
            self.blocked = self.blocked + 1 if blocked else 0
            if self.blocked == 10 and self.removed:
                log.warning("a reader keeps removed bodies in the WAL: end it")
            self.removed &= self.scrub
        if pages > self.limit:
            self.restart_wal(db, pages)

    def restart_wal(self, db: sqlite3.Connection, pages: int) -> None:
        """Copy the rest, so that the next commit starts the WAL anew.

        Wait a second for readers to let go of it; if they do not, let it double.
        """
        deadline = time.monotonic() + 1.0
        while checkpoint(db, self.path, RESTART_WAL)[0]:
            if time.monotonic() > deadline:
                self.limit = 2 * pages
                return
            time.sleep(0.002)  # SQLite's own busy handler would sleep past a reader's pauses
        self.limit = WAL_PAGES


def take_core() -> None:
    """Keep this process on one core, the one with the fewest of its siblings.

    Its threads share one interpreter lock. On one core they hand it on at once; across
    cores each hand-over wakes another core, which costs more than that core could do.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    parent = os.getppid()
    with contextlib.suppress(OSError):
        siblings = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        taken = [os.sched_getaffinity(int(pid)) for pid in siblings if int(pid) != os.getpid()]
        core = min(os.sched_getaffinity(0), key=lambda core: taken.count({core}))
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {core})


def read_journal(db: sqlite3.Connection, after: int, until: int = LAST) -> list[Event]:
    """Return the events beyond position `after`, up to `until`, without their payloads."""
    query = """
        SELECT event_id, name, created_at, object_type, object_id,
            inquiry_id, account_id, reference_id
        FROM events WHERE rowid > ? AND rowid <= ? ORDER BY rowid
    """
    return [Event(*row) for row in db.execute(query, (after, until))]


def log_deliveries(batch: list[Delivery]) -> None:
    """Write a line for each delivery, all of a level at once."""
    lines: dict[int, list[str]] = {}
    for delivery in filter(lambda delivery: delivery.event, batch):
        fine = delivery.outcome in (STORED, DUPLICATE)
        lines.setdefault(logging.INFO if fine else logging.WARNING, []).append(describe(delivery))
    for level, some in lines.items():
        log.log(level, "\n".join(some))


def describe(delivery: Delivery) -> str:
    """Return a delivery's log line: no body, and no reference ID."""
    milliseconds = (time.perf_counter() - delivery.started) * 1000
    line = (
        f"event={quote(delivery.event.event_id)} name={quote(delivery.event.name)}"
        f" outcome={delivery.outcome or 'unavailable'} attempt={delivery.attempt or 0}"
        f" ms={milliseconds:.1f}"
    )
    return line if delivery.error is None else f"{line} reason={quote(reason(delivery.error))}"


def quote(value: str) -> str:
    """Return `value` as one word of a log line."""
    return value if re.fullmatch(r"[\w./:+-]{1,128}", value, re.ASCII) else json.dumps(value[:128])


def reason(error: BaseException) -> str:
    """Say what was wrong with the database; of any other error only its kind."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) if is_obstacle(error) else type(error).__name__


# --------------------------------------------------------------------------------------
# Projection
# --------------------------------------------------------------------------------------
#
# inquiries and kyc_status are functions of the journal's columns: any order of the same
# events, and any repetition, gives the same rows, because each rule takes a maximum.
#
# 1. The events in STATUSES set an inquiry's status, and no others do. The name decides.
# 2. In an inquiry, the event with the greatest (created_at, rank, event_id) wins.
# 3. A person's status is that of their inquiry with the greatest
#    (class, event_at, rank, event_id); schema.sql defines rank and class.
# 4. A person is keyed by reference ID; without one by account ID; else by inquiry ID.
# 5. An inquiry's reference ID and account ID are each taken from the newest event about
#    the inquiry itself, by (created_at, event_id), that carries one.

STATUSES = {  # event name -> status and its rank; Persona's page "Model lifecycle"
    "inquiry.expired": ("expired", 0),
    "inquiry.created": ("created", 1),
    "inquiry.started": ("pending", 2),
    "inquiry.failed": ("failed", 3),
    "inquiry.completed": ("completed", 3),
    "inquiry.marked-for-review": ("needs_review", 4),
    "inquiry.declined": ("declined", 5),
    "inquiry.approved": ("approved", 5),
}


RANKS = dict(STATUSES.values())


class Inquiry(NamedTuple):
    """A row of inquiries."""

    inquiry_id: str
    reference_id: str | None
    account_id: str | None
    status: str
    event_id: str
    event_name: str
    event_at: str

    @property
    def person(self) -> str:
        """Return the key of the person (rule 4)."""
        return self.reference_id or self.account_id or self.inquiry_id

    @property
    def standing(self) -> tuple[str, int, str]:
        """Return what the event that set the status is compared by (rule 2)."""
        return self.event_at, RANKS.get(self.status, -1), self.event_id


def project(db: sqlite3.Connection, events: Iterable[Event]) -> None:
    """Fold `events`, which are in the journal, into inquiries and kyc_status."""
    own = [event for event in events if event.inquiry_id and event.object_id == event.inquiry_id]
    if not own:
        return
    before = read_inquiries(db, {event.inquiry_id for event in own})
    first = {event.inquiry_id for event in own if event.name in STATUSES} - before.keys()
    links = read_links(db, first) if first else {}
    after = dict(before)
    for event in own:
        known = after.get(event.inquiry_id)
        if event.name in STATUSES:
            known = set_status(known, event, links)
        if known:
            after[event.inquiry_id] = relink(db, known, event)
    changed = [row for row in after.values() if row != before.get(row.inquiry_id)]
    if changed:
        db.executemany(REPLACE_INQUIRY, changed)
        people = {row.person for row in changed}
        left = {before[row.inquiry_id].person for row in changed if row.inquiry_id in before}
        refresh_people(db, people | left, moved=not left <= people)


def read_inquiries(db: sqlite3.Connection, ids: Iterable[str]) -> dict[str, Inquiry]:
    """Return the rows of these inquiries, as far as there are any."""
    query = """
        SELECT inquiry_id, reference_id, account_id, status, event_id, event_name, event_at
        FROM inquiries WHERE inquiry_id IN (SELECT value FROM json_each(?))
    """
    return {row[0]: Inquiry(*row) for row in db.execute(query, (json.dumps(list(ids)),))}


def read_links(db: sqlite3.Connection, ids: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Return reference ID and account ID of inquiries, from all of their events (rule 5)."""
    links: dict[str, tuple[Any, Any]] = {}
    query = """
        SELECT inquiry_id, reference_id, account_id FROM events
        WHERE inquiry_id IN (SELECT value FROM json_each(?)) AND object_id = inquiry_id
        ORDER BY created_at, event_id
    """
    for inquiry, reference, account in db.execute(query, (json.dumps(list(ids)),)):
        older = links.get(inquiry, (None, None))
        links[inquiry] = (reference or older[0], account or older[1])
    return links


def set_status(known: Inquiry | None, event: Event, links: Mapping) -> Inquiry:
    """Return the inquiry with its status set by `event`, if that wins (rules 1 and 2)."""
    reference, account = known[1:3] if known else links[event.inquiry_id]
    setting = (STATUSES[event.name][0], event.event_id, event.name, event.created_at)
    new = Inquiry(event.inquiry_id, reference, account, *setting)
    return new if known is None or new.standing > known.standing else known


def relink(db: sqlite3.Connection, known: Inquiry, event: Event) -> Inquiry:
    """Return the inquiry with the links `event` carries, if they are the newest (rule 5)."""
    for column, query in NEWEST_LINK.items():
        if getattr(event, column) not in (None, getattr(known, column)):
            newest = db.execute(query, (known.inquiry_id,)).fetchone()[0]
            known = known._replace(**{column: newest})
    return known


NEWEST_LINK = {
    "reference_id": """
        SELECT reference_id FROM events
        WHERE inquiry_id = ? AND object_id = inquiry_id AND reference_id IS NOT NULL
        ORDER BY created_at DESC, event_id DESC LIMIT 1
    """,
    "account_id": """
        SELECT account_id FROM events
        WHERE inquiry_id = ? AND object_id = inquiry_id AND account_id IS NOT NULL
        ORDER BY created_at DESC, event_id DESC LIMIT 1
    """,
}

REPLACE_INQUIRY = """
    INSERT INTO inquiries
        (inquiry_id, reference_id, account_id, status, event_id, event_name, event_at)
    VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (inquiry_id) DO UPDATE SET
        reference_id = excluded.reference_id, account_id = excluded.account_id,
        status = excluded.status, event_id = excluded.event_id,
        event_name = excluded.event_name, event_at = excluded.event_at
"""

DROP_LEFT_KEYS = """
    DELETE FROM kyc_status WHERE reference_id IN (SELECT value FROM json_each(?))
        AND NOT EXISTS (SELECT 1 FROM inquiries WHERE person = kyc_status.reference_id)
"""

REFRESH_PEOPLE = """
    INSERT INTO kyc_status (reference_id, status, inquiry_id, account_id,
        event_id, event_name, event_at, updated_at)
    SELECT i.person, i.status, i.inquiry_id, i.account_id,
        i.event_id, i.event_name, i.event_at, ?
    FROM json_each(?) AS people JOIN inquiries AS i ON i.inquiry_id = (
        SELECT inquiry_id FROM inquiries WHERE person = people.value
        ORDER BY class DESC, event_at DESC, rank DESC, event_id DESC LIMIT 1)
    WHERE true
    ON CONFLICT (reference_id) DO UPDATE SET
        status = excluded.status, inquiry_id = excluded.inquiry_id,
        account_id = excluded.account_id, event_id = excluded.event_id,
        event_name = excluded.event_name, event_at = excluded.event_at,
        updated_at = excluded.updated_at
    WHERE (kyc_status.status, kyc_status.inquiry_id, kyc_status.account_id,
            kyc_status.event_id, kyc_status.event_name, kyc_status.event_at)
        IS NOT (excluded.status, excluded.inquiry_id, excluded.account_id,
            excluded.event_id, excluded.event_name, excluded.event_at)
"""


def refresh_people(db: sqlite3.Connection, people: Iterable[str], moved: bool) -> None:
    """Set the status of `people` from their inquiries (rule 3); if any moved, drop old keys."""
    keys = json.dumps(list(people))
    if moved:
        db.execute(DROP_LEFT_KEYS, (keys,))
    db.execute(REFRESH_PEOPLE, (utc_now(), keys))


# --------------------------------------------------------------------------------------
# Redaction
# --------------------------------------------------------------------------------------

REDACTED = ".redacted"  # what the names of Persona's redactions end with

EARLIER_REDACTIONS = """  -- of whom the new events concern
    WITH late AS MATERIALIZED (
            SELECT object_id, inquiry_id, account_id, reference_id FROM events WHERE rowid > ?),
        accounts(id) AS MATERIALIZED (SELECT account_id FROM late
            UNION SELECT account_id FROM events WHERE inquiry_id IN (SELECT inquiry_id FROM late)),
        linked(id) AS MATERIALIZED (SELECT inquiry_id FROM late
            UNION SELECT inquiry_id FROM events WHERE account_id IN (SELECT id FROM accounts)),
        subjects(id) AS (SELECT inquiry_id FROM late UNION SELECT reference_id FROM late
            UNION SELECT object_id FROM late UNION SELECT id FROM accounts
            UNION SELECT reference_id FROM events WHERE account_id IN (SELECT id FROM accounts)
            UNION SELECT reference_id FROM events WHERE inquiry_id IN (SELECT id FROM linked))
    SELECT subject_id, redacted_before FROM redactions WHERE subject_id IN subjects
"""


def redact_new(db: sqlite3.Connection, events: list[Event], last: int, earlier: bool) -> int:
    """Obey the redactions among new `events`, which are all those beyond position `last`.

    If there were `earlier` redactions, obey those that concern these events, too. Return
    how many bodies were removed. See Persona's page "Model lifecycle".
    """
    removed = 0
    for event in events:
        if event.name.endswith(REDACTED) and event.object_id:
            removed += redact(db, event.object_id, event.created_at)
            earlier = True
    if earlier:
        for subject, before in db.execute(EARLIER_REDACTIONS, (last,)).fetchall():
            removed += redact(db, subject, before)
    return removed


def redact(db: sqlite3.Connection, subject: str, before: str, later: str | None = None) -> int:
    """Remove the bodies of a subject's events created until `before`; return how many.

    `subject` is an inquiry, account, reference or event ID, or that of another object. An
    account includes the inquiries that events link to it; a reference ID its inquiries, and its
    and their accounts with all of theirs. What arrives later loses its body, too, if it was
    created until `later`, else until `before`.
    """
    db.execute(
        """
        INSERT INTO redactions (subject_id, redacted_before) VALUES (?, ?)
        ON CONFLICT (subject_id) DO UPDATE SET
            redacted_before = max(redacted_before, excluded.redacted_before)
        """,
        (subject, later or before),
    )
    rows = json.dumps(find_events(db, subject))
    return db.execute(REMOVE_BODIES, {"now": utc_now(), "rows": rows, "before": before}).rowcount


REMOVE_BODIES = """
    UPDATE events SET body = NULL, redacted_at = :now,
        error = substr(error, 1, instr(error || ':', ':') - 1)  -- the kind, not the message
    WHERE rowid IN (SELECT value FROM json_each(:rows))
        AND body IS NOT NULL AND created_at <= :before
"""


def find_events(db: sqlite3.Connection, subject: str) -> list[int]:
    """Return the positions of all events of a subject.

    A case or a transaction may concern several people, so it does not tell which inquiry
    belongs to which account.
    """
    query = """
        WITH own(id) AS (
                SELECT ?1
                UNION SELECT account_id FROM events
                    WHERE reference_id = ?1 AND account_id IS NOT NULL
                UNION SELECT account_id FROM events WHERE account_id IS NOT NULL
                    AND COALESCE(object_type, '') NOT IN ('case', 'transaction')
                    AND inquiry_id IN (SELECT inquiry_id FROM events WHERE reference_id = ?1)),
            ids(id) AS (
                SELECT id FROM own
                UNION SELECT inquiry_id FROM events
                    WHERE account_id IN (SELECT id FROM own) AND inquiry_id IS NOT NULL
                    AND COALESCE(object_type, '') NOT IN ('case', 'transaction')
                UNION SELECT inquiry_id FROM events
                    WHERE reference_id = ?1 AND inquiry_id IS NOT NULL)
        SELECT rowid FROM events WHERE inquiry_id IN (SELECT id FROM ids)
        UNION SELECT rowid FROM events WHERE account_id IN (SELECT id FROM ids)
        UNION SELECT rowid FROM events WHERE reference_id = ?1
        UNION SELECT rowid FROM events WHERE object_id = ?1
            AND object_id IS NOT inquiry_id AND object_id IS NOT account_id
        UNION SELECT rowid FROM events WHERE event_id = ?1
    """
    return [row[0] for row in db.execute(query, (subject,))]


# --------------------------------------------------------------------------------------
# Handlers
# --------------------------------------------------------------------------------------

Handler = Callable[[sqlite3.Connection, Event], None]
HANDLERS: dict[str, list[Handler]] = {}


def on(*names: str) -> Callable[[Handler], Handler]:
    """Register a function for the events with these names: handler(db, event).

    It runs in the transaction that journals the event, after the projection; if it raises,
    what the event's handlers did is undone, the event is kept as failed, and Persona's
    redelivery or `flask replay` runs them again. It must be quick and touch only the
    database, in tables of its own.
    """

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS.setdefault(name, []).append(handler)
        return handler

    return register


# Put your handlers here. For example, with a table of your own:
#
# @on("inquiry.approved")
# def open_account(db, event):
#     db.execute("CREATE TABLE IF NOT EXISTS approvals (inquiry_id TEXT PRIMARY KEY) STRICT")
#     db.execute("INSERT OR IGNORE INTO approvals VALUES (?)", (event.inquiry_id,))


def dispatch(db: sqlite3.Connection, event: Event, first: bool, fault: str | None = None) -> str:
    """Run the handlers of an event that is in the journal, unless they have; say what became.

    `fault` says why they cannot be run at all.
    """
    state = "processed"
    if not first:
        query = "SELECT state FROM events WHERE event_id = ?"
        state = db.execute(query, (event.event_id,)).fetchone()[0]
        if state == "processed":
            return DUPLICATE
    if event.name == UNRECOGNIZED:
        return UNRECOGNIZED
    error = fault or run_handlers(db, event)
    if error or state == "failed":
        state = "failed" if error else "processed"
        db.execute(SET_STATE, (state, error, event.event_id))
    return FAILED if error else STORED


SET_STATE = """
    UPDATE events SET state = ?1, error = CASE WHEN redacted_at IS NULL THEN ?2
        ELSE substr(?2, 1, instr(?2 || ':', ':') - 1) END  -- the kind, not the message
    WHERE event_id = ?3
"""


def run_handlers(db: sqlite3.Connection, event: Event) -> str | None:
    """Run an event's handlers, all or nothing; return why one failed, or None."""
    if event.name not in HANDLERS:
        return None
    db.execute("SAVEPOINT handlers")
    try:
        db.set_authorizer(protect_transaction)
        for handler in HANDLERS[event.name]:
            handler(db, event)
        error = None
    except KeyboardInterrupt:  # of whoever runs `flask replay`
        raise
    except BaseException as exception:  # even sys.exit() in a handler fails its event alone
        error = explain_error(exception)
    finally:
        db.set_authorizer(None)
        db.row_factory, db.text_factory = sqlite3.Row, str
    if not db.in_transaction:  # INSERT OR ROLLBACK, RAISE(ROLLBACK), a full disk
        raise TransactionLostError(error or "a handler ended the transaction")
    if error:
        db.execute("ROLLBACK TO handlers")
    conclude(db, "RELEASE handlers")
    return error


def explain_error(error: BaseException) -> str:
    """Return an exception's kind and message, in words that a table can hold."""
    try:
        words = f"{type(error).__name__}: {error}".removesuffix(": ")[:1000]
    except Exception:  # of its own __str__
        words = type(error).__name__
    return words.encode(errors="backslashreplace").decode()


def protect_transaction(action: int, _: str | None, name: str | None, *__: object) -> int:
    """Refuse what would end a handler's transaction or savepoint; asked at each prepare."""
    ends = action == sqlite3.SQLITE_TRANSACTION
    ends |= action == sqlite3.SQLITE_SAVEPOINT and name == "handlers"
    return sqlite3.SQLITE_DENY if ends else sqlite3.SQLITE_OK


# --------------------------------------------------------------------------------------
# HTTP
# --------------------------------------------------------------------------------------

routes = Blueprint("persona", __name__, cli_group=None)

ANSWERS = {
    STORED: (200, {"received": True}),
    UNRECOGNIZED: (200, {"received": True}),
    DUPLICATE: (200, {"received": True, "duplicate": True}),
    FAILED: (500, {"error": "A handler failed; the event is kept, send it again"}),
}


@routes.post("/webhooks/persona")
@routes.post("/webhook")
def receive() -> Response:
    """Verify, read and store one delivery; answer when it is on disk."""
    config, journal = current_app.config["KYC"], current_app.extensions["journal"]
    body = read_body(config.max_body_bytes)
    verify(body, request.headers, config, time.time())
    received_at = utc_now()
    event = read_event(body, received_at)
    outcome = journal.append(Delivery(event, body, received_at, read_attempt()))
    return answer(*ANSWERS[outcome])


STALL_TIMEVAL = struct.pack("@ll", int(ANSWER_SECONDS), 0)


def read_body(limit: int) -> bytes:
    """Return the raw body; end the request when it is over `limit` bytes or broken off."""
    connection = request.environ.get("gunicorn.socket")
    if connection:
        # A client that stalls must not hold a thread. Not settimeout: that polls at each call.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, STALL_TIMEVAL)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, STALL_TIMEVAL)
    try:
        body = request.get_data(cache=False)
    except RequestEntityTooLarge:
        raise
    except Exception:  # werkzeug's or the server's own, for a malformed or broken body
        if connection:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # gunicorn would wait for the rest
        raise BadRequest from None
    if len(body) > limit:
        raise RequestEntityTooLarge
    if len(body) < (request.content_length or 0):
        raise BadRequest  # the client left in the middle
    return body


def read_attempt() -> int | None:
    """Return how often Persona has tried this delivery, if it says so."""
    value = request.headers.get("Persona-Webhook-Attempts-Made", "")
    return int(value) if re.fullmatch(r"[0-9]{1,9}", value) else None


def answer(status: int, content: dict[str, Any]) -> Response:
    """Return a JSON response."""
    return Response(json.dumps(content) + "\n", status, mimetype="application/json")


@routes.get("/")
def index() -> Response:
    """Say that the server runs, and where to POST."""
    return Response(
        "Persona webhook receiver. POST events to /webhooks/persona\n", mimetype="text/plain"
    )


@routes.get("/healthz")
def healthz() -> Response:
    """Say whether the database can be opened and written, by writing to it."""
    try:
        current_app.extensions["journal"].append(Delivery())
    except JournalError as error:
        return answer(503, {"status": "unavailable", "reason": str(error)})
    return answer(200, {"status": "ok"})


@routes.app_errorhandler(SignatureError)
def refuse(error: SignatureError) -> Response:
    """Answer a request that is not authentic."""
    log.warning("outcome=rejected stale=%s reason=%s", str(error.stale).lower(), quote(str(error)))
    return answer(401, {"error": "Invalid signature", "reason": str(error)})


@routes.app_errorhandler(JournalError)
def postpone(error: JournalError) -> Response:
    """Answer an event that could not be stored: Persona sends it again."""
    log.error("outcome=unavailable reason=%s", quote(str(error)))
    response = answer(503, {"error": "The event could not be stored", "reason": str(error)})
    response.headers["Retry-After"] = "5"
    return response


@routes.app_errorhandler(HTTPException)
def explain(error: HTTPException) -> Response:
    """Answer a wrong path, method or body in JSON; log what was posted in vain."""
    if request.method == "POST":
        log.warning("outcome=rejected stale=false reason=%s", quote(error.name))
    response = error.get_response()
    response.data = json.dumps({"error": error.name}) + "\n"
    response.mimetype = "application/json"
    return response


@routes.app_errorhandler(Exception)
def confess(error: Exception) -> Response:
    """Answer a bug with 500, so that the event is sent again; log where, but no values."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    log.error("outcome=error error=%s place=%s", type(error).__name__, place)
    return answer(500, {"error": "Internal server error"})


START_SECONDS = 5.0  # after them, gunicorn is taken to serve


def create_app(environ: Mapping[str, str]) -> Flask:
    """Return the service, configured by `environ`; raise ConfigError or DatabaseError.

    The `flask` command gets it without a secret and without touching the database.
    """
    config = read_config(environ)
    app = Flask(__name__, static_folder=None)
    app.config["KYC"] = config
    # One byte more, because werkzeug cuts a chunked body off at its limit without a word.
    app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes + 1
    app.extensions["journal"] = Journal(config.database)
    app.register_blueprint(routes)
    if environ.get("FLASK_RUN_FROM_CLI") != "true":
        if not config.secrets:
            raise ConfigError("PERSONA_WEBHOOK_SECRET is not set: nothing could be verified")
        start_logging()
        warn(config, environ)
        try:
            prepare_database(config.database)
        except DatabaseError as error:
            if not isinstance(error, DatabaseBusyError) and not is_replacement():
                raise
            log.error("KYC_DATABASE cannot be used for now, events get 503: %s", error)
        atexit.register(app.extensions["journal"].stop)
    return app


def is_replacement() -> bool:
    """Tell whether this is a worker of a gunicorn that serves already, and must not end it.

    A worker is forked, so its command is gunicorn's. Only Linux tells.
    """
    parent = Path(f"/proc/{os.getppid()}")
    try:
        forked = (parent / "cmdline").read_bytes() == Path("/proc/self/cmdline").read_bytes()
        begun = int((parent / "stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return False
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - begun / os.sysconf("SC_CLK_TCK")
    return forked and age > START_SECONDS


def start_logging() -> None:
    """Log to stderr, a line at a time; the platform adds the time."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def warn(config: Config, environ: Mapping[str, str]) -> None:
    """Say loudly what is dangerous about this configuration."""
    if DEVELOPMENT_SECRET.encode() in config.secrets:
        log.warning("WARNING: the development secret is accepted: anyone can forge events")
    if config.tolerance == 0 or config.scheme == "body":
        log.warning("WARNING: no replay protection: timestamps are not checked")
    if "DYNO" in environ:
        log.warning("WARNING: a Heroku dyno's disk does not last: events will be lost at restart")


# --------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------


def operation(*decorators: Callable) -> Callable:
    """Register a function as a `flask` command; what goes wrong is one line on stderr."""

    def register(function: Callable) -> click.Command:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            if sys.stdout:
                sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may be ASCII
            try:
                function(*args, **kwargs)
            except (DatabaseError, sqlite3.Error) as error:
                path = current_app.config["KYC"].database
                raise click.ClickException(f"KYC_DATABASE {path}: {error}") from None
            except UnicodeEncodeError:
                raise click.ClickException("an argument is not UTF-8") from None
            except OSError as error:
                if error.errno == errno.EPIPE:  # the reader of the pipe has seen enough
                    raise
                place = f"{error.filename}: " if error.filename else ""
                raise click.ClickException(f"{place}{error.strerror}") from None

        for decorator in reversed(decorators):
            run = decorator(run)
        return routes.cli.command(function.__name__.removesuffix("_command"))(run)

    return register


def open_database(*, readonly: bool = False) -> sqlite3.Connection:
    """Open the configured database for a command."""
    db = connect(current_app.config["KYC"].database)
    if readonly:
        db.execute("PRAGMA query_only = ON")
    if db.execute("PRAGMA user_version").fetchone()[0] < SCHEMA_VERSION:
        raise DatabaseError("the file has no journal yet: start the service once")
    return db


@contextlib.contextmanager
def writing(db: sqlite3.Connection) -> Iterator[None]:
    """Run the block as one transaction, in turn with the service's own."""
    with write_lock(current_app.config["KYC"].database), transaction(db):
        yield


def report_removal(db: sqlite3.Connection, removed: int) -> None:
    """Say how many bodies were removed, when they are gone from the files as bytes, too."""
    scrub_wal(db)
    click.echo(f"{removed} {'body' if removed == 1 else 'bodies'} removed")


def scrub_wal(db: sqlite3.Connection) -> None:
    """Empty the WAL, so that removed bodies are gone from the disk's files as bytes."""
    path = current_app.config["KYC"].database
    db.execute("PRAGMA busy_timeout = 0")  # wait for readers without stopping the service
    for _ in range(50):
        with write_lock(path):
            if not checkpoint(db, path, EMPTY_WAL)[0]:
                return
        time.sleep(0.1)
    raise DatabaseError("removed, but a reader keeps the bytes in the WAL: end it, run this again")


def confirm(question: str, yes: bool) -> None:
    """Ask before something that cannot be undone, unless told not to or nobody is there."""
    if not yes and sys.stdin and sys.stdin.isatty():
        click.confirm(question, abort=True)


def progress(*args: Any, **kwargs: Any) -> Any:
    """Return a progress bar on stderr, which only a terminal sees."""
    return click.progressbar(*args, file=sys.stderr, hidden=not sys.stderr.isatty(), **kwargs)


def print_table(heads: list[str], rows: list[list[Any]]) -> None:
    """Print rows in aligned columns, heads in bold on a terminal."""
    cells = [["" if value is None else printable(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    click.secho("  ".join(map(str.ljust, heads, widths)).rstrip(), bold=True)
    for row in cells:
        line = "  ".join(map(str.ljust, row, widths)).rstrip()
        click.secho(line, fg="red" if "failed" in row else None)


def printable(value: Any) -> str:
    """Return `value` as text that cannot move a terminal's cursor."""
    return "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value)
    )


class Moment(click.ParamType):
    """A time, ISO 8601, or an age such as 90d, 12h, 30m; in the tables' form."""

    name = "TIME"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the time meant by `value`."""
        if age := re.fullmatch(r"([0-9]{1,6})([dhms])", value):
            unit = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}[age[2]]
            with contextlib.suppress(OverflowError):
                return format_time(datetime.now(UTC) - timedelta(**{unit: int(age[1])}))
        return read_time(value) or self.fail(f"{value!r} is neither a time nor an age such as 90d")


# flask trigger: an event as realistic as Persona's, for trials and tests


def local_url() -> str:
    """Return the URL of the local server."""
    return f"http://127.0.0.1:{os.environ.get('PORT', '3000')}/webhooks/persona"


@operation(
    click.argument("name"),
    click.option("--url", default=local_url, help="Where to POST.  [default: the local server]"),
    click.option("--reference-id", help="Your ID of the person."),
    click.option("--inquiry-id", help="The inquiry; a new one when left out."),
    click.option("--account-id", help="The account; a new one when left out."),
    click.option("--created-at", type=Moment(), help="When it happened.  [default: now]"),
    click.option("--event-id", help="The event's ID; with --count, sent as duplicates."),
    click.option("--scheme", type=click.Choice(SCHEMES), help="[default: as configured]"),
    click.option(
        "--inflection",
        type=click.Choice(["kebab", "camel", "snake"]),
        default="kebab",
        help="How keys are spelt.  [default: kebab]",
    ),
    click.option("--count", type=click.IntRange(1, 1_000_000), default=1, help="How many to send."),
    click.option("--print", "show", is_flag=True, help="Print the body instead of sending it."),
)
def trigger(
    name: str,
    url: str,
    scheme: str | None,
    inflection: str,
    count: int,
    show: bool,
    **ids: str | None,
) -> None:
    """Build the event NAME, sign it and send it.

    Example: flask trigger inquiry.approved --reference-id user-42
    """
    config = current_app.config["KYC"]
    secret = config.secrets[0] if config.secrets else DEVELOPMENT_SECRET.encode()
    if not config.secrets and not show:
        click.echo(
            "PERSONA_WEBHOOK_SECRET is not set: signing with the development secret", err=True
        )
    for _ in range(count):
        document = inflect(build_event(name, **ids), inflection)
        if show:
            click.echo(json.dumps(document, indent=2))
            continue
        body = json.dumps(document).encode()
        status, reply = post(
            url, body, sign(body, secret, scheme or config.scheme, int(time.time()))
        )
        click.echo(printable(f"{name} {document['data']['id']} -> {status} {reply}"))
        if status != 200:
            raise click.exceptions.Exit(1)


def post(url: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    """POST a delivery as Persona does; return status and body of the answer."""
    import http.client  # here, so that the service need not hold them
    import urllib.request

    headers |= {
        "Content-Type": "application/json; charset=utf-8",
        "Persona-Webhook-Attempts-Made": "1",
        "Persona-Webhook-Attempts-Left": "7",
        "Persona-Webhook-First-Attempted-At": str(int(time.time())),
    }
    try:
        opener = urllib.request.OpenerDirector()  # which follows no redirect, as Persona does not
        for name in ("HTTP", "HTTPS", "Unknown"):
            opener.add_handler(getattr(urllib.request, f"{name}Handler")())
        with opener.open(urllib.request.Request(url, body, headers), timeout=10) as response:
            return response.status, response.read().decode(errors="replace").strip()
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = printable(getattr(error, "reason", None) or error or type(error).__name__)
        raise click.ClickException(f"{url}: {cause}; does the server run?") from None


PREFIXES = {
    **{"inquiry": "inq", "inquiry-session": "iqse", "account": "act", "case": "case"},
    **{"verification": "ver", "report": "rep", "document": "doc", "selfie": "self"},
    **{"transaction": "txn", "transaction-type": "txntp", "workflow-run": "wfr"},
    **{"graph-query": "grphq", "importer-pipeline-run": "mprtpr"},
}
KINDS = {
    **{"verification": "verification/government-id", "document": "document/government-id"},
    **{"selfie": "selfie/profile-and-center"},
}
NAMES_ACCOUNT = {"account", "case", "inquiry", "report"}
NAMES_INQUIRY = NAMES_ACCOUNT - {"account"} | {"document", "inquiry-session"}
NAMES_INQUIRY |= {"selfie", "verification"}
BEFORE_ACCOUNT = {"inquiry.created", "inquiry.started", "inquiry.transitioned", "inquiry.expired"}
WITH_ACCOUNT = {"transaction.added-relation", "transaction.status-updated"}
WITH_ACCOUNT |= {"transaction.sentinel-session-processed"}
PERSON = {
    **{"name-first": "Jane", "name-middle": None, "name-last": "Doe", "birthdate": "1994-12-30"},
    **{"address-street-1": "123 Main St", "address-city": "San Francisco"},
    **{"address-subdivision": "California", "address-postal-code": "94111"},
    **{"email-address": "jane@example.com", "phone-number": "+14155550123"},
}
HAPPENED_AT = {
    **{"started": "started-at", "completed": "completed-at", "failed": "failed-at"},
    **{"marked-for-review": "marked-for-review-at", "expired": "expired-at"},
    **{"approved": "decisioned-at", "declined": "decisioned-at", "redacted": "redacted-at"},
}
BEHAVIORS = {
    **{"behavior-threat-level": "low", "distraction-events": 2, "hesitation-percentage": 36.2934},
    **{"request-spoof-attempts": 0, "user-agent-spoof-attempts": 0},
}


def build_event(
    name: str,
    event_id: str | None = None,
    created_at: str | None = None,
    inquiry_id: str | None = None,
    account_id: str | None = None,
    reference_id: str | None = None,
) -> dict[str, Any]:
    """Return the document of an event named `name`, shaped like Persona's (page "Events").

    IDs that are left out are new, or absent where Persona names none: an inquiry, for
    example, names its account only from its completion on.
    """
    kind, _, happening = name.rpartition(".")
    if not kind or not happening:
        raise click.BadParameter("an event is named like inquiry.approved", param_hint="NAME")
    family = kind.split("/")[0]
    if (family in NAMES_ACCOUNT and name not in BEFORE_ACCOUNT) or name in WITH_ACCOUNT:
        account_id = account_id or new_id("act")
    if family in NAMES_INQUIRY and not kind.startswith("report/business-"):
        inquiry_id = inquiry_id or new_id("inq")
    own_id = {"inquiry": inquiry_id, "account": account_id}.get(family)
    event = Event(
        *(event_id or new_id("evt"), name, created_at or utc_now(), KINDS.get(kind, kind)),
        *(own_id or new_id(PREFIXES.get(family, family[:4])), inquiry_id, account_id, reference_id),
    )
    build = {"inquiry": build_inquiry, "account": build_account}.get(family, build_part)
    thing = {"type": event.object_type, "id": event.object_id, **build(event, happening)}
    attributes = {
        "name": name,
        "payload": {"data": thing, "included": []},
        "created-at": event.created_at,
    }
    return {"data": {"type": "event", "id": event.event_id, "attributes": attributes}}


def new_id(prefix: str) -> str:
    """Return an ID like Persona's: a prefix and 24 letters and digits."""
    letters = string.ascii_letters + string.digits
    return f"{prefix}_{''.join(random.SystemRandom().choices(letters, k=24))}"


def point(kind: str, target: str | None) -> dict[str, Any]:
    """Return a relationship to one object, or to none."""
    return {"data": {"type": kind, "id": target} if target else None}


def build_inquiry(event: Event, happening: str) -> dict[str, Any]:
    """Return attributes and relationships of an inquiry."""
    status = STATUSES.get(event.name, ("completed", 0))[0]
    done = status not in ("created", "pending", "expired")
    person = dict.fromkeys(PERSON) if happening == "redacted" else PERSON
    parts = {
        "sessions": {"type": "inquiry-session", "id": new_id("iqse")},
        "verifications": {"type": "verification/government-id", "id": new_id("ver")},
    }
    return {
        "attributes": {
            "status": status,
            "reference-id": event.reference_id,
            "note": None,
            "behaviors": BEHAVIORS | {"completion-time": 40.172463903 if done else None},
            "tags": [],
            "creator": "API",
            "reviewer-comment": None,
            "created-at": event.created_at,
            "updated-at": event.created_at,
            **dict.fromkeys(HAPPENED_AT.values()),
            **({HAPPENED_AT[happening]: event.created_at} if happening in HAPPENED_AT else {}),
            "previous-step-name": "verification_selfie" if done else None,
            "next-step-name": "success" if done else "start",
            "fields": {key: {"type": "string", "value": value} for key, value in person.items()},
            **person,
        },
        "relationships": {
            "account": point("account", event.account_id),
            **{name: point(name, None) for name in ("template", "transaction", "reviewer")},
            "inquiry-template": point("inquiry-template", new_id("itmpl")),
            "inquiry-template-version": point("inquiry-template-version", new_id("itmplv")),
            **{name: {"data": []} for name in ("reports", "documents", "selfies")},
            **{name: {"data": [part] if done else []} for name, part in parts.items()},
        },
    }


def build_account(event: Event, happening: str) -> dict[str, Any]:
    """Return attributes of an account."""
    person = dict.fromkeys(PERSON) if happening == "redacted" else PERSON
    fields = {key.replace("-", "_"): value for key, value in person.items()}
    return {
        "attributes": {
            "reference-id": event.reference_id,
            "account-type-name": "User",
            "account-status": "Default",
            "created-at": event.created_at,
            "updated-at": event.created_at,
            "redacted-at": event.created_at if happening == "redacted" else None,
            "fields": {key: {"type": "string", "value": value} for key, value in fields.items()},
            "tags": [],
            **person,
        }
    }


def build_part(event: Event, happening: str) -> dict[str, Any]:
    """Return attributes and relationships of a verification, a report, or anything else."""
    checks = ("id_barcode_detection", "id_expired_detection", "id_selfie_comparison")
    passed = {"status": "passed", "reasons": [], "requirement": "required"}
    return {
        "attributes": {
            "status": happening,
            "created-at": event.created_at,
            "created-at-ts": int(datetime.fromisoformat(event.created_at).timestamp()),
            "completed-at": event.created_at,
            "redacted-at": event.created_at if happening == "redacted" else None,
            "country-code": "US",
            "tags": [],
            "checks": [{"name": name, **passed} for name in checks],
            **({"reference-id": event.reference_id} if event.reference_id else {}),
            **PERSON,
        },
        "relationships": {
            "inquiry": point("inquiry", event.inquiry_id),
            "account": point("account", event.account_id),
            "transaction": point("transaction", None),
        },
    }


def inflect(value: Any, inflection: str) -> Any:
    """Return `value` with its kebab-case keys inflected as a webhook's setting would."""
    if isinstance(value, list):
        return [inflect(item, inflection) for item in value]
    if not isinstance(value, dict):
        return value
    change = {"kebab": str, "camel": camel_case, "snake": lambda key: key.replace("-", "_")}
    return {change[inflection](key): inflect(item, inflection) for key, item in value.items()}


# flask status, flask events: read


PEOPLE = """
    WITH accounts(id) AS (SELECT ?1 UNION SELECT account_id FROM events WHERE inquiry_id = ?1
            AND COALESCE(object_type, '') NOT IN ('case', 'transaction')
            AND NOT EXISTS (SELECT 1 FROM inquiries WHERE inquiry_id = ?1)),
        people(person, guessed) AS (
            SELECT id, 1 FROM accounts
            UNION ALL SELECT person, 0 FROM inquiries WHERE inquiry_id = ?1
            UNION ALL SELECT i.person, 0 FROM events AS e JOIN inquiries AS i USING (inquiry_id)
                WHERE e.account_id IN (SELECT id FROM accounts) AND i.account_id = e.account_id
            UNION ALL SELECT reference_id, 0 FROM events AS e
                WHERE (inquiry_id = ?1 OR account_id IN (SELECT id FROM accounts))
                AND NOT EXISTS (SELECT 1 FROM inquiries WHERE inquiry_id = e.inquiry_id))
    SELECT person, min(guessed) FROM people WHERE person IS NOT NULL GROUP BY person ORDER BY 2
"""


@operation(
    click.argument("reference_id"),
    click.option("--json", "as_json", is_flag=True, help="One JSON object per person."),
)
def status(reference_id: str, as_json: bool) -> None:
    """Show the status and the timeline of one person.

    REFERENCE_ID may also be an inquiry or account ID. Example: flask status user-42
    """
    with contextlib.closing(open_database(readonly=True)) as db:
        known = False
        for person, guessed in db.execute(PEOPLE, (reference_id,)).fetchall():
            query = "SELECT * FROM kyc_status WHERE reference_id = ?"
            row = db.execute(query, (person,)).fetchone()
            standing = dict(row) if row else {"reference_id": person, "status": None}
            rows = db.execute("SELECT * FROM kyc_timeline WHERE reference_id = ?", (person,))
            timeline = [dict(event) for event in rows]
            if row or (timeline and not (guessed and known)):
                show_person(standing, timeline, as_json)
                known = True
        if not known:
            raise click.ClickException(f"{printable(reference_id)}: no event names this ID")


def show_person(standing: dict[str, Any], timeline: list[dict[str, Any]], as_json: bool) -> None:
    """Print where a person stands, and what happened."""
    if as_json:
        click.echo(json.dumps({**standing, "timeline": timeline}))
        return
    label = standing["status"] or "no status yet"
    click.secho(f"{printable(standing['reference_id'])}: {label}", bold=True)
    for key in ("inquiry_id", "account_id", "event_name", "event_at", "updated_at"):
        if standing.get(key):
            click.echo(f"  {key.replace('_', ' '):<12}{printable(standing[key])}")
    click.echo()
    columns = ["event_at", "event_name", "state", "event_id", "inquiry_id"]
    heads = [column.upper().replace("_", " ") for column in columns]
    print_table(heads, [[event[column] for column in columns] for event in timeline])


NEXT_EVENTS = """
    SELECT rowid AS position, received_at, created_at, name, state, event_id, object_type,
        object_id, inquiry_id, account_id, reference_id, attempt, error, body_sha256, redacted_at
    FROM events
    WHERE rowid > :after AND rowid <= :end AND (:name IS NULL OR name GLOB :name)
        AND (:state IS NULL OR state = :state) AND (:since IS NULL OR received_at >= :since)
    ORDER BY rowid LIMIT :limit
"""
BEFORE_NEWEST = """
    SELECT rowid FROM events
    WHERE (:name IS NULL OR name GLOB :name) AND (:state IS NULL OR state = :state)
        AND (:since IS NULL OR received_at >= :since)
    ORDER BY rowid DESC LIMIT 1 OFFSET :limit
"""
EVENT_LINE = "{:<8}  {:<24}  {:<24}  {:<28}  {:<12}  {}"


@operation(
    click.option("--name", help="Only events with this name; a glob such as 'inquiry.*'."),
    click.option(
        "--state",
        type=click.Choice(["processed", "failed", "unrecognized"]),
        help="Only events in this state.",
    ),
    click.option("--since", type=Moment(), help="Received since; a time or an age."),
    click.option(
        "--limit", type=click.IntRange(1, 10**9), default=20, help="How many.  [default: 20]"
    ),
    click.option("--json", "as_json", is_flag=True, help="One JSON object a line."),
    click.option("--follow", is_flag=True, help="Go on printing what arrives, like tail -f."),
    click.option("--after", type=click.IntRange(0, 10**15), help="Begin after this position."),
)
def events(
    limit: int, as_json: bool, follow: bool, after: int | None, **filters: str | None
) -> None:
    """List the newest of the journal, or the oldest --after a position, in order of arrival.

    Example: flask events --name 'inquiry.*' --since 1h --json --follow
    """
    wanted = {**filters, "limit": limit, "after": after}
    rows, wanted["after"] = list_events(wanted)
    if not as_json:
        heads = ("POSITION", "RECEIVED AT", "CREATED AT", "NAME", "STATE", "EVENT ID")
        click.secho(EVENT_LINE.format(*heads), bold=True)
    show_events(rows, as_json)
    wanted["limit"] = CHUNK
    while follow:
        time.sleep(0 if len(rows) == CHUNK else 0.2)
        try:
            rows, wanted["after"] = list_events(wanted)
        except (DatabaseError, sqlite3.Error):
            rows = []  # the file is being replaced, or the disk is busy: look again
        show_events(rows, as_json)


def list_events(wanted: dict[str, Any]) -> tuple[list[sqlite3.Row], int]:
    """Return journal rows in order, and the position to go on from; sees the file anew."""
    after = wanted["after"]
    with contextlib.closing(open_database(readonly=True)) as db:
        db.execute("BEGIN")  # one view of the journal for all three
        end = db.execute("SELECT COALESCE(max(rowid), 0) FROM events").fetchone()[0]
        if after is None:
            after = (db.execute(BEFORE_NEWEST, wanted).fetchone() or [0])[0]
        rows = db.execute(NEXT_EVENTS, {**wanted, "after": after, "end": end}).fetchall()
    return rows, rows[-1]["position"] if len(rows) == wanted["limit"] else max(after, end)


def show_events(rows: list[sqlite3.Row], as_json: bool) -> None:
    """Print journal rows, and let a pipe have them at once."""
    for row in rows:
        if as_json:
            click.echo(json.dumps(dict(row)))
        else:
            line = EVENT_LINE.format(*map(printable, row[:6]))
            click.secho(line, fg="red" if row["state"] == "failed" else None)
    if sys.stdout:
        sys.stdout.flush()


# flask replay, rebuild: mend


@operation(click.argument("event_id", nargs=-1))
def replay(event_id: tuple[str, ...]) -> None:
    """Run the handlers of failed events again; of all that have their body when none is given.

    Example: flask replay evt_2aBcDeFgHiJkLmNoPqRsTuVw
    """
    with contextlib.closing(open_database()) as db:
        query = """
            SELECT f.event_id, e.body IS NOT NULL FROM failed_events AS f
            JOIN events AS e USING (event_id) ORDER BY position
        """
        failed = dict(map(tuple, db.execute(query)))
        if unknown := [printable(name) for name in event_id if name not in failed]:
            raise click.ClickException(f"{', '.join(unknown)}: not a failed event")
        done = [replay_event(db, name) for name in event_id or filter(failed.get, failed)]
    passed_over = len(failed) - len(done) if not event_id else 0
    note = f", {passed_over} passed over: their bodies were removed" if passed_over else ""
    click.echo(f"{done.count(True)} processed, {done.count(False)} failed{note}")
    if not all(done):
        raise click.exceptions.Exit(1)


def replay_event(db: sqlite3.Connection, event_id: str) -> bool:
    """Dispatch one failed event in a transaction of its own; tell whether it is processed."""
    query = "SELECT body, received_at, state, error FROM events WHERE event_id = ?"
    body, received_at, *_ = db.execute(query, (event_id,)).fetchone()
    if body is not None:
        event = read_event(body.encode() if isinstance(body, str) else body, received_at)
        try:
            with writing(db):
                dispatch(db, event, first=False)
        except TransactionLostError as fault:
            with writing(db):
                dispatch(db, event, first=False, fault=explain_error(fault))
    *_, state, error = db.execute(query, (event_id,)).fetchone()
    why = "its body was removed, and with it what the handler needs" if body is None else error
    click.echo(printable(f"{event_id} {state}" + (f": {why}" if state == "failed" else "")))
    return state == "processed"


CHUNK = 1000  # events or rows that a command takes at a time


@operation()
def rebuild() -> None:
    """Compute inquiries and kyc_status again from the journal, and mend what differs.

    The service keeps serving: the journal is folded into tables beside the real ones, and
    only what differs is written. Example: flask rebuild
    """
    with contextlib.closing(open_database()) as db, contextlib.closing(open_shadow()) as shadow:
        total = db.execute("SELECT COALESCE(max(rowid), 0) FROM events").fetchone()[0]
        with progress(length=total, label="Reading the journal") as bar:
            for last in range(0, total, CHUNK):
                with transaction(shadow):
                    project(shadow, read_journal(shadow, last, min(last + CHUNK, total)))
                bar.update(min(CHUNK, total - last))
        differences = find_differences(shadow, total)
        with progress(differences, label="Mending") as bar:
            for first in range(0, len(differences), CHUNK):
                mend(db, differences[first : first + CHUNK])
                bar.update(CHUNK)
    people = [row for row in differences if row["person"]]
    for row in people[:20]:
        before, after = row["before"] or "(no row)", row["after"] or "(no row)"
        change = f"{before} -> {after}" if before != after else f"{after}, from another event"
        click.echo(f"{printable(row['person'])}: {change}")
    if len(people) > 20:
        click.echo(f"... and {len(people) - 20} more")
    click.echo(
        f"{total} events read; {len(differences)} rows differed, {len(people)} of them people"
    )


def open_shadow() -> sqlite3.Connection:
    """Return empty projection tables in a temporary file, beside the real journal.

    Its `inquiries` and `kyc_status` hide the real ones; its `events` are the real journal.
    """
    shadow = sqlite3.connect("", isolation_level=None, timeout=BUSY_SECONDS, uri=True)
    shadow.row_factory = sqlite3.Row
    shadow.executescript(SCHEMA.read_text())
    shadow.execute("DROP TABLE events")
    path = current_app.config["KYC"].database
    shadow.execute("ATTACH ? AS journal", (f"{path.as_uri()}?mode=ro",))  # BEGIN locks it not
    return shadow


DIFFERENCES = """
    SELECT inquiry_id, NULL AS person, NULL AS before, NULL AS after FROM inquiries AS a
        LEFT JOIN journal.inquiries AS b USING (inquiry_id)
        WHERE (a.reference_id, a.account_id, a.status, a.event_id, a.event_name, a.event_at)
        IS NOT (b.reference_id, b.account_id, b.status, b.event_id, b.event_name, b.event_at)
    UNION ALL SELECT inquiry_id, NULL, NULL, NULL FROM journal.inquiries AS b
        WHERE NOT EXISTS (SELECT 1 FROM inquiries AS a WHERE a.inquiry_id = b.inquiry_id)
    UNION ALL SELECT NULL, reference_id, b.status, a.status FROM kyc_status AS a
        LEFT JOIN journal.kyc_status AS b USING (reference_id)
        WHERE (a.status, a.inquiry_id, a.account_id, a.event_id, a.event_name, a.event_at)
        IS NOT (b.status, b.inquiry_id, b.account_id, b.event_id, b.event_name, b.event_at)
    UNION ALL SELECT NULL, reference_id, b.status, NULL FROM journal.kyc_status AS b
        WHERE NOT EXISTS (SELECT 1 FROM kyc_status AS a WHERE a.reference_id = b.reference_id)
"""


def find_differences(shadow: sqlite3.Connection, last: int) -> list[sqlite3.Row]:
    """Return the inquiries and people whose rows differ, both sides seen at one moment."""
    shadow.execute("BEGIN")
    try:
        project(shadow, read_journal(shadow, last))
        return shadow.execute(DIFFERENCES).fetchall()
    finally:
        shadow.execute("END")


def mend(db: sqlite3.Connection, differences: list[sqlite3.Row]) -> None:
    """Project the inquiries and people in `differences` anew, in one transaction."""
    inquiries = json.dumps([row["inquiry_id"] for row in differences if row["inquiry_id"]])
    people = {row["person"] for row in differences if row["person"]}
    query = """
        SELECT event_id, name, created_at, object_type, object_id,
            inquiry_id, account_id, reference_id
        FROM events WHERE inquiry_id IN (SELECT value FROM json_each(?))
            AND object_id = inquiry_id ORDER BY rowid
    """
    with writing(db):
        people |= {row.person for row in read_inquiries(db, json.loads(inquiries)).values()}
        db.execute(DROP_INQUIRIES, (inquiries,))
        project(db, [Event(*row) for row in db.execute(query, (inquiries,))])
        refresh_people(db, people, moved=True)


DROP_INQUIRIES = "DELETE FROM inquiries WHERE inquiry_id IN (SELECT value FROM json_each(?))"


# flask redact, prune: remove bodies


@operation(
    click.argument("subject", metavar="ID"),
    click.option("--yes", is_flag=True, help="Do not ask, as when there is no terminal."),
)
def redact_command(subject: str, yes: bool) -> None:
    """Remove the bodies of an inquiry, account, reference or event ID, or of a case.

    Status, metadata and hash stay. Events of ID that arrive later but were created before
    now are stored without a body. Example: flask redact user-42
    """
    query = """
        SELECT count(*), count(body) FROM events
        WHERE rowid IN (SELECT value FROM json_each(?))
    """
    with contextlib.closing(open_database()) as db:
        rows = json.dumps(find_events(db, subject))
        found, bodies = db.execute(query, (rows,)).fetchone()
        if not found:
            raise click.ClickException(f"{subject}: no event names this ID")
        confirm(f"Remove the bodies of {bodies} of {found} events of {subject}?", yes)
        with writing(db):
            removed = redact(db, subject, LATEST, utc_now())
        report_removal(db, removed)


LATEST = "9999-12-31T23:59:59.999Z"  # after any event

PRUNE = """
    UPDATE events SET body = NULL, redacted_at = ?,
        error = substr(error, 1, instr(error || ':', ':') - 1)
    WHERE rowid > ? AND rowid <= ? AND body IS NOT NULL AND created_at < ?
"""


@operation(
    click.option(
        "--older-than",
        "before",
        type=Moment(),
        required=True,
        help="An age such as 90d, or a time.",
    ),
    click.option("--yes", is_flag=True, help="Do not ask, as when there is no terminal."),
)
def prune(before: str, yes: bool) -> None:
    """Remove all bodies of events that were created before a time.

    Status, metadata and hash stay. Example: flask prune --older-than 90d
    """
    query = """
        SELECT count(*), COALESCE(sum(state = 'failed'), 0), COALESCE(max(rowid), 0)
        FROM events WHERE body IS NOT NULL AND created_at < ?
    """
    with contextlib.closing(open_database()) as db:
        bodies, failed, last = db.execute(query, (before,)).fetchone()
        note = f" {failed} of them failed and can no longer be replayed." if failed else ""
        confirm(f"Remove {bodies} bodies created before {before}?{note}", yes)
        removed = 0
        with progress(range(0, last, CHUNK), label="Removing") as bar:
            for first in bar:
                with writing(db):
                    chunk = (utc_now(), first, first + CHUNK, before)
                    removed += db.execute(PRUNE, chunk).rowcount
        report_removal(db, removed)


# flask backup, check: keep


@operation(click.argument("path", type=click.Path(path_type=Path)))
def backup(path: Path) -> None:
    """Copy the database to PATH while the service runs, and check the copy.

    Example: flask backup /var/backups/kyc-monday.db
    """
    if not path.name:
        raise click.ClickException(f"{path}: is a folder; name a file")
    part = path.with_name(path.name + ".part")
    if os.path.lexists(path):
        raise click.ClickException(f"{path}: exists already; a backup never overwrites")
    if os.path.lexists(part):
        raise click.ClickException(f"{part}: a backup is being made, or was killed; remove it then")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up then, too
    os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with contextlib.closing(open_database(readonly=True)) as db:
            copy_database(db, part)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # fails when the name was taken meanwhile
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    click.echo(f"{path}: {path.stat().st_size} bytes, checked")


def copy_database(db: sqlite3.Connection, path: Path) -> None:
    """Write a consistent copy to the empty file at `path`, check and sync it."""
    db.execute("BEGIN")  # one view of the database for all steps, however much is written
    db.execute("SELECT 1 FROM events").fetchone()  # BEGIN alone fixes no view
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as copy:
        with progress(length=100, label="Copying") as bar:

            def show(_: int, remaining: int, total: int) -> None:
                bar.update(100 - 100 * remaining // max(total, 1) - bar.pos)

            db.backup(copy, pages=5000, progress=show, sleep=0)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, until the service opens it
        verdict = copy.execute("PRAGMA integrity_check").fetchone()[0]
        if verdict != "ok":
            raise DatabaseError(f"the copy is damaged: {verdict}")
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


@operation()
def check() -> None:
    """Look at configuration, file, disk and journal; say what is wrong and what to do.

    Example: flask check
    """
    findings = [*check_configuration(), *check_files()]
    try:
        with contextlib.closing(open_database(readonly=True)) as db:
            findings += check_database(db)
    except (DatabaseError, sqlite3.Error) as error:
        findings.append((False, "database", f"{error}; start the service, or restore a backup"))
    for good, subject, finding in findings:
        click.secho("ok    " if good else "WRONG ", fg="green" if good else "red", nl=False)
        click.echo(f"{subject:<14}{finding}")
    if not all(good for good, _, _ in findings):
        raise click.exceptions.Exit(1)


Finding = tuple[bool, str, str]  # whether it is good, what was looked at, what was found


def check_configuration() -> Iterator[Finding]:
    """Look at the secrets and how they are used."""
    config = current_app.config["KYC"]
    count = len(config.secrets)
    if not count:
        yield False, "secret", "PERSONA_WEBHOOK_SECRET is not set; copy it from Persona's dashboard"
    elif DEVELOPMENT_SECRET.encode() in config.secrets:
        yield False, "secret", "the development secret is accepted; set the webhook's own"
    else:
        yield True, "secret", f"{count} configured"
    protected = bool(config.tolerance) and config.scheme != "body"
    advice = "" if protected else "; old deliveries can be replayed: set a tolerance and a scheme"
    scheme = f"scheme {config.scheme}, tolerance {config.tolerance} s{advice}"
    yield protected, "signature", scheme


def check_files() -> Iterator[Finding]:
    """Look at permissions and free space."""
    path = current_app.config["KYC"].database
    for file in (path, wal_paths(path)[0], lock_path(path)):
        if file.exists():
            mode = stat.S_IMODE(file.stat().st_mode)
            good = not mode & 0o077 and os.access(file, os.R_OK | os.W_OK)
            advice = "" if good else "; chmod 600, owned by the service's user"
            yield good, "permissions", f"{file.name} has mode {mode:04o}{advice}"
    if path.parent.is_dir():
        free = shutil.disk_usage(path.parent).free
        advice = "" if free > 1 << 30 else "; make room, or flask prune --older-than 90d"
        yield not advice, "disk", f"{free / (1 << 30):.1f} GiB free{advice}"


def check_database(db: sqlite3.Connection) -> Iterator[Finding]:
    """Look at schema, integrity and failed events."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    yield True, "schema", f"version {version}"
    verdict = db.execute("PRAGMA integrity_check").fetchone()[0]
    advice = "" if verdict == "ok" else "; restore a backup"
    yield not advice, "integrity", f"{printable(verdict)}{advice}"
    total, odd, failed, lost = db.execute(
        """
        SELECT count(*), COALESCE(sum(state = 'unrecognized'), 0),
            COALESCE(sum(state = 'failed' AND body IS NOT NULL), 0),
            COALESCE(sum(state = 'failed' AND body IS NULL), 0) FROM events
        """
    ).fetchone()
    yield True, "events", f"{total} in the journal, {odd} unrecognized"
    advice = "; see the view failed_events, mend the handler, then flask replay" if failed else ""
    yield not failed, "handlers", f"{failed} failed events{advice}"
    if lost:
        yield True, "handlers", f"{lost} more failed for good: their bodies were removed"


# --------------------------------------------------------------------------------------
# Start
# --------------------------------------------------------------------------------------


def start() -> Flask:
    """Return the service; on a wrong setting say so in one line, and end."""
    try:
        return create_app(os.environ)
    except ConfigError as error:
        message = str(error)
    except DatabaseError as error:
        message = f"KYC_DATABASE {os.environ.get('KYC_DATABASE', 'kyc.db')}: {error}"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    print(f"app.py: {message}", file=sys.stderr)
    sys.exit(4)  # gunicorn takes 4 for an app that does not load, and stops


def serve_locally() -> None:
    """Become gunicorn on 127.0.0.1, with the development secret when none is set."""
    try:
        port = read_number(os.environ, "PORT", 3000, 1, 65535)
        workers = read_number(os.environ, "WEB_CONCURRENCY", 1, 1, 1000)
    except ConfigError as error:
        sys.exit(f"app.py: {error}")
    if not {"PERSONA_WEBHOOK_SECRET", "PERSONA_WEBHOOK_SECRET_FILE"} & os.environ.keys():
        os.environ["PERSONA_WEBHOOK_SECRET"] = DEVELOPMENT_SECRET
    gunicorn = [sys.executable, "-m", "gunicorn", "app:app", "--worker-class", "gthread"]
    gunicorn += ["--threads", "32", "--keep-alive", "0", "--no-control-socket"]
    options = ["--workers", str(workers), "--bind", f"127.0.0.1:{port}"]
    os.execv(sys.executable, [*gunicorn, *options, "--pythonpath", str(Path(__file__).parent)])


if __name__ == "__main__":
    serve_locally()
else:
    app = start()
