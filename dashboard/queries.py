"""What the API, the pages and the metrics ask the database: every question has a bound.

A connection is opened for each, and closed before anything is rendered or waited for, so nobody
keeps the WAL from being emptied. A filter without an index looks at SCANNED rows, and returns a
cursor although its page is not full.
"""

import base64
import binascii
import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from flask import current_app

import app as kyc

Row = dict[str, Any]

SECONDS = 2.0  # that the database may take for one answer
SCANNED = 10_000  # rows
TURN = threading.Semaphore()  # held by the request that is answered; see dashboard.admit


class BadQueryError(Exception):
    """A parameter of a request makes no sense; the message says which."""


@contextlib.contextmanager
def reading() -> Iterator[Connection]:
    """Yield a connection that sees one state of the database, for SECONDS at most."""
    with contextlib.closing(connect()) as db:
        deadline = time.monotonic() + SECONDS
        db.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
        db.execute("BEGIN")
        yield db


def connect() -> Connection:
    """Open the database of the service, only to read."""
    db = kyc.connect(current_app.config["KYC"].database, readonly=True)
    db.execute("PRAGMA query_only = ON")
    db.execute("PRAGMA busy_timeout = 250")
    return db


def select(db: Connection, query: str, **values: Any) -> list[Row]:
    """Return the rows of a query as dictionaries."""
    return [dict(row) for row in db.execute(query, values)]


def in_order(query: str, newest_first: bool) -> str:
    """Return a query in one of the two orders."""
    query = query.replace("{than}", "<" if newest_first else ">")
    return query.replace("{order}", "DESC" if newest_first else "ASC")


def write_cursor(row: Row, *columns: str) -> str:
    """Return the place of a row in its order, for the next request to go on from."""
    place = json.dumps([row[column] for column in columns])
    return base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> tuple[str, str]:
    """Return what write_cursor was given; raise BadQueryError."""
    try:
        at, key = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        f"{at}{key}".encode()  # a lone surrogate cannot be looked for
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise BadQueryError("the cursor is not one that was given out") from None
    return str(at), str(key)


# People

SCOPES = {  # each has an index in the order of updated_at
    "held": "hold IS NOT NULL",
    "status": "status = :status AND status <> 'approved'",
    "all": "true",
}
IN_ORDER = """
    SELECT * FROM kyc_status WHERE {scope} AND (updated_at, reference_id) {than} (:at, :key)
    ORDER BY updated_at {order}, reference_id {order} LIMIT :scanned
"""
PEOPLE = """  -- in the order of the inner query, which is not read further than needed
    SELECT * FROM ({in order}) AS page WHERE (:status IS NULL OR status = :status)
        AND (:flag IS NULL OR (hold IS NOT NULL) = (:flag = 'held'))
        AND (:template IS NULL OR template_id = :template)
        AND (:before IS NULL OR event_at < :before)
    LIMIT :limit + 1
"""
LAST_SCANNED = "SELECT * FROM ({in order}) AS page LIMIT 1 OFFSET :scanned - 1"
TEMPLATES = """
    SELECT DISTINCT template_id FROM (
        SELECT template_id FROM kyc_status ORDER BY updated_at DESC, reference_id DESC
        LIMIT 2000) AS newest
    WHERE template_id IS NOT NULL ORDER BY template_id LIMIT 50
"""


def list_people(
    db: Connection, limit: int, *, after: str = "", newest_first: bool = False, **filters: Any
) -> tuple[list[Row], str | None]:
    """Return a page of kyc_status by (updated_at, reference_id), and the cursor of the next.

    Filters are status, held, template, since (updated) and before (of the event that decides).
    """
    values = dict.fromkeys(("status", "held", "template", "before"), None) | filters
    values |= {"limit": limit, "scanned": SCANNED}
    values["flag"] = {None: None, True: "held", False: "free"}[values["held"]]
    start = ("~", "") if newest_first else (filters.get("since", ""), "")
    values["at"], values["key"] = read_cursor(after) if after else start
    by_status = values["status"] not in (None, "approved")
    scope = SCOPES["held" if values["held"] else "status" if by_status else "all"]
    ordered = in_order(IN_ORDER.replace("{scope}", scope), newest_first)
    found = select(db, PEOPLE.replace("{in order}", ordered), **values)
    last = found[limit - 1 : limit]
    if len(found) <= limit:
        last = select(db, LAST_SCANNED.replace("{in order}", ordered), **values)
    return found[:limit], write_cursor(last[0], "updated_at", "reference_id") if last else None


