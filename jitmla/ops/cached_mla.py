"""cached_mla: attention of an MLA layer over a slot cache, from queries to value heads, as AutoDeploy calls it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, events, registry
from .. import torch_ops_cached as torch_ops
from ..errors import InvalidArgument
from ..pick import cached_form
from ..schedule import slot_page
from ..spec import mla_prefill_spec
from . import cached_launch as launch
from . import cached_reference, checks
from . import mla_decode as decode
from .cached_launch import Call, Pages, Shape
from .cached_mla_arguments import Sizes, check, check_layout

OP = "cached_mla"
INF = float("inf")


def cached_mla(q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, kv_b_proj_weight: Tensor, kv_cache: Tensor,
               *, seq_len: Tensor, input_pos: Tensor, slot_idx: Tensor, cu_seqlen: Tensor, num_prefill: int,
               prefill_tokens: int, num_decode: int, sm_scale: float, out: Tensor | None = None,
               kv_scale: Tensor | None = None, max_prefix: int | None = None, form: str = "auto",
               backend: str = "auto") -> Tensor:
    """Append the new tokens' latent rows to their slots, and attend to each slot up to the token itself.

    For token t, the k-th new one of sequence i, and head n, with W[n] = kv_b_proj_weight[n (P+V) : (n+1) (P+V)]:
    kv_cache[slot_idx[i], input_pos[i] + k] = [latent[t] | k_pe[t]],
    x_j = sm_scale * <[q_nope[t,n] W[n,:P] | q_pe[t,n]], row_j> for j <= input_pos[i] + k, and
    out[t,n] = W[n,P:] sum_j softmax(x)_j row_j[:kv_lora_rank]. (DeepSeek-V2, arXiv 2405.04434, section 2.1, with both
    up-projections absorbed. They are used as they lie in the weight: nothing is derived from it that could go stale.)

    q_nope: [batch, s, heads, P], bf16 or fp16. q_pe: [batch, s, heads, qk_rope_head_dim], rotated.
    latent: [batch, s, kv_lora_rank], after its norm. k_pe: [batch, s, 1, qk_rope_head_dim], rotated.
    kv_b_proj_weight: [heads * (P + V), kv_lora_rank]; of each head first the rows for keys, then those for values.
    kv_cache: [slots, max_seq_len, kv_lora_rank + qk_rope_head_dim], dtype of q_nope or float8_e4m3fn; the new rows are
        written. What is behind a sequence's tokens is not read, and may be uninitialised.
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
    kv_scale: [1] float32 on the device, of an e4m3 cache only, and required there: row_j is that times what is stored,
        also of the new tokens.
    max_prefix: upper bound of input_pos of the prefill sequences, where the host knows one: 0 says that none of them
        has a prefix, which saves the launches for it in the MHA form.
    form: of the attention of prefill sequences. "absorbed": all through mla_decode. "mha": keys and values of the new
        tokens are expanded per head for mla_prefill, and prefixes are merged in, absorbed. "auto": what is faster for
        so many tokens and has kernels (jitmla.pick.cached_form); an event says which and why.
    backend: "auto", a backend of the attention (mla_decode, mla_prefill), or "reference".

    Returns out. No host synchronisation; may be captured in a CUDA graph, whose replays may change all metadata but the
    three counts.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_cached_mla(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, seq_len,
                                         input_pos, slot_idx, cu_seqlen, num_prefill, prefill_tokens, num_decode,
                                         sm_scale, kv_scale, max_prefix, form, out, backend)
    try:
        pages = _pages(kv_cache)
        prepared = _prepared[q_nope.shape, q_nope.dtype, q_nope.get_device(), q_pe.size(3), latent.size(2),
                             kv_b_proj_weight.size(0), kv_cache.shape, kv_cache.dtype, pages.size, num_prefill,
                             prefill_tokens, num_decode, max_prefix == 0, form, backend]
        if (type(sm_scale) is not float or not 0.0 < sm_scale < INF or q_nope.requires_grad or q_pe.requires_grad
                or latent.requires_grad or kv_b_proj_weight.requires_grad or (kv_scale is None) == prepared.scaled):
            prepared = None
    except (KeyError, AttributeError, TypeError, ValueError, IndexError):
        prepared = None
    metadata = (seq_len, input_pos, slot_idx, cu_seqlen)
    if prepared is None:
        prepared = _prepare(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, metadata, num_prefill,
                            prefill_tokens, num_decode, sm_scale, out, kv_scale, max_prefix, form, backend)
        if prepared is None:
            return _reference(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, metadata, num_prefill,
                              num_decode, sm_scale, out, kv_scale)
        pages = _pages(kv_cache)
    if out is None:
        out = prepared.empty(prepared.out_shape, dtype=q_nope.dtype, device=q_nope.device)
    elif prepared.empty is torch.zeros:
        out.zero_()
    try:
        prepared.run(Call(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache,
                          prepared.no_scale if kv_scale is None else kv_scale, pages, *metadata, out, sm_scale))
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        _check(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, metadata, num_prefill, prefill_tokens,
               num_decode, sm_scale, out, kv_scale, max_prefix, form)
        check_layout(q_nope, q_pe, latent, k_pe, kv_b_proj_weight, kv_cache, out)
        raise
    return out


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


