"""ARQ and its rivals in one frame: the same base, quantizer, fine-tuning and certificates.

    python benchmarks/compare.py --data DIR --checkpoints DIR

A cell is (method, sigma, budget, seed, n). Each finished one is a line of cells.jsonl, in
results/compare/, with its radii; tables and differences are computed from these lines. The
command goes on where it stopped, in the order of CELLS, and prints the tables at its end.
--checkpoints holds resnet20_cifar10_sigma{0.25,0.50,1.00}.pt, --data the images of CIFAR-10.
--table: print the tables of what is there, and stop."""

import argparse
import copy
import dataclasses
import json
import math
import platform
import shutil
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import certify  # noqa: E402
import models  # noqa: E402
from benchmarks import rivals  # noqa: E402
from ddpg import DDPG  # noqa: E402

RESULTS, RUNS = ROOT / "results" / "compare", ROOT / "runs" / "compare"
FRAME = """--dataset cifar10 --images 500 --n0 100 --search-images 200 --search-n 1000 --n-p 250
 --episodes 100 --episode-batches 48 --finetune-epochs 4 --distill 0.7"""
HAQ_IMAGES = 5000  # accuracy sees an image once, where IRS takes n_p samples of it
LONG = " 600 episodes"  # the default of arq.py
FLOAT = ["base", "control"]  # no policy; the control is fine-tuned as all are
AGENTS = {"ARQ": DDPG, "HAQ": DDPG}
AGENTS |= {"evolution": rivals.EvolutionAgent, "random": rivals.RandomAgent}
GRADIENT = {"LIMPQ": rivals.limpq, "NIPQ": rivals.nipq}
METHODS = ["ARQ" + LONG, "ARQ", "LIMPQ", "NIPQ", "evolution" + LONG, "evolution"]
METHODS += ["HAQ", "random", "uniform"]  # in the order of the tables


def cell(method: str, sigma: float, budget: float, seed: int = 0, n: int = 1000) -> dict:
    place = {"sigma": sigma, "budget": 1.0 if method in FLOAT else budget}
    return {"method": method, **place, "seed": seed, "n": n}


SIGMAS = 0.25, 0.5, 1.0
PLACES = [(0.25, 0.015), (0.25, 0.008), (0.25, 0.006)]
PLACES += [(0.5, 0.015), (0.5, 0.008), (1.0, 0.015), (1.0, 0.008)]
CELLS = [cell(name, sigma, 1.0) for sigma in SIGMAS for name in FLOAT]
CELLS += [cell(name, *p) for p in PLACES for name in ("ARQ", "uniform", "evolution", "LIMPQ")]
CELLS += [cell(name, *p) for p in PLACES[:2] for name in ("random", "HAQ", "NIPQ")]
TWICE = "ARQ", "evolution", "random", "LIMPQ"
CELLS += [cell(name, *p, seed=1) for p in PLACES[:2] for name in TWICE]
CELLS += [cell("ARQ" + LONG, *PLACES[i]) for i in (0, 1, 4, 6)]
CELLS += [cell("ARQ" + LONG, *PLACES[1], seed=1), cell("evolution" + LONG, *PLACES[1])]
HEADLINE = [*FLOAT, "ARQ"]  # once more, with more samples
CELLS += [cell(name, sigma, 0.015, n=10_000) for sigma in SIGMAS for name in HEADLINE]


def name_of(c: dict) -> str:
    method = c["method"].replace(" ", "-")
    name = f"sigma{c['sigma']:g}-budget{c['budget']:g}-{method}-seed{c['seed']}"
    return name if c["n"] == 1000 else f"{name}-n{c['n']}"


