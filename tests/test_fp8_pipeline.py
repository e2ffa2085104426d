"""The schedule of templates/mla_decode/sm90_fp8.py as a model: no race and no deadlock in any order of its warps; and
without any one of its waits or arrivals there is one, so the model would see it."""

import itertools
import random

import pytest

from .support.pipeline import Deadlock, Race, run

RAISES = 3  # the reference of the exponents is set again in every third block


def counts(ring):
    """Arrivals of each mbarrier, as the kernel initialises them."""
    found = {"q_full": 1, "q_free": 4}
    for i in range(ring):
        found |= {("full", i): 1, ("empty", i): 8}
    for i in (0, 1):
        found |= {("p_full", i): 4, ("p_free", i): 8, ("sums", i): 4, ("s_full", i): 4, ("s_free", i): 4}
    return found


class Kernel:
    """pieces: blocks of each request of a CTA. e4m3, hold, helper, slots, ring: the constants of the template."""

    def __init__(self, pieces, *, e4m3, hold, helper, slots=3, ring=7):
        self.pieces, self.e4m3, self.hold, self.helper, self.slots, self.ring = pieces, e4m3, hold, helper, slots, ring

    def blocks(self):
        """(number, request, is it the first, the last of it, slots as (slot, parity))."""
        number = position = 0
        for req, n in enumerate(self.pieces):
            for j in range(n):
                where = [((position + i) % self.ring, (position + i) // self.ring & 1) for i in range(self.slots)]
                yield number, req, j == 0, j == n - 1, where
                number, position = number + 1, position + self.slots

    def actors(self):
        found = {"tma": self.tma()}
        for w in range(4):
            found[f"s{w}"] = self.scores(w)
            found[f"v{w}"] = self.values(w)
            found[f"u{w}"] = self.values(w)
            if self.helper:
                found[f"h{w}"] = self.help()
        return found

    def tma(self):
        for number, req, first, _, where in self.blocks():
            if self.e4m3 and number == 0:
                yield "write", "Q"
                yield "arrive", "q_full"
            for slot, parity in where:
                yield "wait", ("empty", slot), parity ^ 1
                yield "write", ("K", slot)
                yield "arrive", ("full", slot)
            if self.e4m3 and first and req > 0:
                yield "wait", "q_free", req - 1 & 1
                yield "write", "Q"
                yield "arrive", "q_full"

    def query(self, me, w):
        """A query of 16 bits, converted by all that have scores."""
        warps = 8 if self.helper else 4
        yield "sync", "query", warps
        yield "write", ("X", me, w)
        yield "sync", "query", warps
        for who, i in itertools.product("sh" if self.helper else "s", range(4)):
            yield "read", ("X", who, i)
        yield "write", ("Q", me, w)
        yield "sync", "query", warps

    def read_query(self):
        if self.e4m3:
            yield "read", "Q"
        else:
            for who, i in itertools.product("sh" if self.helper else "s", range(4)):
                yield "read", ("Q", who, i)

    def scores(self, w):
        held = None
        for number, req, first, last, where in self.blocks():
            buf, turn = number & 1, number >> 1 & 1
            if first and self.e4m3:
                yield "wait", "q_full", req & 1
            elif first:
                yield from self.query("s", w)
            for slot, parity in where[:1] if self.helper else where:
                yield "wait", ("full", slot), parity
                yield "read", ("K", slot)
            yield from self.read_query()
            if self.hold and held is not None:
                yield "arrive", ("p_full", held)
            for slot, _ in where[:1] if self.helper else where:  # until wgmma is done
                yield "read", ("K", slot)
            yield from self.read_query()
            if self.e4m3 and last:
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

    def help(self):
        w = self.warps_of_help = getattr(self, "warps_of_help", -1) + 1
        for number, _, first, _, where in self.blocks():
            buf, turn = number & 1, number >> 1 & 1
            if first:
                yield from self.query("h", w)
            for slot, parity in where:
                yield "wait", ("full", slot), parity
                yield "read", ("K", slot)
            yield from self.read_query()
            yield "wait", ("s_free", buf), turn ^ 1
            yield "write", ("part", buf, w)
            yield "arrive", ("s_full", buf)

    def values(self, w):
        for number, req, _, last, where in self.blocks():
            buf, turn = number & 1, number >> 1 & 1
            for slot, parity in where:
                yield "wait", ("full", slot), parity
                yield "read", ("K", slot)
            yield "wait", ("p_full", buf), turn
            yield "read", ("again", buf)
            if number % RAISES == 0:
                yield "read", ("factor", buf)
            for i in range(4):
                yield "read", ("P", i, buf)
            for slot, _ in where:  # the last of it goes to registers
                yield "read", ("K", slot)
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
            yield "read", ("K", slot)


KINDS = {
    "e4m3, 64 rows": dict(e4m3=True, hold=True, helper=False),
    "e4m3, fewer rows": dict(e4m3=True, hold=False, helper=False),
    "16 bits, 64 rows": dict(e4m3=False, hold=True, helper=False),
    "16 bits, 32 rows": dict(e4m3=False, hold=False, helper=False),
    "16 bits, 16 rows": dict(e4m3=False, hold=False, helper=True),
}
PIECES = ([1], [2], [5], [1, 1, 1, 1], [3, 1, 2], [1, 4, 1, 3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 3])
def test_no_race_and_no_deadlock(kind, slots):
    for seed in range(40):
        rng = random.Random(seed)
        ring = rng.choice([2 * slots, 2 * slots + 1, 3 * slots + 2])
        run(counts(ring), Kernel(rng.choice(PIECES), slots=slots, ring=ring, **KINDS[kind]).actors(), seed)


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
                barriers = run(counts(kernel.ring), actors, seed)
            except (Race, Deadlock):
                break
            if any(b.pending != b.count for b in barriers.values()):
                break
        else:
            unseen.append((what, barrier, who))
    assert not unseen
