"""The reactive cures for joint training: they keep one model and change what trains its encoders.

    encoder -> z_a --+                              W = [W_a, W_v] is one linear head on all
                     +--> W [z_a, z_v] + b -> CE    features, so each modality has a part of it:
    encoder -> z_v --+                              half-head logits W_m z_m + b / M

    auxiliary   each encoder has a head and a loss of its own too
    ogm_ge      the encoder that is ahead gets less of its gradient, and noise keeps it moving
    mmpareto    each encoder follows a compromise between the joint loss and its own
    dgl         the head feels the joint loss alone, each encoder the loss of its half head alone

    python balance.py                                           # auxiliary, on the embedded set
    python balance.py --dataset ave --gpu 0 --balance ogm_ge
    python balance.py --balance auxiliary --encoder-lr-factor 1.5     # the control of mmpareto

Read joint_baseline.py first: this is its loop, and each cure is an `if` in it. The package `data`
holds what is not the method: flags, batches, files. Departures: results/DEVIATIONS.md.
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

# ---- recipe: that of the DI-MML code. Every entry is also a flag, e.g. --ogm-alpha 0.5 -----------
RECIPE = dict(
    epochs=150,             # with --epochs, lr_step scales along
    batch_size=16,
    lr=1e-3,                # of SGD with momentum 0.9 and weight decay 1e-4
    lr_step=70,             # lr x 0.1 every so many epochs
    encoder_lr_factor=1.0,  # times lr for the encoders: the control of what scales their gradients
    ogm_alpha=0.8,          # of ogm_ge; its code's value for CREMA-D
)
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
    parser.add_argument("--balance", choices=["auxiliary", "ogm_ge", "mmpareto", "dgl"],
                        default="auxiliary", help="the cure (default: auxiliary)")
    args = parser.parse_args(argv)
    ds, r, path, config = data.parse(
        __file__, argv, args, RECIPE, CHANGES, SMALL, variant=[args.balance],
        words=dict(encoder_lr_factor="encoder", ogm_alpha="alpha"))
    if r.ogm_alpha != RECIPE["ogm_alpha"] and args.balance != "ogm_ge":
        raise data.DataError("--ogm-alpha is of --balance ogm_ge: give both")
    return args, ds, r, path, config


# ---- the cures -----------------------------------------------------------------------------------
def half_head_logits(z, weight, bias):
    """The joint head, block by block: {m: (B, D)}, (C, M D), (C,) -> {m: W_m z_m + b} (B, C)."""
    blocks = weight.split([z_m.shape[1] for z_m in z.values()], dim=1)
    return {m: F.linear(z[m], block, bias) for m, block in zip(z, blocks)}


def ogm_coefficients(scores, alpha):
    """OGM-GE (Peng et al., CVPR 2022): what an encoder keeps of its gradient, {m: s_m} -> {m: k_m}.

        rho_m = s_m / mean of the others' s,    k_m = 1 - tanh(alpha rho_m) where rho_m > 1, else 1

    s_m = sum_i softmax(W_m z_m,i + b / M)[y_i]. As in its code, k jumps where rho passes 1.
    """
    # in float64, so that equal scores have rho = 1 exactly
    s = torch.stack([torch.as_tensor(s_m) for s_m in scores.values()]).double()
    # the others all 0: rho is infinite, k is 0; all 0: rho is not a number, k is 1
    rho = s / ((s.sum() - s) / (len(s) - 1))
    k = torch.where(rho > 1, 1 - torch.tanh(alpha * rho), 1.0)
    return dict(zip(scores, k))


def ogm_ge_gradient(grad, coefficient, generator):
    """k g + N(0, std(g)^2), std over the entries of g as it was before the factor k: any shape."""
    noise = torch.randn(grad.shape, generator=generator, device=grad.device, dtype=grad.dtype)
    return coefficient * grad + grad.std() * noise


def pareto_weights(joint_grad, own_grad):
    """MMPareto (Wei and Hu, ICML 2024): weights of an encoder's two gradients, (P,), (P,) -> (2,).

    Equal where they agree (cosine > 0) or both vanish; else the point of least norm between them:

        k0 = (g1.g1 - g0.g1) / |g0 - g1|^2 within [.001, .999],    k1 = 1 - k0
    """
    g0, g1 = joint_grad, own_grad
    distance = (g0 - g1).square().sum()
    k0 = ((g1 @ g1 - g0 @ g1) / distance).clamp(0.001, 0.999)
    k0 = torch.where((g0 @ g1 > 0) | (distance == 0), 0.5, k0)
    return torch.stack([k0, 1 - k0])


def pareto_gradient(joint_grads, own_grads):
    """An encoder's gradient from those of the joint loss and of its own: lists, a tensor for each
    parameter -> such a list, and (2,): their cosine and k1, to be watched. For each tensor

        h = 2 k0 g0 + 2 k1 g1,    h <- 1.5 h max(1, |g0 + g1| / |h|),    0 stays 0
    """
    g0 = torch.cat([g.flatten() for g in joint_grads])
    g1 = torch.cat([g.flatten() for g in own_grads])
    k0, k1 = pareto_weights(g0, g1)

    # an encoder has 60 tensors: torch._foreach_* handles them in one call each
    h = torch._foreach_mul(joint_grads, 2 * k0)
    torch._foreach_add_(h, torch._foreach_mul(own_grads, 2 * k1))
    size = torch.stack(torch._foreach_norm(h))
    plain = torch.stack(torch._foreach_norm(torch._foreach_add(joint_grads, own_grads)))
    stretch = 1.5 * (plain / size).clamp(min=1)
    stretch = torch.where(size == 0, 0.0, stretch)
    torch._foreach_mul_(h, stretch.unbind())
    return h, torch.stack([F.cosine_similarity(g0, g1, dim=0), k1])


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


class Model(nn.Module):
    """An encoder a modality, the joint head on all features z = {m: (B, 512)}, and, where a cure
    wants them (`own_heads`), a head of its own for each."""

    def __init__(self, in_channels, n_classes, own_heads, dim=512):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Encoder(c) for m, c in in_channels.items()})
        self.fusion_head = nn.Linear(dim * len(in_channels), n_classes)
        own = in_channels if own_heads else {}
        self.heads = nn.ModuleDict({m: nn.Linear(dim, n_classes) for m in own})

    def features(self, inputs):
        """{m: (B, T, C, H, W)} -> z = {m: (B, 512)}."""
        return {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}

    def own_logits(self, z):
        return {m: head(z[m]) for m, head in self.heads.items()}

    def joint_logits(self, z):
        return self.fusion_head(torch.cat(list(z.values()), 1))

    def logits(self, z):
        """All heads, {head: (B, C)}: "fused" is the answer, that of the joint head; "own" a
        control, the mean of the own heads; a modality's name its own head."""
        own = self.own_logits(z)
        answers = {"fused": self.joint_logits(z)}
        if own:
            answers["own"] = torch.stack(list(own.values())).mean(0)
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
    noise = torch.Generator(device)                                 # of ogm_ge

    own_heads = args.balance in ("auxiliary", "mmpareto")
    model = Model(ds.in_channels, len(ds.classes), own_heads).to(device)
    # the faster layout, but for small pictures in float32 on a CPU
    if device.type == "cuda" or dtype == torch.bfloat16:
        model = model.to(memory_format=torch.channels_last)
    weights = {m: list(encoder.parameters()) for m, encoder in model.encoders.items()}
    heads = [*model.fusion_head.parameters(), *model.heads.parameters()]
    optimizer = torch.optim.SGD([{"params": model.encoders.parameters()}, {"params": heads}], r.lr,
                                momentum=0.9, weight_decay=1e-4, fused=True)

    log = []                                        # a record an epoch
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
        if args.balance == "ogm_ge":                # other noise in each epoch
            noise.manual_seed(int(torch.randint(2**62, (), generator=generator)))

        # one pass over the training items
        model.train()
        batches = ds.batches("train", r.batch_size, device, augment=True, generator=generator)
        total = defaultdict(float)                  # of each loss, over the epoch
        watched = defaultdict(float)                # {m: (2,)}, what a cure looks at, likewise
        for inputs, y, _ in tqdm(batches, leave=False, disable=None):
            with amp:
                z = model.features(inputs)          # {m: (B, 512)}

            # auxiliary, mmpareto: each encoder has a loss of its own beside the joint one
            if args.balance != "dgl":
                loss = {m: F.cross_entropy(o, y) for m, o in model.own_logits(z).items()}
                loss["joint"] = F.cross_entropy(model.joint_logits(z), y)

            # dgl: the head is trained on features that feel nothing of it, each encoder through
            # its part of a head that does not move
            if args.balance == "dgl":
                weight, bias = model.fusion_head.weight.detach(), model.fusion_head.bias.detach()
                halves = half_head_logits(z, weight, bias)
                loss = {m: F.cross_entropy(o, y) for m, o in halves.items()}
                detached = {m: z_m.detach() for m, z_m in z.items()}
                loss["joint"] = F.cross_entropy(model.joint_logits(detached), y)

            optimizer.zero_grad()
            if args.balance != "mmpareto":
                sum(loss.values()).backward()

            # mmpareto: the heads keep the plain sum, each encoder follows a compromise
            if args.balance == "mmpareto":
                for m, w in weights.items():
                    joint = torch.autograd.grad(loss["joint"], w, retain_graph=True)
                    own = torch.autograd.grad(loss[m], w, retain_graph=True)
                    grads, cosine_and_weight = pareto_gradient(joint, own)
                    for parameter, grad in zip(w, grads):
                        parameter.grad = grad
                    watched[m] += cosine_and_weight
                sum(loss.values()).backward(inputs=heads)

            # ogm_ge: in the first half of the epochs, convolutions of an encoder that is ahead keep
            # a share of their gradient, and those of every encoder get noise
            if args.balance == "ogm_ge":
                with torch.no_grad():
                    W, b = model.fusion_head.weight, model.fusion_head.bias
                    halves = half_head_logits(z, W, b / len(z))
                right = torch.arange(len(y), device=device), y
                score = {m: o.softmax(1)[right].sum() for m, o in halves.items()}
                keep = ogm_coefficients(score, r.ogm_alpha)
                for m, k in keep.items():
                    if epoch >= r.epochs / 2:
                        k = torch.ones_like(k)
                    else:
                        for w in weights[m]:
                            if w.ndim == 4:
                                w.grad = ogm_ge_gradient(w.grad, k, noise)
                    watched[m] += torch.stack([score[m] / len(y), k])

            optimizer.step()
            # no .item() here: a GPU need not wait for the value
            for name, value in loss.items():
                total[name] += value.detach()
        mean = {name: (value / len(batches)).item() for name, value in total.items()}
        if not math.isfinite(sum(mean.values())):
            raise FloatingPointError(f"epoch {epoch + 1}: loss {mean}: lower --lr, or --amp off")

        # evaluation; the test scores are recorded, and nothing is ever chosen by them
        record = dict(stage="joint", epoch=epoch, lr=lr, loss=mean, val={}, test={})
        names = dict(ogm_ge=("score", "coefficient"), mmpareto=("cosine", "weight"))
        if watched:
            record["balance"] = {}
            for m, value in watched.items():
                pair = (value / len(batches)).tolist()
                record["balance"][m] = dict(zip(names[args.balance], pair))
        for part in ("val", "test"):
            if len(ds.indices(part)) == 0:          # there may be no validation items
                continue
            z, y = features_of(part, model, ds, device, amp, r.batch_size)
            with torch.no_grad():
                logits = model.logits(z)
            record[part] = {head: scores(o, y) for head, o in logits.items()}
        record["seconds"] = time.time() - start
        log.append(record)
        data.save(path, ds, provenance, device, config=config, log=log, model=model.state_dict(),
                  optimizer=optimizer.state_dict(), generator=generator.get_state())
        data.print_epoch(log, r.epochs)

    # the result: every head on the test items, and a probe of each encoder
    z_train, y_train = features_of("train", model, ds, device, amp, r.batch_size)
    z, y = features_of("test", model, ds, device, amp, r.batch_size)
    with torch.no_grad():
        logits = model.logits(z)
    return data.write_result(
        path, args, ds, config, provenance, log, logits, y, answer="fused",
        probes={m: probe(z_train[m], y_train, z[m], y) for m in z})


if __name__ == "__main__":
    with data.exit_codes(__file__):
        main()
