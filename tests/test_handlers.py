"""Handlers: in the event's transaction, all or nothing, healed by redelivery."""

import sqlite3

import pytest
from conftest import build, wait_until

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
    """Return state and error of the only event, and how many notes there are."""
    state, error = db.execute("SELECT state, error FROM events").fetchone()
    return state, error, db.execute("SELECT count(*) FROM notes").fetchone()[0]


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
    "error", [SystemExit(1), KeyboardInterrupt(), sqlite3.OperationalError("x")]
)
def test_no_exception_of_a_handler_harms_the_writer(send, db, notes, error):
    notes["error"] = error
    assert send("inquiry.approved").status_code == 500
    assert row(db)[0] == "failed"
    notes["error"] = None
    assert send("inquiry.approved").status_code == 200


def test_failing_handler_fails_its_event_alone(app, db, handlers):
    @kyc.on("inquiry.approved")
    def fail(db, event):
        if event.event_id == "evt_2":
            raise ValueError

    journal = app.extensions["journal"]
    events = [kyc.Event(f"evt_{n}", "inquiry.approved", kyc.utc_now()) for n in range(5)]
    batch = [kyc.Delivery(event, b"{}", kyc.utc_now()) for event in events]
    journal.commit(batch)
    outcomes = [delivery.outcome for delivery in batch]
    assert outcomes == ["stored", "stored", "failed", "stored", "stored"]


@pytest.mark.parametrize(
    "meddle",
    [
        lambda db: db.commit(),
        lambda db: db.rollback(),
        lambda db: db.execute("COMMIT"),
        lambda db: db.execute("END"),
        lambda db: db.executescript("SELECT 1"),
        lambda db: db.execute("RELEASE handlers"),
    ],
)
def test_handler_cannot_end_the_transaction(send, db, handlers, meddle):
    @kyc.on("inquiry.approved")
    def finish(db, event):
        meddle(db)

    assert send("inquiry.approved").status_code == 500
    assert db.execute("SELECT state FROM events").fetchone()[0] == "failed"
    assert send("inquiry.declined").status_code == 200


def test_error_begins_with_its_kind_so_that_redaction_can_cut_the_rest():
    for error in (
        SyntaxError("at Jane", ("x", 1, 1, "Jane")),
        ValueError("Jane"),
        KeyError("Jane"),
    ):
        assert kyc.explain_error(error).partition(":")[0] == type(error).__name__
    silent = ValueError()
    silent.add_note("Jane")
    assert kyc.explain_error(silent) == "ValueError"


@pytest.mark.parametrize("text", ["\ud800", "x" * 5_000_000])
def test_odd_error_text_is_kept_as_far_as_it_can_be(send, db, notes, text):
    notes["error"] = ValueError(text)
    assert send("inquiry.approved").status_code == 500
    state, error, _ = row(db)
    assert (state, error[:11]) == ("failed", "ValueError:")
    assert len(error) <= 1000


def test_error_of_a_redacted_event_is_only_its_kind(send, db, notes):
    notes["error"] = ValueError("marker")
    ids = {"inquiry_id": "inq_1", "created_at": "2026-01-01T00:00:00.000Z"}
    body = build("inquiry.approved", event_id="evt_1", **ids)
    send(body)
    send("inquiry.redacted", inquiry_id="inq_1")
    send(body)
    query = "SELECT state, error FROM events WHERE event_id = 'evt_1'"
    assert tuple(db.execute(query).fetchone()) == ("failed", "ValueError")


def test_handler_cannot_change_how_rows_are_read(send, db, handlers):
    runs = []

    @kyc.on("inquiry.approved")
    def meddle(db, event):
        db.text_factory, db.row_factory = bytes, None
        runs.append(event.event_id)

    body = build("inquiry.approved")
    assert send(body).json == {"received": True}
    assert send(body).json == {"received": True, "duplicate": True}
    assert len(runs) == 1


def test_open_cursor_of_a_handler_fails_its_event_alone(app, db, handlers):
    db.execute("CREATE TABLE notes (event_id TEXT)")
    cursors = []

    @kyc.on("inquiry.approved")
    def keep(db, event):
        cursors.append(db.execute("INSERT INTO notes VALUES (1), (2) RETURNING event_id"))
        cursors[-1].fetchone()

    names = ["inquiry.created", "inquiry.approved", "inquiry.declined"]
    events = [kyc.Event(f"evt_{name}", name, kyc.utc_now()) for name in names]
    batch = [kyc.Delivery(event, b"{}", kyc.utc_now()) for event in events]
    app.extensions["journal"].settle(batch)
    cursors.clear()
    assert [delivery.outcome for delivery in batch] == ["stored", "failed", "stored"]
    assert db.execute("SELECT count(*) FROM notes").fetchone()[0] == 0


def test_personal_data_in_an_error_stays_out_of_log_and_answer(send, db, notes, log):
    notes["error"] = ValueError("marker Jane Doe")
    assert "marker" not in send("inquiry.approved").text
    wait_until(lambda: "outcome=failed" in log.text)
    assert "marker" not in log.text
    assert "marker" in row(db)[1]
