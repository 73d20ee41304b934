"""Other ways to choose the bits, with the quantizer, the costs and the training of ARQ.

    uniform(table, budget)                     equal bit-widths, the rest of the budget in order
    RandomAgent, EvolutionAgent                act and learn in arq.search in place of ddpg.DDPG
    evaluate_accuracy(policy, ...)             HAQ: the same agent rewarded by clean accuracy
    nipq(base, ...), limpq(base, ...)          bits by gradient; bits by an integer program

All keep 8 bits in the first and the last layer, and meet the budget. `compare.py` runs them.
"""

import copy
import math
from functools import partial

import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from torch.nn import functional as F

import arq
import models
from ddpg import DDPG

WIDTHS = range(models.MIN_BITS, models.MAX_BITS + 1)
PAIRS = [(w, a) for w in WIDTHS for a in WIDTHS]  # of weight and input bits


# ---- no search ----
def fill(table, policy, budget: float) -> models.Policy:
    """One bit more for each operand where it fits, in rounds, first layer and weights first."""
    before = None
    while policy != before:
        before = policy
        for layer in table[1:-1]:
            for operand in (0, 1):  # a policy has [weight bits, input bits]
                wider = copy.deepcopy(policy)
                wider[layer.name][operand] += 1
                possible = wider[layer.name][operand] <= models.MAX_BITS
                if possible and models.bitops_ratio(table, wider) <= budget:
                    policy = wider
    return policy


def uniform(table, budget: float) -> models.Policy:
    """The widest equal bit-width within the budget, then what `fill` adds."""
    policies = [models.uniform_policy(table, bits) for bits in WIDTHS]
    widest = [policy for policy in policies if models.bitops_ratio(table, policy) <= budget][-1]
    return fill(table, widest, budget)


# ---- agents for arq.search ----
class RandomAgent(DDPG):
    """Uniformly random actions, nothing learned."""

    def act(self, state):
        return float(torch.rand((), generator=self.generator))

    def learn(self, states, actions, reward):
        self.episode += 1


class EvolutionAgent(DDPG):
    """Evolution as in single-path one-shot search (Guo et al., 2020, Algorithm 1), one child at
    a time: after as many random policies as the agent has, half of the children mix two of the
    ten best, half change a tenth of the actions of one at random. A child with the bits of an
    earlier one is bred again."""

    parents, mutation = 10, 0.1

    def learn(self, states, actions, reward):
        self.replay.append((actions, reward))
        self.episode += 1

    def act(self, state):
        if self.episode < self.config.warmup_episodes:
            return float(torch.rand((), generator=self.generator))
        if not getattr(self, "child", []):
            self.child = self.offspring()
        return self.child.pop(0)

    def offspring(self) -> list[float]:
        """The actions of a new policy."""
        seen = {self.bits(actions.flatten().tolist()) for actions, _ in self.replay}
        for _ in range(100):  # of a small space all may be known
            child = self.bred()
            if self.bits(child) not in seen:
                break
        return child

    @staticmethod
    def bits(actions: list[float]) -> tuple[int, ...]:
        return tuple(map(arq.BitWidthEnvironment.bits, actions))

    def bred(self) -> list[float]:
        best = sorted(self.replay, key=lambda episode: episode[1], reverse=True)[: self.parents]
        first, second = torch.randint(len(best), (2,), generator=self.generator).tolist()
        mother, father = best[first][0].flatten(), best[second][0].flatten()
        cross, mutate, fresh = torch.rand(3, len(mother), generator=self.generator)
        if torch.rand((), generator=self.generator) < 0.5:
            return torch.where(cross < 0.5, mother, father).tolist()
        return torch.where(mutate < self.mutation, fresh, mother).tolist()


def evaluate_accuracy(policy, cache, start, base, images, judged, config):
    """HAQ (Wang et al., 2019, equation 5): the reward is accuracy on `judged` without noise.
    As arq.evaluate_policy, up to the integer network."""
    quantized = copy.deepcopy(start)
    models.set_policy(quantized, policy)
    arq.fine_tune(quantized, base, images, config, config.episode_batches, "episode")
    return accuracy(models.integer_network(quantized, config.eval_batch), judged, config)


