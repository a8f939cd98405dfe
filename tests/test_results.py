"""The tables and the report: numbers worked out by hand, and files that must not be averaged."""

import json
import os
import subprocess
import sys

import pytest
import scipy.stats
from conftest import PLAIN, ROOT

from data import DataError
from results import table


def rules(percent):
    score = {"accuracy": percent / 100, "macro_f1": percent / 100}
    return {"last": score, "best_val": score, "best_test": score}


@pytest.fixture
def write(tmp_path):
    """write(row, seed, answer in %, probes in % by modality, ...) puts a result into tmp_path and
    returns its name."""
    def write(row, seed, percent, probes=None, name=None, heads=(), alone=None, **changed):
        method, _, variant = row.partition(".")
        heads, right = {"fused": percent, **dict(heads)}, round(10 * percent)
        said = {"predictions": [1] * right + [0] * (1000 - right), "confidence": [0.9] * 1000}
        result = {
            "schema": 2, "method": method, "variant": variant, "dataset": "toy",
            "split": "official", "seed": seed, "val": 0.1, "amp": "auto", "precision": "float32",
            "recipe": {"epochs": 20, "lr": 0.1}, "data": {"label.npy": "abc"}, "answer": "fused",
            "command": [f"{method}.py"], "commit": None, "versions": {}, "device": "cpu",
            "seconds": 1.0, "n_train": 10, "n_val": 2, "n_test": 4, "classes": ["a", "b"],
            "heads": {head: rules(accuracy) for head, accuracy in heads.items()},
            "modality_heads": {m: rules(accuracy) for m, accuracy in (alone or {}).items()},
            "probes": {m: p and p / 100 for m, p in (probes or {"audio": percent}).items()},
            "probe_failures": {}, "epochs": [],
            "test": {"labels": [1] * 1000, "heads": {head: said for head in heads},
                     "modality_heads": {m: said for m in alone or {}}}, **changed}
        name = name or f"{row}-toy-official-seed{seed}.json"
        (tmp_path / name).write_text(json.dumps(result), encoding="utf-8")
        return name
    return write


