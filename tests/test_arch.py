"""GPU arch names: one spelling, and errors that help."""

import pytest

from jitmla import arch, schema
from jitmla.errors import UnknownArch


def test_the_schema_lists_the_same_names():
    assert list(arch.NAMES) == schema.spec_fields("mla_decode")["arch"]["enum"]


@pytest.mark.parametrize("name", arch.NAMES)
def test_known_names(name):
    assert arch.check(name) == name


@pytest.mark.parametrize("capability, name", [((9, 0), "sm_90a"), ((8, 0), "sm_80"), ((8, 9), "sm_89"),
                                              ((10, 0), "sm_100a"), ((12, 0), "sm_120a")])
def test_of_capability(capability, name):
    assert arch.of_capability(*capability) == name


def test_a_capability_without_a_name():
    with pytest.raises(UnknownArch, match="7.5") as caught:
        arch.of_capability(7, 5)
    assert "9.0 (sm_90a)" in caught.value.supported and "reference" in caught.value.remedy


@pytest.mark.parametrize("name, meant", [("sm_90", "sm_90a"), ("sm90", "sm_90a"), ("sm_100", "sm_100a"),
                                         ("sm_90f", "sm_90a")])
def test_other_spellings_are_refused_with_a_hint(name, meant):
    with pytest.raises(UnknownArch) as caught:
        arch.check(name)
    assert f"did you mean {meant!r}?" in caught.value.differs and "sm_90a" in caught.value.remedy


@pytest.mark.parametrize("name", ["", "hopper", "sm_75", "compute_90", "SM_90A"])
def test_unknown_names(name):
    with pytest.raises(UnknownArch) as caught:
        arch.check(name)
    assert repr(name) in str(caught.value) and ", ".join(arch.NAMES) in caught.value.supported
