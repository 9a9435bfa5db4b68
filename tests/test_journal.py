"""The journal: append-only, exact, and whole, whatever is done to its files."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import stat
import threading
import time

import pytest
from conftest import PAYLOADS, SECRET, back_up, build, send_together, sign, stored, wait_until

import app as kyc

# What is stored


def test_body_is_kept_to_the_byte(send, db):
    bodies = [build(), b" " + build() + b"\n", b"\xff\xfe\x00", "\ufeff{}".encode(), b"a\0b"]
    for body in bodies:
        send(body)
    for body, row in zip(bodies, db.execute("SELECT * FROM events"), strict=True):
        kept = row["body"] if isinstance(row["body"], bytes) else row["body"].encode()
        assert kept == body
        assert row["body_sha256"] == hashlib.sha256(body).hexdigest()


def test_columns_of_an_event(send, db):
    ids = {"inquiry_id": "inq_1", "account_id": "act_1", "reference_id": "user-1"}
    ids |= {"template_id": "itmpl_1", "event_id": "evt_1", "object_status": "approved"}
    send("inquiry.approved", created_at="2026-01-01T00:00:00.000Z", **ids)
    row = dict(db.execute("SELECT * FROM events").fetchone())
    for key in ("body", "body_sha256", "received_at"):
        assert row.pop(key)
    assert row == {
        **{"name": "inquiry.approved", **ids, "attempt": None, "source": "webhook"},
        **{"object_type": "inquiry", "object_id": "inq_1", "state": "processed"},
        **{"created_at": "2026-01-01T00:00:00.000Z", "error": None, "redacted_at": None},
        "signed_by": hashlib.sha256(SECRET.encode()).hexdigest()[:8],
    }


def test_further_people_that_a_body_names_are_kept(send, db):
    body = build("inquiry.approved", inquiry_id="inq_1", account_id="act_1")
    send(body.replace(b'"tags": []', b'"tags": ["inq_1", "act_2", {"of": "(inq_3)"}, "xinq_4"]'))
    mentions = db.execute("SELECT id, position FROM mentions ORDER BY id")
    assert [tuple(row) for row in mentions] == [("act_2", 1), ("inq_3", 1)]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM events",
        "UPDATE events SET event_id = 'x'",
        "UPDATE events SET name = 'x'",
        "UPDATE events SET source = 'api'",
        "UPDATE events SET signed_by = 'x'",
        "UPDATE events SET body = 'x'",
        "UPDATE events SET body_sha256 = 'x'",
        "UPDATE events SET state = 'lost'",
        "UPDATE events SET reference_id = 'x'",
        "UPDATE events SET inquiry_id = NULL",
        "UPDATE events SET rowid = 9",
    ],
)
def test_journal_is_append_only(send, db, statement):
    send("inquiry.approved", reference_id="user-1")
    with pytest.raises(sqlite3.IntegrityError):
        db.execute(statement)


def test_replace_does_not_overwrite_an_event(send, db):
    send("inquiry.approved", event_id="evt_1")
    columns = "event_id, name, created_at, received_at, source, body_sha256, state"
    values = "'evt_1', 'x', '', '', 'webhook', '', 'failed'"
    db.execute(f"REPLACE INTO events ({columns}) VALUES ({values})")  # noqa: S608
    assert db.execute("SELECT name FROM events").fetchone()[0] == "inquiry.approved"


def test_another_copy_adds_an_id_but_changes_none(send, db):
    thing = {"event_id": "evt_1", "inquiry_id": "inq_1"}
    first = build("inquiry.approved", **thing)
    assert send(first).json == {"received": True}
    for number in (1, 2):
        ids = {"account_id": f"act_{number}", "reference_id": f"user-{number}"}
        answer = send(build("inquiry.approved", **thing, **ids))
        assert answer.json == {"received": True, "duplicate": True}
    row = db.execute("SELECT account_id, reference_id, body FROM events").fetchone()
    assert tuple(row) == ("act_1", "user-1", first.decode())
    assert [row[0] for row in db.execute("SELECT reference_id FROM kyc_status")] == ["user-1"]


def test_event_that_the_database_refuses_is_stored_by_nobody(send, db, database):
    db.execute("""
        CREATE TRIGGER refuse BEFORE INSERT ON events WHEN NEW.event_id = 'evt_2'
        BEGIN SELECT RAISE(ABORT, 'no'); END
    """)
    bodies = [build(event_id=f"evt_{n}") for n in range(4)]
    assert {answer.status_code for answer in send_together(send, database, bodies)} == {503}
    assert stored(database) == []
    assert [send(body).status_code for body in bodies] == [200, 200, 503, 200]
    assert sorted(stored(database)) == ["evt_0", "evt_1", "evt_3"]


@pytest.mark.skipif(not PAYLOADS.is_dir(), reason=f"the official payloads are not in {PAYLOADS}")
def test_official_payloads_through_real_gunicorn(serve, database):
    server = serve(WEB_CONCURRENCY="2")
    bodies = {}
    for number, path in enumerate(sorted(PAYLOADS.glob("*.json"))):
        document = json.loads(path.read_text())
        event_id = document["data"]["id"] = f"evt_{number:03}"
        bodies[event_id] = json.dumps(document, indent=number % 3 or None).encode()
    assert len(bodies) == 131
    for body in bodies.values():
        assert server.send(body) == (200, b'{"received": true}\n')
    with contextlib.closing(sqlite3.connect(database)) as db:
        query = "SELECT event_id, body_sha256, body, redacted_at FROM events"
        rows = {event_id: rest for event_id, *rest in db.execute(query)}
        assert rows.keys() == bodies.keys()
        for event_id, (digest, body, redacted_at) in rows.items():
            assert digest == hashlib.sha256(bodies[event_id]).hexdigest()
            assert body == (None if redacted_at else bodies[event_id].decode())
        # The decision of 2024-03-15 is not undone by the expiry of 2024-03-16.
        query = "SELECT reference_id, status, event_at FROM kyc_status WHERE inquiry_id = ?"
        (row,) = db.execute(query, ("inq_kT4xVnR2bPmYwL9sTgD3cExZ",))
        assert row == ("act_fJ8mQpDLrYvNcBzWk5HsAxRy", "declined", "2024-03-15T18:35:04.100Z")


# The files


def test_files_are_private(send, database):
    send("inquiry.approved")
    files = list(database.parent.iterdir())
    names = {file.name.removeprefix("kyc.db") for file in files}
    assert names >= {"", "-shm", "-wal", ".gate", ".lock"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_settings_of_a_connection(app, database):
    names = ("journal_mode", "synchronous", "foreign_keys", "secure_delete", "user_version")
    with contextlib.closing(kyc.connect(database)) as db:
        values = [db.execute("PRAGMA " + name).fetchone()[0] for name in names]
    assert values == ["wal", 2, 1, 1, kyc.SCHEMA_VERSION]


def test_database_behind_a_link_is_where_it_leads(create, tmp_path):
    link, target = tmp_path / "link.db", tmp_path / "disk" / "target.db"
    target.parent.mkdir()
    link.symlink_to(target)
    client, body = create(KYC_DATABASE=str(link)).test_client(), build(event_id="evt_1")
    assert client.post("/webhook", data=body, headers=sign(body)).status_code == 200
    names = {file.name.removeprefix("target.db") for file in target.parent.iterdir()}
    assert names >= {"", "-wal", "-shm", ".lock", ".gate"}
    assert not list(tmp_path.glob("link.db?*"))
    assert stored(target) == ["evt_1"]


def test_database_at_rest_is_whole_without_its_wal(send, database, tmp_path):
    for number in range(3):
        send("inquiry.approved", event_id=f"evt_{number}")
    wait_until(lambda: database.with_name("kyc.db-wal").stat().st_size == 0)
    assert stored(shutil.copy(database, tmp_path / "copy.db")) == ["evt_0", "evt_1", "evt_2"]


def test_reader_in_the_way_of_a_redaction_holds_up_no_delivery(send, database):
    wal = database.with_name("kyc.db-wal")
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        send("inquiry.approved", inquiry_id="inq_1", reference_id="MARKER")
        send("inquiry.redacted", inquiry_id="inq_1")
        began = time.monotonic()
        for _ in range(50):
            assert send("inquiry.approved").status_code == 200
        assert time.monotonic() - began < 5
        assert b"MARKER" in wal.read_bytes()
        reader.execute("END")
    wait_until(lambda: b"MARKER" not in wal.read_bytes())


def test_forked_process_writes_with_a_connection_of_its_own(send, database):
    send("inquiry.approved", event_id="evt_0")
    wait_until(lambda: database.with_name("kyc.db-wal").stat().st_size == 0)  # no fork in between
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        os._exit(send("inquiry.approved", event_id="evt_1").status_code != 200)
    try:
        wait_until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    finally:
        os.kill(child, signal.SIGKILL)  # nothing to one that has ended
        assert os.waitpid(child, 0)[1] == 0
    assert send("inquiry.approved", event_id="evt_2").status_code == 200
    assert stored(database) == ["evt_0", "evt_1", "evt_2"]


def test_nothing_is_acknowledged_without_a_thread(send, client, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        assert send("inquiry.approved").status_code >= 500
        assert client.get("/healthz").status_code >= 500
    assert send("inquiry.approved").status_code == 200


# Files that are taken away or replaced


@pytest.fixture
def files(send, database):
    """The paths of the database, another name for it, its WAL, and a copy with evt_0 alone."""
    names = ("kyc.db", "aside.db", "kyc.db-wal", "copy.db")
    paths = [database.with_name(name) for name in names]
    assert send("inquiry.approved", event_id="evt_0").status_code == 200
    back_up(database, paths[-1])
    return paths


def test_backup_put_in_place_of_the_database_is_taken_over(files, send):
    database, aside, _, copy = files
    send("inquiry.approved", event_id="evt_1")
    database.rename(aside)
    copy.rename(database)
    assert send("inquiry.approved", event_id="evt_2").status_code == 200
    assert stored(aside) == ["evt_0", "evt_1"]
    assert stored(database) == ["evt_0", "evt_2"]


def test_replaced_database_keeps_what_a_reader_holds_up(files, send):
    database, aside, _, copy = files
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT 1 FROM events").fetchone()
        send("inquiry.approved", event_id="evt_1")
        database.rename(aside)
        copy.rename(database)
        assert send("inquiry.approved", event_id="evt_2").status_code == 200
    (kept,) = database.parent.glob("kyc.db-wal.*")
    kept.rename(aside.with_name("aside.db-wal"))
    assert stored(aside) == ["evt_0", "evt_1"]
    assert stored(database) == ["evt_0", "evt_2"]


def test_process_at_rest_lets_go_of_a_database_that_was_replaced(files, send):
    database, aside, wal, copy = files
    send("inquiry.approved", event_id="evt_1")
    before = copy.read_bytes()
    database.rename(aside)
    copy.rename(database)
    wait_until(lambda: not wal.exists())
    assert stored(aside) == ["evt_0", "evt_1"]
    assert database.read_bytes() == before
    with contextlib.closing(sqlite3.connect(database)) as stranger, stranger:
        stranger.execute("CREATE TABLE notes (note TEXT)")
    assert send("inquiry.approved", event_id="evt_2").status_code == 200
    assert stored(database) == ["evt_0", "evt_2"]
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("SELECT count(*) FROM notes").fetchone()[0] == 0


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_nothing_is_acknowledged_while_the_wal_is_gone(app, create, files, send, suffix):
    database, aside, *_ = files
    file = database.with_name("kyc.db" + suffix)
    file.rename(aside)
    response = send("inquiry.approved", event_id="evt_1")
    assert response.status_code == 503
    assert response.json["reason"] == (
        "the WAL or its index is gone: bring it back, or stop and start"
    )
    aside.rename(file)
    assert send("inquiry.approved", event_id="evt_1").status_code == 200
    file.unlink()
    assert send("inquiry.approved", event_id="evt_2").status_code == 503
    app.extensions["journal"].stop()
    client, body = create().test_client(), build(event_id="evt_3")
    assert client.post("/webhook", data=body, headers=sign(body)).status_code == 200
    assert stored(database) == ["evt_0", "evt_1", "evt_3"]


def test_process_at_rest_saves_a_wal_that_was_removed(files, send):
    database, aside, wal, _ = files
    send("inquiry.approved", event_id="evt_1")
    wal.unlink()
    database.with_name("kyc.db-shm").unlink()
    wait_until(lambda: stored(shutil.copy(database, aside)) == ["evt_0", "evt_1"])


def test_last_to_close_saves_a_wal_that_was_removed(app, files, send):
    database, _, wal, _ = files
    send("inquiry.approved", event_id="evt_1")
    wal.unlink()
    wal.touch()  # as a process that could not start leaves it
    assert send("inquiry.approved", event_id="evt_2").status_code == 503
    app.extensions["journal"].stop()
    assert stored(database) == ["evt_0", "evt_1"]
