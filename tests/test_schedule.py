"""The work split of mla_decode: a model of templates/common/mla_split.py that is checked by brute force, the template's
own text run lane by lane against that model, how the parts of a request wait for each other, and the host rule."""

import ast
import functools
import random
import types
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitmla import schedule
from jitmla.schedule import BLOCK_TOKENS, MAX_PARTS, launch_args, semaphore_count, workspace_floats

from .support.lanes import Lanes

COMMON = Path(__file__).parents[1] / "templates" / "common"
FAST = settings(max_examples=200, deadline=None)


def ceil_div(a, b):
    return -(-a // b)


# ------------------------------------------------------------------------------------------------- the model


class Split:
    """One work split; nb = blocks of each request."""

    def __init__(self, nb, parts, fixed, least, bias):
        self.nb, self.parts, self.fixed = nb, parts, fixed
        batch, top = len(nb), max(nb)
        self.s, self.k = parts // batch, ceil_div(batch, parts)
        self.share = max(ceil_div(sum(nb) + fixed * batch, parts), least)
        self.piece, cost = top, self.k * (top + fixed)
        if self.s > 0:
            self.piece = max(ceil_div(top, self.s), least)
            if self.piece > 1:
                self.piece = ceil_div(self.piece, 2) * 2
            cost = self.piece + fixed
        self.aligned = cost <= self.share + bias

    def locate(self, x):
        start = 0
        for r, n in enumerate(self.nb):
            if start + n + self.fixed > x:
                return r, max(0, x - start - self.fixed), start
            start += n + self.fixed
        return len(self.nb), 0, start

    def interval(self, p):
        nb = self.nb
        if self.aligned:
            if self.s > 0:
                r, j = p // self.s, p % self.s * self.piece
                return (r, r, j, min(j + self.piece, nb[r])) if r < len(nb) and j < nb[r] else (0, -1, 0, 0)
            return p * self.k, min(p * self.k + self.k, len(nb)) - 1, 0, 0
        r0, j0, _ = self.locate(p * self.share)
        r1, j1, _ = self.locate((p + 1) * self.share)
        return r0, r1 - 1 if j1 == 0 else r1, j0, j1

    def pieces(self, p):
        """(request, first block, end block) of part p, with the rules of the decode kernels."""
        r0, r1, j0, j1 = self.interval(p)
        for r in range(r0, r1 + 1):
            yield r, j0 if r == r0 else 0, j1 if r == r1 and j1 > 0 else self.nb[r]


    def shares(self, p):
        """(request, p0, parts with a piece, sharers) of each split request that part p has to combine, by looking at
        the pieces of all parts. What `sharing` computes from the share of p alone."""
        found = []
        for r, owners in enumerate(self.owners):
            sharers = range(r * self.s, r * self.s + self.s) if self.aligned and self.s > 0 else owners
            if len(owners) > 1 and p in sharers:
                found.append((r, owners[0], len(owners), len(sharers)))
        return found

    @functools.cached_property
    def owners(self):
        """The parts that have a piece of each request."""
        owners = [[] for _ in self.nb]
        for p in range(self.parts):
            for r, _, _ in self.pieces(p):
                owners[r].append(p)
        return owners


def check(split):
    """Every block once; slots unique; the combine reads exactly the slots written, in the order of the blocks."""
    cover, slots = [[0] * n for n in split.nb], {}
    for p in range(split.parts):
        for r, b0, b1 in split.pieces(p):
            assert 0 <= b0 < b1 <= split.nb[r]
            for j in range(b0, b1):
                cover[r][j] += 1
            if (b0, b1) != (0, split.nb[r]):
                slot = 2 * p if b0 > 0 else 2 * p + 1
                assert slot not in slots and slot < 2 * split.parts
                slots[slot] = r, b0, b1
    assert all(c == 1 for row in cover for c in row)
    read, counters = {}, set()
    for r, owners in enumerate(split.owners):
        p0, n = owners[0], len(owners)
        assert owners == list(range(p0, p0 + n)) and n <= min(split.parts, MAX_PARTS)
        if n > 1:
            assert p0 not in counters, "two requests with one counter"
            counters.add(p0)
            mine = [2 * (p0 + i) + (1 if i == 0 else 0) for i in range(n)]
            assert not read.keys() & set(mine)
            read.update((slot, r) for slot in mine)
            ends = [0] + [slots[slot][2] for slot in mine]
            assert [slots[slot][1] for slot in mine] == ends[:-1] and ends[-1] == split.nb[r]
    assert read == {slot: r for slot, (r, _, _) in slots.items()}


def blocks(most_requests=160, most_blocks=1100):
    """Blocks of the requests of a batch: all alike, or a mixture."""
    size = st.integers(1, most_requests)
    count = st.one_of(st.sampled_from([1, 2, 16, 64, 127]), st.integers(1, most_blocks))
    alike = st.tuples(size, count).map(lambda x: [x[1]] * x[0])
    return st.one_of(alike, size.flatmap(lambda n: st.lists(count, min_size=n, max_size=n)))


PARTS = st.one_of(st.sampled_from([1, 2, 16, 33, 66, 96, 132, MAX_PARTS]), st.integers(1, MAX_PARTS))
KNOBS = st.tuples(PARTS, st.integers(0, 8), st.integers(1, 6), st.sampled_from([-(10**6), 0, 3, 8, 10**6]))


@FAST
@given(nb=blocks(), knobs=KNOBS)
def test_every_block_once_and_every_slot_read(nb, knobs):
    check(Split(nb, *knobs))


@FAST
@given(
    nb=blocks(),
    rows=st.integers(1, 512),
    sms=st.sampled_from([1, 78, 114, 132, 148]),
    latent=st.sampled_from([256, 512]),
)
def test_split_with_the_launch_rule(nb, rows, sms, latent):
    check(Split(nb, *launch_args(rows, len(nb), sms, latent)))


def test_both_splits_are_reached():
    assert Split([64] * 128, *launch_args(128, 128, 132)).aligned
    assert not Split([1] * 127 + [4000], *launch_args(128, 128, 132)).aligned
    assert len(Split([1000], *launch_args(16, 1, 132)).owners[0]) > 32


# ---------------------------------------------------------------------------------- the template against the model


WARP_WIDE = frozenset({"shuffle_sync", "shuffle_sync_up", "shuffle_sync_bfly", "vote_ballot_sync",
                       "warp_redux_sync"})
WARP_FUNCTIONS = frozenset({"choose", "locate", "lanes_sum", "warp_inclusive_sum"})
LANES = Lanes(WARP_WIDE, WARP_FUNCTIONS)


def _int(x):
    return int(x)


def _natural(x):
    assert 0 <= x < 2**32
    return x


@pytest.fixture(scope="module")
def device():
    """The functions of mla_split.py as generators of one lane, with the names of the DSL replaced by Python's."""
    source = "".join((COMMON / f"{name}.py").read_text() for name in ("warp", "mla_split"))
    tree = LANES.visit(ast.parse(source))
    tree.body = [n for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom))]
    prefetched = []
    arch = types.SimpleNamespace(
        popc=int.bit_count,
        load=lambda address, dtype, cop: address.tensor[address.offset],
        prefetch=lambda address, cache_level: prefetched.append(address.offset),
    )

    def span(lo, hi, step=1, unroll=1):
        return range(lo, hi, step)

    cutlass = types.SimpleNamespace(range=span, range_constexpr=range, max=max, min=min, Constexpr=None)
    names = {"cutlass": cutlass, "cute": types.SimpleNamespace(arch=arch), "Int32": _int, "Uint32": _natural,
             "Float32": float,
             "prefetched": prefetched, "const_expr": bool}
    exec(compile(ast.fix_missing_locations(tree), "mla_split.py", "exec"), names)  # noqa: S102
    return types.SimpleNamespace(**names)


