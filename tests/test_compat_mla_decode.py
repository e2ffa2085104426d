"""jitmla under the names of FlashInfer and FlashMLA, on the CPU: what is passed on, conventions, what is refused."""

import math

import pytest
import torch

import jitmla
from jitmla import events
from jitmla.compat import flash_mla, flashinfer
from jitmla.testing import mla_decode_oracle, mla_decode_problem
from jitmla.testing_features import featured

LENGTHS = [70, 0, 3, 128, 1]


def problem(**options):
    return mla_decode_problem(LENGTHS, **{"heads": 4, **options})


# ------------------------------------------------------------------------------------------------------ FlashMLA


@pytest.mark.parametrize("s_q, causal", [(1, False), (2, True), (2, False)])
def test_flash_mla(s_q, causal):
    p = problem(s_q=s_q, causal=causal)
    metadata, none = flash_mla.get_mla_metadata(p.seq_lens, s_q * 4, 1)
    assert none is None
    for _ in range(2):
        out, lse = flash_mla.flash_mla_with_kvcache(p.q, p.kv_cache.unsqueeze(2), p.block_table, p.seq_lens, 512,
                                                    metadata, None, p.sm_scale, causal)
        lonely = mla_decode_oracle(p).lse.isneginf()
        assert lse.shape == (5, 4, s_q) and bool((lse.transpose(1, 2)[lonely] == math.inf).all()) and lonely.any()
        mla_decode_oracle(p).check(out, torch.where(lonely, -math.inf, lse.transpose(1, 2)))


def test_flash_mla_default_scale_is_that_of_flash_mla():
    p = problem(sm_scale=576**-0.5)
    out, _ = flash_mla.flash_mla_with_kvcache(p.q, p.kv_cache.unsqueeze(2), p.block_table, p.seq_lens, 512,
                                              flash_mla.get_mla_metadata()[0])
    mla_decode_oracle(p).check(out)


def test_flash_mla_fp8():
    case = featured(problem(), kv="e4m3", q="e4m3")
    q, cache, table, lens = case.args
    out, lse = flash_mla.flash_mla_with_kvcache_fp8(
        q, cache.unsqueeze(2), table, lens, 512, flash_mla.get_mla_metadata()[0], None, case.kwargs["sm_scale"], False,
        case.kwargs["q_descale"], case.kwargs["kv_descale"])
    lse = lse.transpose(1, 2)
    case.check(out, torch.where(lse == math.inf, -math.inf, lse))


@pytest.mark.parametrize("change, word", [
    (dict(num_splits=torch.zeros(1)), "num_splits"), (dict(tile_scheduler_metadata=None), "tile_scheduler_metadata"),
    (dict(attn_sink=torch.zeros(4)), "attn_sink"), (dict(indices=torch.zeros(5, 1, 8)), "indices"),
    (dict(block_table=None), "block_table"), (dict(is_fp8_kvcache=True), "is_fp8_kvcache"),
    (dict(cache_seqlens=torch.zeros(5, dtype=torch.int64)), "seq_lens"), (dict(head_dim_v=576), "kv_lora_rank"),
    (dict(q=torch.zeros(5, 1, 4, 500, dtype=torch.bfloat16)), "q"), (dict(q=torch.zeros(5, 4, 576)), "q")])
def test_flash_mla_refuses(change, word):
    p = problem()
    given = dict(q=p.q, k_cache=p.kv_cache.unsqueeze(2), block_table=p.block_table, cache_seqlens=p.seq_lens,
                 head_dim_v=512, tile_scheduler_metadata=flash_mla.get_mla_metadata()[0])
    with pytest.raises(flash_mla.Refused, match=word) as caught:
        flash_mla.flash_mla_with_kvcache(**{**given, **change})
    assert isinstance(caught.value, (RuntimeError, AssertionError)) and caught.value.remedy


def test_flash_mla_metadata_is_for_one_shape():
    p, other = problem(), problem(heads=8)
    metadata, _ = flash_mla.get_mla_metadata()
    for each in (p, p):
        flash_mla.flash_mla_with_kvcache(each.q, each.kv_cache.unsqueeze(2), each.block_table, each.seq_lens, 512,
                                         metadata)
    with pytest.raises(AssertionError, match="num_heads_q = 8 with metadata that was used with 4"):
        flash_mla.flash_mla_with_kvcache(other.q, other.kv_cache.unsqueeze(2), other.block_table, other.seq_lens, 512,
                                         metadata)


# ------------------------------------------------------------------------------------------- FlashInfer, trtllm


