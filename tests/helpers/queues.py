"""Whether every rule of queues was kept; a part of `history`, which has collected what happened."""

import heapq
import itertools
from bisect import bisect_left
from collections import Counter, defaultdict

import leases

__all__ = ["NEVER", "Queues"]

NEVER = float("inf")


class Frontier:
    """Of some pairs (x, y): the greatest y of those whose x is less than a given one."""

    def __init__(self, pairs):
        ordered = sorted(pairs)
        self._xs = [x for x, _ in ordered]
        self._ys = list(itertools.accumulate((y for _, y in ordered), max))

    def before(self, x, default=(-NEVER, None)):
        at = bisect_left(self._xs, x)
        return self._ys[at - 1] if at else default


class Queues:
    """Judges what the history has collected."""

    def __init__(self, history):
        self.say, self.slack, self.evidence = history.say, history.slack, history.evidence
        self.ops, self.entries = history.ops, history.entries
        self.looks, self.empties, self.cuts = history.looks, history.empties, history.cuts
        self.by_seq = {}
        self.of_key = defaultdict(list)
        for entry in self.entries.values():
            self.of_key[entry.key].append(entry)
        for step in (
            self.judge_seqs,
            self.judge_looks,
            self.judge_order,
            self.judge_empties,
            self.judge_wipes,
            self.judge_dedupes,
            self.judge_times,
            self.judge_losses,
            self.judge_tombstones,
        ):
            step()

    def judge_seqs(self):
        """Each is of one entry, and they grow with the time."""
        given = Counter()
        ops = [
            (op, op.result if op.what == "push" else [op.result])
            for what in ("push", "put", "move")
            for op in self.ops[what]
            if op.done and op.result and not (op.what == "push" and "dedupe" in op.given[2])
        ]
        ops += [(op, [op.result[1]]) for op in self.ops["tx"] if op.done and op.result[1]]
        ops = [(op, [seq for seq in seqs if seq is not None]) for op, seqs in ops]
        ops = [(op, seqs) for op, seqs in ops if seqs]
        earlier = Frontier((op.ended, (max(seqs), op.began)) for op, seqs in ops)
        for op, seqs in ops:
            given.update(seqs)
            if seqs != sorted(seqs):
                self.say(f"{op.given[0]}: pushed together, with the seqs {seqs}")
            before, _ = earlier.before(op.began)
            if before > min(seqs):
                self.say(f"{op.given[0]}: seq {min(seqs)} was given after {before}")
        for seq, number in given.items():
            if number > 1:
                self.say(f"seq {seq} was given {number} times")
        for entry in self.entries.values():
            if entry.seq is None or (entry.dedupe is not None and not entry.seen):
                continue
            other = self.by_seq.setdefault(entry.seq, entry)
            if other is not entry and not given[entry.seq] > 1:
                self.say(f"seq {entry.seq} is of {other.payload} and of {entry.payload}")

    def judge_looks(self):
        """What came out was pushed, once, and is not seen again."""
        for entry in self.entries.values():
            takes = sorted(entry.takes, key=lambda op: op.ended)
            if entry.done is False and entry.seen:
                self.say(f"{entry.payload}: is there, though its push was refused or rolled back")
            if len(takes) > 1:
                self.say(f"{entry.payload}: taken {len(takes)} times")
            if takes and entry.live:
                self.say(f"{entry.payload}: taken, and still in the file")
        for looks in self.looks.values():
            for entry, began, ended, takes in looks:
                if ended < entry.began:
                    self.say(f"{entry.payload}: came out before it was pushed")
                if not takes and entry.takes and entry.takes[0].ended < began:
                    self.say(f"{entry.payload}: seen again after it was taken")

    def judge_order(self):
        """Nothing comes out while something stands ready that has its place before it."""
        for key, looks in self.looks.items():
            ahead = [each for each in self.of_key[key] if each.first is not None and not each.delay]
            by_seq = Frontier(
                (each.seq, (each.first, each.payload)) for each in ahead if each.seq is not None
            )
            by_time = Frontier((each.ended, (each.first, each.payload)) for each in ahead)
            for entry, _, ended, _ in looks:
                untouched, other = by_time.before(entry.began)
                if entry.seq is not None and untouched <= ended:
                    untouched, other = by_seq.before(entry.seq)
                if untouched > ended:
                    self.say(f"{key}: {entry.payload} came out before {other}")
        for op in self.ops["take"]:
            together = [self.entries.get(payload) for _, payload in (op.result or ())]
            seqs = [each.seq for each in together if each is not None and each.seq is not None]
            if seqs != sorted(seqs):
                self.say(f"{op.given[0]}: taken together, with the seqs {seqs}")

    def judge_empties(self):
        """Nobody is told that nothing is there, while something is that nobody else could have."""
        for key, empties in self.empties.items():
            standing = Frontier(
                (each.ready, (each.first, each.payload))
                for each in self.of_key[key]
                if each.first is not None
            )
            for began, ended in empties:
                untouched, payload = standing.before(began)
                if untouched > ended:
                    self.say(f"{key}: nothing was found there, and {payload} was")

    def judge_wipes(self):
        """What stood before a clear or a put is gone, and counted."""
        wipes = defaultdict(list)
        for what in ("clear", "put"):
            for op in self.ops[what]:
                if op.done is not False:
                    wipes[op.given[0]].append(op)
        self.last_wipe = {key: max(op.ended for op in ops) for key, ops in wipes.items()}
        for key, ops in wipes.items():
            # The earliest end of those that began after something: mirrored, for the Frontier.
            gone = Frontier((-op.began, (-op.ended, op.what)) for op in ops if op.done)
            for entry, began, _, _ in self.looks[key]:
                ended, what = gone.before(-entry.ended)
                if -ended < began:
                    self.say(f"{key}: {entry.payload} came out after a {what}")
            self.count_cleared(key, ops)

    def count_cleared(self, key, ops):
        mine = self.of_key[key]
        if any(op.what == "put" or op.done is None for op in ops) or any(each.ttl for each in mine):
            return
        out = sum(bool(each.takes) or each.live for each in mine) + sum(op.result for op in ops)
        sure = sum(each.done is True for each in mine)
        maybe = sum(each.done is None for each in mine)
        if not sure - len(self.cuts[key]) <= out <= sure + maybe:
            self.say(f"{key}: {out} were taken or cleared, of {sure} and perhaps {maybe}")

    def judge_dedupes(self):
        """Of those with the same id only the first came in, and the others were told its seq."""
        groups = defaultdict(list)
        for entry in self.entries.values():
            if entry.dedupe is not None and entry.done is not False:
                groups[entry.key, entry.dedupe].append(entry)
        for (key, dedupe), group in groups.items():
            inside = sorted((each for each in group if each.seen), key=lambda each: each.began)
            for first, second in itertools.pairwise(inside):
                if not self.may_forget(first, second):
                    self.say(f"{key}: {dedupe} let in {first.payload} and {second.payload}")
            if len(inside) == 1 and inside[0].live:
                told = {each.seq for each in group if each.done}
                if told - {inside[0].seq}:
                    self.say(f"{key}: {dedupe} was told {told}, and is {inside[0].seq}")
            sure = [each for each in group if each.done]
            for each in sure:
                each.done = None
            if sure and not inside:  # one of them is in, and wasn't seen
                sure[0].done, sure[0].seq = True, None

    def may_forget(self, first, second):
        """Whether the first can have been forgotten when the second came."""
        if not first.takes or not self.evidence.forgets:
            return False
        return first.takes[0].began < second.ended

    def judge_times(self):
        """Nothing comes out before its delay is over, nor after its time to live."""
        for entry in self.entries.values():
            for op in entry.takes:
                if op.ended < entry.began + entry.delay - self.slack:
                    self.say(f"{entry.payload}: taken before its delay was over")
                if entry.ttl and op.began > entry.ended + entry.ttl + self.slack:
                    self.say(f"{entry.payload}: taken after its time to live")

    def judge_losses(self):
        """What is missing was taken by one that was cut off, or wiped, or has expired."""
        missing = defaultdict(list)
        for entry in self.entries.values():
            if (
                entry.done
                and not entry.seen
                and not entry.ttl
                and entry.key not in self.evidence.rules
                and self.last_wipe.get(entry.key, -1) < entry.began
            ):
                missing[entry.key].append(entry)
        for key, entries in missing.items():
            self.explain(key, entries)

    def explain(self, key, missing):
        """Find for each missing entry a take that was cut off when it was at the head.

        When that was, the takes of its neighbours tell. In the order of their seqs the windows
        begin and end later and later, so to each goes, of the takes that fit, the one that was
        cut off first. Whoever was told no seq gets what is left, for any that ended later will do.
        """
        numbered = [look for look in self.looks[key] if look.takes and look.entry.seq is not None]
        since = Frontier((look.entry.seq, (look.began, "")) for look in numbered)
        until = Frontier((-look.entry.seq, (-look.ended, "")) for look in numbered)
        cuts = sorted(self.cuts[key], reverse=True)
        fit, left = [], []
        delayed = any(each.delay for each in self.of_key[key])
        for entry in sorted((each for each in missing if each.seq), key=lambda each: each.seq):
            begin, end = entry.began, NEVER
            if not delayed:
                begin = max(begin, since.before(entry.seq)[0])
                end = -until.before(-entry.seq)[0]
            while cuts and cuts[-1][0] <= end:
                began, ended = cuts.pop()
                heapq.heappush(fit, (ended, began))
            while fit and fit[0][0] < begin:
                left.append(heapq.heappop(fit)[0])
            if fit:
                heapq.heappop(fit)
            else:
                self.say(f"{key}: {entry.payload} is lost (seq {entry.seq})")
        left = sorted([*left, *(ended for ended, _ in fit), *(ended for _, ended in cuts)])
        nameless = [each for each in missing if not each.seq]
        for entry in sorted(nameless, key=lambda each: each.began, reverse=True):
            if not left or left.pop() < entry.began:
                self.say(f"{key}: {entry.payload} is lost, and its seq was never told")

    def judge_tombstones(self):
        """What the file says of them agrees with what the workers saw."""
        if self.evidence.rows is None:
            return
        rows = self.evidence.rows
        if len({row.seq for row in rows}) != len(rows):
            self.say("a seq stands twice in the file")
        taken = defaultdict(list)
        for row in rows:
            entry = self.by_seq.get(row.seq)
            if row.state > 6:
                continue
            if row.state >= 3 and row.payload is not None:
                self.say(f"entry {row.seq}: a tombstone with a payload")
            if entry is not None and entry.key != row.key:
                self.say(f"entry {row.seq}: pushed to {entry.key}, and stands in {row.key}")
            if row.state < 3 and entry is None and not leases.is_made(row.key):
                self.say(f"entry {row.seq} is from nowhere: {row}")
            if row.state == 5 and entry is not None and not entry.ttl:
                self.say(f"{entry.payload}: has expired, and has no time to live")
            if row.state == 3 and entry is not None and not entry.delay:
                taken[row.key].append((row.taken_no, row.seq))
        for key, numbers in taken.items():
            seqs = [seq for _, seq in sorted(numbers)]
            if seqs != sorted(seqs):
                self.say(f"{key}: not taken in order, as the file has it")
        numbers = sorted(row.taken_no for row in rows if row.taken_no)
        if not self.evidence.forgets and numbers != list(range(1, len(numbers) + 1)):
            self.say("the takings are not numbered one by one")
