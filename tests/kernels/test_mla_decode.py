"""mla_decode on a GPU, against a float64 oracle, with everything poisoned that must not be read or must be written.

All kernels are those of tests/keysets.py, so these tests run from a prewarmed cache on a machine without the compiler:

    python -m tests.keysets                    (where the compiler is)
    python -m pytest -m gpu tests/kernels      (where the GPU is, with the same JITMLA_CACHE_DIR)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jitmla
import jitmla.ops.mla_decode as op
from jitmla import dispatch, events, schedule, workspace
from jitmla.errors import InvalidArgument, MissNotAllowed, NoTemplate
from jitmla.testing import Problem, Report, mla_decode_oracle, mla_decode_problem
from jitmla.testing_memory import guarded, poisoned_empty

from ..keysets import ROWS, covering, decode_tunings, product
from ..support.marks import ON_HOPPER
from ..support.mistakes import MISTAKES, arguments, call, check_refused

pytestmark = ON_HOPPER

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Deterministic: the same examples everywhere. 150 of them meet each Key about five times.
DRAWN = settings(max_examples=150, derandomize=True, database=None, deadline=None,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
WORST: list[Report] = []


@pytest.fixture(scope="module", autouse=True)
def summary(request):
    """Prints the worst errors of all comparisons."""
    yield
    if WORST:
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            worst_out, worst_lse = (max(WORST, key=lambda r, n=n: getattr(r, n).ratio) for n in ("out", "lse"))
            print(f"\nmla_decode: {len(WORST)} comparisons with float64; worst out: {worst_out.out}; worst lse: "
                  f"{worst_lse.lse}; worst cosine difference {max(r.cosine for r in WORST):.1e}; examples: "
                  f"derandomized, {DRAWN.max_examples}; {torch.cuda.get_device_name()}")


@pytest.fixture(scope="module", autouse=True)
def what_is_compiled():
    jitmla.use_tunings(decode_tunings())
    yield
    jitmla.use_tunings(None)


@contextlib.contextmanager
def fresh_workspace():
    """Within it no workspace is kept from earlier calls, so that the next one is allocated, and poisoned."""
    kept = dict(workspace._workspaces)
    workspace._workspaces.clear()
    try:
        yield
        for _, counters in workspace._workspaces.values():
            assert not bool(counters.any()), "a launch did not leave its counters at zero"
    finally:
        workspace._workspaces.clear()
        workspace._workspaces.update(kept)


def run(problem: Problem, out_strides=None, lse_strides=None):
    """(out, lse) of the kernel. Outputs and workspace are NaN before the call; what is around them must not change."""
    out = guarded(problem.out_shape, problem.dtype, problem.device, out_strides)
    lse = guarded(problem.out_shape[:3], torch.float32, problem.device, lse_strides)
    with fresh_workspace(), poisoned_empty() as allocated:
        got = jitmla.mla_decode(*problem.args, **problem.kwargs, out=out.tensor, lse=lse.tensor, return_lse=True,
                                backend="sm90")
    assert allocated, "the workspace was kept from an earlier call, and so not poisoned"
    assert got[0] is out.tensor and got[1] is lse.tensor
    assert out.intact() and lse.intact(), "written outside of out or lse"
    return got


def check(problem: Problem, out, lse, requests=None) -> None:
    WORST.append(mla_decode_oracle(problem, requests).check(out, lse))


def same(a, b) -> bool:
    """Bitwise equality."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


# ------------------------------------------------------------------------------------------------- drawn problems

LENGTH = st.one_of(st.sampled_from([0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511]), st.integers(0, 700))


@st.composite
def batches(draw):
    """Lengths: a few; more requests than the GPU has multiprocessors; one long among short ones; all equal."""
    kind = draw(st.sampled_from(["few", "few", "many", "long", "equal"]))
    if kind == "few":
        return draw(st.lists(LENGTH, min_size=1, max_size=12))
    rng = random.Random(draw(st.integers(0, 2**20)))
    if kind == "many":
        longest = draw(st.sampled_from([3, 64, 300, 2000]))
        return [rng.randint(0, longest) for _ in range(rng.randint(120, 170))]
    if kind == "long":
        lengths = [rng.randint(0, 200) for _ in range(rng.randint(0, 140))] + [rng.randint(3000, 20000)]
        rng.shuffle(lengths)
        return lengths
    return [draw(LENGTH)] * draw(st.sampled_from([2, 8, 32, 66, 131, 132, 133, 153]))


