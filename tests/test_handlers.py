"""Handlers: run after the event is stored, all or nothing, counted once, healed by redelivery."""

import http.client
import os
import signal
import sqlite3
import threading

import pytest
from conftest import Load, ask, build, children, deploy, run_threads, send_together, wait_until

import app as kyc


@pytest.fixture
def notes(handlers, db):
    """A table that handlers write to, and a flag that makes the last one fail."""
    db.execute("CREATE TABLE notes (event_id TEXT)")
    flags = {"error": None}

    @kyc.on("inquiry.approved")
    def note(db, event):
        db.execute("INSERT INTO notes VALUES (?)", (event.event_id,))

    @kyc.on("inquiry.approved")
    def fail(db, event):
        if flags["error"]:
            raise flags["error"]

    return flags


def row(db):
    """Return state and error of the first event, and how many notes there are."""
    state, error = db.execute("SELECT state, error FROM events ORDER BY rowid").fetchone()
    return state, error, db.execute("SELECT count(*) FROM notes").fetchone()[0]


def states(db):
    """Return the name and the state of each event, in order."""
    rows = db.execute("SELECT name, state FROM events ORDER BY name, state")
    return [(name.removeprefix("inquiry."), state) for name, state in rows]


def test_handler_runs_once_per_event(send, db, notes):
    body = build("inquiry.approved", reference_id="user-1")
    for _ in range(3):
        assert send(body).status_code == 200
    assert row(db) == ("processed", None, 1)


def test_handler_sees_the_projection_and_the_payload(send, handlers):
    seen = []

    @kyc.on("inquiry.approved", "inquiry.declined")
    def look(db, event):
        seen.append(db.execute("SELECT status FROM kyc_status").fetchone()["status"])
        seen.append(event.payload["data"]["attributes"]["reference-id"])

    send("inquiry.approved", reference_id="user-1")
    assert seen == ["approved", "user-1"]


def test_other_events_do_not_run_it(send, db, notes):
    send("inquiry.created")
    assert row(db) == ("processed", None, 0)


# Errors


def test_failure_keeps_event_and_projection_and_undoes_the_rest(send, db, notes):
    notes["error"] = ValueError("no such plan")
    answer = send("inquiry.approved", reference_id="user-1")
    assert (answer.status_code, "error" in answer.json) == (500, True)
    assert row(db) == ("failed", "ValueError: no such plan", 0)
    assert db.execute("SELECT status FROM kyc_status").fetchone()[0] == "approved"
    assert db.execute("SELECT error FROM failed_events").fetchone()[0].startswith("ValueError")


def test_redelivery_heals_a_failed_event(send, db, notes):
    body = build("inquiry.approved")
    notes["error"] = ValueError("not yet")
    assert [send(body).status_code for _ in range(2)] == [500, 500]
    notes["error"] = None
    answer = send(body)
    assert (answer.status_code, answer.json) == (200, {"received": True})
    assert row(db) == ("processed", None, 1)
    assert send(body).json == {"received": True, "duplicate": True}


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("no"), SystemExit(1), GeneratorExit(), MemoryError(), RecursionError()),
        *(OSError(5, "no"), sqlite3.OperationalError("no"), kyc.DatabaseError("no")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_handler_raises_fails_its_event_alone(send, db, database, handlers, error):
    @kyc.on("inquiry.declined")
    def fail(db, event):
        raise error

    bodies = [build(name) for name in ("inquiry.approved", "inquiry.declined") * 3]
    answers = send_together(send, database, bodies)
    assert [answer.status_code for answer in answers] == [200, 500] * 3
    assert states(db) == [("approved", "processed")] * 3 + [("declined", "failed")] * 3
    assert send("inquiry.approved").status_code == 200


@pytest.mark.parametrize(
    ("meddle", "words"),
    [
        *((lambda db: db.commit(), "commit"), (lambda db: db.rollback(), "commit")),
        *((lambda db: db.execute("END"), "commit"), (lambda db: db.execute("BEGIN"), "begin")),
        (lambda db: db.executescript("SELECT 1"), "commit"),
        (lambda db: db.execute("RELEASE handlers"), "no such savepoint"),
        (lambda db: db.execute("INSERT OR ROLLBACK INTO taken VALUES (1)"), "UNIQUE"),
        (lambda db: db.execute("INSERT INTO breaking VALUES (1)"), "IntegrityError: broken"),
    ],
)
def test_handler_that_breaks_its_transaction_fails_its_event_alone(
    send, db, database, notes, meddle, words
):
    db.executescript("""
        CREATE TABLE taken (number UNIQUE);
        INSERT INTO taken VALUES (1);
        CREATE TABLE breaking (number);
        CREATE TRIGGER break BEFORE INSERT ON breaking
        BEGIN SELECT RAISE(ROLLBACK, 'broken'); END;
    """)

    @kyc.on("inquiry.declined")
    def finish(db, event):
        meddle(db)

    bodies = [build(name) for name in ("inquiry.approved", "inquiry.declined") * 3]
    answers = send_together(send, database, bodies)
    assert [answer.status_code for answer in answers] == [200, 500] * 3
    assert states(db) == [("approved", "processed")] * 3 + [("declined", "failed")] * 3
    assert db.execute("SELECT count(*) FROM notes").fetchone()[0] == 3
    for (error,) in db.execute("SELECT error FROM failed_events"):
        assert words in error
        assert "not authorized" not in error


def test_handler_cannot_change_how_rows_are_read(send, handlers):
    runs = []

    @kyc.on("inquiry.approved")
    def meddle(db, event):
        db.text_factory, db.row_factory = bytes, None
        runs.append(event.event_id)

    body = build("inquiry.approved")
    assert send(body).json == {"received": True}
    assert send(body).json == {"received": True, "duplicate": True}
    assert len(runs) == 1


CAUSED = ValueError("no such plan")
CAUSED.__cause__ = KeyError("basic")


class SilentError(Exception):
    """An error that cannot be put into words."""

    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (SyntaxError("at Jane", ("x", 1, 1, "Jane")), "SyntaxError: at Jane (x, line 1)"),
        (KeyError("Jane"), "KeyError: 'Jane'"),
        (ValueError(), "ValueError"),
        (CAUSED, "ValueError: no such plan"),
        (SilentError(), "SilentError"),
        (ValueError("\ud800"), "ValueError: \\ud800"),
        (ValueError("x" * 5_000_000), "ValueError: " + "x" * 988),
    ],
)
def test_error_is_kept_as_far_as_it_can_be_and_its_kind_is_logged(
    send, db, notes, log, error, kept
):
    error.add_note("Jane")
    notes["error"] = error
    answer = send("inquiry.approved")
    assert (answer.status_code, "Jane" in answer.text) == (500, False)
    assert row(db)[:2] == ("failed", kept)
    wait_until(lambda: f"reason={type(error).__name__}\n" in log.text)
    assert "Jane" not in log.text