def run_warp(function, *args):
    """Run 32 lanes in lockstep; every lane must reach the same operation and return the same value."""
    lanes = [function(*args, lane) for lane in range(32)]
    send = [None] * 32
    while True:
        steps, ends = [], []
        for lane, value in zip(lanes, send, strict=True):
            try:
                steps.append(lane.send(value))
            except StopIteration as end:
                ends.append(end.value)
        if ends:
            assert not steps and len(set(ends)) == 1
            return ends[0]
        (op,) = {step[0] for step in steps}
        own = [step[1] for step in steps]
        if op == "vote_ballot_sync":
            send = [sum(1 << i for i in range(32) if own[i])] * 32
        elif op == "warp_redux_sync":
            (kind,) = {step[2] for step in steps}
            send = [{"add": sum, "max": max}[kind](own)] * 32
        elif op == "shuffle_sync":
            send = [own[step[2] % 32] for step in steps]
        elif op == "shuffle_sync_bfly":
            send = [own[i ^ step[2]] for i, step in enumerate(steps)]
        else:
            send = [own[i - step[2]] if i >= step[2] else own[i] for i, step in enumerate(steps)]


def tokens(nb, slack):
    """Lengths with these numbers of blocks; a request of one block may be empty."""
    return [0 if n == 1 and slack == BLOCK_TOKENS else n * BLOCK_TOKENS - slack % BLOCK_TOKENS for n in nb]


