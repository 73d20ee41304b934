"""Deep deterministic policy gradient (DDPG) for one action in [0, 1] per step.

This file stands alone (torch). Losses and networks follow Lillicrap et al. (2016); the settings are
HAQ's (Wang et al., 2019, and its code).

mu(s), the actor, maps a state to an action in [0, 1]; Q(s, a), the critic, is the expected return; targets
mu' and Q' follow them by tau per update. b is the reward's moving average, sigma_e the exploration noise.
"""

import copy
import statistics
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class DDPGConfig:
    """HAQ's settings, but for the end of exploration: after `warmup_episodes` of uniformly random actions,
    sigma_e falls geometrically from `noise` to `noise_final` at the last of `episodes`."""

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
    first, second, last = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last, output)


def critic_loss(critic, critic_target, actor_target, batch, baseline, scale, discount) -> Tensor:
    """Squared Bellman error, y = (r - b) / scale + discount * Q'(s', mu'(s')), without Q' at the end."""
    state, action, reward, next_state, done = batch
    with torch.no_grad():
        next_value = critic_target(torch.cat([next_state, actor_target(next_state)], 1))
        target = (reward - baseline) / scale + discount * (1 - done) * next_value
    return F.mse_loss(critic(torch.cat([state, action], 1)), target)


def actor_loss(actor, critic, batch) -> Tensor:
    """The deterministic policy gradient climbs Q(s, mu(s))."""
    state = batch[0]
    return -critic(torch.cat([state, actor(state)], 1)).mean()


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source."""
    for old, new in zip(target.parameters(), source.parameters()):
        old.lerp_(new, tau)


class DDPG(nn.Module):
    """The agent. Per episode: `act` on each state, then `learn` once with all states, actions, the reward."""

    def __init__(self, state_size: int, seed: int = 0, config: DDPGConfig = DDPGConfig()):
        super().__init__()
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # leaves the caller's generator untouched
            torch.manual_seed(seed)
            self.actor = mlp(state_size, config.hidden, nn.Sigmoid())
            self.critic = mlp(state_size + 1, config.hidden, nn.Identity())
        self.actor_target, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), config.actor_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), config.critic_lr, fused=True)
        self.replay = deque(maxlen=config.replay_episodes)  # episodes of transitions (s, a, r, s', done)
        self.baseline, self.scale, self.episode = None, 1.0, 0

    @property
    def noise(self) -> float:
        """sigma_e of the current episode."""
        config = self.config
        steps = max(1, config.episodes - 1 - config.warmup_episodes)
        done = min(1.0, max(0, self.episode - config.warmup_episodes) / steps)
        return config.noise * (config.noise_final / config.noise) ** done

    @torch.no_grad()
    def act(self, state: Tensor) -> float:
        """Action in [0, 1] for a state (S,): uniform in warm-up, then mu(s) with truncated normal noise."""
        uniform = torch.rand((), generator=self.generator)
        if self.episode < self.config.warmup_episodes:
            return float(uniform)
        mean = float(self.actor(state[None]))
        # Inverse-CDF sampling of a normal truncated to [0, 1]: one uniform draw, nothing rejected.
        low, high = torch.special.ndtr((torch.tensor([0.0, 1.0]) - mean) / self.noise)
        action = mean + self.noise * torch.special.ndtri(low + uniform * (high - low))
        return float(action.clamp(0, 1))

    def learn(self, states: Tensor, actions: Tensor, reward: float) -> None:
        """Store one finished episode, states (T, S) and actions (T, 1); after warming up, T updates."""
        next_states = torch.cat([states[1:], states[-1:]])  # the last row is masked by done
        done = torch.zeros(len(states), 1)
        done[-1] = 1
        self.replay.append((states, actions, torch.full_like(done, reward), next_states, done))
        # The critic's unit: the standard deviation of the kept rewards, 1 while all are equal.
        self.scale = statistics.pstdev(float(episode[2][0]) for episode in self.replay) or 1.0
        self.episode += 1
        if self.episode >= self.config.warmup_episodes:
            for _ in range(len(states)):
                self.update()

    def update(self) -> None:
        """One mini-batch: the critic's step, the actor's step, the targets' step."""
        config = self.config
        columns = [torch.cat(column) for column in zip(*self.replay)]
        rows = torch.randint(len(columns[0]), (config.batch_size,), generator=self.generator)
        batch = [column[rows] for column in columns]
        # b moves half of the way to the mini-batch's mean reward
        mean = float(batch[2].mean())
        baseline = mean if self.baseline is None else self.baseline
        self.baseline = baseline + config.baseline_rate * (mean - baseline)
        nets = self.critic, self.critic_target, self.actor_target
        loss = critic_loss(*nets, batch, self.baseline, self.scale, config.discount)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        loss = actor_loss(self.actor, self.critic, batch)
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()
        soft_update(self.actor_target, self.actor, config.tau)
        soft_update(self.critic_target, self.critic, config.tau)

    def get_extra_state(self) -> dict:
        """With the networks' weights, all that the next episode depends on: see state_dict."""
        optimizers = [self.actor_optimizer.state_dict(), self.critic_optimizer.state_dict()]
        rest = {"baseline": self.baseline, "episode": self.episode, "generator": self.generator.get_state()}
        return {"optimizers": optimizers, "replay": list(self.replay), **rest}

    def set_extra_state(self, state: dict) -> None:
        for optimizer, saved in zip((self.actor_optimizer, self.critic_optimizer), state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.replay = deque(state["replay"], self.config.replay_episodes)
        self.baseline, self.episode = state["baseline"], state["episode"]
        self.generator.set_state(state["generator"])
