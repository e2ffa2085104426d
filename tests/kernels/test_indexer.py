"""The ops around DSA's indexer on a GPU, against oracles, with all poisoned that must not be read or is written.

All kernels are those of tests/keysets.py, so these tests run from a prewarmed cache on a machine without the compiler:

    python -m tests.keysets --op topk_indices --op fp8_mqa_logits ...     (where the compiler is)
    python -m pytest -m gpu tests/kernels/test_indexer.py                 (where the GPU is, same JITMLA_CACHE_DIR)
"""

from __future__ import annotations

import pytest
import torch

import jitmla
from jitmla import pick, tune
from jitmla.errors import InvalidArgument
from jitmla.layouts import INDEX_TOKEN_BYTES, ROW_BYTES
from jitmla.ops import topk_indices as topk_op
from jitmla.spec import Spec
from jitmla.testing_indexer import (
    DIM,
    FP8,
    NAN_BYTE,
    PAGE,
    append_problem,
    check_append,
    check_prologue,
    generator,
    index_pool,
    packed_row,
    pool_bytes,
    prologue_problem,
    scattered,
)
from jitmla.testing_logits import (
    check_logits,
    check_topk,
    exact_logits,
    exact_topk,
    logits_problem,
    topk_rows,
    windows,
)
from tests.keysets import prologue_covering
from tests.support.marks import ON_HOPPER

pytestmark = ON_HOPPER
CUDA, NAN, I32 = "cuda", float("nan"), torch.int32
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "i32": torch.int32, "i64": torch.int64}


def bits(x):
    return x.contiguous().view(torch.uint8)


