"""README and docs: what they name exists, what exists is named, and their examples run."""

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import conftest
import persona_api
import pytest
from conftest import ROOT, SECRET, Server, build, kyc, procfile_flags, sign, wait_until
from werkzeug.serving import make_server

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
}
README, API = PAGES["README.md"], PAGES["docs/api.md"]
DEPLOY, OPERATE = PAGES["docs/deploy.md"], PAGES["docs/operate.md"]
ALL = "\n".join(PAGES.values())
FOLDERS = ("commands", "dashboard", "postgres")
SOURCES = [ROOT / "app.py", *(path for name in FOLDERS for path in (ROOT / name).glob("*.py"))]
CODE = "\n".join(path.read_text() for path in SOURCES)
SCHEMA = "\n".join(path.read_text() for path in [ROOT / "schema.sql", *ROOT.glob("*/schema.sql")])
RUN = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python app.py"
)
TEST = (
    "python3 -m venv .venv && .venv/bin/pip install -r tests/requirements.txt && .venv/bin/pytest"
)
FLASKS_OWN = {"run", "shell", "routes"}
VARIABLE = r"(?:PERSONA|KYC)_[A-Z_]+|MAX_BODY_BYTES|PORT|WEB_CONCURRENCY|DATABASE_URL"


def blocks(page, language):
    """Return a page's code blocks in one language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


def block(page, language, containing):
    """Return the one code block in a language that contains a text."""
    (found,) = (text for text in blocks(page, language) if containing in text)
    return found


def section(page, title):
    """Return the text under a heading, without its subsections."""
    return re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", page, re.S | re.M)[1]


def rows(text):
    """Return the cells of each row of the tables in a text, without the heads."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines
    ]


