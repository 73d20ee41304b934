"""ARQ: mixed-precision quantization that keeps a network's certified robustness.

    python arq.py                                                 # offline, minutes on two cores
    python arq.py --dataset cifar10 --sigma 0.25 --budget 0.015   # the paper's setting

    paper                      here                      meaning
    Algorithm 1                search                    episodes of the agent, the best policy
    FullRobustCertify          Smooth.certify_and_cache  certify f once, keep its predictions
    IncrementalRobustCertify   Smooth.certify_incremental, the default reward (--reward irs)
    s_l                        BitWidthEnvironment       features of layers and operands, in [0, 1]
    a -> b                     BitWidthEnvironment.bits  action in [0, 1] to a bit-width
    BitOPs(P) <= budget        models.enforce_budget     takes bits off until the policy fits
    ACR(g^P)                   PolicyEvaluator           quantize, fine-tune briefly, certify
    X                          test images               first seen by the final certificates

Paper: "ARQ: A Mixed-Precision Quantization Framework for Accurate and Certifiably Robust DNNs",
arXiv 2410.24214.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

import certify
import models
from certify import ReplayCache, Smooth
from ddpg import DDPG, DDPGConfig
from models import Classifier, Layer, Policy

# ---- Algorithm 1 ----


class BitWidthEnvironment:
    """An episode walks the layers; each takes two actions, one for its weights, one for its input (HAQ, 3.2).

    A state (10,) holds, in [0, 1]: index, c_in, c_out, kernel, stride, input map size, number of weights,
    depthwise flag, weight-or-input flag, previous action. The first and the last layer keep 8 bits,
    unvisited. Raises ValueError for a budget that 2 bits everywhere would exceed.
    """

    def __init__(self, table: list[Layer], budget: float, size_budget: float | None = None):
        narrowest = models.uniform_policy(table, models.MIN_BITS)
        models.enforce_budget(table, narrowest, budget, size_budget)
        self.table = table
        self.budget = budget
        self.size_budget = size_budget
        self.steps = [(layer, kind) for layer in table[1:-1] for kind in (0, 1)]  # weights, input
        rows = [
            [i // 2, *layer[1:7], layer.depthwise, kind]  # c_in .. weights
            for i, (layer, kind) in enumerate(self.steps)
        ]
        features = torch.tensor(rows, dtype=torch.float32)
        low, high = features.amin(0), features.amax(0)
        self.features = (features - low) / (high - low).clamp_min(1e-9)
        self.state_size = self.features.shape[1] + 1

    @staticmethod
    def bits(action: float) -> int:
        """round(b_min - 1/2 + a (b_max - b_min + 1)): equal shares of [0, 1] for every bit-width."""
        bits = round(models.MIN_BITS - 0.5 + action * (models.MAX_BITS - models.MIN_BITS + 1))
        return min(models.MAX_BITS, max(models.MIN_BITS, bits))

    def rollout(self, act: Callable[[Tensor], float]) -> tuple[Tensor, Tensor, Policy]:
        """One episode: states (T, 10), actions (T, 1) as emitted, and the policy under the budget."""
        policy = models.uniform_policy(self.table, models.MIN_BITS)
        states, actions = [], []
        previous = 1.0
        for features, (layer, kind) in zip(self.features, self.steps):
            state = torch.cat([features, torch.tensor([previous])])
            action = act(state)
            policy[layer.name][kind] = self.bits(action)
            previous = policy[layer.name][kind] / models.MAX_BITS
            states.append(state)
            actions.append(action)
        policy = models.enforce_budget(self.table, policy, self.budget, self.size_budget)
        return torch.stack(states), torch.tensor(actions)[:, None], policy


class PolicyEvaluator:
    """ACR(g^P) of a policy P: quantize f, fine-tune briefly, certify. Each starts from f's weights.

    classifier: f, quantizable and calibrated (models.quantize_model, models.calibrate)
    finetune(classifier): trains it for a few steps, in place
    certificate(classifier, cache): radii of g^P on the images of f's cache, 0 where wrong
    """

    def __init__(self, classifier: nn.Module, finetune: Callable, certificate: Callable):
        self.classifier = classifier
        self.base_state = copy.deepcopy(classifier.state_dict())
        self.finetune = finetune
        self.certificate = certificate

    def quantize(self, policy: Policy) -> nn.Module:
        self.classifier.load_state_dict(self.base_state)
        models.set_policy(self.classifier, policy)
        return self.classifier

    def __call__(self, policy: Policy, cache: ReplayCache) -> float:
        quantized = self.quantize(policy)
        self.finetune(quantized)
        radii = self.certificate(quantized, cache)
        return statistics.fmean(radii)


def relative_gain(acr: float, base_acr: float) -> float:
    """The reward: (ACR(g^P) - ACR(g)) / ACR(g)."""
    return (acr - base_acr) / base_acr


def search(
    certify_base: Callable[[], ReplayCache],
    environment: BitWidthEnvironment,
    agent: DDPG,
    evaluate: Callable[[Policy, ReplayCache], float],
    reward: Callable[[float, float], float] = relative_gain,
) -> Iterator[dict]:
    """Algorithm 1, one record per episode; the agent's own count of episodes says where it starts."""
    # 1: FullRobustCertify(f)
    cache = certify_base()
    base_acr = certify.average_certified_radius(cache.certificates)
    # 2: for each episode
    while agent.episode < agent.config.episodes:
        episode, noise = agent.episode, agent.noise
        # 3: the agent emits bit-widths layer by layer; the policy is forced under the budget
        states, actions, policy = environment.rollout(agent.act)
        # 4: quantize f with it, fine-tune, IncrementalRobustCertify
        acr = evaluate(policy, cache)
        # 5: the agent learns from the reward
        gain = reward(acr, base_acr)
        agent.learn(states, actions, gain)
        yield {"episode": episode, "acr": acr, "reward": gain, "noise": noise, "policy": policy}


def best_policy(records: list[dict]) -> Policy:
    """6, the last line: the policy of the largest ACR; it is fine-tuned and certified from scratch."""
    return max(records, key=lambda record: record["acr"])["policy"]


# ---- training ----

BASE_LR, BASE_DECAY = 0.2, 5e-4
EPISODE_LR, FINETUNE_LR, FINETUNE_DECAY = 0.005, 0.02, 1e-4
AUTOCAST_DEVICES = ("cuda",)  # train in bfloat16