def cells(markdown, label):
    """The cells of the one line of a table that begins with a label."""
    line, = [line for line in markdown.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


TOY = "toy", "official"


# ---- numbers -------------------------------------------------------------------------------------
def test_paired_interval_is_scipys():
    ours, theirs = {0: 91.0, 1: 94.5, 2: 93.0, 7: 12.0}, {0: 90.0, 1: 92.0, 2: 93.5, 8: 99.0}
    mean, half, n = table.paired(ours, theirs)
    expected = scipy.stats.ttest_rel([91, 94.5, 93], [90, 92, 93.5]).confidence_interval(0.95)
    assert n == 3 and (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert table.paired({0: 3.0}, {0: 1.0}) == (2.0, None, 1)
    with pytest.raises(ValueError, match="no seed has both values"):
        table.paired({0: 3.0}, {1: 1.0})


def test_a_row_by_hand(write, tmp_path, capsys):
    for seed, joint, ours in ((0, 90, 91), (1, 80, 82), (2, 70, 73)):
        write("joint_baseline.concat", seed, joint)
        write("dimml", seed, ours, heads={"own": 60 + seed})
    write("dimml", 3, 94, heads={"own": 63})
    write("udi", 0, 50)
    runs = table.load(tmp_path)
    details = table.details(TOY, runs[TOY])
    # accuracy 91 82 73 94: mean 85, squares of the deviations 36 + 9 + 144 + 81 = 270,
    # std sqrt(270 / 3) = 9.49; differences 1 2 3: mean 2, std 1, half an interval
    # t(0.975, 2) / sqrt(3) = 4.3027 / 1.732 = 2.484
    assert cells(details, "`dimml`") == ["4", *["85.0 ± 9.5"] * 4, "+2.0 [−0.5, +4.5], n = 3",
                                         "not run", "85.0 ± 9.5"]
    assert cells(details, "`dimml`, own")[:2] == ["4", "61.5 ± 1.3"]
    assert cells(details, "`joint_baseline.concat`")[-3:-1] == ["", "not run"]
    assert cells(details, "`udi`")[:2] == ["1", "50.0"]              # one run: no std, no interval
    assert cells(details, "`udi`")[-3] == "−40.0"
    assert capsys.readouterr().err == ""


def test_the_overview_has_a_row_a_method_and_a_column_a_dataset(write, tmp_path):
    sets = {"toy": ["audio", "image"], "lips": ["audio", "lips"],
            "clips": ["audio", "flow", "text"]}
    for dataset, names in sets.items():
        for seed in (0, 1):
            alone = {m: 60 + 10 * i + seed * (i == 0) for i, m in enumerate(names)}
            write("joint_baseline.ensemble", seed, 90, alone=alone, probes=alone,
                  name=f"{dataset}{seed}.json", dataset=dataset)
    write("dimml", 0, 95)
    write("mine.bold", 0, 85)
    overview = table.overview(table.load(tmp_path))
    header, _, *body = [[cell.strip() for cell in line.split("|")[1:-1]]
                        for line in overview.splitlines()]
    assert header == ["method", *(f"{name}, official (n = {n})" for name, n in
                                  (("clips", 2), ("lips", 2), ("toy", 1)))]
    assert body == [
        ["modality 1 alone"] + ["audio 60.5 ± 0.7"] * 2 + ["audio 60.5 ± 0.7 (n = 2)"],
        ["modality 2 alone", "flow 70.0 ± 0.0", "lips 70.0 ± 0.0", "image 70.0 ± 0.0 (n = 2)"],
        ["modality 3 alone", "text 80.0 ± 0.0", "", ""],
        ["`joint_baseline.ensemble`", "90.0 ± 0.0", "90.0 ± 0.0", "90.0 ± 0.0 (n = 2)"],
        ["`dimml`", "", "", "95.0"], ["`mine.bold`", "", "", "85.0"]]


# ---- words ---------------------------------------------------------------------------------------
def test_words_by_hand(write, tmp_path):
    """Costs of 34 33 35 points: mean 34, std 1, half an interval 2.48; of 1 -1 0: none is shown.
    Joint training's -4 [-7.2, -0.8] has p = 0.033, the third of four: 2 p > 0.05, so it is not
    shown to lose. Nor is always 0.1 more shown to win."""
    for seed, image, audio in ((0, 34, 1), (1, 33, -1), (2, 35, 0)):
        write("joint_baseline.ensemble", seed, 90, {"audio": 70, "image": 80},
              alone={"audio": 70, "image": 80})
        joint = {"audio": 70 - audio, "image": 80 - image}
        write("joint_baseline.concat", seed, 84.7 + 1.3 * seed, joint)
        write("dimml", seed, 93 + seed / 10, {"audio": 70, "image": 80})
        write("udi", seed, 90.1, {"audio": 70, "image": 80})
        write("udi.interaction0-0", seed, 50 + seed, {"audio": 70, "image": 80})
    write("mine", 0, 99)
    words = table.words(TOY, table.load(tmp_path)[TOY])
    assert words == (
        "**toy, official.** Joint training costs the image encoder 34.0 [31.5, 36.5] points "
        "(n = 3). No cost is shown for the audio encoder: 0.0 [−2.5, 2.5] points (n = 3). "
        "Shown to beat the ensemble, of 4 methods: `dimml` +3.1 [+2.9, +3.3]. "
        "Shown to lose to it: `udi.interaction0-0` −39.0 [−41.5, −36.5]. "
        "Not told apart from it: `joint_baseline.concat`, `udi`. Not compared, one seed: `mine`.")


def test_words_where_joint_training_helps_or_a_probe_is_missing(write, tmp_path):
    for seed in (0, 1):
        write("joint_baseline.ensemble", seed, 90, {"audio": 70 + seed, "image": None})
        write("joint_baseline.concat", seed, 90, {"audio": 75 + seed, "image": 50})
    words = table.words(TOY, table.load(tmp_path)[TOY])
    assert "Joint training teaches the audio encoder 5.0 [5.0, 5.0] points more (n = 2)." in words
    assert "costs the image encoder is not known: no seed has both values." in words
    assert "Of 1 methods none is shown to beat the ensemble. Not told apart" in words


def test_words_of_one_seed_claim_nothing_and_say_which_baseline_is_missing(write, tmp_path):
    write("dimml", 0, 90)
    words = table.words(TOY, table.load(tmp_path)[TOY])
    assert "there is no `joint_baseline.concat` and no `joint_baseline.ensemble`." in words
    assert words.endswith("beats the ensemble is not known: there is no `joint_baseline.ensemble`.")
    write("joint_baseline.ensemble", 0, 90)
    write("joint_baseline.concat", 0, 80)
    words = table.words(TOY, table.load(tmp_path)[TOY])
    assert "One seed: 10.0 points for the audio encoder, which shows nothing." in words
    assert words.endswith("Whether a method beats the ensemble is not known. "
                          "Not compared, one seed: `joint_baseline.concat`, `dimml`.")


# ---- anybody's folder ----------------------------------------------------------------------------
GONE = object()


def put(value, *path):
    """A damage: another value there, or none."""
    def damage(result):
        for key in path[:-1]:
            result = result[key]
        if value is GONE:
            del result[path[-1]]
        else:
            result[path[-1]] = value
    return damage


LAST = "heads", "fused", "last"
DAMAGED = [
    (put(1, "schema"), "its schema is 1, not 2"), (put(GONE, "heads"), "result has no 'heads'"),
    (put(GONE, *LAST), "result.heads.fused has no 'last'"),
    (put("high", *LAST, "accuracy"), "result.heads.fused.last.accuracy is 'high'"),
    (put(93.5, *LAST, "accuracy"), "is '93.5'"),                # in percent
    (put(float("nan"), "probes", "audio"), "probes.audio is 'nan'"),
    (put(10**400, "seconds"), "result.seconds is '1000"),
    (put([1], "modality_heads"), "modality_heads is not a dict"),
    (put("own", "answer"), "its answer 'own' is not one"),
    (put([0, 1, 0], "test", "heads", "fused", "predictions"), "not one prediction for each label"),
    (put(0.999, *LAST, "accuracy"), "the accuracy of its answer is not that of its predictions"),
    (put("a\n| b", "variant"), "result.variant is"), (put(True, "seed"), "result.seed is 'True'"),
]


@pytest.mark.parametrize("damage,message", DAMAGED)
def test_a_damaged_result_is_named_and_left_out(damage, message, write, tmp_path, capsys):
    write("dimml", 0, 80)
    path = tmp_path / write("dimml", 1, 10)
    result = json.loads(path.read_text(encoding="utf-8"))
    damage(result)
    path.write_text(json.dumps(result), encoding="utf-8")
    table.main([str(tmp_path)])
    out, err = capsys.readouterr()
    assert cells(out.split("**")[2], "`dimml`")[:2] == ["1", "80.0"]
    assert err.startswith(f"results.table: {path} is left out: ") and message in err


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"null", b'{"schema": 2', b"\xff\xfe\x00",
                                     b'{"schema": "\xe9"}', b"[" * 100_000, b"{}"])