@dataclass(frozen=True)
class Prepared:
    """What calls of one shape launch."""

    out_shape: tuple[int, int, int, int]
    empty: Callable[..., Tensor]  # torch.zeros where a place may have no token
    device: int
    several_devices: bool
    flatten: bool  # batch and s are both more than 1
    scaled: bool
    no_scale: Tensor
    groups: tuple[launch.Absorbed | launch.Mha, ...]

    def run(self, call: Call) -> None:
        if self.several_devices and torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(call)
        if self.flatten:
            tokens = (x.flatten(0, 1)[None] for x in call[:4])
            call = Call(*tokens, *call[4:])._replace(out=call.out.view(1, -1, *call.out.shape[2:]))
        for group in self.groups:
            group.run(call, self.device)


_prepared = dispatch.Remembered()


def _prepare(q_nope: Any, q_pe: Any, latent: Any, k_pe: Any, weight: Any, kv_cache: Any, metadata: Any,
             num_prefill: Any, prefill_tokens: Any, num_decode: Any, sm_scale: Any, out: Any, kv_scale: Any,
             max_prefix: Any, form: Any, backend: Any) -> Prepared | None:
    """Check every argument, choose who serves the call, and remember it; None is for the reference."""
    sizes = _check(q_nope, q_pe, latent, k_pe, weight, kv_cache, metadata, num_prefill, prefill_tokens, num_decode,
                   sm_scale, out, kv_scale, max_prefix, form)
    if checks.chooses_reference(decode.OP, backend, q_nope, named=OP):
        return None
    check_layout(q_nope, q_pe, latent, k_pe, weight, kv_cache, out)
    pages = _pages(kv_cache)
    batch, s, heads, _ = q_nope.shape
    shape = Shape(sizes, torch.device("cuda", q_nope.get_device()), q_nope.dtype, kv_cache.dtype, kv_cache.shape[1],
                  backend)
    generate = num_prefill == 0 and s == 1
    contiguous = prefill_tokens + num_decode == sizes.tokens
    groups: list[launch.Absorbed | launch.Mha] = []
    if prefill_tokens:
        places = prefill_tokens if contiguous else sizes.tokens
        if _form(shape, form, num_prefill, prefill_tokens, max_prefix) == "mha":
            groups.append(launch.mha_prefill(shape, pages, num_prefill, sizes.tokens, places, prefill_tokens, sm_scale,
                                             max_prefix != 0))
        else:
            groups += launch.absorbed_prefill(shape, pages, num_prefill, places, prefill_tokens, sm_scale)
    if num_decode:
        flags = (launch.GENERATE if generate else 0) | (0 if generate and num_decode == batch else launch.COPY_PE)
        groups.append(launch.absorbed(shape, pages, 0, num_decode, 1, num_prefill, num_decode, flags, sm_scale))
    prepared = Prepared((batch, s, heads, sizes.value), torch.empty if contiguous else torch.zeros,
                        q_nope.get_device(), torch.cuda.device_count() > 1, batch > 1 and s > 1, kv_scale is not None,
                        launch.no_scale(shape.device), tuple(groups))
    if prepared.flatten and out is not None and not out.is_contiguous():
        raise InvalidArgument(f"out with strides {tuple(out.stride())} for batch {batch} and s {s}",
                              supported="a contiguous out where batch and s are both more than 1",
                              differs="it is strided", remedy="pass out.contiguous(), or leave it out")
    _prepared[q_nope.shape, q_nope.dtype, q_nope.get_device(), sizes.rope, sizes.rank, weight.size(0), kv_cache.shape,
              kv_cache.dtype, pages.size, num_prefill, prefill_tokens, num_decode, max_prefix == 0, form,
              backend] = prepared
    return prepared


