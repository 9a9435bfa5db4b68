"""`flask status`, `events`, `handlers` and `version`: what can be seen, without changing it."""

import contextlib
import inspect
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import click

import app as kyc
import commands as cli
from commands.hold import find_holds

Row = dict[str, Any]

# flask status

STANDINGS = {  # of a status, for who does not know Persona's words
    "completed": "completed: all steps done, not decided yet",
    "needs_review": "needs_review: somebody must decide at Persona",
    "failed": "failed: a check did not pass, not decided",
    "created": "created: has not begun",
    "pending": "pending: has begun, and not finished",
    "expired": "expired: did not finish in time",
    None: "no status: no inquiry of theirs counts",
}
SHOWN = 30  # newest inquiries, and newest events, of a person
INQUIRIES = """
    SELECT inquiry_id, template_id, status, event_at, event_name, event_id, account_id,
        reference_id, standing, COALESCE(NOT EXISTS (SELECT 1 FROM kyc_templates)
            OR template_id IN (SELECT template_id FROM kyc_templates), false) AS counts
    FROM inquiries WHERE person = ?
    ORDER BY counts DESC, standing DESC, event_at DESC, rank DESC, event_id DESC
"""
STANDING = "SELECT * FROM kyc_status WHERE reference_id = ?"
TIMELINE = """
    SELECT t.*, e.object_id, e.object_status, e.source, e.error, e.redacted_at
    FROM kyc_timeline AS t JOIN events AS e ON e.rowid = t.position
    WHERE t.reference_id = ? ORDER BY t.event_at, t.event_id
"""


@cli.command
@click.argument("subject", metavar="ID")
@cli.json_option
def status(subject: str, as_json: bool) -> None:
    """Show where a person stands, and why.

    ID is your reference ID, an account or an inquiry.

    Example: flask status user-42
    """
    with contextlib.closing(cli.open_database(readonly=True)) as db:
        db.execute("BEGIN")  # one view of all the tables
        people = [read_person(db, person) for person in cli.find_people(db, subject)]
    if not people:
        raise click.ClickException(cli.printable(f"{subject}: no event names this ID"))
    for person in people:
        if as_json:
            click.echo(json.dumps(person))
        else:
            show_person(person)


def read_person(db: sqlite3.Connection, person: str) -> Row:
    """Return all that is known of where a person stands."""

    def read(query: str) -> list[Row]:
        return [dict(row) for row in db.execute(query, (person,))]

    nothing = {"reference_id": person, "status": None, "hold": None, "event_id": None}
    found, inquiries, timeline = read(STANDING) or [nothing], read(INQUIRIES), read(TIMELINE)
    holds = find_holds(db, person)
    decisive = {hold["event_id"]: "holds" for hold in holds if hold["stands"]}
    decisive[found[0]["event_id"]] = "decides"
    for inquiry in inquiries:
        inquiry["why"] = explain_inquiry(inquiry, inquiries[0])
    for event in timeline:
        event["note"] = decisive.get(event["event_id"]) or explain_event(event)
    templates = read("SELECT * FROM kyc_status_by_template WHERE reference_id = ?")
    parts = {"inquiries": inquiries, "templates": templates, "timeline": timeline}
    return {**found[0], "holds": holds, **parts}


def explain_inquiry(inquiry: Row, first: Row) -> str:
    """Say whether an inquiry counts, and why it decides or does not."""
    if not inquiry["counts"]:
        return "no, not in KYC_TEMPLATES" if inquiry["template_id"] else "no, template unknown"
    if inquiry is first:
        return "yes, it decides"
    if inquiry["standing"] < first["standing"]:
        return f"yes, {first['status']} prevails"
    return "yes, a newer one prevails"


TABLES = (  # part of what read_person returns, which of its rows, heads, keys
    (
        *("inquiries", slice(SHOWN), "INQUIRY|TEMPLATE|STATUS|SINCE (UTC)|AGE|COUNTS"),
        "inquiry_id template_id status time age why",
    ),
    ("templates", slice(SHOWN), "TEMPLATE|STATUS|INQUIRY", "template_id status inquiry_id"),
    (
        *("timeline", slice(-SHOWN, None), "TIME (UTC)|AGE|EVENT|NOTE|INQUIRY|EVENT ID"),
        "time age event_name note inquiry_id event_id",
    ),
)