@torch.inference_mode()
def accuracy(network: nn.Module, images: arq.ImageSet, config: arq.Config) -> float:
    """Share of images that a network gets right without noise."""
    right = 0
    for part in torch.arange(len(images)).split(config.eval_batch):
        classes = network(images.batch(part, config.device)).argmax(1).cpu()
        right += int((classes == torch.tensor(images.labels)[part]).sum())
    return right / len(images)


# ---- NIPQ ----
def clip_with_noise(v: Tensor, alpha: Tensor, step: Tensor, signed: bool) -> Tensor:
    """v clipped to [-alpha, alpha] or [0, alpha], plus noise of one step inside of that."""
    low = -alpha if signed else torch.zeros_like(alpha)
    inside = (v > low) & (v < alpha)
    noise = (torch.rand_like(v) - 0.5) * inside
    return torch.minimum(torch.maximum(v, low), alpha) + noise * step


class PseudoNoise(models.LSQ):
    """NIPQ's operand (Shin et al., CVPR 2023, and its code): clipped to a learned range alpha,
    plus uniform noise of one step, alpha / q_max(b), in place of rounding (the code draws from
    the errors' histogram, and has one range per tensor). b = 2 + 6 sigmoid(pace theta), with
    jitter and straight-through rounding, learns by gradient; at first b is 5.

    pace: the code trains 40 epochs of ImageNet at a rate of 0.04, where 1,200 batches at 0.02
    would leave theta where it was. Its square is the ratio of the two."""

    def __init__(self, channels: int | None = None, num_batches: int = 1200):
        super().__init__(channels)
        self.pace = 18 * math.sqrt(1200 / num_batches)
        self.theta = nn.Parameter(torch.zeros(()))
        self.fixed = None  # the bit-width of first and last layer

    def width(self) -> Tensor:
        """b, not rounded."""
        if self.fixed is not None:
            return torch.full_like(self.theta, self.fixed)
        span = models.MAX_BITS - models.MIN_BITS
        return models.MIN_BITS + span * (self.pace * self.theta).sigmoid()

    def forward(self, v: Tensor) -> Tensor:
        step = self.step_for(v)
        # The gradient is scaled as FakeQuantize scales that of a step.
        scaled = step / (self.q_max**2 * math.sqrt(v[0].numel()))
        alpha = (scaled + (step - scaled).detach()) * self.q_max
        b = self.width()
        jittered = (b + torch.rand(()) - 0.5).round().clamp(models.MIN_BITS, models.MAX_BITS)
        levels = 2 ** (b + (jittered - b).detach() - float(self.signed)) - 1
        return clip_with_noise(v.float(), alpha, alpha / levels, bool(self.signed))


def nipq(base, table, budget, calibrate, train, num_batches, weight=2.0) -> models.Policy:
    """Learn the bits with the network: cross-entropy + weight * smooth_l1(BitOPs / budget, 1),
    then round, force under the budget, and fill. The penalty sees bits unrounded: at this pace
    rounded ones, as in the code, would swing about the budget.

    base: a float network, left as it is; calibrate(classifier): sets its step sizes
    train(classifier, num_batches=..., loss=...): as arq.train"""
    classifier = copy.deepcopy(base)
    quantizer = partial(PseudoNoise, num_batches=num_batches)
    models.quantize_model(classifier, table[0].map_size, quantizer)
    calibrate(classifier)
    models.set_policy(classifier, models.uniform_policy(table, 5))
    layers = models.quant_layers(classifier)
    for end in (table[0].name, table[-1].name):
        for quantizer in (layers[end].weight_quantizer, layers[end].input_quantizer):
            quantizer.fixed = models.FIRST_LAST_BITS
    total = sum(layer.macs for layer in table) * models.FLOAT_BITS**2

    def widths(name: str) -> tuple[Tensor, Tensor]:
        return layers[name].weight_quantizer.width(), layers[name].input_quantizer.width()

    def loss(network, x, noise, labels):
        costs = [layer.macs * torch.stack(widths(layer.name)).prod() for layer in table]
        ratio = torch.stack(costs).sum() / total / budget
        penalty = weight * F.smooth_l1_loss(ratio, torch.ones_like(ratio))
        return arq.noise_augmentation(network, x, noise, labels) + penalty

    train(classifier, num_batches=num_batches, loss=loss)
    names = [layer.name for layer in table]
    policy = {name: [round(width.item()) for width in widths(name)] for name in names}
    return fill(table, models.enforce_budget(table, policy, budget), budget)


