"""`flask restore`: bring back what another file of the journal holds."""

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

import app as kyc
import commands as cli

CHUNK = 100  # events that are compared, and brought in one turn: deliveries wait meanwhile
NOTED = 100_000  # people whose change is noted, so that memory has a bound
LAST = "SELECT COALESCE(max(rowid), 0) FROM events"
COPIES = """  -- all in which two copies of an event may differ
    SELECT event_id, body_sha256, body IS NULL, object_status, inquiry_id, account_id,
        reference_id, template_id
    FROM events WHERE {scope} ORDER BY rowid
"""
THERE = COPIES.replace("{scope}", "rowid > ? AND rowid <= ?")
HERE = COPIES.replace("{scope}", "event_id IN (:keys)")
READ = """
    SELECT event_id, name, created_at, received_at, object_type, object_id, object_status,
        inquiry_id, account_id, reference_id, template_id, source, signed_by, attempt,
        body_sha256, state, error, redacted_at, body
    FROM events WHERE event_id IN (:keys) ORDER BY rowid
"""
APPEND = """
    INSERT INTO events (event_id, name, created_at, received_at, object_type, object_id,
        object_status, inquiry_id, account_id, reference_id, template_id, source, signed_by,
        attempt, body_sha256, state, error, redacted_at, body)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""
REMOVE = """
    UPDATE events SET body = NULL, redacted_at = ?,
        error = substr(error, 1, instr(error || ':', ':') - 1)  -- the kind, not the message
    WHERE event_id = ? AND body IS NOT NULL
"""
NOTE_REMOVAL = """
    CREATE TEMP TRIGGER note_removal AFTER UPDATE OF body ON main.events
    WHEN OLD.body IS NOT NULL AND NEW.body IS NULL BEGIN SELECT note_removal(); END
"""
ORDERS = """  -- that no event brings along
    SELECT subject_id, redacted_before, ordered_at, ordered_by, command, reason
    FROM redactions WHERE command <> 'event' ORDER BY rowid
"""
ORDER = """
    INSERT INTO redactions (subject_id, redacted_before, ordered_at, ordered_by, command, reason)
    VALUES (?, ?, ?, ?, ?, ?)
