"""Arguments by names that this library does not have: what there is here instead.

Knows names only, and no TensorFlow.
"""

import collections
import difflib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_NO_BEAMS = "beam search is not built; {num_return_sequences} draws several samples, and score says how likely each is"
_NO_ENCODER = "it is for models with an encoder, and GPT-Neo has none"
_NO_ASSISTANT = "speculative decoding is not built, and would give the same distribution; leave it out"
_NO_PADDING = "rows of any lengths are taken as they are and padded within; leave it out"
_OWN_STATES = "keys and values are always kept, in memory of fixed size; leave it out"
_OUTPUTS = "samples have tokens and text, with {return_logprobs} log-probabilities too; inspect has whole distributions"
_IDS = "prompts are the first argument: texts, or lists of token ids"
_OWN_PROCESSORS = "in Python, logits_processors takes functions of (logits, ids, position)"
_DEVICES = "{devices} says where the work is done, {mesh_shape} and {layout} how it is split"
_DTYPE = "{dtype} takes float32 or bfloat16"
_ONE_KERNEL = "there is one implementation; leave it out"
_NO_CODE = "a folder's code is never run; leave it out"
_STREAMS = "generate takes a streamer, a function that is called for each token"
_TOKEN = "Hugging Face's own token is used: HF_TOKEN, or what `hf auth login` stored"

_OPTION = re.compile(r"\{(\w+)\}")
_FROM_PRETRAINED = {"devices", "mesh_shape", "layout", "dtype", "jit_compile"}  # the other options are generate's

