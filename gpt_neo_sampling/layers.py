"""What a transformer's layers are made of, as mesh operations.

mesh-tensorflow composes each of these from many small ones, and a decode step
of one token, which reads all weights to compute very little, spends its time
between them. Here each is one operation that lowers to a few.
"""

import numpy as np

from gpt_neo_sampling._compat import LazyAllreduceSum, mtf, tf
from gpt_neo_sampling.mtf_ops import align, reshaped


def matmul(x, w, name="matmul"):
    """x · w, over the one dim that they share.

    What `mtf.einsum` computes, as a matrix product: on CPUs that reads the weights
    of one token's step in two thirds of the time.

    Args:
      x: mtf.Tensor [..., in].
      w: mtf.Tensor [in, out…] or [out…, in], of x's dtype.

    Returns:
      mtf.Tensor [..., out…].
    """
    return _MatmulOperation(x, w, name).outputs[0]


class _MatmulOperation(mtf.ops.EinsumOperation):
    """An einsum, its gradient among it, apart from how it is lowered."""

    def __init__(self, x, w, name):
        *lead, in_dim = x.shape.dims
        if in_dim not in (w.shape.dims[:1] + w.shape.dims[-1:]) or any(d in w.shape.dims for d in lead):
            raise ValueError(f"matmul: {x.shape} by {w.shape}; [..., in] by [in, out…] or [out…, in] is needed")
        super().__init__([x, w], mtf.Shape(lead + (w.shape - in_dim).dims), name)
        self._lead, self._in_dim = lead, in_dim
        self._in_last = w.shape.dims[0] != in_dim
        self._splittable_dims, self._unsplittable_dims = self._initialize_all_dimensions_as_splittable()

    def lower(self, lowering):
        mesh_impl = lowering.mesh_impl(self)
        out_shape = mesh_impl.slice_shape(self.outputs[0].shape)
        rows = int(np.prod(out_shape[: len(self._lead)]))
        columns = int(np.prod(out_shape[len(self._lead) :]))

        depth = mesh_impl.slice_shape(mtf.Shape([self._in_dim]))[0]

        def product(x, w):
            # Which of TensorFlow's CPU kernels is faster was measured: docs/architecture.md
            batch = [] if rows == 1 else [1]
            x = reshaped(x, batch + [rows, depth])
            w = reshaped(w, batch + ([columns, depth] if self._in_last else [depth, columns]))
            return reshaped(tf.matmul(x, w, transpose_b=self._in_last), out_shape)

        y = mesh_impl.slicewise(product, *(lowering.tensors[t] for t in self.inputs))
        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(self._in_dim)
        if mesh_axis is not None:
            y = LazyAllreduceSum(mesh_impl, y, [mesh_axis])
        lowering.set_tensor_lowering(self.outputs[0], y)


def attend(q, k, v, bias, memory_dim, name="attend"):
    """Σ softmax(q·k + bias)·v: attention of some queries to a memory.

    Args:
      q: float mtf.Tensor [batch…, depth], or [batch…, queries, depth].
      k, v: mtf.Tensors [batch…, memory_dim, depth].
      bias: mtf.Tensor, finite, its dims among those of q, without depth, and memory_dim.
      memory_dim: mtf.Dimension.

    Returns:
      mtf.Tensor like q. No gradient flows through it.
    """
    return _AttendOperation(q, k, v, bias, memory_dim, name).outputs[0]


class _AttendOperation(mtf.Operation):
    def __init__(self, q, k, v, bias, memory_dim, name):
        super().__init__([q, k, v, bias], name=name)
        *batch, memory, depth = k.shape.dims
        queries = q.shape.dims[len(batch) : -1]
        if q.shape.dims != batch + queries + [depth] or len(queries) > 1 or memory != memory_dim or v.shape != k.shape:
            raise ValueError(
                f"attend: q {q.shape}, k {k.shape}, v {v.shape} and memory {memory_dim} do not go together"
            )
        self._memory_dim = memory_dim
        self._scores_shape = mtf.Shape(batch + queries + [memory])
        self._one_query = not queries
        self._outputs = [mtf.Tensor(self, q.shape, q.dtype)]
        self._splittable_dims, self._unsplittable_dims = self._initialize_all_dimensions_as_splittable()

    @property
    def has_gradient(self):
        return False

    def lower(self, lowering):
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        q, k, v, bias = (lowering.tensors[t] for t in self.inputs)
        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(self._memory_dim)

        def scores(q, k, bias):
            q = tf.expand_dims(q, -2) if self._one_query else q
            bias = align(bias, self.inputs[3].shape, self._scores_shape)
            return tf.matmul(q, k, transpose_b=True) + (tf.expand_dims(bias, -2) if self._one_query else bias)

        def weighted(weights, v):
            y = tf.matmul(weights, v)
            return tf.squeeze(y, -2) if self._one_query else y

        def over_shards(x, reduction):
            return x if mesh_axis is None else mesh_impl.allreduce(x, [mesh_axis], reduction)

        # by hand: TensorFlow's softmax takes 60 µs for a few rows
        s = slicewise(scores, q, k, bias)
        largest = over_shards(slicewise(lambda s: tf.reduce_max(s, -1, keepdims=True), s), "MAX")
        weights = slicewise(lambda s, m: tf.exp(s - m), s, largest)
        total = over_shards(slicewise(lambda w: tf.reduce_sum(w, -1, keepdims=True), weights), "SUM")
        y = slicewise(lambda w, t, v: weighted(w / t, v), weights, total, v)
        if mesh_axis is not None:
            y = LazyAllreduceSum(mesh_impl, y, [mesh_axis])
        lowering.set_tensor_lowering(self.outputs[0], y)