def spans(text):
    """Return what stands between backticks, outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))


def session(page, containing):
    """Return the (command, output) pairs of a console block."""
    prompts = re.split(r"^[$#] ", block(page, "console", containing), flags=re.MULTILINE)[1:]
    return [prompt.split("\n", 1) for prompt in prompts]


def shape(output):
    """Return an output with what differs each time replaced."""
    for pattern, word in (
        (r"\b(evt|inq|act)_\w{24}\b", r"\1"),
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "TIME"),
        (r"\d{4}-\d\d-\d\d \d\d:\d\d", "TIME"),
        (r"\b\d+[smhd]\b", "AGE"),
        (r"(?m)^\d+ +(?=TIME)", "POSITION "),
        (r"[ ─]+", " "),
    ):
        output = re.sub(pattern, word, output)
    return output.strip()


# Form


def test_the_two_commands_stand_word_for_word():
    assert [line for line in README.splitlines() if line == RUN] == [RUN]
    assert [line for line in README.splitlines() if line == TEST] == [TEST]


def test_readme_is_one_page():
    assert README.count("\n") <= 250
    assert README.count("![") <= 1


@pytest.mark.parametrize("name", PAGES)
def test_page_has_one_title_and_no_path_of_a_machine(name):
    text = re.sub(r"^```.*?^```$", "", PAGES[name], flags=re.S | re.M)
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    assert not re.search(r"/tmp/w-|/work/|/root/|[\U0001f300-\U0001faff]|@@", PAGES[name])


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[name]):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^##+ (.+)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in titles}
            assert anchor in anchors


# What is named


def test_variables_are_those_of_the_code():
    code = set(re.findall(rf'"({VARIABLE})"', CODE))
    table = {row[0].strip("`") for row in rows(section(README, "Configuration"))}
    assert table == code
    assert set(re.findall(rf"\b(?:{VARIABLE})\b", ALL)) <= code


def test_defaults_are_those_of_the_code():
    config = kyc.read_config({})
    for variable, default in {
        "PERSONA_SIGNATURE_TOLERANCE": config.tolerance,
        "PERSONA_SIGNATURE_SCHEME": config.scheme,
        "KYC_DATABASE": config.database.name,
        "MAX_BODY_BYTES": config.max_body_bytes,
    }.items():
        assert f"| `{variable}` | `{default}` |" in README
    schemes = rows(section(PAGES["docs/persona.md"], "How Persona delivers"))[-3:]
    assert [row[0].strip("`") for row in schemes] == list(kyc.SCHEMES)
    assert kyc.DEVELOPMENT_SECRET in README


def test_commands_are_those_of_the_code(app):
    commands = set(app.cli.commands) - FLASKS_OWN
    cells = [row[0] for row in rows(section(README, "Read it"))]
    assert {name for cell in cells for name in re.findall(r"`flask (\w+)", cell)} == commands
    named = re.findall(r"(?:`|^|# |/|&& )(?:flask|kyc) ([a-z]+)\b", ALL, re.MULTILINE)
    assert set(named) - FLASKS_OWN == commands


def test_options_are_those_of_the_code(app):
    uses = re.findall(r"(?:flask|kyc) ([a-z]+)\b([^`\n|&]*)", ALL)
    used = [(name, option) for name, rest in uses for option in re.findall(r"--[a-z-]+", rest)]
    assert len(used) > 20
    for name, option in used:
        known = {word for one in app.cli.commands[name].params for word in one.opts} | {"--help"}
        assert option in known, f"flask {name} {option}"


def test_endpoints_are_those_of_the_code(create):
    app = create(KYC_API_TOKEN="token_0123456789abcdefgh")
    paths = {
        re.sub(r"<id:\w+>", "<id>", rule.rule)
        for rule in app.url_map.iter_rules()
        if rule.methods & {"GET", "POST"}
    }
    table = rows(section(README, "HTTP"))
    named = {path for row in table for path in re.findall(r"`(?:GET |POST )?(/[^`]*)`", row[0])}
    assert named == paths - {"/dashboard.css"}


def test_parameters_are_those_of_the_api():
    code = (ROOT / "dashboard" / "api.py").read_text()
    asked = set(re.findall(r'(?:given|read_number|read_flag|args\.get)\("(\w+)"', code))
    table = rows(section(API, "The API"))
    assert {name for row in table if len(row) == 3 for name in spans(row[2])} == asked


def test_api_answers_as_shown(create):
    client = create(KYC_API_TOKEN="token_0123456789abcdefgh").test_client()
    body = build("inquiry.approved", reference_id="user-61")
    client.post("/webhook", data=body, headers=sign(body))
    headers = {"Authorization": "Bearer token_0123456789abcdefgh"}
    page = client.get("/api/people", headers=headers).json
    shown = json.loads(session(API, "curl")[0][1])
    assert (list(page), list(page["people"][0])) == (list(shown), list(shown["people"][0]))
    person = client.get("/api/people/user-61", headers=headers).json
    assert {"inquiries", "templates"} <= set(person)
    assert {"decides", "counts"} <= set(person["inquiries"][0])


class BrokenBody(io.RawIOBase):
    """A request body whose sender hangs up."""

    def read(self, size=-1):
        raise ConnectionResetError


def test_status_codes_are_those_of_the_service(app, client, send, handlers, database):
    @kyc.on("inquiry.failed")
    def fail(db, event):
        raise ValueError

    broken = {"wsgi.input": BrokenBody(), "CONTENT_LENGTH": "9"}
    large = build("inquiry.approved", reference_id="x" * app.config["KYC"].max_body_bytes)
    answers = [
        send("inquiry.approved"),
        send("inquiry.failed"),
        send("inquiry.approved", secret="wbhsec_of_another_webhook"),
        send(large),
        client.get("/nowhere"),
        client.get("/webhook"),
        client.post("/webhook", environ_overrides=broken),
    ]
    database.rename(database.with_name("away"))
    answers.append(send("inquiry.approved"))
    assert all(answer.is_json for answer in answers)
    codes = {
        int(code)
        for row in rows(section(README, "HTTP"))
        for code in re.findall(r"^\d{3}|(?<=, )\d{3}", row[0])
    }
    assert {answer.status_code for answer in answers} == codes


def test_words_of_the_code_are_in_the_code():
    """Tables, views, columns, fixtures and functions that the pages name."""
    tests = [path for path in (ROOT / "tests").glob("*.py") if path.name != "test_docs.py"]
    known = set(re.findall(r"\w+", "\n".join([CODE, SCHEMA, *map(Path.read_text, tests)])))
    named = {word for word in spans(ALL) if re.fullmatch(r"[a-z]+(_[a-z]+)+", word)}
    named |= {word for word in spans(section(README, "Read it")) if re.fullmatch(r"[a-z]+", word)}
    assert len(named) > 20
    foreign = {"client_max_body_size", "synchronous_standby_names", "kyc_owner"}
    assert named - known <= foreign


def test_views_to_read_are_named(db):
    query = "SELECT name FROM sqlite_schema WHERE type = 'view'"
    views = {row[0] for row in db.execute(query) if not row[0].endswith("_by_the_rules")}
    inner = {"obey_redactions", "remove_bodies", "object_events", "hold_events"}
    assert views - inner <= set(spans(section(README, "Read it"))) | {"kyc_status"}


def test_fields_of_an_event_are_those_of_the_code():
    text = section(README, "Add a handler")
    named = re.search(r"`event` has (.*?)\.", text)[1]
    assert re.findall(r"`(\w+)`", named) == list(kyc.Event._fields)


FOREIGN = {  # messages of SQLite and of the system
    *("database is locked", "database or disk is full", "disk I/O error"),
    *("attempt to write a readonly database", "unable to open database file"),
    *("database disk image is malformed", "file is not a database", "Permission denied"),
    *("Read-only file system", "Input/output error", "No such file or directory"),
    *("Address already in use", "'(' was never closed"),
}


def messages():
    """Yield the messages that the tables of docs/operate.md list."""
    titles = ["401", "503", "It does not start", "After an outage", "Restore"]
    for title in [*titles, "A person's data must be erased"]:
        for row in rows(section(OPERATE, title)):
            yield from (one for one in re.findall(r"`([^`]+)`", row[0]) if " " in one)


def constants():
    """Return the texts in the code, each as one, with NUL for what is filled in."""
    texts = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value.replace("%s", "\0"))
            elif isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "\0") for part in node.values]
                texts.append("".join(part if isinstance(part, str) else "\0" for part in parts))
    return texts


@pytest.fixture(scope="session")
def phrases():
    """Patterns of the messages in the code, the longest first."""
    texts = sorted((text for text in constants() if " " in text.strip("\0 ")), key=len)
    return [
        ".{1,60}?".join(map(re.escape, text.split("\0")))
        for text in reversed(texts)
        if 10 <= len(text.replace("\0", "")) < 300
    ]


@pytest.mark.parametrize("message", list(messages()))
def test_messages_are_those_of_the_code(message, phrases):
    rest = message.replace("app.py: ", "").replace("…", "X")
    for foreign in FOREIGN:
        rest = rest.replace(foreign, "X")
    for phrase in phrases:
        rest = re.sub(phrase, "", rest)
    assert not re.search(r"[a-z]{3,} [a-z]{2,}", rest), rest


TEAMS_OWN = {"handlers.py", "tests/test_our_handlers.py"}


def test_files_are_those_of_the_project():
    folders = r"tests|bench|docs|commands|dashboard|postgres|\.ci"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", ALL)) - TEAMS_OWN
    assert not {name for name in named if not (ROOT / name).exists()}
    promised = set(re.findall(r"`(tests/test_\w+\.py)`", section(README, "What it promises")))
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
    assert tests - TEAMS_OWN == promised


def test_top_level_files_are_named():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", ":!.*"]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no git checkout: what belongs to the project is not known")
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {re.sub("/.*", "/", file) for file in files.splitlines()} - TEAMS_OWN
    table = {name for row in rows(section(README, "The files")) for name in spans(row[0])}
    assert table - TEAMS_OWN == top


def test_map_of_the_sections_is_that_of_the_code():
    banners = re.findall(r"^# -{20,}\n# (.+)\n# -{20,}$", (ROOT / "app.py").read_text(), re.M)
    table = [row[0] for row in rows(section(PAGES["CONTRIBUTING.md"], "Read the code"))]
    assert table == banners


def test_release_is_the_same_everywhere():
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", PAGES["CHANGELOG.md"], re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert newest[1] == project["version"] == kyc.VERSION
    low = ".".join(re.search(r"version_info < \((\d+), (\d+)\)", CODE).groups())
    assert project["requires-python"] == f">={low}"
    assert f"Python {low} or newer" in README


def test_ci_runs_the_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"s/\^\\\((.*)\\\)\$/", script)[1].replace(r"\/", "/")
    assert re.fullmatch(pattern, TEST)


# docs/status.md


def test_rules_are_those_of_the_schema(db):
    table = dict(
        row[:2] for row in rows(section(PAGES["docs/status.md"], "1. Which event sets a status"))
    )
    query = "SELECT name, object_status, status FROM status_rules WHERE own = 0"
    rules = {
        f"`{name}`" + (f", while the inquiry is `{of}`" if of else ""): f"`{status}`"
        for name, of, status in db.execute(query)
    }
    assert table == rules


def test_stages_are_those_of_the_schema(db):
    text = section(PAGES["docs/status.md"], "2. Within one inquiry")
    stages = [
        set(re.findall(r"`(\w+)`", found)) for found in re.findall(r"\*\*\w+\*\* \((.*?)\)", text)
    ]
    for number, named in enumerate(stages, 1):
        query = "SELECT status FROM statuses WHERE stage = ?"
        assert named == {row[0] for row in db.execute(query, (number,))}
    assert len(stages) == 3


def test_example_rules_work(handlers):
    for example in blocks(PAGES["docs/status.md"], "python"):
        exec(example, {})
    assert kyc.STATUS_RULES == [("case.resolved", "Approved", "approved")]
    for call in re.findall(r"`(hold_rule\(.*?\))`", PAGES["docs/status.md"]):
        exec(call, {"hold_rule": kyc.hold_rule})
    assert len(kyc.HOLD_RULES) == 1


@pytest.mark.parametrize("name", PAGES)
def test_example_queries_run(name, app, database, send):
    send("inquiry.approved", reference_id="user-42")
    examples = ";".join(blocks(PAGES[name], "sql")).split(";")
    examples += re.findall(r'sqlite3 .*"(SELECT .*)"', PAGES[name])
    examples += [one for one in spans(PAGES[name]) if one.startswith("SELECT ")]
    with contextlib.closing(kyc.connect(database)) as db:
        for sql in filter(str.strip, examples):
            db.execute(sql).fetchall()


# The first minute


@pytest.fixture
def trial(tmp_path, deployment):
    """The service as the README's first command starts it, but for the venv and the place."""
    environ = {"KYC_DATABASE": str(tmp_path / "kyc.db"), "HOME": str(tmp_path)}
    command = [sys.executable, "app.py"]
    server = Server(environ, tmp_path / "trial.log", cwd=deployment, arguments=command)
    try:
        yield server.wait_until_up()
    finally:
        server.kill()


