"""What one step of each script does to the weights, against its functions (tests/test_losses.py) in
float64.

A step shows its gradient: momentum's first one is w1 = w0 - lr (g + 1e-4 w0). An epoch of one batch
leaves w1 in what the run saves, and w0 and the batch follow from the seed.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SmallEncoder, arrays

import balance
import data
import dimml
import joint_baseline
import udi
from data import open_dataset, store

LR = 0.5
NAMES = ["audio", "image", "depth"]                     # the image is augmented, the others not
pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def saved(monkeypatch):
    """What a run saves after each epoch, as it goes: a list of checkpoints."""
    states, save = [], data.save

    def keep(path, ds, made, device, **state):
        states.append(copy.deepcopy(state))
        save(path, ds, made, device, **state)

    monkeypatch.setattr(data, "save", keep)
    return states


def run(script, tmp_path, *flags):
    """An epoch of one batch a stage; the dataset, the first weights' and batches' random states."""
    folder = store.write(tmp_path / "words", **arrays(modalities=NAMES))
    result = script.main(["--dataset", str(folder), "--batch-size", "24", "--epochs", "1", "--lr",
                          str(LR), "--seed", "3", "--out", str(tmp_path), *flags])
    torch.manual_seed(3)
    return result, open_dataset(str(folder)), torch.Generator().manual_seed(3)


def batch_of(ds, generator):
    """What the run's next step sees: {m: (B, T, C, H, W)}, labels (B,), item numbers (B,)."""
    (inputs, y, index), = ds.batches("train", 24, augment=True, generator=generator)
    return {m: x.double() for m, x in inputs.items()}, y, index


def gradients(term, weights):
    """{name: weight} -> {name: gradient}, without those that the term does not depend on."""
    grads = torch.autograd.grad(term, list(weights.values()), retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(weights, grads) if g is not None}


def assert_stepped(before, after, grads, may_move=(), encoder_lr_factor=1):
    """That one step with these gradients leads from one state to the other, and that nothing else
    moved but what begins with `may_move` (BatchNorm's statistics)."""
    for key in before:
        if key in grads:
            w, lr = before[key].double(), LR * (encoder_lr_factor if key[0] == "e" else 1)
            got = (w - after[key].double()) / lr - 1e-4 * w
            torch.testing.assert_close(got, grads[key], rtol=1e-3, atol=2e-6,
                                       msg=lambda text, key=key: f"{key}: {text}")
        elif not key.startswith(tuple(may_move)):
            assert torch.equal(before[key], after[key]), key


def assert_recorded(state, loss):
    expected = {name: pytest.approx(torch.as_tensor(value).item(), rel=1e-3, abs=1e-5)
                for name, value in loss.items()}
    assert state["log"][-1]["loss"] == expected


# ---- joint_baseline.py and balance.py ------------------------------------------------------------
@pytest.mark.parametrize("kind,flags", [
    ("film", "--fusion film"), (None, "--ensemble --encoder-lr-factor 1.5")])
def test_a_step_of_joint_baseline(kind, flags, tmp_path, saved):
    _, ds, generator = run(joint_baseline, tmp_path, *flags.split())
    model = joint_baseline.Model(ds.in_channels, 3, kind)
    before = copy.deepcopy(model.state_dict())
    inputs, y, _ = batch_of(ds, generator)
    z = model.double().features(inputs)
    loss = {m: F.cross_entropy(head(z[m]), y) for m, head in model.heads.items()}
    if kind:
        loss = {"joint": F.cross_entropy(model.fusion(z), y)}
    grads = gradients(sum(loss.values()), dict(model.named_parameters()))
    assert_stepped(before, saved[0]["model"], grads, ["encoders."], 1 if kind else 1.5)
    assert_recorded(saved[0], loss)


