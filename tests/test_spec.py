"""Spec: static facts, checked against the schema; launch sizes become facts in one place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitmla import schema
from jitmla.errors import SchemaViolation
from jitmla.spec import Spec, bucket, mla_decode_spec

from .documents import valid

DETERMINED = settings(deadline=None, derandomize=True, database=None, max_examples=50)
FACTS = {"arch": "sm_90a", "dtype": "bf16", "kv_dtype": "bf16", "kv_lora_rank": 512, "qk_rope_head_dim": 64,
         "page_size": 64, "rows": 16, "causal": False}


@DETERMINED
@given(valid("spec_mla_decode"), st.randoms(use_true_random=False))
def test_the_order_of_facts_does_not_matter(facts, rng):
    shuffled = list(facts.items())
    rng.shuffle(shuffled)
    one, other = Spec.from_dict(facts), Spec.from_dict(dict(shuffled))
    assert one == other and hash(one) == hash(other)
    fields = schema.spec_fields("mla_decode")
    assert [name for name, _ in other] == [n for n in fields if "default" not in fields[n] or facts.get(n, False)]


def told(facts):
    """Without those at their default, which are left out."""
    fields = schema.spec_fields("mla_decode")
    return {name: value for name, value in facts.items() if "default" not in fields[name] or value}


def test_a_default_is_left_out():
    spec = Spec.of("mla_decode", **FACTS)
    assert spec == Spec.of("mla_decode", **FACTS, compact=False) != Spec.of("mla_decode", **FACTS, compact=True)
    assert spec["compact"] is False and "compact" not in str(spec)


@DETERMINED
@given(valid("spec_mla_decode"))
def test_facts_come_back(facts):
    spec = Spec.from_dict(facts)
    assert spec.as_dict() == told(facts) == dict(spec)
    assert all(spec[name] == value for name, value in facts.items())
    assert (spec.op, spec.arch) == (facts["op"], facts["arch"])
    assert Spec.from_dict(spec.as_dict()) == spec


@DETERMINED
@given(valid("spec_mla_decode"), valid("spec_mla_decode"))
def test_different_facts_are_different_specs(a, b):
    assert (Spec.from_dict(a) == Spec.from_dict(b)) == (told(a) == told(b))


def test_it_cannot_be_changed():
    spec = Spec.of("mla_decode", **FACTS)
    with pytest.raises(AttributeError):
        spec.facts = ()
    with pytest.raises(KeyError):
        spec["batch"]


def test_as_text():
    assert str(Spec.of("mla_decode", **FACTS)) == (
        "mla_decode(arch=sm_90a, dtype=bf16, kv_dtype=bf16, kv_lora_rank=512, qk_rope_head_dim=64, page_size=64, "
        "rows=16, causal=False)")


@pytest.mark.parametrize("change", [{"rows": 17}, {"page_size": 1}, {"page_size": 129}, {"page_size": 64.5},
                                    {"causal": 0}, {"dtype": "bfloat16"}, {"arch": "sm_90"}, {"batch": 1}])
def test_facts_outside_of_the_schema(change):
    with pytest.raises(SchemaViolation):
        Spec.of("mla_decode", **{**FACTS, **change})


@pytest.mark.parametrize("missing", FACTS)
def test_every_fact_is_required(missing):
    with pytest.raises(SchemaViolation, match=f"'{missing}' is missing"):
        Spec.of("mla_decode", **{k: v for k, v in FACTS.items() if k != missing})


def test_unknown_op():
    with pytest.raises(SchemaViolation, match="op 'no_such_op'"):
        Spec.of("no_such_op", **FACTS)
    with pytest.raises(SchemaViolation, match="op 'None'"):
        Spec.from_dict(FACTS)


@pytest.mark.parametrize("rows, top", [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (65, 512), (512, 512)])
def test_bucket(rows, top):
    assert bucket("mla_decode", "rows", rows) == top


def test_no_bucket_is_large_enough():
    with pytest.raises(SchemaViolation, match="rows = 513"):
        bucket("mla_decode", "rows", 513)


@DETERMINED
@given(st.integers(1, 8), st.integers(1, 128), st.booleans())
def test_what_a_call_makes_of_its_sizes(s_q, heads, causal):
    if s_q * heads > 512:
        with pytest.raises(SchemaViolation):
            of_call(s_q, heads, causal)
        return
    spec = of_call(s_q, heads, causal)
    assert spec["rows"] == min(top for top in (8, 16, 32, 64, 512) if top >= s_q * heads)
    assert spec["causal"] is (causal and s_q > 1), "with one token the limit hides nothing"
    assert spec["kv_dtype"] == spec["dtype"] == "fp16"


@pytest.mark.parametrize("page_size, fact", [(64, 64), (16, 16), (1, 0), (7, 0), (127, 0), (4096, 0)])
def test_what_a_call_makes_of_its_page_size(page_size, fact):
    assert mla_decode_spec(arch="sm_80", dtype="bf16", kv_lora_rank=64, qk_rope_head_dim=0, page_size=page_size, s_q=1,
                           heads=1, causal=True)["page_size"] == fact


def of_call(s_q, heads, causal):
    return mla_decode_spec(arch="sm_90a", dtype="fp16", kv_lora_rank=256, qk_rope_head_dim=64, page_size=32, s_q=s_q,
                           heads=heads, causal=causal)
