"""The rows of the table: who is timed against whom, at what size, and what is asked of the ratio."""

import dataclasses

from common import GPT2_VOCAB

BATCH = 8
SEED_VOCAB = 16384  # the largest whose V × V matrix, the five lines' sum, fits into a small machine
NOISE = 0.05  # of a ratio that is to be 1 or more, "no slower"

TENSORFLOW, TORCH, OPTIMUM = "tensorflow_candidates", "torch_candidates", "optimum_candidates"


@dataclasses.dataclass(frozen=True)
class Row:
    name: str  # as ROWS= takes it
    what: str
    ours: str  # the candidate's name
    peer: str
    target: float  # of the peer's time over ours
    ours_arguments: dict = dataclasses.field(default_factory=dict)
    peer_arguments: dict = None  # None: the same
    vocab: int = GPT2_VOCAB
    batch: int = BATCH
    law: dict = None  # arguments of `laws.law`; None for decoding, which has no law in closed form
    peer_module: str = TENSORFLOW
    peer_environment: str = ""  # of those that `pairs.python_of` makes; "": that of this process
    noise: float = 0.0
    drawn: dict = None  # of a decode row: what it does to its logits

    def specs(self):
        """What the two sides are told to build."""
        size = {"batch": self.batch} | ({} if self.law is None else {"vocab": self.vocab})
        peer_arguments = self.ours_arguments if self.peer_arguments is None else self.peer_arguments
        return (
            {"candidate": self.ours, **size, **self.ours_arguments},
            {"candidate": self.peer, **size, **peer_arguments},
        )


def sampler(name, what, ours, peer, target, law=None, **more):
    """A row whose two sides take the arguments of the law."""
    law = law or {}
    more.setdefault("ours_arguments", law)
    more.setdefault("peer_module", TORCH if peer.startswith(("torch", "transformers")) else TENSORFLOW)
    return Row(name, what, ours, peer, target, law=law, **more)


def compiled_sampler(name, what, peer, target, law):
    """`next_token` compiled by XLA, as in a decode loop with jit_compile."""
    arguments = {"ours_arguments": {**law, "jit_compile": True}, "peer_arguments": law}
    return sampler(name, f"{what}, jit_compile", NEXT, peer, target, law, **arguments)


NEXT, SOFTMAX = "ours: next_token", "ours: softmax, sample_categorical"
ENTMAX, ENTMAX_DRAW = "ours: entmax", "ours: entmax, sample_categorical"
TOP_K, TOP_P = {"temperature": 0.9, "top_k": 40}, {"top_p": 0.9}
E13, E15 = {"alpha": 1.3}, {"alpha": 1.5}
TF_DRAW, MTF_DRAW, TORCH_DRAW = (
    "tf.random.categorical", "mtf: sample_with_temperature", "torch: softmax, multinomial")  # fmt: skip
WARPERS = "transformers: warpers, softmax, multinomial"
BISECT, BISECT_DRAW = "torch: entmax_bisect", "torch: entmax_bisect, multinomial"
MTF_BISECT, MTF_BISECT_DRAW = "mtf: 50 bisections", "mtf: 50 bisections, sample_with_temperature"


DECODERS = {  # peer: (its module, its environment)
    "ours": (TENSORFLOW, ""),
    "transformers": (TORCH, ""),
    "OpenVINO": (OPTIMUM, "openvino"),
    "ONNX Runtime": (OPTIMUM, "onnx"),
}


def decoder(name, what, peer, target, batch, dtype="float32", ours_arguments=None, peer_arguments=None, **more):
    module, environment = DECODERS[peer]
    return Row(
        name, what, "ours: generate", f"{peer}: generate", target, batch=batch, drawn=TOP_K,
        ours_arguments={"dtype": dtype, **(ours_arguments or {})},
        peer_arguments={"dtype": dtype, **(peer_arguments or {})},
        peer_module=module, peer_environment=environment, **more,
    )  # fmt: skip