def test_error_of_a_redacted_event_is_only_its_kind(send, db, notes):
    notes["error"] = ValueError("marker")
    ids = {"inquiry_id": "inq_1", "created_at": "2026-01-01T00:00:00.000Z"}
    body = build("inquiry.approved", event_id="evt_1", **ids)
    send(body)
    send("inquiry.redacted", inquiry_id="inq_1")
    assert row(db)[:2] == ("failed", "ValueError")
    send(body)
    assert row(db)[:2] == ("failed", "ValueError")


# handlers.py, beside app.py

TEAM = """
import time
from pathlib import Path

from app import on


@on("inquiry.approved")
def open_account(db, event):
    db.execute("CREATE TABLE IF NOT EXISTS plans (event_id TEXT, plan TEXT)")
    db.execute("INSERT INTO plans VALUES (?, ?)", (event.event_id, find_plan(event)))
    Path("running").touch()
    while Path("hold").exists():
        time.sleep(0.01)


def find_plan(event):
    return {"user-1": "basic"}[event.reference_id]
"""


@pytest.fixture
def team(serve, tmp_path):
    """A server with the handlers of a team, and their folder."""
    folder = deploy(tmp_path / "team", TEAM)
    return serve(cwd=folder, WEB_CONCURRENCY="2"), folder


def test_handler_runs_once_for_senders_of_the_same_event_at_once(team, database):
    server, _ = team
    body = build(event_id="evt_1", reference_id="user-1")
    run_threads(lambda: server.send(body), 8)
    assert ask(database, "SELECT * FROM plans") == [("evt_1", "basic")]


def test_error_is_kept_and_logged_with_its_place(team, database):
    server, _ = team
    assert server.send(build(event_id="evt_1", reference_id="MARKER"))[0] == 500
    line = TEAM.splitlines().index('    return {"user-1": "basic"}[event.reference_id]') + 1
    place = f"(handlers.py:{line} find_plan)"
    query = "SELECT error FROM failed_events"
    assert ask(database, query) == [(f"KeyError: 'MARKER' {place}",)]
    wait_until(lambda: f'reason="KeyError {place}"' in server.log.read_text())
    assert "MARKER" not in server.log.read_text()


def test_kill_while_a_handler_runs_leaves_its_event_pending_and_redelivery_runs_it_once(
    team, database
):
    server, folder = team
    body = build(event_id="evt_1", reference_id="user-1")
    (folder / "hold").touch()
    sender = threading.Thread(target=send_in_vain, args=(server, body))
    sender.start()
    wait_until((folder / "running").exists)
    for worker in children(server):
        os.kill(worker, signal.SIGKILL)
    sender.join()
    (folder / "hold").unlink()
    assert ask(database, "SELECT event_id, state FROM failed_events") == [("evt_1", "pending")]
    server.wait_until_up()
    assert server.send(body) == (200, b'{"received": true}\n')
    assert server.send(body) == (200, b'{"received": true, "duplicate": true}\n')
    assert ask(database, "SELECT * FROM plans") == [("evt_1", "basic")]


