"""dsa_append: what a DSA layer writes before it selects and attends, in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_indexer as torch_ops  # noqa: F401  registers the op
from ..spec_indexer import dsa_append_spec
from . import indexer_arguments as arguments
from . import indexer_reference, launch
from .indexer_prologue import POSITIONS
from .kv_row_pack import as_bytes

OP = "dsa_append"
_calls = dispatch.Remembered()


def dsa_append(q_pe: Tensor, q_out: Tensor, kv_c: Tensor, k_pe: Tensor, positions: Tensor, cos_sin_cache: Tensor,
               kv_cache: Tensor, slot_mapping: Tensor, *, k_fp8: Tensor | None = None, k_scale: Tensor | None = None,
               index_cache: Tensor | None = None, index_slot_mapping: Tensor | None = None, backend: str = "auto"
               ) -> None:
    """RoPE of the queries' last columns into q_out, of the key's into the latent rows, these into kv_cache, and the
    indexer's keys into index_cache. All four are done for the tokens of slot_mapping; nothing else is written.

    Pairs of columns (2 i, 2 i + 1) turn by the angle of the token's position, in float32, and are rounded to bf16 once.
    The rows are those of jitmla.kv_row_pack, the keys those of jitmla.indexer_k_scatter.

    q_pe, q_out: [tokens, heads, 64] bf16, any strides that are multiples of 8; one may not overlap the other. They may
        be the last columns of wider rows.
    kv_c: [tokens, 512] bf16, normed; k_pe: [tokens, 64] bf16, not turned yet; token strides that are multiples of 8.
    positions: [tokens] int32 or int64. Not checked against the table: the host does not read them.
    cos_sin_cache: [positions, 64] float32, contiguous: 32 cosines, then 32 sines.
    kv_cache: [pages, page_size, 1, 656] bytes, or [pages, page_size, 1, 576] bf16. slot_mapping: [tokens] int64.
    k_fp8: [tokens, 128] e4m3, k_scale: [tokens, 1] float32, index_cache: [pages, 64, 1, 132] bytes, index_slot_mapping:
        [tokens] int64; all four, or none in a layer without an indexer.
        Negative slots are skipped, each in its own cache. Slots behind the last page, and the same slot twice, are
        undefined.
    backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    given = (q_pe, q_out, kv_c, k_pe, positions, cos_sin_cache, kv_cache, slot_mapping)
    index = (k_fp8, k_scale, index_cache, index_slot_mapping)
    if torch.compiler.is_compiling():
        torch.ops.jitmla.dsa_append(*given, *index, backend)
        return

    def check() -> None:
        arguments.append(*given, *index)

    if not isinstance(slot_mapping, Tensor) or not slot_mapping.numel():
        check()
        return
    row, keys = arguments.row_kind(kv_cache), k_fp8 is not None
    like = (slot_mapping.get_device(), row, keys, positions.dtype, backend)

    def args() -> tuple[object, ...]:
        cache = as_bytes(kv_cache)
        if keys:
            return (*given[:6], cache, slot_mapping, *index)
        stand_in = _stand_ins(slot_mapping.device)
        return (*given[:6], cache, slot_mapping, *stand_in, slot_mapping)

    launch.run(OP, _calls, like, slot_mapping, backend, check,
               lambda: dispatch.plan_for(dsa_append_spec(arch=dispatch.arch_of(kv_cache.device), row=row,
                                                         index_keys=keys, positions=POSITIONS[positions.dtype]),
                                         backend, kv_cache.device),
               args, lambda: indexer_reference.dsa_append(*given, *index, row=row))


_kept: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}


def _stand_ins(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A key, its scale and a pool, of which a layer without an indexer reads and writes nothing."""
    if device not in _kept:
        made = torch.zeros(1, 64, 1, 132, dtype=torch.uint8, device=device)
        _kept[device] = (made.view(-1)[:128].view(1, 128).view(torch.float8_e4m3fn),
                         torch.zeros(1, 1, device=device), made)
    return _kept[device]
