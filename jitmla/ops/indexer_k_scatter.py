"""indexer_k_scatter: keys of the indexer and their scales into its paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_indexer as torch_ops  # noqa: F401  registers the op
from ..spec_indexer import indexer_k_spec
from . import indexer_arguments as arguments
from . import indexer_reference, launch

OP = "indexer_k_scatter"
_calls = dispatch.Remembered()


def indexer_k_scatter(k_fp8: Tensor, k_scale: Tensor, cache: Tensor, slot_mapping: Tensor, *, backend: str = "auto"
                      ) -> None:
    """Write token t, of slot s = slot_mapping[t], to page s // 64 of the cache: its codes at byte 128 * (s % 64), its
    scale at byte 64 * 128 + 4 * (s % 64). `cache` is mutated, nothing else of it than these bytes.

    k_fp8: [tokens, 128] e4m3; k_scale: [tokens, 1] or [tokens] float32; both contiguous.
    cache: [pages, 64, 1, 132] bytes, pages contiguous, any multiple of 16 bytes apart. The shape carries sizes only:
        the page is planar (jitmla.layouts).
    slot_mapping: [n] int64, n <= tokens; rows behind n are ignored, negative slots skipped. Slots behind the last page,
        and the same slot twice, are undefined: the host does not read them.
    backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        torch.ops.jitmla.indexer_k_scatter(k_fp8, k_scale, cache, slot_mapping, backend)
        return

    def check() -> None:
        arguments.scatter(k_fp8, k_scale, cache, slot_mapping)

    if not isinstance(slot_mapping, Tensor) or not slot_mapping.numel():
        check()
        return
    launch.run(OP, _calls, (slot_mapping.get_device(), backend), slot_mapping, backend, check,
               lambda: dispatch.plan_for(indexer_k_spec(OP, arch=dispatch.arch_of(cache.device)), backend,
                                         cache.device),
               lambda: (k_fp8, k_scale.view(-1, 1), cache.view(torch.uint8), slot_mapping),
               lambda: indexer_reference.indexer_k_scatter(k_fp8, k_scale, cache, slot_mapping),
               launch.rows(slot_mapping) <= launch.rows(k_fp8))
