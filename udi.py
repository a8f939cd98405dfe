"""UDI: Unidirectional Dynamic Interaction (Wang et al., 2025; arXiv 2509.02281). A reconstruction: no code is public.

Joint training lets modalities compete for one loss. UDI has none: one modality, the anchor, is trained alone to
convergence and frozen; it then guides each other one, a follower, in one direction through two unsupervised losses
whose weights adjust themselves to the task.

From the paper (its abstract and what is said of it):
  - no joint loss; the anchor is trained to convergence, frozen, and guides the follower in one direction
  - a consistency term, the Jensen-Shannon divergence between the two outputs (its Eq. 4)
  - a complementary term, a bound on the mutual information between the two features
  - a "dynamic aware mechanism" sets both weights, in [0, 1], from gradient alignment on each mini-batch
  - the anchor has the best validation accuracy; a near tie goes to the lower mean predictive entropy
  - no parameter is added, and inference costs nothing more
Our reading of the rest, numbered as in results/DEVIATIONS.md:
  U1  converged: validation accuracy has not risen for `patience` epochs, or the recipe's epochs are over
  U2  a near tie: within one standard error of the best validation accuracy, sqrt(p (1 - p) / n_val)
  U3  the bound: CLUB with a fixed Gaussian q(z_f | z_a) = N(z_a, s^2 I) on L2-normalised features, s^2 = 0.1
  U4  the weights: softmax over T = 0.5 of both terms' cosines with the task's gradient at z_f, smoothed and detached
  U5  a follower starts from scratch, or from its own stage 1 with --follower-init stage1
  U6  an anchor that is not augmented (sound, spectrograms) is evaluated once, exactly; pictures at each step, in the
      view that the follower's item has, which costs one forward pass a step
  U7  inference: the mean of the logits of all heads
  U8  encoder, optimiser and lengths of training: those of the DI-MML code, as in the other scripts
  U9  more than two modalities: the anchor guides each other one in turn; followers do not see each other

    python udi.py                                                    # the embedded synthetic set
    python udi.py --dataset ave --gpu 0
    python udi.py --dataset ave --anchor audio --interaction 0 0     # unguided: the plain ensemble

Results: runs/*.json, one a run; the README says what has been measured.
"""

import argparse
import json
import math
import statistics
import time
from contextlib import ExitStack

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

from data import DataError, checkpoint, cli, open_dataset, processes, whole_file

# ---------------------------------------------------------------------------------------------------------- recipes
# Ours throughout: the optimiser and lengths of the DI-MML code, so that all scripts spend the same on an encoder (SGD
# with momentum 0.9 and weight decay 1e-4); `default` is for small data. A flag overrides its entry.
PUBLISHED = dict(epochs=150, batch_size=16, lr=1e-3, lr_step=70, patience=30, variance=0.1, temperature=0.5,
                 interaction=None, complement="club", follower_init="scratch")
RECIPES = {
    "cremad": PUBLISHED, "ave": PUBLISHED, "ucf101": PUBLISHED, "modelnet40": PUBLISHED,
    "default": dict(PUBLISHED, epochs=15, lr=3e-3, lr_step=12, patience=10),
}
SMOOTHING = 0.9     # of the cosines behind the interaction weights


# ------------------------------------------------------------ shared with the other two scripts: encoder {{{
class Encoder(ResNet):
    """ResNet-18 from scratch for any modality: (B, T, C, H, W) -> (B, 512), the mean over time and space.

    Initialised as in the published code: convolutions kaiming-normal by fan-out, BatchNorm weights from N(1, 0.02).
    """

    def __init__(self, in_channels):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
        del self.avgpool, self.fc      # a plain mean: adaptive pooling has no deterministic backward on CUDA

    def forward(self, x):
        batch = len(x)
        x = rearrange(x, "b t c h w -> (b t) c h w")
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return processes.gather(reduce(x.float(), "(b t) d h w -> b d", "mean", b=batch))
# }}} shared


# ----------------------------------------------------------------------------------------------------- the method
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
    p, q = anchor_logits.detach().float().log_softmax(1), follower_logits.float().log_softmax(1)
    m = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - m) + q.exp() * (q - m)).sum(1) / 2).mean()