"""


@dataclass
class Tally:
    """What was found in the old file, and what came of it here."""

    events: int = 0
    new: Counter[str] = field(default_factory=Counter)  # by name
    other_body: int = 0  # events that are here with another body
    redactions: int = 0  # orders that were brought
    bodies_removed: int = 0
    unprocessed: int = 0  # new events whose handlers failed there, or have not run
    handled: int = 0  # new events whose handlers ran there
    changes: dict[str, list[str]] = field(default_factory=dict)  # person -> standing before, after

    def note_removal(self) -> None:
        """Count a body that is removed here; called by a trigger."""
        self.bodies_removed += 1


@cli.command
@click.argument("path", metavar="OLD.db", type=click.Path(path_type=Path))
@cli.json_option
def restore(path: Path, as_json: bool) -> None:
    """Bring back what another file of the journal holds.

    OLD.db is a database that was put aside, with its -wal beside it, or a backup. It is only read.
    Events that are missing here are appended in its order, each as it is there, and so are its
    redactions: a body that was removed in either file is removed here. The service may run
    meanwhile. It can be ended at any time and run again.

    Example: flask restore /var/lib/kyc/aside-20261126T095612/kyc.db
    """
    if cli.on_postgres():
        raise click.ClickException("this is for SQLite: pg_restore brings back what pg_dump saved")
    tally = Tally()
    with contextlib.ExitStack() as stack:
        db = stack.enter_context(contextlib.closing(cli.open_database()))
        old = stack.enter_context(contextlib.closing(open_old(path)))
        if damaged := is_damaged(old):
            words = f"WARNING: {path} is damaged: events may be missing. Is its -wal its own?"
            click.secho(cli.printable(words), fg="yellow", err=True)
        db.create_function("note_removal", 0, tally.note_removal)
        db.execute(NOTE_REMOVAL)
        try:
            restore_events(path, old, db, tally)
            restore_redactions(path, old, db, tally)
        finally:
            report(path, tally, as_json)
        cli.empty_wal(db)
    if damaged:
        raise click.exceptions.Exit(1)


def is_damaged(old: sqlite3.Connection) -> bool:
    """Tell whether SQLite finds damage, as the WAL of another database beside a file causes it."""
    try:
        return old.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok"
    except sqlite3.DatabaseError:
        return True


@contextlib.contextmanager
def blame(path: Path) -> Iterator[None]:
    """Raise what goes wrong in the block as a ClickException that names the old file."""
    try:
        yield
    except (kyc.DatabaseError, sqlite3.Error) as error:
        words = f"{path}: {kyc.describe_error(error)}"
        raise click.ClickException(cli.printable(words)) from None


def open_old(path: Path) -> sqlite3.Connection:
    """Open the old file, only to read; raise ClickException when it cannot be used."""
    path = path.absolute()
    with blame(path):
        if path.exists() and path.samefile(cli.database_path()):
            raise kyc.DatabaseError("that is KYC_DATABASE itself")
        try:
            old = kyc.connect(path, readonly=True)
        except kyc.DatabaseError as error:
            if str(error).startswith("unable to open") and kyc.wal_paths(path)[0].exists():
                words = "its -wal can only be read in a folder that you may write: copy both there"
                raise kyc.DatabaseError(words) from None
            raise
        if old.execute("PRAGMA user_version").fetchone()[0] != kyc.SCHEMA_VERSION:
            raise kyc.DatabaseError("it is no journal of this release")
        old.execute(LAST)
    return old


def restore_events(
    path: Path, old: sqlite3.Connection, db: sqlite3.Connection, tally: Tally
) -> None:
    """Bring the events, in the order of the old file, a few in each transaction."""
    last = old.execute(LAST).fetchone()[0]
    with cli.progress(range(0, last, CHUNK), label="Restoring") as bar:
        for first in bar:
            with blame(path):
                there = {row[0]: tuple(row) for row in old.execute(THERE, (first, first + CHUNK))}
            here = {row[0]: tuple(row) for row in kyc.select(db, HERE, there)}
            different = [key for key, copy in there.items() if copy != here.get(key)]
            tally.events += len(there)
            tally.other_body += sum(there[key][1] != copy[1] for key, copy in here.items())
            with blame(path):
                rows = kyc.select(old, READ, different)
            if rows:
                append(db, rows, tally)
                if kyc.wal_paths(cli.database_path())[0].stat().st_size > kyc.MAX_WAL:
                    cli.empty_wal(db)


def append(db: sqlite3.Connection, rows: list[sqlite3.Row], tally: Tally) -> None:
    """Append events as they are in the old file, and project them.

    One that is here already gets the IDs that it lacked, and loses its body if it did there.
    """
    keys = [row["event_id"] for row in rows]
    with cli.writing(db):
        known = {row[0] for row in kyc.select(db, HERE, keys)}
        db.executemany(APPEND, rows)
        removed = [(row["redacted_at"], row["event_id"]) for row in rows if row["body"] is None]
        db.executemany(REMOVE, removed)
        events = [kyc.Event(*columns) for _, _, *columns in kyc.select(db, kyc.READ_EVENTS, keys)]
        bodies = {row["event_id"]: row["body"] for row in rows}
        mentions = [one for event in events for one in find_mentions(event, bodies)]
        db.executemany(kyc.INSERT_MENTION, mentions)
        changes = kyc.project(db, events)
    for row in (row for row in rows if row["event_id"] not in known):
        tally.new[row["name"]] += 1
        tally.unprocessed += row["state"] in ("failed", "pending")
        tally.handled += row["state"] == "processed" and row["name"] in kyc.HANDLERS
    for before, after in changes:
        person = (before or after)["reference_id"]
        both = [cli.standing(before), cli.standing(after)]
        if person in tally.changes or len(tally.changes) < NOTED:
            tally.changes.setdefault(person, both)[1] = both[1]


def find_mentions(event: kyc.Event, bodies: dict[str, str | bytes | None]) -> list[tuple[str, str]]:
    """Return what the body of an event names beyond its columns, as the journal keeps it."""
    body = bodies[event.event_id] or b""
    return kyc.read_mentions(kyc.Delivery(event, body.encode() if isinstance(body, str) else body))


def restore_redactions(
    path: Path, old: sqlite3.Connection, db: sqlite3.Connection, tally: Tally
) -> None:
    """Bring the orders of flask redact and flask prune; they remove bodies as they did there."""
    with blame(path):
        there = dict.fromkeys(map(tuple, old.execute(ORDERS)))
    here = set(map(tuple, db.execute(ORDERS)))
    missing = [order for order in there if order not in here]
    for first in range(0, len(missing), CHUNK):
        with cli.writing(db):
            db.executemany(ORDER, missing[first : first + CHUNK])
        tally.redactions += len(missing[first : first + CHUNK])


def report(path: Path, tally: Tally, as_json: bool) -> None:
    """Say what was brought, whose standing changed, and what is left to do."""
    if as_json:
        return click.echo(json.dumps(vars(tally)))
    new, known = tally.new.total(), tally.events - tally.new.total()
    other = f"{tally.other_body:,} of them with another body, which stays"
    click.echo(cli.printable(f"{cli.plural(tally.events, 'event')} in {path}"))
    click.echo(f"  {new:,} new{cli.format_counts(tally.new)}")
    click.echo(f"  {known:,} already there{f', {other}' if tally.other_body else ''}")
    redactions = cli.plural(tally.redactions, "redaction")
    click.echo(f"{redactions} new, {cli.plural(tally.bodies_removed, 'body', 'bodies')} removed")
    cli.show_changes(tally.changes)
    if len(tally.changes) == NOTED:
        click.echo("  and others, which are not counted")
    if tally.unprocessed:
        events = cli.plural(tally.unprocessed, "new event")
        click.echo(f"{events} failed or pending: flask replay runs the handlers")
    if tally.handled:
        events = cli.plural(tally.handled, "new event")
        words = "had handlers run there, and what they wrote is not here: flask replay --name"
        click.echo(f"{events} {words}")
