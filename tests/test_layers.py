"""Building blocks: two-hot regression, SimNorm, Mish, sizes, per-task statistics."""

import pytest
import torch
from torch.nn import functional as F

from m3po.config import MODEL_SIZES, WorldModelCfg
from m3po.models import WorldModel
from m3po.models.layers import Mish, SimNorm
from m3po.models.normalizers import RewardStatistics, TaskNormalizer
from m3po.models.task_policy import TaskHead
from m3po.models.two_hot import TwoHot, symexp, symlog


def test_symlog_round_trip():
    x = torch.tensor([-1e4, -3.0, -0.01, 0.0, 0.5, 7.0, 1e4])
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-4, atol=1e-6)


def test_two_hot_round_trip_and_clamp():
    two_hot = TwoHot(101, (-10.0, 10.0))
    x = torch.linspace(-200.0, 200.0, 401)
    target = two_hot.encode(x)
    torch.testing.assert_close(target.sum(-1), torch.ones_like(x))
    assert (target > 0).sum(-1).max() <= 2
    # Interpolation is linear in symlog space, so decoding the expectation there is exact.
    torch.testing.assert_close(symexp(target @ two_hot.bins), x, rtol=1e-3, atol=1e-3)
    assert two_hot.encode(torch.tensor(1e9))[-1] == 1.0
    # The cross-entropy of the target with itself is the smallest one.
    logits = (target + 1e-9).log()
    expected = -(target * torch.log_softmax(logits, -1)).sum(-1)
    torch.testing.assert_close(two_hot.cross_entropy(logits, x), expected, rtol=1e-4, atol=1e-5)
    assert (two_hot.cross_entropy(logits, x) <= two_hot.cross_entropy(torch.roll(logits, 5, -1), x)).all()


def test_two_hot_hand_computed():
    two_hot = TwoHot(5, (-2.0, 2.0))  # bins -2, -1, 0, 1, 2
    target = two_hot.encode(symexp(torch.tensor(0.25)))
    torch.testing.assert_close(target, torch.tensor([0.0, 0.0, 0.75, 0.25, 0.0]))


def test_simnorm_groups_sum_to_one():
    logits, base = 3 * torch.randn(3, 64), torch.rand(3, 64) + 0.1
    expected = torch.softmax(logits.view(3, 8, 8), -1).flatten(1)
    torch.testing.assert_close(SimNorm(8)(logits), expected)
    expected = torch.softmax((logits + base.log()).view(3, 8, 8), -1).flatten(1)
    torch.testing.assert_close(SimNorm(8)(logits, base), expected)
    extreme = SimNorm(8)(1e6 * torch.randn(3, 64))
    torch.testing.assert_close(extreme.view(3, 8, 8).sum(-1), torch.ones(3, 8))


def test_mish_without_gradients_is_mish():
    x = torch.linspace(-60, 60, 2001)
    with torch.no_grad():
        torch.testing.assert_close(Mish()(x), F.mish(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", ["1M", "5M", "19M", "48M"])
def test_sizes_are_what_their_name_says(size):
    with torch.device("meta"):
        model = WorldModel(60, 8, 1, WorldModelCfg(size=size))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(millions / float(size[:-1]) - 1.0) < 0.1
    assert MODEL_SIZES[size][0] % 8 == 0


def test_task_embedding_norm_is_at_most_one():
    model = WorldModel(4, 2, 3, WorldModelCfg(size="tiny", task_embedding_dim=8))
    with torch.no_grad():
        model.task_embedding[1] = 10.0
    e = model.embed(torch.tensor([0, 1, 2]))
    assert e.shape == (3, 8)
    assert e.norm(dim=-1).max() <= 1.0 + 1e-6
    e[1].sum().backward()
    assert model.task_embedding.grad[0].abs().sum() == 0.0


def test_task_normalizer_matches_the_whole_data_and_keeps_tasks_apart():
    normalizer = TaskNormalizer(2, 3, eps=0.0)
    a, b = torch.randn(500, 3) * 5 + 2, torch.randn(300, 3)
    for rows, task in ((a[:200], 0), (b, 1), (a[200:], 0)):
        normalizer.update(rows, torch.full((len(rows),), task))
    torch.testing.assert_close(normalizer.mean[0], a.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.var[0], a.var(0, unbiased=False), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.mean[1], b.mean(0), rtol=1e-4, atol=1e-4)


def test_reward_statistics():
    statistics = RewardStatistics(2)
    reward = torch.tensor([3.0, 4.0, -20.0, 100.0])
    terminated = torch.tensor([False, False, True, False])
    task = torch.tensor([0, 0, 0, 1])
    statistics.update(reward, terminated, task)
    assert statistics.terminal[0] == -20.0
    torch.testing.assert_close(statistics.scale(torch.tensor([0, 1])), torch.tensor([12.5**0.5, 100.0]))
    torch.testing.assert_close(statistics.rate[0], torch.tensor(1 / 3))


def test_observations_of_all_tasks_have_a_common_norm():
    """That of the largest, which is not scaled."""
    small, large = torch.randn(2000, 4) * 3 + 1, torch.randn(2000, 60)
    normalizer = TaskNormalizer(2, 60, [4, 60])
    padded, task = torch.nn.functional.pad(small, (0, 56)), torch.zeros(2000, dtype=torch.long)
    for rows, k in ((padded, 0), (large, 1)):
        normalizer.update(rows, task + k)
        assert abs(normalizer(rows, task + k).square().sum(-1).mean() - 60) < 3
    assert not normalizer(padded, task)[:, 4:].any()
    plain = TaskNormalizer(1, 4)  # a network of one task's own
    plain.update(small, task)
    torch.testing.assert_close(plain(small, task) * 15**0.5, normalizer(padded, task)[:, :4])


def test_task_head_adds_a_function_of_each_tasks_own():
    head, features, task = TaskHead(3, 5, 2), torch.randn(7, 5), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    assert not head(features, task).any()
    with torch.no_grad():
        head.weight.normal_()
        head.bias.normal_()
    expected = torch.stack([head.weight[k] @ x + head.bias[k] for x, k in zip(features, task, strict=True)])
    torch.testing.assert_close(head(features, task), expected)
    head(features, task)[task == 1].sum().backward()
    assert head.weight.grad[1].any()
    assert not head.weight.grad[[0, 2]].any()
