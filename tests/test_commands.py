"""The commands, run as an operator runs them, beside a real server."""

import contextlib
import json
import os
import pty
import select
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PAYLOADS, ROOT, build, locked_file

import app as kyc

OFFICIAL = sorted(PAYLOADS.glob("*.json"))
COMMANDS = {
    "status": ["status", "user-1"],
    "events": ["events"],
    "replay": ["replay"],
    "rebuild": ["rebuild"],
    "redact": ["redact", "user-1"],
    "prune": ["prune", "--older-than", "0s"],
    "backup": ["backup", "copy.db"],
}


@pytest.fixture
def no_secret(database):
    """Variables of a shell in which only the path of the database is set."""
    return {"PERSONA_WEBHOOK_SECRET": ""}


@pytest.fixture
def fill(app, send):
    """Store events in the database without a server; yields the function that sends."""
    yield send
    app.extensions["journal"].stop()


@pytest.fixture
def begin(environ):
    """Start a `flask` command that goes on; it is gone when the test ends."""
    with contextlib.ExitStack() as stack:

        def begin(*arguments, **options):
            process = subprocess.Popen(
                [sys.executable, "-m", "flask", *arguments],
                env={**shell(), **environ},
                cwd=ROOT,
                **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield begin


@pytest.fixture
def at_once(flask):
    """Run several commands at the same time; return the finished processes."""

    def at_once(commands):
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda name: flask(name, *arguments(name), check=False), commands))

    return at_once


def shell():
    return {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}


