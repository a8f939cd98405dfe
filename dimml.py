"""DI-MML: Detached and Interactive Multimodal Learning (Fan et al., ACM MM 2024, arXiv 2407.19514).

Train modalities with one joint loss, and the one that learns faster silences the others. DI-MML
gives every encoder a loss of its own (detached) and lets the modalities meet in three places
(interactive): a shared head, the DUC loss and, when the encoders are frozen, a fusion head.

    encoder -> z_a --+--> own head_a  -> CE
                |    +--> shared head -> CE
               DUC            ||                    DUC: where one modality is effective and the
                |    +--> shared head -> CE         other is not, the second learns from the first
    encoder -> z_v --+--> own head_v  -> CE

    stage 1   all of the above, without a joint loss; DUC from the end of the warm-up
    stage 2   the encoders are frozen, [z_a, z_v] -> fusion head -> CE
    answer    own heads and fusion head, weighted by their certainty

    python dimml.py                                 # the embedded set, about a minute
    python dimml.py --dataset ave --gpu 0           # the recipe of the published code
    python dimml.py --dataset ave --gpu 0 --resume  # goes on after the last whole epoch

Read it top to bottom: recipe, losses, model, evaluation, training. The package `data` holds what
is not the method: flags, batches, files. Departures from the published code: results/DEVIATIONS.md.
"""

import math
import time
from collections import defaultdict
from itertools import permutations

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

import data

# ---- recipe: that of the published code. Every entry is also a flag, e.g. --duc-weight 0 ---------
RECIPE = dict(
    epochs=150,             # of stage 1; with --epochs, warmup and lr_step scale along
    fusion_epochs=20,       # of stage 2
    warmup=20,              # epochs before the dimensions are split and DUC starts
    batch_size=16,
    lr=1e-3,                # of SGD with momentum 0.9 and weight decay 1e-4
    lr_step=70,             # stage 1: lr x 0.1 every so many epochs; stage 2: constant
    shared_weight=1.0,      # of the shared head's losses
    duc_weight=1.0,         # of the DUC loss; 0 trains without it
    tau=50.0,               # temperature of DUC: large, since features are not normalised
    temperature=1.0,        # of the certainty weights at inference
)
CHANGES = {                 # by dataset
    "cremad": {},
    "ave": dict(tau=10.0, temperature=3.0),
    "ucf101": dict(tau=10.0),
    "modelnet40": dict(temperature=3.0),
    # from here on ours
    "avletters": dict(epochs=40, fusion_epochs=5, warmup=13, lr=0.01, lr_step=32),
    "utdmhad": dict(epochs=40, fusion_epochs=5, warmup=13, lr=0.01, lr_step=32),
    "modelnet40_points": dict(epochs=10, fusion_epochs=3, warmup=3, batch_size=64, lr=0.01,
                              lr_step=8),
}
SMALL = dict(epochs=15, fusion_epochs=5, warmup=5, lr=3e-3, lr_step=12)     # any other set, ours


def plan(argv=None):
    """What a command line asks for: args, dataset, recipe, the path of the run's files without
    suffix, and its config: two runs of one config are one run."""
    args = data.parser(__doc__, RECIPE).parse_args(argv)
    ds, r, path, config = data.parse(
        __file__, argv, args, RECIPE, CHANGES, SMALL, scaled=("warmup", "lr_step"),
        may_be_0=("warmup", "shared_weight", "duc_weight"),
        words=dict(shared_weight="shared", duc_weight="duc"))      # in a run's name: dimml.duc0
    if r.duc_weight and r.warmup >= r.epochs:
        raise data.DataError(f"--warmup {r.warmup} of {r.epochs} epochs: DUC would not start; a "
                             "shorter one, or --duc-weight 0")
    return args, ds, r, path, config


