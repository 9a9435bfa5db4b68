"""The names of Persona's events, to doubt the others (page "Events")."""

import difflib
import re

EVENT_NAMES = """
account: added-relation archived consolidated consolidated-with created redacted removed-relation
    restored status-updated tag-added tag-removed updated-fields updated-tags
case: assigned created exported queue-updated redacted reopened resolved sla-expired
    status-updated updated-fields updated-tags
document: created errored extracted pending processed submitted
graph-query: cancelled completed errored reran timed-out
importer-pipeline-run: canceled completed errored paused resumed started
inquiry: approved completed created declined expired failed marked-for-review redacted
    reusable-persona-created reusable-persona-used started transitioned updated-tags
inquiry-session: canceled expired started
selfie: created errored processed submitted
transaction: added-relation created labeled redacted removed-relation
    sentinel-session-processed status-updated updated-fields
transaction-type: deleted-field
verification: canceled created escalated failed passed requires-retry skipped submitted
    tentatively-failed tentatively-passed updated-tags
workflow-run: created errored resumed
kyc: held released
test: ping
"""  # the last are of `flask hold`, and for trials; of reports there are too many kinds
REPORT_EVENTS = "dismissed errored matched ready submitted"


def doubt_name(name: str) -> str | None:
    """Return a warning when Persona is not known to send events of this name; else None."""
    kind = name.rpartition(".")[0]
    reports = f"\n{kind}: {REPORT_EVENTS}" if re.fullmatch(r"report/[a-z-]+", kind) else ""
    known = []
    for family in re.split(r"\n(?=\S)", EVENT_NAMES.strip() + reports):
        kind, *happenings = family.split()
        known += [f"{kind[:-1]}.{happening}" for happening in happenings]
    if name in known or "%" in name:  # a hold rule may name a pattern
        return None
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"Persona is not known to send {name}{hint}"