def execute(database, statement, *values):
    """Run SQL in a connection of its own, as the sqlite3 shell does."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        return db.execute(statement, values).fetchall()


def projection(database):
    """Return inquiries and kyc_status, but for when rows were written."""
    inquiries = execute(database, "SELECT * FROM inquiries ORDER BY 1")
    people = execute(database, "SELECT * FROM kyc_status ORDER BY 1")
    return inquiries, [row[:-1] for row in people]


def read_line(process, seconds=15):
    """Return the next line a command prints; fail when none comes."""
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    assert ready, "no line came"
    return process.stdout.readline().decode()


def assert_one_line(process, *words):
    """Check that a command failed with one clear line on stderr and nothing on stdout."""
    assert process.returncode != 0
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith("Error: ")
    for word in words:
        assert word in process.stderr


def on_terminal(begin, typed, *arguments):
    """Run a command on a terminal and type into it; return its output and exit code."""
    master, slave = pty.openpty()
    process = begin(*arguments, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    os.write(master, typed.encode())
    output = b""
    with contextlib.suppress(OSError):  # the terminal is gone when the command ends
        while select.select([master], [], [], 15)[0] and (part := os.read(master, 4096)):
            output += part
    os.close(master)
    return output.decode(), process.wait(timeout=15)


@contextlib.contextmanager
def load(server):
    """Send events from four threads for the block; yields what was acknowledged."""
    acknowledged, refused, ended = [], [], threading.Event()

    def send(thread):
        for number in range(100_000):
            if ended.is_set():
                return
            event_id = f"evt_{thread}_{number}"
            ids = {"reference_id": f"load-{thread}-{number % 7}", "event_id": event_id}
            name = ("inquiry.created", "inquiry.approved")[number % 2]
            status, _ = server.send(build(name, **ids))
            (acknowledged if status == 200 else refused).append(event_id)

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield acknowledged
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=30)
    assert not refused


# help


@pytest.mark.parametrize("command", [*COMMANDS, "trigger", "check"])
def test_help_has_an_example(flask, command):
    text = flask(command, "--help").stdout
    assert f"flask {command}" in text.split("Example:")[1]
    assert all(len(line) <= 80 for line in text.splitlines())


# trigger


def test_triggered_event_is_received(serve, flask, database):
    server = serve()
    ids = ["--reference-id", "user-1", "--inquiry-id", "inq_1", "--account-id", "act_1"]
    when = ["--created-at", "2026-01-02T03:04:05Z", "--event-id", "evt_1"]
    url = ["--url", f"{server.url}/webhook"]
    output = flask("trigger", "inquiry.approved", *ids, *when, *url).stdout
    assert output == 'inquiry.approved evt_1 -> 200 {"received": true}\n'
    assert projection(database)[1] == [
        (
            *("user-1", "approved", "inq_1", "act_1", "evt_1"),
            *("inquiry.approved", "2026-01-02T03:04:05.000Z"),
        )
    ]


def test_trigger_finds_the_local_server_and_sends_many(serve, flask, database):
    server = serve()
    output = flask("trigger", "inquiry.created", "--count", "3", PORT=str(server.port)).stdout
    assert output.count(" -> 200 ") == 3
    assert execute(database, "SELECT count(*) FROM inquiries") == [(3,)]


def test_trigger_sends_duplicates_of_one_event_id(serve, flask):
    port = str(serve().port)
    many = ["--event-id", "evt_1", "--count", "2"]
    output = flask("trigger", "inquiry.created", *many, PORT=port).stdout
    assert output.splitlines()[1].endswith('{"received": true, "duplicate": true}')


def test_trigger_without_a_secret_uses_the_development_one(serve, flask, no_secret):
    port = str(serve(PERSONA_WEBHOOK_SECRET=kyc.DEVELOPMENT_SECRET).port)
    process = flask("trigger", "inquiry.created", PORT=port, **no_secret)
    assert "development secret" in process.stderr
    assert "wbhsec" not in process.stderr + process.stdout


def test_trigger_with_a_wrong_secret_shows_the_answer_and_fails(serve, flask):
    port = str(serve().port)
    process = flask(
        "trigger", "inquiry.created", PORT=port, PERSONA_WEBHOOK_SECRET="wbhsec_x", check=False
    )
    assert process.returncode == 1
    assert "-> 401" in process.stdout
    assert "Invalid signature" in process.stdout


@pytest.mark.parametrize("scheme", kyc.SCHEMES)
def test_trigger_signs_by_the_chosen_scheme(serve, flask, scheme):
    port = str(serve(PERSONA_SIGNATURE_SCHEME=scheme).port)
    output = flask("trigger", "inquiry.created", "--scheme", scheme, PORT=port).stdout
    assert "-> 200" in output


@pytest.mark.parametrize("inflection", ["kebab", "camel", "snake"])
def test_printed_event_reads_the_same_in_every_inflection(flask, inflection):
    ids = ["--reference-id", "user-1", "--inquiry-id", "inq_1", "--account-id", "act_1"]
    show = ["--inflection", inflection, "--print", "--event-id", "evt_1"]
    body = flask("trigger", "inquiry.approved", *ids, *show).stdout
    event = kyc.read_event(body.encode(), kyc.utc_now())
    assert event[:2] + event[3:8] == (
        *("evt_1", "inquiry.approved", "inquiry"),
        *("inq_1", "inq_1", "act_1", "user-1"),
    )


@pytest.mark.skipif(not OFFICIAL, reason="the official payloads are not here")
def test_every_official_event_name_can_be_triggered(send, db):
    names = {json.loads(path.read_bytes())["data"]["attributes"]["name"] for path in OFFICIAL}
    assert {send(name).status_code for name in names} == {200}
    stored = {row[0] for row in db.execute("SELECT name FROM events WHERE state = 'processed'")}
    assert stored == names


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: path.stem)
def test_built_event_has_the_links_of_the_official_one(path):
    official = kyc.read_event(path.read_bytes(), kyc.utc_now())
    built = kyc.read_event(build(official.name), kyc.utc_now())
    assert links(built) == links(official)


def links(event):
    """Return the kinds of an event's object and of what it points at."""
    ids = (event.object_id, event.inquiry_id, event.account_id)
    family = (event.object_type or "").split("/")[0]
    return family, [identifier and identifier.split("_")[0] for identifier in ids]


# status


def test_status_shows_where_a_person_stands(fill, flask, no_secret):
    fill("inquiry.created", reference_id="user-1", inquiry_id="inq_1", event_id="evt_1")
    fill("inquiry.approved", reference_id="user-1", inquiry_id="inq_1", account_id="act_1")
    lines = flask("status", "user-1", **no_secret).stdout.splitlines()
    assert lines[0] == "user-1: approved"
    table = lines[lines.index("") + 1 :]
    assert table[0].index("EVENT NAME") == table[1].index("inquiry.created")
    assert [line.split()[1] for line in table[1:]] == ["inquiry.created", "inquiry.approved"]


