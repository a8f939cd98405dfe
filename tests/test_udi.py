"""UDI's functions against float64 loops, and what must hold of its two stages."""

import math

import pytest
import torch
from conftest import arrays

import joint_baseline
import udi
from data import store

F64 = torch.float64
FILE = "udi-tiny-official-seed0"


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def test_consistency_loss_and_its_gradient():
    torch.manual_seed(0)
    anchor, follower = torch.randn(5, 4, dtype=F64), torch.randn(5, 4, dtype=F64, requires_grad=True)
    expected = torch.zeros((), dtype=F64)
    for a, f in zip(anchor, follower):
        p, q = a.exp() / a.exp().sum(), f.exp() / f.exp().sum()
        for c in range(4):
            m = (p[c] + q[c]) / 2
            expected = expected + (p[c] * torch.log(p[c] / m) + q[c] * torch.log(q[c] / m)) / 2 / 5
    got = udi.consistency_loss(anchor, follower)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(got, follower), gradients(expected, follower), rtol=1e-4, atol=1e-6)


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
    anchor, follower = torch.randn(6, 7, dtype=F64), torch.randn(6, 7, dtype=F64, requires_grad=True)
    a, f = ([row / row.norm() for row in x] for x in (anchor, follower))
    every = sum(((f[i] - a[j]) ** 2).sum() for i in range(6) for j in range(6)) / 36
    same = sum(((f[i] - a[i]) ** 2).sum() for i in range(6)) / 6
    expected = (every - same) / (2 * 0.1)
    got = udi.complementary_loss(anchor, follower, 0.1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(got, follower), gradients(expected, follower), rtol=1e-4, atol=1e-6)


def test_complementary_loss_is_bounded_and_knows_no_order():
    torch.manual_seed(0)
    a, f, order = torch.randn(9, 5), torch.randn(9, 5), torch.randperm(9)
    assert udi.complementary_loss(a, torch.ones(9, 5), 0.1).item() == pytest.approx(0, abs=1e-5)
    assert udi.complementary_loss(a[order], f[order], 0.1).item() == pytest.approx(udi.complementary_loss(a, f, 0.1).item(), abs=1e-5)
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
    torch.testing.assert_close(udi.interaction_weights(task, other, -task, 0.5).double(), expected / expected.sum(), rtol=1e-5, atol=1e-6)
    rising = [udi.interaction_weights(task, other + share * task, other, 0.5)[0].item() for share in (-1, 0, 1, 2)]
    assert rising == sorted(rising) and rising[0] < rising[-1]
    for zero in (udi.interaction_weights(torch.zeros(4, 6), task, other, 0.5), udi.interaction_weights(task, task * 0, other * 0, 0.5)):
        assert zero.tolist() == [0.5, 0.5]


def test_choose_anchor():
    assert udi.choose_anchor({"a": 0.7, "b": 0.9}, {"a": 0.1, "b": 2.0}, 0.05) == "b"
    assert udi.choose_anchor({"a": 0.87, "b": 0.9, "c": 0.5}, {"a": 0.3, "b": 0.4, "c": 0.0}, 0.05) == "a"     # a near tie
    assert udi.choose_anchor({"a": 0.9, "b": 0.9}, {"a": 0.3, "b": 0.3}, 0.0) == "a"                          # the first named


def test_converged():
    records = [{"stage": "s", "val": {"h": {"accuracy": a}}} for a in (0.1, 0.5, 0.4, 0.5, 0.3)]
    assert udi.converged(records, "s", "h", 3) and not udi.converged(records, "s", "h", 4)
    assert not udi.converged(records[:1], "s", "h", 1) and not udi.converged([{"stage": "s", "val": {}}] * 9, "s", "h", 1)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("anchor", ["audio", "image"])       # outputs computed once; computed at each step
def test_the_anchor_is_frozen_bit_for_bit(anchor, tiny, tmp_path, monkeypatch):
    before = {}
    guide = udi.guide
    monkeypatch.setattr(udi, "guide", lambda run, model, *names: before.update(
        {key: value.clone() for key, value in model.state_dict().items()}) or guide(run, model, *names))
    udi.main(["--dataset", tiny, "--batch-size", "8", "--epochs", "2", "--anchor", anchor, "--out", str(tmp_path)])
    after = weights(tmp_path / f"udi.{anchor}-tiny-official-seed0.pt")
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert not any(f".{anchor}." in key for key in changed)
    follower = {"audio": "image", "image": "audio"}[anchor]
    assert {f"encoders.{follower}.conv1.weight", f"encoders.{follower}.bn1.running_mean", f"heads.{follower}.weight"} <= changed


def test_unguided_from_stage_1_it_is_the_plain_ensemble_with_as_many_parameters(tiny, tmp_path):
    common = ["--dataset", tiny, "--batch-size", "8", "--epochs", "1", "--out", str(tmp_path)]
    result = udi.main([*common, "--interaction", "0", "0"])
    joint_baseline.main([*common, "--ensemble"])
    ours = weights(tmp_path / "udi.interaction0-0-tiny-official-seed0.pt")
    theirs = weights(tmp_path / "joint_baseline.ensemble-tiny-official-seed0.pt")
    assert {k: v.shape for k, v in ours.items() if "cosines" not in k} == {k: v.shape for k, v in theirs.items()}
    guided = [epoch for epoch in result["epochs"] if epoch["stage"].startswith("guided")]
    assert all(epoch["loss"]["consistency"] == epoch["loss"]["complement"] == 0 for epoch in guided)
    assert guided[0]["interaction"]["alpha"] == 0 and -1 <= guided[0]["interaction"]["cos_consistency"] <= 1


def test_a_run_with_its_choice_and_weights(tiny, tmp_path, capsys):
    result = udi.main(["--dataset", tiny, "--batch-size", "8", "--epochs", "2", "--out", str(tmp_path)])
    assert set(result["heads"]) == {"audio", "image", "fused"}
    choice = result["choice"]
    assert choice["anchor"] == udi.choose_anchor(choice["accuracy"], choice["entropy"], choice["tolerance"])
    assert f"anchor: {choice['anchor']}" in capsys.readouterr().out
    stages = [epoch["stage"] for epoch in result["epochs"]]
    follower = {"audio": "image", "image": "audio"}[choice["anchor"]]
    assert list(dict.fromkeys(stages)) == ["alone audio", "alone image", f"guided {follower}"]
    interaction = result["epochs"][-1]["interaction"]
    assert interaction["alpha"] + interaction["beta"] == pytest.approx(1)


@pytest.mark.parametrize("flags", [["--complement", "cka"], ["--follower-init", "stage1", "--anchor", "audio"]])
def test_three_modalities_and_variants(flags, tmp_path):
    folder = store.write(tmp_path / "three", **arrays(n=24, modalities=("audio", "image", "depth")))
    result = udi.main(["--dataset", str(folder), "--batch-size", "6", "--epochs", "1", *flags, "--out", str(tmp_path)])
    guided = [epoch["stage"] for epoch in result["epochs"] if epoch["stage"].startswith("guided")]
    assert len(guided) == 2 and f"guided {result['choice']['anchor']}" not in guided


@pytest.mark.parametrize("flags,message", [(["--val", "0"], "nothing to choose the anchor by"), (["--anchor", "smell"], "no such modality"),
                                           (["--interaction", "-1", "0"], "--interaction cannot be -1")])
def test_what_cannot_be(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        udi.main([*flags, "--out", str(tmp_path)])
    assert stop.value.code == 2 and message in capsys.readouterr().err