OUT_STRIDES = ["dense", "padded"]
LSE_STRIDES = ["dense", "heads first", "loose"]


@st.composite
def calls(draw, specs):
    """(arguments of mla_decode_problem, kind of out, kind of lse) of a call that the drawn Spec serves."""
    spec = draw(st.sampled_from(specs))
    hi = spec["rows"]
    lo = max((r for r in ROWS if r < hi), default=0) + 1
    s_q = draw(st.integers(2, 4) if spec["causal"] else st.sampled_from([1, 1, 2, 3, 4]))
    low, high = -(-lo // s_q), min(128, hi // s_q)
    usual = [h for h in (1, 2, 3, 4, 6, 8, 12, 16, 32, 33, 48, 63, 64, 65, 96, 126, 127, 128) if low <= h <= high]
    heads = draw(st.one_of(st.sampled_from(usual), st.integers(low, high)))
    arguments = dict(
        lengths=draw(batches()), heads=heads, s_q=s_q, kv_lora_rank=spec["kv_lora_rank"],
        page_size=spec["page_size"] or draw(st.sampled_from([1, 7, 100])),
        dtype=DTYPES[spec["dtype"]], causal=spec["causal"] or (s_q == 1 and draw(st.booleans())),
        sinks=draw(st.sampled_from([None, None, "finite", "mixed"])), inputs=draw(st.sampled_from(["usual", "large"])),
        query=draw(st.sampled_from(["joined", "pair", "views"])), q_pad=draw(st.sampled_from([0, 8, 64])),
        row_pad=draw(st.sampled_from([0, 8, 64])), page_pad=draw(st.sampled_from([0, 8, 520])),
        extra_table=draw(st.integers(0, 3)), spare_pages=draw(st.integers(1, 5)), first_page=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**20)))
    return arguments, draw(st.sampled_from(OUT_STRIDES)), draw(st.sampled_from(LSE_STRIDES))


def strides_of(problem: Problem, out_kind: str, lse_kind: str):
    batch, s_q, heads, rank = problem.out_shape
    out = {"dense": None, "padded": ((s_q * heads + 1) * (rank + 8), heads * (rank + 8), rank + 8, 1)}[out_kind]
    lse = {"dense": None, "heads first": (s_q * heads, 1, s_q), "loose": (7 * s_q * heads + 1, 7 * heads, 5)}[lse_kind]
    return out, lse


def check_drawn(call) -> None:
    arguments, out_kind, lse_kind = call
    problem = mla_decode_problem(**arguments, device="cuda")
    check(problem, *run(problem, *strides_of(problem, out_kind, lse_kind)))


@given(calls(covering()))
@DRAWN
def test_drawn_problems(call):
    check_drawn(call)


@pytest.mark.slow
@given(calls(product()))
@settings(DRAWN, max_examples=600)
def test_drawn_problems_of_every_key(call):
    check_drawn(call)


