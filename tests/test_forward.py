"""flask forward: what a team's app receives, whatever becomes of either."""

import contextlib
import http.server
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from conftest import bare_environment, build, kyc, wait_until

SECRET = "forward_0123456789abcdef"


class Receiver:
    """The team's app: keeps what it accepts, in order."""

    def __init__(self):
        self.seen, self.headers, self.requests = [], [], 0
        self.refuse = lambda change: None  # returns a status instead of 200
        self.server = None
        self.start(0)

    def start(self, port=None):
        handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {"do_POST": self.serve()})
        handler.log_message = lambda *_: None
        port = self.port if port is None else port
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/kyc"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def serve(self):
        def do_post(handler):
            body = handler.rfile.read(int(handler.headers["Content-Length"]))
            self.requests += 1
            change = json.loads(body)
            code = self.refuse(change)
            if code is None:
                self.seen.append(change)
                self.headers.append((dict(handler.headers), body))
            with contextlib.suppress(OSError):
                handler.send_response(code or 200)
                if code == 302:
                    handler.send_header("Location", self.url)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

        return do_post

    def stop(self):
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()
            self.server = None

    def standings(self):
        """Return what it knows of each person in the end."""
        people = {}
        for change in self.seen:
            people[change["person"]["reference_id"]] = change["person"]
        return {person: row for person, row in people.items() if row["status"]}


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.stop()


@pytest.fixture
def once(runner, receiver, monkeypatch):
    """Forward all that waits, in this process; return click's result."""
    monkeypatch.setenv("KYC_FORWARD_SECRET", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(kyc, "start_logging", lambda: None)  # it would outlast the test
    return lambda url=None: runner("forward", url or receiver.url, "--once")


@pytest.fixture
def forward(environ, deployment, receiver, tmp_path):
    """Start the command as a process of its own."""
    processes = []

    def forward(*arguments, **variables):
        with (tmp_path / "forward.log").open("ab") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "flask", "forward", *(arguments or [receiver.url])],
                    env={
                        **bare_environment(),
                        **environ,
                        "KYC_FORWARD_SECRET": SECRET,
                        **variables,
                    },
                    cwd=deployment,
                    stdout=log,
                    stderr=log,
                )
            )
        return processes[-1]

    yield forward
    for process in processes:
        process.kill()
        process.wait()


def statuses(receiver, person="user-1"):
    return [
        one["person"]["status"] for one in receiver.seen if one["person"]["reference_id"] == person
    ]


def people(database):
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.row_factory = sqlite3.Row
        return {row["reference_id"]: dict(row) for row in db.execute("SELECT * FROM kyc_status")}


def test_each_change_arrives_in_order(once, receiver, send):
    once()
    for name in ("created", "started", "completed", "marked-for-review", "approved", "declined"):
        send(f"inquiry.{name}", inquiry_id="inq_1", reference_id="user-1")
        send(f"inquiry.{name}", inquiry_id="inq_2", reference_id="user-2")
    send("verification.passed", inquiry_id="inq_1")
    assert once().exit_code == 0
    wanted = ["created", "pending", "completed", "needs_review", "approved", "declined"]
    assert statuses(receiver) == statuses(receiver, "user-2") == wanted
    assert [one["position"] for one in receiver.seen] == list(range(1, 13))
    assert len({one["id"] for one in receiver.seen}) == 12


def test_a_change_has_the_row_and_what_was_before(once, receiver, send, database):
    once()
    send("inquiry.completed", inquiry_id="inq_1", reference_id="user-1", template_id="itmpl_1")
    send("inquiry.approved", inquiry_id="inq_1", reference_id="user-1")
    once()
    first, second = receiver.seen
    assert list(second) == ["id", "position", "person", "previous"]
    assert second["person"] == people(database)["user-1"]
    assert (first["previous"], second["previous"]) == (None, {"status": "completed", "hold": None})


def test_it_is_signed_as_persona_signs(once, receiver, send, monkeypatch):
    monkeypatch.setenv("KYC_FORWARD_SECRET", f"{SECRET},{SECRET}_new")
    send("inquiry.approved", reference_id="user-1")
    once()
    headers, body = receiver.headers[0]
    for secret in (SECRET, f"{SECRET}_new"):
        config = kyc.read_config({"PERSONA_WEBHOOK_SECRET": secret})
        assert kyc.verify(body, headers, config, time.time()) == kyc.fingerprint(secret.encode())
    assert headers["Content-Type"] == "application/json"
    assert headers["User-Agent"] == f"kyc/{kyc.VERSION}"


