"""``scripts/replay_nonfinite.py``: what the NaN guard recorded, and the same actions once more in the environment."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rsl_rl.env import VecEnv

from m3po.cli.arguments import Parser, guarded
from m3po.envs.interface import as_m3po_env
from m3po.envs.suite import as_context, find_task, is_known_without_isaac_lab, suites
from m3po.errors import UserError
from m3po.runners.flight_recorder import FORMAT, is_sound


def run(argv: Sequence[str]) -> int:
    """Print and replay a recording as the command line says.

    Args:
        argv: Arguments without the program's name.

    Returns:
        Exit code: 0, 2 for a user's mistake.
    """
    return guarded(_main, argv)


def _main(argv: list[str]) -> int:
    parser = Parser(description="Show what was not finite and when; with --replay, act it out again.")
    parser.add_argument("path", type=Path, help="A file nonfinite_<step>.pt in a run folder.")
    parser.add_argument("--replay", action="store_true", help="Repeat the recorded actions in the environment.")
    args = parser.parse_args(argv)
    recording = read_recording(args.path)
    for line in describe(recording):
        print(line)
    if args.replay:
        _replay(recording, _overrides(args.path))
    return 0


def read_recording(path: Path) -> dict[str, Any]:
    """The content of a recording; see :meth:`m3po.runners.flight_recorder.FlightRecorder.write`.

    Raises:
        UserError: If the file is missing or is no recording.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"there is no recording '{path}'.") from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(f"'{path}' is truncated or corrupted.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "findings" not in content:
        raise UserError(f"'{path}' is not a recording of this version.")
    return content


def describe(recording: dict[str, Any]) -> list[str]:
    """Lines that say what was found, and of each environment which values ceased to be finite at which step."""
    steps, environments = recording["steps"], recording["environments"]
    first = recording["step"] - len(steps["actions"]) + 1
    lines = [
        f"task: {recording['task']}, seed: {recording['seed']}, step: {recording['step']}, "
        f"environments: {recording['num_envs']}",
        f"not finite: {', '.join(recording['findings'])}",
    ]
    for column, environment in enumerate(environments):
        task = f" ({recording['tasks'][column]})" if recording["tasks"] else ""
        lines.append(f"environment {environment}{task}:")
        for index in range(len(steps["actions"])):
            found = [text for name in steps if (text := _non_finite(recording, name, index, column))]
            if found:
                lines.append(f"  step {first + index}: {'; '.join(found)}")
        largest = _largest(steps, column)
        lines.append("  largest finite values: " + ", ".join(f"{name} {value:.3g}" for name, value in largest.items()))
    return lines


def _non_finite(recording: dict[str, Any], name: str, index: int, column: int) -> str:
    """What is not finite in a tensor at a step, in words; nothing where all is, or where it is stale."""
    steps = recording["steps"]
    value = steps[name][index, column]
    if not value.is_floating_point() or is_sound(value).all():
        return ""
    if name.startswith("final_observations/") and not steps["dones"][index, column]:
        return ""
    bad = (~is_sound(value.flatten())).nonzero().squeeze(1).tolist()
    terms = recording["terms"].get(name.partition("/")[2], []) if "observations" in name else []
    named = [term for term, start, stop in terms if any(start <= i < stop for i in bad)]
    what = ", ".join(named) if named else f"{len(bad)} of {value.numel()}"
    return f"{name} ({what})"


def _largest(steps: dict[str, torch.Tensor], column: int) -> dict[str, float]:
    """Largest finite absolute value of each tensor of an environment."""
    result = {}
    for name, tensor in steps.items():
        values = tensor[:, column]
        if values.is_floating_point() and (finite := values[is_sound(values)]).numel():
            result[name] = finite.abs().max().item()
    return result


# -- replay -----------------------------------------------------------------------------------------------------------


def _overrides(path: Path) -> list[str]:
    """Overrides of the environment that the run was started with, from the manifest in its folder."""
    manifest = path.parent / "run.json"
    if not manifest.is_file():
        return []
    tokens = json.loads(manifest.read_text(encoding="utf-8")).get("overrides", [])
    return [token for token in tokens if not token.startswith("agent.")]


def _replay(recording: dict[str, Any], overrides: list[str]) -> None:
    """Repeat the recorded actions up to the finding, in the environments of the recording's first task."""
    tasks = recording["tasks"] or [recording["task"]] * len(recording["environments"])
    if None in tasks:
        raise UserError("the recording does not name its task; it cannot be replayed.")
    task = tasks[0]
    columns = [column for column, name in enumerate(tasks) if name == task]
    if len(columns) < len(tasks):
        print(f"replaying the environments of {task} only")
    # Isaac Lab must not be imported, not even to look the task up, before make() has chosen its assets.
    suite, name = find_task(task) if is_known_without_isaac_lab(task) else (suites()["isaaclab"], task)
    options = {"overrides": overrides} if suite.name == "isaaclab" else {}
    made = suite.make(name, len(columns), seed=recording["seed"] or 0, device="cpu", **options)
    with as_context(made) as env:
        for line in replay(env, {name: value[:, columns] for name, value in recording["steps"].items()}):
            print(line)


def replay(env: VecEnv, steps: dict[str, torch.Tensor]) -> list[str]:
    """Act out recorded steps in as many environments as were recorded, up to the last that had a finding.

    They begin behind the last reset of any of them, because where that led is left to chance.

    Args:
        env: The environments, n of them; with ``set_state`` they start in the recorded state.
        steps: Recorded tensors, (K, n, ...).

    Returns:
        Lines that say what was not finite at which of the steps.
    """
    env, last = as_m3po_env(env), int(steps["fresh"].any(1).nonzero().max())
    resets = (steps["dones"] | steps["fresh"])[:last].any(1).nonzero()
    first = int(resets.max()) + 1 if len(resets) else 0
    steps = {name: value[first : last + 1] for name, value in steps.items()}
    with torch.inference_mode():
        env.reset()
        state = {name.removeprefix("state/"): value[0] for name, value in steps.items() if name.startswith("state/")}
        restored = bool(state) and env.set_state(state) is not None
        lines = [f"replaying {len(steps['actions'])} steps from {'the recorded state' if restored else 'a reset'}"]
        actions = steps["actions"][..., : env.num_actions]
        for index, action in enumerate(actions):
            obs, rewards, _, _ = env.step(torch.where(is_sound(action), action, 0.0).to(env.device))
            values: dict[str, Any] = {f"observation {group}": x for group, x in obs.items()} | {"reward": rewards}
            bad = [name for name, x in values.items() if not is_sound(x).all()]
            if bad:
                lines.append(f"  step {index + 1}: not finite: {', '.join(bad)}")
    if len(lines) == 1:
        lines.append("  everything stayed finite")
    return lines
