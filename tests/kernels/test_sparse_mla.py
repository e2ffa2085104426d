"""sparse_mla_decode and sparse_mla_prefill on a GPU, against a float64 oracle, with NaN in all that must not be read.

They run from a prewarmed cache on a machine without the compiler: python -m tests.keysets --op sparse_mla --all
"""

from __future__ import annotations

import pytest
import torch

import jitmla
from jitmla import registry, schedule, tune, workspace
from jitmla.errors import InvalidArgument
from jitmla.ops import sparse_mla as op
from jitmla.spec import sparse_mla_spec
from jitmla.testing_memory import poisoned_empty
from jitmla.testing_sparse import sparse_mla_oracle, sparse_mla_problem

from ..support.marks import ON_HOPPER

pytestmark = ON_HOPPER

FORMATS = [("fp8", 576), ("bf16", 576), ("bf16", 512)]
HEADS = [1, 8, 12, 16, 17, 32, 48, 64, 65, 128]
SPLITS = [{}, {"bias": -1000000}, {"bias": 1000000, "least": 1}]  # as measured; even; aligned
CASES = [
    dict(batch=1, topk=2048), dict(batch=1, topk=64), dict(batch=1, topk=1), dict(batch=1, topk=7, invalid=0.5),
    dict(batch=2, topk=100, invalid=0.3, s_q=3, page_size=53, page_pad=48, q_pad=8),
    dict(batch=3, topk=2048, lengths=[0, 1, 2048], invalid=0.1, sinks="finite"),
    dict(batch=6, topk=2048, lengths=[0, 1, 63, 64, 65, 2048], page_size=1, sinks="mixed"),
    dict(batch=8, topk=2048, invalid=0.05, sinks="mixed"), dict(batch=2, topk=512, invalid=1.0, sinks="finite"),
    dict(batch=67, topk=500, invalid=0.5), dict(batch=37, s_q=4, topk=192, large=True, page_size=2),
    dict(batch=150, topk=1024, lengths=[i * 37 % 1025 for i in range(150)], invalid=0.2),
    dict(batch=4, topk=1024, large=True, invalid=0.97), dict(batch=74, s_q=2, topk=576, page_size=61, invalid=0.02),
]


@pytest.fixture(autouse=True)
def no_tunings():
    yield
    jitmla.use_tunings({})


def variants(fmt, columns, heads):
    """(Spec, names) of all that such calls can get."""
    spec = sparse_mla_spec(arch="sm_90a", kv_format=fmt, kv_lora_rank=512, qk_rope_head_dim=columns - 512, heads=heads)
    return spec, [choice.name for choice in registry.choices(spec)]


def run(problem, **split):
    """With fresh poisoned workspace and outputs; split: launch arguments to force."""
    real = schedule.sparse_launch_args
    op._prepared.clear()
    workspace._workspaces.clear()
    schedule.sparse_launch_args = lambda *args: real(*args)._replace(**split)
    try:
        with poisoned_empty():
            out, lse = jitmla.sparse_mla_decode(*problem.args, **problem.kwargs, return_lse=True, backend="sm90")
            torch.cuda.synchronize()
        return out, lse
    finally:
        schedule.sparse_launch_args = real
        op._prepared.clear()
        workspace._workspaces.clear()


