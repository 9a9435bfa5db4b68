"""The journal: append-only, exact, durable, and open again after every failure."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PAYLOADS, ROOT, build, locked_file, readers, sign, wait_until

import app as kyc


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
    send("inquiry.approved", event_id="evt_1", created_at="2026-01-01T00:00:00.000Z", **ids)
    row = dict(db.execute("SELECT * FROM events").fetchone())
    for key in ("body", "body_sha256", "received_at"):
        assert row.pop(key)
    assert row == {
        **{"event_id": "evt_1", "name": "inquiry.approved", **ids, "attempt": None},
        **{"object_type": "inquiry", "object_id": "inq_1", "state": "processed"},
        **{"created_at": "2026-01-01T00:00:00.000Z", "error": None, "redacted_at": None},
    }


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM events",
        "UPDATE events SET name = 'x'",
        "UPDATE events SET event_id = 'x'",
        "UPDATE events SET body = 'x'",
        "UPDATE events SET body_sha256 = 'x'",
        "UPDATE events SET rowid = 9",
        "UPDATE events SET state = 'lost'",
    ],
)
def test_journal_is_append_only(send, db, statement):
    send("inquiry.approved")
    with pytest.raises(sqlite3.IntegrityError):
        db.execute(statement)


def test_replace_does_not_overwrite_an_event(send, db):
    send("inquiry.approved", event_id="evt_1")
    columns = "event_id, name, created_at, received_at, body_sha256, state"
    db.execute(f"REPLACE INTO events ({columns}) VALUES ('evt_1', 'x', '', '', '', 'failed')")  # noqa: S608
    assert db.execute("SELECT name FROM events").fetchone()[0] == "inquiry.approved"


def test_files_are_private(app, send, database):
    send("inquiry.approved")
    files = sorted(database.parent.iterdir())
    names = [file.name for file in files]
    assert names == ["kyc.db", "kyc.db-shm", "kyc.db-wal", "kyc.db.lock"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_journal_settings(app, send):
    send("inquiry.approved")
    db = app.extensions["journal"].open()
    settings = ("journal_mode", "synchronous", "foreign_keys", "secure_delete", "user_version")
    values = [db.execute("PRAGMA " + name).fetchone()[0] for name in settings]
    assert values == ["wal", 2, 1, 1, kyc.SCHEMA_VERSION]


def test_database_behind_a_link_is_where_it_leads(environ, tmp_path):
    link, target = tmp_path / "link.db", tmp_path / "disk" / "target.db"
    target.parent.mkdir()
    link.symlink_to(target)
    app = kyc.create_app({**environ, "KYC_DATABASE": str(link)})
    body = build(event_id="evt_1")
    assert app.test_client().post("/webhook", data=body, headers=sign(body)).status_code == 200
    names = {file.name for file in target.parent.iterdir()}
    assert names == {"target.db" + suffix for suffix in ("", "-wal", "-shm", ".lock")}
    app.extensions["journal"].stop()
    assert stored(target) == ["evt_1"]


def test_probe_leaves_the_version_of_the_schema(app, checkpointer, db, database):
    db.execute("PRAGMA user_version = 2")
    size = database.with_name("kyc.db-wal").stat().st_size
    app.extensions["journal"].append(kyc.Delivery())
    assert db.execute("PRAGMA user_version").fetchone()[0] == 2
    assert database.with_name("kyc.db-wal").stat().st_size > size


def test_schema_applied_twice_changes_nothing(app, send, db, environ):
    send("inquiry.approved")
    before = list(map(tuple, db.execute("SELECT * FROM sqlite_schema")))
    kyc.create_app(environ)
    db.executescript(kyc.SCHEMA.read_text())
    assert list(map(tuple, db.execute("SELECT * FROM sqlite_schema"))) == before
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 1


def test_concurrent_requests_are_each_stored_once(app, db):
    bodies = [build() for _ in range(40)]
    answers = []

    def post(body):
        client = app.test_client()
        answers.append(client.post("/webhook", data=body, headers=sign(body)).status_code)

    threads = [threading.Thread(target=post, args=(body,)) for body in bodies * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 120
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 40


def test_poisonous_delivery_fails_alone(app, db):
    class Poison(kyc.Delivery):
        def row(self):
            raise RuntimeError

    events = [kyc.Event(f"evt_{n}", "a.b", kyc.utc_now()) for n in range(4)]
    batch = [kyc.Delivery(event, b"{}", kyc.utc_now()) for event in events]
    batch[2] = Poison(events[2], b"{}", kyc.utc_now())
    app.extensions["journal"].settle(batch)
    assert [delivery.outcome for delivery in batch] == ["stored", "stored", None, "stored"]
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 3


def test_locked_database_is_a_503_in_time_and_recovers(app, send, db, monkeypatch):
    monkeypatch.setattr(kyc, "BUSY_SECONDS", 0.2)
    db.execute("BEGIN IMMEDIATE")
    answer = send("inquiry.approved")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert answer.json == {"error": "The event could not be stored", "reason": "database is locked"}
    db.execute("ROLLBACK")
    assert send("inquiry.approved").status_code == 200


def test_held_lock_file_is_a_503_in_time_and_recovers(app, send, database, monkeypatch):
    monkeypatch.setattr(kyc, "ANSWER_SECONDS", 0.2)
    with kyc.write_lock(database):
        started = time.monotonic()
        assert send("inquiry.approved", event_id="evt_1").status_code == 503
        assert time.monotonic() - started < 2
    monkeypatch.setattr(kyc, "ANSWER_SECONDS", 4)
    assert send("inquiry.approved", event_id="evt_2").status_code == 200


def test_stop_finishes_what_is_in_line(app, db, database):
    journal = app.extensions["journal"]
    events = [kyc.Event(f"evt_{n}", "a.b", kyc.utc_now()) for n in range(5)]
    with kyc.write_lock(database):
        for event in events:
            journal.line.put(kyc.Delivery(event, b"{}", kyc.utc_now()))
        journal.start()
    journal.stop()
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 5


def test_workers_take_a_core_each(serve):
    server = serve(WEB_CONCURRENCY="2")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")

    def masks():
        server.send(build())
        return [os.sched_getaffinity(int(pid)) for pid in children.read_text().split()]

    wait_until(lambda: [len(mask) for mask in masks()] == [1, 1])
    assert len(set().union(*masks())) == min(2, len(os.sched_getaffinity(0)))


def test_line_is_bounded_while_the_database_is_stuck(app, send, database, monkeypatch):
    monkeypatch.setattr(kyc, "ANSWER_SECONDS", 0.01)
    monkeypatch.setattr(kyc, "MAX_WAITING", 5)
    with kyc.write_lock(database):
        answers = [send("inquiry.approved") for _ in range(10)]
        assert {answer.status_code for answer in answers} == {503}
        assert app.extensions["journal"].line.qsize() <= 5


def test_missing_database_is_a_503_until_it_is_back(app, send, client, database):
    assert send("inquiry.approved").status_code == 200
    away = database.with_name("away.db")
    database.rename(away)
    assert send("inquiry.approved").status_code == 503
    health = client.get("/healthz")
    assert (health.status_code, health.json["status"]) == (503, "unavailable")
    assert str(database) not in health.text
    assert not database.exists()
    away.rename(database)
    assert send("inquiry.approved").status_code == 200


def test_forked_process_writes_with_a_connection_of_its_own(checkpointer, send, db):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(send("inquiry.approved").status_code != 200)
        finally:
            os._exit(status)
    assert exit_status(child) == 0
    assert send("inquiry.approved").status_code == 200
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 3


def exit_status(child):
    """Wait for a forked process, and kill it when it does not end."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    try:
        wait_until(lambda: os.waitid(os.P_PID, child, options))
    finally:
        os.kill(child, signal.SIGKILL)  # nothing to one that has ended
        status = os.waitpid(child, 0)[1]
    return status


