"""The reader of cards: whatever it reads by itself comes out as from tomllib."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitmla import card
from jitmla.card import tomllib
from jitmla.resources import TEMPLATES

CARDS = {path.parent.name: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*/card.toml"))}
DETERMINED = settings(deadline=None, derandomize=True, database=None, max_examples=400)
PIECES = ['"', "'", "#", " # it", "=", " = ", ":", ",", "{", "}", "[", "]", "\n", "\\", "null", "true", "NaN", "1", "-",
          "_", "x", "x = 1\n", ".", "[[template]]\n", "[template.supports]\n", ', y = 2', '"a": 1', "0x10", "1e3", "01",
          "inf", "\x7f", "],[", '","']


def same(text):
    """Whether `text` is read by the reader itself, and then as tomllib reads it."""
    try:
        found = card._quick(text)
    except ValueError:
        return False
    assert found == tomllib.loads(text)
    return True


@pytest.mark.parametrize("op", CARDS)
def test_no_shipped_card_is_left_to_tomllib(op):
    assert same(CARDS[op]) and card.loads(CARDS[op])["op"] == op


@given(st.randoms(use_true_random=False), st.sampled_from(sorted(CARDS)))
@DETERMINED
def test_changed_cards(rng: random.Random, op):
    """A piece more, or some letters or lines less, twice, twice as often, or in another place."""
    text = CARDS[op]
    for _ in range(rng.randint(1, 2)):
        at, end = (rng.randrange(len(text)) for _ in range(2))
        lines = text.split("\n")
        i, j = (rng.randrange(len(lines)) for _ in range(2))
        what = rng.randrange(4)
        if what == 0:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif what == 1:
            text = text[:at] + text[min(at + rng.randint(1, 3), len(text)):]
        elif what == 2:
            lines.insert(i, lines[j])
            text = "\n".join(lines)
        else:
            del lines[i]
            text = "\n".join(lines)
    same(text)


@pytest.mark.parametrize("text", [
    'a = "b, c = d"\n', 'a = "{ c = d }"\n', 'a = "{, c = d }"\n', 'a = "x # y"\n', 'a = "x" # y\n', "a = 1 # y\n",
    '# "x" = 1\na = [1, 2]\n', 'a = { b = 1, c = ["x"] }\n', "a = true\n", 'a = "\t"\n', "a = 1_000\n", "a = 1.5\n",
    "a = 1979-05-27\n", "a = '''x'''\n", 'a = [\n  1,\n]\n', "a.b = 1\n", '"a" = 1\n', "a = +1\n", "a = 0x1f\n",
    "[a]\nb = 1\n[a.c]\nd = 2\n", "[[a]]\n[[a.b]]\nc = 1\n[[a]]\n", 'a = "\u00e9"\n', 'a = "\\u0041"\n', "",
    "\r\na = 1\r\n", "a = []\n", "a = {}\n", "a=1\n"])
def test_other_documents(text):
    same(text)
    assert card.loads(text) == tomllib.loads(text)


@pytest.mark.parametrize("text", [
    "a = null\n", "a = NaN\n", 'a = {"b": 1}\n', "a = 1, b = 2\n", "a = 1\na = 2\n", "a = {b = 1, b = 2}\n",
    "a = [{\n}]\n", "[a]\n[a]\n", "[[a]]\n[a]\n", "[a]\n[[a]]\n", "a = 1\n[a]\n", "a = 1\n[a.b]\n", "a\n", "a =\n",
    "a = \n", "[a\n", "[[a]\n", "[a].b\n", "a = }\n", "a = 01\n", "a = 1\n[[a]]\n", "a = 1, 2\n",
    "a = [[1]\nb = [2]]\n", "a = [[1]\nb = [2]]\nc = [3],[4]\n", 'a = [[1]\nb = [2]]\nc = [3],"\x7f",[4]\n'])
def test_what_is_no_toml_is_refused(text):
    with pytest.raises(card.TOMLDecodeError):
        card.loads(text)
