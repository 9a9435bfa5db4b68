"""`flask export`: people, events or redactions, for a spreadsheet or another program."""

import contextlib
import csv
import json
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import click

import commands as cli

QUERIES = {  # the next rows after a key, which is their first column; never a body
    "people": "SELECT * FROM kyc_status WHERE reference_id > ? ORDER BY reference_id LIMIT 1000",
    "events": """
        SELECT rowid AS position, event_id, name, created_at, received_at, object_type, object_id,
            object_status, inquiry_id, account_id, reference_id, template_id, source, signed_by,
            attempt, body_sha256, state, error, redacted_at
        FROM events WHERE rowid > ? ORDER BY rowid LIMIT 1000""",
    "redactions": """
        SELECT rowid AS position, subject_id, redacted_before, ordered_at, ordered_by, command,
            reason
        FROM redactions WHERE rowid > ? ORDER BY rowid LIMIT 1000""",
}
FORMULA = tuple("=+-@\t\r")  # what a cell begins with that a spreadsheet would run


@cli.command
@click.argument("kind", type=click.Choice(list(QUERIES)), metavar="people|events|redactions")
@click.option("--csv", "form", flag_value="csv", default=True, help="With a header.  [default]")
@click.option("--jsonl", "form", flag_value="jsonl", help="A JSON object on each line.")
@click.option("--output", type=click.Path(path_type=Path), help="A file, instead of stdout.")
def export(kind: str, form: str, output: Path | None) -> None:
    """Write out people, events or redactions.

    Events without their bodies. In CSV a text that a spreadsheet would take for a formula gets an
    apostrophe in front; --jsonl has every value as it is. Examples:

    flask export people --output people.csv

    flask export events --jsonl | gzip > events.jsonl.gz
    """
    write = write_csv if form == "csv" else write_jsonl
    with contextlib.closing(cli.open_database(readonly=True)) as db:
        if output:
            with replacing(output) as file:
                write(file, read_heads(db, kind), read_rows(db, kind))
        else:
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(encoding="utf-8")
            write(sys.stdout, read_heads(db, kind), read_rows(db, kind))


def read_heads(db: sqlite3.Connection, kind: str) -> list[str]:
    """Return the names of the columns."""
    return [column[0] for column in db.execute(QUERIES[kind], (None,)).description]


def read_rows(db: sqlite3.Connection, kind: str) -> Iterator[sqlite3.Row]:
    """Yield all rows, some at a time: a long read would keep the WAL from being emptied."""
    after: Any = "" if kind == "people" else 0
    while rows := db.execute(QUERIES[kind], (after,)).fetchall():
        yield from rows
        after = rows[-1][0]


def write_csv(file: TextIO, heads: list[str], rows: Iterable[sqlite3.Row]) -> None:
    """Write CSV that no spreadsheet runs."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heads)
    for row in rows:
        writer.writerow([f"'{one}" if str(one).startswith(FORMULA) else one for one in row])


def write_jsonl(file: TextIO, heads: list[str], rows: Iterable[sqlite3.Row]) -> None:
    """Write a JSON object on each line."""
    for row in rows:
        file.write(json.dumps(dict(zip(heads, row, strict=True))) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a file that only its owner reads, and that is there under its name when it is whole."""
    part = path.with_name(path.name + ".part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(part, flags, 0o600)
        os.fchmod(descriptor, 0o600)  # one that was left over keeps its mode
        with open(descriptor, "w", newline="", encoding="utf-8") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise click.ClickException(cli.printable(f"{path}: {error.strerror}")) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
