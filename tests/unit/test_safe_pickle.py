"""Broken and malicious pickles: each is refused with one sentence, and nothing in it runs."""

import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path

import pytest

from ullage.errors import InputError
from ullage.observe import event_lane, pickle_opcodes, pickle_window, safe_pickle, snapshot_stream
from ullage.observe.pickle_limits import Limits
from ullage.observe.snapshot import parse_snapshot, read_snapshot

MARKER = "ULLAGE_PICKLE_RAN"
COMMAND = f"import os; os.environ[{MARKER!r}] = '1'".encode()


class Reduced:
    def __reduce__(self):
        return exec, (COMMAND.decode(),)


class Stated:
    def __init__(self):
        self.x = 1

    def __setstate__(self, state):
        os.environ[MARKER] = "1"


class WithKeywords:
    def __new__(cls, *, a=0):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"a": 1}


class Persisting(pickle.Pickler):
    def persistent_id(self, value):
        return "id" if value == "x" else None


def persisted(protocol):
    from io import BytesIO

    file = BytesIO()
    Persisting(file, protocol).dump(["x"])
    return file.getvalue()


def nested(opcode_open, opcode_close, depth):
    return b"\x80\x04" + opcode_open * depth + opcode_close * depth + b"."


def deep_tuple_key(depth):
    return b"\x80\x04}N" + b"\x85" * depth + b"Ns."


TEXT = b"\x8c" + bytes([len(COMMAND)]) + COMMAND
EVIL = {
    "GLOBAL os.system": b"cos\nsystem\n(S'true'\ntR.",
    "GLOBAL alone": b"cos\nsystem\n.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'true'\no.",
    "REDUCE by protocol 0": pickle.dumps(Reduced(), 0),
    "REDUCE by protocol 2": pickle.dumps(Reduced(), 2),
    "REDUCE by protocol 5": pickle.dumps(Reduced(), 5),
    "BUILD": pickle.dumps(Stated(), 4),
    "BUILD of a dict": b"\x80\x04}}b.",
    "NEWOBJ": pickle.dumps(Stated(), 2),
    "NEWOBJ_EX": pickle.dumps(WithKeywords(), 4),
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "PERSID": persisted(0),
    "BINPERSID": persisted(4),
    "hidden behind POP": b"\x80\x04cos\nsystem\n0}.",
    "hidden in a value of a dict": b"\x80\x04}\x8c\x08segmentscbuiltins\nexec\n" + TEXT + b"\x85Rs.",
    "DUP bomb": b"\x80\x04]" + b"2" * 100 + b".",
    "memo index, binary": b"\x80\x02]r\xff\xff\xff\x7f.",
    "memo index, text": b"]p4000000000\n.",
    "memo index, negative": b"]p-1\n.",
    "BINBYTES8 of 2^62 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "BINUNICODE8 of 2^63 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.",
    "BINUNICODE of 4 GiB": b"\x80\x02X\xff\xff\xff\xffx.",
    "BINSTRING of -1 bytes": b"T\xff\xff\xff\xffx.",
    "LONG4 of 2 GiB": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
    "LONG4 of 255 bytes": b"\x80\x02\x8b\xff\x00\x00\x00" + b"\x01" * 255 + b".",
    "LONG of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "INT of 100 digits": b"I" + b"9" * 100 + b"\n.",
    "FRAME beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 4) + b"abcd.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "READONLY_BUFFER": b"\x80\x05}\x98.",
    "EMPTY_SET": b"\x80\x04\x8f.",
    "FROZENSET": b"\x80\x04(K\x01\x91.",
    "tuples nested as a key": deep_tuple_key(200_000),
    "tuple nested through MARK": b"(" * 1000 + b"t" * 1000 + b".",
    "tuple kept under the number of a text": b"\x80\x02(X\x01\x00\x00\x00aq\x00K\x01\x85q\x00h\x00\x85t.",
    "tuple kept twice": b"\x80\x04(K\x01\x85\x94h\x00\x94h\x01\x85t.",
    "tuple that holds itself": b"\x80\x02]q\x00(h\x00tq\x01a.",
    "unhashable key": b"\x80\x04}]Ns.",
    "APPEND to a dict": b"\x80\x04}K\x01a.",
    "SETITEMS of an odd number": b"\x80\x04}(K\x01u.",
    "unknown opcode": b"\x80\x04\xff.",
    "protocol 6": b"\x80\x06}.",
    "protocol 255": b"\x80\xff}.",
    "empty file": b"",
    "only STOP": b".",
    "no STOP": b"\x80\x04}",
    "cut in an argument": b"\x80\x04J\x01\x02",
    "cut in a line": b"I123",
    "memo never written": b"\x80\x02h\x07.",
    "not UTF-8": b"\x80\x04\x8c\x02\xff\xfe.",
    "not a number": b"Ix\n.",
    "not a float": b"Fx\n.",
    "a zip file": b"PK\x03\x04" + b"\x00" * 40,
    "JSON": b'{"segments": []}',
    "text": b"hello world\n",
}


