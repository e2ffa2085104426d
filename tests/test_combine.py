"""The combine of mla_decode: the text of templates/common/mla_combine.py, run lane by lane on lists of numbers.

Loads that a lane issues with cp.async arrive either at once or as late as its waits allow, and slots that nothing has
been loaded to hold NaN, so a wait or a slot that is wrong by one shows. Between two warp-wide operations the lanes run
one after the other, forwards or backwards.
"""

import ast
import contextlib
import math
import random
import types
from pathlib import Path

import pytest

from .support.lanes import Lanes
from .test_schedule import Split

COMMON = Path(__file__).parents[1] / "templates" / "common"
NAN = float("nan")
WARP_WIDE = {"sync_warp", "shuffle_sync_bfly"}


class Number(float):
    def to(self, _dtype):
        return Number(self)


class Pointer:
    def __init__(self, memory, offset=0):
        self.memory, self.offset = memory, offset

    def __add__(self, n):
        return Pointer(self.memory, self.offset + n)

    def store(self, value):
        self.memory[self.offset] = value

    @property
    def llvm_ptr(self):
        return self


class Tensor:
    """A strided view of a list, with the little of cute.Tensor that the combine uses."""

    def __init__(self, iterator, layout):
        self.iterator, self.layout, (self.shape, self.stride) = iterator, layout, layout

    def __getitem__(self, at):
        at = at if isinstance(at, tuple) else (at,)
        assert all(i is None or 0 <= i < n for i, n in zip(at, self.shape, strict=True)), (at, self.shape)
        start = self.iterator + sum(i * s for i, s in zip(at, self.stride, strict=True) if i is not None)
        rest = [k for k, i in enumerate(at) if i is None]
        if rest:
            return Tensor(start, ([self.shape[k] for k in rest], [self.stride[k] for k in rest]))
        value = start.memory[start.offset]
        return Number(value) if isinstance(value, float) else value

    def __setitem__(self, at, value):
        at = at if isinstance(at, tuple) else (at,)
        assert all(0 <= i < n for i, n in zip(at, self.shape, strict=True)), (at, self.shape)
        self.iterator.memory[self.iterator.offset + sum(i * s for i, s in zip(at, self.stride, strict=True))] = value

    def fill(self, value):
        for i in range(math.prod(self.shape)):
            self.iterator.memory[self.iterator.offset + i] = value


def layout(shape, stride=None):
    shape = [shape] if isinstance(shape, int) else list(shape)
    return shape, list(stride) if stride else [math.prod(shape[:i]) for i in range(len(shape))]


def rmem(shape, _dtype):
    return Tensor(Pointer([NAN] * math.prod(shape)), layout(shape))


def move(src, dst):
    (n,), (m,) = src.shape, dst.shape
    assert n == m and src.stride[0] == dst.stride[0] == 1
    source, target = src.iterator, dst.iterator
    assert source.offset % n == 0 and target.offset % n == 0, "not aligned"
    assert 0 <= source.offset <= len(source.memory) - n and 0 <= target.offset <= len(target.memory) - n
    target.memory[target.offset : target.offset + n] = source.memory[source.offset : source.offset + n]


class Async:
    """cp.async of the lane that runs: groups in flight, oldest first."""

    def __init__(self, late):
        self.late, self.lane, self.open, self.groups, self.copies = late, 0, {}, {}, 0

    def copy(self, _atom, src, dst):
        self.copies += 1
        if self.late:
            self.open.setdefault(self.lane, []).append((src, dst))
        else:
            move(src, dst)

    def commit(self):
        self.groups.setdefault(self.lane, []).append(self.open.pop(self.lane, []))

    def wait(self, n):
        groups = self.groups.get(self.lane, [])
        while len(groups) > n:
            for src, dst in groups.pop(0):
                move(src, dst)