def show_person(person: Row) -> None:
    """Print where a person stands, the reasons, and what happened."""
    words = STANDINGS.get(person["status"], person["status"])
    held = ", but HELD" if any(hold["stands"] for hold in person["holds"]) else ""
    click.secho(cli.printable(f"{person['reference_id']}: {words}{held}"), bold=True)
    for label, fact in list_facts(person):
        click.echo(f"  {label:<12}{cli.printable(fact)}")
    for part, some, heads, keys in TABLES:
        rows = [readable(row) for row in person[part][some]]
        if len(rows) > (part == "templates"):  # one tells no more than the inquiries do
            click.echo()
            cli.print_table(heads, [[row[key] for key in keys.split()] for row in rows])
    if len(person["timeline"]) > SHOWN or len(person["inquiries"]) > SHOWN:
        click.echo(f"The newest {SHOWN} are shown; all of them with --json")


def readable(row: Row) -> Row:
    """Return a row with its time in two columns, and a word for a template that is not known."""
    time, age = cli.format_minute(row["event_at"]), cli.format_age(row["event_at"])
    return {**row, "time": time, "age": age, "template_id": row.get("template_id") or "unknown"}


def list_facts(person: Row) -> Iterator[tuple[str, str]]:
    """Yield what a support person asks first, as label and words."""
    if person["status"]:
        yield "decided by", f"{person['event_name']} of {person['inquiry_id']}"
        yield "since", cli.when(person["event_at"])
    for hold in person["holds"]:
        words = f"{hold['hold']}, {cli.when(hold['event_at'])}"
        yield ("HELD", words) if hold["stands"] else ("was held", f"{words}; decided after it")
        if hold["stands"]:
            yield "  until", hold["until"]
    if accounts := {one["account_id"] for one in person["inquiries"]} - {None}:
        yield "account", ", ".join(sorted(accounts)[:5])


def explain_event(event: Row) -> str | None:
    """Say what is to be known of an event that does not decide."""
    if event["state"] != "processed":
        return event["state"]
    return event["object_status"] if event["source"] == "operator" else None


# flask events

SCOPES = {
    "all": "true",
    "person": "position IN (SELECT position FROM kyc_timeline WHERE reference_id = :person)",
    "object": """position IN (
        SELECT rowid FROM events WHERE object_id = :object AND object_id IS NOT inquiry_id
        UNION SELECT rowid FROM events WHERE inquiry_id = :object AND object_id = :object)""",
}
EVENTS = """
    SELECT * FROM journal WHERE {scope} AND position > :after AND position <= :end
        AND (:name IS NULL OR name GLOB :name) AND (:state IS NULL OR state = :state)
        AND (:source IS NULL OR source = :source) AND (:object IS NULL OR object_id = :object)
        AND (:since IS NULL OR received_at >= :since)
        AND (:until IS NULL OR received_at < :until)
    ORDER BY position {order} LIMIT :limit + 1
"""
HEADS = "POS|RECEIVED (UTC)|AGE|NAME|PERSON|EVENT ID"
USUAL = [10**5, "2026-11-21 08:46", "59m", "inquiry-session.started", "user-12345", "e" * 28]


@cli.command
@click.option("--name", help="Only events with this name; a glob such as 'inquiry.*'.")
@click.option("--state", type=click.Choice(["processed", "failed", "pending", "unrecognized"]))
@click.option("--source", type=click.Choice(["webhook", "api", "operator"]), help="Where from.")
@click.option("--person", help="Only events of this person: a reference, account or inquiry ID.")
@click.option("--object", help="Only events about this object.")
@click.option("--since", type=cli.Moment(), help="Received since; a time or an age.")
@click.option("--until", type=cli.Moment(), help="Received before.")
@click.option("--after", type=click.IntRange(0, 10**15), help="After this position, oldest first.")
@click.option("--limit", type=click.IntRange(1, 10**9), default=20, help="How many.  [default: 20]")
@click.option("--follow", is_flag=True, help="Go on printing what arrives, like tail -f.")
@cli.json_option
def events(follow: bool, as_json: bool, **wanted: Any) -> None:
    """List the newest events of the journal, in order of arrival.

    Example: flask events --name 'inquiry.*' --since 1h --json --follow

    After an outage: flask events --after 0 --since 2026-11-21T08 --limit 1
    """
    rows, more, position = list_events(wanted)
    usual = [USUAL] if follow else []
    table = None if as_json else cli.Table(HEADS, [*usual, *map(cells, rows)])
    show_events(rows, table)
    if more and table and not follow:
        rest = "older" if wanted["after"] is None else "newer"
        click.echo(f"{rest} events are left out: see --limit and --after", err=True)
    while follow:
        time.sleep(0 if more else 0.2)
        with contextlib.suppress(kyc.DatabaseError, sqlite3.Error):  # busy, or being replaced
            rows, more, position = list_events({**wanted, "after": position, "limit": 1000})
            show_events(rows, table)


