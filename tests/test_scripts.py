"""What a method script must not do. How it is written is its own affair: the tests look at our
three scripts, compare none with another, and never collect a stranger's."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ("joint_baseline", "dimml", "udi")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_nothing_of_this_repository_but_data(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names]
    ours = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {module.split(".")[0] for module in imported} & ours == {"data"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_does_nothing_and_needs_no_decoder(name):
    """Beyond definitions and constants, at most an os.environ.setdefault."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    calls = [ast.unparse(node.value.func) for node in tree.body
             if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert set(calls) <= {"os.environ.setdefault"}
    code = (f"import signal, sys, torch, numpy, random\n"
            "def state(): return (torch.get_num_threads(), torch.random.initial_seed(),\n"
            "    torch.are_deterministic_algorithms_enabled(), signal.getsignal(signal.SIGTERM))\n"
            f"before = state(); import {name}\n"
            "print(state() == before, {'av', 'cv2', 'torchaudio'} & set(sys.modules))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "True set()\n", run.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short(name):
    assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 500
