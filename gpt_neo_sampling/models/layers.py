"""The building blocks of a transformer's layers, as mesh operations.

mesh-tensorflow composes each of these from many small operations, and a decode
step of one token, which reads all weights and computes little, would spend its
time on their overhead. Here each is one operation that lowers to a few.

Matrix products are computed in the dtype of their operands. Means, sums of exp,
rotations and activation functions, which lose more in half precision, are
computed in float32 and cast back.
"""

import functools
import os
from collections.abc import Callable

import numpy as np

from gpt_neo_sampling._compat import LazyAllreduceSum, mtf, tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh.gpu import may_be_gpu
from gpt_neo_sampling.mesh.ops import MeshOperation, align, reshaped
from gpt_neo_sampling.mesh.xla import is_compiled, is_core_program, kept_together

MOST_PARTS = 64  # of a product
ROTARY_BASE = 10_000  # GPT-Neo's, and RoFormer's


def matmul(x: mtf.Tensor, w: mtf.Tensor, name: str = "matmul") -> mtf.Tensor:
    """x · w, summed over the one dim that they share.

    The result of `mtf.einsum`, by a matrix product: on CPUs a one-token step reads its
    weights in two thirds of the time.

    Args:
      x: mtf.Tensor [..., in].
      w: mtf.Tensor [in, out…] or [out…, in], of x's dtype.

    Returns:
      mtf.Tensor [..., out…].
    """
    return _MatmulOperation(x, w, name).outputs[0]


