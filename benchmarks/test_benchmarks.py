"""Properties of the benchmarks' own code: sharper incremental certificates, and scripts that start."""

import copy
import importlib
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy.stats import binom, norm
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify
import models
from benchmarks import compare, incremental, limpq, proxy, recipe, rivals, shared, surrogate
from certify import ABSTAIN, Smooth
from ddpg import DDPGConfig

KEY = "0|certificate"
TRIALS = 1000
ALLOWED = binom.ppf(0.999, TRIALS, 0.05)  # so many violations in 1,000 trials are still chance at 0.05


def draw(probabilities, n: int, seed: int = 0) -> torch.Tensor:
    """(TRIALS, n) independent outcomes 0, 1, ... of known probabilities."""
    generator = torch.Generator().manual_seed(seed)
    outcomes = torch.multinomial(torch.as_tensor(probabilities), TRIALS * n, True, generator=generator)
    return outcomes.view(TRIALS, n)


# ---- the paired bound ----


# P[f and f^P say c_A], P[only f], P[only f^P], P[neither]
JOINT = [(0.7, 0.05, 0.02, 0.23), (0.93, 0.0, 0.0, 0.07), (0.55, 0.2, 0.15, 0.1), (0.9, 0.07, 0.0, 0.03)]


@pytest.mark.parametrize("joint", JOINT)
@pytest.mark.parametrize("m, n", [(30, 300), (200, 400)])
@pytest.mark.parametrize("factor", [1, 5])
def test_coverage_of_the_paired_bound(joint, m, n, factor):
    """Whatever is bet; and near the truth where the bet is the one that the counts call for."""
    pairs = draw(joint, m)
    both, lost, gained = ((pairs == kind).sum(1) for kind in range(3))
    p_f, p = joint[0] + joint[1], joint[0] + joint[2]
    k = draw([1 - p_f, p_f], n, seed=1).sum(1)
    w, one = n / (n + m), torch.ones(TRIALS)
    variance = joint[0] * (1 - w) ** 2 + joint[1] * w**2 + joint[2] - (p - w * p_f) ** 2
    bet = factor * math.sqrt(6 / (m * variance + 1))
    bound = incremental.paired_lower_bound(both, lost, gained, m * one, k, n * one, 0.05, bet * one)
    assert (bound > p).sum() <= ALLOWED
    assert factor > 1 or bound.mean() > p - 5 * math.sqrt(variance / m) - 5 / m


def test_the_paired_bound_spends_its_alpha():
    """Where few changes decide, alpha used at four times its value violates the test above.

    f's probability is known from many samples; the bound fails when no change is seen: 0.93 ** 30 = 0.11.
    """
    both, lost, gained = 0.5, 0.07, 0.0
    m, n, one = 30, 10**7, torch.ones(TRIALS)
    pairs = draw([both, lost, gained, 1 - both - lost - gained], m)
    counts = [(pairs == kind).sum(1) for kind in range(3)]
    k = ((both + lost) * n * one).round()

    def violations(alpha):
        bound = incremental.paired_lower_bound(*counts, m * one, k, n * one, alpha, 9 * one)
        return int((bound > both + gained).sum())

    assert violations(0.05) <= ALLOWED < violations(0.2)


def test_the_paired_bound_never_exceeds_the_minimum_it_approximates():
    """Against the docstring's formula on a dense grid of t, from below and closely."""
    both, lost, gained, m, k, n, bet, alpha = 150, 9, 4, 200, 700, 800, 1.5, 0.01
    w, t = n / (n + m), torch.linspace(-0.78, 0.9, 40001, dtype=torch.float64)
    size = (0.9 / (w + t)).clamp(max=bet)
    counts = {1 - w: both, -w: lost, 1.0: gained, 0.0: m - both - lost - gained}
    wealth = 0.01 + 0.99 * sum(c * torch.log1p(size * (v - t)) for v, c in counts.items()).exp()
    some = alpha * wealth < 1
    exact = (t[some] + w * certify.lower_confidence_bound(k, n, alpha * wealth[some])).min()
    arguments = [torch.tensor([float(x)]) for x in (both, lost, gained, m, k, n)]
    found = float(incremental.paired_lower_bound(*arguments, alpha, torch.tensor([bet])))
    assert exact - 0.01 < found <= exact


