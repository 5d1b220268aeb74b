"""Warp kernels against their torch references, on the CPU and on a GPU if there is one; builds for sm_80 and sm_90."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import warp as wp

from m3po.kernels import elites, padding, sampling

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(5, 7, 3, 5), (1, 1, 1, 1), (4, 64, 3, 8), (2, 2, 5, 21), (33, 19, 4, 1)]
"""Environments, samples, horizon, action dimensions."""

if not torch.cuda.is_available():
    DEVICES = DEVICES[:1]


def poisoned(*shape, device):
    return torch.full(shape, float("nan"), device=device)


@wp.kernel(module="m3po_test_philox")
def _known_answers(counter: wp.array(dtype=wp.vec4ui), key: wp.array(dtype=wp.vec2ui), out: wp.array(dtype=wp.vec4ui)):
    i = wp.tid()
    out[i] = sampling.philox(counter[i], key[i][0], key[i][1])


def test_warp_philox_gives_random123s_known_answers():
    ones = 0xFFFFFFFF
    counters = [(0,) * 4, (ones,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    keys = [(0, 0), (ones, ones), (0xA4093822, 0x299F31D0)]
    expected = [
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ]
    out = wp.zeros(3, dtype=wp.vec4ui, device="cpu")
    arrays = [wp.array(counters, dtype=wp.vec4ui, device="cpu"), wp.array(keys, dtype=wp.vec2ui, device="cpu"), out]
    wp.launch(_known_answers, dim=3, inputs=arrays, device="cpu")
    assert [tuple(int(w) for w in row) for row in out.numpy()] == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_sampling_equals_the_reference(device, shape, masked):
    n, samples, horizon, dims = shape
    mean = torch.randn(n, horizon, dims, device=device)
    std = torch.rand(n, horizon, dims, device=device) * 2
    seed = torch.randint(2**62, ()).item()
    counters = torch.tensor([seed, 123_456, 1], device=device)
    ids = torch.randint(100_000, (n,), device=device)
    mask = None
    if masked:
        mask = torch.zeros(n, dims, dtype=torch.bool, device=device)
        mask[:, dims // 2] = True  # every dimension masked but one
    outs = []
    for sample in (sampling.sample_candidates, sampling.sample_candidates_torch):
        out = poisoned(n, samples + 1, horizon, dims, device=device)
        sample(out[:, 1:], mean, std, counters, ids, mask, 2.5)
        assert out[:, 0].isnan().all()  # the neighbour was left alone
        outs.append(out[:, 1:])
    torch.testing.assert_close(outs[0], outs[1], atol=2e-6, rtol=2e-6)
    assert outs[0].abs().max() <= 2.5
    if masked:
        assert (outs[0] * ~mask[:, None, None] == 0).all()


def test_noise_of_an_environment_is_the_same_in_every_batch_and_shard():
    ids, counters = torch.arange(40), torch.tensor([2**40 + 3, 77, 0])
    mean, std = torch.zeros(40, 3, 4), torch.ones(40, 3, 4)

    def draw(rows):
        out = torch.empty(len(rows), 8, 3, 4)
        sampling.sample_candidates(out, mean[rows], std[rows], counters, ids[rows], None, 3.0)
        return out

    whole = draw(ids)
    assert torch.equal(draw(ids[17:18])[0], whole[17])
    assert torch.equal(torch.cat([draw(ids[20:]), draw(ids[:20])]), torch.cat([whole[20:], whole[:20]]))
    assert torch.equal(draw(ids.flip(0)), whole.flip(0))


def test_warp_noise_is_standard_normal():
    out = torch.empty(256, 64, 3, 5)
    zero, one = torch.zeros(256, 3, 5), torch.ones(256, 3, 5)
    sampling.sample_candidates(out, zero, one, torch.tensor([5, 9, 0]), torch.arange(256), None, 100.0)
    noise = out[:, ::2].flatten()  # the other half is antithetic
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1.0) < 4 * (2 / noise.numel()) ** 0.5
    assert abs((noise**4).mean() - 3.0) < 4 * (96 / noise.numel()) ** 0.5
    # Kolmogorov-Smirnov against the normal distribution, at the 0.1 % level.
    cdf = torch.distributions.Normal(0.0, 1.0).cdf(noise.sort().values)
    empirical = torch.arange(1, noise.numel() + 1) / noise.numel()
    assert (cdf - empirical).abs().max() < 1.95 / noise.numel() ** 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_elites", [1, 4, None])
def test_update_equals_the_reference(device, shape, num_elites):
    n, samples, horizon, dims = shape
    num_elites = samples if num_elites is None else min(num_elites, samples)
    candidates = torch.randn(n, samples + 1, horizon, dims, device=device)[:, 1:]
    returns = torch.randn(n, samples + 1, device=device)[:, 1:] * 100 - 5000
    returns[0] = 3.0  # all equal: no std, and the first ones are elites
    results = []
    for update in (elites.update_distribution, elites.update_distribution_torch):
        mean, std = (poisoned(n, horizon, dims, device=device) for _ in range(2))
        weights, spread = poisoned(n, samples, device=device), poisoned(n, device=device)
        update(mean, std, weights, spread, candidates, returns, num_elites, 0.7, 0.05)
        results.append((mean, std, weights, spread))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-3)
    weights = results[0][2]
    assert ((weights > 0).sum(1) == num_elites).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(n, device=device))


def test_update_of_a_hand_computed_case():
    # Returns 0, 2, 4: mean 2, std sqrt(8/3), z-scores -1.2247, 0, 1.2247. Elites: the last two.
    # Weights: softmax(0, 1.2247) = 0.22711, 0.77289.  u = 1, 5: mean 4.09156, std 4 sqrt(.22711 * .77289).
    candidates = torch.tensor([[7.0, 1.0, 5.0]]).view(1, 3, 1, 1)
    mean, std, weights, spread = torch.empty(1, 1, 1), torch.empty(1, 1, 1), torch.empty(1, 3), torch.empty(1)
    returns = torch.tensor([[0.0, 2.0, 4.0]])
    elites.update_distribution(mean, std, weights, spread, candidates, returns, 2, 1.0, 0.05)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.22711, 0.77289]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean.item(), 4.09156, atol=1e-4, rtol=0)
    assert std.item() == 1.0  # clamped from 1.6759
    torch.testing.assert_close(spread.item(), (8 / 3) ** 0.5, atol=1e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_kl", [0.01, 0.3, float("inf")])
def test_projection_equals_the_reference(device, max_kl):
    mu, offset = torch.randn(50, 6, device=device), torch.randn(50, 6, device=device) * 2
    sigma = torch.rand(50, 6, device=device) + 0.1
    sigma[:, 4:] = 0.0  # masked
    offset[0] = 0.0
    got, expected = poisoned(50, 6, device=device), poisoned(50, 6, device=device)
    elites.project(got, mu, sigma, offset, max_kl)
    elites.project_torch(expected, mu, sigma, offset, max_kl)
    torch.testing.assert_close(got, expected)
    assert torch.equal(got[:, 4:], mu[:, 4:])
    assert torch.equal(got[0], mu[0])
    kl = 0.5 * ((got - mu) / sigma)[:, :4].square().sum(-1)
    assert (kl <= max_kl * (1 + 1e-5)).all()


def pad_observations_torch(
    out: torch.Tensor,
    obs_mask: torch.Tensor,
    action_mask: torch.Tensor,
    flat_obs: torch.Tensor,
    offsets: torch.Tensor,
    task: torch.Tensor,
    obs_dims: torch.Tensor,
    action_dims: torch.Tensor,
    embedding: torch.Tensor,
) -> None:
    """Reference of :func:`pad_observations`."""
    columns = torch.arange(obs_mask.shape[1], device=out.device)
    obs_mask.copy_(columns < obs_dims[task].unsqueeze(1))
    action_mask.copy_(torch.arange(action_mask.shape[1], device=out.device) < action_dims[task].unsqueeze(1))
    index = (offsets.unsqueeze(1) + columns).clamp(max=max(0, flat_obs.shape[0] - 1))
    out[:, : obs_mask.shape[1]] = torch.where(obs_mask, flat_obs[index], 0.0)
    out[:, obs_mask.shape[1] :] = embedding[task]


@pytest.mark.parametrize("device", DEVICES)
def test_padding_equals_the_reference_and_the_definition(device):
    obs_dims, action_dims = torch.tensor([4, 7, 1], device=device), torch.tensor([2, 1, 9], device=device)
    embedding = torch.randn(3, 2, device=device)
    task = torch.tensor([2, 0, 1, 1, 0], device=device)
    observations = [torch.randn(int(obs_dims[k]), device=device) for k in task]
    flat = torch.cat(observations)
    offsets = obs_dims[task].cumsum(0) - obs_dims[task]
    results = []
    for pad in (padding.pad_observations, pad_observations_torch):
        out = poisoned(5, 9, device=device)
        obs_mask = torch.ones(5, 7, dtype=torch.bool, device=device)
        action_mask = torch.ones(5, 9, dtype=torch.bool, device=device)
        pad(out, obs_mask, action_mask, flat, offsets, task, obs_dims, action_dims, embedding)
        results.append((out, obs_mask, action_mask))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    for i, obs in enumerate(observations):
        k = int(task[i])
        rest = torch.zeros(7 - len(obs), device=device)
        assert torch.equal(results[0][0][i], torch.cat([obs, rest, embedding[k]]))
        assert int(results[0][1][i].sum()) == len(obs)
        assert results[0][2][i].tolist() == [d < int(action_dims[k]) for d in range(9)]


def test_operators_are_traced_whole():
    """``torch.compile(fullgraph=True)`` accepts the kernels, and functionalises their outputs rightly."""
    mean, std, ids = torch.randn(3, 2, 4), torch.rand(3, 2, 4), torch.arange(3)
    counters = torch.tensor([1, 2, 0])

    def iteration(out):
        sampling.sample_candidates(out, mean, std, counters, ids, None, 3.0)
        weights, spread, new_mean = torch.empty(3, 6), torch.empty(3), torch.empty(3, 2, 4)
        new_std, projected = torch.empty(3, 2, 4), torch.empty(3, 4)
        elites.update_distribution(new_mean, new_std, weights, spread, out, out.sum((2, 3)), 3, 1.0, 0.05)
        elites.project(projected, torch.zeros(3, 4), torch.ones(3, 4), new_mean[:, 0], 0.1)
        return projected * 2.0

    expected = iteration(torch.empty(3, 6, 2, 4))
    got = torch.compile(iteration, fullgraph=True, backend="aot_eager")(torch.empty(3, 6, 2, 4))
    assert torch.equal(got, expected)
    torch.library.opcheck(sampling.sample_candidates, (torch.zeros(3, 6, 2, 4), mean, std, counters, ids, None, 3.0))


KERNELS = [
    sampling.sampling_kernel,
    elites.weight_kernel,
    elites.moment_kernel,
    elites.normalize_kernel,
    elites.projection_kernel,
    padding.padding_kernel,
]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("module", [sampling.sampling_kernel, elites.weight_kernel, padding.padding_kernel])
def test_kernels_build_for_cuda_without_spills(tmp_path, arch, module):
    """Compiled to machine code for A100 and H100/H200; this needs no device."""
    wp.compile_aot_module(module.module, arch=arch, module_dir=tmp_path, use_ptx=True)
    (ptx,) = tmp_path.glob("*.ptx")
    ptx.write_bytes(ptx.read_bytes().rstrip(b"\0"))  # ptxas wants text
    ptxas = Path(torch.__file__).parent / "bin/ptxas"  # as new as the PTX, unlike the one in Triton
    command = [ptxas, f"-arch=sm_{arch}", "-v", ptx, "-o", tmp_path / "out.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    entries = re.findall(r"Compiling entry function '(\w+)'", report)
    for kernel in KERNELS:
        if kernel.module is module.module:
            assert any(kernel.key.split(".")[-1] in entry for entry in entries), (kernel.key, entries)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == len(entries) > 0
    assert all(set(numbers) == {"0"} for numbers in spills), report
    assert all(int(registers) <= 128 for registers in re.findall(r"Used (\d+) registers", report))
