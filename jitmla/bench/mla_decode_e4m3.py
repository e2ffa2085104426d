"""jitmla.mla_decode over an e4m3 cache, beside FlashMLA's e4m3 kernel and beside itself over a bf16 cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitmla

from .. import env
from ..testing import E4M3_DOTS, Problem, mla_decode_oracle, mla_decode_problem
from ..testing_features import Featured, featured
from .cases import MLA_DECODE_E4M3, DecodeCase
from .mla_decode import CHECKED, OURS, kernel_of, rates
from .peers import Peer
from .timing import gpu_times

Calls = dict[str, Callable[[], Tensor]]


def problems_of(case: DecodeCase) -> tuple[Problem, Featured]:
    """The problem before it is rounded to e4m3, and after."""
    plain = mla_decode_problem(case.lengths(), heads=case.heads, s_q=case.s_q, page_size=case.page_size, device="cuda",
                               kv_lora_rank=case.kv_lora_rank, poison=False, extra_table=0)
    return plain, featured(plain, kv="e4m3", q="e4m3" if case.dtype == "e4m3" else "plain", scales=(0.02, 0.02))


def available() -> tuple[list[Peer], dict[str, str]]:
    """As jitmla.bench.peers.available."""
    own = Peer("bf16_cache", "this package over a bf16 cache, for bf16 queries", _bf16_cache)
    folder = env.PEERS.get()
    library = next(iter(sorted(Path(folder).rglob("_flashmla_extension_C*.so"))), None) if folder else None
    if library is None:
        return [own], {"flashmla_e4m3": f"no _flashmla_extension_C in {env.PEERS.name}={folder}"}
    torch.ops.load_library(str(library))
    note = "e4m3 queries; its metadata kernel runs once and is not timed"
    return [own, Peer("flashmla_e4m3", note, _flashmla)], {}


def _bf16_cache(problems: Any) -> Callable[[], Tensor] | str:
    plain, rounded = problems
    if "q_descale" in rounded.kwargs:
        return "bf16 queries only"
    out = torch.empty(plain.out_shape, dtype=plain.dtype, device=plain.device)
    return lambda: jitmla.mla_decode(*plain.args, **plain.kwargs, out=out)


def _flashmla(problems: Any) -> Callable[[], Tensor] | str:
    plain, rounded = problems
    q, cache, table, seq_lens = rounded.args
    if "q_descale" not in rounded.kwargs:
        return "e4m3 queries only"
    if cache.shape[1] != 64 or plain.kv_lora_rank != 512:
        return "latent 512 and pages of 64 only"
    ops = importlib.import_module("torch").ops._flashmla_extension_C
    scales = [rounded.kwargs[name] for name in ("q_descale", "kv_descale")]
    table, cache = table.contiguous(), cache.unsqueeze(2)
    metadata, splits = ops.get_mla_decoding_metadata_dense_fp8(seq_lens, q.shape[1] * q.shape[2], 1)
    return lambda: ops.fwd_kvcache_mla_fp8(q, cache, plain.kv_lora_rank, seq_lens, table, plain.sm_scale, True,
                                           metadata, splits, *scales)[0]


def rows(peers: Sequence[Peer], cases: Sequence[DecodeCase] = tuple(MLA_DECODE_E4M3), iters: int = 20
         ) -> Iterator[dict[str, Any]]:
    """As jitmla.bench.mla_decode.rows. Ours is compared with float64; FlashMLA rounds its weights to e4m3, and the bf16
    cache holds other numbers, so these two are not."""
    for case in cases:
        plain, rounded = problems = problems_of(case)
        out = torch.empty(plain.out_shape, dtype=plain.dtype, device="cuda")
        calls: Calls = {OURS: lambda f=rounded, out=out: jitmla.mla_decode(*f.args, **f.kwargs, out=out)}
        refused = {}
        for peer in peers:
            call = peer.prepare(problems)  # type: ignore[arg-type]
            if isinstance(call, str):
                refused[peer.name] = call
            else:
                calls[peer.name] = call
        last = len(plain.lengths) - 1
        oracle = mla_decode_oracle(rounded.exact, sorted({i * last // (CHECKED - 1) for i in range(CHECKED)}))
        oracle.check(calls[OURS](), dots=E4M3_DOTS)
        times = gpu_times(calls, iters=iters)
        kernel, toolchain = kernel_of(case)
        others = [t.us for name, t in times.items() if name != OURS]
        yield {"case": case.as_dict(), "kernel": kernel, "toolchain": toolchain, "refused": refused,
               "times": {name: rates(case, timing) for name, timing in times.items()},
               "ratio": min(others) / times[OURS].us if others else None}


def host(peers: Sequence[Peer]) -> list[dict[str, Any]]:
    """Not measured: the path is that of the other calls with features."""
    return []
