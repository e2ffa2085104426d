"""append_latent and cached_mla on a GPU: against float64 and the reference, with all poisoned that must not be read.

All kernels are those of tests/keysets.py, so these tests run from a prewarmed cache on a machine without the compiler:

    python -m tests.keysets --op append_latent --op cached_mla --attention        (where the compiler is)
    python -m pytest -m gpu tests/kernels/test_cached_mla.py                      (where the GPU is)
"""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jitmla
import jitmla.torch_ops_cached  # registers the ops
from jitmla import events, workspace
from jitmla.compat import trtllm
from jitmla.errors import InvalidArgument
from jitmla.testing_cached import bits, cached_problem, check_cached
from jitmla.testing_memory import guarded, poisoned_empty

from ..keysets import CACHED, CACHED_MORE, DEEPSEEK_V3, MISTRAL_4, covering_choices
from ..support.marks import ON_HOPPER

pytestmark = ON_HOPPER

# Deterministic: the same examples everywhere.
DRAWN = settings(max_examples=80, derandomize=True, database=None, deadline=None,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def dims(point):
    return dict(nope=point.nope, rank=point.rank, rope=point.rope, value=point.value, e4m3=point.e4m3,
                dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[point.dtype])


MISTRAL, DEEPSEEK = dims(MISTRAL_4), dims(DEEPSEEK_V3)
APPEND = [c for c in covering_choices("append_latent") if c.spec.arch == "sm_90a"]


def call(problem, **options):
    """out of the kernels, written into a poisoned tensor whose surroundings must not change; scratch is poisoned."""
    heads = problem.q_nope.shape[2]
    value = problem.weight.shape[0] // heads - problem.q_nope.shape[3]
    out = guarded((*problem.q_nope.shape[:3], value), problem.q_nope.dtype, "cuda")
    kept = dict(workspace._bytes)
    workspace._bytes.clear()
    try:
        with torch.inference_mode(), poisoned_empty():
            got = jitmla.cached_mla(*problem.args, **problem.kwargs, out=out.tensor, **options)
    finally:
        workspace._bytes.clear()
        workspace._bytes.update(kept)
    assert got is out.tensor and out.intact(), "written outside of out"
    return got


def check(problem, **options):
    out = call(problem, **options)
    check_cached(problem, out)
    again = problem.again()
    assert torch.equal(bits(call(again, **options)), bits(out)), "two calls differ"
    return out


@st.composite
def problems(draw):
    cached = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 500]), st.integers(0, 900))
    new = st.one_of(st.sampled_from([0, 1, 2, 15, 16, 17, 64]), st.integers(0, 100))
    kind = draw(st.sampled_from(["prefill", "decode", "mixed", "mixed"]))
    rows = draw(st.sampled_from([False, False, True]))
    return dict(
        prefill=draw(st.lists(st.tuples(cached, new), min_size=1, max_size=6)) if kind != "decode" else [],
        decode=draw(st.lists(cached, min_size=1, max_size=draw(st.sampled_from([6, 40])))) if kind != "prefill" else [],
        heads=draw(st.one_of(st.sampled_from([1, 3, 4, 6, 8, 12, 16, 32, 96, 128]), st.integers(1, 128))),
        gap=0 if rows else draw(st.sampled_from([0, 0, 3])), tail=draw(st.sampled_from([0, 0, 5])), rows=rows,
        strided=draw(st.booleans()), max_seq_len=1024, seed=draw(st.integers(0, 2**20)))


@given(problems(), st.booleans())
@DRAWN
def test_drawn_problems(arguments, wide_v):
    check(cached_problem(**arguments, **{**DEEPSEEK, "value": 256 if wide_v else 128}, device="cuda"))