# ---- coverage of every radius ----


class Outcomes(Smooth):
    """g^P whose samples have known joint probabilities with those of f, in `cache`.

    Trials are images. joint[i][j] = P[f = i, f^P = j]; class 0 is right. Fresh noise is drawn apart.
    """

    def __init__(self, joint, n, alpha):
        super().__init__(None, len(joint), sigma=1.0)
        joint = torch.tensor(joint)
        pairs = draw(joint.flatten(), n)
        self.new, self.fresh = pairs % len(joint), draw(joint.sum(0), n, seed=7)
        old = pairs // len(joint)
        rows = []
        for i, n_a in enumerate((old == 0).sum(1).tolist()):
            counts = {"selected": 0, "n_a": n_a, "n_b": 0, "n": n, "n0": 1}
            rows.append(certify.Certificate(i, 0, 0, 0.0, 1, "", **counts, sigma=1.0, alpha=alpha))
        self.cache = certify.ReplayCache(rows, old.to(torch.uint8), KEY)

    def predictions(self, images, ids, sizes, key, first=0):
        source = (self.new if key == KEY else self.fresh)[:, first : first + int(sizes.max())]
        return (source * (torch.arange(source.shape[1]) < sizes[:, None])).to(torch.uint8)


# f's probabilities below gamma, clearly above it, and (of the third kind) on either side by chance
CASES = [
    ((0.70, 0.04, 0.01), (0.02, 0.12, 0.01), (0.0, 0.01, 0.09)),
    ((0.96, 0.01, 0.0), (0.0, 0.02, 0.0), (0.0, 0.0, 0.01)),
    ((0.88, 0.03, 0.0), (0.01, 0.04, 0.0), (0.0, 0.0, 0.04)),
]


@pytest.mark.parametrize("joint", CASES)
@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize("mode", incremental.MODES)
def test_coverage_of_every_incremental_radius(mode, both_sides, joint):
    """alpha + alpha_zeta = 0.05: at most that share of radii exceeds the true one."""
    g = Outcomes(joint, 1000, alpha=0.025)
    p = torch.tensor(joint, dtype=torch.float64).sum(0)
    truth = certify.certified_radius(p[0], 1.0, p[1:].max() if both_sides else None)
    rows = incremental.certify_incremental(g, None, g.cache, 200, 0.025, 0.9, mode, both_sides)
    radii = torch.tensor([row.radius for row in rows])
    assert (radii > truth).sum() <= ALLOWED and radii.mean() > 0.3 * truth
    assert sum(row.passes for row in rows) <= 200 * TRIALS


def slab(edges):
    """Three classes by the position along one direction of 16 dimensions."""
    direction = torch.full((1, 4, 4), 1 / 4)

    def classifier(x):
        position = (x * direction).sum((1, 2, 3))
        return F.one_hot((position > edges[0]).long() + (position > edges[1]), 3).float()

    return classifier


def test_coverage_through_sampling():
    """Slab classifiers f and f^P, p_A and p_B in closed form: every mode's radius at 0.05, 150 images."""
    edges, sigma, count = (-0.55, 0.95), 0.5, 150
    below = [norm.cdf(edge / sigma) for edge in edges]
    p_b, p_a = sorted([below[0], below[1] - below[0], 1 - below[1]])[1:]
    f, changed = (Smooth(slab(some), 3, sigma) for some in ((-0.6, 0.9), edges))
    images = torch.zeros(count, 1, 4, 4)
    cache = f.certify_and_cache(images, [1] * count, n0=20, n=300, alpha=0.025)
    for mode in incremental.MODES:
        for sides in (False, True):
            rows = incremental.certify_incremental(changed, images, cache, 60, 0.025, 0.99, mode, sides)
            truth = certify.certified_radius(p_a, sigma, p_b if sides else None)
            radii = torch.tensor([row.radius for row in rows])
            assert (radii > truth).sum() <= binom.ppf(0.999, count, 0.05) and radii.max() > 0.3 * truth


