"""Other ways to choose the bits, with the quantizer, the costs and the training of this repository.

    uniform(table, budget)                         equal bit-widths, the rest of the budget in order
    RandomAgent, EvolutionAgent                    act and learn in arq.search in place of ddpg.DDPG
    accuracy_evaluator(evaluate, images)           HAQ: the same agent rewarded by clean accuracy
    nipq(classifier, ...), limpq(classifier, ...)  bits by gradient; bits by an integer program

All of them keep 8 bits in the first and the last layer, and meet the BitOPs budget. `compare.py` runs them.
"""

import copy
import math
import sys
from functools import partial
from pathlib import Path

import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq  # noqa: E402
import models  # noqa: E402
from ddpg import DDPG  # noqa: E402

WIDTHS = range(models.MIN_BITS, models.MAX_BITS + 1)
PAIRS = [(w, a) for w in WIDTHS for a in WIDTHS]  # of weight and input bits


# ---- no search ----
def fill(table, policy, budget: float) -> models.Policy:
    """In rounds, one bit more for each operand where it fits, from the first layer on, weights first."""
    before = None
    while policy != before:
        before = policy
        for layer in table[1:-1]:
            for kind in (0, 1):
                wider = copy.deepcopy(policy)
                wider[layer.name][kind] += 1
                possible = wider[layer.name][kind] <= models.MAX_BITS
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
    """Evolution as in single-path one-shot search (Guo et al., 2020, Algorithm 1), one child at a time: after
    as many random policies as the agent has, half of the children mix two of the ten best, half change a
    tenth of one's actions at random. A child with the bits of an earlier one is bred again."""

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
        best = sorted(self.replay, key=lambda one: one[1], reverse=True)[: self.parents]
        first, second = torch.randint(len(best), (2,), generator=self.generator).tolist()
        mother, father = best[first][0].flatten(), best[second][0].flatten()
        cross, mutate, fresh = torch.rand(3, len(mother), generator=self.generator)
        if torch.rand((), generator=self.generator) < 0.5:
            return torch.where(cross < 0.5, mother, father).tolist()
        return torch.where(mutate < self.mutation, fresh, mother).tolist()


def accuracy_evaluator(evaluate: arq.PolicyEvaluator, images: Tensor, labels, config) -> arq.PolicyEvaluator:
    """HAQ (Wang et al., 2019, equation 5): the reward is the accuracy on images without noise."""

    @torch.inference_mode()
    def right(quantized: nn.Module, cache) -> list[float]:
        network, found = arq.integers(quantized, config), []
        for x, y in zip(images.split(config.eval_batch), torch.as_tensor(labels).split(config.eval_batch)):
            found += (network(x).argmax(1).cpu() == y).double().tolist()
        return found

    return arq.PolicyEvaluator(evaluate.classifier, evaluate.finetune, right)


# ---- NIPQ ----
class ClipWithNoise(torch.autograd.Function):
    """v clipped to [-alpha, alpha] or, unsigned, to [0, alpha]; inside, plus uniform noise of one step. The
    gradients are autograd's; written out they need a third less time."""

    @staticmethod
    def forward(ctx, v, alpha, step, signed):
        low = -alpha if signed else torch.zeros_like(alpha)
        inside = ((v > low) & (v < alpha)).float()
        noise = torch.rand_like(v).sub_(0.5).mul_(inside)
        clipped = v.clamp(low, alpha)
        ctx.save_for_backward(clipped, inside, noise, alpha)
        return clipped.addcmul(noise, step)

    @staticmethod
    def backward(ctx, gradient):
        clipped, inside, noise, alpha = ctx.saved_tensors
        of_v = gradient * inside
        of_alpha = ((gradient - of_v) * clipped).sum_to_size(alpha.shape) / alpha  # clipped / alpha: the sign
        return of_v, of_alpha, (of_v * noise).sum_to_size(alpha.shape), None


class PseudoNoise(models.LSQ):
    """NIPQ's operand (Shin et al., CVPR 2023, and its code): clipped to a learned range alpha, plus uniform
    noise of one step, alpha / q_max(b), in place of rounding (the code draws from the errors' histogram, and
    has one range per tensor). b = 2 + 6 sigmoid(pace theta), with jitter and straight-through rounding,
    learns by gradient; at first b is 5. pace: the code trains 40 epochs of ImageNet at 0.04, where the
    comparison's 1,200 steps of 0.02 would leave theta where it was; its square is the ratio of the two, 18
    squared, and less for more steps."""

    def __init__(self, channels: int | None = None, steps: int = 1200):
        super().__init__(channels)
        self.pace = 18 * math.sqrt(1200 / steps)
        self.theta = nn.Parameter(torch.zeros(()))
        self.fixed = None  # the bit-width of first and last layer

    def width(self) -> Tensor:
        """b, not rounded."""
        if self.fixed:
            return torch.full_like(self.theta, self.fixed)
        span = models.MAX_BITS - models.MIN_BITS
        return models.MIN_BITS + span * (self.pace * self.theta).sigmoid()

    def forward(self, v: Tensor) -> Tensor:
        if self.bits == models.FLOAT_BITS:
            return v
        step = self.step_for(v)
        scaled = step / (self.q_max**2 * math.sqrt(v[0].numel()))  # as FakeQuantize scales gradients
        alpha = (scaled + (step - scaled).detach()) * self.q_max
        b = self.width()
        jittered = (b + torch.rand(()) - 0.5).round().clamp(models.MIN_BITS, models.MAX_BITS)
        levels = 2 ** (b + (jittered - b).detach() - float(self.signed)) - 1
        return ClipWithNoise.apply(v.float(), alpha, alpha / levels, self.signed)


