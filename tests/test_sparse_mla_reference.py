"""The reference of sparse MLA against the float64 oracle, which shares no code with it, and golden values by hand."""

import math

import pytest
import torch

import jitmla
from jitmla.ops.sparse_reference import unpack_rows
from jitmla.testing_sparse import pack_rows, sparse_mla_oracle, sparse_mla_problem

CASES = {
    "fp8 rows": dict(batch=3, topk=70, rows=300, heads=5),
    "bf16 rows": dict(batch=3, topk=70, rows=300, heads=5, fmt="bf16"),
    "several tokens, invalid entries, mixed sinks": dict(batch=2, s_q=3, topk=40, rows=300, heads=6, invalid=0.4,
                                                         sinks="mixed"),
    "lengths": dict(batch=6, topk=65, rows=300, heads=2, lengths=[0, 1, 63, 64, 65, 33], sinks="finite"),
    "no valid entry": dict(batch=2, topk=9, rows=50, heads=2, invalid=1.0, sinks="finite"),
    "one entry": dict(batch=2, topk=1, rows=50, heads=2),
    "no entry": dict(batch=2, topk=0, rows=50, heads=2),
    "odd pages apart": dict(batch=2, topk=64, rows=300, heads=2, page_size=53, page_pad=48, q_pad=8),
    "pages of one row": dict(batch=2, topk=64, rows=300, heads=2, page_size=1, fmt="bf16"),
    "no rope part": dict(batch=2, topk=64, rows=300, heads=2, columns=512, fmt="bf16"),
    "rows of very different size": dict(batch=2, topk=64, rows=300, heads=2, large=True),
}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    for seed in range(2):
        problem = sparse_mla_problem(seed=seed, **CASES[name])
        out, lse = jitmla.sparse_mla_decode(*problem.args, **problem.kwargs, return_lse=True)
        sparse_mla_oracle(problem).check(out, lse)


@pytest.mark.parametrize("columns", [512, 576])
def test_prefill_against_float64(columns):
    problem = sparse_mla_problem(batch=70, topk=50, rows=80, heads=3, fmt="bf16", columns=columns, invalid=0.3,
                                 lengths=[i % 51 for i in range(70)], sinks="finite")
    out, top, lse = jitmla.sparse_mla_prefill(*problem.prefill, **problem.kwargs)
    sparse_mla_oracle(problem).check(out[:, None], lse[..., None], top[..., None], prefill=True)


def test_the_oracle_finds_a_wrong_result():
    problem = sparse_mla_problem(batch=2, topk=9, rows=50, heads=2, fmt="bf16")
    out, lse = jitmla.sparse_mla_decode(*problem.args, **problem.kwargs, return_lse=True)
    oracle = sparse_mla_oracle(problem)
    oracle.check(out, lse)
    for change in (lambda: out[1, 0, 1].mul_(1.05), lambda: lse[0, 1].add_(1e-3),
                   lambda: out[0, 0, 0, 7].fill_(torch.nan)):
        kept = out.clone(), lse.clone()
        change()
        with pytest.raises(AssertionError):
            oracle.check(out, lse)
        out.copy_(kept[0]), lse.copy_(kept[1])


def test_golden_sinks_and_empty_lists():
    """Two equal keys with logit x: lse = x + ln 2, out = the value; a sink scales out by exp(lse) / (exp(lse) +
    exp(sink))."""
    kv = torch.zeros(1, 4, 1, 576, dtype=torch.bfloat16)
    kv[0, :2, 0, :512] = 1.0
    kv[0, 2:] = torch.nan
    q = torch.zeros(1, 1, 3, 576, dtype=torch.bfloat16)
    q[..., 0] = 1.0
    indices = torch.tensor([[[1, -1, 0, 4, 2**31 - 1]]], dtype=torch.int32)
    scale = 1.5 - math.log(2)
    sinks = torch.tensor([0.0, 2.0, math.inf])
    out, lse = jitmla.sparse_mla_decode(q, kv, indices, sm_scale=scale, attn_sink=sinks, return_lse=True)
    assert torch.allclose(lse, torch.full((1, 3, 1), 1.5))
    assert torch.allclose(out[0, 0, :, 0].float(), torch.tensor([0.817574, 0.377541, 0.0]), atol=2e-3)
    empty = torch.full((1, 1, 5), -1, dtype=torch.int32)
    for attn_sink in (None, sinks, -sinks):
        out, lse = jitmla.sparse_mla_decode(q, kv, empty, sm_scale=scale, attn_sink=attn_sink, return_lse=True)
        assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, math.inf))
    _, top, _ = jitmla.sparse_mla_prefill(q[0], kv[0], empty, sm_scale=scale)
    assert torch.equal(top, torch.full((1, 3), -math.inf))


def test_rows_of_656_bytes():
    amax = torch.tensor([0.0, 1.0, 336.0, 448.0, 449.0])
    latent = torch.zeros(5, 512)
    latent[:, 128] = amax
    rope = torch.arange(5 * 64).view(5, 64).float() % 128
    rows, exact = pack_rows(latent, rope)
    assert rows.shape == (5, 656)
    scales = rows[:, 512:528].contiguous().view(torch.float32)
    assert scales[:, 1].tolist() == [2.0**-13, 2.0**-8, 1.0, 1.0, 2.0]
    assert torch.equal(unpack_rows(rows).double(), exact) and torch.equal(exact[:, 512:], rope.double())
