"""Properties of the benchmarks' own code, and scripts that start."""

import copy
import functools
import importlib
import itertools
import json
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy.stats import binom
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify
import models
from benchmarks import attack, certificates, compare, networks, rivals
from benchmarks.incremental import certify_incremental, paired_lower_bound
from certify import Smooth
from ddpg import DDPGConfig

# ---- incremental certificates, sharper than IRS ----
TRIALS = 1000
ALLOWED = binom.ppf(0.999, TRIALS, 0.05)  # so many violations of 1,000 are still chance at 0.05


def draw(probabilities, n: int, seed: int = 0, trials: int = TRIALS) -> torch.Tensor:
    """(trials, n) independent outcomes 0, 1, ... of known probabilities."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.as_tensor(probabilities)
    outcomes = torch.multinomial(probabilities, trials * n, True, generator=generator)
    return outcomes.view(trials, n)


# P[f and f^P say c_A], P[only f], P[only f^P], P[neither]
@pytest.mark.parametrize("joint", [(0.7, 0.05, 0.02, 0.23), (0.9, 0.07, 0.0, 0.03)])
@pytest.mark.parametrize("m, n", [(30, 300), (200, 400)])
def test_coverage_of_the_paired_bound(joint, m, n):
    """Whatever is bet; and near the truth where the bet is the one that the counts call for."""
    pairs = draw(joint, m)
    counts = [(pairs == outcome).sum(1) for outcome in range(3)]
    p_f, p = joint[0] + joint[1], joint[0] + joint[2]
    k = draw([1 - p_f, p_f], n, seed=1).sum(1)
    ones, w = torch.ones(TRIALS), n / (n + m)
    variance = joint[0] * (1 - w) ** 2 + joint[1] * w**2 + joint[2] - (p - w * p_f) ** 2
    bet = math.sqrt(6 / (m * variance + 1)) * ones
    for bets in (bet, 5 * bet):
        bound = paired_lower_bound(*counts, m * ones, k, n * ones, 0.05, bets)
        assert (bound > p).sum() <= ALLOWED
        assert bets is not bet or bound.mean() > p - 5 * math.sqrt(variance / m) - 5 / m


def test_the_paired_bound_spends_its_alpha():
    """Where few changes decide, four times alpha violates the test above: f is known from many
    samples; the bound fails where no change is seen, 0.93 ** 30 = 0.11."""
    m, n, ones = 30, 10**7, torch.ones(TRIALS)
    pairs = draw([0.5, 0.07, 0.0, 0.43], m)
    counts = [(pairs == outcome).sum(1) for outcome in range(3)]
    k = (0.57 * n * ones).round()
    failures = []
    for alpha in (0.05, 0.2):
        bound = paired_lower_bound(*counts, m * ones, k, n * ones, alpha, 9 * ones)
        failures.append(int((bound > 0.5).sum()))
    assert failures[0] <= ALLOWED < failures[1]


def replay(joint, trials: int = TRIALS) -> certificates.Replay:
    """g^P on images of class 0, by 1,000 samples of P[f = i, f^P = j] = joint[i][j]."""
    pairs = draw(torch.tensor(joint).flatten(), 1000, trials=trials)
    fresh = draw(torch.tensor(joint).sum(0), 1000, seed=7, trials=trials)
    old, new = pairs // len(joint), pairs % len(joint)
    return certificates.Replay(old, new, fresh, [0] * trials, sigma=1.0)


DISAGREEING = (0.70, 0.04, 0.01), (0.02, 0.12, 0.01), (0.0, 0.01, 0.09)
ALIKE = (0.96, 0.01, 0.0), (0.0, 0.02, 0.0), (0.0, 0.0, 0.01)
UNRELATED = (0.72, 0.08, 0.0), (0.18, 0.02, 0.0), (0.0, 0.0, 0.0)


@pytest.mark.parametrize("joint", [DISAGREEING, ALIKE, UNRELATED])
def test_coverage_of_incremental_radii(joint):
    """alpha + alpha_zeta = 0.05: at most that share of radii exceeds the true one. Fresh radii
    are those of the votes among all passes but ten, which are the pilot's."""
    g = replay(joint)
    rows = certify_incremental(g, None, g.rest, g.pilot, 200, alpha_zeta=0.049)
    truth = certify.certified_radius(sum(row[0] for row in joint), 1.0)
    radii = torch.tensor([row.radius for row in rows])
    assert (radii > truth).sum() <= ALLOWED and radii.mean() > 0.3 * truth
    assert sum(row.passes for row in rows) <= 200 * TRIALS
    for i in [i for i, row in enumerate(rows) if row.method == "fresh"][:20]:
        m = rows[i].passes - 10
        n_a = int((g.by_noise["rest/fresh"][i, :m] == 0).sum())
        p_a = max(0.5, certify.lower_confidence_bound(n_a, m, 0.05))
        assert rows[i].radius == certify.certified_radius(p_a, 1.0)