def combiner(late, yields=frozenset(WARP_WIDE), generators=frozenset({"rows", "weights"})):
    """(mla_combine.py as Python, its cp.async unit)"""
    tree = Lanes(yields, generators).visit(ast.parse((COMMON / "mla_combine.py").read_text()))
    tree.body = [n for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom))]
    unit = Async(late)
    arch = types.SimpleNamespace(
        fmax=max, rcp_approx=lambda x: Number(1 / x if x else math.inf),
        cp_async_commit_group=unit.commit, cp_async_wait_group=unit.wait,
        make_warp_uniform=lambda x: x, fence_acq_rel_gpu=lambda: None, inline_ptx=red_inc,
    )  # fmt: skip
    cute = types.SimpleNamespace(
        arch=arch, copy=unit.copy, autovec_copy=move, make_tensor=Tensor, make_layout=layout, make_rmem_tensor=rmem,
        make_copy_atom=lambda *a, **k: None, recast_ptr=lambda x, dtype: x, assume=lambda x, divby: assumed(x, divby),
        math=types.SimpleNamespace(log2=lambda x, fastmath: math.log2(x) if x > 0 else -math.inf),
    )  # fmt: skip
    cutlass = types.SimpleNamespace(
        range=lambda a, b=None, step=1, unroll=1: range(a) if b is None else range(a, b, step),
        range_constexpr=range, max=max, min=min, Constexpr=None,
    )  # fmt: skip
    cpasync = types.SimpleNamespace(
        CopyG2SOp=lambda **k: None, LoadCacheMode=types.SimpleNamespace(GLOBAL=None, ALWAYS=None)
    )
    names = {
        "cutlass": cutlass, "cute": cute, "cpasync": cpasync, "Int32": int, "Float32": Number, "INF": math.inf,
        "LOG2E": math.log2(math.e), "cutlass_dtype": lambda x: types.SimpleNamespace(width=16 if x == "fp16" else 32),
        "ex2": lambda x: Number(2.0**x if x < 1000 else math.inf),
        "const_expr": lambda x: x,
    }  # fmt: skip
    exec(compile(ast.fix_missing_locations(tree), "mla_combine.py", "exec"), names)  # noqa: S102
    return types.SimpleNamespace(**names), unit


def red_inc(text, read_only_args):
    assert text == "red.relaxed.gpu.global.inc.u32 [{$r0}], {$r1};"
    at, bound = read_only_args
    old = at.memory[at.offset]
    at.memory[at.offset] = 0 if old >= bound else old + 1


def assumed(x, divisor):
    assert x % divisor == 0
    return x


def warp(unit, lanes):
    """Run 32 lanes in lockstep from one warp-wide operation to the next; a generator that yields at each `sync`."""
    send = [None] * 32
    while True:
        steps = [None] * 32
        for i in range(31, -1, -1) if unit.late else range(32):
            unit.lane = i
            with contextlib.suppress(StopIteration):
                steps[i] = lanes[i].send(send[i])
        if steps == [None] * 32:
            assert not any(unit.open.values())
            return
        (op,) = {step[0] for step in steps}
        if op == "sync":
            yield True
        shuffled = op == "shuffle_sync_bfly"
        send = [steps[i ^ step[2]][1] for i, step in enumerate(steps)] if shuffled else [None] * 32


def run_cta(unit, warps):
    """Run the warps of a CTA, one after the other from one `sync` to the next."""
    warps = [warp(unit, lanes) for lanes in warps]
    while True:
        (more,) = {next(w, False) for w in (warps[::-1] if unit.late else warps)}
        if not more:
            return


def see_column(lane, e):
    return lane // 4 * 16 + lane % 4 * 2 + e % 2 + e // 2 * 8


def swap_column(lane, e):
    return e // 2 * 64 + lane // 8 * 16 + lane % 8 + e % 2 * 8


def half_column(lane, e):
    return lane // 8 * 32 + lane % 2 * 16 + lane // 2 % 4 * 2 + e % 2 + e // 2 * 8


