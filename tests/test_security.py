"""No SQL is built from what somebody sent: what the source contains, and what hostile IDs do."""

import ast
import re

import pytest
from conftest import ROOT, build

FOLDERS = ("commands", "dashboard")
SOURCES = [ROOT / "app.py", *(path for name in FOLDERS for path in (ROOT / name).glob("*.py"))]
SQL = re.compile(r"\b(SELECT|INSERT|UPDATE|DELETE|PRAGMA|BEGIN|CREATE|ATTACH|VACUUM)\b")
NAMES = {  # that may stand in a statement: tables and columns that the source itself names, numbers
    *("table", "key", "view", "names", "values", "into", "identity", "sets", "old", "new"),
    *("mode", "int(BUSY_SECONDS * 1000)", "SCHEMA"),
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_sql_is_put_together_of_names_in_the_source_alone(source):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.JoinedStr) and any(map(is_sql, node.values)):
            inserted = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
            assert {ast.unparse(value) for value in inserted} <= NAMES
        assert not (isinstance(node, ast.BinOp) and any(map(is_sql, operands(node))))


def is_sql(node):
    """Tell whether a node of the source is text of a statement."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and SQL.search(node.value)


def operands(node):
    """Return what a chain of additions adds."""
    left = operands(node.left) if isinstance(node.left, ast.BinOp) else [node.left]
    return [*left, node.right]


@pytest.mark.parametrize(
    "hostile", ["'); DROP TABLE events;--", '" OR 1=1 --', "%", "_", "?1", ":event_id", "\\'"]
)
def test_hostile_ids_are_only_text(send, db, hostile):
    ids = dict.fromkeys(("inquiry_id", "account_id", "reference_id"), hostile)
    assert send("inquiry.approved", reference_id="user-1").status_code == 200
    for name in ("approved", hostile, "redacted"):
        body = build(f"inquiry.{name}", event_id=f"evt_{name}{hostile}", **ids)
        assert send(body).json == {"received": True}
    query = "SELECT reference_id, status FROM kyc_status ORDER BY inquiry_id = ?"
    people = [tuple(row) for row in db.execute(query, [hostile])]
    assert people == [("user-1", "approved"), (hostile, "approved")]
    kept = db.execute("SELECT reference_id FROM events WHERE body IS NOT NULL").fetchall()
    assert [row[0] for row in kept] == ["user-1"]
