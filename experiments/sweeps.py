"""Sweeps: many trainings, in processes that share the cores, each saved when it is done."""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

import programs
import runs

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all programs with sweeps have in common."""
    option, cpu = parser.add_argument, jax.default_backend() == "cpu"
    option("--results", type=programs.folder, default=str(runs.RESULTS), metavar="DIR", help="folder of the CSV files")
    option("--quick", action="store_true", help="a short form, on data that need no download")
    workers = os.cpu_count() if cpu else 1
    option("--workers", type=programs.count, default=workers, metavar="N", help="processes (one a core)")


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    experiments: Iterable[str],
    on_demand: Iterable[str] = (),
) -> argparse.Namespace:
    """Adds the experiments to run and the folder of the data to a program's options, and parses its arguments.

    Args:
      parser: of the program, with the options of its own.
      argv: the program's arguments.
      experiments: names of those that run unless some are named.
      on_demand: names of those that run only if they are named.
    """
    usual, all_names = list(experiments), [*experiments, *on_demand]
    only = f"; if named, {', '.join(on_demand)}" if on_demand else ""
    option = parser.add_argument
    option("experiments", nargs="*", default=usual, metavar="EXPERIMENT", help=", ".join(usual) + only)
    option("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="folder of the data sets' files (data)")
    add_options(parser)
    args = parser.parse_args(argv)
    for name in args.experiments:
        if name not in all_names:
            parser.error(programs.unknown("experiment", name, all_names))
    return args


def sweep(
    todo: Sequence[K],
    work: Callable[..., R],
    done: dict[K, R],
    save: Callable[[R], None],
    *,
    title: str,
    size: Callable[[K], int] = lambda item: 1,
    unit: str = "trainings",
    workers: int = 1,
) -> list[R]:
    """Does what is not done yet.

    Args:
      todo: what is to be done.
      work: does one of them; called with ``advance=``, a function of how much of its size was done since its last call,
        in a single process alone.
      done: what has been done, to which the rest is added.
      save: called with every new result.
      title: of the progress bar.
      size: how large one of ``todo`` is.
      unit: of these sizes, by which the progress bar tells the rate.
      workers: processes that share the cores; a CPU does small steps faster on one core each.

    Returns:
      The results of ``todo``, in its order.

    Raises:
      KeyboardInterrupt: after Ctrl-C, with a message of how much is done.
      UserError: if the system has killed a worker.
    """
    left = [item for item in todo if item not in done]
    try:
        with programs.progress() as progress:
            task = progress.add_task(title, total=sum(map(size, todo)), unit=unit)
            progress.advance(task, sum(size(item) for item in todo if item in done))

            def add(item: K, result: R) -> None:
                save(result)
                done[item] = result
                progress.update(task, completed=sum(size(item) for item in todo if item in done))

            if workers == 1:
                for item in left:
                    add(item, work(item, advance=functools.partial(progress.advance, task)))
            elif left:
                by_workers(left, work, workers, add)
    except KeyboardInterrupt:
        number = sum(item in done for item in todo)
        raise KeyboardInterrupt(f"{title}: {number} of {len(todo)} trainings are done and saved.") from None
    return [done[item] for item in todo]


def by_workers(todo: Sequence[K], work: Callable[[K], R], workers: int, add: Callable[[K, R], None]) -> None:
    """Hands everything to processes, and its result to ``add`` as soon as there is one."""
    with worker_pool(workers) as pool:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is for this process alone
        futures = {pool.submit(work, item): item for item in todo}
        signal.signal(signal.SIGINT, handler)
        try:
            for future in concurrent.futures.as_completed(futures):
                add(futures[future], future.result())
        except BaseException as error:
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise programs.UserError(
                    "A worker was killed, as happens where memory does not suffice; what was done is saved. "
                    "Call the program again, with fewer --workers."
                ) from None
            raise


def worker_pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """Returns a pool of processes, each with cores of its own where the system can do that."""
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.Queue()
    if hasattr(os, "sched_getaffinity"):
        for part in np.array_split(sorted(os.sched_getaffinity(0)), workers):
            cores.put(set(part.tolist()))
    return concurrent.futures.ProcessPoolExecutor(workers, spawn, start_worker, (cores,))


def start_worker(cores: Any) -> None:
    """Binds a worker to its part of the cores, which JAX then takes for all there are, and its life to its parent's."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity") and (part := cores.get()):
        os.sched_setaffinity(0, part)


def exit_with_parent() -> None:
    """Ends the process when the one that started it has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
