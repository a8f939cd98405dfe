"""DI-MML: Detached and Interactive Multimodal Learning (Fan, Xu, Wang, Liu, Guo; ACM MM 2024; arXiv 2407.19514).

When modalities are trained with one joint loss, the one that learns faster silences the others. DI-MML trains every
encoder with its own objective instead (detached) and lets them meet in three places. (1) One shared classifier reads
every modality's features, so they live in one space. (2) After a warm-up, each modality's *effective* dimensions are
found: those by which its classes can be told apart. The DUC loss, contrastive and in one direction, then carries
knowledge from the dimensions where one modality is strong to the other's weak ones. (3) With the encoders frozen, a
fusion head is trained on all features, and at inference every head's logits are weighted by its certainty.

    python dimml.py                                   # the embedded synthetic set, on a laptop
    python dimml.py --dataset ave --gpu 0             # the recipe of the published code
    python dimml.py --dataset PATH/avmnist --split small --seed 1
    python dimml.py --help

Results: runs/*.json, one a run; the README says what has been measured.
Where this file departs from the published code, and why: results/DEVIATIONS.md, D1 to D25.
"""

import argparse
import json
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
# The first four are the published code's (SGD with momentum 0.9 and weight decay 1e-4 everywhere); `default` is ours,
# for small data, and serves the synthetic set and your own. A flag on the command line overrides its entry.
PUBLISHED = dict(epochs=150, fusion_epochs=20, warmup=20, batch_size=16, lr=1e-3, lr_step=70, shared_weight=1.0, duc_weight=1.0)
RECIPES = {
    "cremad": dict(PUBLISHED, tau=50.0, temperature=1.0),
    "ave": dict(PUBLISHED, tau=10.0, temperature=3.0),
    "ucf101": dict(PUBLISHED, tau=10.0, temperature=1.0),
    "modelnet40": dict(PUBLISHED, tau=50.0, temperature=3.0),
    "default": dict(PUBLISHED, epochs=15, fusion_epochs=5, warmup=5, lr=3e-3, lr_step=12, tau=50.0, temperature=1.0),
}


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
def dimension_accuracy(features, labels, n_classes):
    """How well each single dimension tells the classes apart: (N, D), (N,) int -> (D,) in [0, 1].

    e_d = mean_i [ argmin_c |z_id - mu_cd| = y_i ], with mu_cd the mean of dimension d over class c (paper, sec. 3.3).
    The nearest of C numbers is found by bisection among the sorted means: O(N D log C) time, O(N D) memory.
    """
    features, labels = features.float(), labels.long()
    counts = torch.bincount(labels, minlength=n_classes)
    mu = torch.zeros(n_classes, features.shape[1], device=features.device).index_add_(0, labels, features)
    mu = torch.where(counts[:, None] > 0, mu / counts[:, None], torch.inf)          # a class without items is nowhere
    means, classes = mu.T.contiguous().sort(dim=1, stable=True)                     # (D, C)
    lowest = torch.searchsorted(means, means)                                       # of equal means the first class
    nearest = torch.searchsorted((means[:, 1:] + means[:, :-1]) / 2, features.T.contiguous())   # (D, N)
    predicted = classes.gather(1, lowest.gather(1, nearest))
    return (predicted == labels).float().mean(1)


def effective_dimensions(features, labels, n_classes):
    """E = {d : e_d > mean_d' e_d'}, with e the `dimension_accuracy`: (N, D) float, (N,) int -> (D,) bool."""
    accuracy = dimension_accuracy(features, labels, n_classes)
    return accuracy > accuracy.mean()


def duc_loss(features, effective, tau):
    """Dimension-decoupled unidirectional contrastive loss: {m: (B, D)}, {m: (D,) bool}, float -> scalar.

    For each ordered pair of a teacher t and a student s, on the dimensions D = E_t \\ E_s (paper, sec. 3.3):
        L_ts = -mean_i log( exp(<z_s,i[D], z_t,i[D]> / tau) / sum_j exp(<z_s,i[D], z_t,j[D]> / tau) )
    with the teacher detached and j over the batch; their sum is returned, a pair with empty D adds 0. Each is the
    cross-entropy of a (B, B) matrix, in float32 also under autocast.
    """
    loss = 0.0
    with torch.autocast(next(iter(features.values())).device.type, enabled=False):
        for teacher, z_t in features.items():
            for student, z_s in features.items():
                if teacher != student:
                    transferred = effective[teacher] & ~effective[student]
                    similarity = (z_s.float() * transferred) @ z_t.detach().float().T / tau
                    own = torch.arange(len(z_s), device=z_s.device)
                    loss = loss + F.cross_entropy(similarity, own) * transferred.any()
    return loss


def certainty_weighted_logits(logits, temperature):
    """Sum over heads of w_k o_k, w = softmax_k(c_k / T), certainty c_k = max softmax(o_k): K times (B, C) -> (B, C)."""
    logits = torch.stack(list(logits)).float()
    certainty = logits.softmax(-1).amax(-1)
    return ((certainty / temperature).softmax(0).unsqueeze(-1) * logits).sum(0)


