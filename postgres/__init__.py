"""The journal on PostgreSQL, for several machines: DATABASE_URL=postgresql://...

app.py and the commands keep their SQL and their functions; only `store` and `refresh` are
functions of the server, so that a batch takes one round trip. Here is what differs, in this order:

- the SQL, translated; schema.sql of the service too, so that the rules stand in one place
- a connection that takes this SQL, and answers and fails as sqlite3's does
- where the database is, and how it is made ready
- the journal: how it opens its connection, and what it tries again

One transaction writes at a time, on however many machines: each begins by locking the row of
journal_lock. There are no files to look after.
"""

import contextlib
import functools
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.string import StrDumperUnknown

import app as kyc

# --------------------------------------------------------------------------------------
# SQL
# --------------------------------------------------------------------------------------

BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED; SELECT 1 FROM journal_lock FOR UPDATE"
READ_VERSION = """
    SELECT CASE WHEN to_regclass('events') IS NULL THEN 0 ELSE COALESCE(substring(
        obj_description(to_regclass('events'), 'pg_class') FROM '^kyc ([0-9]+)$')::int, -1) END
"""
START_LOCK = "hashtext('kyc ' || current_schema())"
SAME = {  # statements of app.py -> what they are here
    kyc.PROBE: "SELECT 1 FROM journal_lock FOR UPDATE",  # written to the WAL, as any lock of a row
    "BEGIN": "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",  # one view of all tables
    "PRAGMA user_version": READ_VERSION,
}
DIFFERENT = re.compile(
    r"""(?P<literal>'[^']*') | (?P<comment>--[^\n]*)
    | (?P<several>(?<!NOT\ )\bIN\ \((?:\?(?:,\ )?)+\)) | \?(?P<number>[0-9]+) | (?P<one>\?)
    | (?<![\w:]):(?P<name>[a-z]\w*)
    | (?P<unlike>\bIS\ NOT\b)(?!\ (?:NULL|DISTINCT)\b) | (?P<like>\bIS\b)(?!\ (?:NULL|NOT)\b)
    | (?P<glob>(?P<left>[\w.]+)\ GLOB\ (?P<right>:\w+|'[^']*'))""",
    re.VERBOSE,
)


@functools.cache
def translate(sql: str) -> tuple[str, tuple[int, ...]]:
    """Return a statement of SQLite's as psycopg takes it, and how many keys each %s stands for.

    `IN (?, ?)` becomes one array, so that a query is planned once, for however many keys; 0 is
    for a value that stands alone.
    """
    widths: list[int] = []

    def change(found: re.Match) -> str:
        kind, words = found.lastgroup, found[0]
        if kind in ("one", "several"):
            widths.append(words.count("?") if kind == "several" else 0)
            return "%s" if kind == "one" else "= ANY(%s)"
        if found["glob"]:
            return f"glob({DIFFERENT.sub(change, found['right'])}, {found['left']})"
        if kind == "number":
            return f"%(n{found['number']})s"
        if kind == "name":  # of one that may be NULL the type must be told
            return f"%({found['name']})s" + "::TEXT" * found.string.startswith(
                " IS NULL", found.end()
            )
        words = {"comment": "", "unlike": "IS DISTINCT FROM", "like": "IS NOT DISTINCT FROM"}.get(
            kind, words
        )
        return words.replace("%", "%%")

    here = SAME.get(sql, "SELECT 0" if sql.startswith("PRAGMA ") else sql)
    return DIFFERENT.sub(change, here).strip(), tuple(widths)


def arrange(values: Any, widths: tuple[int, ...]) -> Any:
    """Return the values of a statement with those of each IN as one list.

    Those of a statement with ?1 and ?2 are named n1 and n2.
    """
    if values and not widths and not isinstance(values, Mapping):
        return {f"n{number}": value for number, value in enumerate(values, 1)}
    if not any(widths):
        return values
    rest = iter(values)
    return [[next(rest) for _ in range(width)] if width else next(rest) for width in widths]


