"""Receive Persona's webhooks: a journal of every event, and the KYC status of every person.

The way of an event, which is also the order of this file:

    POST body -> verify(raw bytes, header) -> read_event -> journal and projection, one transaction
              -> fsync -> handlers, a transaction of their own -> 200

Configuration, by environment: PERSONA_WEBHOOK_SECRET or PERSONA_WEBHOOK_SECRET_FILE,
PERSONA_SIGNATURE_TOLERANCE, PERSONA_SIGNATURE_SCHEME, KYC_DATABASE, KYC_TEMPLATES,
KYC_EPHEMERAL_DISK, MAX_BODY_BYTES; PORT and WEB_CONCURRENCY belong to gunicorn. README.md
explains each. The tables, and the rules by which an event sets a status, are in schema.sql.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("app.py: needs Python 3.11 or newer")

import atexit
import codecs
import contextlib
import dataclasses
import difflib
import fcntl
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
    """A setting makes no sense; the message names the variable."""


@dataclass(frozen=True)
class Config:
    """What the environment says, checked once at start."""

    secrets: tuple[bytes, ...]
    tolerance: int  # seconds; 0 switches the check off
    scheme: str  # one of SCHEMES
    database: Path
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
    database = environ.get("KYC_DATABASE", "kyc.db")
    if not database or database.endswith("/") or database == ":memory:" or "\0" in database:
        raise ConfigError("KYC_DATABASE must be the path of a file")
    templates = tuple(re.split(r"[,\s]+", environ.get("KYC_TEMPLATES", "").strip(", \t\n")))
    if templates != ("",) and not all(re.fullmatch(r"\w{1,100}", name) for name in templates):
        raise ConfigError("KYC_TEMPLATES must be IDs such as itmpl_..., separated by commas")
    return Config(
        secrets=read_secrets(environ),
        tolerance=read_number(environ, "PERSONA_SIGNATURE_TOLERANCE", 300, 0, 10**9),
        scheme=scheme,
        # Relative to this file, not to the current folder; SQLite puts the WAL where links lead.
        database=Path(os.path.realpath(HERE / database)),
        templates=tuple(sorted(set(templates) - {""})),
        max_body_bytes=read_number(environ, "MAX_BODY_BYTES", 2 * 1024 * 1024, 1, 500_000_000),
    )


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
    config, journal = current_app.config["KYC"], current_app.extensions["journal"]
    body = read_body(config.max_body_bytes)
    signed_by = verify(body, request.headers, config, time.time())
    received_at = utc_now()
    event = read_event(body, received_at)
    delivery = Delivery(event, body, received_at, "webhook", signed_by, read_attempt())
    return answer(*ANSWERS[journal.append(delivery)])


def read_body(limit: int) -> bytes:
    """Return the raw body; raise RequestEntityTooLarge over `limit` bytes, BadRequest if broken."""
    connection = request.environ.get("gunicorn.socket")
    if (
        connection
    ):  # a client that stalls must not hold a thread; settimeout would poll at each call
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, STALL)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, STALL)
    parts, size = [], 0
    try:
        if (request.content_length or 0) <= limit + EXCESS:
            while size <= limit + EXCESS and (part := request.stream.read(1 << 20)):
                size += len(part)
                parts.append(part if size <= limit else b"")
    except Exception:  # werkzeug's or the server's own, for a malformed or broken body
        if connection:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # gunicorn would wait for the rest
        raise BadRequest from None
    if max(size, request.content_length or 0) > limit:
        raise RequestEntityTooLarge
    if size < (request.content_length or 0):
        raise BadRequest  # the client left in the middle
    return b"".join(parts)


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
    words = "Persona webhook receiver. POST events to /webhooks/persona\n"
    return Response(words, mimetype="text/plain")


@routes.get("/livez")
def livez() -> Response:
    """Say that the process answers."""
    return answer(200, {"status": "ok"})


@routes.get("/healthz")
def healthz() -> Response:
    """Say whether the database can be opened and written, by writing to it once a second."""
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
    count("unavailable", 1)
    response = answer(503, {"error": "The event could not be stored", "reason": str(error)})
    response.headers["Retry-After"] = "5"
    return response


def answer_http_error(error: HTTPException) -> Response:
    """Answer a wrong path, method or body in JSON; log what was posted in vain."""
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
    words = "outcome=rejected stale=%s reason=%s method=%s path=%s"
    log.warning(words, str(stale).lower(), *map(quote, (reason, request.method, request.path)))
    count(f"rejected {reason.partition(':')[0]}", 1)


def quote(value: str) -> str:
    """Return `value` as one word of a log line."""
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

NAMED_BY_REFERENCE = {"transaction", "importer-pipeline-run"}  # by your ID of them, not of a person
PLURALS = {"inquiry": "inquiries", "account": "accounts"}
MENTION = re.compile(rb"\b(?:inq|act)_\w{1,64}")


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
    inquiry_id, account_id = related(thing, "inquiry"), related(thing, "account")
    reference_id = template_id = None
    if object_type == "inquiry":
        inquiry_id = object_id
        template_id = related(thing, "inquiry-template") or related(thing, "template")
    elif object_type == "account":
        account_id = object_id
        status = text(field(attributes, "account-status")) or status
    if object_type not in NAMED_BY_REFERENCE:
        reference_id = text(field(attributes, "reference-id"))
    return object_type, object_id, status, inquiry_id, account_id, reference_id, template_id


def related(thing: Any, kind: str) -> str | None:
    """Return the ID of the one object of a kind that `thing` points at; None when of several."""
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


def read_mentions(body: bytes, event: Event) -> set[str]:
    """Return the inquiries and accounts that `body` names beyond the event's columns."""
    return {match.decode() for match in set(MENTION.findall(body))} - set(event[3:10])


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
LEAST_SECONDS = 0.2  # to wait while no commit succeeds: then requests queue in front, too
MAX_WAITING = 256  # deliveries in line; more means that the database is stuck
MAX_WAL = 16 * 1024 * 1024  # bytes; a longer WAL is emptied

