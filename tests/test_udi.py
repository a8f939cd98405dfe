"""UDI's functions against float64 loops, and what must hold of its two stages."""

import math
from argparse import Namespace

import pytest
import torch
from conftest import arrays

import joint_baseline
import udi
from data import DataError, store

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("small")


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def test_consistency_loss_and_its_gradient():
    torch.manual_seed(0)
    anchor = torch.randn(5, 4, dtype=F64)
    follower = torch.randn(5, 4, dtype=F64, requires_grad=True)
    expected = torch.zeros((), dtype=F64)
    for a, f in zip(anchor, follower):
        p, q = a.exp() / a.exp().sum(), f.exp() / f.exp().sum()
        for c in range(4):
            m = (p[c] + q[c]) / 2
            expected = expected + (p[c] * torch.log(p[c] / m) + q[c] * torch.log(q[c] / m)) / 2 / 5
    got = udi.consistency_loss(anchor, follower)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, follower), gradients(expected, follower))


def test_consistency_loss_is_symmetric_bounded_and_finite():
    torch.manual_seed(0)
    for scale in (1, 100, 1e4):
        a, f = scale * torch.randn(8, 5), (scale * torch.randn(8, 5)).requires_grad_()
        loss = udi.consistency_loss(a, f)
        assert 0 <= loss.item() <= math.log(2) + 1e-6
        assert loss.item() == pytest.approx(udi.consistency_loss(f, a).item(), abs=1e-6)
        assert gradients(loss, f)[0].isfinite().all()
    assert udi.consistency_loss(a, a).item() == pytest.approx(0, abs=1e-6)
    opposite = udi.consistency_loss(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    assert opposite.item() == pytest.approx(math.log(2))


def test_complementary_loss_and_its_gradient():
    torch.manual_seed(0)
    anchor = torch.randn(6, 7, dtype=F64)
    follower = torch.randn(6, 7, dtype=F64, requires_grad=True)
    a, f = ([row / row.norm() for row in x] for x in (anchor, follower))
    every = sum(((f[i] - a[j]) ** 2).sum() for i in range(6) for j in range(6)) / 36
    same = sum(((f[i] - a[i]) ** 2).sum() for i in range(6)) / 6
    expected = (every - same) / (2 * 0.1)
    got = udi.complementary_loss(anchor, follower, 0.1)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, follower), gradients(expected, follower))


def test_complementary_loss_is_bounded_and_knows_no_order():
    torch.manual_seed(0)
    a, f, order = torch.randn(9, 5), torch.randn(9, 5), torch.randperm(9)
    assert udi.complementary_loss(a, torch.ones(9, 5), 0.1).item() == pytest.approx(0, abs=1e-5)
    loss = udi.complementary_loss(a, f, 0.1).item()
    assert udi.complementary_loss(a[order], f[order], 0.1).item() == pytest.approx(loss, abs=1e-5)
    sides = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for follower in (sides, -sides, 1e6 * sides):
        assert abs(udi.complementary_loss(sides, follower, 0.1).item()) <= 2 / 0.1
    assert udi.complementary_loss(sides, sides, 0.1).item() == pytest.approx(10)


def test_linear_cka():
    torch.manual_seed(0)
    a, f = torch.randn(20, 6, dtype=F64), torch.randn(20, 4, dtype=F64)
    ca, cf = a - a.mean(0), f - f.mean(0)
    expected = (cf.T @ ca).square().sum() / ((ca.T @ ca).norm() * (cf.T @ cf).norm())
    assert udi.linear_cka(a, f).item() == pytest.approx(expected.item(), rel=1e-4)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=F64))[0]
    assert udi.linear_cka(a, 3 * a @ rotation).item() == pytest.approx(1, abs=1e-5)


def test_no_gradient_reaches_the_anchor():
    a, f = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss = udi.consistency_loss(a, f) + udi.complementary_loss(a, f, 0.1) + udi.linear_cka(a, f)
    loss.backward()
    assert a.grad is None and f.grad.abs().sum() > 0


