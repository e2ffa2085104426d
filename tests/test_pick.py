"""The rules that pick a variant by the sizes of a call: they give what the cards have, and fit what they are given."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jitmla
from jitmla import pick, registry
from jitmla.errors import InvalidArgument
from jitmla.spec import Spec, fp8_bmm_spec

from .keysets import quant_spec

DRAWN = settings(max_examples=300, deadline=None, derandomize=True, database=None)
QUANT, BMM = quant_spec("sm_90a", "pow2_f32", False, "i64"), fp8_bmm_spec(arch="sm_90a")
TOKENS = st.one_of(st.integers(1, 300), st.integers(1, 65536))


def constants(spec, variant):
    return dict(registry.choose(spec, "auto", variant).key.constants)


def test_the_rules_are_of_the_ops_that_need_them():
    per_call = {op for op in registry.ops() if any(t.per_call for t in registry.templates(op))}
    assert per_call == set(pick.RULES)


def test_the_tables_say_what_the_cards_say():
    assert [q.variant for q in pick.QUANT] == [c.variant.name for c in registry.choices(QUANT)]
    assert all(q.heads == constants(QUANT, q.variant)["HEADS"] for q in pick.QUANT)
    assert [q.most for q in pick.QUANT] == sorted(q.most for q in pick.QUANT) and pick.QUANT[0].heads == 1
    assert set(pick.BMM) == {c.variant.name for c in registry.choices(BMM)}
    for name, cost in pick.BMM.items():
        c = constants(BMM, name)
        if "BLOCKS_N" in c:
            assert cost[:4] == (128, 128 * c["BLOCKS_N"], 1, 1)
        else:
            assert cost[:4] == (c["TOKENS"], c["ROWS"], c["SPLIT"], c["SHARE"])
    assert any(c.columns * c.share <= 128 for c in pick.BMM.values()), "some variant takes any N"


@given(TOKENS, st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
@DRAWN
def test_blocks_of_heads_fit_the_groups(tokens, groups, heads_per_group):
    name, why = pick.pick("inv_rope_fp8_quant", tokens=tokens, heads=groups * heads_per_group,
                          heads_per_group=heads_per_group)
    assert heads_per_group % constants(QUANT, name)["HEADS"] == 0 and why


@given(TOKENS, st.sampled_from([1, 2, 8, 16, 128]), st.sampled_from([128, 256, 384, 1024, 1536]),
       st.sampled_from([128, 4096, 8192]), st.sampled_from([78, 114, 132]))
@DRAWN
def test_tiles_fit_the_columns(tokens, groups, columns, k, sms):
    name, why = pick.pick("fp8_bmm", groups=groups, tokens=tokens, columns=columns, k=k, sms=sms)
    cost = pick.BMM[name]
    assert columns % (cost.columns * cost.share) == 0 and name in why
    ctas = pick.fp8_bmm_ctas(name, groups, tokens, columns, sms)
    assert 1 <= ctas <= sms


def test_few_tokens_are_for_swapped_operands_and_many_for_tiles():
    for groups, k in ((8, 8192), (8, 4096), (16, 4096)):
        names = [pick.pick("fp8_bmm", groups=groups, tokens=tokens, columns=1024, k=k, sms=132)[0]
                 for tokens in (1, 64, 1024, 8192)]
        templates = [registry.choose(BMM, "auto", name).template.name for name in names]
        assert templates == ["sm90_stream", "sm90_stream", "sm90_tiles", "sm90_tiles"]


def test_explain_shows_what_is_picked(tmp_path, monkeypatch):
    monkeypatch.setenv("JITMLA_CACHE_DIR", str(tmp_path))
    sizes = dict(tokens=1500, heads=128, heads_per_group=16)
    told = jitmla.explain(QUANT, **sizes)
    assert (told["variant"], told["picked"]) == pick.pick("inv_rope_fp8_quant", **sizes)
    assert list(told["variants"]) == [c.variant.name for c in registry.choices(QUANT)]
    assert told["key"] == told["variants"][told["variant"]]["key"] and told["cached"] is False
    assert "picked" not in jitmla.explain(QUANT) and "variants" in jitmla.explain(QUANT)
    told = jitmla.explain(BMM, groups=8, tokens=1, columns=1024, k=8192, sms=132)
    assert told["template"] == "sm90_stream" and "estimated us" in told["picked"]


@pytest.mark.parametrize("op, sizes, word", [
    ("mla_decode", {"tokens": 1}, "one variant"), ("fp8_bmm", {"tokens": 1}, "groups"),
    ("inv_rope_fp8_quant", {"tokens": 1, "heads": 1, "heads_per_group": 1, "color": 3}, "color")])
def test_sizes_of_another_rule(op, sizes, word):
    with pytest.raises(InvalidArgument) as caught:
        pick.pick(op, **sizes)
    assert word in caught.value.differs


def test_other_ops_are_explained_as_before(tmp_path, monkeypatch):
    monkeypatch.setenv("JITMLA_CACHE_DIR", str(tmp_path))
    spec = Spec.of("mla_decode", arch="sm_90a", dtype="bf16", kv_dtype="bf16", kv_lora_rank=512, qk_rope_head_dim=64,
                   page_size=64, rows=16, causal=False)
    assert "variants" not in jitmla.explain(spec) and "picked" not in jitmla.explain(spec)
