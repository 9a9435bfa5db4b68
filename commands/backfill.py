"""`flask backfill`: fetch from Persona's API the events that were missed."""

import contextlib
import fnmatch
import json
import re
import sqlite3
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import click

import app as kyc
import commands as cli
from commands.persona import Persona

ALL = "all that Persona keeps"
AT_ONCE = 10  # events whose handlers run in one turn: deliveries wait meanwhile

IS_KEPT = """  -- by default
    SELECT :name LIKE '%.redacted' OR EXISTS (SELECT 1 FROM status_rules WHERE name = :name)
        OR EXISTS (SELECT 1 FROM hold_rules WHERE :name LIKE name OR :name LIKE cleared_by)
"""
KNOWN = "SELECT event_id FROM events WHERE event_id IN (:keys)"
BODILESS = f"{KNOWN} AND body IS NULL"
STANDINGS = "SELECT reference_id, status, hold FROM kyc_status WHERE reference_id IN (:keys)"
READ_EVENT = "SELECT body, received_at FROM events WHERE event_id = ?"


@dataclass
class Tally:
    """What was asked for, and what became of the events that were fetched."""

    since: str
    names: tuple[str, ...]
    dry_run: bool
    fetched: int = 0
    known: int = 0
    oldest: str = field(default_factory=kyc.utc_now)
    end: str = "ended early"
    new: Counter[str] = field(default_factory=Counter)  # by name
    passed_over: Counter[str] = field(default_factory=Counter)  # by name
    changes: dict[str, list[str]] = field(default_factory=dict)  # person -> standing before, after
    waiting: list[kyc.Delivery | str] = field(default_factory=list)  # for handlers, newest first
    handled: Counter[str] = field(default_factory=Counter)  # by outcome


@cli.command
@click.option("--since", type=cli.Moment(), help="Created since.  [default: all]")
@click.option("--name", "names", multiple=True, help="Keep these, a glob; again for more.")
@click.option("--no-handlers", is_flag=True, help="Leave the handlers to flask replay.")
@click.option("--dry-run", is_flag=True, help="Keep nothing; only say what is missing.")
def backfill(since: str | None, names: tuple[str, ...], no_handlers: bool, dry_run: bool) -> None:
    """Fetch from Persona the events that were missed.

    From the newest back to --since, or as far as Persona keeps them. Kept are those that set a
    status, raise or clear a hold, redact, have a handler, or name an account's reference ID, for
    it says who the person is; with --name others. At the end their handlers run, the oldest event
    first. It can be ended at any time and run again.

    PERSONA_API_KEY holds the key of the environment, or PERSONA_API_KEY_FILE names a file that
    does. Examples:

    flask backfill --since 3d

    flask backfill --name 'verification.*' --dry-run
    """
    cli.open_database(readonly=dry_run).close()  # before anything is fetched
    tally = Tally(since or "", names, dry_run)
    try:
        fetch(Persona(), tally)
        if not no_handlers:
            run_handlers(tally)
        if not dry_run:  # what redactions have removed goes from the WAL, too
            with contextlib.closing(cli.open_database()) as db:
                cli.empty_wal(db)
    finally:
        if tally.fetched or tally.end != "ended early":
            report(tally)
    if tally.handled[kyc.FAILED]:
        raise click.exceptions.Exit(1)


def fetch(api: Persona, tally: Tally) -> None:
    """Keep what is wanted of Persona's events, page by page, back to where they are asked for."""
    plain = all(re.fullmatch(r"[\w./-]+", name) for name in tally.names)
    query = {"filter[name]": ",".join(tally.names)} if plain and tally.names else {}
    for page in api.walk("/events", query):
        deliveries = [read_item(item) for item in page]
        receive([one for one in deliveries if one.event.created_at >= tally.since], tally)
        if sys.stderr.isatty():
            words = f"{tally.fetched:,} fetched, back to {cli.format_minute(tally.oldest)} UTC"
            click.echo(f"\r{words}\033[K", err=True, nl=False)
        if deliveries and deliveries[-1].event.created_at < tally.since:
            tally.end = "as asked"
            return
    tally.end = ALL


def read_item(item: Any) -> kyc.Delivery:
    """Return an event as if it were delivered; its bytes are ours."""
    now, body = kyc.utc_now(), json.dumps({"data": item}).encode()
    return kyc.Delivery(kyc.read_event(body, now), body, now, source="api")


def receive(deliveries: list[kyc.Delivery], tally: Tally) -> None:
    """Keep those of a page that are wanted."""
    tally.fetched += len(deliveries)
    tally.oldest = min([tally.oldest, *(one.event.created_at for one in deliveries)])
    with contextlib.closing(cli.open_database(readonly=tally.dry_run)) as db:
        wanted = [one for one in deliveries if is_wanted(db, one.event, tally.names)]
        tally.passed_over.update(one.event.name for one in deliveries)
        tally.passed_over.subtract(one.event.name for one in wanted)
        if tally.dry_run:
            count(db, wanted, tally)
        else:
            store(db, wanted[::-1], tally)


