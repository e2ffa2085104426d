"""The cards: who serves a Spec, why nobody does, and that a card says what its template is."""

import itertools

import pytest
from hypothesis import given, settings

from jitmla import pick, registry, render, schema
from jitmla.errors import InvalidTemplate, NoTemplate
from jitmla.registry import Template, Variant, choose, templates
from jitmla.spec import Spec, fp8_bmm_spec

from .documents import valid
from .keysets import ROWS, SETS, covering_choices, every_choice, product, spec, usual_choices

DETERMINED = settings(deadline=None, derandomize=True, database=None)
SHIPPED = [(op, t) for op in registry.ops() for t in templates(op)]
SMEM_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90a": 232448,  # of one block
              "sm_100a": 232448, "sm_103a": 232448, "sm_120a": 101376, "sm_121a": 101376}
REGISTER_FILE = 65536


def test_ops():
    assert {op: registry.backends(op) for op in registry.ops()} == {
        "append_latent": ["portable"], "cached_mla": ["portable"], "cat_quant_fp8": ["simt"],
        "dsa_append": ["simt"], "fp8_bmm": ["sm90"],
        "fp8_mqa_logits": ["sm90"], "fp8_paged_mqa_logits": ["sm90"], "gather_latent": ["simt"],
        "indexer_k_gather": ["simt"], "indexer_k_scatter": ["simt"], "indexer_prologue": ["simt"],
        "inv_rope_fp8_quant": ["simt"], "kv_row_pack": ["simt"], "local_to_global": ["simt"],
        "merge_attn_states": ["simt"], "mla_decode": ["sm90", "portable"], "mla_prefill": ["sm90", "portable"],
        "sparse_mla": ["sm90"], "topk_indices": ["simt"]}


def test_each_op_has_its_sets():
    """What tests render, compile and run: a card whose op is not there would go without."""
    assert set(SETS) == set(registry.ops())


def test_the_usual_run_compiles_every_variant_that_gpu_tests_run_and_hardly_more():
    """A compile takes seconds, and the whole run may take 5 minutes on 2 cores (15 in continuous integration)."""
    usual, covering = usual_choices(), covering_choices()
    assert {(c.template.path, c.variant.name) for c in usual} == {(c.template.path, c.variant.name) for c in covering}
    assert {(c.template.path, c.spec.arch) for c in usual} == {(c.template.path, c.spec.arch) for c in covering}
    for _, template in SHIPPED:
        mine = [c for c in usual if c.template == template]
        assert 1 <= len(mine) <= max(2, len(template.variants) + len({c.spec.arch for c in mine}) - 1), template.name


@pytest.mark.parametrize("op, template", SHIPPED, ids=lambda x: getattr(x, "name", x))
class TestCards:
    """What a card says about its template."""

    def test_the_template_is_there(self, op, template):
        assert template.op == op and template.path.is_file() and template.summary

    def test_constants_are_those_of_the_block(self, op, template):
        declared = render.constants_of(template.source, template.name)
        for variant in template.variants:
            given = {*template.from_spec, *variant.constants}
            assert given == set(declared), f"{variant.name}: {given ^ set(declared)}"
            assert not set(template.from_spec) & set(variant.constants)
            assert all(type(declared[n]) is type(v) for n, v in variant.constants.items())

    def test_fields_are_those_of_the_schema(self, op, template):
        fields = schema.spec_fields(op)
        conditions = [template.supports, *(v.when for v in template.variants)]
        for field, values in itertools.chain.from_iterable(c.items() for c in conditions):
            form = fields[field]
            for value in values:
                if "enum" in form:
                    assert value in form["enum"] and type(value) is type(form["enum"][0]), (field, value)
                elif form["type"] == "integer":
                    assert form["minimum"] <= value <= form["maximum"] and type(value) is int
                else:
                    assert form["type"] == "boolean" and type(value) is bool
        assert all(field in fields for field in template.from_spec.values())
        assert all(a in fields and b in fields and set(other) <= set(fields[a]["enum"])
                   for a, b, *other in template.equal)
        assert set(template.archs) <= set(fields["arch"]["enum"])
        # a field that neither restricts nor becomes a constant would let one binary claim every value of it
        equal = itertools.chain(*(pair[:2] for pair in template.equal))
        named = {*template.supports, *template.from_spec.values(), *equal, "op", "arch"}
        assert {name for name, form in fields.items() if "default" not in form} <= named <= set(fields)
        # what the card supports beyond a default is in the code as well
        assert {name for name in template.supports if "default" in fields[name]} <= set(template.from_spec.values())

    def test_variants_fit_the_machine(self, op, template):
        for variant, arch in itertools.product(template.variants, template.archs):
            assert 0 <= variant.smem_bytes <= SMEM_LIMIT[arch] or arch not in variant.when.get("arch", [arch])
            assert variant.threads % 32 == 0 and 0 < variant.threads <= 1024
            assert variant.max_registers <= 255 and variant.threads * variant.max_registers <= REGISTER_FILE

    def test_names_are_unique(self, op, template):
        names = [v.name for v in template.variants]
        assert len(set(names)) == len(names)
        for name in [template.name, *names]:
            schema.check(name, "name")

    def test_every_variant_is_reachable(self, op, template):
        reached = {c.variant.name for c in every_choice(op) if c.template.name == template.name}
        assert reached == {v.name for v in template.variants}

    def test_every_supported_value_is_reachable(self, op, template):
        """In the card's table no value stands that another template takes away in every case; `rows` is preference."""
        served = [c.spec for c in every_choice(op) if c.template.name == template.name]
        for field, values in template.supports.items():
            if field != "rows":
                assert {s[field] for s in served} == set(values), field


