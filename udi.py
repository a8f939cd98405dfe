"""UDI: Unidirectional Dynamic Interaction (Wang et al., 2025, arXiv 2509.02281). A reconstruction: no
code is public.

Joint training lets modalities compete for one loss. UDI has none: one modality, the anchor, is trained
alone to convergence and frozen; it then guides each other one, a follower, in one direction:

    stage 1   encoder -> z_m -> head_m -> CE        each modality alone; the best becomes the anchor

    stage 2   anchor, frozen    -> z_a -> o_a
                                    |      |        alpha * JS(o_a, o_f)    consistency
                                    |      |        beta  * I(z_f; z_a)     complement, minimised
              follower encoder  -> z_f -> o_f -> CE
    answer    the mean of all heads' logits

    python udi.py                                                   # the embedded set
    python udi.py --dataset ave --gpu 0
    python udi.py --dataset ave --anchor audio --interaction 0 0    # unguided: the plain ensemble

From the paper, as far as it is known to us: no joint loss; the anchor is trained to convergence, frozen,
and guides in one direction; a consistency term, the Jensen-Shannon divergence of the outputs (its Eq. 4);
a complementary term, a bound on the mutual information of the features; both weights in [0, 1], set on
each mini-batch by the alignment of gradients; the anchor has the best validation accuracy, a near tie
going to the lower predictive entropy; no parameter is added, and inference costs nothing more.
Our reading of the rest (numbered as in results/DEVIATIONS.md, with what each changes):
    U1  converged: the whole schedule, as every other method's encoder has it
    U2  a near tie: within one standard error of the best accuracy, sqrt(p (1 - p) / n_val)
    U3  the bound: CLUB with a fixed Gaussian on L2-normalised features (`complementary_loss`)
    U4  the weights: softmax of the terms' cosines with the task's gradient, smoothed (`alignment`)
    U5  a follower starts from scratch, or from its stage 1 with --follower-init stage1
    U6  an anchor that is not augmented (sound) is evaluated once; pictures in the follower's own view
    U7  inference: the mean of the logits
    U9  more than two modalities: the anchor guides one after another; followers do not see each other
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # two runs side by side: idle threads must not spin

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
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

from data import (DataError, claim, differences, exit_codes, finished, open_dataset, provenance,
                  read_checkpoint, whole_file)

# ---- recipe: ours, with the optimiser and lengths of the DI-MML code. Every entry is also a flag --
RECIPE = dict(
    epochs=150,                 # of each stage; with --epochs, lr_step scales along
    batch_size=16,
    lr=1e-3,                    # of SGD with momentum 0.9 and weight decay 1e-4
    lr_step=70,                 # lr x 0.1 every so many epochs of a stage
    variance=0.1,               # s^2 of CLUB's Gaussian
    temperature=0.5,            # of the interaction weights
    interaction=None,           # fixed weights (alpha, beta) in place of dynamic ones
    complement="club",          # or cka, which is ours
    follower_init="scratch",    # or stage1
    patience=0,                 # end a stage after so many epochs without a rise in validation accuracy
)                               # since the last drop of the rate; 0: never
CHOICES = {"complement": ["club", "cka"], "follower_init": ["scratch", "stage1"]}
CHANGES = {"cremad": {}, "ave": {}, "ucf101": {}, "modelnet40": {}}
SMALL = dict(epochs=15, lr=3e-3, lr_step=12)        # ours, for any other dataset
SMOOTHING = 0.9                 # of the cosines behind the interaction weights


# ---- the method ----------------------------------------------------------------------------------
def choose_anchor(accuracy, entropy, tolerance):
    """The modality of highest validation accuracy; of those within `tolerance` of it, that of lowest entropy.

    {m: accuracy in [0, 1]}, {m: mean predictive entropy in nats}, float -> name. Equal ones: the first named.
    """
    near = [m for m in accuracy if accuracy[m] >= max(accuracy.values()) - tolerance]
    return min(near, key=entropy.__getitem__)


def consistency_loss(anchor_logits, follower_logits):
    """Jensen-Shannon divergence of the two outputs in nats, mean over the batch: (B, C), (B, C) -> scalar (Eq. 4).

    JS(p, q) = KL(p | m) / 2 + KL(q | m) / 2, m = (p + q) / 2, between 0 and ln 2. The anchor is detached. From
    log-probabilities, so that it is finite for any logits.
    """
    p, q = anchor_logits.detach().log_softmax(1), follower_logits.log_softmax(1)
    m = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - m) + q.exp() * (q - m)).sum(1) / 2).mean()


def complementary_loss(anchor_features, follower_features, variance):
    """CLUB's upper bound of I(z_f; z_a) with q(z_f | z_a) = N(z_a, s^2 I): (B, D), (B, D), s^2 -> scalar in [-2/s^2, 2/s^2].

        ( mean_ij |f_i - a_j|^2 - mean_i |f_i - a_i|^2 ) / (2 s^2) = ( mean_i <f_i, a_i> - <mean_i f_i, mean_j a_j> ) / s^2
    on L2-normalised features, the anchor's detached. So it is the trace of the cross-covariance: minimised, it drives
    matching dimensions apart, which is not the same as making the features independent.
    """
    a, f = F.normalize(anchor_features.detach(), dim=1), F.normalize(follower_features, dim=1)
    return ((f * a).sum(1).mean() - f.mean(0) @ a.mean(0)) / variance


def linear_cka(anchor_features, follower_features):
    """Linear CKA, a measure of dependence in [0, 1] (Kornblith et al., ICML 2019): (B, D), (B, D) -> scalar.

    <K, L> / (|K| |L|) with the Gram matrices K, L of the centred features; the anchor is detached. Ours, not the paper's.
    """
    a, f = anchor_features.detach(), follower_features
    k, l = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (a, f))
    return (k * l).sum() / (k.norm() * l.norm() + 1e-12)


def alignment(task_grad, consistency_grad, complementary_grad):
    """Cosines of the task's gradient with the two others, over the whole mini-batch: three (B, D) -> (2,); 0 for zeros."""
    others = torch.stack([consistency_grad.flatten(), complementary_grad.flatten()])
    return F.cosine_similarity(task_grad.flatten()[None], others, eps=1e-12)


