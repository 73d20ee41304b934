"""ARQ: mixed-precision quantization that keeps a network's certified robustness.

    python arq.py                                                 # offline, minutes on two cores
    python arq.py --dataset cifar10 --sigma 0.25 --budget 0.015   # the paper's setting

Paper: "ARQ: A Mixed-Precision Quantization Framework for Accurate and Certifiably Robust DNNs",
arXiv 2410.24214; the README puts its symbols beside the code.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from zipfile import is_zipfile

import torch
import torchvision
from torch import Tensor, distributed as dist, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.datasets.folder import Image  # PIL's, which comes with torchvision
from torchvision.transforms.v2 import functional as TF

import certify
import models
from certify import Certificate, ReplayCache, Smooth
from ddpg import DDPG, DDPGConfig
from models import NETWORKS, Classifier, Layer, Policy, refuse


# ---- Algorithm 1 ----
class BitWidthEnvironment:
    """An episode walks the layers; each takes two actions, one for its weights, one for its input (HAQ, 3.2).
    A state (10,) holds, in [0, 1]: index, c_in, c_out, kernel, stride, input map size, number of weights,
    depthwise flag, weight-or-input flag, previous bit-width. First and last layer keep 8 bits, unvisited."""

    def __init__(self, table: list[Layer], budget: float):
        models.enforce_budget(table, models.uniform_policy(table, models.MIN_BITS), budget)
        refuse(len(table) < 3, "no layer is left between the first and the last, which keep 8 bits")
        self.table, self.budget = table, budget
        self.steps = [(layer, kind) for layer in table[1:-1] for kind in (0, 1)]  # weights, input
        rows = [[i // 2, *row[1:7], row.depthwise, kind] for i, (row, kind) in enumerate(self.steps)]
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
        states, actions, previous = [], [], 1.0
        for features, (layer, kind) in zip(self.features, self.steps):
            state = torch.cat([features, torch.tensor([previous])])
            action = act(state)
            policy[layer.name][kind] = self.bits(action)
            previous = policy[layer.name][kind] / models.MAX_BITS
            states.append(state)
            actions.append(action)
        policy = models.enforce_budget(self.table, policy, self.budget)
        return torch.stack(states), torch.tensor(actions)[:, None], policy


class PolicyEvaluator:
    """ACR(g^P) of a policy P: quantize f, fine-tune briefly, certify. Each starts from the same weights.
    classifier: f, or another start; quantizable and calibrated (models.quantize_model, models.calibrate)
    finetune(classifier): trains it for a few steps, in place
    certificate(classifier, cache): radii of g^P on the images of f's cache, 0 where wrong"""

    def __init__(self, classifier: nn.Module, finetune: Callable, certificate: Callable):
        self.classifier, self.finetune, self.certificate = classifier, finetune, certificate
        self.base_state = copy.deepcopy(classifier.state_dict())

    def quantize(self, policy: Policy) -> nn.Module:
        self.classifier.load_state_dict(self.base_state)
        models.set_policy(self.classifier, policy)
        return self.classifier

    def __call__(self, policy: Policy, cache: ReplayCache) -> float:
        quantized = self.quantize(policy)
        self.finetune(quantized)
        if not all(value.isfinite().all() for value in quantized.state_dict().values()):
            return 0.0  # it diverged: there is nothing to certify
        return statistics.fmean(self.certificate(quantized, cache))


def search(certify_base, environment, agent, evaluate) -> Iterator[dict]:
    """Algorithm 1: a record per episode. The agent's count of episodes says where it starts. certify_base():
    f's ReplayCache; environment: BitWidthEnvironment; agent: like DDPG; evaluate(policy, cache): ACR(g^P)"""
    # 1: FullRobustCertify(f); `run` has done it as its step 2
    cache = certify_base()
    base_acr = certify.average_certified_radius(cache.certificates)
    # 2: for each episode
    while agent.episode < agent.config.episodes:
        episode, noise = agent.episode, agent.noise
        # 3: the agent emits bit-widths layer by layer; the policy is forced under the budget
        states, actions, policy = environment.rollout(agent.act)
        # 4: quantize f with it, fine-tune, IncrementalRobustCertify
        acr = evaluate(policy, cache)
        # 5: the agent learns from the reward, (ACR(g^P) - ACR(g)) / ACR(g)
        reward = (acr - base_acr) / base_acr
        agent.learn(states, actions, reward)
        yield {"episode": episode, "acr": acr, "reward": reward, "noise": noise, "policy": policy}


def best_policy(records: list[dict]) -> Policy:
    """6, the last line: the policy of the largest ACR; `run` fine-tunes it and certifies it from scratch.
    If some records are of finalists, evaluated again by `search_policies`, it is the best of those."""
    finalists = [record for record in records if record.get("finalist")]
    return max(finalists or records, key=lambda record: record["acr"])["policy"]


# ---- training ----
BASE_LR, BASE_DECAY = 0.2, 5e-4
EPISODE_LR, FINETUNE_LR = 0.005, 0.02
AUTOCAST_DEVICES = ("cuda", "cpu") if torch.cpu._is_avx512_bf16_supported() else ("cuda",)  # to bfloat16


