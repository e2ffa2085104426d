"""The benchmark of cached_mla: its arithmetic, and its table. What it measures needs a GPU."""

from jitmla import registry
from jitmla.bench import report
from jitmla.bench.cached_mla import specs_of
from jitmla.bench.cases import CACHED_HOST, CACHED_MLA, CachedCase
from jitmla.models import KNOWN


def test_work_of_a_case():
    case = CachedCase(2, 3, 1, 10, 4, 8, 2, 5)
    per_row = 2 * (4 * 8 + 8 * 5 + 10 * (8 + 2 + 8))  # both projections, ten keys of width 10 and values of width 8
    assert case.flops() == 3 * 2 * per_row
    assert case.bytes() == 2 * (3 * 10 * 10 + 3 * 10 + 2 * 9 * 8 + 3 * 2 * 11)
    causal = CachedCase(1, 1, 3, 3, 4, 8, 2, 5)
    assert causal.flops() == 2 * (3 * 8 * (4 + 5) + (1 + 2 + 3) * (4 + 2 + 5)), "expanded: less than absorbed"


def test_cases_are_of_known_models_and_served():
    for case in CACHED_MLA:
        dims = KNOWN["mistral-small-4" if case.kv_lora_rank == 256 else "deepseek-v3"]
        assert (case.qk_nope_head_dim, case.v_head_dim) == (dims.qk_nope_head_dim, dims.v_head_dim)
        assert dims.num_attention_heads % case.heads == 0
        for spec in specs_of(case, "sm_90a"):
            registry.choose(spec)
    assert set(CACHED_HOST) <= set(CACHED_MLA) and len(set(CACHED_MLA)) == len(CACHED_MLA)


def test_what_a_case_launches():
    def stages(case):
        return [spec.as_dict().get("stage", spec.op) for spec in specs_of(case, "sm_90a")]

    assert stages(CachedCase(32, 8, 1, 512)) == stages(CachedCase(32, 1, 128, 128)) == ["absorb", "project"]
    assert stages(CachedCase(32, 1, 2048, 2048, told=True)) == ["pack", "mla_prefill"]
    assert stages(CachedCase(32, 1, 2048, 2048)) == ["pack", "mla_prefill", "absorb", "project"]


def test_the_table():
    case = CACHED_MLA[1]
    times = {"us": 20.0, "eager_us": 31.5, "tflops": 5.0, "gbps": 300.0, "kernels": 3, "samples": [20.0]}
    row = {"case": case.as_dict(), "kernel": "cached_mla/absorb/a + cached_mla/project/b", "toolchain": {},
           "refused": {}, "times": {"jitmla": times, "torch": {**times, "us": 60.0, "eager_us": 126.0}}, "ratio": 4.0}
    ceilings = {"copy": {"gbps": 4000.0}, "read": {"gbps": 4500.0}, "matmul": {"tflops": 800.0}}
    result = {"op": "cached_mla", "peers": {"torch": "note"}, "absent": {}, "rows": [row], "ceilings": ceilings,
              "host": [{"case": case.as_dict(), "us": {"jitmla": 30.0}}], "gpu": "NVIDIA H200", "date": "2030-01-02",
              "command": "jitmla bench cached_mla", "commit": "abc", "driver": "1", "torch": "2", "machine": "m",
              "toolchain": {}}
    (cells,) = report.cells(result)
    assert len(cells) == len(report.header(result)) and report.header(result)[:3] == ["case", "jitmla us", "eager us"]
    assert cells == ["h32 B8 T 1 kv 512, rank 256, P 64, V 128", "20.0", "31.5", "5", "300", "60.0", "126.0", "4.00",
                     "absorb/a + project/b"]
    text = report.page([result])
    assert "Attention over a slot cache" in text and "| h32 B8 T 1 kv 512" in text and "30.0 us" in text
