"""`flask trigger`: an event as realistic as Persona's, for trials and tests."""

import hmac
import http.client
import json
import os
import random
import re
import string
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import click
from flask import current_app

import app as kyc
import commands as cli
from commands.names import doubt_name

PREFIXES = {  # of the IDs of each family of objects
    **{"inquiry": "inq", "inquiry-session": "iqse", "account": "act", "case": "case"},
    **{"verification": "ver", "report": "rep", "document": "doc", "selfie": "self"},
    **{"transaction": "txn", "transaction-type": "txntp", "workflow-run": "wfr"},
    **{"graph-query": "grphq", "importer-pipeline-run": "mprtpr"},
}
NAME_ACCOUNT = {"account", "case", "inquiry", "report"}
NAME_INQUIRY = {"case", "document", "inquiry", "inquiry-session", "report", "selfie"}
NAME_INQUIRY |= {"verification"}
BEFORE_ACCOUNT = {f"inquiry.{word}" for word in ("created", "started", "transitioned", "expired")}
WITH_ACCOUNT = {"transaction.added-relation", "transaction.status-updated"}
WITH_ACCOUNT |= {"transaction.sentinel-session-processed"}
TYPES = {  # of objects, where the event's name does not tell all of it
    **{"verification": "verification/government-id", "document": "document/government-id"},
    "selfie": "selfie/profile-and-center",
}
STATUSES = {  # of objects, where the event's name ends otherwise
    **{"started": "pending", "transitioned": "pending", "marked-for-review": "needs_review"},
    **{"redacted": "approved", "matched": "ready", "dismissed": "ready"},
}
PERSON = {
    **{"name-first": "Jane", "name-middle": None, "name-last": "Doe", "birthdate": "1994-12-30"},
    **{"address-street-1": "123 Main St", "address-city": "San Francisco"},
    **{"address-subdivision": "California", "address-postal-code": "94111"},
    **{"email-address": "jane@example.com", "phone-number": "+14155550123"},
}
CHECK = {"status": "passed", "reasons": [], "requirement": "required", "metadata": {}}
ATTRIBUTES = {  # of each family; "" for the others
    "account": {"account-type-name": "User"},
    "inquiry": {
        **{"creator": "API", "reviewer-comment": None, "started-at": None, "completed-at": None},
        **{"failed-at": None, "expired-at": None, "marked-for-review-at": None},
        **{"decisioned-at": None, "previous-step-name": "selfie", "next-step-name": "success"},
        "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903},
    },
    "": {"country-code": "US", "checks": [{"name": f"id_check_{n}", **CHECK} for n in range(9)]},
}
TEMPLATE = "itmpl_TrialTemplateOfThisReceiver"


def build_event(
    name: str,
    event_id: str | None = None,
    created_at: str | None = None,
    inquiry_id: str | None = None,
    account_id: str | None = None,
    reference_id: str | None = None,
    template_id: str | None = None,
    object_id: str | None = None,
    object_status: str | None = None,
) -> dict[str, Any]:
    """Return the document of an event named `name`, shaped like Persona's (page "Events").

    IDs left out are new, or absent where Persona names none; beside one that is given no other
    is invented, for it may be somebody's.
    """
    kind, _, happening = name.rpartition(".")
    family, now = kind.split("/")[0], created_at or kyc.utc_now()
    if not kind or not happening:
        raise click.BadParameter("an event is named like inquiry.approved", param_hint="NAME")
    if not (inquiry_id or account_id or object_id):
        inquiry_id, account_id = invent_links(name)
    own_id = {"inquiry": inquiry_id, "account": account_id}.get(family) or object_id
    thing = {
        "type": TYPES.get(kind, kind),
        "id": own_id or new_id(PREFIXES.get(family, family[:4])),
        "attributes": describe(family, happening, now, reference_id, object_status),
        "relationships": relate(family, inquiry_id, account_id, template_id or TEMPLATE),
    }
    attributes = {"name": name, "payload": {"data": thing, "included": []}, "created-at": now}
    return {"data": {"type": "event", "id": event_id or new_id("evt"), "attributes": attributes}}


def invent_links(name: str) -> tuple[str | None, str | None]:
    """Return a new inquiry and a new account, each where Persona's events of this name have one."""
    family = re.split("[./]", name)[0]
    inquiry = family in NAME_INQUIRY and not name.startswith("report/business-")
    account = (family in NAME_ACCOUNT and name not in BEFORE_ACCOUNT) or name in WITH_ACCOUNT
    return new_id("inq") if inquiry else None, new_id("act") if account else None


def describe(
    family: str, happening: str, now: str, reference_id: str | None, status: str | None
) -> dict[str, Any]:
    """Return an object's attributes: how it stands, and of whom it is, unless redacted."""
    key, usual = "status", STATUSES.get(happening, happening)
    if family == "account":
        key, usual = "account-status", "Default"
    person = dict.fromkeys(PERSON) if happening == "redacted" else PERSON
    decided = "decisioned-at" if happening in ("approved", "declined") else f"{happening}-at"
    return {
        **{key: status or usual, "reference-id": reference_id},
        **{"created-at": now, "updated-at": now, "redacted-at": None, "tags": [], "note": None},
        **ATTRIBUTES.get(family, ATTRIBUTES[""]),
        **person,
        "fields": {key: {"type": "string", "value": value} for key, value in person.items()},
        decided: now,
    }


