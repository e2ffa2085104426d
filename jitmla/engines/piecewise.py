"""Piecewise CUDA graphs: an FX graph is cut at ops that depend on the batch, and the runs between them are captured.

    backend = jitmla.engines.piecewise.Backend(sizes=[1, 2, 4, 8, 64, 512])
    model = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.inference_mode(), jitmla.dsa.forward(batch):
        model(hidden, positions)                      # padded to one of the sizes

A pass whose number of tokens T is one of `sizes` replays one graph per span, captured in the first such pass; the ops
at the cuts run eagerly in between. Any other T runs eagerly. All graphs share one memory pool: a span's results live
until their last reader in the pass, and no longer. Weights, and inputs of a span that are results of the one before,
must stay where they were when captured; inputs of the whole graph are copied to where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.split_module import split_module

from ..errors import InvalidArgument

BOUNDARIES = ("mla_dsa_attn_inplace",)
WARM_UP = 3  # eager runs of a span before it is captured: libraries set themselves up in them


def op_name(node: fx.Node) -> str | None:
    """The name, without namespace and overload, of the custom op that a node calls, whichever way it names it: as a
    packet (from Dynamo), as an overload, or wrapped by functionalisation."""
    target: Any = node.target
    if node.op != "call_function":
        return None
    if getattr(target, "__name__", "").startswith("auto_functionalized") and node.args:
        target = node.args[0]
    name = getattr(target, "_qualified_op_name", None) or getattr(target, "_qualname", None)
    if name is None and isinstance(target, torch._ops.OpOverload):
        name = target.name()
    if name is None and isinstance(getattr(target, "_opoverload", None), torch._ops.OpOverload):
        name = target._opoverload.name()
    return None if name is None else str(name).split("::")[-1].split(".")[0]


@dataclass(frozen=True)
class Pieces:
    """A split graph: `module` calls its submodules in the order of the original nodes. spans: those to capture, by
    name; cuts: the others, one op each."""

    module: fx.GraphModule
    spans: tuple[str, ...]
    cuts: tuple[str, ...]


def split(graph: fx.GraphModule, boundaries: Iterable[str] = BOUNDARIES) -> Pieces:
    """Cut `graph` at every call of an op of these names: N of them leave at most N + 1 spans."""
    names, piece, piece_of, cuts = set(boundaries), 0, {}, set()
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if op_name(node) in names:
            piece += 1
            cuts.add(piece)
            piece_of[node] = piece
            piece += 1
        else:
            piece_of[node] = piece
    module = split_module(graph, graph, lambda node: piece_of[node], keep_original_order=True)
    found = [name for name, _ in module.named_children() if name.startswith("submod_")]
    is_cut = {name: int(name.removeprefix("submod_")) in cuts for name in found}
    return Pieces(module, tuple(n for n in found if not is_cut[n]), tuple(n for n in found if is_cut[n]))


@dataclass
class Span:
    """A run of nodes between two cuts: eager, or captured once for each number of tokens."""

    run: Callable[..., Any]
    pool: Any
    captured: dict[int, Captured] = field(default_factory=dict)

    def capture(self, tokens: int, inputs: Sequence[Any]) -> Any:
        """Capture for `tokens`, and return the results of a first replay."""
        before = [(x, x.clone()) for x in inputs if isinstance(x, Tensor) and x.dim() and x.shape[0] == tokens]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.run(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            results = self.run(*inputs)
        for x, value in before:  # the runs until now may have written it
            x.copy_(value)
        graph.replay()
        self.captured[tokens] = Captured(graph, [x.data_ptr() if isinstance(x, Tensor) else None for x in inputs],
                                         _without_memory(results))
        return results

    def replay(self, tokens: int, inputs: Sequence[Any]) -> Any:
        there = self.captured[tokens]
        for i, (x, address) in enumerate(zip(inputs, there.addresses, strict=True)):
            if address is not None and x.data_ptr() != address:
                raise _moved(f"input {i} of a captured span", x.data_ptr(), address)
        there.graph.replay()
        return there.results


@dataclass(frozen=True)
class Captured:
    graph: Any
    addresses: list[int | None]
    results: Any  # tensors that do not keep their memory: later spans may use it again


def _without_memory(results: Any) -> Any:
    """The same tensors, holding no reference to their memory, which belongs to the pool of the graphs."""
    if isinstance(results, (tuple, list)):
        return type(results)(_without_memory(x) for x in results)
    if not isinstance(results, Tensor):
        return results
    storage = results.untyped_storage()
    bare = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), results.device, storage.nbytes())
    like = torch.empty(0, dtype=results.dtype, device=results.device)
    return like.set_(bare, results.storage_offset(), results.shape, results.stride())


class Backend:
    """A backend of torch.compile. sizes: the numbers of tokens that are captured. boundaries: ops at which to cut.

    pieces: what each compiled graph was split into. Call `forget` after weights or caches were moved.
    """

    def __init__(self, sizes: Iterable[int], boundaries: Iterable[str] = BOUNDARIES) -> None:
        self.sizes, self.boundaries = frozenset(sizes), tuple(boundaries)
        self.pieces: list[Pieces] = []
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._programs: list[Program] = []

    def forget(self) -> None:
        """Drop every captured graph."""
        for program in self._programs:
            program.forget()

    def __call__(self, graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        pieces = split(graph, self.boundaries)
        self.pieces.append(pieces)
        spans = {name: Span(getattr(pieces.module, name), self.pool) for name in pieces.spans}
        program = Program(pieces.module, spans, self.sizes, growing(graph, examples))
        self._programs.append(program)
        return program


def growing(graph: fx.GraphModule, examples: Sequence[Any]) -> list[bool]:
    """Which inputs have a size that grows with the number of tokens: the first size of the first tensor for which it is
    a symbol. With dynamic=True widths are symbols as well; what has only those is a weight. Where nothing is a symbol,
    inputs with as many rows as the first tensor."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    # the examples may be real tensors, whose sizes are numbers
    known = [node.meta.get("example_value", x) for node, x in zip(placeholders, examples, strict=True)]
    sizes = [x.shape if isinstance(x, Tensor) else () for x in known]
    symbol = next((_symbols(size[0]) for size in sizes if len(size) and _symbols(size[0])), None)
    if symbol is not None:
        return [any(symbol & _symbols(n) for n in size) for size in sizes]
    rows = next((size[0] for size in sizes if len(size)), None)
    return [len(size) > 0 and size[0] == rows for size in sizes]


