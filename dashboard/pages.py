"""The team's pages: find a person, see who needs attention, and what came in.

Rendered here, without a script. Whatever an event names is escaped by Jinja2, and stands in
<bdi>, so that it cannot turn the text around it.
"""

import hashlib
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Blueprint, Response, redirect, render_template, request

import app as kyc
from dashboard import queries
from dashboard.api import read_flag, read_number
from dashboard.queries import BadQueryError, Row

routes = Blueprint("pages", __name__, template_folder="templates")

STYLE = Path(__file__).with_name("style.css").read_bytes()
STYLE_VERSION = hashlib.sha256(STYLE).hexdigest()[:8]
SHOWN = 50  # rows of a page
ATTENTION = 10  # of each kind
CARDS = ("completed", "pending", "created", "failed", "expired", "declined")
STANDINGS = {
    "approved": "Approved",
    "declined": "Declined",
    "needs_review": "In review: somebody must decide at Persona",
    "completed": "Completed: all steps done, not decided yet",
    "failed": "Failed: a check did not pass, not decided",
    "pending": "Pending: has begun, and not finished",
    "created": "Created: has not begun",
    "expired": "Expired: did not finish in time",
    None: "No status: no inquiry of theirs counts",
}
STATES = ("failed", "pending", "unrecognized")
PERSONA = "https://app.withpersona.com/dashboard/inquiries/"


@routes.get("/people", strict_slashes=False)
def show_people() -> Response | tuple[str, int] | str:
    """Show who needs attention and what changed last, or the people of a filter; or find one."""
    given = {name: value for name, value in request.args.items() if value.strip()}
    if "id" in given:
        return find(given["id"].strip().removeprefix(PERSONA))
    status, held, template = given.get("status"), read_flag("held"), given.get("template")
    if status and status not in kyc.STATUSES:
        raise BadQueryError("there is no such status")
    filters, first = {"status": status, "held": held, "template": template}, not given
    with queries.reading() as db:
        counts = queries.count_all(db)
        templates = queries.select(db, queries.TEMPLATES)
        attention = list_attention(db) if first else []
        people, cursor = queries.list_people(
            db,
            20 if first else SHOWN,
            after=given.get("after", ""),
            newest_first=True,
            **filters,
        )
        unfinished = count_unfinished(db)
    page = {"counts": counts, "unfinished": unfinished, "attention": attention, "people": people}
    page |= {"filters": filters, "templates": [row["template_id"] for row in templates]}
    page |= {"cards": CARDS, "cursor": cursor, "first": first}
    return render_template("people.html", **page)


def find(subject: str) -> Response | tuple[str, int]:
    """Redirect to the person who has an ID, or say that there is none."""
    with queries.reading() as db:
        person = queries.find_person(db, subject)
        standing = person and queries.select(db, queries.STANDING, id=person)[0]
    return redirect(person_url(standing), 303) if standing else show_unknown(subject)


def show_unknown(subject: str) -> tuple[str, int]:
    """Answer 404: no event names the ID."""
    return render_template("unknown.html", subject=subject), 404


def list_attention(db: queries.Connection) -> list[Row]:
    """Return who is held, the latest first; then who waits for a decision, the longest first.

    Each with `why` and `since`. Who has completed waits an hour before it is worth a look.
    """
    held, _ = queries.list_people(db, ATTENTION, held=True, newest_first=True)
    for row in held:
        hold = queries.read_hold(db, row)
        row |= {"why": name_hold(row["hold"]), "since": (hold or row)["event_at"]}
    waiting = {"needs_review": (0, "waits for a decision")}
    waiting |= {"completed": (1, "no decision for over an hour")}
    rows = held
    for status, (hours, why) in waiting.items():
        before = kyc.format_time(datetime.now(UTC) - timedelta(hours=hours))
        people, _ = queries.list_people(db, ATTENTION, status=status, held=False, before=before)
        rows += [{**row, "why": why, "since": row["event_at"]} for row in people]
    return rows


def count_unfinished(db: queries.Connection) -> int:
    """Return the number of events whose handlers failed, or have not run for a minute."""
    before = kyc.format_time(datetime.now(UTC) - timedelta(minutes=1))
    return db.execute(queries.UNFINISHED, {"before": before}).fetchone()[0]


