"""The cases of the benchmarks: shapes of models that are served, from one request to a full batch."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DecodeCase:
    """One mla_decode call. kv: tokens of each request, or with ragged=True the most one can have (uniform from 1)."""

    heads: int
    s_q: int
    batch: int
    kv: int
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    page_size: int = 64
    dtype: str = "bf16"
    kv_dtype: str = ""  # "": as q
    ragged: bool = False

    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.kv] * self.batch
        rng = random.Random(0)
        return [rng.randint(1, self.kv) for _ in range(self.batch)]

    def flops(self) -> int:
        """Without a discount for the causal limit."""
        width = 2 * self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.s_q * self.heads * sum(self.lengths()) * width

    def bytes(self) -> int:
        """The cache rows, q and out, each once."""
        rows = self.batch * self.s_q * self.heads
        width = self.kv_lora_rank + self.qk_rope_head_dim
        q, kv = (1 if dtype == "e4m3" else 2 for dtype in (self.dtype, self.kv_dtype or self.dtype))
        return kv * sum(self.lengths()) * width + rows * (q * width + 2 * self.kv_lora_rank)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# heads, s_q, batch, kv: DeepSeek-V3 on one GPU and with tp 8, Kimi K2 and tp 2
MLA_DECODE = [DecodeCase(*shape) for shape in (
    (128, 1, 1, 1024), (128, 1, 1, 8192), (128, 1, 1, 65536), (128, 1, 8, 4096), (128, 1, 32, 4096),
    (128, 1, 128, 1024), (128, 1, 128, 4096), (128, 1, 128, 8192), (128, 2, 128, 4096), (128, 2, 128, 8192),
    (64, 1, 32, 4096), (64, 1, 128, 4096),
    (16, 1, 1, 1024), (16, 1, 1, 8192), (16, 1, 1, 65536), (16, 1, 8, 4096), (16, 1, 32, 4096), (16, 1, 128, 1024),
    (16, 1, 128, 4096), (16, 1, 128, 8192),
)] + [
    DecodeCase(128, 1, 128, 8192, ragged=True),
    DecodeCase(16, 1, 128, 8192, ragged=True),
    DecodeCase(8, 2, 64, 4096),
    DecodeCase(128, 1, 128, 4096, page_size=16),
    DecodeCase(16, 1, 128, 4096, page_size=16),
    DecodeCase(128, 1, 128, 4096, dtype="fp16"),
    DecodeCase(32, 1, 32, 4096, kv_lora_rank=256, page_size=32),  # Mistral Small 4, and with tp 8
    DecodeCase(4, 1, 32, 4096, kv_lora_rank=256, page_size=32),
    DecodeCase(128, 1, 128, 4096, kv_lora_rank=256),
    DecodeCase(8, 1, 128, 8192), DecodeCase(32, 1, 128, 4096), DecodeCase(96, 1, 128, 4096),
    DecodeCase(96, 1, 8, 16384), DecodeCase(16, 4, 64, 2048), DecodeCase(128, 1, 16, 32768),
] + [DecodeCase(*shape) for shape in (  # other numbers of heads, batches and lengths
    (128, 1, 2, 8192), (128, 1, 4, 4096), (128, 1, 8, 1024), (128, 1, 16, 1024), (128, 1, 16, 4096), (128, 1, 32, 1024),
    (128, 1, 64, 2048), (96, 1, 1, 8192), (64, 1, 1, 1024), (64, 1, 1, 8192), (64, 1, 1, 65536), (64, 1, 4, 4096),
    (64, 1, 8, 4096), (64, 1, 16, 4096), (64, 1, 32, 1024), (64, 2, 32, 4096), (32, 1, 1, 8192), (32, 1, 8, 4096),
    (32, 1, 32, 4096), (8, 1, 1, 8192), (8, 1, 32, 4096),
)] + [DecodeCase(*shape, page_size=1) for shape in (  # a gather of single rows
    (128, 1, 1, 1024), (128, 1, 1, 8192), (128, 1, 8, 4096), (128, 1, 32, 4096), (128, 1, 128, 4096), (64, 1, 32, 4096),
    (64, 1, 128, 4096), (32, 1, 32, 4096), (16, 1, 1, 8192), (16, 1, 32, 4096), (16, 1, 128, 4096), (8, 1, 32, 4096),
)] + [DecodeCase(*shape, page_size=16) for shape in (
    (128, 1, 1, 8192), (128, 1, 8, 4096), (128, 1, 32, 4096), (64, 1, 32, 4096), (16, 1, 32, 4096),
)] + [
    DecodeCase(128, 1, 32, 4096, page_size=7),
    DecodeCase(32, 1, 1, 8192, kv_lora_rank=256), DecodeCase(128, 1, 8, 4096, kv_lora_rank=256),
    DecodeCase(128, 1, 32, 4096, kv_lora_rank=256), DecodeCase(32, 1, 32, 4096, kv_lora_rank=256, page_size=1),
]
# all variants of each
MLA_DECODE_SWEEP = [
    *(DecodeCase(heads, 1, batch, kv) for heads in (32, 64, 96, 128)
      for batch, kv in ((1, 1024), (1, 8192), (1, 65536), (4, 4096), (8, 4096), (16, 1024), (32, 1024), (32, 4096),
                        (128, 1024), (128, 4096))),
    *(DecodeCase(128, 1, batch, kv) for batch, kv in ((1, 2048), (1, 4096), (1, 16384), (2, 1024), (16, 4096),
                                                      (64, 2048))),
    *(DecodeCase(heads, 1, batch, kv, page_size=1) for heads in (64, 128)
      for batch, kv in ((1, 1024), (1, 8192), (8, 4096), (32, 4096), (128, 4096))),
    *(DecodeCase(128, 1, batch, kv, kv_lora_rank=256)
      for batch, kv in ((1, 1024), (1, 8192), (1, 65536), (8, 4096), (32, 4096), (128, 4096))),
]
# the same with an e4m3 cache; queries of e4m3, or of bf16
MLA_DECODE_E4M3 = [DecodeCase(*shape, dtype="e4m3", kv_dtype="e4m3") for shape in (
    (128, 1, 1, 1024), (128, 1, 1, 8192), (128, 1, 1, 65536), (128, 1, 8, 4096), (128, 1, 32, 4096),
    (128, 1, 128, 1024), (128, 1, 128, 4096), (128, 1, 128, 8192), (128, 2, 128, 4096), (64, 1, 1, 8192),
    (64, 1, 32, 4096), (64, 1, 128, 4096), (96, 1, 8, 16384), (32, 1, 1, 8192), (32, 1, 32, 4096), (32, 1, 128, 4096),
    (16, 1, 1, 1024), (16, 1, 1, 8192), (16, 1, 1, 65536), (16, 1, 8, 4096), (16, 1, 32, 4096), (16, 1, 128, 8192),
    (16, 4, 64, 2048), (8, 1, 128, 8192),
)] + [
    DecodeCase(128, 1, 128, 8192, dtype="e4m3", kv_dtype="e4m3", ragged=True),
    DecodeCase(16, 1, 128, 8192, dtype="e4m3", kv_dtype="e4m3", ragged=True),
    DecodeCase(128, 1, 128, 4096, page_size=16, dtype="e4m3", kv_dtype="e4m3"),
    DecodeCase(128, 1, 128, 4096, page_size=1, dtype="e4m3", kv_dtype="e4m3"),
    DecodeCase(16, 1, 128, 4096, page_size=1, dtype="e4m3", kv_dtype="e4m3"),
    DecodeCase(128, 1, 128, 4096, kv_lora_rank=256, dtype="e4m3", kv_dtype="e4m3"),
] + [DecodeCase(*shape, kv_dtype="e4m3") for shape in (
    (128, 1, 1, 8192), (128, 1, 8, 4096), (128, 1, 32, 4096), (128, 1, 128, 4096), (64, 1, 32, 4096),
    (64, 1, 128, 4096), (16, 1, 1, 8192), (16, 1, 32, 4096), (16, 1, 128, 8192),
)]
HOST = [DecodeCase(128, 1, 1, 1024), DecodeCase(16, 1, 1, 1024)]


@dataclass(frozen=True)
class CachedCase:
    """One cached_mla call. tokens: new ones of each sequence (1: decode); kv: its tokens in the end. told: the host
    knows that there is no prefix, and says so."""

    heads: int
    batch: int
    tokens: int
    kv: int
    qk_nope_head_dim: int = 64
    kv_lora_rank: int = 256
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    told: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Of the call."""
        return {"max_prefix": 0} if self.told else {}

    def flops(self) -> int:
        """Of the form with less of them; the attention up to each token itself."""
        rows = self.batch * self.tokens * self.heads
        seen = self.kv - (self.tokens - 1) / 2
        rank, head = self.kv_lora_rank, self.qk_nope_head_dim + self.v_head_dim
        absorbed = rows * (rank * head + seen * (2 * rank + self.qk_rope_head_dim))
        expanded = self.batch * self.kv * self.heads * rank * head + rows * seen * (head + self.qk_rope_head_dim)
        return int(2 * min(absorbed, expanded))

    def bytes(self) -> int:
        """Cache rows, weight, queries and results, each once."""
        rows, width = self.batch * self.tokens * self.heads, self.kv_lora_rank + self.qk_rope_head_dim
        head = self.qk_nope_head_dim + self.v_head_dim
        return 2 * (self.batch * (self.kv + self.tokens) * width + self.heads * head * self.kv_lora_rank
                    + rows * (head + self.qk_rope_head_dim))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# Mistral Small 4 on one GPU, decode and prefill; then DeepSeek-V3