def test_the_first_start_sends_everybody_once(once, receiver, send, database):
    for number in range(230):
        send("inquiry.approved", inquiry_id=f"inq_{number}", reference_id=f"user-{number}")
    once()
    assert receiver.standings() == people(database)
    once()
    assert len(receiver.seen) == 230


def test_holds_arrive(once, receiver, runner, send):
    send("inquiry.approved", inquiry_id="inq_1", reference_id="user-1")
    once()
    runner("hold", "user-1", "--reason", "chargeback")
    runner("release", "user-1", "--reason", "withdrawn")
    once()
    assert [bool(one["person"]["hold"]) for one in receiver.seen] == [False, True, False]
    assert receiver.seen[2]["previous"]["hold"] == receiver.seen[1]["person"]["hold"]


def test_a_key_that_moves_goes_and_comes(once, receiver, send):
    send("inquiry.approved", inquiry_id="inq_1", account_id="act_1")
    once()
    send("account.created", account_id="act_1", reference_id="user-1")
    once()
    rows = [one["person"] for one in receiver.seen]
    standings = [(row["reference_id"], row["status"]) for row in rows]
    assert standings == [("act_1", "approved"), ("act_1", None), ("user-1", "approved")]
    assert receiver.seen[1]["previous"]["status"] == "approved"


def test_what_no_new_event_causes_arrives(once, receiver, send, database, runner):
    body = json.loads(build("inquiry.approved", inquiry_id="inq_1", event_id="evt_1"))
    body["data"]["attributes"]["payload"]["data"]["relationships"] = {}
    send(json.dumps(body).encode())
    once()
    body["data"]["attributes"]["payload"]["data"]["attributes"]["reference-id"] = "user-1"
    assert send(json.dumps(body).encode()).json["duplicate"]  # a richer copy
    once()
    assert set(receiver.standings()) == {"user-1"}
    with contextlib.closing(kyc.connect(database)) as db:  # other rules
        kyc.write_rules(db, ("itmpl_other",))
        assert [list(map(tuple, one)) for one in kyc.rebuild(db)]
    once()
    assert receiver.standings() == {}


def test_nothing_is_queued_before_the_first_start(send, db):
    send("inquiry.approved", reference_id="user-1")
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_schema")]
    assert "forward_queue" not in tables or not db.execute("SELECT 1 FROM forward_queue").fetchall()


# A receiver that fails


@pytest.mark.parametrize("code", [302, 400, 404, 500, 503])
def test_a_refused_change_holds_back_the_others(code, once, receiver, send, runner):
    once()
    for name in ("completed", "approved"):
        send(f"inquiry.{name}", inquiry_id="inq_1", reference_id="user-1")
    send("inquiry.approved", inquiry_id="inq_2", reference_id="user-2")
    receiver.refuse = lambda change: code
    for _ in range(3):
        assert once().exit_code == 1
    assert receiver.requests == 3
    standing = json.loads(runner("forward", "--status", "--json").output)
    assert (standing["attempts"], standing["waiting"]) == (3, 3)
    assert standing["error"] == f"answered {code}"
    receiver.refuse = lambda change: None
    assert once().exit_code == 0
    assert statuses(receiver) == ["completed", "approved"]
    assert statuses(receiver, "user-2") == ["approved"]


def test_a_receiver_that_is_down_or_silent(once, receiver, send, runner, monkeypatch):
    monkeypatch.setattr("commands.forward.ANSWER_SECONDS", 0.2)
    send("inquiry.approved", reference_id="user-1")
    assert once().exit_code == 0
    send("inquiry.declined", reference_id="user-1")
    receiver.refuse = lambda change: time.sleep(0.4) or 200
    assert once().exit_code == 1
    assert "timed out" in runner("forward", "--status").output
    receiver.stop()
    assert once().exit_code == 1
    assert "Connection refused" in runner("forward", "--status").output
    receiver.refuse = lambda change: None
    receiver.start()
    assert once().exit_code == 0


