"""What TensorRT-LLM checks of its cached MLA op, asked of ours: the same shapes and layouts of metadata, with tighter
bounds; on the CPU, and with DeepSeek's dimensions on a GPU.

Its bound for outputs is 5e-2, absolute and relative, against its PyTorch backend in bf16; here it is 1e-2 against
float64. The cache must hold exactly what was written.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch

from jitmla.compat import trtllm

# heads, qk_nope_head_dim, kv_lora_rank, qk_rope_head_dim, v_head_dim
SMALL, SMALLER, DEEPSEEK = (8, 64, 256, 32, 64), (4, 32, 128, 16, 32), (16, 128, 512, 64, 128)
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
devices = pytest.mark.parametrize("device", ["cpu", GPU])


def batch(dims, lengths, positions, *, pad_to=None, generate=False, max_seq_len=64, device="cpu", seed=0):
    """A batch as AutoDeploy makes it: one token of each sequence [b, 1, ..], or all one after the other [1, tokens,
    ..], each sequence in a row of pad_to places. A slot more than sequences; the cache is not initialised."""
    heads, nope, rank, rope, value = dims
    rng = torch.Generator().manual_seed(seed)
    count, pad = len(lengths), pad_to or 0
    starts = [i * pad for i in range(count)] if pad else [sum(lengths[:i]) for i in range(count)]
    tokens = count * pad if pad else sum(lengths)
    lead = (tokens, 1) if generate else (1, tokens)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=rng) * scale).bfloat16().to(device)

    cache = torch.full((count + 1, max_seq_len, rank + rope), float("nan"), dtype=torch.bfloat16, device=device)
    slots = torch.randperm(count, generator=rng).tolist()
    for slot, position in zip(slots, positions, strict=True):
        cache[slot, :position] = normal(position, rank + rope, scale=0.3)

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    counts = [0, 0, 0, 0, count, count] if generate else [count, sum(lengths), 0, 0, 0, 0]
    return SimpleNamespace(
        dims=dims, lengths=lengths, positions=positions, slots=slots, starts=starts, before=cache.clone(), args=(
            normal(*lead, heads, nope), normal(*lead, heads, rope), normal(*lead, rank, scale=0.3),
            normal(*lead, 1, rope, scale=0.3), normal(heads * (nope + value), rank, scale=rank**-0.5),
            torch.tensor(counts + [0] * 6, dtype=torch.int32), ints(lengths), ints(positions), ints(slots),
            ints([*starts, tokens]), cache))


def check(b, out):
    """Against float64, sequence by sequence and token by token; and the cache, bit by bit."""
    heads, nope, rank, _, value = b.dims
    q_nope, q_pe, latent, k_pe, weight = (x.flatten(0, 1).double() if x.dim() > 2 else x.double() for x in b.args[:5])
    cache, expected = b.args[10], b.before.clone()
    w = weight.view(heads, nope + value, rank)
    exact = torch.zeros(len(q_nope), heads, value, dtype=torch.float64, device=out.device)
    for length, position, slot, start in zip(b.lengths, b.positions, b.slots, b.starts, strict=True):
        for k in range(length):
            t, end = start + k, position + k + 1
            expected[slot, end - 1] = torch.cat([latent[t], k_pe[t, 0]]).bfloat16()
            rows = expected[slot, :end].double()
            keys = torch.einsum("jr,hpr->hjp", rows[:, :rank], w[:, :nope])
            logits = torch.einsum("hp,hjp->hj", q_nope[t], keys) + torch.einsum("hp,jp->hj", q_pe[t], rows[:, rank:])
            weights = (logits * (nope + q_pe.shape[-1]) ** -0.5).softmax(-1)
            exact[t] = torch.einsum("hj,jr,hvr->hv", weights, rows[:, :rank], w[:, nope:])
    torch.testing.assert_close(out.flatten(0, 1).double(), exact, rtol=1e-2, atol=1e-2)
    assert torch.equal(cache.view(torch.int16), expected.view(torch.int16))


def run(b):
    """With the scale and kv_lora_rank by position, as a graph pass gives them."""
    with torch.inference_mode():
        return trtllm.triton_cached_mla_with_cache(*b.args, None, b.dims[2])


def test_the_signature_is_theirs():
    """Their names in their order; `out` is that of their newer backends."""
    names = ["q_nope", "q_pe", "compressed_kv", "kpe", "kv_b_proj_weight", "batch_info_host", "seq_len", "input_pos",
             "slot_idx", "cu_seqlen", "mla_cache", "scale", "kv_lora_rank"]
    parameters = inspect.signature(trtllm.triton_cached_mla_with_cache).parameters
    assert [*parameters] == [*names, "out"]
    assert (parameters["scale"].default, parameters["kv_lora_rank"].default, parameters["out"].default) == (None, 512,
                                                                                                          None)
    op = torch.ops.jitmla.cached_mla_with_cache.default._schema
    assert [a.name for a in op.arguments] == names
    assert [a.name for a in op.arguments if a.alias_info is not None] == ["mla_cache"]


@devices
@pytest.mark.parametrize("dims", [SMALL, SMALLER, DEEPSEEK, (6, *DEEPSEEK[1:]), (12, *DEEPSEEK[1:])], ids=str)
@pytest.mark.parametrize("size, offset", [(2, 5), (16, 5), (4, 50), (3, 0)])
def test_decode(dims, size, offset, device):
    if device == "cuda" and dims[1:] != DEEPSEEK[1:]:
        pytest.skip("no kernel for it is prewarmed")
    b = batch(dims, [1] * size, [offset] * size, generate=True, device=device)
    out = run(b)
    assert out.shape == (size, 1, dims[0], dims[4])
    check(b, out)


@devices
@pytest.mark.parametrize("dims", [SMALL, SMALLER, DEEPSEEK], ids=str)
@pytest.mark.parametrize("lengths, positions, pad_to", [
    ([4, 4], [0, 0], None), ([4, 2, 5], [1, 0, 2], 6), ([2, 4, 1, 3], [10, 0, 5, 20], None), ([4], [5], 6),
    ([2, 1, 3], [0, 0, 0], 16), ([3, 0, 2], [0, 7, 4], None)])
def test_context(dims, lengths, positions, pad_to, device):
    """Equal lengths; rows padded beyond the longest sequence; cached prefixes; one sequence; mostly padding."""
    if device == "cuda" and dims != DEEPSEEK:
        pytest.skip("no kernel for it is prewarmed")
    b = batch(dims, lengths, positions, pad_to=pad_to, device=device)
    check(b, run(b))


@devices
def test_decode_continues_context(device):
    """A prompt, then its next tokens one by one, over the same cache."""
    first = batch(DEEPSEEK, [5, 9], [0, 0], device=device)
    check(first, run(first))
    for step in range(3):
        following = batch(DEEPSEEK, [1, 1], [5 + step, 9 + step], generate=True, seed=1 + step, device=device)
        args = [*following.args[:4], first.args[4], *following.args[5:8], first.args[8], following.args[9],
                first.args[10]]
        following.args, following.slots, following.before = tuple(args), first.slots, first.args[10].clone()
        check(following, run(following))
