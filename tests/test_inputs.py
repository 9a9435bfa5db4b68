"""Any input: never a 500, never a lost body, whatever strangers or Persona send.

INPUTS=1000000 runs a million inputs through the app; the default is 3,000.
"""

import copy
import hashlib
import json
import os
import random
import string
from pathlib import Path

from conftest import PAYLOADS, SECRET, build, sign

import app as kyc

INPUTS = int(os.environ.get("INPUTS", "3000"))
NAMES = [
    *("inquiry.created", "inquiry.started", "inquiry.expired", "inquiry.completed"),
    *("inquiry.failed", "inquiry.marked-for-review", "inquiry.approved", "inquiry.declined"),
    *("inquiry.redacted", "account.redacted", "verification.passed"),
]
ODD = [
    *(None, True, False, 0, -1, 1e308, 10**400, "", " ", "\0", "\ud800", "\u202e", "x" * 5000),
    *([], {}, [[]], {"": {}}, "evt_1", "inquiry.approved", "2026-02-30T00:00:00Z", "act_1"),
]
PIECES = [b"", b"\0", b"\xff", b"{", b"[", b'"', b"9" * 5000, b"NaN", b"\\u0000"]
HEADER_CHARS = string.printable.replace("\r", "").replace("\n", "") + "\xe9\xff\xb5"


def corpus():
    """Return bodies to start from: the official ones when at hand, and built ones."""
    bodies = [path.read_bytes() for path in sorted(PAYLOADS.glob("*.json"))]
    return bodies + [build(name, reference_id="user-1") for name in NAMES]


def mutate(body, chance):
    """Return `body` with its bytes or its values changed."""
    if chance.random() < 0.5:
        document = json.loads(body)
        document["data"]["id"] = f"evt_{chance.randrange(INPUTS)}"  # a new event, as a rule
        for _ in range(chance.randint(0, 3)):
            mutate_value(document, chance)
        body = json.dumps(document, ensure_ascii=chance.random() < 0.5)
        return body.encode("utf-8", "surrogatepass")
    body = bytearray(body)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(body) + 1)
        piece = chance.choice(PIECES)
        body[at : at + chance.randint(0, 40)] = piece
    return bytes(body)


def mutate_value(value, chance):
    """Change, drop or add a value somewhere inside `value`."""
    while isinstance(value, dict | list) and value:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or not value[key] or chance.random() < 0.2:
            value[key] = copy.deepcopy(chance.choice(ODD))
            return
        value = value[key]


def random_headers(body, chance):
    """Return headers and whether they authenticate `body`."""
    if chance.random() < 0.7:
        return {
            **sign(body, SECRET),
            "Persona-Webhook-Attempts-Made": chance.choice(["1", "x"]),
        }, True
    length = chance.choice([0, 1, 10, 80, 3000])
    noise = "".join(chance.choices(HEADER_CHARS, k=length))
    name = chance.choice(["Persona-Signature", "X-Persona-Signature", "Content-Type"])
    return {name: chance.choice([noise, f"t=1,v1={noise}", f"t={noise},v1=0"])}, False


def test_no_input_is_a_500_and_no_authentic_body_is_lost(client, db):
    chance = random.Random(20260101)
    bodies = corpus()
    db.execute("CREATE TEMP TABLE accepted (event_id TEXT, body_sha256 TEXT)")
    memory = None
    for number in range(INPUTS):
        body = mutate(chance.choice(bodies), chance)
        headers, signed = random_headers(body, chance)
        answer = client.post("/webhook", data=body, headers=headers)
        assert answer.status_code == (200 if signed else 401), body
        if signed:
            event_id = kyc.read_event(body, "").event_id
            known = (event_id, hashlib.sha256(body).hexdigest())
            db.execute("INSERT INTO accepted VALUES (?, ?)", known)
        if number == INPUTS // 2:
            memory = resident_bytes()
    assert resident_bytes() - memory < 64 << 20
    check_journal(db)


def resident_bytes():
    """Return how much memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def check_journal(db):
    """Every accepted event is in the journal, nothing else is, and each body has its hash."""
    lost = "SELECT count(*) FROM accepted WHERE event_id NOT IN (SELECT event_id FROM events)"
    assert db.execute("SELECT count(*) FROM accepted").fetchone()[0] > INPUTS // 2
    assert db.execute(lost).fetchone()[0] == 0
    strange = """
        SELECT count(*) FROM events
        WHERE (event_id, body_sha256) NOT IN (SELECT event_id, body_sha256 FROM accepted)
    """
    assert db.execute(strange).fetchone()[0] == 0
    for row in db.execute("SELECT body, body_sha256 FROM events"):
        if row["body"] is not None:
            body = row["body"] if isinstance(row["body"], bytes) else row["body"].encode()
            assert hashlib.sha256(body).hexdigest() == row["body_sha256"]
    assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_mutated_bodies_over_real_http(serve):
    server = serve(WEB_CONCURRENCY="2")
    chance = random.Random(20260102)
    bodies = corpus()
    for _ in range(500):
        body = mutate(chance.choice(bodies), chance)
        assert server.send(body)[0] == 200, body


def test_planted_markers_reach_no_log_and_no_answer(serve):
    server = serve()
    marker = "MARKER-7f3a"
    answers = [server.send(build("inquiry.approved", reference_id=marker))]
    answers.append(server.send(marker.encode()))
    answers.append(
        server.request("POST", "/webhook", marker.encode(), {"Persona-Signature": marker})
    )
    answers.append(server.request("GET", f"/{marker}"))
    answers.append(server.send(build("inquiry.approved", reference_id=marker), secret=marker))
    assert [status for status, _ in answers] == [200, 200, 401, 404, 401]
    server.stop()
    texts = [server.log.read_text(), *(body.decode() for _, body in answers)]
    assert not [text for text in texts if marker in text or SECRET in text]
