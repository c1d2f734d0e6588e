"""How a guarded job ends when it cannot go on: orderly, with an exit code that ``ullage run`` understands."""

from __future__ import annotations

import sys

from ullage.guard import CANNOT_FIT_EXIT_CODE, RESTART_EXIT_CODE
from ullage.guard.plan import Plan


class RestartRequired(SystemExit):
    """A smaller plan is saved; the job asks to be started again (exit code 75)."""

    def __init__(self, plan: Plan, words: str) -> None:
        self.plan, self.words = plan, words
        super().__init__(RESTART_EXIT_CODE)
        print(words, file=sys.stderr, flush=True)


class CannotFit(SystemExit):
    """The smallest plan does not fit (exit code 3); ``words`` say what was needed."""

    def __init__(self, plan: Plan, words: str) -> None:
        self.plan, self.words = plan, words
        super().__init__(CANNOT_FIT_EXIT_CODE)
        print(words, file=sys.stderr, flush=True)
