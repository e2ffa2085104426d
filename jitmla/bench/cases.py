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
        size = {"e4m3": 1}
        q, kv = size.get(self.dtype, 2), size.get(self.kv_dtype or self.dtype, 2)
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
]
HOST = [DecodeCase(128, 1, 1, 1024), DecodeCase(16, 1, 1, 1024)]
