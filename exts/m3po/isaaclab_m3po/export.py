"""The policy prior as TorchScript and ONNX, for a robot or a program that has neither Isaac Lab nor M3PO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

from m3po.errors import M3POError, UserError

FILES = ("policy.pt", "policy.onnx")
"""TorchScript and ONNX; Isaac Lab's own names."""

TOLERANCE = 1e-4
"""Largest accepted difference of an action between an exported file and torch."""

NUM_SAMPLES = 256
"""Random observations on which they are compared."""


def export_policy(runner: OnPolicyRunner, folder: Path) -> dict[str, float]:
    """Write both files and compare them with the policy in torch on random observations.

    Args:
        runner: Runner with the loaded policy.
        folder: Folder that receives the files; created where missing.

    Returns:
        Largest absolute difference of an action, per file.

    Raises:
        UserError: If the policy is recurrent or reads images, which the comparison does not cover.
        M3POError: If a file differs from torch by more than :data:`TOLERANCE`.
    """
    policy = runner.alg.get_policy()
    if policy.is_recurrent or len(policy.as_onnx(verbose=False).input_names) != 1:
        raise UserError("--export supports policies without memory on vector observations only.")
    script_file, onnx_file = (folder / name for name in FILES)
    runner.export_policy_to_jit(str(folder), script_file.name)
    runner.export_policy_to_onnx(str(folder), onnx_file.name)
    _embed_weights(onnx_file)

    obs = _random_observations(runner)
    with torch.inference_mode():
        expected = policy(obs).cpu()
    vector = torch.cat([obs[group] for group in policy.obs_groups], dim=-1).cpu()
    outputs = {script_file: _run_script(script_file, vector), onnx_file: _run_onnx(onnx_file, vector)}
    differences = {file.name: (actions - expected).abs().max().item() for file, actions in outputs.items()}
    for file, difference in differences.items():
        if not difference <= TOLERANCE:  # also catches NaN
            raise M3POError(f"'{folder / file}' differs from torch by {difference:.2e}, more than {TOLERANCE:.0e}.")
    return differences


def _random_observations(runner: OnPolicyRunner) -> TensorDict:
    """Observations (n,) spread as the policy's normaliser has seen them, or standard normal without one.

    A constant observation keeps its value: far from it, the normaliser would amplify rounding errors beyond any sense.
    """
    policy = runner.alg.get_policy()
    example = runner.env.get_observations()
    sizes = [example[group].shape[-1] for group in policy.obs_groups]
    vector = torch.randn(NUM_SAMPLES, sum(sizes), generator=torch.Generator().manual_seed(0)).to(runner.device)
    if policy.obs_normalization:
        vector = policy.obs_normalizer.mean + policy.obs_normalizer.std * vector
    groups = dict(zip(policy.obs_groups, vector.split(sizes, dim=-1), strict=True))
    return TensorDict(groups, batch_size=[NUM_SAMPLES])


def _embed_weights(file: Path) -> None:
    """Merge the weights, which torch writes to a file of their own, into the ONNX file."""
    import onnx

    onnx.save(onnx.load(file), file)
    file.with_name(f"{file.name}.data").unlink(missing_ok=True)


def _run_script(file: Path, vector: torch.Tensor) -> torch.Tensor:
    """Actions (n, A) of the TorchScript file for observation vectors (n, O)."""
    with torch.inference_mode():
        return torch.jit.load(str(file))(vector)


def _run_onnx(file: Path, vector: torch.Tensor) -> torch.Tensor:
    """Actions (n, A) of the ONNX file for observation vectors (n, O); it takes one observation at a time."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.from_numpy(np.concatenate([session.run(None, {name: row[None].numpy()})[0] for row in vector]))
