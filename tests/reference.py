"""Plain NumPy float64 reference that the test-suite compares the library with.

It is written from the published equations and from the description of the
original, never from the library's own code, so that a mistake in one is not
repeated in the other.  It favours the obvious form over the fast one: nothing is
cached, nothing is fused, and every sum is made in float64.

Papers named below:

* Martins & Astudillo 2016, "From Softmax to Sparsemax", arXiv 1602.02068
* Peters, Niculae & Martins 2019, "Sparse Sequence-to-Sequence Models",
  arXiv 1905.05702
* Blondel, Martins & Niculae 2020, "Learning with Fenchel-Young Losses",
  arXiv 1901.02324
* Salmon, Moraes, Dror & Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"
* Su et al. 2021, "RoFormer", arXiv 2104.09864
"""

import math

import numpy as np

# --------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------


def expand_attention_types(nested):
    """One attention type a layer, from the config's [[[types...], repeats], ...].

    >>> expand_attention_types([[["global", "local"], 2]])
    ['global', 'local', 'global', 'local']
    """
    return [kind for types, repeats in nested for _ in range(repeats) for kind in types]


def layer_norm(x, gain, bias, eps=1e-5):
    """Normalise the last axis by its mean and (biased) variance."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centred**2, axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * gain + bias


def _gelu(x):
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def _elu(x):
    """Clevert, Unterthiner & Hochreiter 2015, arXiv 1511.07289."""
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def _softplus(x):
    return np.logaddexp(0, x)


def _gelu_erf(x):
    """GELU itself, x times the normal distribution function."""
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def _elish(x):
    """As GPT-Neo has it: above 0, ELiSH (Basirat & Roth 2018, arXiv 1808.00783) would be x times sigmoid(x)."""
    return np.where(x > 0, x / (1 + np.exp(np.maximum(x, 0))), np.expm1(np.minimum(x, 0)) * _sigmoid(x))


def _log_softmax(x):
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# By the names of `activation_fn`: GPT-Neo's, and those of transformers' functions that GPT-Neo lacks.
ACTIVATIONS = {
    "abs": np.abs,
    "arcsinh": np.arcsinh,
    "bipolarsigmoid": lambda x: np.tanh(x / 2),
    "cos": np.cos,
    "cosid": lambda x: np.cos(x) - x,
    "elish": _elish,
    "elu": _elu,
    "gelu": _gelu,
    "gelu_erf": _gelu_erf,
    "gelu_erf_10": lambda x: np.clip(_gelu_erf(x), -10, 10),
    "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "id": lambda x: x,
    # a normal distribution function, of mean 1/sqrt(2) and variance 1/(4 pi), both rounded
    "laplace": lambda x: (1 + np.vectorize(math.erf)((x - 0.707107) / 0.282095 / np.sqrt(2))) / 2,
    "lisht": lambda x: x * np.tanh(x),
    "logsoftmax": _log_softmax,
    "lrelu001": lambda x: np.where(x > 0, x, 0.01 * x),
    "lrelu020": lambda x: np.where(x > 0, x, 0.2 * x),
    "maxsig": lambda x: np.maximum(x, _sigmoid(x)),
    "maxtanh": lambda x: np.maximum(x, np.tanh(x)),
    "minsin": lambda x: np.minimum(x, np.sin(x)),
    "mish": lambda x: x * np.tanh(_softplus(x)),  # Misra 2019, arXiv 1908.08681
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.where(x > 0, x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "roottanh": lambda x: np.cbrt(x**2 + 1) * np.tanh(x),
    "seagull": lambda x: np.log(1 + x**2),
    # Klambauer et al. 2017, arXiv 1706.02515: ELU of alpha 1.67326, times 1.0507
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * _elu(x)),
    "sigmoid": _sigmoid,
    "sign": np.sign,
    "silu": lambda x: x * _sigmoid(x),
    "sin": np.sin,
    "snake": lambda x: x + np.sin(x) ** 2,
    "softmax": lambda x: np.exp(_log_softmax(x)),
    "softplus": _softplus,
    "sqrtsoftplus": lambda x: np.sqrt(_softplus(x)),
    "softplusmone": lambda x: _softplus(x) - 1,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "spike": lambda x: 1 / (1 + x**2),
    "spike2": lambda x: np.exp(-(x**2)),
    "square_relax": lambda x: np.cos(x) - np.cos(3 * x) / 3 + np.cos(5 * x) / 5 - np.cos(7 * x) / 7,
    "swish": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
    "tanhexp": lambda x: x * np.tanh(np.exp(x)),
    "tanhshrink": lambda x: x - np.tanh(x),
    "triangle_relax": lambda x: np.sin(x) - np.sin(3 * x) / 9 + np.sin(5 * x) / 25 - np.sin(7 * x) / 49,
}


def _rotate(x):
    """Turn x [B, T, H, D] by its position (Su et al. 2021).

    Entry j of the first half is paired with entry j of the second half, and the
    pair is turned by the angle position * 10000^(-2j/D).
    """
    length, depth = x.shape[1], x.shape[3]
    half = depth // 2
    angle = np.arange(length)[:, None] * 10000.0 ** (-2.0 * np.arange(half) / depth)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _may_attend(length, kind, radius):
    """bool [T, T], [query, key]: which keys a query sees."""
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    if kind == "global":
        return key <= query
    if kind == "local":
        # `radius` positions in all, the query's own among them.
        return (key <= query) & (key > query - radius)
    raise ValueError(f"the reference knows 'global' and 'local' attention, not {kind!r}")


def _norm(h, w, p, eps):
    """What a half of a layer reads of h: as it is (rezero), or normalised, with one scale (scalenorm) or by entry."""
    if p + "/g" not in w:
        return h
    return layer_norm(h, w[p + "/g"], w.get(p + "/b", 0.0), eps)


def _attention(h, w, p, n_head, seen, rotary_emb, is_global, eps):
    """What the attention of the layer with prefix p adds to h [B, T, E]."""
    batch, length, embd = h.shape
    x = _norm(h, w, p + "norm_1", eps)
    q, k, v = ((x @ w[p + "attn/" + name]).reshape(batch, length, n_head, embd // n_head) for name in "qkv")
    if rotary_emb:
        q, k = _rotate(q), _rotate(k)
    if is_global and p + "attn/attention/mem_k" in w:  # ahead of the others, without a position, seen from everywhere
        k, v = (
            np.concatenate([np.tile(w[p + "attn/attention/mem_" + name], (batch, 1, 1, 1)), x], axis=1)
            for name, x in (("k", k), ("v", v))
        )
        seen = np.concatenate([np.ones((length, k.shape[1] - length), bool), seen], axis=1)
    # GPT-Neo does not divide the scores by the root of the head's depth.
    scores = np.where(seen, np.einsum("bqhd,bkhd->bhqk", q, k), -np.inf)
    mixed = np.einsum("bhqk,bkhd->bqhd", softmax(scores), v).reshape(batch, length, embd)
    return mixed @ w[p + "attn/o"] + w[p + "attn/compute_output_bias/o_b"]


def mlp(h, w, p, activation_fn="gelu", part="mlp", eps=1e-5):
    """What the second half of the layer with prefix p adds to h [B, T, E]; part "mlp_macaron": ahead of its first."""
    x, m = _norm(h, w, p + "norm_2", eps) if part == "mlp" else h, f"{p}{part}/conv1d_main/"
    x = x @ w[m + "c_fc/kernel"] + w[m + "c_fc/bias"]
    n_hidden = len(w[m + "c_proj/kernel"])
    if x.shape[-1] == 2 * n_hidden:  # a gated linear unit
        x = x[..., :n_hidden] * ACTIVATIONS[activation_fn](x[..., n_hidden:])
    else:
        x = ACTIVATIONS[activation_fn](x)
    return x @ w[m + "c_proj/kernel"] + w[m + "c_proj/bias"]


def _positions(w, length):
    """What is added at each position: the table's entry, or the mean of those of a grid's row and column."""
    if "wpe" in w:
        if length > w["wpe"].shape[0]:
            raise ValueError(f"{length} positions, but wpe has {w['wpe'].shape[0]}")
        return w["wpe"][:length]
    if "axial_wpe_1" not in w:
        return 0.0
    rows, columns = w["axial_wpe_1"], w["axial_wpe_2"]
    grid = np.array([(row + column) / 2 for row in rows for column in columns])
    return np.concatenate([grid, np.zeros((length, grid.shape[1]))])[:length]


def gpt_neo_forward(
    weights,
    ids,
    *,
    n_head,
    attention_types,
    local_attention_radius=256,
    padding_id=None,
    rotary_emb=False,
    activation_fn="gelu",
    layer_norm_epsilon=1e-5,
):
    """Logits of GPT-Neo's full forward pass.

    weights: dict of arrays under GPT-Neo's own variable names less the "gpt2/"
        prefix ("wte" [V, E], "wpe" [n_ctx, E], "h0/attn/q" [E, E], ...), any
        float type; read as float64. Which options the model has follows from the
        names: those of shared parameters begin with "/", "h0/norm_rezero_1/g" [] is
        a rezero model's, "h0/mlp_macaron/..." a macaron transformer's, and so on.
    ids: int [B, T].  An id outside [0, V) looks up a zero vector, as a one-hot
        product does.
    attention_types: one of "global", "local" and "none" a layer. A "none" layer
        adds its own input where the others add attention.
    padding_id: has no part in the logits (padding only decides where a prompt
        ends); taken so that a whole configuration can be passed on.
    rotary_emb: turn q and k by position instead of adding "wpe".
    activation_fn: a key of ACTIVATIONS.

    Returns float64 [B, T, V].
    """
    del padding_id
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    ids = np.asarray(ids)
    length, vocab = ids.shape[1], len(w["wte"])

    known = (ids >= 0) & (ids < vocab)
    h = w["wte"][np.where(known, ids, 0)] * known[..., None]
    if not rotary_emb:
        h = h + _positions(w, length)

    for layer, kind in enumerate(attention_types):
        p = "/" if any(name.startswith("/") for name in w) else f"h{layer}/"
        step = 1.0
        if any(name.startswith(p + "mlp_macaron/") for name in w):
            step = 0.5
            h = h + step * mlp(h, w, p, activation_fn, "mlp_macaron")
        a = h
        if kind != "none":
            seen = _may_attend(length, kind, local_attention_radius)
            a = _attention(h, w, p, n_head, seen, rotary_emb, kind == "global", layer_norm_epsilon)
        h = h + a * w.get(p + "norm_rezero_1/g", 1.0)
        h = h + step * mlp(h, w, p, activation_fn, eps=layer_norm_epsilon) * w.get(p + "norm_rezero_2/g", 1.0)

    if "ln_f/g" not in w:
        head = "wte_final_linear/conv1d_main/linear_out/"
        return h @ w[head + "kernel"] + w[head + "bias"]
    return layer_norm(h, w["ln_f/g"], w["ln_f/b"], layer_norm_epsilon) @ w["wte"].T


# Hugging Face's name inside a layer -> (GPT-Neo's name, whether to transpose).
# A torch Linear holds [out, in]; GPT-Neo multiplies on the right by [in, out].
_HF_LAYER_NAMES = {
    "ln_1.weight": ("norm_1/g", False),
    "ln_1.bias": ("norm_1/b", False),
    "attn.attention.q_proj.weight": ("attn/q", True),
    "attn.attention.k_proj.weight": ("attn/k", True),
    "attn.attention.v_proj.weight": ("attn/v", True),
    "attn.attention.out_proj.weight": ("attn/o", True),
    "attn.attention.out_proj.bias": ("attn/compute_output_bias/o_b", False),
    "ln_2.weight": ("norm_2/g", False),
    "ln_2.bias": ("norm_2/b", False),
    "mlp.c_fc.weight": ("mlp/conv1d_main/c_fc/kernel", True),
    "mlp.c_fc.bias": ("mlp/conv1d_main/c_fc/bias", False),
    "mlp.c_proj.weight": ("mlp/conv1d_main/c_proj/kernel", True),
    "mlp.c_proj.bias": ("mlp/conv1d_main/c_proj/bias", False),
}
_HF_TOP_NAMES = {
    "wte.weight": "wte",
    "wpe.weight": "wpe",
    "ln_f.weight": "ln_f/g",
    "ln_f.bias": "ln_f/b",
}
# The head is tied to wte, and the masks are constants that older files carry.
_HF_IGNORED = ("lm_head.weight", "attn.attention.bias", "attn.attention.masked_bias")


def hf_to_mesh_names(hf_weights):
    """GPT-Neo's variable names and layouts for a Hugging Face GPT-Neo state dict.

    hf_weights: dict of arrays ("transformer.h.0.ln_1.weight", ...).  Returns a new
    dict of arrays of the same dtypes; an unknown name raises KeyError.
    """
    out = {}
    for full_name, value in hf_weights.items():
        name = full_name.removeprefix("transformer.")
        if name.endswith(_HF_IGNORED):
            continue
        if name.startswith("h."):
            _, layer, rest = name.split(".", 2)
            mesh_name, transpose = _HF_LAYER_NAMES[rest]
            out[f"h{layer}/{mesh_name}"] = np.asarray(value).T if transpose else np.asarray(value)
        else:
            out[_HF_TOP_NAMES[name]] = np.asarray(value)
    return out


def greedy_decode(weights, prompts, n_new, length, *, stop_at_token=None, **config):
    """Greedy continuation of each prompt, the whole sequence anew for every token.

    prompts: list of non-empty lists of ids, lengths may differ.
    n_new: at most this many new tokens a row.
    length: at most this many tokens a row, the prompt among them.
    stop_at_token: a row ends once it has written this token, which it keeps;
        those in its prompt do not count.
    config: passed on to gpt_neo_forward.

    Returns a list of lists: each prompt followed by its new tokens.  Equal logits
    go to the lower id.
    """
    rows = []
    for prompt in prompts:
        row = [int(token) for token in prompt]
        if not row:
            raise ValueError("an empty prompt has no last token to go on from")
        for _ in range(min(n_new, length - len(row))):
            logits = gpt_neo_forward(weights, np.array([row]), **config)
            row.append(int(np.argmax(logits[0, -1])))
            if row[-1] == stop_at_token:
                break
        rows.append(row)
    return rows


# --------------------------------------------------------------------------
# Softmax and its sparse relatives
# --------------------------------------------------------------------------
#
# All take x of any shape, finite or -inf with a finite entry in each row, and
# return float64 of the same shape that sums to 1 along `axis`.


def softmax(x, axis=-1):
    """exp(x) / sum exp(x) along axis."""
    x = np.asarray(x, dtype=np.float64)
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def entmax_bisect(x, alpha, axis=-1):
    """Alpha-entmax, 1 <= alpha <= 2, by bisection (Peters et al. 2019, Algorithm 1).

    p = max((alpha-1) x - tau, 0)^(1/(alpha-1)) with the tau that makes p sum to 1.
    alpha = 1, the limit, is softmax.
    """
    x = np.asarray(x, dtype=np.float64)
    if alpha == 1:
        return softmax(x, axis)
    if not 1 < alpha <= 2:
        raise ValueError(f"alpha must lie in [1, 2], got {alpha}")
    # With the largest entry moved to 0 (which changes no probability) tau lies in
    # [-1, 0), where float64 is finest whatever the size of x.
    z = (alpha - 1) * (x - x.max(axis=axis, keepdims=True))

    def p_of(tau):
        return np.maximum(z - tau, 0.0) ** (1.0 / (alpha - 1))

    # At -1 the largest entry alone has probability 1, so the sum is at least 1; at
    # -n^(1-alpha) no entry has more than 1/n, so the sum is at most 1.
    low = np.full(x.max(axis=axis, keepdims=True).shape, -1.0)
    high = np.full_like(low, -(float(x.shape[axis]) ** (1 - alpha)))
    for _ in range(64):  # halves an interval below 1 past float64's last bit
        middle = 0.5 * (low + high)
        too_much = p_of(middle).sum(axis=axis, keepdims=True) >= 1
        low, high = np.where(too_much, middle, low), np.where(too_much, high, middle)
    p = p_of(low)
    return p / p.sum(axis=axis, keepdims=True)


def _sorted_for_support(x, axis):
    """z: x less its maximum, axis last; top: z sorted, largest first; rho: 1..n.

    An entry 1 or more below the maximum never has mass where this is used, so
    clipping at 2 below changes no answer and keeps -inf out of the running sums.
    """
    z = np.moveaxis(np.asarray(x, dtype=np.float64), axis, -1)
    z = np.maximum(z - z.max(axis=-1, keepdims=True), -2.0)
    return z, -np.sort(-z, axis=-1), np.arange(1, z.shape[-1] + 1)


def _tau_at_support(tau, top):
    """The candidate threshold of the largest support that it is consistent with."""
    size = (tau < top).sum(axis=-1, keepdims=True)
    return np.take_along_axis(tau, size - 1, axis=-1)


def entmax15_exact(x, axis=-1):
    """1.5-entmax by sorting (Peters et al. 2019, Algorithm 2)."""
    z, top, rho = _sorted_for_support(np.asarray(x, dtype=np.float64) / 2, axis)
    mean = np.cumsum(top, axis=-1) / rho
    # The sum of squared distances from the mean of the rho largest.
    spread = np.cumsum(top**2, axis=-1) - rho * mean**2
    tau = mean - np.sqrt(np.maximum(1 - spread, 0.0) / rho)
    p = np.maximum(z - _tau_at_support(tau, top), 0.0) ** 2
    return np.moveaxis(p, -1, axis)


def sparsemax_exact(x, axis=-1):
    """Sparsemax, that is 2-entmax, by sorting (Martins & Astudillo 2016, Algorithm 1)."""
    z, top, rho = _sorted_for_support(x, axis)
    tau = (np.cumsum(top, axis=-1) - 1) / rho
    return np.moveaxis(np.maximum(z - _tau_at_support(tau, top), 0.0), -1, axis)


def entmax(x, alpha, axis=-1):
    """Alpha-entmax by the most exact way there is for this alpha."""
    if alpha == 1.5:
        return entmax15_exact(x, axis)
    if alpha == 2:
        return sparsemax_exact(x, axis)
    return entmax_bisect(x, alpha, axis)


def entmax_grad(x, dy, alpha, axis=-1, step=1e-5):
    """Gradient by x of sum(dy * entmax(x)), by central differences.

    Rows along `axis` do not touch each other, so one entry of every row is moved
    at once.  No formula for the derivative is used.  Where an entry sits within
    `step` of the support's edge the answer is only as good as the derivative is
    continuous there (at alpha = 2 it jumps).  float64, x's shape.
    """
    x = np.moveaxis(np.asarray(x, dtype=np.float64), axis, -1)
    dy = np.moveaxis(np.asarray(dy, dtype=np.float64), axis, -1)
    grad = np.empty_like(x)
    for j in range(x.shape[-1]):
        shift = np.zeros(x.shape[-1])
        shift[j] = step
        change = entmax(x + shift, alpha) - entmax(x - shift, alpha)
        grad[..., j] = (dy * change).sum(axis=-1) / (2 * step)
    return np.moveaxis(grad, -1, axis)


def _tsallis(p, alpha, axis):
    """Omega(p) = (sum p^alpha - 1) / (alpha (alpha-1)); sum p log p at alpha = 1."""
    if alpha == 1:
        return np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=axis)
    return (np.sum(p**alpha, axis=axis) - 1) / (alpha * (alpha - 1))


def _dot(p, x, axis):
    """sum p x, where no probability times a logit of -inf counts as 0."""
    return np.sum(p * np.where(p > 0, x, 0.0), axis=axis)


def entmax_loss(x, target_probs, alpha, axis=-1):
    """Fenchel-Young loss of alpha-entmax (Blondel et al. 2020).

    Omega*(x) + Omega(t) - <x, t>, with Omega*(x) = <p, x> - Omega(p) at
    p = entmax(x).  At alpha = 1 that is KL(t || softmax(x)), which for a one-hot t
    is the cross entropy.  Never negative, 0 just where p = t; its gradient by x is
    p - t.  target_probs sums to 1 along axis.  float64, x's shape less axis.
    """
    x = np.asarray(x, dtype=np.float64)
    t = np.asarray(target_probs, dtype=np.float64)
    p = entmax(x, alpha, axis)
    conjugate = _dot(p, x, axis) - _tsallis(p, alpha, axis)
    return conjugate + _tsallis(t, alpha, axis) - _dot(t, x, axis)


def top_k_keep(x, k, axis=-1):
    """bool mask, x's shape: exactly the k largest along axis, ties to the lower index."""
    x = np.asarray(x, dtype=np.float64)
    if not 0 <= k <= x.shape[axis]:
        raise ValueError(f"k must lie in [0, {x.shape[axis]}], got {k}")
    order = np.argsort(-x, axis=axis, kind="stable")
    keep = np.zeros(x.shape, dtype=bool)
    np.put_along_axis(keep, np.take(order, np.arange(k), axis=axis), True, axis=axis)
    return keep


