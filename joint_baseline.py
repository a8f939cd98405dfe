"""Joint training, the cures for it, and what all of them have to beat.

    encoder -> z_a --+
                     +--> fusion head -> CE         one loss trains everything
    encoder -> z_v --+

DI-MML and UDI argue against this: the modality that is learned faster explains the labels, the
gradient fades, and the other encoder is left half-trained. Look at the `probe` column: the same
encoder trained alone usually scores higher. The ensemble of encoders trained apart (--ensemble) is
what every method here has to beat.

    python joint_baseline.py                            # the embedded set, concatenation
    python joint_baseline.py --ensemble                 # each modality alone, logits averaged
    python joint_baseline.py --balance ogm_ge           # a cure: auxiliary, ogm_ge, mmpareto, dgl
    python joint_baseline.py --dataset ave --gpu 0 --fusion film
    python joint_baseline.py --dataset ave --gpu 0 --modality audio

Read it top to bottom: recipe, cures, model, evaluation, `plan` (what a command line asks for) and
`main`, one flat loop. Where it departs from published code, and why: results/DEVIATIONS.md.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: spinning threads slow other runs

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce
from sklearn import linear_model, metrics, pipeline, preprocessing
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

from data import (DataError, claim, exit_codes, finished, half_done, open_dataset, pick_device,
                  print_table, provenance, whole_file)

# ---- recipe: that of the DI-MML code. Every entry is also a flag, e.g. --lr 0.01 -----------------
RECIPE = dict(
    epochs=150,             # with --epochs, lr_step scales along
    batch_size=16,
    lr=1e-3,                # of SGD with momentum 0.9 and weight decay 1e-4
    lr_step=70,             # lr x 0.1 every so many epochs
    encoder_lr_factor=1.0,  # times lr for the encoders: the control for cures that scale gradients
    ogm_alpha=0.8,          # of --balance ogm_ge; its code's value for CREMA-D
)
CHANGES = {"cremad": {}, "ave": {}, "ucf101": {}, "modelnet40": {},     # {}: RECIPE as it is
           "avletters": dict(epochs=40, lr=0.01, lr_step=32)}       # ours
SMALL = dict(epochs=15, lr=3e-3, lr_step=12)        # ours, for any other dataset
COMPARE = "Compare: python joint_baseline.py --ensemble (each alone)."


# ---- cures: each changes what of the joint loss reaches the encoders -----------------------------
def half_head_logits(z, weight, bias):
    """The concat head, block by block: {m: (B, D)}, (C, M D), (C,) -> {m: W_m z_m + b}."""
    blocks = weight.split([z_m.shape[1] for z_m in z.values()], dim=1)
    return {m: F.linear(z_m, block, bias) for (m, z_m), block in zip(z.items(), blocks)}


def ogm_coefficients(scores, alpha):
    """OGM-GE (Peng et al., CVPR 2022): what an encoder keeps of its gradient, {m: s_m} -> {m: k_m}.

        rho_m = s_m / mean of the others' s,    k_m = 1 - tanh(alpha rho_m) where rho_m > 1, else 1
    s_m = sum_i softmax(W_m z_m,i + b / M)[y_i]. As in its code, k jumps where rho passes 1.
    """
    s = torch.stack([torch.as_tensor(s_m) for s_m in scores.values()]).double()     # tie: rho is 1
    rho = s / ((s.sum() - s) / (len(s) - 1))        # others all 0: infinite, so k = 0
    k = torch.where(rho > 1, 1 - torch.tanh(alpha * rho), 1.0)      # all 0: not a number, so k = 1
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
    g0, g1 = (torch.cat([g.flatten() for g in grads]) for grads in (joint_grads, own_grads))
    k0, k1 = pareto_weights(g0, g1)
    grads = []
    for a, b in zip(joint_grads, own_grads):
        h = 2 * k0 * a + 2 * k1 * b
        stretch = ((a + b).norm() / h.norm()).clamp(min=1)
        grads.append(torch.where(h.norm() == 0, 0.0, 1.5 * stretch * h))
    return grads, torch.stack([F.cosine_similarity(g0, g1, dim=0), k1])


# ---- the model -----------------------------------------------------------------------------------
class Encoder(ResNet):
    """ResNet-18 from scratch: (B, T, C, H, W) -> (B, 512), the mean over time and space."""

    def __init__(self, in_channels):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)       # as in the DI-MML code
        del self.avgpool, self.fc   # a plain mean: adaptive pooling is not deterministic on CUDA

    def forward(self, x):
        batch = len(x)
        x = rearrange(x, "b t c h w -> (b t) c h w")            # each frame by itself
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return reduce(x.float(), "(b t) d h w -> b d", "mean", b=batch)     # float32 even with amp


class Fusion(nn.Module):
    """A joint head on M >= 2 modalities: {m: (B, D)} -> (B, C) logits.

    concat  W [z_1, ..., z_M]                                           the usual one
    sum     sum_m W_m z_m                                               concat with a bias for each
    film    W h, h = z_M, then h <- gamma(z_m) * h + beta(z_m), m < M   (Perez et al., 2018)
    gated   W (U_M z_M * prod_{m<M} sigmoid(U_m z_m))                   (Kiela et al., 2018)
    For M = 2 the last two are those of the OGM-GE code: the first modality conditions the last.
    """

    def __init__(self, kind, n_modalities, dim, n_classes):
        super().__init__()
        self.kind = kind
        outputs = dict(concat=[], sum=[n_classes] * n_modalities, gated=[dim] * n_modalities,
                       film=[2 * dim] * (n_modalities - 1))[kind]
        inputs = dim * n_modalities if kind == "concat" else dim
        self.out = nn.Linear(inputs, n_classes) if kind != "sum" else None
        self.linear = nn.ModuleList(nn.Linear(dim, n) for n in outputs)

    def forward(self, z):
        parts = [linear(z_m) for linear, z_m in zip(self.linear, z.values())]
        *_, h = z.values()
        if self.kind == "concat":
            h = torch.cat(list(z.values()), 1)
        if self.kind == "sum":
            return sum(parts)
        if self.kind == "film":
            for gamma, beta in (part.chunk(2, dim=1) for part in parts):
                h = gamma * h + beta
        if self.kind == "gated":
            *gates, h = parts
            for gate in gates:
                h = h * gate.sigmoid()
        return self.out(h)


class Model(nn.Module):
    """An encoder per modality, with a fusion head (unless `fusion` is None), own heads, or both."""

    answer = "fused"        # the head that is the method's answer

    def __init__(self, in_channels, n_classes, fusion, own_heads, dim=512):
        super().__init__()
        self.modalities = list(in_channels)     # a ModuleDict would refuse a name like "forward"
        self.encoders = nn.ModuleList(Encoder(channels) for channels in in_channels.values())
        self.fusion = Fusion(fusion, len(in_channels), dim, n_classes) if fusion else None
        self.heads = nn.ModuleList(nn.Linear(dim, n_classes) for _ in in_channels if own_heads)

    def features(self, inputs):
        """{m: (B, T, C, H, W)} -> z = {m: (B, 512)}."""
        return {m: encoder(inputs[m]) for m, encoder in zip(self.modalities, self.encoders)}

    def own_logits(self, z):
        return {m: head(z[m]) for m, head in zip(self.modalities, self.heads)}

    def logits(self, z):
        """z -> {group: {head: (B, C)}}: two groups, as a modality may be called "fused" too."""
        own = self.own_logits(z)
        fused = self.fusion(z) if self.fusion else torch.stack(list(own.values())).mean(0)
        return {"heads": {"fused": fused}, "modality_heads": own}


# ---- evaluation: the features of a part, computed once, serve all heads and the probe ------------
@torch.no_grad()
def features_of(part, model, ds, device, amp, batch_size):
    """Features of a whole part, eval mode, not augmented: {m: (N, 512)}, labels (N,)."""
    model.eval()
    z, labels = [], []
    for inputs, y, _ in ds.batches(part, 2 * batch_size, device):   # twice fits without gradients
        with amp:
            z.append(model.features(inputs))
        labels.append(y)
    z = {m: torch.cat([batch[m] for batch in z]) for m in ds.modalities}
    if not all(z_m.isfinite().all() for z_m in z.values()):
        raise FloatingPointError("an encoder's features are not finite: lower --lr, or --amp off")
    return z, torch.cat(labels)


def scores(logits, y):
    """(N, C), (N,) -> accuracy, macro-F1 over the classes in y, mean predictive entropy in nats."""
    log_p, predicted = logits.log_softmax(1), logits.argmax(1)
    macro_f1 = metrics.f1_score(y.cpu(), predicted.cpu(), labels=y.unique().cpu(), average="macro")
    return dict(accuracy=(predicted == y).double().mean().item(), macro_f1=float(macro_f1),
                entropy=-(log_p.exp() * log_p).sum(1).mean().item())


def summarise(log, group, head):
    """A head's test scores at its `last` epoch (quote this), at that of `best_val` accuracy, and
    at that of `best_test` accuracy, as published code chooses: optimistic, to compare only."""
    chosen = {"last": log[-1]}
    for part in ("val", "test"):
        if log[-1][part]:
            chosen[f"best_{part}"] = max(log, key=lambda e: e[part][group][head]["accuracy"])
    return {rule: {**e["test"][group][head], "stage": e["stage"], "epoch": e["epoch"]}
            for rule, e in chosen.items()}


def probe(z, y, z_test, y_test):
    """What an encoder has learned: test accuracy of a logistic regression on its frozen features.
    If none can be fitted: None, and the reason, since that is not worth losing the run."""
    linear = pipeline.make_pipeline(preprocessing.StandardScaler(),
                                    linear_model.LogisticRegression(max_iter=1000))
    try:
        return linear.fit(z.cpu(), y.cpu()).score(z_test.cpu(), y_test.cpu()), None
    except ValueError as error:
        return None, str(error)


# ---- a run ---------------------------------------------------------------------------------------
def plan(argv=None):
    """What a command line asks for: args, dataset, recipe, the run's path without suffix, config.
    Two runs of equal config are one run; nothing but `plan` makes a run's name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dataset", default="synthetic", help="a name under --data-dir, or a prepared folder")
    add("--data-dir", default="datasets")
    add("--split", help="one of the dataset's splits (default: its first)")
    add("--val", type=float, default=0.1, help="share of train to hold out if there is no val part")
    add("--seed", type=int, default=0)
    add("--gpu", type=int, help="GPU number (default: the first GPU; without any, the CPU)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="encoder precision")
    add("--out", default="runs", help="folder of checkpoint and result")
    add("--resume", action="store_true", help="go on after the last whole epoch")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fusion", choices=["concat", "sum", "film", "gated"], default="concat")
    what.add_argument("--balance", choices=["none", "auxiliary", "ogm_ge", "mmpareto", "dgl"],
                      default="none", help="a cure, on a head that concatenates")
    what.add_argument("--modality", help="train this modality alone")
    what.add_argument("--ensemble", action="store_true", help="train each alone, average logits")
    for key, value in RECIPE.items():
        add(f"--{key.replace('_', '-')}", type=type(value), help="(default: the recipe's)")
    args = parser.parse_args(argv)

    ds = open_dataset(args.dataset, args.data_dir, args.split, args.val)
    if args.modality:
        ds = ds.only(args.modality)
    elif len(ds.modalities) < 2:
        raise DataError(f"{ds.name} has one modality: train it with --modality")
    recipe = {**RECIPE, **CHANGES.get(ds.name, SMALL)}
    scale = (args.epochs or recipe["epochs"]) / recipe["epochs"]
    recipe["lr_step"] = max(1, round(scale * recipe["lr_step"]))
    recipe.update({key: getattr(args, key) for key in recipe if getattr(args, key) is not None})
    for key, value in recipe.items():
        if not 0 < value < math.inf:
            raise DataError(f"--{key.replace('_', '-')} cannot be {value}")
    if not 0 <= args.seed < 2**32:
        raise DataError(f"--seed {args.seed} is not in 0 .. 2^32 - 1")

    variant = (f"only-{args.modality}" if args.modality else "ensemble" if args.ensemble else
               args.fusion if args.balance == "none" else args.balance)
    if recipe["encoder_lr_factor"] != RECIPE["encoder_lr_factor"]:
        variant += f".encoder{recipe['encoder_lr_factor']:g}"
    method = Path(__file__).stem                    # a copied file is a method of its own
    name = f"{method}.{variant}-{ds.name}-{ds.split}-seed{args.seed}"
    path = Path(os.path.expanduser(args.out)) / name
    config = dict(method=method, variant=variant, dataset=ds.name, split=ds.split, seed=args.seed,
                  val=args.val, amp=args.amp, recipe=recipe, data=ds.fingerprint)
    return args, ds, recipe, path, config


def main(argv=None):
    """Train what a command line asks for; returns the result, the dict that is written to JSON."""
    args, ds, recipe, path, config = plan(argv)
    r, n_classes = argparse.Namespace(**recipe), len(ds.classes)
    sizes = {part: len(ds.indices(part)) for part in ("train", "val", "test")}
    alone, n_epochs = bool(args.ensemble or args.modality), r.epochs

    # device, precision of the encoders (all else is float32), seeds
    device, dtype = pick_device(args.gpu, args.amp)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # for determinism of cuBLAS
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # saves time, changes no bit
    torch.manual_seed(args.seed)                                    # weights
    generator = torch.Generator().manual_seed(args.seed)            # order and augmentation

    # model and optimizer
    in_channels = {m: modality.in_channels for m, modality in ds.modalities.items()}
    model = Model(in_channels, n_classes, fusion=None if alone else args.fusion,
                  own_heads=alone or args.balance in ("auxiliary", "mmpareto")).to(device)
    if device.type == "cuda" or dtype == torch.bfloat16:   # slower for small float32 ones on a CPU
        model = model.to(memory_format=torch.channels_last)
    encoders = dict(zip(model.modalities, model.encoders))
    head_parameters = [p for name, p in model.named_parameters() if not name.startswith("encoders")]
    groups = [{"params": model.encoders.parameters(), "factor": r.encoder_lr_factor},
              {"params": head_parameters, "factor": 1.0}]
    optimizer = torch.optim.SGD(groups, r.lr, momentum=0.9, weight_decay=1e-4,
                                fused=dtype != torch.float16)   # fp16: wrong if step 1 overflows

    with claim(path):       # no other run of this name meanwhile
        if result := finished(path, config):
            print(f"{path}.json is finished: nothing to train")
            print_table(result, COMPARE)
            return result

        # from the start, or on from a checkpoint
        ds.check(r.batch_size)
        log = []            # a record an epoch
        if state := half_done(path, config, n_epochs, args.resume, device):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            generator.set_state(state["generator"].cpu())
            log = state["log"]
        where = "on the device" if ds.resident(device) else "in memory maps"
        print(f"{path.name}: {sizes} items {where}, {n_classes} classes; {dtype} on {device}; "
              f"{n_epochs} epochs, {len(log) or 'none'} done before", flush=True)

        # ---- training --------------------------------------------------------------------------
        noise = torch.Generator(device)                         # of GE
        for epoch in range(len(log), r.epochs):
            start = time.time()
            lr = r.lr * 0.1 ** (epoch // r.lr_step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            if args.balance == "ogm_ge":                        # other noise in each epoch
                noise.manual_seed(int(torch.randint(2**62, (), generator=generator)))

            # one pass over the training items
            model.train()
            batches = ds.batches("train", r.batch_size, device, augment=True, generator=generator)
            total, watched = 0.0, []                            # of the epoch's steps
            for inputs, y, _ in tqdm(batches, leave=False, disable=None, unit="batch"):
                with amp:
                    z = model.features(inputs)                  # {m: (B, 512)}

                # losses: one for all; in some rows one for each modality too, or instead
                loss = {}
                own_loss = {m: F.cross_entropy(o, y) for m, o in model.own_logits(z).items()}
                if args.balance == "dgl":
                    # the head is trained on features that feel nothing of it, each encoder through
                    # its part of a head that does not move
                    loss["joint"] = F.cross_entropy(model.fusion({m: z[m].detach() for m in z}), y)
                    head = model.fusion.out
                    halves = half_head_logits(z, head.weight.detach(), head.bias.detach())
                    own_loss = {m: F.cross_entropy(o, y) for m, o in halves.items()}
                elif not alone:
                    loss["joint"] = F.cross_entropy(model.fusion(z), y)
                terms = [*loss.values(), *own_loss.values()]

                # gradients
                optimizer.zero_grad(set_to_none=True)
                if args.balance != "mmpareto":
                    scaler.scale(sum(terms)).backward()
                else:
                    watch = []
                    for m, encoder in encoders.items():
                        weights = list(encoder.parameters())
                        both = (torch.autograd.grad(scaler.scale(term), weights, retain_graph=True)
                                for term in (loss["joint"], own_loss[m]))
                        grads, cosine_and_weight = pareto_gradient(*both)
                        watch.append(cosine_and_weight)
                        for weight, grad in zip(weights, grads):
                            weight.grad = grad
                    scaler.scale(sum(terms)).backward(inputs=head_parameters)
                    watched.append(torch.stack(watch))                      # (M, 2)
                if args.balance == "ogm_ge":
                    head, rows = model.fusion.out, torch.arange(len(y), device=device)
                    with torch.no_grad():
                        halves = half_head_logits(z, head.weight, head.bias / len(z))
                    score = {m: o.softmax(1)[rows, y].sum() for m, o in halves.items()}
                    coefficient = ogm_coefficients(score, r.ogm_alpha)
                    if epoch >= r.epochs / 2:       # its code modulates the first half alone
                        coefficient = {m: torch.ones_like(k) for m, k in coefficient.items()}
                    else:
                        convolutions = ((m, weight) for m, encoder in encoders.items()
                                        for weight in encoder.parameters() if weight.ndim == 4)
                        for m, weight in convolutions:
                            weight.grad = ogm_ge_gradient(weight.grad, coefficient[m], noise)
                    watch = [torch.stack([score[m] / len(y), coefficient[m]]) for m in z]
                    watched.append(torch.stack(watch))                      # (M, 2)
                scaler.step(optimizer)
                scaler.update()
                total = total + torch.stack(terms).detach()     # no step waits for its value
            mean = (total / len(batches)).tolist()
            speed = len(batches) * r.batch_size / (time.time() - start)
            if not math.isfinite(sum(mean)):
                raise FloatingPointError(f"epoch {epoch + 1}: loss {mean}: lower --lr or --amp off")

            # evaluation; the test scores are recorded, and nothing is ever chosen by them
            record = dict(stage="alone" if alone else "joint", epoch=epoch, lr=lr,
                          loss=dict(zip(loss, mean)),
                          modality_loss=dict(zip(own_loss, mean[len(loss):])))
            if args.balance in ("ogm_ge", "mmpareto"):          # means over the epoch
                names = dict(ogm_ge=("score", "coefficient"), mmpareto=("cosine", "weight"))
                means = torch.stack(watched).nanmean(0).tolist()    # a step float16 skips is nan
                record["balance"] = {m: dict(zip(names[args.balance], row))
                                     for m, row in zip(encoders, means)}
            for part in ("val", "test"):
                record[part] = {}
                if sizes[part]:
                    z, y = features_of(part, model, ds, device, amp, r.batch_size)
                    record[part] = {group: {head: scores(o, y) for head, o in logits.items()}
                                    for group, logits in model.logits(z).items()}
            log.append({**record, "seconds": time.time() - start, "items_per_second": speed})

            # checkpoint, whole or not at all: what the next epoch, and a reader, depends on
            state = dict(config=config, log=log, model=model.state_dict(),
                         optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                         generator=generator.get_state(), **ds.description)
            with whole_file(f"{path}.pt") as file:
                torch.save(state, file)
            val = [f"{head} {100 * score['accuracy']:.1f}"
                   for group in record["val"].values() for head, score in group.items()]
            left = (n_epochs - len(log)) * log[-1]["seconds"]
            print(f"epoch {epoch + 1}/{n_epochs} | loss", *(f"{x:.3f}" for x in mean),
                  "| val", *val, f"| {speed:.0f} items/s, {left:.0f} s left", flush=True)

        # ---- result ------------------------------------------------------------------------------
        z_train, y_train = features_of("train", model, ds, device, amp, r.batch_size)
        z, y = features_of("test", model, ds, device, amp, r.batch_size)
        with torch.no_grad():
            groups = model.logits(z)
        probes = {m: probe(z_train[m], y_train, z[m], y) for m in z}
        result = dict(
            schema=2, **config, precision=str(dtype).removeprefix("torch."), answer=model.answer,
            command=[Path(__file__).name, *(sys.argv[1:] if argv is None else argv)],
            **provenance(__file__, device), seconds=sum(e["seconds"] for e in log),
            **{f"n_{part}": n for part, n in sizes.items()}, classes=ds.classes,
            **{group: {head: summarise(log, group, head) for head in logits}
               for group, logits in groups.items()},
            probes={m: accuracy for m, (accuracy, _) in probes.items()},
            probe_failures={m: reason for m, (_, reason) in probes.items() if reason},
            test=dict(labels=y.tolist(), **{
                group: {head: dict(predictions=o.argmax(1).tolist(),
                                   confidence=o.softmax(1).amax(1).tolist())
                        for head, o in logits.items()} for group, logits in groups.items()}),
            epochs=log)
        with whole_file(f"{path}.json") as file:
            file.write(json.dumps(result).encode())
        print_table(result, COMPARE)
        print(f"written to {path}.json")
        return result


if __name__ == "__main__":
    with exit_codes(Path(__file__).name):
        main()
