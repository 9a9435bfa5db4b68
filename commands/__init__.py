"""The operator's commands: `flask status`, `flask check` and the others, a file for each group.

Here is what they share: what makes a function a command, the database and its turns, the ways to
find a person, and output that fits the terminal. The service runs without this folder.
"""

import contextlib
import errno
import functools
import getpass
import importlib
import os
import re
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
from flask import Flask, current_app
from flask.cli import run_command, with_appcontext

import app as kyc
from commands.names import doubt_name

MODULES = ("trigger", "status", "mend", "hold", "remove", "keep")
MODULES += ("restore", "backfill", "reconcile", "forward", "export")
COMMANDS: list[click.Command] = []


def register(app: Flask, environ: Mapping[str, str]) -> None:
    """Give `app` its commands; when it starts to serve, only warn of names in handlers.py."""
    if environ.get("FLASK_RUN_FROM_CLI") != "true":
        for warning in doubt_handlers():
            kyc.log.warning("WARNING: handlers.py: %s", warning)
        return
    context = click.get_current_context(silent=True)
    if context and context.info_name == "run":  # Flask's own, which would skip the checks at start
        click.echo("flask run serves nothing: use python app.py, or the Procfile's line", err=True)
        sys.exit(2)
    run_command.hidden = True
    for module in MODULES:
        importlib.import_module(f"commands.{module}")
    with contextlib.suppress(ModuleNotFoundError):  # psycopg is there only for PostgreSQL
        importlib.import_module("postgres.copy")
    for one in COMMANDS:
        app.cli.add_command(one)


def doubt_handlers() -> list[str]:
    """Return a warning for each name in handlers.py that Persona is not known to send."""
    rules = {rule[0] for rule in [*kyc.STATUS_RULES, *kyc.HOLD_RULES]}
    return list(filter(None, map(doubt_name, sorted(rules.union(kyc.HANDLERS)))))


# Commands and their options


def command(function: Callable) -> click.Command:
    """Make a function a `flask` command; an error becomes one line on stderr."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        if "NO_COLOR" in os.environ:
            click.get_current_context().color = False
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may be ASCII
        try:
            function(*args, **kwargs)
        except (kyc.DatabaseError, sqlite3.Error) as error:
            words = f"{name_database()}: {kyc.describe_error(error)}"
            raise click.ClickException(words) from None
        except UnicodeEncodeError:
            raise click.ClickException("an argument is not UTF-8") from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of the pipe has seen enough
                raise
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror}") from None

    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
    COMMANDS.append(click.command(context_settings=settings)(with_appcontext(run)))
    return COMMANDS[-1]


class Moment(click.ParamType):
    """A time, ISO 8601, or an age such as 90d, 12h, 30m; in the tables' form."""

    name = "TIME"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the time meant by `value`."""
        if age := re.fullmatch(r"([0-9]{1,6})([dhms])", value):
            unit = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}[age[2]]
            with contextlib.suppress(OverflowError):
                return ago(**{unit: int(age[1])})
        return kyc.read_time(value) or self.fail(f"{value!r} is neither a time nor an age like 90d")


def find_user() -> str:
    """Return the login name of whoever runs this."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user ID without a name
        return f"user {os.getuid()}"


by_option = click.option("--by", default=find_user, help="Who orders it.  [default: you]")
reason_option = click.option("--reason", help="Why; kept for those who ask later.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask; needed without a terminal.")
json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")


def confirm(question: str, yes: bool) -> None:
    """Ask before something that cannot be undone; refuse when nobody can be asked."""
    if yes:
        return
    if not (sys.stdin and sys.stdin.isatty()):
        raise click.ClickException(f"{question} Nobody can be asked here: give --yes")
    click.confirm(question, abort=True, err=True)


def progress(*args: Any, **kwargs: Any) -> Any:
    """Return a progress bar on stderr, which only a terminal sees."""
    return click.progressbar(*args, file=sys.stderr, hidden=not sys.stderr.isatty(), **kwargs)


# The database

TURN_SECONDS = 10  # that a command waits for its turn


def database_path() -> Any:
    """Return the path of the configured database, or its address on PostgreSQL."""
    return current_app.config["KYC"].database


def on_postgres() -> bool:
    """Return whether the database is on PostgreSQL."""
    return not isinstance(database_path(), Path)


def name_database() -> str:
    """Return the variable that names the database, and its value without a password."""
    return f"{'DATABASE_URL' if on_postgres() else 'KYC_DATABASE'} {database_path()}"


def open_database(*, readonly: bool = False) -> sqlite3.Connection:
    """Open the configured database for a command."""
    db = kyc.connect(database_path(), readonly=readonly)
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != kyc.SCHEMA_VERSION:
        what = "is of an earlier release" if version else "has no journal yet"
        raise kyc.DatabaseError(f"the database {what}: start the service once")
    return db


def turn() -> contextlib.AbstractContextManager[None]:
    """Wait for a turn to write, among the processes of the service."""
    return kyc.turn(database_path(), seconds=TURN_SECONDS)


class UndoError(Exception):
    """Undoes a transaction that only tried what it would change."""


@contextlib.contextmanager
def writing(db: sqlite3.Connection) -> Iterator[None]:
    """Run the block as one transaction, in turn with the service's own."""
    with turn(), kyc.transaction(db):
        yield


def empty_wal(db: sqlite3.Connection) -> bool:
    """Copy the WAL into the database and cut it; tell if no reader was in the way."""
    with turn():
        return kyc.checkpoint(db, "TRUNCATE")