def test_interaction_weights():
    torch.manual_seed(0)
    task, other = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    cosine = [(task * g).sum() / (task.norm() * g.norm()) for g in (other, -task)]
    expected = torch.stack([torch.exp(c / 0.5) for c in cosine])
    got = udi.interaction_weights(task, other, -task, 0.5)
    torch.testing.assert_close(got, expected / expected.sum())
    rising = [udi.interaction_weights(task, other + share * task, other, 0.5)[0].item()
              for share in (-1, 0, 1, 2)]
    assert rising == sorted(rising) and rising[0] < rising[-1]
    for zeros in ((task * 0, task, other), (task, task * 0, other * 0)):
        assert udi.interaction_weights(*zeros, 0.5).tolist() == [0.5, 0.5]


def test_choose_anchor():
    assert udi.choose_anchor({"a": 0.7, "b": 0.9}, {"a": 0.1, "b": 2.0}, 0.05) == "b"
    near = udi.choose_anchor({"a": 0.87, "b": 0.9, "c": 0.5}, {"a": 0.3, "b": 0.4, "c": 0.0}, 0.05)
    assert near == "a"                                              # the lower entropy
    equal = udi.choose_anchor({"a": 0.9, "b": 0.9}, {"a": 0.3, "b": 0.3}, 0.0)
    assert equal == "a"                                             # the first named


def test_the_anchor_is_chosen_by_the_last_scores_of_stage_1():
    def epoch(stage, m, accuracy, entropy):
        scores = {"accuracy": accuracy, "entropy": entropy}
        return dict(stage=stage, modality=m, val={"modality_heads": {m: scores}})

    alone = [epoch("alone", "a", 0.2, 0.9), epoch("alone", "a", 0.77, 0.1),
             epoch("alone", "b", 0.9, 0.3), epoch("alone", "b", 0.8, 0.2)]
    choice = dict(anchor="a", accuracy={"a": 0.77, "b": 0.8}, entropy={"a": 0.1, "b": 0.2},
                  tolerance=pytest.approx(0.04))                    # sqrt(0.8 * 0.2 / 100)
    assert udi.choose(alone, n_val=100) == choice
    resumed = alone + [epoch("guided", "b", 0.95, 0.1)]
    assert udi.choose(resumed, n_val=100) == choice


def test_converged():
    """Only epochs since the rate's last drop count, here at 10 of 15."""
    r = Namespace(epochs=15, lr_step=5, patience=2)
    assert not udi.converged([0.9] * 10, r)
    assert not udi.converged([0.9] * 10 + [0.5, 0.6, 0.7], r)       # it rises again
    assert not udi.converged([0.9] * 10 + [0.5, 0.6], r)
    assert udi.converged([0.1] * 10 + [0.5, 0.5, 0.4], r)
    assert not udi.converged([0.1] * 10 + [0.5, 0.5, 0.6], r)
    assert udi.converged([0.5, 0.4, 0.5], Namespace(epochs=5, lr_step=5, patience=2))      # no drop


