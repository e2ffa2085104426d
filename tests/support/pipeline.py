"""A model of warps that hand shared memory to one another: mbarriers, named barriers, and who may touch what when.

An actor (a warp) is a generator of steps: ("wait", barrier, parity), ("arrive", barrier), ("sync", name, warps),
("signal", name, warps), which arrives at a named barrier and does not wait, ("read", place), ("write", place). `run`
takes them in a random order, with the phases of real mbarriers (a wait for a parity passes when the current phase has
the other one, so that a phase too early or too late shows), and keeps vector clocks: an access that is not ordered
behind every access it conflicts with is a race.
"""

import random


def ring_blocks(pieces, ring, slots):
    """What a ring of `ring` slots carries, `slots` for a block: (number, request, is it the first, the last of it,
    slots as (slot, parity)). pieces: blocks of each request."""
    number = position = 0
    for req, n in enumerate(pieces):
        for j in range(n):
            where = [((position + i) % ring, (position + i) // ring & 1) for i in range(slots)]
            yield number, req, j == 0, j == n - 1, where
            number, position = number + 1, position + slots


class Race(AssertionError):
    pass


class Deadlock(AssertionError):
    pass


class Barrier:
    def __init__(self, count):
        self.count, self.pending, self.phase = count, count, 0
        self.gathered, self.published = {}, {}

    def arrive(self, clock):
        self.gathered = joined(self.gathered, clock)
        self.pending -= 1
        if self.pending == 0:
            self.published, self.gathered = joined(self.published, self.gathered), {}
            self.pending, self.phase = self.count, self.phase + 1


def joined(a, b):
    return {k: max(a.get(k, 0), b.get(k, 0)) for k in a.keys() | b.keys()}


def run(counts, actors, seed):
    """counts: arrivals of each mbarrier; actors: name -> generator of steps; seed: of their order. Raises Race or
    Deadlock; returns the mbarriers."""
    rng, barriers = random.Random(seed), {name: Barrier(n) for name, n in counts.items()}
    clocks = {name: {name: 1} for name in actors}
    named, writers, readers = {}, {}, {}
    at = {}

    def arrive(name, barrier):
        barrier.arrive(clocks[name])
        clocks[name][name] += 1

    def advance(name):
        step = next(actors[name], None)
        if step is not None and step[0] == "sync":
            barrier = named.setdefault(step[1], Barrier(step[2]))
            phase = barrier.phase
            arrive(name, barrier)
            step = ("until", barrier, phase)
        if step is None:
            at.pop(name, None)
        else:
            at[name] = step

    def passes(step):
        if step[0] == "wait":
            return barriers[step[1]].phase & 1 != step[2]
        return step[0] != "until" or step[1].phase > step[2]

    def access(name, kind, place):
        clock = clocks[name]
        against = [writers.get(place), *(readers.get(place, {}).items() if kind == "write" else ())]
        for other in against:
            if other and clock.get(other[0], 0) < other[1]:
                raise Race(f"{name} {kind}s {place}, which {other[0]} may still be using")
        if kind == "write":
            writers[place], readers[place] = (name, clock[name]), {}
        else:
            readers.setdefault(place, {})[name] = clock[name]

    for name in actors:
        advance(name)
    while at:
        ready = [name for name, step in at.items() if passes(step)]
        if not ready:
            raise Deadlock(str(at))
        name = rng.choice(ready)
        kind, what = at[name][:2]
        if kind == "arrive":
            arrive(name, barriers[what])
        elif kind == "signal":
            arrive(name, named.setdefault(what, Barrier(at[name][2])))
        elif kind == "wait":
            clocks[name] = joined(clocks[name], barriers[what].published)
        elif kind == "signal":
            arrive(name, named.setdefault(what, Barrier(at[name][2])))
        elif kind == "until":
            clocks[name] = joined(clocks[name], what.published)
        else:
            access(name, kind, what)
        advance(name)
    return barriers


def links(actors):
    """(kind of step, barrier, first letter of the actors) of all that orders anything."""
    return sorted({(step[0], barrier_name(step[1]), name[0]) for name, steps in actors.items() for step in steps
                   if step[0] in ("wait", "arrive", "sync", "signal")})


def without(actors, link):
    """The actors but for the steps of one link."""
    def left(name, steps):
        return (step for step in steps if (step[0], barrier_name(step[1]), name[0]) != link)

    return {name: left(name, steps) for name, steps in actors.items()}


def barrier_name(barrier):
    return barrier if isinstance(barrier, str) else barrier[0]


def seen(make, link, seeds=60):
    """Whether leaving out a link shows: a race, a deadlock or a barrier left in the middle. make(rng) -> (counts,
    actors)."""
    for seed in range(seeds):
        counts, actors = make(random.Random(seed))
        try:
            barriers = run(counts, without(actors, link), seed)
        except (Race, Deadlock):
            return True
        if any(b.pending != b.count for b in barriers.values()):
            return True
    return False
