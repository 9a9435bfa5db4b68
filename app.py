"""Receive Persona's webhooks: a journal of every event, and the KYC status of every person.

An event's path, which is also the order of this file:

    POST body -> verify(raw bytes, header) -> read_event -> journal and projection, one transaction
              -> fsync -> handlers, a transaction of their own -> 200

Configuration, by environment: PERSONA_WEBHOOK_SECRET or PERSONA_WEBHOOK_SECRET_FILE,
PERSONA_SIGNATURE_TOLERANCE, PERSONA_SIGNATURE_SCHEME, KYC_DATABASE or DATABASE_URL, KYC_TEMPLATES,
KYC_EPHEMERAL_DISK, MAX_BODY_BYTES; PORT and WEB_CONCURRENCY belong to gunicorn. README.md
explains each. The tables, and the rules by which an event sets a status, are in schema.sql.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("app.py: needs Python 3.11 or newer")

import atexit
import codecs
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import hmac
import importlib
import inspect
import json
import logging
import os
import queue
import re
import socket
import sqlite3
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import Connection
from typing import Any, NamedTuple

from flask import Blueprint, Flask, Response, current_app, request
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge

VERSION = "1.0.0"
HERE = Path(__file__).parent
log = logging.getLogger("kyc")

# --------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------

DEVELOPMENT_SECRET = "wbhsec_development_only"
SCHEMES = ("persona", "split", "body")
SECRET = re.compile(rb"[A-Za-z0-9_\-+/.]{16,}={0,2}")
PLACEHOLDER = re.compile(
    rb"\.\.\.|(?<![a-z])(your|here|example|placeholder|changeme)(?![a-z])", re.I
)


class ConfigError(ValueError):
    """A setting, or handlers.py, makes no sense; the message names it."""


@dataclass(frozen=True)
class Config:
    """What the environment says, checked once at start."""

    secrets: tuple[bytes, ...]
    tolerance: int  # seconds; 0 switches the check off
    scheme: str  # one of SCHEMES
    database: Any  # the Path of the file; or, with DATABASE_URL, a postgres.Address
    templates: tuple[str, ...]  # the inquiry templates that count; () for all
    max_body_bytes: int


def read_config(environ: Mapping[str, str]) -> Config:
    """Return the configuration in `environ`; raise ConfigError naming what is wrong.

    An absent secret is left to the caller: the service refuses to start without one,
    the commands do not need one.
    """
    scheme = environ.get("PERSONA_SIGNATURE_SCHEME", "persona")
    if scheme not in SCHEMES:
        raise ConfigError(f"PERSONA_SIGNATURE_SCHEME must be one of {', '.join(SCHEMES)}")
    templates = tuple(re.split(r"[,\s]+", environ.get("KYC_TEMPLATES", "").strip(", \t\n")))
    if templates != ("",) and not all(re.fullmatch(r"\w{1,100}", name) for name in templates):
        raise ConfigError("KYC_TEMPLATES must be IDs such as itmpl_..., separated by commas")
    return Config(
        secrets=read_secrets(environ),
        tolerance=read_number(environ, "PERSONA_SIGNATURE_TOLERANCE", 300, 0, 10**9),
        scheme=scheme,
        database=read_database(environ),
        templates=tuple(sorted(set(templates) - {""})),
        max_body_bytes=read_number(environ, "MAX_BODY_BYTES", 2 * 1024 * 1024, 1, 500_000_000),
    )


def read_database(environ: Mapping[str, str]) -> Any:
    """Return the path in KYC_DATABASE, or the address in DATABASE_URL; raise ConfigError."""
    database = environ.get("KYC_DATABASE", "kyc.db")
    if "DATABASE_URL" in environ:
        if "KYC_DATABASE" in environ:
            raise ConfigError("KYC_DATABASE and DATABASE_URL are both set")
        try:
            return importlib.import_module("postgres").read_address(environ["DATABASE_URL"])
        except ModuleNotFoundError as error:
            words = f"DATABASE_URL is set, but there is no {error.name}"
            raise ConfigError(f"{words}: see postgres/requirements.txt") from None
    if not database or database.endswith("/") or database == ":memory:" or "\0" in database:
        raise ConfigError("KYC_DATABASE must be the path of a file")
    # Relative to this file, not to the current folder; SQLite puts the WAL where links lead.
    return Path(os.path.realpath(HERE / database))


def read_number(environ: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """Return the whole number in variable `name`, or `default` when it is not set."""
    value = environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,18}", value) or not low <= int(value) <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}")
    return int(value)


def read_secrets(environ: Mapping[str, str]) -> tuple[bytes, ...]:
    """Return the webhook secrets, separated by commas or white space; () when not set.

    Raises ConfigError for an entry that does not look like a secret, never quoting it.
    """
    variable, path = "PERSONA_WEBHOOK_SECRET", environ.get("PERSONA_WEBHOOK_SECRET_FILE")
    text = os.fsencode(environ.get(variable, ""))
    if path is not None:
        if variable in environ:
            raise ConfigError(f"{variable} and {variable}_FILE are both set")
        variable += "_FILE"
        try:
            text = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a path"
            raise ConfigError(f"{variable} cannot be read: {reason}") from None
        text = re.sub(rb"(?m)^[ \t]*#.*$", b"", text)
        if not text.strip(b", \t\r\n\v\f"):
            raise ConfigError(f"{variable} names a file that holds no secret")
    secrets = tuple(filter(None, re.split(rb"[,\s]+", text)))
    for number, secret in enumerate(secrets, 1):
        if not SECRET.fullmatch(secret) or PLACEHOLDER.search(secret):
            raise ConfigError(
                f"{variable}: entry {number} of {len(secrets)} is not a webhook secret: at least"
                " 16 letters, digits and _ - + / = . as copied from Persona's dashboard"
            )
    return secrets


@functools.cache
def fingerprint(secret: bytes) -> str:
    """Return what the journal calls a secret: 8 hex digits of its SHA-256."""
    return hashlib.sha256(secret).hexdigest()[:8]


# --------------------------------------------------------------------------------------
# HTTP
# --------------------------------------------------------------------------------------

STORED, DUPLICATE, UNRECOGNIZED, FAILED = "stored", "duplicate", "unrecognized", "failed"
ANSWERS = {
    STORED: (200, {"received": True}),
    UNRECOGNIZED: (200, {"received": True}),
    DUPLICATE: (200, {"received": True, "duplicate": True}),
    FAILED: (500, {"error": "A handler failed; the event is kept, send it again"}),
}
STALL = struct.pack("@ll", 1, 0)  # seconds: Persona sends a body at once
EXCESS = 16 * 1024 * 1024  # bytes over the limit that are read, so that the sender sees the 413

routes = Blueprint("persona", __name__, cli_group=None)


@routes.post("/webhooks/persona", strict_slashes=False)
@routes.post("/webhook", strict_slashes=False)
def receive() -> Response:
    """Verify, read and store one delivery; answer when it is on disk."""
    journal, headers = current_app.extensions["journal"], request.headers
    body = read_body(journal.config.max_body_bytes)
    signed_by = verify(body, headers, journal.config, time.time())
    received_at = utc_now()
    event = read_event(body, received_at)
    delivery = Delivery(event, body, received_at, "webhook", signed_by, read_attempt(headers))
    return answer(*ANSWERS[journal.append(delivery)])


def read_body(limit: int) -> bytes:
    """Return the raw body; raise RequestEntityTooLarge over `limit` bytes, BadRequest if broken."""
    environ = request.environ  # its wsgi.input takes a tenth of the time of request.stream
    connection, given = environ.get("gunicorn.socket"), environ.get("CONTENT_LENGTH", "")
    length = int(given) if given.isdecimal() else 0
    if connection:  # a client that sends nothing must not hold a thread; settimeout would poll
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, STALL)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, STALL)
    parts, size = [], 0
    try:
        if length <= limit + EXCESS:
            read = environ["wsgi.input"].read
            while size <= limit + EXCESS and (part := read(1 << 20)):
                size += len(part)
                parts.append(part if size <= limit else b"")
    except Exception:  # werkzeug's or the server's own, for a malformed or broken body
        if connection:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # gunicorn would wait for the rest
        raise BadRequest from None
    if max(size, length) > limit:
        raise RequestEntityTooLarge
    if size < length:
        raise BadRequest  # the client left in the middle
    return b"".join(parts)


def read_attempt(headers: Mapping[str, str]) -> int | None:
    """Return how often Persona has tried this delivery, if it says so."""
    value = headers.get("Persona-Webhook-Attempts-Made", "")
    return int(value) if re.fullmatch(r"[0-9]{1,9}", value) else None


def answer(status: int, content: dict[str, Any]) -> Response:
    """Return a JSON response."""
    return Response(json.dumps(content) + "\n", status, mimetype="application/json")


@routes.get("/")
def index() -> Response:
    """Say that the server runs, and where to POST."""
    words = "Persona webhook receiver. POST events to /webhooks/persona\n"
    return Response(words, mimetype="text/plain")


@routes.get("/livez")
def livez() -> Response:
    """Say that the process answers."""
    return answer(200, {"status": "ok"})


@routes.get("/healthz")
def healthz() -> Response:
    """Say whether the database can be opened and written; it is tried once a second at most."""
    if reason := current_app.extensions["journal"].probe():
        return answer(503, {"status": "unavailable", "reason": reason})
    return answer(200, {"status": "ok"})


def answer_bad_signature(error: "SignatureError") -> Response:
    """Answer 401 to a request that is not authentic."""
    log_rejection(str(error), error.stale)
    return answer(401, {"error": "Invalid signature", "reason": str(error)})


def answer_unavailable(error: "JournalError") -> Response:
    """Answer 503 for an event that could not be stored: Persona sends it again."""
    log.error("outcome=unavailable reason=%s", quote(str(error)))
    response = answer(503, {"error": "The event could not be stored", "reason": str(error)})
    response.headers["Retry-After"] = "5"
    return response


def answer_http_error(error: HTTPException) -> Response:
    """Answer a wrong path, method or body in JSON; log rejected POSTs."""
    if request.method == "POST":
        log_rejection(error.name)
    response = error.get_response()
    response.data = json.dumps({"error": error.name}) + "\n"
    response.mimetype = "application/json"
    return response


def answer_bug(error: Exception) -> Response:
    """Answer 500, so that the event is sent again; log where, but no values."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    log.error("outcome=error error=%s place=%s", type(error).__name__, place)
    return answer(500, {"error": "Internal server error"})