COLUMNS = [(swap_column, False, "fp32"), (see_column, True, "fp32"), (half_column, True, "fp16")]
CASES = [
    # latent, rows, first row, heads, parts of the request, sharers, first part
    (128, 3, 0, 3, 2, 2, 0),
    (128, 7, 64, 5, 3, 3, 2),
    (256, 2, 0, 2, 5, 5, 1),
    (256, 16, 0, 8, 2, 3, 0),  # a sharer without a piece
    (512, 14, 64, 64, 3, 3, 1),  # 3 units a warp, not a power of two parts
    (512, 9, 0, 9, 2, 2, 0),
    (512, 2, 0, 2, 9, 33, 0),  # more sharers than units
    (512, 1, 0, 1, 33, 2, 0),  # two rounds of 32 log-sum-exps, ring filled more than once
    (128, 1, 0, 1, 160, 1, 0),
    (128, 64, 0, 16, 1 + 1, 1 + 1, 3),
]


class Once(list):
    """Memory that notes where it is written."""

    def __init__(self, n):
        super().__init__([NAN] * n)
        self.written = []

    def __setitem__(self, at, value):
        self.written += range(*at.indices(len(self))) if isinstance(at, slice) else [at]
        super().__setitem__(at, value)


class Partials:
    """Partial results of requests, and what is to come out. The rows row0 .. of requests of `n` parts that begin at the
    parts `firsts`."""

    def __init__(self, latent, rows, row0, heads, n, firsts, column):
        self.latent, self.rows, self.heads, self.n, self.firsts = latent, range(row0, row0 + rows), heads, n, firsts
        rng = random.Random(n)
        end, slots = row0 + rows, 2 * (max(firsts) + n)
        self.o_acc = Tensor(Pointer([NAN] * (slots * end * latent)),
                            layout((slots, end, latent), (end * latent, latent, 1)))
        self.lse_acc = Tensor(Pointer([NAN] * (slots * end)), layout((slots, end), (end, 1)))
        self.values, self.sums = {}, {}
        for p0 in firsts:
            for i in range(n):
                slot = 2 * (p0 + i) + (1 if i == 0 else 0)
                for r in self.rows:
                    # row row0 + 1 sees no token at all, part 1 sees none in any row
                    unseen = r == row0 + 1 or i == 1
                    self.sums[p0, i, r] = self.lse_acc[slot, r] = -math.inf if unseen else rng.uniform(-40, 40)
                    for c in range(latent):
                        self.values[p0, i, r, c] = 0.0 if unseen else rng.uniform(-1, 1)
                    for at in range(latent):
                        c = at // 128 * 128 + column(at % 128 // 4, at % 4)
                        self.o_acc[slot, r, at] = self.values[p0, i, r, c]
        self.sinks = Tensor(Pointer([rng.uniform(-5, 5) for _ in range(heads)]), layout(heads))
        self.out = Tensor(Pointer(Once(len(firsts) * end * latent)),
                          layout((len(firsts), end, latent), (end * latent, latent, 1)))
        self.lse = Tensor(Pointer(Once(len(firsts) * end)),
                          layout((len(firsts), -(-end // heads), heads), (end, heads, 1)))

    def arguments(self, area, req, flags):
        """Of MlaCombine.rows and .shared_unit, up to n."""
        return (area, self.out, self.lse, self.sinks, self.o_acc, self.lse_acc, flags, self.heads, req,
                self.firsts[req], self.n)

    def check(self):
        """Every row of every request is written once, and right."""
        for tensor, per_row in ((self.out, self.latent), (self.lse, 1)):
            written = tensor.iterator.memory.written
            assert len(written) == len(set(written)) == len(self.firsts) * len(self.rows) * per_row
        for req, p0 in enumerate(self.firsts):
            for r in self.rows:
                self.check_row(req, p0, r)

    def check_row(self, req, p0, r):
        sums = [self.sums[p0, i, r] for i in range(self.n)]
        top = max(sums)
        got = self.lse[req, r // self.heads, r % self.heads]
        if top == -math.inf:
            assert got == -math.inf and all(self.out[req, r, c] == 0 for c in range(self.latent))
            return
        weights = [2 ** (x - top) for x in sums]
        assert got == pytest.approx((math.log2(sum(weights)) + top) / math.log2(math.e))
        total = sum(weights) + 2 ** (self.sinks[r % self.heads] * math.log2(math.e) - top)
        for c in range(self.latent):
            expect = sum(weights[i] * self.values[p0, i, r, c] for i in range(self.n)) / total
            assert self.out[req, r, c] == pytest.approx(expect, abs=1e-12)


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize(("column", "pairs", "partial"), COLUMNS)
@pytest.mark.parametrize(("latent", "rows", "row0", "heads", "n", "sharers", "p0"), CASES)
def test_every_row_is_combined_once(latent, rows, row0, heads, n, sharers, p0, column, pairs, partial, late):
    module, unit = combiner(late)
    combine = module.MlaCombine(latent, "fp32", column, pairs, 1, partial=partial)
    partials = Partials(latent, rows, row0, heads, n, [p0], column)
    for index in range(sharers):
        args = partials.arguments(Pointer([NAN] * combine.area_floats()), 0, module.HAS_SINKS | module.WANTS_LSE)
        run_cta(unit, [[combine.rows(*args, w * sharers + index, module.COMBINE_WARPS * sharers, row0, rows, w, lane)
                        for lane in range(32)] for w in range(module.COMBINE_WARPS)])
    partials.check()
    assert unit.copies == rows * latent // 128 * n * 33  # of each unit and part 32 float4 and a log-sum-exp


SHARED = [
    # latent, rows, first row, heads, parts of a request, sharers, warps of a team
    (512, 2, 64, 2, 9, 9, 2),
    (128, 3, 64, 2, 17, 2, 4),  # a team without a unit
    (512, 1, 0, 1, 33, 6, 8),  # 4 units for 6 sharers
    (128, 1, 0, 1, 160, 1, 8),  # two rounds of loads, the second one not full
    (128, 2, 0, 2, 8, 1, 2),
]


@pytest.mark.parametrize(("pairs", "late"), [(False, False), (True, True)], ids=["forwards", "backwards"])
@pytest.mark.parametrize(("latent", "rows", "row0", "heads", "n", "sharers", "team"), SHARED)
def test_teams_combine_every_row_once(latent, rows, row0, heads, n, sharers, team, pairs, late):
    """Two requests one after the other in the same shared memory: a warp that is through with the first must not
    disturb one that is not. No unit is left, as a team takes one at most."""
    module, unit = combiner(late, WARP_WIDE | {"sync"}, {"weights"})
    column = see_column if pairs else swap_column
    combine = module.MlaCombine(latent, "fp32", column, pairs, 1)
    log_team = combine.team_of(rows * latent // 128, n, sharers)
    assert 1 << log_team == team
    partials = Partials(latent, rows, row0, heads, n, [1, n + 1], column)

    def thread(area, index, w, lane):
        for req in range(2):
            yield from combine.shared_unit(*partials.arguments(area, req, module.HAS_SINKS | module.WANTS_LSE), sharers,
                                           index, log_team, row0, rows, w, lane)

    for index in range(sharers):
        area = Pointer([NAN] * combine.area_floats())
        run_cta(unit, [[thread(area, index, w, lane) for lane in range(32)] for w in range(module.COMBINE_WARPS)])
    partials.check()


@pytest.mark.parametrize(("nb", "parts", "tiles", "bias"), [
    ([1000], 30, 2, 0), ([5], 30, 1, 0), ([64] * 8, 33, 2, 0), ([3, 80, 1, 1, 40], 9, 3, -(10**6)),
    ([1] * 20 + [300] + [2] * 9, 12, 2, 0), ([7] * 24, 12, 1, 0), ([9, 2], 7, 1, 10**6),
    ([5], 30, 1, 3), ([5, 9], 23, 2, 8),  # sharers without a piece
])
def test_ctas_wait_for_each_other_and_leave_the_counters_at_zero(nb, parts, tiles, bias):
    """`run` of thread 0 of every CTA, in a random order of steps, twice with the same counters."""
    split = Split(nb, parts, 1, 2, bias)
    module, _ = combiner(False, {"sync", "arrivals"}, set())
    combined, written = [], set()

    class Combine(module.MlaCombine):
        def rows(self, *args):
            _, _, _, _, _, _, _, _, req, p0, n, first, step, row0, rows, w, lane = args
            tile = row0 // 64
            assert (rows, w, lane) == (64, 0, 0) and step % module.COMBINE_WARPS == 0
            assert split.owners[req] == list(range(p0, p0 + n)), "not the parts of this request"
            assert {(p, tile) for p in split.owners[req]} <= written, "combined before it was written"
            combined.append((req, tile, first, step // module.COMBINE_WARPS))

    combine = Combine(512, "fp32", see_column, True, 1, teams=False)
    counters = Tensor(Pointer([0] * parts * tiles), layout(parts * tiles))
    rng = random.Random(len(nb))
    for _ in range(2):
        running = []
        for p in range(parts):
            r0, r1, j0, _ = split.interval(p)
            if split.aligned and split.s > 0:
                r0 = p // split.s
            work = {0 if j0 > 0 or split.aligned else 1: x for x in split.shares(p)[:1]}
            work.update((1, x) for x in split.shares(p)[1:])
            (r0, p0, n, sharers), (_, _, started, _) = work.get(0, (r0, 0, 0, 0)), work.get(1, (r1, p, 0, 0))
            share = Tensor(Pointer([p0, n, sharers, started, r0, r1]), layout(6))
            for tile in range(tiles):
                cta = combine.run(None, share, None, None, None, None, None, counters, 0, 1, p, tile, tiles, 64 * tile,
                                  64, 0)
                assert next(cta) == ("sync",)  # the attention work is done
                running.append([cta, (p, tile), None])
        steps = 0
        while running:
            at = rng.randrange(len(running))
            cta, name, send = running[at]
            written.add(name)
            steps += 1
            assert steps < 10**6, "some CTA waits for ever"
            try:
                op, *args = cta.send(send)
                running[at][2] = None if op == "sync" else args[0][args[1]]
            except StopIteration:
                running.pop(at)
        assert not any(counters[i] for i in range(parts * tiles))
        expect = []
        for r, owners in enumerate(split.owners):
            sharers = split.s if split.aligned and split.s > 0 else len(owners)
            if len(owners) > 1:
                expect += [(r, tile, i, sharers) for tile in range(tiles) for i in range(sharers)]
        assert sorted(combined) == sorted(expect)
        combined.clear()
        written.clear()


@pytest.mark.parametrize("column", [see_column, swap_column])
def test_columns_of_partial_results_are_a_permutation(column):
    assert sorted(column(lane, e) for lane in range(32) for e in range(4)) == list(range(128))


@pytest.mark.parametrize("name", ["sm90_trio", "sm90_swap"])
def test_the_kernels_permute_as_the_combine_is_told(name):
    """partial_column of the template is the one that the tests here use."""
    tree = ast.parse((COMMON.parent / "mla_decode" / f"{name}.py").read_text())
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "partial_column")
    names = {}
    exec(compile(ast.Module([function], []), name, "exec"), names)  # noqa: S102
    column = see_column if name == "sm90_trio" else swap_column
    assert all(names["partial_column"](lane, e) == column(lane, e) for lane in range(32) for e in range(4))


def test_weights_of_a_warp_have_room():
    """Units of a warp times parts, and three more that are read with the last four."""
    module, _ = combiner(False)
    for n in range(2, module.COMBINE_MAX_PARTS + 1):
        for latent, rows in ((512, 64), (256, 64), (512, 16)):
            units = rows * latent // 128
            assert -(-units // (module.COMBINE_WARPS * n)) * n + 3 < module.COMBINE_ENTRIES
