"""Faults: what the sender gets, that nothing accepted is lost, and that it recovers by itself.

LONG=1 loads the WAL for 60 seconds instead of 5.
"""

import contextlib
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time

import pytest
from conftest import (
    LONG,
    Load,
    assert_kept,
    build,
    build_library,
    children,
    locked_file,
    readers,
    sign,
    wait_until,
)

LOAD_SECONDS = 60 if LONG else 5
ANSWER_SECONDS = 5  # Persona waits no longer


# The disk


def test_full_disk_postpones_events_until_there_is_room(serve, small_disk):
    server = serve("--preload", "--workers", "2", KYC_DATABASE=str(small_disk / "kyc.db"))
    with Load(server.port, clients=4, padding=20_000) as load:
        wait_until(lambda: load.answers[503] >= 20)
        assert_postponed(load)
        subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
        wait_until(progress(load))
    assert set(load.answers) == {200, 503}
    assert_kept(small_disk / "kyc.db", load.accepted)


def test_limit_of_file_size_postpones_events_until_it_is_lifted(serve, database):
    server = serve()
    (worker,) = children(server)
    with Load(server.port, clients=4, padding=20_000) as load:
        wait_until(progress(load))
        limit_file_size(worker, 100_000)
        wait_until(lambda: load.answers[503] >= 20)
        assert_postponed(load)
        limit_file_size(worker, resource.RLIM_INFINITY)
        wait_until(progress(load))
    assert set(load.answers) == {200, 503}
    assert_kept(database, load.accepted)


def test_disk_that_refuses_writes_postpones_events_until_it_takes_them(serve, database):
    server = serve("--preload", "--workers", "2")
    with Load(server.port, clients=4) as load:
        wait_until(progress(load))
        with immutable(database, f"{database}-wal"):
            wait_until(lambda: load.answers[503] >= 20)
            assert server.request("GET", "/healthz")[0] == 503
        assert_postponed(load)
        wait_until(progress(load))
    assert set(load.answers) == {200, 503}
    assert_kept(database, load.accepted)


def test_event_whose_fsync_fails_is_postponed_and_not_half_written(sync, database):
    server, failing = sync
    bodies = {f"evt_{n}": build(event_id=f"evt_{n}", reference_id=f"person-{n}") for n in range(3)}
    assert server.send(bodies["evt_0"])[0] == 200
    failing.touch()
    assert server.send(bodies["evt_1"])[0] == 503
    assert server.request("GET", "/healthz")[0] == 503
    failing.unlink()
    assert server.send(bodies["evt_2"])[0] == 200
    assert_kept(database, {name: bodies[name] for name in ("evt_0", "evt_2")})


def test_redelivery_while_fsync_fails_is_no_duplicate(sync, database):
    server, failing = sync
    body = build(event_id="evt_1", reference_id="person")
    assert server.send(build())[0] == 200
    failing.touch()
    assert [server.send(body)[0] for _ in range(3)] == [503] * 3
    failing.unlink()
    assert server.send(body)[0] == 200
    assert_kept(database, {"evt_1": body})


def test_redelivery_to_a_new_worker_while_fsync_fails_is_postponed(sync, database):
    server, failing = sync
    body = build(event_id="evt_1", reference_id="person")
    first = build(event_id="evt_0", reference_id="another")
    assert server.send(first)[0] == 200
    failing.touch()
    assert server.send(body)[0] == 503
    (worker,) = children(server)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: children(server) - {worker})
    server.wait_until_up()
    assert [server.send(body)[0] for _ in range(3)] == [503] * 3
    failing.unlink()
    assert server.send(body)[0] == 200
    assert_kept(database, {"evt_0": first, "evt_1": body})


def test_failing_fsync_under_load_loses_nothing(sync, database):
    server, failing = sync
    with Load(server.port, clients=8) as load:
        for _ in range(3):
            wait_until(progress(load))
            failing.touch()
            refused = load.answers[503]
            wait_until(lambda refused=refused: load.answers[503] >= refused + 20)
            failing.unlink()
        wait_until(progress(load))
    assert_postponed(load)
    assert set(load.answers) == {200, 503}
    assert_kept(database, load.accepted)


# Locks


@pytest.mark.parametrize("lock", ["database", "file"])
def test_lock_held_by_a_stranger_postpones_events_until_it_is_released(serve, database, lock):
    server = serve("--preload", "--workers", "2")
    with Load(server.port, clients=16) as load:
        wait_until(progress(load))
        with locked_database(database) if lock == "database" else locked_file(database):
            assert server.request("GET", "/healthz")[0] == 503
            wait_until(lambda: load.answers[503] >= 16)
        assert_postponed(load)
        wait_until(progress(load))
    assert_kept(database, load.accepted)


