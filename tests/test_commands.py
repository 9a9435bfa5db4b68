"""The commands as an operator runs them: in this process, and as processes beside a server."""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time

import pytest
from conftest import PAYLOADS, ROOT, SECRET, ask, bare_environment, build, locked_file

import app as kyc
from commands.names import doubt_name
from commands.trigger import sign

OFFICIAL = sorted(PAYLOADS.glob("*.json"))
EARLY, LATER, LAST = (f"2026-01-0{day}T00:00:00.000Z" for day in (1, 2, 3))
COMMANDS = {  # with arguments with which they open the database
    "status": ["user-1"],
    "events": [],
    "replay": [],
    "rebuild": [],
    "redact": ["user-1", "--yes"],
    "prune": ["--older-than", "0s", "--yes"],
    "backup": ["copy.db"],
    "restore": ["old.db"],
    "hold": ["user-1", "--reason", "r", "--yes"],
    "release": ["user-1", "--reason", "r"],
}
OTHERS = ["trigger", "check", "handlers", "version"]
OTHERS += ["backfill", "reconcile", "forward", "export", "copy"]


@pytest.fixture
def run(runner):
    """Run a command in this process; return what it prints to stdout."""

    def run(*arguments, code=0, **options):
        result = runner(*arguments, **options)
        assert result.exit_code == code, result.output
        return result.stdout

    return run


@pytest.fixture
def shell(environ):
    """Return what runs a command in this process, with other variables; it makes no database."""

    def shell(**variables):
        app = kyc.create_app({**environ, **variables, "FLASK_RUN_FROM_CLI": "true"})
        return lambda *arguments: app.test_cli_runner().invoke(args=arguments)

    return shell


