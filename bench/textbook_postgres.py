"""The textbook design on PostgreSQL: a connection per thread, one transaction per request.

As textbook.py, with PostgreSQL's own concurrency: the threads do not wait for each other.
"""

import json
import os
import threading

import psycopg
from flask import Flask, request
from textbook import INSERT_EVENT, SCHEMA, SET_STATUS, verify, write

INSERT, SET = (sql.replace("?", "%s") for sql in (INSERT_EVENT, SET_STATUS))

app = Flask(__name__)
local = threading.local()


def get_db() -> psycopg.Connection:
    """Return this thread's connection, as a pool that is large enough would."""
    if not hasattr(local, "db"):
        local.db = psycopg.connect(os.environ["DATABASE_URL"])
    return local.db


def store(event: dict, body: str) -> None:
    """Insert the event and set the person's status, in one transaction."""
    db = get_db()
    with db.transaction():
        write(db, event, body, INSERT, SET)


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