def log_rejection(reason: str, stale: bool = False) -> None:
    """Log why a request was not accepted."""
    path = request.url_rule.rule if request.url_rule else request.path  # without a person's ID
    words = "outcome=rejected stale=%s reason=%s method=%s path=%s"
    log.warning(words, str(stale).lower(), *map(quote, (reason, request.method, path)))


def quote(value: str) -> str:
    """Return `value` for a log line: as it is when it is a plain word, else in quotes, cut."""
    return value if re.fullmatch(r"[\w./:+-]{1,128}", value, re.ASCII) else json.dumps(value[:128])


# --------------------------------------------------------------------------------------
# Signature
# --------------------------------------------------------------------------------------

MAX_SIGNATURES = 4  # in one header; Persona sends one, two while a secret rotates


class SignatureError(Exception):
    """The request is not authentic; the message says why, without naming any secret."""

    def __init__(self, reason: str, stale: bool = False):
        super().__init__(reason)
        self.stale = stale  # the signature is right, but its time is outside the tolerance


def verify(body: bytes, headers: Mapping[str, str], config: Config, now: float) -> str:
    """Return the fingerprint of the secret that signed `body` around `now`, in unix seconds.

    Raises SignatureError when none did. The scheme is that of Persona's page "Webhooks best
    practices": HMAC-SHA256 of "<t>.<raw body>"; while a secret rotates the header holds
    several pairs, each checked against its own t.
    """
    ages = []
    for timestamp, digest in read_signatures(headers, config.scheme):
        message = body if config.scheme == "body" else timestamp.encode() + b"." + body
        for secret in config.secrets:
            if hmac.compare_digest(hmac.digest(secret, message, "sha256"), digest):
                age = int(now) - int(timestamp)
                unchecked = config.scheme == "body" or not config.tolerance
                if unchecked or abs(age) <= config.tolerance:
                    return fingerprint(secret)
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
        fields = [field.partition("=") for field in re.split(r"[\s,]+", header.strip(" \t,"))]
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


# --------------------------------------------------------------------------------------
# Events
# --------------------------------------------------------------------------------------

MAX_TEXT = 1000  # bytes of an ID; an index of PostgreSQL takes 2,700, with two IDs in it
NAMED_BY_REFERENCE = {"transaction", "importer-pipeline-run"}  # theirs, not a person's
PLURALS = {"inquiry": "inquiries", "account": "accounts"}
MENTIONS = (re.compile(rb"inq_\w{1,64}"), re.compile(rb"act_\w{1,64}"))


class Event(NamedTuple):
    """One Persona event, as read from a body."""

    event_id: str
    name: str
    created_at: str
    object_type: str | None = None
    object_id: str | None = None
    object_status: str | None = None
    inquiry_id: str | None = None
    account_id: str | None = None
    reference_id: str | None = None
    template_id: str | None = None
    payload: Any = None  # what Persona says of the object: {"data": {...}, "included": [...]}


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
            payload, attributes = data, None  # the object, whose created-at is not the event's
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
    columns = read_object(inner if isinstance(inner, dict) else payload, name.rpartition(".")[0])
    return Event(event_id, name, created_at, *columns, payload)


def read_object(thing: Any, kind: str) -> tuple[str | None, ...]:
    """Return the columns of a payload's object, from object_type to template_id.

    One without a type is of the `kind` that the event's name begins with.
    """
    object_type, object_id = text(field(thing, "type")), text(field(thing, "id"))
    if object_id and not object_type:
        object_type = text(kind)
    attributes = field(thing, "attributes")
    status = text(field(attributes, "status"))
    inquiry_id = object_id if object_type == "inquiry" else related(thing, "inquiry")
    account_id = object_id if object_type == "account" else related(thing, "account")
    reference_id = template_id = None
    if object_type == "inquiry":
        template_id = related(thing, "inquiry-template") or related(thing, "template")
    elif object_type == "account":
        status = text(field(attributes, "account-status")) or status
    if object_type not in NAMED_BY_REFERENCE:
        reference_id = text(field(attributes, "reference-id"))
    return object_type, object_id, status, inquiry_id, account_id, reference_id, template_id