def list_events(wanted: Row) -> tuple[list[sqlite3.Row], bool, int]:
    """Return journal rows in order, whether there are more, and the position to go on from."""
    after, limit = wanted["after"], wanted["limit"]
    with contextlib.closing(cli.open_database(readonly=True)) as db:  # anew: perhaps another file
        db.execute("BEGIN")  # one view of the journal for all queries
        end = db.execute("SELECT COALESCE(max(rowid), 0) FROM events").fetchone()[0]
        person = wanted["person"] and cli.find_person(db, wanted["person"])
        scope = "person" if person else "object" if wanted["object"] else "all"
        query = EVENTS.replace("{scope}", SCOPES[scope])
        query = query.replace("{order}", "DESC" if after is None else "ASC")
        values = {**wanted, "after": after or 0, "end": end, "person": person}
        found = db.execute(query, values).fetchall()
    rows, more = found[:limit], len(found) > limit
    if after is None:
        return rows[::-1], more, end
    return rows, more, rows[-1]["position"] if more else max(after, end)


def cells(row: sqlite3.Row) -> list[Any]:
    """Return what the table shows of an event."""
    received = cli.format_minute(row["received_at"]), cli.format_age(row["received_at"])
    return [row["position"], *received, row["name"], row["person"], row["event_id"]]


def show_events(rows: list[sqlite3.Row], table: cli.Table | None) -> None:
    """Print journal rows, and let a pipe have them at once."""
    for row in rows:
        if not table:
            click.echo(json.dumps(dict(row)))
            continue
        table.show(cells(row))
        if row["state"] != "processed":
            why = f"{row['state']} {row['event_id']}: {row['error'] or 'no error is known'}"
            click.secho(cli.printable(f"  {why}"), fg=cli.COLOURS[row["state"]])
    if sys.stdout:
        sys.stdout.flush()


# flask handlers, flask version


@cli.command
def handlers() -> None:
    """List the handlers, status rules and hold rules of handlers.py.

    Example: flask handlers
    """
    rows = [["handler", name, place(one)] for name, some in kyc.HANDLERS.items() for one in some]
    rows += [["status rule", f"{name} {of}", f"sets {to}"] for name, of, to in kyc.STATUS_RULES]
    rows += [["hold rule", f"{name} {of}", "holds the person"] for name, of in kyc.HOLD_RULES]
    if rows:
        cli.print_table("KIND|EVENT|WHAT", rows)
    else:
        there = (kyc.HERE / "handlers.py").exists()
        click.echo("handlers.py registers nothing" if there else "there is no handlers.py")
    for warning in cli.doubt_handlers():
        click.secho(f"WARNING: {warning}", fg="yellow", err=True)


def place(handler: kyc.Handler) -> str:
    """Return the name of a handler and where it stands."""
    code = getattr(inspect.unwrap(handler), "__code__", None)
    line = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno} " if code else ""
    return line + getattr(handler, "__name__", type(handler).__name__)


@cli.command
def version() -> None:
    """Print the release, and what it runs on.

    Example: flask version
    """
    flask, gunicorn = (metadata.version(name) for name in ("flask", "gunicorn"))
    python, sqlite = sys.version.split()[0], sqlite3.sqlite_version
    click.echo(
        f"kyc {kyc.VERSION} (python {python}, sqlite {sqlite}, flask {flask}, gunicorn {gunicorn})"
    )
