"""Start-up: a wrong setting stops the service with one line that names it."""

import contextlib
import shutil
import socket
import sqlite3
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SECRET, Server, build, deploy, procfile_flags

import app as kyc


@pytest.mark.parametrize(
    ("environ", "option"),
    [
        ({}, ()),
        ({}, ("--preload",)),
        ({"PERSONA_WEBHOOK_SECRET": ""}, ()),
        ({"PERSONA_WEBHOOK_SECRET": " , "}, ()),
    ],
)
def test_no_secret_no_start(refusal, environ, option, tmp_path):
    environ |= {"KYC_DATABASE": str(tmp_path / "kyc.db")}
    words = refusal(environ, "-m", "gunicorn", "app:app", "--bind", "127.0.0.1:0", *option)
    assert "app.py: PERSONA_WEBHOOK_SECRET is not set" in words
    assert not (tmp_path / "kyc.db").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("PERSONA_SIGNATURE_TOLERANCE", value)
            for value in ("-1", "x", "", "1.5", "\u0663", "1_0")
        ),
        *(("PERSONA_SIGNATURE_SCHEME", value) for value in ("", "none", "Persona")),
        *(("MAX_BODY_BYTES", value) for value in ("0", "-1", "2MB", "", "9" * 30)),
        *(("KYC_DATABASE", value) for value in ("", ":memory:", "folder/")),
        *(("KYC_TEMPLATES", value) for value in ("itmpl_1;itmpl_2", '"itmpl_1"', "x" * 101)),
        ("PERSONA_WEBHOOK_SECRET_FILE", "missing"),
    ],
)
def test_senseless_value_is_refused_and_named(name, value):
    environ = {"PERSONA_WEBHOOK_SECRET": SECRET, name: value}
    if name.endswith("FILE"):
        del environ["PERSONA_WEBHOOK_SECRET"]
    with pytest.raises(kyc.ConfigError, match=name):
        kyc.read_config(environ)


def test_refusal_is_one_line_of_a_real_start(refusal):
    environ = {"PERSONA_WEBHOOK_SECRET": SECRET, "PERSONA_SIGNATURE_TOLERANCE": "soon"}
    lines = [line for line in refusal(environ).splitlines() if line.startswith("app.py: ")]
    number = "must be a whole number from 0 to 1000000000"
    assert lines == [f"app.py: PERSONA_SIGNATURE_TOLERANCE {number}"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PORT", "0"), ("PORT", "99999"), ("WEB_CONCURRENCY", "many"), ("WEB_CONCURRENCY", "")],
)
def test_trial_refuses_a_senseless_port_or_number_of_workers(refusal, variable, value, tmp_path):
    words = refusal({variable: value, "KYC_DATABASE": str(tmp_path / "kyc.db")}, "app.py")
    assert words.startswith(f"app.py: {variable} must be")


def test_defaults():
    config = kyc.read_config({})
    assert config.secrets == ()
    assert (config.tolerance, config.scheme, config.max_body_bytes) == (300, "persona", 2097152)
    assert (config.database, config.templates) == (ROOT / "kyc.db", ())


@pytest.mark.parametrize("value", ["itmpl_b,itmpl_a", " itmpl_a\n itmpl_b, ", "itmpl_a itmpl_b"])
def test_templates_are_a_list(value):
    assert kyc.read_config({"KYC_TEMPLATES": value}).templates == ("itmpl_a", "itmpl_b")


def read_file(path, content):
    """Return the secrets that a file with this content holds."""
    path.write_bytes(content)
    return kyc.read_config({"PERSONA_WEBHOOK_SECRET_FILE": str(path)}).secrets


@pytest.mark.parametrize(
    "content",
    [
        *(b"%s\n%s\n", b"# the old one\n%s\n  # the new one\n%s", b"#\r\n%s\r\n%s\r\n"),
        *(b"\xef\xbb\xbf%s %s\v", b" ,\f %s, %s", b"\xef\xbb\xbf# a comment\n%s,%s"),
    ],
)
def test_secrets_are_read_from_a_file(tmp_path, content):
    secrets = b"wbhsec_old_0123456789", b"wbhsec_new_0123456789=="
    assert read_file(tmp_path / "secret", content % secrets) == secrets


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\xef\xbb\xbf", b" ,\v\n", b"# to be filled in\n#\n"]
)
def test_file_without_a_secret_is_named_as_such(tmp_path, content):
    words = "^PERSONA_WEBHOOK_SECRET_FILE names a file that holds no secret$"
    with pytest.raises(kyc.ConfigError, match=words):
        read_file(tmp_path / "secret", content)


@pytest.mark.parametrize(
    "nonsense",
    [
        *("# MARKER-0123456789", '"wbhsec_MARKER_0123456789"', "'wbhsec_MARKER_0123456789'"),
        *("NAME=wbhsec_MARKER_0123456789", "wbhsec_MARKER", "wbhsec_MARKER_0123456789\u00e9"),
        *("wbhsec_...", "wbhsec_your_actual_secret_here", "<wbhsec_MARKER_0123456789>"),
        *("YOUR-WEBHOOK-SECRET-FROM-PERSONA", "wbhsec_placeholder_0123456789", "{wbhsec_MARKER}"),
    ],
)
@pytest.mark.parametrize("variable", ["PERSONA_WEBHOOK_SECRET", "PERSONA_WEBHOOK_SECRET_FILE"])
def test_nonsense_is_no_secret_and_is_not_told(tmp_path, variable, nonsense):
    value = f"{SECRET},{nonsense}"
    if variable.endswith("FILE"):
        file, value = tmp_path / "secret", str(tmp_path / "secret")
        file.write_text(f"{SECRET} {nonsense}")
    with pytest.raises(kyc.ConfigError) as error:
        kyc.read_config({variable: value})
    assert str(error.value).startswith(f"{variable}: entry 2 of ")
    assert not [word for word in (SECRET, nonsense, "MARKER") if word in str(error.value)]


