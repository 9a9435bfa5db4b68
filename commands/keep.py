"""`flask backup` and `flask check`: keep the journal, and see that all is well with it."""

import contextlib
import json
import os
import pwd
import random
import re
import shutil
import signal
import sqlite3
import stat
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
from flask import current_app

import app as kyc
import commands as cli
from commands.names import doubt_name
from commands.trigger import request

# flask backup


@cli.command
@click.argument("path", type=click.Path(path_type=Path))
def backup(path: Path) -> None:
    """Copy the database while the service runs, and check the copy.

    PATH is a new file, or a folder: then the time is the name.

    Example: flask backup /var/backups/kyc
    """
    if cli.on_postgres():
        raise click.ClickException("this copies a file; of PostgreSQL's pg_dump makes a copy")
    if path.is_dir():
        path /= f"kyc-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.db"
    part = path.with_name(f"{path.name}.part")
    if os.path.lexists(path):
        raise click.ClickException(f"{path}: exists already; a backup never overwrites")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up then, too
    with contextlib.closing(cli.open_database(readonly=True)) as db:
        try:
            os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            try:
                copy_database(db, part)
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # or it was taken meanwhile
                part.rename(path)
            finally:
                part.unlink(missing_ok=True)
        except FileExistsError as error:
            words = f"there is {error.filename}, of another backup: if none runs, remove it"
            raise click.ClickException(f"{path}: {words}") from None
        except (sqlite3.Error, OSError) as error:
            raise click.ClickException(f"{path}: {kyc.describe_error(error)}") from None
    click.echo(f"{path}: {path.stat().st_size:,} bytes, checked")