def trtllm(p, **change):
    given = dict(query=p.q, kv_cache=p.kv_cache, workspace_buffer=None, qk_nope_head_dim=128,
                 kv_lora_rank=p.kv_lora_rank, qk_rope_head_dim=64, block_tables=p.block_table, seq_lens=p.seq_lens,
                 max_seq_len=128, bmm1_scale=p.sm_scale)
    return flashinfer.trtllm_batch_decode_with_kv_cache_mla(**{**given, **change})


@pytest.mark.parametrize("s_q, sinks", [(1, None), (2, "finite")])
def test_trtllm(s_q, sinks):
    p = problem(s_q=s_q, sinks=sinks, kv_lora_rank=256)
    oracle = mla_decode_oracle(p)
    oracle.check(trtllm(p, sinks=[p.sinks] if sinks else None))
    oracle.check(trtllm(p, sinks=p.sinks, kv_cache=p.kv_cache.unsqueeze(1)))
    oracle.check(trtllm(p, sinks=p.sinks, uses_shared_paged_kv_idx=False,
                        block_tables=torch.stack([p.block_table, p.block_table], 1)))
    out = torch.full(p.out_shape, float("nan"), dtype=p.dtype)
    assert trtllm(p, sinks=p.sinks, out=out, bmm2_scale=2.0) is out
    oracle.check(out / 2)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("q", ["plain", "e4m3"])
def test_trtllm_fused_scales(q, on_device):
    """bmm1 = sm_scale * q_scale * k_scale, bmm2 = v_scale: three different numbers, none of them 1."""
    case = featured(problem(), kv="e4m3", q=q, descale="float")
    q_scale, kv_scale = case.kwargs.get("q_descale", 1.0), case.kwargs["kv_descale"]
    query, cache, table, lens = case.args
    scales = case.kwargs["sm_scale"] * q_scale * kv_scale, kv_scale

    def call():
        return flashinfer.trtllm_batch_decode_with_kv_cache_mla(
            query, cache, None, 128, 512, 64, table, lens, 128,
            bmm1_scale=torch.tensor(scales[0]) if on_device else scales[0],
            bmm2_scale=torch.tensor([scales[1]]) if on_device else scales[1])

    if on_device and q == "plain":
        with pytest.raises(ValueError, match="bmm scales on the device"):
            call()
        return
    mla_decode_oracle(case.exact).check(call())


@pytest.mark.parametrize("change, word", [
    (dict(query=torch.zeros(5, 4, 576, dtype=torch.bfloat16)), "query"),
    (dict(kv_cache=torch.zeros(2, 576, dtype=torch.bfloat16)), "kv_cache"),
    (dict(kv_cache=torch.zeros(2, 2, 64, 576, dtype=torch.bfloat16)), "kv_cache"),
    (dict(kv_lora_rank=256), "width 576"), (dict(sparse_mla_top_k=8), "sparse_mla_top_k"),
    (dict(skip_softmax_threshold_scale_factor=1.0), "skip_softmax"), (dict(backend="trtllm-gen"), "backend"),
    (dict(uses_shared_paged_kv_idx=False), "block_tables"), (dict(sinks=[torch.zeros(4)] * 2), "sinks"),
    (dict(bmm1_scale=torch.ones(1)), "bmm scales"),
    (dict(bmm2_scale=torch.ones(1, dtype=torch.bfloat16)), "bmm2_scale"),
    (dict(block_tables=torch.zeros(3, 2, dtype=torch.int32)), "block_table")])
def test_trtllm_refuses(change, word):
    with pytest.raises(ValueError, match=word):
        trtllm(problem(), **change)


# ------------------------------------------------------------------------------------------ FlashInfer, wrapper


