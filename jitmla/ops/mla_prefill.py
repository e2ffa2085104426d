"""mla_prefill: varlen multi-head attention over keys and values that are expanded per head."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_prefill as torch_ops
from ..spec import mla_prefill_spec
from ..workspace import scratch
from . import checks, prefill_reference
from .prefill_arguments import check_prefill, check_prefill_layout

OP = "mla_prefill"
PE = 64  # columns of k_pe in the kernels
WANTS_LSE = 2  # bit of the kernels' flags
GROUP_KEYS = 65536  # of all heads whose tiles are worked on at a time, measured on an H200 (50 MB of L2)
INF = float("inf")

Keys = Tensor | tuple[Tensor, Tensor]


@overload
def mla_prefill(q: Tensor, k: Keys, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, max_seqlen_q: int,
                max_seqlen_k: int, sm_scale: float, causal: bool = ..., out: Tensor | None = ...,
                lse: Tensor | None = ..., return_lse: Literal[False] = ..., backend: str = ...) -> Tensor: ...
@overload
def mla_prefill(q: Tensor, k: Keys, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, max_seqlen_q: int,
                max_seqlen_k: int, sm_scale: float, causal: bool = ..., out: Tensor | None = ...,
                lse: Tensor | None = ..., return_lse: Literal[True], backend: str = ...) -> tuple[Tensor, Tensor]: ...


def mla_prefill(q: Tensor, k: Any, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, max_seqlen_q: int,
                max_seqlen_k: int, sm_scale: float = checks.REQUIRED, causal: bool = True, out: Tensor | None = None,
                lse: Tensor | None = None, return_lse: bool = False, backend: str = "auto") -> Any:
    """Attention of the new tokens of several requests, with keys and values expanded per head (the MHA form of MLA).

    For token i of a request with n_q tokens and n_k keys, head h, over its keys j (with `causal`, j <= i + n_k - n_q):
    x_j = sm_scale * <q[i,h], k[j,h]>, lse = ln sum_j exp(x_j), out = sum_j exp(x_j - lse) * v[j,h].
    The formula is that of DeepSeek-V2 (arXiv 2405.04434, section 2.1) with k and v as kv_b_proj gives them.

    q: [tokens, heads, qk_head_dim], bf16 or fp16; the requests one behind the other. Any strides whose rows are 16-byte
        aligned, as for k, v and out.
    k: [keys, heads, qk_head_dim], or the pair (k_nope [keys, heads, qk_head_dim - 64], k_pe [keys, heads or 1, 64]),
        which saves a copy of the rotated columns for each head.
    v: [keys, heads, v_head_dim], for example a slice of what kv_b_proj gave.
    cu_seqlens_q, cu_seqlens_k: [batch + 1] int32: where each request begins among tokens and keys, from 0. Requests may
        have no tokens or no keys. Read on the device only.
    max_seqlen_q, max_seqlen_k: upper bounds of the requests' tokens and keys, for scheduling.
    sm_scale: positive factor of the raw dot product; for DeepSeek-V3 192**-0.5 * mscale**2 = 0.1352.
    out: [tokens, heads, v_head_dim], dtype of q; written. lse: [tokens, heads] float32, any strides; written when given
        or asked for: natural logarithm, -inf (and a zero out row) where no key is seen. Rows behind the last request
        are neither read nor written.
    backend: "auto", a backend of `jitmla kernels` such as "sm90", or "reference". A named one is strict; auto takes the
        reference on CPU tensors and says so in an event.

    Returns out, or (out, lse) with return_lse. On a GPU: no host synchronisation, and right in a CUDA graph for all
    later lengths. Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed,
    ToolchainMissing, CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_mla_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale,
                                          causal, out, lse, return_lse, backend)
    try:
        k_nope, k_pe = k if type(k) is tuple else (k, k)
        prepared = _prepared[q.shape[1:], v.shape[2], k_nope.shape[2], k_pe.shape[2], q.dtype, q.get_device(), causal,
                             backend]
        if (type(sm_scale) is not float or not 0.0 < sm_scale < INF or q.requires_grad or k_nope.requires_grad
                or v.requires_grad or not q.shape[0] or not k_nope.shape[0]):
            prepared = None
    except (KeyError, AttributeError, TypeError, ValueError, IndexError):
        prepared = None
    if prepared is None:
        prepared = _prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale, causal, out, lse,
                            backend)
        k_nope, k_pe = k if isinstance(k, (tuple, list)) else (k, k)
    if out is None:
        out = torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)
    if lse is None and return_lse:
        lse = empty_lse(q)
    try:
        prepared.run(q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k, out, lse, sm_scale, max_seqlen_k)
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        check_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale, out, lse)
        check_prefill_layout(q, k_nope, k_pe, v, out)
        raise
    return (out, lse) if return_lse else out


