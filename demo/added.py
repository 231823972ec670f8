"""Prints what each backup of `keepctl list --json` holds and what it added to the repository, oldest first."""

import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    backups = json.load(file)
for number, backup in enumerate(reversed(backups), 1):
    share = 100 * backup["added_bytes"] / max(1, backup["bytes"])
    print(f"Backup {number} holds {backup['bytes'] / 1e6:.1f} MB and added {backup['added_bytes'] / 1e6:.1f} MB ({share:.0f} %) to the repository.")