@pytest.fixture(autouse=True)
def nothing_ran():
    os.environ.pop(MARKER, None)
    yield
    assert os.environ.pop(MARKER, None) is None, "code in the pickle ran"


@pytest.mark.parametrize("name", EVIL)
def test_a_bad_pickle_is_refused(name, tmp_path):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(EVIL[name])
    with pytest.raises(InputError) as refused:
        safe_pickle.load(path)
    sentence = str(refused.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    assert len(sentence) < 600


def test_the_corpus_is_dangerous():
    """Without the lock the pickles do run: the corpus tests something."""
    for name in ("REDUCE by protocol 0", "REDUCE by protocol 2", "REDUCE by protocol 5"):
        pickle.loads(EVIL[name])
        assert os.environ.pop(MARKER) == "1", name


def test_nothing_is_imported_and_nothing_called(monkeypatch):
    """Python's own unpickler is not even there."""
    monkeypatch.delattr(pickle, "Unpickler")
    monkeypatch.delattr(pickle, "loads")
    monkeypatch.setattr("builtins.__import__", None)
    for name in ("GLOBAL os.system", "STACK_GLOBAL", "INST", "OBJ", "REDUCE by protocol 5", "PERSID", "BINPERSID"):
        with pytest.raises(InputError):
            safe_pickle.loads(EVIL[name])
    for module in (safe_pickle, pickle_window, pickle_opcodes, event_lane, snapshot_stream):
        assert not {"pickle", "_pickle", "getattr", "eval", "exec"} & set(vars(module))
        assert "__import__" not in Path(module.__file__).read_text()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(protocol):
    value = {
        "numbers": [0, 1, -1, 255, 256, 65535, 65536, 2**31, -(2**31), 2**62, 2**64 - 1, 1.5, -0.0],
        "texts": ["", "a", "ü" * 300, "x" * 70_000, b"", b"abc"] if protocol > 2 else ["", "a", "ü" * 300],
        "flags": [True, False, None],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, "a", None, 2.5, True), ("new", 2**40), ("new", "new", 7)],
        "nested": [{"a": [{"b": [[]]}]}],
    }
    assert safe_pickle.loads(pickle.dumps(value, protocol)) == value


def machine(data, *values):
    reader = safe_pickle.PlainReader(io.BytesIO(data), len(data))
    reader.stack.extend(values)
    return reader


def test_every_opcode_is_decided():
    """Each opcode of the language is either carried out or refused by name, and no other byte is either."""
    reader = machine(b".")
    inline = set(b"hj\x94K.")
    known = {bytes((at,)) for at in range(256) if at in inline or reader._slow[at] != reader._refused}
    refused = set(pickle_opcodes.REFUSED)
    assert not known & refused
    assert {opcode.code.encode("latin-1") for opcode in pickletools.opcodes} == known | refused


FIXED_ARGUMENTS = [one for one in pickletools.opcodes if one.code.encode("latin-1") not in pickle_opcodes.REFUSED]
#: Opcodes that only look right on a stack of some kind.
STACKS = {"APPEND": [[], 1], "SETITEM": [{}, 1, 1], "TUPLE1": [1], "TUPLE2": [1, 1], "TUPLE3": [1, 1, 1]}


@pytest.mark.parametrize("opcode", FIXED_ARGUMENTS, ids=lambda one: one.name)
def test_argument_lengths_are_those_of_the_language(opcode):
    """After each opcode the next one is found where it stands: a text that tells it apart."""
    width = 0 if opcode.arg is None else opcode.arg.n
    argument = bytes(width) if width >= 0 else b"0\n" if opcode.arg.name.startswith(("decimalnl", "float")) else None
    if argument is None:
        argument = {"stringnl": b"''\n", "unicodestringnl": b"\n"}.get(opcode.arg.name)
        argument = argument or bytes({-2: 1, -3: 4, -4: 4, -5: 8}[opcode.arg.n])
    marked = b"(" if opcode.name in ("APPENDS", "SETITEMS", "TUPLE", "LIST", "DICT") else b""
    code = opcode.code.encode("latin-1") + argument
    values = {"APPENDS": [[]], "SETITEMS": [{}]}.get(opcode.name, STACKS.get(opcode.name, [0]))
    reader = machine(marked + code + (b"" if opcode.name == "STOP" else b"\x8c\x03end."), *values)
    reader.memo[0] = "kept"
    reader.num_memoized = 1
    reader._run()
    assert reader.stack[-1] == ("end" if opcode.name != "STOP" else 0)


def test_limits_are_kept():
    limits = Limits(file_bytes=1000, opcodes=100, containers=10)
    for value in ("x" * 2000, [1] * 200 + ["a"] * 2, [[] for _ in range(20)]):
        with pytest.raises(InputError, match="limit"):
            safe_pickle.loads(pickle.dumps(value), limits=limits)
    assert safe_pickle.loads(pickle.dumps([[], 1]), limits=limits) == [[], 1]


