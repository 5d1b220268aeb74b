"""Every tunable number of M3PO, one dataclass per component. The defaults are the default mode, sized for a CPU.

Each field is one override: ``agent.algorithm.planner.horizon=5``. :mod:`m3po.presets` lists what paper mode changes,
and which sizes a GPU changes. Isaac Lab's configclasses are thin mirrors of the dataclasses below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MAX_NAN_FRACTION = 0.5
"""Default of ``agent.max_nan_fraction``: a run stops, with a checkpoint, when more than this fraction of its
environments gave values that are not finite within one rollout. In [0, 1]; 1 never stops it."""


def check_max_nan_fraction(fraction: float) -> None:
    """Raise ``ValueError`` unless ``max_nan_fraction`` is a fraction."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"max_nan_fraction must lie in [0, 1], got {fraction}.")


@dataclass
class WorldModelCfg:
    """The implicit world model and its training on the replay buffer."""

    anchor: bool = True
    """Whether the observation is part of the latent; without it, the latent is purely learnt, and has heads of its own
    for value and policy."""

    features: int = 0
    """Learnt dimensions of the latent beside the observation; a multiple of 8. 0: the observation is the latent."""

    width: int = 256
    """Units of each hidden layer, at most: they are as many as in the policy's widest one, and 64 at least. The
    anchored form's encoder has a quarter of them."""

    task_embedding_dim: int = 16
    """Dimensions of the learnable task embedding (norm 1)."""

    horizon: int = 1
    """Transitions per training sub-sequence, steps; step ``k`` weighs ``0.5**k``."""

    steps_per_iteration: int = 60
    """Gradient steps after each rollout. 0: nothing is learnt about the environment, planned or explored."""

    extra_steps: int = 200
    """More gradient steps in each of the first ten iterations."""

    batch_size: int = 512
    """Sub-sequences per gradient step."""

    learning_rate: float = 3e-3
    """Adam's step size."""

    replay_transitions: int = 160_000
    """Transitions that the replay buffer holds. 0 keeps exactly the current rollout."""


@dataclass
class PlannerCfg:
    """Maximisation of the imagined return (2) by its gradient and by MPPI, while learning and while acting."""

    horizon: int = 3
    """Imagined steps H."""

    average_horizons: bool = True
    """Whether the imagined return is the mean over 1 to H steps; otherwise that of H steps, as in the paper."""

    max_learning_kl: float = 0.06
    """Trust region of plans that are learnt from: their mean KL to the policy, nats. 0: none are made."""

    full_gain: float = 0.015
    """Plans go as far as their trust region allows where real advantages rise along them by this much, in stds of the
    advantage per std of the action. Below that they are proportionally shorter."""

    num_states: int = 4096
    """Observations that are planned at while learning: the rollout's, and up to three times as many stored ones."""

    planned_fraction: float = 0.25
    """Largest fraction of the environments that act by a plan, in [0, 1]; which ones rotates with every rollout."""

    max_acting_kl: float = 0.3
    """Trust region of plans that are acted on: ``KL(beta||pi)``, nats."""

    num_samples: int = 8
    """Candidate action sequences of MPPI per environment, the policy's own and the gradient's included."""

    num_policy_samples: int = 2
    """Candidates that are trajectories of the policy with its noise."""

    num_iterations: int = 1
    """MPPI iterations. 0: the plan is the gradient's."""

    num_elites: int = 4
    """Best candidates that update the sampling distribution."""

    temperature: float = 1.0
    """Inverse scale of MPPI's softmax: the weight of a candidate is ``exp(z_score * temperature)``."""

    execution: str = "projected"
    """``projected``: ``a = m + sigma * xi`` on the trust region; ``mppi``: an elite drawn by its weight, plus noise."""

    kernels: str = "torch"
    """Sampling and elite update: ``torch``, or ``warp`` kernels (on CUDA one launch each, on a CPU for testing)."""

    precision: str = "float32"
    """Matrix products of MPPI's imagination: ``float32`` or ``bfloat16``."""

    cuda_graph: bool = False
    """Capture a whole MPPI plan as one CUDA graph."""


@dataclass
class BonusCfg:
    """Exploration bonus (4)-(7) from the gap between what was predicted and what happened."""

    size: float = 0.15
    """Mean size of the bonus, in mean sizes of the advantage, of a task that no episode has been rewarded in. It falls
    to 0 while a fifth of the episodes comes to be. 0: no bonus."""

    num_functions: int = 8
    """Random linear functions of the latent that the gap is measured in, beside the value. 0: the value alone (6)."""

    literal: bool = False
    """The paper's form: mean centring, bounded by the size of the advantage, ``alpha`` falling from 1 to 0."""


@dataclass
class CriticReplayCfg:
    """Training of the critic on the last steps of each environment as one trajectory."""

    steps_per_iteration: int = 64
    """Gradient steps before each policy update. 0: the critic learns from the newest rollout alone, as in PPO."""

    horizon: int = 64
    """Newest steps of each environment that it learns from; fewer where the replay buffer holds fewer."""

    batch_size: int = 1024
    """Observations per gradient step."""

    learning_rate: float = 1e-3
    """Adam's step size."""


