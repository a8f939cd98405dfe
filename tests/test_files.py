"""What a result says of the code that made it."""

import subprocess

import torch

from data import provenance


def test_the_commit_says_dirty_where_script_or_data_are_not_as_committed(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words],
                       check=True, capture_output=True)

    def commit(script="mine.py"):
        return provenance(tmp_path / script, torch.device("cpu"))["commit"]

    (tmp_path / "data").mkdir()
    files = {"mine.py": "1", "data/store.py": "1", ".gitignore": "__pycache__/\nown.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert commit() is None                                     # no repository yet
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "data/__pycache__").mkdir()
    (tmp_path / "data/__pycache__/store.pyc").write_text("compiled")
    (tmp_path / "notes.txt").write_text("nobody's business")
    clean = commit()
    assert len(clean) == 40
    for other in ("other.py", "own.py"):                        # untracked, and ignored
        (tmp_path / other).write_text("1")
        assert commit(other) == f"{clean}-dirty"
    assert commit() == clean
    (tmp_path / "data/store.py").write_text("2")
    assert commit() == f"{clean}-dirty"