def send_in_vain(server, body):
    """Post a body to a server that is killed meanwhile."""
    with pytest.raises((OSError, http.client.HTTPException)):
        server.send(body)


def test_handler_that_makes_deliveries_time_out_is_blamed_by_name(team, database):
    server, folder = team
    body = build(event_id="evt_1", reference_id="user-1")
    (folder / "hold").touch()
    status, answer = server.send(body)
    (folder / "hold").unlink()
    assert status == 503
    assert b'"reason": "the handler open_account did not answer in time"' in answer
    wait_until(lambda: "slow handler=open_account seconds=" in server.log.read_text())
    wait_until(lambda: ask(database, "SELECT state FROM events") == [("processed",)])
    assert server.send(body) == (200, b'{"received": true, "duplicate": true}\n')


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("@on\ndef f(db, event): pass", "@on takes the names of events"),
        ("@on()\ndef f(db, event): pass", "@on takes the names of events"),
        ('@on(["inquiry.approved"])\ndef f(db, event): pass', "@on takes the names of events"),
        ('@on("inquiry.approved")\ndef f(event): pass', "f must take two arguments: db, event"),
        ('@on("")\ndef f(db, event): pass', "@on takes the names of events"),
        ('@on("inquiry.approved")\nasync def f(db, event): pass', "must be a plain function"),
        ('@on("inquiry.approved")\ndef f(db, event): yield', "must be a plain function"),
        ("raise SystemExit", "handlers.py: SystemExit (handlers.py:2 <module>)"),
        ('@on("inquiry.approved")\ndef f(db, event)', "handlers.py:3: expected ':'"),
        ('limits = {}\nlimits["basic"]', "KeyError: 'basic' (handlers.py:3 <module>)"),
        ("import nowhere", "No module named 'nowhere'"),
        ('status_rule("case.resolved", "aproved")', "aproved is none of created, pending"),
        ('hold_rule("Case resolved")', "is not the name of an event"),
    ],
)
def test_mistake_in_handlers_py_stops_the_start_with_one_line(
    refusal, environ, tmp_path, mistake, words
):
    folder = deploy(tmp_path / "team", f"from app import *; from app import on\n{mistake}\n")
    lines = [line for line in refusal(environ, cwd=folder).splitlines() if "handlers.py" in line]
    assert len(lines) == 1
    assert lines[0].startswith("app.py: handlers.py")
    assert words in lines[0]
    assert not os.path.exists(environ["KYC_DATABASE"])


RULES = """
from app import hold_rule, status_rule

status_rule("case.resolved", "approved", object_status="Approved")
hold_rule("inquiry.approved")
"""


def test_rule_takes_effect_for_the_past_at_the_next_start(serve, tmp_path, database):
    def held():
        """Return how many are held and how many not, and the status of the case's person."""
        counts = ask(database, "SELECT count(hold), count(*) - count(hold) FROM kyc_status")
        case = "SELECT status FROM kyc_status WHERE inquiry_id = 'inq_case'"
        return *counts[0], ask(database, case)

    folder = deploy(tmp_path / "team", "")
    server = serve(cwd=folder)
    assert server.send(build("case.resolved", inquiry_id="inq_case", object_status="Approved"))
    with Load(server.port) as load:
        wait_until(lambda: len(load.accepted) >= 700)  # more than are rebuilt at once
        assert held()[0] == 0
        (folder / "handlers.py").write_text(RULES)
        os.kill(server.process.pid, signal.SIGHUP)
        wait_until(lambda: held()[1:] == (1, [("approved",)]))
    assert set(load.answers) == {200}
    assert held()[0] == len(load.accepted)
    assert server.stop() == 0
    (folder / "handlers.py").write_text("")
    serve(cwd=folder)  # and without any delivery
    wait_until(lambda: held() == (0, len(load.accepted), []))


def test_rules_are_those_of_the_newest_start(serve, database):
    old, new = (serve(KYC_TEMPLATES=f"itmpl_{age}") for age in ("old", "new"))
    for server in (new, old):  # which answers what it has got, as at a reload
        assert server.send(build())[0] == 200
    assert ask(database, "SELECT template_id FROM kyc_templates") == [("itmpl_new",)]


def test_name_that_persona_does_not_send_is_a_warning_with_the_nearest(serve, tmp_path):
    folder = deploy(tmp_path / "team", TEAM.replace("inquiry.approved", "inquiry.aproved"))
    words = "WARNING: handlers.py: Persona is not known to send inquiry.aproved; did you mean"
    assert f"{words} inquiry.approved?" in serve(cwd=folder).log.read_text()
