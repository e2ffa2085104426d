"""kv_row_pack: latent rows into the cache that sparse attention reads."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_indexer as torch_ops  # noqa: F401  registers the op
from ..spec_indexer import kv_row_pack_spec
from . import indexer_arguments as arguments
from . import indexer_reference, launch

OP = "kv_row_pack"
_calls = dispatch.Remembered()


def kv_row_pack(kv_c: Tensor, k_pe: Tensor, cache: Tensor, slot_mapping: Tensor, *, backend: str = "auto") -> None:
    """Write token t, of slot s = slot_mapping[t], to row s % page_size of page s // page_size of the cache, which is
    mutated there and nowhere else.

    A cache of bytes has rows of 656: 512 e4m3, four float32 scales 2^ceil(log2(max(amax / 448, 1e-4))) of 128 columns
    each, 64 bf16. A bf16 cache has rows of 576: the latent columns and the rotated ones.

    kv_c: [tokens, 512] bf16, normed; k_pe: [tokens, 64] bf16, rotated; any token strides that are multiples of 8.
    cache: [pages, page_size, 1, 656] bytes, or [pages, page_size, 1, 576] bf16; pages contiguous, any multiple of 16
        bytes apart.
    slot_mapping: [n] int64, n <= tokens; rows behind n are ignored, negative slots skipped. Slots behind the last page,
        and the same slot twice, are undefined: the host does not read them.
    backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        torch.ops.jitmla.kv_row_pack(kv_c, k_pe, cache, slot_mapping, backend)
        return

    def check() -> None:
        arguments.row_pack(kv_c, k_pe, cache, slot_mapping)

    if not isinstance(slot_mapping, Tensor) or not slot_mapping.numel():
        check()
        return
    row = arguments.row_kind(cache)
    launch.run(OP, _calls, (slot_mapping.get_device(), row, backend), slot_mapping, backend, check,
               lambda: dispatch.plan_for(kv_row_pack_spec(arch=dispatch.arch_of(cache.device), row=row), backend,
                                         cache.device),
               lambda: (kv_c, k_pe, as_bytes(cache), slot_mapping),
               lambda: indexer_reference.kv_row_pack(kv_c, k_pe, cache, slot_mapping, row=row),
               launch.rows(slot_mapping) <= launch.rows(kv_c))


def as_bytes(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8)
