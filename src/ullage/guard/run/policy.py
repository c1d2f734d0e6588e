"""Whether an attempt is followed by another, and with what: never the same failure of the same setting twice."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from ullage.errors import EXIT_DOES_NOT_FIT, InputError
from ullage.guard.run.child import Ended
from ullage.guard.run.deaths import OF_MEMORY, Death
from ullage.guard.run.shrink import Setting, smaller, why_not
from ullage.i18n import _

EXIT_NOT_FOUND, EXIT_NOT_EXECUTABLE = 127, 126
#: What ``--restart-on`` may name, and the kinds of death that each covers.
CAUSES = {
    "memory": (*OF_MEMORY, "host_killed", "restart"),
    "killed": ("killed", "cascade"),
    "stall": ("stall",),
    "crash": ("crash", "disk_full"),
}
DEFAULT_CAUSES = ("memory", "killed", "stall")
MAX_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Restart:
    """Start again with a setting, after a while; ``sentences`` say what changed."""

    setting: Setting
    sentences: tuple[str, ...]
    delay_seconds: float


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Stop: ``verdict`` is ``succeeded``, ``cannot_fit``, ``stopped``, ``interrupted`` or ``not_started``."""

    verdict: str
    exit_code: int
    sentence: str


def parse_causes(text: str) -> tuple[str, ...]:
    """Parse ``memory,killed,crash``; ``none`` names none.

    Raises:
        InputError: a cause that is not known.
    """
    if text.strip() == "none":
        return ()
    found = tuple(word.strip() for word in text.split(","))
    for word in found:
        if word not in CAUSES:
            raise InputError(
                _("{word!r} is no cause for a restart").format(word=word[:40]),
                where="--restart-on",
                remedy=_("known are {known}").format(known=", ".join((*CAUSES, "none"))),
            )
    return found


class Policy:
    """Decides after each attempt; remembers every failure."""

    def __init__(
        self,
        given: Sequence[str],
        *,
        causes: Sequence[str] = DEFAULT_CAUSES,
        max_restarts: int = 5,
        backoff_seconds: float = 1.0,
    ) -> None:
        self.given, self.max_restarts, self.backoff_seconds = tuple(given), max_restarts, backoff_seconds
        self.kinds = {kind for cause in causes for kind in CAUSES[cause]}
        self.num_restarts = self._unchanged = 0
        self._failed: set[tuple[object, ...]] = set()

    def decide(self, setting: Setting, ended: Ended, death: Death, after: Setting) -> Restart | Stop:
        """Return what follows an attempt.

        Args:
            setting: what it ran with. ``after``: the same with the plan that the store now holds.
            ended: how it ended, judged as ``death``.
        """
        final = _final(ended, death)
        if final is not None:
            return final
        if death.kind not in self.kinds:
            return Stop(verdict="stopped", exit_code=ended.exit_code or 1, sentence=death.sentence)
        same = (setting.key(), death.signature)
        repeated = same in self._failed
        self._failed.add(same)
        step = self._step(setting, ended, death, after, repeated=repeated)
        if isinstance(step, Stop):
            return step
        if self.num_restarts >= self.max_restarts:
            sentence = _("given up after {count} restarts: {why}").format(count=self.num_restarts, why=death.sentence)
            return Stop(verdict="stopped", exit_code=ended.exit_code or 1, sentence=sentence)
        self.num_restarts += 1
        return step

    def _step(self, setting: Setting, ended: Ended, death: Death, after: Setting, *, repeated: bool) -> Restart | Stop:
        code = ended.exit_code or 1
        if death.kind == "restart":
            if after.key() == setting.key() and repeated:
                sentence = _("the job asks again to be started again, with the plan unchanged")
                return Stop(verdict="stopped", exit_code=code, sentence=sentence)
            return self._again(after, (after.plan.reason,) if after.plan.reason else ())
        if death.kind in (*OF_MEMORY, "host_killed"):
            return self._smaller(setting, death, after, repeated=repeated)
        if death.kind in ("crash", "disk_full") and repeated:
            sentence = _("the same error twice: {why}").format(why=death.sentence)
            return Stop(verdict="stopped", exit_code=code, sentence=sentence)
        return self._unchanged_again(after)

    def _smaller(self, setting: Setting, death: Death, after: Setting, *, repeated: bool) -> Restart | Stop:
        """Start a smaller setting; unchanged only where the cause lay elsewhere, and only once."""
        change = smaller(after, death, self.given)
        if change is not None:
            return self._again(change.setting, change.sentences)
        foreign = death.found is not None and death.found.cause in ("waiting", "other_process")
        if (foreign or death.kind == "host_killed") and not repeated:
            return self._unchanged_again(after)
        sentence = _("cannot fit: {why}; {death}").format(why=why_not(after.words, death), death=death.sentence)
        return Stop(verdict="cannot_fit", exit_code=EXIT_DOES_NOT_FIT, sentence=sentence)

    def _again(self, setting: Setting, sentences: tuple[str, ...]) -> Restart:
        self._unchanged = 0
        return Restart(setting=setting, sentences=sentences, delay_seconds=self.backoff_seconds)

    def _unchanged_again(self, setting: Setting) -> Restart:
        """Wait longer each time: what comes from outside needs a while to pass."""
        delay = min(MAX_BACKOFF_SECONDS, self.backoff_seconds * 2**self._unchanged)
        self._unchanged += 1
        return Restart(setting=setting, sentences=(_("nothing is changed"),), delay_seconds=delay)


def _final(ended: Ended, death: Death) -> Stop | None:
    if death.kind == "none":
        return Stop(verdict="succeeded", exit_code=0, sentence=death.sentence)
    if death.kind == "signal":
        return Stop(verdict="interrupted", exit_code=ended.exit_code, sentence=death.sentence)
    if death.kind == "not_started":
        code = EXIT_NOT_FOUND if ended.errno in (errno.ENOENT, errno.ENOTDIR) else EXIT_NOT_EXECUTABLE
        return Stop(verdict="not_started", exit_code=code, sentence=death.sentence)
    if death.kind == "cannot_fit":
        return Stop(verdict="cannot_fit", exit_code=EXIT_DOES_NOT_FIT, sentence="cannot fit: " + death.sentence)
    return None