# ---- LIMPQ ----
class WidthSteps(models.LSQ):
    """LIMPQ's operand (Tang et al., ECCV 2022): a step size for each width, with gradients over
    sqrt(N Q), as in LSQ (section 2.2), where models.LSQ has Q^2 sqrt(N)."""

    def __init__(self, channels: int | None = None):
        super().__init__(channels)
        self.steps = nn.Parameter(self.initial_steps.clone())

    def set_bits(self, bits: int) -> None:
        super().set_bits(bits)
        if not self.steps.any():
            self.steps.data.copy_(self.initial_steps)

    def step_for(self, v: Tensor) -> Tensor:
        self.steps.data.clamp_(min=1e-6)
        step = self.steps[self.bits]
        return step.view(-1, *[1] * (v.ndim - 1)) if self.is_weight else step

    def forward(self, v):
        step, elements = self.step_for(v), v[0].numel() / self.q_max**3
        return models.FakeQuantize.apply(v.float(), step, self.q_min, self.q_max, elements)


def limpq(base, table, budget, calibrate, train, num_batches, seed=0) -> models.Policy:
    """The learned step sizes are the layers' importance; `assign` picks the widths by it.
    Jointly trained: every batch passes once for each width in all layers, and once with random
    widths. Arguments as for nipq."""
    classifier = copy.deepcopy(base)
    models.quantize_model(classifier, table[0].map_size, WidthSteps)
    calibrate(classifier)
    generator = torch.Generator().manual_seed(seed)
    inner = table[1:-1]

    def loss(network, x, noise, labels):
        shape = len(table), 2
        bits = models.MIN_BITS + torch.randint(len(WIDTHS), shape, generator=generator)
        mixed = models.uniform_policy(table, models.MAX_BITS)
        mixed |= {layer.name: pair for layer, pair in zip(inner, bits.tolist())}
        policies = [mixed, *[models.uniform_policy(table, width) for width in WIDTHS]]
        losses = 0.0
        for policy in policies:
            models.set_policy(classifier, policy)
            losses = losses + arq.noise_augmentation(network, x, noise, labels)
        return losses

    train(classifier, num_batches=num_batches, loss=loss)
    layers = models.quant_layers(classifier)
    quantized = [layers[layer.name] for layer in inner]
    pairs = [(layer.weight_quantizer, layer.input_quantizer) for layer in quantized]
    return assign(table, budget, [[mean_steps(operand) for operand in pair] for pair in pairs])


def mean_steps(operand: WidthSteps) -> Tensor:
    """The learned step of each bit-width, its mean over channels."""
    return operand.steps.detach().view(models.MAX_BITS + 1, -1).mean(1)


def assign(table, budget: float, importance, balance: float = 2.0) -> models.Policy:
    """The widths that minimise the sum of s_a[b_a] + balance * s_w[b_w] under the budget, by an
    integer program. importance: (s_w, s_a) of each inner layer, by bit-width."""
    inner = table[1:-1]
    costs = [s_a[a] + balance * s_w[w] for s_w, s_a in importance for w, a in PAIRS]
    ends = sum(layer.macs * models.FIRST_LAST_BITS**2 for layer in (table[0], table[-1]))
    total = budget * sum(layer.macs for layer in table) * models.FLOAT_BITS**2
    layer_of_choice = torch.eye(len(inner)).repeat_interleave(len(PAIRS), 1)
    one_each = LinearConstraint(layer_of_choice.numpy(), 1, 1)
    # Divided by the budget, for an absolute tolerance; the last millionth stays unused.
    shares = [[layer.macs * w * a / total for layer in inner for w, a in PAIRS]]
    within = LinearConstraint(shares, -math.inf, 1 - ends / total - 1e-6)
    program = {"integrality": 1, "bounds": Bounds(0, 1), "constraints": [one_each, within]}
    chosen = torch.from_numpy(milp(torch.tensor(costs).numpy(), **program).x)
    policy = models.uniform_policy(table, models.MIN_BITS)
    for layer, choice in zip(inner, chosen.view(len(inner), -1).argmax(1).tolist()):
        policy[layer.name] = list(PAIRS[choice])
    return policy