class _MatmulOperation(mtf.ops.EinsumOperation):
    """An einsum, with its gradient, that is lowered to `tf.matmul`."""

    def __init__(self, x: mtf.Tensor, w: mtf.Tensor, name: str) -> None:
        *lead, in_dim = x.shape.dims
        if in_dim not in (w.shape.dims[:1] + w.shape.dims[-1:]) or any(d in w.shape.dims for d in lead):
            raise ValueError(f"matmul: {x.shape} by {w.shape}; [..., in] by [in, out…] or [out…, in] is needed")
        super().__init__([x, w], mtf.Shape(lead + (w.shape - in_dim).dims), name)
        self._lead, self._in_dim = lead, in_dim
        self._in_last = w.shape.dims[0] != in_dim
        self._splittable_dims, self._unsplittable_dims = self._initialize_all_dimensions_as_splittable()

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        out_shape = mesh_impl.slice_shape(self.outputs[0].shape)
        rows = int(np.prod(out_shape[: len(self._lead)]))
        columns = int(np.prod(out_shape[len(self._lead) :]))

        depth = mesh_impl.slice_shape(mtf.Shape([self._in_dim]))[0]

        # For one row a TPU's compiler takes no matrix unit, and six times as long: a row of zeros goes with it.
        is_alone = rows == 1 and is_core_program(mesh_impl)

        def near(x: tf.Tensor, w: tf.Tensor) -> tuple[tf.Tensor, ...]:
            # XLA would make float32 of all weights ahead of the loop, and read twice as much in each step.
            return kept_together(x, w) if is_compiled(lowering) and w.dtype != tf.float32 else (x, w)

        def product(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
            # the faster of TensorFlow's CPU kernels, as measured in docs/architecture.md
            batch = [] if rows == 1 else [1]
            x, w = near(x, w)
            x = reshaped(x, batch + [rows, depth])
            w = reshaped(w, batch + ([columns, depth] if self._in_last else [depth, columns]))
            y = tf.matmul(tf.pad(x, [[0, 1], [0, 0]]) if is_alone else x, w, transpose_b=self._in_last)
            return reshaped(y[:1] if is_alone else y, out_shape)

        def product_in_parts(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
            # XLA's product with one matrix is one thread's work; the parts lie one behind the other in memory.
            n_parts = _parts_of(columns)
            x = tf.broadcast_to(reshaped(x, [rows, depth]), [n_parts, rows, depth])
            w = reshaped(w, [n_parts, columns // n_parts, depth])
            if rows == 1:
                return reshaped(tf.matmul(x, w, transpose_b=True), out_shape)
            y = tf.matmul(w, x, transpose_b=True)  # this way round it packs the rows, not the weights
            return reshaped(tf.transpose(reshaped(y, [columns, rows])), out_shape)

        in_parts = is_compiled(lowering) and self._in_last and self.inputs[1].dtype == tf.float32
        in_parts = in_parts and not may_be_gpu(mesh_impl)
        multiply = product_in_parts if in_parts else product
        y = mesh_impl.slicewise(multiply, *(lowering.tensors[t] for t in self.inputs))
        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(self._in_dim)
        if mesh_axis is not None:
            y = LazyAllreduceSum(mesh_impl, y, [mesh_axis])
        lowering.set_tensor_lowering(self.outputs[0], y)


def _parts_of(columns: int) -> int:
    """Into how many equal parts of its columns XLA's product on CPUs is cut: one for each core, or the nearest."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    divisors = [n for n in range(1, MOST_PARTS + 1) if columns % n == 0]
    return next((n for n in divisors if n >= cores), divisors[-1])


def attend(
    q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor, bias: mtf.Tensor, memory_dim: mtf.Dimension, name: str = "attend"
) -> mtf.Tensor:
    """Σ softmax(q·k + bias)·v: attention of queries to a memory.

    Args:
      q: float mtf.Tensor [batch…, depth], or [batch…, queries, depth].
      k, v: mtf.Tensors [batch…, memory_dim, depth].
      bias: float mtf.Tensor, finite; its dims are memory_dim and any of q's but depth.
      memory_dim: mtf.Dimension.

    Returns:
      mtf.Tensor like q. No gradient flows through it.
    """
    return _AttendOperation(q, k, v, bias, memory_dim, name).outputs[0]


class _AttendOperation(MeshOperation):
    def __init__(
        self, q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor, bias: mtf.Tensor, memory_dim: mtf.Dimension, name: str
    ) -> None:
        *batch, memory, depth = k.shape.dims
        queries = q.shape.dims[len(batch) : -1]
        if q.shape.dims != batch + queries + [depth] or len(queries) > 1 or memory != memory_dim or v.shape != k.shape:
            raise ValueError(
                f"attend: q {q.shape}, k {k.shape}, v {v.shape} and memory {memory_dim} do not match; q of "
                f"[batch…, depth] or [batch…, queries, depth], k and v of [batch…, memory, depth] are needed"
            )
        super().__init__([q, k, v, bias], [(q.shape, q.dtype)], name)
        self._memory_dim = memory_dim
        self._scores_shape = mtf.Shape(batch + queries + [memory])
        self._one_query = not queries

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        q, k, v, bias = (lowering.tensors[t] for t in self.inputs)
        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(self._memory_dim)

        def scores(q: tf.Tensor, k: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
            q = tf.expand_dims(q, -2) if self._one_query else q
            bias = _float32(align(bias, self.inputs[3].shape, self._scores_shape))
            return _float32(tf.matmul(q, k, transpose_b=True)) + (tf.expand_dims(bias, -2) if self._one_query else bias)

        def weighted(weights: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
            y = tf.matmul(tf.cast(weights, v.dtype), v)
            return tf.squeeze(y, -2) if self._one_query else y

        def over_shards(x: LaidOut, reduction: str) -> LaidOut:
            return x if mesh_axis is None else mesh_impl.allreduce(x, [mesh_axis], reduction)

        # not tf.nn.softmax, which takes 60 µs for a few rows
        s = slicewise(scores, q, k, bias)
        largest = over_shards(slicewise(lambda s: tf.reduce_max(s, -1, keepdims=True), s), "MAX")
        weights = slicewise(lambda s, m: tf.exp(s - m), s, largest)
        total = over_shards(slicewise(lambda w: tf.reduce_sum(w, -1, keepdims=True), weights), "SUM")
        y = slicewise(lambda w, t, v: weighted(w / t, v), weights, total, v)
        if mesh_axis is not None:
            y = LazyAllreduceSum(mesh_impl, y, [mesh_axis])
        lowering.set_tensor_lowering(self.outputs[0], y)


# --- Attention to a memory in which the heads stand side by side ---
#
# A TPU keeps an array in tiles of 128 entries of its last dim. One of a head's 64 features would be half empty, and
# with positions last, where XLA puts them otherwise, it rewrites the whole memory to add a token. All heads' features
# together fill the tiles, and a token is a row.


def attend_joined(
    q: mtf.Tensor,
    memory: list[mtf.Tensor],
    own: list[mtf.Tensor],
    position: mtf.Tensor,
    bias: mtf.Tensor,
    memory_dim: mtf.Dimension,
    name: str = "attend",
) -> mtf.Tensor:
    """`attend` of one query to a memory whose last dim is heads and depth joined, with its own key and value in it.

    They are read beside the memory, not written to it first: XLA would take what is written into fast memory and
    bring all of it back.

    Args:
      q: float mtf.Tensor [batch…, heads, depth].
      memory: keys and values, mtf.Tensors [batch…, memory_dim, joined]; joined has heads' name and so is split like
        it, and the product of the sizes of heads and depth. Finite.
      own: a key and a value, mtf.Tensors [batch…, joined], in place of the memory's at `position`.
      position: int32 mtf.Tensor [batch…].
      bias: float mtf.Tensor, finite; its dims are memory_dim and any of q's but depth.
      memory_dim: mtf.Dimension.

    Returns:
      mtf.Tensor like q. No gradient flows through it.
    """
    return _AttendJoinedOperation(q, memory, own, position, bias, memory_dim, name).outputs[0]


class _AttendJoinedOperation(MeshOperation):
    """Two products for all heads at once: a head's own entries are picked by zeros in the query, and after the second
    product, which adds the values of all heads by the weights of each."""

    def __init__(
        self,
        q: mtf.Tensor,
        memory: list[mtf.Tensor],
        own: list[mtf.Tensor],
        position: mtf.Tensor,
        bias: mtf.Tensor,
        memory_dim: mtf.Dimension,
        name: str,
    ) -> None:
        *batch, heads, depth = q.shape.dims
        joined = mtf.Dimension(heads.name, heads.size * depth.size)
        wanted = [[*batch, memory_dim, joined]] * 2 + [[*batch, joined]] * 2 + [batch]
        if [t.shape.dims for t in (*memory, *own, position)] != wanted:
            raise ValueError(
                f"attend_joined: q {q.shape}, memory {memory[0].shape}, {memory[1].shape}, own {own[0].shape}, "
                f"{own[1].shape}, position {position.shape} do not match"
            )
        super().__init__([q, *memory, *own, position, bias], [(q.shape, q.dtype)], name)
        self._memory_dim = memory_dim
        self._scores_shape = mtf.Shape([*batch, heads, memory_dim])

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        q, k, v, own_k, own_v, position, bias = (lowering.tensors[t] for t in self.inputs)
        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(self._memory_dim)
        *batch, heads, depth = mesh_impl.slice_shape(self.inputs[0].shape)
        size = mesh_impl.slice_shape(mtf.Shape([self._memory_dim]))[0]
        own_entries = np.repeat(np.eye(heads, dtype=bool), depth, axis=1)  # [heads, heads · depth]
        parts = [] if mesh_axis is None else [mesh_impl.laid_out_pcoord(mesh_axis)]

        def is_own(position: tf.Tensor, pcoord: tf.Tensor | int = 0) -> tf.Tensor:
            """bool [batch…, 1, memory]; nowhere on a shard that does not hold the position."""
            return tf.equal(tf.reshape(position, [*batch, 1, 1]) - pcoord * size, np.arange(size, dtype=np.int32))

        def scores(q: tf.Tensor, k: tf.Tensor, own_k: tf.Tensor, is_own: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
            own = tf.reduce_sum(q * tf.reshape(own_k, [*batch, heads, depth]), -1, keepdims=True)
            q = tf.where_v2(own_entries, tf.reshape(q, [*batch, 1, heads * depth]), tf.zeros([], q.dtype))
            found = tf.where_v2(is_own, own, tf.matmul(q, k, transpose_b=True))
            return _float32(found) + _float32(align(bias, self.inputs[-1].shape, self._scores_shape))

        def weighted(w: tf.Tensor, total: tf.Tensor, v: tf.Tensor, own_v: tf.Tensor, is_own: tf.Tensor) -> tf.Tensor:
            w = w / total
            own = tf.reduce_sum(tf.where_v2(is_own, w, 0.0), -1, keepdims=True)
            y = tf.matmul(tf.cast(tf.where_v2(is_own, 0.0, w), v.dtype), v)
            y = tf.reduce_sum(tf.where_v2(own_entries, y, tf.zeros([], y.dtype)), -2)
            y = _float32(tf.reshape(y, [*batch, heads, depth])) + own * _float32(
                tf.reshape(own_v, [*batch, heads, depth])
            )
            return tf.cast(y, v.dtype)

        def over_shards(x: LaidOut, reduction: str) -> LaidOut:
            return x if mesh_axis is None else mesh_impl.allreduce(x, [mesh_axis], reduction)

        here = slicewise(is_own, position, *parts)
        s = slicewise(scores, q, k, own_k, here, bias)
        largest = over_shards(slicewise(lambda s: tf.reduce_max(s, -1, keepdims=True), s), "MAX")
        weights = slicewise(lambda s, m: tf.exp(s - m), s, largest)
        total = over_shards(slicewise(lambda w: tf.reduce_sum(w, -1, keepdims=True), weights), "SUM")
        y = slicewise(weighted, weights, total, v, own_v, here)
        if mesh_axis is not None:
            y = LazyAllreduceSum(mesh_impl, y, [mesh_axis])
        lowering.set_tensor_lowering(self.outputs[0], y)


def layer_norm(
    x: mtf.Tensor, scale: mtf.Tensor, offset: mtf.Tensor | None, epsilon: float, name: str = "layer_norm"
) -> mtf.Tensor:
    """(x − mean) / √(variance + ε) · scale + offset along the last dim.

    Ba, Kiros, Hinton 2016, "Layer Normalization", arXiv 1607.06450.

    Args:
      x: float mtf.Tensor [..., dim].
      scale: mtf.Tensor [dim], or [] for one scale.
      offset: mtf.Tensor [dim], or None.
      epsilon: a number.

    Returns:
      mtf.Tensor like x.
    """
    return _LayerNormOperation(x, scale, offset, epsilon, name).outputs[0]


class _LayerNormOperation(MeshOperation):
    """One operation in place of ten small ones: a decode step has dozens of layer norms."""

    def __init__(self, x: mtf.Tensor, scale: mtf.Tensor, offset: mtf.Tensor | None, epsilon: float, name: str) -> None:
        super().__init__([x, scale] + ([] if offset is None else [offset]), [(x.shape, x.dtype)], name)
        self._epsilon = epsilon

    def gradient(self, grad_ys: list[mtf.Tensor]) -> list[mtf.Tensor | None]:
        dy, x, scale = (mtf.cast(t, tf.float32) for t in (*grad_ys, *self.inputs[:2]))
        dim = x.shape[-1]
        centred = x - mtf.reduce_mean(x, reduced_dim=dim)
        inverse = mtf.rsqrt(mtf.reduce_mean(mtf.square(centred), reduced_dim=dim) + self._epsilon)
        normal = centred * inverse
        slope = dy * scale
        along = mtf.reduce_mean(slope * normal, reduced_dim=dim)
        dx = (slope - mtf.reduce_mean(slope, reduced_dim=dim) - normal * along) * inverse
        grads = dx, mtf.reduce_sum(dy * normal, output_shape=scale.shape), mtf.reduce_sum(dy, output_shape=[dim])
        return [mtf.cast(g, t.dtype) for g, t in zip(grads, self.inputs)]

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        x, *scale_and_offset = (slicewise(_float32, lowering.tensors[t]) for t in self.inputs)
        dim, dtype = self.inputs[0].shape[-1], self.inputs[0].dtype
        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(dim)

        def mean(x: LaidOut) -> LaidOut:
            if is_core_program(mesh_impl):  # of parts that are divided first: one kernel less on a TPU
                x = slicewise(lambda x: tf.reduce_sum(x * (1.0 / dim.size), -1, keepdims=True), x)
                return x if mesh_axis is None else mesh_impl.allreduce(x, [mesh_axis], "SUM")
            if mesh_axis is None:
                return slicewise(lambda x: tf.reduce_mean(x, -1, keepdims=True), x)
            total = mesh_impl.allreduce(slicewise(lambda x: tf.reduce_sum(x, -1, keepdims=True), x), [mesh_axis], "SUM")
            return slicewise(lambda t: t * (1.0 / dim.size), total)

        centred = slicewise(tf.subtract, x, mean(x))
        variance = mean(slicewise(tf.square, centred))

        def scaled(x: tf.Tensor, variance: tf.Tensor, scale: tf.Tensor, *offset: tf.Tensor) -> tf.Tensor:
            y = x * tf.rsqrt(variance + self._epsilon) * scale
            return tf.cast(y + offset[0] if offset else y, dtype)

        y = slicewise(scaled, centred, variance, *scale_and_offset)
        lowering.set_tensor_lowering(self.outputs[0], y)


def rotary_table(
    mesh: mtf.Mesh, position_dim: mtf.Dimension, depth_dim: mtf.Dimension, n_unrotated: int = 0
) -> mtf.Tensor:
    """The angles of `rotate`: for each position, their cosines followed by their sines.

    Args:
      mesh: mtf.Mesh.
      position_dim: mtf.Dimension of the positions, from 0.
      depth_dim: mtf.Dimension, of an even size.
      n_unrotated: int, the number of entries of position_dim before position 0; their angles are 0.

    Returns:
      float32 mtf.Tensor [position_dim, depth_dim], a constant.
    """
    half = depth_dim.size // 2
    positions = np.maximum(np.arange(position_dim.size) - n_unrotated, 0)
    angles = positions[:, np.newaxis] * ROTARY_BASE ** -(np.arange(half) / half)
    table = np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    return mtf.import_tf_tensor(mesh, tf.constant(table), mtf.Shape([position_dim, depth_dim]))


def rotate(x: mtf.Tensor, table: mtf.Tensor, name: str = "rotate") -> mtf.Tensor:
    """Rotates each pair (xⱼ, xⱼ₊ₙ), where n is half the last dim, by the angle position · 10000^(−j/n).

    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position
    Embedding", arXiv 2104.09864, with pairs between the first half and the second.

    Args:
      x: float mtf.Tensor [..., depth]; no layout may split depth.
      table: float32 mtf.Tensor, rows of `rotary_table`; its dims are among those of x, with depth last.

    Returns:
      mtf.Tensor like x. The gradient flows through x only.
    """
    return _RotateOperation(x, table, False, name).outputs[0]


class _RotateOperation(MeshOperation):
    def __init__(self, x: mtf.Tensor, table: mtf.Tensor, back: bool, name: str) -> None:
        super().__init__([x, table], [(x.shape, x.dtype)], name, unsplittable=[x.shape[-1].name])
        self._back = back

    def gradient(self, grad_ys: list[mtf.Tensor]) -> list[mtf.Tensor | None]:
        table = self.inputs[1]
        # mtf's recompute_grad needs a gradient for every floating input
        return [_RotateOperation(grad_ys[0], table, not self._back, "rotate_back").outputs[0], mtf.zeros_like(table)]

    def lower(self, lowering: mtf.Lowering) -> None:
        x, table = self.inputs

        def turn(values: tf.Tensor, angles: tf.Tensor) -> tf.Tensor:
            first, second = tf.split(_float32(values), 2, -1)
            cos, sin = tf.split(align(angles, table.shape, x.shape), 2, -1)
            sin = -sin if self._back else sin
            return tf.cast(tf.concat([first * cos - second * sin, second * cos + first * sin], -1), x.dtype)

        y = lowering.mesh_impl(self).slicewise(turn, *(lowering.tensors[t] for t in self.inputs))
        lowering.set_tensor_lowering(self.outputs[0], y)


def _gelu(x: tf.Tensor) -> tf.Tensor:
    """The tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415), ½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))).

    This equals x times the sigmoid of twice tanh's argument.
    """
    scale, cubic = 2 * 0.7978845608028654, 0.044715  # 2·√(2/π)
    return x * tf.sigmoid(x * (scale + scale * cubic * tf.square(x)))


def _gelu_erf(x: tf.Tensor) -> tf.Tensor:
    """x·Φ(x), where Φ is the normal distribution function. `_gelu` differs from it by up to 5e-4."""
    return 0.5 * x * (1 + tf.math.erf(x * 0.5**0.5))


def _elish(x: tf.Tensor) -> tf.Tensor:
    """GPT-Neo's form. In Basirat and Roth 2018, arXiv 1808.00783, it is x / (1 + exp(−x)) above 0."""
    return tf.where_v2(x > 0, x * tf.sigmoid(-x), tf.math.expm1(tf.minimum(x, 0.0)) * tf.sigmoid(x))


