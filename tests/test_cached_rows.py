"""Which token a row of cached_mla is: the text of templates/common/cached_rows.py, run on lists of integers."""

import random
from types import SimpleNamespace

import pytest

from jitmla import registry, schedule

GARBAGE = 2147480000


@pytest.fixture(scope="module")
def rows():
    text = registry.read_common("cached_rows")
    lines = [line for line in text.splitlines() if not line.startswith(("import ", "from "))]
    names = {"cutlass": SimpleNamespace(min=min, max=max), "Int32": int,
             "cute": SimpleNamespace(jit=lambda f: f, Tensor=list)}
    exec(compile("\n".join(lines), "cached_rows", "exec"), names)
    return SimpleNamespace(**names)


def drawn(rng):
    """(tile, lengths, starts, places): sequences with and without gaps, some of them empty."""
    tile = rng.choice([2, 4, 16, 64])
    lengths = [rng.choice([0, 1, tile - 1, tile, tile + 1, rng.randint(0, 150)]) for _ in range(rng.randint(1, 8))]
    gap = rng.choice([0, 0, 3, tile])
    starts, at = [], 0
    for n in lengths:
        starts.append(at)
        at += n + gap
    return tile, lengths, starts, at + rng.choice([0, 5])


@pytest.mark.parametrize("seed", range(200))
def test_tiles_of_several_tokens(rows, seed):
    """Each token is found once, at the end of its tile, also when the tiles go in several launches."""
    rng = random.Random(seed)
    tile, lengths, starts, places = drawn(rng)
    tiles = schedule.context_tiles(places, len(lengths), tile)
    launch = rng.choice([tiles, max(1, tiles // 3), 1])
    metadata = [*lengths, GARBAGE], [*starts, GARBAGE]
    found = {}
    for tile0 in range(0, tiles, launch):
        for row in range(min(launch, tiles - tile0) * tile):
            token, sequence, index, count, begin = rows.locate(row, tile0, tile, 0, len(lengths), places, 0, *metadata)
            k, u = tile0 + row // tile, row % tile
            if token >= 0:
                assert token not in found and token == starts[sequence] + index and index < lengths[sequence]
                assert index == begin + u - (tile - count), "tokens are at the end of their tile"
                assert begin // tile == k - (starts[sequence] // tile + sequence)
                found[token] = k
            elif u == tile - 1:
                assert count == 0, "the last row of a tile with tokens has one"
    assert sorted(found) == sorted(s + i for s, n in zip(starts, lengths, strict=True) for i in range(n))


def test_tiles_of_one_token(rows):
    lengths, starts = [5, 1, 0, 1], [0, 5, 6, 6]  # behind a prefill sequence three decode ones, one of them empty
    got = [rows.locate(row, 0, 1, 1, 3, 7, 0, lengths, starts)[:4] for row in range(4)]
    assert [g[0] for g in got] == [5, -1, 6, -1] and [g[3] for g in got] == [1, 0, 1, 0]
    assert [g[1] for g in got[:3]] == [1, 2, 3]
    garbage = [GARBAGE] * 3
    got = [rows.locate(row, 0, 1, 0, 3, 5, rows.GENERATE, garbage, garbage)[:2] for row in range(3)]
    assert got == [(0, 0), (1, 1), (2, 2)], "token k is row k, and the metadata is not looked at"


def test_no_token_is_read_behind_the_inputs(rows):
    """Starts that are the caller's mistake lead to no access."""
    for row in range(8):
        token = rows.locate(row, 0, 4, 0, 1, 6, 0, [8], [3])[0]
        assert token < 6
    assert rows.locate(0, 0, 1, 0, 1, 6, 0, [1], [6])[0] == -1
