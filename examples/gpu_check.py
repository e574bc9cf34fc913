"""Whether a GPU draws a CPU's tokens, and how fast: a report of a minute or two, for someone who has one.

    python examples/gpu_check.py [--device gpu:0] [--tokens 64]

With the bundled model, in float32 without TensorFloat-32. Beside transformers and PyTorch, if they are installed.
Exit status 0 if all tokens are equal, 1 if some are not, 2 if there is no such device.
"""

import argparse
import functools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import gpt_neo_sampling
from gpt_neo_sampling import TextGenerator
from gpt_neo_sampling._compat import tensorflow

PROMPTS = ["The family of Dashwood", "Emma", "It was a truth", "Mr. Darcy", "She", "In the evening", "Anne", "My dear"]
WAYS = {
    "greedy": {"temperature": 0},
    "softmax": {},
    "top-k 40": {"top_k": 40},
    "top-p 0.9": {"top_p": 0.9},
    "entmax 1.3": {"entmax_alpha": 1.3},
}
MOST_TOKENS = 200  # fit in the bundled model's context behind a prompt
BATCHES = 1, 8, 64
RUNS = 3


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="gpu:0", help="cpu:0 tries the script itself (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new ones in each row (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 1 <= args.tokens <= MOST_TOKENS:
        parser.error(f"--tokens {args.tokens}; 1 to {MOST_TOKENS} are allowed")
    try:
        device = TextGenerator.from_pretrained(devices=args.device)
    except ValueError as e:
        print(f"gpu_check: {e}", file=sys.stderr)
        return 2
    tensorflow.config.experimental.enable_tensor_float_32_execution(False)
    print(f"gpt_neo_sampling {gpt_neo_sampling.__version__}, {machine(device.mesh.devices[0])}")
    differing = compare(device, TextGenerator.from_pretrained(devices="cpu:0"), args.tokens)
    speeds(device, args.tokens)
    return 1 if differing else 0


def machine(device):
    """Versions, and what is known of the device, in a line."""
    built = tensorflow.sysconfig.get_build_info()
    facts = [f"TensorFlow {tensorflow.__version__}", f"CUDA {built['cuda_version']}" if "cuda_version" in built else ""]
    kind, number = device.removeprefix("/device:").split(":")
    gpus = tensorflow.config.list_physical_devices("GPU")
    if kind == "GPU":
        facts.append(tensorflow.config.experimental.get_device_details(gpus[int(number)]).get("device_name", ""))
    if kind == "GPU" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--id={number}", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        facts.append("driver " + subprocess.run(query, capture_output=True, text=True).stdout.strip())
    return ", ".join([*filter(None, facts), device])


def compare(device, cpu, n_tokens):
    """Prints for each way how many rows are equal on both; returns how many are not."""
    differing = 0
    for way, options in WAYS.items():
        drawn, expected = (
            [s.tokens for s in g.generate(PROMPTS, max_new_tokens=n_tokens, seed=1, **options)] for g in (device, cpu)
        )
        unequal = [i for i, (a, b) in enumerate(zip(drawn, expected, strict=True)) if a != b]
        first = ""
        if unequal:
            pairs = enumerate(zip(drawn[unequal[0]], expected[unequal[0]]))
            first = f"; row {unequal[0]} from token {next((i for i, (a, b) in pairs if a != b), 'where one ends')} on"
        print(f"{way:12} {len(PROMPTS) - len(unequal)} of {len(PROMPTS)} rows equal to the CPU's{first}", flush=True)
        differing += len(unequal)
    return differing


def speeds(device, n_tokens):
    """Prints tokens a second by batch: medians, the call that builds and compiles by itself."""
    with tempfile.TemporaryDirectory() as folder:
        peer = transformers_peer(folder)
        for batch in BATCHES:
            options = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "top_k": 40, "seed": 1}
            call = functools.partial(device.generate, PROMPTS[:1] * batch, **options)
            first, rate = timed(call, batch * n_tokens)
            line = f"batch {batch:2}: {rate:8.0f} tokens/s, the first call {first:.1f} s"
            if peer is not None:
                _, rate = timed(functools.partial(peer, batch, n_tokens), batch * n_tokens)
                line += f"; transformers {rate:.0f} tokens/s"
            print(line, flush=True)


def timed(call, n_tokens):
    """(seconds of the first call, tokens a second of those after it)."""
    seconds = []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds[0], n_tokens / statistics.median(seconds[1:])


def transformers_peer(folder):
    """A function of (batch, tokens) that generates as many with transformers, on its GPU if it has one; or None."""
    try:
        import torch
        from transformers import GPTNeoForCausalLM
    except ImportError:
        print("transformers or PyTorch is not installed: no times beside it")
        return None
    from gpt_neo_sampling.checkpoint import convert_checkpoint
    from gpt_neo_sampling.generation.decode_graph import DEMO_FOLDER

    convert_checkpoint(DEMO_FOLDER, folder, to="huggingface")
    place = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPTNeoForCausalLM.from_pretrained(folder).to(place).eval()
    print(f"transformers with PyTorch {torch.__version__} on {place}")
    prompt = TextGenerator.from_pretrained().encode(PROMPTS[0])

    def generate(batch, n_tokens):
        ids = torch.tensor([prompt] * batch, device=place)
        with torch.no_grad():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=40,
                                   min_new_tokens=n_tokens, max_new_tokens=n_tokens)  # fmt: skip
        return found.cpu()

    return generate


if __name__ == "__main__":
    sys.exit(main())
