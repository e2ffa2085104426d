"""DeepSeek-V4's output path and its peers, case by case; and a sweep over numbers of tokens of all variants.

Peers: DeepGEMM's fp8_einsum (a folder with `deep_gemm` in JITMLA_PEERS, or installed), and vLLM's Triton quantisation,
which cannot be carried alone: it is found where vLLM 0.20 or newer is installed (`pip install vllm`), as
`vllm.v1.attention.ops.deepseek_v4_ops.fused_inv_rope_fp8_quant` or under `vllm.models.deepseek_v4.common.ops`.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitmla

from .. import dispatch, env, pick, registry, tune
from ..registry import Choice
from ..spec import fp8_bmm_spec, inv_rope_fp8_quant_spec
from ..store import Store
from ..testing_o_proj import (
    CHAIN_DIFF,
    ProductProblem,
    QuantProblem,
    calc_diff,
    check_product,
    check_quant,
    exact_chain,
    product_problem,
    quant_problem,
)
from .cases import GROUPED, O_PROJ, O_PROJ_HOST, SWEEP, OProjCase
from .report import case_name, rounded, sweep_lines
from .timing import Timing, gpu_times, host_us

OURS, DEEPGEMM, VLLM, BOTH = "jitmla", "deepgemm", "vllm", "vllm + deepgemm"
NOTES = {DEEPGEMM: "fp8_einsum, recipe (1, 128, 128), out given", VLLM: "Triton; allocates its own outputs",
         BOTH: "one after the other"}
VLLM_MODULES = ("vllm.v1.attention.ops.deepseek_v4_ops", "vllm.models.deepseek_v4.common.ops")
CHECKED = 1 << 27  # elements of o up to which results are checked against float64 here; the tests check all


@functools.cache
def _deepgemm() -> Any:
    folder = env.PEERS.get()
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("deep_gemm")


@functools.cache
def _vllm() -> Any:
    for name in VLLM_MODULES[:-1]:
        try:
            return importlib.import_module(name).fused_inv_rope_fp8_quant
        except (ImportError, AttributeError):
            continue
    return importlib.import_module(VLLM_MODULES[-1]).fused_inv_rope_fp8_quant


def available() -> tuple[dict[str, str], dict[str, str]]:
    """(peers that are here, with a note; the others, with the reason why not)"""
    found, absent = {}, {}
    for name, find in ((DEEPGEMM, _deepgemm), (VLLM, _vllm)):
        try:
            find()
            found[name] = NOTES[name]
        except Exception as e:  # whatever a peer raises on import is why it is not measured
            absent[name] = f"import: {type(e).__name__}: {e}"
    if len(found) == 2:
        found[BOTH] = NOTES[BOTH]
    return found, absent


class Setting:
    """The tensors of a case, and the calls that can serve it."""

    def __init__(self, case: OProjCase) -> None:
        self.case = case
        self.quant: QuantProblem = quant_problem(case.tokens, heads=case.heads, groups=case.groups, device="cuda")
        self.weights = product_problem(1, groups=case.groups, columns=case.rows, k=case.columns, device="cuda")
        self.options = {"n_groups": case.groups, "scale_mode": case.scale_mode, "neox": case.neox}
        self.o_fp8, self.o_scale = jitmla.inv_rope_fp8_quant(*self.quant.args, **self.options)

    @property
    def factors(self) -> ProductProblem:
        return ProductProblem(self.o_fp8, self.o_scale, self.weights.b, self.weights.b_scale)

    def out(self) -> Tensor:
        c = self.case
        return torch.empty(c.tokens, c.groups, c.rows, dtype=torch.bfloat16, device="cuda")

    def calls(self, peers: Sequence[str]) -> dict[str, Callable[[], Any]]:
        """Ours and those of the peers; each returns what `verify` looks at."""
        c, w = self.case, self.weights
        z = self.out()
        groups = (c.groups, c.heads // c.groups)
        if c.part == "quantise":
            calls: dict[str, Callable[[], Any]] = {OURS: lambda: jitmla.inv_rope_fp8_quant(
                *self.quant.args, **self.options, o_fp8=self.o_fp8, o_scale=self.o_scale)}
            if VLLM in peers and not c.neox and c.scale_mode == "pow2_f32":
                calls[VLLM] = lambda: _turned(*_vllm()(*self.quant.args, *groups))
            return calls
        y = self.out()
        if c.part == "product":
            calls = {OURS: lambda: jitmla.fp8_bmm(*self.factors.args, out=z.transpose(0, 1))}
            if DEEPGEMM in peers:
                a = self.o_fp8.transpose(0, 1), self.o_scale.permute(2, 0, 1)[:c.tokens]
                calls[DEEPGEMM] = lambda: _einsum(a, w, y)
            return calls
        calls = {OURS: lambda: jitmla.o_a_proj(*self.quant.args, w.b, w.b_scale, out=z)}
        if BOTH in peers:
            calls[BOTH] = lambda: _einsum(_vllm()(*self.quant.args, *groups), w, y)
        return calls

    def verify(self, calls: dict[str, Callable[[], Any]]) -> None:
        """Raise AssertionError unless all of them compute the right thing."""
        for name, call in calls.items():
            try:
                result = call()
                if self.case.part == "quantise":
                    check_quant(self.quant, *result, scale_mode=self.case.scale_mode, neox=self.case.neox)
                elif self.case.part == "product":
                    check_product(self.factors, result.transpose(0, 1) if name != OURS else result)
                else:
                    exact = exact_chain(self.quant, self.weights.b, self.weights.b_scale)
                    assert calc_diff(result, exact) < CHAIN_DIFF
            except AssertionError as e:
                raise AssertionError(f"{name}, {case_name(self.case.as_dict())}: {e}") from e


def _turned(o_fp8: Tensor, o_scale: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's views as storage: [groups, tokens, columns] and [groups, blocks, padded tokens]."""
    tokens, groups, blocks = o_scale.shape
    stride = o_scale.stride(2)
    return o_fp8.transpose(0, 1), o_scale.as_strided((groups, blocks, stride), (blocks * stride, stride, 1))