INSERT_EVENT = """
    INSERT INTO events (event_id, name, created_at, received_at, object_type, object_id,
        object_status, inquiry_id, account_id, reference_id, template_id, source, signed_by,
        attempt, body_sha256, state, body)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT DO NOTHING
"""
INSERT_MENTION = """
    INSERT INTO mentions (id, position) SELECT ?, rowid FROM events WHERE event_id = ?
    ON CONFLICT DO NOTHING
"""
ADD_COUNT = """
    INSERT INTO counts (name, total) VALUES (?, ?)
    ON CONFLICT (name) DO UPDATE SET total = counts.total + excluded.total
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
        try:
            body: str | bytes = self.body.decode()
        except UnicodeDecodeError:
            body = self.body
        return (
            *(event_id, name, created_at, self.received_at, *columns),
            *(self.source, self.signed_by, self.attempt, hashlib.sha256(self.body).hexdigest()),
            *(UNRECOGNIZED if name == UNRECOGNIZED else state, body),
        )


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

    def __init__(self, config: Config):
        self.config, self.path = config, config.database
        self.starting = threading.Lock()
        self.reset()
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        """Start from nothing, as a process does that has just been forked."""
        self.line: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.db: sqlite3.Connection | None = None
        self.files: list[Any] = []  # which files are open: the database, its WAL, the WAL's index
        self.wal_bytes, self.wal_limit = 0, MAX_WAL
        self.wal_holds_removed = True  # bodies; at first those that a killed process removed
        self.busy_since: float | None = None  # since when something is due and nothing succeeded
        self.looked_at = self.probed_at = 0.0
        self.probed = ""  # why the last probe failed
        self.rebuilding: Iterator[Any] | None = None
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
        busy = time.monotonic() - (self.busy_since or time.monotonic())
        if not delivery.done.acquire(timeout=max(ANSWER_SECONDS - busy, LEAST_SECONDS)):
            blame = f"the handler {RUNNING[0]}" if RUNNING else "the database"
            raise JournalError(f"{blame} did not answer in time")
        if delivery.outcome is None:
            raise JournalError(delivery.error)
        return delivery.outcome

    def probe(self) -> str:
        """Return why the journal cannot be written, or ''; it is tried once a second at most."""
        if time.monotonic() > self.probed_at + 1.0:
            self.probed_at = time.monotonic()
            try:
                self.append(Delivery())
                self.probed = ""
            except JournalError as error:
                self.probed = str(error)
        return self.probed

    def start(self) -> None:
        """Start the writer thread, once."""
        with self.starting:
            if self.thread is None or not self.thread.is_alive():
                thread = threading.Thread(target=self.run, daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    raise JournalError("no thread can be started") from None
                self.thread = thread

    def stop(self) -> None:
        """Finish what is in line, end the thread, and close the database."""
        self.stopping = True
        if self.thread:
            self.line.put(Delivery())
            self.thread.join(ANSWER_SECONDS)

    def run(self) -> None:
        """Commit what is in line, again and again, and look after the files in between."""
        take_core()
        while not self.stopping or not self.line.empty():
            batch: list[Delivery] = []
            with contextlib.suppress(queue.Empty):
                batch.append(self.line.get(timeout=0.001 if self.rebuilding else 1.0))
            if batch:
                self.serve(batch)
            self.look_after(resting=not batch and not self.rebuilding)
        self.close()

    def serve(self, batch: list[Delivery]) -> None:
        """Commit `batch`, with what else is in line when its turn comes; wake the requests."""
        self.busy_since = self.busy_since or time.monotonic()
        try:
            with turn(self.path):
                with contextlib.suppress(queue.Empty):
                    while len(batch) < MAX_WAITING:
                        batch.append(self.line.get_nowait())
                self.settle(batch)
        except OSError as error:  # of the lock files
            fail(batch, error)
        finally:
            for delivery in batch:
                delivery.done.release()
        log_deliveries(batch)

    def settle(self, batch: list[Delivery]) -> None:
        """Commit `batch`; if an event is to blame for a failure, each event by itself."""
        try:
            self.commit(batch)
        except BaseException as error:  # the one seam: a batch fails, the writer goes on
            if not isinstance(error, FileGoneError):
                self.close()
            fail(batch, error)
            if len(batch) > 1 and not is_obstacle(error):
                for delivery in [one for one in batch if one.outcome is None]:
                    self.settle([delivery])

    def commit(self, batch: list[Delivery]) -> None:
        """Store `batch` in one transaction, run its handlers in another; set each outcome."""
        db, began = self.open(), time.perf_counter()
        deliveries = [delivery for delivery in batch if delivery.event]
        with transaction(db):
            outcomes = store(db, deliveries)
            if len(deliveries) < len(batch):
                db.execute(PROBE)
        self.busy_since = None
        for delivery, outcome in zip(deliveries, outcomes, strict=True):
            delivery.outcome = outcome
            self.wal_holds_removed |= delivery.event.name.endswith(".redacted")
        count("commit_seconds", time.perf_counter() - began)
        count("commits", 1)
        dispatch(db, [delivery for delivery in deliveries if delivery.outcome is None])
        for delivery in batch:
            delivery.outcome = delivery.outcome or STORED  # a probe

    def look_after(self, resting: bool) -> None:
        """Once a second, and when due: look at the files, write down the counts, go on with a
        rebuild, and empty the WAL if it is long, at rest, or holds removed bodies.
        """
        long = self.wal_bytes > self.wal_limit
        if self.db is None or not (
            long or self.rebuilding or time.monotonic() > self.looked_at + 1.0
        ):
            return
        self.busy_since = self.busy_since or time.monotonic()  # the turn may be long in coming
        try:
            with turn(self.path):
                if not self.files_changed():
                    write_counts(self.db)
                    if self.rebuilding and next(self.rebuilding, None) is None:
                        self.rebuilding = None
                    if long or (self.wal_bytes and (resting or self.wal_holds_removed)):
                        self.empty_wal(seconds=1.0 if long else 0.0)
        except FileGoneError:
            pass  # the next delivery is told
        except Exception as error:  # the thread survives; the next delivery opens anew
            log.error("the database cannot be looked after: %s", reason(error))
            self.close()
        self.looked_at, self.busy_since = time.monotonic(), None

    def empty_wal(self, seconds: float) -> bool:
        """Copy the WAL into the database and cut it to nothing; tell whether that was possible.

        A reader may be in the way: wait so many seconds for it, then let the WAL grow.
        """
        self.db.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}")
        blocked = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        self.db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        self.wal_limit = max(MAX_WAL, 2 * self.wal_bytes) if blocked else MAX_WAL
        self.wal_holds_removed &= bool(blocked)
        return not blocked

    def open(self) -> sqlite3.Connection:
        """Return the connection; open it anew when the file at the path is another one.

        Raises FileGoneError while the database, or the WAL that is open, is not at its path.
        """
        self.files_changed()
        if self.db is None:
            file = identify(self.path)
            db = connect(self.path)
            try:
                prepare(db, self.config)
                copy_wal(db)
                self.files = [identify(path) for path in (self.path, *wal_paths(self.path))]
                if self.files[0] != file or None in self.files:
                    raise DatabaseError("a file was replaced while it was opened")
                self.rebuilding = rebuild(db) if is_rebuild_due(db) else None
            except BaseException:
                db.close()
                raise
            self.db = db
        return self.db

    def files_changed(self) -> bool:
        """Tell whether the connection was dropped, because the database was replaced.

        Raises FileGoneError while the database, or the WAL that is open, is not at its path.
        """
        files = [identify(path) for path in (self.path, *wal_paths(self.path))]
        if files[0] is None:
            raise FileGoneError("the database is gone: bring it back")
        if self.db is None:
            return True
        if files[0] != self.files[0]:
            self.leave_database()
            return True
        if files != self.files:
            if files[1] is None:
                self.empty_wal(seconds=0.0)  # nobody else can write to it
            raise FileGoneError("the WAL is gone: bring it back, or stop and start")
        self.wal_bytes = os.stat(wal_paths(self.path)[0]).st_size
        return False

    def leave_database(self) -> None:
        """Let go of a database that was replaced, and take its WAL away with it.

        SQLite would take that WAL for the new file's, and damage it. What a reader or the disk
        keeps from being copied into the old file is kept under another name.
        """
        saved = False
        with contextlib.suppress(sqlite3.Error):
            saved = self.empty_wal(seconds=1.0)
        paths = zip(wal_paths(self.path), self.files[1:], strict=True)
        ours = [path for path, file in paths if identify(path) == file]
        self.close()
        for path in ours:
            if saved or path.name.endswith("-shm"):
                path.unlink()
            else:
                kept = path.with_name(f"{path.name}.{time.time_ns()}")
                path.rename(kept)
                log.error("the WAL of the replaced database is kept as %s", kept.name)

    def close(self) -> None:
        """Drop the connection, whatever state it is in."""
        if self.db:
            with contextlib.suppress(sqlite3.Error):
                self.db.close()
        self.db = self.rebuilding = None


def store(db: sqlite3.Connection, deliveries: list[Delivery]) -> list[str | None]:
    """Journal and project the events of `deliveries`, in a transaction of the caller.

    Return what became of each: STORED, DUPLICATE, UNRECOGNIZED, or None when its handlers are
    still to run. A second copy of an event counts as a duplicate, but may name IDs that the
    first one lacked.
    """
    rows = [delivery.row() for delivery in deliveries]
    inserted = db.executemany(INSERT_EVENT, rows).rowcount if rows else 0
    events = [delivery.event for delivery in deliveries]
    mentions = [
        (mention, delivery.event.event_id)
        for delivery in deliveries
        for mention in read_mentions(delivery.body, delivery.event)
    ]
    if mentions:
        db.executemany(INSERT_MENTION, mentions)
    new = dict.fromkeys(event.event_id for event in events)
    if inserted < len(rows):
        last = db.execute("SELECT COALESCE(max(rowid), 0) FROM events").fetchone()[0] - inserted
        found = select(db, READ_EVENTS, list(new))
        events = [Event(*row[2:]) for row in found]
        new = {row["event_id"]: None for row in found if row["position"] > last}
        states = {row["event_id"]: row["state"] for row in found}
    else:
        states = {row[0]: row[-2] for row in rows}
    project(db, events)
    outcomes: list[str | None] = []
    for delivery in deliveries:
        event_id = delivery.event.event_id
        outcome = {"processed": DUPLICATE, "unrecognized": UNRECOGNIZED}.get(states[event_id])
        outcomes.append(STORED if outcome == DUPLICATE and event_id in new else outcome)
        new.pop(event_id, None)
    return outcomes


READ_EVENTS = """
    SELECT rowid AS position, state, event_id, name, created_at, object_type, object_id,
        object_status, inquiry_id, account_id, reference_id, template_id
    FROM events WHERE event_id IN (:keys) ORDER BY rowid
