"""`flask forward`: POST each change of a person's standing to the team's app, in order.

While it is in use, triggers on kyc_status write each change into forward_queue, in the transaction
that makes it. So none is missed, whatever causes it: an event, a richer copy of one, a hold, a
rebuild by other rules. A change leaves the queue when the app has accepted it.
"""

import contextlib
import fcntl
import hashlib
import hmac
import http.client
import json
import os
import re
import signal
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import click

import app as kyc
import commands as cli
from commands.persona import StayHere

URL = r"https?://[A-Za-z0-9.:\[\]_-]+(/[!-~]*)?"
ANSWER_SECONDS = 10.0
LONGEST_PAUSE = 60.0  # seconds, between attempts
LOOK_SECONDS = 0.5  # between looks for new changes
NOTE_SECONDS = 1.0  # after which it is noted what was accepted
AT_ONCE = 100  # changes that are read, or people that are put in line, at once

PERSON = """reference_id, status, hold, inquiry_id, account_id, template_id, event_id, event_name,
        event_at, updated_at"""  # of kyc_status, which a later release may give more columns
# Made by the first start of this command: only who forwards has them.
SCHEMA = """
-- `flask forward`, once it was started: one row.
CREATE TABLE IF NOT EXISTS forwarding (
    one           INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    url           TEXT NOT NULL,     -- where to, without its query
    position      INTEGER NOT NULL,  -- of the change that was accepted last
    accepted_at   TEXT,
    attempts      INTEGER NOT NULL,  -- of the next one, in vain
    failing_since TEXT,
    error         TEXT,              -- why the last of them failed
    begun_with    TEXT               -- it begins with everybody, by key: up to which; NULL: all
) STRICT;

-- Changes of kyc_status that the team's app has not accepted yet. A change has the row as it
-- became; of a row that went only the key, and when it went.
CREATE TABLE IF NOT EXISTS forward_queue (
    position        INTEGER PRIMARY KEY AUTOINCREMENT,
    previous_status TEXT,
    previous_hold   TEXT,
    reference_id    TEXT NOT NULL,
    status          TEXT,
    hold            TEXT,
    inquiry_id      TEXT,
    account_id      TEXT,
    template_id     TEXT,
    event_id        TEXT,
    event_name      TEXT,
    event_at        TEXT,
    updated_at      TEXT NOT NULL
) STRICT;

CREATE TRIGGER IF NOT EXISTS kyc_status_forward_new AFTER INSERT ON kyc_status
WHEN EXISTS (SELECT 1 FROM forwarding)
BEGIN
    INSERT INTO forward_queue (previous_status, previous_hold, {person})
    SELECT NULL, NULL, {person} FROM kyc_status AS k WHERE k.reference_id = NEW.reference_id;
END;

CREATE TRIGGER IF NOT EXISTS kyc_status_forward_changed AFTER UPDATE ON kyc_status
WHEN EXISTS (SELECT 1 FROM forwarding)
BEGIN
    INSERT INTO forward_queue (previous_status, previous_hold, {person})
    SELECT OLD.status, OLD.hold, {person} FROM kyc_status AS k
    WHERE k.reference_id = NEW.reference_id;
END;

CREATE TRIGGER IF NOT EXISTS kyc_status_forward_gone AFTER DELETE ON kyc_status
WHEN EXISTS (SELECT 1 FROM forwarding)
BEGIN
    INSERT INTO forward_queue (previous_status, previous_hold, reference_id, updated_at)
    VALUES (OLD.status, OLD.hold, OLD.reference_id, strftime('%Y-%m-%dT%H:%M:%fZ', 'now'));
END;
""".replace("{person}", PERSON)
ENTER = """
    INSERT INTO forwarding VALUES (1, ?, 0, NULL, 0, NULL, NULL, '')
    ON CONFLICT (one) DO UPDATE SET url = excluded.url
"""
WAITING = "SELECT * FROM forward_queue ORDER BY position LIMIT ?"
ACCEPT = """
    UPDATE forwarding SET position = ?, accepted_at = ?, attempts = 0, failing_since = NULL,
        error = NULL
"""
REFUSE = """
    UPDATE forwarding SET attempts = attempts + 1, error = ?,
        failing_since = COALESCE(failing_since, ?)
"""
NEXT_PEOPLE = """
    SELECT max(reference_id) FROM (SELECT reference_id FROM kyc_status
        WHERE reference_id > (SELECT begun_with FROM forwarding) ORDER BY reference_id LIMIT ?) AS k
"""
BEGIN_WITH = """
    INSERT INTO forward_queue (previous_status, previous_hold, {person})
    SELECT NULL, NULL, {person} FROM kyc_status AS k
    WHERE k.reference_id > (SELECT begun_with FROM forwarding) AND k.reference_id <= ?
    ORDER BY k.reference_id
""".replace("{person}", PERSON)
STANDING = """
    SELECT f.url, f.position, f.accepted_at, f.attempts, f.failing_since, f.error,
        (SELECT count(*) FROM forward_queue) AS waiting,
        (SELECT updated_at FROM forward_queue ORDER BY position LIMIT 1) AS waiting_since,
        (SELECT count(*) FROM kyc_status WHERE reference_id > f.begun_with) AS not_begun
    FROM forwarding AS f
"""