@pytest.mark.parametrize("identifier", ["user-1", "inq_1", "act_1"])
def test_status_as_json_takes_any_id_of_the_person(fill, flask, identifier):
    fill("inquiry.approved", reference_id="user-1", inquiry_id="inq_1", account_id="act_1")
    fill("report/watchlist.matched", inquiry_id="inq_1", account_id="act_1")
    person = json.loads(flask("status", identifier, "--json").stdout)
    assert (person["reference_id"], person["status"]) == ("user-1", "approved")
    assert len(person["timeline"]) == 2


def test_status_of_a_person_without_inquiry_shows_the_timeline(fill, flask):
    fill("account.created", account_id="act_1")
    assert flask("status", "act_1").stdout.startswith("act_1: no status yet\n")


def test_status_finds_a_person_by_an_account_without_inquiry(fill, flask):
    fill("account.created", account_id="act_1", reference_id="user-1")
    fill("graph-query.completed", account_id="act_1")
    (person,) = statuses(flask, "act_1")
    assert (person["reference_id"], len(person["timeline"])) == ("user-1", 2)


@pytest.mark.parametrize("identifier", ["inq_1", "act_1", "user-1"])
def test_status_finds_a_person_without_status_by_any_id(fill, flask, identifier):
    fill("verification.passed", inquiry_id="inq_1", account_id="act_1")
    fill("account.created", account_id="act_1", reference_id="user-1")
    people = statuses(flask, identifier)
    assert [person["reference_id"] for person in people] == ["user-1"]
    assert len(people[0]["timeline"]) == 2


def statuses(flask, identifier):
    """Return what `flask status` says, a person each."""
    lines = flask("status", identifier, "--json").stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_status_leaves_out_who_only_shares_a_case(fill, flask):
    fill("inquiry.approved", inquiry_id="inq_1", account_id="act_1", reference_id="user-1")
    fill("verification.passed", inquiry_id="inq_3")
    fill("case.created", inquiry_id="inq_3", account_id="act_1")
    assert [person["reference_id"] for person in statuses(flask, "inq_3")] == ["inq_3"]


def test_status_of_an_account_leaves_out_who_shares_a_case_with_it(fill, flask):
    fill("inquiry.approved", inquiry_id="inq_1", account_id="act_1", reference_id="user-1")
    fill("inquiry.approved", inquiry_id="inq_2", account_id="act_2", reference_id="user-2")
    fill("case.created", inquiry_id="inq_1", account_id="act_2")
    assert [person["reference_id"] for person in statuses(flask, "act_2")] == ["user-2"]


def test_output_is_legible_on_a_terminal_without_unicode(fill, flask):
    fill("inquiry.approved", reference_id="\u65e5")
    process = flask("status", "\u65e5", PYTHONIOENCODING="latin-1")
    assert process.stdout.startswith("\\u65e5: approved\n")


def test_argument_that_is_not_utf8_is_one_line(fill, flask):
    assert_one_line(flask("status", b"\xff", check=False), "an argument is not UTF-8")


def test_full_disk_of_the_output_is_not_blamed_on_the_database(fill, begin, database):
    fill("inquiry.approved", reference_id="user-1")
    with open("/dev/full", "wb") as full:
        process = begin("status", "user-1", stdout=full, stderr=subprocess.PIPE, text=True)
        words = process.communicate(timeout=30)[1]
    assert words.startswith("Error: No space left on device\n")


def test_output_cannot_move_the_cursor(fill, flask):
    fill("inquiry.approved", reference_id="user\x1b[2J")
    assert "\x1b" not in flask("status", "user\x1b[2J").stdout


# events


def test_events_lists_the_newest_in_order_of_arrival(fill, flask, no_secret):
    for number in range(5):
        fill("inquiry.created", event_id=f"evt_{number}")
    lines = flask("events", "--limit", "2", **no_secret).stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["evt_3", "evt_4"]
    assert lines[0].index("EVENT ID") == lines[1].index("evt_3")


def test_events_filters_by_name_state_and_time(fill, flask):
    fill("inquiry.created", event_id="evt_1")
    fill("report/watchlist.matched", event_id="evt_2")
    fill(b"not an event")

    def found(*options):
        output = flask("events", "--json", *options).stdout
        return [json.loads(line)["position"] for line in output.splitlines()]

    assert found("--name", "report/*") == [2]
    assert found("--state", "unrecognized") == [3]
    assert found("--since", "1h") == [1, 2, 3]
    assert found("--since", "2999-01-01") == []
    assert found("--after", "1", "--limit", "1") == [2]