"""


def select(db: sqlite3.Connection, query: str, keys: Iterable[str]) -> list[sqlite3.Row]:
    """Return the rows of a query whose `IN (:keys)` stands for `keys`.

    A list of parameters, because SQLite takes those into the views, and padded, so that few
    different statements are prepared.
    """
    keys = list(keys)
    if not keys:
        return []
    keys += keys[-1:] * ((1 << (len(keys) - 1).bit_length()) - len(keys))
    marks = ", ".join("?" * len(keys))
    return db.execute(query.replace(":keys", marks), keys * query.count(":keys")).fetchall()


def fail(batch: list[Delivery], error: BaseException) -> None:
    """Note why those in `batch` that have no outcome could not be served."""
    for delivery in batch:
        if delivery.outcome is None:
            delivery.error = reason(error)


def reason(error: BaseException) -> str:
    """Say what was wrong with the database; of any other error only its kind."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) if is_obstacle(error) else type(error).__name__


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
    line = (
        f"event={quote(delivery.event.event_id)} name={quote(delivery.event.name)}"
        f" outcome={delivery.outcome or 'unavailable'} attempt={delivery.attempt or 0}"
        f" ms={(time.perf_counter() - delivery.started) * 1000:.1f}"
    )
    return line if delivery.error is None else f"{line} reason={quote(delivery.error)}"


