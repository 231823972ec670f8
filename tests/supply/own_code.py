"""Our own sources: where `unsafe` stands, and that each is explained. What is listed here was looked at by somebody; anything else fails, and so does what is listed and gone."""

import os
import re
import sys
from pathlib import Path

# File, how many `unsafe` it has, and what for.
NAMED = {
    "src/access/caller.rs": (1, "getsockopt(SO_PEERGROUPS): the groups of who calls"),
    "src/control/listener.rs": (1, "takes the descriptor that systemd passed"),
    "src/crypto/locked.rs": (7, "pages for keys: mmap, mlock, madvise, munmap"),
    "src/run/memory.rs": (3, "malloc_trim and mallopt of glibc, madvise for the program's own code"),
    "writer/src/memory.rs": (1, "maps the memory that is lent to the daemon for a restore"),
}
# What is no code of Rust: comments, strings, characters. Raw strings with one or no '#' are enough here.
NO_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|r"[^"]*"|r#".*?"#|"(?:\\.|[^"\\])*"|\'(?:\\.[^\']*|[^\'\\])\'', re.S)


def uses(text: str) -> list[int]:
    """The lines, counted from 1, on which the keyword stands."""
    code = NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    return [code.count("\n", 0, found.start()) + 1 for found in re.finditer(r"\bunsafe\b", code)]


def explained(lines: list[str], line: int) -> bool:
    """Whether the comment that ends right above it (attributes between do not count) says SAFETY."""
    above = line - 2
    while above >= 0 and lines[above].strip().startswith("#["):
        above -= 1
    while above >= 0 and lines[above].strip().startswith("//"):
        if lines[above].strip().startswith("// SAFETY: "):
            return True
        above -= 1
    return False


def sources() -> list[str]:
    """Every file of Rust and every manifest of the tree, without what is built in it. Not by git: a tree that was unpacked has none."""
    found = []
    for at, below, names in os.walk("."):
        below[:] = sorted(name for name in below if name != "target" and not name.startswith("."))
        found += [os.path.relpath(os.path.join(at, name)) for name in sorted(names) if name.endswith(".rs") or name == "Cargo.toml"]
    return found


def main() -> int:
    faults, found, allowed = [], {}, set()
    files = sources()
    if not any(name.endswith("src/main.rs") for name in files):
        faults.append("no sources were found")
    for name in files:
        if not Path(name).exists():
            continue
        text = Path(name).read_text()
        if name.endswith("Cargo.toml"):
            # A workspace of its own cannot take the lints of ours, so it has to deny by itself.
            is_root = re.search(r"^\[workspace\]", text, re.M)
            if not is_root or name == "Cargo.toml":
                if "[lints]\nworkspace = true" not in text:
                    faults.append(f"{name}: its lints are not the workspace's")
            if is_root and 'unsafe_code = "deny"' not in text:
                faults.append(f"{name}: unsafe_code is not denied")
            continue
        if re.search(r"(allow|expect)\s*\([^)]*\bunsafe_code\b", text):
            allowed.add(name)
        for line in uses(text):
            found[name] = found.get(name, 0) + 1
            if not explained(text.splitlines(), line):
                faults.append(f"{name}:{line}: `unsafe` without a comment '// SAFETY: ' right above it")
    for name in sorted(found.keys() | allowed | NAMED.keys()):
        count, named = found.get(name, 0), NAMED.get(name, (0, ""))[0]
        if count != named:
            faults.append(f"{name}: {count} times `unsafe`, {named} are named in tests/supply/own_code.py")
        if name in allowed and not named:
            faults.append(f"{name}: allows unsafe_code and is not named in tests/supply/own_code.py")
    for fault in faults:
        print(f"FAIL  {fault}")
    if not faults:
        print(f"ok    {sum(found.values())} times `unsafe` in {len(found)} of {sum(name.endswith('.rs') for name in files)} files, each named and explained")
    return bool(faults)


sys.exit(main())
