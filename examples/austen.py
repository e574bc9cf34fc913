"""Fetches the text that the training examples are for: Jane Austen's six novels, 4.0 MB in the public domain.

    python examples/austen.py austen.txt

The text is Project Gutenberg's, as the R package janeaustenr 1.0.0 carries it, one line a printed line. It comes from
that package's repository, at one commit; each file is checked, and so is the whole.
"""

import argparse
import bz2
import hashlib
import http.client
import io
import pathlib
import sys
import urllib.request

from gpt_neo_sampling._atomic_files import write_whole

SOURCE = "https://raw.githubusercontent.com/juliasilge/janeaustenr/c50b202f9a6ef24f14d4b1306aab7a0fe9aca011/data"
BOOKS = {  # in the order in which they were published, with the SHA-256 of each file
    "sensesensibility": "0fef9c0d7598e30a0c09e866e3db4117b4a47d31cbc28cc8783eb4abdad03593",
    "prideprejudice": "9704d3d55b0e59f3e9f6d6032d192200f925ec7b2ba4f1dba402f179578ae3c9",
    "mansfieldpark": "c5903def1e79b8494097f9bc5c52d0fb173084450432c10dfd9647c0d3bd3e2d",
    "emma": "65594dab7e37779e5b36c8551886d35cef2149fb442793e49b9879a4287f33f2",
    "northangerabbey": "d4b8163fba67575e3125f532752baf7d86bf25dbf975aa596b92d3868cab9519",
    "persuasion": "758a227662b5f94785199b5c80a3d23533b397d476ddc43289181fb556d945a0",
}
WHOLE = "887d811d970b962381ef54f0d0dde7d14e7ce7aa2c85fdef0a8a97a47e4390d0"  # SHA-256 of the text


def fetch(url, checksum):
    """The bytes of a file; a ValueError if they are others, an OSError if they cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            data = answer.read()
    except (OSError, http.client.HTTPException) as e:
        raise OSError(f"{url}: {e}") from None
    check(data, checksum, url)
    return data


def check(data, checksum, what):
    found = hashlib.sha256(data).hexdigest()
    if found != checksum:
        raise ValueError(f"{what}: {len(data)} bytes with the SHA-256 {found}; {checksum} is needed")


def lines(data):
    """The lines, as bytes, in one of the package's files: a character vector as R saves it, version 2, XDR, bzip2."""
    stream = io.BytesIO(bz2.decompress(data))

    def number():
        return int.from_bytes(stream.read(4), "big")

    stream.read(7)  # RDX2, X
    for _ in range(6):  # three versions; that a list, a symbol and its text follow
        number()
    stream.read(number())  # the symbol, which is the book's name
    number()  # that a vector of texts follows
    for _ in range(number()):
        number()  # that a text follows
        yield stream.read(number())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path, help="the file to write")
    parser.add_argument("--source", default=SOURCE, metavar="URL", help="where the files are (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"{args.output} is there already")
    if not args.output.parent.is_dir():
        parser.error(f"{args.output}: there is no folder {args.output.parent}")
    books = []
    try:
        for book, checksum in BOOKS.items():
            print(f"fetching {book}", file=sys.stderr)
            books.append(b"".join(line + b"\n" for line in lines(fetch(f"{args.source}/{book}.rda", checksum))))
        text = b"\n".join(books)
        check(text, WHOLE, "the text")
    except (OSError, ValueError) as e:
        parser.exit(1, f"{parser.prog}: error: {e}\n")
    write_whole(args.output, lambda partial: partial.write_bytes(text))
    print(f"{args.output}: {len(text):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
