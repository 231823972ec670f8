"""Keeps inserting rows into a SQLite database through the sqlite3 shell until killed; python3-minimal has no sqlite3.

Each transaction inserts a pair of rows with the same number: a copy with an odd count, or a gap, is no moment of history.
"""

import subprocess
import sys
import time

shell = subprocess.Popen(["sqlite3", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
shell.stdin.write("pragma journal_mode = wal; pragma busy_timeout = 5000; create table if not exists pairs (n integer, half text, filler blob);\n")
n = 0
while True:
    n += 1
    shell.stdin.write(
        f"begin immediate; insert into pairs values ({n}, 'a', randomblob(300)); insert into pairs values ({n}, 'b', randomblob(300)); commit;\n"
    )
    shell.stdin.flush()
    time.sleep(0.005)