def related(thing: Any, kind: str) -> str | None:
    """Return the ID of the only related object of a kind; None if there is none, or several."""
    relationships = field(thing, "relationships")
    things = (
        point_at(relationships, kind)
        or point_at(relationships, PLURALS.get(kind, kind))
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
    """Return `value` if it is text that every index can hold, else None."""
    if not isinstance(value, str) or not value or "\0" in value:
        return None
    try:
        return value if len(value.encode()) <= MAX_TEXT else None
    except UnicodeEncodeError:  # a lone surrogate is legal in JSON, but not in UTF-8
        return None


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


def utc_now() -> str:
    """Return the time as the tables hold it: UTC, to the millisecond."""
    return format_time(datetime.now(UTC))


def format_time(moment: datetime) -> str:
    """Return `moment` as YYYY-MM-DDTHH:MM:SS.mmmZ."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


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

ANSWER_SECONDS = 4.0  # Persona waits five
LEAST_SECONDS = 0.2  # to wait while no commit succeeds; then requests queue in gunicorn, too
MAX_WAITING = 256  # deliveries in line; more means that the database is stuck
MAX_WAL = 16 * 1024 * 1024  # bytes; a longer WAL is copied into the database
KEEP_SECONDS = 60.0  # how long the bytes of a removed body may stay in the WAL
EVENT_BYTES = 30_000  # that an event adds to the WAL beside its body: about a dozen pages

INSERT_EVENT = """
    INSERT INTO events (event_id, name, created_at, received_at, object_type, object_id,
        object_status, inquiry_id, account_id, reference_id, template_id, source, signed_by,
        attempt, body_sha256, state, body)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""
READ_EVENTS = """
    SELECT rowid, state, event_id, name, created_at, object_type, object_id,
        object_status, inquiry_id, account_id, reference_id, template_id
    FROM events WHERE event_id IN (:keys) ORDER BY rowid
"""
INSERT_MENTION = """
    INSERT INTO mentions (id, position) SELECT ?, rowid FROM events WHERE event_id = ?
    ON CONFLICT DO NOTHING
"""


class JournalError(Exception):
    """The event could not be stored, or not in time; the message says why."""


@dataclass(slots=True)
class Delivery:
    """An event on its way into the journal: its body, where from, and what became of it."""

    event: Event | None = None  # None probes whether the journal can be written
    body: bytes = b""
    received_at: str = ""
    source: str = "webhook"  # or "api", "operator"
    signed_by: str | None = None
    attempt: int | None = None
    outcome: str | None = None
    error: str | None = None  # why there is no outcome, or what kind of error a handler raised
    started: float = dataclasses.field(default_factory=time.perf_counter)
    done: Any = dataclasses.field(default_factory=threading.Lock)  # released when it is served

    def __post_init__(self) -> None:
        self.done.acquire()

    def row(self) -> tuple[Any, ...]:
        """Return the journal row, in the order of INSERT_EVENT."""
        event_id, name, created_at, *columns, _ = self.event
        state = "pending" if name in HANDLERS else "processed"
        state = UNRECOGNIZED if name == UNRECOGNIZED else state
        digest = hashlib.sha256(self.body).hexdigest()
        head = (event_id, name, created_at, self.received_at, *columns, self.source, self.signed_by)
        try:
            return (*head, self.attempt, digest, state, self.body.decode())
        except UnicodeDecodeError:
            return (*head, self.attempt, digest, state, self.body)


class Journal:
    """The writer of one process: a thread with one connection, one fsync for all that wait.

    A request puts its delivery in line and sleeps. The thread takes all that are in line,
    commits them together and wakes them; what arrives meanwhile goes with the next commit.

    - A delivery has an outcome only after the commit that holds it was fsynced.
    - Every delivery that was taken is woken, whatever its commit raises.
    - No request waits longer than ANSWER_SECONDS. One that is given up may still be committed;
      its redelivery is then a duplicate.
    - After any failure the connection is closed, and opening it copies the WAL into the database
      and syncs both. So a commit whose fsync failed is never taken for a stored one.
    - Only this thread empties the WAL, between its commits and in its turn among the processes,
      never beside a commit (see https://sqlite.org/wal.html#walresetbug).
    - Thread and connection belong to the process that first appends: made after a fork.
    """

    lingers = True  # requests that are about to get in line share the commit

    def __init__(self, config: Config):
        self.config, self.path = config, config.database
        self.prepared: Any = None  # the file into which this process has written its rules
        self.reset()
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        """Start from nothing, as a process does that has just been forked."""
        self.inherited = getattr(self, "db", None)  # SQLite forbids to close it in a child
        self.line: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.starting, self.probing = threading.Lock(), threading.Lock()
        self.thread: threading.Thread | None = None
        self.db: Connection | None = None
        self.files: list[Any] = []  # which files are open: the database, its WAL, the WAL's index
        self.wal_bytes = 0  # about, that commits have added since it was last copied
        self.rebuilding: Iterator[Any] | None = None
        # Since when deliveries have waited without a commit; kept over failures, so that those
        # that come later wait less. Readers wait while it is set.
        self.busy_since: float | None = None
        self.looked_at = self.emptied_at = self.probed_at = self.commit_seconds = 0.0
        self.probed = ""  # why the last probe failed
        self.commits = 0
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
        with self.starting:
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self.run, daemon=True)
                try:
                    self.thread.start()
                except RuntimeError:
                    raise JournalError("no thread can be started") from None
        busy = time.monotonic() - (self.busy_since or time.monotonic())
        served = delivery.done.acquire(timeout=max(ANSWER_SECONDS - busy, LEAST_SECONDS))
        if delivery.outcome is None:
            blame = next((f"the handler {name}" for name in RUNNING), "the database")
            raise JournalError(delivery.error if served else f"{blame} did not answer in time")
        return delivery.outcome

    def probe(self) -> str:
        """Return why the journal cannot be written, or ''; it is tried once a second at most."""
        with self.probing:
            if time.monotonic() > self.probed_at + 1.0:
                try:
                    self.append(Delivery())
                    self.probed = ""
                except JournalError as error:
                    self.probed = str(error)
                self.probed_at = time.monotonic()
            return self.probed

    def stop(self) -> None:
        """Finish what is in line, end the thread, and close the database."""
        self.stopping = True
        if self.thread:
            self.line.put(Delivery())
            self.thread.join(ANSWER_SECONDS)

    def run(self) -> None:
        """Commit what is in line, again and again, and look after the files in between."""
        pin_to_core()
        while not self.stopping or not self.line.empty():
            batch: list[Delivery] = []
            with contextlib.suppress(queue.Empty):
                batch.append(self.line.get(timeout=0.001 if self.rebuilding else 1.0))
            self.busy_since = self.busy_since or time.monotonic()  # a turn may be long in coming
            before = 0
            while self.lingers and self.line.qsize() > before:  # requests are still arriving
                before = self.line.qsize()
                os.sched_yield()
            if batch:
                self.serve(batch)
            self.look_after(resting=not batch)
        self.close()

    def serve(self, batch: list[Delivery]) -> None:
        """Commit `batch`, with what else is in line when its turn comes; wake the requests."""
        try:
            with turn(self.path):
                with contextlib.suppress(queue.Empty):
                    while len(batch) < MAX_WAITING:
                        batch.append(self.line.get_nowait())
                self.commit(batch)
        except BaseException as error:  # catch-all: the batch fails, the thread survives
            if not isinstance(error, FileGoneError):
                self.close()
            for delivery in [one for one in batch if one.outcome is None]:
                delivery.error = describe_error(error)
        finally:
            for delivery in batch:
                delivery.done.release()
        log_deliveries(batch)

    def commit(self, batch: list[Delivery]) -> None:
        """Store `batch` in one transaction, then run the handlers; set each outcome."""
        db, began = self.open(), time.perf_counter()
        deliveries = [delivery for delivery in batch if delivery.event]
        outcomes = self.write(db, deliveries, probing=len(deliveries) < len(batch))
        for delivery, outcome in zip(deliveries, outcomes, strict=True):
            delivery.outcome = outcome
            self.wal_bytes += EVENT_BYTES + len(delivery.body)
        self.commits += 1
        self.commit_seconds += time.perf_counter() - began
        dispatch(db, [delivery for delivery in deliveries if delivery.outcome is None])
        self.busy_since = None
        for delivery in batch:
            delivery.outcome = delivery.outcome or STORED  # a probe

    def write(self, db: Connection, deliveries: list[Delivery], probing: bool) -> list[str | None]:
        """Store `deliveries` in a transaction of its own; return what became of each."""
        with transaction(db):
            outcomes = store(db, deliveries)
            if probing:
                db.execute(PROBE)
        return outcomes

    def look_after(self, resting: bool) -> None:
        """Look at the files, go on with a rebuild, and copy the WAL; once a second, or when due.

        At rest, and after KEEP_SECONDS, the WAL is emptied; otherwise its file is kept, which
        makes the next commits cheaper.
        """
        long = self.wal_bytes > MAX_WAL
        if not (long or self.rebuilding or time.monotonic() > self.looked_at + 1.0):
            return
        busy_since = self.busy_since
        self.busy_since = busy_since or time.monotonic()  # the turn may be long in coming
        try:
            with turn(self.path):
                if self.db and not self.check_files():
                    if self.rebuilding and next(self.rebuilding, None) is None:
                        self.rebuilding = None
                    if resting or time.monotonic() > self.emptied_at + KEEP_SECONDS:
                        if checkpoint(self.db, "TRUNCATE"):
                            self.emptied_at = time.monotonic()
                    elif long:
                        checkpoint(self.db, "RESTART")
                    if long or resting:
                        self.wal_bytes = 0
        except FileGoneError:
            pass  # the next delivery gets this error
        except Exception as error:  # the thread survives; the next delivery opens anew
            log.error("the database cannot be looked after: %s", describe_error(error))
            self.close()
        self.looked_at = time.monotonic()
        self.busy_since = None if resting else busy_since

    def open(self) -> Connection:
        """Return the connection; open it anew after a failure, or when the file is another one.

        Raises FileGoneError while the database, or the WAL that is open, is not at its path.
        """
        self.check_files()
        if self.db is None:
            database, db = identify(self.path)[0], connect(self.path)
            try:
                prepare(db, None if database == self.prepared else self.config)
                if db.execute("PRAGMA wal_checkpoint").fetchone()[0]:  # as far as readers allow
                    raise DatabaseError("another program is checkpointing the database")
                self.files = identify(self.path)
                if self.files[0] != database or None in self.files:
                    raise DatabaseError("a file was replaced while it was opened")
                lock_path(self.path).write_text(json.dumps(self.files))
            except BaseException:
                db.close()
                raise
            self.db, self.prepared = db, database
            self.rebuilding = rebuild(db, only_if_due=True)
        return self.db

    def check_files(self) -> bool:
        """Drop the connection if another database is at the path; return whether it was.

        Raises FileGoneError while the database, or the WAL that is open, is not at its path.
        """
        files = identify(self.path)
        if files[0] is None:
            raise FileGoneError("the database is gone: bring it back")
        if self.db is None or files == self.files:
            return False
        if files[0] == self.files[0]:
            if files[1] is None:
                checkpoint(self.db, "TRUNCATE")  # nobody else can have begun another one
            raise FileGoneError("the WAL or its index is gone: bring it back, or stop and start")
        self.leave_database(files)
        return True

    def leave_database(self, files: list[Any]) -> None:
        """Let go of a database that was replaced, and take its WAL out of the way.

        SQLite neither checkpoints nor removes the WAL of a file that was moved, but would take it
        for the new file's, and damage that. What a reader or the disk keeps from being copied into
        the old file stays under another name.
        """
        copied = False
        with contextlib.suppress(sqlite3.Error):
            copied = checkpoint(self.db, "TRUNCATE")
        self.close()
        for path, old, new in zip(wal_paths(self.path), self.files[1:], files[1:], strict=True):
            if old == new:
                path.unlink() if copied else path.rename(f"{path}.{time.time_ns()}")

    def close(self) -> None:
        """Drop the connection, whatever state it is in."""
        if self.db:
            with contextlib.suppress(sqlite3.Error, OSError):
                self.db.close()
                if identify(self.path)[1] is None:  # SQLite removes it when the last one closes
                    lock_path(self.path).write_text("")
        self.db = self.rebuilding = None