# ---- what cells share ----
class Frame:
    """Options, images and the float base of a cell; what several cells use is made once."""

    def __init__(self, c: dict, data: str, checkpoints: Path):
        checkpoint = checkpoints / f"resnet20_cifar10_sigma{c['sigma']:.2f}.pt"
        budget = 0.5 if c["method"] in FLOAT else c["budget"]  # a float network has none
        words = f"{FRAME} --sigma {c['sigma']} --budget {budget}"
        words += f" --seed {c['seed']} --n {c['n']}"
        words += " --episodes 600" if c["method"].endswith(LONG) else ""
        files = ["--data", data, "--checkpoint", str(checkpoint)]
        self.config = config = arq.parse_config(words.split() + files)
        images, self.test_images = [arq.load_images(config, train) for train in (True, False)]
        self.train_images, self.search_images = arq.hold_out(images, config.search_images)
        self.base = arq.build_base(config, len(images.classes))
        self.table = models.quantize_model(copy.deepcopy(self.base), config.image_size)
        self.options = dataclasses.asdict(config) | {"n": None}

    def folder(self, name: str, **ignored) -> arq.RunFolder:
        """A run folder; `ignored` options may differ from those that it was made with."""
        return arq.RunFolder(RUNS / name, self.options | ignored)

    def prepare_search(self) -> None:
        """The `cache` of a sigma and seed, which its searches share, and their `start`."""
        name = f"base-sigma{self.config.sigma:g}-seed{self.config.seed}"
        folder = self.folder(name, budget=None, episodes=None)
        work = arq.certify_images, self.base, self.search_images, self.config, "search"
        file = folder.make("certify the base, search images", "search_cache.pt", *work)
        self.cache = arq.read_state(file)
        self.start, _ = arq.prepare(self.base, self.search_images, self.config)


def calibrate(classifier, images: arq.ImageSet, config: arq.Config) -> None:
    """Step sizes from noisy images, as arq.prepare has them."""
    chosen = arq.evenly_spaced(min(256, len(images)), len(images))
    x = images.batch(chosen, config.device)
    generator = torch.Generator(x.device).manual_seed(config.seed)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    models.calibrate(classifier, (x + config.sigma * noise).split(50))


# ---- a cell ----
def choose(method: str, frame: Frame, path: Path, state, save) -> models.Policy:
    """The method's policy. What a search evaluates is in search.jsonl at `path`."""
    config, table, images = frame.config, frame.table, frame.train_images
    if method == "uniform":
        return rivals.uniform(table, config.budget)
    if method in GRADIENT:  # trains on as many batches as the episodes of a search
        passes = 1 + len(rivals.WIDTHS) if method == "LIMPQ" else 1
        num_batches = config.episodes * config.episode_batches // passes
        steps = partial(calibrate, images=frame.search_images, config=config)
        train = partial(arq.train, images=images, config=config, lr=arq.FINETUNE_LR)
        options = {"calibrate": steps, "train": train, "num_batches": num_batches}
        return GRADIENT[method](frame.base, table, config.budget, **options)
    given = {"start": frame.start, "base": frame.base, "images": images, "config": config}
    if method == "HAQ":
        count = min(HAQ_IMAGES, len(images))
        judged = images.subset(arq.evenly_spaced(count, len(images)))
        evaluate = partial(rivals.evaluate_accuracy, judged=judged, **given)
    else:
        pixels = frame.search_images.batch(range(config.search_images), config.device)
        evaluate = partial(arq.evaluate_policy, search_pixels=pixels, **given)
    environment = arq.BitWidthEnvironment(table, config.budget)
    search = environment, evaluate, frame.cache, config, path, state, save
    return arq.run_search(*search, AGENTS[method.removesuffix(LONG)])


def finetune(frame: Frame, policy: models.Policy, state, save) -> bytes:
    """The packed network after the fine-tuning that all methods share."""
    classifier, table = arq.prepare(frame.base, frame.search_images, frame.config)
    models.set_policy(classifier, policy)
    networks = classifier, frame.base, table
    return arq.finetune_best(*networks, frame.train_images, frame.config, state, save)


