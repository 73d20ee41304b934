"""Properties of the benchmarks' own code, and scripts that start."""

import copy
import importlib
import json
import math
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
from benchmarks import (
    attack,
    certificates,
    compare,
    limpq,
    networks,
    operations,
    proxy,
    recipe,
    rivals,
    shared,
    surrogate,
)
from benchmarks.incremental import certify_incremental, paired_lower_bound
from certify import Smooth
from ddpg import DDPGConfig

# ---- incremental certificates, sharper than IRS ----
TRIALS = 1000
ALLOWED = binom.ppf(0.999, TRIALS, 0.05)  # so many violations of 1,000 are still chance at 0.05


def draw(probabilities, n: int, seed: int = 0) -> torch.Tensor:
    """(TRIALS, n) independent outcomes 0, 1, ... of known probabilities."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.as_tensor(probabilities)
    outcomes = torch.multinomial(probabilities, TRIALS * n, True, generator=generator)
    return outcomes.view(TRIALS, n)


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


def replay(joint) -> certificates.Replay:
    """g^P on TRIALS images of class 0, by 1,000 samples of P[f = i, f^P = j] = joint[i][j]."""
    pairs = draw(torch.tensor(joint).flatten(), 1000)
    fresh = draw(torch.tensor(joint).sum(0), 1000, seed=7)
    old, new = pairs // len(joint), pairs % len(joint)
    return certificates.Replay(old, new, fresh, [0] * TRIALS, sigma=1.0)


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
    g = replay(DISAGREEING)

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
    images = (positions.clamp(min=0) / 4).view(60, 1, 1, 1).expand(60, 1, 4, 4)
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
    assert row["backend"] == "int8" and row["layers"] == 7 and float(row["median"]) < 1e-3
    assert "Encoder" in networks.compare_arithmetic("vit_b_16")["refused"]


@pytest.mark.slow
def test_a_run_killed_and_continued_leaves_the_same_files():
    words = "--image-size 16 --epochs 1 --episodes 2 --episode-batches 1 --finetune-epochs 0.1 "
    words += "--images 4 --n 20 --search-images 9 --search-n 20 --n-p 10 --finalists 1 "
    found = operations.kills(1, words + "--alpha 0.1 --sigma 0.05 --device cpu")
    assert found["differing"] == [] and len(found["kills"]) == 1


# ---- rival ways to choose the bits ----


def layers(count: int) -> list[models.Layer]:
    """Layers in a row, of 1,000, 2,000, ... MACs between two small ones."""
    macs = [100, *range(1000, 1000 * count - 1000, 1000), 100]
    return [models.Layer(f"l{i}", 3, 4, 3, 1, 8, 100, m, False) for i, m in enumerate(macs)]


@pytest.mark.parametrize("budget", [0.012, 0.02, 0.03])
def test_uniform_leaves_no_room_for_another_bit(budget):
    table = layers(6)
    policy = rivals.uniform(table, budget)
    assert models.bitops_ratio(table, policy) <= budget
    assert rivals.fill(table, policy, budget) == policy
    assert policy["l0"] == policy["l5"] == [8, 8]


def test_the_integer_program_finds_the_best_of_all_policies():
    """Three inner layers, 117,649 policies, random importance: the least sum of those within the budget."""
    table, widths = layers(5), torch.arange(9.0)
    generator = torch.Generator().manual_seed(0)
    importance = [torch.rand(2, 1, generator=generator) * 2**-widths for _ in range(3)]
    for budget in (0.0075, 0.0165, 0.028):
        policy = rivals.assign(table, budget, importance)
        assert models.bitops_ratio(table, policy) <= budget
        found, best = 0.0, torch.zeros(())
        bitops = torch.zeros(())
        for i, (layer, (s_w, s_a)) in enumerate(zip(table[1:-1], importance)):
            shape = [49 if axis == i else 1 for axis in range(3)]
            best = best + (s_a[2:] + 2 * s_w[2:, None]).reshape(shape)
            bitops = bitops + (layer.macs * widths[2:, None] * widths[2:]).reshape(shape)
            w, a = policy[layer.name]
            found += float(s_a[a] + 2 * s_w[w])
        allowed = budget * 6200 * 1024 - 64 * 200
        assert found == pytest.approx(float(best[bitops <= allowed].min()), rel=1e-5)


def best_found(kind: type, seed: int) -> float:
    """The least distance to a policy that just fits, by one bit and operand, in 60 evaluations."""
    table = layers(12)
    target = rivals.uniform(table, 0.016)
    environment = arq.BitWidthEnvironment(table, 0.0161)

    def evaluate(policy, cache):
        return -sum(abs(a - b) for name in target for a, b in zip(target[name], policy[name])) / 20

    agent = kind(environment.state_size, seed, DDPGConfig(episodes=60, warmup_episodes=20))
    cache = certify.ReplayCache([certify.Certificate(0, 0, 0, 1.0, 1, "")], None, "")
    return max(r["acr"] for r in arq.search(lambda: cache, environment, agent, evaluate))


def test_evolution_beats_random_policies():
    """In four of five seeds; in one it is level."""
    kinds = rivals.EvolutionAgent, rivals.RandomAgent
    found = [[best_found(kind, seed) for kind in kinds] for seed in range(5)]
    assert all(evolved >= random for evolved, random in found)
    assert sum(evolved > random for evolved, random in found) >= 4


def test_evolution_tries_no_bits_twice():
    """Not even where a reward for few bits draws all children to the same ones."""
    environment = arq.BitWidthEnvironment(layers(4), 0.05)
    config = DDPGConfig(episodes=60, warmup_episodes=20)
    agent, tried = rivals.EvolutionAgent(environment.state_size, 0, config), []
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


def test_steps_of_the_published_scale_learn_faster():
    """Q^2 sqrt(N) over sqrt(N Q), from the same start: 18.5 at 4 bits."""
    v, gradients = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)), []
    for kind in (models.LSQ, rivals.PublishedScale):
        one = kind(2)
        one.observe(v)
        one.set_bits(4)
        one(v).square().sum().backward()
        gradients.append(one.step.grad)
    assert torch.allclose(gradients[1], 7**1.5 * gradients[0])


@pytest.mark.parametrize("signed", [True, False])
def test_noise_in_place_of_rounding_has_the_gradients_of_autograd(signed):
    """Of NIPQ's operand, inside the range, beyond it, and for a range per channel."""
    generator = torch.Generator().manual_seed(0)
    v, alpha = torch.randn(3, 50, generator=generator), torch.rand(3, 1, generator=generator) + 0.5
    weights, outcomes = torch.randn(3, 50, generator=generator), []
    for written_out in (True, False):
        of = [one.clone().requires_grad_() for one in (v, alpha, alpha / 7)]
        torch.manual_seed(1)
        if written_out:
            out = rivals.ClipWithNoise.apply(*of, signed)
        else:
            low = -of[1] if signed else torch.zeros_like(alpha)
            noise = (torch.rand_like(v) - 0.5) * ((v > low) & (v < of[1]))
            out = torch.minimum(torch.maximum(of[0], low), of[1]) + noise * of[2]
        outcomes.append([out, *torch.autograd.grad((out * weights).sum(), of)])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*outcomes))


