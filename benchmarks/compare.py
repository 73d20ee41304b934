"""ARQ and its rivals in one frame: the same base, quantizer, fine-tuning and certificates; the bits differ.

    python benchmarks/compare.py --data DIR --checkpoints DIR [--cells sigma0.25-budget0.015 ...]

A cell is (method, sigma, budget, seed). Each finished one is a JSON and its certificates under
results/compare/; the command goes on where it stopped, in the order of CELLS, and ends with the tables, which
it keeps there in TABLES.md, too.
--checkpoints holds resnet20_cifar10_sigma{0.25,0.50,1.00}.pt, --data the images of CIFAR-10.
--cells: only those named, or whose names begin so; several commands may work on different ones at a time.
--table: print the tables of what is there, and stop.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from functools import cached_property, partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import certify  # noqa: E402
import models  # noqa: E402
from benchmarks import rivals, shared  # noqa: E402
from ddpg import DDPG  # noqa: E402

OUT, WORK = ROOT / "results" / "compare", ROOT / "runs" / "compare"
SURROGATE = ROOT / "results" / "surrogate.json"
CPU = ROOT / "results" / "compare-cpu"  # some cells that ran on CPUs, too
FRAME = """--dataset cifar10 --images 500 --n0 100 --n 1000 --episodes 100
 --search-images 200 --search-n 1000 --n-p 250 --finetune-epochs 4 --distill 0.7"""
STEPS = 12  # of training in an episode; twice as many where a method's name says so
HAQ_IMAGES = 5000  # its reward needs many: accuracy sees an image once, where IRS takes n_p samples of it
SHARED_EPOCHS = 1
AGENTS = {"random": rivals.RandomAgent, "evolution": rivals.EvolutionAgent}
AGENTS |= {"HAQ": DDPG, "ARQ estimate": DDPG, "ARQ": DDPG}
AGENTS |= {"ARQ 24 steps": DDPG, "ARQ from f": DDPG}  # from f: without shared.py
GRADIENT = {"LIMPQ": rivals.limpq, "NIPQ": rivals.nipq}
GRADIENT |= {name + " 24 steps": method for name, method in GRADIENT.items()}
RECIPE = " by recipe"  # episodes train from the base as the last fine-tuning does, for four times STEPS
AGENTS |= {"ARQ" + RECIPE: DDPG}
LONG = " 600 episodes"  # the default of arq.py; by gradient: as many batches as such a search trains on
AGENTS |= {name + LONG: AGENTS[name] for name in ("ARQ", "evolution")}
GRADIENT |= {"LIMPQ" + LONG: rivals.limpq}
MODEL = "model of 600 rewards"  # surrogate.py's best policy: what a search that knew its rewards would find
METHODS = ["ARQ", "uniform", "evolution", "random", "LIMPQ", "ARQ estimate", "HAQ", "NIPQ"]
FLOAT = ["base", "control"]  # no policy; the control is fine-tuned as all are
SHOWN = ["ARQ" + LONG, "ARQ", "LIMPQ", "NIPQ", "evolution" + LONG, "evolution", "HAQ", "random", "uniform"]
EVERY = list(dict.fromkeys([*FLOAT, *SHOWN, *METHODS, *GRADIENT, *AGENTS, MODEL]))  # in the tables' order


def cell(method: str, sigma: float, budget: float, seed: int = 0, n: int = 1000) -> dict:
    budget = 1.0 if method in FLOAT else budget
    return {"method": method, "sigma": sigma, "budget": budget, "seed": seed, "n": n}


CELLS = [cell(method, 0.25, 0.015) for method in [*FLOAT, *METHODS, "ARQ from f"]]
CELLS += [cell(method, 0.25, 0.008) for method in [*METHODS, "ARQ from f"]]
FEW = ["ARQ", "uniform", "evolution", "LIMPQ"]
CELLS += [cell(method, sigma, 0.015) for sigma in (1.0, 0.5) for method in FLOAT + FEW]
CELLS += [cell(method, 0.25, 0.006) for method in FEW]
CELLS += [cell(method, sigma, 0.008) for sigma in (0.5, 1.0) for method in FEW]
SEEDED = "ARQ", "evolution", "random", "LIMPQ"
CELLS += [cell(method, 0.25, budget, seed=1) for budget in (0.008, 0.015) for method in SEEDED]
LONGER = "ARQ 24 steps", "LIMPQ 24 steps", "NIPQ 24 steps", MODEL
CELLS += [cell(method, 0.25, 0.008) for method in LONGER]
CELLS += [cell("ARQ 24 steps", 0.25, 0.008, seed=1)]
CELLS += [cell(name + LONG, 0.25, 0.008) for name in ("ARQ", "evolution", "LIMPQ")]
CELLS += [cell("ARQ" + LONG, 0.25, 0.008, seed=1)]
CELLS += [cell("ARQ" + LONG, *place) for place in ((0.5, 0.008), (1.0, 0.008), (0.25, 0.015))]
CELLS += [cell("ARQ" + RECIPE, 1.0, 0.008)]
CELLS += [cell(method, s, 0.015, n=10_000) for s in (0.25, 0.5, 1.0) for method in (*FLOAT, "ARQ")]


SPENT = "seconds", "forward_passes"


def name_of(c: dict) -> str:
    place = f"sigma{c['sigma']:g}-budget{c['budget']:g}-{c['method'].replace(' ', '-')}-seed{c['seed']}"
    return place if c["n"] == 1000 else f"{place}-n{c['n']}"


class Frame:
    """What the cells of one sigma, budget and seed share."""

    def __init__(self, c: dict, data: str, checkpoints: Path):
        checkpoint = checkpoints / f"resnet20_cifar10_sigma{c['sigma']:.2f}.pt"
        budget = 0.5 if c["method"] in FLOAT else c["budget"]  # a float network has none
        longer = {" 24 steps": 2, RECIPE: 4}
        steps = STEPS * next((longer[end] for end in longer if c["method"].endswith(end)), 1)
        words = f"{FRAME} --finetune-steps {steps} --sigma {c['sigma']} --budget {budget}"
        words += f" --seed {c['seed']} --n {c['n']}"
        words += " --episodes 600" if c["method"].endswith(LONG) else ""
        reward = "estimate" if c["method"] == "ARQ estimate" else "irs"
        files = ["--data", data, "--checkpoint", str(checkpoint), "--reward", reward]
        self.config = config = arq.parse_config(words.split() + files)
        images, self.test_images = arq.load_images(config, True), arq.load_images(config, False)
        self.train_images, self.search_images = arq.hold_out(images, config.search_images)
        self.base = arq.build_base(config, len(images.classes))
        self.from_base = c["method"].endswith((" from f", RECIPE))
        self.table = models.quantize_model(copy.deepcopy(self.base), config.image_size)
        self.test_images = self.test_images.subset(arq.evenly_spaced(config.images, len(self.test_images)))

    def stages(self, folder: Path, *names: str, **own) -> arq.Stages:
        """Resumable stages of a folder, resting on the frame's options, but what its name says or `own`."""
        own |= dict.fromkeys(("out", "n", "reward")) | {"finetune_steps": STEPS, "episodes": 100}
        key = vars(self.config) | own | {"data": self.train_images.fingerprint()}
        key["checkpoint"] = arq.digest(Path(self.config.checkpoint).read_bytes())
        # A stage rests on those before it, too.
        keys = {name: key | dict.fromkeys(names[:i]) for i, name in enumerate(names)}
        while True:
            try:
                stages = arq.Stages(folder / "state.pt", keys)
                break
            except ValueError as error:
                if "another process" not in str(error):
                    raise
                print(f"{error}: waiting", flush=True)
                time.sleep(20)
        stages.watch(self.base)
        return stages

    @cached_property
    def cache(self) -> certify.ReplayCache:
        """The base's certificates of the search images: once per sigma and seed, for every budget."""
        name, folder = "certify the base, search images", f"base-sigma{self.config.sigma:g}"
        folder = WORK / f"{folder}-seed{self.config.seed}"
        stages, file = self.stages(folder, name, budget=None), folder / "search_cache.pt"
        of = self.base, self.search_images, self.config, self.config.search_n, "search", file
        stages.do(name, file, partial(arq.certify_images, *of))
        stages.held.close()  # other cells may run at the same time
        return arq.read_cache(file)

    @cached_property
    def start(self) -> tuple[models.Classifier, dict]:
        """What episodes start from, and what it took: once per sigma, budget and seed."""
        name, config = "train for all policies", self.config
        if self.from_base:
            return self.base, dict.fromkeys(SPENT, 0)
        folder = WORK / f"shared-sigma{config.sigma:g}-budget{config.budget:g}-seed{config.seed}"
        stages, file = self.stages(folder, name), folder / "start.pt"
        environment = arq.BitWidthEnvironment(self.table, config.budget)
        of = self.base, environment, self.train_images, self.search_images, config, SHARED_EPOCHS
        stages.do(name, file, partial(shared.train_shared, *of))
        stages.held.close()
        network = copy.deepcopy(self.base)
        network.load_state_dict(arq.read_state(file))
        return network, stages.records[name]


