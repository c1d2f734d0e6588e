"""The loop of ``ullage run``: attempt, judge, decide, and again."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ullage.errors import InputError
from ullage.guard.plan import Plan, Value
from ullage.guard.run import keeper
from ullage.guard.run.alarm import Alarm
from ullage.guard.run.child import ENDING, Child, Ended, Limits, Signals
from ullage.guard.run.deaths import Death, judge
from ullage.guard.run.host_kills import KillWatch
from ullage.guard.run.needs import Known, Need, need_of
from ullage.guard.run.policy import DEFAULT_CAUSES, Policy, Restart, Stop
from ullage.guard.run.programs import launcher_retries
from ullage.guard.run.report import Attempt, RunReport
from ullage.guard.run.shrink import Setting, with_plan
from ullage.guard.run.stalls import dump
from ullage.guard.store import ATTEMPT_VARIABLE, STORE_VARIABLE, PlanStore
from ullage.guard.watch.exporter import FOLDER_VARIABLE
from ullage.i18n import _

#: The command may touch any file in this folder to say that it lives.
HEARTBEAT_VARIABLE = "ULLAGE_HEARTBEAT"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line of ``ullage run`` states; seconds of 0 mean never."""

    command: tuple[str, ...]
    plan_store: str = ""
    knobs: tuple[tuple[str, Value], ...] = ()
    causes: tuple[str, ...] = DEFAULT_CAUSES
    max_restarts: int = 5
    backoff_seconds: float = 1.0
    grace_seconds: float = 30.0
    stall_seconds: float = 0.0
    stall_signal: int = 0
    reserve: str = ""
    every_seconds: float = 5.0
    record: str = ""
    known: Known = field(default_factory=Known)


