"""What the README says is so: its Python runs, its commands are understood and are all; its tables of networks, and those of
docs/, have the counts of the code."""

import re
from pathlib import Path

import numpy as np
import pytest

import models
from minidl import summary
from minidl.wording import megabytes
from minidl.__main__ import COMMANDS
from test_guide import check_arguments, rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_of_the_readme_runs():
    section = README.partition("## Use it from Python")[2].partition("\n## ")[0]
    names = {}
    exec("\n".join(line[4:] for line in section.splitlines() if line.startswith("    ")), names)
    assert names["y"].shape == (10, 8) and names["dx"].shape == names["x"].shape
    assert np.isfinite(names["net"].parameters.grad).all()
    loss, top1, _, images = names["totals"]
    assert loss / images < np.log(10) / 2 and top1 == images == 8


def test_commands_of_the_readme_are_understood():
    """Those that are run to install and to test are run by .ci/run."""
    lines = re.findall(r"^    (minidl .*)$", README, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        check_arguments(line)


def test_commands_are_all_there():
    table = rows(README.partition("## Commands\n")[2])
    assert {name for cell, _ in table for name in re.findall(r"`minidl ([\w-]+)`", cell)} == COMMANDS.keys()


@pytest.mark.parametrize("page", ["README.md", "docs/architectures.md"])
def test_tables_of_networks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"\| `([\w-]+)` \|(?: [^|]*\|)? ([\d,]+) \| ([\d,]+) \|", text)
    assert {models.find(alias)[0] for alias in models.ALIASES} <= {name for name, *_ in rows}
    for name, parameters, macs in rows:
        network = models.create(name)
        assert sum(p.size for p in network.named_parameters().values()) == int(parameters.replace(",", ""))
        assert network.macs((3, 32, 32)) == int(macs.replace(",", ""))
    of_memory = re.findall(r"\| `([\w-]+)` \| `\w+` \| [\d,]+ \| [\d,]+ \| ([^|]+) \|", text)
    assert len(of_memory) == (len(models.ALIASES) if page == "docs/architectures.md" else 0)
    for name, kept in of_memory:
        assert megabytes(summary.summarize(models.create(name)).activation_bytes) == kept


def test_options_of_the_networks_are_those_of_their_builders():
    """Each has a row in docs/architectures.md, and nothing else has."""
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    named = {option for name in models.REGISTRY for option in models.REGISTRY[name].options() if not name.startswith("report")}
    assert set(re.findall(r"^\| `(\w+)` \| (?:`|0)", text, re.MULTILINE)) == named


def test_tests_of_the_faults_are_there():
    """docs/reliability.md names them, each with its file."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = [(file, test) for file, tests in re.findall(r"(test_\w+\.py): ((?:`test_\w+`(?:, )?)+)", text)
             for test in re.findall(r"`(test_\w+)`", tests)]
    assert len(named) > 80 and len(named) == text.count("`test_")
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} has no {test}"
