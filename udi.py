"""UDI: Unidirectional Dynamic Interaction (Wang et al., 2025, arXiv 2509.02281), reconstructed.

Joint training lets modalities compete for one loss. UDI has none: one modality, the anchor, is
trained alone to convergence and frozen; then it guides the others, the followers, one way:

    stage 1   encoder -> z_m -> head_m -> CE            each modality alone; the best is the anchor

    stage 2   the anchor, frozen -> z_a -> o_a          every other modality, from new weights
                                     |      |           alpha JS(o_a, o_f)    consistency
                                     |      |           beta  I(z_a; z_f)     complement, minimised
              follower encoder   -> z_f -> o_f -> CE
    answer    the mean of all heads' logits (U7)

    python udi.py                                                   # the embedded set
    python udi.py --dataset ave --gpu 0
    python udi.py --dataset ave --anchor audio --interaction 0 0    # unguided: the plain ensemble

No code is public. From the paper, as far as we know it: the two stages and their three terms; the
divergence is Jensen-Shannon's (Eq. 4); both weights lie in [0, 1] and follow the alignment of
gradients on each mini-batch; the anchor has the best validation accuracy, a near tie goes to the
lower entropy. How each gap is filled is our reading: U1 to U11 in results/DEVIATIONS.md.
"""

import math
import time
from collections import defaultdict

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

# ---- recipe: optimiser and lengths are those of the DI-MML code. Every entry is also a flag ------
RECIPE = dict(
    epochs=150,                 # of each training of one modality (U1); lr_step scales along
    batch_size=16,
    lr=1e-3,                    # of SGD with momentum 0.9 and weight decay 1e-4
    lr_step=70,                 # lr x 0.1 every so many epochs of it
    variance=0.1,               # s^2 of CLUB's Gaussian (U3)
    temperature=0.5,            # of the interaction weights (U4)
    complement="club",          # how I(z_a; z_f) is estimated (U3): club or cka
    follower_init="scratch",    # or stage1 (U5)
)
CHOICES = dict(complement=["club", "cka"], follower_init=["scratch", "stage1"])
CHANGES = {                     # by dataset; those of the last three are ours
    "cremad": {}, "ave": {}, "ucf101": {}, "modelnet40": {},        # RECIPE as it is
    "avletters": dict(epochs=40, lr=0.01, lr_step=32),
    "utdmhad": dict(epochs=40, lr=0.01, lr_step=32),
    "modelnet40_points": dict(epochs=10, batch_size=64, lr=0.01, lr_step=8),
}
SMALL = dict(epochs=15, lr=3e-3, lr_step=12)        # any other set, ours
SMOOTHING = 0.9                 # cosines = 0.9 cosines + 0.1 new ones (U4)


def plan(argv=None):
    """What a command line asks for: args, dataset, recipe, the path of the run's files without
    suffix, and its config: two runs of one config are one run."""
    parser = data.parser(__doc__, RECIPE, CHOICES)
    parser.add_argument("--anchor", help="this modality, not the one that validation items choose")
    parser.add_argument("--interaction", nargs=2, type=float, metavar=("ALPHA", "BETA"),
                        help="fixed weights in place of dynamic ones")
    args = parser.parse_args(argv)
    named = [f"anchor-{args.anchor}"] if args.anchor else []
    if args.interaction:
        named.append("interaction{:g}-{:g}".format(*args.interaction))
        if not all(0 <= weight < math.inf for weight in args.interaction):
            raise data.DataError(f"--interaction cannot be {args.interaction}")
    ds, r, path, config = data.parse(__file__, argv, args, RECIPE, CHANGES, SMALL, variant=named)
    config["recipe"]["interaction"] = args.interaction
    if args.anchor:
        ds.only(args.anchor)                        # raises DataError if there is no such modality
    elif not len(ds.indices("val")):
        raise data.DataError("no validation items to choose the anchor by (--val 0, or no class or "
                             "group of train can spare any): give --anchor NAME")
    return args, ds, r, path, config


