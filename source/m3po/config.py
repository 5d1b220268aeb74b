"""Every tunable number of M3PO, one dataclass per component.

Each field is one settlement of the algorithm (see ``docs/algorithm.md``), so that an ablation is one override:
``agent.algorithm.planner.horizon=5``. Isaac Lab's configclasses are thin mirrors of the dataclasses below.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

MODEL_SIZES: dict[str, tuple[int, int, int]] = {
    # name: (latent dimensions, hidden width, encoder width); the parameter counts are those of a 60-d observation and
    # an 8-d action, checked by a test.
    "micro": (32, 64, 32),
    "tiny": (64, 128, 128),
    "small": (128, 256, 256),
    "1M": (128, 416, 256),
    "5M": (512, 912, 256),
    "19M": (768, 1984, 1024),
    "48M": (768, 3328, 1792),
}
"""World-model sizes: latent dimensions, hidden width of the heads, hidden width of the encoder."""


QUARANTINE_SHARE = 0.5
"""Default of ``agent.quarantine_share``: a run stops, with a checkpoint, when more than this share of its environments
gave values that are not finite within one rollout. In [0, 1]; 1 never stops it."""


def check_quarantine_share(share: float) -> None:
    """Raise ``ValueError`` unless ``quarantine_share`` is a share."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"quarantine_share must lie in [0, 1], got {share}.")


@dataclass
class WorldModelCfg:
    """The implicit latent world model and its training."""

    size: str = "1M"
    """Row of :data:`MODEL_SIZES`."""

    simnorm_dim: int = 8
    """Group size of SimNorm; divides the latent dimensions."""

    dynamics: str = "residual"
    """``residual``: ``z' = SimNorm(log z + f(z, a))``, which is "no change" at initialisation; ``plain``: TD-MPC2's."""

    task_embedding_dim: int = 96
    """Dimensions of the learnable task embedding (maximum norm 1)."""

    num_bins: int = 101
    """Bins of the two-hot reward and value heads."""

    bin_range: tuple[float, float] = (-10.0, 10.0)
    """Range of the bins in symlog space."""

    horizon: int = 3
    """Transitions per training sub-sequence, steps."""

    steps_per_iteration: int = 32
    """Gradient steps after each rollout."""

    extra_steps: int = 0
    """More gradient steps after the first rollout; they fall linearly to none over :attr:`extra_iterations`."""

    extra_iterations: int = 10
    """Iterations that take extra steps, so that planning starts while the policy still learns most."""

    batch_size: int = 1024
    """Sub-sequences per gradient step."""

    ring_transitions: int = 160_000
    """Transitions kept from recent rollouts. 0 keeps exactly the current rollout."""

    learning_rate: float = 3e-4
    """Adam's step size."""

    encoder_lr_scale: float = 0.3
    """Step size of the encoder relative to :attr:`learning_rate`."""

    max_grad_norm: float = 20.0
    """Gradient clipping threshold (L2 norm over the whole model)."""

    consistency_coef: float = 200.0
    """Weight of the latent consistency loss."""

    reward_coef: float = 0.3
    """Weight of the reward cross-entropy."""

    value_coef: float = 0.1
    """Weight of the value cross-entropy."""

    continuation_coef: float = 1.0
    """Weight of the continuation cross-entropy."""

    prior_coef: float = 1.0
    """Weight of the KL term that keeps the latent prior at the executed policy."""

    value_target: str = "critic"
    """``critic``: ``V(z)`` follows the GAE critic, which is up to date on old data too; ``returns``: lambda-returns."""

    rho: float = 0.5
    """Step ``k`` of a sub-sequence is weighted ``rho**k``."""

    balance_terminations: bool = False
    """Weight both classes of the continuation loss equally."""

    terminal_reward: bool = False
    """Learn the reward of a fall as a constant of its own (per task) instead of through the reward head."""