def _symbols(size: Any) -> frozenset[Any]:
    """Those that a size is made of."""
    return frozenset(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else frozenset()


class Program:
    """A compiled graph: eager, or for some numbers of tokens a series of replays. grows: inputs that have a row, or
    several, for each token, the first size of the first one their number. They are copied to where they were when the
    graphs were captured; everything else must stay where it is."""

    def __init__(self, module: fx.GraphModule, spans: dict[str, Span], sizes: frozenset[int], grows: Sequence[bool]):
        self.module, self.spans, self.sizes, self.grows = module, spans, sizes, grows
        self.kept: dict[int, list[Any]] = {}  # by number of tokens: the inputs as they were captured
        self.how: tuple[str, int] = ("eager", 0)
        for name, span in spans.items():
            setattr(module, name, _Stage(self, span))

    def __call__(self, *inputs: Any) -> Any:
        tokens = self.tokens(inputs)
        if tokens not in self.sizes or not any(isinstance(x, Tensor) and x.is_cuda for x in inputs):
            self.how = ("eager", 0)
            return self.module(*inputs)
        if tokens not in self.kept:
            self.how = ("capture", tokens)
            self.kept[tokens] = [x.clone() if grows else x for x, grows in zip(inputs, self.grows, strict=True)]
        else:
            self.how = ("replay", tokens)
            for given, kept, grows in zip(inputs, self.kept[tokens], self.grows, strict=True):
                if grows:
                    kept.copy_(given)
                elif isinstance(kept, Tensor) and given.data_ptr() != kept.data_ptr():
                    raise _moved("an input of the graph", given.data_ptr(), kept.data_ptr())
        return self.module(*self.kept[tokens])

    def tokens(self, inputs: Sequence[Any]) -> int:
        """The number of tokens of a pass."""
        return next((int(x.shape[0]) for x, grows in zip(inputs, self.grows, strict=True) if grows), 0)

    def forget(self) -> None:
        self.kept.clear()
        for span in self.spans.values():
            span.captured.clear()


class _Stage(torch.nn.Module):
    """A span in its place in the split graph."""

    def __init__(self, program: Program, span: Span) -> None:
        super().__init__()
        self.of = (program, span)  # in a tuple: they are no submodules of this one

    def forward(self, *inputs: Any) -> Any:
        program, span = self.of
        how, tokens = program.how
        if how == "eager":
            return span.run(*inputs)
        return span.capture(tokens, inputs) if how == "capture" else span.replay(tokens, inputs)


def _moved(what: str, now: int, then: int) -> InvalidArgument:
    return InvalidArgument(f"{what} at {now:#x}", supported=f"{then:#x}, where it was when captured",
                           differs="it has moved", remedy="call `forget` after weights or caches were moved")