def test_the_plan_sees_no_sample_that_a_bound_uses():
    """Predictions outside the pilot may be anything: methods and passes are the same."""
    g = replay(DISAGREEING, trials=100)

    def plan(cache, pilot):
        rows = certify_incremental(g, None, cache, pilot, 300)
        return [(row.method, row.passes) for row in rows]

    usual = plan(g.rest, g.pilot)
    assert {method for method, _ in usual} >= {"fresh", "paired"}
    assert plan(g.rest._replace(predictions=1 - g.rest.predictions), g.pilot) == usual
    assert plan(g.rest, g.pilot._replace(predictions=1 - g.pilot.predictions)) != usual
    with pytest.raises(ValueError, match="noise of their own"):
        plan(g.pilot, g.pilot)


def slab(edge: float) -> Smooth:
    """Class 0 where the position along one direction of 16 dimensions exceeds edge, else 1."""
    inside = lambda x: (x.sum((1, 2, 3)) / 4 > edge).long()  # noqa: E731
    return Smooth(lambda x: F.one_hot(1 - inside(x), 2).float(), 2, sigma=0.5)


def test_certificates_of_a_classifier_by_its_position():
    """More radius than IRS or fresh samples for as many passes; within the true one at 0.05;
    none for an image of wrong class."""
    positions = torch.linspace(-0.2, 0.75, 60)
    steps = (positions.clamp(min=0) * 255 / 4).round()
    images = (steps / 255).view(60, 1, 1, 1).expand(60, 1, 4, 4)
    positions = torch.where(positions < 0, positions, 4 * steps / 255)
    labels = [int(position < 0) for position in positions]  # at 0, either class
    f = slab(0.0)
    caches = [f.certify_and_cache(images, labels, n=n, alpha=0.025) for n in (1800, 200)]
    right = sum(row.selected == row.label for row in caches[0].certificates)
    rows = certify_incremental(slab(0.02), images, *caches, 150, 0.025)
    assert sum(row.passes for row in rows) <= 150 * right < 150 * 60
    truth = (positions.clamp(min=0) - 0.02).abs()
    failed = sum(row.radius > truth[i] for i, row in enumerate(rows))
    assert failed <= binom.ppf(0.999, 60, 0.05)
    assert all(row.radius == 0 for row in rows if row.label == 1)
    irs = slab(0.02).certify_incremental(images, caches[0], 150, 0.025)
    fresh = slab(0.02).certify(images, labels, n=150, alpha=0.05)
    for others in (irs, fresh):
        acr = sum(row.radius * row.correct for row in others if row.label == 0) / 60
        assert certify.average_certified_radius(rows) > 1.05 * acr


def test_passes_needed_are_found_between_sizes():
    assert certificates.passes_needed([100, 400], [0.8, 1.0]) == pytest.approx(200)
    assert certificates.passes_needed([100, 400], [0.95, 1.0]) == 100
    assert certificates.passes_needed([100, 400], [0.5, 0.6]) is None


