"""The block formats of GGUF files: how many bytes a row of values takes in each ggml type.

Formula: bytes of a row of n values = row_bytes + ceil(n / block_size) x block_bytes.
Source: ggml (llama.cpp):ggml/src/ggml-common.h, the ``block_*`` structs; the numbers of the types are those of
``enum ggml_type`` in ggml.h. Types from 97 on, and the row scales, are ik_llama.cpp@8337e4cd3:ggml/include/ggml.h and
ggml/src/ggml.c:type_traits (``row_meta_size``).
"""

from __future__ import annotations

import math
from functools import lru_cache

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.units import WeightFormat


class GgmlType(Frozen):
    """One ggml type.

    Attributes:
        name: as in ``GGML_TYPE_<name>``.
        number: as stored in a GGUF file.
        block_size: values in a block; a row is a whole number of blocks.
        block_bytes: bytes of a block, scales included.
        row_bytes: bytes that each row has on top (ik_llama.cpp's types with one scale per row).
    """

    name: str
    number: int
    block_size: int
    block_bytes: int
    row_bytes: int = 0

    def tensor_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor; ``shape`` has the row length last."""
        columns = shape[-1] if shape else 1
        rows = math.prod(shape[:-1])
        return rows * (self.row_bytes + -(-columns // self.block_size) * self.block_bytes)


_MAINLINE = (
    GgmlType(name="F32", number=0, block_size=1, block_bytes=4),
    GgmlType(name="F16", number=1, block_size=1, block_bytes=2),
    GgmlType(name="Q4_0", number=2, block_size=32, block_bytes=18),
    GgmlType(name="Q4_1", number=3, block_size=32, block_bytes=20),
    GgmlType(name="Q5_0", number=6, block_size=32, block_bytes=22),
    GgmlType(name="Q5_1", number=7, block_size=32, block_bytes=24),
    GgmlType(name="Q8_0", number=8, block_size=32, block_bytes=34),
    GgmlType(name="Q8_1", number=9, block_size=32, block_bytes=36),
    GgmlType(name="Q2_K", number=10, block_size=256, block_bytes=84),
    GgmlType(name="Q3_K", number=11, block_size=256, block_bytes=110),
    GgmlType(name="Q4_K", number=12, block_size=256, block_bytes=144),
    GgmlType(name="Q5_K", number=13, block_size=256, block_bytes=176),
    GgmlType(name="Q6_K", number=14, block_size=256, block_bytes=210),
    GgmlType(name="Q8_K", number=15, block_size=256, block_bytes=292),
    GgmlType(name="IQ2_XXS", number=16, block_size=256, block_bytes=66),
    GgmlType(name="IQ2_XS", number=17, block_size=256, block_bytes=74),
    GgmlType(name="IQ3_XXS", number=18, block_size=256, block_bytes=98),
    GgmlType(name="IQ1_S", number=19, block_size=256, block_bytes=50),
    GgmlType(name="IQ4_NL", number=20, block_size=32, block_bytes=18),
    GgmlType(name="IQ3_S", number=21, block_size=256, block_bytes=110),
    GgmlType(name="IQ2_S", number=22, block_size=256, block_bytes=82),
    GgmlType(name="IQ4_XS", number=23, block_size=256, block_bytes=136),
    GgmlType(name="I8", number=24, block_size=1, block_bytes=1),
    GgmlType(name="I16", number=25, block_size=1, block_bytes=2),
    GgmlType(name="I32", number=26, block_size=1, block_bytes=4),
    GgmlType(name="I64", number=27, block_size=1, block_bytes=8),
    GgmlType(name="F64", number=28, block_size=1, block_bytes=8),
    GgmlType(name="IQ1_M", number=29, block_size=256, block_bytes=56),
    GgmlType(name="BF16", number=30, block_size=1, block_bytes=2),
    GgmlType(name="TQ1_0", number=34, block_size=256, block_bytes=54),
    GgmlType(name="TQ2_0", number=35, block_size=256, block_bytes=66),
    GgmlType(name="MXFP4", number=39, block_size=32, block_bytes=17),
    GgmlType(name="NVFP4", number=40, block_size=64, block_bytes=36),
    GgmlType(name="Q1_0", number=41, block_size=128, block_bytes=18),
)

#: Runtime and repacked types, and those that only ik_llama.cpp reads.
_IK_LLAMA = (
    GgmlType(name="Q4_0_4_4", number=31, block_size=32, block_bytes=18),
    GgmlType(name="Q4_0_4_8", number=32, block_size=32, block_bytes=18),
    GgmlType(name="Q4_0_8_8", number=33, block_size=32, block_bytes=18),
    GgmlType(name="Q8_0_X4", number=97, block_size=32, block_bytes=34),
    GgmlType(name="Q8_1_X4", number=98, block_size=32, block_bytes=36),
    GgmlType(name="Q8_2_X4", number=99, block_size=32, block_bytes=36),
    GgmlType(name="Q6_0", number=133, block_size=32, block_bytes=26),
    GgmlType(name="IQ1_BN", number=134, block_size=64, block_bytes=13, row_bytes=2),
    GgmlType(name="IQ2_BN", number=135, block_size=64, block_bytes=16, row_bytes=4),
    GgmlType(name="Q8_K64", number=136, block_size=64, block_bytes=68),
    GgmlType(name="IQ2_K", number=137, block_size=256, block_bytes=76),
    GgmlType(name="IQ3_K", number=138, block_size=256, block_bytes=110),
    GgmlType(name="IQ4_K", number=139, block_size=256, block_bytes=144),
    GgmlType(name="IQ5_K", number=140, block_size=256, block_bytes=176),
    GgmlType(name="IQ6_K", number=141, block_size=256, block_bytes=212),
    GgmlType(name="IQ4_KS", number=144, block_size=256, block_bytes=136, row_bytes=4),
    GgmlType(name="IQ2_KS", number=145, block_size=256, block_bytes=70, row_bytes=2),
    GgmlType(name="IQ4_KSS", number=146, block_size=256, block_bytes=128, row_bytes=4),
    GgmlType(name="Q8_K16", number=147, block_size=64, block_bytes=64, row_bytes=20),
    GgmlType(name="Q8_K32", number=148, block_size=256, block_bytes=296),
    GgmlType(name="Q8_KR8", number=149, block_size=256, block_bytes=296),
    GgmlType(name="Q8_K128", number=150, block_size=128, block_bytes=140),
    GgmlType(name="Q8_KV", number=151, block_size=32, block_bytes=32, row_bytes=8),
    GgmlType(name="IQ5_KS", number=152, block_size=256, block_bytes=168, row_bytes=4),
    GgmlType(name="IQ2_KT", number=153, block_size=256, block_bytes=68, row_bytes=4),
    GgmlType(name="IQ3_KT", number=154, block_size=256, block_bytes=100, row_bytes=4),
    GgmlType(name="IQ4_KT", number=155, block_size=256, block_bytes=128, row_bytes=4),
    GgmlType(name="IQ3_KS", number=156, block_size=256, block_bytes=102, row_bytes=2),
    GgmlType(name="IQ2_KL", number=157, block_size=256, block_bytes=86, row_bytes=2),
    GgmlType(name="IQ1_KT", number=158, block_size=256, block_bytes=56, row_bytes=4),
    GgmlType(name="Q4_0_R8", number=202, block_size=32, block_bytes=18),
    GgmlType(name="Q5_0_R4", number=206, block_size=32, block_bytes=22),
    GgmlType(name="Q8_0_R8", number=208, block_size=32, block_bytes=34),
    GgmlType(name="Q2_K_R4", number=210, block_size=256, block_bytes=84),
    GgmlType(name="Q3_K_R4", number=211, block_size=256, block_bytes=110),
    GgmlType(name="Q4_K_R4", number=212, block_size=256, block_bytes=144),
    GgmlType(name="Q5_K_R4", number=213, block_size=256, block_bytes=176),
    GgmlType(name="Q6_K_R4", number=214, block_size=256, block_bytes=210),
    GgmlType(name="IQ2_XXS_R4", number=216, block_size=256, block_bytes=66),
    GgmlType(name="IQ2_XS_R4", number=217, block_size=256, block_bytes=74),
    GgmlType(name="IQ3_XXS_R4", number=218, block_size=256, block_bytes=98),
    GgmlType(name="IQ1_S_R4", number=219, block_size=32, block_bytes=6, row_bytes=2),
    GgmlType(name="IQ4_NL_R4", number=220, block_size=32, block_bytes=18),
    GgmlType(name="IQ3_S_R4", number=221, block_size=256, block_bytes=110),
    GgmlType(name="IQ2_S_R4", number=222, block_size=256, block_bytes=82),
    GgmlType(name="IQ4_XS_R8", number=223, block_size=256, block_bytes=136),
    GgmlType(name="IQ1_M_R4", number=229, block_size=32, block_bytes=7, row_bytes=2),
    GgmlType(name="BF16_R16", number=230, block_size=1, block_bytes=2),
    GgmlType(name="Q6_0_R4", number=233, block_size=32, block_bytes=26),
    GgmlType(name="IQ2_BN_R4", number=335, block_size=64, block_bytes=16, row_bytes=4),
    GgmlType(name="IQ2_K_R4", number=337, block_size=256, block_bytes=76),
    GgmlType(name="IQ3_K_R4", number=338, block_size=256, block_bytes=110),
    GgmlType(name="IQ4_K_R4", number=339, block_size=256, block_bytes=144),
    GgmlType(name="IQ5_K_R4", number=340, block_size=256, block_bytes=176),
    GgmlType(name="IQ4_KS_R4", number=344, block_size=256, block_bytes=136, row_bytes=4),
    GgmlType(name="IQ5_KS_R4", number=352, block_size=256, block_bytes=168, row_bytes=4),
    GgmlType(name="MXFP4_R8", number=353, block_size=32, block_bytes=17),
    GgmlType(name="Q8_K_R16", number=397, block_size=256, block_bytes=258),
    GgmlType(name="Q8_KV_R8", number=398, block_size=32, block_bytes=32, row_bytes=4),
    GgmlType(name="Q8_K_R8", number=399, block_size=256, block_bytes=258),
)

GGML_TYPES: tuple[GgmlType, ...] = _MAINLINE + _IK_LLAMA
BY_NUMBER: dict[int, GgmlType] = {kind.number: kind for kind in GGML_TYPES}
BY_NAME: dict[str, GgmlType] = {kind.name: kind for kind in GGML_TYPES}


def ggml_type(name: str) -> GgmlType:
    """Return the type called ``name``, whatever the case: ``q8_0``, ``Q4_K``, ``iq4_ks``.

    Raises:
        InputError: there is no such type.
    """
    kind = BY_NAME.get(name.upper())
    if kind is None:
        raise InputError(
            _("unknown GGUF type {name!r}").format(name=name[:40]),
            remedy=_("known are {known}").format(known=", ".join(BY_NAME)),
        )
    return kind


@lru_cache(maxsize=256)
def ggml_format(name: str) -> WeightFormat:
    """Return the :class:`~ullage.units.WeightFormat` of a ggml type, for the weights term and for caches."""
    kind = ggml_type(name)
    return WeightFormat(name=kind.name, dtype="uint8", packed=(kind.block_size, kind.block_bytes, kind.row_bytes))