@pytest.mark.parametrize("lock", ["database", "file"])
def test_many_senders_are_answered_in_time_while_a_stranger_holds_a_lock(serve, database, lock):
    server = serve()
    with (
        locked_database(database) if lock == "database" else locked_file(database),
        Load(server.port, clients=100, timeout=30) as load,
    ):
        wait_until(lambda: load.answers[503] >= 100, seconds=60)
    assert set(load.answers) == {503}
    assert_postponed(load)


# The file


def test_deleted_database_postpones_events_until_it_is_back(serve, database):
    server = serve("--preload", "--workers", "2")
    with Load(server.port, clients=4) as load:
        wait_until(progress(load))
        database.rename(f"{database}.away")
        wait_until(lambda: load.answers[503] >= 20)
        assert not database.exists()
        assert server.request("GET", "/healthz")[0] == 503
        assert_postponed(load)
        os.rename(f"{database}.away", database)
        wait_until(progress(load))
    assert_kept(database, load.accepted)


def test_whole_database_moved_away_and_back_loses_nothing(serve, database):
    server = serve("--preload", "--workers", "2")
    with Load(server.port, clients=4) as load:
        wait_until(progress(load))
        for suffix in ("", "-wal", "-shm"):
            os.rename(f"{database}{suffix}", f"{database}{suffix}.away")
        wait_until(lambda: load.answers[503] >= 20)
        assert_postponed(load)
        for suffix in ("-shm", "-wal", ""):
            os.rename(f"{database}{suffix}.away", f"{database}{suffix}")
        wait_until(progress(load))
    assert_kept(database, load.accepted)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("gap", [False, True], ids=["at once", "after a while"])
def test_goes_on_with_a_restored_copy(serve, database, tmp_path, workers, gap):
    server = serve("--preload", "--workers", str(workers))
    old = fill(server, "old", 60)
    copy = tmp_path / "copy.db"
    back_up(database, copy)
    fill(server, "gone", 60)
    checkpoint(database)  # so that the WAL does not hold all of it
    fill(server, "also_gone", 5)
    if gap:
        database.unlink()
        assert server.send(build())[0] == 503
    copy.rename(database)
    new = fill(server, "new", 60)
    assert_kept(database, old | new)
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("SELECT count(*) FROM events").fetchone()[0] == len(old | new)


# The clock


def test_clock_set_back_keeps_order_and_status(serve, database):
    server = serve()
    now = time.time()
    for name, ahead in (("inquiry.approved", 200), ("inquiry.declined", 100)):
        created = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(now + ahead))
        body = build(name, inquiry_id="inq_1", reference_id="person", created_at=created)
        headers = sign(body, timestamp=int(now + ahead))
        assert server.request("POST", "/webhooks/persona", body, headers)[0] == 200
    with contextlib.closing(sqlite3.connect(database)) as db:
        names = [row[0] for row in db.execute("SELECT name FROM events ORDER BY rowid")]
        status = db.execute("SELECT status FROM kyc_status").fetchall()
    assert names == ["inquiry.approved", "inquiry.declined"]
    assert status == [("approved",)]


def test_clock_far_behind_refuses_until_it_is_right(serve):
    server = serve()
    body = build()
    headers = sign(body, timestamp=int(time.time() + 900))
    status, answer = server.request("POST", "/webhooks/persona", body, headers)
    assert status == 401
    assert b"stale" in answer
    assert server.send(body)[0] == 200


# Clients


@pytest.mark.parametrize("part", ["headers", "body"])
def test_slow_clients_do_not_stop_the_others(serve, database, part):
    server = serve()  # with more threads than there are slow clients; nginx holds off the rest
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(server)) for _ in range(20)]
        for client in slow:
            client.sendall(half_a_request(part))
        dripping = stack.enter_context(drip(slow))
        with Load(server.port, clients=4) as load:
            wait_until(lambda: len(load.accepted) >= 40)
        assert dripping.is_alive()
    assert_kept(database, load.accepted)


def test_stalled_bodies_are_given_up(serve, database):
    server = serve()
    with contextlib.ExitStack() as stack:
        for _ in range(40):  # more than there are threads
            stack.enter_context(connect(server)).sendall(half_a_request("body"))
        with Load(server.port, clients=4) as load:
            wait_until(lambda: len(load.accepted) >= 40)
    assert_kept(database, load.accepted)


def half_a_request(part):
    """Return the beginning of a request that breaks off in its headers or in its body."""
    head = b"POST /webhooks/persona HTTP/1.1\r\nHost: localhost\r\n"
    return head if part == "headers" else head + b"Content-Length: 1000\r\n\r\n"