# A person

FIND_PERSON = (  # the first that knows the ID
    "SELECT reference_id FROM kyc_status WHERE reference_id = :id",
    "SELECT person FROM inquiries WHERE person = :id LIMIT 1",
    "SELECT person FROM inquiries WHERE inquiry_id = :id",
    "SELECT reference_id FROM accounts WHERE account_id = :id",
    # a reference ID that its inquiry no longer has
    """SELECT i.person FROM events AS e JOIN inquiries AS i ON i.inquiry_id = e.inquiry_id
        WHERE e.reference_id = :id AND e.object_id = e.inquiry_id
        ORDER BY e.rowid DESC LIMIT 1""",
    "SELECT reference_id FROM events WHERE reference_id = :id LIMIT 1",
    "SELECT account_id FROM events WHERE account_id = :id LIMIT 1",
    # an inquiry without a status yet
    """SELECT COALESCE(e.reference_id, a.reference_id, e.account_id, e.inquiry_id)
        FROM events AS e LEFT JOIN accounts AS a ON a.account_id = e.account_id
        WHERE e.inquiry_id = :id AND COALESCE(e.object_type, '') NOT IN ('case', 'transaction')
        ORDER BY e.created_at DESC, e.event_id DESC LIMIT 1""",
    "SELECT inquiry_id FROM events WHERE inquiry_id = :id LIMIT 1",
)
STANDING = """
    SELECT :id AS reference_id, k.status, k.hold, k.inquiry_id, k.account_id, k.template_id,
        k.event_id, k.event_name, k.event_at, k.updated_at
    FROM (SELECT 1) AS one LEFT JOIN kyc_status AS k ON k.reference_id = :id
"""
INQUIRIES = """
    SELECT inquiry_id, status, template_id, account_id, reference_id,
        event_id, event_name, event_at, standing,
        COALESCE(NOT EXISTS (SELECT 1 FROM kyc_templates)
            OR template_id IN (SELECT template_id FROM kyc_templates), false) AS counts
    FROM inquiries WHERE person = :id
    ORDER BY counts DESC, standing DESC, event_at DESC, rank DESC, event_id DESC LIMIT 101
"""
BY_TEMPLATE = """
    SELECT template_id, status, inquiry_id, event_id, event_name, event_at
    FROM kyc_status_by_template WHERE reference_id = :id LIMIT 100
"""
HOLD = """  -- what raised the hold that kyc_status shows
    SELECT hold, rule, object_id, lasting, event_id, event_at FROM holds
    WHERE raised = 1 AND hold = :hold AND (reference_id = :id
        OR inquiry_id IN (SELECT inquiry_id FROM inquiries WHERE person = :id)
        OR account_id IN (
            SELECT account_id FROM inquiries WHERE person = :id
            UNION SELECT account_id FROM events
                WHERE reference_id = :id AND object_type = 'account'))
    ORDER BY event_at DESC, event_id DESC LIMIT 1
"""
TIMELINE = """
    SELECT t.event_at, t.event_name, t.event_id, e.object_type, e.object_id, e.object_status,
        t.inquiry_id, t.account_id, e.source, t.state, t.received_at, t.position
    FROM (SELECT * FROM kyc_timeline
        WHERE reference_id = :id AND (event_at, event_id) {than} (:at, :key)
        ORDER BY event_at {order}, event_id {order} LIMIT :limit + 1) AS t
    JOIN events AS e ON e.rowid = t.position ORDER BY t.event_at {order}, t.event_id {order}
"""


