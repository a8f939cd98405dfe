"""What a method script must not do; how it is written is its own affair."""

import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ("balance", "dimml", "joint_baseline", "udi")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_nothing_of_this_repository_but_data(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M))
    assert imported & {path.stem for path in ROOT.iterdir()} == {"data"}


def test_importing_the_scripts_does_nothing_and_needs_no_decoder():
    code = ("import numpy, random, signal, sys, torch\n"
            "def state(): return (torch.get_num_threads(), torch.random.initial_seed(),\n"
            "    torch.are_deterministic_algorithms_enabled(), signal.getsignal(signal.SIGTERM))\n"
            f"before = state(); import {', '.join(SCRIPTS)}\n"
            "print(state() == before, {'av', 'cv2', 'torchaudio'} & set(sys.modules))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "True set()\n", run.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_error_is_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    argv = [f"{name}.py", "--dataset", "ave", "--data-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{name}.py: error: ave is not prepared")