def same(a, b) -> bool:
    """Bitwise equality."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


# ------------------------------------------------------------------------------------------------ small kernels


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 65, 700])
@pytest.mark.parametrize("spec", prologue_covering(), ids=lambda s: f"{s['heads']} {s['scale_mode']} {s['hadamard']}")
def test_prologue(spec, tokens, apart):
    problem = prologue_problem(
        tokens, heads=spec["heads"], k_dtype=TYPES[spec["k_dtype"]], w_dtype=TYPES[spec["w_dtype"]],
        ln_dtype=TYPES[spec["ln_dtype"]], positions=TYPES[spec["positions"]], device=CUDA, seed=tokens, apart=apart)
    options = {n: spec[n] for n in ("rope_interleave", "scale_mode", "hadamard")}
    out = jitmla.indexer_prologue(*problem.args, **options)
    check_prologue(problem, out, **options)
    again = jitmla.indexer_prologue(*problem.args, **options)
    assert all(same(a, b) for a, b in zip(out, again, strict=True))


def test_nan_stays_in_its_row_and_padding_disturbs_nobody():
    problem = prologue_problem(40, device=CUDA)
    clean = jitmla.indexer_prologue(*problem.args)
    problem.q[3, 5], problem.k_raw[7], problem.w_raw[9] = NAN, NAN, NAN
    dirty = jitmla.indexer_prologue(*problem.args)
    keep = torch.ones(40, 64, dtype=torch.bool, device=CUDA)
    keep[3, 5] = False
    assert same(clean[0][keep], dirty[0][keep])
    rows = torch.arange(40, device=CUDA) != 7
    assert same(clean[1][rows], dirty[1][rows]) and same(clean[2][rows], dirty[2][rows])
    keep[9] = False
    assert same(clean[3][keep], dirty[3][keep])


@pytest.mark.parametrize("mode", ["raw_f32", "pow2_f32"])
@pytest.mark.parametrize("rows", [1, 7, 64, 1024])
def test_cat_quant(mode, rows):
    rng = generator(rows, CUDA)
    v = torch.randn(rows, DIM, generator=rng, device=CUDA) * torch.randn(rows, 1, generator=rng, device=CUDA).exp()
    v[::7] = 0
    wide = torch.full((rows, 200), NAN, dtype=torch.bfloat16, device=CUDA)
    wide[:, 8:72], wide[:, 100:164] = v[:, :64], v[:, 64:]
    got = jitmla.cat_quant_fp8(wide[:, 8:72], wide[:, 100:164], scale_mode=mode)
    expected = jitmla.cat_quant_fp8(v[:, :60].cpu().bfloat16(), v[:, 60:].cpu().bfloat16(), scale_mode=mode)
    assert all(same(a.cpu(), b) for a, b in zip(got, expected, strict=True))
    three = jitmla.cat_quant_fp8(wide[:, None, 8:72], wide[:, None, 100:164], scale_mode=mode)
    assert all(same(a, b) for a, b in zip(got, three, strict=True))


@pytest.mark.parametrize("pad", [0, 256, 2 * PAGE * INDEX_TOKEN_BYTES], ids=["dense", "padded", "three layers"])
@pytest.mark.parametrize("tokens", [1, 8, 500])
def test_scatter_and_gather(pad, tokens):
    pages = tokens // PAGE + 5
    slots = torch.randperm(pages * PAGE, generator=generator(1, "cpu"))[:tokens]
    slots[::5] = -1
    rng = generator(2, CUDA)
    codes = torch.randint(0, 256, (tokens + 2, DIM), generator=rng, device=CUDA).byte()
    scales = torch.rand(tokens + 2, 1, generator=rng, device=CUDA)
    pool = index_pool(pages, pad, device=CUDA)
    before = pool_bytes(pool)
    jitmla.indexer_k_scatter(codes.view(FP8), scales, pool, slots.to(CUDA))
    after = pool_bytes(pool)
    assert after == scattered(before, pool.stride(0), codes, scales, slots.tolist())
    table = torch.arange(pages, dtype=I32).flip(0)[None].repeat(2, 1)
    table[1, 1] = -1
    start = torch.tensor([0, 70, 70 + 3 * PAGE], dtype=I32)
    n = int(start[-1])
    k, s = torch.full((n + 3, DIM), 7, dtype=torch.uint8, device=CUDA), torch.full((n + 3,), 7.0, device=CUDA)
    jitmla.indexer_k_gather(pool, table.to(CUDA), start.to(CUDA), n + 3, k_fp8=k.view(FP8), k_scale=s)
    if not pad:
        k2, s2 = torch.full((n + 3, DIM), 7, dtype=torch.uint8), torch.full((n + 3,), 7.0)
        jitmla.indexer_k_gather(pool.cpu(), table, start, n + 3, k_fp8=k2.view(FP8), k_scale=s2)
        assert torch.equal(k.cpu(), k2) and torch.equal(s.cpu(), s2)
    assert bool((k[n:] == 7).all()) and bool((s[n:] == 7).all()) and pool_bytes(pool) == after
    assert bool((k[70 + PAGE:70 + 2 * PAGE] == 7).all()), "the page with a negative number"


@pytest.mark.parametrize("row", ["fp8", "bf16"])
@pytest.mark.parametrize("page, pad", [(64, 0), (53, 16), (2, 32)])
def test_row_pack(row, page, pad):
    rng = generator(3, "cpu")
    pages, size = 600 // page + 1, ROW_BYTES[row]
    latent = (torch.randn(40, 512, generator=rng) * torch.randn(40, 1, generator=rng).exp() * 9).bfloat16()
    latent[1], latent[2, :128] = 0, 336
    rope = torch.randn(40, 64, generator=rng).bfloat16()
    slots = torch.randperm(pages * page, generator=rng)[:37]
    slots[::6] = -1
    storage = torch.full((pages * (page * size + pad),), 0xA5, dtype=torch.uint8)
    expected = bytearray(storage.numpy().tobytes())
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            at = slot // page * (page * size + pad) + slot % page * size
            expected[at:at + size] = packed_row(latent[t], rope[t], row)
    on_gpu = storage.to(CUDA)
    width, view = (size, on_gpu) if row == "fp8" else (size // 2, on_gpu.view(torch.bfloat16))
    cache = view.as_strided((pages, page, 1, width), (page * width + pad * width // size, width, width, 1))
    joined = torch.cat([latent, rope], 1).to(CUDA)
    jitmla.kv_row_pack(joined[:, :512], joined[:, 512:], cache, slots.to(CUDA))
    assert bytearray(on_gpu.cpu().numpy().tobytes()) == expected


@pytest.mark.parametrize("positions", [torch.int64, torch.int32])
@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("row", ["fp8", "bf16"])
@pytest.mark.parametrize("tokens, heads", [(1, 16), (37, 128), (300, 5)])
def test_append(tokens, heads, row, keys, positions):
    p = append_problem(tokens, heads, row, positions=positions, device=CUDA)
    check_append(p, row, keys)


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("workspace", [False, True])
@pytest.mark.parametrize("rows, k", [(1, 2048), (70, 512), (3, 100)])
def test_local_to_global(workspace, count, rows, k):
    rng = generator(4, CUDA)
    table = torch.randint(-1, 3000, (5, 40), generator=rng, device=CUDA, dtype=I32)
    chosen = torch.randint(-2, 45 * PAGE, (rows, k), generator=rng, device=CUDA, dtype=I32)
    request = torch.randint(0, 5, (rows,), generator=rng, device=CUDA, dtype=I32)
    start = torch.arange(5, device=CUDA, dtype=I32) * 9999
    options = {"workspace_start": start} if workspace else {
        "block_table": table, "stride_factor": 61 * PAGE, "layer_offset": 5 * PAGE}
    valid = torch.full((rows,), -7, device=CUDA, dtype=I32) if count else None
    got = jitmla.local_to_global(chosen, request, **options, valid_count=valid)
    on_cpu = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    expected = jitmla.local_to_global(chosen.cpu(), request.cpu(), **on_cpu)
    assert torch.equal(got.cpu(), expected)
    assert valid is None or torch.equal(valid.cpu(), (expected >= 0).sum(1).int())


# ------------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("rows, keys, kind, integer", [
    (1, 1, "causal", True), (3, 255, "causal", True), (5, 256, "any", True), (4, 257, "any", True),
    (130, 1000, "any", True), (517, 3001, "band", True), (65, 700, "over", True), (66, 4097, "any", False)])
def test_logits(rows, keys, kind, integer, heads):
    p = logits_problem(rows, keys, heads=heads, integer=integer, device=CUDA)
    ks, ke = (x.to(CUDA) for x in windows(rows, keys, kind))
    wide = -(-keys // 128) * 128
    column = torch.arange(keys, device=CUDA)
    inside = (column >= ks[:, None]) & (column < ke[:, None])
    exact = exact_logits(p.q, p.k, p.k_scale, p.weights)
    args = (p.q, p.k, p.k_scale, p.weights, ks, ke)
    for clean in (True, False):
        storage = torch.full((rows + 2, wide + 128), NAN, device=CUDA)
        out = jitmla.fp8_mqa_logits(*args, clean_logits=clean, out=storage[:rows, :keys])
        check_logits(out, exact, inside, integer)
        assert not clean or bool((out[~inside] == -torch.inf).all())
        assert bool(storage[rows:].isnan().all()) and bool(storage[:, wide:].isnan().all())
    storage = torch.full((rows + 2, keys + 9), NAN, device=CUDA)
    out = jitmla.fp8_mqa_logits(*args, clean_logits=False, max_seqlen_k=keys, out=storage[:rows, :keys])
    shifted = (column + ks[:, None].long()).clamp(max=keys - 1)
    length = (ke.clamp(max=keys) - ks).clamp(min=0)
    check_logits(out, exact.gather(1, shifted), column < length[:, None], integer)
    written = torch.zeros_like(storage, dtype=torch.bool)
    written[:rows, :keys] = column < length[:, None]
    assert bool(storage[~written].isnan().all())


LENGTHS = [([1], 0), ([0, 63, 64, 65, 0, 0, 255, 256, 257, 1, 0], 0), ([0, 0], 0), ([3000, 129, 8192, 777] * 10, 96)]


def paged_problem(lens, pad, heads, next_n, integer=True):
    """(problem, pool, table): pages shuffled, NaN wherever no token is."""
    pages = [-(-n // PAGE) for n in lens]
    p = logits_problem(len(lens) * next_n, max(sum(pages), 1) * PAGE, heads=heads, integer=integer, device=CUDA)
    pool = index_pool(sum(pages) + 5, pad, NAN_BYTE, CUDA)
    order = torch.randperm(sum(pages) + 5, generator=generator(5, "cpu")).int()
    table = torch.full((len(lens), max(*pages, 1) + 1), -7, dtype=I32)
    at, slots, rows = 0, [], []
    for r, n in enumerate(lens):
        table[r, :pages[r]] = order[at:at + pages[r]]
        token = torch.arange(n)
        slots.append(order[at + token // PAGE].long() * PAGE + token % PAGE)
        rows.append(at * PAGE + token)
        at += pages[r]
    rows = torch.cat(rows).to(CUDA)
    if len(rows):
        codes = p.k.view(torch.uint8)[rows].view(FP8)
        # the reference, so that the logits are checked whatever the scatter does
        jitmla.indexer_k_scatter(codes, p.k_scale[rows], pool, torch.cat(slots).to(CUDA), backend="reference")
    return p, pool, table.to(CUDA)


@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("next_n", [1, 2])
@pytest.mark.parametrize("lens, pad", LENGTHS, ids=lambda x: str(x)[:20])
def test_paged_logits(lens, pad, next_n, heads):
    p, pool, table = paged_problem(lens, pad, heads, next_n)
    given = torch.tensor(lens, dtype=I32, device=CUDA)
    columns = max(*lens, 1)
    room = -(-columns // PAGE) * PAGE
    storage = torch.full((len(lens) * next_n, room + 64), NAN, device=CUDA)
    q = p.q.view(len(lens), next_n, heads, DIM)
    jitmla.fp8_paged_mqa_logits(q, pool, p.weights, given, table, max_context_len=columns, out=storage[:, :columns])
    at = 0
    for r, n in enumerate(lens):
        rows, end = slice(r * next_n, (r + 1) * next_n), -(-n // PAGE) * PAGE
        exact = exact_logits(p.q[rows], p.k[at:at + n], p.k_scale[at:at + n], p.weights[rows])
        check_logits(storage[rows, :n], exact, torch.ones_like(exact, dtype=torch.bool), True)
        assert bool(storage[rows, end:].isnan().all())
        at += end
    both = torch.stack([given - next_n + d + 1 for d in range(next_n)], 1)
    again = jitmla.fp8_paged_mqa_logits(q, pool, p.weights, both, table, max_context_len=columns)
    front = torch.arange(columns, device=CUDA) < given.repeat_interleave(next_n)[:, None]
    assert torch.equal(again[front], storage[:, :columns][front])


def test_lengths_beyond_the_room_end_there():
    """max_context_len and the table are what the host promised: nothing is written behind them."""
    p, pool, table = paged_problem([500, 500], 0, 64, 1)
    storage = torch.full((2, 256), NAN, device=CUDA)
    given = torch.tensor([500, 500], dtype=I32, device=CUDA)
    jitmla.fp8_paged_mqa_logits(p.q[:, None], pool, p.weights, given, table, max_context_len=120,
                                out=storage[:, :120])
    assert bool(storage[:, 128:].isnan().all()) and not bool(storage[:, :120].isnan().any())


def test_an_out_without_room_is_refused():
    p = logits_problem(3, 70, device=CUDA)
    zero = torch.zeros(3, dtype=I32, device=CUDA)
    with pytest.raises(InvalidArgument, match="at least 128 elements apart"):
        jitmla.fp8_mqa_logits(p.q, p.k, p.k_scale, p.weights, zero, zero, out=torch.empty(3, 70, device=CUDA))


# ------------------------------------------------------------------------------------------------ top-k


@pytest.fixture(params=list(pick.TOPK), ids=lambda v: v.partition("/")[2])
def variant(request):
    """Whatever the sizes, this one."""
    variants = [tune.naming(Spec.of("topk_indices", arch="sm_90a", dtype="fp32", rows=rows), request.param)
                for rows in ("windows", "lengths")]
    jitmla.use_tunings({**variants[0], "variants": [v for d in variants for v in d["variants"]]})
    topk_op._calls.clear()
    yield request.param
    jitmla.use_tunings({})
    topk_op._calls.clear()


@pytest.mark.parametrize("k", [512, 1024, 2048, 3000])
def test_topk(variant, k):
    """Every distribution, poison around every row, odd starts; and the same bits again."""
    for n in (1, 511, 513, k, k + 1, 6143, 8191, 20000, 100000):
        for name, values in topk_rows(3, n, seed=n, device=CUDA):
            padded = torch.full((3, n + 300), NAN, device=CUDA)
            padded[::2] = torch.inf
            start = torch.tensor([0, 5, 10])
            for r in range(3):
                padded[r, start[r]:start[r] + n] = values[r]
            ends = (start + n).int()
            args = {"row_start": start.int().to(CUDA), "row_end": ends.to(CUDA)}
            got = jitmla.topk_indices(padded, k, **args)
            try:
                check_topk(got, exact_topk(padded, start, ends, k))
                assert torch.equal(got, jitmla.topk_indices(padded, k, **args)), "other bits the second time"
                if n > 513:
                    flat = torch.full((3,), n, dtype=I32, device=CUDA)
                    got = jitmla.topk_indices(values, k, seq_lens=flat)
                    check_topk(got, exact_topk(values, torch.zeros(3, dtype=I32), flat.cpu(), k))
            except AssertionError as e:
                raise AssertionError(f"{name}, n={n}: {e}") from e


@pytest.mark.parametrize("next_n", [1, 2, 8])
def test_topk_of_drafts(variant, next_n):
    lens = [0, 1, 2047, 2049, 20000, 163840]
    values = torch.randn(len(lens) * next_n, max(lens), generator=generator(6, CUDA), device=CUDA)
    ends = torch.tensor([max(0, n - next_n + d + 1) for n in lens for d in range(next_n)], dtype=I32)
    behind = torch.arange(max(lens), device=CUDA) >= ends.to(CUDA)[:, None]
    values.masked_fill_(behind, torch.inf)
    got = jitmla.topk_indices(values, 2048, seq_lens=torch.tensor(lens, dtype=I32, device=CUDA), next_n=next_n)
    check_topk(got, exact_topk(values, torch.zeros_like(ends), ends, 2048))


def test_topk_of_many_rows():
    rows = 2050
    values = torch.randn(rows, 9000, generator=generator(7, CUDA), device=CUDA)
    ends = torch.randint(0, 9001, (rows,), generator=generator(8, "cpu")).int()
    got = jitmla.topk_indices(values, 512, row_start=torch.zeros(rows, dtype=I32, device=CUDA), row_end=ends.to(CUDA))
    check_topk(got, exact_topk(values, torch.zeros(rows, dtype=I32), ends, 512))


def test_fifty_runs_are_bitwise_one():
    values = next(v for name, v in topk_rows(8, 40000, device=CUDA) if name == "zeros")
    lens = torch.full((8,), 40000, dtype=I32, device=CUDA)
    first = jitmla.topk_indices(values, 2048, seq_lens=lens)
    assert all(torch.equal(first, jitmla.topk_indices(values, 2048, seq_lens=lens)) for _ in range(50))


# ------------------------------------------------------------------------------------------------ graphs


def test_a_captured_step_follows_lengths_and_tables():
    """Prologue, scatter, logits, top-k, rows in one graph, replayed with other inputs, lengths and tables in place."""
    p, pool, table = paged_problem([3000, 700], 0, 64, 1)
    problem = prologue_problem(2, device=CUDA)
    lens = torch.tensor([3000, 700], dtype=I32, device=CUDA)
    slots = torch.tensor([int(table[0, 0]) * PAGE + 3, -1], device=CUDA)
    request = torch.arange(2, dtype=I32, device=CUDA)
    columns = table.shape[1] * PAGE

    def step():
        q, k, k_scale, weights = jitmla.indexer_prologue(*problem.args)
        jitmla.indexer_k_scatter(k, k_scale, pool, slots)
        logits = jitmla.fp8_paged_mqa_logits(q[:, None], pool, weights, lens, table, max_context_len=columns)
        return jitmla.local_to_global(jitmla.topk_indices(logits, 512, seq_lens=lens), request, table)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = step()
    for seed, new in ((1, [3000, 700]), (2, [513, 0]), (3, [64, 640])):
        fresh = prologue_problem(2, device=CUDA, seed=seed)
        for old, x in zip(problem.args, fresh.args, strict=True):
            old.copy_(x)
        lens.copy_(torch.tensor(new, dtype=I32))
        slots.copy_(torch.tensor([int(table[0, 0]) * PAGE + seed, -1]))
        graph.replay()
        assert torch.equal(rows, step())
