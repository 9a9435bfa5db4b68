"""flask restore: what another file of the journal holds comes back, once and as it was."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys

import pytest
from conftest import Load, ask, assert_kept, bare_environment, build, stored, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app as kyc
from commands.remove import ORDER

NOW = "2026-05-01T00:00:00.000Z"
TABLES = (  # but for the positions, and when a row last changed
    """SELECT event_id, name, created_at, object_type, object_id, object_status, inquiry_id,
        account_id, reference_id, template_id, source, signed_by, attempt, body_sha256, body
        FROM events ORDER BY event_id""",
    "SELECT * FROM inquiries ORDER BY inquiry_id",
    "SELECT * FROM accounts ORDER BY account_id",
    "SELECT * FROM holds ORDER BY object_id, rule",
    """SELECT reference_id, status, hold, inquiry_id, account_id, template_id, event_id,
        event_name, event_at FROM kyc_status ORDER BY reference_id""",
    """SELECT DISTINCT subject_id, redacted_before, ordered_by, command FROM redactions
        WHERE command <> 'event' ORDER BY 1, 2, 3""",
)


def make(path, bodies=(), received_at=NOW, **order):
    """Create a journal of these bodies at `path`, or add them; return the path."""
    kyc.prepare_database(kyc.read_config({"KYC_DATABASE": str(path)}))
    with contextlib.closing(kyc.connect(path)) as db:
        for start in range(0, len(bodies), 500):
            with kyc.transaction(db):
                kyc.store(db, [read(body, received_at) for body in bodies[start : start + 500]])
        if order:
            obey(path, **order)
    return path


def obey(path, subject=None, before=NOW, command="redact"):
    """Write an order of redaction into a journal."""
    values = {"subject": subject, "before": before, "command": command}
    with contextlib.closing(kyc.connect(path)) as db, kyc.transaction(db):
        db.execute(ORDER, {**values, "now": NOW, "by": "ops", "reason": None})
        if command == "prune":
            query = "UPDATE events SET body = NULL, redacted_at = ? WHERE created_at < ?"
            db.execute(query, (NOW, before))


def read(body, received_at=NOW):
    event = kyc.read_event(body, received_at)
    return kyc.Delivery(event, body, received_at, signed_by="2eb6f8a2", attempt=3)


def tables(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [db.execute(query).fetchall() for query in TABLES]


@pytest.fixture
def old(tmp_path):
    """The path of the old file."""
    (tmp_path / "aside").mkdir()
    return tmp_path / "aside" / "kyc.db"


def approvals(number, word="old"):
    return [
        build(event_id=f"evt_{word}_{n}", inquiry_id=f"inq_{word}_{n}", reference_id=f"{word}-{n}")
        for n in range(number)
    ]


# What is brought


def test_what_is_missing_is_appended_as_it_was(runner, send, old, database):
    bodies = approvals(3)
    make(old, bodies)
    send(bodies[1], event_id=None)
    send("inquiry.created", reference_id="user-1")
    result = runner("restore", str(old))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1:] == [
        "  2 new: 2 inquiry.approved",
        "  1 already there",
        "0 redactions new, 0 bodies removed",
        "2 people changed",
        "  old-0: unknown -> approved",
        "  old-2: unknown -> approved",
    ]
    assert stored(database)[2:] == ["evt_old_0", "evt_old_2"]
    columns = "received_at, source, signed_by, attempt, state, body"
    (row,) = ask(database, f"SELECT {columns} FROM events WHERE event_id = 'evt_old_0'")  # noqa: S608
    assert row == (NOW, "webhook", "2eb6f8a2", 3, "processed", bodies[0].decode())


def test_second_time_brings_nothing(runner, app, old, database):
    make(old, approvals(250), subject="old-7")
    first = json.loads(runner("restore", str(old), "--json").stdout)
    before = tables(database)
    second = json.loads(runner("restore", str(old), "--json").stdout)
    assert (first["events"], first["new"], first["redactions"]) == (
        250,
        {"inquiry.approved": 250},
        1,
    )
    assert (second["events"], second["new"], second["redactions"]) == (250, {}, 0)
    assert (second["changes"], tables(database)) == ({}, before)


def test_wal_beside_the_old_file_is_read(runner, app, old, database, tmp_path):
    source = make(tmp_path / "other.db")
    with contextlib.closing(kyc.connect(source)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        with kyc.transaction(db):
            kyc.store(db, [read(body) for body in approvals(2)])
        for suffix in ("", "-wal"):  # as a machine leaves them that died
            shutil.copy(f"{source}{suffix}", f"{old}{suffix}")
    content = [old.read_bytes(), old.with_name("kyc.db-wal").read_bytes()]
    assert runner("restore", str(old)).exit_code == 0
    assert stored(database) == ["evt_old_0", "evt_old_1"]
    assert [old.read_bytes(), old.with_name("kyc.db-wal").read_bytes()] == content


def test_hold_by_hand_comes_along(runner, send, old, database):
    make(old, approvals(1))
    there = {"KYC_DATABASE": str(old)}
    app = kyc.create_app({**there, "FLASK_RUN_FROM_CLI": "true"})
    app.test_cli_runner().invoke(args=["hold", "old-0", "--reason", "chargeback"])
    assert "old-0: unknown -> approved, held" in runner("restore", str(old)).stdout
    assert runner("release", "old-0", "--reason", "withdrawn").exit_code == 0
    assert "approved, held -> approved" not in runner("restore", str(old)).stdout
    assert ask(database, "SELECT hold FROM kyc_status") == [(None,)]


def test_copy_that_knows_more_fills_in_what_is_missing(runner, send, old, database):
    body = build("inquiry.approved", event_id="evt_1", inquiry_id="inq_1")
    make(old, [body.replace(b'"reference-id": null', b'"reference-id": "user-1"')])
    send(body)
    output = runner("restore", str(old)).stdout
    assert "1 already there, 1 of them with another body, which stays" in output
    assert "  user-1: unknown -> approved" in output
    assert ask(database, "SELECT body FROM events") == [(body.decode(),)]
    assert ask(database, "SELECT reference_id FROM kyc_status") == [("user-1",)]


def test_failed_event_waits_for_replay(runner, app, handlers, old, database):
    make(old, approvals(3))
    with contextlib.closing(sqlite3.connect(old)) as db, db:
        db.execute("UPDATE events SET state = 'failed', error = 'KeyError: x' WHERE rowid = 1")
        db.execute("UPDATE events SET state = 'pending' WHERE rowid = 2")
    seen = []
    kyc.on("inquiry.approved")(lambda db, event: seen.append(event.event_id))
    output = runner("restore", str(old)).stdout
    assert "2 new events failed or pending: flask replay runs the handlers" in output
    assert "1 new event had handlers run there" in output
    assert seen == []
    assert "2 processed, 0 failed" in runner("replay").stdout
    assert seen == ["evt_old_0", "evt_old_1"]


# Redactions


def bodies_of(path):
    return dict(ask(path, "SELECT event_id, body IS NOT NULL FROM events"))


def test_body_that_was_removed_there_is_removed_here(runner, send, old, database):
    bodies = approvals(4)
    for body in bodies[:3]:
        send(body)
    make(old, bodies, subject="old-0")
    obey(old, command="prune", before="2999")
    output = runner("restore", str(old)).stdout
    assert "2 redactions new, 3 bodies removed" in output
    assert set(bodies_of(database).values()) == {0}
    send("inquiry.created", reference_id="old-0", created_at="2026-01-01T00:00:00Z")
    assert sum(bodies_of(database).values()) == 0  # for the order is here, too


@pytest.mark.parametrize("subject", ["old-1", "inq_old_1"])
def test_body_that_was_removed_here_does_not_come_back(runner, send, old, database, subject):
    bodies = approvals(3)
    bodies.append(
        build("case.created", event_id="evt_case", object_id="case_1").replace(
            b'"note": null', b'"note": "inq_old_1"'
        )
    )
    make(old, bodies)
    make(database, subject=subject, before="2999")
    output = runner("restore", str(old)).stdout
    assert bodies_of(database) == {"evt_old_0": 1, "evt_old_1": 0, "evt_old_2": 1, "evt_case": 0}
    assert "2 bodies removed" in output
    assert sum(bodies_of(old).values()) == 4


def test_redaction_by_an_event_is_ordered_once(runner, send, old, database):
    bodies = [*approvals(2), build("inquiry.redacted", inquiry_id="inq_old_1", event_id="evt_r")]
    make(old, bodies)
    send(bodies[1])
    for _ in range(2):
        runner("restore", str(old))
    assert ask(database, "SELECT count(*) FROM redactions") == [(1,)]
    assert bodies_of(database) == {"evt_old_1": 0, "evt_old_0": 1, "evt_r": 0}


# Any two files

NAMES = ("created", "started", "completed", "approved", "declined", "redacted")
one_event = st.tuples(
    st.sampled_from([*(f"inquiry.{name}" for name in NAMES), "account.created"]),
    st.integers(0, 3),  # the inquiry
    st.none() | st.integers(0, 1),  # the account
    st.none() | st.integers(0, 2),  # the person
    st.integers(0, 9),  # the day
    st.sampled_from(("old", "new", "both")),
)
one_order = st.tuples(
    st.sampled_from(("user-0", "user-1", "inq_0", "act_1")),
    st.integers(0, 9),
    st.sampled_from(("old", "new", "both")),
)


def build_one(number, name, inquiry, account, person, day, _):
    ids = {"account_id": account if account is None else f"act_{account}"}
    if name.startswith("account"):
        ids = {"account_id": f"act_{account or 0}"}
    else:
        ids["inquiry_id"] = f"inq_{inquiry}"
    ids["reference_id"] = person if person is None else f"user-{person}"
    created_at = f"2026-03-0{day}T00:00:00.000Z" if day else "2026-02-28T00:00:00.000Z"
    return build(name, event_id=f"evt_{number:03}", created_at=created_at, **ids)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(one_event, max_size=24), st.lists(one_order, max_size=3))
def test_two_files_become_what_one_would_have_been(tmp_path_factory, events, orders):
    folder = tmp_path_factory.mktemp("any")
    bodies = [(one[-1], build_one(number, *one)) for number, one in enumerate(events)]
    paths = {name: folder / f"{name}.db" for name in ("old", "new", "both")}
    for name, path in paths.items():
        wanted = [body for where, body in bodies if name == "both" or where in (name, "both")]
        make(path, wanted)
        for subject, day, where in orders:
            if name == "both" or where in (name, "both"):
                obey(path, subject, f"2026-03-{day + 1:02}T00:00:00.000Z")
    app = kyc.create_app({"KYC_DATABASE": str(paths["new"]), "FLASK_RUN_FROM_CLI": "true"})
    result = app.test_cli_runner().invoke(args=["restore", str(paths["old"])])
    assert result.exit_code == 0, result.output
    assert tables(paths["new"]) == tables(paths["both"])
    assert " 0 people changed" in app.test_cli_runner().invoke(args=["rebuild"]).stdout


# From outside


def begin(environ, deployment, old):
    """Start the command as an operator does."""
    command = [sys.executable, "-m", "flask", "restore", str(old)]
    return subprocess.Popen(
        command, env={**bare_environment(), **environ}, cwd=deployment, stdout=subprocess.DEVNULL
    )


def test_killed_in_the_middle_it_goes_on_from_there(environ, deployment, flask, old, database):
    make(old, approvals(3000))
    make(database)
    process = begin(environ, deployment, old)
    try:
        wait_until(lambda: len(stored(database)) >= 500)
    finally:
        process.kill()
        process.wait()
    brought = len(stored(database))
    assert 500 <= brought < 3000
    assert len(ask(database, "SELECT 1 FROM kyc_status")) == brought
    assert f"  {3000 - brought:,} new" in flask("restore", str(old)).stdout
    assert tables(database) == tables(old)
    assert stored(database) == stored(old)
    assert flask("rebuild").stdout == "3,000 events, 0 people changed\n"


def test_service_serves_meanwhile(serve, flask, old, database):
    make(old, approvals(1500))
    server = serve("--workers", "2")
    with Load(server.port, clients=4) as load:
        wait_until(lambda: len(load.accepted) >= 50)
        output = flask("restore", str(old)).stdout
    assert "  1,500 new: 1,500 inquiry.approved" in output
    assert set(load.answers) == {200}
    assert_kept(database, load.accepted)
    assert set(stored(old)) <= set(stored(database))
    assert flask("rebuild").stdout.endswith(" 0 people changed\n")
    wal = database.with_name("kyc.db-wal")
    wait_until(lambda: wal.stat().st_size == 0)  # at rest, whoever wrote it


# What cannot be read


def refuse(runner, path):
    result = runner("restore", str(path))
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr


def test_file_that_is_no_journal_is_refused(runner, app, old):
    assert "there is no such file" in refuse(runner, old)
    old.write_text("no database")
    assert f"{old}: file is not a database" in refuse(runner, old)
    old.write_bytes(b"")
    assert "no journal of this release" in refuse(runner, old)
    with contextlib.closing(sqlite3.connect(old)) as db:
        db.execute("CREATE TABLE clients (id)")
        db.execute(f"PRAGMA user_version = {kyc.SCHEMA_VERSION}")
    assert f"{old}: no such table: events" in refuse(runner, old)
    assert f"{old.parent}: " in refuse(runner, old.parent)


@pytest.mark.parametrize("version", [1, kyc.SCHEMA_VERSION + 1])
def test_journal_of_another_version_is_refused(runner, app, old, version):
    make(old)
    with contextlib.closing(sqlite3.connect(old)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    assert "of this service" in refuse(runner, old)


def test_own_file_is_refused(runner, app, database, tmp_path):
    link = tmp_path / "link.db"
    link.symlink_to(database)
    for path in (database, link):
        assert "that is KYC_DATABASE itself" in refuse(runner, path)


def test_damage_is_named_and_what_was_brought_stays(runner, app, old, database):
    make(old, approvals(1000))
    with contextlib.closing(sqlite3.connect(old)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        db.execute("PRAGMA journal_mode = DELETE")
    content = bytearray(old.read_bytes())
    place = content.index(b'"id": "evt_old_700"')
    content[place - 3000 : place + 3000] = b"\xff" * 6000
    old.write_bytes(content)
    result = runner("restore", str(old))
    assert result.exit_code == 1
    assert f"{old}: database disk image is malformed" in result.stderr
    brought = len(stored(database))
    assert 100 <= brought < 1000
    assert f"  {brought:,} new" in result.stdout


def test_wal_of_another_database_beside_the_old_file_is_told(runner, app, old, tmp_path):
    other = tmp_path / "other.db"
    make(other, approvals(50, "other"))
    with contextlib.closing(kyc.connect(other)):  # whoever closes last removes the WAL
        make(other, approvals(60, "other"))
        wal = kyc.wal_paths(other)[0].read_bytes()
    make(old, approvals(200))
    kyc.wal_paths(old)[0].write_bytes(wal)
    result = runner("restore", str(old))
    assert result.exit_code == 1
    assert f"WARNING: {old} is damaged" in result.stderr