def test_a_huge_memo_index_takes_no_memory():
    tracemalloc.start()
    with pytest.raises(InputError):
        safe_pickle.loads(EVIL["memo index, binary"])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_deep_lists_do_not_overflow_the_stack():
    depth = 100_000
    value = safe_pickle.loads(b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b".")
    with pytest.raises(InputError):
        parse_snapshot(value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path, said in ((tmp_path / "none.pickle", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=said):
            safe_pickle.load(path)


SEGMENT = {
    "device": 0, "address": 4096, "total_size": 2097152, "stream": 0, "segment_type": "small",
    "blocks": [{"size": 512, "requested_size": 4, "state": "active_allocated"}, {"size": 2096640, "state": "inactive"}],
}  # fmt: skip
ALLOC = {"action": "alloc", "addr": 4096, "size": 4, "stream": 0}


def snapshot(segment=None, event=None, **top):
    segment = {**SEGMENT, **(segment or {})}
    return {"segments": [segment], "device_traces": [[{**ALLOC, **(event or {})}]], **top}


def shared_list():
    blocks = list(SEGMENT["blocks"])
    return {"segments": [{**SEGMENT, "blocks": blocks} for _ in range(3)], "device_traces": []}


def endless():
    trace = []
    trace.append(trace)
    return {"segments": [], "device_traces": [trace]}


WRONG = {
    "a list of numbers": [1, 2],
    "a number": 7,
    "no segments": {"device_traces": []},
    "segments is a dict": {"segments": {}},
    "segment is a list": {"segments": [[]]},
    "address is a text": snapshot({"address": "0x10"}),
    "address is negative": snapshot({"address": -1}),
    "address is true": snapshot({"address": True}),
    "size is a float": snapshot({"total_size": 2097152.0}),
    "size is too large": snapshot({"total_size": 2**70}),
    "segment type": snapshot({"segment_type": "huge"}),
    "pool of one number": snapshot({"segment_pool_id": (1,)}),
    "pool of texts": snapshot({"segment_pool_id": ("a", "b")}),
    "blocks is none": snapshot({"blocks": None}),
    "blocks do not add up": snapshot({"blocks": SEGMENT["blocks"][:1]}),
    "block of no bytes": snapshot({"blocks": [{"size": 0, "state": "inactive"}]}),
    "block with a gap": snapshot({"blocks": [{"size": 2097152, "state": "inactive", "address": 9999}]}),
    "block state": snapshot({"blocks": [{"size": 2097152, "state": "free"}]}),
    "block state is a list": snapshot({"blocks": [{"size": 2097152, "state": []}]}),
    "more requested than there is": snapshot(
        {"blocks": [{"size": 2097152, "requested_size": 2**40, "state": "active_allocated"}]}
    ),
    "traces is a dict": {"segments": [], "device_traces": {}},
    "trace is a number": {"segments": [], "device_traces": [3]},
    "event is none": {"segments": [], "device_traces": [[None]]},
    "event without address": {"segments": [], "device_traces": [[{"action": "alloc", "size": 1, "stream": 0}]]},
    "event size is a text": snapshot(event={"size": "4"}),
    "blocks shared by segments": shared_list(),
    "a trace that holds itself": endless(),
    "too many devices": {"segments": [], "device_traces": [[] for _ in range(2000)]},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_one_error(name, tmp_path):
    path = tmp_path / "wrong.pickle"
    path.write_bytes(pickle.dumps(WRONG[name], 4))
    with pytest.raises(InputError) as refused:
        read_snapshot(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_strange_keys_are_named_and_left_out():
    found = parse_snapshot(snapshot({"colour": 1}, {"mood": 2, "user_metadata": "x"}, weather=3))
    text = " ".join(found.warnings)
    assert all(word in text for word in ("colour", "mood", "weather"))
    assert "user_metadata" not in text
    assert len(found.devices[0].recording) == 1
    strange = parse_snapshot(snapshot(event={"action": "dance"}))
    assert "dance" in " ".join(strange.warnings)
    assert len(strange.devices[0].recording) == 0


def test_the_layout_of_torch_2_0_is_read():
    history = [{"addr": 4096, "real_size": 100, "frames": [{"filename": "a.py", "name": "f", "line": 3}]}]
    old = {
        "segments": [
            {
                "device": 0, "address": 4096, "total_size": 2097152, "stream": 0, "segment_type": "small",
                "blocks": [
                    {"size": 512, "state": "active_allocated", "history": history},
                    {"size": 2096640, "state": "inactive", "history": []},
                ],
            }
        ]
    }  # fmt: skip
    memory = parse_snapshot(old).devices[0]
    assert memory.segments[0].blocks[0].requested_bytes == 100
    assert memory.stacks[4096] == (("f", "a.py", 3),)


def test_states_and_oom_of_other_versions_are_read():
    block = {"size": 2097152, "requested_size": 2097152, "state": "active_pending_free"}
    oom = {"action": "oom", "device_free": 5, "size": 1024, "stream": 0}
    found = parse_snapshot({"segments": [{**SEGMENT, "blocks": [block]}], "device_traces": [[oom]]}).devices[0]
    assert found.segments[0].blocks[0].awaiting
    assert found.ooms == [(0, 1024)]
