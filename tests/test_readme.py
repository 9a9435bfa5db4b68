"""The README: what it names exists, what exists is named, and its examples run."""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, Server, build, kyc, procfile_flags, sign

README = (ROOT / "README.md").read_text()
RUN = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python app.py"
)
TEST = (
    "python3 -m venv .venv && .venv/bin/pip install -r tests/requirements.txt && .venv/bin/pytest"
)
FLASKS_OWN = {"run", "shell", "routes"}


def blocks(language):
    """Return the README's code blocks in one language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


def block(language, containing):
    """Return the one code block in a language that contains a text."""
    (found,) = (text for text in blocks(language) if containing in text)
    return found


def section(title):
    """Return the text under a heading, without its subsections."""
    return re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", README, re.S | re.M)[1]


def first_cells(text):
    """Return the first cell of each row of the first table in a text."""
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [row.split("|")[1].strip() for row in table]


def session(containing):
    """Return the (command, output) pairs of a console block."""
    prompts = re.split(r"^[$#] ", block("console", containing), flags=re.MULTILINE)[1:]
    return [prompt.split("\n", 1) for prompt in prompts]


def shape(output):
    """Return an output with what differs each time replaced."""
    output = re.sub(r"evt_\w{24}", "EVENT", output)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "TIME", output)


def plain(log):
    """Return log lines without attempts and durations."""
    return re.sub(r"attempt=\d+ ms=[\d.]+", "", shape(log))


def test_the_two_commands_stand_word_for_word():
    assert [line for line in README.splitlines() if line == RUN] == [RUN]
    assert [line for line in README.splitlines() if line == TEST] == [TEST]


def test_no_machine_path_and_one_first_heading():
    assert re.findall(r"^# (?!kyc|curl|runuser|fuser|ls)", README, re.MULTILINE) == ["# "]
    assert not re.search(r"/tmp/w-|/work/|/root/", README)


def test_links_inside_the_page_lead_somewhere():
    titles = re.findall(r"^##+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_variables_are_those_of_the_code():
    pattern = r"(?:PERSONA|KYC|FLASK)_[A-Z_]+|MAX_BODY_BYTES|PORT|WEB_CONCURRENCY|DYNO"
    code = set(re.findall(rf'"({pattern})"', (ROOT / "app.py").read_text()))
    table = {cell.strip("`") for cell in first_cells(section("Configuration"))}
    assert code == set(re.findall(rf"`({pattern})`", README)) | table
    assert table == code - {"DYNO", "FLASK_RUN_FROM_CLI"}


def test_defaults_are_those_of_the_code():
    config = kyc.read_config({})
    for variable, default in {
        "PERSONA_SIGNATURE_TOLERANCE": config.tolerance,
        "PERSONA_SIGNATURE_SCHEME": config.scheme,
        "KYC_DATABASE": config.database.name,
        "MAX_BODY_BYTES": config.max_body_bytes,
    }.items():
        assert f"| `{variable}` | `{default}` |" in README
    schemes = [cell.strip("`") for cell in first_cells(section("Signature"))]
    assert schemes == list(kyc.SCHEMES)
    assert kyc.DEVELOPMENT_SECRET in README


def test_commands_are_those_of_the_code(app):
    commands = set(app.cli.commands) | set(kyc.routes.cli.commands)
    table = {cell.strip("`").split()[1] for cell in first_cells(section("Commands"))}
    assert table == commands - FLASKS_OWN
    named = set(re.findall(r"(?:`|^|bin/)(?:flask|kyc) ([a-z]+)", README, re.MULTILINE))
    assert named - FLASKS_OWN == table


def test_options_are_those_of_the_code():
    for row in re.findall(r"^\| `flask (\w+).*$", section("Commands"), re.MULTILINE):
        line = re.search(rf"^\| `flask {row}.*$", README, re.MULTILINE)[0]
        options = {
            name
            for parameter in kyc.routes.cli.commands[row].params
            for name in parameter.opts
            if name.startswith("--")
        }
        assert set(re.findall(r"--[a-z-]+", line)) == options, row


def test_endpoints_are_those_of_the_code(app):
    rules = {
        f"{method} {rule.rule}"
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert {cell.strip("`") for cell in first_cells(section("HTTP"))} == rules


class BrokenBody(io.RawIOBase):
    """A request body whose sender hangs up."""

    def read(self, size=-1):
        raise ConnectionResetError


def test_status_codes_are_those_of_the_service(app, client, send, handlers, database):
    def fail(db, event):
        raise ValueError

    handlers["inquiry.failed"] = [fail]
    broken = {"wsgi.input": BrokenBody(), "CONTENT_LENGTH": "9"}
    large = build("inquiry.approved", reference_id="x" * app.config["MAX_CONTENT_LENGTH"])
    answers = [
        send("inquiry.approved"),
        send("inquiry.failed"),
        send("inquiry.approved", secret="wbhsec_other"),
        send(large),
        client.get("/nowhere"),
        client.get("/webhook"),
        client.post("/webhook", environ_overrides=broken),
    ]
    database.rename(database.with_name("away"))
    answers.append(send("inquiry.approved"))
    assert all(answer.is_json for answer in answers)
    table = re.findall(r"^\| ([\d, ]+) \|", section("HTTP"), re.MULTILINE)
    documented = {int(code) for cell in table for code in cell.split(",")}
    assert {answer.status_code for answer in answers} == documented


def test_tables_and_views_are_those_of_the_schema(db):
    query = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
    names = {row[0] for row in db.execute(query) if not row[0].startswith("sqlite_")}
    assert {cell.strip("`") for cell in first_cells(section("Tables"))} == names


def test_status_rules_are_those_of_the_code():
    rules = dict(re.findall(r"`(inquiry\.[a-z-]+)` → `(\w+)`", section("Tables")))
    assert rules == {name: status for name, (status, _) in kyc.STATUSES.items()}


def test_example_queries_run(send, db):
    send("inquiry.approved", reference_id="user-42")
    statements = ";".join(blocks("sql")).split(";")
    results = [db.execute(sql).fetchall() for sql in statements if sql.strip()]
    assert len(results) == 6
    assert results[0][0]["status"] == "approved"
    for sql in re.findall(r'sqlite3 .*"(SELECT .*)"', README):
        db.execute(sql)


def test_files_are_those_of_the_project():
    map_of_files = {cell.strip("`") for cell in first_cells(section("How it works"))}
    named = map_of_files | set(re.findall(r"`((?:tests|bench|\.ci)/[\w./]+)`", README))
    assert not {name for name in named if not (ROOT / name).exists()}
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")} <= named


def test_top_level_files_are_named():
    command = ["git", "ls-files", "--", ":!.*"]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no git checkout: what belongs to the project is not known")
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {re.sub("/.*", "/", file) for file in files.splitlines()}
    map_of_files = {cell.strip("`") for cell in first_cells(section("How it works"))}
    assert map_of_files == top


def test_map_of_the_sections_is_that_of_the_code():
    banners = re.findall(r"^# -{20,}\n# (.+)\n# -{20,}$", (ROOT / "app.py").read_text(), re.M)
    tables = section("How it works").split("`app.py` is read from top to bottom")[1]
    assert first_cells(tables) == banners


def test_log_lines_are_real(serve, tmp_path):
    server = serve()
    server.send(build("inquiry.approved"))
    server.send(b"{}", secret="wbhsec_other")
    server.stop()
    logged = plain(server.log.read_text()).splitlines()
    lines = plain(block("", "outcome=stored")).splitlines()
    assert len(lines) == 2
    assert set(lines) <= set(logged)


@pytest.mark.parametrize(
    "message",
    [
        "no signature matches the body",
        "timestamp is stale: ",
        " header is missing",
        " header is malformed",
        "the database did not answer in time",
        "too many deliveries are waiting for the database",
        "the file is gone, but its WAL is there: bring it back",
        "a reader keeps the bytes in the WAL: end it, run this again",
        "see the view failed_events, mend the handler, then flask replay",
        "PERSONA_WEBHOOK_SECRET is not set: signing with the development secret",
        "Remove the bodies of ",
        " rows differed",
    ],
)
def test_messages_are_those_of_the_code(message):
    assert message in README
    assert message in (ROOT / "app.py").read_text()


@pytest.fixture
def trial(tmp_path):
    """The service as the README's first command starts it, but for the venv and the place."""
    environ = {"KYC_DATABASE": str(tmp_path / "kyc.db"), "HOME": str(tmp_path)}
    server = Server(environ, tmp_path / "trial.log", arguments=[sys.executable, "app.py"])
    try:
        yield server.wait_until_up()
    finally:
        server.kill()


