"""Faults: what the sender gets, that nothing accepted is lost, and that it recovers by itself.

LONG=1 writes 2 GB into the WAL instead of 100 MB.
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
    back_up,
    build,
    build_library,
    children,
    locked_file,
    readers,
    sign,
    stored,
    wait_until,
)

WAL_MEGABYTES = 2000 if LONG else 100
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
    kill_worker(server)
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


def test_pages_that_a_failed_sync_has_lost_are_copied_again(sync, database):
    server, failing = sync
    before = database.with_name("before.db")
    bodies = {f"evt_{n}": build(event_id=f"evt_{n}", reference_id=f"person-{n}") for n in range(9)}
    assert server.send(bodies["evt_0"])[0] == 200
    wait_until(lambda: os.path.getsize(f"{database}-wal") == 0)
    shutil.copy(database, before)
    for name in ("evt_1", "evt_2", "evt_3"):
        assert server.send(bodies[name])[0] == 200
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        for name in ("evt_4", "evt_5", "evt_6"):
            assert server.send(bodies[name])[0] == 200
        wait_until(lambda: database.read_bytes() != before.read_bytes())  # what the reader allows
        failing.touch()
    wait_until(lambda: "the database cannot be looked after" in server.log.read_text())
    shutil.copy(before, database)  # so the disk has lost all that was not synced
    failing.unlink()
    for name in ("evt_7", "evt_8"):
        assert server.send(bodies[name])[0] == 200
    wait_until(lambda: os.path.getsize(f"{database}-wal") == 0)
    assert_kept(database, bodies)


# Locks


def test_lock_held_by_a_stranger_postpones_events_in_time_until_it_is_released(locked_servers):
    with locked_servers(clients=40, workers="1") as (servers, loads, lock):  # more than threads
        with lock:
            wait_until(lambda: all(load.answers[503] >= 100 for load in loads), seconds=30)
            for server in servers:
                status, answer = server.request("GET", "/healthz")
                assert (status, b'"status": "unavailable"' in answer) == (503, True)
            # The line is bounded.
            wait_until(lambda: b"too many" in servers[1].send(build())[1], seconds=60)
        for load in loads:
            assert_postponed(load)
            wait_until(progress(load))
            assert set(load.answers) == {200, 503}


def test_worker_that_starts_while_a_stranger_holds_a_lock_ends_nothing(locked_servers):
    with locked_servers(clients=4, workers="1") as (servers, loads, lock):
        with lock:
            for server in servers:
                kill_worker(server)
            words, log = "the database cannot be used for now, events get 503", servers[0].log
            wait_until(lambda: log.read_text().count(words) == 2, seconds=30)
            assert [server.process.poll() for server in servers] == [None, None]
        for load in loads:
            wait_until(progress(load))


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
        before = max(map(count_open_files, children(server)))
        for suffix in ("", "-wal", "-shm"):
            os.rename(f"{database}{suffix}", f"{database}{suffix}.away")
        wait_until(lambda: load.answers[503] >= 50)
        assert_postponed(load)
        for suffix in ("-shm", "-wal", ""):
            os.rename(f"{database}{suffix}.away", f"{database}{suffix}")
        wait_until(progress(load))
        assert max(map(count_open_files, children(server))) < before + 20
    assert_kept(database, load.accepted)


def test_folder_that_is_not_one_postpones_events_until_it_is_back(serve, tmp_path):
    folder, away = tmp_path / "data", tmp_path / "away"
    folder.mkdir()
    server = serve(KYC_DATABASE=str(folder / "kyc.db"))
    assert server.send(build(event_id="evt_1"))[0] == 200
    folder.rename(away)
    folder.touch()
    status, answer = server.send(build(event_id="evt_2"))
    assert (status, b"Not a directory" in answer) == (503, True)
    folder.unlink()
    away.rename(folder)
    assert server.send(build(event_id="evt_2"))[0] == 200
    assert stored(folder / "kyc.db") == ["evt_1", "evt_2"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_database_swapped_for_its_copy_under_load_loses_nothing(serve, database, tmp_path, workers):
    server = serve("--workers", workers)
    kept, copy = set(), tmp_path / "copy.db"
    with Load(server.port, clients=6) as load:
        for number in range(4):
            wait_until(progress(load))
            back_up(database, copy)
            wait_until(progress(load))
            aside = database.rename(tmp_path / f"aside{number}.db")
            copy.rename(database)
            wait_until(progress(load))
            kept |= set(stored(aside))
        wait_until(progress(load))
    assert server.stop() == 0
    assert load.accepted.keys() <= kept | set(stored(database))


def test_process_that_opens_a_swapped_database_leaves_the_old_wal_alone(serve, database, tmp_path):
    one, other = serve(), serve()  # as two workers, of which one has nothing to do yet
    copy, aside = tmp_path / "copy.db", tmp_path / "aside.db"
    assert one.send(build(event_id="evt_0"))[0] == 200
    back_up(database, copy)
    assert one.send(build(event_id="evt_1"))[0] == 200
    database.rename(aside)
    copy.rename(database)
    for number, server in enumerate((other, one, other), 2):
        body = build(event_id=f"evt_{number}")
        wait_until(lambda server=server, body=body: server.send(body)[0] == 200)
    assert (one.stop(), other.stop()) == (0, 0)
    assert stored(aside) == ["evt_0", "evt_1"]
    assert stored(database) == ["evt_0", "evt_2", "evt_3", "evt_4"]


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


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_worker_is_replaced_and_loses_nothing(serve, database, workers):
    server = serve("--workers", str(workers))
    with Load(server.port, clients=8) as load:
        for _ in range(3):
            wait_until(progress(load))
            kill_worker(server)
        wait_until(progress(load))
    assert not {status for status in load.answers if isinstance(status, int)} - {200}
    assert_kept(database, load.accepted)


def test_worker_killed_while_it_waits_in_line_leaves_no_lock(serve, database):
    server = serve("--workers", "2")
    with Load(server.port, clients=8) as load:
        with locked_file(database):
            time.sleep(0.3)  # until deliveries wait in line
            for _ in range(2):
                kill_worker(server)
        wait_until(progress(load))
    assert_kept(database, load.accepted)


def test_worker_that_starts_while_the_database_is_gone_makes_no_other(serve, database):
    server = serve()
    with Load(server.port, clients=4) as load:
        wait_until(progress(load))
        database.rename(f"{database}.away")
        kill_worker(server)
        refused = load.answers[503]
        wait_until(lambda: load.answers[503] >= refused + 20)
        assert not database.exists()
        os.rename(f"{database}.away", database)
        wait_until(progress(load))
    assert_kept(database, load.accepted)


def test_worker_that_starts_on_a_full_disk_ends_nothing(serve, small_disk):
    server = serve(KYC_DATABASE=str(small_disk / "kyc.db"))
    with Load(server.port, clients=4, padding=20_000) as load:
        wait_until(lambda: load.answers[503] >= 20)
        kill_worker(server)
        refused = load.answers[503]
        wait_until(lambda: load.answers[503] >= refused + 20)
        subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
        wait_until(progress(load))
    assert_kept(small_disk / "kyc.db", load.accepted)


def test_wal_stays_bounded_while_readers_come_and_go(serve, database):
    server = serve("--workers", "2")
    sizes = []
    with readers(database, 2), Load(server.port, clients=6, padding=300_000) as load:
        while sum(map(len, load.accepted.copy().values())) < WAL_MEGABYTES << 20:
            sizes.append(os.path.getsize(f"{database}-wal"))
            time.sleep(0.05)
    print(f"{WAL_MEGABYTES} MB accepted, WAL up to {max(sizes) >> 20} MB")
    assert max(sizes) < 96 << 20
    assert set(load.answers) == {200}
    assert_kept(database, load.accepted)


# Causes of trouble


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a full disk needs root, and leave to mount")
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
        pytest.skip("a failing fsync needs gcc")
    failing = tmp_path / "failing"
    library = build_library("failing_fsync.c", tmp_path)
    return serve(LD_PRELOAD=str(library), FSYNC_FAILS=str(failing)), failing


@contextlib.contextmanager
def immutable(*paths):
    """Let the file system refuse every write to these files for the block."""
    command = shutil.which("chattr")
    if not command or subprocess.run([command, "+i", *paths], capture_output=True).returncode:
        pytest.skip("a read-only file needs root, chattr, and a file system with that attribute")
    try:
        yield
    finally:
        subprocess.run([command, "-i", *paths], check=True)


@pytest.fixture
def locked_servers(serve, tmp_path):
    """Two loaded servers, with a lock on the one's database and the other's lock file."""

    @contextlib.contextmanager
    def locked_servers(clients, workers):
        databases = [tmp_path / "database.db", tmp_path / "file.db"]
        servers = [serve("--workers", workers, KYC_DATABASE=str(path)) for path in databases]
        with contextlib.ExitStack() as stack:
            loads = [Load(server.port, clients, timeout=30) for server in servers]
            for load in loads:
                wait_until(progress(stack.enter_context(load)))
            yield servers, loads, hold_locks(*databases)
        for database, load in zip(databases, loads, strict=True):
            assert_kept(database, load.accepted)

    return locked_servers


@contextlib.contextmanager
def hold_locks(one, other):
    """Hold the write lock of a database, as an open sqlite3 shell may, and another's lock file."""
    with (
        contextlib.closing(sqlite3.connect(one, isolation_level=None, timeout=20)) as db,
        locked_file(other),
    ):
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


def kill_worker(server):
    """Kill a worker; return when there is another one."""
    before = children(server)
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: len(children(server) - before) == 1)


def count_open_files(pid):
    """Return how many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def progress(load):
    """Return a condition: twenty more events have been accepted."""
    count = len(load.accepted)
    return lambda: len(load.accepted) >= count + 20


def fill(server, prefix, number):
    """Send events until so many were accepted; return those that were."""
    load = Load(server.port, clients=2, prefix=prefix, padding=1000)
    with load:
        wait_until(lambda: len(load.accepted) >= number)
    assert set(load.answers) <= {200, 503}
    return load.accepted


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