# Names of Hugging Face's `generate`, its text-generation pipeline and its `from_pretrained` → what there is here. {…}
# is an option of this library, which is spelled in one way in Python and in another on a command line. Names that some
# of our functions have and others lack are here too: they are looked up only where they are unknown.
HUGGING_FACE_NAMES: dict[str, str] = {
    # what is continued
    "inputs": _IDS,
    "input_ids": _IDS,
    "text_inputs": _IDS,
    "attention_mask": _NO_PADDING,
    "position_ids": _NO_PADDING,
    "token_type_ids": _NO_PADDING,
    "padding": _NO_PADDING,
    "padding_side": _NO_PADDING,
    "pad_token_id": _NO_PADDING,
    "inputs_embeds": "prompts are texts or token ids, not embeddings",
    "truncation": "a prompt that is longer than the model's context is an error; shorten it first",
    "handle_long_generation": "a row ends at the end of the model's context",
    "prefix": "put it before each prompt",
    "bos_token_id": "a row begins with its prompt; an empty one with the model's own first token",
    "decoder_start_token_id": _NO_ENCODER,
    "decoder_input_ids": _NO_ENCODER,
    "tokenizer": "the tokenizer in the model's folder is used",
    "add_special_tokens": "a prompt is encoded as the model's tokenizer does by itself",
    "batch_size": "requests of any size are split into batches within; leave it out",
    # how long
    "max_length": "{max_new_tokens} counts the new tokens alone, without the prompt",
    "max_time": "{max_new_tokens} bounds a continuation; Ctrl-C ends a run and keeps what is done",
    "stopping_criteria": "{stop_strings} and {eos_token_id} end a continuation",
    "forced_bos_token_id": "put the token at the end of the prompt",
    # how tokens are chosen
    "do_sample": "tokens are drawn, unless {greedy} asks for the likeliest each time",
    "num_beams": _NO_BEAMS,
    "num_beam_groups": _NO_BEAMS,
    "early_stopping": _NO_BEAMS,
    "length_penalty": _NO_BEAMS,
    "diversity_penalty": _NO_BEAMS,
    "constraints": _NO_BEAMS,
    "force_words_ids": _NO_BEAMS,
    "penalty_alpha": "contrastive search is not built; {repetition_penalty} or {no_repeat_ngram_size} avoids repeats",
    "dola_layers": "decoding by contrasting layers is not built",
    "guidance_scale": "classifier-free guidance is not built",
    "negative_prompt_ids": "classifier-free guidance is not built",
    "negative_prompt_attention_mask": "classifier-free guidance is not built",
    "custom_generate": _OWN_PROCESSORS,
    "logits_processor": _OWN_PROCESSORS,
    "logits_warper": _OWN_PROCESSORS,
    "watermarking_config": _OWN_PROCESSORS,
    "prefix_allowed_tokens_fn": "a function is for Python, TextGenerator.generate and sample_autoregressive",
    "renormalize_logits": "what is left after the masks is always renormalized; leave it out",
    "remove_invalid_values": "a row whose logits are NaN is an error that names it, never a plausible token",
    "encoder_repetition_penalty": _NO_ENCODER,
    "encoder_no_repeat_ngram_size": _NO_ENCODER,
    "token_healing": "not built: a prompt's tokens stay as they are; end it before a space, not after one",
    "generation_config": "give its options by name; the generation_config.json in a model's folder is read as it is",
    # assistants
    "assistant_model": _NO_ASSISTANT,
    "assistant_tokenizer": _NO_ASSISTANT,
    "is_assistant": _NO_ASSISTANT,
    "num_assistant_tokens": _NO_ASSISTANT,
    "num_assistant_tokens_schedule": _NO_ASSISTANT,
    "assistant_confidence_threshold": _NO_ASSISTANT,
    "assistant_early_exit": _NO_ASSISTANT,
    "assistant_lookbehind": _NO_ASSISTANT,
    "assistant_ensemble_weight": _NO_ASSISTANT,
    "target_lookbehind": _NO_ASSISTANT,
    "prompt_lookup_num_tokens": _NO_ASSISTANT,
    "max_matching_ngram_size": _NO_ASSISTANT,
    "speculation_type": _NO_ASSISTANT,
    "use_mtp": _NO_ASSISTANT,
    # what comes back
    "output_scores": _OUTPUTS,
    "output_logits": _OUTPUTS,
    "return_dict_in_generate": _OUTPUTS,
    "output_attentions": "attention weights are not returned",
    "output_hidden_states": "hidden states are not returned",
    "return_full_text": "a sample's text is the new text alone; put the prompt before it",
    "return_text": "samples have tokens and, where the model has a tokenizer, text; leave it out",
    "return_tensors": "samples have tokens, as lists of ids, and text",
    "return_type": "samples have tokens and text",
    "skip_special_tokens": "a sample's text has no special tokens, and its tokens have them",
    "clean_up_tokenization_spaces": "a sample's text is what the tokenizer decodes to; leave it out",
    "streamer": _STREAMS,
    # how it is computed
    "use_cache": _OWN_STATES,
    "past_key_values": _OWN_STATES,
    "cache_implementation": _OWN_STATES,
    "cache_config": _OWN_STATES,
    "max_cache_len": _OWN_STATES,
    "prefill_chunk_size": _OWN_STATES,
    "low_memory": _OWN_STATES,
    "continuous_batching_config": "on one CPU a file of prompts replaces rows as they end; elsewhere batches run",
    "compile_config": "{jit_compile} has XLA compile the decode loop",
    "disable_compile": "nothing is compiled unless {jit_compile} asks for it",
    "synced_gpus": _DEVICES,
    "tp_plan": _DEVICES,
    "tp_size": _DEVICES,
    "device": _DEVICES,
    "device_map": _DEVICES,
    "device_mesh": _DEVICES,
    "max_memory": _DEVICES,
    "offload_folder": _DEVICES,
    "offload_state_dict": _DEVICES,
    "offload_buffers": _DEVICES,
    "distributed_config": _DEVICES,
    # what is opened
    "pretrained_model_name_or_path": "the model is the first argument",
    "torch_dtype": _DTYPE,
    "load_in_8bit": _DTYPE,
    "load_in_4bit": _DTYPE,
    "quantization_config": _DTYPE,
    "trust_remote_code": _NO_CODE,
    "code_revision": _NO_CODE,
    "custom_pipeline": _NO_CODE,
    "config": "the config in the model's folder is used",
    "state_dict": "the weights in the model's folder are used; convert writes a folder in another format",
    "gguf_file": "safetensors, PyTorch's files and mesh-TF checkpoints are read",
    "from_tf": "the folder's own format is recognized; leave it out",
    "from_flax": "safetensors, PyTorch's files and mesh-TF checkpoints are read",
    "use_safetensors": "safetensors are read ahead of PyTorch's files; leave it out",
    "weights_only": "no pickle is run in any case; leave it out",
    "variant": "the files of the usual names are read: model.safetensors, pytorch_model.bin, or their shards",
    "subfolder": "name the folder itself",
    "adapter_name": "adapters are not built; merge them into the weights first",
    "adapter_kwargs": "adapters are not built; merge them into the weights first",
    "key_mapping": "weights are found by the usual names, with a prefix or without; leave it out",
    "attn_implementation": _ONE_KERNEL,
    "experts_implementation": _ONE_KERNEL,
    "kernel_config": _ONE_KERNEL,
    "use_kernels": _ONE_KERNEL,
    "low_cpu_mem_usage": "weights are always read one by one; leave it out",
    "ignore_mismatched_sizes": "weights that do not match the config are an error",
    "output_loading_info": "weights that do not match the config are an error that names them",
    "use_fast": "the tokenizer is always the one of the package tokenizers; leave it out",
    "token": _TOKEN,
    "use_auth_token": _TOKEN,
    "resume_download": "a download that was cut goes on by itself; leave it out",
    "proxies": "set HTTPS_PROXY in the environment",
    "cache_dir": "set HF_HOME or HF_HUB_CACHE in the environment",
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
    "force_download": "remove the model from Hugging Face's cache, and it is fetched again",
}