COUNTS: dict[str, float] = {}  # for the metrics; the writer adds them to the table once a second
COUNTING = threading.Lock()


def count(name: str, number: float) -> None:
    """Add to a count that the metrics tell."""
    with COUNTING:
        COUNTS[name] = COUNTS.get(name, 0) + number


def write_counts(db: sqlite3.Connection) -> None:
    """Add what was counted in this process to the table; what fails is not counted."""
    with COUNTING:
        counted = list(COUNTS.items())
        COUNTS.clear()
    if counted:
        with transaction(db):
            db.executemany(ADD_COUNT, counted)


# --------------------------------------------------------------------------------------
# Projection
# --------------------------------------------------------------------------------------
#
# The views ..._by_the_rules of schema.sql say how each row follows from the journal. Here is
# only which rows an event touches. Any order of the same events, and any repetition, gives the
# same tables, because each row is computed anew from all that it rests on.

COLUMNS = {  # table -> its columns; the first is the key
    "inquiries": "inquiry_id person reference_id account_id template_id status event_id"
    " event_name event_at standing rank",
    "accounts": "account_id reference_id",
    "holds": "object_id rule raised lasting hold event_id event_at"
    " inquiry_id account_id reference_id",
    "kyc_status": "reference_id status hold inquiry_id account_id template_id event_id"
    " event_name event_at",
}
Change = tuple[sqlite3.Row | None, sqlite3.Row | None]  # a row before and after; None: no row


def statements(table: str) -> tuple[str, str, str]:
    """Return the statements that read, drop and write rows of a projection by its view."""
    columns = COLUMNS[table].split()
    key, identity = columns[0], ", ".join(columns[: 2 if table == "holds" else 1])
    view, names = f"{table}_by_the_rules", ", ".join(columns)
    old, new = (", ".join(f"{side}.{name}" for name in columns) for side in (table, "excluded"))
    sets = [f"{name} = excluded.{name}" for name in columns]
    stamp = ", updated_at" if table == "kyc_status" else ""
    now = ", strftime('%Y-%m-%dT%H:%M:%fZ', 'now')" if stamp else ""
    sets += ["updated_at = excluded.updated_at"] if stamp else []
    return (
        f"SELECT * FROM {table} WHERE {key} IN (:keys)",
        f"DELETE FROM {table} WHERE {key} IN (:keys) AND ({identity}) NOT IN"
        f" (SELECT {identity} FROM {view} WHERE {key} IN (:keys)) RETURNING *",
        f"INSERT INTO {table} ({names}{stamp}) SELECT {names}{now} FROM {view}"
        f" WHERE {key} IN (:keys) ON CONFLICT ({identity}) DO UPDATE SET {', '.join(sets)}"
        f" WHERE ({old}) IS NOT ({new}) RETURNING *",
    )


STATEMENTS = {table: statements(table) for table in COLUMNS}


def update(db: sqlite3.Connection, table: str, keys: Iterable[str]) -> list[Change]:
    """Make the rows of a projection with these keys what its view says; return what changed."""
    read, drop, write = STATEMENTS[table]
    keys = list(keys)
    width = 2 if table == "holds" else 1
    before = {tuple(row)[:width]: row for row in select(db, read, keys)}
    gone = select(db, drop, keys) if before else []
    return [(row, None) for row in gone] + [
        (before.get(tuple(row)[:width]), row) for row in select(db, write, keys)
    ]


def project(db: sqlite3.Connection, events: Iterable[Event]) -> list[Change]:
    """Bring the projections up to date with `events`, which are in the journal.

    Return the rows of kyc_status that changed.
    """
    return refresh(
        db,
        inquiries={event.inquiry_id for event in events if event.inquiry_id},
        accounts={
            event.account_id
            for event in events
            if event.object_type == "account" and event.reference_id
        },
        objects={row[0] for row in select(db, HELD_OBJECTS, [event.event_id for event in events])},
    )