@given(problems(), st.booleans(), st.booleans(), st.integers(1, 4))
@DRAWN
def test_drawn_problems_in_the_mha_form(arguments, alone, deepseek, longer):
    """alone: no sequence has a prefix, and the host says so. longer: sequences of several blocks of mla_prefill."""
    arguments["prefill"] = [(0 if alone else cached // longer, new * longer) for cached, new in arguments["prefill"]]
    if not deepseek:
        arguments["heads"] = 32
    check(cached_problem(**arguments, **(DEEPSEEK if deepseek else MISTRAL), device="cuda"), form="mha",
          max_prefix=0 if alone else None)


POINTS = [dict(prefill=[(0, 150), (77, 200), (0, 0), (300, 31)], decode=[9, 400]),
          dict(prefill=[(0, 130), (5, 140)], gap=3, tail=5), dict(decode=[0, 63, 64, 300, 7])]


@pytest.mark.parametrize("form", ["absorbed", "mha"])
@pytest.mark.parametrize("point", [*CACHED, *CACHED_MORE], ids=str)
def test_every_point(point, form):
    if form == "mha" and not point.mha:
        pytest.skip("there is no kernel of mla_prefill for it, or it is the same")
    for i, arguments in enumerate(POINTS):
        problem = cached_problem(**arguments, heads=point.heads, max_seq_len=512 if point.page == 64 else 550, seed=i,
                                 device="cuda", **dims(point))
        check(problem, form=form, backend=point.backend)


@pytest.mark.parametrize("tokens, max_prefix, form", [(2000, None, "mha"), (100, None, "absorbed"), (200, 0, "mha")])
def test_auto_says_what_it_takes(tokens, max_prefix, form):
    import jitmla.ops.cached_mla as op

    problem = cached_problem([(0, tokens)], heads=32, max_seq_len=2048, **MISTRAL, device="cuda")
    op._prepared.clear()
    said = []
    unsubscribe = events.subscribe(said.append)
    out = check(problem, max_prefix=max_prefix)
    unsubscribe()
    assert [e.fields["backend"] for e in said if e.fields.get("op") == "cached_mla" and "why" in e.fields] == [form]
    assert torch.equal(bits(call(problem.again(), form=form, max_prefix=max_prefix)), bits(out))


@pytest.mark.parametrize("arguments", [
    dict(decode=[2047]), dict(decode=[511] * 8), dict(decode=list(range(0, 640, 20))), dict(prefill=[(0, 128)]),
    dict(prefill=[(0, 512)]), dict(prefill=[(0, 700), (100, 333)]),
    dict(prefill=[(7, 300), (0, 500)], decode=[3, 900], tail=2), dict(prefill=[(0, 2048)]),
    dict(prefill=[(1000, 1000)])], ids=str)
def test_mistral_small_4(arguments):
    check(cached_problem(**arguments, heads=32, max_seq_len=2048, **MISTRAL, device="cuda"))


@pytest.mark.parametrize("form", ["absorbed", "mha"])
def test_many_tokens_go_in_several_launches(monkeypatch, form):
    import jitmla.ops.cached_launch as launch
    import jitmla.ops.cached_mla as op

    arguments = dict(prefill=[(100, 150), (0, 333), (0, 0), (5, 70)], decode=[9], heads=32, max_seq_len=512, **MISTRAL)
    monkeypatch.setattr(launch, "LAUNCH_BYTES", 5 * 16 * 32 * 256 * 2)  # five tiles, or the heads in groups
    op._prepared.clear()
    check(cached_problem(**arguments, device="cuda"), form=form)
    groups = [p.groups for p in op._prepared.values()]
    if form == "mha":
        assert any(len(g[0].prefix) > 7 and len(g[0].scratch.tensors(0)[-1]) > 1 for g in groups)
    else:
        assert any(len(g) > 8 for g in groups)
    op._prepared.clear()


@pytest.mark.parametrize("form", ["absorbed", "mha"])
def test_offsets_pass_32_bits(form):
    """Slot 27 of 262144 tokens of width 320: its last row is 4.7 GB behind the first one, and beyond 2^31 elements."""
    length, slots = 262144, 28
    cache = torch.empty(slots, length, 320, dtype=torch.bfloat16, device="cuda")
    small = cached_problem([(40, 9)], [63, 20], heads=32, max_seq_len=64, spare_slots=0, **MISTRAL, device="cuda")
    where = {slot: new for slot, new in zip((s for _, _, s, _ in small.sequences), (27, 26, 25), strict=True)}
    problem = small.again()
    for old, new in where.items():
        cache[new].fill_(float("nan"))
        cache[new, :64] = problem.before[old]
    object.__setattr__(problem, "kv_cache", cache)
    problem.metadata["slot_idx"][:3] = torch.tensor([where[s] for _, _, s, _ in small.sequences], dtype=torch.int32)
    out = call(problem, form=form)
    view = small.again()
    for old, new in where.items():
        view.kv_cache[old] = cache[new, :64]
        assert bool(cache[new, 64:].isnan().all())
    check_cached(view, out)
    # and at the end of a slot: a decode token at its last position, whose keys are all alike
    rows = torch.randn(1, 320, device="cuda").bfloat16()
    cache[27] = rows
    last = cached_problem(decode=[63], heads=32, max_seq_len=64, spare_slots=0, **MISTRAL, device="cuda")
    object.__setattr__(last, "kv_cache", cache)
    last.metadata["slot_idx"][0], last.metadata["input_pos"][0] = 27, length - 1
    last.latent.copy_(rows[None, :, :256])
    last.k_pe.copy_(rows[None, None, :, 256:])
    cache[27, -1] = float("nan")
    got = call(last, form=form)[0, 0].double()
    exact = torch.einsum("r,hvr->hv", rows[0, :256].double(), last.weight.double().view(32, 192, 256)[:, 64:])
    assert float((got - exact).norm() / exact.norm()) < 1e-2
    assert torch.equal(cache[27, -1], rows[0])


@pytest.mark.parametrize("form", ["absorbed", "mha"])
def test_no_call_waits_for_the_device(form):
    arguments = dict(prefill=[(5, 30), (0, 70)], decode=[12, 0, 500], heads=32, max_seq_len=512, **MISTRAL)
    problem = cached_problem(**arguments, tail=3, device="cuda")
    call(problem, form=form)
    torch.cuda.synchronize()
    info = torch.tensor([2, 100, 0, 0, 3, 3], dtype=torch.int32)
    m = problem.metadata
    with warnings.catch_warnings():  # it is called a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            jitmla.cached_mla(*problem.args, **problem.kwargs, form=form)
            trtllm.triton_cached_mla_with_cache(*problem.args[:5], info, m["seq_len"], m["input_pos"], m["slot_idx"],
                                                m["cu_seqlen"], problem.kv_cache, problem.sm_scale, 256)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", ["absorbed", "mha"])
def test_schemas_and_compiled_calls(form):
    """opcheck with the kernels; compiled, what reads the cache behind the call sees its rows; all is bitwise eager."""
    problem = cached_problem([(5, 30), (0, 70)], [12, 63], heads=32, max_seq_len=128, tail=3, **MISTRAL, device="cuda")
    problem.kv_cache.nan_to_num_(), problem.before.nan_to_num_()
    for x in problem.args[:4]:
        x.nan_to_num_()
    inputs = (*problem.args, *problem.metadata.values(), *problem.counts.values(), problem.sm_scale, None, None, form,
              "auto")
    torch.library.opcheck(torch.ops.jitmla.cached_mla, inputs, test_utils=("test_schema", "test_faketensor"))

    def layer(q_nope, kv_cache):
        out = jitmla.cached_mla(q_nope * 1.0, *problem.args[1:5], kv_cache, **problem.kwargs, form=form)
        return out * 2, kv_cache.float().sum(-1)

    found = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        cache = problem.before.clone()
        with torch.inference_mode():
            found.append((*call(problem.q_nope, cache), cache))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][2], problem.before)


