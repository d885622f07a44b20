from __future__ import annotations

import base64
import collections
import contextlib
import datetime as dt
import enum
import math
import pathlib
import pickle
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import CorruptError, UnsupportedValueError
from ckptd.trainer.values import (
    MAX_DEPTH,
    InlineTensors,
    PerRank,
    decode_value,
    encode_value,
    tensor_names,
)


class Sink(dict):
    def add(self, fqn, tensor):
        assert fqn not in self
        self[fqn] = tensor
        return {"$tensor": fqn}


def encode(value, **options):
    return encode_value(value, path="v", tensors=Sink(), **options)


def through(value):
    """Encode, send through real JSON, decode."""
    sink = Sink()
    tree = encode_value(value, path="v", tensors=sink)
    tree = msgspec.json.decode(msgspec.json.encode(tree))
    assert sorted(tensor_names(tree)) == sorted(sink)
    return decode_value(tree, tensors=sink)


def same(a, b) -> bool:  # noqa: PLR0911 - one return a type
    if type(a) is not type(b):
        return False
    if isinstance(a, (float, complex)):
        return repr(a) == repr(b)  # tells -0.0, and lets nan be itself
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a, b)) and all(map(same, a.values(), b.values()))
    if isinstance(a, (list, tuple, deque)):
        if isinstance(a, deque) and a.maxlen != b.maxlen:
            return False
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**200), 2**200), st.floats(),
    st.text(), st.text(st.characters()), st.binary(max_size=20), st.complex_numbers(),
    st.dates(), st.datetimes(), st.timedeltas(),
    st.datetimes(timezones=st.just(dt.timezone(dt.timedelta(hours=-3, minutes=7)))),
    st.sampled_from([torch.float32, torch.device("cuda:1"), torch.Size([2, 0]), slice(1, None, -2),
                     range(5, -(2**70), -3), pathlib.Path("/a/b"), bytearray(b"x")]),
)  # fmt: skip
hashables = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(),
    st.tuples(st.integers(), st.text()), st.frozensets(st.integers() | st.text()),
)  # fmt: skip


def containers(inner):
    pairs = st.dictionaries(hashables, inner, max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        pairs,
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        pairs.map(OrderedDict),
        pairs.map(lambda d: defaultdict(list, d)),
        st.dictionaries(hashables, st.integers(), max_size=4).map(Counter),
        st.sets(hashables, max_size=4),
        st.builds(deque, st.lists(inner, max_size=4), st.sampled_from([None, 4, 9])),
    )


@given(st.recursive(scalars, containers, max_leaves=20))
def test_every_value_comes_back_with_its_type(value) -> None:
    assert same(through(value), value)


DTYPES = [
    "?",
    "i1",
    "<u2",
    ">i4",
    "<f2",
    ">f8",
    "<c16",
    "S5",
    "<U3",
    "<m8[ns]",
    "<M8[us]",
    "<M8[D]",
]


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.data())
def test_arrays_come_back_bit_for_bit(dtype, shape, data) -> None:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = data.draw(st.binary(min_size=size, max_size=size))
    if dtype == "?":
        raw = bytes(b & 1 for b in raw)
    if dtype == "<U3":
        raw = bytes(size)
    array = np.frombuffer(raw, dtype).reshape(shape)
    assert same(through(array), array)
    assert through(array).flags.writeable
    fortran = np.asfortranarray(array)
    assert through(fortran).tolist() == fortran.tolist() or array.dtype.kind in "fc"


@pytest.mark.parametrize(
    "scalar",
    [np.float32(1.5), np.int8(-3), np.bool_(True), np.str_("ab"), np.bytes_(b"x"),
     np.datetime64("2020-01-01"), np.timedelta64(5, "s"), np.complex64(1j), np.str_(""),
     np.datetime64("NaT")],
)  # fmt: skip
def test_numpy_scalars_stay_numpy_scalars(scalar) -> None:
    back = through(scalar)
    assert type(back) is type(scalar)
    assert back.dtype == scalar.dtype or scalar.dtype.itemsize == 0
    assert back == scalar or (np.isnat(back) and np.isnat(scalar))