HELD_OBJECTS = "SELECT object_id FROM hold_events WHERE event_id IN (:keys)"


def refresh(
    db: sqlite3.Connection,
    inquiries: Iterable[str] = (),
    accounts: Iterable[str] = (),
    objects: Iterable[str] = (),
    people: Iterable[str] = (),
) -> list[Change]:
    """Compute these rows of the projections anew, and all that rest on those that change."""
    accounts, people = set(accounts), set(people)
    for row in changed_rows(update(db, "inquiries", inquiries)):
        people.add(row["person"])
        if row["account_id"] and row["reference_id"]:
            accounts.add(row["account_id"])
    changes = update(db, "accounts", accounts)
    select(db, MOVE_INQUIRIES, [row["account_id"] for row in changed_rows(changes)])
    for old, new in changes:
        account = (old or new)["account_id"]
        people |= {row["reference_id"] if row else account for row in (old, new)}
    for row in changed_rows(update(db, "holds", objects)):
        people |= {person for (person,) in db.execute(FIND_PEOPLE, tuple(row[-3:]))}
    return update(db, "kyc_status", people - {None})


def changed_rows(changes: list[Change]) -> Iterator[sqlite3.Row]:
    """Yield both sides of each change, as far as there are any."""
    return (row for change in changes for row in change if row)


MOVE_INQUIRIES = """
    UPDATE inquiries SET person = COALESCE((SELECT a.reference_id FROM accounts AS a
        WHERE a.account_id = inquiries.account_id), account_id)
    WHERE account_id IN (:keys) AND reference_id IS NULL RETURNING person
"""
FIND_PEOPLE = """  -- of an inquiry, an account and a reference ID
    SELECT person FROM inquiries WHERE inquiry_id = ?1
    UNION SELECT person FROM inquiries WHERE account_id = ?2 AND reference_id IS NULL
    UNION SELECT person FROM inquiries WHERE account_id = ?2 AND reference_id IS NOT NULL
    UNION SELECT reference_id FROM accounts WHERE account_id = ?2
    UNION SELECT ?3
"""
CHUNK = 500  # rows that a rebuild takes at a time
NEXT_KEYS = {  # of all rows there may be, after one
    "inquiries": """SELECT inquiry_id FROM events WHERE inquiry_id > :last
        UNION SELECT inquiry_id FROM inquiries WHERE inquiry_id > :last""",
    "accounts": """SELECT account_id FROM events WHERE account_id > :last
        UNION SELECT account_id FROM accounts WHERE account_id > :last""",
    "objects": """SELECT object_id FROM events
            WHERE object_id > :last AND object_id IS NOT inquiry_id
        UNION SELECT object_id FROM holds WHERE object_id > :last""",
    "people": """SELECT person FROM inquiries WHERE person > :last
        UNION SELECT reference_id FROM kyc_status WHERE reference_id > :last""",
}


def rebuild(db: sqlite3.Connection) -> Iterator[list[Change]]:
    """Compute all projections anew, a chunk in each step and transaction, and write what differs.

    Yield the rows of kyc_status that changed, after each step.
    """
    rules = read_rules(db)
    for rows, query in NEXT_KEYS.items():
        keys = [("",)]
        while keys:
            with transaction(db):
                page = f"{query} ORDER BY 1 LIMIT {CHUNK}"
                keys = db.execute(page, {"last": keys[-1][0]}).fetchall()
                ids = [row[0] for row in keys]
                also = {"objects": ids} if rows == "inquiries" else {}
                changes = refresh(db, **{rows: ids}, **also)
            yield changes
    with transaction(db):
        db.execute("DELETE FROM projected_under")
        db.execute("INSERT INTO projected_under (rules) VALUES (?)", (rules,))


def is_rebuild_due(db: sqlite3.Connection) -> bool:
    """Tell whether the projections were made under other rules than those in force."""
    under = db.execute("SELECT rules FROM projected_under").fetchone()
    return under is None or under[0] != read_rules(db)


def read_rules(db: sqlite3.Connection) -> str:
    """Return the rules in force, as one text to compare."""
    queries = (
        "SELECT * FROM status_rules",
        "SELECT * FROM hold_rules",
        "SELECT * FROM kyc_templates",
    )
    return json.dumps([[tuple(row) for row in db.execute(query)] for query in queries])


# --------------------------------------------------------------------------------------
# Handlers
# --------------------------------------------------------------------------------------

Handler = Callable[[sqlite3.Connection, Event], None]
HANDLERS: dict[str, list[Handler]] = {}
STATUS_RULES: list[tuple[str, str, str]] = []  # of handlers.py: name, object status, status
HOLD_RULES: list[tuple[str, str]] = []  # of handlers.py: name, object status
RUNNING: list[str] = []  # the handler that runs now, for who waits for it
SLOW_SECONDS = 1.0

EVENT_NAMES = """
account: added-relation archived consolidated consolidated-with created redacted removed-relation
    restored status-updated tag-added tag-removed updated-fields updated-tags
case: assigned created exported queue-updated redacted reopened resolved sla-expired
    status-updated updated-fields updated-tags
document: created errored extracted pending processed submitted
graph-query: cancelled completed errored reran timed-out
importer-pipeline-run: canceled completed errored paused resumed started
inquiry: approved completed created declined expired failed marked-for-review redacted
    reusable-persona-created reusable-persona-used started transitioned updated-tags
inquiry-session: canceled expired started
selfie: created errored processed submitted
transaction: added-relation created labeled redacted removed-relation
    sentinel-session-processed status-updated updated-fields
transaction-type: deleted-field
verification: canceled created escalated failed passed requires-retry skipped submitted
    tentatively-failed tentatively-passed updated-tags
workflow-run: created errored resumed
"""  # of Persona's page "Events"; of reports there are too many kinds


