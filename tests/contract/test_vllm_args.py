"""Our list of vLLM's flags against vLLM's own parser, where it is installed."""

from __future__ import annotations

import importlib.util

import pytest

from ullage.catalog import load

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def test_every_flag_of_the_installed_parser_is_known() -> None:
    from vllm.entrypoints.common.cli_args import make_arg_parser  # type: ignore[import-not-found]
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found]

    data = load("engines/vllm_flags.json")
    known = {*data["valued"], *data["switches"], *data["older_valued"], *data["older_switches"]}
    spoken = {
        option.lstrip("-").replace("-", "_").removeprefix("no_")
        for action in make_arg_parser(FlexibleArgumentParser())._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert spoken - known - {"help"} == set()
