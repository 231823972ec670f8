#!/usr/bin/env python3
"""A storage plugin for keepd: objects as files of a directory. A complete example of docs/storage-plugin.md.

    [destination.example]
    service = "exec"
    command = ["/usr/local/lib/keepd/directory.py"]
    options = { directory = "/srv/backups" }
    encryption = "main"

Anything that can keep named bytes can take the directory's place: change the six functions of Store.
"""

import errno
import json
import os
import sys
import tempfile

VERSION = 1


class Refused(Exception):
    """An answer that is an error: its kind, and what to tell."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


class Store:
    def __init__(self, options):
        unknown = set(options) - {"directory"}
        if unknown:
            raise Refused("invalid", f"unknown options: {', '.join(sorted(unknown))}; allowed is directory")
        if not os.path.isabs(options.get("directory", "")):
            raise Refused("invalid", "the option directory must be an absolute path")
        self.root = options["directory"]

    def path(self, name):
        parts = name.split("/")
        if not name or any(p in ("", ".", "..") or "\0" in p for p in parts):
            raise Refused("invalid", f"'{name}' is no name of an object")
        return os.path.join(self.root, *parts)

    def put(self, name, data, if_absent):
        """The object is there whole, and for good, when this returns; or it is not there at all."""
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=self.root, prefix=".part-")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if if_absent:
                # A second name fails where there is one already, also when two do it at the same time.
                os.link(temporary, path)
            else:
                os.rename(temporary, path)
                temporary = None
            directory = os.open(os.path.dirname(path), os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        finally:
            if temporary:
                os.unlink(temporary)

    def get(self, name, offset, length):
        with open(self.path(name), "rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def stat(self, name):
        return os.stat(self.path(name)).st_size

    def list(self, prefix):
        """Every object whose name starts with the prefix, with its size. An error here must be one: no list is better than half of one."""
        if not os.path.isdir(self.root):
            return

        def fail(error):
            raise error

        for directory, _, files in os.walk(self.root, onerror=fail):
            for file in files:
                path = os.path.join(directory, file)
                name = os.path.relpath(path, self.root)
                if name.startswith(prefix) and not file.startswith(".part-"):
                    yield name, os.path.getsize(path)

    def delete(self, name):
        os.unlink(self.path(name))


def answer(reply, data=b""):
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n" + data)
    sys.stdout.buffer.flush()


def serve(store, request, data):
    what = request["do"]
    if what == "put":
        store.put(request["name"], data, request["if_absent"])
        answer({"ok": True})
    elif what == "get":
        found = store.get(request["name"], request["offset"], request.get("len"))
        answer({"ok": True, "size": len(found)}, found)
    elif what == "stat":
        answer({"ok": True, "size": store.stat(request["name"])})
    elif what == "list":
        # All of it is known before the first line goes out.
        found = list(store.list(request["prefix"]))
        answer({"ok": True})
        for name, size in found:
            answer({"name": name, "size": size})
        answer({"end": True, "count": len(found)})
    elif what == "delete":
        store.delete(request["name"])
        answer({"ok": True})
    else:
        raise Refused("unsupported", f"'{what}' is not known")


def main():
    store = None
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        # What follows a request is read whatever comes of it, or the next line would not be one.
        data = sys.stdin.buffer.read(request["size"]) if request["do"] == "put" else b""
        try:
            if request["do"] == "hello":
                if VERSION not in request["versions"]:
                    raise Refused("unsupported", f"version {VERSION} is spoken here")
                store = Store(request["options"])
                answer({"ok": True, "version": VERSION})
            elif request["do"] == "bye":
                answer({"ok": True})
                return
            elif store is None:
                raise Refused("invalid", "hello comes first")
            else:
                serve(store, request, data)
        except Refused as refused:
            answer({"error": refused.kind, "message": str(refused)})
        except FileExistsError:
            answer({"error": "exists"})
        except FileNotFoundError:
            answer({"error": "not_found"})
        except PermissionError as error:
            answer({"error": "denied", "message": str(error)})
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            answer({"error": "no_space" if full else "failed", "message": str(error)})


if __name__ == "__main__":
    main()
