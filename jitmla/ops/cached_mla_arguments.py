"""What cached_mla takes: every argument check, with errors that name the argument, what it got and what it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument, InvalidArgumentType
from . import checks

MAX_HEADS = 128
E4M3 = torch.float8_e4m3fn
FORMS = ("auto", "absorbed", "mha")


class Sizes(NamedTuple):
    """The sizes of a call."""

    tokens: int  # places for tokens in the inputs: batch * s
    heads: int
    nope: int
    rope: int
    rank: int
    value: int


def check(q_nope: Any, q_pe: Any, latent: Any, k_pe: Any, weight: Any, kv_cache: Any, metadata: dict[str, Any],
          counts: dict[str, Any], sm_scale: Any, out: Any, kv_scale: Any, max_prefix: Any, form: Any) -> Sizes:
    """Raise InvalidArgument or InvalidArgumentType unless the op is defined on these."""
    checks.scale("cached_mla", sm_scale)
    checks.tensor("q_nope", q_nope, "[batch, s, heads, qk_nope_head_dim]", 4)
    checks.dtype("q_nope", q_nope, list(checks.DTYPE_NAMES))
    batch, s, heads, nope = q_nope.shape
    if not 1 <= heads <= MAX_HEADS:
        raise InvalidArgument(f"q_nope: {checks.describe(q_nope)}", supported=f"1 to {MAX_HEADS} heads",
                              differs=f"it has {heads}", remedy="split the heads over ranks")
    checks.tensor("q_pe", q_pe, "[batch, s, heads, qk_rope_head_dim]", 4)
    rope = q_pe.shape[3]
    checks.tensor("latent", latent, "[batch, s, kv_lora_rank]", 3)
    rank = latent.shape[2]
    checks.tensor("k_pe", k_pe, "[batch, s, 1, qk_rope_head_dim]", 4)
    for name, value, layout, expected in (
            ("q_pe", q_pe, "[batch, s, heads, qk_rope_head_dim]", (batch, s, heads, rope)),
            ("latent", latent, "[batch, s, kv_lora_rank]", (batch, s, rank)),
            ("k_pe", k_pe, "[batch, s, 1, qk_rope_head_dim]", (batch, s, 1, rope))):
        checks.shape(name, value, layout, expected, "q_nope and q_pe")
    checks.tensor("kv_b_proj_weight", weight, "[heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]", 2)
    if weight.shape[0] % heads or weight.shape[0] // heads <= nope or weight.shape[1] != rank:
        raise InvalidArgument(f"kv_b_proj_weight: {checks.describe(weight)}",
                              supported=f"[heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank] with {heads} heads, "
                              f"qk_nope_head_dim {nope}, kv_lora_rank {rank}",
                              differs=f"{weight.shape[0]} rows of {weight.shape[1]} do not make that",
                              remedy="pass the weight of kv_b_proj for the heads of this rank")
    value_dim = weight.shape[0] // heads - nope
    checks.tensor("kv_cache", kv_cache, "[slots, max_seq_len, kv_lora_rank + qk_rope_head_dim]", 3)
    checks.shape("kv_cache", kv_cache, "[slots, max_seq_len, kv_lora_rank + qk_rope_head_dim]",
                 [*kv_cache.shape[:2], rank + rope], "latent and k_pe")
    tensors = {"q_nope": q_nope, "q_pe": q_pe, "latent": latent, "k_pe": k_pe, "kv_b_proj_weight": weight,
               "kv_cache": kv_cache}
    if out is not None:
        checks.tensor("out", out, "[batch, s, heads, v_head_dim]", 4)
        checks.shape("out", out, "[batch, s, heads, v_head_dim]", (batch, s, heads, value_dim),
                     "q_nope and kv_b_proj_weight")
        tensors["out"] = out
    for name, value in tensors.items():
        checks.dtype(name, value, [q_nope.dtype, E4M3] if name == "kv_cache" else [q_nope.dtype])
        checks.contiguous_last(name, value)
        checks.device(name, value, q_nope.device, "q_nope")
    checks.no_gradient("cached_mla", **tensors)
    _check_metadata(metadata, counts, batch * s, q_nope)
    check_kv_scale(kv_scale, kv_cache, q_nope)
    if max_prefix is not None and (isinstance(max_prefix, bool) or not isinstance(max_prefix, int) or max_prefix < 0):
        raise InvalidArgumentType(f"max_prefix={max_prefix!r}", supported="None, or an int, at least 0",
                                  differs="it is none", remedy="leave it out where the host does not know one")
    if form not in FORMS:
        raise InvalidArgument(f"form={form!r}", supported=", ".join(FORMS), differs="there is no such form",
                              remedy='leave it out: "auto" takes the faster one')
    return Sizes(batch * s, heads, nope, rope, rank, value_dim)


def check_kv_scale(kv_scale: Any, kv_cache: Tensor, like: Tensor) -> None:
    """A scale for an e4m3 cache, on the device of `like`, and for no other one."""
    if (kv_scale is None) == (kv_cache.dtype == E4M3):
        raise InvalidArgument(f"kv_cache of {str(kv_cache.dtype).removeprefix('torch.')} "
                              f"{'without' if kv_scale is None else 'with'} kv_scale",
                              supported="kv_scale for a float8_e4m3fn cache, and for no other one",
                              differs="an unscaled FP8 cache would lose what does not fit" if kv_scale is None
                              else "rows are stored as they are",
                              remedy="pass kv_scale, a float32 tensor of one element" if kv_scale is None
                              else "leave kv_scale out")
    if kv_scale is not None:
        checks.tensor("kv_scale", kv_scale, "[1]", 1)
        checks.dtype("kv_scale", kv_scale, [torch.float32])
        checks.shape("kv_scale", kv_scale, "[1]", [1], "nothing: one scale for the cache")
        checks.device("kv_scale", kv_scale, like.device, "the other tensors")


def _check_metadata(metadata: dict[str, Any], counts: dict[str, Any], tokens: int, q_nope: Tensor) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InvalidArgumentType(f"{name}={value!r}", supported=f"{name}: an int, at least 0",
                                      differs="it is none" if not isinstance(value, int) else "it is negative",
                                      remedy="read it from metadata that is on the host")
    sequences = counts["num_prefill"] + counts["num_decode"]
    if counts["prefill_tokens"] + counts["num_decode"] > tokens or (counts["num_prefill"] == 0
                                                                    and counts["prefill_tokens"] > 0):
        raise InvalidArgument(", ".join(f"{n}={v}" for n, v in counts.items()),
                              supported=f"counts of at most {tokens} tokens, for which q_nope has places; "
                              "prefill_tokens 0 without prefill sequences",
                              differs=f"they are {counts['prefill_tokens'] + counts['num_decode']} tokens",
                              remedy="pass q_nope, q_pe, latent and k_pe of all tokens, prefill first")
    for name, value in metadata.items():
        checks.tensor(name, value, "[sequences]", 1)
        checks.dtype(name, value, [torch.int32])
        checks.contiguous_last(name, value)
        checks.device(name, value, q_nope.device, "q_nope")
        if value.shape[0] < sequences:
            raise InvalidArgument(f"{name}: {checks.describe(value)}",
                                  supported=f"an entry for each of the {sequences} sequences", differs="it is shorter",
                                  remedy="compare it with num_prefill and num_decode")


def check_layout(q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, weight: Tensor, kv_cache: Tensor,
                 out: Tensor | None) -> None:
    """Raise InvalidArgument unless the kernels can read and write these in place."""
    for name, value in (("q_nope", q_nope), ("q_pe", q_pe), ("latent", latent), ("k_pe", k_pe),
                        ("kv_b_proj_weight", weight), ("kv_cache", kv_cache), ("out", out)):
        if value is not None:
            checks.aligned(name, value)