def decoders():
    """Our decode beside each peer's, in one type of numbers at a time."""
    peers = {"float32": ("transformers", "OpenVINO", "ONNX Runtime"), "bfloat16": ("transformers", "OpenVINO")}
    names = {"transformers": "", "OpenVINO": "-openvino", "ONNX Runtime": "-onnx"}
    for dtype, suffix in (("float32", ""), ("bfloat16", "-bf16")):
        for batch in (1, 8):
            for peer in peers[dtype]:
                target, noise = (1.8, 0) if (dtype, peer) == ("float32", "transformers") else (1.0, NOISE)
                what = f"generate, 125M shape, {dtype}, batch {batch} / {peer}"
                yield decoder(f"decode-{batch}{suffix}{names[peer]}", what, peer, target, batch, dtype, noise=noise)
        for batch in (1, 8) if dtype == "float32" else (1,):  # more rows are not compiled in bfloat16
            for peer, target in (("ours", 1.0), ("OpenVINO", 1.15)):
                what = f"generate, 125M shape, {dtype}, batch {batch}, jit_compile / {peer}"
                name = f"decode-{batch}{suffix}-jit{names.get(peer, '')}"
                yield decoder(name, what, peer, target, batch, dtype, {"jit_compile": True}, noise=NOISE)


ROWS = [
    sampler("softmax-tf", "softmax + sample_categorical / tf.random.categorical", SOFTMAX, TF_DRAW, 1.2),
    sampler("next-tf", "next_token / tf.random.categorical", NEXT, TF_DRAW, 1.2),
    sampler("softmax-mtf", "softmax + sample_categorical / mtf's sample_with_temperature", SOFTMAX, MTF_DRAW, 3.5),
    sampler("next-mtf", "next_token / mtf's sample_with_temperature", NEXT, MTF_DRAW, 3.5),
    sampler("softmax-torch", "softmax + sample_categorical / PyTorch softmax + multinomial", SOFTMAX, TORCH_DRAW, 10),
    sampler("next-torch", "next_token / PyTorch softmax + multinomial", NEXT, TORCH_DRAW, 10),
    sampler("draw-seed", "sample_categorical, V=16,384 / the seed's five lines", "ours: sample_categorical",
            "mtf: the seed's five lines", 250, vocab=SEED_VOCAB),
    sampler("topk-mtf", "temperature, top-k 40, draw / mtf's nth_largest_element, where, draw", NEXT,
            "mtf: nth_largest_element, where, sample_with_temperature", 2.5, TOP_K),
    sampler("topk-warpers", "temperature, top-k 40, draw / transformers' warpers + multinomial", NEXT, WARPERS, 7,
            TOP_K),
    sampler("top-p", "top_p_mask 0.9 / transformers' TopPLogitsWarper", "ours: top_p_mask",
            "transformers: TopPLogitsWarper", 8, TOP_P),
    sampler("top-p-draw", "top-p 0.9, draw / transformers' warper, softmax, multinomial", NEXT, WARPERS, 8, TOP_P),
    *(compiled_sampler(f"{name}-jit", what, peer, target, law) for name, what, peer, target, law in (
        ("next-tf", "next_token / tf.random.categorical", TF_DRAW, 1.2, {}),
        ("next-mtf", "next_token / mtf's sample_with_temperature", MTF_DRAW, 3.5, {}),
        ("next-torch", "next_token / PyTorch softmax + multinomial", TORCH_DRAW, 10, {}),
        ("top-p-draw", "top-p 0.9, draw / transformers' warper, softmax, multinomial", WARPERS, 8, TOP_P),
    )),
    sampler("entmax13-mtf", "entmax 1.3 / 50 bisections in mtf", ENTMAX, MTF_BISECT, 10, E13),
    sampler("entmax13-torch", "entmax 1.3 / entmax_bisect", ENTMAX, BISECT, 10, E13),
    sampler("entmax15-torch", "entmax 1.5 / entmax15(k=512)", ENTMAX, "torch: entmax15(k=512)", 1.2, E15,
            peer_arguments={}),
    sampler("entmax13-draw-mtf", "entmax 1.3 + draw / 50 bisections in mtf + draw", NEXT, MTF_BISECT_DRAW, 10, E13),
    sampler("entmax13-draw-torch", "entmax 1.3 + draw / entmax_bisect + multinomial", NEXT, BISECT_DRAW, 10, E13),
    *decoders(),
    decoder("decode-context", "generate, n_ctx 2,048 / n_ctx 96, both ours", "ours", 1.0, 1,
            ours_arguments={"n_ctx": 2048}, peer_arguments={"n_ctx": 96}, noise=NOISE),
]  # fmt: skip

# Cost against size: (way, ours, peer, law). The peer is the fastest other one that is no more than a line.
WAYS = [
    ("softmax", NEXT, TF_DRAW, {}),
    ("top-k 40", NEXT, WARPERS, TOP_K),
    ("entmax 1.3", NEXT, BISECT_DRAW, E13),
]
VOCABULARIES = [1024 * 2**i for i in range(9)]
BATCHES = [2**i for i in range(9)]
LARGEST_SLOPE = 1.1
