"""Tunings: what a document may say, where it applies, that ranks agree on it, and the search that writes one."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import jitmla
from jitmla import env, registry, schedule, tune
from jitmla.cli import app
from jitmla.errors import InvalidTunings
from jitmla.models import keys_for
from jitmla.spec import Spec

from .keysets import spec

H200 = {"name": "NVIDIA H200", "arch": "sm_90a", "sms": 132}
SMALL = spec("bf16", 512, 64, 64, False)  # two templates serve it
USUAL, OTHER = "sm90_trio/r64_triples6", "sm90_swap/r16_triples8"
LAUNCH = {"kv_lora_rank": 512, "rows": [9, 16], "batch": [2, 4], "launch": {"parts": 120, "least": 2}}


def facts(s):
    return {name: value for name, value in s if name != "arch"}


def document(**over):
    return {"format": 1, "gpu": H200, "variants": [{"spec": facts(SMALL), "variant": OTHER}],
            "launches": [LAUNCH], **over}


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """No tunings before a test, and none after it."""
    monkeypatch.setattr(tune, "_adopted", {})
    tune.use_tunings({})
    yield
    tune._adopted.clear()
    tune.use_tunings({})


# ------------------------------------------------------------------------------------------------------ what it changes


def test_a_variant_is_chosen_as_measured():
    assert registry.choose(SMALL).name == USUAL and tune.pick(SMALL) is None
    assert [c.name for c in registry.candidates(SMALL, "sm90")] == [USUAL, "sm90_relay/r32_triples7", OTHER]
    jitmla.use_tunings(document())
    assert registry.choose(SMALL).name == registry.choose(SMALL, "sm90").name == OTHER
    other = spec("fp16", 512, 64, 64, False)
    assert registry.choose(other).name == USUAL


def test_the_key_space_stays_closed_and_as_large():
    """Without a GPU at hand: prewarming elsewhere, whatever the tunings, gives the Keys that serving meets."""
    before = keys_for("deepseek-v3", tp=2)
    jitmla.use_tunings(document())
    after = keys_for("deepseek-v3", tp=2)
    assert set(after) == set(before) and registry.choose(SMALL).key in after


def test_another_arch_has_its_own(monkeypatch):
    jitmla.use_tunings(document(gpu={**H200, "arch": "sm_100a"}))
    assert registry.choose(SMALL).name == USUAL


def test_a_variant_that_is_gone_is_told(seen):
    jitmla.use_tunings(document(variants=[{"spec": facts(SMALL), "variant": "sm90_gone/fast"}]))
    assert registry.choose(SMALL).name == USUAL
    assert [(e.kind, e.fields["what"]) for e in seen] == [("degrade", "tuned variant")]


def test_launch_arguments_on_the_gpu_they_were_measured_on():
    rule = schedule.launch_args(16, 3, 132)
    jitmla.use_tunings(document())
    assert schedule.launch_args(16, 3, 132) == rule, "no such GPU in this process"
    tune.adopt("NVIDIA H200", 132)
    assert schedule.launch_args(16, 3, 132) == rule._replace(parts=120, least=2)
    for rows, batch, sms, latent in ((8, 3, 132, 512), (17, 3, 132, 512), (16, 1, 132, 512), (16, 5, 132, 512),
                                     (16, 3, 114, 512), (16, 3, 132, 256)):
        assert schedule.launch_args(rows, batch, sms, latent) == schedule.launch_args.__wrapped__(
            rows, batch, sms, latent)
    jitmla.use_tunings({})
    assert schedule.launch_args(16, 3, 132) == rule
    jitmla.use_tunings(document())
    assert schedule.launch_args(16, 3, 132).parts == 120, "a GPU once adopted stays so"


@pytest.mark.parametrize("gpu", [("NVIDIA H100", 132), ("NVIDIA H200", 114)])
def test_another_gpu_is_told(seen, gpu):
    jitmla.use_tunings(document())
    tune.adopt(*gpu)
    tune.adopt(*gpu)
    assert schedule.launch_args(16, 3, gpu[1]) == schedule.launch_args.__wrapped__(16, 3, gpu[1], 512)
    [event] = seen
    assert event.kind == "degrade" and "NVIDIA H200 (132 multiprocessors)" in event.fields["reason"]


def test_what_comes_with_jitmla_is_silent_on_other_gpus(seen, monkeypatch):
    monkeypatch.delenv(env.TUNINGS.name)
    tune.use_tunings(None)
    tune.adopt("NVIDIA A100", 108)
    assert seen == []


# --------------------------------------------------------------------------------------------------- an agreed input


def test_ranks_agree_through_what_one_of_them_sends(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(document()))
    jitmla.use_tunings(tmp_path / "t.json")
    sent = json.dumps(jitmla.tunings())
    here = registry.choose(SMALL).key
    jitmla.use_tunings({})
    assert jitmla.tunings() == [] and registry.choose(SMALL).key != here
    jitmla.use_tunings(json.loads(sent))
    assert registry.choose(SMALL).key == here and json.dumps(jitmla.tunings()) == sent


def test_the_environment_names_a_file(tmp_path, monkeypatch):
    (tmp_path / "t.json").write_text(json.dumps(document()))
    monkeypatch.setenv(env.TUNINGS.name, str(tmp_path / "t.json"))
    monkeypatch.setattr(tune, "_documents", None)  # as in a new process
    assert registry.choose(SMALL).name == OTHER


def test_the_first_of_several_counts():
    jitmla.use_tunings([document(), document(variants=[{"spec": facts(SMALL), "variant": USUAL}])])
    assert registry.choose(SMALL).name == OTHER


def test_prewarm_takes_them(tmp_path, monkeypatch):
    from jitmla import compile
    from jitmla.compile import Built

    from .support.keys import KERNELS, SO_BYTES
    monkeypatch.setattr(compile, "build", lambda key, source, **_: Built(SO_BYTES, source, KERNELS, 0.0))
    other = registry.candidates(SMALL, "portable")[0]
    (tmp_path / "t.json").write_text(json.dumps(document(variants=[{"spec": facts(SMALL), "variant": other.name}])))
    done = CliRunner().invoke(app, ["prewarm", "--model", "deepseek-v3", "--tp", "2", "--arch", "sm_90a",
                                    "--max-s-q", "1", "--page-size", "64", "--json", "--tunings",
                                    str(tmp_path / "t.json")])
    [found] = map(json.loads, done.stdout.splitlines())
    assert found["name"] == other.key.name


def test_plans_are_made_anew():
    pytest.importorskip("torch")
    from jitmla import dispatch
    dispatch._plans[SMALL, "auto", None] = "a plan"
    jitmla.use_tunings(document())
    assert dispatch._plans == {}


# ------------------------------------------------------------------------------------------------------ bad documents


@pytest.mark.parametrize("change, differs", [
    ({"format": 2}, "format is 2"), ({"gpu": {"name": "x"}}, "'sms' is missing"), ({"variants": None}, "not iterable"),
    ({"gpu": {**H200, "sms": "132"}}, "not supported between"),
    ({"variants": [{"spec": facts(SMALL), "variant": "trio"}]}, "not a choice of a variant"),
    ({"variants": [{"spec": {}, "variant": "a/b"}]}, "'op' is missing"),
    ({"launches": [{**LAUNCH, "batch": [3, 2]}]}, "not a choice of launch arguments"),
    ({"launches": [{**LAUNCH, "rows": [0, 2]}]}, "not a choice of launch arguments"),
    ({"launches": [{**LAUNCH, "launch": {"parts": 1.5}}]}, "not a choice of launch arguments"),
    ({"launches": [{**LAUNCH, "launch": {"parts": True}}]}, "not a choice of launch arguments"),
    ({"launches": [{**LAUNCH, "launch": {"parts": 0}}]}, "out of range"),
    ({"launches": [{**LAUNCH, "launch": {"least": 0}}]}, "out of range"),
    ({"launches": [{**LAUNCH, "launch": {"warps": 8}}]}, "out of range"),
    ({"launches": [{**LAUNCH, "launch": {"parts": 133}}]}, "parts=133 for 1 row tiles on 132"),
    ({"launches": [{**LAUNCH, "rows": [65, 128], "launch": {"parts": 67}}]}, "parts=67 for 2 row tiles"),
])
def test_what_no_kernel_can_be_launched_with_is_refused(change, differs):
    jitmla.use_tunings(document())
    with pytest.raises(InvalidTunings) as caught:
        jitmla.use_tunings(document(**change))
    assert differs in caught.value.differs
    assert jitmla.tunings() == [document()], "what was in use stays"


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3"])
def test_a_file_of_something_else(tmp_path, text):
    if text is not None:
        (tmp_path / "t.json").write_text(text)
    with pytest.raises(InvalidTunings, match="t.json"):
        jitmla.use_tunings(tmp_path / "t.json")


@pytest.mark.parametrize("path", sorted(tune.TUNINGS.glob("*.json")), ids=lambda p: p.name)
def test_what_comes_with_jitmla(path):
    found = tune._read(path)
    assert {"driver", "clocks"} <= set(found["gpu"]) and found["date"] and found["command"]
    for entry in found["variants"]:
        served = registry.candidates(Spec.from_dict({**entry["spec"], "arch": found["gpu"]["arch"]}))
        assert entry["variant"] in {choice.name for choice in served}
    assert all(entry["us"] and entry["date"] for entry in found["variants"] + found["launches"])


# --------------------------------------------------------------------------------------------------------- the search


@pytest.fixture
def bench():
    pytest.importorskip("torch")
    from jitmla.bench import tune as bench
    return bench


def timer(bench, us):
    """A measure in which a case under a document takes `us(case, variant, launch arguments)`."""
    from jitmla.bench.timing import Timing

    def measure(case, documents):
        found = {}
        for name, content in documents.items():
            tune.use_tunings(content)
            tune.adopt(H200["name"], H200["sms"])
            at = schedule.launch_args(case.heads * case.s_q, case.batch, H200["sms"], case.kv_lora_rank)
            sizes = {"rows": case.heads * case.s_q, "batch": case.batch, "tokens": case.kv, "sms": H200["sms"]}
            value = us(case, registry.choose(bench._spec(case, "sm_90a"), "auto", sizes).name, at)
            found[name] = Timing(value, (value * 0.99, value, value, value * 1.01), 2)
        return found

    return measure


def test_the_search_finds_what_is_faster_and_says_how_much(bench):
    def us(case, name, at):
        return 100 * (0.8 if name == OTHER and case.batch < 100 else 1) * (
            1 + abs(at.parts - 96) / 500 + (at.least != 4) * 0.1)

    found = bench.mla_decode("deepseek-v3", tp=2, batches=(1, 64), gpu=H200, measure=timer(bench, us))
    variants = [v for v in found["variants"] if v["spec"] == facts(SMALL)]
    assert len(variants) == len(found["variants"]) > 2 and {v["variant"] for v in variants} == {OTHER}
    assert all(v["us"]["tuned"] < v["us"]["rule"] and v["sizes"]["rows"] == [33, 64] for v in variants)
    assert {tuple(v["sizes"]["batch"]) for v in variants} == {(1, 1), (2, 16)}
    one, many = found["launches"]
    assert (one["rows"], one["batch"], many["batch"]) == ([33, 64], [1, 1], [2, 64])
    assert one["launch"]["least"] == many["launch"]["least"] == 4 and many["launch"]["parts"] == 96
    assert len(many["us"]["tuned"]) == 3 and 0 < many["spread"] < 0.1 and many["date"]
    assert json.loads(bench.text(found)) == found
    jitmla.use_tunings(found)
    tune.adopt(H200["name"], H200["sms"])
    for batch, name in ((16, OTHER), (17, USUAL)):
        assert registry.choose(SMALL, "auto", {"rows": 64, "batch": batch, "tokens": 65536, "sms": 132}).name == name
    assert schedule.launch_args(64, 40, 132).parts == 96


def test_what_is_hardly_faster_is_not_taken(bench):
    found = bench.mla_decode("deepseek-v3", tp=2, batches=(1,), gpu=H200, measure=timer(
        bench, lambda case, name, at: 100.0 - (name == OTHER) - (at.least == 4) * 0.5))
    assert found["variants"] == found["launches"] == []
    assert json.loads(bench.text(found)) == found


def test_what_is_slower_at_one_length_is_not_taken(bench):
    """Even when it is much faster at the others."""
    found = bench.mla_decode("deepseek-v3", tp=8, batches=(1,), gpu=H200, measure=timer(
        bench, lambda case, name, at: 100.0 * (1 if at.parts == 96 else 1.1 if case.kv == 65536 else 0.5)))
    assert found["launches"] == []


def test_each_choice_is_a_line(bench):
    entries = [{**LAUNCH, "batch": [n, n]} for n in range(1, 4)]
    text = bench.text(document(launches=entries))
    assert json.loads(text) == document(launches=entries)
    assert [line for line in text.splitlines() if '"parts"' in line] == [
        f"  {json.dumps(e)}{',' if e is not entries[-1] else ''}" for e in entries]


def test_a_file_keeps_what_is_not_measured_again(bench):
    old = document(launches=[LAUNCH, {**LAUNCH, "batch": [9, 16]}], date="then")
    new = document(launches=[{**LAUNCH, "launch": {"parts": 99}}], variants=[], date="now")
    both = bench.merged(old, new)
    assert both["date"] == "now" and both["variants"] == old["variants"] and len(both["launches"]) == 2
    assert {**LAUNCH, "launch": {"parts": 99}} in both["launches"] and LAUNCH not in both["launches"]
    with pytest.raises(InvalidTunings, match="another kind of GPU"):
        bench.merged(document(gpu={**H200, "sms": 114}), new)


@settings(deadline=None, derandomize=True, database=None)
@given(rows=st.integers(1, 512))
def test_row_classes(rows):
    from jitmla.bench.tune import rows_class
    low, high = rows_class(rows)
    assert low <= rows <= high
    assert rows_class(low) == rows_class(high) == (low, high)
    assert -(-low // schedule.TILE_ROWS) == -(-high // schedule.TILE_ROWS), "one number of row tiles"


def test_without_a_gpu():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    done = CliRunner().invoke(app, ["tune", "mla_decode", "--model", "deepseek-v3"])
    assert done.exit_code == 2 and "without an NVIDIA GPU" in done.stderr
    assert CliRunner().invoke(app, ["tune", "conv", "--model", "deepseek-v3"]).exit_code == 2