TRIGGER = re.compile(
    r"CREATE OR REPLACE TRIGGER (\w+)\s+(\w[^;]*? ON \w+)\s+(?:WHEN (.*?)\s+)?BEGIN\b(.*?)\bEND;",
    re.DOTALL,
)
CHANGES = (  # of the words of ../schema.sql, in this order
    (r"CREATE (VIEW|TRIGGER) IF NOT EXISTS", r"CREATE OR REPLACE \1"),
    (r"(CREATE TABLE IF NOT EXISTS events \()", r"\1 rowid BIGINT NOT NULL UNIQUE,"),
    (r"\bTEXT\b", 'TEXT COLLATE "C"'),  # keys are compared as bytes, as SQLite does
    (r"\bINTEGER\b", "BIGINT"),
    (r"\bANY\b", "BYTEA"),
    (r"\bPRIMARY KEY AUTOINCREMENT\b", "PRIMARY KEY DEFAULT next_change()"),
    (r"\bLIKE\b", "ILIKE"),  # as SQLite's, which knows no case
    (r"\) STRICT(, WITHOUT ROWID)?;", ");"),
    (r"SELECT RAISE\(IGNORE\);", "RETURN NULL;"),
    (r"SELECT RAISE\(ABORT, (.*?)\);", r"RAISE EXCEPTION USING ERRCODE = '23000', MESSAGE = \1;"),
    (
        r"PRAGMA user_version = (\d+);",
        r"COMMENT ON TABLE events IS 'kyc \1'; UPDATE journal_lock SET version = \1;",
    ),
)


def translate_schema(sql: str) -> str:
    """Return schema.sql of the service as PostgreSQL takes it."""
    sql = translate(sql)[0].replace("%%", "%")
    for words, other in CHANGES:
        sql = re.sub(words, other, sql)
    return TRIGGER.sub(translate_trigger, sql)


def translate_trigger(found: re.Match) -> str:
    """Return the function and the trigger for one of SQLite's triggers."""
    name, when, condition, body = found.groups()
    return (
        f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF {condition or 'true'} THEN {body} END IF; RETURN COALESCE(NEW, OLD); END $$;"
        f" CREATE OR REPLACE TRIGGER {name} {when} FOR EACH ROW EXECUTE FUNCTION {name}();"
    )


# --------------------------------------------------------------------------------------
# Connection
# --------------------------------------------------------------------------------------

EVENT_COLUMNS = (
    *re.search(r"\((.*?), body\)", kyc.INSERT_EVENT, re.DOTALL)[1].replace(",", " ").split(),
    *("start", "size"),
)
STORE = "SELECT store(%s, %s::TEXT[], %s::JSON, %b, %s::JSON)"
REFRESH = """
    SELECT to_json(before), to_json(after)
    FROM refresh(%s::TEXT[], %s::TEXT[], %s::TEXT[], %s::TEXT[])
"""
CONFLICTS = ("40001", "40P01")  # serialization failure, deadlock: try again


class Row(tuple):
    """A row whose values are found by position and by name, as those of sqlite3.Row."""

    __slots__ = ()
    names: Mapping[str, int] = {}

    def __getitem__(self, key: Any) -> Any:
        return tuple.__getitem__(self, self.names[key] if isinstance(key, str) else key)

    def keys(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.names)


@functools.cache
def row_class(*names: str) -> type[Row]:
    """Return the class of the rows with these columns."""
    places = {name: names.index(name) for name in names}
    return type("Row", (Row,), {"__slots__": (), "names": places})


def make_rows(cursor: psycopg.Cursor) -> Callable[[Sequence[Any]], Row]:
    """Return what makes a row of values."""
    return row_class(*(column.name for column in cursor.description or ()))


class Text(StrDumperUnknown):
    """Writes text, in which PostgreSQL takes no NUL: an error message may have one."""

    def dump(self, value: str) -> Any:
        """Return the bytes of a value."""
        return super().dump(value.replace("\0", "\N{REPLACEMENT CHARACTER}"))


class Cursor(psycopg.Cursor):
    """A cursor that has no rows after a statement that returns none, instead of an error."""

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        return super().fetchone() if self.description else None

    def fetchall(self) -> list[Any]:
        """Return all rows that are left."""
        return super().fetchall() if self.description else []