@pytest.fixture
def begin(environ, deployment):
    """Start a `flask` command that goes on; it is gone when the test ends."""
    with contextlib.ExitStack() as stack:

        def begin(*arguments, variables=None, **options):
            process = subprocess.Popen(
                [sys.executable, "-m", "flask", *arguments],
                env={**bare_environment(), **environ, **(variables or {})},
                cwd=deployment,
                preexec_fn=heed_interrupts,
                **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield begin


def heed_interrupts():
    """Undo what a shell does to what it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def projection(database):
    """Return the projections, but for when rows were written."""
    tables = ("inquiries", "accounts", "holds", "kyc_status")
    query = "SELECT * FROM {} ORDER BY 1"
    rows = {table: ask(database, query.format(table)) for table in tables}
    return rows | {"kyc_status": [row[:-1] for row in rows["kyc_status"]]}


def people(database):
    """Return where everybody stands."""
    query = "SELECT reference_id, status || iif(hold IS NULL, '', ', held') FROM kyc_status"
    return dict(ask(database, query))


def read_line(process, seconds=15):
    """Return the next line a command prints; fail when none comes."""
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    assert ready, "no line came"
    return process.stdout.readline().decode()


def on_terminal(begin, typed, *arguments, **options):
    """Run a command on a terminal of 80 columns and type into it; return output and exit code."""
    master, slave = pty.openpty()
    process = begin(*arguments, stdin=slave, stdout=slave, stderr=slave, **options)
    os.close(slave)
    os.write(master, typed.encode())
    output = b""
    with contextlib.suppress(OSError):  # the terminal is gone when the command ends
        while select.select([master], [], [], 15)[0] and (part := os.read(master, 4096)):
            output += part
    os.close(master)
    return output.decode(), process.wait(timeout=15)


def assert_one_line(result, *words):
    """Check that a command failed with one clear line on stderr and nothing on stdout."""
    code = result.returncode if hasattr(result, "returncode") else result.exit_code
    assert code != 0
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("Error: ")
    for word in words:
        assert word in result.stderr


@contextlib.contextmanager
def load(server):
    """Send events from four threads for the block; yields what was acknowledged."""
    acknowledged, refused, ended = [], [], threading.Event()

    def send(thread):
        for number in range(100_000):
            if ended.is_set():
                return
            event_id = f"evt_{thread}_{number}"
            person = f"{thread}-{number % 7}"
            ids = {"reference_id": f"load-{person}", "inquiry_id": f"inq_{person}"}
            name = ("inquiry.created", "inquiry.approved")[number % 2]
            status, _ = server.send(build(name, event_id=event_id, **ids))
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


# help, version, start


@pytest.mark.parametrize("command", [*COMMANDS, *OTHERS])
def test_help_has_an_example_and_fits(run, command):
    text = run(command, "-h")
    assert text == run(command, "--help")
    assert f"flask {command}" in text.split("Example")[1]
    assert all(len(line) <= 80 for line in text.splitlines())


def test_list_of_commands_is_not_cut(flask):
    text = flask("--help").stdout
    lines = [line for line in text.splitlines() if line.split()[:1] and line.split()[0] in COMMANDS]
    assert len(lines) == len(COMMANDS)
    assert not any("..." in line for line in lines)


def test_version_names_the_release(run):
    assert run("version").startswith(f"kyc {kyc.VERSION} (python 3.")


def test_flask_run_says_how_to_start_instead(flask):
    process = flask("run", check=False)
    assert process.returncode == 2
    assert process.stderr == "flask run serves nothing: use python app.py, or the Procfile's line\n"


def test_service_warns_of_a_name_that_persona_does_not_send(app, environ, handlers, log):
    kyc.on("inquiry.aproved")(lambda db, event: None)
    kyc.hold_rule("account.status-update", "Frozen")
    kyc.create_app(environ).extensions["journal"].stop()
    warnings = [line for line in log.messages if "handlers.py" in line]
    assert warnings == [
        "WARNING: handlers.py: Persona is not known to send account.status-update;"
        " did you mean account.status-updated?",
        "WARNING: handlers.py: Persona is not known to send inquiry.aproved;"
        " did you mean inquiry.approved?",
    ]


@pytest.mark.skipif(not OFFICIAL, reason="the official payloads are not here")
def test_official_names_are_not_doubted():
    names = {json.loads(path.read_bytes())["data"]["attributes"]["name"] for path in OFFICIAL}
    assert [doubt_name(name) for name in names if doubt_name(name)] == []
    assert [doubt_name(name) for name in ("kyc.held", "report/%.matched")] == [None, None]
    assert doubt_name("report/watchlist.match").endswith("did you mean report/watchlist.matched?")


# trigger


def test_triggered_event_is_received(serve, flask, database):
    server = serve()
    ids = ["--reference-id", "user-1", "--inquiry-id", "inq_1", "--account-id", "act_1"]
    when = ["--created-at", "2026-01-02T03:04:05Z", "--event-id", "evt_1"]
    more = ["--template-id", "itmpl_1", "--url", f"{server.url}/webhook"]
    output = flask("trigger", "inquiry.approved", *ids, *when, *more).stdout
    assert output == 'inquiry.approved evt_1 -> 200 {"received": true}\n'
    assert projection(database)["kyc_status"] == [
        (
            *("user-1", "approved", None, "inq_1", "act_1", "itmpl_1", "evt_1"),
            *("inquiry.approved", "2026-01-02T03:04:05.000Z"),
        )
    ]


def test_trigger_finds_the_local_server_and_sends_many(serve, run, database, monkeypatch):
    monkeypatch.setenv("PORT", str(serve().port))
    assert run("trigger", "inquiry.created", "--count", "3").count(" -> 200 ") == 3
    assert ask(database, "SELECT count(*) FROM inquiries") == [(3,)]
    output = run("trigger", "inquiry.created", "--event-id", "evt_1", "--count", "2")
    assert output.splitlines()[1].endswith('{"received": true, "duplicate": true}')


def test_trigger_without_a_secret_uses_the_development_one(serve, flask):
    port = str(serve(PERSONA_WEBHOOK_SECRET=kyc.DEVELOPMENT_SECRET).port)
    process = flask("trigger", "inquiry.created", PORT=port, PERSONA_WEBHOOK_SECRET="")
    assert "development secret" in process.stderr
    assert "wbhsec" not in process.stderr + process.stdout


def test_trigger_with_a_wrong_secret_shows_the_answer_and_fails(serve, flask):
    variables = {"PORT": str(serve().port), "PERSONA_WEBHOOK_SECRET": "wbhsec_of_somebody_else"}
    process = flask("trigger", "inquiry.created", check=False, **variables)
    assert process.returncode == 1
    assert "-> 401" in process.stdout
    assert "Invalid signature" in process.stdout


@pytest.mark.parametrize("scheme", kyc.SCHEMES)
def test_trigger_signs_by_the_chosen_scheme(serve, run, scheme, monkeypatch):
    monkeypatch.setenv("PORT", str(serve(PERSONA_SIGNATURE_SCHEME=scheme).port))
    assert "-> 200" in run("trigger", "inquiry.created", "--scheme", scheme)


def test_signature_is_that_of_the_published_example():
    headers = sign(b"abc123", b"wbhsec_researchhub", "persona", 1720713905)
    digest = "0fd4586aa5cb67c098a920ed55906fb2669a2bb21c6ed2de58e4f5cfb79814c7"
    assert headers == {"Persona-Signature": f"t=1720713905,v1={digest}"}


@pytest.mark.parametrize("inflection", ["kebab", "camel", "snake"])
def test_printed_event_reads_the_same_in_every_inflection(run, inflection):
    ids = ["--reference-id", "user-1", "--inquiry-id", "inq_1", "--account-id", "act_1"]
    show = ["--inflection", inflection, "--print", "--event-id", "evt_1"]
    body = run("trigger", "inquiry.approved", *ids, "--template-id", "itmpl_1", *show)
    event = kyc.read_event(body.encode(), kyc.utc_now())
    assert event[:2] + event[3:-1] == (
        *("evt_1", "inquiry.approved", "inquiry", "inq_1", "approved"),
        *("inq_1", "act_1", "user-1", "itmpl_1"),
    )


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: path.stem)
def test_built_event_has_the_links_of_the_official_one(path):
    official = kyc.read_event(path.read_bytes(), kyc.utc_now())
    built = kyc.read_event(build(official.name), kyc.utc_now())
    assert links(built) == links(official)


def links(event):
    """Return the kinds of an event's object and of what it points at."""
    ids = (event.object_id, event.inquiry_id, event.account_id, event.template_id)
    family = (event.object_type or "").split("/")[0]
    return family, [identifier and identifier.split("_")[0] for identifier in ids]


@pytest.mark.parametrize("name", ["inquiry.redacted", "inquiry.approved", "case.resolved"])
def test_no_account_is_invented_for_an_inquiry_that_is_given(name):
    event = kyc.read_event(build(name, inquiry_id="inq_1"), kyc.utc_now())
    assert (event.inquiry_id, event.account_id) == ("inq_1", None)


def test_template_and_status_of_the_object_can_be_chosen(shell):
    shown = shell(KYC_TEMPLATES="itmpl_id")("trigger", "inquiry.approved", "--print").stdout
    assert kyc.read_event(shown.encode(), LAST).template_id == "itmpl_id"
    status = kyc.read_event(build("account.created", object_status="Frozen"), LAST).object_status
    assert status == "Frozen"


def test_trigger_warns_of_a_remote_server_and_of_an_unknown_name(runner):
    result = runner("trigger", "inquiry.aproved", "--url", "http://kyc.invalid:1/webhook")
    assert result.stderr.splitlines()[:2] == [
        "WARNING: Persona is not known to send inquiry.aproved; did you mean inquiry.approved?",
        "WARNING: http://kyc.invalid:1/webhook is not on this machine: it counts there as real",
    ]


def test_unreachable_server_is_one_line(runner):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/webhooks/persona"
        assert_one_line(runner("trigger", "inquiry.created", "--url", url), url, "refused")


def test_redirect_is_shown_and_not_followed(run):
    head = b"HTTP/1.1 301 Moved Permanently\r\nLocation: /\r\nContent-Length: 5\r\n\r\n"
    with answering(head + b"moved") as url:
        output = run("trigger", "inquiry.created", "--url", url, code=1)
    assert output.endswith(" -> 301 moved\n")


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/", "http://127.0.0.1:99999/"])
def test_wrong_url_is_one_line(runner, url):
    assert_one_line(runner("trigger", "inquiry.created", "--url", url), url)


@pytest.mark.parametrize("url", ["nonsense", "http://[::1", "file:///dev/null", "data:,x"])
def test_url_of_another_kind_is_refused(runner, url):
    result = runner("trigger", "inquiry.created", "--url", url)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {url}: ")


def test_server_that_speaks_another_protocol_is_one_line(runner):
    with answering(b"220 mail ready\r\n") as url:
        assert_one_line(runner("trigger", "inquiry.created", "--url", url), url)


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


# status


def status(run, identifier):
    """Return what `flask status` says, a person each."""
    return [json.loads(line) for line in run("status", identifier, "--json").splitlines()]


@pytest.mark.parametrize("identifier", ["user-1", "inq_1", "act_1"])
def test_status_takes_any_id_of_the_person(send, run, identifier):
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1", account_id="act_1")
    send("report/watchlist.ready", inquiry_id="inq_1", account_id="act_1")
    (person,) = status(run, identifier)
    assert (person["reference_id"], person["status"]) == ("user-1", "approved")
    assert len(person["timeline"]) == 2


def test_status_says_which_event_decides(send, run):
    ids = {"reference_id": "user-1", "inquiry_id": "inq_1", "account_id": "act_1"}
    send("inquiry.created", event_id="evt_1", created_at=EARLY, **ids)
    send("inquiry.approved", event_id="evt_2", created_at=LATER, **ids)
    lines = run("status", "user-1").splitlines()
    assert lines[0] == "user-1: approved"
    assert lines[1].split() == ["decided", "by", "inquiry.approved", "of", "inq_1"]
    assert lines[2].startswith("  since       2026-01-02 00:00 UTC, ")
    assert lines[3].split() == ["account", "act_1"]
    assert lines[-2].split()[3:] == ["inquiry.created", "inq_1", "evt_1"]
    assert lines[-1].split()[3:] == ["inquiry.approved", "decides", "inq_1", "evt_2"]


def test_status_shows_a_time_ahead(send, run):
    send("inquiry.approved", reference_id="user-1", created_at="2999-01-01")
    facts = run("status", "user-1").split("\n\n")[0]
    assert re.search(r"since +2999-01-01 00:00 UTC, in [0-9]+d\n", facts)


def test_status_says_of_every_inquiry_whether_it_counts(send, environ, shell):
    ids = {"reference_id": "user-1"}
    send("inquiry.approved", inquiry_id="inq_1", template_id="itmpl_id", created_at=EARLY, **ids)
    send("inquiry.approved", inquiry_id="inq_2", template_id="itmpl_id", created_at=LATER, **ids)
    send("inquiry.expired", inquiry_id="inq_3", template_id="itmpl_id", created_at=LAST, **ids)
    send("inquiry.declined", inquiry_id="inq_4", template_id="itmpl_selfie", **ids)
    send("inquiry-session.started", inquiry_id="inq_6")
    kyc.prepare_database(kyc.read_config({**environ, "KYC_TEMPLATES": "itmpl_id"}))
    run = shell(KYC_TEMPLATES="itmpl_id")
    assert run("rebuild").exit_code == 0
    person = json.loads(run("status", "user-1", "--json").stdout)
    assert person["status"] == "approved"
    assert {one["inquiry_id"]: one["why"] for one in person["inquiries"]} == {
        "inq_2": "yes, it decides",
        "inq_1": "yes, a newer one prevails",
        "inq_3": "yes, approved prevails",
        "inq_4": "no, not in KYC_TEMPLATES",
    }
    assert {one["template_id"]: one["status"] for one in person["templates"]} == {
        "itmpl_id": "approved",
        "itmpl_selfie": "declined",
    }
    shown = run("status", "inq_6").stdout
    assert "inq_6: no status: no inquiry of theirs counts" in shown
    assert "no, template unknown" in shown


def test_status_shows_holds_and_what_clears_them(send, run):
    ids = {"reference_id": "user-1", "inquiry_id": "inq_1"}
    send("report/watchlist.matched", object_id="rep_0", created_at=EARLY, **ids)
    send("inquiry.approved", created_at=LATER, **ids)
    send("report/watchlist.matched", object_id="rep_1", event_id="evt_9", created_at=LAST, **ids)
    run("hold", "user-1", "--reason", "chargeback 1041", "--by", "alice")
    text = run("status", "user-1")
    assert text.startswith("user-1: approved, but HELD\n")
    assert "HELD        kyc.held: chargeback 1041, by alice, 20" in text
    assert "HELD        report/watchlist.matched: rep_1, 2026-01-03" in text
    assert "until     report/*.dismissed of rep_1, or a decision after it\n" in text
    assert "was held    report/watchlist.matched: rep_0, 2026-01-01" in text
    assert re.search(r"report/watchlist.matched +holds +inq_1 +evt_9", text)


def test_status_of_a_person_without_inquiry_shows_the_timeline(send, run):
    send("account.created", account_id="act_1")
    text = run("status", "act_1")
    assert text.startswith("act_1: no status: no inquiry of theirs counts\n")
    assert "account.created" in text


def test_status_finds_a_person_by_an_account_without_inquiry(send, run):
    send("account.created", account_id="act_1", reference_id="user-1")
    send("graph-query.completed", account_id="act_1")
    (person,) = status(run, "act_1")
    assert (person["reference_id"], len(person["timeline"])) == ("user-1", 2)


@pytest.mark.parametrize("identifier", ["inq_1", "act_1", "user-1"])
def test_status_finds_a_person_without_status_by_any_id(send, run, identifier):
    send("verification.passed", inquiry_id="inq_1", account_id="act_1")
    send("account.created", account_id="act_1", reference_id="user-1")
    (person,) = status(run, identifier)
    assert (person["reference_id"], len(person["timeline"])) == ("user-1", 2)


def test_status_leaves_out_who_only_shares_a_case(send, run):
    send("inquiry.approved", inquiry_id="inq_1", account_id="act_1", reference_id="user-1")
    send("inquiry.approved", inquiry_id="inq_2", account_id="act_2", reference_id="user-2")
    send("verification.passed", inquiry_id="inq_3")
    send("case.created", inquiry_id="inq_3", account_id="act_1")
    send("case.created", inquiry_id="inq_1", account_id="act_2")
    assert [person["reference_id"] for person in status(run, "inq_3")] == ["inq_3"]
    assert [person["reference_id"] for person in status(run, "act_2")] == ["user-2"]


def test_status_of_a_person_with_many_events_shows_the_newest(send, run):
    for number in range(35):
        send("inquiry.started", inquiry_id="inq_1", event_id=f"evt_{number:02}", created_at=EARLY)
    text = run("status", "inq_1")
    assert "evt_04" not in text
    assert text.endswith("evt_34\nThe newest 30 are shown; all of them with --json\n")


def test_output_is_legible_on_a_terminal_without_unicode(send, flask):
    send("inquiry.approved", reference_id="\u65e5")
    process = flask("status", "\u65e5", PYTHONIOENCODING="latin-1")
    assert process.stdout.startswith("\\u65e5: approved\n")


def test_argument_that_is_not_utf8_is_one_line(app, flask):
    assert_one_line(flask("status", b"\xff", check=False), "an argument is not UTF-8")


def test_full_disk_of_the_output_is_not_blamed_on_the_database(send, begin):
    send("inquiry.approved", reference_id="user-1")
    with open("/dev/full", "wb") as full:
        process = begin("status", "user-1", stdout=full, stderr=subprocess.PIPE, text=True)
        words = process.communicate(timeout=30)[1]
    assert words.startswith("Error: No space left on device\n")


def test_output_cannot_move_the_cursor(send, run):
    send("inquiry.approved", reference_id="user\x1b[2J", inquiry_id="inq\x1b[2J")
    run("hold", "user\x1b[2J", "--reason", "\x1b[2J")
    assert "\x1b" not in run("status", "user\x1b[2J") + run("events")


# events


def test_events_lists_the_newest_in_order_of_arrival_and_says_that_it_cuts(send, runner):
    for number in range(5):
        send("inquiry.created", event_id=f"evt_{number}", reference_id="user-1")
    result = runner("events", "--limit", "2")
    lines = result.stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["evt_3", "evt_4"]
    assert lines[0].index("PERSON") == lines[1].index("user-1")
    assert result.stderr == "older events are left out: see --limit and --after\n"
    assert runner("events", "--limit", "5").stderr == ""
    assert "newer events are left out" in runner("events", "--after", "1", "--limit", "2").stderr


def found(run, *options):
    """Return the positions that `flask events` lists."""
    output = run("events", "--json", *options)
    return [json.loads(line)["position"] for line in output.splitlines()]


def test_events_filters_by_name_state_source_and_time(send, run):
    send("inquiry.created", event_id="evt_1", inquiry_id="inq_1")
    send("report/watchlist.matched", event_id="evt_2")
    send(b"not an event")
    run("hold", "inq_1", "--reason", "trial")
    assert found(run, "--name", "report/*") == [2]
    assert found(run, "--state", "unrecognized") == [3]
    assert found(run, "--source", "operator") == [4]
    assert found(run, "--since", "1h") == found(run, "--until", "2999-01-01") == [1, 2, 3, 4]
    assert found(run, "--since", "2999-01-01") == found(run, "--until", "1h") == []
    assert found(run, "--after", "1", "--limit", "1") == [2]
    assert found(run, "--since", "1h", "--after", "0", "--limit", "1") == [1]


def test_events_filters_by_person_and_object(send, run):
    send("inquiry.approved", inquiry_id="inq_1", account_id="act_1", reference_id="user-1")
    send("inquiry.approved", inquiry_id="inq_2", account_id="act_2", reference_id="user-2")
    send("report/watchlist.matched", object_id="rep_1", account_id="act_1")
    send("report/watchlist.matched", object_id="rep_2", account_id="act_2")
    for identifier in ("user-1", "inq_1", "act_1"):
        assert found(run, "--person", identifier) == [1, 3]
    assert found(run, "--person", "user-1", "--limit", "1") == [3]
    assert found(run, "--person", "user-1", "--name", "inquiry.*") == [1]
    assert found(run, "--object", "rep_2") == [4]
    assert found(run, "--object", "inq_2") == [2]
    assert found(run, "--object", "rep_9") == []


def test_json_events_have_stable_keys_and_no_body(send, run):
    send("inquiry.created", event_id="evt_1")
    event = json.loads(run("events", "--json"))
    assert list(event) == [
        *("position", "received_at", "created_at", "name", "state", "event_id", "source"),
        *("object_type", "object_id", "object_status", "inquiry_id", "account_id"),
        *("reference_id", "template_id", "person", "signed_by", "attempt", "error"),
        *("body_sha256", "redacted_at"),
    ]


def test_events_show_the_error_of_a_failed_one(failed, run):
    assert "  failed evt_1: ValueError: x\n" in run("events")


def test_follow_flushes_each_line_and_survives_a_restart(serve, begin):
    server = serve()
    server.send(build("inquiry.created", event_id="evt_1"))
    follower = begin("events", "--follow", "--json")
    assert json.loads(read_line(follower))["event_id"] == "evt_1"
    for event_id in ("evt_2", "evt_3"):
        server.send(build("inquiry.created", event_id=event_id))
        assert json.loads(read_line(follower))["event_id"] == event_id
        server.stop()
        server = serve()


def test_follow_ends_at_an_interrupt_without_a_traceback(send, begin):
    send("inquiry.created", event_id="evt_1")
    follower = begin("events", "--follow", "--json")
    read_line(follower)
    follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=15)
    assert follower.returncode != 0
    assert b"Traceback" not in errors


