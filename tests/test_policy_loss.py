"""The clipped surrogate (8)-(9) and the critic's clipped loss."""

import math

import pytest
import torch

from m3po.algorithms.policy_loss import surrogate_loss, value_loss


def logs(*values):
    return torch.tensor(values).log()


def test_the_paper_ratio_by_hand():
    # r = 1.1, 1.5, 0.5, 1.5 with A = 1, 1, -1, -1: -1.1, -1.2 (clipped), 0.8 (clipped), 1.5. Their mean is 0.
    one = logs(1.0, 1.0, 1.0, 1.0)
    loss, clipped = surrogate_loss(
        logs(1.1, 1.5, 0.5, 1.5), one, logs(9.0, 0.1, 1.0, 2.0), torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, "prior"
    )
    assert loss.item() == pytest.approx((-1.1 - 1.2 + 0.8 + 1.5) / 4, abs=1e-6)
    assert clipped.item() == 0.75


def test_planned_actions_weigh_as_much_as_the_policy_would_have_drawn_them():
    """The factor is ``min(1, pi_old / beta)``, of the policy of the rollout and not of the one being trained."""
    args = torch.tensor([1.0, 1.0, -1.0]), 0.2, "decoupled"
    # pi_old / beta = 0.25, 4 (truncated at 1), 0.5; r = 1.1, 1.5 (clipped at 1.2), 1.5.
    loss, clipped = surrogate_loss(logs(1.1, 3.0, 1.5), logs(1.0, 2.0, 1.0), logs(4.0, 0.5, 2.0), *args)
    assert loss.item() == pytest.approx((-0.25 * 1.1 - 1.2 + 0.5 * 1.5) / 3, abs=1e-6)
    assert clipped.item() == pytest.approx(2 / 3)


def test_no_gradient_flows_through_the_weight():
    log_pi, log_old = torch.zeros(2, requires_grad=True), torch.zeros(2)
    loss, _ = surrogate_loss(log_pi, log_old, logs(2.0, 1.0), torch.tensor([3.0, 3.0]), 0.2, "decoupled")
    loss.backward()
    # d loss / d log_pi = -w A r / 2
    torch.testing.assert_close(log_pi.grad, torch.tensor([-0.75, -1.5]))


def test_the_decoupled_gradient_is_that_of_the_policys_own_objective():
    """In expectation over planned actions, where the weights are not truncated (here the behaviour is wider)."""
    stream = torch.Generator().manual_seed(0)
    action = 2.0 * torch.randn(400_000, generator=stream)  # beta = N(0, 4), pi = N(m, 1) at m = 0.3

    def normal(x, std):
        return -0.5 * (x / std).square() - math.log(std)

    m = torch.tensor(0.3, requires_grad=True)
    old, beta = normal(action - 0.3, 1.0), normal(action, 2.0)
    keep = old <= beta
    advantage = action * keep
    grads = {}
    for ratio in ("decoupled", "prior"):
        loss, _ = surrogate_loss(normal(action - m, 1.0), old, beta, advantage, 0.2, ratio)
        (grads[ratio],) = torch.autograd.grad(-loss, m)
    own = 0.3 + torch.randn(400_000, generator=stream)
    inside = normal(own - 0.3, 1.0) <= normal(own, 2.0)
    expected = (own * inside * (own - 0.3)).mean()
    torch.testing.assert_close(grads["decoupled"], expected, atol=0.02, rtol=0.0)
    assert (grads["prior"] - expected).abs() > 0.3


def test_where_nothing_was_planned_both_ratios_are_ppo():
    log_pi, old, advantage = torch.randn(3, 100).unbind()
    losses = [surrogate_loss(log_pi, old, old, advantage, 0.2, ratio)[0] for ratio in ("decoupled", "prior")]
    assert torch.equal(*losses)


@pytest.mark.parametrize(("value", "old", "expected"), [(-1.0, 0.5, 0.3), (2.0, 0.5, 0.7), (0.6, 0.5, 0.6)])
def test_a_value_counts_as_no_closer_to_its_target_than_the_clipped_one(value, old, expected):
    """It is clipped to 0.2 around the old one, on both sides."""
    target = 0.0 if value > old else 1.0
    for end in (target, value):  # the clipped error is the larger one where the target is the value itself
        found = value_loss(torch.tensor([value]), torch.tensor([old]), torch.tensor([end]), 0.2)
        assert found.item() == pytest.approx(max((value - end) ** 2, (expected - end) ** 2))


def test_value_loss_by_hand():
    # Old 0, clip 0.2, return 1. At 0.5 the clipped 0.2 is further: 0.64. At -1, -0.2 is nearer: 4. At 2, 0.64 < 1.
    zero, values = torch.zeros(3), torch.tensor([0.5, -1.0, 2.0])
    found = value_loss(values, zero, zero + 1.0, 0.2)
    assert found.item() == pytest.approx((0.64 + 4.0 + 1.0) / 3)