def augment(images: Tensor, uniform: Tensor) -> Tensor:
    """Shift each image (B, C, H, W) by up to an eighth of its side, zero padded, and flip it or not.

    uniform: three numbers in [0, 1) per image, (3, B): shift down, shift right, flip.
    """
    count, _, height, width = images.shape
    pad = max(1, height // 8)
    top, left = (uniform[:2, :, None] * (2 * pad + 1)).long()
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    columns = torch.where(uniform[2, :, None] < 0.5, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)  # B, H, W, C
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(
    classifier: nn.Module,
    images: "ImageSet",
    config: "Config",
    steps: int,
    lr: float,
    purpose: str = "train",
    weight_decay: float = FINETUNE_DECAY,
    state: dict | None = None,
    save: Callable | None = None,
) -> None:
    """Gaussian noise augmentation (Cohen et al., section 3.3): cross-entropy of augmented images plus noise.

    Nesterov SGD for `steps` batches; the rate rises over the first fifth and falls along a cosine. Weight
    decay spares steps, biases and BatchNorm. Randomness is seeded anew every epoch by seed and purpose:
    equal arguments train equal networks. save(state) is called after every epoch, and an interrupted call
    continues from such a state. Under torchrun each process takes its share of every batch; the gradient
    is the whole batch's, but BatchNorm sees the share. GPUs compute in bfloat16 where torch.autocast
    lets them. Raises ValueError when the loss is not finite.
    """
    device = next(classifier.parameters()).device
    groups = [
        {"params": [p for p in classifier.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in classifier.parameters() if p.ndim <= 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    first = 0
    if state is not None:
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    network = DistributedDataParallel(classifier) if WORLD > 1 else classifier
    classifier.train()
    labels = torch.tensor(images.labels)
    batch_size = config.batch_size
    epoch = len(images) // batch_size
    seed = hashlib.sha256(f"{config.seed}|{purpose}".encode()).digest()
    count = progress(purpose if save else "", "batches", first, steps)
    for start in range(first, steps, epoch):
        torch.manual_seed(int.from_bytes(seed[:4], "little") + start // epoch)
        # What is random is drawn for whole batches: it does not depend on the number of processes.
        batches = torch.randperm(len(images)).split(batch_size)[: min(epoch, steps - start)]
        batches = [share(batch) for batch in batches]
        for chosen, pixels, step in zip(batches, images.batches(batches), count):
            rise = (step + 1) / (0.2 * steps + 1)
            fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(rise, fall)
            uniform = share(torch.rand(3, batch_size).T).T
            x = augment(pixels.to(device), uniform).float() / 255
            noise = share(torch.randn(batch_size, *x.shape[1:], device=device))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type in AUTOCAST_DEVICES):
                logits = network(x + config.sigma * noise)
            losses = F.cross_entropy(logits.float(), labels[chosen].to(device), reduction="none")
            optimizer.zero_grad()
            # Processes average their gradients: of this, that is the whole batch's mean.
            (WORLD * losses.sum() / batch_size).backward()
            optimizer.step()
            models.keep_steps_positive(classifier)
        if not torch.isfinite(losses).all():
            raise ValueError(f"{purpose}: the loss is not finite at step {step + 1}; try another --seed")
        if save is not None:
            state = {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict()}
            save({**state, "step": step + 1})
    next(count, None)
    for buffer in classifier.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)  # BatchNorm's statistics are each process's own
    classifier.eval()


# ---- options: a reader of the method may skip from here to "the run" ----

RADII = (0.0, 0.25, 0.5, 0.75)  # at which certified accuracy is reported
WORLD = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1  # torchrun's processes
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0  # of this process; rank 0 writes and prints
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = min(16, max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
DATASETS = ("shapes", "cifar10", "imagenet", "folder")

# Each stage and the groups of options that its outcome rests on.
STAGES = {
    "train the base": {"base"},
    "certify the base, search images": {"base", "cache"},
    "search": {"base", "cache", "search"},
    "fine-tune": {"base", "cache", "search", "fine-tune"},
    "certify the base, test images": {"base", "test"},
    "certify ARQ, test images": {"base", "cache", "search", "fine-tune", "test"},
}
EVALUATION = {"certify": {"evaluate", "test"}}
SAVED_OPTIONS = ("dataset", "arch", "image_size", "sigma")  # in the file of a network


def option(text: str, default=None, groups: str = "", least=None, below=None, **parser):
    """A field of Config. default: a value, or {dataset: value}; groups: of the stages that depend on it.

    Numbers must be at least `least`, or strictly between 0 and `below`.
    """
    shown = "" if default in (None, False) else f" (default: {default})"
    if isinstance(default, dict):
        shown = f" (default: {', '.join(f'{name} {value}' for name, value in default.items())})"
    metadata = {"parser": {"help": text + shown, **parser}, "groups": set(groups.split())}
    metadata |= {"default": default, "least": least, "below": below}
    return field(default=None if isinstance(default, dict) else default, metadata=metadata)


def by_dataset(paper, shapes=None, imagenet=None) -> dict:
    """Defaults: sized as in the paper, and for minutes on two cores with `shapes`."""
    small, large = (paper if value is None else value for value in (shapes, imagenet))
    return {"shapes": small, "cifar10": paper, "imagenet": large, "folder": paper}


@dataclass
class Config:
    """Every option; the command line is made from it."""

    dataset: str = option("shapes (drawn here; default), or as named", None, "base", choices=DATASETS)
    data: str = option("where the images are, or where CIFAR-10 is downloaded to", "data", "base")
    arch: str = option("network", by_dataset("resnet20", "resnet8", "resnet50"), "base evaluate",
                       choices=models.NETWORKS)  # fmt: skip
    checkpoint: str = option("float base classifier, trained with noise; else one is trained", None, "base")
    pretrained: bool = option("train the base from torchvision's weights, downloaded", False, "base")
    mean: list = option("normalisation, such as 0.5 0.5 0.5", None, "base evaluate", type=float, nargs=3)
    std: list = option("likewise", None, "base evaluate", type=float, nargs=3)
    sigma: float = option("standard deviation of the noise, in [0, 1] pixels", by_dataset(0.25),
                          "base evaluate", below=math.inf)  # fmt: skip
    budget: float = option("BitOPs allowed, as a fraction of the float network's", 0.015, "search", below=1)
    size_budget: float = option("weight bits allowed, likewise", None, "search", below=1)
    epochs: int = option("training epochs of the base classifier", by_dataset(90, 6), "base", 1)
    episodes: int = option("search episodes, one policy each", by_dataset(600, 24), "search", 1)
    finetune_steps: int = option("training steps of each policy before it is certified",
                                 by_dataset(20, 8), "search", 0)  # fmt: skip
    finetune_epochs: float = option("training epochs of the best policy, such as 2.5",
                                    by_dataset(30.0, 3.0, 10.0), "fine-tune", 0)  # fmt: skip
    search_images: int = option(
        "training images held out for the search", by_dataset(500, 100), "base", WORLD
    )
    search_n: int = option("samples per search image of the base's certificate", by_dataset(10000, 500),
                           "cache", 1)  # fmt: skip
    n_p: int = option("samples per search image of a policy's reward", by_dataset(1000, 100), "search", 1)
    images: int = option("test images of the final certificates, evenly spaced over the set",
                         by_dataset(500, 100), "test", 1)  # fmt: skip
    n0: int = option("samples that select the class", 100, "cache test", 1)
    n: int = option("samples that bound its probability", by_dataset(10000, 1000), "test", 1)
    alpha: float = option("probability that a certificate is wrong, per image", 0.001, "cache test", below=1)
    alpha_zeta: float = option("the same for the disparity zeta of IRS", 0.001, "search", below=1)
    gamma: float = option("cached p_A from which IRS draws fresh samples",
                          by_dataset(0.99, imagenet=0.995), "search", below=1)  # fmt: skip
    reward: str = option("irs: certified, as published; estimate: not certified, ranks better per pass",
                         "irs", "search", choices=("irs", "estimate"))  # fmt: skip
    image_size: int = option("side of the images the network sees", by_dataset(32, imagenet=224),
                             "base evaluate", 8)  # fmt: skip
    batch_size: int = option("training batch", 128, "base", 2 * WORLD)
    eval_batch: int = option("samples per forward pass when certifying", None, "", 1)
    workers: int = option("processes that decode image files", WORKERS, "", 0)
    seed: int = option("seed of training, search and noise", 0, "base evaluate", 0)
    device: str = option(
        "auto, cuda, mps or cpu", "auto", "cache test", choices=("auto", "cuda", "mps", "cpu")
    )
    out: str = option("run folder (default: named after the options, under runs/)")
    restart: bool = option("do those stages of the run in --out anew whose options differ now", False)
    evaluate: str = option("certify this saved network on the test images, and stop", None, "evaluate")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_config(argv=None) -> Config:
    """Options from the command line, checked and completed. Raises ValueError."""
    description = "ARQ: mixed-precision quantization that keeps certified robustness."
    parser = OneLineParser(allow_abbrev=False, description=description)
    for f in dataclasses.fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(flag(f.name), default=f.default, **{**kind, **f.metadata["parser"]})
    return complete_config(Config(**vars(parser.parse_args(argv))))


def complete_config(config: Config) -> Config:
    """Fill in the dataset's defaults and refuse what cannot work, before any data is touched."""
    for name in ("checkpoint", "evaluate"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{flag(name)} {path}: no such file")
    packed = models.read_packed(config.evaluate) if config.evaluate else None
    saved = {name: packed[0][name] for name in SAVED_OPTIONS} if packed else {}
    for name in ("arch", "image_size"):
        if name in saved and getattr(config, name) not in (None, saved[name]):
            raise ValueError(f"--evaluate {config.evaluate} has {flag(name)} {saved[name]}; omit it")
    config.dataset = config.dataset or saved.get("dataset", "shapes")
    for f in dataclasses.fields(Config):
        default = f.metadata["default"]
        if getattr(config, f.name) is None and isinstance(default, dict):
            setattr(config, f.name, saved.get(f.name, default[config.dataset]))
    if config.pretrained and (config.checkpoint or models.is_cifar_resnet(config.arch)):
        raise ValueError(
            "--pretrained is for torchvision's networks (mobilenet_v2 ...), without --checkpoint"
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    best = accelerator.type if accelerator else "cpu"
    config.device = best if config.device == "auto" else config.device
    if config.device not in (best, "cpu"):
        raise ValueError(f"--device {config.device} is not available on this machine; use --device auto")
    if config.eval_batch is None:  # small batches stay in a CPU's cache; a GPU wants large ones
        samples = 50 if config.device == "cpu" else 2000
        config.eval_batch = max(8, samples * 32**2 // max(config.image_size, 32) ** 2)
    check_ranges(config)
    if config.out is None:
        source = f"budget{config.budget:g}"
        if config.evaluate:
            file = Path(config.evaluate).resolve()
            source = f"evaluate-{file.parent.name}-{file.stem}"
        config.out = f"runs/{config.dataset}-{config.arch}-sigma{config.sigma:g}-{source}-seed{config.seed}"
    return config


def check_ranges(config: Config) -> None:
    """Raises ValueError for the first number out of its range."""
    for f in dataclasses.fields(Config):
        value, least, below = getattr(config, f.name), f.metadata["least"], f.metadata["below"]
        if below is not None and value is not None and not 0 < value < below:
            raise ValueError(f"{flag(f.name)} must be above 0 and below {below}, not {value}")
        if least is not None and not least <= value < 2**31:
            raise ValueError(f"{flag(f.name)} must be at least {least} and below 2^31, not {value}")
    for name in ("n", "search_n", "n_p"):
        n = getattr(config, name)
        if not certify.can_certify(n, config.alpha):
            needed = math.floor(math.log(config.alpha) / math.log(0.5)) + 1
            raise ValueError(
                f"{flag(name)} {n} never certifies at alpha = {config.alpha:g}; give at least {needed}"
            )
    if config.n_p > config.search_n:
        raise ValueError(f"--n-p {config.n_p} exceeds --search-n {config.search_n}, all it can replay")


# ---- progress and files ----


def progress(label: str, unit: str, done: int, total: int, block: int = 1) -> Iterator[int]:
    """Count from `done` to `total` in blocks. On a terminal, one line shows rate and time left meanwhile."""
    start, shown = time.monotonic(), 0.0
    on_terminal = bool(label) and sys.stderr.isatty() and RANK == 0
    for first in range(done, total, block):
        yield first
        now, reached = time.monotonic(), min(first + block, total)
        if on_terminal and now - shown > 0.2:
            shown = now
            rate = (reached - done) / max(now - start, 1e-9)
            left = duration((total - reached) / rate)
            text = f"\r  {label}: {reached}/{total} {unit}, {rate:.3g}/s, {left} left   "
            print(text, end="", file=sys.stderr, flush=True)
    if on_terminal:
        print("\r" + " " * 100 + "\r", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def digest(*parts: bytes) -> str:
    """A short name for these bytes."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def write_whole(path: Path, value) -> None:
    """Rank 0 writes a JSON, torch or packed file, whole or not at all: beside its place, then into it."""
    if RANK > 0:
        return
    if path.suffix == ".json":
        value = (json.dumps(value, indent=1) + "\n").encode()
    if not isinstance(value, bytes):
        buffer = io.BytesIO()  # torch.save to a full disk would not be an OSError
        torch.save(value, buffer)
        value = buffer.getbuffer()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(value)
        os.fsync(file.fileno())
    os.replace(part, path)


read_state = functools.partial(torch.load, map_location="cpu", weights_only=True)


# ---- processes and stages ----


def join_processes(config: Config) -> None:
    """Become one of torchrun's processes: nccl on GPUs, one each, and gloo on CPUs."""
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if config.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    warnings.filterwarnings("ignore", "Grad strides")  # of 1x1 convolutions: costs nothing that matters
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def share(batch: Tensor) -> Tensor:
    """This process's part of a batch."""
    return batch[RANK::WORLD]


def gather(value) -> list:
    """Every process's value, by rank, in every process; waits for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


class SharedEnvironment(BitWidthEnvironment):
    """All processes run the agent; rank 0's episode counts."""

    def rollout(self, act):
        return gather(super().rollout(act))[0]


class Stages:
    """What the stages of a run have reached, in one file: the same command continues after the last `save`.

    keys: for each stage, what it depends on. One that was begun with another key raises ValueError; with
    restart, it is forgotten. Seconds and forward passes add up over interruptions.
    """

    def __init__(self, path: Path, keys: dict[str, dict], restart: bool = False):
        self.path, self.keys = path, keys
        self.passes = 0
        self.records = read_state(path) if path.exists() else {}
        for name, record in list(self.records.items()):
            old, new = record["key"], keys.get(name, {})
            differ = [
                f"{flag(option)} {old.get(option)} there, {new.get(option)} here"
                for option in {**old, **new}
                if old.get(option) != new.get(option)
            ]
            if differ and not (restart and name in keys):
                raise ValueError(
                    f"{path.parent} holds another run, from '{name}' on: {'; '.join(differ[:4])}; "
                    f"give another --out, or --restart to do that anew"
                )
            if differ:
                del self.records[name]

    def do(self, name: str, product: Path, work: Callable, shared: bool = False) -> None:
        """Make the file `product` by work(state, save), unless that is finished; it returns the contents.

        state: what an interrupted `work` handed to save last, or None. Every process calls save, and
        waits. A shared product is taken from whichever run made it.
        """
        record = self.records.get(name)
        if all(gather(product.exists())) and (shared or (record and record["finished"])):
            if record:
                record.update(state=None, finished=True)  # if killed just before that
            print(f"{name}: finished earlier, used again", flush=True)
            return
        self.path.with_name("results.json").unlink(missing_ok=True)
        if not record or record["finished"]:
            for other, key in self.keys.items():
                if set(self.keys[name]) < set(key):
                    self.records.pop(other, None)  # it rests on what is made anew
            record = {"key": self.keys[name], "seconds": 0.0, "forward_passes": 0, "state": None}
            self.records[name] = record
        print(f"{name} ..." if record["state"] is None else f"{name}, continued ...", flush=True)
        self.passes, since = 0, time.monotonic()

        def save(state, finished: bool = False) -> None:
            nonlocal since
            now, passes = time.monotonic(), sum(gather(self.passes))
            record["seconds"] += now - since
            record["forward_passes"] += passes
            record.update(state=state, finished=finished)
            self.passes, since = 0, now
            write_whole(self.path, self.records)

        write_whole(product, work(record["state"], save))
        save(None, finished=True)

    def watch(self, classifier: nn.Module) -> nn.Module:
        """Count the images that pass through this network, or through copies made of it from now on."""

        def count(module, inputs):
            self.passes += len(inputs[0])

        classifier.register_forward_pre_hook(count)
        return classifier

    def times(self) -> dict[str, dict]:
        return {
            name: {"seconds": round(record["seconds"], 2), "forward_passes": record["forward_passes"]}
            for name, record in self.records.items()
        }


# ---- images ----


@dataclass
class ImageSet:
    """Labelled images, ordered by label, then by name or original position."""

    labels: list[int]
    classes: list[str]
    size: int
    pixels: Tensor | None = None  # uint8 (N, 3, size, size); or
    paths: list[str] | None = None  # files that are decoded when needed,
    workers: int = 0  # by so many processes
    ids: list[int] | None = None  # positions in the whole set, which name the images' noise

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: list[int]) -> "ImageSet":
        """These images; ids keep their places in the whole set."""
        ids = self.ids or range(len(self))
        return dataclasses.replace(
            self,
            labels=[self.labels[i] for i in indices],
            pixels=None if self.pixels is None else self.pixels[indices],
            paths=self.paths and [self.paths[i] for i in indices],
            ids=[ids[i] for i in indices],
        )

    def spread(self, count: int) -> "ImageSet":
        """`count` of the images, evenly spaced from the first."""
        return self.subset(evenly_spaced(count, len(self)))

    def fingerprint(self) -> str:
        """A short name for what the set holds, from its classes, labels and a few images."""
        some = self.read(evenly_spaced(min(16, len(self)), len(self)))
        return digest(json.dumps([self.classes, self.labels, self.size]).encode(), some.numpy().tobytes())

    def batches(self, batches: list) -> Iterator[Tensor]:
        """uint8 images for each indices of many; worker processes decode files ahead. Raises ValueError."""
        if self.pixels is not None:
            yield from map(self.read, batches)
            return
        paths = [[self.paths[i] for i in indices] for indices in batches]
        read = functools.partial(read_images, size=self.size)
        # A generator of its own: starting workers must not move the one that training draws from.
        own = torch.Generator()
        for images in DataLoader(paths, None, collate_fn=read, num_workers=self.workers, generator=own):
            if isinstance(images, ValueError):
                raise images
            yield images

    def read(self, indices) -> Tensor:
        """uint8 images (len(indices), 3, size, size)."""
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(indices)]
        return torch.stack([read_image(self.paths[i], self.size) for i in indices])

    def batch(self, indices=None, device="cpu") -> Tensor:
        """Float images (len(indices), 3, size, size) in [0, 1]; all, without indices."""
        indices = range(len(self)) if indices is None else indices
        return self.read(indices).to(device).float().div_(255)


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` indices of a set of `total`, evenly spaced from the first."""
    return [i * total // count for i in range(count)]


def hold_out(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """The held-out split: training images, and `count` evenly spaced ones that only the search sees."""
    held = evenly_spaced(count, len(images))
    rest = sorted(set(range(len(images))) - set(held))
    return images.subset(rest), images.subset(held)


def read_image(path: str, size: int) -> Tensor:
    """An RGB image as uint8 (3, size, size): shorter side resized, centre cropped. Raises ValueError."""
    try:
        image = TF.pil_to_tensor(torchvision.datasets.folder.default_loader(path))
    except Exception as error:  # decoders raise many kinds for broken files
        reason = str(error)[:60]
        raise ValueError(f"{path}: cannot be read as an image ({reason}); repair or remove it") from None
    if image.shape[1:] != (size, size):
        image = TF.center_crop(TF.resize(image, [size], antialias=True), [size, size])
    return image


def read_images(paths: list[str], size: int):
    """In a worker process: uint8 (len(paths), 3, size, size), or the error, for the process that asked."""
    try:
        return torch.stack([read_image(path, size) for path in paths])
    except ValueError as error:
        return error


def load_split(config: Config, train: bool) -> ImageSet:
    """The training or the test set. Raises ValueError where it is missing or too small for the options."""
    root = Path(config.data)
    name = "train" if train else "test" if (root / "test").is_dir() else "val"
    if config.dataset == "shapes":
        images = draw_shapes(8000 if train else 1000, seed=0 if train else 1, size=config.image_size)
    elif (root / name).is_dir():
        images = load_folder(root / name, config)
    elif config.dataset == "cifar10":
        images = load_cifar10(config, train)
    else:
        raise ValueError(f"--data {root}: expected an image tree, {root}/train/<class>/*, and test/ or val/")
    if len(images.classes) < 2:
        raise ValueError(f"--data {root}: at least two classes are needed, there is one folder")
    if not train and config.images > len(images):
        raise ValueError(f"--images {config.images}: the test set has only {len(images)} images")
    if train and config.search_images + config.batch_size > len(images):
        raise ValueError(
            f"--search-images {config.search_images} leaves less than one --batch-size of "
            f"{config.batch_size}: there are {len(images)} training images"
        )
    return images


def load_images(config: Config) -> tuple[ImageSet, ImageSet]:
    """The training and the test set, of the same classes. Raises ValueError as load_split does."""
    test_images, train_images = load_split(config, False), load_split(config, True)
    differ = sorted(set(train_images.classes) ^ set(test_images.classes))
    if differ:
        raise ValueError(f"--data {config.data}: class {differ[0]!r} is only in training or only in test")
    return train_images, test_images


def load_folder(root: Path, config: Config) -> ImageSet:
    """An image tree `root/<class>/*`: classes by sorted folder name, files by sorted name."""
    try:
        found = torchvision.datasets.ImageFolder(root)
    except FileNotFoundError as error:
        raise ValueError(f"{str(error).split('. S')[0]}; expected {root}/<class>/*.jpg or .png") from None
    paths, labels = map(list, zip(*found.samples))
    return ImageSet(labels, found.classes, config.image_size, paths=paths, workers=config.workers)


def load_cifar10(config: Config, train: bool) -> ImageSet:
    root = config.data
    try:
        present = (Path(root) / "cifar-10-batches-py").is_dir()
        data = torchvision.datasets.CIFAR10(root, train=train, download=not present)
    except Exception:  # network and file errors of many kinds, one remedy
        source = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
        raise ValueError(
            f"no CIFAR-10 in --data {root}, nor could it be downloaded; unpack {source} there, "
            f"or put an image tree there (train/<class>/*, test/<class>/*)"
        ) from None
    labels, order = torch.tensor(data.targets).sort(stable=True)
    pixels = torch.from_numpy(data.data)[order].permute(0, 3, 1, 2)
    pixels = TF.resize(pixels, [config.image_size] * 2).contiguous()
    return ImageSet(labels.tolist(), data.classes, config.image_size, pixels)


SHAPES = {  # what is inside each shape, by coordinates u, v and b = max(|u|, |v|) in [-1, 1]
    "bars across": lambda u, v, b: (b < 1) & ((7 * v).sin() > 0),
    "bars upright": lambda u, v, b: (b < 1) & ((7 * u).sin() > 0),
    "checkers": lambda u, v, b: (b < 1) & (((7 * u).sin() > 0) ^ ((7 * v).sin() > 0)),
    "cross": lambda u, v, b: (u.hypot(v) < 1.1) & (torch.minimum((u + v).abs(), (u - v).abs()) < 0.42),
    "disk": lambda u, v, b: u.hypot(v) < 1,
    "frame": lambda u, v, b: (b < 0.95) & (b >= 0.55),
    "plus": lambda u, v, b: (b < 1) & (torch.minimum(u.abs(), v.abs()) < 0.3),
    "ring": lambda u, v, b: (u.hypot(v) < 1) & (u.hypot(v) > 0.6),
    "square": lambda u, v, b: b < 0.85,
    "triangle": lambda u, v, b: (v < 0.8) & (v > 2 * u.abs() - 1),
}


def draw_shapes(count: int, seed: int, size: int) -> ImageSet:
    """Ten classes of shapes, each of its own place, size, tilt and colour on a mottled ground.

    Many have so little contrast that noise of sigma 0.25 costs accuracy.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    labels, pixels = [i * len(SHAPES) // count for i in range(count)], []
    for label, inside in enumerate(SHAPES.values()):
        k = labels.count(label)
        half, tilt = uniform(0.4, 0.75, k, 1, 1), uniform(-0.3, 0.3, k, 1, 1)
        dx, dy = x - uniform(-0.3, 0.3, k, 1, 1), y - uniform(-0.3, 0.3, k, 1, 1)
        u = (dx * tilt.cos() + dy * tilt.sin()) / half
        v = (dy * tilt.cos() - dx * tilt.sin()) / half
        mask = inside(u, v, torch.maximum(u.abs(), v.abs()))[:, None]
        mottle = F.interpolate(uniform(-0.15, 0.15, k, 3, 5, 5), size, mode="bilinear", align_corners=True)
        sign = uniform(-1, 1, k, 3, 1, 1).sign()
        ground = uniform(0.25, 0.75, k, 3, 1, 1) + mottle
        image = ground + uniform(0.15, 0.45, k, 1, 1, 1) * sign * mask
        pixels.append(image.clamp(0, 1).mul(255).round().to(torch.uint8))
    return ImageSet(labels, list(SHAPES), size, torch.cat(pixels))


# ---- the run ----


def run(config: Config) -> None:
    """The method in five steps. Each is done once: an interrupted one continues, a finished one is used."""
    all_images, test_images = load_images(config)
    keys = stage_keys(config, STAGES, all_images, test_images)
    train_images, search_images = hold_out(all_images, config.search_images)
    test_images = test_images.subset(evenly_spaced(config.images, len(test_images)))
    base, base_file = build_base(config, train_images.classes, keys)
    table = models.quantize_model(copy.deepcopy(base), config.image_size)
    environment = SharedEnvironment(table, config.budget, config.size_budget)
    stages, out = open_run(config, keys), Path(config.out)
    sizes = f"{len(train_images)} training, {len(search_images)} search and {len(test_images)} test images"
    print(f"{config.dataset}: {sizes}; {config.arch}, sigma {config.sigma:g}; run folder {out}")
    stages.watch(base)

    # 1: the float base classifier f
    train_base(base, train_images, config, base_file, stages)
    # 2: FullRobustCertify(f) on the search images
    cache = certify_search_images(base, search_images, config, out / "search_cache.pt", stages)
    # 3: Algorithm 1
    evaluate = policy_evaluator(base, train_images, search_images, config)
    records = run_search(environment, evaluate, cache, config, out / "search.jsonl", stages)
    policy = best_policy(records)
    write_whole(out / "policy.json", policy)
    # 4: the best policy is fine-tuned and packed
    finetune_and_pack(evaluate.quantize(policy), table, train_images, config, out / "model.arq", stages)
    # 5: what was packed is certified from scratch; the test images are first seen here
    network = integers(models.load_model(out / "model.arq")[0], config)
    stages.watch(network)
    rows = {}
    for label, classifier, name in (("the base", base, "base_"), ("ARQ", network, "")):
        place = out / f"{name}certificates.tsv"
        stage = f"certify {label}, test images"
        rows[label] = certify_images(stage, classifier, test_images, config, place, stages)

    acr = certify.average_certified_radius(cache.certificates), max(record["acr"] for record in records)
    results = summarize(rows["ARQ"], network, table, policy, config, out / "model.arq", acr[1])
    floats = models.float_policy(table)
    results["base"] = summarize(rows["the base"], base, table, floats, config, base_file, acr[0])
    difference = certify.acr_difference(rows["ARQ"], rows["the base"])
    results["acr_difference"] = {"mean": difference[0], "standard_error": difference[1]}
    report(results, policy, config, stages)


def evaluate_saved(config: Config) -> None:
    """--evaluate: certify a saved network, quantized (model.arq) or a float checkpoint, on test images."""
    file = Path(config.evaluate)
    images = load_split(config, False)
    keys = stage_keys(config, EVALUATION, images, images)
    if models.read_packed(file):
        classifier, table, saved = models.load_model(file)
        policy = saved["policy"]
        if saved["classes"] != images.classes:
            raise ValueError(
                f"--evaluate {file} has classes {saved['classes'][:3]} ..., these images "
                f"{images.classes[:3]} ...; give its --data"
            )
    else:
        classifier, _ = build_base(dataclasses.replace(config, checkpoint=str(file)), images.classes, keys)
        table = models.quantize_model(classifier, config.image_size)
        policy = models.float_policy(table)
    images = images.subset(evenly_spaced(config.images, len(images)))
    stages = open_run(config, keys)
    network = integers(classifier, config)
    stages.watch(network)
    place = Path(config.out) / "certificates.tsv"
    rows = certify_images("certify", network, images, config, place, stages)
    report(summarize(rows, network, table, policy, config, file, None), policy, config, stages)


def stage_keys(
    config: Config, stages: dict, train_images: ImageSet, test_images: ImageSet
) -> dict[str, dict]:
    """For each stage the options that its outcome rests on; files and images by their contents."""
    values = dataclasses.asdict(config)
    for name in ("checkpoint", "evaluate"):
        if values[name] is not None:
            values[name] = f"file {digest(Path(values[name]).read_bytes())}"
    values["data"] = f"images {train_images.fingerprint()}"
    options = {f.name: f.metadata["groups"] for f in dataclasses.fields(Config)}
    keys = {
        stage: {name: values[name] for name in options if options[name] & groups}
        for stage, groups in stages.items()
    }
    for stage, groups in stages.items():
        if "test" in groups:
            keys[stage]["data (test)"] = f"images {test_images.fingerprint()}"
    return keys


def open_run(config: Config, keys: dict[str, dict]) -> Stages:
    """The run folder, new or one to be continued. Raises ValueError, before anything is written."""
    out = Path(config.out)
    if out.exists() and not (out / "state.pt").exists():
        if not out.is_dir() or any(entry.suffix != ".part" for entry in out.iterdir()):
            raise ValueError(f"--out {out} is not empty and holds no run of this program; give another --out")
    stages = Stages(out / "state.pt", keys, config.restart)
    gather(None)  # every process has seen the folder as it was
    write_whole(stages.path, stages.records)  # what is forgotten must not come back
    write_whole(out / "config.json", dataclasses.asdict(config))
    return stages


def build_base(config: Config, classes: list[str], keys: dict[str, dict]) -> tuple[Classifier, Path]:
    """The float base classifier, trained already or not, and its file: --checkpoint, or one for all runs
    of equal base options."""
    of = config.arch, len(classes), config.mean, config.std
    if config.checkpoint is not None:
        return prepare(models.load_base_checkpoint(config.checkpoint, *of), config), Path(config.checkpoint)
    key = digest(json.dumps(keys["train the base"]).encode())
    file = Path("runs/bases", f"{config.dataset}-{config.arch}-sigma{config.sigma:g}-{key}.pt")
    torch.manual_seed(config.seed)
    base = models.build_classifier(*of)
    if config.pretrained and RANK == 0 and not file.exists():  # training hands rank 0's weights to all
        models.load_pretrained(base, config.arch)
    return prepare(base, config), file


def train_base(base: Classifier, images: ImageSet, config: Config, file: Path, stages: Stages) -> None:
    """Train the base classifier, in place, or load it from its file."""
    if config.checkpoint is not None:
        return

    def work(state, save):
        steps = config.epochs * (len(images) // config.batch_size)
        lr = FINETUNE_LR if config.pretrained else BASE_LR
        train(base, images, config, steps, lr, "base", BASE_DECAY, state, save)
        return base.state_dict()

    stages.do("train the base", file, work, shared=True)
    base.load_state_dict(read_state(file))


def certify_search_images(
    base: Classifier, images: ImageSet, config: Config, file: Path, stages: Stages
) -> ReplayCache:
    """FullRobustCertify(f) on the search images."""
    g = smooth(base, images, config, "search")
    x = images.batch(device=config.device)

    def certify_block(part: slice):
        sizes = config.n0, config.search_n, config.alpha
        cache = g.certify_and_cache(x[part], images.labels[part], images.ids[part], *sizes)
        return [vars(row) for row in cache.certificates], cache.predictions

    def work(state, save):
        done = state or []
        reached = sum(len(rows) for rows, _ in done)
        for results in in_blocks(len(images), reached, 10_000 // config.search_n, certify_block):
            done += results
            save(done)
        return done

    stages.do("certify the base, search images", file, work)
    done = read_state(file)
    rows = [certify.Certificate(**row) for rows, _ in done for row in rows]
    if not any(row.radius for row in rows):
        raise ValueError(
            "the base certifies none of the search images; give one trained with noise "
            "(--checkpoint), more --epochs or a lower --sigma"
        )
    predictions = torch.cat([predictions for _, predictions in done])
    return ReplayCache(rows, predictions, certify.estimate_key(g.key, config.search_n))


def policy_evaluator(
    base: Classifier, train_images: ImageSet, search_images: ImageSet, config: Config
) -> PolicyEvaluator:
    """Quantize a copy of the base, calibrate it, and choose the reward's certificate."""
    classifier = copy.deepcopy(base)  # with the hook that counts passes
    models.quantize_model(classifier, config.image_size)
    calibrate(classifier, search_images, config)
    x = search_images.batch(device=config.device)

    def finetune(quantized: nn.Module) -> None:
        train(quantized, train_images, config, config.finetune_steps, EPISODE_LR, "episode")

    def certificate(quantized: nn.Module, cache: ReplayCache) -> list[float]:
        # Images of wrong class cost nothing: every process gets as many of the others.
        rows = cache.certificates
        mine = sorted(range(len(rows)), key=lambda i: rows[i].selected != rows[i].label)[RANK::WORLD]
        part = ReplayCache([rows[i] for i in mine], cache.predictions[mine], cache.key)
        g = smooth(integers(quantized, config), search_images, config, "search")
        if config.reward == "estimate":
            radii = g.estimate_radii(x[mine], part, config.n_p).tolist()
        else:
            found = g.certify_incremental(x[mine], part, config.n_p, config.alpha_zeta, config.gamma)
            radii = [row.radius for row in found]
        return sum(gather(radii), [])

    return PolicyEvaluator(classifier, finetune, certificate)


def run_search(
    environment: BitWidthEnvironment,
    evaluate: PolicyEvaluator,
    cache: ReplayCache,
    config: Config,
    log: Path,
    stages: Stages,
) -> list[dict]:
    """Algorithm 1 with a line per episode, printed and in `log`; an interrupted one continues."""
    warmup = min(20, max(1, config.episodes // 3))
    settings = DDPGConfig(episodes=config.episodes, warmup_episodes=warmup)
    agent = DDPG(environment.state_size, config.seed, settings)

    def lines(records: list[dict]) -> bytes:
        return "".join(json.dumps(record) + "\n" for record in records).encode()

    def work(state, save):
        records = state["records"] if state else []
        if records:
            agent.load_state_dict(state["agent"])
        write_whole(log, lines(records))
        first, start = len(records), time.monotonic()
        began = start
        for record in search(lambda: cache, environment, agent, evaluate):
            record["random"] = record["episode"] < warmup
            record["bitops_ratio"] = models.bitops_ratio(environment.table, record["policy"])
            record["size_bytes"] = models.size_bytes(environment.table, record["policy"])
            record["seconds"] = round(time.monotonic() - began, 3)
            began = time.monotonic()
            records.append(record)
            if RANK == 0:
                with log.open("ab") as file:
                    file.write(lines([record]))
            save({"agent": agent.state_dict(), "records": records})
            done = len(records)
            left = (time.monotonic() - start) / (done - first) * (config.episodes - done)
            best = max(record["acr"] for record in records)
            print(
                f"  episode {done:>3}/{config.episodes}  ACR {down(record['acr'])}  "
                f"reward {record['reward']:+.4f}  BitOPs {100 * record['bitops_ratio']:.3f} %  "
                f"best ACR {down(best)}  {duration(left)} left",
                flush=True,
            )
        return lines(records)

    stages.do("search", log, work)
    return [json.loads(line) for line in log.read_text().splitlines()]


def finetune_and_pack(
    classifier: nn.Module, table: list[Layer], images: ImageSet, config: Config, file: Path, stages: Stages
) -> None:
    """Fine-tune the quantized classifier, in place, and write its integers."""

    def work(state, save):
        steps = int(config.finetune_epochs * (len(images) // config.batch_size))
        train(classifier, images, config, steps, FINETUNE_LR, "fine-tune", state=state, save=save)
        description = {name: getattr(config, name) for name in SAVED_OPTIONS}
        return models.pack_model(classifier, table, {**description, "classes": images.classes})

    stages.do("fine-tune", file, work)


def certify_images(
    stage: str, network: nn.Module, images: ImageSet, config: Config, file: Path, stages: Stages
) -> list[certify.Certificate]:
    """CERTIFY on test images, a line per image in `file`; finished blocks are kept."""
    purpose = "base certificate" if file.name.startswith("base") else "certificate"
    g = smooth(network, images, config, purpose)
    backend = getattr(network, "backend", "float")

    def certify_block(part: slice) -> list[certify.Certificate]:
        x = images.batch(range(len(images))[part], config.device)
        return g.certify(x, images.labels[part], images.ids[part], config.n0, config.n, config.alpha)

    def text(rows) -> bytes:
        buffer = io.StringIO()
        certify.write_certificates(buffer, rows)
        return buffer.getvalue().encode()

    def work(state, save):
        done, begun = state or (0, backend)
        if begun != backend:
            raise ValueError(f"{file} was begun on backend {begun}, here it is {backend}; give a new --out")
        rows = certify.read_certificates(file)[:done] if done else []
        write_whole(file, text(rows))  # without rows of an unfinished block
        for results in in_blocks(len(images), len(rows), 5_000 // config.n, certify_block):
            new = sum(results, [])
            if RANK == 0:
                with file.open("a") as table:
                    certify.write_certificates(table, new)
            rows += new
            save((len(rows), backend))
        return text(rows)

    stages.do(stage, file, work)
    return certify.read_certificates(file)


def in_blocks(total: int, done: int, block: int, work: Callable[[slice], object]) -> Iterator[list]:
    """work(part) on blocks of images, one per process at a time. Yields each round's results, in order.

    Blocks, and with them batches, depend neither on the number of processes nor on interruptions.
    """
    block = max(1, block)
    for first in progress("certifying", "images", done, total, block * WORLD):
        start = first + RANK * block
        results = gather(work(slice(start, min(start + block, total))) if start < total else None)
        yield [result for result in results if result is not None]


def smooth(network: nn.Module, images: ImageSet, config: Config, purpose: str) -> Smooth:
    return Smooth(network, len(images.classes), config.sigma, config.seed, config.eval_batch, purpose)


def prepare(classifier: Classifier, config: Config) -> Classifier:
    """On the device, in evaluation mode, in the memory layout that convolutions run fastest in."""
    return classifier.to(config.device, memory_format=torch.channels_last).eval()


def integers(classifier: Classifier, config: Config) -> nn.Module:
    """The network as it is evaluated. On a GPU its sums are checked at the batch that will run."""
    batch = 2 if config.device == "cpu" else config.eval_batch
    return models.integer_network(prepare(classifier, config), batch)


def calibrate(classifier: Classifier, images: ImageSet, config: Config) -> None:
    """Step sizes and signs from up to 256 noisy images, spread over the given ones."""
    x = images.batch(evenly_spaced(min(256, len(images)), len(images)), config.device)
    generator = torch.Generator(x.device).manual_seed(config.seed)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    models.calibrate(classifier, (x + config.sigma * noise).split(50))  # whatever --eval-batch is


# ---- reports ----


def summarize(
    rows, network: nn.Module, table, policy: Policy, config: Config, file: Path, search_acr
) -> dict:
    """What results.json says of a network and its file; one-sided radii unless named."""
    both_sides = certify.two_sided(rows)
    return {
        "acr": certify.average_certified_radius(rows),
        "accuracy": certify.certified_accuracy(rows, 0),
        "acr_standard_error": certify.acr_difference(rows)[1],
        "certified_accuracy": {str(radius): certify.certified_accuracy(rows, radius) for radius in RADII},
        "abstained": sum(row.predict == certify.ABSTAIN for row in rows) / len(rows),
        "two_sided": {
            "acr": certify.average_certified_radius(both_sides),
            "accuracy": certify.certified_accuracy(both_sides, 0),
        },
        "bitops_ratio": models.bitops_ratio(table, policy),
        "size_bytes": models.size_bytes(table, policy),
        "file_bytes": file.stat().st_size,
        "network": digest(file.read_bytes()),
        "backend": getattr(network, "backend", "float"),
        "search_acr": search_acr,
        "images": len(rows),
        "expected_false_certificates": config.alpha * len(rows),
        **{name: getattr(config, name) for name in ("sigma", "n0", "n", "alpha", "device")},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def down(value: float | None) -> str:
    """Four decimals, rounded towards zero: a printed radius never exceeds the certified one."""
    return "-" if value is None else f"{math.floor(value * 1e4) / 1e4:.4f}"


def report(results: dict, policy: Policy, config: Config, stages: Stages) -> None:
    """Write results.json; print float base and ARQ side by side, and the policy, one line per layer."""
    out = Path(config.out)
    write_whole(out / "results.json", {**results, "stages": stages.times()})
    columns = {"float base": results["base"], "ARQ": results} if "base" in results else {"network": results}
    print(
        f"\n{config.dataset}, {config.arch}, sigma {config.sigma:g}: {results['images']} test images, "
        f"n0 = {config.n0}, n = {config.n}; one-sided radii unless named; alpha = {config.alpha:g} per image, "
        f"so at most {results['expected_false_certificates']:g} false certificates are expected\n"
    )
    rows = {
        "accuracy (certified, radius 0)": lambda r: down(r["accuracy"]),
        **{
            f"certified accuracy at {radius}": lambda r, radius=radius: down(
                r["certified_accuracy"][str(radius)]
            )
            for radius in RADII[1:]
        },
        "average certified radius (ACR)": lambda r: down(r["acr"]),
        "  standard error over images": lambda r: f"{r['acr_standard_error']:.4f}",
        "ACR of two-sided radii": lambda r: down(r["two_sided"]["acr"]),
        "ACR on the search images": lambda r: down(r["search_acr"]),
        "abstained": lambda r: f"{r['abstained']:.4f}",
        "BitOPs, % of float": lambda r: f"{100 * r['bitops_ratio']:.4f}",
        "weights, bytes (their bits)": lambda r: f"{r['size_bytes']:,}",
        "file, bytes": lambda r: f"{r['file_bytes']:,}",
        "backend": lambda r: r["backend"],
    }
    print(f"{'':<34}" + "".join(f"{name:>14}" for name in columns))
    for label, text in rows.items():
        print(f"{label:<34}" + "".join(f"{text(column):>14}" for column in columns.values()))
    if "acr_difference" in results:
        mean, error = results["acr_difference"].values()
        print(f"ACR less the base's, on the same images: {mean:+.4f}, standard error {error:.4f}")
    print(f"\n{'layer':<26}{'weights':>9}{'input':>9}   (bits)")
    for name, (w_bits, a_bits) in policy.items():
        print(f"{name:<26}{w_bits:>9}{a_bits:>9}")
    print(f"\nwritten to {out}/", flush=True)


def main(argv=None) -> int:
    # glibc returns freed blocks to the system; faulting them in again costs 20 % of an evaluation.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**30)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
    out, code = "the run folder", 2
    try:
        config = parse_config(argv)
        out = config.out
        if WORLD > 1:
            join_processes(config)
        evaluate_saved(config) if config.evaluate else run(config)
        return 0
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command continues the run"
    except ValueError as error:  # ours, and the modules' own refusals of files and policies
        message = f"error: {error}"
    except OSError as error:  # no permission, no space: whatever was finished is on disk
        message = f"error: {error.filename or out}: {error.strerror or error}; the same command continues"
    except RuntimeError as error:  # what comes from outside; other kinds are faults of this program
        known = "DataLoader worker", "by peer", "Broken pipe", "NCCL", "device ordinal", "memory", "are exact"
        if not any(text in str(error) for text in known):
            raise
        message = f"error: {str(error).splitlines()[0]}; the same command continues, if memory suffices"
    time.sleep(3 * (RANK > 0))  # only rank 0 prints the error that all have; then torchrun ends the others
    print(f"arq.py: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
