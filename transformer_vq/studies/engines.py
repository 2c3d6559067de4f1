"""Where runs go: several at once on this machine, an array of Slurm jobs through submitit, a Ray cluster.

An engine takes jobs and yields (job, state) as they end, in any order. What became of a run is in its `status.json`; a
worker that dies without a word is written down here as killed, and the rest goes on. Adding an engine is one generator
function and one name in the table at the end.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from transformer_vq.config.extras import need
from transformer_vq.config.study import EngineConfig
from transformer_vq.studies.execute import Job, execute
from transformer_vq.studies.folder import RESULTS, read_status, write_status

Ended = Iterator[tuple[Job, str]]
GRACE = 60.0  # seconds for runs to write a checkpoint after Ctrl-C


class Slot(NamedTuple):
    """A share of this machine: processor cores, and a GPU where there are any."""

    cores: list[int]
    gpu: str | None


def local(jobs: Sequence[Job], at_once: int, options: EngineConfig) -> Ended:
    """`at_once` worker processes on this machine, each with its own cores and GPU. A worker does one run after another;
    a new one takes its place when it dies, or after a run that failed."""
    waiting = deque(jobs)
    free = slots(at_once)
    busy: dict[Connection, tuple[_Worker, Job]] = {}
    idle: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and (idle or free):
                worker = idle.pop() if idle else _Worker(free.pop(0))
                job = waiting.popleft()
                worker.pipe.send(job)
                busy[worker.pipe] = worker, job
            for pipe in wait(list(busy)):
                worker, job = busy.pop(pipe)  # type: ignore[call-overload]
                state = worker.result()
                if state is None:
                    state = worker.bury(job)
                if state in RESULTS:
                    idle.append(worker)
                else:
                    worker.dismiss()
                    free.append(worker.slot)
                yield job, state
    except KeyboardInterrupt:
        for worker, _ in busy.values():  # a terminal's Ctrl-C has reached them too; give them time for a checkpoint
            worker.process.join(GRACE)
        raise
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.dismiss()


def slots(at_once: int) -> list[Slot]:
    """Cores in groups as even as can be, GPUs in turn."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    bounds = [i * len(cores) // at_once for i in range(at_once + 1)]
    groups = [cores[a:b] or [cores[i % len(cores)]] for i, (a, b) in enumerate(itertools.pairwise(bounds))]
    gpus = visible_gpus()
    return [Slot(group, gpus[i % len(gpus)] if gpus else None) for i, group in enumerate(groups)]


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES lists them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


class _Worker:
    """A fresh process on one slot, and the pipe to it."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(theirs, slot.cores), daemon=True
        )
        with _environment(slot):
            self.process.start()
        theirs.close()  # so that its death shows as the end of the file

    def result(self) -> str | None:
        """The state that it sent; None when it died instead."""
        try:
            return str(self.pipe.recv())
        except (EOFError, ConnectionResetError):
            self.process.join()
            return None

    def bury(self, job: Job) -> str:
        """Write down that it died during `job`."""
        code = self.process.exitcode or 0
        how = f"killed by signal {-code}" if code < 0 else f"left with exit code {code}"
        hint = "; out of memory?" if code == -9 else ""
        state = read_status(Path(job.folder))["state"]
        if state == "running":
            state = "killed"
            write_status(Path(job.folder), state=state, error=f"the worker was {how}{hint}")
        return str(state) if state != "waiting" else "killed"

    def dismiss(self) -> None:
        """End it."""
        self.pipe.close()
        if self.process.is_alive():
            self.process.terminate()
        self.process.join(GRACE)


@contextmanager
def _environment(slot: Slot) -> Iterator[None]:
    """What a worker must find set before it imports torch: a thread a core, where the user's own wish is not set."""
    wanted = {name: os.environ.get(name, str(len(slot.cores))) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if slot.gpu is not None:
        wanted["CUDA_VISIBLE_DEVICES"] = slot.gpu
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _work(pipe: Connection, cores: list[int]) -> None:
    """A worker's life: jobs in, states out, until the study's process is gone."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        state = "done"
        while state in RESULTS:
            state = execute(pipe.recv())
            pipe.send(state)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the study is over, or interrupted
        return


def _leave_with_parent(parent: int) -> None:
    """A study that is killed takes its workers along: they must not write on while the next `study run` resumes."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def submitit_(jobs: Sequence[Job], at_once: int, options: EngineConfig) -> Ended:
    """An array of Slurm jobs, `at_once` of them at a time; where there is no Slurm, processes of this machine."""
    submitit = need("submitit", "--engine submitit")
    settings = {"timeout_min": 240, **options.submitit}
    executor = submitit.AutoExecutor(
        folder=Path(jobs[0].folder).parent / "submitit", cluster=settings.pop("cluster", None)
    )
    slurm = executor.cluster == "slurm"
    executor.update_parameters(**settings, **({"slurm_array_parallelism": at_once} if slurm else {}))
    size = len(jobs) if slurm else at_once  # an array of local processes would start all at once
    for start in range(0, len(jobs), size):
        part = list(jobs[start : start + size])
        handles = dict(zip(executor.map_array(execute, part), part, strict=True))
        while handles:
            for handle in [h for h in handles if h.done()]:
                job = handles.pop(handle)
                lost = handle.exception() is not None
                yield job, _lost(job, handle.state) if lost else str(handle.result())
            time.sleep(0.2 if not slurm else 5)


def ray_(jobs: Sequence[Job], at_once: int, options: EngineConfig) -> Ended:
    """Tasks on a Ray cluster (RAY_ADDRESS, or `engine: {ray: {address: …}}`), else on one started on this machine."""
    ray = need("ray", "--engine ray")
    settings = dict(options.ray)
    share = {name: settings.pop(name) for name in ("num_cpus", "num_gpus") if name in settings}
    started = not ray.is_initialized()
    if started:
        ray.init(**{"include_dashboard": False, "log_to_driver": False, **settings})
    try:
        # Ray gives every task as many threads as processors that it reserves; at_once bounds what is in flight
        task = ray.remote(max_retries=0, **share)(_execute_plain)
        waiting = deque(jobs)
        running: dict[Any, Job] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                running[task.remote(asdict(job))] = job
            done, _ = ray.wait(list(running), num_returns=1)
            job = running.pop(done[0])
            try:
                state = str(ray.get(done[0]))
            except ray.exceptions.RayError as error:
                state = _lost(job, str(error).splitlines()[0])
            yield job, state
    finally:
        if started:
            ray.shutdown()


def _execute_plain(job: dict[str, Any]) -> str:
    return execute(Job(**job))


def _lost(job: Job, why: str) -> str:
    """The engine lost the worker: write it down, unless the run had ended by itself."""
    folder = Path(job.folder)
    state = str(read_status(folder)["state"])
    if state in ("running", "waiting"):
        folder.mkdir(parents=True, exist_ok=True)
        write_status(folder, state="killed", error=f"the engine lost it: {why}"[:500])
        return "killed"
    return state


ENGINES: dict[str, Callable[[Sequence[Job], int, EngineConfig], Ended]] = {
    "local": local,
    "submitit": submitit_,
    "ray": ray_,
}
