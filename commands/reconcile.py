"""`flask reconcile`: compare where inquiries stand here and at Persona."""

import contextlib
import hashlib
import json
import re
import sqlite3
import sys
from collections.abc import Iterator
from typing import Any

import click

import app as kyc
import commands as cli
from commands.persona import PAGE, Persona

EVENTS = {  # of each status: the event that sets it, and the inquiry's time of it
    "created": ("inquiry.created", "created-at"),
    "pending": ("inquiry.started", "started-at"),
    "completed": ("inquiry.completed", "completed-at"),
    "failed": ("inquiry.failed", "failed-at"),
    "expired": ("inquiry.expired", "expired-at"),
    "needs_review": ("inquiry.marked-for-review", "marked-for-review-at"),
    "approved": ("inquiry.approved", "decisioned-at"),
    "declined": ("inquiry.declined", "decisioned-at"),
}
TIMES = sorted({attribute for _, attribute in EVENTS.values()} | {"updated-at"})
FIELDS = ["status", "reference-id", *TIMES]  # no personal data is fetched
LINKS = ("account", "inquiry-template", "template")
INQUIRIES = """
    SELECT inquiry_id, person, status, event_name, event_at,
        event_name IN (SELECT name FROM status_rules WHERE own = 1) AS by_own_rule
    FROM inquiries WHERE inquiry_id IN (:keys)
"""
RECENT = "SELECT inquiry_id FROM inquiries WHERE event_at >= ? ORDER BY event_at"

Items = dict[str, Any]  # Persona's inquiries by ID; None for one that it does not know


@cli.command
@click.option("--since", type=cli.Moment(), default="30d", help="Updated since.  [default: 30d]")
@click.option("--mend", is_flag=True, help="Append an event for each status that is missing here.")
@click.option("--dry-run", is_flag=True, help="With --mend: only say what it would append.")
@cli.json_option
def reconcile(since: str, mend: bool, dry_run: bool, as_json: bool) -> None:
    """Compare where inquiries stand here and at Persona.

    It compares those updated since, there or here. It ends with 1 when something differs and is not
    mended. --mend appends an event like Persona's, with Persona's time of the status, and runs
    its handlers; the real one, should it come, replaces it. Only statuses, times and IDs are
    fetched.

    PERSONA_API_KEY holds the key of the environment, or PERSONA_API_KEY_FILE names a file that
    does. Examples:

    flask reconcile --since 2d

    flask reconcile --mend
    """
    with contextlib.closing(cli.open_database()) as db:
        compared, differences = compare_all(db, Persona(), since)
        for one in differences:
            item = one.pop("item")
            if mend:
                one["event"] = mend_one(db, item, one["at_persona"], dry_run)
    if as_json:
        click.echo(json.dumps({"since": since, "compared": compared, "differences": differences}))
    else:
        show(compared, since, differences, "to mend" if dry_run else "mended")
    if any(dry_run or not one.get("event") for one in differences):
        raise click.exceptions.Exit(1)


def compare_all(db: sqlite3.Connection, api: Persona, since: str) -> tuple[int, list[Items]]:
    """Return how many inquiries were compared, and what differs.

    Persona's search may be a minute behind, so whatever differs is asked for once more.
    """
    seen: set[str] = set()
    doubtful: Items = {}
    for items in search(api, since):
        seen |= items.keys()
        doubtful |= {one["inquiry_id"]: one["item"] for one in compare(db, items)}
        if sys.stderr.isatty():
            click.echo(f"\r{len(seen):,} inquiries compared\033[K", err=True, nl=False)
    recent = [row[0] for row in db.execute(RECENT, (since,)) if row[0] not in seen]
    asked, differences = list(dict.fromkeys(recent) | doubtful), []
    for some in (asked[start : start + PAGE] for start in range(0, len(asked), PAGE)):
        items = {one: doubtful.get(one) for one in some} | fetch(api, some)
        differences += compare(db, items)
    if sys.stderr.isatty():
        click.echo(err=True)
    return len(seen.union(recent)), differences


def search(api: Persona, since: str | None) -> Iterator[Items]:
    """Yield the inquiries that were updated since, a page at a time.

    One that is updated meanwhile moves to the end of the list. If the next page was to begin
    after it, all between is missing: so the search begins there again, until nothing new comes.
    """
    seen: set[tuple[str, str | None]] = set()
    while since:
        known, ends = len(seen), []
        query = {"attribute": "updated_at", "operator": "gte", "value": since}
        sort = {"attribute": "updated_at", "direction": "asc"}
        fields = {"fields[inquiry]": ",".join(FIELDS)}
        for page in api.walk("/inquiries/search", fields, {"query": query, "sort": sort}):
            items = index(page)
            times = [(one, read_time(item, "updated-at")) for one, item in items.items()]
            seen.update(times)
            ends.append(times[-1][1] if times else None)
            yield items
        since = ends[-2] if len(ends) > 1 and len(seen) > known else None


def fetch(api: Persona, ids: list[str]) -> Items:
    """Return those of these inquiries that Persona knows."""
    asked = [one for one in ids if re.fullmatch(r"inq_\w+", one, re.ASCII)]
    query = {"fields[inquiry]": ",".join(FIELDS), "filter[inquiry-id]": ",".join(asked)}
    found = index(api.fetch("/inquiries", query, {"size": PAGE})["data"]) if asked else {}
    return {one: item for one, item in found.items() if one in asked}