def reference_of_a_cure(name, model, inputs, y):
    """By the equations: losses, {weight: gradient}, and what is watched."""
    z = {m: model.encoders[m](inputs[m]) for m in inputs}
    W, b = model.fusion_head.weight, model.fusion_head.bias
    half = {m: z[m] @ W[:, 512 * i:512 * (i + 1)].T for i, m in enumerate(z)}       # without b
    loss = {m: F.cross_entropy(head(z[m]), y) for m, head in model.heads.items()}
    loss["joint"] = F.cross_entropy(sum(half.values()) + b, y)
    named = dict(model.named_parameters())
    grads = gradients(sum(loss.values()), named)

    scores, watched = {}, {}
    for m in z:
        odds = (half[m] + b / len(z)).exp()
        scores[m] = sum((odds[i, y[i]] / odds[i].sum()).item() for i in range(len(y)))
        weights = {key: w for key, w in named.items() if key.startswith(f"encoders.{m}.")}
        if name == "dgl":
            loss[m] = F.cross_entropy(half[m] + b, y)
            grads.update(gradients(loss[m], weights))
        if name == "mmpareto":
            both = [list(gradients(loss[key], weights).values()) for key in ("joint", m)]
            compromise, (cosine, k1) = balance.pareto_gradient(*both)
            grads.update(zip(weights, compromise))
            watched[m] = dict(cosine=cosine.item(), weight=k1.item())
    if name == "ogm_ge":
        for m, k in balance.ogm_coefficients(scores, 0.8).items():
            watched[m] = dict(score=scores[m] / len(y), coefficient=k.item())
            for layer in (0, 3):                        # the convolutions
                grads[f"encoders.{m}.{layer}.weight"] *= k
        assert min(row["coefficient"] for row in watched.values()) < 1
    return loss, grads, watched


@pytest.mark.parametrize("name", ["auxiliary", "ogm_ge", "mmpareto", "dgl"])
def test_a_step_of_each_cure(name, tmp_path, saved, monkeypatch):
    monkeypatch.setattr(balance, "ogm_ge_gradient", lambda g, k, generator: k * g)  # without noise
    _, ds, generator = run(balance, tmp_path, "--balance", name)
    model = balance.Model(ds.in_channels, 3, own_heads=name in ("auxiliary", "mmpareto"))
    before = copy.deepcopy(model.state_dict())
    if name == "ogm_ge":
        torch.randint(2**62, (), generator=generator)   # the seed of the noise
    inputs, y, _ = batch_of(ds, generator)
    loss, grads, watched = reference_of_a_cure(name, model.double(), inputs, y)
    assert_stepped(before, saved[0]["model"], grads, ["encoders."])
    assert_recorded(saved[0], loss)
    recorded = saved[0]["log"][0].get("balance", {})
    assert list(recorded) == list(watched)
    for m in watched:
        assert recorded[m] == pytest.approx(watched[m], rel=1e-4)


def test_ge_adds_its_noise_in_the_first_half_anew_for_each_tensor_and_epoch(tmp_path, monkeypatch):
    added, real = [], balance.ogm_ge_gradient

    def watched(g, k, generator):
        h = real(g, k, generator)
        added.append(((h - k * g) / g.std()).flatten())
        return h

    monkeypatch.setattr(balance, "ogm_ge_gradient", watched)
    result, *_ = run(balance, tmp_path, "--balance", "ogm_ge", "--epochs", "4")
    assert {row["coefficient"] for row in result["epochs"][2]["balance"].values()} == {1}
    assert len(added) == 2 * 3 * 2                      # 2 of 4 epochs, 3 encoders, 2 convolutions
    wide = [noise for noise in added if len(noise) == 2048]
    for a, b in itertools.combinations(wide, 2):
        assert abs((a * b).mean()) < 0.12               # 5 standard errors


# ---- dimml.py ------------------------------------------------------------------------------------
def test_a_step_of_each_stage_of_dimml(tmp_path, saved):
    flags = ["--warmup", "0", "--fusion-epochs", "1", "--tau", "2", "--shared-weight", "0.7",
             "--duc-weight", "0.3"]
    _, ds, generator = run(dimml, tmp_path, *flags)
    model = dimml.DIMML(ds.in_channels, 3)
    before = copy.deepcopy(model.state_dict())
    (plain, y, _), = ds.batches("train", len(ds.indices("train")))
    with torch.no_grad():
        z = model.eval().features(plain)
    effective = {m: dimml.effective_dimensions(z[m], y, 3) for m in z}
    assert all(0 < dims.sum() < 512 for dims in effective.values())
    torch.testing.assert_close(saved[0]["effective"], effective)

    # stage 1: all but the fusion head
    inputs, y, _ = batch_of(ds, generator)
    z = model.double().train().features(inputs)
    loss = {m: F.cross_entropy(model.heads[m](z[m]), y) for m in z}
    loss["shared"] = 0.7 * sum(F.cross_entropy(model.shared_head(z_m), y) for z_m in z.values())
    loss["duc"] = 0.3 * dimml.duc_loss(z, effective, 2.0)
    grads = gradients(sum(loss.values()), dict(model.named_parameters()))
    assert_stepped(before, saved[0]["model"], grads, ["encoders."])
    assert_recorded(saved[0], loss)

    # stage 2: the fusion head alone, without momentum; the encoders stand still, BatchNorm too
    model.load_state_dict(saved[0]["model"])
    inputs, y, _ = batch_of(ds, generator)
    z = torch.cat(list(model.eval().features(inputs).values()), 1)
    head = model.fusion_head
    loss = {"fusion": F.cross_entropy(z @ head.weight.T + head.bias, y)}
    grads = gradients(loss["fusion"], {"fusion_head.weight": head.weight,
                                       "fusion_head.bias": head.bias})
    assert_stepped(saved[0]["model"], saved[1]["model"], grads)
    assert_recorded(saved[1], loss)
    assert len(saved[1]["optimizer"]["state"]) == 2