def state_of(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("anchor", ["audio", "image"])  # its features: once, at each step
def test_the_anchor_is_frozen_bit_for_bit(anchor, tiny, tmp_path, monkeypatch):
    flags = ["--dataset", tiny, "--batch-size", "8", "--epochs", "1", "--anchor", anchor]
    flags += ["--out", str(tmp_path)]
    begun = []

    def stop_in_stage_2(batches, **_):
        begun.append(batches)
        if len(begun) == 2:
            raise InterruptedError
        return batches

    with monkeypatch.context() as patch:
        patch.setattr(udi, "tqdm", stop_in_stage_2)
        with pytest.raises(InterruptedError):
            udi.main(flags)
    file = tmp_path / f"udi.anchor-{anchor}-tiny-official-seed0.pt"
    before = state_of(file)
    udi.main([*flags, "--resume"])
    after = state_of(file)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    a, f = (0, 1) if anchor == "audio" else (1, 0)
    assert not any(key.startswith((f"encoders.{a}.", f"heads.{a}.")) for key in changed)
    assert {f"encoders.{f}.0.weight", f"encoders.{f}.1.running_mean", f"heads.{f}.weight",
            "cosines"} <= changed


def test_unguided_it_is_the_plain_ensemble_with_as_many_parameters(tiny, tmp_path):
    common = ["--dataset", tiny, "--batch-size", "8", "--epochs", "1", "--out", str(tmp_path)]
    result = udi.main([*common, "--interaction", "0", "0"])
    joint_baseline.main([*common, "--ensemble"])
    ours, theirs = (state_of(tmp_path / f"{name}-tiny-official-seed0.pt")
                    for name in ("udi.interaction0-0", "joint_baseline.ensemble"))
    assert ({key: w.shape for key, w in ours.items() if key != "cosines"}
            == {key: w.shape for key, w in theirs.items()})
    guided, = [epoch for epoch in result["epochs"] if epoch["stage"] == "guided"]
    assert guided["loss"]["consistency"] == guided["loss"]["complement"] == 0
    interaction = guided["interaction"]
    assert interaction["alpha"] == 0 and -1 <= interaction["cos_consistency"] <= 1


def test_a_run_with_its_choice_and_weights(tiny, tmp_path, capsys):
    flags = ["--dataset", tiny, "--batch-size", "8", "--epochs", "2", "--out", str(tmp_path)]
    result = udi.main(flags)
    choice = result["choice"]
    expected = udi.choose_anchor(choice["accuracy"], choice["entropy"], choice["tolerance"])
    assert choice["anchor"] == expected
    assert f"the anchor is {expected}\n" in capsys.readouterr().out
    for m, accuracy in choice["accuracy"].items():
        alone = [e for e in result["epochs"] if (e["stage"], e["modality"]) == ("alone", m)]
        assert accuracy == alone[-1]["val"]["modality_heads"][m]["accuracy"]
    follower = {"audio": "image", "image": "audio"}[choice["anchor"]]
    stages = dict.fromkeys((epoch["stage"], epoch["modality"]) for epoch in result["epochs"])
    assert list(stages) == [("alone", "audio"), ("alone", "image"), ("guided", follower)]
    interaction = result["epochs"][-1]["interaction"]
    assert interaction["alpha"] + interaction["beta"] == pytest.approx(1)


@pytest.mark.parametrize("flags", [["--complement", "cka"],
                                   ["--follower-init", "stage1", "--anchor", "audio"]])
def test_three_modalities_and_variants(flags, tmp_path):
    folder = store.write(tmp_path / "three", **arrays(n=24, modalities=("audio", "image", "depth")))
    common = ["--dataset", str(folder), "--batch-size", "6", "--epochs", "1"]
    result = udi.main([*common, *flags, "--out", str(tmp_path)])
    guided = [epoch["modality"] for epoch in result["epochs"] if epoch["stage"] == "guided"]
    assert guided == [m for m in ("audio", "image", "depth") if m != result["choice"]["anchor"]]
    alone = [epoch["modality"] for epoch in result["epochs"] if epoch["stage"] == "alone"]
    assert alone == ["audio", "image", "depth"]


@pytest.mark.parametrize("flags,message", [
    (["--val", "0"], "no validation items to choose the anchor by"),
    (["--anchor", "smell"], "no modality smell"),
    (["--interaction", "-1", "0"], "--interaction cannot be negative"),
    (["--val", "0", "--anchor", "audio", "--patience", "3"], "--patience needs validation items")])
def test_what_cannot_be(flags, message, tmp_path):
    with pytest.raises(DataError, match=message):
        udi.main([*flags, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
