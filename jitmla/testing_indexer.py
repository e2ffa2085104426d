"""What tests of the ops around DSA's indexer share, here and in an engine's own suite: problems, oracles, criteria.

The oracles compute in float64, or byte by byte, and share no code with jitmla.ops.indexer_reference. Whatever must
not be read is NaN (bytes 0x7F), and whatever must not be written holds a pattern.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import jitmla

from .testing_o_proj import cos_sin_table

FP8 = torch.float8_e4m3fn
PAGE, DIM = 64, 128
NAN_BYTE, OLD_BYTE = 0x7F, 0xA5

# amax of a row -> its power-of-two scale
GOLDEN_SCALES = {0.0: 2.0**-22, 1e-4: 2.0**-22, 1.0: 2.0**-8, 3.5: 2.0**-7, 7.0: 2.0**-6, 336.0: 1.0, 448.0: 1.0,
                 450.0: 2.0, 1000.0: 4.0}
# amax of 128 columns -> the scale in a row of 656 bytes
GOLDEN_ROW_SCALES = {0.0: 2.0**-13, 1.0: 2.0**-8, 336.0: 1.0, 448.0: 1.0, 450.0: 2.0}


def generator(seed: int, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


# ------------------------------------------------------------------------------------------------ prologue


@dataclass(frozen=True)
class PrologueProblem:
    """The arguments of one jitmla.indexer_prologue call."""

    q: Tensor
    k_raw: Tensor
    w_raw: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    positions: Tensor
    cos_sin_cache: Tensor

    @property
    def args(self) -> tuple[Tensor, ...]:
        return (self.q, self.k_raw, self.w_raw, self.ln_weight, self.ln_bias, self.positions, self.cos_sin_cache)


def prologue_problem(tokens: int, *, heads: int = 64, k_dtype: torch.dtype = torch.bfloat16,
                     w_dtype: torch.dtype = torch.float32, ln_dtype: torch.dtype = torch.float32,
                     positions: torch.dtype = torch.int64, device: torch.device | str = "cpu", seed: int = 0,
                     apart: bool = False) -> PrologueProblem:
    """A random problem with rows of all magnitudes, some of zeros. apart: k and w are columns of one wider product, and
    so is q; what is between them is NaN."""
    rng = generator(seed, device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    level = torch.exp(normal(tokens, heads, 1) * 2)
    level[torch.rand(level.shape, generator=rng, device=device) < 0.05] = 0
    q, k, w = (normal(tokens, heads, DIM) * level).bfloat16(), normal(tokens, DIM).to(k_dtype), normal(tokens, heads)
    if apart:
        wide = torch.full((tokens, heads * DIM + 64), float("nan"), dtype=torch.bfloat16, device=device)
        wide[:, 32:-32] = q.flatten(1)
        q = wide[:, 32:-32].unflatten(1, (heads, DIM))
        both = torch.full((tokens, DIM + 5 + heads), float("nan"), dtype=k_dtype, device=device)
        both[:, :DIM] = k
        k = both[:, :DIM]
        other = torch.full((tokens, heads + 3), float("nan"), dtype=w_dtype, device=device)
        other[:, 3:] = w
        w = other[:, 3:]
    where = torch.randint(0, 8192, (tokens,), generator=rng, device=device).to(positions)
    return PrologueProblem(q, k, w.to(w_dtype) if not apart else w, (normal(DIM) * 0.2 + 1).to(ln_dtype),
                           (normal(DIM) * 0.1).to(ln_dtype), where, cos_sin_table().to(device))


def exact_rows(p: PrologueProblem, interleave: bool, hadamard: bool, eps: float = 1e-6) -> Tensor:
    """[tokens, heads + 1, 128] float64: what is quantised, q and behind it k, rounded where the op says."""
    def bf16(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).double()

    k = p.k_raw.to(torch.bfloat16).double()
    k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    k = bf16((k * p.ln_weight.double() + p.ln_bias.double()).float())
    rows = torch.cat([p.q.double(), k[:, None]], 1)
    table = p.cos_sin_cache.double()[p.positions.long()]
    angle = torch.complex(table[:, :32], table[:, 32:])[:, None]
    if interleave:
        pair = torch.view_as_complex(rows[..., :64].unflatten(-1, (32, 2)).contiguous()) * angle
        new = torch.view_as_real(pair).flatten(-2)
    else:
        pair = torch.complex(rows[..., :32].contiguous(), rows[..., 32:64].contiguous()) * angle
        new = torch.cat([pair.real, pair.imag], -1)
    rows = torch.cat([bf16(new.float()), rows[..., 64:]], -1)
    if hadamard:
        i = torch.arange(DIM)
        bits = i[:, None] & i
        parity = sum((bits >> b) & 1 for b in range(7)) % 2
        matrix = (1 - 2 * parity).double().to(rows.device) * DIM**-0.5
        rows = bf16((rows @ matrix).float())
    return rows


def exact_scales(amax: Tensor, scale_mode: str, floor: float = 1e-4) -> Tensor:
    """Scales of rows with these magnitudes (float64)."""
    ratio = (amax.clamp_min(floor).float().double() / 448.0).float().double()  # a float32 tensor / 448.0 is not exact
    if scale_mode == "raw_f32":
        return ratio
    mantissa, exponent = torch.frexp(ratio)
    return torch.ldexp(torch.ones_like(ratio), exponent - (mantissa == 0.5).int())


def check_codes(codes: Tensor, rows: Tensor, scale: Tensor, allowed: float = 1e-4, far: float = 0.0) -> None:
    """Raise AssertionError unless `codes` are rows / scale as e4m3: but for `allowed` of them, which are one step off.
    far: the share of rows that may be further off, because a value that went into all of their columns was rounded
    the other way in float32."""
    ideal = (rows / scale).clamp(-448, 448).float().to(FP8)
    got, best = codes.contiguous().view(torch.int8).int(), ideal.view(torch.int8).int()
    got, best = (torch.where(x < 0, -128 - x, x) for x in (got, best))  # in the order of the values; -0 is 0
    off = (got - best).abs()
    other = (off > 1).any(-1)
    assert other.double().mean().item() <= far, f"{int(other.sum())} of {len(other)} rows, up to {int(off.max())} steps"
    off = off[~other]
    share = (off > 0).double().mean().item()
    assert share <= allowed, f"{share:.1e} of the codes are a step off"


def check_prologue(p: PrologueProblem, out: Sequence[Tensor], *, rope_interleave: bool = False,
                   scale_mode: str = "pow2_f32", hadamard: bool = False) -> None:
    """Raise AssertionError unless `out` is the prologue of the problem."""
    q_fp8, k_fp8, k_scale, weights = out
    tokens, heads, _ = p.q.shape
    assert q_fp8.shape == (tokens, heads, DIM) and k_fp8.shape == (tokens, DIM) and k_scale.shape == (tokens, 1)
    assert weights.shape == (tokens, heads)
    if not tokens:
        return
    rows = exact_rows(p, rope_interleave, hadamard)
    scale = exact_scales(rows.abs().amax(-1), scale_mode)
    # a rounding to bf16 that fell the other way in float32 may move an amax, and with it a scale
    steps = k_scale[:, 0].double() / scale[:, heads]
    got = weights.double() / (p.w_raw.double() * (heads * DIM) ** -0.5)  # the scales of q, in the weights
    near = torch.cat([(got / scale[:, :heads] - 1).abs().flatten(), (steps - 1).abs()])
    near = near[near.isfinite()]
    assert (near > 1e-5).double().mean().item() <= 1e-3, f"{int((near > 1e-5).sum())} of {near.numel()} scales are off"
    same = (got / scale[:, :heads] - 1).abs() <= 1e-5
    far = 1e-2 if hadamard else 0.0
    check_codes(q_fp8[same], rows[:, :heads][same], scale[:, :heads][same][:, None], far=far)
    same = (steps - 1).abs() <= 1e-5
    check_codes(k_fp8[same], rows[:, heads][same], scale[:, heads][same][:, None], allowed=2e-3, far=far)


# ------------------------------------------------------------------------------------------------ caches


def index_pool(pages: int, pad: int = 0, fill: int = OLD_BYTE, device: torch.device | str = "cpu") -> Tensor:
    """A pool of the indexer cache, [pages, 64, 1, 132] uint8, pages 8448 + pad bytes apart, all bytes `fill`."""
    size = PAGE * (DIM + 4)
    storage = torch.full((pages * (size + pad),), fill, dtype=torch.uint8, device=device)
    return storage.as_strided((pages, PAGE, 1, DIM + 4), (size + pad, DIM + 4, DIM + 4, 1))


def pool_bytes(pool: Tensor) -> bytearray:
    """All bytes of a pool's memory, what lies between its pages included."""
    storage = torch.empty(0, dtype=torch.uint8, device=pool.device).set_(pool.untyped_storage())
    return bytearray(storage.cpu().numpy().tobytes())


