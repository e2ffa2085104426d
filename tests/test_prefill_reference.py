"""The prefill ops on CPU tensors against float64: the references, the absorbed form, and any chunking of a prefix."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jitmla
from jitmla import pick
from jitmla.bench.cases import PREFILL_PAGED
from jitmla.ops.mla_prefill_absorbed import group_size
from jitmla.spec import mla_prefill_spec
from jitmla.testing import mla_decode_problem
from jitmla.testing_prefill import check_prefill, exact_attention, offsets, prefill_problem

from .support.paged import check_paged

DRAWN = settings(max_examples=60, deadline=None, derandomize=True, database=None)
INF = float("inf")


@st.composite
def requests(draw, most=40):
    batch = draw(st.integers(1, 5))
    lengths = st.lists(st.integers(0, most), min_size=batch, max_size=batch)
    return draw(lengths), draw(lengths)


@given(requests(), st.sampled_from([1, 2, 3]), st.booleans(), st.sampled_from(["joined", "pair", "heads"]),
       st.sampled_from([(192, 128), (128, 128), (80, 24)]), st.sampled_from([torch.bfloat16, torch.float16]),
       st.sampled_from(["usual", "sharp"]))
@DRAWN
def test_mla_prefill(lengths, heads, causal, keys, dims, dtype, inputs):
    problem = prefill_problem(*lengths, heads=heads, causal=causal, keys=keys, qk_head_dim=dims[0], v_head_dim=dims[1],
                              dtype=dtype, inputs=inputs, seed=sum(lengths[0]))
    out = torch.full(problem.out_shape, 7.0, dtype=dtype)
    lse = torch.full(problem.out_shape[:2], 7.0)
    assert jitmla.mla_prefill(*problem.args, **problem.kwargs, out=out, lse=lse) is out
    check_prefill(problem, out, lse)
    end = sum(lengths[0])
    assert (out[end:] == 7).all() and (lse[end:] == 7).all(), "rows behind the last request were written"
    for row, tokens, length in zip(offsets(lengths[0], "cpu").tolist(), *lengths, strict=False):
        unseen = tokens if length == 0 else max(tokens - length, 0) if causal else 0
        assert (out[row:row + unseen] == 0).all() and (lse[row:row + unseen] == -INF).all()


def test_lse_has_its_tokens_innermost():
    problem = prefill_problem([3, 4], heads=2)
    out, lse = jitmla.mla_prefill(*problem.args, **problem.kwargs, return_lse=True)
    assert lse.shape == (12, 2) and lse.stride() == (1, 12) and out.is_contiguous()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=7), st.booleans(), st.integers(0, 1000))
@DRAWN
def test_merging_any_partition_of_the_keys_is_attention_to_all(parts, wide, seed):
    """Two- to seven-way partitions, in drawn order, empty parts among them; a part without keys may hold NaN."""
    tokens, heads = 5, 3
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn((n, heads, 16), generator=rng).bfloat16() for n in (tokens, sum(parts), sum(parts)))
    out = lse = None
    bounds = offsets(parts, "cpu").tolist()
    for i in torch.randperm(len(parts), generator=rng).tolist():
        keys = slice(bounds[i], bounds[i + 1])
        part, part_lse, *_ = exact_attention(q, k[keys], v[keys], 0.3, False)
        if not parts[i]:
            part, part_lse = torch.full_like(part, float("nan")), torch.full_like(part_lse, (-INF, INF)[seed % 2])
        part, part_lse = part.bfloat16(), part_lse.float()
        if out is None:
            out, lse = part.float() if wide else part, part_lse
        else:
            out, lse = jitmla.merge_attn_states(out, lse, part, part_lse)
    exact, exact_lse, spread, _ = exact_attention(q, k, v, 0.3, False)
    if len(parts) > 1:
        error = (out.double() - exact).abs() - (2.0**-8 if wide else len(parts) * 2.0**-8) * spread
        assert (error <= 1e-6).all()
        assert torch.equal(lse.isinf(), exact_lse.isinf())
        assert torch.allclose(lse.double().nan_to_num(neginf=0), exact_lse.nan_to_num(neginf=0), atol=2e-6)


def test_merge_in_place():
    a, b = torch.randn(4, 2, 8).bfloat16(), torch.randn(4, 2, 8).bfloat16()
    lse_a, lse_b = torch.randn(2, 4).t(), torch.randn(4, 2)
    out, lse = jitmla.merge_attn_states(a, lse_a, b, lse_b)
    assert jitmla.merge_attn_states(a, lse_a, b, lse_b, out=a, lse=lse_a) == (a, lse_a)
    assert torch.equal(out, a) and torch.equal(lse, lse_a)


@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_gather_latent(page_size):
    problem = mla_decode_problem([100, 0, 33, 1], heads=1, page_size=page_size, row_pad=8, page_pad=16)
    starts, counts = torch.tensor([31, 0, 0, 0], dtype=torch.int32), [69, 0, 12, 1]
    out = torch.full((90, 576), 7.0, dtype=torch.bfloat16)
    cu_rows = offsets(counts, "cpu")
    assert jitmla.gather_latent(problem.kv_cache, problem.block_table, starts, cu_rows, out=out) is out
    for b, (start, count) in enumerate(zip(starts.tolist(), counts, strict=True)):
        for i in range(count):
            page = problem.block_table[b, (start + i) // page_size]
            assert torch.equal(out[cu_rows[b] + i], problem.kv_cache[page, (start + i) % page_size])
    assert (out[sum(counts):] == 7).all()


def test_group_size():
    for heads in (*range(1, 129), 126):
        for new in (1, 2, 3, 5, 64, 500):
            size = group_size(heads, new)
            assert 1 <= size * heads <= 512 and (size >= new or size == 512 // heads)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=5), st.sampled_from([1, 3, 40]),
       st.booleans())
@settings(DRAWN, max_examples=20)
def test_absorbed(lengths, heads, causal):
    """Equal to one decode call per request, whatever the groups."""
    new = [n for n, _ in lengths]
    total = [n + prefix for n, prefix in lengths]
    base = mla_decode_problem(total, heads=heads, kv_lora_rank=64, qk_rope_head_dim=16, page_size=16)
    rng = torch.Generator().manual_seed(sum(total))
    q = torch.full((sum(new) + 2, heads, 80), float("nan"), dtype=torch.bfloat16)
    q[:sum(new)] = torch.randn((sum(new), heads, 80), generator=rng).bfloat16()
    out = torch.full((sum(new) + 2, heads, 64), 7.0, dtype=torch.bfloat16)
    lse = torch.full((sum(new) + 2, heads), 7.0)
    cu = offsets(new, "cpu")
    jitmla.mla_prefill_absorbed(q, base.kv_cache, base.block_table, base.seq_lens, cu, max_seqlen_q=max(9, *new),
                                kv_lora_rank=64, sm_scale=0.2, causal=causal, out=out, lse=lse)
    assert (out[sum(new):] == 7).all() and (lse[sum(new):] == 7).all()
    for b, n in enumerate(new):
        for i in range(n):
            row, behind = cu[b] + i, (n - 1 - i) if causal else 0
            one, one_lse = jitmla.mla_decode(q[row][None, None], base.kv_cache, base.block_table[b:b + 1],
                                             base.seq_lens[b:b + 1] - behind, kv_lora_rank=64, sm_scale=0.2,
                                             return_lse=True)
            assert torch.allclose(out[row].float(), one[0, 0].float(), atol=1e-2, rtol=2e-2)
            assert torch.allclose(lse[row], one_lse[0, 0], atol=1e-4)


@pytest.mark.parametrize("new, prefixes, heads, nope, rank, page", [
    ((30, 1, 77), (0, 0, 0), 8, 64, 512, 64), ((19, 1, 64), (300, 0, 63), 4, 128, 512, 64),
    ((5,), (1000,), 16, 128, 512, 64), ((4, 1, 19), (5, 64, 16), 3, 32, 64, 16)])
def test_paged_is_right_in_both_forms_and_for_any_chunking(new, prefixes, heads, nope, rank, page):
    check_paged(new, prefixes, heads=heads, nope=nope, v_dim=128, rank=rank, device="cpu", page=page)


DEEPSEEK = dict(kv_lora_rank=512, qk_head_dim=192, qk_nope_head_dim=128, v_head_dim=128, sms=132)


def test_form():
    def even(**options):
        """The first number of new tokens that the MHA form takes."""
        sizes = {**DEEPSEEK, "heads": 128, "requests": 1, "prefix": 10**6, **options}
        return next(n for n in range(1, 4096) if pick.prefill_form(new=n, **sizes)[0] == "mha")

    assert 100 < even() <= 171, "the products alone come to 171"
    mistral = dict(kv_lora_rank=256, qk_head_dim=128, qk_nope_head_dim=64)
    assert 100 < even(**mistral) <= 154
    assert even(prefix=1000) < even(prefix=10000) and even(prefix=0) < 8, "launches count where little else does"
    assert even(heads=16, prefix=8192) > even(heads=128, prefix=8192), "few heads leave multiprocessors idle"


def test_what_is_chosen_is_what_was_faster():
    """The figures of the benchmark: a form that was more than 5 % slower is never taken."""
    path = Path(__file__).parents[1] / "docs" / "benchmarks" / "mla_prefill_paged_h200.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == len(PREFILL_PAGED)
    for row in rows:
        case = row["case"]
        form, why = pick.prefill_form(heads=case["heads"], requests=case["batch"], new=case["new"],
                                      prefix=case["prefix"], **DEEPSEEK)
        times = {name: row["times"][name]["us"] for name in ("mha", "absorbed")}
        assert times[form] <= 1.05 * min(times.values()), (case, times, why)


def test_the_form_is_said(seen):
    base = mla_decode_problem([12005], heads=1, kv_lora_rank=512, page_size=64)
    jitmla.mla_prefill_paged(torch.zeros(5, 16, 192).bfloat16(), base.kv_cache, base.block_table, base.seq_lens,
                             offsets([5], "cpu"), torch.zeros(16 * 256, 512).bfloat16(), max_seqlen_q=5,
                             max_prefix=12000, v_head_dim=128, sm_scale=0.2)
    chosen = next(e for e in seen if e.kind == "choose" and e.fields["op"] == "mla_prefill_paged")
    assert chosen.fields["backend"] == "absorbed" and "5 new tokens behind 12000" in chosen.fields["why"]
    spec = mla_prefill_spec(arch="sm_90a", dtype="bf16", qk_head_dim=192, v_head_dim=128, qk_rope_head_dim=64,
                            causal=True)
    found = jitmla.explain(spec, **DEEPSEEK, heads=16, requests=1, new=5, prefix=12000)
    assert found["form"] == f"absorbed: {chosen.fields['why']}"
    assert jitmla.explain(spec)["form"].startswith("by heads, requests, new, prefix")

