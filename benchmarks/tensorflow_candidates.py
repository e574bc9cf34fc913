"""What is timed in a process that has TensorFlow: this library, mtf's own ops, TensorFlow's.

Each draws from logits that a tf.Variable holds, or gives their distribution; all
take the number of the step, which the stateful ones do not look at.
"""

import os

import common
import laws
import numpy as np

from gpt_neo_sampling import entmax, sample_categorical
from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, probe_devices, quiet_logging, quiet_stderr, tf
from gpt_neo_sampling.mesh.gpu import COMPILE
from gpt_neo_sampling.models import utils
from gpt_neo_sampling.sampling.controls import History
from gpt_neo_sampling.sampling.masks import top_p_mask
from gpt_neo_sampling.sampling.next_token import SamplingOptions, next_token

HALVINGS = 50
SEED = 1
softmax = getattr(utils, "softmax", mtf.softmax)  # the library's, where it has one


# --- This library ---------------------------------------------------------------------


def ours_next_token(logits, vocab_dim, step, alpha=None, **controls):
    """What a decode step does to its logits; behind `laws.HISTORY`."""
    mesh, batch_dim = logits.mesh, logits.shape.dims[0]
    options = SamplingOptions(**{"temperature": 1.0, **controls})
    if alpha is not None:
        options.use_entmax, options.entmax_alpha = True, alpha
    length = mtf.Dimension("length", len(laws.HISTORY))
    ids = mtf.broadcast(mtf.import_tf_tensor(mesh, laws.HISTORY, mtf.Shape([length])), mtf.Shape([batch_dim, length]))
    position = mtf.constant(mesh, length.size, mtf.Shape([batch_dim]), tf.int32)
    history = History(ids, position, mtf.zeros(mesh, mtf.Shape([batch_dim]), tf.int32))
    seed = mtf.constant(mesh, SEED, mtf.Shape([]), tf.int32)
    step = mtf.import_tf_tensor(mesh, step, mtf.Shape([]))
    return next_token(logits, vocab_dim, options, seed, mtf.range(mesh, batch_dim, tf.int32), step, history)


def ours_softmax_draw(logits, vocab_dim, step):
    return sample_categorical(softmax(logits, vocab_dim), vocab_dim, seed=SEED, step=step)


def ours_draw(weights, vocab_dim, step):
    return sample_categorical(weights, vocab_dim, seed=SEED, step=step)


def ours_top_p_mask(logits, vocab_dim, step, top_p):
    return top_p_mask(logits, top_p, vocab_dim)


def ours_entmax(logits, vocab_dim, step, alpha):
    return entmax(logits, alpha, vocab_dim)


def ours_entmax_draw(logits, vocab_dim, step, alpha):
    return sample_categorical(entmax(logits, alpha, vocab_dim), vocab_dim, seed=SEED, step=step)


# --- mtf's own ops ----------------------------------------------------------------------


def mtf_draw(logits, vocab_dim, step):
    return mtf.sample_with_temperature(logits, vocab_dim)


def mtf_five_lines(weights, vocab_dim, step):
    """The draw of GPT-Neo's repository, in words of its own: the first entry past a uniform.

    Its matrix product of V × V is mtf's cumulative sum. A uniform past the sum's
    rounded end draws entry 0, so it is wrong in the tail.
    """
    cdf = mtf.cumsum(weights, vocab_dim)
    uniform = mtf.random_uniform(weights.mesh, weights.shape - vocab_dim, dtype=tf.float32)
    past = mtf.greater(cdf, uniform)
    return mtf.argmax(mtf.cast(past, tf.float32), vocab_dim)


def mtf_top_k_draw(logits, vocab_dim, step, temperature, top_k):
    border = mtf.nth_largest_element(logits, top_k - 1, vocab_dim)
    lowest = mtf.constant(logits.mesh, -1e10, mtf.Shape([]), tf.float32)
    masked = mtf.where(mtf.less(logits, border), lowest, logits, output_shape=logits.shape)
    return mtf.sample_with_temperature(masked, vocab_dim, temperature)


def mtf_bisection(logits, vocab_dim, step, alpha):
    """Peters et al. 2019, algorithm 1: the threshold by halving."""
    scaled = logits * (alpha - 1)
    largest = mtf.reduce_max(scaled, reduced_dim=vocab_dim)
    low, high = largest - 1.0, largest - float(vocab_dim.size) ** (1 - alpha)

    def weights(threshold):
        return mtf.pow(mtf.relu(scaled - threshold), 1 / (alpha - 1))

    for _ in range(HALVINGS):
        middle = (low + high) * 0.5
        too_much = mtf.greater_equal(mtf.reduce_sum(weights(middle), reduced_dim=vocab_dim), 1.0)
        low, high = mtf.where(too_much, middle, low), mtf.where(too_much, high, middle)
    p = weights(low)
    return p / mtf.reduce_sum(p, reduced_dim=vocab_dim)


def mtf_bisection_draw(logits, vocab_dim, step, alpha):
    return mtf.sample_with_temperature(mtf.log(mtf_bisection(logits, vocab_dim, step, alpha)), vocab_dim)


# --- TensorFlow's own ---------------------------------------------------------------------


def tf_draw(logits, step):
    return tf.random.categorical(logits, 1, dtype=tf.int32)[:, 0]


