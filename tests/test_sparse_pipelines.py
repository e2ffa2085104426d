"""The schedules of the kernels of sparse_mla as models: nothing races, nobody waits for ever, each barrier is needed.
A kernel that changes its barriers changes its model here."""

import pytest

from .support.pipeline import Race, run

ORDERS = 30  # in which the steps are taken


class Model:
    """Steps of warpgroups. Products (wgmma) read until they have been waited for."""

    def __init__(self, drop=None):
        """drop: a barrier at which nobody waits, or the first word of the names of several."""
        self.steps, self.groups, self.counts, self.drop = {}, {}, {}, drop

    def add(self, agent, *steps):
        self.steps.setdefault(agent, []).extend(steps)

    def read(self, agent, *places):
        self.add(agent, *[("read", place) for place in places])

    def write(self, agent, *places):
        self.add(agent, *[("write", place) for place in places])

    def copy(self, agent, bar, *places):
        """A copy whose end arrives at a barrier."""
        self.write(agent, *places)
        self.arrive(agent, bar)

    def mma(self, agent, *places):
        """One group of products that read these."""
        self.read(agent, *places)
        self.groups.setdefault(agent, []).append(places)

    def wait_group(self, agent, left):
        groups = self.groups.get(agent, [])
        while len(groups) > left:
            self.read(agent, *groups.pop(0))

    def arrive(self, agent, bar, count=1):
        self.counts[bar] = count
        self.add(agent, ("arrive", bar))

    def dropped(self, bar):
        return bar == self.drop or (isinstance(bar, tuple) and bar[0] == self.drop)

    def wait(self, agent, bar, phase):
        """For the end of the phase-th phase of an mbarrier; of one below 0: not at all."""
        if phase >= 0 and not self.dropped(bar):
            self.add(agent, ("wait", bar, phase & 1))

    def signal(self, agent, bar):
        """Arrive at a named barrier at which one other agent waits."""
        self.add(agent, ("signal", bar, 2))

    def sync(self, agent, bar):
        """Wait at a named barrier, at which one other agent arrives or waits too."""
        self.add(agent, ("signal" if self.dropped(bar) else "sync", bar, 2))

    meet = sync

    def run(self):
        for seed in range(ORDERS):
            run(self.counts, {agent: iter(steps) for agent, steps in self.steps.items()}, seed)


# ------------------------------------------------------------------------------------- sparse_mla/sm90_gather_seesaw

HALVES = ((0, 0), (1, 1), (0, 1), (1, 0))  # common/sparse_halves.py


def seesaw(pieces, fp8=False, drop=None):
    """pieces: pairs of blocks of each token of the CTA."""
    m = Model(drop)
    total = sum(pieces)
    for n in range(total):
        for block, half in HALVES:
            m.wait("gather", ("empty", block, half), n - 1)
            if block == half:
                m.write("gather", ("ok", block))
            rope = [("R", block)] if block != half else []
            m.copy("gather", ("full", block, half), ("K", block, half), *rope)

    def load_q():
        m.copy("wg0", "q_full", "Q")

    def scores(wg, block, half, n):
        if n < total:
            m.wait(wg, ("full", block, half), n)
            rope = [("R", block)] if block != half else []
            m.mma(wg, ("K", block, half), "Q", *rope)
        else:
            m.mma(wg, ("K", block, half))  # whatever is there: the result is not used

    load_q()
    for wg, block in (("wg0", 0), ("wg1", 1)):
        m.wait(wg, "q_full", 0)
        scores(wg, block, block, 0)
        scores(wg, block, 1 - block, 0)
    n = 0
    for token, pairs in enumerate(pieces):
        for i in range(pairs):
            new_q = i == pairs - 1 and token + 1 < len(pieces)
            n += 1
            wg = "wg0"
            m.wait_group(wg, 0)
            m.read(wg, ("ok", 0))
            m.write(wg, "M0"), m.signal(wg, "m0")
            m.mma(wg, ("K", 0, 0))
            m.wait_group(wg, 0)
            m.arrive(wg, ("empty", 0, 0))
            m.sync(wg, "m1")
            if new_q:
                load_q()
            m.read(wg, "M1")
            m.write(wg, ("R", 0)), m.signal(wg, "p0")  # P0
            m.sync(wg, "p1")
            m.mma(wg, ("R", 1), ("K", 1, 0))
            if new_q:
                m.wait(wg, "q_full", token + 1)
            scores(wg, 0, 0, n)
            m.wait_group(wg, 1)
            m.arrive(wg, ("empty", 1, 0))
            scores(wg, 0, 1, n)
            wg = "wg1"
            m.wait_group(wg, 0)
            m.read(wg, ("ok", 1))
            m.sync(wg, "m0"), m.read(wg, "M0")
            m.write(wg, "M1"), m.signal(wg, "m1")
            m.write(wg, ("R", 1))  # P1
            m.mma(wg, ("K", 1, 1))
            m.signal(wg, "p1"), m.sync(wg, "p0")
            m.mma(wg, ("R", 0), ("K", 0, 1))
            m.wait_group(wg, 1)
            m.arrive(wg, ("empty", 1, 1))
            m.wait_group(wg, 0)
            m.arrive(wg, ("empty", 0, 1))
            if new_q:
                m.wait(wg, "q_full", token + 1)
            scores(wg, 1, 1, n)
            scores(wg, 1, 0, n)
        for wg in ("wg0", "wg1"):
            m.write(wg, ("L", wg)), m.meet(wg, "end"), m.read(wg, ("L", "wg0"), ("L", "wg1"))
    for wg in ("wg0", "wg1"):
        m.wait_group(wg, 0)
        m.meet(wg, "combine")
    m.write("wg0", *[("K", block, half) for block, half in HALVES])  # the combine takes their memory
    return m


