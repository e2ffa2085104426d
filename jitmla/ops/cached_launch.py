"""What a cached_mla call launches, by the kind of its sequences.

Absorbed: {absorb, mla_decode, project}, the tokens of a sequence in tiles that mla_decode takes as requests.
Mha: {pack, torch's matrix product, mla_prefill} for the new tokens among themselves; what was cached before comes in by
an Absorbed that sees nothing else, and merges.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..schedule import context_tile, context_tiles, most_tile
from ..spec import Spec, cached_mla_pack_spec, cached_mla_specs
from ..workspace import kept_bytes
from . import checks
from . import mla_decode as decode
from . import mla_prefill as prefill
from .cached_mla_arguments import E4M3, Sizes
from .mla_decode_arguments import PLAIN, Features

GENERATE, COPY_PE, PREFIX = 1, 2, 4  # bits of the kernels' flags (templates/common/cached_rows.py)
LAUNCH_BYTES = 1 << 28  # of absorbed queries, or of expanded keys and values, in one launch: more go in several


class Pages(NamedTuple):
    """A slot cache as mla_decode takes it."""

    view: Tensor  # [pages, page_size, width], the same memory
    size: int  # tokens of a page
    of_slot: int  # from one slot's first page to the next one's


class Call(NamedTuple):
    """The tensors of one call; one of batch and s is 1. scale: of an e4m3 cache, else what stands in for it."""

    q_nope: Tensor
    q_pe: Tensor
    latent: Tensor
    k_pe: Tensor
    weight: Tensor
    kv_cache: Tensor
    scale: Tensor
    pages: Pages
    seq_len: Tensor
    input_pos: Tensor
    slot_idx: Tensor
    start: Tensor
    out: Tensor
    sm_scale: float


class Shape(NamedTuple):
    """What calls of one kind have in common."""

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    max_seq_len: int
    backend: str

    def spec_facts(self) -> dict[str, Any]:
        return {"arch": dispatch.arch_of(self.device), "dtype": checks.DTYPE_NAMES[self.dtype],
                "qk_nope_head_dim": self.sizes.nope, "kv_lora_rank": self.sizes.rank,
                "qk_rope_head_dim": self.sizes.rope, "e4m3_cache": self.cache_dtype == E4M3}


Parts = list[tuple[tuple[int, ...], torch.dtype]]


@dataclass
class Scratch:
    """Tensors between the kernels of a call: the same ones for each eager call on a stream. views: what of them a call
    uses; they take longer to make than a launch."""

    parts: Parts
    name: str
    views: Callable[..., tuple[Any, ...]] = lambda *parts: parts
    by_stream: dict[int, tuple[Tensor, tuple[Any, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.size = sum(_rounded(shape, dtype) for shape, dtype in self.parts)

    def tensors(self, device: int) -> tuple[Any, ...]:
        stream = torch._C._cuda_getCurrentRawStream(device)
        base = kept_bytes(device, stream, self.size, self.name)
        known = self.by_stream.get(stream)
        if known is None or known[0] is not base:
            with torch.inference_mode(False):  # torch refuses to write inference tensors outside of that mode
                known = base, self.views(*_carved(base, self.parts))
            if not torch.cuda.is_current_stream_capturing():
                self.by_stream[stream] = known
        return known[1]


@dataclass(frozen=True)
class Absorbed:
    """The launches for the sequences of one kind: prefill (tiles of several tokens) or decode (of one)."""

    absorb: Callable[..., None]
    project: Callable[..., None]
    attend: Any  # of mla_decode
    scratch: Scratch  # q_lat, o_lat, lengths, block table; pe where it is copied; log-sum-exps with PREFIX
    no_lse: tuple[Tensor, Tensor]  # stand in where there are none; not read
    tile0: int
    first: int
    sequences: int
    flags: int

    def run(self, call: Call, device: int, lse: Tensor | None = None) -> None:
        """lse [tokens, heads]: of what out has already, with PREFIX."""
        q_lat, o_lat, lengths, table, *more = self.scratch.tensors(device)
        pe = more[0] if self.flags & COPY_PE else call.q_pe
        lse_prefix = more[-1] if self.flags & PREFIX else None
        self.absorb(call.q_nope, call.q_pe, call.latent, call.k_pe, call.weight, call.kv_cache, call.scale,
                    call.seq_len, call.input_pos, call.slot_idx, call.start, q_lat, pe, lengths, table, self.tile0,
                    self.first, self.sequences, call.pages.size, call.pages.of_slot, self.flags)
        features = PLAIN if call.kv_cache.dtype != E4M3 else Features(kv_descale=call.scale)
        self.attend.run(q_lat, pe, call.pages.view, table, lengths, None, o_lat, lse_prefix, call.sm_scale, features)
        if lse_prefix is None or lse is None:
            lse_prefix, lse = self.no_lse
        self.project(o_lat, call.weight, call.seq_len, call.start, lse_prefix, lse, call.out, self.tile0, self.first,
                     self.sequences, self.flags)


class HeadGroup(NamedTuple):
    """Heads whose keys and values are expanded together, and the views of the scratch for them."""

    heads: slice
    weight: slice  # its rows
    both: Tensor  # [rows, heads * (P + V)]
    q: Tensor
    k_nope: Tensor
    v: Tensor
    lse: Tensor | None


@dataclass(frozen=True)
class Mha:
    """The prefill sequences' new tokens among themselves, with keys and values expanded per head; then the prefixes."""

    pack: Callable[..., None]
    attend: Any  # of mla_prefill
    scratch: Scratch  # as mha_views
    prefix: tuple[Absorbed, ...]

    def run(self, call: Call, device: int) -> None:
        q, rows, cu_q, cu_k, lse, latent, k_pe, groups = self.scratch.tensors(device)
        self.pack(call.q_nope, call.q_pe, call.latent, call.k_pe, call.kv_cache, call.scale, call.seq_len,
                  call.input_pos, call.slot_idx, call.start, q, rows, cu_q, cu_k)
        weight, out = call.weight.t(), call.out[0] if call.out.shape[0] == 1 else call.out[:, 0]
        for group in groups:
            if len(groups) == 1:
                torch.mm(latent, weight, out=group.both)
                mine = out
            else:
                torch.mm(latent, weight[:, group.weight], out=group.both)
                mine = out[:, group.heads]
            self.attend.run(group.q, group.k_nope, k_pe, group.v, cu_q, cu_k, mine, group.lse, call.sm_scale,
                            rows.shape[0])
        for part in self.prefix:
            part.run(call, device, lse)


