"""From scores to probabilities: entmax and its loss, and softmax, their case of α = 1."""

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import LaidOut, RowValue, is_int, is_real
from gpt_neo_sampling.mesh.ops import (
    MeshOperation,
    align,
    check_floating,
    cwise_broadcast,
    dim_of,
    finite,
    import_rows,
    size_of,
    take,
)
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows, fast_sum
from gpt_neo_sampling.sampling.defaults import DEFAULT_ALPHA
from gpt_neo_sampling.sampling.entmax_solver import entmax_by_candidates, n_candidates_for
from gpt_neo_sampling.sampling.top_k import has_invalid, scatter_rows


def entmax(
    x: mtf.Tensor, alpha: RowValue = DEFAULT_ALPHA, dim: mtf.Dimension | None = None, n_iter: int = 50
) -> mtf.Tensor:
    """α-entmax: probabilities that are exactly 0 for all but the likelier entries.

    Peters, Niculae, Martins 2019, "Sparse sequence-to-sequence models", arXiv
    1905.05702: p = [(α−1)x − τ]₊^(1/(α−1)), with τ such that p sums to 1. α = 1
    is softmax, α = 2 is sparsemax (Martins and Astudillo 2016); in between, the
    larger α, the fewer entries survive.

    With ε = α − 1 and z = x − max x this is p = [β + εz]₊^(1/ε) for one β in (0, 1],
    the largest p to the power of ε. β is found by Newton steps on the 1/ε-norm of
    [β + εz]₊, which is convex in β and nearly straight: each step lands short of the
    root, and α = 1 or a constant row takes one.

    Args:
      x: mtf.Tensor of scores, float32, bfloat16 or float16; solved in float32.
        −inf is allowed and has probability 0.
      alpha: a number in [1, 2], or a tensor, scalar or [x.shape − dim] (through
        which no gradient flows).
      dim: mtf.Dimension of x; the last by default.
      n_iter: the most Newton steps that are taken; the solver stops by itself
        once they are below float32 round-off.

    Returns:
      mtf.Tensor like x, accurate to float32 round-off, summing to 1 along
      `dim`. A row with NaN or +inf, without any finite score, or with an alpha
      tensor outside [1, 2], is NaN throughout.

    Raises:
      ValueError: for an alpha outside [1, 2] or of the wrong shape, n_iter below 1,
        or a `dim` that x lacks.

    Example (`run` is defined in the docstring of `models.utils`):

        >>> run(lambda x: entmax(x, alpha=1.5), [[2.0, 1.0, 0.0, -1.0]]).round(3)
        array([[0.831, 0.169, 0.   , 0.   ]], dtype=float32)
    """
    dim = dim_of(x, dim)
    if not is_int(n_iter) or n_iter < 1:
        raise ValueError(f"n_iter={n_iter}: a whole number of at least 1 is needed")
    check_floating(x, "entmax: scores")
    imported = _import_alpha(x.mesh, alpha, x.shape - dim)
    if is_real(alpha) and alpha == 1:
        return softmax(x, dim)
    return _EntmaxOperation(x, imported, dim, n_iter, n_candidates_for(alpha)).outputs[0]


def softmax(x: mtf.Tensor, dim: mtf.Dimension | None = None) -> mtf.Tensor:
    """Softmax along `dim`: `entmax` of α = 1, in the few passes that it takes.

    Args:
      x: mtf.Tensor of scores, float32, bfloat16 or float16; computed in float32.
      dim: mtf.Dimension of x; the last by default.

    Returns:
      mtf.Tensor like x; invalid rows are NaN, as those of `entmax`.

    Raises:
      ValueError: for a `dim` that x lacks.
    """
    dim = dim_of(x, dim)
    check_floating(x, "softmax: scores")
    return _SoftmaxOperation(x, dim).outputs[0]


