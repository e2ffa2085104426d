"""What sm90_relay and sm90_trio share: one warpgroup hands the weights of a block to two that have the values.

Each of the two has half of the 64-column tiles of the output. Both run the same code: which tiles are theirs is a
matter of addresses. A slot of the ring is free when both have read what it holds of the values.
"""

import cutlass
import cutlass.cute as cute
from cutlass import const_expr

from common.kv_producer import KvProducer

Q_BOX = 4  # tiles of a box of queries


class KvHandover(KvProducer):
    """What such a kernel derives from. tiles_of: for each warpgroup of the values its tiles of V, in their order."""

    def __init__(self, dtype, latent, rope, page_size, slot_tiles, slots, rows, tiles_of):
        super().__init__(dtype, latent, rope, page_size, slot_tiles, slots)
        self.rows, self.v_tiles = rows, latent // 64
        self.own, self.tiles_of = len(tiles_of[0]), tiles_of
        # the tile with which both have read what a slot holds of V
        self.done = [
            max((i for own in tiles_of for i in range(self.own) if own[i] // slot_tiles == g), default=0)
            for g in range(self.per_block)
        ]

    def tile_of(self, i, v):
        """(slot of a block, tile of the slot, tile of V) of the i-th tile of warpgroup 1 + v."""
        a, b = self.tiles_of[0][i], self.tiles_of[1][i]
        n = self.slot_tiles
        return tuple(x if x == y else x + (y - x) * v for x, y in ((a // n, b // n), (a % n, b % n), (a, b)))

    @cute.jit
    def slot_of(self, i, slot, phase):
        """(slot, phase) of the i-th slot of a block that starts at `slot`; per_block: the start of the next block."""
        s = slot + i
        if const_expr((isinstance(i, int) and i == self.per_block) or self.slots % self.per_block != 0):
            phase = phase ^ 1 if s >= self.slots else phase
            s = s - self.slots if s >= self.slots else s
        return s, phase

    @cute.jit
    def load_q(self, c, req):
        """The queries of a request, as kv_producer.py asks for them. c: tma_q, tQg, tQs, tma_pe, tPg, tPs, q_full."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(c.q_full, self.rows * 64 * self.tiles * 2)
        for i in cutlass.range_constexpr(self.v_tiles // Q_BOX):
            cute.copy(c.tma_q, c.tQg[None, c.row_tile, i, req], c.tQs[None, i], tma_bar_ptr=c.q_full)
        cute.copy(c.tma_pe, c.tPg[None, c.row_tile, req], c.tPs, tma_bar_ptr=c.q_full)

    @cute.jit
    def clear_tail(self, c, slot, phase, valid):
        """Clear the V rows from `valid` on: 0 * NaN."""
        sK = c.k_tiles
        for row in cutlass.range(valid + c.w, 64, 4, unroll=1):
            for i in cutlass.range_constexpr(self.v_tiles):
                s, _ = self.slot_of(i // self.slot_tiles, slot, phase)
                for e in cutlass.range_constexpr(2):
                    sK[row, c.lane * 2 + e, i % self.slot_tiles, s] = self.dtype(0.0)

    @cute.jit
    def piece_slot(self, c, b0):
        """Slot of the partial results of a piece that starts at block b0."""
        return 2 * c.part if b0 > 0 else 2 * c.part + 1

    @cute.jit
    def free_slot(self, c, s):
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(c.empty + s)

    @cute.jit
    def copy_out(self, c, v, mO, req, slot):
        """To `out` what the threads of a warpgroup have left in its tiles of a block; then frees the slots."""
        rY = cute.make_rmem_tensor((8,), self.dtype)
        a, b = (sum(tile << 4 * i for i, tile in enumerate(own)) for own in self.tiles_of)
        words = a + (b - a) * v  # 4 bits for each tile: the loop is not unrolled
        for i in cutlass.range(self.own, unroll=1):
            of_row = (words >> 4 * i) & 15
            g = of_row // self.slot_tiles
            tile = of_row - g * self.slot_tiles
            s, _ = self.slot_of(g, slot, 0)
            for k in cutlass.range_constexpr(self.rows // 16):
                row = k * 16 + c.t // 8
                cute.autovec_copy(cute.local_tile(c.k_tiles[row, None, tile, s], (8,), (c.t % 8,)), rY)
                if c.row0 + row < mO.shape[1]:
                    cute.autovec_copy(rY, cute.local_tile(mO[req, c.row0 + row, None], (8,), (of_row * 8 + c.t % 8,)))
        cute.arch.fence_view_async_shared()  # the TMA will overwrite what was read
        cute.arch.sync_warp()
        for g in cutlass.range_constexpr(self.per_block):
            self.free_slot(c, self.slot_of(g, slot, 0)[0])
