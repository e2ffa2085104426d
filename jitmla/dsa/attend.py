"""Op 2: everything of a DSA layer that depends on the batch. A captured graph may hold it for generation tokens
alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import jitmla

from ..errors import InvalidArgument
from .batch import Batch, Context, Generation, plan_chunks
from .layer import Layer

NATIVE_NEXT_N = 2  # rows of a request that the paged logits take at once


def attend(layer: Layer, batch: Batch, q: Tensor, compressed_kv: Tensor, k_pe: Tensor, indexer: Sequence[Tensor],
           position_ids: Tensor | None, output: Tensor) -> None:
    """Write the attention output of the batch's tokens to output [T, heads * v_head_dim], and zeros to the rows behind.

    Of the other arguments, outputs of `project`, only the first batch.tokens rows are read, and none is written.
    """
    c, n, split = layer.config, batch.tokens, batch.context_tokens
    output[n:].zero_()
    if n == 0:
        return
    if n > output.shape[0]:
        raise InvalidArgument(f"{output.shape[0]} rows for a batch of {n} tokens", supported="at least as many rows",
                              differs="tokens are missing", remedy="allocate output for the padded number of tokens")
    capturing = output.is_cuda and torch.cuda.is_current_stream_capturing()
    if batch.context_tokens and capturing:
        raise InvalidArgument("jitmla::mla_dsa_attn_inplace on context tokens during CUDA graph capture",
                              supported="generation tokens alone", differs=f"the batch has {split} context tokens",
                              remedy="split the graph at this op (jitmla.engines.piecewise), or capture decode batches")
    if c.debug and not capturing:
        _check_pages(layer, batch)
    positions = torch.arange(n, device=q.device) if position_ids is None else position_ids[:n]
    heads = q[:n].view(n, c.heads, c.qk_head_dim)
    if c.llama_4_scaling is not None:
        beta, original = c.llama_4_scaling
        heads = heads * (1 + beta * torch.log1p(((positions + 1) // original).float())).to(q.dtype)[:, None, None]
    nope, rope = heads.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    absorbed = q.new_empty(n, c.heads, c.kv_lora_rank + c.qk_rope_head_dim)
    # the new rows must be in the caches before anything is selected or attended: a token sees itself
    found = [x[:n] for x in indexer] if layer.has_indexer else []
    keys = dict(k_fp8=found[1], k_scale=found[2], index_cache=layer.index_cache,
                index_slot_mapping=batch.index_slot_mapping) if found else {}
    jitmla.dsa_append(rope, absorbed[..., c.kv_lora_rank:], compressed_kv[:n], k_pe[:n], positions, layer.cos_sin,
                      layer.kv_cache, batch.slot_mapping, **keys, backend=c.backend)
    # before the selection, whose kernels are then launched without a gap up to the attention
    torch.bmm(nope.transpose(0, 1), layer.weights.w_uk, out=absorbed[..., :c.kv_lora_rank].transpose(0, 1))
    if found:
        _select(layer, batch, found[0], found[3])
    topk = batch.topk_of(c.index_topk)

    latent = q.new_empty(n, c.heads, c.kv_lora_rank)
    for part, rows, s_q in ((batch.context, slice(0, split), 1), (batch.generation, slice(split, n), None)):
        if part is not None and part.tokens:
            s_q = s_q or batch.generation.next_n  # type: ignore[union-attr]
            entries = jitmla.local_to_global(topk[rows], part.request_of, part.block_table,
                                             page_size=layer.kv_cache.shape[1], backend=c.backend)
            jitmla.sparse_mla_decode(absorbed[rows].unflatten(0, (-1, s_q)), layer.kv_cache,
                                     entries.unflatten(0, (-1, s_q)), sm_scale=c.sm_scale,
                                     out=latent[rows].unflatten(0, (-1, s_q)), backend=c.backend)
    by_head = output[:n].view(n, c.heads, c.v_head_dim).transpose(0, 1)
    torch.bmm(latent.transpose(0, 1), layer.weights.w_uv, out=by_head)


def _check_pages(layer: Layer, batch: Batch) -> None:
    """On the host: block tables and slots lie in the caches."""
    caches = ((layer.kv_cache, "block_table", batch.slot_mapping),
              (layer.index_cache, "index_block_table", batch.index_slot_mapping))
    for cache, table, slots in caches:
        if cache is None:
            continue
        for part in (batch.context, batch.generation):
            if part is not None and part.tokens and int(getattr(part, table).max()) >= cache.shape[0]:
                raise InvalidArgument(f"{table} with page {int(getattr(part, table).max())}",
                                      supported=f"pages below {cache.shape[0]}", differs="the cache has no such page",
                                      remedy="look at how the engine fills its block tables")
        if int(slots.max()) >= cache.shape[0] * cache.shape[1]:
            raise InvalidArgument(f"slot {int(slots.max())}", supported=f"below {cache.shape[0] * cache.shape[1]}",
                                  differs="the cache has no such row",
                                  remedy="look at how the engine computes slot_mapping and index_slot_mapping")


# ------------------------------------------------------------------------------------------------------- the indexer


def _select(layer: Layer, batch: Batch, q_fp8: Tensor, weights: Tensor) -> None:
    """The positions that each token attends to into batch.topk; the indexer's keys are in its cache."""
    split = batch.context_tokens
    topk = batch.topk_of(layer.config.index_topk)
    if batch.context is not None and split:
        _select_context(layer, batch.context, q_fp8[:split], weights[:split], topk[:split])
    if batch.generation is not None and batch.generation.tokens:
        _select_generation(layer, batch.generation, q_fp8[split:], weights[split:], topk[split:])


