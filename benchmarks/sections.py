"""Parts of the benchmark that are no rows: growth, start-up, size of the graph, memory.

Each is a function of the path that its files' names begin with; it prints its
table and returns what goes into the JSON file.
"""


def scaling(stem):
    raise NotImplementedError


startup = nodes = memory = scaling
