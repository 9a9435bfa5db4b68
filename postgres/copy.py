"""`flask copy`: move the journal of a file to PostgreSQL."""

import contextlib
import hashlib
import itertools
import sqlite3
from typing import Any

import click

import app as kyc
import commands as cli
from postgres import Connection, read_address

CHUNK = 500  # positions in one transaction
FIXED = ["event_id", "name", "created_at", "received_at", "object_type", "object_id"]
FIXED += ["source", "signed_by", "attempt", "body_sha256"]
FILLED = ["object_status", "inquiry_id", "account_id", "reference_id", "template_id"]
FILLED += ["state", "error", "redacted_at"]
COLUMNS = [*FIXED, *FILLED, "body"]
JOURNAL = ("events", "mentions", "redactions")
BETWEEN = "FROM events WHERE rowid > ? AND rowid <= ? ORDER BY rowid"
COPY = f"COPY events (rowid, {', '.join(COLUMNS)}) FROM STDIN"
MEND = f"UPDATE events SET {', '.join(f'{name} = ?' for name in FILLED)} WHERE event_id = ?"
REMOVE = "UPDATE events SET body = NULL WHERE event_id = ?"
COPYING = "SELECT set_config('kyc.copying', 'on', true)"  # no event orders its redaction again


@cli.command
@click.argument("url", metavar="DATABASE_URL")
def copy(url: str) -> None:
    """Copy the journal in KYC_DATABASE to PostgreSQL, and compare.

    It can be interrupted and run again, also to copy what has come since. Stop the service before
    the last run, and start it with DATABASE_URL afterwards. Example:

    flask copy postgresql://kyc@db.example.com/kyc
    """
    if cli.on_postgres():
        raise click.ClickException("this copies a file: pg_dump and pg_restore copy PostgreSQL")
    try:
        address = read_address(url)
    except kyc.ConfigError as error:
        raise click.BadParameter(str(error)) from None
    with (
        contextlib.closing(cli.open_database(readonly=True)) as source,
        contextlib.closing(prepare_target(address)) as target,
    ):
        source.execute("BEGIN")  # one view of the journal, whatever is written meanwhile
        last = source.execute("SELECT COALESCE(max(rowid), 0) FROM events").fetchone()[0]
        held = target.execute("SELECT COALESCE(max(rowid), 0) FROM events").fetchone()[0]
        if held > last:
            raise click.ClickException(f"there are {held:,} events already, and {last:,} here")
        with cli.progress(range(0, last, CHUNK), label="Copying") as bar:
            for first in bar:
                with kyc.transaction(target):
                    copy_events(source, target, first, min(first + CHUNK, last))
        with kyc.transaction(target):
            target.execute(COPYING)
            copy_redactions(source, target)
            rows = copy_tables(source, target)
        target.execute("ANALYZE")
    click.echo(f"{cli.plural(last, 'event')} compared: positions, hashes and columns are the same")
    click.echo(", ".join(f"{table}: {number:,}" for table, number in rows.items()))


def prepare_target(address: Any) -> Connection:
    """Return a connection to the database to copy to, which has the tables then."""
    config = kyc.read_config({"DATABASE_URL": address.url})
    config.database.prepare(config)
    return address.connect()


def copy_events(source: sqlite3.Connection, target: Connection, first: int, last: int) -> None:
    """Copy the events of some positions, or bring those that are there up to date; compare."""
    target.execute(COPYING)
    query = f"SELECT rowid, {', '.join(COLUMNS)} {BETWEEN}"
    events = list(map(as_stored, source.execute(query, (first, last))))
    there = read_copies(target, first, last)
    check_identity(events, there)
    for event in events[: len(there)]:
        if event[1:-1] != there[event[0]][0][1:]:
            key = event[1]
            target.execute(MEND, (*event[1 + len(FIXED) : -1], key))
        if event[-1] is None and there[event[0]][1]:
            target.execute(REMOVE, (event[1],))
    target.copy(COPY, events[len(there) :])
    mentions = "SELECT id, position FROM mentions WHERE position > ? AND position <= ?"
    if rows := list(map(tuple, source.execute(mentions, (first, last)))):
        target.executemany("INSERT INTO mentions VALUES (?, ?) ON CONFLICT DO NOTHING", rows)
    compare(events, read_copies(target, first, last))


