"""Power cuts: after one at any moment, every event acknowledged before it is there.

recorder.c records what the server writes, syncs and answers. The files are then rebuilt as
a disk may hold them after a cut: all that was synced, and of the rest a random part, torn
at sectors of 512 bytes. The name of a file lasts when its folder was synced.

LONG=1 tries 2,000 cuts instead of 200.
"""

import bisect
import contextlib
import functools
import itertools
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
from conftest import LONG, Load, build, build_library

CUTS = 1000 if LONG else 100  # with one worker, and with two
EVENTS = 1500 if LONG else 800
LOAD_SECONDS = 120  # at most, until so many events are accepted
SECTOR = 512
DATABASE, WAL, DIRECTORY = 1, 2, 3
RECORD = struct.Struct("<cb2xIQqQ")

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="the recorder needs gcc")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_acknowledged_events_survive_a_power_cut(recorded, tmp_path, workers):
    log, accepted = recorded(workers, EVENTS)
    assert {record.data.decode() for record in log if record.kind == "A"} == set(accepted)
    assert count(log, "W", DATABASE) > 100  # checkpoints are part of it
    assert count(log, "T", WAL) + count(log, "U", WAL) >= 2  # so are new and emptied WALs,
    assert count_kept_wals(log) >= 1  # and one that was begun anew in the file that was there
    assert find_damage(log, CUTS, accepted, tmp_path) == []


def test_a_missing_sync_would_be_found_out(recorded, tmp_path):
    log, accepted = recorded("1", 200)
    for name in (DATABASE, WAL, DIRECTORY):
        unsynced = [record for record in log if (record.kind, record.name) != ("S", name)]
        assert len(unsynced) < len(log)
        assert any("lost" in found for found in find_damage(unsynced, 40, accepted, tmp_path))


# Recording


class Record(NamedTuple):
    """One operation of the server."""

    kind: str  # see recorder.c
    name: int
    thread: int
    inode: int
    offset: int
    data: bytes


