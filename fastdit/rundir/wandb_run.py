"""Send a run's metrics and pictures to Weights & Biases, without ever keeping training waiting.

The library answers within a millisecond as long as its own process, wandb-core, is well. Its start waits for the
server, though, and every call waits if wandb-core does not answer. So one thread makes all calls, and training only
puts what it has into a queue. Whatever goes wrong becomes one line on the terminal, and training goes on.
"""

import json
import os
import queue
import shlex
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from fastdit.errors import UserError
from fastdit.files import write_text
from fastdit.rundir.run_files import WANDB
from fastdit.wandb_settings import WandbSettings

INSTALL = "pip install 'fastdit[wandb]'"
START_SECONDS = 15  # that the start of an online run may take before the run is kept offline
FINISH_SECONDS = 10  # that the upload of the rest may take; launchers give a stopped rank 30 seconds
LOCAL_SECONDS = 5  # that the library may take for what needs no network
MOST_WAITING = 5_000  # entries in the queue; more are left out
RECENT = 500  # entries that are sent again after wandb-core has died
_END = object()


def check(settings: WandbSettings) -> None:
    """Raise UserError if a run that wants Weights & Biases lacks the package or a login. Nothing is sent."""
    if settings.wandb is None:
        return
    try:
        import wandb

        wandb.init, wandb.Settings, wandb.login  # noqa: B018 - a folder named wandb can be imported, too
    except (ImportError, AttributeError):
        raise UserError(f"wandb: the package wandb is not installed; {INSTALL}, or leave out --wandb") from None
    try:
        wandb.setup(wandb.Settings(silent=True, console="off"))
        if _online(wandb) and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "wandb: no login is found on this machine; run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE=offline to keep the run on disk"
            )
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"wandb: {_first_line(error)}; mend that, or set WANDB_MODE=offline") from None


def _online(wandb) -> bool:
    """Return whether the library's settings let it use the network."""
    return wandb.setup().settings.mode in (None, "online", "run", "shared")