def find_person(db: Connection, subject: str) -> str | None:
    """Return the key of who has this reference, account or inquiry ID; None for nobody."""
    for query in FIND_PERSON:
        if row := db.execute(query, {"id": subject}).fetchone():
            return row[0]
    return None


def read_person(db: Connection, person: str) -> Row:
    """Return the row of kyc_status, its best inquiries, and the standing in each template.

    The inquiry that decides is the first. A person without a status has the same columns.
    """
    standing = select(db, STANDING, id=person)[0]
    inquiries = select(db, INQUIRIES, id=person)
    for inquiry in inquiries:
        inquiry["counts"] = bool(inquiry["counts"])
        inquiry["decides"] = inquiry["inquiry_id"] == standing["inquiry_id"]
    return {
        **standing,
        "inquiries": inquiries[:100],
        "more_inquiries": len(inquiries) > 100,
        "templates": select(db, BY_TEMPLATE, id=person),
    }


def read_hold(db: Connection, standing: Row) -> Row | None:
    """Return what raised the hold of a row of kyc_status."""
    found = select(db, HOLD, id=standing["reference_id"], hold=standing["hold"])
    return found[0] if found else None


def read_timeline(
    db: Connection, person: str, limit: int, after: str = "", newest_first: bool = False
) -> tuple[list[Row], str | None]:
    """Return a page of a person's events by (event_at, event_id), and the cursor of the next."""
    at, key = read_cursor(after) if after else ("~" if newest_first else "", "")
    query = in_order(TIMELINE, newest_first)
    found = select(db, query, id=person, at=at, key=key, limit=limit)
    cursor = write_cursor(found[limit - 1], "event_at", "event_id") if found[limit:] else None
    return found[:limit], cursor


# Events

EVENTS = """
    SELECT * FROM journal WHERE {scope} AND position > :after AND position < :before
        AND (:name IS NULL OR name GLOB :name)
    ORDER BY position {order} LIMIT :limit
"""
NEWEST = "SELECT COALESCE(max(rowid), 0) FROM events"


def list_events(db: Connection, after: int, limit: int, name: str | None) -> tuple[list[Row], int]:
    """Return events after a position, in order, and the position to go on from."""
    end = min(db.execute(NEWEST).fetchone()[0], after + SCANNED)
    query = in_order(EVENTS.replace("{scope}", "true"), newest_first=False)
    rows = select(db, query, after=after, before=end + 1, name=check_name(name), limit=limit)
    full = len(rows) == limit
    return [cut_error(row) for row in rows], rows[-1]["position"] if full else max(after, end)


def list_newest(
    db: Connection, before: int, limit: int, name: str | None, state: str | None
) -> tuple[list[Row], int | None]:
    """Return events before a position, the newest first, and the position to go on from."""
    scope = "true" if state is None else "state = :state AND state <> 'processed'"
    before = min(before, db.execute(NEWEST).fetchone()[0] + 1)
    start = 0 if state else max(before - 1 - SCANNED, 0)
    query = in_order(EVENTS.replace("{scope}", scope), newest_first=True)
    values = {"after": start, "before": before, "limit": limit, "state": state}
    rows = select(db, query, name=check_name(name), **values)
    end = rows[-1]["position"] if len(rows) == limit else start + 1
    return [cut_error(row) for row in rows], end if end > 1 else None


def check_name(name: str | None) -> str | None:
    """Return a pattern for names that is cheap to match; raise BadQueryError."""
    if name and not re.fullmatch(r"[\w./-]{0,100}(\*[\w./-]{0,100}){0,2}", name):
        raise BadQueryError("name must be the name of an event, with at most two *")
    return name or None


def cut_error(event: Row) -> Row:
    """Return an event whose error says what kind and where: a message may quote the body."""
    if event["error"]:
        kind = re.match(r"\w*", event["error"])[0]
        place = re.search(r" \(handlers\.py:\d+ [\w<>]+\)$", event["error"])
        event["error"] = kind + (place[0] if place else "")
    return event


# Counts

