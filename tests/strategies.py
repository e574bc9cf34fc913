"""Strategies of the property tests: places where an operation runs, and rows of difficult values."""

import dataclasses
import functools
import os

import numpy as np
from hypothesis import strategies as st
from programs import MeshRunner

from gpt_neo_sampling._compat import mtf, tf


@dataclasses.dataclass(frozen=True)
class Place:
    """A shape with a dim named "vocab" somewhere, a dtype, and a mesh; strings are in mtf's notation."""

    shape: str
    mesh: str = ""
    layout: str = ""
    dtype: str = "float32"

    @property
    def dims(self):
        return mtf.convert_to_shape(self.shape)

    @property
    def vocab(self):
        return self.dims.get_dim_by_name("vocab")

    @property
    def rows(self):
        return self.dims - self.vocab

    @property
    def tf_dtype(self):
        return tf.as_dtype(self.dtype)

    @property
    def runner(self):
        return MeshRunner(self.mesh, self.layout)

    def on_one_device(self):
        return dataclasses.replace(self, mesh="", layout="")

    def shaped(self, a):
        """[rows, …] with one axis for each of the rows' dims."""
        return a.reshape(self.rows.to_integer_list + list(a.shape[1:]))

    def rows_in(self, mesh, x, *more):
        """An input [*rows, more…] as an mtf tensor."""
        return mtf.import_tf_tensor(mesh, x, mtf.Shape([*self.rows.dims, *more]))

    def whole_in(self, mesh, x):
        """An input [*rows, vocab] as an mtf tensor of the place's dtype and order of dims."""
        return mtf.transpose(mtf.cast(self.rows_in(mesh, x, self.vocab), self.tf_dtype), self.dims)

    def whole_out(self, t):
        return mtf.transpose(mtf.cast(t, tf.float32), self.rows + self.vocab)


ONE_DEVICE = (
    Place("vocab:1"),
    Place("vocab:130,batch:5"),
    Place("a:2,vocab:67,b:1", dtype="float16"),
    Place("batch:4,vocab:1040"),
)
SPLIT = (
    Place("batch:2,vocab:2", "x:2", "vocab:x"),
    Place("vocab:1040,batch:4", "x:2", "vocab:x"),  # through groups of 17
    Place("batch:4,vocab:520", "x:2", "vocab:x", "bfloat16"),
    Place("a:2,vocab:67,b:1", "x:2", "a:x", "float16"),  # on one device it is above
)
# A graph for each operation and place is what property tests take long for: these are for slow tests, and `make fuzz`.
FURTHER = (
    Place("batch:2,vocab:1", dtype="bfloat16"),
    Place("batch:4,vocab:520", "x:2,y:2", "batch:x,vocab:y", "bfloat16"),
    Place("a:2,vocab:67,b:3", "x:2", "a:x", "float16"),
)
places = st.sampled_from(ONE_DEVICE + SPLIT + (FURTHER if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else ()))

# --- Values -----------------------------------------------------------------------------


@functools.cache
def info(dtype):
    """(lowest, smallest normal, smallest) number of a dtype."""
    d = tf.as_dtype(dtype)
    tiny, bits = {"float32": (2.0**-126, 23), "bfloat16": (2.0**-126, 7), "float16": (2.0**-14, 10)}[dtype]
    return float(d.min), tiny, tiny * 2.0**-bits