def is_wanted(db: sqlite3.Connection, event: kyc.Event, names: tuple[str, ...]) -> bool:
    """Tell whether an event is to be kept."""
    if event.name == kyc.UNRECOGNIZED:
        return False
    if names:
        return any(fnmatch.fnmatchcase(event.name, name) for name in names)
    if event.name in kyc.HANDLERS or (event.object_type == "account" and event.reference_id):
        return True
    return bool(db.execute(IS_KEPT, {"name": event.name}).fetchone()[0])


def count(db: sqlite3.Connection, deliveries: list[kyc.Delivery], tally: Tally) -> None:
    """Count which of the events are in the journal, and which are not."""
    found = kyc.select(db, KNOWN, [one.event.event_id for one in deliveries])
    known = {row[0] for row in found}
    tally.known += len(known)
    tally.new.update(one.event.name for one in deliveries if one.event.event_id not in known)


def store(db: sqlite3.Connection, deliveries: list[kyc.Delivery], tally: Tally) -> None:
    """Journal and project events as the service does, in one transaction; note what changed.

    Those of somebody redacted lose their body at once: these wait for their handlers in memory.
    """
    events = [one.event for one in deliveries]
    with cli.writing(db):
        count(db, deliveries, tally)
        before = read_standings(db, events)
        outcomes = kyc.store(db, deliveries)
        after = read_standings(db, events)
        bodiless = {row[0] for row in kyc.select(db, BODILESS, [one.event_id for one in events])}
    for person in before | after:
        old, new = (rows.get(person, cli.standing(None)) for rows in (before, after))
        if old != new:
            tally.changes.setdefault(person, [old, new])[1] = new
    tally.waiting += [
        one if one.event.event_id in bodiless else one.event.event_id
        for one, outcome in zip(deliveries[::-1], outcomes[::-1], strict=True)
        if outcome is None
    ]


def read_standings(db: sqlite3.Connection, events: list[kyc.Event]) -> dict[str, str]:
    """Return where the people stand whom these events concern."""
    people: set[str] = set()
    for one in events:
        keys = {"inquiry": one.inquiry_id, "account": one.account_id, "reference": one.reference_id}
        people |= {row[0] for row in db.execute(kyc.FIND_PEOPLE, keys) if row[0]}
    rows = kyc.select(db, STANDINGS, people)
    return {row["reference_id"]: cli.standing(row) for row in rows}


def run_handlers(tally: Tally) -> None:
    """Run the handlers of the events that wait for them, a few in each turn, the oldest first."""
    if not tally.waiting:
        return
    with (
        contextlib.closing(cli.open_database()) as db,
        cli.progress(length=len(tally.waiting), label="Running handlers") as bar,
    ):
        while tally.waiting:
            some = [read_again(db, one) for one in tally.waiting[: -AT_ONCE - 1 : -1]]
            with cli.turn():
                kyc.dispatch(db, list(filter(None, some)))
            tally.handled.update(one.outcome for one in some if one)
            del tally.waiting[-AT_ONCE:]
            bar.update(len(some))


def read_again(db: sqlite3.Connection, waiting: kyc.Delivery | str) -> kyc.Delivery | None:
    """Return an event for its handlers, by its ID from the journal.

    None if its body was removed meanwhile: it stays as it is.
    """
    if isinstance(waiting, kyc.Delivery):
        return waiting
    row = db.execute(READ_EVENT, (waiting,)).fetchone()
    if row["body"] is None:
        return None
    body = row["body"].encode() if isinstance(row["body"], str) else row["body"]
    return kyc.Delivery(kyc.read_event(body, row["received_at"]))


def report(tally: Tally) -> None:
    """Say how far back it went, what was new, what changed, and what is left to do."""
    if sys.stderr.isatty():
        click.echo(err=True)
    fetched = cli.plural(tally.fetched, "event")
    click.echo(f"{fetched} fetched, back to {cli.format_minute(tally.oldest)} UTC: {tally.end}")
    word = "missing" if tally.dry_run else "new"
    click.echo(f"  {tally.new.total():,} {word}{cli.format_counts(tally.new)}")
    click.echo(f"  {tally.known:,} already there")
    click.echo(f"  {tally.passed_over.total():,} passed over{cli.format_counts(tally.passed_over)}")
    if not tally.dry_run:
        report_effects(tally)
    if tally.end == ALL and tally.oldest > tally.since > "":
        click.echo("Persona has no older events; for what was missed before them: flask reconcile")


def report_effects(tally: Tally) -> None:
    """Say whose standing changed, and what the handlers did."""
    cli.show_changes(tally.changes)
    if ran := tally.handled.total():
        failed = tally.handled[kyc.FAILED]
        click.echo(f"handlers ran for {cli.plural(ran, 'event')}, {failed} failed")
    if tally.waiting:
        waiting = cli.plural(len(tally.waiting), "event")
        click.echo(f"{waiting} left without their handlers: run this again, or flask replay")