def test_client_gone_before_the_answer_harms_nobody(serve, database):
    server = serve()
    body = build(event_id="evt_gone")
    with locked_file(database):
        for _ in range(10):
            with connect(server) as client:
                client.sendall(raw_request(body))
        time.sleep(0.5)
    wait_until(lambda: count_events(database) == 1)
    assert b"duplicate" in server.send(body)[1]
    assert_kept(database, {"evt_gone": body})


def test_client_gone_in_the_middle_of_its_body_stores_nothing(serve, database):
    server = serve()
    with connect(server) as client:
        client.sendall(raw_request(build())[:-10])
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    body = build(event_id="evt_whole")
    assert server.send(body)[0] == 200
    assert count_events(database) == 1


# Processes


def test_killed_worker_is_replaced_and_loses_nothing(serve, database):
    server = serve("--workers", "2")
    with Load(server.port, clients=8) as load:
        for _ in range(3):
            wait_until(progress(load))
            before = children(server)
            os.kill(min(before), signal.SIGKILL)
            wait_until(lambda before=before: len(children(server) - before) == 1)
        wait_until(progress(load))
    assert not {status for status in load.answers if isinstance(status, int)} - {200}
    assert_kept(database, load.accepted)


def test_worker_killed_while_it_waits_in_line_leaves_no_lock(serve, database):
    server = serve("--workers", "2")
    with Load(server.port, clients=8) as load:
        with locked_file(database):
            time.sleep(0.5)
            for worker in children(server):
                os.kill(worker, signal.SIGKILL)
        wait_until(progress(load))
    assert_kept(database, load.accepted)


@pytest.mark.parametrize("lock", ["database", "file"])
def test_worker_that_starts_while_a_stranger_holds_a_lock_ends_nothing(serve, database, lock):
    server = serve()
    with Load(server.port, clients=4) as load:
        wait_until(progress(load))
        with locked_database(database) if lock == "database" else locked_file(database):
            os.kill(*children(server), signal.SIGKILL)
            time.sleep(12 if lock == "file" else 5)  # longer than a start waits
            assert server.process.poll() is None, server.log.read_text()[-1000:]
        wait_until(progress(load))
    assert_kept(database, load.accepted)


def test_worker_that_starts_while_the_database_is_gone_makes_no_other(serve, database):
    server = serve()
    with Load(server.port, clients=4) as load:
        wait_until(progress(load))
        database.rename(f"{database}.away")
        os.kill(*children(server), signal.SIGKILL)
        time.sleep(2)
        assert server.process.poll() is None, server.log.read_text()[-1000:]
        assert not database.exists()
        os.rename(f"{database}.away", database)
        wait_until(progress(load))
    assert_kept(database, load.accepted)


def test_worker_that_cannot_start_ends_nothing_once_others_have_served(serve, tmp_path):
    folder, away = tmp_path / "data", tmp_path / "away"
    folder.mkdir()
    server = serve(KYC_DATABASE=str(folder / "kyc.db"))
    assert server.send(build(event_id="evt_1"))[0] == 200
    time.sleep(6)  # gunicorn is taken to serve then
    folder.rename(away)
    folder.touch()
    os.kill(*children(server), signal.SIGKILL)
    time.sleep(2)
    assert server.process.poll() is None, server.log.read_text()[-1000:]
    assert server.send(build(event_id="evt_2"))[0] == 503
    folder.unlink()
    away.rename(folder)
    assert server.send(build(event_id="evt_2"))[0] == 200
    assert count_events(folder / "kyc.db") == 2


def test_worker_that_starts_on_a_full_disk_ends_nothing(serve, small_disk):
    server = serve(KYC_DATABASE=str(small_disk / "kyc.db"))
    with Load(server.port, clients=4, padding=20_000) as load:
        wait_until(lambda: load.answers[503] >= 20)
        os.kill(*children(server), signal.SIGKILL)
        time.sleep(2)
        assert server.process.poll() is None, server.log.read_text()[-1000:]
        subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
        wait_until(progress(load))
    assert_kept(small_disk / "kyc.db", load.accepted)


def test_wal_stays_bounded_while_readers_come_and_go(serve, database):
    server = serve("--workers", "2")
    sizes = []
    with readers(database, 2), Load(server.port, clients=6, padding=300_000) as load:
        for _ in range(LOAD_SECONDS * 10):
            time.sleep(0.1)
            sizes.append(os.path.getsize(f"{database}-wal"))
    written = sum(len(body) for body in load.accepted.values())
    print(f"{written >> 20} MB accepted, WAL up to {max(sizes) >> 20} MB")
    assert written > 150 << 20
    assert max(sizes) < 150 << 20
    assert set(load.answers) == {200}
    assert_kept(database, load.accepted)