def test_what_could_not_be_noted_comes_again(once, receiver, send, monkeypatch):
    once()
    for name in ("completed", "approved"):
        send(f"inquiry.{name}", inquiry_id="inq_1", reference_id="user-1")
    send("inquiry.approved", inquiry_id="inq_2", reference_id="user-2")
    with monkeypatch.context() as patch:
        broken = lambda *_: (_ for _ in ()).throw(kyc.DatabaseError("it is full"))  # noqa: E731
        patch.setattr("commands.forward.conclude", broken)
        result = once()
    assert result.exit_code == 1
    assert "it is full" in result.output
    once()
    assert statuses(receiver) == ["completed", "completed", "approved"]
    assert receiver.seen[0]["id"] == receiver.seen[1]["id"]


# As a process


def test_it_follows_and_ends_cleanly(forward, receiver, send, tmp_path):
    process = forward()
    for number, name in enumerate(("created", "completed", "approved")):
        send(f"inquiry.{name}", inquiry_id="inq_1", reference_id="user-1")
        wait_until(lambda number=number: len(receiver.seen) > number)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0
    assert statuses(receiver) == ["created", "completed", "approved"]
    lines = (tmp_path / "forward.log").read_text()
    assert "forward position=1 outcome=accepted ms=" in lines
    assert "user-1" not in lines


def test_sigterm_lets_the_request_end(forward, receiver, send, db):
    arrived, go_on = threading.Event(), threading.Event()
    receiver.refuse = lambda change: arrived.set() or (None if go_on.wait(10) else 500)
    for number in range(3):
        send("inquiry.approved", reference_id=f"user-{number}")
    process = forward()
    assert arrived.wait(10)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    go_on.set()
    assert process.wait(timeout=10) == 0
    assert len(receiver.seen) == 1
    assert db.execute("SELECT position FROM forwarding").fetchone()[0] == 1


