"""The textbook design on PostgreSQL: a connection per thread, one transaction per request.

As textbook.py, with PostgreSQL's own concurrency: the threads do not wait for each other.
"""

import json
import os
import threading

import psycopg
from flask import Flask, request
from textbook import SCHEMA, STATUSES, verify

INSERT_EVENT = """
    INSERT INTO events (event_id, name, created_at, body) VALUES (%s, %s, %s, %s)
    ON CONFLICT (event_id) DO NOTHING
"""
SET_STATUS = """
    INSERT INTO kyc_status (reference_id, status, inquiry_id, event_at) VALUES (%s, %s, %s, %s)
    ON CONFLICT (reference_id) DO UPDATE SET
        status = excluded.status, inquiry_id = excluded.inquiry_id, event_at = excluded.event_at
    WHERE excluded.event_at >= kyc_status.event_at
"""

app = Flask(__name__)
local = threading.local()


def get_db() -> psycopg.Connection:
    """Return this thread's connection, as a pool that is large enough would."""
    if not hasattr(local, "db"):
        local.db = psycopg.connect(os.environ["DATABASE_URL"])
    return local.db


def store(event: dict, body: str) -> None:
    """Insert the event and set the person's status, in one transaction."""
    attributes = event["attributes"]
    name, created_at = attributes["name"], attributes["created-at"]
    inquiry = attributes["payload"]["data"]
    with get_db().transaction():
        db = get_db()
        new = db.execute(INSERT_EVENT, (event["id"], name, created_at, body)).rowcount
        if new and name in STATUSES:
            person = inquiry["attributes"]["reference-id"] or inquiry["id"]
            db.execute(SET_STATUS, (person, STATUSES[name], inquiry["id"], created_at))


@app.post("/webhooks/persona")
def receive() -> dict:
    """Verify, parse and store one delivery."""
    body = request.get_data()
    verify(body)
    store(json.loads(body)["data"], body.decode())
    return {"received": True}


def init_db() -> None:
    """Create the tables, once, before the service starts."""
    with psycopg.connect(os.environ["DATABASE_URL"]) as db:
        db.execute(SCHEMA)


if __name__ == "__main__":
    init_db()
