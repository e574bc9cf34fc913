"""From command to first token, and where the time goes. A section of run.py.

    python benchmarks/startup.py [--model DIR]

As a script: the phases of one start in this fresh process, a JSON object. They are
told apart by standing in the way of mesh-tensorflow's `Lowering`, the
checkpoint's `read` and TensorFlow's `Session.run`, of which the last is the
first run and those before it load the weights.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time

import common

REPEATS = 5
MOST_SECONDS = 10.0
PHASES = ("imports", "opening", "graph building", "lowering", "weights", "first run")


def measured(model, prompt, began):
    """{phase: seconds} of one new token."""
    from gpt_neo_sampling import TextGenerator
    from gpt_neo_sampling._compat import mtf, tf
    from gpt_neo_sampling.checkpoint import Checkpoint

    imported = time.time()
    generator = TextGenerator.from_pretrained(model)
    opened = time.time()
    with (
        timed(mtf.Lowering, "__init__") as lowerings,
        timed(Checkpoint, "read") as reads,
        timed(tf.Session, "run") as runs,
    ):
        generator.generate(prompt, max_new_tokens=1, seed=1)
    all_seconds = time.time() - opened
    if not runs:
        raise SystemExit("startup: no Session.run was seen")
    seconds = {
        "imports": imported - began,
        "opening": opened - imported,
        "lowering": sum(lowerings),
        "weights": sum(reads) + sum(runs[:-1]),
        "first run": runs[-1],
    }
    others = sum(seconds[phase] for phase in ("lowering", "weights", "first run"))
    return seconds | {"graph building": all_seconds - others}


@contextlib.contextmanager
def timed(owner, name):
    """Yields a list of the seconds of each call of owner.name in the block."""
    found, function = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        began = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            found.append(time.time() - began)

    setattr(owner, name, wrapper)
    try:
        yield found
    finally:
        setattr(owner, name, function)


def command_seconds():
    """Wall time of the command, a fresh process."""
    command = ["-m", "gpt_neo_sampling.cli.main", "generate", "--prompt", "The family", "--max-new-tokens", "1"]
    environment = dict(os.environ, PYTHONPATH=str(common.REPOSITORY))
    began = time.time()
    subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True)
    return time.time() - began


def section(stem):
    models = {"bundled model": [], "125M shape": ["--model", str(common.model_folder())]}
    whole = common.summary([command_seconds() for _ in range(REPEATS)])
    met = whole["median"] <= MOST_SECONDS
    print(f"gpt-neo-sampling generate --max-new-tokens 1: {whole['median']:.2f} s from command to end; at most "
          f"{MOST_SECONDS:.0f} s: {'met' if met else 'NOT MET'}")  # fmt: skip
    results = {"command": whole, "met": met}
    print(f"{'seconds':14} " + " ".join(f"{phase:>14}" for phase in (*PHASES, "all")))
    for name, arguments in models.items():
        starts = [common.child_json("startup.py", "--began", repr(time.time()), *arguments) for _ in range(REPEATS)]
        phases = {phase: common.summary([s[phase] for s in starts])["median"] for phase in PHASES}
        all_seconds = common.summary([sum(s.values()) for s in starts])["median"]
        results[name] = {"phases": phases, "all": all_seconds, "samples": starts}
        print(f"{name:14} " + " ".join(f"{t:14.2f}" for t in (*phases.values(), all_seconds)), flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="default: the bundled one")
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    prompt = "The family" if args.model is None else common.prompts(1)
    print(json.dumps(measured(args.model, prompt, args.began)))


if __name__ == "__main__":
    main()