def nipq(classifier, table, budget: float, calibrate, train, weight=2.0, steps=1200) -> models.Policy:
    """Learn the bits with the network: cross-entropy + weight * smooth_l1(BitOPs / budget, 1), then round,
    force under the budget, and fill. The penalty sees bits unrounded: at this pace rounded ones, as in the
    code, would swing about the budget. calibrate(classifier); train(classifier, loss): so many steps."""
    classifier = copy.deepcopy(classifier)
    models.quantize_model(classifier, table[0].map_size, partial(PseudoNoise, steps=steps))
    calibrate(classifier)
    models.set_policy(classifier, models.uniform_policy(table, 5))
    layers = models.quant_layers(classifier)
    for name in (table[0].name, table[-1].name):
        for quantizer in (layers[name].weight_quantizer, layers[name].input_quantizer):
            quantizer.fixed = models.FIRST_LAST_BITS
    total = sum(layer.macs for layer in table) * models.FLOAT_BITS**2

    def widths(name: str) -> tuple[Tensor, Tensor]:
        return layers[name].weight_quantizer.width(), layers[name].input_quantizer.width()

    def loss(network, x, noise, labels):
        costs = [layer.macs * torch.stack(widths(layer.name)).prod() for layer in table]
        ratio = torch.stack(costs).sum() / total / budget
        penalty = weight * F.smooth_l1_loss(ratio, torch.ones_like(ratio))
        return arq.noise_augmentation(network, x, noise, labels) + penalty

    train(classifier, loss=loss)
    policy = {layer.name: [round(width.item()) for width in widths(layer.name)] for layer in table}
    return fill(table, models.enforce_budget(table, policy, budget), budget)


# ---- LIMPQ ----
class PublishedScale(models.LSQ):
    """The step's gradient over sqrt(N Q), as in LSQ (section 2.2), where models.LSQ has Q^2 sqrt(N)."""

    def forward(self, v):
        if self.bits == models.FLOAT_BITS:
            return v
        elements = v[0].numel() / self.q_max**3
        return models.FakeQuantize.apply(v.float(), self.step_for(v), self.q_min, self.q_max, elements)


class WidthSteps(PublishedScale):
    """LIMPQ's operand (Tang et al., ECCV 2022): a step size for each width, which learns as published."""

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


def limpq(classifier, table, budget: float, calibrate, train, seed: int = 0) -> models.Policy:
    """The learned step sizes are the layers' importance; `assign` picks the widths under the budget.
    Jointly trained: every batch passes once for each width in all layers, and once with random widths."""
    classifier = copy.deepcopy(classifier)
    models.quantize_model(classifier, table[0].map_size, WidthSteps)
    calibrate(classifier)
    generator = torch.Generator().manual_seed(seed)

    def loss(network, x, noise, labels):
        drawn = torch.randint(models.MIN_BITS, models.MAX_BITS + 1, (len(table), 2), generator=generator)
        mixed = models.uniform_policy(table, models.MAX_BITS)
        mixed |= {layer.name: bits for layer, bits in zip(table[1:-1], drawn.tolist())}
        losses = 0.0
        for policy in [mixed] + [models.uniform_policy(table, bits) for bits in WIDTHS]:
            models.set_policy(network, policy)
            losses = losses + arq.noise_augmentation(network, x, noise, labels)
        return losses

    train(classifier, loss=loss)
    layers = models.quant_layers(classifier)
    importance = []
    for layer in table[1:-1]:
        both = layers[layer.name].weight_quantizer, layers[layer.name].input_quantizer
        importance.append([one.steps.detach().view(models.MAX_BITS + 1, -1).mean(1) for one in both])
    return assign(table, budget, importance)


def assign(table, budget: float, importance, balance: float = 2.0) -> models.Policy:
    """The widths that minimise the sum of s_a[b_a] + balance * s_w[b_w] under the budget.
    importance: (s_w, s_a) of each inner layer, by bit-width. balance: its code's."""
    return cheapest(table, budget, [[s_a[a] + balance * s_w[w] for w, a in PAIRS] for s_w, s_a in importance])


def cheapest(table, budget: float, costs) -> models.Policy:
    """An integer program: one of PAIRS per inner layer, with the least sum of costs (layers, pairs)."""
    inner, policy = table[1:-1], models.uniform_policy(table, models.MIN_BITS)
    bitops = torch.tensor([[layer.macs * w * a for w, a in PAIRS] for layer in inner], dtype=torch.float64)
    ends = sum(layer.macs * models.FIRST_LAST_BITS**2 for layer in (table[0], table[-1]))
    total = budget * sum(layer.macs for layer in table) * models.FLOAT_BITS**2
    choices = torch.eye(len(inner)).repeat_interleave(len(PAIRS), 1)
    one_each = LinearConstraint(choices.numpy(), 1, 1)
    # Divided by the budget: the solver's tolerance is absolute. The last millionth stays unused.
    shares = (bitops / total).view(1, -1)
    within = LinearConstraint(shares.numpy(), -math.inf, 1 - ends / total - 1e-6)
    of = {"integrality": 1, "bounds": Bounds(0, 1), "constraints": [one_each, within]}
    found = torch.from_numpy(milp(torch.tensor(costs).flatten().numpy(), **of).x)
    for layer, choice in zip(inner, found.view(len(inner), -1).argmax(1).tolist()):
        policy[layer.name] = list(PAIRS[choice])
    return policy
