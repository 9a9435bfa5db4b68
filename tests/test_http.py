"""The HTTP contract: status codes and bodies of every answer."""

from conftest import build


def test_new_event_is_received(send):
    answer = send("inquiry.approved")
    assert (answer.status_code, answer.json) == (200, {"received": True})
    assert answer.content_type == "application/json"


def test_path_of_the_quickstart_is_served(send):
    assert send("inquiry.approved", path="/webhook").status_code == 200


def test_duplicate_is_stored_once(send, db):
    body = build("inquiry.approved")
    send(body)
    answer = send(body)
    assert (answer.status_code, answer.json) == (200, {"received": True, "duplicate": True})
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 1
