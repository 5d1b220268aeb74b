"""The policy prior as TorchScript and ONNX, for a robot or a program that has neither a simulator nor M3PO.

Of several tasks, each gets a policy of its own: from the task's plain observation to the task's own actions.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from rsl_rl.models import MLPModel
from rsl_rl.modules.normalization import EmpiricalNormalization
from tensordict import TensorDict
from torch import nn

from m3po.errors import M3POError, UserError
from m3po.models.layers import linear_layers
from m3po.models.task_policy import TaskMLPModel, embed
from m3po.runners import M3PORunner

FILES = ("policy.pt", "policy.onnx")
"""TorchScript and ONNX; Isaac Lab's own names."""

TOLERANCE = 1e-4
"""Largest accepted difference of an action between an exported file and torch."""

NUM_SAMPLES = 256
"""Random observations on which they are compared."""


def export_policy(runner: M3PORunner, folder: Path) -> dict[str, float]:
    """Write both files and compare them with the policy in torch on random observations.

    Args:
        runner: Runner with the loaded policy.
        folder: Folder that receives the files, of several tasks in a folder per task; created where missing.

    Returns:
        Largest absolute difference of an action, per file below the folder.

    Raises:
        UserError: If the policy is recurrent or reads images, which the comparison does not cover.
        M3POError: If a file differs from torch by more than :data:`TOLERANCE`.
    """
    policy: Any = runner.inference_policy()  # the prior, a network
    if isinstance(policy, TaskMLPModel):
        env = runner.env
        return {
            f"{name}/{file}": difference
            for task, name in enumerate(env.task_names)
            for file, difference in _export_task(
                policy, task, env.obs_dims[task], env.action_dims[task], folder / name
            ).items()
        }
    return _export_single(policy, runner.env.get_observations(), folder)


def _export_single(policy: MLPModel, example: TensorDict, folder: Path) -> dict[str, float]:
    """Write the policy of a single task; ``example`` holds its observations."""
    graph: Any = policy.as_onnx(verbose=False)  # rsl_rl types it as any module
    if policy.is_recurrent or len(graph.input_names) != 1:
        raise UserError("--export supports policies without memory on vector observations only.")
    sizes = [example[group].shape[-1] for group in policy.obs_groups]
    if isinstance(policy.obs_normalizer, EmpiricalNormalization):
        vector = _random_vectors(policy.obs_normalizer.mean, policy.obs_normalizer.std)
    else:
        zeros = torch.zeros(sum(sizes), device=linear_layers(policy.mlp)[0].weight.device)
        vector = _random_vectors(zeros, zeros + 1.0)
    groups = dict(zip(policy.obs_groups, vector.split(sizes, dim=-1), strict=True))
    return _export(policy.as_jit(), graph, vector, _act(policy, groups), folder)


def _export_task(policy: TaskMLPModel, task: int, obs_dim: int, action_dim: int, folder: Path) -> dict[str, float]:
    """Write the policy of one of several tasks."""
    special = TaskPolicy(policy, task, obs_dim, action_dim)
    normalizer = policy.obs_normalizer
    vector = _random_vectors(normalizer.mean[task, :obs_dim], normalizer.var[task, :obs_dim].sqrt())
    padded = nn.functional.pad(vector, (0, policy.obs_dim - obs_dim))
    ids = torch.full((len(vector), 1), task, device=vector.device)
    (group,) = policy.obs_groups
    expected = _act(policy, {group: padded, "task": ids})[:, :action_dim]
    return _export(special, special, vector, expected, folder)