COUNTED: dict[Path, tuple[float, Row]] = {}  # what was counted, and until when it will do
NOT_DELIVERED = "SELECT source, count(*) FROM events WHERE source <> 'webhook' GROUP BY source"
NOT_PROCESSED = """
    SELECT state, source, count(*) FROM events WHERE state <> 'processed' GROUP BY state, source
"""
NOT_APPROVED = "SELECT status, count(*) FROM kyc_status WHERE status <> 'approved' GROUP BY status"
UNFINISHED = """
    SELECT count(*) FROM events WHERE state <> 'processed'
        AND (state = 'failed' OR (state = 'pending' AND received_at < :before))
"""
HELD = "SELECT count(*) FROM kyc_status WHERE hold IS NOT NULL"
LAST_DELIVERY = """  -- or of the oldest that was looked at: no delivery is newer
    SELECT COALESCE(
        (SELECT received_at FROM events WHERE rowid > :start AND source = 'webhook'
            ORDER BY rowid DESC LIMIT 1),
        (SELECT received_at FROM events WHERE rowid > :start LIMIT 1))
"""
FORWARDED = "SELECT 1 FROM sqlite_schema WHERE name = 'forwarding'"  # by commands/forward.py
FORWARDING = """
    SELECT (SELECT max(position) FROM forward_queue) - (SELECT min(position) FROM forward_queue) + 1
            AS waiting,
        (SELECT updated_at FROM forward_queue ORDER BY position LIMIT 1) AS since
    FROM forwarding
"""


def count_all(db: Connection) -> Row:
    """Return how many events and people there are, by what and where they stand.

    When it took over 20 ms, the same is returned for ten seconds.
    """
    path, began = current_app.config["KYC"].database, time.monotonic()
    until, counts = COUNTED.get(path, (0.0, {}))
    if began < until:
        return counts
    counts = {"events": count_events(db), "people": count_people(db)}
    counts["held"] = db.execute(HELD).fetchone()[0]
    ended = time.monotonic()
    COUNTED[path] = (ended + (10 if ended - began > 0.02 else 0), counts)
    return counts


def count_events(db: Connection) -> dict[tuple[str, str], int]:
    """Return the number of events by state and source: all are processed but those in an index."""
    events = dict.fromkeys([("failed", "webhook"), ("pending", "webhook")], 0)
    events |= {(state, source): number for state, source, number in db.execute(NOT_PROCESSED)}
    sources = {"api": 0, "operator": 0} | dict(map(tuple, db.execute(NOT_DELIVERED)))
    sources["webhook"] = db.execute(NEWEST).fetchone()[0] - sum(sources.values())
    for source, number in sources.items():
        others = sum(count for key, count in events.items() if key[1] == source)
        events["processed", source] = number - others
    return events


def count_people(db: Connection) -> dict[str, int]:
    """Return the number of people by status: all are approved but those in an index."""
    people = dict.fromkeys(kyc.STATUSES, 0) | dict(map(tuple, db.execute(NOT_APPROVED)))
    total = db.execute("SELECT count(*) FROM kyc_status").fetchone()[0]
    return people | {"approved": total - sum(people.values())}


def read_last_delivery(db: Connection) -> str | None:
    """Return when the newest delivery came in, looking at SCANNED events."""
    start = db.execute(NEWEST).fetchone()[0] - SCANNED
    return db.execute(LAST_DELIVERY, {"start": start}).fetchone()[0]


def read_forwarding(db: Connection) -> Row | None:
    """Return how many changes `flask forward` has to deliver, and since when; None without it."""
    found = select(db, FORWARDING) if db.execute(FORWARDED).fetchone() else []
    return found[0] if found else None


def wait_for_events(position: int, seconds: float) -> None:
    """Return when there is an event beyond a position, or after so many seconds.

    Others have their turn meanwhile, and no transaction is open.
    """
    deadline = time.monotonic() + seconds
    with contextlib.closing(connect()) as db:
        TURN.release()
        try:
            while db.execute(NEWEST).fetchone()[0] <= position and time.monotonic() < deadline:
                time.sleep(min(0.25, max(deadline - time.monotonic(), 0)))
        finally:
            TURN.acquire()