def absorbed_prefill(shape: Shape, pages: Pages, num_prefill: int, tokens: int, prefill_tokens: int, sm_scale: float,
                     flags: int = 0) -> list[Absorbed]:
    """The launches for prefill sequences with prefill_tokens new ones among the first `tokens` places."""
    sizes = shape.sizes
    tile = most_tile(sizes.heads) if flags & PREFIX else context_tile(sizes.heads, num_prefill, prefill_tokens)
    tiles = context_tiles(tokens, num_prefill, tile)
    most = max(1, LAUNCH_BYTES // (tile * sizes.heads * sizes.rank * shape.dtype.itemsize))
    return [absorbed(shape, pages, tile0, min(most, tiles - tile0), tile, 0, num_prefill, COPY_PE | flags, sm_scale)
            for tile0 in range(0, tiles, most)]


_absorbed = dispatch.Remembered()


def absorbed(shape: Shape, pages: Pages, tile0: int, tiles: int, tile: int, first: int, sequences: int, flags: int,
             sm_scale: float) -> Absorbed:
    """The launches for so many tiles: the same for calls that differ in their tokens alone."""
    shape = shape._replace(sizes=shape.sizes._replace(tokens=0))
    at = shape, pages.size, tile0, tiles, tile, first, sequences, flags
    found = _absorbed.get(at)
    if found is None:
        found = _absorbed[at] = _absorbed_anew(shape, pages, tile0, tiles, tile, first, sequences, flags, sm_scale)
    return found


def _absorbed_anew(shape: Shape, pages: Pages, tile0: int, tiles: int, tile: int, first: int, sequences: int,
                   flags: int, sm_scale: float) -> Absorbed:
    sizes = shape.sizes
    absorb, project = _functions_of(cached_mla_specs, shape)
    rows = (tiles, tile, sizes.heads)
    parts: Parts = [((*rows, sizes.rank), shape.dtype), ((*rows, sizes.rank), shape.dtype), ((tiles,), torch.int32),
                    ((tiles, -(-shape.max_seq_len // pages.size)), torch.int32)]
    if flags & COPY_PE:
        parts.append(((*rows, sizes.rope), shape.dtype))
    if flags & PREFIX:
        parts.append((rows, torch.float32))
    scratch = Scratch(parts, "cached_mla")
    assert shape.device.index is not None
    q_lat, o_lat, lengths, table, *more = scratch.tensors(shape.device.index)
    pe = more[0] if flags & COPY_PE else q_lat.new_empty(*rows, sizes.rope)
    features = PLAIN if shape.cache_dtype != E4M3 else Features(kv_descale=no_scale(shape.device))
    attend = decode._prepare((q_lat, pe), pages.view, table, lengths, sizes.rank, sm_scale, not flags & PREFIX, None,
                             o_lat, None, shape.backend, features,
                             ("cached_mla", shape, rows, pages.size, table.shape, flags & PREFIX))
    nothing = no_scale(shape.device)
    return Absorbed(absorb, project, attend, scratch, (nothing[None, None], nothing[None]), tile0, first, sequences,
                    flags)


def mha_prefill(shape: Shape, pages: Pages, num_prefill: int, tokens: int, places: int, prefill_tokens: int,
                sm_scale: float, with_prefix: bool) -> Mha:
    """The same in the MHA form. tokens: all places; those of prefill sequences are among the first `places`."""
    sizes = shape.sizes
    width = sizes.nope + sizes.value
    heads = max(1, min(sizes.heads, LAUNCH_BYTES // (prefill_tokens * width * shape.dtype.itemsize)))
    parts: Parts = [((tokens, sizes.heads, sizes.nope + sizes.rope), shape.dtype),
                    ((prefill_tokens, sizes.rank + sizes.rope), shape.dtype), ((2 * num_prefill,), torch.int32),
                    ((2 * num_prefill,), torch.int32), ((sizes.heads, tokens), torch.float32),
                    ((prefill_tokens, heads * width), shape.dtype)]
    scratch = Scratch(parts, "cached_mla in the MHA form", functools.partial(mha_views, sizes, heads, with_prefix))
    assert shape.device.index is not None
    _, _, cu_q, cu_k, _, _, k_pe, groups = scratch.tensors(shape.device.index)
    some = groups[0]
    attend = prefill._prepare(some.q, (some.k_nope, k_pe), some.v, cu_q, cu_k, prefill_tokens, prefill_tokens, sm_scale,
                              True, None, some.lse, shape.backend)
    prefix: list[Absorbed] = []
    if with_prefix:
        prefix = absorbed_prefill(shape, pages, num_prefill, places, prefill_tokens, sm_scale, PREFIX)
    (pack,) = _functions_of(cached_mla_pack_spec, shape)
    return Mha(pack, attend, scratch, tuple(prefix))


def mha_views(sizes: Sizes, heads: int, with_lse: bool, q: Tensor, rows: Tensor, cu_q: Tensor, cu_k: Tensor,
              lse: Tensor, expanded: Tensor) -> tuple[Any, ...]:
    """(q, new rows, cu_q, cu_k, log-sum-exps, [rows, rank], [rows, 1, rope], groups of `heads` heads)"""
    width, groups = sizes.nope + sizes.value, []
    for first in range(0, sizes.heads, heads):
        some = slice(first, min(first + heads, sizes.heads))
        both = expanded[:, :(some.stop - first) * width]
        kv = both.unflatten(1, (-1, width))
        groups.append(HeadGroup(some, slice(first * width, some.stop * width), both, q[:, some], kv[..., :sizes.nope],
                                kv[..., sizes.nope:], lse.t()[:, some] if with_lse else None))
    return q, rows, cu_q, cu_k, lse.t(), rows[:, :sizes.rank], rows[:, None, sizes.rank:], tuple(groups)


_functions = dispatch.Remembered()


def _functions_of(specs: Callable[..., Spec | tuple[Spec, ...]], shape: Shape) -> tuple[Callable[..., None], ...]:
    """The loaded kernels of these Specs, which have no facts but those of `shape`."""
    sizes = shape.sizes
    at = specs, shape.device, shape.dtype, shape.cache_dtype, sizes.nope, sizes.rope, sizes.rank
    found = _functions.get(at)
    if found is None:
        wanted = specs(**shape.spec_facts())
        found = _functions[at] = tuple(dispatch.plan_for(spec, "auto", shape.device).function
                                       for spec in (wanted if isinstance(wanted, tuple) else (wanted,)))
    return found


@functools.cache
def no_scale(device: torch.device) -> Tensor:
    """[1]: one, which stands in for the scale of a cache that has none."""
    return torch.ones(1, dtype=torch.float32, device=device)


def _carved(base: Tensor, parts: Parts) -> tuple[Tensor, ...]:
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
