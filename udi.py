"""UDI: Unidirectional Dynamic Interaction (Wang et al., 2025, arXiv 2509.02281), reconstructed.

Joint training lets modalities compete for one loss. UDI has none: one modality, the anchor, is
trained alone to convergence and frozen; then it guides the others, the followers, one way:

    stage 1   encoder -> z_m -> head_m -> CE            each modality alone; the best is the anchor

    stage 2   the anchor, frozen -> z_a -> o_a
                                     |      |           alpha JS(o_a, o_f)    consistency
                                     |      |           beta  I(z_a; z_f)     complement, minimised
              follower encoder   -> z_f -> o_f -> CE
    answer    the mean of all heads' logits

    python udi.py                                                   # the embedded set
    python udi.py --dataset ave --gpu 0
    python udi.py --dataset ave --anchor audio --interaction 0 0    # unguided: the plain ensemble

No code is public. From the paper, as far as we know it: all of the above; the divergence is
Jensen-Shannon's (Eq. 4); both weights lie in [0, 1] and follow the alignment of gradients on each
mini-batch; the anchor has the best validation accuracy, a near tie goes to the lower entropy. How
each gap is filled is ours: U1 to U11 in results/DEVIATIONS.md; the code below names most of them.
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

# ---- recipe: ours, on the optimiser and lengths of the DI-MML code. Each entry is also a flag ----
RECIPE = dict(
    epochs=150,                 # of each stage (U1); with --epochs, lr_step scales along
    batch_size=16,
    lr=1e-3,                    # of SGD with momentum 0.9 and weight decay 1e-4
    lr_step=70,                 # lr x 0.1 every so many epochs of a stage
    variance=0.1,               # s^2 of CLUB's Gaussian (U3)
    temperature=0.5,            # of the interaction weights (U4)
    interaction=None,           # fixed weights (alpha, beta) in place of dynamic ones
    complement="club",          # or cka, which is ours
    follower_init="scratch",    # or stage1 (U5)
    patience=0,                 # ends a stage after so many epochs without a rise in validation
)                               # accuracy, counted from the last drop of the rate; 0: never
CHOICES = {"complement": ["club", "cka"], "follower_init": ["scratch", "stage1"]}
CHANGES = {"cremad": {}, "ave": {}, "ucf101": {}, "modelnet40": {},     # {}: RECIPE as it is
           "avletters": dict(epochs=40, lr=0.01, lr_step=32)}       # ours
SMALL = dict(epochs=15, lr=3e-3, lr_step=12)        # ours, for any other dataset
SMOOTHING = 0.9                 # of the cosines behind the interaction weights
COMPARE = "Compare with python joint_baseline.py, and with its --ensemble."


# ---- the method ----------------------------------------------------------------------------------
def choose_anchor(accuracy, entropy, tolerance):
    """The most accurate modality; of those within `tolerance` of it, that of lowest entropy.

    {m: validation accuracy}, {m: mean predictive entropy in nats}, float -> name.
    """
    near = [m for m in accuracy if accuracy[m] >= max(accuracy.values()) - tolerance]
    return min(near, key=entropy.__getitem__)


def consistency_loss(anchor_logits, follower_logits):
    """Jensen-Shannon divergence of the outputs, in nats (Eq. 4): (B, C), (B, C) -> scalar.

    JS(p, q) = KL(p | m) / 2 + KL(q | m) / 2, m = (p + q) / 2: from 0 to ln 2, mean over the batch.
    The anchor is detached. From log-probabilities, so that it is finite for any logits.
    """
    p, q = anchor_logits.detach().log_softmax(1), follower_logits.log_softmax(1)
    m = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - m) + q.exp() * (q - m)).sum(1) / 2).mean()


def complementary_loss(anchor_features, follower_features, variance):
    """CLUB's upper bound of I(z_f; z_a), q(z_f | z_a) = N(z_a, s^2 I): two (B, D) -> scalar (U3).

        ( mean_ij |f_i - a_j|^2 - mean_i |f_i - a_i|^2 ) / (2 s^2)
            = ( mean_i <f_i, a_i> - <mean_i f_i, mean_j a_j> ) / s^2    (Cheng et al., ICML 2020)
    on L2-normalised features, the anchor's detached: the trace of the cross-covariance. Minimised,
    it drives matching dimensions apart, which does not make the features independent.
    """
    a, f = F.normalize(anchor_features.detach(), dim=1), F.normalize(follower_features, dim=1)
    return ((f * a).sum(1).mean() - f.mean(0) @ a.mean(0)) / variance


def linear_cka(anchor_features, follower_features):
    """Linear CKA, a dependence in [0, 1] (Kornblith et al., ICML 2019): (B, D), (B, D) -> scalar.

    <K, L> / (|K| |L|), the Gram matrices of the centred features; the anchor is detached. Ours.
    """
    a, f = anchor_features.detach(), follower_features
    k, l = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (a, f))
    return (k * l).sum() / (k.norm() * l.norm() + 1e-12)


def alignment(task_grad, consistency_grad, complementary_grad):
    """Cosines of the task's gradient with the others, over the mini-batch: three (B, D) -> (2,)."""
    others = torch.stack([consistency_grad.flatten(), complementary_grad.flatten()])
    return F.cosine_similarity(task_grad.flatten()[None], others, eps=1e-12)    # 0 for zeros