class Session(psycopg.Connection):
    """A connection of psycopg that waits for each answer for a limited time."""

    seconds: float | None = None

    def wait(self, *arguments: Any, **options: Any) -> Any:
        """Wait for the server; raise OperationalError when it has hung for `seconds`."""
        options["timeout"] = options.get("timeout") or self.seconds
        return super().wait(*arguments, **options)


class ConflictError(kyc.DatabaseError):
    """A serialization failure or a deadlock: the same transaction may succeed when tried again."""


def as_sqlite_error(error: psycopg.Error) -> sqlite3.Error:
    """Return an error as sqlite3 would raise it; its text quotes no values.

    Of an OperationalError the code is SQLITE_ERROR only when the SQL is to blame.
    """
    kind, code = sqlite3.OperationalError, sqlite3.SQLITE_IOERR
    if isinstance(error, psycopg.IntegrityError):
        kind = sqlite3.IntegrityError
    elif isinstance(error, psycopg.DataError) or error.sqlstate == "54000":  # too long for an index
        kind = sqlite3.DataError
    elif isinstance(error, psycopg.ProgrammingError | psycopg.NotSupportedError):
        code = sqlite3.SQLITE_ERROR
    words = error.diag.message_primary or str(error)
    if isinstance(error, psycopg.errors.QueryCanceled):
        code, words = sqlite3.SQLITE_INTERRUPT, "the server did not answer in time"
    elif isinstance(error, psycopg.errors.LockNotAvailable):
        words = "database is locked"  # by a transaction that takes too long
    elif "_WaitTimeout" in type(error).__name__:
        words = "the server did not answer in time"
    same = kind(" ".join(words.split()))
    same.sqlite_errorcode = code
    return same