# ---- the anchor ----------------------------------------------------------------------------------
def choose_anchor(accuracy, entropy, tolerance):
    """The most accurate modality; of those within `tolerance` of it, that of lowest entropy.

    {m: validation accuracy}, {m: mean predictive entropy in nats}, float -> name.
    """
    best = max(accuracy.values())
    near = [m for m in accuracy if accuracy[m] >= best - tolerance]
    return min(near, key=entropy.__getitem__)


def choose(log, n_val):
    """The anchor by the last scores of stage 1, and what it was chosen by. Near (U2) is within one
    standard error of the best accuracy."""
    last = {e["modality"]: e["val"][e["modality"]] for e in log}
    accuracy = {m: score["accuracy"] for m, score in last.items()}
    entropy = {m: score["entropy"] for m, score in last.items()}
    best = max(accuracy.values())
    tolerance = math.sqrt(best * (1 - best) / n_val)
    return dict(anchor=choose_anchor(accuracy, entropy, tolerance), accuracy=accuracy,
                entropy=entropy, tolerance=tolerance)


# ---- the interaction -----------------------------------------------------------------------------
def consistency_loss(anchor_logits, follower_logits):
    """Jensen-Shannon divergence of the outputs, in nats (Eq. 4): (B, C), (B, C) -> scalar.

        JS(p, q) = KL(p | mix) / 2 + KL(q | mix) / 2,   mix = (p + q) / 2;   from 0 to ln 2

    The mean over the batch; the anchor is detached. From log-probabilities, so that it is finite
    for any logits.
    """
    log_p, log_q = anchor_logits.detach().log_softmax(1), follower_logits.log_softmax(1)
    log_mix = torch.logaddexp(log_p, log_q) - math.log(2)
    both = log_p.exp() * (log_p - log_mix) + log_q.exp() * (log_q - log_mix)
    return (both.sum(1) / 2).mean()


def complementary_loss(anchor_features, follower_features, variance):
    """CLUB's estimate of I(z_a; z_f), q(z_f | z_a) = N(z_a, s^2 I): two (B, D) -> scalar (U3).

        ( mean_ij |f_i - a_j|^2 - mean_i |f_i - a_i|^2 ) / (2 s^2)
            = ( mean_i <f_i, a_i> - <mean_i f_i, mean_j a_j> ) / s^2    (Cheng et al., ICML 2020)

    on L2-normalised features, the anchor's detached: the trace of the cross-covariance over s^2.
    As q is fixed it is no bound, and may be negative: minimised, it makes each dimension of the one
    anticorrelated with the same dimension of the other, not the features independent.
    """
    a, f = F.normalize(anchor_features.detach(), dim=1), F.normalize(follower_features, dim=1)
    return ((f * a).sum(1).mean() - f.mean(0) @ a.mean(0)) / variance


def linear_cka(anchor_features, follower_features):
    """Linear CKA, a dependence in [0, 1] (Kornblith et al., ICML 2019): (B, D), (B, D) -> scalar.

        <K, L> / (|K| |L|),   K and L the Gram matrices of the centred features

    The anchor is detached. Ours, in place of CLUB. In small batches it is biased towards 1.
    """
    def gram(x):
        return (x - x.mean(0)) @ (x - x.mean(0)).T

    k, l = gram(anchor_features.detach()), gram(follower_features)
    return (k * l).sum() / (k.norm() * l.norm() + 1e-12)


def alignment(task_grad, consistency_grad, complementary_grad):
    """Cosines of the task's gradient with the others, over the mini-batch: three (B, D) -> (2,)."""
    others = torch.stack([consistency_grad.flatten(), complementary_grad.flatten()])
    return F.cosine_similarity(task_grad.flatten()[None], others, eps=1e-12)    # 0 for zeros


def interaction_weights(cosines, temperature):
    """The more a term's gradient agrees with the task's, the more it counts (U4): (2,) smoothed
    cosines -> (alpha, beta) = softmax(cosines / T), which sum to 1."""
    return (cosines / temperature).softmax(0)


# ---- the model -----------------------------------------------------------------------------------
class Encoder(ResNet):
    """ResNet-18 from scratch: (B, T, C, H, W) -> (B, 512), the mean over time and space.

    Every modality comes as T pictures of C channels; a spectrogram is one picture.
    """

    def __init__(self, in_channels):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)

        # the new convolution like torchvision's others, BatchNorm as in the DI-MML code
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


