"""The HTTP contract: status codes and bodies, whatever is sent."""

import http.client
import json
import socket
import time

import pytest
from conftest import build, sign, unrecognized_id

import app as kyc


def test_new_event_is_received(send):
    answer = send("inquiry.approved")
    assert (answer.status_code, answer.json) == (200, {"received": True})
    assert answer.content_type == "application/json"


@pytest.mark.parametrize("path", ["/webhook", "/webhook/", "/webhooks/persona/"])
def test_path_of_the_quickstart_and_a_trailing_slash_are_served(send, path):
    assert send("inquiry.approved", path=path).json == {"received": True}


def test_duplicate_is_stored_once(send, db):
    body = build("inquiry.approved")
    send(body)
    answer = send(body)
    assert (answer.status_code, answer.json) == (200, {"received": True, "duplicate": True})
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 1


@pytest.mark.parametrize("body", [b"", b"not json", b"\xff\xfe", b"{}", b"\0", "{\ufeff}".encode()])
def test_authentic_body_without_an_event_is_kept(send, db, body):
    for _ in range(2):
        answer = send(body)
        assert (answer.status_code, answer.json) == (200, {"received": True})
    row = db.execute("SELECT * FROM events").fetchone()
    assert (row["event_id"], row["state"]) == (unrecognized_id(body), "unrecognized")
    assert row["body"] == (body if body == b"\xff\xfe" else body.decode())


def test_root_says_where_to_post(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.mimetype == "text/plain"
    assert "/webhooks/persona" in answer.text


def test_health_is_ok_and_leaves_the_version_of_the_schema(client, db, send):
    send("inquiry.approved")
    before = list(db.iterdump()), db.execute("PRAGMA user_version").fetchone()[0]
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json) == (200, {"status": "ok"})
    assert (list(db.iterdump()), db.execute("PRAGMA user_version").fetchone()[0]) == before


def test_health_is_a_503_without_the_database_but_the_process_lives(client, send, database):
    send("inquiry.approved")
    database.rename(database.with_name("away.db"))
    assert send("inquiry.approved").status_code == 503
    health = client.get("/healthz")
    assert (health.status_code, health.json["status"]) == (503, "unavailable")
    assert "the database is gone" in health.json["reason"]
    assert str(database) not in health.text
    answer = client.get("/livez")
    assert (answer.status_code, answer.json) == (200, {"status": "ok"})
    assert not database.exists()


def test_health_writes_at_most_once_a_second_and_life_never(serve, database):
    server, wal = serve(), database.with_name("kyc.db-wal")
    body = build()
    assert server.send(body)[0] == 200
    began, times = time.monotonic(), [wal.stat().st_mtime_ns]
    while len(times) < 60 or time.monotonic() < began + 1.5:
        assert server.request("GET", "/healthz") == (200, b'{"status": "ok"}\n')
        assert server.request("GET", "/livez") == (200, b'{"status": "ok"}\n')
        times.append(wal.stat().st_mtime_ns)
    writes, seconds = len(set(times)) - 1, time.monotonic() - began
    assert 1 <= writes <= 4 + 2 * seconds  # some of them to empty the WAL


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", "/webhooks/persona", 405), ("PUT", "/webhook", 405), ("DELETE", "/", 405)),
        *(("GET", "/nowhere", 404), ("POST", "/webhooks", 404), ("POST", "/healthz", 405)),
        *(("GET", "/../app.py", 404), ("GET", "/static/app.py", 404), ("TRACE", "/webhook", 405)),
        *(("OPTIONS", "/webhook", 405), ("OPTIONS", "/healthz", 405), ("OPTIONS", "/", 405)),
        *(("POST", "//webhooks/persona", 404), ("POST", "/webhooks//persona", 404)),
        *(("GET", "/webhook/", 405), ("GET", "/livez/", 404), ("POST", "/webhook//", 404)),
    ],
)
def test_wrong_path_or_method_is_a_json_error(client, method, path, status):
    answer = client.open(path, method=method)
    assert answer.status_code == status
    assert "error" in answer.json


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/webhooks//persona", 'reason="Not Found" method=POST path=/webhooks//persona'),
        ("POST", "/a%20b%0Ac", 'reason="Not Found" method=POST path="/a b\\nc"'),
        ("POST", "/" + "x" * 1000, f'method=POST path="/{"x" * 127}"'),
        ("POST", "/", 'reason="Method Not Allowed" method=POST path=/'),
        ("POST", "/webhook", 'header is missing" method=POST path=/webhook'),
    ],
)
def test_rejection_is_logged_with_method_and_path(client, log, method, path, words):
    client.open(path, method=method)
    (line,) = {record.getMessage() for record in log.records}
    assert line.startswith("outcome=rejected stale=false ")
    assert line.endswith(words)