def test_follow_with_a_filter_shows_only_what_matches(send, begin):
    send("inquiry.approved", event_id="evt_1")
    follower = begin("events", "--follow", "--json", "--name", "inquiry.approved")
    read_line(follower)
    send("inquiry.created", event_id="evt_2")
    send("inquiry.approved", event_id="evt_3")
    assert json.loads(read_line(follower))["event_id"] == "evt_3"


@pytest.mark.parametrize("options", [[], ["--json"], ["--json", "--follow"]])
def test_a_reader_that_leaves_ends_the_listing_quietly(send, begin, options):
    for _ in range(50):
        send("inquiry.created")
    process = begin("events", "--limit", "50", *options)
    read_line(process)
    process.stdout.close()
    send("inquiry.created")
    assert process.communicate(timeout=15)[1] == b""


# tables


@pytest.mark.parametrize("command", [["events"], ["status", "user-1"]])
def test_tables_fit_the_terminal_and_say_what_they_cut(send, run, command, monkeypatch):
    ids = {"reference_id": "user-1", "inquiry_id": "inq_" + "1" * 24, "event_id": "evt_" + "1" * 24}
    send("inquiry.marked-for-review", **ids)
    assert ids["event_id"] in run(*command)
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(*command).splitlines()
    assert max(map(len, lines)) <= 80
    assert "inquiry.marked-for-review" in lines[-1]
    assert lines[-1].endswith("\N{HORIZONTAL ELLIPSIS}")


