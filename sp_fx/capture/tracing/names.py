"""Names of a model's parts that code cannot have: `nn.ModuleDict({"class": ...})`."""

from __future__ import annotations

import keyword

from torch import fx, nn


def rename_keywords(modules: nn.Module, graph: fx.Graph) -> list[str]:
    """Renames, in `modules` and in the graph over them, the parts whose names are words of Python's own, since a graph runs as
    code: `heads.class` becomes `heads.class_`. Returns a note on each."""
    notes = []
    for path, owner in list(modules.named_modules()):
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
