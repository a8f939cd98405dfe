"""The cures of joint_baseline.py against a slow reference in float64 that follows their equations,
and what one step of each script does to the weights.

A step shows its gradient: momentum's first one is w1 = w0 - lr (g + 1e-4 w0). A run of one batch
leaves w1 in its checkpoint, and w0 and the batch follow from the seed.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import SmallEncoder, arrays, outcome, same

import dimml
import joint_baseline
import udi
from data import open_dataset, store

F64 = torch.float64
LR = 0.5
NAMES = ["forward", "fused", "own"]             # words of ours, as a user may name a modality
WORDS = ["fused", "own", "shared", "duc", "joint", "forward", "type", "fusion", "concat"]


pytestmark = pytest.mark.usefixtures("small")


def prepare(tmp_path, names):
    return open_dataset(str(store.write(tmp_path / "words", **arrays(modalities=names))))


def one_batch(tmp_path, *flags):
    return ["--dataset", str(tmp_path / "words"), "--batch-size", "24", "--epochs", "1",
            "--lr", str(LR), "--seed", "3", "--out", str(tmp_path), *flags]


def batch_of(ds, generator):
    """What the run's next step sees: {m: (B, T, C, H, W)}, (B,)."""
    (inputs, y, _), = ds.batches("train", 24, augment=True, generator=generator)
    return {m: x.double() for m, x in inputs.items()}, y


def gradient(term, weights):
    """A list of tensors, zeros where the term does not depend on a weight."""
    grads = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights)]


def checkpoint(tmp_path, name):
    return torch.load(tmp_path / f"{name}.pt", weights_only=True)


def assert_stepped(before, after, grads, lr=LR):
    """That one step with these gradients leads there: three dicts by the names of weights."""
    for key, g in grads.items():
        got = (before[key].double() - after[key].double()) / lr - 1e-4 * before[key].double()
        torch.testing.assert_close(got, g, rtol=1e-3, atol=2e-6, msg=lambda text: f"{key}: {text}")


# ---- the pure functions --------------------------------------------------------------------------
def reference_ogm(scores, alpha):
    result = {}
    for m, s in scores.items():
        others = [value for name, value in scores.items() if name != m]
        mean = sum(others) / len(others)
        if mean == 0:
            result[m] = 1.0 if s == 0 else 0.0
        else:
            result[m] = 1 - math.tanh(alpha * s / mean) if s / mean > 1 else 1.0
    return result


@pytest.mark.parametrize("values", [(3.0, 1.0), (1.0, 3.0), (8.0, 7.5, 1.0), (1.0, 5.0, 0.5, 0.25),
                                    (2.0, 0.0), (0.0, 0.0), (0.0, 2.0, 0.0)])
def test_ogm_coefficients(values):
    scores = dict(zip("abcd", values))
    for given in (scores, {m: torch.tensor(s) for m, s in scores.items()}):
        got = {m: float(k) for m, k in joint_baseline.ogm_coefficients(given, 0.8).items()}
        assert got == pytest.approx(reference_ogm(scores, 0.8), abs=1e-6)


def test_ogm_keeps_equal_encoders_and_jumps_above():
    for n in (2, 3, 5):
        for value in np.linspace(0.1, 16, 200):         # also where sums of the scores are rounded
            scores = {str(i): torch.tensor(value, dtype=torch.float32) for i in range(n)}
            assert all(k == 1 for k in joint_baseline.ogm_coefficients(scores, 0.8).values())
    above = joint_baseline.ogm_coefficients({"a": 1.00001, "b": 1.0}, 0.8)
    assert float(above["a"]) == pytest.approx(1 - math.tanh(0.8), abs=1e-4) and above["b"] == 1


def test_ge_keeps_k_g_and_adds_noise_of_the_spread_of_g():
    g = 0.01 * torch.randn(64, 64, 7, 7) + 0.003
    seeded = lambda: torch.Generator().manual_seed(5)               # noqa: E731
    noise = joint_baseline.ogm_ge_gradient(g, torch.tensor(0.0), seeded())
    kept = joint_baseline.ogm_ge_gradient(g, torch.tensor(0.3), seeded()) - noise
    torch.testing.assert_close(kept, 0.3 * g)
    assert noise.std().item() == pytest.approx(g.std().item(), rel=0.01)
    assert abs(noise.mean() / noise.std()) < 0.01 and abs((noise * g).mean() / g.std() ** 2) < 0.01
    generator = seeded()
    first, second = (joint_baseline.ogm_ge_gradient(g, 0.0, generator) for _ in range(2))
    assert abs((first * second).mean() / g.std() ** 2) < 0.01       # drawn again


