"""What the tests share: an app on a database of its own, a sender that signs, a real server.

A handlers.py of the team beside app.py is put aside: here an empty module stands for it, and
servers and commands run in a folder of links that has none.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import hmac
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest

os.environ["FLASK_RUN_FROM_CLI"] = "true"  # importing app starts no service
sys.modules["handlers"] = types.ModuleType("handlers")
import cluster as postgresql  # noqa: E402

import app as kyc  # noqa: E402
from commands.trigger import build_event  # noqa: E402

kyc.pin_to_core = lambda: None  # it would hold pytest, and every server it starts, on one core

ROOT = Path(kyc.__file__).parent
PAYLOADS = ROOT.parent / "shared" / "persona" / "payloads"
SECRET = "wbhsec_test_0123456789abcdef"
LONG = os.environ.get("LONG") == "1"  # the long variants: more rounds, more time


# Modules whose tests run on PostgreSQL, too; but not those about files or SQLite's own ways.
BOTH_ENGINES = {
    *("test_commands", "test_dashboard", "test_events", "test_handlers", "test_http"),
    *("test_redaction", "test_status", "test_forward"),
}
SQLITE_ONLY = set((Path(__file__).parent / "sqlite_only.txt").read_text().split())


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__ in BOTH_ENGINES:
        engines = ["sqlite", "postgres"]
        if metafunc.function.__name__ in SQLITE_ONLY:
            engines.pop()
        metafunc.parametrize("engine", engines, indirect=True)


@pytest.fixture(scope="session")
def cluster():
    """A PostgreSQL of our own."""
    if reason := postgresql.why_not():
        pytest.skip(reason)
    with contextlib.closing(postgresql.Cluster()) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def engine(request, monkeypatch):
    """The database under test; "postgres" has a schema stand for the file at each path."""
    name = getattr(request, "param", "sqlite")
    if name == "postgres":
        cluster = request.getfixturevalue("cluster")
        read, connect = kyc.read_database, kyc.connect

        def find(path):
            return read({"DATABASE_URL": cluster.database(str(path))})

        def read_instead(environ):
            return find(environ["KYC_DATABASE"]) if "KYC_DATABASE" in environ else read(environ)

        def connect_instead(path, **options):
            return connect(find(path) if isinstance(path, Path) else path, **options)

        def open_instead(path, *arguments, **options):
            known = str(path) in cluster.schemas
            return find(path).connect() if known else open_file(path, *arguments, **options)

        open_file = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", open_instead)
        monkeypatch.setattr(kyc, "read_database", read_instead)
        monkeypatch.setattr(kyc, "connect", connect_instead)
    return name


@pytest.fixture
def database(tmp_path):
    return tmp_path / "kyc.db"


@pytest.fixture
def environ(request, engine, database):
    """The configuration of the service under test."""
    if engine == "postgres":
        cluster = request.getfixturevalue("cluster")
        where = {"DATABASE_URL": cluster.database(str(database))}
    else:
        where = {"KYC_DATABASE": str(database)}
    return {"PERSONA_WEBHOOK_SECRET": SECRET, **where}


@pytest.fixture
def create(environ):
    """Create apps, with more variables than `environ` has; all are stopped when the test ends."""
    apps = []

    def create(**variables):
        variables = {**environ, **variables, "FLASK_RUN_FROM_CLI": "true"}
        kyc.prepare_database(kyc.read_config(variables))
        apps.append(kyc.create_app(variables))
        return apps[-1]

    yield create
    for app in apps:
        app.extensions["journal"].stop()


@pytest.fixture
def app(create):
    return create()


@pytest.fixture
def runner(app):
    """Run a command in this process; return click's result."""
    return lambda *arguments, **options: app.test_cli_runner().invoke(args=arguments, **options)


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def db(app, engine, database):
    """A reader of the app's database."""
    with contextlib.closing(connect(app, engine, database)) as db:
        db.row_factory = sqlite3.Row
        yield db