@routes.get("/people/<id:subject>")
def show_person(subject: str) -> tuple[str, int] | str:
    """Show where a person stands, in words; their inquiries, and what happened."""
    with queries.reading() as db:
        person = queries.find_person(db, subject)
        if person is None:
            return show_unknown(subject)
        standing = queries.read_person(db, person)
        hold = queries.read_hold(db, standing) if standing["hold"] else None
        after = request.args.get("after", "")
        events, cursor = queries.read_timeline(db, person, SHOWN, after, newest_first=True)
    page = {"person": standing, "hold": hold, "events": events, "cursor": cursor, "after": after}
    return render_template("person.html", **page, ends=explain_end(hold, standing["status"]))


def explain_end(hold: Row | None, status: str | None) -> str:
    """Say what ends a hold."""
    if hold is None:
        return ""
    if hold["rule"] == "kyc.held":
        return "Only flask release ends it."
    if hold["lasting"] and " " not in hold["rule"]:  # of any object status
        return "It stands until its rule is taken out of handlers.py."
    if hold["lasting"]:
        return "It stands until a newer event of this name says otherwise."
    seen = "Nobody has decided since."
    if status in ("approved", "declined", "needs_review"):
        seen = "It came after the decision, so whoever decided has not seen it."
    return f"{seen} A dismissal in Persona or a new decision clears it."


@routes.get("/events", strict_slashes=False)
def show_events() -> str:
    """Show the newest events, or those by name or state."""
    name, state = (request.args.get(key, "").strip() or None for key in ("name", "state"))
    if state and state not in STATES:
        raise BadQueryError("there is no such state")
    before = read_number("before", 10**15, 1, 10**15)
    with queries.reading() as db:
        events, cursor = queries.list_newest(db, before, SHOWN, name, state)
    page = {"events": events, "cursor": cursor, "name": name, "state": state}
    return render_template("events.html", **page, states=STATES, first=before == 10**15)


@routes.get("/dashboard.css")
def show_style() -> Response:
    """Return the one stylesheet; its address changes when it does."""
    response = Response(STYLE, mimetype="text/css")
    response.headers["Cache-Control"] = "private, max-age=86400"
    return response


# For the templates


@routes.app_context_processor
def add_names() -> dict[str, Any]:
    """Return what all templates use."""
    return {"style_version": STYLE_VERSION, "standings": STANDINGS, "statuses": kyc.STATUSES}


@routes.app_template_global()
def person_url(row: Row) -> str:
    """Return the path of a person's page; by inquiry ID when a browser would change the path."""
    path = quote(row["reference_id"], safe="")
    odd = len(path) > 2000 or {".", ".."} & set(row["reference_id"].split("/"))
    return "/people/" + (row["inquiry_id"] if odd and row["inquiry_id"] else path)


@routes.app_template_global()
def persona_url(inquiry_id: str | None) -> str | None:
    """Return the address of an inquiry in Persona's dashboard, if it looks like one of theirs."""
    known = re.fullmatch(r"inq_[A-Za-z0-9]+", inquiry_id or "", re.ASCII)
    return PERSONA + inquiry_id if known else None


@routes.app_template_filter()
def plain(text: str) -> str:
    """Return an ID with what cannot be seen, or turns the text around it, as its code."""
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text)


@routes.app_template_filter()
def name_hold(hold: str) -> str:
    """Return a hold in the words of who reads it."""
    hold = re.sub(r"^kyc\.held: ", "by hand: ", hold)
    return re.sub(r"^report/([\w-]+)\.matched: ", r"match of a report (\1): ", hold)


@routes.app_template_filter()
def moment(time: str, seconds: bool = False) -> str:
    """Return a time of the tables as people write it, in UTC."""
    return (
        datetime.fromisoformat(time).strftime(f"%d %b %Y, %H:%M{':%S' * seconds} UTC").lstrip("0")
    )


@routes.app_template_filter()
def age(time: str) -> str:
    """Return how long ago a time is, in its largest unit."""
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, length = next((one for one in units if abs(seconds) >= one[1]), units[-1])
    number = abs(seconds) // length
    words = f"{number} {unit}{'s' * (number != 1)}"
    return f"in {words}" if seconds < 0 else f"{words} ago"
