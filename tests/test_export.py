"""flask export."""

import csv
import io
import json
import tracemalloc

import pytest


@pytest.fixture
def filled(send, runner):
    """A person with two events, and another who was redacted."""
    send("inquiry.completed", inquiry_id="inq_1", reference_id="user-1")
    send("inquiry.approved", inquiry_id="inq_1", reference_id="user-1")
    send("inquiry.approved", inquiry_id="inq_2", reference_id="user-2")
    assert runner("redact", "user-2", "--yes", "--reason", "asked for").exit_code == 0


@pytest.mark.parametrize("kind", ["people", "events", "redactions"])
def test_both_forms_hold_every_row(kind, filled, runner, db):
    table = {"people": "kyc_status"}.get(kind, kind)
    wanted = [dict(row) for row in db.execute(f"SELECT * FROM {table}")]  # noqa: S608
    lines = [json.loads(line) for line in runner("export", kind, "--jsonl").output.splitlines()]
    assert len(lines) == len(wanted) > 0
    for line, row in zip(lines, wanted, strict=True):
        assert "body" not in line
        assert {**line, "position": None} == {
            **{name: value for name, value in row.items() if name not in ("body", "rowid")},
            "position": None,
        }
    rows = list(csv.DictReader(io.StringIO(runner("export", kind).output)))
    assert [list(row.values()) for row in rows] == [
        ["" if value is None else str(value) for value in line.values()] for line in lines
    ]


def test_bodies_never_leave(send, runner, filled, db):
    for kind in ("people", "events", "redactions"):
        assert "Jane" not in runner("export", kind, "--jsonl").output
    assert "Jane" in str(db.execute("SELECT body FROM events ORDER BY rowid").fetchone()[0])


def test_without_rows_csv_has_its_head(runner):
    assert runner("export", "people").output.startswith("reference_id,status,hold,")
    assert runner("export", "people", "--jsonl").output == ""


def test_a_spreadsheet_runs_nothing(send, runner):
    for reference_id in ('=HYPERLINK("http://x")', "+1", "-1", "@a", "plain-1"):
        send("inquiry.approved", reference_id=reference_id)
    rows = list(csv.DictReader(io.StringIO(runner("export", "people").output)))
    assert [row["reference_id"][0] for row in rows] == ["'", "'", "'", "'", "p"]
    lines = runner("export", "people", "--jsonl").output.splitlines()
    assert json.loads(lines[0])["reference_id"] == "+1"


def test_output_goes_to_a_private_file_as_a_whole(filled, runner, tmp_path, monkeypatch):
    path = tmp_path / "people.csv"
    for left_over in (path, tmp_path / "people.csv.part"):
        left_over.write_text("older")
    assert runner("export", "people", "--output", str(path)).output == ""
    assert path.read_text() == runner("export", "people").output
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr("commands.export.read_rows", lambda *_: iter([1]))
    runner("export", "people", "--output", str(path))
    assert path.read_text().startswith("reference_id")
    assert [one.name for one in tmp_path.iterdir() if "part" in one.name] == []


def test_a_folder_that_is_not_there_is_one_line(runner, db, tmp_path):
    result = runner("export", "people", "--output", str(tmp_path / "none" / "people.csv"))
    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path}/none/people.csv: No such file or directory\n"


def test_many_rows_take_little_memory(runner, db, tmp_path):
    db.execute(
        """
        WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 30000)
        INSERT INTO kyc_status
        SELECT 'user-' || n, 'approved', NULL, 'inq', NULL, NULL, 'evt', 'inquiry.approved', '', ''
        FROM n
        """
    )
    path = tmp_path / "people.csv"
    tracemalloc.start()
    assert runner("export", "people", "--output", str(path)).exit_code == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6_000_000
    with path.open() as file:
        assert sum(1 for _ in file) == 30001