class WandbRun:
    """Hold one run at Weights & Biases, on rank 0. A resumed run goes on with the one that it began.

    The horizontal axis is `step`. A run that resumes from an older checkpoint sends the steps since then once more.
    """

    def __init__(self, folder: Path, settings: WandbSettings, config: dict[str, object]):
        """Begin to connect, and return at once. config: the run's settings, by flag."""
        self.folder = folder
        self.entity, self.project = settings.wandb_place
        self.identity = self._identify()
        self._queue: queue.Queue = queue.Queue(MOST_WAITING)
        self._messages: queue.SimpleQueue = queue.SimpleQueue()
        self._lost, self._run = 0, None
        self._offline = self._owns_core = self._restarted = self._closing = False
        self._recent: deque = deque(maxlen=RECENT)
        self._places: list[str] = []  # folders that hold the run on disk, one for each start
        self._started_by = time.monotonic() + START_SECONDS + LOCAL_SECONDS
        self._thread = threading.Thread(target=self._work, args=(config,), name="fastdit-wandb", daemon=True)
        self._thread.start()

    def _identify(self) -> str:
        """Return the id of the run at W&B: the one in the run's folder if it is of the same project, else a new one."""
        place, path = {"entity": self.entity, "project": self.project}, self.folder / WANDB
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if {key: before.get(key) for key in place} == place and isinstance(before["id"], str):
                return before["id"]
        except (OSError, ValueError, LookupError, AttributeError, RecursionError):  # none yet, or damaged
            pass
        identity = uuid.uuid4().hex[:12]
        write_text(path, json.dumps({"id": identity, **place}))
        return identity

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send figures after `step` steps."""
        self._put(lambda run, wandb: run.log({**values, "step": step}))

    def image(self, step: int, picture: np.ndarray, name: str) -> None:
        """Send a picture, uint8 (H, W, 3)."""
        self._put(lambda run, wandb: run.log({name: wandb.Image(picture), "step": step}))

    def summarize(self, figures: dict[str, float]) -> None:
        """Send the run's final figures."""
        self._put(lambda run, wandb: run.summary.update(figures))

    def take_messages(self) -> list[str]:
        """Return the lines for the terminal since the last call."""
        lines = []
        while not self._messages.empty():
            lines.append(self._messages.get())
        return lines

    def close(self) -> None:
        """End the run at W&B. The rest is uploaded for FINISH_SECONDS at most; more stays on disk.

        It returns after at most that and LOCAL_SECONDS, and, in the first seconds of a run, the time of the start.
        """
        # Ask the thread to end, even if the queue is full.
        end = max(time.monotonic(), self._started_by) + FINISH_SECONDS + LOCAL_SECONDS
        try:
            self._queue.put(_END, timeout=LOCAL_SECONDS)
            self._thread.join(end - time.monotonic())
        except queue.Full:
            pass

        # A wandb-core that does not answer would also block the end of this process.
        if self._thread.is_alive():
            self._messages.put(f"warning: W&B does not answer; {self._upload()}")
            self._closing = True
            for core in _cores():
                core.kill()
            self._thread.join(LOCAL_SECONDS)
        if self._lost:
            self._messages.put(f"warning: W&B was too slow; {self._lost} entries are missing there")

    def _put(self, send: Callable) -> None:
        """Queue a call for the thread. It is left out if the thread is far behind."""
        try:
            self._queue.put_nowait(send)
        except queue.Full:
            self._lost += 1

    def _work(self, config: dict[str, object]) -> None:
        """Connect, send what is queued, and end the run. It is the thread's function, and raises nothing."""
        import wandb

        try:
            self._run = self._start(wandb, config)
        except Exception as error:
            self._messages.put(f"warning: W&B cannot be used ({_first_line(error)}); the run goes on without it")
        while (send := self._queue.get()) is not _END:
            self._recent.append(send)
            self._call(wandb, config, send)
        self._call(wandb, config, self._finish)
        with suppress(Exception, SystemExit):
            wandb.teardown()  # or the library would do so at the end of the process, and wait there

    def _call(self, wandb, config: dict[str, object], work: Callable) -> None:
        """Call `work(run, wandb)`. If wandb-core has died, start it once more, and send the last entries again.

        A launcher that is stopped sends SIGTERM to all processes below it. wandb-core then ends at once, and loses what
        it has not written yet, while this process still saves.
        """
        if self._run is None:
            return
        try:
            work(self._run, wandb)
            return
        except Exception as error:
            reason = _first_line(error)
        if not self._restarted and not self._closing:
            self._restarted = True
            try:
                self._end_core(wandb)
                self._run = self._start(wandb, config)
                for send in (*self._recent, *([] if work in self._recent else [work])):
                    send(self._run, wandb)
                return
            except Exception as error:
                reason = _first_line(error)
        self._messages.put(f"warning: W&B failed ({reason}); the run goes on without it")
        self._run = None

    def _finish(self, run, wandb) -> None:
        """End the library's run. Raises ConnectionError if wandb-core has died."""
        if self._owns_core and not _cores():
            raise ConnectionError("wandb-core has ended")
        try:
            run.finish()
        except TimeoutError:
            self._messages.put(f"warning: W&B did not get everything in {FINISH_SECONDS} s; {self._upload()}")
        else:
            if self._offline:
                self._messages.put(f"W&B: {self._upload()}")

    def _end_core(self, wandb) -> None:
        """End wandb-core, and let the library forget it."""
        for core in _cores():
            core.kill()
        with suppress(Exception, SystemExit):  # it calls sys.exit with the code of the wandb-core that was killed
            wandb.teardown()
        wandb.setup(wandb.Settings(silent=True, console="off"))

    def _start(self, wandb, config: dict[str, object]):
        """Return the library's run: an online one, or one on disk if W&B cannot be reached or the user chose that."""
        options = {
            "project": self.project,
            "entity": self.entity,
            "id": self.identity,
            "dir": str(self.folder),
            "config": config,
            "resume": "allow",
        }
        if "WANDB_NAME" not in os.environ:
            options["name"] = self.folder.resolve().name
        quiet = {"silent": True, "console": "off", "init_timeout": START_SECONDS}
        ending = {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        mode = "offline" if self._offline else None  # once it was not reached, it is not tried again
        try:
            run = wandb.init(**options, mode=mode, settings=wandb.Settings(**quiet, **ending))
            if run.settings.mode == "offline" and not self._offline:
                self._offline = True
                self._messages.put(f"W&B: offline, into {self.folder / 'wandb'}")
            elif run.url and not self._restarted:
                self._messages.put(f"W&B: {run.url}")
        except Exception as error:
            if self._offline or not _online(wandb):
                raise
            self._offline = True
            self._messages.put(
                f"warning: W&B cannot be reached ({_first_line(error)}); the run goes on, and its files for W&B go "
                f"into {self.folder / 'wandb'}"
            )
            self._end_core(wandb)  # it holds the id of the attempt, and would go on trying
            run = wandb.init(**options, mode="offline", settings=wandb.Settings(**quiet, **ending))
        run.define_metric("*", step_metric="step")
        self._owns_core = bool(_cores())
        self._places.append(run.settings.sync_dir)
        return run

    def _upload(self) -> str:
        """Return what uploads the run from disk."""
        places = self._places or [str(self.folder / "wandb")]
        return f"the run is kept on disk; upload it later with: wandb sync {shlex.join(places)}"


def _cores() -> list[psutil.Process]:
    """Return the library's living processes below this one."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == "wandb-core" and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type."""
    return (str(error).splitlines() or [""])[0].strip()[:200] or type(error).__name__
