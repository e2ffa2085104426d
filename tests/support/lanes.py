"""Device functions as Python: generators of one lane, which a test drives warp by warp."""

import ast
from collections.abc import Collection


class Lanes(ast.NodeTransformer):
    """Calls of `yields`, warp-wide operations, become yields of their name and arguments; calls of `generators`, which
    have such calls in them, become `yield from`."""

    def __init__(self, yields: Collection[str], generators: Collection[str]):
        self.yields, self.generators = yields, generators

    def visit_Call(self, node):
        self.generic_visit(node)
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        if name in self.yields:
            fields = [ast.Constant(name), *node.args, *(k.value for k in node.keywords if k.arg in ("offset", "kind"))]
            return ast.Yield(ast.Tuple(fields, ast.Load()))
        return ast.YieldFrom(node) if name in self.generators else node

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.decorator_list = []
        for arg in node.args.args:
            arg.annotation = None
        return node