def empty_lse(q: Tensor) -> Tensor:
    """[tokens, heads] float32 with the tokens innermost, as the kernel writes them."""
    return torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device).t()


def heads_per_group(heads: int, max_seqlen_k: int) -> int:
    """Heads whose keys and values stay in L2 while their query tiles are worked on."""
    return max(1, min(heads, GROUP_KEYS // max(max_seqlen_k, 1)))


@dataclass(frozen=True)
class OnGpu:
    """What calls of one kind launch. What may still differ between them is checked by the compiled wrapper (dtype,
    shape, strides, alignment and device of every tensor), and what it cannot check in `run`."""

    plan: dispatch.Plan
    device: int
    ctas: int
    pe_offset: int
    no_lse: Tensor  # stands in where none is wanted; not written

    def run(self, q: Tensor, k: Tensor, k_pe: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
            out: Tensor, lse: Tensor | None, sm_scale: float, max_seqlen_k: int) -> None:
        tokens, heads, _ = q.shape
        if k_pe.shape[1] not in (1, heads) or (lse is not None and lse.shape != (tokens, heads)):
            raise ValueError("k_pe or lse")  # `check_prefill` says it in full
        if k.shape[0] == 0:  # nothing to describe to the TMA engine; no request has a key, so these are not read
            k, k_pe, v = (x.new_empty(1, *x.shape[1:]) for x in (k, k_pe, v))
        if heads == 1 or tokens == 1 or k.shape[0] == 1:
            # the stride of a dimension of size 1 means nothing, but the compiled wrapper looks at it
            q, k, k_pe, v, out = (checks.usual_strides(x) for x in (q, k, k_pe, v, out))
        elif k_pe.shape[1] == 1 and k_pe.stride(1) != k_pe.shape[2]:
            k_pe = checks.usual_strides(k_pe)
        _, counters = scratch(self.device, 1, 2)
        flags = WANTS_LSE if lse is not None else 0
        group = heads_per_group(heads, max_seqlen_k)
        self.plan(q, k, k_pe, v, cu_seqlens_q, cu_seqlens_k, out, self.no_lse if lse is None else lse, counters,
                  sm_scale, self.pe_offset, flags, group, self.ctas)


@dataclass(frozen=True)
class OnReference:
    """A call that the reference serves; every call is checked anew."""

    causal: bool

    def run(self, q: Tensor, k: Tensor, k_pe: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
            out: Tensor, lse: Tensor | None, sm_scale: float, max_seqlen_k: int) -> None:
        prefill_reference.mla_prefill(q, k, k_pe, v, cu_seqlens_q, cu_seqlens_k, sm_scale=sm_scale, causal=self.causal,
                                      out=out, lse=empty_lse(q) if lse is None else lse)


@dataclass(frozen=True)
class Empty:
    """A call without tokens: nothing to do."""

    def run(self, *_: Any) -> None:
        pass


_prepared = dispatch.Remembered()


def _prepare(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
             sm_scale: Any, causal: Any, out: Any, lse: Any, backend: Any) -> OnGpu | OnReference | Empty:
    """Check every argument, choose who serves the call, and remember it when that is a kernel."""
    k_nope, k_pe = check_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale, out, lse)
    if checks.chooses_reference(OP, backend, q):
        return OnReference(bool(causal))
    check_prefill_layout(q, k_nope, k_pe, v, out)
    _, heads, width = q.shape
    rope = k_pe.shape[2] if k_pe is not k_nope else PE
    spec = mla_prefill_spec(arch=dispatch.arch_of(q.device), dtype=checks.DTYPE_NAMES[q.dtype], qk_head_dim=width,
                            v_head_dim=v.shape[2], qk_rope_head_dim=rope, causal=bool(causal))
    if q.shape[0] == 0:
        return Empty()
    plan = dispatch.plan_for(spec, backend, q.device)
    prepared = OnGpu(plan, q.get_device(), dispatch.sm_count(q.device), 0 if k_pe is not k_nope else width - PE,
                     _no_lse(q.device))
    _prepared[q.shape[1:], v.shape[2], k_nope.shape[2], k_pe.shape[2], q.dtype, q.get_device(), causal,
              backend] = prepared
    return prepared


@functools.cache
def _no_lse(device: torch.device) -> Tensor:
    return torch.empty(1, 1, dtype=torch.float32, device=device)
