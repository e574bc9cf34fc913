"""Draws: from weights or from scores to an index, in two levels.

A dimension is taken in at most 64 contiguous groups, whose borders depend on
its size alone. A draw first chooses a group, then an entry in it, by inverse
CDF with a uniform of its own for each. One float32 uniform has 24 bits, which
is not enough for 50,257 entries at once.
"""

import functools
import math
import numbers

import numpy as np

from gpt_neo_sampling import exact
from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mtf_ops import align, finite, largest, pad_last, size_of

SUM_MARGIN = 1e-6  # how far sums in two orders may be apart, in parts of the total
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
        self.split_axis = self.mesh_axis  # that the slices are split along
        self.gathered_axis = None
        self.ids = None  # all entries are at hand
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

    def grouped(self, x, fill=0.0):
        """A slice's [..., entries] as [..., groups, group]; `fill` stands where there is no entry."""
        x = pad_last(x, after=-size_of(x, -1) % self.group, value=fill)
        return tf.reshape(x, x.shape.as_list()[:-1] + [-1, self.group])

    def in_groups(self, x, fill=0.0):
        """Laid-out [rows, entries] as [rows, groups of the shard, places of a group]."""
        return self.mesh_impl.slicewise(lambda x: self.grouped(x, fill), x)

    def across_groups(self, x):
        """Laid-out [a, rows, groups of the shard] as [a, rows, all groups]."""
        if self.mesh_axis is not None:
            x = self.mesh_impl.allconcat(x, self.mesh_axis, 2)
        # shards may hold groups of nothing but padding
        return self.mesh_impl.slicewise(lambda x: x[..., : self.n_groups], x)

    def choose_within(self, group, choose, weights, *more):
        """Chooses entries in groups that are chosen already.

        Args:
          group: laid-out int32 [rows, samples]; −1 for none.
          choose: a function from slices of weights, of the groups to choose in, counted
            within the shard, and of `more`, to [int32 [rows, samples], the place in
            the group], and whatever else of that shape.
          weights: laid-out [rows, groups of the shard, places].

        Returns:
          laid-out [rows, samples]: the index along the dim, −1 where the group is; and
          what else `choose` gave, 0 where another shard holds the group.
        """

        def on_shard(group, weights, *args):
            args = list(args)
            pcoord = args.pop() if self.mesh_axis is not None else None
            ids = args.pop() if self.ids is not None else None
            local, first_entry, held = group, 0, group >= 0
            if pcoord is not None:
                n_groups = size_of(weights, 1)
                local, first_entry = group - pcoord * n_groups, pcoord * self.entries
                held = tf.logical_and(held, tf.logical_and(local >= 0, local < n_groups))
            place, *rest = choose(weights, tf.where_v2(held, local, 0), *args)
            if ids is None:
                index = group * self.group + place
            else:
                index = tf.gather(ids, place, batch_dims=1) + first_entry
            return tf.where_v2(held, index + 1, 0), *(tf.where_v2(held, r, tf.zeros_like(r)) for r in rest)

        args = [weights, *more] + ([] if self.ids is None else [self.ids])
        if self.mesh_axis is not None:
            args.append(self.mesh_impl.laid_out_pcoord(self.mesh_axis))
        index, *rest = self.mesh_impl.slicewise(on_shard, group, *args)
        return self.mesh_impl.slicewise(lambda i: i - 1, self.across_shards(index, "SUM")), *rest

    def across_shards(self, x, reduction):
        if self.mesh_axis is not None:
            x = self.mesh_impl.allreduce(x, [self.mesh_axis], reduction)
        return x

    def pcoords(self):
        """The arguments, one or none, that tell a slice which shard it is."""
        return [] if self.mesh_axis is None else [self.mesh_impl.laid_out_pcoord(self.mesh_axis)]

    def entry_numbers(self, pcoord=0):
        """int32 [entries]: those of a shard, counted along the dim."""
        return tf.range(self.entries) + pcoord * self.entries