def _waves(wave: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor, power: int) -> tf.Tensor:
    """The first four terms of a Fourier series, with weights of 1, −1/3ⁿ, 1/5ⁿ, −1/7ⁿ."""
    return wave(x) - wave(3 * x) / 3**power + wave(5 * x) / 5**power - wave(7 * x) / 7**power


# GPT-Neo's functions under its names, except those with variables, whose names are random ("aria", "parcsinh",
# "prelu", "proottanh", "psoftplus"), and "rrelu", whose slope is drawn anew for each graph.
ACTIVATIONS = {  # entry by entry
    "abs": tf.abs,
    "arcsinh": tf.asinh,
    "bipolarsigmoid": lambda x: 2 * tf.sigmoid(x) - 1,
    "cos": tf.cos,
    "cosid": lambda x: tf.cos(x) - x,
    "elish": _elish,
    "elu": tf.nn.elu,
    "gelu": _gelu,
    "id": tf.identity,
    "lisht": lambda x: x * tf.tanh(x),
    "lrelu001": lambda x: tf.nn.leaky_relu(x, 0.01),
    "lrelu020": lambda x: tf.nn.leaky_relu(x, 0.2),
    "maxsig": lambda x: tf.maximum(x, tf.sigmoid(x)),
    "maxtanh": lambda x: tf.maximum(x, tf.tanh(x)),
    "minsin": lambda x: tf.minimum(x, tf.sin(x)),
    "mish": lambda x: x * tf.tanh(tf.nn.softplus(x)),
    "relu": tf.nn.relu,
    "roottanh": lambda x: (tf.square(x) + 1) ** (1 / 3) * tf.tanh(x),
    "seagull": lambda x: tf.math.log1p(tf.square(x)),
    "selu": tf.nn.selu,
    "sigmoid": tf.sigmoid,
    "sign": tf.sign,
    "silu": lambda x: x * tf.sigmoid(x),
    "sin": tf.sin,
    "snake": lambda x: x + tf.square(tf.sin(x)),
    "softplus": tf.nn.softplus,
    "softplusmone": lambda x: tf.nn.softplus(x) - 1,
    "softsign": tf.nn.softsign,
    "spike": lambda x: 1 / (1 + tf.square(x)),
    "spike2": lambda x: tf.exp(-tf.square(x)),
    "square_relax": functools.partial(_waves, tf.cos, power=1),
    "swish": lambda x: x * tf.sigmoid(x),
    "tanh": tf.tanh,
    "tanhexp": lambda x: x * tf.tanh(tf.exp(x)),
    "tanhshrink": lambda x: x - tf.tanh(x),
    "triangle_relax": functools.partial(_waves, tf.sin, power=2),
}
ROW_ACTIVATIONS = {"logsoftmax": mtf.log_softmax, "softmax": mtf.softmax}  # along the last dim