# ---- attacks, networks, operations, speed ----
def test_an_attacker_breaks_a_linear_classifier_beyond_its_radius_and_not_within():
    """Class 0 where w.x > b: R = margin / norm of w, for the smoothed classifier, too."""
    w, generator = torch.full((1, 3, 8, 8), 0.1), torch.Generator().manual_seed(0)
    x = 0.5 + 0.02 * torch.randn(6, 3, 8, 8, generator=generator)
    x[:, 0] = 0  # pixels that cannot become darker
    margin = (x * w).sum((1, 2, 3)) - 6.2

    def classifier(x):
        score = 20 * ((x * w).sum((1, 2, 3)) - 6.2)
        return torch.stack([score, -score], 1)

    radius = margin.abs() / w.norm()
    labels = classifier(x).argmax(1)
    for reach in (0.999, 1.5):
        moved = attack.attack(classifier, x, labels, reach * radius, 0.25, generator)
        distance = (moved - x).flatten(1).norm(dim=1)
        assert (distance <= reach * radius + 1e-5).all()
        assert 0 <= moved.min() <= moved.max() <= 1
        assert ((classifier(moved).argmax(1) == labels) == (reach < 1)).all()


def test_networks_are_quantized_or_refused(monkeypatch):
    monkeypatch.setitem(networks.PRE_ACTIVATION, "wide_resnet28_2", (8, [8, 16], 1))
    row = networks.compare_arithmetic("wide_resnet28_2")
    assert "refused" not in row, row
    assert row["backend"] != "float" and row["layers"] == 7 and float(row["median"]) < 1e-3
    assert "Encoder" in networks.compare_arithmetic("vit_b_16")["refused"]


# ---- rival ways to choose the bits ----
def layers(count: int) -> list[models.Layer]:
    """Layers in a row, of 1,000, 2,000, ... MACs between two small ones."""
    macs = [100, *range(1000, 1000 * count - 1000, 1000), 100]
    return [models.Layer(f"l{i}", 3, 4, 3, 1, 8, 100, m, False) for i, m in enumerate(macs)]


def test_uniform_leaves_no_room_for_another_bit():
    table = layers(6)
    for budget in (0.012, 0.02, 0.03):
        policy = rivals.uniform(table, budget)
        assert models.bitops_ratio(table, policy) <= budget
        assert rivals.fill(table, policy, budget) == policy
        assert policy["l0"] == policy["l5"] == [8, 8]


def test_the_integer_program_finds_the_best_of_all_policies():
    """Two inner layers, 2,401 policies, random importance: the least sum within the budget."""
    table = layers(4)
    steps = torch.rand(2, 2, 9, generator=torch.Generator().manual_seed(0))
    importance = steps * 2 ** -torch.arange(9.0)
    for budget in (0.0085, 0.0165, 0.028):
        costs = {}
        for pairs in itertools.product(rivals.PAIRS, repeat=2):
            policy = models.uniform_policy(table, 2) | {"l1": [*pairs[0]], "l2": [*pairs[1]]}
            if models.bitops_ratio(table, policy) <= budget:
                costs[pairs] = sum(a[i] + 2 * w[b] for (w, a), (b, i) in zip(importance, pairs))
        best = rivals.assign(table, budget, importance)
        assert (*best["l1"], *best["l2"]) == sum(min(costs, key=costs.get), ())


SIXTY_EPISODES = DDPGConfig(episodes=60, warmup_episodes=20)


def best_found(agent_class: type, seed: int) -> float:
    """The least distance to a policy that just fits, by one bit and operand, of 60
    evaluations."""
    table = layers(12)
    target = rivals.uniform(table, 0.016)
    environment = arq.BitWidthEnvironment(table, 0.0161)

    def evaluate(policy, cache):
        return -sum(abs(a - b) for name in target for a, b in zip(target[name], policy[name]))

    agent = agent_class(environment.state_size, seed, SIXTY_EPISODES)
    cache = certify.ReplayCache([certify.Certificate(0, 0, 0, 1.0, 1, "")], None, "")
    return max(record["acr"] for record in arq.search(cache, environment, agent, evaluate))


