"""A warpgroup that gathers pairs of blocks of cache rows in halves, for two math warpgroups that take turns.

Every half of a block (the left or the right half of the latent columns) has its own pair of mbarriers, so that it is
filled again as soon as the product that reads it last is done. Per pair of blocks, in the order in which the math
warpgroups are done with them and need them:

    block 0 left | block 1 right | block 0 right, rope | block 1 left, rope

The rope tile of a block goes with the half that is freed last, because the math warpgroups keep P in it once they have
the scores.

A warp has four neighbouring rows of each 16 of a block, and a lane looks up one entry of the warp's 32 of a pair:
lane 4 e + r has row 16 (e % 4) + 4 warp + r of block e / 4.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from common.sparse_rows import copy_async16, end_of_piece, load_entry, ptx, store_shared1

HALVES = ((0, 0), (1, 1), (0, 1), (1, 0))  # (block, half) in the order in which they are filled


@cute.jit
def shuffled_address(x, source):
    """A 64-bit value of another lane."""
    low, high = ptx("mov.b64 {{$w0}, {$w1}}, {$r0};", (x,), (Int32, Int32))
    low, high = cute.arch.shuffle_sync(low, offset=source), cute.arch.shuffle_sync(high, offset=source)
    return ptx("mov.b64 {$w0}, {{$r0}, {$r1}};", (low, high), (Int64,))


class HalfGather:
    """Blocks of 64 bf16 rows as latent / 64 tiles of 64 rows x 128 bytes (128-byte swizzle), one behind the other."""

    ARRIVALS = 132  # at the full barrier of a half

    def __init__(self, latent, rope, tile_bytes):
        assert rope in (0, 64) and latent == 512
        self.rope, self.rope_at, self.tile_bytes = rope, 2 * latent, tile_bytes

    @cute.jit
    def run(self, address, mList, lengths, sI, latent_at, latent_bytes: cutlass.Constexpr, rope_at,
            rope_bytes: cutlass.Constexpr, ok_at, full, empty, w, lane):  # fmt: skip
        """Gather the blocks of this CTA, two at a time, as 128 threads. A piece with an odd number of blocks has a last
        one without entries.

        latent_at, rope_at, ok_at: shared addresses of block 0 of a pair; latent_bytes, rope_bytes: to block 1 (64 for
        ok). full, empty: mbarriers 2 * block + half; empty is waited for before a half is written.
        """
        last = sI[1]
        r, chunk = lane >> 3, lane & 7
        line = (w * 4 + r) % 8
        at_row = (w * 4 + r) // 8 * 1024 + line * 128 + (chunk ^ line) * 16
        to = latent_at + at_row
        rope = rope_at + at_row
        mine = (lane >> 2) * 16 + w * 4 + (lane & 3)  # the entry of a pair that this lane looks up

        total = Int32(0)
        for token in cutlass.range(sI[0], last + 1, unroll=1):
            first_block = sI[2] if token == sI[0] else Int32(0)
            total = total + ((end_of_piece(lengths, sI, token) - first_block + 1) >> 1)
        token = sI[0]
        at = sI[2] * 64  # position of the pair in the list
        stop = Int32(0)
        list_at = Int64(0)
        if token <= last:
            stop, list_at = self.piece(mList, lengths, sI, token)

        entry = self.entry(list_at, at + mine, stop)
        base, valid = self.locate(address, entry)
        token, at, stop, list_at = self.following(mList, lengths, sI, token, at, stop, list_at, last)
        entry = self.entry(list_at, at + mine, stop)
        for number in cutlass.range(total, unroll=1):
            free = (number & 1) ^ 1
            for s in cutlass.range_constexpr(4):
                block, half = HALVES[s]
                bar = 2 * block + half
                cute.arch.mbarrier_wait(empty + bar, free)
                if const_expr(block == half):  # the half that is filled first
                    if (lane >> 4) == block:
                        store_shared1(ok_at + mine, (valid >> lane) & 1)
                for p in cutlass.range_constexpr(4):
                    source = (block * 4 + p) * 4 + r
                    row = shuffled_address(base, source) + Int64(chunk * 16)
                    size = ((valid >> source) & 1) * 16
                    for j in cutlass.range_constexpr(4):
                        tile = half * 4 + j
                        offset = block * latent_bytes + tile * self.tile_bytes + p * 2048
                        copy_async16(to, offset, row, tile * 128, size)
                    if const_expr(self.rope > 0 and block != half):
                        copy_async16(rope, block * rope_bytes + p * 2048, row, self.rope_at, size)
                cute.arch.cp_async_mbarrier_arrive_noinc(full + bar)
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(full + bar)
                if const_expr(s == 3):
                    base, valid = self.locate(address, entry)
                    token, at, stop, list_at = self.following(mList, lengths, sI, token, at, stop, list_at, last)
                    entry = self.entry(list_at, at + mine, stop)

    @cute.jit
    def piece(self, mList, lengths, sI, token):
        """(end position, address of the list) of this CTA's piece of a token."""
        stop = cutlass.min(lengths[token], end_of_piece(lengths, sI, token) * 64)
        return stop, mList[token, None].iterator.toint()

    @cute.jit
    def following(self, mList, lengths, sI, token, at, stop, list_at, last):
        """The next pair of this CTA: (token, position, end position, address of the list), with nothing behind the
        last one."""
        at = at + 128
        if at >= stop:
            token = token + 1
            at = Int32(0)
            stop = Int32(0)
            if token <= last:
                stop, list_at = self.piece(mList, lengths, sI, token)
        return token, at, stop, list_at

    @cute.jit
    def entry(self, list_at, at, stop):
        """The entry at a position, unchecked: nothing waits for it here. From `stop` on it is -1."""
        return load_entry(list_at + Int64(at) * 4, 0, Int32(1) if at < stop else Int32(0))

    @cute.jit
    def locate(self, address, entry):
        """(address of this lane's row, of row 0 where it has none; mask of the lanes that have one)."""
        found = entry >= 0 and entry < address.rows
        return address.of(entry if found else Int32(0)), cute.arch.vote_ballot_sync(found)
