"""jitmla.mla_prefill_paged, which chooses its form, beside each form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import jitmla

from .. import dispatch, pick, registry
from ..spec import mla_prefill_spec
from ..store import Store
from ..testing import UNIT_ROUNDOFF, mla_decode_problem
from ..testing_prefill import exact_attention, offsets
from .cases import PREFILL_PAGED, PrefillPagedCase
from .report import case_name
from .timing import gpu_times, host_us

OURS = "jitmla"
FORMS = {"mha": "the rows gathered and expanded per head, in chunks", "absorbed": "mla_decode over the cache as it is"}
NOPE, ROPE, VALUE, RANK, PAGE = 128, 64, 128, 512, 64
CHECKED_ROWS, CHECKED_HEADS = 16, 2
BUSY = 3e13  # products of all contenders of a case, about


class Problem(NamedTuple):
    q: Tensor  # [tokens, heads, 192]
    kv_cache: Tensor  # [pages, 64, 576]
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    kv_b_proj: Tensor  # [heads * 256, 512]
    options: dict[str, Any]


def problem_of(case: PrefillPagedCase) -> Problem:
    base = mla_decode_problem([case.prefix + case.new] * case.batch, heads=1, kv_lora_rank=RANK, page_size=PAGE,
                              device="cuda")
    rng = torch.Generator(device="cuda").manual_seed(1)
    tokens, rows = case.batch * case.new, case.heads * (NOPE + VALUE)
    q = torch.randn((tokens, case.heads, NOPE + ROPE), generator=rng, device="cuda").bfloat16()
    w = (torch.randn((rows, RANK), generator=rng, device="cuda") / 4).bfloat16()
    options = dict(max_seqlen_q=case.new, max_prefix=case.prefix, v_head_dim=VALUE, sm_scale=0.2)  # gentle logits
    return Problem(q, base.kv_cache, base.block_table, base.seq_lens, offsets([case.new] * case.batch, "cuda"), w,
                   options)


def contenders(problem: Problem, forms: bool) -> dict[str, Callable[[], Tensor]]:
    out = torch.empty((*problem.q.shape[:2], VALUE), dtype=problem.q.dtype, device="cuda")

    def call(form: str) -> Callable[[], Tensor]:
        return lambda: jitmla.mla_prefill_paged(*problem[:-1], **problem.options, form=form, out=out)

    return {OURS: call("auto")} | ({form: call(form) for form in FORMS} if forms else {})


def verify(case: PrefillPagedCase, problem: Problem, calls: dict[str, Callable[[], Tensor]]) -> None:
    """Raise AssertionError unless all of them are right in the last rows of the first request, in some heads. The
    absorbed form also rounds its latent output, before the projection that lets columns of it cancel."""
    i = torch.arange(case.prefix + case.new, device="cuda")
    latent = problem.kv_cache[problem.block_table[0].long()[i // PAGE], i % PAGE].double()
    w = problem.kv_b_proj.view(case.heads, NOPE + VALUE, RANK)[:CHECKED_HEADS].double()
    expanded = torch.einsum("jr,hcr->jhc", latent[:, :RANK], w)
    k = torch.cat([expanded[..., :NOPE], latent[:, None, RANK:].expand(-1, CHECKED_HEADS, -1)], -1)
    last = slice(max(0, case.new - CHECKED_ROWS), case.new)
    q = problem.q[last, :CHECKED_HEADS]
    exact, _, spread, _ = exact_attention(q, k, expanded[..., NOPE:], 0.2, True)
    rows, *_ = exact_attention(q, k, latent[:, None, :RANK].expand(-1, CHECKED_HEADS, -1), 0.2, True)
    cancelling = torch.einsum("ihr,hvr->ihv", rows.abs(), w[:, NOPE:].abs())
    allowed = 4 * UNIT_ROUNDOFF[problem.q.dtype] * spread + 1e-3
    for name, call in calls.items():
        error = (call()[last, :CHECKED_HEADS].double() - exact).abs()
        limit = allowed if name == "mha" else allowed + 2.0**-8 * cancelling
        if not bool((error <= limit).all()):
            raise AssertionError(f"{case_name(case.as_dict())}: {name} is off by {float(error.max()):.1e}")


def sizes(case: PrefillPagedCase) -> dict[str, int]:
    """Those that the form follows from, but for the GPU."""
    return dict(heads=case.heads, requests=case.batch, new=case.new, prefix=case.prefix, kv_lora_rank=RANK,
                qk_head_dim=NOPE + ROPE, qk_nope_head_dim=NOPE, v_head_dim=VALUE)


def rows(forms: bool) -> Iterator[dict[str, Any]]:
    """One result per case. ratio: time of the better form over that of the form that was chosen."""
    arch = dispatch.arch_of(torch.device("cuda", torch.cuda.current_device()))
    key = registry.choose(mla_prefill_spec(arch=arch, dtype="bf16", qk_head_dim=NOPE + ROPE, v_head_dim=VALUE,
                                           qk_rope_head_dim=ROPE, causal=True)).key
    entry = Store().find(key)
    for case in PREFILL_PAGED:
        problem = problem_of(case)
        calls = contenders(problem, forms)
        with torch.inference_mode():
            verify(case, problem, calls)
            times = gpu_times(calls, iters=max(5, min(20, int(BUSY / case.flops() / len(calls)))))
        chosen, _ = pick.prefill_form(**sizes(case), sms=dispatch.sm_count(problem.q.device))
        yield {"case": case.as_dict(), "kernel": f"form/{chosen}",
               "toolchain": dict(entry.key.toolchain or ()) if entry else {},
               "times": {name: {"us": t.us, "tflops": case.flops() / t.us / 1e6, "gbps": case.bytes() / t.us / 1e3,
                                "kernels": t.kernels, "samples": t.samples} for name, t in times.items()},
               "ratio": min(times[form].us for form in FORMS) / times[OURS].us if forms else None}


def host(forms: bool) -> list[dict[str, Any]]:
    """Host time of one eager call."""
    case = PREFILL_PAGED[0]
    with torch.inference_mode():
        return [{"case": case.as_dict(), "us": host_us(contenders(problem_of(case), forms), rounds=10)}]