TAKE_TURNS = """
import os, sys, time
from pathlib import Path
import app as kyc
letter, database, order = sys.argv[1:]
order = os.open(order, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for _ in range(150):
    with kyc.turn(Path(database)):
        os.write(order, letter.encode())
        time.sleep(0.002)
"""


@pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLKW"), reason="there is no gate")
def test_processes_take_turns(database, tmp_path):
    order, environ = tmp_path / "order", os.environ | {"FLASK_RUN_FROM_CLI": "true"}
    command = [sys.executable, "-c", TAKE_TURNS]
    children = [
        subprocess.Popen([*command, letter, database, order], env=environ, cwd=ROOT)
        for letter in "abc"
    ]
    try:
        assert [child.wait(30) for child in children] == [0, 0, 0]
    finally:
        for child in children:
            child.kill()
    turns = order.read_text()
    together = turns[max(map(turns.index, "abc")) : min(map(turns.rindex, "abc"))]
    handed_on = sum(one != next for one, next in itertools.pairwise(together))
    assert handed_on > 0.9 * len(together) > 0


def test_wal_stays_bounded_beside_a_reader_that_comes_and_goes(app, database, monkeypatch):
    monkeypatch.setattr(kyc, "CHECKPOINT_PAGES", 100)
    monkeypatch.setattr(kyc, "WAL_PAGES", 300)
    journal = app.extensions["journal"]
    journal.checkpointer.limit = 300
    with readers(database, 1):
        for number in range(600):
            event = kyc.Event(f"evt_{number}", "a.b", kyc.utc_now())
            journal.append(kyc.Delivery(event, b"x" * 3000, kyc.utc_now()))
    assert database.with_name("kyc.db-wal").stat().st_size < 600 * 4120