def store(db: Connection, deliveries: list[Delivery]) -> list[str | None]:
    """Journal and project the events of `deliveries`, in a transaction of the caller.

    Return what became of each: STORED, DUPLICATE, UNRECOGNIZED, or None when its handlers are
    still to run. Another copy of an event is a duplicate, but may name IDs that the first lacked.
    """
    if not isinstance(db, Connection):
        return db.store(deliveries)  # a function of the same name on the server
    rows = [delivery.row() for delivery in deliveries]
    inserted = db.executemany(INSERT_EVENT, rows).rowcount if rows else 0
    new = {row[0]: row[-2] for row in rows}  # the new events that have no outcome yet: their states
    states, events = new.copy(), [delivery.event for delivery in deliveries]
    if inserted < len(rows):
        found = select(db, READ_EVENTS, list(new))
        last = db.execute("SELECT COALESCE(max(rowid), 0) FROM events").fetchone()[0] - inserted
        new = {event_id: state for position, state, event_id, *_ in found if position > last}
        states = {event_id: state for _, state, event_id, *_ in found}
        events = [Event(*columns) for _, _, *columns in found]
    if mentions := [mention for delivery in deliveries for mention in read_mentions(delivery)]:
        db.executemany(INSERT_MENTION, mentions)
    project(db, events)
    outcomes = []
    for event_id in [row[0] for row in rows]:
        done = STORED if new.pop(event_id, None) else DUPLICATE
        outcomes.append({"processed": done, UNRECOGNIZED: UNRECOGNIZED}.get(states[event_id]))
    return outcomes


def read_mentions(delivery: Delivery) -> list[tuple[str, str]]:
    """Return the inquiries and accounts that the body names beyond the columns, with the event."""
    body, event = delivery.body, delivery.event
    found = (match for pattern in MENTIONS for match in pattern.finditer(body))
    ids = {one[0].decode() for one in found if not body[one.start() - 1 : one.start()].isalnum()}
    return [(mentioned, event.event_id) for mentioned in ids.difference(event[3:10])]


def select(db: Connection, query: str, keys: Iterable[str]) -> list[sqlite3.Row]:
    """Return the rows of a query in which `IN (:keys)` stands for `keys`.

    One parameter a key, because SQLite pushes such a list down into the views. The last key is
    repeated up to a power of two, so that few different statements are prepared.
    """
    keys = list(keys)
    if not keys:
        return []
    keys += keys[-1:] * ((1 << (len(keys) - 1).bit_length()) - len(keys))
    query, times = query.replace(":keys", ", ".join("?" * len(keys))), query.count(":keys")
    return db.execute(query, keys * times).fetchall()