CACHED_MLA = [CachedCase(32, 1, 1, 2048), CachedCase(32, 8, 1, 512), CachedCase(32, 32, 1, 512),
              *(CachedCase(32, 1, tokens, tokens, told=told) for tokens in (128, 512, 2048) for told in (False, True)),
              CachedCase(32, 1, 512, 4096), CachedCase(32, 8, 256, 256, told=True),
              CachedCase(128, 8, 1, 4096, 128, 512), CachedCase(16, 32, 1, 4096, 128, 512),
              *(CachedCase(128, 1, 512, 512, 128, 512, told=told) for told in (False, True)),
              CachedCase(16, 1, 2048, 2048, 128, 512, told=True)]
CACHED_HOST = CACHED_MLA[:3]


@dataclass(frozen=True)
class OProjCase:
    """A call of DeepSeek-V4's output path. part: "quantise", "product" or "chain"."""

    part: str
    tokens: int
    groups: int
    heads: int
    rows: int = 1024
    scale_mode: str = "pow2_f32"
    neox: bool = False

    @property
    def columns(self) -> int:
        """Of a group: K of the product."""
        return self.heads // self.groups * 512

    def flops(self) -> int:
        """Of the product; the quantisation has a few per value and is never limited by them."""
        return 0 if self.part == "quantise" else 2 * self.tokens * self.groups * self.rows * self.columns

    def bytes(self) -> int:
        """Each input and each result once; what passes between the two parts of the chain is not counted."""
        values = self.tokens * self.heads * 512
        scales = values // 128 * (1 if self.scale_mode == "ue8m0_i32" else 4)
        inputs, table = 2 * values, self.tokens * (64 * 4 + 8)
        weights = self.groups * self.rows * self.columns
        out = 2 * self.tokens * self.groups * self.rows
        return {"quantise": inputs + table + values + scales, "product": values + scales + weights + out,
                "chain": inputs + table + weights + out}[self.part]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


