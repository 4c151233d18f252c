"""One thread alone: the verbs beside the limit that SQLite sets.

The limit ("raw") is the same statements on the same schema with the same pragmas, run on apsw by
one thread, autocommit, drained: no lock, no look at the file's identity, no doorbell, no Python
around it.
"""

import os
import tempfile

from bench_rows import Aim, Part, Plan, beside, each
from bench_sides import in_turns, ours, raw

import sqlspace

VERBS = ("push", "pull", "claim", "ack")
ROUNDS = ("push", "pull", "push", "claim", "ack")
MANY = ("push_many", "pull_many")


def alone(plan: Plan) -> list[Part]:
    """Each verb beside the raw statements."""
    part = Part("One thread, 100 bytes", "× raw's speed", "sqlspace, µs", "raw, µs")
    for sync, times, bound in ((False, plan.times, 0.8), (True, plan.fsyncs, 0.95)):
        with tempfile.TemporaryDirectory(dir=plan.folder) as place:
            path = os.path.join(place, "ours.db")
            with sqlspace.open(path, sync=sync, history=None) as store:
                sides = {"raw": raw(os.path.join(place, "raw.db"), sync), "sqlspace": ours(store)}
                found = in_turns(sides, ROUNDS, plan.rounds, times)
                plan.step()
                if not sync:
                    found |= in_turns(sides, MANY, plan.rounds, times)
                    plan.step()
        for verb in (*VERBS, *MANY):
            if (verb, "raw") not in found:
                continue
            limit, own = found[verb, "raw"], found[verb, "sqlspace"]
            aim = Aim("≥", 0.7 if verb in MANY else bound)
            what = f"{verb} of {times:,}, sync={sync}" if verb in MANY else f"{verb}, sync={sync}"
            row = beside(what, each(limit, own), own, limit, aim, short=True)
            part.rows.append(row)
    return [part]
