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
