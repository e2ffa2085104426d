"""One captured graph, replayed over many batches."""

import torch

MOST, BATCH = 3000, 6  # tokens of a request, and requests


def over_ragged_batches(call, seq_lens, seed, rounds=1000):
    """Capture `call` with short lengths; then random ragged ones in `seq_lens` [BATCH], and each replay must be bit for
    bit as an eager call. Returns what the last replay wrote, and its lengths."""
    rng = torch.Generator(device=seq_lens.device).manual_seed(seed)
    lengths = torch.randint(0, MOST + 1, (rounds, BATCH), generator=rng, device=seq_lens.device, dtype=torch.int32)
    lengths[::7, 1::2] = 0
    lengths[::5] %= 70
    seq_lens.fill_(3)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call()
    wrong = torch.zeros((), dtype=torch.int64, device=seq_lens.device)
    for row in lengths:
        seq_lens.copy_(row)
        graph.replay()
        for a, b in zip(replayed, call(), strict=True):
            wrong += (a.view(torch.uint8) != b.view(torch.uint8)).any()
    assert int(wrong) == 0
    return replayed, tuple(lengths[-1].tolist())