def connect(app, engine, database):
    """Open the database as somebody else does."""
    if engine == "postgres":
        return app.config["KYC"].database.connect()
    return sqlite3.connect(database, isolation_level=None)


@pytest.fixture
def send(client):
    """Post a signed body, or an event built with these arguments."""

    def send(event="inquiry.approved", secret=SECRET, path="/webhooks/persona", **ids):
        body = event if isinstance(event, bytes) else build(event, **ids)
        return client.post(path, data=body, headers=sign(body, secret))

    return send


@pytest.fixture
def handlers():
    """The registries of handlers and rules, put back afterwards."""
    registries = (kyc.HANDLERS, kyc.STATUS_RULES, kyc.HOLD_RULES)
    before = [registry.copy() for registry in registries]
    yield kyc.HANDLERS
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        (registry.update if isinstance(registry, dict) else registry.extend)(content)


@pytest.fixture
def log(caplog):
    """What the service logs; its logger passes nothing on to pytest's own handler."""
    kyc.log.addHandler(caplog.handler)
    yield caplog
    kyc.log.removeHandler(caplog.handler)


def build_library(source, folder):
    """Return a library to preload, built of a C file beside this one."""
    library = folder / Path(source).with_suffix(".so")
    options = ["-O2", "-Wall", "-Werror", "-fPIC", "-shared"]
    command = ["gcc", *options, "-o", library, Path(__file__).with_name(source), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library


def build(name="inquiry.approved", **ids):
    """Return the body of an event as `flask trigger` builds it."""
    return json.dumps(build_event(name, **ids)).encode()


def sign(body, secret=SECRET, timestamp=None):
    """Return the headers that authenticate `body`, as Persona's page on webhooks says."""
    timestamp = int(timestamp or time.time())
    digest = hmac.new(secret.encode(), b"%d." % timestamp + body, "sha256").hexdigest()
    return {"Persona-Signature": f"t={timestamp},v1={digest}"}


def unrecognized_id(body):
    """Return the event ID of an authentic body in which there is no event."""
    return "sha256:" + hashlib.sha256(body).hexdigest()


@pytest.fixture(scope="session")
def deployment(tmp_path_factory):
    """A copy of what is deployed, without anybody's handlers.py."""
    return deploy(tmp_path_factory.mktemp("deployment") / "kyc")


def deploy(folder, handlers=None):
    """Copy what is deployed to a new folder, with a handlers.py of its own; return the folder."""
    folder.mkdir()
    for name in ("app.py", "schema.sql"):
        shutil.copy(ROOT / name, folder)
    for name in ("commands", "dashboard", "postgres"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
    if handlers is not None:
        (folder / "handlers.py").write_text(handlers)
    return folder


LATER = kyc.SCHEMA_VERSION + 1
STEP = """
    DROP VIEW IF EXISTS kyc_status_by_the_rules;  -- PostgreSQL adds a column to it only at the end
    ALTER TABLE events ADD COLUMN region TEXT;
    ALTER TABLE kyc_status ADD COLUMN region TEXT;
    UPDATE events SET region = 'EU' WHERE template_id = 'itmpl_2';
"""


@pytest.fixture
def later(tmp_path):
    """Make a folder with a later release: new columns, a new rule, and a step that leads there."""

    def later(step=STEP):
        folder = deploy(tmp_path / "later")
        for name, old, new in (
            ("app.py", f"SCHEMA_VERSION = {kyc.SCHEMA_VERSION}\n", f"SCHEMA_VERSION = {LATER}\n"),
            ("app.py", "\nSTEPS: dict[int, str] = {", f"\nSTEPS = {{{LATER}: '''{step}''', "),
            ("app.py", '"reference_id status hold inq', '"reference_id status hold region inq'),
            ("schema.sql", f"user_version = {kyc.SCHEMA_VERSION};", f"user_version = {LATER};"),
            ("schema.sql", "    body          ANY", "    region TEXT,\n    body          ANY"),
            ("schema.sql", "    hold         TEXT, ", "    region TEXT,\n    hold         TEXT, "),
            (
                "schema.sql",
                "('inquiry.created', '', 'c",
                "('case.created', '', 'declined'),\n    ('inquiry.created', '', 'c",
            ),
            (
                "schema.sql",
                "p.person AS reference_id, i.status,\n",
                "p.person AS reference_id, i.status, (SELECT e.region FROM events AS e"
                " WHERE e.event_id = i.event_id) AS region,\n",
            ),
        ):
            text = (folder / name).read_text()
            assert text.count(old) == 1, old
            (folder / name).write_text(text.replace(old, new))
        return folder

    return later


def bare_environment():
    """Return what a new shell has."""
    names = ("PATH", "HOME", "LANG")
    return {name: os.environ[name] for name in names if name in os.environ}


class Server:
    """A real gunicorn on a free port, in a process group of its own."""

    def __init__(self, environ, log, *options, cwd, arguments=None, module="app:app"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(log)
        flags = [module, *procfile_flags()[1:], "--bind", f"127.0.0.1:{self.port}", *options]
        command = arguments or [sys.executable, "-m", "gunicorn", *flags]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env={**bare_environment(), "PORT": str(self.port), **environ},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_up(self, seconds=20):
        """Return when the server answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                if self.request("GET", "/")[0] == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def request(self, method, path, body=None, headers=None, timeout=10):
        """Send one request; return status and body of the answer."""
        request = urllib.request.Request(self.url + path, body, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def send(self, body, secret=SECRET, timeout=10):
        """Post a signed body; return status and body of the answer."""
        return self.request("POST", "/webhooks/persona", body, sign(body, secret), timeout)

    def kill(self, number=signal.SIGKILL):
        """Signal the whole group, master and workers, and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        self.process.wait(timeout=30)

    def stop(self):
        """Stop as a platform does: SIGTERM to the master."""
        self.process.terminate()
        return self.process.wait(timeout=40)


def procfile_flags():
    """Return the arguments that the Procfile gives gunicorn."""
    line = (ROOT / "Procfile").read_text().strip()
    command, _, arguments = line.removeprefix("web:").strip().partition(" ")
    assert (command, arguments.split()[0]) == ("gunicorn", "app:app")
    return arguments.split()


@pytest.fixture
def serve(environ, tmp_path, deployment):
    """Start gunicorn as the Procfile does; every server is gone when the test ends."""
    servers = []

    def serve(*options, wait=True, module="app:app", cwd=deployment, **variables):
        log = tmp_path / "gunicorn.log"
        server = Server({**environ, **variables}, log, *options, module=module, cwd=cwd)
        servers.append(server)
        return server.wait_until_up() if wait else server

    yield serve
    for server in servers:
        server.kill()


@pytest.fixture
def flask(environ, deployment):
    """Run a `flask` command as an operator does; return the finished process."""

    def flask(*arguments, input=None, check=True, cwd=deployment, **variables):
        process = subprocess.run(
            [sys.executable, "-m", "flask", *arguments],
            env={**bare_environment(), **environ, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            input=input,
        )
        if check:
            assert process.returncode == 0, process.stderr
        return process

    return flask


@pytest.fixture
def refusal(deployment):
    """Start a service that refuses to; return what it says."""

    def refusal(environ, *command, cwd=deployment):
        command = command or ("-m", "gunicorn", "app:app", "--bind", "127.0.0.1:0")
        process = subprocess.run(
            [sys.executable, *command],
            env={"PATH": "", "HOME": "/nonexistent", **environ},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert process.returncode != 0
        assert "Traceback" not in process.stderr
        return process.stderr

    return refusal


class Load:
    """Clients that post new events until the block ends, each event until it is accepted."""

    def __init__(self, port, clients=8, prefix="load", *, padding=0, timeout=10):
        self.port, self.prefix, self.timeout = port, prefix, timeout
        self.accepted = {}  # event ID -> the body that got a 200
        self.answers = collections.Counter()  # status, or kind of failure -> how often
        self.seconds = []  # of each answer
        self.headers = {}  # status -> the headers of one such answer
        self.stopping = threading.Event()
        self.template = build(
            event_id="evt_ID", inquiry_id="inq_ID", account_id="act_ID", reference_id="person-ID"
        ).replace(b'"note": null', b'"note": "%s"' % (b"x" * padding))
        self.threads = [threading.Thread(target=self.run, args=(n,)) for n in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def run(self, client):
        connection = self.connect()
        number = 0
        while not self.stopping.is_set():
            event_id = f"evt_{self.prefix}_{client}_{number}"
            body = self.template.replace(b"_ID", event_id[3:].encode()).replace(
                b"person-ID", b"person-" + event_id.encode()
            )
            if self.post(connection, event_id, body):
                number += 1
            else:
                self.stopping.wait(0.05)
        connection.close()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)

    def post(self, connection, event_id, body):
        """Deliver one event; return whether it was accepted."""
        headers = {**sign(body), "X-Request-Id": event_id}
        start = time.monotonic()
        try:
            connection.request("POST", "/webhooks/persona", body, headers)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self.answers[type(error).__name__] += 1
            return False
        self.seconds.append(time.monotonic() - start)
        self.answers[answer.status] += 1
        self.headers[answer.status] = dict(answer.headers)
        if answer.status == 200:
            self.accepted[event_id] = body
        return answer.status == 200


@contextlib.contextmanager
def locked_file(database):
    """Hold the lock file for the block."""
    with open(f"{database}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def send_together(send, database, bodies):
    """Post bodies that wait in line together, for one commit; return the answers in order."""
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        with locked_file(database):
            answers = [pool.submit(send, body) for body in bodies]
            time.sleep(0.1)  # until all are in line; one that is late goes with the next commit
        return [answer.result() for answer in answers]


def run_threads(target, count):
    """Run `target` in `count` threads at once; return when all have ended."""
    threads = [threading.Thread(target=target) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def ask(path, query, *values):
    """Run SQL by a connection of its own, as the sqlite3 shell does; return the rows."""
    with contextlib.closing(sqlite3.connect(path, timeout=20, isolation_level=None)) as db:
        return db.execute(query, values).fetchall()


def back_up(database, copy):
    """Make a consistent copy of a database."""
    with (
        contextlib.closing(sqlite3.connect(database)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def stored(path):
    """Return the IDs in a journal, after a look at its integrity."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        return [row[0] for row in db.execute("SELECT event_id FROM events ORDER BY rowid")]


@contextlib.contextmanager
def readers(database, number):
    """Let some connections read for the block, in one transaction of 50 ms after another."""
    stop = threading.Event()

    def read():
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
            while not stop.is_set():
                db.execute("BEGIN")
                db.execute("SELECT max(rowid) FROM events").fetchone()
                time.sleep(0.05)
                db.execute("COMMIT")

    threads = [threading.Thread(target=read) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def children(server):
    """Return the worker processes of a server."""
    pid = server.process.pid
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return {int(child) for child in file.read().split()}


def wait_until(condition, seconds=15):
    """Return when `condition()` is true; fail when it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def assert_kept(database, accepted):
    """Every accepted event is in the journal with its exact body, and is projected."""
    query = """
        SELECT e.event_id, CAST(e.body AS BLOB), k.status FROM events AS e
        LEFT JOIN kyc_status AS k ON k.event_id = e.event_id
    """
    with contextlib.closing(sqlite3.connect(database, timeout=20)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = {event_id: (body, status) for event_id, body, status in db.execute(query)}
    assert [key for key in accepted if key not in rows] == []
    assert [key for key, body in accepted.items() if rows[key] != (body, "approved")] == []
