"""What tells arrays and programs from others, in few numbers that are the same in every process."""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.devices import processes
from jaxtransfer.devices.parts import is_split

_TOLERANCE = 1e-4  # of the norm; what is computed anew on other devices differs by its rounding, far less than that
_WIDTH = 4096
_ROWS = 1024  # rows of that width which are summed up at a time
_WHOLE = 2**28  # bytes of an array up to which every byte counts; of more, rows spread over it
_ADDRESS = re.compile(r"0x[0-9a-f]+")
_PLACES = ("sharding", "layout", "mesh", "device", "axis_resources")  # parameters that say where, not what
_SILENT = {"name", "debug_info", "effects", "donated_invars", "keep_unused", "inline", "compiler_options_kvs"}


def of_tree(values: Any) -> dict[str, Any]:
    """Returns the fingerprint of each leaf by its path, JSON types.

    Where leaves are split over processes all of these ask for it at once; each looks at its own parts.
    """
    leaves = tree.leaves_by_path(values)
    split = {path: leaf for path, leaf in leaves.items() if is_split(leaf)}
    return {path: None if path in split else of_array(leaf) for path, leaf in leaves.items()} | _of_split(split)


def of_array(array: Any) -> Any:
    """Returns what tells an array from others.

    Floating numbers give their type, their norm and their projection on a fixed direction, so that they can be
    compared up to rounding: weights that are computed anew on another machine are the same ones. Anything else gives a
    digest of its bytes.
    """
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    kind = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = array.astype(np.complex128).view(np.float64)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return [kind, *_norm_and_projection(array.reshape(-1))]
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    if array.nbytes > _WHOLE and len(array) > 1:
        count = max(1, _WHOLE * len(array) // array.nbytes)
        array = array[np.linspace(0, len(array) - 1, count).round().astype(np.int64)]
    digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return digest.hexdigest()


def of_program(function: Callable, *arguments: Any) -> dict[str, Any]:
    """Returns what tells the program of a pure function from others, by tracing it; nothing is compiled or computed.

    Everything counts that the traced function computes with: shapes, hyper-parameters, schedules, arrays that it has
    captured. Names of functions, their place in memory and where arrays live do not.

    Args:
      function: any that JAX can trace.
      *arguments: arrays, or what has a shape and a type.
    """
    writer = _Writer()
    writer.closed(jax.make_jaxpr(function)(*_shapes_of(arguments)))
    return {"program": writer.digest.hexdigest(), "constants": writer.constants}


def same(one: Any, other: Any) -> bool:
    """Returns whether two fingerprints, or JSON values that hold some, are equal up to rounding of the arrays."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        if len(one) == len(other) == 3 and isinstance(one[0], str) and isinstance(one[2], float):
            return one[0] == other[0] and _close(one[1:], other[1:])
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def _close(one: list, other: list) -> bool:
    if not all(isinstance(number, float) and math.isfinite(number) for number in (*one, *other)):
        return repr(one) == repr(other)
    return all(abs(a - b) <= _TOLERANCE * max(one[0], other[0]) for a, b in zip(one, other, strict=True))


def _of_split(leaves: dict[str, jax.Array]) -> dict[str, Any]:
    """Returns the fingerprints of arrays that are split over processes, each of which adds up what it holds."""
    if not leaves:
        return {}
    floating = {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    sums = np.zeros((len(floating), 2))
    for row, leaf in zip(sums, floating.values(), strict=True):
        for part in leaf.addressable_shards:
            if part.replica_id == 0:
                row += _squares_and_projection(np.asarray(part.data), part.index, leaf.shape)
    found = {}
    for (path, leaf), (squares, projection) in zip(floating.items(), processes.summed(sums), strict=True):
        kind = f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
        found[path] = [kind, math.sqrt(squares) if squares >= 0 else float(squares), float(projection)]
    rest = {path: of_array(processes.on_host(leaf)) for path, leaf in leaves.items() if path not in floating}
    return found | rest


def _squares_and_projection(part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[float, float]:
    """Returns what a part of an array adds to the square of its norm and to its projection."""
    columns, squares, projection = _direction("columns", _WIDTH), 0.0, 0.0
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    first, *others = [
        np.arange(*one.indices(length)) * stride for one, length, stride in zip(index, shape, strides, strict=True)
    ]
    inner = np.zeros((1,) * len(others), np.int64)
    for dimension, places in enumerate(others):
        inner = inner + places.reshape(-1, *[1] * (len(others) - 1 - dimension))
    step = max(1, _WIDTH * _ROWS // max(1, inner.size))
    for start in range(0, len(part), step):
        values = part[start : start + step].astype(np.float64).reshape(-1)
        places = (first[start : start + step].reshape(-1, *[1] * len(others)) + inner).reshape(-1)
        lines, lowest = places // _WIDTH, int(places.min()) // (_WIDTH * _ROWS)
        blocks = range(lowest, int(places.max()) // (_WIDTH * _ROWS) + 1)
        rows = np.concatenate([_direction(f"rows {number}", _ROWS) for number in blocks])
        squares += float(values @ values)
        projection += float(values @ (columns[places % _WIDTH] * rows[lines - lowest * _ROWS]))
    return squares, projection


def _norm_and_projection(values: np.ndarray) -> tuple[float, float]:
    columns, squares, projection = _direction("columns", _WIDTH), 0.0, 0.0
    dtype = np.float64 if values.dtype == np.float64 else np.float32
    block = _WIDTH * _ROWS
    for number, start in enumerate(range(0, len(values), block)):
        part = values[start : start + block].astype(dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            squares += float(np.dot(part, part))
            part = np.pad(part, (0, -len(part) % _WIDTH)).reshape(-1, _WIDTH)
            sums = (part @ columns.astype(dtype)).astype(np.float64)
            projection += float(sums @ _direction(f"rows {number}", _ROWS)[: len(sums)])
    return math.sqrt(squares) if squares >= 0 else squares, projection


def _direction(name: str, count: int) -> np.ndarray:
    """Returns numbers of unit variance, of a hash: the same under every version of NumPy."""
    words = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * count), "<u2")
    return (words / 65535 - 0.5) * math.sqrt(12)


def _shapes_of(values: Any) -> Any:
    """Returns the shapes and types that a program sees, without the mesh that an array may live on."""
    seen = jax.eval_shape(lambda values: values, values)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), seen)


class _Writer:
    """Writes a traced program into a digest, its variables numbered, its captured arrays set apart."""

    def __init__(self):
        self.digest = hashlib.blake2b(digest_size=16)
        self.constants: list[Any] = []

    def put(self, *words: Any) -> None:
        self.digest.update(("\0".join(map(str, words)) + "\n").encode())

    def closed(self, program: jax.extend.core.ClosedJaxpr) -> None:
        for constant in program.consts:
            self.value(constant)
        self.open(program.jaxpr)

    def open(self, program: jax.extend.core.Jaxpr) -> None:
        numbers: dict[Any, int] = {}

        def word(atom: Any) -> str:
            if isinstance(atom, jax.extend.core.Literal):
                self.value(atom.val)
                return f"literal:{_type(atom.aval)}"
            return f"{numbers.setdefault(atom, len(numbers))}:{_type(atom.aval)}"

        self.put("in", *map(word, (*program.constvars, *program.invars)))
        for equation in program.eqns:
            self.put(equation.primitive.name)
            for name, value in sorted(equation.params.items()):
                if name not in _SILENT and not any(place in name for place in _PLACES):
                    self.put(name)
                    self.value(value)
            self.put(*map(word, equation.invars), "to", *map(word, equation.outvars))
        self.put("out", *map(word, program.outvars))

    def constant(self, value: Any) -> None:
        """Writes a captured array: a scalar as it is, since it is a hyper-parameter, others up to rounding."""
        if np.ndim(value) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
            self.put("constant", len(self.constants))
            self.constants.append(of_array(value))
        else:
            self.put(value.dtype, repr(np.asarray(value).item()))

    def value(self, value: Any) -> None:
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            self.closed(value)
        elif isinstance(value, jax.extend.core.Jaxpr):
            self.open(value)
        elif hasattr(value, "__array__") or isinstance(value, jax.Array):
            self.constant(value)
        elif isinstance(value, Mapping):
            for key, entry in sorted(value.items(), key=lambda item: str(item[0])):
                self.put("key", key)
                self.value(entry)
        elif isinstance(value, list | tuple):
            self.put("list", len(value))
            for entry in value:
                self.value(entry)
        elif isinstance(value, set | frozenset):
            self.put("set", *sorted(map(str, value)))
        elif callable(value) and not isinstance(value, type | np.dtype):
            self.put("function")  # what it does stands in the equations
        else:
            self.put(type(value).__name__, _ADDRESS.sub("", repr(value)))


def _type(aval: Any) -> str:
    """Returns a variable's type without the mesh that it may live on."""
    return f"{getattr(aval, 'dtype', aval)}{getattr(aval, 'shape', '')}{getattr(aval, 'weak_type', '')}"