class Connection:
    """A connection to PostgreSQL that app.py, the commands and handlers use as one of sqlite3."""

    def __init__(self, session: Session):
        self.session = session
        self.protected = False  # a handler runs
        self.shielded = False  # there is a savepoint before its last statement
        self.conflict = False  # one met this transaction, perhaps in a handler that hid it
        self.row_factory = self.text_factory = None  # a handler may set them, to no effect

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self.session.pgconn.transaction_status != pq.TransactionStatus.IDLE

    @property
    def total_changes(self) -> int:
        """How many rows this transaction has changed so far."""
        columns = "COALESCE(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::BIGINT"
        return self.execute(f"SELECT {columns} FROM pg_stat_xact_user_tables").fetchone()[0]

    def execute(self, sql: str, values: Any = ()) -> psycopg.Cursor:
        """Run a statement; return what fetches its rows. Raises the errors of sqlite3."""
        if sql == "BEGIN IMMEDIATE":
            return self.begin()
        statement, widths = translate(sql)
        with self.answering(statement):
            return self.session.execute(statement, arrange(values, widths))

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> psycopg.Cursor:
        """Run a statement for each row of values; rowcount is that of all."""
        statement, rows = translate(sql)[0], list(rows)
        with self.answering(statement):
            cursor = self.session.cursor()
            cursor.executemany(statement, rows)
            return cursor

    def executescript(self, script: str) -> None:
        """Run statements that define tables and triggers."""
        with self.answering("CREATE"):
            self.session.execute(translate_schema(script).replace("BEGIN IMMEDIATE", "BEGIN"))

    def stream(self, query: str) -> Iterator[Row]:
        """Yield the rows of a query, without holding them all."""
        with self.answering("SELECT"):
            yield from self.session.cursor().stream(translate(query)[0])

    def copy(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a COPY FROM STDIN of these rows."""
        with self.answering("COPY"), self.session.cursor().copy(statement) as copy:
            for row in rows:
                copy.write_row(row)

    def begin(self) -> psycopg.Cursor:
        """Begin a transaction that writes, when the one before has ended."""
        self.conflict = False
        try:
            with self.answering("BEGIN"):
                return self.session.execute(BEGIN)
        except sqlite3.Error:
            if self.in_transaction and not self.session.closed:
                self.session.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def answering(self, statement: str) -> Iterator[None]:
        """Run the block, which runs this statement; raise its errors as those of sqlite3.

        Raises ConflictError when the transaction is to be tried again; a handler in which that
        happens gets an OperationalError first.
        """
        try:
            if self.protected:
                self.protect(statement)
            elif statement == "COMMIT" and self.has_failed():
                raise psycopg.OperationalError("the transaction has failed")  # it would roll back
            yield
            if statement == "ROLLBACK" and self.conflict:  # in a handler, which has hidden it
                raise ConflictError("another transaction was in conflict")
        except psycopg.Error as error:
            if self.shielded and not self.session.closed:
                self.session.execute("ROLLBACK TO statement")
            self.conflict = self.protected and (self.conflict or error.sqlstate in CONFLICTS)
            if error.sqlstate in CONFLICTS and not self.protected:
                raise ConflictError("another transaction was in conflict") from None
            raise as_sqlite_error(error) from None

    def has_failed(self) -> bool:
        """Tell whether the open transaction can only be rolled back."""
        return self.session.pgconn.transaction_status == pq.TransactionStatus.INERROR

    def store(self, deliveries: list[kyc.Delivery]) -> list[str | None]:
        """Do what app.store does, on the server; copies of an event in one batch come by turns."""
        events, start = [], 1
        for delivery in deliveries:
            *columns, _ = delivery.row()
            values = (*columns, start, len(delivery.body))
            events.append(dict(zip(EVENT_COLUMNS, values, strict=True)))
            start += len(delivery.body)
        ids = [event["event_id"] for event in events]
        if len(set(ids)) < len(ids):
            return [outcome for delivery in deliveries for outcome in self.store([delivery])]
        bodies = b"".join(delivery.body for delivery in deliveries)
        mentions = [one for delivery in deliveries for one in kyc.read_mentions(delivery)]
        with self.answering("SELECT"):
            values = (ids, json.dumps(events), bodies, json.dumps(mentions) if mentions else None)
            return self.session.execute(STORE, (kyc.SCHEMA_VERSION, *values)).fetchone()[0] or []

    def refresh(self, keys: list[Iterable[str]]) -> list[kyc.Change]:
        """Do what app.refresh does, on the server."""
        with self.answering("SELECT"):
            cursor = self.session.execute(REFRESH, [list(some) for some in keys])
            return [tuple(row) for row in cursor]

    def set_authorizer(self, authorizer: Any) -> None:
        """Protect the transaction while a handler runs, if there is an authorizer."""
        self.protected, self.shielded = authorizer is not None, False

    def protect(self, statement: str) -> None:
        """Refuse what ends a handler's transaction; let its other statements fail by themselves.

        After an error PostgreSQL takes nothing more in a transaction, but from a savepoint on it
        does. SQLite undoes only the statement that failed, and a handler may catch the error.
        """
        words = statement.lower().rstrip("; ").split() or [""]
        ends = words[0] in ("begin", "start", "commit", "end", "abort", "rollback", "prepare")
        inner = words[0] in ("savepoint", "release") or words[:2] == ["rollback", "to"]
        if ends and not inner:
            raise sqlite3.DatabaseError("not authorized")
        before = ["RELEASE statement"] if self.shielded else []
        before += [] if inner else ["SAVEPOINT statement"]
        if before:
            self.session.execute("; ".join(before))
        self.shielded = not inner

    def set_progress_handler(self, *_: Any) -> None:
        """Limit each statement to two seconds; PostgreSQL has no callback to ask."""
        self.execute("SET statement_timeout = '2s'")

    def interrupt(self) -> None:
        """Cancel the statement that another thread waits for."""
        with contextlib.suppress(psycopg.Error):
            self.session.cancel_safe(timeout=3.0)

    def close(self) -> None:
        """End the connection."""
        self.session.close()


# --------------------------------------------------------------------------------------
# Database
# --------------------------------------------------------------------------------------

USUAL = {  # unless the URL says otherwise; keepalives notice a machine that is gone
    **{"connect_timeout": 3, "keepalives_idle": 5, "keepalives_interval": 2},
    **{"keepalives_count": 3, "tcp_user_timeout": 4000},
}
SETTINGS = """
    SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
            WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false),
        set_config('statement_timeout', %s, false), set_config('lock_timeout', '3s', false),
        set_config('idle_in_transaction_session_timeout', '10s', false),
        set_config('default_transaction_read_only', %s, false),
        set_config('default_transaction_isolation', 'read committed', false),
        -- One plan for each statement, by the indexes: to plan costs more than to run, and a plan
        -- that was made for empty tables must do for full ones.
        set_config('plan_cache_mode', 'force_generic_plan', false),
        set_config('enable_seqscan', 'off', false), set_config('enable_hashjoin', 'off', false),
        set_config('enable_mergejoin', 'off', false), set_config('jit', 'off', false),
        current_setting('server_encoding')