def token_counts(rows, size):
    """[len(rows), size]: how often each token of a vocabulary stands in each row, a list of ids."""
    counts = np.zeros((len(rows), size))
    for row, count in zip(rows, counts):
        for token in row:
            if 0 <= token < size:
                count[token] += 1
    return counts


def repetition_penalty(x, counts, penalty):
    """Keskar et al. 2019, as transformers has it. float64."""
    x = np.asarray(x, np.float64)
    return np.where(counts > 0, np.where(x > 0, x / penalty, x * penalty), x)


def no_repeat_ngram_keep(rows, n, size):
    """bool [len(rows), size]: False for each token that would repeat an n-gram of its row, a list of ids."""
    keep = np.ones((len(rows), size), bool)
    for row, kept in zip(map(list, rows), keep):
        ngrams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        for token in range(size):
            kept[token] = tuple(row[len(row) - n + 1 :] + [token]) not in ngrams
    return keep


def sequence_bias(x, row, biases):
    """x [vocab] after the tokens of `row`; biases: tuple of tokens -> number, as transformers' sequence_bias."""
    x = np.array(x, np.float64)
    for sequence, bias in biases.items():
        *before, last = sequence
        if list(row)[len(row) - len(before) :] == before and len(row) >= len(before):
            x[last] += bias
    return x


