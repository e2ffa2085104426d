"""gather_latent: rows of a paged latent cache, one behind the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_prefill as torch_ops
from ..spec import gather_latent_spec
from . import checks, prefill_reference
from .prefill_arguments import check_gather

OP = "gather_latent"


def gather_latent(kv_cache: Tensor, block_table: Tensor, starts: Tensor, cu_rows: Tensor, *, out: Tensor,
                  backend: str = "auto") -> Tensor:
    """out[cu_rows[b] + i] = row starts[b] + i of request b, for i < cu_rows[b + 1] - cu_rows[b].

    What the MHA form needs of a cached prefix before kv_b_proj, a chunk of each request at a time.

    kv_cache: [pages, page_size, width], bf16 or fp16, any page size, rows 16-byte aligned. block_table: [batch,
        max_pages] int32. Rows and entries that are not asked for are never read (they may hold NaN or no page).
    starts: [batch] int32, the first row of each request. cu_rows: [batch + 1] int32: where each request's rows begin in
        out, from 0; requests may have none. Read on the device only.
    out: [rows, width], dtype of kv_cache; rows is the host's upper bound of cu_rows[batch]. The first cu_rows[batch]
        rows are written.
    backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Returns out. Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed,
    ToolchainMissing, CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_gather_latent(kv_cache, block_table, starts, cu_rows, out, backend)
    try:
        run = _prepared[kv_cache.dtype, kv_cache.shape[2], kv_cache.get_device(), backend]
    except (KeyError, AttributeError, TypeError, IndexError):
        run = None
    if run is None:
        run = _prepare(kv_cache, block_table, starts, cu_rows, out, backend)
    try:
        if out.numel() and starts.numel():
            run(kv_cache, block_table, starts, cu_rows, out)
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        check_gather(kv_cache, block_table, starts, cu_rows, out)
        for name, value in (("kv_cache", kv_cache), ("out", out)):
            checks.aligned(name, value)
        raise
    return out


_prepared = dispatch.Remembered()


def _prepare(kv_cache: Any, block_table: Any, starts: Any, cu_rows: Any, out: Any, backend: Any) -> Any:
    check_gather(kv_cache, block_table, starts, cu_rows, out)
    if checks.chooses_reference(OP, backend, kv_cache):
        return lambda cache, table, starts, cu_rows, out: prefill_reference.gather_latent(cache, table, starts, cu_rows,
                                                                                          out=out)
    spec = gather_latent_spec(arch=dispatch.arch_of(kv_cache.device), dtype=checks.DTYPE_NAMES[kv_cache.dtype],
                              width=kv_cache.shape[2])
    plan = dispatch.plan_for(spec, backend, kv_cache.device)

    def run(cache: Tensor, table: Tensor, starts: Tensor, cu_rows: Tensor, out: Tensor) -> None:
        if 1 in cache.shape[:2]:
            cache = checks.usual_strides(cache)
        if out.shape[0] == 1:
            out = checks.usual_strides(out)
        plan(cache, table, starts, cu_rows, out)

    _prepared[kv_cache.dtype, kv_cache.shape[2], kv_cache.get_device(), backend] = run
    return run
