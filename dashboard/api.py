"""The status API: people, a person, their timeline, the journal. JSON, in pages.

A page ends with `next`: what to give as `after` to get the one that follows, null for the last; of
the journal always a position. A page of people, or of events by name, may be short, even empty, and
not the last.

A path that ends in /events is the timeline of the ID before it. Whoever has a reference ID that
ends so is found by their account or inquiry ID.
"""

import hashlib
import re
import threading
import time

from flask import Blueprint, Response, request

import app as kyc
from dashboard import queries
from dashboard.queries import BadQueryError

routes = Blueprint("api", __name__)

LIMIT, MOST = 100, 500  # rows of a page
WAIT = 10  # seconds that a request for events may be held
# Requests that are held at once, of the Procfile's 32 threads.
POLLS = threading.BoundedSemaphore(8)


@routes.get("/api/people")
def list_people() -> Response:
    """Return people in the order in which they changed."""
    given = request.args.get
    status, since = given("status") or None, given("updated_since")
    if status and status not in kyc.STATUSES:
        raise BadQueryError(f"status must be one of {', '.join(sorted(kyc.STATUSES))}")
    if since and not kyc.read_time(since):
        raise BadQueryError("updated_since must be a time such as 2026-11-21T08:00:00Z")
    with queries.reading() as db:
        people, cursor = queries.list_people(
            db,
            read_number("limit", LIMIT, 1, MOST),
            status=status,
            held=read_flag("held"),
            template=given("template") or None,
            since=kyc.read_time(since) or "",
            after=given("after", ""),
        )
    return answer({"people": people, "next": cursor})


@routes.get("/api/people/<id:subject>")
def show_person(subject: str) -> Response:
    """Return where a person stands, and their inquiries; by reference, account or inquiry ID."""
    with queries.reading() as db:
        person = queries.find_person(db, subject)
        standing = person and queries.read_person(db, person)
    return answer(standing) if standing else answer_unknown()


@routes.get("/api/people/<id:subject>/events")
def show_timeline(subject: str) -> Response:
    """Return the events of a person, the oldest first."""
    limit, after = read_number("limit", LIMIT, 1, MOST), request.args.get("after", "")
    with queries.reading() as db:
        person = queries.find_person(db, subject)
        events, cursor = queries.read_timeline(db, person, limit, after) if person else ([], None)
    return answer({"events": events, "next": cursor}) if person else answer_unknown()


@routes.get("/api/events")
def list_events() -> Response:
    """Return the journal after a position, in order; wait for an event if there is none yet."""
    after, limit = read_number("after", 0, 0, 10**15), read_number("limit", LIMIT, 1, MOST)
    name, deadline = request.args.get("name"), time.monotonic() + read_number("wait", 0, 0, WAIT)
    while True:
        with queries.reading() as db:
            events, position = queries.list_events(db, after, limit, name)
        left = deadline - time.monotonic()
        if events or position - after == queries.SCANNED or left <= 0 or not poll(position, left):
            return answer({"events": events, "next": position})
        after = position


def poll(position: int, seconds: float) -> bool:
    """Wait for an event beyond a position; return False at once when too many wait already."""
    if not request.environ.get("wsgi.multithread") or not POLLS.acquire(blocking=False):
        return False
    try:
        queries.wait_for_events(position, seconds)
    finally:
        POLLS.release()
    return True


def read_number(name: str, default: int, low: int, high: int) -> int:
    """Return a parameter that is a whole number, cut to `high`; raise BadQueryError."""
    value = request.args.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,18}", value) or int(value) < low:
        raise BadQueryError(f"{name} must be a whole number, at least {low}")
    return min(int(value), high)


def read_flag(name: str) -> bool | None:
    """Return a parameter that is 1 or 0, true or false; None when it is not given."""
    value = request.args.get(name) or None
    if value not in (None, "1", "0", "true", "false"):
        raise BadQueryError(f"{name} must be true or false")
    return value and value in ("1", "true")


def answer(content: queries.Row) -> Response:
    """Return a JSON response with an ETag; 304 when the client has the same already."""
    response = kyc.answer(200, content)
    response.set_etag(hashlib.sha256(response.get_data()).hexdigest()[:32])
    response.headers["Cache-Control"] = "private, no-cache"
    return response.make_conditional(request)


def answer_unknown() -> Response:
    """Answer 404 for an ID that no event names."""
    return kyc.answer(404, {"error": "Not Found", "reason": "no event names this ID"})