def describe_error(error: BaseException) -> str:
    """Say what was wrong with the database; of any other error only its kind."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if str(error).startswith("Could not decode to UTF-8"):  # it would quote what is there
        return "database disk image is malformed"
    return str(error) if isinstance(error, sqlite3.Error | DatabaseError) else type(error).__name__


def log_deliveries(batch: list[Delivery]) -> None:
    """Write a line for each delivery, all at once: no body, and no reference ID."""
    lines, level = [], logging.INFO
    for delivery in [one for one in batch if one.event]:
        lines.append(
            f"event={quote(delivery.event.event_id)} name={quote(delivery.event.name)}"
            f" outcome={delivery.outcome or 'unavailable'} attempt={delivery.attempt or 0}"
            f" ms={(time.perf_counter() - delivery.started) * 1000:.1f}"
        )
        if delivery.error or delivery.outcome == UNRECOGNIZED:
            lines[-1] += f" reason={quote(delivery.error or 'no event can be read')}"
            level = logging.WARNING
    if lines:
        log.log(level, "\n".join(lines))


# --------------------------------------------------------------------------------------
# Projection
# --------------------------------------------------------------------------------------
#
# The views ..._by_the_rules of schema.sql say how each row follows from the journal. Here is
# only which rows an event touches. Any order of the same events, and any repetition, gives the
# same tables, because each row is computed anew from all that it rests on.

COLUMNS = {  # table -> the columns of its view; the first is the key
    "inquiries": "inquiry_id person reference_id account_id template_id status event_id"
    " event_name event_at standing rank",
    "accounts": "account_id reference_id",
    "holds": "object_id rule raised lasting hold event_id event_at"
    " inquiry_id account_id reference_id",
    "kyc_status": "reference_id status hold inquiry_id account_id template_id event_id"
    " event_name event_at",
}
READ_ACCOUNTS = "SELECT account_id, reference_id FROM accounts WHERE account_id IN (:keys)"
HELD_OBJECTS = "SELECT object_id FROM hold_events WHERE event_id IN (:keys)"
MOVE_INQUIRIES = """
    UPDATE inquiries SET person = COALESCE((SELECT a.reference_id FROM accounts AS a
        WHERE a.account_id = inquiries.account_id), account_id)
    WHERE account_id IN (:keys) AND reference_id IS NULL
"""
FIND_PEOPLE = """  -- of an inquiry, an account and a reference ID
    SELECT person FROM inquiries WHERE inquiry_id = :inquiry
    UNION SELECT i.person FROM events AS e JOIN inquiries AS i ON i.inquiry_id = e.inquiry_id
        AND i.account_id = e.account_id WHERE e.account_id = :account
    UNION SELECT reference_id FROM accounts WHERE account_id = :account
    UNION SELECT :reference
"""
NEXT_KEYS = {  # the next keys after :last; holds first, so that they come before an approval
    "objects": """SELECT object_id FROM events
            WHERE object_id > :last AND object_id IS NOT inquiry_id
        UNION SELECT object_id FROM holds WHERE object_id > :last ORDER BY 1 LIMIT 500""",
    "inquiries": """SELECT inquiry_id FROM events WHERE inquiry_id > :last
        UNION SELECT inquiry_id FROM inquiries WHERE inquiry_id > :last ORDER BY 1 LIMIT 500""",
    "accounts": """SELECT account_id FROM events WHERE account_id > :last
        UNION SELECT account_id FROM accounts WHERE account_id > :last ORDER BY 1 LIMIT 500""",
    "people": """SELECT person FROM inquiries WHERE person > :last
        UNION SELECT reference_id FROM kyc_status WHERE reference_id > :last
        ORDER BY 1 LIMIT 500""",
}
IS_REBUILD_DUE = "SELECT 1 FROM rules_in_force WHERE projected = 0 AND since = ?"

Keys = Iterable[str]
Change = tuple[sqlite3.Row | None, sqlite3.Row | None]  # a row before and after; None: no row


def project(db: Connection, events: Iterable[Event]) -> list[Change]:
    """Bring the projections up to date with `events`, which are in the journal.

    Return the rows of kyc_status that changed.
    """
    named = [one for one in events if one.object_type == "account" and one.reference_id]
    return refresh(
        db,
        inquiries={event.inquiry_id for event in events if event.inquiry_id},
        accounts={event.account_id for event in named},
        objects={row[0] for row in select(db, HELD_OBJECTS, [event.event_id for event in events])},
    )


def refresh(
    db: Connection, inquiries: Keys = (), accounts: Keys = (), objects: Keys = (), people: Keys = ()
) -> list[Change]:
    """Compute these rows of the projections anew, and all that rest on those that change."""
    if not isinstance(db, Connection):
        return db.refresh([inquiries, accounts, objects, people])
    accounts, people = set(accounts), set(people)
    changes = update(db, "inquiries", inquiries)
    people |= {row["person"] for row in both_sides(changes)}
    accounts |= find_accounts(db, changes)
    changes = update(db, "accounts", accounts)
    select(db, MOVE_INQUIRIES, [row["account_id"] for row in both_sides(changes)])
    for old, new in changes:
        account = (old or new)["account_id"]
        people |= {row["reference_id"] if row else account for row in (old, new)}
    for row in both_sides(update(db, "holds", objects)):
        keys = {kind: row[f"{kind}_id"] for kind in ("inquiry", "account", "reference")}
        people |= {person for (person,) in db.execute(FIND_PEOPLE, keys) if person}
    return update(db, "kyc_status", people)


def find_accounts(db: Connection, changes: list[Change]) -> set[str]:
    """Return the accounts whose reference ID may be another after these changes of inquiries.

    An account keeps its reference ID when an inquiry that carries that same ID is added, or gets a
    newer deciding event.
    """
    accounts = {row["account_id"] for row in both_sides(changes) if row["account_id"]}
    known = dict(map(tuple, select(db, READ_ACCOUNTS, accounts)))
    found = set()
    for old, new in changes:
        links = [(row["account_id"], row["reference_id"]) for row in (old, new) if row]
        times = [(row["event_at"], row["event_id"]) for row in (old, new) if row]
        harmless = new and len(set(links)) == 1 and times == sorted(times)
        for account, reference in links:
            if account and reference and not (harmless and known.get(account) == reference):
                found.add(account)
    return found


def both_sides(changes: list[Change]) -> Iterator[sqlite3.Row]:
    """Yield the rows before and after each change, as far as there are any."""
    return (row for change in changes for row in change if row)


def update(db: Connection, table: str, keys: Iterable[str]) -> list[Change]:
    """Make the rows of a projection with these keys what its view says; return what changed."""
    (read, drop, write), keys = STATEMENTS[table], list(keys)
    width = 2 if table == "holds" else 1  # columns of the primary key
    before = {tuple(row)[:width]: row for row in select(db, read, keys)}
    gone = select(db, drop, keys) if before else []
    written = select(db, write, keys)
    return [(row, None) for row in gone] + [
        (before.get(tuple(row)[:width]), row) for row in written
    ]


def statements(table: str) -> tuple[str, str, str]:
    """Return the statements that read, drop and write rows of a projection by its view."""
    columns = COLUMNS[table].split()
    key, identity = columns[0], ", ".join(columns[: 2 if table == "holds" else 1])
    view, names = f"{table}_by_the_rules", ", ".join(columns)
    old, new = (", ".join(f"{side}.{name}" for name in columns) for side in (table, "excluded"))
    sets = ", ".join(f"{name} = excluded.{name}" for name in columns)
    into, values = names, names
    if table == "kyc_status":
        into += ", updated_at"
        values += ", strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
        sets += ", updated_at = excluded.updated_at"
    return (
        f"SELECT {names} FROM {table} WHERE {key} IN (:keys)",
        f"DELETE FROM {table} WHERE {key} IN (:keys) AND ({identity}) NOT IN"
        f" (SELECT {identity} FROM {view} WHERE {key} IN (:keys)) RETURNING {names}",
        f"INSERT INTO {table} ({into}) SELECT {values} FROM {view} WHERE {key} IN (:keys)"
        f" ON CONFLICT ({identity}) DO UPDATE SET {sets}"
        f" WHERE ({old}) IS NOT ({new}) RETURNING {names}",
    )


STATEMENTS = {table: statements(table) for table in COLUMNS}


def rebuild(db: Connection, only_if_due: bool = False) -> Iterator[list[Change]]:
    """Compute all projections anew, a chunk in each step and transaction, and write what differs.

    Yield the rows of kyc_status that changed, after each step. If it is to be done only if due, it
    ends as soon as another process has done it, or the rules are changed again.
    """
    (since,) = db.execute("SELECT since FROM rules_in_force").fetchone()
    people_only = only_if_due and since.startswith("people")  # as other templates concern no others
    for rows, query in NEXT_KEYS.items():
        ids = [""] if rows == "people" or not people_only else []
        while ids:
            with transaction(db):
                if only_if_due and not db.execute(IS_REBUILD_DUE, (since,)).fetchone():
                    return
                ids = [row[0] for row in db.execute(query, {"last": ids[-1]})]
                also = {"objects": ids} if rows == "inquiries" else {}
                changes = refresh(db, **{rows: ids}, **also)
            yield changes
    with transaction(db):
        db.execute("UPDATE rules_in_force SET projected = 1 WHERE since = ?", (since,))


# --------------------------------------------------------------------------------------
# Handlers
# --------------------------------------------------------------------------------------

Handler = Callable[[Connection, Event], None]
HANDLERS: dict[str, list[Handler]] = {}
STATUS_RULES: list[tuple[str, str, str]] = []  # of handlers.py: name, object status, status
HOLD_RULES: list[tuple[str, str]] = []  # of handlers.py: name, object status
STATUSES = (
    *("created", "pending", "expired", "completed"),
    *("failed", "needs_review", "approved", "declined"),
)
RUNNING: list[str] = []  # the handler that runs now, for those who wait for it
SLOW_SECONDS = 1.0

READ_KNOWN = """
    SELECT state, object_status, inquiry_id, account_id, reference_id, template_id
    FROM events WHERE event_id = ?
