"""PostgreSQL: what only this engine can do wrong, and two machines on one database.

Those of the modules in conftest.BOTH_ENGINES run on it, too.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import sqlite3
import threading
import time

import pytest
from cluster import Relay
from conftest import LATER, LONG, ROOT, Load, build, children, deploy, run_threads, sign, wait_until

import app as kyc

pytestmark = pytest.mark.parametrize("engine", ["postgres"], indirect=True)


@pytest.fixture
def query(cluster, environ, database):
    """Read the database of the service with PostgreSQL's own words."""
    schema = cluster.schemas[str(database)]
    return lambda *statements: cluster.execute(*statements, schema=schema)


AT = "2026-03-01T00:00:00.000Z"
BODIES = {
    "unicode": '{"name": "Zoë \U0001f600"}'.encode(),
    "NUL": b'{\0"name": "x"}',
    "backslashes": b'{"name": "\\\\x41 \\u0000"}',
    "no UTF-8": b'{"name": "\xff\xfe"}',
    "empty": b"",
}


@pytest.mark.parametrize("name", BODIES)
def test_body_comes_back_exactly(send, query, name):
    assert send(BODIES[name]).status_code == 200
    digest = hashlib.sha256(BODIES[name]).hexdigest()
    assert query("SELECT rowid, body, body_sha256 FROM events") == [(1, BODIES[name], digest)]


def test_journal_is_append_only_for_whoever_is_connected(send, query):
    send(build(event_id="evt_1", inquiry_id="inq_1"))
    for statement in (
        "DELETE FROM events",
        "TRUNCATE events",
        "UPDATE events SET name = 'x'",
        "UPDATE events SET rowid = 7",
        "UPDATE events SET body = 'x'",
        "UPDATE events SET inquiry_id = 'inq_2'",
    ):
        with pytest.raises(Exception, match="append-only"):
            query(statement)
    assert query("SELECT rowid, event_id, inquiry_id FROM events") == [(1, "evt_1", "inq_1")]


def test_keys_are_in_the_order_of_their_bytes(send, query):
    for person in ("a", "B", "_", "Z", "é"):
        send("inquiry.approved", reference_id=person)
    rows = query("SELECT reference_id FROM kyc_status ORDER BY reference_id")
    assert [row[0] for row in rows] == ["B", "Z", "_", "a", "é"]


def test_handler_may_catch_the_error_of_a_statement_and_go_on(send, db, handlers):
    db.execute("CREATE TABLE accounts_opened (person TEXT PRIMARY KEY)")

    @kyc.on("inquiry.approved")
    def open_account(db, event):
        db.execute("SAVEPOINT mine")
        for _ in range(2):
            with contextlib.suppress(sqlite3.IntegrityError):
                db.execute("INSERT INTO accounts_opened VALUES (?)", (event.reference_id,))
        db.execute("RELEASE mine")

    for event_id in ("evt_1", "evt_2"):
        assert send(build(event_id=event_id, reference_id="user-1")).status_code == 200
    assert db.execute("SELECT count(*) FROM accounts_opened").fetchone()[0] == 1


def test_deadlock_with_a_stranger_is_tried_again(app, send, db, handlers, query, cluster, database):
    db.execute("CREATE TABLE first (n INTEGER)")
    db.execute("CREATE TABLE second (n INTEGER)")
    for table in ("first", "second"):
        db.execute(f"INSERT INTO {table} VALUES (0)")  # noqa: S608
    runs, ready, go = [], threading.Event(), threading.Event()

    @kyc.on("inquiry.approved")
    def cross(db, event):
        runs.append(event.event_id)
        db.execute("SET LOCAL deadlock_timeout = '10ms'")
        db.execute("UPDATE first SET n = n + 1")
        ready.set()
        go.wait(5)
        db.execute("UPDATE second SET n = n + 1")

    def stranger():
        query(
            "BEGIN",
            "SET LOCAL deadlock_timeout = '60s'",
            "UPDATE second SET n = n + 1",
            "SELECT pg_sleep(0.3)",
            "UPDATE first SET n = n + 1",
            "COMMIT",
        )

    thread = threading.Thread(target=stranger)
    thread.start()
    threading.Timer(0.8, go.set).start()
    answer = send(build(event_id="evt_1"))
    thread.join()
    assert (answer.status_code, len(runs) > 1) == (200, True)
    assert query("SELECT n FROM first") == query("SELECT n FROM second") == [(2,)]