def finetune_float(frame: Frame, state, save) -> dict:
    """The control's weights: the same fine-tuning of a float network."""
    config, images = frame.config, frame.train_images
    network = copy.deepcopy(frame.base)
    num_batches = int(config.finetune_epochs * (len(images) // config.batch_size))
    schedule = config, num_batches, "fine-tune"
    arq.fine_tune(network, frame.base, images, *schedule, state, save)
    return network.state_dict()


def run(c: dict, frame: Frame) -> dict:
    """A cell, from the bits to its line. What is in its run folder is done."""
    method, config, table = c["method"], frame.config, frame.table
    folder = frame.folder(name_of(c | {"n": 1000}))
    log = folder.path / "search.jsonl"
    policy = models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS)
    network, file = copy.deepcopy(frame.base), Path(config.checkpoint)
    if method == "control":
        file = folder.make("fine-tune", "control.pt", partial(finetune_float, frame))
        network.load_state_dict(arq.read_state(file))
    elif method != "base":
        if method.removesuffix(LONG) in AGENTS:
            frame.prepare_search()
        work = partial(choose, method, frame, folder.path)
        policy = json.loads(folder.make("choose", "policy.json", work).read_text())
        file = folder.make("fine-tune", "model.arq", partial(finetune, frame, policy))
        classifier, _, _ = models.load_model(file)
        network = models.integer_network(classifier.to(config.device), config.eval_batch)
    purpose = "base certificate" if method == "base" else "certificate"
    work = partial(arq.certify_images, network, frame.test_images, config, purpose)
    rows_file = folder.make(f"certify, n = {c['n']}", f"certificates-n{c['n']}.tsv", work)
    rows = certify.read_certificates(rows_file)
    for made in (rows_file, file) if c["n"] == 10_000 else ():
        if made.suffix in (".tsv", ".arq"):
            shutil.copy(made, RESULTS / f"{name_of(c)}{made.suffix}")

    summary = arq.summarize(rows, network, table, policy, config, file)
    names = "acr accuracy abstained bitops_ratio size_bytes backend network".split()
    line = {**c, "policy": policy, **{name: summary[name] for name in names}}
    line["clean"] = rivals.accuracy(network, frame.test_images, config)
    lines = log.read_text().splitlines() if log.exists() else []
    line["search_acr"] = [round(json.loads(record)["acr"], 5) for record in lines]
    line["seconds_to_choose"] = round(folder.seconds.get("choose", 0.0), 1)
    cuda = config.device == "cuda"
    line["processor"] = torch.cuda.get_device_name() if cuda else platform.machine()
    radii = [row.radius * row.correct for row in rows]
    line["radii"] = [math.floor(radius * 1e5) / 1e5 for radius in radii]  # cut, not rounded
    return line


# ---- the lines, and tables of them ----
def append(c: dict) -> None:
    """The line starts anew after one that a kill cut short."""
    file = RESULTS / "cells.jsonl"
    cut_short = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a") as stream:
        stream.write("\n" * cut_short + json.dumps(c) + "\n")


def read_cells() -> list[dict]:
    """Finished cells. A line that a kill cut short is none, and its cell is run again."""
    file = RESULTS / "cells.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def at(cells: list[dict], method: str, sigma: float, budget: float, n: int = 1000) -> list:
    """The cells of one method there, which differ in their seeds."""
    place = cell(method, sigma, budget, n=n)
    del place["seed"]
    return [c for c in cells if place.items() <= c.items()]


def mean_acr(seeds: list[dict]) -> float:
    return statistics.fmean(c["acr"] for c in seeds)


def paired(ours: list, others: list) -> tuple[float, float]:
    """Mean and standard error over images of the difference."""
    gains = [a - b for a, b in zip(ours, others, strict=True)]
    return statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))


def acr_difference(ours: list[dict], others: list[dict]) -> tuple[float, float]:
    """Of the means over seeds; the standard error from radii of five digits."""
    radii = [zip(*[c["radii"] for c in seeds]) for seeds in (ours, others)]
    means = [list(map(statistics.fmean, images)) for images in radii]
    _, error = paired(*means)
    return mean_acr(ours) - mean_acr(others), error


