"""Which versions of the lockfiles the registry has withdrawn, by what cargo last heard of it. Exit code 3 when that is not to be found: cargo keeps it as it likes."""

import json
import os
import re
import sys
from pathlib import Path

home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
caches = list(home.glob("registry/index/*/.cache"))
lockfiles = [Path(name) for name in sys.argv[1:]]
locked = sorted({found for lockfile in lockfiles for found in re.findall(r'name = "([^"]+)"\nversion = "([^"]+)"\nsource = ', lockfile.read_text())})
# By the newest of cargo's notes: a registry that was asked in another way has others, which may be old.
known: dict[tuple[str, str], tuple[float, bool]] = {}
for name, version in locked:
    low = name.lower()
    place = {1: f"1/{low}", 2: f"2/{low}", 3: f"3/{low[0]}/{low}"}.get(len(low), f"{low[:2]}/{low[2:4]}/{low}")
    for notes in (cache / place for cache in caches if (cache / place).is_file()):
        # Records with a zero byte between them, some of which are the registry's own lines.
        for record in notes.read_bytes().split(b"\0"):
            if record.startswith(b'{"'):
                line = json.loads(record)
                if line["vers"] == version:
                    known[name, version] = max(known.get((name, version), (0, False)), (notes.stat().st_mtime, line["yanked"]))
yanked = [f"{name} {version}" for (name, version), (_, is_yanked) in known.items() if is_yanked]
if len(known) < len(locked) and not yanked:
    print(f"of {len(locked)} versions {len(known)} are in cargo's own notes in {home}")
    sys.exit(3)
print(f"{len(known)} of {len(locked)} versions, withdrawn: {', '.join(yanked) or 'none'}")
sys.exit(bool(yanked))
