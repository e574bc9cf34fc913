"""Random numbers that are a function of their coordinates, on every backend and layout."""

from collections.abc import Sequence

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import LaidOut, RowValue, ShapeLike, is_int
from gpt_neo_sampling.mesh.ops import MeshOperation, align, import_rows, union_shape
from gpt_neo_sampling.mesh.xla import is_core_program, kept_together

# The counter's second word of the draw that a control makes beside the token's own, which has 0, 1, 2, … there.
XTC_LEVEL = -1


def threefry_2x32(
    key: tuple[tf.Tensor, tf.Tensor], counter: tuple[tf.Tensor, tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Threefry-2x32 with 20 rounds, in integer tensor ops alone.

    Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2,
    3". The bits depend on the arguments alone, not on backend, device, layout or
    TensorFlow version.

    Args:
      key: a pair of uint32 tf.Tensors.
      counter: a pair of uint32 tf.Tensors, broadcastable with the key.

    Returns:
      a pair of uint32 tf.Tensors.
    """

    def rotate(x: tf.Tensor, bits: int) -> tf.Tensor:
        return tf.bitwise.bitwise_or(
            tf.bitwise.left_shift(x, tf.constant(bits, tf.uint32)),
            tf.bitwise.right_shift(x, tf.constant(32 - bits, tf.uint32)),
        )

    xor = tf.bitwise.bitwise_xor
    keys = [key[0], key[1], xor(xor(key[0], key[1]), tf.constant(0x1BD11BDA, tf.uint32))]
    x0, x1 = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 += x1
            x1 = xor(rotate(x1, bits), x0)
        x0 += keys[(i + 1) % 3]
        x1 += keys[(i + 2) % 3] + tf.constant(i + 1, tf.uint32)
    return x0, x1


def counter_bits(
    seed: mtf.Tensor, stream: mtf.Tensor, step: mtf.Tensor, sample: mtf.Tensor | None = None
) -> tuple[mtf.Tensor, mtf.Tensor]:
    """32 random bits twice for each draw, a function of its coordinates.

    Threefry-2x32 with key (seed, stream) and counter (step, sample).

    Args:
      seed: int32 mtf.Tensor.
      stream: int32 mtf.Tensor.
      step: int32 mtf.Tensor.
      sample: int32 mtf.Tensor, or None for draw 0.
      The shapes are broadcast together, dims in the order of their appearance
      in `stream`, `seed`, `step`, `sample`.

    Returns:
      a pair of int32 mtf.Tensors; read as unsigned and multiplied by 2⁻³², each is a
      uniform in [0, 1).
    """
    return tuple(_CounterBitsOperation([stream, seed, step] + ([] if sample is None else [sample])).outputs)


class _CounterBitsOperation(MeshOperation):
    def __init__(self, inputs: list[mtf.Tensor]) -> None:
        shape = union_shape(inputs)
        super().__init__(inputs, [(shape, tf.int32)] * 2, "counter_bits")

    def bits(self, lowering: mtf.Lowering) -> tuple[LaidOut, LaidOut]:
        """The values of the outputs, computed anew by each call."""
        shape = self.outputs[0].shape

        def of_slices(*slices: tf.Tensor) -> tuple[tf.Tensor, ...]:
            aligned = (align(s, x.shape, shape) for s, x in zip(slices, self.inputs, strict=True))
            stream, seed, step, *sample = (tf.bitcast(s, tf.uint32) for s in aligned)
            words = threefry_2x32((seed, stream), (step, *(sample or [tf.zeros_like(step)])))
            return tuple(tf.bitcast(w, tf.int32) for w in words)

        return lowering.mesh_impl(self).slicewise(of_slices, *(lowering.tensors[x] for x in self.inputs))

    def lower(self, lowering: mtf.Lowering) -> None:
        for output, value in zip(self.outputs, self.bits(lowering), strict=True):
            lowering.set_tensor_lowering(output, value)


def bits_again(lowering: mtf.Lowering, outputs: Sequence[mtf.Tensor]) -> list[LaidOut]:
    """The values of the two tensors that `counter_bits` gave; computed anew, if they are these.

    In a branch that is rarely taken this spares every step a kernel or two that would keep them.
    """
    operation = outputs[0].operation
    if isinstance(operation, _CounterBitsOperation) and list(outputs) == operation.outputs:
        return list(operation.bits(lowering))
    return [lowering.tensors[x] for x in outputs]


def unfolded(x: mtf.Tensor) -> mtf.Tensor:
    """The same tensor, whose value XLA does not look at.

    Constants folded into Threefry in a loop would tear it apart, into three kernels of a TPU where one does.
    """
    return _UnfoldedOperation([x], [(x.shape, x.dtype)], "unfolded").outputs[0]


class _UnfoldedOperation(MeshOperation):
    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl, x = lowering.mesh_impl(self), lowering.tensors[self.inputs[0]].to_laid_out_tensor()
        if is_core_program(mesh_impl):
            x = mesh_impl.slicewise(lambda x: kept_together(x)[0], x)
        lowering.set_tensor_lowering(self.outputs[0], x)


def computed_apart(bits: mtf.Tensor) -> mtf.Tensor:
    """The same int32 tensor, which XLA does not compute anew in each place that looks at it.

    Threefry's rounds, fused into several kernels, take XLA minutes to compile.
    """
    return _ApartOperation([bits], [(bits.shape, bits.dtype)], "computed_apart").outputs[0]


class _ApartOperation(MeshOperation):
    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl, bits = lowering.mesh_impl(self), lowering.tensors[self.inputs[0]].to_laid_out_tensor()

        def sorted_alone(bits: tf.Tensor) -> tf.Tensor:  # XLA fuses nothing into a sort, nor a sort into anything
            return tf.sort(tf.stack([bits, tf.fill(tf.shape(bits), tf.int32.min)], -1), -1)[..., 1]

        apart = (lambda x: kept_together(x)[0]) if is_core_program(mesh_impl) else sorted_alone
        lowering.set_tensor_lowering(self.outputs[0], mesh_impl.slicewise(apart, bits))


def import_seed(mesh: mtf.Mesh, seed: RowValue | None, rows: ShapeLike = ()) -> mtf.Tensor:
    """A seed as an int32 mtf tensor.

    Args:
      mesh: mtf.Mesh.
      seed: an int in [−2³¹, 2³²) (its low 32 bits count); an int32 tensor,
        scalar or one a row; or None for a fresh one at each execution.
      rows: mtf.Shape, the dims of the request.

    Returns:
      int32 mtf.Tensor, the same on every processor.

    Raises:
      ValueError: for an int outside the range, or a wrong shape.
    """
    if seed is None:
        return _FreshSeedOperation(mesh).outputs[0]
    if is_int(seed):
        if not -(2**31) <= seed < 2**32:
            raise ValueError(f"seed={seed} is out of range: from -2**31 to 2**32 - 1")
        seed = np.array(int(seed) % 2**32, np.uint32).view(np.int32)
    return import_rows(mesh, seed, tf.int32, rows, "seed")


class _FreshSeedOperation(MeshOperation):
    """A random int32, drawn anew each time it runs (in a loop: each time round)."""

    def __init__(self, mesh: mtf.Mesh) -> None:
        super().__init__([], [([], tf.int32)], "fresh_seed", mesh=mesh)

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)

        # Processor 0's bits for everyone. As halves: some meshes add in float32.
        def draw(pnum: tf.Tensor) -> tf.Tensor:
            halves = tf.random.uniform([2], maxval=2**16, dtype=tf.int32)
            return tf.where_v2(tf.equal(pnum, 0), tf.cast(halves, tf.float32), 0.0)

        halves = mesh_impl.allreduce(
            mesh_impl.slicewise(draw, mesh_impl.laid_out_pnum()), list(range(mesh_impl.ndims)), "SUM"
        )
        join = lambda h: tf.cast(h[0], tf.int32) * 2**16 + tf.cast(h[1], tf.int32)  # noqa: E731
        lowering.set_tensor_lowering(self.outputs[0], mesh_impl.slicewise(join, halves))
