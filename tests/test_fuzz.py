"""Readers of files are fed with damaged and hostile ones: see fuzz.py. $MINIDL_FUZZ: how many for each reader."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_train import environment

FUZZ = Path(__file__).with_name("fuzz.py")
EXAMPLES = int(os.environ.get("MINIDL_FUZZ", 300))
NEEDS = {"safetensors": "safetensors", "image": "PIL"}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory and looks into /proc as on Linux")
@pytest.mark.parametrize("reader", ["checkpoint", "safetensors", "cifar", "archive", "toml", "image"])
def test_readers_return_or_refuse(reader):
    for module in ("hypothesis", *filter(None, [NEEDS.get(reader)])):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    result = subprocess.run([sys.executable, FUZZ, reader, str(EXAMPLES)], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{reader}: " in result.stdout and " refused" in result.stdout