class HandlerError(Exception):
    """A mistake in handlers.py that is seen when it is loaded."""


def on(*names: str) -> Callable[[Handler], Handler]:
    """Register a function for the events with these names: handler(db, event).

    It runs after the event is stored and projected, before the answer, in a transaction of its
    own in which the event becomes processed. If it raises, what the event's handlers did is
    undone, the event is kept as failed, and Persona's redelivery or `flask replay` runs them
    again. It must be quick and touch only the database, in tables of its own.
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise HandlerError('@on takes the names of events: @on("inquiry.approved")')

    def register(handler: Handler) -> Handler:
        try:
            inspect.signature(handler).bind(None, None)
        except TypeError:
            raise HandlerError(f"{handler.__name__} must take two arguments: db, event") from None
        for name in names:
            HANDLERS.setdefault(name, []).append(handler)
        return handler

    return register


def status_rule(name: str, status: str, object_status: str | None = None) -> None:
    """Let the events with this name set the status of their inquiry.

    With an `object_status`, only those whose object has that status.
    """
    STATUS_RULES.append((name, object_status or "", status))


def hold_rule(name: str, object_status: str | None = None) -> None:
    """Hold a person while the newest event with this name about an object of theirs matches.

    With an `object_status`, it matches when its object has that status; without one, always.
    """
    HOLD_RULES.append((name, object_status or ""))


def load_handlers() -> None:
    """Load handlers.py, the team's own file, if it is there; raise HandlerError."""
    path = HERE / "handlers.py"
    if not path.exists():
        return
    try:
        importlib.import_module("handlers")
    except SyntaxError as error:
        raise HandlerError(f"handlers.py:{error.lineno}: {error.msg}") from None
    except Exception as error:
        stored, _ = explain_error(error)
        raise HandlerError(stored) from None
    for name in {*HANDLERS, *(rule[0] for rule in STATUS_RULES + HOLD_RULES)}:
        if warning := doubt_name(name):
            log.warning("WARNING: handlers.py: %s", warning)


def doubt_name(name: str) -> str | None:
    """Return a warning when Persona is not known to send events of this name."""
    known = []
    for family in re.split(r"\n(?=\S)", EVENT_NAMES.strip()):
        kind, *happenings = family.split()
        known += [f"{kind[:-1]}.{happening}" for happening in happenings]
    if name in known or re.fullmatch(
        r"report/[a-z-]+\.(ready|matched|dismissed|errored|submitted)", name
    ):
        return None
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"Persona is not known to send {name}{hint}"


def dispatch(db: sqlite3.Connection, deliveries: list[Delivery]) -> None:
    """Run the handlers of stored events in one transaction; set each outcome.

    Each event's handlers do all or nothing. If one of them breaks the transaction, the events
    are dispatched one by one, and its own is marked as failed.
    """
    if not deliveries:
        return
    try:
        with transaction(db):
            results = [run_handlers(db, delivery.event) for delivery in deliveries]
    except Exception as error:
        if is_obstacle(error):
            raise
        if len(deliveries) > 1:
            for delivery in deliveries:
                dispatch(db, [delivery])
            return
        with transaction(db):
            results = [set_state(db, deliveries[0].event, error)]
    for delivery, (outcome, error) in zip(deliveries, results, strict=True):
        delivery.outcome, delivery.error = outcome, error


def run_handlers(db: sqlite3.Connection, event: Event) -> tuple[str, str | None]:
    """Run an event's handlers, unless they have; return the outcome, and the error for the log."""
    query = "SELECT state FROM events WHERE event_id = ?"
    if db.execute(query, (event.event_id,)).fetchone()[0] == "processed":
        return DUPLICATE, None
    db.execute("SAVEPOINT handlers")
    fault: BaseException | None = None
    try:
        db.set_authorizer(protect_transaction)
        for handler in HANDLERS.get(event.name, ()):
            call_handler(handler, db, event)
    except KeyboardInterrupt:  # of whoever runs `flask replay`
        raise
    except BaseException as error:  # even sys.exit() in a handler fails its event alone
        fault = error
    finally:
        RUNNING.clear()
        db.set_authorizer(None)
        db.row_factory, db.text_factory = sqlite3.Row, str
    if not db.in_transaction:  # INSERT OR ROLLBACK, RAISE(ROLLBACK), a full disk
        raise TransactionLostError("a handler ended the transaction") from fault
    if fault:
        db.execute("ROLLBACK TO handlers")
    conclude(db, "RELEASE handlers")
    return set_state(db, event, fault)


def call_handler(handler: Handler, db: sqlite3.Connection, event: Event) -> None:
    """Call a handler; warn when it is slow."""
    code = inspect.unwrap(handler).__code__ if inspect.isroutine(handler) else None
    place = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code else "handler"
    RUNNING[:] = [f"{place} {getattr(handler, '__name__', '')}"]
    began = time.perf_counter()
    handler(db, event)
    seconds = time.perf_counter() - began
    if seconds > SLOW_SECONDS:
        log.warning("slow handler=%s seconds=%.1f", quote(RUNNING[0]), seconds)


