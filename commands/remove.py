"""`flask redact` and `flask prune`: remove bodies, and their bytes from the files."""

import contextlib
import sqlite3
import time
from typing import Any

import click

import app as kyc
import commands as cli

ORDER = """
    INSERT INTO redactions (subject_id, redacted_before, ordered_at, ordered_by, command, reason)
    VALUES (:subject, :before, :now, :by, :command, :reason)
"""
NEWEST = """  -- event that names a subject, or is of a person
    SELECT COALESCE(max(at), '') FROM (
        SELECT created_at AS at FROM events
            WHERE inquiry_id = :id OR account_id = :id OR reference_id = :id OR event_id = :id
        UNION ALL SELECT created_at FROM events
            WHERE object_id = :id AND object_id IS NOT inquiry_id
        UNION ALL SELECT created_at FROM mentions JOIN events ON events.rowid = position
            WHERE id = :id
        UNION ALL SELECT event_at FROM kyc_timeline WHERE reference_id = :person) AS theirs
"""


@cli.command
@click.argument("subject", metavar="ID")
@cli.reason_option
@cli.by_option
@cli.yes_option
def redact(subject: str, yes: bool, **order: str | None) -> None:
    """Remove the bodies of a person, inquiry, account or event.

    ID is that of any of them, or of a case, report or other object. Status, metadata and hash
    stay. Events of ID that were created before now are stored without a body.

    Example: flask redact user-42 --reason "request 17"
    """
    with contextlib.closing(cli.open_database()) as db:
        people = cli.find_people(db, subject) or [subject]
        values = [{"id": subject, "person": person} for person in people]
        newest = max(db.execute(NEWEST, one).fetchone()[0] for one in values)
        if not newest:
            raise click.ClickException(cli.printable(f"{subject}: no event names this ID"))
        order |= {"subject": subject, "before": max(kyc.utc_now(), newest), "command": "redact"}
        bodies = cli.plural(obey(db, order, trial=True), "body", "bodies")
        cli.confirm(f"Remove {bodies} of {cli.printable(subject)}?", yes)
        report_removal(db, obey(db, order))


def obey(db: sqlite3.Connection, order: dict[str, Any], trial: bool = False) -> int:
    """Write down an order, which the tables obey; return how many bodies it removes."""
    with contextlib.suppress(cli.UndoError), cli.writing(db):
        before = db.total_changes
        db.execute(ORDER, order | {"now": kyc.utc_now()})
        removed = db.total_changes - before - 1
        if trial:
            raise cli.UndoError
    return removed


OWNS_EVENTS = "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = 'events'::regclass"
CHUNK = 1000  # positions that are pruned at a time
READER_SECONDS = 5  # that a reader of the WAL is waited for
PRUNE = """
    UPDATE events SET body = NULL, redacted_at = :now,
        error = substr(error, 1, instr(error || ':', ':') - 1)  -- the kind, not the message
    WHERE rowid > :first AND rowid <= :last AND body IS NOT NULL AND created_at < :before
"""
PRUNABLE = """
    SELECT count(*), count(*) FILTER (WHERE state IN ('failed', 'pending')), COALESCE(max(rowid), 0)
    FROM events WHERE body IS NOT NULL AND created_at < ?
"""


@cli.command
@click.option("--older-than", "before", type=cli.Moment(), required=True, help="An age or a time.")
@cli.reason_option
@cli.by_option
@cli.yes_option
def prune(before: str, yes: bool, **order: str | None) -> None:
    """Remove the bodies of all events created before a time.

    Status, metadata and hash stay.

    Example: flask prune --older-than 90d
    """
    with contextlib.closing(cli.open_database()) as db:
        bodies, failed, last = db.execute(PRUNABLE, (before,)).fetchone()
        note = f" {failed} of them failed and can no longer be replayed." if failed else ""
        bodies = cli.plural(bodies, "body", "bodies")
        cli.confirm(f"Remove {bodies} created before {before}?{note}", yes)
        obey(db, order | {"subject": None, "before": before, "command": "prune"})
        removed = 0
        with cli.progress(range(0, last, CHUNK), label="Removing") as bar:
            for first in bar:
                chunk = {"first": first, "last": first + CHUNK, "before": before}
                with cli.writing(db):
                    removed += db.execute(PRUNE, chunk | {"now": kyc.utc_now()}).rowcount
        report_removal(db, removed)


def report_removal(db: sqlite3.Connection, removed: int) -> None:
    """Say how many bodies were removed, when they are gone from the files, too."""
    if cli.on_postgres():
        if not db.execute(OWNS_EVENTS).fetchone()[0]:
            words = "removed, but only the tables' owner frees the space: run this again as it"
            raise kyc.DatabaseError(words)
        db.execute("VACUUM events")  # its own WAL and copies of it keep the bytes for a while
    else:
        deadline = time.monotonic() + READER_SECONDS
        while not cli.empty_wal(db):
            if time.monotonic() > deadline:
                words = "removed, but a reader keeps the bytes in the WAL: end it, run this again"
                raise kyc.DatabaseError(words)
            time.sleep(0.1)
    click.echo(f"{cli.plural(removed, 'body', 'bodies')} removed")
