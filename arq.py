"""ARQ: mixed-precision quantization that keeps a network's certified robustness.

Algorithm 1 (Yang et al., arXiv 2410.24214), and who does each line:

    ACR(g), cache <- FullRobustCertify(f)                  certify.Smooth.certify_and_cache
    for each episode                                       search
        for each layer: the agent emits b_w and b_a        BitWidthEnvironment.rollout
        while BitOPs(P) > budget: take one bit             models.enforce_budget
        f^P <- f, quantized by P, briefly fine-tuned       evaluate_policy
        ACR(g^P) <- IncrementalRobustCertify(f^P, cache)   evaluate_policy
        reward <- (ACR(g^P) - ACR(g)) / ACR(g)             relative_gain
        the agent learns                                   ddpg.DDPG.learn
    P* <- the best policy                                  best_policy
    f* <- f, quantized by P*, fine-tuned                   finetune_best
    FullRobustCertify(f*) on the test images               certify.Smooth.certify
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import Image  # PIL's
from torchvision.transforms.v2 import functional as TF

import certify
import models
from certify import Certificate, ReplayCache, Smooth
from ddpg import DDPG, DDPGConfig
from models import Layer, Policy, require


# ---- Algorithm 1 ----
class BitWidthEnvironment:
    """An episode decides on the bits of weights and of input, layer by layer.
    The first and the last layer keep 8 bits and are not visited. A state (10,) holds
    features (HAQ, section 3.2), min-max normalised, and the previous bits.
    Raises ValueError if 2 bits everywhere do not fit the budget."""

    def __init__(self, table: list[Layer], budget: float):
        require(len(table) > 2, "no layer is between the first and the last")
        self.table, self.budget = table, budget
        self.decisions = list(itertools.product(table[1:-1], (0, 1)))  # of [b_w, b_a]
        features = []
        for index, (layer, operand) in enumerate(self.decisions):
            shape = [layer.c_in, layer.c_out, layer.kernel, layer.stride, layer.map_size]
            features.append([index // 2, *shape, layer.weights, layer.depthwise, operand])
        features = torch.tensor(features, dtype=torch.float32)
        low, high = features.amin(0), features.amax(0)
        self.features = (features - low) / (high - low).clamp_min(1e-9)
        self.state_size = features.shape[1] + 1
        self.rollout(lambda state: 0.0)  # whether 2 bits fit the budget

    @staticmethod
    def bits(action: float) -> int:
        """round(b_min - 1/2 + a (b_max - b_min + 1)): equal shares of [0, 1]."""
        least, most = models.MIN_BITS, models.MAX_BITS
        return min(most, max(least, round(least - 0.5 + action * (most - least + 1))))

    def rollout(self, act) -> tuple[Tensor, Tensor, Policy]:
        """One episode by act(state): states (T, 10), actions (T, 1), forced policy."""
        policy = models.uniform_policy(self.table, models.MIN_BITS)
        states, actions, previous = [], [], 1.0
        for features, (layer, operand) in zip(self.features, self.decisions):
            state = torch.cat([features, torch.tensor([previous])])
            action = act(state)
            bits = self.bits(action)
            policy[layer.name][operand] = bits
            previous = bits / models.MAX_BITS
            states.append(state)
            actions.append(action)
        policy = models.enforce_budget(self.table, policy, self.budget)
        return torch.stack(states), torch.tensor(actions)[:, None], policy


def evaluate_policy(policy, cache, start, base, images, search_pixels, config):
    """ACR(g^P) of a policy P on the search images (B, C, H, W), by IRS.
    cache: what f, the base, predicts on these; start: a copy of f from `prepare`
    images: those to fine-tune on, by the recipe of the best policy
    Episodes replay one noise, which the search may exploit: its ACR is no certificate."""
    quantized = copy.deepcopy(start)
    models.set_policy(quantized, policy)
    try:
        fine_tune(quantized, base, images, config, config.episode_batches, "episode")
        network = models.integer_network(quantized, config.eval_batch)
    except FloatingPointError:  # training diverged: there is nothing to certify
        return 0.0
    g = SharedSmooth(network, len(images.classes), config.sigma, batch_size=config.eval_batch)
    rows = g.certify_incremental(search_pixels, cache, config.n_p, config.alpha, config.gamma)
    return certify.average_certified_radius(rows)


def relative_gain(acr: float, base_acr: float) -> float:
    """The reward: (ACR(g^P) - ACR(g)) / ACR(g)."""
    return (acr - base_acr) / base_acr


def search(cache, environment, agent, evaluate, reward=relative_gain):
    """Algorithm 1, a record per episode; it goes on from the agent's count of episodes.
    cache: f's ReplayCache; agent: a DDPG or the like
    evaluate(policy, cache): ACR(g^P), as `evaluate_policy`; reward(ACR(g^P), ACR(g))"""
    # 1: ACR(g) of the float network, from FullRobustCertify(f)
    base_acr = certify.average_certified_radius(cache.certificates)
    require(base_acr > 0, "the base certifies no search image")
    # 2: for each episode
    while agent.episode < agent.config.episodes:
        episode, noise = agent.episode, agent.noise
        # 3: the agent emits bit-widths; the policy is forced under the budget
        states, actions, policy = environment.rollout(agent.act)
        # 4: quantize f by it, fine-tune, IncrementalRobustCertify
        acr = evaluate(policy, cache)
        # 5: the agent learns from the reward
        gain = reward(acr, base_acr)
        agent.learn(states, actions, gain)
        record = {"episode": episode, "noise": noise, "acr": acr, "reward": gain}
        yield record | {"policy": policy}


def best_policy(records: list[dict]) -> Policy:
    """6: the policy of the largest ACR."""
    return max(records, key=lambda record: record["acr"])["policy"]


# ---- training ----
BASE_LR, BASE_DECAY = 0.2, 5e-4
FINETUNE_LR, FINETUNE_DECAY = 0.02, 1e-4
BFLOAT16 = {"cuda": True, "mps": False, "cpu": torch.cpu._is_avx512_bf16_supported()}


def augment(images, uniform):
    """Shift (B, C, H, W) by up to an eighth of the side; flip. uniform: (3, B)."""
    count, _, height, width = images.shape
    pad = max(1, height // 8)
    top, left = (uniform[:2, :, None] * (2 * pad + 1)).long()
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(uniform[2, :, None] < 0.5, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)  # B, H, W, C
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def noise_augmentation(network, x, noise, labels, teacher=None, share=0.0):
    """Cross-entropy (B,) under Gaussian noise (Cohen et al., 3.3). A share of
    targets is a teacher's, under other noise: on average its smoothed classifier's."""
    if share > 0:
        with torch.no_grad():
            answers = teacher(x + noise.roll(1, 0)).float().softmax(1)  # others' noise
        labels = share * answers + (1 - share) * F.one_hot(labels, answers.shape[1])
    return F.cross_entropy(network(x + noise).float(), labels, reduction="none")


def train(
    classifier, images, config, num_batches, lr, purpose="", decay=FINETUNE_DECAY,
    state=None, save=lambda *_: None, loss=noise_augmentation,
):  # fmt: skip
    """Nesterov SGD in place, under Gaussian noise; the weights. Ends in evaluation mode.
    The rate rises over a fifth of the batches, then falls along a cosine; decay spares
    step sizes, biases and BatchNorm. config: its seed, sigma and batch_size.
    loss(network, x, noise, labels): losses (B,), as `noise_augmentation`
    save(state, done, total): of each epoch, None between; a state continues bit for bit
    FloatingPointError: an epoch ends with numbers that are not finite."""
    device, batch_size = next(classifier.parameters()).device, config.batch_size
    matrices = [p for p in classifier.parameters() if p.ndim > 1]
    vectors = [p for p in classifier.parameters() if p.ndim <= 1]
    parameters = [{"params": matrices, "weight_decay": decay}, {"params": vectors}]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)
    if state is not None:
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
    classifier.train()
    network = nn.parallel.DistributedDataParallel(classifier) if WORLD > 1 else classifier
    per_epoch = len(images) // batch_size
    require(per_epoch > 0, f"--batch-size {batch_size} exceeds the {len(images)} images")
    seed = hashlib.sha256(f"{config.seed}|{purpose}".encode()).digest()
    for start in range(state["batch"] if state else 0, num_batches, per_epoch):
        torch.manual_seed(int.from_bytes(seed[:4], "little") + start // per_epoch)
        end = min(start + per_epoch, num_batches)
        batches = torch.randperm(len(images)).split(batch_size)[: end - start]
        options = {"num_workers": WORKERS if images.size > 64 else 0}
        options["batch_sampler"] = [batch[MINE] for batch in batches]
        options["generator"] = torch.Generator()  # not that of the noise
        loader = DataLoader(images, **options)
        for index, (pixels, labels) in zip(range(start, end), loader):
            rise = (index + 1) / (0.2 * num_batches + 1)
            fall = 0.5 + 0.5 * math.cos(math.pi * index / num_batches)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(rise, fall)
            uniform = torch.rand(3, batch_size)[:, MINE]
            x = augment(pixels.to(device).float().div_(255), uniform)
            noise = config.sigma * torch.randn(batch_size, *x.shape[1:], device=device)
            with torch.autocast(device.type, torch.bfloat16, BFLOAT16[device.type]):
                losses = loss(network, x, noise[MINE], labels.to(device))
            require(losses.shape == labels.shape, "a loss has one value per image")
            optimizer.zero_grad()
            (WORLD * losses.sum() / batch_size).backward()  # processes average it
            optimizer.step()
            if index + 1 < end:
                save(None, index + 1, num_batches)
        weights = classifier.state_dict()
        if not all(value.isfinite().all() for value in weights.values()):
            raise FloatingPointError(f"{purpose}: training diverged by batch {end}")
        state = {"classifier": weights, "optimizer": optimizer.state_dict()}
        save(state | {"batch": end}, end, num_batches)
    for buffer in classifier.buffers() if WORLD > 1 else ():
        distributed.broadcast(buffer, 0)  # BatchNorm's statistics differed
    return classifier.eval().state_dict()


def fine_tune(classifier, base, images, config, num_batches, purpose, *progress):
    """Train a copy of the base, which gives a share of targets."""
    loss = partial(noise_augmentation, teacher=base, share=config.distill)
    schedule = num_batches, FINETUNE_LR, purpose, FINETUNE_DECAY
    train(classifier, images, config, *schedule, *progress, loss=loss)


def prepare(base, images, config):
    """A copy of f, calibrated by some noisy images, and its layer table."""
    classifier = copy.deepcopy(base)
    table = models.quantize_model(classifier, config.image_size)
    x = images.batch(evenly_spaced(min(256, len(images)), len(images)), config.device)
    generator = torch.Generator(x.device).manual_seed(config.seed)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    models.calibrate(classifier, (x + config.sigma * noise).split(50))
    return classifier, table


# ---- the run ----
def run(config):
    """The method in five steps. A step whose file is there is done."""
    images, test_images = load_images(config, True), load_images(config, False)
    same = images.classes == test_images.classes
    require(same, f"--data {config.data}: test images have other classes")
    train_images, search_images = hold_out(images, config.search_images)
    base = build_base(config, len(images.classes))
    table = models.quantize_model(copy.deepcopy(base), config.image_size)
    environment = BitWidthEnvironment(table, config.budget)
    policy = config.policy and read_policy(config.policy, table, config.budget)
    contents = {"policy": policy, "training set": images.fingerprint()}
    contents["test set"] = test_images.fingerprint()
    folder = RunFolder(config.out, asdict(config) | contents)
    take_along(config, folder)
    print(f"{config.arch}; run folder {folder.path}")
    # 1: the float base classifier f
    epochs = 0 if config.checkpoint else config.epochs
    num_batches = epochs * (len(train_images) // config.batch_size)
    work = train, base, train_images, config, num_batches, BASE_LR, "base", BASE_DECAY
    base_file = folder.make("train the base", "base.pt", *work)
    base.load_state_dict(read_state(base_file))
    start, _ = prepare(base, search_images, config)
    # 2: FullRobustCertify(f) on search images; 3: the search, or a given policy
    if policy:
        file = folder.make("policy", "policy.json", lambda *_: policy)
    else:
        work = certify_images, base, search_images, config, "search"
        file = folder.make("certify the base, search", "search_cache.pt", *work)
        cache = read_state(file)
        pixels = search_images.batch(range(len(search_images)), config.device)
        given = {"start": start, "base": base, "images": train_images, "config": config}
        evaluate = partial(evaluate_policy, search_pixels=pixels, **given)
        work = run_search, environment, evaluate, cache, config, folder.path
        file = folder.make("search", "policy.json", *work)
    policy = read_policy(file, table, config.budget)
    # 4: the best policy, fine-tuned and packed
    models.set_policy(start, policy)
    work = finetune_best, start, base, table, train_images, config
    file = folder.make("fine-tune", "model.arq", *work)
    classifier, _, description = models.load_model(file)
    changed = f"{file} has other bits; give policy.json as --policy, and another --out"
    require(description["policy"] == policy, changed)
    # 5: what was packed, certified on test images, first seen here
    network = models.integer_network(classifier.to(config.device), config.eval_batch)
    base_rows = certified(folder, "base certificate", base, test_images, config)
    rows = certified(folder, "certificate", network, test_images, config)
    results = summarize(rows, network, table, policy, config, file)
    floats = models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS)
    results["base"] = summarize(base_rows, base, table, floats, config, base_file)
    mean, standard_error = certify.acr_difference(rows, base_rows)
    results["acr_difference"] = {"mean": mean, "standard_error": standard_error}
    report(results, folder)


def evaluate_saved(config):
    """--evaluate: certify a packed network again."""
    file, images = Path(config.evaluate), load_images(config, False)
    classifier, table, description = models.load_model(file)
    require(description["classes"] == images.classes, f"{file}: other classes; give its --data")
    contents = {"test set": images.fingerprint()}
    contents["network"] = hashlib.sha256(file.read_bytes()).hexdigest()
    folder = RunFolder(config.out, asdict(config) | contents)
    network = models.integer_network(classifier.to(config.device), config.eval_batch)
    rows = certified(folder, "certificate", network, images, config)
    report(summarize(rows, network, table, description["policy"], config, file), folder)


def build_base(config, num_classes):
    """A float network, of --checkpoint or to be trained."""
    torch.manual_seed(config.seed)
    base = models.build_classifier(config.arch, num_classes)
    if config.checkpoint:
        base = models.load_base_checkpoint(config.checkpoint, config.arch, num_classes)
    return base.to(config.device, memory_format=torch.channels_last).eval()


def run_search(environment, evaluate, cache, config, path, state, save, agent_class=DDPG):
    """The best policy of Algorithm 1. Each episode is printed, and in search.jsonl.
    evaluate(policy, cache): as evaluate_policy, the rest bound."""
    warmup_episodes = min(20, max(1, config.episodes // 3))
    settings = DDPGConfig(episodes=config.episodes, warmup_episodes=warmup_episodes)
    agent, records = agent_class(environment.state_size, config.seed, settings), []
    if state is not None:
        agent.load_state_dict(state["agent"])
        records = state["records"]
    act = agent.act
    agent.act = lambda state: gather(act(state))[0]  # rank 0's
    for record in search(cache, environment, agent, evaluate):
        ratio = models.bitops_ratio(environment.table, record["policy"])
        record["bitops_ratio"] = ratio
        records.append(record)
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        write_whole(path / "search.jsonl", "".join(lines).encode())
        state = {"agent": agent.state_dict(), "records": records}
        left = save(state, len(records), config.episodes)
        best = max(record["acr"] for record in records)
        print(f"  episode {len(records):>3}/{config.episodes}", end="")
        print(f"  ACR {cut(record['acr'])}  best {cut(best)}", end="")
        print(f"  BitOPs {100 * ratio:.3f} %  {left} left")
    return best_policy(records)


def finetune_best(classifier, base, table, images, config, state, save):
    """The packed network, fine-tuned under its policy."""
    num_batches = int(config.finetune_epochs * (len(images) // config.batch_size))
    fine_tune(classifier, base, images, config, num_batches, "fine-tune", state, save)
    description = {name: getattr(config, name) for name in SAVED_OPTIONS}
    return models.pack_model(classifier, table, {**description, "classes": images.classes})


def certified(folder, purpose, network, images, config):
    """Certificates of images; purpose names noise and table."""
    work = certify_images, network, images, config, purpose
    file = folder.make(f"{purpose}s", f"{purpose.replace(' ', '_')}s.tsv", *work)
    rows = certify.read_certificates(file)
    whole = [row.idx for row in rows] == images.ids
    require(whole, f"{file} has not one row per image; remove it")
    return rows


def certify_images(network, images, config, purpose, state, save):
    """CERTIFY by blocks of images: a table or, for "search", a ReplayCache."""
    settings = config.sigma, config.seed, config.eval_batch
    g = SharedSmooth(network, len(images.classes), *settings, purpose)
    is_cache = purpose == "search"  # no samples for wrong classes
    n = config.search_n if is_cache else config.n
    rows, predictions, key = state or ReplayCache([], torch.zeros(0, n, dtype=torch.uint8), "")
    size = WORLD * max(1, 10_000 // n)
    counts = config.n0, n, config.alpha
    for first in range(len(rows), len(images), size):
        part = images.subset(range(len(images))[first : first + size])
        pixels = part.batch(range(len(part)), config.device)
        block = g.certify_and_cache(pixels, part.labels, part.ids, *counts, is_cache)
        rows = rows + block.certificates
        if is_cache:
            predictions, key = torch.cat([predictions, block.predictions]), block.key
        save(ReplayCache(rows, predictions, key), len(rows), len(images))
    if is_cache:
        return ReplayCache(rows, predictions, key)
    text = io.StringIO()
    certify.write_certificates(text, rows)
    return text.getvalue().encode()


# ---- the run folder ----
class RunFolder:
    """The files of one run. A product that is there is done; work goes on from state.pt.
    ValueError, before anything is touched: a folder in use, or of other options."""

    def __init__(self, path, options):
        self.path, self.options = Path(path), options
        file = self.path / "config.json"
        others = {entry.suffix for entry in self.path.glob("*")} - {".lock", ".part"}
        require(file.exists() or not others, f"--out {path} holds no run; give another --out")
        before = json.loads(file.read_text()) if file.exists() else options
        for name in options.keys() - {"out", "data", "eval_batch"}:
            both = f"{flag(name)} {before.get(name)} there, {options[name]} here"
            require(before.get(name) == options[name], f"{path}: {both}; give another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = (self.path / "run.lock").open("a")
        try:  # it ends with the process; workers have none
            if RANK == 0 and os.name == "posix":
                os.lockf(self.lock.fileno(), os.F_TLOCK, 0)
        except OSError as error:  # others where there are no locks
            free = not isinstance(error, (BlockingIOError, PermissionError))
            require(free, f"another process is at work in {path}")
        write_whole(file, options)

    def make(self, name, product, work, *arguments):
        """The file `product`: what work(*arguments, state, save) returns, once. state:
        of its last save(state, done, total), or None; save(None, ...) shows progress."""
        file, state_file = self.path / product, self.path / "state.pt"
        saved = read_state(state_file) if state_file.exists() else {}
        self.seconds = saved.get("seconds", {})
        if file.exists():
            print(f"{name}: done before")
            return file
        state = saved["state"] if saved.get("product") == product else None
        print(f"{name} ..." if state is None else f"{name}, continued ...")
        began = time.monotonic() - self.seconds.get(name, 0.0)

        def save(state, done=1, total=1):
            spent = time.monotonic() - began
            if state is not None or done == total:
                self.seconds[name] = spent
                record = {"product": product, "state": state, "seconds": self.seconds}
                write_whole(state_file, record)
            left = timedelta(seconds=round(spent / done * max(0, total - done)))
            if RANK == 0 and sys.stderr.isatty():
                line = f"{name}: {done}/{total}, {done / spent:.3g}/s, {left} left"
                line = line if done < total else ""
                print(f"\r  {line:<90}\r", end="", file=sys.stderr)
            return left

        write_whole(file, work(*arguments, state, save))
        save(None)
        return file


def take_along(config, folder):
    """Of --checkpoint runs/X/base.pt: its certificates, if images and counts agree."""
    checkpoint = Path(config.checkpoint or "none")
    options = checkpoint.with_name("config.json")
    if checkpoint.name != "base.pt" or not options.exists():
        return
    before = json.loads(options.read_text())
    names = "image_size images search_images arch sigma n0 n search_n alpha seed device".split()
    names += ["training set", "test set"]
    agree = all(before.get(name) == folder.options[name] for name in names)
    for product in ("search_cache.pt", "base_certificates.tsv") if agree else ():
        old, new = checkpoint.with_name(product), folder.path / product
        if old.exists() and not new.exists():
            print(f"{product}: taken from {old.parent}")
            write_whole(new, old.read_bytes())


def write_whole(path, value):
    """Write bytes, a JSON file or a torch file, whole or not at all."""
    if path.suffix == ".json":
        value = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    if not isinstance(value, bytes):
        buffer = io.BytesIO()  # a full disk is an OSError
        torch.save(value, buffer)
        value = buffer.getbuffer()
    part = path.with_name(f"{path.name}.{RANK}.part")  # all write the same
    part.write_bytes(value)
    os.replace(part, path)


def read_state(path):
    require(is_zipfile(path), f"{path} is broken; remove it, and it is made again")
    torch.serialization.add_safe_globals([Certificate, ReplayCache])
    return torch.load(path, map_location="cpu", weights_only=True)


def read_policy(source, table, budget):
    """A bit-width for all layers, forced under the budget, or a file that fits."""
    uniform = str(source).isdigit()
    try:
        given = int(source) if uniform else json.loads(Path(source).read_text())
    except ValueError as error:  # no JSON, no UTF-8
        raise ValueError(f"{source} is no JSON file ({error})") from None
    policy = models.uniform_policy(table, given) if uniform else given
    models.check_policy([layer.name for layer in table], policy)
    require([32, 32] not in policy.values(), f"--policy {source}: a run packs 2 to 8 bits")
    forced = models.enforce_budget(table, policy, budget)
    require(uniform or forced == policy, f"{source} exceeds --budget {budget}; raise --budget")
    return forced


# ---- options ----
SAVED_OPTIONS = "dataset", "arch", "image_size", "sigma"
LONG = {"arch": "resnet20", "epochs": 90, "finetune_epochs": 12.0, "episodes": 600}
LONG |= {"episode_batches": 48, "search_images": 200, "search_n": 1000, "n_p": 250}
LONG |= {"images": 500, "n": 10_000}
LARGE = {"arch": "resnet50", "finetune_epochs": 10.0, "gamma": 0.995, "image_size": 224}
PRESETS = {"shapes": {}, "cifar10": LONG, "folder": LONG, "imagenet": LONG | LARGE}


def option(default, text, least=None, most=2**31 - 1, choices=None, group=None):
    """A field of Config, and its argument. group: it begins one in --help."""
    text += f" (default: {default})" if default is not None else ""
    metadata = {"argument": {"help": text, "choices": choices}, "group": group}
    return field(default=default, metadata=metadata | {"range": (least, most)})


@dataclass
class Config:
    """Every option, with its default for `shapes`: the command line."""

    dataset: str = option("shapes", "images; shapes are drawn", choices=PRESETS, group="data")
    data: str = option("data", "their folder; CIFAR-10 is downloaded to it")
    image_size: int = option(32, "side of the images, in pixels", 8, 4096)
    search_images: int = option(80, "training images held out for the search", 1)
    images: int = option(100, "test images, evenly spaced", 1)
    arch: str = option("resnet8", "network", choices=models.NETWORKS, group="method")
    sigma: float = option(0.25, "deviation of the noise, in [0, 1] pixels", 0.004, 4)
    budget: float = option(0.015, "share of the float BitOPs", 1e-5, 1)
    episodes: int = option(20, "policies that the search tries", 1)
    search_n: int = option(400, "samples of the base per search image", 1)
    n_p: int = option(150, "samples of a policy per search image", 1)
    gamma: float = option(0.99, "p_A from which IRS draws fresh samples", 0, 1)
    policy: str = option(None, "no search: a policy.json, or bits as 4")
    checkpoint: str = option(None, "float base; else one is trained", group="training")
    epochs: int = option(6, "epochs of the base", 1)
    episode_batches: int = option(8, "training batches of an episode", 0)
    finetune_epochs: float = option(2.0, "epochs of the best policy", 0, 1e6)
    distill: float = option(0.7, "share of the base in targets", 0, 1)
    batch_size: int = option(128, "images in a training batch", 2)
    n0: int = option(100, "samples that select the class", 1, group="certificates")
    n: int = option(1000, "samples that bound its probability", 1)
    alpha: float = option(0.001, "chance of a wrong bound, each", 1e-9, 0.49)
    eval_batch: int = option(None, "samples per forward pass", 1)
    seed: int = option(0, "seed of training, search and noise", 0, group="run")
    device: str = option("auto", "where to run", choices=("auto", "cuda", "mps", "cpu"))
    out: str = option(None, "run folder (default: named by options)")
    evaluate: str = option(None, "certify this model.arq, and stop")


def flag(name):
    return "--" + name.replace("_", "-")


def parse_config(argv=None):
    """Options of a command line. ValueError: they cannot work."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.description = f"Defaults are those for shapes. For cifar10: {PRESETS['cifar10']}"
    parser.error = lambda message: require(False, f"{message} (see --help)")
    for item in fields(Config):
        if item.metadata["group"]:
            group = parser.add_argument_group(item.metadata["group"])
        argument = item.metadata["argument"]
        group.add_argument(flag(item.name), type=item.type, **argument)
    given = vars(parser.parse_args(argv))
    if "evaluate" in given:
        saved, _ = models.read_packed(given["evaluate"])
        for name in given.keys() & {"arch", "image_size", "checkpoint", "policy"}:
            require(False, f"--evaluate takes no {flag(name)}; omit it")
        given = {name: saved[name] for name in SAVED_OPTIONS} | given
    config = Config(**PRESETS.get(given.get("dataset", "shapes"), LONG) | given)
    here = [device for device in BFLOAT16 if torch.get_device_module(device).is_available()]
    config.device = here[0] if config.device == "auto" else config.device
    require(config.device in here, f"no --device {config.device}; use auto")
    if config.eval_batch is None:  # small batches stay in a CPU's cache
        samples = 50 if config.device == "cpu" else 2000
        config.eval_batch = max(8, samples * 32**2 // max(config.image_size, 32) ** 2)
    for item in fields(Config):
        value, (least, most) = getattr(config, item.name), item.metadata["range"]
        inside = least is None or least <= value <= most
        about = f"from {least} to {most}, not {value}: {item.metadata['argument']['help']}"
        require(inside, f"{flag(item.name)} must be {about}")
    for samples in (config.n, config.search_n, config.n_p):
        certify.alpha_after_noise(config.alpha, samples, 3 * config.image_size**2, config.sigma)
    require(config.batch_size >= 2 * WORLD, f"--batch-size: {WORLD} processes need more")
    fewer = config.n_p <= config.search_n
    require(fewer, f"--n-p {config.n_p} exceeds --search-n {config.search_n}")
    name = f"{config.dataset}-{config.arch}-sigma{config.sigma:g}-budget{config.budget:g}"
    file = Path(config.policy or config.evaluate or "").parts[-2:]
    config.out = config.out or "-".join([f"runs/{name}", *file, f"seed{config.seed}"])
    return config


# ---- images ----
@dataclass
class ImageSet:
    """Labelled images, in CIFAR-10's order or by label and name."""

    labels: list[int]
    classes: list[str]
    size: int
    source: list  # uint8 (3, size, size) each, or a file that is decoded when needed
    ids: list[int] | None = None  # positions in the whole set: they name the noise

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        """These images; ids keep their positions in the whole set."""
        columns = self.labels, self.source, self.ids or range(len(self))
        labels, source, ids = [[column[i] for i in indices] for column in columns]
        return replace(self, labels=labels, source=source, ids=ids)

    def __getitem__(self, index):
        """A uint8 image (3, size, size) and its label. Raises ValueError."""
        image = self.source[index]
        image = image if isinstance(image, Tensor) else read_image(image, self.size)
        return image, self.labels[index]

    def batch(self, indices, device="cpu"):
        """Float images (len(indices), 3, size, size) in [0, 1]."""
        return torch.stack([self[i][0] for i in indices]).to(device).float().div_(255)

    def fingerprint(self):
        """Of labels and a few images."""
        probes = self.batch(evenly_spaced(min(16, len(self)), len(self))).numpy().tobytes()
        return hashlib.sha256(repr([self.classes, self.labels]).encode() + probes).hexdigest()


def evenly_spaced(count, total):
    """`count` of `total` indices, evenly spaced from the first."""
    return [i * total // count for i in range(count)]


def hold_out(images, count):
    """Training images, and evenly spaced ones for the search alone."""
    held_out = evenly_spaced(count, len(images))
    others = sorted(set(range(len(images))) - set(held_out))
    return images.subset(others), images.subset(held_out)


def load_images(config, train):
    """All training or some test images. ValueError: missing or too few."""
    root, size = Path(config.data), config.image_size
    test = "test" if (root / "test").is_dir() else "val"
    folder = root / ("train" if train else test)
    try:
        if config.dataset == "shapes":
            images = draw_shapes(8000 if train else 1000, seed=0 if train else 1, size=size)
        elif config.dataset == "cifar10" and not folder.is_dir():
            data = CIFAR10(root, train, download=RANK == 0)
            pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)
            pixels = TF.resize(pixels, [size, size]).contiguous()
            images = ImageSet(data.targets, data.classes, size, list(pixels))
        else:
            tree = ImageFolder(folder)
            source, labels = map(list, zip(*tree.samples))
            if size <= 64 and len(labels) * size**2 < 2**28:  # below 1 GB
                print(f"decoding {len(labels)} images of {folder}")
                source = [read_image(path, size) for path in source]
            images = ImageSet(labels, tree.classes, size, source)
    except (OSError, RuntimeError) as error:
        needed = f"train/<class>/* and test/ or val/, or what {CIFAR10.url} unpacks to"
        reason = str(error).partition(". ")[0]
        raise ValueError(f"--data {root} has no {needed} ({reason})") from None
    require(len(images.classes) > 1, f"--data {root}: at least two classes are needed")
    needed = config.search_images + config.batch_size if train else config.images
    asked = "--search-images and a --batch-size need" if train else "--images"
    require(needed <= len(images), f"{asked} {needed}: there are only {len(images)} images")
    return images if train else images.subset(evenly_spaced(config.images, len(images)))


def read_image(path, size):
    """RGB uint8 (3, size, size): shorter side resized, centre cropped."""
    try:
        with Image.open(path) as file:
            require(file.mode[0] not in "IF", f"mode {file.mode} has no range: save 8 bits")
            image = TF.pil_to_tensor(file.convert("RGB"))
    except Exception as error:  # of many kinds
        message = f"{path}: no readable image ({str(error)[:80]}); repair or remove it"
        raise ValueError(message) from None
    return TF.center_crop(TF.resize(image, [size]), [size, size])


def draw_shapes(count, seed, size):
    """Ten classes of flowers of any place, size, tilt and colour."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    petals = 0, 2, 3, 4, 5  # none: a disk
    classes = [f"{n} petals, {fill}" for n in petals for fill in ("filled", "hollow")]
    labels = torch.arange(count) * len(classes) // count
    petals, hollow = torch.tensor(petals)[labels // 2], labels % 2
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    x, y = x - uniform(-0.25, 0.25, 1, 1), y - uniform(-0.25, 0.25, 1, 1)
    radius = x.hypot(y) / uniform(0.55, 0.85, 1, 1)
    angle = torch.atan2(y, x) + uniform(-0.3, 0.3, 1, 1)
    edge = 0.65 + 0.35 * (petals[:, None, None] * angle).cos()
    inside = (radius < edge) & (radius > 0.55 * hollow[:, None, None] * edge)
    ground = uniform(0.25, 0.75, 3, 1, 1)
    colour = uniform(0.25, 0.55, 1, 1, 1) * uniform(-1, 1, 3, 1, 1).sign()
    pixels = (ground + colour * inside[:, None]).clamp(0, 1).mul(255).round()
    return ImageSet(labels.tolist(), classes, size, list(pixels.to(torch.uint8)))


# ---- processes of torchrun: only rank 0 prints ----
print = partial(print, flush=True)  # also into pipes
WORLD = int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0
MINE = slice(RANK, None, WORLD)  # this process's part of a batch
WORKERS = max(1, min(16, os.cpu_count() // WORLD))  # they decode large images


def gather(value):
    """Every process's value, by rank; waits for all."""
    values = [value] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(values, value)
    return values


def start_processes(device):
    """Those of torchrun find each other; only rank 0 prints."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(timeout=timedelta(days=1))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


class SharedSmooth(Smooth):
    """The same by any number of processes."""

    def predictions(self, images, ids, sizes, key):
        mine = (sizes > 0).cumsum(0) % WORLD == RANK  # of images that get samples
        table = super().predictions(images, ids, sizes * mine, key)
        missing = int(sizes.max()) - table.shape[1]
        return sum(gather(F.pad(table, (0, missing))))  # zeros where others sampled


# ---- reports ----
def summarize(rows, network, table, policy, config, file):
    """What results.json says of a network and its file."""
    accuracy, acr = certify.certified_accuracy, certify.average_certified_radius
    two_sided = certify.two_sided(rows)
    return {
        "accuracy": accuracy(rows, 0),
        "certified_accuracy": {r: accuracy(rows, r) for r in (0.25, 0.5, 0.75)},
        "acr": acr(rows),
        "acr_standard_error": certify.acr_difference(rows)[1],
        "two_sided": {"acr": acr(two_sided), "accuracy": accuracy(two_sided, 0)},
        "abstained": sum(row.predict == certify.ABSTAIN for row in rows) / len(rows),
        "bitops_ratio": models.bitops_ratio(table, policy),
        "size_bytes": models.size_bytes(table, policy),
        "file_bytes": file.stat().st_size,
        "backend": getattr(network, "backend", "float"),
        "network": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        "images": len(rows),
        **{name: getattr(config, name) for name in "sigma n0 n alpha device".split()},
    }


def cut(value):
    """Fractions to four decimals, towards zero."""
    return f"{int(round(value * 1e4, 9)) / 1e4:.4f}" if isinstance(value, float) else str(value)


def report(results, folder):
    """Write results.json; print it, by the base's."""
    write_whole(folder.path / "results.json", {**results, "seconds": folder.seconds})
    columns = {"float base": results.get("base"), "ARQ": results}
    columns = {title: column for title, column in columns.items() if column}
    print(f"\n{'':<14}" + "".join(f"{title:>14}" for title in columns))
    for name in ("accuracy", "acr", "abstained", "bitops_ratio", "file_bytes", "backend"):
        print(f"{name:<14}" + "".join(f"{cut(c[name]):>14}" for c in columns.values()))
    if "base" in results:
        mean, error = results["acr_difference"].values()
        print(f"ACR less the base's, same images: {mean:+.4f}, standard error {cut(error)}")
    line = "{images} test images, sigma {sigma}, n0 = {n0}, n = {n}, alpha = {alpha} per image"
    print(f"{line.format(**results)}; in {folder.path}/")


def main(argv=None):
    code, remedy = 2, "the same command continues"
    try:
        config = parse_config(argv)
        if WORLD > 1:
            start_processes(config.device)
        evaluate_saved(config) if config.evaluate else run(config)
        return 0
    except KeyboardInterrupt:
        code, message = 130, f"interrupted; {remedy} the run"
    except (ValueError, FloatingPointError) as error:
        # A worker's follows a traceback.
        message = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
    except OSError as error:  # a full disk names no file
        message = f"{error.filename or config.out}: {error.strerror or error}; then {remedy}"
    except torch.OutOfMemoryError:
        message = f"no memory; give a smaller --eval-batch or --batch-size; {remedy}"
    print(f"arq.py: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
