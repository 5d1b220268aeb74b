"""The training loop: rsl_rl's runner with evaluation, a real best checkpoint, and a report."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from m3po import distributed
from m3po.algorithms import M3PO
from m3po.envs.interface import as_m3po_env
from m3po.envs.read_groups import only_read_groups
from m3po.errors import CheckpointError, M3POError
from m3po.models.task_policy import TaskMLPModel, embed
from m3po.runners.checkpoint import (
    BEST,
    LAST,
    check_compatible,
    check_shapes,
    network_states,
    read_checkpoint,
    write_checkpoint,
)
from m3po.runners.embedding_report import nearest_table, write_embedding_report
from m3po.runners.episode_statistics import EpisodeStatistics
from m3po.runners.log_services import make_writer
from m3po.runners.nan_guard import NanGuard
from m3po.runners.reporting import Reporter, console_block, console_line
from m3po.runners.resumable_runner import ResumableRunner
from m3po.runners.task_transfer import describe_tasks, described_tasks, transferred
from m3po.stopping import StopSignals
from m3po.stopwatch import Stopwatch


class Evaluator(Protocol):
    """Evaluates checkpoints beside the training, without touching it."""

    def submit(self, checkpoint_path: str, iteration: int) -> None:
        """Queue a checkpoint; returns at once."""

    def poll(self) -> list[dict]:
        """Results that have arrived since the last call."""

    def wait(self) -> list[dict]:
        """Results of everything queued; blocks."""

    def restart(self) -> None:
        """Begin anew after ``poll`` or ``wait`` has raised an ``M3POError``; nothing is queued then."""

    def close(self) -> None:
        """Release what the evaluator holds."""


class M3PORunner(ResumableRunner):
    """Runs M3PO, or rsl_rl's own PPO in the same harness.

    ``log_dir`` receives ``model_<iteration>.pt`` every ``save_interval``, the newest of which are kept, and
    ``model_last.pt``, with what an exact continuation needs besides; ``model_best.pt`` (by evaluation), TensorBoard
    events, ``progress.csv`` and ``evaluations.csv``; of several tasks also ``tasks.csv``, ``task_evaluations.csv`` and
    the report on their embeddings.

    Of several processes (:mod:`m3po.distributed`), each has environments of its own; the first one alone writes, prints
    and evaluates, and reports all of them.
    """

    def __init__(
        self,
        env: VecEnv,
        train_cfg: dict[str, Any],
        log_dir: str | None = None,
        device: str = "cpu",
        evaluator: Evaluator | None = None,
        stop: StopSignals | None = None,
    ) -> None:
        """Build the algorithm for an environment.

        Args:
            env: Environment.
            train_cfg: Runner configuration as in rsl_rl; ``task`` and ``algo`` name task and algorithm in checkpoints,
                ``quiet`` prints a line after each iteration (by default where the output is not a terminal),
                ``eval_interval`` is the number of iterations between evaluations, ``keep_checkpoints`` the number of
                numbered checkpoints that are kept.
            log_dir: Folder of the run; nothing is written without one.
            device: Torch device.
            evaluator: Evaluates checkpoints; without one there is no ``model_best.pt``.
            stop: Signals that end :meth:`learn` after the iteration that runs.
        """
        train_cfg = dict(train_cfg)
        self._algo = train_cfg.pop("algo", None)
        self._agent = json.dumps(train_cfg, default=str)  # before rsl_rl takes it apart
        self.run_dir = log_dir
        """Folder of the run, where each process keeps what it needs to go on; the first one writes all else."""
        if not distributed.is_main():
            log_dir = evaluator = None
        env = only_read_groups(as_m3po_env(env), train_cfg["obs_groups"])
        super().__init__(env, train_cfg, log_dir=log_dir, device=device)
        self.log_dir = log_dir
        self.evaluator = evaluator
        self.stop = stop or StopSignals()
        self.all_envs = sum(distributed.collected(env.num_envs))
        """Environments of all processes."""
        self.reporter = Reporter(log_dir, lambda folder: make_writer(folder, self.cfg, self.env.cfg))
        self.nan_guard = NanGuard(self.env, self.cfg, log_dir, self.device)
        self.statistics = EpisodeStatistics.of(env, device)
        self.quiet = self.cfg.get("quiet", not sys.stdout.isatty())
        """Whether a line is printed after each iteration instead of a block."""
        self.after_step: Callable[[], None] | None = None
        """Called after each step of the environments, to film them for example."""
        self.best_return = float("-inf")
        self.env_steps, self.seconds = 0, 0.0
        self.first_iteration = 0
        """Where the run began: later than 0 if it started with a checkpoint of another."""
        self._evaluator_failed = False
        self._unevaluated: dict[int, str] = {}
        """Checkpoints whose evaluation has not come back yet, by iteration."""
        self._episodes_run = False
        """Whether the environments are in the midst of the episodes of a resumed run."""

    def learn(self, num_learning_iterations: int, init_at_random_ep_len: bool = False) -> None:
        """Train for a number of iterations.

        Args:
            num_learning_iterations: Iterations of rollout and update.
            init_at_random_ep_len: Start the environments at random points of their episodes, unless they go on with
                those of a resumed run.

        Raises:
            Stop: After a signal, when everything is saved.
            M3POError: If no gradient step of the policy was finite, when everything is saved.
            CheckpointError: If the last checkpoint cannot be written; others are tried again.
        """
        if init_at_random_ep_len and not self._episodes_run:
            steps = self.env.episode_length_buf
            if isinstance(self.env.max_episode_length, torch.Tensor):  # one for each environment
                self.env.episode_length_buf = (
                    torch.rand_like(steps, dtype=torch.float32) * self.env.max_episode_length
                ).long()
            else:
                self.env.episode_length_buf = torch.randint_like(steps, high=int(self.env.max_episode_length))
        obs = self.nan_guard.first(self.env.get_observations().to(self.device))
        self.alg.train_mode()
        if self.is_distributed:
            self.alg.broadcast_parameters()
        watch = getattr(self.alg, "stopwatch", Stopwatch(self.device))
        first = self.current_learning_iteration
        try:
            self._iterate(first, first + num_learning_iterations, obs, watch)
            self._collect_evaluations(wait=True)
            self._report_embedding()
            self._check_learnt()
        finally:
            self.reporter.close()

    def _iterate(self, first: int, total: int, obs: TensorDict, watch: Stopwatch) -> None:
        """Iterations ``first`` to ``total - 1``. An update that waits for several rollouts counts as so many."""
        start_seconds = self.seconds
        with self.stop.deferred():
            it = first
            while it < total:
                count = getattr(self.alg, "begin_rollout", lambda most: 1)(total - it)
                obs, row, losses = self._iteration(it, count, obs, watch)
                it += count
                metrics = getattr(self.alg, "metrics", {}) | self.nan_guard.metrics
                self.reporter.report(row, losses, metrics)
                eta = (self.seconds - start_seconds) / (it - first) * (total - it)
                if distributed.is_main():
                    title = f"Iteration {it}/{total}"
                    line = self.quiet and console_line(title, row, eta)
                    print(line or console_block(title, row, losses, metrics, eta), flush=True)
                self._checkpoint(it, count, last=it == total)
                if self._stopped():
                    if self.run_dir is not None:
                        self._save_last()
                    break

    def _stopped(self) -> bool:
        """Whether a signal has reached any of the processes; if so, all of them stop."""
        received = [number for number in distributed.collected(self.stop.received) if number is not None]
        if received:
            self.stop.received = self.stop.received or received[0]
        return bool(received)

    def _iteration(
        self, it: int, count: int, obs: TensorDict, watch: Stopwatch
    ) -> tuple[TensorDict, dict[str, float], dict[str, float]]:
        """An update after ``count`` rollouts. Returns the next observations, the report's row, and the mean losses."""
        begin = time.perf_counter()
        num_steps = count * self.cfg["num_steps_per_env"]
        with torch.inference_mode():
            for _ in range(num_steps):
                obs = self._step(obs, self.statistics, watch)
            collected = time.perf_counter()
            self.nan_guard.close_rollout()
            if self.nan_guard.exceeded:
                self._give_up()
            self.alg.compute_returns(obs)
        losses = self.alg.update()
        end = time.perf_counter()

        self.seconds += end - begin
        self.env_steps += self.all_envs * num_steps
        self.current_learning_iteration = it + count - 1
        row = self._row(self.all_envs * num_steps, watch, collected - begin, end - collected)
        return obs, row | self.nan_guard.task_metrics, losses

    def _step(self, obs: TensorDict, statistics: EpisodeStatistics, watch: Stopwatch) -> TensorDict:
        """One step of all environments. Returns the next observations."""
        with watch.section("act"):
            actions = self.nan_guard.before(self.alg.act(obs))
        with watch.section("physics"):
            next_obs, rewards, dones, extras = self.env.step(actions.to(self.env.device))
        if self.after_step is not None:
            self.after_step()
        answer = next_obs.to(self.device), rewards.to(self.device), dones.to(self.device), extras
        obs, rewards, dones, extras = self.nan_guard.after(obs, answer)
        self.alg.process_env_step(obs, rewards, dones, extras)
        statistics.add(rewards, dones, extras)
        return obs

    def _check_learnt(self) -> None:
        """Say so if the policy did not take a single step."""
        if any(guard.learnt_nothing for guard in getattr(self.alg, "guards", ()) if guard.label == "policy"):
            raise M3POError("nothing was learnt: every gradient step of the policy was skipped, as none was finite.")

    def _give_up(self) -> None:
        """Stop a run whose environments mostly gave NaN, with a checkpoint if what is learnt is finite."""
        guard, saved = self.nan_guard, "nothing was saved"
        tensors = [x for _, state in network_states(self.alg.save()) for x in state.values()]
        if not all(x.isfinite().all() for x in tensors):
            saved += ", because the networks are not finite either: continue from an earlier checkpoint"
        elif self.log_dir is not None:
            path = os.path.join(self.log_dir, LAST)
            self.save(path)
            saved = f"saved {path}"
        raise M3POError(
            f"{guard.affected:.1%} of the environments gave values that are not finite within one rollout, more "
            f"than agent.max_nan_fraction={guard.max_fraction:g} allows; {saved}."
        )

    def _row(self, steps: int, watch: Stopwatch, collect: float, update: float) -> dict[str, float]:
        """Columns of the report for an update after so many steps; times and memory are those of this process."""
        times = watch.read()
        return {
            "iteration": self.current_learning_iteration,
            "env_steps": self.env_steps,
            "seconds": self.seconds,
            **self.statistics.read(),
            "steps_per_second": steps / (collect + update),
            "time_collect": collect,
            "time_plan": times.get("plan", 0.0),
            "time_physics": times.get("physics", 0.0),
            "time_update": update,
            "time_act": times.get("act", 0.0) - times.get("plan", 0.0),
            "time_policy": times.get("update_policy", update),
            "time_model": times.get("update_model", 0.0),
            "gpu_memory_mib": torch.cuda.max_memory_allocated(self.device) / 2**20 if watch.cuda else 0.0,
            "learning_rate": self.alg.learning_rate,
            "action_std": distributed.mean(self.alg.get_policy().output_std.mean(), self.env.num_envs).item(),
        }

    def _configure_multi_gpu(self) -> None:
        """Tell rsl_rl of the processes that are connected; it would connect GPUs alone, and those by NCCL alone.

        Raises:
            UserError: If this is one of several processes that are not connected.
        """
        self.gpu_world_size, self.gpu_global_rank = distributed.world_size(), distributed.rank()
        self.gpu_local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.is_distributed = self.gpu_world_size > 1
        distributed.check_start(self.is_distributed)
        ranks = {"global_rank": self.gpu_global_rank, "local_rank": self.gpu_local_rank}
        self.cfg["multi_gpu"] = ranks | {"world_size": self.gpu_world_size} if self.is_distributed else None

    # -- checkpoints and evaluation -----------------------------------------------------------------------------------

    def _checkpoint(self, done: int, count: int, last: bool) -> None:
        """Save and evaluate when it is time to: ``done`` iterations are done, ``count`` of them since the last call."""
        if self.run_dir is None:
            return
        it, interval = done - 1, self.cfg.get("eval_interval", 0)
        evaluate = self.evaluator is not None and interval > 0 and (done % interval < count or last)
        path = os.path.join(self.run_dir, f"model_{it}.pt")
        if distributed.shared(evaluate or last or done % self.cfg["save_interval"] < count):
            try:
                if distributed.is_main():
                    self.save(path)
                if evaluate:
                    self._unevaluated[it] = path
                self._save_last()
                if distributed.is_main():
                    self._remove_old()
            except CheckpointError as error:
                if last:
                    raise
                print(f"[m3po] {error} Training goes on; the checkpoints before it are still there.", flush=True)
        if it in self._unevaluated:
            self.evaluator.submit(path, it)
        self._collect_evaluations(wait=False)

    def _collect_evaluations(self, wait: bool) -> None:
        """Record results, with ``wait`` of everything queued. An evaluator that fails is started anew, but once."""
        while self.evaluator is not None:
            try:
                results = self.evaluator.wait() if wait else self.evaluator.poll()
            except M3POError as error:
                reason = str(error).splitlines()[0]
                if self._evaluator_failed:
                    print(f"[m3po] {reason} Training goes on without evaluations.", flush=True)
                    self.evaluator = None
                    return
                print(f"[m3po] {reason} It is started once more.", flush=True)
                self._evaluator_failed = True
                self.evaluator.restart()
                for it, path in self._unevaluated.items():
                    self.evaluator.submit(path, it)
            else:
                self._record(results)
                return

    def _report_embedding(self) -> None:
        """Print the nearest tasks of each task after training, and write the report on their embeddings."""
        names, policy = self.env.task_names, self.alg.get_policy()
        if self.log_dir is None or len(names) < 2 or not isinstance(policy, TaskMLPModel):
            return
        embedding = embed(policy.task_embedding, torch.arange(len(names), device=self.device))
        print(nearest_table(names, embedding), flush=True)
        for path in write_embedding_report(self.log_dir, names, embedding):
            print(f"[m3po] task embeddings: {path}", flush=True)

    def _record(self, results: list[dict]) -> None:
        """Report finished evaluations and keep the best checkpoint, judged by the deployable prior.

        Several tasks are judged by the mean of their scores where these are defined.
        """
        for result in results:
            self.reporter.report_evaluation(result)
            text = ", ".join(_evaluation_text(name, result[name]) for name in ("prior", "planner") if result.get(name))
            print(f"[m3po] evaluation after iteration {result['iteration'] + 1}: {text}", flush=True)
            quality = result["prior"].get("score_mean", result["prior"]["return_mean"])
            if quality > self.best_return:
                best = read_checkpoint(result["checkpoint"], map_location="cpu")
                evaluation = {k: result["prior"][k] for k in ("return_mean", "return_std")}
                best["infos"] = {"evaluation": evaluation, "quality": quality}
                try:
                    write_checkpoint(Path(self.log_dir) / BEST, best)
                except CheckpointError as error:
                    print(f"[m3po] {error} The best one before it is still there.", flush=True)
                else:
                    self.best_return = quality
            self._unevaluated.pop(result["iteration"], None)

    def transfer(self, path: str, init_from: dict[str, str] | None = None) -> None:
        """Take over what a checkpoint of other tasks knows (:mod:`~m3po.runners.task_transfer`).

        The environment must be a ``MultiTaskVecEnv``, even of one task. Training starts at the first iteration.

        Args:
            path: Checkpoint of several tasks, or of one trained as several are.
            init_from: New tasks that start as tasks of the checkpoint.

        Raises:
            UserError: If the tasks or the networks do not fit; nothing is loaded then.
        """
        fresh, here = self.alg.save(), described_tasks(describe_tasks(self.env))
        content = read_checkpoint(path, "cpu")
        check_compatible(path, content, algorithm=self.description()["algorithm"])
        fitted = transferred(path, content, fresh, here, init_from)
        check_shapes(fitted, fresh)
        self.alg.load(fitted, {"actor": True, "critic": True}, strict=True)

    def inference_policy(self, kind: str = "prior") -> Callable[[TensorDict], torch.Tensor]:
        """A noise-free policy, ``prior`` or ``planner``; PPO has only the former."""
        if isinstance(self.alg, M3PO):
            return self.alg.inference_policy(kind)
        if kind != "prior":
            raise ValueError("PPO has no planner; use the prior.")
        self.alg.eval_mode()
        return self.alg.get_policy()


def _evaluation_text(name: str, result: dict) -> str:
    """One policy's evaluation in a few words."""
    if "score_mean" in result:
        return f"{name} score {result['score_mean']:.3f} (lowest {result['score_min']:.3f})"
    return f"{name} {result['return_mean']:.2f} +- {result['return_std']:.2f}"