def dry_matches(row, size, breakers=()):
    """[size]: for each token the longest sequence ahead of it in the row, a list of ids, that the row ends with."""
    longest = np.zeros(size, int)
    for n in range(1, len(row)):
        end = row[len(row) - n :]
        if set(end) & set(breakers):
            break
        for begin in range(len(row) - n):
            token = row[begin + n]
            if row[begin : begin + n] == end and token not in breakers and 0 <= token < size:
                longest[token] = n
    return longest


def dry_penalty(x, row, multiplier, base=1.75, allowed_length=2, breakers=()):
    """DRY, by p-e-w: x [vocab] after the tokens of `row`."""
    n = dry_matches(list(row), len(x), breakers)
    penalties = [min(float(multiplier) * math.exp(min(math.log(base) * (k - allowed_length), 700)), 1e30) for k in n]
    return np.where(n >= allowed_length, x - penalties, x)


def exponential_decay(x, stops, n_new, start, factor):
    """transformers' exponential_decay_length_penalty."""
    x = np.array(x, np.float64)
    late = n_new - start
    if late > 0:
        for token in stops:
            if np.isfinite(x[token]):
                x[token] += abs(x[token]) * (factor**late - 1)
    return x


def forced(x, tokens):
    """transformers' forced_eos_token_id, at a row's last place."""
    return np.where(np.isin(np.arange(len(x)), tokens), 0.0, -np.inf)