# OpenAI's and vLLM's names, of which presence_penalty, frequency_penalty and logit_bias are ours too.
_OPENAI_NAMES = {
    "max_tokens": "{max_new_tokens} bounds the new tokens",
    "max_completion_tokens": "{max_new_tokens} bounds the new tokens",
    "min_tokens": "{min_new_tokens} is the least number of new tokens",
    "n": "{num_return_sequences} draws several samples of each prompt",
    "best_of": "{num_return_sequences} draws several samples, and score says how likely each is",
    "stop": "{stop_strings} end a continuation",
    "stop_token_ids": "{eos_token_id} takes the tokens that end a continuation",
    "ignore_eos": "-1 as {eos_token_id} is no stop token",
    "logprobs": "{return_logprobs} gives the log-probability of each new token, {top_logprobs} the likeliest too",
    "prompt_logprobs": "{return_prompt_logprobs} gives the log-probability of each token of the prompt",
    "tensor_parallel_size": _DEVICES,
    "bad_words_token_ids": "{bad_words_ids} takes them",
}

# llama.cpp's.
_LLAMA_CPP_NAMES = {
    "n_predict": "{max_new_tokens} bounds the new tokens",
    "repeat_penalty": "{repetition_penalty} is that",
    "repeat_last_n": "penalties count the whole row; leave it out",
    "penalty_last_n": "penalties count the whole row; leave it out",
    "dry_penalty_last_n": "DRY looks at the whole row; leave it out",
    "mirostat_mode": "{mirostat} is 2, or 0 for none",
    "mirostat_ent": "{mirostat_tau} is the surprise to aim at",
    "mirostat_lr": "{mirostat_eta} says how fast the bar follows",
    "samplers": "controls are applied in one order",
    "grammar": "prefix_allowed_tokens_fn, a function in Python, says what may come next",
}

# The command's own, where Python and prompts files have others.
_COMMANDS_NAMES = {
    "num_samples": "{num_return_sequences} draws several samples of each prompt",
    "entmax": "{entmax_alpha} draws by entmax in place of softmax",
    "greedy": "{greedy} takes the likeliest token each time",
    "stream": "generate takes a stream; in a prompts file it follows from a line's place",
}


def in_python(name: str) -> str:
    """How an option is given in Python, for `advice`."""
    return "do_sample=False" if name == "greedy" else name


def advice(
    name: str, spelled: Callable[[str], str] = in_python, sentences: Mapping[str, str] | None = None
) -> str | None:
    """What there is here in place of another library's argument.

    Args:
      name: the argument, as `max_length`.
      spelled: how one of our options, which is given as `max_new_tokens`, is written where the sentence is shown.
      sentences: what is said in place of the table's sentences.

    Returns:
      str, a sentence without its full stop; None for a name that is not known.
    """
    sentence = (sentences or {}).get(name) or _sentence(name)
    return sentence and _OPTION.sub(lambda found: spelled(found[1]), sentence)


def _sentence(name: str) -> str | None:
    return collections.ChainMap(HUGGING_FACE_NAMES, _OPENAI_NAMES, _LLAMA_CPP_NAMES, _COMMANDS_NAMES).get(name)


def explained(name: str, allowed: Iterable[str], spelled: Callable[[str], str] = in_python) -> str:
    """The part of an error message that helps with an unknown name: advice, the name that was meant, or all names.

    Args:
      name: what was given.
      allowed: the names that there are.
      spelled: as for `advice`.
    """
    allowed = list(allowed)
    known = advice(name, spelled)
    if known:
        options = _OPTION.findall(_sentence(name) or "")
        others = {option for option in options if spelled(option).partition("=")[0] not in allowed}
        function = "from_pretrained" if others <= _FROM_PRETRAINED else "generate"
        return f"{known} (with TextGenerator.{function})" if others else known
    longer = [other for other in allowed if len(name) > 2 and other.startswith(name)]
    close = longer if len(longer) == 1 else difflib.get_close_matches(name, allowed, n=1, cutoff=0.8)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed)}"


def check_names(what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises TypeError for the first of the names that is not allowed; `what` is whose arguments they are."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            raise TypeError(f"{what} has no argument {name}; {explained(name, allowed)}")


def explains_names(*more: Iterable[str]) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """A decorator: a keyword that the function does not take is a TypeError that says what there is instead.

    Args:
      *more: names beside those of the function's parameters, where it takes any keyword.
    """

    def decorated(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        takes_any = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        parameters = inspect.signature(function).parameters.values()
        own = [p.name for p in parameters if p.kind not in takes_any and p.name not in ("self", "cls")]
        allowed = [*own, *itertools.chain(*more)]

        @functools.wraps(function)
        def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            check_names(function.__qualname__, kwargs, allowed)
            return function(*args, **kwargs)

        return wrapper

    return decorated