# The writer


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError, RecursionError])
def test_whatever_a_handler_raises_fails_its_event_alone(send, db, handlers, error):
    def fail(db, event):
        raise error("no")

    handlers["inquiry.declined"] = [fail]
    answers = send_at_once(send, ["inquiry.approved", "inquiry.declined"] * 8)
    assert sorted(answers) == [200] * 8 + [500] * 8
    assert states(db) == {("inquiry.approved", "processed"): 8, ("inquiry.declined", "failed"): 8}
    assert send("inquiry.approved").status_code == 200


@pytest.mark.parametrize(
    "statement",
    [
        "COMMIT",
        "ROLLBACK",
        "RELEASE handler",
        "INSERT OR ROLLBACK INTO taken VALUES (1)",
        "INSERT INTO breaking VALUES (1)",
    ],
)
def test_handler_that_breaks_its_transaction_fails_its_event_alone(send, db, handlers, statement):
    db.executescript("""
        CREATE TABLE taken (number UNIQUE);
        INSERT INTO taken VALUES (1);
        CREATE TABLE breaking (number);
        CREATE TRIGGER break BEFORE INSERT ON breaking BEGIN SELECT RAISE(ROLLBACK, 'no'); END;
        CREATE TABLE counted (event_id TEXT);
    """)
    handlers["inquiry.declined"] = [lambda db, event: db.execute(statement)]
    handlers["inquiry.approved"] = [count_event]
    answers = send_at_once(send, ["inquiry.approved", "inquiry.declined"] * 8)
    assert sorted(answers) == [200] * 8 + [500] * 8
    assert states(db) == {("inquiry.approved", "processed"): 8, ("inquiry.declined", "failed"): 8}
    assert db.execute("SELECT count(*) FROM counted").fetchone()[0] == 8


def count_event(db, event):
    db.execute("INSERT INTO counted VALUES (?)", (event.event_id,))


def send_at_once(send, names):
    """Send an event of each name, all at once; return the statuses."""
    answers, start = [], threading.Barrier(len(names))

    def post(name):
        start.wait()
        answers.append(send(name).status_code)

    threads = [threading.Thread(target=post, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def states(db):
    """Return how many events there are of each name and state."""
    query = "SELECT name, state, count(*) FROM events GROUP BY name, state"
    return {(name, state): count for name, state, count in db.execute(query)}


# Causes of trouble


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def limit_file_size(pid, size):
    """Let no file of a process grow beyond `size` bytes."""
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, most))


@pytest.fixture
def sync(serve, tmp_path):
    """A server, and the path of a file: while that exists, every fsync fails."""
    if not shutil.which("gcc"):
        pytest.skip("the failing fsync needs gcc")
    failing = tmp_path / "failing"
    library = build_library("failing_fsync.c", tmp_path)
    return serve(LD_PRELOAD=str(library), FSYNC_FAILS=str(failing)), failing


@contextlib.contextmanager
def immutable(*paths):
    """Let the file system refuse every write to these files for the block."""
    command = shutil.which("chattr")
    if not command or subprocess.run([command, "+i", *paths], capture_output=True).returncode:
        pytest.skip("files cannot be made immutable here")
    try:
        yield
    finally:
        subprocess.run([command, "-i", *paths], check=True)


@contextlib.contextmanager
def locked_database(database):
    """Hold the database's write lock for the block, as an open sqlite3 shell may."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None, timeout=20)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


@contextlib.contextmanager
def drip(clients):
    """Let each client send a byte now and then for the block."""
    stop = threading.Event()

    def send():
        while not stop.wait(1):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.sendall(b"x")

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


# Helpers


def assert_postponed(load):
    """Every 503 came in time and says when to try again."""
    assert int(load.headers[503]["Retry-After"]) > 0
    assert max(load.seconds) < ANSWER_SECONDS


def progress(load):
    """Return a condition: twenty more events have been accepted."""
    count = len(load.accepted)
    return lambda: len(load.accepted) >= count + 20


def fill(server, prefix, number):
    """Send events; return those that were accepted, which is all of them."""
    load = Load(server.port, clients=2, prefix=prefix, padding=1000)
    with load:
        wait_until(lambda: len(load.accepted) >= number)
    assert set(load.answers) == {200}
    return load.accepted


def back_up(database, copy):
    """Make a consistent copy of the database."""
    with (
        contextlib.closing(sqlite3.connect(database)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def checkpoint(database):
    """Empty the WAL."""
    with contextlib.closing(sqlite3.connect(database, timeout=10)) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


def connect(server):
    """Open a connection."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def raw_request(body):
    """Return a delivery as bytes."""
    headers = {"Host": "localhost", "Content-Length": len(body), **sign(body)}
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    return f"POST /webhooks/persona HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body


def count_events(database):
    """Return how many events the journal holds."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        return db.execute("SELECT count(*) FROM events").fetchone()[0]
