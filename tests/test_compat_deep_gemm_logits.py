"""DeepGEMM's indexer logits in jitmla.compat: its calls, its windows and lengths, its bound on the difference; here in
small and with the reference, in tests/kernels/test_compat_deep_gemm_logits.py in its sizes on a GPU."""

import pytest
import torch

import jitmla
from jitmla.compat import deep_gemm
from jitmla.errors import InvalidArgument
from jitmla.testing_indexer import PAGE, index_pool
from jitmla.testing_logits import exact_logits, logits_problem
from jitmla.testing_o_proj import calc_diff

I32 = torch.int32
DIFF = 1e-3


def windows(rows, tokens, parallel):
    """Causal, aligned at the end; parallel: those of one rank that has a chunk of the beginning and one of the end."""
    if not parallel:
        return torch.zeros(rows, dtype=I32), torch.arange(rows, dtype=I32) + tokens - rows
    chunk, ranks = rows // 2, tokens // rows
    rank, i = ranks // 3, torch.arange(chunk, dtype=I32)
    return torch.zeros(rows, dtype=I32), torch.cat([rank * chunk + i, (2 * ranks - 1 - rank) * chunk + i])


def check_ragged(rows, tokens, parallel, compressed, device="cpu"):
    p = logits_problem(rows, tokens, integer=False, device=device)
    ks, ke = (x.to(device) for x in windows(rows, tokens, parallel))
    longest = int((ke - ks).max())
    got = deep_gemm.fp8_mqa_logits(p.q, (p.k, p.k_scale), p.weights, ks, ke, clean_logits=not compressed,
                                   max_seqlen_k=longest if compressed else 0)
    assert got.shape == (rows, longest if compressed else tokens)
    column = torch.arange(tokens, device=device)
    inside = (column >= ks[:, None]) & (column < ke[:, None])
    exact = exact_logits(p.q, p.k, p.k_scale, p.weights)
    if compressed:
        got = torch.nn.functional.pad(got, (0, tokens - longest))  # windows start at column 0
    else:
        assert torch.equal(got == -torch.inf, ~inside)
    assert calc_diff(got[inside], exact[inside]) < DIFF


def check_paged(requests, next_n, average, lengths_by_query, device="cpu"):
    rng = torch.Generator().manual_seed(requests)
    lengths = torch.randint(int(0.7 * average), int(1.3 * average), (requests,), generator=rng)
    width = -(-int(lengths.max()) // PAGE)
    p = logits_problem(requests * next_n, PAGE * width, integer=False, device=device)
    pool = index_pool(requests * width, 0, device=device)
    table = torch.randperm(requests * width, generator=rng).view(requests, width).to(device)
    order = [torch.randperm(PAGE * width, generator=rng).to(device) for _ in range(requests)]  # each its own keys
    for r in range(requests):
        slots = (table[r, :, None] * PAGE + torch.arange(PAGE, device=device)).flatten()
        jitmla.indexer_k_scatter(p.k[order[r]], p.k_scale[order[r]], pool, slots, backend="reference")
    by_query = (lengths[:, None] - next_n + 1 + torch.arange(next_n)).to(device)
    given = (by_query if lengths_by_query else lengths.to(device)).int()
    meta = deep_gemm.get_paged_mqa_logits_metadata(given, PAGE, 132)
    got = deep_gemm.fp8_paged_mqa_logits(p.q.view(requests, next_n, -1, 128), pool, p.weights, given, table.int(), meta,
                                         PAGE * width)
    assert got.shape == (requests * next_n, PAGE * width)
    found, expected = [], []
    for row, end in enumerate(by_query.flatten().tolist()):
        keys = order[row // next_n][:end]
        found.append(got[row, :end])
        expected.append(exact_logits(p.q[row:row + 1], p.k[keys], p.k_scale[keys], p.weights[row:row + 1])[0])
    assert calc_diff(torch.cat(found), torch.cat(expected)) < DIFF


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_ragged(parallel, compressed):
    check_ragged(16, 64, parallel, compressed)


@pytest.mark.parametrize("lengths_by_query", [False, True])
@pytest.mark.parametrize("next_n", [1, 2, 4])
def test_paged(next_n, lengths_by_query):
    check_paged(3, next_n, 150, lengths_by_query)


def test_cleaned_pages_are_refused():
    p, pool = logits_problem(1, 64), index_pool(1, 0)
    with pytest.raises(InvalidArgument, match="clean_logits"):
        deep_gemm.fp8_paged_mqa_logits(p.q[:, None], pool, p.weights, torch.ones(1, dtype=I32),
                                       torch.zeros(1, 1, dtype=I32), None, 64, clean_logits=True)