def interaction_weights(task_grad, consistency_grad, complementary_grad, temperature):
    """(alpha, beta) = softmax([cos(g_task, g_con), cos(g_task, g_com)] / T): three (B, D) gradients at z_f -> (2,)."""
    return (alignment(task_grad, consistency_grad, complementary_grad) / temperature).softmax(0)


# ---- the model -----------------------------------------------------------------------------------
class Encoder(ResNet):
    """ResNet-18 from scratch for any modality: (B, T, C, H, W) -> (B, 512), mean over time and space."""

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
        return reduce(x.float(), "(b t) d h w -> b d", "mean", b=batch)     # float32 under autocast too


class UDI(nn.Module):
    """An encoder and a head a modality, as in the plain ensemble; z = {m: (B, 512)} are features."""

    answer = "fused"        # the head that is the method's answer

    def __init__(self, in_channels, n_classes, dim=512):
        super().__init__()
        self.modalities = list(in_channels)     # a list beside ModuleLists: a name can be any word
        self.encoders = nn.ModuleList(Encoder(channels) for channels in in_channels.values())
        self.heads = nn.ModuleList(nn.Linear(dim, n_classes) for _ in in_channels)
        self.register_buffer("cosines", torch.zeros(len(in_channels), 2))      # smoothed, a row a follower

    def features(self, inputs):
        """{m: (B, T, C, H, W)} of some modalities -> z = {m: (B, 512)}."""
        return {m: encoder(inputs[m]) for m, encoder in zip(self.modalities, self.encoders) if m in inputs}

    def own_logits(self, z):
        return {m: head(z[m]) for m, head in zip(self.modalities, self.heads) if m in z}

    def logits(self, z):
        """z -> logits (B, C) of our heads by our names, and of the modalities' own by theirs."""
        own = self.own_logits(z)
        return {"fused": torch.stack(list(own.values())).mean(0)}, own


