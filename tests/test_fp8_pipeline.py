"""The schedule of templates/mla_decode/sm90_fp8.py as a model: no race and no deadlock in any order of its warps; and
without any one of its waits or arrivals there is one, so the model would see it."""

import random

import pytest

from .support.pipeline import Deadlock, Race, ring_blocks, run

RAISES = 3  # the reference of the exponents is set again in every third block


def counts(kernel):
    """Arrivals of each mbarrier, as the kernel initialises them; of the 32 of a warp that gathers, one."""
    found = {"q_full": 1, "q_free": 8 if kernel.helper else 4}
    for i in range(kernel.ring):
        found |= {("full", i): kernel.producers, ("empty", i): 8}
    for i in (0, 1):
        found |= {("p_full", i): 4, ("p_free", i): 8, ("sums", i): 4, ("s_full", i): 4, ("s_free", i): 4}
    return found


class Kernel:
    """pieces: blocks of each request of a CTA. e4m3, hold, helper, slots, ring: the constants of the template.
    producers: warps that fill the ring. scaled: the largest element of a query is looked for (bf16)."""

    def __init__(self, pieces, *, e4m3, hold, helper, slots=3, ring=7, producers=1,
                 scaled=False):
        self.pieces, self.e4m3, self.hold, self.helper, self.slots, self.ring = pieces, e4m3, hold, helper, slots, ring
        self.producers, self.scaled = producers, scaled
        scorers = [(who, i) for who in ("sh" if helper else "s") for i in range(4)]
        self.query_parts = ["Q"] if e4m3 else [("Q", *scorer) for scorer in scorers]

    def blocks(self):
        return ring_blocks(self.pieces, self.ring, self.slots)

    def actors(self):
        found = {f"p{w}": self.produce(w) for w in range(self.producers)}
        for w in range(4):
            found[f"s{w}"] = self.scores(w)
            found[f"v{w}"] = self.values(w)
            found[f"u{w}"] = self.values(w)
            if self.helper:
                found[f"h{w}"] = self.help(w)
        return found

    def produce(self, w):
        for number, req, first, _, where in self.blocks():
            if number == 0 and w == 0:
                yield from self.load_query()
            for slot, parity in where:
                yield "wait", ("empty", slot), parity ^ 1
                yield "write", ("K", slot, w)
                yield "arrive", ("full", slot)
            if first and req > 0 and w == 0:
                yield "wait", "q_free", req - 1 & 1
                yield from self.load_query()

    def load_query(self):
        for part in self.query_parts:
            yield "write", part
        yield "arrive", "q_full"

    def read_keys(self, slot):
        for w in range(self.producers):
            yield "read", ("K", slot, w)

    def query(self, me, w, req):
        """Wait for the query; 16 bits of it are converted in their place by all that have scores."""
        yield "wait", "q_full", req & 1
        if self.e4m3:
            return
        warps = 8 if self.helper else 4
        if self.scaled:
            yield "sync", "query", warps
            yield "read", ("Q", me, w)
            yield "write", ("X", me, w)
            yield "sync", "query", warps
            for _, who, i in self.query_parts:
                yield "read", ("X", who, i)
        yield "write", ("Q", me, w)
        yield "sync", "query", warps

    def read_query(self):
        for part in self.query_parts:
            yield "read", part

    def scores(self, w):
        held = None
        for number, req, first, last, where in self.blocks():
            buf, turn = number & 1, number >> 1 & 1
            if first:
                yield from self.query("s", w, req)
            for slot, parity in where[:1] if self.helper else where:
                yield "wait", ("full", slot), parity
                yield from self.read_keys(slot)
            yield from self.read_query()
            if self.hold and held is not None:
                yield "arrive", ("p_full", held)
            for slot, _ in where[:1] if self.helper else where:  # until wgmma is done
                yield from self.read_keys(slot)
            yield from self.read_query()
            if last:
                yield "arrive", "q_free"
            if self.helper:
                yield "wait", ("s_full", buf), turn
                yield "read", ("part", buf, w)
                yield "arrive", ("s_free", buf)
            yield "wait", ("p_free", buf), turn ^ 1
            yield "write", ("above", w, buf)
            yield "sync", "scores", 4
            for i in range(4):
                yield "read", ("above", i, buf)
            if number % RAISES == 0:
                yield "write", ("X", "s", w)
                yield "sync", "scores", 4
                for i in range(4):
                    yield "read", ("X", "s", i)
                if w == 0:
                    yield "write", ("factor", buf)
            if w == 0:
                yield "write", ("again", buf)
            yield "write", ("P", w, buf)
            if last or not self.hold:
                yield "arrive", ("p_full", buf)
            held = None if last else buf
            if last:
                yield "sync", "scores", 4
                yield "write", ("X", "s", w)
                yield "sync", "scores", 4
                for i in range(4):
                    yield "read", ("X", "s", i)
                yield "write", ("inverse", w, req & 1)
                yield "arrive", ("sums", req & 1)

    def help(self, w):
        for number, req, first, last, where in self.blocks():
            buf, turn = number & 1, number >> 1 & 1
            if first:
                yield from self.query("h", w, req)
            for slot, parity in where:
                yield "wait", ("full", slot), parity
                yield from self.read_keys(slot)
            yield from self.read_query()
            if last:
                yield "arrive", "q_free"
            yield "wait", ("s_free", buf), turn ^ 1
            yield "write", ("part", buf, w)
            yield "arrive", ("s_full", buf)

    def values(self, w):
        for number, req, _, last, where in self.blocks():
            buf, turn = number & 1, number >> 1 & 1
            for slot, parity in where:
                yield "wait", ("full", slot), parity
                yield from self.read_keys(slot)
            yield "wait", ("p_full", buf), turn
            yield "read", ("again", buf)
            if number % RAISES == 0:
                yield "read", ("factor", buf)
            for i in range(4):
                yield "read", ("P", i, buf)
            for slot, _ in where:  # the last of it goes to registers
                yield from self.read_keys(slot)
                yield "arrive", ("empty", slot)
            for i in range(4):
                yield "read", ("P", i, buf)
            if not last:
                yield "arrive", ("p_free", buf)
            else:
                yield "wait", ("sums", req & 1), req >> 1 & 1
                for i in range(4):
                    yield "read", ("inverse", i, req & 1)
                yield "arrive", ("p_free", buf)
        yield "sync", "end", 8
        for slot in range(self.ring):  # the combine has its numbers there
            yield from self.read_keys(slot)