RUNS_ALREADY = "flask forward runs already on this database"
NAME = "kyc forward"  # of a connection to PostgreSQL, held while it runs, on whichever machine
COUNT_NAMED = """
    SELECT count(*) FROM pg_stat_activity
    WHERE application_name = ? AND datname = current_database() AND usename = current_user
"""


@cli.command
@click.argument("url", required=False)
@click.option("--once", is_flag=True, help="End when nothing waits, or at the first refusal.")
@click.option("--status", "ask", is_flag=True, help="Say where it stands; end with 1 if it stalls.")
@click.option("--forget", is_flag=True, help="Give up what waits; the next start sends everybody.")
@cli.json_option
def forward(url: str | None, once: bool, ask: bool, forget: bool, as_json: bool) -> None:
    """POST each change of a person's standing to your app.

    A process of its own beside the service, only one. Its first start sends where everybody
    stands; then every change of kyc_status follows, in order. One that is not answered by 2xx is
    sent again, after 1, 2, 4 ... 60 seconds, and the others wait. After a crash the last one may
    come twice.

    The body is JSON. id: the same when a change comes twice. position: one more for each change.
    person: the row of kyc_status as it became; its status is null when it went, as when a better
    key became known. previous: status and hold before, null for a new row.

    The header Persona-Signature: t=<unix>,v1=<hex> holds the HMAC-SHA256 of "<t>.<body>" by
    KYC_FORWARD_SECRET, as Persona signs; by several secrets, separated by commas, while one is
    replaced. Examples:

    flask forward https://app.example.com/kyc

    flask forward --status
    """
    if bool(url) + ask + forget != 1:
        raise click.UsageError("give the URL, --status or --forget")
    if ask:
        show_status(as_json)
    elif forget:
        with only_one(), contextlib.closing(cli.open_database()) as db, cli.writing(db):
            db.execute("DELETE FROM forwarding")
            db.execute("DELETE FROM forward_queue")
    elif not re.fullmatch(URL, url):
        raise click.ClickException("the URL must begin with https:// or http://, and a host")
    else:
        secrets = read_secrets()
        kyc.start_logging()
        with only_one() as require_lock, told_to_stop() as stopping:
            follow(url, secrets, stopping, once, require_lock)


def read_secrets() -> tuple[bytes, ...]:
    """Return the secrets that sign; raise ClickException without quoting one."""
    theirs, own = "PERSONA_WEBHOOK_SECRET", "KYC_FORWARD_SECRET"
    try:
        secrets = kyc.read_secrets({theirs: os.environ.get(own, "")})  # of the same form
    except kyc.ConfigError as error:
        words = str(error).replace(theirs, own).partition(" as copied")[0]
        raise click.ClickException(words.replace("webhook secret", "secret")) from None
    if not secrets:
        raise click.ClickException(f"{own} is not set: nothing could be signed")
    return secrets


@contextlib.contextmanager
def only_one() -> Iterator[Callable[[], Any]]:
    """Hold the lock of this command for the block; yield what raises once the lock is lost."""
    if cli.on_postgres():
        with contextlib.closing(cli.database_path().connect(name=NAME)) as db:
            if db.execute(COUNT_NAMED, (NAME,)).fetchone()[0] > 1:
                raise click.ClickException(RUNS_ALREADY)
            yield lambda: db.execute("SELECT 1")
        return
    path = cli.database_path().with_name(cli.database_path().name + ".forward")
    file = kyc.open_lock(cli.database_path(), ".forward")
    try:
        kyc.wait_for_lock(file, seconds=1)
    except kyc.DatabaseError:
        os.close(file)
        raise click.ClickException(RUNS_ALREADY) from None

    def require_lock() -> None:
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file)):
            raise click.ClickException(f"{path.name} was moved away: start this again")

    try:
        yield require_lock
    finally:
        os.close(file)