def layer_norm(x, scale, offset, epsilon, name="layer_norm"):
    """(x − mean) / √(variance + ε) · scale + offset along the last dim.

    Ba, Kiros, Hinton 2016, "Layer Normalization", arXiv 1607.06450.

    Args:
      x: float mtf.Tensor [..., dim].
      scale, offset: mtf.Tensors [dim].
      epsilon: a number.

    Returns:
      mtf.Tensor like x.
    """
    return _LayerNormOperation(x, scale, offset, epsilon, name).outputs[0]


class _LayerNormOperation(mtf.Operation):
    """One operation: a decode step has dozens, each of ten small tensor ops."""

    def __init__(self, x, scale, offset, epsilon, name):
        super().__init__([x, scale, offset], name=name)
        self._epsilon = epsilon
        self._outputs = [mtf.Tensor(self, x.shape, x.dtype)]
        self._splittable_dims, self._unsplittable_dims = self._initialize_all_dimensions_as_splittable()

    def gradient(self, grad_ys):
        (dy,), (x, scale, offset) = grad_ys, self.inputs
        dim = x.shape[-1]
        centred = x - mtf.reduce_mean(x, reduced_dim=dim)
        inverse = mtf.rsqrt(mtf.reduce_mean(mtf.square(centred), reduced_dim=dim) + self._epsilon)
        normal = centred * inverse
        slope = dy * scale
        along = mtf.reduce_mean(slope * normal, reduced_dim=dim)
        dx = (slope - mtf.reduce_mean(slope, reduced_dim=dim) - normal * along) * inverse
        return [
            dx,
            mtf.reduce_sum(dy * normal, output_shape=scale.shape),
            mtf.reduce_sum(dy, output_shape=offset.shape),
        ]

    def lower(self, lowering):
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        x, scale, offset = (lowering.tensors[t] for t in self.inputs)
        dim = self.inputs[0].shape[-1]
        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(dim)

        def mean(x):
            if mesh_axis is None:
                return slicewise(lambda x: tf.reduce_mean(x, -1, keepdims=True), x)
            total = mesh_impl.allreduce(slicewise(lambda x: tf.reduce_sum(x, -1, keepdims=True), x), [mesh_axis], "SUM")
            return slicewise(lambda t: t * (1.0 / dim.size), total)

        centred = slicewise(tf.subtract, x, mean(x))
        variance = mean(slicewise(tf.square, centred))
        y = slicewise(
            lambda x, variance, scale, offset: x * tf.rsqrt(variance + self._epsilon) * scale + offset,
            centred, variance, scale, offset,
        )  # fmt: skip
        lowering.set_tensor_lowering(self.outputs[0], y)


def gelu(x):
    """The tanh form of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    ½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), which is x·sigmoid of twice the
    argument of tanh.

    Args:
      x: float mtf.Tensor.

    Returns:
      mtf.Tensor like x.
    """
    scale, cubic = 2 * 0.7978845608028654, 0.044715  # 2·√(2/π)

    def value(x):
        return x * tf.sigmoid(x * (scale + scale * cubic * tf.square(x)))

    def slope(x):
        s = tf.sigmoid(x * (scale + scale * cubic * tf.square(x)))
        return s + x * s * (1.0 - s) * (scale + 3 * scale * cubic * tf.square(x))

    # mtf's own gradient of a slice-wise function cannot take an unfinished sum
    def gradient(op, dy):
        return [mtf.cwise(slope, op.inputs, name="gelu_slope") * dy]

    return mtf.cwise(value, [x], grad_function=gradient, name="gelu")
