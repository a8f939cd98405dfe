"""Joint training, and the baselines that it has to beat: each modality alone, and their ensemble.

Joint training reads all features with one fusion head and one loss, L = CE(g(z_1, ..., z_M), y). It is what DI-MML and
UDI argue against: the modality that learns faster explains the labels, the gradient fades, and the other encoders are
left half-trained. Look at the `probe` column: the same encoder trained alone (--ensemble) usually scores higher. The
ensemble of single modalities, which averages the logits of encoders that never met, is the strong baseline here.

    python joint_baseline.py                                    # concatenation, the embedded synthetic set
    python joint_baseline.py --dataset ave --fusion film --gpu 0
    python joint_baseline.py --dataset ave --modality audio     # one modality alone
    python joint_baseline.py --dataset ave --ensemble           # each alone, logits averaged

Results: runs/*.json, one a run; the README says what has been measured.
Where this file departs from published code, and why: results/DEVIATIONS.md.
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
# The first four are those of the DI-MML code, so that all scripts spend the same on an encoder (SGD with momentum 0.9
# and weight decay 1e-4 everywhere); `default` is ours, for small data. A flag on the command line overrides its entry.
PUBLISHED = dict(epochs=150, batch_size=16, lr=1e-3, lr_step=70)
RECIPES = {
    "cremad": PUBLISHED, "ave": PUBLISHED, "ucf101": PUBLISHED, "modelnet40": PUBLISHED,
    "default": dict(PUBLISHED, epochs=15, lr=3e-3, lr_step=12),
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
class Fusion(nn.Module):
    """Joint head on M >= 1 modalities: {m: (B, D)} -> (B, C) logits. Raises ValueError for another kind.

    concat  W [z_1, ..., z_M]                                            the usual one
    sum     sum_m W_m z_m                                                concat with a bias for each modality
    film    W h, h = z_M modulated by each other modality in turn: h <- gamma(z_m) * h + beta(z_m)  (Perez et al., 2018)
    gated   W (U_M z_M * prod_{m<M} sigmoid(U_m z_m))                    (Kiela et al., 2018)
    FiLM and gated are, for M = 2, those of the OGM-GE code (Peng et al., 2022): the first modality conditions the last.
    """

    def __init__(self, kind, n_modalities, dim, n_classes):
        super().__init__()
        if kind not in ("concat", "sum", "film", "gated"):
            raise ValueError(f"fusion {kind!r} is none of concat, sum, film, gated")
        self.kind = kind
        self.out = nn.Linear(dim * n_modalities if kind == "concat" else dim, n_classes)
        if kind == "sum":
            self.out = nn.ModuleList(nn.Linear(dim, n_classes) for _ in range(n_modalities))
        if kind == "film":
            self.film = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(n_modalities - 1))
        if kind == "gated":
            self.project = nn.ModuleList(nn.Linear(dim, dim) for _ in range(n_modalities))

    def forward(self, features):
        *others, last = features.values()
        if self.kind == "concat":
            return self.out(torch.cat([*others, last], 1))
        if self.kind == "sum":
            return sum(linear(z) for linear, z in zip(self.out, [*others, last]))
        if self.kind == "film":
            for linear, z in zip(self.film, others):
                gamma, beta = linear(z).chunk(2, dim=1)
                last = gamma * last + beta
            return self.out(last)
        *gates, content = (linear(z) for linear, z in zip(self.project, [*others, last]))
        for gate in gates:
            content = content * gate.sigmoid()
        return self.out(content)


class Joint(nn.Module):
    """One encoder a modality and one fusion head; inputs {m: (B, T, C, H, W)} -> {"fused": (B, C)}."""

    def __init__(self, kind, in_channels, n_classes, dim=512):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Encoder(channels) for m, channels in in_channels.items()})
        self.fusion = Fusion(kind, len(in_channels), dim, n_classes)

    def forward(self, inputs):
        return {"fused": self.fusion({m: encoder(inputs[m]) for m, encoder in self.encoders.items()})}

    def losses(self, inputs, labels, _):
        return {"joint": F.cross_entropy(self(inputs)["fused"], labels)}


class Alone(nn.Module):
    """Encoders with a head each that share nothing: {m: (B, T, C, H, W)} -> {m: (B, C), "fused": their mean}.

    The sum of their losses trains each exactly as if it were alone, since no parameter sees another's gradient.
    """

    def __init__(self, in_channels, n_classes, dim=512):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Encoder(channels) for m, channels in in_channels.items()})
        self.heads = nn.ModuleDict({m: nn.Linear(dim, n_classes) for m in in_channels})

    def own_logits(self, inputs):
        return {m: head(self.encoders[m](inputs[m])) for m, head in self.heads.items()}

    def forward(self, inputs):
        logits = self.own_logits(inputs)
        if len(logits) > 1:
            logits["fused"] = torch.stack(list(logits.values())).float().mean(0)
        return logits

    def losses(self, inputs, labels, _):
        return {m: F.cross_entropy(logits, labels) for m, logits in self.own_logits(inputs).items()}


def train(run, kind):
    """Train for the recipe's epochs; `kind` is a fusion's, or None for each modality alone. Returns the result."""
    in_channels = {m: mod.in_channels for m, mod in run.ds.modalities.items()}
    n_classes = len(run.ds.classes)
    model = run.restore(Joint(kind, in_channels, n_classes) if kind else Alone(in_channels, n_classes))
    optimizer = run.optimizer(model.parameters())
    for _ in run.epochs("joint" if kind else "alone", run.recipe["epochs"], optimizer, run.recipe["lr_step"]):
        model.train()
        run.train_epoch(model.losses, optimizer)
        run.evaluate(model)
    return run.finish(model, model.encoders)


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
    parser = argparse.ArgumentParser("joint_baseline.py", "python joint_baseline.py [--dataset NAME] [--gpu N] ...",
                                     __doc__.split("\n")[0])
    cli.common_flags(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fusion", choices=["concat", "sum", "film", "gated"], default="concat",
                      help="the joint head (default: %(default)s)")
    what.add_argument("--modality", help="train this modality alone")
    what.add_argument("--ensemble", action="store_true", help="train each modality alone and average their logits")
    args = cli.parse(parser, argv)
    kind = None if args.ensemble or args.modality else args.fusion
    with cli.exit_codes(parser.prog), Run(args, RECIPES, "joint_baseline", args.modality or kind or "ensemble") as run:
        return train(run, kind)


if __name__ == "__main__":
    main()
