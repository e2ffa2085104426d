"""Every way to call mla_decode wrongly: the class of the error, the argument's name, a remedy, and nothing written."""

import dataclasses

import numpy
import pytest
import torch

import jitmla
import jitmla.ops.mla_decode as op
from jitmla.errors import InvalidArgument, InvalidArgumentType, JitmlaError
from jitmla.testing import mla_decode_problem

BF16, I32 = torch.bfloat16, torch.int32
META = torch.device("meta")  # another device than the CPU, wherever the tests run


def arguments(**change):
    """A valid call (2 requests, s_q = 2, 4 heads, 512 + 64, pages of 16) with some arguments exchanged."""
    pair = change.pop("pair", None)
    problem = mla_decode_problem([20, 3], heads=4, s_q=2, page_size=16, query="pair" if pair else "joined")
    if pair:
        change["q"] = pair(*problem.q)
    base = dict(q=problem.q, kv_cache=problem.kv_cache, block_table=problem.block_table, seq_lens=problem.seq_lens,
                **problem.kwargs, out=torch.full(problem.out_shape, 7.0, dtype=BF16),
                lse=torch.full(problem.out_shape[:3], 7.0))
    return {**base, **{k: v(base[k]) if callable(v) else v for k, v in change.items()}}


def call(given):
    return jitmla.mla_decode(given.pop("q"), given.pop("kv_cache"), given.pop("block_table"), given.pop("seq_lens"),
                             **given)