def test_who_serves_how_many_rows():
    names = {rows: choose(spec("bf16", 512, 64, rows, False)).template.name for rows in ROWS}
    assert names == {8: "sm90_swap", 16: "sm90_swap", 32: "sm90_relay", 64: "sm90_trio", 512: "sm90_trio"}


@pytest.mark.parametrize("spec", product(), ids=str)
def test_a_choice(spec):
    choice = choose(spec)
    assert choice.spec is spec and not choice.template.misses(spec)
    key = choice.key
    assert (key.spec, key.template, key.variant) == (spec, choice.template.name, choice.variant.name)
    constants = dict(key.constants)
    assert {f: constants[n] for n, f in choice.template.from_spec.items()} == {
        f: spec[f] for f in choice.template.from_spec.values()}
    assert choose(spec, "sm90").key == key, "a named backend uses the same predicate"
    if key.toolchain is not None:
        schema.check(key.as_dict(), "key")


@settings(DETERMINED, max_examples=300)
@given(valid("spec_mla_decode"))
def test_any_spec_of_mla_decode_has_an_answer(facts):
    """On any GPU, at any width: the only Spec that nobody serves is one that no call makes."""
    wanted = Spec.from_dict(facts)
    if wanted["kv_dtype"] in (wanted["dtype"], "e4m3"):
        assert choose(wanted, "portable").template.name == "portable"
        assert choose(wanted).template.backend == ("sm90" if wanted in set(product()) else "portable")
        return
    with pytest.raises(NoTemplate) as caught:
        choose(wanted)
    assert f"kv_dtype={wanted['kv_dtype']}" in caught.value.differs


@settings(DETERMINED, max_examples=300)
@given(valid("spec_mla_decode"))
def test_a_backend_serves_a_spec_or_refuses_it_with_a_reason(facts):
    wanted = Spec.from_dict(facts)
    if wanted in set(product()):
        assert choose(wanted, "sm90").spec == wanted
        return
    with pytest.raises(NoTemplate) as caught:
        choose(wanted, "sm90")
    error = caught.value
    assert all(f"{k}={v}" in error.asked for k, v in wanted if k != "op"), "what was required"
    assert "nearest sm90" in error.supported and "backend='reference'" in error.remedy
    if "e4m3" in (wanted["dtype"], wanted["kv_dtype"]):
        return  # either kind of template may be the nearest
    assert "kv_lora_rank: 256, 512" in error.supported
    missing = set(error.differs.split("; "))
    expected = {f"{field}={wanted[field]} (has {', '.join(map(str, values))})" for field, values in (
        ("arch", ["sm_90a"]), ("dtype", ["bf16", "fp16"]), ("kv_lora_rank", [256, 512]), ("qk_rope_head_dim", [64]),
        ("split_cache", [False]), ("compact", [False]),
        ("batch_invariant", [False]))
        if wanted[field] not in values}
    if wanted["kv_dtype"] != wanted["dtype"]:
        expected.add(f"kv_dtype={wanted['kv_dtype']} with dtype={wanted['dtype']} (needs them equal)")
    assert missing == expected
    assert "backend='reference'" in error.remedy


@pytest.mark.parametrize("op", [op for op in pick.RULES if op != "mla_decode"])
def test_rows_that_are_picked_by_call(op):
    """Every row serves some Spec, and those that serve the same one are in the card's order, of all templates."""
    rows = [f"{t.name}/{v.name}" for t in templates(op) for v in t.variants]
    reached = set()
    for wanted in SETS[op].product():
        found = registry.choices(wanted)
        names = [c.name for c in found]
        assert names == [row for row in rows if row in names]
        assert len({c.key for c in found}) == len(found)
        assert choose(wanted) == found[0]
        reached |= set(names)
    assert reached == set(rows)


def test_rows_of_mla_decode_that_are_picked_by_call():
    """All of Hopper's that serve the Spec."""
    for wanted in product():
        found = registry.choices(wanted)
        assert found[0] == choose(wanted) and {c.template.backend for c in found} == {"sm90"}
        assert found == registry.candidates(wanted, "sm90")
    assert any(len(registry.choices(s)) == 3 for s in product())