def reference_k0(g0, g1):
    """DESIGN: from plain lists of numbers."""
    dot = lambda u, v: math.fsum(a * b for a, b in zip(u, v))       # noqa: E731
    if dot(g0, g1) > 0 or not any(g0) and not any(g1):
        return 0.5
    k0 = (dot(g1, g1) - dot(g0, g1)) / math.fsum((a - b) ** 2 for a, b in zip(g0, g1))
    return min(max(k0, 0.001), 0.999)


def reference_pareto(joint, own):
    """Lists of tensors -> such a list, number by number."""
    numbers = lambda grads: [v for g in grads for v in g.flatten().tolist()]        # noqa: E731
    k0 = reference_k0(numbers(joint), numbers(own))
    result = []
    for a, b in zip(joint, own):
        h = 2 * k0 * a + 2 * (1 - k0) * b
        size, target = (math.sqrt(math.fsum(v * v for v in numbers([x]))) for x in (h, a + b))
        result.append(1.5 * max(1, target / size) * h if size else 0 * h)
    return result


def test_pareto_weights():
    torch.manual_seed(0)
    g = torch.randn(40, dtype=F64)
    across = torch.randn(40, dtype=F64)
    across = across - (across @ g) / (g @ g) * g                    # orthogonal to g
    cases = {"parallel": (g, 3 * g, 0.5), "the same": (g, g, 0.5), "opposite": (g, -g, 0.5),
             "opposite, larger": (g, -3 * g, 0.75), "opposite, tiny": (g, -1e-6 * g, 0.001),
             "no joint one": (0 * g, g, 0.999), "no own one": (g, 0 * g, 0.001),
             "neither": (0 * g, 0 * g, 0.5), "a slight conflict": (g, across - 0.1 * g, None),
             "a slight agreement": (g, across + 1e-3 * g, 0.5), "conflict": (g, across - g, None)}
    for name, (g0, g1, k0) in cases.items():
        got = joint_baseline.pareto_weights(g0, g1)
        assert got.tolist() == pytest.approx([got[0].item(), 1 - got[0].item()]), name
        assert got[0].item() == pytest.approx(reference_k0(g0.tolist(), g1.tolist())), name
        assert k0 is None or got[0].item() == pytest.approx(k0), name
    g0, g1, _ = cases["conflict"]
    least = joint_baseline.pareto_weights(g0, g1) @ torch.stack([g0, g1])
    for k0 in np.linspace(0.001, 0.999, 99):                        # the point of least norm indeed
        assert least.norm() <= (k0 * g0 + (1 - k0) * g1).norm() + 1e-12


@pytest.mark.parametrize("conflict", [True, False])
def test_pareto_gradient(conflict):
    torch.manual_seed(0)
    joint = [torch.randn(shape, dtype=F64) for shape in ((3, 2), (5,), (4,), (2,))]
    own = [torch.randn_like(g) + (-2 if conflict else 2) * g for g in joint]
    joint[2], own[2] = torch.zeros(2, 4, dtype=F64)                 # a tensor that feels neither
    got, watch = joint_baseline.pareto_gradient(joint, own)
    torch.testing.assert_close(got, reference_pareto(joint, own))
    g0, g1 = (torch.cat([g.flatten() for g in grads]) for grads in (joint, own))
    cosine, k0 = (g0 @ g1 / g0.norm() / g1.norm()).item(), reference_k0(g0.tolist(), g1.tolist())
    assert watch.tolist() == pytest.approx([cosine, 1 - k0]) and (cosine < 0) == conflict
    if not conflict:                                                # 1.5 times that of `auxiliary`
        torch.testing.assert_close(got, [1.5 * (a + b) for a, b in zip(joint, own)],
                                   rtol=1e-14, atol=0)


