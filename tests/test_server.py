"""The real server: kinds of workers, concurrency, signals, kills and overload.

LONG=1 runs 100 rounds of SIGKILL instead of 8, and 30 seconds of overload instead of 3.
"""

import json
import os
import random
import shutil
import signal
import statistics
import sys
import threading
import time

import pytest
from conftest import (
    LONG,
    Load,
    ask,
    assert_kept,
    build,
    children,
    locked_file,
    run_threads,
    wait_until,
)

ROUNDS = 100 if LONG else 8
OVERLOAD_SECONDS = 30 if LONG else 3
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
    assert ask(database, "SELECT count(*) FROM events") == [(40,)]


def test_workers_take_a_core_each(serve):
    server = serve(WEB_CONCURRENCY="2")

    def masks():
        server.send(build())
        return [os.sched_getaffinity(pid) for pid in children(server)]

    wait_until(lambda: [len(mask) for mask in masks()] == [1, 1])
    assert len(set().union(*masks())) == min(2, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_reload_under_load_refuses_and_loses_nothing(serve, database, workers):
    server = serve("--workers", workers)
    with Load(server.port, clients=6) as load:
        for _ in range(2):
            before = children(server)
            os.kill(server.process.pid, signal.SIGHUP)
            wait_until(lambda before=before: not children(server) & before)
            count = len(load.accepted)
            wait_until(lambda count=count: len(load.accepted) > count + 100)
    assert set(load.answers) == {200}
    assert max(load.seconds) < 4
    assert_kept(database, load.accepted)


def test_stop_under_load_loses_nothing_and_leaves_one_whole_file(serve, database, tmp_path):
    server = serve("--workers", "2")
    with Load(server.port, clients=8) as load:
        wait_until(lambda: len(load.accepted) >= 100)
        assert server.stop() == 0
    assert not {status for status in load.answers if isinstance(status, int)} - {200}
    assert_kept(shutil.copy(database, tmp_path / "copy.db"), load.accepted)
    serve()
    assert_kept(database, load.accepted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_requests_in_line_are_answered_before_a_worker_ends(serve, database, number):
    server = serve()
    load = Load(server.port)
    threads = []
    with locked_file(database):
        (worker,) = children(server)
        idle = count_threads(worker)
        for n in range(10):
            threads.append(threading.Thread(target=post_once, args=(load, f"evt_{n}")))
            threads[-1].start()
        wait_until(lambda: count_threads(worker) >= idle + 10)  # one for each request
        os.kill(server.process.pid, number)
        wait_until(lambda: f"Handling signal: {number.name[3:].lower()}" in server.log.read_text())
        time.sleep(0.5)  # until the worker has got its own signal
    for thread in threads:
        thread.join()
    assert load.answers == {200: 10}
    assert_kept(database, load.accepted)


def test_killed_at_any_moment_it_keeps_what_it_acknowledged(serve, database):
    chance = random.Random(20)
    accepted = {}
    for turn in range(ROUNDS):
        workers = str(1 + turn % 2)
        server = serve("--workers", workers, wait=turn % 5 != 4)  # some die while they start
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
    after = [timed(lambda: server.send(build())) for _ in range(50)]
    assert statistics.median(after) < 0.1
    assert max(after) < 1
    assert max(resident_megabytes(pid) for pid in children(server)) < max(before) + 32
    assert_kept(database, warm.accepted | load.accepted)
    print(f"{sum(load.answers.values())} answers: {dict(load.answers)}", file=sys.stderr)


def post_once(load, event_id):
    """Deliver one event of a load on a connection of its own."""
    connection = load.connect()
    body = build(event_id=event_id, reference_id=event_id)
    load.post(connection, event_id, body)
    connection.close()


def count_threads(pid):
    """Return how many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def resident_megabytes(pid):
    """Return the resident memory of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def timed(function):
    """Return how many seconds a call takes."""
    start = time.monotonic()
    function()
    return time.monotonic() - start
