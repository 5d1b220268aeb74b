"""The exploration bonus (4)-(7)."""

import torch

from m3po.algorithms.bonus import add_bonus, annealed_alpha, centre, value_gap
from m3po.config import BonusCfg


class HandModel:
    """A world model of one dimension whose every number is known: h(s) = s, d = z + a, R = 2 z, V = 10 z."""

    class cfg:
        terminal_reward = False

    class rewards:
        @staticmethod
        def scale(task):
            return torch.ones(task.shape)

    class two_hot:
        @staticmethod
        def decode(x):
            return x

    def embed(self, task):
        return None

    def encode(self, obs, task):
        return obs.squeeze(-1)

    def value(self, z, e):
        return 10.0 * z

    def predict(self, z, action, e):
        return z + action.squeeze(-1), 2.0 * z, None


def gap(terminated):
    one = torch.tensor([[1.0]])
    return value_gap(
        HandModel(), one, 0.5 * one, torch.tensor([3.0]), 2.0 * one, torch.tensor([terminated]), torch.tensor([0]), 0.9
    )


def test_gap_by_hand():
    # Q_mf = 3 + 0.9 * 10 * 2 = 21;  Q_mb = 2 * 1 + 0.9 * 10 * 1.5 = 15.5;  eps = 5.5
    torch.testing.assert_close(gap(False), torch.tensor([5.5]))


def test_the_mask_stands_on_both_sides():
    # A fall: Q_mf = 3, Q_mb = 2. With the mask on one side only, the gap would be 12.5 or 17.
    torch.testing.assert_close(gap(True), torch.tensor([1.0]))


def test_bonus_by_hand():
    # eps = (1, 3, 8): mean 4, centred (-3, -1, 4), alpha 0.5: (-1.5, -0.5, 2), bounded by |A| = (2, 0.2, 1)
    eps, advantage = torch.tensor([1.0, 3.0, 8.0]), torch.tensor([-2.0, 0.2, 1.0])
    centred = centre(eps, torch.zeros(3, dtype=torch.long), 1, "mean")
    torch.testing.assert_close(centred, torch.tensor([-3.0, -1.0, 4.0]))
    torch.testing.assert_close(add_bonus(advantage, centred, 0.5, 0.0), torch.tensor([-3.5, 0.0, 2.0]))


def test_bonus_never_flips_a_sign_and_never_more_than_doubles():
    torch.manual_seed(0)
    advantage = torch.randn(10_000)
    for mode in ("mean", "robust"):
        centred = centre(torch.rand(10_000).exp() * 5, torch.zeros(10_000, dtype=torch.long), 1, mode)
        result = add_bonus(advantage, centred, 3.0, 0.0)
        assert (result * advantage >= 0).all()
        assert (result.abs() <= 2 * advantage.abs() + 1e-6).all()
        assert not torch.equal(result, advantage)


def test_floor_lets_the_bonus_act_where_the_advantage_is_zero():
    centred = torch.tensor([1.0, -1.0])
    assert add_bonus(torch.zeros(2), centred, 1.0, 0.0).tolist() == [0.0, 0.0]
    torch.testing.assert_close(add_bonus(torch.zeros(2), centred, 1.0, 0.3), torch.tensor([0.3, -0.3]))


def test_robust_centring_is_per_task_and_clipped():
    eps = torch.cat([torch.arange(101.0), 1000.0 * torch.arange(101.0)])
    task = torch.arange(2).repeat_interleave(101)
    centred = centre(eps, task, 2, "robust")
    torch.testing.assert_close(centred[:101], centred[101:])  # scale of a task does not matter
    assert centred[50] == 0.0
    assert centred.abs().max() <= 3.0


def test_alpha_anneals_linearly():
    cfg = BonusCfg(alpha=0.4, anneal_fraction=0.5)
    assert [round(annealed_alpha(cfg, p), 6) for p in (0.0, 0.25, 0.5, 0.9)] == [0.4, 0.2, 0.0, 0.0]