def set_state(
    db: sqlite3.Connection, event: Event, fault: BaseException | None
) -> tuple[str, str | None]:
    """Note that an event was processed, or why not; return the outcome, and what to log."""
    if fault is None:
        db.execute(SET_STATE, ("processed", None, event.event_id))
        return STORED, None
    stored, logged = explain_error(fault)
    db.execute(SET_STATE, ("failed", stored, event.event_id))
    return FAILED, logged


SET_STATE = """
    UPDATE events SET state = ?1, error = CASE WHEN redacted_at IS NULL THEN ?2
        ELSE substr(?2, 1, instr(?2 || ':', ':') - 1) END  -- the kind, not the message
    WHERE event_id = ?3
"""


def explain_error(error: BaseException) -> tuple[str, str]:
    """Return an error of a handler as the table keeps it, and as the log may tell it.

    The first begins with the kind, for a redaction cuts it there; the second has no message,
    which may quote personal data.
    """
    cause = error.__cause__ or error
    frames = [
        frame
        for frame in traceback.extract_tb(cause.__traceback__)
        if frame.filename == str(HERE / "handlers.py")
    ]
    place = f" (handlers.py:{frames[-1].lineno} {frames[-1].name})" if frames else ""
    kind = type(cause).__name__
    try:
        message = str(cause)[:1000]
    except Exception:  # of its own __str__
        message = ""
    if message == "not authorized":
        message = "a handler must not begin, commit or end a transaction"
    stored = f"{kind}: {message}".removesuffix(": ") + place
    return stored.encode(errors="backslashreplace").decode(), kind + place


def protect_transaction(action: int, _: str | None, name: str | None, *__: object) -> int:
    """Refuse what would end a handler's transaction or savepoint; asked at each prepare."""
    ends = action == sqlite3.SQLITE_TRANSACTION
    ends |= action == sqlite3.SQLITE_SAVEPOINT and name == "handlers"
    return sqlite3.SQLITE_DENY if ends else sqlite3.SQLITE_OK


# --------------------------------------------------------------------------------------
# Database
# --------------------------------------------------------------------------------------

SCHEMA = HERE / "schema.sql"
SCHEMA_VERSION = 2
PROBE = "PRAGMA application_id = 0"  # a commit that changes nothing
BUSY_SECONDS = 3.0  # how long SQLite waits for a lock that another process holds


class DatabaseError(Exception):
    """The database cannot be used; the message says why."""


class UnusableError(DatabaseError):
    """The database cannot be used, and no waiting mends that."""


class FileGoneError(DatabaseError):
    """A file that is open was taken away, and may come back."""


class TransactionLostError(Exception):
    """A handler undid the whole transaction or keeps it open, its neighbours' events included."""


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

    Raises DatabaseError when there is none, or it is of another version.
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
            db.execute("PRAGMA wal_autocheckpoint = 0")  # it would swallow errors
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            raise UnusableError(str(error)) from None
        raise DatabaseError(str(error) if path.exists() else "there is no such file") from None
    if version > SCHEMA_VERSION:
        raise UnusableError("the file was made by a newer release of this service")
    if 0 < version < SCHEMA_VERSION:
        raise UnusableError("the file was made before release 1.0, whose tables are others")
    return db


def prepare_database(config: Config) -> None:
    """Create the database if there is none, mode 0600, and bring it up to date.

    Raises UnusableError when no waiting helps, DatabaseError when something is in the way.
    """
    path = config.database
    if not path.exists() and wal_paths(path)[0].exists():
        raise FileGoneError("the database is gone, but its WAL is there: bring it back")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with turn(path, seconds=10), contextlib.closing(connect(path)) as db:
            prepare(db, config)
            with transaction(db):
                db.execute(PROBE)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the new files' names must last, too
        os.close(directory)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UnusableError(error.strerror) from None
    except OSError as error:
        raise DatabaseError(error.strerror) from None
    except sqlite3.Error as error:
        raise DatabaseError(str(error)) from None


def prepare(db: sqlite3.Connection, config: Config) -> None:
    """Bring an open database up to date: its schema, and the rules that are configured."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0 and db.execute("SELECT EXISTS (SELECT 1 FROM sqlite_schema)").fetchone()[0]:
        raise UnusableError("the file belongs to another application")
    if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise UnusableError("its disk does not support WAL")
    if version == 0:
        with transaction(db):
            for statement in read_statements(SCHEMA.read_text()):
                db.execute(statement)
    try:
        db.execute("SELECT 1 FROM events").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:
            raise UnusableError("the file belongs to another application") from None
        raise
    write_rules(db, config.templates)


def read_statements(script: str) -> Iterator[str]:
    """Yield the statements of an SQL script, for executescript would end a transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def write_rules(db: sqlite3.Connection, templates: tuple[str, ...]) -> None:
    """Bring the rules of handlers.py and KYC_TEMPLATES into their tables, if they differ.

    Raises UnusableError for a status that does not exist.
    """
    statuses = {row[0] for row in db.execute("SELECT status FROM statuses")}
    for name, _, status in STATUS_RULES:
        if status not in statuses:
            known = ", ".join(sorted(statuses))
            raise UnusableError(f"status_rule of {name}: {status} is none of {known}")
    wanted = {
        "SELECT name, object_status, status FROM status_rules WHERE own = 1": set(STATUS_RULES),
        "SELECT name, object_status FROM hold_rules WHERE own = 1": set(HOLD_RULES),
        "SELECT template_id FROM kyc_templates": {(template,) for template in templates},
    }
    if all({tuple(row) for row in db.execute(query)} == rows for query, rows in wanted.items()):
        return
    with transaction(db):
        db.execute("DELETE FROM status_rules WHERE own = 1")
        db.execute("DELETE FROM hold_rules WHERE own = 1")
        db.execute("DELETE FROM kyc_templates")
        db.executemany(ADD_STATUS_RULE, STATUS_RULES)
        db.executemany(ADD_HOLD_RULE, [(name, status, name) for name, status in HOLD_RULES])
        db.executemany(ADD_TEMPLATE, [(template,) for template in templates])


