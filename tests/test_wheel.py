"""The wheel: what a machine without the repository gets, from the same settings as a release, without the network."""

import json
import os
import subprocess
import sys
import zipfile

import pytest

from jitmla import registry, toolchain
from jitmla.spec import append_latent_spec

from .conftest import REPOSITORY

SPEC = append_latent_spec(arch="sm_90a", dtype="bf16", e4m3_cache=False, slots="i64", kv_lora_rank=512,
                          qk_rope_head_dim=64)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=REPOSITORY,
                   check=True, capture_output=True)
    [found] = folder.glob("*.whl")
    return found


def test_it_holds_templates_and_schema(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for source in [p for p in (REPOSITORY / "templates").rglob("*") if p.suffix in (".py", ".toml")]:
        assert f"jitmla/_data/{source.relative_to(REPOSITORY)}" in names
    assert "jitmla/_data/cache_schema.json" in names and "jitmla/tunings/h200.json" in names
    assert not any("__pycache__" in name or name.startswith(("tests/", "docs/")) for name in names)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`installed(*arguments)` runs the command of the installed wheel, far from the repository."""
    site, home = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("home")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
                    "--disable-pip-version-check", "--target", str(site), str(wheel)], check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(site), "JITMLA_CACHE_DIR": str(home / "cache")}

    def run(*arguments, program=(site / "bin" / "jitmla",)):
        done = subprocess.run([sys.executable, *map(str, program), *arguments], env=env, cwd=home, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    place = run(program=("-c", "import jitmla.resources as r; print(r.TEMPLATES)"))
    assert place.strip() == str(site / "jitmla" / "_data" / "templates")
    return run


def test_its_command_lists_the_kernels_of_the_repository(installed):
    listed = {(row["op"], row["template"]) for row in map(json.loads, installed("kernels", "--json").splitlines())}
    assert listed == {(op, template.name) for op in registry.ops() for template in registry.templates(op)}
    assert "prewarm" in installed("--help")


@pytest.mark.skipif(toolchain.current() is None or toolchain.linker() is None,
                    reason="needs the compiler (CuTe DSL) and a C linker")
def test_it_compiles_the_same_kernel_under_the_same_key(installed):
    facts = [part for name, value in SPEC if name not in ("op", "arch")
             for part in ("--spec", f"{name}={str(value).lower()}")]
    [row] = map(json.loads, installed("prewarm", "--op", SPEC.op, "--arch", SPEC.arch, *facts, "--json").splitlines())
    assert row["status"] == "compiled" and row["key"] == registry.choose(SPEC).key.digest
    assert row["key"][:12] in installed("cache", "ls")