# ---- the losses ----------------------------------------------------------------------------------
def effective_dimensions(z, labels, n_classes):
    """Which feature dimensions, each by itself, tell the classes apart better than the average
    dimension does (sec. 3.3): (N, D), (N,) -> (D,) bool.

        e_d = share of items i with argmin_c |z_id - mu_cd| = y_i,  mu_cd = mean of z_d over class c
        E   = {d : e_d > mean_d e_d}
    """
    mu = torch.stack([z[labels == c].mean(0) for c in range(n_classes)])    # (C, D)
    mu = mu.nan_to_num(nan=torch.inf)       # a class without items is nobody's nearest

    # in chunks: the distances of all items at once would be N x C x D numbers
    hits = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
    for chunk, y in zip(z.split(256), labels.split(256)):
        distance = (chunk[:, None] - mu).abs()                  # (n, C, D)
        nearest = distance.argmin(1)                            # (n, D)
        hits += (nearest == y[:, None]).sum(0)
    accuracy = hits / len(z)                                    # (D,)

    # above the mean by more than rounding: where all are equally good, none is effective
    return accuracy > accuracy.mean() + 1e-9


def duc_loss(z, effective, tau):
    """Dimension-decoupled unidirectional contrastive loss: {m: (B, D)}, {m: (D,) bool} -> scalar.

    For each ordered pair of a teacher t and a student s, an item's student features must find its
    teacher features in the batch, on the dimensions where t is effective and s is not (sec. 3.3):

        L_ts = -mean_i log softmax_j( sum_{d in E_t - E_s} z_s,id z_t,jd / tau )  at j = i

    The teacher is detached: knowledge flows one way. A pair with nothing to transfer adds 0.
    """
    loss = 0.0
    for t, s in permutations(z, 2):
        dims = effective[t] & ~effective[s]
        similarity = (z[s] * dims) @ z[t].detach().T / tau                  # (B, B)
        same_item = torch.arange(len(similarity), device=similarity.device)
        loss = loss + F.cross_entropy(similarity, same_item) * dims.any()
    return loss


def certainty_weighted_logits(logits, temperature):
    """The surer a head is of its answer, the more it counts (sec. 3.4): K times (B, C) -> (B, C).

        o = sum_k w_k o_k,   w = softmax_k(c_k / T),   c_k = max softmax(o_k)

    As c_k is between 1 / C and 1, the weights are mild: with T = 1 no head counts e times another.
    """
    logits = torch.stack(list(logits))                                      # (K, B, C)
    certainty = logits.softmax(-1).amax(-1, keepdim=True)                   # (K, B, 1)
    weights = (certainty / temperature).softmax(0)
    return (weights * logits).sum(0)


# ---- the model -----------------------------------------------------------------------------------
class Encoder(ResNet):
    """ResNet-18 from scratch: (B, T, C, H, W) -> (B, 512), the mean over time and space.

    Every modality comes as T pictures of C channels; a spectrogram is one picture.
    """

    def __init__(self, in_channels):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)

        # the new convolution like torchvision's others, BatchNorm as in the published code
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

        # a plain mean replaces adaptive pooling, which is not deterministic on CUDA
        del self.avgpool, self.fc

    def forward(self, x):
        batch = len(x)
        x = rearrange(x, "b t c h w -> (b t) c h w")            # each frame by itself
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        # float32 from here on, also where the convolutions run in bfloat16
        return reduce(x.float(), "(b t) d h w -> b d", "mean", b=batch)