def log_softmax_at(x: mtf.Tensor, at: mtf.Tensor, dim: mtf.Dimension) -> mtf.Tensor:
    """The logarithm of `softmax` at one entry a row, as exact far from 0 as near it.

    Args:
      x: float32 mtf.Tensor of scores, finite or NaN.
      at: int32 mtf.Tensor [x.shape − dim].
      dim: mtf.Dimension of x.

    Returns:
      float32 mtf.Tensor [x.shape − dim]. No gradient flows through it.
    """
    top = mtf.reduce_max(x, reduced_dim=dim)
    x = cwise_broadcast(lambda x, top: tf.maximum(x - top, x.dtype.min), [x, top], x.shape)
    return take(x, at, dim) - mtf.log(_sum(mtf.exp(x), dim))


def _import_alpha(mesh: mtf.Mesh, alpha: RowValue, rows: mtf.Shape) -> mtf.Tensor:
    if is_real(alpha) and not 1 <= alpha <= 2:  # NaN fails too
        raise ValueError(f"alpha={alpha} is out of range: from 1 (softmax) to 2 (sparsemax)")
    return import_rows(mesh, alpha, tf.float32, rows, "alpha")


def entmax_forward(
    x: mtf.Tensor, alpha: RowValue = DEFAULT_ALPHA, dim: mtf.Dimension | None = None, n_iter: int = 50
) -> mtf.Tensor:
    """`entmax` under the name of GPT-Neo's forward function.

    Args:
      x, alpha, dim, n_iter: as for `entmax`, and so are what is returned and raised.
    """
    return entmax(x, alpha, dim, n_iter)


def entmax_backward(
    explicit_inputs: list[mtf.Tensor],
    all_inputs: list[mtf.Tensor],
    forward_operations: list[mtf.Operation],
    outputs: list[mtf.Tensor],
    output_grads: list[mtf.Tensor],
    alpha: RowValue = DEFAULT_ALPHA,
    dim: mtf.Dimension | None = None,
    n_iter: int = 50,
) -> list[mtf.Tensor]:
    """The gradient of `entmax`, with the arguments of an mtf `custom_gradient`.

    With s = p^(2−α) on the support of p and 0 off it, dX = s·dY − s·(Σ s·dY / Σ s),
    the sums along `dim` alone (Peters et al. 2019, proposition 2).

    Args:
      explicit_inputs: [x].
      outputs: [p], the mtf.Tensor that `entmax` gave for x.
      output_grads: [dY], an mtf.Tensor of x's shape.
      alpha, dim: as given to `entmax`.
      all_inputs, forward_operations, n_iter: part of the call that
        mesh-tensorflow makes; the closed form has no use for them.

    Returns:
      [dX], an mtf.Tensor of x's shape and dtype.
    """
    del all_inputs, forward_operations, n_iter
    (x,), (p,), (dy,) = explicit_inputs, outputs, output_grads
    dim = dim_of(x, dim)
    alpha = mtf.broadcast(import_rows(x.mesh, alpha, tf.float32, x.shape - dim, "alpha"), x.shape)

    def weight(p: tf.Tensor, alpha: tf.Tensor) -> tf.Tensor:
        return tf.where_v2(p > 0, tf.pow(p, 2 - alpha), 0.0)  # 0⁰ is 1

    s = mtf.cwise(weight, [mtf.cast(p, tf.float32), alpha], name="entmax_weight")
    dy = mtf.cast(dy, tf.float32)
    mean = _sum(s * dy, dim) / _sum(s, dim)
    return [mtf.cast(s * (dy - mean), x.dtype)]


def _sum(x: mtf.Tensor, dim: mtf.Dimension) -> mtf.Tensor:
    """Σ along `dim`, as the last: TensorFlow adds up the last in a tree, others one by one, which rounds more."""
    if x.shape.dims[-1] != dim:
        x = mtf.transpose(x, x.shape - dim + dim)
    return mtf.reduce_sum(x, reduced_dim=dim)