@pytest.mark.parametrize("factor", [1, -1, 0])
def test_pareto_gradient_of_parallel_opposite_and_zero_gradients(factor):
    g = [torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([0.5], dtype=F64)]
    got, _ = joint_baseline.pareto_gradient(g, [factor * x for x in g])
    expected = {1: 3.0, -1: 0.0, 0: 1.5}[factor]            # 0: stretched to |g0 + g1|, times 1.5
    torch.testing.assert_close(got, [expected * x for x in g])


def test_a_pareto_gradient_that_overflowed_is_not_taken_for_zero():
    """Else fp16's scaler would not see it: the encoders would stand still, and the scale stay."""
    joint, own = [torch.tensor([math.inf, 1.0]), torch.ones(2)], [torch.zeros(2), torch.ones(2)]
    assert not torch.cat(joint_baseline.pareto_gradient(joint, own)[0]).isfinite().any()


def test_half_head_logits_sum_to_the_heads():
    torch.manual_seed(0)
    z, head = {m: torch.randn(5, 8) for m in NAMES}, nn.Linear(24, 4)
    halves = joint_baseline.half_head_logits(z, head.weight, head.bias / 3)
    torch.testing.assert_close(sum(halves.values()), head(torch.cat(list(z.values()), 1)))
    torch.testing.assert_close(halves["fused"], z["fused"] @ head.weight[:, 8:16].T + head.bias / 3)


# ---- one step of joint_baseline.py ---------------------------------------------------------------
def reference_step(balance, model, inputs, y):
    """The gradients by the equations in float64, {weight: tensor}; and what a cure records."""
    z = {m: encoder(inputs[m]) for m, encoder in zip(model.modalities, model.encoders)}
    W, b = model.fusion.out.weight, model.fusion.out.bias
    joint = F.cross_entropy(torch.cat(list(z.values()), 1) @ W.T + b, y)
    own = [F.cross_entropy(z_m @ head.weight.T + head.bias, y)
           for z_m, head in zip(z.values(), model.heads)]
    named = dict(model.named_parameters())
    grads = dict(zip(named, gradient(joint + sum(own), list(named.values()))))
    scores, watch = {}, {}
    for i, (m, z_m) in enumerate(z.items()):
        W_m = W[:, 512 * i:512 * (i + 1)]
        keys = [key for key in named if key.startswith(f"encoders.{i}.")]
        weights = [named[key] for key in keys]
        odds = (z_m @ W_m.T + b / len(z)).exp()
        scores[m] = sum((odds[j, y[j]] / odds[j].sum()).item() for j in range(len(y)))
        if balance == "dgl":
            half = gradient(F.cross_entropy(z_m @ W_m.T + b, y), weights)
            grads.update(zip(keys, half))
        if balance == "mmpareto":
            both = gradient(joint, weights), gradient(own[i], weights)
            grads.update(zip(keys, reference_pareto(*both)))
            g0, g1 = (torch.cat([g.flatten() for g in each]) for each in both)
            watch[m] = dict(cosine=(g0 @ g1 / g0.norm() / g1.norm()).item(),
                            weight=1 - reference_k0(g0.tolist(), g1.tolist()))
    if balance == "ogm_ge":
        for i, (m, k) in enumerate(reference_ogm(scores, 0.8).items()):
            watch[m] = dict(score=scores[m] / len(y), coefficient=k)
            for key in (f"encoders.{i}.0.weight", f"encoders.{i}.3.weight"):
                grads[key] = k * grads[key]
    return grads, watch