@settings(max_examples=200, deadline=None)
@given(nb=blocks(most_requests=70), knobs=KNOBS, slack=st.integers(0, BLOCK_TOKENS), data=st.data())
def test_device_code_agrees_with_the_model(device, nb, knobs, slack, data):
    split, lengths = Split(nb, *knobs), tokens(nb, slack)
    some = data.draw(st.lists(st.integers(0, split.parts - 1), min_size=1, max_size=3, unique=True))
    for p in some:
        *share, total, unit = run_warp(device.interval, lengths, len(nb), p, *knobs, split.s, split.k)
        assert total == sum(nb)
        if share[1] < share[0]:
            assert not list(split.pieces(p))
        else:
            assert tuple(share) == split.interval(p)
        assert shares(device, split, lengths, p, unit, *share) == split.shares(p)


def shares(device, split, lengths, p, unit, r0, r1, j0, j1):
    """What part p combines, as `MlaCombine.run` reads it from the answer of `sharing`."""
    p0, n, sharers, started = device.sharing(lengths, p, split.s, unit, r0, r1, j0, j1)
    both = [(r0, p0, n, sharers), (r1, p, started, started)]
    return [x for x in both if x[2] > 1]


# ------------------------------------------------------------------------------------- arrive, wait, leave, reset


def run_parts(split, tiles, counters, rng):
    """Run all CTAs of a launch in a random order of steps: attention work, arrivals, then for each split request a
    wait, a departure and its combine. Returns each (request, row tile, sharer) that was combined."""

    def increment(at, total):  # red.inc
        counters[at] = 0 if counters[at] >= total - 1 else counters[at] + 1

    def cta(p, tile):
        work = split.shares(p)
        yield lambda: True  # the attention work needs nobody
        written.add((p, tile))
        for _, p0, n, sharers in work:
            if p - p0 < n:
                increment(p0 * tiles + tile, n + sharers)
        for r, p0, n, sharers in work:
            at = p0 * tiles + tile
            yield lambda at=at, n=n: counters[at] >= n
            increment(at, n + sharers)
            assert all((q, tile) in written for q in split.owners[r]), "combined before all partial results are there"
            combined.append((r, tile, p - p0))

    written, combined = set(), []
    running = [(c, next(c)) for c in (cta(p, tile) for p in range(split.parts) for tile in range(tiles))]
    while running:
        ready = [i for i, (_, condition) in enumerate(running) if condition()]
        assert ready, "every CTA waits for another"
        i = rng.choice(ready)
        c, _ = running[i]
        try:
            running[i] = c, next(c)
        except StopIteration:
            running.pop(i)
    return combined


