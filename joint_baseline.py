"""Joint training, single modalities, and what every method has to beat: their ensemble.

    encoder -> z_a --+
                     +--> fusion head -> CE         one loss trains everything
    encoder -> z_v --+

DI-MML and UDI argue against this: the modality that is learned faster explains the labels, the
gradient fades, and the other encoder is left half-trained. Look at the `probe` column: the same
encoder trained alone usually scores higher. The ensemble of encoders trained apart is the rival of
every method here, and so is the same ensemble calibrated: one temperature a modality.

    python joint_baseline.py                            # the embedded set, concatenation
    python joint_baseline.py --ensemble                 # each modality alone, logits averaged
    python joint_baseline.py --dataset ave --gpu 0 --fusion film
    python joint_baseline.py --dataset ave --gpu 0 --modality audio

Read it top to bottom: recipe, calibration, model, evaluation, training. The package `data` holds
what is not the method: flags, batches, files. Departures: results/DEVIATIONS.md.
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

# ---- recipe: that of the DI-MML code. Every entry is also a flag, e.g. --lr 0.01 -----------------
RECIPE = dict(
    epochs=150,             # with --epochs, lr_step scales along
    batch_size=16,
    lr=1e-3,                # of SGD with momentum 0.9 and weight decay 1e-4
    lr_step=70,             # lr x 0.1 every so many epochs
    encoder_lr_factor=1.0,  # --ensemble: times lr for the encoders, a control for methods whose
)                           # encoders get larger gradients
CHANGES = {                 # by dataset; those of the last three are ours
    "cremad": {}, "ave": {}, "ucf101": {}, "modelnet40": {},        # RECIPE as it is
    "avletters": dict(epochs=40, lr=0.01, lr_step=32),
    "utdmhad": dict(epochs=40, lr=0.01, lr_step=32),
    "modelnet40_points": dict(epochs=10, batch_size=64, lr=0.01, lr_step=8),
}
SMALL = dict(epochs=15, lr=3e-3, lr_step=12)        # any other set, ours


def plan(argv=None):
    """What a command line asks for: args, dataset, recipe, the path of the run's files without
    suffix, and its config: two runs of one config are one run."""
    parser = data.parser(__doc__, RECIPE)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fusion", choices=["concat", "sum", "film", "gated"], default="concat")
    what.add_argument("--modality", help="train this modality alone")
    what.add_argument("--ensemble", action="store_true", help="train each alone, average logits")
    args = parser.parse_args(argv)

    alone = "ensemble" if args.ensemble else f"only-{args.modality}" if args.modality else None
    ds, r, path, config = data.parse(
        __file__, argv, args, RECIPE, CHANGES, SMALL, variant=[alone or args.fusion],
        words=dict(encoder_lr_factor="encoder"), least=1 if args.modality else 2)
    if args.modality:
        ds = ds.only(args.modality)
    if r.encoder_lr_factor != 1 and not args.ensemble:
        raise data.DataError("--encoder-lr-factor is a control of --ensemble: give both")
    return args, ds, r, path, config


# ---- calibration ---------------------------------------------------------------------------------
def calibration_temperature(logits, labels):
    """The temperature under which logits are least wrong about how sure they are (Guo et al., ICML
    2017): (N, C), (N,) of validation items -> T, one of 81 values from 0.1 to 10.

        T = argmin_T  mean_i CE(o_i / T, y_i)
    """
    grid = torch.logspace(-1, 1, 81, dtype=torch.float64)
    losses = [F.cross_entropy(logits.double() / t, labels) for t in grid.tolist()]
    return grid[torch.stack(losses).argmin().item()].item()


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


class Fusion(nn.Module):
    """A joint head on two or more modalities: {m: (B, D)} -> (B, C) logits.

        concat  W [z_1, ..., z_M]                                       the usual one
        sum     sum_m W_m z_m                                           concat, a bias for each
        film    W h;  h = z_M, then h <- gamma(z_m) * h + beta(z_m)     (Perez et al., 2018)
        gated   W (U_M z_M * prod_m sigmoid(U_m z_m))                   (Kiela et al., 2018)

    In the last two m runs over 1 .. M - 1: every other modality conditions the last one in turn.
    For M = 2 they are those of the OGM-GE code.
    """

    def __init__(self, kind, n_modalities, n_classes, dim=512):
        super().__init__()
        self.kind = kind
        outputs = dict(
            concat=[],
            sum=[n_classes] * n_modalities,
            film=[2 * dim] * (n_modalities - 1),        # gamma and beta
            gated=[dim] * n_modalities)[kind]
        if kind != "sum":
            self.out = nn.Linear(dim * n_modalities if kind == "concat" else dim, n_classes)
        self.linear = nn.ModuleList(nn.Linear(dim, n) for n in outputs)

    def forward(self, z):
        z = list(z.values())
        parts = [linear(z_m) for linear, z_m in zip(self.linear, z)]
        if self.kind == "sum":
            return sum(parts)
        if self.kind == "concat":
            h = torch.cat(z, 1)
        if self.kind == "film":
            h = z[-1]
            for part in parts:
                gamma, beta = part.chunk(2, dim=1)
                h = gamma * h + beta
        if self.kind == "gated":
            h = parts[-1]
            for gate in parts[:-1]:
                h = h * gate.sigmoid()
        return self.out(h)


class Model(nn.Module):
    """An encoder a modality, with one fusion head, or (`fusion` None) with a head of its own each;
    z = {m: (B, 512)} are the features."""

    def __init__(self, in_channels, n_classes, fusion=None, dim=512):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Encoder(c) for m, c in in_channels.items()})
        self.fusion = Fusion(fusion, len(in_channels), n_classes, dim) if fusion else None
        own = {} if fusion else in_channels
        self.heads = nn.ModuleDict({m: nn.Linear(dim, n_classes) for m in own})

    def features(self, inputs):
        """{m: (B, T, C, H, W)} -> z = {m: (B, 512)}."""
        return {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}

    def own_logits(self, z):
        return {m: head(z[m]) for m, head in self.heads.items()}

    def logits(self, z, temperatures=None):
        """All heads, {head: (B, C)}: "fused" is the answer, "calibrated" the one that needs
        {m: temperature}, a modality's name its own head."""
        if self.fusion:
            return {"fused": self.fusion(z)}
        own = self.own_logits(z)
        answers = {"fused": torch.stack(list(own.values())).mean(0)}
        if temperatures:
            scaled = [o / temperatures[m] for m, o in own.items()]
            answers["calibrated"] = torch.stack(scaled).mean(0)
        return {**answers, **own}


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
    """r.epochs epochs, then the result."""
    checkpoint = data.half_done(path, config, args.resume, args.amp)        # to go on from, or None
    ds.check(r.batch_size)
    device, dtype = data.pick_device(args.gpu, args.amp, checkpoint)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)    # of the encoders
    torch.manual_seed(args.seed)                                    # weights
    generator = torch.Generator().manual_seed(args.seed)            # order and augmentation

    stage = "alone" if args.ensemble or args.modality else "joint"
    fusion = args.fusion if stage == "joint" else None
    model = Model(ds.in_channels, len(ds.classes), fusion).to(device)
    # the faster layout, but for small pictures in float32 on a CPU
    if device.type == "cuda" or dtype == torch.bfloat16:
        model = model.to(memory_format=torch.channels_last)
    encoders = set(model.encoders.parameters())
    heads = [p for p in model.parameters() if p not in encoders]
    optimizer = torch.optim.SGD([{"params": model.encoders.parameters()}, {"params": heads}], r.lr,
                                momentum=0.9, weight_decay=1e-4, fused=True)

    log, temperatures = [], {}                      # a record an epoch; {m: of the last epoch}
    if checkpoint:
        data.restore(path, checkpoint, model, optimizer, generator)
        log = checkpoint["log"]
    provenance = data.provenance(__file__, path, model, device, dtype, checkpoint)
    print(f"{path.name}: {dtype} on {device}, {len(log)} of {r.epochs} epochs done before")

    for epoch in range(len(log), r.epochs):
        start = time.time()
        lr = r.lr * 0.1 ** (epoch // r.lr_step)
        optimizer.param_groups[0]["lr"] = lr * r.encoder_lr_factor
        optimizer.param_groups[1]["lr"] = lr

        # one pass over the training items
        model.train()
        batches = ds.batches("train", r.batch_size, device, augment=True, generator=generator)
        total = defaultdict(float)                  # of each loss, over the epoch
        for inputs, y, _ in tqdm(batches, leave=False, disable=None):
            with amp:
                z = model.features(inputs)          # {m: (B, 512)}

            # one loss for all; or encoders side by side that share nothing, so that the sum of
            # their losses trains each as if it were alone
            if stage == "joint":
                loss = {"joint": F.cross_entropy(model.fusion(z), y)}
            else:
                loss = {m: F.cross_entropy(o, y) for m, o in model.own_logits(z).items()}

            optimizer.zero_grad()
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
            z, y = features_of(part, model, ds, device, amp, r.batch_size)
            with torch.no_grad():
                # validation comes first: its items give the temperatures for both parts
                if part == "val" and args.ensemble:
                    own = model.own_logits(z)
                    temperatures = {m: calibration_temperature(own[m], y) for m in own}
                    record["temperatures"] = temperatures
                logits = model.logits(z, temperatures)
            record[part] = {head: scores(o, y) for head, o in logits.items()}
        record["seconds"] = time.time() - start
        log.append(record)
        data.save(path, ds, provenance, device, config=config, log=log, model=model.state_dict(),
                  optimizer=optimizer.state_dict(), generator=generator.get_state())
        data.print_epoch(log, r.epochs)

    # the result: every head on the test items, and a probe of each encoder
    temperatures = log[-1].get("temperatures", {})
    for m, t in temperatures.items():
        print(f"temperature of {m}: {t:.2f}{'' if 0.1 < t < 10 else ', the edge of the grid'}")
    z_train, y_train = features_of("train", model, ds, device, amp, r.batch_size)
    z, y = features_of("test", model, ds, device, amp, r.batch_size)
    with torch.no_grad():
        logits = model.logits(z, temperatures)
    return data.write_result(
        path, args, ds, config, provenance, log, logits, y, answer="fused",
        probes={m: probe(z_train[m], y_train, z[m], y) for m in z}, temperatures=temperatures)


if __name__ == "__main__":
    with data.exit_codes(__file__):
        main()
