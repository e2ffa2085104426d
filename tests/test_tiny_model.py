"""A two-layer MLA model (examples/tiny_mla.py) through the cache agrees with its full recomputation in float64.

Token by token, prefilled at once or in chunks, decoded one by one or several at once (MTP), in a paged or a slot cache.
Attention is in fp16, all else in float64, so that what differs is attention alone. On the CPU the reference computes
it, on a GPU the kernels (`python -m tests.keysets --op append_latent --op cached_mla --attention` compiles them).
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


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def model(request):
    config = tiny.Config(hidden_size=128, vocab_size=64, kv_lora_rank=64, qk_rope_head_dim=16)
    return tiny.TinyMla(config, seed=3, dtype=torch.float64, device=request.param)


@pytest.fixture(scope="module")
def sequences(model):
    found = torch.randint(64, (len(PROMPTS), LENGTH), generator=torch.Generator().manual_seed(5))
    return found.to(model.device)


@pytest.fixture(scope="module")
def exact(model, sequences):
    """Logits [sequences, LENGTH, vocab] of the full recomputation."""
    return torch.stack([tiny.plain(model, tokens) for tokens in sequences])


def off(got, exact):
    """The largest relative error of a token, [.., vocab]."""
    return float(((got - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.mark.parametrize("chunk, new", [(100, 1), (16, 2), (5, 3), (1, 1)])
def test_paged(model, sequences, exact, chunk, new):
    """append_latent and mla_decode: prompts of several lengths in chunks, then `new` tokens of all at once, with the
    drafts of the step before rejected: their rows are written again."""
    paged = tiny.Paged(model, len(PROMPTS), page_size=16, dtype=torch.float16)
    for i, prompt in enumerate(PROMPTS):
        for at in range(0, prompt, chunk):
            end = min(at + chunk, prompt)
            got = paged.step(torch.tensor([i], device=model.device), sequences[i:i + 1, at:end])
            assert off(got[0], exact[i, at:end]) < LIMIT
    everyone = torch.arange(len(PROMPTS), device=model.device)
    while int(paged.lengths.max()) + new <= LENGTH:
        at = paged.lengths.long()[:, None] + torch.arange(new, device=model.device)
        rejected = sequences.gather(1, at).clone()
        rejected[:, 1:] = (rejected[:, 1:] + 7) % 64
        paged.step(everyone, rejected)
        paged.lengths -= new
        got = paged.step(everyone, sequences.gather(1, at))
        assert off(got, exact[everyone[:, None], at]) < LIMIT


@pytest.mark.parametrize("chunk", [100, 16, 5])
def test_slots(model, sequences, exact, chunk):
    """cached_mla: chunks of some sequences beside decode of others, until all are at their end."""
    slots = tiny.Slots(model, len(PROMPTS), max_seq_len=64, dtype=torch.float16)
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
    first = torch.tensor([0], device=model.device)
    paged.step(first, sequences[:1, :20])
    got = paged.step(first, sequences[:1, 20:22])
    assert off(got[0], exact[0, 20:22]) > 20 * LIMIT