def test_no_delivery_waits_for_a_checkpoint(app, send, monkeypatch):
    begun, end = threading.Event(), threading.Event()

    def run(*_):
        begun.set()
        assert end.wait(10)

    monkeypatch.setattr(kyc, "CHECKPOINT_PAGES", 1)
    monkeypatch.setattr(app.extensions["journal"].checkpointer, "run", run)
    send("inquiry.approved")
    assert begun.wait(10)
    for _ in range(20):
        assert send("inquiry.approved").status_code == 200
    end.set()


@pytest.fixture
def checkpointer(app, send):
    """What copies the WAL, after an event and the checkpoint of the start."""
    checkpointer = app.extensions["journal"].checkpointer
    send("inquiry.approved", event_id="evt_0")
    wait_until(lambda: not checkpointer.scrub)
    checkpointer.join()
    return checkpointer


def test_checkpoint_copies_the_wal_so_that_it_starts_anew(checkpointer, send, database):
    wal = database.with_name("kyc.db-wal")
    checkpointer.limit = 0
    for _ in range(100):
        send("inquiry.approved")
    size = wal.stat().st_size
    checkpointer.run(checkpointer.db, checkpointer.reader)
    assert database.stat().st_size > 100 * 1000
    for _ in range(50):
        send("inquiry.approved")
    assert wal.stat().st_size == size