def test_body_over_the_limit_is_refused(create, db):
    client = create(MAX_BODY_BYTES="100").test_client()
    for size, status, answer in (
        (101, 413, {"error": "Request Entity Too Large"}),
        (100, 200, {"received": True}),
    ):
        response = client.post("/webhook", data=b"x" * size, headers=sign(b"x" * size))
        assert (response.status_code, response.json) == (status, answer)
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 1


def test_attempt_is_kept_when_it_is_a_number(client, db):
    for attempt in ("3", "", "x", "-1", "9" * 30):
        body = build()
        headers = {**sign(body), "Persona-Webhook-Attempts-Made": attempt}
        assert client.post("/webhook", data=body, headers=headers).status_code == 200
    assert [row["attempt"] for row in db.execute("SELECT attempt FROM events")] == [3] + [None] * 4


def test_a_bug_is_a_500_that_tells_nothing(app, client, send, log, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("marker-secret-detail")

    monkeypatch.setattr(kyc, "read_event", fail)
    answer = send("inquiry.approved")
    assert (answer.status_code, answer.json) == (500, {"error": "Internal server error"})
    assert "error=ZeroDivisionError" in log.text
    assert "marker" not in log.text


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "in chunks"])
def test_sender_that_paces_itself_sees_that_its_body_is_too_large(serve, announced):
    server = serve()
    megabyte = b"x" * (1 << 20)
    part = megabyte if announced else b"100000\r\n" + megabyte + b"\r\n"
    length = f"Content-Length: {6 << 20}" if announced else "Transfer-Encoding: chunked"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(head([length]))
        for _ in range(6):
            client.sendall(part)
            time.sleep(0.05)
        if not announced:
            client.sendall(b"0\r\n\r\n")
        answer = read_answer(client)
    assert answer == (413, b'{"error": "Request Entity Too Large"}\n')


def test_connection_carries_one_request(serve):
    server = serve()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b"\r\nConnection: close\r\n" in answer


def raw(server, request):
    """Send raw bytes; return the status and the body of the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(request)
        return read_answer(client)


def read_answer(client):
    """Return the status and the body of the answer that comes over a socket."""
    answer = http.client.HTTPResponse(client)
    answer.begin()
    return answer.status, answer.read()


def chunked(body, size=1000):
    """Return `body` in chunked transfer encoding."""
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def head(extra, path="/webhook"):
    """Return the head of a POST request."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *extra]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def test_bodies_over_real_http(serve):
    server = serve(MAX_BODY_BYTES="50000")
    body = build("inquiry.approved")
    signature = f"Persona-Signature: {sign(body)['Persona-Signature']}"
    encoding = "Transfer-Encoding: chunked"
    assert raw(server, head([signature, encoding]) + chunked(body))[0] == 200
    status, answer = raw(server, head([encoding]) + chunked(b"x" * 60_000))
    assert (status, "error" in json.loads(answer)) == (413, True)
    assert raw(server, head(["Content-Length: 60000"]) + b"x" * 60_000)[0] == 413
    assert raw(server, head([signature]))[0] == 401
    assert raw(server, head([encoding]) + b"zz\r\nnot a chunk\r\n")[0] == 400
    for odd in ("Persona-Signature: \xff\xfe", "Persona-Signature: " + "t=1,v1=2 " * 800):
        assert raw(server, head([odd, "Content-Length: 2"]) + b"{}")[0] in (400, 401)
    wrong = f"Persona-Signature: {sign(body, 'wrong')['Persona-Signature']}"
    twice = [wrong, signature]
    assert raw(server, head([*twice, f"Content-Length: {len(body)}"]) + body)[0] == 200