def test_tensors_go_to_the_sink_under_dotted_names() -> None:
    sink = Sink()
    t = torch.arange(3)
    tree = encode_value({"a": [0, (t,)], 7: t.float()}, path="ema", tensors=sink)
    assert list(sink) == ["ema.a.1.0", "ema.7"]
    assert sink["ema.a.1.0"] is t
    back = decode_value(tree, tensors=sink)
    assert back["a"][1][0] is t


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.complex64, torch.bool])
def test_a_per_rank_tensor_is_stored_inline(dtype) -> None:
    tensor = torch.arange(6).to(dtype).reshape(2, 3).t()
    tree = encode(PerRank({"g": tensor, "none": torch.empty(0, 4), "zero": torch.tensor(2.0)}))
    assert list(tree) == ["$per_rank"]
    assert list(tensor_names(tree)) == []
    back = decode_value(msgspec.json.decode(msgspec.json.encode(tree)), tensors={})
    assert isinstance(back, PerRank)
    assert torch.equal(back.value["g"], tensor)
    assert back.value["g"].dtype == dtype
    assert back.value["none"].shape == (0, 4)
    assert back.value["zero"].shape == ()


def test_a_large_per_rank_tensor_is_refused() -> None:
    with pytest.raises(UnsupportedValueError, match=r"v\.big"):
        encode(PerRank({"big": torch.zeros(300_000)}))
    assert InlineTensors().add("x", torch.zeros(3))["$data"][1] == [3]


def test_equal_sets_have_equal_forms() -> None:
    a, b = {8, 0}, {0, 8}
    big = {f"k{i}" for i in range(50)}
    assert encode(a) == encode(b)
    assert encode(big) == encode({f"k{i}" for i in reversed(range(50))})
    assert encode({"x", "a"})["$set"] == ["a", "x"]


class Color(enum.IntEnum):
    RED = 1


class Pair(NamedTuple):
    a: int


class Dict(dict):
    pass


REFUSED = [
    Color.RED, Pair(1), Dict(), object(), lambda: 0, torch.Generator(), 10**5000,
    defaultdict(lambda: 0), np.array([object()]), np.zeros(1, [("a", "i4")]), np.ma.array([1]),
    collections.ChainMap(), sys, memoryview(b"x"), str, np.zeros((), "V3"),
]  # fmt: skip


@pytest.mark.parametrize("value", REFUSED, ids=lambda v: type(v).__name__)
def test_what_has_no_safe_form_is_refused_by_path(value) -> None:
    with pytest.raises(
        UnsupportedValueError,
        match=r"^v\.outer\.1: .*Checkpointer with allow_pickle=True, .* runs code",
    ) as error:
        encode({"outer": [0, value]})
    assert error.value.fqn == "v.outer.1"


def test_the_refusal_names_the_type() -> None:
    with pytest.raises(UnsupportedValueError, match="Pair"):
        encode(Pair(1))
    with pytest.raises(UnsupportedValueError, match=r"types\.SimpleNamespace"):
        encode(type(sys.implementation)())


def test_pickles_need_both_permissions() -> None:
    tree = encode({"p": Pair(3)}, allow_pickle=True)
    assert list(tree["p"]) == ["$pickle"]
    with pytest.raises(UnsupportedValueError, match="trust_pickle"):
        decode_value(tree, tensors={})
    assert decode_value(tree, tensors={}, trust_pickle=True) == {"p": Pair(3)}
    with pytest.raises(CorruptError):
        decode_value({"$pickle": "AAAA"}, tensors={}, trust_pickle=True)
    with pytest.raises(UnsupportedValueError, match="cannot be pickled"):
        encode(lambda: 0, allow_pickle=True)