"""
HANG_SECONDS = 3.5


@dataclass(frozen=True)
class Address:
    """Where the database is; printed without the password."""

    url: str = field(repr=False)

    def __str__(self) -> str:
        parts = conninfo_to_dict(self.url)
        return f"postgresql://{parts.get('host', '')}/{parts.get('dbname', '')}"

    def connect(
        self, *, readonly: bool = False, seconds: float | None = None, name: str = "kyc"
    ) -> Connection:
        """Open a connection, on which no statement takes more than `seconds`.

        Raises DatabaseError when the server cannot be reached, or the tables are of another
        version; UnusableError when no waiting helps.
        """
        own = conninfo_to_dict(self.url)
        usual = USUAL if readonly else {**USUAL, "target_session_attrs": "read-write"}
        options = {**usual, **own, "client_encoding": "utf8", "application_name": name}
        limit = f"{int((seconds or 0) * 900)}ms"  # the server should give up first
        try:
            session = Session.connect(
                **options, autocommit=True, row_factory=make_rows, cursor_factory=Cursor
            )
        except psycopg.Error as error:
            raise kyc.DatabaseError(str(as_sqlite_error(error))) from None
        db = Connection(session)
        try:
            session.prepared_max, session.seconds = 500, seconds
            session.adapters.register_dumper(str, Text)
            flag = "on" if readonly else "off"
            *_, encoding = session.execute(SETTINGS, (limit, flag)).fetchone()
            check_version(db.execute("PRAGMA user_version").fetchone()[0], encoding)
        except psycopg.Error as error:
            db.close()
            raise kyc.DatabaseError(str(as_sqlite_error(error))) from None
        except BaseException:
            db.close()
            raise
        return db

    def prepare(self, config: kyc.Config) -> bool:
        """Do what app.prepare_database does: make the tables, and apply new rules for a while."""
        try:
            with contextlib.closing(self.connect()) as db:
                prepare(db, config)
                with kyc.transaction(db):
                    db.execute(kyc.PROBE)
                return kyc.catch_up(db, self)
        except sqlite3.Error as error:
            raise kyc.DatabaseError(kyc.describe_error(error)) from None

    def journal(self, config: kyc.Config) -> "PostgresJournal":
        """Return the journal that writes there."""
        return PostgresJournal(config)


def read_address(url: str) -> Address:
    """Return the address in a URL; raise ConfigError when it is none."""
    with contextlib.suppress(psycopg.Error):
        if re.match("postgres(ql)?://", url) and conninfo_to_dict(url):
            return Address(url)
    raise kyc.ConfigError("DATABASE_URL must be postgresql://user:password@host:port/database")


def check_version(version: int, encoding: str) -> None:
    """Raise UnusableError when this service cannot use the tables that are there."""
    if encoding != "UTF8":
        raise kyc.UnusableError(f"the database is encoded in {encoding}, not UTF8")
    if version < 0:
        raise kyc.UnusableError("the table events belongs to another application")
    if version and not kyc.OLDEST_VERSION <= version <= kyc.SCHEMA_VERSION:
        age = "a newer release" if version > kyc.SCHEMA_VERSION else "a release before 1.0"
        raise kyc.UnusableError(f"the tables were made by {age} of this service")


def prepare(db: Connection, config: kyc.Config | None) -> None:
    """Make the tables or bring them up to date, and bring in the rules unless `config` is None."""
    if db.execute("PRAGMA user_version").fetchone()[0] < kyc.SCHEMA_VERSION:
        try:
            with one_starter(db.session), db.session.transaction():
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version < kyc.SCHEMA_VERSION:
                    migrate(db.session, version)
        except psycopg.errors.InsufficientPrivilege as error:
            raise kyc.UnusableError(str(as_sqlite_error(error))) from None
        except psycopg.Error as error:
            raise as_sqlite_error(error) from None
    if config:
        kyc.write_rules(db, config.templates)


@contextlib.contextmanager
def one_starter(session: Session) -> Iterator[None]:
    """Let one process make tables at a time; the next one's transaction sees what it made."""
    session.execute(f"SELECT pg_advisory_lock({START_LOCK})")
    try:
        yield
    finally:
        if not session.closed:
            session.execute(f"SELECT pg_advisory_unlock({START_LOCK})")


