"""What the method scripts have in common, and what they must not have."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))


def shared_blocks(path):
    return re.findall(r"# -+ (shared with the other two scripts: .*?) \{\{\{\n(.*?)# \}\}\} shared\n", path.read_text(), re.S)


def test_shared_blocks_are_the_same_letter_for_letter():
    blocks = [shared_blocks(path) for path in SCRIPTS]
    assert len(blocks) >= 2 and [name for name, _ in blocks[0]] == [
        "shared with the other two scripts: encoder", "shared with the other two scripts: a run"]
    assert all(block == blocks[0] for block in blocks)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_stands_alone_and_is_short(path):
    tree = ast.parse(path.read_text())
    imported = {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert imported & ours == {"data"}
    lines = path.read_text().splitlines()
    assert len(lines) <= 500 and max(map(len, lines)) <= 130


def test_importing_a_script_needs_no_decoder():
    code = "import sys, dimml, joint_baseline, udi; print({'av', 'cv2', 'torchaudio'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_at_most_twenty_flags(path, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(path.stem).main(["--help"])
    flags = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.M))
    assert {"--dataset", "--gpu", "--data-dir", "--epochs", "--batch-size", "--lr", "--seed", "--split", "--val", "--amp",
            "--resume", "--out"} <= flags and len(flags - {"--help"}) <= 20