def interaction_weights(task_grad, consistency_grad, complementary_grad, temperature):
    """(alpha, beta) = softmax of the cosines / T (smoothed in `main`): three (B, D) -> (2,)."""
    return (alignment(task_grad, consistency_grad, complementary_grad) / temperature).softmax(0)


def choose(log, n_val):
    """The anchor, by stage 1's last scores; near (U2) is within a standard error of the best."""
    last = {e["modality"]: e["val"]["modality_heads"][e["modality"]] for e in log
            if e["stage"] == "alone"}       # a resumed log may hold guided epochs too
    accuracy = {m: score["accuracy"] for m, score in last.items()}
    entropy = {m: score["entropy"] for m, score in last.items()}
    best = max(accuracy.values())
    tolerance = math.sqrt(best * (1 - best) / n_val)
    return dict(anchor=choose_anchor(accuracy, entropy, tolerance), accuracy=accuracy,
                entropy=entropy, tolerance=tolerance)


def converged(accuracy, r):
    """Whether validation accuracy did not rise for `patience` epochs since the rate's last drop."""
    since = accuracy[(r.epochs - 1) // r.lr_step * r.lr_step:]
    return len(since) > r.patience and max(since[-r.patience:]) <= max(since[:-r.patience])


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


class UDI(nn.Module):
    """An encoder and a head a modality, no more than the ensemble has; z = {m: (B, 512)}."""

    answer = "fused"        # the head that is the method's answer

    def __init__(self, in_channels, n_classes, dim=512):
        super().__init__()
        self.modalities = list(in_channels)     # a ModuleDict would refuse a name like "forward"
        self.encoders = nn.ModuleList(Encoder(channels) for channels in in_channels.values())
        self.heads = nn.ModuleList(nn.Linear(dim, n_classes) for _ in in_channels)
        self.register_buffer("cosines", torch.zeros(len(in_channels), 2))   # of followers, smoothed

    def features(self, inputs):
        """{m: (B, T, C, H, W)} of some modalities -> z = {m: (B, 512)}."""
        encoders = zip(self.modalities, self.encoders)
        return {m: encoder(inputs[m]) for m, encoder in encoders if m in inputs}

    def own_logits(self, z):
        return {m: head(z[m]) for m, head in zip(self.modalities, self.heads) if m in z}

    def logits(self, z):
        """z -> {group: {head: (B, C)}}: two groups, as a modality may be called "fused" too."""
        own = self.own_logits(z)
        fused = torch.stack(list(own.values())).mean(0)         # (U7)
        return {"heads": {"fused": fused}, "modality_heads": own}


# ---- evaluation: the features of a part, computed once, serve all heads and the probe ------------
@torch.no_grad()
def features_of(part, model, ds, device, amp, batch_size):
    """Features of a whole part, eval mode, not augmented: {m: (N, 512)}, labels (N,). Modalities
    that `ds.only` left out are left out here."""
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
    at that of `best_test` accuracy, as published code chooses: optimistic, to compare only.
    Only epochs of the stage that trained it last count: a follower's guided stage, not stage 1."""
    log = [e for e in log if head in e["test"][group]]
    stage = log[-1]["stage"], log[-1]["modality"]
    log = [e for e in log if (e["stage"], e["modality"]) == stage]
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
    add("--anchor", help="this modality, not the one that validation items choose")
    add("--interaction", nargs=2, type=float, metavar=("ALPHA", "BETA"), help="fixed weights")
    for key, value in RECIPE.items():
        if value is not None:
            add(f"--{key.replace('_', '-')}", type=type(value), choices=CHOICES.get(key),
                help="(default: the recipe's)")
    args = parser.parse_args(argv)

    ds = open_dataset(args.dataset, args.data_dir, args.split, args.val)
    if len(ds.modalities) < 2:
        raise DataError(f"{ds.name} has one modality: joint_baseline.py --modality trains it")
    if args.anchor:
        ds.only(args.anchor)                        # raises DataError if there is no such modality
    elif not len(ds.indices("val")):
        raise DataError(f"no validation items to choose the anchor by ({ds.why_no_val}): give "
                        "--anchor NAME")
    recipe = {**RECIPE, **CHANGES.get(ds.name, SMALL)}
    scale = (args.epochs or recipe["epochs"]) / recipe["epochs"]
    recipe["lr_step"] = max(1, round(scale * recipe["lr_step"]))
    recipe.update({key: getattr(args, key) for key in recipe if getattr(args, key) is not None})
    for key in ("epochs", "batch_size", "lr", "lr_step", "variance", "temperature"):
        if not 0 < recipe[key] < math.inf:
            raise DataError(f"--{key.replace('_', '-')} cannot be {recipe[key]}")
    if recipe["patience"] and not len(ds.indices("val")):
        raise DataError(f"--patience needs validation items ({ds.why_no_val})")
    if recipe["patience"] < 0 or not all(0 <= w < math.inf for w in recipe["interaction"] or ()):
        raise DataError("--patience and --interaction cannot be negative")
    if not 0 <= args.seed < 2**32:
        raise DataError(f"--seed {args.seed} is not in 0 .. 2^32 - 1")

    variant = ".".join(filter(None, [
        args.anchor and f"anchor-{args.anchor}",
        recipe["interaction"] and "interaction{:g}-{:g}".format(*recipe["interaction"]),
        *(recipe[key] for key in CHOICES if recipe[key] != RECIPE[key]),
        recipe["patience"] and f"patience{recipe['patience']}"]))
    method = Path(__file__).stem                    # a copied file is a method of its own
    name = f"{method}{'.' * bool(variant)}{variant}"
    path = Path(os.path.expanduser(args.out)) / f"{name}-{ds.name}-{ds.split}-seed{args.seed}"
    config = dict(method=method, variant=variant, dataset=ds.name, split=ds.split, seed=args.seed,
                  val=args.val, amp=args.amp, recipe=recipe, data=ds.fingerprint)
    return args, ds, recipe, path, config


def main(argv=None):
    """Train what a command line asks for; returns the result, the dict that is written to JSON."""
    args, ds, recipe, path, config = plan(argv)
    r, n_classes = argparse.Namespace(**recipe), len(ds.classes)
    sizes = {part: len(ds.indices(part)) for part in ("train", "val", "test")}
    # stage 1 trains each modality alone; where the anchor is named, only those that are needed
    alone = [m for m in ds.modalities if args.anchor in (None, m) or r.follower_init == "stage1"]
    n_epochs = (len(alone) + len(ds.modalities) - 1) * r.epochs

    # device, precision of the encoders (all else is float32), seeds
    device, dtype = pick_device(args.gpu, args.amp)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # for determinism of cuBLAS
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # saves time, changes no bit
    torch.manual_seed(args.seed)                                    # weights
    generator = torch.Generator().manual_seed(args.seed)            # order and augmentation

    # model; one optimizer serves all stages, as SGD passes over parameters without a gradient
    in_channels = {m: modality.in_channels for m, modality in ds.modalities.items()}
    model = UDI(in_channels, n_classes).to(device)
    if device.type == "cuda" or dtype == torch.bfloat16:   # slower for small float32 ones on a CPU
        model = model.to(memory_format=torch.channels_last)
    encoders, heads = (dict(zip(model.modalities, part)) for part in (model.encoders, model.heads))
    optimizer = torch.optim.SGD(model.parameters(), r.lr, momentum=0.9, weight_decay=1e-4,
                                fused=dtype != torch.float16)   # fp16: wrong if step 1 overflows
    fixed = None if r.interaction is None else torch.tensor(r.interaction, device=device)

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

        # ---- training: stage 1, the choice of the anchor, stage 2 ------------------------------
        choice = dict(anchor=args.anchor)
        stages = [("alone", m) for m in alone]
        for number in range(n_epochs // r.epochs):
            if number == len(alone):
                if choice["anchor"] is None:
                    choice = choose(log, sizes["val"])
                    print(f"the anchor is {choice['anchor']}", flush=True)
                stages += [("guided", m) for m in ds.modalities if m != choice["anchor"]]
            stage, m = stages[number]
            anchor = choice["anchor"] if stage == "guided" else None
            curve = [e for e in log if (e["stage"], e["modality"]) == (stage, m)]       # done of it
            if len(curve) == r.epochs:
                continue

            # at its beginning: momentum from zero; a follower from scratch gets new weights
            if not curve:
                optimizer.state.clear()
                if stage == "guided" and r.follower_init == "scratch":
                    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
                    encoders[m].load_state_dict(Encoder(in_channels[m]).state_dict())
                    heads[m].reset_parameters()

            # what is frozen is computed once: the logits that the follower's are averaged with, and
            # the anchor's features of all training items, unless they are augmented (U6)
            frozen, anchor_z, mine = dict(val={}, test={}), None, ds.only(m)
            seen = mine                         # what the steps of this stage load
            if stage == "guided":
                done = [anchor] + [name for s, name in stages[:number] if s == "guided"]
                for part in [part for part in frozen if sizes[part]]:
                    z, _ = features_of(part, model, ds.only(*done), device, amp, r.batch_size)
                    frozen[part] = {name: o.detach() for name, o in model.own_logits(z).items()}
                if ds.modalities[anchor].kind in ("audio", "spectrogram"):
                    z, _ = features_of("train", model, ds.only(anchor), device, amp, r.batch_size)
                    anchor_z = z[anchor].new_full((len(ds.labels), z[anchor].shape[1]), torch.nan)
                    anchor_z[torch.from_numpy(ds.indices("train")).to(device)] = z[anchor]
                else:
                    seen = ds.only(*(name for name in ds.modalities if name in (anchor, m)))

            for epoch in range(len(curve), r.epochs):
                if r.patience and converged([e["val"]["modality_heads"][m]["accuracy"]
                                             for e in curve], r):
                    break
                start = time.time()
                lr = r.lr * 0.1 ** (epoch // r.lr_step)
                optimizer.param_groups[0]["lr"] = lr
                cosines = model.cosines[model.modalities.index(m)]

                # one pass over the training items
                model.eval()                    # what is frozen stays as it is, BatchNorm too
                encoders[m].train()
                batches = seen.batches("train", r.batch_size, device, True, generator)
                total = 0.0
                for inputs, y, index in tqdm(batches, leave=False, disable=None, unit="batch"):
                    with amp:
                        z = encoders[m](inputs[m])                          # (B, 512)
                    logits = heads[m](z)
                    terms = [F.cross_entropy(logits, y)]
                    if stage == "guided":
                        with torch.no_grad(), amp:
                            z_a = (encoders[anchor](inputs[anchor]) if anchor_z is None
                                   else anchor_z[index])
                        consistency = consistency_loss(heads[anchor](z_a), logits)
                        complement = (linear_cka(z_a, z) if r.complement == "cka"
                                      else complementary_loss(z_a, z, r.variance))
                        # the more a term's gradient agrees with the task's, the more it counts: U4
                        grads = [torch.autograd.grad(term, z, retain_graph=True)[0]
                                 for term in (terms[0], consistency, complement)]
                        cosines.lerp_(alignment(*grads), 1 - SMOOTHING)
                        weights = (cosines / r.temperature).softmax(0) if fixed is None else fixed
                        terms += [weights[0] * consistency, weights[1] * complement]
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(sum(terms)).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    total = total + torch.stack(terms).detach()     # no step waits for its value
                mean = (total / len(batches)).tolist()
                speed = len(batches) * r.batch_size / (time.time() - start)
                if not math.isfinite(sum(mean)):
                    raise FloatingPointError(f"{stage} {m}, epoch {epoch + 1}: loss {mean}: lower "
                                             "--lr or --amp off")

                # evaluation; the test scores are recorded, and nothing is ever chosen by them
                record = dict(stage=stage, modality=m, epoch=epoch, lr=lr,
                              loss=dict(zip(("consistency", "complement"), mean[1:])),
                              modality_loss={m: mean[0]})
                if stage == "guided":           # as they stand at the epoch's end
                    names = ("alpha", "beta", "cos_consistency", "cos_complement")
                    record["interaction"] = dict(zip(names, weights.tolist() + cosines.tolist()))
                for part in ("val", "test"):
                    record[part] = {}
                    if sizes[part]:
                        z, y = features_of(part, model, mine, device, amp, r.batch_size)
                        own = model.own_logits(z)[m]
                        record[part] = dict(heads={}, modality_heads={m: scores(own, y)})
                        if stage == "guided":
                            fused = torch.stack([*frozen[part].values(), own]).mean(0)
                            record[part]["heads"]["fused"] = scores(fused, y)
                log.append({**record, "seconds": time.time() - start, "items_per_second": speed})
                curve.append(log[-1])

                # checkpoint, whole or not at all: what the next epoch, and a reader, depends on
                state = dict(config=config, log=log, model=model.state_dict(),
                             optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                             generator=generator.get_state(), **ds.description)
                with whole_file(f"{path}.pt") as file:
                    torch.save(state, file)
                val = [f"{head} {100 * score['accuracy']:.1f}"
                       for group in record["val"].values() for head, score in group.items()]
                left = (n_epochs - len(log)) * log[-1]["seconds"]
                print(f"{stage} {m} {epoch + 1}/{r.epochs} | loss", *(f"{x:.3f}" for x in mean),
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
            choice=choice,
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
