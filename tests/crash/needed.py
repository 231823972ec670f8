"""What is in a repository and nothing needs, found by the reader of kit/ alone: it is written from docs/format.md and shares nothing with keepd.

needed.py DECODER is asked for one repository after the other, a line {"repository": DIRECTORY, "keys": [FILE…]} each, and answers with a line {"backups": NUMBER, "wrong": [TEXT…]}: a text for
each object that is there for nothing, or that is needed and not there, and for whatever the reader itself said."""

import importlib.util
import json
import sys

sys.dont_write_bytecode = True
spec = importlib.util.spec_from_file_location("decoder", sys.argv[1])
decoder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(decoder)


def wrong(root, files, tell):
    decoder.say = tell
    keys = [key for file in files for key in decoder.read_keys(file)[0]]
    repository = decoder.Repository(root, keys, [], None)
    backups = repository.backups()

    needed = set()
    for backup in backups:
        for source in backup.sources:
            needed.update(page for page, _ in source.pages)
            for entry in repository.entries(source):
                if entry.form != 0:
                    needed.update(entry.table[n] for n in entry.parts)
                needed.update(chunk for chunk, _, _ in repository.segments(entry) if chunk is not None)
    if repository.problems:
        tell("the reader has %d problems" % repository.problems)

    found = set()
    for name in repository.pack_names():
        chunks = {chunk for chunk, _, _ in repository.footer(name)[2]}
        found |= chunks
        if not chunks & needed:
            tell("packs/%s: no backup needs any of its %d chunks" % (name, len(chunks)))
    for chunk in needed - found:
        tell("chunk %s is needed and in no pack" % chunk.hex())

    packs = set(repository.pack_names())
    indexes = {}
    for name in repository.names("index"):
        listed, superseded = repository.body(3, "index", name)
        indexes[name] = ({pack.hex() for pack, _, _, _ in listed}, {old.hex() for old in superseded})
    superseded = {old for _, olds in indexes.values() for old in olds}
    listed = [pack for name, (names, _) in indexes.items() if name not in superseded for pack in names]
    for name, (names, olds) in indexes.items():
        if name in superseded:
            tell("index/%s is superseded" % name)
        elif not names and not olds:
            tell("index/%s says nothing" % name)
    for pack in sorted(set(listed) - packs):
        tell("packs/%s is listed and not there" % pack)
    for pack in sorted(packs - set(listed)):
        tell("packs/%s is in no index" % pack)
    for pack in sorted(pack for pack in set(listed) if listed.count(pack) > 1):
        tell("packs/%s is listed more than once" % pack)

    ids = {backup.name for backup in backups}
    for name in repository.names("marks"):
        mark = repository.body(5, "marks", name)
        if mark[1].hex() not in ids:
            tell("marks/%s is of a backup that is not there" % name)
    return len(backups)


for line in sys.stdin:
    asked, said, backups = json.loads(line), [], None
    try:
        backups = wrong(asked["repository"], asked["keys"], lambda text: said.append(str(text)))
    except Exception as e:
        said.append("%s: %s" % (type(e).__name__, e))
    print(json.dumps({"backups": backups, "wrong": said}), flush=True)
