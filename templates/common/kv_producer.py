"""What fills the ring of KV slots of a decode kernel (mla_ring.py) with the blocks of a CTA, request after request.

    TMA      pages of 16, 32, 64 or 128 tokens: one warp, a box for each page and slot
    gather   page size 0, which stands for any and is known at launch (single rows, odd sizes, a page per request): the
             four warps of a warpgroup, cp.async of 16 bytes to where the TMA would put them

Elements of 16 or 8 bits: a row of a tile is 128 or 64 bytes.

Gather: with n = 8 or 4 columns of 16 bytes in a row of a tile, thread (w, lane) has the column lane % n and of every
128 / n tokens of a block the one number (32 w + lane) / n. The page numbers of the next block are on their way while
this one is issued. Tokens behind the end of a request are zeros (cp.async that reads nothing), so nobody has to clear
them. What cp.async writes, wgmma sees behind a `fence_view_async_shared` of whoever waited for full[slot], see
`wait_slot`.

The ring's barriers: `arrivals` at full[slot]; whoever reads a slot arrives at empty[slot].
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from common.mla_ring import grouped_pages, page_of_box, ring_box, ring_boxes
from common.mla_split import piece_of
from common.sm90 import EVICT_FIRST, EVICT_NORMAL, copy_async16


class KvProducer:
    """What a kernel with such a ring derives from. It has load_q(c, request), which loads the queries of a request."""

    def __init__(self, dtype, latent, rope, page_size, slot_tiles, slots):
        """Blocks of (latent + rope) / 64 tiles of 64 x 64, slot_tiles of them in a slot, `slots` in the ring."""
        assert page_size in (0, 16, 32, 64, 128) and (latent + rope) // 64 % slot_tiles == 0
        self.dtype, self.page_size, self.slot_tiles, self.slots = dtype, page_size, slot_tiles, slots
        self.row_bytes = 64 * dtype.width // 8  # of a tile
        self.tiles = (latent + rope) // 64
        self.per_block = self.tiles // slot_tiles  # slots
        self.slot_bytes = 64 * self.row_bytes * slot_tiles
        self.gather = page_size == 0
        self.warps, self.arrivals = (4, 128) if self.gather else (1, 1)
        self.boxes = 1 if self.gather else 64 // min(page_size, 64)  # of a slot: pages of a block
        # measured: evict-first is better up to about 300 MB in a batch, normal beyond, unless several CTAs read a block
        self.first_blocks = 128 * 4096 * 576 // (self.row_bytes * (latent + rope))

    # -------------------------------------------------------------------------------------------- host
    @cute.jit
    def kv_source(self, kv: cute.Tensor):
        """(TMA atom or None, what the kernel gets of the cache)."""
        if const_expr(self.gather):
            return None, kv
        return cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            grouped_pages(kv, self.page_size, self.tiles),
            ring_box(self.dtype, self.slot_tiles, self.boxes),
            (8, 8 // self.boxes, 64, self.slot_tiles),
        )

    # ------------------------------------------------------------------------------------------ device
    @cute.jit
    def kv_views(self, tma, mK: cute.Tensor, sK: cute.Tensor):
        """(shared, global) views of the boxes: (box, box of the slot, slot), (box, part of the page, slot of the block,
        page)."""
        if const_expr(self.gather):
            return None, None
        boxes = cute.make_tensor(sK.iterator, ring_boxes(self.slot_tiles, self.boxes, self.slots))
        tiles = cute.local_tile(mK, (8, 8 // self.boxes, 64, self.slot_tiles), (0, None, 0, None, None))
        return cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(boxes, 0, 4), cute.group_modes(tiles, 0, 4)
        )

    @cute.jit
    def wait_slot(self, full, phase):
        """Wait until a slot can be read by wgmma, here and behind a barrier after this."""
        cute.arch.mbarrier_wait(full, phase)
        if const_expr(self.gather):
            cute.arch.fence_view_async_shared()

    @cute.jit
    def next_slot(self, slot, phase):
        """The next slot, and the phase to wait for."""
        slot = slot + 1
        phase = phase ^ 1 if slot == self.slots else phase
        slot = Int32(0) if slot == self.slots else slot
        return slot, phase

    @cute.jit
    def fill(self, c, mK: cute.Tensor, table: cute.Tensor, seqlens: cute.Tensor, w, pages: Int32, several):
        """All blocks of this CTA, by the whole warp w of those that fill the ring. Warp 0 loads the queries too, of
        later requests once q_free says that their memory is free.

        c: sI (of mla_split), full, empty, q_free, lane, and for TMA tma_k, tKs, tKg, for gather sK. pages: of the
        cache. several: other CTAs read the same blocks.
        """
        if const_expr(self.gather):
            self.gather_rows(c, mK, table, seqlens, w, several)
        else:
            self.fetch_boxes(c, table, seqlens, pages, several)

    @cute.jit
    def policy(self, c, several):
        """The L2 hint of all loads."""
        return Int64(EVICT_FIRST) if several or c.sI[4] <= self.first_blocks else Int64(EVICT_NORMAL)

    @cute.jit
    def fetch_boxes(self, c, table, seqlens, pages, several):
        lane, sI, page_size = c.lane, c.sI, self.page_size
        slot = Int32(0)
        phase = Int32(1)
        phase_q = Int32(0)
        policy = self.policy(c, several)
        for req in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            seqlen, b0, b1, _ = piece_of(seqlens, sI, req)
            last = (seqlen + (page_size - 1)) // page_size - 1
            page = page_of_box(table, req, b0, last, lane, pages, page_size)
            if req == sI[0]:
                self.load_q(c, req)
            for j in cutlass.range(b0, b1, unroll=1):
                following = page_of_box(table, req, cutlass.min(j + 1, b1 - 1), last, lane, pages, page_size)
                at = [page]
                if const_expr(self.boxes > 1):
                    at = [cute.arch.shuffle_sync(page, offset=u) for u in range(self.boxes)]
                part_of_page = j % (page_size // 64) if const_expr(page_size > 64) else 0
                for i in cutlass.range_constexpr(self.per_block):
                    full = c.full + slot
                    cute.arch.mbarrier_wait(c.empty + slot, phase)
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full, self.slot_bytes)
                    for u in cutlass.range_constexpr(self.boxes):
                        cute.copy(
                            c.tma_k,
                            c.tKg[None, part_of_page, i, at[u]],
                            c.tKs[None, u, slot],
                            tma_bar_ptr=full,
                            cache_policy=policy,
                        )
                    slot, phase = self.next_slot(slot, phase)
                page = following
                if j == b0 and req != sI[0]:
                    cute.arch.mbarrier_wait(c.q_free, phase_q)
                    phase_q = phase_q ^ 1
                    self.load_q(c, req)

    @cute.jit
    def page_numbers(self, rPage, table, req, rEntry, token, seqlen):
        """The pages of this thread's tokens of a block, the first of which is `token`; -1 behind the end."""
        for p in cutlass.range_constexpr(cute.size(rPage)):
            rPage[p] = Int32(-1)
            if token + 64 // cute.size(rPage) * p < seqlen:
                rPage[p] = table[req, rEntry[p]]

    @cute.jit
    def gather_rows(self, c, kv, table, seqlens, w, several):
        """Loops are rolled up and a division is made once a request: all of this code is fetched from memory before the
        first row is."""
        policy = self.policy(c, several)
        lane, sI, page_size, row_bytes = c.lane, c.sI, kv.shape[1], self.row_bytes
        columns = row_bytes // 16
        passes = columns // 2  # of so many tokens:
        apart = 64 // passes
        row, chunk = (w * 32 + lane) // columns, lane % columns
        group_bytes = 8 * row_bytes * self.slot_tiles
        swizzled = chunk ^ (row % 8 * columns // 8)
        to = c.sK.iterator.toint() + (row // 8) * group_bytes + (row % 8) * row_bytes + swizzled * 16
        base = kv.iterator.toint() + chunk.to(Int64) * 16
        page_stride, token_stride = kv.stride[0] * (row_bytes // 64), kv.stride[1] * (row_bytes // 64)
        pass_pages, pass_tokens = apart // page_size, apart % page_size
        block_pages, block_tokens = 64 // page_size, 64 % page_size
        rPage = cute.make_rmem_tensor((passes,), Int32)
        rEntry = cute.make_rmem_tensor((passes,), Int32)  # of the block table, for each of this thread's tokens
        rToken = cute.make_rmem_tensor((passes,), Int32)  # of that page
        rAt = cute.make_rmem_tensor((passes,), Int64)
        rSize = cute.make_rmem_tensor((passes,), Int32)
        slot = Int32(0)
        phase = Int32(1)
        phase_q = Int32(0)
        for req in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            seqlen, b0, b1, _ = piece_of(seqlens, sI, req)
            token = b0 * 64 + row
            entry = token // page_size
            within = token - entry * page_size
            for p in cutlass.range_constexpr(passes):
                rEntry[p], rToken[p] = entry, within
                entry, within = self.further(entry, within, pass_pages, pass_tokens, page_size)
            self.page_numbers(rPage, table, req, rEntry, token, seqlen)
            if w == 0 and req == sI[0]:
                self.load_q(c, req)
            for j in cutlass.range(b0, b1, unroll=1):
                for p in cutlass.range_constexpr(passes):
                    rSize[p] = Int32(16) if rPage[p] >= 0 else Int32(0)
                    page = cutlass.max(rPage[p], 0).to(Int64)
                    rAt[p] = base + page * page_stride + rToken[p].to(Int64) * token_stride
                    rEntry[p], rToken[p] = self.further(rEntry[p], rToken[p], block_pages, block_tokens, page_size)
                if j + 1 < b1:
                    self.page_numbers(rPage, table, req, rEntry, j * 64 + 64 + row, seqlen)
                for _ in cutlass.range(self.per_block, unroll=1):
                    cute.arch.mbarrier_wait(c.empty + slot, phase)
                    at_slot = to + slot * self.slot_bytes
                    for p in cutlass.range_constexpr(passes):
                        for x in cutlass.range_constexpr(self.slot_tiles):
                            copy_async16(
                                at_slot,
                                apart // 8 * p * group_bytes + 8 * row_bytes * x,
                                rAt[p],
                                x * row_bytes,
                                rSize[p],
                                policy,
                            )
                        rAt[p] = rAt[p] + self.slot_tiles * row_bytes
                    cute.arch.cp_async_mbarrier_arrive_noinc(c.full + slot)
                    slot, phase = self.next_slot(slot, phase)
                if j == b0 and w == 0 and req != sI[0]:
                    cute.arch.mbarrier_wait(c.q_free, phase_q)
                    phase_q = phase_q ^ 1
                    self.load_q(c, req)

    @cute.jit
    def further(self, entry, within, pages, tokens, page_size):
        """The place pages * page_size + tokens tokens behind token `within` of an entry."""
        entry, within = entry + pages, within + tokens
        over = within >= page_size
        return entry + (Int32(1) if over else Int32(0)), within - (page_size if over else Int32(0))
