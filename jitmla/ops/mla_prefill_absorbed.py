"""mla_prefill_absorbed: several new tokens per request over a paged latent cache, with weight absorption."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import checks
from .mla_decode import mla_decode
from .mla_decode_arguments import MAX_ROWS
from .prefill_arguments import check_count, check_offsets

OP = "mla_prefill_absorbed"


def mla_prefill_absorbed(q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *,
                         max_seqlen_q: int, kv_lora_rank: int, sm_scale: float = checks.REQUIRED, causal: bool = True,
                         out: Tensor | None = None, lse: Tensor | None = None, return_lse: bool = False,
                         backend: str = "auto") -> Any:
    """jitmla.mla_decode for requests with different numbers of new tokens: the MQA form of prefill.

    For short suffixes of long prefixes: nothing is expanded per head, at 3.4 times the products of the MHA form for
    each pair of query and key (DeepSeek-V3). The formula is that of mla_decode, as are kv_cache, block_table,
    kv_lora_rank, sm_scale, causal, return_lse and backend; but

    q: [tokens, heads, kv_lora_rank + qk_rope_head_dim], the requests one behind the other, W_UK absorbed.
    cu_seqlens_q: [batch + 1] int32: where each request begins among the tokens, from 0; seq_lens: [batch] int32, tokens
        in the cache, the new ones included. Requests may have no new tokens.
    max_seqlen_q: upper bound of the new tokens of a request, for scheduling.
    out: [tokens, heads, kv_lora_rank] and lse: [tokens, heads] float32. Rows behind the last request are not written.

    The tokens of a request are taken in groups that fill the row tiles of the decode kernels, and their limits follow
    from seq_lens on the device: no host synchronisation. Returns out, or (out, lse). Raises what mla_decode raises.
    """
    _check(q, kv_cache, block_table, seq_lens, cu_seqlens_q, max_seqlen_q, kv_lora_rank, sm_scale, out, lse)
    tokens, heads, _ = q.shape
    if out is None:
        out = torch.empty((tokens, heads, kv_lora_rank), dtype=q.dtype, device=q.device)
    if lse is None and return_lse:
        lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if tokens and block_table.shape[0]:
        size = group_size(heads, max_seqlen_q)
        groups = _groups(seq_lens, cu_seqlens_q, tokens, size, causal)
        found, found_lse = mla_decode(q[groups.token], kv_cache, block_table[groups.request], groups.length,
                                      kv_lora_rank=kv_lora_rank, sm_scale=sm_scale, causal=causal, return_lse=True,
                                      backend=backend)
        real = groups.real[:, None]
        torch.where(real[..., None], found.flatten(0, 1)[groups.row], out, out=out)
        if lse is not None:
            torch.where(real, found_lse.flatten(0, 1)[groups.row], lse, out=lse)
    return (out, lse) if return_lse else out


def group_size(heads: int, max_seqlen_q: int) -> int:
    """Tokens of one request that a decode kernel takes together: as many as its rows, but no more than there are."""
    most = max(1, MAX_ROWS // heads)
    needed = 1 << (max(max_seqlen_q, 1) - 1).bit_length()
    return min(most, needed)


class Groups(NamedTuple):
    """Tokens in groups of `size`, each of one request; they end with the request's last token, so that the first group
    of a request may begin with tokens that are not its own, and do not matter."""

    token: Tensor  # [groups, size] int64
    request: Tensor  # [groups] int64
    length: Tensor  # [groups] int32: keys that the last token of the group sees; 0: a group of no request
    row: Tensor  # [tokens] int64: where the token's result is among the groups' rows
    real: Tensor  # [tokens] bool: not behind the last request


def _groups(seq_lens: Tensor, cu_seqlens_q: Tensor, tokens: int, size: int, causal: bool) -> Groups:
    batch, device = seq_lens.shape[0], seq_lens.device
    most = (tokens + batch * (size - 1)) // size  # of the sum of ceil(count / size)
    begins, stops = cu_seqlens_q[:-1], cu_seqlens_q[1:]
    ends = ((stops - begins + (size - 1)) // size).cumsum(0)  # groups up to and with each request
    shift = ends * size - stops  # from a token to its row

    group = torch.arange(most, device=device)
    request = torch.searchsorted(ends, group, right=True).clamp_(max=batch - 1)
    token = (torch.arange(most * size, device=device).view(most, size) - shift[request][:, None]).clamp_(0, tokens - 1)
    length = seq_lens[request]
    if causal:
        length = length - (ends[request] - 1 - group) * size
    length = (length.clamp(min=0) * (group < ends[-1])).int()

    position = torch.arange(tokens, dtype=torch.int32, device=device)
    owner = torch.searchsorted(stops, position, right=True).clamp_(max=batch - 1)
    row = (position + shift[owner]).clamp_(0, most * size - 1)
    return Groups(token, request, length, row, position < stops[-1])


def _check(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, cu_seqlens_q: Any, max_seqlen_q: Any,
           kv_lora_rank: Any, sm_scale: Any, out: Any, lse: Any) -> None:
    """What mla_decode cannot check, because it sees the groups instead."""
    checks.scale(OP, sm_scale)
    checks.tensor("q", q, "[tokens, heads, kv_lora_rank + qk_rope_head_dim]", 3)
    checks.tensor("block_table", block_table, "[batch, max_pages]", 2)
    checks.tensor("kv_cache", kv_cache, "[pages, page_size, width]", 3)
    batch = block_table.shape[0]
    checks.tensor("seq_lens", seq_lens, "[batch]", 1)
    checks.dtype("seq_lens", seq_lens, [torch.int32])
    checks.shape("seq_lens", seq_lens, "[batch]", [batch], "block_table")
    check_offsets("cu_seqlens_q", cu_seqlens_q, q.device)
    checks.shape("cu_seqlens_q", cu_seqlens_q, "[batch + 1]", [batch + 1], "block_table")
    check_count("max_seqlen_q", max_seqlen_q)
    if not isinstance(kv_lora_rank, int) or not 0 < kv_lora_rank <= q.shape[2]:
        raise InvalidArgument(f"kv_lora_rank={kv_lora_rank!r}", supported=f"1 to {q.shape[2]}, the width of q",
                              differs="it is not there", remedy="for DeepSeek-V3 it is 512, and q has 576 columns")
    checks.output("out", out, (*q.shape[:2], kv_lora_rank), q.dtype, q)
    if lse is not None:
        checks.output("lse", lse, tuple(q.shape[:2]), torch.float32, q)
    checks.no_gradient(OP, q=q, kv_cache=kv_cache)
