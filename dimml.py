"""DI-MML: Detached and Interactive Multimodal Learning (Fan et al., ACM MM 2024, arXiv 2407.19514).

Train modalities with one joint loss, and the one that learns faster silences the others. DI-MML
gives every encoder a loss of its own (detached) and lets them meet in three other places
(interactive):

    encoder -> z_a --+--> own head_a  -> CE     stage 1: all of this, and no joint loss;
                |    +--> shared head -> CE              DUC from the end of the warm-up
    DUC: strong to weak dimensions              stage 2: encoders frozen, fusion head [z_a, z_v]
                |    +--> shared head -> CE     answer:  own and fusion heads, by certainty
    encoder -> z_v --+--> own head_v  -> CE

    python dimml.py                                 # the embedded set, about a minute
    python dimml.py --dataset ave --gpu 0           # the recipe of the published code
    python dimml.py --dataset ave --gpu 0 --resume  # goes on after the last whole epoch

Read it top to bottom: recipe, method, model, evaluation, `plan` (what a command line asks for) and
`main`, one flat loop. Where it departs from the published code, and why: results/DEVIATIONS.md.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: spinning threads slow other runs

import argparse
import json
import math
import sys
import time
from itertools import permutations
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
    tau=50.0,               # temperature of DUC
    temperature=1.0,        # of the certainty weights at inference
)
CHANGES = {"cremad": {}, "ave": dict(tau=10.0, temperature=3.0), "ucf101": dict(tau=10.0),
           "modelnet40": dict(temperature=3.0),
           "avletters": dict(epochs=40, fusion_epochs=5, warmup=13, lr=0.01, lr_step=32)}   # ours
SMALL = dict(epochs=15, fusion_epochs=5, warmup=5, lr=3e-3, lr_step=12)     # ours, for any other
COMPARE = "Compare with python joint_baseline.py, and with its --ensemble."


# ---- the method ----------------------------------------------------------------------------------
def dimension_accuracy(z, labels, n_classes):
    """How well each single dimension tells the classes apart: (N, D), (N,) -> (D,) in [0, 1].

    e_d = mean_i [ argmin_c |z_id - mu_cd| = y_i ],  mu_cd = mean of z_d over class c   (sec. 3.3)
    """
    mu = torch.stack([z[labels == c].mean(0) for c in range(n_classes)])    # (C, D)
    mu = mu.nan_to_num(nan=torch.inf)       # a class without items is nobody's nearest
    hits = [(z_i[:, None] - mu).abs().argmin(1) == y_i[:, None]             # (n, C, D) -> (n, D)
            for z_i, y_i in zip(z.split(256), labels.split(256))]       # at once too large
    return torch.cat(hits).double().mean(0)


def effective_dimensions(z, labels, n_classes):
    """E = {d : e_d > mean of all e}: (N, D), (N,) -> (D,) bool. Where all are equal, none is."""
    accuracy = dimension_accuracy(z, labels, n_classes)
    return accuracy > accuracy.mean() + 1e-9


def duc_loss(z, effective, tau):
    """Dimension-decoupled unidirectional contrastive loss: {m: (B, D)}, {m: (D,) bool} -> scalar.

    For each ordered pair of a teacher t and a student s, on the dimensions where t is effective and
    s is not, an item's student features must find its teacher features in the batch (sec. 3.3):
        L_ts = -mean_i log softmax_j( <z_s,i , z_t,j> / tau )[i]
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
    """sum_k w_k o_k, w = softmax_k(c_k / T), c_k = max softmax(o_k): K times (B, C) -> (B, C)."""
    logits = torch.stack(list(logits))                                      # (K, B, C)
    certainty = logits.softmax(-1).amax(-1, keepdim=True)                   # (K, B, 1)
    return ((certainty / temperature).softmax(0) * logits).sum(0)


# ---- the model -----------------------------------------------------------------------------------
class Encoder(ResNet):
    """ResNet-18 from scratch: (B, T, C, H, W) -> (B, 512), the mean over time and space."""

    def __init__(self, in_channels):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)       # as in the published code
        del self.avgpool, self.fc   # a plain mean: adaptive pooling is not deterministic on CUDA

    def forward(self, x):
        batch = len(x)
        x = rearrange(x, "b t c h w -> (b t) c h w")            # each frame by itself
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return reduce(x.float(), "(b t) d h w -> b d", "mean", b=batch)     # float32 even with amp


