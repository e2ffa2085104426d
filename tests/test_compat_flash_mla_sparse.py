"""FlashMLA's sparse calls over jitmla: the same results under its names, and what it refuses."""

import pytest
import torch

import jitmla
from jitmla.compat import flash_mla_sparse
from jitmla.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from jitmla.compat.flash_mla_sparse import flash_mla_sparse_fwd, sparse_with_kvcache
from jitmla.errors import InvalidArgument
from jitmla.testing_sparse import sparse_mla_oracle, sparse_mla_problem


@pytest.mark.parametrize("fmt", ["fp8", "bf16"])
def test_decode(fmt):
    """Cases of FlashMLA's test_flash_mla_sparse_decoding, on the CPU: page sizes 2, 61 and 64, s_q 1 and 3, -1
    entries."""
    for rows, topk, page_size, s_q in ((512, 64, 2, 1), (1024, 576, 61, 3), (512, 64, 64, 1)):
        p = sparse_mla_problem(batch=4, s_q=s_q, topk=topk, rows=rows, heads=64, fmt=fmt, page_size=page_size,
                               invalid=0.1, sinks="mixed", sm_scale=576**-0.55)
        out, lse = sparse_with_kvcache(*p.args, 512, p.sm_scale, False, fmt == "fp8", attn_sink=p.attn_sink)
        sparse_mla_oracle(p).check(out, lse)


def test_through_its_one_decode_function():
    p = sparse_mla_problem(batch=2, s_q=2, topk=9, rows=100, heads=4, sinks="finite", lengths=[3, 9])
    out, lse = flash_mla_with_kvcache(p.q, p.kv, None, None, 512, get_mla_metadata()[0], softmax_scale=p.sm_scale,
                                      is_fp8_kvcache=True, indices=p.indices, attn_sink=p.attn_sink,
                                      topk_length=p.topk_length)
    sparse_mla_oracle(p).check(out, lse)


def test_lists_with_gaps_are_copied(monkeypatch):
    """FlashMLA takes any strides, the kernels evenly spaced query tokens."""
    p = sparse_mla_problem(batch=3, s_q=2, topk=9, rows=100, heads=4)
    apart = torch.cat([p.indices] * 2, 1)[:, :2]
    given = []
    monkeypatch.setattr(flash_mla_sparse, "sparse_mla_decode",
                        lambda *args, **kwargs: given.append(args[2]) or jitmla.sparse_mla_decode(*args, **kwargs))
    out, lse = sparse_with_kvcache(p.q, p.kv, apart, 512, p.sm_scale, False, True)
    sparse_mla_oracle(p).check(out, lse)
    assert apart.stride(0) != given[0].stride(0) == 2 * given[0].stride(1)


def test_its_default_scale():
    p = sparse_mla_problem(batch=2, topk=9, rows=100, heads=4, sm_scale=576**-0.5)
    out, lse = sparse_with_kvcache(*p.args, 512, None, False, True)
    sparse_mla_oracle(p).check(out, lse)


@pytest.mark.parametrize("columns", [512, 576])
def test_prefill(columns):
    """Cases of FlashMLA's test_flash_mla_sparse_prefill, on the CPU: lists longer than the pool, lengths, sinks."""
    for rows, topk in ((128, 128), (95, 128), (592, 128), (114, 384)):
        p = sparse_mla_problem(batch=13, topk=topk, rows=rows, heads=64, fmt="bf16", columns=columns, invalid=0.1,
                               sinks="finite", lengths=[i * topk // 12 for i in range(13)], sm_scale=0.5, page_size=1)
        out, top, lse = flash_mla_sparse_fwd(*p.prefill, p.sm_scale, attn_sink=p.attn_sink, topk_length=p.topk_length)
        sparse_mla_oracle(p).check(out[:, None], lse[..., None], top[..., None], prefill=True)


def test_what_is_refused_is_of_flash_mlas_types():
    p = sparse_mla_problem(batch=2, topk=9, rows=100, heads=4)
    call = [*p.args, 512, 0.1, False, True]
    for change, word in (((5, True), "causal"), ((6, False), "is_fp8_kvcache"), ((3, 256), "256 columns"),
                         ((1, p.kv[..., :600]), "k_cache")):
        wrong = list(call)
        wrong[change[0]] = change[1]
        for kind in (RuntimeError, AssertionError, InvalidArgument):
            with pytest.raises(kind, match=word):
                sparse_with_kvcache(*wrong)
    with pytest.raises(RuntimeError, match="extra_k_cache"):
        sparse_with_kvcache(*call, extra_k_cache=p.kv, extra_indices_in_kvcache=None)
    q, kv, indices = sparse_mla_problem(batch=2, topk=9, rows=100, heads=4, fmt="bf16").prefill
    with pytest.raises(RuntimeError, match="d_v|columns"):
        flash_mla_sparse_fwd(q, kv, indices, 0.1, d_v=256)
    with pytest.raises(RuntimeError, match="indices"):
        flash_mla_sparse_fwd(q, kv, indices.long(), 0.1)
    assert jitmla.sparse_mla_prefill(q, kv, indices, sm_scale=0.1)[0].shape == (2, 4, 512)
