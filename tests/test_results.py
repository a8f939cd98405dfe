"""The tables and the report: numbers worked out by hand, and runs that must not be averaged in silence."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import ledger, quotes

from results import table

ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(tmp_path):
    """write(method, variant, seed, accuracy in %, ...) puts a run file into tmp_path and returns its name."""
    def write(method, variant, seed, percent, recipe=None, name=None, **changed):
        score = {"accuracy": percent / 100, "macro_f1": percent / 100}
        result = {
            "schema": 1, "method": method, "variant": variant, "dataset": "toy", "split": "official", "seed": seed, "val": 0.1,
            "amp": "float32", "recipe": recipe or {"epochs": 20, "lr": 0.1}, "data": {"label.npy": "abc"},
            "n_train": 10, "n_val": 2, "n_test": 4, "classes": ["a", "b"], "probes": {"audio": percent / 100},
            "heads": {"fused": {"last": score, "best_val": score, "best_test": score}}, **changed}
        name = name or f"{method}.{variant}-seed{seed}.json"
        (tmp_path / name).write_text(json.dumps(result))
        return name
    return write


def cells(markdown, row):
    line, = [line for line in markdown.split("\n\n")[2].splitlines() if line.startswith(f"| `{row}`")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_paired_interval_is_scipys():
    ours, theirs = {0: 91.0, 1: 94.5, 2: 93.0, 3: 90.0, 7: 12.0}, {0: 90.0, 1: 92.0, 2: 93.5, 3: 87.0, 8: 99.0}
    mean, half, n = table.paired(ours, theirs)
    expected = scipy.stats.ttest_rel([91.0, 94.5, 93.0, 90.0], [90.0, 92.0, 93.5, 87.0]).confidence_interval(0.95)
    assert n == 4 and (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert table.paired({0: 3.0}, {0: 1.0}) == (2.0, None, 1)
    with pytest.raises(ValueError, match="no seed in common"):
        table.paired({0: 3.0}, {1: 1.0})


def test_a_row_by_hand(write, tmp_path, capsys):
    for seed, joint, ours in ((0, 90, 91), (1, 80, 82), (2, 70, 73)):
        write("joint_baseline", "concat", seed, joint)
        write("dimml", "", seed, ours)
    write("dimml", "", 3, 94)
    write("udi", "", 0, 50)
    markdown = table.markdown(table.load(tmp_path))
    # accuracy 91 82 73 94: mean 85, squares of the deviations 36 + 9 + 144 + 81 = 270, std sqrt(270 / 3) = 9.49
    # differences 1 2 3: mean 2, std 1, t(0.975, 2) = 4.3027, half an interval 4.3027 / sqrt(3) = 2.484
    assert cells(markdown, "dimml") == ["`dimml`", "4", *["85.0 ± 9.5"] * 4, "+2.0 [−0.5, +4.5], n = 3", "not run"]
    assert cells(markdown, "joint_baseline.concat")[-2:] == ["", "not run"]
    assert cells(markdown, "udi") == ["`udi`", "1", *["50.0"] * 4, "−40.0", "not run"]       # one run: no std, no interval
    assert capsys.readouterr().err == ""


def test_the_ensemble_shows_each_modality_alone(write, tmp_path):
    accuracies = {"audio": 0.6, "image": 0.7, "fused": 0.8}
    write("joint_baseline", "ensemble", 0, 0,
          heads={head: {"last": {"accuracy": accuracy, "macro_f1": 0.5}} for head, accuracy in accuracies.items()})
    rows = table.rows(table.load(tmp_path)["toy", "official"])
    assert {label: table.accuracy(*row) for label, row in rows.items()} == {
        "audio alone": {0: 60.0}, "image alone": {0: 70.0}, "joint_baseline.ensemble": {0: 80.0}}
    assert table.accuracy(*rows["audio alone"], rule="best_val") == {}       # as with --val 0


def test_what_is_no_run_is_named_and_left_out(write, tmp_path, capsys):
    write("dimml", "", 0, 80)
    write("dimml", "", 1, 10, schema=2)
    whole = (tmp_path / write("dimml", "", 2, 10, name="cut.json")).read_text()
    (tmp_path / "cut.json").write_text(whole[:len(whole) // 2])
    (tmp_path / "list.json").write_text("[1, 2]")
    markdown = table.markdown(table.load(tmp_path))
    assert cells(markdown, "dimml")[1:3] == ["1", "80.0"]
    cut, schema, no_run = capsys.readouterr().err.splitlines()
    assert cut.startswith("results.table: cut.json is left out: not a whole JSON file")
    assert schema == "results.table: dimml.-seed1.json is left out: its schema is 2, not 1"
    assert no_run == "results.table: list.json is left out: its schema is None, not 1"


def test_two_files_of_one_seed_are_both_left_out(write, tmp_path, capsys):
    write("dimml", "", 0, 80)
    twice = write("dimml", "", 1, 90), write("dimml", "", 1, 70, name="dimml.copy.json")
    assert set(table.load(tmp_path)["toy", "official"]["dimml"]) == {0}
    message, = capsys.readouterr().err.splitlines()
    assert all(name in message for name in twice) and "seed 1" in message


@pytest.mark.parametrize("changed,named", [
    ({"recipe": {"epochs": 3, "lr": 0.1}}, "another epochs"), ({"amp": "bfloat16"}, "another amp"),
    ({"data": {"label.npy": "other"}}, "another data"), ({"val": 0.0}, "another val"),
    ({"recipe": {"epochs": 20, "lr": 0.1, "patience": 5}}, "another patience")])
def test_a_run_of_another_setting_is_left_out_of_its_row(write, tmp_path, capsys, changed, named):
    write("dimml", "", 0, 80)
    write("dimml", "", 1, 82)
    other = write("dimml", "", 2, 10, **changed)
    assert set(table.load(tmp_path)["toy", "official"]["dimml"]) == {0, 1}
    message, = capsys.readouterr().err.splitlines()
    assert f"{other} is left out: {named}" in message


def test_where_no_setting_is_that_of_most_the_row_is_left_out(write, tmp_path, capsys):
    write("dimml", "", 0, 80)
    write("dimml", "", 1, 82, amp="bfloat16")
    assert table.load(tmp_path) == {}
    assert "dimml.-seed0.json, dimml.-seed1.json are left out" in capsys.readouterr().err


def test_rows_of_unequal_settings_are_not_paired(write, tmp_path, capsys):
    for seed in (0, 1):
        write("joint_baseline", "concat", seed, 80)
        write("joint_baseline", "ensemble", seed, 80, data={"label.npy": "other"})
        write("dimml", "", seed, 85, recipe={"epochs": 20, "lr": 0.1, "tau": 50})         # tau is its own: it may be compared
    markdown = table.markdown(table.load(tmp_path))
    assert cells(markdown, "dimml")[-2:] == ["+5.0 [+5.0, +5.0]", "another data"]
    errors = capsys.readouterr().err
    assert "dimml on toy official is not paired with joint_baseline.ensemble: another data" in errors
    assert "is not paired with joint_baseline.concat" in errors and errors.count("\n") == 3


def test_calibration_by_hand():
    confidence, correct = [0.05, 0.55, 0.57, 1.0], [False, True, False, True]
    number, mean, share, error = table.calibration(confidence, correct)
    assert number.tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert mean[[0, 5, 9]] == pytest.approx([0.05, 0.56, 1.0]) and share[[0, 5, 9]] == pytest.approx([0, 0.5, 1])
    assert np.isnan(mean[1]) and np.isnan(share[1])
    assert error == pytest.approx(0.25 * 0.05 + 0.5 * 0.06)


def test_class_accuracy_by_hand():
    result = {"classes": ["a", "b", "c"], "test": {"labels": [0, 0, 0, 1], "predictions": {"fused": [0, 1, 0, 1]}}}
    accuracy = table.class_accuracy(result, "fused")
    assert accuracy[:2] == pytest.approx([200 / 3, 100]) and np.isnan(accuracy[2])


def test_the_report_is_executed_and_can_be_loaded_quickly():
    path = ROOT / "results/report.ipynb"
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))     # in order, in one go
    assert path.stat().st_size < 1_500_000


def difference(ours, theirs):
    return table.points(*table.paired(ours, theirs)[:2])


def test_the_differences_in_the_readmes_words_are_those_of_the_runs():
    measured = set(bfloat16_less_float32())
    for methods in table.load().values():
        lines = table.rows(methods)
        for base, method in itertools.product((table.JOINT, table.ENSEMBLE, "udi.interaction0-0", "udi.interaction0-0.stage1"), methods):
            measured.add(difference(table.accuracy(*lines[method]), table.accuracy(*lines[base])))
            for m in ("audio", "image"):
                measured.add(difference(table.probes(methods[method], m), table.probes(methods[base], m)))
            if method.startswith("udi") and base.startswith("udi"):
                measured.add(difference(table.follower_probes(methods[method]), table.follower_probes(methods[base])))
    quoted = quotes((ROOT / "README.md").read_text().split("## Results")[1].split(table.BEGIN)[0])
    assert len(quoted) > 10 and set(quoted) <= measured


LEDGER = {"U3": ("udi.cka", "udi"), "U4": ("udi", "udi.interaction0.5-0.5"), "U5": ("udi.stage1", "udi")}


@pytest.mark.parametrize("row", LEDGER)
def test_the_effects_in_the_ledger_are_those_of_the_runs(row):
    lines = [[table.rows(methods)[method] for method in LEDGER[row]] for methods in table.load().values()]
    assert quotes(ledger(row)) == [difference(table.accuracy(*ours), table.accuracy(*theirs)) for ours, theirs in lines]


def bfloat16_less_float32():
    """One difference for each set and method: the same commands but for --amp, the same seeds."""
    runs = table.load()
    for section, methods in table.load(ROOT / "results/bfloat16").items():
        assert set(methods) == {"joint_baseline.concat", "dimml", "udi"}
        for method, (results, head) in table.rows(methods).items():
            assert set(results) == set(range(5)) and table.differing(results[0], runs[section][method][0]) == ["amp"]
            yield difference(table.accuracy(results, head), table.accuracy(runs[section][method], head))


def test_bfloat16_in_the_ledger():
    assert quotes(ledger("D20")) == list(bfloat16_less_float32()) and len(quotes(ledger("D20"))) == 6


def test_follower_probes_leave_the_anchor_out():
    result = {"probes": {"audio": 0.5, "image": 0.75, "text": 0.25}, "choice": {"anchor": "image"}}
    assert table.follower_probes({3: result}) == {3: 37.5}