def test_evolution_beats_random_policies():
    """In four of five seeds; in one it is level."""
    classes = rivals.EvolutionAgent, rivals.RandomAgent
    pairs = [[best_found(agent, seed) for agent in classes] for seed in range(5)]
    assert all(evolved >= random for evolved, random in pairs)
    assert sum(evolved > random for evolved, random in pairs) >= 4


def test_evolution_tries_no_bits_twice():
    """Not even where a reward for few bits draws all children to the same ones."""
    environment = arq.BitWidthEnvironment(layers(4), 0.05)
    agent = rivals.EvolutionAgent(environment.state_size, 0, SIXTY_EPISODES)
    tried = []
    while agent.episode < 60:
        states, actions, _ = environment.rollout(agent.act)
        tried.append(agent.bits(actions.flatten().tolist()))
        agent.learn(states, actions, -sum(tried[-1]))
    assert len(set(tried)) == 60


class TwoBranches(nn.Module):
    """One branch that the logits rest on, and one that hardly moves them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 10)
        self.used, self.idle = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x):
        x = F.relu(self.first(x))
        idle = self.idle(x)  # runs before the other: filling up favours it
        return self.last((self.used(x) + 1e-4 * idle).relu().mean((2, 3)))


def test_bits_learned_by_gradient_go_where_they_matter():
    """NIPQ gives the most bits to an operand of the branch that the logits rest on, though
    forcing and filling favour the other. LIMPQ's steps of every width learn. The network they
    are given stays as it is."""
    torch.manual_seed(0)
    net, config = TwoBranches(), arq.parse_config(["--batch-size", "64", "--device", "cpu"])
    images, learned = arq.draw_shapes(1000, seed=0, size=32), []
    arq.train(net, images, config, 60, 0.1, "base")
    before = copy.deepcopy(net.state_dict())
    table = models.quantize_model(copy.deepcopy(net), 32)

    def train(classifier, num_batches, loss):
        arq.train(classifier, images, config, num_batches, 0.05, loss=loss)
        quantizer = models.quant_layers(classifier)["used"].weight_quantizer
        if isinstance(quantizer, rivals.WidthSteps):
            learned.extend((quantizer.steps != quantizer.initial_steps).any(1).tolist())

    calibrate = partial(compare.calibrate, images=images, config=config)
    policy = rivals.nipq(net, table, 0.035, calibrate, train, num_batches=200)
    assert rivals.fill(table, policy, 0.035) == policy
    assert max(policy["used"]) > max(policy["idle"])
    assert models.bitops_ratio(table, policy) <= 0.035
    policy = rivals.limpq(net, table, 0.035, calibrate, train, num_batches=20)
    assert models.bitops_ratio(table, policy) <= 0.035
    assert learned[models.MIN_BITS :] == [True] * len(rivals.WIDTHS)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# ---- the comparison ----
def test_a_cell_rests_on_its_certificates_and_is_made_once(tmp_path, monkeypatch, capsys):
    """On drawn images, tiny: a cell meets the budget, its radii are those of its certificates,
    cut; what is there is not made again, a cut line is."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(compare, "RUNS", tmp_path / "runs")
    words = "--dataset shapes --device cpu --search-images 12 --image-size 16"
    words += " --search-n 40 --n-p 20 --episodes 3 --episode-batches 1 --finetune-epochs 0.3"
    words += " --images 6 --n0 20 --alpha 0.1 --distill 0.5"
    images = functools.cache(arq.draw_shapes)
    fewer = lambda count, seed, size: images(count // 8, seed, size)  # noqa: E731
    monkeypatch.setattr(arq, "draw_shapes", fewer)
    monkeypatch.setattr(compare, "FRAME", words)
    monkeypatch.setattr(compare, "HAQ_IMAGES", 50)
    methods = "base control ARQ HAQ LIMPQ uniform".split()
    cells = [compare.cell(method, 0.25, 0.02, n=50) for method in methods]
    monkeypatch.setattr(compare, "CELLS", cells)
    torch.manual_seed(0)
    base = models.build_classifier("resnet8", 10)
    config = arq.parse_config("--device cpu --batch-size 64".split())
    arq.train(base, images(2000, 0, 16), config, 250, 0.2, "base")
    torch.save(base.state_dict(), tmp_path / "resnet20_cifar10_sigma0.25.pt")
    command = ["--data", str(tmp_path), "--checkpoints", str(tmp_path)]
    compare.main(command)
    for c, finished in zip(cells, compare.read_cells(), strict=True):
        assert c.items() <= finished.items() and finished["bitops_ratio"] <= c["budget"]
        folder = tmp_path / "runs" / compare.name_of(c | {"n": 1000})
        rows = certify.read_certificates(folder / "certificates-n50.tsv")
        exact = torch.tensor([row.radius * row.correct for row in rows], dtype=torch.float64)
        assert finished["acr"] == certify.average_certified_radius(rows)
        cut = exact - torch.tensor(finished["radii"], dtype=torch.float64)
        assert (cut >= 0).all() and (cut < 1e-5).all() and len(cut) == 6
        searched = c["method"] in compare.AGENTS
        assert len(finished.get("search_acr", [])) == (3 if searched else 0)
    file = compare.RESULTS / "cells.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-9])  # as a kill leaves it
    capsys.readouterr()
    compare.main(command)
    assert capsys.readouterr().out.count("seed0-n50 ...") == 1
    assert compare.read_cells() == [json.loads(line) for line in whole.splitlines()]


def test_what_is_written_of_the_comparison_is_what_its_cells_hold():
    """Headline cells are those of their certificates and networks; results/README.md has the
    two tables, and each difference that its findings state is one of the computed ones."""
    cells = compare.read_cells()
    names = [compare.name_of(c) for c in compare.CELLS]
    assert sorted(map(compare.name_of, cells)) == sorted(names)
    base_rows = {}
    for c in [c for c in cells if c["n"] == 10_000]:
        file = compare.RESULTS / f"{compare.name_of(c)}.tsv"
        rows = certify.read_certificates(file)
        assert c["acr"] == pytest.approx(certify.average_certified_radius(rows))
        assert c["accuracy"] == sum(radius > 0 for radius in c["radii"]) / 500
        if c["method"] == "base":
            base_rows[c["sigma"]] = rows
        else:
            base = compare.at(cells, "base", c["sigma"], 1.0, 10_000)
            expected = certify.acr_difference(rows, base_rows[c["sigma"]])
            assert compare.acr_difference([c], base) == pytest.approx(expected, abs=2e-6)
        if c["method"] == "ARQ":
            description = models.load_model(file.with_suffix(".arq"))[2]
            assert description["policy"] == c["policy"]
    text = (compare.ROOT / "results" / "README.md").read_text()
    assert compare.headline_table(cells) in text and compare.acr_table(cells) in text
    tables = [compare.difference_table(cells, ours) for ours in ("ARQ", "ARQ" + compare.LONG)]
    findings = " ".join(text.split("### What was found")[1].split("\n##")[0].split())
    stated = re.findall(r"[+-]0\.\d{4} \(0\.\d{4}\)", findings)
    assert len(stated) > 10 and all(text in "".join(tables) for text in stated)


def test_figures_of_a_run_and_of_the_comparison(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = importlib.import_module("benchmarks.figures")
    run = tmp_path / "run"
    shutil.copytree(compare.ROOT / "results" / "shapes-resnet8-sigma0.25", run)
    figures.main([str(run)])
    assert {file.stem for file in run.glob("*.png")} == {"policy", "radii", "search"}
    shutil.copy(compare.RESULTS / "cells.jsonl", tmp_path)
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    figures.main([])
    drawn = {"comparison", "sizes", "policies", "radii", "searches"}
    assert {file.stem for file in tmp_path.glob("*.png")} == drawn


# ---- the scripts ----
SCRIPTS = {path.stem for path in Path(__file__).parent.glob("*.py")}
SCRIPTS -= {"incremental", "rivals", "test_benchmarks"}  # these are imported


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_start_and_say_what_they_measure(name, capsys):
    if name == "figures":
        pytest.importorskip("matplotlib")
    script = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert script.__doc__.splitlines()[0] in said
    assert f"python benchmarks/{name}.py" in script.__doc__
