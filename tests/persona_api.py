"""A stand-in for Persona's API, as far as the published OpenAPI description goes.

Events newest first, inquiries by list and search, pages by cursor with relative links, limits on
sizes, the RateLimit headers, and errors. Tests add faults, each for one request, in order.
"""

import contextlib
import http.server
import json
import threading
import time
import urllib.parse

KEY = "persona_sandbox_0123456789abcdef"
SEARCHABLE = {"status", "created_at", "updated_at", "reference_id", "inquiry_template_id"}
OPERATORS = {
    "eq": lambda a, b: a == b,
    **{"gt": lambda a, b: a > b, "gte": lambda a, b: a >= b},
    **{"lt": lambda a, b: a < b, "lte": lambda a, b: a <= b},
}


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(self, status, title, details=""):
        self.status, self.title, self.details = status, title, details


class PersonaApi:
    """What one environment holds, and a server that tells it."""

    def __init__(self):
        self.events = []  # in the order of their creation
        self.inquiries = {}
        self.faults = []  # functions that serve the next request instead; None serves it
        self.requests = []  # (method, path, query, body)
        self.forbidden = set()  # paths
        self.limit = 300
        self.before = lambda number: None  # called before each request is served
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), make_handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}/api/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def add(self, *documents):
        """Add events, given as the documents that a webhook would deliver."""
        self.events += [document["data"] for document in documents]

    def add_inquiry(self, inquiry_id, status="approved", at="2026-03-01T10:00:00.000Z", **more):
        """Add an inquiry, or change it."""
        attribute = {
            "pending": "started-at",
            "needs_review": "marked-for-review-at",
            **dict.fromkeys(("approved", "declined"), "decisioned-at"),
        }.get(status, f"{status}-at")
        links = {
            "account": more.pop("account", None),
            "inquiry-template": more.pop("template", None),
        }
        self.inquiries[inquiry_id] = {
            "type": "inquiry",
            "id": inquiry_id,
            "attributes": {
                **{"status": status, "reference-id": None, "name-first": "Jane"},
                **{"created-at": at, "updated-at": at, attribute: at},
                **{key.replace("_", "-"): value for key, value in more.items()},
            },
            "relationships": {
                **{
                    kind: {"data": link and {"type": kind, "id": link}}
                    for kind, link in links.items()
                },
                "sessions": {"data": []},
            },
        }

    def answer(self, method, path, query, body):
        """Return the document that answers a request; raise ApiError."""
        if path in self.forbidden:
            raise ApiError(403, "Forbidden", "This API key lacks the permission")
        if (method, path) == ("GET", "/events"):
            return self.list_events(query)
        if (method, path) == ("GET", "/inquiries"):
            return self.list_inquiries(query)
        if (method, path) == ("POST", "/inquiries/search"):
            return self.search(query, body)
        raise ApiError(404, "Not found")

    def list_events(self, query):
        names = split(query.get("filter[name]"))
        found = [one for one in self.events if not names or one["attributes"]["name"] in names]
        return paginate("/api/v1/events", found[::-1], query)

    def list_inquiries(self, query):
        ids = split(query.get("filter[inquiry-id]"))
        if len(ids) > 100:
            raise ApiError(400, "Bad request", "too many inquiry IDs")
        found = [one for one in self.inquiries.values() if not ids or one["id"] in ids]
        found.sort(key=lambda one: one["attributes"]["created-at"], reverse=True)
        return paginate("/api/v1/inquiries", limit_fields(found, query), query)

    def search(self, query, body):
        search = json.loads(body)
        if search.keys() - {"query", "sort", "page"}:
            raise ApiError(422, "Unknown parameter")
        found = [one for one in self.inquiries.values() if matches(one, search.get("query"))]
        sort = search.get("sort", {"attribute": "created_at", "direction": "desc"})
        name = sort["attribute"].replace("_", "-")
        found.sort(key=lambda one: one["attributes"][name], reverse=sort["direction"] == "desc")
        query = {**{f"page[{key}]": str(v) for key, v in search.get("page", {}).items()}, **query}
        return paginate("/api/v1/inquiries/search", limit_fields(found, query), query)


def split(value):
    return value.split(",") if value else []