KINDS = {
    "e4m3, 64 rows": dict(e4m3=True, hold=True, helper=False),
    "e4m3, fewer rows": dict(e4m3=True, hold=False, helper=False),
    "bf16, 64 rows": dict(e4m3=False, hold=True, helper=False, scaled=True),
    "bf16, 32 rows": dict(e4m3=False, hold=False, helper=False, scaled=True),
    "bf16, 16 rows": dict(e4m3=False, hold=False, helper=True, scaled=True),
    "fp16, 16 rows": dict(e4m3=False, hold=False, helper=True),
    "fp16, 16 rows, a gather": dict(e4m3=False, hold=False, helper=True, producers=4),
}
# where a query is scaled, those that convert it meet before they do: one of them waiting for it is enough
SPARE = {"bf16, 16 rows": [("wait", "q_full", "h"), ("wait", "q_full", "s")]}
PIECES = ([1], [2], [5], [1, 1, 1, 1], [3, 1, 2], [1, 4, 1, 3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 3])
def test_no_race_and_no_deadlock(kind, slots):
    for seed in range(40):
        rng = random.Random(seed)
        ring = rng.choice([2 * slots, 2 * slots + 1, 3 * slots + 2])
        kernel = Kernel(rng.choice(PIECES), slots=slots, ring=ring, **KINDS[kind])
        run(counts(kernel), kernel.actors(), seed)


def without(steps, link):
    """The steps of an actor but for those of one kind at one barrier."""
    return (step for step in steps if (step[0], name_of(step[1])) != link)


def name_of(barrier):
    return barrier if isinstance(barrier, str) else barrier[0]


def links(kind):
    """(waits or arrivals, barrier, who) of the schedule of a kind."""
    found = set()
    for name, actor in Kernel([3, 1, 2], **KINDS[kind]).actors().items():
        found |= {(step[0], name_of(step[1]), name[0]) for step in actor if step[0] in ("wait", "arrive", "sync")}
    return sorted(found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_link_is_needed(kind):
    """Leave out one kind of step of one warpgroup: some order of the warps then races, or waits for ever."""
    unseen = []
    for what, barrier, who in links(kind):
        for seed in range(60):
            rng = random.Random(seed)
            pieces, ring = rng.choice([[5], [3, 1, 2], [1, 4, 1, 3], [2, 2, 2]]), rng.choice([7, 16])
            kernel = Kernel(pieces, ring=ring, **KINDS[kind])
            actors = {name: without(steps, (what, barrier)) if name[0] == who else steps
                      for name, steps in kernel.actors().items()}
            try:
                barriers = run(counts(kernel), actors, seed)
            except (Race, Deadlock):
                break
            if any(b.pending != b.count for b in barriers.values()):
                break
        else:
            unseen.append((what, barrier, who))
    assert unseen == SPARE.get(kind, [])