@dataclass
class PlannerCfg:
    """Batched MPPI over the latent model."""

    horizon: int = 3
    """Planned steps H."""

    num_samples: int = 64
    """Candidate action sequences per environment, those of the prior included."""

    num_prior_samples: int = 8
    """Candidates that follow the latent prior closed-loop."""

    num_iterations: int = 2
    """MPPI iterations. 0 reproduces the prior bit for bit."""

    num_elites: int = 8
    """Best candidates that update the sampling distribution."""

    temperature: float = 1.0
    """Softmax inverse scale: weight of a candidate is ``exp(z_score * temperature)``."""

    max_noise: float = 3.0
    """Bound on the whitened perturbation ``abs(u)``."""

    min_std: float = 0.05
    """Lower bound of the whitened sampling deviation after an update."""

    share: float = 0.25
    """Share of the environments that are planned, in [0, 1]; which ones rotates with every rollout."""

    max_kl: float = 0.3
    """Trust region: largest ``KL(beta||pi)`` of an executed plan, nats."""

    execution: str = "projected"
    """``projected``: ``a = m + sigma * xi`` on the trust region; ``mppi``: an elite drawn by its weight, plus noise."""

    stages: list = field(default_factory=list)
    """Budget as a schedule: pairs ``[progress, {field: value}]``. From that share of the training iterations on, the
    fields (``share``, ``num_samples``, ``num_prior_samples``, ``num_iterations``, ``num_elites``, ``horizon``) have
    those values, on top of earlier stages."""

    kernels: str = "torch"
    """Sampling and elite update: ``torch``, or ``warp`` kernels (on CUDA one launch each, on a CPU for testing)."""

    epilogues: str = "eager"
    """LayerNorm, Mish, SimNorm and two-hot sums of imagination: ``eager`` torch, ``compiled`` by inductor (on a CPU it
    needs a C++ compiler), or fused ``triton`` kernels (CUDA)."""

    precision: str = "float32"
    """Matrices and activations of imagination: ``float32``, or ``bfloat16`` with float32 sums and normalisations."""

    chunk_rows: int = 0
    """Candidates imagined together. 0: what the device's cache holds."""

    cuda_graph: bool = False
    """Capture the whole plan as one CUDA graph."""

    min_skill: float | None = 0.2
    """The planner is off while the model's one-step skill over "no change" is below this. ``None``: no gate."""

    min_reward_ev: float | None = 0.2
    """The planner is off while the model explains less of the reward's variance than this. ``None``: no gate."""


@dataclass
class BonusCfg:
    """Exploration bonus (4)-(7) from the gap between model-free and model-based values."""

    alpha: float = 0.0
    """Initial weight of the bonus."""

    anneal_fraction: float = 0.5
    """``alpha`` falls linearly to 0 over this share of the training iterations."""

    centering: str = "robust"
    """``mean``: ``eps - mean(eps)`` (paper); ``robust``: per-task ``(eps - median)/MAD``, clipped to 3."""

    floor: float = 0.0
    """The bonus is bounded by ``max(abs(A), floor)``."""


@dataclass
class CriticReplayCfg:
    """More training of the critic, on the last steps of each environment as one trajectory."""

    steps_per_iteration: int = 0
    """Gradient steps before each policy update. 0: the critic learns from the newest rollout alone, as in PPO."""

    horizon: int = 64
    """Newest steps of each environment that it learns from; fewer where the ring holds fewer."""

    lam: float = 0.95
    """Lambda of the returns along these steps."""

    batch_size: int = 1024
    """Observations per gradient step."""

    learning_rate: float = 1e-3
    """Adam's step size."""


@dataclass
class ValueGradientCfg:
    """Look-ahead at update time: the policy also follows the gradient of an imagined value."""

    steps_per_iteration: int = 0
    """Gradient steps of the model of observations after each rollout. 0: there is no such model, and no look-ahead."""

    extra_steps: int = 0
    """More gradient steps in each of the first :attr:`extra_iterations` iterations."""

    extra_iterations: int = 10
    """Iterations that take extra steps."""

    batch_size: int = 512
    """Transitions per gradient step."""

    width: int = 256
    """Units of each of the model's two hidden layers."""

    learning_rate: float = 3e-3
    """Adam's step size of the model."""

    horizon: int = 3
    """Most imagined steps H before the critic's value; the mean over 1 to H is taken."""

    stored_rollouts: int = 0
    """The policy is also planned for at this many times as many observations as a rollout holds, drawn from the newest
    ``critic_replay.horizon`` steps."""

    max_kl: float = 0.06
    """Trust region: largest mean KL between policy and plans at the observations of the rollout, nats."""

    full_slope: float = 0.06
    """The plans go as far as :attr:`max_kl` allows where real advantages rise along them by this much, in deviations of
    the advantage per deviation of the action, and proportionally less far below; 0.06 is what PPO's own update had."""

    num_epochs: int = 4
    """Passes of the policy's regression onto the plans; ``num_mini_batches`` each."""

    policy_learning_rate: float = 1e-3
    """Adam's step size of that regression."""

    policy_schedule: str = "adaptive"
    """``adaptive``: that step size follows the plans' length and how far the policy moved; ``fixed``: it stays."""