def rounded(x, dtype):
    """The numbers rounded to that dtype, in float32, clipped to its range."""
    lowest, tiny, smallest = info(dtype)
    x = np.where(np.isfinite(x), np.clip(x, lowest, -lowest), x)
    kept = {"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
    exponent = np.maximum(np.frexp(np.where(np.isfinite(x), x, 0))[1], np.frexp(tiny)[1])
    step = np.ldexp(1.0, exponent - kept)
    with np.errstate(invalid="ignore"):
        x = np.where(np.isfinite(x), np.clip(np.round(x / step) * step, lowest, -lowest), x)
    return x.astype(np.float32)


def _numbers(kind, rng, n, dtype):
    lowest, tiny, smallest = info(dtype)
    if kind == "normal":
        return rng.standard_normal(n) * 2.0 ** rng.integers(-6, 7)
    if kind == "ties":
        return np.round(rng.standard_normal(n) * 2) / rng.choice([1, 2, 64])
    if kind == "equal":
        return np.full(n, rng.choice([0, -0.0, 1, -3.5, 1e4, lowest, -lowest, smallest, -np.inf]))
    if kind == "one-hot":
        low, high = np.sort(rng.choice([-np.inf, lowest, -1e4, -30, 0, smallest, 1, 30, -lowest], 2, replace=False))
        return np.where(np.arange(n) == rng.integers(n), high, low)
    if kind == "signed zeros":
        return rng.choice([0.0, -0.0], n)
    if kind == "ladder":  # nearer to the largest, and nearer
        return -np.exp2(-rng.integers(0, 40, n).astype(float)) * rng.choice([1, 100])
    if kind == "far from 0":
        return rng.standard_normal(n) * rng.choice([0.1, 1, 8]) + rng.choice([-1, 1]) * 10.0 ** rng.integers(1, 8)
    if kind == "every magnitude":
        return rng.choice([-1, 1], n) * 10.0 ** rng.uniform(-45, 38.5, n)
    if kind == "subnormal":
        return rng.integers(-8, 9, n) * smallest
    if kind == "masked":
        x = rng.standard_normal(n) * 3
        return np.where(rng.random(n) < rng.choice([0.1, 0.5, 0.95]), rng.choice([-np.inf, lowest]), x)
    assert kind == "masked at an end"
    x, at = rng.standard_normal(n) * 3, np.arange(n)
    cut = rng.integers(n)
    return np.where(at >= cut if rng.random() < 0.5 else at < cut, rng.choice([-np.inf, lowest]), x)


KINDS = (
    "normal", "ties", "equal", "one-hot", "signed zeros", "ladder", "far from 0", "every magnitude", "subnormal",
    "masked", "masked at an end",
)  # fmt: skip
SPECIAL = (
    "nan", "inf", "-inf", "0", "-0.0", "smallest", "-smallest", "tiny", "lowest", "largest", "1e38", "-1e38", "1e-30",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe for a row of numbers, and numbers to put into it, each at a fraction of its length."""

    kind: str
    seed: int = 0
    planted: tuple = ()

    def numbers(self, n, dtype, positive=False):
        lowest, tiny, smallest = info(dtype)
        named = {"smallest": smallest, "-smallest": -smallest, "tiny": tiny, "lowest": lowest, "largest": -lowest}
        x = _numbers(self.kind, np.random.default_rng(self.seed), n, dtype)
        if positive:
            x = np.where(np.isfinite(x), abs(x), 0)
        for name, part in self.planted:
            x[int(part * n)] = named[name] if name in named else float(name)
        return rounded(x, dtype)


seeds = st.integers(0, 2**32 - 1)
parts = st.floats(0, 1, exclude_max=True, width=32)
planted = st.one_of(st.just(()), st.lists(st.tuples(st.sampled_from(SPECIAL), parts), max_size=3).map(tuple))
row_recipes = st.builds(Row, st.sampled_from(KINDS), seeds, planted)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A place, and a recipe for each of its rows."""

    place: Place
    recipes: tuple
    positive: bool = False

    @functools.cached_property
    def x(self):
        """float32 [rows, vocab], of numbers of the place's dtype."""
        return np.stack([r.numbers(self.place.vocab.size, self.place.dtype, self.positive) for r in self.recipes])


def samples(places=places, positive=False):
    return places.flatmap(
        lambda place: st.builds(Sample, st.just(place), st.tuples(*[row_recipes] * place.rows.size), st.just(positive))
    )
