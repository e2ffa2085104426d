"""The reference of the ops around DSA's indexer against oracles in float64 and byte by byte."""

import pytest
import torch

import jitmla
from jitmla.layouts import INDEX_TOKEN_BYTES, ROW_BYTES, logits_stride
from jitmla.ops import indexer_reference
from jitmla.testing_indexer import (
    DIM,
    FP8,
    GOLDEN_ROW_SCALES,
    GOLDEN_SCALES,
    PAGE,
    append_problem,
    check_append,
    check_codes,
    check_prologue,
    exact_scales,
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

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("options", [
    {}, {"rope_interleave": True}, {"scale_mode": "raw_f32"}, {"hadamard": True},
    {"rope_interleave": True, "hadamard": True, "scale_mode": "raw_f32"}], ids=str)
@pytest.mark.parametrize("inputs", [
    {}, {"heads": 32, "k_dtype": FP32, "w_dtype": BF16, "ln_dtype": BF16, "positions": torch.int32}],
    ids=["usual", "other"])
def test_prologue(options, inputs):
    problem = prologue_problem(70, **inputs)
    check_prologue(problem, jitmla.indexer_prologue(*problem.args, **options), **options)


def test_prologue_of_strided_columns_is_the_same():
    apart, dense = prologue_problem(9, apart=True), prologue_problem(9)
    for a, b in zip(jitmla.indexer_prologue(*apart.args), jitmla.indexer_prologue(*dense.args), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_the_oracle_sees_a_wrong_prologue():
    problem = prologue_problem(9)
    out = jitmla.indexer_prologue(*problem.args, rope_interleave=True)
    with pytest.raises(AssertionError):
        check_prologue(problem, out)


@pytest.mark.parametrize("amax, scale", GOLDEN_SCALES.items())
def test_golden_scales(amax, scale):
    v = torch.zeros(1, DIM, dtype=BF16)
    v[0, 5] = amax
    codes, got = jitmla.cat_quant_fp8(v[:, :64], v[:, 64:])
    assert got.item() == scale
    if amax > 1e-3:
        assert codes[0, 5].item() * got.item() == pytest.approx(amax, rel=1 / 16)


def test_the_power_of_two_is_taken_from_the_bits():
    """exp2(ceil(log2(x))) in float32 takes the value one ulp above a power of two for that power."""
    x = torch.exp2(torch.arange(-20.0, 20.0)).view(torch.int32)
    for shift, factor in ((0, 1.0), (1, 2.0), (-1, 1.0)):
        values = (x + shift).view(FP32)
        assert torch.equal(indexer_reference.ceil_power_of_two(values), x.view(FP32) * factor)


@pytest.mark.parametrize("mode", ["raw_f32", "pow2_f32"])
@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
def test_cat_quant(mode, rows):
    torch.manual_seed(rows)
    v = (torch.randn(rows, DIM) * torch.randn(rows, 1).exp()).bfloat16()
    v[::7] = 0
    codes, scale = jitmla.cat_quant_fp8(v[:, :60], v[:, 60:], scale_mode=mode)
    exact = exact_scales(v.double().abs().amax(-1, keepdim=True), mode)
    assert torch.equal(scale.double(), exact)
    check_codes(codes, v.double(), exact)


def test_cat_quant_of_three_dimensions_with_strides_of_their_own():
    torch.manual_seed(0)
    pe, nope = torch.randn(3, 4, 200).bfloat16()[..., :64], torch.randn(4, 3, 64).bfloat16().transpose(0, 1)
    got = jitmla.cat_quant_fp8(pe, nope)
    joined = torch.cat([pe, nope], -1).view(12, DIM)
    expected = jitmla.cat_quant_fp8(joined[:, :64], joined[:, 64:])
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, expected, strict=True))


SLOTS = [3 * PAGE + 5, 0, PAGE - 1, -1, PAGE, 5 * PAGE - 1, -7, 2 * PAGE + 1]


@pytest.mark.parametrize("pad", [0, 256, 2 * PAGE * INDEX_TOKEN_BYTES], ids=["dense", "padded", "three layers"])
def test_scatter_writes_these_bytes_and_no_other(pad):
    torch.manual_seed(1)
    pool = index_pool(5, pad)
    codes, scales = torch.randint(0, 256, (len(SLOTS) + 2, DIM), dtype=torch.uint8), torch.rand(len(SLOTS) + 2, 1)
    before = pool_bytes(pool)
    jitmla.indexer_k_scatter(codes.view(FP8), scales, pool, torch.tensor(SLOTS))
    assert pool_bytes(pool) == scattered(before, pool.stride(0), codes, scales, SLOTS)


