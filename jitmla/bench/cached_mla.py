"""jitmla.cached_mla beside the same steps in plain PyTorch, case by case: on the GPU alone, and as an eager call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import jitmla

from .. import dispatch, pick, registry
from ..spec import Spec, cached_mla_pack_spec, cached_mla_specs, mla_prefill_spec
from ..store import Store
from ..testing_cached import CachedProblem, cached_problem, check_cached
from .cases import CACHED_HOST, CACHED_MLA, CachedCase
from .timing import Timing, gpu_times, host_us

OURS, TORCH = "jitmla", "torch"
NOTES = {TORCH: "index_put, bmm and softmax over the slots; lengths known on the host, all alike"}
TORCH_LIMIT = 5e-2  # its logits and softmax are rounded to bf16
CALLS = 100  # of an eager burst


def problem_of(case: CachedCase) -> CachedProblem:
    sequences = [case.kv - case.tokens] * case.batch
    return cached_problem([(c, case.tokens) for c in sequences] if case.tokens > 1 else (),
                          sequences if case.tokens == 1 else (), heads=case.heads, nope=case.qk_nope_head_dim,
                          rope=case.qk_rope_head_dim, rank=case.kv_lora_rank, value=case.v_head_dim,
                          max_seq_len=-(-case.kv // 64) * 64, device="cuda")


def plain(problem: CachedProblem, case: CachedCase) -> Callable[[], Tensor]:
    """The same result by PyTorch alone."""
    p, rank = problem, case.kv_lora_rank
    batch, s, heads = case.batch, case.tokens, case.heads
    w = p.weight.view(heads, -1, rank)
    w_k, w_v = w[:, :case.qk_nope_head_dim], w[:, case.qk_nope_head_dim:].transpose(1, 2)
    slots = p.metadata["slot_idx"][:batch].long()
    cached = p.metadata["input_pos"][:batch].long()
    positions = cached[:, None] + torch.arange(s, device="cuda")
    hidden = torch.arange(case.kv, device="cuda") > positions[:, :, None]

    def call() -> Tensor:
        rows = torch.cat([p.latent, p.k_pe[:, :, 0]], -1).view(batch, s, -1)
        p.kv_cache.index_put_((slots[:, None], positions), rows)
        keys = p.kv_cache[slots, :case.kv]
        q_lat = torch.bmm(p.q_nope.reshape(-1, heads, case.qk_nope_head_dim).transpose(0, 1), w_k)
        q = torch.cat([q_lat.transpose(0, 1), p.q_pe.reshape(batch * s, heads, -1)], -1).view(batch, s * heads, -1)
        logits = torch.bmm(q, keys.transpose(1, 2)).float() * p.sm_scale
        if s > 1:
            logits = logits.masked_fill(hidden.repeat_interleave(heads, 1, output_size=s * heads), float("-inf"))
        latent = torch.bmm(logits.softmax(-1).to(q.dtype), keys[..., :rank]).view(batch * s, heads, rank)
        return torch.bmm(latent.transpose(0, 1), w_v).transpose(0, 1).reshape(*p.q_nope.shape[:3], -1)

    return call


def contenders(problem: CachedProblem, case: CachedCase, peers: bool) -> dict[str, Callable[[], Tensor]]:
    calls: dict[str, Callable[[], Tensor]] = {OURS: lambda: jitmla.cached_mla(*problem.args, **problem.kwargs,
                                                                                **case.options)}
    return calls | ({TORCH: plain(problem, case)} if peers else {})


def eager_us(calls: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Microseconds of one eager call, host and GPU together: the best mean of a burst, of several that take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            torch.cuda.synchronize()
            best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1e6)
    return best


def specs_of(case: CachedCase, arch: str) -> list[Spec]:
    """What a call launches, but for mla_decode."""
    facts = {"arch": arch, "dtype": "bf16", "qk_rope_head_dim": case.qk_rope_head_dim}
    own = facts | {"qk_nope_head_dim": case.qk_nope_head_dim, "kv_lora_rank": case.kv_lora_rank}
    absorbed = list(cached_mla_specs(**own))
    if case.tokens == 1 or pick.cached_form(heads=case.heads, kv_lora_rank=case.kv_lora_rank,
                                            sequences=case.batch, tokens=case.batch * case.tokens,
                                            prefix=not case.told)[0] == "absorbed":
        return absorbed
    expanded = [cached_mla_pack_spec(**own),
                mla_prefill_spec(**facts, qk_head_dim=case.qk_nope_head_dim + case.qk_rope_head_dim,
                                 v_head_dim=case.v_head_dim, causal=True)]
    return expanded if case.told else expanded + absorbed


def kernels_of(case: CachedCase) -> tuple[str, dict[str, Any]]:
    """Names of the Keys of a call but for mla_decode, and the toolchain that built what is in the cache."""
    specs = specs_of(case, dispatch.arch_of(torch.device("cuda", torch.cuda.current_device())))
    keys = [registry.choose(spec).key for spec in specs]
    entry = Store().find(keys[0])
    return " + ".join(key.name for key in keys), dict(entry.key.toolchain or ()) if entry else {}


def rates(case: CachedCase, timing: Timing, eager: float) -> dict[str, Any]:
    return {"us": timing.us, "eager_us": eager, "tflops": case.flops() / timing.us / 1e6,
            "gbps": case.bytes() / timing.us / 1e3, "kernels": timing.kernels, "samples": timing.samples}


def rows(peers: bool, iters: int = 20) -> Iterator[dict[str, Any]]:
    """One result per case. ratio: eager time of the peer over ours."""
    for case in CACHED_MLA:
        problem = problem_of(case)
        calls = contenders(problem, case, peers)
        with torch.inference_mode():
            for name, call in calls.items():
                check_cached(problem, call(), *([TORCH_LIMIT] if name == TORCH else []))
            times, eager = gpu_times(calls, iters=iters), eager_us(calls)
        kernel, toolchain = kernels_of(case)
        yield {"case": case.as_dict(), "kernel": kernel, "toolchain": toolchain, "refused": {},
               "times": {name: rates(case, timing, eager[name]) for name, timing in times.items()},
               "ratio": eager[TORCH] / eager[OURS] if peers else None}


def host(peers: bool) -> list[dict[str, Any]]:
    """Host time of one eager call that allocates its result."""
    found = []
    for case in CACHED_HOST:
        problem = problem_of(case)
        with torch.inference_mode():
            found.append({"case": case.as_dict(), "us": host_us(contenders(problem, case, peers), rounds=10)})
    return found
