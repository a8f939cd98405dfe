"""What a method script must not do; how it is written is its own affair."""

import ast
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ("balance", "dimml", "joint_baseline", "udi")


@pytest.mark.parametrize("name", SCRIPTS)
def test_how_a_script_is_written(name):
    """It imports nothing of this repository but data, and its loss is easy to find."""
    tree, imported, columns = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")), [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported.append(node.module)
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        if isinstance(node, ast.Assign) and "loss" in map(ast.unparse, node.targets):
            columns.append(node.col_offset)
    ours = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {module.split(".")[0] for module in imported} & ours == {"data"}
    assert columns and max(columns) <= 16


def test_importing_the_scripts_does_nothing_and_needs_no_decoder():
    code = ("import numpy, random, signal, sys, torch\n"
            "def state(): return (torch.get_num_threads(), torch.random.initial_seed(),\n"
            "    torch.are_deterministic_algorithms_enabled(), signal.getsignal(signal.SIGTERM))\n"
            f"before = state(); import {', '.join(SCRIPTS)}\n"
            "print(state() == before, {'av', 'cv2', 'torchaudio'} & set(sys.modules))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "True set()\n", run.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_error_is_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys, sigterm):
    argv = [f"{name}.py", "--dataset", "ave", "--data-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{name}.py: error: ave is not prepared")