"""
SET_STATE = """
    UPDATE events SET state = ?1, error = CASE WHEN redacted_at IS NULL THEN ?2
        ELSE substr(?2, 1, instr(?2 || ':', ':') - 1) END  -- the kind, not the message
    WHERE event_id = ?3
"""


class HandlerError(Exception):
    """A handler raised; the cause says what."""


def on(*names: str) -> Callable[[Handler], Handler]:
    """Register a function for the events with these names: handler(db, event).

    It runs after the event is stored and projected, before the answer, in a transaction of its
    own in which the event becomes processed. If it raises, what the event's handlers did is
    undone, the event is kept as failed, and Persona's redelivery or `flask replay` runs them
    again. It must be quick and touch only the database, in tables of its own.
    """
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError('@on takes the names of events: @on("inquiry.approved")')

    def register(handler: Handler) -> Handler:
        try:
            inspect.signature(handler).bind(None, None)
        except TypeError:
            raise ConfigError(f"{handler.__name__} must take two arguments: db, event") from None
        if inspect.iscoroutinefunction(handler) or inspect.isgeneratorfunction(handler):
            raise ConfigError(f"{handler.__name__} must be a plain function: nothing would run it")
        for name in names:
            HANDLERS.setdefault(name, []).append(handler)
        return handler

    return register


def status_rule(name: str, status: str, object_status: str | None = None) -> None:
    """Let the events with this name, about an object of this status, set their inquiry's status."""
    require_name(name)
    if status not in STATUSES:
        raise ConfigError(f"status_rule of {name}: {status} is none of {', '.join(STATUSES)}")
    STATUS_RULES.append((name, object_status or "", status))


def hold_rule(name: str, object_status: str | None = None) -> None:
    """Hold a person while the newest event with this name about their object has this status."""
    require_name(name)
    HOLD_RULES.append((name, object_status or ""))


