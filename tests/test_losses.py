"""Each function of the methods against a slow loop in float64 that follows the equation."""

import math

import pytest
import torch

import dimml
import joint_baseline

F64 = torch.float64


def loop_dimension_accuracy(features, labels, n_classes):
    n, dim = features.shape
    hits = torch.zeros(dim, dtype=F64)
    for d in range(dim):
        means = [features[labels == c, d].mean().item() if (labels == c).any() else math.inf for c in range(n_classes)]
        for i in range(n):
            distances = [abs(features[i, d].item() - mean) for mean in means]
            hits[d] += distances.index(min(distances)) == labels[i]
    return hits / n


@pytest.mark.parametrize("n_classes", [2, 7])
def test_dimension_accuracy_is_the_nearest_class_mean(n_classes):
    torch.manual_seed(0)
    labels = torch.randint(0, n_classes, (60,))
    features = torch.randn(60, 9, dtype=F64) + labels[:, None] * torch.linspace(0, 1, 9, dtype=F64)
    features[:, 2] = 0                                  # a dead dimension: every mean is equal
    features[:, 3] = features[:, 3].clamp(min=1)        # ReLU-like: many equal values
    expected = loop_dimension_accuracy(features, labels, n_classes)
    torch.testing.assert_close(dimml.dimension_accuracy(features, labels, n_classes), expected.float())
    effective = dimml.effective_dimensions(features, labels, n_classes)
    assert effective.dtype == torch.bool and torch.equal(effective, expected > expected.mean())
    assert 0 < effective.sum() < 9


def test_a_class_without_items_is_never_the_nearest():
    features, labels = torch.tensor([[0.0], [0.1], [5.0], [5.1]]), torch.tensor([0, 0, 2, 2])
    assert dimml.dimension_accuracy(features, labels, 4).item() == 1.0


def test_of_two_equal_means_the_first_class_is_the_nearest():
    features, labels = torch.tensor([[0.0], [-1.0], [1.0], [10.0]]), torch.tensor([0, 1, 1, 2])
    assert dimml.dimension_accuracy(features, labels, 3).item() == 0.5      # the means of 0 and 1 are both 0


def loop_duc(features, effective, tau):
    total = torch.zeros((), dtype=F64)
    for t in features:
        for s in features:
            dims = [d for d in range(len(effective[t])) if effective[t][d] and not effective[s][d]]
            if s == t or not dims:
                continue
            z_s, z_t = features[s][:, dims], features[t][:, dims].detach()
            for i in range(len(z_s)):
                scores = torch.stack([z_s[i] @ z_t[j] / tau for j in range(len(z_t))])
                total = total - torch.log(scores[i].exp() / scores.exp().sum()) / len(z_s)
    return total


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c")])
def test_duc_loss_and_its_gradient(names):
    torch.manual_seed(0)
    features = {m: torch.randn(6, 10, dtype=F64, requires_grad=True) for m in names}
    effective = {m: torch.rand(10) < 0.5 for m in names}
    expected = loop_duc(features, effective, 2.0)
    wanted = torch.autograd.grad(expected, list(features.values()))
    loss = dimml.duc_loss(features, effective, 2.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(loss, list(features.values())), wanted):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_duc_teaches_in_one_direction_only():
    strong, weak = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    every, none = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    dimml.duc_loss({"strong": strong, "weak": weak}, {"strong": every, "weak": none}, 1.0).backward()
    assert weak.grad.abs().sum() > 0 and (strong.grad is None or strong.grad.abs().sum() == 0)
    weak.grad = None
    nothing = dimml.duc_loss({"strong": strong, "weak": weak}, {"strong": every, "weak": every}, 1.0)
    assert nothing.item() == 0


def test_duc_is_finite_where_the_published_loop_overflows():
    features = {m: 1e3 * torch.ones(4, 8) for m in "ab"}
    effective = {"a": torch.arange(8) < 4, "b": torch.arange(8) >= 4}
    assert not loop_duc({m: z.double() for m, z in features.items()}, effective, 1.0).isfinite()
    assert dimml.duc_loss(features, effective, 1.0).item() == pytest.approx(2 * math.log(4))


def test_losses_are_float32_under_autocast():
    torch.manual_seed(0)
    features = {m: torch.randn(8, 64) for m in "ab"}
    effective = {"a": torch.arange(64) < 32, "b": torch.arange(64) >= 32}
    with torch.autocast("cpu", torch.bfloat16):
        under = dimml.duc_loss(features, effective, 1.0)
        fused = dimml.certainty_weighted_logits([z.bfloat16() for z in features.values()], 1.0)
    assert under.dtype == torch.float32 and under.item() == dimml.duc_loss(features, effective, 1.0).item()
    assert fused.dtype == torch.float32


def test_certainty_weighted_logits():
    torch.manual_seed(0)
    logits = [torch.randn(5, 4, dtype=F64) * scale for scale in (1, 3, 9)]
    got = dimml.certainty_weighted_logits(logits, 0.5)
    for i in range(5):
        certainty = [max(math.exp(v) for v in o[i]) / sum(math.exp(v) for v in o[i]) for o in logits]
        weights = [math.exp(c / 0.5) for c in certainty]
        expected = sum(w / sum(weights) * o[i] for w, o in zip(weights, logits))
        torch.testing.assert_close(got[i].double(), expected, rtol=1e-5, atol=1e-5)
    assert dimml.certainty_weighted_logits([torch.full((1, 3), 1e4)] * 2, 1.0).isfinite().all()


@pytest.mark.parametrize("n_modalities", [1, 2, 3])
def test_fusions_follow_their_equations(n_modalities):
    torch.manual_seed(0)
    features = {f"m{i}": torch.randn(5, 8) for i in range(n_modalities)}
    z = list(features.values())
    heads = {kind: joint_baseline.Fusion(kind, n_modalities, 8, 3) for kind in ("concat", "sum", "film", "gated")}
    expected = {"concat": heads["concat"].out(torch.cat(z, 1)), "sum": sum(w(x) for w, x in zip(heads["sum"].out, z))}
    h = z[-1]
    for linear, x in zip(heads["film"].film, z):
        h = linear(x)[:, :8] * h + linear(x)[:, 8:]
    expected["film"] = heads["film"].out(h)
    h = heads["gated"].project[-1](z[-1])
    for linear, x in zip(list(heads["gated"].project)[:-1], z):
        h = h * torch.sigmoid(linear(x))
    expected["gated"] = heads["gated"].out(h)
    for kind, head in heads.items():
        assert head(features).shape == (5, 3)
        torch.testing.assert_close(head(features), expected[kind])
    with pytest.raises(ValueError, match="none of"):
        joint_baseline.Fusion("mean", 2, 8, 3)


def test_encoder_is_torchvisions_resnet18_with_a_mean_over_time():
    from torchvision.models import resnet18
    torch.manual_seed(0)
    encoder, reference = dimml.Encoder(3).eval(), resnet18()
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(encoder.state_dict())
    frames = torch.randn(2, 4, 3, 40, 32)
    expected = torch.stack([reference.eval()(clip).mean(0) for clip in frames])
    torch.testing.assert_close(encoder(frames), expected, rtol=1e-4, atol=1e-5)
    assert dimml.Encoder(1)(torch.randn(2, 1, 1, 257, 30)).shape == (2, 512)