def _form(shape: Shape, form: str, num_prefill: int, prefill_tokens: int, max_prefix: int | None) -> str:
    """"mha" or "absorbed", and an event that says why."""
    if form != "auto":
        return form
    sizes, facts = shape.sizes, shape.spec_facts()
    spec = mla_prefill_spec(arch=facts["arch"], dtype=facts["dtype"], qk_head_dim=sizes.nope + sizes.rope,
                            v_head_dim=sizes.value, qk_rope_head_dim=sizes.rope, causal=True)
    found, why = cached_form(heads=sizes.heads, kv_lora_rank=sizes.rank, sequences=num_prefill, tokens=prefill_tokens,
                             prefix=max_prefix != 0)
    if found == "mha" and not registry.candidates(spec, shape.backend):
        found, why = "absorbed", f"no template of mla_prefill serves {spec} on backend {shape.backend!r}"
    events.emit("choose", op=OP, backend=found, why=why)
    return found


def _check(q_nope: Any, q_pe: Any, latent: Any, k_pe: Any, weight: Any, kv_cache: Any, metadata: Any,
           num_prefill: Any, prefill_tokens: Any, num_decode: Any, sm_scale: Any, out: Any, kv_scale: Any,
           max_prefix: Any, form: Any) -> Sizes:
    return check(q_nope, q_pe, latent, k_pe, weight, kv_cache,
                 dict(zip(("seq_len", "input_pos", "slot_idx", "cu_seqlen"), metadata, strict=True)),
                 {"num_prefill": num_prefill, "prefill_tokens": prefill_tokens, "num_decode": num_decode}, sm_scale,
                 out, kv_scale, max_prefix, form)


def _reference(q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, weight: Tensor, kv_cache: Tensor,
               metadata: tuple[Tensor, ...], num_prefill: int, num_decode: int, sm_scale: float, out: Tensor | None,
               kv_scale: Tensor | None) -> Tensor:
    batch, s, heads, nope = q_nope.shape
    seq_len, input_pos, slot_idx, start = metadata
    sequences = num_prefill + num_decode
    if num_prefill == 0 and s == 1:
        start = torch.arange(sequences, dtype=torch.int32, device=q_nope.device)
        seq_len = torch.ones_like(start)
    flat = torch.empty(batch * s, heads, weight.shape[0] // heads - nope, dtype=q_nope.dtype, device=q_nope.device)
    cached_reference.cached_mla(q_nope.flatten(0, 1), q_pe.flatten(0, 1), latent.flatten(0, 1),
                                k_pe.flatten(0, 1)[:, 0], weight, kv_cache, seq_len=seq_len, input_pos=input_pos,
                                slot_idx=slot_idx, start=start, sequences=sequences, sm_scale=sm_scale, out=flat,
                                kv_scale=kv_scale)
    shaped = flat.view(batch, s, *flat.shape[1:])
    return shaped if out is None else out.copy_(shaped)
