"""Scratch memory of the kernels: partial results, and counters that every launch leaves at zero.

Eager calls share one buffer per device and stream: calls on a stream follow one another. A call that is captured in a
CUDA graph gets memory of its own, because its graph may later run beside anything: partial results from the graph's
pool, counters from a pool that was zeroed before.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEPT_BYTES = 64 << 20  # most that is kept of a buffer of bytes, per device and stream
SEMAPHORES = 1 << 20  # counters set aside for captured calls, per device: enough for thousands of them

_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
_pools: dict[int, Tensor] = {}
_bytes: dict[tuple[int, int, str], Tensor] = {}


def scratch(device: int, floats: int, counters: int) -> tuple[Tensor, Tensor]:
    """(fp32 buffer of at least `floats`, int32 counters of at least `counters`, all zero) for the current stream."""
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(floats, dtype=torch.float32, device=f"cuda:{device}"), _captured_counters(device, counters)
    stream = torch._C._cuda_getCurrentRawStream(device)
    pair = _workspaces.get((device, stream))
    if pair is None or pair[0].shape[0] < floats or pair[1].shape[0] < counters:
        _reserve(device)
        pair = _workspaces[device, stream] = (torch.empty(floats, dtype=torch.float32, device=f"cuda:{device}"),
                                              torch.zeros(counters, dtype=torch.int32, device=f"cuda:{device}"))
    return pair


def _reserve(device: int) -> None:
    """Zero the counters for later captures while nothing is being captured."""
    if device not in _pools:
        _pools[device] = torch.zeros(SEMAPHORES, dtype=torch.int32, device=f"cuda:{device}")


def _captured_counters(device: int, count: int) -> Tensor:
    pool = _pools.get(device)
    if pool is None or pool.shape[0] < count:
        # zeroed by each replay: right, but one more node in the graph
        return torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}")
    _pools[device] = pool[count:]
    return pool[:count]


def kept_bytes(device: int, stream: int, size: int, name: str) -> Tensor:
    """A uint8 buffer of at least `size` for the current stream: the same one as before for this `name` where that is
    large enough. A captured call, and one that wants more than KEPT_BYTES, gets memory of its own."""
    if size > KEPT_BYTES or torch.cuda.is_current_stream_capturing():
        return _writable_bytes(device, size)
    kept = _bytes.get((device, stream, name))
    if kept is None or kept.shape[0] < size:
        # a power of two: all that were outgrown, which callers may still hold, are together no more than this one
        kept = _bytes[device, stream, name] = _writable_bytes(device, 1 << (size - 1).bit_length())
    return kept


def _writable_bytes(device: int, size: int) -> Tensor:
    """Not an inference tensor, which torch refuses to write outside of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")
