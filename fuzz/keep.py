#!/usr/bin/env python3
"""keep.py CONTROL CORPUS MOST LONGEST: copies into CORPUS up to MOST inputs that reach what it does not reach, each time the one that reaches most of it. CONTROL is what a merge of
libFuzzer's with -set_cover_merge=1 wrote: the names of all inputs, and what each of them reaches. Prints how many were copied."""

import os
import shutil
import sys

control, corpus, most, longest = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
reached, gains = set(), {}
with open(control, encoding="utf-8") as lines:
    count, _first = int(next(lines)), next(lines)
    names = [next(lines).rstrip("\n") for _ in range(count)]
    for line in lines:
        what, number, *features = line.split()
        if what != "FT":
            continue
        name = names[int(number)]
        if os.path.exists(os.path.join(corpus, os.path.basename(name))):
            reached.update(features)
        elif os.path.getsize(name) <= longest:
            gains[name] = set(features)
copied = 0
while copied < most and gains:
    # What an input gains never grows: those that gain nothing are done with.
    gains = {name: left for name, features in gains.items() if (left := features - reached)}
    if not gains:
        break
    best = max(gains, key=lambda name: (len(gains[name]), -os.path.getsize(name), name))
    reached |= gains.pop(best)
    shutil.copy(best, corpus)
    copied += 1
print(copied)
