"""The schedules of the mla_decode kernels for 16-bit caches as models: no race and no deadlock in any order of their
warps; and without any one of their waits or arrivals there is one, so the model would see it. Two warps stand for the
four of a warpgroup."""

import random

import pytest

from .support.pipeline import links, ring_blocks, run, seen

W = 2  # warps of a warpgroup
RAISES = 3  # the reference of the relay's exponents is set again in every third block
PIECES = ([1], [2], [5], [1, 1, 1, 1], [3, 1, 2], [1, 4, 1, 3])
LONG = ([5], [3, 1, 2], [1, 4, 1, 3], [2, 2, 2])


class Ring:
    """What sm90_swap, sm90_relay and sm90_trio share: the ring and its producer (kv_producer.py). pieces: blocks of
    each request of a CTA."""

    def __init__(self, pieces, ring, slots, gather):
        self.pieces, self.ring, self.slots, self.gather = pieces, ring, slots, gather
        self.producers = W if gather else 1

    def blocks(self):
        return ring_blocks(self.pieces, self.ring, self.slots)

    def counts(self, readers, query_readers):
        """Arrivals of the mbarriers: `readers` warps free a slot, `query_readers` the query."""
        found = {"load_q": 1, "q_full": 1, "q_free": query_readers}
        for i in range(self.ring):
            found |= {("full", i): self.producers, ("empty", i): readers}
        return found

    def fill(self, w):
        """Warp w of the producer."""
        for number, req, first, _, where in self.blocks():
            if w == 0 and number == 0:
                yield "arrive", "load_q"
            for slot, parity in where:
                yield "wait", ("empty", slot), parity ^ 1
                yield "write", ("K", slot, w)
                yield "arrive", ("full", slot)
            if w == 0 and first and req > 0:
                yield "wait", "q_free", req - 1 & 1
                yield "arrive", "load_q"

    def load_queries(self):
        """The TMA, which works for itself once it is told to."""
        for req in range(len(self.pieces)):
            yield "wait", "load_q", req & 1
            for w in range(W):
                yield "write", ("Q", w)
            yield "arrive", "q_full"

    def read_query(self):
        for w in range(W):
            yield "read", ("Q", w)

    def read_slot(self, slot):
        for w in range(self.producers):
            yield "read", ("K", slot, w)

    def clear_tail(self, where):
        """What lies behind the end of a request; rows of the gather are zeros there."""
        for slot, _ in where if not self.gather else ():
            yield "write", ("K", slot, 0)


class Relay(Ring):
    """One warpgroup has the scores, two the values."""

    def counts(self):
        return super().counts(2 * W, W)

    def actors(self):
        found = {"q": self.load_queries(), **{f"p{w}": self.fill(w) for w in range(self.producers)}}
        for w in range(W):
            found |= {f"s{w}": self.scores(w), f"v{w}": self.values(0, w), f"u{w}": self.values(1, w)}
        return found

    def products(self, number, req, first, last, where):
        """S of a block; from then on P may be written."""
        if first:
            yield "wait", "q_full", req & 1
        for slot, parity in where:
            yield "wait", ("full", slot), parity
            yield from self.read_slot(slot)
        yield from self.read_query()
        if last:
            yield "arrive", "q_free"
        if number > 0:
            yield "sync", "p_free", 3 * W

    def scores(self, w):
        for number, req, first, last, where in self.blocks():
            yield from self.products(number, req, first, last, where)
            yield "write", ("above", w)
            yield "sync", "scores", W
            for i in range(W):
                yield "read", ("above", i)
            if number % RAISES == 0:
                yield "write", ("X", w)
                yield "sync", "scores", W
                for i in range(W):
                    yield "read", ("X", i)
                if w == 0:
                    yield "write", "factor"
            if w == 0:
                yield "write", "again"
            yield "write", ("P", w)
            if last and w == 0:
                yield from self.clear_tail(where)
            yield "signal", "p_full", 3 * W
            if last:
                yield "sync", "scores", W
                yield "write", ("X", w)
                yield "sync", "scores", W
                for i in range(W):
                    yield "read", ("X", i)
                yield "write", ("inverse", w)
                yield "signal", "sums", 3 * W

    def values(self, v, w):
        for number, req, _, last, where in self.blocks():
            for slot, parity in where if not self.gather else ():
                yield "wait", ("full", slot), parity
            yield "sync", "p_full", 3 * W
            yield "read", "again"
            if number % RAISES == 0:
                yield "read", "factor"
            for i in range(W):
                yield "read", ("P", i)
            for slot, _ in where:
                yield from self.read_slot(slot)
                if not last:
                    yield "arrive", ("empty", slot)
            if not last:
                yield "signal", "p_free", 3 * W
                continue
            yield "sync", "sums", 3 * W
            for i in range(W):
                yield "read", ("inverse", i)
            if req < len(self.pieces) - 1:
                yield "signal", "p_free", 3 * W
            yield from self.store(v, w, where)

    def store(self, v, w, where):
        """The output of a request through tiles of this warpgroup, which no other reads any more."""
        yield "write", ("O", v, w)
        yield "sync", f"values{v}", W
        for i in range(W):
            yield "read", ("O", v, i)
        for slot, _ in where:
            yield "arrive", ("empty", slot)