def require_name(name: str) -> None:
    """Raise ConfigError unless `name` looks like that of an event."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9/-]+\.[a-z0-9-]+", name):
        raise ConfigError(f"{name!r} is not the name of an event")


def load_handlers() -> None:
    """Load handlers.py, the team's own file, if it is there; raise ConfigError."""
    if not (HERE / "handlers.py").exists():
        return
    try:
        importlib.import_module("handlers")
    except SyntaxError as error:
        raise ConfigError(f"handlers.py:{error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"handlers.py: {explain_error(error)[0]}") from None


def dispatch(db: Connection, deliveries: Iterable[Delivery]) -> None:
    """Run the handlers of stored events, each event's in a transaction of its own."""
    for delivery in deliveries:
        delivery.outcome, delivery.error = run_handlers(db, delivery.event)


def run_handlers(db: Connection, event: Event) -> tuple[str, str | None]:
    """Run an event's handlers, unless they have; return the outcome, and the error for the log."""
    try:
        with transaction(db):
            state, *known = db.execute(READ_KNOWN, (event.event_id,)).fetchone()
            if state == "processed":
                return DUPLICATE, None
            # Another copy of the event may have named more IDs.
            call_handlers(db, Event(*event[:5], *known, event.payload))
            db.execute(SET_STATE, ("processed", None, event.event_id))
        return STORED, None
    except HandlerError as error:
        kept, logged = explain_error(error.__cause__)
        with transaction(db):
            db.execute(SET_STATE, ("failed", kept, event.event_id))
        return FAILED, logged


def call_handlers(db: Connection, event: Event) -> None:
    """Call an event's handlers; warn when one is slow, raise HandlerError when one raises."""
    try:
        db.set_authorizer(functools.partial(protect_transaction, db))
        for handler in HANDLERS.get(event.name, ()):
            RUNNING[:] = [getattr(handler, "__qualname__", repr(handler))]
            began = time.perf_counter()
            handler(db, event)
            seconds = time.perf_counter() - began
            if seconds > SLOW_SECONDS:
                log.warning("slow handler=%s seconds=%.1f", quote(RUNNING[0]), seconds)
        if not db.in_transaction:  # by INSERT OR ROLLBACK
            raise sqlite3.OperationalError("the handler has undone its transaction")
    except KeyboardInterrupt:  # of who runs `flask replay`
        raise
    except BaseException as error:  # even sys.exit() fails its event alone
        raise HandlerError from error
    finally:
        RUNNING.clear()
        db.set_authorizer(None)
        db.row_factory, db.text_factory = sqlite3.Row, str


def protect_transaction(db: Connection, action: int, *_: Any) -> int:
    """Refuse what would end a handler's transaction, and all after it was ended.

    SQLite asks when it prepares a statement.
    """
    ends = action == sqlite3.SQLITE_TRANSACTION
    return sqlite3.SQLITE_DENY if ends or not db.in_transaction else sqlite3.SQLITE_OK


def explain_error(error: BaseException) -> tuple[str, str]:
    """Return an error of a handler as the table keeps it, and as the log may tell it.

    The first begins with the kind, for a redaction cuts it there; the second has no message,
    which may quote personal data.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(HERE / "handlers.py")]
    place = f" (handlers.py:{own[-1].lineno} {own[-1].name})" if own else ""
    kind = type(error).__name__
    try:
        message = str(error)[:1000]
    except Exception:  # of its own __str__
        message = ""
    if message == "not authorized":
        message = "a handler must not begin, commit or end a transaction"
    kept = f"{kind}: {message}".removesuffix(": ")[: 1000 - len(place)] + place
    return kept.encode(errors="backslashreplace").decode(), kind + place


# --------------------------------------------------------------------------------------
# Database
# --------------------------------------------------------------------------------------

SCHEMA = HERE / "schema.sql"
SCHEMA_VERSION = 2
OLDEST_VERSION = 2  # that of 1.0.0: a journal from then on is brought up to date
STEPS: dict[int, str] = {}  # version -> what leads to it before schema.sql is applied, in SQL
PROBE = "PRAGMA application_id = 0"  # a commit that changes nothing
START_SECONDS = 5.0
BUSY_SECONDS = 3.0  # how long SQLite waits for a lock that another process holds


class DatabaseError(Exception):
    """The database cannot be used; the message says why."""


class UnusableError(DatabaseError):
    """The database cannot be used, and no waiting mends that."""


class FileGoneError(DatabaseError):
    """A file that is open was taken away, and may come back."""


def connect(path: Path, *, readonly: bool = False) -> Connection:
    """Open the existing database at `path`; rows are read by name.

    Raises DatabaseError when there is none, or its version can neither be used nor migrated.
    """
    if not isinstance(path, Path):
        return path.connect(readonly=readonly)
    require_own_wal(path)
    address = f"{path.as_uri()}?mode={'ro' if readonly else 'rw'}"
    options = {"uri": True, "isolation_level": None, "check_same_thread": False}
    try:
        db = sqlite3.connect(address, timeout=BUSY_SECONDS, **options)
        db.row_factory = sqlite3.Row
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if not readonly:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA secure_delete = ON")
            db.execute("PRAGMA temp_store = MEMORY")  # no page of a journal in temporary files
            db.execute("PRAGMA wal_autocheckpoint = 0")  # it would swallow errors
            db.execute("PRAGMA journal_size_limit = 67108864")  # of a WAL that starts anew
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            raise UnusableError(str(error)) from None
        raise DatabaseError(str(error) if path.exists() else "there is no such file") from None
    if version and not OLDEST_VERSION <= version <= SCHEMA_VERSION:
        age = "a newer release" if version > SCHEMA_VERSION else "a release before 1.0"
        raise UnusableError(f"the file was made by {age} of this service")
    return db


def require_own_wal(path: Path) -> None:
    """Raise DatabaseError when the WAL beside a database is known to be that of another one.

    SQLite would apply it to this one, and damage it. The journal notes in the lock file which
    files it has open.
    """
    database, wal, _ = identify(path)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # nothing is noted
        noted = json.loads(lock_path(path).read_text())
        if wal and list(wal) == noted[1] and list(database or ()) != noted[0]:
            raise DatabaseError(
                "its WAL belongs to the database that was here before: move it away"
            )


def prepare_database(config: Config) -> bool:
    """Create the database if there is none, mode 0600, and bring it up to date.

    Return whether new rules have been applied to all of the past, as `catch_up` does.
    Raises UnusableError when no waiting helps, DatabaseError when something is in the way.
    """
    path = config.database
    if not isinstance(path, Path):
        return path.prepare(config)
    if not path.exists() and wal_paths(path)[0].exists():
        raise FileGoneError("the database is gone, but its WAL is there: bring it back")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with contextlib.closing(connect(path)) as db:
            with turn(path, seconds=10), transaction(prepare(db, config)):
                db.execute(PROBE)  # fails here, not at the first event, when read-only
            complete = catch_up(db, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the new files' names must last, too
        os.close(directory)
        return complete
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UnusableError(error.strerror) from None
    except (OSError, sqlite3.Error) as error:
        raise DatabaseError(describe_error(error)) from None


def catch_up(db: Connection, path: Any) -> bool:
    """Apply new rules to the past for START_SECONDS at most; return whether that was enough."""
    steps, deadline = rebuild(db, only_if_due=True), time.monotonic() + START_SECONDS
    complete = False
    while not complete and time.monotonic() < deadline:
        with turn(path, seconds=10):
            complete = next(steps, None) is None
    return complete


def prepare(db: Connection, config: Config | None) -> Connection:
    """Bring an open database up to date: its schema, and the rules unless `config` is None.

    Return the connection. A process writes its rules into a file once, so that an old worker that
    opens it again during a reload does not undo those of the new one.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_schema")}
    if (version or tables) and "events" not in tables:
        raise UnusableError("the file belongs to another application")
    db.execute("PRAGMA page_size = 2048")  # of a new file; an event changes a dozen pages
    if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise UnusableError("its disk does not support WAL")
    if version < SCHEMA_VERSION:
        migrate(db, version)
    if config:
        write_rules(db, config.templates)
    return db


def migrate(db: Connection, version: int) -> None:
    """Bring the schema of an earlier version, 0 for none, up to date in one transaction.

    Views and triggers are made anew. The rules may have changed with them: `write_rules` has the
    projections computed anew.
    """
    schema = SCHEMA.read_text()
    made = re.findall(r"^CREATE (VIEW|TRIGGER) IF NOT EXISTS (\w+)", schema, re.M)
    script = ["BEGIN IMMEDIATE", *(f"DROP {kind} IF EXISTS {name}" for kind, name in made)]
    script += [STEPS[number] for number in range(version + 1, SCHEMA_VERSION + 1) if version]
    db.executescript(";\n".join([*script, schema, "COMMIT"]))


def write_rules(db: Connection, templates: tuple[str, ...]) -> None:
    """Bring the rules of handlers.py and KYC_TEMPLATES into their tables, if they differ.

    The projections are then to be made anew: see `rebuild`.
    """
    rules = json.dumps([SCHEMA_VERSION, sorted(STATUS_RULES), sorted(HOLD_RULES), templates])
    before, made = db.execute("SELECT rules, projected FROM rules_in_force").fetchone() or ("[]", 0)
    if before == rules:
        return
    people_only = made and json.loads(before)[:3] == json.loads(rules)[:3]  # other templates
    since = f"{'people ' if people_only else ''}{time.time_ns()}"
    with transaction(db):
        db.execute("DELETE FROM status_rules WHERE own = 1")
        db.execute("DELETE FROM hold_rules WHERE own = 1")
        db.execute("DELETE FROM kyc_templates")
        db.execute("DELETE FROM rules_in_force")
        db.executemany(
            "INSERT INTO status_rules VALUES (?, ?, ?, 1) ON CONFLICT DO NOTHING", STATUS_RULES
        )
        holds = [(name, status, name) for name, status in HOLD_RULES]
        db.executemany(
            "INSERT INTO hold_rules VALUES (?, ?, ?, 1, 1) ON CONFLICT DO NOTHING", holds
        )
        db.executemany("INSERT INTO kyc_templates VALUES (?)", [(name,) for name in templates])
        db.execute("INSERT INTO rules_in_force VALUES (?, 0, ?)", (rules, since))


def lock_path(path: Path) -> Path:
    """Return the path of the file whose lock is the turn to write."""
    return path.with_name(path.name + ".lock")


def wal_paths(path: Path) -> list[Path]:
    """Return the paths of a database's WAL and WAL index."""
    return [path.with_name(path.name + suffix) for suffix in ("-wal", "-shm")]


def identify(path: Path) -> list[tuple[int, int] | None]:
    """Return which files a database, its WAL and its WAL index are; None where there is none."""
    files: list[tuple[int, int] | None] = []
    for name in (path, *wal_paths(path)):
        try:
            found = os.stat(name)
            files.append((found.st_dev, found.st_ino))
        except FileNotFoundError:
            files.append(None)
    return files


def checkpoint(db: Connection, mode: str) -> bool:
    """Copy all of the WAL into the database and sync both; tell if no reader was in the way.

    TRUNCATE cuts the WAL to nothing; RESTART lets the next commit start it from the beginning.
    """
    db.execute("PRAGMA busy_timeout = 100")
    blocked = db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()[0]
    db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
    return not blocked


@contextlib.contextmanager
def transaction(db: Connection) -> Iterator[None]:
    """Run the block as one write transaction: committed and fsynced, or rolled back.

    Raises UnusableError when another release has changed the schema since the file was opened.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        if db.execute("PRAGMA user_version").fetchone()[0] != SCHEMA_VERSION:
            raise UnusableError("the file was made by another release of this service")
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite has rolled back by itself when the disk is full
            db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def turn(path: Path, seconds: float | None = None) -> Iterator[None]:
    """Wait for this process's turn to write to the database at `path`, and hold it.

    Two locks, taken one after the other: who waits for the second holds the first, so that
    nobody overtakes. Raises DatabaseError after `seconds`.
    """
    if not isinstance(path, Path):  # PostgreSQL lets one transaction begin after the other
        yield
        return
    gate, lock = (open_lock(path, suffix) for suffix in (".gate", ".lock"))
    try:
        wait_for_lock(gate, seconds)
        wait_for_lock(lock, seconds)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:  # closing would not unlock while a forked process has the file, too
            fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(gate)
        os.close(lock)


def open_lock(path: Path, suffix: str) -> int:
    """Open a lock file beside the database; one that root creates is the database owner's."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    file = os.open(path.with_name(path.name + suffix), flags, 0o600)
    if os.geteuid() == 0 and path.exists():
        os.fchown(file, path.stat().st_uid, path.stat().st_gid)
    return file


def wait_for_lock(file: int, seconds: float | None) -> None:
    """Lock an open file: in the kernel's queue, or trying for so many `seconds`."""
    deadline = time.monotonic() + (seconds or 0)
    while seconds is not None:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DatabaseError("another process holds the lock file") from None
        time.sleep(0.005)
    fcntl.flock(file, fcntl.LOCK_EX)


# --------------------------------------------------------------------------------------
# Start
# --------------------------------------------------------------------------------------


def create_app(environ: Mapping[str, str]) -> Flask:
    """Return the service, configured by `environ`; raise ConfigError or UnusableError.

    The `flask` command gets it without a secret and without touching the database.
    """
    config = read_config(environ)
    app = Flask(__name__, static_folder=None)
    app.url_map.merge_slashes = False  # a doubled slash is an unknown path, not a redirect
    app.config.update(KYC=config, PROVIDE_AUTOMATIC_OPTIONS=False)
    on_disk = isinstance(config.database, Path)
    app.extensions["journal"] = Journal(config) if on_disk else config.database.journal(config)
    app.register_blueprint(routes)
    app.register_error_handler(SignatureError, answer_bad_signature)
    app.register_error_handler(JournalError, answer_unavailable)
    app.register_error_handler(HTTPException, answer_http_error)
    app.register_error_handler(Exception, answer_bug)
    serving = environ.get("FLASK_RUN_FROM_CLI") != "true"
    if serving:
        start_logging()
        atexit.register(app.extensions["journal"].stop)
    for folder, wanted in (("commands", True), ("dashboard", "KYC_API_TOKEN" in environ)):
        if wanted and (HERE / folder / "__init__.py").exists():
            importlib.import_module(folder).register(app, environ)
    if serving:  # last: a start that is refused must change nothing
        prepare_service(app, environ)
    return app


def prepare_service(app: Flask, environ: Mapping[str, str]) -> None:
    """Make ready to receive: warn, and prepare the database."""
    config, journal = app.config["KYC"], app.extensions["journal"]
    if not config.secrets:
        raise ConfigError("PERSONA_WEBHOOK_SECRET is not set: nothing could be verified")
    on_disk = isinstance(config.database, Path)
    if on_disk and "DYNO" in environ and environ.get("KYC_EPHEMERAL_DISK") != "accept":
        raise ConfigError(
            "KYC_DATABASE would be on a Heroku dyno's disk, which is emptied at each restart;"
            " to serve all the same set KYC_EPHEMERAL_DISK=accept"
        )
    warn(config)
    try:
        complete = prepare_database(config)
        journal.prepared = identify(config.database)[0] if on_disk else config.database
        if not complete:  # the journal goes on with the past
            threading.Thread(target=journal.probe, daemon=True).start()
    except UnusableError:
        raise
    except DatabaseError as error:
        log.error("the database cannot be used for now, events get 503: %s", error)


def start_logging() -> None:
    """Log to stderr, a line at a time; the platform adds the time."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def warn(config: Config) -> None:
    """Say which release starts on which database, and what is dangerous in its configuration."""
    log.info("kyc %s database=%s secrets=%d", VERSION, config.database, len(config.secrets))
    if DEVELOPMENT_SECRET.encode() in config.secrets:
        log.warning("WARNING: the development secret is accepted: anyone can forge events")
    foreign = [secret for secret in config.secrets if not secret.startswith(b"wbhsec_")]
    if foreign and config.scheme == "persona":
        log.warning("WARNING: a secret does not begin with wbhsec_, as Persona's do")
    if config.tolerance == 0 or config.scheme == "body":
        log.warning("WARNING: no replay protection: timestamps are not checked")


def pin_to_core() -> None:
    """Keep this process on one core, the one with the fewest of its siblings.

    Its threads share one interpreter lock. On one core they hand it on at once; across
    cores each hand-over wakes another core, which costs more than that core could do.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # there is no such call on macOS
        siblings = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        taken = [os.sched_getaffinity(int(pid)) for pid in siblings if int(pid) != os.getpid()]
        core = min(os.sched_getaffinity(0), key=lambda core: taken.count({core}))
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {core})