def test_what_is_no_result_is_named_and_left_out(content, write, tmp_path, capsys):
    write("dimml", 0, 80)
    (tmp_path / "other.json").write_bytes(content)
    (tmp_path / "folder.json").mkdir()
    assert set(table.load(tmp_path)[TOY]["dimml"]) == {0}
    folder, other = capsys.readouterr().err.splitlines()
    assert "folder.json is left out: " in folder and "other.json is left out: " in other


def test_a_modality_may_be_called_by_any_word_of_ours(write, tmp_path):
    names = {"fused": 60, "own": 70}
    write("joint_baseline.ensemble", 0, 90, probes=names, alone=names)
    write("joint_baseline.concat", 0, 80, probes={"fused": 50, "own": 70})
    overview = table.overview(table.load(tmp_path))
    assert cells(overview, "modality 1 alone") == ["fused 60.0"]
    assert cells(overview, "`joint_baseline.ensemble`") == ["90.0"]
    assert "10.0 points for the fused encoder" in table.words(TOY, table.load(tmp_path)[TOY])


def test_two_files_of_one_seed_are_both_left_out_unless_they_are_copies(write, tmp_path, capsys):
    write("dimml", 0, 80)
    write("dimml", 0, 80, name="backup.json")
    twice = write("dimml", 1, 90), write("dimml", 1, 70, name="copy.json")
    assert set(table.load(tmp_path, tmp_path)[TOY]["dimml"]) == {0}    # a folder given twice is one
    message, = capsys.readouterr().err.splitlines()
    assert all(name in message for name in twice) and "seed 1" in message


@pytest.mark.parametrize("changed,named", [
    ({"recipe": {"epochs": 3, "lr": 0.1}}, "its --epochs differs"),
    ({"precision": "bfloat16"}, "its precision differs"),
    ({"data": {"label.npy": "other"}}, "its data differs"), ({"val": 0.0}, "its val differs"),
    ({"recipe": {"epochs": 20, "lr": 0.1, "fusion_epochs": 5}}, "its --fusion-epochs differs")])
def test_a_run_of_another_setting_is_left_out_of_its_row(write, tmp_path, capsys, changed, named):
    write("dimml", 0, 80)
    write("dimml", 1, 82)
    other = write("dimml", 2, 10, **changed)
    assert set(table.load(tmp_path)[TOY]["dimml"]) == {0, 1}
    message, = capsys.readouterr().err.splitlines()
    assert f"{other} is left out: {named}" in message