class DIMML(nn.Module):
    """Encoders and heads for two or more modalities; z = {m: (B, 512)} are their features."""

    def __init__(self, in_channels, n_classes, dim=512):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Encoder(c) for m, c in in_channels.items()})
        self.heads = nn.ModuleDict({m: nn.Linear(dim, n_classes) for m in in_channels})
        self.shared_head = nn.Linear(dim, n_classes)                    # only for training
        self.fusion_head = nn.Linear(dim * len(in_channels), n_classes)

    def features(self, inputs):
        """{m: (B, T, C, H, W)} -> z = {m: (B, 512)}."""
        return {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}

    def own_logits(self, z):
        return {m: head(z[m]) for m, head in self.heads.items()}

    def fusion_logits(self, z):
        return self.fusion_head(torch.cat(list(z.values()), 1))

    def logits(self, z, temperature):
        """All that is scored, {head: (B, C)}; the own heads have the names of their modalities."""
        own = self.own_logits(z)
        fusion = self.fusion_logits(z)
        every = torch.stack([*own.values(), fusion])                    # (K, B, C)
        return {
            "fused": certainty_weighted_logits(every, temperature),     # the method's answer
            "fusion": fusion,                                           # the fusion head alone
            "own": every[:-1].mean(0),          # control: without the fusion head
            "unweighted": every.mean(0),        # control: without the weights
            **own,
        }


# ---- evaluation: the features of a part, computed once, serve all heads and the probe ------------
@torch.no_grad()
def features_of(part, model, ds, device, amp, batch_size):
    """Features of a whole part, eval mode, not augmented: {m: (N, 512)}, labels (N,)."""
    model.eval()
    batches, labels = [], []
    # without gradients to store there is room for twice the batch
    for inputs, y, _ in ds.batches(part, 2 * batch_size, device):   # the third: the items' numbers
        with amp:
            batches.append(model.features(inputs))
        labels.append(y)
    z = {}
    for m in ds.modalities:
        z[m] = torch.cat([batch[m] for batch in batches])
        if not z[m].isfinite().all():
            raise FloatingPointError(f"features of {m} are not finite: lower --lr, or --amp off")
    return z, torch.cat(labels)


def scores(logits, y):
    """(N, C), (N,) -> accuracy, macro-F1 over the classes in y, mean predictive entropy in nats."""
    log_p, predicted = logits.log_softmax(1), logits.argmax(1)
    macro_f1 = f1_score(y.cpu(), predicted.cpu(), labels=y.unique().cpu(), average="macro")
    return dict(accuracy=(predicted == y).double().mean().item(), macro_f1=float(macro_f1),
                entropy=-(log_p.exp() * log_p).sum(1).mean().item())


def probe(z, y, z_test, y_test):
    """What an encoder has learned: test accuracy of a logistic regression on frozen features."""
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return linear.fit(z.cpu(), y.cpu()).score(z_test.cpu(), y_test.cpu())


# ---- training ------------------------------------------------------------------------------------
def main(argv=None):
    """Train what a command line asks for; returns the result, the dict that is written to JSON."""
    return data.run_once(__file__, train, *plan(argv))