def _log_p(x):
    with np.errstate(divide="ignore"):
        return np.log(softmax(np.asarray(x, dtype=np.float64)))


def entropy(p):
    """In nats, of each row."""
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1, keepdims=True)


def _mass_keep(order, p, mass):
    """(keep, clear): the shortest beginning of `order` with that mass; entries not within 1e-6 of its end are clear."""
    ordered = np.take_along_axis(p, order, -1)
    before = np.cumsum(ordered, -1) - ordered
    keep, clear = np.zeros((2, *p.shape), dtype=bool)
    first = np.arange(p.shape[-1]) == 0
    np.put_along_axis(keep, order, (before < mass) | first, -1)
    np.put_along_axis(clear, order, (abs(before - mass) > 1e-6) | first, -1)
    return keep, clear


def top_p_keep(x, top_p):
    """(keep, clear), bool of x's shape [rows, entries]; ties to the lower index. top_p: a number or [rows, 1]."""
    x = np.asarray(x, dtype=np.float64)
    return _mass_keep(np.argsort(-x, -1, kind="stable"), softmax(x), top_p)


def typical_p_keep(x, typical_p):
    """As top_p_keep, by |-log p - H| in float32: what is equal there goes by index."""
    return _mass_keep(np.argsort(_untypical(x).astype(np.float32), -1, kind="stable"), np.exp(_log_p(x)), typical_p)


