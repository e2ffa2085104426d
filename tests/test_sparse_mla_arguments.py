"""What the sparse MLA ops refuse: bad input raises the stated type, names the argument, says what works."""

import pytest
import torch

import jitmla
from jitmla import schedule
from jitmla.errors import InvalidArgument, InvalidArgumentType
from jitmla.ops.sparse_mla_arguments import check_layout, even_tokens
from jitmla.testing_sparse import sparse_mla_problem

META = torch.device("meta")


def q(*shape, dtype=torch.bfloat16, **options):
    return torch.zeros(shape, dtype=dtype, **options)


def cache(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


DECODE = {
    "q is no tensor": (InvalidArgumentType, "q: a list", {"q": [1.0]}),
    "q of rank 3": (InvalidArgument, "q: [2, 4, 576]", {"q": q(2, 4, 576)}),
    "q of another dtype": (InvalidArgumentType, "q of bfloat16", {"q": q(2, 1, 4, 576, dtype=torch.float16)}),
    "q of another width": (InvalidArgument, "4 heads of 640", {"q": q(2, 1, 4, 640)}),
    "too many heads": (InvalidArgument, "129 heads", {"q": q(2, 1, 129, 576)}),
    "q without its rope part": (InvalidArgument, "join q", {"q": q(2, 1, 4, 512)}),
    "q that requires a gradient": (InvalidArgument, "inference only", {"q": q(2, 1, 4, 576, requires_grad=True)}),
    "a cache of two KV heads": (InvalidArgument, "2 KV heads", {"k_cache": cache(3, 64, 2, 656)}),
    "a cache of other rows": (InvalidArgument, "a row has 657", {"k_cache": cache(3, 64, 1, 657)}),
    "a cache of rank 3": (InvalidArgument, "k_cache", {"k_cache": cache(3, 64, 656)}),
    "a float cache": (InvalidArgumentType, "k_cache", {"k_cache": cache(3, 64, 1, 656, dtype=torch.float32)}),
    "bf16 rows of another width": (InvalidArgument, "[..., 1, 576]", {
        "k_cache": cache(3, 64, 1, 512, dtype=torch.bfloat16)}),
    "rows apart": (InvalidArgument, "k_cache with strides", {"k_cache": cache(3, 64, 1, 1312)[..., ::2]}),
    "a cache elsewhere": (InvalidArgument, "k_cache on meta", {
        "k_cache": torch.empty(3, 64, 1, 656, dtype=torch.uint8, device=META)}),
    "int64 indices": (InvalidArgumentType, "indices", {"indices": ints(2, 1, 9).long()}),
    "indices of rank 2": (InvalidArgument, "indices", {"indices": ints(2, 9)}),
    "indices of another batch": (InvalidArgument, "indices", {"indices": ints(3, 1, 9)}),
    "strided indices": (InvalidArgument, "indices with strides", {"indices": ints(2, 1, 18)[..., ::2]}),
    "a length for each entry": (InvalidArgument, "topk_length", {"topk_length": ints(9)}),
    "float lengths": (InvalidArgumentType, "topk_length", {"topk_length": torch.zeros(2)}),
    "too few sinks": (InvalidArgument, "attn_sink", {"attn_sink": torch.zeros(3)}),
    "bf16 sinks": (InvalidArgumentType, "attn_sink", {"attn_sink": q(4)}),
    "out of another shape": (InvalidArgument, "out", {"out": q(2, 1, 4, 576)}),
    "lse of the other order": (InvalidArgument, "lse", {"lse": torch.zeros(2, 1, 4)}),
    "bf16 lse": (InvalidArgumentType, "lse", {"lse": q(2, 4, 1)}),
    "no scale": (InvalidArgumentType, "without sm_scale", {"sm_scale": None}),
    "a scale of zero": (InvalidArgument, "sm_scale=0.0", {"sm_scale": 0.0}),
    "a scale that is NaN": (InvalidArgument, "sm_scale=nan", {"sm_scale": float("nan")}),
    "another backend": (InvalidArgument, "backend='sm80'", {"backend": "sm80"}),
    "a GPU backend": (InvalidArgument, "backend='sm90' on cpu", {"backend": "sm90"}),
}


@pytest.mark.parametrize("name", DECODE)
def test_decode_refuses(name):
    error, word, change = DECODE[name]
    arguments = {"q": q(2, 1, 4, 576), "k_cache": cache(3, 64, 1, 656), "indices": ints(2, 1, 9), "sm_scale": 0.1}
    arguments.update(change)
    if arguments["sm_scale"] is None:
        del arguments["sm_scale"]
    with pytest.raises(error) as caught:
        jitmla.sparse_mla_decode(**arguments)
    assert word in str(caught.value), str(caught.value)
    assert caught.value.differs and caught.value.supported


@pytest.mark.parametrize("change, word", [
    ({"q": q(2, 1, 4, 576)}, "q has 4 dimensions"), ({"kv": q(9, 576)}, "kv has 2 dimensions"),
    ({"indices": ints(2, 9)}, "indices has 2 dimensions"), ({"kv": q(9, 1, 512)}, "[..., 1, 576]"),
    ({"out": q(2, 1, 4, 512)}, "out has 4 dimensions")])
def test_prefill_refuses(change, word):
    arguments = {"q": q(2, 4, 576), "kv": q(9, 1, 576), "indices": ints(2, 1, 9), "sm_scale": 0.1, **change}
    with pytest.raises(InvalidArgument) as caught:
        jitmla.sparse_mla_prefill(**arguments)
    assert word in str(caught.value), str(caught.value)


def test_layouts_that_the_kernels_cannot_read():
    right = q(2, 2, 4, 576), cache(3, 64, 1, 656), ints(2, 2, 9), None
    check_layout(*right)
    for i, value, word in ((0, q(2, 2, 4, 577)[..., :576], "q at address"),
                           (1, cache(3, 64 * 656 + 8).as_strided((3, 64, 1, 656), (64 * 656 + 8, 656, 656, 1)),
                            "k_cache at address"),
                           (2, ints(2, 3, 9)[:, :2], "indices with strides"),
                           (3, q(2, 3, 4, 512)[:, :2], "out with strides")):
        with pytest.raises(InvalidArgument) as caught:
            check_layout(*right[:i], value, *right[i + 1:])
        assert word in str(caught.value)
    assert even_tokens(ints(1, 3, 9)[:, :2]) and even_tokens(ints(3, 2, 9)[:, :1])


def test_empty_calls():
    for batch, s_q in ((0, 1), (2, 0)):
        out, lse = jitmla.sparse_mla_decode(q(batch, s_q, 4, 576), cache(3, 64, 1, 656), ints(batch, s_q, 9),
                                            sm_scale=0.1, return_lse=True)
        assert out.shape == (batch, s_q, 4, 512) and lse.shape == (batch, 4, s_q)
    out, top, lse = jitmla.sparse_mla_prefill(q(0, 4, 576), q(9, 1, 576), ints(0, 1, 9), sm_scale=0.1)
    assert out.shape == (0, 4, 512) and top.shape == lse.shape == (0, 4)


def test_outputs_are_written_where_they_are_given():
    problem = sparse_mla_problem(batch=2, s_q=3, topk=10, rows=100, heads=4, fmt="bf16", page_size=7)
    expected, lse = jitmla.sparse_mla_decode(*problem.args, **problem.kwargs, return_lse=True)
    out, given = torch.full_like(expected, torch.nan), torch.full((2, 4, 3), torch.nan)  # lse of other strides
    assert jitmla.sparse_mla_decode(*problem.args, **problem.kwargs, out=out, lse=given) is out
    assert torch.equal(out, expected) and torch.equal(given, lse) and given.stride() != lse.stride()


@pytest.mark.parametrize("d", [1, 2, 3, 5, 53, 61, 64, 69, 576, 4096, 2**20 + 7, 2**30 + 1, 2**31 - 1])
def test_divisor(d):
    magic, shift = schedule.divisor(d)
    assert -2**31 <= magic < 2**31 and 0 <= shift < 32
    drawn = ((i * 2654435761) % 2**31 for i in range(500))
    for x in {0, 1, d - 1, d, min(d + 1, 2**31 - 1), 2**31 - 1, 2**31 - 2, *drawn}:
        assert ((x * (magic % 2**32) >> 32) >> shift if magic else x) == x // d


def test_launch_arguments():
    for tokens, heads, sms in ((1, 128, 132), (8, 64, 132), (128, 128, 132), (5000, 16, 78), (1, 1, 1)):
        launch = schedule.sparse_launch_args(tokens, heads, sms)
        assert launch.parts * schedule.row_tiles(heads) <= max(sms, schedule.row_tiles(heads))
        assert schedule.sparse_launch_args(tokens, heads, sms, whole=True).parts <= tokens
    for wrong in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError):
            schedule.sparse_launch_args(*wrong)
    with pytest.raises(ValueError):
        schedule.divisor(0)