def interval(mean: float, error: float, form: str) -> str:
    """The mean, with its 95 % interval."""
    return form.format(mean, mean - 1.96 * error, mean + 1.96 * error)


def markdown(titles: list[str], rows: list[list]) -> str:
    lines = [" | ".join(row) for row in (titles, ["---"] * len(titles), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def mark(seeds: list[dict]) -> str:
    return f" ({len(seeds)})" if len(seeds) > 1 else ""


def headline_table(cells: list[dict]) -> str:
    """The float networks and ARQ with n = 10,000; intervals are paired over images."""
    rows = []
    chosen = [c for s in SIGMAS for name in HEADLINE for c in at(cells, name, s, 0.015, 10_000)]
    for c in chosen:
        base = at(cells, "base", c["sigma"], 1.0, 10_000)
        right, base_right = ([radius > 0 for radius in d["radii"]] for d in (c, *base))
        mean, error = paired(right, base_right)
        gain = interval(*acr_difference([c], base), "{:+.4f} ({:+.4f} to {:+.4f})")
        gain_right = interval(100 * mean, 100 * error, "{:+.1f} ({:+.1f} to {:+.1f})")
        if c["method"] == "base":
            gain = gain_right = ""
        row = [f"{c['sigma']:g}", c["method"], f"{100 * c['bitops_ratio']:.3f}"]
        row += [f"{c['size_bytes']:,}", arq.cut(c["acr"]), gain]
        row += [f"{100 * c['accuracy']:.1f}", gain_right, f"{100 * c['clean']:.1f}"]
        rows.append(row)
    titles = ["sigma", "network", "BitOPs, %", "bytes", "ACR", "less base's"]
    return markdown([*titles, "accuracy, %", "less base's", "clean, %"], rows)


def method_table(title: str, places: list, methods: list[str], text) -> str:
    """A row per method, a column per place: text(method, place). Empty rows are left out."""
    rows = [[method, *[text(method, place) for place in places]] for method in methods]
    titles = [f"{sigma:g}, {100 * budget:g} %" for sigma, budget in places]
    return markdown([title, *titles], [row for row in rows if any(row[1:])])


def acr_table(cells: list[dict]) -> str:
    """ACR with n = 1,000, a column for each sigma and budget. (2): mean of two seeds."""

    def text(method: str, place: tuple) -> str:
        seeds = at(cells, method, *place)
        return arq.cut(mean_acr(seeds)) + mark(seeds) if seeds else ""

    return method_table("method; sigma, budget", PLACES, FLOAT + METHODS, text)


def difference_table(cells: list[dict], ours: str = "ARQ") -> str:
    """ACR of ours less each other method's, with standard errors. (2): two seeds of ours."""

    def text(method: str, place: tuple) -> str:
        seeds, others = at(cells, ours, *place), at(cells, method, *place)
        if not others or method == ours:
            return ""
        return "{:+.4f} ({:.4f})".format(*acr_difference(seeds, others)) + mark(seeds)

    places = [place for place in PLACES if at(cells, ours, *place)]
    return method_table(f"{ours} less", places, FLOAT + METHODS, text)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data")
    parser.add_argument("--checkpoints", type=Path, default=Path("."))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(argv)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for c in [] if options.table else CELLS:
        if name_of(c) in map(name_of, read_cells()):
            continue
        print(f"{name_of(c)} ...", flush=True)
        try:
            append(run(c, Frame(c, options.data, options.checkpoints)))
        except (ValueError, OSError) as error:  # a missing file, another frame's folder
            parser.error(str(error))
    cells = read_cells()
    tables = [headline_table(cells), acr_table(cells)]
    tables += [difference_table(cells), difference_table(cells, "ARQ" + LONG)]
    print("", *tables, sep="\n\n")


if __name__ == "__main__":
    main()