def test_json_events_have_stable_keys_and_no_body(fill, flask):
    fill("inquiry.created", event_id="evt_1")
    event = json.loads(flask("events", "--json").stdout)
    assert list(event) == [
        *("position", "received_at", "created_at", "name", "state", "event_id"),
        *("object_type", "object_id", "inquiry_id", "account_id", "reference_id"),
        *("attempt", "error", "body_sha256", "redacted_at"),
    ]


def test_follow_flushes_each_line_and_survives_a_restart(serve, begin):
    server = serve()
    server.send(build("inquiry.created", event_id="evt_1"))
    server.send(build("inquiry.created", event_id="evt_2"))
    follower = begin("events", "--follow", "--json", "--after", "1")
    assert json.loads(read_line(follower))["event_id"] == "evt_2"
    assert server.stop() == 0
    serve().send(build("inquiry.created", event_id="evt_3"))
    assert json.loads(read_line(follower))["event_id"] == "evt_3"


def test_follow_ends_at_an_interrupt_without_a_traceback(fill, begin):
    fill("inquiry.created", event_id="evt_1")
    follower = begin("events", "--follow", "--json")
    read_line(follower)
    follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=15)
    assert follower.returncode != 0
    assert b"Traceback" not in errors


def test_follow_with_a_filter_shows_only_what_matches(fill, begin):
    fill("inquiry.created", event_id="evt_1")
    follower = begin("events", "--follow", "--json", "--name", "inquiry.approved")
    time.sleep(1)
    fill("inquiry.created", event_id="evt_2")
    fill("inquiry.approved", event_id="evt_3")
    assert json.loads(read_line(follower))["event_id"] == "evt_3"


@pytest.mark.parametrize("options", [[], ["--json"], ["--json", "--follow"]])
def test_a_reader_that_leaves_ends_the_listing_quietly(fill, begin, options):
    for _ in range(50):
        fill("inquiry.created")
    process = begin("events", "--limit", "50", *options)
    read_line(process)
    process.stdout.close()
    fill("inquiry.created")
    assert process.communicate(timeout=15)[1] == b""


def test_colours_are_for_terminals_only(fill, flask, begin):
    fill("inquiry.created")
    shown, _ = on_terminal(begin, "", "events")
    assert "\x1b[1m" in shown
    assert "\x1b" not in flask("events").stdout


# replay


@pytest.fixture
def failed(fill, database):
    """Two events whose handlers failed; the handler has been mended since."""
    for event_id in ("evt_2", "evt_1"):
        fill("inquiry.approved", reference_id="user-1", event_id=event_id)
    execute(database, "UPDATE events SET state = 'failed', error = 'ValueError: x'")


@pytest.fixture
def note(handlers, database):
    """A handler that writes the IDs of approvals to a table."""
    execute(database, "CREATE TABLE notes (event_id TEXT)")

    @kyc.on("inquiry.approved")
    def note(db, event):
        db.execute("INSERT INTO notes VALUES (?)", (event.event_id,))


def test_replay_runs_all_failed_events(failed, flask, no_secret, database):
    output = flask("replay", **no_secret).stdout
    assert output == "evt_2 processed\nevt_1 processed\n2 processed, 0 failed\n"
    assert execute(database, "SELECT DISTINCT state, error FROM events") == [("processed", None)]


def test_replay_runs_one_event(failed, flask, database):
    flask("replay", "evt_1")
    assert execute(database, "SELECT event_id FROM failed_events") == [("evt_2",)]


def test_replay_runs_the_handler(failed, app, note, database):
    result = app.test_cli_runner().invoke(args=["replay"])
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "2 processed, 0 failed")
    assert execute(database, "SELECT event_id FROM notes") == [("evt_2",), ("evt_1",)]
    assert execute(database, "SELECT DISTINCT state, error FROM events") == [("processed", None)]


def test_replay_keeps_the_error_of_a_handler_that_fails_again(failed, app, note, database):
    @kyc.on("inquiry.approved")
    def fail(db, event):
        if event.event_id == "evt_2":
            raise LookupError("no such plan")

    result = app.test_cli_runner().invoke(args=["replay"])
    assert result.exit_code == 1
    assert "evt_2 failed: LookupError: no such plan\n" in result.output
    query = "SELECT event_id, state, error FROM events WHERE state = 'failed'"
    assert execute(database, query) == [("evt_2", "failed", "LookupError: no such plan")]
    assert execute(database, "SELECT event_id FROM notes") == [("evt_1",)]