def test_bits_learned_by_gradient_go_where_they_matter():
    """NIPQ within a budget gives the branch that the logits rest on more bits, though forcing and filling
    favour the other. LIMPQ meets the budget, and its steps of every width have learned. The network that they
    are given stays as it is."""
    torch.manual_seed(0)
    net, config = TwoBranches(), arq.parse_config(["--batch-size", "64", "--device", "cpu"])
    images = arq.draw_shapes(1000, seed=0, size=32)
    arq.train(net, images, config, 60, 0.1, "base")
    before, table = copy.deepcopy(net.state_dict()), models.quantize_model(copy.deepcopy(net), 32)

    learned = []

    def train(classifier, loss):
        quantizer = models.quant_layers(classifier)["used"].weight_quantizer
        joint = isinstance(quantizer, rivals.WidthSteps)
        arq.train(classifier, images, config, 20 if joint else 200, 0.05, loss=loss)
        if joint:
            moved = (quantizer.steps != quantizer.initial_steps).any(1)
            learned.extend(moved[models.MIN_BITS :].tolist())

    def calibrate(classifier):
        arq.calibrate(classifier, images, config)

    budget = 0.035
    for method in (partial(rivals.nipq, steps=300), rivals.limpq):  # 200 at a higher rate
        policy = method(net, table, budget, calibrate, train)
        assert models.bitops_ratio(table, policy) <= budget
        if method is not rivals.limpq:
            assert rivals.fill(table, policy, budget) == policy
            assert sum(policy["used"]) > sum(policy["idle"])
    assert learned == [True] * len(rivals.WIDTHS)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_shared_network_has_met_a_policy_per_batch(monkeypatch):
    """Under the budget, each batch another; what comes out are the float network's weights, trained."""
    command = "--batch-size 4 --budget 0.02 --image-size 32 --device cpu"
    config, met, set_policy = arq.parse_config(command.split()), [], models.set_policy
    base = models.build_classifier("resnet8", 10).eval()
    table = models.quantize_model(copy.deepcopy(base), 32)
    environment = arq.BitWidthEnvironment(table, config.budget)
    monkeypatch.setattr(models, "set_policy", lambda net, bits: met.append(bits) or set_policy(net, bits))
    of = *arq.hold_out(arq.draw_shapes(40, seed=0, size=32), 4), config
    before, state = copy.deepcopy(base.state_dict()), shared.train_shared(base, environment, *of, 1.0)
    assert len(met) == 9 and all(one != other for one, other in zip(met, met[1:]))
    assert all(models.bitops_ratio(table, policy) <= config.budget for policy in met)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    base.load_state_dict(state)
    changed = {name for name, value in before.items() if not torch.equal(state[name], value)}
    assert changed == set(before) - {"mean", "std"}