@dataclass
class AlgorithmCfg:
    """The M3PO update: PPO core (8)-(9), model, planner and bonus."""

    num_learning_epochs: int = 5
    """Passes over the rollout."""

    num_mini_batches: int = 4
    """Mini-batches per pass."""

    clip_param: float = 0.2
    """PPO's clipping range of the ratio."""

    gamma: float = 0.99
    """Discount per decision step."""

    lam: float = 0.9
    """Lambda of GAE and of V-trace."""

    value_loss_coef: float = 1.0
    """Weight of the critic's loss on the rollout. 0: it learns on the ring alone (:attr:`critic_replay`)."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    learning_rate: float = 1e-3
    """Initial step size of the policy."""

    critic_min_learning_rate: float = 1e-3
    """The critic follows the policy's adaptive rate, as in rsl_rl, but never below this."""

    max_grad_norm: float = 1.0
    """Gradient clipping threshold of policy and critic, each."""

    use_clipped_value_loss: bool = True
    """Clip the critic's update as PPO2 does."""

    normalize_values: bool = False
    """The critic works in units of the task's ``RMS(reward) / (1 - gamma)`` instead of reward units, so that several
    tasks weigh the same; a single task whose rewards are already scaled does not need it."""

    std_learning_rate: float = 0.0
    """Adam's step size of the action deviation. 0: it follows the policy's rate, as in rsl_rl."""

    policy_average_decay: float = 0.0
    """What evaluations, ``play.py`` and exports act with is the exponential moving average of the policy's weights over
    iterations, with this decay; what collects rollouts is the newest policy. 0: the newest policy everywhere."""

    schedule: str = "adaptive"
    """``adaptive``: the policy's rate follows :attr:`desired_kl`; ``fixed``."""

    desired_kl: float = 0.01
    """Target KL per update of the adaptive schedule, nats."""

    ratio: str = "decoupled"
    """``decoupled``: ``min(1, pi_old/beta)`` times the clipped ``pi_new/pi_old``; ``prior``: the paper's."""

    advantage: str = "gae"
    """``gae``, or ``vtrace`` for a planner without a trust region."""

    restore_after: int = 5
    """Gradient steps in a row that were skipped, because they were not finite, after which policy and critic, or the
    world model, go back to their last good state."""

    distill_coef: float = 0.4
    """Weight of the regression of the prior's mean onto the planner's, where the plan is predicted to be better."""

    world_model: WorldModelCfg = field(default_factory=WorldModelCfg)
    """World model."""

    planner: PlannerCfg = field(default_factory=PlannerCfg)
    """Planner."""

    bonus: BonusCfg = field(default_factory=BonusCfg)
    """Exploration bonus."""

    critic_replay: CriticReplayCfg = field(default_factory=CriticReplayCfg)
    """Critic's training on the ring."""

    value_gradient: ValueGradientCfg = field(default_factory=ValueGradientCfg)
    """Policy's improvement by the gradient of an imagined value."""

    def __post_init__(self) -> None:
        """Accept nested dictionaries, as configuration systems deliver them."""
        for name, cls in COMPONENTS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, from_dict(cls, value))


COMPONENTS = {
    "world_model": WorldModelCfg,
    "planner": PlannerCfg,
    "bonus": BonusCfg,
    "critic_replay": CriticReplayCfg,
    "value_gradient": ValueGradientCfg,
}
"""Fields of :class:`AlgorithmCfg` that are configurations of their own."""


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Build a configuration dataclass from a dictionary.

    Raises:
        ValueError: If a key is not a field of the dataclass; the message lists the fields.
    """
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}. It has: {', '.join(names)}.")
    return cls(**values)


STAGE_FIELDS = ("share", "num_samples", "num_prior_samples", "num_iterations", "num_elites", "horizon")
"""Fields of :class:`PlannerCfg` that :attr:`PlannerCfg.stages` may change."""


def planner_at(cfg: PlannerCfg, progress: float) -> PlannerCfg:
    """The planner's configuration after a share ``progress`` in [0, 1] of the training iterations."""
    values: dict[str, Any] = {}
    for begin, changes in cfg.stages:
        if progress >= begin:
            values |= changes
    return dataclasses.replace(cfg, **values)