def test_one_graph_for_all_metadata():
    """Replayed with other positions and slots, and with fewer requests: the other rows are in the spare slot."""
    batch, spare = 6, 11
    first = cached_problem(decode=[5, 70, 0, 300, 64, 1], heads=32, max_seq_len=512, spare_slots=6, device="cuda",
                           **MISTRAL)
    with torch.inference_mode():
        jitmla.cached_mla(*first.args, **first.kwargs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = jitmla.cached_mla(*first.args, **first.kwargs)
        for seed, live in ((1, 6), (2, 4), (3, 1)):
            other = cached_problem(decode=[17 * seed, 500, 3, 0, 64, 129][:live], heads=32, max_seq_len=512,
                                   spare_slots=12 - live, seed=seed, **MISTRAL, device="cuda")
            first.kv_cache.copy_(other.before)
            first.weight.copy_(other.weight)
            for mine, its in zip(first.args[:4], other.args[:4], strict=True):
                mine[:live].copy_(its)
            used = {slot for _, _, slot, _ in other.sequences}
            unused = next(s for s in range(spare, -1, -1) if s not in used)
            first.metadata["slot_idx"][:batch] = unused
            first.metadata["input_pos"][:batch] = 0
            for name in ("slot_idx", "input_pos"):
                first.metadata[name][:live] = other.metadata[name][:live]
            graph.replay()
            expected = jitmla.cached_mla(*other.args, **other.kwargs)
            check_cached(other, expected)
            assert torch.equal(bits(out[:live]), bits(expected))
            others = [s for s in range(12) if s != unused]
            assert torch.equal(bits(first.kv_cache[others]), bits(other.kv_cache[others]))


@pytest.mark.parametrize("form", ["absorbed", "mha"])
def test_one_graph_for_all_lengths(form):
    """A captured prefill, replayed with the same counts in other sequences: prefixes where there were none."""
    def problem(seed, prefill):
        return cached_problem(prefill, [30], heads=32, max_seq_len=512, seed=seed, tail=4, device="cuda", **MISTRAL)

    first = problem(0, [(0, 200), (0, 100)])
    with torch.inference_mode():
        jitmla.cached_mla(*first.args, **first.kwargs, form=form)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = jitmla.cached_mla(*first.args, **first.kwargs, form=form)
        for seed, prefill in ((1, [(37, 120), (200, 180)]), (2, [(0, 299), (64, 1)]), (3, [(0, 0), (0, 300)])):
            other = problem(seed, prefill)
            for mine, its in zip(first.args, other.args, strict=True):
                mine.copy_(its)
            for name, its in other.metadata.items():
                first.metadata[name].copy_(its)
            graph.replay()
            expected = jitmla.cached_mla(*other.args, **other.kwargs, form=form)
            check_cached(other, expected)
            assert torch.equal(bits(out), bits(expected))
            assert torch.equal(bits(first.kv_cache), bits(other.kv_cache))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("form", ["absorbed", "mha"])
def test_many_calls_in_a_row_are_bitwise_alike(form, captured):
    """Two problems take turns in one scratch, which is overwritten between some of the calls; torch makes the queries
    right before a call, and reads its result right after: no kernel may start too early, or go on too long."""
    arguments = dict(prefill=[(0, 400), (200, 300), (0, 0), (130, 131)], decode=[9, 400, 77], heads=32, max_seq_len=512,
                     gap=3, tail=5, **MISTRAL, device="cuda")
    problems = [cached_problem(**arguments, seed=seed) for seed in range(2)]
    identity = torch.eye(64, dtype=torch.bfloat16, device="cuda")
    project = torch.randn(32 * 128, 256, dtype=torch.bfloat16, device="cuda")
    q_nope = torch.empty_like(problems[0].q_nope)

    def step(p):
        """The call, with matrix products of torch before and behind it."""
        torch.mm(p.q_nope.view(-1, 64), identity, out=q_nope.view(-1, 64))
        out = jitmla.cached_mla(q_nope, *p.args[1:], **p.kwargs, form=form)
        product = out.view(-1, 32 * 128) @ project
        q_nope.fill_(float("nan"))
        return out, product

    with torch.inference_mode():
        for p in problems:
            p.q_nope.nan_to_num_()
        expected = [[x.clone() for x in step(p)] for p in problems]
        for p, (out, _) in zip(problems, expected, strict=True):
            check_cached(p, out)
        run = [functools.partial(step, p) for p in problems]
        if captured:
            run = []
            for p in problems:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    results = step(p)
                run.append(lambda graph=graph, results=results: (graph.replay(), results)[1])
        differ = torch.zeros((), dtype=torch.int64, device="cuda")
        for i in range(400):
            if i % 4 == 3:
                for scratch in workspace._bytes.values():
                    scratch.fill_((0xFF, 0x7F, 0x3C, 0)[i // 4 % 4])
            for found, wanted in zip(run[i % 2](), expected[i % 2], strict=True):
                differ += (bits(found) != bits(wanted)).sum()
        assert int(differ) == 0
        for p in problems:
            check_cached(p, jitmla.cached_mla(*p.args, **p.kwargs, form=form))


def test_calls_of_as_many_tiles_share_their_launches():
    """New numbers of tokens do not choose kernels anew, and are still right: other lengths, other places."""
    import jitmla.ops.cached_launch as launch

    launch._absorbed.clear()
    for tokens in (193, 200, 207):
        check(cached_problem([(5, tokens - 90), (0, 90)], [7], heads=32, max_seq_len=256, tail=tokens % 3, **MISTRAL,
                             device="cuda"), form="absorbed")
    assert len(launch._absorbed) == 2


@pytest.mark.parametrize("form", ["absorbed", "mha"])
def test_calls_in_and_out_of_inference_mode_share_their_scratch(form):
    problem = cached_problem([(0, 40), (5, 9)], [7], heads=32, max_seq_len=64, **MISTRAL, device="cuda")
    kept = dict(workspace._bytes)
    workspace._bytes.clear()
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with mode:
            check_cached(problem, jitmla.cached_mla(*problem.args, **problem.kwargs, form=form))
    workspace._bytes.update(kept)


def test_calls_on_two_streams_have_their_own_scratch():
    problems = [cached_problem(decode=[500] * 8, heads=32, max_seq_len=512, seed=i, **MISTRAL, device="cuda")
                for i in range(2)]
    streams = [torch.cuda.Stream() for _ in problems]
    with torch.inference_mode():
        expected = [jitmla.cached_mla(*p.args, **p.kwargs) for p in problems]
        torch.cuda.synchronize()
        for _ in range(50):
            got = []
            for p, stream in zip(problems, streams, strict=True):
                with torch.cuda.stream(stream):
                    got.append(jitmla.cached_mla(*p.args, **p.kwargs))
            torch.cuda.synchronize()
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("form", ["absorbed", "mha"])
def test_a_sequence_without_a_slot_is_skipped(form):
    problem = cached_problem([(3, 40), (0, 20)], [7], heads=32, max_seq_len=64, **MISTRAL, device="cuda")
    problem.metadata["slot_idx"][1] = -1
    out = call(problem, form=form)
    assert not out[0, 40:60].any() and out[0, 60].any() and out[0, :40].isfinite().all()
    slot = problem.sequences[1][2]
    assert torch.equal(bits(problem.kv_cache[slot]), bits(problem.before[slot]))


@pytest.mark.parametrize("form", ["absorbed", "mha"])
def test_beyond_the_slot_nothing_is_written(form):
    problem = cached_problem([(40, 10)], [30, 3], heads=32, max_seq_len=64, **MISTRAL, device="cuda")
    problem.metadata["input_pos"][0] = 60  # ten tokens from 60 on, of 64
    problem.metadata["input_pos"][1] = 64
    problem.kv_cache[problem.sequences[0][2]].nan_to_num_()
    out = call(problem, form=form)
    touched = (bits(problem.kv_cache) != bits(problem.before)).any(-1)
    allowed = torch.zeros_like(touched)
    allowed[problem.sequences[0][2]] = True
    allowed[problem.sequences[2][2], 3] = True
    assert not (touched & ~allowed).any() and out[0, 11].isfinite().all()


def test_what_the_kernels_refuse():
    problem = cached_problem(decode=[7, 3], heads=32, max_seq_len=64, **MISTRAL, device="cuda")
    call(problem)
    shifted = problem.latent.new_empty(problem.latent.numel() + 1)[1:].view(problem.latent.shape)
    args = list(problem.args)
    args[2] = shifted
    with pytest.raises(InvalidArgument, match="multiples of 16 bytes"), torch.inference_mode():
        jitmla.cached_mla(*args, **problem.kwargs)
    args[2] = problem.latent
    args[4] = problem.weight.float()
    with pytest.raises(Exception, match="kv_b_proj_weight"), torch.inference_mode():
        jitmla.cached_mla(*args, **problem.kwargs)


# ------------------------------------------------------------------------------------------------- append_latent


def append_call(choice, tokens, page_size, seed=0, pages=None):
    """Arguments of an append_latent that `choice` serves; some tokens have no place."""
    s = choice.spec
    rng = torch.Generator(device="cuda").manual_seed(seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[s["dtype"]]
    rank, rope = s["kv_lora_rank"], s["qk_rope_head_dim"]
    pages = pages or -(-tokens // page_size) + 3
    rows = torch.randn(tokens, rank + rope + 8, generator=rng, device="cuda").mul_(3).to(dtype)
    if tokens:
        rows[0, :3] = torch.tensor([6e4, -6e4, float("inf")])
    size = (pages, page_size + 1, rank + rope + 16)
    cache = torch.full(size, 0x7F, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn) if s["e4m3_cache"] \
        else torch.full(size, float("nan"), dtype=dtype, device="cuda")
    slots = torch.randperm(pages * page_size, generator=rng, device="cuda")[:tokens]
    slots[1::7], slots[2::7] = -1, pages * page_size + 5
    scale = torch.tensor([0.013], device="cuda") if s["e4m3_cache"] else None
    return (rows[:, :rank], rows[:, rank:rank + rope], cache[:, :page_size, :rank + rope],
            slots.to({"i32": torch.int32, "i64": torch.int64}[s["slots"]])), scale, cache


@pytest.mark.parametrize("choice", APPEND, ids=lambda c: str(c.spec))
def test_every_key_of_append(choice):
    """The same bytes as the reference, also around the rows: strides, saturation, places that do not exist."""
    for i, (tokens, page_size) in enumerate([(1, 64), (3, 1), (77, 16), (1000, 100), (4097, 64), (0, 64)]):
        args, scale, whole = append_call(choice, tokens, page_size, seed=i)
        expected_args, _, expected = append_call(choice, tokens, page_size, seed=i)
        jitmla.append_latent(*args, kv_scale=scale, backend="portable")
        jitmla.append_latent(*expected_args, kv_scale=scale, backend="reference")
        assert torch.equal(bits(whole), bits(expected))
        assert tokens == 0 or bool((bits(args[2]) != bits(whole)[0, 0, -1]).any()), "nothing was written"


def test_append_in_a_graph():
    choice = next(c for c in APPEND if c.spec["slots"] == "i64" and not c.spec["e4m3_cache"])
    args, _, whole = append_call(choice, 40, 16, pages=9)
    jitmla.append_latent(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        jitmla.append_latent(*args)
    for seed in (1, 2):
        others, _, expected = append_call(choice, 40, 16, seed=seed, pages=9)
        whole.fill_(float("nan"))
        args[0].copy_(others[0]), args[1].copy_(others[1]), args[3].copy_(others[3])
        graph.replay()
        jitmla.append_latent(*others, backend="reference")
        assert torch.equal(bits(whole), bits(expected))


def test_append_offsets_pass_32_bits():
    choice = next(c for c in APPEND if c.spec["kv_lora_rank"] == 512 and c.spec["qk_rope_head_dim"] == 64
                  and c.spec["dtype"] == "bf16" and not c.spec["e4m3_cache"] and c.spec["slots"] == "i64")
    pages = 2**31 // (64 * 576) + 5
    (latent, k_pe, _, slots), _, _ = append_call(choice, 4, 64)
    cache = torch.empty(pages, 64, 576, dtype=torch.bfloat16, device="cuda")
    cache[:5].fill_(float("nan"))
    slots[:] = torch.tensor([pages * 64 - 1, pages * 64 - 65, 0, 70])
    jitmla.append_latent(latent, k_pe, cache, slots)
    got = torch.stack([cache[-1, -1], cache[-2, -1], cache[0, 0], cache[1, 6]])
    assert torch.equal(bits(got), bits(torch.cat([latent, k_pe], -1)))
    assert int((~cache[:5].isnan()).any(-1).sum()) == 2


def test_several_kernels_agree_on_a_model(monkeypatch):
    """The tiny model of the examples, on the GPU: the same tokens as plain PyTorch."""
    from ..test_tiny_model import tiny

    model = tiny.TinyMla(tiny.Config(), seed=tiny.SEED, device="cuda")
    rng = torch.Generator().manual_seed(tiny.SEED)
    prompts = [torch.randint(model.config.vocab_size, (n,), generator=rng).tolist() for n in (5, 40, 70)]
    with torch.inference_mode():
        expected = [tiny.generate_plain(model, prompt, 16)[0] for prompt in prompts]
        assert tiny.generate_paged(model, prompts, 16) == expected
        assert tiny.generate_slots(model, prompts, 16) == expected