def complementary_loss(anchor_features, follower_features, variance):
    """CLUB's upper bound of I(z_f; z_a) with q(z_f | z_a) = N(z_a, s^2 I): (B, D), (B, D), s^2 -> scalar in [-2/s^2, 2/s^2].

        ( mean_ij |f_i - a_j|^2 - mean_i |f_i - a_i|^2 ) / (2 s^2) = ( mean_i <f_i, a_i> - <mean_i f_i, mean_j a_j> ) / s^2
    on L2-normalised features, the anchor's detached. So it is the trace of the cross-covariance: minimised, it drives
    matching dimensions apart, which is not the same as making the features independent.
    """
    a, f = F.normalize(anchor_features.detach().float(), dim=1), F.normalize(follower_features.float(), dim=1)
    return ((f * a).sum(1).mean() - f.mean(0) @ a.mean(0)) / variance


def linear_cka(anchor_features, follower_features):
    """Linear CKA, a measure of dependence in [0, 1] (Kornblith et al., ICML 2019): (B, D), (B, D) -> scalar.

    <K, L> / (|K| |L|) with the Gram matrices K, L of the centred features; the anchor is detached. Ours, not the paper's.
    """
    a, f = anchor_features.detach().float(), follower_features.float()
    k, l = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (a, f))
    return (k * l).sum() / (k.norm() * l.norm() + 1e-12)


def alignment(task_grad, consistency_grad, complementary_grad):
    """Cosines of the task's gradient with the two others, over the whole mini-batch: three (B, D) -> (2,); 0 for zeros."""
    others = torch.stack([consistency_grad.flatten(), complementary_grad.flatten()]).float()
    return F.cosine_similarity(task_grad.flatten().float()[None], others, eps=1e-12)


def interaction_weights(task_grad, consistency_grad, complementary_grad, temperature):
    """(alpha, beta) = softmax([cos(g_task, g_con), cos(g_task, g_com)] / T): three (B, D) gradients at z_f -> (2,)."""
    return (alignment(task_grad, consistency_grad, complementary_grad) / temperature).softmax(0)


class UDI(nn.Module):
    """An encoder and a head a modality, as in the plain ensemble; inputs {m: (B, T, C, H, W)} -> {m: (B, C), "fused"}."""

    def __init__(self, in_channels, n_classes, dim=512):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Encoder(channels) for m, channels in in_channels.items()})
        self.heads = nn.ModuleDict({m: nn.Linear(dim, n_classes) for m in in_channels})
        for m in in_channels:          # the smoothed cosines: a buffer, so that a checkpoint carries them
            self.register_buffer(f"cosines_{m}", torch.zeros(2))

    def forward(self, inputs):
        logits = {m: head(self.encoders[m](inputs[m])) for m, head in self.heads.items()}
        logits["fused"] = torch.stack(list(logits.values())).float().mean(0)
        return logits

    def train_only(self, m):
        """Training mode for one modality; no other's BatchNorm statistics may move."""
        self.eval()
        self.encoders[m].train()


def converged(records, stage, head, patience):
    """Whether a stage's validation accuracy has not risen for `patience` epochs. Without validation items: never."""
    curve = [record["val"][head]["accuracy"] for record in records if record["stage"] == stage and record["val"]]
    return len(curve) > 0 and len(curve) - 1 - curve.index(max(curve)) >= patience


def train_alone(run, model, m):
    """Stage 1 for one modality: CE(h_m(z_m), y) until it converges."""
    stage, optimizer = f"alone {m}", run.optimizer([*model.encoders[m].parameters(), *model.heads[m].parameters()])
    for _ in run.epochs(stage, run.recipe["epochs"], optimizer, run.recipe["lr_step"]):
        if converged(run.records, stage, stage, run.recipe["patience"]):
            break
        model.train_only(m)
        run.train_epoch(lambda inputs, labels, _: {m: F.cross_entropy(model.heads[m](model.encoders[m](inputs[m])), labels)},
                        optimizer)
        run.evaluate(lambda inputs: {stage: model.heads[m](model.encoders[m](inputs[m]))})