def scattered(before: bytearray, step: int, codes: Tensor, scales: Tensor, slots: Sequence[int]) -> bytearray:
    """The bytes of a pool after a scatter, one token at a time."""
    after = bytearray(before)
    rows = codes.view(torch.uint8).cpu().numpy()
    for t, slot in enumerate(slots):
        if slot >= 0:
            base = slot // PAGE * step
            at = base + slot % PAGE * DIM
            after[at:at + DIM] = rows[t].tobytes()
            at = base + PAGE * DIM + slot % PAGE * 4
            after[at:at + 4] = struct.pack("<f", float(scales.flatten()[t]))
    return after


def packed_row(latent: Tensor, rope: Tensor, row: str) -> bytes:
    """One row of the main cache, from float64."""
    def raw(x: Tensor) -> bytes:
        return x.contiguous().view(torch.uint8).numpy().tobytes()

    if row == "bf16":
        return raw(latent) + raw(rope)
    tiles = latent.double().view(4, 128)
    ratio = (tiles.abs().amax(-1).float() / 448.0).clamp_min(1e-4).double()
    mantissa, exponent = torch.frexp(ratio)
    scale = torch.ldexp(torch.ones(4, dtype=torch.float64), exponent - (mantissa == 0.5).int())
    codes = (tiles / scale[:, None]).float().to(FP8)
    return raw(codes) + struct.pack("<4f", *scale.tolist()) + raw(rope)


