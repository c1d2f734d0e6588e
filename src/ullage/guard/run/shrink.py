"""From a death to the next attempt: a smaller plan and the command line that goes with it, or why there is none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ullage.errors import InputError
from ullage.guard.plan import Plan, Value
from ullage.guard.run import engines, training
from ullage.guard.run.deaths import Death
from ullage.guard.run.programs import engine_of, llama_factory_file, trainer_of
from ullage.guard.run.words import Words
from ullage.i18n import _


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an attempt runs with: plan, words and what is added to the environment."""

    plan: Plan
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def key(self) -> tuple[object, ...]:
        """Return what makes two attempts the same."""
        return (self.plan.knobs, self.words, self.environment)


@dataclass(frozen=True, kw_only=True)
class Change:
    """The next setting and what was changed, in sentences."""

    setting: Setting
    sentences: tuple[str, ...] = field(default=())


def fill_in(words: Sequence[str], plan: Plan) -> list[str]:
    """Put the plan's knobs in the place of ``{knob}`` in a command line.

    Raises:
        InputError: a place that the plan has no knob for, where the plan has knobs at all.
    """
    knobs = dict(plan.knobs)
    found = []
    for word in words:
        for name, value in knobs.items():
            word = word.replace("{" + name + "}", str(value))
        found.append(word)
    return found


def has_places(words: Sequence[str], plan: Plan) -> bool:
    """Return whether the command line takes a knob of the plan by ``{knob}``."""
    return any("{" + name + "}" in word for name, _value in plan.knobs for word in words)


def smaller(setting: Setting, death: Death, given: Sequence[str]) -> Change | None:
    """Return the next smaller setting; ``given`` is the command as typed, with its places for knobs."""
    engine = engine_of(setting.words)
    if engine:
        return _smaller_engine(engine, setting, death)
    change = training.next_smaller(setting.words, death, setting.plan)
    if change is None:
        return None
    plan = setting.plan.shrunk(change.sentence, **dict(change.knobs))
    words = training.put_flags(setting.words, change)
    if has_places(given, plan):
        words = fill_in(given, plan)
    environment = setting.environment
    if plan.get("alloc_conf"):
        environment = tuple((name, joined(name, str(plan.get("alloc_conf")))) for name in training.ALLOC_VARIABLES)
    after = Setting(plan=plan, words=tuple(words), environment=environment)
    changed = difference(setting.words, words, (names for names, _flag, _value in change.flags))
    return Change(setting=after, sentences=(change.sentence, *changed))


def joined(name: str, setting: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a list of allocator settings with one more."""
    now = environment.get(name, "")
    return ",".join(filter(None, (now if setting.partition(":")[0] not in now else "", setting)))


def _smaller_engine(engine: str, setting: Setting, death: Death) -> Change | None:
    line = Words(setting.words)
    step = engines.next_step(engine, line, death, setting.plan)
    if step is None:
        return None
    knobs: dict[str, Value] = {**dict(step.knobs), **dict(step.learnt)}
    plan = setting.plan.shrunk(step.sentence, **knobs)
    for name, value in step.knobs:
        engines.put_knob(engine, line, name, value)
    after = Setting(plan=plan, words=tuple(line.words), environment=setting.environment)
    flags = engines.FLAGS[engine]
    changed = difference(setting.words, line.words, (flags[name].names for name, _v in step.knobs if name in flags))
    return Change(setting=after, sentences=(step.sentence, *changed))


def with_plan(given: Sequence[str], plan: Plan) -> Setting:
    """Return the setting of a plan that was kept: its knobs in the engine's or the trainer's own flags."""
    engine = engine_of(given)
    environment: tuple[tuple[str, str], ...] = ()
    if engine:
        line = Words(given)
        for name, value in plan.knobs:
            engines.put_knob(engine, line, name, value)
        return Setting(plan=plan, words=tuple(line.words))
    words = fill_in(given, plan)
    if not has_places(given, plan):
        words = _with_flags(words, plan)
    if plan.get("alloc_conf"):
        environment = tuple((name, joined(name, str(plan.get("alloc_conf")))) for name in training.ALLOC_VARIABLES)
    return Setting(plan=plan, words=tuple(words), environment=environment)


def _with_flags(words: Sequence[str], plan: Plan) -> list[str]:
    """Write micro-batch, accumulation and recompute of a kept plan into flags that stand in the command line."""
    trainer = trainer_of(words)
    if trainer is None:
        return list(words)
    line = Words(words, assignments=trainer.name == "torchtune")
    pairs = (
        ("micro_batch", trainer.micro, trainer.micro_flag),
        ("grad_accum", trainer.accumulation, trainer.accumulation_flag),
    )
    for knob, names, flag in pairs:
        if plan.get(knob) is not None and names:
            line.put(names, str(plan.get(knob)), flag=flag)
    if plan.get("recompute") == "full":
        for names, flag, value in trainer.recompute:
            line.put(names, value, flag=flag)
    return line.words


def difference(before: Sequence[str], after: Sequence[str], spellings: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Say which flags of a command line changed; ``spellings``: those of each flag that may have."""
    found = []
    for names in spellings:
        old, new = Words(before, assignments=True).find(names), Words(after, assignments=True).find(names)
        if new is None or (old is not None and old.value == new.value):
            continue
        if old is None:
            found.append(
                _("command line: {flag} {new} is added").format(flag=new.word, new=new.value).replace("  ", " ")
            )
        else:
            sentence = _("command line: {flag} {old} becomes {new}")
            found.append(sentence.format(flag=new.word, old=old.value, new=new.value))
    return tuple(found)


def parse_knobs(text: str) -> dict[str, Value]:
    """Parse ``micro_batch=8,grad_accum=4,recompute=none``.

    Raises:
        InputError: not of that form.
    """
    found: dict[str, Value] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or not value:
            raise InputError(
                _("{text!r} is not a plan").format(text=text[:80]),
                where="--plan",
                remedy=_("write for example --plan micro_batch=8,grad_accum=4"),
            )
        found[name] = _value(value)
    Plan(knobs=tuple(found.items()))  # checks the names
    return found


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def why_not(words: Sequence[str], death: Death) -> str:
    """Say why nothing can be shrunk."""
    if death.found is not None and death.found.phase == "load":
        return _("memory ran out while the weights were loaded: no smaller batch changes that")
    if engine_of(words):
        return _("no smaller setting of the engine is left")
    trainer = trainer_of(words)
    if trainer is None and llama_factory_file(words) is None:
        return _(
            "nothing that can be shrunk is known: the command line gives no micro-batch with an accumulation, and the "
            "job keeps no plan (see --plan, or ullage.guard in the job)"
        )
    if trainer is not None and trainer.whole and Words(words).whole(trainer.whole) is None:
        return _("the global batch is not stated ({flag}): a smaller micro-batch would change it").format(
            flag="--" + trainer.whole[0].replace("_", "-")
        )
    return _("the micro-batch is as small as it gets, and recompute is on")
