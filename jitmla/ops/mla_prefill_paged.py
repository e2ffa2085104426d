"""mla_prefill_paged: new tokens over a paged latent cache that has them and a prefix, in the MHA or the MQA form."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, events, pick
from ..errors import InvalidArgument
from . import checks
from .gather_latent import gather_latent
from .merge_attn_states import merge_attn_states
from .mla_prefill import mla_prefill
from .mla_prefill_absorbed import mla_prefill_absorbed
from .prefill_arguments import (
    TYPES,
    check_count,
    check_offsets,
)

OP = "mla_prefill_paged"
FORMS = ("auto", "mha", "absorbed")
SMS = 132  # of an H200: without a GPU the form is the one that it would be there


def mla_prefill_paged(q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
                      kv_b_proj: Tensor, *, max_seqlen_q: int, max_prefix: int, v_head_dim: int,
                      sm_scale: float = checks.REQUIRED, form: str = "auto", chunk_tokens: int = 65536,
                      out: Tensor | None = None, lse: Tensor | None = None, return_lse: bool = False,
                      backend: str = "auto") -> Any:
    """Causal attention of new tokens whose latent rows, and those of a prefix, are in a paged cache.

    form "mha": the rows are gathered, expanded per head by kv_b_proj (torch), and attended by mla_prefill: the new
    tokens causally, the prefix in chunks, whose results merge_attn_states joins in float32. Any chunking gives the same
    up to rounding. "absorbed": kv_b_proj goes into the query and the output, and mla_prefill_absorbed reads the cache
    as it is. "auto" takes the one that should be faster (jitmla.pick.prefill_form; jitmla.explain of a mla_prefill Spec
    says which, and why), and says so in an event; it does not depend on lengths that only the device knows.

    q: [tokens, heads, qk_nope_head_dim + qk_rope_head_dim], bf16 or fp16; the requests one behind the other.
    kv_cache: [pages, page_size, kv_lora_rank + qk_rope_head_dim]; block_table: [batch, max_pages] int32.
    seq_lens: [batch] int32, rows of each request in the cache, the new tokens' rows included. cu_seqlens_q: [batch + 1]
        int32: where each request begins among the tokens.
    kv_b_proj: [heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank], the weight as checkpoints have it.
    max_seqlen_q, max_prefix: upper bounds of a request's new tokens and of its cached tokens before them (0: none).
    sm_scale: positive factor of the dot product of (P + r) columns; see jitmla.mla_prefill.
    chunk_tokens: most rows of all prefixes that are expanded at a time: memory against launches. Each request gets the
        same share, in whole pages.
    out: [tokens, heads, v_head_dim]; lse: [tokens, heads] float32, natural logarithm. Rows behind the last request are
        not written.
    backend: "auto" or "reference", for all that is launched.

    Returns out, or (out, lse) with return_lse. No host synchronisation on a GPU. Raises InvalidArgument,
    InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing, CacheUntrusted,
    MissNotAllowed.
    """
    nope, rank = _check(q, kv_cache, block_table, seq_lens, cu_seqlens_q, kv_b_proj, max_seqlen_q, max_prefix,
                        v_head_dim, sm_scale, form, chunk_tokens, out, lse)
    tokens, heads, width = q.shape
    if form == "auto":
        sms = dispatch.sm_count(q.device) if q.is_cuda else SMS
        form, why = pick.prefill_form(heads=heads, requests=max(block_table.shape[0], 1), new=max_seqlen_q,
                                      prefix=max_prefix, kv_lora_rank=rank, qk_head_dim=width, qk_nope_head_dim=nope,
                                      v_head_dim=v_head_dim, sms=sms)
        if not torch.compiler.is_compiling():
            _say(form, why)
    if out is None:
        out = torch.empty((tokens, heads, v_head_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return (out, q.new_empty(0, heads, dtype=torch.float32) if lse is None else lse) if return_lse else out
    weight = kv_b_proj.view(heads, nope + v_head_dim, rank)
    real = (torch.arange(tokens, device=q.device) < cu_seqlens_q[-1])[:, None]  # not behind the last request
    if form == "absorbed":
        q_latent = torch.cat([torch.bmm(q[..., :nope].transpose(0, 1), weight[:, :nope]).transpose(0, 1),
                              q[..., nope:]], -1)
        latent, found_lse = mla_prefill_absorbed(q_latent, kv_cache, block_table, seq_lens, cu_seqlens_q,
                                                 max_seqlen_q=max_seqlen_q, kv_lora_rank=rank, sm_scale=sm_scale,
                                                 lse=lse, return_lse=True, backend=backend)
        projected = torch.bmm(latent.transpose(0, 1), weight[:, nope:].transpose(1, 2)).transpose(0, 1)
        torch.where(real[..., None], projected, out, out=out)
        return (out, found_lse) if return_lse else out

    def attend(starts: Tensor, cu_rows: Tensor, rows: int, longest: int, causal: bool, into: Tensor | None
               ) -> tuple[Tensor, Tensor]:
        """Attention to these rows of the cache. Those behind the last request hold anything, and are not read."""
        latent = torch.empty((rows, kv_cache.shape[2]), dtype=kv_cache.dtype, device=q.device)
        gather_latent(kv_cache, block_table, starts, cu_rows, out=latent, backend=backend)
        expanded = torch.nn.functional.linear(latent[:, :rank], kv_b_proj).view(rows, heads, nope + v_head_dim)
        return mla_prefill(q, (expanded[..., :nope], latent[:, None, rank:]), expanded[..., nope:], cu_seqlens_q,
                           cu_rows, max_seqlen_q=max_seqlen_q, max_seqlen_k=longest, sm_scale=sm_scale, causal=causal,
                           out=into, return_lse=True, backend=backend)

    prefix = seq_lens - (cu_seqlens_q[1:] - cu_seqlens_q[:-1])
    found, found_lse = attend(prefix, cu_seqlens_q, tokens, max_seqlen_q, True, None if max_prefix else out)
    if max_prefix:
        batch, page_size = seq_lens.shape[0], kv_cache.shape[1]
        chunk = max(chunk_tokens // batch // page_size, 1) * page_size
        chunk = min(chunk, -(-max_prefix // page_size) * page_size)
        found = found.float()
        for start in range(0, max_prefix, chunk):
            counts = (prefix - start).clamp(0, chunk)
            cu_rows = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            part = attend(torch.full_like(seq_lens, start), cu_rows, batch * chunk, chunk, False, None)
            merge_attn_states(found, found_lse, *part, out=found, lse=found_lse, backend=backend)
        out.copy_(torch.where(real[..., None], found, out))
    if lse is not None:
        torch.where(real, found_lse, lse, out=lse)
        found_lse = lse
    return (out, found_lse) if return_lse else out


@functools.lru_cache(maxsize=4096)
def _say(form: str, why: str) -> None:
    """Once for each size: an event is not for every call of every layer."""
    events.emit("choose", op=OP, backend=form, why=why)


def _check(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, cu_seqlens_q: Any, kv_b_proj: Any,
           max_seqlen_q: Any, max_prefix: Any, v_head_dim: Any, sm_scale: Any, form: Any, chunk_tokens: Any, out: Any,
           lse: Any) -> tuple[int, int]:
    """Raise InvalidArgument or InvalidArgumentType unless the op is defined on these: (qk_nope_head_dim, rank)."""
    checks.scale(OP, sm_scale)
    if form not in FORMS:
        raise InvalidArgument(f"form={form!r}", supported=", ".join(FORMS), differs="there is no such form",
                              remedy="leave it out to have it chosen")
    checks.tensor("q", q, "[tokens, heads, qk_head_dim]", 3)
    checks.dtype("q", q, TYPES)
    checks.tensor("kv_cache", kv_cache, "[pages, page_size, kv_lora_rank + qk_rope_head_dim]", 3)
    checks.dtype("kv_cache", kv_cache, [q.dtype])
    checks.tensor("kv_b_proj", kv_b_proj, "[heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]", 2)
    checks.dtype("kv_b_proj", kv_b_proj, [q.dtype])
    for name, value, least in (("max_seqlen_q", max_seqlen_q, 0), ("max_prefix", max_prefix, 0),
                               ("v_head_dim", v_head_dim, 1), ("chunk_tokens", chunk_tokens, 1)):
        check_count(name, value)
        if value < least:
            raise InvalidArgument(f"{name}={value}", supported=f"at least {least}", differs="it is less",
                                  remedy=f"leave {name} out for the default")
    tokens, heads, width = q.shape
    rows, rank = kv_b_proj.shape
    nope = rows // max(heads, 1) - v_head_dim
    uneven = heads < 1 or rows % heads or nope < 0 or width - nope != kv_cache.shape[2] - rank
    if uneven or not kv_b_proj.is_contiguous():
        raise InvalidArgument(f"kv_b_proj: {checks.describe(kv_b_proj)} for {heads} heads",
                              supported="[heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank], contiguous, with q "
                              "[.., qk_nope_head_dim + r] and kv_cache [.., kv_lora_rank + r]",
                              differs=f"q is {width} wide, kv_cache {kv_cache.shape[2]}, v_head_dim={v_head_dim}",
                              remedy="pass this rank's rows of kv_b_proj as they lie in the checkpoint")
    checks.tensor("block_table", block_table, "[batch, max_pages]", 2)
    checks.dtype("block_table", block_table, [torch.int32])
    batch = block_table.shape[0]
    for name, value, size in (("seq_lens", seq_lens, batch), ("cu_seqlens_q", cu_seqlens_q, batch + 1)):
        if batch or name == "cu_seqlens_q":
            check_offsets(name, value, q.device)
        checks.shape(name, value, "", [size], "block_table")
    for name, value in (("kv_cache", kv_cache), ("block_table", block_table), ("kv_b_proj", kv_b_proj)):
        checks.device(name, value, q.device)
    checks.output("out", out, (tokens, heads, v_head_dim), q.dtype, q)
    if lse is not None:
        checks.tensor("lse", lse, "[tokens, heads]", 2)
        checks.shape("lse", lse, "[tokens, heads]", [tokens, heads], "q")
    checks.no_gradient(OP, q=q, kv_cache=kv_cache, kv_b_proj=kv_b_proj)
    return nope, rank
