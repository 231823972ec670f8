"""Prints how many orders a demo database holds. --check also demands a whole database without a gap in its numbers."""

import sqlite3
import sys

check, path = sys.argv[1] == "--check", sys.argv[-1]
db = sqlite3.connect(f"file:{path}?mode={'rw' if check else 'ro'}", uri=True, timeout=30)
if check:
    (verdict,) = db.execute("pragma integrity_check").fetchone()
    if verdict != "ok":
        sys.exit(print(f"integrity_check: {verdict}") or 1)
count, highest = db.execute("select count(*), coalesce(max(n), 0) from orders").fetchone()
if check and count != highest:
    sys.exit(print(f"{count} rows, but numbers up to {highest}") or 1)
print(count)
