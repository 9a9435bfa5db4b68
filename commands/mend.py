"""`flask replay` and `flask rebuild`: run handlers again, compute the projections again."""

import contextlib
import fnmatch
import json
import sqlite3
from collections.abc import Iterator

import click

import app as kyc
import commands as cli

# flask replay

FAILED = """
    SELECT f.event_id, e.body IS NOT NULL FROM failed_events AS f
    JOIN events AS e USING (event_id) ORDER BY position
"""
PAST = """
    SELECT event_id FROM events
    WHERE name IN (SELECT value FROM json_each(:names)) AND body IS NOT NULL
        AND (:since IS NULL OR created_at >= :since) AND (:until IS NULL OR created_at < :until)
    ORDER BY rowid
"""
REOPEN = "UPDATE events SET state = 'pending' WHERE event_id = ?"
DISMISS = """
    UPDATE events SET state = 'processed', error = ? || COALESCE(' (was: ' || error || ')', '')
    WHERE event_id = ? AND state IN ('failed', 'pending')
"""


@cli.command
@click.argument("event_ids", metavar="[EVENT_ID]...", nargs=-1)
@click.option("--name", help="All past events with this name, a glob, that have their body.")
@click.option("--since", type=cli.Moment(), help="With --name: created since; a time or an age.")
@click.option("--until", type=cli.Moment(), help="With --name: created before.")
@click.option("--dismiss", is_flag=True, help="Run nothing; count a failed EVENT_ID as processed.")
@cli.reason_option
@cli.by_option
@cli.yes_option
def replay(
    event_ids: tuple[str, ...], dismiss: bool, reason: str | None, by: str, yes: bool, **past: str
) -> None:
    """Run the handlers of failed and pending events again.

    Of all, or of EVENT_ID. With --name they run over the past, for a handler that was added
    later: all handlers of these events, so what they did before happens again unless they look
    whether it was done.

    Example: flask replay --name inquiry.approved --since 90d

    Example: flask replay --dismiss evt_2aBcDeFg --reason "a trial"
    """
    if (past["name"] and event_ids) or ((past["since"] or past["until"]) and not past["name"]):
        raise click.UsageError("give EVENT_IDs, or --name with --since and --until")
    if dismiss != bool(reason) or (dismiss and not event_ids):
        raise click.UsageError("--dismiss takes EVENT_IDs and --reason")
    with contextlib.closing(cli.open_database()) as db:
        if dismiss:
            dismiss_events(db, event_ids, f"dismissed by {by}: {reason}")
        elif past["name"]:
            replay_past(db, past, yes)
        else:
            replay_failed(db, event_ids)


def replay_failed(db: sqlite3.Connection, event_ids: tuple[str, ...]) -> None:
    """Replay these failed events; without any, all that still have their body."""
    failed = dict(map(tuple, db.execute(FAILED)))
    if unknown := [one for one in event_ids if one not in failed]:
        raise click.ClickException(cli.printable(f"{', '.join(unknown)}: not a failed event"))
    done = [replay_event(db, one) for one in event_ids or filter(failed.get, failed)]
    passed_over = len(failed) - len(done) if not event_ids else 0
    note = f", {passed_over} passed over: their bodies were removed" if passed_over else ""
    conclude(done, note)


def replay_past(db: sqlite3.Connection, past: dict[str, str], yes: bool) -> None:
    """Run the handlers over past events, whatever was done about them before."""
    names = [name for name in kyc.HANDLERS if fnmatch.fnmatchcase(name, past["name"])]
    if not names:
        raise click.ClickException(f"{past['name']}: handlers.py has no handler for it")
    event_ids = [row[0] for row in db.execute(PAST, {**past, "names": json.dumps(names)})]
    events = cli.plural(len(event_ids), "event")
    cli.confirm(f"Run all handlers of {events} again, with all that they did before?", yes)
    with cli.progress(event_ids, label="Replaying") as bar:
        conclude([replay_event(db, one, again=True) for one in bar])


def replay_event(db: sqlite3.Connection, event_id: str, again: bool = False) -> bool:
    """Run the handlers of one event in a transaction; tell whether it is processed.

    With `again` even if it was before; if that is interrupted, it is left as pending.
    """
    query = "SELECT body, received_at, state, error FROM events WHERE event_id = ?"
    body, received_at, *_ = db.execute(query, (event_id,)).fetchone()
    if body is not None:
        event = kyc.read_event(body.encode() if isinstance(body, str) else body, received_at)
        with cli.turn():
            if again:
                db.execute(REOPEN, (event_id,))
            kyc.dispatch(db, [kyc.Delivery(event)])
    *_, state, error = db.execute(query, (event_id,)).fetchone()
    why = "its body was removed, and with it what the handler needs" if body is None else error
    if state != "processed" or not again:
        click.echo(cli.printable(f"{event_id} {state}" + (f": {why}" if state == "failed" else "")))
    return state == "processed"


def conclude(done: list[bool], note: str = "") -> None:
    """Say how many events were processed; fail if not all."""
    click.echo(f"{done.count(True)} processed, {done.count(False)} failed{note}")
    if not all(done):
        raise click.exceptions.Exit(1)


def dismiss_events(db: sqlite3.Connection, event_ids: tuple[str, ...], words: str) -> None:
    """Count failed events as processed; their error tells who said so, and why."""
    with cli.writing(db):
        for event_id in event_ids:
            if not db.execute(DISMISS, (words, event_id)).rowcount:
                raise click.ClickException(cli.printable(f"{event_id}: not a failed event"))
    click.echo(f"{cli.plural(len(event_ids), 'event')} dismissed")


# flask rebuild


@cli.command
def rebuild() -> None:
    """Compute again from the journal where everybody stands.

    What differs is mended; the service keeps serving.

    Example: flask rebuild
    """
    changed = 0
    with contextlib.closing(cli.open_database()) as db:
        total = db.execute("SELECT COALESCE(max(rowid), 0) FROM events").fetchone()[0]
        with cli.progress(take_steps(db), label="Computing") as bar:
            for old, new in (change for changes in bar for change in changes):
                changed += 1
                if changed <= cli.SHOWN:
                    person = (old or new)["reference_id"]
                    both = f"{cli.standing(old)} -> {cli.standing(new)}"
                    click.echo(cli.printable(f"{person}: {both}"))
    if changed > cli.SHOWN:
        click.echo(f"and {changed - cli.SHOWN:,} more")
    people = cli.plural(changed, "person", "people")
    click.echo(f"{cli.plural(total, 'event')}, {people} changed")


def take_steps(db: sqlite3.Connection) -> Iterator[list[kyc.Change]]:
    """Yield the changes of each step of a rebuild, taken in turn with the service."""
    steps = kyc.rebuild(db)
    while True:
        with cli.turn():
            changes = next(steps, None)
        if changes is None:
            return
        yield changes
