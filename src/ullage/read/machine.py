"""What people type for a machine → :class:`ullage.spec.machine.Machine`.

``8xH200``, ``2x8xH20`` (2 nodes of 8), ``H100-80GB-SXM``, ``A100-40GB``, ``24GiB`` (any card that reports so much),
``4x24GB card``. A card in the catalog whose memory is not the usual (a modded RTX 4090 with 48 GB) keeps its other
facts.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ullage.catalog import nearest
from ullage.catalog.gpus import entries, gpu_of
from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.machine import Gpu, Machine
from ullage.units import GB, GiB, parse_size

MAX_GPUS = 100_000
_TIMES = re.compile(r"\s*(\d{1,40})\s*[x×*]\s*", re.IGNORECASE)
#: The count behind the card, as schedulers write it (``H200:8``, ``H200x8``), or before it without a sign (``8 H200``).
_BEHIND = re.compile(r"(?P<card>.+?)\s*[:x×*]\s*(?P<count>\d{1,9})\s*", re.IGNORECASE)
_BEFORE = re.compile(r"\s*(?P<count>\d{1,9})\s+(?P<card>\S.*)")
_SIZE = re.compile(r"(?<![a-z0-9.])(\d{1,4}(?:\.\d{1,3})?) ?-?(gib|gb|mib|g)(?![a-z0-9])")
_STATED = re.compile(r"(\d{1,4}(?:\.\d{1,3})?) ?gib(?: usable)?\)?\s*$|\((\d{1,4}(?:\.\d{1,3})?)\)")
_FORMS = {"sxm": "sxm", "pcie": "pcie", "nvl": "nvl", "laptop": "laptop", "mobile": "laptop", "oam": "", "hgx": "sxm"}
#: Words that say nothing about which card it is.
_WORDS = frozenset(
    [
        "nvidia",
        "geforce",
        "amd",
        "radeon",
        "instinct",
        "tesla",
        "quadro",
        "huawei",
        "intel",
        "habana",
        "card",
        "gpu",
        "gpus",
        "with",
        "usable",
        "free",
        "graphics",
        "hbm3",
        "hbm3e",
        "hbm2e",
        "generation",
        "edition",
        "server",
        "workstation",
        "blackwell",
        "max-q",
        "class",
        "the",
        "a",
        "of",
        "rocm",
        "before",
        "loading",
    ]
)


def parse_machine(text: str) -> Machine:
    """Parse a machine as people write it.

    Raises:
        InputError: not a machine, or a card that is not known (the nearest names are given).
    """
    rest = _sign_first(text.strip())
    counts: list[int] = []
    while len(counts) < 2 and (match := _TIMES.match(rest)):
        counts.append(int(match.group(1)))
        rest = rest[match.end() :]
    if not rest or len(text) > 200:
        raise InputError(
            _("{text!r} is not a machine").format(text=text[:80]),
            remedy=_("write for example 8xH200, 2x8xH20, A100-40GB or 24GiB"),
        )
    if min(counts, default=1) < 1 or (product := _product(counts)) > MAX_GPUS:
        raise InputError(
            _("{text!r} has no usable number of GPUs").format(text=text[:80]),
            remedy=_("write a number from 1 to {limit:,}").format(limit=MAX_GPUS),
        )
    gpu = parse_gpu(rest)
    if len(counts) == 2:
        return Machine(gpu=gpu, num_nodes=counts[0], gpus_per_node=counts[1])
    if product > gpu.gpus_per_node > 1 and product % gpu.gpus_per_node == 0:
        return Machine(gpu=gpu, num_nodes=product // gpu.gpus_per_node, gpus_per_node=gpu.gpus_per_node)
    return Machine(gpu=gpu, gpus_per_node=product)


def _sign_first(text: str) -> str:
    """Return ``8xH200`` for ``H200:8``, ``H200x8`` and ``8 H200``; a text that names a card as it stands is kept."""
    if len(text) > 200 or _TIMES.match(text):
        return text
    try:
        parse_gpu(text)
    except InputError:
        found = _BEFORE.fullmatch(text) or _BEHIND.fullmatch(text)
        return f"{int(found['count'])}x{found['card']}" if found else text
    return text


def _product(counts: list[int]) -> int:
    product = 1
    for count in counts:
        product *= count
    return product


def parse_gpu(text: str) -> Gpu:
    """Find the card that ``text`` names, or make an anonymous one of the size that it states (see module)."""
    lowered = text.lower()
    if "+" in text:
        raise InputError(
            _("{text!r} mixes several cards").format(text=text[:80]),
            remedy=_("give one kind of GPU, such as 2xRTX5090"),
        )
    size = _SIZE.search(lowered)
    plain = re.sub(r"\([^)]*\)", _keep_form, lowered)
    words = re.findall(r"[a-z0-9.-]+", _SIZE.sub(" ", plain))
    tokens = [token for word in words for token in word.split("-") if token and token not in _WORDS]
    form = next((_FORMS[_bare(token)] for token in tokens if _bare(token) in _FORMS), "")
    core = "".join(token for token in tokens if _bare(token) not in _FORMS)
    if not core:
        if size is None:
            raise _unknown(text)
        return _anonymous(text, lowered, size)
    matches = [entry for entry in entries() if core in entry["aliases"] or core == _key(entry["name"])]
    if not matches:
        raise _unknown(text)
    matches = [entry for entry in matches if entry["form"] == form] or matches if form else _not_laptop(matches)
    if size is None:
        return _stated(gpu_of(matches[0]), lowered)
    nominal = _nominal_gb(size)
    same = [entry for entry in matches if abs(entry["nominal_gb"] - nominal) <= max(2.5, 0.07 * nominal)]
    if same:
        best = min(same, key=lambda entry: abs(entry["nominal_gb"] - nominal))
        return _stated(gpu_of(best), lowered)
    return _resized(gpu_of(matches[0]), matches[0], text, nominal)


def _keep_form(match: re.Match[str]) -> str:
    """Of a remark in brackets only the form counts: ``H200-141GB (NVL)``."""
    return " ".join(word for word in re.findall(r"[a-z]+", match.group()) if word in _FORMS)


def _bare(token: str) -> str:
    return token.rstrip("0123456789") if token[:3] == "sxm" else token


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _not_laptop(matches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in matches if entry["form"] != "laptop"] or matches


def _nominal_gb(size: re.Match[str]) -> float:
    return float(size.group(1)) / (1024 if size.group(2) == "mib" else 1)


def _stated(gpu: Gpu, lowered: str) -> Gpu:
    """Take a total that the text states in GiB, such as ``80GB card (79.10 GiB)``."""
    match = _STATED.search(lowered)
    if match is None or "free" in lowered:
        return gpu
    total = int(float(match.group(1) or match.group(2)) * GiB)
    if not gpu.total_bytes * 0.8 < total < gpu.total_bytes * 1.05:
        return gpu
    return replace(gpu, total_bytes=total, total_low_bytes=total, total_high_bytes=total, source=_("as typed"))


def _resized(gpu: Gpu, entry: dict[str, Any], text: str, nominal_gb: float) -> Gpu:
    """Return a card with other memory than usual: what the driver keeps is taken in the usual proportion."""
    scale = nominal_gb / entry["nominal_gb"]
    return replace(
        gpu,
        name=text.strip()[:60],
        total_bytes=int(gpu.total_bytes * scale),
        total_low_bytes=int(gpu.total_low_bytes * scale),
        total_high_bytes=int(max(gpu.total_high_bytes * scale, nominal_gb * GiB)),
        source=_("assumed: {name} with other memory, scaled in proportion").format(name=entry["name"]),
    )


def _anonymous(text: str, lowered: str, size: re.Match[str]) -> Gpu:
    """Return a card known by its size alone: GiB is what it reports; GB is what it is sold as."""
    stated = _STATED.search(lowered)
    if size.group(2) in ("gib", "mib") or (stated and "free" not in lowered):
        typed = size.group(1) + size.group(2) if not stated else f"{stated.group(1) or stated.group(2)}gib"
        total = parse_size(typed)
        return Gpu(
            name=text.strip(), total_bytes=total, total_low_bytes=total, total_high_bytes=total, source=_("as typed")
        )
    nominal = _nominal_gb(size)
    alike = [entry for entry in entries() if abs(entry["nominal_gb"] - nominal) < 0.5] or entries()
    shares = sorted(entry["total"]["value"] / entry["nominal_gb"] for entry in alike)
    low = min(entry["total"]["low"] / entry["nominal_gb"] for entry in alike)
    high = max(entry["total"]["high"] / entry["nominal_gb"] for entry in alike)
    return Gpu(
        name=text.strip(),
        total_bytes=int(shares[len(shares) // 2] * nominal),
        total_low_bytes=int(low * nominal),
        total_high_bytes=int(max(high * nominal, nominal * GB)),
        source=_("assumed: what cards sold with {size:g} GB report").format(size=nominal),
    )


def _unknown(text: str) -> InputError:
    names = nearest(text, [entry["name"] for entry in entries()])
    return InputError(
        _("the GPU {text!r} is not known").format(text=text[:80]),
        remedy=_("nearest are {names}; or give its memory, such as 24GiB").format(names=", ".join(names)),
    )
