"""PYTORCH_ALLOC_CONF: what is refused, what is meant instead, and which variable is read."""

import pytest

from ullage.allocator.keys import KEYS, MEANT, NEWEST
from ullage.allocator.settings import from_environment, merge, normalise, parse_settings, parse_version, split_entries
from ullage.errors import InputError

MiB = 2**20


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("block_size:256M", "max_split_size_mb:256"),
        ("block_size:1G", "max_split_size_mb:1024"),
        ("max_split_size_mb:256M", "max_split_size_mb:256"),
        ("max_split_size_mb:1GiB", "max_split_size_mb:1024"),
        ("max_split_size_mb:x", "max_split_size_mb:256"),
        ("max_split_size_mb:19", "max_split_size_mb:20"),
        ("max_split_size_mb:-1", "max_split_size_mb:256"),
        ("max_split_size:128", "max_split_size_mb:128"),
        ("max_splt_size_mb:128", "max_split_size_mb:128"),
        ("large_segment_size_mb:8", "large_segment_size_mb:11"),
        ("expandable_segments:true", "expandable_segments:True"),
        ("expandable_segments:0", "expandable_segments:False"),
        ("expandable_segment:1", "expandable_segments:True"),
        ("garbage_collection_threshold:80", "garbage_collection_threshold:0.8"),
        ("garbage_collection_threshold:x", "garbage_collection_threshold:0.8"),
        ("gc_threshold:0.7", "garbage_collection_threshold:0.7"),
        ("roundup_power2_divisions:3", "roundup_power2_divisions:2"),
        ("roundup_power2_divisions:[3:4]", "roundup_power2_divisions:[256:1,512:2,>:4]"),
        ("pinned_num_register_threads:3", "pinned_num_register_threads:8"),
        ("backend:async", "backend:native"),
    ],
)
def test_the_nearest_legal_setting_is_named(text, nearest):
    with pytest.raises(InputError) as refused:
        parse_settings(text)
    assert str(refused.value).endswith(f"is {nearest}")
    assert parse_settings(nearest).text == nearest


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("expandable_segments:True,max_split_size_mb:64", "without end"),
        ("backend:cudaMallocAsync,max_split_size_mb:64", "ignores"),
        ("max_split_size_mb:64,max_split_size_mb:128", "twice"),
        ("cache:7", "known are"),
        ("max_split_size_mb", "not a setting"),
        ("roundup_power2_divisions:[256:1", "not a setting"),
        ("max_split_size_mb:999999999999", "takes 1 to"),
        ("max_split_size_mb:²", "ASCII"),
        ("max_split_size_mb:" + "9" * 400, "whole number"),
        ("block_size:" + "9" * 400 + "M", "nearest"),
        ("roundup_power2_divisions:²", "ASCII"),
        ("garbage_collection_threshold:nan", "share"),
        ("pinned_num_register_threads:²", "ASCII"),
        ("a" * 5000, "longer"),
    ],
)
def test_what_must_not_be_is_refused(text, word):
    with pytest.raises(InputError, match=word):
        parse_settings(text)


def test_expandable_segments_switched_off_go_with_a_split_size():
    assert parse_settings("expandable_segments:False,max_split_size_mb:64").max_split_size_bytes == 64 * MiB


def test_values_are_read_into_bytes():
    found = parse_settings("large_segment_size_mb:32,max_split_size_mb:64,per_process_memory_fraction:0.5")
    assert found.large_segment_size_bytes == 32 * MiB
    assert found.max_split_size_bytes == 64 * MiB
    assert found.max_non_split_rounding_bytes == 32 * MiB  # follows the segment size
    assert found.allowed_bytes(1001) == 500


@pytest.mark.parametrize(
    ("text", "version", "word"),
    [
        ("large_segment_size_mb:64", "2.10", "it came with 2.11"),
        ("per_process_memory_fraction:0.5", "2.9.1", "it came with 2.10"),
        ("max_non_split_rounding_mb:20", "2.5", "it came with 2.6"),
        ("roundup_bypass_threshold_mb:20", "2.1", "any more"),
        ("throw_on_cudamalloc_oom:True", "2.11.0+cu130", "it came with 2.12"),
    ],
)
def test_versions(text, version, word):
    with pytest.raises(InputError, match=word):
        parse_settings(text, version=parse_version(version))


def test_every_key_is_known_to_the_newest_version_or_gone():
    for name, key in KEYS.items():
        assert key.since <= NEWEST
        assert key.until is None or key.until >= key.since, name
    assert set(MEANT.values()) <= set(KEYS)


@pytest.mark.parametrize("text", ["1.13", "two", "", "2", "2.x", "99999.1"])
def test_bad_versions(text):
    with pytest.raises(InputError):
        parse_version(text)


def test_a_newer_version_is_a_warning():
    assert any("newer" in one for one in parse_settings("max_split_size_mb:64", version=(2, 30)).warnings)


def test_settings_that_do_nothing_are_said():
    assert parse_settings("garbage_collection_threshold:0.8").warnings
    assert not parse_settings("garbage_collection_threshold:0.8,per_process_memory_fraction:0.9").warnings


def test_normalise_and_merge():
    assert normalise(" expandable_segments : True , roundup_power2_divisions:[256:1, >:4], ") == (
        "roundup_power2_divisions:[256:1,>:4],expandable_segments:True"
    )
    assert merge("max_split_size_mb:64", "garbage_collection_threshold:0.8") == (
        "max_split_size_mb:64,garbage_collection_threshold:0.8"
    )
    assert merge("max_split_size_mb:64", "max_split_size_mb:128") == "max_split_size_mb:128"
    with pytest.raises(InputError):
        merge("max_split_size_mb:64", "expandable_segments:True")
    assert split_entries("") == []


def test_which_variable_is_read():
    both = {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "b:2"}
    name, text, ignored = from_environment(both)
    assert (name, text) == ("PYTORCH_CUDA_ALLOC_CONF", "b:2")
    assert "PYTORCH_ALLOC_CONF is not read" in ignored[0]
    new = {"PYTORCH_ALLOC_CONF": "a:1"}
    assert from_environment(new, version=(2, 10)) == ("PYTORCH_ALLOC_CONF", "a:1", ())
    name, text, ignored = from_environment(new, version=(2, 9))
    assert (name, text) == (None, "")
    assert "set PYTORCH_CUDA_ALLOC_CONF too" in ignored[0]
    hip = {"PYTORCH_HIP_ALLOC_CONF": "h:1"}
    assert from_environment(hip)[0] is None
    assert from_environment(hip, hip=True)[0] == "PYTORCH_HIP_ALLOC_CONF"
    assert from_environment({}) == (None, "", ())
