"""Names of a model's parts that code cannot have: `nn.ModuleDict({"class": ...})`."""

from __future__ import annotations

import keyword

from torch import fx, nn

from ..passed import lets_through


def rename_keywords(modules: nn.Module, graph: fx.Graph) -> list[str]:
    """Renames, in `modules` and in the graph over them, the parts whose names are words of Python's own, since a graph runs as
    code: `heads.class` becomes `heads.class_`. Returns a note on each.

    The inside of a leaf keeps its names, which no graph writes.
    """
    called = [str(node.target) for node in graph.find_nodes(op="call_module")]
    leaves = [f"{path}." for path in called if not lets_through(modules.get_submodule(path))]
    owners = [(path, owner) for path, owner in modules.named_modules() if not f"{path}.".startswith(tuple(leaves))]
    notes = []
    for path, owner in owners:
        for table in (owner._modules, owner._parameters, owner._buffers):
            for name in [name for name in table if keyword.iskeyword(name)]:
                new = f"{name}_"
                while hasattr(owner, new):
                    new += "_"
                entries = {new if n == name else n: part for n, part in table.items()}  # in the same order
                table.clear()
                table.update(entries)  # type: ignore[arg-type]
                # An owner that was renamed itself has its new name in the graph by now.
                notes += renamed_in(graph, modules, owner, path, name, new)
    return notes


def renamed_in(graph: fx.Graph, modules: nn.Module, owner: nn.Module, path: str, name: str, new: str) -> list[str]:
    """Renames a part of `owner` in the targets of a graph; `path` is what the owner was called in the model."""
    now = next(p for p, m in modules.named_modules() if m is owner)
    before, after = f"{now}.{name}".lstrip("."), f"{now}.{new}".lstrip(".")
    for node in graph.nodes:
        target = str(node.target)
        if node.op in ("call_module", "get_attr") and (target == before or target.startswith(f"{before}.")):
            node.target = after + target[len(before) :]
    old = f"{path}.{name}".lstrip(".")
    return [f"the model's {old} is called {after} here, since {name} is a word of Python's own"]
