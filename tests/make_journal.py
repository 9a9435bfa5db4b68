"""Print a small journal as this release writes it, in SQL.

Before a release: python tests/make_journal.py > tests/data/journal-1.0.0.sql
"""

import contextlib
import json
import os
import sqlite3
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["FLASK_RUN_FROM_CLI"] = "true"  # importing app starts no service
import app as kyc
from commands.remove import ORDER
from commands.trigger import build_event

DAY = "2026-05-{:02}T08:00:00.000Z"
PERSON = {number: {"reference_id": f"user-{number}"} for number in range(1, 10)}
OF = {number: {"inquiry_id": f"inq_{number}"} for number in range(1, 12)}
EVENTS = [  # name, and what it names; each a day after the one before
    ("inquiry.created", OF[1] | PERSON[1]),
    ("inquiry.started", OF[1] | PERSON[1]),
    ("verification/selfie.passed", OF[1] | {"object_id": "ver_1"}),
    ("inquiry.completed", OF[1] | PERSON[1]),
    ("inquiry.approved", OF[1] | PERSON[1] | {"account_id": "act_1"}),
    ("report/watchlist.matched", OF[1] | {"object_id": "rep_1"}),
    ("inquiry.declined", OF[2] | {"account_id": "act_2"}),
    ("account.created", {"account_id": "act_2"} | PERSON[2]),
    ("inquiry.marked-for-review", OF[3] | {"account_id": "act_3"}),
    ("inquiry.expired", OF[4] | PERSON[4]),
    ("inquiry-session.started", OF[4] | {"object_id": "iqse_4"}),
    ("inquiry.failed", OF[5] | PERSON[5]),
    ("inquiry.transitioned", OF[6] | PERSON[5] | {"object_status": "pending"}),
    ("inquiry.approved", OF[7] | PERSON[6] | {"template_id": "itmpl_2", "account_id": "act_6"}),
    ("report/adverse-media.matched", {"account_id": "act_6", "object_id": "rep_6"}),
    ("report/adverse-media.dismissed", {"account_id": "act_6", "object_id": "rep_6"}),
    ("inquiry.approved", OF[8] | PERSON[7]),
    ("kyc.held", PERSON[7] | {"object_id": "user-7", "object_status": "chargeback, by ops"}),
    ("kyc.held", PERSON[6] | {"object_id": "user-6", "object_status": "call back, by ops"}),
    ("kyc.released", PERSON[6] | {"object_id": "user-6", "object_status": "done, by ops"}),
    ("inquiry.created", OF[9] | PERSON[8]),
    ("inquiry.redacted", OF[9] | PERSON[8]),
    ("case.created", OF[9] | {"object_id": "case_1"}),
    ("workflow-run.created", {"object_id": "wfr_1"}),
    ("transaction.created", {"object_id": "txn_1"} | PERSON[9]),
    ("account.status-updated", {"account_id": "act_1", "object_status": "Frozen"}),
    ("inquiry.approved", OF[10]),
    ("inquiry.completed", OF[11] | PERSON[9]),
]
STATES = "UPDATE events SET state = ?, error = ? WHERE rowid = ?"


def deliveries() -> list[kyc.Delivery]:
    """Return all kinds of events; the first was fetched, the operator's have no signature."""
    found = []
    for day, (name, ids) in enumerate(EVENTS, 1):
        at = DAY.format(day)
        document = build_event(name, event_id=f"evt_{day:02}", created_at=at, **ids)
        body = json.dumps(document).encode()
        if name.startswith("workflow"):
            body = body.replace(b'"note": null', b'"note": "started by inq_3"')
        source = "operator" if name.startswith("kyc.") else "api" if day == 1 else "webhook"
        signed_by = "2eb6f8a2" if source == "webhook" else None
        found.append(kyc.Delivery(kyc.read_event(body, at), body, at, source, signed_by, 1))
    for body in (b'{"data": "of nobody"}', b"\xff\xfe"):
        at = DAY.format(30)
        found.append(kyc.Delivery(kyc.read_event(body, at), body, at, signed_by="2eb6f8a2"))
    return found


def make_journal(path: Path) -> None:
    """Create a journal at `path`; it is the same each time."""
    kyc.prepare_database(kyc.read_config({"KYC_DATABASE": str(path)}))
    with contextlib.closing(kyc.connect(path)) as db:
        for delivery in deliveries():
            with kyc.transaction(db):
                kyc.store(db, [delivery])
        with kyc.transaction(db):
            db.execute(STATES, ("failed", "KeyError: 'x' (handlers.py:5 open_account)", 7))
            db.execute(STATES, ("pending", None, 9))
            order = {"subject": "user-4", "before": DAY.format(30), "now": DAY.format(31)}
            order |= {"by": "ops", "command": "redact", "reason": "request 17"}
            db.execute(ORDER, order)
            db.execute("UPDATE kyc_status SET updated_at = event_at")
            db.execute("UPDATE rules_in_force SET since = '1'")


def dump(path: Path) -> str:
    """Return a database as SQL."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        return "\n".join([*db.iterdump(), f"PRAGMA user_version = {version};\n"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make_journal(Path(folder) / "kyc.db")
        sys.stdout.write(dump(Path(folder) / "kyc.db"))
