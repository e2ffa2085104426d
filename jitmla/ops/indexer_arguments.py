"""What the ops around the indexer of DeepSeek Sparse Attention take: every argument check.

They run on the first call of a kind, and when a compiled kernel's own guards refused a call, to say what is wrong with
it. They look at types, shapes, strides and addresses, never at values: a call may be inside a graph capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import layouts
from ..errors import InvalidArgument, InvalidArgumentType
from ..layouts import INDEX_DIM, INDEX_PAGE, INDEX_TOKEN_BYTES, LATENT, LATENT_ROPE
from . import checks

FP8, BF16, FP32, I32, I64 = torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int32, torch.int64
BYTES = (torch.uint8, torch.int8, FP8)
SCALE_MODES = ("raw_f32", "pow2_f32")
HEADS = (32, 64)


def check(name: str, value: Any, layout: str, shape: Sequence[int | None], dtypes: Sequence[torch.dtype],
          first: Tensor | None = None, contiguous: bool = False) -> None:
    """Raise unless `value` is a tensor of one of these dtypes and of this shape (None: any size), with a contiguous
    last dimension or altogether contiguous, on the device of `first`."""
    checks.tensor(name, value, layout, len(shape))
    checks.dtype(name, value, dtypes)
    expected = [n if s is None else s for s, n in zip(shape, value.shape, strict=True)]
    checks.shape(name, value, layout, expected, follows="the other arguments and the formats of the op")
    if first is not None:
        checks.device(name, value, first.device, of="the first argument")
    checks.no_gradient("an op of the indexer", **{name: value})
    if contiguous and not value.is_contiguous():
        raise InvalidArgument(f"{name} with strides {tuple(value.stride())}", supported=f"a contiguous {name}",
                              differs="it is not", remedy=f"pass {name}.contiguous()")
    checks.contiguous_last(name, value)


def one_of(name: str, value: Any, supported: Sequence[Any]) -> None:
    if value not in supported:
        raise InvalidArgument(f"{name}={value!r}", supported=", ".join(map(str, supported)),
                              differs="it is none of them", remedy=f"choose one of them for {name}")


def index(name: str, value: Any, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgumentType(f"{name}: {type(value).__name__}", supported=f"{name}: an int",
                                  differs=f"{value!r} is not an int",
                                  remedy=f"pass {name} as a Python int; a tensor would have to be read on the host")
    if value < least:
        raise InvalidArgument(f"{name}={value}", supported=f"at least {least}", differs=f"it is {value}",
                              remedy=f"pass a larger {name}")


def address(name: str, value: Tensor, size: int = 16) -> None:
    """The address of `value` is a multiple of `size` bytes."""
    if value.data_ptr() % size:
        raise InvalidArgument(f"{name} at address {value.data_ptr():#x}", supported=f"a multiple of {size} bytes",
                              differs="it is not one", remedy=f"pass {name}.clone(), or another view of its buffer")


def strides(name: str, value: Tensor, elements: int) -> None:
    """All strides but the last are multiples of `elements`."""
    loose = [s for s, n in zip(value.stride()[:-1], value.shape[:-1], strict=True) if n > 1 and s % elements]
    if loose:
        raise InvalidArgument(f"{name} with strides {tuple(value.stride())}",
                              supported=f"strides that are multiples of {elements} elements",
                              differs=f"{loose[0]} is not one", remedy=f"pass {name}.contiguous()")


def page_pool(name: str, cache: Any, tokens: int | None, width: int, first: Tensor | None) -> None:
    """A pool [pages, tokens, 1, width] of bytes whose pages are contiguous and 16-byte aligned."""
    layout = f"[pages, {tokens or 'page_size'}, 1, {width}]"
    check(name, cache, layout, (None, tokens, 1, width), BYTES, first)
    if (cache.shape[1] > 1 and cache.stride(1) != width) or (cache.shape[0] > 1 and cache.stride(0) % 16):
        raise InvalidArgument(f"{name} with strides {tuple(cache.stride())}",
                              supported=f"stride(1) == {width} and stride(0) a multiple of 16",
                              differs="its pages are laid out otherwise",
                              remedy="make the pool [pages, page_size, 1, row bytes] with contiguous pages")
    address(name, cache)


def prologue(q: Any, k_raw: Any, w_raw: Any, ln_weight: Any, ln_bias: Any, positions: Any, cos_sin_cache: Any,
             scale_mode: Any) -> None:
    check("q", q, "[tokens, heads, 128]", (None, None, INDEX_DIM), [BF16])
    tokens, heads, _ = q.shape
    one_of("heads of q", heads, HEADS)
    if q.stride(1) != INDEX_DIM:
        raise InvalidArgument(f"q with strides {tuple(q.stride())}", supported=f"stride(1) == {INDEX_DIM}",
                              differs="its heads are apart", remedy="pass q.contiguous()")
    strides("q", q, 8)
    address("q", q)
    check("k_raw", k_raw, "[tokens, 128]", (tokens, INDEX_DIM), [BF16, FP32], q)
    check("w_raw", w_raw, "[tokens, heads]", (tokens, heads), [FP32, BF16], q)
    check("ln_weight", ln_weight, "[128]", (INDEX_DIM,), [FP32, BF16], q)
    check("ln_bias", ln_bias, "[128]", (INDEX_DIM,), [ln_weight.dtype], q)
    check("positions", positions, "[tokens]", (tokens,), [I64, I32], q)
    check("cos_sin_cache", cos_sin_cache, "[positions, 64]", (None, 64), [FP32], q, contiguous=True)
    address("cos_sin_cache", cos_sin_cache)
    one_of("scale_mode", scale_mode, SCALE_MODES)


def cat_quant(pe: Any, nope: Any, scale_mode: Any) -> None:
    rank = pe.dim() if isinstance(pe, Tensor) and pe.dim() in (2, 3) else 3
    layout = "[rows, pe_dim] or [tokens, heads, pe_dim]"
    check("pe", pe, layout, (None,) * rank, [BF16])
    width = INDEX_DIM - pe.shape[-1]
    check("nope", nope, "the same with 128 - pe_dim columns", (*pe.shape[:-1], width), [BF16], pe)
    if pe.shape[-1] % 4 or width <= 0 or pe.shape[-1] == 0:
        raise InvalidArgument(f"pe with {pe.shape[-1]} columns", supported="multiples of 4 from 4 to 124",
                              differs="pieces of 4 columns must be of one part", remedy="pad the columns of pe")
    for name, x in (("pe", pe), ("nope", nope)):
        strides(name, x, 4)
        address(name, x, 8)
    one_of("scale_mode", scale_mode, SCALE_MODES)


def slots(name: str, slot_mapping: Any, rows: int, first: Tensor) -> None:
    check(name, slot_mapping, "[tokens]", (None,), [I64], first, contiguous=True)
    if slot_mapping.shape[0] > rows:
        raise InvalidArgument(f"{name}: {checks.describe(slot_mapping)}", supported=f"at most {rows} slots",
                              differs=f"it has {slot_mapping.shape[0]}", remedy="pass a row for each slot")


def scatter(k_fp8: Any, k_scale: Any, cache: Any, slot_mapping: Any) -> None:
    check("k_fp8", k_fp8, "[tokens, 128]", (None, INDEX_DIM), [FP8], contiguous=True)
    address("k_fp8", k_fp8)
    check("k_scale", k_scale, "[tokens, 1] or [tokens]", (k_fp8.shape[0], 1)[:k_scale.dim()], [FP32], k_fp8,
          contiguous=True)
    page_pool("cache", cache, INDEX_PAGE, INDEX_TOKEN_BYTES, k_fp8)
    slots("slot_mapping", slot_mapping, k_fp8.shape[0], k_fp8)


def gather(cache: Any, block_table: Any, cu_seq_lens: Any, k_fp8: Any, k_scale: Any) -> None:
    page_pool("cache", cache, INDEX_PAGE, INDEX_TOKEN_BYTES, None)
    check("block_table", block_table, "[requests, pages]", (None, None), [I32], cache)
    check("cu_seq_lens", cu_seq_lens, "[requests + 1]", (block_table.shape[0] + 1,), [I32], cache, contiguous=True)
    check("k_fp8", k_fp8, "[tokens, 128]", (None, INDEX_DIM), [FP8], cache, contiguous=True)
    check("k_scale", k_scale, "[tokens]", (k_fp8.shape[0],), [FP32], cache, contiguous=True)
    address("k_fp8", k_fp8)
    address("k_scale", k_scale)


def row_pack(kv_c: Any, k_pe: Any, cache: Any, slot_mapping: Any) -> str:
    """Returns the kind of the rows: "fp8" or "bf16"."""
    check("kv_c", kv_c, "[tokens, 512]", (None, LATENT), [BF16])
    check("k_pe", k_pe, "[tokens, 64]", (kv_c.shape[0], LATENT_ROPE), [BF16], kv_c)
    for name, x in (("kv_c", kv_c), ("k_pe", k_pe)):
        strides(name, x, 8)
        address(name, x)
    row = row_kind(cache)
    if row == "fp8":
        page_pool("cache", cache, None, layouts.ROW_BYTES["fp8"], kv_c)
    else:
        width = LATENT + LATENT_ROPE
        check("cache", cache, "[pages, page_size, 1, 576]", (None, None, 1, width), [BF16], kv_c)
        if (cache.shape[1] > 1 and cache.stride(1) != width) or (cache.shape[0] > 1 and cache.stride(0) % 8):
            raise InvalidArgument(f"cache with strides {tuple(cache.stride())}",
                                  supported=f"stride(1) == {width} and stride(0) a multiple of 8",
                                  differs="its pages are laid out otherwise",
                                  remedy="allocate the cache contiguously, or with padding between pages only")
        address("cache", cache)
    slots("slot_mapping", slot_mapping, kv_c.shape[0], kv_c)
    return row


def append(q_pe: Any, q_out: Any, kv_c: Any, k_pe: Any, positions: Any, cos_sin_cache: Any, kv_cache: Any,
           slot_mapping: Any, k_fp8: Any, k_scale: Any, index_cache: Any, index_slot_mapping: Any) -> None:
    check("q_pe", q_pe, "[tokens, heads, 64]", (None, None, LATENT_ROPE), [BF16])
    check("q_out", q_out, "[tokens, heads, 64]", tuple(q_pe.shape), [BF16], q_pe)
    for name, x in (("q_pe", q_pe), ("q_out", q_out)):
        strides(name, x, 8)
        address(name, x)
    row_pack(kv_c, k_pe, kv_cache, slot_mapping)
    tokens = q_pe.shape[0]
    for name, x in (("kv_c", kv_c), ("slot_mapping", slot_mapping)):
        if x.shape[0] != tokens:
            raise InvalidArgument(f"{name}: {checks.describe(x)}", supported=f"{tokens} tokens, as q_pe has",
                                  differs=f"it has {x.shape[0]}",
                                  remedy="pass as many rows of each as there are queries")
    check("positions", positions, "[tokens]", (tokens,), [I64, I32], q_pe, contiguous=True)
    check("cos_sin_cache", cos_sin_cache, "[positions, 64]", (None, 64), [FP32], q_pe, contiguous=True)
    address("cos_sin_cache", cos_sin_cache)
    index = (k_fp8, k_scale, index_cache, index_slot_mapping)
    if len({x is None for x in index}) != 1:
        raise InvalidArgument("k_fp8, k_scale, index_cache and index_slot_mapping", supported="all four, or none",
                              differs="some are missing", remedy="pass none of them in a layer without an indexer")
    if k_fp8 is not None:
        scatter(*index)
        check("k_scale", k_scale, "[tokens, 1]", (None, 1), [FP32], q_pe, contiguous=True)
        if index_slot_mapping.shape[0] != tokens:
            raise InvalidArgument(f"index_slot_mapping: {checks.describe(index_slot_mapping)}",
                                  supported=f"{tokens} slots, one for each token",
                                  differs=f"it has {index_slot_mapping.shape[0]}",
                                  remedy="pass -1 for a token that is not to be stored")


def row_kind(cache: Any) -> str:
    return "bf16" if isinstance(cache, Tensor) and cache.dtype == BF16 else "fp8"


def queries(q: Any, rank: int, layout: str) -> None:
    check("q", q, layout, (None,) * (rank - 1) + (INDEX_DIM,), [FP8], contiguous=True)
    one_of("heads of q", q.shape[-2], HEADS)
    address("q", q)


def weights(value: Any, rows: int, heads: int, first: Tensor) -> None:
    check("weights", value, "[rows, heads]", (rows, heads), [FP32], first)
    strides("weights", value, 4)
    address("weights", value)


def has_room(out: Any, columns: int, room: int) -> bool:
    """Whether a GPU may write logits of so many columns to `out`, `room` elements of each row."""
    if not isinstance(out, Tensor) or out.dim() != 2 or out.shape[1] != columns or not out.shape[0]:
        return False
    end = out.storage_offset() + (out.shape[0] - 1) * out.stride(0) + room
    return (out.stride(0) >= room or out.shape[0] == 1) and end <= out.untyped_storage().nbytes() // 4


def logits_out(out: Any, rows: int, columns: int, room: int, first: Tensor) -> None:
    """`room`: elements from one row to the next that the kernels need; the reference does not."""
    check("out", out, "[rows, columns]", (rows, columns), [FP32], first)
    if columns and out.is_cuda and not has_room(out, columns, room):
        raise InvalidArgument(f"out with strides {tuple(out.stride())}",
                              supported=f"rows at least {room} elements apart, in memory that has so many behind "
                              "the start of the last one: whole blocks of keys are written",
                              differs=f"they are {out.stride(0)} apart, or the memory ends before",
                              remedy="allocate rows of jitmla.layouts.logits_stride(columns) and pass [:, :columns]")


def mqa_logits(q: Any, k: Any, k_scale: Any, weight: Any, ks: Any, ke: Any, clean_logits: Any, max_seqlen_k: Any
               ) -> None:
    queries(q, 3, "[rows, heads, 128]")
    check("k", k, "[tokens, 128]", (None, INDEX_DIM), [FP8], q, contiguous=True)
    check("k_scale", k_scale, "[tokens]", (k.shape[0],), [FP32], q, contiguous=True)
    address("k", k)
    address("k_scale", k_scale)
    weights(weight, q.shape[0], q.shape[1], q)
    for name, x in (("ks", ks), ("ke", ke)):
        check(name, x, "[rows]", (q.shape[0],), [I32], q, contiguous=True)
    index("max_seqlen_k", max_seqlen_k)
    if max_seqlen_k and clean_logits:
        raise InvalidArgument("clean_logits=True with max_seqlen_k", supported="compressed logits that are not cleaned",
                              differs="both were asked for", remedy="pass clean_logits=False")


def paged_mqa_logits(q: Any, cache: Any, weight: Any, context_lens: Any, block_table: Any, max_context_len: Any
                     ) -> None:
    queries(q, 4, "[requests, next_n, heads, 128]")
    requests, next_n, heads, _ = q.shape
    one_of("next_n of q", next_n, (1, 2))
    page_pool("cache", cache, INDEX_PAGE, INDEX_TOKEN_BYTES, q)
    weights(weight, requests * next_n, heads, q)
    rank = context_lens.dim() if isinstance(context_lens, Tensor) and context_lens.dim() in (1, 2) else 2
    check("context_lens", context_lens, "[requests] or [requests, next_n]", (requests, next_n)[:rank], [I32], q)
    check("block_table", block_table, "[requests, pages]", (requests, None), [I32], q)
    index("max_context_len", max_context_len)


def topk(logits: Any, k: Any, row_start: Any, row_end: Any, seq_lens: Any, next_n: Any, out: Any) -> None:
    check("logits", logits, "[rows, columns]", (None, None), [FP32])
    index("k", k, 1)
    index("next_n", next_n, 1)
    rows = logits.shape[0]
    if (row_start is None) != (row_end is None) or (row_start is None) == (seq_lens is None):
        raise InvalidArgument("row_start, row_end and seq_lens", supported="row_start and row_end, or seq_lens",
                              differs="another combination of them was given",
                              remedy="windows of rows (prefill) or lengths (decode), not both")
    if seq_lens is None:
        check("row_start", row_start, "[rows]", (rows,), [I32], logits, contiguous=True)
        check("row_end", row_end, "[rows]", (rows,), [I32], logits, contiguous=True)
    else:
        if rows % next_n:
            raise InvalidArgument(f"next_n={next_n} with {rows} rows", supported="a divisor of the rows",
                                  differs="each request has next_n rows",
                                  remedy="pass the number of query tokens per request")
        check("seq_lens", seq_lens, "[rows / next_n]", (rows // next_n,), [I32], logits, contiguous=True)
    if out is not None:
        check("out", out, "[rows, k]", (rows, k), [I32], logits)


def to_global(topk: Any, req_id: Any, block_table: Any, page_size: Any, stride_factor: Any, layer_offset: Any,
              workspace_start: Any, out: Any, valid_count: Any, pages: Any) -> None:
    check("topk", topk, "[rows, k]", (None, None), [I32])
    rows = topk.shape[0]
    check("req_id", req_id, "[rows]", (rows,), [I32], topk, contiguous=True)
    if (block_table is None) == (workspace_start is None):
        raise InvalidArgument("block_table and workspace_start", supported="one of them", differs="both or none given",
                              remedy="block_table for a paged cache, workspace_start for gathered rows")
    if block_table is not None:
        check("block_table", block_table, "[requests, pages]", (None, None), [I32], topk)
    else:
        check("workspace_start", workspace_start, "[requests]", (None,), [I32], topk, contiguous=True)
    index("page_size", page_size, 1)
    if page_size & (page_size - 1):
        raise InvalidArgument(f"page_size={page_size}", supported="a power of two", differs="it is none",
                              remedy="allocate the cache with pages of 64 tokens")
    index("stride_factor", stride_factor, 1)
    index("layer_offset", layer_offset)
    if pages is not None:
        index("num_pages", pages)
        if pages * stride_factor > 2**31 - 1:
            raise InvalidArgument(f"num_pages={pages} with stride_factor={stride_factor}",
                                  supported="rows that fit in 31 bits", differs=f"{pages * stride_factor} do not",
                                  remedy="divide the pool into several tensors")
    if out is not None:
        check("out", out, "[rows, k]", tuple(topk.shape), [I32], topk)
    if valid_count is not None:
        check("valid_count", valid_count, "[rows]", (rows,), [I32], topk, contiguous=True)