def index(page: list[Any]) -> Items:
    """Return inquiries by their IDs."""
    return {one: item for item in page if (one := kyc.text(kyc.field(item, "id")))}


def compare(db: sqlite3.Connection, items: Items) -> list[dict[str, Any]]:
    """Return which of Persona's inquiries stand elsewhere here."""
    known = {row["inquiry_id"]: row for row in kyc.select(db, INQUIRIES, items)}
    differences = []
    for inquiry_id, item in items.items():
        row, status = known.get(inquiry_id), read_status(item) if item else None
        if row and (row["status"] == status or is_meant(row, status)):
            continue
        one = {"inquiry_id": inquiry_id, "person": None, "here": None, "here_since": None}
        if row:
            one |= {"person": row["person"], "here": row["status"], "here_since": row["event_at"]}
        attribute = EVENTS[status][1] if status in EVENTS else "updated-at"
        there_since = read_time(item, attribute) or read_time(item, "updated-at")
        one |= {"at_persona": status, "at_persona_since": there_since, "item": item}
        differences.append(one)
    return differences


def is_meant(row: sqlite3.Row, status: str | None) -> bool:
    """Tell whether the rules mean an inquiry to stand elsewhere here.

    By a rule of handlers.py; or a session began, but no step in it.
    """
    session = row["event_name"] == "inquiry-session.started" and status == "created"
    return session or bool(row["by_own_rule"] and status)


def read_status(item: Any) -> str:
    """Return the status of Persona's inquiry, spelt as it is here."""
    status = kyc.text(kyc.field(kyc.field(item, "attributes"), "status"))
    if not status:
        raise click.ClickException("Persona sends no status: does a blocklist of the key hide it?")
    return re.sub(r"[\s-]+", "_", status.strip().lower())


def read_time(item: Any, attribute: str) -> str | None:
    """Return a time of Persona's inquiry."""
    return kyc.read_time(kyc.field(kyc.field(item, "attributes"), attribute))


def mend_one(db: sqlite3.Connection, item: Any, status: str | None, dry_run: bool) -> str | None:
    """Append the event that brings an inquiry where Persona has it; return the event's name.

    None if there is none, or if by the rules it would change nothing. An inquiry that was resumed
    keeps the time of its start, so that of its last update is tried as well.
    """
    for attribute in (EVENTS[status][1], "updated-at") if status in EVENTS else ():
        if created_at := read_time(item, attribute):
            delivery = build_event(item, status, created_at)
            if append(db, delivery, status, dry_run):
                return delivery.event.name
    return None


def build_event(item: Any, status: str, created_at: str) -> kyc.Delivery:
    """Return an event like the one that Persona sent, or would have sent, for a status."""
    links = {kind: kyc.related(item, kind) for kind in LINKS}
    thing = {
        "type": "inquiry",
        "id": item["id"],
        "attributes": {name: kyc.field(kyc.field(item, "attributes"), name) for name in FIELDS},
        "relationships": {
            kind: {"data": one and {"type": kind, "id": one}} for kind, one in links.items()
        },
    }
    words = f"{item['id']} {status} {created_at}"
    event_id = "evt_mend_" + hashlib.sha256(words.encode()).hexdigest()[:24]
    attributes = {"name": EVENTS[status][0], "created-at": created_at, "payload": {"data": thing}}
    document = {"data": {"type": "event", "id": event_id, "attributes": attributes}}
    now, body = kyc.utc_now(), json.dumps(document).encode()
    return kyc.Delivery(kyc.read_event(body, now), body, now, source="operator")


def append(db: sqlite3.Connection, delivery: kyc.Delivery, status: str, dry_run: bool) -> bool:
    """Append an event if that gives its inquiry this status, and run its handlers."""
    rows = []
    try:
        with cli.writing(db):
            delivery.outcome = kyc.store(db, [delivery])[0]
            rows = kyc.select(db, INQUIRIES, [delivery.event.inquiry_id])
            if dry_run or rows[0]["status"] != status:
                raise cli.UndoError
    except cli.UndoError:
        return rows[0]["status"] == status
    with cli.turn():
        kyc.dispatch(db, [delivery] if delivery.outcome is None else [])
    return True


def show(compared: int, since: str, differences: list[dict[str, Any]], done: str) -> None:
    """Print what differs, and how many inquiries were compared."""
    events = [one["event"] for one in differences if "event" in one]
    rows = [
        [
            *(one["inquiry_id"], one["person"], one["here"] or "unknown"),
            *(one["at_persona"] or "unknown", cli.format_minute(one["at_persona_since"] or "")),
            *([one["event"] or "nothing mends it"] if events else []),
        ]
        for one in differences
    ]
    if rows:
        heads = "INQUIRY|PERSON|HERE|AT PERSONA|SINCE (UTC)"
        cli.print_table(heads + ("|MENDED BY" if events else ""), rows)
    words = cli.plural(compared, "inquiry", "inquiries")
    words += f" compared, since {cli.format_minute(since)} UTC: {len(rows):,} differ"
    click.echo(words + (f", {len(events) - events.count(None):,} {done}" if events else ""))