def augment(images: Tensor, uniform: Tensor) -> Tensor:
    """Shift images (B, C, H, W) by up to an eighth of the side, and flip them, as uniform (3, B) says."""
    count, _, height, width = images.shape
    pad = max(1, height // 8)
    top, left = (uniform[:2, :, None] * (2 * pad + 1)).long()
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(uniform[2, :, None] < 0.5, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)  # B, H, W, C
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def noise_augmentation(network, x, noise, labels, teacher=None, share=0.0) -> Tensor:
    """Cross-entropy (B,) under Gaussian noise (Cohen et al., section 3.3). A share of the targets is a
    teacher's softmax on the same images under other noise, on average its smoothed classifier's answer."""
    if share > 0:
        with torch.no_grad():
            answers = teacher(x + noise.roll(1, 0)).float().softmax(1)  # the noise of another image
        labels = share * answers + (1 - share) * F.one_hot(labels, answers.shape[1])
    return F.cross_entropy(network(x + noise).float(), labels, reduction="none")


def train(classifier, images, config, steps, lr, purpose="", decay=1e-4, state=None, save=None, loss=None):
    """In place: `steps` batches of an ImageSet by Nesterov SGD, whose rate rises over a fifth and falls along
    a cosine; weight decay spares steps, biases and BatchNorm. config: seed, sigma, batch_size, float32. loss:
    as noise_augmentation, the default. Equal arguments train equal networks. save(state) is called per epoch;
    from such a state an interrupted call continues. Under torchrun each process takes a share of every batch,
    as BatchNorm sees it. AUTOCAST_DEVICES use bfloat16, but for steps. An infinite loss raises ValueError."""
    device, batch_size = next(classifier.parameters()).device, config.batch_size
    decayed = [p for p in classifier.parameters() if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": decay}]
    groups += [{"params": [p for p in classifier.parameters() if p.ndim <= 1]}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    if state is not None:
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
    first = state["step"] if state else 0
    network = DistributedDataParallel(classifier) if WORLD > 1 else classifier
    classifier.train()
    labels, fast = torch.tensor(images.labels), device.type in AUTOCAST_DEVICES and not config.float32
    loss = loss or noise_augmentation
    epoch = len(images) // batch_size
    seed = hashlib.sha256(f"{config.seed}|{purpose}".encode()).digest()
    count = progress(purpose if save else "", "batches", first, steps)
    for start in range(first, steps, epoch):
        torch.manual_seed(int.from_bytes(seed[:4], "little") + start // epoch)
        # What is random is drawn for whole batches: it does not depend on the number of processes.
        batches = torch.randperm(len(images)).split(batch_size)[: min(epoch, steps - start)]
        batches = [batch[RANK::WORLD] for batch in batches]
        for chosen, pixels, step in zip(batches, images.batches(batches), count):
            rise, fall = (step + 1) / (0.2 * steps + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(rise, fall)
            uniform = torch.rand(3, batch_size)[:, RANK::WORLD]
            x = augment(pixels.to(device), uniform).float() / 255
            noise = torch.randn(batch_size, *x.shape[1:], device=device)[RANK::WORLD]
            with torch.autocast(device.type, torch.bfloat16, enabled=fast):
                losses = loss(network, x, config.sigma * noise, labels[chosen].to(device))
            optimizer.zero_grad()
            (WORLD * losses.sum() / batch_size).backward()  # processes average their gradients
            optimizer.step()
        if save is not None:
            finite = losses.isfinite().all()
            refuse(not finite, f"{purpose}: the loss is not finite at step {step + 1}; try another --seed")
            parts = {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict()}
            save(parts | {"step": step + 1})
    next(count, None)
    for buffer in classifier.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)  # BatchNorm's statistics are each process's own
    classifier.eval()


# ---- options: from here on plumbing, which a reader of the method may skip ----
WORLD = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1  # torchrun's processes
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0  # of this process; rank 0 writes and prints
WORKERS = max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
SIZES = {"shapes": 0, "cifar10": 1, "folder": 1, "imagenet": 2}  # which of three defaults a dataset has
STAGES = {  # and the groups of options that each one's outcome rests on
    "train the base": "base",
    "certify the base, search images": "base cache",
    "search": "base cache search",
    "fine-tune": "base cache search fine-tune",
    "certify the base, test images": "base test",
    "certify ARQ, test images": "base cache search fine-tune test",
}
read_state = partial(torch.load, map_location="cpu", weights_only=True)
SAVED_OPTIONS = ("dataset", "arch", "image_size", "sigma")  # in the file of a network


def option(text: str, default=None, groups: str = "", least=None, below=None, **parser):
    """A field of Config: one default or three, by SIZES; groups of stages that rest on it; its range."""
    shown = " / ".join(map(str, default)) if isinstance(default, tuple) else default
    shown = f" (default: {shown})" if default is not None and default is not False else ""
    metadata = {"default": default, "groups": groups.split(), "least": least, "below": below}
    metadata["parser"] = {"help": text + shown, **parser}
    return dataclasses.field(default=None if isinstance(default, tuple) else default, metadata=metadata)


@dataclasses.dataclass
class Config:  # every option; the command line is made from it
    dataset: str = option("shapes (drawn here; default) or as named", None, "base", choices=SIZES)
    data: str = option("where the images are, or where CIFAR-10 is downloaded to", "data", "base")
    arch: str = option("network", ("resnet8", "resnet20", "resnet50"), "base evaluate", choices=NETWORKS)
    checkpoint: str = option("float base classifier, trained with noise; else one is trained", None, "base")
    pretrained: bool = option("train the base from torchvision's weights, downloaded", False, "base")
    mean: list = option("normalisation, such as 0.5 0.5 0.5", None, "base evaluate", type=float, nargs=3)
    std: list = option("likewise", None, "base evaluate", type=float, nargs=3)
    sigma: float = option("noise, in [0, 1] pixels", (0.25, 0.25, 0.25), "base evaluate", below=math.inf)
    budget: float = option("BitOPs allowed, as a fraction of the float network's", 0.015, "search", below=1)
    epochs: int = option("training epochs of the base classifier", (6, 90, 90), "base", 1)
    start: str = option("float network that episodes start from, in place of the base", None, "search")
    episodes: int = option("search episodes, one policy each", (24, 600, 600), "search", 1)
    finetune_steps: int = option("training steps of a policy in its episode", (8, 20, 20), "search", 0)
    finalists: int = option("best policies, all different, that are evaluated again", 5, "search", 0)
    finetune_epochs: float = option("epochs of the best policy", (3.0, 30.0, 10.0), "fine-tune", 0)
    distill: float = option("share of the base's softmax in fine-tuning's targets", 0.0, "fine-tune", 0)
    search_images: int = option("training images held out for the search", (100, 500, 500), "base", WORLD)
    search_n: int = option("samples of the base per search image", (500, 10000, 10000), "cache", 1)
    n_p: int = option("samples of a policy per search image", (200, 1000, 1000), "search", 1)
    images: int = option("test images, evenly spaced over the set", (100, 500, 500), "test", 1)
    n0: int = option("samples that select the class", 100, "cache test", 1)
    n: int = option("samples that bound its probability", (1000, 10000, 10000), "test", 1)
    alpha: float = option("probability of a wrong certificate, per image", 0.001, "cache test", below=0.5)
    alpha_zeta: float = option("the same for the disparity zeta of IRS", 0.001, "search", below=0.5)
    gamma: float = option("p_A from which IRS draws fresh samples", (0.99, 0.99, 0.995), "search", below=1)
    reward: str = option("IRS, or an estimate without a bound", "irs", "search", choices=("irs", "estimate"))
    image_size: int = option("side of the images", (32, 32, 224), "base evaluate", 8)
    batch_size: int = option("training batch", 128, "base", 2 * WORLD)
    float32: bool = option("train in float32 even where bfloat16 is faster", False, "base")
    eval_batch: int = option("samples per forward pass when certifying", None, "", 1)
    workers: int = option("processes that decode image files of over 64 pixels", WORKERS, "", 0)
    seed: int = option("seed of training, search and noise", 0, "base evaluate", 0)
    device: str = option("where to run", "auto", "cache test", choices=("auto", "cuda", "mps", "cpu"))
    out: str = option("run folder (default: named after the options, under runs/)")
    restart: bool = option("do those stages of the run in --out anew whose options differ now", False)
    evaluate: str = option("certify this saved network on the test images, and stop", None, "evaluate")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_config(argv=None) -> Config:
    """Options from the command line, checked and completed. Raises ValueError."""
    about = "Three defaults are those for shapes, for cifar10 and folder, for imagenet."
    parser = argparse.ArgumentParser(allow_abbrev=False, description=about)
    parser.error = lambda message: refuse(True, f"{message} (see --help)")
    for f in dataclasses.fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(flag(f.name), default=f.default, **{**kind, **f.metadata["parser"]})
    return complete_config(Config(**vars(parser.parse_args(argv))))


def complete_config(config: Config) -> Config:
    """Fill in what is left open and refuse what cannot work, before any data is touched."""
    for name in ("checkpoint", "start", "evaluate"):
        file = getattr(config, name)
        refuse(file is not None and not Path(file).is_file(), f"{flag(name)} {file}: no such file")
    packed = models.read_packed(config.evaluate) if config.evaluate else None
    saved = {name: packed[0][name] for name in SAVED_OPTIONS} if packed else {}
    for name in ("arch", "image_size", "mean", "std") if packed else ():
        differs = getattr(config, name) not in (None, packed[0][name])
        refuse(differs, f"--evaluate {config.evaluate} has {flag(name)} {packed[0][name]}; omit it")
    config.dataset = config.dataset or saved.get("dataset", "shapes")
    for f in dataclasses.fields(Config):
        if isinstance(f.metadata["default"], tuple) and getattr(config, f.name) is None:
            usual = f.metadata["default"][SIZES.get(config.dataset, 1)]
            setattr(config, f.name, saved.get(f.name, usual))
    has_none = config.pretrained and (config.checkpoint or NETWORKS[config.arch][1] is models.CIFAR10)
    refuse(has_none, "--pretrained is for mobilenet_v2 and such, without --checkpoint")
    best = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    config.device = best if config.device == "auto" else config.device
    refuse(config.device not in (best, "cpu"), f"--device {config.device} is not available; use auto")
    if config.eval_batch is None:  # small batches stay in a CPU's cache; a GPU wants large ones
        samples = 50 if config.device == "cpu" else 2000
        config.eval_batch = max(8, samples * 32**2 // max(config.image_size, 32) ** 2)
    for f in dataclasses.fields(Config):
        value, least, below = getattr(config, f.name), f.metadata["least"], f.metadata["below"]
        inside = 0 < value < below if below else least is None or least <= value < 2**31
        wanted = f"above 0 and below {below}" if below else f"at least {least} and below 2^31"
        refuse(not inside, f"{flag(f.name)} must be {wanted}, not {value}")
    needed = math.floor(math.log(config.alpha) / math.log(0.5)) + 1  # samples that certify if all agree
    for name in ("n", "search_n", "n_p"):
        n = getattr(config, name)
        refuse(n < needed, f"{flag(name)} {n} never certifies; give at least {needed}")
    refuse(config.distill > 1, f"--distill is a share of 1, not {config.distill}")
    refuse(config.n_p > config.search_n, f"--n-p {config.n_p} exceeds --search-n {config.search_n}")
    if config.out is None:
        file = Path(config.evaluate or "").resolve()
        source = f"evaluate-{file.parent.name}-{file.stem}" if config.evaluate else f"budget{config.budget:g}"
        config.out = f"runs/{config.dataset}-{config.arch}-sigma{config.sigma:g}-{source}-seed{config.seed}"
    return config


# ---- progress, files and stages ----
def progress(label: str, unit: str, done: int, total: int, block: int = 1) -> Iterator[int]:
    """Count from `done` to `total` in blocks. On a terminal, one line shows rate and time left meanwhile."""
    start, shown = time.monotonic(), 0.0
    on_terminal = bool(label) and sys.stderr.isatty() and RANK == 0
    for first in range(done, total, block):
        yield first
        now, reached = time.monotonic(), min(first + block, total)
        if on_terminal and now - shown > 0.2:
            shown, rate = now, (reached - done) / max(now - start, 1e-9)
            left = timedelta(seconds=round((total - reached) / rate))
            text = f"{label}: {reached}/{total} {unit}, {rate:.3g}/s, {left} left"
            print(f"\r  {text:<90}", end="", file=sys.stderr, flush=True)
    if on_terminal:
        print("\r" + " " * 92 + "\r", end="", file=sys.stderr, flush=True)


def digest(data: bytes) -> str:
    """A short name for these bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def write_whole(path: Path, value) -> str | None:
    """Rank 0 writes a JSON, torch or packed file, whole or not at all, and returns its digest."""
    if RANK > 0:
        return None
    if path.suffix == ".json":
        value = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
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
    return digest(value)


def hold(path: Path):
    """A file that keeps path for this process while it is open. Raises ValueError if another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".lock").open("a")
    if RANK == 0 and os.name == "posix":
        import fcntl  # Windows has none, and no lock

        try:  # lockf is seen over NFS, ends with the process, and is not handed to workers
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # of other kinds where a file system has no locks
            refuse(type(error) in (BlockingIOError, PermissionError), f"another process is at work on {path}")
    return file


def gather(value) -> list:
    """Every process's value, by rank, in every process; waits for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


class Stages:
    """What the stages of a run have reached, in one file: the same command continues after the last save.
    keys: what a stage depends on. One begun with another raises ValueError or, with restart, is forgotten."""

    def __init__(self, path: Path, keys: dict[str, dict], restart: bool = False):
        self.path, self.keys, self.passes, self.held = path, keys, 0, hold(path)
        refuse(path.exists() and not is_zipfile(path), f"{path} is broken; give another --out")
        self.records = read_state(path) if path.exists() else {}
        for name, record in list(self.records.items()):
            old, new = record["key"], keys.get(name, {})
            differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            texts = [f"{flag(key)} {old.get(key)} there, {new.get(key)} here" for key in differ[:4]]
            where = f"{path.parent} holds another run, from '{name}' on: {'; '.join(texts)}"
            refuse(differ and not (restart and name in keys), f"{where}; give another --out, or --restart")
            if differ:
                del self.records[name]

    def do(self, name: str, product: Path, work: Callable, shared: bool = False) -> None:
        """Make the file `product` of what work(state, save) returns, unless finished (or shared and there).
        state: what `work` last gave to save, which all processes call. Dependents of another product go."""
        record = self.records.get(name)
        made = digest(product.read_bytes()) if product.exists() else None
        if made and record and record["finished"] and record["product"] != made and not shared:
            print(f"{name}: {product} was changed since it was made, and is made again", flush=True)
            made = None
        used = all(gather(made)) and (is_zipfile(product) if shared else record and record["finished"])
        self.sharing = hold(product) if shared and not used else None
        if not record or (record["finished"] and not used):
            old = record and record["product"]
            record = {"key": self.keys[name], "seconds": 0.0, "forward_passes": 0, "product": old}
            self.records[name] = record = record | {"state": None, "finished": False}

        def save(state, finished: bool = False) -> None:
            nonlocal since
            record["seconds"] += time.monotonic() - since
            record["forward_passes"] += sum(gather(self.passes))
            record.update(state=state, finished=finished)
            self.passes, since = 0, time.monotonic()
            write_whole(self.path, self.records)

        self.passes, since = 0, time.monotonic()
        if used:
            print(f"{name}: finished earlier, used again", flush=True)
            if record["finished"] and record["product"] == made:
                return
        else:
            print(f"{name} ..." if record["state"] is None else f"{name}, continued ...", flush=True)
            self.path.with_name("results.json").unlink(missing_ok=True)
            write_whole(self.path, self.records)  # before the product changes
            made = gather(write_whole(product, work(record["state"], save)))[0]
        if record["product"] not in (None, made):
            for other in [other for other in self.keys if set(self.keys[name]) < set(self.keys[other])]:
                self.records.pop(other, None)
        record["product"] = made
        save(None, finished=True)

    def watch(self, classifier: nn.Module) -> nn.Module:
        """Count the images that pass through this network, or through copies made of it from now on."""

        def count(module, inputs):
            self.passes += len(inputs[0])

        classifier.register_forward_pre_hook(count)
        return classifier


def open_run(config: Config, stages: dict[str, str], images: "ImageSet", test_images: "ImageSet") -> Stages:
    """The run folder, new or one to be continued. Raises ValueError before anything is written."""
    values = dataclasses.asdict(config)
    values["data"], values["data (test)"] = images.fingerprint(), test_images.fingerprint()
    for name in ("checkpoint", "start", "evaluate"):
        values[name] = values[name] and f"file {digest(Path(values[name]).read_bytes())}"
    groups = {f.name: f.metadata["groups"] for f in dataclasses.fields(Config)} | {"data (test)": ["test"]}
    keys = {}
    for stage, needed in stages.items():
        names = [name for name in groups if set(groups[name]) & set(needed.split())]
        keys[stage] = {name: values[name] for name in names} | {"program": 3}  # others trained otherwise
    out = Path(config.out)
    if out.exists() and not (out / "state.pt").exists():
        if not out.is_dir() or any(entry.suffix not in (".part", ".lock") for entry in out.iterdir()):
            raise ValueError(f"--out {out} is not empty and holds no run of this program; give another --out")
    opened = Stages(out / "state.pt", keys, config.restart)
    gather(None)  # every process has seen the folder as it was
    write_whole(opened.path, opened.records)  # what is forgotten must not come back
    write_whole(out / "config.json", dataclasses.asdict(config))
    return opened


# ---- images ----
@dataclasses.dataclass
class ImageSet:
    """Labelled images, ordered by label, then by name or original position."""

    labels: list[int]
    classes: list[str]
    size: int
    source: Tensor | list[str]  # pixels, uint8 (N, 3, size, size), or files that are decoded when needed
    workers: int = 0  # processes that decode
    ids: list[int] | None = None  # positions in the whole set, which name the images' noise

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: list[int]) -> "ImageSet":
        """These images; ids keep their positions in the whole set."""
        labels, ids = ([column[i] for i in indices] for column in (self.labels, self.ids or range(len(self))))
        source = self.read(indices) if isinstance(self.source, Tensor) else [self.source[i] for i in indices]
        return dataclasses.replace(self, labels=labels, ids=ids, source=source)

    def read(self, indices) -> Tensor:
        """uint8 images (len(indices), 3, size, size). Raises ValueError."""
        if isinstance(self.source, Tensor):
            return self.source[torch.as_tensor(indices)]
        return torch.stack([read_image(self.source[i], self.size) for i in indices])

    def batch(self, indices, device="cpu") -> Tensor:
        """Float images (len(indices), 3, size, size) in [0, 1]."""
        return self.read(indices).to(device).float().div_(255)

    def batches(self, batches: list) -> Iterator[Tensor]:
        """uint8 images for each indices of many; workers decode ahead, but images too small to hand over."""
        workers = self.workers if isinstance(self.source, list) and self.size > 64 else 0
        # A generator of its own: starting workers must not move the one that training draws from.
        generator = torch.Generator()
        yield from DataLoader(batches, None, collate_fn=self.read, num_workers=workers, generator=generator)

    def fingerprint(self) -> str:
        """A short name for what the set holds, from its classes, labels and a few images."""
        some = self.read(evenly_spaced(min(16, len(self)), len(self)))
        return digest(json.dumps([self.classes, self.labels, self.size]).encode() + some.numpy().tobytes())


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` indices of a set of `total`, evenly spaced from the first."""
    return [i * total // count for i in range(count)]


def hold_out(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """The held-out split: training images, and `count` evenly spaced ones that only the search sees."""
    held = evenly_spaced(count, len(images))
    rest = sorted(set(range(len(images))) - set(held))
    return images.subset(rest), images.subset(held)


def read_image(path: str, size: int) -> Tensor:
    """RGB uint8 (3, size, size): shorter side resized, centre cropped, no EXIF turn. Raises ValueError."""
    try:
        with Image.open(path) as file:
            refuse(file.mode[0] in "IF", f"mode {file.mode} has no fixed range: save it with 8 bits")
            image = TF.pil_to_tensor(file.convert("RGB"))
    except Exception as error:  # decoders raise many kinds for broken files
        raise ValueError(f"{path}: no readable image ({str(error)[:80]}); repair or remove it") from None
    if image.shape[1:] != (size, size):
        image = TF.center_crop(TF.resize(image, [size], antialias=True), [size, size])
    return image


def load_images(config: Config, train: bool) -> ImageSet:
    """The training or the test set. Raises ValueError where it is missing or too small for the options."""
    root, size = Path(config.data), config.image_size
    folder = root / ("train" if train else "test" if (root / "test").is_dir() else "val")
    if config.dataset == "shapes":
        images = draw_shapes(8000 if train else 1000, seed=0 if train else 1, size=size)
    elif folder.is_dir():
        found = torchvision.datasets.ImageFolder(folder)
        paths, labels = map(list, zip(*found.samples))
        images = ImageSet(labels, found.classes, size, paths, config.workers)
        if size <= 64 and len(paths) * size**2 < 2**28:  # below 1 GB: decoded once
            images.source = images.read(progress("decoding", "images", 0, len(paths)))
    elif config.dataset == "cifar10":
        try:
            download = not Path(root, "cifar-10-batches-py").is_dir()
            data = torchvision.datasets.CIFAR10(root, train, download=download)
        except Exception:  # network and file errors of many kinds, one remedy
            remedy = "unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there, or an image tree"
            raise ValueError(f"no CIFAR-10 in --data {root}, nor could it be downloaded; {remedy}") from None
        labels, order = torch.tensor(data.targets).sort(stable=True)
        pixels = TF.resize(torch.from_numpy(data.data)[order].permute(0, 3, 1, 2), [size, size])
        images = ImageSet(labels.tolist(), data.classes, size, pixels.contiguous())
    else:
        raise ValueError(f"--data {root}: expected an image tree, {root}/train/<class>/*, and test/ or val/")
    refuse(len(images.classes) < 2, f"--data {root}: at least two classes are needed, there is one folder")
    needed = config.search_images + config.batch_size if train else config.images
    asked = "--search-images and a --batch-size need" if train else "--images"
    refuse(needed > len(images), f"{asked} {needed}: there are only {len(images)} images in this set")
    return images


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
    """Ten classes, each shape of its own place, size, tilt, colour and contrast on a mottled ground."""
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
        image = uniform(0.25, 0.75, k, 3, 1, 1) + mottle + uniform(0.15, 0.45, k, 1, 1, 1) * sign * mask
        pixels.append(image.clamp(0, 1).mul(255).round().to(torch.uint8))
    return ImageSet(labels, list(SHAPES), size, torch.cat(pixels))


# ---- the run ----
def run(config: Config) -> None:
    """The method in five steps. An interrupted one continues, a finished one is used again."""
    images, test_images = load_images(config, True), load_images(config, False)
    differ = sorted(set(images.classes) ^ set(test_images.classes))
    refuse(differ, f"--data {config.data}: classes {differ[:3]} are only in training or only in test")
    train_images, search_images = hold_out(images, config.search_images)
    base = build_base(config, len(images.classes))
    table = models.quantize_model(copy.deepcopy(base), config.image_size)
    environment = BitWidthEnvironment(table, config.budget)
    stages, out = open_run(config, STAGES, images, test_images), Path(config.out)
    counts = f"{len(train_images)} training, {config.search_images} search and {config.images} test images"
    print(f"{config.dataset}: {counts}; {config.arch}, sigma {config.sigma:g}; run folder {out}")
    stages.watch(base)
    start = stages.watch(build_base(config, len(images.classes), config.start)) if config.start else base
    refuse({*start.state_dict()} != {*base.state_dict()}, f"--start {config.start} has other layers")

    # 1: the float base classifier f
    base_file = Path(config.checkpoint or "")
    if config.checkpoint is None:  # one file for all runs of equal base options
        key = digest(json.dumps(stages.keys["train the base"]).encode())
        base_file = Path("runs/bases", f"{config.dataset}-{config.arch}-sigma{config.sigma:g}-{key}.pt")
        stages.do("train the base", base_file, partial(train_base, base, train_images, config), shared=True)
        base.load_state_dict(read_state(base_file))
    # 2: FullRobustCertify(f) on the search images
    file = out / "search_cache.pt"
    work = partial(certify_images, base, search_images, config, config.search_n, "search", file)
    stages.do("certify the base, search images", file, work)
    cache = read_cache(file)
    # 3: Algorithm 1
    log, rest = out / "search.jsonl", (train_images, search_images, config)
    evaluate, again = policy_evaluator(start, *rest), policy_evaluator(start, *rest, final=True)
    stages.do("search", log, partial(search_policies, environment, evaluate, again, cache, config, log))
    records = [json.loads(line) for line in log.read_text().splitlines()]
    policy = best_policy(records)
    write_whole(out / "policy.json", policy)
    # 4: the best policy is fine-tuned and packed
    file = out / "model.arq"
    best = policy_evaluator(base, *rest).quantize(policy)
    stages.do("fine-tune", file, partial(finetune_best, best, base, table, train_images, config))
    # 5: what was packed is certified from scratch; the test images are first seen here
    network = stages.watch(integers(models.load_model(file)[0], config))
    base_rows = certified("certify the base, test images", base, test_images, config, stages, "base_")
    rows = certified("certify ARQ, test images", network, test_images, config, stages)

    results = summarize(rows, network, table, policy, config, file)
    results["search_acr"] = [record["acr"] for record in records if record["policy"] == policy][-1]
    float_policy = models.uniform_policy(table, 32, 32)
    results["base"] = summarize(base_rows, base, table, float_policy, config, base_file)
    results["base"]["search_acr"] = certify.average_certified_radius(cache.certificates)
    results["acr_difference"] = dict(zip(("mean", "standard_error"), certify.acr_difference(rows, base_rows)))
    report(results, stages)


def evaluate_saved(config: Config) -> None:
    """--evaluate: certify a saved network, quantized (model.arq) or a float checkpoint, on test images."""
    file, images = config.evaluate, load_images(config, False)
    if models.read_packed(file):
        classifier, table, saved = models.load_model(file)
        policy = saved["policy"]
        refuse(saved["classes"] != images.classes, f"--evaluate {file} has other classes; give its --data")
    else:
        classifier = build_base(config, len(images.classes), file)
        table = models.quantize_model(classifier, config.image_size)
        policy = models.uniform_policy(table, 32, 32)
    stages = open_run(config, {"certify": "evaluate test"}, images, images)
    network = stages.watch(integers(classifier, config))
    rows = certified("certify", network, images, config, stages)
    report(summarize(rows, network, table, policy, config, Path(file)), stages)


def build_base(config: Config, num_classes: int, file=None) -> Classifier:
    """A float network: of a file or of --checkpoint, else to be trained; in convolutions' fastest layout."""
    torch.manual_seed(config.seed)
    file, of = file or config.checkpoint, (config.arch, num_classes, config.mean, config.std)
    base = models.load_base_checkpoint(file, *of) if file else models.build_classifier(*of)
    if file is not None:
        print(f"{file}: normalised by {base.mean.flatten()}, {base.std.flatten()}")
    return base.to(config.device, memory_format=torch.channels_last).eval()


def integers(classifier: Classifier, config: Config) -> nn.Module:
    """The network as it is evaluated. On a GPU its sums are checked at the batch that will run."""
    batch = 2 if config.device == "cpu" else config.eval_batch
    return models.integer_network(classifier.to(config.device, memory_format=torch.channels_last), batch)


# Stages: each takes the state that an interrupted run saved last, or None, and save(state).
def train_base(base: Classifier, images: ImageSet, config: Config, state, save) -> dict:
    if config.pretrained and RANK == 0 and state is None:  # training hands rank 0's weights to all
        models.load_pretrained(base, config.arch)
    steps = config.epochs * (len(images) // config.batch_size)
    lr = FINETUNE_LR if config.pretrained else BASE_LR
    train(base, images, config, steps, lr, "base", BASE_DECAY, state, save)
    return base.state_dict()


def certify_images(network, images: ImageSet, config: Config, n: int, purpose: str, file: Path, state, save):
    """CERTIFY in blocks, each of them saved: in the end a table or, with what was predicted, a cache (.pt)"""
    g = Smooth(network, len(images.classes), config.sigma, config.seed, config.eval_batch, purpose)
    backend = getattr(network, "backend", "float")
    cached = file.suffix == ".pt"

    def certify_block(part: slice) -> tuple:
        x = images.batch(range(len(images))[part], config.device)
        of = x, images.labels[part], images.ids[part], config.n0, n, config.alpha
        rows, predictions, key = g.certify_and_cache(*of, skip_wrong=cached)
        rows = [row._replace(time="") for row in rows] if cached else rows  # made again, a cache is the same
        return [tuple(row) for row in rows], predictions if cached else None, key

    blocks, begun = state or ([], backend)
    refuse(begun != backend, f"{file} was begun on {begun}, here {backend} is best; give a new --out")
    done, size = sum(len(rows) for rows, *_ in blocks), max(1, (10_000 if cached else 5_000) // n)
    for first in progress("certifying", "images", done, len(images), size * WORLD):
        start = first + RANK * size  # blocks do not depend on the number of processes
        results = gather(certify_block(slice(start, start + size)) if start < len(images) else None)
        blocks += [result for result in results if result is not None]
        save((blocks, backend))
    text = io.StringIO()
    certify.write_certificates(text, [row for rows, *_ in blocks for row in rows])
    return blocks if cached else text.getvalue().encode()


def read_cache(file: Path) -> ReplayCache:
    blocks = read_state(file)
    rows = [Certificate(*row) for rows, *_ in blocks for row in rows]
    useless = not any(row.radius for row in rows)
    refuse(useless, "the base certifies no search image; train it with noise, longer, or lower --sigma")
    return ReplayCache(rows, torch.cat([predictions for _, predictions, _ in blocks]), blocks[0][2])


def policy_evaluator(start, train_images, search_images, config: Config, final=False) -> PolicyEvaluator:
    """What Algorithm 1 does with a policy: from a calibrated copy of a network to radii of --reward.
    final: to CERTIFY with --search-n samples of fresh noise, after twice the training."""
    classifier = copy.deepcopy(start)  # with the hook that counts passes
    models.quantize_model(classifier, config.image_size)
    calibrate(classifier, search_images, config)
    images = search_images.batch(range(len(search_images)), config.device)

    def certificate(quantized: nn.Module, cache: ReplayCache) -> list[float]:
        # Images of wrong class cost a reward nothing: every process gets as many of the others.
        rows = cache.certificates
        mine = sorted(range(len(rows)), key=lambda i: rows[i].selected != rows[i].label)[RANK::WORLD]
        part = ReplayCache([rows[i] for i in mine], cache.predictions[mine], cache.key)
        network, classes = integers(quantized, config), len(search_images.classes)
        g = Smooth(network, classes, config.sigma, config.seed, config.eval_batch, "finalists")
        if final:
            of = images[mine], [rows[i].label for i in mine], [rows[i].idx for i in mine]
            found = g.certify(*of, config.n0, config.search_n, config.alpha)
        elif config.reward == "estimate":
            return sum(gather(g.estimate_radii(images[mine], part, config.n_p).tolist()), [])
        else:
            found = g.certify_incremental(images[mine], part, config.n_p, config.alpha_zeta, config.gamma)
        return sum(gather([row.radius * row.correct for row in found]), [])

    brief = {"steps": config.finetune_steps * (1 + final), "lr": EPISODE_LR, "purpose": "episode"}
    finetune = partial(train, images=train_images, config=config, **brief)
    return PolicyEvaluator(classifier, finetune, certificate)


def calibrate(classifier: Classifier, images: ImageSet, config: Config) -> None:
    """Step sizes and signs from up to 256 noisy images, spread over the given ones."""
    x = images.batch(evenly_spaced(min(256, len(images)), len(images)), config.device)
    generator = torch.Generator(x.device).manual_seed(config.seed)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    models.calibrate(classifier, (x + config.sigma * noise).split(50))  # whatever --eval-batch is


def search_policies(environment, evaluate, again, cache, config, log, state, save, kind=DDPG) -> bytes:
    """Algorithm 1 with a line per episode, printed and in `log`. Then, since the best of many noisy rewards
    is partly luck, the best policies are evaluated by again(policy, cache), a line each. kind: of agent."""
    warmup = min(20, max(1, config.episodes // 3))
    settings = DDPGConfig(episodes=config.episodes, warmup_episodes=warmup)
    agent = kind(environment.state_size, config.seed, settings)
    agent.act = lambda state, act=agent.act: gather(act(state))[0]  # all processes take rank 0's actions
    records = state["records"] if state else []
    if records:
        agent.load_state_dict(state["agent"])
    last = time.monotonic()

    def keep(record: dict) -> None:
        nonlocal last
        record["seconds"], last = round(time.monotonic() - last, 3), time.monotonic()
        records.append(record)
        lines = (json.dumps(record, allow_nan=False) + "\n" for record in records)
        write_whole(log, "".join(lines).encode())
        save({"agent": agent.state_dict(), "records": records})

    for record in search(lambda: cache, environment, agent, evaluate):
        record["bitops_ratio"] = models.bitops_ratio(environment.table, record["policy"])
        record["size_bytes"] = models.size_bytes(environment.table, record["policy"])
        keep(record)
        done, pace = len(records), statistics.median(record["seconds"] for record in records)
        left = timedelta(seconds=round(pace * (config.episodes - done)))
        best = shown(max(record["acr"] for record in records))
        gained = f"ACR {shown(record['acr'])}  reward {record['reward']:+.4f}  best ACR {best}"
        cost = f"BitOPs {100 * record['bitops_ratio']:.3f} %"
        print(f"  episode {done:>3}/{config.episodes}  {gained}  {cost}  {left} left", flush=True)
    by_policy = {str(r["policy"]): r for r in sorted(records[: config.episodes], key=lambda r: r["acr"])}
    ranked = sorted(by_policy.values(), key=lambda r: r["acr"], reverse=True)  # each policy once
    for record in ranked[len(records) - config.episodes : config.finalists]:
        keep(record | {"finalist": True, "acr": again(record["policy"], cache)})
        print(f"  episode {record['episode'] + 1} again: ACR {shown(records[-1]['acr'])}", flush=True)
    return log.read_bytes()


def finetune_best(classifier, base, table, images: ImageSet, config: Config, state, save) -> bytes:
    steps = int(config.finetune_epochs * (len(images) // config.batch_size))
    loss = partial(noise_augmentation, teacher=base, share=config.distill)
    train(classifier, images, config, steps, FINETUNE_LR, "fine-tune", state=state, save=save, loss=loss)
    description = {name: getattr(config, name) for name in SAVED_OPTIONS}
    return models.pack_model(classifier, table, {**description, "classes": images.classes})


def certified(stage: str, network, images: ImageSet, config: Config, stages: Stages, prefix="") -> list:
    """The certificates of evenly spaced test images."""
    file = Path(config.out) / f"{prefix}certificates.tsv"
    images = images.subset(evenly_spaced(config.images, len(images)))
    purpose = "base certificate" if prefix else "certificate"
    stages.do(stage, file, partial(certify_images, network, images, config, config.n, purpose, file))
    return certify.read_certificates(file)


# ---- reports ----
def summarize(rows, network: nn.Module, table, policy: Policy, config: Config, file: Path) -> dict:
    """What results.json says of a network and its file; one-sided radii unless named."""
    accuracy, acr = certify.certified_accuracy, certify.average_certified_radius
    both = certify.two_sided(rows)
    return {
        "accuracy": accuracy(rows, 0),
        "certified_accuracy": {str(radius): accuracy(rows, radius) for radius in (0.0, 0.25, 0.5, 0.75)},
        "acr": acr(rows),
        "acr_standard_error": certify.acr_difference(rows)[1],
        "two_sided": {"acr": acr(both), "accuracy": accuracy(both, 0)},
        "abstained": sum(row.predict == certify.ABSTAIN for row in rows) / len(rows),
        "bitops_ratio": models.bitops_ratio(table, policy),
        "size_bytes": models.size_bytes(table, policy),
        "file_bytes": file.stat().st_size,
        "backend": getattr(network, "backend", "float"),
        "network": digest(file.read_bytes()),
        "images": len(rows),
        "expected_false_certificates": config.alpha * len(rows),
        **{name: getattr(config, name) for name in ("sigma", "n0", "n", "alpha", "device")},
    }


def shown(value) -> str:
    """Fractions and radii to four decimals, rounded towards zero: none exceeds what is certified."""
    if isinstance(value, dict):
        return " ".join(map(shown, value.values()))
    if isinstance(value, float):
        return f"{int(round(value * 1e4, 9)) / 1e4:.4f}"  # 57 of 100 are 5699.999999999999
    return "-" if value is None else str(value)


def report(results: dict, stages: Stages) -> None:
    """Write results.json and print it, float base and ARQ side by side."""
    times = {name: {k: r[k] for k in ("seconds", "forward_passes")} for name, r in stages.records.items()}
    write_whole(stages.path.with_name("results.json"), {**results, "stages": times})
    columns = {"float base": results["base"], "ARQ": results} if "base" in results else {"network": results}
    print("\n{images} test images, sigma {sigma}, n0 = {n0}, n = {n}, alpha = {alpha} each".format(**results))
    print(f"{'':<38}" + "".join(f"{name:>32}" for name in columns))
    for name in list(results)[: list(results).index("backend") + 1]:
        parts = results[name] if isinstance(results[name], dict) else ()
        label = " ".join([name.replace("_", " "), *parts])
        print(f"{label:<38}" + "".join(f"{shown(column[name]):>32}" for column in columns.values()))
    if "acr_difference" in results:
        mean, error = results["acr_difference"].values()
        print(f"ACR less the base's, on the same images: {mean:+.4f}, standard error {shown(error)}")
    print(f"written to {stages.path.parent}/", flush=True)


def main(argv=None) -> int:
    # glibc returns freed blocks to the system; faulting them in again costs 20 % of an evaluation.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**30)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
    code, again = 2, "the same command continues"
    try:
        config = parse_config(argv)
        if WORLD > 1:  # nccl on GPUs, one each, and gloo on CPUs
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if config.device == "cuda" else "gloo", timeout=timedelta(days=1))
            sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
        evaluate_saved(config) if config.evaluate else run(config)
        return 0
    except KeyboardInterrupt:
        code, message = 130, f"interrupted; {again} the run"
    except ValueError as error:  # ours, and the modules' own refusals; a worker's has its traceback in front
        message = f"error: {str(error).strip().splitlines()[-1].removeprefix('ValueError: ')}"
    except OSError as error:  # no permission, no space: whatever was finished is on disk
        where = error.filename or (config.out if error.errno else "--data or --pretrained")
        message = f"error: {where}: {error.strerror or error}; {again}"
    except RuntimeError as error:  # what comes from outside; other kinds are faults of this program
        known = "DataLoader worker", "by peer", "Broken pipe", "NCCL", "device ordinal", "memory", "hash"
        if not any(text in str(error) for text in known):
            raise
        remedy = "; give a smaller --eval-batch or --batch-size" if "memory" in str(error) else ""
        message = f"error: {str(error).splitlines()[0]}{remedy}; {again}"
    time.sleep(3 * (RANK > 0))  # only rank 0 prints the error that all have; then torchrun ends the others
    print(f"arq.py: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