def test_quick_start_works_as_written(trial, tmp_path, deployment):
    variables = {"KYC_DATABASE": str(tmp_path / "kyc.db"), "PORT": str(trial.port)}
    for containing in ("flask trigger inquiry.approved", "flask status user-42", "sqlite3 -box"):
        ((command, expected),) = session(README, containing)
        words = shlex.split(command)
        if words[0] == "sqlite3" and not shutil.which("sqlite3"):
            pytest.skip("sqlite3 is not installed: its query was not run")
        flask = words[0] == ".venv/bin/flask"
        process = subprocess.run(
            [sys.executable, "-m", "flask", *words[1:]] if flask else words,
            env={**conftest.bare_environment(), **variables},
            cwd=deployment if flask else tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert shape(process.stderr + process.stdout) == shape(expected)


def test_trial_is_local_and_warns(trial):
    log = trial.log.read_text()
    assert "Listening at: http://127.0.0.1:" in log
    assert "WARNING: the development secret is accepted" in log


def test_handler_example_works_as_written(handlers, send, db, tmp_path, monkeypatch):
    (tmp_path / "handlers.py").write_text(block(README, "python", "def open_account"))
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    names = {}
    exec(block(README, "python", "def test_approval_opens_an_account"), names)
    names["test_approval_opens_an_account"](handlers, send, db)


# Outputs that the docs show


def test_check_prints_what_deploy_shows(flask, serve):
    server = serve()

    def lines(text):
        found = re.findall(r"^(ok|note|WRONG) +(\S+)", text, re.MULTILINE)
        return [pair for pair in found if pair[1] != "disk"]

    printed = flask("check", PORT=str(server.port), check=False).stdout
    ((_, expected), _) = session(DEPLOY, "kyc check")
    assert lines(printed) == lines(expected)
    server.send(build("test.ping"))
    printed = flask("check", PORT=str(server.port), check=False).stdout
    ((_, expected),) = session(OPERATE, "# kyc check")
    assert lines(printed) == lines(expected)


def test_failed_handler_looks_as_operate_shows(handlers, send, runner):
    @kyc.on("inquiry.approved")
    def open_account(db, event):
        db.execute("INSERT INTO clients VALUES (?)", (event.inquiry_id,))

    send("inquiry.approved", reference_id="user-42")
    ((_, expected),) = session(OPERATE, "kyc events --state failed")
    expected = expected.replace(" (handlers.py:5 open_account)", "")
    printed = runner("events", "--state", "failed").output
    assert shape(printed).split()[1:12] == shape(expected).split()[1:12]
    assert "OperationalError: no such table: clients" in printed
    kyc.HANDLERS.clear()
    (_, (_, expected)) = session(OPERATE, "kyc replay")
    assert shape(runner("replay").output) == shape(expected)


@pytest.fixture
def missed(monkeypatch):
    """A stand-in for Persona's API that holds what docs/operate.md fetches."""
    for api in persona_api.serve(monkeypatch):
        now = datetime.now(UTC)

        def at(now=now, **age):
            return kyc.format_time(now - timedelta(**age))

        for number in range(61, 68):
            names = ("created", "started", "completed", "approved")[: 4 if number < 66 else 3]
            for step, name in enumerate(names):
                ids = {"inquiry_id": f"inq_missed{number}", "reference_id": f"user-{number}"}
                when = at(days=3, minutes=step - 4 * number)
                event = build(f"inquiry.{name}", created_at=when, **ids)
                api.add(json.loads(event))
            standing = "approved" if number < 66 else "completed"
            api.add_inquiry(f"inq_missed{number}", standing, at(days=3))
        for number in range(3):
            api.add(json.loads(build("verification.passed", created_at=at(days=5, hours=number))))
        api.events.sort(key=lambda one: one["attributes"]["created-at"])
        api.add_inquiry("inq_missed58", "declined", at(days=20))
        yield api


def test_backfill_and_reconcile_look_as_operate_shows(missed, handlers, send, runner):
    created_at = kyc.format_time(datetime.now(UTC) - timedelta(days=21))
    ids = {"inquiry_id": "inq_missed58", "reference_id": "user-58"}
    send("inquiry.approved", created_at=created_at, **ids)
    kyc.on("inquiry.approved")(lambda db, event: None)
    for containing in ("--dry-run", "kyc backfill --since 4d\n", "30d\n", "30d --mend"):
        ((command, expected),) = session(OPERATE, containing)
        printed = runner(*shlex.split(command)[1:]).output

        def words(text):
            return sorted(re.split(r"[\s,:]+", shape(text)))

        assert words(printed) == words(expected)


def test_restore_prints_what_operate_shows(create, handlers, tmp_path):
    old, new = tmp_path / "old.db", tmp_path / "kyc.db"

    @kyc.on("inquiry.approved")
    def open_account(db, event):
        if event.reference_id == "user-52":
            raise KeyError

    def post(app, name, **ids):
        body = build(name, event_id=f"evt_{name}_{ids.get('reference_id')}", **ids)
        app.test_client().post("/webhook", data=body, headers=sign(body))

    apps = [create(KYC_DATABASE=str(path)) for path in (old, new)]
    for app in apps:
        for step in ("created", "started", "completed"):
            ids = {"inquiry_id": "inq_42", "reference_id": "user-42"}
            post(app, f"inquiry.{step}", created_at="2026-11-20", **ids)
    for person, step in (("50", "approved"), ("51", "declined"), ("52", "approved")):
        post(apps[0], f"inquiry.{step}", inquiry_id=f"inq_{person}", reference_id=f"user-{person}")
    post(apps[0], "report/watchlist.matched", inquiry_id="inq_50")
    order = ("redact", "user-42", "--yes", "--reason", "request 17")
    assert apps[0].test_cli_runner().invoke(args=order).exit_code == 0
    ((command, expected),) = session(OPERATE, "kyc restore")
    assert shlex.split(command)[:2] == ["kyc", "restore"]
    result = apps[1].test_cli_runner().invoke(args=["restore", str(old)])
    assert result.stdout.replace(str(old), shlex.split(command)[2]) == expected.rstrip("`\n") + "\n"


def test_what_removes_and_keeps_prints_what_operate_shows(send, runner, tmp_path):
    def words(output):
        output = re.sub(r"/\S+/kyc-\d{8}T\d{6}Z\.db", "PATH", output)
        return re.sub(r"\d[\d,]*", "N", output).strip("`\n")

    def show(containing):
        ((command, expected),) = session(OPERATE, containing)
        arguments = shlex.split(command)[1:]
        arguments = [arguments[0], *(str(tmp_path) if "/" in one else one for one in arguments[1:])]
        result = runner(*arguments)
        assert (result.exit_code, words(result.stdout)) == (0, words(expected))

    for step in ("created", "completed", "approved"):
        ids = {"inquiry_id": "inq_1", "reference_id": "user-42"}
        send(f"inquiry.{step}", created_at="2026-01-01", **ids)
        send(f"inquiry.{step}", created_at="2026-01-01", inquiry_id="inq_2", reference_id="user-1")
    show("kyc backup")
    show("kyc redact")
    show("kyc prune")
    (row,) = [row for row in rows(OPERATE) if "`kyc hold" in row[1]]
    result = runner(*shlex.split(row[1].strip("`"))[1:])
    assert result.stdout.splitlines()[0] == row[2].strip("`")


def test_receiver_example_takes_what_forward_sends(runner, send, monkeypatch):
    secret = "forward_0123456789abcdef"
    monkeypatch.setenv("KYC_FORWARD_SECRET", secret)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(kyc, "start_logging", lambda: None)  # it would outlast the test
    names = {"__name__": __name__}
    exec(block(API, "python", "KYC_FORWARD_SECRET"), names)
    server = make_server("127.0.0.1", 0, names["app"])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        send("inquiry.approved", reference_id="user-42")
        url = f"http://127.0.0.1:{server.server_port}/kyc"
        result = runner("forward", url, "--once")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (result.exit_code, "user-42 approved None" in result.output) == (0, True)
    body = b'{"person": {"reference_id": "user-42", "status": null, "hold": null}}'
    wrong, right = (sign(body, one)["Persona-Signature"] for one in ("another secret", secret))

    def post(headers):
        options = {"headers": headers, "content_type": "application/json"}
        return names["app"].test_client().post("/kyc", data=body, **options).status_code

    assert post({}) == post({"Persona-Signature": wrong}) == 401
    assert post({"Persona-Signature": f"{wrong} {right}"}) == 204


# Deployment


def units():
    """Return the systemd units of the docs by their file names."""
    found = {
        re.match(r"# /etc/systemd/system/(.*)\n", text)[1]: text
        for text in blocks(DEPLOY, "ini")
        if text.startswith("# ")
    }
    return {"kyc.service": block(DEPLOY, "ini", "--check-config"), **found}


def test_unit_starts_gunicorn_as_the_procfile_does():
    (start,) = re.findall(r"^ExecStart=(.*)$", units()["kyc.service"], re.MULTILINE)
    flags = procfile_flags()
    assert start.split()[1 : 1 + len(flags)] == flags


def test_settings_are_valid(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    text = block(DEPLOY, "ini", "KYC_DATABASE=").replace("/etc/kyc/webhook-secret", "{}")
    text = text.format(tmp_path / "secret")
    config = kyc.read_config(dict(line.split("=", 1) for line in text.splitlines()))
    assert config.secrets == (SECRET.encode(),)
    assert f"StateDirectory={config.database.parent.name}" in units()["kyc.service"]


def test_units_are_valid(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    paths = [tmp_path / name for name in units()]
    for path, text in zip(paths, units().values(), strict=True):
        path.write_text(re.sub(r"/opt/kyc/\.venv/bin/\w+", "/bin/true", text))
    command = ["systemd-analyze", "verify", *paths]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    mine = [line for line in process.stderr.splitlines() if "kyc" in line]
    assert (process.returncode, mine) == (0, [])


def test_each_timer_has_its_service_and_is_enabled():
    timers = {name.removesuffix(".timer") for name in units() if name.endswith(".timer")}
    assert timers
    for name in timers:
        assert f"{name}.service" in units()
        assert re.search(rf"systemctl enable --now [^`]*{name}\.timer", DEPLOY)


def test_scripts_can_be_parsed():
    for page in PAGES.values():
        for text in blocks(page, "sh") + blocks(page, "bash"):
            subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=10)


def test_what_is_installed_is_copied_at_an_upgrade():
    install = re.search(r"^cp -r (.*) /opt/kyc/$", section(DEPLOY, "Install"), re.M)[1].split()
    assert f"cp -r {' '.join(install)} /opt/kyc/\n" in section(OPERATE, "Upgrade")
    assert all((ROOT / name).exists() for name in install)
    assert "handlers.py" not in install


@pytest.fixture
def nginx(tmp_path):
    """Write nginx's configuration around the site of the docs, on a port of its own."""
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")

    def configure(port, upstream, opened=False):
        site = block(DEPLOY, "nginx", "server {").replace("    listen [::]:80;\n", "")
        site = site.replace("listen 80;", f"listen 127.0.0.1:{port};")
        site = site.replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")
        if opened:
            site = re.sub(r"^    # (?=location|    \w|\})", "    ", site, flags=re.MULTILINE)
            site = site.replace("allow 10.0.0.0/8", "allow 127.0.0.0/8")
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
        (tmp_path / "nginx.conf").write_text(
            f"daemon off;\npid {tmp_path}/nginx.pid;\nerror_log {tmp_path}/nginx.log;\n"
            f"events {{}}\nhttp {{\naccess_log off;\n{paths}{site}}}\n"
        )
        return ["nginx", "-e", f"{tmp_path}/nginx.log", "-c", str(tmp_path / "nginx.conf")]

    return configure


@pytest.mark.parametrize("opened", [False, True])
def test_nginx_site_is_valid(nginx, tmp_path, opened):
    command = [*nginx(18000, 18001, opened), "-t"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert "[warn]" not in process.stderr + (tmp_path / "nginx.log").read_text()


@pytest.mark.parametrize("opened", [False, True])
def test_nginx_site_passes_events_and_nothing_else(nginx, serve, tmp_path, opened):
    token = "token_0123456789abcdefgh"
    service = serve(MAX_BODY_BYTES="2000000", KYC_API_TOKEN=token)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = nginx(port, service.port, opened)
    front = Server({}, tmp_path / "front.log", cwd=tmp_path, arguments=command)
    front.url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: knock(front) == 405)
        assert front.send(build("inquiry.approved"))[0] == 200
        body = build("inquiry.approved")
        assert front.request("POST", "/webhook/", body, sign(body))[0] == 200
        assert front.send(build("inquiry.approved", reference_id="x" * 1_000_000))[0] == 200
        body = build("inquiry.approved", reference_id="x" * 2_000_000)
        assert front.request("POST", "/webhook", body, sign(body))[0] == 413
        for path in ("/", "/healthz", "/livez", "/nowhere"):
            assert front.request("GET", path)[0] == 404
        for path in (
            "/api/people",
            "/people",
            "/people/x",
            "/events",
            "/metrics",
            "/dashboard.css",
        ):
            assert front.request("GET", path)[0] == (401 if opened else 404)
    finally:
        front.kill()


def knock(server):
    """Return the status that a GET of the webhook is answered with; None when nobody answers."""
    with contextlib.suppress(OSError):
        return server.request("GET", "/webhook")[0]


def test_litestream_example_replicates_the_database():
    text = block(DEPLOY, "yaml", "dbs:")
    database = re.search(r"KYC_DATABASE=(\S+)", DEPLOY)[1]
    assert "\t" not in text
    assert f"\n  - path: {database}\n" in text
