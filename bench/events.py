"""Make the events that the benchmark sends: signed, all of one size, no two alike."""

import hmac
import itertools
import json
import os
import random
import string
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

SECRET = "wbhsec_benchmark_only_0123456789"
BODY_BYTES = 3500
LETTERS = string.ascii_letters + string.digits
PREFIXES = {"event": "evt_", "inquiry": "inq_", "account": "act_", "reference": "user-"}


def write_requests(path: Path, count: int) -> None:
    """Write new signed requests into a file, and have them on disk before anything runs."""
    with path.open("wb") as file:
        file.writelines(signed_requests(count))
        os.fsync(file.fileno())


def signed_requests(count: int) -> Iterator[bytes]:
    """Yield HTTP requests, all of the same length."""
    now = str(int(time.time()))
    for body in distinct_bodies(count):
        signature = hmac.new(SECRET.encode(), now.encode() + b"." + body, "sha256").hexdigest()
        yield (
            "POST /webhooks/persona HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "Content-Type: application/json; charset=utf-8\r\nAccept: */*\r\n"
            "Persona-Webhook-Attempts-Made: 1\r\nPersona-Webhook-Attempts-Left: 7\r\n"
            f"Persona-Signature: t={now},v1={signature}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body


def distinct_bodies(count: int) -> Iterator[bytes]:
    """Yield bodies of BODY_BYTES, each with IDs of its own."""
    template = body_template()
    for _ in range(count):
        yield (template % new_ids()).encode()


def new_ids() -> dict[str, str]:
    """Return the IDs of one event: as long as Persona's, and random like them."""
    letters = "".join(random.choices(LETTERS, k=24 * len(PREFIXES)))
    parts = (letters[start : start + 24] for start in range(0, len(letters), 24))
    return {kind: PREFIXES[kind] + part for kind, part in zip(PREFIXES, parts, strict=True)}


def body_template() -> str:
    """Return an inquiry.approved as JSON, with %(event)s and the like in place of its IDs."""
    document = approval()
    inquiry = document["data"]["attributes"]["payload"]["data"]["attributes"]
    for number in itertools.count(1):
        missing = BODY_BYTES - len(json.dumps(document) % new_ids())
        if missing < 100:
            break
        inquiry["fields"][f"question-{number:02}"] = {"type": "string", "value": "answer " * 5}
    inquiry["reviewer-comment"] = "-" * missing
    return json.dumps(document)


def approval() -> dict:
    """Return an inquiry.approved in Persona's shape (page "Events"), with few fields."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    kinds = {"account": "%(account)s", "inquiry-template": "itmpl_" + "T" * 24}
    inquiry = {
        "type": "inquiry",
        "id": "%(inquiry)s",
        "attributes": {
            **{"status": "approved", "reference-id": "%(reference)s", "reviewer-comment": ""},
            **{"tags": [], "creator": "API", "created-at": now, "decisioned-at": now},
            "fields": {},
        },
        "relationships": {kind: {"data": {"type": kind, "id": kinds[kind]}} for kind in kinds},
    }
    payload = {"data": inquiry, "included": []}
    attributes = {"name": "inquiry.approved", "created-at": now, "payload": payload}
    return {"data": {"type": "event", "id": "%(event)s", "attributes": attributes}}