def test_checkpoint_syncs_the_database_before_its_turn(checkpointer, send, database, monkeypatch):
    synced = []
    checkpointer.limit = 0
    for _ in range(100):
        send("inquiry.approved")

    def sync(descriptor):
        assert Path(f"/proc/self/fd/{descriptor}").samefile(database)
        with open(f"{database}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        synced.append(descriptor)

    monkeypatch.setattr(os, "fdatasync", sync)
    checkpointer.run(checkpointer.db, checkpointer.reader)
    assert synced


def test_checkpoint_of_another_database_is_no_scrub(checkpointer, database):
    checkpointer.scrub = True
    with contextlib.closing(kyc.connect(database)) as other:
        checkpointer.run(other, checkpointer.reader)
    assert checkpointer.scrub


def test_no_commit_starts_the_wal_anew_during_a_checkpoint(checkpointer, send, database):
    for _ in range(20):
        send("inquiry.approved")
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:

        class Connection:
            """Have all pages copied, and one written, at the moment a checkpoint begins."""

            def execute(self, statement):
                if statement == "PRAGMA wal_checkpoint":
                    assert other.execute(statement).fetchone()[0] == 0
                    size = wal_pages(other)
                    send("inquiry.approved")
                    assert wal_pages(other) > size
                return checkpointer.db.execute(statement)

        checkpointer.run(Connection(), checkpointer.reader)


def wal_pages(db):
    """Return how many pages the WAL has."""
    return db.execute("PRAGMA wal_checkpoint").fetchone()[1]


def test_checkpoint_that_fails_is_logged(checkpointer, send, monkeypatch, log):
    for _ in range(100):
        send("inquiry.approved")
    monkeypatch.setattr(os, "fdatasync", fail)
    checkpointer.run(checkpointer.db, checkpointer.reader)
    assert "the WAL could not be copied, to be tried again: Input/output error" in log.text
    assert send("inquiry.approved").status_code == 200


def test_pages_that_a_failed_sync_has_lost_are_copied_again(
    app, checkpointer, send, database, monkeypatch
):
    before = database.with_name("before")
    subprocess.run(["cp", database, before], check=True)
    for number in range(1, 100):
        send("inquiry.approved", event_id=f"evt_{number}")

    def lose(_):
        subprocess.run(["cp", before, database], check=True)
        fail(_)

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", lose)
        checkpointer.run(checkpointer.db, checkpointer.reader)
    checkpointer.limit = 0
    checkpointer.run(checkpointer.db, checkpointer.reader)
    app.extensions["journal"].close()
    assert stored(database) == [f"evt_{number}" for number in range(100)]


def copied_pages(database):
    """Return the count of copied pages in the WAL index."""
    return struct.unpack("I", database.with_name("kyc.db-shm").read_bytes()[96:100])[0]


def test_failed_checkpoint_is_made_anew_from_the_start(checkpointer, send, database):
    send("inquiry.approved")
    kyc.checkpoint(checkpointer.db, database, kyc.COPY_WAL)
    assert copied_pages(database) > 0

    class Connection:
        """Fail as SQLite does when the disk is broken."""

        def execute(self, statement):
            raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        kyc.checkpoint(Connection(), database, kyc.EMPTY_WAL)
    assert copied_pages(database) == 0


def test_count_of_copied_pages_is_set_when_no_checkpoint_is_under_way(tmp_path):
    index = tmp_path / "kyc.db-shm"
    index.write_bytes(b"1" * 200)
    code = """if True:
        import fcntl, sys
        file = open(sys.argv[1], "r+b")
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 121)
        print("locked", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", code, index]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
        index.open("r+b") as file,
    ):
        assert other.stdout.readline() == b"locked\n"
        thread = threading.Thread(target=kyc.reset_copied, args=[file.fileno()])
        thread.start()
        time.sleep(0.2)
        assert index.read_bytes() == b"1" * 200
        other.stdin.close()
        thread.join(15)
        assert index.read_bytes() == b"1" * 96 + bytes(4) + b"1" * 100


def fail(_):
    """Do as a broken disk does."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_backup_put_in_place_of_the_database_is_taken_over(app, send, database, flask):
    aside, copy = database.with_name("aside.db"), database.with_name("copy.db")
    send("inquiry.approved", event_id="evt_1")
    flask("backup", str(copy))
    send("inquiry.approved", event_id="evt_2")
    database.rename(aside)
    copy.rename(database)
    assert send("inquiry.approved", event_id="evt_3").status_code == 200
    assert stored(aside) == ["evt_1", "evt_2"]
    assert stored(database) == ["evt_1", "evt_3"]
    assert os.fspath(aside) not in open_files()


def test_replaced_database_keeps_what_a_reader_holds_up(checkpointer, app, send, database, flask):
    aside, copy = database.with_name("aside.db"), database.with_name("copy.db")
    flask("backup", str(copy))
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


def test_database_replaced_while_it_is_opened_is_noticed(
    checkpointer, app, send, database, flask, monkeypatch
):
    journal, copy = app.extensions["journal"], database.with_name("copy.db")
    flask("backup", str(copy))
    journal.close()
    with monkeypatch.context() as moment:
        moment.setattr(journal, "sync_wal", lambda: copy.rename(database))
        assert send("inquiry.approved", event_id="evt_1").status_code == 503
    assert send("inquiry.approved", event_id="evt_2").status_code == 200
    assert stored(database) == ["evt_0", "evt_2"]


def test_removed_wal_takes_no_space(checkpointer, app, send, database, monkeypatch):
    app.extensions["journal"].close()  # as after a failure; the WAL goes
    with monkeypatch.context() as broken:
        broken.setattr(kyc, "connect", lambda *_: fail(None))
        assert send("inquiry.approved").status_code == 503
    assert not [path for path in open_files() if path.startswith(f"{database}-")]


def test_wal_of_another_process_is_not_removed(app, send, database, flask):
    copy, wal = database.with_name("copy.db"), database.with_name("kyc.db-wal")
    send("inquiry.approved", event_id="evt_1")
    flask("backup", str(copy))
    app.extensions["journal"].close()  # as after a failure; the WAL goes, and its inode is free
    copy.rename(database)
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        with other:
            other.execute("INSERT INTO redactions VALUES ('act_1', '')")
        inode = wal.stat().st_ino
        assert send("inquiry.approved", event_id="evt_2").status_code == 200
        assert wal.stat().st_ino == inode
    assert stored(database) == ["evt_1", "evt_2"]


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_nothing_is_acknowledged_while_the_wal_is_gone(app, checkpointer, send, database, suffix):
    file, away = database.with_name("kyc.db" + suffix), database.with_name("away")
    file.rename(away)
    response = send("inquiry.approved", event_id="evt_2")
    assert response.status_code == 503
    assert response.json["reason"] == "the WAL is gone: bring it back, or stop and start"
    away.rename(file)
    assert send("inquiry.approved", event_id="evt_2").status_code == 200
    file.unlink()
    assert send("inquiry.approved", event_id="evt_3").status_code == 503
    app.extensions["journal"].close()
    assert stored(database) == ["evt_0", "evt_2"]


def test_process_at_rest_notices_that_the_wal_is_gone(app, checkpointer, send, database):
    send("inquiry.approved", event_id="evt_1")
    for suffix in ("-wal", "-shm"):
        database.with_name("kyc.db" + suffix).unlink()
    wait_until(lambda: checkpointer.db is None)
    shutil.copy(database, database.with_name("copy.db"))
    assert stored(database.with_name("copy.db")) == ["evt_0", "evt_1"]


def test_process_at_rest_lets_go_of_a_database_that_was_replaced(app, send, database, flask):
    aside, copy = database.with_name("aside.db"), database.with_name("copy.db")
    send("inquiry.approved", event_id="evt_1")
    flask("backup", str(copy))
    send("inquiry.approved", event_id="evt_2")
    before = copy.read_bytes()
    database.rename(aside)
    copy.rename(database)
    wait_until(lambda: app.extensions["journal"].db is None)
    wait_until(lambda: not database.with_name("kyc.db-wal").exists())
    assert stored(aside) == ["evt_1", "evt_2"]
    assert database.read_bytes() == before
    assert send("inquiry.approved", event_id="evt_3").status_code == 200
    assert stored(database) == ["evt_1", "evt_3"]


def test_lock_that_is_held_at_rest_holds_up_no_delivery_for_long(app, send, database):
    send("inquiry.approved")
    with locked_file(database):
        wait_until(lambda: app.extensions["journal"].stuck)
        time.sleep(4)
        began = time.monotonic()
        assert send("inquiry.approved").status_code == 503
        assert time.monotonic() - began < 2
    assert send("inquiry.approved").status_code == 200


def test_wal_that_rests_is_emptied(checkpointer, send, database):
    send("inquiry.approved", event_id="evt_1")
    wait_until(lambda: database.with_name("kyc.db-wal").stat().st_size == 0)
    shutil.copy(database, database.with_name("copy.db"))
    assert stored(database.with_name("copy.db")) == ["evt_0", "evt_1"]


def test_folder_that_cannot_be_looked_into_is_a_503_with_the_reason(app, send, database):
    folder = database.parent / "data"
    folder.mkdir()
    journal = app.extensions["journal"]
    journal.path = journal.checkpointer.path = folder / "kyc.db"
    kyc.prepare_database(journal.path)
    assert send("inquiry.approved", event_id="evt_1").status_code == 200
    folder.rename(database.parent / "away")
    folder.touch()
    response = send("inquiry.approved", event_id="evt_2")
    assert (response.status_code, response.json["reason"]) == (503, "Not a directory")
    folder.unlink()
    (database.parent / "away").rename(folder)
    assert send("inquiry.approved", event_id="evt_2").status_code == 200
    assert stored(journal.path) == ["evt_1", "evt_2"]


def test_no_thread_to_be_had_is_a_503(send, client, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse_thread)
        response = send("inquiry.approved")
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert client.get("/healthz").status_code == 503
    assert send("inquiry.approved").status_code == 200


def refuse_thread(_):
    """Do as Python does when the system gives no thread."""
    raise RuntimeError("can't start new thread")


def test_last_to_close_saves_a_wal_that_was_removed(app, checkpointer, send, database):
    send("inquiry.approved", event_id="evt_1")
    database.with_name("kyc.db-wal").unlink()
    database.with_name("kyc.db-wal").touch()  # as a process that could not start leaves it
    assert send("inquiry.approved", event_id="evt_2").status_code == 503
    app.extensions["journal"].close()
    assert stored(database) == ["evt_0", "evt_1"]


def test_last_to_close_leaves_the_wal_of_others(app, checkpointer, send, database):
    send("inquiry.approved")
    for suffix in ("-wal", "-shm"):
        database.with_name("kyc.db" + suffix).unlink()
    code = """if True:
        import os, sqlite3, sys
        db = sqlite3.connect(sys.argv[1])
        with db:
            db.execute("INSERT INTO redactions VALUES ('act_1', '')")
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", code, database], check=True)
    app.extensions["journal"].close()
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("SELECT subject_id FROM redactions").fetchall() == [("act_1",)]


def open_files():
    """Return the paths of this process's open files."""
    links = [f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link)]