def choose(method: str, frame: Frame, log: Path, state, save) -> models.Policy:
    """The method's policy. What it evaluated is in `log`."""
    config, table, budget = frame.config, frame.table, frame.config.budget
    if method in AGENTS:
        cache, environment = frame.cache, arq.BitWidthEnvironment(table, budget)
        of = frame.start[0], frame.train_images, frame.search_images, config
        evaluate, again = arq.policy_evaluator(*of), arq.policy_evaluator(*of, final=True)
        if method.endswith(RECIPE):
            evaluate, again = by_recipe(evaluate, frame), by_recipe(again, frame, times=2)
        if method == "HAQ":
            count = len(frame.train_images)
            some = frame.train_images.subset(arq.evenly_spaced(min(HAQ_IMAGES, count), count))
            x = some.batch(range(len(some)), config.device)
            evaluate = rivals.accuracy_evaluator(evaluate, x, some.labels, config)
            again = rivals.accuracy_evaluator(again, x, some.labels, config)
        of = environment, evaluate, again, cache, config, log
        arq.search_policies(*of, state, save, AGENTS[method])
        policy = arq.best_policy([json.loads(line) for line in log.read_text().splitlines()])
    elif method == "uniform":
        policy = rivals.uniform(table, budget)
    elif method == MODEL:
        policy = json.loads(SURROGATE.read_text())["best"]["policy"]
    else:  # as many batches as the evaluations of a search train on
        passes = 1 + len(rivals.WIDTHS) if GRADIENT[method] is rivals.limpq else 1
        steps = config.episodes * config.finetune_steps // passes
        calibrate = partial(arq.calibrate, images=frame.search_images, config=config)
        train = partial(arq.train, images=frame.train_images, config=config, steps=steps, lr=arq.FINETUNE_LR)
        chosen = GRADIENT[method]
        if chosen is rivals.nipq:
            chosen = partial(chosen, steps=steps)  # its pace
        policy = chosen(copy.deepcopy(frame.base), table, budget, calibrate, train)
    return policy


