"""Persona's API, as far as `flask backfill` and `flask reconcile` read it."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import click

import app as kyc
import commands as cli

API_URL = "https://api.withpersona.com/api/v1"
LOCAL_URL = r"http://(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?(/[^\s@?#]*)?"
PAGE = 100  # items, the most that Persona sends at once
TRIES = 6  # of a request, while the network or Persona is at fault
ANSWER_SECONDS = 20.0
LONGEST_PAUSE = 120.0  # seconds


class PassingError(Exception):
    """The same request may succeed later; the message says what was wrong."""

    def __init__(self, reason: str, seconds: float = 0):
        super().__init__(reason)
        self.seconds = seconds  # after how many, if Persona says so


class StayHere(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it could take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Let it be an error."""


class Persona:
    """Reads what one environment holds, with its key."""

    def __init__(self) -> None:
        self.key, self.url = read_key(), os.environ.get("PERSONA_API_URL", API_URL).rstrip("/")
        if not re.fullmatch(rf"https://[^\s@?#]+|{LOCAL_URL}", self.url):
            raise click.ClickException("PERSONA_API_URL must begin with https://: it gets the key")
        self.opener = urllib.request.build_opener(StayHere)
        self.free_at = 0.0  # when the next request may be sent

    def walk(
        self, path: str, query: dict[str, str], search: dict[str, Any] | None = None
    ) -> Iterator[list[Any]]:
        """Yield the pages of a list, or of a search, to its end."""
        after, asked, again = None, set(), 0
        while True:
            page = {"size": PAGE} | ({"after": after} if after else {})
            document = self.fetch(path, query, page, search)
            following = find_cursor(document)
            if following in asked:  # it would lead back: ask once more for this page
                again += 1
                if again == TRIES:
                    raise click.ClickException("Persona sends the same page again and again")
                pause(2.0 ** (again - 1), "Persona sent a page that it had sent before")
                continue
            yield document["data"]
            if not following:
                return
            asked.add(following)
            after, again = following, 0

    def fetch(
        self, path: str, query: dict[str, str], page: dict[str, Any], search: Any = None
    ) -> dict[str, Any]:
        """GET a document whose data is a list, or POST a search; wait while that may help."""
        query = query | {f"page[{key}]": str(value) for key, value in page.items()}
        body = json.dumps({**search, "page": page}).encode() if search else None
        number = 0
        while True:
            pause(self.free_at - time.monotonic(), "few requests are left in this minute")
            try:
                return self.ask(path, query, body)
            except PassingError as fault:
                number += 1
                if number == TRIES:
                    raise click.ClickException(f"{self.url}: {fault}, {TRIES} times") from None
                pause(fault.seconds or 2.0 ** (number - 1), f"{self.url}: {fault}")

    def ask(self, path: str, query: dict[str, str], body: bytes | None) -> dict[str, Any]:
        """Send one request; raise PassingError, or ClickException when no waiting helps."""
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        headers = {"Authorization": f"Bearer {self.key}", "User-Agent": f"kyc/{kyc.VERSION}"}
        request = urllib.request.Request(url, body, headers | {"Content-Type": "application/json"})
        try:
            with self.opener.open(request, timeout=ANSWER_SECONDS) as answer:
                document = json.loads(answer.read())
                self.heed(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                raise self.explain(error, "page[after]" in query) from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            raise PassingError(cli.printable(cause) or type(cause).__name__) from None
        except (ValueError, RecursionError):
            raise PassingError("its answer is not JSON") from None
        if not isinstance(kyc.field(document, "data"), list):
            raise PassingError("its answer holds no list")
        return document

    def heed(self, headers: Message) -> None:
        """Leave the last tenth of the requests that a minute allows to the team's own app."""
        names = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
        limit, left, seconds = (read_number(headers, name) for name in names)
        if left is not None and seconds is not None and left <= (limit or 0) // 10:
            self.free_at = time.monotonic() + min(seconds, LONGEST_PAUSE)

    def explain(self, error: urllib.error.HTTPError, has_cursor: bool) -> Exception:
        """Return what to raise for an answer that is no success."""
        status = f"{error.code}{self.read_reason(error)}"
        if error.code == 429:
            names = ("Retry-After", "RateLimit-Reset")
            waits = [read_number(error.headers, name) for name in names]
            seconds = max([0, *filter(None, waits)])
            return PassingError(status, min(seconds, LONGEST_PAUSE))
        if error.code >= 500:
            return PassingError(status)
        if error.code == 401:
            return click.ClickException(f"Persona does not accept PERSONA_API_KEY: {status}")
        if error.code == 403:
            return click.ClickException(f"PERSONA_API_KEY lacks a permission: {status}")
        if has_cursor and error.code in (400, 404):
            words = "Persona no longer knows the event after which the next page begins"
            return click.ClickException(
                f"{words}: {status}; what was fetched is kept, run it again"
            )
        return click.ClickException(f"{self.url} answers {status}")

    def read_reason(self, error: urllib.error.HTTPError) -> str:
        """Return what Persona says of an error, in brackets; the key, if it does, is cut out."""
        try:
            first = kyc.field(json.loads(error.read(100_000)), "errors")[0]
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
            return ""
        said = [kyc.text(kyc.field(first, name)) for name in ("title", "details")]
        words = ": ".join(filter(None, said)).replace(self.key, "***")
        return f" ({cli.printable(words)[:300]})" if words else ""


def read_key() -> str:
    """Return the API key; raise ClickException, which never quotes it."""
    key, path = os.environ.get("PERSONA_API_KEY", ""), os.environ.get("PERSONA_API_KEY_FILE")
    if path is not None:
        if key:
            raise click.ClickException("PERSONA_API_KEY and PERSONA_API_KEY_FILE are both set")
        try:
            key = Path(path).read_bytes()[:10_000].decode(errors="replace")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a path"
            raise click.ClickException(f"PERSONA_API_KEY_FILE cannot be read: {reason}") from None
    if not re.fullmatch(r"[!-~]+", key := key.strip()):
        where = "PERSONA_API_KEY" if path is None else "the file of PERSONA_API_KEY_FILE"
        raise click.ClickException(f"{where} must hold an API key, as Persona's dashboard shows it")
    return key


def read_number(headers: Message, name: str) -> int | None:
    """Return the whole number in a header, if there is one."""
    value = headers.get(name) or ""
    return int(value) if re.fullmatch(r"[0-9]{1,9}", value) else None


def find_cursor(document: dict[str, Any]) -> str | None:
    """Return after what the next page begins, None at the end: all that is taken from a link."""
    link = kyc.text(kyc.field(kyc.field(document, "links"), "next"))
    if not link:
        return None
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(link).query)
    if "page[after]" in query:
        return query["page[after]"][0]
    return kyc.text(kyc.field(document["data"][-1], "id")) if document["data"] else None


def pause(seconds: float, why: str) -> None:
    """Say why, and wait."""
    if seconds > 0:
        click.echo(f"{why}; waiting {seconds:.0f} s", err=True)
        time.sleep(seconds)