def start() -> Flask:
    """Return the service; on a wrong setting say so in one line, and end."""
    try:
        load_handlers()
        return create_app(os.environ)
    except ConfigError as error:
        message = str(error)
    except DatabaseError as error:
        message = f"KYC_DATABASE {os.environ.get('KYC_DATABASE', 'kyc.db')}: {error}"
        if "DATABASE_URL" in os.environ:
            message = f"DATABASE_URL: {error}"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    print(f"app.py: {message}", file=sys.stderr)
    sys.exit(4)  # gunicorn takes 4 for an app that does not load, and stops


def serve_locally() -> None:
    """Become gunicorn on 127.0.0.1, with the development secret when none is set."""
    try:
        port = read_number(os.environ, "PORT", 3000, 1, 65535)
        workers = read_number(os.environ, "WEB_CONCURRENCY", 1, 1, 1000)
        with contextlib.closing(socket.create_server(("127.0.0.1", port))):
            pass
    except ConfigError as error:
        sys.exit(f"app.py: {error}")
    except OSError as error:
        sys.exit(f"app.py: port {port}: {os.strerror(error.errno)}; choose another by PORT=")
    if not {"PERSONA_WEBHOOK_SECRET", "PERSONA_WEBHOOK_SECRET_FILE"} & os.environ.keys():
        os.environ["PERSONA_WEBHOOK_SECRET"] = DEVELOPMENT_SECRET
    gunicorn = [sys.executable, "-m", "gunicorn", "app:app", "--worker-class", "gthread"]
    gunicorn += ["--threads", "32", "--keep-alive", "0", "--no-control-socket"]
    options = ["--workers", str(workers), "--bind", f"127.0.0.1:{port}"]
    os.execv(sys.executable, [*gunicorn, *options, "--pythonpath", str(HERE)])


if __name__ == "__main__":
    serve_locally()
else:
    app = start()
