"""Joint training, and the baselines that it has to beat: each modality alone, and their ensemble.

    encoder -> z_a --+
                     +--> fusion head -> CE        one loss trains everything
    encoder -> z_v --+

This is what DI-MML and UDI argue against: the modality that is learned faster explains the labels, the
gradient fades, and the other encoder is left half-trained. Look at the `probe` column: the same encoder
trained alone (--ensemble) usually scores higher. The ensemble of single modalities, whose encoders never
meet, is the rival of every method here.

    python joint_baseline.py                                     # the embedded set, concatenation
    python joint_baseline.py --ensemble                          # each alone, logits averaged
    python joint_baseline.py --modality audio                    # one modality alone
    python joint_baseline.py --dataset ave --fusion film --gpu 0

Read it top to bottom: recipe, method, model, evaluation, `plan` (what the command line asks for) and
`main`, one flat training loop. Where it departs from published code, and why: results/DEVIATIONS.md.
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

# ---- recipe: that of the DI-MML code. Every entry is also a flag, e.g. --lr 0.01 -----------------
RECIPE = dict(
    epochs=150,             # with --epochs, lr_step scales along
    batch_size=16,
    lr=1e-3,                # of SGD with momentum 0.9 and weight decay 1e-4
    lr_step=70,             # lr x 0.1 every so many epochs
)
CHANGES = {"cremad": {}, "ave": {}, "ucf101": {}, "modelnet40": {}}
SMALL = dict(epochs=15, lr=3e-3, lr_step=12)        # ours, for any other dataset


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


class Fusion(nn.Module):
    """A joint head on M >= 2 modalities: {m: (B, D)} -> (B, C) logits.

    concat  W [z_1, ..., z_M]                                           the usual one
    sum     sum_m W_m z_m                                               concat with a bias for each
    film    W h, h = z_M, then h <- gamma(z_m) * h + beta(z_m) for each m < M   (Perez et al., 2018)
    gated   W (U_M z_M * prod_{m<M} sigmoid(U_m z_m))                   (Kiela et al., 2018)

    For M = 2, FiLM and gated are those of the OGM-GE code: the first modality conditions the last.
    """

    def __init__(self, kind, n_modalities, dim, n_classes):
        super().__init__()
        self.kind = kind
        self.out = nn.Linear(dim * n_modalities if kind == "concat" else dim, n_classes)
        if kind == "sum":
            self.out = nn.ModuleList(nn.Linear(dim, n_classes) for _ in range(n_modalities))
        if kind == "film":
            self.film = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(n_modalities - 1))
        if kind == "gated":
            self.project = nn.ModuleList(nn.Linear(dim, dim) for _ in range(n_modalities))

    def forward(self, z):
        *others, last = z.values()
        if self.kind == "concat":
            return self.out(torch.cat([*others, last], 1))
        if self.kind == "sum":
            return sum(linear(z_m) for linear, z_m in zip(self.out, [*others, last]))
        if self.kind == "film":
            for linear, z_m in zip(self.film, others):
                gamma, beta = linear(z_m).chunk(2, dim=1)
                last = gamma * last + beta
            return self.out(last)
        *gates, content = (linear(z_m) for linear, z_m in zip(self.project, [*others, last]))
        for gate in gates:
            content = content * gate.sigmoid()
        return self.out(content)


class Model(nn.Module):
    """An encoder a modality, and a fusion head or (with `fusion` None) a head of its own for each."""

    answer = "fused"        # the head that is the method's answer

    def __init__(self, in_channels, n_classes, fusion, dim=512):
        super().__init__()
        self.modalities = list(in_channels)     # a list beside ModuleLists: a name can be any word
        self.encoders = nn.ModuleList(Encoder(channels) for channels in in_channels.values())
        self.fusion = Fusion(fusion, len(in_channels), dim, n_classes) if fusion else None
        self.heads = nn.ModuleList(() if fusion else (nn.Linear(dim, n_classes) for _ in in_channels))

    def features(self, inputs):
        """{m: (B, T, C, H, W)} -> z = {m: (B, 512)}."""
        return {m: encoder(inputs[m]) for m, encoder in zip(self.modalities, self.encoders)}

    def own_logits(self, z):
        return {m: head(z[m]) for m, head in zip(self.modalities, self.heads)}

    def logits(self, z):
        """z -> logits (B, C) of our heads by our names, and of the modalities' own by theirs."""
        own = self.own_logits(z)
        fused = self.fusion(z) if self.fusion else torch.stack(list(own.values())).mean(0)
        return {"fused": fused}, own


