"""Each function of the methods against a slow loop in float64 that follows the equation."""

import math

import pytest
import torch
from torchvision.models import resnet18

import dimml
import joint_baseline
import udi

F64 = torch.float64


def loop_dimension_accuracy(z, labels, n_classes):
    n, dim = z.shape
    hits = torch.zeros(dim, dtype=F64)
    for d in range(dim):
        means = [z[labels == c, d].mean().item() if (labels == c).any() else math.inf
                 for c in range(n_classes)]
        for i in range(n):
            distances = [abs(z[i, d].item() - mean) for mean in means]
            hits[d] += distances.index(min(distances)) == labels[i]
    return hits / n


@pytest.mark.parametrize("n_classes", [2, 7])
def test_dimension_accuracy_is_the_nearest_class_mean(n_classes):
    torch.manual_seed(0)
    labels = torch.randint(0, n_classes, (300,))        # more than one chunk
    z = torch.randn(300, 9, dtype=F64) + labels[:, None] * torch.linspace(0, 1, 9, dtype=F64)
    z[:, 2] = 0                                         # a dead dimension: every mean is equal
    z[:, 3] = z[:, 3].clamp(min=1)                      # ReLU-like: many equal values
    expected = loop_dimension_accuracy(z, labels, n_classes)
    torch.testing.assert_close(dimml.dimension_accuracy(z, labels, n_classes), expected)
    effective = dimml.effective_dimensions(z, labels, n_classes)
    assert effective.dtype == torch.bool and torch.equal(effective, expected > expected.mean())
    assert 0 < effective.sum() < 9


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_of_equally_good_dimensions_none_is_effective(value):
    """0.3: an accuracy of 11 / 30 in each of 512, whose mean differs from it by rounding."""
    z, labels = torch.full((30, 512), value), torch.arange(30) % 3
    labels[-1] = 0
    assert not dimml.effective_dimensions(z, labels, 3).any()


def test_a_class_without_items_is_never_the_nearest():
    z, labels = torch.tensor([[0.0], [0.1], [5.0], [5.1]]), torch.tensor([0, 0, 2, 2])
    assert dimml.dimension_accuracy(z, labels, 4).item() == 1.0


def test_of_two_equal_means_the_first_class_is_the_nearest():
    z, labels = torch.tensor([[0.0], [-1.0], [1.0], [10.0]]), torch.tensor([0, 1, 1, 2])
    assert dimml.dimension_accuracy(z, labels, 3).item() == 0.5     # means of 0 and 1: both 0


def loop_duc(z, effective, tau):
    total = torch.zeros((), dtype=F64)
    for t in z:
        for s in z:
            dims = [d for d in range(len(effective[t])) if effective[t][d] and not effective[s][d]]
            if s == t or not dims:
                continue
            z_s, z_t = z[s][:, dims], z[t][:, dims].detach()
            for i in range(len(z_s)):
                scores = torch.stack([z_s[i] @ z_t[j] / tau for j in range(len(z_t))])
                total = total - torch.log(scores[i].exp() / scores.exp().sum()) / len(z_s)
    return total


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c")])
def test_duc_loss_and_its_gradient(names):
    torch.manual_seed(0)
    z = {m: torch.randn(6, 10, dtype=F64, requires_grad=True) for m in names}
    effective = {m: torch.rand(10) < 0.5 for m in names}
    expected = loop_duc(z, effective, 2.0)
    wanted = torch.autograd.grad(expected, list(z.values()))
    loss = dimml.duc_loss(z, effective, 2.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(z.values())), wanted)


def test_duc_teaches_in_one_direction_only():
    strong, weak = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    z, every, none = {"strong": strong, "weak": weak}, torch.ones(6).bool(), torch.zeros(6).bool()
    dimml.duc_loss(z, {"strong": every, "weak": none}, 1.0).backward()
    assert weak.grad.abs().sum() > 0 and (strong.grad is None or strong.grad.abs().sum() == 0)
    weak.grad = None
    nothing = dimml.duc_loss(z, {"strong": every, "weak": every}, 1.0)
    nothing.backward()
    assert nothing.item() == 0 and not weak.grad.any()


def test_duc_is_finite_where_the_published_loop_overflows():
    z = {m: 1e3 * torch.ones(4, 8) for m in "ab"}
    effective = {"a": torch.arange(8) < 4, "b": torch.arange(8) >= 4}
    assert not loop_duc({m: z_m.double() for m, z_m in z.items()}, effective, 1.0).isfinite()
    assert dimml.duc_loss(z, effective, 1.0).item() == pytest.approx(2 * math.log(4))


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
    assert dimml.certainty_weighted_logits([torch.full((1, 3), 1e4)] * 2, 1.0).isfinite().all()


@pytest.mark.parametrize("n_modalities", [2, 3])
def test_the_heads_of_dimml(n_modalities):
    """`own` leaves the fusion head out, `unweighted` the weights; the answer has both."""
    torch.manual_seed(0)
    z = {f"m{i}": torch.randn(5, 8) for i in range(n_modalities)}
    model = dimml.DIMML({m: 1 for m in z}, 4, dim=8)
    assert model.logits(z, "detached", 0.5)["heads"] == {}      # its fusion head is not trained yet
    groups = model.logits(z, "fusion", 0.5)
    own = [z_m @ head.weight.T + head.bias for z_m, head in zip(z.values(), model.heads)]
    fusion = sum(z_m @ w.T for z_m, w in zip(z.values(), model.fusion_head.weight.split(8, dim=1)))
    fusion = fusion + model.fusion_head.bias
    torch.testing.assert_close(groups["modality_heads"], dict(zip(z, own)))
    torch.testing.assert_close(groups["heads"], {
        "fused": dimml.certainty_weighted_logits([*own, fusion], 0.5), "fusion": fusion,
        "own": sum(own) / n_modalities, "unweighted": (sum(own) + fusion) / (n_modalities + 1)})


@pytest.mark.parametrize("n_modalities", [2, 3])
def test_fusions_follow_their_equations(n_modalities):
    torch.manual_seed(0)
    z = {f"m{i}": torch.randn(5, 8) for i in range(n_modalities)}
    heads = {kind: joint_baseline.Fusion(kind, n_modalities, 8, 3)
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
        assert head(z).shape == (5, 3)
        torch.testing.assert_close(head(z), expected[kind])


@pytest.mark.parametrize("script", [dimml, joint_baseline, udi])
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
    assert script.Encoder(1)(torch.randn(2, 1, 1, 257, 30)).shape == (2, 512)