def test_nonsense_stops_a_real_start(refusal, tmp_path):
    environ = {"PERSONA_WEBHOOK_SECRET": "wbhsec_your_actual_secret_here"}
    words = refusal({**environ, "KYC_DATABASE": str(tmp_path / "kyc.db")})
    assert words.count("app.py: PERSONA_WEBHOOK_SECRET: entry 1 of 1 is not a webhook secret") == 1
    assert "actual" not in words


def test_dangerous_settings_are_warned_of(serve):
    secret = "no_prefix_0123456789"
    server = serve(PERSONA_WEBHOOK_SECRET=secret, PERSONA_SIGNATURE_TOLERANCE="0")
    log = server.log.read_text()
    assert "WARNING: a secret does not begin with wbhsec_, as Persona's do" in log
    assert "WARNING: no replay protection: timestamps are not checked" in log
    assert secret not in log


def test_two_sources_of_secrets_are_refused():
    environ = {"PERSONA_WEBHOOK_SECRET": SECRET, "PERSONA_WEBHOOK_SECRET_FILE": "x"}
    with pytest.raises(kyc.ConfigError, match="both set"):
        kyc.read_config(environ)


def prepare(path):
    """Return how the start fails on a database."""
    with pytest.raises(kyc.UnusableError) as error:
        kyc.prepare_database(kyc.read_config({"KYC_DATABASE": str(path)}))
    return str(error.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(b"not a database" * 99), "file is not a database"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.parent.rmdir(), "No such file or directory"),
        (lambda path: path.parent.rmdir() or path.parent.touch(), "Not a directory"),
    ],
)
def test_unusable_database_is_refused(tmp_path, spoil, words):
    folder = tmp_path / "folder"
    folder.mkdir()
    spoil(folder / "kyc.db")
    assert prepare(folder / "kyc.db") == words


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (0, "the file belongs to another application"),
        (1, "the file was made by a release before 1.0 of this service"),
        (kyc.SCHEMA_VERSION, "the file belongs to another application"),
        (999, "the file was made by a newer release of this service"),
    ],
)
def test_database_of_another_application_or_release_is_refused_as_it_is(tmp_path, version, words):
    path = tmp_path / "kyc.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE songs (title)")
        db.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    assert prepare(path) == words
    assert path.read_bytes() == before


def test_unusable_database_stops_a_real_start(refusal, environ, tmp_path):
    missing = str(tmp_path / "missing" / "kyc.db")
    words = refusal({**environ, "KYC_DATABASE": missing})
    assert f"app.py: KYC_DATABASE {missing}: No such file or directory\n" in words


def test_dyno_is_refused_unless_its_disk_is_accepted(refusal, environ, serve):
    words = refusal({**environ, "DYNO": "web.1"})
    assert "app.py: KYC_DATABASE would be on a Heroku dyno's disk" in words
    assert "KYC_EPHEMERAL_DISK=accept" in words
    assert not Path(environ["KYC_DATABASE"]).exists()
    assert serve(DYNO="web.1", KYC_EPHEMERAL_DISK="accept").send(build())[0] == 200


def test_taken_port_is_one_line_that_names_another(refusal, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = refusal({"PORT": str(port), "KYC_DATABASE": str(tmp_path / "kyc.db")}, "app.py")
    assert words == f"app.py: port {port}: Address already in use; choose another by PORT=\n"


def test_local_trial_serves_with_the_development_secret_and_the_flags_of_the_procfile(tmp_path):
    folder, elsewhere = deploy(tmp_path / "here", ""), tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = [sys.executable, str(folder / "app.py")]
    server = Server({}, tmp_path / "log", cwd=elsewhere, arguments=arguments)
    try:
        server.wait_until_up()
        command = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
        assert " ".join(procfile_flags()) in " ".join(command)
        assert server.send(build(), kyc.DEVELOPMENT_SECRET)[0] == 200
        assert server.send(build(), "wrong")[0] == 401
        assert "WARNING: the development secret is accepted" in server.log.read_text()
        # KYC_DATABASE is relative to app.py, not to the current folder.
        assert (folder / "kyc.db").exists()
        assert not list(elsewhere.iterdir())
    finally:
        server.kill()


def test_smallest_deployment_receives_an_event(serve, tmp_path, database):
    folder = tmp_path / "smallest"
    folder.mkdir()
    for name in ("app.py", "schema.sql"):
        shutil.copy(ROOT / name, folder)
    assert serve(cwd=folder).send(build(reference_id="user-1")) == (200, b'{"received": true}\n')
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("SELECT reference_id, status FROM kyc_status").fetchall() == [
            ("user-1", "approved")
        ]


def test_restart_changes_nothing_in_the_database(create, send, db):
    send("inquiry.approved")
    before = list(db.iterdump())
    create()
    db.executescript(kyc.SCHEMA.read_text())
    assert list(db.iterdump()) == before


def test_without_psycopg_only_postgresql_is_missing(flask, refusal, tmp_path):
    (tmp_path / "psycopg.py").write_text("raise ModuleNotFoundError('none', name='psycopg')")
    without = {"PYTHONPATH": str(tmp_path)}
    assert flask("version", **without).stdout.startswith("kyc ")
    assert "No such command 'copy'" in flask("copy", "URL", check=False, **without).stderr
    url = {"PERSONA_WEBHOOK_SECRET": SECRET, "DATABASE_URL": "postgresql://localhost/kyc"}
    words = "DATABASE_URL is set, but there is no psycopg: see postgres/requirements.txt"
    assert words in refusal({**url, **without})