ADD_STATUS_RULE = """
    INSERT INTO status_rules (name, object_status, status, own) VALUES (?, ?, ?, 1)
    ON CONFLICT DO NOTHING
"""
ADD_HOLD_RULE = """
    INSERT INTO hold_rules (name, object_status, cleared_by, lasting, own) VALUES (?, ?, ?, 1, 1)
    ON CONFLICT DO NOTHING
"""
ADD_TEMPLATE = "INSERT INTO kyc_templates (template_id) VALUES (?)"


def copy_wal(db: sqlite3.Connection) -> None:
    """Copy the WAL into the database as far as readers allow, and sync both."""
    deadline = time.monotonic() + BUSY_SECONDS
    while db.execute("PRAGMA wal_checkpoint").fetchone()[0]:
        if time.monotonic() > deadline:
            raise DatabaseError("another process copies the WAL")
        time.sleep(0.01)


def wal_paths(path: Path) -> list[Path]:
    """Return the paths of a database's WAL and WAL index."""
    return [path.with_name(path.name + suffix) for suffix in ("-wal", "-shm")]


def identify(path: Path) -> tuple[int, int] | None:
    """Return which file is at `path`, as device and inode; None when there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


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
    """End a transaction or savepoint; only a statement that a handler left open can be in the way."""
    try:
        db.execute(statement)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise TransactionLostError("a handler left a statement open") from None
        raise


@contextlib.contextmanager
def turn(path: Path, seconds: float | None = None) -> Iterator[None]:
    """Wait for this process's turn to write to the database at `path`, then hold it.

    Two locks, taken one after the other: who waits for the second holds the first, so that
    nobody overtakes. Raises DatabaseError after `seconds`.
    """
    names = (path.with_name(path.name + ".gate"), path.with_name(path.name + ".lock"))
    gate, lock = (os.open(name, os.O_RDWR | os.O_CREAT, 0o600) for name in names)
    try:
        wait_for_lock(gate, seconds)
        wait_for_lock(lock, seconds)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing would not, while a forked process has it, too
    finally:
        os.close(gate)
        os.close(lock)


def wait_for_lock(file: int, seconds: float | None) -> None:
    """Lock an open file; without a limit in the kernel's queue, else in vain after `seconds`."""
    if seconds is None:
        return fcntl.flock(file, fcntl.LOCK_EX)
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DatabaseError("another process holds the lock file") from None
            time.sleep(0.005)


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
    app.extensions["journal"] = Journal(config)
    app.register_blueprint(routes)
    app.register_error_handler(SignatureError, answer_bad_signature)
    app.register_error_handler(JournalError, answer_unavailable)
    app.register_error_handler(HTTPException, answer_http_error)
    app.register_error_handler(Exception, answer_bug)
    if environ.get("FLASK_RUN_FROM_CLI") != "true":
        prepare_service(app, config, environ)
    for folder in ("commands", "dashboard"):
        if (HERE / folder / "__init__.py").exists():
            importlib.import_module(folder).register(app, environ)
    return app


def prepare_service(app: Flask, config: Config, environ: Mapping[str, str]) -> None:
    """Make ready to serve: log, warn, prepare the database, and finish it at the end."""
    if not config.secrets:
        raise ConfigError("PERSONA_WEBHOOK_SECRET is not set: nothing could be verified")
    if "DYNO" in environ and environ.get("KYC_EPHEMERAL_DISK") != "accept":
        raise ConfigError(
            "KYC_DATABASE would be on a Heroku dyno's disk, which is emptied at each restart;"
            " KYC_EPHEMERAL_DISK=accept serves all the same"
        )
    start_logging()
    warn(config)
    try:
        prepare_database(config)
    except UnusableError:
        raise
    except DatabaseError as error:
        log.error("KYC_DATABASE cannot be used for now, events get 503: %s", error)
    atexit.register(app.extensions["journal"].stop)


def start_logging() -> None:
    """Log to stderr, a line at a time; the platform adds the time."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def warn(config: Config) -> None:
    """Say which release starts on which database, and what is dangerous about its configuration."""
    log.info("kyc %s database=%s secrets=%d", VERSION, config.database, len(config.secrets))
    if DEVELOPMENT_SECRET.encode() in config.secrets:
        log.warning("WARNING: the development secret is accepted: anyone can forge events")
    elif config.scheme == "persona" and any(
        not secret.startswith(b"wbhsec_") for secret in config.secrets
    ):
        log.warning("WARNING: a secret does not begin with wbhsec_, as Persona's do")
    if config.tolerance == 0 or config.scheme == "body":
        log.warning("WARNING: no replay protection: timestamps are not checked")


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


def start() -> Flask:
    """Return the service; on a wrong setting say so in one line, and end."""
    try:
        load_handlers()
        return create_app(os.environ)
    except (ConfigError, HandlerError) as error:
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
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            sys.exit(f"app.py: PORT {port}: {error.strerror}; choose another with PORT=")
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
