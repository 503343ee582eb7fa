"""The package that ``pip install .`` makes, and its commands."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

import console
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_commands_run_their_scripts(command: str, monkeypatch: pytest.MonkeyPatch):
    ran = []
    monkeypatch.setattr(sys, "path", ["elsewhere"])
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{command}", "--help"])
    monkeypatch.setattr("runpy.run_path", lambda path, run_name: ran.append((path, run_name)))
    console.main()
    assert sys.path == [str(ROOT), "elsewhere"]
    [(script, name)] = ran
    assert name == "__main__" and 'if __name__ == "__main__":' in Path(script).read_text()


def test_the_package_is_complete():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    packages = {f"llamarec.{name}" for name in folders - {"benchmarks", "tests"}}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {"llamarec", *packages}


def test_requirements_can_be_read_by_setuptools():
    """It reads no options, such as ``-r``."""
    for spec in PROJECT["tool"]["setuptools"]["dynamic"].values():
        for files in [spec["file"]] if "file" in spec else [x["file"] for x in spec.values()]:
            for file in files:
                lines = (ROOT / file).read_text().splitlines()
                assert not [x for x in lines if x and not re.match(r"#|\w", x)], file
