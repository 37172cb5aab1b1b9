"""docs/guide.md: its commands and its Python run, in their order, in one empty folder; its tables say what the code says.

So that all take a minute and not days, each command is cut short by what SHORTER or SHORT_OF_CIFAR appends to it. One with a
comment "needs ..." runs where that is there, see `there_is`. Of those that do not run here, the arguments are still parsed.
"""

import argparse
import importlib
import importlib.util
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import models
from conftest import CUPY
from minidl import command, errors, host_build, settings
from minidl.__main__ import COMMANDS
from minidl.settings import tomllib
from models import recipes

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
CIFAR100 = os.environ.get("MINIDL_TEST_CIFAR100")
SHORTER = {"train": "--limit-train-batches 2", "lr-find": "--steps 10"}
SHORT_OF_CIFAR = {"train": "--fast-dev-run --batch-size 2"}
PACKAGES = {"plot": ("matplotlib", "PIL"), "interchange": ("safetensors", "onnx")}  # of extras
SECONDS = 300  # that nothing here needs, on the busiest machine


def pieces():
    """(language, text) of each command and each piece of Python, in their order."""
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL):
        if language == "sh":
            yield from ((language, line) for line in text.splitlines())
        elif language in ("python", "cuda"):
            yield language, text


def needs(text):
    """What a comment says that a piece needs: # needs A and B; whatever else."""
    comment = re.search(r"# needs ([^;\n]*)", text)
    return comment[1].split(" and ") if comment else []


def there_is(need):
    """Whether this machine has what a comment names. The network is never used."""
    if extra := re.fullmatch(r"the extra (\w+)", need):
        return all(importlib.util.find_spec(package) for package in PACKAGES[extra[1]])
    return {"CIFAR-100": bool(CIFAR100), "a GPU": CUPY, "the network": False}[need]


def shortened(line):
    """A command without its comment, cut short."""
    words = shlex.split(line, comments=True)
    appendix = (SHORT_OF_CIFAR if "CIFAR-100" in needs(line) else SHORTER).get(words[1], "")
    return f"{line.partition(' #')[0].rstrip()} {appendix}"


def check_arguments(line):
    """Parse the arguments of a command that does not run."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["pip", "install"]:
        assert set(re.search(r"\[(.*)\]", words[-1])[1].split(",")) <= EXTRAS.keys()
    else:
        assert words[0] == "minidl"
        parser = argparse.ArgumentParser()
        importlib.import_module(f"minidl.commands.{COMMANDS[words[1]]}").add_arguments(parser)
        parser.parse_args(words[2:])


def test_everything_runs_in_its_order(tmp_path):
    variables = {**os.environ, "MINIDL_CACHE": str(host_build.cache_folder().parent), "MINIDL_OFFLINE": "1",
                 "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    variables |= {"MINIDL_DATA": CIFAR100} if CIFAR100 else {}
    ran = []
    for language, text in pieces():
        if not all(map(there_is, needs(text))):
            if language == "sh":
                check_arguments(text)
            continue
        if name := re.match(r"(?:#|//) (\w+\.(?:py|cu))\n", text):  # a file, which others need
            (tmp_path / name[1]).write_text(text)
            ran.append(text)
            continue
        arguments = ["sh", "-c", shortened(text)] if language == "sh" else [sys.executable, "-c", text]
        result = subprocess.run(arguments, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=SECONDS)
        assert result.returncode == 0 and "Traceback" not in result.stderr, f"{text}\n{result.stdout}{result.stderr}"
        ran.append(text)
    assert len(ran) > 20
    named = set().union(*(in_backticks(files) for files, _ in rows(section("First run"))))
    written = {path.name for path in (tmp_path / "second").iterdir()}
    assert written <= named and named - written <= {"best.npz", "curves.png"}


# ---- tables and lists --------------------------------------------------------------------------------------------


def section(title):
    return GUIDE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text):
    """The cells of the first table in a text, its rule left out."""
    lines = re.search(r"(^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def in_backticks(text):
    return set(re.findall(r"`([^`]+)`", text))


def test_extras():
    assert set().union(*(in_backticks(name) for name, _ in rows(section("Install")))) == EXTRAS.keys()


def value_of(cell):
    """What a cell of the table of recipes says: a number, a list of numbers, a word, an option, True; None for a dash."""
    if "=" in cell:
        return models.parse_options([cell])
    if re.fullmatch(r"\d+(, \d+)+", cell):
        return [int(number) for number in cell.split(", ")]
    try:
        return float(cell)
    except ValueError:
        return {"-": None, "yes": True}.get(cell, cell)


def test_recipes():
    head, *lines = rows(section("Settings and recipes"))
    asked = [("fast", "resnext"), *(("paper", family) for family in ("simplenet", "resnext", "res2net", "wideresnet")),
             ("report", "resnext")]
    assert head == ["setting", "fast", "paper: simplenet", "resnext", "res2net", "wideresnet", "report"]
    found = [recipes.recipe(name, arch, "cifar100") for name, arch in asked]
    found = [{key: value for key, value in recipe.items() if value != {}} for recipe in found]  # no options
    settings_of_recipes = {key for recipe in found for key in recipe} - {"recipe"}
    assert [name for name, *_ in lines] == list(dict.fromkeys(name for name, *_ in lines))
    assert {name.strip("`") for name, *_ in lines} == settings_of_recipes
    for name, *cells in lines:
        assert [value_of(cell) for cell in cells] == [recipe.get(name.strip("`")) for recipe in found], name


def test_networks_with_settings_of_their_own():
    """Of each recipe: what they have otherwise than the table."""
    meant = {"SimpleNets": "simplenet", "the small SimpleNets": "simplenet-310k", "Wide ResNets": "wideresnet"}
    listed = {(name, meant[who]): in_backticks(own) for name, who, own in
              re.findall(r"^- in `(\w+)`, (.+): (.*)$", section("Settings and recipes"), re.MULTILINE)}
    found = {}
    for name, arch in [*itertools.product(("fast", "paper", "report"), models.ALIASES), ("paper", "simplenet-310k")]:
        in_table = recipes.recipe(name, arch.removesuffix("-310k") if name == "paper" else "resnext", "cifar100")
        own = recipes.recipe(name, arch, "cifar100")
        if differing := {key for key in own | in_table if own.get(key) != in_table.get(key)}:
            found[name, arch] = differing
    assert listed == found


def test_settings_that_may_change():
    text = " ".join(section("Stop and go on").split())
    sentence = text.partition("A run keeps its settings.")[2].partition("may change")[0]
    # That a time budget is over when a run goes on is another matter.
    assert in_backticks(sentence) | {"time_budget"} == {name for name, spec in settings.FIELDS.items() if spec.free}


def test_exit_codes():
    listed = [int(code) for code in re.findall(r"^- \*\*(\d+)\*\* ", section("Exit codes"), re.MULTILINE)]
    own = {error.exit_code for error in vars(errors).values() if isinstance(error, type)}
    ended = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)}
    assert listed == sorted({0, command.READER_LEFT, *own, *ended})


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_links(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            text = file.read_text(encoding="utf-8")
            assert re.search(rf"^## {heading.replace('-', ' ')}$", text, re.MULTILINE | re.IGNORECASE), target
