"""cached_mla: attention of an MLA layer over a slot cache, from queries to value heads, as AutoDeploy calls it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_cached as torch_ops
from ..errors import InvalidArgument
from ..schedule import context_tile, context_tiles, slot_page
from ..spec import cached_mla_specs
from ..workspace import kept_bytes
from . import cached_reference, checks
from . import mla_decode as decode
from .cached_mla_arguments import Sizes, check, check_layout

OP = "cached_mla"
GENERATE, COPY_PE = 1, 2  # bits of the kernels' flags (templates/common/cached_rows.py)
LAUNCH_BYTES = 1 << 28  # of absorbed queries in one launch: more tokens go in several
INF = float("inf")


def cached_mla(q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, kv_b_proj_weight: Tensor, kv_cache: Tensor,
               *, seq_len: Tensor, input_pos: Tensor, slot_idx: Tensor, cu_seqlen: Tensor, num_prefill: int,
               prefill_tokens: int, num_decode: int, sm_scale: float, out: Tensor | None = None, backend: str = "auto"
               ) -> Tensor:
    """Append the new tokens' latent rows to their slots, and attend to each slot up to the token itself.

    For token t, the k-th new one of sequence i, and head n, with W[n] = kv_b_proj_weight[n (P+V) : (n+1) (P+V)]:
    kv_cache[slot_idx[i], input_pos[i] + k] = [latent[t] | k_pe[t]],
    x_j = sm_scale * <[q_nope[t,n] W[n,:P] | q_pe[t,n]], row_j> for j <= input_pos[i] + k, and
    out[t,n] = W[n,P:] sum_j softmax(x)_j row_j[:kv_lora_rank]. (DeepSeek-V2, arXiv 2405.04434, section 2.1, with both
    up-projections absorbed. They are used as they lie in the weight: nothing is derived from it that could go stale.)

    q_nope: [batch, s, heads, P], bf16 or fp16. q_pe: [batch, s, heads, qk_rope_head_dim], rotated.
    latent: [batch, s, kv_lora_rank], after its norm. k_pe: [batch, s, 1, qk_rope_head_dim], rotated.
    kv_b_proj_weight: [heads * (P + V), kv_lora_rank]; of each head first the rows for keys, then those for values.
    kv_cache: [slots, max_seq_len, kv_lora_rank + qk_rope_head_dim], dtype of q_nope; the new rows are written.
        What is behind a sequence's tokens is not read, and may be uninitialised.
    seq_len, input_pos, slot_idx, cu_seqlen: int32, an entry for each of the num_prefill + num_decode sequences, those
        of prefill first, and maybe more: its new tokens, its tokens that are in the cache already, its slot, and its
        first token among batch * s. There may be gaps between sequences. Read on the device only. A sequence in a slot
        that does not exist (-1) is skipped. input_pos + seq_len beyond max_seq_len is the caller's mistake; it writes
        nothing outside of the slot.
    num_prefill, prefill_tokens, num_decode: sequences with any number of new tokens, the sum of these numbers, and
        sequences with one. With s = 1 and num_prefill = 0, token i is sequence i, and cu_seqlen and seq_len are not
        read.
    sm_scale: positive factor of the raw dot product: (P + qk_rope_head_dim)**-0.5 times any YaRN mscale**2.
    out: [batch, s, heads, V]; allocated otherwise. Places without a token become zero.
    backend: "auto", a backend of mla_decode, or "reference".

    Returns out. No host synchronisation; may be captured in a CUDA graph, whose replays may change all metadata but the
    three counts.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_cached_mla(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, seq_len,
                                                input_pos, slot_idx, cu_seqlen, num_prefill, prefill_tokens,
                                                num_decode, sm_scale, out, backend)
    try:
        pages = _pages(kv_cache)
        prepared = _prepared[q_nope.shape, q_nope.dtype, q_nope.get_device(), q_pe.size(3), latent.size(2),
                             kv_b_proj_weight.size(0), kv_cache.shape, pages.size, num_prefill, prefill_tokens,
                             num_decode, backend]
        if (type(sm_scale) is not float or not 0.0 < sm_scale < INF or q_nope.requires_grad or q_pe.requires_grad
                or latent.requires_grad or kv_b_proj_weight.requires_grad):
            prepared = None
    except (KeyError, AttributeError, TypeError, ValueError, IndexError):
        prepared = None
    metadata = (seq_len, input_pos, slot_idx, cu_seqlen)
    if prepared is None:
        prepared = _prepare(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, metadata, num_prefill,
                            prefill_tokens, num_decode, sm_scale, out, backend)
        if prepared is None:
            return _reference(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, metadata, num_prefill,
                              num_decode, sm_scale, out)
        pages = _pages(kv_cache)
    if out is None:
        out = prepared.empty(prepared.out_shape, dtype=q_nope.dtype, device=q_nope.device)
    elif prepared.empty is torch.zeros:
        out.zero_()
    try:
        prepared.run(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, pages, metadata, out, sm_scale)
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        _check(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, metadata, num_prefill, prefill_tokens,
               num_decode, sm_scale, out)
        check_layout(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, out)
        raise
    return out