class UDI(nn.Module):
    """One encoder and one head for each modality, nothing shared; z = {m: (B, 512)}."""

    def __init__(self, in_channels, n_classes, dim=512):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Encoder(c) for m, c in in_channels.items()})
        self.heads = nn.ModuleDict({m: nn.Linear(dim, n_classes) for m in in_channels})

    def features(self, inputs):
        """{m: (B, T, C, H, W)} of some modalities -> z = {m: (B, 512)}."""
        return {m: self.encoders[m](x) for m, x in inputs.items()}

    def own_logits(self, z):
        return {m: self.heads[m](z_m) for m, z_m in z.items()}

    def logits(self, z):
        """{head: (B, C)}: "fused" is the answer (U7), the own heads have their modality's name."""
        own = self.own_logits(z)
        return {"fused": torch.stack(list(own.values())).mean(0), **own}


# ---- evaluation: the features of a part, computed once, serve all heads and the probe ------------
@torch.no_grad()
def features_of(part, model, ds, device, amp, batch_size):
    """Features of a whole part, eval mode, not augmented: {m: (N, 512)} of the modalities that
    `ds.only` left in ds, labels (N,)."""
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
    """Stage 1 for each modality, the choice of the anchor, stage 2 for each follower: r.epochs
    epochs each, then the result."""
    checkpoint = data.half_done(path, config, args.resume, args.amp)        # to go on from, or None
    ds.check(r.batch_size)
    device, dtype = data.pick_device(args.gpu, args.amp, checkpoint)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)    # of the encoders
    torch.manual_seed(args.seed)                                    # weights
    generator = torch.Generator().manual_seed(args.seed)            # order and augmentation

    model = UDI(ds.in_channels, len(ds.classes)).to(device)
    # the faster layout, but for small pictures in float32 on a CPU
    if device.type == "cuda" or dtype == torch.bfloat16:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), r.lr, momentum=0.9, weight_decay=1e-4,
                                fused=True)

    # where the anchor is named, stage 1 trains only what is needed
    alone = [m for m in ds.modalities if args.anchor in (None, m) or r.follower_init == "stage1"]
    n_epochs = (len(alone) + len(ds.modalities) - 1) * r.epochs
    choice = dict(anchor=args.anchor)
    fixed = torch.tensor(args.interaction, device=device) if args.interaction else None
    log = []                                        # a record an epoch
    cosines = torch.zeros(2, device=device)         # of the follower in training, smoothed
    if checkpoint:
        data.restore(path, checkpoint, model, optimizer, generator)
        log, choice = checkpoint["log"], checkpoint["choice"]
        cosines = checkpoint["cosines"].to(device)
    provenance = data.provenance(__file__, path, model, device, dtype, checkpoint)
    print(f"{path.name}: {dtype} on {device}, {len(log)} of {n_epochs} epochs done before")

    # one modality after the other: first alone, then as a follower
    set_up = None                                   # the number of the one that is set up
    for epoch in range(len(log), n_epochs):
        start = time.time()
        number, epoch_of_it = divmod(epoch, r.epochs)
        guided = number >= len(alone)

        # set up when its training begins, and after a resume
        if number != set_up:
            set_up = number
            if guided and choice["anchor"] is None:
                choice = choose(log, len(ds.indices("val")))
                print(f"the anchor is {choice['anchor']}", flush=True)
            anchor = choice["anchor"]
            followers = [name for name in ds.modalities if name != anchor]
            m = followers[number - len(alone)] if guided else alone[number]
            only_m = loaded = ds.only(m)            # loaded: what the steps need
            anchor_z, frozen = None, dict(val={}, test={})      # (N, 512); {part: {m: logits}}

        if guided and not frozen["test"]:
            # what is frozen is computed once: the logits that the follower's are averaged with ...
            done = ds.only(anchor, *followers[:number - len(alone)])
            for part in frozen:
                if len(ds.indices(part)):
                    z, _ = features_of(part, model, done, device, amp, r.batch_size)
                    frozen[part] = {name: o.detach() for name, o in model.own_logits(z).items()}

            # ... and the anchor's features of the training items, if they are not augmented (U6)
            if ds.modalities[anchor].kind in ("audio", "spectrogram"):
                z, _ = features_of("train", model, ds.only(anchor), device, amp, r.batch_size)
                anchor_z = torch.full((len(ds.labels), 512), torch.nan, device=device)
                anchor_z[torch.from_numpy(ds.indices("train")).to(device)] = z[anchor]
            else:
                loaded = ds.only(*(name for name in ds.modalities if name in (anchor, m)))

        # only when it begins: momentum from zero, and new weights for a follower
        if epoch_of_it == 0:
            optimizer.state.clear()
            cosines = torch.zeros(2, device=device)
            if guided and r.follower_init == "scratch":
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
                model.encoders[m].load_state_dict(Encoder(ds.in_channels[m]).state_dict())
                model.heads[m].reset_parameters()
        lr = r.lr * 0.1 ** (epoch_of_it // r.lr_step)
        optimizer.param_groups[0]["lr"] = lr

        # one pass over the training items; what is frozen keeps its BatchNorm statistics too
        model.eval()
        model.encoders[m].train()
        batches = loaded.batches("train", r.batch_size, device, augment=True, generator=generator)
        total = defaultdict(float)                  # of each loss, over the epoch
        for inputs, y, index in tqdm(batches, leave=False, disable=None):
            with amp:
                z = model.encoders[m](inputs[m])    # (B, 512)
            logits = model.heads[m](z)
            loss = {m: F.cross_entropy(logits, y)}

            if guided:
                with torch.no_grad():
                    if anchor_z is None:
                        with amp:
                            z_a = model.encoders[anchor](inputs[anchor])
                    else:
                        z_a = anchor_z[index]
                    anchor_logits = model.heads[anchor](z_a)
                consistency = consistency_loss(anchor_logits, logits)
                if r.complement == "club":
                    complement = complementary_loss(z_a, z, r.variance)
                else:
                    complement = linear_cka(z_a, z)

                # gradients at the follower's features: no pass through the encoder is needed, and
                # the weights are constants of the loss
                terms = (loss[m], consistency, complement)
                grads = [torch.autograd.grad(term, z, retain_graph=True)[0] for term in terms]
                cosines = cosines.lerp(alignment(*grads), 1 - SMOOTHING)
                weights = fixed if args.interaction else interaction_weights(cosines, r.temperature)
                loss["consistency"] = weights[0] * consistency
                loss["complement"] = weights[1] * complement

            # gradients become None, not 0, so that what is frozen is not decayed either
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
        record = dict(stage="guided" if guided else "alone", modality=m, epoch=epoch, lr=lr,
                      loss=mean, val={}, test={})
        if guided:                                  # as they stand at the epoch's end
            names = ("alpha", "beta", "cos_consistency", "cos_complement")
            record["interaction"] = dict(zip(names, weights.tolist() + cosines.tolist()))
        for part in ("val", "test"):
            if len(ds.indices(part)) == 0:          # there may be no validation items
                continue
            z, y = features_of(part, model, only_m, device, amp, r.batch_size)
            with torch.no_grad():
                own = model.own_logits(z)[m]
            record[part] = {m: scores(own, y)}
            if guided:
                fused = torch.stack([*frozen[part].values(), own]).mean(0)
                record[part]["fused"] = scores(fused, y)
        record["seconds"] = time.time() - start
        log.append(record)
        data.save(path, ds, provenance, device, config=config, log=log, choice=choice,
                  cosines=cosines, model=model.state_dict(), optimizer=optimizer.state_dict(),
                  generator=generator.get_state())
        data.print_epoch(log, n_epochs)

    # the result: every head on the test items, and a probe of each encoder
    z_train, y_train = features_of("train", model, ds, device, amp, r.batch_size)
    z, y = features_of("test", model, ds, device, amp, r.batch_size)
    with torch.no_grad():
        logits = model.logits(z)
    return data.write_result(
        path, args, ds, config, provenance, log, logits, y, answer="fused", choice=choice,
        probes={m: probe(z_train[m], y_train, z[m], y) for m in z})


if __name__ == "__main__":
    with data.exit_codes(__file__):
        main()