class DIMML(nn.Module):
    """Encoders and heads for M >= 2 modalities; inputs {m: (B, T, C, H, W)}, features {m: (B, 512)}."""

    def __init__(self, in_channels, n_classes, dim=512):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Encoder(channels) for m, channels in in_channels.items()})
        self.heads = nn.ModuleDict({m: nn.Linear(dim, n_classes) for m in in_channels})
        self.shared_head = nn.Linear(dim, n_classes)
        self.fusion_head = nn.Linear(dim * len(in_channels), n_classes)
        for m in in_channels:          # buffers: a checkpoint carries the split of the dimensions along
            self.register_buffer(f"accuracy_{m}", torch.zeros(dim))
            self.register_buffer(f"effective_{m}", torch.zeros(dim, dtype=torch.bool))

    def features(self, inputs):
        return {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}

    def effective(self):
        return {m: getattr(self, f"effective_{m}") for m in self.encoders}

    def own_logits(self, features):
        return {m: head(features[m]) for m, head in self.heads.items()}

    def fusion_logits(self, features):
        return self.fusion_head(torch.cat(list(features.values()), 1))


def train(run):
    """The whole method: stage 1 detached with DUC after the warm-up, stage 2 the fusion head. Returns the result."""
    ds, recipe = run.ds, run.recipe
    n_classes = len(ds.classes)
    if len(ds.modalities) < 2:
        raise DataError(f"DI-MML needs two modalities, {ds.name} has one: joint_baseline.py --modality trains it alone")
    if recipe["duc_weight"] and recipe["warmup"] >= recipe["epochs"]:
        raise DataError(f"--warmup {recipe['warmup']} of {recipe['epochs']} epochs: DUC would never start (--duc-weight 0)")
    model = run.restore(DIMML({m: mod.in_channels for m, mod in ds.modalities.items()}, n_classes))

    # Stage 1. No joint loss: sum_m CE(h_m(z_m), y) + w_s CE(h_s(z_m), y), and DUC from the end of the warm-up.
    def detached_losses(inputs, labels, _):
        features = model.features(inputs)
        losses = {m: F.cross_entropy(logits, labels) for m, logits in model.own_logits(features).items()}
        shared = sum(F.cross_entropy(model.shared_head(z), labels) for z in features.values())
        losses["shared"] = recipe["shared_weight"] * shared
        if epoch >= recipe["warmup"] and recipe["duc_weight"]:
            losses["duc"] = recipe["duc_weight"] * duc_loss(features, model.effective(), recipe["tau"])
        return losses

    encoders_and_heads = [p for name, p in model.named_parameters() if not name.startswith("fusion_head")]
    optimizer = run.optimizer(encoders_and_heads)
    for epoch in run.epochs("detached", recipe["epochs"], optimizer, recipe["lr_step"]):
        if epoch == recipe["warmup"] and not run.history:    # the split of the dimensions: eval mode, no augmentation, once
            features, labels = run.features(model.encoders, "train")
            for m, z in features.items():
                getattr(model, f"accuracy_{m}").copy_(dimension_accuracy(z, labels, n_classes))
                getattr(model, f"effective_{m}").copy_(effective_dimensions(z, labels, n_classes))
        model.train()
        run.train_epoch(detached_losses, optimizer)
        run.evaluate(lambda inputs: model.own_logits(model.features(inputs)))

    # Stage 2. Encoders (BatchNorm statistics too) and own heads are frozen; one head on the concatenated features.
    def fusion_loss(inputs, labels, _):
        with torch.no_grad():
            features = model.features(inputs)
        return {"fusion": F.cross_entropy(model.fusion_logits(features), labels)}

    def all_logits(inputs):
        features = model.features(inputs)
        logits = {**model.own_logits(features), "fusion": model.fusion_logits(features)}
        logits["fused"] = certainty_weighted_logits(logits.values(), recipe["temperature"])
        return logits

    optimizer = run.optimizer(model.fusion_head.parameters())
    for epoch in run.epochs("fusion", recipe["fusion_epochs"], optimizer, recipe["fusion_epochs"]):
        model.eval()
        run.train_epoch(fusion_loss, optimizer)
        run.evaluate(all_logits)

    dimensions = {m: {"accuracy": [round(a, 4) for a in getattr(model, f"accuracy_{m}").tolist()],
                      "effective": effective.nonzero().flatten().tolist()} for m, effective in model.effective().items()}
    return run.finish(all_logits, model.encoders, dimensions=dimensions)


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
    parser = argparse.ArgumentParser("dimml.py", "python dimml.py [--dataset NAME] [--gpu N] ...", __doc__.split("\n")[0])
    cli.common_flags(parser)
    parser.add_argument("--fusion-epochs", type=int, help="epochs of stage 2")
    parser.add_argument("--warmup", type=int, help="epochs before DUC")
    parser.add_argument("--tau", type=float, help="temperature of DUC")
    parser.add_argument("--duc-weight", type=float, help="0 trains without DUC")
    parser.add_argument("--temperature", type=float, help="temperature of the certainty weights")
    args = cli.parse(parser, argv)
    variant = "" if args.duc_weight is None else f"duc{args.duc_weight:g}"
    with cli.exit_codes(parser.prog), Run(args, RECIPES, "dimml", variant) as run:
        return train(run)


if __name__ == "__main__":
    main()
