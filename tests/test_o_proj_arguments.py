"""What the ops of the output path refuse: bad input raises the stated type, names the argument, says what works."""

import pytest
import torch

import jitmla
from jitmla.errors import InvalidArgument, InvalidArgumentType, NoTemplate
from jitmla.ops import checks
from jitmla.ops.o_proj_arguments import check_bmm_layout, check_quant_layout
from jitmla.spec import fp8_bmm_spec
from jitmla.testing_o_proj import FP8, product_problem, quant_problem

META = torch.device("meta")


def refused(error, word, call, *args, **options):
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert word in str(caught.value), str(caught.value)
    assert caught.value.differs and caught.value.supported


def o(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


QUANT = {
    "o is no tensor": (InvalidArgumentType, "o: a list", {"o": [1.0]}),
    "o of rank 4": (InvalidArgument, "o: [1, 3, 8, 512]", {"o": o(1, 3, 8, 512)}),
    "o of another dtype": (InvalidArgumentType, "o of bfloat16", {"o": o(3, 8, 512, dtype=torch.float16)}),
    "o of another width": (InvalidArgument, "nope_dim + rope_dim = 512, not 576", {"o": o(3, 8, 576)}),
    "flat o of another width": (InvalidArgument, "o: [3, 4000]", {"o": o(3, 4000)}),
    "o with columns apart": (InvalidArgument, "o with strides", {"o": o(3, 512, 8).transpose(1, 2)}),
    "groups that do not divide": (InvalidArgument, "n_groups=3", {"n_groups": 3}),
    "no groups": (InvalidArgument, "n_groups=0", {"n_groups": 0}),
    "groups of another type": (InvalidArgument, "n_groups=2.0", {"n_groups": 2.0}),
    "too many tokens": (InvalidArgument, "at most 262140 tokens", {
        "o": torch.empty(262141, 8, 512, dtype=torch.bfloat16, device=META)}),
    "float positions": (InvalidArgumentType, "positions", {"positions": torch.zeros(3)}),
    "too few positions": (InvalidArgument, "positions", {"positions": torch.zeros(2, dtype=torch.int64)}),
    "positions of rank 2": (InvalidArgument, "positions", {"positions": torch.zeros(3, 1, dtype=torch.int64)}),
    "positions elsewhere": (InvalidArgument, "positions on meta", {
        "positions": torch.zeros(3, dtype=torch.int64, device=META)}),
    "bf16 table": (InvalidArgumentType, "cos_sin_cache", {"cos_sin_cache": o(9, 64)}),
    "narrow table": (InvalidArgument, "cos_sin_cache", {"cos_sin_cache": torch.zeros(9, 32)}),
    "strided table": (InvalidArgument, "cos_sin_cache with strides", {"cos_sin_cache": torch.zeros(9, 128)[:, :64]}),
    "odd rope": (InvalidArgument, "rope_dim=63", {"rope_dim": 63, "nope_dim": 449}),
    "dims that 128 does not divide": (InvalidArgument, "nope_dim=440", {"nope_dim": 440}),
    "rope over several blocks": (InvalidArgument, "rope_dim=192", {"rope_dim": 192, "nope_dim": 320}),
    "rope of another type": (InvalidArgumentType, "rope_dim=64.0", {"rope_dim": 64.0}),
    "another group size": (InvalidArgument, "group_size=64", {"group_size": 64}),
    "another scale mode": (InvalidArgument, "scale_mode='e8m0'", {"scale_mode": "e8m0"}),
    "another backend": (InvalidArgument, "backend='sm90'", {"backend": "sm90"}),
    "a GPU backend": (InvalidArgument, "backend='simt' on cpu", {"backend": "simt"}),
    "padded o_fp8": (InvalidArgument, "o_fp8", {"o_fp8": torch.zeros(2, 4, 2048, dtype=FP8)}),
    "o_fp8 of another dtype": (InvalidArgumentType, "o_fp8", {"o_fp8": torch.zeros(2, 3, 2048, dtype=torch.uint8)}),
    "o_scale without its padding": (InvalidArgument, "o_scale", {"o_scale": torch.zeros(2, 16, 3)}),
    "o_scale of another type": (InvalidArgumentType, "o_scale", {"o_scale": torch.zeros(2, 16, 4, dtype=torch.int32)}),
    "o that requires a gradient": (InvalidArgument, "inference only", {
        "o": torch.zeros(3, 8, 512, dtype=torch.bfloat16, requires_grad=True)}),
}


@pytest.mark.parametrize("case", QUANT)
def test_quantisation(case):
    error, word, change = QUANT[case]
    problem = quant_problem(3, heads=8, groups=2)
    call = {"o": problem.o, "positions": problem.positions, "cos_sin_cache": problem.cos_sin_cache, "n_groups": 2,
            **change}
    refused(error, word, jitmla.inv_rope_fp8_quant, call.pop("o"), call.pop("positions"), call.pop("cos_sin_cache"),
            **call)


BMM = {
    "a is no tensor": (InvalidArgumentType, "a: a NoneType", {"a": None}),
    "a of rank 2": (InvalidArgument, "a: [5, 256]", {"a": torch.zeros(5, 256, dtype=FP8)}),
    "a of another dtype": (InvalidArgumentType, "a of float8_e4m3fn", {"a": o(2, 5, 256)}),
    "a of another K": (InvalidArgument, "b", {"a": torch.zeros(2, 5, 128, dtype=FP8)}),
    "a of another group count": (InvalidArgument, "b", {"a": torch.zeros(3, 5, 256, dtype=FP8)}),
    "a with columns apart": (InvalidArgument, "a with strides", {
        "a": torch.zeros(2, 256, 5, dtype=FP8).transpose(1, 2)}),
    "b of another dtype": (InvalidArgumentType, "b of float8_e4m3fn", {
        "b": torch.zeros(2, 128, 256, dtype=torch.int8)}),
    "N that 128 does not divide": (InvalidArgument, "multiples of 128", {"b": torch.zeros(2, 192, 256, dtype=FP8)}),
    "K that 128 does not divide": (InvalidArgument, "multiples of 128", {
        "a": torch.zeros(2, 5, 192, dtype=FP8), "b": torch.zeros(2, 128, 192, dtype=FP8)}),
    "no weights": (InvalidArgument, "multiples of 128", {"b": torch.zeros(2, 0, 256, dtype=FP8)}),
    "packed scales": (InvalidArgumentType, "a_scale", {"a_scale": torch.zeros(2, 1, 8, dtype=torch.int32)}),
    "scales of too few tokens": (InvalidArgument, "layouts.scale_stride", {"a_scale": torch.zeros(2, 2, 4)}),
    "scales turned round": (InvalidArgument, "a_scale", {"a_scale": torch.zeros(2, 5, 2)}),
    "scales with tokens outside": (InvalidArgument, "a_scale with strides", {
        "a_scale": torch.zeros(2, 8, 2).transpose(1, 2)}),
    "b_scale of another shape": (InvalidArgument, "b_scale", {"b_scale": torch.zeros(2, 2, 1)}),
    "b_scale that is strided": (InvalidArgument, "b_scale with strides", {"b_scale": torch.zeros(2, 1, 4)[..., :2]}),
    "b elsewhere": (InvalidArgument, "b on meta", {"b": torch.zeros(2, 128, 256, dtype=FP8, device=META)}),
    "out of another shape": (InvalidArgument, "out", {"out": o(5, 2, 128)}),
    "out of another dtype": (InvalidArgumentType, "out", {"out": torch.zeros(2, 5, 128)}),
    "out with columns apart": (InvalidArgument, "out with strides", {"out": o(2, 128, 5).transpose(1, 2)}),
    "another backend": (InvalidArgument, "backend='simt'", {"backend": "simt"}),
    "a GPU backend": (InvalidArgument, "backend='sm90' on cpu", {"backend": "sm90"}),
}


@pytest.mark.parametrize("case", BMM)
def test_product(case):
    error, word, change = BMM[case]
    problem = product_problem(5, groups=2, columns=128, k=256)
    call = {"a": problem.a, "a_scale": problem.a_scale, "b": problem.b, "b_scale": problem.b_scale, **change}
    refused(error, word, jitmla.fp8_bmm, call.pop("a"), call.pop("a_scale"), call.pop("b"), call.pop("b_scale"), **call)


CHAIN = {
    "packed scales": (InvalidArgument, "ue8m0_i32", {"scale_mode": "ue8m0_i32"}),
    "o is no tensor": (InvalidArgumentType, "o: a str", {"o": "o"}),
    "weights of another K": (InvalidArgument, "w_fp8", {"w_fp8": torch.zeros(2, 128, 1024, dtype=FP8),
                                                        "w_scale": torch.zeros(2, 1, 8)}),
    "groups that do not divide": (InvalidArgument, "n_groups=3", {"w_fp8": torch.zeros(3, 128, 2048, dtype=FP8),
                                                                  "w_scale": torch.zeros(3, 1, 16)}),
    "weights of another dtype": (InvalidArgumentType, "w_fp8", {"w_fp8": o(2, 128, 2048)}),
    "out of another shape": (InvalidArgument, "out", {"out": o(2, 3, 128)}),
    "another backend": (InvalidArgument, "backend='simt'", {"backend": "simt"}),
}


@pytest.mark.parametrize("case", CHAIN)
def test_chain(case):
    error, word, change = CHAIN[case]
    problem, w = quant_problem(3, heads=8, groups=2), product_problem(1, groups=2, columns=128, k=2048)
    call = {"o": problem.o, "w_fp8": w.b, "w_scale": w.b_scale, **change}
    refused(error, word, jitmla.o_a_proj, call.pop("o"), problem.positions, problem.cos_sin_cache, call.pop("w_fp8"),
            call.pop("w_scale"), **call)


def test_layouts_that_kernels_cannot_read():
    loose = torch.zeros(3 * 8 * 513, dtype=torch.bfloat16).as_strided((3, 8, 512), (8 * 513, 513, 1))
    refused(InvalidArgument, "o at address", check_quant_layout, loose, torch.zeros(9, 64), None, None)
    p = product_problem(5, groups=2, columns=128, k=256)
    refused(InvalidArgument, "a_scale at address", check_bmm_layout, p.a, p.a_scale[..., 1:], p.b, None)
    out = torch.zeros(2, 5, 130, dtype=torch.bfloat16)[..., :128]
    refused(InvalidArgument, "out at address", check_bmm_layout, p.a, p.a_scale, p.b, out)


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (1, 1)])
def test_strides_of_dimensions_of_size_one_mean_nothing(shape):
    """What PyTorch may leave in them is replaced before a kernel is asked a second time."""
    groups, rows = shape
    x = torch.arange(4096, dtype=torch.bfloat16)
    odd = x.as_strided((groups, rows, 64), (7 if groups == 1 else 640, 13 if rows == 1 else 128, 1))
    usual = checks.usual_strides(odd)
    assert usual.data_ptr() == odd.data_ptr() and all(s % 8 == 0 for s in usual.stride()[:2]) and usual.stride(2) == 1
    assert torch.equal(usual, odd)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100a", "sm_120a"])
def test_no_product_elsewhere(arch):
    """Until there is a template: the answer says what there is."""
    refused(NoTemplate, "nearest sm90_tiles: arch: sm_90a", jitmla.explain, fp8_bmm_spec(arch=arch))
