"""DeepSeek-V4's output path on a GPU, against float64 oracles, with all poisoned that must not be read or is written.

All kernels are those of tests/keysets.py, so these tests run from a prewarmed cache on a machine without the compiler:

    python -m tests.keysets --op inv_rope_fp8_quant --op fp8_bmm        (where the compiler is)
    python -m pytest -m gpu tests/kernels/test_o_proj.py                (where the GPU is, same JITMLA_CACHE_DIR)
"""

from __future__ import annotations

import re
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jitmla
from jitmla import dispatch, events, layouts, pick, tune
from jitmla.compat import deep_gemm, vllm
from jitmla.errors import InvalidArgument, MissNotAllowed, NoTemplate
from jitmla.ops import fp8_bmm as bmm_op
from jitmla.testing_memory import guarded
from jitmla.testing_o_proj import (
    CHAIN_DIFF,
    FP8,
    GOLDEN,
    ProductProblem,
    calc_diff,
    check_product,
    check_quant,
    cos_sin_table,
    exact_chain,
    golden_row,
    product_problem,
    quant_problem,
)
from tests.keysets import ARCH, covering_choices
from tests.support.marks import ON_HOPPER

pytestmark = ON_HOPPER

# Deterministic: the same examples everywhere.
DRAWN = settings(max_examples=60, derandomize=True, database=None, deadline=None,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
QUANT = [c for c in covering_choices("inv_rope_fp8_quant") if c.spec.arch == ARCH]
BMM = covering_choices("fp8_bmm")
TYPES = {"i32": torch.int32, "i64": torch.int64}


@pytest.fixture
def picked():
    """picked(choice): from now on this variant is picked, whatever the sizes."""
    yield lambda choice: jitmla.use_tunings(tune.naming(choice.spec, choice.name))
    jitmla.use_tunings(None)


def bits(x):
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(a, b) -> bool:
    """Bitwise equality."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def name(choice) -> str:
    facts = [str(v) for k, v in choice.spec if k in ("scale_mode", "neox", "positions")]
    return " ".join([choice.variant.name, *facts])


# ------------------------------------------------------------------------------------------------- quantisation


def quantise(problem, **options):
    """(o_fp8, o_scale) of the kernel, written into poisoned tensors whose surroundings must not change."""
    tokens, heads, dim = problem.o.shape
    columns = heads // problem.groups * dim
    mode = options["scale_mode"]
    scale_type = torch.int32 if mode == "ue8m0_i32" else torch.float32
    codes = guarded((problem.groups, tokens, columns // 2), torch.bfloat16, "cuda")  # two codes are as wide as a bf16
    scales = guarded(layouts.scale_shape(problem.groups, columns, tokens, mode), torch.float32, "cuda")
    o_fp8 = codes.tensor.view(FP8)
    got = jitmla.inv_rope_fp8_quant(*problem.args, n_groups=problem.groups, o_fp8=o_fp8,
                                    o_scale=scales.tensor.view(scale_type), backend="simt", **options)
    assert got[0] is o_fp8 and codes.intact() and scales.intact(), "written outside"
    return got


def options_of(choice):
    return {"scale_mode": choice.spec["scale_mode"], "neox": choice.spec["neox"]}


@pytest.mark.parametrize("choice", QUANT, ids=name)
def test_every_key_of_the_quantisation(choice, picked):
    picked(choice)
    options, positions = options_of(choice), TYPES[choice.spec["positions"]]
    for i, (tokens, heads, groups) in enumerate([(1, 128, 8), (3, 128, 16), (37, 64, 8), (257, 128, 8), (1500, 16, 2)]):
        problem = quant_problem(tokens, heads=heads, groups=groups, positions=positions, seed=i, device="cuda",
                                padded_heads=(None, 144)[i % 2], token_pad=(0, 0, 8)[i % 3],
                                inputs=("usual", "wild")[i % 2])
        got = quantise(problem, **options)
        check_quant(problem, *got, **options)
        again = quantise(problem, **options)
        assert same(got[0], again[0]) and same(got[1], again[1])


@pytest.mark.parametrize("choice", [c for c in QUANT if not c.spec["neox"]], ids=name)
def test_golden_vector(choice, picked):
    picked(choice)
    mode = choice.spec["scale_mode"]
    o = torch.zeros(2, 16, 512, dtype=torch.bfloat16, device="cuda")
    o[1, 5] = golden_row().cuda()
    where = torch.tensor([0, 3], dtype=TYPES[choice.spec["positions"]], device="cuda")
    o_fp8, o_scale = jitmla.inv_rope_fp8_quant(o, where, cos_sin_table().cuda(), n_groups=2, scale_mode=mode)
    codes = bytes(o_fp8.view(torch.uint8)[0, 1, 5 * 512:6 * 512].tolist())
    expected = GOLDEN[mode]
    assert codes[:8].hex() == expected["head"] and zlib.crc32(codes[:448]) == expected["crc"]
    assert expected["rope"] in (None, codes[448:456].hex())
    words = 1 if mode == "ue8m0_i32" else 4
    scales = o_scale[0, 5 * words:6 * words, 1].tolist()
    assert scales == (pytest.approx(expected["scales"], rel=1e-5) if mode == "raw_f32" else expected["scales"])


@st.composite
def quant_calls(draw):
    groups, heads = draw(st.sampled_from([(1, 8), (2, 2), (2, 8), (8, 8), (8, 16), (16, 8), (3, 5), (4, 12), (128, 1)]))
    tokens = draw(st.one_of(st.sampled_from([1, 2, 3, 5, 63, 64, 65, 511, 512, 1023, 1025, 1500, 2047, 2049]),
                            st.integers(1, 700)))
    return dict(tokens=tokens, groups=groups, heads=groups * heads, seed=draw(st.integers(0, 2**20)),
                padded_heads=draw(st.sampled_from([None, None, groups * heads + 16])),
                token_pad=draw(st.sampled_from([0, 8, 512])), inputs=draw(st.sampled_from(["usual", "wild"])))


@given(quant_calls())
@DRAWN
def test_drawn_quantisations(call):
    """What the host picks, over numbers of tokens, heads, groups and strides."""
    problem = quant_problem(**call, device="cuda")
    check_quant(problem, *quantise(problem, scale_mode="pow2_f32"), scale_mode="pow2_f32")


def test_quantisation_agrees_with_the_reference_bit_for_bit_without_rotation():
    problem = quant_problem(1500, heads=128, groups=8, device="cuda", inputs="wild")
    got = quantise(problem, scale_mode="pow2_f32")
    expected = jitmla.inv_rope_fp8_quant(*problem.args, n_groups=8, scale_mode="pow2_f32", backend="reference")
    plain = (slice(None), slice(None), slice(None), slice(384))
    a, b = (x.view(torch.int8).unflatten(2, (-1, 512))[plain] for x in (got[0], expected[0]))
    assert torch.equal(a, b)
    scales = [x.unflatten(1, (-1, 4))[:, :, :3] for x in (got[1], expected[1])]
    assert same(*scales)


def test_quantisation_beyond_2_to_the_31_elements():
    """33 000 tokens of 128 heads: element offsets of o and of o_fp8 need more than 31 bits."""
    tokens = 33_000
    o = torch.zeros(tokens, 128, 512, dtype=torch.bfloat16, device="cuda")
    some = torch.tensor([0, 1, 17, 32766, 32767, 32768, tokens - 1], device="cuda")
    small = quant_problem(len(some), heads=128, groups=8, device="cuda")
    o[some] = small.o
    positions = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    positions[some] = small.positions
    o_fp8, o_scale = jitmla.inv_rope_fp8_quant(o, positions, small.cos_sin_cache, n_groups=8, scale_mode="pow2_f32")
    scales = torch.zeros(8, 64, 8, device="cuda")
    scales[..., :len(some)] = o_scale[..., some]
    check_quant(small, o_fp8[:, some].contiguous(), scales, scale_mode="pow2_f32")


# ------------------------------------------------------------------------------------------------- product


def multiply(problem, kind="tokens first"):
    """out of the kernel, in poisoned memory whose surroundings must not change."""
    groups, tokens, columns = problem.out_shape
    strides = {"dense": None, "tokens first": (columns, groups * columns, 1),
               "loose": (tokens * (columns + 8) + 16, columns + 8, 1)}[kind]
    out = guarded(problem.out_shape, torch.bfloat16, "cuda", strides)
    assert jitmla.fp8_bmm(*problem.args, out=out.tensor, backend="sm90") is out.tensor
    assert out.intact(), "written outside of out"
    return out.tensor


@pytest.mark.parametrize("choice", BMM, ids=name)
def test_every_key_of_the_product(choice, picked):
    """Every variant at sizes that it would not be picked for: full and ragged tiles, one block of K, odd numbers of
    blocks, fewer tiles than SMs and many more."""
    picked(choice)
    for i, (tokens, groups, columns, k) in enumerate([
            (1, 8, 1024, 8192), (5, 3, 1024, 4224), (64, 16, 1024, 4096), (129, 2, 768, 640), (200, 1, 256, 128),
            (127, 2, 128, 8192), (1500, 8, 1024, 4096), (17, 70, 256, 256)]):
        sizes = {"groups": groups, "tokens": tokens, "columns": columns, "k": k, "sms": 132}
        if not pick.RULES["fp8_bmm"].fits(choice.name, **sizes):
            continue
        problem = product_problem(tokens, groups=groups, columns=columns, k=k, device="cuda", seed=i,
                                  tokens_first=i % 2 == 1, scale_pad=(0, 4, 12)[i % 3])
        out = multiply(problem, ("tokens first", "dense", "loose")[i % 3])
        check_product(problem, out)
        assert same(out, multiply(problem, "dense")), "two launches differ"


@st.composite
def products(draw):
    return dict(tokens=draw(st.one_of(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 1025]),
                                      st.integers(1, 600))),
                groups=draw(st.sampled_from([1, 2, 3, 8, 16])), columns=128 * draw(st.integers(1, 9)),
                k=128 * draw(st.one_of(st.integers(1, 12), st.sampled_from([32, 33, 64]))),
                tokens_first=draw(st.booleans()), scale_pad=draw(st.sampled_from([0, 4, 12])),
                seed=draw(st.integers(0, 2**20)))


@given(products(), st.sampled_from(["dense", "tokens first", "loose"]))
@DRAWN
def test_drawn_products(call, kind):
    problem = product_problem(**call, device="cuda")
    check_product(problem, multiply(problem, kind))


def test_product_agrees_with_the_reference():
    problem = product_problem(300, groups=2, columns=256, k=1024, device="cuda")
    out = jitmla.fp8_bmm(*problem.args, backend="reference")
    check_product(problem, out)
    assert calc_diff(out, multiply(problem)) < 1e-5


def test_product_of_more_than_2_to_the_31_elements():
    """a of 2.2e9 codes: offsets need more than 31 bits."""
    tokens, groups, columns, k = 33_000, 8, 128, 8192
    w = product_problem(1, groups=groups, columns=columns, k=k, device="cuda")
    a = torch.zeros(groups, tokens, k, dtype=FP8, device="cuda")
    a_scale = torch.ones(groups, k // 128, layouts.scale_stride(tokens), device="cuda")
    some = torch.tensor([0, 1, 129, 32767, 32768, tokens - 1], device="cuda")
    small = product_problem(len(some), groups=groups, columns=columns, k=k, device="cuda")
    a.view(torch.int8)[:, some] = small.a.view(torch.int8)
    a_scale[..., some] = small.a_scale[..., :len(some)]
    out = jitmla.fp8_bmm(a, a_scale, w.b, w.b_scale)
    check_product(ProductProblem(small.a, small.a_scale, w.b, w.b_scale), out[:, some].contiguous())
    assert not bool(out[:, 2:100].any())


# ------------------------------------------------------------------------------------------------- chain


SIZES = [1, 3, 5, 64, 257, 1500, 2049, 4097]


@pytest.mark.parametrize("groups, heads", [(8, 128), (16, 128), (8, 64), (2, 16)])
@pytest.mark.parametrize("tokens", SIZES)
def test_chain(tokens, groups, heads):
    """Numbers of tokens that no tile divides, checked through the consumer; parts and adapters give the same."""
    k = heads // groups * 512
    problem = quant_problem(tokens, heads=heads, groups=groups, padded_heads=heads + 16, device="cuda", seed=tokens)
    w = product_problem(1, groups=groups, columns=1024, k=k, device="cuda")
    out = guarded((tokens, groups, 1024), torch.bfloat16, "cuda")
    jitmla.o_a_proj(*problem.args, w.b, w.b_scale, out=out.tensor)
    assert out.intact() and calc_diff(out.tensor, exact_chain(problem, w.b, w.b_scale)) < CHAIN_DIFF
    o_fp8, o_scale = quantise(problem, scale_mode="pow2_f32")
    parts = ProductProblem(o_fp8, o_scale, w.b, w.b_scale)
    check_product(parts, out.tensor.transpose(0, 1))
    assert same(multiply(parts).transpose(0, 1), out.tensor)
    d = torch.full((tokens, groups, 1024), float("nan"), dtype=torch.bfloat16, device="cuda")
    views = vllm.fused_inv_rope_fp8_quant(*problem.args, groups, heads // groups)
    deep_gemm.fp8_einsum("bhr,hdr->bhd", views, (w.b, w.b_scale), d, recipe=(1, 128, 128))
    assert same(d, out.tensor)


def test_no_tokens():
    problem = quant_problem(0, heads=16, groups=2, device="cuda")
    w = product_problem(0, groups=2, columns=128, k=4096, device="cuda")
    o_fp8, o_scale = jitmla.inv_rope_fp8_quant(*problem.args, n_groups=2, scale_mode="pow2_f32")
    assert o_fp8.shape == (2, 0, 4096) and o_scale.shape == (2, 32, 0)
    assert jitmla.fp8_bmm(*w.args).shape == (2, 0, 128)
    assert jitmla.o_a_proj(*problem.args, w.b, w.b_scale).shape == (0, 2, 128)


def layers(tokens, count=6, groups=2):
    """A stack whose o of each layer is made of the output of the one before, so that nothing may start too early."""
    problem = quant_problem(tokens, heads=16, groups=groups, device="cuda")
    weights = [product_problem(1, groups=groups, columns=1024, k=4096, device="cuda", seed=i) for i in range(count)]

    def run(pause=lambda: None):
        x, results = problem.o, []
        for w in weights:
            y = jitmla.o_a_proj(x, *problem.args[1:], w.b, w.b_scale)
            pause()
            results.append(y)
            x = (y / y.float().abs().amax().clamp_min(1e-3)).to(torch.bfloat16).flatten(1)
            x = x.repeat(1, 4).unflatten(1, (16, 512))
        return results

    return problem, run


@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_layers_in_one_graph(tokens):
    """Kernels that start early must neither read early nor overwrite what is still read."""
    _, run = layers(tokens)
    expected = run(pause=torch.cuda.synchronize)
    for got in (run(), run()):
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(5):
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        assert all(same(a, b) for a, b in zip(results, expected, strict=True))


def test_back_to_back_chains_share_memory():
    """Chains of different sizes without a pause: the allocator gives each the memory of the one before."""
    cases = []
    for i, tokens in enumerate((1, 64, 200, 1500)):
        problem = quant_problem(tokens, heads=128, groups=8, device="cuda", seed=i)
        w = product_problem(1, groups=8, columns=1024, k=8192, device="cuda", seed=i)
        args = (*problem.args, w.b, w.b_scale)
        cases.append((args, jitmla.o_a_proj(*args)))
        torch.cuda.synchronize()
    order = [i % 4 for i in (0, 3, 1, 2, 0, 1, 3, 2, 2, 0, 1, 1) for _ in range(4)]
    results = [jitmla.o_a_proj(*cases[i][0]) for i in order]
    assert all(same(got, cases[i][1]) for i, got in zip(order, results, strict=True))


def test_graph_is_right_for_later_inputs():
    problem = quant_problem(64, heads=128, groups=8, device="cuda")
    w = product_problem(1, groups=8, columns=1024, k=8192, device="cuda")
    args = (*problem.args, w.b, w.b_scale)
    jitmla.o_a_proj(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = jitmla.o_a_proj(*args)
    for seed in (1, 2):
        other = quant_problem(64, heads=128, groups=8, device="cuda", seed=seed)
        problem.o.copy_(other.o)
        problem.positions.copy_(other.positions)
        graph.replay()
        assert same(out, jitmla.o_a_proj(*other.args, w.b, w.b_scale))


def test_capture_at_a_size_that_picks_another_variant():
    """The first call of a Spec loads all that later calls can pick, so that a capture meets no new kernel."""
    w = product_problem(1, groups=8, columns=1024, k=8192, device="cuda")
    first = quant_problem(1, heads=128, groups=8, device="cuda")
    jitmla.o_a_proj(*first.args, w.b, w.b_scale)
    for tokens in (16, 64, 128, 300, 2000):
        problem = quant_problem(tokens, heads=128, groups=8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = jitmla.o_a_proj(*problem.args, w.b, w.b_scale)
        graph.replay()
        assert calc_diff(out, exact_chain(problem, w.b, w.b_scale)) < CHAIN_DIFF


def test_miss_during_capture_names_the_prewarm_command(monkeypatch):
    problem = product_problem(5, groups=2, columns=128, k=256, device="cuda")
    other = torch.zeros(1, device="cuda")
    jitmla.fp8_bmm(*problem.args)
    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setattr(bmm_op, "_prepared", {})
    with pytest.raises(MissNotAllowed) as caught, torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.add_(1)  # so that the graph is not empty
        jitmla.fp8_bmm(*problem.args)
    assert re.search(r"jitmla prewarm .*", caught.value.remedy).group() == (
        "jitmla prewarm --op fp8_bmm --arch sm_90a --spec dtype=e4m3 --spec scale_dtype=f32 --spec out_dtype=bf16")
    torch.cuda.synchronize()
    check_product(problem, multiply(problem))  # and afterwards the op works


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_calls_do_not_synchronize_nor_emit_events():
    problem = quant_problem(64, heads=16, groups=2, device="cuda")
    w = product_problem(1, groups=2, columns=1024, k=4096, device="cuda")
    jitmla.o_a_proj(*problem.args, w.b, w.b_scale)
    before = events.stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        jitmla.o_a_proj(*problem.args, w.b, w.b_scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert events.stats() == before


def test_current_stream_is_used():
    """The inputs arrive late, on the stream that is current: a launch on any other stream reads NaN."""
    problem = quant_problem(64, heads=16, groups=2, device="cuda")
    w = product_problem(1, groups=2, columns=1024, k=4096, device="cuda")
    expected = jitmla.o_a_proj(*problem.args, w.b, w.b_scale)
    o = torch.full_like(problem.o, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        o.copy_(problem.o)
        got = jitmla.o_a_proj(o, *problem.args[1:], w.b, w.b_scale)
    torch.cuda.current_stream().wait_stream(stream)
    assert same(got, expected)


@pytest.mark.filterwarnings("default")  # the compiler's own warnings are not ours
def test_torch_compile_without_graph_breaks():
    torch.compiler.reset()

    def layer(o, positions, table, w, w_scale):
        return jitmla.o_a_proj(o * 2, positions, table, w, w_scale) + 1

    problem = quant_problem(33, heads=16, groups=2, device="cuda")
    w = product_problem(1, groups=2, columns=1024, k=4096, device="cuda")
    args = (*problem.args, w.b, w.b_scale)
    assert same(torch.compile(layer, fullgraph=True, backend="aot_eager")(*args), layer(*args))


# ------------------------------------------------------------------------------------------------- refusals


def refused(error, words, call, *args, **options):
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert words in str(caught.value), str(caught.value)
    torch.cuda.synchronize()


def test_layouts_in_a_remembered_shape():
    """Addresses and strides are not part of what a call remembers: the kernels' own guards must refuse these."""
    p = product_problem(5, groups=2, columns=128, k=256, device="cuda")
    check_product(p, multiply(p))
    shifted = torch.zeros(p.a.numel() + 1, dtype=torch.int8, device="cuda")[1:].view(FP8).view(p.a.shape)
    refused(InvalidArgument, "a at address", jitmla.fp8_bmm, shifted, *p.args[1:])
    loose = torch.zeros(2, 5, 132, dtype=torch.bfloat16, device="cuda")[..., 4:]
    refused(InvalidArgument, "out at address", jitmla.fp8_bmm, *p.args, out=loose)
    refused(InvalidArgument, "out", jitmla.fp8_bmm, *p.args, out=loose[:, :4])
    q = quant_problem(5, heads=16, groups=2, device="cuda")
    check_quant(q, *quantise(q, scale_mode="pow2_f32"), scale_mode="pow2_f32")
    odd = torch.zeros(5, 16, 513, dtype=torch.bfloat16, device="cuda")[..., :512]
    refused(InvalidArgument, "o at address", jitmla.inv_rope_fp8_quant, odd, *q.args[1:], n_groups=2,
            scale_mode="pow2_f32")
    refused(InvalidArgument, "positions", jitmla.inv_rope_fp8_quant, q.o, q.positions[:4], q.cos_sin_cache, n_groups=2,
            scale_mode="pow2_f32")
    refused(InvalidArgument, "o_scale", jitmla.inv_rope_fp8_quant, *q.args, n_groups=2, scale_mode="pow2_f32",
            o_scale=torch.zeros(2, 32, 16, device="cuda"))


def test_one_token_and_one_group_with_odd_strides():
    """The stride of a dimension of size one may be anything."""
    p = product_problem(1, groups=3, columns=128, k=256, device="cuda")
    a = p.a.as_strided(p.a.shape, (p.a.stride(0), 77, 1))
    out = torch.zeros(3, 1, 128, dtype=torch.bfloat16, device="cuda")
    jitmla.fp8_bmm(a, *p.args[1:], out=out.as_strided(out.shape, (128, 3, 1)))
    check_product(p, out)
    p = product_problem(9, groups=1, columns=128, k=256, device="cuda")
    a = p.a.as_strided(p.a.shape, (5, p.a.stride(1), 1))
    check_product(p, jitmla.fp8_bmm(a, *p.args[1:]))


def test_what_no_template_serves():
    q = quant_problem(5, heads=4, groups=2, head_dim=128, device="cuda")
    refused(NoTemplate, "nope_dim=64", jitmla.inv_rope_fp8_quant, *q.args, n_groups=2, nope_dim=64)