def _untypical(x):
    log_p = _log_p(x)
    with np.errstate(invalid="ignore"):
        return abs(-log_p - entropy(np.exp(log_p)))


def _at_least(x, least_log_p):
    """(keep, clear) of the entries that are so likely, and the likeliest."""
    log_p = _log_p(x)
    likeliest = log_p == log_p.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (log_p >= least_log_p) | likeliest, (abs(log_p - least_log_p) > 1e-6) | likeliest


def min_p_keep(x, min_p):
    return _at_least(x, _log_p(x).max(-1, keepdims=True) + np.log(min_p))


def epsilon_keep(x, epsilon):
    return _at_least(x, np.log(epsilon))


def eta_keep(x, eta):
    return _at_least(x, np.log(np.minimum(eta, np.sqrt(eta) * np.exp(-entropy(softmax(np.asarray(x, np.float64)))))))


def mirostat_keep(x, mu):
    """Basu et al. 2021, Mirostat 2: of a surprise of mu bits at most, and the likeliest. mu: a number or [rows, 1]."""
    return _at_least(x, -mu * np.log(2))


def surprise(x, token):
    """-log2 p of each row's token, [rows]; NaN where that is -1."""
    log_p = np.take_along_axis(_log_p(x), np.maximum(token, 0)[:, np.newaxis], -1)[:, 0]
    return np.where(token < 0, np.nan, -log_p / np.log(2))


