"""Where people stand, for those without a shell: a JSON API, pages and metrics. All is read-only.

app.py loads this folder when it is there. Nothing is registered unless KYC_API_TOKEN is set: one
or more tokens, separated by commas or spaces, each of at least 24 characters. A client sends one
as `Authorization: Bearer ...`; a browser asks for it, as the password of any user.

    api.py      GET /api/people, /api/people/<id>, /api/people/<id>/events, /api/events
    pages.py    GET /people, /people/<id>, /events, with templates/ and style.css
    metrics.py  GET /metrics
    queries.py  what these ask the database; the only place that opens it
"""

import base64
import binascii
import hmac
import os
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Mapping

from flask import Blueprint, Flask, Response, current_app, g, request
from werkzeug.routing import BaseConverter

import app as kyc
from dashboard import api, metrics, pages, queries
from dashboard.queries import BadQueryError

SHARE = threading.BoundedSemaphore(16)  # requests at once, of the 32 threads of the Procfile
PATIENCE = 4.0  # seconds that a request waits for its turn
YIELD_SECONDS = 0.1  # that it then waits while deliveries are being written
CHALLENGE = 'Basic realm="kyc", charset="UTF-8"'
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

routes = Blueprint("dashboard", __name__)
for part in (api, pages, metrics):
    routes.register_blueprint(part.routes)


def register(app: Flask, environ: Mapping[str, str]) -> None:
    """Give `app` the routes of this folder, if there is a token; raise ConfigError for a bad one.

    When it starts to serve, what it does is counted for the metrics.
    """
    tokens = read_tokens(environ)
    if not tokens:
        return
    app.config["KYC_API_TOKEN"] = tokens
    sys.setswitchinterval(0.001)  # seconds: a delivery waits for the interpreter, again and again
    app.url_map.converters["id"] = AnyText
    counts = app.extensions["counts"] = metrics.Counts(app)
    if environ.get("FLASK_RUN_FROM_CLI") != "true":
        counts.start()
    app.register_blueprint(routes)


def read_tokens(environ: Mapping[str, str]) -> tuple[bytes, ...]:
    """Return the tokens in KYC_API_TOKEN; raise ConfigError for a short one, never quoting it."""
    text = os.fsencode(environ.get("KYC_API_TOKEN", ""))
    tokens = tuple(filter(None, re.split(rb"[,\s]+", text)))
    for number, token in enumerate(tokens, 1):
        if not re.fullmatch(rb"[!-~]{24,}", token):
            raise kyc.ConfigError(
                f"KYC_API_TOKEN: entry {number} of {len(tokens)} is not a token: at least"
                " 24 visible ASCII characters, as `openssl rand -hex 24` makes"
            )
    return tokens


class AnyText(BaseConverter):
    """An ID in a path, whatever is in it: slashes and line ends, too."""

    regex = "(?s:.+)"
    part_isolating = False


@routes.before_request
def admit() -> Response | None:
    """Answer 401 to whoever has no token, and 503 when half of the threads are at work here.

    One answer is made at a time, and waits while deliveries are being written: they need the same
    processor.
    """
    given = read_token(request.headers.get("Authorization", ""))
    matches = [hmac.compare_digest(given, token) for token in current_app.config["KYC_API_TOKEN"]]
    if not any(matches):
        reason = f"the API token is {'wrong' if given else 'missing'}"
        kyc.log_rejection(reason)
        response = kyc.answer(401, {"error": "Unauthorized", "reason": reason})
        response.headers["WWW-Authenticate"] = CHALLENGE
        return response
    g.leave = []
    if SHARE.acquire(blocking=False):
        g.leave.append(SHARE.release)
        if queries.TURN.acquire(timeout=PATIENCE):
            g.leave.append(queries.TURN.release)
            let_deliveries_pass()
            return None
    return answer_unreadable(kyc.DatabaseError("too many are reading"))


def let_deliveries_pass() -> None:
    """Wait until no delivery is being written, YIELD_SECONDS at most."""
    journal, end = current_app.extensions["journal"], time.monotonic() + YIELD_SECONDS
    while journal.busy_since and time.monotonic() < end:
        time.sleep(0.002)


def read_token(header: str) -> bytes:
    """Return the token in an Authorization header: that of Bearer, or the password of Basic."""
    scheme, _, value = header.strip().partition(" ")
    given = value.strip().encode("latin-1", "replace")
    if scheme.lower() == "bearer":
        return given
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


@routes.teardown_request
def leave(_: BaseException | None) -> None:
    """Make room for another request."""
    for release in g.pop("leave", []):
        release()


@routes.after_request
def add_headers(response: Response) -> Response:
    """Forbid what an answer does not need, unless its view has said otherwise."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


@routes.errorhandler(BadQueryError)
def answer_bad_query(error: BadQueryError) -> Response:
    """Answer 400 to a parameter that makes no sense."""
    return kyc.answer(400, {"error": "Bad Request", "reason": str(error)})


@routes.errorhandler(kyc.DatabaseError)
@routes.errorhandler(sqlite3.Error)
def answer_unreadable(error: Exception) -> Response:
    """Answer 503 when the database cannot be read, or not in time."""
    late = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT
    reason = "it took too long" if late else kyc.describe_error(error)
    kyc.log.warning("outcome=unreadable reason=%s", kyc.quote(reason))
    response = kyc.answer(503, {"error": "The database could not be read", "reason": reason})
    response.headers["Retry-After"] = "2"
    return response