class Trio(Relay):
    """The same for 64 rows: a warp of the scores hands its rows to the same warp of the values, who take the weights
    into registers and hand their memory back before they use them."""

    def scores(self, w):
        for number, req, first, last, where in self.blocks():
            yield from self.products(number, req, first, last, where)
            if number % RAISES == 0:
                yield "write", ("factor", w)
            yield "write", ("again", w)
            yield "write", ("P", w)
            if last and not self.gather:
                yield "sync", "scores", W
                if w == 0:
                    yield from self.clear_tail(where)
            yield "signal", "p_full", 3 * W
            if last:
                yield "write", ("inverse", w)
                yield "signal", "sums", 3 * W

    def values(self, v, w):
        for number, req, _, last, where in self.blocks():
            for slot, parity in where if not self.gather else ():
                yield "wait", ("full", slot), parity
            yield "sync", "p_full", 3 * W
            yield "read", ("P", w)
            yield "read", ("again", w)
            if number % RAISES == 0:
                yield "read", ("factor", w)
            if not last:
                yield "signal", "p_free", 3 * W
            for slot, _ in where:
                yield from self.read_slot(slot)
                if not last:
                    yield "arrive", ("empty", slot)
            if last:
                yield "sync", "sums", 3 * W
                yield "read", ("inverse", w)
                if req < len(self.pieces) - 1:
                    yield "signal", "p_free", 3 * W
                yield from self.store(v, w, where)


class Swap(Ring):
    """Two warpgroups take every other block, and are merged at the end of a request, in the memory of the query."""

    def counts(self):
        return super().counts(W, 2 * W)

    def actors(self):
        found = {"q": self.load_queries(), **{f"p{w}": self.fill(w) for w in range(self.producers)}}
        return found | {f"{'ab'[g]}{w}": self.math(g, w) for g in (0, 1) for w in range(W)}

    def math(self, g, w):
        of_request = 0
        for _, req, first, last, where in self.blocks():
            if first:
                of_request = 0
                yield "wait", "q_full", req & 1
            if of_request & 1 == g:
                for slot, parity in where:
                    yield "wait", ("full", slot), parity
                    yield from self.read_slot(slot)
                yield from self.read_query()
                yield "write", ("maximum", g, w)
                yield "sync", f"group{g}", W
                for i in range(W):
                    yield "read", ("maximum", g, i)
                yield "write", ("P", g, w)
                if last and w == 0:
                    yield from self.clear_tail(where)
                yield "sync", f"group{g}", W
                for slot, _ in where:
                    yield from self.read_slot(slot)
                for i in range(W):
                    yield "read", ("P", g, i)
                for slot, _ in where:
                    yield "arrive", ("empty", slot)
            of_request += 1
            if last:
                yield from self.merge(g, w)

    def merge(self, g, w):
        yield "write", ("sums", g, w)
        yield "sync", "math", 2 * W
        for other in (0, 1):
            for i in range(W):
                yield "read", ("sums", other, i)
        for giver in (1, 0):
            if g == giver:
                yield "write", ("Q", w)  # for the same warp of the other one
            yield "sync", "math", 2 * W
            if g != giver:
                yield "read", ("Q", w)
            if giver == 1:
                yield "sync", "math", 2 * W
        yield "arrive", "q_free"


def relay(gather, kind=Relay):
    def make(rng, pieces=LONG):
        slots = rng.choice([1, 3])
        return kind(rng.choice(pieces), rng.choice([2 * slots, 2 * slots + 1]), slots, gather)
    return make


def swap(gather):
    def make(rng, pieces=LONG):
        slots = rng.choice([1, 3])
        return Swap(rng.choice(pieces), rng.choice([2 * slots, 2 * slots + 2, 3 * slots - 1]), slots, gather)
    return make


KINDS = {"relay": relay(False), "relay, gather": relay(True), "trio": relay(False, Trio),
         "trio, gather": relay(True, Trio), "swap": swap(False), "swap, gather": swap(True)}


@pytest.mark.parametrize("kind", KINDS)
def test_no_race_and_no_deadlock(kind):
    for seed in range(80):
        kernel = KINDS[kind](random.Random(seed), PIECES)
        run(kernel.counts(), kernel.actors(), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_link_is_needed(kind):
    """Leave out one kind of step of one warpgroup: some order of the warps then races, or waits for ever."""
    def make(rng):
        kernel = KINDS[kind](rng)
        return kernel.counts(), kernel.actors()

    every = links(make(random.Random(1))[1])
    assert len(every) > 8
    # the scores' warps have waited already; the values' make what the TMA wrote visible to themselves
    spare = {("wait", "full", "u"), ("wait", "full", "v")}
    assert {link for link in every if not seen(make, link)} <= spare