def test_replay_of_what_did_not_fail_is_refused(failed, flask):
    assert_one_line(flask("replay", "evt_1", "evt_9", check=False), "evt_9: not a failed event")


def test_replay_of_a_redacted_event_says_why_it_fails(failed, flask):
    flask("redact", "user-1")
    process = flask("replay", "evt_1", check=False)
    assert process.returncode == 1
    assert "evt_1 failed: its body was removed" in process.stdout
    assert process.stdout.endswith("0 processed, 1 failed\n")


def test_failed_events_whose_bodies_were_removed_stop_nobody(failed, flask, database):
    flask("redact", "evt_1")
    output = flask("replay").stdout
    assert output.endswith("1 processed, 0 failed, 1 passed over: their bodies were removed\n")
    assert "1 more failed for good: their bodies were removed" in flask("check").stdout


# rebuild


def test_rebuild_mends_what_was_wrecked(fill, flask, no_secret, database):
    for number in range(30):
        fill("inquiry.approved", reference_id=f"user-{number}", inquiry_id=f"inq_{number}")
    before = projection(database)
    execute(database, "UPDATE kyc_status SET status = 'declined' WHERE reference_id < 'user-2'")
    execute(database, "DELETE FROM inquiries WHERE inquiry_id > 'inq_2'")
    execute(database, "DELETE FROM kyc_status WHERE reference_id = 'user-5'")
    execute(
        database, "INSERT INTO inquiries SELECT 'inq_x', 'user-x', null, 'failed', 'e', 'n', ''"
    )
    output = flask("rebuild", **no_secret).stdout
    assert projection(database) == before
    assert "user-0: declined -> approved\n" in output
    assert "user-5: (no row) -> approved\n" in output


def test_rebuild_reads_without_holding_up_writers(app, database):
    with app.app_context(), contextlib.closing(kyc.open_shadow()) as shadow:
        shadow.execute("BEGIN IMMEDIATE")
        assert shadow.execute("SELECT count(*) FROM events").fetchone()[0] == 0
        with contextlib.closing(sqlite3.connect(database, timeout=0)) as db:
            db.execute("BEGIN IMMEDIATE")


def test_rebuild_of_a_sound_database_changes_nothing(fill, flask, database):
    fill("inquiry.approved", reference_id="user-1")
    before = execute(database, "SELECT * FROM kyc_status")
    assert flask("rebuild").stdout == "1 events read; 0 rows differed, 0 of them people\n"
    assert execute(database, "SELECT * FROM kyc_status") == before


def test_rebuild_loses_no_delivery_that_arrives_meanwhile(serve, flask, database):
    with load(serve()) as acknowledged:
        for wreck in ("DELETE FROM inquiries", "DELETE FROM kyc_status"):
            time.sleep(0.5)
            execute(database, wreck)
            flask("rebuild")
    stored = {row[0] for row in execute(database, "SELECT event_id FROM events")}
    assert stored == set(acknowledged)
    before = projection(database)
    assert len(before[1]) == 28
    assert flask("rebuild").stdout.endswith(" 0 rows differed, 0 of them people\n")


# backup

MANY_STEPS = """
    INSERT INTO events (event_id, name, created_at, received_at, body_sha256, state, body)
    VALUES ('evt_large', 'account.created', '', '', '', 'processed', zeroblob(80000000))
"""


def test_backup_under_load_is_consistent(serve, flask, no_secret, database, tmp_path):
    copy = tmp_path / "copy.db"
    server = serve()
    execute(database, MANY_STEPS)
    with load(server) as acknowledged:
        time.sleep(1)
        before = set(acknowledged)
        started = time.monotonic()
        output = flask("backup", str(copy), **no_secret).stdout
        seconds = time.monotonic() - started
    assert seconds < 15  # it does not begin again with every event that arrives
    assert output.endswith("bytes, checked\n")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert before <= {row[0] for row in execute(copy, "SELECT event_id FROM events")}
    assert flask("rebuild", KYC_DATABASE=str(copy)).stdout.endswith(" 0 of them people\n")
    assert list(tmp_path.glob("copy*.part*")) == []


