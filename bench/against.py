#!/usr/bin/env python3
"""keepd against the best of the others, column by column, from the results of sidebyside.py: `against.py RESULTS.json`.

One table for each workload: every tool's medians (wall s; memory and repository in MB), then keepd's ratio to the best other
one in the column. Below 1 keepd is ahead. Columns: first, unchanged and mutated backup; what the mutation added to the
repository; list; check of all data; restore; prune to the last backup; the repository after the first backup; peak memory
over all steps. A tool is left out of a column that it does not do (a plain archive has no increments).
"""
import json
import sys

import sidebyside as S

COLUMNS = [("first", "backup1"), ("unchanged", "backup2"), ("mutated", "backup3"), ("added MB", None), ("list", "list"), ("check", "check"),
           ("restore", "restore"), ("prune", "prune"), ("repository MB", None), ("CPU of first", None), ("memory MB", None)]


def cells(M, wl, tool):
    got = {s: M[wl, tool, s] for s in S.STEPS if (wl, tool, s) in M}
    out = {}
    for name, step in COLUMNS:
        if step and step in got:
            out[name] = got[step]["wall"]
    if "backup2" in got and "backup3" in got:
        out["added MB"] = (got["backup3"]["repo"] - got["backup2"]["repo"]) / 1e6
    if "backup1" in got:
        out["repository MB"] = got["backup1"]["repo"] / 1e6
        out["CPU of first"] = got["backup1"]["cpu"]
    if got:
        out["memory MB"] = max(m["rss"] for m in got.values()) / 1e6
    return out


def show(name, x):
    if x is None:
        return "–"
    if name.endswith("MB"):
        return "%.0f" % x if x >= 20 else "%.1f" % x
    return "%.3f" % x if x < .1 else "%.2f" % x


def main():
    with open(sys.argv[1]) as f:
        res = json.load(f)
    M = S.medians(res)
    print("\n# keepd against the best other\n\n%s, %d CPUs, %s\n" % (res["machine"]["cpu"], res["machine"]["cpus"], res["machine"]["mem"]))
    print("Versions: " + "; ".join("%s %s" % (t, v["version"]) for t, v in res["tools"].items() if v["version"]) + "\n")
    for wl in sorted({k[0] for k in M}):
        tools = list(dict.fromkeys(r["tool"] for r in res["runs"] if r["workload"] == wl))
        runs = max(M[k]["n"] for k in M if k[0] == wl)
        rows = {t: cells(M, wl, t) for t in tools}
        # The floor stores a full archive each time: it is a floor for the first backup, check and restore only.
        for t in tools:
            if res["tools"][t]["variant"] == "floor":
                for column in ("unchanged", "mutated", "added MB", "list", "prune"):
                    rows[t].pop(column, None)
        print("**%s** (median of %d)\n\n| | %s |" % (wl, runs, " | ".join(n for n, _ in COLUMNS)))
        print("|---" * (len(COLUMNS) + 1) + "|")
        for t in tools:
            note = "" if res["tools"][t]["encrypted"] else " (no encryption)"
            print("| %s%s | %s |" % (t, note, " | ".join(show(n, rows[t].get(n)) for n, _ in COLUMNS)))
        ratios = []
        for name, _ in COLUMNS:
            best = min((rows[t][name] for t in tools if t != "keepd" and name in rows[t]), default=None)
            mine = rows.get("keepd", {}).get(name)
            ratios.append("%.2f" % (mine / best) if best and mine is not None else "–")
        print("| *keepd / best other* | %s |\n" % " | ".join(ratios))


if __name__ == "__main__":
    main()