def matches(inquiry, clause, depth=0):
    """Tell whether an inquiry satisfies a query; two levels of nesting, as documented."""
    if clause is None:
        return True
    if depth > 2:
        raise ApiError(422, "Too deep")
    if "and" in clause:
        return all(matches(inquiry, one, depth + 1) for one in clause["and"])
    if "or" in clause:
        return any(matches(inquiry, one, depth + 1) for one in clause["or"])
    if "not" in clause:
        return not matches(inquiry, clause["not"], depth + 1)
    if clause["attribute"] not in SEARCHABLE or clause["operator"] not in OPERATORS:
        raise ApiError(422, "Unknown attribute or operator")
    value = inquiry["attributes"].get(clause["attribute"].replace("_", "-"))
    return value is not None and OPERATORS[clause["operator"]](value, clause["value"])


def limit_fields(inquiries, query):
    """Return the inquiries with those attributes only that fields[inquiry] asks for."""
    wanted = split(query.get("fields[inquiry]"))
    return [
        {
            **one,
            "attributes": {k: v for k, v in one["attributes"].items() if not wanted or k in wanted},
        }
        for one in inquiries
    ]


def paginate(path, items, query):
    """Return a page and the links to its neighbours; other parameters are not in the links."""
    size = query.get("page[size]", "10")
    if not size.isdigit() or not 1 <= int(size) <= 100:
        raise ApiError(400, "Bad request", "page[size] must be between 1 and 100")
    start = 0
    if after := query.get("page[after]"):
        ids = [item["id"] for item in items]
        if after not in ids:
            raise ApiError(404, "Record not found")
        start = ids.index(after) + 1
    page = items[start : start + int(size)]

    def link(cursor, item):
        return f"{path}?" + urllib.parse.urlencode({f"page[{cursor}]": item["id"]})

    more = start + len(page) < len(items)
    return {
        "data": page,
        "links": {
            "prev": link("before", page[0]) if page and start else None,
            "next": link("after", page[-1]) if more else None,
        },
    }


def make_handler(api):
    class Handler(http.server.BaseHTTPRequestHandler):
        def serve(self):
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            path = url.path.removeprefix("/api/v1")
            api.requests.append((self.command, path, query, body))
            api.before(len(api.requests))
            with contextlib.suppress(ConnectionError):
                fault = api.faults.pop(0) if api.faults else None
                if fault is None or fault(self) is None:
                    self.reply(path, query, body)

        do_GET = do_POST = serve  # noqa: N815

        def reply(self, path, query, body):
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                return self.send(401, {"errors": [{"title": "Unauthorized", "details": "bad key"}]})
            try:
                return self.send(200, api.answer(self.command, path, query, body))
            except ApiError as error:
                errors = [{"title": error.title, "details": error.details}]
                return self.send(error.status, {"errors": errors})

        def send(self, status, document, **headers):
            content = document if isinstance(document, bytes) else json.dumps(document).encode()
            left = max(api.limit - len(api.requests), 0)
            limits = {"RateLimit_Limit": api.limit, "RateLimit_Remaining": left}
            self.send_response(status)
            for name, value in {**limits, "RateLimit_Reset": 53, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return True

        def log_message(self, *_):
            pass

    return Handler


# Faults, each for one request


def status(code, title="It failed", details="", **headers):
    """Answer with an error."""
    errors = {"errors": [{"title": title, "details": details}]}
    return lambda handler: handler.send(code, errors, **headers)


def content(body):
    """Answer 200 with these bytes."""
    return lambda handler: handler.send(200, body)


def silence(seconds):
    """Answer nothing for so long, then close."""
    return lambda handler: time.sleep(seconds) or True


def hang_up(handler):
    """Close the connection in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"data": [')
    return True


def serve(monkeypatch):
    """Yield a stand-in to which the environment points; waits are noted, not waited."""
    api = PersonaApi()
    for name, value in (("URL", api.url), ("KEY", KEY)):
        monkeypatch.setenv(f"PERSONA_API_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    api.pauses = []
    note = lambda seconds, why: api.pauses.append(seconds) if seconds > 0 else None  # noqa: E731
    monkeypatch.setattr("commands.persona.pause", note)
    yield api
    api.stop()