def _all_positions(lengths: Tensor, topk: Tensor) -> None:
    """Lists that hold every position: for rows that see no more than there is room for."""
    position = torch.arange(topk.shape[1], dtype=torch.int32, device=topk.device)
    topk.copy_(torch.where(position < lengths[:, None], position, -1))


def _select_context(layer: Layer, part: Context, q_fp8: Tensor, weights: Tensor, topk: Tensor) -> None:
    c, device = layer.config, q_fp8.device
    ends = [k - q + i + 1 for q, k in zip(part.q_lens, part.kv_lens, strict=True) for i in range(q)]
    if max(part.kv_lens) <= c.index_topk:
        return _all_positions(torch.tensor(ends, dtype=torch.int32).to(device), topk)
    requests = [r for r, q in enumerate(part.q_lens) for _ in range(q)]
    held, keys = None, None
    for which, rows in plan_chunks(part.q_lens, part.kv_lens, c.max_logits_bytes):
        starts = [0]
        for r in which:
            starts.append(starts[-1] + part.kv_lens[r])
        low = [starts[requests[i] - which.start] for i in rows]
        high = [first + ends[i] for first, i in zip(low, rows, strict=True)]
        bounds = torch.tensor([*starts, *low, *high], dtype=torch.int32).to(device)
        cumulative, ks, ke = bounds.split([len(starts), len(rows), len(rows)])
        if held != which:  # the runs of one request share its keys
            table = part.index_block_table[which.start:which.stop]
            keys = jitmla.indexer_k_gather(layer.index_cache, table, cumulative, starts[-1], backend=c.backend)
            held = which
        own = slice(rows.start, rows.stop)
        logits = jitmla.fp8_mqa_logits(q_fp8[own], *keys, weights[own], ks, ke, clean_logits=False, backend=c.backend)
        jitmla.topk_indices(logits, c.index_topk, row_start=ks, row_end=ke, out=topk[own], backend=c.backend)


def _select_generation(layer: Layer, part: Generation, q_fp8: Tensor, weights: Tensor, topk: Tensor) -> None:
    c, next_n = layer.config, part.next_n
    if part.max_context_len <= c.index_topk:
        return _all_positions(part.row_lens(), topk)
    lengths, table = part.seq_lens, part.index_block_table
    if next_n > NATIVE_NEXT_N:  # a request for each token
        lengths, next_n = part.row_lens(), 1
        table = table.repeat_interleave(part.next_n, 0, output_size=part.tokens)
    logits = jitmla.fp8_paged_mqa_logits(q_fp8.unflatten(0, (-1, next_n)), layer.index_cache, weights, lengths, table,
                                         max_context_len=part.max_context_len, backend=c.backend)
    jitmla.topk_indices(logits, c.index_topk, seq_lens=lengths, next_n=next_n, out=topk, backend=c.backend)