def test_colours_are_for_terminals_that_want_them(send, run, begin):
    send("inquiry.approved", reference_id="user-1")
    shown, _ = on_terminal(begin, "", "status", "user-1")
    assert "\x1b[32mapproved\x1b[0m" in shown
    plain, _ = on_terminal(begin, "", "status", "user-1", variables={"NO_COLOR": "1"})
    assert "\x1b" not in plain + run("status", "user-1")


# handlers


def test_handlers_lists_what_the_team_registers(run, handlers):
    @kyc.on("inquiry.approved", "inquiry.declined")
    def tell(db, event):
        pass

    kyc.status_rule("case.resolved", "approved", object_status="Approved")
    kyc.hold_rule("account.status-updated", object_status="Frozen")
    rows = [re.split("  +", line) for line in run("handlers").splitlines()]
    assert [row[:2] for row in rows[1:]] == [
        ["handler", "inquiry.approved"],
        ["handler", "inquiry.declined"],
        ["status rule", "case.resolved Approved"],
        ["hold rule", "account.status-updated Frozen"],
    ]
    assert re.fullmatch(r"test_commands.py:\d+ tell", rows[1][2])
    assert rows[3][2] == "sets approved"


def test_handlers_says_when_there_is_no_file(run):
    assert run("handlers") == "there is no handlers.py\n"


# replay


