"""jitmla under the names of vLLM and DeepGEMM: the views and strides that their callers see."""

import pytest
import torch

import jitmla
from jitmla.compat import deep_gemm, vllm
from jitmla.errors import InvalidArgument, JitmlaError
from jitmla.testing_indexer import DIM, PAGE, index_pool
from jitmla.testing_logits import exact_logits, logits_problem, windows
from jitmla.testing_o_proj import (
    CHAIN_DIFF,
    FP8,
    ProductProblem,
    calc_diff,
    check_product,
    check_quant,
    exact_chain,
    product_problem,
    quant_problem,
)


@pytest.mark.parametrize("tokens, padded", [(0, 0), (1, 4), (3, 4), (4, 4), (5, 8)])
@pytest.mark.parametrize("packed", [False, True])
def test_vllm_views(tokens, padded, packed):
    """[tokens, groups, columns] with strides (columns, tokens * columns, 1); scales with tokens innermost."""
    problem = quant_problem(tokens, heads=16, groups=2)
    o_fp8, o_scale = vllm.fused_inv_rope_fp8_quant(*problem.args, 2, 8, tma_aligned_scales=packed)
    blocks = 8 if packed else 32
    assert o_fp8.shape == (tokens, 2, 4096) and o_fp8.dtype == FP8
    assert o_scale.shape == (tokens, 2, blocks) and o_scale.dtype == (torch.int32 if packed else torch.float32)
    if tokens:
        assert o_fp8.stride() == (4096, tokens * 4096, 1) and o_scale.stride() == (1, blocks * padded, padded)
        storage = o_scale.as_strided((2, blocks, padded), (blocks * padded, padded, 1))
        check_quant(problem, o_fp8.transpose(0, 1), storage, scale_mode="ue8m0_i32" if packed else "pow2_f32")


def test_vllm_groups_must_fit():
    problem = quant_problem(1, heads=16, groups=2)
    with pytest.raises(InvalidArgument, match="2 groups of 4 heads"):
        vllm.fused_inv_rope_fp8_quant(*problem.args, 2, 4)


@pytest.mark.parametrize("layout", ["jitmla", "tokens first", "padded to 16"])
def test_deep_gemm_takes_any_layout_of_scales(layout):
    problem = product_problem(5, groups=2, columns=256, k=1024, tokens_first=True)
    values, scales = problem.a.transpose(0, 1), problem.a_scale[..., :5].permute(2, 0, 1)
    if layout == "tokens first":
        scales = scales.contiguous()
    elif layout == "padded to 16":
        scales = torch.nn.functional.pad(problem.a_scale[..., :5], (0, 11))[..., :5].permute(2, 0, 1)
    d = torch.full((5, 2, 256), float("nan"), dtype=torch.bfloat16)
    assert deep_gemm.fp8_einsum("bhr,hdr->bhd", (values, scales), (problem.b, problem.b_scale), d) is None
    check_product(problem, d.transpose(0, 1))


def test_one_replaces_the_other():
    """vLLM's quantiser feeds DeepGEMM's product: both ours, and each with the plain op of the other side."""
    problem = quant_problem(7, heads=16, groups=2)
    w = product_problem(1, groups=2, columns=128, k=4096)
    a = vllm.fused_inv_rope_fp8_quant(*problem.args, 2, 8)
    d = torch.empty(7, 2, 128, dtype=torch.bfloat16)
    deep_gemm.fp8_einsum("bhr,hdr->bhd", a, (w.b, w.b_scale), d, recipe=(1, 128, 128))
    assert calc_diff(d, exact_chain(problem, w.b, w.b_scale)) < CHAIN_DIFF
    assert torch.equal(d, jitmla.o_a_proj(*problem.args, w.b, w.b_scale))
    o_fp8, o_scale = jitmla.inv_rope_fp8_quant(*problem.args, n_groups=2, scale_mode="pow2_f32")
    check_product(ProductProblem(o_fp8, o_scale, w.b, w.b_scale), d.transpose(0, 1))


@pytest.mark.parametrize("change", [{"expr": "bhd,hdr->bhr"}, {"recipe": (1, 1, 128)}, {"c": torch.zeros(1)}])
def test_other_products(change):
    problem = product_problem(1, groups=1, columns=128, k=128)
    call = {"expr": "bhr,hdr->bhd", "recipe": (1, 128, 128), "c": None, **change}
    with pytest.raises(JitmlaError, match="fp8_einsum"):
        deep_gemm.fp8_einsum(call["expr"], (problem.a, problem.a_scale), (problem.b, problem.b_scale), problem.a,
                             call["c"], call["recipe"])


def test_deep_gemm_logits():
    p = logits_problem(6, 40, heads=32)
    ks, ke = windows(6, 40, "any")
    got = deep_gemm.fp8_mqa_logits(p.q, (p.k, p.k_scale), p.weights, ks, ke)
    exact = exact_logits(p.q, p.k, p.k_scale, p.weights)
    column = torch.arange(40)
    outside = (column < ks[:, None]) | (column >= ke[:, None])
    assert torch.equal(got.double(), exact.masked_fill(outside, -torch.inf))
    packed = deep_gemm.fp8_mqa_logits(p.q, (p.k, p.k_scale), p.weights, ks, ke, clean_logits=False, max_seqlen_k=40)
    for i in range(6):
        assert torch.equal(packed[i, :int(ke[i] - ks[i])].double(), exact[i][~outside[i]])


@pytest.mark.parametrize("two_dimensions", [True, False])
@pytest.mark.parametrize("next_n", [1, 2, 3])
def test_deep_gemm_paged_logits(next_n, two_dimensions):
    """More queries a request than a kernel takes are flattened."""
    lens = [3, 70]
    p = logits_problem(2 * next_n, 128)
    pool, table = index_pool(4), torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    for r in range(2):
        slots = torch.cat([torch.arange(PAGE) + int(page) * PAGE for page in table[r]])
        jitmla.indexer_k_scatter(p.k, p.k_scale, pool, slots)
    given = torch.tensor(lens, dtype=torch.int32)
    if two_dimensions:
        given = torch.stack([given - next_n + d + 1 for d in range(next_n)], 1)
    meta = deep_gemm.get_paged_mqa_logits_metadata(given, 64, 132)
    assert meta.shape == (133, 2) and meta.dtype == torch.int32
    got = deep_gemm.fp8_paged_mqa_logits(p.q.view(2, next_n, 64, DIM), pool, p.weights, given, table, meta, 128)
    exact = exact_logits(p.q, p.k, p.k_scale, p.weights)
    for i in range(2 * next_n):
        n = lens[i // next_n] - next_n + i % next_n + 1
        assert torch.equal(got[i, :n].double(), exact[i, :n])


def test_deep_gemm_paged_logits_are_not_cleaned():
    with pytest.raises(JitmlaError, match="clean_logits"):
        deep_gemm.fp8_paged_mqa_logits(None, None, None, None, None, None, 1, clean_logits=True)
