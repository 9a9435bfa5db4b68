"""Start-up: a wrong setting stops the service with one line that names it."""

import contextlib
import os
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT, SECRET, Server, build, procfile_flags

import app as kyc


def refusal(environ, *command):
    """Start the service; return what it says when it does not start."""
    command = command or ("-m", "gunicorn", "app:app", "--bind", "127.0.0.1:0")
    process = subprocess.run(
        [sys.executable, *command],
        env={"PATH": "", "HOME": "/nonexistent", **environ},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert process.returncode != 0
    assert "Traceback" not in process.stderr
    return process.stderr


@pytest.mark.parametrize(
    "environ", [{}, {"PERSONA_WEBHOOK_SECRET": ""}, {"PERSONA_WEBHOOK_SECRET": " , "}]
)
@pytest.mark.parametrize("option", [(), ("--preload",)])
def test_no_secret_no_start(environ, option, tmp_path):
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
        ("PERSONA_WEBHOOK_SECRET_FILE", "missing"),
    ],
)
def test_senseless_value_is_refused_and_named(name, value):
    environ = {"PERSONA_WEBHOOK_SECRET": SECRET, name: value}
    if name.endswith("FILE"):
        del environ["PERSONA_WEBHOOK_SECRET"]
    with pytest.raises(kyc.ConfigError, match=name):
        kyc.read_config(environ)


def test_refusal_is_one_line_of_a_real_start():
    environ = {"PERSONA_WEBHOOK_SECRET": SECRET, "PERSONA_SIGNATURE_TOLERANCE": "soon"}
    lines = [line for line in refusal(environ).splitlines() if line.startswith("app.py: ")]
    number = "must be a whole number from 0 to 1000000000"
    assert lines == [f"app.py: PERSONA_SIGNATURE_TOLERANCE {number}"]


@pytest.mark.parametrize("variable", ["PORT", "WEB_CONCURRENCY"])
@pytest.mark.parametrize("value", ["0", "many", "99999", ""])
def test_trial_refuses_a_senseless_port_or_number_of_workers(variable, value, tmp_path):
    words = refusal({variable: value, "KYC_DATABASE": str(tmp_path / "kyc.db")}, "app.py")
    assert words.startswith(f"app.py: {variable} must be")


def test_defaults():
    config = kyc.read_config({})
    assert config.secrets == ()
    assert (config.tolerance, config.scheme, config.max_body_bytes) == (300, "persona", 2097152)
    assert config.database.name == "kyc.db"


def test_secrets_are_read_from_a_file(tmp_path):
    file = tmp_path / "secret"
    file.write_text("wbhsec_old\nwbhsec_new\n")
    config = kyc.read_config({"PERSONA_WEBHOOK_SECRET_FILE": str(file)})
    assert config.secrets == (b"wbhsec_old", b"wbhsec_new")


@pytest.mark.parametrize("content", [b"abc\v", b"\xef\xbb\xbfabc\n", b" ,\f abc, "])
def test_odd_white_space_makes_no_empty_secret(tmp_path, content):
    file = tmp_path / "secret"
    file.write_bytes(content)
    assert kyc.read_config({"PERSONA_WEBHOOK_SECRET_FILE": str(file)}).secrets == (b"abc",)


def test_two_sources_of_secrets_are_refused(tmp_path):
    environ = {"PERSONA_WEBHOOK_SECRET": SECRET, "PERSONA_WEBHOOK_SECRET_FILE": "x"}
    with pytest.raises(kyc.ConfigError, match="both set"):
        kyc.read_config(environ)


def prepare(path, action):
    """Return how start-up fails on a database that `action` has made unusable."""
    action(path)
    with pytest.raises(kyc.DatabaseError) as error:
        kyc.prepare_database(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda path: path.write_bytes(b"not a database" * 99), "file is not a database"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.parent.rmdir(), "No such file or directory"),
        (lambda path: path.parent.rmdir() or path.parent.touch(), "Not a directory"),
    ],
)
def test_unusable_database_is_refused(tmp_path, action, words):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert prepare(folder / "kyc.db", action) == words


@pytest.mark.parametrize(
    ("version", "words"), [(0, "belongs to another application"), (1, "no such table")]
)
def test_database_of_another_application_is_refused_as_it_is(tmp_path, version, words):
    path = tmp_path / "kyc.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE songs (title)")
        db.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(kyc.DatabaseError, match=words):
        kyc.prepare_database(path)
    assert path.read_bytes() == before


def test_database_of_a_newer_release_is_refused(app, db, database):
    db.execute("PRAGMA user_version = 999")
    with pytest.raises(kyc.DatabaseError, match="newer release"):
        kyc.prepare_database(database)


def test_unusable_database_stops_a_real_start(environ, tmp_path):
    missing = str(tmp_path / "missing" / "kyc.db")
    words = refusal({**environ, "KYC_DATABASE": missing})
    assert f"app.py: KYC_DATABASE {missing}: No such file or directory\n" in words


def test_local_server_has_the_flags_of_the_procfile(monkeypatch):
    commands = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    monkeypatch.setenv("PERSONA_WEBHOOK_SECRET", SECRET)
    kyc.serve_locally()
    flags = procfile_flags()
    assert commands[0][: 3 + len(flags)] == [sys.executable, "-m", "gunicorn", *flags]


def test_local_trial_serves_with_the_development_secret(tmp_path):
    environ = {"KYC_DATABASE": str(tmp_path / "kyc.db")}
    arguments = [sys.executable, str(ROOT / "app.py")]
    server = Server(environ, tmp_path / "log", cwd=tmp_path, arguments=arguments)
    try:
        server.wait_until_up()
        assert server.send(build(), kyc.DEVELOPMENT_SECRET)[0] == 200
        assert server.send(build(), "wrong")[0] == 401
        assert "WARNING: the development secret is accepted" in server.log.read_text()
    finally:
        server.kill()


def test_heroku_is_warned_of(environ, log):
    kyc.warn(kyc.read_config(environ), {"DYNO": "web.1"})
    assert "does not last" in log.text