@dataclass(frozen=True)
class AppendProblem:
    """The arguments of one jitmla.dsa_append call. q_out is the end of the rows q_wide."""

    q_pe: Tensor
    q_wide: Tensor
    kv_c: Tensor
    k_pe: Tensor
    positions: Tensor
    cos_sin_cache: Tensor
    kv_cache: Tensor
    page_bytes: int
    slots: Tensor
    k_fp8: Tensor
    k_scale: Tensor
    index_cache: Tensor
    index_slots: Tensor

    @property
    def q_out(self) -> Tensor:
        return self.q_wide[..., 512:]

    @property
    def args(self) -> tuple[Tensor, ...]:
        return (self.q_pe, self.q_out, self.kv_c, self.k_pe, self.positions, self.cos_sin_cache, self.kv_cache,
                self.slots)

    @property
    def index(self) -> dict[str, Tensor]:
        return dict(k_fp8=self.k_fp8, k_scale=self.k_scale, index_cache=self.index_cache,
                    index_slot_mapping=self.index_slots)


def append_problem(tokens: int, heads: int, row: str, *, positions: torch.dtype = torch.int64,
                   device: torch.device | str = "cpu", seed: int = 0) -> AppendProblem:
    """A random problem, all parts columns of wider rows with NaN around them. The cosines and sines have few bits, so
    that a turned value is exact in float32 and its bf16 the same in whatever order it is computed."""
    rng = generator(seed, device)

    def columns(before: int, own: int, behind: int, *shape: int) -> Tensor:
        wide = torch.full((*shape, before + own + behind), float("nan"), dtype=torch.bfloat16, device=device)
        level = torch.exp(torch.randn(*shape, 1, generator=rng, device=device))
        wide[..., before:before + own] = torch.randn(*shape, own, generator=rng, device=device) * level
        return wide[..., before:before + own]

    def slots() -> Tensor:
        found = torch.randperm(pages * PAGE, generator=rng, device=device)[:tokens]
        found[1::5] = -1
        return found

    pages, size, pad = tokens // PAGE + 3, {"fp8": 656, "bf16": 1152}[row], 32
    step = PAGE * size + pad
    storage = torch.full((pages * step,), OLD_BYTE, dtype=torch.uint8, device=device)
    if row == "bf16":
        storage, size, step = storage.view(torch.bfloat16), size // 2, step // 2
    table = torch.randint(-16, 17, (300, 64), generator=rng, device=device).float() / 16
    where = torch.randint(0, 300, (tokens,), generator=rng, device=device).to(positions)
    codes = torch.randint(0, 256, (tokens, DIM), generator=rng, device=device).byte().view(FP8)
    return AppendProblem(
        columns(128, 64, 0, tokens, heads), columns(0, 576, 0, tokens, heads).fill_(float("nan")),
        columns(16, 512, 0, tokens), columns(8, 64, 16, tokens), where, table,
        storage.as_strided((pages, PAGE, 1, size), (step, size, size, 1)), step * storage.element_size(), slots(),
        codes, torch.rand(tokens, 1, generator=rng, device=device), index_pool(pages, 256, device=device), slots())


def exact_append(p: AppendProblem) -> tuple[Tensor, Tensor]:
    """(q turned [tokens, heads, 64], k_pe turned [tokens, 64]), bf16, from complex numbers in float64."""
    table = p.cos_sin_cache.double()[p.positions.long()]
    angle = torch.complex(table[:, :32], table[:, 32:])

    def turned(x: Tensor, by: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (32, 2)).contiguous())
        return torch.view_as_real(pairs * by).flatten(-2).float().bfloat16()

    return turned(p.q_pe, angle[:, None]), turned(p.k_pe, angle)


def check_append(p: AppendProblem, row: str, keys: bool, backend: str = "auto") -> None:
    """Call jitmla.dsa_append; raise AssertionError unless all bytes of both pools and of the queries are right."""
    pools = [pool_bytes(pool) for pool in (p.kv_cache, p.index_cache)]
    jitmla.dsa_append(*p.args, **(p.index if keys else {}), backend=backend)
    q, k = exact_append(p)
    assert torch.equal(p.q_out.contiguous().view(torch.int16), q.view(torch.int16)), "the queries"
    assert bool(p.q_wide[..., :512].isnan().all()), "columns before the queries' last ones were written"
    size = 656 if row == "fp8" else 1152
    for t, slot in enumerate(p.slots.tolist()):
        if slot >= 0:
            at = slot // PAGE * p.page_bytes + slot % PAGE * size
            pools[0][at:at + size] = packed_row(p.kv_c[t].cpu(), k[t].cpu(), row)
    if keys:
        pools[1] = scattered(pools[1], p.index_cache.stride(0), p.k_fp8, p.k_scale, p.index_slots.tolist())
    assert pool_bytes(p.kv_cache) == pools[0], "the rows"
    assert pool_bytes(p.index_cache) == pools[1], "the keys"