def test_gather_gives_back_what_was_scattered():
    torch.manual_seed(2)
    lens, table = [70, 0, 64, 1], torch.tensor([[4, 2, -1], [-1, -1, -1], [0, -1, 9], [3, 1, 1]], dtype=torch.int32)
    start = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32)
    n = sum(lens)
    codes, scales = torch.randint(0, 256, (n, DIM), dtype=torch.uint8), torch.rand(n)
    slots = [int(table[r, i // PAGE]) * PAGE + i % PAGE for r, length in enumerate(lens) for i in range(length)]
    pool = index_pool(6, 128)
    jitmla.indexer_k_scatter(codes.view(FP8), scales, pool, torch.tensor(slots))
    k, s = torch.full((n + 3, DIM), 7, dtype=torch.uint8), torch.full((n + 3,), 7.0)
    jitmla.indexer_k_gather(pool, table, start, n + 3, k_fp8=k.view(FP8), k_scale=s)
    assert torch.equal(k[:n], codes) and torch.equal(s[:n], scales)
    assert (k[n:] == 7).all() and (s[n:] == 7).all()


def test_a_page_is_planar():
    """The pool's shape is no record per token: a reader that took it for one would get the last scale alone, which is
    the last thing in a page either way."""
    pool = index_pool(1)
    scales = torch.arange(1.0, PAGE + 1)
    codes = torch.arange(PAGE, dtype=torch.uint8)[:, None].repeat(1, DIM)
    jitmla.indexer_k_scatter(codes.view(FP8), scales, pool, torch.arange(PAGE))
    as_records = pool[0, :, 0, DIM:].contiguous().view(FP32).flatten()
    assert (as_records == scales).nonzero().flatten().tolist() == [PAGE - 1]


@pytest.mark.parametrize("row", ["fp8", "bf16"])
@pytest.mark.parametrize("page, pad", [(64, 0), (53, 16), (2, 32)])
def test_row_pack(row, page, pad):
    torch.manual_seed(3)
    pages, size = 300 // page + 1, ROW_BYTES[row]
    latent, rope = (torch.randn(9, 512) * 30).bfloat16(), torch.randn(9, 64).bfloat16()
    latent[1] = 0
    latent[2, :128] = 336
    slots = [299, 0, -1, page - 1, page, 17, -5, 7]
    storage = torch.full((pages * (page * size + pad),), 0xA5, dtype=torch.uint8)
    expected = bytearray(storage.numpy().tobytes())
    for t, slot in enumerate(slots):
        if slot >= 0:
            at = slot // page * (page * size + pad) + slot % page * size
            expected[at:at + size] = packed_row(latent[t], rope[t], row)
    if row == "fp8":
        cache = storage.as_strided((pages, page, 1, size), (page * size + pad, size, size, 1))
    else:
        width = size // 2
        cache = storage.view(BF16).as_strided((pages, page, 1, width), ((page * size + pad) // 2, width, width, 1))
    jitmla.kv_row_pack(latent, rope, cache, torch.tensor(slots))
    assert bytearray(storage.numpy().tobytes()) == expected


@pytest.mark.parametrize("positions", [torch.int64, torch.int32])
@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("row", ["fp8", "bf16"])
def test_append(row, keys, positions):
    check_append(append_problem(37, 5, row, positions=positions), row, keys)


@pytest.mark.parametrize("amax, scale", GOLDEN_ROW_SCALES.items())
def test_golden_scales_of_rows(amax, scale):
    latent = torch.zeros(1, 512, dtype=BF16)
    latent[0, 128 + 3] = amax
    cache = torch.zeros(1, 1, 1, ROW_BYTES["fp8"], dtype=torch.uint8)
    jitmla.kv_row_pack(latent, torch.zeros(1, 64, dtype=BF16), cache, torch.tensor([0]))
    assert cache.flatten()[512:528].view(FP32)[1].item() == scale


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("rows, keys, kind", [(1, 1, "causal"), (7, 129, "any"), (30, 200, "band"), (9, 60, "over")])
def test_logits(rows, keys, kind, integer):
    p = logits_problem(rows, keys, heads=32, integer=integer)
    ks, ke = windows(rows, keys, kind)
    column = torch.arange(keys)
    inside = (column >= ks[:, None]) & (column < ke[:, None])
    exact = exact_logits(p.q, p.k, p.k_scale, p.weights)
    got = jitmla.fp8_mqa_logits(p.q, p.k, p.k_scale, p.weights, ks, ke)
    assert got.shape == (rows, keys) and got.stride(0) == logits_stride(keys)
    assert (got[~inside] == -torch.inf).all()
    check_logits(got, exact, inside, integer)
    check_logits(jitmla.fp8_mqa_logits(p.q, p.k, p.k_scale, p.weights, ks, ke, clean_logits=False), exact, inside,
                 integer)
    packed = jitmla.fp8_mqa_logits(p.q, p.k, p.k_scale, p.weights, ks, ke, clean_logits=False, max_seqlen_k=keys)
    for i in range(rows):
        cells = exact[i][inside[i]][None]
        check_logits(packed[i, :cells.shape[1]][None], cells, torch.ones_like(cells, dtype=torch.bool), integer)


@pytest.mark.parametrize("next_n", [1, 2])
def test_paged_logits(next_n):
    lens = [0, 65, 1, 130]
    p = logits_problem(len(lens) * next_n, 5 * PAGE)
    pool, table = index_pool(6), torch.full((4, 3), -1, dtype=torch.int32)
    page = 5
    out = torch.full((len(lens) * next_n, 192), float("nan"))
    for r, length in enumerate(lens):
        for i in range(-(-length // PAGE)):
            table[r, i], page = page, page - 1
        slots = [int(table[r, i // PAGE]) * PAGE + i % PAGE for i in range(length)]
        jitmla.indexer_k_scatter(p.k, p.k_scale, pool, torch.tensor(slots, dtype=torch.int64))
    q = p.q.view(len(lens), next_n, 64, DIM)
    last = torch.tensor(lens, dtype=torch.int32)
    both = torch.stack([last - next_n + 1 + d for d in range(next_n)], 1)
    for given in (last, both):
        jitmla.fp8_paged_mqa_logits(q, pool, p.weights, given, table, max_context_len=192, out=out)
        for r, length in enumerate(lens):
            rows = slice(r * next_n, (r + 1) * next_n)
            exact = exact_logits(p.q[rows], p.k[:length], p.k_scale[:length], p.weights[rows])
            assert torch.equal(out[rows, :length].double(), exact) and bool(out[rows, length:].isnan().all())


@pytest.mark.parametrize("k", [8, 64])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 2300])
def test_topk(n, k):
    for name, values in topk_rows(3, n):
        start, end = torch.tensor([0, 2, n], dtype=torch.int32), torch.tensor([n, n + 4, 0], dtype=torch.int32)
        got = jitmla.topk_indices(values, k, row_start=start, row_end=end)
        try:
            check_topk(got, exact_topk(values, start, end, k))
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from e


def test_the_oracle_of_topk_is_a_stable_sort():
    values = torch.tensor([[0.0, -0.0, 1.0, 0.0, float("nan"), -float("inf"), 1.0]])
    ends = torch.tensor([7], dtype=torch.int32)
    for k, expected in ((1, [2]), (3, [0, 2, 6]), (5, [0, 1, 2, 3, 6]), (6, [0, 1, 2, 3, 4, 6])):
        assert exact_topk(values, torch.zeros(1, dtype=torch.int32), ends, k).tolist() == [expected]


@pytest.mark.parametrize("next_n", [1, 2, 4])
def test_rows_of_drafts_see_up_to_themselves(next_n):
    lens = torch.tensor([0, 1, 5, 9], dtype=torch.int32)
    values = torch.randn(4 * next_n, 12, generator=torch.Generator().manual_seed(0))
    got = jitmla.topk_indices(values, 3, seq_lens=lens, next_n=next_n)
    for r in range(4 * next_n):
        end = max(0, int(lens[r // next_n]) - next_n + r % next_n + 1)
        check_topk(got[r:r + 1], exact_topk(values[r:r + 1], torch.zeros(1, dtype=torch.int32),
                                            torch.tensor([end], dtype=torch.int32), 3))


def test_local_to_global_golden():
    table = torch.tensor([[7, 2, -1]], dtype=torch.int32)
    tokens = torch.tensor([[-1, 0, 63, 64, 127, 128, 192]], dtype=torch.int32)
    zero, count = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    got = jitmla.local_to_global(tokens, zero, table, valid_count=count)
    assert got.tolist() == [[-1, 448, 511, 128, 191, -1, -1]] and count.tolist() == [4]
    layers = jitmla.local_to_global(tokens[:, 1:5], zero, table, stride_factor=61 * 64, layer_offset=5 * 64)
    assert layers.tolist() == [[27648, 27711, 8128, 8191]]
    start = torch.tensor([100, 1000], dtype=torch.int32)
    one = torch.ones(1, dtype=torch.int32)
    assert jitmla.local_to_global(tokens[:, :3], one, workspace_start=start).tolist() == [[-1, 1000, 1063]]


@pytest.mark.parametrize("call", [
    lambda: jitmla.indexer_prologue(*prologue_problem(0).args),
    lambda: jitmla.cat_quant_fp8(torch.zeros(0, 64, dtype=BF16), torch.zeros(0, 64, dtype=BF16)),
    lambda: jitmla.topk_indices(torch.zeros(0, 9), 4, seq_lens=torch.zeros(0, dtype=torch.int32)),
    lambda: jitmla.fp8_mqa_logits(*_logits(0, 5)),
    lambda: jitmla.fp8_mqa_logits(*_logits(5, 0)),
    lambda: jitmla.local_to_global(torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32),
                                   torch.zeros(1, 1, dtype=torch.int32))])
def test_nothing_to_do(call):
    out = call()
    for x in out if isinstance(out, tuple) else (out,):
        assert 0 in x.shape


def _logits(rows, keys):
    p = logits_problem(rows, keys)
    empty = torch.zeros(rows, dtype=torch.int32)
    return p.q, p.k, p.k_scale, p.weights, empty, empty