def test_the_dimensions_are_split_once_after_the_warm_up(tmp_path, saved):
    run(dimml, tmp_path, "--epochs", "3", "--warmup", "1", "--fusion-epochs", "1")
    before, *after = [state["effective"] for state in saved]
    assert before == {} and set(after[0]) == set(NAMES)
    for dims in after[1:]:
        torch.testing.assert_close(dims, after[0])


# ---- udi.py --------------------------------------------------------------------------------------
@pytest.mark.parametrize("anchor,complement,init,fixed", [
    ("audio", "club", "scratch", None),         # the anchor's features are computed once
    ("image", "cka", "stage1", [0.25, 4.0]),    # they are augmented, so computed at each step
])
def test_a_step_of_each_stage_of_udi(anchor, complement, init, fixed, tmp_path, saved):
    flags = ["--anchor", anchor, "--complement", complement, "--follower-init", init,
             "--variance", "0.2", "--temperature", "0.3"]
    if fixed:
        flags += ["--interaction", *map(str, fixed)]
    result, ds, generator = run(udi, tmp_path, *flags)
    model = udi.UDI(ds.in_channels, 3)
    stages = [(m, "alone") for m in (NAMES if init == "stage1" else [anchor])]
    stages += [(m, "guided") for m in NAMES if m != anchor]
    assert [(e["modality"], e["stage"]) for e in result["epochs"]] == stages

    for state, (m, stage) in zip(saved, stages):
        if stage == "guided" and init == "scratch":
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            model.encoders[m].load_state_dict(SmallEncoder(ds.in_channels[m]).state_dict())
            model.heads[m].reset_parameters()
        before = copy.deepcopy(model.state_dict())
        both = stage == "guided" and anchor == "image"
        loaded = ds.only(*(n for n in NAMES if n == m or both and n == anchor))
        inputs, y, index = batch_of(loaded, generator)
        encoders, heads = model.double().eval().encoders, model.heads
        z = encoders[m].train()(inputs[m])
        loss = {m: F.cross_entropy(heads[m](z), y)}
        if stage == "guided":
            if not both:
                stored = np.array(ds.modalities[anchor].array[index])
                inputs[anchor] = torch.from_numpy(stored).double().unsqueeze(1)
            z_a = encoders[anchor](inputs[anchor]).detach()
            complementary = udi.linear_cka(z_a, z)
            if complement == "club":
                complementary = udi.complementary_loss(z_a, z, 0.2)
            terms = [loss[m], udi.consistency_loss(heads[anchor](z_a), heads[m](z)), complementary]
            g = [torch.autograd.grad(term, z, retain_graph=True)[0] for term in terms]
            cosines = torch.stack([(g[0] * term).sum() / g[0].norm() / term.norm()
                                   for term in g[1:]])
            smoothed = 0.1 * cosines                    # from zero, in each stage
            torch.testing.assert_close(state["cosines"].double(), smoothed, rtol=1e-3, atol=1e-6)
            alpha, beta = fixed or (smoothed / 0.3).softmax(0).tolist()
            loss.update(consistency=alpha * terms[1], complement=beta * terms[2])
            assert state["log"][-1]["interaction"]["alpha"] == pytest.approx(alpha, rel=1e-3)
        grads = gradients(sum(loss.values()), dict(model.named_parameters()))
        if stage == "guided":                           # the anchor's head learns nothing
            grads = {key: g for key, g in grads.items() if key.split(".")[1] == m}
        assert_stepped(before, state["model"], grads, [f"encoders.{m}."])
        assert_recorded(state, loss)
        model.float().load_state_dict(state["model"])
