"""The rules that pick a variant by the sizes of a call: they give what the cards have, and fit what they are given."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jitmla
from jitmla import pick, registry, tune
from jitmla.bench.cases import DecodeCase, OProjCase
from jitmla.errors import InvalidArgument, InvalidTunings
from jitmla.spec import Spec, append_latent_spec, fp8_bmm_spec, mla_decode_spec
from jitmla.spec_indexer import topk_indices_spec

from .keysets import quant_spec, sparse_product, sparse_spec

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, NOTES = DOCS / "benchmarks", DOCS / "notes"
DRAWN = settings(max_examples=300, deadline=None, derandomize=True, database=None)
QUANT, BMM = quant_spec("sm_90a", "pow2_f32", False, "i64"), fp8_bmm_spec(arch="sm_90a")
TOPK = topk_indices_spec(arch="sm_90a", rows="windows")
TOKENS = st.one_of(st.integers(1, 300), st.integers(1, 65536))


@pytest.fixture(autouse=True)
def no_tunings():
    jitmla.use_tunings({})
    yield
    jitmla.use_tunings({})


def constants(spec, name):
    return next(dict(c.key.constants) for c in registry.choices(spec) if c.name == name)


def replace_fact(spec, **facts):
    return Spec.from_dict({**spec.as_dict(), **facts})


def picked(spec, **sizes):
    """(variant, reason)"""
    choice = registry.choose(spec, "auto", sizes)
    return choice.name, choice.why


def test_the_rules_are_of_ops():
    assert set(pick.RULES) <= set(registry.ops())


def test_the_tables_say_what_the_cards_say():
    assert list(pick.QUANT) == [c.name for c in registry.choices(QUANT)]
    for name, q in pick.QUANT.items():
        c = constants(QUANT, name)
        assert (q.tokens, q.heads) == (c["TOKENS"], c["HEADS"])
    most = [q.most for q in pick.QUANT.values()]
    assert most == sorted(most) and min(q.heads for q in pick.QUANT.values()) == 1
    assert list(pick.BMM) == [c.name for c in registry.choices(BMM)]
    for name, cost in pick.BMM.items():
        c = constants(BMM, name)
        assert cost[:2] == ((128, 128 * c["BLOCKS_N"]) if "BLOCKS_N" in c else (c["TOKENS"], c["ROWS"]))
    assert any(c.columns <= 128 for c in pick.BMM.values()), "some variant takes any N"


@given(TOKENS, st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
@DRAWN
def test_blocks_of_heads_fit_the_groups(tokens, groups, heads_per_group):
    name, why = picked(QUANT, tokens=tokens, heads=groups * heads_per_group, heads_per_group=heads_per_group)
    assert heads_per_group % constants(QUANT, name)["HEADS"] == 0 and why


@given(TOKENS, st.sampled_from([1, 2, 8, 16, 128]), st.sampled_from([128, 256, 384, 1024, 1536]),
       st.sampled_from([128, 4096, 8192]), st.sampled_from([78, 114, 132]))
@DRAWN
def test_tiles_fit_the_columns(tokens, groups, columns, k, sms):
    name, why = picked(BMM, groups=groups, tokens=tokens, columns=columns, k=k, sms=sms)
    cost = pick.BMM[name]
    assert columns % cost.columns == 0 and name in why
    ctas = pick.fp8_bmm_ctas(name, groups, tokens, columns, sms)
    tiles = groups * -(-tokens // cost.tokens) * (columns // cost.columns)
    assert 1 <= ctas <= min(sms, tiles) and -(-tiles // ctas) == -(-tiles // sms), "as many waves as with all"


def test_few_tokens_are_for_small_tiles_and_many_for_large_ones():
    for groups, k in ((8, 8192), (8, 4096), (16, 4096)):
        few, some, many = (picked(BMM, groups=groups, tokens=tokens, columns=1024, k=k, sms=132)[0]
                           for tokens in (1, 64, 8192))
        assert pick.BMM[few].tokens <= pick.BMM[some].tokens == 64 and many == "sm90_tiles/m128n256"


def test_the_picks_are_the_best_of_what_was_measured():
    """All variants at numbers of tokens from 1 to 16384, as `jitmla bench o_proj --sweep` wrote them."""
    rows = json.loads((RESULTS / "o_proj_sweep_h200.json").read_text())["rows"]
    loss = {}
    for row in rows:
        case = OProjCase(**row["case"])
        if case.part == "quantise":
            name, _ = picked(QUANT, tokens=case.tokens, heads=case.heads, heads_per_group=case.heads // case.groups)
        else:
            name, _ = picked(BMM, groups=case.groups, tokens=case.tokens, columns=case.rows, k=case.columns, sms=132)
        loss[case] = row["us"][name] / min(row["us"].values()) - 1
    assert len(loss) == 136 and max(loss.values()) < 0.03


@given(st.integers(1, 5000), st.integers(1, 200000), st.sampled_from([78, 114, 132]))
@DRAWN
def test_rows_of_topk_share_what_multiprocessors_there_are(rows, columns, sms):
    name, why = picked(TOPK, rows=rows, columns=columns, sms=sms)
    ctas = pick.TOPK[name]
    assert ctas == constants(TOPK, name)["CLUSTER"] and f"{rows} rows" in why
    assert ctas == 1 or rows * ctas <= sms
    assert not [c for c in pick.TOPK.values() if c > ctas and rows * c <= sms], "more would have fitted"


@given(TOKENS, st.integers(1, 128), st.booleans(), st.sampled_from([78, 114, 132]))
@DRAWN
def test_any_call_of_sparse_mla_has_a_kernel(tokens, heads, whole, sms):
    for spec in sparse_product():
        name, why = picked(spec, tokens=tokens, heads=heads, whole=int(whole), sms=sms)
        assert f"{heads} heads" in why or "row tiles" in why
        assert name.startswith(pick.TURNS) <= (spec["kv_format"] == "bf16" and spec["heads"] == 128)


def test_sparse_mla_picks_are_the_best_of_what_was_measured():
    """Both kernels of more than 16 heads over rows that come from memory. A pool that fits into the L2 is not what the
    rule is for in decode."""
    rows = json.loads((DOCS / "notes" / "sparse_mla_variants_h200.json").read_text())["rows"]
    spec = sparse_spec("bf16", 64, 128)
    met = set()
    for row in rows:
        whole = row["part"] == "prefill"
        if whole or row["rows"] > 100000:
            name, _ = picked(spec, tokens=row["tokens"], heads=row["heads"], whole=int(whole), sms=132)
            assert row["us"][name] <= 1.033 * min(row["us"].values()), row
            met.add(name)
    assert len(rows) == 86 and met == set(row["us"])


def test_tunings_go_before_the_rule():
    """Where the sizes are in the ranges, and the variant can be launched with them."""
    sizes = {"tokens": 64, "heads": 64, "heads_per_group": 8}
    ruled, _ = picked(QUANT, **sizes)
    assert ruled != "warp_rows/t8h8"
    document = tune.naming(QUANT, "warp_rows/t8h8")
    document["variants"][0]["sizes"] = {"tokens": [33, 64], "heads": [1, 64]}
    jitmla.use_tunings(document)
    assert picked(QUANT, **sizes) == ("warp_rows/t8h8", "tuned")
    for other in ({"tokens": 65}, {"tokens": 32}, {"heads": 128}, {"heads_per_group": 4}):
        assert picked(QUANT, **{**sizes, **other})[0] != "warp_rows/t8h8", other
    assert registry.choose(QUANT).name == "warp_rows/t4h1", "without sizes"
    assert picked(replace_fact(QUANT, neox=True), **sizes)[0] == ruled
    assert [c.name for c in registry.choices(QUANT)] == list(pick.QUANT), "and all rows stay reachable"


def test_a_variant_for_all_sizes():
    """As benchmarks and tests name one."""
    jitmla.use_tunings(tune.naming(BMM, "sm90_stream/t64r64"))
    for tokens in (1, 100, 10000):
        assert picked(BMM, groups=8, tokens=tokens, columns=128, k=128, sms=132) == ("sm90_stream/t64r64", "tuned")


@pytest.mark.parametrize("sizes", [{"tokens": [2, 1]}, {"tokens": [1]}, {"tokens": [1, "2"]}, {"tokens": 3}])
def test_ranges_that_are_none(sizes):
    document = tune.naming(BMM, "sm90_stream/t64r64")
    document["variants"][0]["sizes"] = sizes
    with pytest.raises(InvalidTunings):
        jitmla.use_tunings(document)


def test_explain_shows_what_is_picked(tmp_path, monkeypatch):
    monkeypatch.setenv("JITMLA_CACHE_DIR", str(tmp_path))
    sizes = dict(tokens=1500, heads=128, heads_per_group=16)
    told = jitmla.explain(QUANT, **sizes)
    assert (f"{told['template']}/{told['variant']}", told["why"]) == picked(QUANT, **sizes)
    every = jitmla.explain(QUANT)
    assert list(every["variants"]) == list(pick.QUANT) and "variants" not in told
    assert told["key"] == every["variants"]["warp_rows/t8h8"] and told["cached"] is False
    assert every["why"] == "by tokens, heads, heads_per_group of the call"
    told = jitmla.explain(BMM, groups=8, tokens=1, columns=1024, k=8192, sms=132)
    assert told["template"] == "sm90_stream" and "estimated us" in told["why"]


DECODE_SIZES = {"rows": 128, "batch": 8, "tokens": 4096, "sms": 132}


def decode_spec(**facts):
    return mla_decode_spec(**{"arch": "sm_90a", "dtype": "bf16", "kv_lora_rank": 512, "qk_rope_head_dim": 64,
                              "page_size": 64, "s_q": 1, "heads": 128, "causal": True, **facts})


def test_the_decode_variants_are_those_of_the_cards():
    met = set()
    for page, latent, heads, dtypes in itertools.product(
            (1, 16, 64), (256, 512), (8, 16, 32, 64, 128), (("bf16", "bf16"), ("bf16", "e4m3"), ("e4m3", "e4m3"))):
        spec = decode_spec(page_size=page, heads=heads, kv_lora_rank=latent, dtype=dtypes[0], kv_dtype=dtypes[1])
        for choice in registry.choices(spec):
            name = choice.name
            met.add(name)
            assert pick.DECODE[name].rows == dict(choice.key.constants).get("ROWS", 64)
            assert pick.DECODE[name].bytes == (1 if dtypes[1] == "e4m3" else 2)
    assert met == set(pick.DECODE)


def test_the_decode_picks_are_the_best_of_what_was_measured():
    """Every variant that serves a case, from one request to a full batch, as `jitmla bench mla_decode --sweep` wrote
    them."""
    rows = json.loads((RESULTS / "mla_decode_sweep_h200.json").read_text())["rows"]
    loss = {}
    for row in rows:
        case = DecodeCase(**row["case"])
        spec = decode_spec(page_size=case.page_size, heads=case.heads, kv_lora_rank=case.kv_lora_rank)
        sizes = {"rows": case.heads, "batch": case.batch, "tokens": case.kv, "sms": 132}
        name, why = picked(spec, **sizes)
        assert row["us"].keys() == {c.name for c in registry.choices(spec)} and f"{case.kv} tokens" in why
        loss[case] = row["us"][name] / min(row["us"].values()) - 1
    assert len(loss) == 62 and max(loss.values()) < 0.03


def test_the_decode_picks_over_an_e4m3_cache_are_the_best_of_what_was_measured():
    """Every variant that is near, from one request to a full batch."""
    rows = json.loads((NOTES / "mla_decode_e4m3_variants_h200.json").read_text())["rows"]
    loss = {}
    for row in rows:
        spec = decode_spec(page_size=row["page_size"], heads=row["heads"], dtype=row.get("dtype", "bf16"),
                           kv_dtype="e4m3", kv_lora_rank=row.get("kv_lora_rank", 512))
        us = {name: t for name, t in row["us"].items() if name.startswith("sm90_")}
        assert {c.name for c in registry.choices(spec)} >= us.keys()
        sizes = {"rows": row["heads"], "batch": row["batch"], "tokens": row["kv"], "sms": 132}
        name, why = pick.best("mla_decode", list(us), sizes)
        loss[json.dumps(row)] = us[name] / min(us.values()) - 1
        assert len(us) == 1 or f"{row['kv']} tokens" in why
    assert len(loss) >= 40 and max(loss.values()) < 0.03


@given(st.sampled_from([1, 16, 64]), st.sampled_from([256, 512]), st.integers(1, 512), st.integers(1, 1000),
       st.integers(1, 1 << 20), st.sampled_from([78, 114, 132]))
@DRAWN
def test_a_decode_of_any_size_is_served(page, latent, heads, batch, tokens, sms):
    spec = decode_spec(page_size=page, heads=heads, kv_lora_rank=latent)
    name, why = picked(spec, rows=heads, batch=batch, tokens=tokens, sms=sms)
    names = [c.name for c in registry.choices(spec)]
    assert name in names and (len(names) == 1 or all(n in why for n in names))


def test_a_decode_that_has_no_costs_is_served_by_the_first():
    spec = decode_spec(qk_rope_head_dim=32)
    assert picked(spec, **DECODE_SIZES) == (registry.choose(spec).name, "the first in the card")


@pytest.mark.parametrize("op, sizes, word", [
    ("mla_prefill", {"tokens": 1}, "one variant"), ("mla_decode", {"tokens": 1}, "batch"),
    ("fp8_bmm", {"tokens": 1}, "groups"),
    ("inv_rope_fp8_quant", {"tokens": 1, "heads": 1, "heads_per_group": 1, "color": 3}, "color")])
def test_sizes_of_another_rule(op, sizes, word):
    with pytest.raises(InvalidArgument) as caught:
        pick.fitting(op, [], sizes)
    assert word in caught.value.differs


def test_other_ops_are_explained_as_before(tmp_path, monkeypatch):
    monkeypatch.setenv("JITMLA_CACHE_DIR", str(tmp_path))
    spec = append_latent_spec(arch="sm_90a", dtype="bf16", e4m3_cache=True, slots="i64", kv_lora_rank=512,
                              qk_rope_head_dim=64)
    assert "variants" not in jitmla.explain(spec) and jitmla.explain(spec)["why"] == "the first in the card"
