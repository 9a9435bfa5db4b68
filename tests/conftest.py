"""What the tests share: an app on a database of its own, a sender that signs, a real server."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

os.environ["FLASK_RUN_FROM_CLI"] = "true"  # importing app starts no service
import app as kyc

kyc.take_core = lambda: None  # it would hold pytest, and every server it starts, on one core

ROOT = Path(kyc.__file__).parent
PAYLOADS = ROOT.parent / "shared" / "persona" / "payloads"
SECRET = "wbhsec_test"


@pytest.fixture
def database(tmp_path):
    return tmp_path / "kyc.db"


@pytest.fixture
def environ(database):
    """The configuration of the service under test."""
    return {"PERSONA_WEBHOOK_SECRET": SECRET, "KYC_DATABASE": str(database)}


@pytest.fixture
def app(environ):
    app = kyc.create_app(environ)
    yield app
    app.extensions["journal"].stop()


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def db(app, database):
    """A reader of the app's database."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        yield db


@pytest.fixture
def send(client):
    """Post a signed body, or an event built with these arguments."""

    def send(event="inquiry.approved", secret=SECRET, path="/webhooks/persona", **ids):
        body = event if isinstance(event, bytes) else build(event, **ids)
        return client.post(path, data=body, headers=sign(body, secret))

    return send


@pytest.fixture
def handlers():
    """The registry of handlers, put back afterwards."""
    before = {name: list(functions) for name, functions in kyc.HANDLERS.items()}
    yield kyc.HANDLERS
    kyc.HANDLERS.clear()
    kyc.HANDLERS.update(before)


def build(name="inquiry.approved", **ids):
    """Return the body of an event as `flask trigger` builds it."""
    return json.dumps(kyc.build_event(name, **ids)).encode()


def sign(body, secret=SECRET, scheme="persona", timestamp=None):
    """Return the headers that authenticate `body`."""
    return kyc.sign(body, secret.encode(), scheme, timestamp or int(time.time()))


def unrecognized_id(body):
    """Return the event ID of an authentic body in which there is no event."""
    return "sha256:" + hashlib.sha256(body).hexdigest()


class Server:
    """A real gunicorn on a free port, in a process group of its own."""

    def __init__(self, environ, log, *options, cwd=ROOT, arguments=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(log)
        flags = [*procfile_flags(), "--bind", f"127.0.0.1:{self.port}", *options]
        command = arguments or [sys.executable, "-m", "gunicorn", *flags]
        base = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env={**base, "PORT": str(self.port), **environ},
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
    assert command == "gunicorn"
    return arguments.split()


@pytest.fixture
def serve(environ, tmp_path):
    """Start gunicorn as the Procfile does; every server is gone when the test ends."""
    servers = []

    def serve(*options, wait=True, **variables):
        server = Server({**environ, **variables}, tmp_path / "gunicorn.log", *options)
        servers.append(server)
        return server.wait_until_up() if wait else server

    yield serve
    for server in servers:
        server.kill()


@pytest.fixture
def flask(environ):
    """Run a `flask` command as an operator does; return the finished process."""

    def flask(*arguments, input=None, check=True, **variables):
        base = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        process = subprocess.run(
            [sys.executable, "-m", "flask", *arguments],
            env={**base, **environ, **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            input=input,
        )
        if check:
            assert process.returncode == 0, process.stderr
        return process

    return flask
