"""An attention layer with DeepSeek Sparse Attention as two PyTorch ops: docs/dsa.md.

    jitmla::mla_dsa_proj            token-wise: projections, norms, the indexer's queries and keys. Capturable at any
                                    padded size
    jitmla::mla_dsa_attn_inplace    what depends on the batch: caches, logits, top-k, attention. Splits a piecewise
                                    graph

Importing this package registers the ops.
"""

from . import torch_ops as torch_ops
from .batch import Batch as Batch
from .batch import Context as Context
from .batch import Generation as Generation
from .batch import forward as forward
from .layer import Config as Config
from .layer import Layer as Layer
from .layer import Weights as Weights