def test_elsewhere_there_is_one_choice():
    assert all(registry.choices(s, "portable") == [choose(s, "portable")] for s in SETS["mla_decode"].product())
    assert all(registry.choices(s) == [choose(s)] for op in registry.ops() if op not in pick.RULES
               for s in SETS[op].product())


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100a", "sm_120a"])
def test_the_product_is_for_hopper_only(arch):
    with pytest.raises(NoTemplate, match=f"arch={arch}") as caught:
        choose(fp8_bmm_spec(arch=arch))
    assert "nearest sm90_tiles: arch: sm_90a" in caught.value.supported


def test_the_nearest_template_misses_least(monkeypatch):
    far = fake("far", supports={"page_size": [1], "dtype": ["fp16"]})
    near = fake("near", supports={"page_size": [1], "dtype": ["bf16"]})
    monkeypatch.setattr(registry, "each_template", lambda op: (far, near))
    with pytest.raises(NoTemplate) as caught:
        choose(spec("bf16", 512, 64, 16, False))
    assert caught.value.supported.startswith("nearest near: arch: sm_90a; page_size: 1; dtype: bf16")
    assert caught.value.differs == "page_size=64 (has 1)"


def test_a_backend_that_does_not_exist():
    with pytest.raises(NoTemplate) as caught:
        choose(spec("bf16", 512, 64, 16, False), "sm100")
    assert caught.value.supported == "sm90, portable" and "no template goes by 'sm100'" in caught.value.differs


def test_a_named_backend_is_strict(monkeypatch):
    """`auto` may go on to the next template; a name may not, even if another backend would serve."""
    picky = fake("picky", backend="first", supports={"page_size": [16]})
    broad = fake("broad", backend="second", supports={})
    monkeypatch.setattr(registry, "each_template", lambda op: (picky, broad))
    wanted = spec("bf16", 512, 64, 16, False)
    assert choose(wanted).template is broad and choose(wanted, "second").template is broad
    assert choose(spec("bf16", 512, 16, 16, False)).template is picky, "the order of the card is preference"
    with pytest.raises(NoTemplate, match="backend 'first'") as caught:
        choose(wanted, "first")
    assert caught.value.differs == "page_size=64 (has 16)"


def test_the_first_row_that_fits():
    rows = [Variant("narrow", {"page_size": [16]}, {}, 128, 1, 1), Variant("wide", {}, {}, 128, 1, 1)]
    template = fake("t", variants=rows)
    assert template.variant(spec("bf16", 512, 16, 16, False)).name == "narrow"
    assert template.variant(spec("bf16", 512, 64, 16, False)).name == "wide"
    template = fake("t", variants=rows[:1])
    assert template.misses(spec("bf16", 512, 64, 16, False)) == ["no row of its config table fits"]


def fake(name, **fields):
    defaults = dict(op="mla_decode", name=name, summary="", backend="sm90", archs=["sm_90a"], options="", supports={},
                    equal=[], from_spec={}, variants=[Variant("only", {}, {}, 128, 1, 1)])
    return Template(**{**defaults, **fields})


# ------------------------------------------------------------------------------------------------- broken cards


CARD = '''op = "x"
[[template]]
name = "t"
backend = "b"
summary = "s"
archs = ["sm_90a"]
[template.supports]
[template.from_spec]
[[template.variant]]
name = "v"
threads = 128
smem_bytes = 1
max_registers = 1
'''


@pytest.mark.parametrize("text", [None, "", "op = ", CARD.replace('name = "t"\n', ""),
                                  CARD.replace("threads", "thread"),
                                  CARD.replace('backend = "b"', 'backend = "b"\nextra = 1'),
                                  CARD.replace("[[template.variant]]", "[[template.other]]"),
                                  CARD.replace("[[template]]", "[[template]] # t"), 'op = "x"\n'],
                         ids=["no file", "empty", "no toml", "no name", "bad variant", "extra field", "no variant",
                              "hidden template", "no template"])
def test_broken_cards(card_of_x, text):
    path = card_of_x(text)
    with pytest.raises(InvalidTemplate, match="the card of 'x'") as caught:
        registry.templates("x")
    assert str(path) in caught.value.differs
    assert "docs/templates.md" in caught.value.supported


def test_a_card_that_is_whole(card_of_x):
    card_of_x(CARD)
    (template,) = registry.templates("x")
    assert template.variants == [Variant("v", {}, {}, 128, 1, 1)] and template.options == "" and template.equal == []


def test_the_error_of_a_later_template_names_its_line(card_of_x):
    text = CARD + CARD.partition("\n")[2].replace("threads = 128", "threads = ?")
    card_of_x(text)
    assert next(registry.each_template("x")).name == "t"
    with pytest.raises(InvalidTemplate, match=f"line {text.splitlines().index('threads = ?') + 1}"):
        registry.templates("x")


def test_choosing_reads_no_more_of_a_card_than_it_needs():
    registry._template.cache_clear()
    asked = spec("bf16", 512, 64, 512, False)
    assert registry.choose(asked).template == templates("mla_decode")[0]
    registry._template.cache_clear()
    registry.choose(asked)
    assert registry._template.cache_info().currsize == 1