TOKENS = (1, 3, 16, 64, 128, 257, 512, 1024, 1500, 2049, 4097, 8192)
GROUPED = ((8, 128), (8, 64), (16, 128))  # groups, heads: K 8192 and 4096
O_PROJ = ([OProjCase("quantise", m, 8, 128) for m in TOKENS]
          + [OProjCase("quantise", 8192, 8, 128, scale_mode=mode) for mode in ("raw_f32", "ue8m0_i32")]
          + [OProjCase("quantise", m, 8, 128, neox=True) for m in (256, 8192)]
          + [OProjCase("product", m, g, h) for g, h in GROUPED for m in TOKENS]
          + [OProjCase("chain", m, g, h) for g, h in GROUPED for m in (1, 64, 257, 1024, 8192)])
O_PROJ_HOST = [OProjCase("quantise", 1, 8, 128), OProjCase("product", 1, 8, 128), OProjCase("chain", 1, 8, 128)]
# powers of two and the points between
SWEEP = sorted({m for e in range(15) for m in (2**e, 3 * 2**e // 2) if 1 <= m <= 16384} | {17, 33, 65, 129, 257, 1025})


@dataclass(frozen=True)
class SparseCase:
    """A call of sparse MLA. part: "decode", "prefill" (batch query tokens) or "second op" (of a DSA layer, in decode).
    rows: of the pool, or the context of each request of the second op."""

    part: str
    heads: int
    s_q: int
    batch: int
    rows: int = 262144
    topk: int = 2048
    kv_format: str = "fp8"

    def flops(self) -> int:
        """Of the attention, and of the second op's logits."""
        attention = 2 * self.batch * self.s_q * self.heads * self.topk * (2 * 512 + 64)
        return attention + (2 * 64 * 128 * self.batch * self.rows if self.part == "second op" else 0)

    def bytes(self) -> int:
        """Each attended row, q and out once; in the second op the indexer's keys and logits as well."""
        tokens = self.batch * self.s_q
        moved = tokens * (self.topk * (656 if self.kv_format == "fp8" else 1152) + 2 * self.heads * (576 + 512))
        return moved + (self.batch * self.rows * (132 + 4) if self.part == "second op" else 0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


SPARSE_MLA = tuple(
    SparseCase("decode", *shape, kv_format=fmt) for fmt in ("fp8", "bf16") for shape in (
        (128, 1, 128), (128, 2, 128), (128, 1, 32), (128, 1, 8), (128, 1, 1), (64, 1, 128), (64, 1, 8), (32, 1, 128),
        (16, 1, 128), (16, 1, 32), (16, 1, 8), (16, 1, 1), (16, 4, 64), (8, 1, 128))) + tuple(
    SparseCase("prefill", heads, 1, 4096, rows, kv_format="bf16") for heads, rows in (
        (128, 8192), (128, 32768), (64, 8192)))
DSA_LAYER = tuple(SparseCase("second op", heads, 1, 64, 32768) for heads in (16, 128))


@dataclass(frozen=True)
class IndexerCase:
    """A call around DSA's indexer, 64 heads, top-k of 2048. rows: tokens, requests, or rows of logits. columns: keys,
    length of the context, or heads of q for dsa_append."""

    op: str
    rows: int
    columns: int = 0
    next_n: int = 1

    def pairs(self) -> int:
        """Cells of the logits: with windows, causal and aligned at the end."""
        if self.op == "fp8_mqa_logits":
            return self.rows * self.columns - self.rows * (self.rows - 1) // 2
        return self.rows * self.next_n * self.columns

    def flops(self) -> int:
        """Of the products; the other kernels are never limited by theirs."""
        return 2 * 64 * 128 * self.pairs() if "logits" in self.op else 0

    def bytes(self) -> int:
        """Each input and each result once."""
        tokens = self.rows
        queries = tokens * self.next_n * 64 * 132
        return {"indexer_prologue": tokens * (64 * 128 * 3 + 3 * 128 + 2 * 4 * 64 + 4 + 8 + 256),
                "indexer_k_scatter": tokens * (2 * 132 + 8), "kv_row_pack": tokens * (576 * 2 + 656 + 8),
                "dsa_append": tokens * (self.columns * 256 + 576 * 2 + 656 + 2 * 132 + 3 * 8 + 256),
                "local_to_global": tokens * (2 * 4 * 2048 + 4), "indexer_k_gather": 2 * 132 * tokens,
                "fp8_mqa_logits": queries + 132 * self.columns + 4 * self.pairs(),
                "fp8_paged_mqa_logits": queries + 132 * tokens * self.columns + 4 * self.pairs(),
                "topk_indices": 4 * self.pairs() + 4 * 2048 * tokens}[self.op]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


INDEXER = ([IndexerCase("fp8_mqa_logits", m, n) for m, n in ((2048, 8192), (4096, 32768))]
           + [IndexerCase("fp8_paged_mqa_logits", b, n, d) for b, n, d in ((64, 8192, 1), (128, 32768, 1), (8, 2048, 1),
                                                                          (64, 8192, 2))]
           + [IndexerCase("topk_indices", b, n) for b in (1, 64) for n in (32768, 65536, 163840)]
           + [IndexerCase("topk_indices", 4096, 32768)]
           + [IndexerCase("dsa_append", tokens, heads) for heads in (16, 128) for tokens in (64, 4096)]
           + [IndexerCase(op, tokens) for op in ("indexer_prologue", "indexer_k_scatter", "kv_row_pack",
                                                 "local_to_global") for tokens in (64, 4096)]
           + [IndexerCase("indexer_k_gather", 65536)])
INDEXER_HOST = [IndexerCase("indexer_prologue", 64), IndexerCase("fp8_paged_mqa_logits", 8, 2048),
                IndexerCase("topk_indices", 1, 32768)]


@dataclass(frozen=True)
class PrefillCase:
    """One mla_prefill call. tokens: of each request, or with ragged=True the most one can have (uniform from 1)."""

    heads: int
    tokens: int
    batch: int = 1
    qk_head_dim: int = 192
    v_head_dim: int = 128
    causal: bool = True
    ragged: bool = False
    dtype: str = "bf16"

    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.tokens] * self.batch
        rng = random.Random(0)
        return [rng.randint(1, self.tokens) for _ in range(self.batch)]

    def flops(self) -> int:
        """Of the pairs that are seen."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths())
        return 2 * self.heads * pairs * (self.qk_head_dim + self.v_head_dim)

    def bytes(self) -> int:
        """q, k, v and out, each once."""
        return 2 * sum(self.lengths()) * self.heads * 2 * (self.qk_head_dim + self.v_head_dim)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


PREFILL = [PrefillCase(128, 1024), PrefillCase(128, 4096), PrefillCase(128, 16384), PrefillCase(128, 2048, 4),
           PrefillCase(16, 4096, 4), PrefillCase(16, 8192), PrefillCase(16, 8192, 32, ragged=True),
           PrefillCase(128, 1024, causal=False), PrefillCase(128, 4096, causal=False),
           PrefillCase(32, 4096, 1, 128, 128), PrefillCase(64, 4096, 1, 256, 256),  # Mistral Small 4, GLM-5
           PrefillCase(128, 4096, dtype="fp16")]
PREFILL_HOST = [PrefillCase(16, 128)]


@dataclass(frozen=True)
class PrefillPagedCase:
    """One mla_prefill_paged call of DeepSeek-V3's dimensions: `new` tokens of each request behind `prefix` others."""

    heads: int
    new: int
    prefix: int
    batch: int = 1

    def flops(self) -> int:
        """Of the pairs that are seen, in the MHA form; without the products that expand keys."""
        pairs = self.new * self.prefix + self.new * (self.new + 1) // 2
        return 2 * self.heads * self.batch * pairs * (192 + 128)

    def bytes(self) -> int:
        """The cache rows, q, out and kv_b_proj, each once."""
        rows = self.batch * (self.prefix + self.new) * 576
        return 2 * (rows + self.batch * self.new * self.heads * 320 + self.heads * 256 * 512)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


PREFILL_PAGED = [PrefillPagedCase(*shape) for shape in (
    *((128, new, 8192) for new in (16, 64, 128, 192, 256, 512, 2048)), (128, 64, 65536), (128, 256, 65536),
    (128, 2048, 65536), (128, 64, 1024), (128, 256, 1024), (128, 64, 4096, 8), (128, 192, 4096, 8), (16, 64, 8192),
    (16, 256, 8192), (16, 1024, 8192), (16, 64, 4096, 8), (16, 256, 4096, 8))]