def guide(run, model, anchor, follower):
    """Stage 2 for one follower: L = CE(h_f(z_f), y) + alpha L_con + beta L_com, the anchor frozen."""
    recipe, stage, smoothed = run.recipe, f"guided {follower}", getattr(model, f"cosines_{follower}")
    if recipe["follower_init"] == "scratch" and not (run.history or any(record["stage"] == stage for record in run.records)):
        torch.manual_seed(run.config["seed"] + 1 + list(model.encoders).index(follower))
        model.encoders[follower].load_state_dict(Encoder(run.ds.modalities[follower].in_channels).state_dict())
        model.heads[follower].reset_parameters()

    @torch.no_grad()
    def anchor_outputs(inputs):
        features = model.encoders[anchor](inputs[anchor])
        return {"features": features, "logits": model.heads[anchor](features)}

    once = {}
    if run.ds.modalities[anchor].kind in ("audio", "spectrogram"):        # not augmented: the same for ever (U6)
        rows = torch.from_numpy(run.ds.indices("train")).to(run.device)
        for name, output in run.collect(anchor_outputs, "train")[0].items():
            once[name] = output.new_full((len(run.ds.labels), output.shape[1]), torch.nan).index_copy_(0, rows, output)

    fixed = recipe["interaction"] and torch.tensor(recipe["interaction"], device=run.device)

    def weights():
        return (smoothed / recipe["temperature"]).softmax(0) if fixed is None else fixed

    def losses(inputs, labels, index):
        frozen = {name: output[index] for name, output in once.items()} or anchor_outputs(inputs)
        features = model.encoders[follower](inputs[follower])
        with torch.autocast(run.device.type, enabled=False):
            logits = model.heads[follower](features)
            task, consistency = F.cross_entropy(logits, labels), consistency_loss(frozen["logits"], logits)
            complement = (linear_cka(frozen["features"], features) if recipe["complement"] == "cka" else
                          complementary_loss(frozen["features"], features, recipe["variance"]))
            # the gradients at z_f pass through the head alone, not through the encoder
            cosines = alignment(*(torch.autograd.grad(loss, features, retain_graph=True)[0]
                                  for loss in (task, consistency, complement)))
        smoothed.lerp_(cosines, 1 - SMOOTHING)
        alpha, beta = weights()
        return {follower: task, "consistency": alpha * consistency, "complement": beta * complement}

    optimizer = run.optimizer([*model.encoders[follower].parameters(), *model.heads[follower].parameters()])
    for _ in run.epochs(stage, recipe["epochs"], optimizer, recipe["lr_step"]):
        if converged(run.records, stage, follower, recipe["patience"]):
            break
        model.train_only(follower)
        run.train_epoch(losses, optimizer)
        run.record["interaction"] = dict(zip(("alpha", "beta", "cos_consistency", "cos_complement"),
                                             [*weights().tolist(), *smoothed.tolist()]))
        run.evaluate(model)


def train(run, anchor):
    """The whole method; `anchor` is a modality's name or None to choose it. Returns the result."""
    ds, recipe = run.ds, run.recipe
    if len(ds.modalities) < 2:
        raise DataError(f"UDI needs two modalities, {ds.name} has one: joint_baseline.py --modality trains it alone")
    if anchor is not None and anchor not in ds.modalities:
        raise DataError(f"--anchor {anchor}: {ds.name} has no such modality, it has {', '.join(ds.modalities)}")
    if anchor is None and not run.sizes["val"]:
        raise DataError("--val 0 leaves nothing to choose the anchor by: name it with --anchor")
    model = run.restore(UDI({m: mod.in_channels for m, mod in ds.modalities.items()}, len(ds.classes)))

    # Stage 1. With the anchor named, a modality that will start from scratch need not be trained here.
    for m in ds.modalities:
        if anchor in (None, m) or recipe["follower_init"] == "stage1":
            train_alone(run, model, m)
    choice = {"anchor": anchor}
    if anchor is None:
        last = {m: [r for r in run.records if r["stage"] == f"alone {m}"][-1]["val"][f"alone {m}"] for m in ds.modalities}
        accuracy, entropy = ({m: score[key] for m, score in last.items()} for key in ("accuracy", "entropy"))
        best = max(accuracy.values())
        tolerance = math.sqrt(best * (1 - best) / run.sizes["val"])          # one standard error (U2)
        anchor = choose_anchor(accuracy, entropy, tolerance)
        choice = {"anchor": anchor, "accuracy": accuracy, "entropy": entropy, "tolerance": tolerance}
        print("validation: " + ", ".join(f"{m} {accuracy[m]:.1%} at {entropy[m]:.2f} nats" for m in last)
              + f"; a near tie is within {tolerance:.1%}; anchor: {anchor}", flush=True)

    # Stage 2. The anchor is frozen and guides the others, one after another.
    for m in ds.modalities:
        if m != anchor:
            guide(run, model, anchor, m)
    return run.finish(model, model.encoders, choice=choice)


