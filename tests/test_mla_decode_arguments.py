"""Every way to call mla_decode wrongly: the class of the error, the argument's name, a remedy, and nothing written.

tests/kernels/test_mla_decode.py makes the same mistakes on a GPU, where the kernel for the shape is known already."""

import dataclasses

import pytest
import torch

import jitmla
from jitmla.errors import InvalidArgument, InvalidArgumentType
from jitmla.testing import mla_decode_problem

from .support.mistakes import MISTAKES, arguments, call, check_refused


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, seen):
    kind, argument, change = MISTAKES[name]
    given = arguments(**change)
    outputs = [given[n] for n in ("out", "lse") if n not in change]
    for _ in range(2):  # the same error when asked again
        check_refused(kind, argument, given)
    assert all(bool((t == 7).all()) for t in outputs), "written although refused"
    assert seen == [], "refused before anything was chosen"


def test_a_backend_that_needs_a_gpu(seen):
    check_refused(InvalidArgument, "backend", arguments(backend="sm90"))
    assert seen == []


def test_the_valid_call_is_valid():
    """So that each case above fails for its own reason alone."""
    for change in ({}, {"pair": lambda n, p: (n, p)}, {"sinks": torch.zeros(4)}, {"sm_scale": 1}):
        given = arguments(**change)
        out = call(given)
        assert not bool((out == 7).all())


def test_sm_scale_is_required():
    given = arguments()
    del given["sm_scale"]
    with pytest.raises(InvalidArgumentType, match="without sm_scale") as caught:
        call(given)
    assert "0.1352" in caught.value.remedy and "cannot be inferred" in caught.value.differs


def test_kv_lora_rank_is_required():
    given = arguments()
    del given["kv_lora_rank"]
    with pytest.raises(TypeError, match="kv_lora_rank"):
        call(given)


@pytest.mark.parametrize("change", ["q", "kv_cache"])
def test_a_gradient_is_noticed_in_a_layout_that_is_known(change):
    call(arguments())
    with pytest.raises(InvalidArgument, match="require a gradient") as caught:
        call(arguments(**{change: lambda t: t.requires_grad_()}))
    assert "inference_mode" in caught.value.remedy
    with torch.inference_mode():
        call(arguments(**{change: lambda t: t.requires_grad_()}))


def test_a_gradient_of_the_second_part_is_noticed_in_a_layout_that_is_known():
    call(arguments(pair=lambda n, p: (n, p)))
    with pytest.raises(InvalidArgument, match="require a gradient"):
        call(arguments(pair=lambda n, p: (n, p.requires_grad_())))


def test_a_bad_scale_is_noticed_in_a_layout_that_is_known():
    call(arguments())
    with pytest.raises(InvalidArgumentType, match="sm_scale"):
        call(arguments(sm_scale="0.1"))
    with pytest.raises(InvalidArgument, match="sm_scale"):
        call(arguments(sm_scale=float("nan")))


def test_strides_are_part_of_what_is_remembered():
    call(arguments())
    with pytest.raises(InvalidArgument, match="kv_cache"):
        call(arguments(kv_cache=lambda t: torch.cat([t, t], -1)[..., ::2]))
    with pytest.raises(InvalidArgumentType, match="seq_lens"):
        call(arguments(seq_lens=lambda t: t.long()))


def test_a_strided_last_dimension_of_one_element_is_contiguous():
    """Its stride is never stepped over, and PyTorch reports any value for it."""
    problem = mla_decode_problem([3], heads=1, page_size=16)
    lens = torch.tensor([3, 0], dtype=torch.int32)[::2]
    out = jitmla.mla_decode(*dataclasses.replace(problem, seq_lens=lens).args, **problem.kwargs)
    assert torch.equal(out, jitmla.mla_decode(*problem.args, **problem.kwargs))
