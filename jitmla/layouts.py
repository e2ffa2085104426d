"""Memory layouts that a producer and a consumer must agree on. Each is said here, once, and imported by both.

Scales of FP8 activations, one per token and block of columns: storage [groups, blocks, scale_stride(tokens)], tokens
innermost, so that a consumer loads the scales of a tile of tokens as one piece. The stride between blocks is padded for
the TMA engine, whose strides are multiples of 16 bytes; the padding is written (with zeros) by the producer. The FP8
values themselves are never padded: [groups, tokens, columns], contiguous.
"""

from __future__ import annotations

SCALE_MODES = ("raw_f32", "pow2_f32", "ue8m0_i32")
BLOCK = 128  # columns that share a scale
_PAD = 4  # scales of 4 bytes: 16 bytes


def scale_stride(tokens: int) -> int:
    """Elements from one block's scales to those of the next one."""
    return -(-tokens // _PAD) * _PAD


def scale_shape(groups: int, columns: int, tokens: int, scale_mode: str) -> tuple[int, int, int]:
    """Shape of the storage of the scales of [groups, tokens, columns]; ue8m0_i32 packs four blocks into an int32."""
    blocks = columns // BLOCK
    return groups, blocks // 4 if scale_mode == "ue8m0_i32" else blocks, scale_stride(tokens)

# ------------------------------------------------------------------------------------- DeepSeek Sparse Attention
# A page of the indexer cache is planar: 64 rows of 128 e4m3, then 64 float32 scales. Pools have the shape [pages, 64,
# 1, 132], whose last two dimensions carry sizes only: element [page, i] is not the record of token i.

INDEX_DIM = 128  # of the indexer's queries and keys
INDEX_PAGE = 64  # tokens
INDEX_TOKEN_BYTES = INDEX_DIM + 4
LATENT, LATENT_ROPE = 512, 64  # of a row of the main cache
ROW_BYTES = {"fp8": LATENT + 16 + 2 * LATENT_ROPE, "bf16": 2 * (LATENT + LATENT_ROPE)}
_LOGITS_PAD = 256  # the logits kernels write whole blocks of keys


def logits_stride(columns: int) -> int:
    """Elements from one row of indexer logits to the next: room for the last block, 1024-byte aligned."""
    return -(-(columns + _LOGITS_PAD) // _LOGITS_PAD) * _LOGITS_PAD
