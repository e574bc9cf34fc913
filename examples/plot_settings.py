"""Draws what each sampling option does to a model's next-token distributions: the pictures of docs/sampling.md.

    pip install -e '.[examples]'
    python examples/plot_settings.py docs/images

Writes into the folder
  options.png   a panel an option, a curve a value: probability against rank;
  adapts.png    how many tokens each option leaves where the model is sure, and where it is not;
  chain.png, entmax.png   what `gpt-neo-sampling inspect --plot` draws.
--model and --prompt take others than the bundled model and Mr. Darcy.
"""

import argparse
import pathlib

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from gpt_neo_sampling import TextGenerator
from gpt_neo_sampling._atomic_files import write_whole
from gpt_neo_sampling.inspection import plot, token_text

OPTIONS = {
    "temperature": (0.5, 0.7, 1.3, 2.0),
    "top_n_sigma": (0.7, 1.2, 2.0),
    "top_h": (0.2, 0.4, 0.8),
    "top_k": (5, 40, 200),
    "top_p": (0.5, 0.8, 0.95),
    "min_p": (0.2, 0.05, 0.01),
    "typical_p": (0.3, 0.6, 0.9),
    "epsilon_cutoff": (0.02, 0.005, 0.001),
    "eta_cutoff": (0.02, 0.005, 0.001),
    "entmax_alpha": (1.1, 1.3, 1.5, 2.0),
}
ADAPTING = {  # settings that leave about as many tokens on average: (option, value, colour)
    "top_k 20": ({"top_k": 20}, "#0072b2"),
    "top_p 0.8": ({"top_p": 0.8}, "#009e73"),
    "min_p 0.1": ({"min_p": 0.1}, "#d55e00"),
    "entmax 1.3": ({"entmax_alpha": 1.3}, "#cc79a7"),
}
TOKENS = 200  # of sampled text, at each of which the distribution is looked at,
CONTEXT = 32  # with so many ahead of it
CHAIN = {"temperature": 0.7, "top_k": 40, "top_p": 0.9}


def drawn_from(generator, prompt, **options):
    return generator.inspect(prompt, **{"temperature": 1.0, **options})[-1]


def plot_options(generator, prompt, path):
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    planes = figure.subplots(2, -(-len(OPTIONS) // 2), sharex=True, sharey=True, squeeze=False)
    model = generator.inspect(prompt)[0]
    for plane, (option, values) in zip(planes.flat, OPTIONS.items()):
        draw_curve(plane, model, color="#999999", linewidth=4, label="model")
        for value, shade in zip(values, np.linspace(0, 0.85, len(values))):
            step = drawn_from(generator, prompt, **{option: value})
            label = f"{value} → {step.support:,}"
            draw_curve(plane, step, color=colormaps["viridis"](shade), linewidth=1.8, label=label)
        plane.set_title(option, loc="left", family="monospace")
        plane.legend(loc="upper right", fontsize="small", frameon=False, handlelength=1, borderaxespad=0)
        plane.grid(alpha=0.2)
    planes[0, 0].set(xscale="log", yscale="log", xlim=(0.8, 1.2 * len(model.probabilities)), ylim=(1e-6, 1.5))
    planes[0, 0].xaxis.set_major_formatter("{x:,.0f}")
    planes[0, 0].yaxis.set_major_formatter(lambda p, _: f"{100 * p:g}%")
    figure.suptitle(f"Next token after “{prompt}”: probability by rank (setting → tokens that can be drawn)")
    save(figure, path)


def draw_curve(plane, step, **style):
    p = -np.sort(-step.probabilities)[: step.support]
    plane.plot(np.arange(1, len(p) + 1), p, **style)
    if len(p) < len(step.probabilities):
        plane.plot(len(p), p[-1], "o", color=style["color"], markersize=5)


def plot_adapting(generator, prompt, path):
    sample = generator.generate(prompt, max_new_tokens=TOKENS, temperature=1.0, seed=1)[0]
    ids = sample.prompt_tokens + sample.tokens
    rows = [ids[max(0, n - CONTEXT) : n] for n in range(1, len(ids))]
    entropies = [generator.inspect(row)[0].entropy for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    plane = figure.subplots()
    order = np.argsort(entropies)
    for label, (options, colour) in ADAPTING.items():
        supports = np.array([drawn_from(generator, row, **options).support for row in rows])
        plane.plot(entropies, supports, "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0,
                   label=f"{label}: mean {supports.mean():.1f}")  # fmt: skip
        width = max(len(order) // 10, 1)
        middle = [(np.mean(np.array(entropies)[part]), np.median(supports[part]))
                  for part in np.array_split(order, len(order) // width)]  # fmt: skip
        plane.plot(*zip(*middle), color=colour, linewidth=2)
    plane.set(yscale="log", xlabel="entropy of the model's distribution, bits", ylabel="tokens that can be drawn")
    plane.yaxis.set_major_formatter("{x:,.0f}")
    plane.grid(alpha=0.2)
    plane.legend(title="line: median")
    plane.set_title(f"Where the model is sure and where it is not: {len(rows)} places of a sampled text", loc="left")
    save(figure, path)


def save(figure, path):
    write_whole(path, lambda partial: figure.savefig(partial, dpi=100, format="png"))
    shrink(path)


def shrink(path):
    """Fewer colours: a third of the bytes."""
    image = Image.open(path).convert("RGB").quantize(96)
    write_whole(path, lambda partial: image.save(partial, format="png", optimize=True))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="where the pictures go")
    parser.add_argument("--model", help="what gpt-neo-sampling's --model takes")
    parser.add_argument("--prompt", default="Mr. Darcy looked")
    args = parser.parse_args(argv)
    generator = TextGenerator.from_pretrained(args.model)
    args.folder.mkdir(parents=True, exist_ok=True)
    plot_options(generator, args.prompt, args.folder / "options.png")
    plot_adapting(generator, args.prompt, args.folder / "adapts.png")
    for name, options in (("chain", CHAIN), ("entmax", {"entmax_alpha": 1.3})):
        path = args.folder / f"{name}.png"
        plot(generator.inspect(args.prompt, **options), lambda i: token_text(generator.tokenizer, i), path,
             title=f"Next token after “{args.prompt}”")  # fmt: skip
        shrink(path)


if __name__ == "__main__":
    main()
