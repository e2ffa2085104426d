"""Every way to call mla_decode wrongly, for tests with and without a GPU."""

import numpy
import pytest
import torch

import jitmla
from jitmla.errors import InvalidArgument, InvalidArgumentType, JitmlaError
from jitmla.testing import mla_decode_problem

BF16, I32, E4M3 = torch.bfloat16, torch.int32, torch.float8_e4m3fn


def arguments(device="cpu", **change):
    """A valid call (2 requests, s_q = 2, 4 heads, 512 + 64, pages of 64) with some arguments exchanged.

    A change is a value, or a function of the valid value; `pair` is a function of the two parts of q."""
    pair = change.pop("pair", None)
    problem = mla_decode_problem([20, 3], heads=4, s_q=2, query="pair" if pair else "joined",
                                 device=device)
    if pair:
        change["q"] = pair(*problem.q)
    base = dict(q=problem.q, kv_cache=problem.kv_cache, block_table=problem.block_table, seq_lens=problem.seq_lens,
                **problem.kwargs, out=torch.full(problem.out_shape, 7.0, dtype=BF16, device=device),
                lse=torch.full(problem.out_shape[:3], 7.0, device=device))
    return {**base, **{k: here(v(base[k]) if callable(v) else v, device) for k, v in change.items()}}


def here(value, device):
    """New tensors of a change are made on the CPU; those on `meta` stay there, or go to the CPU when the call does not
    run there: pointers that a kernel must never see."""
    if not isinstance(value, torch.Tensor):
        return tuple(here(v, device) for v in value) if isinstance(value, tuple) else value
    if value.is_meta:
        return value if device == "cpu" else torch.zeros(value.shape, dtype=value.dtype)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def call(given):
    given = dict(given)
    return jitmla.mla_decode(given.pop("q"), given.pop("kv_cache"), given.pop("block_table"), given.pop("seq_lens"),
                             **given)


def check_refused(kind, argument, given):
    """The call raises exactly `kind`, names the argument in its first line, and says how to mend it."""
    with pytest.raises(JitmlaError) as caught:
        call(given)
    error = caught.value
    assert type(error) is kind and isinstance(error, TypeError if kind is T else ValueError), repr(error)
    text = str(error)
    assert argument in text.replace("=", " ").replace(":", " ").split("\n")[0].split(), text
    assert error.supported and error.differs and error.remedy, text


T, V = InvalidArgumentType, InvalidArgument  # type and value
COMPACT = dict(q=lambda t: t.flatten(0, 1), out=lambda t: t.flatten(0, 1), lse=lambda t: t.flatten(0, 1),
               cu_seqlens_q=torch.tensor([0, 2, 4], dtype=I32), max_q_len=2)
# name of the mistake -> class of the error, argument that it names, change
MISTAKES = {
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
    "kv_cache is fp8 without a scale": (V, "kv_descale", dict(kv_cache=lambda t: t.nan_to_num().to(E4M3))),
    "q is fp8 and kv_cache is not": (T, "kv_cache", dict(q=lambda t: t.to(E4M3), q_descale=1.0)),
    "a scale without fp8": (V, "kv_descale", dict(kv_descale=1.0)),
    "kv_descale is negative": (V, "kv_descale", dict(kv_cache=lambda t: t.nan_to_num().to(E4M3), kv_descale=-1.0)),
    "kv_descale of two": (V, "kv_descale", dict(kv_cache=lambda t: t.nan_to_num().to(E4M3), kv_descale=torch.ones(2))),
    "kv_descale is bf16": (T, "kv_descale", dict(kv_cache=lambda t: t.nan_to_num().to(E4M3),
                                                 kv_descale=torch.ones(1, dtype=BF16))),
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
    "q_pe elsewhere": (V, "q_pe", dict(pair=lambda n, p: (n, p.to("meta")))),
    "kv_cache elsewhere": (V, "kv_cache", dict(kv_cache=lambda t: t.to("meta"))),
    "block_table elsewhere": (V, "block_table", dict(block_table=lambda t: t.to("meta"))),
    "seq_lens elsewhere": (V, "seq_lens", dict(seq_lens=lambda t: t.to("meta"))),
    "sinks elsewhere": (V, "sinks", dict(sinks=torch.zeros(4, device="meta"))),
    "out elsewhere": (V, "out", dict(out=lambda t: t.to("meta"))),
    "lse elsewhere": (V, "lse", dict(lse=lambda t: t.to("meta"))),
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
    # features
    "max_q_len without cu_seqlens_q": (V, "max_q_len", dict(max_q_len=2)),
    "cu_seqlens_q without max_q_len": (T, "max_q_len", dict(COMPACT, max_q_len=None)),
    "cu_seqlens_q with a q of four dimensions": (V, "q", dict(COMPACT, q=lambda t: t)),
    "cu_seqlens_q of another batch": (V, "cu_seqlens_q", dict(COMPACT, cu_seqlens_q=torch.zeros(2, dtype=I32))),
    "cu_seqlens_q is int64": (T, "cu_seqlens_q", dict(COMPACT, cu_seqlens_q=torch.tensor([0, 2, 4]))),
    "compact, out of four dimensions": (V, "out", dict(COMPACT, out=lambda t: t)),
    "batch_invariant is None": (T, "batch_invariant", dict(batch_invariant=None)),
    # gradients
    "q wants a gradient": (V, "q", dict(q=lambda t: t.requires_grad_())),
    "q_pe wants a gradient": (V, "q_pe", dict(pair=lambda n, p: (n, p.requires_grad_()))),
    "kv_cache wants a gradient": (V, "kv_cache", dict(kv_cache=lambda t: t.requires_grad_())),
}
