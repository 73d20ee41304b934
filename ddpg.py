"""Deep deterministic policy gradient (DDPG) for one action in [0, 1] per decision.

This file stands alone (torch). Losses and networks: Lillicrap et al. (2016); settings: HAQ's
(Wang et al., 2019, and its code).

    mu       actor        maps a state (S,) to an action in [0, 1]
    Q        critic       expected return of a state and an action
    mu', Q'  ..._target   follow mu and Q by tau per update
    b        baseline     moving average of the reward
    sigma_e  noise        exploration noise
"""

import copy
import statistics
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class DDPGConfig:
    """HAQ's settings, but for the end of exploration: after `warmup_episodes` of random
    actions, sigma_e falls geometrically to `noise_final` at the last of `episodes`."""

    hidden: int = 300
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    batch_size: int = 64
    tau: float = 0.01
    discount: float = 1.0
    noise: float = 0.5
    noise_final: float = 0.1
    episodes: int = 600
    warmup_episodes: int = 20
    replay_episodes: int = 128
    baseline_rate: float = 0.5


def mlp(inputs: int, hidden: int, output: nn.Module) -> nn.Sequential:
    """Two hidden ReLU layers and one output in the range of `output`."""
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(hidden, 1), output)


def critic_loss(critic, critic_target, actor_target, batch, discount) -> Tensor:
    """Squared Bellman error: y = r + discount * Q'(s', mu'(s')), y = r at an episode's end."""
    state, action, reward, next_state, done = batch
    with torch.no_grad():
        next_value = critic_target(torch.cat([next_state, actor_target(next_state)], 1))
        target = reward + discount * (1 - done) * next_value
    return nn.functional.mse_loss(critic(torch.cat([state, action], 1)), target)


def actor_loss(actor, critic, batch) -> Tensor:
    """The deterministic policy gradient climbs Q(s, mu(s))."""
    return -critic(torch.cat([batch[0], actor(batch[0])], 1)).mean()


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source."""
    for parameter, goal in zip(target.parameters(), source.parameters()):
        parameter.lerp_(goal, tau)


class DDPG(nn.Module):
    """The agent. Per episode: `act` on each state, then `learn` once, from all of them."""

    def __init__(self, state_size: int, seed: int = 0, config: DDPGConfig = DDPGConfig()):
        super().__init__()
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # leaves the caller's generator untouched
            torch.manual_seed(seed)
            self.actor = mlp(state_size, config.hidden, nn.Sigmoid())
            self.critic = mlp(state_size + 1, config.hidden, nn.Identity())
        self.actor_target = copy.deepcopy(self.actor)
        self.critic_target = copy.deepcopy(self.critic)
        adam = torch.optim.Adam
        self.actor_optimizer = adam(self.actor.parameters(), config.actor_lr, fused=True)
        self.critic_optimizer = adam(self.critic.parameters(), config.critic_lr, fused=True)
        self.replay = deque(maxlen=config.replay_episodes)  # (s, a, r, s', done) of T rows
        self.baseline, self.episode = None, 0

    @property
    def noise(self) -> float:
        """sigma_e of the current episode."""
        first, last = self.config.warmup_episodes, self.config.episodes - 1
        share = min(1.0, max(0, self.episode - first) / max(1, last - first))
        return self.config.noise * (self.config.noise_final / self.config.noise) ** share

    @torch.no_grad()
    def act(self, state: Tensor) -> float:
        """Action in [0, 1] for a state (S,): uniform in warm-up, then mu(s) with noise."""
        uniform = torch.rand((), generator=self.generator)
        if self.episode < self.config.warmup_episodes:
            return float(uniform)
        mean = float(self.actor(state[None]))
        # Inverse-CDF sampling of a normal truncated to [0, 1]: one draw, nothing rejected.
        low, high = torch.special.ndtr((torch.tensor([0.0, 1.0]) - mean) / self.noise)
        action = mean + self.noise * torch.special.ndtri(low + uniform * (high - low))
        return float(action.clamp(0, 1))

    def learn(self, states: Tensor, actions: Tensor, reward: float) -> None:
        """Store a finished episode, states (T, S), actions (T, 1); after warm-up, T updates."""
        next_states = torch.cat([states[1:], states[-1:]])  # the last row is masked by done
        done = torch.zeros(len(states), 1)
        done[-1] = 1
        rewards = torch.full_like(done, reward)
        self.replay.append((states, actions, rewards, next_states, done))
        self.transitions = [torch.cat(column) for column in zip(*self.replay)]
        # The critic's unit: the standard deviation of the kept rewards, 1 if all are equal.
        self.scale = statistics.pstdev(float(r[0]) for _, _, r, _, _ in self.replay) or 1.0
        self.episode += 1
        if self.episode >= self.config.warmup_episodes:
            for _ in range(len(states)):
                self.update()

    def update(self) -> None:
        """One mini-batch for the critic, the actor and the targets."""
        config = self.config
        count = len(self.transitions[0])
        rows = torch.randint(count, (config.batch_size,), generator=self.generator)
        state, action, reward, *others = (column[rows] for column in self.transitions)
        # The critic learns (r - b) / scale; b moves half way to the mini-batch's mean reward.
        mean = float(reward.mean())
        baseline = mean if self.baseline is None else self.baseline
        self.baseline = baseline + config.baseline_rate * (mean - baseline)
        batch = [state, action, (reward - self.baseline) / self.scale, *others]
        critic, target = self.critic, self.critic_target
        loss = critic_loss(critic, target, self.actor_target, batch, config.discount)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        loss = actor_loss(self.actor, self.critic, batch)
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()
        soft_update(self.actor_target, self.actor, config.tau)
        soft_update(self.critic_target, self.critic, config.tau)

    def get_extra_state(self) -> tuple:
        """With the networks' weights, all that the next episode depends on: see state_dict."""
        optimizers = [self.actor_optimizer.state_dict(), self.critic_optimizer.state_dict()]
        generator = self.generator.get_state()
        return optimizers, list(self.replay), self.baseline, self.episode, generator

    def set_extra_state(self, state: tuple) -> None:
        (actor, critic), replay, self.baseline, self.episode, generator = state
        self.actor_optimizer.load_state_dict(actor)
        self.critic_optimizer.load_state_dict(critic)
        self.replay = deque(replay, self.config.replay_episodes)
        self.generator.set_state(generator)