def test_the_accuracy_reward_is_the_share_of_images_that_are_right():
    net, config = TwoBranches().eval(), arq.parse_config(["--device", "cpu"])
    images = arq.draw_shapes(60, seed=0, size=32)
    table = models.quantize_model(net, 32)
    arq.calibrate(net, images, config)
    evaluator = arq.PolicyEvaluator(net, lambda classifier: None, None)
    x = images.batch(range(60))
    accuracy = rivals.accuracy_evaluator(evaluator, x, images.labels, config)
    policy = models.uniform_policy(table, 4)
    found = accuracy(policy, None)
    models.set_policy(net, policy)
    classes = models.integer_network(net)(x).argmax(1)
    assert found == pytest.approx(float((classes == torch.tensor(images.labels)).double().mean()))


@pytest.mark.slow
def test_a_cell_of_the_comparison_rests_on_its_files(tmp_path, monkeypatch, capsys):
    """On drawn images, tiny: a method's cell meets the budget, its ACR is that of its certificates, the
    paired difference that of base's; a finished cell is not computed again."""
    monkeypatch.setattr(compare, "OUT", tmp_path / "results")
    monkeypatch.setattr(compare, "WORK", tmp_path / "runs")
    words = "--dataset shapes --device cpu --episodes 3 --finalists 1 --search-images 12 --image-size 16"
    words += " --search-n 40 --n-p 20 --finetune-epochs 0.03 --images 6 --n0 20 --distill 0.5"
    monkeypatch.setattr(compare, "FRAME", words)
    monkeypatch.setattr(compare, "STEPS", 1)
    monkeypatch.setattr(compare, "HAQ_IMAGES", 50)
    monkeypatch.setattr(compare, "SHARED_EPOCHS", 0.05)
    left_out = ("random", "ARQ estimate")  # they go the way of evolution and ARQ
    methods = [one for one in [*compare.FLOAT, *compare.METHODS] if one not in left_out]
    methods += ["ARQ 24 steps", "ARQ by recipe"]
    cells = [compare.cell(method, 0.25, 0.02) for method in methods]
    monkeypatch.setattr(compare, "CELLS", [cell | {"n": 50} for cell in cells])
    torch.manual_seed(0)
    base = models.build_classifier("resnet8", 10)
    config = arq.parse_config("--device cpu --batch-size 64".split())
    arq.train(base, arq.draw_shapes(2000, seed=0, size=16), config, 250, 0.2, "base")
    torch.save(base.state_dict(), tmp_path / "resnet20_cifar10_sigma0.25.pt")
    command = ["--data", str(tmp_path), "--checkpoints", str(tmp_path)]
    compare.main(command)
    found = {cell["method"]: cell for cell in compare.finished()}
    assert sorted(found) == sorted(methods)
    base_rows = certify.read_certificates(compare.OUT / "sigma0.25-budget1-base-seed0-n50.tsv")
    for method, cell in found.items():
        rows = certify.read_certificates(compare.OUT / f"{compare.name_of(cell)}.tsv")
        assert cell["acr"] == certify.average_certified_radius(rows) and len(rows) == 6
        assert cell["acr_difference"]["mean"] == certify.acr_difference(rows, base_rows)[0]
        assert cell["evaluations"] == (4 if method in compare.AGENTS else 0)
        if method in compare.AGENTS:  # three episodes, and a finalist for twice as long
            times = {"ARQ 24 steps": 2, "ARQ by recipe": 4}.get(method, 1)
            steps = (3 + 2) * times + (0 if method == "ARQ by recipe" else 3)  # it starts from the base
            assert cell["training_images_of_the_choice"] == steps * 128
        assert (cell["bitops_ratio"] == 1) if method in compare.FLOAT else (cell["bitops_ratio"] <= 0.02)
    capsys.readouterr()
    compare.main(command)
    printed = capsys.readouterr().out
    assert "..." not in printed and all(method in printed for method in found)