@pytest.mark.parametrize("n_modalities", [2, 3])
@pytest.mark.parametrize("balance", ["none", "auxiliary", "ogm_ge", "mmpareto", "dgl"])
def test_the_step_of_each_cure(balance, n_modalities, tmp_path, monkeypatch):
    names = NAMES[:n_modalities]
    ds = prepare(tmp_path, names)
    without_noise = lambda g, k, generator: k * g           # noqa: E731
    monkeypatch.setattr(joint_baseline, "ogm_ge_gradient", without_noise)
    factor = 1.5 if balance == "auxiliary" else 1.0         # the control for MMPareto
    flags = ["--balance", balance, "--encoder-lr-factor", str(factor)]
    result = joint_baseline.main(one_batch(tmp_path, *flags))

    torch.manual_seed(3)
    own_heads = balance in ("auxiliary", "mmpareto")
    model = joint_baseline.Model({m: 1 for m in names}, 3, "concat", own_heads)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    if balance == "ogm_ge":
        torch.randint(2**62, (), generator=generator)       # the seed of the noise
    inputs, y = batch_of(ds, generator)
    grads, watch = reference_step(balance, model.double(), inputs, y)
    file = f"joint_baseline.{result['variant']}-words-official-seed3"
    after = checkpoint(tmp_path, file)["model"]
    of_encoders = {key: g for key, g in grads.items() if key.startswith("encoders")}
    assert_stepped(before, after, of_encoders, LR * factor)
    assert_stepped(before, after, {key: g for key, g in grads.items() if key not in of_encoders})

    # what is recorded, under names that do not meet those of the modalities
    epoch, = result["epochs"]
    assert set(epoch["loss"]) == {"joint"} and set(result["heads"]) == {"fused"}
    assert set(epoch["modality_loss"]) == (set(names) if own_heads or balance == "dgl" else set())
    assert set(result["modality_heads"]) == (set(names) if own_heads else set())
    assert set(result["probes"]) == set(names)
    assert list(epoch.get("balance", {})) == list(watch)
    for m in watch:
        assert epoch["balance"][m] == pytest.approx(watch[m], rel=1e-3, abs=1e-5)
    if balance == "ogm_ge":                                 # the test has seen some suppressed
        assert min(row["coefficient"] for row in watch.values()) < 1
    assert json.loads((tmp_path / f"{file}.json").read_text())["epochs"] == result["epochs"]


def test_ge_adds_its_noise_in_the_first_half_anew_for_each_tensor_and_epoch(tmp_path, monkeypatch):
    prepare(tmp_path, NAMES[:2])
    added, real = [], joint_baseline.ogm_ge_gradient

    def watched(g, k, generator):
        h = real(g, k, generator)
        added.append(((h - k * g) / g.std()).flatten())
        return h

    monkeypatch.setattr(joint_baseline, "ogm_ge_gradient", watched)
    result = joint_baseline.main(one_batch(tmp_path, "--balance", "ogm_ge", "--epochs", "3"))
    assert {row["coefficient"] for row in result["epochs"][2]["balance"].values()} == {1}
    assert len(added) == 2 * 2 * 2                      # 2 of 3 epochs, 2 encoders, 2 convolutions
    wide = [noise for noise in added if len(noise) == 2048]
    assert all(noise.std().item() == pytest.approx(1, abs=0.1) for noise in wide)
    for i in range(4):
        for j in range(i):
            assert abs((wide[i] * wide[j]).mean()) < 0.12   # 5 standard errors