@pytest.mark.parametrize("spec", covering(), ids=str)
def test_every_key(spec):
    """One problem for each Key, at the fullest and at the emptiest number of rows that it serves."""
    hi = spec["rows"]
    lo = max((r for r in ROWS if r < hi), default=0) + 1
    s_q = 4 if spec["causal"] else 1
    for i, heads in enumerate((min(128, hi // s_q), -(-lo // s_q))):
        problem = mla_decode_problem([0, 1, 700, 64, 2, 129], heads=heads, s_q=s_q,
                                     page_size=spec["page_size"] or (1, 7)[i],
                                     kv_lora_rank=spec["kv_lora_rank"], dtype=DTYPES[spec["dtype"]], device="cuda",
                                     seed=i, inputs=("usual", "large")[i], sinks=(None, "mixed")[i])
        check(problem, *run(problem))


# ------------------------------------------------------------------------------------------------- splits of the work

FORMS = [(128, 1), (128, 2), (64, 1), (20, 2), (32, 1), (16, 1), (8, 2), (8, 1)]  # heads, s_q
_ragged = random.Random(0)
BATCHES = {
    "64": [64], "3": [3], "65": [65], "0,3": [0, 3], "129": [129], "4096": [4096], "65536": [65536],
    "7,1000,64": [7, 1000, 64], "8x1024": [1024] * 8, "32x4096": [4096] * 32,
    "32 ragged": [_ragged.randint(2, 9000) for _ in range(32)], "128x1024": [1024] * 128,
    "128 ragged": [_ragged.randint(0, 3000) for _ in range(128)], "150x300,3x5000": [300] * 150 + [5000] * 3,
}
# the rule's own choice; never aligned; aligned whenever it is possible at all
SPLITS = {"rule": {}, "even": {"bias": -1_000_000}, "aligned": {"bias": 1_000_000, "least": 1}}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("heads, s_q", FORMS)
def test_every_split_of_the_work(monkeypatch, heads, s_q, name):
    lengths = BATCHES[name]
    inputs = ("usual", "large")[list(BATCHES).index(name) % 2]
    problem = mla_decode_problem(lengths, heads=heads, s_q=s_q, device="cuda", seed=len(lengths), inputs=inputs)
    some = sorted({*range(0, len(lengths), max(1, len(lengths) // 6)), len(lengths) - 1})
    oracle = mla_decode_oracle(problem, some)
    rule = schedule.launch_args
    for split in SPLITS.values():
        monkeypatch.setattr(schedule, "launch_args", lambda *a, split=split, **k: rule(*a, **k)._replace(**split))
        monkeypatch.setattr(op, "_prepared", {})
        out, lse = run(problem)
        WORST.append(oracle.check(out, lse))
        assert bool(out.isfinite().all())
        assert torch.equal(lse.isfinite().all(-1).all(-1), problem.seq_lens >= s_q)


@pytest.mark.parametrize("bias", [-1_000_000, 1_000_000], ids=["even", "aligned"])
@pytest.mark.parametrize("parts", [2, 3, 9, 17, 34, 132])
def test_combine_of_few_and_of_many_parts(monkeypatch, parts, bias):
    """Also row tiles that are not full, and parts that help to combine a request without having a piece of it."""
    rule = schedule.launch_args

    def forced(*args, **options):
        launch = rule(*args, **options)
        return launch._replace(parts=min(parts, launch.parts), least=1, fixed=1, bias=bias)

    monkeypatch.setattr(schedule, "launch_args", forced)
    monkeypatch.setattr(op, "_prepared", {})
    for heads, latent, lengths in ((16, 512, [20000]), (13, 512, [3000, 0, 1, 700, 5000]), (128, 512, [9000, 100]),
                                   (100, 512, [64] * 40 + [4000]), (16, 256, [700, 9000]), (70, 256, [2000, 1, 3000])):
        problem = mla_decode_problem(lengths, heads=heads, kv_lora_rank=latent, page_size=64 if latent == 512 else 32,
                                     device="cuda", seed=heads, sinks="mixed")
        check(problem, *run(problem, lse_strides=(heads * 3, 1, 2)))


@pytest.mark.parametrize("heads, s_q", FORMS)
def test_bitwise_repeatable(heads, s_q):
    problem = mla_decode_problem([0, 5000, 1, 64, 700, 3, 2500] * 3, heads=heads, s_q=s_q, device="cuda", seed=3,
                                 sinks="finite")
    first = run(problem)
    for _ in range(4):
        again = run(problem)
        assert same(first[0], again[0]) and same(first[1], again[1])


@pytest.mark.parametrize("heads", [1, 16, 128])
def test_no_request_and_no_token(heads):
    nothing = mla_decode_problem([], heads=heads, device="cuda")
    out, lse = jitmla.mla_decode(*nothing.args, **nothing.kwargs, return_lse=True)
    assert out.shape == (0, 1, heads, 512) and lse.shape == (0, 1, heads)
    empty = mla_decode_problem([0] * 5, heads=heads, device="cuda", extra_table=0, sinks="mixed")
    assert empty.block_table.shape == (5, 0)
    out, lse = run(empty)
    assert bool((out == 0).all()) and bool((lse == float("-inf")).all())


def test_one_huge_key_behind_the_causal_limit():
    """An error of one key in the limit would put nearly all weight on a key that the token must not see."""
    for heads, s_q in ((4, 2), (4, 4), (16, 2), (15, 4), (40, 3), (128, 4)):
        problem = mla_decode_problem([s_q, 64, 65, 66, 700], heads=heads, s_q=s_q, device="cuda", seed=s_q)
        q = problem.q
        q[..., :8] = 1
        for b, length in enumerate(problem.lengths):
            page, row = divmod(length - 1, 64)
            problem.kv_cache[problem.block_table[b, page].item(), row, :8] = 100
        check(dataclasses.replace(problem, inputs="large"), *run(problem))


# ------------------------------------------------------------------------------------------------- addressing


@pytest.mark.parametrize("heads", [16, 128])
def test_cache_beyond_2_to_the_31_elements(heads):
    """Pages at the end of a cache of 4.4 GB, so that element offsets need more than 32 bits."""
    first = 2**31 // (64 * 576) + 1
    problem = mla_decode_problem([3000, 64, 0, 777], heads=heads, device="cuda", seed=1, first_page=first)
    assert problem.kv_cache.numel() > 2**31
    check(problem, *run(problem))


def test_page_stride_beyond_2_to_the_31_bytes():
    problem = mla_decode_problem([120, 33], heads=16, device="cuda", seed=2, page_pad=2**30, spare_pages=0)
    assert problem.kv_cache.stride(0) * 2 > 2**31
    check(problem, *run(problem))


@pytest.mark.parametrize("heads", [8, 128])
def test_query_and_output_beyond_2_to_the_31_elements(heads):
    """A batch whose last rows of q and out lie behind 2^31 elements; the lengths are tiny."""
    s_q = 2 if heads == 8 else 4
    batch = 2**31 // (s_q * heads * 512) + 3 if heads == 128 else 1000
    stride = None if heads == 128 else 2**31 // 990  # 8 heads: a large batch stride instead of a large batch
    problem = mla_decode_problem([b % 5 for b in range(batch)], heads=heads, s_q=s_q, device="cuda", seed=4,
                                 extra_table=1)
    if stride:
        stride -= stride % 8
        storage = torch.full((batch * stride,), float("nan"), dtype=problem.dtype, device="cuda")
        wide = storage.as_strided(problem.q.shape, (stride, *problem.q.stride()[1:]))
        wide.copy_(problem.q)
        problem = dataclasses.replace(problem, q=wide)
    out = torch.full(problem.out_shape, float("nan"), dtype=problem.dtype, device="cuda")
    out, lse = jitmla.mla_decode(*problem.args, **problem.kwargs, out=out, return_lse=True)
    check(problem, out, lse, requests=[0, 1, 2, 3, 4, *range(batch - 10, batch)])
    assert bool(out.view(torch.int16).ne(torch.tensor(float("nan"), dtype=out.dtype).view(torch.int16).item()).all())


def test_more_requests_than_a_grid_has_in_y_or_z():
    problem = mla_decode_problem([b % 3 for b in range(70_000)], heads=1, device="cuda", seed=5, extra_table=1)
    out, lse = run(problem)
    check(problem, out, lse, requests=[*range(20), *range(65_530, 65_545), *range(69_980, 70_000)])
    assert bool(out.isfinite().all())


# ------------------------------------------------------------------------------------------------- streams and graphs


def captured(call):
    """(graph, result) of `call`, captured after one eager call, as engines do."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("sinks", [None, "mixed"])
@pytest.mark.parametrize("heads, s_q", FORMS)
def test_graph_is_right_for_later_lengths(heads, s_q, sinks):
    """Captured once with short lengths; replayed with longer, no, permuted and very uneven lengths."""
    full = [4096, 64, 700, 2500, 130, 1000, 64, 6000]
    problem = mla_decode_problem(full, heads=heads, s_q=s_q, device="cuda", seed=6, sinks=sinks)
    table = problem.block_table.clone()
    problem.seq_lens.copy_(torch.tensor([17, 0, 513, 1, 2, 64, 3, 65]))
    out = torch.empty(problem.out_shape, dtype=problem.dtype, device="cuda")
    lse = torch.empty(problem.out_shape[:3], device="cuda")

    def call():
        return jitmla.mla_decode(*problem.args, **problem.kwargs, out=out, lse=lse)

    graph, _ = captured(call)
    backwards = list(range(len(full)))[::-1]
    for order, lengths in ((None, [17, 0, 513, 1, 2, 64, 3, 65]), (None, full), (None, [0] * 8),
                           (backwards, full[::-1]), (None, [0, 0, 0, 0, 0, 0, 0, 6000]), (None, [1] * 8)):
        order = order or list(range(len(full)))
        problem.block_table.copy_(table[order])
        problem.seq_lens.copy_(torch.tensor(lengths))
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        replayed = out.clone(), lse.clone()
        eager = run(problem)
        assert same(replayed[0], eager[0]) and same(replayed[1], eager[1]), lengths
        check(dataclasses.replace(problem, lengths=tuple(lengths)), *replayed)


def test_layers_in_one_graph():
    """Calls back to back, each query the output of the call before: a kernel that starts early must not read early, and
    must not overwrite the workspace that the call before still reads."""
    narrow = mla_decode_problem([3000, 40, 900, 64], heads=16, device="cuda", seed=7, query="pair")
    wide = mla_decode_problem([2000, 0, 500, 65], heads=128, device="cuda", seed=8, query="pair")

    def layers(pause=lambda: None):
        results = []
        for problem in (narrow, wide):
            x, pe = problem.q
            for _ in range(6):
                x, lse = jitmla.mla_decode((x, pe), *problem.args[1:], **problem.kwargs, return_lse=True)
                pause()
                results += [x, lse]
        return results

    expected = layers(pause=torch.cuda.synchronize)
    for got in (layers(), layers()):
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    graph, results = captured(layers)
    for _ in range(5):
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        assert all(same(a, b) for a, b in zip(results, expected, strict=True))


def test_back_to_back_calls_share_the_workspace():
    """Two hundred calls of different shapes without a pause, all in the same recycled workspace memory."""
    problems = [mla_decode_problem(lengths, heads=heads, device="cuda", seed=heads) for heads, lengths in
                ((16, [9000]), (128, [4000, 30]), (64, [1, 700, 2000]), (8, [64] * 20), (128, [100] * 140))]
    expected = []
    for problem in problems:
        expected.append(run(problem))
        torch.cuda.synchronize()
    order = random.Random(0).choices(range(len(problems)), k=200)
    results = [jitmla.mla_decode(*problems[i].args, **problems[i].kwargs, return_lse=True) for i in order]
    wrong = [i for i, (out, lse) in zip(order, results, strict=True)
             if not (same(out, expected[i][0]) and same(lse, expected[i][1]))]
    assert not wrong


def test_side_by_side():
    """In a process of its own, because a hang cannot be ended from inside: see side_by_side.py."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, sys.path)])
    with subprocess.Popen([sys.executable, "-m", "tests.kernels.side_by_side"], cwd=root, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "PYTHONPATH": path}) as process:
        try:
            output, _ = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"hung: {process.communicate()[0]}")
    assert process.returncode == 0 and output.count("right") == 4, output


def test_current_stream_is_used():
    """The inputs arrive late, on the stream that is current: a launch on any other stream reads NaN."""
    problem = mla_decode_problem([2000, 5, 64], heads=16, device="cuda", seed=9)
    expected = run(problem)
    q = torch.full_like(problem.q, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        q.copy_(problem.q)
        got = jitmla.mla_decode(q, *problem.args[1:], **problem.kwargs, return_lse=True)
    torch.cuda.current_stream().wait_stream(stream)
    assert same(got[0], expected[0]) and same(got[1], expected[1])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_call_does_not_synchronize_nor_emit_events():
    problem = mla_decode_problem([2000, 5, 64], heads=16, device="cuda")
    jitmla.mla_decode(*problem.args, **problem.kwargs)
    before = events.stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        jitmla.mla_decode(*problem.args, **problem.kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert events.stats() == before


def test_miss_during_capture_names_the_prewarm_command(monkeypatch):
    problem = mla_decode_problem([70, 5], heads=16, s_q=1, device="cuda")
    other = torch.zeros(1, device="cuda")
    jitmla.mla_decode(*problem.args, **problem.kwargs)
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setattr(op, "_prepared", {})
    with pytest.raises(MissNotAllowed) as caught, torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.add_(1)  # so that the graph is not empty
        jitmla.mla_decode(*problem.args, **problem.kwargs)
    command = re.search(r"jitmla prewarm .*", caught.value.remedy).group()
    assert command == ("jitmla prewarm --op mla_decode --arch sm_90a --spec dtype=bf16 --spec kv_dtype=bf16 "
                       "--spec kv_lora_rank=512 --spec qk_rope_head_dim=64 --spec page_size=64 --spec rows=16 "
                       "--spec causal=false")
    torch.cuda.synchronize()
    check(problem, *run(problem))  # and afterwards the op works


@pytest.mark.filterwarnings("default")  # the compiler's own warnings are not ours
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_breaks(backend):
    torch.compiler.reset()

    def layer(q, kv_cache, block_table, seq_lens, sinks):
        out, lse = jitmla.mla_decode(q * 2, kv_cache, block_table, seq_lens, kv_lora_rank=512, sm_scale=0.1,
                                     sinks=sinks, return_lse=True)
        return out + 1, lse

    problem = mla_decode_problem([70, 5, 0, 1000], heads=16, device="cuda", sinks="finite", poison=False)
    got = torch.compile(layer, fullgraph=True, backend=backend)(*problem.args, problem.sinks)
    expected = layer(*problem.args, problem.sinks)
    assert same(got[0], expected[0]) and same(got[1], expected[1])


# ------------------------------------------------------------------------------------------------- devices and refusals


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for heads in (16, 128):
        first = mla_decode_problem([300, 0, 64, 3000], heads=heads, device="cuda:0", seed=1)
        second = dataclasses.replace(first, **{name: getattr(first, name).to("cuda:1") for name in
                                               ("q", "kv_cache", "block_table", "seq_lens")})
        with torch.cuda.device(0):
            a, b = (jitmla.mla_decode(*p.args, **p.kwargs, return_lse=True) for p in (first, second))
        assert b[0].device == torch.device("cuda:1")
        assert same(a[0], b[0].to("cuda:0")) and same(a[1], b[1].to("cuda:0"))


def test_reference_backend_on_the_gpu():
    problem = mla_decode_problem([300, 0, 64, 3], heads=16, s_q=2, device="cuda", sinks="mixed")
    out, lse = jitmla.mla_decode(*problem.args, **problem.kwargs, backend="reference", return_lse=True)
    check(problem, out, lse)


def refused(problem, error, *words, **change):
    out = torch.zeros(problem.out_shape, dtype=problem.dtype, device="cuda")
    arguments = {**problem.kwargs, "out": out, **{k: v for k, v in change.items() if k != "q"}}
    with pytest.raises(error) as caught:
        jitmla.mla_decode(change.get("q", problem.q), *problem.args[1:], **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    torch.cuda.synchronize()
    assert not bool(out.any()), "written although refused"


def test_layouts_that_the_kernels_cannot_read():
    problem = mla_decode_problem([300, 64], heads=16, s_q=2, device="cuda")
    q = problem.q
    apart = torch.zeros(2, 16, 2, 576, dtype=q.dtype, device="cuda").transpose(1, 2)
    refused(problem, InvalidArgument, "q with strides", "stride(1) == heads * stride(2)", ".contiguous()", q=apart)
    loose = torch.zeros(2, 2, 16, 577, dtype=q.dtype, device="cuda")[..., :576]
    refused(problem, InvalidArgument, "q at address", "multiples of 16 bytes", q=loose)


def test_what_no_template_serves():
    refused(mla_decode_problem([300], heads=16, kv_lora_rank=128, device="cuda"), NoTemplate, "kv_lora_rank=128",
            backend="sm90")
    refused(mla_decode_problem([300], heads=16, qk_rope_head_dim=32, device="cuda"), NoTemplate, "qk_rope_head_dim=32",
            backend="sm90")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_shape_that_is_known(name):
    """The fast path remembers shapes of q and the page size; everything else about each call is checked by the compiled
    wrapper, which must refuse before it launches: tensors on the CPU, other dtypes, sizes and strides."""
    kind, argument, change = MISTAKES[name]
    for right in ({}, {"pair": lambda n, p: (n, p)}, {"sinks": torch.zeros(4)}):
        call(arguments("cuda", **right))
    given = arguments("cuda", **change)
    outputs = [given[n] for n in ("out", "lse") if n not in change]
    for _ in range(2):
        check_refused(kind, argument, given)
    torch.cuda.synchronize()
    assert all(bool((t == 7).all()) for t in outputs), "written although refused"


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(dispatch.Remembered, "MOST", 4)
    monkeypatch.setattr(op, "_prepared", dispatch.Remembered())
    for heads in range(1, 9):
        problem = mla_decode_problem([3], heads=heads, device="cuda")
        for _ in range(2):
            jitmla.mla_decode(*problem.args, **problem.kwargs)
        assert 0 < len(op._prepared) <= 4


def test_misaligned_address_in_a_remembered_layout():
    """Addresses are not part of what a call remembers: the kernel's own guard must refuse this one."""
    problem = mla_decode_problem([300, 64], heads=16, device="cuda")
    check(problem, *run(problem))
    storage = torch.zeros(problem.q.numel() + 8, dtype=problem.q.dtype, device="cuda")
    shifted = storage[1:problem.q.numel() + 1].view(problem.q.shape)
    assert shifted.stride() == problem.q.stride()
    refused(problem, InvalidArgument, "q at address", "multiples of 16 bytes", q=shifted)