def test_it_waits_longer_and_longer(forward, receiver, send, runner):
    times = []
    receiver.refuse = lambda change: times.append(time.monotonic()) or 500
    send("inquiry.approved", reference_id="user-1")
    process = forward()
    wait_until(lambda: len(times) == 3)
    assert 0.9 < times[1] - times[0] < 1.9 < times[2] - times[1] < 3.5
    wait_until(lambda: "refused  3 times since" in runner("forward", "--status").output)
    result = runner("forward", "--status")
    assert result.exit_code == 1
    assert result.output.startswith(f"to {receiver.url}: runs\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 0  # in the middle of a wait


def test_only_one_runs(forward, receiver, send, flask):
    process = forward()
    send("inquiry.approved", reference_id="user-1")
    wait_until(lambda: receiver.seen)
    other = flask("forward", receiver.url, check=False, KYC_FORWARD_SECRET=SECRET)
    words = "Error: flask forward runs already on this database\n"
    assert (other.returncode, other.stderr) == (1, words)
    assert flask("forward", "--forget", check=False).returncode == 1
    assert flask("forward", "--status").stdout.startswith(f"to {receiver.url}: runs\n")
    process.kill()
    process.wait()
    result = flask("forward", "--status", check=False)
    assert (result.returncode, "does NOT run" in result.stdout) == (1, True)


def test_it_ends_when_its_lock_file_is_moved_away(forward, receiver, send, database, tmp_path):
    process = forward()
    send("inquiry.approved", reference_id="user-1")
    wait_until(lambda: receiver.seen)
    database.with_name("kyc.db.forward").rename(tmp_path / "aside")
    assert process.wait(10) == 1
    words = "Error: kyc.db.forward was moved away: start this again\n"
    assert (tmp_path / "forward.log").read_text().endswith(words)


def test_kills_lose_and_reorder_nothing(forward, receiver, send, database, db):
    """Killed in the middle of requests that the app accepts or not, it sends all, in order.

    Of each person comes again at most the change that came last.
    """
    pick, processes, kept = random.Random(5), [forward()], []
    doomed = iter([3, 4, 20, 41, 42, 60])
    due = [next(doomed)]

    def kill(change):
        if receiver.requests < due[0]:
            return None
        due[0] = next(doomed, 10**9)
        processes[-1].kill()
        return pick.choice([None, 500])

    receiver.refuse = kill
    wait_until(lambda: receiver.requests == 0 and is_entered(db))
    while True:
        if len(kept) < 90:
            person = pick.randrange(8)
            ids = {"inquiry_id": f"inq_{person}", "reference_id": f"user-{person}"}
            send(f"inquiry.{pick.choice(['completed', 'approved', 'declined'])}", **ids)
            row = people(database)[f"user-{person}"]
            kept += [row] if row not in kept else []
        elif not db.execute("SELECT 1 FROM forward_queue").fetchone():
            break
        if processes[-1].poll() is not None:
            processes.append(forward())
    got, last = {}, {}
    for change in receiver.seen:
        person = change["person"]["reference_id"]
        assert change["id"] not in got or last[person] == change["id"]
        got[change["id"]], last[person] = change, change["id"]
    assert [one["position"] for one in got.values()] == list(range(1, len(got) + 1))
    assert [one["person"] for one in got.values()] == kept
    assert len(processes) == 7


def is_entered(db):
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_schema")]
    return "forwarding" in tables and db.execute("SELECT 1 FROM forwarding").fetchone()


def test_a_database_replaced_under_the_service_is_not_damaged(
    forward, receiver, serve, flask, database, tmp_path
):
    """It waits until the service, here a slow one, has taken the old file's WAL away."""
    server = serve()
    forward()
    flask("backup", str(tmp_path / "copy.db"))
    for number in range(50):
        server.send(build("inquiry.approved", reference_id=f"user-{number}"))
    wait_until(lambda: len(receiver.seen) == 50)
    os.killpg(server.process.pid, signal.SIGSTOP)
    (tmp_path / "copy.db").rename(database)
    wait_until(lambda: "outcome=unavailable" in (tmp_path / "forward.log").read_text())
    os.killpg(server.process.pid, signal.SIGCONT)
    wait_until(lambda: server.send(build("inquiry.declined", reference_id="user-1"))[0] == 200)
    wait_until(lambda: receiver.seen[-1]["person"]["status"] == "declined")
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 1


def test_it_goes_on_when_the_database_comes_back(forward, receiver, send, database, app, tmp_path):
    process = forward()
    send("inquiry.approved", reference_id="user-1")
    wait_until(lambda: receiver.seen)
    app.extensions["journal"].stop()
    database.rename(tmp_path / "moved.db")
    wait_until(lambda: "outcome=unavailable" in (tmp_path / "forward.log").read_text())
    (tmp_path / "moved.db").rename(database)
    with contextlib.closing(kyc.connect(database)) as other, kyc.transaction(other):
        other.execute("UPDATE kyc_status SET hold = 'by hand'")
    wait_until(lambda: len(receiver.seen) == 2)
    assert process.poll() is None


# Settings


@pytest.mark.parametrize(
    ("arguments", "secret", "words"),
    [
        (["https://a.example/kyc"], None, "KYC_FORWARD_SECRET is not set"),
        (["https://a.example/kyc"], "short", "KYC_FORWARD_SECRET: entry 1 of 1 is not a secret"),
        (["ftp://a.example/kyc"], SECRET, "the URL must begin with https:// or http://"),
        (["https://user:secret@a.example/"], SECRET, "the URL must begin with https:// or http://"),
        (["https://"], SECRET, "the URL must begin with https:// or http://"),
        ([], SECRET, "give the URL, --status or --forget"),
        (["https://a.example", "--status"], SECRET, "give the URL, --status or --forget"),
        (["--status"], None, "flask forward was not started on this database"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, secret, words, runner, monkeypatch, db):
    monkeypatch.delenv("KYC_FORWARD_SECRET", raising=False)
    if secret:
        monkeypatch.setenv("KYC_FORWARD_SECRET", secret)
    result = runner("forward", *arguments)
    assert result.exit_code in (1, 2)
    assert f"Error: {words}" in result.output
    assert "short" not in result.output


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_lock_file_that_root_makes_is_the_owners(once, database):
    os.chown(database, 12345, 12345)
    once()
    assert os.stat(f"{database}.forward").st_uid == 12345


def test_forget_begins_anew(once, receiver, runner, send):
    send("inquiry.approved", reference_id="user-1")
    once()
    send("inquiry.declined", reference_id="user-1", inquiry_id="inq_2")
    assert runner("forward", "--forget").exit_code == 0
    send("inquiry.approved", reference_id="user-2")
    assert once().exit_code == 0
    assert statuses(receiver) == ["approved", "declined"]
    assert statuses(receiver, "user-2") == ["approved"]


def test_the_query_of_the_url_is_not_kept(once, receiver, db):
    assert once(f"{receiver.url}?token=abc").exit_code == 0
    assert db.execute("SELECT url FROM forwarding").fetchone()[0] == receiver.url