RUNS = {        # script, flags, epochs
    "ogm_ge": (joint_baseline, ["--balance", "ogm_ge", "--epochs", "4"], 4),
    "dimml": (dimml, ["--epochs", "3", "--warmup", "1", "--fusion-epochs", "2"], 5),
    "udi": (udi, ["--epochs", "2"], 10),            # three alone, two guided
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_resumed_after_any_epoch_has_the_same_bits(run, tmp_path, monkeypatch):
    script, flags, n_epochs = RUNS[run]
    prepare(tmp_path, NAMES)
    flags = one_batch(tmp_path, "--batch-size", "8", "--lr", "0.02", *flags)
    whole, begun = script.main([*flags, "--out", str(tmp_path / "whole")]), []

    def stop_in_the_second_epoch(batches, **_):
        begun.append(batches)
        if len(begun) == 2:
            raise InterruptedError
        return batches

    monkeypatch.setattr(script, "tqdm", stop_in_the_second_epoch)
    for _ in range(n_epochs - 1):                           # one epoch each
        with pytest.raises(InterruptedError):
            script.main([*flags, "--resume"])
        begun.clear()
    script.main([*flags, "--resume"])
    assert len(whole["epochs"]) == n_epochs
    assert same(outcome(tmp_path), outcome(tmp_path / "whole"))
    if run == "dimml":
        stages = [{"shared"}, *[{"shared", "duc"}] * 2, *[{"fusion"}] * 2]
        assert [set(epoch["loss"]) for epoch in whole["epochs"]] == stages


# ---- one step of dimml.py and udi.py -------------------------------------------------------------
@pytest.mark.parametrize("n_modalities", [2, 3])
def test_a_step_of_dimml(n_modalities, tmp_path):
    names = NAMES[:n_modalities]
    ds = prepare(tmp_path, names)
    flags = ["--warmup", "0", "--fusion-epochs", "1", "--tau", "2",
             "--shared-weight", "0.7", "--duc-weight", "0.3"]
    result = dimml.main(one_batch(tmp_path, *flags))
    after = checkpoint(tmp_path, f"dimml.{result['variant']}-words-official-seed3")["model"]

    torch.manual_seed(3)
    model = dimml.DIMML({m: 1 for m in names}, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (plain, y, _), = ds.batches("train", len(ds.indices("train")))
    with torch.no_grad():
        z = model.eval().features(plain)
    effective = {m: dimml.effective_dimensions(z[m], y, 3) for m in names}
    torch.testing.assert_close(after["effective"], torch.stack(list(effective.values())))
    assert all(0 < dims.sum() < 512 for dims in effective.values())

    # stage 1: all but the fusion head
    generator = torch.Generator().manual_seed(3)
    inputs, y = batch_of(ds, generator)
    z = model.double().train().features(inputs)
    loss = sum(F.cross_entropy(head(z_m), y) for head, z_m in zip(model.heads, z.values()))
    loss = loss + 0.7 * sum(F.cross_entropy(model.shared_head(z_m), y) for z_m in z.values())
    for t in names:
        for s in names:
            dims = effective[t] & ~effective[s]
            if s != t and dims.any():
                exponents = (z[s][:, dims] @ z[t][:, dims].detach().T / 2).exp()
                loss = loss - 0.3 * (exponents.diagonal() / exponents.sum(1)).log().mean()
    named = {key: w for key, w in model.named_parameters() if not key.startswith("fusion")}
    assert_stepped(before, after, dict(zip(named, gradient(loss, list(named.values())))))

    # stage 2: the fusion head alone, on what stage 1 left, frozen
    new = {key: before[key] for key in ("fusion_head.weight", "fusion_head.bias")}
    model.load_state_dict({**after, **new})
    inputs, y = batch_of(ds, generator)
    z = model.eval().features(inputs)
    loss = F.cross_entropy(torch.cat(list(z.values()), 1) @ model.fusion_head.weight.T
                           + model.fusion_head.bias, y)
    grads = gradient(loss, [model.fusion_head.weight, model.fusion_head.bias])
    assert_stepped(before, after, dict(zip(new, grads)))

    duc, fusion = result["epochs"]
    assert (set(duc["modality_loss"]), set(fusion["modality_loss"])) == (set(names), set())
    assert set(result["heads"]) == {"fused", "fusion", "own", "unweighted"}
    assert set(result["modality_heads"]) == set(result["probes"]) == set(names)


@pytest.mark.parametrize("complement", ["club", "cka"])
def test_a_guided_step_of_udi(complement, tmp_path, monkeypatch):
    ds = prepare(tmp_path, NAMES[:2])
    monkeypatch.setattr(udi, "choose", lambda log, n_val: dict(anchor="fused"))
    flags = ["--complement", complement, "--variance", "0.2", "--temperature", "0.3"]
    result = udi.main(one_batch(tmp_path, *flags))
    dot = "." * bool(result["variant"])
    after = checkpoint(tmp_path, f"udi{dot}{result['variant']}-words-official-seed3")["model"]

    # stage 1: each alone; here the anchor
    torch.manual_seed(3)
    model = udi.UDI({m: 1 for m in NAMES[:2]}, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    batch_of(ds.only("forward"), generator)
    inputs, y = batch_of(ds.only("fused"), generator)
    named = {key: w for key, w in model.double().named_parameters() if key.split(".")[1] == "1"}
    loss = F.cross_entropy(model.heads[1](model.encoders[1](inputs["fused"])), y)
    assert_stepped(before, after, dict(zip(named, gradient(loss, list(named.values())))))

    # stage 2: the follower from new weights and without momentum, the anchor frozen
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
    follower, head = SmallEncoder(1), nn.Linear(512, 3)
    before = {**{f"encoders.0.{key}": w.clone() for key, w in follower.state_dict().items()},
              **{f"heads.0.{key}": w.clone() for key, w in head.state_dict().items()}}
    (inputs, y, index), = ds.only("forward").batches("train", 24, augment=True, generator=generator)
    x = torch.from_numpy(np.array(ds.modalities["fused"].array[index])).double()
    model.load_state_dict(after)
    z_a = model.eval().encoders[1](x.unsqueeze(1))
    z = follower.double()(inputs["forward"].double())
    o, o_a = head.double()(z), model.heads[1](z_a)
    task = F.cross_entropy(o, y)
    p, q = o_a.softmax(1), o.softmax(1)
    middle = (p + q) / 2
    js = ((p * (p / middle).log() + q * (q / middle).log()).sum(1) / 2).mean()
    if complement == "club":
        a, f = (v / v.norm(dim=1, keepdim=True) for v in (z_a, z))
        every = (f[:, None] - a[None]).square().sum(2)
        lacks = (every.mean() - every.diagonal().mean()) / (2 * 0.2)
    else:
        a, f = (v - v.mean(0) for v in (z_a, z))
        lacks = (f.T @ a).square().sum() / ((a.T @ a).norm() * (f.T @ f).norm())
    g = [gradient(term, [z])[0].flatten() for term in (task, js, lacks)]
    cosines = torch.stack([g[0] @ other / (g[0].norm() * other.norm()) for other in g[1:]]) * 0.1
    torch.testing.assert_close(after["cosines"][0].double(), cosines, rtol=1e-3, atol=1e-6)
    alpha, beta = (cosines / 0.3).softmax(0)
    loss = task + alpha.detach() * js + beta.detach() * lacks
    weights = {**{f"encoders.0.{key}": w for key, w in follower.named_parameters()},
               **{f"heads.0.{key}": w for key, w in head.named_parameters()}}
    assert_stepped(before, after, dict(zip(weights, gradient(loss, list(weights.values())))))

    assert set(result["heads"]) == {"fused"}
    assert set(result["modality_heads"]) == {"forward", "fused"}
    assert [set(e["modality_loss"]) for e in result["epochs"]] == [{"forward"}, {"fused"},
                                                                  {"forward"}]
    assert set(result["epochs"][2]["loss"]) == {"consistency", "complement"}
    assert result["epochs"][2]["interaction"]["alpha"] == pytest.approx(alpha.item(), rel=1e-3)


def test_patience_ends_a_stage_of_udi_after_the_last_drop_of_the_rate(tmp_path, monkeypatch):
    prepare(tmp_path, NAMES[:2])
    never_better = dict(accuracy=0.5, macro_f1=0.5, entropy=1.0)
    monkeypatch.setattr(udi, "scores", lambda logits, y: never_better)
    flags = ["--epochs", "6", "--lr", "0.01", "--patience", "1", "--anchor", "fused", "--lr-step"]
    for lr_step, expected in ((2, 6), (3, 5), (6, 2)):      # last drop: before epoch 5, 4, never
        out = ["--out", str(tmp_path / str(lr_step))]
        result = udi.main(one_batch(tmp_path, *flags, str(lr_step), *out))
        stages = [epoch["stage"] for epoch in result["epochs"]]
        assert stages == ["alone"] * expected + ["guided"] * expected


def test_a_modality_may_have_any_name():
    in_channels = {word: 1 for word in WORDS}
    inputs = {word: torch.randn(2, 1, 1, 24, 24) for word in WORDS}
    for model, stage in ((joint_baseline.Model(in_channels, 3, "concat", own_heads=True), []),
                         (dimml.DIMML(in_channels, 3), ["fusion", 1.0]),
                         (udi.UDI(in_channels, 3), [])):
        z = model.eval().features(inputs)
        groups = model.logits(z, *stage)
        assert list(z) == WORDS and list(groups["modality_heads"]) == WORDS
        for word, head in zip(WORDS, model.heads):
            torch.testing.assert_close(groups["modality_heads"][word], head(z[word]))
        assert "fused" in groups["heads"] and "forward" not in groups["heads"]