# ---- evaluation: all heads read features, so the features of a part are all that is needed of it -
@torch.no_grad()
def features_of(part, model, ds, device, amp, batch_size):
    """Features of a whole part, eval mode, not augmented: {m: (N, 512)}, labels (N,).
    Of the modalities in `ds`, which may be some of the model's."""
    model.eval()
    z, labels = [], []
    for inputs, y, _ in ds.batches(part, max(64, batch_size), device):
        with amp:
            z.append(model.features(inputs))
        labels.append(y)
    return {m: torch.cat([batch[m] for batch in z]) for m in z[0]}, torch.cat(labels)


def scores(logits, y):
    """(N, C), (N,) -> accuracy, macro-F1 over the classes in y, mean predictive entropy in nats."""
    log_p, predicted = logits.log_softmax(1), logits.argmax(1)
    macro_f1 = f1_score(y.cpu(), predicted.cpu(), labels=y.unique().cpu(), average="macro")
    return dict(accuracy=(predicted == y).double().mean().item(), macro_f1=float(macro_f1),
                entropy=-(log_p.exp() * log_p).sum(1).mean().item())


def summarise(log, group, head):
    """A head's test scores under three rules: at the `last` epoch (quote this one), at the epoch of
    `best_val` accuracy, and at that of `best_test` accuracy, as published code chooses: optimistic."""
    log = [epoch for epoch in log if head in epoch["test"][group]]
    log = [epoch for epoch in log if (epoch["stage"], epoch["modality"]) == (log[-1]["stage"], log[-1]["modality"])]
    chosen = {"last": log[-1]}
    for part in ("val", "test"):
        if log[-1][part]:
            chosen[f"best_{part}"] = max(log, key=lambda epoch: epoch[part][group][head]["accuracy"])
    return {rule: {**epoch["test"][group][head], "stage": epoch["stage"], "epoch": epoch["epoch"]}
            for rule, epoch in chosen.items()}


def probe(z, y, z_test, y_test):
    """What an encoder has learned: test accuracy of a logistic regression on its frozen features.
    Where none can be fitted: None and the reason, since that must not lose the run."""
    try:
        linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        return linear.fit(z.cpu(), y.cpu()).score(z_test.cpu(), y_test.cpu()), None
    except ValueError as error:
        return None, str(error)


def print_table(result):
    print(f"\n{'test, %':24}{'last':>8}{'best val':>10}{'best test':>11}{'macro-F1':>10}{'probe':>8}")
    rows = [(head + (" (the answer)" if head == result["answer"] else ""), rules, None)
            for head, rules in result["heads"].items()]
    rows += [(f"encoder of {m}", result["modality_heads"].get(m, {}), accuracy)
             for m, accuracy in result["probes"].items()]
    for name, rules, accuracy in rows:
        cells = [rules.get(rule, {}).get("accuracy") for rule in ("last", "best_val", "best_test")]
        cells += [rules.get("last", {}).get("macro_f1"), accuracy]
        print(f"{name:24}" + "".join(("-" if cell is None else f"{100 * cell:.1f}").rjust(width)
                                     for cell, width in zip(cells, (8, 10, 11, 10, 8))))
    print("last: the number to quote; best test: chosen on the test set, as published code does")