def test_a_cells_stages_rest_on_each_other_and_wait_for_their_turn(tmp_path, monkeypatch, capsys):
    """Another product of the first stage drops the second; a folder in use is waited for."""
    tries, hold = [], arq.hold

    def busy_once(path):
        tries.append(path)
        arq.refuse(len(tries) == 1, f"another process is at work on {path}")
        return hold(path)

    monkeypatch.setattr(arq, "hold", busy_once)
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: None)
    (tmp_path / "base.pt").write_bytes(b"weights")
    frame = object.__new__(compare.Frame)
    frame.config = arq.parse_config(["--checkpoint", str(tmp_path / "base.pt"), "--device", "cpu"])
    frame.train_images, frame.base = arq.draw_shapes(100, seed=0, size=8), nn.Flatten()
    stages = frame.stages(tmp_path / "cell", "choose", "fine-tune")
    assert len(tries) == 2 and "waiting" in capsys.readouterr().out
    first, second, made = tmp_path / "policy.json", tmp_path / "model.json", []

    def finetune(state, save):
        made.append(json.loads(first.read_text()))
        return made[-1]

    for bits in (4, 4, 5):
        stages.do("choose", first, lambda state, save, bits=bits: bits)
        stages.do("fine-tune", second, finetune)
        first.unlink()
    assert made == [4, 5]


def test_what_is_written_of_the_comparison_is_what_its_cells_hold():
    """Each finished cell's figures are those of its certificates and its policy. TABLES.md holds every table,
    results/README.md those that it speaks of, README.md the two short ones and no other row."""
    table = models.quantize_model(models.build_classifier("resnet20", 10).eval(), 32)
    cells = compare.finished()
    for cell in cells:
        file = compare.OUT / f"{compare.name_of(cell)}.tsv"
        rows = certify.read_certificates(file)
        assert len(rows) == 500 and all(row.n == cell["n"] and row.sigma == cell["sigma"] for row in rows)
        assert cell["acr"] == pytest.approx(certify.average_certified_radius(rows))
        assert cell["accuracy"] == certify.certified_accuracy(rows, 0)
        base = compare.name_of(cell | {"method": "base", "budget": 1.0, "seed": 0})
        of_base = compare.against_base(file, compare.OUT / f"{base}.tsv")
        assert all(cell[name] == value for name, value in of_base.items())
        assert cell["bitops_ratio"] == models.bitops_ratio(table, cell["policy"]) <= cell["budget"]
        packed = file.with_suffix(".arq")
        if packed.exists():
            assert models.load_model(packed)[2]["policy"] == cell["policy"]
            assert arq.digest(packed.read_bytes()) == cell["network"]
    assert (compare.OUT / "TABLES.md").read_text() == compare.tables_of(cells)
    first, second = ((compare.ROOT / name).read_text() for name in ("README.md", "results/README.md"))
    headline, shown = compare.headline_of(cells), compare.summary_of(cells, compare.FLOAT + compare.SHOWN)
    assert headline in first and shown in first
    numbers = {*headline.splitlines(), *shown.splitlines()}
    assert {line for line in first.splitlines() if line.count("|") in (9, 10)} == numbers
    long = "ARQ" + compare.LONG
    for part in (compare.summary_of(cells), compare.paired_of(cells), compare.paired_of(cells, long)):
        assert part in second
    assert compare.rewards_of(cells).split("\n\n")[1] in second and compare.repeated_of(cells) in second
    assert compare.outcomes_of(cells) in second
    (cell,) = compare.at(cells, "ARQ", 0.25, 0.006)  # one seed, so the difference is the cell's own
    difference = "{mean:+.4f} ({standard_error:.4f})".format(**cell["acr_difference"])
    assert compare.difference_of(cells, "ARQ", "base", 0.25, 0.006) == difference
    same = [row["same"] for row in json.loads(limpq.OUT.read_text())]
    assert f"{min(same)} to {max(same)} of the 40 inner operands" in second
    names = {compare.name_of(cell) for cell in cells if cell["method"].startswith("LIMPQ")}
    assert {row["cell"] for row in json.loads(limpq.OUT.read_text())} == names