# ----------------------------------------------------------------------------------------------- sparse_mla/sm90_gather


def one_by_one(pieces, fp8, drop=None):
    """pieces: blocks of each token of the CTA."""
    m = Model(drop)
    for n in range(sum(pieces)):
        m.wait("gather", ("empty", n % 2), n // 2 - 1)
        m.write("gather", ("ok", n % 2))
        m.copy("gather", ("full", n % 2), ("K", n % 2))

    def q_ready(wg, token):
        m.wait(wg, "q_full", token)
        mine = ("Q", 0 if wg == "scores" else 1)
        if fp8:
            m.read(wg, mine), m.write(wg, mine)
        (m.sync if wg == "scores" else m.signal)(wg, "q_ready")

    def scores(number):
        m.wait("scores", ("full", number % 2), number // 2)
        m.mma("scores", ("K", number % 2), ("Q", 0), ("Q", 1))

    m.copy("scores", "q_full", ("Q", 0), ("Q", 1))
    m.signal("values", "free")
    number = 0
    for token, blocks in enumerate(pieces):
        q_ready("values", token), q_ready("scores", token)
        scores(number)
        m.wait_group("scores", 0)
        for i in range(blocks):
            last, buffer = i == blocks - 1, number % 2
            m.read("scores", ("ok", buffer))
            m.sync("scores", "free")
            if last and token + 1 < len(pieces):
                m.copy("scores", "q_full", ("Q", 0), ("Q", 1))
            m.write("scores", "P", "factor"), m.signal("scores", "ready")
            m.mma("scores", ("K", buffer))
            if not last:
                scores(number + 1)
            m.wait_group("scores", 0 if last else 1)
            m.arrive("scores", ("empty", buffer), 2)
            m.wait_group("scores", 0)
            m.sync("values", "ready"), m.read("values", "factor")
            m.mma("values", "P", ("K", buffer))
            m.wait_group("values", 0)
            m.arrive("values", ("empty", buffer), 2)
            m.signal("values", "free")
            number += 1
        m.write("scores", "inv"), m.signal("scores", "sums")
        m.sync("values", "sums"), m.read("values", "inv")
    m.sync("scores", "free")
    return m


# ------------------------------------------------------------------------------------------ sparse_mla/sm90_gather_swap


def swapped(pieces, fp8, drop=None):
    m = Model(drop)
    number = 0
    for blocks in pieces:
        for _ in range(blocks):
            agent = f"gather{number % 2}"
            m.wait(agent, ("empty", number % 2), number // 2 - 1)
            m.write(agent, ("ok", number % 2))
            m.copy(agent, ("full", number % 2), ("K", number % 2))
            number += 1

    def load_q(token):
        m.copy("math0", ("q_full", token % 2), ("Q", token % 2, 0), ("Q", token % 2, 1))

    load_q(0)
    done = 0
    for token, blocks in enumerate(pieces):
        stage = token % 2
        if token + 1 < len(pieces):
            load_q(token + 1)
        for wg in (0, 1):
            agent = f"math{wg}"
            m.wait(agent, ("q_full", stage), token // 2)
            if fp8:
                m.read(agent, ("Q", stage, wg)), m.write(agent, ("Q", stage, wg)), m.meet(agent, "math")
            for n in range(done, done + blocks):
                # the kernel gives block j of a token to warpgroup j % 2, and its buffer is that of its number
                if (n - done) % 2 == wg:
                    buffer = n % 2
                    m.wait(agent, ("full", buffer), n // 2)
                    m.mma(agent, ("K", buffer), ("Q", stage, 0), ("Q", stage, 1))
                    m.read(agent, ("ok", buffer))
                    m.wait_group(agent, 0)
                    m.mma(agent, ("K", buffer))
                    m.wait_group(agent, 0)
                    m.arrive(agent, ("empty", buffer))
        done += blocks
        for agent, mine in (("math0", 0), ("math1", 1)):
            m.write(agent, ("sL", mine)), m.meet(agent, "math"), m.read(agent, ("sL", 0), ("sL", 1))
            if mine == 1:
                m.write(agent, "X")
            m.meet(agent, "math")
            if mine == 0:
                m.read(agent, "X")
            m.meet(agent, "math")
            if mine == 0:
                m.write(agent, "X")
            m.meet(agent, "math")
            if mine == 1:
                m.read(agent, "X")
    return m


PIECES = [(1,), (2,), (5,), (1, 1, 1), (2, 3, 1, 4)]
NEEDED = {
    seesaw: ["full", "empty", "q_full", "m0", "m1", "p0", "p1", "end", "combine"],
    one_by_one: ["full", "empty", "q_full", "ready", "free", "sums"],
    swapped: ["full", "empty", "q_full", "math"],
}
NEEDED_FP8 = {seesaw: [], one_by_one: ["q_ready"], swapped: []}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("schedule", NEEDED)
def test_nothing_races_and_nobody_waits_for_ever(schedule, fp8):
    for pieces in PIECES:
        schedule(pieces, fp8).run()


@pytest.mark.parametrize(("schedule", "barrier"), [(s, b) for s in NEEDED for b in NEEDED[s] + NEEDED_FP8[s]])
def test_every_barrier_is_needed(schedule, barrier):
    with pytest.raises(Race):
        schedule((2, 3, 1, 4), True, drop=barrier).run()


@pytest.mark.parametrize("kind", ["full", "empty"])
@pytest.mark.parametrize(("block", "half"), HALVES)
def test_every_half_has_its_own_barriers(kind, block, half):
    with pytest.raises(Race):
        seesaw((4,), drop=(kind, block, half)).run()