def copy_database(db: sqlite3.Connection, path: Path) -> None:
    """Write a consistent copy to the empty file at `path`, check and sync it."""
    db.execute("BEGIN")  # one view of the database for all steps, however much is written
    db.execute("SELECT 1 FROM events").fetchone()  # BEGIN alone fixes no view
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as copy:
        with cli.progress(length=100, label="Copying") as bar:

            def show(_: int, remaining: int, total: int) -> None:
                bar.update(100 - 100 * remaining // max(total, 1) - bar.pos)

            db.backup(copy, pages=5000, progress=show, sleep=0)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, until the service opens it
        verdict = copy.execute("PRAGMA integrity_check").fetchone()[0]
        if verdict != "ok":
            raise kyc.DatabaseError(f"the copy is damaged: {verdict}")
    for name in (path, path.parent):
        file = os.open(name, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


# flask check: each function yields what it found as (level, subject, words)

Findings = Iterator[tuple[str, str, str]]
OK, NOTE, WRONG = "ok", "note", "WRONG"
RECENT = 20_000  # newest events that are looked at without --full
SECONDS = 5  # that each look at the database may take without --full


@cli.command
@click.option("--url", help="Of the running service.  [default: this machine, at PORT]")
@click.option("--full", is_flag=True, help="Look at all of the journal, however long it takes.")
@cli.json_option
def check(url: str | None, full: bool, as_json: bool) -> None:
    """Look at configuration, service, files and journal.

    It says what to do; the exit code is 1 when something is WRONG.

    Example: flask check
    """
    url = url or f"http://127.0.0.1:{os.environ.get('PORT', 3000)}"
    levels = set()
    for level, subject, words in look_everywhere(url, full):
        levels.add(level)
        if as_json:
            click.echo(json.dumps({"level": level, "subject": subject, "words": words}))
        else:
            width = max(cli.terminal_width() or sys.maxsize, 40) - 18
            lines = textwrap.wrap(cli.printable(words), width)
            click.secho(f"{level:<6}", fg=cli.COLOURS[level], nl=False)
            click.echo(f"{subject:<12}" + f"\n{'':18}".join(lines))
    if WRONG in levels:
        raise click.exceptions.Exit(1)


def look_everywhere(url: str, full: bool) -> Findings:
    """Yield all findings; those of the database until it cannot be read."""
    yield from check_configuration(current_app.config["KYC"])
    yield from check_service(url)
    if not cli.on_postgres():
        yield from check_files(cli.database_path())
    looks = (check_integrity, check_write, check_drift, check_events, check_people)
    looks += (check_templates, check_names, check_secrets)
    try:
        with contextlib.closing(cli.open_database(readonly=True)) as db:
            for look in looks:
                yield from limit_time(db, look, full)
    except (kyc.DatabaseError, sqlite3.Error, OSError) as error:
        words = kyc.describe_error(error)
        yield WRONG, "database", f"{words}; {advise(words)}"


def limit_time(db: sqlite3.Connection, look: Callable, full: bool) -> Findings:
    """Yield what `look` finds, within a limit of time unless all is to be seen."""
    last = db.execute("SELECT COALESCE(max(rowid), 0) FROM events").fetchone()[0]
    timer = threading.Timer(SECONDS, db.interrupt)
    if not full:
        timer.start()
    try:
        yield from look(db, 0 if full else max(0, last - RECENT))
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        yield NOTE, look.__name__.removeprefix("check_"), f"not done in {SECONDS} s; see --full"
    finally:
        timer.cancel()


ADVICE = {  # words of an error -> what to do
    "no such file|no journal": "start the service, bring the file back, or set KYC_DATABASE",
    "is gone": "bring the file back, or stop the service and start it again",
    "lock|in time": "see who holds it (fuser -v, of the file and its .lock), and end that",
    "full": "make room, or flask prune --older-than 90d",
    "unable to open|readonly|denied": "look at owner and mode of the file and its folder",
    "malformed|not a database": "restore a backup, or set KYC_DATABASE",
    "": "stop the service and start it again; if that does not help, look at the disk",
}


def advise(error: str) -> str:
    """Return what helps against an error of the database."""
    return next(advice for words, advice in ADVICE.items() if re.search(words, error))


def check_configuration(config: kyc.Config) -> Findings:
    """Look at the settings of this shell."""
    if not config.secrets:
        yield WRONG, "secret", "PERSONA_WEBHOOK_SECRET is not set; copy it from Persona's dashboard"
    elif kyc.DEVELOPMENT_SECRET.encode() in config.secrets:
        yield WRONG, "secret", "the development secret is accepted; set the webhook's own"
    safe = config.tolerance and config.scheme != "body"
    words = f"scheme {config.scheme}, tolerance {config.tolerance} s"
    advice = "" if safe else "; old deliveries can be replayed: set a tolerance and a scheme"
    yield OK if safe else WRONG, "signature", words + advice
    for warning in cli.doubt_handlers():
        yield NOTE, "handlers.py", warning
    if "DYNO" in os.environ and not cli.on_postgres():
        level = NOTE if os.environ.get("KYC_EPHEMERAL_DISK") == "accept" else WRONG
        yield level, "disk", "a dyno's disk is emptied at each restart, and the journal with it"


def check_service(url: str) -> Findings:
    """Ask the running service whether it can store events."""
    try:
        status, reply = request(f"{url}/healthz")
    except click.ClickException as error:
        yield NOTE, "service", f"{error.message} Say where with PORT or --url"
        return
    if status == 503:
        reason = re.sub(r'.*"reason": "(.*)".*', r"\1", reply)
        yield WRONG, "service", f"{url} refuses events: {reason}; {advise(reason)}"
    elif status == 200:
        yield OK, "service", f"{url} stores events"
    else:
        yield NOTE, "service", f"{url} is not this service: it answers {status} to /healthz"


def check_files(path: Path) -> Findings:
    """Look at owners, permissions and free space."""
    beside = [path.with_name(path.name + suffix) for suffix in (".lock", ".gate")]
    files = [one for one in (path, *kyc.wal_paths(path), *beside) if one.exists()]
    faults = [f"{one.name} {fault}" for one in files if (fault := find_fault(one, files))]
    for words in faults:
        yield WRONG, "permissions", words
    if files and not faults:
        yield OK, "permissions", f"{cli.plural(len(files), 'file')} of {owner(files[0])}, mode 0600"
    if path.parent.is_dir():
        free = shutil.disk_usage(path.parent).free / (1 << 30)
        advice = "" if free > 1 else "; make room, or flask prune --older-than 90d"
        yield WRONG if advice else OK, "disk", f"{free:.1f} GiB free{advice}"


def find_fault(file: Path, files: list[Path]) -> str | None:
    """Say what is wrong with a file's owner or mode; None when nothing is.

    All `files` should be of one owner: the folder's, if any of them is.
    """
    mode = stat.S_IMODE(file.stat().st_mode)
    owners = [owner(one) for one in files]
    right = owner(file.parent) if owner(file.parent) in owners else owners[0]
    if owner(file) != right:
        return f"belongs to {owner(file)}, the others to {right}; chown {right} {file.name}"
    if not os.access(file, os.R_OK | os.W_OK):
        this = user_name(os.geteuid())
        return f"belongs to {owner(file)}, and this is {this}; run this as the owner"
    return f"has mode {mode:04o}; chmod 600" if mode & 0o077 else None


def owner(file: Path) -> str:
    """Return the name of a file's owner."""
    return user_name(file.stat().st_uid)


def user_name(number: int) -> str:
    """Return the name of a user, told by number."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def check_integrity(db: sqlite3.Connection, after: int) -> Findings:
    """Look at the version of the tables, and have SQLite look for damage."""
    yield OK, "schema", f"version {db.execute('PRAGMA user_version').fetchone()[0]}"
    if cli.on_postgres():
        return  # to look for damage is for PostgreSQL's own tools
    verdict = db.execute("PRAGMA integrity_check").fetchone()[0]
    if verdict != "ok":
        raise kyc.DatabaseError(f"malformed: {verdict.splitlines()[-1]}")
    yield OK, "integrity", "no damage"


def check_write(db: sqlite3.Connection, after: int) -> Findings:
    """Try a commit that changes nothing."""
    with contextlib.closing(cli.open_database()) as writer, cli.writing(writer):
        writer.execute(kyc.PROBE)
    yield OK, "write", "a commit succeeds"


def check_drift(db: sqlite3.Connection, after: int) -> Findings:
    """Compare rows of the projections with what the rules make of the journal."""
    if not db.execute("SELECT projected FROM rules_in_force").fetchone()[0]:
        yield NOTE, "drift", "the rules have changed, and the service computes all rows anew"
        return
    compared, different = 0, set()
    for table, keys in pick_sample(db) if after else pick_all(db):
        columns = kyc.COLUMNS[table].split()
        query = DIFFERENCES.replace("{columns}", ", ".join(columns)).replace("{table}", table)
        rows = kyc.select(db, query.replace("{key}", columns[0]), keys)
        compared, different = compared + len(keys), different | {row[0] for row in rows}
    words = f"{len(different):,} of {compared:,} rows differ from the rules"
    some = f": {', '.join(sorted(different)[:3])}; flask rebuild mends them" if different else ""
    yield WRONG if different else OK, "drift", words + some


DIFFERENCES = """
    SELECT {key} FROM (
        SELECT {columns} FROM {table} WHERE {key} IN (:keys)
        UNION ALL SELECT {columns} FROM {table}_by_the_rules WHERE {key} IN (:keys)) AS compared
    GROUP BY {columns} HAVING count(*) = 1
"""
LINKS = "SELECT inquiry_id, account_id, object_id FROM events WHERE rowid IN (:keys)"
PEOPLE = "SELECT person FROM inquiries WHERE inquiry_id IN (:keys)"
TABLES = {  # as the core names their keys
    **{"objects": "holds", "inquiries": "inquiries"},
    **{"accounts": "accounts", "people": "kyc_status"},
}
Keys = Iterator[tuple[str, list[str]]]


def pick_sample(db: sqlite3.Connection) -> Keys:
    """Yield tables and keys in them: of the newest events, and of some others."""
    last = db.execute("SELECT max(rowid) FROM events").fetchone()[0]
    positions = [*range(last - 300, last + 1), *random.choices(range(1, last + 1), k=300)]
    rows = kyc.select(db, LINKS, positions)
    inquiries, accounts, objects = ({row[n] for row in rows} - {None} for n in range(3))
    people = {row[0] for row in kyc.select(db, PEOPLE, inquiries)}
    yield from zip(TABLES.values(), map(list, (objects, inquiries, accounts, people)), strict=True)


def pick_all(db: sqlite3.Connection) -> Keys:
    """Yield tables and all keys that they hold or should hold, some at a time."""
    for rows, query in kyc.NEXT_KEYS.items():
        last = ""
        while keys := [row[0] for row in db.execute(query, {"last": last})]:
            yield TABLES[rows], keys
            if rows == "inquiries":  # which are objects, too
                yield "holds", keys
            last = keys[-1]


NEWEST = "SELECT rowid, received_at FROM events ORDER BY rowid DESC LIMIT 1"
STATES = """
    SELECT state, body IS NOT NULL, count(*), min(received_at) FROM events
    WHERE state <> 'processed' GROUP BY 1, 2
"""


def check_events(db: sqlite3.Connection, after: int) -> Findings:
    """Look at how many events there are, for how long none came, and which failed."""
    total, newest = db.execute(NEWEST).fetchone() or (0, "")
    yield OK, "events", f"{total:,} in the journal"
    silent = newest < cli.ago(days=1)
    words = f"the newest event is {cli.format_age(newest)} old" if total else "no event has come"
    advice = "; is the webhook enabled at Persona, and its URL right?" if silent else ""
    yield NOTE if silent else OK, "silence", words + advice
    for state, kept, number, oldest in db.execute(STATES):
        words = f"{cli.plural(number, 'event')} {state}"
        if state == "unrecognized":
            yield NOTE, "events", f"{words}: signed with your secret, but no event can be read"
        elif not kept:
            words += ", their bodies removed, and with them what the handlers need"
            yield NOTE, "handlers", f"{words}; flask replay --dismiss"
        elif state == "failed" or oldest < cli.ago(minutes=1):
            advice = f"flask events --state {state}, mend handlers.py, then flask replay"
            yield WRONG, "handlers", f"{words}; {advice}"


STUCK = """
    SELECT count(*), group_concat(reference_id, ', ') FILTER (WHERE n <= 3) FROM (
        SELECT reference_id, row_number() OVER (ORDER BY event_at) AS n FROM kyc_status
        WHERE status = ? AND event_at < ?) AS waiting
"""


def check_people(db: sqlite3.Connection, after: int) -> Findings:
    """Look at who stands where, and who has waited for long."""
    counts = db.execute("SELECT status, people, held FROM status_counts").fetchall()
    words = [f"{people:,} {status}" for status, people, _ in counts]
    held = sum(row["held"] for row in counts)
    yield OK, "people", ", ".join([*words, f"{held:,} held"] if counts else ["none yet"])
    for status, time, limit in (
        ("completed", cli.ago(hours=1), "an hour"),
        ("needs_review", cli.ago(days=1), "a day"),
    ):
        number, some = db.execute(STUCK, (status, time)).fetchone()
        if number:
            words = f"{cli.plural(number, 'person', 'people')} {status} for over {limit}: {some}"
            yield NOTE, "waiting", words + (", ..." if number > 3 else "")


def check_templates(db: sqlite3.Connection, after: int) -> Findings:
    """Look at which inquiry templates were seen, and which count."""
    counting = {row[0] for row in db.execute("SELECT template_id FROM kyc_templates")}
    if counting != set(current_app.config["KYC"].templates):
        words = f"the service runs with {', '.join(sorted(counting)) or 'none'}"
        yield NOTE, "templates", f"KYC_TEMPLATES differs in this shell: {words}"
    seen = dict(map(tuple, db.execute("SELECT template_id, count(*) FROM inquiries GROUP BY 1")))
    unknown = seen.pop(None, 0)
    if counting and unknown:
        words = f"{cli.plural(unknown, 'inquiry', 'inquiries')} of unknown template: not counted"
        yield NOTE, "templates", words
    elif len(seen) > 1 and not counting:
        words = f"{len(seen)} are in use, and each of them decides where a person stands"
        yield NOTE, "templates", f"{words}; name in KYC_TEMPLATES those that should"
    else:
        yield OK, "templates", f"{len(seen)} seen, {len(counting) or 'all'} count"


NAMES = """
    SELECT name, count(*), max(received_at) FROM events
    WHERE rowid > ? AND (name GLOB 'inquiry.*' OR name GLOB 'account.consolidated*'
        OR name = 'workflow-run.errored') AND name NOT IN (SELECT name FROM status_rules)
    GROUP BY name
"""
SEE = {  # the kind of object -> what an event of it asks for
    "account": "two accounts became one, and no event says which; see Persona's dashboard",
    "workflow-run": "see Persona's dashboard",
    "inquiry": "no rule knows it; if it decides, write a status_rule",
}


def check_names(db: sqlite3.Connection, after: int) -> Findings:
    """Look for events that somebody should know of."""
    for name, number, newest in db.execute(NAMES, (after,)):
        kind = name.partition(".")[0]
        if kind != "inquiry" or doubt_name(name):
            times = f"{cli.plural(number, 'time')}, last {cli.format_age(newest)} ago"
            yield NOTE, "names", f"{name}, {times}: {SEE[kind]}"


def check_secrets(db: sqlite3.Connection, after: int) -> Findings:
    """Look at when each secret, told by its fingerprint, last signed an event."""
    query = "SELECT signed_by, max(received_at) FROM events WHERE rowid > ? GROUP BY signed_by"
    last = dict(map(tuple, db.execute(query, (after,))))
    for secret in map(kyc.fingerprint, current_app.config["KYC"].secrets):
        time = last.get(secret, "")
        words = f"last signed {cli.format_age(time)} ago" if time else "has signed no recent event"
        stale = time < cli.ago(days=30)
        advice = "; take it out if it was replaced" if stale and time else ""
        yield NOTE if stale else OK, "secret", f"{secret} {words}{advice}"