NAMED = """  -- by events of an inquiry that has no status yet
    SELECT account_id, reference_id FROM events
    WHERE inquiry_id = :id AND COALESCE(object_type, '') NOT IN ('case', 'transaction')
        AND NOT EXISTS (SELECT 1 FROM inquiries WHERE inquiry_id = :id)
"""
IS_PERSON = """
    SELECT EXISTS (SELECT 1 FROM inquiries WHERE person = :id)
        OR EXISTS (SELECT 1 FROM kyc_timeline WHERE reference_id = :id)
"""


def find_people(db: sqlite3.Connection, subject: str) -> list[str]:
    """Return the people that a reference, account or inquiry ID belongs to; mostly one."""
    named = [(subject, subject), *db.execute(NAMED, {"id": subject})]
    people = {account_id for account_id, _ in named}
    for account_id, reference_id in named:
        keys = {"inquiry": subject, "account": account_id, "reference": reference_id}
        people |= {row[0] for row in db.execute(kyc.FIND_PEOPLE, keys)}
    people = [one for one in people if db.execute(IS_PERSON, {"id": one}).fetchone()[0]]
    return sorted(people)


def find_person(db: sqlite3.Connection, subject: str) -> str:
    """Return the one person that an ID belongs to; raise ClickException for none or several."""
    people = find_people(db, subject)
    if len(people) == 1:
        return people[0]
    words = f"is of several people: {', '.join(people[:5])}" if people else "no event names this ID"
    raise click.ClickException(printable(f"{subject}: {words}"))


# Output

COLOURS = {
    **dict.fromkeys(("approved", "ok"), "green"),
    **dict.fromkeys(("declined", "failed", "WRONG"), "red"),
    **dict.fromkeys(("needs_review", "pending", "unrecognized", "note"), "yellow"),
}
IDS = {"INQUIRY", "TEMPLATE", "PERSON", "EVENT ID"}  # columns that are cut first
NARROW = 8  # characters; no column is cut below
SHOWN = 20  # people whose change is printed


class Table:
    """Rows in aligned columns, cut to fit a terminal; a pipe gets all of each value."""

    def __init__(self, heads: str, rows: Iterable[Sequence[Any]]):
        """Measure `heads`, separated by "|", and `rows`; print the heads."""
        names, cells = heads.split("|"), [list(map(printable, row)) for row in rows]
        limit = terminal_width() or sys.maxsize
        columns = zip(names, *cells, strict=True)
        self.widths = [min(max(map(len, column)), limit) for column in columns]
        while sum(self.widths) + 2 * len(names) - 2 > limit:
            named = zip(names, self.widths, strict=True)
            rank = [(width > NARROW, name in IDS, width) for name, width in named]
            if not max(rank)[0]:
                break
            self.widths[rank.index(max(rank))] -= 1
        self.show(names, bold=True)

    def show(self, row: Iterable[Any], bold: bool = False) -> None:
        """Print a row: each status in its colour, and an ellipsis for what has no room."""
        line = ""
        for cell, width in zip(map(printable, row), self.widths, strict=True):
            short = cell[: width - 1] + "\u2026" if terminal_width() and len(cell) > width else cell
            colour = COLOURS.get(cell)
            space = " " * (width - len(short) + 2)
            line += (click.style(short, fg=colour) if colour else short) + space
        click.secho(line.rstrip(), bold=bold or None)


def print_table(heads: str, rows: list[list[Any]]) -> None:
    """Print rows under their heads."""
    table = Table(heads, rows)
    for row in rows:
        table.show(row)


def terminal_width() -> int | None:
    """Return how many columns there are; None for a pipe or file, unless COLUMNS says."""
    if "COLUMNS" in os.environ or (sys.stdout and sys.stdout.isatty()):
        return shutil.get_terminal_size().columns
    return None


def printable(value: Any) -> str:
    """Return `value` as text that cannot move a terminal's cursor."""
    words = "" if value is None else str(value)
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in words)


def plural(number: int, one: str, many: str = "") -> str:
    """Return a number and its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def format_counts(counts: Counter[str]) -> str:
    """Return how many there are of each name, the most first, to stand behind a total."""
    counted = [f"{number:,} {name}" for name, number in counts.most_common() if number]
    return printable(f": {', '.join(counted)}") if counted else ""


def standing(row: sqlite3.Row | None) -> str:
    """Say where a row of kyc_status puts a person."""
    return row["status"] + (", held" if row["hold"] else "") if row else "unknown"


def show_changes(changes: dict[str, list[str]]) -> None:
    """Print how many people stand elsewhere now, and some of them: before and after, by person."""
    changed = sorted(person for person, (old, new) in changes.items() if old != new)
    click.echo(f"{plural(len(changed), 'person', 'people')} changed")
    for person in changed[:SHOWN]:
        click.echo(printable(f"  {person}: {' -> '.join(changes[person])}"))
    if len(changed) > SHOWN:
        click.echo(f"  and {len(changed) - SHOWN:,} more")


def format_minute(time: str) -> str:
    """Return a time of the tables, which is UTC, to the minute."""
    return time[:16].replace("T", " ")


def format_age(time: str) -> str:
    """Return how long ago a time is, in its largest unit."""
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    unit, length = next((one for one in units if abs(seconds) >= one[1]), units[-1])
    return f"{'in ' * (seconds < 0)}{abs(seconds) // length}{unit}"


def when(time: str) -> str:
    """Return a time with its age."""
    age = format_age(time)
    return f"{format_minute(time)} UTC, {age}{'' if age.startswith('in ') else ' ago'}"


def ago(**age: int) -> str:
    """Return the time so long ago, as the tables hold it."""
    return kyc.format_time(datetime.now(UTC) - timedelta(**age))
