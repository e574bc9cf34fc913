"""A run over a file of prompts that is killed again and again, beside one that is not.

    python benchmarks/kill_and_resume.py [--prompts 500] [--kills 10] [--seed S]

Runs `gpt-neo-sampling generate --prompts-file` with the bundled model on prompts of mixed lengths and options; then
again into another file, killed (SIGKILL) at random moments and started again until it is done. Prints what was
there at each end, and whether the two files are the same to the byte; the exit status is 1 if not.
"""

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

WORDS = "Emma Elinor had been a very the of and to her sister was not Mr. Darcy with , ; it in Norland".split()


def write_prompts(path, count, rng, longest=120):
    """Prompts of 1 to `longest` words; of five, three have options of their own."""
    with open(path, "w") as file:
        for i in range(count):
            record = {"id": f"prompt-{i}", "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))}
            if i % 5 == 1:
                record.update(temperature=rng.choice([0, 0.7, 1.2]), max_new_tokens=rng.randint(4, 40))
            if i % 5 == 2:
                record.update(top_k=rng.randint(1, 60), seed=i)
            if i % 5 == 3:
                record.update(num_return_sequences=3)
            print(json.dumps(record), file=file)


def arguments(source, output):
    """The command's."""
    return [
        *("generate", "--prompts-file", str(source), "--output", str(output)),
        *("--seed", "1", "--max-new-tokens", "32"),
    ]


def start(source, output):
    command = [sys.executable, "-m", "gpt_neo_sampling.cli.main", *arguments(source, output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_at(process, output, size, delay, signum=signal.SIGKILL):
    """Sends the signal `delay` seconds after the output has that many bytes; (status, stderr) of the process."""
    while process.poll() is None and not (output.exists() and output.stat().st_size >= size):
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signum)
    _, err = process.communicate()
    return process.returncode, err


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, help="of the moments and prompts (default: a fresh one)")
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        source, undisturbed, output = (pathlib.Path(folder) / name for name in ("in.jsonl", "undisturbed", "out.jsonl"))
        write_prompts(source, args.prompts, rng)
        began = time.monotonic()
        _, err = start(source, undisturbed).communicate()
        expected = undisturbed.read_bytes()
        print(f"seed {seed}; undisturbed: {time.monotonic() - began:.1f} s, {len(expected):,} bytes; {err.strip()}")
        # behind a random share of each tenth; the first, and where the share is there, at any moment of a start
        shares = [0, *((i + rng.random()) / args.kills for i in range(args.kills - 1))]
        for i, share in enumerate(shares, 1):
            began, size = time.monotonic(), share * len(expected)
            is_there = not share or output.exists() and output.stat().st_size >= size
            status, err = end_at(start(source, output), output, size, rng.uniform(0, 8 if is_there else 0.5))
            if status != -signal.SIGKILL:
                print(f"kill {i}: came too late; status {status}, {err.strip()}")
                return 1
            *lines, tail = output.read_bytes().split(b"\n") if output.exists() else [b""]
            print(f"kill {i}: after {time.monotonic() - began:.1f} s; {len(lines)} prompts are there whole, "
                  f"and {len(tail)} bytes")  # fmt: skip
        process = start(source, output)
        _, err = process.communicate()
        same = output.read_bytes() == expected
        print(f"the rest: status {process.returncode}, {err.strip()}")
        print(f"the files are {'' if same else 'NOT '}the same")
        return int(not same)


if __name__ == "__main__":
    sys.exit(main())
