"""The tables: numbers worked out by hand, and files that must not be averaged."""

import json
import math

import pytest

from data import DataError
from results import table

TOY = "toy", "official"


def rules(percent):
    score = {"accuracy": percent / 100, "macro_f1": percent / 100}
    return {"last": score, "best_val": score, "best_test": score}


@pytest.fixture
def write(tmp_path):
    """write(row, seed, answer in %, probes in % by modality, ...) puts a result of schema 3 into
    tmp_path and returns its name."""
    def write(row, seed, percent, probes=None, name=None, heads=(), alone=None, **changed):
        method, _, variant = row.partition(".")
        heads, right = {"fused": percent, **dict(heads)}, round(10 * percent)
        said = {"predictions": [1] * right + [0] * (1000 - right), "confidence": [0.9] * 1000}
        result = {
            "schema": 3, "method": method, "variant": variant, "dataset": "toy",
            "split": "official", "seed": seed, "val": 0.1, "precision": "float32",
            "recipe": {"epochs": 20, "lr": 0.1}, "data": {"label.npy": "abc"}, "answer": "fused",
            "command": [f"{method}.py"], "commit": None, "versions": {}, "device": "cpu",
            "seconds": 90.0, "peak_memory": None, "classes": ["a", "b"],
            "heads": {head: rules(accuracy) for head, accuracy in heads.items()},
            "modality_heads": {m: rules(accuracy) for m, accuracy in (alone or {}).items()},
            "probes": {m: p and p / 100 for m, p in (probes or {"audio": percent}).items()},
            "epochs": [{"epoch": epoch} for epoch in range(20)],
            "test": {"labels": [1] * 1000, "heads": {head: said for head in heads},
                     "modality_heads": {m: said for m in alone or {}}}, **changed}
        name = name or f"{row}-{result['dataset']}-{result['split']}-seed{seed}.json"
        (tmp_path / name).write_text(json.dumps(result), encoding="utf-8")
        return name
    return write


