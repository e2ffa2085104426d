"""Prefill on a GPU, against a float64 oracle, with NaN in all that must not be read and poison in all that is written.

All kernels are those of tests/keysets.py, so these tests run from a prewarmed cache on a machine without the compiler:

    python -m tests.keysets --op mla_prefill --op merge_attn_states --op gather_latent --op mla_decode
    python -m pytest -m gpu tests/kernels/test_mla_prefill.py            (where the GPU is, same JITMLA_CACHE_DIR)
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jitmla
from jitmla.errors import InvalidArgument, NoTemplate
from jitmla.testing import mla_decode_problem
from jitmla.testing_memory import guarded, poisoned_empty
from jitmla.testing_prefill import check_prefill, offsets, prefill_problem
from tests.keysets import HEAD_DIMS, PAGED, covering_choices
from tests.support.marks import ON_HOPPER
from tests.support.paged import check_paged

pytestmark = ON_HOPPER

DRAWN = settings(max_examples=60, derandomize=True, database=None, deadline=None,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INF = float("inf")


def attend(problem, backend="sm90"):
    """(out, lse) of the kernel, written into guarded memory full of NaN; rows behind the last request stay so."""
    out = guarded(problem.out_shape, problem.q.dtype, "cuda")
    lse = guarded(problem.out_shape[:2], torch.float32, "cuda", (1, problem.out_shape[0]))
    got = jitmla.mla_prefill(*problem.args, **problem.kwargs, out=out.tensor, lse=lse.tensor, backend=backend)
    assert got is out.tensor and out.intact() and lse.intact(), "written outside of out or lse"
    end = sum(problem.lengths_q)
    assert out.tensor[end:].isnan().all() and lse.tensor[end:].isnan().all(), "rows behind the last request written"
    return out.tensor, lse.tensor


LENGTHS = [([128], None), ([300], None), ([1], None), ([1, 64, 129, 0, 500], [700, 64, 400, 33, 77]),
           ([200, 50, 333, 0], [0, 513, 333, 0]), ([3] * 70, [130] * 70), ([700], [1500]), ([77], [0]), ([2000], None)]


ON_GPU = [c for c in covering_choices("mla_prefill") if c.spec.arch == "sm_90a"]
BACKENDS = pytest.mark.parametrize("backend", ["sm90", "portable"])


@pytest.mark.parametrize("choice", ON_GPU, ids=lambda c: f"{c.variant.name} {c.spec}")
def test_every_key(choice):
    dims = choice.spec["qk_head_dim"], choice.spec["v_head_dim"]
    for i, lengths in enumerate(LENGTHS):
        for inputs in ("usual", "sharp"):
            problem = prefill_problem(*lengths, heads=(1, 3, 5, 8)[i % 4], qk_head_dim=dims[0], v_head_dim=dims[1],
                                      keys=("pair", "joined", "heads")[i % 3], causal=choice.spec["causal"],
                                      inputs=inputs, width_pad=(0, 8)[i % 2], dtype=TYPES[choice.spec["dtype"]],
                                      device="cuda", seed=i)
            out, lse = attend(problem, choice.template.backend)
            check_prefill(problem, out, lse)
            again = attend(problem, choice.template.backend)
            end = sum(problem.lengths_q)
            assert torch.equal(out[:end], again[0][:end]) and torch.equal(lse[:end], again[1][:end])


@BACKENDS
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 700)), min_size=1, max_size=9), st.integers(1, 128),
       st.sampled_from(HEAD_DIMS), st.booleans(), st.sampled_from(["pair", "joined"]), st.integers(0, 9))
@DRAWN
def test_drawn(backend, lengths, heads, dims, causal, keys, seed):
    problem = prefill_problem(*zip(*lengths, strict=True), heads=heads, qk_head_dim=dims[0], v_head_dim=dims[1],
                              causal=causal, keys=keys, device="cuda", seed=seed, inputs=("usual", "sharp")[seed % 2])
    check_prefill(problem, *attend(problem, backend))


@BACKENDS
def test_a_maximum_that_moves_in_every_block(backend):
    """Keys that grow from the last block to the first: each moves the running maximum, by less and by more than the
    slack that the kernels give it; from below zero, across it, and above."""
    for factor, start in itertools.product((0.5, 0.9, 1.5, 4.0), (0.0, -6.0, -1000.0)):
        problem = prefill_problem([1500], heads=2, device="cuda", keys="joined", pad=0)
        problem.q.fill_(1.0)
        rise = torch.arange(1500, 0, -1, device="cuda")[:, None, None] / 128 * factor + start
        problem.k.copy_(rise / (192 * problem.sm_scale) + 0.01 * problem.k)
        check_prefill(problem, *attend(problem, backend))


@BACKENDS
def test_neighbours_do_not_touch_each_other(backend):
    """A request of NaN between others."""
    problem = prefill_problem([100, 90, 300], [130, 200, 310], heads=4, device="cuda")
    for x, first, last in ((problem.q, 100, 190), (problem.v, 130, 330), *((k, 130, 330) for k in problem.k)):
        x[first:last] = float("nan")
    check_prefill(problem, *attend(problem, backend), requests=(0, 2))


def test_lse_and_no_lse():
    problem = prefill_problem([300, 5], heads=2, device="cuda", pad=0)
    out, lse = jitmla.mla_prefill(*problem.args, **problem.kwargs, return_lse=True)
    check_prefill(problem, out, lse)
    assert torch.equal(jitmla.mla_prefill(*problem.args, **problem.kwargs), out)
    loose = torch.empty(305, 2, 3, device="cuda")[..., 1]
    jitmla.mla_prefill(*problem.args, **problem.kwargs, lse=loose)
    assert torch.equal(loose, lse)


@BACKENDS
def test_no_tokens_and_no_keys(backend):
    problem = prefill_problem([0, 0], [3, 4], heads=2, device="cuda", pad=0)
    assert jitmla.mla_prefill(*problem.args, **problem.kwargs, backend=backend).shape == (0, 2, 128)
    problem = prefill_problem([3, 4], [0, 0], heads=2, device="cuda", pad=0)
    out, lse = attend(problem, backend)
    assert (out == 0).all() and (lse == -INF).all()
    attend(prefill_problem([], [], heads=2, device="cuda", pad=3), backend)  # padding alone


@BACKENDS
@pytest.mark.parametrize("causal", [True, False])
def test_every_run_gives_the_same_bits(causal, backend):
    """Tiles that are done as soon as they are loaded: the next tile's loads come while this one is read. A buffer that
    is given back too early shows in a few rows of a few runs."""
    problem = prefill_problem([19, 1, 64, 130], [20, 0, 1, 2], heads=128, causal=causal, device="cuda", pad=0)
    first = attend(problem, backend)
    check_prefill(problem, *first)
    for _ in range(300):
        again = attend(problem, backend)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@BACKENDS
def test_a_captured_graph_is_right_for_other_lengths(backend):
    problem = prefill_problem([400, 100], [900, 100], heads=4, device="cuda", pad=0)
    out = torch.empty(problem.out_shape, dtype=torch.bfloat16, device="cuda")
    lse = torch.empty(problem.out_shape[:2], device="cuda")
    jitmla.mla_prefill(*problem.args, **problem.kwargs, out=out, lse=lse, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        jitmla.mla_prefill(*problem.args, **problem.kwargs, out=out, lse=lse, backend=backend)
    for lengths_q, lengths_k in (((400, 100), (900, 100)), ((1, 499), (0, 1000)), ((250, 250), (500, 500))):
        problem.cu_seqlens_q.copy_(offsets(lengths_q, "cuda"))
        problem.cu_seqlens_k.copy_(offsets(lengths_k, "cuda"))
        out.fill_(float("nan")), lse.fill_(float("nan"))
        graph.replay(), graph.replay()
        changed = type(problem)(problem.q, problem.k, problem.v, problem.cu_seqlens_q, problem.cu_seqlens_k,
                                problem.sm_scale, True, lengths_q, lengths_k)
        check_prefill(changed, out, lse)


def test_refusals():
    problem = prefill_problem([20], heads=2, device="cuda", pad=0)
    with pytest.raises(NoTemplate, match="qk_head_dim=80"):
        small = prefill_problem([20], heads=2, qk_head_dim=80, v_head_dim=24, device="cuda")
        jitmla.mla_prefill(*small.args, **small.kwargs)
    jitmla.mla_prefill(*problem.args, **problem.kwargs)
    q, k, v, cu_q, cu_k = problem.args
    for wrong in ((q[:, :1], k, v, cu_q, cu_k), (q, (k[0][:7], k[1]), v, cu_q, cu_k), (q, k, v[1:], cu_q, cu_k),
                  (q, k, v, cu_q[1:], cu_k), (q, (k[0], k[1][1:]), v, cu_q, cu_k)):
        with pytest.raises(InvalidArgument):
            jitmla.mla_prefill(*wrong, **problem.kwargs)
    with pytest.raises(InvalidArgument, match="lse"):
        jitmla.mla_prefill(*problem.args, **problem.kwargs, lse=torch.empty(2, 20, device="cuda"))


# ------------------------------------------------------------------------------------------------- merge, gather


@pytest.mark.parametrize("choice", [c for c in covering_choices("merge_attn_states") if c.spec.arch == "sm_90a"],
                         ids=lambda c: str(c.spec))
def test_merge(choice):
    dtype, width = TYPES[choice.spec["dtype"]], choice.spec["v_head_dim"]
    acc = {**TYPES, "fp32": torch.float32}[choice.spec["acc_dtype"]]
    for tokens, heads in ((1, 1), (7, 3), (1000, 16)):
        rng = torch.Generator(device="cuda").manual_seed(tokens)
        a, b = (torch.randn((tokens, heads, width), generator=rng, device="cuda").to(t) for t in (acc, dtype))
        lse_a, lse_b = (torch.randn((heads, tokens), generator=rng, device="cuda").t() * 9 for _ in range(2))
        for x, lse, which, empty in ((a, lse_a, 0, -INF), (b, lse_b, 1, INF)):
            gone = torch.arange(tokens, device="cuda") % 5 == which
            lse[gone], x[gone] = empty, float("nan")
        gone = torch.arange(tokens, device="cuda") % 5 == 2
        lse_a[gone], lse_b[gone] = -INF, INF
        out = guarded(a.shape, acc, "cuda", ((width + 8) * heads, width + 8, 1))
        _, lse = jitmla.merge_attn_states(a, lse_a, b, lse_b, out=out.tensor, backend="simt")
        assert out.intact()
        exact = [torch.where(x == INF, -INF, x.double()) for x in (lse_a, lse_b)]
        total = torch.logaddexp(*exact)
        parts = [torch.where(x[..., None] == -INF, 0, (x - total).exp()[..., None] * y.double())
                 for x, y in zip(exact, (a, b), strict=True)]
        expected = torch.where(total[..., None] == -INF, 0, parts[0] + parts[1])
        error = (out.tensor.double() - expected).abs()
        unit = 2.0**-8 if acc == torch.bfloat16 else 2.0**-10 if acc == torch.float16 else 2.0**-20
        assert (error <= unit * (parts[0].abs() + parts[1].abs()) + 1e-5).all()
        assert torch.equal(lse == -INF, total == -INF)
        assert torch.allclose(lse.double().nan_to_num(neginf=0), total.nan_to_num(neginf=0), atol=1e-5, rtol=1e-6)
        again = jitmla.merge_attn_states(a, lse_a, b, lse_b, out=a, lse=lse_a)
        assert again == (a, lse_a) and torch.equal(a, out.tensor) and torch.equal(lse_a, lse)


@pytest.mark.parametrize("choice", [c for c in covering_choices("gather_latent") if c.spec.arch == "sm_90a"],
                         ids=lambda c: str(c.spec))
def test_gather(choice):
    dtype, width = TYPES[choice.spec["dtype"]], choice.spec["width"]
    for page_size, lengths in ((64, [500, 0, 3, 1000]), (1, [70, 9]), (48, [5]), (16, [130] * 300)):
        problem = mla_decode_problem(lengths, heads=1, page_size=page_size, kv_lora_rank=width - 64, dtype=dtype,
                                     device="cuda", row_pad=8, page_pad=16)
        counts = [min(n, (n * 7) % 200) for n in lengths]
        starts = [(n - c) // 2 for n, c in zip(lengths, counts, strict=True)]
        out = guarded((sum(counts) + 9, width), dtype, "cuda")
        got = jitmla.gather_latent(problem.kv_cache, problem.block_table,
                                   torch.tensor(starts, dtype=torch.int32, device="cuda"), offsets(counts, "cuda"),
                                   out=out.tensor, backend="simt")
        assert got is out.tensor and out.intact() and out.tensor[sum(counts):].isnan().all()
        expected = [problem.kv_cache[problem.block_table[b].long()[i // page_size], i % page_size]
                    for b, (s, c) in enumerate(zip(starts, counts, strict=True))
                    for i in [torch.arange(s, s + c, device="cuda")]]
        assert torch.equal(out.tensor[:sum(counts)], torch.cat(expected))


# ------------------------------------------------------------------------------------------------- absorbed, paged

PREFIXES = [((300, 1, 77), (0, 0, 0)), ((19, 1, 64, 130), (1000, 0, 63, 517)), ((5,), (4000,))]


@pytest.mark.parametrize("new, prefixes", PREFIXES)
@pytest.mark.parametrize("heads, nope, rank, page, dtype", PAGED)
def test_paged(new, prefixes, heads, nope, rank, page, dtype):
    with poisoned_empty():
        check_paged(new, prefixes, heads=heads, nope=nope, v_dim=128, rank=rank, page=page, device="cuda",
                    dtype=TYPES[dtype])
