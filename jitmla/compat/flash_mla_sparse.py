"""FlashMLA's sparse calls (flash_mla, as of April 2026) over jitmla.sparse_mla_decode and jitmla.sparse_mla_prefill.

What differs: any number of heads up to 128 without padding, any topk and page size, topk_length with rows of 656 bytes,
bf16 rows in decode. Lists whose query tokens are not evenly spaced are copied first. Not served: rows of the later
format with 448 + 64 columns, and a second cache.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import InvalidArgument, JitmlaError
from ..ops.sparse_mla_arguments import even_tokens
from ..ops.sparse_mla_decode import sparse_mla_decode
from ..ops.sparse_mla_prefill import sparse_mla_prefill

HEAD_DIM_V = 512


class Refused(InvalidArgument, RuntimeError, AssertionError):
    """What FlashMLA's Python layer (AssertionError) and its extension (RuntimeError) refuse."""


def sparse_with_kvcache(q: Tensor, k_cache: Tensor, indices: Tensor, head_dim_v: int, softmax_scale: float | None,
                        causal: bool, is_fp8_kvcache: bool, attn_sink: Tensor | None = None,
                        topk_length: Tensor | None = None, **extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """flash_mla_with_kvcache when it is called with indices: (out [batch, s_q, heads, 512], lse [batch, heads, s_q],
    base e, +inf where no entry is valid). softmax_scale: by default width**-0.5, as FlashMLA's, which is right for no
    model with weight absorption: pass it."""
    given = [name for name, value in extra.items() if value is not None]
    if given:
        raise _refused(", ".join(given), "one cache and one list")
    if causal:
        raise _refused("causal=True with indices", "causal=False: the lists say what a token sees")
    if is_fp8_kvcache != (k_cache.element_size() == 1):
        raise _refused(f"is_fp8_kvcache={is_fp8_kvcache} with a cache of {k_cache.dtype}",
                       "True for rows of 656 bytes, False for bf16 rows")
    _check_width(head_dim_v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if indices.ndim == 3 and not even_tokens(indices):
        indices = indices.contiguous()
    try:
        return sparse_mla_decode(q, k_cache, indices, sm_scale=scale, topk_length=topk_length, attn_sink=attn_sink,
                                 return_lse=True)
    except JitmlaError as error:
        raise _translated(error) from error


def flash_mla_sparse_fwd(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int = HEAD_DIM_V,
                         attn_sink: Tensor | None = None, topk_length: Tensor | None = None
                         ) -> tuple[Tensor, Tensor, Tensor]:
    """(out [s_q, heads, 512] bf16, max_logits, lse [s_q, heads] float32). q: [s_q, heads, 576 or 512]; kv: [rows, 1,
    the same]; indices: [s_q, 1, topk] int32, invalid where < 0 or >= rows; topk_length: [s_q] int32."""
    _check_width(d_v)
    try:
        return sparse_mla_prefill(q, kv, indices, sm_scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink)
    except JitmlaError as error:
        raise _translated(error) from error


def _check_width(head_dim_v: int) -> None:
    if head_dim_v != HEAD_DIM_V:
        raise _refused(f"values of {head_dim_v} columns", f"{HEAD_DIM_V}")


def _refused(asked: str, supported: str) -> Refused:
    return Refused(asked, supported=supported, differs="it is something else",
                   remedy="see jitmla.compat.flash_mla_sparse, or call jitmla.sparse_mla_decode itself")


def _translated(error: JitmlaError) -> JitmlaError:
    if not isinstance(error, (ValueError, TypeError)):
        return error
    return Refused(error.asked, supported=error.supported, differs=error.differs, remedy=error.remedy)