def test_cycles_and_depth_are_refused() -> None:
    loop: list = []
    loop.append({"x": loop})
    with pytest.raises(UnsupportedValueError, match="holds itself"):
        encode(loop)
    deep: object = 0
    for _ in range(MAX_DEPTH // 2):  # a tuple has two brackets in its stored form
        deep = (deep,)
    assert through(deep) == deep
    with pytest.raises(UnsupportedValueError, match="nested too deeply"):
        encode((deep,))
    cell = PerRank(None)
    cell.value = [cell]
    with pytest.raises(UnsupportedValueError, match="holds itself"):
        encode(cell)


def test_a_value_held_twice_is_no_cycle() -> None:
    shared = [1]
    assert through([shared, shared, {"a": shared}]) == [[1], [1], {"a": [1]}]


# --- hostile trees ------------------------------------------------------------------------------

HOSTILE = [
    {"$int": "1" * 4001}, {"$int": "0x10"}, {"$int": 5}, {"$int": "\uff11"}, {"$int": "1_0"},
    {"$float": "1e999"}, {"$float": "NAN"}, {"$float": 0.5}, {"$nope": 1}, {"$tuple": 1},
    {"$tuple": {"a": 1}}, {"$set": [[1]]}, {"$set": [{"$dict": []}]}, {"$bytes": "?"},
    {"$bytes": "AA=A"}, {"$bytes": 3}, {"$complex": [1.0]}, {"$complex": [1, 2]},
    {"$dict": [[1]]}, {"$dict": [[1, 2], [1, 3]]}, {"$dict": [[[], 0]]}, {"$dict": "ab"},
    {"$ordered": {"a": 1}}, {"$counter": [1]}, {"$defaultdict": ["eval", []]},
    {"$defaultdict": ["__import__", []]}, {"$defaultdict": [[], []]}, {"$defaultdict": []},
    {"$deque": [-1, []]}, {"$deque": [2**70, []]}, {"$deque": [True, []]}, {"$deque": [None]},
    {"$ndarray": ["|O", [1], "AAAAAAAAAAA="]}, {"$ndarray": ["O", [1], "AAAAAAAAAAA="]},
    {"$ndarray": ["<f4", [2**62, 4], ""]}, {"$ndarray": ["<f4", [0, 2**62, 2**62], ""]},
    {"$ndarray": ["<f4", [-1], "AAAAAA=="]}, {"$ndarray": ["<f4", [True], "AAAAAA=="]},
    {"$ndarray": ["<f4", [1.0], "AAAAAA=="]}, {"$ndarray": ["<f4,<f4", [1], "AAAAAAAAAAA="]},
    {"$ndarray": ["V4", [1], "AAAAAA=="]}, {"$ndarray": ["<f3", [1], "AAAA"]},
    {"$ndarray": ["<U0", [2**40], ""]}, {"$ndarray": ["|S0", [9], ""]},
    {"$ndarray": ["<U1", [1], "////fw=="]}, {"$ndarray": ["|b1", [1], "Ag=="]},
    {"$ndarray": ["<f4", [1] * 100, "AAAAAA=="]}, {"$ndarray": [1, 2, 3]},
    {"$numpy": ["<f4", ""]}, {"$numpy": ["<f4", "AAAAAAAAAAA="]}, {"$numpy": ["<f4"]},
    {"$data": ["float32", [2**62], ""]}, {"$data": ["__name__", [1], ""]},
    {"$data": ["float32", [1], "AAAAAAAA"]}, {"$data": ["load", [0], ""]},
    {"$dtype": "load"}, {"$dtype": "__builtins__"}, {"$dtype": []}, {"$device": "cuda:x"},
    {"$device": "nosuch:1"}, {"$device": "cpu;"}, {"$device": 1}, {"$size": [-1]},
    {"$size": [True]}, {"$size": [2**64]}, {"$path": 1}, {"$path": {"$str": "?"}},
    {"$datetime": "2020"}, {"$datetime": ["2020", 0]}, {"$datetime": ["2020-01-01T00:00:00", 7]},
    {"$date": "2020-13-01"}, {"$timedelta": [10**12, 0, 0]}, {"$timedelta": [1.5, 0, 0]},
    {"$slice": [1]}, {"$range": [0, 1, 0]}, {"$range": [0, 1]}, {"$range": [0, 1, True]},
    {"$tensor": "no.such"}, {"$tensor": ["a"]}, {"$tensor": None}, {"$str": "/w"}, {"a": 1, "$b": 2},
    {"$tuple": [], "$set": []}, {1: 2}, {"$per_rank": {"$x": 1}}, 2**64, -(2**63) - 1,
    float("nan"), float("inf"), b"raw", (1,), {1}, object(),
]  # fmt: skip


@pytest.mark.parametrize(
    "tree", HOSTILE, ids=lambda t: "an object" if type(t) is object else str(t)[:40]
)
def test_a_hostile_tree_is_corrupt(tree) -> None:
    for hostile in (tree, [tree], {"k": tree}, {"$tuple": [tree]}):
        with pytest.raises(CorruptError):
            decode_value(hostile, tensors={})


def test_depth_bombs_are_corrupt() -> None:
    for wrap in (
        lambda t: [t],
        lambda t: {"a": t},
        lambda t: {"$tuple": [t]},
        lambda t: {"$per_rank": t},
    ):
        tree: object = 0
        for _ in range(5000):
            tree = wrap(tree)
        with pytest.raises(CorruptError):
            decode_value(tree, tensors={})


TAGS = ["$int", "$float", "$tuple", "$set", "$frozenset", "$bytes", "$bytearray", "$complex", "$dict",
        "$ordered", "$defaultdict", "$counter", "$deque", "$ndarray", "$numpy", "$data", "$dtype",
        "$device", "$size", "$path", "$datetime", "$date", "$timedelta", "$slice", "$range",
        "$tensor", "$pickle", "$per_rank", "$str"]  # fmt: skip
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats()
    | st.sampled_from(["", "AAAA", "<f4", "float32", "int", "1", "nan", "cpu", "2020-01-01", "|S4", "<M8[0s]"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from([*TAGS, "a", "b"]), inner, max_size=2)
    | st.builds(lambda t, b: {t: b}, st.sampled_from(TAGS), inner),
    max_leaves=12,
)  # fmt: skip


@given(st.builds(lambda t, b: {t: b}, st.sampled_from(TAGS), junk))
@settings(max_examples=500)
def test_junk_decodes_or_is_refused_and_nothing_else(tree) -> None:
    with contextlib.suppress(CorruptError, UnsupportedValueError):
        decode_value(tree, tensors={})


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


# An audit hook cannot be taken off again: it watches only while this is not None.
_watched: list[str] | None = None
_DANGEROUS = ("pickle.", "exec", "compile", "subprocess.", "os.system", "os.exec", "import", "open")


def _audit(event: str, _args: object) -> None:
    if _watched is not None and event.startswith(_DANGEROUS):
        _watched.append(event)


def test_s1_no_stored_value_runs_code() -> None:
    global _watched  # noqa: PLW0603
    bomb = base64.b64encode(pickle.dumps(Bomb())).decode()
    corpus = [
        {"$pickle": bomb},
        {"$ndarray": ["|O", [1], bomb]},
        {"$bytes": bomb},
        {"$data": [bomb, [], bomb]},
    ]
    corpus += [{tag: bomb} for tag in TAGS] + [t for t in HOSTILE if isinstance(t, dict)]
    for tree in corpus:  # what is imported lazily is imported now
        _try(tree)
    sys.addaudithook(_audit)
    _watched = []
    try:
        for tree in corpus:
            _try(tree)
        seen = list(_watched)
        pickle.loads(pickle.dumps(Pair(1)))
        assert len(_watched) > len(seen), "the hook sees nothing"
    finally:
        _watched = None
    assert seen == []


def _try(tree) -> None:
    with contextlib.suppress(CorruptError, UnsupportedValueError):
        decode_value(tree, tensors={})