@settings(max_examples=60, deadline=None)
@given(nb=blocks(most_requests=40, most_blocks=200), knobs=KNOBS, tiles=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_parts_wait_for_each_other_and_leave_the_counters_at_zero(nb, knobs, tiles, seed):
    parts = min(knobs[0], 24)
    split = Split(nb, parts, *knobs[1:])
    counters = [0] * (parts * tiles)
    for launch in range(2):
        combined = run_parts(split, tiles, counters, random.Random(seed + launch))
        assert not any(counters)
        expect = []
        for r, owners in enumerate(split.owners):
            sharers = split.s if split.aligned and split.s > 0 else len(owners)
            if len(owners) > 1:
                expect += [(r, tile, i) for tile in range(tiles) for i in range(sharers)]
        assert sorted(combined) == sorted(expect)


class Address(types.SimpleNamespace):
    def __add__(self, n):
        return Address(tensor=self.tensor, offset=self.offset + n)

    def to_llvm_ptr(self):
        return self


class Vector(list):
    @property
    def iterator(self):
        return Address(tensor=self, offset=0)


class Table:
    """A block table of which only the addresses matter."""

    def __init__(self, rows, pages):
        self.shape = (rows, pages)

    def __getitem__(self, at):
        return types.SimpleNamespace(iterator=Address(tensor=None, offset=at[0] * self.shape[1]))


@FAST
@given(
    length=st.one_of(st.sampled_from([0, 1, 64, 65536, 10**6]), st.integers(0, 70000)),
    spare=st.integers(0, 40),
    page_size=st.one_of(st.sampled_from([16, 32, 64, 128]), st.sampled_from([1, 7, 5000]).map(Fraction)),
    parts=st.integers(1, 8),
    data=st.data(),
)
def test_touch_table_stays_inside_the_used_entries(device, length, spare, page_size, parts, data):
    used = ceil_div(length, page_size)
    batch = data.draw(st.integers(1, 8))
    part = data.draw(st.integers(0, parts - 1))
    s, k = parts // batch, ceil_div(batch, parts)
    r = part // s if s > 0 else part * k
    lengths, table = Vector([0] * batch), Table(batch, used + spare)
    if r < batch:
        lengths[r] = length
    device.prefetched.clear()
    for lane in range(32):
        device.touch_table(table, lengths, batch, part, s, k, page_size, lane)
    row = r * table.shape[1]
    # one entry per 128-byte line, of the first 65536 tokens (at least 32 lines); a page size that is known at launch,
    # here a Fraction, gives 32 lines from where the part would begin
    first, lines = 0, max(65536 // page_size, 1024)
    if isinstance(page_size, Fraction):
        first, lines = used // s * (part - r * s) if s > 0 else 0, 1024
    expect = range(row + first, row + min(used, first + lines), 32) if r < batch else []
    assert sorted(device.prefetched) == list(expect)


# ------------------------------------------------------------------------------------------------ the host rule


@FAST
@given(
    rows=st.integers(1, 512),
    batch=st.one_of(st.integers(1, 300), st.integers(1, 100000)),
    sms=st.integers(1, 200),
    latent=st.sampled_from([256, 512]),
    tile=st.sampled_from([8, 16, 32, 64]),
)
def test_launch_args_are_what_the_kernels_can_do(rows, batch, sms, latent, tile):
    tile = schedule.unusual_tile(rows, tile)
    launch = launch_args(rows, batch, sms, latent, tile)
    tiles = ceil_div(rows, tile or schedule.TILE_ROWS)
    assert 1 <= launch.parts <= MAX_PARTS
    assert launch.parts * tiles <= sms or launch.parts == 1  # CTAs that wait for each other all run
    assert launch.fixed >= 0 and launch.least >= 1
    assert semaphore_count(launch.parts, rows, tile) == launch.parts * tiles


@FAST
@given(
    rows=st.integers(1, 512),
    batch=st.integers(1, 300),
    tokens=st.integers(1, 70000),
    sms=st.integers(1, 200),
    tile=st.sampled_from([8, 16, 32, 64]),
)
def test_the_share_of_equal_requests_is_that_of_the_model(rows, batch, tokens, sms, tile):
    launch = launch_args(rows, batch, sms, tile_rows=schedule.unusual_tile(rows, tile))
    split = Split([ceil_div(tokens, BLOCK_TOKENS)] * batch, *launch)
    share = schedule.equal_share(launch, batch, tokens)
    assert share.even != split.aligned
    works = [(r0, r1) for r0, r1, _, _ in map(split.interval, range(launch.parts)) if r0 <= r1]
    if split.aligned:
        assert share.busy == len(works) and share.pieces * batch == max(len(works), batch)
        assert share.requests == max(r1 - r0 + 1 for r0, r1 in works)
        assert share.blocks == (split.k * split.nb[0] if split.s == 0 else min(split.piece, split.nb[0]))


@pytest.mark.parametrize(
    ("rows", "batch", "expect"),
    [
        (16, 1, (96, 1, 1, 3)),
        (16, 8, (128, 2, 1, 3)),
        (16, 32, (128, 2, 1, 3)),
        (16, 50, (132, 2, 1, 3)),
        (16, 128, (128, 2, 1, 3)),
        (16, 200, (132, 4, 6, 8)),
        (64, 1, (96, 1, 1, 3)),
        (64, 128, (128, 2, 1, 3)),
        (17, 200, (132, 4, 6, 8)),
        (128, 1, (66, 1, 2, 3)),
        (128, 8, (66, 1, 2, 3)),
        (128, 128, (66, 4, 6, 8)),
    ],
)
def test_launch_args_on_an_h200(rows, batch, expect):
    assert launch_args(rows, batch, 132) == expect


@pytest.mark.parametrize("bad", [(0, 1, 132), (1, 0, 132), (1, 1, 0), (1, 1, 132, 128)])
def test_launch_args_refuses(bad):
    with pytest.raises(ValueError):
        launch_args(*bad)


def test_workspace_holds_outputs_and_sums():
    assert workspace_floats(66, 128, 512) == 2 * 66 * 128 * 512 + 2 * 66 * 128


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [("mla_split.py", "SPLIT_TOKENS", BLOCK_TOKENS), ("mla_combine.py", "COMBINE_MAX_PARTS", MAX_PARTS)],
)
def test_templates_share_the_constants(file, name, value):
    """The templates cannot import jitmla: the numbers are stated twice and compared here."""
    assigned = {}
    for node in ast.parse((COMMON / file).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            assigned[node.targets[0].id] = node.value.value
    assert assigned[name] == value