class TaskPolicy(nn.Module):
    """The policy of one of several tasks, without the others: observations (n, O_k) to mean actions (n, A_k).

    What the others need, the task embedding and padded observations, is the same at every step: the first layer's bias
    holds it. The task's own output layer joins the one that all share.
    """

    def __init__(self, policy: TaskMLPModel, task: int, obs_dim: int, action_dim: int) -> None:
        """Cut the networks of several tasks down to one.

        Args:
            policy: Policy of several tasks.
            task: Index of the task.
            obs_dim: Observation dimensions O_k of the task.
            action_dim: Action dimensions A_k of the task.
        """
        super().__init__()
        normalizer, self.mlp = policy.obs_normalizer, copy.deepcopy(policy.mlp)
        self.mean = nn.Buffer(normalizer.mean[task, :obs_dim].clone())
        self.scale = nn.Buffer((normalizer.var[task, :obs_dim].sqrt() + normalizer.eps) / normalizer.scale[task])
        first, *_, last = linear_layers(self.mlp)
        with torch.no_grad():
            zeros = normalizer(torch.zeros_like(normalizer.mean[task]), torch.tensor(task))
            constant = torch.cat([zeros[obs_dim:], embed(policy.task_embedding, torch.tensor(task))])
            first.bias.add_(first.weight[:, obs_dim:] @ constant)
            first.weight = nn.Parameter(first.weight[:, :obs_dim].clone())
            last.weight = nn.Parameter((last.weight + policy.task_head.weight[task])[:action_dim])
            last.bias = nn.Parameter((last.bias + policy.task_head.bias[task])[:action_dim])
        first.in_features, last.out_features = obs_dim, action_dim

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Mean actions, shape (n, A_k), for observations (n, O_k)."""
        return self.mlp((obs - self.mean) / self.scale)


def _random_vectors(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Observations (n, O) spread as the policy's normaliser has seen them, or standard normal without one.

    A constant observation keeps its value: far from it, the normaliser would amplify rounding errors beyond any sense.
    """
    noise = torch.randn(NUM_SAMPLES, len(mean), generator=torch.Generator().manual_seed(0))
    return mean + std * noise.to(mean.device)


def _act(policy: MLPModel, groups: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean actions (n, A) in torch, on the CPU."""
    with torch.inference_mode():
        return policy(TensorDict(groups, batch_size=[NUM_SAMPLES])).cpu()


def _export(
    script: nn.Module, graph: nn.Module, vector: torch.Tensor, expected: torch.Tensor, folder: Path
) -> dict[str, float]:
    """Write both files and compare them with what they should say.

    Args:
        script: Module for TorchScript.
        graph: Module for ONNX.
        vector: Observations (n, O).
        expected: Their actions (n, A).
        folder: Folder for the files.

    Returns:
        Largest absolute difference of an action, per file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script_file, onnx_file = (folder / name for name in FILES)
    vector = vector.cpu()
    torch.jit.script(script.cpu()).save(script_file)
    _write_onnx(graph.cpu().eval(), vector[:2], onnx_file)
    outputs = {script_file: _run_script(script_file, vector), onnx_file: _run_onnx(onnx_file, vector)}
    differences = {file.name: (actions - expected).abs().max().item() for file, actions in outputs.items()}
    for file, difference in differences.items():
        if not difference <= TOLERANCE:  # also catches NaN
            raise M3POError(f"'{folder / file}' differs from torch by {difference:.2e}, more than {TOLERANCE:.0e}.")
    return differences


def _write_onnx(module: nn.Module, example: torch.Tensor, file: Path) -> None:
    """Write an ONNX file from ``obs`` (n, O) to ``actions`` (n, A), for any n."""
    import onnx

    names: dict[str, Any] = {"input_names": ["obs"], "output_names": ["actions"]}
    names["dynamic_shapes"] = ({0: torch.export.Dim("n")},)
    torch.onnx.export(module, (example,), file, opset_version=18, verbose=False, **names)
    # torch writes the weights to a file of their own: merge them.
    onnx.save(onnx.load(file), file)
    file.with_name(f"{file.name}.data").unlink(missing_ok=True)


def _run_script(file: Path, vector: torch.Tensor) -> torch.Tensor:
    """Actions (n, A) of the TorchScript file for observation vectors (n, O)."""
    with torch.inference_mode():
        return torch.jit.load(str(file))(vector)


def _run_onnx(file: Path, vector: torch.Tensor) -> torch.Tensor:
    """Actions (n, A) of the ONNX file for observation vectors (n, O)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.from_numpy(session.run(None, {name: vector.numpy()})[0])