def dynamic_temperature(x, temperature, spread, exponent):
    """llama.cpp's, [rows]: from the entropy, as a part of the largest that the unmasked entries could have."""
    x = np.asarray(x, dtype=np.float64)
    n = np.sum(np.isfinite(x), -1)
    part = entropy(softmax(x))[..., 0] / np.log(np.maximum(n, 2))
    low, high = np.maximum(temperature - spread, 0), temperature + spread
    return np.where(n < 2, temperature, low + (high - low) * np.minimum(part, 1) ** exponent)


def top_n_sigma_keep(x, n):
    """Clear but within 1e-6 of the spread, or of a logit's last bits; n: a number or [rows, 1]."""
    x = np.asarray(x, dtype=np.float64)
    inside = np.isfinite(x)
    count = inside.sum(-1, keepdims=True)
    mean = np.where(inside, x, 0).sum(-1, keepdims=True) / count
    sigma = np.sqrt(np.where(inside, (x - mean) ** 2, 0).sum(-1, keepdims=True) / count)
    below = x.max(-1, keepdims=True) - x - n * sigma
    return below <= 0, (abs(below) > 1e-6 * (sigma + abs(x))) | (x == x.max(-1, keepdims=True))


def at_least(keep_of, x, option, n):
    """(keep, clear) of `keep_of`, one of the above, which keeps at least n entries, those of probability 0 left out.

    transformers' min_tokens_to_keep: the first n in the order of the mask, equal ones by index. n: a number or [rows,
    1]. Entries that are about as typical as the n-th are clear only if they equal it.
    """
    x = np.asarray(x, dtype=np.float64)
    keep, clear = keep_of(x, option)
    n = np.minimum(n, np.sum(np.isfinite(x), -1, keepdims=True))
    far = (_untypical(x) if keep_of is typical_p_keep else -x).astype(np.float32)
    order = np.argsort(far, -1, kind="stable")
    first = np.zeros(x.shape, dtype=bool)
    np.put_along_axis(first, order, np.arange(x.shape[-1]) < n, -1)
    last = np.take_along_axis(order, np.maximum(n, 1) - 1, -1)
    like_last = np.zeros(x.shape, dtype=bool)
    if keep_of is typical_p_keep:
        with np.errstate(invalid="ignore"):
            near = abs(far - np.take_along_axis(far, last, -1)) < 1e-5
        like_last = near & np.any(near & (x != np.take_along_axis(x, last, -1)), -1, keepdims=True)
    return keep | first, (clear | first) & ~like_last


