"""Placement as data: regular expressions on parameter paths, first match wins, nothing left to chance."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmjax.errors import RecipeError

Rules = Sequence[tuple[str, Any]]


def path_of(keypath: Sequence[Any]) -> str:
    """`a/b/c` for the key path that `jax.tree_util` gives with a leaf."""
    return jax.tree_util.keystr(tuple(keypath), simple=True, separator="/")


_REQUIRED = object()


def match_rules(rules: Rules, params: Any, *, what: str = "rules", default: Any = _REQUIRED) -> Any:
    """The value of the first rule whose expression matches the whole path of each parameter.

    The same helper places parameters, scales their learning rate and weight decay, and freezes them.

    Args:
      rules: pairs of a regular expression (`re.fullmatch` on `a/b/c`) and any value.
      params: nested dicts; the leaves themselves are not looked at.
      what: how errors call the rules, as the recipe does (`sharding`, `optimizer.weight_decay_multipliers`).
      default: value of parameters that no rule matches; without it there may be none.

    Returns:
      A tree like `params` whose leaves are the values.

    Raises:
      RecipeError: an invalid expression, a parameter no rule matches, or a rule that decides nothing. Only a
        last rule `.*` may be left without work.
    """
    compiled = [_compile(regex, what) for regex, _ in rules]
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [path_of(keypath) for keypath, _ in leaves]
    first = [next((i for i, regex in enumerate(compiled) if regex.fullmatch(path)), None) for path in paths]
    for path, i in zip(paths, first, strict=True):
        if i is None and default is _REQUIRED:
            raise RecipeError(f"{what}: no rule covers {path}; end the rules with ('.*', ...)")
    for i in range(len(rules)):
        if i not in first:
            _explain_idle(i, compiled, paths, what)
    return jax.tree.unflatten(treedef, [default if i is None else rules[i][1] for i in first])


def _compile(regex: str, what: str) -> re.Pattern:
    try:
        return re.compile(regex)
    except re.error as error:
        raise RecipeError(f"{what}: {regex!r} is not a regular expression: {error}") from error


def _explain_idle(i: int, compiled: Sequence[re.Pattern], paths: Sequence[str], what: str) -> None:
    """Raise for a rule that decides nothing, unless it is the catch-all at the end."""
    pattern = compiled[i].pattern
    if pattern == ".*" and i == len(compiled) - 1:
        return
    matched = next((path for path in paths if compiled[i].fullmatch(path)), None)
    if matched is None:
        near = next((path for path in paths if compiled[i].search(path)), None)
        hint = f"it must match the whole path, such as {near}" if near else f"paths look like {paths[0]}"
        raise RecipeError(f"{what}: {pattern!r} matches no parameter; {hint}")
    earlier = next(regex.pattern for regex in compiled if regex.fullmatch(matched))
    raise RecipeError(
        f"{what}: {pattern!r} never decides: {earlier!r} comes before it and takes {matched}; put it earlier"
    )


def shardings(rules: Rules, abstract_params: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every parameter.

    Args:
      rules: pairs of a regular expression and a spec such as `(None, ("data", "fsdp"), "tensor")`: for each
        dimension an axis, several, or None; dimensions it leaves out at the end are None.
      abstract_params: nested dicts of anything with a shape, `jax.eval_shape`'s result for example.
      mesh: its axes are the names a spec may use.

    Raises:
      RecipeError: whatever `match_rules` raises; a spec with more entries than the parameter has dimensions,
        an axis the mesh lacks or that is used twice, a dimension that its axes do not divide.
    """
    specs = match_rules(rules, abstract_params, what="sharding")

    def place(keypath: Any, leaf: Any, spec: Any) -> NamedSharding:
        _check(path_of(keypath), leaf.shape, spec, mesh)
        entries = (_axes(entry) or None for entry in spec)
        return NamedSharding(mesh, PartitionSpec(*(e[0] if e and len(e) == 1 else e for e in entries)))

    return jax.tree_util.tree_map_with_path(place, abstract_params, specs)


def _axes(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """The axes of one entry of a spec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _check(path: str, shape: Sequence[int], spec: Any, mesh: Mesh) -> None:
    """Raise RecipeError when `spec` cannot place a parameter of this shape."""
    about = f"placement of {path}{list(shape)} as {_show(spec)}"
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        raise RecipeError(f"{about}: a spec is a tuple with one entry per dimension, such as (None, 'fsdp')")
    if len(spec) > len(shape):
        raise RecipeError(f"{about}: {len(spec)} entries for {len(shape)} dimension(s)")
    names = [name for entry in spec for name in _axes(entry)]
    for name in names:
        if name not in mesh.shape:
            raise RecipeError(f"{about}: no axis {name!r}, the mesh has {', '.join(mesh.axis_names)}")
        if names.count(name) > 1:
            raise RecipeError(f"{about}: axis {name!r} is used twice")
    for dim, entry in enumerate(spec):
        parts = math.prod(mesh.shape[name] for name in _axes(entry))
        if shape[dim] % parts:
            raise RecipeError(
                f"{about}: dimension {dim} of {shape[dim]} cannot be cut into {parts} equal parts; change "
                f"{' or '.join(f'config.mesh.{name}' for name in _axes(entry))}, or this rule of config.sharding"
            )


def _show(spec: Any) -> str:
    """A spec the way a recipe writes it: `(None, 'fsdp')`."""
    return repr(tuple(spec)) if isinstance(spec, Sequence) and not isinstance(spec, str) else repr(spec)


def format_table(rules: Rules, abstract_params: Any, mesh: Mesh) -> str:
    """The resolved placement, one line per parameter and a last line with the totals, for the start of a run.

    Args:
      rules: as for `shardings`, which also says what is raised.
      abstract_params: nested dicts of anything with a shape and a dtype.
      mesh: what to place them on.
    """
    placement = jax.tree.leaves(shardings(rules, abstract_params, mesh))
    leaves = jax.tree_util.tree_flatten_with_path(abstract_params)[0]
    rows, total, here = [("parameter", "shape", "dtype", "placement", "per device")], 0, 0
    for (keypath, leaf), sharding in zip(leaves, placement, strict=True):
        size = leaf.dtype.itemsize
        part = math.prod(sharding.shard_shape(tuple(leaf.shape))) * size
        total, here = total + math.prod(leaf.shape) * size, here + part
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append((path_of(keypath), shape, str(leaf.dtype), _show_sharding(sharding), _bytes(part)))
    rows.append(("all", "", "", f"{_bytes(total)} in all", _bytes(here)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _show_sharding(sharding: NamedSharding) -> str:
    """`-, fsdp, data+tensor`: what cuts each dimension; `copied` when nothing does."""
    entries = ["+".join(_axes(entry)) or "-" for entry in sharding.spec]
    return ", ".join(entries) if any(entry != "-" for entry in entries) else "copied"


def _bytes(count: int) -> str:
    """`1.5 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{int(size)} B" if unit == "B" else f"{size:.1f} {unit}"
