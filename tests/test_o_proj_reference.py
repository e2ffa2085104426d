"""The reference backends of the output path: golden vectors, float64 oracles, and properties of the scales."""

import zlib
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jitmla
from jitmla import layouts
from jitmla.ops import o_proj_reference
from jitmla.testing_o_proj import (
    CHAIN_DIFF,
    FP8,
    GOLDEN,
    calc_diff,
    check_product,
    check_quant,
    cos_sin_table,
    exact_chain,
    golden_row,
    product_problem,
    quant_problem,
)

DRAWN = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def quantised(problem, **options):
    return jitmla.inv_rope_fp8_quant(*problem.args, n_groups=problem.groups, backend="reference", **options)


@pytest.mark.parametrize("mode", layouts.SCALE_MODES)
def test_golden_vector(mode):
    """One head's row at position 3, wherever that head stands."""
    o = torch.zeros(2, 8, 512, dtype=torch.bfloat16)
    o[1, 5] = golden_row()
    o_fp8, o_scale = jitmla.inv_rope_fp8_quant(o, torch.tensor([0, 3]), cos_sin_table(), n_groups=2, scale_mode=mode)
    codes = bytes(o_fp8.view(torch.uint8)[1, 1, 512:1024].tolist())  # head 5 is the second one of group 1
    expected = GOLDEN[mode]
    assert codes[:8].hex() == expected["head"] and zlib.crc32(codes[:448]) == expected["crc"]
    assert expected["rope"] in (None, codes[448:456].hex())
    words = 1 if mode == "ue8m0_i32" else 4
    scales = o_scale[1, words:2 * words, 1].tolist()
    assert scales == (pytest.approx(expected["scales"], rel=1e-5) if mode == "raw_f32" else expected["scales"])
    assert not (o_fp8.view(torch.uint8)[0] & 0x7F).any()  # zeros may be negative


@pytest.mark.parametrize("mode, stored", [("raw_f32", 1e-10 / 448), ("pow2_f32", 2.0**-42),
                                          ("ue8m0_i32", 85 * 0x01010101)])
def test_all_zero_blocks(mode, stored):
    o = torch.zeros(1, 2, 512, dtype=torch.bfloat16)
    o_fp8, o_scale = jitmla.inv_rope_fp8_quant(o, torch.tensor([9]), cos_sin_table(), n_groups=1, scale_mode=mode)
    assert not (o_fp8.view(torch.uint8) & 0x7F).any()  # zeros may be negative
    assert o_scale[..., 0].double().sub(stored).abs().max() <= 1e-6 * stored * (mode == "raw_f32")
    assert not o_scale[..., 1:].any()


@given(st.integers(0x2EDBE6FF, 0x7F7FFFFF))  # from 1e-10 to the largest float32
@settings(DRAWN, max_examples=500)
def test_powers_of_two_are_exact(bits):
    """The smallest power of two s with amax <= 448 s, in exact arithmetic."""
    amax = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    scale = Fraction(2) ** (o_proj_reference.power_of_two(amax).item() - 127)
    value = Fraction(amax.item())
    assert value <= 448 * scale and value > 448 * scale / 2


@st.composite
def shapes(draw):
    groups = draw(st.sampled_from([1, 2, 3]))
    return dict(tokens=draw(st.integers(0, 9)), groups=groups, heads=groups * draw(st.sampled_from([1, 2, 3, 8])),
                padded_heads=draw(st.sampled_from([None, 40])), token_pad=draw(st.sampled_from([0, 8])),
                positions=draw(st.sampled_from([torch.int64, torch.int32, torch.int16])),
                inputs=draw(st.sampled_from(["usual", "wild"])), seed=draw(st.integers(0, 999)))


@given(shapes(), st.sampled_from(layouts.SCALE_MODES), st.booleans())
@DRAWN
def test_quantisation_against_float64(shape, mode, neox):
    problem = quant_problem(**shape)
    check_quant(problem, *quantised(problem, scale_mode=mode, neox=neox), scale_mode=mode, neox=neox)


@pytest.mark.parametrize("nope, rope", [(64, 64), (192, 64), (224, 32), (0, 128), (448, 64)])
def test_other_head_dims(nope, rope):
    problem = quant_problem(5, heads=4, groups=2, head_dim=nope + rope, rope_dim=rope)
    result = quantised(problem, scale_mode="raw_f32", nope_dim=nope, rope_dim=rope)
    check_quant(problem, *result, scale_mode="raw_f32")