def by_recipe(evaluate: arq.PolicyEvaluator, frame: Frame, times: int = 1) -> arq.PolicyEvaluator:
    """The same, but trained as `finetune` does, for the steps of an episode or so many times as long."""
    config = frame.config
    loss = partial(arq.noise_augmentation, teacher=frame.base, share=config.distill)
    brief = {"steps": times * config.finetune_steps, "lr": arq.FINETUNE_LR, "purpose": "episode"}
    train = partial(arq.train, images=frame.train_images, config=config, loss=loss, **brief)
    return arq.PolicyEvaluator(evaluate.classifier, train, evaluate.certificate)


def finetune(frame: Frame, policy, state, save) -> bytes | dict:
    """A network packed (or, a float one, its weights) after the fine-tuning that all methods share."""
    config, classifier = frame.config, copy.deepcopy(frame.base)
    table = models.quantize_model(classifier, config.image_size)
    arq.calibrate(classifier, frame.search_images, config)
    models.set_policy(classifier, policy)
    if policy[table[0].name] != [models.FLOAT_BITS] * 2:
        of = classifier, frame.base, table, frame.train_images, config
        return arq.finetune_best(*of, state, save)
    steps = int(config.finetune_epochs * (len(frame.train_images) // config.batch_size))
    of = classifier, frame.train_images, config, steps, arq.FINETUNE_LR, "fine-tune"
    loss = partial(arq.noise_augmentation, teacher=frame.base, share=config.distill)
    arq.train(*of, state=state, save=save, loss=loss)
    return classifier.state_dict()


def run(c: dict, data: str, checkpoints: Path) -> None:
    """A cell, from the bits to the JSON."""
    name, method = name_of(c), c["method"]
    print(f"{name} ...", flush=True)
    frame, work, rows_file = Frame(c, data, checkpoints), WORK / name_of(c | {"n": 1000}), OUT / f"{name}.tsv"
    config = frame.config
    certificates = {n: f"certify, n = {n}" for n in (1000, 10_000, config.n)}
    rests = {"model": arq.digest(SURROGATE.read_bytes())} if method == MODEL else {}
    stages = frame.stages(work, "choose", "fine-tune", *certificates.values(), **rests)
    network, file = frame.base, Path(config.checkpoint)
    policy = models.uniform_policy(frame.table, models.FLOAT_BITS, models.FLOAT_BITS)
    if method in AGENTS:
        frame.cache, frame.start  # are made here; the start counts below, the cache for no method
    if method not in FLOAT:
        log = work / "search.jsonl"
        stages.do("choose", work / "policy.json", partial(choose, method, frame, log))
        policy = json.loads((work / "policy.json").read_text())
    if method != "base":
        file = work / ("control.pt" if method == "control" else "model.arq")
        stages.do("fine-tune", file, partial(finetune, frame, policy))
        if method == "control":
            network = copy.deepcopy(frame.base)
            models.quantize_model(network, config.image_size)
            network.load_state_dict(arq.read_state(file))
            network.eval()
        else:
            network = stages.watch(arq.integers(models.load_model(file)[0], config))
    purpose = "base certificate" if method == "base" else "certificate"
    of = network, frame.test_images, config, config.n, purpose, rows_file
    stages.do(certificates[config.n], rows_file, partial(arq.certify_images, *of))
    results = c | {"policy": policy}
    results |= arq.summarize(certify.read_certificates(rows_file), network, frame.table, policy, config, file)
    results |= {"accuracy_without_noise": clean_accuracy(network, frame)}
    results |= against_base(
        rows_file, OUT / f"{name_of(c | {'method': 'base', 'budget': 1.0, 'seed': 0})}.tsv"
    )
    results |= costs(method, config, work / "search.jsonl", stages)
    if method in AGENTS and not frame.from_base:
        results["stages"]["train for all policies"] = {k: frame.start[1][k] for k in SPENT}
        steps = int(SHARED_EPOCHS * (len(frame.train_images) // config.batch_size))
        results["training_images_of_the_choice"] += steps * config.batch_size
    if method == "ARQ" and c["budget"] == 0.015 and c["seed"] == 0:
        arq.write_whole(OUT / f"{name}.arq", file.read_bytes())
    arq.write_whole(OUT / f"{name}.json", results)


def against_base(rows_file: Path, base_file: Path) -> dict:
    """The base's figures on the same images, and paired differences with 95 % intervals over images."""
    rows, base_rows = certify.read_certificates(rows_file), certify.read_certificates(base_file)
    radii = (0.0, 0.25, 0.5, 0.75)
    base = {"acr": certify.average_certified_radius(base_rows)}
    base["certified_accuracy"] = {
        str(radius): certify.certified_accuracy(base_rows, radius) for radius in radii
    }
    found = {"base": base}
    counts = [[row._replace(radius=1.0) for row in some] for some in (rows, base_rows)]  # of right answers
    for name, pair in (("acr_difference", (rows, base_rows)), ("accuracy_difference", counts)):
        mean, error = certify.acr_difference(*pair)
        interval = [mean - 1.96 * error, mean + 1.96 * error]
        found[name] = {"mean": mean, "standard_error": error, "interval_95": interval}
    return found


def costs(method: str, config, log: Path, stages: arq.Stages) -> dict:
    """What a cell took: evaluations, images trained on, passes (training and teacher included), seconds."""
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    finalists = [record["acr"] for record in records if record.get("finalist")]
    found = {"search_acr": [r["acr"] for r in records if not r.get("finalist")], "finalist_acr": finalists}
    steps = config.finetune_steps * (len(records) + len(finalists))
    if method in GRADIENT:
        steps = config.episodes * config.finetune_steps
    found |= {"evaluations": len(records), "training_images_of_the_choice": steps * config.batch_size}
    kept = {name: record for name, record in stages.records.items() if record["finished"]}
    found["stages"] = {name: {k: r[k] for k in SPENT} for name, r in kept.items()}
    processor = platform.processor() or platform.machine()
    if config.device == "cuda":
        processor = torch.cuda.get_device_name()
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return found | {"processor": f"{processor}, {threads}, torch {torch.__version__}"}


@torch.inference_mode()
def clean_accuracy(network, frame: Frame) -> float:
    """Share of the test images that the network itself, without noise, gets right: as the paper plots it."""
    images, right = frame.test_images, 0
    for part in torch.arange(len(images)).split(50):
        x = images.batch(part.tolist(), frame.config.device)
        right += (network(x).argmax(1).cpu() == torch.tensor([images.labels[i] for i in part])).sum().item()
    return right / len(images)


TITLES = "method | seed | BitOPs, % | bytes | ACR | less base's | accuracy, % | less base's | clean, % | on"


def table_of(results: list[dict]) -> str:
    """Markdown: a table per sigma and budget, best ACR first; differences have paired 95 % intervals."""
    lines = []
    groups = sorted({(r["sigma"], r["n"], r["budget"]) for r in results}, key=lambda g: (g[0], g[1], -g[2]))
    for sigma, n, budget in groups:
        place = "float networks" if budget == 1 else f"budget {100 * budget:g} %"
        lines += ["", f"sigma {sigma:g}, {place}, n = {n:,}:", "", f"| {TITLES} |", "|---" * 10 + "|"]
        of = [r for r in results if (r["sigma"], r["n"], r["budget"]) == (sigma, n, budget)]
        lines += [row_of(r) for r in sorted(of, key=lambda r: -r["acr"])]
    return "\n".join(lines[1:])


def row_of(r: dict) -> str:
    cells = [
        r["method"],
        r["seed"],
        f"{100 * r['bitops_ratio']:.3f}",
        f"{r['size_bytes']:,}",
        arq.shown(r["acr"]),
    ]
    d, a = r["acr_difference"], r["accuracy_difference"]
    of_acr = "{:+.4f} ({:+.4f} to {:+.4f})".format(d["mean"], *d["interval_95"])
    values = [100 * value for value in (a["mean"], *a["interval_95"])]
    of_accuracy = "{:+.1f} ({:+.1f} to {:+.1f})".format(*values)
    if r["method"] == "base":
        of_acr = of_accuracy = ""
    cells += [of_acr, f"{100 * r['accuracy']:.1f}", of_accuracy, f"{100 * r['accuracy_without_noise']:.1f}"]
    return f"| {' | '.join(map(str, cells))} | {device_of(r)} |"


def device_of(r: dict) -> str:
    """What a cell ran on: "GPU, CPU" is first the one, then the other."""
    gpu, cpu = "NVIDIA" in r["processor"], "x86_64" in r["processor"]
    return "GPU, CPU" if gpu and cpu else "GPU" if gpu else "CPU"


def mean_rows(tables: list[list]) -> list[certify.Certificate]:
    """Each image's radius (0 where wrong), mean over certificates of the same images."""
    values = [[row.radius * row.correct for row in rows] for rows in zip(*tables)]
    return [row._replace(radius=statistics.fmean(v), correct=1) for row, v in zip(tables[0], values)]


def rows_of(cells: list[dict]) -> list[certify.Certificate]:
    """Certificates of cells that differ in their seeds, averaged."""
    return mean_rows([certify.read_certificates(OUT / f"{name_of(c)}.tsv") for c in cells])


def at(results: list[dict], method: str, sigma: float, budget: float, n: int = 1000) -> list[dict]:
    """The cells of one method there, by seed."""
    budget = 1.0 if method in FLOAT else budget
    place = {"method": method, "sigma": sigma, "budget": budget, "n": n}
    return [r for r in results if place.items() <= r.items()]


def paired_of(results: list[dict], ours: str = "ARQ") -> str:
    """Markdown: ACR of ours less each other method's, in a column for each sigma and budget, with standard
    errors over images, paired, of each method's mean over its seeds. (2): two seeds of ours."""
    places = sorted({(r["sigma"], -r["budget"]) for r in results if r["method"] == ours and r["n"] == 1000})
    titles = [f"{sigma:g}, {-100 * budget:g} %" for sigma, budget in places]
    lines = [" | ".join([f"| {ours} less", *titles]) + " |", "|---" * (1 + len(places)) + "|"]
    for method in EVERY:
        found = [difference_of(results, ours, method, sigma, -budget) for sigma, budget in places]
        if method != ours and any(found):
            lines.append(" | ".join([f"| {method}", *found]) + " |")
    return "\n".join(lines)


def difference_of(results: list[dict], ours: str, method: str, sigma: float, budget: float) -> str:
    """ACR of one method less another's at one place, as `paired_of` shows it."""
    pair = [at(results, name, sigma, budget) for name in (ours, method)]
    if not all(pair):
        return ""
    mean, error = certify.acr_difference(*map(rows_of, pair))
    return f"{mean:+.4f} ({error:.4f})" + (f" ({len(pair[0])})" if len(pair[0]) > 1 else "")


def summary_of(results: list[dict], methods: list[str] | None = None) -> str:
    """Markdown: ACR (n = 1,000) of methods, in a column for each sigma and budget. (2): mean of two seeds."""
    columns = sorted({(r["sigma"], -r["budget"]) for r in results if r["budget"] < 1 and r["n"] == 1000})
    titles = [f"{sigma:g}, {-100 * budget:g} %" for sigma, budget in columns]
    lines = [" | ".join(["| method; sigma, budget", *titles]) + " |", "|---" * (1 + len(columns)) + "|"]
    for method in methods or EVERY:
        found = [at(results, method, sigma, -budget) for sigma, budget in columns]
        if any(found):
            acrs = [arq.shown(certify.average_certified_radius(rows_of(f))) if f else "" for f in found]
            acrs = [f"{acr} ({len(f)})" if len(f) > 1 else acr for acr, f in zip(acrs, found)]
            lines.append(" | ".join([f"| {method}", *acrs]) + " |")
    return "\n".join(lines)


def headline_of(results: list[dict]) -> str:
    """Markdown: the float networks and ARQ with n = 10,000."""
    columns = "sigma | network | BitOPs, % | bytes | ACR | less base's | accuracy, % | less base's | clean, %"
    lines = [f"| {columns} |", "|---" * 9 + "|"]
    rank = {"base": 0, "control": 1, "ARQ": 2}
    of = [r for r in results if r["n"] == 10_000]
    for r in sorted(of, key=lambda r: (r["sigma"], rank[r["method"]])):
        method, _, *cells, _ = [part.strip() for part in row_of(r)[1:-1].split("|")]  # no seed, no device
        lines.append(" | ".join([f"| {r['sigma']:g}", method, *cells]) + " |")
    return "\n".join(lines)


def costs_of(results: list[dict]) -> str:
    """Markdown: what choosing the bits took; passes are images through a network, in training too."""
    titles = "method | cell | evaluations | training images | passes, millions | minutes | on"
    lines = [f"| {titles} |", "|---" * 7 + "|"]
    for r in results:
        if r["method"] not in FLOAT and r["n"] == 1000:
            parts = [r["stages"].get(name) for name in ("train for all policies", "choose")]
            passes, seconds = (sum(part[k] for part in parts if part) for k in ("forward_passes", "seconds"))
            cells = [
                r["method"],
                f"sigma {r['sigma']:g}, {100 * r['budget']:g} %, seed {r['seed']}",
                r["evaluations"],
            ]
            cells += [f"{r['training_images_of_the_choice']:,}", f"{passes / 1e6:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} | {seconds / 60:.1f} | {device_of(r)} |")
    return "\n".join(lines)


def rewards_of(results: list[dict]) -> str:
    """Markdown: means of a search's rewards, as ACR, by twenty evaluations; of long ones, by hundred."""
    short = "ARQ", "ARQ 24 steps", "evolution", "random", "ARQ from f"
    long = [name + LONG for name in ("ARQ", "evolution")]
    return "\n\n".join([means_of(results, short, 20, 100), means_of(results, long, 100, 600)])


def means_of(results: list[dict], methods, block: int, episodes: int) -> str:
    firsts = range(0, episodes, block)
    columns = [f"{first + 1} to {first + block}" for first in firsts]
    lines = [f"| rewards' ACR by evaluation | {' | '.join(columns)} |", "|---" * (len(firsts) + 1) + "|"]
    for sigma, budget in sorted({(r["sigma"], -r["budget"]) for r in results if r["budget"] < 1}):
        for r in (r for name in methods for r in at(results, name, sigma, -budget)):
            means = [statistics.fmean(r["search_acr"][first : first + block]) for first in firsts]
            where = f"| {r['method']}, sigma {sigma:g}, {-100 * budget:g} %, seed {r['seed']}"
            lines.append(" | ".join([where, *(f"{mean:.4f}" for mean in means)]) + " |")
    return "\n".join(lines)


def outcomes_of(results: list[dict], sigma: float = 0.25, budget: float = 0.008) -> str:
    """Markdown: the best reward of each search there, as ACR, and what became of it; best network first."""
    titles = "search | seed | evaluations | best reward | best finalist | ACR of its network"
    lines = [f"| {titles} |", "|---" * 6 + "|"]
    alike = "ARQ", "ARQ 24 steps", "evolution", "random"  # of one reward, from one start
    names = [*alike, *(name + LONG for name in alike)]
    of = [r for name in names for r in at(results, name, sigma, budget)]
    for r in sorted(of, key=lambda r: -r["acr"]):
        best = [max(r[name]) for name in ("search_acr", "finalist_acr")]
        cells = [r["method"], r["seed"], len(r["search_acr"]), *(f"{acr:.4f}" for acr in best)]
        lines.append(f"| {' | '.join(map(str, [*cells, arq.shown(r['acr'])]))} |")
    return "\n".join(lines)


def repeated_of(results: list[dict]) -> str:
    """Markdown: the cells of results/compare-cpu/ beside those of the same name."""
    lines = ["| sigma 0.25 | ACR on CPUs | less base's | on the GPU | less base's |", "|---" * 5 + "|"]
    for c in sorted(finished(CPU), key=lambda c: (-c["budget"], -c["acr"])):
        again = next((r for r in results if name_of(r) == name_of(c)), None)
        if again is None:
            continue
        row = [c["method"] if c["budget"] == 1 else f"{c['method']}, {100 * c['budget']:g} %"]
        for r in (c, again):
            less = "" if c["method"] == "base" else "{mean:+.4f}".format(**r["acr_difference"])
            row += [arq.shown(r["acr"]), less]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def tables_of(results: list[dict]) -> str:
    """Markdown: all that TABLES.md holds."""
    parts = {
        "The float networks and ARQ with n = 10,000": headline_of,
        "ACR": summary_of,
        "ARQ against each other method": paired_of,
        "ARQ with 600 episodes against each other method": partial(paired_of, ours="ARQ" + LONG),
        "Every cell": table_of,
        "What choosing the bits took": costs_of,
        "Rewards of the searches": rewards_of,
        "Searches at sigma 0.25, 0.8 %": outcomes_of,
        "Cells repeated on CPUs": repeated_of,
    }
    texts = [f"## {title}\n\n{part(results)}\n" for title, part in parts.items()]
    return "# Tables of the comparison\n\nMade by `python benchmarks/compare.py`.\n\n" + "\n".join(texts)


def finished(folder: Path | None = None) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((folder or OUT).glob("*.json"))]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data")
    parser.add_argument("--checkpoints", type=Path, default=Path("."))
    parser.add_argument("--cells", nargs="*", default=[""])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(argv)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # as in arq.main
        ctypes.CDLL(None).mallopt(-3, 2**30)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
    names = {name_of(c) for c in CELLS}
    unknown = [text for text in options.cells if not any(name.startswith(text) for name in names)]
    if unknown:
        parser.error(f"--cells {unknown[0]}: no cell is named so; one is {min(names)}")
    whole = names & set(options.cells)
    for c in [] if options.table else CELLS:
        name = name_of(c)
        wanted = name in whole or any(name.startswith(start) for start in options.cells if start not in whole)
        if wanted and not (OUT / f"{name}.json").exists():
            try:
                run(c, options.data, options.checkpoints)
            except ValueError as error:  # a missing file, another process at work
                parser.error(str(error))
    text = tables_of(finished())
    arq.write_whole(OUT / "TABLES.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