class _EntmaxOperation(MeshOperation):
    """An operation with its own gradient: mtf's custom_gradient fails when recomputed."""

    def __init__(self, x: mtf.Tensor, alpha: mtf.Tensor, dim: mtf.Dimension, n_iter: int, n_candidates: int) -> None:
        super().__init__([x, alpha], [(x.shape, x.dtype)], "entmax")
        self._n_candidates = n_candidates
        self._dim = dim
        self._n_iter = int(n_iter)

    def gradient(self, grad_ys: list[mtf.Tensor]) -> list[mtf.Tensor | None]:
        x, alpha = self.inputs
        return entmax_backward([x], [], [], self.outputs, grad_ys, alpha, self._dim) + [None]

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        x, alpha = self.inputs
        rows = ShardedRows(mesh_impl, x.shape, self._dim, whole_groups=False)
        rows_shape = x.shape - self._dim
        slice_shape = mesh_impl.slice_shape(rows_shape)

        def begin(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            """The rows, and [rows, 2] of their largest entry and whether one is invalid, finite to travel."""
            x = rows.to_rows(tf.cast(x, tf.float32))
            return x, _top_and_invalid(x)

        def top_and_epsilon(facts: tf.Tensor, alpha: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            """What to take from a row, NaN where it is invalid, and α − 1."""
            eps = tf.broadcast_to(align(alpha, self.inputs[1].shape, rows_shape), slice_shape)
            eps = tf.reshape(eps, [-1, 1]) - 1.0
            top = tf.where_v2(tf.logical_and(eps >= 0, eps <= 1), facts[:, :1], np.nan)
            return _nan_where_invalid(facts, top), eps

        x_rows, facts = slicewise(begin, lowering.tensors[x])
        top, eps = slicewise(top_and_epsilon, rows.across_shards(facts, "MAX"), lowering.tensors[alpha])

        def for_candidates(ids: LaidOut, p: LaidOut, slope: LaidOut) -> LaidOut:
            return slicewise(lambda x, ids, p: scatter_rows(p, ids, size_of(x, 1)), x_rows, ids, p)

        p = entmax_by_candidates(
            rows, x_rows, self._n_candidates, lambda x: slicewise(tf.subtract, x, top), eps, self._n_iter,
            for_candidates, lambda p, slope: p,
        )  # fmt: skip
        y = slicewise(lambda p: rows.from_rows(tf.cast(p, x.dtype)), p)
        lowering.set_tensor_lowering(self.outputs[0], y)


class _SoftmaxOperation(MeshOperation):
    def __init__(self, x: mtf.Tensor, dim: mtf.Dimension) -> None:
        super().__init__([x], [(x.shape, x.dtype)], "softmax")
        self._dim = dim

    def gradient(self, grad_ys: list[mtf.Tensor]) -> list[mtf.Tensor]:
        return entmax_backward(self.inputs, [], [], self.outputs, grad_ys, 1, self._dim)

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        (x,) = self.inputs
        rows = ShardedRows(mesh_impl, x.shape, self._dim, whole_groups=False)
        x_rows = slicewise(lambda x: rows.to_rows(tf.cast(x, tf.float32)), lowering.tensors[x])
        top = slicewise(lambda x: finite(tf.reduce_max(x, -1, keepdims=True)), x_rows)
        weights = slicewise(lambda x, top: tf.exp(x - top), x_rows, rows.across_shards(top, "MAX"))
        total = rows.across_shards(slicewise(fast_sum, weights), "SUM")

        def normalise(weights: tf.Tensor, total: tf.Tensor) -> tf.Tensor:
            # NaN and +inf show in the total, and so do rows of −inf alone
            valid = tf.logical_and(total > 0, total < np.inf)
            return weights * tf.where_v2(valid, 1.0 / total, np.nan)

        p = slicewise(normalise, weights, total)
        y = slicewise(lambda p: rows.from_rows(tf.cast(p, x.dtype)), p)
        lowering.set_tensor_lowering(self.outputs[0], y)


def _top_and_invalid(x: tf.Tensor) -> tf.Tensor:
    """[rows, 2] of the largest entries of x [rows, n] and 1 for rows with an invalid one, else 0; finite, to travel."""
    return tf.stack([finite(tf.reduce_max(x, -1)), has_invalid(x)], -1)


def _nan_where_invalid(facts: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """value [rows, 1] where `facts`, of `_top_and_invalid`, say that a row is valid."""
    return tf.where_v2(facts[:, 1:] < 0.5, value, np.nan)


def entmax_cross_entropy_with_logits(
    logits: mtf.Tensor, targets: mtf.Tensor, vocab_dim: mtf.Dimension, z_loss: float = 0.0, alpha: float = DEFAULT_ALPHA
) -> mtf.Tensor:
    """The loss that trains for `entmax`: the α-entmax Fenchel-Young loss.

    Blondel, Martins, Niculae 2020, "Learning with Fenchel-Young losses": with
    p = entmax(logits) and Ω(p) = (Σ p^α − 1) / (α(α−1)),
    loss = ⟨p − t, logits⟩ − Ω(p) + Ω(t). It is at least 0, is 0 just where p = t,
    and its gradient is p − t. α = 1 gives the cross entropy (less the entropy
    of t).

    GPT-Neo's function of this name is −log p of the target. That is infinite,
    and its gradient undefined, as soon as a target has probability 0, which
    under entmax is the rule; this loss is finite wherever the logits are, and
    pulls a target back into the support from outside it.

    Args:
      logits: mtf.Tensor with `vocab_dim`, any float dtype; computed in float32.
      targets: an integer mtf.Tensor [logits.shape − vocab_dim] (a target outside
        the vocabulary has a loss of 0, as under mtf's softmax loss), or a floating
        one of logits' shape: probabilities that sum to 1 along `vocab_dim`
        (through which no gradient flows).
      vocab_dim: mtf.Dimension.
      z_loss: a number; z_loss · (log Σ exp(logits))² is added, as in mtf's
        softmax_cross_entropy_with_logits.
      alpha: a number in [1, 2].

    Returns:
      float32 mtf.Tensor [logits.shape − vocab_dim], in nats for α = 1.

    Raises:
      ValueError: for targets of another shape, an alpha out of range, or a
        `vocab_dim` that logits lack.
    """
    vocab_dim = dim_of(logits, vocab_dim)
    rows = logits.shape - vocab_dim
    counts = None
    if targets.dtype.is_integer:
        if set(targets.shape.dims) != set(rows.dims):
            raise ValueError(f"integer targets of shape {targets.shape}; logits {logits.shape} need {rows}")
        targets = mtf.cast(targets, tf.int32)
        counts = mtf.cwise(
            lambda t: tf.cast(tf.logical_and(t >= 0, t < vocab_dim.size), tf.float32), [targets], tf.float32
        )
        targets = mtf.one_hot(targets, vocab_dim, dtype=tf.float32)
    elif set(targets.shape.dims) != set(logits.shape.dims):
        raise ValueError(f"soft targets of shape {targets.shape}; they need the shape of logits, {logits.shape}")
    logits = mtf.cast(logits, tf.float32)
    targets = mtf.transpose(mtf.stop_gradient(mtf.cast(targets, tf.float32)), logits.shape)
    p = mtf.stop_gradient(entmax(logits, alpha, vocab_dim))

    # Σ p = Σ t, so the logits may be taken from their largest: no cancellation
    # of large numbers, and an excluded logit of −inf adds exactly nothing.
    shifted = logits - mtf.stop_gradient(mtf.reduce_max(logits, reduced_dim=vocab_dim))
    loss = _sum(_times(p - targets, shifted), vocab_dim)

    def entropy_difference(p: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        """Ω(t) − Ω(p), entry by entry."""

        def term(q: tf.Tensor) -> tf.Tensor:  # (q^α − q) / (α(α−1)), which is q log q at α = 1
            log_q = tf.log(tf.where_v2(q > 0, q, 1.0))
            if alpha == 1:
                return q * log_q
            return q * tf.math.expm1((alpha - 1) * log_q) / (alpha * (alpha - 1))

        return term(t) - term(p)

    omega = mtf.cwise(entropy_difference, [p, targets], grad_function=0, name="omega")
    loss += _sum(omega, vocab_dim)
    if counts is not None:
        loss *= counts
    if z_loss:
        loss += z_loss * mtf.square(mtf.reduce_logsumexp(logits, vocab_dim))
    return loss


def _times(weight: mtf.Tensor, x: mtf.Tensor) -> mtf.Tensor:
    """weight · x, with 0 · ±inf = 0; differentiable in x alone."""

    def product(w: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        return tf.where_v2(tf.equal(w, 0.0), 0.0, w * x)

    return mtf.cwise(product, [weight, x], grad_function=lambda op, dy: [None, dy * op.inputs[0]], name="times")