def top_h_keep(x, part):
    """(keep, clear); ties to the lower index. part: a number or [rows, 1]."""
    x = np.asarray(x, dtype=np.float64)
    order = np.argsort(-x, -1, kind="stable")[..., :100]
    log_p = _log_p(np.take_along_axis(x, order, -1))
    terms = np.where(np.isfinite(log_p), -np.exp(log_p) * log_p, 0)
    reached = np.cumsum(terms, -1) - part * terms.sum(-1, keepdims=True)
    keep, clear = np.zeros(x.shape, bool), np.ones(x.shape, bool)
    first = np.arange(order.shape[-1]) == 0
    np.put_along_axis(keep, order, (reached <= 1e-9) | first, -1)
    np.put_along_axis(clear, order, (abs(reached) > 1e-6) | (part == 1) | first, -1)
    return keep, clear


def xtc_keep(x, threshold):
    """(keep, clear) of a row that is chosen; threshold: a number or [rows, 1].

    p-e-w's "exclude top choices", as llama.cpp has it: of the tokens in order of their probability, equal ones by
    index, those of at least the threshold go, but for the last of them; above 0.5 none. Masked ones are no choice. A
    row with an entry near the threshold is not clear.
    """
    x = np.asarray(x, dtype=np.float64)
    threshold = np.broadcast_to(threshold, (*x.shape[:-1], 1))
    log_p = _log_p(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        over = log_p - np.log(threshold)
    clear = np.broadcast_to(~np.any(abs(over) < 1e-6, -1, keepdims=True), x.shape)
    order = np.argsort(-x, -1, kind="stable")
    n_over = np.sum((over >= 0) & np.isfinite(x), -1, keepdims=True)
    keep = np.zeros(x.shape, dtype=bool)
    np.put_along_axis(keep, order, np.arange(x.shape[-1]) >= n_over - 1, -1)
    return keep | (threshold > 0.5), clear


# --------------------------------------------------------------------------
# Random numbers and drawing
# --------------------------------------------------------------------------

# Published with Random123 for Threefry-2x32 of 20 rounds:
# (key0, key1), (counter0, counter1), (output0, output1)
THREEFRY2X32_VECTORS = (
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
)


def threefry2x32(key0, key1, counter0, counter1):
    """Threefry-2x32 of 20 rounds (Salmon et al. 2011; Random123).

    Integers in [0, 2^32), or arrays of them that broadcast together.  Returns two
    uint32 arrays of the broadcast shape.
    """
    key0, key1, x0, x1 = np.broadcast_arrays(
        *(np.asarray(word, dtype=np.uint32) for word in (key0, key1, counter0, counter1))
    )
    # uint32 arrays wrap around in silence, NumPy's scalars do not: keep arrays.
    shape = x0.shape
    key0, key1, x0, x1 = (np.atleast_1d(word) for word in (key0, key1, x0, x1))
    keys = (key0, key1, key0 ^ key1 ^ np.uint32(0x1BD11BDA))
    rotations = (13, 15, 26, 6, 17, 29, 16, 24)

    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(20):
        left = np.uint32(rotations[i % 8])
        x0 = x0 + x1
        x1 = ((x1 << left) | (x1 >> (np.uint32(32) - left))) ^ x0
        if i % 4 == 3:  # the key goes in again after every fourth round
            n = (i + 1) // 4
            x0 = x0 + keys[n % 3]
            x1 = x1 + keys[(n + 1) % 3] + np.uint32(n)
    return x0.reshape(shape), x1.reshape(shape)


def bits_to_uniform(bits):
    """uint32 -> float64 in [0, 1)."""
    return np.asarray(bits, dtype=np.uint32) * 2.0**-32


def _first_past(weights, u):
    """The first index whose running sum is more than u of the whole sum."""
    running = np.cumsum(weights)
    return int(np.argmax(running > u * running[-1]))


def two_level_draw(weights_row, u1, u2, groups=64):
    """Index drawn in proportion to weights_row [V], or -1 where none can be.

    Inversion of the cumulative distribution in two steps: u1 in [0, 1) picks one of
    the contiguous groups of ceil(V/groups) entries (the last may be shorter, and
    there may be fewer groups), u2 in [0, 1) an entry of it.  At both steps the first
    whose running sum is *more* than u of the whole is taken, so an entry of weight 0
    is never drawn.  The weights need not sum to 1.  A negative or non-finite weight,
    or no mass at all, gives -1.
    """
    if not (0 <= u1 < 1 and 0 <= u2 < 1):
        raise ValueError(f"u1 and u2 must lie in [0, 1), got {u1} and {u2}")
    weights = np.asarray(weights_row, dtype=np.float64)
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or not np.any(weights > 0):
        return -1
    size = -(-len(weights) // groups)
    parts = [weights[start : start + size] for start in range(0, len(weights), size)]
    group = _first_past([part.sum() for part in parts], u1)
    return group * size + _first_past(parts[group], u2)
