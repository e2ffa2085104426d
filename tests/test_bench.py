"""The benchmark's own arithmetic and reports. What it measures needs a GPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jitmla import registry
from jitmla.bench import __main__, mla_decode, peers, report, timing
from jitmla.bench.cases import HOST, MLA_DECODE, PREFILL, PREFILL_HOST, DecodeCase, OProjCase, PrefillCase
from jitmla.spec import mla_decode_spec, mla_prefill_spec

from .keysets import prefill_product, product

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------- timing


def test_calls_are_what_lies_between_marks():
    events = [("flush", 0, 5), ("mark", 5, 6), ("decode", 6, 10), ("combine", 9, 12), ("mark", 12, 13),
              ("flush", 13, 20), ("mark", 20, 21), ("decode", 22, 29), ("combine", 28, 30), ("mark", 30, 31),
              ("tail", 40, 50)]
    found = timing.groups(events, {"mark"})
    assert found == [[(6, 10), (9, 12)], [(22, 29), (28, 30)]]
    result = timing.summary(found)
    assert result == timing.Timing(7, (6, 8), 2)  # first start to last end, overlap and gaps included


class FakeGpu:
    """Profiles what the contenders would have done: contender i takes 10 * (i + 1) us in the first round, 1 us more in
    each later one."""

    def __init__(self, lost=0):
        self.order, self.lost = [], lost

    def profiled(self, run):
        self.order.clear()
        run()
        clock, events = 0.0, []
        for what in self.order:
            took = what if isinstance(what, (int, float)) else 1
            events.append((what if what in ("mark", "flush") else f"kernel {what}", clock, clock + took))
            clock += took + 0.5
        return events[:-self.lost] if self.lost and len(events) > 4 else events


def run_fake(monkeypatch, iters=4, lost=0):
    gpu = FakeGpu(lost)

    class Tensor:
        def sum(self):
            gpu.order.append("flush")

        def add_(self, _):
            gpu.order.append("mark")

    class Torch:
        int64 = int16 = None

        @staticmethod
        def zeros(*_, **__):
            return Tensor()

    monkeypatch.setattr(timing, "torch", Torch)
    monkeypatch.setattr(timing, "profiled", gpu.profiled)
    counts = {"a": 0, "b": 0}

    def contender(name, base):
        def call():
            gpu.order.append(base + counts[name])
            counts[name] += 1
        return call

    return timing.gpu_times({"a": contender("a", 10), "b": contender("b", 20)}, iters=iters, graph=False), gpu


def test_contenders_take_turns(monkeypatch):
    times, gpu = run_fake(monkeypatch)
    # two rounds of warming up come first, so the counted rounds are the third to the sixth
    assert times["a"].samples == (12, 13, 14, 15) and times["b"].samples == (22, 23, 24, 25)
    assert (times["a"].us, times["b"].us, times["a"].kernels) == (13.5, 23.5, 1)
    assert gpu.order[:8] == ["flush", "mark", 12, "mark", "flush", "mark", 22, "mark"]


def test_a_profile_that_lost_events_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="7 calls instead of 8"):
        run_fake(monkeypatch, lost=4)


# ------------------------------------------------------------------------------------------------- cases


def test_flops_and_bytes():
    case = DecodeCase(128, 2, 3, 1000)
    assert case.flops() == 2 * 2 * 128 * 3000 * (512 + 576)
    assert case.bytes() == 2 * (3000 * 576 + 3 * 2 * 128 * (576 + 512))
    assert DecodeCase(128, 1, 128, 4096).flops() == pytest.approx(146.0e9, rel=1e-3)  # FlashMLA counts the same


def test_ragged_cases_are_the_same_everywhere():
    lengths = DecodeCase(16, 1, 128, 8192, ragged=True).lengths()
    assert len(lengths) == 128 and 1 <= min(lengths) < 200 and 8000 < max(lengths) <= 8192
    assert lengths == DecodeCase(128, 1, 128, 8192, ragged=True).lengths()
    assert sum(lengths) == 489410


def test_every_case_has_a_kernel():
    cases = [*MLA_DECODE, *HOST]
    assert len(set(MLA_DECODE)) == len(MLA_DECODE) >= 20
    specs = {mla_decode_spec(arch="sm_90a", dtype=c.dtype, kv_lora_rank=c.kv_lora_rank, page_size=c.page_size,
                             qk_rope_head_dim=c.qk_rope_head_dim, s_q=c.s_q, heads=c.heads, causal=True)
             for c in cases}
    native = {mla_decode_spec(arch="sm_90a", dtype=c.dtype, kv_lora_rank=c.kv_lora_rank, page_size=c.page_size,
                              qk_rope_head_dim=c.qk_rope_head_dim, s_q=c.s_q, heads=c.heads, causal=True)
              for c in cases if c.page_size > 1}
    assert native <= set(product()) and all(registry.choose(s) for s in specs)
    assert len({report.case_name(c.as_dict()) for c in MLA_DECODE}) == len(MLA_DECODE), "names tell them apart"


def test_every_prefill_case_has_a_kernel():
    specs = {mla_prefill_spec(arch="sm_90a", dtype="bf16", qk_head_dim=c.qk_head_dim, v_head_dim=c.v_head_dim,
                              qk_rope_head_dim=64, causal=c.causal) for c in [*PREFILL, *PREFILL_HOST]}
    assert specs <= set(prefill_product())
    names = [report.case_name(c.as_dict()) for c in PREFILL]
    assert len(set(names)) == len(names) and "h128 S 4096, full" in names and "h16 S 1..8192 B32" in names
    one = PrefillCase(16, 3)
    assert (one.flops(), one.bytes()) == (2 * 16 * 6 * 320, 2 * 3 * 16 * 640)


# ------------------------------------------------------------------------------------------------- reports


def rates(us, case):
    return mla_decode.rates(case, timing.Timing(us, (us, us + 1), 2))


def result(**change):
    """A result as `jitmla bench` writes it, with made-up figures."""
    small, ragged = DecodeCase(16, 1, 1, 1024), DecodeCase(128, 2, 128, 8192, page_size=16, ragged=True)
    rows = [{"case": small.as_dict(), "kernel": "mla_decode/sm90_swap/v", "toolchain": {"cute_dsl": "4.8.1"},
             "refused": {}, "times": {"jitmla": rates(8.123456, small), "flashmla": rates(16.2, small),
                                      "flashinfer": rates(12.2, small)}, "ratio": 12.2 / 8.123456},
            {"case": ragged.as_dict(), "kernel": "mla_decode/sm90_trio/w", "toolchain": {"cute_dsl": "4.8.1"},
             "refused": {"flashmla": "pages of 64"}, "times": {"jitmla": rates(900.0, ragged),
                                                               "flashinfer": rates(800.0, ragged)}, "ratio": 0.888}]
    return {"machine": "x86_64", "gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "date": "2030-01-02",
            "commit": "abc", "command": "jitmla bench mla_decode --peers", "op": "mla_decode",
            "peers": {"flashmla": "note", "flashinfer": "note"}, "absent": {}, "toolchain": {"cute_dsl": "4.8.1"},
            "ceilings": {"copy": {"us": 1.0, "gbps": 4270.4}, "read": {"us": 1.0, "gbps": 4576.0},
                         "matmul": {"us": 1.0, "tflops": 777.7}},
            "host": [{"case": small.as_dict(), "us": {"jitmla": 9.04, "flashinfer": 20.3}}], "rows": rows, **change}


def test_a_result_file(tmp_path):
    path = tmp_path / "r.json"
    report.write(result(), path)
    text = path.read_text()
    stored = json.loads(text)
    assert stored == report.rounded(result())
    assert stored["rows"][0]["times"]["jitmla"]["us"] == 8.123 and stored["rows"][0]["ratio"] == 1.502
    assert stored["rows"][0]["times"]["jitmla"]["samples"] == [8.123, 9.123]
    lines = text.splitlines()
    assert max(map(len, lines)) < 2000 and sum(line.startswith('  {"case"') for line in lines) == 2
    assert report.read(tmp_path) == [stored]


def test_the_table():
    text = report.markdown(result())
    assert text.splitlines()[0] == "## mla_decode on NVIDIA H200, 2030-01-02"
    assert "| case | jitmla us | TFLOP/s | GB/s | roof | flashmla us | flashinfer us | ratio | kernel |" in text
    small = DecodeCase(16, 1, 1, 1024)
    share = small.bytes() / 8.123456e3 / 4576
    assert share > small.flops() / 8.123456e6 / 777.7, "few heads: memory is the limit"
    speeds = f"{small.flops() / 8.123456e6:.0f} | {small.bytes() / 8.123456e3:.0f} | {share:.0%}"
    assert f"| h16 B1 kv 1024 | 8.1 | {speeds} | 16.2 | 12.2 | 1.50 | sm90_swap/v |" in text
    assert "| h128 s_q2 B128 kv 1..8192, page 16 | 900.0 |" in text and "| - | 800.0 | 0.89 | sm90_trio/w |" in text
    assert "copy 4270 GB/s (read + written), read 4576 GB/s, bf16 matmul 8192 778 TFLOP/s." in text
    assert f"of 2 cases: geometric mean {(12.2 / 8.123456 * 0.888) ** 0.5:.3f}, least 0.888 (h128 s_q2" in text
    assert "h16 B1 kv 1024: jitmla 9.0 us, flashinfer 20.3 us." in text
    assert "at commit abc; driver 580.1, torch 2.11.0; kernels built by cute_dsl 4.8.1; x86_64." in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {10}
    assert "roof" not in report.markdown(result(op="o_proj")), "its ceilings are others"


def test_absent_peers_are_named():
    rows = [{**row, "times": {"jitmla": row["times"]["jitmla"]}, "ratio": None} for row in result()["rows"]]
    text = report.markdown(result(rows=rows, peers={}, absent={"flashmla": "JITMLA_PEERS is not set"}, commit=None))
    assert "flashmla: not measured (JITMLA_PEERS is not set)." in text and "at commit unknown;" in text
    assert "No peer was measured." in text
    assert "| h16 B1 kv 1024 | 8.1 |" in text and "| - | sm90_swap/v |" in text and "flashmla us" not in text


def test_the_terminal_says_the_same(capsys):
    report.show(result())
    text = capsys.readouterr().out
    assert "NVIDIA H200" in text and "8.1" in text and "4270 GB/s" in text


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report.write(result(), tmp_path / "r.json")
    assert __main__.main(["plot", str(tmp_path / "r.json")]) == 0
    picture = (tmp_path / "r.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    [stored] = report.read(tmp_path)
    assert stored["plot"] == "r.png" and "](r.png)" in report.markdown(stored)


def test_the_plot_of_the_output_path(tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copy(ROOT / "docs" / "benchmarks" / "o_proj_h200.json", tmp_path / "o.json")
    assert __main__.main(["plot", str(tmp_path / "o.json")]) == 0
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_says_how_far_the_picks_are_from_the_best():
    case = OProjCase("product", 5, 8, 128).as_dict()
    made = {"op": "o_proj sweep", "gpu": "G", "date": "D", "command": "c", "commit": None, "driver": None, "torch": "T",
            "machine": "M", "rows": [{"case": case, "us": {"a": 2.0, "b": 2.5}, "picked": "b", "loss": 0.25}]}
    text = report.page([made])
    assert "more than 3 % behind the fastest at 1 of 1 points, at most 25.0 % (product G8 h128 M 5)" in text
    assert "| product G8 h128 M 5 | b | 2.5 | a | 2.0 | 25.0 % |" in text


def test_without_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.write(result(), tmp_path / "r.json")
    assert __main__.main(["plot", str(tmp_path / "r.json")]) == 1
    assert "jitmla[bench]" in capsys.readouterr().err and not (tmp_path / "r.png").exists()


@pytest.mark.parametrize("text", [None, "no JSON", "[]", '{"rows": [{"us": {}}]}'], ids=str)
def test_what_is_no_result_is_not_drawn(tmp_path, capsys, text):
    file = tmp_path / "r.json"
    if text is not None:
        file.write_text(text)
    assert __main__.main(["plot", str(file)]) == 2
    assert f"to draw {file}" in capsys.readouterr().err and not (tmp_path / "r.png").exists()


def test_the_page():
    older = result(date="2029-12-31")
    text = report.page([older, result()])
    assert text.index("2030-01-02") < text.index("2029-12-31")
    assert report.METHOD in text and text.endswith(".\n")
    assert report.page([]).endswith("There are no results yet.\n")


def test_the_summary():
    """Geometric means over all results of an op; neither sweeps, copies nor other forms are compared with."""
    def row(ratio, *others, **case):
        return {"case": case, "ratio": ratio, "times": dict.fromkeys(("jitmla", *others))}

    results = [{"op": "x", "gpu": "G", "rows": [row(2.0, "a"), row(0.5, "b"), row(None)]},
               {"op": "x", "gpu": "G", "rows": [row(8.0, "a"), row(0.1, "copy"), row(0.2, "mha")]},
               {"op": "x", "gpu": "G", "rows": [row(3.0, "c", op="y")]},
               {"op": "z", "gpu": "G", "rows": [row(1.0, "d", part="p")]}, {"op": "x sweep", "rows": [{}]}]
    assert report.summary(results).splitlines()[2:] == [
        "| x | G | a, b | 3 | 2.00 | 0.50 | 8.00 |", "| y | G | c | 1 | 3.00 | 3.00 | 3.00 |",
        "| z p | G | d | 1 | 1.00 | 1.00 | 1.00 |"]


def test_where_another_library_is_faster():
    """The worst first; what stands beside a copy or another form is not compared with a library."""
    def row(heads, ratio, *others):
        case = {"heads": heads, "tokens": 64, "batch": 1, "qk_head_dim": 192, "v_head_dim": 128, "causal": True,
                "ragged": False}
        return {"case": case, "ratio": ratio, "times": {name: {"us": 10.0} for name in ("jitmla", *others)}}

    rows = [row(1, 0.97, "a"), row(2, 1.0, "a"), row(3, 0.5, "a", "b"), row(4, 0.1, "copy"), row(5, None)]
    said = report.behind({"rows": rows, "gpu": "G", "date": "D"}).splitlines()
    assert said[0] == "Behind another library in 2 of 3 cases on G, D:"
    assert said[-2:] == ["| h3 S 64 | 10.0 | 5.0 | 0.50 |", "| h1 S 64 | 10.0 | 9.7 | 0.97 |"]
    said = report.behind({"rows": rows[1:2], "gpu": "G", "date": "D"})
    assert said == "Behind another library in none of 1 cases on G, D."


def test_the_page_of_the_docs_is_up_to_date():
    """`make docs` writes it."""
    folder = ROOT / "docs" / "benchmarks"
    assert (folder / "README.md").read_text(encoding="utf-8") == report.page(report.read(folder))


def test_where_it_was_measured(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    found = report.environment("command", commit="abc")
    assert set(found) == {"machine", "gpu", "driver", "torch", "date", "commit", "command"}
    assert found["gpu"] == "GPU" and found["commit"] == "abc" and found["torch"] == torch.__version__


def test_the_commit_of_a_checkout(monkeypatch, tmp_path):
    asked = []
    answers = {"rev-parse": "f" * 40, "status": ""}

    def output(*command):
        asked.append(command)
        return answers[command[3]]

    monkeypatch.setattr(report, "output", output)
    assert report.commit_here() == "f" * 40
    answers["status"] = " M file"
    assert report.commit_here() == "f" * 40 + " with changes"
    answers["rev-parse"] = None
    assert report.commit_here() is None
    assert all(command[:2] == ("git", "-C") and Path(command[2]) == ROOT for command in asked)


# ------------------------------------------------------------------------------------------------- peers and command


def test_peers_that_are_not_here(monkeypatch, tmp_path):
    monkeypatch.delenv("JITMLA_PEERS", raising=False)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    found, absent = peers.available()
    assert found == [] and absent["flashmla"] == "JITMLA_PEERS is not set"
    assert absent["flashinfer"].startswith("import flashinfer: ")
    monkeypatch.setenv("JITMLA_PEERS", str(tmp_path))
    assert peers.available()[1]["flashmla"] == f"there is no {tmp_path / '_flashmla_C.abi3.so'}"


def test_without_a_gpu():
    import torch
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "jitmla.bench", "mla_decode"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "on a machine without an NVIDIA GPU" in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr


def test_unknown_ops(capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(["mla_encode"])
    assert caught.value.code == 2 and "mla_encode" in capsys.readouterr().err