T, V = InvalidArgumentType, InvalidArgument  # type and value
WRONG = {
    # not tensors
    "q is an array": (T, "q", dict(q=lambda t: numpy.zeros(t.shape))),
    "q is None": (T, "q", dict(q=None)),
    "q is a triple": (T, "q", dict(pair=lambda n, p: (n, p, p))),
    "q is a list of one": (T, "q", dict(pair=lambda n, p: [n])),
    "q_nope is None": (T, "q_nope", dict(pair=lambda n, p: (None, p))),
    "q_pe is None": (T, "q_pe", dict(pair=lambda n, p: (n, None))),
    "kv_cache is a list": (T, "kv_cache", dict(kv_cache=[1])),
    "block_table is a list": (T, "block_table", dict(block_table=[[0, 1], [2, 3]])),
    "seq_lens is a list": (T, "seq_lens", dict(seq_lens=[20, 3])),
    "seq_lens is an int": (T, "seq_lens", dict(seq_lens=20)),
    "sinks is a float": (T, "sinks", dict(sinks=0.5)),
    "out is a list": (T, "out", dict(out=[])),
    "lse is a bool": (T, "lse", dict(lse=True)),
    # dtypes
    "q is float32": (T, "q", dict(q=lambda t: t.float())),
    "q_pe of another dtype": (T, "q_pe", dict(pair=lambda n, p: (n, p.half()))),
    "kv_cache of another dtype": (T, "kv_cache", dict(kv_cache=lambda t: t.half())),
    "kv_cache is fp8": (T, "kv_cache", dict(kv_cache=lambda t: t.nan_to_num().to(torch.float8_e4m3fn))),
    "block_table is int64": (T, "block_table", dict(block_table=lambda t: t.long())),
    "seq_lens is int64": (T, "seq_lens", dict(seq_lens=lambda t: t.long())),
    "seq_lens is float": (T, "seq_lens", dict(seq_lens=lambda t: t.float())),
    "sinks is bf16": (T, "sinks", dict(sinks=torch.zeros(4, dtype=BF16))),
    "out is float32": (T, "out", dict(out=lambda t: t.float())),
    "lse is bf16": (T, "lse", dict(lse=lambda t: t.to(BF16))),
    # ranks
    "q without s_q": (V, "q", dict(q=lambda t: t[:, 0])),
    "q_nope without s_q": (V, "q_nope", dict(pair=lambda n, p: (n[:, 0], p[:, 0]))),
    "q_pe without s_q": (V, "q_pe", dict(pair=lambda n, p: (n, p[:, 0]))),
    "kv_cache with a head dimension": (V, "kv_cache", dict(kv_cache=lambda t: t.unsqueeze(2))),
    "block_table of one row": (V, "block_table", dict(block_table=lambda t: t[0])),
    "seq_lens of two dimensions": (V, "seq_lens", dict(seq_lens=lambda t: t[:, None])),
    "sinks of two dimensions": (V, "sinks", dict(sinks=torch.zeros(1, 4))),
    "out without s_q": (V, "out", dict(out=lambda t: t[:, 0])),
    "lse without s_q": (V, "lse", dict(lse=lambda t: t[:, 0])),
    # shapes
    "q too narrow": (V, "q", dict(q=lambda t: t[..., :500])),
    "q of an odd rope width": (V, "q", dict(q=lambda t: t[..., :560])),
    "q without heads": (V, "q", dict(q=lambda t: t[:, :, :0])),
    "q without tokens": (V, "q", dict(q=lambda t: t[:, :0])),
    "q of too many heads": (V, "q", dict(q=torch.zeros(2, 1, 129, 576, dtype=BF16))),
    "q of too many rows": (V, "q", dict(q=torch.zeros(2, 5, 128, 576, dtype=BF16))),
    "q_nope too wide": (V, "q_nope", dict(pair=lambda n, p: (torch.cat([n, p], -1), p))),
    "q_pe of other heads": (V, "q_pe", dict(pair=lambda n, p: (n, p[:, :, :3]))),
    "q_pe of an odd width": (V, "q_pe", dict(pair=lambda n, p: (n, p[..., :48]))),
    "kv_cache too narrow": (V, "kv_cache", dict(kv_cache=lambda t: t[..., :512])),
    "kv_cache too wide for the pair": (V, "kv_cache", dict(pair=lambda n, p: (n, p[..., :32]))),
    "pages of no token": (V, "kv_cache", dict(kv_cache=lambda t: t[:, :0])),
    "pages of 129 tokens": (V, "kv_cache", dict(kv_cache=torch.zeros(2, 129, 576, dtype=BF16))),
    "block_table of another batch": (V, "block_table", dict(block_table=lambda t: t[:1])),
    "seq_lens of another batch": (V, "seq_lens", dict(seq_lens=torch.zeros(3, dtype=I32))),
    "sinks of other heads": (V, "sinks", dict(sinks=torch.zeros(5))),
    "one sink for all": (V, "sinks", dict(sinks=torch.zeros(1))),
    "out too wide": (V, "out", dict(out=torch.zeros(2, 2, 4, 576, dtype=BF16))),
    "out of other heads": (V, "out", dict(out=lambda t: t[:, :, :3])),
    "lse of [batch, heads, s_q]": (V, "lse", dict(lse=lambda t: t.transpose(1, 2))),
    # strides
    "q not contiguous": (V, "q", dict(q=lambda t: torch.cat([t, t], -1)[..., ::2])),
    "q_pe not contiguous": (V, "q_pe", dict(pair=lambda n, p: (n, torch.cat([p, p], -1)[..., ::2]))),
    "kv_cache not contiguous": (V, "kv_cache", dict(kv_cache=lambda t: torch.cat([t, t], -1)[..., ::2])),
    "block_table not contiguous": (V, "block_table", dict(block_table=lambda t: torch.cat([t, t], -1)[:, ::2])),
    "seq_lens not contiguous": (V, "seq_lens", dict(seq_lens=lambda t: torch.cat([t, t])[::2])),
    "sinks not contiguous": (V, "sinks", dict(sinks=torch.zeros(8)[::2])),
    "out not contiguous": (V, "out", dict(out=torch.full((2, 2, 4, 1024), 7.0, dtype=BF16)[..., ::2])),
    # devices
    "q_pe elsewhere": (V, "q_pe", dict(pair=lambda n, p: (n, p.to(META)))),
    "kv_cache elsewhere": (V, "kv_cache", dict(kv_cache=lambda t: t.to(META))),
    "block_table elsewhere": (V, "block_table", dict(block_table=lambda t: t.to(META))),
    "seq_lens elsewhere": (V, "seq_lens", dict(seq_lens=lambda t: t.to(META))),
    "sinks elsewhere": (V, "sinks", dict(sinks=torch.zeros(4, device=META))),
    "out elsewhere": (V, "out", dict(out=lambda t: t.to(META))),
    "lse elsewhere": (V, "lse", dict(lse=lambda t: t.to(META))),
    # numbers and names
    "sm_scale is None": (T, "sm_scale", dict(sm_scale=None)),
    "sm_scale is a tensor": (T, "sm_scale", dict(sm_scale=torch.tensor(0.1))),
    "sm_scale is a string": (T, "sm_scale", dict(sm_scale="0.1")),
    "sm_scale is a bool": (T, "sm_scale", dict(sm_scale=True)),
    "sm_scale is nan": (V, "sm_scale", dict(sm_scale=float("nan"))),
    "sm_scale is inf": (V, "sm_scale", dict(sm_scale=float("inf"))),
    "sm_scale is zero": (V, "sm_scale", dict(sm_scale=0.0)),
    "sm_scale is negative": (V, "sm_scale", dict(sm_scale=-0.5)),
    "kv_lora_rank is None": (V, "kv_lora_rank", dict(kv_lora_rank=None)),
    "kv_lora_rank is 576": (V, "kv_lora_rank", dict(kv_lora_rank=576)),
    "kv_lora_rank is a float": (V, "kv_lora_rank", dict(kv_lora_rank=512.0)),
    "backend unknown": (V, "backend", dict(backend="sm100")),
    "backend is None": (V, "backend", dict(backend=None)),
    "backend needs a GPU": (V, "backend", dict(backend="sm90")),
    # gradients
    "q wants a gradient": (V, "q", dict(q=lambda t: t.requires_grad_())),
    "q_pe wants a gradient": (V, "q_pe", dict(pair=lambda n, p: (n, p.requires_grad_()))),
    "kv_cache wants a gradient": (V, "kv_cache", dict(kv_cache=lambda t: t.requires_grad_())),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, seen):
    kind, argument, change = WRONG[name]
    given = arguments(**change)
    outputs = [given[n] for n in ("out", "lse") if n not in change]
    for _ in range(2):  # the same error when asked again
        with pytest.raises(JitmlaError) as caught:
            call(dict(given))
        error = caught.value
        assert type(error) is kind and isinstance(error, TypeError if kind is T else ValueError), repr(error)
        text = str(error)
        assert argument in text.replace("=", " ").replace(":", " ").split("\n")[0].split(), text
        assert error.supported and error.differs and error.remedy, text
    assert all(bool((t == 7).all()) for t in outputs), "written although refused"
    assert seen == [], "refused before anything was chosen"


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


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(op, "_prepared", {})
    monkeypatch.setattr(op, "PREPARED_MAX", 4)
    for heads in range(1, 8):
        problem = mla_decode_problem([3], heads=heads, kv_lora_rank=64, page_size=16)
        for _ in range(2):
            jitmla.mla_decode(*problem.args, **problem.kwargs)
        assert len(op._prepared) <= 4


def test_a_strided_last_dimension_of_one_element_is_contiguous():
    """Its stride is never stepped over, and PyTorch reports any value for it."""
    problem = mla_decode_problem([3], heads=1, page_size=16)
    lens = torch.tensor([3, 0], dtype=I32)[::2]
    out = jitmla.mla_decode(*dataclasses.replace(problem, seq_lens=lens).args, **problem.kwargs)
    assert torch.equal(out, jitmla.mla_decode(*problem.args, **problem.kwargs))
