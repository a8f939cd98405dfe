"""Each function of the methods against a slow loop in float64 that follows its equation."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet18

import balance
import dimml
import joint_baseline
import udi

F64 = torch.float64


# ---- dimml.py ------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_classes,n_seen", [(2, 2), (7, 6)])             # 6: a class has no items
def test_effective_dimensions(n_classes, n_seen):
    torch.manual_seed(0)
    labels = torch.randint(0, n_seen, (300,))           # more than one chunk
    z = torch.randn(300, 60, dtype=F64) + labels[:, None] * torch.linspace(0, 1, 60, dtype=F64)
    z[:, 2] = 0                                         # a dead dimension: every mean is equal
    z[:, 3] = z[:, 3].clamp(min=1)                      # as after a ReLU: many equal values
    hits = torch.zeros(60, dtype=F64)
    for d, column in enumerate(z.T.tolist()):
        means = []
        for c in range(n_classes):
            members = [x for x, y in zip(column, labels) if y == c]
            means.append(sum(members) / len(members) if members else math.inf)
        for x, y in zip(column, labels):
            distances = [abs(x - mean) for mean in means]
            hits[d] += distances.index(min(distances)) == y
    effective = dimml.effective_dimensions(z, labels, n_classes)
    assert effective.dtype == torch.bool and torch.equal(effective, hits > hits.mean())
    assert 10 < effective.sum() < 50


def test_of_equally_good_dimensions_none_is_effective():
    """An accuracy of 11 / 30 in each of 512, whose mean differs from it by rounding."""
    z, labels = torch.full((30, 512), 0.3), torch.arange(30) % 3
    labels[-1] = 0
    assert not dimml.effective_dimensions(z, labels, 3).any()


def test_duc_loss_and_its_gradient():
    torch.manual_seed(0)
    z = {m: torch.randn(6, 10, dtype=F64, requires_grad=True) for m in "abc"}
    effective = {m: torch.rand(10) < 0.5 for m in "ab"}
    effective["c"] = effective["a"]                     # nothing to transfer between these two
    expected = torch.zeros((), dtype=F64)
    for t, s in permutations("abc", 2):
        dims = [d for d in range(10) if effective[t][d] and not effective[s][d]]
        if dims:
            z_s, z_t = z[s][:, dims], z[t][:, dims].detach()
            for i in range(6):
                odds = torch.stack([(z_s[i] @ z_t[j] / 2).exp() for j in range(6)])
                expected = expected - torch.log(odds[i] / odds.sum()) / 6
    loss = dimml.duc_loss(z, effective, 2.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(z.values())),
                               torch.autograd.grad(expected, list(z.values())))
    assert dimml.duc_loss({m: 1e3 * z[m] for m in z}, effective, 1.0).isfinite()


def test_certainty_weighted_logits():
    torch.manual_seed(0)
    logits = [torch.randn(5, 4, dtype=F64) * scale for scale in (1, 3, 9)]
    got = dimml.certainty_weighted_logits(logits, 0.5)
    for i in range(5):
        odds = [[math.exp(v) for v in o[i]] for o in logits]
        certainty = [max(each) / sum(each) for each in odds]
        weights = [math.exp(c / 0.5) for c in certainty]
        expected = sum(w / sum(weights) * o[i] for w, o in zip(weights, logits))
        torch.testing.assert_close(got[i], expected)


# ---- heads and encoders --------------------------------------------------------------------------
def test_the_heads_of_each_script(small):
    torch.manual_seed(0)
    z, channels = {m: torch.randn(5, 8) for m in "abc"}, dict.fromkeys("abc", 1)

    def own_and_mean(model):
        own = {m: z[m] @ head.weight.T + head.bias for m, head in model.heads.items()}
        return own, sum(own.values()) / 3

    model = dimml.DIMML(channels, 4, dim=8)
    (own, mean), fusion = own_and_mean(model), model.fusion_head(torch.cat([*z.values()], 1))
    answer = dimml.certainty_weighted_logits([*own.values(), fusion], 0.5)
    torch.testing.assert_close(model.logits(z, 0.5), {
        "fused": answer, "fusion": fusion, "own": mean, "unweighted": (3 * mean + fusion) / 4,
        **own})

    model = udi.UDI(channels, 4, dim=8)
    own, mean = own_and_mean(model)
    torch.testing.assert_close(model.logits(z), {"fused": mean, **own})

    model, temperatures = joint_baseline.Model(channels, 4, dim=8), dict(a=0.5, b=2.0, c=4.0)
    own, mean = own_and_mean(model)
    calibrated = sum(own[m] / temperatures[m] for m in own) / 3
    torch.testing.assert_close(model.logits(z, temperatures), {
        "fused": mean, "calibrated": calibrated, **own})

    model = balance.Model(channels, 4, own_heads=True, dim=8)
    (own, mean), joint = own_and_mean(model), model.fusion_head(torch.cat([*z.values()], 1))
    torch.testing.assert_close(model.logits(z), {"fused": joint, "own": mean, **own})


def test_fusions_follow_their_equations():
    torch.manual_seed(0)
    z = {m: torch.randn(5, 8) for m in "abc"}
    heads = {kind: joint_baseline.Fusion(kind, 3, 4, dim=8)
             for kind in ("concat", "sum", "film", "gated")}
    *others, last = z.values()
    expected = {"concat": heads["concat"].out(torch.cat([*others, last], 1)),
                "sum": sum(w(z_m) for w, z_m in zip(heads["sum"].linear, z.values()))}
    h = last
    for linear, z_m in zip(heads["film"].linear, others):
        h = linear(z_m)[:, :8] * h + linear(z_m)[:, 8:]
    expected["film"] = heads["film"].out(h)
    h = heads["gated"].linear[-1](last)
    for linear, z_m in zip(heads["gated"].linear, others):
        h = h * torch.sigmoid(linear(z_m))
    expected["gated"] = heads["gated"].out(h)
    for kind, head in heads.items():
        torch.testing.assert_close(head(z), expected[kind])


@pytest.mark.parametrize("script", [balance, dimml, joint_baseline, udi])
def test_encoder_is_torchvisions_resnet18_with_a_mean_over_time(script):
    torch.manual_seed(0)
    encoder, reference = script.Encoder(3).eval(), resnet18().eval()
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(encoder.state_dict())
    frames = torch.randn(2, 4, 3, 40, 32)
    expected = torch.stack([reference(clip).mean(0) for clip in frames])
    torch.testing.assert_close(encoder(frames), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(frames).dtype == torch.float32           # so no loss mentions precision


# ---- joint_baseline.py ---------------------------------------------------------------------------
def loop_temperature(logits, labels):
    best = math.inf, None
    for k in range(81):
        t, loss = 10 ** (k / 40 - 1), 0
        for o, y in zip(logits.tolist(), labels.tolist()):
            top = max(o) / t
            loss += top + math.log(math.fsum(math.exp(v / t - top) for v in o)) - o[y] / t
        best = min(best, (loss, t))
    return best[1]


def test_calibration_temperature():
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (200,))
    plain = F.one_hot(labels, 5) + torch.randn(200, 5)
    temperatures = []
    for scale in (0.01, 0.5, 2, 100):
        temperatures.append(joint_baseline.calibration_temperature(scale * plain, labels))
        assert temperatures[-1] == pytest.approx(loop_temperature(scale * plain, labels))
    low, *middle, high = temperatures
    assert (low, high) == pytest.approx((0.1, 10)) and 0.1 < middle[0] < middle[1] < 10


# ---- balance.py ----------------------------------------------------------------------------------
@pytest.mark.parametrize("values", [(3.0, 1.0), (1.00001, 1.0), (8.0, 7.5, 1.0), (2.0, 0.0),
                                    (0.0, 0.0)])
def test_ogm_coefficients(values):
    got = balance.ogm_coefficients(dict(enumerate(map(torch.tensor, values))), 0.8)
    for m, s in enumerate(values):
        others = [*values[:m], *values[m + 1:]]
        mean = sum(others) / len(others)
        if mean == 0:
            expected = 1 if s == 0 else 0
        else:
            expected = 1 - math.tanh(0.8 * s / mean) if s > mean else 1
        assert got[m].item() == pytest.approx(expected, abs=1e-6)


def test_ogm_keeps_equal_encoders():
    for value in np.linspace(0.1, 16, 200):             # also where sums of the scores are rounded
        scores = {m: torch.tensor(value, dtype=torch.float32) for m in "abc"}
        assert all(k == 1 for k in balance.ogm_coefficients(scores, 0.8).values())


def test_ge_keeps_k_g_and_adds_noise_of_the_spread_of_g():
    torch.manual_seed(0)
    g, generator = 0.01 * torch.randn(64, 64, 7, 7) + 0.003, torch.Generator()
    noise = balance.ogm_ge_gradient(g, torch.tensor(0.0), generator.manual_seed(5))
    kept = balance.ogm_ge_gradient(g, torch.tensor(0.3), generator.manual_seed(5)) - noise
    torch.testing.assert_close(kept, 0.3 * g)
    assert noise.std().item() == pytest.approx(g.std().item(), rel=0.01)
    assert abs(noise.mean() / g.std()) < 0.01


def loop_pareto(joint, own):
    """Lists of tensors -> such a list, k0 and the cosine, number by number."""
    g0, g1 = (torch.cat([g.flatten() for g in grads]).tolist() for grads in (joint, own))

    def dot(u, v):
        return math.fsum(a * b for a, b in zip(u, v))

    cosine, k0 = dot(g0, g1) / math.sqrt(dot(g0, g0) * dot(g1, g1)), 0.5
    if cosine <= 0:
        distance = math.fsum((a - b) ** 2 for a, b in zip(g0, g1))
        k0 = min(max((dot(g1, g1) - dot(g0, g1)) / distance, 0.001), 0.999)
    result = []
    for a, b in zip(joint, own):
        h = 2 * k0 * a + 2 * (1 - k0) * b
        size, plain = (math.sqrt(math.fsum((x * x).flatten().tolist())) for x in (h, a + b))
        result.append(1.5 * max(1, plain / size) * h if size else 0 * h)
    return result, k0, cosine


@pytest.mark.parametrize("sign,scale", [(1, 1), (-1, 1), (-1, 1e-4), (-1, 1e4)])     # then clamped
def test_pareto_gradient(sign, scale):
    torch.manual_seed(0)
    joint = [torch.randn(shape, dtype=F64) for shape in ((3, 2), (5,), (4,), (2,))]
    own = [scale * (torch.randn_like(g) + 2 * sign * g) for g in joint]
    own[1] = -0.9 * scale * joint[1]                                # |h| may be above |g0 + g1|
    joint[2], own[2] = torch.zeros(2, 4, dtype=F64)                 # a tensor that feels neither
    before = [g.clone() for g in (*joint, *own)]
    got, watched = balance.pareto_gradient(joint, own)
    expected, k0, cosine = loop_pareto(joint, own)
    torch.testing.assert_close(got, expected)
    assert cosine * sign > 0 and watched.tolist() == pytest.approx([cosine, 1 - k0])
    assert all(torch.equal(a, b) for a, b in zip(before, (*joint, *own)))   # nothing in place
    assert balance.pareto_weights(joint[2], own[2]).tolist() == [0.5, 0.5]  # both vanish


# ---- udi.py --------------------------------------------------------------------------------------
def assert_loss(loss, expected, anchor, follower):
    """And its gradient at the follower; none reaches the anchor."""
    torch.testing.assert_close(loss, expected)
    wanted, = torch.autograd.grad(expected, follower)
    loss.backward()
    torch.testing.assert_close(follower.grad, wanted)
    assert anchor.grad is None


def two(n, d):
    torch.manual_seed(0)
    return (torch.randn(n, d, dtype=F64, requires_grad=True) for _ in range(2))


def test_consistency_loss_and_its_gradient():
    anchor, follower = two(5, 4)
    expected = torch.zeros((), dtype=F64)
    for a, f in zip(anchor, follower):
        p, q = a.exp() / a.exp().sum(), f.exp() / f.exp().sum()
        for c in range(4):
            m = (p[c] + q[c]) / 2
            expected = expected + (p[c] * torch.log(p[c] / m) + q[c] * torch.log(q[c] / m)) / 2 / 5
    assert_loss(udi.consistency_loss(anchor, follower), expected, anchor, follower)

    far = torch.tensor([[0.0, 1e4]], requires_grad=True)            # bounded, and finite
    loss = udi.consistency_loss(torch.tensor([[1e4, 0.0]]), far)
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(loss, far)[0].isfinite().all()


def test_complementary_loss_and_its_gradient():
    anchor, follower = two(6, 7)
    a, f = ([row / row.norm() for row in x] for x in (anchor, follower))
    every = sum(((f[i] - a[j]) ** 2).sum() for i in range(6) for j in range(6)) / 36
    same = sum(((f[i] - a[i]) ** 2).sum() for i in range(6)) / 6
    expected = (every - same) / (2 * 0.1)
    assert_loss(udi.complementary_loss(anchor, follower, 0.1), expected, anchor, follower)


def test_linear_cka_and_its_gradient():
    anchor, follower = two(20, 6)
    a, f = anchor - anchor.mean(0), follower - follower.mean(0)
    expected = (f.T @ a).square().sum() / ((a.T @ a).norm() * (f.T @ f).norm())
    assert_loss(udi.linear_cka(anchor, follower), expected, anchor, follower)


def test_the_anchor_is_chosen_by_the_last_scores_of_stage_1():
    def epoch(stage, m, accuracy, entropy):
        return dict(stage=stage, modality=m, val={m: dict(accuracy=accuracy, entropy=entropy)})

    alone = [epoch("alone", "a", 0.2, 0.9), epoch("alone", "a", 0.77, 0.1),
             epoch("alone", "b", 0.9, 0.3), epoch("alone", "b", 0.8, 0.2)]
    choice = dict(anchor="a", accuracy={"a": 0.77, "b": 0.8}, entropy={"a": 0.1, "b": 0.2},
                  tolerance=pytest.approx(0.04))                    # sqrt(0.8 * 0.2 / 100)
    assert udi.choose(alone, n_val=100) == choice       # near, so the lower entropy
    assert udi.choose_anchor({"a": 0.7, "b": 0.9}, {"a": 0.1, "b": 2.0}, 0.05) == "b"