def lists(p):
    """(kv_indptr, kv_indices) of a problem, and pages behind the last that do not exist."""
    size = p.kv_cache.shape[1]
    counts = [-(-n // size) for n in p.lengths]
    pages = [p.block_table[b, j] for b, c in enumerate(counts) for j in range(c)]
    return (torch.tensor([0, *counts]).cumsum(0).int(),
            torch.tensor([*pages, 1 << 30], dtype=torch.int32))


def planned(p, q_lens=None, wrapper=None, **hints):
    q_lens = q_lens or [p.out_shape[1]] * len(p.lengths)
    indptr, indices = lists(p)
    wrapper = wrapper or flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(0))
    rank = p.kv_lora_rank
    wrapper.plan(torch.tensor([0, *q_lens]).cumsum(0).int(), indptr, indices, p.seq_lens, p.out_shape[2], rank,
                 p.kv_cache.shape[2] - rank, p.kv_cache.shape[1], p.causal, p.sm_scale, p.dtype, p.dtype, **hints)
    return wrapper


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("base_e", [False, True])
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("s_q", [1, 2])
def test_wrapper(page_size, base_e, views, s_q):
    p = problem(page_size=page_size, s_q=s_q)
    wrapper = planned(p)
    nope, pe = (part.flatten(0, 1) for part in p.q_parts)
    parts = p.kv_cache[..., :512], p.kv_cache[..., 512:]
    assert torch.is_tensor(flashinfer._joined(*parts)) and isinstance(flashinfer._joined(parts[0], parts[1].clone()),
                                                                       tuple)
    ckv, kpe = parts if views else (part.contiguous() for part in parts)
    oracle = mla_decode_oracle(p)
    out, lse = wrapper.run(nope, pe, ckv, kpe, return_lse=True, return_lse_base_on_e=base_e)
    assert out.shape == (5 * s_q, 4, 512) and lse.shape == (5 * s_q, 4)
    factor = 1.0 if base_e else math.log(2)
    oracle.check(out.unflatten(0, (5, s_q)), lse.unflatten(0, (5, s_q)) * factor)
    given = torch.full_like(out, float("nan")), torch.full_like(lse, float("nan"))
    again = wrapper.run(nope, pe, ckv, kpe, *given, return_lse=True, return_lse_base_on_e=base_e)
    assert again[0] is given[0] and again[1] is given[1]
    assert torch.equal(given[0], out) and torch.equal(given[1], lse)
    assert torch.equal(wrapper.run(nope, pe, ckv, kpe), out)


def test_wrapper_with_ragged_queries():
    q_lens = [3, 1, 0, 2, 1]
    case = featured(problem(s_q=3), q_lens=q_lens)
    wrapper = planned(case.exact, q_lens)
    q, cache, *_ = case.args
    out, lse = wrapper.run(q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], return_lse=True,
                           return_lse_base_on_e=True)
    case.check(out, lse)


def test_wrapper_keeps_its_buffers_for_graphs():
    """What a captured graph has seen stays where it is when the next plan has fewer or more pages."""
    p = problem()
    indptr, indices = lists(p)
    buffers = (torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32),
               torch.zeros(64, dtype=torch.int32), torch.zeros(5, dtype=torch.int32))
    wrapper = flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(0), True, *buffers)
    planned(p, wrapper=wrapper, max_pages=4)
    table, first = wrapper._table, wrapper._table.clone()
    other = mla_decode_problem([10, 200, 0, 64, 65], heads=4, seed=2)
    planned(other, wrapper=wrapper, max_pages=4)
    assert wrapper._table is table and not torch.equal(table, first) and wrapper._kv_len is buffers[3]
    nope, pe = (part.flatten(0, 1) for part in other.q_parts)
    out = wrapper.run(nope, pe, other.kv_cache[..., :512], other.kv_cache[..., 512:])
    mla_decode_oracle(other).check(out.unflatten(0, (5, 1)))
    with pytest.raises(ValueError, match="max_pages"):
        planned(mla_decode_problem([300, 0, 0, 0, 0], heads=4), wrapper=wrapper)


def test_wrapper_with_host_lists_asks_nothing():
    before = events.stats()
    planned(problem())
    assert events.stats() == before


@pytest.mark.parametrize("change, word", [
    (dict(q_data_type=torch.float16), "q_nope of"), (dict(kv_data_type=torch.float16), "ckv_cache of"),
    (dict(num_heads=8), "8 heads"), (dict(page_size=16), "pages of 16")])
def test_wrapper_refuses_what_was_not_planned(change, word):
    p = problem()
    indptr, indices = lists(p)
    plan = dict(qo_indptr=torch.arange(6, dtype=torch.int32), kv_indptr=indptr, kv_indices=indices,
                kv_len_arr=p.seq_lens, num_heads=4, head_dim_ckv=512, head_dim_kpe=64, page_size=64, causal=False,
                sm_scale=1.0, q_data_type=p.dtype, kv_data_type=p.dtype)
    wrapper = flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(0))
    nope, pe = (part.flatten(0, 1) for part in p.q_parts)
    run = (nope, pe, p.kv_cache[..., :512], p.kv_cache[..., 512:])
    with pytest.raises(ValueError, match="run before plan"):
        wrapper.run(*run)
    wrapper.plan(**{**plan, **change})
    with pytest.raises(ValueError, match=word):
        wrapper.run(*run)
    with pytest.raises(ValueError, match="use_profiler"):
        wrapper.plan(**plan, use_profiler=True)
    with pytest.raises(ValueError, match="use_cuda_graph"):
        flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(0), True)


def test_public_names_do_not_load_the_peers():
    import sys
    assert jitmla.mla_decode and "flash_mla" not in sys.modules and "flashinfer" not in sys.modules
