"""jitmla: Multi-head Latent Attention kernels, generated for your GPU, compiled once, cached on disk.

Importing this package loads neither torch nor the compiler; each public name brings what it needs on its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# modules of jitmla.ops, each with that function
OPS = ("mla_decode", "mla_prefill", "mla_prefill_absorbed", "mla_prefill_paged", "merge_attn_states", "gather_latent",
       "append_latent", "cached_mla", "inv_rope_fp8_quant", "fp8_bmm", "o_a_proj", "sparse_mla_decode",
       "sparse_mla_prefill",
       "indexer_prologue", "cat_quant_fp8", "indexer_k_scatter", "indexer_k_gather", "kv_row_pack", "dsa_append",
       "fp8_mqa_logits", "fp8_paged_mqa_logits", "topk_indices", "local_to_global")
_WHERE = {
    **{op: f"jitmla.ops.{op}" for op in OPS},
    "keys_for": "jitmla.models",
    "explain": "jitmla.why",
    "warm": "jitmla.dispatch",
    "freeze": "jitmla.dispatch",
    "use_tunings": "jitmla.tune",
    "tunings": "jitmla.tune",
    "stats": "jitmla.events",
    "prometheus": "jitmla.events",
    "subscribe": "jitmla.events",
    "Key": "jitmla.key",
    "Spec": "jitmla.spec",
    "JitmlaError": "jitmla.errors",
}
_PACKAGES = ("compat", "dsa", "engines")  # their modules as well come without an import of their own
__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from .dispatch import freeze as freeze
    from .dispatch import warm as warm
    from .errors import JitmlaError as JitmlaError
    from .events import prometheus as prometheus
    from .events import stats as stats
    from .events import subscribe as subscribe
    from .key import Key as Key
    from .models import keys_for as keys_for
    from .ops.append_latent import append_latent as append_latent
    from .ops.cached_mla import cached_mla as cached_mla
    from .ops.cat_quant_fp8 import cat_quant_fp8 as cat_quant_fp8
    from .ops.dsa_append import dsa_append as dsa_append
    from .ops.fp8_bmm import fp8_bmm as fp8_bmm
    from .ops.fp8_mqa_logits import fp8_mqa_logits as fp8_mqa_logits
    from .ops.fp8_paged_mqa_logits import fp8_paged_mqa_logits as fp8_paged_mqa_logits
    from .ops.gather_latent import gather_latent as gather_latent
    from .ops.indexer_k_gather import indexer_k_gather as indexer_k_gather
    from .ops.indexer_k_scatter import indexer_k_scatter as indexer_k_scatter
    from .ops.indexer_prologue import indexer_prologue as indexer_prologue
    from .ops.inv_rope_fp8_quant import inv_rope_fp8_quant as inv_rope_fp8_quant
    from .ops.kv_row_pack import kv_row_pack as kv_row_pack
    from .ops.local_to_global import local_to_global as local_to_global
    from .ops.merge_attn_states import merge_attn_states as merge_attn_states
    from .ops.mla_decode import mla_decode as mla_decode
    from .ops.mla_prefill import mla_prefill as mla_prefill
    from .ops.mla_prefill_absorbed import mla_prefill_absorbed as mla_prefill_absorbed
    from .ops.mla_prefill_paged import mla_prefill_paged as mla_prefill_paged
    from .ops.o_a_proj import o_a_proj as o_a_proj
    from .ops.sparse_mla_decode import sparse_mla_decode as sparse_mla_decode
    from .ops.sparse_mla_prefill import sparse_mla_prefill as sparse_mla_prefill
    from .ops.topk_indices import topk_indices as topk_indices
    from .spec import Spec as Spec
    from .tune import tunings as tunings
    from .tune import use_tunings as use_tunings
    from .why import explain as explain


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'jitmla' has no attribute {name!r}; it has {', '.join(__all__)}, and "
                             f"{', '.join(_PACKAGES)}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__) | set(_PACKAGES))
