"""The real server: kinds of workers, concurrency, signals, kills and overload.

LONG=1 runs 100 rounds of SIGKILL instead of 10, and 30 seconds of overload instead of 5.
"""

import contextlib
import json
import os
import random
import signal
import sqlite3
import statistics
import sys
import threading
import time

import pytest
from conftest import LONG, Load, assert_kept, build, children, locked_file, wait_until

ROUNDS = 100 if LONG else 10
OVERLOAD_SECONDS = 30 if LONG else 5
KINDS = {
    "as the Procfile says": (),
    "several workers": ("--workers", "3"),
    "preloaded": ("--preload", "--workers", "2"),
    "sync workers": ("--worker-class", "sync", "--threads", "1", "--workers", "3"),
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_kind_of_worker_stores_what_it_accepts(serve, database, options):
    server = serve(*options)
    with Load(server.port, clients=6) as load:
        wait_until(lambda: len(load.accepted) >= 200)
    assert set(load.answers) == {200}
    assert_kept(database, load.accepted)


def test_senders_of_the_same_event_at_once_are_counted_once(serve, database):
    server = serve("--workers", "3")
    bodies = [build(event_id=f"evt_{n}", reference_id=f"person-{n}") for n in range(40)]
    answers, start = [], threading.Barrier(8)

    def send_all():
        start.wait()
        answers.extend((body, *server.send(body)) for body in bodies)

    run_threads(send_all, 8)
    new = [body for body, status, text in answers if json.loads(text) == {"received": True}]
    assert {status for _, status, _ in answers} == {200}
    assert sorted(new) == sorted(bodies)
    assert_kept(database, {f"evt_{n}": body for n, body in enumerate(bodies)})
    assert read(database, "SELECT count(*) FROM events") == [(40,)]


def test_handler_runs_once_for_senders_of_the_same_event_at_once(serve, database, tmp_path):
    module = tmp_path / "counted.py"
    module.write_text(COUNTED)
    server = serve("--workers", "3", module="counted:app", PYTHONPATH=str(tmp_path))
    body = build(event_id="evt_once")
    run_threads(lambda: server.send(body), 8)
    assert read(database, "SELECT event_id FROM counted") == [("evt_once",)]


COUNTED = """
import app as kyc

@kyc.on("inquiry.approved")
def count(db, event):
    db.execute("CREATE TABLE IF NOT EXISTS counted (event_id TEXT)")
    db.execute("INSERT INTO counted VALUES (?)", (event.event_id,))

app = kyc.app
"""


def test_reload_under_load_refuses_and_loses_nothing(serve, database):
    server = serve("--workers", "2")
    with Load(server.port, clients=6) as load:
        for _ in range(2):
            before = children(server)
            os.kill(server.process.pid, signal.SIGHUP)
            wait_until(lambda before=before: not children(server) & before)
            count = len(load.accepted)
            wait_until(lambda count=count: len(load.accepted) > count + 100)
    assert set(load.answers) == {200}
    assert_kept(database, load.accepted)


def test_stop_under_load_loses_nothing(serve, database):
    server = serve("--workers", "2")
    with Load(server.port, clients=8) as load:
        wait_until(lambda: len(load.accepted) >= 100)
        assert server.stop() == 0
    assert not {status for status in load.answers if isinstance(status, int)} - {200}
    serve()
    assert_kept(database, load.accepted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_requests_in_line_are_answered_before_a_worker_ends(serve, database, number):
    server = serve()
    load = Load(server.port)
    threads = []
    with locked_file(database):
        for n in range(10):
            threads.append(threading.Thread(target=post_once, args=(load, f"evt_{n}")))
            threads[-1].start()
        time.sleep(1)
        os.kill(server.process.pid, number)
        time.sleep(1)
    for thread in threads:
        thread.join()
    assert load.answers == {200: 10}
    assert_kept(database, load.accepted)


def test_killed_at_any_moment_it_keeps_what_it_acknowledged(serve, database):
    chance = random.Random(20)
    accepted = {}
    for turn in range(ROUNDS):
        server = serve("--workers", "2", wait=turn % 5 != 4)  # some die while they start
        with Load(server.port, clients=8, prefix=f"round{turn}", padding=2000) as load:
            time.sleep(chance.uniform(0.2, 0.7))
            server.kill()
        accepted |= load.accepted
        assert turn % 5 == 4 or load.accepted
    serve()
    assert len(accepted) > 20 * ROUNDS
    assert_kept(database, accepted)


def test_overload_is_answered_stored_and_forgotten(serve, database):
    server = serve("--workers", "2")
    with Load(server.port, clients=8, prefix="warm") as warm:
        wait_until(lambda: len(warm.accepted) >= 500)
    before = [resident_megabytes(pid) for pid in children(server)]
    with Load(server.port, clients=320, prefix="over") as load:  # five for each thread
        time.sleep(OVERLOAD_SECONDS)
    assert not set(load.answers) - {200, 503, "ConnectionRefusedError", "ConnectionResetError"}
    assert max(load.seconds) < 10
    time.sleep(1)
    after = [timed(lambda: server.send(build())) for _ in range(50)]
    assert statistics.median(after) < 0.1
    assert max(after) < 1
    assert max(resident_megabytes(pid) for pid in children(server)) < max(before) + 32
    assert_kept(database, warm.accepted | load.accepted)
    print(f"{sum(load.answers.values())} answers: {dict(load.answers)}", file=sys.stderr)


def read(database, query):
    """Return the rows of a query."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        return db.execute(query).fetchall()


def run_threads(target, count):
    """Run `target` in `count` threads at once; return when all have ended."""
    threads = [threading.Thread(target=target) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def post_once(load, event_id):
    """Deliver one event of a load on a connection of its own."""
    connection = load.connect()
    body = build(event_id=event_id, reference_id=event_id)
    load.post(connection, event_id, body)
    connection.close()


def resident_megabytes(pid):
    """Return the resident memory of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def timed(function):
    """Return how many seconds a call takes."""
    start = time.monotonic()
    function()
    return time.monotonic() - start