# The functions of `config.HUGGING_FACE_ACTIVATIONS`. Papers: gelu_erf_10, Wu et al. 2020, arXiv 2004.09602;
# hardswish, Howard et al. 2019, arXiv 1905.02244; laplace, Ma et al. 2022, arXiv 2209.10655; relu2, So et al. 2021,
# arXiv 2109.08668.
HUGGING_FACE_FUNCTIONS = {
    "gelu_erf": _gelu_erf,
    "gelu_erf_10": lambda x: tf.clip_by_value(_gelu_erf(x), -10.0, 10.0),
    "hardswish": lambda x: x * tf.nn.relu6(x + 3) / 6,
    "laplace": lambda x: 0.5 * (1 + tf.math.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "quick_gelu": lambda x: x * tf.sigmoid(1.702 * x),
    "relu2": lambda x: tf.square(tf.nn.relu(x)),
    "relu6": tf.nn.relu6,
    "sqrtsoftplus": lambda x: tf.sqrt(tf.nn.softplus(x)),
}


def activate(x: mtf.Tensor, activation: str) -> mtf.Tensor:
    """An activation function.

    Args:
      x: float mtf.Tensor.
      activation: str, one of `ACTIVATIONS`, `HUGGING_FACE_FUNCTIONS` or `ROW_ACTIVATIONS`.

    Returns:
      mtf.Tensor like x.
    """
    if activation in ROW_ACTIVATIONS:
        return mtf.cast(ROW_ACTIVATIONS[activation](mtf.cast(x, tf.float32), x.shape[-1]), x.dtype)
    function = {**ACTIVATIONS, **HUGGING_FACE_FUNCTIONS}[activation]

    def value(x: tf.Tensor) -> tf.Tensor:
        return tf.cast(function(_float32(x)), x.dtype)

    def slope(x: tf.Tensor) -> tf.Tensor:
        return tf.gradients(value(x), x)[0]

    # mtf's own gradient of a slice-wise function cannot take a sum that is not reduced yet
    def gradient(op: mtf.Operation, dy: mtf.Tensor) -> list[mtf.Tensor]:
        return [mtf.cwise(slope, op.inputs, name=f"{activation}_slope") * dy]

    return mtf.cwise(value, [x], grad_function=gradient, name=activation)


def _float32(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32)
