"""One TextGenerator with several callers: threads, streamers that call it again, a forked process."""

import itertools
import logging
import multiprocessing
import os
import threading

import pytest
from conftest import DATA

from gpt_neo_sampling import TextGenerator, convert_checkpoint, export_saved_model
from gpt_neo_sampling._compat import quiet_logging, quiet_stderr, tf

MODEL = DATA / "hf_gpt_neo_tiny"
PROMPTS = [[5, 17], [3]]
# (options, whether a streamer looks on); sizes and steps of more graphs than one
REQUESTS = [
    (dict(max_new_tokens=6), False),
    (dict(max_new_tokens=9, top_k=5), True),
    (dict(max_new_tokens=20), True),
    (dict(max_new_tokens=12, entmax_alpha=1.5), True),
]


@pytest.fixture
def generator():
    generator = TextGenerator.from_pretrained(MODEL)
    yield generator
    generator.close()


def in_threads(functions):
    """The results of the functions, run at the same time."""
    results, start = [None] * len(functions), threading.Barrier(len(functions))

    def work(i):
        start.wait()
        try:
            results[i] = functions[i]()
        except BaseException as e:
            results[i] = e

    threads = [threading.Thread(target=work, args=[i]) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def streamed(generator, options, seed):
    """(the samples' tokens, the tokens that the streamer received)."""
    seen = {}

    def streamer(index, token, text, is_last):
        seen.setdefault(index, []).append(token)

    samples = generator.generate(PROMPTS, seed=seed, streamer=streamer, **options)
    return [s.tokens for s in samples], [seen[i] for i in range(len(samples))]


def call(generator, options, is_streamed, seed):
    if is_streamed:
        tokens, seen = streamed(generator, options, seed)
        assert tokens == seen
        return tokens
    return [s.tokens for s in generator.generate(PROMPTS, seed=seed, **options)]


def test_threads_on_a_generator_that_has_built_nothing(generator):
    calls = [(*request, seed) for request, seed in itertools.product(REQUESTS, range(2))]
    found = in_threads([lambda c=c: [call(generator, *c) for _ in range(3)] for c in calls])
    assert found == [[call(generator, *c)] * 3 for c in calls]
    assert len({str(f) for f in found}) == len(calls)


@pytest.mark.slow
def test_stop_strings_of_several_threads():
    """Each stops only its own text, while graphs are dropped and rebuilt."""
    generator = TextGenerator.from_pretrained()
    calls = [
        dict(prompts="It was the duty of", stop_strings=[s], max_new_tokens=40, seed=seed, top_k=k)
        for (s, k), seed in itertools.product([("the", 0), (",", 50), ("e", 0), (".", 50)], range(4))
    ]
    found = in_threads([lambda c=c: [generator.generate(**c) for _ in range(2)] for c in calls])
    assert found == [[generator.generate(**c)] * 2 for c in calls]


def test_a_streamer_that_generates(generator):
    """With the same graph, and with one that must be built."""
    inner = []

    def streamer(index, token, text, is_last):
        inner.append((token, call(generator, *REQUESTS[len(inner) % 2], token)))

    (sample,) = generator.generate([[5]], seed=1, max_new_tokens=4, streamer=streamer)
    assert [token for token, _ in inner] == sample.tokens
    for n, (token, tokens) in enumerate(inner):
        assert tokens == call(generator, *REQUESTS[n % 2], token)


@pytest.mark.slow
def test_closed_by_a_streamer(generator):
    """Running graphs finish, and the next call builds its graph again."""
    want = call(generator, *REQUESTS[2], 7)
    closed = []

    def streamer(*_):
        if not closed:
            closed.append(generator.close())

    samples = generator.generate(PROMPTS, seed=7, streamer=streamer, **REQUESTS[2][0])
    assert closed and [s.tokens for s in samples] == want == call(generator, *REQUESTS[2], 7)


def test_a_processor_that_generates_is_an_error(generator):
    def processor(logits, ids, position):
        generator.generate([[5]], max_new_tokens=1)

    with pytest.raises(RuntimeError, match="a logits processor cannot use the generator that it is built into"):
        generator.generate([[5]], max_new_tokens=1, logits_processors=[processor])
    assert len(generator.generate([[5]], max_new_tokens=2)[0].tokens) == 2


def call_in(pipe, functions):
    for function in functions:
        try:
            function()
            pipe.send("no error")
        except RuntimeError as e:
            pipe.send(str(e))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_gets_an_error(generator, tmp_path):
    """With the used generator, a new one, and everything else that runs TensorFlow."""
    generator.generate([[5]], max_new_tokens=1)
    functions = [
        lambda: generator.generate([[5]], max_new_tokens=1),
        lambda: TextGenerator.from_pretrained(MODEL).generate([[5]], max_new_tokens=1),
        lambda: convert_checkpoint(MODEL, tmp_path / "converted", to="mesh-tf"),
        lambda: export_saved_model(tmp_path / "exported", MODEL, batch=1, length=8),
    ]
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=call_in, args=[theirs, functions])
    child.start()
    try:
        for _ in functions:
            assert ours.poll(60)
            assert "was forked from one that had used TensorFlow" in ours.recv()
    finally:
        child.kill()
        child.join()


def test_what_is_held_back_is_so_in_threads_too(capfd, caplog, monkeypatch):
    """Standard error and TensorFlow's log belong to the process; they are as before once all threads are done."""
    logger, heard = tf.get_logger(), []
    caplog.set_level(logging.WARNING, logger.name)
    monkeypatch.setattr(logger, "callHandlers", lambda record: heard.append(record.msg))
    inside, one_left = threading.Barrier(2), threading.Event()

    def held(first):
        for _ in range(200):
            with quiet_stderr():
                os.write(2, b"held back\n")
        with quiet_logging():
            inside.wait()
            if first:
                assert one_left.wait(60)
                logger.warning("held back")
        one_left.set()
        return first

    assert in_threads([lambda: held(True), lambda: held(False)]) == [True, False]
    os.write(2, b"shown\n")
    logger.warning("shown")
    assert capfd.readouterr().err == "shown\n"
    assert heard == ["shown"]