def test_flat_input_and_given_outputs():
    problem = quant_problem(5, heads=8, groups=2)
    expected = quantised(problem, scale_mode="pow2_f32")
    o_fp8, o_scale = torch.empty(2, 5, 2048, dtype=FP8), torch.full((2, 16, 8), -7.0)
    got = jitmla.inv_rope_fp8_quant(problem.o.flatten(1), *problem.args[1:], n_groups=2, scale_mode="pow2_f32",
                                    o_fp8=o_fp8, o_scale=o_scale)
    assert got[0] is o_fp8 and got[1] is o_scale
    assert torch.equal(o_fp8.view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(o_scale, expected[1])


def test_the_two_pairings_differ():
    """A test that both pass would not see a mix-up: they agree in nothing but the columns that are not rotated."""
    problem = quant_problem(4, heads=2, groups=1, seed=1)
    plain, neox = (quantised(problem, scale_mode="pow2_f32", neox=n)[0].view(torch.uint8).view(4, 2, 512)
                   for n in (False, True))
    assert torch.equal(plain[..., :384], neox[..., :384]) and not torch.equal(plain[..., 448:], neox[..., 448:])


def test_rotation_is_the_inverse_of_the_models_own():
    """Rotate forward as the model does (complex product), quantise with the inverse: what was there comes back."""
    problem = quant_problem(6, heads=4, groups=2, seed=3)
    table = problem.cos_sin_cache[problem.positions]
    x = problem.o.float()
    angle = torch.complex(table[:, :32], table[:, 32:])[:, None]
    turned = torch.view_as_complex(x[..., 448:].unflatten(-1, (32, 2)).contiguous()) * angle
    forward = torch.cat([x[..., :448], torch.view_as_real(turned).flatten(-2)], -1)
    back = o_proj_reference.rotated_back(forward, problem.positions, problem.cos_sin_cache, False)
    assert (back - x).abs().max() <= 1e-6 * x.abs().max()


@given(st.integers(0, 9), st.sampled_from([1, 2]), st.sampled_from([128, 256]), st.sampled_from([128, 384]),
       st.booleans(), st.sampled_from([0, 4]), st.integers(0, 999))
@DRAWN
def test_product_against_float64(tokens, groups, columns, k, tokens_first, scale_pad, seed):
    problem = product_problem(tokens, groups=groups, columns=columns, k=k, tokens_first=tokens_first,
                              scale_pad=scale_pad, seed=seed)
    out = torch.full((tokens, groups, columns), float("nan"), dtype=torch.bfloat16).transpose(0, 1)
    assert jitmla.fp8_bmm(*problem.args, out=out) is out
    check_product(problem, out)
    assert torch.equal(jitmla.fp8_bmm(*problem.args), out)


@pytest.mark.parametrize("tokens", [0, 1, 3, 5, 33])
@pytest.mark.parametrize("mode", ["pow2_f32", "raw_f32"])
@pytest.mark.parametrize("neox", [False, True])
def test_chain_against_float64(tokens, mode, neox):
    problem = quant_problem(tokens, heads=8, groups=2, seed=tokens)
    w = product_problem(1, groups=2, columns=256, k=2048)
    out = jitmla.o_a_proj(*problem.args, w.b, w.b_scale, scale_mode=mode, neox=neox)
    assert out.shape == (tokens, 2, 256) and out.is_contiguous()
    assert calc_diff(out, exact_chain(problem, w.b, w.b_scale, neox)) < CHAIN_DIFF
    parts = quantised(problem, scale_mode=mode, neox=neox)
    assert torch.equal(out, jitmla.fp8_bmm(*parts, w.b, w.b_scale).transpose(0, 1))


def test_a_wrong_scale_stride_would_be_seen():
    """The fault that padding to a block of tokens gave once: at 1500 tokens a consumer that assumes another stride
    reads other tokens' scales. With powers of two as numbers of tokens the strides agree, and no test saw it."""
    problem = quant_problem(1500, heads=2, groups=1, inputs="usual")
    o_fp8, o_scale = quantised(problem, scale_mode="pow2_f32")
    w = product_problem(1, groups=1, columns=128, k=1024)
    good = jitmla.fp8_bmm(o_fp8, o_scale, w.b, w.b_scale)
    exact = exact_chain(problem, w.b, w.b_scale).transpose(0, 1)
    assert calc_diff(good, exact) < CHAIN_DIFF
    padded = torch.nn.functional.pad(o_scale, (0, 4)).flatten()[:o_scale.numel()].view(o_scale.shape)
    bad = jitmla.fp8_bmm(o_fp8, padded, w.b, w.b_scale)
    assert calc_diff(bad, exact) > 10 * CHAIN_DIFF


@given(st.integers(0, 70000))
@settings(DRAWN, max_examples=200)
def test_scale_stride(tokens):
    """The least multiple of 16 bytes that holds the tokens."""
    stride = layouts.scale_stride(tokens)
    assert stride * 4 % 16 == 0 and 0 <= stride - tokens < 4
    assert layouts.scale_shape(8, 4096, tokens, "raw_f32") == (8, 32, stride)
    assert layouts.scale_shape(8, 4096, tokens, "ue8m0_i32") == (8, 8, stride)


def test_scale_stride_is_said_once():
    """Producer, consumers and adapters call the function: none of them rounds by itself."""
    package = Path(jitmla.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name not in ("layouts.py", "testing_o_proj.py"):
            assert "// 4 * 4" not in text and "+ 3) //" not in text, path
