"""What is timed in a process that has PyTorch: its own draw, entmax's, transformers'."""

import common
import laws
import numpy as np
import torch

HALVINGS = 50
K = 512  # of entmax15's partial sort
SEED = 1


def draw(p):
    return torch.multinomial(p, 1)[:, 0]


def softmax_draw(logits):
    return draw(torch.softmax(logits, -1))


def warpers_draw(**options):
    import transformers

    warper_of = {"temperature": "Temperature", "top_k": "TopK", "top_p": "TopP"}
    made = [getattr(transformers, f"{warper_of[name]}LogitsWarper")(value) for name, value in options.items()]
    warpers = transformers.LogitsProcessorList(made)
    return lambda logits: softmax_draw(warpers(None, logits))


def top_p_warper(top_p):
    from transformers import TopPLogitsWarper

    warper = TopPLogitsWarper(top_p)
    return lambda logits: warper(None, logits)


def bisection(alpha):
    from entmax import entmax_bisect

    return lambda logits: entmax_bisect(logits, alpha=alpha, dim=-1, n_iter=HALVINGS)


def bisection_draw(alpha):
    distribution = bisection(alpha)
    return lambda logits: draw(distribution(logits))


def partial_sort():
    from entmax import entmax15

    return lambda logits: entmax15(logits, dim=-1, k=K)


CANDIDATES = {
    "torch: softmax, multinomial": lambda: softmax_draw,
    "transformers: warpers, softmax, multinomial": warpers_draw,
    "transformers: TopPLogitsWarper": top_p_warper,
    "torch: entmax_bisect": bisection,
    "torch: entmax_bisect, multinomial": bisection_draw,
    "torch: entmax15(k=512)": partial_sort,
}
MASKS = {"transformers: TopPLogitsWarper"}  # whose distribution is the softmax of what they give
DISTRIBUTIONS = {"torch: entmax_bisect", "torch: entmax15(k=512)"} | MASKS


class Program:
    """A candidate and the logits that it is given."""

    def __init__(self, name, batch, vocab, arguments):
        values = laws.logits(batch, vocab)
        self._logits, self._function = torch.from_numpy(values), CANDIDATES[name](**arguments)
        self.gives_distribution, self._is_mask = name in DISTRIBUTIONS, name in MASKS

    def run(self):
        with torch.inference_mode():
            return self._function(self._logits).numpy()

    def distribution(self):
        return laws.law(self.run()) if self._is_mask else self.run()


class Decoder:
    """transformers' `generate` on the model of 125M's shape."""

    def __init__(self, batch, n_ctx=2048, dtype="float32", temperature=0.9, top_k=40):
        self._n_ctx, self._dtype = n_ctx, dtype
        self._model = self.load(n_ctx, dtype)
        self._model.generation_config.eos_token_id = None  # as the library is told: no row stops early
        self._prompts = common.prompts(batch)
        self._sampling = dict(do_sample=True, temperature=temperature, top_k=top_k)

    def load(self, n_ctx, dtype):
        """A model with transformers' `generate`."""
        from transformers import GPTNeoForCausalLM

        return GPTNeoForCausalLM.from_pretrained(common.model_folder(n_ctx), dtype=getattr(torch, dtype)).eval()

    def _generate(self, prompts, new_tokens, **options):
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=0, **options
            )
        return out[:, ids.shape[1] :].tolist()

    def run(self):
        return self._generate(self._prompts, common.NEW_TOKENS, **self._sampling)

    def check(self):
        """As `tensorflow_candidates.Decoder.check`."""
        first = self._prompts[:1]
        logits = float32_logits = first_logits(self._model, first)
        if self._dtype != "float32":
            float32_logits = first_logits(self.load(self._n_ctx, "float32"), first)
        return {
            "greedy": np.array(self._generate(self._prompts, common.NEW_TOKENS, do_sample=False)),
            "draws": laws.count_first_tokens(lambda rows: self._generate(first * rows, 1, **self._sampling)),
            "logits": logits,
            "float32_logits": float32_logits,
            # transformers keeps all entries that equal the last one
            "kept": (logits >= np.sort(logits)[-self._sampling["top_k"]]).sum(),
        }


def first_logits(model, prompts):
    """float32 [vocab]: the logits behind the first prompt."""
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        output = model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(ids.shape[1])[None])
    return output.logits[0, -1].float().numpy()


def make(spec):
    """A candidate: {"candidate": its name, …: its arguments}."""
    torch.set_num_threads(common.CORES)
    torch.manual_seed(SEED)
    spec = dict(spec)
    if spec["candidate"] == "transformers: generate":
        spec.pop("candidate")
        return Decoder(**spec)
    return laws.Sampler(Program, **spec)