def some(batch):
    return sorted({0, 1 % batch, batch // 2, batch - 1})


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fmt, columns", FORMATS)
def test_decode(fmt, columns, case):
    for i, heads in enumerate(HEADS):
        problem = sparse_mla_problem(rows=4096, heads=heads, fmt=fmt, columns=columns, device="cuda", seed=i, **case)
        oracle = sparse_mla_oracle(problem, some(case["batch"]))
        spec, names = variants(fmt, columns, heads)
        for name in names:
            jitmla.use_tunings(tune.naming(spec, name))
            oracle.check(*run(problem, **SPLITS[i % len(SPLITS)]))


@pytest.mark.parametrize("heads, fmt, name", [(16, "fp8", None), (128, "fp8", None), (128, "bf16", "sm90_gather/bf16"),
                                              (128, "bf16", "sm90_gather_seesaw/bf16")])
def test_splits_agree_and_repeat(heads, fmt, name):
    """The three splits give the same result up to rounding, and each the same bits every time."""
    if name:
        jitmla.use_tunings(tune.naming(variants(fmt, 576, heads)[0], name))
    for batch, topk in ((3, 2048), (67, 512), (140, 256)):
        problem = sparse_mla_problem(batch=batch, topk=topk, rows=4096, heads=heads, fmt=fmt, invalid=0.1,
                                     device="cuda")
        oracle = sparse_mla_oracle(problem, some(batch))
        for split in SPLITS:
            first = run(problem, **split)
            oracle.check(*first)
            for _ in range(5):
                assert all(torch.equal(a, b) for a, b in zip(first, run(problem, **split), strict=True))


@pytest.mark.parametrize("columns", [512, 576])
@pytest.mark.parametrize("case", [
    dict(batch=1, topk=128, rows=128, invalid=1.0), dict(batch=62, topk=384, rows=114, invalid=0.3, sinks="mixed"),
    dict(batch=213, topk=256, rows=1840), dict(batch=1024, topk=2048, rows=32, invalid=0.9),
    dict(batch=500, topk=200, rows=1592, lengths=[i * 7 % 201 for i in range(500)], sinks="finite")], ids=str)
def test_prefill(columns, case):
    for heads in (8, 64, 128):
        problem = sparse_mla_problem(heads=heads, fmt="bf16", columns=columns, page_size=2, device="cuda", **case)
        oracle = sparse_mla_oracle(problem, range(0, case["batch"], max(case["batch"] // 64, 1)))
        spec, names = variants("bf16", columns, heads)
        for name in names:
            jitmla.use_tunings(tune.naming(spec, name))
            op._prepared.clear()
            out, top, lse = jitmla.sparse_mla_prefill(*problem.prefill, **problem.kwargs, backend="sm90")
            oracle.check(out[:, None], lse[..., None], top[..., None], prefill=True)


def test_many_tokens():
    """More query tokens than a grid dimension of 65535."""
    problem = sparse_mla_problem(batch=70000, topk=64, rows=4096, heads=8, fmt="bf16", device="cuda")
    out, top, lse = jitmla.sparse_mla_prefill(*problem.prefill, **problem.kwargs, backend="sm90")
    sparse_mla_oracle(problem, [0, 35000, 69999]).check(out[:, None], lse[..., None], top[..., None], prefill=True)


@pytest.mark.parametrize("heads", [16, 128])
def test_graph_replay_with_other_lists_and_lengths(heads):
    problem = sparse_mla_problem(batch=8, topk=512, rows=4096, heads=heads, lengths=[512] * 8, device="cuda")
    out = torch.empty(8, 1, heads, 512, dtype=torch.bfloat16, device="cuda")
    lse = torch.empty(8, 1, heads, device="cuda").transpose(1, 2)

    def call():
        jitmla.sparse_mla_decode(*problem.args, **problem.kwargs, out=out, lse=lse, backend="sm90")

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed in range(3):
        other = sparse_mla_problem(batch=8, topk=512, rows=4096, heads=heads, invalid=0.3, seed=seed, device="cuda",
                                   lengths=[seed, 512, 65 * seed, 64, 100, 1, 300, 511])
        for into, value in zip((*problem.args, problem.topk_length), (*other.args, other.topk_length), strict=True):
            into.copy_(value)
        out.fill_(torch.nan), lse.fill_(torch.nan)
        graph.replay()
        sparse_mla_oracle(other).check(out, lse)


def test_lse_of_any_strides():
    problem = sparse_mla_problem(batch=3, s_q=2, topk=100, rows=1000, heads=16, device="cuda")
    expected = run(problem)[1]
    lse = torch.full((3, 16, 2), torch.nan, device="cuda")
    jitmla.sparse_mla_decode(*problem.args, **problem.kwargs, lse=lse, backend="sm90")
    assert torch.equal(lse, expected)


def test_a_page_stride_beyond_31_bits():
    """Pages 2.5 GB apart."""
    step = 2_500_000_000 // 16 * 16
    storage = torch.full((2 * step + 64 * 656,), 255, dtype=torch.uint8, device="cuda")
    near = sparse_mla_problem(batch=2, topk=64, rows=192, heads=16, device="cuda")
    far = storage.as_strided((3, 64, 1, 656), (step, 656, 656, 1))
    far.copy_(near.kv)
    expected, got = (jitmla.sparse_mla_decode(near.q, kv, near.indices, sm_scale=near.sm_scale, backend="sm90")
                     for kv in (near.kv, far))
    assert torch.equal(expected, got)


def test_layouts_that_the_kernels_cannot_read():
    problem = sparse_mla_problem(batch=2, s_q=2, topk=64, rows=192, heads=16, device="cuda")
    apart = torch.cat([problem.indices] * 2, 1)[:, :2]
    for change, word in (({"indices": apart}, "indices with strides"),
                         ({"q": torch.cat([problem.q, problem.q[..., :1]], -1)[..., :576]}, "q at address"),
                         ({"topk_length": torch.ones(3, dtype=torch.int32, device="cuda")}, "topk_length"),
                         ({"attn_sink": torch.ones(3, device="cuda")}, "attn_sink")):
        arguments = {"q": problem.q, "k_cache": problem.kv, "indices": problem.indices, "sm_scale": 0.1}
        for _ in range(2):
            jitmla.sparse_mla_decode(**arguments)
            with pytest.raises(InvalidArgument, match=word):
                jitmla.sparse_mla_decode(**{**arguments, **change})