class ChosenRows(Rows):
    """Rows of which some entries alone are at hand, the others being of no weight.

    Their groups are those of the whole rows, and so are draws from them.
    """

    def __init__(self, mesh_impl, size, ids, mesh_axis=None, entries=None):
        """size: the entries of a whole row; ids: laid-out int32 [rows, chosen], ascending: which ones of them are at
        hand, or of its `entries` on this shard where `mesh_axis` splits them."""
        self.mesh_impl = mesh_impl
        self.size = size
        self.group = group_size(size)
        self.n_groups = -(-size // self.group)
        self.entries = entries or size
        self.mesh_axis = self.split_axis = mesh_axis
        self.gathered_axis = None
        self.ids = ids

    def in_groups(self, x, fill=0.0):
        """Each entry has a place in every group, which holds `fill` in all but its own."""
        groups = tf.range(-(-self.entries // self.group))[:, tf.newaxis]

        def spread(x, ids):
            return tf.where_v2(tf.equal(ids[:, tf.newaxis] // self.group, groups), x[:, tf.newaxis], fill)

        return self.mesh_impl.slicewise(spread, x, self.ids)


def spread_rows(lowering, x, shape):
    """An mtf.Tensor whose dims are among those of `shape`, which are the rows', as laid-out [rows, 1]."""
    mesh_impl = lowering.mesh_impl(x)
    slice_shape = mesh_impl.slice_shape(shape)
    spread = lambda t: tf.reshape(tf.broadcast_to(align(t, x.shape, shape), slice_shape), [-1, 1])  # noqa: E731
    return mesh_impl.slicewise(spread, lowering.tensors[x])


def _fold_sum(x):
    """Sum over the last axis, keeping it: halves are added until one is left.

    Unlike reduce_sum, whose order of additions is the backend's affair (even of
    two at a time: XLA makes one sum of several).
    """
    size = size_of(x, -1)
    while size > 1:
        half = (size + 1) // 2
        upper = pad_last(x[..., half:], after=size % 2)
        x, size = x[..., :half] + upper, half
    return x


def near_sum(x):
    """Sum over the last axis, keeping it, in an order that is the backend's in part.

    Its error does not grow with the axis, as reduce_sum's may: XLA adds one after
    the other on CPUs, which is off by 3e-5 for 50,257 equal entries.
    """
    size = size_of(x, -1)
    part = next((n for n in range(math.isqrt(size), 3, -1) if size % n == 0), None)
    if part is None:
        part = min(16, size)
        x = pad_last(x, after=-size % part)
    parts = tf.reshape(x, x.shape.as_list()[:-1] + [part, -1])
    return tf.reduce_sum(tf.reduce_sum(parts, -1), -1, keepdims=True)


def _near_cdf(weights):
    """Cumulative sums over the last axis, as near as `near_sum`; the last of them may be repeated."""
    size = size_of(weights, -1)
    if size <= 16:
        return tf.cumsum(weights, -1)
    part, shape = math.isqrt(size), weights.shape.as_list()[:-1]
    within = tf.cumsum(tf.reshape(pad_last(weights, after=-size % part), shape + [-1, part]), -1)
    before = tf.cumsum(within[..., -1:], -2, exclusive=True)
    return tf.reshape(before + within, shape + [-1])


def _scan(x, combine):
    """Inclusive prefix scan over the last axis of values ≥ 0, in log₂ steps."""
    shift, size = 1, size_of(x, -1)
    while shift < size:
        x = combine(x, pad_last(x[..., :-shift], before=shift))
        shift *= 2
    return x


def _sums_and_last(weights):
    """(sums, last) of weights [..., n], none below 0.

    sums [..., n] are those up to each entry of weight above 0, and 0 at the others:
    taken in log₂ steps they need not be monotone in floating point. last [...]
    int32 is the last entry of weight above 0, −1 where there is none.
    """
    has_mass = weights > 0
    sums = tf.where_v2(has_mass, _scan(weights, tf.add), 0.0)
    last = tf.reduce_max(tf.where_v2(has_mass, tf.range(size_of(weights, -1)), -1), -1)
    return sums, last


def _search(weights, which, u):
    """Draws from chosen ones of several weight vectors, by inverse CDF, with sums in a fixed order.

    Args:
      weights: [rows, vectors, n] float32, none below 0.
      which: [rows, samples] int32 in [0, vectors).
      u: [rows, samples] float32 in [0, 1).

    Returns:
      [rows, samples] int32, the first entry with mass up to which the sum passes u
      times the largest sum (the last entry with mass where rounding leaves none),
      −1 without mass.
    """
    rows, vectors, n = weights.shape.as_list()
    if size_of(u, 1) <= vectors:  # few draws: look only at what they draw from
        sums, last = _sums_and_last(tf.gather(weights, which, batch_dims=1))
        target = u[..., tf.newaxis] * tf.reduce_max(sums, -1, keepdims=True)
        return tf.minimum(tf.reduce_min(tf.where_v2(sums > target, tf.range(n), n), -1), last)
    sums, last = _sums_and_last(weights)
    cdf = tf.reshape(_scan(sums, tf.maximum), [-1])  # which a sum passes where, for the first time, one of `sums` does
    vector = which + tf.range(rows)[:, tf.newaxis] * vectors
    begin = vector * n
    target = u * tf.gather(cdf, begin + (n - 1))
    low, high = tf.zeros_like(which), tf.fill(tf.shape(which), n)  # cdf[low − 1] ≤ target < cdf[high]
    for _ in range(n.bit_length()):
        middle = (low + high) // 2
        right = tf.logical_and(low < high, tf.gather(cdf, begin + tf.minimum(middle, n - 1)) <= target)
        low, high = tf.where_v2(right, middle + 1, low), tf.where_v2(right, high, middle)
    return tf.minimum(low, tf.gather(tf.reshape(last, [-1]), vector))


def _search_near(weights, which, u, margin):
    """`_search` of one sample a row, with sums in whatever order is fast.

    Args:
      weights, which, u: as for `_search`; each vector that is drawn from has mass.
      margin: how near to a border a draw is in doubt: a number, in parts of the
        total, or float32 [rows, vectors], in the weights' own units.

    Returns:
      (entry, doubt): [rows, 1], int32 in [0, n), and float32, 1.0 in doubt.
    """
    cdf = _near_cdf(tf.gather(weights, which, batch_dims=1)[:, 0])
    total = cdf[:, -1:]
    margin = margin * total if isinstance(margin, float) else tf.gather(margin, which, batch_dims=1)
    target = u * total
    entry = tf.reduce_sum(tf.cast(cdf <= target, tf.int32), -1, keepdims=True)
    doubt = tf.reduce_min(tf.abs(cdf - target), -1, keepdims=True) < margin
    return tf.minimum(entry, size_of(weights, -1) - 1), tf.cast(doubt, tf.float32)


def _draw(rows, weights, group_uniform, entry_uniform):
    """Both levels of a draw, at the level of laid-out tensors, with sums in a fixed order.

    They are of weights scaled by powers of two, so that none of float32 over- or
    underflows.

    Args:
      rows: Rows.
      weights: laid-out float32 [rows, entries]; one below 0, +inf or NaN makes a
        row invalid.
      group_uniform, entry_uniform: laid-out float32 [rows, samples] in [0, 1).

    Returns:
      laid-out int32 [rows, samples], −1 for an invalid row or one without mass.
    """
    slicewise = rows.mesh_impl.slicewise

    def sum_groups(w):
        """w scaled; and [2, rows, groups], to travel: what each adds up to, and the
        exponent taken out of it, biased, 255 for an invalid one."""
        least, most = tf.reduce_min(w, -1, keepdims=True), tf.reduce_max(w, -1, keepdims=True)
        most = tf.where_v2(least >= 0, tf.abs(most), np.inf)  # without −0.0's sign
        exponent = tf.bitwise.right_shift(tf.bitcast(most, tf.int32), tf.constant(23))
        scale = tf.bitwise.left_shift(254 - tf.minimum(exponent, 253), tf.constant(23))
        w *= tf.bitcast(scale, tf.float32)  # its largest is in [1, 4) now
        total = _fold_sum(w)  # NaN where one is, as maxima need not be
        exponent = tf.where_v2(total < np.inf, exponent, 255)
        total = tf.where_v2(exponent < 255, total, 0.0)  # finite, to travel
        return w, tf.stack([total[..., 0], tf.cast(exponent[..., 0], tf.float32)])

    def choose_group(sums, u):
        exponent = tf.cast(sums[1], tf.int32)
        largest = tf.reduce_max(exponent, -1, keepdims=True)
        relative = tf.minimum(exponent, 253) - tf.minimum(largest, 253) + 127
        relative = tf.bitwise.left_shift(tf.maximum(relative, 0), tf.constant(23))
        totals = sums[0] * tf.bitcast(relative, tf.float32)
        group = _search(totals[:, tf.newaxis], tf.zeros_like(u, tf.int32), u)
        return tf.where_v2(largest < 255, group, -1)

    weights, sums = slicewise(sum_groups, rows.in_groups(weights))
    group = slicewise(choose_group, rows.across_groups(sums), group_uniform)
    (drawn,) = rows.choose_within(group, lambda w, group, u: [_search(w, group, u)], weights, entry_uniform)
    return drawn


def _draw_near(rows, weights, group_uniform, entry_uniform, margin, slope=None, checked=True):
    """`_draw` of one sample a row, with sums in whatever order is fast.

    Args:
      weights: laid-out, as `rows.in_groups` gives them.
      margin: a number: how far each weight may be wrong, rounding of the sums
        included, in parts of it, or of its `slope`.
      slope: None, or laid-out like weights.
      checked: False where weights may be below 0, or so large or so small that
        sums of them over- or underflow; the draw of such a row is in doubt.

    Returns:
      (drawn, doubt): laid-out [rows, 1], int32, −1 for an invalid row; and
      float32, 1.0 for a draw so near to a border that errors may have moved it
      across.
    """
    slicewise = rows.mesh_impl.slicewise

    def sum_groups(*weights):
        """[1 or 2, rows, groups], to travel: what the weights add up to, −1 for an invalid group; and what they may
        be wrong by."""
        sums = [near_sum(w)[..., 0] for w in weights]
        valid = functools.reduce(tf.logical_and, [s < np.inf for s in sums])  # false for NaN too
        if not checked:
            valid = tf.logical_and(valid, tf.reduce_min(weights[0], -1) >= 0)
        return tf.stack([tf.where_v2(valid, s, -1.0) for s in sums])

    def choose_group(sums, u):
        row_margin = margin if slope is None else margin * tf.reduce_sum(sums[1], -1, keepdims=True)
        group, doubt = _search_near(tf.maximum(sums[0], 0.0)[:, tf.newaxis], tf.zeros_like(u, tf.int32), u, row_margin)
        least, most = tf.reduce_min(sums[0], -1, keepdims=True), tf.reduce_max(sums[0], -1, keepdims=True)
        valid = tf.logical_and(least >= 0, most > 0)
        doubt = tf.where_v2(valid, doubt, 0.0)
        if not checked:
            doubt = tf.where_v2(tf.logical_and(least >= 0, _is_moderate(most)), doubt, 1.0)
        return tf.where_v2(valid, group, -1), doubt

    def choose_entry(weights, group, u, *sums):
        return _search_near(weights, group, u, margin * sums[0][1] if sums else margin)

    sums = slicewise(sum_groups, *([weights] if slope is None else [weights, slope]))
    group, group_doubt = slicewise(choose_group, rows.across_groups(sums), group_uniform)
    more = [] if slope is None else [sums]
    drawn, entry_doubt = rows.choose_within(group, choose_entry, weights, entry_uniform, *more)
    return drawn, slicewise(tf.maximum, group_doubt, entry_doubt)


def _is_moderate(total):
    """Whether a row's sums are far from float32's limits."""
    return tf.logical_and(total > 2.0**-100, total < 2.0**100)


def _draw_near_first(rows, weights, uniforms):
    """`_draw` of one sample a row: its result, in half the time where no draw is in doubt."""
    mesh_impl = rows.mesh_impl
    drawn, doubt = _draw_near(rows, rows.in_groups(weights), *uniforms, SUM_MARGIN, checked=False)

    def draw_again():
        return _draw(rows, weights, *uniforms).tensor_list

    drawn = _unless(any_of(mesh_impl, doubt), drawn.tensor_list, draw_again)
    return mesh_impl.LaidOutTensor.from_tensor_list(drawn)


def any_of(mesh_impl, flags):
    """The largest of laid-out float32 flags, over the whole mesh: a scalar tf.Tensor."""
    flags = mesh_impl.allreduce(mesh_impl.slicewise(tf.reduce_max, flags), list(range(mesh_impl.ndims)), "MAX")
    return flags.tensor_list[0]


def _unless(doubt, drawn, draw_again):
    """A list of tensors: `drawn`, or what `draw_again` returns where `doubt` is 1.0."""
    return as_list(tf.cond(doubt > 0.5, draw_again, lambda: [tf.identity(d) for d in drawn]))


def grouped_draw(weights, group_uniform, entry_uniform, dim, samples_dim=None, size=None):
    """Draws indices along `dim` in proportion to `weights`, in two levels.

    What is drawn is what sums in one fixed order, of weights scaled by powers of
    two, would give: equal weights and uniforms give equal draws on any layout and
    backend, and no weight that float32 holds over- or underflows. One draw a row
    is first made with sums in any order, which is what comes out unless it falls
    within rounding of a border. Time and memory are linear in
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
        self._samples_dim = samples_dim
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

        w = slicewise(lambda w: rows.to_rows(tf.cast(w, tf.float32)), weights)
        if rows.gathered_axis is not None:  # in finite values; −1 stands for whatever makes a row invalid
            w = rows.gather(slicewise(lambda w: tf.where_v2(tf.logical_and(w >= 0, w < np.inf), w, -1.0), w))
        uniforms = [slicewise(lambda u, w: tf.reshape(u, [size_of(w, 0), -1]), u, w) for u in uniforms]
        if self._samples_dim is None:
            drawn = _draw_near_first(rows, w, uniforms)
        else:
            drawn = _draw(rows, w, *uniforms)
        out_shape = mesh_impl.slice_shape(self.outputs[0].shape)
        lowering.set_tensor_lowering(self.outputs[0], slicewise(lambda d: tf.reshape(d, out_shape), drawn))


# --- entmax -----------------------------------------------------------------------


def chosen_of(alpha):
    """How many of a shard's entries entmax is first sought among: some more than count in logits of a wide spread."""
    return 64 if isinstance(alpha, numbers.Real) and alpha >= 1.45 else 256


def entmax_by_chosen(rows, x, n_chosen, scores_of, epsilon, n_iter, of_chosen, of_all):
    """What becomes of entmax, which as a rule few entries count in.

    It is solved for the n_chosen largest entries of each shard; and again for all
    where the last of them is in the support of some row, as others may be then.

    Args:
      rows: Rows.
      x: laid-out float32 [rows, entries].
      scores_of: a function from x, or some of its entries, to scores less the
        largest one of their row, NaN throughout an invalid one; it keeps their order.
      epsilon, n_iter: as for `solve_entmax`.
      of_chosen: a function from laid-out ids [rows, chosen], p and its slope to a
        list of tensors.
      of_all: a function from p and its slope, for all of x, to such a list.

    Returns:
      a list of tensors.
    """
    mesh_impl = rows.mesh_impl

    def solve_all():
        return of_all(*solve_entmax(rows, scores_of(x), epsilon, n_iter))

    if x.slice_shape[1] < 8 * n_chosen:
        return solve_all()
    values, ids = mesh_impl.slicewise(lambda x: largest(x, n_chosen), x)
    z = scores_of(values)
    start = rows.across_shards(mesh_impl.slicewise(_least_delta, z, epsilon), "MAX")
    p, slope = solve_entmax(rows, z, epsilon, n_iter, start)
    too_few = any_of(mesh_impl, mesh_impl.slicewise(lambda p: tf.cast(p[:, -1:] > 0, tf.float32), p)) > 0.5
    return as_list(tf.cond(too_few, solve_all, lambda: of_chosen(ids, p, slope)))


def as_list(x):
    """What tf.cond gives: it takes a list of one out of it."""
    return list(x) if isinstance(x, (list, tuple)) else [x]


def _least_delta(z, epsilon):
    """A δ that entmax's is not below, [rows, 1]: m weights of at least [1 + ε(zₘ − δ)]₊^(1/ε) sum to no more than 1.

    z: float32 [rows, n], scores in descending order. (0, for which this is true too, in a row with NaN.)
    """
    log_m = tf.log(tf.range(1.0, size_of(z, 1) + 1.0))
    gain = tf.where_v2(epsilon > 0, -tf.math.expm1(-epsilon * log_m) / epsilon, log_m)
    return tf.maximum(finite(tf.reduce_max(z + gain, -1, keepdims=True)), 0.0)


def solve_entmax(rows, z, epsilon, n_iter, start=None):
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
      start: None or laid-out like epsilon: a δ that is not above the one sought.

    Returns:
      (p, slope), laid-out like z: p sums to 1 along its rows; slope is by how much
      each entry of it moves with y, at the most: ∂p/∂y, and at the edge of the
      support what it rises to.
    """
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
        return p, slope, base, tf.stack([near_sum(p), near_sum(slope)])

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

    delta = start or slicewise(tf.zeros_like, epsilon)
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
# scores. Seen on CPUs at the most, by tests/test_draws.py among others: 4e-7 and 1.1e-6.
SOFTMAX_MARGIN, ENTMAX_MARGIN = 1e-6, 4e-6


def score_draw(
    scores, group_uniform, entry_uniform, dim, alpha=None, size=None, *, factor=None, ids=None, only=None, n_chosen=256
):
    """Draws an index along `dim` from softmax or entmax of `scores`, times `factor`.

    Equal scores and uniforms give the same index on every layout, backend and
    device, although exp does not give the same bits there. The weights are
    computed in floating point, and where a draw falls so near to a border
    between two entries that rounding may have moved it across, all rows draw
    again, from weights computed in integers (see `exact`). So what comes out is
    always what those would have given; that is rare, about one draw in a
    thousand.

    A layout that splits `dim` moves 64 numbers a row, for entmax 128 and 2 more for
    each step of its solver (all of the row if it cuts through a group).

    Args:
      scores: float32 mtf.Tensor; −inf is allowed.
      group_uniform, entry_uniform: float32 mtf.Tensors in [0, 1)
        [scores.shape − dim].
      dim: mtf.Dimension of `scores`.
      alpha: None for softmax; a float32 mtf.Tensor in [1, 2], its dims among
        [scores.shape − dim], for entmax.
      size: int, where the entries of `dim` from there on are padding, of score
        −inf or the lowest number: the draws are then those without the padding.
      factor: None or a float32 mtf.Tensor, its dims among [scores.shape − dim]: what
        the scores, taken from the largest one of their row, are multiplied by.
      ids: None, or an int32 mtf.Tensor of the shape of `scores`, no two of a row
        equal: the entries that these are of a dimension of `size` entries, whose
        others are masked. What is drawn is one of them, as from all.
      only: None, or a float32 mtf.Tensor [scores.shape − dim]: 1.0 for a row of which
        an index is wanted. Where no row's is, none is drawn.

    Returns:
      int32 mtf.Tensor [scores.shape − dim]; −1 for a row with NaN or +inf, no score
      above −inf, a factor that is not a number above 0, or an alpha outside [1, 2].
    """
    return _ScoreDrawOperation(
        scores, group_uniform, entry_uniform, dim, alpha, size, factor, ids, only, n_chosen
    ).outputs[0]


class _ScoreDrawOperation(_DrawOperation):
    def __init__(self, scores, group_uniform, entry_uniform, dim, alpha, size, factor, ids, only, n_chosen):
        super().__init__([scores, group_uniform, entry_uniform], dim, None, None if ids else size, "score_draw")
        if scores.dtype != tf.float32:
            raise ValueError(f"score_draw: scores of dtype {scores.dtype.name}; float32 is needed")
        self._n_chosen = n_chosen
        self._of = size  # what the ids are entries of
        self._more = {"factor": factor, "alpha": alpha, "ids": ids, "only": only}
        self._inputs += [t for t in self._more.values() if t is not None]
        self._splittable_dims, self._unsplittable_dims = self._initialize_all_dimensions_as_splittable()

    def lower(self, lowering):
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        like = mesh_impl.LaidOutTensor.from_tensor_list
        draw = functools.partial(self._draw_rows, lowering)
        if self._more["only"] is None:
            drawn = draw()
        else:
            wanted = any_of(mesh_impl, lowering.tensors[self._more["only"]]) > 0.5
            none = slicewise(lambda u: tf.fill([u.shape.num_elements(), 1], -1), lowering.tensors[self.inputs[1]])
            drawn = as_list(tf.cond(wanted, draw, lambda: [tf.identity(n) for n in none.tensor_list]))
        shape = mesh_impl.slice_shape(self.outputs[0].shape)
        lowering.set_tensor_lowering(self.outputs[0], slicewise(lambda d: tf.reshape(d, shape), like(drawn)))

    def _draw_rows(self, lowering):
        """A list of the slices of what is drawn, each [rows, 1]."""
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        scores, *uniforms = (lowering.tensors[t] for t in self.inputs[:3])
        uniforms = [slicewise(lambda u: tf.reshape(u, [-1, 1]), u) for u in uniforms]
        rows = self._rows(mesh_impl)
        x = slicewise(rows.to_rows, scores)
        if self._more["ids"] is not None:
            x, ids = slicewise(_by_id, x, slicewise(rows.to_rows, lowering.tensors[self._more["ids"]]))
            rows = ChosenRows(mesh_impl, self._of, ids)
        factor, epsilon = self._factor_and_epsilon(lowering)

        top = slicewise(lambda x: finite(tf.reduce_max(x, -1, keepdims=True)), x)
        if rows.split_axis is not None:
            top = mesh_impl.allreduce(top, [rows.split_axis], "MAX")

        def scores_of(x):
            """Taken from the largest, no factor overflows. An invalid score becomes NaN or +inf."""

            def scale(x, top, *factor):
                per_row = [-1] + [1] * (x.shape.rank - 1)
                z = x - tf.reshape(top, per_row)
                return z * tf.reshape(factor[0], per_row) if factor else z

            return slicewise(scale, x, top, *([] if factor is None else [factor]))

        if rows.gathered_axis is not None:  # in finite values; 1 stands for an invalid score
            lowest = tf.float32.min
            x = slicewise(lambda z: tf.where_v2(z <= 0, tf.maximum(z, lowest), 1.0), scores_of(x))
            x = slicewise(lambda z: tf.where_v2(z <= 0, z, np.nan), rows.gather(x))
            scores_of = lambda z: z  # noqa: E731

        def draw_by_entmax(rows, *weights_and_slope):
            """[*slices of what is drawn, whether any is in doubt]"""
            weights, *slope = map(rows.in_groups, weights_and_slope)
            drawn, doubt = _draw_near(rows, weights, *uniforms, ENTMAX_MARGIN, *slope)
            return [*drawn.tensor_list, any_of(mesh_impl, doubt)]

        def draw_chosen(ids, p, slope):
            p, ids, slope = slicewise(_by_id, p, ids, slope)
            chosen = ChosenRows(mesh_impl, rows.size, ids, rows.mesh_axis, x.slice_shape[1])
            return draw_by_entmax(chosen, p, slope)

        if epsilon is None:
            # grouped first: all that follows is done in place
            weights = slicewise(tf.exp, scores_of(rows.in_groups(x, -np.inf)))
            drawn, doubt = _draw_near(rows, weights, *uniforms, SOFTMAX_MARGIN)
            drawn, doubt = drawn.tensor_list, any_of(mesh_impl, doubt)
        else:
            draw_all = functools.partial(draw_by_entmax, rows)
            *drawn, doubt = entmax_by_chosen(rows, x, self._n_chosen, scores_of, epsilon, 50, draw_chosen, draw_all)

        def draw_again():
            z = slicewise(lambda z: tf.where_v2(z <= 0, z, np.nan), scores_of(x))
            if epsilon is None:
                weights = slicewise(exact.softmax_weights, z)
            else:
                weights = exact.entmax_weights(mesh_impl, z, epsilon, lambda x: rows.across_shards(x, "SUM"))
            weights = slicewise(lambda w, z: tf.where_v2(tf.is_nan(z), np.inf, w), weights, z)
            return _draw(rows, weights, *uniforms).tensor_list

        return _unless(doubt, drawn, draw_again)

    def _factor_and_epsilon(self, lowering):
        """(factor, ε), each None or laid-out [rows, 1]; where α is not valid, NaN and 0."""
        mesh_impl = lowering.mesh_impl(self)
        shape = self.inputs[0].shape - self._dim
        given = (self._more[name] for name in ("factor", "alpha"))
        factor, alpha = (None if t is None else spread_rows(lowering, t, shape) for t in given)
        if alpha is None:
            return factor, None

        def split(alpha, *factor):
            valid = tf.logical_and(alpha >= 1, alpha <= 2)
            return tf.where_v2(valid, factor[0] if factor else 1.0, np.nan), tf.where_v2(valid, alpha - 1.0, 0.0)

        return mesh_impl.slicewise(split, alpha, *([] if factor is None else [factor]))


def _by_id(x, ids, *more):
    """(x, ids, …), all [rows, n], in ascending order of their ids."""
    ids, order = tf.math.top_k(-ids, size_of(ids, 1))
    x, *more = (tf.gather(t, order, batch_dims=1) for t in (x, *more))
    return x, -ids, *more