def test_several_that_start_at_once_make_the_tables_once(environ, query):
    config, errors = kyc.read_config(environ), []

    def start():
        try:
            kyc.prepare_database(config)
        except Exception as error:
            errors.append(error)

    run_threads(start, 6)
    assert errors == []
    assert query("SELECT count(*) FROM journal_lock") == [(1,)]
    assert query("SELECT count(*) FROM rules_in_force") == [(1,)]


def test_commits_are_synchronous_whatever_the_server_says(app, cluster, query):
    query("ALTER ROLE postgres SET synchronous_commit = off")
    try:
        with contextlib.closing(app.config["KYC"].database.connect()) as db:
            assert db.execute("SHOW synchronous_commit").fetchone()[0] == "on"
    finally:
        query("ALTER ROLE postgres RESET synchronous_commit")


def test_password_is_not_printed(environ):
    url = "postgresql://kyc:secret-word@127.0.0.1:1/kyc?connect_timeout=2"
    config = kyc.read_config({"DATABASE_URL": url})
    assert "secret-word" not in f"{config} {config.database}"
    with pytest.raises(kyc.DatabaseError) as error:
        kyc.prepare_database(config)
    assert "secret-word" not in str(error.value)


@pytest.mark.parametrize("url", ["", "mysql://x/y", "postgresql://[", "kyc.db"])
def test_other_url_is_refused(url):
    with pytest.raises(kyc.ConfigError, match="DATABASE_URL must be"):
        kyc.read_config({"DATABASE_URL": url})


def test_foreign_table_is_left_alone(environ, query):
    query("CREATE TABLE events (id INTEGER)")
    with pytest.raises(kyc.UnusableError, match="another application"):
        kyc.prepare_database(kyc.read_config(environ))


def test_role_that_may_not_make_the_tables_is_one_line(environ, refusal, cluster, query, database):
    schema = cluster.schemas[str(database)]
    query("CREATE ROLE guest LOGIN", f"GRANT USAGE ON SCHEMA {schema} TO guest")
    try:
        url = cluster.url(schema).replace("//postgres@", "//guest@")
        said = refusal({**environ, "DATABASE_URL": url})
        assert f"app.py: DATABASE_URL: permission denied for schema {schema}\n" in said
    finally:
        query("DROP OWNED BY guest", "DROP ROLE guest")