def train(args, ds, r, path, config):
    """r.epochs epochs of stage 1, r.fusion_epochs of stage 2, then the result."""
    checkpoint = data.half_done(path, config, args.resume, args.amp)        # to go on from, or None
    ds.check(r.batch_size)
    device, dtype = data.pick_device(args.gpu, args.amp, checkpoint)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)    # of the encoders
    torch.manual_seed(args.seed)                                    # weights
    generator = torch.Generator().manual_seed(args.seed)            # order and augmentation

    model = DIMML(ds.in_channels, len(ds.classes)).to(device)
    # the faster layout, but for small pictures in float32 on a CPU
    if device.type == "cuda" or dtype == torch.bfloat16:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), r.lr, momentum=0.9, weight_decay=1e-4,
                                fused=True)

    n_epochs = r.epochs + r.fusion_epochs
    log = []                # a record an epoch
    effective = {}          # {m: (512,) bool}, its dimensions, from the end of the warm-up
    if checkpoint:
        data.restore(path, checkpoint, model, optimizer, generator)
        log = checkpoint["log"]
        effective = {m: dims.to(device) for m, dims in checkpoint["effective"].items()}
    provenance = data.provenance(__file__, path, model, device, dtype, checkpoint)
    print(f"{path.name}: {dtype} on {device}, {len(log)} of {n_epochs} epochs done before")

    evaluated = {}          # {part: (z, y)}, features that the next epoch need not compute again
    for epoch in range(len(log), n_epochs):
        start = time.time()
        stage = "detached" if epoch < r.epochs else "fusion"
        lr = r.lr * 0.1 ** (epoch // r.lr_step) if stage == "detached" else r.lr
        optimizer.param_groups[0]["lr"] = lr
        if epoch == r.epochs:
            optimizer.state.clear()                 # stage 2 needs no momentum of stage 1

        # once, after the warm-up: which dimensions of each modality are effective?
        if epoch == r.warmup:
            z, y = features_of("train", model, ds, device, amp, r.batch_size)
            effective = {m: effective_dimensions(z[m], y, len(ds.classes)) for m in z}

        # one pass over the training items; in stage 2 the encoders are frozen, BatchNorm too, and
        # still needed, as the items are augmented anew
        model.train(stage == "detached")
        batches = ds.batches("train", r.batch_size, device, augment=True, generator=generator)
        total = defaultdict(float)                  # of each loss, over the epoch
        for inputs, y, _ in tqdm(batches, leave=False, disable=None):
            with amp, torch.set_grad_enabled(stage == "detached"):
                z = model.features(inputs)          # {m: (B, 512)}

            if stage == "detached":                 # no term sends gradients to two encoders
                loss = {m: F.cross_entropy(o, y) for m, o in model.own_logits(z).items()}
                shared = [F.cross_entropy(model.shared_head(z_m), y) for z_m in z.values()]
                loss["shared"] = r.shared_weight * sum(shared)
                if epoch >= r.warmup and r.duc_weight:
                    loss["duc"] = r.duc_weight * duc_loss(z, effective, r.tau)
            else:
                loss = {"fusion": F.cross_entropy(model.fusion_logits(z), y)}

            # gradients become None, not 0, so that what no loss reaches is not decayed either
            optimizer.zero_grad(set_to_none=True)
            sum(loss.values()).backward()
            optimizer.step()
            # no .item() here: a GPU need not wait for the value
            for name, value in loss.items():
                total[name] += value.detach()
        mean = {name: (value / len(batches)).item() for name, value in total.items()}
        if not math.isfinite(sum(mean.values())):
            raise FloatingPointError(f"epoch {epoch + 1}: loss {mean}: lower --lr, or --amp off")

        # evaluation; the test scores are recorded, and nothing is ever chosen by them
        record = dict(stage=stage, epoch=epoch, lr=lr, loss=mean, val={}, test={})
        for part in ("val", "test"):
            if len(ds.indices(part)) == 0:          # there may be no validation items
                continue
            # the encoders stand still in stage 2: so do their features
            if stage == "detached" or part not in evaluated:
                evaluated[part] = features_of(part, model, ds, device, amp, r.batch_size)
            z, y = evaluated[part]
            with torch.no_grad():
                logits = model.own_logits(z)
                if stage == "fusion":               # before, the fusion head is not trained
                    logits = model.logits(z, r.temperature)
            record[part] = {head: scores(o, y) for head, o in logits.items()}
        record["seconds"] = time.time() - start
        log.append(record)
        data.save(path, ds, provenance, device, config=config, log=log, effective=effective,
                  model=model.state_dict(), optimizer=optimizer.state_dict(),
                  generator=generator.get_state())
        data.print_epoch(log, n_epochs)

    # the result: every head on the test items, and a probe of each encoder
    z_train, y_train = features_of("train", model, ds, device, amp, r.batch_size)
    z, y = features_of("test", model, ds, device, amp, r.batch_size)
    with torch.no_grad():
        logits = model.logits(z, r.temperature)
    return data.write_result(
        path, args, ds, config, provenance, log, logits, y, answer="fused",
        probes={m: probe(z_train[m], y_train, z[m], y) for m in z},
        effective={m: dims.nonzero().flatten().tolist() for m, dims in effective.items()})


if __name__ == "__main__":
    with data.exit_codes(__file__):
        main()
