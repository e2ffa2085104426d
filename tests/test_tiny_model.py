"""A two-layer MLA model (examples/tiny_mla.py) through the cache agrees with its full recomputation in float64.

Token by token, prefilled at once or in chunks, decoded one by one or several at once (MTP), in a paged or a slot cache.
Attention is in fp16, all else in float64, so that what differs is attention alone.
"""

import importlib.util
import sys

import pytest
import torch

import jitmla

from .conftest import REPOSITORY

LIMIT = 2e-3  # relative L2 error of a token's logits: fp16 has a roundoff of 5e-4
PROMPTS = (1, 17, 40)
LENGTH = 46  # tokens of each sequence in the end


def load_example():
    spec = importlib.util.spec_from_file_location("tiny_mla", REPOSITORY / "examples" / "tiny_mla.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tiny = load_example()


@pytest.fixture(scope="module")
def model():
    config = tiny.Config(hidden_size=128, vocab_size=64, kv_lora_rank=64, qk_rope_head_dim=16)
    return tiny.TinyMla(config, seed=3, dtype=torch.float64)


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(64, (len(PROMPTS), LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def exact(model, sequences):
    """Logits [sequences, LENGTH, vocab] of the full recomputation."""
    return torch.stack([tiny.plain(model, tokens) for tokens in sequences])


def off(got, exact):
    """The largest relative error of a token, [.., vocab]."""
    return float(((got - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


class Slots:
    """The model over a slot cache, with cached_mla: any numbers of new tokens in one call."""

    def __init__(self, model, sequences, max_seq_len=64):
        c, self.model = model.config, model
        self.cache = [torch.full((sequences + 1, max_seq_len, c.kv_lora_rank + c.qk_rope_head_dim), float("nan"),
                                 dtype=torch.float16) for _ in model.layers]
        self.lengths = [0] * sequences

    def step(self, news, decode=()):
        """Logits of each of the new tokens: news {sequence: tokens}; those in `decode` have one token, and go last."""
        order = [*(i for i in news if i not in decode), *decode]
        tokens = [news[i] for i in order]
        counts = [len(t) for t in tokens]
        positions = torch.cat([self.lengths[i] + torch.arange(n) for i, n in zip(order, counts, strict=True)])
        cached = [self.lengths[i] for i in order]
        starts = [sum(counts[:k]) for k in range(len(order))]
        for i, n in zip(order, counts, strict=True):
            self.lengths[i] += n

        def ints(values):
            return torch.tensor(values, dtype=torch.int32)

        def attend(layer, q_nope, q_pe, latent, k_pe, kv_b):
            half = [x.half()[None] for x in (q_nope, q_pe, latent, k_pe[:, None])]
            return jitmla.cached_mla(*half, kv_b.flatten(0, 1).half(), self.cache[layer], seq_len=ints(counts),
                                     input_pos=ints(cached), slot_idx=ints(order), cu_seqlen=ints(starts),
                                     num_prefill=len(order) - len(decode), prefill_tokens=sum(counts) - len(decode),
                                     num_decode=len(decode), sm_scale=self.model.config.sm_scale)[0]

        logits = self.model.forward(torch.cat(tokens), positions, attend)
        return dict(zip(order, logits.split(counts), strict=True))


@pytest.mark.parametrize("chunk, new", [(100, 1), (16, 2), (5, 3), (1, 1)])
def test_paged(model, sequences, exact, chunk, new):
    """append_latent and mla_decode: prompts of several lengths in chunks, then `new` tokens of all at once, with the
    drafts of the step before rejected: their rows are written again."""
    paged = tiny.Paged(model, len(PROMPTS), page_size=16, dtype=torch.float16)
    for i, prompt in enumerate(PROMPTS):
        for at in range(0, prompt, chunk):
            end = min(at + chunk, prompt)
            got = paged.step(torch.tensor([i]), sequences[i:i + 1, at:end])
            assert off(got[0], exact[i, at:end]) < LIMIT
    everyone = torch.arange(len(PROMPTS))
    while int(paged.lengths.max()) + new <= LENGTH:
        at = paged.lengths.long()[:, None] + torch.arange(new)
        rejected = sequences.gather(1, at).clone()
        rejected[:, 1:] = (rejected[:, 1:] + 7) % 64
        paged.step(everyone, rejected)
        paged.lengths -= new
        got = paged.step(everyone, sequences.gather(1, at))
        assert off(got, exact[everyone[:, None], at]) < LIMIT


@pytest.mark.parametrize("chunk", [100, 16, 5])
def test_slots(model, sequences, exact, chunk):
    """cached_mla: chunks of some sequences beside decode of others, until all are at their end."""
    slots = Slots(model, len(PROMPTS))
    while min(slots.lengths) < LENGTH:
        news = {}
        for i, prompt in enumerate(PROMPTS):
            at = slots.lengths[i]
            end = min(at + chunk, prompt) if at < prompt else min(at + 1, LENGTH)
            if end > at:
                news[i] = sequences[i, at:end]
        decode = [i for i in news if slots.lengths[i] >= PROMPTS[i]]
        before = dict(enumerate(slots.lengths))
        for i, got in slots.step(news, decode).items():
            assert off(got, exact[i, before[i]:before[i] + len(news[i])]) < LIMIT


def test_a_wrong_mask_is_seen(model, sequences, exact, monkeypatch):
    """The limit is tight enough: without the causal limit among the new tokens the results are far off."""
    decode = jitmla.mla_decode
    monkeypatch.setattr(jitmla, "mla_decode", lambda *args, **options: decode(*args, **options, causal=False))
    paged = tiny.Paged(model, 1, page_size=16, dtype=torch.float16)
    paged.step(torch.tensor([0]), sequences[:1, :20])
    got = paged.step(torch.tensor([0]), sequences[:1, 20:22])
    assert off(got[0], exact[0, 20:22]) > 20 * LIMIT
