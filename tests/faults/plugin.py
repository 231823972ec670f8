"""A storage plugin that misbehaves on command: the example plugin, with a rule in a file that says which request meets which fault.

What several processes count together stands in files of the directory `control`: `rule` (JSON: verb, name, nth, times, fault; not there: none), `seen` and `met`
(a byte for each time), `log` (a line for each request), `remembered` (JSON: the objects of before, for listings).
"""

import fcntl
import importlib.util
import json
import os
import sys
import time

spec = importlib.util.spec_from_file_location("directory", sys.argv[1])
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)
control = sys.argv[2]


def at(name):
    return os.path.join(control, name)


def verb_of(request):
    what = request["do"]
    if what == "put":
        return "PutNew" if request["if_absent"] else "Put"
    return {"get": "Get", "stat": "Stat", "list": "List", "delete": "Delete", "hello": "Hello"}.get(what, what)


def fault_of(request):
    verb, name = verb_of(request), request.get("name", request.get("prefix", ""))
    with open(at("lock"), "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with open(at("log"), "a") as log:
            log.write(f"{verb} {name}\n")
        try:
            with open(at("rule")) as file:
                rule = json.load(file)
        except FileNotFoundError:
            return None
        if rule["verb"] != verb or rule["name"] not in name:
            return None
        with open(at("seen"), "a") as file:
            file.write("x")
            seen = file.tell()
        if seen < rule["nth"] or (rule["times"] and seen - rule["nth"] >= rule["times"]):
            return None
        with open(at("met"), "a") as file:
            file.write("x")
        return rule["fault"]


def hang():
    """Until the fault is over."""
    while os.path.exists(at("rule")):
        time.sleep(0.05)


def raw(text):
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def quietly(work):
    """What it does, without its answer."""
    answer, plugin.answer = plugin.answer, lambda *_: None
    try:
        work()
    except (plugin.Refused, OSError):
        pass
    finally:
        plugin.answer = answer


def listing(store, request, fault):
    found = sorted(store.list(request["prefix"]))
    if fault == "Stale":
        with open(at("remembered")) as file:
            found = [(name, size) for name, size in json.load(file) if name.startswith(request["prefix"])]
    elif fault == "Holes":
        found = found[1::2]
    elif fault == "Nothing":
        found = []
    lines = [json.dumps({"name": name, "size": size}) for name, size in found]
    if fault == "Circle":
        lines += lines[:1]
    end = [] if fault in ("NoEnd", "HangInBody") else [json.dumps({"end": True, "count": len(lines) + (fault == "WrongCount")})]
    text = "\n".join(['{"ok": true}'] + lines + end) + "\n"
    if fault == "CutText":
        text = text[: len(text) // 2]
    if fault == "Slow":
        for line in text.splitlines(True):
            time.sleep(0.02)
            raw(line.encode())
    else:
        raw(text.encode())
    if fault == "HangInBody":
        hang()
    if fault in ("NoEnd", "CutText", "HangInBody"):
        sys.exit(0)


def reading(store, request, fault):
    found = store.get(request["name"], request["offset"], request.get("len"))
    half = len(found) // 2
    if fault == "Short":
        plugin.answer({"ok": True, "size": half}, found[:half])
    elif fault == "Flipped":
        found = found[:half] + bytes([found[half] ^ 1]) + found[half + 1 :] if found else found
        plugin.answer({"ok": True, "size": len(found)}, found)
    elif fault == "TooMuch":
        plugin.answer({"ok": True, "size": 1 << 40}, found)
    elif fault == "Slow":
        raw(json.dumps({"ok": True, "size": len(found)}).encode() + b"\n")
        for start in range(0, len(found), half // 3 + 1):
            time.sleep(0.05)
            raw(found[start : start + half // 3 + 1])
    else:
        # Cut, HangInBody
        raw(json.dumps({"ok": True, "size": len(found)}).encode() + b"\n" + found[:half])
        if fault == "HangInBody":
            hang()
        sys.exit(0)


serve = plugin.serve


def misbehave(store, request, data):
    fault = fault_of(request)
    do = lambda: serve(store, request, data)
    if fault is None:
        do()
    elif fault in ("temporary", "denied", "no_space", "not_found"):
        plugin.answer({"error": fault, "message": f"{fault}, as the rule says"})
    elif fault == "Dies":
        sys.exit(3)
    elif fault == "DoneAndDies":
        quietly(do)
        sys.exit(3)
    elif fault == "DoneAndError":
        quietly(do)
        plugin.answer({"error": "temporary", "message": "temporary, as the rule says"})
    elif fault == "Babble":
        raw(b"hello there\n")
    elif fault == "Neither":
        plugin.answer({"fine": True})
    elif fault == "Hang":
        hang()
        sys.exit(0)
    elif fault == "Twice":
        quietly(do)
        do()
    elif fault == "ShortWrite":
        serve(store, request, data[: len(data) // 2])
    elif fault == "Lost":
        plugin.answer({"ok": True})
    elif request["do"] == "list":
        listing(store, request, fault)
    else:
        reading(store, request, fault)


plugin.serve = misbehave
plugin.main()