# ---- a run ---------------------------------------------------------------------------------------
def plan(argv=None):
    """What a command line asks for: args, dataset, recipe, the run's path (less its suffix) and its
    config. Two runs of the same config are the same run; nothing else knows a run's name."""
    parser = argparse.ArgumentParser("udi.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dataset", default="synthetic", help="a name under --data-dir, or a prepared folder's path")
    add("--data-dir", default="datasets")
    add("--split", help="one of the dataset's splits (default: its first)")
    add("--val", type=float, default=0.1, help="share of train to hold out, if there is no val part")
    add("--seed", type=int, default=0)
    add("--gpu", type=int, help="GPU number (default: the first GPU; without any, the CPU)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="of the encoders")
    add("--out", default="runs", help="folder of checkpoint and result")
    add("--resume", action="store_true", help="go on after the last whole epoch")
    add("--anchor", help="this modality, not the one that validation items choose")
    add("--interaction", nargs=2, type=float, metavar=("ALPHA", "BETA"), help="fixed weights")
    for key, value in RECIPE.items():
        if key != "interaction":
            add(f"--{key.replace('_', '-')}", type=type(value), choices=CHOICES.get(key), help="(default: the recipe's)")
    args = parser.parse_args(argv)

    ds = open_dataset(args.dataset, args.data_dir, args.split, args.val)
    if len(ds.modalities) < 2:
        raise DataError(f"UDI needs two modalities, {ds.name} has one: joint_baseline.py trains it alone")
    if args.anchor:
        ds.only(args.anchor)                        # raises DataError if there is no such modality
    elif not len(ds.indices("val")):
        raise DataError(f"no validation items to choose the anchor by ({ds.why_no_val}): name it with --anchor")
    recipe = {**RECIPE, **CHANGES.get(ds.name, SMALL)}
    scale = (args.epochs or recipe["epochs"]) / recipe["epochs"]
    recipe["lr_step"] = max(1, round(scale * recipe["lr_step"]))
    recipe.update({key: getattr(args, key) for key in recipe if getattr(args, key) is not None})
    for key in ("epochs", "batch_size", "lr", "lr_step", "variance", "temperature"):
        if not 0 < recipe[key] < math.inf:
            raise DataError(f"--{key.replace('_', '-')} cannot be {recipe[key]}")
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
    path = Path(args.out).expanduser() / f"{name}-{ds.name}-{ds.split}-seed{args.seed}"
    config = dict(method=method, variant=variant, dataset=ds.name, split=ds.split, seed=args.seed,
                  val=args.val, amp=args.amp, recipe=recipe, data=ds.fingerprint)
    return args, ds, recipe, path, config


def main(argv=None):
    """Train what a command line asks for; returns the result, the dict that is written to JSON."""
    args, ds, recipe, path, config = plan(argv)
    r, n_classes = argparse.Namespace(**recipe), len(ds.classes)
    sizes = {part: len(ds.indices(part)) for part in ("train", "val", "test")}

    # the stages: each modality alone (an anchor that is named needs no rival, unless that is where the
    # followers start), then each follower
    alone = [m for m in ds.modalities if args.anchor in (None, m) or r.follower_init == "stage1"]
    stages = [*(("alone", m) for m in alone), *(("guided", number) for number in range(len(ds.modalities) - 1))]
    n_epochs = len(stages) * r.epochs

    # device, precision (of the encoders; all else is float32), seeds
    if args.gpu is not None and not 0 <= args.gpu < torch.cuda.device_count():
        raise DataError(f"--gpu {args.gpu}: this machine has {torch.cuda.device_count()} GPUs")
    device = torch.device(f"cuda:{args.gpu or 0}" if torch.cuda.is_available() else "cpu")
    precision = args.amp
    if precision == "auto" and device.type == "cuda":           # before Ampere bfloat16 is emulated
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision, torch.float32)
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
    if device.type == "cuda" or dtype == torch.bfloat16:        # small float32 pictures lose by it
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), r.lr, momentum=0.9, weight_decay=1e-4,
                                fused=dtype != torch.float16)   # wrong after an overflow in step 1

    encoders, heads = (dict(zip(model.modalities, part)) for part in (model.encoders, model.heads))

    fixed = r.interaction and torch.tensor(r.interaction, device=device)

    with claim(path):                                           # no other run of this name meanwhile
        if result := finished(path, config):
            print(f"{path}.json is finished: nothing to train")
            print_table(result)
            return result

        # a checkpoint to go on from
        log = []                                                # a record an epoch
        if state := read_checkpoint(f"{path}.pt", device):
            if state["config"] != config:
                raise DataError(f"{path}.pt was made with another "
                                f"{', '.join(differences(state['config'], config))}: choose another --out")
            log = state["log"]
            if len(log) < n_epochs and not args.resume:
                raise DataError(f"{path}.pt is at epoch {len(log)} of {n_epochs}: --resume goes on, "
                                "another --out starts anew")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            generator.set_state(state["generator"].cpu())
        ds.check(r.batch_size)
        print(f"{path.name}: {', '.join(f'{n} {part}' for part, n in sizes.items())} items of {n_classes} "
              f"classes; {device}, {str(dtype).removeprefix('torch.')}; "
              + (f"goes on after epoch {len(log)} of {n_epochs}" if log else
                 f"{n_epochs} epochs" + ", nothing to resume" * args.resume), flush=True)

        # ---- training: stage 1, the choice of the anchor, stage 2 --------------------------------
        anchor, choice = args.anchor, dict(anchor=args.anchor)
        for stage, m in stages:
            if stage == "guided" and anchor is None:
                last = {e["modality"]: e["val"]["modality_heads"][e["modality"]] for e in log if e["stage"] == "alone"}
                accuracy, entropy = ({m: s[key] for m, s in last.items()} for key in ("accuracy", "entropy"))
                best = max(accuracy.values())
                tolerance = math.sqrt(best * (1 - best) / sizes["val"])     # one standard error (U2)
                anchor = choose_anchor(accuracy, entropy, tolerance)
                choice = dict(anchor=anchor, accuracy=accuracy, entropy=entropy, tolerance=tolerance)
                print("validation: " + ", ".join(f"{m} {accuracy[m]:.1%} at {entropy[m]:.2f} nats" for m in last)
                      + f"; a near tie is within {tolerance:.1%}; anchor: {anchor}", flush=True)
            if stage == "guided":
                m = [name for name in ds.modalities if name != anchor][m]
            seen = [e for e in log if (e["stage"], e["modality"]) == (stage, m)]

            # a stage begins: a follower from scratch gets new weights; momentum starts from zero
            if not seen:
                optimizer.state.clear()
                if stage == "guided" and r.follower_init == "scratch":
                    torch.manual_seed(args.seed + 1 + model.modalities.index(m))
                    encoders[m].load_state_dict(Encoder(in_channels[m]).state_dict())
                    heads[m].reset_parameters()

            # what is frozen is computed once: logits to average with, and the anchor's features of
            # all training items if it is not augmented (U6)
            frozen, anchor_outputs, used = {"val": {}, "test": {}}, None, ds
            if stage == "guided":
                done = [anchor, *{e["modality"]: 0 for e in log if e["stage"] == "guided" and e["modality"] != m}]
                for part in frozen:
                    if sizes[part]:
                        z, _ = features_of(part, model, ds.only(*done), device, amp, r.batch_size)
                        with torch.no_grad():
                            frozen[part] = model.own_logits(z)
                if ds.modalities[anchor].kind in ("audio", "spectrogram"):
                    z, _ = features_of("train", model, ds.only(anchor), device, amp, r.batch_size)
                    rows = torch.from_numpy(ds.indices("train")).to(device)
                    anchor_outputs = z[anchor].new_full((len(ds.labels), z[anchor].shape[1]), torch.nan).index_copy_(0, rows, z[anchor])

            for epoch in range(len(seen), r.epochs):
                if r.patience and converged(seen, m, r):
                    break
                start = time.time()
                lr = r.lr * 0.1 ** (epoch // r.lr_step)
                optimizer.param_groups[0]["lr"] = lr

                # one pass over the training items
                model.eval()                                    # nothing frozen moves, BatchNorm included
                encoders[m].train()
                cosines = model.cosines[model.modalities.index(m)]
                batches = used.batches("train", r.batch_size, device, augment=True, generator=generator)
                total = 0.0
                for inputs, y, index in tqdm(batches, leave=False, disable=None, unit="batch"):
                    with amp:
                        z = encoders[m](inputs[m])                          # (B, 512)
                    logits = heads[m](z)
                    loss, own_loss = {}, {m: F.cross_entropy(logits, y)}
                    if stage == "guided":
                        with torch.no_grad():
                            if anchor_outputs is not None:
                                z_anchor = anchor_outputs[index]
                            else:
                                with amp:
                                    z_anchor = encoders[anchor](inputs[anchor])
                            logits_anchor = heads[anchor](z_anchor)
                        consistency = consistency_loss(logits_anchor, logits)
                        complement = (linear_cka(z_anchor, z) if r.complement == "cka" else
                                      complementary_loss(z_anchor, z, r.variance))
                        # do they pull z_f where the task does? (these gradients pass through the head alone)
                        new = alignment(*(torch.autograd.grad(term, z, retain_graph=True)[0]
                                          for term in (own_loss[m], consistency, complement)))
                        cosines.lerp_(new, 1 - SMOOTHING)
                        alpha, beta = (cosines / r.temperature).softmax(0) if fixed is None else fixed
                        loss = {"consistency": alpha * consistency, "complement": beta * complement}
                    terms = [*own_loss.values(), *loss.values()]
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(sum(terms)).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    total = total + torch.stack(terms).detach()     # no step waits for its value
                mean = (total / len(batches)).tolist()
                speed = len(batches) * r.batch_size / (time.time() - start)

                # evaluation; the test scores are recorded, and nothing is ever chosen by them
                record = dict(stage=stage, modality=m, epoch=epoch, lr=lr,
                              loss=dict(zip(loss, mean[1:])), modality_loss={m: mean[0]})
                if stage == "guided":
                    record["interaction"] = dict(zip(("alpha", "beta", "cos_consistency", "cos_complement"),
                                                     [float(alpha), float(beta), *cosines.tolist()]))
                for part in ("val", "test"):
                    record[part] = {}
                    if sizes[part]:
                        z, y = features_of(part, model, ds.only(m), device, amp, r.batch_size)
                        with torch.no_grad():
                            own = model.own_logits(z)
                        record[part] = dict(heads={}, modality_heads={m: scores(own[m], y)})
                        if stage == "guided":
                            fused = torch.stack([*frozen[part].values(), own[m]]).mean(0)
                            record[part]["heads"]["fused"] = scores(fused, y)
                if not math.isfinite(sum(mean) + record["test"]["modality_heads"][m]["entropy"]):
                    raise FloatingPointError(f"{stage} {m}, epoch {epoch + 1}: a loss or an output is not "
                                             f"finite, losses {mean}; lower --lr, or --amp off")
                record.update(seconds=time.time() - start, items_per_second=speed)
                log.append(record)
                seen.append(record)
                print(f"{stage} {m} {epoch + 1}/{r.epochs} | loss", *(f"{value:.3f}" for value in mean), "| val",
                      *(f"{head} {100 * s['accuracy']:.1f}" for group in record["val"].values()
                        for head, s in group.items()), f"| {speed:.0f} items/s, "
                      f"{(n_epochs - len(log)) * record['seconds']:.0f} s left", flush=True)

                # checkpoint, whole or not at all: what the next epoch, and a reader, depends on
                state = dict(config=config, log=log, model=model.state_dict(),
                             optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                             generator=generator.get_state(), **ds.description)
                with whole_file(f"{path}.pt") as file:
                    torch.save(state, file)

        # ---- result ----------------------------------------------------------------------------
        z_train, y_train = features_of("train", model, ds, device, amp, r.batch_size)
        z, y = features_of("test", model, ds, device, amp, r.batch_size)
        with torch.no_grad():
            groups = dict(zip(("heads", "modality_heads"), model.logits(z)))
        probes = {m: probe(z_train[m], y_train, z[m], y) for m in z}
        result = dict(
            schema=2, **config, precision=str(dtype).removeprefix("torch."), answer=model.answer,
            command=[Path(__file__).name, *(sys.argv[1:] if argv is None else argv)],
            **provenance(__file__, device),
            seconds=sum(epoch["seconds"] for epoch in log),
            **{f"n_{part}": size for part, size in sizes.items()}, classes=ds.classes,
            **{group: {head: summarise(log, group, head) for head in heads}
               for group, heads in groups.items()},
            probes={m: accuracy for m, (accuracy, _) in probes.items()},
            probe_failures={m: why for m, (_, why) in probes.items() if why},
            choice=choice,
            test=dict(labels=y.tolist(), **{
                group: {head: dict(predictions=o.argmax(1).tolist(),
                                   confidence=o.softmax(1).amax(1).tolist())
                        for head, o in heads.items()} for group, heads in groups.items()}),
            epochs=log)
        with whole_file(f"{path}.json") as file:
            file.write(json.dumps(result).encode())
        print_table(result)
        print(f"written to {path}.json")
        return result


if __name__ == "__main__":
    with exit_codes("udi.py"):
        main()