@dataclass(frozen=True)
class Pages:
    """A slot cache as mla_decode takes it."""

    view: Tensor  # [pages, page_size, width], the same memory
    size: int  # tokens of a page
    of_slot: int  # from one slot's first page to the next one's


_paged: dict[int, tuple[weakref.ref[Tensor], torch.Size, Pages]] = {}  # by address, for as long as the tensor lives


def _pages(kv_cache: Tensor) -> Pages:
    """The view of this very tensor: it takes longer to make than a launch."""
    address = kv_cache.data_ptr()
    known = _paged.get(address)
    if known is not None and known[0]() is kv_cache and known[1] == kv_cache.shape:
        return known[2]
    slots, length, width = kv_cache.shape
    slot_stride, stride, _ = kv_cache.stride()
    size = slot_page(length, slot_stride, stride) if slots and length else 1
    count = (slots - 1) * (slot_stride // (size * stride)) + length // size if slots and length else 0
    pages = Pages(kv_cache.detach().as_strided((count, size, width), (size * stride, stride, 1)), size,
                  slot_stride // (size * stride))
    _paged[address] = weakref.ref(kv_cache, lambda _: _paged.pop(address, None)), kv_cache.shape, pages
    return pages


@dataclass
class Group:
    """The launches for the sequences of one kind: prefill (tiles of several tokens) or decode (of one)."""

    absorb: Callable[..., None]
    project: Callable[..., None]
    attend: Any  # of mla_decode
    tile0: int
    tiles: int
    tile: int
    first: int
    sequences: int
    flags: int
    heads: int
    rank: int
    rope: int
    max_pages: int
    dtype: torch.dtype
    scratch: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)  # by stream

    def parts(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and types of q_lat, o_lat, lengths, block table and, where it is copied, pe."""
        rows = (self.tiles, self.tile, self.heads)
        found = [((*rows, self.rank), self.dtype), ((*rows, self.rank), self.dtype), ((self.tiles,), torch.int32),
                 ((self.tiles, self.max_pages), torch.int32)]
        return [*found, ((*rows, self.rope), self.dtype)] if self.flags & COPY_PE else found

    def buffers(self, device: int) -> tuple[Tensor, ...]:
        size = sum(_rounded(shape, dtype) for shape, dtype in self.parts())
        stream = torch._C._cuda_getCurrentRawStream(device)
        base = kept_bytes(device, stream, size)
        known = self.scratch.get(stream)
        if known is None or known[0] is not base:
            known = base, _carved(base, self.parts())
            if not torch.cuda.is_current_stream_capturing():
                self.scratch[stream] = known
        return known[1]

    def run(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, weight: Tensor, kv_cache: Tensor,
            pages: Pages, metadata: tuple[Tensor, ...], out: Tensor, sm_scale: float, device: int) -> None:
        q_lat, o_lat, lengths, table, *copied = self.buffers(device)
        pe = copied[0] if copied else q_pe
        seq_len, input_pos, slot_idx, start = metadata
        self.absorb(q_nope, q_pe, latent, k_pe, weight, kv_cache, seq_len, input_pos, slot_idx, start, q_lat, pe,
                    lengths, table, self.tile0, self.first, self.sequences, pages.size, pages.of_slot, self.flags)
        self.attend.run(q_lat, pe, pages.view, table, lengths, None, o_lat, None, sm_scale)
        self.project(o_lat, weight, seq_len, start, out, self.tile0, self.first, self.sequences, self.flags)


@dataclass(frozen=True)
class Prepared:
    """What calls of one shape launch."""

    out_shape: tuple[int, int, int, int]
    empty: Callable[..., Tensor]  # torch.zeros where a place may have no token
    device: int
    several_devices: bool
    flatten: bool  # batch and s are both more than 1
    groups: tuple[Group, ...]

    def run(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, weight: Tensor, kv_cache: Tensor,
            pages: Pages, metadata: tuple[Tensor, ...], out: Tensor, sm_scale: float) -> None:
        if self.several_devices and torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q_nope, q_pe, latent, k_pe, weight, kv_cache, pages, metadata, out, sm_scale)
        if self.flatten:
            q_nope, q_pe, latent, k_pe = (x.flatten(0, 1)[None] for x in (q_nope, q_pe, latent, k_pe))
            out = out.view(1, -1, *out.shape[2:])
        for group in self.groups:
            group.run(q_nope, q_pe, latent, k_pe, weight, kv_cache, pages, metadata, out, sm_scale, self.device)


_prepared = dispatch.Remembered()


def _prepare(q_nope: Any, q_pe: Any, latent: Any, k_pe: Any, weight: Any, kv_cache: Any, metadata: Any,
             num_prefill: Any, prefill_tokens: Any, num_decode: Any, sm_scale: Any, out: Any, backend: Any
             ) -> Prepared | None:
    """Check every argument, choose who serves the call, and remember it; None is for the reference."""
    sizes = _check(q_nope, q_pe, latent, k_pe, weight, kv_cache, metadata, num_prefill, prefill_tokens, num_decode,
                   sm_scale, out)
    if checks.chooses_reference(decode.OP, backend, q_nope, named=OP):
        return None
    check_layout(q_nope, q_pe, latent, k_pe, weight, kv_cache, out)
    pages = _pages(kv_cache)
    batch, s, heads, _ = q_nope.shape
    generate = num_prefill == 0 and s == 1
    contiguous = prefill_tokens + num_decode == sizes.tokens
    groups: list[Group] = []
    if prefill_tokens:
        tile = context_tile(heads, num_prefill, prefill_tokens)
        tiles = context_tiles(prefill_tokens if contiguous else sizes.tokens, num_prefill, tile)
        most = max(1, LAUNCH_BYTES // (tile * heads * sizes.rank * q_nope.element_size()))
        groups += [_group(tile0, min(most, tiles - tile0), tile, 0, num_prefill, COPY_PE, sizes, pages, kv_cache,
                          sm_scale, backend) for tile0 in range(0, tiles, most)]
    if num_decode:
        flags = (GENERATE if generate else 0) | (0 if generate and num_decode == batch else COPY_PE)
        groups.append(_group(0, num_decode, 1, num_prefill, num_decode, flags, sizes, pages, kv_cache, sm_scale,
                             backend))
    prepared = Prepared((batch, s, heads, sizes.value), torch.empty if contiguous else torch.zeros,
                        q_nope.get_device(), torch.cuda.device_count() > 1, batch > 1 and s > 1, tuple(groups))
    if prepared.flatten and out is not None and not out.is_contiguous():
        raise InvalidArgument(f"out with strides {tuple(out.stride())} for batch {batch} and s {s}",
                              supported="a contiguous out where batch and s are both more than 1",
                              differs="it is strided", remedy="pass out.contiguous(), or leave it out")
    _prepared[q_nope.shape, q_nope.dtype, q_nope.get_device(), sizes.rope, sizes.rank, weight.size(0), kv_cache.shape,
              pages.size, num_prefill, prefill_tokens, num_decode, backend] = prepared
    return prepared


def _group(tile0: int, tiles: int, tile: int, first: int, sequences: int, flags: int, sizes: Sizes, pages: Pages,
           kv_cache: Tensor, sm_scale: float, backend: str) -> Group:
    device = kv_cache.device
    specs = cached_mla_specs(arch=dispatch.arch_of(device), dtype=checks.DTYPE_NAMES[kv_cache.dtype],
                             qk_nope_head_dim=sizes.nope, kv_lora_rank=sizes.rank, qk_rope_head_dim=sizes.rope)
    absorb, project = (dispatch.plan_for(spec, "auto", device).function for spec in specs)
    group = Group(absorb, project, None, tile0, tiles, tile, first, sequences, flags, sizes.heads, sizes.rank,
                  sizes.rope, -(-kv_cache.shape[1] // pages.size), kv_cache.dtype)
    q_lat, o_lat, lengths, table, *copied = group.buffers(kv_cache.get_device())
    pe = copied[0] if copied else q_lat.new_empty(*q_lat.shape[:3], sizes.rope)
    group.attend = decode._prepare((q_lat, pe), pages.view, table, lengths, sizes.rank, sm_scale, True, None, o_lat,
                                  None, backend)
    return group


def _carved(base: Tensor, parts: list[tuple[tuple[int, ...], torch.dtype]]) -> tuple[Tensor, ...]:
    at, found = 0, []
    for shape, dtype in parts:
        size = _rounded(shape, dtype)
        found.append(base[at:at + size].view(dtype)[:_count(shape)].view(shape))
        at += size
    return tuple(found)


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _rounded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes, up to the next multiple of 256."""
    return -(-_count(shape) * dtype.itemsize // 256) * 256


def _check(q_nope: Any, q_pe: Any, latent: Any, k_pe: Any, weight: Any, kv_cache: Any, metadata: Any,
           num_prefill: Any, prefill_tokens: Any, num_decode: Any, sm_scale: Any, out: Any) -> Sizes:
    return check(q_nope, q_pe, latent, k_pe, weight, kv_cache,
                 dict(zip(("seq_len", "input_pos", "slot_idx", "cu_seqlen"), metadata, strict=True)),
                 {"num_prefill": num_prefill, "prefill_tokens": prefill_tokens, "num_decode": num_decode}, sm_scale,
                 out)


def _reference(q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, weight: Tensor, kv_cache: Tensor,
               metadata: tuple[Tensor, ...], num_prefill: int, num_decode: int, sm_scale: float, out: Tensor | None
               ) -> Tensor:
    batch, s, heads, nope = q_nope.shape
    seq_len, input_pos, slot_idx, start = metadata
    sequences = num_prefill + num_decode
    if num_prefill == 0 and s == 1:
        start = torch.arange(sequences, dtype=torch.int32, device=q_nope.device)
        seq_len = torch.ones_like(start)
    flat = torch.empty(batch * s, heads, weight.shape[0] // heads - nope, dtype=q_nope.dtype, device=q_nope.device)
    cached_reference.cached_mla(q_nope.flatten(0, 1), q_pe.flatten(0, 1), latent.flatten(0, 1),
                                k_pe.flatten(0, 1)[:, 0], weight, kv_cache, seq_len=seq_len, input_pos=input_pos,
                                slot_idx=slot_idx, start=start, sequences=sequences, sm_scale=sm_scale, out=flat)
    shaped = flat.view(batch, s, *flat.shape[1:])
    return shaped if out is None else out.copy_(shaped)