def cells(markdown, label):
    """The cells of the one line of a table that begins with a label."""
    line, = [line for line in markdown.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


# ---- numbers -------------------------------------------------------------------------------------
def test_a_row_by_hand(write, tmp_path):
    for seed, joint, ours in ((0, 90, 91), (1, 80, 82), (2, 70, 73)):
        write("joint_baseline.concat", seed, joint)
        write("dimml", seed, ours, heads={"own": 60 + seed}, peak_memory=(seed + 1) * 2**30)
    write("dimml", 3, 94, heads={"own": 63}, schema=2)      # the older schema has no peak_memory
    write("udi", 0, 50)
    details = table.details(table.load(tmp_path)[TOY])
    # accuracy 91 82 73 94: mean 85, squares of the deviations 36 + 9 + 144 + 81 = 270,
    # std sqrt(270 / 3) = 9.49; differences 1 2 3: mean 2, std 1, half an interval
    # t(0.975, 2) / sqrt(3) = 4.3027 / 1.732 = 2.484; 90 s in 20 epochs
    assert cells(details, "`dimml`") == ["4", *["85.0 ± 9.5"] * 4, "+2.0 [−0.5, +4.5], n = 3",
                                         "there is no row to compare with", "85.0 ± 9.5", "1.5",
                                         "4.5", "3.0 GiB"]
    assert cells(details, "`dimml`, own")[:2] == ["4", "61.5 ± 1.3"]
    assert cells(details, "`udi`")[1:6] == ["50.0"] * 4 + ["−40.0"]     # one run: no interval


def test_the_overview_has_a_row_a_method_and_a_column_a_dataset(write, tmp_path):
    sets = {"lips": ["audio", "lips"], "utdmhad": ["depth", "inertial", "skeleton"]}
    for dataset, names in sets.items():
        for seed in (0, 1):
            alone = {m: 60 + 10 * i + seed * (i == 0) for i, m in enumerate(names)}
            write("joint_baseline.ensemble", seed, 90, alone=alone, probes=alone, dataset=dataset,
                  heads={"calibrated": 92} if dataset == "utdmhad" else {})
    write("balance.auxiliary", 0, 96, dataset="utdmhad")
    write("mine.bold", 0, 85, dataset="lips")
    write("joint_baseline.gated", 0, 100, dataset="synergy")
    overview = table.overview(table.load(tmp_path))
    body = [[cell.strip() for cell in line.split("|")[1:-1]] for line in overview.splitlines()]
    assert body[0] == ["method", "lips, official (n = 2)", "synergy, official (n = 1)",
                       "utdmhad, official (n = 2)"]      # the most runs of a row
    assert body[2:11] == [
        ["modality 1 alone", "audio 60.5 ± 0.7", "", "depth 60.5 ± 0.7"],
        ["modality 2 alone", "lips 70.0 ± 0.0", "", "inertial 70.0 ± 0.0"],
        ["modality 3 alone", "", "", "skeleton 80.0 ± 0.0"],
        ["`joint_baseline.ensemble`", "90.0 ± 0.0", "", "90.0 ± 0.0"],
        ["`joint_baseline.ensemble`, calibrated", "", "", "92.0 ± 0.0"],
        ["`joint_baseline.gated`", "", "100.0", ""],            # on synergy a main row
        ["`balance.auxiliary`", "", "", "96.0 (n = 1)"],
        ["`mine.bold`", "85.0 (n = 1)", "", ""]]


def test_who_was_right_alone_takes_its_cells_from_the_ensemble_of_the_next_seed(tmp_path):
    def result(seed, answer, audio=(), image=()):
        alone = {"audio": {"predictions": audio}, "image": {"predictions": image}}
        return {"seed": seed, "split": "official", "answer": "fused", "test": {
            "labels": [1] * 4, "heads": {"fused": {"predictions": answer}},
            "modality_heads": alone}}
    ensemble = {seed: result(seed, [1] * 4, audio, image) for seed, audio, image in (
        (0, [1, 1, 1, 1], [1, 1, 1, 1]), (1, [1, 0, 0, 0], [0, 0, 0, 0]),
        (5, [1, 1, 0, 0], [1, 0, 1, 0]))}
    ours = {1: result(1, [1, 0, 1, 0]), 5: result(5, [0, 0, 0, 1])}     # cells of seeds 5 and 0
    assert table.right_alone(ours, ensemble) == {
        "only audio": (0, 1), "only image": (1, 1), "both": (2, 5), "neither": (0, 1)}
    with pytest.raises(ValueError, match="no ensemble of another seed"):
        table.right_alone(ours, {1: ensemble[1]})


# ---- words ---------------------------------------------------------------------------------------
def test_words_by_hand(write, tmp_path):
    """Costs of 34 33 35 points: mean 34, std 1, half an interval 2.48; of 1 -1 0: none is shown.
    Joint training's -4 [-7.2, -0.8] has p = 0.033: the planned comparison shows it. `udi`'s -2
    [-3.5, -0.5], p = 0.029, is the fourth of six, `mine` of one seed among them: 3 p > 0.05, so it
    is not shown to lose. Nor is always 0.1 more shown to win. The stds are 0.1 0.1 0 0.6 1, so the
    smallest gain is t(0.99583, 2) 0.1 / sqrt(3) = 0.63; against the calibrated ensemble 0.1 0.1 0.7
    0.9, t(0.995, 2) 0.4 / sqrt(3) = 2.29, and `udi`'s p = 0.017 is the fourth of five: shown,
    though 5 p > 0.05."""
    alone = {"audio": 70, "image": 80}
    for seed, image, audio in ((0, 34, 1), (1, 33, -1), (2, 35, 0)):
        write("joint_baseline.ensemble", seed, 90, alone, alone=alone,
              heads={"calibrated": 91 + seed / 10})
        joint = {"audio": 70 - audio, "image": 80 - image}
        write("joint_baseline.concat", seed, 84.7 + 1.3 * seed, joint)
        write("dimml", seed, [93.1, 93.0, 93.2][seed], alone)
        write("dimml.duc0", seed, 90.1, alone)
        write("udi", seed, 88.6 - 0.6 * seed, alone)
        write("udi.interaction0-0", seed, 50 + seed, alone)
        write("udi.cka", seed, 10, alone)           # an ablation is not judged, nor a part
        write("joint_baseline.only-audio", seed, 70, {"audio": 70})
    write("mine", 0, 99)
    rows = table.load(tmp_path)[TOY]
    assert table.paragraph(TOY, rows) == (
        "**toy, official.** No cost is shown for the audio encoder: 0.0 [−2.5, 2.5] points "
        "(n = 3). Joint training costs the image encoder 34.0 [31.5, 36.5] points (n = 3). "
        "Joint training loses to the ensemble: −4.0 [−7.2, −0.8] points (n = 3). "
        "Shown to beat the ensemble, of 6 other rows: `joint_baseline.ensemble`, calibrated +1.1 "
        "[+0.9, +1.3], `dimml` +3.1 [+2.9, +3.3] (smallest gain that could have been shown: 0.6 "
        "points). "
        "Shown to lose to it: `udi.interaction0-0` −39.0 [−41.5, −36.5]. "
        "Not shown to differ from it: `dimml.duc0`, `udi`. Not compared, one seed: `mine`. "
        "Shown to beat the calibrated ensemble, of 5 other rows: `dimml` +2.0 [+1.8, +2.2] "
        "(smallest gain that could have been shown: 2.3 points). Shown to lose to it: "
        "`dimml.duc0` −1.0 [−1.2, −0.8], `udi` −3.1 [−4.8, −1.4], `udi.interaction0-0` −40.1 "
        "[−42.3, −37.9]. Not compared, one seed: `mine`.")
    asked = [cells(line, line.split(" | ")[0][2:]) for line in (
        table.questions({("other", "small"): {"mine": rows["mine"]}, TOY: rows}).splitlines()[2:])]
    assert asked == [
        ["probe, `ensemble` − `concat`", "", "audio 0.0 [−2.5, 2.5], image 34.0 [31.5, 36.5]"],
        ["`ensemble`, calibrated − `ensemble`", "", "+1.1 [+0.9, +1.3]"],
        ["`concat` − `ensemble`", "", "−4.0 [−7.2, −0.8]"],
        ["`dimml` − `ensemble`", "", "+3.1 [+2.9, +3.3]"],
        ["`dimml` − `ensemble`, calibrated", "", "+2.0 [+1.8, +2.2]"],
        ["`dimml` − `dimml.duc0`", "", "+3.0 [+2.8, +3.2]"],
        ["`udi` − `ensemble`", "", "−2.0 [−3.5, −0.5]"],
        ["`udi` − `ensemble`, calibrated", "", "−3.1 [−4.8, −1.4]"],
        ["`udi` − `udi.interaction0-0`", "", "+37.0 [+33.0, +41.0]"],
        ["each but `concat`, less `ensemble`", "",
         "beat: `dimml`, `ensemble`, calibrated; lose: `udi.interaction0-0`; of 6 (0.6)"],
        ["each but `concat`, less `ensemble`, calibrated", "",
         "beat: `dimml`; lose: `udi.interaction0-0`, `dimml.duc0`, `udi`; of 5 (2.3)"]]
    assert table.questions({TOY: {"mine": rows["mine"]}}) == ""


def test_words_where_joint_training_helps_and_of_one_seed_which_shows_nothing(write, tmp_path):
    write("dimml", 0, 90)
    for seed in (0, 1, 2):      # of two classes
        alone, joint = {"audio": 70, "image": 49 + seed}, {"audio": 75 + seed, "image": 40}
        write("joint_baseline.ensemble", seed, 60, alone, dataset="helps")
        write("joint_baseline.concat", seed, 90 + seed, joint, dataset="helps")
    runs = table.load(tmp_path)
    words = table.paragraph(("helps", "official"), runs["helps", "official"])
    assert ("The audio encoder gains by joint training, which costs it −6.0 [−8.5, −3.5] points "
            "(n = 3). The image encoder has nothing to lose: trained alone it is not") in words
    assert "Joint training beats the ensemble: +31.0 [+28.5, +33.5] points (n = 3)." in words
    words = table.paragraph(TOY, runs[TOY])
    assert ("What joint training costs is not known: no run of `joint_baseline.concat` or "
            "`joint_baseline.ensemble`.") in words
    write("joint_baseline.ensemble", 0, 90)
    write("joint_baseline.concat", 0, 80)
    words = table.paragraph(TOY, table.load(tmp_path)[TOY])
    assert "What joint training costs is not known: one seed shows nothing." in words
    assert words.endswith("not known. Not compared, one seed: `dimml`.")


# ---- which runs are averaged ---------------------------------------------------------------------
@pytest.mark.parametrize("damage,message", [
    (lambda r: r.update(schema=1), "its schema is 1"), (lambda r: r.pop("probes"), "probes"),
    (lambda r: r.update(epochs=[]), "epochs"), (lambda r: r.update(seed="0"), "seed"),
    (lambda r: r["heads"]["fused"]["last"].update(accuracy=math.nan), "not that of its"),
    (lambda r: r["test"]["heads"]["fused"]["predictions"].__setitem__(0, 0), "not that of its")])
def test_what_is_no_result_is_named_and_left_out(damage, message, write, tmp_path, capsys):
    write("dimml", 0, 80)
    path = tmp_path / write("dimml", 1, 90)
    result = json.loads(path.read_text(encoding="utf-8"))
    damage(result)
    path.write_text(json.dumps(result), encoding="utf-8")
    (tmp_path / "cut.json").write_bytes(b'{"schema": 2')
    assert set(table.load(tmp_path)[TOY]["dimml"]) == {0}
    cut, other = capsys.readouterr().err.splitlines()
    assert "cut.json is left out: it is no result" in cut
    assert f"{path} is left out: it is no result" in other and message in other


@pytest.mark.parametrize("changed,named", [
    ({"recipe": {"epochs": 3, "lr": 0.1}}, "epochs"),
    ({"recipe": {"epochs": 20, "lr": 0.1, "alpha": 1}}, "alpha"),
    ({"data": {"label.npy": "other"}}, "data"),
    ({"name": "copy.json", "seed": 0}, "what they say of seed 0")])
def test_a_row_whose_runs_do_not_belong_together_is_left_out(write, tmp_path, capsys, changed,
                                                             named):
    write("dimml", 0, 80)
    write("dimml", 0, 80, name="copy.json")                                 # the same is no second
    write("dimml", 2, 82, recipe={"epochs": 20, "lr": 0.1, "patience": 0}, schema=2)    # an older
    assert set(table.load(tmp_path)[TOY]["dimml"]) == {0, 2}
    write("dimml", **{"seed": 1, "percent": 10, **changed})
    assert table.load(tmp_path) == {}
    said = capsys.readouterr().err
    assert f"left out: its runs in {tmp_path} differ in {named}: keep those" in said


def test_rows_of_unequal_settings_are_not_paired_and_another_commit_is_named(write, tmp_path,
                                                                             capsys):
    for seed in (0, 1):
        write("joint_baseline.concat", seed, 80, commit="ab"[seed])
        write("mine", seed, 80, code=[{"sha256": "ab"[seed], "epoch": 0}])
        write("joint_baseline.ensemble", seed, 80, data={"label.npy": "other"})
        write("dimml", seed, 85, recipe={"epochs": 20, "lr": 0.1, "tau": 50})    # tau is its own
    rows = table.load(tmp_path)[TOY]
    said = capsys.readouterr().err
    assert "concat on toy, official: averaged, but made with another commit" in said
    assert "mine on toy, official: averaged, but made with another code" in said
    compared = cells(table.details(rows), "`dimml`")[5:7]
    assert compared == ["+5.0", "different data"]
    words = table.paragraph(TOY, rows)
    assert "What joint training costs is not known: different data." in words
    assert "Not compared, different data: `dimml`, `mine`." in words


def test_folds_are_one_column_paired_by_fold_and_seed(write, tmp_path):
    for fold, joint in ((0, 60), (3, 80)):
        for seed in (0, 1):
            split = {"dataset": "cremad", "split": f"fold{fold}"}
            write("joint_baseline.ensemble", seed, joint + 5 + seed, **split)
            write("joint_baseline.concat", seed, joint, **split)
    runs = table.load(tmp_path)
    assert list(runs) == [("cremad", "folds")]
    assert cells(table.overview(runs), "`joint_baseline.concat`") == ["70.0 ± 11.5"]
    words = table.paragraph(("cremad", "folds"), runs["cremad", "folds"])
    assert "A run is one seed of one fold, of fold0, fold3." in words
    assert "loses to the ensemble: −5.5 [−6.4, −4.6] points (n = 4)" in words


def test_the_first_folder_that_is_named_has_a_row(write, tmp_path, capsys):
    write("balance.auxiliary", 0, 80)
    write("joint_baseline.film", 0, 60)
    (tmp_path / "theirs").mkdir()
    write("balance.auxiliary", 0, 90, name="theirs/a.json")
    rows = table.load(tmp_path, tmp_path / "theirs", tmp_path)[TOY]
    assert table.accuracy(rows["balance.auxiliary"]) == {0: 80} and len(rows) == 2
    said, = capsys.readouterr().err.splitlines()
    assert "a folder named before" in said


# ---- README --------------------------------------------------------------------------------------
def test_readme_gets_table_and_picture_between_its_markers(write, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "RUNS", tmp_path)
    for dataset, names in (("toy", "ab"), ("utdmhad", ["depth", "inertial", "skeleton"])):
        for seed, percent in ((0, 80), (1, 82)):
            for row in ("dimml", "dimml.shared0"):              # an ablation is not shown
                write(row, seed, percent, dict.fromkeys(names, 70), dataset=dataset)
    (tmp_path / "docs").mkdir()
    text = f"# Étude\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    table.main(["--readme"])
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    runs = table.without_ablations(table.load(tmp_path))
    assert written == text.replace("old\n", table.readme(runs))
    assert cells(written, "`dimml`") == ["81.0 ± 1.4"] * 2 and "shared0" not in written
    assert b"<svg" in (tmp_path / "docs/results.svg").read_bytes()


@pytest.mark.parametrize("argv,message", [
    (["nowhere"], "there is no folder"), (["."], "no runs to show"),
    (["--readme", "runs"], "give no DIR")])
def test_usage(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        table.main(argv)
