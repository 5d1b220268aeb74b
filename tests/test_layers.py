"""Building blocks: SimNorm, layers, task embeddings, per-task statistics."""

import pytest
import torch

from m3po.models.layers import SimNorm, head, trunk
from m3po.models.normalizers import RewardStatistics, TaskNormalizer
from m3po.models.task_policy import TaskHead, embed, new_embedding


def test_simnorm_groups_sum_to_one():
    logits = 3 * torch.randn(3, 64)
    expected = torch.softmax(logits.view(3, 8, 8), -1).flatten(1)
    torch.testing.assert_close(SimNorm(8)(logits), expected)
    extreme = SimNorm(8)(1e6 * torch.randn(3, 64))
    torch.testing.assert_close(extreme.view(3, 8, 8).sum(-1), torch.ones(3, 8))


def test_a_trunk_is_linear_norm_and_silu_of_the_widths():
    layers = trunk(3, [5, 7])
    assert [type(layer).__name__ for layer in layers] == ["Linear", "LayerNorm", "SiLU"] * 2
    assert layers(torch.randn(2, 3)).shape == (2, 7)
    assert trunk(3, [5])(torch.randn(2, 3)).shape == (2, 5)


def test_a_head_that_starts_at_zero_still_learns():
    layer = head(4, 2, zero=True)
    x = torch.randn(3, 4)
    assert not layer(x).any()
    layer(x).sum().backward()
    assert layer.weight.grad.any()
    assert head(4, 2)(x).all()


def test_task_embeddings_have_norm_one():
    table = new_embedding(3, 8)
    assert table.norm(dim=-1).max() < 3.0
    with torch.no_grad():
        table[1] = 10.0
    e = embed(table, torch.tensor([[0, 1], [2, 1]]))
    assert e.shape == (2, 2, 8)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(2, 2))
    torch.testing.assert_close(e[0, 0], table[0] / table[0].norm())
    e[0, 1, 0].backward()
    assert table.grad[0].abs().sum() == 0.0
    assert table.grad[1].any()


def test_what_is_normalised_can_be_inverted():
    normalizer = TaskNormalizer(2, 3, [3, 1])
    task = torch.arange(40) % 2
    rows = torch.randn(40, 3) * (task + 2).unsqueeze(1) + 5
    normalizer.update(rows, task)
    torch.testing.assert_close(normalizer.invert(normalizer(rows, task), task), rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.stds()[1], rows[1::2].std(0, unbiased=False) + 1e-2)


@pytest.mark.parametrize("memory", [0.0, 100.0])
def test_old_rows_are_forgotten(memory):
    """They weigh as much as ``memory`` rows at most, against those that are new."""
    normalizer, statistics = TaskNormalizer(1, 1, eps=0.0, memory=memory), RewardStatistics(1, memory=memory)
    task = torch.zeros(100, dtype=torch.long)
    terminated = torch.arange(100) < 50
    for value in [0.0] * 20 + [8.0]:
        rows = torch.full((100,), value)
        normalizer.update(rows.unsqueeze(1), task)
        statistics.update(rows, terminated, task)
    part = 100 / (100 + memory)
    torch.testing.assert_close(normalizer.mean[0, 0], torch.tensor(8.0 * part))
    torch.testing.assert_close(normalizer.var[0, 0], torch.tensor(64.0 * part * (1 - part)))
    torch.testing.assert_close(statistics.square[0], torch.tensor(64.0 * part))
    torch.testing.assert_close(statistics.terminal[0], torch.tensor(8.0 * part))


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