IN_MESH = {
    "ours: next_token": ours_next_token,
    "ours: softmax, sample_categorical": ours_softmax_draw,
    "ours: sample_categorical": ours_draw,
    "ours: top_p_mask": ours_top_p_mask,
    "ours: entmax": ours_entmax,
    "ours: entmax, sample_categorical": ours_entmax_draw,
    "mtf: sample_with_temperature": mtf_draw,
    "mtf: the seed's five lines": mtf_five_lines,
    "mtf: nth_largest_element, where, sample_with_temperature": mtf_top_k_draw,
    "mtf: 50 bisections": mtf_bisection,
    "mtf: 50 bisections, sample_with_temperature": mtf_bisection_draw,
}
IN_TENSORFLOW = {"tf.random.categorical": tf_draw}
FROM_WEIGHTS = {"ours: sample_categorical", "mtf: the seed's five lines"}
MASKS = {"ours: top_p_mask"}  # whose distribution is the softmax of what they give
DISTRIBUTIONS = {"ours: entmax", "mtf: 50 bisections"} | MASKS


class Program:
    """A candidate's graph and session."""

    def __init__(self, name, batch, vocab, arguments):
        arguments = dict(arguments)
        if arguments.pop("jit_compile", False):
            os.environ[COMPILE] = "1"
        values = laws.logits(batch, vocab)
        if name in FROM_WEIGHTS:
            values = laws.law(values)
        self.gives_distribution, self._is_mask = name in DISTRIBUTIONS, name in MASKS
        self._steps = 0
        with tf.Graph().as_default() as graph, quiet_logging():
            tf.set_random_seed(SEED)
            given = tf.placeholder(tf.float32, [batch, vocab])
            held = tf.Variable(given, use_resource=True)
            step = tf.placeholder(tf.int32, [])
            if name in IN_TENSORFLOW:
                output = IN_TENSORFLOW[name](held.read_value(), step, **arguments)
            else:
                mesh = mtf.Mesh(mtf.Graph(), "mesh")
                shape = mtf.Shape([mtf.Dimension("batch", batch), mtf.Dimension("vocab", vocab)])
                logits = mtf.import_tf_tensor(mesh, held.read_value(), shape)
                built = IN_MESH[name](logits, shape.dims[1], step, **arguments)
                lowering = mtf.Lowering(mesh.graph, {mesh: PlacementMeshImpl([], [], [""])}, autostack=False)
                output = lowering.export_to_tf_tensor(built)
            threads = dict(intra_op_parallelism_threads=common.CORES, inter_op_parallelism_threads=common.CORES)
            with quiet_stderr():
                session = tf.Session(graph=graph, config=tf.ConfigProto(**threads))
            session.run(held.initializer, {given: values})
            self._fetch = session.make_callable(output, [step])
            # A distribution is timed as far as it stands in memory, as PyTorch leaves it: not copied out.
            self._run = session.make_callable(output.op, [step]) if self.gives_distribution else self._fetch

    def run(self):
        self._steps += 1
        return self._run(self._steps)

    def distribution(self):
        given = self._fetch(0)
        return laws.law(given) if self._is_mask else given


class Decoder:
    """`TextGenerator.generate` on the model of 125M's shape."""

    def __init__(self, batch, n_ctx=2048, dtype="float32", jit_compile=False, temperature=0.9, top_k=40):
        from gpt_neo_sampling import TextGenerator

        self._n_ctx, self._dtype = n_ctx, dtype
        self._prompts = common.prompts(batch)
        self._generator = TextGenerator.from_pretrained(
            common.model_folder(n_ctx), dtype=dtype, jit_compile=jit_compile
        )
        self._sampling = dict(temperature=temperature, top_k=top_k)
        self._seed = SEED

    def _generate(self, prompts, new_tokens, **options):
        self._seed += 1
        return [
            s.tokens
            for s in self._generator.generate(
                prompts, max_new_tokens=new_tokens, seed=self._seed, eos_token_id=-1, **options
            )
        ]

    def run(self):
        return self._generate(self._prompts, common.NEW_TOKENS, **self._sampling)

    def check(self):
        """What a decode row's two sides are compared by.

        {"greedy": tokens [batch, NEW_TOKENS]; of the first new token of the first prompt: "logits" and
        "float32_logits" [vocab], "draws", and "kept", how many entries top-k leaves}
        """
        first = self._prompts[:1]
        logits = float32_logits = prompt_logits(self._n_ctx, first, self._dtype)
        if self._dtype != "float32":
            float32_logits = prompt_logits(self._n_ctx, first, "float32")
        return {
            "greedy": np.array(self._generate(self._prompts, common.NEW_TOKENS, do_sample=False)),
            "draws": laws.count_first_tokens(
                lambda rows: self._generate(first, 1, num_return_sequences=rows, **self._sampling)
            ),
            "logits": logits,
            "float32_logits": float32_logits,
            "kept": self._sampling["top_k"],
        }


def prompt_logits(n_ctx, prompts, dtype):
    """float32 [vocab]: the library's logits behind the first prompt, by its model function in a graph of its own."""
    common.use_tests()
    from helpers_model import call_model, features
    from programs import Program as ModelProgram

    from gpt_neo_sampling import open_checkpoint
    from gpt_neo_sampling.generation.decode_graph import variable_dtype_of

    variable_dtype = variable_dtype_of(dtype)
    with open_checkpoint(common.model_folder(n_ctx)) as checkpoint:
        params = {**checkpoint.params, "mode": "predict"}
        weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    ids = np.array(prompts, np.int32)

    def build(mesh, ids):
        shape, other = features(mesh, params, *ids.shape.as_list(), variable_dtype=variable_dtype)
        ids = mtf.import_tf_tensor(mesh, ids, shape)
        return mtf.cast(call_model(ids, other, params, variable_dtype=variable_dtype)[0], tf.float32)

    return ModelProgram(build, [(tf.int32, ids.shape)], weights)(ids)[0, -1]


def make(spec):
    """A candidate: {"candidate": its name, …: its arguments}."""
    probe_devices()
    spec = dict(spec)
    if spec["candidate"] == "ours: generate":
        spec.pop("candidate")
        return Decoder(**spec)
    return laws.Sampler(Program, **spec)
