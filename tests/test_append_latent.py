"""append_latent on CPU tensors (the reference), and its argument checks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jitmla
from jitmla.errors import InvalidArgument, InvalidArgumentType

DETERMINED = settings(deadline=None, derandomize=True, database=None)
E4M3 = torch.float8_e4m3fn


def inputs(tokens=5, rank=64, rope=16, pages=3, page_size=7, dtype=torch.bfloat16, cache=None, seed=0):
    """latent, k_pe, a cache of NaN, and different slots that are all in it."""
    rng = torch.Generator().manual_seed(seed)
    kv_cache = torch.full((pages, page_size, rank + rope), 0x7F if cache == E4M3 else 0, dtype=torch.uint8)
    kv_cache = kv_cache.view(E4M3) if cache == E4M3 else torch.full(kv_cache.shape, float("nan"), dtype=dtype)
    return (torch.randn(tokens, rank, generator=rng).to(dtype), torch.randn(tokens, rope, generator=rng).to(dtype),
            kv_cache, torch.randperm(pages * page_size, generator=rng)[:tokens])


@given(tokens=st.integers(0, 21), slots=st.sampled_from([torch.int32, torch.int64]),
       dtype=st.sampled_from([torch.bfloat16, torch.float16]), page_size=st.sampled_from([1, 7, 100]),
       skipped=st.sets(st.integers(0, 20)), seed=st.integers(0, 99))
@DETERMINED
def test_rows_are_written_and_nothing_else(tokens, slots, dtype, page_size, skipped, seed):
    latent, k_pe, kv_cache, where = inputs(tokens, pages=21, page_size=page_size, dtype=dtype, seed=seed)
    rows = 21 * page_size
    for i in skipped & set(range(tokens)):
        where[i] = (-1, rows, 2**31 - 1, -(2**31), rows + 5)[i % 5]
    assert jitmla.append_latent(latent, k_pe, kv_cache, where.to(slots)) is None
    flat = kv_cache.view(rows, -1)
    written = {int(w): i for i, w in enumerate(where) if 0 <= w < rows}
    for row in range(rows):
        if row in written:
            i = written[row]
            assert torch.equal(flat[row], torch.cat([latent[i], k_pe[i]]))
        else:
            assert flat[row].isnan().all()


def test_an_e4m3_cache_is_scaled_rounded_and_saturated():
    latent, k_pe, kv_cache, slots = inputs(cache=E4M3)
    latent[0, :4] = torch.tensor([1e4, -1e4, 0.0, 0.0337])
    jitmla.append_latent(latent, k_pe, kv_cache, slots, kv_scale=torch.tensor([0.5]))
    row = kv_cache.view(21, -1)[slots[0]].float()
    assert row[:3].tolist() == [448.0, -448.0, 0.0]
    expected = latent[0, 3].float() / 0.5
    assert abs(row[3] - expected) <= expected * 2**-4
    assert torch.equal(row[64:], (k_pe[0].float() / 0.5).to(E4M3).float())
    untouched = [r for r in range(21) if r not in slots.tolist()]
    assert (kv_cache.view(torch.uint8).view(21, -1)[untouched] == 0x7F).all()


def test_a_strided_cache_and_strided_rows():
    latent, k_pe, _, slots = inputs()
    wide = torch.full((3, 9, 128), float("nan"), dtype=torch.bfloat16)
    both = torch.cat([latent, k_pe], -1)
    jitmla.append_latent(both[:, :64], both[:, 64:], wide[:, :7, :80], slots)
    for i, slot in enumerate(slots.tolist()):
        assert torch.equal(wide[slot // 7, slot % 7, :80], both[i])
    assert int((~wide.isnan()).sum()) == 5 * 80


CHANGES = [
    (dict(latent=[1]), InvalidArgumentType, "latent: a list"),
    (dict(latent=torch.zeros(5, 64)), InvalidArgumentType, "dtype is float32"),
    (dict(latent=torch.zeros(5, 60, dtype=torch.bfloat16)), InvalidArgument, "64, 128, 256"),
    (dict(k_pe=torch.zeros(5, 8, dtype=torch.bfloat16)), InvalidArgument, "16, 32, 64"),
    (dict(k_pe=torch.zeros(4, 16, dtype=torch.bfloat16)), InvalidArgument, r"\[4, 16\]"),
    (dict(k_pe=torch.zeros(5, 16, dtype=torch.float16)), InvalidArgumentType, "k_pe"),
    (dict(kv_cache=torch.zeros(3, 7, 96, dtype=torch.bfloat16)), InvalidArgument, "80"),
    (dict(kv_cache=torch.zeros(21, 80, dtype=torch.bfloat16)), InvalidArgument, "2 dimensions"),
    (dict(kv_cache=torch.zeros(3, 7, 80)), InvalidArgumentType, "kv_cache"),
    (dict(kv_cache=torch.zeros(3, 7, 160, dtype=torch.bfloat16)[..., ::2]), InvalidArgument, "last stride is 2"),
    (dict(kv_cache=torch.zeros(3, 7, 80, dtype=torch.uint8).view(E4M3)), InvalidArgument, "without kv_scale"),
    (dict(kv_scale=torch.ones(1)), InvalidArgument, "with kv_scale"),
    (dict(kv_cache=torch.zeros(3, 7, 80, dtype=torch.uint8).view(E4M3), kv_scale=0.5), InvalidArgumentType, "float"),
    (dict(kv_cache=torch.zeros(3, 7, 80, dtype=torch.uint8).view(E4M3), kv_scale=torch.ones(2)), InvalidArgument, "2"),
    (dict(slots=torch.zeros(5)), InvalidArgumentType, "slots"),
    (dict(slots=torch.zeros(6, dtype=torch.int64)), InvalidArgument, r"\[6\]"),
    (dict(slots=torch.zeros(5, dtype=torch.int64, device="meta")), InvalidArgument, "slots on meta"),
    (dict(backend="sm90"), InvalidArgument, "no such backend"),
    (dict(backend="portable"), InvalidArgument, "cpu"),
]


@pytest.mark.parametrize("change, error, words", CHANGES, ids=[str(i) for i in range(len(CHANGES))])
def test_what_is_refused(change, error, words):
    arguments = dict(zip(("latent", "k_pe", "kv_cache", "slots"), inputs(), strict=True)) | change
    options = {name: arguments.pop(name) for name in ("kv_scale", "backend") if name in arguments}
    with pytest.raises(error, match=words):
        jitmla.append_latent(*arguments.values(), **options)


def test_no_gradients():
    latent, k_pe, kv_cache, slots = inputs()
    with pytest.raises(InvalidArgument, match="gradient"):
        jitmla.append_latent(latent.requires_grad_(), k_pe, kv_cache, slots)
    with torch.no_grad():
        jitmla.append_latent(latent, k_pe, kv_cache, slots)