class Supervisor:
    """Runs a command to a right end, or a clear stop."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self._say = options, say
        self.warnings: list[str] = []
        self.attempts: list[Attempt] = []
        self._signals = Signals()
        self._folder = Path(tempfile.mkdtemp(prefix="ullage-run-"))
        path = options.plan_store or os.environ.get(STORE_VARIABLE, "")
        self.store = PlanStore(path or self._folder / "plan.json")
        self._plan_lost = False

    def run(self) -> RunReport:
        """Run until the command succeeds or there is nothing left to try."""
        try:
            setting = self._first_setting()
            for name in ("heartbeat", "counters"):
                (self._folder / name).mkdir()
            self._alarm = Alarm(
                self._warn,
                reserve=self.options.reserve,
                every_seconds=self.options.every_seconds,
                counters=self._folder / "counters",
                record=self.options.record,
            )
            keeper.adopt_orphans()
            with self._signals.caught():
                self._alarm.start()
                try:
                    stop, last = self._loop(setting)
                finally:
                    self._alarm.close()
                    keeper.adopt_orphans(adopt=False)
            return self._report(stop, last)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _first_setting(self) -> Setting:
        plan = self.store.load()
        if plan is None:
            plan = Plan(knobs=self.options.knobs)
            if self.options.knobs:
                self.store.save(plan)
        elif plan.generation or self.options.knobs:
            self._say(_("goes on with the plan of {path} ({plan})").format(path=self.store.path, plan=_knobs(plan)))
        if retries := launcher_retries(self.options.command):
            self._warn(
                _(
                    "the launcher itself retries the same arguments {count} times before a smaller plan gets its turn; "
                    "--max-restarts 0 leaves restarts to ullage run"
                ).format(count=retries)
            )
        return with_plan(self.options.command, plan)

    def _warn(self, sentence: str) -> None:
        self._say(sentence)
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def _loop(self, setting: Setting) -> tuple[Stop, Setting]:
        options = self.options
        policy = Policy(
            options.command,
            causes=options.causes,
            max_restarts=options.max_restarts,
            backoff_seconds=options.backoff_seconds,
        )
        while True:
            self._plan_lost = False
            ended, death = self._attempt(setting)
            after = self._refreshed(setting)
            step = self._decide(policy, setting, ended, death, after)
            changes = step.sentences if isinstance(step, Restart) else ()
            self._note(setting, ended, death, changes)
            if isinstance(step, Restart):
                self._save(step.setting.plan)
                stopped = self._announce_and_wait(policy, ended, death, step)
                if stopped is None:
                    setting = step.setting
                    continue
                return stopped, setting
            return step, after

    def _decide(self, policy: Policy, setting: Setting, ended: Ended, death: Death, after: Setting) -> Restart | Stop:
        # the job was right to refuse a plan that cannot be read
        if self._plan_lost and death.kind == "crash" and policy.num_restarts < policy.max_restarts:
            policy.num_restarts += 1
            sentences = (_("the plan was written anew"),)
            return Restart(setting=after, sentences=sentences, delay_seconds=self.options.backoff_seconds)
        return policy.decide(setting, ended, death, after)

    def _attempt(self, setting: Setting) -> tuple[Ended, Death]:
        number = len(self.attempts) + 1
        environment = {
            **os.environ,
            **dict(setting.environment),
            STORE_VARIABLE: str(self.store.path.absolute()),
            ATTEMPT_VARIABLE: str(number),
            HEARTBEAT_VARIABLE: str(self._folder / "heartbeat"),
            FOLDER_VARIABLE: str(self._folder / "counters"),
        }
        environment.setdefault("PYTHONUNBUFFERED", "1")  # or a pipe shows the last words only when a buffer is full
        limits = Limits(
            grace_seconds=self.options.grace_seconds,
            stall_seconds=self.options.stall_seconds,
            heartbeat=self._folder / "heartbeat",
        )
        child = Child(setting.words, environment, self._signals, limits)
        child.on_stall = self._stalled
        kills = KillWatch()
        self._alarm.event("start", _("attempt {number}").format(number=number))
        try:
            ended = child.run()
            num_kills, pids = kills.new_kills()
        finally:
            kills.close()
        death = judge(ended, num_kills=num_kills, killed_pids=pids)
        self._alarm.event("end", f"{death.kind}: {death.sentence}")
        if ended.num_left:
            self._warn(_("{count} processes of the command could not be ended").format(count=ended.num_left))
        return ended, death

    def _stalled(self, child: Child) -> str:
        self._say(
            _("no output and no heartbeat for {seconds:g} s: the job is stuck").format(
                seconds=self.options.stall_seconds
            )
        )
        text = dump(child, self.options.stall_signal)
        print(text, file=sys.stderr, flush=True)
        return text

    def _refreshed(self, setting: Setting) -> Setting:
        """Return the setting with the plan that the store now holds; a plan that is lost or corrupt is written anew."""
        had = setting.plan.generation > 0 or bool(setting.plan.knobs)
        try:
            plan = self.store.load()
        except InputError as error:
            self._warn(str(error))
            plan = None
            had = True
        if plan is not None and plan.generation > setting.plan.generation:
            return with_plan(self.options.command, plan)
        if plan is None and had:
            self._plan_lost = True
            self._warn(_("the plan in the store was lost; the last known one is written anew"))
            self._save(setting.plan)
        return setting

    def _save(self, plan: Plan) -> None:
        if plan.generation or plan.knobs:
            self.store.save(plan)

    def _note(self, setting: Setting, ended: Ended, death: Death, changes: Sequence[str]) -> None:
        self.attempts.append(
            Attempt(
                number=len(self.attempts) + 1,
                words=setting.words,
                knobs=setting.plan.knobs,
                generation=setting.plan.generation,
                seconds=ended.seconds,
                exit_code=ended.exit_code,
                kind=death.kind,
                sentence=death.sentence,
                worker_exit_code=death.worker_code,
                changes=tuple(changes),
                num_swept=ended.num_swept,
                num_left=ended.num_left,
                peaks=tuple((device.name, used, device.total_bytes) for device, used in self._alarm.take_peaks()),
                dump=ended.dump,
                errno=ended.errno,
            )
        )

    def _announce_and_wait(self, policy: Policy, ended: Ended, death: Death, step: Restart) -> Stop | None:
        self._say(
            _("attempt {number} ended (exit code {code}): {why}").format(
                number=len(self.attempts), code=ended.exit_code, why=death.sentence
            )
        )
        for sentence in step.sentences:
            self._say(f"  {sentence}")
        self._say(
            _("starts again in {seconds:g} s (restart {number} of {most})").format(
                seconds=step.delay_seconds, number=policy.num_restarts, most=policy.max_restarts
            )
        )
        end = time.monotonic() + step.delay_seconds
        while True:
            asked = [number for number in self._signals.queue if number in ENDING]
            self._signals.queue.clear()
            if asked:
                sentence = _("asked to end between two attempts")
                return Stop(verdict="interrupted", exit_code=128 + asked[0], sentence=sentence)
            left = end - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(left, 0.1))

    def _report(self, stop: Stop, last: Setting) -> RunReport:
        need: Need | None = None
        sentence = stop.sentence
        if stop.verdict == "cannot_fit":
            need = need_of(last.words, last.plan, self.options.known)
            sentence = f"{sentence}; {need.sentence()}"
        return RunReport(
            verdict=stop.verdict,
            exit_code=stop.exit_code,
            sentence=sentence,
            attempts=tuple(self.attempts),
            need=need,
            warnings=tuple(self.warnings),
            plan_store=str(self.store.path) if not self.store.path.is_relative_to(self._folder) else "",
        )


def _knobs(plan: Plan) -> str:
    return ", ".join(f"{name} {value}" for name, value in plan.knobs)
