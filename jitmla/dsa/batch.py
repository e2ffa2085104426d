"""The changing half: what the tokens of one forward pass are. Context tokens come first, then generation tokens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidArgument


@dataclass(frozen=True)
class Context:
    """Requests whose prompt, or a piece of it, is processed. Lengths are known on the host; not for a captured graph.

    q_lens: tokens of this pass. kv_lens: tokens in the cache behind it, these included. block_table, index_block_table:
    [requests, pages] int32 of the main and the indexer's cache.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    block_table: Tensor
    index_block_table: Tensor

    def __post_init__(self) -> None:
        if len(self.q_lens) != len(self.kv_lens) or any(
                not 0 <= q <= k for q, k in zip(self.q_lens, self.kv_lens, strict=True)):
            raise InvalidArgument(f"q_lens={self.q_lens}, kv_lens={self.kv_lens}",
                                  supported="as many, and no more new tokens than tokens", differs="they are otherwise",
                                  remedy="kv_lens[i] counts the q_lens[i] new tokens as well")

    @property
    def tokens(self) -> int:
        return sum(self.q_lens)

    @functools.cached_property
    def request_of(self) -> Tensor:
        """[tokens] int32: the request of each token."""
        flat = [r for r, n in enumerate(self.q_lens) for _ in range(n)]
        return torch.tensor(flat, dtype=torch.int32).to(self.block_table.device)


@dataclass(frozen=True)
class Generation:
    """Requests of next_n new tokens each (1 + drafts). All tensors may be the static buffers of a captured graph.

    seq_lens: [requests] int32, tokens in the cache, the new ones included (0 in a padded entry). max_context_len: an
    upper bound of them for all replays. block_table, index_block_table: [requests, pages] int32.
    """

    seq_lens: Tensor
    block_table: Tensor
    index_block_table: Tensor
    max_context_len: int
    next_n: int = 1

    @property
    def tokens(self) -> int:
        return self.seq_lens.shape[0] * self.next_n

    @functools.cached_property
    def request_of(self) -> Tensor:
        """[tokens] int32: the request of each token."""
        requests = torch.arange(self.seq_lens.shape[0], dtype=torch.int32, device=self.seq_lens.device)
        return requests.repeat_interleave(self.next_n, output_size=self.tokens)

    def row_lens(self) -> Tensor:
        """[tokens] int32: how far each token sees."""
        draft = torch.arange(1 - self.next_n, 1, dtype=torch.int32, device=self.seq_lens.device)
        return (self.seq_lens[:, None] + draft).clamp_min_(0).flatten()


@dataclass
class Batch:
    """One forward pass. slot_mapping, index_slot_mapping: [tokens] int64, where each token goes in the two caches
    (negative: nowhere). topk: [tokens, index_topk] int32, request-local positions that the last layer with an indexer
    selected; made on first use unless it is given (a captured graph needs one that stays)."""

    slot_mapping: Tensor
    index_slot_mapping: Tensor
    context: Context | None = None
    generation: Generation | None = None
    topk: Tensor | None = None

    def __post_init__(self) -> None:
        if self.slot_mapping.shape != (self.tokens,) or self.index_slot_mapping.shape != (self.tokens,):
            raise InvalidArgument(f"slots of shape {list(self.slot_mapping.shape)}", supported=f"[{self.tokens}]",
                                  differs="the context and generation have other numbers of tokens",
                                  remedy="one slot for each token of context and generation, padding excluded")
        if self.generation is not None:
            _ = self.generation.request_of  # made now: not while a graph is captured

    @property
    def context_tokens(self) -> int:
        return self.context.tokens if self.context else 0

    @property
    def tokens(self) -> int:
        return self.context_tokens + (self.generation.tokens if self.generation else 0)

    def topk_of(self, k: int) -> Tensor:
        """The buffer for the selected positions of all tokens."""
        if self.topk is None:
            self.topk = torch.empty(self.tokens, k, dtype=torch.int32, device=self.slot_mapping.device)
        return self.topk[:self.tokens]


_current: Batch | None = None


@contextlib.contextmanager
def forward(batch: Batch) -> Iterator[Batch]:
    """Within it, the ops of all layers work on `batch`."""
    global _current
    before, _current = _current, batch
    try:
        yield batch
    finally:
        _current = before


def current() -> Batch:
    """The batch of the pass under way; raises InvalidArgument outside of `forward`."""
    if _current is None:
        raise InvalidArgument("jitmla::mla_dsa_attn_inplace without a batch", supported="a call inside "
                              "jitmla.dsa.forward(batch)", differs="no forward pass is under way",
                              remedy="wrap the model's call: with jitmla.dsa.forward(batch): ...")
    return _current


def plan_chunks(q_lens: tuple[int, ...], kv_lens: tuple[int, ...], max_bytes: int) -> list[tuple[range, range]]:
    """(requests, query tokens of the context) of each piece whose float32 logits fit in max_bytes: whole requests, or a
    run of one request's tokens (at least one). Results do not depend on the plan. From host lengths alone."""
    chunks: list[tuple[range, range]] = []
    first, rows, keys, start = 0, 0, 0, 0
    for r, (q, k) in enumerate(zip(q_lens, kv_lens, strict=True)):
        if rows and 4 * (rows + q) * (keys + k) > max_bytes:
            chunks.append((range(first, r), range(start, start + rows)))
            first, start, rows, keys = r, start + rows, 0, 0
        if 4 * q * k <= max_bytes:
            rows, keys = rows + q, keys + k
            continue
        step = max(max_bytes // (4 * k), 1)
        chunks += [(range(r, r + 1), range(start + i, start + min(i + step, q))) for i in range(0, q, step)]
        first, start, rows, keys = r + 1, start + q, 0, 0
    if rows:
        chunks.append((range(first, len(q_lens)), range(start, start + rows)))
    return chunks
