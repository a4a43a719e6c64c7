"""Threads that run one at a time, each step when the seed says so.

A task is code of the product on a thread of its own, so that it needs no change; it gives the
word back at each point where the outside world could come between: system calls, calls to the
sidecar, waits. The service's thread is the one that calls step; it is never interrupted, as in
the product nothing interrupts it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from random import Random

from kvist.cachesvc.core.host import Threads

STEPS_MAX = 20_000
STEP_S_MAX = 60.0


class Killed(BaseException):
    """The process that runs this code has died at this point."""


class _Runner:
    """An operating system's thread that is used again for task after task."""

    idle: list[_Runner] = []  # noqa: RUF012 - shared on purpose

    def __init__(self) -> None:
        self.go, self.back = threading.Lock(), threading.Lock()
        self.go.acquire()
        self.back.acquire()
        self.work: Callable[[], None] | None = None
        threading.Thread(target=self._loop, name="sim-runner", daemon=True).start()

    def _loop(self) -> None:
        while True:
            self.go.acquire()
            assert self.work is not None
            self.work()
            self.work = None
            _Runner.idle.append(self)
            self.back.release()


class Task:
    """Code that runs in steps.

    Attributes:
        name: for the trace.
        owner: whose death ends it.
        ready: whether it can go on; not while it waits for somebody.
        done: whether it has ended.
        error: what it raised, but for Killed.
    """

    def __init__(
        self, scheduler: Scheduler, work: Callable[[], None], name: str, owner: object
    ) -> None:
        self.name = name
        self.owner = owner
        self.ready = True
        self.done = False
        self.error: Exception | None = None
        self._scheduler = scheduler
        self._work: Callable[[], None] | None = work
        self._killed = False
        self._runner: _Runner | None = None

    def step(self) -> None:
        """Run it until it gives the word back; by the service's thread only."""
        if self._runner is None:
            self._runner = _Runner.idle.pop() if _Runner.idle else _Runner()
            self._runner.work = self._run
        self._scheduler.current = self
        self._runner.go.release()
        came_back = self._runner.back.acquire(timeout=STEP_S_MAX)
        assert came_back, f"{self.name} runs on and on without a system call"
        self._scheduler.current = None

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._work()
        except Killed:
            pass
        except Exception as error:
            self.error = error
        self._work = None
        self.done, self.ready = True, False

    def pause(self) -> None:
        """Give the word back; by the task itself. Raises: Killed."""
        assert self._runner is not None
        self._runner.back.release()
        self._runner.go.acquire()
        if self._killed:
            raise Killed

    def kill(self) -> None:
        """End it where it stands."""
        if self._runner is None:
            self.done, self.ready = True, False
        self._killed = True
        while not self.done:
            self.step()

    def join(self) -> None:
        """Let things happen until it has ended; by the service's thread."""
        self._scheduler.run_until(lambda: self.done)


class Scheduler:
    """All tasks of a world.

    Attributes:
        current: the task whose code runs; None is the service's thread.
        frozen: no task of this owner moves, as if its disk hung.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.current: Task | None = None
        self.frozen: object = None
        self.tasks: list[Task] = []
        self.steps = 0

    def start(self, work: Callable[[], None], name: str, owner: object) -> Task:
        """Begin a task; it runs when it is stepped."""
        task = Task(self, work, name, owner)
        self.tasks.append(task)
        return task

    def pause(self) -> None:
        """A point where others may come between; nothing on the service's thread."""
        if self.current is not None:
            self.current.pause()

    def park(self) -> None:
        """Wait until somebody makes the task ready again."""
        task = self.current
        assert task is not None, "the service's thread never waits"
        task.ready = False
        task.pause()

    def ready(self) -> list[Task]:
        """Those that can go on."""
        self.tasks = [task for task in self.tasks if not task.done]
        return [task for task in self.tasks if task.ready and task.owner is not self.frozen]

    def step(self) -> Task | None:
        """One of them goes on; which one, if any."""
        ready = self.ready()
        if not ready:
            return None
        task = self.random.choice(ready)
        self.steps += 1
        assert self.steps < STEPS_MAX, f"{task.name} goes on for ever"
        task.step()
        if task.error is not None:
            raise task.error
        return task

    def run_until(self, reached: Callable[[], bool]) -> None:
        """Step tasks until something is so."""
        self.frozen = None
        while not reached():
            assert self.step() is not None, f"all wait: {[task.name for task in self.tasks]}"

    def kill(self, owner: object) -> None:
        """End all tasks of an owner."""
        for task in self.tasks:
            if task.owner is owner and not task.done:
                task.kill()


class Condition:
    """What a threading.Condition does for tasks; no lock, as only one runs at a time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._waiters: list[Task] = []

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        """Until notified."""
        task = self._scheduler.current
        assert task is not None
        self._waiters.append(task)
        self._scheduler.park()

    def notify(self) -> None:
        """Wake one of those that wait."""
        if self._waiters:
            place = self._scheduler.random.randrange(len(self._waiters))
            self._waiters.pop(place).ready = True

    def notify_all(self) -> None:
        """Wake them all."""
        while self._waiters:
            self.notify()


class SimThreads(Threads):
    """Threads of one life of the sidecar."""

    def __init__(self, scheduler: Scheduler, owner: object) -> None:
        self._scheduler = scheduler
        self._owner = owner

    def start(self, work: Callable[[], None], name: str) -> Task:
        """See Threads."""
        return self._scheduler.start(work, name, self._owner)

    def condition(self) -> Condition:  # type: ignore[override]
        """See Threads."""
        return Condition(self._scheduler)