@contextlib.contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set, so that the request under way can finish."""
    stopping, numbers = threading.Event(), (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stopping.set()) for number in numbers]
    try:
        yield stopping
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def follow(
    url: str,
    secrets: tuple[bytes, ...],
    stopping: threading.Event,
    once: bool,
    require_lock: Callable[[], Any],
) -> None:
    """Forward changes until told to stop.

    The database is opened for each look anew, for it may be replaced. What is wrong with it ends
    the command only at its start. Another process may start once the lock is lost, so that ends it,
    too: the unit starts it again.
    """
    last: dict[str, Any] = {}
    while not stopping.is_set():
        require_lock()
        try:
            with contextlib.closing(look(last)) as db:
                enter(db, url.partition("?")[0])
                seconds = send_waiting(db, url, secrets, stopping)
        except (kyc.DatabaseError, sqlite3.Error, OSError) as error:
            if once or not last:
                raise
            seconds = LOOK_SECONDS
            kyc.log.error(
                "forward outcome=unavailable reason=%s", kyc.quote(kyc.describe_error(error))
            )
        if once and seconds != 0:
            raise click.exceptions.Exit(1 if seconds else 0)
        stopping.wait(LOOK_SECONDS if seconds is None else seconds)


def look(last: dict[str, Any]) -> sqlite3.Connection:
    """Open the database, and note in `last` which file and WAL it has.

    Raise DatabaseError while the WAL of a replaced database lies beside the new one: SQLite would
    apply it there, and damage it. The service moves that WAL away. The noted WAL is held open, so
    that no other file gets its inode number.
    """
    path = cli.database_path()
    if cli.on_postgres():
        db = cli.open_database()
        last["database"] = path
        return db
    database, wal, _ = kyc.identify(path)
    if last and database != last["database"] and wal == last["wal"]:
        raise kyc.DatabaseError("the file was replaced, and the WAL of the old one is there")
    db = cli.open_database()
    file = os.open(kyc.wal_paths(path)[0], os.O_RDONLY)
    if last:
        os.close(last["file"])
    database, wal, _ = kyc.identify(path)
    last |= {"database": database, "wal": wal, "file": file}
    return db


def enter(db: sqlite3.Connection, url: str) -> None:
    """Have changes queued from now on, if they are not yet; note where they go."""
    if not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'forwarding'").fetchone():
        with cli.turn():
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
    known = db.execute("SELECT url FROM forwarding").fetchone()
    if known is None or known[0] != url:
        with cli.writing(db):
            db.execute(ENTER, (url,))


def send_waiting(
    db: sqlite3.Connection, url: str, secrets: tuple[bytes, ...], stopping: threading.Event
) -> float | None:
    """Send what waits, one after another; when nothing does, put the next people in line.

    Return after how many seconds to go on; None when there was nothing to do. Accepted changes are
    noted several at a time, but always before a second change of the same person is sent. If that
    fails, only the last change of each person is sent again.
    """
    rows, why, began = db.execute(WAITING, (AT_ONCE,)).fetchall(), "", time.monotonic()
    accepted: dict[str, int] = {}  # person -> position
    for row in rows:
        late = time.monotonic() > began + NOTE_SECONDS
        if late or stopping.is_set() or row["reference_id"] in accepted:
            break
        if why := send(row, url, secrets):
            break
        accepted[row["reference_id"]] = row["position"]
    attempts = conclude(db, list(accepted.values()), why) if rows else 0
    if why:
        return min(2.0 ** (attempts - 1), LONGEST_PAUSE)
    return 0 if rows or queue_people(db) else None


def send(row: sqlite3.Row, url: str, secrets: tuple[bytes, ...]) -> str:
    """Send a change; return why it was not accepted, or ''."""
    began = time.perf_counter()
    why = post(url, build_body(row), secrets)
    words = f"outcome=refused reason={kyc.quote(why)}" if why else "outcome=accepted"
    milliseconds = (time.perf_counter() - began) * 1000
    kyc.log.info("forward position=%d %s ms=%.1f", row["position"], words, milliseconds)
    return why


def build_body(row: sqlite3.Row) -> bytes:
    """Return a change as it is sent."""
    position, status, hold, *_ = row
    change = {
        "position": position,
        "person": {name: row[name] for name in row.keys()[3:]},
        "previous": {"status": status, "hold": hold} if status else None,
    }
    digest = hashlib.sha256(json.dumps(change).encode()).hexdigest()
    return json.dumps({"id": f"chg_{digest[:24]}", **change}).encode()


def post(url: str, body: bytes, secrets: tuple[bytes, ...]) -> str:
    """POST a change, signed; return why it was not accepted, or ''."""
    now = str(int(time.time()))
    message = now.encode() + b"." + body
    digests = [hmac.digest(secret, message, "sha256").hex() for secret in secrets]
    headers = {
        "Persona-Signature": " ".join(f"t={now},v1={digest}" for digest in digests),
        "Content-Type": "application/json",
        "User-Agent": f"kyc/{kyc.VERSION}",
    }
    try:
        request = urllib.request.Request(url, body, headers)
        with urllib.request.build_opener(StayHere).open(request, timeout=ANSWER_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"answered {error.code}"
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error
        return cli.printable(getattr(cause, "strerror", None) or cause or type(cause).__name__)


def conclude(db: sqlite3.Connection, accepted: list[int], why: str) -> int:
    """Note which changes were accepted, and why the next was not; return how often it was tried."""
    now = kyc.utc_now()
    with cli.writing(db):
        db.executemany("DELETE FROM forward_queue WHERE position = ?", [(n,) for n in accepted])
        if accepted:
            db.execute(ACCEPT, (accepted[-1], now))
        if why:
            db.execute(REFUSE, (why, now))
        return db.execute("SELECT attempts FROM forwarding").fetchone()[0]


def queue_people(db: sqlite3.Connection) -> bool:
    """Put the next people, with whom the first start begins, in line; tell if there were any."""
    if db.execute("SELECT begun_with FROM forwarding").fetchone()[0] is None:
        return False
    with cli.writing(db):
        last = db.execute(NEXT_PEOPLE, (AT_ONCE,)).fetchone()[0]
        db.execute(BEGIN_WITH, (last,))
        db.execute("UPDATE forwarding SET begun_with = ?", (last,))
    return last is not None


def show_status(as_json: bool) -> None:
    """Say how far it is, and whether it advances."""
    with contextlib.closing(cli.open_database(readonly=True)) as db:
        row = None
        if db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'forwarding'").fetchone():
            row = db.execute(STANDING).fetchone()
    if row is None:
        raise click.ClickException("flask forward was not started on this database")
    standing = {**dict(row), "running": is_running()}
    if as_json:
        click.echo(json.dumps(standing))
    else:
        describe(standing)
    if standing["attempts"] or not standing["running"]:
        raise click.exceptions.Exit(1)


def is_running() -> bool:
    """Tell whether another process forwards."""
    if cli.on_postgres():
        with contextlib.closing(cli.open_database(readonly=True)) as db:
            return db.execute(COUNT_NAMED, (NAME,)).fetchone()[0] > 0
    file = kyc.open_lock(cli.database_path(), ".forward")
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def describe(standing: dict[str, Any]) -> None:
    """Print where forwarding stands."""
    lines = [f"to {standing['url']}: {'runs' if standing['running'] else 'does NOT run'}"]
    if standing["accepted_at"]:
        accepted_at = cli.when(standing["accepted_at"])
        lines += [f"accepted to change {standing['position']:,}, {accepted_at}"]
    first = f", the first of {cli.when(standing['waiting_since'])}" if standing["waiting"] else ""
    lines += [f"waiting  {cli.plural(standing['waiting'], 'change')}{first}"]
    if standing["not_begun"]:
        lines += [f"and then {cli.plural(standing['not_begun'], 'person', 'people')} to begin with"]
    if standing["attempts"]:
        times, since = cli.plural(standing["attempts"], "time"), cli.when(standing["failing_since"])
        lines += [f"refused  {times} since {since}: {standing['error']}"]
    for line in lines:
        click.echo(cli.printable(line))