@pytest.fixture(scope="session")
def recorder(tmp_path_factory):
    """The recorder, built."""
    return build_library("recorder.c", tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def recorded(recorder, serve, environ, tmp_path):
    """Run the server under load; return what it did, and what it accepted."""

    def recorded(workers, events):
        database = (tmp_path / "disk").resolve() / "kyc.db"
        database.parent.mkdir()
        path = tmp_path / "recorder.log"
        preload = {
            "LD_PRELOAD": str(recorder),
            "RECORDER_LOG": str(path),
            "RECORDER_DATABASE": str(database),
        }
        variables = {**preload, "KYC_DATABASE": str(database)}
        server = serve("--workers", workers, **variables)
        accepted = load(server, "a", events // 2)
        checkpoint(database, preload)
        os.kill(server.process.pid, signal.SIGHUP)
        accepted |= load(server, "b", events // 4)
        server.stop()
        server = serve("--workers", workers, **variables)
        between = functools.partial(empty_wal, server, database, preload)
        accepted |= load(server, "c", events // 4, between)
        server.stop()
        return read_log(path), accepted

    return recorded


def load(server, prefix, events, between=lambda: time.sleep(0.05)):
    """Send events, small and large; return those that were accepted."""
    port = server.port
    deadline = time.monotonic() + LOAD_SECONDS
    with (
        Load(port, 6, prefix + "s", padding=500) as small,
        Load(port, 2, prefix + "l", padding=30_000) as large,
    ):
        while len(small.accepted) + len(large.accepted) < events:
            assert time.monotonic() < deadline, server.log.read_text()[-1000:]
            between()
    return small.accepted | large.accepted


def checkpoint(database, preload):
    """Let another process copy the WAL into the database."""
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('PRAGMA wal_checkpoint')"
    command = [sys.executable, "-c", code, database]
    subprocess.run(command, check=True, env={**os.environ, **preload}, timeout=30)


def empty_wal(server, database, preload):
    """Let the server empty the WAL, as after a redaction, and then another process copy it."""
    assert server.send(build("inquiry.redacted"))[0] == 200
    checkpoint(database, preload)
    time.sleep(0.1)


def read_log(path):
    """Return the records of a log."""
    content, log, position = path.read_bytes(), [], 0
    while position < len(content):
        kind, name, thread, inode, offset, length = RECORD.unpack_from(content, position)
        position += RECORD.size
        data = content[position : position + length]
        log.append(Record(kind.decode(), name, thread, inode, offset, data))
        position += length
    assert position == len(content)
    assert not [record for record in log if record.kind == "X"]  # what is not modelled here
    return log


def count(log, kind, name):
    """Return how many records there are of a kind for a file."""
    return sum(record.kind == kind and record.name == name for record in log)


def count_kept_wals(log):
    """Return how often the WAL was begun anew over what its file held."""
    size = kept = 0
    for record in log:
        if record.name == WAL and record.kind in "TU":
            size = 0
        elif record.name == WAL and record.kind == "W":
            kept += record.offset == 0 and size > 0
            size = max(size, record.offset + len(record.data))
    return kept


# The disk


class File:
    """A file: what is on the disk for certain, and the operations that may be."""

    def __init__(self):
        self.content = bytearray()
        self.pending = []  # (index in the log, record)

    def sync(self, before):
        """Make certain what was done before an index of the log."""
        certain = bisect.bisect_left(self.pending, before, key=lambda item: item[0])
        for _, record in self.pending[:certain]:
            apply(self.content, record)
        del self.pending[:certain]

    def guess(self, chance):
        """Return the content after a cut."""
        content = bytearray(self.content)
        likely = chance.choice([0, 0.2, 0.5, 0.9, 1])
        torn = chance.random() < 0.5
        for _, record in self.pending:
            if torn and record.kind == "W":
                for part in sectors(record):
                    if chance.random() < likely:
                        apply(content, part)
            elif chance.random() < likely:
                apply(content, record)
        return content


def apply(content, record):
    """Do one write or truncate to the content of a file."""
    if record.kind == "T":
        del content[record.offset :]
        content.extend(bytes(record.offset - len(content)))
    else:
        content.extend(bytes(max(0, record.offset - len(content))))
        content[record.offset : record.offset + len(record.data)] = record.data


def sectors(record):
    """Return a write as one write per sector that it touches."""
    start, end = record.offset, record.offset + len(record.data)
    edges = [start, *range(start - start % SECTOR + SECTOR, end, SECTOR), end]
    return [
        record._replace(offset=low, data=record.data[low - start : high - start])
        for low, high in itertools.pairwise(edges)
    ]


class Disk:
    """A folder: its files, the names that last, and the changes of names that may."""

    def __init__(self):
        self.files = {}  # inode -> File
        self.names = {}  # what is open under a name now: name -> inode
        self.certain = {}  # name -> File
        self.pending = []  # (index in the log, name, File or None)
        self.syncs = {}  # (thread, inode) -> index in the log of the begin

    def do(self, index, record):
        """Follow one record."""
        key = record.thread, record.inode
        if record.kind == "B":
            self.syncs[key] = index
        elif record.kind == "S":
            self.sync(record, self.syncs.pop(key))
        elif record.kind == "U" and self.names.get(record.name) == record.inode:
            del self.names[record.name]
            self.pending.append((index, record.name, None))
        elif record.kind == "O" and record.name != DIRECTORY:
            if self.names.get(record.name) != record.inode:
                self.names[record.name] = record.inode
                self.files[record.inode] = File()
                self.pending.append((index, record.name, self.files[record.inode]))
        elif record.kind in "WT":
            self.files[record.inode].pending.append((index, record))

    def sync(self, record, before):
        """Make a file's content certain, or the folder's names."""
        if record.name != DIRECTORY:
            self.files[record.inode].sync(before)
            return
        certain = bisect.bisect_left(self.pending, before, key=lambda item: item[0])
        self.certain |= {name: file for _, name, file in self.pending[:certain]}
        del self.pending[:certain]

    def guess(self, chance):
        """Return the files after a cut: name -> content."""
        kept = self.pending[: chance.randint(0, len(self.pending))]
        names = self.certain | {name: file for _, name, file in kept}
        return {name: file.guess(chance) for name, file in names.items() if file}


# The cuts


def find_damage(log, cuts, accepted, tmp_path):
    """Cut the power at so many points; return what was wrong afterwards."""
    chance = random.Random(cuts)
    points = choose_points(log, cuts, chance)
    disk, promised, damage = Disk(), set(), []
    for index, record in enumerate(log):
        if index in points:
            folder = tmp_path / "cut"
            restore(disk.guess(chance), folder)
            if found := examine(folder / "kyc.db", promised, accepted):
                damage.append(f"cut before operation {index} of {len(log)}: {found}")
            shutil.rmtree(folder)
        if record.kind == "A":
            promised.add(record.data.decode())
        disk.do(index, record)
    print(f"{len(points)} cuts in {len(log)} operations, {len(promised)} answers: {damage[:2]}")
    return damage


def choose_points(log, cuts, chance):
    """Return where to cut: half of them anywhere, half of them just after an answer."""
    answers = [index + 1 for index, record in enumerate(log[:-1]) if record.kind == "A"]
    points = set(chance.sample(answers, min(len(answers), cuts // 2)))
    rest = [index for index in range(answers[0], len(log)) if index not in points]
    return points | set(chance.sample(rest, cuts - len(points)))


def restore(files, folder):
    """Write what a cut left to a folder."""
    folder.mkdir()
    for name, suffix in ((DATABASE, ""), (WAL, "-wal")):
        if name in files:
            (folder / f"kyc.db{suffix}").write_bytes(files[name])


def examine(database, promised, accepted):
    """Return what is wrong with the database after a cut, or None."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        try:
            check = db.execute("PRAGMA integrity_check").fetchone()[0]
            stored = dict(db.execute("SELECT event_id, CAST(body AS BLOB) FROM events"))
            people = {row[0] for row in db.execute("SELECT event_id FROM kyc_status")}
        except sqlite3.DatabaseError as error:
            return f"lost all of {len(promised)}: {error}"
    lost = [event_id for event_id in promised if stored.get(event_id) != accepted[event_id]]
    if check != "ok":
        return f"integrity_check says {check}"
    if unprojected := promised - people - set(lost):
        return f"{len(unprojected)} of {len(promised)} are not projected"
    return f"lost {len(lost)} of {len(promised)}" if lost else None
