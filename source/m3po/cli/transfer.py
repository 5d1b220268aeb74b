"""Options of a training that starts with what other tasks have taught."""

from __future__ import annotations

import argparse

from m3po.cli.job import Job
from m3po.envs.suite import suites
from m3po.errors import UserError
from m3po.runners.checkpoint import check_compatible, read_checkpoint
from m3po.runners.task_transfer import TaskSizes, checkpoint_tasks, match_tasks


def add_transfer_arguments(parser: argparse.ArgumentParser, start: argparse._MutuallyExclusiveGroup) -> None:
    """Add the options; ``start`` are those of which a training can begin with one."""
    start.add_argument("--transfer", metavar="PATH", help="Start with what a checkpoint of other tasks has learnt.")
    parser.add_argument(
        "--init_task_from",
        "--init-task-from",
        type=_pairs,
        default={},
        metavar="NEW=OLD[,NEW=OLD]",
        help="With --transfer: new tasks that start with the embeddings of tasks of the checkpoint.",
    )
    parser.add_argument(
        "--train_only",
        "--train-only",
        choices=("all", "embedding"),
        default="all",
        help="Of a checkpoint, train all, or the embeddings and action noise of the tasks alone.",
    )


def _pairs(text: str) -> dict[str, str]:
    """Argument type: ``NEW=OLD,NEW=OLD``, task names by whatever names their suites know them."""
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"expected NEW=OLD, got '{text}'")
    result = {_canonical(new): _canonical(old) for new, old in pairs}
    if len(result) < len(pairs):
        raise argparse.ArgumentTypeError(f"a new task is named twice in '{text}'")
    return result


def _canonical(name: str) -> str:
    return next((task for suite in suites().values() if (task := suite.resolve(name)) is not None), name)


def check_start(job: Job) -> None:
    """Check what training is to start from, and print where each task comes from.

    Raises:
        UserError: If the options or the tasks do not fit.
    """
    args = job.args
    if args.split_tasks and not args.in_group:
        raise UserError("--split_tasks deals tasks out to several processes, which --distributed connects.")
    if args.train_only == "embedding" and not (job.multi_task and (args.checkpoint or args.transfer)):
        raise UserError("--train_only embedding needs trained networks: --transfer, or --checkpoint of several tasks.")
    if args.transfer is None:
        if args.init_task_from:
            raise UserError("--init_task_from needs a checkpoint to take the embeddings from: --transfer PATH.")
        return
    content = read_checkpoint(args.transfer, "cpu")
    check_compatible(args.transfer, content, algorithm=args.algo)
    there = checkpoint_tasks(args.transfer, content)
    here = [TaskSizes(info.name, info.obs_dim, info.action_dim) for info in job.infos]
    source = match_tasks(there, here, args.init_task_from)
    kept = [name for name in job.names if source.get(name) == name]
    print(f"[m3po] transferring {len(kept)} of {len(there)} tasks from {args.transfer}")
    new = [f"{name} ({'as ' + source[name] if name in source else 'afresh'})" for name in job.names if name not in kept]
    if new:
        print(f"[m3po] new tasks: {', '.join(new)}")
