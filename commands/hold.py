"""`flask hold` and `flask release`: a person must not be acted on, whatever their status says."""

import contextlib
import json
import re
import sqlite3
from datetime import datetime, timedelta
from typing import Any

import click

import app as kyc
import commands as cli
from commands.trigger import new_id

BY_HAND = "kyc.held"
HOLDS = """
    WITH own(inquiry_id, account_id) AS (
        SELECT inquiry_id, account_id FROM inquiries WHERE person = :person
        UNION SELECT NULL, a.account_id FROM events AS e JOIN accounts AS a
            ON a.account_id = e.account_id AND a.reference_id = e.reference_id
            WHERE e.reference_id = :person AND e.object_type = 'account'
        UNION SELECT :person, :person)
    SELECT h.*, r.name, r.object_status, r.cleared_by, h.lasting = 1 OR NOT EXISTS (
            SELECT 1 FROM kyc_status AS k JOIN inquiries AS i ON i.inquiry_id = k.inquiry_id
            WHERE k.reference_id = :person AND i.standing = 3 AND i.event_at >= h.event_at
        ) AS stands
    FROM holds AS h JOIN hold_rules AS r
        ON h.rule = r.name || iif(r.object_status = '', '', ' ') || r.object_status
    WHERE h.raised = 1 AND (h.reference_id = :person
        OR h.inquiry_id IN (SELECT inquiry_id FROM own)
        OR h.account_id IN (SELECT account_id FROM own))
    ORDER BY h.event_at DESC, h.event_id DESC
"""


def find_holds(db: sqlite3.Connection, person: str) -> list[dict[str, Any]]:
    """Return what was raised against a person and not cleared, the newest first.

    Each with `stands`, false when the decision is newer, and `until`, what clears it.
    """
    holds = [dict(row) for row in db.execute(HOLDS, {"person": person})]
    return [{**hold, "until": explain_end(hold)} for hold in holds]


def explain_end(hold: dict[str, Any]) -> str:
    """Say what clears a hold."""
    if hold["rule"] == BY_HAND:
        return f"flask release {hold['object_id']}"
    if not hold["lasting"]:
        cleared_by = hold["cleared_by"].replace("%", "*")
        return f"{cleared_by} of {hold['object_id']}, or a decision after it"
    if hold["object_status"]:
        return f"{hold['name']} of {hold['object_id']} with another status"
    return "its rule is taken out of handlers.py"


@cli.command
@click.argument("subject", metavar="ID")
@click.option("--reason", required=True, help="Why, for those who ask later.")
@cli.by_option
@cli.yes_option
def hold(subject: str, reason: str, by: str, yes: bool) -> None:
    """Hold a person, whatever their status is or becomes.

    ID is your reference ID, an account or an inquiry. Only flask release ends it.

    Example: flask hold user-42 --reason "chargeback 1041"
    """
    with contextlib.closing(cli.open_database()) as db:
        if not cli.find_people(db, subject):
            question = f"No event names {cli.printable(subject)} yet. Hold it all the same?"
            cli.confirm(question, yes)
            person = subject
        else:
            person = cli.find_person(db, subject)
        add_event(db, BY_HAND, person, person, f"{reason}, by {by}")
        show_standing(db, person)


@cli.command
@click.argument("subject", metavar="ID")
@click.option("--reason", required=True, help="Why, for those who ask later.")
@cli.by_option
def release(subject: str, reason: str, by: str) -> None:
    """Release a person from what flask hold raised.

    It says which other holds still stand, and what clears them.

    Example: flask release user-42 --reason "chargeback withdrawn"
    """
    with contextlib.closing(cli.open_database()) as db:
        person = cli.find_person(db, subject)
        held = [one["object_id"] for one in find_holds(db, person) if one["rule"] == BY_HAND]
        for object_id in held:
            add_event(db, "kyc.released", person, object_id, f"{reason}, by {by}")
        show_standing(db, person)
    if not held:
        raise click.ClickException(cli.printable(f"{person} is not held by flask hold"))


def show_standing(db: sqlite3.Connection, person: str) -> None:
    """Print where a person stands, and what holds them."""
    row = db.execute("SELECT status FROM kyc_status WHERE reference_id = ?", (person,)).fetchone()
    holds = [one for one in find_holds(db, person) if one["stands"]]
    words = f"{person}: {row[0] if row else 'no status yet'}, {'held' if holds else 'not held'}"
    click.echo(cli.printable(words))
    for one in holds:
        click.echo(cli.printable(f"  {one['hold']}; until {one['until']}"))


def add_event(db: sqlite3.Connection, name: str, person: str, object_id: str, words: str) -> None:
    """Append an event of the operator's to the journal, later than the one it overrides."""
    inquiry_id, account_id = find_links(db, person)
    links = {"inquiry": inquiry_id, "account": account_id}
    reference_id = None if person in links.values() else person
    thing = {
        "type": "person",
        "id": object_id,
        "attributes": {"status": words, "reference-id": reference_id},
        "relationships": {
            kind: {"data": {"type": kind, "id": i}} for kind, i in links.items() if i
        },
    }
    query = "SELECT event_at FROM holds WHERE object_id = ? AND rule = ?"
    last = db.execute(query, (object_id, BY_HAND)).fetchone()
    now = kyc.utc_now()
    created_at = max(now, add_millisecond(last[0])) if last else now
    attributes = {"name": name, "created-at": created_at, "payload": {"data": thing}}
    document = {"data": {"type": "event", "id": new_id("evt"), "attributes": attributes}}
    body = json.dumps(document).encode()
    delivery = kyc.Delivery(kyc.read_event(body, now), body, now, source="operator")
    with cli.turn():
        with kyc.transaction(db):
            (delivery.outcome,) = kyc.store(db, [delivery])
        if delivery.outcome is None:
            kyc.dispatch(db, [delivery])


def add_millisecond(time: str) -> str:
    """Return the next moment that the tables can hold."""
    return kyc.format_time(datetime.fromisoformat(time) + timedelta(milliseconds=1))


LINKS = (
    "SELECT inquiry_id, account_id FROM kyc_status WHERE reference_id = ?",
    "SELECT inquiry_id, account_id FROM inquiries WHERE person = ? ORDER BY event_at DESC LIMIT 1",
    """SELECT NULL, account_id FROM events
        WHERE reference_id = ? AND object_type = 'account' ORDER BY created_at DESC LIMIT 1""",
    "SELECT NULL, account_id FROM events WHERE account_id = ? LIMIT 1",
    "SELECT inquiry_id, NULL FROM events WHERE inquiry_id = ? LIMIT 1",
)


def find_links(db: sqlite3.Connection, person: str) -> tuple[str | None, str | None]:
    """Return an inquiry and an account of a person, by which they are known under any key."""
    for query in LINKS:
        if row := db.execute(query, (person,)).fetchone():
            return row[0], row[1]
    kind = re.match("inq_|act_|", person)[0]  # of an ID that no event has named
    return person if kind == "inq_" else None, person if kind == "act_" else None
