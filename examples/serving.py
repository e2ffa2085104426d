"""jitmla inside a serving engine: boot with a cache that is complete, freeze, and decode a batch that comes and goes.

    jitmla prewarm --model deepseek-v3 --tp 8 --arch sm_90a --page-size 64 --max-s-q 1 --uses slot_cache
    JITMLA_ON_MISS=load python examples/serving.py

With `load`, a kernel that is missing ends the boot with the command that stores it, and nothing is compiled here. On a
GPU the step is captured in one CUDA graph before the first request, and the graph is replayed whatever the batch has
become. Without a GPU the reference computes the same, step by step.
"""

from __future__ import annotations

import torch

import jitmla
from jitmla.arch import of_capability

LATENT, ROPE, HEADS, PAGE, BATCH, PAGES_EACH = 512, 64, 16, 64, 4, 4  # one of 8 ranks of DeepSeek-V3, tiny cache
SCALE = 0.1352


class Engine:
    """Seats for BATCH requests. A seat that is free has length 0, and its new row goes nowhere (slot -1)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.graph = device, None
        self.lengths = [0] * BATCH
        self.cache = torch.zeros(BATCH * PAGES_EACH, PAGE, LATENT + ROPE, dtype=torch.bfloat16, device=device)
        self.pages = torch.randperm(BATCH * PAGES_EACH, dtype=torch.int32, device=device).view(BATCH, PAGES_EACH)
        self.slots = torch.full((BATCH,), -1, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(BATCH, dtype=torch.int32, device=device)
        self.q = torch.zeros(BATCH, 1, HEADS, LATENT + ROPE, dtype=torch.bfloat16, device=device)
        self.row = torch.zeros(BATCH, LATENT + ROPE, dtype=torch.bfloat16, device=device)
        self.out = torch.zeros(BATCH, 1, HEADS, LATENT, dtype=torch.bfloat16, device=device)

    def boot(self) -> None:
        """Everything that takes time, or can fail, before the first request."""
        gpu = self.device.type == "cuda"
        arch = of_capability(*torch.cuda.get_device_capability(self.device)) if gpu else "sm_90a"
        keys = jitmla.keys_for("deepseek-v3", tp=8, arch=arch, page_sizes=[PAGE], max_s_q=1, uses=["slot_cache"])
        stored = sum(jitmla.explain(key.spec)["cached"] for key in keys)
        print(f"{stored} of {len(keys)} kernels for {arch} are in the cache")
        if not gpu:
            return
        jitmla.warm(keys)
        jitmla.freeze()
        self.step()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def step(self) -> None:
        """What one layer does for the new token of each request: write its row, then attend to all of them."""
        jitmla.append_latent(self.row[:, :LATENT], self.row[:, LATENT:], self.cache, self.slots)
        jitmla.mla_decode(self.q, self.cache, self.pages, self.seq_lens, kv_lora_rank=LATENT, sm_scale=SCALE,
                          out=self.out)

    def decode(self, queries: dict[int, torch.Tensor], rows: dict[int, torch.Tensor]) -> torch.Tensor:
        """One token for each seat in `queries`; the others are free from now on. Returns out [BATCH, 1, heads, 512]."""
        slots = [-1] * BATCH
        for seat in range(BATCH):
            if seat not in queries:
                self.lengths[seat] = 0
                continue
            at = self.lengths[seat]
            slots[seat] = int(self.pages[seat, at // PAGE]) * PAGE + at % PAGE  # an engine keeps its pages on the host
            self.lengths[seat] += 1
            self.q[seat, 0], self.row[seat] = queries[seat], rows[seat]
        self.slots.copy_(torch.tensor(slots))
        self.seq_lens.copy_(torch.tensor(self.lengths))
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        return self.out


def attention(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What a request should get: plain attention over its own rows."""
    weights = torch.softmax(SCALE * q.float() @ rows.float().T, -1)
    return weights @ rows[:, :LATENT].float()


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(device)
    engine.boot()
    history: dict[int, list[torch.Tensor]] = {}
    for step, seats in enumerate([[0], [0, 2], [0, 2, 3], [2, 3], *[[1, 2, 3]] * 70, [1], []]):
        history = {seat: history.get(seat, []) for seat in seats}
        queries = {seat: torch.randn(HEADS, LATENT + ROPE, device=device).bfloat16() for seat in seats}
        rows = {seat: torch.randn(LATENT + ROPE, device=device).bfloat16() for seat in seats}
        out = engine.decode(queries, rows)
        for seat in seats:
            history[seat].append(rows[seat])
            expected = attention(queries[seat], torch.stack(history[seat]))
            torch.testing.assert_close(out[seat, 0].float(), expected, rtol=2e-2, atol=2e-2)
        if step < 5 or len(seats) < 2:
            print(f"step {step:2}: lengths {engine.lengths}")
    print(f"right at every step on {device.type}, events {({k: n for k, n in jitmla.stats().items() if n})}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