@dataclass
class AlgorithmCfg:
    """The M3PO update: PPO core (8)-(9), critic, world model, planner and bonus."""

    replay_ratio: float = 1.0
    """Factor of the gradient steps of world model and critic, and of the stored observations that are planned at."""

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

    value_loss_coef: float = 0.0
    """Weight of the critic's loss on the rollout. 0: it learns on the replay buffer alone (:attr:`critic_replay`)."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    learning_rate: float = 1e-3
    """Initial step size of the policy; the critic's follows it on the rollout, but never below this."""

    max_grad_norm: float = 1.0
    """Gradient clipping threshold of policy, critic and world model, each."""

    std_learning_rate: float = 4e-3
    """Adam's step size of the logarithm of the action std. 0: it follows the policy's, as in rsl_rl."""

    policy_average_decay: float = 0.8
    """Evaluations, ``play.py`` and exports act with the exponential moving average of the policy's weights over
    iterations, with this decay. 0: with the newest policy, which collects rollouts."""

    schedule: str = "measured"
    """``measured``: the policy's step size follows :attr:`desired_kl`, whose used part follows what updates were worth
    on the rollout after them; ``adaptive``: it follows :attr:`desired_kl` alone, as in rsl_rl; ``fixed``."""

    desired_kl: float = 0.06
    """KL budget of an update, nats: the plans' share of it first, PPO gets the rest."""

    ratio: str = "decoupled"
    """``decoupled``: ``min(1, pi_old/beta)`` times the clipped ``pi_new/pi_old``; ``prior``: the paper's."""

    advantage: str = "gae"
    """``gae``, or ``vtrace`` for a planner without a trust region."""

    world_model: WorldModelCfg = field(default_factory=WorldModelCfg)
    """World model."""

    planner: PlannerCfg = field(default_factory=PlannerCfg)
    """Planner."""

    bonus: BonusCfg = field(default_factory=BonusCfg)
    """Exploration bonus."""

    critic_replay: CriticReplayCfg = field(default_factory=CriticReplayCfg)
    """Critic's training on the replay buffer."""

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
}
"""Fields of :class:`AlgorithmCfg` that are configurations of their own."""

REMOVED = {
    "AlgorithmCfg": {
        "value_gradient": "planner and world_model (planner.max_learning_kl=0 switches the value gradient off)",
        "distill_coef": "the regression onto plans (planner.max_learning_kl)",
        "normalize_values": "nothing: values are always in units of the task",
        "critic_min_learning_rate": "learning_rate",
        "restore_after": "nothing: it is 5",
        "use_clipped_value_loss": "nothing: the value loss is clipped",
    },
    "WorldModelCfg": {
        "size": "features and width",
        "simnorm_dim": "nothing: it is 8",
        "dynamics": "anchor",
        "ring_transitions": "replay_transitions",
        "extra_iterations": "nothing: it is 10",
        **dict.fromkeys(("num_bins", "bin_range"), "nothing: rewards and values are standardised regressions"),
        **dict.fromkeys(
            ("consistency_coef", "reward_coef", "value_coef", "continuation_coef", "prior_coef", "rho"),
            "nothing: losses are in units of what a step changes",
        ),
        **dict.fromkeys(("encoder_lr_scale", "max_grad_norm"), "learning_rate and agent.algorithm.max_grad_norm"),
        "value_target": "nothing: V(z) follows the critic",
        **dict.fromkeys(
            ("balance_terminations", "terminal_reward"), "nothing: terminations have a reward of their own"
        ),
    },
    "PlannerCfg": {
        "share": "planned_fraction",
        "num_prior_samples": "num_policy_samples",
        "max_kl": "max_acting_kl (plans that are acted on) and max_learning_kl (plans that are learnt from)",
        **dict.fromkeys(("max_noise", "min_std", "chunk_rows"), "nothing: it is a constant"),
        **dict.fromkeys(("stages", "min_skill", "min_reward_ev"), "nothing: the fraction follows the realised gain"),
        "epilogues": "nothing",
        "learning_rate": "nothing: the step size follows what the policy can follow",
    },
    "BonusCfg": {
        "alpha": "size",
        "anneal_fraction": "nothing: the weight follows the share of rewarded episodes",
        "centering": "literal",
        "floor": "nothing: it is a constant",
    },
    "CriticReplayCfg": {"lam": "nothing: it is 0.95"},
}
"""Fields of earlier versions, and what replaces them."""

REMOVED_FROM_RUNNER = {"quarantine_share": "max_nan_fraction"}
"""The same of a runner's configuration."""


def replacement(cls_name: str, field_name: str) -> str:
    """What replaced a field of an earlier version, as the end of a message; empty for a name that never was one.

    Args:
        cls_name: Name of the configuration class.
        field_name: The unknown field.
    """
    sections = REMOVED | {"RunnerCfg": REMOVED_FROM_RUNNER}
    found = sections.get(cls_name.removeprefix("M3PO"), {}).get(field_name)
    return "" if found is None else f" '{field_name}' was removed; it is replaced by {found}."


def check_runner_fields(cfg: Iterable[str]) -> None:
    """Raise ``ValueError`` if a runner configuration has a field of an earlier version."""
    if hints := "".join(replacement("RunnerCfg", name) for name in cfg):
        raise ValueError(f"the runner configuration has fields of an earlier version.{hints}")


def from_dict(cls: Any, values: dict[str, Any]) -> Any:
    """Build a configuration dataclass from a dictionary.

    Raises:
        ValueError: If a key is not a field of the dataclass; the message lists the fields.
    """
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        hints = "".join(replacement(cls.__name__, name) for name in unknown)
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}. It has: {', '.join(names)}.{hints}")
    return cls(**values)