def test_quick_start_works_as_written(trial, tmp_path):
    ((command, expected),) = session("flask trigger inquiry.approved --reference-id user-42")
    words = shlex.split(command)
    assert words[0] == ".venv/bin/flask"
    variables = {"KYC_DATABASE": str(tmp_path / "kyc.db"), "PORT": str(trial.port)}
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    process = subprocess.run(
        [sys.executable, "-m", "flask", *words[1:]],
        env={**keep, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shape(process.stderr + process.stdout) == shape(expected)
    ((query, table),) = session("sqlite3 -box kyc.db")
    if not shutil.which("sqlite3"):
        pytest.skip("sqlite3 is not installed: its query was not run")
    process = subprocess.run(
        shlex.split(query), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    wide = shape(process.stdout), shape(table)
    assert wide[0].replace("─", "") == wide[1].replace("─", ""), process.stderr


def test_trial_is_local_and_warns(trial):
    log = trial.log.read_text()
    assert "Listening at: http://127.0.0.1:" in log
    assert "WARNING: the development secret is accepted" in log


def test_handler_example_works_as_written(handlers, send, db):
    exec(block("python", "def open_account"), {"on": kyc.on})
    names = {}
    exec(block("python", "def test_approval_opens_an_account"), names)
    names["test_approval_opens_an_account"](send, db)


def test_status_rule_example_works_as_written(monkeypatch, send, db):
    rule = eval("{" + block("python", '"inquiry.resumed"') + "}")
    for name, value in rule.items():
        monkeypatch.setitem(kyc.STATUSES, name, value)
        assert value in [kyc.STATUSES[known] for known in kyc.STATUSES if known != name]
        send(name, reference_id="user-42")
        assert db.execute("SELECT status FROM kyc_status").fetchone()[0] == value[0]


def test_unit_starts_gunicorn_as_the_procfile_does():
    unit = block("ini", "[Service]")
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    flags = procfile_flags()
    assert start.split()[1 : 1 + len(flags)] == flags
    assert "PERSONA_WEBHOOK_SECRET_FILE=%d/webhook-secret" in unit


def test_unit_is_valid(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = block("ini", "[Service]").replace("/opt/kyc/.venv/bin/gunicorn", "/bin/true")
    (tmp_path / "kyc.service").write_text(unit)
    command = ["systemd-analyze", "verify", tmp_path / "kyc.service"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    mine = [line for line in process.stderr.splitlines() if "kyc.service" in line]
    assert (process.returncode, mine) == (0, [])


@pytest.fixture
def nginx(tmp_path):
    """Write nginx's configuration around the README's site, on a port of its own."""
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")

    def configure(port, upstream):
        site = block("nginx", "server {").replace("    listen [::]:80;\n", "")
        site = site.replace("listen 80;", f"listen 127.0.0.1:{port};")
        site = site.replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
        (tmp_path / "nginx.conf").write_text(
            f"daemon off;\npid {tmp_path}/nginx.pid;\nerror_log {tmp_path}/nginx.log;\n"
            f"events {{}}\nhttp {{\naccess_log off;\n{paths}{site}}}\n"
        )
        return ["nginx", "-e", f"{tmp_path}/nginx.log", "-c", str(tmp_path / "nginx.conf")]

    return configure


def test_nginx_site_is_valid(nginx, tmp_path):
    command = [*nginx(18000, 18001), "-t"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert "[warn]" not in process.stderr + (tmp_path / "nginx.log").read_text()


def test_nginx_site_passes_events_and_nothing_else(nginx, serve, tmp_path):
    service = serve(MAX_BODY_BYTES="2000000")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    front = Server({}, tmp_path / "front.log", arguments=nginx(port, service.port))
    front.url = f"http://127.0.0.1:{port}"
    try:
        wait_for(front, "/healthz")
        assert front.send(build("inquiry.approved"))[0] == 200
        assert front.send(build("inquiry.approved", reference_id="x" * 1_000_000))[0] == 200
        body = build("inquiry.approved", reference_id="x" * 2_000_000)
        assert front.request("POST", "/webhook", body, sign(body))[0] == 413
        assert front.request("GET", "/")[0] == 404
    finally:
        front.kill()


def wait_for(server, path):
    """Return when the server answers 200 on this path."""
    for _ in range(200):
        with contextlib.suppress(OSError):
            if server.request("GET", path)[0] == 200:
                return
        time.sleep(0.05)
    raise AssertionError(server.log.read_text())


def test_litestream_example_replicates_the_database():
    text = block("yaml", "dbs:")
    database = re.search(r"KYC_DATABASE=(\S+)", block("ini", "[Service]"))[1]
    assert "\t" not in text
    assert f"\n  - path: {database}\n" in text
    if importlib.util.find_spec("yaml"):
        import yaml

        (entry,) = yaml.safe_load(text)["dbs"]
        assert entry["replica"]["url"].startswith("s3://")


def test_changelog_names_the_release():
    assert re.search(r"^## \[\d+\.\d+\.\d+\] - ", (ROOT / "CHANGELOG.md").read_text(), re.M)
