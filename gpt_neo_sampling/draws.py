"""Draws: from weights or from scores to an index, in two levels.

A dimension is taken in at most 64 contiguous groups, whose borders depend on
its size alone. A draw first chooses a group, then an entry in it, by inverse
CDF with a uniform of its own for each. One float32 uniform has 24 bits, which
is not enough for 50,257 entries at once.
"""

import numpy as np

from gpt_neo_sampling import exact
from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mtf_ops import align, size_of

GROUPS = 64  # a mesh axis of 2, 4 … 64 cuts none of them


def group_size(size):
    """Entries in each group of a dimension of `size` (the last may have fewer)."""
    return -(-size // GROUPS)


def padded_size(size, shards):
    """The least size, padding included, at which each of `shards` holds whole groups."""
    group = group_size(size)
    return shards * group * -(-size // (group * shards))


class Rows:
    """How an operation along one dim sees its slices: as [rows, entries] in groups.

    Sums along the dim are taken within groups first and then over them, always
    in the same order, so they have the same bits on every layout. A layout
    that splits the dim moves a few numbers for each group; where it cuts
    through a group, the whole row is gathered first.
    """

    def __init__(self, mesh_impl, shape, dim, size=None, whole_groups=True):
        """shape: mtf.Shape with `dim`; size: its entries less what is padding;
        whole_groups: False where nothing depends on groups lying on one shard."""
        self.mesh_impl = mesh_impl
        self.size = size or dim.size
        self.group = group_size(self.size)
        self.n_groups = -(-self.size // self.group)
        self._position = shape.dims.index(dim)
        self._slice_shape = mesh_impl.slice_shape(shape)
        self.entries = self._slice_shape[self._position]  # of one shard
        self.mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(dim)
        self.gathered_axis = None
        if whole_groups and self.mesh_axis is not None and self.entries % self.group:
            self.mesh_axis, self.gathered_axis = None, self.mesh_axis

    def to_rows(self, x):
        """A slice [...] as [rows, entries]."""
        perm = [i for i in range(x.shape.rank) if i != self._position] + [self._position]
        return tf.reshape(tf.transpose(x, perm) if perm != sorted(perm) else x, [-1, self.entries])

    def from_rows(self, x):
        """[rows, entries] as a slice."""
        rest = [n for i, n in enumerate(self._slice_shape) if i != self._position]
        back = list(range(len(rest)))
        back.insert(self._position, len(rest))
        x = tf.reshape(x, rest + [self.entries])
        return tf.transpose(x, back) if back != sorted(back) else x

    def gather(self, x):
        """Laid-out finite rows, whole where the layout cuts through groups."""
        if self.gathered_axis is None:
            return x
        return self.mesh_impl.allconcat(x, self.gathered_axis, 1)

    def grouped(self, x):
        """[..., entries] as [..., groups, group]."""
        x = _pad_last(x, after=-size_of(x, -1) % self.group)
        return tf.reshape(x, x.shape.as_list()[:-1] + [-1, self.group])

    def across_groups(self, x):
        """Laid-out [a, rows, groups of the shard] as [a, rows, all groups]."""
        if self.mesh_axis is not None:
            x = self.mesh_impl.allconcat(x, self.mesh_axis, 2)
        # shards may hold groups of nothing but padding
        return self.mesh_impl.slicewise(lambda x: x[..., : self.n_groups], x)

    def laid_out_pcoord(self):
        """Which part of the dim a processor holds, int32 scalars."""
        if self.mesh_axis is None:
            return self.mesh_impl.slicewise(tf.zeros_like, self.mesh_impl.laid_out_pnum())
        return self.mesh_impl.laid_out_pcoord(self.mesh_axis)

    def across_shards(self, x, reduction):
        if self.mesh_axis is not None:
            x = self.mesh_impl.allreduce(x, [self.mesh_axis], reduction)
        return x


def _fold_sum(x):
    """Sum over the last axis, keeping it: halves are added until one is left.

    Unlike reduce_sum, whose order of additions is the backend's affair.
    """
    size = size_of(x, -1)
    while size > 1:
        half = (size + 1) // 2
        upper = x[..., half:]
        if size % 2:
            upper = _pad_last(upper, after=1)
        x, size = x[..., :half] + upper, half
    return x


def _near_sum(x):
    """Sum over the last axis, keeping it, in an order that is the backend's in part.

    Its error does not grow with the axis, as reduce_sum's may: XLA adds one after
    the other on CPUs, which is off by 3e-5 for 50,257 equal entries.
    """
    x = _pad_last(x, after=-size_of(x, -1) % 16)
    return _fold_sum(tf.reduce_sum(tf.reshape(x, x.shape.as_list()[:-1] + [16, -1]), -2))


def _pad_last(x, before=0, after=0, value=0.0):
    if not before and not after:
        return x
    return tf.pad(x, [[0, 0]] * (x.shape.rank - 1) + [[before, after]], constant_values=value)


def _scan(x, combine):
    """Inclusive prefix scan over the last axis of values ≥ 0, in log₂ steps."""
    shift, size = 1, size_of(x, -1)
    while shift < size:
        x = combine(x, _pad_last(x[..., :-shift], before=shift))
        shift *= 2
    return x


def _cdf(weights):
    """(cdf, last) of weights [..., n], none below 0.

    cdf [..., n] never falls, and rises only at entries of weight above 0: sums
    taken in log₂ steps need not be monotone in floating point, so their running
    maximum over those entries is. last [...] int32 is the last such entry, −1
    where there is none.
    """
    has_mass = weights > 0
    sums = tf.where_v2(has_mass, _scan(weights, tf.add), 0.0)
    last = tf.reduce_max(tf.where_v2(has_mass, tf.range(size_of(weights, -1)), -1), -1)
    return _scan(sums, tf.maximum), last


def _search(weights, which, u, margin=None):
    """Draws from chosen ones of several weight vectors, by inverse CDF.

    Args:
      weights: [rows, vectors, n] float32, none below 0.
      which: [rows, samples] int32 in [0, vectors).
      u: [rows, samples] float32 in [0, 1).
      margin: None or, for few samples, float32 [rows, vectors]: how near a border
        leaves a draw in doubt, in the vector's own units.

    Returns:
      (entry, doubt): [rows, samples] int32, the first entry whose cdf passes u
      times the total (the last entry with mass where rounding leaves none), −1
      without mass; and a list, empty without `margin`, or else of float32
      [rows, samples], 1.0 for a draw in doubt.
    """
    rows, vectors, n = weights.shape.as_list()
    if size_of(u, 1) <= vectors:  # few draws: look only at what they draw from
        cdf, last = _cdf(tf.gather(weights, which, batch_dims=1))
        target = u[..., tf.newaxis] * cdf[..., -1:]
        entry = tf.minimum(tf.reduce_sum(tf.cast(cdf <= target, tf.int32), -1), last)
        if margin is None:
            return entry, []
        near = tf.abs(cdf - target) < tf.gather(margin, which, batch_dims=1)[..., tf.newaxis]
        return entry, [tf.reduce_max(tf.cast(near, tf.float32), -1)]
    assert margin is None
    cdf, last = _cdf(weights)
    cdf = tf.reshape(cdf, [-1])
    vector = which + tf.range(rows)[:, tf.newaxis] * vectors
    begin = vector * n
    target = u * tf.gather(cdf, begin + (n - 1))
    low, high = tf.zeros_like(which), tf.fill(tf.shape(which), n)  # cdf[low − 1] ≤ target < cdf[high]
    for _ in range(n.bit_length()):
        middle = (low + high) // 2
        right = tf.logical_and(low < high, tf.gather(cdf, begin + tf.minimum(middle, n - 1)) <= target)
        low, high = tf.where_v2(right, middle + 1, low), tf.where_v2(right, high, middle)
    return tf.minimum(low, tf.gather(tf.reshape(last, [-1]), vector)), []


def _draw(rows, weights, group_uniform, entry_uniform, errors=None):
    """Both levels of a draw, at the level of laid-out tensors.

    Args:
      rows: Rows.
      weights: laid-out float32 [rows, entries], none below 0; +inf or NaN makes
        a row invalid.
      group_uniform, entry_uniform: laid-out float32 [rows, samples] in [0, 1).
      errors: None, for sums in a fixed order, of weights scaled by powers of two
        so that none of float32 over- or underflows; or, for one sample a row,
        laid-out float32 like `weights`: how far each may be wrong. Rounding of
        the sums must be in it.

    Returns:
      (drawn, doubt): laid-out int32 [rows, samples], −1 for an invalid row; and,
      None without `errors`, float32 [rows, samples], 1.0 for a draw so near to a
      border that the errors may have moved it across.
    """
    slicewise = rows.mesh_impl.slicewise
    scaled = errors is None

    def groups(w, *errors):
        """Groups [rows, groups, group]; [2, rows, groups], to travel: what each adds
        up to, and the exponent taken out of it, biased, 255 for an invalid one (with
        errors: what they add up to, −1 for an invalid one); and with errors these."""
        w = rows.grouped(w)
        if errors:
            total, error = _near_sum(w)[..., 0], tf.reduce_sum(rows.grouped(errors[0]), -1)
            valid = tf.logical_and(total < np.inf, error < np.inf)  # (not for NaN)
            total, error = tf.where_v2(valid, total, 0.0), tf.where_v2(valid, error, -1.0)
            return w, tf.stack([total, error]), error
        bits = tf.bitcast(tf.reduce_max(w, -1, keepdims=True), tf.int32)
        exponent = tf.bitwise.right_shift(bits, tf.constant(23))
        scale = tf.bitwise.left_shift(254 - tf.minimum(exponent, 253), tf.constant(23))
        w *= tf.bitcast(scale, tf.float32)  # its largest is in [1, 4) now
        total = tf.where_v2(exponent < 255, _fold_sum(w), 0.0)  # finite, to travel
        return w, tf.stack([total[..., 0], tf.cast(exponent[..., 0], tf.float32)])

    def choose_group(summary, u):
        totals, margin = summary[0], None
        if scaled:
            exponent = tf.cast(summary[1], tf.int32)
            largest = tf.reduce_max(exponent, -1, keepdims=True)
            relative = tf.minimum(exponent, 253) - tf.minimum(largest, 253) + 127
            relative = tf.bitwise.left_shift(tf.maximum(relative, 0), tf.constant(23))
            totals *= tf.bitcast(relative, tf.float32)
            valid = largest < 255
        else:
            margin = tf.reduce_sum(summary[1], -1, keepdims=True)
            valid = tf.reduce_min(summary[1], -1, keepdims=True) >= 0
        group, doubt = _search(totals[:, tf.newaxis], tf.zeros_like(u, tf.int32), u, margin)
        return tf.where_v2(valid, group, -1), *doubt

    def choose_entry(pcoord, w, group, u, margin=None):
        """One more than the index drawn; 0 where another shard holds the group."""
        n_groups = size_of(w, 1)
        local = group - pcoord * n_groups
        held = tf.logical_and(group >= 0, tf.logical_and(local >= 0, local < n_groups))
        entry, doubt = _search(w, tf.where_v2(held, local, 0), u, margin)
        entry = tf.where_v2(held, group * rows.group + entry + 1, 0)
        return entry, *(tf.where_v2(held, d, 0.0) for d in doubt)

    weights, summary, *margin = slicewise(groups, weights, *([] if scaled else [errors]))
    group, *doubt_of_group = slicewise(choose_group, rows.across_groups(summary), group_uniform)
    drawn, *doubt = slicewise(choose_entry, rows.laid_out_pcoord(), weights, group, entry_uniform, *margin)
    drawn = slicewise(lambda d: d - 1, rows.across_shards(drawn, "SUM"))
    return drawn, slicewise(tf.maximum, *doubt_of_group, *doubt) if doubt else None


def grouped_draw(weights, group_uniform, entry_uniform, dim, samples_dim=None, size=None):
    """Draws indices along `dim` in proportion to `weights`, in two levels.

    All sums are taken in one fixed order, of weights scaled by powers of two, so
    equal weights and uniforms give equal draws on any layout and backend, and no
    weight that float32 holds over- or underflows. Time and memory are linear in
    `dim`. A layout that splits `dim` moves 128 numbers a row (all of the row if
    it cuts through a group).

    Args:
      weights: mtf.Tensor, any float dtype, summed in float32.
      group_uniform: float32 mtf.Tensor in [0, 1) [weights.shape − dim], then
        samples_dim where there is one.
      entry_uniform: likewise.
      dim: mtf.Dimension of `weights`.
      samples_dim: mtf.Dimension, for many draws from each row.
      size: int, where the entries of `dim` from there on are padding, of weight
        0: the draws are then those without the padding.

    Returns:
      int32 mtf.Tensor of the uniforms' shape. An entry of weight 0 is never
      drawn; a row with a negative or non-finite weight, or with no mass, gives
      −1.
    """
    return _GroupedDrawOperation(weights, group_uniform, entry_uniform, dim, samples_dim, size).outputs[0]


class _DrawOperation(mtf.Operation):
    def __init__(self, inputs, dim, samples_dim, size, name):
        super().__init__(inputs, name=name)
        x, group_uniform, entry_uniform = inputs[:3]
        rows = x.shape - dim
        shape = rows if samples_dim is None else rows + samples_dim
        for u in (group_uniform, entry_uniform):
            if u.shape != shape:
                raise ValueError(f"{name}: uniforms of shape {u.shape} where {shape} is needed")
        if size is not None and not 1 <= size <= dim.size:
            raise ValueError(f"{name}: size={size} of {dim}; from 1 to {dim.size} is needed")
        self._dim = dim
        self._size = size
        self._outputs = [mtf.Tensor(self, shape, tf.int32)]
        self._splittable_dims, self._unsplittable_dims = self._initialize_all_dimensions_as_splittable()

    @property
    def has_gradient(self):
        return False

    def _rows(self, mesh_impl):
        rows = Rows(mesh_impl, self.inputs[0].shape, self._dim, self._size)
        if rows.mesh_axis is not None:
            for d in self.outputs[0].shape.dims:
                if mesh_impl.tensor_dimension_to_mesh_axis(d) == rows.mesh_axis:
                    raise ValueError(
                        f"{self.name}: the layout splits both {self._dim.name} and {d.name} along mesh axis "
                        f"{mesh_impl.shape[rows.mesh_axis].name}; drawing along {self._dim.name} needs {d.name} "
                        "elsewhere"
                    )
        return rows


class _GroupedDrawOperation(_DrawOperation):
    def __init__(self, weights, group_uniform, entry_uniform, dim, samples_dim, size):
        super().__init__([weights, group_uniform, entry_uniform], dim, samples_dim, size, "grouped_draw")

    def lower(self, lowering):
        mesh_impl = lowering.mesh_impl(self)
        rows = self._rows(mesh_impl)
        weights, *uniforms = (lowering.tensors[t] for t in self.inputs)
        slicewise = mesh_impl.slicewise

        def to_rows(w):
            """Whatever makes a row invalid becomes +inf, and −0.0 becomes 0.0."""
            w = rows.to_rows(tf.cast(w, tf.float32))
            return tf.where_v2(w >= 0, tf.abs(w), np.inf)  # false for NaN too

        w = slicewise(to_rows, weights)
        if rows.gathered_axis is not None:  # in finite values; −1 stands for +inf
            w = rows.gather(slicewise(lambda w: tf.where_v2(w < np.inf, w, -1.0), w))
            w = slicewise(lambda w: tf.where_v2(w >= 0, w, np.inf), w)
        uniforms = [slicewise(lambda u, w: tf.reshape(u, [size_of(w, 0), -1]), u, w) for u in uniforms]
        drawn, _ = _draw(rows, w, *uniforms)
        out_shape = mesh_impl.slice_shape(self.outputs[0].shape)
        lowering.set_tensor_lowering(self.outputs[0], slicewise(lambda d: tf.reshape(d, out_shape), drawn))


# --- entmax -----------------------------------------------------------------------


def solve_entmax(rows, z, epsilon, n_iter):
    """α-entmax of laid-out rows, by Newton's method.

    With y = z − δ and ε = α − 1, p = [1 + εy]₊^(1/ε), which is exp(y) at ε = 0,
    and δ is sought: Σp = 1 at the root, more to its left. (Σp)^ε as a function
    of δ is convex, so no step passes the root, but by rounding.

    Args:
      rows: Rows.
      z: laid-out float32 [rows, entries], scores less the largest one of their
        row; a row that holds NaN comes out as NaN.
      epsilon: laid-out float32 [rows, 1].
      n_iter: int, the most steps.

    Returns:
      laid-out float32 like z, its rows summing to 1.
    """
    return _entmax_and_slope(rows, z, epsilon, n_iter)[0]


def _entmax_and_slope(rows, z, epsilon, n_iter):
    """What `solve_entmax` gives; and, laid-out like z, by how much each entry of it
    moves with y, at the most: ∂p/∂y, and at the edge of the support what it rises to."""
    mesh_impl = rows.mesh_impl
    slicewise = mesh_impl.slicewise

    def evaluate(z, eps, delta):
        """p, ∂p/∂y and 1 + εy, and [2, rows, 1] with Σp and Σ∂p/∂y, over this shard."""
        y = z - delta
        base = 1.0 + eps * y
        inside = tf.logical_or(base > 0, tf.equal(eps, 0.0))
        log_p = tf.where_v2(eps > 0, tf.log1p(eps * y) / eps, y)
        # XLA may compute εy + 1 more than once, rounded once here and twice there. So no
        # entry at the edge may depend on equal answers, and p/base must not get large.
        p = tf.where_v2(tf.is_nan(y), y, tf.exp(tf.where_v2(inside, log_p, -np.inf)))
        slope = tf.where_v2(tf.logical_and(p > 0, eps > 0), p / tf.maximum(base, 2.0**-24), p)
        return p, slope, base, tf.stack([_near_sum(p), _near_sum(slope)])

    def newton_step(sums, eps, last):
        total, slope = sums[0], sums[1]
        log_total = tf.log(total)
        gain = tf.where_v2(eps > 0, -tf.math.expm1(-eps * log_total) / eps, log_total)
        # Back it goes where rounding made the last step too long, and not all the way
        # to where that began: past the edge of many ties it would, for ever.
        return tf.maximum(gain * total / slope, -0.5 * tf.abs(last))

    every_axis = list(range(mesh_impl.ndims))
    like = mesh_impl.LaidOutTensor.from_tensor_list

    def body(i, _, step, delta):
        delta = like(delta)
        *_, sums = slicewise(evaluate, z, epsilon, delta)
        step = slicewise(newton_step, rows.across_shards(sums, "SUM"), epsilon, like(step))
        delta = slicewise(tf.add, delta, step)

        # NaN is not greater: an invalid row never keeps the loop going.
        def moving(step, delta):
            return tf.reduce_max(tf.cast(tf.abs(step) > 2e-7 * (1.0 + tf.abs(delta)), tf.float32))

        going = mesh_impl.allreduce(slicewise(moving, step, delta), every_axis, "MAX")
        return i + 1, going.tensor_list, step.tensor_list, delta.tensor_list

    delta = slicewise(tf.zeros_like, epsilon)
    step = slicewise(tf.ones_like, epsilon)
    going = slicewise(lambda d: tf.ones([], tf.float32), delta)
    *_, delta = tf.while_loop(
        lambda i, going, *_: tf.logical_and(i < n_iter, going[0] > 0),
        body,
        (tf.constant(0), going.tensor_list, step.tensor_list, delta.tensor_list),
    )

    def normalise(p, slope, base, sums, eps):
        near_edge = 1e-6
        at_edge = tf.exp((1.0 / tf.maximum(eps, 2.0**-23) - 1.0) * np.log(2 * near_edge))
        slope = tf.where_v2(tf.abs(base) < near_edge, at_edge, slope)
        return p / sums[0], slope / sums[0]

    *entries, sums = slicewise(evaluate, z, epsilon, like(delta))
    return slicewise(normalise, *entries, rows.across_shards(sums, "SUM"), epsilon)


# --- Draws from scores --------------------------------------------------------------

# How far weights are taken to be from the exact ones, whatever the backend, and rounding
# of their sums included: for softmax in parts of the weight, for entmax in units of the
# scores. Seen on CPUs at the most, by tests/test_draws.py among others: 3e-7 and 1.1e-6.
SOFTMAX_MARGIN, ENTMAX_MARGIN = 1e-6, 4e-6


def score_draw(scores, group_uniform, entry_uniform, dim, alpha=None, size=None):
    """Draws an index along `dim` from softmax or entmax of `scores`.

    Equal scores and uniforms give the same index on every layout, backend and
    device, although exp does not give the same bits there. The weights are
    computed in floating point, and where a draw falls so near to a border
    between two entries that rounding may have moved it across, all rows draw
    again, from weights computed in integers (see `exact`). So what comes out is
    always what those would have given; that is rare, about one draw in a
    thousand.

    A layout that splits `dim` moves 128 numbers a row, for entmax 2 more for
    each step of its solver (all of the row if it cuts through a group).

    Args:
      scores: float32 mtf.Tensor, at most 0, the largest of each row 0. −inf is
        allowed.
      group_uniform, entry_uniform: float32 mtf.Tensors in [0, 1)
        [scores.shape − dim].
      dim: mtf.Dimension of `scores`.
      alpha: None for softmax; a float32 mtf.Tensor in [1, 2], its dims among
        [scores.shape − dim], for entmax.
      size: int, where the entries of `dim` from there on are padding, of score
        −inf or the lowest number: the draws are then those without the padding.

    Returns:
      int32 mtf.Tensor [scores.shape − dim]; −1 for a row with NaN, a score above
      0, no score above −inf, or an alpha outside [1, 2].
    """
    return _ScoreDrawOperation(scores, group_uniform, entry_uniform, dim, alpha, size).outputs[0]


class _ScoreDrawOperation(_DrawOperation):
    def __init__(self, scores, group_uniform, entry_uniform, dim, alpha, size):
        inputs = [scores, group_uniform, entry_uniform] + ([] if alpha is None else [alpha])
        super().__init__(inputs, dim, None, size, "score_draw")
        if scores.dtype != tf.float32:
            raise ValueError(f"score_draw: scores of dtype {scores.dtype.name}; float32 is needed")

    def lower(self, lowering):
        mesh_impl = lowering.mesh_impl(self)
        rows = self._rows(mesh_impl)
        scores, *others = (lowering.tensors[t] for t in self.inputs)
        slicewise = mesh_impl.slicewise
        z = slicewise(rows.to_rows, scores)
        if rows.gathered_axis is not None:  # in finite values; 1 stands for an invalid score
            lowest = tf.float32.min
            z = rows.gather(slicewise(lambda z: tf.where_v2(z <= 0, tf.maximum(z, lowest), 1.0), z))
        uniforms = [slicewise(lambda u: tf.reshape(u, [-1, 1]), u) for u in others[:2]]
        epsilon = None
        if len(others) == 3:
            shape, x_shape = self.inputs[3].shape, self.inputs[0].shape

            def per_row(alpha, scores):
                alpha = tf.broadcast_to(align(alpha, shape, x_shape - self._dim), rows_shape)
                alpha = tf.reshape(alpha, [-1, 1])
                return tf.where_v2(tf.logical_and(alpha >= 1, alpha <= 2), alpha - 1.0, np.nan)

            rows_shape = mesh_impl.slice_shape(x_shape - self._dim)
            epsilon = slicewise(per_row, others[2], z)

        def invalid_as_nan(z, *eps):
            """NaN where the score, or α, is not one."""
            z = tf.where_v2(z <= 0, z, np.nan)
            return z + tf.where_v2(tf.is_nan(eps[0]), np.nan, 0.0) if eps else z

        z = slicewise(invalid_as_nan, z, *([] if epsilon is None else [epsilon]))
        if epsilon is None:
            weights = slope = slicewise(tf.exp, z)
            margin = SOFTMAX_MARGIN
        else:
            weights, slope = _entmax_and_slope(rows, z, epsilon, n_iter=50)
            margin = ENTMAX_MARGIN
        drawn, doubt = _draw(rows, weights, *uniforms, slicewise(lambda s: s * margin, slope))
        doubt = slicewise(tf.reduce_max, doubt)
        doubt = mesh_impl.allreduce(doubt, list(range(mesh_impl.ndims)), "MAX").tensor_list[0] > 0.5

        def draw_again():
            if epsilon is None:
                weights = slicewise(exact.softmax_weights, z)
            else:
                sum_over_shards = lambda x: rows.across_shards(x, "SUM")  # noqa: E731
                clean = slicewise(lambda e: tf.where_v2(tf.is_nan(e), 0.0, e), epsilon)
                weights = exact.entmax_weights(mesh_impl, z, clean, sum_over_shards)
            weights = slicewise(lambda w, z: tf.where_v2(tf.is_nan(z), np.inf, w), weights, z)
            return _draw(rows, weights, *uniforms)[0].tensor_list

        drawn = tf.cond(doubt, draw_again, lambda: [tf.identity(d) for d in drawn.tensor_list])
        drawn = mesh_impl.LaidOutTensor.from_tensor_list(drawn if isinstance(drawn, (list, tuple)) else [drawn])
        out_shape = mesh_impl.slice_shape(self.outputs[0].shape)
        lowering.set_tensor_lowering(self.outputs[0], slicewise(lambda d: tf.reshape(d, out_shape), drawn))
