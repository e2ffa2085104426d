"""The key space is closed: whatever a server of a model calls, keys_for has listed its Key."""

import functools

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import jitmla
from jitmla import dispatch, registry
from jitmla.models import KNOWN, MAX_S_Q, PAGE_SIZES, keys_for

torch = pytest.importorskip("torch")
fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")

TP = (1, 2, 4, 8, 16, 32, 64, 128)
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE = "cuda:0"
FEATURES = ("e4m3_cache", "compact", "split_cache", "batch_invariant")  # of models.USES, those of mla_decode


class Planned(Exception):
    """Raised in the place of the launch: the op has made its Spec, and asks for the Plan."""


@st.composite
def calls(draw):
    """(how a model is served, what it uses, one call that its server makes). Sizes from everyday to absurd; empty ones
    too."""
    name = draw(st.sampled_from(sorted(name for name, dims in KNOWN.items() if not dims.o_groups)))
    tp = draw(st.sampled_from([t for t in TP if KNOWN[name].num_attention_heads % t == 0]))
    dtype = draw(st.sampled_from([None, "bf16", "fp16"]))
    uses = draw(st.sets(st.sampled_from(FEATURES)))
    page_size = draw(st.sampled_from(PAGE_SIZES if not uses else (*PAGE_SIZES, 1, 7, 64)))
    s_q, batch = draw(st.integers(1, MAX_S_Q)), draw(st.one_of(st.integers(1, 9), st.integers(1, 5000)))
    pages, table = draw(st.integers(0, 1 << 26)), draw(st.integers(0, 1 << 15))
    options = {name: draw(st.booleans()) for name in ("causal", "sinks", "out", "lse", "return_lse", "padded", "e4m3_q",
                                                      *sorted(uses))}
    form = draw(st.sampled_from(["joined", "pair", "views", "list"]))
    backend = draw(st.sampled_from(["auto", "portable"] if uses else ["auto", "sm90"]))
    return (name, tp, dtype), tuple(sorted(uses)), (page_size, s_q, batch, pages, table, options, form, backend)


def arguments(serving, call):
    """What the server hands over: tensors of a GPU with no memory behind them."""
    name, tp, dtype = serving
    page_size, s_q, batch, pages, table, options, form, backend = call
    dims = KNOWN[name]
    heads, rank, rope = dims.num_attention_heads // tp, dims.kv_lora_rank, dims.qk_rope_head_dim
    out_kind = kv_kind = kind = TORCH_DTYPES[dtype or dims.dtype]
    features = {}
    if options.get("e4m3_cache"):
        kv_kind = torch.float8_e4m3fn
        features["kv_descale"] = 0.5
        if options["e4m3_q"]:
            kind, out_kind = kv_kind, torch.bfloat16
            features["q_descale"] = torch.ones(1, device=DEVICE)
    if options.get("batch_invariant"):
        features["batch_invariant"] = True
    lead = (batch, s_q)
    if options.get("compact"):
        lead = (batch * s_q,)
        features |= {"cu_seqlens_q": torch.zeros(batch + 1, dtype=torch.int32, device=DEVICE), "max_q_len": s_q}

    def empty(*shape, dtype=kind):
        pad = 16 if options["padded"] and dtype in (kind, kv_kind, out_kind) else 0
        return torch.empty(*shape[:-1], shape[-1] + pad, dtype=dtype, device=DEVICE).narrow(-1, 0, shape[-1])

    if form == "joined":
        q = empty(*lead, heads, rank + rope)
    elif form == "views":
        both = empty(*lead, heads, rank + rope)
        q = both.narrow(-1, 0, rank), both.narrow(-1, rank, rope)
    else:
        q = (tuple if form == "pair" else list)((empty(*lead, heads, rank), empty(*lead, heads, rope)))
    cache = empty(pages, page_size, rank + rope, dtype=kv_kind)
    if options.get("split_cache"):
        cache = empty(pages, page_size, rank, dtype=kv_kind), empty(pages, page_size, rope, dtype=kv_kind)
    given = {"sinks": empty(heads, dtype=torch.float32), "out": empty(*lead, heads, rank, dtype=out_kind),
             "lse": empty(*lead, heads, dtype=torch.float32)}
    return (q, cache, empty(batch, table, dtype=torch.int32), empty(batch, dtype=torch.int32)), features | {
        "kv_lora_rank": rank, "sm_scale": 0.1352, "causal": options["causal"], "return_lse": options["return_lse"],
        "backend": backend, **{n: t for n, t in given.items() if options[n]}}


@functools.cache
def listed(name, tp, dtype, **narrowed):
    return {key.digest if key.toolchain else key for key in keys_for(name, tp=tp, dtype=dtype, **narrowed)}


@pytest.fixture(scope="module")
def gpu():
    """A GPU as far as the op can see before it launches: `gpu(call)` is what it asks of jitmla.dispatch."""
    def plan_for(spec, backend, device, **sizes):
        raise Planned(spec, backend, device, sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "plan_for", plan_for)
        patch.setattr(dispatch, "arch_of", lambda device: "sm_90a")
        patch.setattr(dispatch, "sm_count", lambda device: 132)

        def ask(args, kwargs):
            with pytest.raises(Planned) as caught:
                jitmla.mla_decode(*args, **kwargs)
            return caught.value.args

        yield ask


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(calls())
def test_no_call_meets_a_key_that_is_not_listed(gpu, case):
    serving, uses, call = case
    page_size, s_q = call[:2]
    with fake_tensor.FakeTensorMode():
        spec, backend, device, sizes = gpu(*arguments(serving, call))
    assert str(device) == DEVICE
    key = registry.choose(spec, backend, sizes).key
    met = key.digest if key.toolchain else key
    if page_size in PAGE_SIZES and not uses:
        assert met in listed(*serving)
    narrowed = {"page_sizes": (page_size,), "max_s_q": s_q, "uses": uses, "backend": backend}
    assert met in listed(*serving, **narrowed), "narrowed to what the engine says it uses"
    event(f"{key.template}, {spec['rows']} rows")


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_the_recorder_sees_what_is_not_listed(gpu):
    """The test above can fail: a page size that the server did not name is another Key."""
    with fake_tensor.FakeTensorMode():
        spec, backend, _, sizes = gpu(*arguments(("deepseek-v3", 8, None), (
            32, 1, 4, 10, 10, dict.fromkeys(("causal", "sinks", "out", "lse", "return_lse", "padded"), False),
            "joined", "auto")))
    key = registry.choose(spec, backend, sizes).key
    assert key in keys_for("deepseek-v3", tp=8) and key not in keys_for("deepseek-v3", tp=8, page_sizes=[64])
