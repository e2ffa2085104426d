"""Models: dimensions from names and configs, and that keys_for lists every Key that serving a model can meet."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jitmla
from jitmla import models, registry, schedule
from jitmla.errors import InvalidArgument, JitmlaError, UnknownArch, UnknownModel
from jitmla.models import KNOWN, PAGE_SIZES, MlaModel, keys_for, model, specs_for
from jitmla.ops import checks
from jitmla.ops.mla_prefill_absorbed import group_size
from jitmla.spec import fp8_bmm_spec, mla_decode_spec

CONFIG = {"model_type": "deepseek_v3", "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
          "qk_nope_head_dim": 128, "v_head_dim": 128, "torch_dtype": "bfloat16"}


def write(path, config):
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("name, dims", [
    ("deepseek-v2", (128, 512, 64, 128, 128)), ("deepseek-v2-lite", (16, 512, 64, 128, 128)),
    ("deepseek-v3", (128, 512, 64, 128, 128)), ("kimi-k2", (64, 512, 64, 128, 128)),
    ("mistral-small-4", (32, 256, 64, 64, 128))])
def test_known_models(name, dims):
    assert model(name) == MlaModel(name, *dims)


def test_no_other_model_is_known():
    assert set(KNOWN) == {"deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3.2", "kimi-k2",
                          "mistral-small-4", "deepseek-v4-flash", "deepseek-v4-pro"}


@pytest.mark.parametrize("where", ["file", "folder", "str"])
def test_from_a_config(tmp_path, where):
    path = write(tmp_path / "config.json", CONFIG)
    found = model({"file": path, "folder": tmp_path, "str": str(path)}[where])
    assert found == MlaModel("deepseek_v3", 128, 512, 64, 128, 128, "bf16")


def test_multimodal_configs_nest_the_language_model(tmp_path):
    text = {**CONFIG, "num_attention_heads": 32, "kv_lora_rank": 256}
    text.pop("torch_dtype")
    path = write(tmp_path / "config.json", {"model_type": "mm", "num_attention_heads": 7, "dtype": "float16",
                                            "text_config": text})
    assert model(path) == MlaModel("mm", 32, 256, 64, 128, 128, "fp16")


def test_a_config_without_a_type_goes_by_its_folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    write(folder / "config.json", {k: v for k, v in CONFIG.items() if k != "model_type"})
    assert model(folder).name == "my-model"


@pytest.mark.parametrize("fields, dtype", [
    ({}, "bf16"), ({"torch_dtype": "float16"}, "fp16"), ({"dtype": "float16"}, "fp16"),
    ({"dtype": "bfloat16"}, "bf16"), ({"torch_dtype": None}, "bf16")])
def test_dtype_of_a_config(tmp_path, fields, dtype):
    config = {k: v for k, v in CONFIG.items() if k != "torch_dtype"}
    assert model(write(tmp_path / "config.json", {**config, **fields})).dtype == dtype


def test_a_dtype_without_kernels(tmp_path):
    path = write(tmp_path / "config.json", {**CONFIG, "torch_dtype": "float32"})
    with pytest.raises(UnknownModel) as caught:
        keys_for(path)
    assert caught.value.differs == "its dtype is 'float32'" and "dtype='bf16'" in caught.value.remedy
    assert {k.spec["dtype"] for k in keys_for(path, dtype="bf16")} == {"bf16"}, "the remedy works"


@pytest.mark.parametrize("field", ["num_attention_heads", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
                                   "v_head_dim"])
@pytest.mark.parametrize("value", ["absent", None, "128", 1.5])
def test_models_without_mla(tmp_path, field, value):
    config = {**CONFIG, field: value}
    if value == "absent":
        del config[field]
    with pytest.raises(UnknownModel) as caught:
        model(write(tmp_path / "config.json", config))
    assert caught.value.differs == f"it has no {field}" and str(tmp_path) in caught.value.asked


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "\xff", '{"text_config": 3}'])
def test_files_that_are_no_config(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UnknownModel) as caught:
        model(path)
    assert str(path) in caught.value.asked and caught.value.differs


@pytest.mark.parametrize("name", ["gpt-2", "DeepSeek-V3", "", "./nowhere"])
def test_unknown_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModel) as caught:
        model(name)
    assert "deepseek-v3" in caught.value.supported


@pytest.mark.parametrize("tp", [0, -1, 3, 256])
def test_heads_that_do_not_divide(tp):
    with pytest.raises(InvalidArgument, match=f"tp={tp}"):
        keys_for("deepseek-v3", tp=tp)


@pytest.mark.parametrize("options", [{"page_sizes": [64, 0]}, {"page_sizes": [-16]}, {"max_s_q": 0}], ids=str)
def test_sizes_below_one(options):
    with pytest.raises(InvalidArgument, match="1 and more"):
        keys_for("deepseek-v3", **options)


def test_no_page_size():
    assert keys_for("deepseek-v3", page_sizes=[]) == []


def test_an_arch_without_templates_or_without_a_name():
    with pytest.raises(UnknownArch):
        keys_for("deepseek-v3", arch="sm_90")
    assert {key.template for key in keys_for("deepseek-v3", arch="sm_100a")} == {"portable"}


@pytest.mark.parametrize("name, tp, count", [
    ("deepseek-v3", 1, 24),   # 128 rows and more: 4 page sizes x causal or not x row tiles of 64, 32, 16
    ("deepseek-v3", 8, 44),   # 16, 32, 48 and 64 rows: buckets 16 (one token: no limit to speak of), 32 and 64
    ("deepseek-v3", 16, 28),  # 8, 16, 24 and 32 rows
    ("mistral-small-4", 8, 16), ("mistral-small-4", 32, 8)])
def test_how_many(name, tp, count):
    """A server meets a few dozen Keys at most, and with the engine's own page size and s_q far fewer."""
    keys = keys_for(name, tp=tp)
    assert len(keys) == len(set(keys)) == count
    assert len(keys_for(name, tp=tp, page_sizes=[64], max_s_q=1)) == (3 if tp == 1 else 1)