@pytest.fixture
def failed(send, database):
    """Two events whose handlers failed; the handler has been mended since."""
    for event_id in ("evt_2", "evt_1"):
        ids = {"reference_id": "user-1", "inquiry_id": "inq_1"}
        send("inquiry.approved", event_id=event_id, **ids)
    ask(database, "UPDATE events SET state = 'failed', error = 'ValueError: x'")


@pytest.fixture
def note(handlers, app, database):
    """A handler that writes the IDs of approvals to a table."""
    ask(database, "CREATE TABLE notes (event_id TEXT)")

    @kyc.on("inquiry.approved")
    def note(db, event):
        db.execute("INSERT INTO notes VALUES (?)", (event.event_id,))


def states(database):
    """Return state and error of all events."""
    rows = ask(database, "SELECT event_id, state, error FROM events")
    return {event_id: (state, error) for event_id, state, error in rows}


def test_replay_runs_all_failed_and_pending_events(failed, note, run, database):
    ask(database, "UPDATE events SET state = 'pending' WHERE event_id = 'evt_1'")
    assert run("replay") == "evt_2 processed\nevt_1 processed\n2 processed, 0 failed\n"
    assert ask(database, "SELECT event_id FROM notes") == [("evt_2",), ("evt_1",)]
    assert states(database) == dict.fromkeys(("evt_1", "evt_2"), ("processed", None))


def test_replay_runs_one_event(failed, flask, database):
    flask("replay", "evt_1", PERSONA_WEBHOOK_SECRET="")
    assert ask(database, "SELECT event_id FROM failed_events") == [("evt_2",)]


def test_replay_keeps_the_error_of_a_handler_that_fails_again(failed, note, run, database):
    @kyc.on("inquiry.approved")
    def fail(db, event):
        if event.event_id == "evt_2":
            raise LookupError("no such plan")

    assert "evt_2 failed: LookupError: no such plan\n" in run("replay", code=1)
    assert states(database)["evt_2"] == ("failed", "LookupError: no such plan")
    assert ask(database, "SELECT event_id FROM notes") == [("evt_1",)]


def test_replay_of_what_did_not_fail_is_refused(failed, runner):
    assert_one_line(runner("replay", "evt_1", "evt_9"), "evt_9: not a failed event")


def test_failed_events_whose_bodies_were_removed_stop_nobody(failed, run):
    run("redact", "evt_1", "--yes")
    output = run("replay", "evt_1", code=1)
    assert "evt_1 failed: its body was removed" in output
    output = run("replay")
    assert output.endswith("1 processed, 0 failed, 1 passed over: their bodies were removed\n")


def test_replay_runs_a_new_handler_over_the_past(send, run, handlers, database):
    send("inquiry.approved", event_id="evt_1", created_at=EARLY)
    send("inquiry.approved", event_id="evt_2", created_at=LATER)
    send("inquiry.declined", event_id="evt_3", created_at=LATER)
    send("inquiry.approved", event_id="evt_4", created_at=LAST)
    run("redact", "evt_4", "--yes")
    seen = []
    kyc.on("inquiry.approved")(lambda db, event: seen.append(event.event_id))
    run("replay", "--name", "inquiry.*", code=1)
    assert seen == []
    output = run("replay", "--name", "inquiry.*", "--since", EARLY, "--until", LAST, "--yes")
    assert (seen, output) == (["evt_1", "evt_2"], "2 processed, 0 failed\n")
    run("replay", "--name", "inquiry.approved", "--since", LATER, "--yes")
    assert seen == ["evt_1", "evt_2", "evt_2"]
    assert {state for state, _ in states(database).values()} == {"processed"}


def test_replay_over_the_past_keeps_what_fails(send, run, handlers, database):
    send("inquiry.approved", event_id="evt_1")
    kyc.on("inquiry.approved")(lambda db, event: 1 / 0)
    output = run("replay", "--name", "inquiry.approved", "--yes", code=1)
    assert output == "evt_1 failed: ZeroDivisionError: division by zero\n0 processed, 1 failed\n"
    assert states(database)["evt_1"][0] == "failed"


def test_replay_over_the_past_needs_a_handler(send, runner):
    send("inquiry.approved")
    assert_one_line(runner("replay", "--name", "inquiry.approved", "--yes"), "has no handler")


def test_harmless_failed_event_is_dismissed(failed, run, database):
    words = ["--reason", "a trial", "--by", "alice"]
    assert run("replay", "--dismiss", "evt_1", *words) == "1 event dismissed\n"
    assert states(database)["evt_1"] == (
        "processed",
        "dismissed by alice: a trial (was: ValueError: x)",
    )
    assert ask(database, "SELECT event_id FROM failed_events") == [("evt_2",)]


def test_only_failed_events_are_dismissed(failed, runner, database):
    result = runner("replay", "--dismiss", "evt_1", "evt_9", "--reason", "a trial")
    assert_one_line(result, "evt_9: not a failed event")
    assert states(database)["evt_1"][0] == "failed"


