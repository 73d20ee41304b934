"""ARQ: mixed-precision quantization that keeps a network's certified robustness.

    python arq.py                                                 # offline, minutes on two cores
    python arq.py --dataset cifar10 --sigma 0.25 --budget 0.015   # the paper's setting

    paper              here                          meaning
    Algorithm 1        search                        base certificate, episodes of the agent, the best policy
    s_l                BitWidthEnvironment.features  features of layers and kinds (weights, input), in [0, 1]
    a -> b             BitWidthEnvironment.bits      action in [0, 1] to a width
    BitOPs constraint  models.enforce_budget         takes bits from the last layer back until the policy fits
    reward             search                        (ACR(g^P) - ACR(g)) / ACR(g), on held-out training images
    ACR(g^P)           PolicyEvaluator               estimated, or certified by IRS, with n_p samples an image
    X                  certify_images                test images, first seen by the final certificate"""

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
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Callable, Iterator, Optional

import torch
import torchvision
from torch import Tensor, distributed as dist, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

import certify
import models
from certify import NoiseKey
from ddpg import DDPG, DDPGConfig
from models import Classifier, Layer, Policy

BASE_LR, BASE_DECAY = 0.2, 5e-4
EPISODE_LR, FINETUNE_LR, FINETUNE_DECAY = 0.005, 0.02, 1e-4
RADII = (0.0, 0.25, 0.5, 0.75)
AUTOCAST_DEVICES = ("cuda",)  # train in bfloat16
WORLD = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1  # torchrun's processes
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0  # this one; the first writes and prints
CORES = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0))  # that it may use
WORKERS = min(16, max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


# ---- options ----

# The paper-sized runs: 600 episodes are HAQ's; n_p is a tenth of the cached samples; 500 test images resolve
# an ACR to about 0.015, and n = 10,000 caps a radius at 3.2 sigma. `shapes` is sized for two cores' minutes.
PAPER_SIZED = dict(arch="resnet20", image_size=32, epochs=90, episodes=600, episode_steps=20,
                   finetune_epochs=30.0, search_images=500, search_n=10000, n_p=1000, images=500, n=10000,
                   gamma=0.99)
DEFAULTS = {
    "shapes": dict(arch="resnet8", image_size=32, epochs=6, episodes=24, episode_steps=8, finetune_epochs=3.0,
                   search_images=100, search_n=500, n_p=100, images=100, n=1000, gamma=0.99),
    "cifar10": PAPER_SIZED,
    "folder": PAPER_SIZED,
    "imagenet": dict(PAPER_SIZED, arch="resnet50", image_size=224, finetune_epochs=10.0, gamma=0.995),
}
# What the stages depend on; --data and files count by their contents. Other options say where and how fast.
BASE = ("dataset data arch checkpoint pretrained mean std sigma epochs seed image_size batch_size "
        "search_images").split()
CACHE = [*BASE, *"n0 search_n alpha device".split()]
SEARCH = [*CACHE, *"budget size_budget episodes episode_steps n_p alpha_zeta gamma reward_estimate".split()]
TEST = ["images", "n0", "n", "alpha", "device", "data (test)"]
STAGES = {"train the base": BASE, "certify the base, search images": CACHE, "search": SEARCH,
          "fine-tune": [*SEARCH, "finetune_epochs"], "certify the base, test images": [*BASE, *TEST],
          "certify ARQ, test images": [*SEARCH, "finetune_epochs", *TEST]}
EVALUATION = {"certify": ["evaluate", "arch", "mean", "std", "sigma", "seed", "image_size", *TEST]}
SAVED_OPTIONS = ("dataset", "arch", "image_size", "sigma")  # in the file of a network
ABOVE_0_BELOW = dict(sigma=math.inf, budget=1, size_budget=1, alpha=1, alpha_zeta=1, gamma=1)
AT_LEAST = dict(epochs=1, episodes=1, episode_steps=0, finetune_epochs=0, search_images=WORLD, search_n=1,
                n_p=1, images=1, n0=1, n=1, image_size=8, batch_size=2 * WORLD, eval_batch=1, workers=0,
                seed=0)


def option(default, text: str, **parser_options):
    shown = "" if default is None or default is False else f" (default: {default})"
    return field(default=default, metadata={"help": text + shown, **parser_options})


@dataclass
class Config:
    """Every option, from which the command line is made; None is filled in per dataset (DEFAULTS)."""
    dataset: str = option(None, "shapes (drawn here; default), cifar10, imagenet or folder", choices=DEFAULTS)
    data: str = option("data", "where the images are, or where CIFAR-10 is downloaded to")
    arch: str = option(None, "resnet8/20/32/44/56/110 (CIFAR), resnet18, resnet50 or mobilenet_v2",
                       choices=(*models.CIFAR_RESNETS, *models.TORCHVISION_NETS))
    checkpoint: str = option(None, "float base classifier, trained with noise; else one is trained")
    pretrained: bool = option(False, "train the base from torchvision's weights, which are downloaded")
    mean: list = option(None, "normalisation of the network, such as 0.5 0.5 0.5", type=float, nargs=3)
    std: list = option(None, "likewise", type=float, nargs=3)
    sigma: float = option(None, "standard deviation of the noise, in [0, 1] pixels (default: 0.25)")
    budget: float = option(0.015, "BitOPs allowed, as a fraction of the float network's")
    size_budget: float = option(None, "weight bits allowed, as a fraction of the float network's")
    epochs: int = option(None, "training epochs of the base classifier")
    episodes: int = option(None, "search episodes, one policy each")
    episode_steps: int = option(None, "fine-tuning steps of each policy before it is certified")
    finetune_epochs: float = option(None, "fine-tuning epochs of the best policy, such as 2.5")
    search_images: int = option(None, "training images held out for the search")
    search_n: int = option(None, "samples per search image of the base classifier's certificate")
    n_p: int = option(None, "samples per search image of a policy's reward")
    images: int = option(None, "test images of the final certificates, evenly spaced over the set")
    n0: int = option(100, "samples that select the class")
    n: int = option(None, "samples that bound its probability")
    alpha: float = option(0.001, "probability that one image's certificate is wrong")
    alpha_zeta: float = option(0.001, "the same for the disparity in the incremental certificate")
    gamma: float = option(None, "cached p_A from which IRS as published draws fresh samples")
    reward_estimate: str = option("point", "reward: estimate, or IRS", choices=("point", "certified"))
    image_size: int = option(None, "side of the images the network sees")
    batch_size: int = option(128, "training batch")
    eval_batch: int = option(None, "samples per forward pass when certifying")
    workers: int = option(WORKERS, "processes that decode image files")
    seed: int = option(0, "seed of training, search and noise")
    device: str = option("auto", "auto, cuda, mps or cpu", choices=("auto", "cuda", "mps", "cpu"))
    out: str = option(None, "run folder (default: named after the options, under runs/)")
    restart: bool = option(False, "do those stages of the run in --out anew whose options differ now")
    evaluate: str = option(None, "certify this saved network on the test images, and stop")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def parse_config(argv=None) -> Config:
    """Options from the command line, checked and completed. Raises ValueError."""
    parser = OneLineParser(allow_abbrev=False, description="ARQ: mixed-precision quantization that keeps "
                           "certified robustness. Defaults not shown depend on the dataset (DEFAULTS).")
    for f in dataclasses.fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(flag(f.name), default=f.default, **{**kind, **f.metadata})
    return complete_config(Config(**vars(parser.parse_args(argv))))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
    for name, value in {**DEFAULTS[config.dataset], "sigma": 0.25, **saved}.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.pretrained and (config.checkpoint or config.arch not in models.TORCHVISION_NETS):
        raise ValueError(f"--pretrained is for {', '.join(models.TORCHVISION_NETS)}, without --checkpoint")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    best = accelerator.type if accelerator else "cpu"
    config.device = best if config.device == "auto" else config.device
    if config.device not in (best, "cpu"):
        raise ValueError(f"--device {config.device} is not available on this machine; use --device auto")
    if config.eval_batch is None:  # small batches stay in a CPU's cache; a GPU wants large ones
        samples = 50 if config.device == "cpu" else 2000
        config.eval_batch = max(8, samples * 32 ** 2 // max(config.image_size, 32) ** 2)
    for name, value in vars(config).items():
        if name in ABOVE_0_BELOW and value is not None and not 0 < value < ABOVE_0_BELOW[name]:
            raise ValueError(f"{flag(name)} must be above 0 and below {ABOVE_0_BELOW[name]}, not {value}")
        if name in AT_LEAST and not AT_LEAST[name] <= value < 2 ** 31:
            raise ValueError(f"{flag(name)} must be at least {AT_LEAST[name]} and below 2^31, not {value}")
    for name in ("n", "search_n", "n_p"):
        n, alpha = getattr(config, name), config.alpha + (config.alpha_zeta if name == "n_p" else 0)
        if not certify.can_certify(n, alpha):
            needed = math.floor(math.log(alpha) / math.log(0.5)) + 1
            raise ValueError(f"{flag(name)} {n} never certifies at alpha = {alpha:g}; give at least {needed}")
    if config.n_p > config.search_n:
        raise ValueError(f"--n-p {config.n_p} exceeds --search-n {config.search_n}, all it can replay")
    if config.out is None:
        file = Path(config.evaluate or "").resolve()
        source = f"evaluate-{file.parent.name}-{file.stem}" if config.evaluate else f"budget{config.budget:g}"
        config.out = f"runs/{config.dataset}-{config.arch}-sigma{config.sigma:g}-{source}-seed{config.seed}"
    return config


# ---- progress and files ----

def progress(label: str, unit: str, done: int, total: int, block: int = 1) -> Iterator[int]:
    """Count from `done` to `total` in blocks. On a terminal, one line shows rate and time left meanwhile."""
    start, shown = time.monotonic(), 0.0
    on_terminal = bool(label) and sys.stderr.isatty() and RANK == 0
    for first in range(done, total, block):
        yield first
        now, reached = time.monotonic(), min(first + block, total)
        if on_terminal and now - shown > 0.2:
            shown, rate = now, (reached - done) / max(now - start, 1e-9)
            print(f"\r  {label}: {reached}/{total} {unit}, {rate:.3g}/s, "
                  f"{duration((total - reached) / rate)} left   ", end="", file=sys.stderr, flush=True)
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
    part, data = path.with_name(path.name + ".part"), io.BytesIO()
    if path.suffix == ".json":
        value = (json.dumps(value, indent=1) + "\n").encode()
    if not isinstance(value, bytes):  # torch.save to a full disk would not be an OSError
        torch.save(value, data)
    with part.open("wb") as file:
        file.write(value if isinstance(value, bytes) else data.getbuffer())
        os.fsync(file.fileno())
    os.replace(part, path)


read_state = functools.partial(torch.load, map_location="cpu", weights_only=True)


# ---- processes and stages ----

def join_processes(config: Config) -> None:
    """Become one of torchrun's processes: nccl on GPUs, one each, and gloo on CPUs."""
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if config.device == "cuda" else "gloo", timeout=timedelta(days=1))
    warnings.filterwarnings("ignore", "Grad strides")  # of 1x1 convolutions: costs nothing that matters
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def gather(value) -> list:
    """Every process's value, by rank, in every process; waits for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


class Stages:
    """What the stages of a run have reached, in one file: the same command continues after the last `save`.

    keys: for each stage, what it depends on. One that was begun with another key raises ValueError; with
    restart, it is forgotten. Seconds and forward passes add up over interruptions, less what those undid."""

    def __init__(self, path: Path, keys: dict[str, dict], restart: bool = False):
        self.path, self.keys, self.passes = path, keys, 0
        self.records = read_state(path) if path.exists() else {}
        for name, record in list(self.records.items()):
            old, new = record["key"], keys.get(name, {})
            differ = [f"{flag(option)} {old.get(option)} there, {new.get(option)} here"
                      for option in {**old, **new} if old.get(option) != new.get(option)]
            if differ and not (restart and name in keys):
                raise ValueError(f"{path.parent} holds another run, from '{name}' on: {'; '.join(differ[:4])}"
                                 f"; give another --out, or --restart to do that anew")
            if differ:
                del self.records[name]

    def watch(self, classifier: nn.Module) -> None:
        """Count the images that pass through this network, or through copies made of it from now on."""
        def count(module, inputs):
            self.passes += len(inputs[0])
        classifier.register_forward_pre_hook(count)

    def finished(self, name: str, product: Path) -> bool:
        return name in self.records and self.records[name]["finished"] and all(gather(product.exists()))

    def begins(self, name: str, product: Path) -> bool:
        """Whether the stage that makes this file has work left: `state` is what it saved last, or None."""
        if self.finished(name, product):
            print(f"{name}: finished earlier, used again", flush=True)
            return False
        self.path.with_name("results.json").unlink(missing_ok=True)
        if name not in self.records or self.records[name]["finished"]:
            for other in [other for other in self.keys if set(self.keys[name]) < set(self.keys[other])]:
                self.records.pop(other, None)  # it rests on what is made anew
            self.records[name] = {"key": self.keys[name], "seconds": 0.0, "forward_passes": 0, "state": None}
        self.record, self.since, self.passes = self.records[name], time.monotonic(), 0
        self.state = self.record["state"]
        print(f"{name} ..." if self.state is None else f"{name}, continued ...", flush=True)
        return True

    def save(self, state, finished: bool = False) -> None:
        """Keep the state of the stage at work, or that it is finished. Every process calls it, and waits."""
        now, passes = time.monotonic(), sum(gather(self.passes))
        self.record.update(seconds=self.record["seconds"] + now - self.since, state=state, finished=finished,
                           forward_passes=self.record["forward_passes"] + passes)
        self.since, self.passes = now, 0
        write_whole(self.path, self.records)

    def times(self) -> dict[str, dict]:
        return {name: {"seconds": round(record["seconds"], 2), "forward_passes": record["forward_passes"]}
                for name, record in self.records.items()}


# ---- images ----

class ImageSet:
    """Labelled images, ordered by label, then by name or original position: uint8 (N, 3, S, S), or files."""

    def __init__(self, labels: list[int], classes: list[str], size: int, pixels: Optional[Tensor] = None,
                 paths: Optional[list[str]] = None, workers: int = 0):
        self.labels, self.classes, self.size, self.pixels = labels, classes, size, pixels
        self.paths, self.workers = paths, workers

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """A short name for what the set holds, from its classes, labels and a few images."""
        some = self.read(evenly_spaced(min(16, len(self)), len(self)))
        return digest(json.dumps([self.classes, self.labels, self.size]).encode(), some.numpy().tobytes())

    def batches(self, batches: Iterator) -> Iterator[Tensor]:
        """uint8 images for each indices of many; worker processes decode files ahead. Raises ValueError."""
        if self.pixels is not None:
            yield from map(self.read, batches)
            return
        paths = [[self.paths[i] for i in indices] for indices in batches]
        # A generator of its own: starting workers must not move the one that training draws from.
        for images in DataLoader(paths, None, collate_fn=functools.partial(read_images, size=self.size),
                                 num_workers=self.workers, generator=torch.Generator()):
            if isinstance(images, ValueError):
                raise images
            yield images

    def read(self, indices) -> Tensor:
        """uint8 images (len(indices), 3, S, S)."""
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(indices)]
        return torch.stack([read_image(self.paths[i], self.size) for i in indices])

    def batch(self, indices, device="cpu") -> Tensor:
        """Float images (len(indices), 3, S, S) in [0, 1]."""
        return self.read(indices).to(device).float().div_(255)


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


def load_folder(root: Path, config: Config) -> ImageSet:
    """An image tree `root/<class>/*`: classes by sorted folder name, files by sorted name."""
    try:
        found = torchvision.datasets.ImageFolder(root)
    except FileNotFoundError as error:
        raise ValueError(f"{str(error).split('. S')[0]}; expected {root}/<class>/*.jpg or .png") from None
    paths, labels = map(list, zip(*found.samples))
    return ImageSet(labels, found.classes, config.image_size, paths=paths, workers=config.workers)


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
        raise ValueError(f"--search-images {config.search_images} leaves less than one --batch-size of "
                         f"{config.batch_size}: there are {len(images)} training images")
    return images


def load_images(config: Config) -> tuple[ImageSet, ImageSet]:
    """The training and the test set, of the same classes. Raises ValueError as load_split does."""
    test_images, train_images = load_split(config, False), load_split(config, True)
    if train_images.classes != test_images.classes:
        differ = sorted(set(train_images.classes) ^ set(test_images.classes))[0]
        raise ValueError(f"--data {config.data}: the class {differ!r} is only in training or only in test")
    return train_images, test_images


def load_cifar10(config: Config, train: bool) -> ImageSet:
    root = config.data
    try:
        present = (Path(root) / "cifar-10-batches-py").is_dir()
        data = torchvision.datasets.CIFAR10(root, train=train, download=not present)
    except Exception:  # network and file errors of many kinds, one remedy
        source = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
        raise ValueError(f"no CIFAR-10 in --data {root}, nor could it be downloaded; unpack {source} there, "
                         f"or put an image tree there (train/<class>/*, test/<class>/*)") from None
    labels, order = torch.tensor(data.targets).sort(stable=True)
    pixels = TF.resize(torch.from_numpy(data.data)[order].permute(0, 3, 1, 2), [config.image_size] * 2)
    return ImageSet(labels.tolist(), data.classes, config.image_size, pixels.contiguous())


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
    """Ten classes of shapes, uint8 (count, 3, size, size) sorted by class, each of its own place, size, tilt
    and colour on a mottled ground; many have so little contrast that noise of sigma 0.25 costs accuracy."""
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
        sign = (uniform(-1, 1, k, 3, 1, 1)).sign()
        image = uniform(0.25, 0.75, k, 3, 1, 1) + mottle + uniform(0.15, 0.45, k, 1, 1, 1) * sign * mask
        pixels.append(image.clamp(0, 1).mul(255).round().to(torch.uint8))
    return ImageSet(labels, list(SHAPES), size, torch.cat(pixels))


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` indices of a set of `total`, evenly spaced from the first."""
    return [i * total // count for i in range(count)]


def augment(images: Tensor, uniform: Tensor) -> Tensor:
    """Shift each image (B, C, H, W) by up to an eighth of its side, zero padded, and flip it or not, as three
    uniform numbers in [0, 1) say, (3, B)."""
    count, _, height, width = images.shape
    pad = max(1, height // 8)
    top, left = (uniform[:2, :, None] * (2 * pad + 1)).long()
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(uniform[2, :, None] < 0.5, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)                                  # B, H, W, C
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(classifier: nn.Module, images: ImageSet, indices: list[int], config: Config, steps: int, lr: float,
          weight_decay: float, purpose: str, stages: Optional[Stages] = None) -> None:
    """Gaussian noise augmentation (Cohen et al., section 3.3): cross-entropy of augmented images plus noise.

    Nesterov SGD for `steps` batches; the rate rises over the first fifth and falls along a cosine. Weight
    decay spares steps, biases and BatchNorm. Randomness is seeded anew every epoch: equal arguments train
    equal networks, and with stages an interrupted call continues from its last epoch. Under torchrun each
    process takes its share of every batch; the gradient is the whole batch's, but for BatchNorm, which sees
    the share. GPUs compute in bfloat16 where torch.autocast lets them."""
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}|{purpose}".encode()).digest()[:4], "little")
    groups = [{"params": [p for p in classifier.parameters() if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in classifier.parameters() if p.ndim <= 1]}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    labels, indices, first = torch.tensor(images.labels), torch.tensor(indices), 0
    epoch = len(indices) // config.batch_size
    if stages is not None and stages.state is not None:
        classifier.load_state_dict(stages.state["classifier"])
        optimizer.load_state_dict(stages.state["optimizer"])
        first = stages.state["step"]
    network = DistributedDataParallel(classifier) if WORLD > 1 else classifier
    classifier.train()
    count = progress(purpose if stages else "", "batches", first, steps)
    for start in range(first, steps, epoch):
        torch.manual_seed(seed + start // epoch)
        # What is random is drawn for whole batches: it does not depend on the number of processes.
        batches = indices[torch.randperm(len(indices))].split(config.batch_size)[:min(epoch, steps - start)]
        batches = [batch[RANK::WORLD] for batch in batches]
        for chosen, pixels, step in zip(batches, images.batches(batches), count):
            falling = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / (0.2 * steps + 1), falling)
            uniform = torch.rand(3, config.batch_size)[:, RANK::WORLD]
            x = augment(pixels.to(config.device), uniform).float() / 255
            noise = torch.randn(config.batch_size, *x.shape[1:], device=x.device)[RANK::WORLD]
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type in AUTOCAST_DEVICES):
                logits = network(x + config.sigma * noise)
            losses = F.cross_entropy(logits.float(), labels[chosen].to(x.device), reduction="none")
            optimizer.zero_grad()
            (WORLD * losses.sum() / config.batch_size).backward()  # the mean over processes is taken of this
            optimizer.step()
            models.keep_steps_positive(classifier)
        if stages is not None:
            if not torch.isfinite(losses).all():
                raise ValueError(f"{purpose}: the loss is not finite at step {step + 1}; try another --seed")
            stages.save({"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict(),
                         "step": step + 1})
    next(count, None)
    for tensor in classifier.buffers() if WORLD > 1 else ():
        dist.broadcast(tensor, 0)  # BatchNorm's statistics are each process's own
    classifier.eval()


# ---- search ----

class BitWidthEnvironment:
    """An episode walks the layers; each takes two actions, one for its weights, one for its input (HAQ, 3.2).

    A state (10,) holds, in [0, 1]: index, c_in, c_out, kernel, stride, input map size, number of weights,
    depthwise flag, weight-or-input flag, previous action. First and last layer keep 8 bits, unvisited."""

    def __init__(self, table: list[Layer], budget: float, size_budget: Optional[float] = None):
        models.enforce_budget(table, models.uniform_policy(table, models.MIN_BITS), budget, size_budget)
        self.table, self.budget, self.size_budget = table, budget, size_budget
        self.steps = [(layer, kind) for layer in table[1:-1] for kind in (0, 1)]
        rows = [[i // 2, layer.c_in, layer.c_out, layer.kernel, layer.stride, layer.map_size, layer.weights,
                 layer.depthwise, kind] for i, (layer, kind) in enumerate(self.steps)]
        features = torch.tensor(rows, dtype=torch.float32)
        low, high = features.amin(0), features.amax(0)
        self.features = (features - low) / (high - low).clamp_min(1e-9)
        self.state_size = self.features.shape[1] + 1

    @staticmethod
    def bits(action: float) -> int:
        """round(b_min - 1/2 + a (b_max - b_min + 1)): equal shares of [0, 1] for every width."""
        bits = round(models.MIN_BITS - 0.5 + action * (models.MAX_BITS - models.MIN_BITS + 1))
        return min(models.MAX_BITS, max(models.MIN_BITS, bits))

    def rollout(self, act: Callable[[Tensor], float]) -> tuple[Tensor, Tensor, Policy]:
        """One episode: states (T, 10), actions (T, 1) as emitted, and the policy forced under the budget."""
        policy = models.uniform_policy(self.table, models.MIN_BITS)
        states, actions, action = [], [], 1.0
        for features, (layer, kind) in zip(self.features, self.steps):
            states.append(torch.cat([features, torch.tensor([action])]))
            action = act(states[-1])
            actions.append(action)
            policy[layer.name][kind] = self.bits(action)
        policy = models.enforce_budget(self.table, policy, self.budget, self.size_budget)
        return torch.stack(states), torch.tensor(actions)[:, None], policy


def search(environment: BitWidthEnvironment, evaluate: Callable[[Policy], float], base_acr: float,
           episodes: int, seed: int, log: Path, stages: Stages) -> None:
    """Algorithm 1 after the base certificate: the agent's episodes, one line each in `log` (search.jsonl).
    evaluate(policy) is the ACR of g^P on the search images. All processes run the agent; rank 0's counts."""
    warmup = min(20, max(1, episodes // 3))
    agent = DDPG(environment.state_size, seed, DDPGConfig(episodes=episodes, warmup_episodes=warmup))
    records = stages.state["records"] if stages.state else []
    if records:
        agent.load_state_dict(stages.state["agent"])
    write_whole(log, "".join(json.dumps(record) + "\n" for record in records).encode())
    start, first = time.monotonic(), len(records)
    for episode in range(first, episodes):
        noise, began = agent.noise, time.monotonic()
        states, actions, policy = gather(environment.rollout(agent.act))[0]
        acr = evaluate(policy)
        reward = (acr - base_acr) / base_acr
        agent.learn(states, actions, reward)
        records.append({"episode": episode, "acr": acr, "reward": reward, "random": episode < warmup,
                        "noise": noise, "bitops_ratio": models.bitops_ratio(environment.table, policy),
                        "size_bytes": models.size_bytes(environment.table, policy),
                        "seconds": round(time.monotonic() - began, 3), "policy": policy})
        if RANK == 0:
            with log.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
        stages.save({"agent": agent.state_dict(), "records": records})
        left = (time.monotonic() - start) / (episode + 1 - first) * (episodes - episode - 1)
        print(f"  episode {episode + 1:>3}/{episodes}  ACR {down(acr)}  reward {reward:+.4f}  "
              f"BitOPs {100 * records[-1]['bitops_ratio']:.3f} %  "
              f"best ACR {down(max(record['acr'] for record in records))}  {duration(left)} left", flush=True)


# ---- the run ----

def build_base(config: Config, num_classes: int, path: Optional[Path]) -> Classifier:
    """The float base classifier: --checkpoint, one trained earlier at `path`, or a new one to be trained."""
    of = config.arch, num_classes, config.mean, config.std
    if config.checkpoint is not None:
        return prepare(models.load_base_checkpoint(config.checkpoint, *of), config)
    torch.manual_seed(config.seed)
    base = models.build_classifier(*of)
    if path.exists():
        base.load_state_dict(read_state(path))
    elif config.pretrained and RANK == 0:  # training hands rank 0's weights to all
        models.load_pretrained(base, config.arch)
    return prepare(base, config)


def prepare(classifier: Classifier, config: Config) -> Classifier:
    """On the device, in evaluation mode, in the memory layout that convolutions run fastest in."""
    return classifier.to(config.device, memory_format=torch.channels_last).eval()


def integers(classifier: Classifier, config: Config) -> nn.Module:
    """The network as it is evaluated. On a GPU its sums are checked at the batch that will run."""
    batch = 2 if config.device == "cpu" else config.eval_batch
    return models.integer_network(prepare(classifier, config), batch)


def in_blocks(total: int, done: int, block: int, work: Callable[[slice], object]) -> Iterator[list]:
    """work(part) on blocks of images, one a process at a time. Yields each round's results, in order, to all.
    Blocks, and with them batches, depend neither on the number of processes nor on interruptions."""
    block = max(1, block)
    for first in progress("certifying", "images", done, total, block * WORLD):
        start = first + RANK * block
        results = gather(work(slice(start, min(start + block, total))) if start < total else None)
        yield [result for result in results if result is not None]


def certify_search_images(classifier: Classifier, images: Tensor, labels: list[int], ids: list[int],
                          num_classes: int, config: Config, path: Path, stages: Stages):
    """FullRobustCertify(f) on the search images: a certify.ReplayCache."""
    key, sizes = NoiseKey(config.seed, "search"), (config.n0, config.search_n)

    def work(part: slice):
        cache = certify.certify_and_cache(classifier, images[part], labels[part], ids[part], num_classes,
                                          config.sigma, *sizes, config.alpha, key, config.eval_batch)
        return [vars(row) for row in cache.certificates], cache.predictions

    if stages.begins("certify the base, search images", path):
        done = stages.state or []
        images_done = sum(len(rows) for rows, _ in done)
        for results in in_blocks(len(ids), images_done, 10_000 // config.search_n, work):
            done += results
            stages.save(done)
        write_whole(path, done)
        stages.save(None, finished=True)
    done = read_state(path)
    rows = [certify.Certificate(**row) for rows, _ in done for row in rows]
    predictions = torch.cat([predictions for _, predictions in done])
    return certify.ReplayCache(rows, predictions, certify.estimate_key(key, config.search_n))


class PolicyEvaluator:
    """ACR of g^P on the search images: widths set on the base's weights, a brief fine-tuning, n_p samples."""

    def __init__(self, classifier: Classifier, cache: certify.ReplayCache, images: Tensor,
                 train_images: ImageSet, train_ids: list[int], config: Config):
        # Images of wrong class cost nothing: every process gets as many of the others.
        rows = cache.certificates
        mine = sorted(range(len(rows)), key=lambda i: rows[i].selected != rows[i].label)[RANK::WORLD]
        self.cache = certify.ReplayCache([rows[i] for i in mine], cache.predictions[mine], cache.key)
        self.classifier, self.images = classifier, images[mine]
        self.train_images, self.train_ids, self.config = train_images, train_ids, config
        self.base_state = copy.deepcopy(classifier.state_dict())

    def __call__(self, policy: Policy) -> float:
        config = self.config
        self.classifier.load_state_dict(self.base_state)
        models.set_policy(self.classifier, policy)
        train(self.classifier, self.train_images, self.train_ids, config, config.episode_steps, EPISODE_LR,
              FINETUNE_DECAY, "episode")
        what = integers(self.classifier, config), self.cache, self.images, config.n_p
        if config.reward_estimate == "point":
            radii = certify.estimate_radii(*what, config.eval_batch).tolist()
        else:
            rows = certify.certify_incremental(*what, config.alpha_zeta, config.gamma, config.eval_batch)
            radii = [row.radius * row.correct for row in rows]
        return statistics.fmean(radius for part in gather(radii) for radius in part)


def certify_images(stage: str, classifier: Classifier, images: ImageSet, config: Config, path: Path,
                   purpose: str, stages: Stages) -> list[certify.Certificate]:
    """The final certificate on test images, one flushed row an image; finished blocks are kept."""
    if not stages.begins(stage, path):
        return certify.read_certificates(path)
    indices, key = evenly_spaced(config.images, len(images)), NoiseKey(config.seed, purpose)
    arithmetic = getattr(classifier, "path", "float")
    done, begun = stages.state or (0, arithmetic)
    if begun != arithmetic:
        raise ValueError(f"{path} was begun in {begun} arithmetic, here it is {arithmetic}; give a new --out")
    rows, text = certify.read_certificates(path)[:done] if done and path.exists() else [], io.StringIO()
    certify.write_certificates(text, rows)
    write_whole(path, text.getvalue().encode())  # without rows of an unfinished block

    def work(part: slice):
        labels = [images.labels[i] for i in indices[part]]
        x, sizes = images.batch(indices[part], config.device), (config.n0, config.n)
        return certify.certify(classifier, x, labels, indices[part], len(images.classes), config.sigma,
                               *sizes, config.alpha, key, config.eval_batch)

    for results in in_blocks(len(indices), len(rows), 5_000 // config.n, work):
        rows += sum(results, [])
        if RANK == 0:
            with path.open("a") as file:
                certify.write_certificates(file, sum(results, []))
        stages.save((len(rows), arithmetic))
    stages.save(None, finished=True)
    return rows


def print_expected_times(base: Classifier, images: ImageSet, ids: list[int], config: Config, trained: bool):
    """What each stage should take, from a few batches through a copy of the base and a quantized one."""
    simulated, plain = copy.deepcopy(base), copy.deepcopy(base)
    table = models.quantize_model(simulated, config.image_size)
    models.set_policy(simulated, models.uniform_policy(table, 4))
    quantized, x = integers(simulated, config), images.batch(ids[:1], config.device)

    def seconds(count: int, work: Callable, *arguments) -> float:
        """An image's time in a call that takes `count` of them; a short first call pays for warming up."""
        for _ in range(2):
            start = time.monotonic()
            work(*arguments)
            x.cpu()  # waits for the device
            if max(gather(time.monotonic() - start)) > 1:  # the same for all processes
                break
        return (time.monotonic() - start) / count

    count, batch = 3 * config.eval_batch, max(2 * WORLD, min(config.batch_size, config.eval_batch))
    sample = x, [0], count, len(images.classes), config.sigma, NoiseKey(0, "timing"), config.eval_batch
    batches = images, ids[:batch], dataclasses.replace(config, batch_size=batch), 2, 0.0, 0.0, "timing"
    float_pass, int_pass = (seconds(count, certify.class_counts, net, *sample) / WORLD
                            for net in (base, quantized))
    base_step, step = (seconds(2 * batch, train, net, *batches) for net in (plain, simulated))
    final = config.images * (config.n0 + config.n)
    episode = config.episode_steps * config.batch_size * step + config.search_images * config.n_p * int_pass
    stages = {"train the base": 0 if trained else config.epochs * len(ids) * base_step,
              "certify the base": (config.search_images * config.search_n + final) * float_pass,
              f"search, {config.episodes} episodes": config.episodes * episode,
              "fine-tune": config.finetune_epochs * len(ids) * step, "certify ARQ": final * int_pass}
    print(f"expected on {config.device}, from {1 / float_pass:.0f} float and {1 / int_pass:.0f} quantized "
          f"images/s ({quantized.path}), {1 / step:.0f} in training")
    for name, needed in {**stages, "together": sum(stages.values())}.items():
        print(f"  {name:<34}{duration(needed):>8}", flush=True)


def stage_keys(config: Config, stages: dict[str, tuple], train_images: ImageSet,
               test_images: ImageSet) -> dict[str, dict]:
    """For each stage the options that its outcome depends on; files and images by their contents."""
    values = dataclasses.asdict(config)
    for name in ("checkpoint", "evaluate"):
        if values[name] is not None:
            values[name] = f"file {digest(Path(values[name]).read_bytes())}"
    values["data"] = f"images {train_images.fingerprint()}"
    values["data (test)"] = f"images {test_images.fingerprint()}"
    return {stage: {name: values[name] for name in names} for stage, names in stages.items()}


def open_run(config: Config, keys: dict[str, dict]) -> Stages:
    """The run folder, new or one to be continued. Raises ValueError, before anything is written."""
    out = Path(config.out)
    if out.exists() and not (out / "state.pt").exists():
        if not out.is_dir() or any(entry.suffix != ".part" for entry in out.iterdir()):
            raise ValueError(f"--out {out} is not empty and holds no run of this program; give another --out")
    stages = Stages(out / "state.pt", keys, config.restart)
    gather(None)  # every process has seen the folder as it was
    out.mkdir(parents=True, exist_ok=True)
    write_whole(stages.path, stages.records)  # what is forgotten must not come back
    write_whole(out / "config.json", dataclasses.asdict(config))
    return stages


def run(config: Config) -> None:
    """The whole method: base, its certificate, search, fine-tuning, the final certificates, results."""
    train_images, test_images = load_images(config)
    num_classes = len(train_images.classes)
    search_ids = evenly_spaced(config.search_images, len(train_images))
    train_ids = sorted(set(range(len(train_images))) - set(search_ids))
    epoch = len(train_ids) // config.batch_size
    keys = stage_keys(config, STAGES, train_images, test_images)
    key = digest(json.dumps(keys["train the base"]).encode())  # a base serves all runs of equal base options
    path = Path("runs/bases") / f"{config.dataset}-{config.arch}-sigma{config.sigma:g}-{key}.pt"
    trained = config.checkpoint is not None or path.exists()
    base = build_base(config, num_classes, path)
    table = models.quantize_model(copy.deepcopy(base), config.image_size)
    environment = BitWidthEnvironment(table, config.budget, config.size_budget)
    stages, out = open_run(config, keys), Path(config.out)
    print(f"{config.dataset}: {len(train_ids)} training, {len(search_ids)} search and {config.images} test "
          f"images, {num_classes} classes; {config.arch}, sigma {config.sigma:g}; run folder {out}")
    if not stages.finished("certify ARQ, test images", out / "certificates.tsv"):
        print_expected_times(base, train_images, train_ids, config, trained)
    stages.watch(base)
    if trained:
        stages.records.get("train the base", {}).update(state=None, finished=True)  # if killed just before
        print(f"base classifier: {config.checkpoint or path}, trained earlier")
    elif stages.begins("train the base", path):
        steps, lr = config.epochs * epoch, FINETUNE_LR if config.pretrained else BASE_LR
        train(base, train_images, train_ids, config, steps, lr, BASE_DECAY, "base", stages)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, base.state_dict())
        stages.save(None, finished=True)

    # Algorithm 1: certify f on the search images, then search.
    classifier = copy.deepcopy(base)  # with the hook that counts passes
    models.quantize_model(classifier, config.image_size)
    search_images = train_images.batch(search_ids, config.device)
    calibrate(classifier, search_images, config)
    labels = [train_images.labels[i] for i in search_ids]
    cache = certify_search_images(classifier, search_images, labels, search_ids, num_classes, config,
                                  out / "search_cache.pt", stages)
    base_acr = certify.average_certified_radius(cache.certificates)
    print(f"  ACR of the base on the search images: {down(base_acr)}")
    if base_acr == 0:
        raise ValueError("the base certifies none of the search images; give one trained with noise "
                         "(--checkpoint), more --epochs or a lower --sigma")
    evaluate = PolicyEvaluator(classifier, cache, search_images, train_images, train_ids, config)
    log, file = out / "search.jsonl", out / "model.arq"
    if stages.begins("search", log):
        search(environment, evaluate, base_acr, config.episodes, config.seed, log, stages)
        stages.save(None, finished=True)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    best = max(records, key=lambda record: record["acr"])
    policy = best["policy"]
    write_whole(out / "policy.json", policy)
    if stages.begins("fine-tune", file):
        classifier.load_state_dict(evaluate.base_state)
        models.set_policy(classifier, policy)
        train(classifier, train_images, train_ids, config, int(config.finetune_epochs * epoch), FINETUNE_LR,
              FINETUNE_DECAY, "fine-tune", stages)
        description = {name: getattr(config, name) for name in SAVED_OPTIONS}
        description["classes"] = train_images.classes
        write_whole(file, models.pack_model(classifier, table, description))
        stages.save(None, finished=True)

    # Test images are first seen here. What is certified is what was saved.
    base_rows = certify_images("certify the base, test images", base, test_images, config,
                               out / "base_certificates.tsv", "base certificate", stages)
    classifier = integers(models.load_model(file)[0], config)
    stages.watch(classifier)
    rows = certify_images("certify ARQ, test images", classifier, test_images, config,
                          out / "certificates.tsv", "certificate", stages)
    results = summarize(rows, classifier, table, policy, config, best["acr"], file)
    wide, path = models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS), config.checkpoint or path
    results["base"] = summarize(base_rows, base, table, wide, config, base_acr, Path(path))
    results["acr_difference"] = dict(zip(("mean", "standard_error"), certify.acr_difference(rows, base_rows)))
    write_whole(out / "results.json", {**results, "stages": stages.times()})
    print_report(results, policy, config, out)


def calibrate(classifier: Classifier, images: Tensor, config: Config) -> None:
    """Activation steps and signs from up to 256 noisy images, spread over the given ones."""
    images = images[evenly_spaced(min(256, len(images)), len(images))]
    generator = torch.Generator(images.device).manual_seed(config.seed)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    models.calibrate(classifier, (images + config.sigma * noise).split(50))  # whatever --eval-batch is


def evaluate_saved(config: Config) -> None:
    """--evaluate: certify a saved network, quantized (model.arq) or a float checkpoint, on test images."""
    test_images, out = load_split(config, False), Path(config.out)
    classes = test_images.classes
    if models.read_packed(config.evaluate):
        classifier, table, saved = models.load_model(config.evaluate)
        policy = saved["policy"]
        if saved["classes"] != classes:
            raise ValueError(f"--evaluate {config.evaluate} is for classes {saved['classes'][:3]} ..., these "
                             f"images have {classes[:3]} ...; give its --data")
    else:
        classifier = build_base(dataclasses.replace(config, checkpoint=config.evaluate), len(classes), None)
        table = models.quantize_model(classifier, config.image_size)
        policy = models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS)
    stages = open_run(config, stage_keys(config, EVALUATION, test_images, test_images))
    classifier = integers(classifier, config)
    stages.watch(classifier)
    rows = certify_images("certify", classifier, test_images, config, out / "certificates.tsv", "certificate",
                          stages)
    results = summarize(rows, classifier, table, policy, config, None, Path(config.evaluate))
    write_whole(out / "results.json", {**results, "stages": stages.times()})
    print_report(results, policy, config, out)


def summarize(rows, classifier: nn.Module, table: list[Layer], policy: Policy, config: Config,
              search_acr: Optional[float], file: Path) -> dict:
    """What results.json says of a network and its file, with what its certificates rest on; one-sided."""
    both_sides = certify.two_sided(rows)
    return {"acr": certify.average_certified_radius(rows), "accuracy": certify.certified_accuracy(rows, 0),
            "acr_standard_error": certify.acr_difference(rows)[1],
            "certified_accuracy": {str(radius): certify.certified_accuracy(rows, radius) for radius in RADII},
            "abstained": sum(row.predict == certify.ABSTAIN for row in rows) / len(rows),
            "two_sided": {"acr": certify.average_certified_radius(both_sides),
                          "accuracy": certify.certified_accuracy(both_sides, 0)},
            "bitops_ratio": models.bitops_ratio(table, policy), "images": len(rows), "search_acr": search_acr,
            "size_bytes": models.size_bytes(table, policy), "file_bytes": file.stat().st_size,
            "network": digest(file.read_bytes()), "path": getattr(classifier, "path", "float"),
            "sigma": config.sigma, "n0": config.n0, "n": config.n, "alpha": config.alpha,
            "expected_false_certificates": config.alpha * len(rows),
            "device": config.device, "torch": torch.__version__, "threads": torch.get_num_threads()}


def down(value: Optional[float]) -> str:
    """Four decimals, rounded towards zero: a printed radius never exceeds the certified one."""
    return "-" if value is None else f"{math.floor(value * 1e4) / 1e4:.4f}"


def print_report(results: dict, policy: Policy, config: Config, out: Path) -> None:
    """Float base and ARQ side by side, and the policy, one line a layer."""
    columns = {"float base": results["base"], "ARQ": results} if "base" in results else {"network": results}
    print(f"\n{config.dataset}, {config.arch}, sigma {config.sigma:g}: {results['images']} test images, n0 = "
          f"{config.n0}, n = {config.n}; radii one-sided unless named; alpha = {config.alpha:g} an image, so "
          f"{results['expected_false_certificates']:g} false certificates are expected at most\n")
    rows = {"accuracy (certified, radius 0)": lambda r: down(r["accuracy"]),
            **{f"certified accuracy at {radius}": lambda r, radius=str(radius): down(
                r["certified_accuracy"][radius]) for radius in RADII},
            "average certified radius (ACR)": lambda r: down(r["acr"]),
            "  standard error over images": lambda r: f"{r['acr_standard_error']:.4f}",
            "ACR of two-sided radii": lambda r: down(r["two_sided"]["acr"]),
            "ACR on the search images": lambda r: down(r["search_acr"]),
            "abstained": lambda r: f"{r['abstained']:.4f}",
            "BitOPs, % of float": lambda r: f"{100 * r['bitops_ratio']:.4f}",
            "weights, bytes (their bits)": lambda r: f"{r['size_bytes']:,}",
            "file, bytes": lambda r: f"{r['file_bytes']:,}",
            "arithmetic": lambda r: r["path"]}
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
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than glibc, which hands
        ctypes.CDLL(None).mallopt(-3, 2 ** 30)  # every tensor's memory back: faulting it in again is a fifth
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)  # of an evaluation
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
        known = "DataLoader worker", "by peer", "Broken pipe", "NCCL", "device ordinal", "memory"
        if not any(text in str(error) for text in known):
            raise
        message = f"error: {str(error).splitlines()[0]}; the same command continues, if memory suffices"
    time.sleep(3 * (RANK > 0))  # what all processes have to say, the first says; then torchrun ends them
    print(f"arq.py: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