def test_the_public_name():
    assert jitmla.keys_for is keys_for


def test_options_narrow():
    keys = keys_for("deepseek-v3", tp=8, page_sizes=[16, 64], max_s_q=2, dtype="fp16")
    assert {k.spec["page_size"] for k in keys} == {16, 64} and {k.spec["dtype"] for k in keys} == {"fp16"}
    assert {k.spec["rows"] for k in keys} == {16, 32}


# ------------------------------------------------------------------------------------------------- DeepSeek-V4


V4 = {"model_type": "deepseek_v4", "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64, "o_groups": 8,
      "o_lora_rank": 1024, "torch_dtype": "bfloat16"}


def test_output_groups_of_a_config(tmp_path):
    path = write(tmp_path / "config.json", V4)
    assert model(path) == MlaModel("deepseek_v4", 64, 512, 64, 448, 512, "bf16", 8, 1024)
    assert keys_for(path) == keys_for("deepseek-v4-flash") == keys_for("deepseek-v4-pro", tp=16)


@pytest.mark.parametrize("name, tp", [("deepseek-v4-flash", 1), ("deepseek-v4-flash", 4), ("deepseek-v4-pro", 8)])
def test_closure_of_the_output_path(name, tp):
    """Whatever the number of tokens: what the host picks for a call is in the list, and nothing else is."""
    dims = KNOWN[name]
    groups, heads = dims.o_groups // tp, dims.num_attention_heads // tp
    keys, met = keys_for(name, tp=tp), set()
    quant, bmm = [s for s in specs_for(name, tp=tp, arch="sm_90a") if s.op != "fp8_bmm"], fp8_bmm_spec(arch="sm_90a")
    for tokens in [*range(1, 300), *range(300, 20000, 97)]:
        sizes = {"tokens": tokens, "heads": heads, "heads_per_group": heads // groups}
        met |= {registry.choose(s, "auto", sizes).key for s in quant}
        for sms in (78, 114, 132):
            met.add(registry.choose(bmm, "auto", {"groups": groups, "tokens": tokens, "columns": dims.o_lora_rank,
                                                  "k": heads // groups * 512, "sms": sms}).key)
    assert met <= set(keys) and len(keys) == len(set(keys))
    assert {k for k in keys if k.spec.op != "fp8_bmm"} <= met
    assert {(k.spec["positions"], k.spec["scale_mode"]) for k in keys if k.spec.op != "fp8_bmm"} == {
        (p, m) for p in ("i32", "i64") for m in ("pow2_f32", "raw_f32")}


@pytest.mark.parametrize("tp", [3, 16])
def test_groups_are_not_split(tp):
    with pytest.raises(InvalidArgument, match=f"tp={tp}"):
        keys_for("deepseek-v4-flash", tp=tp)


# ------------------------------------------------------------------------------------------------- closure


@st.composite
def servings(draw):
    """A model and how it is served, and one call that the server makes."""
    name = draw(st.sampled_from(sorted(n for n in KNOWN if not KNOWN[n].o_groups)))
    tp = draw(st.sampled_from([t for t in (1, 2, 4, 8, 16, 32, 64, 128) if KNOWN[name].num_attention_heads % t == 0]))
    return (name, tp, draw(st.sampled_from(PAGE_SIZES)), draw(st.integers(1, 4)), draw(st.booleans()),
            draw(st.sampled_from([None, "bf16", "fp16"])), draw(st.integers(0, 3)), draw(st.integers(0, 3)))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(servings())
def test_closure(serving):
    """Whatever batch, lengths, number of pages: the Spec that the op makes of a call is in the list, and its Key too.

    The Spec is made as jitmla.ops.mla_decode makes it, from tensors that the call would hand over."""
    name, tp, page_size, s_q, causal, dtype, batch, pages = serving
    dims = KNOWN[name]
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype or dims.dtype]
    width = dims.kv_lora_rank + dims.qk_rope_head_dim
    q = torch.empty(batch, s_q, dims.num_attention_heads // tp, width, dtype=torch_dtype, device="meta")
    kv_cache = torch.empty(pages, page_size, width, dtype=torch_dtype, device="meta")
    spec = mla_decode_spec(arch="sm_90a", dtype=checks.DTYPE_NAMES[q.dtype], kv_lora_rank=dims.kv_lora_rank,
                           qk_rope_head_dim=q.shape[3] - dims.kv_lora_rank, page_size=kv_cache.shape[1],
                           s_q=q.shape[1], heads=q.shape[2], causal=causal)
    assert spec in specs_for(name, tp=tp, arch="sm_90a", dtype=dtype)
    assert registry.choose(spec).key in keys_for(name, tp=tp, dtype=dtype)
    narrowed = specs_for(name, tp=tp, arch="sm_90a", page_sizes=[page_size], max_s_q=s_q, dtype=dtype)
    assert spec in narrowed and set(narrowed) <= set(specs_for(name, tp=tp, arch="sm_90a", dtype=dtype))


def test_specs_are_no_more_than_needed():
    """Each listed Spec is met by some call: nothing is compiled for nothing."""
    for name, tp in (("deepseek-v3", 16), ("mistral-small-4", 8)):
        dims = KNOWN[name]
        met = {mla_decode_spec(arch="sm_90a", dtype="bf16", kv_lora_rank=dims.kv_lora_rank, qk_rope_head_dim=64,
                               page_size=page, s_q=s_q, heads=dims.num_attention_heads // tp, causal=causal)
               for page in PAGE_SIZES for s_q in range(1, models.MAX_S_Q + 1) for causal in (False, True)}
        assert met == set(specs_for(name, tp=tp, arch="sm_90a"))


@pytest.mark.parametrize("name, tp", [("deepseek-v3", 1), ("deepseek-v3", 16), ("mistral-small-4", 8), ("kimi-k2", 4)])
def test_prefill_when_asked_for(name, tp):
    """What the prefill ops launch, and nothing else, is added."""
    dims, heads = KNOWN[name], KNOWN[name].num_attention_heads // tp
    added = set(specs_for(name, tp=tp, arch="sm_90a", uses=["prefill"])) - set(specs_for(name, tp=tp, arch="sm_90a"))
    groups = {mla_decode_spec(arch="sm_90a", dtype="bf16", kv_lora_rank=dims.kv_lora_rank, qk_rope_head_dim=64,
                              page_size=page, s_q=group_size(heads, new), heads=heads, causal=True)
              for page in PAGE_SIZES for new in range(1, 600)}
    assert groups <= set(specs_for(name, tp=tp, arch="sm_90a", uses=["prefill"]))
    assert {s for s in added if s.op == "mla_decode"} <= groups
    facts = {(s.op, *(v for k, v in s if k not in ("op", "arch", "dtype"))) for s in added if s.op != "mla_decode"}
    qk, width = dims.qk_nope_head_dim + 64, dims.kv_lora_rank + 64
    assert facts == {("mla_prefill", qk, 128, 64, True), ("mla_prefill", qk, 128, 64, False),
                     ("merge_attn_states", "fp32", 128), ("merge_attn_states", "bf16", 128), ("gather_latent", width)}
    assert {s.op for s in map(lambda k: k.spec, keys_for(name, tp=tp, uses=["prefill"]))} == {
        "mla_decode", "mla_prefill", "merge_attn_states", "gather_latent"}


def test_max_s_q_that_no_kernel_serves():
    with pytest.raises(JitmlaError):
        keys_for("deepseek-v3", max_s_q=5)  # 640 rows


# ------------------------------------------------------------------------------------------------- the slot cache


@pytest.mark.parametrize("name, tp", [("mistral-small-4", 1), ("mistral-small-4", 8), ("deepseek-v3", 1)])
def test_closure_of_the_slot_cache(name, tp):
    """Whatever the sequences and their tokens: the tile that cached_mla makes of them is one whose kernel is listed,
    and every listed one is met."""
    dims, heads = KNOWN[name], KNOWN[name].num_attention_heads // tp
    listed = specs_for(name, tp=tp, arch="sm_90a", page_sizes=[64], max_s_q=1, uses=["slot_cache"])
    one = mla_decode_spec(arch="sm_90a", dtype="bf16", kv_lora_rank=dims.kv_lora_rank, qk_rope_head_dim=64,
                          page_size=64, s_q=1, heads=heads, causal=True)
    met = {mla_decode_spec(arch="sm_90a", dtype="bf16", kv_lora_rank=dims.kv_lora_rank, qk_rope_head_dim=64,
                           page_size=64, s_q=schedule.context_tile(heads, sequences, tokens), heads=heads, causal=True)
           for sequences in (1, 2, 7) for tokens in range(1, 5000, 3)}
    prefix = {mla_decode_spec(arch="sm_90a", dtype="bf16", kv_lora_rank=dims.kv_lora_rank, qk_rope_head_dim=64,
                              page_size=64, s_q=schedule.most_tile(heads), heads=heads, causal=False)}
    assert met | prefix | {one} == {s for s in listed if s.op == "mla_decode"}
    assert {s["stage"] for s in listed if s.op == "cached_mla"} == {"absorb", "pack", "project"}
    assert [s["causal"] for s in listed if s.op == "mla_prefill"] == [True]
    assert {(s["slots"], s["e4m3_cache"]) for s in listed if s.op == "append_latent"} == {("i64", False), ("i64", True)}
    plain, slots = (set(keys_for(name, tp=tp, page_sizes=[64], uses=uses)) for uses in ((), ["slot_cache"]))
    assert plain < slots
    elsewhere = specs_for(name, tp=tp, arch="sm_80", page_sizes=[64], max_s_q=1, uses=["slot_cache"])
    assert {s.op for s in elsewhere} == {s.op for s in listed} and {s["arch"] for s in elsewhere} == {"sm_80"}
    e4m3 = specs_for(name, tp=tp, arch="sm_90a", page_sizes=[64], max_s_q=1, uses=["slot_cache", "e4m3_cache"])
    assert {s["e4m3_cache"] for s in e4m3 if s.op == "cached_mla" and s["stage"] == "pack"} == {False, True}


# ------------------------------------------------------------------------------------------------------------- uses


def test_a_use_adds_its_keys_and_no_other():
    plain = set(keys_for("deepseek-v3", tp=8))
    for use in models.USES:
        more = {key.spec for key in keys_for("deepseek-v3", tp=8, uses=[use])} - {key.spec for key in plain}
        facts = {"e4m3_cache": ("kv_dtype", "e4m3"), "compact": ("compact", True), "split_cache": ("split_cache", True),
                 "batch_invariant": ("batch_invariant", True)}.get(use)
        assert more and plain < set(keys_for("deepseek-v3", tp=8, uses=use))
        assert facts is None or all(spec[facts[0]] == facts[1] for spec in more)


def test_an_unknown_use():
    with pytest.raises(InvalidArgument, match="cached") as caught:
        keys_for("deepseek-v3", uses=["cached"])
    assert all(use in str(caught.value) for use in models.USES)
