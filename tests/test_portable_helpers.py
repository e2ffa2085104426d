"""Device helpers of the portable mla_decode template, as their own text says them, without a GPU: where pieces lie
(templates/common/mla_pieces.py, lane by lane) and the conversion of e4m3 where there is no instruction for it."""

import ast
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jitmla.schedule import BLOCK_TOKENS, INVARIANT_TOKENS, gather_launch, invariant_slots, workspace_floats

from .test_schedule import COMMON, FAST, KNOBS, LANES, Split, _int, _natural, blocks, ceil_div, run_warp, tokens

PIECE_BLOCKS = INVARIANT_TOKENS // BLOCK_TOKENS


def functions(*modules, transform=None, **names):
    """The functions of common modules, without their decorators and with the names of the DSL replaced."""
    for module in modules:
        tree = ast.parse((COMMON / f"{module}.py").read_text())
        tree = transform.visit(tree) if transform else tree
        tree.body = [n for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom))]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                node.decorator_list = []
                for argument in node.args.args:
                    argument.annotation = None
        exec(compile(ast.fix_missing_locations(tree), f"{module}.py", "exec"), names)  # noqa: S102
    return types.SimpleNamespace(**names)


@pytest.fixture(scope="module")
def device():
    def span(lo, hi, step=1, unroll=1):
        return range(lo, hi, step)

    cutlass = types.SimpleNamespace(range=span, range_constexpr=range, max=max, min=min, Constexpr=None)
    arch = types.SimpleNamespace(popc=int.bit_count)
    return functions("warp", "mla_split", "mla_pieces", transform=LANES, cutlass=cutlass, Int32=_int,
                     Uint32=_natural, Float32=float, cute=types.SimpleNamespace(arch=arch))


@settings(max_examples=150, deadline=None)
@given(nb=blocks(most_requests=70), knobs=KNOBS, slack=st.integers(0, BLOCK_TOKENS), data=st.data())
def test_the_combine_finds_the_pieces_of_the_split(device, nb, knobs, slack, data):
    split, lengths = Split(nb, *knobs), tokens(nb, slack)
    for r in data.draw(st.lists(st.integers(0, len(nb) - 1), min_size=1, max_size=3, unique=True)):
        owners = split.owners[r]
        p0, n = run_warp(device.slots_of, lengths, len(nb), r, *knobs, split.s, split.k)
        assert n == len(owners) and (n == 1 or p0 == owners[0])


@settings(max_examples=100, deadline=None)
@given(nb=blocks(most_requests=70), slack=st.integers(0, BLOCK_TOKENS), data=st.data())
def test_pieces_of_the_batch_invariant_split(device, nb, slack, data):
    lengths = tokens(nb, slack)
    pieces = [(r, i) for r, n in enumerate(nb) for i in range(ceil_div(n, PIECE_BLOCKS))]
    total = run_warp(device.pieces_before, lengths, len(nb), PIECE_BLOCKS)
    assert total == len(pieces) <= invariant_slots(len(nb), max(max(lengths), 1))
    x = data.draw(st.integers(0, total - 1))
    assert run_warp(device.locate_piece, lengths, len(nb), x, PIECE_BLOCKS) == pieces[x]
    r = pieces[x][0]
    assert run_warp(device.pieces_before, lengths, r, PIECE_BLOCKS) == pieces.index((r, 0))


@FAST
@given(rows=st.integers(1, 512), batch=st.integers(1, 4096), sms=st.integers(1, 200),
       tile=st.sampled_from([16, 32, 64]))
def test_launch_arguments(rows, batch, sms, tile):
    launch = gather_launch(rows, batch, sms, tile)
    assert launch.parts >= 1 and (launch.parts == 1 or launch.parts * ceil_div(rows, tile) <= sms)
    assert workspace_floats(launch.parts, rows, 512) == 2 * launch.parts * rows * 513
    assert workspace_floats(launch.parts, rows, 512, slots=7) == 7 * rows * 513


# ------------------------------------------------------------------------------------------------- e4m3


class Int32(int):
    """32 bits, signed, as in the DSL."""

    def __new__(cls, value):
        return super().__new__(cls, (int(value) + 2**31) % 2**32 - 2**31)


def wrapping(operation):
    return lambda a, b: Int32(operation(a, b))


for _name in ("__add__", "__and__", "__or__", "__rshift__", "__mul__"):
    setattr(Int32, _name, wrapping(getattr(int, _name)))


def inline_ptx(text, write_only_types, read_only_args):
    """The two instructions that the conversion uses."""
    if text.startswith("prmt.b32"):
        x, selector = (int(a) % 2**32 for a in read_only_args)
        source = [*x.to_bytes(4, "little"), 0, 0, 0, 0]
        return Int32(int.from_bytes([source[selector >> 4 * i & 7] for i in range(4)], "little"))
    assert "mul.rn.f16x2" in text and "0x5C005C00" in text
    halves = np.frombuffer((int(read_only_args[0]) % 2**32).to_bytes(4, "little"), np.float16)
    return Int32(int.from_bytes((halves * np.float16(256)).tobytes(), "little"))


@pytest.fixture(scope="module")
def convert():
    cute = types.SimpleNamespace(arch=types.SimpleNamespace(inline_ptx=inline_ptx))
    return functions("warp_mma", cute=cute, Int32=Int32, const_expr=bool).e4m3x2_to_f16x2


@pytest.mark.parametrize("high", [False, True])
def test_e4m3_without_an_instruction_for_it(convert, high):
    """Every number, beside others: exact, NaN is NaN, the sign of zero stays."""
    exact = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).half()
    for a in range(256):
        b = a * 37 % 256
        pair = a | b << 8
        x = Int32((pair << 16 | 0x7FFF) if high else (0x7FFF << 16 | pair))
        got = np.frombuffer((int(convert(x, high, False)) % 2**32).to_bytes(4, "little"), np.float16)
        for mine, byte in zip(got, (a, b), strict=True):
            want = exact[byte].numpy()
            assert np.isnan(mine) if np.isnan(want) else mine.tobytes() == want.tobytes(), (byte, mine, want)
