"""The HTTP contract: status codes and bodies, whatever is sent."""

import http.client
import json

import pytest
from conftest import build, sign, unrecognized_id

import app as kyc


def test_new_event_is_received(send):
    answer = send("inquiry.approved")
    assert (answer.status_code, answer.json) == (200, {"received": True})
    assert answer.content_type == "application/json"


def test_path_of_the_quickstart_is_served(send):
    assert send("inquiry.approved", path="/webhook").status_code == 200


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


def test_health_is_ok(client):
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", "/webhooks/persona", 405), ("PUT", "/webhook", 405), ("DELETE", "/", 405)),
        *(("GET", "/nowhere", 404), ("POST", "/webhooks", 404), ("POST", "/healthz", 405)),
        *(("GET", "/../app.py", 404), ("GET", "/static/app.py", 404), ("TRACE", "/webhook", 405)),
    ],
)
def test_wrong_path_or_method_is_a_json_error(client, method, path, status):
    answer = client.open(path, method=method)
    assert answer.status_code == status
    assert "error" in answer.json


def test_body_over_the_limit_is_refused(environ):
    app = kyc.create_app({**environ, "MAX_BODY_BYTES": "100"})
    body = b"x" * 101
    answer = app.test_client().post("/webhook", data=body, headers=sign(body))
    assert (answer.status_code, answer.json) == (413, {"error": "Request Entity Too Large"})


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


def raw(server, request):
    """Send raw bytes; return the status and the parsed body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.connect()
    connection.sock.sendall(request)
    answer = http.client.HTTPResponse(connection.sock)
    answer.begin()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


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