# ------------------------------------------------------------ shared with the other two scripts: a run {{{
class Run(ExitStack):
    """All around the method: data, device, precision, processes, checkpoints, result. Used as `with Run(...) as run`.

    A stage is a loop over `epochs`, each with `train_epoch` on {name: loss} and `evaluate` on {head: logits}.
    """

    def __init__(self, args, recipes, method, variant=""):
        super().__init__()
        self.device, self.dtype, self.device_name = cli.pick_device(args.gpu, args.amp)
        self.ds = open_dataset(args.dataset, args.data_dir, args.split, args.val)
        if getattr(args, "modality", None):
            self.ds = self.ds.only(args.modality)
        self.recipe = cli.settle_recipe(args, recipes.get(self.ds.name, recipes["default"]))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False    # else each new tensor is filled before use
        torch.manual_seed(args.seed)                                # weights
        self.generator = torch.Generator().manual_seed(args.seed)   # order and augmentation
        self.sizes = {part: len(self.ds.indices(part)) for part in ("train", "val", "test")}
        self.config = {"method": method, "variant": variant, "dataset": self.ds.name, "split": self.ds.split,
                       "seed": args.seed, "val": args.val, "amp": str(self.dtype).removeprefix("torch."),
                       "processes": processes.count(), "recipe": self.recipe, "data": self.ds.fingerprint}
        label = f"{method}.{variant}" if variant else method
        self.path = f"{args.out}/{label}-{self.ds.name}-{self.ds.split}-seed{args.seed}"
        self.args, self.records, self.history = args, [], []       # epochs done; the losses of this epoch's steps
        self.checkpoint = checkpoint.matching(self.path, self.config, args.resume)
        self.made_with = cli.made_with(self.device_name, self.checkpoint)
        print(f"{label} on {self.ds.name}, split {self.ds.split}, seed {args.seed}: "
              + ", ".join(f"{size} {part}" for part, size in self.sizes.items())
              + f" items of {len(self.ds.classes)} classes; {self.device_name}, {self.config['amp']}, arrays "
              + ("on the device" if self.ds.resident(self.device) else "read from the memory map"), flush=True)
        self.enter_context(checkpoint.lock(self.path))
        self.interrupt = self.enter_context(cli.Interrupt())

    def restore(self, model):
        """The model on the device; when resuming, with the weights, records and random state of the checkpoint."""
        self.model = model.to(self.device)
        if self.device.type == "cuda" or self.dtype != torch.float32:    # pays with tensor cores only
            self.model = self.model.to(memory_format=torch.channels_last)
        if self.checkpoint:
            self.model.load_state_dict(self.checkpoint["model"])
            self.generator.set_state(self.checkpoint["generator"])
            self.scaler.load_state_dict(self.checkpoint["scaler"])
            self.records, self.history = self.checkpoint["records"], self.checkpoint["history"]
        self.drawn_from = self.generator.get_state()
        return self.model

    def optimizer(self, parameters):
        optimizer = torch.optim.SGD(parameters, self.recipe["lr"], momentum=0.9, weight_decay=1e-4, fused=True)
        for p in optimizer.param_groups[0]["params"]:      # else an overflow of float16 in the first step leaves it unwritten
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def epochs(self, stage, count, optimizer, lr_step):
        """Yield the epochs of a stage that are not done yet, with the learning rate set: x0.1 every `lr_step`."""
        if self.checkpoint and self.checkpoint["stage"] == stage:
            optimizer.load_state_dict(self.checkpoint["optimizer"])
        self.stage, self.stage_optimizer = stage, optimizer
        for epoch in range(sum(record["stage"] == stage for record in self.records), count):
            start = time.time()
            rate = self.recipe["lr"] * 0.1 ** (epoch // lr_step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            self.record = {"stage": stage, "epoch": epoch, "lr": rate}
            yield epoch
            self.record["seconds"] = time.time() - start
            self.records.append(self.record)
            self.history, self.drawn_from = [], self.generator.get_state()
            self.save()
            losses = " ".join(f"{name} {value:.3f}" for name, value in self.record["loss"].items())
            val = " ".join(f"{head} {100 * score['accuracy']:.1f}" for head, score in self.record["val"].items())
            print(f"{stage} {epoch + 1}/{count} | loss {losses} | val {val or '-'} | {self.record['items_per_second']:.0f} "
                  f"items/s, {(count - epoch - 1) * self.record['seconds']:.0f} s left", flush=True)

    def train_epoch(self, losses, optimizer):
        """One pass over the augmented training items, minimising the sum of `losses(inputs, labels, index)`.

        No step waits for the device: a loss that is not finite is found at the end, still before any checkpoint.
        """
        batches = self.ds.batches("train", self.recipe["batch_size"], self.device, True, self.generator, len(self.history))
        start, trained = time.time(), len(batches) * batches.batch_size
        for inputs, labels, index in tqdm(batches, disable=processes.rank() > 0 or None, leave=False, unit="batch"):
            with self.autocast():
                terms = losses(inputs, labels, index)
            optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(sum(terms.values())).backward()
            processes.average_gradients(optimizer)
            self.scaler.step(optimizer)
            self.scaler.update()
            self.history.append({name: term.detach().float() for name, term in terms.items()})
            self.stop_if_interrupted()
        processes.share_buffers(self.model)
        history = torch.stack([torch.stack(list(terms.values())).cpu() for terms in self.history])      # (steps, terms)
        for step, term in (~history.isfinite()).nonzero().tolist():
            raise FloatingPointError(f"loss {list(self.history[0])[term]!r} is {history[step, term]} in stage {self.stage}, "
                                     f"epoch {self.record['epoch']}, step {step}, items {batches.items(step)}: "
                                     "lower --lr or --amp off")
        self.record["loss"] = dict(zip(self.history[0], history.mean(0).tolist()))
        self.record["items_per_second"] = trained / (time.time() - start)

    @torch.no_grad()
    def collect(self, function, part):
        """`function(inputs)` -> {name: (B, ...)} over a whole part, eval mode, no augmentation: {name: (N, ...)}, labels."""
        self.model.eval()
        outputs, labels = [], []
        for inputs, y, _ in self.ds.batches(part, max(64, self.recipe["batch_size"]), self.device):
            with self.autocast():
                outputs.append({name: value.float() for name, value in function(inputs).items()})
            labels.append(y)
            self.stop_if_interrupted()
        n = self.sizes[part]            # without the copies that make a last batch divisible by the processes
        return {name: torch.cat([output[name] for output in outputs])[:n] for name in outputs[0]}, torch.cat(labels)[:n]

    def features(self, encoders, part):
        return self.collect(lambda inputs: {m: encoder(inputs[m]) for m, encoder in encoders.items()}, part)

    def evaluate(self, logits):
        """Score `logits(inputs)` on val and test. The test scores are recorded; nothing is ever chosen by them."""
        for part in ("val", "test"):
            outputs, labels = self.collect(logits, part) if self.sizes[part] else ({}, None)
            self.record[part] = {head: scores(output, labels) for head, output in outputs.items()}

    def save(self):
        """A checkpoint, at the end of an epoch or, with the losses of its first steps, within one."""
        if processes.rank() == 0:
            checkpoint.save(self.path, {
                "config": self.config, "made_with": self.made_with, "records": self.records, "history": self.history,
                "stage": self.stage, "model": self.model.state_dict(), "optimizer": self.stage_optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "generator": self.drawn_from})

    def stop_if_interrupted(self):
        if self.interrupt.asked:
            self.save()
            raise KeyboardInterrupt

    def finish(self, logits, encoders, **extra):
        """Probe the encoders, write <path>.json, print the table, return the result."""
        outputs, labels = self.collect(logits, "test")
        (train, train_y), (test, test_y) = self.features(encoders, "train"), self.features(encoders, "test")
        result = {
            "schema": 1, **self.config, "command": self.args.command,
            **self.made_with[0], "resumed_with": self.made_with[1:],
            "seconds": sum(record["seconds"] for record in self.records),
            "items_per_second": statistics.median(record["items_per_second"] for record in self.records),
            **{f"n_{part}": size for part, size in self.sizes.items()}, "classes": self.ds.classes,
            "heads": {head: summarise(self.records, head) for head in outputs},
            "probes": {m: probe(train[m], train_y, test[m], test_y) for m in encoders}, **extra,
            "test": {"labels": labels.tolist(), "predictions": {h: o.argmax(1).tolist() for h, o in outputs.items()},
                     "confidence": {h: [round(c, 4) for c in o.softmax(1).amax(1).tolist()] for h, o in outputs.items()}},
            "epochs": self.records,
        }
        if processes.rank() == 0:
            with whole_file(f"{self.path}.json") as file:
                file.write(json.dumps(result).encode() + b"\n")
        print_table(result)
        print(f"written to {self.path}.json")
        return result


def scores(logits, labels):
    """(N, C), (N,) -> accuracy and macro-F1 (the mean over classes) in [0, 1], mean predictive entropy in nats."""
    predicted, labels, log_p = logits.argmax(1).cpu(), labels.cpu(), logits.log_softmax(1)
    return {"accuracy": float(accuracy_score(labels, predicted)), "macro_f1": float(f1_score(labels, predicted, average="macro")),
            "entropy": -(log_p.exp() * log_p).sum(1).mean().item()}


def summarise(records, head):
    """A head's test scores under three rules: `last` epoch (the headline), `best_val` (the first epoch of highest
    validation accuracy), `best_test` (chosen on the test set, as published code does: an optimistic number)."""
    curve = [record for record in records if head in record["test"]]
    chosen = {"last": curve[-1]}
    for part in ("val", "test") if curve[-1]["val"] else ("test",):
        chosen[f"best_{part}"] = max(curve, key=lambda record: record[part][head]["accuracy"])
    return {rule: {**record["test"][head], "stage": record["stage"], "epoch": record["epoch"]}
            for rule, record in chosen.items()}


def probe(train_x, train_y, test_x, test_y):
    """What an encoder has learned: test accuracy of a logistic regression on its frozen, standardised features."""
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return linear.fit(train_x.cpu(), train_y.cpu()).score(test_x.cpu(), test_y.cpu())


def print_table(result):
    """Per head, test accuracy under the three rules and macro-F1; per encoder, its probe."""
    print(f"\n{'test accuracy in %':24}{'last':>9}{'best val':>10}{'best test':>11}{'macro-F1':>10}{'probe':>8}")
    for row in {**result["probes"], **result["heads"]}:
        rules = result["heads"].get(row, {})
        cells = [rules.get(rule, {}).get("accuracy") for rule in ("last", "best_val", "best_test")]
        cells += [rules.get("last", {}).get("macro_f1"), result["probes"].get(row)]
        print(f"  {row:22}" + "".join("-".rjust(width) if cell is None else f"{100 * cell:{width}.1f}"
                                      for cell, width in zip(cells, (9, 10, 11, 10, 8))))
    print("last: the final epoch, the number to quote; best test: chosen on the test set, as published code does")
# }}} shared


def main(argv=None):
    """Command line -> the result as a dict, the one written to JSON. Exits with code 2 for what a user can mend."""
    parser = argparse.ArgumentParser("udi.py", "python udi.py [--dataset NAME] [--gpu N] ...", __doc__.split("\n")[0])
    cli.common_flags(parser)
    parser.add_argument("--anchor", help="this modality instead of the one chosen on validation items")
    parser.add_argument("--interaction", nargs=2, type=float, metavar=("ALPHA", "BETA"), help="fixed weights, not dynamic ones")
    parser.add_argument("--complement", choices=["club", "cka"], help="the complementary term (default: club)")
    parser.add_argument("--follower-init", choices=["scratch", "stage1"], help="where a follower starts (default: scratch)")
    parser.add_argument("--patience", type=int, help="epochs without a rise in validation accuracy that end a stage")
    parser.add_argument("--temperature", type=float, help="temperature of the interaction weights")
    args = cli.parse(parser, argv)
    variant = [args.anchor, args.interaction and "interaction{:g}-{:g}".format(*args.interaction),
               args.complement, args.follower_init]
    with cli.exit_codes(parser.prog), Run(args, RECIPES, "udi", ".".join(filter(None, variant))) as run:
        return train(run, args.anchor)


if __name__ == "__main__":
    main()
