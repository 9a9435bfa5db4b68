"""The textbook design: a connection per thread, one transaction per request.

Done properly, as a good guide would: the signature is verified, WAL and full
synchronisation are on, duplicates are counted once, a locked database is waited for.
"""

import hmac
import json
import os
import sqlite3
import threading
from typing import Any

from flask import Flask, abort, request

SECRET = os.environ["PERSONA_WEBHOOK_SECRET"].encode()
DATABASE = os.environ["KYC_DATABASE"]
STATUSES = {
    **{"inquiry.created": "created", "inquiry.started": "pending", "inquiry.failed": "failed"},
    **{"inquiry.completed": "completed", "inquiry.expired": "expired"},
    **{"inquiry.marked-for-review": "needs_review"},
    **{"inquiry.approved": "approved", "inquiry.declined": "declined"},
}
SCHEMA = """
    CREATE TABLE IF NOT EXISTS events (
        event_id   TEXT NOT NULL PRIMARY KEY,
        name       TEXT NOT NULL,
        created_at TEXT NOT NULL,
        body       TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS kyc_status (
        reference_id TEXT NOT NULL PRIMARY KEY,
        status       TEXT NOT NULL,
        inquiry_id   TEXT NOT NULL,
        event_at     TEXT NOT NULL
    );
"""
INSERT_EVENT = """
    INSERT INTO events (event_id, name, created_at, body) VALUES (?, ?, ?, ?)
    ON CONFLICT (event_id) DO NOTHING
"""
SET_STATUS = """
    INSERT INTO kyc_status (reference_id, status, inquiry_id, event_at) VALUES (?, ?, ?, ?)
    ON CONFLICT (reference_id) DO UPDATE SET
        status = excluded.status, inquiry_id = excluded.inquiry_id, event_at = excluded.event_at
    WHERE excluded.event_at >= kyc_status.event_at
"""

app = Flask(__name__)
local = threading.local()


def get_db() -> sqlite3.Connection:
    """Return this thread's connection; it waits 5 s, the default, for a lock."""
    if not hasattr(local, "db"):
        local.db = sqlite3.connect(DATABASE)
        local.db.execute("PRAGMA journal_mode = WAL")
        local.db.execute("PRAGMA synchronous = FULL")
    return local.db


def verify(body: bytes) -> None:
    """End the request unless it is signed with the secret."""
    fields = request.headers.get("Persona-Signature", "").split(",")
    signature = dict(field.partition("=")[::2] for field in fields)
    message = signature.get("t", "").encode() + b"." + body
    expected = hmac.new(SECRET, message, "sha256").hexdigest()
    if not hmac.compare_digest(expected.encode(), signature.get("v1", "").encode()):
        abort(401)


def store(event: dict, body: str) -> None:
    """Insert the event and set the person's status, in one transaction."""
    db = get_db()
    with db:
        write(db, event, body, INSERT_EVENT, SET_STATUS)


def write(db: Any, event: dict, body: str, insert_event: str, set_status: str) -> None:
    """Run the statements that store an event, in a transaction of the caller."""
    attributes = event["attributes"]
    name, created_at = attributes["name"], attributes["created-at"]
    inquiry = attributes["payload"]["data"]
    new = db.execute(insert_event, (event["id"], name, created_at, body)).rowcount
    if new and name in STATUSES:
        person = inquiry["attributes"]["reference-id"] or inquiry["id"]
        db.execute(set_status, (person, STATUSES[name], inquiry["id"], created_at))


@app.post("/webhooks/persona")
def receive() -> dict:
    """Verify, parse and store one delivery."""
    body = request.get_data()
    verify(body)
    store(json.loads(body)["data"], body.decode())
    return {"received": True}


def init_db() -> None:
    """Create the tables, once, before the service starts."""
    get_db().executescript(SCHEMA)


if __name__ == "__main__":
    init_db()
