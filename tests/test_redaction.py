"""Redaction: what is removed, what stays, and that the bytes are gone."""

import contextlib
import itertools
import json
import os
import signal
import sqlite3
import time

import pytest
from conftest import build, children, sign, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app as kyc

MARKER = "Zyxwvut-Personal-Marker"
EARLY, LATER, LAST = (f"2026-01-0{day}T00:00:00.000Z" for day in (1, 2, 3))


def plant(name="inquiry.approved", pages=3, **ids):
    """Return the body of an event that carries personal data, on several pages of the file."""
    event = kyc.build_event(name, **ids)
    attributes = event["data"]["attributes"]["payload"]["data"]["attributes"]
    attributes["name-first"] = [MARKER] * (pages * 4096 // len(MARKER))
    return json.dumps(event).encode()


def bytes_on_disk(database):
    """Return how often the marker stands in the database and its WAL."""
    files = (database, database.with_name(database.name + "-wal"))
    return sum(file.read_bytes().count(MARKER.encode()) for file in files if file.exists())


def wait_until_gone(database, seconds=10):
    """Wait for the service to empty its WAL."""
    deadline = time.monotonic() + seconds
    while bytes_on_disk(database) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert bytes_on_disk(database) == 0


def query(database, statement):
    """Return the rows of a query, by a connection of its own."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        return db.execute(statement).fetchall()


def kept(database):
    """Return the IDs of the events that still have their body."""
    rows = query(database, "SELECT event_id FROM events WHERE body IS NOT NULL ORDER BY 1")
    return [row[0] for row in rows]


@pytest.mark.parametrize("subject", ["inq_1", "act_1", "user-1"])
def test_redacted_bytes_are_gone_while_the_service_runs(serve, flask, database, subject):
    server = serve()
    ids = {"inquiry_id": "inq_1", "account_id": "act_1", "reference_id": "user-1"}
    for name in ("inquiry.completed", "inquiry.approved", "report/watchlist.matched"):
        server.send(plant(name, **ids))
    assert bytes_on_disk(database) > 100
    output = flask("redact", subject, PERSONA_WEBHOOK_SECRET="").stdout
    assert output == "3 bodies removed\n"
    assert bytes_on_disk(database) == 0
    assert server.send(build("inquiry.approved"))[0] == 200


def test_metadata_hash_and_status_outlive_the_body(serve, flask, database):
    serve().send(plant(inquiry_id="inq_1", reference_id="user-1", event_id="evt_1"))
    columns = "SELECT event_id, name, created_at, body_sha256, inquiry_id, reference_id FROM events"
    before = query(database, columns), query(database, "SELECT * FROM kyc_status")
    flask("redact", "user-1")
    assert (query(database, columns), query(database, "SELECT * FROM kyc_status")) == before
    assert query(database, "SELECT redacted_at IS NOT NULL FROM events") == [(1,)]


def test_redaction_leaves_others_alone(serve, flask, database):
    server = serve()
    server.send(plant(inquiry_id="inq_1", event_id="evt_1", reference_id="user-1"))
    server.send(plant(inquiry_id="inq_2", event_id="evt_2", reference_id="user-2"))
    flask("redact", "user-1")
    assert kept(database) == ["evt_2"]


def test_redacted_inquiry_leaves_the_account(send, database):
    send(plant("account.created", account_id="act_1", event_id="evt_1"))
    send(plant(inquiry_id="inq_1", account_id="act_1", event_id="evt_2"))
    send("inquiry.redacted", inquiry_id="inq_1", account_id="act_1", event_id="evt_3")
    assert kept(database) == ["evt_1"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_redacted_person_includes_what_names_only_the_account(serve, flask, database, late):
    server = serve()
    server.send(plant(inquiry_id="inq_1", account_id="act_1", reference_id="user-1"))
    alone = plant("account.created", account_id="act_1", created_at=EARLY)
    if not late:
        server.send(alone)
    flask("redact", "user-1")
    if late:
        server.send(alone)
    assert kept(database) == []


def test_prune_removes_old_bodies_only(serve, flask, database):
    server = serve()
    server.send(plant(event_id="evt_1", created_at=EARLY))
    server.send(build(event_id="evt_2", created_at=LAST))
    assert flask("prune", "--older-than", LATER).stdout == "1 body removed\n"
    assert kept(database) == ["evt_2"]
    assert bytes_on_disk(database) == 0
    assert flask("prune", "--older-than", "36500d").stdout == "0 bodies removed\n"


def test_prune_says_what_can_no_longer_be_replayed(serve, flask, database):
    serve().send(plant(event_id="evt_1", created_at=EARLY))
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("UPDATE events SET state = 'failed', error = 'ValueError: ' || ?", (MARKER,))
    flask("prune", "--older-than", "1d")
    assert query(database, "SELECT error FROM events") == [("ValueError",)]
    assert bytes_on_disk(database) == 0


@pytest.mark.parametrize("name", ["inquiry.redacted", "account.redacted"])
def test_redaction_at_persona_removes_the_bytes_here(serve, database, name):
    server = serve()
    ids = {"inquiry_id": "inq_1", "account_id": "act_1"}
    for earlier in ("inquiry.created", "inquiry.approved", "report/watchlist.matched"):
        server.send(plant(earlier, created_at=EARLY, **ids))
    server.send(build(name, created_at=LATER, **ids))
    assert kept(database) == []
    wait_until_gone(database)
    assert query(database, "SELECT status FROM kyc_status") == [("approved",)]


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


def test_late_event_after_the_command_is_stored_without_body(serve, flask, database):
    server = serve()
    server.send(plant(reference_id="user-1", inquiry_id="inq_1"))
    flask("redact", "user-1")
    server.send(plant(reference_id="user-1", inquiry_id="inq_2", created_at=EARLY))
    assert kept(database) == []
    server.send(build(reference_id="user-1", inquiry_id="inq_1", event_id="evt_new"))
    assert kept(database) == ["evt_new"]


def test_redaction_reaches_inquiries_that_name_their_account_later(send, database):
    send("account.redacted", account_id="act_1", created_at=LATER)
    send("inquiry.created", inquiry_id="inq_1", created_at=EARLY, event_id="evt_1")
    assert kept(database) == ["evt_1"]
    send("inquiry.approved", inquiry_id="inq_1", account_id="act_1", created_at=EARLY)
    assert kept(database) == []


def test_body_that_holds_a_redaction_twice_is_not_restored(client, database):
    body = plant(inquiry_id="inq_1", created_at=EARLY)
    client.post("/webhook", data=body, headers=sign(body))
    redaction = build("inquiry.redacted", inquiry_id="inq_1", created_at=LATER)
    for again in (redaction, redaction, body):
        assert client.post("/webhook", data=again, headers=sign(again)).status_code == 200
    assert kept(database) == []


EVENTS = (
    ("account.created", EARLY, {"account_id": "act_1", "reference_id": "user-1"}),
    ("inquiry.created", EARLY, {"inquiry_id": "inq_1"}),
    ("inquiry.approved", EARLY, {"inquiry_id": "inq_1", "account_id": "act_1"}),
    ("inquiry.created", EARLY, {"inquiry_id": "inq_2", "reference_id": "user-1"}),
    ("inquiry.failed", LAST, {"inquiry_id": "inq_2", "reference_id": "user-1"}),
    ("inquiry.approved", EARLY, {"inquiry_id": "inq_3", "account_id": "act_2"}),
    ("account.redacted", LATER, {"account_id": "act_1"}),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(len(EVENTS))))
def test_any_order_of_arrival_removes_the_same_bodies(tmp_path_factory, order):
    database = tmp_path_factory.mktemp("order") / "kyc.db"
    kyc.prepare_database(database)
    journal = kyc.Journal(database)
    for number in order:
        name, created_at, ids = EVENTS[number]
        body = build(name, event_id=f"evt_{number}", created_at=created_at, **ids)
        journal.commit([kyc.Delivery(kyc.read_event(body, LAST), body, LAST)])
    journal.close()
    assert kept(database) == ["evt_3", "evt_4", "evt_5"]


@pytest.mark.parametrize("redaction", range(5))
def test_person_includes_the_account_of_their_inquiry_in_any_order(app, db, database, redaction):
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
            store(app, body)
        with kyc.transaction(db):
            kyc.redact(db, person, kyc.LATEST, kyc.LATEST)
        for body in bodies[redaction:]:
            store(app, body)
    assert kept(database) == []


def test_person_of_a_shared_case_keeps_what_is_theirs(send, database):
    send(plant(inquiry_id="inq_2", account_id="act_2", event_id="evt_1"))
    send(plant("case.created", inquiry_id="inq_2", account_id="act_1", event_id="evt_2"))
    send("account.redacted", account_id="act_1", event_id="evt_3")
    assert kept(database) == ["evt_1"]


def test_your_id_of_a_transaction_is_nobodys(serve, flask, database):
    server = serve()
    server.send(plant("transaction.created", reference_id="42", event_id="evt_1"))
    server.send(plant("inquiry.approved", reference_id="42", event_id="evt_2"))
    assert flask("redact", "42").stdout == "1 body removed\n"
    assert kept(database) == ["evt_1"]


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


def test_body_without_an_event_can_be_redacted_by_the_id_it_was_given(serve, flask, database):
    serve().send(MARKER.encode())
    ((event_id,),) = query(database, "SELECT event_id FROM events")
    assert flask("redact", event_id).stdout == "1 body removed\n"
    assert bytes_on_disk(database) == 0


def store(app, body):
    """Put an event into the journal."""
    delivery = kyc.Delivery(kyc.read_event(body, EARLY), body, EARLY)
    assert app.extensions["journal"].append(delivery) == kyc.STORED


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


def test_a_reader_that_holds_the_bytes_is_named(serve, flask, database):
    serve().send(plant(reference_id="user-1"))
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        process = flask("redact", "user-1", check=False)
    assert process.returncode == 1
    assert "a reader keeps the bytes in the WAL" in process.stderr
    assert flask("redact", "user-1").stdout == "0 bodies removed\n"
    assert bytes_on_disk(database) == 0
