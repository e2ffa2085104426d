"""FlashInfer's two ways to call MLA decode (flashinfer.mla, as of 0.6.8), over jitmla.mla_decode.

What differs: any GPU since Ampere, page size, head count and width are served; workspaces are not used; `backend` takes
jitmla's names. docs/coming_from.md lists which of FlashInfer's own test parameters pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import events
from ..errors import InvalidArgument
from ..ops.mla_decode import mla_decode

__all__ = ["BatchMLAPagedAttentionWrapper", "trtllm_batch_decode_with_kv_cache_mla"]
TABLE_MAX = 1 << 24  # entries of a block table that `plan` makes wider than needed rather than ask the device
E4M3 = torch.float8_e4m3fn


def trtllm_batch_decode_with_kv_cache_mla(
        query: Tensor, kv_cache: Tensor, workspace_buffer: Tensor | None, qk_nope_head_dim: int, kv_lora_rank: int,
        qk_rope_head_dim: int, block_tables: Tensor, seq_lens: Tensor, max_seq_len: int, sparse_mla_top_k: int = 0,
        out: Tensor | None = None, bmm1_scale: float | Tensor = 1.0, bmm2_scale: float | Tensor = 1.0,
        sinks: Sequence[Tensor] | Tensor | None = None, skip_softmax_threshold_scale_factor: float | None = None,
        enable_pdl: bool | None = None, backend: str = "auto", is_var_seq: bool = True,
        uses_shared_paged_kv_idx: bool = True) -> Tensor:
    """out [batch, q_len, heads, kv_lora_rank] = bmm2_scale * softmax(bmm1_scale * q k) v, causal at the end of each
    request.

    query: [batch, q_len, heads, kv_lora_rank + qk_rope_head_dim]. kv_cache: [pages, page_size, width] or with a head
    dimension of 1 as the second. block_tables: [batch, pages], or [batch, 2, pages] with uses_shared_paged_kv_idx=False
    (of MLA both rows are the same). bmm1_scale, bmm2_scale: floats, or with an e4m3 query float32 tensors [1] that are
    read on the device. workspace_buffer, qk_nope_head_dim, max_seq_len, enable_pdl and is_var_seq are not used.
    """
    if query.dim() != 4:
        raise _refused(f"query of {query.dim()} dimensions", "query [batch, q_len, heads, width]")
    if kv_cache.dim() == 4:
        if kv_cache.shape[1] != 1:
            raise _refused(f"kv_cache {list(kv_cache.shape)}", "[pages, 1, page_size, width]: MLA has one KV head")
        kv_cache = kv_cache.squeeze(1)
    elif kv_cache.dim() != 3:
        raise _refused(f"kv_cache of {kv_cache.dim()} dimensions", "3, or 4 with one KV head")
    if query.shape[-1] != kv_lora_rank + qk_rope_head_dim:
        raise _refused(f"query of width {query.shape[-1]}", f"{kv_lora_rank} + {qk_rope_head_dim}")
    if sparse_mla_top_k:
        raise _refused(f"sparse_mla_top_k={sparse_mla_top_k}", "0: dense attention")
    if skip_softmax_threshold_scale_factor is not None:
        raise _refused("skip_softmax_threshold_scale_factor", "exact attention, without it")
    if not uses_shared_paged_kv_idx:
        if block_tables.dim() != 3 or block_tables.shape[1] != 2:
            raise _refused(f"block_tables {list(block_tables.shape)}", "[batch, 2, pages] for separate K and V pages")
        block_tables = block_tables[:, 0]
    if isinstance(sinks, (list, tuple)):
        if len(sinks) != 1:
            raise _refused(f"{len(sinks)} tensors of sinks", "one tensor [heads]")
        sinks = sinks[0]
    scales, rest = _scales(query, kv_cache, bmm1_scale, bmm2_scale)
    result = mla_decode(query, kv_cache, block_tables, seq_lens, kv_lora_rank=kv_lora_rank, causal=True, sinks=sinks,
                        out=out, backend=backend, **scales)
    return result if rest == 1.0 else result.mul_(rest)


def _scales(query: Tensor, kv_cache: Tensor, bmm1: Any, bmm2: Any) -> tuple[dict[str, Any], float]:
    """(sm_scale and descales of mla_decode, what the result is still to be multiplied by). With logits scaled by
    sm_scale * q_descale * kv_descale and values by kv_descale, bmm2 is kv_descale and bmm1 / bmm2 the rest."""
    on_device = isinstance(bmm1, Tensor) or isinstance(bmm2, Tensor)
    for name, scale in (("bmm1_scale", bmm1), ("bmm2_scale", bmm2)):
        if isinstance(scale, Tensor) and scale.dtype != torch.float32:
            raise _refused(f"{name} of {scale.dtype}", "a float, or a float32 tensor [1]")
    if kv_cache.dtype != E4M3:
        if on_device:
            raise _refused(f"bmm scales on the device with a {kv_cache.dtype} cache", "floats, unless it is e4m3")
        return {"sm_scale": bmm1}, float(bmm2)
    if not on_device:
        q = {"q_descale": 1.0} if query.dtype == E4M3 else {}
        return {"sm_scale": bmm1 / bmm2, "kv_descale": float(bmm2), **q}, 1.0
    if query.dtype != E4M3:
        raise _refused(f"bmm scales on the device with a {query.dtype} query", "floats, unless it is e4m3")
    bmm1, bmm2 = (x.reshape(1) if isinstance(x, Tensor) else torch.full((1,), x, device=query.device)
                  for x in (bmm1, bmm2))
    return {"sm_scale": 1.0, "q_descale": bmm1 / bmm2, "kv_descale": bmm2}, 1.0


class BatchMLAPagedAttentionWrapper:
    """`plan` once a step, `run` once a layer, as FlashInfer's.

    `plan` turns the page list of the requests into a block table, on the device, and computes nothing else. It copies
    nothing to the host, as long as what it has to know of the shapes is there: qo_indptr and kv_indptr as CPU tensors,
    or max_q_len and max_pages, which FlashInfer does not have. Without them it reads the two on the host, as FlashInfer
    always does, and emits a `degrade` event.
    """

    def __init__(self, float_workspace_buffer: Tensor, use_cuda_graph: bool = False, qo_indptr: Tensor | None = None,
                 kv_indptr: Tensor | None = None, kv_indices: Tensor | None = None, kv_len_arr: Tensor | None = None,
                 backend: str = "auto") -> None:
        """The buffers are used with use_cuda_graph only: `plan` copies into them, and into a block table of its own
        that keeps its place; kv_indices bounds how many pages a request can have. float_workspace_buffer names the
        device."""
        if use_cuda_graph and any(t is None for t in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)):
            raise _refused("use_cuda_graph=True without all of qo_indptr, kv_indptr, kv_indices and kv_len_arr",
                           "fixed buffers for all four")
        self.device, self._backend, self._graph = float_workspace_buffer.device, backend, use_cuda_graph
        self._qo_indptr, self._kv_indices, self._kv_len = qo_indptr, kv_indices, kv_len_arr
        self._kv_indptr = kv_indptr
        self._table: Tensor | None = None

    def plan(self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor, num_heads: int,
             head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool, sm_scale: float,
             q_data_type: torch.dtype, kv_data_type: torch.dtype, use_profiler: bool = False, *,
             max_q_len: int | None = None, max_pages: int | None = None) -> None:
        """qo_indptr, kv_indptr: [batch + 1] int32, kv_indices: [>= kv_indptr[-1]] int32, kv_len_arr: [batch] int32, on
        the CPU or on the device. max_q_len, max_pages: bounds of the query tokens and of the pages of a request."""
        if use_profiler:
            raise _refused("use_profiler=True", "no profiler inside the kernels")
        batch = kv_len_arr.shape[0]
        for name, value, size in (("qo_indptr", qo_indptr, batch + 1), ("kv_indptr", kv_indptr, batch + 1)):
            if value.dtype != torch.int32 or tuple(value.shape) != (size,):
                raise _refused(f"{name} {list(value.shape)} {value.dtype}", f"[{size}] torch.int32")
        self._q_lens = _host_steps(qo_indptr, max_q_len, "qo_indptr")
        width = self._width(batch, kv_indptr, self._kv_indices if self._graph else kv_indices, max_pages)
        if self._graph:
            for buffer, value in ((self._qo_indptr, qo_indptr), (self._kv_indptr, kv_indptr),
                                  (self._kv_len, kv_len_arr)):
                buffer.copy_(value, non_blocking=True)  # type: ignore[union-attr]
            self._kv_indices[:kv_indices.numel()].copy_(kv_indices, non_blocking=True)  # type: ignore[index]
        else:
            self._qo_indptr, self._kv_indptr, self._kv_indices, self._kv_len = (
                t.to(self.device, non_blocking=True) for t in (qo_indptr, kv_indptr, kv_indices, kv_len_arr))
        table = _table(self._kv_indptr, self._kv_indices, width)  # type: ignore[arg-type]
        if self._graph and self._table is not None:
            self._table.copy_(table)
        else:
            self._table = table
        self._max_q_len = max_q_len
        self._heads, self._rank, self._rope, self._page = num_heads, head_dim_ckv, head_dim_kpe, page_size
        self._causal, self._sm_scale, self._dtypes = causal, sm_scale, (q_data_type, kv_data_type)

    def _width(self, batch: int, kv_indptr: Tensor, kv_indices: Any, max_pages: int | None) -> int:
        """Columns of the block table. For graphs always the same; else as many as needed, or as the host knows of."""
        if self._graph and self._table is not None:
            bound: int | None = self._table.shape[1]
        elif max_pages is None and batch * kv_indices.numel() <= TABLE_MAX:
            bound = kv_indices.numel()
        else:
            bound = max_pages
        steps = _host_steps(kv_indptr, bound, "kv_indptr")
        needed = max(steps) if steps else bound
        if self._graph and bound is not None:
            if needed > bound:  # type: ignore[operator]
                raise _refused(f"a plan with {needed} pages a request", f"{bound} in the table of this wrapper: pass "
                               "max_pages in its first plan")
            needed = bound
        return max(1, needed)  # type: ignore[type-var]

    def run(self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor, out: Tensor | None = None,
            lse: Tensor | None = None, return_lse: bool = False, profiler_buffer: Tensor | None = None,
            kv_len: Tensor | None = None, page_table: Tensor | None = None, return_lse_base_on_e: bool = False) -> Any:
        """out [tokens, heads, head_dim_ckv], and lse [tokens, heads] in base 2, or e with return_lse_base_on_e; -inf
        where nothing is seen. ckv_cache and kpe_cache may be views of one tensor (then that is read in place, by the
        fastest kernel) or two."""
        if self._table is None:
            raise _refused("run before plan", "plan(...) first")
        for name, value, dtype in (("q_nope", q_nope, self._dtypes[0]), ("ckv_cache", ckv_cache, self._dtypes[1])):
            if value.dtype != dtype:
                raise _refused(f"{name} of {value.dtype}", f"{dtype}, as planned")
        if q_nope.shape[1:] != (self._heads, self._rank) or ckv_cache.shape[1] != self._page:
            raise _refused(f"q_nope {list(q_nope.shape)} and ckv_cache {list(ckv_cache.shape)}",
                           f"{self._heads} heads of {self._rank} and pages of {self._page}, as planned")
        batch, tokens = self._kv_len.shape[0], q_nope.shape[0]  # type: ignore[union-attr]
        arguments = dict(kv_lora_rank=self._rank, sm_scale=self._sm_scale, causal=self._causal, backend=self._backend)
        cache = _joined(ckv_cache, kpe_cache)
        longest = max(self._q_lens) if self._q_lens else self._max_q_len
        if return_lse and lse is None:
            lse = torch.empty(q_nope.shape[:2], dtype=torch.float32, device=q_nope.device)
        lse = lse if return_lse else None
        if longest * batch == tokens and (self._q_lens is None or min(self._q_lens) == longest):
            def rows(x: Tensor) -> Tensor:
                return x.unflatten(0, (batch, longest))

            result = mla_decode((rows(q_nope), rows(q_pe)), cache, self._table, self._kv_len,
                                out=None if out is None else rows(out), lse=None if lse is None else rows(lse),
                                **arguments).flatten(0, 1)
        else:
            result = mla_decode((q_nope, q_pe), cache, self._table, self._kv_len, out=out, lse=lse,
                                cu_seqlens_q=self._qo_indptr, max_q_len=longest, **arguments)
        result = result if out is None else out
        if not return_lse:
            return result
        return result, lse if return_lse_base_on_e else lse.mul_(1 / math.log(2))  # type: ignore[union-attr]


def _host_steps(indptr: Tensor, bound: int | None, name: str) -> list[int] | None:
    """The differences of an indptr when the host has it, or must have it; None when the bound is enough."""
    if indptr.device.type != "cpu":
        if bound is not None:
            return None
        events.emit("degrade", what="plan without synchronisation",
                    reason=f"{name} is on the device and no bound was given: read on the host")
    steps = indptr.diff().tolist()
    return steps or [0]


def _table(indptr: Tensor, indices: Tensor, width: int) -> Tensor:
    """[batch, width] int32: the pages of each request; behind its last one, whatever follows."""
    at = indptr[:-1, None].long() + torch.arange(width, device=indptr.device)
    return indices[at.clamp_(max=max(indices.numel() - 1, 0))] if indices.numel() else torch.zeros_like(at).int()


def _joined(ckv: Tensor, kpe: Tensor) -> Any:
    """One view of both when they are the columns of one tensor, else the pair."""
    if (ckv.stride() == kpe.stride() and ckv.dtype == kpe.dtype
            and kpe.data_ptr() == ckv.data_ptr() + ckv.shape[-1] * ckv.element_size()
            and ckv.untyped_storage().data_ptr() == kpe.untyped_storage().data_ptr()
            and ckv.stride(1) >= ckv.shape[-1] + kpe.shape[-1]):
        return ckv.as_strided((*ckv.shape[:2], ckv.shape[2] + kpe.shape[2]), ckv.stride())
    return ckv, kpe


def _refused(asked: str, supported: str) -> InvalidArgument:
    return InvalidArgument(asked, supported=supported, differs="it is something else",
                           remedy="see jitmla.compat.flashinfer, or call jitmla.mla_decode itself")
