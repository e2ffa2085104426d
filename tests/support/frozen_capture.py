"""Warm, freeze, and only then call: the first call of each kernel inside a CUDA graph capture. Prints a JSON object."""

import collections
import json
import sys

import torch

import jitmla
from jitmla import events, registry
from jitmla.errors import MissNotAllowed
from jitmla.testing import mla_decode_oracle, mla_decode_problem

from ..keysets import covering

SHAPES = ((16, 1, [700, 0, 65]), (16, 1, [5000] * 40), (128, 1, [3000, 1]), (8, 2, [130, 77]))  # heads, s_q, lengths
TOUCHING = {"open", "ctypes.dlopen", "import", "subprocess.Popen", "os.posix_spawn", "os.fork", "os.listdir",
            "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree",
            "tempfile.mkdtemp"}


def capture(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def main():
    problems = [mla_decode_problem(lengths, heads=heads, s_q=s_q, device="cuda", seed=i)
                for i, (heads, s_q, lengths) in enumerate(SHAPES)]
    one = torch.ones(1, device="cuda")
    capture(lambda: one + 1)  # whatever torch itself does in its first capture
    jitmla.warm([choice.key for s in covering() for choice in registry.choices(s)
                 if (s["dtype"], s["kv_lora_rank"], s["page_size"]) == ("bf16", 512, 64)])
    jitmla.freeze()
    before, seen, counting = events.stats(), collections.Counter(), True
    sys.addaudithook(lambda name, args: seen.update([f"{name} {args[:1]}"]) if counting and name in TOUCHING else None)
    graphs = [capture(lambda p=p: jitmla.mla_decode(*p.args, **p.kwargs, return_lse=True, backend="sm90"))
              for p in problems]
    for graph, _ in graphs:
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    eager = [jitmla.mla_decode(*p.args, **p.kwargs, return_lse=True) for p in problems]
    missing = mla_decode_problem([9], heads=16, page_size=16, device="cuda")
    try:
        jitmla.mla_decode(*missing.args, **missing.kwargs)
        refused = ""
    except MissNotAllowed as error:
        refused = error.differs
    counting = False
    after = events.stats()
    for problem, (_, captured), direct in zip(problems, graphs, eager, strict=True):
        mla_decode_oracle(problem).check(*captured)
        mla_decode_oracle(problem).check(*direct)
    print(json.dumps({"touched": dict(seen), "refused": refused, "graphs": len(graphs),
                      "events": {k: after[k] - before[k] for k in after if after[k] != before[k]}}))


if __name__ == "__main__":
    main()
