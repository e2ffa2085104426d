"""Spec: what a call asks, as static facts. No batch size, no length, no stride: those are launch arguments.

Which facts an op has, and which values each may take, is said in cache_schema.json (`spec_<op>`), and only there. A
fact that has a default there is left out of a Spec when it has that value: there is one way to say a thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import schema
from .errors import SchemaViolation


@dataclass(frozen=True)
class Spec:
    """The static facts of one request, in the order of the schema. Hashable; equal facts are equal Specs."""

    facts: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, op: str, **facts: Any) -> Spec:
        """A Spec of `op`, checked against cache_schema.json; raises SchemaViolation."""
        return cls.from_dict({"op": op, **facts})

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Spec:
        fields = schema.spec_fields(str(facts.get("op")))
        schema.check(facts, f"spec_{facts['op']}")
        return cls(tuple((name, facts[name]) for name, field in fields.items()
                         if name in facts and ("default" not in field or facts[name] != field["default"])))

    def __getitem__(self, name: str) -> Any:
        for key, value in self.facts:
            if key == name:
                return value
        return schema.spec_fields(self.op)[name]["default"]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.facts)

    def as_dict(self) -> dict[str, Any]:
        return dict(self.facts)

    @property
    def op(self) -> str:
        return self.facts[0][1]

    @property
    def arch(self) -> str:
        return self["arch"]

    def __str__(self) -> str:
        return f"{self.op}(" + ", ".join(f"{k}={v}" for k, v in self.facts if k != "op") + ")"


def bucket(op: str, field: str, value: int) -> int:
    """The smallest bucket of an enumerated field that holds `value`; raises SchemaViolation when none does."""
    buckets = sorted(schema.spec_fields(op)[field]["enum"])
    for top in buckets:
        if value <= top:
            return top
    raise SchemaViolation(f"{field} = {value}", supported=f"at most {buckets[-1]}",
                                 differs=f"{op} has no bucket of {field} for {value}",
                          remedy="docs/schema.md lists the values of each field")


def mla_decode_spec(*, arch: str, dtype: str, kv_lora_rank: int, qk_rope_head_dim: int, page_size: int, s_q: int,
                    heads: int, causal: bool, kv_dtype: str | None = None, split_cache: bool = False,
                    compact: bool = False, batch_invariant: bool = False) -> Spec:
    """The Spec of an mla_decode call: the one place where launch sizes become static facts.

    kv_dtype: of the cache, when it is not that of q. s_q: with `compact`, the most query tokens of a request."""
    pages = schema.spec_fields("mla_decode")["page_size"]["enum"]
    return Spec.of("mla_decode", arch=arch, dtype=dtype, kv_dtype=kv_dtype or dtype, kv_lora_rank=kv_lora_rank,
                   qk_rope_head_dim=qk_rope_head_dim, page_size=page_size if page_size in pages else 0,
                   rows=bucket("mla_decode", "rows", s_q * heads), causal=causal and s_q > 1, split_cache=split_cache,
                   compact=compact, batch_invariant=batch_invariant)


def inv_rope_fp8_quant_spec(*, arch: str, dtype: str, positions: str, nope_dim: int, rope_dim: int, group_size: int,
                            scale_mode: str, neox: bool) -> Spec:
    """The Spec of an inv_rope_fp8_quant call."""
    return Spec.of("inv_rope_fp8_quant", arch=arch, dtype=dtype, positions=positions, nope_dim=nope_dim,
                   rope_dim=rope_dim, group_size=group_size, scale_mode=scale_mode, neox=neox)


def fp8_bmm_spec(*, arch: str) -> Spec:
    """The Spec of an fp8_bmm call."""
    return Spec.of("fp8_bmm", arch=arch, dtype="e4m3", scale_dtype="f32", out_dtype="bf16")


def append_latent_spec(*, arch: str, dtype: str, e4m3_cache: bool, slots: str, kv_lora_rank: int,
                       qk_rope_head_dim: int) -> Spec:
    """The Spec of an append_latent call."""
    return Spec.of("append_latent", arch=arch, dtype=dtype, e4m3_cache=e4m3_cache, slots=slots,
                   kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim)


def cached_mla_specs(*, arch: str, dtype: str, qk_nope_head_dim: int, kv_lora_rank: int, qk_rope_head_dim: int,
                     e4m3_cache: bool = False) -> tuple[Spec, Spec]:
    """The Specs of what a cached_mla call launches before and after mla_decode."""
    return (Spec.of("cached_mla", arch=arch, stage="absorb", dtype=dtype, e4m3_cache=e4m3_cache,
                    qk_nope_head_dim=qk_nope_head_dim, kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim),
            Spec.of("cached_mla", arch=arch, stage="project", dtype=dtype, qk_nope_head_dim=0,
                    kv_lora_rank=kv_lora_rank, qk_rope_head_dim=0))


def cached_mla_pack_spec(*, arch: str, dtype: str, qk_nope_head_dim: int, kv_lora_rank: int, qk_rope_head_dim: int,
                         e4m3_cache: bool = False) -> Spec:
    """The Spec of what a cached_mla call launches before mla_prefill."""
    return Spec.of("cached_mla", arch=arch, stage="pack", dtype=dtype, e4m3_cache=e4m3_cache,
                   qk_nope_head_dim=qk_nope_head_dim, kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim)


def mla_prefill_spec(*, arch: str, dtype: str, qk_head_dim: int, v_head_dim: int, qk_rope_head_dim: int, causal: bool
                     ) -> Spec:
    """The Spec of an mla_prefill call."""
    return Spec.of("mla_prefill", arch=arch, dtype=dtype, qk_head_dim=qk_head_dim, v_head_dim=v_head_dim,
                   qk_rope_head_dim=qk_rope_head_dim, causal=causal)


def merge_attn_states_spec(*, arch: str, dtype: str, acc_dtype: str, v_head_dim: int) -> Spec:
    """The Spec of a merge_attn_states call."""
    return Spec.of("merge_attn_states", arch=arch, dtype=dtype, acc_dtype=acc_dtype, v_head_dim=v_head_dim)


def gather_latent_spec(*, arch: str, dtype: str, width: int) -> Spec:
    """The Spec of a gather_latent call."""
    return Spec.of("gather_latent", arch=arch, dtype=dtype, width=width)


def sparse_mla_spec(*, arch: str, kv_format: str, kv_lora_rank: int, qk_rope_head_dim: int, heads: int) -> Spec:
    """The Spec of a sparse_mla_decode or sparse_mla_prefill call."""
    return Spec.of("sparse_mla", arch=arch, dtype="bf16", kv_format=kv_format, kv_lora_rank=kv_lora_rank,
                   qk_rope_head_dim=qk_rope_head_dim, heads=bucket("sparse_mla", "heads", heads))