# ---- plans and certificates, on classifiers by one pixel ----


class Bands(Smooth):
    """Three classes by one pixel, so that moving its edge changes a known share. Keeps what was asked."""

    def __init__(self, edge):
        super().__init__(self.classify, 3, 0.25, batch_size=64)
        self.edge = edge
        self.passes = 0
        self.keys = set()

    def classify(self, x):
        self.passes += len(x)
        v = x[:, 0, 0, 0] - 0.1
        return torch.stack([(v > self.edge) * 1.0, (v <= self.edge) * 1.0, (v < self.edge - 5) * 2.0], 1)

    def predictions(self, images, ids, sizes, key, first=0):
        if sizes.any():
            self.keys.add(key)
        return super().predictions(images, ids, sizes, key, first)


def cached(n=1000):
    images = torch.tensor([0.2, 0.4, 1.0, 0.0]).view(4, 1, 1, 1)  # the last one is on the wrong side
    return images, Bands(0.0).certify_and_cache(images, [0] * 4, n=n)


def noise_of(cache, image_id):
    return torch.cat([certify.draw_noise(cache.key, image_id, chunk, (1, 1, 1), "cpu") for chunk in range(3)])


def p_lower(cache, i):
    row = cache.certificates[i]
    return certify.lower_confidence_bound(row.n_a, row.n, row.alpha)


def test_identical_networks_have_the_disparity_bound_of_zero():
    images, cache = cached()
    rows = incremental.certify_incremental(Bands(0.0), images, cache, 200, mode="paper")
    zero = certify.upper_confidence_bound(0, 200, 0.001)
    assert [row.zeta for row in rows[:2]] == [zero] * 2 and all(math.isnan(row.zeta) for row in rows[2:])
    for i in (0, 1):
        expected = certify.certified_radius(max(0.5, p_lower(cache, i) - zero), 0.25)
        assert rows[i].radius == pytest.approx(expected)
    rows = incremental.certify_incremental(Bands(0.0), images, cache, 200, mode="paired")
    assert [row.difference for row in rows[:3]] == [0] * 3


def test_paper_and_irs_are_two_routes_to_the_same_certificates():
    images, cache = cached()
    for gamma in (0.99, 0.0):  # gamma = 0: all fresh, at alpha
        rows = Bands(0.05).certify_incremental(images, cache, 300, 0.002, gamma)
        others = incremental.certify_incremental(Bands(0.05), images, cache, 300, 0.002, gamma, "paper")
        assert [row.method.replace("replayed", "paper") for row in rows] == [row.method for row in others]
        for row, other in zip(rows, others):
            assert row.radius == pytest.approx(other.radius) and row.passes == other.passes
            assert row.zeta == pytest.approx(other.zeta, nan_ok=True) and row.predict == other.predict


def test_certificates_by_hand():
    """Against counts made here: replayed samples below gamma; fresh ones at alpha (paper) or more (off)."""
    images, cache = cached()
    g = Bands(0.05)
    paper = incremental.certify_incremental(g, images, cache, 300, 0.002, 0.99, "paper")
    new = g.classify(images[1] + 0.25 * noise_of(cache, 1)).argmax(1)
    zeta = certify.upper_confidence_bound(int((new != cache.predictions[1, :300]).sum()), 300, 0.002)
    assert paper[1].zeta == pytest.approx(zeta) and 0.02 < zeta < 0.2
    assert paper[1].radius == pytest.approx(certify.certified_radius(p_lower(cache, 1) - zeta, 0.25))
    off = incremental.certify_incremental(g, images, cache, 300, 0.002, mode="off")
    for rows, alpha in ((paper, 0.001), (off, 0.003)):
        p = certify.lower_confidence_bound(300, 300, alpha)
        assert rows[2].method == "fresh" and rows[2].radius == pytest.approx(
            certify.certified_radius(p, 0.25)
        )
        assert rows[3].predict == ABSTAIN and rows[3].radius == 0


