"""Write docs/reference.md: every public name with its signature and docstring, out of the sources."""

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
_INTERNAL = re.compile(r"[;,] for `\w+` to call")  # public among our own modules only
MODULES = {
    "virtio_bdev": "Block devices.",
    "virtio_bdev.aio": "The same for asyncio.",
    "virtio.target": "A vhost-user target of one's own.",
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
        parts += [_member(member) for member in _public(module)]
    return "\n".join(parts)


def _public(module: griffe.Object) -> list[griffe.Object]:
    """What a module offers: what it says itself, else what it defines and does not hide."""
    if module.exports is not None:
        names = [str(name) for name in module.exports]
    else:
        names = [name for name, one in module.members.items() if one.is_public and not one.is_alias]
    members = [module.members[name] for name in names]
    found = [one.final_target if isinstance(one, griffe.Alias) else one for one in members]
    return [one for one in found if isinstance(one, (griffe.Function, griffe.Class))]


def _member(member: griffe.Object) -> str:
    if isinstance(member, griffe.Function):
        return f"### {member.name}\n\n{_signature(member)}\n{_words(member)}"
    assert isinstance(member, griffe.Class)
    bases = ", ".join(str(base) for base in member.bases)
    text = f"### {member.name}{f' ({bases})' if bases else ''}\n\n{_words(member)}"
    for name, one in {**member.members, **member.inherited_members}.items():
        if isinstance(one, griffe.Alias):  # it is inherited
            one = one.final_target
        if name.startswith("_") or _INTERNAL.search(_words(one)):
            continue
        if isinstance(one, griffe.Function):
            text += f"\n{_signature(one)}\n{_words(one)}"
        elif isinstance(one, griffe.Attribute) and ("property" in one.labels or one.docstring):
            text += f"\n`{name}: {one.annotation}`\n\n{_words(one)}".rstrip("\n") + "\n"
    return text


def _signature(function: griffe.Function) -> str:
    line = f"{'async def' if 'async' in function.labels else 'def'} {function.signature()}"
    text = "\n".join(textwrap.wrap(line, 100, subsequent_indent="    ", break_long_words=False))
    return f"```py\n{text}\n```\n"


def _words(member: griffe.Object) -> str:
    return f"{member.docstring.value}\n" if member.docstring else ""


if __name__ == "__main__":
    PAGE.write_text(page())
