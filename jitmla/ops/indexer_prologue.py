"""indexer_prologue: what lies between the indexer's projections and its cache and logits, in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_indexer as torch_ops
from ..spec_indexer import indexer_prologue_spec
from . import checks, indexer_reference, launch
from . import indexer_arguments as arguments

OP = "indexer_prologue"
POSITIONS = {torch.int32: "i32", torch.int64: "i64"}
_calls = dispatch.Remembered()


def indexer_prologue(q: Tensor, k_raw: Tensor, w_raw: Tensor, ln_weight: Tensor, ln_bias: Tensor, positions: Tensor,
                     cos_sin_cache: Tensor, *, rope_interleave: bool = False, scale_mode: str = "pow2_f32",
                     hadamard: bool = False, eps: float = 1e-6, backend: str = "auto"
                     ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer norm of the key, RoPE on the first 64 columns of queries and key, FP8 quantisation of all rows of 128, and
    the scaling of the weights, as DeepSeek-V3.2's indexer has it (arXiv 2512.02556, section 2.1).

    k = bf16(layer_norm(bf16(k_raw))); rows are turned in float32 and rounded to bf16 once; a row's scale is max(amax,
    1e-4) / 448 or the power of two above it; weights = w_raw * scale of q * heads^-0.5 * 128^-0.5. The scale of q is in
    the weights and nowhere else.

    q: [tokens, heads, 128] bf16; heads 32 or 64 and contiguous, any token stride that is a multiple of 8.
    k_raw: [tokens, 128] bf16 or float32; w_raw: [tokens, heads] float32 or bf16; any token strides.
    ln_weight, ln_bias: [128], float32 or bf16.
    positions: [tokens] int32 or int64. Not checked against the table: the host does not read them.
    cos_sin_cache: [positions, 64] float32, contiguous: 32 cosines, then 32 sines.
    rope_interleave: rotated pairs are the columns (2 i, 2 i + 1) instead of (i, i + 32). hadamard: an orthonormal
        Walsh-Hadamard transform of the 128 columns after RoPE. Both are part of the format of the cache.
    scale_mode: "pow2_f32" or "raw_f32". eps: of the layer norm.
    backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Returns q_fp8 [tokens, heads, 128] e4m3, k_fp8 [tokens, 128] e4m3, k_scale [tokens, 1] float32, weights [tokens,
    heads] float32. NaN in a row stays in that row. Every token is worked on by itself: padding disturbs nobody.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch.ops.jitmla.indexer_prologue(q, k_raw, w_raw, ln_weight, ln_bias, positions, cos_sin_cache,
                                                 rope_interleave, scale_mode, hadamard, eps, backend)

    def check() -> None:
        arguments.prologue(q, k_raw, w_raw, ln_weight, ln_bias, positions, cos_sin_cache, scale_mode)
        checks.finite_number("eps", eps)

    def plan() -> dispatch.Plan:
        names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
        spec = indexer_prologue_spec(
            arch=dispatch.arch_of(q.device), heads=q.shape[1], rope_interleave=bool(rope_interleave),
            scale_mode=scale_mode, hadamard=bool(hadamard), k_dtype=names[k_raw.dtype], w_dtype=names[w_raw.dtype],
            ln_dtype=names[ln_weight.dtype], positions=POSITIONS[positions.dtype])
        return dispatch.plan_for(spec, backend, q.device)

    if not isinstance(q, Tensor) or q.dim() != 3 or not q.shape[0]:
        check()
    out = torch_ops.empty_prologue(q)
    if not q.shape[0]:
        return out
    like = (q.get_device(), q.shape[1], k_raw.dtype, w_raw.dtype, ln_weight.dtype, positions.dtype, rope_interleave,
            scale_mode, hadamard, backend)
    launch.run(OP, _calls, like, q, backend, check, plan,
               lambda: (q, k_raw, w_raw, ln_weight, ln_bias, positions, cos_sin_cache, eps, *out),
               lambda: indexer_reference.indexer_prologue(
                   q, k_raw, w_raw, ln_weight, ln_bias, positions, cos_sin_cache, rope_interleave=rope_interleave,
                   scale_mode=scale_mode, hadamard_transform=hadamard, eps=eps, q_fp8=out[0], k_fp8=out[1],
                   k_scale=out[2], weights=out[3]))
    return out