# ---- evaluation: all heads read features, so the features of a part are all that is needed of it -
@torch.no_grad()
def features_of(part, model, ds, device, amp, batch_size):
    """Features of a whole part, eval mode, not augmented: {m: (N, 512)}, labels (N,)."""
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
    parser = argparse.ArgumentParser("joint_baseline.py", description=__doc__.split("\n")[0])
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
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fusion", choices=["concat", "sum", "film", "gated"], default="concat")
    what.add_argument("--modality", help="train this modality alone")
    what.add_argument("--ensemble", action="store_true", help="train each alone, average their logits")
    for key, value in RECIPE.items():
        add(f"--{key.replace('_', '-')}", type=type(value), help="(default: the recipe's)")
    args = parser.parse_args(argv)

    ds = open_dataset(args.dataset, args.data_dir, args.split, args.val)
    if args.modality:
        ds = ds.only(args.modality)
    recipe = {**RECIPE, **CHANGES.get(ds.name, SMALL)}
    scale = (args.epochs or recipe["epochs"]) / recipe["epochs"]
    recipe["lr_step"] = max(1, round(scale * recipe["lr_step"]))
    recipe.update({key: getattr(args, key) for key in recipe if getattr(args, key) is not None})
    for key, value in recipe.items():
        if not 0 < value < math.inf:
            raise DataError(f"--{key.replace('_', '-')} cannot be {value}")
    if not 0 <= args.seed < 2**32:
        raise DataError(f"--seed {args.seed} is not in 0 .. 2^32 - 1")

    variant = f"only-{args.modality}" if args.modality else "ensemble" if args.ensemble else args.fusion
    method = Path(__file__).stem                    # a copied file is a method of its own
    path = Path(args.out).expanduser() / f"{method}.{variant}-{ds.name}-{ds.split}-seed{args.seed}"
    config = dict(method=method, variant=variant, dataset=ds.name, split=ds.split, seed=args.seed,
                  val=args.val, amp=args.amp, recipe=recipe, data=ds.fingerprint)
    return args, ds, recipe, path, config


def main(argv=None):
    """Train what a command line asks for; returns the result, the dict that is written to JSON."""
    args, ds, recipe, path, config = plan(argv)
    r, n_classes = argparse.Namespace(**recipe), len(ds.classes)
    sizes = {part: len(ds.indices(part)) for part in ("train", "val", "test")}
    alone = bool(args.ensemble or args.modality)    # no fusion head: encoders that never meet

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

    # model and optimizer
    in_channels = {m: modality.in_channels for m, modality in ds.modalities.items()}
    model = Model(in_channels, n_classes, None if alone else args.fusion).to(device)
    if device.type == "cuda" or dtype == torch.bfloat16:        # small float32 pictures lose by it
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), r.lr, momentum=0.9, weight_decay=1e-4,
                                fused=dtype != torch.float16)   # wrong after an overflow in step 1

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
            if len(log) < r.epochs and not args.resume:
                raise DataError(f"{path}.pt is at epoch {len(log)} of {r.epochs}: --resume goes on, "
                                "another --out starts anew")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            generator.set_state(state["generator"].cpu())
        ds.check(r.batch_size)
        print(f"{path.name}: {', '.join(f'{n} {part}' for part, n in sizes.items())} items of {n_classes} "
              f"classes; {device}, {str(dtype).removeprefix('torch.')}; "
              + (f"goes on after epoch {len(log)} of {r.epochs}" if log else
                 f"{r.epochs} epochs" + ", nothing to resume" * args.resume), flush=True)

        # ---- training --------------------------------------------------------------------------
        for epoch in range(len(log), r.epochs):
            start = time.time()
            lr = r.lr * 0.1 ** (epoch // r.lr_step)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # one pass over the training items
            model.train()
            batches = ds.batches("train", r.batch_size, device, augment=True, generator=generator)
            total = 0.0
            for inputs, y, _ in tqdm(batches, leave=False, disable=None, unit="batch"):
                with amp:
                    z = model.features(inputs)                  # {m: (B, 512)}
                if alone:       # no parameter sees another's gradient: as in runs of their own
                    loss, own_loss = {}, {m: F.cross_entropy(o, y) for m, o in model.own_logits(z).items()}
                else:
                    loss, own_loss = {"joint": F.cross_entropy(model.fusion(z), y)}, {}
                terms = [*loss.values(), *own_loss.values()]
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(sum(terms)).backward()
                scaler.step(optimizer)
                scaler.update()
                total = total + torch.stack(terms).detach()     # no step waits for its value
            mean = (total / len(batches)).tolist()
            speed = len(batches) * r.batch_size / (time.time() - start)

            # evaluation; the test scores are recorded, and nothing is ever chosen by them
            record = dict(stage="alone" if alone else "joint", epoch=epoch, lr=lr,
                          loss=dict(zip(loss, mean)), modality_loss=dict(zip(own_loss, mean[len(loss):])))
            for part in ("val", "test"):
                record[part] = {}
                if sizes[part]:
                    z, y = features_of(part, model, ds, device, amp, r.batch_size)
                    with torch.no_grad():
                        heads, own = model.logits(z)
                    record[part] = dict(heads={head: scores(o, y) for head, o in heads.items()},
                                        modality_heads={m: scores(o, y) for m, o in own.items()})
            if not math.isfinite(sum(mean) + record["test"]["heads"]["fused"]["entropy"]):
                raise FloatingPointError(f"epoch {epoch + 1}: a loss or an output is not finite, losses "
                                         f"{mean}; lower --lr, or --amp off")
            log.append({**record, "seconds": time.time() - start, "items_per_second": speed})
            print(f"epoch {epoch + 1}/{r.epochs} | loss", *(f"{value:.3f}" for value in mean), "| val",
                  *(f"{head} {100 * s['accuracy']:.1f}" for group in record["val"].values()
                    for head, s in group.items()), f"| {speed:.0f} items/s, "
                  f"{(r.epochs - epoch - 1) * log[-1]['seconds']:.0f} s left", flush=True)

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
    with exit_codes("joint_baseline.py"):
        main()