def test_commit_that_fails_is_503_and_not_stored(send, query):
    query(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION USING ERRCODE = '53100'; END $$",
        "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON events DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    assert send(build(event_id="evt_1")).status_code == 503
    query("DROP TRIGGER refuse ON events")
    assert send(build(event_id="evt_2")).status_code == 200
    assert query("SELECT rowid, event_id FROM events") == [(1, "evt_2")]


def test_longest_ids_fit_into_the_indexes(send, query):
    ids = dict.fromkeys(("inquiry_id", "account_id", "reference_id"), "☃" * 333)
    for name in ("inquiry.approved", "account.created"):
        body = build(name, event_id=f"evt_{name}".ljust(1000, "x"), **ids)
        assert send(body).status_code == 200
    assert query("SELECT status FROM kyc_status") == [("approved",)]


def test_probe_is_a_commit(client, app):
    assert client.get("/healthz").status_code == 200
    assert app.extensions["journal"].commits == 1


def test_copies_in_one_batch_count_once_and_complete_each_other(db):
    bodies = [build(event_id=f"evt_{one}", account_id=f"act_{one}") for one in "12132"]
    first = json.loads(bodies[0])
    del first["data"]["attributes"]["payload"]["data"]["relationships"]["account"]
    bodies[0] = json.dumps(first).encode()
    deliveries = [kyc.Delivery(kyc.read_event(one, AT), one, AT) for one in bodies]
    with kyc.transaction(db):
        outcomes = kyc.store(db, deliveries)
    assert outcomes == ["stored", "stored", "duplicate", "stored", "duplicate"]
    rows = db.execute("SELECT rowid, account_id FROM events ORDER BY rowid").fetchall()
    assert rows == [(1, "act_1"), (2, "act_2"), (3, "act_3")]


def test_role_with_the_least_rights_of_the_docs_serves(create, cluster, query, database, runner):
    granted = re.search(r"(GRANT USAGE.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL)
    schema = cluster.schemas[str(database)]
    query(
        "CREATE ROLE kyc LOGIN",
        *re.sub(r"SCHEMA kyc\b", f"SCHEMA {schema}", granted[1]).split(";")[:-1],
    )
    url = cluster.url(schema).replace("//postgres@", "//kyc@")
    try:
        service = create(DATABASE_URL=url)
        body = build(event_id="evt_1", reference_id="user-1")
        answers = [
            service.test_client().post("/webhook", data=body, headers=sign(body)).status_code
            for _ in range(2)
        ]
        assert answers == [200, 200]
        assert service.test_client().get("/healthz").status_code == 200
        run = service.test_cli_runner().invoke
        for command in (["rebuild"], ["hold", "user-1", "--reason", "x"], ["status", "user-1"]):
            result = run(args=command)
            assert result.exit_code == 0, result.output
        result = run(args=["prune", "--older-than", "0s", "--yes"])
        assert "only the tables' owner frees the space" in result.output
        assert runner("prune", "--older-than", "0s", "--yes").output == "0 bodies removed\n"
        with contextlib.closing(service.config["KYC"].database.connect()) as db:
            for statement in ("DROP TABLE events", "ALTER TABLE events DISABLE TRIGGER ALL"):
                with pytest.raises(sqlite3.OperationalError, match="must be owner"):
                    db.execute(statement)
        service.extensions["journal"].stop()
    finally:
        query("DROP OWNED BY kyc", "DROP ROLE kyc")


def test_forward_ends_when_the_connection_that_holds_its_lock_does(app, flask, query):
    ends = """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE application_name = 'kyc forward' AND to_regclass('forwarding') IS NOT NULL
    """
    thread = threading.Thread(target=wait_until, args=(lambda: query(ends),))
    thread.start()
    secret = {"KYC_FORWARD_SECRET": "forward_0123456789abcdef"}
    result = flask("forward", "http://127.0.0.1:1/kyc", check=False, **secret)
    thread.join()
    assert (result.returncode, "terminating connection" in result.stderr) == (1, True)


# A later release


def test_later_release_migrates_once_and_the_old_one_stores_nothing(
    serve, flask, send, query, later
):
    for event in ("inquiry.approved", "case.created"):
        send(event, event_id=f"evt_{event}", inquiry_id="inq_1", template_id="itmpl_2")
    secret = {"KYC_FORWARD_SECRET": "forward_0123456789abcdef"}
    flask("forward", "http://127.0.0.1:1/kyc", "--once", check=False, **secret)
    query(
        "CREATE VIEW ours AS SELECT * FROM cleared",
        "CREATE ROLE reader",
        "GRANT SELECT ON cleared TO reader",
    )
    try:
        old, folder = serve(), later()
        assert old.send(build(event_id="evt_3", inquiry_id="inq_3"))[0] == 200
        servers = [serve(cwd=folder, wait=False) for _ in range(2)]
        for server in servers:
            server.wait_until_up()
            wait_until(lambda server=server: server.request("GET", "/healthz")[0] == 200)
        status, words = old.send(build(event_id="evt_old"))
        assert (status, b"another release of this service" in words) == (503, True)
        assert old.request("GET", "/healthz")[0] == 503
        assert servers[0].send(build(event_id="evt_4", inquiry_id="inq_4"))[0] == 200
        wait_until(lambda: query("SELECT projected FROM rules_in_force") == [(1,)])
        assert query("SELECT obj_description('events'::regclass)") == [(f"kyc {LATER}",)]
        assert query("SELECT region FROM events ORDER BY rowid") == [
            ("EU",),
            (None,),
            (None,),
            (None,),
        ]
        standing = "SELECT inquiry_id, status, region FROM kyc_status ORDER BY 1"
        assert query(standing) == [
            ("inq_1", "declined", None),
            ("inq_3", "approved", None),
            ("inq_4", "approved", None),
        ]
        assert query("SELECT has_table_privilege('reader', 'cleared', 'SELECT')") == [(True,)]
        assert query("SELECT count(*) FROM ours") == [(2,)]
        assert " 0 people changed" in flask("rebuild", cwd=folder).stdout
    finally:
        query("DROP OWNED BY reader", "DROP ROLE reader")


# Two machines


class Follower:
    """Reads the journal by position, as the team's app does, until it is stopped."""

    def __init__(self, query):
        self.query, self.rows, self.stopping = query, [], False
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping = True
        self.thread.join()

    def run(self):
        last = False
        while not last:
            last = self.stopping
            after = self.rows[-1][0] if self.rows else 0
            query = f"SELECT rowid, event_id FROM events WHERE rowid > {after} ORDER BY rowid"  # noqa: S608
            with contextlib.suppress(Exception):
                self.rows += self.query(query)
            time.sleep(0.01)


@pytest.fixture
def machines(serve, tmp_path):
    """Two servers, each in a folder of its own, on one database."""
    return [serve(cwd=deploy(tmp_path / name)) for name in ("one", "two")]


@contextlib.contextmanager
def under_load(machines, query, clients=4):
    """Send to both machines for the block; then nothing is lost, doubled or passed over."""
    with (
        Follower(query) as follower,
        Load(machines[0].port, clients, "a") as one,
        Load(machines[1].port, clients, "b") as two,
    ):
        wait_until(lambda: len(one.accepted) > 20 and len(two.accepted) > 20, 20)
        yield one, two
        numbers = [len(load.accepted) for load in (one, two)]
        wait_until(  # both recover by themselves
            lambda: all(
                len(load.accepted) > number + 20
                for load, number in zip((one, two), numbers, strict=True)
            ),
            20,
        )
    rows = query("SELECT rowid, event_id, body FROM events ORDER BY rowid")
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    assert follower.rows == [row[:2] for row in rows]
    bodies = {event_id: body for _, event_id, body in rows}
    assert len(bodies) == len(rows)
    accepted = one.accepted | two.accepted
    assert [key for key, body in accepted.items() if bodies.get(key) != body] == []
    people = "SELECT event_id, status FROM kyc_status"
    standing = dict(query(people))
    assert set(standing) == set(bodies)
    assert set(standing.values()) == {"approved"}
    for load in (one, two):
        assert max(load.seconds) < 5
        assert {one for one in load.answers if isinstance(one, int)} <= {200, 503}


def test_kills_of_one_machine(machines, query):
    with under_load(machines, query) as loads:
        for number in range(120 if LONG else 5):
            load = loads[number % 2]
            for worker in children(machines[number % 2]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            accepted = len(load.accepted)
            wait_until(lambda load=load, accepted=accepted: len(load.accepted) > accepted + 5)
    print({key: sum(load.answers[key] for load in loads) for key in loads[0].answers})


def test_immediate_stop_and_restart_of_the_server(machines, query, cluster):
    with under_load(machines, query) as loads:
        for _ in range(20 if LONG else 2):
            cluster.stop("immediate")
            time.sleep(0.3)
            cluster.start()
            time.sleep(0.3)
    assert all(load.answers[503] for load in loads)


def test_terminated_connections(machines, query):
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'kyc'"
    with under_load(machines, query):
        for _ in range(40 if LONG else 5):
            query(others)
            time.sleep(0.2)


def test_network_that_breaks_and_hangs_is_503_in_time(serve, tmp_path, query, cluster, environ):
    with contextlib.closing(Relay(cluster)) as relay:
        direct = environ["DATABASE_URL"]
        far = re.sub("host=[^&]+", f"host=127.0.0.1&port={relay.port}", direct)
        machines = [
            serve(cwd=deploy(tmp_path / name), DATABASE_URL=url)
            for name, url in (("far", far), ("near", direct))
        ]
        with under_load(machines, query) as (load, _):
            for _ in range(40 if LONG else 5):
                relay.cut()
                time.sleep(0.2)
            refused = load.answers[503]
            with relay.held_up():
                wait_until(lambda: load.answers[503] > refused)
        assert load.answers[503]


def test_hanging_server_is_503_in_time(machines, query, cluster):
    with under_load(machines, query) as loads:
        with cluster.paused():
            time.sleep(7)
        time.sleep(1)
    assert all(load.answers[503] for load in loads)


def test_full_disk_of_the_server_is_503(machines, query):
    full = "BEGIN RAISE EXCEPTION USING ERRCODE = '53100', MESSAGE = 'the disk is full'; END"
    with under_load(machines, query) as loads:
        query(
            f"CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS $$ {full} $$",
            "CREATE TRIGGER fill AFTER INSERT ON events EXECUTE FUNCTION fill()",
        )
        wait_until(lambda: all(load.answers[503] > 5 for load in loads))
        query("DROP TRIGGER fill ON events")
    assert all(load.answers[503] for load in loads)


def test_stranger_that_holds_a_lock_is_503_in_time(machines, query):
    with under_load(machines, query) as loads:
        query("BEGIN", "LOCK TABLE events IN EXCLUSIVE MODE", "SELECT pg_sleep(5)")
    assert all(load.answers[503] for load in loads)


# Moving over


def test_copy_moves_a_journal_and_goes_on_where_it_was_interrupted(
    tmp_path, cluster, database, monkeypatch
):
    monkeypatch.undo()  # the source is a file
    source = {"KYC_DATABASE": str(tmp_path / "source.db"), "PERSONA_WEBHOOK_SECRET": "x" * 16}
    source |= {"FLASK_RUN_FROM_CLI": "true"}
    kyc.prepare_database(kyc.read_config(source))
    app = kyc.create_app(source)
    client, run = app.test_client(), app.test_cli_runner()

    def send(name, **ids):
        body = ids.pop("body", None) or build(name, **ids)
        assert client.post("/webhook", data=body, headers=sign(body, "x" * 16)).status_code == 200

    for number in range(30):
        send("inquiry.approved", reference_id=f"user-{number}", inquiry_id=f"inq_{number}")
    send("inquiry.redacted", inquiry_id="inq_3")
    send("", body=b"\xff\0 no event")
    url = cluster.database(str(tmp_path / "target"))
    monkeypatch.setattr("postgres.copy.CHUNK", 7)
    result = run.invoke(args=["copy", url])
    assert result.exit_code == 0, result.output
    assert "32 events compared" in result.output
    send("inquiry.declined", reference_id="user-1", inquiry_id="inq_1b")
    send("inquiry.redacted", inquiry_id="inq_5")
    result = run.invoke(args=["copy", url])
    assert "34 events compared" in result.output, result.output
    app.extensions["journal"].stop()
    schema = cluster.schemas[str(tmp_path / "target")]
    with contextlib.closing(sqlite3.connect(tmp_path / "source.db")) as db:
        for query in (
            "SELECT * FROM kyc_status ORDER BY 1",
            "SELECT subject_id, redacted_before, ordered_by FROM redactions ORDER BY 1",
            "SELECT rowid, event_id, body_sha256, body IS NULL FROM events ORDER BY 1",
        ):
            assert cluster.execute(query, schema=schema) == db.execute(query).fetchall()
    target = kyc.create_app({"DATABASE_URL": url, "FLASK_RUN_FROM_CLI": "true"})
    checked = target.test_cli_runner().invoke(args=["check", "--full"]).output
    assert "0 of" in checked
    assert "rows differ" in checked


def test_copy_from_postgresql_is_one_line(runner, environ):
    result = runner("copy", environ["DATABASE_URL"])
    words = "this copies a file: pg_dump and pg_restore copy PostgreSQL"
    assert (result.exit_code, result.output) == (1, f"Error: {words}\n")