def test_backup_never_overwrites(fill, flask, tmp_path):
    copy = tmp_path / "copy.db"
    copy.write_text("precious")
    assert_one_line(flask("backup", str(copy), check=False), "copy.db", "exists")
    assert copy.read_text() == "precious"


@pytest.mark.parametrize("path", [".", "/", ""])
def test_backup_needs_a_file_name(fill, flask, path):
    fill("inquiry.approved")
    assert_one_line(flask("backup", path, check=False), "name a file")


def test_failed_backup_leaves_nothing_behind(fill, environ, tmp_path):
    for _ in range(100):
        fill("inquiry.created")
    target = tmp_path / "backups"
    target.mkdir()
    command = f"ulimit -f 64; exec {sys.executable} -m flask backup {target}/copy.db"
    process = subprocess.run(
        ["bash", "-c", command],
        env={**shell(), **environ, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert_one_line(process)
    assert list(target.iterdir()) == []


def test_backup_can_be_restored(serve, flask, database, tmp_path):
    server = serve()
    server.send(build("inquiry.approved", reference_id="user-1"))
    flask("backup", str(tmp_path / "copy.db"))
    server.send(build("inquiry.declined", reference_id="user-1"))
    server.stop()
    for suffix in ("", "-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    (tmp_path / "copy.db").rename(database)
    server = serve()
    assert flask("status", "user-1").stdout.startswith("user-1: approved\n")
    assert server.send(build("inquiry.declined", reference_id="user-1"))[0] == 200


# check


def test_check_finds_nothing_wrong(fill, flask):
    fill("inquiry.created")
    lines = flask("check").stdout.splitlines()
    assert {line.split()[0] for line in lines} == {"ok"}
    assert any("1 in the journal" in line for line in lines)


@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        ({"PERSONA_WEBHOOK_SECRET": ""}, "PERSONA_WEBHOOK_SECRET is not set"),
        ({"PERSONA_WEBHOOK_SECRET": kyc.DEVELOPMENT_SECRET}, "the development secret"),
        ({"PERSONA_SIGNATURE_TOLERANCE": "0"}, "set a tolerance"),
        ({"PERSONA_SIGNATURE_SCHEME": "body"}, "old deliveries can be replayed"),
    ],
)
def test_check_names_a_dangerous_setting(fill, flask, variables, advice):
    assert_wrong(flask("check", check=False, **variables), advice)


def test_check_names_a_file_that_others_can_read(fill, flask, database):
    database.chmod(0o644)
    assert_wrong(flask("check", check=False), "kyc.db has mode 0644; chmod 600")


def test_check_names_failed_events(failed, flask):
    assert_wrong(flask("check", check=False), "2 failed events; see the view failed_events")


def test_check_names_a_missing_database(flask):
    assert_wrong(flask("check", check=False), "there is no such file; start the service")


def test_check_names_a_file_of_another_kind(flask, database):
    database.write_bytes(b"no database" * 1000)
    database.chmod(0o600)
    assert_wrong(flask("check", check=False), "file is not a database")


def test_check_names_a_damaged_database(fill, flask, database):
    for _ in range(100):
        fill("inquiry.created")
    execute(database, "PRAGMA wal_checkpoint(TRUNCATE)")
    with database.open("r+b") as file:
        file.seek(4096 * 30)
        file.write(b"\xff" * 4096 * 10)
    assert_wrong(flask("check", check=False), "restore a backup")


def assert_wrong(process, advice):
    """Check that exactly one line is wrong, that it advises, and that the exit code says so."""
    assert process.returncode == 1
    assert process.stderr == ""
    wrong = [line for line in process.stdout.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 1, process.stdout
    assert advice in wrong[0]


# errors


def test_missing_database_is_one_line(at_once, database):
    for process in at_once(COMMANDS):
        assert_one_line(process, str(database), "there is no such file")
    assert list(database.parent.iterdir()) == []
    assert not (ROOT / "copy.db").exists()


def test_file_that_is_no_database_is_one_line(at_once, database):
    database.write_bytes(b"no database" * 1000)
    for process in at_once(COMMANDS):
        assert_one_line(process, "file is not a database")


def test_database_of_another_application_is_one_line(at_once, database):
    execute(database, "CREATE TABLE songs (title)")
    for process in at_once(COMMANDS):
        assert_one_line(process, "has no journal yet")
    assert execute(database, "SELECT name FROM sqlite_schema") == [("songs",)]


def test_locked_database_is_one_line(failed, at_once, database):
    execute(database, "DELETE FROM kyc_status")
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        ended = at_once(["redact", "rebuild"])
    assert sum("database is locked" in process.stderr for process in ended) >= 1
    for process in ended:
        assert_one_line(process, "lock")


def arguments(command):
    """Return arguments with which a command writes."""
    return COMMANDS[command][1:]


def test_held_lock_file_is_one_line(failed, flask, database):
    with locked_file(database):
        assert_one_line(flask("replay", check=False), "lock file")


@pytest.mark.parametrize("command", ["status", "redact"])
def test_unknown_id_is_one_line(fill, flask, command):
    fill("inquiry.created")
    assert_one_line(flask(command, "user-9", check=False), "user-9", "no event names this ID")


def test_unreachable_server_is_one_line(flask):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/webhooks/persona"
        process = flask("trigger", "inquiry.created", "--url", url, check=False)
    assert_one_line(process, url, "Connection refused")


def test_redirect_is_shown_and_not_followed(flask):
    head = b"HTTP/1.1 301 Moved Permanently\r\nLocation: /\r\nContent-Length: 5\r\n\r\n"
    with answering(head + b"moved") as url:
        process = flask("trigger", "inquiry.created", "--url", url, check=False)
    assert process.returncode == 1
    assert process.stdout.endswith(" -> 301 moved\n")


@pytest.mark.parametrize(
    "url", ["nonsense", "http://127.0.0.1:port/", "http://[::1", "file:///dev/null", "data:,x"]
)
def test_wrong_url_is_one_line(flask, url):
    assert_one_line(flask("trigger", "inquiry.created", "--url", url, check=False), url)


def test_server_that_speaks_another_protocol_is_one_line(flask):
    with answering(b"220 mail ready\r\n") as url:
        process = flask("trigger", "inquiry.created", "--url", url, check=False)
    assert_one_line(process, url)


@contextlib.contextmanager
def answering(words):
    """Answer one connection with these bytes, whatever it asks; yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_one, args=(server, words))
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        thread.join(timeout=15)


def answer_one(server, words):
    """Accept a connection, read what it sends, and answer."""
    server.settimeout(15)
    connection, _ = server.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(words)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):  # or what is not read would reset the connection
            pass


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "--older-than", "soon"],
        ["events", "--since", "yesterday"],
        ["events", "--limit", "0"],
        ["events", "--limit", "99999999999999999999"],
        ["events", "--after", "99999999999999999999"],
        ["events", "--since", "999999d"],
        ["trigger", "approved"],
        ["trigger", "inquiry.created", "--count", "many"],
    ],
    ids=" ".join,
)
def test_bad_value_is_refused(fill, flask, command):
    process = flask(*command, check=False)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("Error: Invalid value")
    assert "Traceback" not in process.stderr


def test_bad_setting_is_one_line(flask):
    process = flask("events", MAX_BODY_BYTES="many", check=False)
    assert process.returncode != 0
    assert process.stderr.splitlines() == [
        "app.py: MAX_BODY_BYTES must be a whole number from 1 to 500000000"
    ]


# asking


@pytest.mark.parametrize(
    ("typed", "options", "kept"), [("n\n", [], 1), ("y\n", [], 0), ("", ["--yes"], 0)]
)
@pytest.mark.parametrize("command", ["redact", "prune"])
def test_removal_asks_on_a_terminal(fill, begin, database, command, typed, options, kept):
    fill("inquiry.approved", reference_id="user-1")
    output, code = on_terminal(begin, typed, command, *arguments(command), *options)
    assert execute(database, "SELECT count(body) FROM events") == [(kept,)]
    assert ("[y/N]" in output) == (not options)
    assert code == kept


@pytest.mark.parametrize("command", ["redact", "prune"])
def test_removal_asks_nobody_without_a_terminal(fill, flask, database, command):
    fill("inquiry.approved", reference_id="user-1")
    assert flask(command, *arguments(command)).stdout == "1 body removed\n"
    assert execute(database, "SELECT count(body) FROM events") == [(0,)]