@pytest.mark.parametrize(
    "arguments",
    [
        ["evt_1", "--name", "inquiry.*"],
        ["--since", "1d"],
        ["--dismiss", "evt_1"],
        ["--dismiss", "--reason", "r"],
    ],
    ids=" ".join,
)
def test_replay_refuses_what_does_not_go_together(runner, arguments):
    result = runner("replay", *arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


# rebuild


def test_rebuild_mends_what_was_wrecked(send, run, database):
    for number in range(30):
        send("inquiry.approved", reference_id=f"user-{number}", inquiry_id=f"inq_{number}")
    run("hold", "user-7", "--reason", "trial")
    before = projection(database)
    ask(database, "UPDATE kyc_status SET status = 'declined' WHERE reference_id < 'user-2'")
    ask(database, "DELETE FROM inquiries WHERE inquiry_id > 'inq_2'")
    ask(database, "DELETE FROM kyc_status WHERE reference_id = 'user-5'")
    ask(database, "DELETE FROM holds")
    more = "SELECT 'inq_x', 'user-x', NULL, NULL, NULL, 'failed', 'e', 'n', '', 2, 3"
    ask(database, f"INSERT INTO inquiries {more}")
    output = run("rebuild")
    assert projection(database) == before
    assert "user-0: declined -> approved\n" in output
    assert "user-5: unknown -> approved\n" in output
    assert run("rebuild") == "31 events, 0 people changed\n"


def test_rebuild_loses_no_delivery_that_arrives_meanwhile(serve, flask, database):
    with load(serve()) as acknowledged:
        for wreck in ("DELETE FROM inquiries", "DELETE FROM kyc_status"):
            time.sleep(0.5)
            with contextlib.closing(kyc.connect(database)) as db, kyc.transaction(db):
                db.execute(wreck)
            flask("rebuild")
    stored = {row[0] for row in ask(database, "SELECT event_id FROM events")}
    assert stored == set(acknowledged)
    before = projection(database)
    assert len(before["kyc_status"]) == 28
    assert flask("rebuild").stdout.endswith(" events, 0 people changed\n")
    assert projection(database) == before


# hold, release


@pytest.mark.parametrize("identifier", ["user-1", "act_1", "inq_1"])
def test_hold_stands_until_it_is_released(send, run, database, identifier):
    ids = {"reference_id": "user-1", "account_id": "act_1", "inquiry_id": "inq_1"}
    send("inquiry.approved", **ids)
    output = run("hold", identifier, "--reason", "chargeback", "--by", "alice")
    assert output == (
        "user-1: approved, held\n  kyc.held: chargeback, by alice; until flask release user-1\n"
    )
    send("inquiry.approved", **ids)
    assert people(database) == {"user-1": "approved, held"}
    run("rebuild")
    assert people(database) == {"user-1": "approved, held"}
    assert run("release", identifier, "--reason", "paid") == "user-1: approved, not held\n"
    assert people(database) == {"user-1": "approved"}
    assert ask(database, "SELECT count(*) FROM cleared") == [(1,)]


def test_hold_is_in_the_journal_with_who_and_why(send, run, database):
    send("inquiry.approved", reference_id="user-1", account_id="act_1", inquiry_id="inq_1")
    run("hold", "user-1", "--reason", "chargeback")
    query = """
        SELECT name, source, object_type, object_id, object_status, inquiry_id, account_id,
            reference_id, state FROM events WHERE source = 'operator'
    """
    user = ask(database, query)[0][4].removeprefix("chargeback, by ")
    assert user
    assert ask(database, query) == [
        (
            *("kyc.held", "operator", "person", "user-1", f"chargeback, by {user}"),
            *("inq_1", "act_1", "user-1", "processed"),
        )
    ]
    run("redact", "user-1", "--yes")
    (row,) = ask(database, "SELECT hold FROM kyc_status")
    assert row == (f"kyc.held: chargeback, by {user}",)


def test_hold_follows_the_person_to_a_better_key(send, run, database):
    send("inquiry.approved", inquiry_id="inq_1")
    run("hold", "inq_1", "--reason", "r")
    send("inquiry.completed", inquiry_id="inq_1", account_id="act_1")
    assert people(database) == {"act_1": "approved, held"}
    run("hold", "act_1", "--reason", "again")
    send("account.created", account_id="act_1", reference_id="user-1")
    assert people(database) == {"user-1": "approved, held"}
    run("hold", "user-1", "--reason", "and again")
    assert run("release", "user-1", "--reason", "r") == "user-1: approved, not held\n"
    assert people(database) == {"user-1": "approved"}


def test_holds_and_releases_in_the_same_moment_keep_their_order(send, run, database, monkeypatch):
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1")
    monkeypatch.setattr(kyc, "utc_now", lambda: LAST)
    for command, standing in (("hold", "approved, held"), ("release", "approved")) * 2:
        run(command, "user-1", "--reason", "r")
        assert people(database) == {"user-1": standing}


def test_release_says_what_still_stands(send, run):
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1", created_at=EARLY)
    send("report/watchlist.matched", object_id="rep_1", inquiry_id="inq_1", created_at=LATER)
    run("hold", "user-1", "--reason", "r")
    assert run("release", "user-1", "--reason", "r") == (
        "user-1: approved, held\n  report/watchlist.matched: rep_1;"
        " until report/*.dismissed of rep_1, or a decision after it\n"
    )
    output = run("release", "user-1", "--reason", "r", code=1)
    assert output.startswith("user-1: approved, held\n  report/")


def test_hold_of_whom_no_event_names_needs_a_yes(app, send, runner, run, database):
    result = runner("hold", "user-9", "--reason", "r")
    assert_one_line(result, "No event names user-9", "give --yes")
    assert ask(database, "SELECT count(*) FROM events") == [(0,)]
    run("hold", "user-9", "--reason", "r", "--yes")
    run("hold", "act_9", "--reason", "r", "--yes")
    send("inquiry.approved", reference_id="user-9", inquiry_id="inq_1")
    send("inquiry.approved", account_id="act_9", inquiry_id="inq_2")
    assert people(database) == {"user-9": "approved, held", "act_9": "approved, held"}


def test_hold_of_an_account_of_two_people_asks_which(send, runner):
    for number in (1, 2):
        ids = {"inquiry_id": f"inq_{number}", "reference_id": f"user-{number}"}
        send("inquiry.approved", account_id="act_1", **ids)
    result = runner("hold", "act_1", "--reason", "r")
    assert_one_line(result, "act_1: is of several people: user-1, user-2")


def test_handler_of_holds_runs(send, run, handlers, database):
    seen = []
    kyc.on("kyc.held")(lambda db, event: seen.append(event.reference_id))
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1")
    run("hold", "user-1", "--reason", "r")
    assert seen == ["user-1"]
    assert {state for state, _ in states(database).values()} == {"processed"}


# backup

MANY_STEPS = """
    INSERT INTO events (event_id, name, created_at, received_at, source, body_sha256, state, body)
    VALUES ('evt_large', 'account.created', '', '', 'webhook', '', 'processed', zeroblob(80000000))
"""


def test_backup_under_load_is_consistent(serve, flask, database, tmp_path):
    copy = tmp_path / "copy.db"
    server = serve()
    ask(database, MANY_STEPS)
    with load(server) as acknowledged:
        time.sleep(1)
        before = set(acknowledged)
        started = time.monotonic()
        output = flask("backup", str(copy), PERSONA_WEBHOOK_SECRET="").stdout
        seconds = time.monotonic() - started
    assert seconds < 15  # it does not begin again with every event that arrives
    assert output.endswith("bytes, checked\n")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert before <= {row[0] for row in ask(copy, "SELECT event_id FROM events")}
    assert flask("rebuild", KYC_DATABASE=str(copy)).stdout.endswith(" 0 people changed\n")
    assert list(tmp_path.glob("copy*.part*")) == []


def test_backup_into_a_folder_is_named_by_the_time(send, run, tmp_path):
    send("inquiry.approved")
    (tmp_path / "backups").mkdir()
    output = run("backup", str(tmp_path / "backups"))
    (copy,) = (tmp_path / "backups").iterdir()
    assert re.fullmatch(r"kyc-\d{8}T\d{6}Z.db", copy.name)
    assert output.startswith(f"{copy}: ")
    assert ask(copy, "SELECT count(*) FROM events") == [(1,)]


def test_backup_never_overwrites(app, runner, tmp_path):
    copy = tmp_path / "copy.db"
    copy.write_text("precious")
    assert_one_line(runner("backup", str(copy)), "copy.db: exists already")
    assert copy.read_text() == "precious"


@pytest.mark.parametrize("name", ["missing/copy.db", "file/copy.db"])
def test_backup_names_the_path_that_was_typed(app, runner, tmp_path, name):
    (tmp_path / "file").write_text("")
    path = str(tmp_path / name)
    assert_one_line(runner("backup", path), f"Error: {path}: ")


def test_failed_backup_leaves_nothing_behind(send, environ, deployment, tmp_path):
    for _ in range(100):
        send("inquiry.created")
    target = tmp_path / "backups"
    target.mkdir()
    command = f"ulimit -f 64; exec {sys.executable} -m flask backup {target}/copy.db"
    process = subprocess.run(
        ["bash", "-c", command],
        env={**bare_environment(), **environ, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=deployment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert_one_line(process, f"{target}/copy.db: ")
    assert list(target.iterdir()) == []


def test_backup_can_be_restored(serve, flask, database, tmp_path):
    server = serve()
    ids = {"reference_id": "user-1", "inquiry_id": "inq_1"}
    server.send(build("inquiry.approved", **ids))
    flask("backup", str(tmp_path / "copy.db"))
    server.send(build("inquiry.declined", **ids))
    server.stop()
    for suffix in ("", "-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    (tmp_path / "copy.db").rename(database)
    server = serve()
    assert people(database) == {"user-1": "approved"}
    assert server.send(build("inquiry.declined", **ids))[0] == 200


# check


@pytest.fixture
def check(request):
    """Run `flask check`; return its findings, and see that the exit code fits them."""

    def check(*arguments, runner=None):
        runner = runner or request.getfixturevalue("runner")
        result = runner("check", "--json", *arguments)
        findings = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.exit_code == any(one["level"] == "WRONG" for one in findings), result.output
        return [(one["level"], one["subject"], one["words"]) for one in findings]

    return check


def assert_wrong(findings, words):
    """Check that exactly one finding is wrong, and what it says."""
    wrong = [finding for finding in findings if finding[0] == "WRONG"]
    assert len(wrong) == 1, findings
    assert words in wrong[0][2]


def notes(findings):
    """Return what is worth a look, but not the service, which does not run here."""
    return [words for level, subject, words in findings if level == "note" and subject != "service"]


def test_check_finds_nothing_wrong_beside_a_service(serve, flask):
    server = serve()
    server.send(build("inquiry.created"))
    lines = flask("check", PORT=str(server.port)).stdout.splitlines()
    assert {line.split()[0] for line in lines} == {"ok"}, lines
    assert any("1 in the journal" in line for line in lines)
    assert f"ok    service     {server.url} stores events" in lines
    signed = [line for line in lines if kyc.fingerprint(SECRET.encode()) in line]
    assert "last signed" in signed[0]


def test_check_says_when_no_service_runs(send, check):
    send("inquiry.created")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        findings = check("--url", f"http://127.0.0.1:{closed.getsockname()[1]}")
    (service,) = [finding for finding in findings if finding[1] == "service"]
    assert service[0] == "note"
    assert "does the server run?" in service[2]


def test_check_says_when_the_service_refuses(app, serve, check, database, monkeypatch):
    monkeypatch.setattr(kyc, "BUSY_SECONDS", 0.2)
    server = serve()
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        findings = check("--url", server.url)
    wrong = {subject: words for level, subject, words in findings if level == "WRONG"}
    assert wrong.keys() == {"service", "database"}
    assert wrong["service"].startswith(f"{server.url} refuses events: ")
    assert "{" not in wrong["service"]
    assert wrong["database"].startswith("database is locked; see who holds it")


@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        ({"PERSONA_WEBHOOK_SECRET": ""}, "PERSONA_WEBHOOK_SECRET is not set"),
        ({"PERSONA_WEBHOOK_SECRET": kyc.DEVELOPMENT_SECRET}, "the development secret"),
        ({"PERSONA_SIGNATURE_TOLERANCE": "0"}, "set a tolerance"),
        ({"PERSONA_SIGNATURE_SCHEME": "body"}, "old deliveries can be replayed"),
    ],
)
def test_check_names_a_dangerous_setting(app, shell, check, variables, advice):
    assert_wrong(check(runner=shell(**variables)), advice)


def test_check_names_the_disk_of_a_dyno(app, check, monkeypatch):
    monkeypatch.setenv("DYNO", "web.1")
    assert_wrong(check(), "a dyno's disk is emptied")
    monkeypatch.setenv("KYC_EPHEMERAL_DISK", "accept")
    assert any("a dyno's disk" in words for words in notes(check()))


def test_check_names_a_file_that_others_can_read(app, check, database):
    database.chmod(0o644)
    assert_wrong(check(), "kyc.db has mode 0644; chmod 600")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["kyc.db", "kyc.db.lock"])
def test_check_names_a_file_of_another_owner(app, check, database, name):
    os.chown(database.with_name(name), 12345, -1)
    assert_wrong(check(), f"{name} belongs to user 12345, the others to root; chown root {name}")


def test_check_names_failed_events_until_they_are_dismissed(failed, check, run):
    assert_wrong(check(), "2 events failed; flask events --state failed, mend handlers.py")
    run("redact", "evt_1", "--yes")
    assert any("1 event failed, their bodies removed" in words for words in notes(check()))
    run("replay", "--dismiss", "evt_1", "evt_2", "--reason", "a trial")
    assert notes(check()) == []


def test_check_names_what_drifted(send, check, database):
    for number in range(3):
        send("inquiry.approved", reference_id=f"user-{number}", inquiry_id=f"inq_{number}")
    ask(database, "UPDATE kyc_status SET status = 'declined' WHERE reference_id = 'user-1'")
    ask(database, "DELETE FROM inquiries WHERE inquiry_id = 'inq_2'")
    assert_wrong(check(), "rows differ from the rules: inq_2, user-1, user-2; flask rebuild")
    assert_wrong(check("--full"), "rows differ from the rules: inq_2, user-1, user-2")


def test_check_looks_at_a_sample_of_a_large_journal(send, check, database, monkeypatch):
    monkeypatch.setattr("commands.keep.RECENT", 5)
    for number in range(20):
        send("inquiry.approved", reference_id=f"user-{number}", inquiry_id=f"inq_{number}")
    assert ("ok", "drift", "0 of 60 rows differ from the rules") in check()
    ask(database, "UPDATE kyc_status SET hold = 'x'")
    assert_wrong(check(), "20 of 60 rows differ from the rules")


def test_check_gives_up_what_takes_too_long(send, check, monkeypatch):
    send("inquiry.approved")
    monkeypatch.setattr("commands.keep.SECONDS", 0.05)
    monkeypatch.setattr("commands.keep.NAMES", ENDLESS)
    assert "not done in 0.05 s; see --full" in notes(check())


ENDLESS = """
    WITH RECURSIVE n(i) AS (SELECT ? UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0
"""


def test_check_names_silence_and_those_who_wait(send, check, database):
    silence = "no event has come; is the webhook enabled at Persona, and its URL right?"
    assert silence in notes(check())
    send("inquiry.completed", reference_id="user-1", inquiry_id="inq_1", created_at=EARLY)
    send("inquiry.marked-for-review", reference_id="user-2", inquiry_id="inq_2", created_at=EARLY)
    send("inquiry.completed", reference_id="user-3", inquiry_id="inq_3")
    assert notes(check()) == [
        "1 person completed for over an hour: user-1",
        "1 person needs_review for over a day: user-2",
    ]


def test_check_names_events_that_somebody_should_know_of(send, check):
    send("inquiry.resumed", inquiry_id="inq_1")
    send("inquiry.redacted", inquiry_id="inq_1")
    send("account.consolidated", account_id="act_1")
    send("workflow-run.errored")
    assert [words.partition(",")[0] for words in notes(check())] == [
        "account.consolidated",
        "inquiry.resumed",
        "workflow-run.errored",
    ]


def test_check_names_several_templates_of_which_all_count(send, check):
    send("inquiry.approved", template_id="itmpl_1")
    send("inquiry.approved", template_id="itmpl_2")
    (words,) = notes(check())
    assert words.startswith("2 are in use, and each of them decides where a person stands")


def test_check_counts_inquiries_of_unknown_template(send, environ, shell, check):
    send("inquiry-session.started", inquiry_id="inq_1")
    kyc.prepare_database(kyc.read_config({**environ, "KYC_TEMPLATES": "itmpl_1"}))
    assert "KYC_TEMPLATES differs in this shell: the service runs with itmpl_1" in notes(check())
    findings = check(runner=shell(KYC_TEMPLATES="itmpl_1"))
    assert notes(findings) == ["1 inquiry of unknown template: not counted"]


def test_check_names_a_secret_that_signed_nothing(send, shell, check):
    send("inquiry.approved")
    run = shell(PERSONA_WEBHOOK_SECRET=f"{SECRET} wbhsec_the_next_one_0123")
    (words,) = notes(check(runner=run))
    assert words.endswith(" has signed no recent event")
    assert "wbhsec" not in run("check").output


def test_check_names_a_missing_database(shell, check):
    assert_wrong(
        check(runner=shell()), "there is no such file; start the service, bring the file back"
    )


def test_check_names_a_database_that_was_taken_away(app, check, database):
    database.rename(f"{database}.old")
    assert_wrong(check(), "there is no such file")


def test_check_names_a_file_of_another_kind(shell, check, database):
    database.write_bytes(b"no database" * 1000)
    database.chmod(0o600)
    assert_wrong(check(runner=shell()), "file is not a database; restore a backup")


def test_check_names_a_damaged_database(send, app, check, database):
    for _ in range(100):
        send("inquiry.created")
    app.extensions["journal"].stop()
    with database.open("r+b") as file:
        file.seek(4096 * 60)
        file.write(b"\xff" * 4096 * 10)
    assert_wrong(check(), "restore a backup")


# errors


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_database_is_one_line(shell, database, command):
    assert_one_line(shell()(command, *COMMANDS[command]), "there is no such file")
    assert [path for path in database.parent.iterdir() if path.suffix == ".db"] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_file_that_is_no_database_is_one_line(shell, database, command):
    database.write_bytes(b"no database" * 1000)
    assert_one_line(shell()(command, *COMMANDS[command]), "file is not a database")


def test_database_of_another_application_is_one_line(shell, database):
    ask(database, "CREATE TABLE songs (title)")
    for command, arguments in COMMANDS.items():
        assert_one_line(shell()(command, *arguments), "has no journal yet")
    assert ask(database, "SELECT name FROM sqlite_schema") == [("songs",)]


@pytest.mark.parametrize("command", ["redact", "rebuild"])
def test_locked_database_is_one_line(failed, runner, database, command, monkeypatch):
    monkeypatch.setattr(kyc, "BUSY_SECONDS", 0.2)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        assert_one_line(runner(command, *COMMANDS[command]), "database is locked")


def test_held_lock_file_is_one_line(failed, runner, database, monkeypatch):
    monkeypatch.setattr("commands.TURN_SECONDS", 0.2)
    with locked_file(database):
        assert_one_line(runner("replay"), "lock file")


@pytest.mark.parametrize("command", ["status", "redact", "release", "events"])
def test_unknown_id_is_one_line(send, runner, command):
    send("inquiry.created")
    arguments = ["--person"] if command == "events" else []
    arguments += ["user-9", *COMMANDS[command][1:]]
    assert_one_line(runner(command, *arguments), "user-9: no event names this ID")


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
def test_bad_value_is_refused(runner, command):
    result = runner(*command)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: Invalid value")


def test_bad_setting_is_one_line(flask):
    process = flask("events", MAX_BODY_BYTES="many", check=False)
    assert process.returncode != 0
    assert process.stderr.splitlines() == [
        "app.py: MAX_BODY_BYTES must be a whole number from 1 to 500000000"
    ]


def test_service_and_commands_share_the_handlers_of_the_team(tmp_path, serve, flask):
    folder = tmp_path / "team"
    shutil.copytree(ROOT / "commands", folder / "commands")
    for name in ("app.py", "schema.sql"):
        shutil.copy(ROOT / name, folder)
    lines = ["from app import on", "@on('inquiry.approved')", "def greet(db, event):", "    1 / 0"]
    (folder / "handlers.py").write_text("\n".join(lines))
    server = serve(cwd=folder)
    assert server.send(build("inquiry.approved", event_id="evt_1"))[0] == 500
    words = "evt_1 failed: ZeroDivisionError: division by zero (handlers.py:4 greet)"
    assert words in flask("replay", cwd=folder, check=False).stdout
    assert "handlers.py:2 greet" in flask("handlers", cwd=folder).stdout


# asking


@pytest.mark.parametrize(
    ("typed", "options", "kept"), [("n\n", [], 1), ("y\n", [], 0), ("", ["--yes"], 0)]
)
@pytest.mark.parametrize("command", [["redact", "user-1"], ["prune", "--older-than", "0s"]])
def test_removal_asks_on_a_terminal(send, begin, database, command, typed, options, kept):
    send("inquiry.approved", reference_id="user-1")
    output, code = on_terminal(begin, typed, *command, *options)
    assert ask(database, "SELECT count(body) FROM events") == [(kept,)]
    assert ("[y/N]" in output) == (not options)
    assert code == kept
