"""The MLA dimensions of known models, and every Key that a model can reach: `keys_for`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import arch as arches
from . import registry
from .errors import InvalidArgument, UnknownModel
from .key import Key
from .schedule import MAX_ROWS
from .spec import (
    Spec,
    append_latent_spec,
    cached_mla_pack_spec,
    cached_mla_specs,
    fp8_bmm_spec,
    gather_latent_spec,
    inv_rope_fp8_quant_spec,
    merge_attn_states_spec,
    mla_decode_spec,
    mla_prefill_spec,
    sparse_mla_spec,
)
from .spec_indexer import (
    cat_quant_fp8_spec,
    dsa_append_spec,
    fp8_mqa_logits_spec,
    fp8_paged_mqa_logits_spec,
    indexer_k_spec,
    indexer_prologue_spec,
    kv_row_pack_spec,
    local_to_global_spec,
    topk_indices_spec,
)

PAGE_SIZES = (16, 32, 64, 128)
MAX_S_Q = 4
MAX_GROUP_ROWS = 512  # (token, head) rows that jitmla.mla_prefill_absorbed takes together
USES = {  # what a server may use beside plain mla_decode, each with kernels of its own
    "prefill": "mla_prefill, mla_prefill_absorbed, mla_prefill_paged",
    "slot_cache": "append_latent, cached_mla",
    "e4m3_cache": "mla_decode over an e4m3 cache, with q in e4m3 or not",
    "compact": "mla_decode with cu_seqlens_q",
    "split_cache": "mla_decode over a cache of two tensors",
    "batch_invariant": "mla_decode with batch_invariant=True",
}


@dataclass(frozen=True)
class MlaModel:
    """What MLA needs to know of a model. Names and units are those of its Hugging Face config.

    index_n_heads: of the indexer of DeepSeek Sparse Attention, else 0.
    o_groups, o_lora_rank: of an output projection in groups (DeepSeek-V4), else 0. Such a model has keys and values of
    one latent row, whose last qk_rope_head_dim columns are rotated.
    """

    name: str
    num_attention_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    dtype: str = "bf16"
    o_groups: int = 0
    o_lora_rank: int = 0
    index_n_heads: int = 0


KNOWN = {m.name: m for m in (
    MlaModel("deepseek-v2", 128, 512, 64, 128, 128),
    MlaModel("deepseek-v2-lite", 16, 512, 64, 128, 128),
    MlaModel("deepseek-v3", 128, 512, 64, 128, 128),
    MlaModel("deepseek-v3.2", 128, 512, 64, 128, 128, index_n_heads=64),
    MlaModel("kimi-k2", 64, 512, 64, 128, 128),
    MlaModel("mistral-small-4", 32, 256, 64, 64, 128),
    MlaModel("deepseek-v4-flash", 64, 512, 64, 448, 512, o_groups=8, o_lora_rank=1024),
    MlaModel("deepseek-v4-pro", 128, 512, 64, 448, 512, o_groups=16, o_lora_rank=1024),
)}
_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}


def model(name_or_path: str | Path, dtype: str | None = None) -> MlaModel:
    """A known model by name, or one read from a Hugging Face `config.json` (or a folder that holds one).

    dtype: "bf16" or "fp16", instead of the model's own. Raises UnknownModel.
    """
    if str(name_or_path) in KNOWN:
        known = KNOWN[str(name_or_path)]
        return replace(known, dtype=dtype or known.dtype)
    path = Path(name_or_path)
    if folder := path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UnknownModel(f"model {str(name_or_path)!r}",
                           supported=", ".join(KNOWN) + ", or the path of a config.json",
                           differs="the folder has no config.json" if folder else
                           "it is neither a known name nor a file",
                           remedy="save the model's config.json and name its path")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UnknownModel(f"model config {path}", supported="a Hugging Face config.json", differs=str(e),
                           remedy="download it again: a file of Git LFS may be only a pointer") from e
    return _from_config(config, path, dtype)


def _from_config(config: Any, path: Path, dtype: str | None) -> MlaModel:
    # multimodal models keep the language model's dimensions apart
    text = config.get("text_config", config) if isinstance(config, dict) else config
    if not isinstance(text, dict):
        raise UnknownModel(f"model config {path}", supported="a Hugging Face config.json",
                           differs=f"it holds a {type(text).__name__} instead of an object",
                           remedy="name the config.json of the model itself")
    if isinstance(text.get("o_groups"), int) and isinstance(text.get("head_dim"), int):  # DeepSeek-V4
        width = text["head_dim"]
        text = {"kv_lora_rank": width, "qk_nope_head_dim": width - text.get("qk_rope_head_dim", 0), "v_head_dim": width,
                "o_lora_rank": 0, **text}
    fields = ("num_attention_heads", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    missing = [f for f in fields if not isinstance(text.get(f), int)]
    if missing:
        raise UnknownModel(f"model config {path}", supported="a model with Multi-head Latent Attention",
                           differs=f"it has no {', '.join(missing)}",
                           remedy="there are no kernels for attention of other kinds")
    own = next((c[n] for c in (text, config) for n in ("torch_dtype", "dtype") if c.get(n)), "bfloat16")
    if dtype is None and own not in _DTYPES:
        raise UnknownModel(f"model config {path}", supported=" or ".join(_DTYPES), differs=f"its dtype is {own!r}",
                           remedy="name the dtype that the kernels run in: dtype='bf16'")
    return MlaModel(str(config.get("model_type", path.parent.name)), *(text[f] for f in fields),
                    dtype=dtype or _DTYPES[own], o_groups=text.get("o_groups", 0),
                    o_lora_rank=text.get("o_lora_rank", 0), index_n_heads=text.get("index_n_heads", 0))


def specs_for(name_or_path: str | Path, *, tp: int, arch: str, page_sizes: Iterable[int] = PAGE_SIZES,
              max_s_q: int = MAX_S_Q, dtype: str | None = None, uses: Iterable[str] = ()) -> list[Spec]:
    """Every Spec that serving the model can meet: any batch and lengths, s_q up to max_s_q, causal or not, and whatever
    goes with `uses` (see USES); for DeepSeek-V4 those of its output path (attention itself is not served yet), with
    positions of 32 or 64 bits and both float32 scales."""
    arches.check(arch)
    dims = model(name_or_path, dtype)
    if tp < 1 or dims.num_attention_heads % tp:
        raise InvalidArgument(f"tp={tp} for {dims.name}",
                              supported=f"a divisor of its {dims.num_attention_heads} heads",
                              differs="heads cannot be split evenly", remedy="choose another --tp")
    used = frozenset((uses,) if isinstance(uses, str) else uses)
    if not used <= USES.keys():
        raise InvalidArgument(f"the kernels for {', '.join(sorted(used - USES.keys()))}", supported=", ".join(USES),
                              differs="there is no such use", remedy="`jitmla prewarm --help` lists them")
    sizes = tuple(page_sizes)
    if (least := min([*sizes, max_s_q])) < 1:
        raise InvalidArgument(f"page sizes {sizes} and up to {max_s_q} query tokens", supported="1 and more",
                              differs=f"{least}", remedy="choose another --page-size or --max-s-q")
    serving = Serving(dims, dims.num_attention_heads // tp, tp, arch, sizes, max_s_q, used)
    return list(dict.fromkeys(spec for part in PARTS for spec in part(serving)))


@dataclass(frozen=True)
class Serving:
    """How a model is served: heads is what each of tp ranks has."""

    dims: MlaModel
    heads: int
    tp: int
    arch: str
    page_sizes: tuple[int, ...]
    max_s_q: int
    uses: frozenset[str]

    def with_and_without(self, use: str) -> tuple[bool, ...]:
        return (False, True) if use in self.uses else (False,)


def _dense_decode(serving: Serving) -> Iterator[Spec]:
    dims = serving.dims
    if dims.o_groups:
        return
    caches: list[tuple[str, str | None]] = [(dims.dtype, None)]
    if "e4m3_cache" in serving.uses:
        caches += [(dims.dtype, "e4m3"), ("e4m3", None)]
    options = itertools.product(*map(serving.with_and_without, ("split_cache", "compact", "batch_invariant")))
    for (dtype, kv_dtype), (split, compact, invariant), page_size, s_q, causal in itertools.product(
            caches, list(options), serving.page_sizes, range(1, serving.max_s_q + 1), (True, False)):
        yield mla_decode_spec(arch=serving.arch, dtype=dtype, kv_dtype=kv_dtype, kv_lora_rank=dims.kv_lora_rank,
                              qk_rope_head_dim=dims.qk_rope_head_dim, page_size=page_size, s_q=s_q,
                              heads=serving.heads, causal=causal, split_cache=split, compact=compact,
                              batch_invariant=invariant)


def _slot_cache(serving: Serving) -> Iterator[Spec]:
    """append_latent, and what cached_mla launches: before and after the attention, and that for tiles of tokens (those
    of one are in _dense_decode); in the MHA form, which auto takes for many tokens where it has a kernel, new tokens
    through mla_prefill, and the largest tiles over prefixes."""
    dims = serving.dims
    if dims.o_groups or "slot_cache" not in serving.uses:
        return
    for e4m3 in (False, True):
        yield append_latent_spec(arch=serving.arch, dtype=dims.dtype, e4m3_cache=e4m3, slots="i64",
                                 kv_lora_rank=dims.kv_lora_rank, qk_rope_head_dim=dims.qk_rope_head_dim)
    tiles = [2**i for i in range(1, MAX_ROWS.bit_length()) if 2**i * serving.heads <= MAX_ROWS]
    mha = mla_prefill_spec(arch=serving.arch, dtype=dims.dtype, v_head_dim=dims.v_head_dim, causal=True,
                           qk_head_dim=dims.qk_nope_head_dim + dims.qk_rope_head_dim,
                           qk_rope_head_dim=dims.qk_rope_head_dim)
    with_mha = bool(registry.candidates(mha))
    if with_mha:
        yield mha
    for e4m3 in serving.with_and_without("e4m3_cache"):
        facts = {"arch": serving.arch, "dtype": dims.dtype, "kv_lora_rank": dims.kv_lora_rank,
                 "qk_rope_head_dim": dims.qk_rope_head_dim}
        yield from cached_mla_specs(**facts, qk_nope_head_dim=dims.qk_nope_head_dim, e4m3_cache=e4m3)
        if with_mha:
            yield cached_mla_pack_spec(**facts, qk_nope_head_dim=dims.qk_nope_head_dim, e4m3_cache=e4m3)
        seen = [(tile, True) for tile in tiles] + ([(tiles[-1], False)] if with_mha else [])
        for page_size, (tile, causal) in itertools.product(serving.page_sizes, seen):
            yield mla_decode_spec(**facts, kv_dtype="e4m3" if e4m3 else None, page_size=page_size, s_q=tile,
                                  heads=serving.heads, causal=causal)


def _prefill(serving: Serving) -> Iterator[Spec]:
    """The MHA form, with chunks of a cached prefix: new tokens causally, chunks not, merged in float32 or as they are;
    and the absorbed form, whose groups of tokens fill the rows of decode kernels."""
    dims = serving.dims
    if dims.o_groups or "prefill" not in serving.uses:
        return
    for causal in (True, False):
        yield mla_prefill_spec(arch=serving.arch, dtype=dims.dtype, v_head_dim=dims.v_head_dim, causal=causal,
                               qk_head_dim=dims.qk_nope_head_dim + dims.qk_rope_head_dim,
                               qk_rope_head_dim=dims.qk_rope_head_dim)
    for acc_dtype in ("fp32", dims.dtype):
        yield merge_attn_states_spec(arch=serving.arch, dtype=dims.dtype, acc_dtype=acc_dtype,
                                     v_head_dim=dims.v_head_dim)
    yield gather_latent_spec(arch=serving.arch, dtype=dims.dtype, width=dims.kv_lora_rank + dims.qk_rope_head_dim)
    for page_size, rows in itertools.product(serving.page_sizes, range(10)):
        s_q = min(1 << rows, MAX_GROUP_ROWS // serving.heads)
        yield mla_decode_spec(arch=serving.arch, dtype=dims.dtype, kv_lora_rank=dims.kv_lora_rank,
                              qk_rope_head_dim=dims.qk_rope_head_dim, page_size=page_size, s_q=s_q,
                              heads=serving.heads, causal=True)


def _output_path(serving: Serving) -> Iterator[Spec]:
    dims = serving.dims
    if not dims.o_groups:
        return
    if dims.o_groups % serving.tp:
        raise InvalidArgument(f"tp={serving.tp} for {dims.name}", differs="a group is not split",
                              supported=f"a divisor of its {dims.o_groups} output groups", remedy="choose another --tp")
    for positions, mode in itertools.product(("i64", "i32"), ("pow2_f32", "raw_f32")):
        yield inv_rope_fp8_quant_spec(arch=serving.arch, dtype=dims.dtype, positions=positions,
                                      nope_dim=dims.qk_nope_head_dim, rope_dim=dims.qk_rope_head_dim, group_size=128,
                                      scale_mode=mode, neox=False)
    yield fp8_bmm_spec(arch=serving.arch)


def _indexer(serving: Serving) -> Iterator[Spec]:
    heads, arch = serving.dims.index_n_heads, serving.arch
    if not heads:
        return
    for positions, w_dtype, ln_dtype in itertools.product(("i64", "i32"), ("fp32", "bf16"), ("fp32", "bf16")):
        yield indexer_prologue_spec(arch=arch, heads=heads, rope_interleave=False, scale_mode="pow2_f32",
                                    hadamard=False, k_dtype="bf16", w_dtype=w_dtype, ln_dtype=ln_dtype,
                                    positions=positions)
    yield cat_quant_fp8_spec(arch=arch, scale_mode="pow2_f32")
    yield from (indexer_k_spec(op, arch=arch) for op in ("indexer_k_scatter", "indexer_k_gather"))
    yield from (kv_row_pack_spec(arch=arch, row=row) for row in ("fp8", "bf16"))
    yield from (dsa_append_spec(arch=arch, row=row, index_keys=keys, positions=positions) for row, keys, positions in
                itertools.product(("fp8", "bf16"), (True, False), ("i64", "i32")))
    yield from (fp8_mqa_logits_spec(arch=arch, heads=heads, store=store) for store in ("tiles", "clean"))
    yield from (fp8_paged_mqa_logits_spec(arch=arch, heads=heads, next_n=n) for n in (1, 2))
    yield from (topk_indices_spec(arch=arch, rows=rows) for rows in ("windows", "lengths"))
    yield from (local_to_global_spec(arch=arch, workspace=workspace, count=count)
                for workspace, count in itertools.product((False, True), (False, True)))


def _sparse_attention(serving: Serving) -> Iterator[Spec]:
    """sparse_mla_decode over rows of either format, and sparse_mla_prefill, whose rows are bf16 and whose Spec is the
    same."""
    dims = serving.dims
    if not dims.index_n_heads or dims.o_groups:
        return
    for kv_format in ("fp8", "bf16"):
        yield sparse_mla_spec(arch=serving.arch, kv_format=kv_format, kv_lora_rank=dims.kv_lora_rank,
                              qk_rope_head_dim=dims.qk_rope_head_dim, heads=serving.heads)


# what each part of a model meets
PARTS = (_dense_decode, _prefill, _slot_cache, _output_path, _indexer, _sparse_attention)


def keys_for(model: str | Path, tp: int = 1, arch: str = "sm_90a", *, page_sizes: Iterable[int] = PAGE_SIZES,
             max_s_q: int = MAX_S_Q, dtype: str | None = None, uses: Iterable[str] = (), backend: str = "auto"
             ) -> list[Key]:
    """Every Key that serving `model` can reach on `arch` with `tp` ranks, whatever the batch and the lengths. Where the
    host picks a variant for each call, all that it can pick are here.

    model: a known name (deepseek-v2, deepseek-v2-lite, deepseek-v3, deepseek-v3.2, deepseek-v4-flash, deepseek-v4-pro,
    kimi-k2, mistral-small-4), or the path of a Hugging Face config.json. page_sizes: those of the engine's cache.
    max_s_q: query tokens per request (1 + draft tokens; with compact queries, max_q_len). dtype: "bf16" or "fp16", by
    default the config's. uses: what the server uses beside plain mla_decode, of "prefill" (jitmla's prefill ops),
    "slot_cache" (append_latent and cached_mla), "e4m3_cache", "compact" (cu_seqlens_q), "split_cache" (a cache of two
    tensors) and "batch_invariant". backend: what its calls of mla_decode name. Raises UnknownModel, UnknownArch,
    InvalidArgument, NoTemplate.
    """
    specs = specs_for(model, tp=tp, arch=arch, page_sizes=page_sizes, max_s_q=max_s_q, dtype=dtype, uses=uses)
    return list(dict.fromkeys(choice.key for spec in specs for choice in registry.choices(
        spec, backend if spec.op == "mla_decode" else "auto")))
