"""Redaction: what is removed, what stays, and that the bytes are gone."""

import contextlib
import itertools
import json
import os
import signal
import sqlite3

import pytest
from conftest import ask, build, children, sign, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app as kyc
from commands.trigger import build_event

MARKER = "Zyxwvut-Personal-Marker"
EARLY, LATER, LAST = (f"2026-01-0{day}T00:00:00.000Z" for day in (1, 2, 3))


def plant(name="inquiry.approved", pages=3, mentions=(), **ids):
    """Return the body of an event that carries personal data, on several pages of the file."""
    event = build_event(name, **ids)
    thing = event["data"]["attributes"]["payload"]["data"]
    thing["attributes"]["name-first"] = [MARKER] * (pages * 4096 // len(MARKER))
    thing["attributes"]["nodes"] = [{"id": mentioned} for mentioned in mentions]
    return json.dumps(event).encode()


def bytes_on_disk(database):
    """Return how often the marker stands in the database and its WAL."""
    files = (database, database.with_name(database.name + "-wal"))
    return sum(file.read_bytes().count(MARKER.encode()) for file in files if file.exists())


def wait_until_gone(database):
    """Wait for the service to empty its WAL."""
    wait_until(lambda: bytes_on_disk(database) == 0, seconds=10)


def kept(database):
    """Return the IDs of the events that still have their body."""
    rows = ask(database, "SELECT event_id FROM events WHERE body IS NOT NULL ORDER BY 1")
    return [row[0] for row in rows]


@pytest.fixture
def run(runner):
    """Run a command that removes; return what it prints."""

    def run(*arguments):
        result = runner(*arguments, "--yes")
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


# what is removed, and what stays


@pytest.mark.parametrize("subject", ["inq_1", "act_1", "user-1"])
def test_redacted_bytes_are_gone_while_the_service_runs(serve, flask, database, subject):
    server = serve()
    ids = {"inquiry_id": "inq_1", "account_id": "act_1", "reference_id": "user-1"}
    for name in ("inquiry.completed", "inquiry.approved", "report/watchlist.matched"):
        server.send(plant(name, **ids))
    assert bytes_on_disk(database) > 100
    output = flask("redact", subject, "--yes", PERSONA_WEBHOOK_SECRET="").stdout
    assert output == "3 bodies removed\n"
    assert bytes_on_disk(database) == 0
    assert server.send(build("inquiry.approved"))[0] == 200


def test_metadata_hash_and_status_outlive_the_body(send, run, database):
    send(plant(inquiry_id="inq_1", reference_id="user-1", event_id="evt_1"))
    columns = "SELECT event_id, name, created_at, body_sha256, inquiry_id, reference_id FROM events"
    before = ask(database, columns), ask(database, "SELECT * FROM kyc_status")
    run("redact", "user-1")
    assert (ask(database, columns), ask(database, "SELECT * FROM kyc_status")) == before
    assert ask(database, "SELECT redacted_at IS NOT NULL FROM events") == [(1,)]


def test_redaction_leaves_others_alone(send, run, database):
    send(plant(inquiry_id="inq_1", event_id="evt_1", reference_id="user-1"))
    send(plant(inquiry_id="inq_2", event_id="evt_2", reference_id="user-2"))
    run("redact", "user-1")
    assert kept(database) == ["evt_2"]


def test_redacted_inquiry_leaves_the_account(send, database):
    send(plant("account.created", account_id="act_1", event_id="evt_1"))
    send(plant(inquiry_id="inq_1", account_id="act_1", event_id="evt_2"))
    send("inquiry.redacted", inquiry_id="inq_1", account_id="act_1", event_id="evt_3")
    assert kept(database) == ["evt_1"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_redacted_person_includes_what_names_only_the_account(send, run, database, late):
    send(plant(inquiry_id="inq_1", account_id="act_1", reference_id="user-1"))
    alone = plant("account.created", account_id="act_1", created_at=EARLY)
    if not late:
        send(alone)
    run("redact", "user-1")
    if late:
        send(alone)
    assert kept(database) == []


def test_event_from_the_future_is_removed_too(send, run, database):
    send(plant(inquiry_id="inq_1", account_id="act_1", created_at="2999-01-01"))
    send(plant("account.created", account_id="act_1", reference_id="user-1"))
    assert run("redact", "user-1") == "2 bodies removed\n"
    assert kept(database) == []


def test_your_id_of_a_transaction_is_nobodys(send, run, database):
    send(plant("transaction.created", reference_id="42", event_id="evt_1"))
    send(plant("inquiry.approved", reference_id="42", event_id="evt_2"))
    assert run("redact", "42") == "1 body removed\n"
    assert kept(database) == ["evt_1"]


def test_body_without_an_event_can_be_redacted_by_the_id_it_was_given(send, run, database):
    send(MARKER.encode())
    ((event_id,),) = ask(database, "SELECT event_id FROM events")
    assert run("redact", event_id) == "1 body removed\n"
    assert bytes_on_disk(database) == 0


def test_message_of_a_failed_handler_goes_with_the_body(send, run, database):
    for day, event_id in ((EARLY, "evt_1"), (LAST, "evt_2")):
        send(plant(event_id=event_id, created_at=day))
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("UPDATE events SET state = 'failed', error = 'ValueError: ' || ?", (MARKER,))
    run("prune", "--older-than", LATER)
    run("redact", "evt_2")
    assert ask(database, "SELECT error FROM events") == [("ValueError",), ("ValueError",)]
    assert bytes_on_disk(database) == 0


# by an event of Persona's


@pytest.mark.parametrize("name", ["inquiry.redacted", "account.redacted"])
def test_redaction_at_persona_removes_the_bytes_here(serve, database, name):
    server = serve()
    ids = {"inquiry_id": "inq_1", "account_id": "act_1"}
    for earlier in ("inquiry.created", "inquiry.approved", "report/watchlist.matched"):
        server.send(plant(earlier, created_at=EARLY, **ids))
    server.send(build(name, created_at=LATER, **ids))
    assert kept(database) == []
    wait_until_gone(database)
    assert ask(database, "SELECT status FROM kyc_status") == [("approved",)]


@pytest.mark.parametrize("name", ["inquiry.redacted", "account.redacted"])
def test_late_event_of_a_redacted_subject_is_stored_without_body(serve, database, name):
    server = serve()
    ids = {"inquiry_id": "inq_1", "account_id": "act_1"}
    server.send(build(name, created_at=LATER, **ids))
    late = plant(created_at=EARLY, event_id="evt_late", **ids)
    assert server.send(late) == (200, b'{"received": true}\n')
    server.send(plant(created_at=LAST, event_id="evt_new", pages=0, **ids))
    assert kept(database) == ["evt_new"]
    wait_until_gone(database)
    assert json.loads(server.send(late)[1]) == {"received": True, "duplicate": True}


@pytest.mark.parametrize("kind", ["case", "transaction", "verification/selfie", "report/phone"])
@pytest.mark.parametrize("late", [False, True])
def test_whatever_persona_redacts_is_redacted(send, database, kind, late):
    events = [
        with_object(kind, "obj_1", f"{kind}.created", event_id="evt_1", created_at=EARLY),
        with_object(kind, "obj_2", f"{kind}.created", event_id="evt_2", created_at=EARLY),
        with_object(kind, "obj_1", f"{kind}.redacted", event_id="evt_3", created_at=LATER),
    ]
    for event in reversed(events) if late else events:
        assert send(event).status_code == 200
    assert kept(database) == ["evt_2"]


def with_object(kind, object_id, name, **ids):
    """Return the body of an event about an object that belongs to one inquiry with others."""
    event = json.loads(plant(name, inquiry_id="inq_1", **ids))
    event["data"]["attributes"]["payload"]["data"] |= {"type": kind, "id": object_id}
    return json.dumps(event).encode()


def test_body_that_holds_a_redaction_twice_is_not_restored(client, database):
    body = plant(inquiry_id="inq_1", created_at=EARLY)
    client.post("/webhook", data=body, headers=sign(body))
    redaction = build("inquiry.redacted", inquiry_id="inq_1", created_at=LATER)
    for again in (redaction, redaction, body):
        assert client.post("/webhook", data=again, headers=sign(again)).status_code == 200
    assert kept(database) == []


# in any order


def test_late_event_after_the_command_is_stored_without_body(send, run, database):
    send(plant(reference_id="user-1", inquiry_id="inq_1"))
    run("redact", "user-1")
    send(plant(reference_id="user-1", inquiry_id="inq_2", created_at=EARLY))
    assert kept(database) == []
    send(build(reference_id="user-1", inquiry_id="inq_1", event_id="evt_new"))
    assert kept(database) == ["evt_new"]


def test_redaction_reaches_inquiries_that_name_their_account_later(send, database):
    send("account.redacted", account_id="act_1", created_at=LATER)
    send("inquiry.created", inquiry_id="inq_1", created_at=EARLY, event_id="evt_1")
    assert kept(database) == ["evt_1"]
    send("inquiry.approved", inquiry_id="inq_1", account_id="act_1", created_at=EARLY)
    assert kept(database) == []


EVENTS = (
    ("account.created", EARLY, {"account_id": "act_1", "reference_id": "user-1"}),
    ("inquiry.created", EARLY, {"inquiry_id": "inq_1"}),
    ("inquiry.approved", EARLY, {"inquiry_id": "inq_1", "account_id": "act_1"}),
    ("inquiry.created", EARLY, {"inquiry_id": "inq_2", "reference_id": "user-1"}),
    ("inquiry.failed", LAST, {"inquiry_id": "inq_2", "reference_id": "user-1"}),
    ("inquiry.approved", EARLY, {"inquiry_id": "inq_3", "account_id": "act_2"}),
    ("graph-query.completed", EARLY, {"object_id": "grphq_1", "mentions": ["inq_1", "act_9"]}),
    ("workflow-run.created", EARLY, {"object_id": "wfr_1", "mentions": ["act_1", "inq_9"]}),
    ("workflow-run.resumed", LAST, {"object_id": "wfr_1", "mentions": ["act_1"]}),
    ("graph-query.completed", EARLY, {"object_id": "grphq_2", "mentions": ["inq_3", "inq_2"]}),
    ("account.redacted", LATER, {"account_id": "act_1"}),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(len(EVENTS))))
def test_any_order_of_arrival_removes_the_same_bodies(tmp_path_factory, order):
    database = tmp_path_factory.mktemp("order") / "kyc.db"
    kyc.prepare_database(kyc.read_config({"KYC_DATABASE": str(database)}))
    with contextlib.closing(kyc.connect(database)) as db:
        for number in order:
            name, created_at, ids = EVENTS[number]
            body = plant(name, pages=0, event_id=f"evt_{number:02}", created_at=created_at, **ids)
            with kyc.transaction(db):
                kyc.store(db, [kyc.Delivery(kyc.read_event(body, LAST), body, LAST)])
    assert kept(database) == ["evt_03", "evt_04", "evt_05", "evt_09"]


@pytest.mark.parametrize("redaction", range(5))
def test_person_includes_the_account_of_their_inquiry_in_any_order(send, run, database, redaction):
    for number, order in enumerate(itertools.permutations(range(4))):
        inquiry, account, person = f"inq_{number}", f"act_{number}", f"user-{number}"
        events = (
            build("inquiry.created", inquiry_id=inquiry, reference_id=person, created_at=EARLY),
            build("inquiry.approved", inquiry_id=inquiry, account_id=account, created_at=EARLY),
            build("inquiry.failed", inquiry_id="second_" + inquiry, account_id=account),
            build("account.created", account_id=account, created_at=EARLY),
        )
        bodies = [events[step] for step in order]
        for body in bodies[:redaction]:
            send(body)
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
            db.execute(
                "INSERT INTO redactions VALUES (?, '9999', '9999', 'test', 'redact', NULL)",
                (person,),
            )
        for body in bodies[redaction:]:
            send(body)
    assert kept(database) == []


def test_person_of_a_shared_case_keeps_what_is_theirs(send, database):
    send(plant(inquiry_id="inq_2", account_id="act_2", event_id="evt_1"))
    send(plant("case.created", inquiry_id="inq_2", account_id="act_1", event_id="evt_2"))
    send("account.redacted", account_id="act_1", event_id="evt_3")
    assert kept(database) == ["evt_1"]


# mentions


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("inquiry.redacted", {"inquiry_id": "inq_1"}),
        ("account.redacted", {"account_id": "act_1"}),
    ],
)
def test_what_mentions_a_redacted_subject_loses_its_body(send, database, late, name, ids):
    (subject,) = ids.values()
    events = [
        plant("graph-query.completed", mentions=[subject, "inq_2"], event_id="evt_1"),
        plant("workflow-run.created", mentions=[subject], event_id="evt_2"),
        plant("workflow-run.created", mentions=["inq_2", f"x{subject}0"], event_id="evt_3"),
        plant("inquiry.approved", inquiry_id="inq_2", account_id="act_2", event_id="evt_4"),
    ]
    redaction = build(name, event_id="evt_5", created_at="2999-01-01T00:00:00Z", **ids)
    for body in [redaction, *events] if late else [*events, redaction]:
        send(body)
    assert kept(database) == ["evt_3", "evt_4"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_redacted_person_includes_what_mentions_their_inquiry(send, run, database, late):
    send(plant(inquiry_id="inq_1", account_id="act_1", reference_id="user-1"))
    send(plant(inquiry_id="inq_2", account_id="act_2", reference_id="user-2", event_id="evt_9"))
    bodies = [
        plant("graph-query.completed", mentions=[one, "act_2"], event_id=one, created_at=EARLY)
        for one in ("inq_1", "act_1")
    ]
    for body in [] if late else bodies:
        send(body)
    run("redact", "user-1")
    for body in bodies if late else []:
        send(body)
    assert kept(database) == ["evt_9"]


def test_what_only_mentions_an_inquiry_ties_it_to_nobody(send, database):
    mentions = ["act_1", "inq_2"]
    send(plant("inquiry.approved", inquiry_id="inq_2", account_id="act_2", event_id="evt_1"))
    send(plant("workflow-run.created", mentions=mentions, event_id="evt_2"))
    send("account.redacted", account_id="act_1", event_id="evt_3")
    assert kept(database) == ["evt_1"]


# who, when and why


def test_redactions_tell_who_when_and_why(send, run, database):
    send("inquiry.approved", inquiry_id="inq_1", created_at=EARLY)
    send("account.redacted", account_id="act_1", created_at=LATER, event_id="evt_9")
    run("redact", "inq_1", "--by", "alice", "--reason", "request 17")
    run("prune", "--older-than", EARLY, "--by", "cron")
    orders = "SELECT subject_id, ordered_by, command, reason FROM redactions ORDER BY rowid"
    assert ask(database, orders) == [
        ("act_1", "evt_9", "event", None),
        ("inq_1", "alice", "redact", "request 17"),
        (None, "cron", "prune", None),
    ]
    before = dict(ask(database, "SELECT command, redacted_before FROM redactions"))
    assert (before["event"], before["prune"]) == (LATER, EARLY)
    times = [row[0] for row in ask(database, "SELECT ordered_at FROM redactions")]
    assert times == sorted(times)
    assert before["redact"] <= times[-1]


def test_who_orders_is_the_user_of_the_system_when_nobody_is_named(
    send, run, database, monkeypatch
):
    monkeypatch.setenv("LOGNAME", "operator-7")
    send("inquiry.approved", inquiry_id="inq_1")
    run("redact", "inq_1")
    assert ask(database, "SELECT ordered_by FROM redactions") == [("operator-7",)]


def test_trial_of_a_redaction_changes_nothing(send, runner, database):
    send("inquiry.approved", inquiry_id="inq_1", event_id="evt_1")
    send("inquiry.created", inquiry_id="inq_1", event_id="evt_2")
    result = runner("redact", "inq_1")
    assert result.stderr == (
        "Error: Remove 2 bodies of inq_1? Nobody can be asked here: give --yes\n"
    )
    assert kept(database) == ["evt_1", "evt_2"]
    assert ask(database, "SELECT count(*) FROM redactions") == [(0,)]


def test_prune_is_refused_when_nobody_can_be_asked(send, runner, database):
    send("inquiry.approved", event_id="evt_1", created_at=EARLY)
    result = runner("prune", "--older-than", LATER)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Remove 1 body created before 2026-01-02T00:00:00.000Z?" in result.stderr
    assert "give --yes" in result.stderr
    assert kept(database) == ["evt_1"]


# prune


def test_prune_removes_old_bodies_only(serve, flask, database):
    server = serve()
    server.send(plant(event_id="evt_1", created_at=EARLY))
    server.send(build(event_id="evt_2", created_at=LAST))
    assert flask("prune", "--older-than", LATER, "--yes").stdout == "1 body removed\n"
    assert kept(database) == ["evt_2"]
    assert bytes_on_disk(database) == 0
    assert flask("prune", "--older-than", "36500d", "--yes").stdout == "0 bodies removed\n"


def test_prune_goes_through_the_journal_in_parts(send, run, database, monkeypatch):
    monkeypatch.setattr("commands.remove.CHUNK", 2)
    for number in range(5):
        send(event_id=f"evt_{number}", created_at=EARLY)
    send(event_id="evt_9", created_at=LAST)
    assert run("prune", "--older-than", LATER) == "5 bodies removed\n"
    assert kept(database) == ["evt_9"]


def test_prune_says_what_can_no_longer_be_replayed(send, runner, database):
    send(plant(event_id="evt_1", created_at=EARLY))
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("UPDATE events SET state = 'failed'")
    result = runner("prune", "--older-than", LATER)
    assert "1 of them failed and can no longer be replayed." in result.stderr


def test_late_event_after_a_prune_keeps_its_body(send, run, database):
    run("prune", "--older-than", LATER)
    send(event_id="evt_1", created_at=EARLY)
    assert kept(database) == ["evt_1"]


# the bytes


def test_redacted_bytes_go_though_the_worker_is_killed(serve, database):
    server = serve()
    server.send(plant(inquiry_id="inq_1"))
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        assert server.send(build("inquiry.redacted", inquiry_id="inq_1"))[0] == 200
        (worker,) = children(server)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: children(server) - {worker})
        assert server.send(build())[0] == 200
        assert bytes_on_disk(database)
    wait_until_gone(database)


def test_a_reader_that_holds_the_bytes_is_named(send, run, runner, database, monkeypatch):
    monkeypatch.setattr("commands.remove.READER_SECONDS", 0.3)
    send(plant(reference_id="user-1"))
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        result = runner("redact", "user-1", "--yes")
    assert result.exit_code == 1
    assert "a reader keeps the bytes in the WAL" in result.stderr
    assert run("redact", "user-1") == "0 bodies removed\n"
    assert bytes_on_disk(database) == 0
