"""Fill this service's journal: python bench/fill.py COUNT.

The service's own functions do it, without HTTP and without waiting for the disk. The
environment names the database. run.py calls this as a process of its own, so that nothing
of the service stays in the one that measures.
"""

import contextlib
import itertools
import os
import sys
from pathlib import Path

from events import distinct_bodies

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["FLASK_RUN_FROM_CLI"] = "true"  # importing app starts no service
import app as kyc

BATCH = 500
COUNT_PROCESSED = "SELECT count(*) FROM events WHERE state = 'processed'"


def fill(count: int) -> None:
    """Store `count` events, each of another inquiry, account and person."""
    config = kyc.read_config(os.environ)
    kyc.prepare_database(config)
    bodies = distinct_bodies(count)
    with contextlib.closing(kyc.connect(config.database)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -500000")  # 500 MB
        db.execute("PRAGMA wal_autocheckpoint = 100000")  # pages
        while batch := [read(body) for body in itertools.islice(bodies, BATCH)]:
            with kyc.transaction(db):
                kyc.store(db, batch)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        with open(config.database, "rb") as file:
            os.fsync(file.fileno())  # or the disk is still busy with it during the first run
        (stored,) = db.execute(COUNT_PROCESSED).fetchone()
    if stored != count:
        sys.exit(f"fill: {stored} events are processed, not {count}")


def read(body: bytes) -> kyc.Delivery:
    """Return a body as the route hands it to the journal."""
    now = kyc.utc_now()
    return kyc.Delivery(kyc.read_event(body, now), body, now)


if __name__ == "__main__":
    fill(int(sys.argv[1]))