def test_figures_are_drawn_from_a_few_cells(tmp_path):
    """Of one sigma, without n = 10,000 and without searches: what no cell holds is left out."""
    pytest.importorskip("matplotlib")
    from benchmarks import figures

    for name in ("sigma0.25-budget1-base-seed0", "sigma0.25-budget0.008-uniform-seed0"):
        for ending in (".json", ".tsv"):
            (tmp_path / (name + ending)).write_bytes((compare.OUT / (name + ending)).read_bytes())
    figures.main(["--cells", str(tmp_path), "--out", str(tmp_path)])
    assert {file.stem for file in tmp_path.glob("*.png")} == {"comparison", "sizes"}
    name = "sigma0.25-budget0.008-ARQ-seed0"
    for ending in (".json", ".tsv"):
        (tmp_path / (name + ending)).write_bytes((compare.OUT / (name + ending)).read_bytes())
    figures.main(["--cells", str(tmp_path), "--out", str(tmp_path)])
    drawn = {file.stem for file in tmp_path.glob("*.png")}
    assert drawn == {"comparison", "sizes", "policies", "searches"}


def test_widths_are_compared_operand_by_operand():
    table = models.quantize_model(models.build_classifier("resnet8", 10).eval(), 32)
    first = models.uniform_policy(table, 4)
    second = first | {table[0].name: [4, 4], table[1].name: [4, 5]}  # the first layer does not count
    same = limpq.same_widths(table, first, second)
    assert len(same) == 2 * (len(table) - 2) and [i for i, one in enumerate(same) if not one] == [1]


def test_what_is_written_of_the_recipe_is_what_its_trials_hold(capsys):
    file = compare.ROOT / "results" / "recipe.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    recipe.show(found)
    text = (compare.ROOT / "results" / "README.md").read_text()
    assert all(line in text for line in capsys.readouterr().out.splitlines())


def test_what_is_written_of_the_searches_is_what_their_files_hold():
    """The model fits as surrogate.json says, and results/README.md holds both tables."""
    found = json.loads(surrogate.OUT.read_text())
    rows = [json.loads(line) for line in surrogate.REWARDS.read_text().splitlines()]
    x = surrogate.features(torch.tensor([row["bits"] for row in rows]))
    offsets, y = torch.tensor([row["offset"] for row in rows]), torch.tensor([row["acr"] for row in rows])
    fit = surrogate.cross_validated(x, offsets, y.double()) | {"noise": surrogate.noise_of(rows)}
    assert fit == pytest.approx(found["fit"])
    text = (compare.ROOT / "results" / "README.md").read_text()
    assert surrogate.table_of(found) in text
    assert proxy.table_of(json.loads(proxy.OUT.read_text())) in text


def test_the_integer_program_finds_the_best_policy_of_the_model():
    """Within the budget, and better by the model than each policy that it was fitted to."""
    found = json.loads(surrogate.OUT.read_text())["best"]
    rows = [json.loads(line) for line in surrogate.REWARDS.read_text().splitlines()]
    x = surrogate.features(torch.tensor([row["bits"] for row in rows]))
    y, offsets = torch.tensor([row["acr"] for row in rows]), torch.tensor([row["offset"] for row in rows])
    weights = surrogate.fit(x, offsets, y.double())
    table = models.quantize_model(models.build_classifier("resnet20", 10).eval(), 32)
    policy = surrogate.best_policy(table, weights)
    assert policy == found["policy"] and models.bitops_ratio(table, policy) <= surrogate.BUDGET
    assert found["value"] > (x @ weights[:-4] + weights[-4]).max()


# ---- the scripts ----

SCRIPTS = "attack batchnorm certificates compare figures limpq luck networks operations proxy".split()
SCRIPTS += "ranking recipe search shapes shared speed steps surrogate".split()


def test_every_script_is_tried():
    others = {"incremental", "rivals", "test_benchmarks"}
    assert {path.stem for path in Path(__file__).parent.glob("*.py")} == others.union(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
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