def test_a_row_made_on_two_commits_is_averaged_and_named(write, tmp_path, capsys):
    write("dimml", 0, 80, commit="a")
    write("dimml", 1, 82, commit="b")
    assert set(table.load(tmp_path)[TOY]["dimml"]) == {0, 1}
    assert "averaged, but made with another commit" in capsys.readouterr().err


def test_where_no_setting_is_that_of_most_the_row_is_left_out(write, tmp_path, capsys):
    write("dimml", 0, 80)
    write("dimml", 1, 82, precision="bfloat16")
    assert table.load(tmp_path) == {} and "they differ in precision" in capsys.readouterr().err


def test_rows_of_unequal_settings_are_not_paired(write, tmp_path):
    for seed in (0, 1):
        write("joint_baseline.concat", seed, 80)
        write("joint_baseline.ensemble", seed, 80, data={"label.npy": "other"})
        write("dimml", seed, 85, recipe={"epochs": 20, "lr": 0.1, "tau": 50})    # tau is its own
    rows = table.load(tmp_path)[TOY]
    compared = cells(table.details(TOY, rows), "`dimml`")[-3:-1]
    assert compared == ["+5.0 [+5.0, +5.0]", "different data"]
    words = table.words(TOY, rows)
    assert "What joint training costs the audio encoder is not known: different data." in words
    assert "Not compared, different data: `joint_baseline.concat`, `dimml`." in words
    overview = table.overview({TOY: rows})
    assert cells(overview, "`dimml`") == ["85.0 ± 0.0 †"] and "\n† not compared" in overview


def test_ablations_stand_apart(write, tmp_path, capsys):
    for row in ("udi.cka", "dimml.duc0", "mine.duc0"):
        write(row, 0, 80)
    table.main([str(tmp_path)])
    out, err = capsys.readouterr()
    assert "`dimml.duc0`" in out and "`mine.duc0`" in out and "`udi.cka`" not in out
    assert "ablations that are not shown without --ablations: udi.cka" in err
    table.main([str(tmp_path), "--ablations"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")][:3]
    assert [row.split("`")[1] for row in rows] == ["dimml.duc0", "mine.duc0", "udi.cka"]


def test_no_folder_and_no_runs(tmp_path, capsys):
    with pytest.raises(DataError, match="there is no folder"):
        table.main([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="there is no folder ~no such user/runs"):
        table.main(["~no such user/runs"])
    with pytest.raises(DataError, match="no runs to show"):
        table.main([str(tmp_path)])


# ---- README --------------------------------------------------------------------------------------
PAGE = f"# Étude ± −\n{table.BEGIN}\nold\n{table.END}\nafter\n"


def test_readme_in_a_locale_that_lacks_its_letters(write, tmp_path):
    for seed, percent in ((0, 80), (1, 82)):
        write("dimml", seed, percent)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(PAGE, encoding="utf-8")
    (tmp_path / "results").mkdir()
    ledger = tmp_path / "results/DEVIATIONS.md"
    ledger.write_text("| D3 | a | b |\n| D4 | é | not measured |\n", encoding="utf-8")
    code = ("from pathlib import Path; from results import table\n"
            f"table.ROOT = table.RUNS = Path({str(tmp_path)!r}); table.main(['--readme'])")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                         env={**os.environ, **PLAIN})
    assert (run.returncode, run.stderr) == (0, b"")
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page == PAGE.replace("old\n", table.readme(table.load(tmp_path)))
    assert cells(page, "`dimml`") == ["81.0 ± 1.4"]
    assert ledger.read_text(encoding="utf-8") == (
        "| D3 | a | b |\n| D4 | é | best test epoch less last, points: toy +0.0 [+0.0, +0.0] "
        "(n = 2) |\n")
    assert b"<svg" in (tmp_path / "docs/results.svg").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("page", ["no markers", table.END + table.BEGIN, PAGE + table.BEGIN])
def test_a_readme_without_its_markers_is_left_as_it_is(page, write, tmp_path, monkeypatch):
    write("dimml", 0, 80)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "RUNS", tmp_path)
    with pytest.raises(DataError, match="README.md: it has not the two lines"):
        table.main(["--readme"])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page
    assert not list((tmp_path / "docs").iterdir())


# ---- the report ----------------------------------------------------------------------------------
def test_the_report_is_small():
    assert (ROOT / "results/report.ipynb").stat().st_size < 1_000_000
