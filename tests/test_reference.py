"""jitmla.mla_decode on CPU tensors (the reference) against the float64 oracle, which shares no code with it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jitmla
import jitmla.ops.mla_decode as op
from jitmla import events
from jitmla.errors import InvalidArgument
from jitmla.testing import mla_decode_oracle, mla_decode_problem
from jitmla.testing_memory import guarded

DRAWN = settings(max_examples=150, deadline=None, derandomize=True, database=None)
LENGTH = st.one_of(st.sampled_from([0, 1, 2, 3, 6, 7, 8, 63, 64, 65]), st.integers(0, 150))


def run(problem, out_strides=None, lse_strides=None, **options):
    """(out, lse), written into NaN; what lies around them must not change."""
    out = guarded(problem.out_shape, problem.dtype, "cpu", out_strides)
    lse = guarded(problem.out_shape[:3], torch.float32, "cpu", lse_strides)
    got = jitmla.mla_decode(*problem.args, **problem.kwargs, out=out.tensor, lse=lse.tensor, return_lse=True, **options)
    assert got[0] is out.tensor and got[1] is lse.tensor and out.intact() and lse.intact()
    return got


@DRAWN
@given(lengths=st.lists(LENGTH, max_size=4), heads=st.integers(1, 9), s_q=st.integers(1, 4),
       page_size=st.sampled_from([1, 2, 7, 16, 64, 128]),
       dims=st.sampled_from([(512, 64), (256, 64), (128, 16), (64, 0)]),
       dtype=st.sampled_from([torch.bfloat16, torch.float16]), causal=st.booleans(),
       sinks=st.sampled_from([None, "finite", "mixed"]), inputs=st.sampled_from(["usual", "large"]),
       query=st.sampled_from(["joined", "pair", "views"]), pads=st.tuples(*[st.sampled_from([0, 3])] * 3),
       extra_table=st.integers(0, 2), seed=st.integers(0, 99), strided=st.booleans())
def test_drawn_problems(lengths, heads, s_q, page_size, dims, dtype, causal, sinks, inputs, query, pads, extra_table,
                        seed, strided):
    rank, rope = dims
    q_pad, row_pad, page_pad = pads
    problem = mla_decode_problem(lengths, heads=heads, s_q=s_q, page_size=page_size, kv_lora_rank=rank,
                                 qk_rope_head_dim=rope, dtype=dtype, causal=causal, sinks=sinks, inputs=inputs,
                                 query=query, q_pad=q_pad, row_pad=row_pad, page_pad=page_pad,
                                 extra_table=extra_table, seed=seed)
    strides = ()
    if strided:
        strides = (s_q * heads * (rank + 1) + 5, rank + 1, s_q * (rank + 1), 1), (1, 100, 7 * 128)
    mla_decode_oracle(problem).check(*run(problem, *strides))


@pytest.mark.parametrize("s_q", [1, 3])
def test_out_and_lse_are_made_when_not_given(s_q):
    problem = mla_decode_problem([5, 0, 70], heads=4, s_q=s_q)
    out, lse = jitmla.mla_decode(*problem.args, **problem.kwargs, return_lse=True)
    assert out.shape == (3, s_q, 4, 512) and out.dtype == torch.bfloat16 and out.is_contiguous()
    assert lse.shape == (3, s_q, 4) and lse.dtype == torch.float32 and lse.is_contiguous()
    mla_decode_oracle(problem).check(out, lse)
    assert torch.equal(jitmla.mla_decode(*problem.args, **problem.kwargs), out)


def test_lse_is_written_when_given_though_not_asked_for():
    problem = mla_decode_problem([5], heads=4)
    lse = torch.full((1, 1, 4), float("nan"))
    out = jitmla.mla_decode(*problem.args, **problem.kwargs, lse=lse)
    mla_decode_oracle(problem).check(out, lse)


def test_the_limit_is_at_the_bottom_right():
    """Two tokens, three keys; the last key is huge. Only the last token sees it."""
    kv_cache = torch.zeros(1, 4, 80, dtype=torch.bfloat16)
    kv_cache[0, :3, 0] = torch.tensor([1.0, 2.0, 4.0])
    q = torch.zeros(1, 2, 1, 80, dtype=torch.bfloat16)
    args = q, kv_cache, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    out, lse = jitmla.mla_decode(*args, kv_lora_rank=64, sm_scale=1.0, return_lse=True)
    assert out[0, :, 0, 0].tolist() == [1.5, pytest.approx(7 / 3, rel=0.01)]
    assert lse.flatten().tolist() == pytest.approx([math.log(2), math.log(3)])
    out, lse = jitmla.mla_decode(*args, kv_lora_rank=64, sm_scale=1.0, causal=False, return_lse=True)
    assert out[0, :, 0, 0].tolist() == pytest.approx([7 / 3] * 2, rel=0.01)


def test_a_sink_is_a_key_without_value():
    """out with a sink of logit s is out without it, times sigmoid(lse - s); lse leaves it out."""
    problem = mla_decode_problem([40, 3], heads=4, dtype=torch.float16)
    plain, lse = jitmla.mla_decode(*problem.args, **problem.kwargs, return_lse=True)
    sinks = torch.tensor([0.5, 3.0, float("inf"), float("-inf")])
    out, same_lse = jitmla.mla_decode(*problem.args, **{**problem.kwargs, "sinks": sinks}, return_lse=True)
    assert torch.equal(lse, same_lse)
    expected = plain.float() * torch.sigmoid(lse - sinks)[..., None]
    assert torch.allclose(out.float(), expected, atol=2e-4, rtol=2e-3)
    assert not out[:, :, 2].any() and torch.equal(out[:, :, 3], plain[:, :, 3])


@pytest.fixture
def nothing_prepared(monkeypatch):
    monkeypatch.setattr(op, "_prepared", {})


def test_auto_says_that_it_takes_the_reference(nothing_prepared, seen):
    problem = mla_decode_problem([9, 2], heads=5)
    jitmla.mla_decode(*problem.args, **problem.kwargs)
    chosen = [e for e in seen if e.kind == "choose"]
    assert len(chosen) == len(seen) == 1
    assert chosen[0].fields == {"op": "mla_decode", "backend": "reference", "device": "cpu", "why": "CPU tensors"}


def test_the_reference_by_name(nothing_prepared, seen):
    problem = mla_decode_problem([9, 2], heads=5)
    out = jitmla.mla_decode(*problem.args, **problem.kwargs, backend="reference")
    assert torch.equal(out, jitmla.mla_decode(*problem.args, **problem.kwargs))
    assert [e.fields["why"] for e in seen if e.kind == "choose"] == ["asked for", "CPU tensors"]


def test_a_named_kernel_does_not_fall_back():
    problem = mla_decode_problem([9], heads=4)
    before = events.stats()
    with pytest.raises(InvalidArgument, match="backend='sm90' on cpu tensors"):
        jitmla.mla_decode(*problem.args, **problem.kwargs, backend="sm90")
    assert events.stats() == before


def test_no_requests():
    problem = mla_decode_problem([], heads=4, s_q=2)
    out, lse = jitmla.mla_decode(*problem.args, **problem.kwargs, return_lse=True)
    assert out.shape == (0, 2, 4, 512) and lse.shape == (0, 2, 4)


def test_a_list_of_parts_is_a_pair():
    problem = mla_decode_problem([9], heads=4, query="pair")
    out = jitmla.mla_decode(list(problem.q), *problem.args[1:], **problem.kwargs)
    assert torch.equal(out, jitmla.mla_decode(*problem.args, **problem.kwargs))


@pytest.mark.parametrize("scale", [0.25, 1])
def test_scales(scale):
    problem = mla_decode_problem([9, 70], heads=4, sm_scale=scale, inputs="large")
    mla_decode_oracle(problem).check(*run(problem))