def as_stored(row: sqlite3.Row) -> tuple[Any, ...]:
    """Return an event with its body as bytes; raise DatabaseError when that is damaged."""
    *columns, body = row
    body = body.encode() if isinstance(body, str) else body
    if body is not None and hashlib.sha256(body).hexdigest() != row["body_sha256"]:
        raise kyc.DatabaseError(f"position {row['rowid']}: the body has another hash: not copied")
    return (*columns, body)


def read_copies(target: Connection, first: int, last: int) -> dict[int, tuple[Any, bool]]:
    """Return what is at these positions: all columns but the body, and whether that is right.

    None: it was removed.
    """
    right = "encode(sha256(body), 'hex') = body_sha256"
    query = f"SELECT rowid, {', '.join(COLUMNS[:-1])}, {right} {BETWEEN}"
    return {row[0]: (row[:-1], row[-1]) for row in target.execute(query, (first, last))}


def check_identity(events: list[tuple[Any, ...]], there: dict[int, tuple[Any, bool]]) -> None:
    """Raise ClickException when other events than these are there already."""
    for event in events[: len(there)]:
        same = there.get(event[0])
        if same is None or same[0][1 : 1 + len(FIXED)] != event[1 : 1 + len(FIXED)]:
            raise click.ClickException(f"there is another event at position {event[0]:,}")


def compare(events: list[tuple[Any, ...]], there: dict[int, tuple[Any, bool]]) -> None:
    """Raise DatabaseError unless these events are there, at their positions, with their bodies."""
    for event in events:
        columns, right = there.get(event[0], ((), None))
        if columns != event[:-1] or right is not (True if event[-1] is not None else None):
            raise kyc.DatabaseError(f"the copy at position {event[0]:,} is another")


def copy_redactions(source: sqlite3.Connection, target: Connection) -> None:
    """Add the redactions that are not there yet."""
    (number,) = target.execute("SELECT count(*) FROM redactions").fetchone()
    query = "SELECT * FROM redactions ORDER BY rowid LIMIT -1 OFFSET ?"
    if rows := list(map(tuple, source.execute(query, (number,)))):
        target.executemany("INSERT INTO redactions VALUES (?, ?, ?, ?, ?, ?)", rows)


def copy_tables(source: sqlite3.Connection, target: Connection) -> dict[str, int]:
    """Replace rules and projections by those in the file; return how many rows each has."""
    present = "SELECT table_name FROM information_schema.tables WHERE table_type = 'BASE TABLE'"
    there = {row[0] for row in target.execute(f"{present} AND table_schema = current_schema()")}
    query = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    tables = [row[0] for row in source.execute(query)]
    if unknown := sorted({*tables} - there):
        click.echo(f"not copied, for they are of your own: {', '.join(unknown)}", err=True)
    tables = [table for table in tables if table in there and table not in JOURNAL]
    for table in reversed(tables):  # status_rules before the statuses that they name
        target.execute(f"DELETE FROM {table}")
    for table in tables:
        target.copy(f"COPY {table} FROM STDIN", source.execute(f"SELECT * FROM {table}"))
    wrong = [one for one in tables if differ(one, source, target)]
    if wrong:
        raise kyc.DatabaseError(f"the copies of these tables are others: {', '.join(wrong)}")
    return {table: count(target, table) for table in (*JOURNAL[1:], *tables)}


def differ(table: str, source: sqlite3.Connection, target: Connection) -> bool:
    """Tell whether a table has other rows in the two databases; both are read bit by bit."""
    width = len(source.execute(f"SELECT * FROM {table} LIMIT 0").description)
    query = f"SELECT * FROM {table} ORDER BY {', '.join(map(str, range(1, width + 1)))}"
    pairs = itertools.zip_longest(map(tuple, source.execute(query)), target.stream(query))
    return any(one != other for one, other in pairs)


def count(db: Connection, table: str) -> int:
    """Return how many rows a table has."""
    return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
