"""Write docs/reference.md: every public name with its signature, fields and docstring, out of the sources.

Left out is what is public among our own modules only: names whose docstring says who else they are for ("for
`Channel` to call"), and those of `_INTERNAL`.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reference.md"
HEAD = """\
# Reference

Every public name, out of its docstring: `make reference` writes this page. [api.md](api.md) is the tour.
"""
MODULES = {
    "virtio_bdev": "Block devices.",
    "virtio_bdev.aio": "The same for asyncio.",
    "virtio_bdev.bench": "Measuring a disk.",
    "virtio_bdev.verify": "Whether a disk keeps what it is given.",
    "virtio.target": "A vhost-user target of one's own.",
}
_BESIDE = {"virtio_bdev.bench": ["Histogram"]}  # what a module hands out, and another one defines
_OTHERS = re.compile(r"\bfor (`\w+`|the \w+)\s+to\s+(call|use)\b|for this library's own use")
_INTERNAL = {
    "Buffer": ["hold", "let_go"],
    "Histogram": ["add", "buckets", "clear", "record"],
    "Job": ["load"],
}


def page() -> str:
    """The whole page."""
    loader = griffe.GriffeLoader(search_paths=[ROOT / "src"])
    for package in ("virtio", "virtio_bdev"):
        loader.load(package)
    loader.resolve_aliases()
    parts = [HEAD]
    for name, words in MODULES.items():
        module = loader.modules_collection[name]
        parts.append(f"## {name}\n\n{words}\n")
        parts += [_member(public, module.members[public]) for public in _public(module)]
    return "\n".join(parts)


def _public(module: griffe.Object) -> list[str]:
    """What a module offers: what it says itself, else what it defines and does not hide."""
    if module.exports is not None:
        return [str(name) for name in module.exports]
    own = [name for name, one in module.members.items() if one.is_public and not one.is_alias]
    return [*own, *_BESIDE.get(module.path, [])]


def _member(name: str, member: griffe.Object | griffe.Alias) -> str:
    """A name as users have it, whatever it is called where it is defined."""
    if isinstance(member, griffe.Alias):
        member = member.final_target
    if isinstance(member, griffe.Function):
        return f"### {name}\n\n{_signature(member)}\n{_words(member)}"
    if not isinstance(member, griffe.Class):  # a type with a short name
        return f"### {name}\n\n{_code(member.source)}"
    bases = ", ".join(str(base) for base in member.bases)
    text = f"### {name}{f' ({bases})' if bases else ''}\n\n{_words(member)}"
    members = {**member.members, **member.inherited_members}
    public = {key: one for key, one in members.items() if not key.startswith("_")}
    if fields := [one.source for one in public.values() if _is_field(one)]:
        text += "\n" + _code("\n".join(fields))
    for key, one in public.items():
        if isinstance(one, griffe.Alias):  # it is inherited
            one = one.final_target
        if key in _INTERNAL.get(name, []) or _OTHERS.search(_words(one)):
            continue
        if isinstance(one, griffe.Function):
            text += f"\n{_signature(one)}\n{_words(one)}"
        elif isinstance(one, griffe.Attribute) and "property" in one.labels:
            text += f"\n`{key}: {one.annotation}`\n\n{_words(one)}".rstrip("\n") + "\n"
    return text


def _is_field(member: griffe.Object | griffe.Alias) -> bool:
    """Whether it is declared in the body of its class, as those of a record are."""
    is_attribute = isinstance(member, griffe.Attribute) and "property" not in member.labels
    return is_attribute and not member.source.startswith("self.")


def _signature(function: griffe.Function) -> str:
    line = f"{'async def' if 'async' in function.labels else 'def'} {function.signature()}"
    return _code("\n".join(textwrap.wrap(line, 100, subsequent_indent="    ", break_long_words=False)))


def _code(text: str) -> str:
    return f"```py\n{text}\n```\n"


def _words(member: griffe.Object) -> str:
    return f"{member.docstring.value}\n" if member.docstring else ""


if __name__ == "__main__":
    PAGE.write_text(page())
