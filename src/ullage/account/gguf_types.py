"""The storage types of ggml tensors: how many bytes a row of a type takes.

A row (the last axis of a checkpoint tensor, ``ne[0]`` in ggml) is stored as blocks of ``block_elements`` values in
``block_bytes`` bytes, after ``row_meta_bytes`` of its own (ik_llama.cpp's per-row scales).

Formula: row_bytes = row_meta_bytes + columns / block_elements x block_bytes
Source: gguf@0.19.0:gguf/constants.py:GGML_QUANT_SIZES (ggml-common.h block structs);
    ik_llama.cpp@8337e4cd:gguf-py/gguf/constants.py:GGML_QUANT_SIZES and ggml/src/ggml.c:type_traits (row_meta_size).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ullage.errors import InputError
from ullage.i18n import _


@dataclass(frozen=True, kw_only=True)
class GgmlType:
    """One storage type. ``number`` is its id in a GGUF header."""

    name: str
    number: int
    block_elements: int
    block_bytes: int
    row_meta_bytes: int = 0

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of ``columns`` values (which fill whole blocks, or the last one is padded)."""
        return self.row_meta_bytes + -(-columns // self.block_elements) * self.block_bytes

    def tensor_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of ``shape`` (slowest axis first, as in checkpoints)."""
        if not shape:
            return self.row_bytes(1)
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])


#: name: (number, elements of a block, bytes of a block, bytes per row)
_MAINLINE = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q8_1": (9, 32, 36),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "Q4_0_4_4": (31, 32, 18),
    "Q4_0_4_8": (32, 32, 18),
    "Q4_0_8_8": (33, 32, 18),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36),
    "Q1_0": (41, 128, 18),
}
_IK = {
    "Q6_0": (133, 32, 26),
    "IQ1_BN": (134, 64, 13, 2),
    "IQ2_BN": (135, 64, 16, 4),
    "IQ2_K": (137, 256, 76),
    "IQ3_K": (138, 256, 110),
    "IQ4_K": (139, 256, 144),
    "IQ5_K": (140, 256, 176),
    "IQ6_K": (141, 256, 212),
    "IQ4_KS": (144, 256, 136, 4),
    "IQ2_KS": (145, 256, 70, 2),
    "IQ4_KSS": (146, 256, 128, 4),
    "Q8_KV": (151, 32, 32, 8),
    "IQ5_KS": (152, 256, 168, 4),
    "IQ2_KT": (153, 256, 68, 4),
    "IQ3_KT": (154, 256, 100, 4),
    "IQ4_KT": (155, 256, 128, 4),
    "IQ3_KS": (156, 256, 102, 2),
    "IQ2_KL": (157, 256, 86, 2),
    "IQ1_KT": (158, 256, 56, 4),
    "Q4_0_R8": (202, 32, 18),
    "Q5_0_R4": (206, 32, 22),
    "Q8_0_R8": (208, 32, 34),
    "Q2_K_R4": (210, 256, 84),
    "Q3_K_R4": (211, 256, 110),
    "Q4_K_R4": (212, 256, 144),
    "Q5_K_R4": (213, 256, 176),
    "Q6_K_R4": (214, 256, 210),
    "IQ2_XXS_R4": (216, 256, 66),
    "IQ2_XS_R4": (217, 256, 74),
    "IQ3_XXS_R4": (218, 256, 98),
    "IQ1_S_R4": (219, 32, 6, 2),
    "IQ4_NL_R4": (220, 32, 18),
    "IQ3_S_R4": (221, 256, 110),
    "IQ2_S_R4": (222, 256, 82),
    "IQ4_XS_R8": (223, 256, 136),
    "IQ1_M_R4": (229, 32, 7, 2),
    "BF16_R16": (230, 1, 2),
    "Q6_0_R4": (233, 32, 26),
    "IQ2_BN_R4": (335, 64, 16, 4),
    "IQ2_K_R4": (337, 256, 76),
    "IQ3_K_R4": (338, 256, 110),
    "IQ4_K_R4": (339, 256, 144),
    "IQ5_K_R4": (340, 256, 176),
    "IQ4_KS_R4": (344, 256, 136, 4),
    "IQ5_KS_R4": (352, 256, 168, 4),
    "Q8_KV_R8": (398, 32, 32, 4),
    "Q8_K_R8": (399, 256, 258),
}


def _type(name: str, facts: tuple[int, ...]) -> GgmlType:
    number, elements, block_bytes, *meta = facts
    return GgmlType(
        name=name, number=number, block_elements=elements, block_bytes=block_bytes, row_meta_bytes=sum(meta)
    )


GGML_TYPES: dict[str, GgmlType] = {name: _type(name, facts) for name, facts in {**_MAINLINE, **_IK}.items()}
GGML_TYPES_BY_NUMBER: dict[int, GgmlType] = {kind.number: kind for kind in GGML_TYPES.values()}


def ggml_type(name: str) -> GgmlType:
    """Return the type called ``name`` (any case).

    Raises:
        InputError: no such type.
    """
    found = GGML_TYPES.get(name.strip().upper())
    if found is None:
        raise InputError(
            _("unknown ggml type {name!r}").format(name=name[:40]),
            remedy=_("known are {known}").format(known=", ".join(GGML_TYPES)),
        )
    return found