def _einsum(a: tuple[Tensor, Tensor], w: ProductProblem, out: Tensor) -> Tensor:
    _deepgemm().fp8_einsum("bhr,hdr->bhd", a, (w.b, w.b_scale), out, recipe=(1, 128, 128))
    return out


def specs_of(case: OProjCase) -> dict[str, Any]:
    """op -> the Spec of its part in the case."""
    arch = dispatch.arch_of(torch.device("cuda", torch.cuda.current_device()))
    quant = inv_rope_fp8_quant_spec(arch=arch, dtype="bf16", positions="i64", nope_dim=448, rope_dim=64, group_size=128,
                                    scale_mode=case.scale_mode, neox=case.neox)
    found = {"inv_rope_fp8_quant": quant, "fp8_bmm": fp8_bmm_spec(arch=arch)}
    return {op: spec for op, spec in found.items()
            if case.part == "chain" or (op == "fp8_bmm") == (case.part == "product")}


def sizes_of(op: str, case: OProjCase) -> dict[str, int]:
    """What the rule of the op looks at."""
    if op == "inv_rope_fp8_quant":
        return {"tokens": case.tokens, "heads": case.heads, "heads_per_group": case.heads // case.groups}
    sms = dispatch.sm_count(torch.device("cuda", torch.cuda.current_device()))
    return {"groups": case.groups, "tokens": case.tokens, "columns": case.rows, "k": case.columns, "sms": sms}


def picked(case: OProjCase) -> list[Choice]:
    """What the host picks for the case."""
    return [registry.choose(spec, "auto", sizes_of(op, case)) for op, spec in specs_of(case).items()]


def rates(case: OProjCase, timing: Timing) -> dict[str, Any]:
    return {"us": timing.us, "tflops": case.flops() / timing.us / 1e6, "gbps": case.bytes() / timing.us / 1e3,
            "kernels": timing.kernels, "samples": timing.samples}


def rows(peers: Sequence[str], cases: Sequence[OProjCase] = tuple(O_PROJ), iters: int = 20) -> Iterator[dict[str, Any]]:
    """One result per case. ratio: time of the better peer over ours, so above 1 we are faster."""
    for case in cases:
        setting = Setting(case)
        calls = setting.calls(peers)
        times = gpu_times(calls, iters=iters if case.tokens < 4096 else max(6, iters // 2))
        if case.tokens * case.heads * 512 <= CHECKED:
            setting.verify(calls)
        choices = picked(case)
        entry = Store().find(choices[0].key)
        others = [t.us for name, t in times.items() if name != OURS]
        yield {"case": case.as_dict(), "kernel": " + ".join(c.key.name for c in choices),
               "toolchain": dict(entry.key.toolchain or ()) if entry else {}, "refused": {},
               "times": {name: rates(case, timing) for name, timing in times.items()},
               "ratio": min(others) / times[OURS].us if others else None}


def host() -> list[dict[str, Any]]:
    """Host time of one eager call, outputs given."""
    found = []
    for case in O_PROJ_HOST:
        call = Setting(case).calls([])[OURS]
        with torch.inference_mode():
            found.append({"case": case.as_dict(), "us": host_us({OURS: call})})
    return found


def sweep(result: dict[str, Any], json_file: Path | None, tokens: Sequence[int] = tuple(SWEEP)) -> dict[str, Any]:
    """Time every variant at every number of tokens, and show what is picked beside the best. Whatever is compared is in
    one profile, in turns."""
    result |= {"op": "o_proj sweep", "rows": []}
    for part, groups, heads in [("quantise", 8, 128), *(("product", g, h) for g, h in GROUPED)]:
        for some in ([m for m in tokens if m < 512], [m for m in tokens if m >= 512]):
            cases = [OProjCase(part, m, groups, heads) for m in some]
            calls = {(case, name): call for case in cases for name, call in variants(case).items()}
            timings = gpu_times({str(i): call for i, call in enumerate(calls.values())}, iters=6)
            us = dict(zip(calls, (t.us for t in timings.values()), strict=True))
            for case in cases:
                times = {name: t for (c, name), t in us.items() if c is case}
                mine = picked(case)[0].name
                result["rows"].append({"case": case.as_dict(), "us": times, "picked": mine,
                                       "loss": times[mine] / min(times.values()) - 1})
    if json_file:
        json_file.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    for line in sweep_lines(result):
        print(line)
    return result


def variants(case: OProjCase) -> dict[str, Callable[[], Any]]:
    """variant -> a call of the case that runs it."""
    setting, device = Setting(case), torch.device("cuda", torch.cuda.current_device())
    ((op, spec),) = specs_of(case).items()
    sizes = sizes_of(op, case)
    z, calls = setting.out().transpose(0, 1), {}
    for name in pick.fitting(op, [c.name for c in registry.choices(spec)], sizes):
        if m_waste(name, case) > 4:
            continue
        tune.use_tunings(tune.naming(spec, name))
        plan = dispatch.plan_for(spec, "auto", device, **sizes)
        if op == "fp8_bmm":
            ctas = pick.fp8_bmm_ctas(name, case.groups, case.tokens, case.rows, sizes["sms"])
            calls[name] = functools.partial(plan, *setting.factors.args, z, ctas, 0)
        else:
            calls[name] = functools.partial(plan, *setting.quant.args, setting.o_fp8, setting.o_scale)
    tune.use_tunings(None)
    return calls


def m_waste(variant: str, case: OProjCase) -> float:
    """Token tiles of a variant for few tokens: it reads the weights for each, and many are a waste."""
    return case.tokens / pick.BMM[variant].tokens if variant in pick.BMM and pick.BMM[variant].tokens < 128 else 0