def relate(family: str, inquiry: str | None, account: str | None, template: str) -> dict[str, Any]:
    """Return what an object points at."""
    links = {"account": account, "transaction": None, "inquiry": inquiry}
    if family == "inquiry":
        links |= {"inquiry": None, "inquiry-template": template, "reviewer": None}
    return {
        kind: {"data": {"type": kind, "id": target} if target else None}
        for kind, target in links.items()
    }


def new_id(prefix: str) -> str:
    """Return an ID like Persona's: a prefix and 24 letters and digits."""
    letters = string.ascii_letters + string.digits
    return f"{prefix}_{''.join(random.SystemRandom().choices(letters, k=24))}"


INFLECTIONS: dict[str, Callable[[str], str]] = {  # of keys, a setting of each webhook
    "kebab": str,
    "camel": kyc.camel_case,
    "snake": lambda key: key.replace("-", "_"),
}


def inflect(value: Any, change: Callable[[str], str]) -> Any:
    """Return `value` with all its keys changed."""
    if isinstance(value, list):
        return [inflect(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): inflect(item, change) for key, item in value.items()}
    return value


def sign(body: bytes, secret: bytes, scheme: str, timestamp: int) -> dict[str, str]:
    """Return the headers that Persona, or a relay, would sign `body` with."""
    signed = body if scheme == "body" else f"{timestamp}.".encode() + body
    digest = hmac.new(secret, signed, "sha256").hexdigest()
    if scheme == "split":
        return {"X-Persona-Signature": digest, "X-Persona-Timestamp": str(timestamp)}
    return {"Persona-Signature": digest if scheme == "body" else f"t={timestamp},v1={digest}"}


@cli.command
@click.argument("name")
@click.option("--url", help="Where to POST.  [default: the local server, at PORT]")
@click.option("--reference-id", help="Your ID of the person.")
@click.option("--inquiry-id", help="The inquiry.")
@click.option("--account-id", help="The account.")
@click.option("--object-id", help="The report, case or other object that the event is about.")
@click.option("--object-status", help="The status of that object, as sent.")
@click.option("--template-id", help="The inquiry template.  [default: the first of KYC_TEMPLATES]")
@click.option("--created-at", type=cli.Moment(), help="When it happened.  [default: now]")
@click.option("--event-id", help="The event's ID; with --count, sent as duplicates.")
@click.option("--scheme", type=click.Choice(kyc.SCHEMES), help="[default: as configured]")
@click.option("--inflection", type=click.Choice(list(INFLECTIONS)), default="kebab")
@click.option("--count", type=click.IntRange(1, 1_000_000), default=1, help="How many to send.")
@click.option("--print", "show", is_flag=True, help="Print the body instead of sending it.")
def trigger(
    name: str,
    url: str | None,
    scheme: str | None,
    inflection: str,
    count: int,
    show: bool,
    **given: Any,
) -> None:
    """Build the event NAME, sign it and send it.

    Inquiry and account are new when neither is given.

    Example: flask trigger inquiry.approved --reference-id user-42
    """
    config = current_app.config["KYC"]
    url = url or f"http://127.0.0.1:{os.environ.get('PORT', 3000)}/webhooks/persona"
    given["template_id"] = given["template_id"] or next(iter(config.templates), None)
    warn(name, "" if show else url)
    for _ in range(count):
        document = inflect(build_event(name, **given), INFLECTIONS[inflection])
        if show:
            click.echo(json.dumps(document, indent=2))
            continue
        status, reply = post(url, json.dumps(document).encode(), scheme or config.scheme)
        click.echo(cli.printable(f"{name} {document['data']['id']} -> {status} {reply}"))
        if status != 200:
            raise click.exceptions.Exit(1)


def warn(name: str, url: str) -> None:
    """Say what one should know before such an event is sent."""
    if doubt := doubt_name(name):
        click.echo(f"WARNING: {doubt}", err=True)
    if url and not re.match(r"https?://(localhost|127\.[0-9.]+|\[::1\])(:[^@]*)?(/|$)", url):
        click.echo(f"WARNING: {url} is not on this machine: it counts there as real", err=True)
    if url and not current_app.config["KYC"].secrets:
        words = "PERSONA_WEBHOOK_SECRET is not set: signing with the development secret"
        click.echo(words, err=True)


def post(url: str, body: bytes, scheme: str) -> tuple[int, str]:
    """POST a delivery as Persona does; return status and body of the answer."""
    secrets, now = current_app.config["KYC"].secrets, int(time.time())
    headers = {
        **sign(body, secrets[0] if secrets else kyc.DEVELOPMENT_SECRET.encode(), scheme, now),
        "Content-Type": "application/json; charset=utf-8",
        "Persona-Webhook-Attempts-Made": "1",
        "Persona-Webhook-Attempts-Left": "7",
        "Persona-Webhook-First-Attempted-At": str(now),
    }
    return request(url, body, headers)


def request(url: str, *body_and_headers: Any) -> tuple[int, str]:
    """GET or POST, following no redirect; return status and body of the answer."""
    try:
        opener = urllib.request.OpenerDirector()
        for name in ("HTTP", "HTTPS", "Unknown"):
            opener.add_handler(getattr(urllib.request, f"{name}Handler")())
        asked = urllib.request.Request(url, *body_and_headers)
        with opener.open(asked, timeout=10) as response:
            return response.status, response.read().decode(errors="replace").strip()
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        words = cli.printable(getattr(cause, "strerror", cause) or type(cause).__name__)
        raise click.ClickException(f"{url}: {words}; does the server run?") from None
