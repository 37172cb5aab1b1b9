"""What the README says is so: its Python runs, and its table of networks has the counts of the code."""

import re
from pathlib import Path

import numpy as np

import models

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_python_of_the_readme_runs():
    section = README.partition("## Use it from Python")[2].partition("\n## ")[0]
    names = {}
    exec("\n".join(line[4:] for line in section.splitlines() if line.startswith("    ")), names)
    assert names["y"].shape == (10, 8) and names["dx"].shape == names["x"].shape
    assert np.isfinite(names["net"].parameters.grad).all()


def test_table_of_networks():
    rows = re.findall(r"\| `([\w-]+)` \| ([\d,]+) \| ([\d,]+) \|", README)
    assert {name for name, _, _ in rows} == set(models.REGISTRY)
    for name, parameters, macs in rows:
        network = models.create(name)
        assert sum(p.size for p in network.named_parameters().values()) == int(parameters.replace(",", ""))
        assert network.macs((3, 32, 32)) == int(macs.replace(",", ""))
