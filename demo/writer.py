"""The demo's application: inserts rows 1, 2, 3, … into a SQLite database in WAL mode until it is told to stop."""

import os
import signal
import sqlite3
import sys
import time

stopped = False


def stop(*_):
    global stopped
    stopped = True


signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, signal.SIG_IGN)
db = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
db.execute("pragma journal_mode = wal")
db.execute("create table if not exists orders (n integer primary key, time real, customer text, note blob)")
(n,) = db.execute("select coalesce(max(n), 0) from orders").fetchone()
start = os.getppid()
# Ends with the demo even if that is killed.
while not stopped and os.getppid() == start:
    n += 1
    db.execute("insert into orders values (?, ?, ?, ?)", (n, time.time(), f"customer {n % 97}", os.urandom(200)))
    # The first ones quickly, for something to back up.
    if n > 2000:
        time.sleep(0.005)
db.close()