class DIMML(nn.Module):
    """Encoders and heads for M >= 2 modalities; z = {m: (B, 512)} are their features."""

    answer = "fused"        # the head that is the method's answer

    def __init__(self, in_channels, n_classes, dim=512):
        super().__init__()
        self.modalities = list(in_channels)     # a ModuleDict would refuse a name like "forward"
        self.encoders = nn.ModuleList(Encoder(channels) for channels in in_channels.values())
        self.heads = nn.ModuleList(nn.Linear(dim, n_classes) for _ in in_channels)
        self.shared_head = nn.Linear(dim, n_classes)
        self.fusion_head = nn.Linear(dim * len(in_channels), n_classes)
        self.register_buffer("effective", torch.zeros(len(in_channels), dim, dtype=torch.bool))

    def features(self, inputs):
        """{m: (B, T, C, H, W)} -> z = {m: (B, 512)}."""
        return {m: encoder(inputs[m]) for m, encoder in zip(self.modalities, self.encoders)}

    def own_logits(self, z):
        return {m: head(z[m]) for m, head in zip(self.modalities, self.heads)}

    def fusion_logits(self, z):
        return self.fusion_head(torch.cat(list(z.values()), 1))

    def logits(self, z, stage, temperature):
        """z -> {group: {head: (B, C)}}: two groups, as a modality may be called "fused" too."""
        own = self.own_logits(z)
        if stage == "detached":                                 # the fusion head is not trained yet
            return {"heads": {}, "modality_heads": own}
        every = [*own.values(), self.fusion_logits(z)]      # the shared head only trains
        return {"heads": {
            "fused": certainty_weighted_logits(every, temperature),
            "fusion": every[-1],
            "own": torch.stack(every[:-1]).mean(0),             # control: without the fusion head
            "unweighted": torch.stack(every).mean(0),           # control: without the weights
        }, "modality_heads": own}


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
    log = [e for e in log if head in e["test"][group]]      # the fusion head comes with stage 2
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
    for key, value in RECIPE.items():
        add(f"--{key.replace('_', '-')}", type=type(value), help="(default: the recipe's)")
    args = parser.parse_args(argv)

    ds = open_dataset(args.dataset, args.data_dir, args.split, args.val)
    if len(ds.modalities) < 2:
        raise DataError(f"{ds.name} has one modality: joint_baseline.py --modality trains it")
    recipe = {**RECIPE, **CHANGES.get(ds.name, SMALL)}
    scale = (args.epochs or recipe["epochs"]) / recipe["epochs"]
    recipe["warmup"] = round(scale * recipe["warmup"])
    recipe["lr_step"] = max(1, round(scale * recipe["lr_step"]))
    recipe.update({key: getattr(args, key) for key in recipe if getattr(args, key) is not None})
    for key, value in recipe.items():
        may_be_0 = key in ("warmup", "shared_weight", "duc_weight")
        if not (0 < value < math.inf or value == 0 and may_be_0):
            raise DataError(f"--{key.replace('_', '-')} cannot be {value}")
    if recipe["duc_weight"] and recipe["warmup"] >= recipe["epochs"]:
        raise DataError(f"--warmup {recipe['warmup']} of {recipe['epochs']} epochs: DUC would not "
                        "start; a shorter one, or --duc-weight 0")
    if not 0 <= args.seed < 2**32:
        raise DataError(f"--seed {args.seed} is not in 0 .. 2^32 - 1")

    ablated = {"duc_weight": "duc", "shared_weight": "shared"}
    variant = ".".join(f"{word}{recipe[key]:g}" for key, word in ablated.items()
                       if recipe[key] != RECIPE[key])
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
    n_epochs = r.epochs + r.fusion_epochs

    # device, precision of the encoders (all else is float32), seeds
    device, dtype = pick_device(args.gpu, args.amp)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # for determinism of cuBLAS
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # saves time, changes no bit
    torch.manual_seed(args.seed)                                    # weights
    generator = torch.Generator().manual_seed(args.seed)            # order and augmentation

    # model; one optimizer serves both stages, as SGD passes over parameters without a gradient
    in_channels = {m: modality.in_channels for m, modality in ds.modalities.items()}
    model = DIMML(in_channels, n_classes).to(device)
    if device.type == "cuda" or dtype == torch.bfloat16:   # slower for small float32 ones on a CPU
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), r.lr, momentum=0.9, weight_decay=1e-4,
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

        # ---- training: r.epochs of stage 1, then r.fusion_epochs of stage 2 ---------------------
        evaluated = {}      # {part: (z, y)}, its features and labels
        for epoch in range(len(log), n_epochs):
            start = time.time()
            stage = "detached" if epoch < r.epochs else "fusion"
            lr = r.lr * 0.1 ** (epoch // r.lr_step) if stage == "detached" else r.lr
            optimizer.param_groups[0]["lr"] = lr

            # once, after the warm-up: on which dimensions is each modality effective?
            if epoch == r.warmup:
                z, y = features_of("train", model, ds, device, amp, r.batch_size)
                found = [effective_dimensions(z[m], y, n_classes) for m in model.modalities]
                model.effective.copy_(torch.stack(found))
            effective = dict(zip(model.modalities, model.effective))        # {m: (512,) bool}

            # one pass over the training items
            model.train(stage == "detached")                    # stage 2 freezes BatchNorm too
            batches = ds.batches("train", r.batch_size, device, augment=True, generator=generator)
            total = 0.0
            for inputs, y, _ in tqdm(batches, leave=False, disable=None, unit="batch"):
                with amp, torch.set_grad_enabled(stage == "detached"):
                    z = model.features(inputs)                  # {m: (B, 512)}
                loss, own_loss = {}, {}
                if stage == "detached":                         # no joint loss, anywhere
                    own_loss = {m: F.cross_entropy(o, y) for m, o in model.own_logits(z).items()}
                    shared = [F.cross_entropy(model.shared_head(z_m), y) for z_m in z.values()]
                    loss["shared"] = r.shared_weight * sum(shared)
                    if epoch >= r.warmup and r.duc_weight:
                        loss["duc"] = r.duc_weight * duc_loss(z, effective, r.tau)
                else:
                    loss["fusion"] = F.cross_entropy(model.fusion_logits(z), y)
                terms = [*own_loss.values(), *loss.values()]
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(sum(terms)).backward()
                scaler.step(optimizer)
                scaler.update()
                total = total + torch.stack(terms).detach()     # no step waits for its value
            mean = (total / len(batches)).tolist()
            speed = len(batches) * r.batch_size / (time.time() - start)
            if not math.isfinite(sum(mean)):
                raise FloatingPointError(f"epoch {epoch + 1}: loss {mean}: lower --lr or --amp off")

            # evaluation; the test scores are recorded, and nothing is ever chosen by them
            record = dict(stage=stage, epoch=epoch - r.epochs * (stage == "fusion"), lr=lr,
                          loss=dict(zip(loss, mean[len(own_loss):])),
                          modality_loss=dict(zip(own_loss, mean)))
            for part in ("val", "test"):
                record[part] = {}
                if sizes[part]:
                    if stage == "detached" or part not in evaluated:    # stage 2 changes none
                        evaluated[part] = features_of(part, model, ds, device, amp, r.batch_size)
                    z, y = evaluated[part]
                    groups = model.logits(z, stage, r.temperature)
                    record[part] = {group: {head: scores(o, y) for head, o in logits.items()}
                                    for group, logits in groups.items()}
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
            print(f"{stage} {epoch + 1}/{n_epochs} | loss", *(f"{x:.3f}" for x in mean),
                  "| val", *val, f"| {speed:.0f} items/s, {left:.0f} s left", flush=True)

        # ---- result ------------------------------------------------------------------------------
        z_train, y_train = features_of("train", model, ds, device, amp, r.batch_size)
        if "test" not in evaluated:         # all was trained before a resume
            evaluated["test"] = features_of("test", model, ds, device, amp, r.batch_size)
        z, y = evaluated["test"]
        with torch.no_grad():
            groups = model.logits(z, "fusion", r.temperature)
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
            effective={m: dims.nonzero().flatten().tolist()
                       for m, dims in zip(model.modalities, model.effective)},
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