def test_the_plan_sees_no_sample_that_a_bound_uses():
    """Predictions after the first tenth may be anything: the plan, methods and passes, is the same."""
    images, cache = cached()
    g = Bands(0.05)

    def plan(cache):
        rows = incremental.certify_incremental(g, images, cache, 200)
        return [(row.method, row.passes) for row in rows]

    first = plan(cache)
    assert {method for method, _ in first} >= {"fresh", "paired", "none"}
    assert 590 <= sum(passes for _, passes in first) <= 600 and g.passes == sum(p for _, p in first)
    changed = copy.deepcopy(cache)
    changed.predictions[:, 100:] = 1 - changed.predictions[:, 100:]
    assert plan(changed) == first
    changed.predictions[0, :100] = 0
    assert plan(changed) != first


def test_bounds_leave_out_what_the_plan_saw():
    """The difference is that of samples 100 to 289, after the tenth that the plan and its pilot of 10 had."""
    images, cache = cached()
    g = Bands(0.05)
    rows = incremental.certify_incremental(g, images, cache, 200, mode="paired")
    for i in range(3):
        after = (g.classify(images[i] + 0.25 * noise_of(cache, i)).argmax(1) == 0)[100:290].sum()
        before = (cache.predictions[i, 100:290] == 0).sum()
        assert rows[i].passes == 200 and rows[i].difference == pytest.approx(int(after - before) / 190)


def test_fresh_samples_share_no_noise_with_the_cache():
    images, cache = cached()
    for mode, expected in (("off", {"/fresh"}), ("paired", {""}), ("auto", {"", "/fresh"})):
        g = Bands(0.05)
        incremental.certify_incremental(g, images, cache, 200, mode=mode)
        assert g.keys == {cache.key + part for part in expected}


def test_passes_go_where_they_buy_radius():
    """auto certifies more than the same number of fresh samples, and an image without hope gets none."""
    images = torch.cat([torch.linspace(0.05, 0.5, 30), torch.full((10,), 1.0)]).view(40, 1, 1, 1)
    cache = Bands(0.0).certify_and_cache(images, [0] * 40, n=2000)
    acr = {}
    for mode in incremental.MODES:
        rows = incremental.certify_incremental(Bands(0.01), images, cache, 200, mode=mode)
        acr[mode] = certify.average_certified_radius(rows)
    assert acr["auto"] > 1.05 * acr["off"] and acr["auto"] > acr["paper"]
    assert any(row.method == "none" and row.radius == 0 for row in rows)


@pytest.mark.parametrize("mode", incremental.MODES)
def test_images_of_the_wrong_class_cost_no_samples(mode):
    images, cache = cached()
    g = Bands(0.0)
    incremental.certify_incremental(g, images, cache, 100, mode=mode)
    assert 285 <= g.passes <= 300


def test_what_cannot_be_certified_is_refused():
    images, cache = cached()
    for options, words in (
        ({"n_p": 1001}, "the 1000 cached"),
        ({"n_p": 501, "mode": "paired"}, "half of the 1000 cached"),
        ({"n_p": 100, "mode": "sharp"}, "unknown mode"),
        ({"n_p": 100, "alpha_zeta": 0.9995}, "below 1"),
    ):
        with pytest.raises(ValueError, match=words):
            incremental.certify_incremental(Bands(0.0), images, cache, **options)
    with pytest.raises(ValueError, match="sigma"):
        incremental.certify_incremental(Smooth(None, 3, 0.5), images, cache, 100)


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

SCRIPTS = "attack batchnorm certificates compare figures limpq luck networks proxy".split()
SCRIPTS += "ranking recipe resume scale search shapes shared speed steps surrogate".split()


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