def migrate(session: Session, version: int) -> None:
    """Apply both schemas, after the steps from an earlier `version`; 0 when there are no tables.

    Views, functions and triggers are replaced in place, so that what was granted on them stays.
    """
    steps = [kyc.STEPS[number] for number in range(version + 1, kyc.SCHEMA_VERSION + 1) if version]
    schema = Path(__file__).with_name("schema.sql").read_text()
    before, after, each, functions = re.split(r"^-- [2-4]\. .*$", schema, flags=re.MULTILINE)
    updates = [update_function(each, table) for table in kyc.COLUMNS]
    tables = [translate_schema(sql) for sql in (*steps, kyc.SCHEMA.read_text())]
    session.execute("SELECT 1 FROM journal_lock FOR UPDATE" if version else "")
    session.execute("\n".join([before, *tables, after, *updates, functions]))


def update_function(template: str, table: str) -> str:
    """Return the SQL of update_<table>, from its template in schema.sql."""
    columns = kyc.COLUMNS[table].split()
    identity = columns[: 2 if table == "holds" else 1]
    words = {
        "table": table,
        "key": columns[0],
        "identity": ", ".join(identity),
        "same": " AND ".join(f"(p.t).{name} = (w.old).{name}" for name in identity),
        "old": ", ".join(f"old.{name}" for name in columns),
        "new": ", ".join(f"excluded.{name}" for name in columns),
        "values": ", ".join(columns),
        "columns": ", ".join(columns),
    }
    if table == "kyc_status":
        words["columns"] += ", updated_at"
        words["values"] += (
            """, to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')"""
        )
    words["excluded"] = ", ".join(f"excluded.{name}" for name in words["columns"].split(", "))
    return re.sub(r"\{(\w+)\}", lambda found: words[found[1]], template)


# --------------------------------------------------------------------------------------
# Journal
# --------------------------------------------------------------------------------------

TRIES = 4


class PostgresJournal(kyc.Journal):
    """The writer of one process, with one connection to PostgreSQL.

    It commits all that wait together, as the one on SQLite does, and opens a new connection
    after any failure. A commit that was sent when the connection broke may or may not be stored:
    its deliveries get 503, and their redelivery finds out.
    """

    lingers = False  # this process takes requests while the server commits others

    def open(self) -> Connection:
        """Return the connection; open it anew after a failure."""
        if self.db is None:
            db = self.path.connect(seconds=HANG_SECONDS)
            try:
                prepare(db, None if self.prepared else self.config)
                self.rebuilding = kyc.rebuild(db, only_if_due=True)
            except BaseException:
                db.close()
                raise
            self.db, self.prepared = db, self.path
        return self.db

    def commit(self, batch: list[kyc.Delivery]) -> None:
        """Store `batch`; try it again when another transaction was in conflict with it."""
        for left in reversed(range(TRIES)):
            try:
                return super().commit([one for one in batch if one.outcome is None])
            except ConflictError:
                if not left:
                    raise

    def write(self, db: Connection, deliveries: list[kyc.Delivery], probing: bool) -> list[Any]:
        """Store `deliveries` by one statement, its own transaction; without any it is a probe."""
        return db.store(deliveries)

    def close(self) -> None:
        """Drop the connection, whatever state it is in."""
        if self.db:
            with contextlib.suppress(psycopg.Error):
                self.db.close()
        self.db = self.rebuilding = None

    def look_after(self, resting: bool) -> None:
        """Go on with a rebuild, if one is due."""
        try:
            if self.db and self.rebuilding and next(self.rebuilding, None) is None:
                self.rebuilding = None
        except Exception as error:  # the thread survives; the next delivery opens anew
            kyc.log.error("the database cannot be looked after: %s", kyc.describe_error(error))
            self.close()
        if resting:
            self.busy_since = None