def test_failed_commits_leave_no_file_open(app, send, database, monkeypatch):
    send("inquiry.approved")
    with monkeypatch.context() as broken:
        broken.setattr(kyc, "project", lambda *_: fail(None))
        for _ in range(20):
            assert send("inquiry.approved").status_code == 503
    assert send("inquiry.approved").status_code == 200
    assert open_files().count(os.fspath(database)) < 10


def stored(path):
    """Return the IDs in a journal, after a look at its integrity."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        return [row[0] for row in db.execute("SELECT event_id FROM events ORDER BY rowid")]


def test_blocked_scrub_holds_up_no_delivery(checkpointer, send, database):
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader:
        send("inquiry.approved", inquiry_id="inq_1")
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        send("inquiry.redacted", inquiry_id="inq_1")
        began = time.monotonic()
        for _ in range(50):
            assert send("inquiry.approved").status_code == 200
        assert time.monotonic() - began < 5
        assert checkpointer.scrub
        reader.execute("END")
    wait_until(lambda: not checkpointer.scrub)


def test_failure_long_ago_does_not_hasten_the_next_delivery(app, send, database):
    away = database.with_name("away.db")
    database.rename(away)
    assert send("inquiry.approved").status_code == 503
    assert app.extensions["journal"].stuck
    wait_until(lambda: app.extensions["journal"].stuck is None)
    away.rename(database)
    assert send("inquiry.approved").status_code == 200


def test_connection_carries_one_request(serve, database):
    server = serve()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.skipif(not PAYLOADS.is_dir(), reason="the official payloads are not at hand")
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
    db = sqlite3.connect(database)
    kept = dict(db.execute("SELECT event_id, body FROM events WHERE redacted_at IS NULL"))
    redacted = {row[0] for row in db.execute("SELECT event_id FROM events WHERE body IS NULL")}
    assert kept.keys() | redacted == bodies.keys()
    assert all(body.encode() == bodies[event_id] for event_id, body in kept.items())
    query = "SELECT body_sha256 FROM events ORDER BY event_id"
    assert [row[0] for row in db.execute(query)] == [
        hashlib.sha256(body).hexdigest() for _, body in sorted(bodies.items())
    ]
    # Expired at 2024-03-16 comes after the decision of 2024-03-15: the newest event wins.
    query = "SELECT reference_id, status, event_at FROM kyc_status WHERE inquiry_id = ?"
    rows = db.execute(query, ("inq_kT4xVnR2bPmYwL9sTgD3cExZ",)).fetchall()
    assert rows == [("act_fJ8mQpDLrYvNcBzWk5HsAxRy", "expired", "2024-03-16T18:30:00.100Z")]
    assert db.execute("SELECT count(*) FROM inquiries").fetchone()[0] == 1
    db.close()
