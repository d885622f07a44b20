"""The stored forms of values that hold no other values: one tag each.

`encode` makes ``{"$tag": body}``; `DECODERS` opens a body. A body that is not in the form raises
one of `BAD_BODY`, which `values` turns into `CorruptError`. Nothing here runs code that a body names:
dtypes, devices and factories come from closed lists or strict grammars.
"""

from __future__ import annotations

import base64
import datetime as dt
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckptd.model.manifest import Tree

MAX_DIGITS = 4000
MAX_DIMS = 64
INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1

BAD_BODY = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError,
    MemoryError,
)  # fmt: skip

_INTEGER = re.compile(r"-?[0-9]{1,4000}", re.ASCII)
_DEVICE = re.compile(r"[a-z]{1,16}(:[0-9]{1,4})?", re.ASCII)
_NUMPY = re.compile(
    r"[<>|]([biufc][0-9]{1,2}|[SU][0-9]{1,8}|[Mm]8(\[[0-9]{0,6}(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)",
    re.ASCII,
)
_TORCH = {str(v)[6:]: v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_HERE = type(pathlib.Path())


def encode_text(value: str) -> Tree:
    """Return a string as it is, or tagged where it has no UTF-8 form (lone surrogates)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return {"$str": _b64(value.encode("utf-8", "surrogatepass"))}
    return value


def encode_int(value: int) -> Tree:
    """Return an integer as it is, or tagged where it does not fit into 64 bits.

    Raises:
        ValueError: it has more than `MAX_DIGITS` digits.
    """
    if INT_MIN <= value <= INT_MAX:
        return value
    if value.bit_length() > MAX_DIGITS * math.log2(10):
        raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
    return {"$int": str(value)}


def encode_float(value: float) -> Tree:
    """Return a float as it is, or tagged where it is not finite."""
    return value if math.isfinite(value) else {"$float": str(value)}


def encode_tensor(tensor: torch.Tensor) -> Tree:
    """Return a tensor with its bytes inline, for small tensors that differ between ranks."""
    whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    raw = whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
    return {"$data": [str(tensor.dtype)[6:], list(tensor.shape), _b64(raw)]}


def encode(value: Any) -> Tree:
    """Return the stored form of a value without children.

    Raises:
        ValueError: it has none; the text says what it is.
    """
    if value is None or type(value) is bool:
        return value
    known = _PLAIN.get(type(value))
    if known is not None:
        return known(value)
    tagged = _ENCODERS.get(type(value))
    if tagged is not None:
        return {tagged[0]: tagged[1](value)}
    if isinstance(value, np.generic):
        return {"$numpy": _encode_scalar(value)}
    raise ValueError(f"a value of type {type_name(value)}")


def type_name(value: object) -> str:
    """Return the name of a value's type as people know it."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _b64(raw: bytes | bytearray) -> str:
    return base64.b64encode(raw).decode("ascii")


def _unb64(body: Any) -> bytes:
    if type(body) is not str:
        raise ValueError("bytes that are not a string")
    return base64.b64decode(body, validate=True)


def _encode_array(array: npt.NDArray[Any]) -> list[Tree]:
    if not _NUMPY.fullmatch(array.dtype.str) or not array.dtype.itemsize:
        raise ValueError(f"an array of dtype {array.dtype}")
    return [array.dtype.str, list(array.shape), _b64(array.tobytes())]


def _encode_scalar(value: np.generic) -> list[Tree]:
    dtype, _, raw = _encode_array(np.asarray(value))
    if value.dtype.kind in "SU" and _decode_scalar([dtype, raw]) != value:
        raise ValueError("a numpy string that ends in NUL")
    return [dtype, raw]


def _encode_datetime(value: dt.datetime) -> list[Tree]:
    if value.tzinfo is not None and type(value.tzinfo) is not dt.timezone:
        raise ValueError(f"a datetime with a {type(value.tzinfo).__qualname__}")
    return [value.isoformat(), value.fold]


def _encode_complex(value: complex) -> list[Tree]:
    return [encode_float(value.real), encode_float(value.imag)]


_PLAIN: dict[type, Callable[[Any], Tree]] = {str: encode_text, int: encode_int, float: encode_float}
_ENCODERS: dict[type, tuple[str, Callable[[Any], Tree]]] = {
    bytes: ("$bytes", _b64),
    bytearray: ("$bytearray", _b64),
    complex: ("$complex", _encode_complex),
    np.ndarray: ("$ndarray", _encode_array),
    torch.dtype: ("$dtype", lambda value: str(value)[6:]),
    torch.device: ("$device", str),
    torch.Size: ("$size", list),
    _HERE: ("$path", lambda value: encode_text(str(value))),
    dt.datetime: ("$datetime", _encode_datetime),
    dt.date: ("$date", lambda value: value.isoformat()),
    dt.timedelta: ("$timedelta", lambda v: [v.days, v.seconds, v.microseconds]),
    range: ("$range", lambda v: [encode_int(v.start), encode_int(v.stop), encode_int(v.step)]),
}


def _exact(body: Any, kind: type) -> Any:
    if type(body) is not kind:
        raise ValueError(f"{type(body).__name__} in place of {kind.__name__}")
    return body


def _row(body: Any, *kinds: type) -> list[Any]:
    if len(_exact(body, list)) != len(kinds):
        raise ValueError("a body of the wrong length")
    return [_exact(item, kind) for item, kind in zip(body, kinds, strict=True)]


def _decode_text(body: Any) -> str:
    return _unb64(body).decode("utf-8", "surrogatepass")


def _decode_int(body: Any) -> int:
    if not _INTEGER.fullmatch(_exact(body, str)):
        raise ValueError("an integer that is not decimal digits")
    return int(body)


def _any_int(tree: Any) -> int:
    if type(tree) is dict and list(tree) == ["$int"]:
        return _decode_int(tree["$int"])
    return int(_exact(tree, int))


def _any_float(tree: Any) -> float:
    if type(tree) is dict and list(tree) == ["$float"]:
        return _decode_float(tree["$float"])
    return float(_exact(tree, float))


def _decode_float(body: Any) -> float:
    if _exact(body, str) not in ("nan", "inf", "-inf"):
        raise ValueError("a float that is neither nan nor infinite")
    return float(body)


def _decode_complex(body: Any) -> complex:
    real, imag = _exact(body, list)
    return complex(_any_float(real), _any_float(imag))


def _shape(body: Any) -> list[int]:
    shape = _exact(body, list)
    if len(shape) > MAX_DIMS or any(type(n) is not int or not 0 <= n <= INT_MAX for n in shape):
        raise ValueError("a shape that is not a row of extents")
    return list(shape)


def _numpy_dtype(body: Any) -> np.dtype[Any]:
    if not _NUMPY.fullmatch(_exact(body, str)):
        raise ValueError("a numpy dtype that is not on the list")
    dtype: np.dtype[Any] = np.dtype(body)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError("a numpy dtype without a size")
    return dtype


def _elements(dtype: np.dtype[Any], raw: bytes, count: int) -> npt.NDArray[Any]:
    if count * dtype.itemsize != len(raw):
        raise ValueError("bytes that do not fit dtype and shape")
    array = np.frombuffer(bytearray(raw), dtype=dtype, count=count)
    if dtype.kind == "b" and raw and max(raw) > 1:
        raise ValueError("a bool that is neither 0 nor 1")
    if dtype.kind == "U" and raw and int(array.view(dtype.byteorder + "u4").max()) > 0x10FFFF:
        raise ValueError("a string of characters that do not exist")
    return array


def _decode_array(body: Any) -> npt.NDArray[Any]:
    name, shape, raw = _exact(body, list)
    extents = _shape(shape)
    return _elements(_numpy_dtype(name), _unb64(raw), math.prod(extents)).reshape(extents)


def _decode_scalar(body: Any) -> Any:
    name, raw = _row(body, str, str)
    return _elements(_numpy_dtype(name), _unb64(raw), 1)[0]


def _decode_tensor(body: Any) -> torch.Tensor:
    name, shape, text = _exact(body, list)
    dtype, extents, raw = _TORCH[_exact(name, str)], _shape(shape), _unb64(text)
    if math.prod(extents) * dtype.itemsize != len(raw):
        raise ValueError("bytes that do not fit dtype and shape")
    if not raw:
        return torch.empty(extents, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(extents)


def _decode_device(body: Any) -> torch.device:
    if not _DEVICE.fullmatch(_exact(body, str)):
        raise ValueError("a device that is not type:index")
    return torch.device(body)


def _decode_path(body: Any) -> pathlib.Path:
    if type(body) is dict and list(body) == ["$str"]:
        return pathlib.Path(_decode_text(body["$str"]))
    return pathlib.Path(_exact(body, str))


def _decode_datetime(body: Any) -> dt.datetime:
    text, fold = _row(body, str, int)
    return dt.datetime.fromisoformat(text).replace(fold=fold)


def _decode_timedelta(body: Any) -> dt.timedelta:
    days, seconds, microseconds = _row(body, int, int, int)
    return dt.timedelta(days, seconds, microseconds)


def _decode_range(body: Any) -> range:
    start, stop, step = _exact(body, list)
    return range(_any_int(start), _any_int(stop), _any_int(step))


DECODERS: dict[str, Callable[[Any], object]] = {
    "$str": _decode_text,
    "$int": _decode_int,
    "$float": _decode_float,
    "$bytes": _unb64,
    "$bytearray": lambda body: bytearray(_unb64(body)),
    "$complex": _decode_complex,
    "$ndarray": _decode_array,
    "$numpy": _decode_scalar,
    "$data": _decode_tensor,
    "$dtype": lambda body: _TORCH[_exact(body, str)],
    "$device": _decode_device,
    "$size": lambda body: torch.Size(_shape(body)),
    "$path": _decode_path,
    "$datetime": _decode_datetime,
    "$date": lambda body: dt.date.fromisoformat(_exact(body, str)),
    "$timedelta": _decode_timedelta,
    "$range": _decode_range,
}
